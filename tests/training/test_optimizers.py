"""The optimizers by name: their numbers, resumed runs, steps that are left out, and what is refused before training."""

import importlib.util
import sys
import types
import typing

import pytest
import torch
from safetensors.torch import load_file

from abkd_fast import distill, distributed
from abkd_fast.config.recipe import load
from abkd_fast.config.training import OPTIMIZER_KEYS, OptimConfig
from abkd_fast.errors import ConfigError
from abkd_fast.training import optim
from abkd_fast.training.given import NOTHING
from abkd_fast.training.trainer import Trainer
from runs import RECIPE, TIED, Killed, Run, assert_same, crash_and_resume, poison

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
MOMENTUM = ["optim.name=sgd", "optim.momentum=0.9"]
PLAIN = ["optim.name=adam"], ["optim.name=sgd"], ["optim.name=adagrad"]
OTHERS = [
    pytest.param(MOMENTUM, id="momentum"),
    pytest.param(["optim.name=adamw8bit"], id="adamw8bit", marks=needs_bitsandbytes),
]
CHOICES = [*PLAIN, *OTHERS]
SHORT = {
    "train": {**RECIPE["train"], "steps": 4},
    "checkpoint": {"every_steps": 2},
    "data": {**RECIPE["data"], "dev": None},
}


@pytest.mark.parametrize("choice", [*OTHERS, *(pytest.param(choice, marks=pytest.mark.slow) for choice in PLAIN)])
def test_resumed_to_the_same_bits(tmp_path, monkeypatch, choice):
    whole, cut = (Run(tmp_path / name, *choice, **SHORT) for name in ("whole", "cut"))
    assert whole() == 0
    crash_and_resume(cut, monkeypatch, 3)
    assert_same(cut, whole)
    assert (cut.folder / "checkpoints" / "step-000002" / "optimizer").is_dir()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, choice):
    """Not even if it is the first. The next one is then as if it were the first."""
    sets = [*choice, "optim.warmup_steps=0", "optim.schedule=constant", "student.dropout=0"]
    run = Run(tmp_path, **SHORT)
    (config,) = load(run.arguments[1], sets)
    poison(monkeypatch, 1)
    weights = []
    for first in (1, 2):
        trainer = Trainer(config)
        trainer.build()
        before = [parameter.detach().clone() for parameter in trainer.student.parameters()]
        batches = [*trainer.batches()]
        for trainer.state.step in range(first, 3):  # the first one is not finite
            trainer.train_step(batches[trainer.state.step])
            after = [parameter.detach().clone() for parameter in trainer.student.parameters()]
            assert [*map(torch.equal, before, after)] == [trainer.state.step == 1] * len(after)
        weights.append(after)
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("choice", CHOICES)
def test_bytes_of_the_state(tmp_path, choice):
    run = Run(tmp_path, **SHORT)
    (config,) = load(run.arguments[1], choice)
    weight = torch.nn.Linear(64, 640, bias=False)
    weight.has_adapter = False
    made = optim.build_optimizer(weight, config.optim)
    weight(torch.ones(64)).sum().backward()
    made.step()
    state = made.state[weight.weight]
    taken = sum(state[key].nbytes for key in state if key != "step" and not key.startswith("qmap"))
    assert taken == weight.weight.numel() * optim.state_bytes(config.optim, 4)


