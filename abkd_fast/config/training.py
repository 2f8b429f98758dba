"""The keys of training: optimizer, steps, evaluation, logs and checkpoints."""

import dataclasses
import json
from typing import Annotated, Literal

from ..errors import ConfigError, check_number
from .sampling import NgramSize, SamplingKeys
from .section import Section

SEEDS = (10, 20, 30, 40, 50)  # the papers evaluate with these
OPTIMIZER_KEYS = {  # by optim.name: those keys of `optim` that only some optimizers read
    "adamw": ("betas", "eps"),
    "adam": ("betas", "eps"),
    "adamw8bit": ("betas", "eps"),
    "adagrad": ("eps",),
    "sgd": ("momentum",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer. Weights of one dimension (biases, norms) don't decay, except those of a LoRA adapter."""

    name: Annotated[
        Literal["adamw", "adam", "adamw8bit", "adagrad", "sgd"],
        "optimizer; adamw8bit: AdamW whose moments have 8 bits (needs bitsandbytes)",
    ] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 5e-4
    min_lr: Annotated[float, "learning rate at the end of cosine and linear"] = 1e-7
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], "learning rate after the warm-up: down to min_lr, or as it is"
    ] = "cosine"
    warmup_steps: Annotated[int, "steps in which the learning rate rises from 0 to lr", 0] = 0
    warmup_ratio: Annotated[float | None, "these steps as a share of all, in place of warmup_steps", 0, 1] = None
    weight_decay: Annotated[
        float, "weight decay: decoupled in adamw and adamw8bit, a part of the gradient in the others", 0
    ] = 0.01
    betas: Annotated[tuple[float, float], "adamw, adam, adamw8bit: decay rates of the two moments"] = (0.9, 0.999)
    eps: Annotated[float, "all but sgd: added to the square root that divides a gradient"] = 1e-8
    momentum: Annotated[float, "sgd: share of the last update that is added to the next one", 0] = 0.0
    clip_norm: Annotated[float, "a gradient with a larger norm is scaled down to this norm"] = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected above 0", name)
        check_number("min_lr", self.min_lr, 0, self.lr)
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ConfigError("warmup_ratio: there is warmup_steps, too; give one of the two", "warmup_ratio")
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}, expected two numbers from 0 up to 1", "betas")
        if not self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}, expected from 0 up to 1", "momentum")
        for key in ("betas", "eps", "momentum"):
            readers = [name for name, keys in OPTIMIZER_KEYS.items() if key in keys]
            if self.name not in readers and getattr(self, key) != getattr(OptimConfig, key):
                problem = f"{self.name} does not read it, only {', '.join(readers)}"
                raise ConfigError(f"{key}: {problem}: leave it out", key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training loop. A step takes batch_size samples; max_tokens only decides how many are computed at once."""

    epochs: Annotated[int, "passes over the training rows", 1] = 10
    steps: Annotated[int | None, "number of steps; it replaces epochs", 1] = None
    batch_size: Annotated[int, "samples of one optimizer step", 1] = 32
    max_tokens: Annotated[int, "tokens of a micro-batch, at most; packed without padding", 1] = 8192
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"], "type to compute in; auto: bfloat16 on a GPU, else float32"
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to compute; auto: the GPU if there is one"] = "auto"
    gradient_checkpointing: Annotated[bool, "compute the student's layers again in the backward pass"] = False
    compile: Annotated[Literal["auto", "off"], "auto: uses torch.compile on a GPU"] = "auto"
    on_nonfinite: Annotated[
        Literal["stop", "skip"], "if the loss or gradient of a step is not finite: end the run, or change no weight"
    ] = "stop"
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp"],
        "with several processes: each holds all weights (ddp), or a part of those of both models (fsdp); auto: ddp",
    ] = "auto"
    timeout_minutes: Annotated[float, "a process that waits longer for the others ends the run", 0.01] = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingKeys):
    """During training: loss and ROUGE-L on data.dev (sampled with max_new_tokens alone). After it: test sets."""

    every_steps: Annotated[
        int | None, "steps between evaluations (default: an epoch); also before the first and after the last step", 1
    ] = None
    patience: Annotated[
        int | None, "evaluations in a row without a better one (by select, or the dev loss) that end the run", 1
    ] = None
    rouge_rows: Annotated[int | None, "dev rows that the student also answers, for ROUGE-L (null: none)", 1] = None
    select: Annotated[
        Literal["last", "dev_loss", "rouge_l"],
        "step whose weights go to final/: the last one, that of the lowest dev loss, or that of the highest ROUGE-L",
    ] = "last"
    sets: Annotated[dict | None, "test sets {NAME: JSONL file} for the result; scores go to eval/"] = None
    seeds: Annotated[tuple[int, ...], "seeds of the answers to test sets"] = SEEDS
    no_repeat_ngram_size: NgramSize = 6
    begin_token: Annotated[
        Literal["auto", True, False] | None, "begin token before each prompt of a test set (null: data.begin_token)"
    ] = None
    rouge_tokens: Annotated[
        Literal["words", "characters"], "units of ROUGE-L; characters for languages that rouge_score's words leave out"
    ] = "words"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "rouge_l" and self.rouge_rows is None:
            raise ConfigError("select is rouge_l, but rouge_rows is missing; give it, or select last", "select")
        for name, path in (self.sets or {}).items():
            if not isinstance(path, str):
                raise ConfigError(f"sets.{name} must be text, got {json.dumps(path)[:60]}", "sets")
        if not self.seeds or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}, expected at least one, from 0 to {2**32 - 1}", "seeds")
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}: one is given twice", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Logs: metrics.jsonl, samples.jsonl, TensorBoard and the terminal."""

    every_steps: Annotated[int, "steps that one logged point summarizes", 1] = 10
    wandb: Annotated[str | None, "project of Weights & Biases that also gets the points (needs wandb)"] = None
    trackio: Annotated[str | None, "project of trackio that also gets the points (needs trackio)"] = None
    samples: Annotated[
        int | None, "dev prompts, the first ones, that the student answers for the log at each evaluation", 0
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints for --resume; each is also a model folder. SIGTERM and Ctrl-C save one and end the run."""

    every_steps: Annotated[int | None, "steps between checkpoints (default: an epoch); best steps are saved too", 1] = (
        None
    )
    keep: Annotated[int, "number of newest checkpoints to keep, besides the best one", 1] = 2
