"""Scores a model on test sets, as the papers do. The files of responses grow response by response.

The papers' protocol: plain sampling, no 6-gram twice, at most 256 new tokens, the first 256 tokens of a prompt, and
the mean over five seeds.
"""

import contextlib
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable

from rich.table import Table

from .. import distributed, processes
from ..config.schema import SamplingConfig
from ..config.training import SEEDS
from ..console import console
from ..errors import ConfigError, check_number
from ..files import check_path_length, check_writable, locked, read_json, write_json
from ..generation.answers import Generator
from ..generation.growing_file import GrowingFile
from ..generation.sampling import response_seeds
from ..json_shape import problem
from ..models import loading
from . import rouge
from .test_sets import Protocol, TestSet, read_sets

METRICS = {"rouge_l": 1, "exact_match": 100}  # factors: exact match is a percentage
SCORES = "scores.json"
SUMMARY = {"mean": (float, None), "std": (float, None), "seeds": {"*": float}}
SHAPE = {  # of scores.json
    "weights": dict,
    "settings": {"rouge_tokens?": str, "*": (str, float, bool, None)},
    "sets": {"*": {"rows": int, "cut_prompts": int, "content": str, **dict.fromkeys(METRICS, SUMMARY)}},
}


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
        chat_template: str | None = None,
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
            chat_template: a file with one in place of the tokenizer's.

        Raises ConfigError.
        """
        check_path_length("out", out, is_written=True)
        self.name, self.out, self.seeds, self.protocol = model, out, list(seeds), protocol
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}: one is given twice")
        if protocol.sampling.temperature == 0:
            del self.seeds[1:]
        check_number("rows", rows, 1)
        named = (tokenizer, "tokenizer") if tokenizer else (model, "model")
        options = batch_size, device, dtype, protocol.style, chat_template
        self.model = Generator(loading.model_spec(model), named, protocol.sampling, *options)
        self.tokenizer = self.model.tokenizer
        is_read = isinstance(sets, list)
        self.sets = sets if is_read else read_sets(sets, self.tokenizer, self.model.hf_config, protocol, rows)
        self.scores = {
            "model": model,
            "weights": self.model.hash_weights(),
            "settings": {**protocol.to_dict(), **self.model.token_settings(), "dtype": self.model.dtype_name},
            "sets": {},
        }
        processes.check_same({**self.scores, **{f"set {test.name}": test.identity() for test in self.sets}})
        self.scores["sets"] = distributed.run_on_rank0(self._scores_so_far)
        if self._todo():
            distributed.run_on_rank0(check_writable, "out", out)

    def _file(self, name: str, seed: int) -> pathlib.Path:
        return self.out / f"{name}.seed{seed}.jsonl"

    def _scores_so_far(self) -> dict:
        """The scores in the folder, by sets. Raises ConfigError if they are of another model, setting or set."""
        path, then = self.out / SCORES, {"sets": {}}
        if path.exists():
            then = read_scores(path)
            # Earlier versions did not write all settings: the tokenizer's end token alone ended responses.
            known = {"end_tokens": str(self.tokenizer.eos_token_id), **then["settings"]}
            changed = [key for key, value in self.scores["settings"].items() if known.get(key, value) != value]
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
        return then["sets"]

    def run(self) -> dict:
        """Prints the settings, scores what has no scores yet, and returns the content of `scores.json`.

        Raises Interrupted after a signal, and if there is no room on the disk. Raises ConfigError if another process
        works in the same folder.
        """
        for line in self._describe():
            console.print(line)
        if self._todo():
            with distributed.rank0_context(locked(self.out)):
                # Again: another process may have added scores meanwhile.
                self.scores["sets"] = distributed.run_on_rank0(self._scores_so_far)
                with self.model.loaded(self.out):
                    for test, seeds in self._todo():
                        self._score(test, seeds)
        return self.scores

    def _todo(self) -> list[tuple[TestSet, list[int]]]:
        """The sets that lack scores of some seeds, and those seeds."""
        scored = {(name, seed) for name, scores in self.scores["sets"].items() for seed in scores["rouge_l"]["seeds"]}
        todo = [(test, [seed for seed in self.seeds if (test.name, str(seed)) not in scored]) for test in self.sets]
        return [(test, seeds) for test, seeds in todo if seeds]

    def _describe(self) -> Iterable[str]:
        known = {name: value for name, value in self.scores["settings"].items() if value is not None}
        settings = ", ".join(f"{name} {value}" for name, value in known.items())
        yield f"{self.name}: {settings}; on {self.model.device}"
        for test in self.sets:
            cut = f"; {test.cut} prompts cut to {self.protocol.max_prompt_length} tokens" if test.cut else ""
            yield f"  {test.name}: {test.note}{cut}"
            if note := rouge.unsuited(test.references, self.protocol.rouge_tokens):
                yield f"  {test.name}: {note} --rouge-tokens characters (eval.rouge_tokens)"

    def _score(self, test: TestSet, seeds: list[int]) -> None:
        """Answers a set with all seeds in one stream, so that the batch stays full to the end, and scores it."""
        scores = self.scores["sets"].setdefault(
            test.name, {"source": test.source, **test.identity(), **{metric: summarize({}) for metric in METRICS}}
        )
        self._write()

        def is_own(values: dict) -> bool:
            prompt = test.prompts[values["row"] :][:1]
            answered = [self.tokenizer.decode(ids) for ids in prompt] == [values.get("prompt")]
            return answered and not problem(values, dict.fromkeys(METRICS, (float, bool)))

        with contextlib.ExitStack() as stack:
            files = {seed: stack.enter_context(GrowingFile(self._file(test.name, seed), is_own)) for seed in seeds}
            todo = [(seed, row) for seed in seeds for row in range(len(test.prompts)) if row not in files[seed].rows]

            def keep(number: int, response: list[int]) -> None:
                seed, row = todo[number]
                values = {"prompt": self.tokenizer.decode(test.prompts[row]), "output": test.references[row]}
                unit = self.protocol.rouge_tokens
                scored = rouge.score_response(self.tokenizer, response, test.references[row], unit)
                files[seed].add(row, values | scored)

            prompts = [test.prompts[row] for _, row in todo]
            self.model.generate(prompts, response_seeds(todo), keep, f"answers to {test.name}")
        for seed in seeds:
            answers = files[seed].sort()
            for metric, scale in METRICS.items():
                mean = scale * statistics.fmean(values[metric] for values in answers)
                scores[metric] = summarize(scores[metric]["seeds"] | {str(seed): mean})
        self._write()

    def _write(self) -> None:
        distributed.run_on_rank0(write_json, self.out / SCORES, self.scores)

    def table(self) -> Table:
        """The scores of this evaluation's sets, for the terminal: over all seeds that `scores.json` has."""
        table = Table("set", "rows", "seeds", rouge.named("ROUGE-L", self.protocol.rouge_tokens), "exact match")
        for test in self.sets:
            scores = self.scores["sets"][test.name]
            seeds = str(len(scores["rouge_l"]["seeds"]))
            cells = (spread(scores[metric]) for metric in METRICS)
            table.add_row(test.name, str(scores["rows"]), seeds, *cells)
        return table


def read_scores(path: pathlib.Path) -> dict:
    """The content of a `scores.json`. Raises ConfigError if it can't be read."""
    scores = read_json(path, shape=SHAPE)
    seeds = [summary[metric]["seeds"] for summary in scores["sets"].values() for metric in METRICS]
    if not all(map(math.isfinite, itertools.chain.from_iterable(each.values() for each in seeds))):
        raise ConfigError(f"{path} can't be read (a score is not finite): move it aside")
    scores["settings"].setdefault("rouge_tokens", "words")  # earlier versions knew no other unit
    return scores


def spread(summary: dict | None, digits: int = 1) -> str:
    """The mean and, with several seeds, the standard deviation in brackets: "25.1 (0.3)"; "-" without scores."""
    if summary is None:
        return "-"
    deviation = "" if summary["std"] is None else f" ({summary['std']:.{digits}f})"
    return f"{summary['mean']:.{digits}f}{deviation}"


def summarize(seeds: dict[str, float]) -> dict:
    """The mean and the sample standard deviation of scores by seed."""
    values = seeds.values()
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values) if values else None, "std": std, "seeds": seeds}