def test_each_optimizer_gets_the_keys_that_it_reads():
    assert {*OPTIMIZER_KEYS} == {*typing.get_args(typing.get_type_hints(OptimConfig)["name"])}
    weights = torch.nn.Linear(2, 2)
    weights.has_adapter = False
    for name, values in {
        "adamw": {"betas": (0.8, 0.9), "eps": 1e-6},
        "adam": {"betas": (0.8, 0.9), "eps": 1e-6},
        "adagrad": {"eps": 1e-6},
        "sgd": {"momentum": 0.5},
    }.items():
        made = optim.build_optimizer(weights, OptimConfig(name=name, lr=0.1, **values))
        assert type(made).__name__.lower() == name
        decayed, others = made.param_groups
        for key, value in {**values, "lr": 0.1, "fused": True}.items():
            assert decayed[key] == others[key] == value
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["optim.name=sdg"], 'optim.name is "sdg", expected one of adamw, adam, adamw8bit, adagrad, sgd'),
        (["optim.momentum=0.9"], "optim.momentum: adamw does not read it, only sgd: leave it out"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.95]"], "optim.betas: sgd does not read it, only adamw, adam, adamw8"),
        (["optim.name=sgd", "optim.eps=1e-6"], "optim.eps: sgd does not read it, only adamw, adam, adamw8bit, adagra"),
        (["optim.name=adagrad", "optim.betas=[0.9, 0.95]"], "optim.betas: adagrad does not read it"),
        (["optim.name=sgd", "optim.momentum=1"], "optim.momentum is 1.0, expected from 0 up to 1"),
        (["optim.name=sgd", "optim.momentum=-0.1"], "optim.momentum is -0.1, expected at least 0"),
        (["optim.name=adamw8bit", "train.dtype=float64"], "optim.name: adamw8bit has no float64, which train.dtype is"),
    ],
)
def test_refused_values(tmp_path, capsys, sets, message):
    run = Run(tmp_path, *sets, **SHORT)
    assert run() == 2
    assert message in capsys.readouterr().err
    assert not run.folder.exists()


class WithoutKernels(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no kernel for 8 bits")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "import of bitsandbytes.optim halted"),
        (types.SimpleNamespace(AdamW8bit=WithoutKernels), "no kernel for 8 bits"),
    ],
)
def test_bitsandbytes_that_can_not_be_used(tmp_path, capsys, monkeypatch, module, reason):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    run = Run(tmp_path, "optim.name=adamw8bit", **SHORT)
    assert run() == 2
    message = capsys.readouterr().err
    assert f"optim.name: adamw8bit needs bitsandbytes, which can't be used here ({reason}" in message
    assert "pip install bitsandbytes, or take optim.name=adamw" in message
    assert not run.folder.exists()


def test_8_bits_and_sharded_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    run = Run(tmp_path, **SHORT)
    (config,) = load(run.arguments[1], ["optim.name=adamw8bit", "train.parallel=fsdp"])
    with pytest.raises(ConfigError, match="adamw8bit can't update weights of which each process holds a part"):
        optim.check_optimizer(config, NOTHING)


class Counting(torch.optim.SGD):
    """Its state has what JSON keeps, and a tensor that all weights share."""

    constant = torch.tensor([0.5, 0.25])

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state.update(name="sgd", scale=0.1 / state["step"], nothing=None, constant=self.constant)
            parameter.grad.mul_(state["scale"])
        return super().step(closure)


def test_state_of_an_optimizer_of_ones_own(tmp_path):
    """Numbers and shared tensors are kept. Anything else is refused at the first step, not at a checkpoint."""
    own = {"student": {"config": TIED}, "tokenizer": "quickstart", "method": "sft", "train_dataset": "quickstart:small"}
    own |= {"train": {**SHORT["train"], "steps": 4}, "data": {"max_length": 128, "train_rows": 20}}
    sections = {"checkpoint": {"every_steps": 2}, "log": {"every_steps": 1}}
    own |= {"optimizer": lambda groups: Counting(groups, lr=0.5), **sections}
    whole = distill(**own, run={"name": "whole", "dir": str(tmp_path)})

    def stop(point):
        if point["step"] == 3:
            raise Killed

    cut = {"name": "cut", "dir": str(tmp_path)}
    with pytest.raises(Killed):
        distill(**own, run=cut, on_step=stop)
    again = distill(**own, run=cut, resume=True)
    ours, theirs = (load_file(one.final / "model.safetensors") for one in (again, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    class Listing(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["past"] = [torch.zeros(1)]

    own["optimizer"] = lambda groups: Listing(groups, lr=0.5)
    with pytest.raises(ConfigError, match='optimizer: "past" of its state is a list, which a checkpoint can\'t keep'):
        distill(**own, run={"name": "listing", "dir": str(tmp_path)})
    assert not (tmp_path / "listing" / "checkpoints").exists()
    with pytest.raises(
        ConfigError, match=r'optim\.name is "sgd", but there is a function optimizer, which replaces it'
    ):
        distill(**own, run={"name": "two", "dir": str(tmp_path)}, optim={"name": "sgd"})
