"""Tasks: loss, score and metrics of each kind of problem."""

# Packages below this one do not know about classes.

from dist_train.tasks.base import Task
from dist_train.tasks.classification import Classification

__all__ = ["Classification", "Task"]
