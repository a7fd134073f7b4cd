"""Trains and evaluates models: the one loop, its state, hooks, logs and reductions."""
