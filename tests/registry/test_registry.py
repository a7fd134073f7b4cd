"""The registry: names registered, refused and suggested."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from dist_train import registry
from dist_train.errors import SetupError
from dist_train.registry import Entry, Registry, resolve, torchvision_names
from tests.support.versions import NEEDS_PT2E

REGISTRIES = [
    *(registry.models, registry.datasets, registry.tasks, registry.strategies, registry.trackers),
    *(registry.quantization_backends, registry.stages),
]
TARGETS = sorted(
    {
        target
        for names in REGISTRIES
        for entry in names._entries.values()
        for target in (entry.target, entry.settings)
        if isinstance(target, str)  # what another test registered is no built-in
    }
)


@pytest.fixture
def things() -> Registry:
    return Registry(
        "model", "dist_train.tests_have_no_such_group", {"json": Entry("json:loads"), "small_net": Entry("x:y")}
    )


@pytest.mark.parametrize(
    "target", [pytest.param(each, marks=NEEDS_PT2E) if "PT2EBackend" in each else each for each in TARGETS]
)
def test_every_built_in_name_leads_to_something(target: str) -> None:
    assert callable(resolve(target))


def test_the_names_of_torchvision_are_all_there() -> None:
    import torchvision

    assert sorted(torchvision_names.CLASSIFICATION) == torchvision.models.list_models(module=torchvision.models)
    assert set(torchvision_names.CLASSIFICATION) < set(registry.models.names())


def test_a_registered_function_is_returned_unchanged_and_found(things: Registry) -> None:
    def net() -> int:
        return 7

    assert things.register("net")(net) is net
    assert "net" in things and things.get("net") is net
    assert things.register("net")(net) is net, "a module that is imported twice registers the same again"
    assert things.names() == ["json", "net", "small_net"]


def test_a_taken_name_is_refused(things: Registry) -> None:
    with pytest.raises(SetupError, match=r"'json' is taken\n  -> register it under another name: @register_model"):

        @things.register("json")
        def other() -> None: ...

    assert things.entry("json").target == "json:loads"


def test_a_lazy_target_is_imported_when_it_is_asked_for(things: Registry) -> None:
    import json

    assert things.get("json") is json.loads
    with pytest.raises(ModuleNotFoundError):
        things.get("small_net")


def test_suggestions_name_what_is_near_or_what_there_is(things: Registry) -> None:
    assert things.suggestion("smal_net") == "did you mean small_net?"
    assert things.suggestion("atuo", ["auto"]) == "did you mean auto?"
    assert things.suggestion("zzzz") == (
        "one of: json, small_net; or bring your own with --import MODULE and @dist_train.register_model"
    )
    assert ", ... (" in registry.models.suggestion("zzzz")
    with pytest.raises(SetupError, match=r"unknown model 'smal_net'\n  -> did you mean small_net\?"):
        things.get("smal_net")


def test_a_thing_that_lacks_a_package_says_what_to_install() -> None:
    lacking = Registry(
        "dataset", "no.such.group", {"x": Entry("json:loads", requires={"no_such_module_at_all": "a-package"})}
    )
    assert lacking.entry("x").missing() == ["a-package"]
    with pytest.raises(SetupError, match=r"'x' needs a-package\n  -> pip install a-package"):
        lacking.get("x")


def test_entry_points_add_names_but_never_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "dist_train.stages"
    points = [EntryPoint("theirs", "fractions:Fraction", group), EntryPoint("ours", "fractions:Fraction", group)]
    monkeypatch.setattr(registry.registry, "entry_points", lambda group: points)
    stages = Registry("stage", group, {"ours": Entry("json:loads")})
    assert stages.names() == ["ours", "theirs"]
    assert stages.get("theirs").__name__ == "Fraction" and stages.get("ours").__name__ == "loads"
    assert stages.settings("theirs") is None


def test_the_settings_of_a_stage_are_found_without_importing_the_stage() -> None:
    from dist_train.config.stages import TrainConfig

    assert registry.stages.settings("train") is TrainConfig
