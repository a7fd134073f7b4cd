"""Artifacts of models that take and return trees: every program and format, checked inputs, the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import registry, trees
from dist_train.artifact.bundle import Bundle, manifest
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8
from dist_train.artifact.load import load_artifact, require_leaves
from dist_train.artifact.manifest import mistake_in
from dist_train.artifact.store import write_artifact
from dist_train.artifact.verify import prove
from dist_train.errors import ArtifactError, DataError
from dist_train.finished_run.open import described_by
from dist_train.finished_run.predict import predict
from dist_train.lowering.int8_session import choose, open_in, runtime_bytes
from dist_train.programs.pt2 import load_program
from dist_train.programs.signature import Dynamic, leaves_of
from dist_train.trees import Tree
from tests.quantization.pt2e.test_trees import backend_of, calibrated, difference, example_of
from tests.support.overflow import needs_vnni
from tests.support.tree_nets import DYNAMIC, AnsweringNet, PairNet, batches_of, pairs, seeded, texts

DESCRIBED = {"resize": None, "mean": [], "std": [], "classes": ["a", "b", "c", "d"], "input_shape": None}


def deployed(kind: type[nn.Module], rows: Tree, dynamic: Dynamic) -> dict[str, Deployable]:
    net, backend = seeded(kind), backend_of(kind)
    converted = backend.convert(calibrated(backend, net, rows))
    with torch.no_grad():
        outputs = trees.plain(trees.call(converted, rows))
    names = [name for name, _ in trees.named_leaves(rows)]
    return {
        "int8": deploy_int8(backend.serialize(converted, rows), outputs, names=names, dynamic=dynamic),
        "fp32": deploy_float(net, rows, dynamic=dynamic),
        "bf16": deploy_half(net, "bf16", rows, dynamic=dynamic),
    }


@needs_vnni
@pytest.mark.slow
@pytest.mark.parametrize("kind", [PairNet, AnsweringNet])
def test_programs_and_formats_of_a_tree_answer_alike_at_any_size(kind: type[nn.Module], tmp_path: Path) -> None:
    rows, dynamic = example_of(kind), {} if kind is PairNet else DYNAMIC
    models, bundle = deployed(kind, rows, dynamic), Bundle("int8")
    for each in models.values():
        bundle.add(each)
    formats = [name for name in registry.export_formats.names() if not registry.export_formats.entry(name).missing()]
    if dynamic and "executorch" in formats:
        formats.remove("executorch")
        with pytest.raises(ArtifactError, match="ExecuTorch plans its memory ahead, and sequence varies"):
            bundle.add_format(models["fp32"], "executorch", rows, 1)
    for name in formats:
        bundle.add_format(models["fp32"], name, rows, 1)
        if name != "executorch":
            bundle.add_format(models["int8"], name, rows, 1)
    described = {**DESCRIBED, "dynamic": {name: {"1": "sequence"} for name in dynamic}}
    outputs = models["int8"].output_names
    leaves = leaves_of(rows, dynamic)
    content = manifest(
        bundle, described, "classification", {"models": {}, "world_sizes": [1]}, None, leaves[0].dtype, leaves, outputs
    )
    found = prove(
        bundle.files, content, rows, {name: each.outputs for name, each in models.items()}, bundle.answers, 300
    )
    assert max(found.models.values()) < 1e-5 and max(found.formats.values()) < 0.05, found
    write_artifact(tmp_path / "export", bundle.files, content)
    written = tmp_path / "export"
    call, read = load_artifact(written, "fp32")
    assert read["inputs"] == [leaf.as_json() for leaf in leaves] and read["outputs"] == outputs and "input" not in read
    for batch in batches_of(models["fp32"].source):  # type: ignore[arg-type]
        assert difference(call(batch), models["fp32"].call(batch)) < 1e-5
        for name, entry in read["models"].items():
            usages = [(entry["file"], entry["usage"])]
            usages += [(each["files"][0], each["usage"]) for each in entry.get("formats", {}).values()]
            for file, usage in usages:
                if not file.endswith(".pte") or trees.rows_of(batch) == 1:
                    assert_as_used(written / file, usage, batch, models[name])


def assert_as_used(file: Path, usage: str, batch: Tree, model: Deployable) -> None:
    """Runs a `usage` of the manifest and compares what it returns with the model in memory."""
    *before, last = usage.split("; ")
    names: dict[str, Any] = {
        "FILE": str(file),
        "inputs": {name: leaf.numpy() for name, leaf in trees.named_leaves(batch)},
    }
    grad = torch.is_grad_enabled()
    try:
        exec("\n".join(before), names)
        found = eval(last, names)
    finally:
        torch.set_grad_enabled(grad)
    with torch.no_grad():
        expected = trees.leaves(model.call(batch))
    if isinstance(found, dict):
        found = list(found.values())
    found = found if isinstance(found, list) else [found]
    for actual, right in zip(found, expected, strict=True):
        assert (torch.as_tensor(actual) - right).abs().max() < 0.05 * right.abs().max(), (file.name, usage)


@pytest.mark.heavy
def test_int8_in_its_runtime_returns_the_tree() -> None:
    model = deployed(AnsweringNet, texts(16), DYNAMIC)["int8"]
    name = choose("auto")
    data = runtime_bytes(name, load_program(model.program.data), texts(2))
    call = open_in(name, data, texts(2), 1)
    found = call(texts(5, 9))
    assert list(found) == ["logits", "hidden"] and found["hidden"].shape == (5, 16)
    assert difference(found, model.call(texts(5, 9))) < 0.05


LEAVES = [leaf.as_json() for leaf in leaves_of(texts(2), DYNAMIC)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda inputs: inputs.pop("attention_mask"), "and the input lacks attention_mask"),
        (lambda inputs: inputs.update(mask=0), "and the input has mask"),
        (lambda inputs: inputs.update(input_ids=[1]), "and the input lacks input_ids and has input_ids.0"),
        (lambda inputs: inputs.update(input_ids=3), "input_ids of the input is a int, not a tensor"),
        (
            lambda inputs: inputs.update(input_ids=torch.zeros(2, 7)),
            "takes input_ids: int64 [batch, any], but got torch.float32 [2, 7]",
        ),
        (
            lambda inputs: inputs.update(attention_mask=torch.ones(2, 7, 1, dtype=torch.int64)),
            "takes attention_mask: int64 [batch, any], but got torch.int64 [2, 7, 1]",
        ),
        (
            lambda inputs: inputs.update(attention_mask=torch.ones(3, 7, dtype=torch.int64)),
            "unlike numbers of rows: input_ids 2, attention_mask 3",
        ),
    ],
)
def test_a_wrong_leaf_is_named(change: Any, said: str) -> None:
    inputs = dict(texts(2))
    require_leaves(inputs, LEAVES)
    change(inputs)
    with pytest.raises(DataError) as error:
        require_leaves(inputs, LEAVES)
    assert said in str(error.value), error.value


def test_a_tuple_is_asked_for_where_names_are_positions() -> None:
    leaves = [leaf.as_json() for leaf in leaves_of(pairs(2))]
    with pytest.raises(DataError, match=r"the input is a Tensor") as error:
        require_leaves(pairs(2)[0], leaves)
    assert "call it with (tensor, tensor)" in error.value.hint
    with pytest.raises(DataError, match=r"takes 1: float32 \[batch, 4\], but got torch.float32 \[2, 8\]"):
        require_leaves((pairs(2)[0], pairs(2)[0]), leaves)


def test_a_manifest_of_several_inputs_and_one_of_an_older_version_are_read(tmp_path: Path) -> None:
    older = {
        "models": {"int8": {"file": "model.pt2", "kind": "pt2"}},
        "default": "int8",
        "task": "classification",
        "input": {"shape": [None, 3, 8, 8], "dtype": "float32", "resize": None},
        "normalization": {"mean": [], "std": []},
        "classes": [],
        "ranges_sha256": None,
        "world_sizes": [1],
        "metrics": {},
        "files": {"model.pt2": {"sha256": "0" * 64, "bytes": 1}},
    }
    assert mistake_in(older) == "" and described_by(older)["input_shape"] == [3, 8, 8]
    newer = {**{key: value for key, value in older.items() if key != "input"}, "inputs": LEAVES}
    assert mistake_in(newer) == "" and described_by(newer)["input_shape"] is None
    assert "neither input nor inputs" in mistake_in({**newer, "inputs": []})
    assert "inputs.1.dtype" in mistake_in({**newer, "inputs": [LEAVES[0], {**LEAVES[1], "dtype": "object"}]})


@pytest.mark.heavy
def test_predict_says_that_it_reads_images_only(tmp_path: Path) -> None:
    model, bundle = deploy_float(seeded(PairNet), pairs(4)), Bundle("fp32")
    bundle.add(model)
    results = {"models": {}, "world_sizes": [1]}
    content = manifest(bundle, DESCRIBED, "classification", results, None, "float32", leaves_of(pairs(4)))
    write_artifact(tmp_path / "export", bundle.files, content)
    with pytest.raises(ArtifactError, match="predict reads image files, and the model takes several inputs: 0, 1"):
        next(predict(tmp_path / "export", ["a.png"]))
