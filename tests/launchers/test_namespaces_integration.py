"""Two machines (network namespaces): the same result as on one, even after a machine or the network was lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.network_namespaces import Machine, TwoMachines
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL

CONFIG = SMALL.replace("203", "2003").replace("epochs: 2", "epochs: 4")
EXACT = ("--checkpoint.every_steps", "20", "--debug.ledger", "true", "--strategy", "ddp")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of two ranks on one machine."""
    folder = tmp_path_factory.mktemp("one_machine")
    (folder / "small.yaml").write_text(CONFIG)
    words = ("launch", "torchrun", "--nproc-per-node", "2", "small.yaml", *EXACT, "--run.dir", "run")
    done = dist_train(*words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(folder / "run")


def dist_train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_train", *words]
    return subprocess.run(command, cwd=cwd, env=Machine.environ(), capture_output=True, text=True, timeout=120)


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "train-end" / "tensors.safetensors").read_bytes()


class TwoNodes:
    """One run on both machines."""

    def __init__(self, machines: TwoMachines, host: Machine, folder: Path, *launch: str, config: tuple[str, ...] = ()):
        (folder / "small.yaml").write_text(CONFIG)
        self.machines, self._host, self._folder = machines, host, folder
        self._launch, self._config = launch, config
        self.run = folder / "run"
        self.agents = {machine.name: self.start(machine) for machine in machines}

    def start(self, machine: Machine) -> subprocess.Popen[bytes]:
        meet = ("--nodes", "2", "--endpoint", self._host.address, "--is-host", str(machine is self._host).lower())
        settings = ("small.yaml", *EXACT, *self._config, "--run.dir", "run")
        return machine.launch(*meet, *self._launch, *settings, cwd=self._folder)

    def start_again(self, *which: Machine) -> None:
        self.agents |= {machine.name: self.start(machine) for machine in which}

    def in_mid_training(self) -> None:
        """Waits for the first checkpoint within the stage, one of fifteen."""
        self.machines.until((self.run / "checkpoints" / "latest.json").exists)
        assert not (self.run / "checkpoints" / "train-end").exists()

    def exit_codes(self) -> list[int | None]:
        return self.machines.codes(*self.agents.values())

    def ledger(self) -> tuple[int, str]:
        checked = dist_train("ledger", str(self.run), cwd=ROOT)
        return checked.returncode, checked.stdout + checked.stderr


@pytest.mark.slow
def test_two_machines_train_what_two_ranks_on_one_do(machines: TwoMachines, tmp_path: Path, undisturbed: bytes) -> None:
    run = TwoNodes(machines, machines.first, tmp_path)
    assert run.exit_codes() == [0, 0], machines.printed()
    assert weights(run.run) == undisturbed


@pytest.mark.slow
def test_a_machine_that_dies_and_comes_back_joins_the_run_which_ends_as_if_nothing_had_been(
    machines: TwoMachines, tmp_path: Path, undisturbed: bytes
) -> None:
    run = TwoNodes(machines, machines.second, tmp_path, "--restarts", "1")
    run.in_mid_training()
    machines.first.kill()  # rank 0's: the lower address
    run.start_again(machines.first)
    assert run.exit_codes() == [0, 0], machines.printed()
    assert "resuming (attempt 1) in train at step" in machines.first.printed()
    assert weights(run.run) == undisturbed
    code, said = run.ledger()
    assert code == 0, said


@pytest.mark.slow
def test_without_a_network_all_processes_end_and_with_it_the_same_commands_end_the_run(
    machines: TwoMachines, tmp_path: Path, undisturbed: bytes
) -> None:
    run = TwoNodes(machines, machines.first, tmp_path, "--shutdown-timeout", "5", config=("--watchdog.timeout", "15"))
    run.in_mid_training()
    machines.cut()
    assert run.exit_codes() == [1, 1], machines.printed()
    assert [machine.processes() for machine in machines] == [[], []], "the ranks ended with their agents"
    assert "its agent still waits for another node: killed" in machines.second.printed()
    machines.join()
    run.start_again(*machines)
    assert run.exit_codes() == [0, 0], machines.printed()
    assert weights(run.run) == undisturbed
    code, said = run.ledger()
    assert code == 0, said
