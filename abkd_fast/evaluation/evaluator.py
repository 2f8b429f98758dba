"""Scores a model on test sets, as the papers do. The files of responses grow response by response.

The papers' protocol: plain sampling, no 6-gram twice, at most 256 new tokens, the first 256 tokens of a prompt, and
the mean over five seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Iterable

import torch
from rich.markup import escape
from rich.table import Table

from .. import distributed
from ..config.schema import SEEDS, SamplingConfig
from ..console import console
from ..device import choose_device, choose_dtype
from ..errors import ConfigError, Interrupted, check_number
from ..files import WRITE_ERRORS, atomic_write, check_writable, locked
from ..generation.answers import GrowingFile, generate
from ..models import identity, loading
from ..models.packed import PackedCausalLM
from . import rouge
from .test_sets import Protocol, TestSet, read_sets

METRICS = ("rouge_l", "exact_match")
SCORES = "scores.json"


class Evaluation:
    """Scores one model on test sets. Its responses and `scores.json` go to one folder."""

    def __init__(
        self,
        model: str,
        sets: dict[str, str] | list[TestSet],
        out: pathlib.Path,
        seeds: Iterable[int] = SEEDS,
        protocol: Protocol = Protocol(),  # noqa: B008 - it is frozen
        *,
        rows: int | None = None,
        tokenizer: str | None = None,
        batch_size: int = SamplingConfig.batch_size,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Checks all that can be checked without weights, and finds responses that are there already. Writes nothing.

        Args:
            model: a folder or Hub name, or the folder of a LoRA adapter.
            sets: by name, JSONL files or folders of the papers' .bin and .idx files; or what `read_sets` has read of
                such, with this protocol and the model's tokenizer.
            seeds: seeds of sampling; at temperature 0, where they change nothing, only the first one is used.
            rows: use only the first ones of each set.
            tokenizer: folder or Hub name; the model's by default.

        Raises ConfigError.
        """
        self.model, self.out, self.seeds, self.batch_size = model, out, list(seeds), batch_size
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}: one is given twice")
        if protocol.sampling.temperature == 0:
            del self.seeds[1:]
        for name, value in {"rows": rows, "batch_size": batch_size}.items():
            check_number(name, value, 1)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.spec = loading.model_spec(model)
        self.hf_config = loading.read_hf_config(self.spec, "model")
        self.tokenizer = loading.read_tokenizer(tokenizer or model, "tokenizer" if tokenizer else "model")
        loading.check_vocabularies(self.tokenizer, self.hf_config, None, None)
        self.protocol = protocol
        self.sampling = dataclasses.replace(protocol.sampling, eos_token_ids=(self.tokenizer.eos_token_id,))
        is_read = isinstance(sets, list)
        self.sets = sets if is_read else read_sets(sets, self.tokenizer, self.hf_config, protocol, rows)
        self.scores = {
            "model": model,
            "weights": identity.hash_weights(self.spec, self.hf_config, "model"),
            "settings": {**protocol.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")},
            "sets": {},
        }
        self._take_over()
        if self._todo():
            check_writable("out", out)

    def _file(self, name: str, seed: int) -> pathlib.Path:
        return self.out / f"{name}.seed{seed}.jsonl"

    def _take_over(self) -> None:
        """Takes over the scores in the folder. Raises ConfigError if they are of another model, setting or set."""
        path, then = self.out / SCORES, {"sets": {}}
        if path.exists():
            then = read_scores(path)
            changed = [key for key, value in self.scores["settings"].items() if then["settings"].get(key) != value]
            if then["weights"] != self.scores["weights"]:
                changed = ["weights", *changed]
            if changed:
                raise ConfigError(f"out: {path} is of other {', '.join(changed)}: choose another, or delete {self.out}")
        for test in self.sets:
            known = then["sets"].get(test.name)
            found = next((file for seed in self.seeds if (file := self._file(test.name, seed)).exists()), None)
            if found and known is None:
                raise ConfigError(f"out: {found} exists, and not as the result of this command: choose another folder")
            if known and any(known[key] != value for key, value in test.identity().items()):
                raise ConfigError(f"out: {path} has scores of another {test.name}: choose another folder")
        self.scores["sets"] = then["sets"]

    def run(self) -> dict:
        """Prints the settings, scores what has no scores yet, and returns the content of `scores.json`.

        Raises Interrupted after a signal, and if there is no room on the disk. Raises ConfigError if another process
        works in the same folder.
        """
        for line in self._describe():
            console.print(line, markup=False)
        if self._todo():
            with distributed.rank0_context(locked(self.out)):
                self._take_over()  # again: another process may have added scores meanwhile
                self._score_all()
        return self.scores

    def _score_all(self) -> None:
        model = loading.load(self.spec, self.hf_config, "model", self.dtype, self.device)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                model.check()
                for test, seeds in self._todo():
                    self._score(model, test, seeds)
        except WRITE_ERRORS as error:
            raise Interrupted(f"{self.out} can't be written ({error}): make room") from None

    def _todo(self) -> list[tuple[TestSet, list[int]]]:
        """The sets that lack scores of some seeds, and those seeds."""
        todo = [(test, [seed for seed in self.seeds if not self._is_scored(test, seed)]) for test in self.sets]
        return [(test, seeds) for test, seeds in todo if seeds]

    def _is_scored(self, test: TestSet, seed: int) -> bool:
        scores = self.scores["sets"].get(test.name)
        return scores is not None and str(seed) in scores["rouge_l"]["seeds"]

    def _describe(self) -> Iterable[str]:
        settings = ", ".join(f"{name} {value}" for name, value in self.scores["settings"].items())
        yield f"{self.model}: {settings}; on {self.device}"
        for test in self.sets:
            cut = f", {test.cut} prompts cut to {self.protocol.max_prompt_length} tokens" if test.cut else ""
            yield f"  {test.name}: {len(test.prompts)} rows of {test.source}{cut}"
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        if begins and not self.protocol.begin_token:
            begin = self.tokenizer.bos_token
            yield f"  prompts have no {begin}, as in training; the papers' test prompts had one: --bos"

    def _score(self, model: PackedCausalLM, test: TestSet, seeds: list[int]) -> None:
        """Answers a set with all seeds in one stream, so that the batch stays full to the end, and scores it."""
        scores = self.scores["sets"].setdefault(
            test.name, {"source": test.source, **test.identity(), **{metric: summarize({}) for metric in METRICS}}
        )
        self._write()
        with contextlib.ExitStack() as stack:
            files = {seed: stack.enter_context(GrowingFile(self._file(test.name, seed))) for seed in seeds}
            todo = [(seed, row) for seed in seeds for row in range(len(test.prompts)) if row not in files[seed].rows]

            def keep(number: int, response: list[int]) -> None:
                seed, row = todo[number]
                values = {"prompt": self.tokenizer.decode(test.prompts[row]), "output": test.references[row]}
                files[seed].add(row, values | rouge.score_response(self.tokenizer, response, test.references[row]))

            prompts = [test.prompts[row] for _, row in todo]
            numbers = rouge.response_seeds(todo)
            generate(model, prompts, self.sampling, numbers, self.batch_size, keep, f"answers to {test.name}")
        for seed in seeds:
            answers = files[seed].sort()
            for metric in METRICS:
                values = scores[metric]["seeds"] | {str(seed): _mean(answers, metric)}
                scores[metric] = summarize(values)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.scores, indent=2) + "\n"
        distributed.run_on_rank0(functools.partial(atomic_write, self.out / SCORES, text))

    def table(self) -> Table:
        """The scores of this evaluation's sets, for the terminal: over all seeds that `scores.json` has."""
        table = Table("set", "rows", "seeds", "ROUGE-L", "exact match")
        for test in self.sets:
            scores = self.scores["sets"][test.name]
            seeds = str(len(scores["rouge_l"]["seeds"]))
            cells = (spread(scores[metric]) for metric in METRICS)
            table.add_row(escape(test.name), str(scores["rows"]), seeds, *cells)
        return table


