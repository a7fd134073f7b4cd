"""The artifact has equal bytes everywhere, is refused when damaged, whole after a kill, right in a fresh process."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dist_train.artifact.load import load_artifact
from dist_train.artifact.store import FORMAT, MANIFEST, verify_artifact, write_artifact
from dist_train.artifact.verify import verify_in_fresh_process
from dist_train.errors import ArtifactError, DataError
from dist_train.programs.pt2 import load_program, program_bytes
from tests.support.converted_nets import converted_net, float_net, images, program_of

pytestmark = pytest.mark.heavy

PROGRAM, FLOAT = "model.pt2", "model.fp32.pt2"
FIELDS: dict[str, Any] = {
    "models": {"int8": {"file": PROGRAM, "kind": "pt2"}},
    "default": "int8",
    "task": "classification",
    "input": {"shape": [None, 3, 16, 16], "dtype": "float32"},
    "normalization": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "classes": [f"class {i}" for i in range(10)],
    "ranges_sha256": "0" * 64,
    "world_sizes": [2],
    "metrics": {"top1": 0.5, "count": 360},
}
DEADLINE = 120.0  # a fresh process imports torch, which takes seconds on a busy machine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that forked children inherit no half-used thread pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def converted():
    return converted_net(float_net())


@pytest.fixture(scope="module")
def program(converted) -> bytes:
    return program_bytes(program_of(converted))


@pytest.fixture
def artifact(tmp_path: Path, program: bytes) -> Path:
    write_artifact(tmp_path / "export", {PROGRAM: program}, FIELDS)
    return tmp_path / "export"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ---- the bytes


BUILD = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from dist_train.programs.pt2 import load_program, program_bytes
from tests.support.converted_nets import converted_net, float_net, program_of
from dist_train.programs.pt2 import program_bytes
clutter = [program_of(float_net()) for _ in range(int(sys.argv[2]))]  # object ids and name counters move on
data = program_bytes(program_of(converted_net(float_net(channels_last=True))))
sys.stdout.write(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.slow
def test_bytes_are_equal_in_processes_with_another_history_and_hash_seed():
    root = Path(__file__).resolve().parents[2]
    digests = []
    for clutter in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": clutter}
        command = [sys.executable, "-c", BUILD, str(root), clutter]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=True)
        digests.append(done.stdout)
    assert len(digests[0]) == 64
    assert digests[0] == digests[1]


def test_bytes_hold_neither_the_example_batch_nor_paths_of_this_machine(converted):
    exported = program_of(converted)
    plain = io.BytesIO()
    torch.export.save(exported, plain)
    data = program_bytes(exported)

    def inside(archive: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            return b"".join(records.read(name) for name in records.namelist())

    secrets = [images(8).numpy().tobytes(), b"site-packages", b"graph_id"]
    assert all(secret in inside(plain.getvalue()) for secret in secrets)
    assert not any(secret in inside(data) for secret in secrets)


def test_making_bytes_leaves_the_program_as_it_was(converted):
    exported = program_of(converted)
    before = [dict(node.meta) for node in exported.graph.nodes]
    example = exported.example_inputs
    program_bytes(exported)
    assert [node.meta for node in exported.graph.nodes] == before
    assert exported.example_inputs is example


@pytest.mark.parametrize("channels_last", [False, True])
def test_loaded_program_answers_bitwise_as_the_converted_model(channels_last):
    model = converted_net(float_net(channels_last))
    loaded = load_program(program_bytes(program_of(model))).module()
    for count in (1, 5):
        assert torch.equal(loaded(images(count)), model(images(count)))


# ---- what may carry code


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def rewritten(program: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def edit_model(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        model = json.loads(records["models/model.json"])
        edit(model)
        records["models/model.json"] = json.dumps(model).encode()

    return change


def test_pickled_code_in_the_program_does_not_run(tmp_path, program):
    attack = rewritten(
        program,
        lambda records: records.update({"data/sample_inputs/model.pt": pickle.dumps(Payload(tmp_path / "ran"))}),
    )
    with pytest.raises(ArtifactError, match="pickled example inputs"):
        load_program(attack)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda records: records.update({"data/constants/opaque_obj_0": b""}), "opaque_obj_0"),
        (lambda records: records.update({"data/aotinductor/model/x.so": b""}), "x.so"),
        (lambda records: records.update({"data/weights/model.pt": b""}), "model.pt"),
        (edit_model(lambda model: model.update(guards_code=["exit()"])), "guard code"),
        (edit_model(lambda model: model["range_constraints"].update({"exit('')": {}})), "exit"),
        (
            edit_model(lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system")),
            "os.sys",
        ),
    ],
)
def test_foreign_parts_of_a_program_are_refused_by_name(program, change, named):
    load_program(rewritten(program, lambda records: None))  # rewriting alone is no reason to refuse
    with pytest.raises(ArtifactError, match=named):
        load_program(rewritten(program, change))


def test_bytes_that_are_no_program_are_refused():
    with pytest.raises(ArtifactError, match="not an exported program"):
        load_program(b"not a zip archive")


# ---- damage


def test_manifest_tells_what_a_user_of_the_model_needs(artifact, program):
    manifest = verify_artifact(artifact)
    assert manifest == json.loads((artifact / MANIFEST).read_text())
    assert {key: manifest[key] for key in FIELDS} == FIELDS
    assert manifest["format"] == FORMAT
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"] == {PROGRAM: {"sha256": hashlib.sha256(program).hexdigest(), "bytes": len(program)}}
    assert sorted(os.listdir(artifact)) == [MANIFEST, PROGRAM]
    assert os.listdir(artifact.parent) == ["export"]


def test_a_flipped_byte_anywhere_in_the_program_is_refused_by_name(artifact):
    size = (artifact / PROGRAM).stat().st_size
    for position in range(0, size, size // 50):
        flip(artifact / PROGRAM, position)
        with pytest.raises(ArtifactError, match=r"export/model\.pt2 is damaged"):
            verify_artifact(artifact)
        flip(artifact / PROGRAM, position)
    verify_artifact(artifact)


def test_every_flipped_byte_of_the_manifest_is_refused_by_name(tmp_path):
    artifact = tmp_path / "export"
    write_artifact(artifact, {PROGRAM: b"a program"}, FIELDS)
    for position in range((artifact / MANIFEST).stat().st_size):
        flip(artifact / MANIFEST, position)
        with pytest.raises(ArtifactError, match=r"export/manifest\.json"):
            verify_artifact(artifact)
        flip(artifact / MANIFEST, position)
    verify_artifact(artifact)


def test_damage_is_found_before_anything_is_deserialised(artifact, program, tmp_path):
    attack = rewritten(program, lambda records: records.update({"data/sample_inputs/model.pt": b"x"}))
    (artifact / PROGRAM).write_bytes(attack)
    with pytest.raises(
        ArtifactError, match="is damaged"
    ):  # and not "pickled example inputs", which reading it would say
        load_artifact(artifact)


@pytest.mark.parametrize("name", [PROGRAM, MANIFEST])
def test_a_missing_file_is_named(artifact, name):
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        load_artifact(artifact)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact at .*nowhere"):
        verify_artifact(tmp_path / "nowhere")


# ---- writing: whole or absent, whatever happens


def child_killed_at(event: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a fork that kills itself at its n-th file operation; False where it reached the end."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def kill_at(name: str, _: Any) -> None:
            nonlocal count
            if name.startswith(("os.", "shutil.")) or name == "open":
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(kill_at)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("older", [True, False], ids=["replacing", "first"])
def test_a_writer_killed_at_any_file_operation_leaves_a_whole_artifact(tmp_path, older):
    old, new = b"old" * 1000, b"new" * 1000
    event, seen = 0, []
    while True:
        event += 1
        directory = tmp_path / str(event) / "export"
        if older:
            write_artifact(directory, {PROGRAM: old}, FIELDS)
        killed = child_killed_at(event, lambda target=directory: write_artifact(target, {PROGRAM: new}, FIELDS))
        if any(path.exists() for path in (directory, directory.with_name(".export.old"))):
            seen.append(verify_artifact(directory)["files"][PROGRAM]["sha256"])
        else:
            assert not older
            seen.append("absent")
        write_artifact(directory, {PROGRAM: new}, FIELDS)  # the same command again
        assert sorted(os.listdir(directory)) == [MANIFEST, PROGRAM]
        assert os.listdir(directory.parent) == ["export"]
        assert verify_artifact(directory)["files"][PROGRAM]["sha256"] == hashlib.sha256(new).hexdigest()
        if not killed:
            break
    before = hashlib.sha256(old).hexdigest() if older else "absent"
    after = hashlib.sha256(new).hexdigest()
    turn = seen.index(after)
    assert seen == [before] * turn + [after] * (len(seen) - turn)
    assert turn >= 5  # the kills did fall into the writing


def test_a_full_disk_leaves_the_older_artifact_whole(artifact, program):
    def write_with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(program), len(program)))
        write_artifact(artifact, {PROGRAM: program * 2}, FIELDS)

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            write_with_little_room()
        except ArtifactError as error:
            status = 0 if os.strerror(errno.EFBIG) in str(error) and "run the same command again" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert verify_artifact(artifact)["files"][PROGRAM]["bytes"] == len(program)
    assert os.listdir(artifact.parent) == ["export"]


def test_a_directory_with_files_of_others_is_not_replaced(tmp_path, program):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        write_artifact(tmp_path, {PROGRAM: program}, FIELDS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# ---- several models, and artifacts of the first version


@pytest.fixture
def two_models(tmp_path: Path, program: bytes) -> Path:
    models = {**FIELDS["models"], "fp32": {"file": FLOAT, "kind": "pt2"}}
    files = {PROGRAM: program, FLOAT: program_bytes(program_of(float_net()))}
    write_artifact(tmp_path / "run" / "export", files, {**FIELDS, "models": models})
    return tmp_path / "run" / "export"


def test_a_model_is_chosen_by_name_or_by_its_file_and_the_default_otherwise(two_models, converted):
    inputs = images(3)
    with torch.no_grad():
        int8, fp32 = converted(inputs), float_net()(inputs)
    for path in (two_models, two_models.parent, two_models / PROGRAM):
        assert torch.equal(load_artifact(path)[0](inputs), int8)
    assert torch.equal(load_artifact(two_models, "fp32")[0](inputs), fp32)
    assert torch.equal(load_artifact(two_models / FLOAT)[0](inputs), fp32)


def test_a_model_that_is_not_there_is_refused_with_what_is(two_models):
    with pytest.raises(ArtifactError, match=r"no model 'half'\n.*fp32, int8; or add it: dist-train export"):
        load_artifact(two_models, "half")


def test_half_is_whichever_half_precision_there_is(tmp_path, program):
    models = {"fp32": {"file": PROGRAM, "kind": "pt2"}, "fp16": {"file": "model.fp16.pt2", "kind": "pt2"}}
    files = {PROGRAM: b"not read", "model.fp16.pt2": program}
    write_artifact(tmp_path / "export", files, {**FIELDS, "models": models, "default": "fp32"})
    assert load_artifact(tmp_path / "export", "half")[0](images(2)).shape == (2, 10)


def test_every_model_is_proved_in_one_fresh_process(two_models, converted):
    inputs = images(4)
    with torch.no_grad():
        expected = {"int8": converted(inputs), "fp32": float_net()(inputs) + 0.5}
    found = verify_in_fresh_process(two_models, inputs, expected, DEADLINE).models
    assert found == {"int8": 0.0, "fp32": pytest.approx(0.5, rel=1e-4)}


def test_a_format_of_a_later_version_is_refused_by_name(artifact):
    text = (artifact / MANIFEST).read_text().replace(FORMAT, "dist_train/9")
    (artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="format 'dist_train/9' is not 'dist_train/2'"):
        load_artifact(artifact)


# ---- use


def test_loaded_model_answers_bitwise_as_the_converted_one_and_refuses_other_input(artifact, converted):
    model, manifest = load_artifact(artifact)
    answer = model(images(7))
    assert torch.equal(answer, converted(images(7)).detach())
    assert not answer.requires_grad
    assert manifest["classes"] == FIELDS["classes"]
    for wrong in (images(2)[:, :1], images(2).double(), images(2)[0]):
        with pytest.raises(DataError, match=r"float32 \[batch, 3, 16, 16\]"):
            model(wrong)


def test_a_fresh_isolated_process_gives_the_same_bits(artifact, converted):
    inputs = images(6)
    with torch.no_grad():
        expected = converted(inputs)
    assert verify_in_fresh_process(artifact, inputs, {"int8": expected}, DEADLINE).models == {"int8": 0.0}


def test_a_wrong_answer_is_measured_in_a_fresh_process(artifact, converted):
    inputs = images(6)
    with torch.no_grad():
        planted = converted(inputs)
    planted[3, 2] += 0.25
    assert verify_in_fresh_process(artifact, inputs, {"int8": planted}, DEADLINE).models["int8"] == pytest.approx(
        0.25, rel=1e-4
    )


def test_damage_seen_by_the_fresh_process_reaches_the_caller(artifact):
    flip(artifact / PROGRAM, 1000)
    with pytest.raises(ArtifactError, match=r"model\.pt2 is damaged"):
        verify_in_fresh_process(artifact, images(1), {"int8": torch.zeros(1, 10)}, DEADLINE)


def test_a_late_process_is_killed(artifact):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ArtifactError, match=r"within 0\.05 s"):
        verify_in_fresh_process(artifact, images(1), {"int8": torch.zeros(1, 10)}, deadline=0.05)
    assert set(psutil.Process().children(recursive=True)) <= before
