"""Strategies: spread a model over ranks; one small class each."""
