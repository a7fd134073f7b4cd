"""Models by name, their weights and their BatchNorm statistics."""
