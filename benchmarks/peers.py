"""A training step of other projects' distillation trainers, against ours: `python benchmarks/peers.py`.

Models, batches and the divergence are those of timing.py's GKD row on the data. TRL's trainers run as they are, without
gradient checkpointing; so does our own subclass of transformers' Trainer. On a GPU Liger-Kernel's fused loss runs in a
plain loop. `pip install '.[bench]'` brings them.
"""

import copy
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import datasets
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from abkd_fast.config.schema import Config
from abkd_fast.errors import first_line
from abkd_fast.integrations.rows import collate_rows
from abkd_fast.integrations.transformers import DistillationTrainer
from baseline import Numbers, PaddedBatch, Turn, pad, pad_samples, split, token_positions
from harness import TIME, spread
from kernels import PEER_BETA, liger
from timing import Benchmark
from workload import scaled_parser

Step = Callable[[Turn], Numbers]


class PeerBenchmark(Benchmark):
    def config(self, name: str, cache: str = "off") -> Config:
        """TRL's trainers switch dropout off."""
        config = super().config(name, cache)
        return dataclasses.replace(config, student=dataclasses.replace(config.student, dropout=0.0))

    def build(self) -> None:
        super().build()
        # Modules of their own on the same weights, with what transformers gives for attention and activations.
        self.student, self.teacher, self.device = self.baseline.student, self.baseline.teacher, self.trainer.device
        for model in (self.student, self.teacher):
            model.base_model.register_forward_pre_hook(_add_positions, with_kwargs=True)

    def label(self, key: str) -> str:
        return key

    def peers(self) -> dict[str, Step]:
        """Our steps, the published way's, and those of every peer that runs with the same loss and gradient norm."""
        ways = {"ours": "ours", "ours, teacher's states cached": "cached", "published way": "published"}
        ours = self.steps()
        steps = {name: ours["GKD", way, "data"] for name, way in ways.items()}
        makers = {"our DistillationTrainer": self.transformers_trainer}  # first: TRL changes what it copies
        makers |= {"TRL, DistillationTrainer": self.distillation_trainer, "TRL, GKDTrainer": self.gkd_trainer}
        makers["Liger-Kernel's loss"] = lambda: self.liger_step
        expected = [value.item() for value in steps["ours"](self.turns[0])]
        for name, make in makers.items():
            try:
                step = make()
                numbers = [value.item() for value in step(self.turns[0])]
            except Exception as error:  # a missing package, or an interface that has moved, shows itself in many ways
                self.report.note(f"{name}: skipped ({first_line(error)})")
                continue
            loss, norm = (abs(value / own - 1) for value, own in zip(numbers, expected, strict=True))
            self.report.note(f"{name}: its loss differs by {loss:.0e}, its gradient norm by {norm:.0e}")
            if max(loss, norm) <= self.tolerance:
                steps[name] = step
        return steps

    def trl_trainer(self, trainer: type, config: type, rows: dict, **more: object) -> object:
        more |= {"output_dir": str(self.folder / "trl"), "beta": PEER_BETA, "temperature": 1.0, "report_to": []}
        more |= {"per_device_train_batch_size": self.batch_size, "gradient_checkpointing": False}
        more |= {"bf16": self.trainer.dtype == torch.bfloat16, "use_cpu": self.device.type == "cpu"}
        data = {"train_dataset": datasets.Dataset.from_dict(rows), "processing_class": self.trainer.tokenizer}
        models = {"model": self.student, "teacher_model": self.teacher}
        return trainer(args=config(learning_rate=1e-30, **more), **models, **data)

    def distillation_trainer(self) -> Step:
        """On given responses: by itself this trainer writes its own."""
        from trl import DistillationConfig, DistillationTrainer

        trainer = self.trl_trainer(DistillationTrainer, DistillationConfig, {"prompt": ["1"]})
        trainer._prepare_inputs = lambda inputs: inputs  # it would generate here
        trainer.current_gradient_accumulation_steps = 1  # as its loop sets it

        def step(turn: Turn) -> Numbers:
            prompts, responses = split(turn.samples)
            prompts, responses = pad(prompts, None, self.device, left=True), pad(responses, None, self.device)
            inputs = {"prompt_ids": prompts[0], "prompt_mask": prompts[1], "num_items_in_batch": responses[1].sum()}
            inputs |= {"completion_ids": responses[0], "completion_mask": responses[1]}
            return trainer.training_step(self.student, inputs, None), self.baseline.step_optimizer()

        return step

    def gkd_trainer(self) -> Step:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        more = {"lmbda": 0.0, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = self.trl_trainer(GKDTrainer, GKDConfig, {"input_ids": [[1, 2]]}, **more)

        def step(turn: Turn) -> Numbers:
            ids, mask = pad([sample["input_ids"] for sample in turn.samples], None, self.device)
            labels = ids.masked_fill(mask == 0, -100)
            for row, sample in enumerate(turn.samples):
                labels[row, : sample["spans"][0]] = -100
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            return trainer.training_step(self.student, inputs, (labels != -100).sum()), self.baseline.step_optimizer()

        return step

    def transformers_trainer(self) -> Step:
        """Our losses within transformers' Trainer, on copies: it changes the models' attention and activations."""
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        options = {"output_dir": str(self.folder / "transformers"), "report_to": [], "learning_rate": 1e-30}
        options |= {"bf16": self.trainer.dtype == torch.bfloat16, "use_cpu": self.device.type == "cpu"}
        data = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
        models = {"teacher": teacher, "divergence": self.config("GKD").loss}
        trainer = DistillationTrainer(student, TrainingArguments(**options), train_dataset=data, **models)
        optim = self.trainer.config.optim
        optimizer = torch.optim.AdamW(student.parameters(), lr=optim.lr, fused=True)

        def step(turn: Turn) -> Numbers:
            rows = [dict(sample, labels=[-100] * sample["spans"][0] + sample["input_ids"][sample["spans"][0] :])
                    for sample in turn.samples]  # fmt: skip
            batch = collate_rows(rows)
            with trainer._packed():
                loss = trainer.training_step(student, batch, len(batch["labels"]))
            norm = nn.utils.clip_grad_norm_(student.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss, norm

        return step

    def liger_step(self, turn: Turn) -> Numbers:
        batch = pad_samples(turn.samples, None, self.device)
        with self.trainer.precision():
            with torch.no_grad():
                theirs = _states(self.teacher, batch)
            loss = liger(*_states(self.student, batch), *theirs)
        return self.baseline.update(loss)

    def run(self) -> None:
        self.build()
        steps = self.peers()
        rounds, rows = [self.round(steps, turn) for turn in self.turns[1:]], []
        for name in steps:
            values = [each[name] / self.batch_size for each in rounds]
            ratio = statistics.median(each[name] / each["ours"] for each in rounds)
            target = {"target": {"at_least": 3}} if name.startswith("TRL") else {}
            rows.append(spread(name, values, ratio=ratio, all_ms=values, **target))
        title = f"milliseconds/sample, medians of {self.options.repeats}"
        self.report.table("peers", title, rows, TIME | {"ratio": "x ours|.2f"})


def _add_positions(module: nn.Module, inputs: tuple, settings: dict) -> tuple[tuple, dict]:
    """DistillationTrainer passes no positions, and GPT-2 would count the padding before a prompt."""
    if settings.get("position_ids") is None:
        settings = settings | {"position_ids": token_positions(settings["attention_mask"])}
    return inputs, settings


def _states(model: nn.Module, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """Final hidden states [N, H] of the positions that have a label, and the projection [V, H]."""
    body = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    states, weight = body.last_hidden_state[batch.labels != -100], model.get_output_embeddings().weight
    return states.to(torch.bfloat16), weight.to(torch.bfloat16)  # Liger-Kernel's products know no autocast


def main(arguments: list[str] | None = None) -> None:
    options = scaled_parser(__doc__, "peers")[0].parse_args(arguments)
    vars(options).update(methods=["GKD"], pretrain=False, overhead=False)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = PeerBenchmark(options, pathlib.Path(folder))
        with benchmark.report.kept("peers"):
            benchmark.run()


if __name__ == "__main__":
    main()
