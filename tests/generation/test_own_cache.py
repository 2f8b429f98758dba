"""Generation through transformers' own cache: equal to `generate`, alone or in company, beside packed models too."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.data import quickstart
from abkd_fast.generation import decoder, own_cache
from abkd_fast.generation.own_cache import OwnCacheDecoder
from abkd_fast.generation.sampling import SamplingParams, sample, sample_mixture
from abkd_fast.models.forms import find_logit_map
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.models.padded import PaddedCausalLM
from conftest import LLAMA
from runs import Run, assert_same, crash_and_resume

SMALL = {**LLAMA, "num_hidden_layers": 2}
STATES = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}  # fmt: skip
BLOOM = {"model_type": "bloom", "vocab_size": 211, "hidden_size": 32, "n_layer": 2, "n_head": 4}
GPT = {"model_type": "openai-gpt", "vocab_size": 211, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GRIFFIN = {"model_type": "recurrent_gemma", "vocab_size": 211, "hidden_size": 32, "intermediate_size": 64,
           "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32, "attention_window_size": 8}  # fmt: skip
# Windows and chunks have 8 tokens, those of Qwen3-Next and of its kind 64.
FAMILIES = {
    "bloom": BLOOM,
    "falcon": {"hidden_size": 32, "vocab_size": 211, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "falcon_h1": {**SMALL, **SSM, "head_dim": 8, "mamba_d_ssm": 64},
    "gpt_neo": {"vocab_size": 211, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    "granitemoehybrid": {**SMALL, **SSM, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "jamba": {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "lfm2": {**SMALL, "full_attn_idxs": [1], "block_ff_dim": 64, "block_multiple_of": 8},
    "llama4_text": {**SMALL, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2,
                    "attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"]},
    "mamba": STATES,
    "mamba2": {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "mpt": {"vocab_size": 211, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nemotron_h": {**SMALL, "layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
                   "head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
                   "moe_shared_expert_intermediate_size": 32},
    "openai-gpt": GPT,
    "qwen3_5_text": {**SMALL, **DELTA},
    "qwen3_next": {**SMALL, **DELTA, **EXPERTS},
    "recurrent_gemma": GRIFFIN,
    "rwkv": {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip
ALWAYS = {"bloom", "gpt_neo", "lfm2", "mamba", "recurrent_gemma", "qwen3_next"}
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


def build(config, seed=0, **changes):
    """A model whose next tokens are far from uniform."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(**{**config, **ends, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=2 / module.weight.shape[1] ** 0.5)
    return model.eval()


