"""`dist-train doctor`: what of this machine, this installation and this environment works, and what to type where it does not."""
