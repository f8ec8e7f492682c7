"""Frozen weights in four bits (NF4 of QLoRA, arXiv 2305.14314), for --nf4."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.compiled import one_kernel
from support.registry import FORMATS


# Quantiles of a normal distribution scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_VALUES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
              -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
              0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
              0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def byte_values():
    """(256, 2): the two NF4 values that each byte stands for."""
    values = torch.tensor(NF4_VALUES)
    return torch.cartesian_prod(values, values)


def scale_values():
    """The 256 sorted values that code scales (the dynamic data type of arXiv 1511.04561, as
    bitsandbytes has it): 0, 1 and +-10^-i times the middles of 2^(6-i) equal parts of [0.1, 1]."""
    parts = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        parts.append(middles * 10.0 ** (i - 6))
    positive = torch.cat(parts)
    return torch.cat((-positive, positive, torch.tensor([0.0, 1.0]))).sort().values


def nearest(x, values):
    """Index of the nearest of the sorted `values`; the lower one of two that are equally near."""
    middles = (values[:-1] + values[1:]) / 2
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def in_blocks(x, size):
    """A tensor's numbers as rows of `size`, the last filled up with zeros."""
    flat = x.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def dequantised(codes, scales, outer, tables, dtype):
    """The weights (blocks, 64) of codes (blocks, 32) and scale codes (blocks,), both uint8; outer
    (groups + 1,) holds the scales' scales and their mean, tables (768,) the values of codes, pair
    by pair, and of scale codes."""
    pairs = tables[:512].view(256, 2)
    shared = outer[:-1].repeat_interleave(256)[:len(scales)]
    scale = tables[512:][scales.int()] * shared + outer[-1]                    # (blocks,)
    values = F.embedding(codes.int(), pairs).flatten(1)                        # (blocks, 64)
    return (values * scale[:, None]).to(dtype)


class NF4(nn.Module):
    """A frozen linear layer with 4.127 bits a weight and its bias in full: NF4 with double
    quantisation (QLoRA), equal to bitsandbytes'. Each 64 values in a row share a scale, their
    largest magnitude; the scales less their mean are coded in 8 bits that share a scale in their
    turn for each 256."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.shape = weight.shape
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        pairs = byte_values().to(weight.device)
        dynamic = scale_values().to(weight.device)
        # The values over their block's scale, in 4 bits.
        blocks = in_blocks(weight.detach().float(), 64)                        # (blocks, 64)
        largest = blocks.abs().amax(1)                                         # (blocks,)
        scaled = blocks * (1 / largest.clamp_min(1e-30))[:, None]
        codes = nearest(scaled, blocks.new_tensor(NF4_VALUES))
        # The scales less their mean, in 8 bits.
        mean = largest.mean()
        scales = in_blocks(largest - mean, 256)                                # (groups, 256)
        outer = scales.abs().amax(1).clamp_min(1e-30)                          # (groups,)
        scale_codes = nearest(scales / outer[:, None], dynamic).flatten()[:len(largest)]
        # The first of two values lies in the upper half of a byte. fp32 is kept as its bits:
        # model.to(bfloat16) would round it.
        packed = codes[:, ::2] << 4 | codes[:, 1::2]                           # (blocks, 32)
        tables = torch.cat((pairs.flatten(), dynamic)).view(torch.int32)       # (768,)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", scale_codes)
        self.register_buffer("outer", torch.cat((outer, mean[None])).view(torch.int32))
        self.register_buffer("tables", tables, persistent=False)

    quantised = True             # for LoRA, the engine and saving: a layer, and no tensor
    device = property(lambda self: self.codes.device)
    weight = property(lambda self: self)  # what LoRA takes over from a linear layer

    def dense(self, dtype=torch.float32):
        """The weight (out, in), computed in fp32 and rounded to `dtype`. On a GPU with Triton it is
        one kernel, which moves the codes and the result: 2.5 bytes a weight in bf16."""
        make = one_kernel(dequantised, self.codes.device)
        blocks = make(self.codes, self.scales, self.outer.view(torch.float32),
                      self.tables.view(torch.float32), dtype)
        return blocks.flatten()[:math.prod(self.shape)].view(self.shape)

    def product(self, x):
        return F.linear(x, self.dense(x.dtype), self.bias)

    def forward(self, x):
        """x W^T + b; W is made dense again in the backward pass: kept, it would undo what NF4
        saves."""
        if not torch.is_grad_enabled():
            return self.product(x)
        return checkpoint(self.product, x, use_reentrant=False, preserve_rng_state=False)


def quantise(model, device=None):
    """The blocks' linear layers as NF4, in place, one by one on `device`; all else keeps its dtype.
    Returns the model, on `device`."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, NF4(layer.weight.to(device), layer.bias))
    return model.to(device)


FORMATS.add("nf4", "four bits a weight (arXiv 2305.14314)")(quantise)
