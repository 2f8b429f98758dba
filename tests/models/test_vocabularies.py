"""Vocabularies that differ: what is used counts, and distributions are compared over what both models share."""

import copy
import itertools
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import oracle
from abkd_fast.config.models import ModelConfig
from abkd_fast.config.recipe import load
from abkd_fast.config.sampling import SamplingParams
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.evaluation.rouge import score_response
from abkd_fast.generation.answers import Generation
from abkd_fast.generation.sampling import sample_mixture
from abkd_fast.losses.divergences import parse
from abkd_fast.models import loading
from abkd_fast.training.dry_run import describe
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Run

TOKENS = 840  # of the quickstart's tokenizer
SHAPE = {**LLAMA, "num_hidden_layers": 1, "eos_token_id": 0, "bos_token_id": 0}
ROWS = [{"prompt": f"Write the word {word}. ", "output": word} for word in ("sun", "moon", "star", "sea")]
TEMPLATE = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"


def tokenizer(*added):
    changed = copy.deepcopy(quickstart.tokenizer())
    changed.add_special_tokens({"additional_special_tokens": [*added]})
    return changed


@pytest.fixture
def make(tmp_path, write_jsonl):
    """The configuration of a run, with tokens added to the tokenizers of student and teacher."""

    def model(name, vocab, tokens, template, seed):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{**SHAPE, "vocab_size": vocab}, initializer_range=0.3)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        saved = tokenizer(*tokens)
        saved.chat_template = template
        saved.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def make(method, *sets, vocabs=(1024, 1024), tokens=((), ()), rows=ROWS, template=None):
        specs = zip(("student", "teacher"), vocabs, tokens, (template, None), (0, 1), strict=True)
        models = {specs[0]: {"path": model(*specs)} for specs in specs}
        if method == "sft":
            models.pop("teacher")
        train = {"steps": 2, "batch_size": 4, "max_tokens": 256, "device": "cpu", "dtype": "float64"}
        data = {"train": write_jsonl(rows), "max_length": 128}
        cache = {} if method == "sft" else {"cache": {"mode": "off"}}
        run = Run(tmp_path, **models, tokenizer=None, method=method, train=train, data=data, eval={}, **cache)
        return load(run.arguments[1], list(sets))[0]

    return make


def notes(config):
    return "\n".join(Trainer(config).teachers.notes())


def refusal(config):
    with pytest.raises(ConfigError) as error:
        Trainer(config)
    return str(error.value)


def test_a_model_may_have_fewer_entries_than_its_tokenizer_has_tokens(make, tmp_path):
    """Gemma 3 1B has one fewer."""
    small = {"vocabs": (TOKENS, TOKENS + 5), "tokens": (["<image>"], ["<image>"])}
    assert "a model lacks 1 of the tokenizer's 841 tokens, which nothing uses: 840 ('<image>')" in notes(
        make("ab", **small)
    )
    reason = "uses id 840 ('<image>'), which the student lacks: the tokenizer has 841 tokens, but the student fewer "
    used = [*ROWS[:2], {"prompt": "Look at <image>. ", "output": "sun"}, *ROWS[2:]]
    assert f"rows.jsonl line 3: {reason}(student has 840, teacher has 845)" in refusal(make("ab", **small, rows=used))
    lacking = {**small, "vocabs": (TOKENS + 5, TOKENS)}
    assert f"line 3: {reason.replace('student', 'teacher')}" in refusal(make("ab", **lacking, rows=used))
    text = tmp_path / "text.txt"
    text.write_text("The sun is bright. " * 120 + "<image>" + "The sun is bright. " * 120)
    told = refusal(make("sft", f"data.pretrain.path={text}", "data.max_length=32", **small))
    assert f"data.pretrain: {text}: block " in told
    assert reason in told
    assert f"the chat template: {reason}" in refusal(make("sft", **small, template="<image>" + TEMPLATE))


def test_an_end_that_the_model_lacks_is_refused(make, tmp_path):
    config = make("sft", vocabs=(TOKENS, 1024), tokens=(["<image>"], []))
    path = tmp_path / "student" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, TOKENS]}))
    words = "the end of responses: uses id 840 ('<image>'), which the {} lacks"
    assert words.format("student") in refusal(config)
    with pytest.raises(ConfigError, match=words.format("model").replace("(", r"\(").replace(")", r"\)")):
        Generation(ModelConfig(path=str(tmp_path / "student")), config.data.train, tmp_path / "x", SamplingParams())


def test_a_prompt_that_the_answering_model_cannot_read_is_refused(make, write_jsonl, tmp_path):
    make("sft", vocabs=(TOKENS, 1024), tokens=(["<image>"], []))
    spec, out = ModelConfig(path=str(tmp_path / "student")), tmp_path / "answers.jsonl"
    Generation(spec, write_jsonl(ROWS), out, SamplingParams(), device="cpu")
    with pytest.raises(ConfigError, match=r"rows.jsonl line 2: the prompt has token id 840, and the model 840 "):
        Generation(spec, write_jsonl([ROWS[0], {"prompt": "<image>"}]), out, SamplingParams(), device="cpu")


