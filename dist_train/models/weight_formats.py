"""Tells files of weights from other files that lie under their names: pages, pointers, programs, halves."""

from __future__ import annotations

import zipfile
from pathlib import Path

from dist_train.errors import DataError

SAVE = "torch.save(model.state_dict(), FILE), or safetensors.torch.save_model(model, FILE)"
AGAIN = "download or copy it again"
# First bytes of files that are no weights: description and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a pointer of git-lfs, not the file itself", "git lfs pull"),
    (b"\x1f\x8b", "is compressed by gzip", "gunzip it"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes", SAVE),
    (b"GGUF", "is a GGUF file, whose weights are quantized", "give the model's .safetensors"),
    (b"\x93NUMPY", "is an array of NumPy", SAVE),
    (b"\x08", "looks like an ONNX file, whose weights have other names", SAVE),
)


def refuse_other_formats(path: Path, head: bytes) -> None:
    """Raises DataError for an empty, truncated or foreign file; says what it is."""
    if not head:
        raise DataError(f"{path} is empty", AGAIN)
    if is_safetensors(head):
        return  # its first bytes are a length, which may be any
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise DataError(
            f"{path} is a web page, not weights: the download got the page about the file, or one that asks to log in",
            "download the file itself; on the Hugging Face hub its address has /resolve/ in place of /blob/",
        )
    if text.startswith((b"{", b"[")):
        raise DataError(
            f"{path} is a text (JSON), not weights",
            "give the file of the weights; an index of several .safetensors files: join them into one first",
        )
    for magic, what, hint in _OTHERS:
        if head.startswith(magic):
            raise DataError(f"{path} {what}", hint)
    if head.startswith((b"\x80\x03", b"\x80\x04", b"\x80\x05")):  # torch writes protocol 2
        raise DataError(f"{path} is a pickle of another program, which is code", f"where you trust it: {SAVE}")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is truncated: it has {path.stat().st_size} bytes, and its end is missing", AGAIN)
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
        program = "constants.pkl" in names or any(name.startswith("code/") for name in names)
        exported = any(name.startswith(("models/", "archive_format")) for name in names)
        if program or exported or "data.pkl" not in names:
            what = "a TorchScript program" if program else "a torch.export program" if exported else "another archive"
            raise DataError(f"{path} is {what}, not a state_dict", f"where the model's code is: {SAVE}")


def is_safetensors(head: bytes) -> bool:
    """Tells whether a file of these first bytes is in the format of safetensors."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27
