"""The ranks together: world, process group and preflight."""
