"""Launchers: turn a Job into the command or the script that starts its ranks, without torch."""