@pytest.mark.parametrize("size", [TOKENS, TOKENS + 1])
def test_tokens_beyond_the_smaller_model_are_not_compared(make, size):
    """The teacher has many tokens more: this is no padding, but they lie at the end."""
    found = notes(make("ab", vocabs=(size, TOKENS + 1100), tokens=((), ["<tool>", "</tool>"])))
    assert found.endswith("; the loss compares the first 840 tokens, which end before them")


def test_tokens_that_no_model_has_are_not_compared(make):
    found = notes(make("ab", vocabs=(TOKENS - 1, TOKENS), tokens=(["<tool>"], []), rows=[{**ROWS[0]}] * 4))
    assert found.endswith("840 ('<tool>' / None); the loss compares the first 839 tokens, which end before them")


def test_tokens_that_differ_are_refused_where_they_are_used(make, write_jsonl):
    """As Qwen 2.5 and Qwen 3 do, and distillates of R1."""
    differ = {"tokens": (["<image>"], ["<tool>", "</tool>"])}
    found = notes(make("ab", **differ))
    named = "840 ('<image>' / '<tool>'), 841 (None / '</tool>')"
    assert f"student and teacher differ at 2 ids, which nothing uses: {named}; the loss" in found
    assert found.endswith("; the loss compares the first 840 tokens, which end before them")
    reason = (
        "uses an id that is another token for the teacher: the tokenizers of student (841 tokens) and teacher (842)"
    )
    used = [*ROWS, {"prompt": "Look at <image>. ", "output": "sun"}]
    told = refusal(make("ab", **differ, rows=used))
    assert f"rows.jsonl line 5: {reason} differ at id 840 ('<image>' / '<tool>')" in told
    dev = write_jsonl(used, "dev.jsonl")
    assert f"dev.jsonl line 5: {reason}" in refusal(make("ab", f"data.dev={dev}", **differ))
    assert f"the chat template: {reason}" in refusal(make("ab", **differ, template="<image>" + TEMPLATE))


def test_tokens_that_differ_in_the_middle_stay_in_the_comparison(make):
    config = make("ab", tokens=(["<a>", "<c>", "<d>"], ["<b>", "<c>"]))
    assert Trainer(config).teachers.vocabulary.shared == TOKENS + 2  # without <d>
    (line,) = (
        line
        for line in describe(Trainer(config))
        if line.startswith("  tokens     student and teacher differ at 2 ids, ")
    )
    assert line.endswith(
        "; the loss compares the first 842 tokens, which end before them; the loss does compare 1 of them, which lie "
        "between tokens that are the same"
    )
    config = make("ab", tokens=(["<a>", "<c>"], ["<b>", "<c>"]), vocabs=(1024, 1000))
    assert Trainer(config).teachers.vocabulary.shared is None


def test_sizes_may_differ_by_any_number_of_tokens_at_the_end(make):
    far = make("ab", tokens=([], ["<tool>"]), vocabs=(1024, 9000))
    trainer = Trainer(far)
    trainer.build()
    assert trainer.train_step(next(trainer.batches()))[0].isfinite()
    assert "the student has 1024 vocabulary entries and the teacher 9000" in refusal(make("ab", vocabs=(1024, 9000)))


METHODS = {
    "ab": ["loss=rkl"],
    "kd": ["loss=fkl", "hard_weight=0.3"],
    "gkd": ["loss=jsd:0.1", "on_policy.fraction=1", "on_policy.replay_rows=0"],
    "distillm": ["loss=srkl:0.1", "on_policy.threshold=1", "data.dev=quickstart:dev", "data.dev_rows=2"],
    "minillm": ["loss=rkl", "minillm.rollouts=4", "student.dropout=0", "minillm.teacher_weight=0.4"],
}
SAME, OTHER_END = ([], []), ([], ["<tool>"])
TEACHER_PADDED, STUDENT_PADDED = (1024, 1088), (1088, 1024)
FAST = [  # of all that the paths of the losses share one each
    ("ab", OTHER_END, TEACHER_PADDED, "memory"),
    ("kd", SAME, STUDENT_PADDED, "off"),
    ("gkd", OTHER_END, STUDENT_PADDED, "off"),
    ("distillm", SAME, TEACHER_PADDED, "off"),
    ("minillm", SAME, TEACHER_PADDED, "off"),
    ("minillm", SAME, STUDENT_PADDED, "off"),
    ("minillm", OTHER_END, STUDENT_PADDED, "off"),
]
EVERY = itertools.product(METHODS, (SAME, OTHER_END), (TEACHER_PADDED, STUDENT_PADDED), ("off", "memory"))
CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in EVERY]


