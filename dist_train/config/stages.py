"""The sections of the stages: `train`, `half`, `ptq`, `qat`, `convert`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from dist_train import registry
from dist_train.config.base import MAY_CHANGE_ON_RESUME, Count, Fraction, Rate, Registered, Seconds, Settings
from dist_train.config.fit import FitConfig, Match, OptimConfig

OperatorName = Annotated[str, Field(pattern=r"^\w+::\w+$")]
ModuleName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]


class TrainConfig(FitConfig):
    epochs: Count = 10
    """Passes over the training set."""
    extend_from: Path | None = None
    """Run directory of another run of the same data and model: go on from its training, finished or not, with weights,
    optimizer, moving average and step, up to `epochs` in all. The learning rate follows this run's schedule from that
    step on."""


class HalfConfig(Settings):
    dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """auto: bf16 if the CPU or GPU computes in it, else fp16."""


class PTQConfig(Settings):
    samples: Count = 512
    """Training samples, over all ranks, from which the ranges are initialised: drawn by the seed, or the first ones of
    a stream."""
    ranges: Literal["min_max", "percentile", "mse"] = "min_max"
    """min_max: the smallest and largest value. percentile, mse: clipped, by a second pass that makes a histogram."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """percentile: at most 100 minus this many percent of the values are clipped at each end."""


Bits = Annotated[int, Field(ge=2, le=8)]


class WeightQuantizationConfig(Settings):
    bits: Bits = 8
    """Below 8 the integers are simulated in int8 (pt2e only)."""
    scheme: Literal["symmetric", "affine"] = "symmetric"
    """affine: with a zero point, so that smallest and largest weight span all integers (pt2e only). It is for OpenVINO
    and ONNX Runtime, as the kernels of Inductor and XNNPACK take no zero point."""
    granularity: Literal["channel", "tensor"] = "channel"
    """A scale for each output channel, or one for all."""


class ActivationQuantizationConfig(Settings):
    bits: Bits = 8
    """Below 8 the integers are simulated in uint8."""
    scheme: Literal["affine", "symmetric"] = "affine"
    """symmetric: 0 is the middle integer."""
    granularity: Literal["tensor", "channel"] = "tensor"
    """channel is refused: no backend has integer kernels for it."""


class RuleConfig(Settings):
    match: Match
    """Module names, as a pattern like `layer4.*.conv2`, or `{type: Conv2d}`. A match includes all modules inside."""
    weight: WeightQuantizationConfig | None = None
    """Quantization of their weights."""
    activation: ActivationQuantizationConfig | None = None
    """Quantization of their inputs (pt2e only)."""
    skip: bool = False
    """Leave these modules in floating point."""


class QATOptimConfig(OptimConfig):
    lr: Rate = 0.001
    """Highest learning rate of the schedule."""


class QATConfig(FitConfig):
    backend: Annotated[str, Registered(registry.quantization_backends)] = "pt2e"
    """Quantization backend, also of ptq and convert."""
    engine: Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"] = "auto"
    """Integer kernels of the fx and eager backends; auto: x86 on x86-64, qnnpack on ARM. pt2e, whose models run in
    many runtimes: x86 and fbgemm keep activations to 127 steps, for CPUs without VNNI; onednn and qnnpack give 255;
    auto: 127 if a rank of the run's first start has such a CPU, else 255."""
    epochs: Count = 2
    """Passes over the training set."""
    optim: QATOptimConfig = QATOptimConfig()
    budget: Annotated[float | None, Field(ge=0)] = None
    """Points (0.01) of the task's metric that ptq may lose against FP32: if it loses no more, qat is left out. None:
    qat always trains."""
    freeze: list[Match] | None = None
    """As `train.freeze`, by the float model's names. None: what train keeps frozen to its end."""
    always: bool = False
    """Train even if ptq is within the budget, which is then only reported."""
    observer: Literal["moving_average", "min_max"] = "moving_average"
    """Update of the ranges: by an exponential moving average, or the smallest and largest value so far."""
    dropout: bool = False
    """Keep the model's dropout active in this stage. Off is recommended for so few steps."""
    select_by: str | None = None
    """Metric of the evaluation that decides which epoch is best: top1, loss, ...; None: the task's own. int8_top1,
    int8_loss, ...: of the model converted to int8, at the cost of a conversion and a second evaluation each time."""
    averaging: Annotated[float, Field(gt=0, le=1)] = 0.05
    """moving_average: weight of a step's range."""
    freeze_batch_norm: Fraction = 0.3
    """Fraction of the steps after which BatchNorm's statistics are frozen."""
    freeze_ranges: Fraction = 0.5
    """Fraction of the steps after which the ranges are frozen."""
    prepare_bound: Annotated[PositiveFloat, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1e-4
    """Gate: largest relative difference of the prepared model, with fake quantization off, from the float one."""
    gradient_bound: Annotated[PositiveFloat, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 0.01
    """Gate: largest relative difference of the prepared model's gradients from the float model's, with fake
    quantization off."""
    rules: list[RuleConfig] = []
    """Modules that are quantized differently, or left in floating point. The first matching rule counts."""

    @property
    def simulated_bits(self) -> list[int]:
        """Bit widths below 8 of the rules, ascending: as no kernel has them, the int8 model simulates them."""
        parts = [part for rule in self.rules for part in (rule.weight, rule.activation) if part is not None]
        return sorted({part.bits for part in parts if part.bits < 8})


class ConvertConfig(Settings):
    deadline: Annotated[Seconds, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 900.0
    """Seconds that the ranks wait for rank 0 to convert."""
    agreement_bound: Annotated[Fraction, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 0.99
    """Gates: least share of the evaluation set on which the int8 model, in process and in its runtime, decides as the
    fake-quantized one does."""
    runtime: Annotated[
        Literal["auto", "openvino", "onnxruntime", "none"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)
    ] = "auto"
    """Runtime in which the int8 model is evaluated besides the program in process; auto: OpenVINO or ONNX Runtime, the
    first that is installed. fx and eager have kernels of their own."""


class ExportConfig(Settings):
    formats: Annotated[
        list[Literal["auto", "pt2", "onnx", "openvino", "executorch"]],
        Field(min_length=1, json_schema_extra=MAY_CHANGE_ON_RESUME),
    ] = ["pt2"]
    """Formats to write beside the program itself (pt2; TorchScript for the fx and eager backends), which is always
    written. auto: of the installed runtimes, the fastest one on rank 0's machine."""
    models: Annotated[list[Literal["fp32", "half", "int8"]] | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = (
        None
    )
    """Models to export, the first one as `model.*`; None: int8 if `convert` ran, else half, else fp32."""
    input: Annotated[Literal["float", "uint8"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = "float"
    """Input of the exported models. float: images that the caller normalized. uint8: pixels [B, C, H, W]; normalization
    is inside each program and file. For data of uint8 images, and models of the pt2e backend."""
    postprocess: Annotated[bool, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = False
    """Boxes in place of a detector's dense outputs: load_artifact returns boxes, scores and labels of each image, and
    boxes.onnx beside ONNX models makes them of one image's outputs."""
    operators: Annotated[dict[OperatorName, ModuleName], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = {}
    """Operators of other libraries that programs may hold besides torch's own, each with the module that registers it:
    {"torchvision::deform_conv2d": "torchvision"}. Name those alone that you trust: they may do more than compute."""
    latency: bool = True
    """Time the FP32, the half and the int8 model on rank 0, in the same runtime if it is right for them."""
    latency_batch_sizes: list[Annotated[int, Field(gt=0, le=65_536)]] = [1, 32]
    deadline: Annotated[Seconds, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 900.0
    """Seconds that the ranks wait for rank 0 to export."""
    agreement_samples: Annotated[Count | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1024
    """Gate of each int8 format: samples of the evaluation set, drawn by the seed, on which it must decide as the int8
    model in process does, within `convert.agreement_bound`. None: all of them."""
    artifact_bound: Annotated[float, Field(ge=0, json_schema_extra=MAY_CHANGE_ON_RESUME)] = 1e-5
    """Gate: largest difference of the artifact's outputs, in a fresh process, from those of the models in memory."""
    size_bound: Annotated[PositiveFloat | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Gate: most bytes of the int8 program for each byte of the FP32 parameters and buffers, for example 0.27. None: no
    gate, as the fixed part of a program is most of a small one."""
