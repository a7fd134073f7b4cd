"""Trackers: send scalars to wandb, TensorBoard, JSON lines; one small class each."""
