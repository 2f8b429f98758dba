import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from abkd_fast.config.models import LoraConfig, ModelConfig
from abkd_fast.errors import ConfigError
from abkd_fast.generation import decoder
from abkd_fast.generation.sampling import SamplingParams, _draw, _Sequence, response_seeds, sample, sample_mixture
from abkd_fast.models import lora
from abkd_fast.models.packed import PackedCausalLM
from conftest import GPT2, LLAMA

MODELS = {
    "gpt2": GPT2,
    "llama-gqa": LLAMA,
    "mistral-window": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "use_sliding_window": False},
    "opt": {"model_type": "opt", "vocab_size": 211, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
}  # fmt: skip


def build(config, dtype=torch.float64, seed=0, scale=4.0, **changes):
    """A model whose next tokens are far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"eos_token_id": None, "bos_token_id": None, **config, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def prompts_of(*lengths, vocab=211):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def generated(model, prompt, **settings):
    """transformers' greedy response."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)
    return out[0, len(prompt) :].tolist()


PROMPTS = prompts_of(5, 17, 2, 9, 31, 1, 12, 3)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate(name):
    model = build(MODELS[name])
    for changes in ({}, {"no_repeat_ngram_size": 2}):
        expected = [generated(model, prompt, max_new_tokens=12, **changes) for prompt in PROMPTS]
        settings = SamplingParams(max_new_tokens=12, temperature=0, **changes)
        assert sample(model, PROMPTS, settings, [0] * len(PROMPTS), batch_size=3) == expected


def test_ends_equal_generate():
    model = build(GPT2)
    free = [generated(model, prompt, max_new_tokens=20) for prompt in PROMPTS]
    ends = (free[0][4], free[1][0], free[2][19])
    expected = [generated(model, prompt, max_new_tokens=20, eos_token_id=list(ends)) for prompt in PROMPTS]
    settings = SamplingParams(max_new_tokens=20, temperature=0, eos_token_ids=ends)
    responses = sample(model, PROMPTS, settings, [0] * len(PROMPTS), batch_size=3)
    assert responses == expected
    assert responses[1] == [ends[1]], "the end token is included"
    expected = [
        generated(model, prompt, max_new_tokens=20, min_new_tokens=6, eos_token_id=list(ends)) for prompt in PROMPTS
    ]
    settings = SamplingParams(max_new_tokens=20, min_new_tokens=6, temperature=0, eos_token_ids=ends)
    assert sample(model, PROMPTS, settings, [0] * len(PROMPTS), batch_size=3) == expected
    assert min(map(len, expected)) >= 6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("config", [GPT2, {**LLAMA, "intermediate_size": 64}], ids=["gpt2", "llama-gqa"])
def test_company_does_not_change_a_bit(config):
    # A width of 48 would not do: PyTorch's loops end in scalar code, which rounds differently, where no 32 are left.
    student, teacher = build(config, torch.float32), build(config, torch.float32, seed=1)
    settings = SamplingParams(max_new_tokens=15, no_repeat_ngram_size=3)
    seeds = [7 * index for index in range(len(PROMPTS))]

    def run(order, batch_size):
        chosen = [PROMPTS[i] for i in order], settings, [seeds[i] for i in order], batch_size
        return dict(zip(order, sample_mixture(student, teacher, 0.2, *chosen), strict=True))

    everyone = range(len(PROMPTS))
    expected = run(everyone, 1)  # tokens, and their log-probabilities to the last bit
    assert len({tuple(tokens) for tokens, *_ in expected.values()}) == len(PROMPTS)
    for batch_size in (3, 8):
        assert run(everyone, batch_size) == expected
    assert run([6, 2, 5, 0], 3) == {index: expected[index] for index in (6, 2, 5, 0)}


def test_seeds_and_prompts_decide():
    model = build(GPT2, scale=1.0)
    settings = SamplingParams(max_new_tokens=10)
    responses = sample(model, [PROMPTS[0]] * 4 + [PROMPTS[1]], settings, [1, 2, 1, -(2**63) + 5, 1])
    assert responses[0] == responses[2]
    assert len({tuple(response) for response in responses}) == 4
    assert sample(model, [], settings, []) == []


