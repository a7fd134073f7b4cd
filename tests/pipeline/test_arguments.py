"""Checks of arguments before ranks connect: what a setting needs on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config.tree import Config
from dist_train.errors import EXIT_CONFIG, SetupError
from dist_train.pipeline.arguments import check_arguments

STAGES = {"stages": ["train"], "run": {"device": "cpu"}}


@pytest.mark.parametrize("stages", [["train"], ["train", "ptq", "qat"]])
def test_compile_without_a_compiler_is_refused_and_nothing_else_needs_one(
    stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    settings = STAGES | {"stages": stages}
    check_arguments(Config.model_validate(settings))
    check_arguments(Config.model_validate(settings | {"compile": True, "stages": ["export"]}))
    with pytest.raises(SetupError, match=r"CXX is /nowhere/g\+\+") as caught:
        check_arguments(Config.model_validate(settings | {"compile": True}))
    assert caught.value.exit_code == EXIT_CONFIG and "--compile false" in caught.value.hint


def test_a_path_without_any_compiler_is_refused_and_one_with_a_compiler_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = Config.model_validate(STAGES | {"compile": True})
    with pytest.raises(SetupError, match=r"no C\+\+ compiler\n"):
        check_arguments(config)
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    check_arguments(config)
