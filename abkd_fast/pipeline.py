"""A recipe's stages, one after the other. A finished stage runs no more; "stage:NAME" is its result in later ones."""

import dataclasses
import gc
import json
import pathlib
import sys

import torch
from rich.table import Table

from . import distributed, hub, processes
from .config.methods import WITHOUT_TEACHER
from .config.models import ModelConfig
from .config.schema import Config
from .console import console, shown, styled
from .data.rows import Row, read_rows
from .errors import ConfigError, Interrupted, check_number, of_stage
from .evaluation import tables
from .evaluation.evaluator import Evaluation
from .evaluation.runs import read_runs
from .finished import find_result, is_finished
from .generation import answers
from .stages import as_begun, check_all, models_of, protocol, read_stage_tokenizer, replaced, resolve
from .training.dry_run import describe
from .training.given import NOTHING, Given
from .training.prepare import Prepared, teacher_format, train_format, train_rows
from .training.show_rows import print_samples, shown_samples
from .training.trainer import Trainer


def run(stages: list[Config], resume: bool = False, given: Given = NOTHING) -> list[dict]:
    """Runs the stages that are not finished and returns the summary of every stage.

    resume: continues a stage that was begun. Without it such a stage is an error.
    given: objects that stand for models and rows of the stages, and functions that training calls.

    Raises ConfigError before any training, and what `Trainer.train` raises; Interrupted if a result can't be pushed.
    """
    distributed.run_on_rank0(hub.check, stages, False)
    console.print("checking models and rows")
    prepared = check_all(stages, given)
    stages = [resolve(config) for config in stages]
    for config in stages:
        with of_stage(config.run.stage):
            distributed.run_on_rank0(is_finished, config, resume)  # no stage trains before all folders are checked
    distributed.run_on_rank0(hub.check, stages, True)  # makes repositories, so all else is in order by now
    summaries = []
    for config in stages:
        with of_stage(config.run.stage):
            summaries.append(_run_stage(config, resume, prepared.pop(0), len(stages) == 1))
    distributed.run_on_rank0(_conclude, stages, summaries)
    if any(config.run.push_to_hub for config in stages):
        processes.run_last_on_rank0(hub.push_stages, stages)
    return summaries


def _run_stage(config: Config, resume: bool, prepared: Prepared, is_only: bool) -> dict:
    """Runs a stage unless it is finished, scores its result, and returns its summary."""
    summary = find_result(config, resume)
    if summary is None:
        if config.method == "generate":  # a kind of stage, not a training method
            summary = answers.write_stage(config, _take_prompts(config, prepared), resume)
        else:
            summary = Trainer(config, resume, prepared).train()
        _free_memory()
    if config.eval.sets and config.method != "generate":
        evaluation = _evaluate(config, prepared)
        _free_memory()
        if is_only:
            console.print(evaluation.table())
    return summary


def _take_prompts(config: Config, prepared: Prepared) -> list[Row]:
    return prepared.take_rows(*train_rows(config))


def _free_memory() -> None:
    """Frees a stage's weights. Compiled layers refer to themselves, so only the garbage collector finds them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _conclude(stages: list[Config], summaries: list[dict]) -> None:
    """Prints the tables of a recipe. Where results were scored it also says what distillation gained, and draws it."""
    if len(stages) > 1:
        console.print(_table(stages, summaries))
    trained = [config for config in stages if config.method != "generate"]
    if not any(config.eval.sets for config in trained):
        return
    runs = read_runs(config.run.folder for config in trained)
    if len(stages) > 1 and (scores := tables.score_table(runs)):
        console.print(scores.table())
    if sentence := tables.gain(runs):
        console.print(sentence)
    root = stages[0].run.root
    try:
        tables.write_report(runs, root)
        console.print(
            f"tables (of test sets) and figures (of data.dev) are in {root}, and in each stage's report.md",
        )
    except (ConfigError, Interrupted) as error:
        console.print(f"no figures: {error}")


def _evaluate(config: Config, prepared: Prepared) -> Evaluation:
    """Scores a stage's result on its test sets. Scores that are there already stay."""
    evaluated, folder = config.eval, config.run.folder
    arguments = str(folder / "final"), prepared.test_sets, folder / "eval", evaluated.seeds, protocol(config)
    evaluation = Evaluation(*arguments, device=config.train.device, dtype=config.train.dtype)
    evaluation.run()
    return evaluation


