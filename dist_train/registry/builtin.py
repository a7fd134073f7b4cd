"""The registries of dist_train, with their built-in entries."""

from __future__ import annotations

from dist_train.registry import torch_names, torchvision_names
from dist_train.registry.registry import Entry, Registry

models = Registry(
    "model",
    "dist_train.models",
    {
        name: Entry("dist_train.models.torchvision:build", weights="dist_train.models.torchvision:named_weights")
        for name in torchvision_names.CLASSIFICATION
    }
    | {
        name: Entry(
            "dist_train.models.torchvision:segmentation",
            weights="dist_train.models.torchvision:named_segmentation_weights",
        )
        for name in torchvision_names.SEGMENTATION
    }
    | {
        name: Entry("dist_train.models.quantizable:build", weights="dist_train.models.quantizable:float_weights")
        for name in torchvision_names.QUANTIZABLE
    }
    | {
        name: Entry("dist_train.models.detection:build", weights="dist_train.models.detection:named_weights")
        for name in torchvision_names.DETECTION
    }
    | {
        "small_resnet": Entry("dist_train.models.small:small_resnet"),
        "small_fcn": Entry("dist_train.models.small:small_fcn"),
        "small_ssd": Entry("dist_train.models.detection:small_ssd"),
        "mlp": Entry("dist_train.models.small:mlp"),
        "text_transformer": Entry("dist_train.models.text:text_transformer"),
    },
    prefixes={
        "timm/": Entry(
            "dist_train.models.timm:build", requires={"timm": "timm"}, weights="dist_train.models.timm:named_weights"
        ),
        "hf/": Entry(
            "dist_train.models.huggingface:build",
            requires={"transformers": "transformers"},
            extra="hf",
            weights="dist_train.models.huggingface:named_weights",
        ),
    },
)


datasets = Registry(
    "dataset",
    "dist_train.datasets",
    {
        "digits": Entry("dist_train.data.datasets.digits:digits", requires={"sklearn": "scikit-learn"}),
        "mnist": Entry("dist_train.data.datasets.mnist:mnist"),
        "fashion_mnist": Entry("dist_train.data.datasets.mnist:fashion_mnist"),
        "cifar10": Entry("dist_train.data.datasets.cifar:cifar10"),
        "cifar100": Entry("dist_train.data.datasets.cifar:cifar100"),
        "image_folder": Entry("dist_train.data.datasets.image_folder:image_folder"),
        "languages": Entry("dist_train.data.datasets.languages:languages"),
        "fake": Entry("dist_train.data.datasets.fake:fake"),
        "coco": Entry("dist_train.data.datasets.coco:coco"),
        "shapes": Entry("dist_train.data.datasets.shapes:shapes"),
    },
    prefixes={
        "hf/": Entry(
            "dist_train.data.datasets.huggingface:huggingface",
            requires={"datasets": "datasets", "transformers": "transformers"},
            extra="hf",
        )
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
        "detection": Entry("dist_train.tasks.detection:Detection"),
        "tokens": Entry("dist_train.tasks.tokens:Tokens"),
    },
)


strategies = Registry(
    "strategy",
    "dist_train.strategies",
    {
        "single": Entry("dist_train.strategies.single:Single"),
        "dp": Entry("dist_train.strategies.data_parallel:DP"),
        "ddp": Entry("dist_train.strategies.ddp:DDP"),
        "fsdp": Entry("dist_train.strategies.fsdp:FSDP"),
        "accelerate": Entry("dist_train.strategies.accelerate:Accelerate", requires={"accelerate": "accelerate"}),
        "ft": Entry("dist_train.strategies.ft:FT", requires={"torchft": "torchft"}, extra="ft"),
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
        "pt2e": Entry("dist_train.quantization.pt2e.backend:PT2EBackend", requires={"torchao": "torchao"}),
        "fx": Entry("dist_train.quantization.torch_ao.fx:FXBackend"),
        "eager": Entry("dist_train.quantization.torch_ao.eager:EagerBackend"),
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
        "train": Entry("dist_train.stages.train:Train", settings="dist_train.config.stages:TrainConfig"),
        "half": Entry("dist_train.stages.half:Half", settings="dist_train.config.stages:HalfConfig"),
        "ptq": Entry("dist_train.stages.ptq:PTQ", settings="dist_train.config.stages:PTQConfig"),
        "qat": Entry("dist_train.stages.qat:QAT", settings="dist_train.config.stages:QATConfig"),
        "convert": Entry("dist_train.stages.convert:Convert", settings="dist_train.config.stages:ConvertConfig"),
        "export": Entry("dist_train.stages.export:Export", settings="dist_train.config.stages:ExportConfig"),
    },
)


# Called with (params, lr=..., **args); torch's own classes are called alike.
optimizers = Registry(
    "optimizer",
    "dist_train.optimizers",
    {name: Entry(f"torch.optim:{kind}") for name, kind in torch_names.FUSED_OPTIMIZERS.items()}
    | {name: Entry(f"torch.optim:{name}") for name in torch_names.OPTIMIZERS},
)


# Called with (optimizer, total_steps, **args); torch's own classes with (optimizer, **args).
schedules = Registry(
    "schedule",
    "dist_train.schedules",
    {name: Entry(f"torch.optim.lr_scheduler:{kind}") for name, kind in torch_names.OWN_SCHEDULES.items()}
    | {name: Entry(f"torch.optim.lr_scheduler:{name}") for name in torch_names.SCHEDULES},
)


register_model = models.register


register_dataset = datasets.register


register_task = tasks.register


register_strategy = strategies.register


register_tracker = trackers.register


register_quantization_backend = quantization_backends.register


register_stage = stages.register


register_optimizer = optimizers.register


register_schedule = schedules.register
