"""A program that opens files, or whose archive lies, is refused before torch opens it."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import ArtifactError
from dist_train.programs.archive import FILE_OPERATORS
from dist_train.programs.pt2 import check_archive, export_program, load_program, program_bytes
from dist_train.programs.torchscript import load_script, script_bytes, trace
from tests.artifact.test_load import edit_model, rewritten
from tests.support.crafted import MOST_MEGABYTES, inflated, refusal

INPUTS = torch.ones(2, 3)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


@pytest.fixture(scope="module")
def program() -> bytes:
    return program_bytes(export_program(_Net().eval(), INPUTS))


@pytest.fixture(scope="module")
def script() -> bytes:
    return script_bytes(trace(_Net().eval(), INPUTS), torch.backends.quantized.supported_engines[-1])


def _opening(planted: Path) -> Callable[[dict[str, bytes]], None]:
    """Replaces the last operator of the graph by one that makes a file."""

    def edit(model: dict[str, Any]) -> None:
        node = model["graph_module"]["graph"]["nodes"][-1]
        arguments = {"filename": {"as_string": str(planted)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]

    return edit_model(edit)


def test_a_graph_that_opens_a_file_is_refused_and_torch_would_run_it(tmp_path: Path, program: bytes) -> None:
    attack = rewritten(program, _opening(tmp_path / "planted"))
    with pytest.raises(ArtifactError, match=r"the operator 'torch\.ops\.aten\.from_file\.default'"):
        load_program(attack)
    assert not (tmp_path / "planted").exists()
    torch.export.load(io.BytesIO(attack)).module(check_guards=False)(INPUTS)
    assert (tmp_path / "planted").exists()  # so the test is about something


def test_the_list_has_all_operators_of_this_torch_that_take_a_file() -> None:
    found = {
        schema.name.removeprefix("aten::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::")
        for argument in schema.arguments
        if "str" in str(argument.type) and any(word in argument.name.lower() for word in ("file", "path", "url"))
    }
    assert found == FILE_OPERATORS


def _inside(model: dict[str, Any]) -> None:
    node = model["graph_module"]["graph"]["nodes"][-1]
    graph = copy.deepcopy(model["graph_module"]["graph"])
    graph["nodes"][0]["target"] = "torch.ops.aten.from_file.default"
    node["inputs"].append({"name": "body", "arg": {"as_graph": {"name": "body", "graph": graph}}, "kind": 1})


def _tensor(**fields: Any) -> Callable[[dict[str, bytes]], None]:
    def edit(records: dict[str, bytes]) -> None:
        config = json.loads(records["data/weights/model_weights_config.json"])
        entry = next(iter(config["config"].values()))
        (entry if "path_name" in fields else entry["tensor_meta"]).update(fields)
        records["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_model(_inside), r"the operator 'torch\.ops\.aten\.from_file"),
        (_tensor(sizes=[{"as_int": 10**9}, {"as_int": 1}]), "reaches beyond its file"),
        (_tensor(strides=[{"as_int": 10**15}, {"as_int": 1}]), "not an exported program"),
        (_tensor(storage_offset={"as_int": 10**12}), "reaches beyond its file"),
        (_tensor(sizes=[{"as_int": -1}]), "no sizes and strides"),
        (_tensor(sizes="many"), "not an exported program"),
        (_tensor(path_name="../../secret"), "in a file '../../secret'"),
        (_tensor(path_name="weight_77"), "not an exported program"),
        (edit_model(lambda model: model.update(graph_module=[])), "exported program"),
        (edit_model(lambda model: model.update(schema_version={"major": 10**9})), "cannot read the exported program"),
        (lambda records: records.update({"models/model.json": b"[" * 100_000}), "more than 100 levels"),
        (lambda records: records.update({"models/model.json": b"9" * 5000}), "not an exported program"),
    ],
)
def test_an_archive_that_lies_is_refused_in_words(
    program: bytes, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_program(rewritten(program, change))


def _inserted(line: str, script: bytes) -> bytes:
    """The archive with a line of code at the end of `forward`, as one would write it by hand."""

    def change(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith(".py") and b"def forward" in records[name])
        before, _, result = records[name].rpartition(b"    return ")
        records[name] = before + f"    {line}\n".encode() + b"    return " + result

    return rewritten(script, change)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('_9 = torch.from_file("PLANTED", True, 4)', "the operator 'from_file'"),
        ('torch.save(x, "PLANTED")', "the operator 'save'"),
        ('x.save("PLANTED")', "the operator 'save'"),
        ('_9 = ops.aten.from_file("PLANTED", True, 4)', "the operator 'from_file'"),
        ("_9 = ops.c10d.barrier(x)", "c10d::barrier"),
        ("_9 = ops \\\n . c10d.barrier(x)", "c10d::barrier"),
        ("_9 = ops", "torch.ops without a name"),
        ("_9 = ops.prim.rpc_sync(x)", "the operator 'rpc_sync'"),
        ("_9 : __torch__.torch.classes.dist_c10d.Store = x", r"torch\.classes\.dist_c10d"),
    ],
)
def test_a_script_that_names_an_operator_that_does_more_is_refused(
    tmp_path: Path, script: bytes, line: str, message: str
) -> None:
    planted = tmp_path / "planted"
    with pytest.raises(ArtifactError, match=message):
        load_script(_inserted(line.replace("PLANTED", str(planted)), script))
    assert not planted.exists()


def test_a_script_with_an_object_of_another_class_or_another_file_is_refused(script: bytes) -> None:
    pickled = b"\x80\x02c__torch__.torch.classes.profiler\n_RecordFunction\nq\x00."
    with pytest.raises(ArtifactError, match=r"torch\.classes\.profiler"):
        load_script(rewritten(script, lambda records: records.update({"data.pkl": pickled})))
    with pytest.raises(ArtifactError, match=r"the file 'bytecode\.pkl'"):
        load_script(rewritten(script, lambda records: records.update({"bytecode.pkl": b""})))


def test_a_script_that_computes_is_loaded(script: bytes) -> None:
    for each in (script, rewritten(script, lambda records: None), _inserted("_9 = torch.add(x, x)", script)):
        assert load_script(each)(INPUTS).shape == (2, 4)


@pytest.mark.parametrize(
    "compute",
    [
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.LayerNorm(4),
        nn.Softmax(1),
    ],
    ids=str,
)
def test_what_models_compute_is_no_code_to_refuse(compute: nn.Module) -> None:
    """Torch names the version's file of an archive by the operators in it: `.data/version` where there is a GELU."""
    inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    engine = torch.backends.quantized.supported_engines[-1]
    assert torch.equal(load_script(script_bytes(trace(compute.eval(), inputs), engine))(inputs), compute(inputs))


@pytest.mark.parametrize("reader", ["pt2.load_program", "torchscript.load_script"])
def test_a_bomb_in_a_program_takes_little_memory(tmp_path: Path, reader: str) -> None:
    inflated(tmp_path / "bomb", "archive/data/weights/weight_0", 2**30)
    module, _, name = reader.partition(".")
    found = refusal(
        f"from dist_train.programs.{module} import {name}", f"{name}(open(sys.argv[1], 'rb').read())", tmp_path / "bomb"
    )
    assert found.kind == "ArtifactError"
    assert "its files would have 1 GiB" in found.text
    assert found.megabytes < MOST_MEGABYTES


def test_two_files_over_the_same_bytes_are_refused(program: bytes) -> None:
    """Overlapping files: each is whole, and together they are many times the archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data/weights/weight_0", bytes(10_000))
        entry = archive.infolist()[0]
        for number in range(1, 100):
            again = copy.copy(entry)
            again.filename = f"archive/data/weights/weight_{number}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    with pytest.raises(ArtifactError, match="its files would have"):
        check_archive(out.getvalue())
