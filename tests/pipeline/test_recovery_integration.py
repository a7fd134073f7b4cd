"""Real ranks agree on the newest checkpoint that verifies on all of them, and end like an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.saved import newest_first
from tests.pipeline.test_exactness_integration import BOUNDARIES, assert_same_result, command, latest
from tests.pipeline.test_recovery import cut, flipped
from tests.support.ranks import train, train_done

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    path = folder / "exact.yaml"
    path.write_text(BOUNDARIES.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    train_done(2, *command(config, config.parent / "undisturbed"), cold=True)
    return config.parent / "undisturbed"


def interrupted(config: Path, run_dir: Path, moment: str) -> str:
    """Kills both ranks as soon as the checkpoint `moment` is there, and returns the name of the newest."""
    with train(2, *command(config, run_dir)) as ranks:
        assert ranks.until(lambda: (latest(run_dir) or "") >= moment and latest(run_dir) != "train-end"), (
            ranks.printed()
        )
        ranks.kill()
    newest = latest(run_dir)
    assert newest is not None
    return newest


def without_damage_kept(run_dir: Path) -> None:
    """Checks that the damaged checkpoint was kept, and puts it aside for the comparison of what is in force."""
    kept = list(RunDir(run_dir).checkpoints.glob("damaged-*"))
    assert len(kept) == 1 and (kept[0] / "manifest.json").exists(), kept


def test_a_flipped_byte_of_the_tensors(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    name = interrupted(config, run_dir, "train-00000003")
    flipped(RunDir(run_dir).checkpoints / name / "tensors.safetensors")
    printed = train_done(2, *command(config, run_dir))
    assert f"kept as damaged-{name}" in printed and "1 step of train is done again" in printed
    assert_same_result(undisturbed, run_dir)
    without_damage_kept(run_dir)


def test_damage_that_one_rank_alone_reads(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    name = interrupted(config, run_dir, "train-00000003")
    older = newest_first(RunDir(run_dir).checkpoints)[1]
    environ = {"DAMAGED_READS": f"{name}/state.json"}
    words = ["--import", "tests.support.damaged_reads"]
    with train(2, *command(config, run_dir), *words, environ=environ) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
        printed = ranks.output(0)
    assert f"{name}/state.json does not have the recorded SHA-256 (as rank 1 reads it)" in printed
    assert f"going on from the checkpoint {older}" in printed
    assert_same_result(undisturbed, run_dir)
    without_damage_kept(run_dir)


def test_the_end_of_a_stage_while_the_next_one_runs(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with train(2, *command(config, run_dir)) as ranks:
        assert ranks.until(lambda: (latest(run_dir) or "").startswith("qat-0")), ranks.printed()
        ranks.kill()
    checkpoints = RunDir(run_dir).checkpoints
    for name in ("train-end", "ptq-end"):
        cut(checkpoints / name / "state.json")
    (checkpoints / "latest.json").write_text('{"name": "../../x"}')
    for file in (RunDir(run_dir).status, RunDir(run_dir).environment, RunDir(run_dir).config):
        file.unlink()
    printed = train_done(2, *command(config, run_dir))
    assert "'../../x', which is no checkpoint of this folder" in printed and "no step is done again" in printed
    assert read_json(RunDir(run_dir).status)["restarts"] == 1
    assert_same_result(undisturbed, run_dir)


def kept(checkpoints: Path) -> list[Path]:
    """Lists the folder without what a kill in the middle of a save may have left, which the next start removes."""
    return sorted(path for path in checkpoints.iterdir() if not path.name.startswith("."))


def test_where_none_verifies_all_ranks_end_in_words(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    interrupted(config, run_dir, "train-00000003")
    checkpoints = RunDir(run_dir).checkpoints
    for name in newest_first(checkpoints):
        flipped(checkpoints / name / "tensors.safetensors")
    before = kept(checkpoints)
    with train(2, *command(config, run_dir)) as ranks:
        assert ranks.wait() == [1, 1], ranks.printed()
        printed = ranks.printed()
    assert "is whole, with all that it needs" in printed and "Traceback" not in printed
    assert all(f"{name.name}/tensors.safetensors" in printed for name in before if name.is_dir())
    assert kept(checkpoints) == before
