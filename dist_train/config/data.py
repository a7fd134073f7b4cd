"""The sections `data`, `model` and `task`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dist_train import registry
from dist_train.config.base import MAY_CHANGE_ON_RESUME, Count, Fraction, Pixels, Registered, Settings


class RandomCrop(Settings):
    name: Literal["random_crop"] = "random_crop"
    padding: Pixels = 4
    """Zero pixels added on each side before a window of the original size is cut out."""


class RandomHorizontalFlip(Settings):
    name: Literal["random_horizontal_flip"] = "random_horizontal_flip"
    p: Fraction = 0.5


class ColorJitter(Settings):
    name: Literal["color_jitter"] = "color_jitter"
    brightness: Annotated[float, Field(ge=0, le=100)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=100)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=100)] = 0.0


class RandomErasing(Settings):
    """Zhong et al. 2020, arXiv:1708.04896. The erased rectangle gets the mean of the data."""

    name: Literal["random_erasing"] = "random_erasing"
    p: Fraction = 0.25
    scale: tuple[Fraction, Fraction] = (0.02, 0.33)
    """Least and largest share of the image's area."""
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.3, 3.3)
    """Least and largest ratio of height to width."""


class RandomResizedCrop(Settings):
    """For image_folder, coco and shapes, whose workers apply it to each image."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Least and largest share of the image's area."""
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.75, 4 / 3)
    """Least and largest ratio of width to height."""


class RandAugment(Settings):
    """Cubuk et al. 2020, arXiv:1909.13719. For image_folder only; its workers apply it."""

    name: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(gt=0, le=100)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


AugmentConfig = Annotated[
    RandomCrop | RandomHorizontalFlip | ColorJitter | RandomErasing | RandomResizedCrop | RandAugment,
    Field(discriminator="name"),
]


class MixConfig(Settings):
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and cutmix (Yun et al. 2019, arXiv:1905.04899).

    Partners come from the global batch.
    """

    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup's Beta(alpha, alpha); 0: no mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of cutmix's Beta(alpha, alpha); 0: no cutmix. With both, each step draws one of the two."""
    p: Fraction = 1.0
    """Probability that a step is mixed at all."""


CLASS_BALANCED = "class_balanced"


class SamplingConfig(Settings):
    """Draws training rows by weight, where otherwise each is taken once an epoch."""

    weights: str
    """class_balanced: each class is drawn as often as the others. A file (a path has a dot or a slash): one number for
    each row of the training set, .npy, .csv or .txt. Else the name of an attribute or a method of the training dataset
    that gives them. They need not add up to 1."""
    replacement: bool = True
    """Draw with replacement: a row may come several times in an epoch. false: at most once, the heavier ones earlier;
    then `samples` says how many of the rows."""
    samples: Count | None = None
    """Rows of an epoch; None: as many as the training set has, or without replacement those with a weight above 0."""


class SplitConfig(Settings):
    """Divides the training set into one part to train and one to evaluate on, by the seed.

    An evaluation set that the dataset has is not used then.
    """

    eval: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the rows that becomes the evaluation set. Give this or `folds`."""
    folds: Annotated[int | None, Field(ge=2, lt=2**31)] = None
    """Number of parts for cross-validation: the part `fold` becomes the evaluation set, the others the training set.
    Each fold is a run of its own."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Number of the part to evaluate on, from 0."""
    by: Literal["row", "class", "group"] = "row"
    """row: rows are drawn. class: each class has its share in both parts. group: rows with equal entries in the
    dataset's attribute `groups`, such as patients, stay together."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the draw; apart from `run.seed`, so that runs with other seeds can share their parts."""


class DataConfig(Settings):
    name: Annotated[str, Registered(registry.datasets)] = "digits"
    """Name of a registered dataset, or hf/NAME_OR_FOLDER."""
    args: dict[str, Any] = {}
    """Arguments of the dataset's function."""
    root: Annotated[Path | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Folder of the dataset's files, if it has any."""
    cache_dir: Annotated[Path | None, Field(json_schema_extra=MAY_CHANGE_ON_RESUME)] = None
    """Node-local folder of memory-mapped arrays and packed images; default: dist_train in the user's cache folder."""
    global_batch_size: Count = 64
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """Most samples of one forward on one rank; more are accumulated. None: a rank's whole share."""
    eval_batch_size: Count = 256
    """Samples of one forward in evaluation on each rank."""
    drop_last: bool = False
    """Leave out the last, partial global batch of an epoch."""
    sampling: SamplingConfig | None = None
    """Draw the rows of an epoch by weight. None: each row once."""
    split: SplitConfig | None = None
    """Make the evaluation set of rows of the training set."""
    augment: list[AugmentConfig] = []
    """Augmentation of uint8 images, in order; normalization always follows. For image_folder, the workers apply the
    first entries that are random_resized_crop, random_horizontal_flip or rand_augment; for coco and shapes the first
    two of these, which move the boxes."""
    mix: MixConfig = MixConfig()
    """Mixup and cutmix in `train`; never in `qat`."""
    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | Literal["auto"], Field(json_schema_extra=MAY_CHANGE_ON_RESUME)
    ] = "auto"
    """Worker processes of each rank for map-style datasets; image arrays need none. auto: the node's cores divided
    among its ranks."""
    on_corrupt: Literal["error", "skip"] = "error"
    """Handling of an image that cannot be decoded (a map-style dataset raises CorruptSampleError). error: end the run
    with the file's name; skip: leave the image out, count and report it."""


class ModelConfig(Settings):
    name: Annotated[str, Registered(registry.models)] = "small_resnet"
    """Name of a registered model, of a classification, segmentation or detection model of torchvision, timm/NAME, or
    hf/NAME_OR_FOLDER."""
    args: dict[str, Any] = {}
    """Arguments of the model's function. The data give num_classes (the width of the outputs) and in_channels, if the
    function takes them."""
    weights: str | None = None
    """Trained weights to start from: a name of torchvision's (DEFAULT, IMAGENET1K_V1) or timm's (pretrained), or a file
    (.safetensors, .pt, .pth, .ckpt). Models hf/... start from their own, unless this is random. A head of another width
    is initialised anew; the first convolution is adapted to the images' channels."""
    weights_key: str | None = None
    """Name of the state_dict in the file of `weights`, dotted if nested, or a prefix of its tensors' names
    (teacher.backbone). None: the only one; of a model and its moving average (model, model_ema) the average."""
    init_from: Path | None = None
    """Run directory of another run: start from its trained float model. A run that was stopped in `train` gives the
    weights of its newest checkpoint."""
    channels_last: bool = False
    """Keep 4-dimensional weights and inputs in channels_last memory format."""


class TaskConfig(Settings):
    name: Annotated[str, Registered(registry.tasks)] = "classification"
    args: dict[str, Any] = {}
    """Arguments of the task. classification: label_smoothing, class_weights (a number for each class, or balanced),
    focal_gamma; multilabel: pos_weight; regression: loss (mse, l1, huber), tolerance; segmentation: ignore_index;
    tokens: ignore_index, max_length; detection: score, most."""


def is_weights_file(weights: str) -> bool:
    """Tells whether `model.weights` is a file: it has a dot or a slash. Names of weights have neither."""
    return "." in weights or "/" in weights
