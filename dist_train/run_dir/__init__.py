"""The run on disk: paths, checkpoints, ledger, retention and status."""
