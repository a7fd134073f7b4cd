"""dist-train report: a page about one or several runs, from their directories. Only the command line knows it; torch is not imported."""
