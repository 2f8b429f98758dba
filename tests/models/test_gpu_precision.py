"""What a GPU computes in which type."""

import collections
import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from abkd_fast.data.batches import pack
from abkd_fast.models import attention
from conftest import GPT2, LLAMA
from packed_models import build, samples


@pytest.mark.parametrize("is_cuda", [True, False])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
def test_the_projection_reaches_a_gpus_loss_as_the_trained_weight(config, is_cuda, monkeypatch):
    """The fused loss casts it itself, so that its gradient, added up in float32, is never rounded to 16 bits."""
    student = build(config, torch.float32).train()
    (batch,) = pack(samples([5, 17, 9]), max_tokens=64)
    heads, hidden_states = [], student.hidden_states

    def on_gpu(batch):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)  # after the layers, which run on the CPU
        return hidden_states(batch)

    monkeypatch.setattr(student, "hidden_states", on_gpu)
    monkeypatch.setattr(student, "_without_casts", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(batch, lambda head: heads.append(head) or (head.hidden @ head.weight.T).logsumexp(1).sum())
    loss.backward()
    (head,) = heads
    assert head.hidden.dtype == torch.bfloat16
    assert (head.weight is student.head.weight) == is_cuda
    assert head.weight.dtype == (torch.float32 if is_cuda else torch.bfloat16)
    assert student.head.weight.grad.dtype == torch.float32


class Casts(TorchDispatchMode):
    """Counts conversions between floating types, by the two types."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].dtype != kwargs.get("dtype", args[0].dtype):
            self.counts[args[0].dtype, kwargs["dtype"]] += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake CUDA tensors, autocast to bfloat16, and an attention that only has the right shape."""

    def attend(q, k, v, *_):
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
        return q + v[:, :1]

    monkeypatch.setattr(attention, "_kernel", attention.Kernel("fake", attend))
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of torch")
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
@torch.no_grad()
def test_a_teacher_of_16_bits_computes_without_autocasts_casts(config, fake_gpu):
    (batch,) = pack(samples([5, 17, 9]), max_tokens=64)
    counts = {}
    for dtype in (torch.bfloat16, torch.float32):
        with fake_gpu:
            with torch.device("cuda"):
                model = build(config, dtype)
            there = batch.to(torch.device("cuda"))
            with Casts() as casts:
                model.hidden_states(there)
        counts[dtype] = sum(casts.counts.values())
    norms = 2 * model.causal_lm.config.num_hidden_layers + 1
    # Llama's norms convert their input and their result themselves, and its rotary embeddings two tables.
    assert counts[torch.bfloat16] == (0 if config is GPT2 else 2 * norms + 2)
    assert counts[torch.float32] > counts[torch.bfloat16] + 2 * norms