@pytest.mark.parametrize(("method", "tokens", "vocabs", "cache"), CASES)
def test_the_first_step_compares_what_both_models_share(make, method, tokens, vocabs, cache):
    sampled = [] if method in ("ab", "kd") else ["sampling.max_new_tokens=8", "sampling.batch_size=4"]
    settings = [*METHODS[method], *sampled, f"cache.mode={cache}"]
    trainer = Trainer(make(method, *settings, vocabs=vocabs, tokens=tokens))
    trainer.build()
    shared = TOKENS if tokens is OTHER_END else 1024
    specs = trainer.config.student, trainer.config.teacher
    models = [AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float64) for spec in specs]
    batch = trainer.select_batch(next(trainer.batches()))
    expected, labels = 0.0, 0
    for sample in batch.samples:
        ids, (start, stop) = torch.tensor([sample["input_ids"]]), sample["spans"]
        assert int(ids.max()) < shared
        with torch.no_grad():
            logits = [model(ids).logits[0, start - 1 : stop - 1, :shared] for model in models]
        expected += expected_loss(trainer.config, *logits, ids[0, start:stop], sample)
        labels += stop - start
    assert trainer.train_step(batch)[0].item() == pytest.approx(expected / labels, rel=1e-9)


def expected_loss(config, student, teacher, labels, sample):
    """The sum over the tokens, from logits over the shared tokens."""
    if config.method != "minillm":
        losses, _ = oracle.evaluate(student, teacher, parse(config.loss), labels, 1.0, config.hard_weight)
        return losses.sum().item()
    q, p = student.log_softmax(1), teacher.log_softmax(1)
    weight, chosen = config.minillm.teacher_weight, labels[:, None]
    mixed = ((1 - weight) * q.exp() + weight * p.exp()).log().gather(1, chosen)[:, 0]
    assert sample["log_probs"] == pytest.approx(mixed.tolist(), rel=1e-9)
    ratios = (q.gather(1, chosen)[:, 0] - mixed).exp()
    advantages, clip = torch.tensor(sample["advantages"], dtype=torch.float64), config.minillm.clip_ratio
    surrogate = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))
    return ((q.exp() * (q - p)).sum() + surrogate.sum()).item()


def test_responses_end_before_tokens_that_differ(make):
    """Untrained models of a flat distribution write every token that they may."""
    trainer = Trainer(make("gkd", *METHODS["gkd"], "sampling.max_new_tokens=40", tokens=OTHER_END))
    trainer.build()
    for model in (trainer.student, trainer.teachers["teacher"].live.model):
        torch.nn.init.zeros_(model.head.weight)
    samples = next(trainer.batches()).samples
    written = [*trainer.rollouts.write(samples, 0), *trainer.rollouts.write_mixed(samples, 0, 0.5)]
    assert TOKENS - 100 < max(token for sample in written for token in sample["input_ids"]) < TOKENS
    settings = SamplingParams(max_new_tokens=2)  # without a limit of its own the mixture has all that both models have
    models = trainer.student.causal_lm, trainer.teachers["teacher"].live.model.causal_lm
    (_, log_probs, _), *_ = sample_mixture(*models, 0.5, [[5]], settings, [0])
    assert log_probs[0] == pytest.approx(-torch.tensor(1024.0).log().item())


def test_unknown_ids_of_a_response_say_nothing():
    class Pieces:
        """Like SentencePiece's own, it fails at ids that it lacks."""

        def __len__(self):
            return 2

        def decode(self, ids, **_):
            return " ".join(["red", "sun"][token] for token in ids)

    assert score_response(Pieces(), [0, 5, 1, 900], ["red sun"], "words")["rouge_l"] == 100


POSITIONS = {
    "llama": (LLAMA, 128),
    "gpt2": ({"n_positions": 64}, 64),
    "mpt": ({"max_seq_len": 32}, 32),
    "dbrx": ({"max_seq_len": 32}, 32),
    "falcon": ({"max_position_embeddings": 48}, 48),
    "bloom": ({}, None),
    "mamba": ({}, None),
}


@pytest.mark.parametrize("family", POSITIONS)
def test_the_number_of_positions_has_many_names(family):
    settings, expected = POSITIONS[family]
    config = AutoConfig.for_model(**{**settings, "model_type": family})
    assert loading.max_positions(config) == expected
    if expected is None:
        loading.check_length(config, "student", 10**6)
        return
    with pytest.raises(ConfigError, match=rf"data\.max_length is {expected + 1}, but the student has {expected} "):
        loading.check_length(config, "student", expected + 1)
    with pytest.raises(ConfigError, match=f"the prompt has {expected} tokens, and the model {expected} positions"):
        loading.check_prompts(config, [("row 1", [0] * expected)])


def test_alibi_has_no_last_position():
    assert loading.max_positions(AutoConfig.for_model(model_type="falcon", alibi=True)) is None
