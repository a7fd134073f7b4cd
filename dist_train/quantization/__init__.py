"""Quantization: fake quantization with delayed ranges, and the backends that place and convert it."""

import logging

# Importing torchao 0.18 logs a deprecation of its own through torch, which is of no use to users.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
