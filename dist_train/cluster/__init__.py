"""Reads ranks, host lists, ports and network interfaces from launcher and machine, without torch."""
