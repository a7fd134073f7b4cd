"""What the terminal shows: progress, epoch lines and the table of results."""
