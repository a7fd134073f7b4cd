"""The line after each evaluation, plain or as `log.epoch_format` words it."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping

from dist_train.errors import Problem

_OWN = ("stage", "epoch", "epochs")
COUNTS = ("count", "skipped_samples")  # metrics that count samples


def epoch_line(template: str, stage: str, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> str:
    """The text of an epoch, counted from 1: "Epoch [{epoch}/{epochs}], Acc: {top1:.4%}" gives "Epoch [1/10], Acc: 91.5300%"."""
    return template.format(**{**metrics, "stage": stage, "epoch": epoch, "epochs": epochs})


def plain_line(stage: str, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> str:
    """The line where no format is given."""
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in COUNTS)
    without = metrics.get("skipped_samples")
    return f"{stage}: epoch {epoch}/{epochs} evaluated: {shown} on {metrics['count']} samples" + (
        f", without {without} that cannot be decoded" if without else ""
    )


def check_epoch_format(template: str, metrics: Iterable[str]) -> list[Problem]:
    """What is wrong with a format for an evaluation of these metrics: an unknown field, or one that cannot be formatted so."""
    fields = [*_OWN, *metrics, "count"]
    hint = f"the fields are {', '.join(fields)}, as in 'Epoch [{{epoch}}/{{epochs}}]  loss {{loss:.4f}}'"
    try:
        # Attributes and items of a field are none of the line's business, so the whole name must be known.
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in used if name not in fields]
        if unknown:
            return [Problem("log.epoch_format", f"has no field {unknown[0]!r}", hint=hint)]
        epoch_line(template, "train", 1, 1, {**dict.fromkeys(metrics, 0.5), "count": 1})
    except (ValueError, KeyError, IndexError) as error:
        return [Problem("log.epoch_format", f"cannot be formatted: {error}", hint=hint)]
    return []
