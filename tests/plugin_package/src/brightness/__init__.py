"""Guesses how bright an image is. Importing it (`--import brightness`) registers everything, as its entry points do."""

from brightness import backend, data, model, optim, stage, strategy, task, tracker  # noqa: F401
