"""Saves and loads checkpoints, whole or not at all: written beside, hashed, fsynced, renamed; `latest` moves last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError

from dist_train.errors import CheckpointError, DamagedCheckpointError
from dist_train.run_dir import saved
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.files import pieces_of, replace_json, sync_directory, write_folder
from dist_train.run_dir.leftovers import beside, remove_leftovers
from dist_train.run_dir.shard_files import ShardFiles, verify_share
from dist_train.run_dir.snapshot import HashedPieces, Owner, Snapshot, take
from dist_train.run_dir.staging import Adoption, Staged, cannot_write, stage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class CheckpointFolder:
    """The folder `checkpoints/` of a run. Only rank 0 writes checkpoints to it; the others `stage` their shards.

    A checkpoint is a folder of three files: tensors, the rest as JSON, and a manifest with the SHA-256 of both. Where
    the state has DTensors, there is a file with the shards of each rank, too.
    `latest.json` names the newest whole one. `copy-of-NAME` has the same bytes as the checkpoint NAME and takes its
    place where it is damaged; `damaged-NAME` is one that was found damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    @property
    def latest(self) -> str | None:
        """Name of the newest checkpoint; None in a new run. Without a latest.json it is found from the folder.

        Raises:
            CheckpointError: latest.json is damaged, and there is no checkpoint.
        """
        return saved.newest(self._path)

    def newest_first(self) -> list[str]:
        """Lists the checkpoints from the newest to the oldest, damaged or not: first the one in latest.json."""
        return saved.newest_first(self._path)

    def save(self, name: str, state: Any, *, twice: bool = False) -> None:
        """Writes the checkpoint of a state that does not change meanwhile, see `write`."""
        self.write(name, take(state, owner=Owner(name)), twice=twice)

    def write(
        self,
        name: str,
        snapshot: Snapshot,
        *,
        twice: bool = False,
        beat: Callable[[], None] = lambda: None,
        others: Callable[[], Sequence[Staged]] = lambda: (),
    ) -> None:
        """Writes a checkpoint and points `latest` to it. A kill at any moment leaves the former one in force.

        Args:
            twice: write a copy too, for a checkpoint that later ones need.
            beat: called before each piece of a few MiB, and before each rename; an error of it ends the writing.
            others: waits for the other ranks' shards, once rank 0's own files are written.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        # The checkpoint in force must live until the new one is whole, so the new one cannot have its name.
        assert name != saved.pointed(self._path)[0], f"the checkpoint {name} is the latest one already"
        files = {
            saved.TENSORS: HashedPieces(lambda: snapshot.tensors.pieces(beat)),
            saved.TREE: HashedPieces(lambda: [snapshot.tree_file]),
        }
        if (shards := snapshot.shards) is not None:
            files[saved.shard_file(0)] = HashedPieces(lambda: shards.pieces(beat))
        adoptions: list[Adoption] = []

        def manifest(adoption: Adoption) -> Iterable[bytes]:  # asked for last, when the other files are written
            staged = others()
            beat()
            adoption.do(staged)
            hashes = {file: pieces.sha256 for file, pieces in files.items()}
            yield saved.manifest_bytes(name, hashes | {each.file: each.sha256 for each in staged})

        try:
            remove_leftovers(self._path)
            for place in _places(name, twice):
                adoptions.append(adoption := Adoption(self._path, place))
                self._place(place, {**files, saved.MANIFEST: manifest(adoption)}, adoption.temporary, beat)
            self.point_to(name)
        except BaseException as error:
            if saved.pointed(self._path)[0] != name:  # else only the last flush of the folder failed
                for each in adoptions:
                    each.undo()
            if isinstance(error, OSError):
                raise cannot_write(self._path / name, error) from error
            raise

    def stage(
        self, name: str, snapshot: Snapshot, rank: int, *, twice: bool = False, beat: Callable[[], None] = lambda: None
    ) -> Staged:
        """Writes the shards of a rank that is not 0 to the disk, where rank 0's `write` takes them from.

        Raises:
            CheckpointError: the file system does not let us write.
        """
        shards, file = snapshot.shards, saved.shard_file(rank)
        assert shards is not None and rank
        pieces = HashedPieces(lambda: shards.pieces(beat))
        at = stage(self._path, file, _places(name, twice), pieces)
        return Staged(file, pieces.sha256, at)

    def load(self, name: str, mesh: DeviceMesh | None = None) -> Any:
        """Returns the state of a checkpoint, or of its copy where it is damaged, on the CPU.

        Args:
            mesh: what was saved in shards becomes DTensors over this mesh, and each rank reads its slices only; None:
                it becomes whole tensors.

        Raises:
            CheckpointError: it is missing or damaged, or another version wrote it.
        """
        folder = self._path / name
        try:
            return self._load(folder, name, mesh)
        except DamagedCheckpointError as error:
            hint = f"restore {folder} from a backup, or start anew with another --run.dir"
            folder = self._path / f"{saved.COPY}{name}"
            if not folder.is_dir():
                raise DamagedCheckpointError(error.message, hint) from error
            return self._load(folder, name, mesh)

    @staticmethod
    def _load(folder: Path, name: str, mesh: DeviceMesh | None) -> Any:
        contents = saved.read_files(folder, name)
        tree, hashes = saved.tree_in(contents, folder), saved.shard_hashes(contents, folder)
        if mesh is None:  # all shards are going to be read
            verify_share(folder, name, hashes, (0, 1))
        try:
            tensors = safetensors.torch.load(contents[saved.TENSORS])
        except SafetensorError as error:
            raise CheckpointError(
                f"the checkpoint {folder} cannot be read: {error}", "use the version of dist_train that wrote it"
            ) from error
        with ShardFiles(folder, name, hashes, mesh) as files:
            return codec.decode(tree, tensors, files.join if hashes else None)

    def load_newest(self) -> tuple[str | None, Any]:
        """Loads the newest checkpoint that is whole, and changes nothing.

        Returns:
            name and state; None, None in a new run.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        damage: dict[str, str] = {}
        for name in self.newest_first():
            try:
                return name, self.load(name)
            except DamagedCheckpointError as error:
                damage[name] = error.message
        if damage:
            raise none_is_whole(self._path, damage)
        return None, None

    def inspect(self, name: str, share: tuple[int, int] = (0, 1)) -> tuple[bool, dict[str, str]]:
        """Verifies a checkpoint and those that it needs, by the hashes of their files; changes nothing.

        Args:
            share: (k, n): of files of shards only each n-th is read, from the k-th on, as n ranks share them.

        Returns:
            whether each is whole, itself or as its copy; and the name of each damaged one, with what is wrong.

        Raises:
            CheckpointError: one cannot be read for another reason than damage.
        """
        usable, damage = self._whole(name, share)
        if usable:
            tree = saved.read_tree(self._path, name)
            needed = tree.get("needs") or list(tree.get("finished_stages", {}).values())
            for each in needed:
                if each != name:
                    whole, wrong = self._whole(each, share)
                    usable, damage = usable and whole, damage | wrong
        return usable, damage

    def _whole(self, name: str, share: tuple[int, int]) -> tuple[bool, dict[str, str]]:
        copy = self._path / f"{saved.COPY}{name}"
        try:
            _verify(self._path / name, name, share)
            return True, {}
        except DamagedCheckpointError as error:
            damage = {name: error.message}
        try:
            _verify(copy, name, share)
            return True, damage
        except DamagedCheckpointError as error:
            return False, {name: f"{damage[name]}; {error.message}"} if copy.is_dir() else damage

    def set_aside(self, name: str) -> str | None:
        """Renames a damaged checkpoint, which is kept, and puts its copy in its place.

        Returns:
            the new name of the damaged one; None where nothing is left of it.
        """
        folder, number = self._path / name, 1
        aside = self._path / f"{saved.ASIDE}{name}"
        while aside.exists():
            number += 1
            aside = self._path / f"{saved.ASIDE}{name}-{number}"
        there = folder.exists()
        if there:
            os.rename(folder, aside)
        copy = self._path / f"{saved.COPY}{name}"
        temporary = beside(folder)
        try:
            self._place(name, _verify(copy, name), temporary)
        except DamagedCheckpointError:
            if copy.exists():
                os.rename(copy, copy.with_name(f"{saved.ASIDE}{copy.name}-{number}"))
        sync_directory(self._path)
        return aside.name if there else None

    def point_to(self, name: str) -> None:
        """Makes `name` the checkpoint where a resume begins."""
        replace_json(self._path / saved.LATEST, {"name": name})

    def names(self) -> list[str]:
        """Lists the whole checkpoints, sorted, without folders that somebody else put here."""
        return sorted(folder.name for folder in self._path.iterdir() if saved.named_in(folder) == folder.name)

    def keep_only(self, names: set[str], *, copies: bool = True) -> None:
        """Removes the checkpoints that are not in `names`, and their copies; all copies if not `copies`."""
        for name in set(self.names()) - names:
            self._remove(name)
        for copy in list(self._path.glob(f"{saved.COPY}*")):
            if saved.named_in(copy) == (name := copy.name.removeprefix(saved.COPY)) and not (copies and name in names):
                self._remove(copy.name)

    def _place(
        self,
        name: str,
        contents: Mapping[str, bytes | Iterable[bytes | memoryview]],
        temporary: Path,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes the folder `name` whole or not at all, first under the name `temporary`."""
        write_folder(temporary, contents)
        beat()
        target = self._path / name
        if target.exists():
            # An attempt was killed before `latest` moved here: nothing refers to it.
            self._remove(name)
        os.rename(temporary, target)
        sync_directory(self._path)

    def _remove(self, name: str) -> None:
        # Renamed first, so that a kill in between leaves no half checkpoint under a valid name.
        doomed = beside(self._path / name)
        os.rename(self._path / name, doomed)
        shutil.rmtree(doomed)


def _places(name: str, twice: bool) -> tuple[str, ...]:
    return (f"{saved.COPY}{name}", name) if twice else (name,)


def _verify(folder: Path, name: str, share: tuple[int, int] = (0, 1)) -> dict[str, bytes | Iterable[bytes]]:
    """Verifies the files of a checkpoint or a copy; returns their content, read when it is asked for if it is shards.

    Raises:
        CheckpointError: as `saved.read_files` and `ShardFiles.verify`.
    """
    contents = saved.read_files(folder, name)
    hashes = saved.shard_hashes(contents, folder)
    verify_share(folder, name, hashes, share)
    return {**contents, **{file: pieces_of(folder / file) for file in hashes}}


def none_is_whole(path: Path, damage: Mapping[str, str]) -> CheckpointError:
    """Returns the error for checkpoints of which none can be used.

    damage: name of each damaged one -> what is wrong.
    """
    lines = "".join(f"\n  {name}: {text}" for name, text in damage.items())
    return CheckpointError(f"no checkpoint in {path} is whole, with all that it needs:{lines}", saved.NO_CHECKPOINT)
