"""Rows in an order that depends on (seed, epoch) alone, as batches of tensors."""
