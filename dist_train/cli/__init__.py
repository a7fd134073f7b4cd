"""The command line: parses what is typed and calls one function."""
