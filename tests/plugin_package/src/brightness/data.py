"""A dataset."""

import torch

import dist_train


@dist_train.register_dataset("brightness")
def brightness(data: dist_train.DataConfig) -> dist_train.Splits:
    """Noisy gray images, uint8 [N, 1, 8, 8], with their level in -1..1, float32 [N]."""
    rows = data.args.get("rows", 120)
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(rows, generator=generator) * 2 - 1
    noise = torch.randn(rows, 1, 8, 8, generator=generator) * 16
    images = (levels.view(-1, 1, 1, 1) * 100 + 128 + noise).clamp(0, 255).to(torch.uint8)
    train, test = (dist_train.ImageArrays(images[part], levels[part]) for part in (slice(20, None), slice(20)))
    return dist_train.Splits(train, test, num_outputs=1, mean=(0.5,), std=(0.25,))
