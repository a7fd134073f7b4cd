"""`dist-train doctor`: tests what of this machine, installation and environment works, and says what to type where it does not."""
