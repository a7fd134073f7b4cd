"""The steps of a run, in the order that the config names."""
