"""Checks the object store of a run: that objects can be listed, written, read and removed there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from dist_train.doctor.base import Line, Subject, bad, good
from dist_train.errors import DistTrainError


def check(subject: Subject) -> Iterator[Line]:
    if not subject.store:
        return
    from dist_train.run_dir.store import Store  # half a second

    name = f".doctor-{uuid.uuid4().hex}"  # hidden: no run takes it for its own
    began = time.perf_counter()
    try:
        store = Store(subject.store)
        count = len(store.sizes())
        store.write(name, b"x")
        came_back = store.read(name)
        store.remove([name])
    except DistTrainError as error:
        yield bad(error.message, error.hint)
        return
    if came_back != b"x":
        yield bad(f"{subject.store}: an object that was written is not there afterwards", "look at the store")
        return
    took = time.perf_counter() - began
    yield good(f"{subject.store}: {count} objects; listed, written, read and removed in {took:.1f} s")
