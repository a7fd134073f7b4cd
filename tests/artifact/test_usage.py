"""The manifest's `usage`: every file of an artifact is opened and run where there is no dist_train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train import registry
from dist_train.artifact.bundle import Bundle
from dist_train.artifact.deployable import deploy_float, deploy_half, deploy_int8
from dist_train.artifact.store import write_artifact
from dist_train.programs.program import Program
from dist_train.programs.pt2 import OPERATORS, program_bytes
from tests.support.converted_nets import converted_net, float_net, images, program_of
from tests.support.foreign_process import answers
from tests.support.overflow import needs_vnni

pytestmark = pytest.mark.heavy


@needs_vnni
@pytest.mark.slow
def test_every_file_is_run_as_the_manifest_says_without_dist_train(tmp_path: Path) -> None:
    net = float_net(channels_last=True)
    converted = converted_net(net)
    with torch.no_grad():
        int8 = deploy_int8(Program("pt2", program_bytes(program_of(converted))), converted(images(4)))
    models = {"int8": int8, "fp32": deploy_float(net, images(4)), "bf16": deploy_half(net, "bf16", images(4))}
    bundle = Bundle("int8")
    for each in models.values():
        bundle.add(each)
    formats = [name for name in registry.export_formats.names() if not registry.export_formats.entry(name).missing()]
    for name in formats:
        bundle.add_format(models["int8"], name, images(4), 1)
    fields = dict.fromkeys(("task", "normalization", "classes", "ranges_sha256", "world_sizes", "metrics"))
    described = {**fields, "models": bundle.models, "default": "int8", "input": {"shape": [None, 3, 16, 16]}}
    write_artifact(tmp_path / "export", bundle.files, described)
    (tmp_path / "elsewhere").mkdir()
    found = answers(tmp_path / "export", tmp_path / "elsewhere")
    assert found.keys() == {*models, *(f"int8/{name}" for name in formats)}
    drawn = torch.from_numpy(np.random.default_rng(0).random((7, 3, 16, 16), dtype=np.float32))
    for key, by_rows in found.items():
        for rows, outputs in by_rows.items():
            with torch.no_grad():
                expected = models[key.partition("/")[0]].call(drawn[: int(rows)])
            assert (torch.tensor(outputs) - expected).abs().max() < 0.03 * expected.abs().max(), (key, rows)
    assert [OPERATORS in bundle.models[name]["usage"] for name in models] == [True, False, False]
