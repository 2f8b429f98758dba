"""Generation on the card: with CUDA graphs, with captures that fail, and against the CPU; and how often it waits."""

import dataclasses
import itertools

import card
import pytest
import torch
from emulate import Emulate
from small_runs import GPT2, GROUPED
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.sampling import SamplingParams
from abkd_fast.generation.sampling import sample
from abkd_fast.models.packed import PackedCausalLM

SHARP = {"initializer_range": 0.3}  # no two tokens are nearly as likely
MODELS = {
    "gpt2": {**GPT2, **SHARP, "n_positions": 512},
    "grouped": {**GROUPED, **SHARP, "max_position_embeddings": 512},
    "window": {**GROUPED, **SHARP, "model_type": "mistral", "max_position_embeddings": 512, "sliding_window": 24},
}
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "no_repeat_ngram_size": 3}
CASES = [("gpt2", SAMPLED), ("grouped", GREEDY), ("window", GREEDY)]
NEW_TOKENS = 12
GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(1024, (n,), generator=GENERATOR).tolist() for n in (3, 40, 240, 17, 5, 250, 9)]


def build(name, device, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]), dtype=torch.float32)
    return PackedCausalLM(model.to(device), "model")


def generate(model, new_tokens=NEW_TOKENS, prompts=PROMPTS, **settings):
    settings = SamplingParams(max_new_tokens=new_tokens, eos_token_ids=(7,), **settings)
    with torch.autocast(model.head.weight.device.type, torch.bfloat16):
        return sample(model, prompts, settings, list(range(len(prompts))), batch_size=4)


def wait_in_captures(func, args, kwargs, result):
    """An observer that does what CUDA forbids."""
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


@dataclasses.dataclass
class Outcome:
    on_cpu: list[list[int]]
    with_graphs: list[list[int]]
    eager: list[list[int]]
    replays: tuple[int, int]  # with graphs, and after failed captures
    stream_is_restored: bool


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def outcome(request):
    """The same responses three times: from the CPU, by graphs, and after a capture has failed."""
    name, settings = request.param

    def replays():
        return sum(launch.name.startswith(b"graph of") for launch in card.launches(first))

    on_cpu = generate(build(name, "cpu"), **settings)
    with Emulate() as emulate:
        first = card.count_launches()
        with_graphs, replayed = generate(build(name, "cuda"), **settings), replays()
        first = card.count_launches()
        emulate.observers.append(wait_in_captures)
        with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
            eager = generate(build(name, "cuda"), **settings)
    restored = torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.set_stream(torch.cuda.default_stream())
    return Outcome(on_cpu, with_graphs, eager, (replayed, replays()), restored)


def test_graphs_change_nothing(outcome):
    with_graphs, without = outcome.replays
    assert with_graphs >= NEW_TOKENS
    assert without == 0
    assert outcome.with_graphs == outcome.eager


def test_responses_are_the_cpus(outcome):
    """Where two tokens are within bfloat16's rounding, a response goes another way and never comes back."""
    pairs = list(zip(outcome.with_graphs, outcome.on_cpu, strict=True))
    assert [len(ours) for ours, _ in pairs] == [len(theirs) for _, theirs in pairs]
    common = [sum(itertools.accumulate((a == b for a, b in zip(*pair, strict=True)), min)) for pair in pairs]
    assert sum(common) >= 0.7 * NEW_TOKENS * len(pairs), common


def test_failed_capture_leaves_the_stream(outcome):
    assert outcome.stream_is_restored


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_one_wait_a_token(settings):
    """What a call waits for at its beginning does not count."""
    counts = []
    with Emulate():
        model = build("grouped", "cuda")
        for new_tokens in (4, 12):
            with card.watch_waits() as waits:
                generate(model, new_tokens, PROMPTS[:2], **settings)
            counts.append(sum(waits.values()))
    assert counts[1] - counts[0] <= 12 - 4, waits
