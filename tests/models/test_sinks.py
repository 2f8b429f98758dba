"""Attention with sinks and soft caps against sums written out in float64."""

import itertools
import types

import pytest
import torch
import torch._dynamo.testing

from abkd_fast.models import attention, sinks

CU = torch.tensor([0, 9, 10, 14], dtype=torch.int32)
LONGEST = 9


def scores_of(q, k, start, end, scale, window, softcap=None):
    """[heads, length, length] of one sequence; q, k: [T, heads, dim]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return scores.masked_fill(~(seen.triu(-window) if window >= 0 else seen), -torch.inf)


def oracle(q, k, v, scale, window, softcap=None, sink=None):
    """[T, heads, dim]; window: how many tokens before the current one are seen."""
    outputs = []
    for start, end in itertools.pairwise(CU.tolist()):
        scores = scores_of(q, k, start, end, scale, window, softcap)
        if sink is not None:
            scores = torch.cat([scores, sink[:, None, None].expand(-1, end - start, 1)], 2)
        weights = scores.softmax(2)[:, :, : end - start]
        values = v[start:end].repeat_interleave(q.shape[1] // v.shape[1], 1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def flash_attention(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
    """A GPU's operator, on a CPU: PyTorch gives output, logsumexp [heads, T], two states of random numbers, a mask."""
    assert cu_q is cu_k
    assert max_q == max_k == LONGEST
    assert not debug
    window = options["window_size_left"]
    assert causal == (window < 0)
    assert options["window_size_right"] == 0
    spans = [*itertools.pairwise(cu_q.tolist())]
    sums = [scores_of(q, k, *span, options["scale"], window).logsumexp(2) for span in spans]
    return oracle(q, k, v, options["scale"], window), torch.cat(sums, 1), *torch.zeros(3)


def flash_attention_backward(
    gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale, **options
):
    """The formulas of the operator: nothing but `out` and `lse` tells it what the forward pass did."""
    window, groups = options["window_size_left"], q.shape[1] // k.shape[1]
    parts = []
    for start, end in itertools.pairwise(cu_q.tolist()):
        part = slice(start, end)
        keys, values = (x[part].repeat_interleave(groups, 1) for x in (k, v))
        weights = (scores_of(q, k, start, end, scale, window) - lse[:, part, None]).exp()
        products = torch.einsum("qhd,khd->hqk", gradient[part], values)
        rows = (gradient[part] * out[part]).sum(2).T[..., None]
        of_scores = weights * (products - rows) * scale
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, q[part])
        of_values = torch.einsum("hqk,qhd->khd", weights, gradient[part])
        of_keys, of_values = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_keys, of_values))
        parts.append([torch.einsum("hqk,khd->qhd", of_scores, keys), of_keys, of_values])
    return tuple(map(torch.cat, zip(*parts, strict=True)))


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """Attention on a CPU, and that of a GPU around operators that compute on the CPU."""
    if request.param == "gpu":
        operators = {
            "_flash_attention_forward": flash_attention,
            "_flash_attention_backward": flash_attention_backward,
        }
        monkeypatch.setattr(sinks, "aten", types.SimpleNamespace(**operators))
        monkeypatch.setattr(sinks, "_forward_on_cpu", sinks._forward_on_gpu)
        monkeypatch.setattr(sinks, "_backward_on_cpu", sinks._backward_on_gpu)


