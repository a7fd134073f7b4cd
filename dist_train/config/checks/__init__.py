"""Checks of settings that depend on one another."""
