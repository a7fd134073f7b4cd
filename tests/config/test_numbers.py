"""A number of any size, for any setting, is taken or refused in words: no other error comes out of the checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.config.load import load
from dist_train.config.reference import reference
from dist_train.errors import EXIT_CONFIG, ConfigError, DistTrainError
from dist_train.pipeline.arguments import check_arguments
from tests.support.small_runs import Runs

HUGE = ("1" + "0" * 30, "-1", "1.0e+300")
ARGS = {
    "data": {"fake": "num_train num_eval num_classes channels height width seed", "image_folder": "size max_pixels"},
    "model": {"mlp": "size hidden", "small_resnet": "width blocks", "small_fcn": "width"},
    "task": {"segmentation": "ignore_index", "classification": "label_smoothing", "multilabel": "threshold"},
}


def _settings() -> Iterator[tuple[str, ...]]:
    """Yields the options of every setting that takes a number, which stands as NUMBER."""
    section = ""
    for line in reference().splitlines():
        if line.startswith("## `"):
            section = line.strip("#` ") + "."
        row = re.match(r"\| `(?:(\w+)\[(\w*)\]\.)?([^`]+)` \| ([^|]*)", line)
        if row is None or not re.search(r"\b(int|float)\b", row[4]):
            continue
        listed, kind, key = row[1], row[2], row[3].split(".")
        value = "[NUMBER, NUMBER]" if re.search(r"\b2 float|list", row[4]) else "NUMBER"
        if not listed:
            yield f"--{section}{row[3]}", value
            continue
        for part in reversed(key):
            value = f"{{{part}: {value}}}"
        first = f"name: {kind}, " if kind else "match: '*', "
        yield f"--{section}{listed}", f"[{{{first}{value[1:]}]"


SETTINGS = sorted(_settings())
ARGUMENTS = [
    (f"--{section}.name", name, f"--{section}.args", f"{{{key}: NUMBER}}")
    for section, names in ARGS.items()
    for name, keys in names.items()
    for key in keys.split()
]


def test_the_settings_are_found() -> None:
    keys = [options[0] for options in SETTINGS]
    assert {"--run.seed", "--data.global_batch_size", "--train.epochs", "--qat.rules"} <= set(keys) and len(keys) > 60


@pytest.mark.parametrize("options", SETTINGS + ARGUMENTS, ids=" ".join)
def test_every_setting_takes_a_huge_number_or_refuses_it(options: tuple[str, ...], tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text("{}")
    refused = 0
    for number in HUGE:
        try:
            check_arguments(load(plain, [each.replace("NUMBER", number) for each in options]).config)
        except ConfigError:
            refused += 1
        except DistTrainError as error:
            pytest.fail(f"{number}: {error}")
    assert refused or options[2:3] == ("--model.args",), "-1 is right for none of the settings"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--train.optim.lr", "1e300"), "train.optim.lr (--train.optim.lr): must be at most 1000000"),
        (("--qat.optim.weight_decay", "1e300"), "must be at most 1000000"),
        (("--data.augment", "[{name: color_jitter, contrast: 1.0e+300}]"), "must be at most 100"),
        (("--data.args", "{seed: -1}"), "data.args.seed: Input should be greater than or equal to 0"),
        (("--model.args", f"{{size: 8, hidden: {10**30}}}"), "the model mlp: empty(): argument 'size' failed"),
        (("--model.args", f"{{size: 8, hidden: {2**62}}}"), "the model mlp: Storage size calculation overflowed"),
        (("--model.args", "{size: 8, hidden: -1}"), "the model mlp: Trying to create tensor with negative dimension"),
    ],
)
def test_a_run_says_what_is_too_large(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Runs(tmp_path)("run", *options) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert said in printed and "#0" not in printed and "Traceback" not in printed, printed