def chi_square_is_likely(counts, probabilities):
    """Whether draws may come from this distribution: the statistic is within five deviations of its mean."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    rare = expected < 5  # pooled
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [2, 50, 211])
def test_draws_follow_the_probabilities(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    probabilities = (3 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)).softmax(0)
    probabilities[vocabulary // 2] = 0
    probabilities /= probabilities.sum()
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for step in range(5):
        seeds = torch.arange(20_000)
        counts += _draw(probabilities.expand(20_000, -1), seeds, torch.full_like(seeds, step)).bincount(
            minlength=vocabulary
        )
    assert chi_square_is_likely(counts, probabilities)
    flat = torch.full_like(probabilities, 1 / vocabulary)
    assert not chi_square_is_likely(counts, flat)


WARPERS = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 4}, [TopKLogitsWarper(4)]),
    "top-p": ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
    "all": (
        {"temperature": 1.5, "top_k": 7, "top_p": 0.8},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(7), TopPLogitsWarper(0.8)],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_pairs_of_tokens_follow_the_model(name):
    changes, warpers = WARPERS[name]
    vocabulary, draws = 11, 2000
    model = build(GPT2, torch.float32, vocab_size=vocabulary, scale=6.0)
    prompt = [3, 1, 4]
    settings = SamplingParams(max_new_tokens=2, **changes)
    pairs = torch.tensor(sample(model, [prompt] * draws, settings, list(range(draws)), batch_size=draws))
    counts = (pairs[:, 0] * vocabulary + pairs[:, 1]).bincount(minlength=vocabulary**2).double()
    ids = torch.cat([torch.tensor([prompt] * vocabulary), torch.arange(vocabulary)[:, None]], 1)
    with torch.no_grad():
        logits = model(ids).logits.double()
    processors = LogitsProcessorList(warpers)
    first = processors(ids[:1], logits[:1, 2].clone()).softmax(1)  # [1, V]
    second = processors(ids, logits[:, 3].clone()).softmax(1)  # [V, V]
    assert chi_square_is_likely(counts, (first.T * second).flatten())


def test_mixture_draws_from_both_and_reports_both():
    vocabulary, draws, weight = 11, 2000, 0.3
    # The teacher's vocabulary is padded.
    student = build(GPT2, vocab_size=vocabulary, scale=6.0)
    teacher = build(LLAMA, vocab_size=vocabulary + 5, scale=6.0, seed=3)
    prompt = [3, 1, 4]
    run = sample_mixture(
        student, teacher, weight, [prompt] * draws, SamplingParams(max_new_tokens=1), list(range(draws)), draws
    )
    with torch.no_grad():
        ours = student(torch.tensor([prompt])).logits[0, -1].log_softmax(0)
        theirs = teacher(torch.tensor([prompt])).logits[0, -1, :vocabulary].log_softmax(0)
    counts = torch.tensor([tokens[0] for tokens, *_ in run]).bincount(minlength=vocabulary).double()
    assert chi_square_is_likely(counts, (1 - weight) * ours.exp() + weight * theirs.exp())
    assert not chi_square_is_likely(counts, ours.exp())
    longer = sample_mixture(student, teacher, weight, [prompt], SamplingParams(max_new_tokens=9), [5])
    ((tokens, *both),) = longer
    for model, log_probs in zip((student, teacher), both, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([prompt + tokens])).logits[0, 2:-1, :vocabulary].log_softmax(1)
        expected = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probs, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12)
    settings = SamplingParams(max_new_tokens=9)
    ((tokens, *_),) = sample_mixture(student, teacher, 0.0, [prompt], settings, [5])
    assert tokens == sample(student, [prompt], settings, [5])[0]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_bans_equal_transformers(size):
    generator = torch.Generator().manual_seed(size)
    processor = NoRepeatNGramLogitsProcessor(size)
    for length in range(12):
        prompt = torch.randint(3, (length,), generator=generator).tolist()
        sequence = _Sequence(0, prompt, 0, 99, size)
        for token in torch.randint(3, (20,), generator=generator).tolist():
            scores = processor(torch.tensor([sequence.tokens], dtype=torch.long), torch.zeros(1, 3))
            assert set(sequence.banned()) == set(scores[0].isinf().nonzero()[:, 0].tolist())
            sequence.append(token)


def test_batch_is_refilled_and_responses_are_told_once(monkeypatch):
    sizes, told = [], {}
    decode = decoder.Decoder.decode

    def counted(self, sequences):
        sizes.append(len(sequences))
        return decode(self, sequences)

    monkeypatch.setattr(decoder.Decoder, "decode", counted)
    model = build(GPT2, torch.float32, scale=1.0)
    settings = SamplingParams(max_new_tokens=40, eos_token_ids=tuple(range(0, 211, 10)))
    prompts = prompts_of(*range(1, 31))

    def tell(index, response):
        assert index not in told
        told[index] = response

    responses = sample(model, prompts, settings, list(range(30)), batch_size=4, on_response=tell)
    assert told == dict(enumerate(responses))
    steps = sum(map(len, responses)) - len(prompts)
    assert sum(sizes) == steps, "no sequence is decoded after its end"
    assert max(sizes) == 4
    assert len(sizes) < 1.4 * steps / 4, "freed slots are taken"


def test_prompts_enter_together(monkeypatch):
    entered, prefill = [], decoder.Decoder.prefill

    def counted(self, prompts):
        entered.append(len(prompts))
        return prefill(self, prompts)

    monkeypatch.setattr(decoder.Decoder, "prefill", counted)
    model, prompts = build(GPT2, torch.float32, scale=1.0), prompts_of(*range(1, 61))
    settings = SamplingParams(max_new_tokens=60, eos_token_ids=tuple(range(0, 211, 10)))
    together = sample(model, prompts, settings, list(range(60)), batch_size=16)
    assert sum(entered) == 60
    assert min(entered[:-1]) >= 2, "an eighth of the slots"
    assert sample(model, prompts, settings, list(range(60)), batch_size=3) == together
    del entered[:]
    sample(model, prompts[:9], SamplingParams(max_new_tokens=1), [0] * 9, batch_size=4)
    assert entered == [4, 4, 1], "nothing runs"


def test_positions_limit_responses():
    model = build(GPT2, n_positions=32)
    prompts = prompts_of(30, 20)
    responses = sample(model, prompts, SamplingParams(max_new_tokens=10), [0, 1])
    assert [len(response) for response in responses] == [2, 10]
    settings = SamplingParams(max_new_tokens=10, max_length=24)
    assert [len(response) for response in sample(model, prompts_of(23, 20, 9), settings, [0, 1, 2])] == [1, 4, 10]
    with pytest.raises(ConfigError, match="prompt 0 has 24 tokens, and max_length is 24: no room for a response"):
        sample(model, prompts_of(24), settings, [0])
    with pytest.raises(ConfigError, match="prompt 1 has 32 tokens, and the model 32 positions"):
        sample(model, prompts_of(5, 32), SamplingParams(), [0, 1])
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        sample(model, [[]], SamplingParams(), [0])
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        sample(model, prompts, SamplingParams(), [0, 1], batch_size=0)
    with pytest.raises(ConfigError, match=r"teacher_weight is 1\.5"):
        sample_mixture(model, model, 1.5, prompts, SamplingParams(), [0, 1])


def test_prompts_and_seeds_of_other_kinds():
    model, settings = build(GPT2), SamplingParams(max_new_tokens=4)
    expected = sample(model, PROMPTS[:2], settings, response_seeds([(7, 0), (7, 1)]))
    for seeds in (7, np.int64(7), torch.tensor(7), torch.tensor([(7 << 32), (7 << 32) + 1])):
        assert sample(model, PROMPTS[:2], settings, seeds) == expected, "one seed for all"
    assert sample(model, [torch.tensor(prompt) for prompt in PROMPTS[:2]], settings, 7) == expected
    assert sample(model, [np.array(prompt) for prompt in PROMPTS[:2]], settings, 7) == expected
    with pytest.raises(ConfigError, match="there are 3 seeds and 2 prompts"):
        sample(model, PROMPTS[:2], settings, [0, 1, 2])
    for prompts in ("What is it?", ["What is it?"], [PROMPTS[0], "What is it?"]):
        with pytest.raises(ConfigError, match=r"is text \('What is it\?'\), expected its tokens"):
            sample(model, prompts, settings, 0)
    for prompts in (PROMPTS[0], [[1.0, 2.0]], [None]):
        with pytest.raises(ConfigError, match="expected a list of tokens"):
            sample(model, prompts, settings, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_model_is_left_as_it_was(packed):
    model = build(GPT2, torch.float32).train()
    inner, ids = model, torch.tensor([PROMPTS[0]])
    if packed:
        model = PackedCausalLM(model, "student")
    implementation = inner.config._attn_implementation
    before = dict(inner.named_parameters())
    sample(model, PROMPTS[:2], SamplingParams(max_new_tokens=2), [0, 1])
    assert inner.config._attn_implementation == implementation
    assert inner.training
    assert all("forward" not in vars(module) for module in inner.modules())
    assert all(parameter is before[name] for name, parameter in inner.named_parameters())
    boundaries = {"cu_seq_lens_q": torch.tensor([0, ids.shape[1]])} if packed else {}
    inner(ids, use_cache=False, **boundaries).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in inner.parameters())


def test_adapters_take_part():
    spec = ModelConfig(path="base", lora=LoraConfig(rank=4))
    student = PackedCausalLM(lora.attach_adapter(build(LLAMA), spec, "student"), "student")
    settings = SamplingParams(max_new_tokens=8, temperature=0)
    without = sample(student, PROMPTS, settings, [0] * 8)  # a new adapter changes nothing
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    responses = sample(student, PROMPTS, settings, [0] * 8)
    assert responses != without
    merged = student.model.merge_and_unload()
    merged.set_attn_implementation("sdpa")
    assert responses == [generated(merged, prompt, max_new_tokens=8) for prompt in PROMPTS]


def test_bidirectional_model_is_refused():
    model = build(LLAMA, torch.float32, model_type="bert")
    with pytest.raises(ConfigError, match=r"bert model can't be trained: .* not causal"):
        sample(model, PROMPTS[:1], SamplingParams(), [0])
    assert model.config._attn_implementation != decoder.NAME


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"min_new_tokens": 300}, "min_new_tokens is 300, expected at least 0 and at most 256"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**changes)


def test_products_meet_few_numbers_of_rows_and_keep_the_bits():
    """oneDNN keeps a kernel for every number of rows: over a long run they took hundreds of megabytes."""
    padded = {count: decoder.padded_rows(count) for count in range(1, 8193)}
    assert len({*padded.values()}) < 50
    assert all(max(2, count) <= rows <= max(2, 1.25 * count) for count, rows in padded.items())
    weight, x = torch.randn(24, 33), torch.randn(40, 33)
    arranged = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    expected = decoder._product(arranged, None, x)
    for count in (1, 2, 3, 9, 17, 33, 39):
        assert torch.equal(decoder._product(arranged, None, x[:count]), expected[:count])
