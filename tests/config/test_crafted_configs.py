"""A configuration that was made to take all memory, or to end in Python's own error, is refused by its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config.load import load
from dist_train.errors import ConfigError, Problem, RunDirError
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import recorded_config
from tests.support.crafted import MOST_MEGABYTES, refusal

_LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)) for level in range(1, 9)
)
_CHAIN = b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 3000))
CRAFTED = {
    "a bomb of aliases": (_LAUGHS, "has more than 10,000 values"),
    "a chain of aliases": (_CHAIN, "has more than 100 levels"),
    "2,000 levels": (b"data: {args: {x: " + b"[" * 2000 + b"]" * 2000 + b"}}", "has more than 100 levels"),
    "levels that never close": (b"[" * 200_000, "has more than 100 levels"),
    "levels of a block": (b"".join(b" " * i + b"a:\n" for i in range(600)), "has more than 100 levels"),
    "5,000 digits": (b"train: {epochs: " + b"9" * 5000 + b"}", "has a number of 5,000 digits"),
    "5,000 hexadecimal digits": (b"train: {epochs: 0x" + b"9" * 5000 + b"}", "has a number of 5,002 digits"),
    "values without end": (b"x: [" + b"1," * 100_000, "has more than 10,000 values"),
    "a megabyte": (b"# " + b"x" * 2**20, "it has more than 256 KiB"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_configuration_is_refused_in_words(tmp_path: Path, name: str) -> None:
    content, message = CRAFTED[name]
    (tmp_path / "crafted.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "crafted.yaml")
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.hint


@pytest.mark.parametrize("name", ["a bomb of aliases", "values without end", "/dev/zero"])
def test_a_crafted_configuration_takes_little_memory(tmp_path: Path, name: str) -> None:
    path = Path(name)
    if name in CRAFTED:
        path = tmp_path / "crafted.yaml"
        path.write_bytes(CRAFTED[name][0])
    found = refusal("from dist_train.config.load import load", "load(sys.argv[1])", path)
    assert found.kind == "ConfigError"
    assert found.megabytes < MOST_MEGABYTES


@pytest.mark.parametrize("name", CRAFTED)
def test_the_recorded_configuration_of_a_run_is_read_with_the_same_limits(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_bytes(CRAFTED[name][0])
    with pytest.raises(RunDirError, match=CRAFTED[name][1]):
        recorded_config(RunDir(tmp_path))


def _problems(tmp_path: Path, *options: str, text: str = "{}") -> tuple[Problem, ...]:
    (tmp_path / "plain.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "plain.yaml", options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data.args.x", "[" * 2000 + "]" * 2000, "has more than 100 levels"),
        ("--train.epochs", "9" * 5000, "has a number of 5,000 digits"),
        ("--qat.rules." + "9" * 5000, "x", "must be a list"),
        ("--data.global_batch_size", str(10**30), "must be less than 2147483648"),
        ("--train.epochs", str(10**18), "must be less than 2147483648"),
        ("--qat.epochs", str(2**31), "must be less than 2147483648"),
        ("--ptq.samples", str(10**18), "must be less than 2147483648"),
        ("--run.timeout", "1e300", "must be at most 1000000000"),
        ("--watchdog.timeout", "1e12", "must be at most 1000000000"),
        ("--run.threads_per_rank", "100000", "must be at most 4096"),
        ("--data.workers", "1000000", "must be at most 1024"),
        ("--train.optim.lr", "1e300", "must be at most 1000000"),
        ("--qat.optim.weight_decay", "1e300", "must be at most 1000000"),
        ("--data.augment", "[{name: color_jitter, brightness: 1.0e+300}]", "must be at most 100"),
        ("--export.latency_batch_sizes", "[1, 1000000000000]", "must be at most 65536"),
    ],
)
def test_options_beyond_all_sizes_are_refused(tmp_path: Path, option: str, value: str, message: str) -> None:
    assert any(message in problem.message for problem in _problems(tmp_path, option, value))


def test_the_largest_numbers_are_right(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("{}")
    batch, seconds = str(2**31 - 1), "1e9"
    config = load(tmp_path / "plain.yaml", ["--data.global_batch_size", batch, "--run.timeout", seconds]).config
    assert (config.data.global_batch_size, config.run.timeout) == (2**31 - 1, 1e9)


def test_values_below_the_limits_are_read_with_their_aliases(tmp_path: Path) -> None:
    long = ", ".join(["1"] * 4000)
    (tmp_path / "plain.yaml").write_text(f"data: {{args: {{x: &x [{long}], y: *x}}}}")
    args = load(tmp_path / "plain.yaml").config.data.args
    assert args["x"] == args["y"] == [1] * 4000


def test_of_thousands_of_mistakes_the_first_are_shown(tmp_path: Path) -> None:
    problems = _problems(tmp_path, text="\n".join(f"key{number}: 1" for number in range(3000)))
    assert len(problems) == 3000
    shown = str(ConfigError(problems))
    assert "key49 " in shown and "key50 " not in shown
    assert shown.endswith("and 2950 more")
