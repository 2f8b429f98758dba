"""Attention with sinks, by kernels that have none; and attention written out, for what no kernel here has.

A sink is one more score of each head in the softmax. It has no value. With the scores' logsumexp l and a sink s the
output is that without a sink times sigmoid(l - s). (Xiao et al., 2023; gpt-oss, 2025.)
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float, sinks: Tensor
) -> Tensor:
    """Causal attention with sinks within each sequence: [T, heads, dim]. Its gradients are exact.

    Args:
        q: [T, heads, dim]; on a GPU in 16 bits.
        k, v: [T, key heads, dim].
        cu: the start of each sequence, and T, in int32.
        longest: tokens of the longest sequence, which GPUs need.
        window: how many tokens before the current one are seen; -1: all.
        dropout: of the weights, on a GPU alone.
        sinks: [heads].
    """
    return _SinkAttention.apply(q, k, v, sinks, cu, longest, scale, window, dropout)


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cu: Tensor, *settings: Any) -> Tensor:
        attend = _forward_on_gpu if q.is_cuda else _forward_on_cpu
        out, lse, *random = attend(q, k, v, cu, *settings)  # lse: [heads, T]
        scores = sinks.to(lse.dtype)[:, None]
        out = (out * (lse - scores).sigmoid().T[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, cu, out, lse.logaddexp(scores), *random)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # With the sink in out and lse, the kernels' own formulas hold: P = exp(S - lse), dS = P (dP - rowsum(dO O)).
        q, k, v, sinks, cu, out, lse, *random = ctx.saved_tensors
        backward = _backward_on_gpu if q.is_cuda else _backward_on_cpu
        gradients = backward(gradient.contiguous(), q, k, v, out, lse, cu, *ctx.settings, *random)
        of_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.to(lse.dtype)[:, None] - lse).exp()  # of the sinks in the softmax
            products = (gradient.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
            of_sinks = -(share * products).sum(1).to(sinks.dtype)
        return *gradients, of_sinks, *[None] * (1 + len(ctx.settings))


def _forward_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float
) -> tuple[Tensor, ...]:
    # The operator below PyTorch's public `varlen_attn`, whose logsumexp has no part in its backward pass.
    options = {"scale": scale, "window_size_left": window, "window_size_right": 0}
    causal = window < 0
    out, lse, *random, _ = aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, dropout, causal, False, **options
    )
    return out, lse, *random


def _backward_on_gpu(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    scale: float,
    window: int,
    dropout: float,
    *random: Tensor,
) -> tuple[Tensor, ...]:
    options = {"scale": scale, "window_size_left": window, "window_size_right": 0}
    causal = window < 0
    return aten._flash_attention_backward(
        gradient, q, k, v, out, lse, cu, cu, longest, longest, dropout, causal, *random, **options
    )


def _forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float
) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    for start, end in spans(cu):
        mask = _scores_mask(end - start, window, q)
        rows = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, length, dim]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *rows, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        outputs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outputs), torch.cat(sums, 1)


def _backward_on_cpu(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    scale: float,
    window: int,
    dropout: float,
) -> tuple[Tensor, ...]:
    parts = []
    for start, end in spans(cu):
        mask = _scores_mask(end - start, window, q)
        rows = (x[start:end].transpose(0, 1)[None] for x in (gradient, q, k, v, out))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rows, lse[None, :, start:end], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        parts.append([x[0].transpose(0, 1) for x in gradients])
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def spans(cu: Tensor, chunk: int | None = None) -> list[tuple[int, int]]:
    """Start and end of each sequence, or of its chunks of so many tokens, on the host."""
    sequences = itertools.pairwise(cu.tolist())
    if chunk is None:
        return [*sequences]
    return [(first, min(first + chunk, end)) for start, end in sequences for first in range(start, end, chunk)]


def window_mask(length: int, window: int, device: torch.device) -> Tensor | None:
    """Which tokens each one sees [length, length], with `window` tokens before it; None if that is all of them."""
    if not 0 <= window < length - 1:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(-window)


def _scores_mask(length: int, window: int, q: Tensor) -> Tensor | None:
    seen = window_mask(length, window, q.device)
    return None if seen is None else q.new_zeros(length, length).masked_fill(~seen, -torch.inf)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by matrix products: [B, key heads, rows, dim]. Rows: the queries that share a key head.

    Args:
        q: [B, key heads, rows, dim].
        k, v: [B, key heads, S, dim].
        seen: which keys a row sees, in a shape that broadcasts to [B, key heads, rows, S]; None: all.
        softcap: scores z become softcap tanh(z / softcap).
        sinks: in a shape that broadcasts to [B, key heads, rows, 1].
    """
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[-2]].to(v.dtype)
    return F.dropout(weights, dropout) @ v


def one_sequence_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention by matrix products [1, heads, L, dim], for q in this shape, and k, v [1, key heads, L, dim]."""
    length, key_heads = q.shape[2], k.shape[1]
    seen = window_mask(length, window, q.device)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if seen is None else seen
    groups = q.shape[1] // key_heads
    rows = q.unflatten(1, (key_heads, groups)).flatten(2, 3)  # [1, key heads, groups times L, dim]
    if sinks is not None:
        sinks = sinks.view(key_heads, groups, 1).expand(-1, -1, length).flatten(1)[..., None]
    out = written_out(rows, k, v, seen.repeat(groups, 1), scale, softcap, sinks, dropout)
    return out.unflatten(2, (groups, length)).flatten(1, 2)
