"""Compiles the model that training steps run. Evaluation runs it uncompiled, which saves compiling its shapes."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.errors import first_line
from dist_train.lowering import inductor
from dist_train.strategies.base import Strategy, kept_buffers
from dist_train.training.outputs import nothing_of
from dist_train.trees import Tree, call, plain, shapes_of


class Compilation(ABC):
    """The way in which a stage's steps run the model.

    Attributes:
        active: True while steps may compile, which takes longer than a step.
    """

    active = True

    @abstractmethod
    def wrap(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        """Returns the module whose forward the steps call. Collective."""


class Uncompiled(Compilation):
    """Runs the model as it is."""

    active = False

    def wrap(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        return strategy.wrap(model)


class Compiled(Compilation):
    """Compiles every shape that comes, as `compile: true` asks for; a model that does not compile is an error."""

    def wrap(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        return strategy.wrap(_compiled(model))


class CompiledFullSteps(Compilation):
    """Compiles the shapes of a full step; others, as of an epoch's last step, run uncompiled.

    Which code a step runs so depends on its shapes alone, and not on where a run was resumed.

    Args:
        passes: inputs of each shape; their values do not count.
        failed: called on all ranks, with the reason, if some rank cannot compile the model, before any step is taken.
            None: the stage has taken compiled steps before, so that a failure is an error.
    """

    def __init__(self, passes: Sequence[Tree], failed: Callable[[str], None] | None) -> None:
        self._passes, self._failed = passes, failed

    def wrap(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        if not self.active:  # it failed before
            return strategy.wrap(model)
        passes = self._passes
        self._passes = [inputs.to("meta") for inputs in passes]  # they are as large as a batch
        wrapped = strategy.wrap(_FullSteps(model, passes))
        if self._failed is None:
            return wrapped
        world = strategy.world
        with world.heartbeat.within("set-up", at_least=world.timeout):
            reasons = world.gather(_try(passes, wrapped, strategy))
        found = [f"{reason} (rank {rank})" for rank, reason in enumerate(reasons) if reason is not None]
        failed, self._failed = self._failed, None
        if not found:
            return wrapped
        self.active = False
        failed(found[0])
        del wrapped
        gc.collect()  # ends what the strategy has hooked into the parameters
        return strategy.wrap(model)


def _try(passes: Sequence[Tree], wrapped: nn.Module, strategy: Strategy) -> str | None:
    """Runs passes that leave gradients and buffers as they were; returns why one failed.

    They run inside the wrapper, as later ones do: DistributedDataParallel has large graphs split. No gradient is
    averaged, so that no rank waits for one that failed.
    """
    try:
        for inputs in passes:
            with kept_buffers(wrapped), strategy.no_sync(wrapped):
                with strategy.autocast():
                    outputs = call(wrapped, inputs)
                nothing_of(plain(outputs)).backward()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        wrapped.zero_grad(set_to_none=True)
    return None


class _FullSteps(nn.Module):
    def __init__(self, model: nn.Module, passes: Sequence[Tree]) -> None:
        super().__init__()
        self._orig_mod = model  # parameters have the names that torch.compile gives them
        self._compiled = (_compiled(model),)  # in a tuple, as its parameters are those of the model
        self._shapes = frozenset(map(shapes_of, passes))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A model takes one tensor, a tuple of positional arguments, or a dict of keywords.
        inputs = kwargs or (args[0] if len(args) == 1 else args)
        run = self._compiled[0] if shapes_of(inputs) in self._shapes else self._orig_mod
        return run(*args, **kwargs)


def _compiled(model: nn.Module) -> nn.Module:
    """Returns the model compiled for training.

    Shapes are static. With dynamic shapes the kernels would depend on which shape came first, and so on where a run was
    resumed. Reaching the recompile limit is an error for the same reason: torch would silently run uncompiled code.
    """
    folder = kernel_cache()
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return compiled


def kernel_cache(cpuinfo: Path = Path("/proc/cpuinfo")) -> Path | None:
    """Returns the folder of the user's cache for compiled kernels, which later runs find again; None without a home.

    Kernels are made for the CPU's own instructions, and a home may be shared by unlike machines: each kind has its own.
    """
    flags = ""
    with suppress(OSError):
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    kind = f"{torch.__version__} {platform.machine()} {platform.python_version()} {flags}"
    name = hashlib.sha256(kind.encode()).hexdigest()[:16]
    if given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given)
    else:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no HOME, and a user id without a name: torch's own place for it
            return None
    return base / "dist_train" / "kernels" / name


def missing_compiler(on_gpu: bool) -> tuple[str, str] | None:
    """Looks for the compiler that torch.compile would ask for only at the first step; imports nothing for that.

    Inductor compiles C++ on the CPU; Triton compiles its launchers on GPUs, in C.

    Returns:
        what is missing, and how to get it; None if it is there.
    """
    if on_gpu:
        found, variable, package = _c_compiler(), "CC", "gcc"
    else:
        found, variable, package = inductor.compiler(), "CXX", "g++"
    if found is not None:
        return None
    named = f": {variable} is {os.environ[variable]}, which is no program" if variable in os.environ else ""
    what = f"no {'C' if on_gpu else 'C++'} compiler{named}"
    return what, f"apt-get install {package}, or name one in {variable}"


def _c_compiler() -> str | None:
    """Returns the path of the C compiler that Triton will use ($CC, gcc or clang), or None."""
    if "CC" in os.environ:
        return shutil.which(os.environ["CC"])
    return shutil.which("gcc") or shutil.which("clang")