def read_scores(path: pathlib.Path) -> dict:
    """The content of a `scores.json`. Raises ConfigError if it can't be read."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read ({error}): move it aside") from None
    if not _is_complete(scores):
        raise ConfigError(f"{path} can't be read (it is no evaluation's): move it aside")
    return scores


def _is_complete(scores: object) -> bool:
    """Whether the content of a `scores.json` has everything that is read."""
    try:
        sets = [*scores["sets"].values()]
        summaries = [values[metric] for values in sets for metric in METRICS]
        complete = all({"rows", "cut_prompts", "content"} <= values.keys() for values in sets)
        complete &= all({"mean", "std"} <= s.keys() and isinstance(s["seeds"], dict) for s in summaries)
        return complete and isinstance(scores["settings"], dict) and "weights" in scores
    except (AttributeError, KeyError, TypeError):
        return False


def spread(summary: dict) -> str:
    """The mean and, with several seeds, the standard deviation in brackets: "25.1 (0.3)"."""
    deviation = "" if summary["std"] is None else f" ({summary['std']:.1f})"
    return f"{summary['mean']:.1f}{deviation}"


def summarize(seeds: dict[str, float]) -> dict:
    """The mean and the sample standard deviation of scores by seed."""
    values = list(seeds.values())
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": seeds,
    }


def _mean(answers: list[dict], metric: str) -> float:
    """The mean over responses; for exact match, the percentage."""
    scale = 100 if metric == "exact_match" else 1
    return scale * statistics.fmean(values[metric] for values in answers)
