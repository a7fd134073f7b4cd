"""Top-1 of FP32, post-training quantization and int8 by each backend: on Fashion-MNIST, 2 ranks, over paired seeds.

    pip install -e '.[quickstart]'

    python benchmarks/qat_accuracy.py [--all] [--seeds 3] [--models small_resnet ...]
        [--backends pt2e fx eager] [--engine onednn] [--train-samples 16000] [--epochs 6]
        [--qat-epochs 1] [--out runs/qat_accuracy]

Every figure comes from the real program, `torchrun --nproc_per_node 2 -m dist_train run configs/fashion_mnist.yaml`.
Each model and seed has one run with the stage `train`. Each backend then has one run of `ptq`, `qat` and `convert` from
this float model (`model.init_from`). So all figures of a seed belong to one float model, and their differences are
paired. The eager backend takes part if torchvision has the model in a quantizable form. Each top-1 is of all 10,000
test images.

The defaults are small_resnet and mobilenet_v3_small, 6 epochs of 16,000 images without augmentation, and 1 of qat. They
take 15 minutes on 2 idle cores by an estimate (9 runs of mobilenet_v3_small took 10 beside other work). `--all` adds
resnet18 and mobilenet_v2 and trains as configs/fashion_mnist.yaml says: 8 epochs of 60,000 images with augmentation,
2 of qat. It takes 4 hours by the same estimate. --models, --train-samples, --epochs, --qat-epochs and --augment
change either.

Stop it at any moment (Ctrl-C, SIGTERM) and type the same line: finished runs are read, and the interrupted one resumes.

The bar: |mean over the seeds of int8 - FP32| is at most 0.1 point, for every model and backend. A gain counts as a miss
too. It is noise, or qat trained further than `train` did, and the pair does not show the cost of quantization. The 95 %
interval is Student's t over the seeds. Exit code 0: within the bar. 1: missed, or a run failed. 75: stopped, and can be
resumed.

The gate of `convert` is off, so that models below its bound are measured too; the table marks them. Column `agree` is
the value that the gate checks: the share of test images on which int8 and the fake-quantized model decide alike. It is
the lowest over the seeds, in process and in the runtime.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from qat_accuracy_table import BAR, FIGURES, Row, summaries, table

from dist_train import load_config
from dist_train.config.data import DataConfig
from dist_train.config.load import differences
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.mnist import fashion_mnist
from dist_train.errors import EXIT_FAILED, EXIT_PREEMPTED, ConfigError, DistTrainError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import recorded_config

RANKS, TRAIN_SAMPLES = 2, 60_000
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "fashion_mnist.yaml"
BACKENDS = ("pt2e", "fx", "eager")
# Before an averaged model is handed on, its BatchNorm statistics are estimated anew. MobileNetV3's momentum is 0.01:
# after the default's 378 steps, moving variances still hold 2 % of their first value, 1. True ones are far smaller.
EMA_DECAY = 0.98
GRACE = 60  # seconds: torchrun's own 30 until it kills its ranks, and some


@dataclass(frozen=True)
class Model:
    lr: float
    """Learning rate of `train`, for a global batch of 256."""
    quantizable: str | None = None
    """The same network with the same parameters, for the eager backend."""


MODELS = {
    "small_resnet": Model(0.2),
    "mobilenet_v3_small": Model(0.1),
    "resnet18": Model(0.1, "quantized_resnet18"),
    "mobilenet_v2": Model(0.1, "quantized_mobilenet_v2"),
}
DEFAULT = {"models": list(MODELS)[:2], "train_samples": 16_000, "epochs": 6, "qat_epochs": 1, "augment": False}
ALL = {"models": list(MODELS), "train_samples": TRAIN_SAMPLES, "epochs": 8, "qat_epochs": 2, "augment": True}


class Failed(Exception):
    """A run ended without results; the rest of the benchmark goes on."""


def first_rows(root: Path | None, count: int, folder: Path) -> Path:
    """Makes a folder with the first `count` training images and all test images as IDX files, unless it exists.

    Fashion-MNIST's files are shuffled: the first rows are of all classes.
    """
    if folder.is_dir():
        return folder
    splits = fashion_mnist(DataConfig(name="fashion_mnist", root=root))
    beside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, part, limit in (("train", splits.train, count), ("t10k", splits.eval, None)):
        assert isinstance(part, ImageArrays)
        images, labels = part.images[:limit, 0].numpy(), part.targets[:limit].to(torch.uint8).numpy()
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)  # 8: unsigned bytes
            (beside / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
    beside.rename(folder)
    return folder


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out / f"{options.train_samples}-{options.epochs}-{options.qat_epochs}"
        self.common = ["--run.device", "cpu", "--run.threads_per_rank", "1"]
        if not options.augment:
            self.common += ["--data.augment", "[]"]
        if options.train_samples < TRAIN_SAMPLES:
            data = first_rows(options.root, options.train_samples, options.out / f"data-{options.train_samples}")
            self.common += ["--data.root", str(data)]
        elif options.root is not None:
            self.common += ["--data.root", str(options.root)]

    def rows(self, name: str, seed: int) -> tuple[list[Row], list[str]]:
        """Returns a row for each backend, all from one float model, and the errors of failed runs."""
        folder, model, options = self.folder / name / f"seed-{seed}", MODELS[name], self.options
        own = [*self.common, "--run.seed", str(seed)]
        train = ["--stages", "[train]", "--train.optim.lr", str(model.lr), "--train.ema_decay", str(EMA_DECAY)]
        train += epochs("train", options.epochs)
        try:
            fp32 = self.run(folder / "fp32", [*own, "--model.name", name, *train])
        except Failed as error:
            return [], [str(error)]
        print(f"{name} seed {seed} fp32: {fp32['models']['fp32']['top1']:.2%}, {seconds(fp32):.0f} s", flush=True)
        rows, failed = [], []
        for backend in options.backends:
            model_name = model.quantizable if backend == "eager" else name
            if model_name is None:
                continue
            qat = ["--stages", "[ptq, qat, convert]", "--qat.backend", backend, "--qat.optim.lr", str(options.qat_lr)]
            kernels = "" if options.engine == "auto" or backend == "pt2e" else f"-{options.engine}"
            if kernels:
                qat += ["--qat.engine", options.engine]
            # Models that the gate would refuse are measured too; the table marks them.
            qat += ["--convert.agreement_bound", "0", *epochs("qat", options.qat_epochs)]
            start = ["--model.name", model_name, "--model.init_from", str(folder / "fp32")]
            try:
                found = self.run(folder / f"{backend}{kernels}", [*own, *start, *qat])
            except Failed as error:
                failed.append(str(error))
                continue
            row = row_of(name, backend, seed, fp32, found)
            rows.append(row)
            print(f"{name} seed {seed} {backend}: int8 {row.int8:.2%}, {row.seconds:.0f} s", flush=True)
        return rows, failed

    def run(self, run_dir: Path, settings: list[str]) -> dict[str, Any]:
        """Starts or resumes the run unless it is done; returns its results.json.

        Raises:
            Failed: it ended otherwise; its log is beside its directory.
            ConfigError: the directory holds a run with other settings.
            SystemExit: it was stopped.
        """
        settings = ["--run.name", f"qat_accuracy-{run_dir.name}", "--run.dir", str(run_dir), *settings]
        here, config = RunDir(run_dir), load_config(CONFIG, settings)
        if state(here) != "done":
            agent = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
            command = [sys.executable, *agent, "-m", "dist_train", "run", str(CONFIG), *settings]
            log = run_dir.with_name(f"{run_dir.name}.log")
            code = call(command, log, self.options.timeout)
            if code == 0 and state(here) == "preempted":  # under torchrun a stopped rank exits 0
                stopped()
            if code != 0 or state(here) != "done":
                how = f"exit code {code}" if isinstance(code, int) else code
                why = (read_json(here.status) or {}).get("error") or "it did not say why"
                raise Failed(f"{run_dir}: {how}: {why}\n  all it printed: {log}")
        elif changed := differences(recorded_config(here), config):
            raise ConfigError(changed, f"{run_dir} holds a run with other settings: --out with another folder")
        found: dict[str, Any] = read_json(here.results)
        return found


def epochs(stage: str, count: int) -> list[str]:
    """Returns the settings of `count` epochs, with an evaluation at the end only."""
    return [f"--{stage}.epochs", str(count), f"--{stage}.evaluate_every", str(count)]


def state(run_dir: RunDir) -> str | None:
    status = read_json(run_dir.status)
    return None if status is None else str(status["state"])


def seconds(results: dict[str, Any]) -> float:
    """Returns the seconds of all stages, without set-up and steps repeated after a kill."""
    return float(sum(stage["seconds"] for stage in results["stages"].values()))


def row_of(name: str, backend: str, seed: int, fp32: dict[str, Any], found: dict[str, Any]) -> Row:
    models = fp32["models"] | found["models"]
    top1 = {figure: models[figure]["top1"] for figure in FIGURES}
    lowered = models["int8"].get("lowered", {}).get("top1")
    agreement = min(found["gates"][gate]["value"] for gate in ("convert", "lowered") if gate in found["gates"])
    return Row(name, backend, seed, **top1, lowered=lowered, agreement=agreement, seconds=seconds(found))


def call(command: list[str], log: Path, timeout: float) -> int | str:
    """Runs a command and appends its output to `log`; stops it if this process is stopped.

    Returns its exit code, or a text if it took too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"no end after {timeout:.0f} s (--timeout)"
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun hands it on, and the ranks save
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all models, all images, more epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--engine", default="auto", help="integer kernels of fx and eager: onednn has 8 bits for activations"
    )
    parser.add_argument("--train-samples", type=int, help="images of an epoch")
    parser.add_argument("--epochs", type=int, help="of train")
    parser.add_argument("--qat-epochs", type=int)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="crop and flip")
    parser.add_argument("--qat-lr", type=float, default=0.001)
    parser.add_argument("--root", type=Path, default=None, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("runs/qat_accuracy"), help="folder of the runs")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one run")
    parser.add_argument("--json", type=Path, default=Path("qat_accuracy.json"))
    options = parser.parse_args()
    for name, value in (ALL if options.all else DEFAULT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stopped)
    load = os.getloadavg()[0]
    rows, failed = list[Row](), list[str]()
    try:
        bench = Bench(options)
        for name in options.models:
            for seed in range(options.seeds):
                done, lost = bench.rows(name, seed)
                rows += done
                failed += lost
    except DistTrainError as error:
        print(f"qat_accuracy: {error}", file=sys.stderr)
        return error.exit_code
    found = summaries(rows)
    machine = f"{os.cpu_count()} cores (load {load:.1f} before)"
    print(f"\n{datetime.date.today()} torch {torch.__version__}, {RANKS} ranks, {machine}")
    print(f"{options.train_samples} images, {options.epochs} epochs and {options.qat_epochs} of qat; differences in")
    print("points, ± half the 95 % interval of the paired mean (Student's t)\n")
    print(table(found))
    for each in failed:
        print(f"\nFAILED {each}")
    missed = [each for each in found if not each.passed]
    passed = bool(found) and not missed and not failed
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    summary = [asdict(each) | {"passed": each.passed} for each in found]
    written = {"settings": settings, "bar": BAR, "passed": passed, "summary": summary, "failed": failed}
    replace_json(options.json, written | {"rows": [asdict(row) for row in rows]})
    print(f"\nbar: |mean of int8 - fp32| at most {BAR} point: {'passed' if passed else 'MISSED'}")
    print(f"written: {options.json}")
    return 0 if passed else EXIT_FAILED


def stopped(*_: object) -> None:
    print("\nqat_accuracy: stopped; the same command goes on", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)


if __name__ == "__main__":
    raise SystemExit(main())
