"""Spreads a model over ranks: one small class per strategy."""
