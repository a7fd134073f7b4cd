"""Full steps are compiled and others are not; kernels lie in the user's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dist_train.distributed.world import World
from dist_train.training.compilation import CompiledFullSteps, kernel_cache
from dist_train.training.loop import fit
from tests.support.training_loops import flat, make, mlp


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_full_steps_are_compiled_once_and_a_partial_batch_not_at_all() -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made = make(World(), mlp())  # 37 samples in batches of 10
        run = made.run
        if compiled:
            passes = run.loader.full_passes(run.example)
            assert [each.shape for each in passes] == [(10, 1, 4, 4)]
            run.compilation = CompiledFullSteps(passes, pytest.fail)
        state = fit(run, None)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)
        found.append((made.recorder.of("loss"), flat(state.chosen)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5) and found[1][1] == pytest.approx(found[0][1], abs=1e-5)


def test_full_passes_have_each_shape_of_uneven_pieces() -> None:
    run = make(World(), mlp(), micro=4).run
    assert sorted(len(each) for each in run.loader.full_passes(run.example)) == [3, 4]


def test_each_kind_of_cpu_has_its_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    for flags in ("avx2", "avx2 avx512f", "avx2"):
        (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\nMHz: {len(folders)}\n")
        folders.append(kernel_cache(tmp_path / "cpuinfo"))
    assert folders[0] == folders[2] != folders[1]
    assert folders[0] is not None and folders[0].is_relative_to(tmp_path / "dist_train")
    assert kernel_cache(tmp_path / "none") is not None
