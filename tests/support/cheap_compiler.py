"""A module for `--import`: the estimate takes compiling for free, so that `compile: auto` compiles tiny runs.

BROKEN_COMPILER names a rank whose C++ compiler is one that fails, and that does not find the other ranks' kernels.
"""

from __future__ import annotations

import os

from dist_train.training import compile_costs

compile_costs._GRAPH = compile_costs._OPERATOR = 0.0
if os.environ.get("BROKEN_COMPILER", "") == os.environ.get("RANK", "0"):
    import torch._inductor.config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "broken")
    torch._inductor.config.cpp.cxx = ("false",)  # type: ignore[assignment]
