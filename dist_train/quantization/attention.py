"""Attention of torch.nn in single operations: torch computes it in one function, whose weights no quantizer finds.

A backend applies it to its own copy of the float model. Parameters, names and results stay the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def open_attention(model: nn.Module) -> None:
    """Gives torch's attention and transformer layers forwards of single operations, in place.

    Left as they are, with floating-point projections: subclasses, attention with `add_bias_kv` or `add_zero_attn`, and
    stacks of layers of the user's own.
    """
    for module in [module for module in model.modules() if _opens(module)]:
        module.__class__ = _OPENED[type(module)]  # as torch.nn.utils.parametrize does: names, hooks and sharing stay
        if isinstance(module, nn.MultiheadAttention):
            # Its subclass, which torch keeps from dynamic quantization, is none that quantizers know.
            module.out_proj.__class__ = nn.Linear  # type: ignore[assignment]


def _opens(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        extra = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
        if extra or type(module.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
            return False
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return type(module) in _OPENED and all(type(layer) in _OPENED for layer in module.layers)
    return type(module) in _OPENED


class OpenAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention without its fast path and without F.multi_head_attention_forward."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's. `is_causal` only says what `attn_mask` is, and is not needed."""
        q, k, v = (self._heads(each) for each in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            if dropout > 0:
                weights = F.dropout(weights, dropout)
            attended = weights @ v
            if average_attn_weights:
                weights = weights.mean(-3)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        attended = attended.transpose(-3, -2).flatten(-2)
        if self._sequence_first(attended):
            attended = attended.transpose(0, 1)
        return self.out_proj(attended), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Projects queries, keys and values; with one product for those that are one tensor."""
        size, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = zip((query, key, value), weights, _rows(bias, size), strict=True)
            return tuple(F.linear(each, weight, part) for each, weight, part in parts)
        if query is key and key is value:
            # Unpacked here, where torch.fx sees how many there are.
            q, k, v = F.linear(query, self.in_proj_weight, bias).unflatten(-1, (3, size)).unbind(-2)
            return q, k, v
        parts = zip((query, key, value), _rows(self.in_proj_weight, size), _rows(bias, size), strict=True)
        return tuple(F.linear(each, weight, part) for each, weight, part in parts)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, E], or in the module's own order, to [B, heads, L, E / heads]; without B where x has none."""
        if self._sequence_first(x):
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _sequence_first(self, x: Tensor) -> bool:
        # A proxy of torch.fx is taken for a batch, as a branch on its size would make all sizes numbers.
        return not self.batch_first and (isinstance(x, torch.fx.Proxy) or x.dim() > 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Adds the masks up to what is added to the scores; [L, S] or [B * heads, L, S], and [B, S] or [S]."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, q)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if q.dim() == 4 else attn_mask
        if padding is None:
            return attn_mask
        padding = _added(padding, q).unsqueeze(-2).unsqueeze(-2)
        return padding if attn_mask is None else attn_mask + padding


def _rows(stacked: Tensor | None, size: int) -> tuple[Any, Any, Any]:
    """Cuts the stacked weights, or biases, of queries, keys and values apart."""
    if stacked is None:
        return None, None, None
    return stacked[:size], stacked[size : 2 * size], stacked[2 * size :]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Turns a mask of bools, true where attention is forbidden, into what is added to scores."""
    if mask.dtype != torch.bool:
        return mask if mask.dtype == like.dtype else mask.to(like.dtype)
    # A traced dtype would be a constant, and torch 2.14 misreads a float32 mask beside float64 queries.
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


class OpenEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer without its fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer's."""
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(src + self._ff_block(src))


class OpenEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder without nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder's."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class OpenDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer, into which torch.fx looks as it is none of torch.nn."""


class OpenDecoder(nn.TransformerDecoder):
    """nn.TransformerDecoder without the search for causal masks."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoder's."""
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks)
        return tgt if self.norm is None else self.norm(tgt)


_OPENED: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: OpenAttention,
    nn.TransformerEncoderLayer: OpenEncoderLayer,
    nn.TransformerEncoder: OpenEncoder,
    nn.TransformerDecoderLayer: OpenDecoderLayer,
    nn.TransformerDecoder: OpenDecoder,
}
