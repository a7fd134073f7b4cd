"""An exported program as bytes (a `.pt2` archive): equal in every process, and refused where it can carry code.

From reading torch 2.14's `torch/export/pt2_archive/_package.py` and `torch/_export/serde/serialize.py`:

- Pickled weights, constants and example inputs are unpickled with `weights_only=False`.
- Compiled libraries are loaded.
- Symbolic expressions go through `sympy.sympify`, which calls `eval`.
- Guard code is executed.
- Operators are looked up by attribute from `torch`. Two of aten's open files of the program's choice.

Our own files have none of these, so `load_program` refuses them. This narrows the risk and does not remove it: load
programs only from a source you trust.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Importing this registers the operators quantized_decomposed.*, which programs need; torchao is not needed.
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dist_train import trees
from dist_train.errors import ArtifactError, first_line
from dist_train.programs.archive import FILE_OPERATORS, read_records, refuse, refuse_operator
from dist_train.programs.modes import inline_modes, mode_blocks
from dist_train.programs.operators import is_trusted
from dist_train.programs.signature import Dynamic, dynamic_shapes, rows_to_trace
from dist_train.trees import Tree
from dist_train.untrusted import last_element, parse_json

OPERATORS = "torch.ao.quantization.fx._decomposed"
"""The module of torch that registers the operators of int8 programs, which every reader of such a file imports."""

# All of node.meta that torch.export.save keeps besides shapes. The first two hold object ids and addresses of the
# exporting process, the third its file paths. None is needed to run the program.
_TRACES = ("from_node", "nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom")

_RECORD = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"
    r"|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_TENSOR_FILE = {"weights": re.compile(r"weight_\d+"), "constants": re.compile(r"tensor_\d+")}
_MOST_VALUES, _MOST_BYTES = 2_000_000, 32 * 2**20  # of model.json: a node of the graph has about 115, and 1.6 KB
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\.\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(int|float|not|max|min|ite)"
)
_FOREIGN = re.compile(r"torch\.ops\.(?!aten\.|quantized_decomposed\.)(\w+)\.(\w+)\.\w+")
_EXPRESSION = re.compile(  # sympy's srepr: no attributes, no strings but the names of symbols
    r"(Symbol\('[su]\d+'(, \w+=(True|False))*\)|[su](?=\d)|\d"
    r"|Integer|Add|Mul|Pow|FloorDiv|PythonMod|Mod|CeilDiv|Max|Min|[-+*/(), ])+"
)


def _expressions(tree: Any) -> Iterator[str]:
    """Yields every symbolic expression in the JSON of a program."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "expr_str":
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _expressions(value)


def _config(text: bytes) -> Any:
    return parse_json(text, _MOST_VALUES, _MOST_BYTES)


