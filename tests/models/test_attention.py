"""The attention of a GPU, around kernels that compute on the CPU."""

import itertools
import sys
import warnings

import pytest
import torch

from abkd_fast.config.models import ModelConfig
from abkd_fast.errors import ConfigError
from abkd_fast.models import attention, loading, sinks
from conftest import LLAMA

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def variable_length(q, k, v, cu, scale, window):
    """Causal attention [T, heads, dim] as a kernel computes it: equally many heads of queries and keys."""
    assert q.shape[1] == k.shape[1]
    outputs = []
    for start, end in itertools.pairwise(cu.tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window >= 0:
            seen = seen.triu(-window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
    return torch.cat(outputs)


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return variable_length(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, -1)


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    return variable_length(query, key, value, cu_seq_q, scale, window_size[0])


def of_torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


VERSIONS = {"2.10": of_torch_2_10, "2.11": of_torch_2_11, "2.12": of_torch_2_12}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("dim", "scaling"), [(8, None), (100, None), (16, 0.125)])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_every_versions_varlen_attn_computes_the_same(version, key_heads, dim, scaling, sliding_window):
    q, k, v = (
        torch.randn(1, heads, 14, dim, dtype=torch.float64, requires_grad=True) for heads in (4, key_heads, key_heads)
    )
    cu = torch.tensor([0, 9, 14], dtype=torch.int32)
    expected, _ = attention.packed_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=scaling,
        sliding_window=sliding_window,
        cu_seq_lens_q=cu,
        max_length_q=9,
    )
    attend = attention._with_varlen_attn(VERSIONS[version])
    scale, window = scaling or dim**-0.5, -1 if sliding_window is None else sliding_window - 1
    arguments = *(x[0].transpose(0, 1) for x in (q, k, v)), cu, 9, scale, window
    if window >= 0 and version == "2.10":
        with pytest.raises(RuntimeError, match=r"sliding window, which needs torch 2\.11 or flash-attn"):
            attend(*arguments, 0.0)
        return
    result = attend(*arguments, 0.0)[None]
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    with pytest.raises(RuntimeError, match="dropout, which needs flash-attn"):
        attend(*arguments, 0.1)


@pytest.fixture
def flash_attn(tmp_path, monkeypatch):
    """Installs a flash-attn with this source."""

    def install(source):
        (tmp_path / "flash_attn.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        monkeypatch.setattr(attention, "_kernel", None)

    yield install
    sys.modules.pop("flash_attn", None)


def test_flash_attn_is_used_where_it_works(flash_attn):
    flash_attn("def flash_attn_varlen_func(*_, **__): return 'its result'")
    assert attention.describe(CUDA) == attention.backend(CUDA) == "flash-attn"
    assert attention.supports_dropout(CUDA)
    assert attention.supports_windows(CUDA)
    assert attention.gpu_kernel().attend(*[None] * 8) == "its result"


def test_soft_caps_of_a_gpu_need_a_flash_attn_that_has_them(flash_attn):
    needs = frozenset({"softcap"})
    assert attention.missing(CPU, needs) is None
    flash_attn("def flash_attn_varlen_func(*settings, causal, window_size): return settings[3:], window_size")
    assert attention.missing(CUDA, needs) == "soft caps in its attention, which need flash-attn 2.6 or later on a GPU"
    flash_attn("def flash_attn_varlen_func(*_, softcap=0.0, **__): return softcap")
    assert attention.missing(CUDA, needs) is None
    assert [attention.gpu_kernel().attend(*[None] * 8, *caps) for caps in ((), (50.0,))] == [0.0, 50.0]
    assert "together" in attention.missing(CUDA, needs | {"sinks"})
    assert "wider than 256" in attention.missing(CUDA, frozenset({"wide heads"}))
    flash_attn("raise ImportError('no such GPU')")
    assert "flash-attn" in attention.missing(CUDA, needs)
    assert attention.missing(CUDA, frozenset({"sinks", "dropout"})) is None


@pytest.mark.parametrize("dims", [(12, 12, 7), (5, 5, 9), (8, 8, 8)])
def test_values_may_have_another_width_than_keys(dims):
    """A GPU's kernel sees one width for all, the caller that of the values."""
    q, k, v = (torch.randn(14, 4, dim, dtype=torch.float64, requires_grad=True) for dim in dims)
    cu, scale, seen = torch.tensor([0, 9, 14], dtype=torch.int32), 0.3, []

    def kernel(q, k, v):
        seen.extend(x.shape[-1] for x in (q, k, v))
        return variable_length(q, k, v, cu, scale, -1)

    result = attention._in_multiples_of_8(kernel, q, k, v)
    assert {*seen} == {-(-max(dims) // 8) * 8}
    assert result.is_contiguous()
    expected = variable_length(q, k, v, cu, scale, -1)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[9, 1, 4], [8], [4, 4], [1, 1, 1], [3, 30, 5]])
@pytest.mark.parametrize("chunk", [1, 4, 8, 100])
def test_boundaries_of_chunks_without_waiting_for_a_gpu(lengths, chunk):
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = attention.chunk_boundaries(cu, positions, chunk)
    assert found.dtype == torch.int32
    parts = [(start, end) for start, end in itertools.pairwise(found.tolist()) if start < end]
    assert parts == sinks.spans(cu, chunk)
    assert {end - start for start, end in parts} <= {*range(1, chunk + 1)}
    assert len(parts) == sum(-(-length // chunk) for length in lengths)


def test_broken_flash_attn_is_named_and_not_used(flash_attn):
    """It is often built for another torch: then it is there, and can't be imported."""
    flash_attn("raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda\\nmore lines')")
    assert attention.backend(CUDA) == "varlen_attn"
    text = "varlen_attn (flash-attn is installed, but its import fails: flash_attn_2_cuda.so: undefined symbol: "
    assert attention.describe(CUDA) == text + "_ZN3c104cuda)"
    assert attention.describe(CPU) == "sdpa loop"
    assert not attention.supports_dropout(CUDA)


def test_compiled_layers_find_their_kernel_without_a_warning(flash_attn):
    flash_attn("def flash_attn_varlen_func(*_, **__): return 'its result'")
    attention.gpu_kernel()  # the start-up check comes before anything is compiled
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(lambda x: x + len(attention.gpu_kernel().name), backend="eager", fullgraph=True)
        assert compiled(torch.zeros(())) == len("flash-attn")


def test_a_window_that_attention_lacks_is_refused_before_weights_load(monkeypatch):
    monkeypatch.setattr(attention, "supports_windows", lambda device: False)
    monkeypatch.setattr(loading.wrappers, "from_config", None)
    config = {**LLAMA, "model_type": "mistral", "sliding_window": 4}
    spec = ModelConfig(config=config)
    with pytest.raises(ConfigError, match=r"student: a mistral model .* needs torch 2\.11 or flash-attn"):
        loading.load(spec, loading.AutoConfig.for_model(**config), "student", torch.float32, CPU)
