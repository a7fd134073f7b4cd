"""The terminal's output: progress, epoch lines and the table of results."""
