"""Distillation within transformers' Trainer, in two processes: the weights and losses of one process."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, state
from safetensors.torch import load_file, save_file
from test_trainer_losses import build
from test_transformers_trainer import rows
from transformers import TrainingArguments

from abkd_fast.integrations.transformers import DistillationTrainer

SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def train(name, folder, count, **options):
    """Trains, and evaluates before (where accelerate can) and after it. Rank 0 writes weights and losses."""
    shared = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    shared |= {"per_device_train_batch_size": count, "per_device_eval_batch_size": count, **SGD, **options}
    data = {"train_dataset": rows(12), "eval_dataset": rows(7, 5)}
    arguments = TrainingArguments(str(folder / "out"), **shared)
    trainer = DistillationTrainer(build(name), arguments, teacher=build("llama", 1), **data)
    first = 0.0 if "fsdp" in options else trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    tensors = {"losses": torch.tensor([first, *losses, trainer.evaluate()["eval_loss"]])}
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        save_file(tensors | {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights")


def rank(number, port, folder, name, options):
    here = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(here | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    if "fsdp" in options:
        shard_on_cpus()
    train(name, folder, 2, **options)
    os._exit(0)  # at once: threads of the test's modules may still run


def shard_on_cpus():
    """accelerate takes FSDP for a matter of GPUs, and leaves it out on CPUs, where it runs as well."""
    make = state.AcceleratorState.__init__

    def wrapped(self, *arguments, fsdp_plugin=None, **options):
        make(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "alone"),
    [
        ("llama", {}, {}),
        ("mixtral", {}, {"gradient_accumulation_steps": 2}),  # the loss of routers is one of each batch
        ("llama", FSDP, {}),
    ],
    ids=["ddp", "routers", "fsdp"],
)
def test_two_processes_train_as_one_does(tmp_path, name, options, alone):
    (tmp_path / "one").mkdir()
    train(name, tmp_path / "one", 4 // alone.get("gradient_accumulation_steps", 1), **alone)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_trainer_processes"])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as in torchrun
    ranks = [context.Process(target=rank, args=(number, store.port, tmp_path, name, options)) for number in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(300)
    assert [each.exitcode for each in ranks] == [0, 0]
    ours, theirs = (load_file(folder / "weights") for folder in (tmp_path, tmp_path / "one"))
    assert ours.keys() == theirs.keys()
    if options:
        ours["losses"][0] = theirs["losses"][0]
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
