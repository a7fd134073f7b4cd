"""Stored datasets: one copy for the processes of a node, whole or absent, and the ids come out with the rows."""

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, TensorDataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.open_splits import open_splits
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError, PeerError


def arrays_of(rows: int = 20, seed: int = 0) -> ImageArrays:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (rows, 3, 5, 4), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 7, (rows,), generator=generator)
    return ImageArrays(images, targets, torch.arange(rows) * 10 + 5)


def splits_of(train: ImageArrays | Dataset, evaluation: ImageArrays | Dataset) -> Splits:
    return Splits(train, evaluation, 7, tuple("abcdefg"), (0.1, 0.2, 0.3), (1 / 3, 0.5, 0.7))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_gather_takes_rows_with_their_stored_ids(as_tensor: bool) -> None:
    data, rows = arrays_of(), np.array([3, 0, 19, 3])
    batch = data.gather(torch.from_numpy(rows) if as_tensor else rows)
    assert batch.ids.tolist() == [35, 5, 195, 35]
    assert torch.equal(batch.inputs, data.images[rows]) and torch.equal(batch.targets, data.targets[rows])
    batch.inputs.zero_()
    assert data.images[3].any(), "a batch is a copy"
    assert len(data.gather(np.array([], dtype=np.int64)).ids) == 0


@pytest.mark.parametrize("row", [-1, 20])
def test_gather_refuses_rows_outside(row: int) -> None:
    with pytest.raises(IndexError, match=r"range\(20\)"):
        arrays_of().gather(np.array([0, row]))


def test_what_was_written_is_mapped_again_with_the_same_bytes(tmp_path: Path) -> None:
    data = arrays_of()
    name = data.write(tmp_path)
    stored = ImageArrays.open(tmp_path / name)
    for part in ("images", "targets", "ids"):
        assert torch.equal(getattr(stored, part), getattr(data, part))
    stored.images.zero_()  # a stray write
    assert torch.equal(ImageArrays.open(tmp_path / name).images, data.images)


def test_the_name_is_the_content(tmp_path: Path) -> None:
    name = arrays_of().write(tmp_path)
    assert arrays_of().write(tmp_path) == name
    assert arrays_of(seed=1).write(tmp_path) != name
    data = arrays_of()
    reshaped = ImageArrays(data.images.reshape(20, 3, 4, 5), data.targets, data.ids)
    assert reshaped.write(tmp_path) != name, "equal bytes in another shape are other images"


def test_whole_files_are_taken_as_they_are_and_damaged_ones_replaced(tmp_path: Path) -> None:
    data = arrays_of()
    folder = tmp_path / data.write(tmp_path)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["ids.npy", "images.npy", "targets.npy"]
    before = {file: file.stat().st_ino for file in files}
    data.write(tmp_path)
    assert {file: file.stat().st_ino for file in files} == before

    images = folder / "images.npy"
    mapped = ImageArrays.open(folder)
    whole = images.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damage in (whole[:200], b"", b"no array", flipped):
        beside = folder / "damaged"
        beside.write_bytes(damage)
        beside.replace(images)
        damaged = images.stat().st_ino
        data.write(tmp_path)
        assert images.stat().st_ino != damaged, "replaced at once, not written over: others may have it mapped"
        assert images.read_bytes() == whole
        assert sorted(folder.iterdir()) == files, "nothing is left beside"
    assert torch.equal(mapped.images, data.images), "who had mapped the first file keeps it"


@pytest.mark.parametrize("damage", [b"", b"no array", None, "short"])
def test_opening_damaged_files_says_what_to_remove(tmp_path: Path, damage: bytes | str | None) -> None:
    folder = tmp_path / arrays_of().write(tmp_path)
    if damage is None:
        (folder / "targets.npy").unlink()
    else:
        whole = (folder / "images.npy").read_bytes()
        (folder / "images.npy").write_bytes(whole[:-10] if isinstance(damage, str) else damage)
    with pytest.raises(DataError) as caught:
        ImageArrays.open(folder)
    assert caught.value.hint == f"rm -r {folder}"


