"""The one training loop, and what goes on at its fixed points."""
