"""Names to things: "module:attr" strings that are imported only when used, so that names are known without importing torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from dist_train.errors import SetupError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What is registered under a name.

    Attributes:
        target: the thing itself, or "module:attr" for one that is imported when first used.
        settings: for a stage, the pydantic model of its section of the config, or "module:attr".
        requires: importable modules that it needs, with the pip requirement that brings each.
        weights: for a model with trained weights by name, a function of (model name, weights name) or "module:attr"; it
            checks them and returns what fetches the state_dict.
    """

    target: Any
    settings: Any = None
    requires: dict[str, str] = field(default_factory=dict)
    weights: Any = None

    def missing(self) -> list[str]:
        """The pip requirements that are not installed. Imports nothing."""
        return [pip for module, pip in self.requires.items() if importlib.util.find_spec(module) is None]


class Registry:
    """The names of one kind (models, datasets, ...), from us, from entry points and from `--import`ed modules."""

    def __init__(
        self, kind: str, group: str, builtin: dict[str, Entry], prefixes: dict[str, Entry] | None = None
    ) -> None:
        """`prefixes` are beginnings of names that another library knows, such as "timm/"; an own entry comes first."""
        self.kind = kind
        self._group = group
        self._entries = dict(builtin)
        self._prefixes = prefixes or {}
        self._entry_points_read = False

    def _read_entry_points(self) -> None:
        if not self._entry_points_read:
            self._entry_points_read = True
            for point in entry_points(group=self._group):
                self._entries.setdefault(point.name, Entry(point.value))

    def register(self, name: str, *, settings: Any = None) -> Callable[[T], T]:
        """Decorator: registers a function or class under `name`.

        Raises:
            SetupError: the name is taken by something else.
        """

        def decorate(target: T) -> T:
            self._read_entry_points()
            taken = self._entries.get(name)
            if taken is not None and not _same_place(taken.target, target):
                raise SetupError(
                    f"the {self.kind} name {name!r} is taken",
                    f"register it under another name: @register_{self.kind}(...)",
                )
            self._entries[name] = Entry(target, settings)
            return target

        return decorate

    def names(self) -> list[str]:
        self._read_entry_points()
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        self._read_entry_points()
        return name in self._entries or self._prefix(name) is not None

    def _prefix(self, name: str) -> Entry | None:
        matches = (entry for prefix, entry in self._prefixes.items() if name.startswith(prefix) and name != prefix)
        return next(matches, None)

    def entry(self, name: str) -> Entry:
        self._read_entry_points()
        found = self._entries.get(name) or self._prefix(name)
        if found is None:
            raise SetupError(f"unknown {self.kind} {name!r}", self.suggestion(name))
        return found

    def suggestion(self, name: str, also: Sequence[str] = ()) -> str:
        """What to type instead of an unknown name: the nearest names, else some of them, and how to add one.

        `also` are names that are valid beside the registered ones.
        """
        some = [*also, *self.names()]
        near = difflib.get_close_matches(name, some, n=3, cutoff=0.5)
        if near:
            return "did you mean " + " or ".join(near) + "?"
        shown = ", ".join(some[:12]) + (f", ... ({len(some)} in all)" if len(some) > 12 else "")
        return f"one of: {shown}; or bring your own with --import MODULE and @dist_train.register_{self.kind}"

    def get(self, name: str) -> Any:
        """The registered thing, imported if need be.

        Raises:
            SetupError: unknown name, or what it needs is not installed.
        """
        entry = self.entry(name)
        missing = entry.missing()
        if missing:
            raise SetupError(f"the {self.kind} {name!r} needs {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return resolve(entry.target)

    def settings(self, name: str) -> Any:
        """The pydantic model of the settings of `name`, or None where it has none."""
        if self.entry(name).settings is None and isinstance(self.entry(name).target, str):
            # An entry point names only the thing: importing it may register it again, with its settings' model.
            thing = resolve(self.entry(name).target)
            if self.entry(name).settings is None:
                return getattr(thing, "settings_model", None)
        settings = self.entry(name).settings
        return None if settings is None else resolve(settings)


def resolve(target: Any) -> Any:
    """Imports "module:attr"; returns anything else as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _same_place(known: Any, new: Any) -> bool:
    """A module that is imported twice (as __main__ and by name) may register the same thing again."""
    if isinstance(known, str):
        known_place = known.partition(":")[::2]
        return known_place == (new.__module__, new.__qualname__)
    return bool(known.__qualname__ == new.__qualname__)


# torchvision.models.list_models(module=torchvision.models) as of 0.29; a test holds them equal.
TORCHVISION_MODELS: tuple[str, ...] = [
    "alexnet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_16gf",
    "regnet_x_1_6gf",
    "regnet_x_32gf",
    "regnet_x_3_2gf",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_8gf",
    "regnet_y_128gf",
    "regnet_y_16gf",
    "regnet_y_1_6gf",
    "regnet_y_32gf",
    "regnet_y_3_2gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_8gf",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_b",
    "swin_s",
    "swin_t",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "wide_resnet50_2",
]  # type: ignore[assignment]

# torchvision.models.list_models(module=torchvision.models.segmentation) as of 0.29; a test holds them equal.
TORCHVISION_SEGMENTATION_MODELS: tuple[str, ...] = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet101",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)

_PT2E = {"torchao": "torchao"}

# torchvision.models.list_models(module=torchvision.models.quantization) as of 0.29; a test holds them equal.
TORCHVISION_QUANTIZABLE_MODELS: tuple[str, ...] = (
    "quantized_googlenet",
    "quantized_inception_v3",
    "quantized_mobilenet_v2",
    "quantized_mobilenet_v3_large",
    "quantized_resnet18",
    "quantized_resnet50",
    "quantized_resnext101_32x8d",
    "quantized_resnext101_64x4d",
    "quantized_shufflenet_v2_x0_5",
    "quantized_shufflenet_v2_x1_0",
    "quantized_shufflenet_v2_x1_5",
    "quantized_shufflenet_v2_x2_0",
)

models = Registry(
    "model",
    "dist_train.models",
    {
        name: Entry("dist_train.models.torchvision:build", weights="dist_train.models.torchvision:named_weights")
        for name in TORCHVISION_MODELS
    }
    | {
        name: Entry(
            "dist_train.models.torchvision:segmentation",
            weights="dist_train.models.torchvision:named_segmentation_weights",
        )
        for name in TORCHVISION_SEGMENTATION_MODELS
    }
    | {
        name: Entry("dist_train.models.quantizable:build", weights="dist_train.models.quantizable:float_weights")
        for name in TORCHVISION_QUANTIZABLE_MODELS
    }
    | {
        "small_resnet": Entry("dist_train.models.small:small_resnet"),
        "small_fcn": Entry("dist_train.models.small:small_fcn"),
        "mlp": Entry("dist_train.models.small:mlp"),
    },
    prefixes={
        "timm/": Entry(
            "dist_train.models.timm:build", requires={"timm": "timm"}, weights="dist_train.models.timm:named_weights"
        )
    },
)
datasets = Registry(
    "dataset",
    "dist_train.datasets",
    {
        "digits": Entry("dist_train.data.datasets:digits", requires={"sklearn": "scikit-learn"}),
        "mnist": Entry("dist_train.data.idx:mnist"),
        "fashion_mnist": Entry("dist_train.data.idx:fashion_mnist"),
        "cifar10": Entry("dist_train.data.cifar:cifar10"),
        "cifar100": Entry("dist_train.data.cifar:cifar100"),
        "image_folder": Entry("dist_train.data.image_folder:image_folder"),
        "fake": Entry("dist_train.data.datasets:fake"),
    },
)
tasks = Registry(
    "task",
    "dist_train.tasks",
    {
        "classification": Entry("dist_train.tasks.classification:Classification"),
        "multilabel": Entry("dist_train.tasks.multilabel:Multilabel"),
        "regression": Entry("dist_train.tasks.regression:Regression"),
        "segmentation": Entry("dist_train.tasks.segmentation:Segmentation"),
    },
)
strategies = Registry(
    "strategy",
    "dist_train.strategies",
    {
        "single": Entry("dist_train.strategies.single:Single"),
        "dp": Entry("dist_train.strategies.data_parallel:DP"),
        "ddp": Entry("dist_train.strategies.ddp:DDP"),
        "accelerate": Entry("dist_train.strategies.accelerate:Accelerate", requires={"accelerate": "accelerate"}),
    },
)
trackers = Registry(
    "tracker",
    "dist_train.trackers",
    {
        "jsonl": Entry("dist_train.trackers.jsonl:JsonLines"),
        "tensorboard": Entry("dist_train.trackers.tensorboard:TensorBoard", requires={"tensorboard": "tensorboard"}),
        "wandb": Entry("dist_train.trackers.wandb:Wandb", requires={"wandb": "wandb"}),
    },
)
quantization_backends = Registry(
    "quantization_backend",
    "dist_train.quantization_backends",
    {
        "pt2e": Entry("dist_train.quantization.pt2e:PT2EBackend", requires=_PT2E),
        "fx": Entry("dist_train.quantization.fx:FXBackend", requires=_PT2E),
        "eager": Entry("dist_train.quantization.eager:EagerBackend", requires=_PT2E),
    },
)
_ONNX = {"onnx": "onnx", "onnxscript": "onnxscript"}
export_formats = Registry(
    "export format",
    "dist_train.export_formats",
    {
        "onnx": Entry("dist_train.lowering.onnx:write", requires={**_ONNX, "onnxruntime": "onnxruntime"}),
        "openvino": Entry("dist_train.lowering.openvino:write", requires={**_ONNX, "openvino": "openvino"}),
        "executorch": Entry("dist_train.lowering.executorch:write", requires={"executorch": "executorch"}),
    },
)
stages = Registry(
    "stage",
    "dist_train.stages",
    {
        "train": Entry("dist_train.stages.train:Train", settings="dist_train.config_fit:TrainConfig"),
        "half": Entry("dist_train.stages.half:Half", settings="dist_train.config_fit:HalfConfig"),
        "ptq": Entry("dist_train.stages.ptq:PTQ", settings="dist_train.config_fit:PTQConfig"),
        "qat": Entry("dist_train.stages.qat:QAT", settings="dist_train.config_fit:QATConfig"),
        "convert": Entry("dist_train.stages.convert:Convert", settings="dist_train.config_fit:ConvertConfig"),
        "export": Entry("dist_train.stages.export:Export", settings="dist_train.config_fit:ExportConfig"),
    },
)

register_model = models.register
register_dataset = datasets.register
register_task = tasks.register
register_strategy = strategies.register
register_tracker = trackers.register
register_quantization_backend = quantization_backends.register
register_stage = stages.register
