"""Lists the image files of folders train/<class>/ and val/<class>/, or of one folder of classes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dist_train.data.image_file import EXTENSIONS, is_image_name
from dist_train.data.image_listing import FoundFile, leads_back, list_images
from dist_train.errors import DataError

LAYOUT = "--data.root FOLDER, with images in FOLDER/train/<class>/ and FOLDER/val/<class>/"
_ONE = "for a folder of classes alone: --data.split.eval 0.1 makes the evaluation set of a tenth of its images"


def folders(root: Path, divided: bool) -> dict[str, Path]:
    """Returns the folders of classes: train and val; train alone where val is missing and `divided`, else the root."""
    if divided and not (root / "val").is_dir():
        return {"train": root / "train" if (root / "train").is_dir() else root}
    return {name: root / name for name in ("train", "val")}


def list_folders(root: Path, skip_dangling: bool, divided: bool = False) -> dict[str, dict[str, list[FoundFile]]]:
    """Lists the files of each class in train and in val; both have the same classes.

    Args:
        skip_dangling: links that lead nowhere, named like images, are listed.
        divided: `data.split` makes the evaluation set, so that there need be no val, nor a train; see `folders`.

    Raises:
        DataError: the folders do not have this layout; the message lists what is there.
    """
    places = folders(root, divided)
    if "val" not in places:
        return {"train": _list(places["train"], skip_dangling)}
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        seen = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
        hint = f"{LAYOUT}; {_ONE}" if "val" in missing else LAYOUT
        raise DataError(f"{root} has no folder {' and no folder '.join(missing)}: it holds {seen}", hint)
    found = {name: _list(root / name, skip_dangling) for name in ("train", "val")}
    if sorted(found["train"]) != sorted(found["val"]):
        only = {
            name: sorted(set(found[name]) - set(found[other])) for name, other in (("train", "val"), ("val", "train"))
        }
        said = "; ".join(f"only in {name}: {', '.join(names[:5])}" for name, names in only.items() if names)
        raise DataError(f"the classes of {root}/train and {root}/val differ: {said}", "give both the same folders")
    return found


def _list(split: Path, skip_dangling: bool) -> dict[str, list[FoundFile]]:
    """Lists each class's image files under its folder, at any depth, sorted.

    Raises:
        DataError: no classes, a class without images, or files that are no images. Links that lead nowhere, unless
            they are named like images and are to be skipped; then they are listed, and their items are corrupt.
    """
    found: dict[str, list[FoundFile]] = {}
    others: Counter[str] = Counter()
    dangling: list[str] = []
    for entry in sorted(split.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not os.path.exists(entry):
            dangling.append(str(entry))
        elif leads_back(entry, split):
            message = f"{entry} is a link to {os.path.realpath(entry)}, whose images are found without it"
            raise DataError(message, "remove the link")
        elif entry.is_dir():
            listing = list_images(entry, split)
            others.update(listing.others)
            found[entry.name] = listing.files
            dangling += [path for path in listing.dangling if not (skip_dangling and is_image_name(Path(path).name))]
    if dangling:
        raise DataError(
            f"{len(dangling)} links in {split} lead nowhere, such as {', '.join(dangling[:3])}",
            "fetch the files (dvc pull, git annex get), or leave out such images, counted: --data.on_corrupt skip",
        )
    if len(found) < 2:
        names = ", ".join(found) or "none"
        raise DataError(f"{split} must hold a folder for each of two or more classes; it holds {names}", LAYOUT)
    empty = [name for name, files in found.items() if not files]
    beside = ", ".join(f"{count} of {extension}" for extension, count in others.most_common(5))
    if empty:
        raise DataError(
            f"{split} has {len(empty)} classes without an image, such as {empty[0]}"
            + (f"; other files: {beside}" if beside else ""),
            f"remove the folder, or fill it; images end in {', '.join(EXTENSIONS)}",
        )
    if others:
        raise DataError(
            f"{split} has files that are no images: {beside}", f"remove them; images end in {', '.join(EXTENSIONS)}"
        )
    return found
