"""The configurations that come with dist_train: names, files, heads. Starts without importing pydantic."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def configs_dir() -> Path:
    """Returns the folder of the shipped configurations, of the checkout or of the installation."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file() and (checkout / "configs").is_dir():
        return checkout / "configs"
    schemes = [sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")]
    folders = [Path(sysconfig.get_path("data", scheme)) / "share" / "dist_train" / "configs" for scheme in schemes]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def shipped() -> dict[str, Path]:
    """Returns the shipped configurations: name -> file."""
    return {file.stem: file for file in sorted(configs_dir().glob("*.yaml"))}


def first_comment(file: Path) -> str:
    """Returns the first line of a file's head that says something; "" for none."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#"):
            break
        if text and not text.startswith("yaml-language-server"):
            return text
    return ""
