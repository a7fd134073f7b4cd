"""Launchers: pure functions from a Job to the command or the script that starts its ranks. Standard library only."""
