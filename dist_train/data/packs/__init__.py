"""Packs: decoded images of a folder in one memory-mapped file, made once for all epochs and runs."""
