"""Rewrites of quantized graphs and files for the runtimes' integer kernels."""
