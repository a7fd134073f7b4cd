"""Runs a config from the first stage to results.json."""
