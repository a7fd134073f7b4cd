"""Implements the stages of a run: train, half, ptq, qat, convert, export."""
