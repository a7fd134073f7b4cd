"""A model as bytes: torch.export programs and TorchScript."""
