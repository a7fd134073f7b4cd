"""Uses a finished run: opens, evaluates and exports it, and predicts with it."""