def padded(model):
    return PaddedCausalLM(model, "student", find_logit_map(model))


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(211, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts_of(5, 17, 9, 1)
ACROSS_CHUNKS = prompts_of(5, 66)


def generated(model, prompt, **settings):
    """transformers' greedy response."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)
    return out[0, len(prompt) :].tolist()


def whole(model, prompt, tokens):
    """The greedy response of a model that reads the whole sequence for each token."""
    ids = torch.tensor([prompt])
    for _ in range(tokens):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None, None]], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", [x if x in ALWAYS else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES])
def test_greedy_equals_generate(family, caplog):
    model = build({**FAMILIES[family], "model_type": family})
    responses = sample(padded(model), ACROSS_CHUNKS, GREEDY, [0, 0])
    assert responses == [generated(model, prompt, max_new_tokens=12) for prompt in ACROSS_CHUNKS]
    assert ("is slow" in caplog.text) == (family == "openai-gpt")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    student = padded(build({**FAMILIES[family], "model_type": family}))
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(student, PROMPTS, GREEDY, [0] * 4)
        assert sample(student, PROMPTS[::-1], GREEDY, [0] * 4)[::-1] == expected


def test_company_changes_nothing():
    student = padded(build({"model_type": "mamba", **STATES}))
    teacher = PackedCausalLM(build(SMALL, seed=1, vocab_size=216, intermediate_size=64), "teacher")
    settings = SamplingParams(max_new_tokens=8, no_repeat_ngram_size=3)

    def run(order, batch_size):
        chosen = [PROMPTS[i] for i in order], settings, [7 * i for i in order], batch_size
        alone, mixed = sample(student, *chosen), sample_mixture(student, teacher, 0.5, *chosen)
        return dict(zip(order, zip(alone, mixed, strict=True), strict=True))

    expected = run(range(4), 1)  # tokens, and their log-probabilities to the last bit
    assert run(range(4), 3) == expected
    assert run([2, 1], 2) == {index: expected[index] for index in (2, 1)}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_mixture_with_a_packed_model(role):
    student, teacher = build(BLOOM, vocab_size=216), build(SMALL, seed=1)
    models = [padded(student), PackedCausalLM(teacher, "teacher")]
    if role == "teacher":
        models, student, teacher = models[::-1], teacher, student
    run = sample_mixture(*models, 0.5, PROMPTS, SamplingParams(max_new_tokens=5), [3] * 4, batch_size=3)
    models[role == "student"].causal_lm.set_attn_implementation("sdpa")
    for prompt, (tokens, *both) in zip(PROMPTS, run, strict=True):
        for model, log_probs in zip((student, teacher), both, strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1, :211].log_softmax(1)
            expected = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=1e-4, atol=1e-4)


def test_ends_and_responses_are_told_as_they_end():
    model, told = build(BLOOM), []
    free = [generated(model, prompt, max_new_tokens=12) for prompt in PROMPTS]
    ends = (free[0][4], free[1][0])
    for least in (0, 6):
        settings = SamplingParams(max_new_tokens=12, temperature=0, min_new_tokens=least, eos_token_ids=ends)
        limits = {"max_new_tokens": 12, "min_new_tokens": least, "eos_token_id": list(ends)}
        expected = [generated(model, prompt, **limits) for prompt in PROMPTS]
        assert sample(padded(model), PROMPTS, settings, [0] * 4) == expected

    def stop(index, response):
        told.append((index, response))
        raise KeyboardInterrupt

    student = padded(model.train())
    with pytest.raises(KeyboardInterrupt):
        sample(student, PROMPTS, SamplingParams(max_new_tokens=12, temperature=0), [0] * 4, on_response=stop)
    assert told == [(1, free[1])], "the longest prompt comes first"
    assert model.training
    assert model.config._attn_implementation != decoder.NAME
    assert all("forward" not in vars(module) for module in model.modules())


def test_without_a_cache_the_whole_sequence_is_read(caplog):
    model = build(GPT)
    expected = [whole(model, prompt, 12) for prompt in PROMPTS]
    for _ in range(2):  # it is said once
        assert sample(padded(model), PROMPTS, GREEDY, [0] * 4) == expected
    line = "student: generation reads the whole sequence for each token, which is slow: it has no cache"
    assert [message for message in caplog.messages if "generation" in message] == [line]


def test_a_cache_that_is_wrong_or_fails_is_not_used(monkeypatch, caplog):
    model = build(BLOOM)
    step, expected = OwnCacheDecoder._step, [whole(model, prompt, 12) for prompt in PROMPTS]

    def forgetful(self, slot, inputs, state):
        logits = step(self, slot, inputs, state)
        self.inner._prepare_cache_for_generation(own_cache.GenerationConfig(), lost := {}, None, 1, 1)
        return self.states[slot].update(lost) or logits

    def broken(*_):
        raise RuntimeError("no such state")

    for fault, reason in (
        (forgetful, "with its cache, its logits differ"),
        (broken, "no such state"),
    ):
        monkeypatch.setattr(OwnCacheDecoder, "_step", fault)
        monkeypatch.setattr(own_cache, "_verdicts", {})
        assert sample(padded(model), PROMPTS, GREEDY, [0] * 4) == expected
        assert reason in caplog.text


def test_state_within_the_modules_is_seen(caplog):
    """recurrent_gemma has the state of one sequence, which another one beside it would overwrite."""
    student = padded(build(GRIFFIN))
    teacher = PackedCausalLM(build(SMALL, seed=1), "teacher")
    expected = [whole(student.model, prompt, 12) for prompt in PROMPTS]
    run = sample_mixture(student, teacher, 0.0, PROMPTS, GREEDY, [0] * 4, batch_size=2)
    assert "differ from its whole forward pass" in caplog.text
    assert [tokens for tokens, *_ in run] == expected


def test_packed_model_whose_keys_change_with_the_length(monkeypatch):
    """LongRoPE rotates all keys differently once a sequence has more than 16 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    model = build(SMALL, rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors})
    expected, used = [whole(model, prompt, 12) for prompt in PROMPTS], []
    student, enter = PackedCausalLM(model, "student"), OwnCacheDecoder.__enter__
    assert student.longest_decoded == 16
    monkeypatch.setattr(OwnCacheDecoder, "__enter__", lambda self: used.append(self.capacity) or enter(self))
    assert sample(student, PROMPTS, GREEDY, [0] * 4) == expected
    assert sample(student, PROMPTS[3:], GREEDY, [0]) == expected[3:]  # up to 13 tokens
    assert used == [29]
    assert model.config._attn_implementation == "abkd_packed"


@pytest.fixture
def run(tmp_path):
    student = {"config": {**BLOOM, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0, "hidden_size": 16}}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**student["config"])).save_pretrained(tmp_path / "teacher")
    quickstart.tokenizer().save_pretrained(tmp_path / "teacher")
    settings = ["method=gkd", "loss=fkl", f"teacher.path={tmp_path / 'teacher'}", "sampling.max_new_tokens=4"]
    settings += ["train.steps=2", "train.batch_size=2", "eval.every_steps=1", "on_policy.fraction=1"]
    return lambda name: Run(tmp_path / name, *settings, student=student)


def test_training_on_generated_text_resumes(run, monkeypatch):
    undisturbed, interrupted = run("undisturbed"), run("interrupted")
    assert undisturbed() == 0
    crash_and_resume(interrupted, monkeypatch, 2)
    assert_same(interrupted, undisturbed)
