"""Tests this machine, installation and environment for `dist-train doctor`."""
