"""Where scalars go: one small class each."""
