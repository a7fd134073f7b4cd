"""Passes the other ranks' values to rank 0 through the store, from threads beside the loop, where no collective can."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from dist_train.distributed.polling import attempts
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, DistTrainError, PeerError


class Reports:
    """One report of each rank but rank 0: a value, or the error for which there is none.

    Args:
        topic: names the reports in the store; each topic is used once.
    """

    def __init__(self, world: World, topic: str) -> None:
        self._world, self._prefix = world, f"{world.nonce}/{topic}"

    def tell(self, value: Any) -> None:
        """Reports a JSON value."""
        self._set({"value": value})

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Reports an error of the body, for which there is no value."""
        try:
            yield
        except BaseException as error:
            message, hint = (error.message, error.hint) if isinstance(error, DistTrainError) else (repr(error), "")
            with suppress(RuntimeError, DistTrainError):  # the original error must stay visible
                self._set({"error": message, "hint": hint})
            raise

    def collect(self, going_on: Callable[[], None]) -> list[Any]:
        """Waits for all reports, in the ranks' order, as long as no rank has failed.

        going_on: called now and then; its error ends the wait.

        Raises:
            CheckpointError: a rank reported an error; names it.
            PeerError: a rank failed otherwise.
        """
        return [self._collected(rank, going_on) for rank in range(1, self._world.world_size)]

    def _collected(self, rank: int, going_on: Callable[[], None]) -> Any:
        key, world, store = f"{self._prefix}/{rank}", self._world, self._world.store
        if store is None:
            raise PeerError("the store of the ranks' process group has not answered", "start again")
        for _ in attempts(float("inf")):
            if world.asked(partial(store.check, [key])):
                break
            world.asked(world.raise_peer_failure)
            going_on()
        found = json.loads(world.asked(partial(store.get, key)))
        world.asked(partial(store.delete_key, key))
        if "error" in found:
            raise CheckpointError(f"rank {rank}: {found['error']}", found["hint"])
        return found["value"]

    def _set(self, value: dict[str, Any]) -> None:
        store = self._world.store
        if store is not None:
            self._world.asked(partial(store.set, f"{self._prefix}/{self._world.rank}", json.dumps(value)))
