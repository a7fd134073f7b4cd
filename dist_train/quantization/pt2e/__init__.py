"""The quantization backend on torchao's PT2E."""
