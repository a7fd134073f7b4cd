"""What a batch means: loss, scores and metrics of each kind of problem. Nothing below a task knows about classes."""

from dist_train.tasks.base import Task
from dist_train.tasks.classification import Classification

__all__ = ["Classification", "Task"]
