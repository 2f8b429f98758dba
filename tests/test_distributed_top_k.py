"""A served teacher (teacher.top_k) on several processes."""

import json

import pytest
import torch

from abkd_fast import train
from abkd_fast.config.recipe import load
from abkd_fast.training.trainer import Trainer
from test_distributed import RECIPE, Ranks, assert_same_losses, context, models, recipe  # noqa: F401 - fixtures


def serve(path, arguments):
    """Writes a file of random tokens for the rows of a recipe, three to five for each trained token."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for sample in Trainer(load(arguments[1], ["method=sft", "run.name=none"])[0]).data.train_set:
        labels = sample["input_ids"][sample["spans"][0] :]
        logits = torch.randn(len(labels), 1024, generator=generator).mul(3).log_softmax(1)
        counts = torch.randint(3, 6, (len(labels),), generator=generator).tolist()
        tops = [row.topk(count) for row, count in zip(logits, counts, strict=True)]
        top = {"top_ids": [x.indices.tolist() for x in tops], "top_log_probs": [x.values.tolist() for x in tops]}
        lines.append(json.dumps({"output_ids": labels, **top}) + "\n")
    path.write_text("".join(lines))


@pytest.mark.slow
def test_losses_are_those_of_one_process(context, tmp_path, recipe):  # noqa: F811
    def arguments(name, parallel):
        training = {**RECIPE["train"], "steps": 4, "parallel": parallel}
        values = {"method": "kd", "loss": "ab:0.2,0.7", "hard_weight": 0.1, "train": training}
        sets = ["--set", "teacher.path=null", "--set", f"teacher.top_k={tmp_path / 'top.jsonl'}"]
        return [*recipe(name, **values), *sets]

    alone = arguments("alone", "auto")
    serve(tmp_path / "top.jsonl", alone)
    assert train.main(alone) == 0
    for mode in ("ddp", "fsdp"):
        ranks = Ranks(context, tmp_path, 2, arguments(mode, mode))
        assert ranks.wait() == [0, 0], ranks.output()
        assert_same_losses(tmp_path / mode, tmp_path / "alone")
