"""pt2e is refused where torch or torchao is one that it was not tested with; fx and eager need no torchao."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from dist_train.errors import EXIT_CONFIG, BackendVersionError
from dist_train.quantization import versions


def _install(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("torch", ["2.14.1", "2.14.0+cpu", "2.15.0a0+git1234"])
def test_tested_versions_pass(monkeypatch: pytest.MonkeyPatch, torch: str) -> None:
    _install(monkeypatch, torch=torch, torchao="0.18.0")
    versions.check_versions()


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"torch": "2.11.0", "torchao": "0.18.0"}, "was tested with torch>=2.14,<2.16, and 2.11.0 is installed"),
        ({"torch": "2.16.0a0", "torchao": "0.18.0"}, "and 2.16.0a0 is installed"),
        ({"torch": "2.14.1", "torchao": "0.19.0"}, "was tested with torchao>=0.18,<0.19, and 0.19.0 is installed"),
        ({"torch": "2.14.1"}, "needs torchao, which is not installed"),
    ],
)
def test_other_versions_are_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], message: str
) -> None:
    _install(monkeypatch, **installed)
    with pytest.raises(BackendVersionError) as error:
        versions.check_versions()
    assert message in error.value.message
    assert error.value.exit_code == EXIT_CONFIG
    assert error.value.hint == (
        "pip install 'torch>=2.14,<2.16' 'torchvision>=0.29,<0.30' 'torchao>=0.18,<0.19', or --qat.backend fx"
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch_ao.fx", "torch_ao.eager"])
def test_fx_and_eager_import_no_torchao(backend: str) -> None:
    program = (
        f"import sys; sys.modules['torchao'] = None; import dist_train.quantization.{backend}, dist_train.artifact"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
