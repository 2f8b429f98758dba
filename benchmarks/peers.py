"""A training step of other projects' distillation trainers, against ours: `python benchmarks/peers.py`.

Models, batches and the divergence, Jensen-Shannon, are those of timing.py's GKD row on the data; every step is forward,
backward, clipping and AdamW. TRL's trainers, from `pip install '.[bench]'`, run as they are, without gradient
checkpointing, on batches padded to their longest sample; so does Liger-Kernel's fused loss, in a plain loop, on a GPU.
What isn't there is skipped with a note. Tables go to the terminal, and as JSON and Markdown to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import datasets
import torch
from torch import Tensor, nn

from abkd_fast.config.schema import Config
from abkd_fast.errors import first_line
from harness import at_least, measure, spread
from published import PaddedBatch, pad, token_positions
from rivals import PEER_BETA, liger
from steps import Numbers, Turn
from timing import Benchmark
from workload import SCALES

OURS = "ours"
Step = Callable[[Turn], Numbers]


class PeerBenchmark(Benchmark):
    def config(self, name: str, cache: str = "off") -> Config:
        """TRL's trainers switch dropout off."""
        config = super().config(name, cache)
        return dataclasses.replace(config, student=dataclasses.replace(config.student, dropout=0.0))

    def build(self) -> None:
        super().build()
        self.report.judge = self.options.scale != "tiny"
        # Modules of their own on the same weights, with what transformers gives for attention and activations.
        side = self.published.trainer
        self.student, self.teacher, self.optimizer = side.student, side.teacher, side.optimizer
        for model in (self.student, self.teacher):
            model.base_model.register_forward_pre_hook(_add_positions, with_kwargs=True)

    def peers(self) -> dict[str, Step]:
        """Of ours, of the published way, and of every peer that runs and comes to the same loss and gradient norm."""
        steps = {
            OURS: self.ours.data("GKD", "ours"),
            "ours, teacher's states cached": self.ours.data("GKD", "cached"),
            "published way": self.published.data("GKD"),
        }
        makers = {
            "TRL, DistillationTrainer": self.distillation_trainer,
            "TRL, GKDTrainer": self.gkd_trainer,
            "Liger-Kernel's loss": self.liger,
        }
        turn = self.turns[0]
        expected = [value.item() for value in steps[OURS](turn)]
        for name, make in makers.items():
            try:
                step = make()
                numbers = [value.item() for value in step(turn)]
            except Exception as error:  # a missing package, or an interface that has moved, shows itself in many ways
                self.report.note(f"{name}: skipped ({first_line(error)})")
                continue
            loss, norm = (abs(value / own - 1) for value, own in zip(numbers, expected, strict=True))
            self.report.note(f"{name}: its loss differs by {loss:.0e}, its gradient norm by {norm:.0e}")
            if max(loss, norm) <= self.tolerance:
                steps[name] = step
        return steps

    def arguments(self) -> dict:
        """Of both of TRL's configurations."""
        return {
            "output_dir": str(self.folder / "trl"),
            "beta": PEER_BETA,
            "temperature": 1.0,
            "per_device_train_batch_size": self.batch_size,
            "gradient_checkpointing": False,
            "learning_rate": 1e-30,
            "bf16": self.trainer.dtype == torch.bfloat16,
            "use_cpu": self.trainer.device.type == "cpu",
            "report_to": [],
        }

    def distillation_trainer(self) -> Step:
        """On given responses: it writes its own otherwise."""
        from trl import DistillationConfig, DistillationTrainer

        trainer = DistillationTrainer(
            model=self.student,
            teacher_model=self.teacher,
            args=DistillationConfig(**self.arguments()),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1"]}),
            processing_class=self.trainer.tokenizer,
        )
        trainer._prepare_inputs = lambda inputs: inputs  # where it would generate
        trainer.current_gradient_accumulation_steps = 1  # as its loop sets it

        def inputs(turn: Turn) -> dict[str, Tensor]:
            prompts = [sample["input_ids"][: sample["prompt_length"]] for sample in turn.samples]
            responses = [sample["input_ids"][sample["prompt_length"] :] for sample in turn.samples]
            values = {}
            for kind, rows, left in (("prompt", prompts, True), ("completion", responses, False)):
                values[f"{kind}_ids"], values[f"{kind}_mask"] = _pad(rows, left, self.trainer.device)
            return values | {"num_items_in_batch": values["completion_mask"].sum()}

        return lambda turn: self.trl_step(trainer, inputs(turn))

    def gkd_trainer(self) -> Step:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trainer = GKDTrainer(
            model=self.student,
            teacher_model=self.teacher,
            args=GKDConfig(**self.arguments(), lmbda=0.0, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2]]}),
            processing_class=self.trainer.tokenizer,
        )

        def inputs(turn: Turn) -> dict[str, Tensor]:
            ids, mask = _pad([sample["input_ids"] for sample in turn.samples], False, self.trainer.device)
            labels = ids.masked_fill(mask == 0, -100)
            for row, sample in enumerate(turn.samples):
                labels[row, : sample["prompt_length"]] = -100
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        def step(turn: Turn) -> Numbers:
            values = inputs(turn)
            return self.trl_step(trainer, values, (values["labels"] != -100).sum())

        return step

    def trl_step(self, trainer: object, inputs: dict[str, Tensor], items: Tensor | None = None) -> Numbers:
        return trainer.training_step(self.student, inputs, items), self.update()

    def liger(self) -> Step:
        def step(turn: Turn) -> Numbers:
            longest = max(len(sample["input_ids"]) for sample in turn.samples)
            batch = pad(turn.samples, longest, self.trainer.device)
            kept = batch.labels != -100
            with self.trainer.precision():
                with torch.no_grad():
                    theirs = _states(self.teacher, batch, kept)
                loss = liger(*_states(self.student, batch, kept), *theirs)
            loss.backward()
            return loss.detach(), self.update()

        return step

    def update(self) -> Tensor:
        """Returns the gradient norm."""
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.trainer.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def run(self) -> None:
        self.build()
        steps, rounds = self.peers(), []
        for turn in self.turns[1:]:
            candidates = {name: functools.partial(step, turn) for name, step in steps.items()}
            rounds.append(measure(candidates, 1, warm=self.trainer.device.type == "cpu"))
        times = {name: [each[name][0] / self.batch_size for each in rounds] for name in steps}
        rows = []
        for name, values in times.items():
            ratio = statistics.median(theirs / own for theirs, own in zip(values, times[OURS], strict=True))
            target = {"target": at_least(3)} if name.startswith("TRL") else {}
            rows.append(spread(name, values, ratio=ratio, all_ms=values, **target))
        columns = {"name": ("", ""), "ms": ("ms", ".2f"), "range": ("min..max", ""), "ratio": ("x ours", ".2f")}
        self.report.table("peers", f"milliseconds/sample, medians of {self.options.repeats}", rows, columns)


def _pad(rows: list[list[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, longest] both."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _add_positions(module: nn.Module, inputs: tuple, settings: dict) -> tuple[tuple, dict]:
    """DistillationTrainer passes none, and GPT-2 would count the padding before a prompt."""
    if settings.get("position_ids") is None:
        settings = settings | {"position_ids": token_positions(settings["attention_mask"])}
    return inputs, settings


def _states(model: nn.Module, batch: PaddedBatch, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states [N, H] of the positions that are kept, and the projection [V, H]."""
    input_ids, attention_mask = batch.inputs
    states = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    return states[kept].to(torch.bfloat16), weight.to(torch.bfloat16)  # Liger-Kernel's products know no autocast


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = pathlib.Path(__file__).parent / "results" / "peers"
    gpu = torch.cuda.is_available()
    parser.add_argument("--scale", choices=SCALES, default="paper" if gpu else "small", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="samples of a step (default: the scale's)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    vars(options).update(methods=["GKD"], pretrain=False, overhead=False)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = PeerBenchmark(options, pathlib.Path(folder))
        try:
            benchmark.run()
        finally:  # what was measured before a failure is kept
            benchmark.report.save(options.out / "peers.json")


if __name__ == "__main__":
    main()
