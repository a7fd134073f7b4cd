"""Watches the ranks: heartbeats, stop signals, and a report of which rank is stuck."""
