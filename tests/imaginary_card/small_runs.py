"""Small runs on the CPU and on the card, and what their steps did."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import card
import torch
from emulate import Emulate, tensors
from torch import Tensor

import runs
from abkd_fast.training.trainer import Trainer

VOCAB = 1031  # odd, like GPT-2's 50,257
LLAMA = {**runs.TIED, "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "attention_dropout": 0.0}
GROUPED = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {**runs.GPT2, "vocab_size": VOCAB, "n_embd": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone"}


def sections(method: str, student: dict, device: str, steps: int, compile: str = "off") -> dict:
    """The recipe of a small run in bfloat16. The teacher has one layer more."""
    layers = "n_layer" if student["model_type"] == "gpt2" else "num_hidden_layers"
    train = {**runs.RECIPE["train"], "device": device, "steps": steps, "dtype": "bfloat16", "compile": compile}
    recipe = {"method": method, "student": {"config": student}, "train": train, "log": {"every_steps": 2}}
    if method != "sft":
        recipe |= {"teacher": {"config": {**student, layers: student[layers] + 1}}, "cache": {"mode": "off"}}
    return recipe


@dataclasses.dataclass
class Steps:
    """What the steps of a run did. On the card alone: `waits`, and the products and copies that a GPU is slow at."""

    losses: list[Tensor] = dataclasses.field(default_factory=list)
    norms: list[Tensor] = dataclasses.field(default_factory=list)
    waits: list[dict[str, int]] = dataclasses.field(default_factory=list)
    launches: list[int] = dataclasses.field(default_factory=list)
    products: set[str] = dataclasses.field(default_factory=set)
    copies: set[str] = dataclasses.field(default_factory=set)

    def numbers(self) -> Tensor:
        """Losses and gradient norms, [2, steps]."""
        return torch.tensor([[x.item() for x in values] for values in (self.losses, self.norms)])

    def observe(self, func, args, kwargs, result):
        name = func._schema.name
        if name in PRODUCTS:
            first = 0 if name == "aten::mm" else 1  # addmm's first argument is what the product is added to
            factors = args[first : first + 2]
            slow = [x for x in factors if x.itemsize > 2]
            slow += [x for x in (*factors, result) if min(x.shape) > 1 and max(x.stride()) % 8]
            self.products |= {f"{func} of {[describe(x) for x in (*factors, result)]}" for _ in slow[:1]}
        if name in COPIES:
            logits = [x for x in tensors((args, result)) if x.dim() == 2 and VOCAB in x.shape and 64 not in x.shape]
            self.copies |= {f"{func} of {[describe(x) for x in logits]}" for _ in logits[:1]}


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} stride {list(x.stride())}"


@contextlib.contextmanager
def recorded(emulate: Emulate | None = None) -> Iterator[Steps]:
    """Takes down the steps of all trainers. `emulate`: they are on the card."""
    steps, train_step = Steps(), Trainer.train_step

    def wrapped(self, batch):
        first, before = card.count_launches(), card.waits.copy()
        if emulate:
            emulate.observers.append(steps.observe)
        result = train_step(self, batch)
        if emulate:
            emulate.observers.clear()
        steps.launches.append(card.count_launches() - first)
        steps.waits.append(dict(card.waits - before))
        steps.losses.append(result[0].detach().clone())
        steps.norms.append(result[1].detach().clone())
        return result

    Trainer.train_step = wrapped
    try:
        yield steps
    finally:
        Trainer.train_step = train_step


def on_both(folder: pathlib.Path, make) -> tuple[Steps, Steps]:
    """Calls make(device, folder) for the CPU and for the card. Returns their steps."""
    with recorded() as on_cpu:
        make("cpu", folder / "cpu")
    with card.watch_waits(), Emulate() as emulate, recorded(emulate) as on_card:
        make("cuda", folder / "cuda")
    return on_cpu, on_card
