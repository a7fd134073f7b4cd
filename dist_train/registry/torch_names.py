"""Names in torch.optim, known without importing torch; tests compare them with torch's own lists."""

_REWARM = "schedule.warmup comes before any schedule"

OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
# Settings of their own, and torch's fused kernels.
FUSED_OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
REFUSED_OPTIMIZERS = {
    "LBFGS": ("runs forward and backward several times a step, on batches that the loop does not have", "adamw"),
    "SparseAdam": ("takes sparse gradients alone, which are not averaged over ranks", "adam, with sparse=False"),
}

SCHEDULES = (
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "StepLR",
)
# Settings of their own: `final`, `step_epochs`, `gamma`.
OWN_SCHEDULES = {"constant": "ConstantLR", "step": "StepLR", "cosine": "CosineAnnealingLR", "linear": "LinearLR"}
_FUNCTION = ("takes a Python function, which a config cannot hold", "@dist_train.register_schedule")
REFUSED_SCHEDULES = {
    "LambdaLR": _FUNCTION,
    "MultiplicativeLR": _FUNCTION,
    "SequentialLR": (f"takes schedules; {_REWARM}", "schedule.warmup, or @dist_train.register_schedule"),
    "ChainedScheduler": (f"takes schedules; {_REWARM}", "schedule.warmup, or @dist_train.register_schedule"),
}
