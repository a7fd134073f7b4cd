"""`python -m dist_train`: the same program as `dist-train`."""

import sys

from dist_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