def tensors(key_heads=2, value_dim=8):
    torch.manual_seed(0)
    shapes = (14, 4, 8), (14, key_heads, 8), (14, key_heads, value_dim), (4,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def packed(q, k, v, sliding_window=None, **options):
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    places = {"cu_seq_lens_q": CU, "max_length_q": LONGEST, "sliding_window": sliding_window}
    out, _ = attention.packed_attention(None, *rows, None, **places, **options)
    assert out.is_contiguous()
    return out[0]


def assert_same(result, expected, inputs):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_sinks(device, key_heads, sliding_window, value_dim):
    q, k, v, sink = tensors(key_heads, value_dim)
    result = packed(q, k, v, sliding_window, s_aux=sink, scaling=0.3)
    assert_same(result, oracle(q, k, v, 0.3, (sliding_window or 0) - 1, sink=sink), (q, k, v, sink))


def test_gradients_of_sinks_are_those_of_small_differences():
    inputs = [x[:, :1] if x.dim() == 3 else x[:1] for x in tensors()]
    assert torch.autograd.gradcheck(lambda q, k, v, sink: packed(q, k, v, 3, s_aux=sink), inputs, fast_mode=True)


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_soft_caps(key_heads, sliding_window, has_sinks):
    q, k, v, sink = tensors(key_heads)
    sink = sink if has_sinks else None
    result = packed(q, k, v, sliding_window, s_aux=sink, softcap=1.5)
    expected = oracle(q, k, v, 8**-0.5, (sliding_window or 0) - 1, 1.5, sink)
    assert_same(result, expected, [x for x in (q, k, v, sink) if x is not None])


def test_dropout_of_weights_with_sinks():
    q, k, v, sink = tensors()
    v = torch.ones_like(v)
    out = torch.stack([packed(q, k, v, s_aux=sink, dropout=0.25).detach() for _ in range(150)])
    expected = oracle(q, k, v, 8**-0.5, -1, sink=sink)
    assert out.std(0).min() > 0.01
    torch.testing.assert_close(out.mean(0), expected, rtol=0, atol=0.15)


def test_the_operators_of_gpus_take_these_arguments():
    """PyTorch's own description of their results: no numbers, but the signatures and shapes."""
    q, k, v = (torch.empty(14, heads, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    settings = LONGEST, 0.3, 3, 0.0
    out, lse, *random = sinks._forward_on_gpu(q, k, v, CU.to("meta"), *settings)
    assert (out.shape, lse.shape, lse.dtype, len(random)) == (q.shape, (4, 14), torch.float32, 2)
    gradients = sinks._backward_on_gpu(out, q, k, v, out, lse, CU.to("meta"), *settings, *random)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_sinks_on_a_gpu(sliding_window, value_dim):
    q, k, v, sink = tensors(value_dim=value_dim)
    options = {"cu_seq_lens_q": CU.cuda(), "max_length_q": LONGEST, "sliding_window": sliding_window}
    rows = [x.transpose(0, 1)[None].to("cuda", torch.bfloat16) for x in (q, k, v)]
    out, _ = attention.packed_attention(None, *rows, None, s_aux=sink.cuda(), **options)
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    expected = oracle(q, k, v, 8**-0.5, (sliding_window or 0) - 1, sink=sink)
    torch.testing.assert_close(out[0].cpu().double(), expected, rtol=0, atol=0.02)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(out, sink, upstream.to("cuda", torch.bfloat16)[None])
    torch.testing.assert_close(*ours, *torch.autograd.grad(expected, sink, upstream), rtol=0, atol=0.1)


def test_compiled_layers_have_one_piece_of_code_with_sinks(monkeypatch):
    """As on a GPU, whose operators do not break the graph."""

    def forward(q, k, v, *_):
        lse = torch.einsum("qhd,khd->hqk", q, k).logsumexp(2)
        return q + v, lse, *torch.zeros(2)

    monkeypatch.setattr(sinks, "_forward_on_cpu", forward)
    monkeypatch.setattr(sinks, "_backward_on_cpu", lambda gradient, q, k, v, *_: (gradient, k * 2, v * 3))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    for length in (14, 11):
        inputs = [x[:length] for x in tensors(key_heads=4)]
        *rows, sink = inputs
        for ours, theirs in zip(
            *(torch.autograd.grad(f(*rows, s_aux=sink).sum(), inputs) for f in (compiled, packed)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
