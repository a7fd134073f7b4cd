"""Connects the ranks: world, process group and preflight checks."""