def _write(directory: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    arrays_of(5000).write(directory)


def test_processes_may_write_the_same_arrays_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    writers = [context.Process(target=_write, args=(tmp_path, start)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3
    assert torch.equal(ImageArrays.open(folder).images, arrays_of(5000).images)


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write") as caught:
        arrays_of().write(tmp_path / "file")
    assert "--data.cache_dir" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.uint16, torch.bool])
def test_classes_may_be_any_integers(dtype: torch.dtype) -> None:
    images, targets = arrays_of().images, arrays_of().targets % 2
    taken = ImageArrays(images, targets.to(dtype)).targets
    assert taken.dtype == torch.int64 and torch.equal(taken, targets)


def test_wrong_arrays_are_refused() -> None:
    images, targets = arrays_of().images, arrays_of().targets
    for wrong in (
        lambda: ImageArrays(images.float(), targets),
        lambda: ImageArrays(images[0], targets),
        lambda: ImageArrays(images[:0], targets[:0]),
        lambda: ImageArrays(images, targets[:-1]),
        lambda: ImageArrays(images, targets.to(torch.complex64)),
        lambda: ImageArrays(images, targets, torch.arange(3)),
        lambda: splits_of(ImageArrays(images, targets + 7), arrays_of()),
        lambda: splits_of(arrays_of(), ImageArrays(images, targets - 7)),
        lambda: splits_of(ImageArrays(images[:, :1], targets), arrays_of()),
        lambda: Splits(arrays_of(), arrays_of(), 7, ("a",), (0.0,) * 3, (1.0,) * 3),
    ):
        with pytest.raises(DataError):
            wrong()


@pytest.mark.parametrize(
    "targets",
    [
        torch.rand(20),
        torch.rand(20, 4),
        torch.randint(0, 2, (20, 3)),
        torch.randint(0, 9, (20, 5, 4), dtype=torch.uint8),
    ],
)
def test_targets_of_any_shape_are_stored_and_hashed(targets: torch.Tensor, tmp_path: Path) -> None:
    images = arrays_of().images

    def make() -> Splits:
        made = ImageArrays(images, targets)
        return Splits(made, made, mean=(0.5,) * 3, std=(0.5,) * 3, num_outputs=4)

    splits = open_splits(make, tmp_path, World())
    assert isinstance(splits.train, ImageArrays) and splits.train.targets.dtype == targets.dtype
    assert torch.equal(splits.train.gather(np.array([7, 3])).targets, targets[[7, 3]])
    assert (splits.num_outputs, splits.num_classes, splits.classes) == (4, 0, ())
    changed = targets.clone()
    changed.view(-1)[0] += 1
    assert ImageArrays(images, changed).write(tmp_path) not in splits.fingerprint


def test_a_dataset_says_what_a_model_puts_out() -> None:
    assert splits_of(arrays_of(), arrays_of()).num_outputs == 7
    with pytest.raises(DataError, match="the width of the model"):
        Splits(arrays_of(), arrays_of(), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(DataError, match="needs two classes"):
        Splits(arrays_of(), arrays_of(), mean=(0.5,) * 3, std=(0.5,) * 3, num_outputs=7)


def test_the_input_shape_is_read_from_the_data() -> None:
    assert splits_of(arrays_of(), arrays_of()).input_shape == (3, 5, 4)
    pairs = TensorDataset(torch.zeros(2, 1, 6, 7), torch.zeros(2))
    assert splits_of(pairs, pairs).input_shape == (1, 6, 7)
    plain: Dataset = [([1, 2], 0)]  # type: ignore[assignment]
    with pytest.raises(DataError, match="is a list of 2, not a tensor"):
        _ = splits_of(plain, plain).input_shape


def on_ranks(world_size: int, local_world_size: int, work: Callable[[World], Splits]) -> list[Splits | Exception]:
    """Returns the result or the error of `work` on each rank; ranks are threads around one store."""
    store = dist.HashStore()
    results: list[Splits | Exception | None] = [None] * world_size

    def run(rank: int) -> None:
        world = World(rank, rank % local_world_size, world_size, local_world_size, timeout=20.0, nonce="n", store=store)
        try:
            results[rank] = work(world)
        except (DataError, PeerError) as error:
            world.report_failure(error)
            results[rank] = error

    # numpy's parser of file headers is not thread-safe in CPython 3.11 ("AST constructor recursion depth mismatch").
    # Real ranks are processes, where this does not matter.
    lock, opened = threading.Lock(), ImageArrays.open

    def one_at_a_time(path: Path) -> ImageArrays:
        with lock:
            return opened(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageArrays, "open", one_at_a_time)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results  # type: ignore[return-value]


def test_one_rank_of_each_node_loads_and_all_map_the_same_arrays(tmp_path: Path) -> None:
    made: list[int] = []

    def work(world: World) -> Splits:
        def make() -> Splits:
            made.append(world.rank)
            return splits_of(arrays_of(), arrays_of(8, seed=1))

        return open_splits(make, tmp_path / f"node{world.node_rank}", world)

    results = on_ranks(4, 2, work)
    assert sorted(made) == [0, 2]
    expected = splits_of(arrays_of(), arrays_of(8, seed=1))
    for result in results:
        assert (
            isinstance(result, Splits)
            and isinstance(result.train, ImageArrays)
            and isinstance(result.eval, ImageArrays)
        )
        assert torch.equal(result.train.images, arrays_of().images) and torch.equal(result.train.ids, arrays_of().ids)
        assert torch.equal(result.eval.targets, arrays_of(8, seed=1).targets)
        for name in ("num_classes", "classes", "mean", "std"):
            assert getattr(result, name) == getattr(expected, name)
    for node in ("node0", "node1"):
        assert len(list((tmp_path / node).iterdir())) == 2


def test_a_single_process_needs_no_store_and_maps_too(tmp_path: Path) -> None:
    result = open_splits(lambda: splits_of(arrays_of(), arrays_of(8)), tmp_path, World())
    assert isinstance(result.train, ImageArrays)
    name = arrays_of().write(tmp_path)
    mapped = np.memmap(tmp_path / name / "images.npy", mode="r+")
    mapped[-1] ^= 255
    mapped.flush()
    assert int(result.train.images[-1, -1, -1, -1]) == int(arrays_of().images[-1, -1, -1, -1]) ^ 255, "not a copy"


def test_map_style_datasets_are_made_on_every_rank_the_first_of_the_node_first(tmp_path: Path) -> None:
    made: list[int] = []

    def work(world: World) -> Splits:
        def make() -> Splits:
            made.append(world.rank)
            pairs = TensorDataset(torch.full((2, 1, 2, 2), float(world.rank)), torch.zeros(2))
            return splits_of(pairs, arrays_of())

        return open_splits(make, tmp_path, world)

    results = on_ranks(3, 3, work)
    assert made[0] == 0 and sorted(made) == [0, 1, 2]
    assert [float(result.train[0][0].max()) for result in results] == [0.0, 1.0, 2.0]  # type: ignore[union-attr, index]
    assert not list(tmp_path.iterdir())


def test_a_failure_to_load_reaches_every_rank(tmp_path: Path) -> None:
    def work(world: World) -> Splits:
        def make() -> Splits:
            raise DataError("the disk is gone")

        return open_splits(make, tmp_path, world)

    results = on_ranks(3, 3, work)
    assert isinstance(results[0], DataError)
    for result in results[1:]:
        assert isinstance(result, PeerError) and "the disk is gone" in str(result)
