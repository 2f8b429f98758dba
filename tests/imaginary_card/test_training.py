"""Whole runs on the card against the same runs on the CPU: the same numbers, no waits, products as a GPU likes them."""

import card
import pytest
import torch
from small_runs import GPT2, GROUPED, LLAMA, on_both, sections
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.data import quickstart
from runs import RECIPE, Run

TOLERANCE = 4e-3  # relative, of losses and gradient norms: 2^-8, the distance of two numbers in bfloat16
RUNS = {
    "sft": (LLAMA, {}),
    "ab": (GROUPED, {}),
    "kd": (GPT2, {}),
    "gkd": (GROUPED, {}),
    "distillm": (GPT2, {}),
    "minillm": (GROUPED, {}),
    "ab alphanet": (GROUPED, {"loss": "alphanet:0.2,0.8,batch"}),
    "ab alphanet:0.2,0.8,token": (GROUPED, {"loss": "alphanet:0.2,0.8,token"}),
    "ab akl": (GROUPED, {"loss": "akl"}),
    "ab bdkd": (GROUPED, {"loss": "bdkd"}),
    "ab lora": (GROUPED, {}),
    "ab checkpointing": (LLAMA, {}),
    "sft text": (GROUPED, {}),
    "minillm text": (GPT2, {}),
    "ab cache": (GROUPED, {"cache": {"mode": "memory"}}),
    "ab lora checkpointing text": (GROUPED, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model in a folder, as an adapter needs it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**GROUPED)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(name, device, folder, base):
    method, *options = name.split()
    model, more = RUNS[name]
    changed = sections(method, model, device, steps=3) | more
    if method in ("gkd", "distillm", "minillm"):
        changed["sampling"] = {"max_new_tokens": 12}
    if method == "minillm":
        # No ratio lies within 0.007 of this edge, and those of CPU and card differ by 0.002: on the other side of it a
        # token would have no gradient. At 0.2 one was at 0.2002 on the CPU and at 0.1986 on the card.
        changed |= {"loss": "rkl", "minillm": {"rollouts": 8, "inner_epochs": 2, "clip_ratio": 0.17}}
    if "lora" in options:
        changed["student"] = {"path": base, "lora": {"rank": 8, "alpha": 8, "dropout": 0.0}}
    if "checkpointing" in options:
        changed["train"]["gradient_checkpointing"] = True
    if "text" in options:
        text = folder / "text.txt"
        text.write_text("\n\n".join("the quick brown fox jumps over the lazy dog " * 40 for _ in range(30)))
        changed["data"] = {**RECIPE["data"], "pretrain": {"path": str(text), "weight": 0.5}}
    return changed


@pytest.fixture(scope="module", params=RUNS)
def steps(request, tmp_path_factory, base):
    """The steps of a run on the CPU, and on the card."""

    def train(device, folder):
        folder.mkdir()
        assert Run(folder, **recipe(request.param, device, folder, base))() == 0

    return on_both(tmp_path_factory.mktemp("runs"), train)


def test_numbers_are_the_cpus(steps):
    ours, theirs = (x.numbers() for x in reversed(steps))
    assert len(ours[0]) == 3
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=1e-5)


def test_steps_do_not_wait(steps):
    assert steps[1].waits == [{}, {}, {}]


def test_products_read_aligned_rows_of_16_bits(steps):
    assert steps[1].products == set()


def test_logits_are_not_copied(steps):
    assert steps[1].copies == set()


def test_row_kernels_ran(steps):
    assert any(b"row_kernel" in launch.name for launch in card.launches(card.count_launches() - 2000))
