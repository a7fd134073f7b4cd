"""`dist-train doctor`: what was typed after it."""

from __future__ import annotations

from dist_train.cli.verbs import Verb, one_of
from dist_train.errors import UsageError

_USAGE = "[CONFIG] [--only SECTION ...] [--json] [--dotted.key VALUE ...]"
_DETAILS = """\
Looks at the ranks that this environment gives, versions, devices, the network, an all-reduce of two ranks, the machine,
Slurm, wandb, and tries each quantization backend and export format on a small model. With CONFIG also at what that needs:
its settings, its run directory, its device. Every line is good, a warning or bad; plain text without secrets, to paste.
  --only SECTION         this section alone; repeatable: ranks versions devices network all-reduce machine slurm wandb
                         quantization lowering
  --json                 the same as JSON
Exit codes: 0 good or warnings only, 1 something is bad, 78 the configuration or the environment's variables are."""


def doctor(arguments: list[str]) -> int:
    """Runs the verb; returns the exit code of the worst line.

    Raises:
        UsageError: an unknown section, or settings without a configuration.
    """
    from dist_train.doctor.checks import SECTIONS
    from dist_train.doctor.diagnose import diagnose

    words: list[str] = []
    only: list[str] = []
    as_json = False
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--json":
            as_json = True
        elif name == "--only":
            only.append(one_of("only", value if equals else rest.pop(0) if rest else "", SECTIONS))
        else:
            words.append(word)
    if words and words[0].startswith("-"):
        raise UsageError(
            f"doctor has no option {words[0]} without a configuration", f"usage: dist-train doctor {_USAGE}"
        )
    return diagnose(words, only or SECTIONS, as_json)


DOCTOR = Verb(
    "doctor", _USAGE, "what works on this machine, and what to type where something does not", doctor, _DETAILS
)
