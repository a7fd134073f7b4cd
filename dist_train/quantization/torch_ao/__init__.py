"""The quantization backends on torch.ao: FX graph mode and eager mode."""
