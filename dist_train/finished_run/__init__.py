"""Uses a finished run: opens, evaluates, exports it, and predicts with it."""
