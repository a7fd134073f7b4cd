"""The settings: read from YAML and the command line, checked, and reported with all mistakes at once, without torch."""
