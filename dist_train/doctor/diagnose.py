"""Runs the diagnosis: the configuration if one is given, then the checks; prints text or JSON."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace

from dist_train.config.tree import Config
from dist_train.doctor.base import Line, Section, Subject, bad, exit_code, good, summary, warning
from dist_train.doctor.checks import examine
from dist_train.errors import EXIT_CONFIG, ConfigError, DistTrainError


def diagnose(words: Sequence[str], names: Sequence[str], as_json: bool, deep: bool) -> int:
    """Prints the sections, and returns the worst line's exit code.

    Args:
        words: a configuration and its options, or nothing.
        names: names of sections, of `checks.SECTIONS`.
        deep: True to try each export format, not only those of the configuration.
    """
    subject, sections = Subject(), []
    if words:
        subject, lines = _configuration(words)
        sections.append(Section("configuration", tuple(lines)))
    asyncio.run(_show(replace(subject, deep=deep), names, sections, as_json))
    if as_json:
        print(json.dumps({"exit_code": exit_code(sections), "sections": [asdict(each) for each in sections]}, indent=2))
    else:
        print(summary(sections))
    return exit_code(sections)


async def _show(subject: Subject, names: Sequence[str], sections: list[Section], as_json: bool) -> None:
    for section in sections:
        if not as_json:
            print(section.text(), flush=True)
    async for section in examine(subject, names):
        sections.append(section)
        if not as_json:
            print(section.text(), flush=True)


def _configuration(words: Sequence[str]) -> tuple[Subject, list[Line]]:
    from dist_train.config.load import load

    try:
        loaded = load(words[0], words[1:])
    except ConfigError as error:
        return Subject(), [
            bad(
                f"{each.place}{each.source and f' ({each.source})'}: {each.message}",
                each.hint or "dist-train config reference",
                EXIT_CONFIG,
            )
            for each in error.problems
        ]
    except DistTrainError as error:
        return Subject(), [bad(error.message, error.hint, error.exit_code)]
    config = loaded.config
    compiled = ("inductor",) if config.compile is True else ()
    wanted = (config.qat.backend, *config.export.formats, *compiled, *config.trackers)
    lines = [warning(f"{each.place}: {each.message}", each.hint) for each in loaded.warnings]
    lines.append(good(f"{words[0]} is right: {', '.join(config.stages)} in {config.store or config.run_dir}"))
    subject = Subject(
        str(config.run_dir), wanted, config.run.device, *_worker_batches(config), store=config.store or ""
    )
    return subject, lines


def _worker_batches(config: Config) -> tuple[int, int]:
    """Returns the data workers of one rank, and the bytes of a batch; zeros where only the opened dataset tells."""
    if config.data.name != "image_folder":
        return 0, 0
    workers, size = config.data.workers, config.data.args.get("size", 224)
    if not isinstance(size, int):
        return 0, 0
    count = len(os.sched_getaffinity(0)) if workers == "auto" else workers
    return count, config.data.global_batch_size * 3 * size * size
