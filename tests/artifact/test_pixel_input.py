"""Programs and formats that take uint8 images and normalize them inside: `export.input: uint8`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train import registry
from dist_train.artifact.bundle import Bundle, manifest
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8
from dist_train.artifact.load import load_artifact
from dist_train.artifact.manifest import mistake_in
from dist_train.artifact.pixel_input import PixelInput, pixel_input
from dist_train.artifact.store import write_artifact
from dist_train.artifact.verify import prove
from dist_train.data.augment.steps import Augmentation
from dist_train.errors import DataError
from dist_train.lowering.base import Reference
from dist_train.lowering.comparison import _moved, is_rounding
from dist_train.programs.program import Program
from dist_train.programs.pt2 import program_bytes
from tests.support.converted_nets import SHAPE, converted_net, float_net, program_of
from tests.support.foreign_process import answers
from tests.support.overflow import needs_vnni

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DESCRIBED: dict[str, Any] = {
    "input_shape": list(SHAPE),
    "resize": None,
    "mean": list(MEAN),
    "std": list(STD),
    "classes": [f"class {place}" for place in range(10)],
}


@pytest.fixture
def pixels() -> PixelInput:
    found = pixel_input(DESCRIBED, "uint8")
    assert found is not None and pixel_input(DESCRIBED, "float32") is None
    return found


def test_pixels_are_found_again_in_what_the_loader_normalized(pixels: PixelInput) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(9).view(3, *SHAPE)
    normalized = Augmentation([], seed=0, mean=MEAN, std=STD).normalize(images)
    assert torch.equal(pixels.normalized(images), normalized)
    assert torch.equal(pixels.pixels(normalized), images)
    assert torch.equal(pixels.before(torch.nn.Identity())(images), normalized)


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, *SHAPE), torch.full((1, *SHAPE), 9.0), torch.full((1, *SHAPE), torch.nan)]
)
def test_other_numbers_are_no_pixels(inputs: Tensor, pixels: PixelInput) -> None:
    with pytest.raises(DataError, match="takes uint8 images, and the data gives other numbers"):
        pixels.pixels(inputs)


def test_uint8_images_are_moved_by_few_steps_and_never_around() -> None:
    images = torch.tensor([0, 255, 100, 254], dtype=torch.uint8).repeat(5000)
    moved = _moved(images)
    steps = moved.int() - images.int()
    assert steps.abs().max() == 1
    assert 0.005 < steps.abs().float().mean() < 0.02
    same = Reference(call=lambda batch: batch.float(), source=torch.nn.Identity())
    assert is_rounding(0.1, same, images) and not is_rounding(0.5, same, images)


def test_a_manifest_with_uint8_input_needs_the_normalization() -> None:
    right = {
        "models": {"fp32": {"file": "model.pt2", "kind": "pt2"}},
        "default": "fp32",
        "task": "classification",
        "input": {"shape": [None, 3, 8, 8], "dtype": "uint8"},
        "normalization": {"mean": list(MEAN), "std": list(STD)},
        "classes": [],
        "ranges_sha256": None,
        "world_sizes": [1],
        "metrics": {},
        "files": {"model.pt2": {"sha256": "0" * 64, "bytes": 1}},
    }
    assert mistake_in(right) == ""
    for wrong in (None, {"mean": [0.5], "std": [0.5]}):
        assert "uint8 input without a mean and a std" in mistake_in({**right, "normalization": wrong})


@needs_vnni
@pytest.mark.slow
def test_every_program_and_format_takes_pixels_and_runs_without_dist_train(pixels: PixelInput, tmp_path: Path) -> None:
    images = pixels.drawn(16, seed=0)
    inputs = pixels.normalized(images)
    net = float_net(channels_last=True)
    converted = converted_net(net)
    with torch.no_grad():
        outputs = converted(inputs)
    models: dict[str, Deployable] = {
        "int8": deploy_int8(Program("pt2", program_bytes(program_of(converted))), outputs, pixels=pixels),
        "fp32": deploy_float(net, inputs, pixels),
        "bf16": deploy_half(net, "bf16", inputs, pixels),
    }
    bundle = Bundle("int8")
    for each in models.values():
        bundle.add(each)
    formats = [name for name in registry.export_formats.names() if not registry.export_formats.entry(name).missing()]
    for name in formats:
        for model in ("int8", "fp32"):
            bundle.add_format(models[model], name, images, 1)
    results = {"models": {}, "world_sizes": [1]}
    content = manifest(bundle, DESCRIBED, "classification", results, None, "uint8")
    expected = {name: each.outputs for name, each in models.items()}
    found = prove(bundle.files, content, images, expected, bundle.answers, 300)
    assert max(found.models.values()) < 1e-5
    assert len(found.formats) == 2 * len(formats) and max(found.formats.values()) < 0.05
    write_artifact(tmp_path / "export", bundle.files, content)
    call, _ = load_artifact(tmp_path / "export", "fp32")
    with torch.no_grad():
        torch.testing.assert_close(call(images), net(inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match=r"takes uint8 \[batch, 3, 16, 16\], but got torch.float32"):
        call(inputs)
    (tmp_path / "elsewhere").mkdir()
    for key, by_rows in answers(tmp_path / "export", tmp_path / "elsewhere").items():
        assert set(by_rows) <= {"1", "7"} and by_rows, key
