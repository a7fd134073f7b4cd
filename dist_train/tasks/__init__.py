"""Tasks: loss, score and metrics of each kind of problem, which are unknown to the packages below."""

from dist_train.tasks.base import Task
from dist_train.tasks.classification import Classification

__all__ = ["Classification", "Task"]