def _nodes(tree: Any) -> Iterator[Any]:
    """Yields the nodes of a graph, and of the graphs that its nodes take as arguments."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "nodes" and isinstance(value, list):
                yield from value
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _check_tensors(payloads: Mapping[str, Mapping[str, Any]], records: Mapping[str, bytes]) -> None:
    """Checks that each tensor lies in a file of the archive, within its bytes."""
    for kind, entries in payloads.items():
        for name, entry in entries.items():
            file, meta = entry["path_name"], entry["tensor_meta"]
            if not _TENSOR_FILE[kind].fullmatch(file):
                raise refuse(f"the tensor {name!r} in a file {file!r}")
            sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
            reached = last_element(sizes, strides, meta["storage_offset"]["as_int"])
            if reached > len(records[f"data/{kind}/{file}"]):  # an element has a byte or more
                raise ValueError(f"the tensor {name!r} reaches beyond its file")


def check_archive(data: bytes) -> None:
    """Checks a `.pt2` archive without deserializing it by torch.

    Raises ArtifactError where it is no archive, or holds anything that our own exports never hold.
    """
    try:
        records = read_records(data)
        for name in records:
            if not _RECORD.fullmatch(name):
                raise refuse(f"the file {name!r}")
        payloads = {kind: _config(records[f"data/{kind}/model_{kind}_config.json"])["config"] for kind in _TENSOR_FILE}
        model = _config(records["models/model.json"])
        nodes = list(_nodes(model["graph_module"]))
        pickled = [key for payload in payloads.values() for key, entry in payload.items() if entry["use_pickle"]]
        targets = [node["target"] for node in nodes]
        metadata = [key for node in nodes for key in node["metadata"]]
        symbols = list(model["range_constraints"])
        guards = model["guards_code"]
        example = records["data/sample_inputs/model.pt"]
        if not pickled:
            _check_tensors(payloads, records)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"this is not an exported program (.pt2): {error!r}", "copy it again from where it was exported"
        ) from error
    if pickled:
        raise refuse(f"the pickled tensor {pickled[0]!r}")
    if example:
        raise refuse("pickled example inputs")
    if guards:
        raise refuse(f"guard code ({guards[0]!r})")
    if metadata:
        raise refuse(f"metadata of nodes ({metadata[0]!r})")
    for target in targets:
        foreign = _FOREIGN.fullmatch(target) if isinstance(target, str) else None
        if foreign:
            if not is_trusted(f"{foreign[1]}::{foreign[2]}"):
                raise refuse_operator(f"{foreign[1]}::{foreign[2]}")
        elif not isinstance(target, str) or not _OPERATOR.fullmatch(target) or target.split(".")[-2] in FILE_OPERATORS:
            raise refuse(f"the operator {str(target)[:80]!r}")
    for expression in [*symbols, *_expressions(model)]:
        if not isinstance(expression, str) or not _EXPRESSION.fullmatch(expression):
            raise refuse(f"the expression {str(expression)[:80]!r}")


def has_integers(data: bytes) -> bool:
    """True where the program of an archive needs the operators that `OPERATORS` registers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any(
            b"torch.ops.quantized_decomposed." in archive.read(name)
            for name in archive.namelist()
            if name.endswith("models/model.json")
        )


def export_program(model: nn.Module, example: Tree, dynamic: Dynamic | None = None) -> ExportedProgram:
    """Exports a model in eval mode on the CPU, with a dynamic batch size, for inference: see `inline_modes`.

    Args:
        example: tree of real rows [B, ...], as the model takes it; values of a tensor do not count.
        dynamic: dimensions that vary besides the batch.

    Raises as `torch.export.export` does.
    """
    program = _exported(model, example, dynamic)
    if not any(mode_blocks(program.graph_module)):
        return program
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    inline_modes(module)
    return _exported(module, example, dynamic)


def _exported(model: nn.Module, example: Tree, dynamic: Dynamic | None) -> ExportedProgram:
    args, kwargs = trees.arguments(rows_to_trace(example, dynamic))
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes(model, example, dynamic))


@contextmanager
def _without_traces(program: ExportedProgram) -> Iterator[None]:
    """Hides metadata that differs between processes, and the example batch (user data), inside the block."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    hidden = [
        (node.meta, {key: node.meta.pop(key) for key in _TRACES if key in node.meta})
        for graph in graphs
        for node in graph.nodes
    ]
    example, guards = program.example_inputs, program._guards_code
    # Symbols and their ranges tell the same as the guards' code, which would be executed.
    program.example_inputs, program._guards_code = None, []
    try:
        yield
    finally:
        program.example_inputs, program._guards_code = example, guards
        for meta, traces in hidden:
            meta.update(traces)


def program_bytes(program: ExportedProgram) -> bytes:
    """Serializes `program` as a `.pt2` archive: equal bytes for equal programs, in every process and on every machine.

    Traces and the example batch are left out. `program` itself is not changed.

    Raises ArtifactError where `load_program` would refuse the result.
    """
    buffer = io.BytesIO()
    with _without_traces(program), warnings.catch_warnings():
        # Warns about channels_last weights: torch then writes the storage and the strides, which is right on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, buffer)
    data = buffer.getvalue()
    check_archive(data)
    return data


def load_program(data: bytes) -> ExportedProgram:
    """Loads a program from the bytes of `program_bytes`. Only for bytes from a source you trust; see the module's docs.

    Raises ArtifactError where the archive may carry code, or where this torch cannot read it.
    """
    check_archive(data)
    try:
        return torch.export.load(io.BytesIO(data))
    except Exception as error:  # torch trusts the fields of a file, so a crafted one raises any error
        raise ArtifactError(
            f"torch {torch.__version__} cannot read the exported program: {first_line(error)}",
            "compare with `versions` in manifest.json, and pip install that torch",
        ) from error
