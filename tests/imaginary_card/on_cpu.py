"""What CUDA operators compute that the CPU has not: in plain PyTorch, on CPU tensors."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import abkd_fast.losses.row_ops  # noqa: F401 - defines the operators

aten = torch.ops.aten


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(left.to(dtype) @ right.to(dtype))


def _addmm(start: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor, **factors: float) -> Tensor:
    return out.copy_(torch.addmm(start.to(dtype), left.to(dtype), right.to(dtype), **factors))


# ---- attention over packed rows [T, heads, dim]


def _weights(
    q: Tensor, k: Tensor, scale: float | None, causal: bool, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Weights [heads, queries, keys] of one sequence, and their log-sum-exp. The last query is at the last key.

    left, right: how many keys before and after its own a query sees; None or less than 0: all.
    """
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * (scale or q.shape[-1] ** -0.5)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool)
    ahead = len(k) - len(q)
    if causal:
        right = 0
    if right is not None and right >= 0:
        seen = seen.tril(ahead + right)
    if left is not None and left >= 0:
        seen = seen.triu(ahead - left)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0), scores.logsumexp(-1)


def _spans(cu_q: Tensor, cu_k: Tensor, seqused_k: Tensor | None) -> list[tuple[slice, slice]]:
    """Each sequence's queries and keys."""
    q, k = cu_q.tolist(), cu_k.tolist()
    used = [end - start for start, end in itertools.pairwise(k)] if seqused_k is None else seqused_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i] + used[i])) for i in range(len(q) - 1)]


def _packed_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool = False, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, seqused_k: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and log-sum-exp [heads, T]."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])
    for queries, keys in _spans(cu_q, cu_k, seqused_k):
        weights, lse[:, queries] = _weights(q[queries], k[keys], scale, causal, window_size_left, window_size_right)
        values = v[keys].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out, lse


def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **_: Any,
) -> list[Tensor]:  # fmt: skip
    group, factor = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for queries, rows in _spans(cu_q, cu_k, None):
        weights, _ = _weights(q[queries], k[rows], scale, causal, window_size_left, window_size_right)
        g, keys, values = grad[queries].float(), *(x[rows].float().repeat_interleave(group, 1) for x in (k, v))
        by_weights = torch.einsum("qhd,khd->hqk", g, values)
        by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * factor
        dq[queries] = torch.einsum("hqk,khd->qhd", by_scores, keys)
        dk[rows] = torch.einsum("hqk,qhd->khd", by_scores, q[queries].float()).unflatten(1, (-1, group)).sum(2)
        dv[rows] = torch.einsum("hqk,qhd->khd", weights, g).unflatten(1, (-1, group)).sum(2)
    return [gradient.to(x.dtype) for gradient, x in zip((dq, dk, dv), (q, k, v), strict=True)]


# ---- scaled_dot_product_attention on [B, heads, T, dim]


def _dense_weights(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ keys.mT * (scale or q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor]:
    values = v.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return ((_dense_weights(q, k, bias, causal, scale) @ values).to(q.dtype),)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor]:  # fmt: skip
    return _dense(q, k, v, None, causal, scale)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor]:  # fmt: skip
    return _dense(q, k, v, bias, causal, scale)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, seed: Tensor,
    offset: Tensor, dropout: float, need: list[bool], causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, g = _dense_weights(q, k, bias, causal, scale), grad.float()
    by_weights = g @ v.float().mT
    by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * (scale or q.shape[-1] ** -0.5)
    return (by_scores @ k.float()).to(q.dtype), (by_scores.mT @ q.float()).to(k.dtype), (weights.mT @ g).to(v.dtype)


ON_CPU: dict[Any, Callable] = {
    torch.ops.abkd_fast.scale_known_later_.default: torch.Tensor.mul_,
    aten.mm.dtype_out: _mm,
    aten.addmm.dtype_out: _addmm,
    aten._flash_attention_forward.default: _packed_forward,
    aten._flash_attention_backward.default: _packed_backward,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
