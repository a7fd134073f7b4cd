"""Augmentation of image batches as a function of (seed, epoch, sample id)."""