def plan(stages: list[Config], resume: bool = False, verbose: bool = False) -> None:
    """Prints what `run` would do. Loads no weights, writes no run folder. Raises ConfigError as `run` does.

    verbose: also the configuration of each stage, with all defaults.
    """
    distributed.run_on_rank0(hub.check, stages, False)
    students: dict[str, ModelConfig] = {}  # by stage
    prompts: dict[str, str] = {}  # by stage, the rows that it answers
    for config, known in zip(stages, check_all(stages), strict=True):
        specs = {role: as_begun(spec, students) for role, spec in models_of(config).items()}
        students[config.run.stage], prompts[config.run.stage] = specs["student"], config.data.train
        if config.data.stage:
            specs["data"] = dataclasses.replace(config.data, train=prompts[config.data.stage])
        with of_stage(config.run.stage):
            _plan_stage(config, specs, resume, known, verbose)


def _plan_stage(config: Config, specs: dict, resume: bool, prepared: Prepared, verbose: bool) -> None:
    """Prints what a stage would do. specs: sections in place of those that earlier stages write."""
    console.print(styled(f"{config.run.folder}", "bold"))
    if is_finished(resolve(config), resume):
        console.print("  is finished already: its result would be used")
        return
    if config.data.stage:
        console.print(f"  {config.data.train} is not written yet: these are the rows whose prompts it answers")
    if config.method == "generate":
        lines = answers.describe(config, _take_prompts(config, prepared))
    else:
        lines = describe(Trainer(replaced(config, specs), resume, prepared))
    for line in lines:
        console.print(line)
    if verbose:
        console.print(json.dumps(config.to_dict(), indent=2))


def show_rows(stages: list[Config], count: int) -> None:
    """Prints the first rows of each stage's training data as its model sees them. Loads no weights.

    Stages that see the same print it once. What was read, and what not, goes to stderr. Raises ConfigError.
    """
    check_number("show-rows", count, 1)
    samples, notes, earlier = [], {}, {}
    for config in stages:
        earlier[config.run.stage] = config
        with of_stage(config.run.stage):
            tokenizer = read_stage_tokenizer(config, earlier)
            data = resolve(config).data
            if config.data.stage and not pathlib.Path(data.train).exists():
                continue  # nothing is written yet
            source, limit, *others = train_rows(dataclasses.replace(config, data=data))
            rows = read_rows(source, min(count, limit or count), *others)
            notes |= dict.fromkeys(rows.notes)
            samples += shown_samples(rows, tokenizer, data, train_format(config), teacher_format(config, tokenizer))
    for note in notes:
        print(shown(note), file=sys.stderr)
    print_samples(samples)


def _table(stages: list[Config], summaries: list[dict]) -> Table:
    """A row for every stage: its losses and its seconds per sample (per answer, where it generates)."""
    table = Table("stage", "method", "loss", "dev loss before", "dev loss", "s/sample")
    losses_of = {"generate": "-"} | dict.fromkeys(WITHOUT_TEACHER, "cross-entropy")
    for config, summary in zip(stages, summaries, strict=True):
        losses = ["-" if summary[key] is None else f"{summary[key]:.4f}" for key in ("dev_loss_before", "dev_loss")]
        loss = losses_of.get(config.method, config.loss)
        table.add_row(config.run.stage, config.method, loss, *losses, f"{summary['seconds_per_sample']:.4f}")
    return table
