"""Checks a program's archive before torch opens it: files, sizes, and the operators that it would run."""

from __future__ import annotations

import io
import re
import zipfile

from dist_train.errors import ArtifactError
from dist_train.programs.operators import how_to_trust, is_trusted, trusted
from dist_train.untrusted import refuse_inflated

# Operators of aten that open a file of the program's choice. A test looks for others in the installed torch.
FILE_OPERATORS = frozenset({"from_file", "save"})
# What TorchScript can call besides: other processes, Python, what torch.ops runs by its name.
_SCRIPT_REFUSED = FILE_OPERATORS | {
    "rpc_async",
    "rpc_sync",
    "rpc_remote",
    "dist_backward",
    "PythonOp",
    "IgnoredPythonOp",
    "call_torchbind",
}
_SCRIPT_NAMESPACES = frozenset({"aten", "prim", "quantized", "onednn", "mkldnn", "prepacked"})
_SCRIPT_CLASSES = frozenset({"quantized"})  # of packed weights

_WORD = re.compile(rb"[A-Za-z_]\w*")
_OPS = re.compile(rb"\bops\b(?:[\s\\]*\.[\s\\]*(\w+))?")
_NAMED_OPS = re.compile(rb"\bops\b[\s\\]*\.[\s\\]*(\w+)[\s\\]*\.[\s\\]*(\w+)")
_CLASSES = re.compile(rb"torch\s*\.\s*classes\b(?:[\s\\]*\.[\s\\]*(\w+))?")
_SCRIPT_RECORD = re.compile(
    r"code/__torch__(/\w+)*\.py|(data|constants)\.pkl|(data|constants)/\d+|(\.data/)?version|byteorder|extra/engine"
)


def refuse(what: str) -> ArtifactError:
    """Returns the error about a part of a program that may do more than compute."""
    return ArtifactError(
        f"the exported program holds {what}, which is refused because it can carry code",
        "export a model without custom operators; load files only from a source you trust",
    )


def refuse_operator(operator: str) -> ArtifactError:
    """Returns the error about an operator that is neither torch's own nor trusted, as `torchvision::nms`."""
    error = refuse(f"the operator {operator!r}")
    return ArtifactError(error.message, f"torch's operators alone; or {how_to_trust(operator)}")


def read_records(data: bytes) -> dict[str, bytes]:
    """Returns the files of an archive by name, without the folder that they are in.

    Raises:
        ArtifactError: two files have one name.
        zipfile.BadZipFile: it is no archive.
        BeyondLimits: the files are larger than the archive, or compressed.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        refuse_inflated(archive, io.BytesIO(data))
        names = archive.namelist()
        records = {name.partition("/")[2]: archive.read(name) for name in names}
    if len(records) != len(names):
        raise refuse("two files of one name")
    return records


def check_script(records: dict[str, bytes]) -> None:
    """Checks the files of a TorchScript archive, whose code may run while it is loaded.

    Raises:
        ArtifactError: the code names an operator, or the archive an object, that does more than compute.
    """
    for name, content in records.items():
        if not _SCRIPT_RECORD.fullmatch(name):
            raise refuse(f"the file {name!r}")
        code = name.startswith("code/")
        if code or name.endswith(".pkl"):
            _check_names(_CLASSES, content, _SCRIPT_CLASSES, "objects of torch.classes")
        if code:
            refused = sorted(_SCRIPT_REFUSED & {word.decode() for word in _WORD.findall(content)})
            if refused:
                raise refuse(f"the operator {refused[0]!r}")
            for namespace, name in set(_NAMED_OPS.findall(content)):
                operator = f"{namespace.decode()}::{name.decode()}"
                if namespace.decode() not in _SCRIPT_NAMESPACES and not is_trusted(operator):
                    raise refuse_operator(operator)
            trusted_namespaces = {operator.partition("::")[0] for operator in trusted()}
            _check_names(_OPS, content, _SCRIPT_NAMESPACES | trusted_namespaces, "operators of torch.ops")


def _check_names(pattern: re.Pattern[bytes], content: bytes, known: frozenset[str], what: str) -> None:
    for found in pattern.finditer(content):
        namespace = (found[1] or b"").decode()
        if namespace not in known:
            raise refuse(f"{what}.{namespace}" if namespace else f"{what} without a name")
