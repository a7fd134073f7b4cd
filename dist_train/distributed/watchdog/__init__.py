"""Watches the ranks: heartbeats, stop signals, and a verdict on the rank that is stuck."""
