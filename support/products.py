"""Products of half-precision matrices whose results are not rounded to half precision."""

from functools import cache

import torch
import torch.nn.functional as F


@cache
def fp32_results(device, dtype):
    """Has the device products of two matrices of `dtype` with the result in fp32? It is asked by
    trying: CUDA has them, a CPU has not."""
    if dtype == torch.float32:
        return False
    one = torch.ones(1, 8, 8, device=device, dtype=dtype)
    try:
        torch.mm(one[0], one[0], out_dtype=torch.float32)
        torch.bmm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):        # NotImplementedError is a RuntimeError
        return False
    return True


def scores_of(q, k):
    """q k^T (.., n, L) of q (.., n, D) and k (.., L, D): in fp32 where the device can, else in
    their dtype."""
    if not fp32_results(q.device, q.dtype):
        return q @ k.transpose(-1, -2)
    keys = k.flatten(0, -3).transpose(-1, -2)
    scores = torch.bmm(q.flatten(0, -3), keys, out_dtype=torch.float32)
    return scores.view(*q.shape[:-1], -1)


def logits_of(hidden, weight, product=F.linear):
    """h W^T (N, V) in fp32 of hidden (N, hidden) and weight (V, hidden): by fp32 results where the
    device can, else by `product`, in their dtype."""
    if fp32_results(hidden.device, hidden.dtype):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return product(hidden, weight).float()
