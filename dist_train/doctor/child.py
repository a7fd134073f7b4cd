"""Runs one check: `python -m dist_train.doctor.child MODULE:FUNCTION [SUBJECT]` prints its lines as JSON.

Output of libraries goes to stderr, so that stdout holds the JSON alone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from dist_train.doctor.base import Subject
from dist_train.registry import resolve


def main(function: str, subject: str = "{}") -> None:
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        given = json.loads(subject)
        lines = resolve(function)(Subject(**given | {"wanted": tuple(given.get("wanted", ()))}))
        json.dump([asdict(line) for line in lines], answer)
    sys.stderr.flush()
    os._exit(0)  # libraries that crash in their own clean-up change nothing


if __name__ == "__main__":
    main(*sys.argv[1:])
