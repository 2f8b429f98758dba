"""Instruction data: read, check, tokenise, pack."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import datasets
import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config.schema import ConfigError
from . import indexed_dataset, quickstart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompt of the ABKD, DistiLLM and MiniLLM papers (Stanford Alpaca's).
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# Names of the indexed binary files that a folder may hold.
TRAIN, DEV = ("train",), ("dev", "valid")

# Columns of tokenised data.
SAMPLE = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "prompt_length": datasets.Value("int32")}
)
ROW = datasets.Features({**SAMPLE, "row": datasets.Value("int64"), "row_length": datasets.Value("int32")})


@dataclasses.dataclass(frozen=True)
class Row:
    """One checked row. `where` names its file and line for messages."""

    where: str
    values: dict  # prompt and output, messages, or prompt_ids and output_ids
    outputs: object = None  # of a row of JSON, unchecked: of several, `values` has the first


def read_rows(
    source: str, limit: int | None = None, splits: tuple[str, ...] = TRAIN, prompts_only: bool = False
) -> list[Row]:
    """Rows of a JSONL file, of all JSONL files of a folder, of a Hub data set's train split, or of the quickstart.

    Indexed binary files are read, too. In a folder they come first, as the papers' tools leave the same rows, of all
    splits, as JSONL beside them; `splits` says whose files they are. Of several outputs a row has the first.

    Raises ConfigError, naming file and line, for a missing or empty source, broken JSON, and rows without a prompt
    or with an output that is missing, not text, or empty. With `prompts_only` outputs of JSON rows are not read: all
    are empty.
    """
    rows = list(itertools.islice(_rows(source, splits, prompts_only), limit))
    if not rows:
        raise ConfigError(f"{source}: has no rows")
    return rows


def _rows(source: str, splits: tuple[str, ...], prompts_only: bool) -> Iterator[Row]:
    parts = indexed_dataset.find(source, splits)
    for part in parts:
        for where, ids in indexed_dataset.read_items(part):
            prompt, output = indexed_dataset.split_item(where, ids)
            yield Row(where, {"prompt_ids": prompt, "output_ids": output})
    if not parts:
        for where, values in _raw_rows(source):
            checked = _check(_without_output(values) if prompts_only else values, where, prompts_only)
            yield Row(where, checked, _outputs(values))


def _raw_rows(source: str) -> Iterator[tuple[str, object]]:
    path = pathlib.Path(source)
    if source.startswith("quickstart:"):
        for number, values in enumerate(quickstart.rows(source.partition(":")[2]), 1):
            yield f"{source} row {number}", values
    elif path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise ConfigError(f"{source}: a folder without .jsonl files")
        for file in files:
            yield from read_jsonl(file)
    elif path.is_file():
        yield from read_jsonl(path)
    elif path.suffix or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise ConfigError(f"{source}: no such file or folder")
    else:
        try:
            loaded = datasets.load_dataset(source, split="train")
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{source}: no such file, and no data set of that name on the Hub ({reason})") from None
        for number, values in enumerate(loaded, 1):
            yield f"{source} row {number}", values


def read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    """Where each line of a file is, and its JSON value. Raises ConfigError for what can't be read as that."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    values = json.loads(line)
                    if "\\u" in line:  # only an escape can make what no text has
                        json.dumps(values, ensure_ascii=False).encode()
                    yield f"{path} line {number}", values
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} line {number}: broken JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{path} line {number}: has half of a surrogate pair, which no text has") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text after line {number} ({error.reason})") from None


def _without_output(values: object) -> object:
    """The same row with an empty output, or an empty last message by the assistant."""
    if not isinstance(values, dict):
        return values
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        return {**values, "output": ""}
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return {"messages": [*messages, {"role": "assistant", "content": ""}]}


def _outputs(values: dict) -> object:
    """What a checked row has as its output or outputs."""
    if "messages" not in values:
        return values.get("output")
    last = values["messages"][-1]
    return last.get("content") if last["role"] == "assistant" else None


def _check(values: object, where: str, empty_output: bool = False) -> dict:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object with instruction, input and output")
    ended = {"ended": False} if values.get("ended") is False else {}  # an answer that was cut teaches no end
    if "messages" in values:
        messages = values["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ConfigError(f'{where}: "messages" must be objects with role and content, the last by the assistant')
        if not empty_output and not messages[-1]["content"].strip():
            raise ConfigError(f"{where}: the last message is empty: nothing to learn")
        return {"messages": messages, **ended}
    prompt_key = "prompt" if "prompt" in values else "instruction"
    if isinstance(values.get("output"), list) and values["output"]:
        values = {**values, "output": values["output"][0]}  # as the papers train on sets with several references
    for key in (prompt_key, "output"):
        if key not in values:
            keys = ", ".join(values) or "none"
            raise ConfigError(f'{where}: missing "{key}"; keys are {keys} (expected instruction, input, output)')
        if not isinstance(values[key], str):
            raise ConfigError(f'{where}: "{key}" must be text, got {json.dumps(values[key])[:60]}')
    if not empty_output and not values["output"].strip():
        raise ConfigError(f'{where}: "output" is empty: nothing to learn')
    extra = values.get("input") or ""
    if not isinstance(extra, str):
        raise ConfigError(f'{where}: "input" must be text, got {json.dumps(extra)[:60]}')
    if prompt_key == "prompt":
        return {"prompt": values["prompt"], "output": values["output"], **ended}
    template = PROMPT_WITH_INPUT if extra else PROMPT
    prompt = template.format(instruction=values["instruction"], input=extra)
    return {"prompt": prompt, "output": values["output"], **ended}


def tokenise(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int | None = None
) -> datasets.Dataset:
    """Columns input_ids (prompt, response and the end token), prompt_length, row and row_length; lengths in tokens.

    As in the papers, the prompt is tokenised alone and the response as the rest of both together, without a begin
    token; rows whose prompt has more than max_prompt_length tokens are left out, and sequences cut to max_length.
    `row` is a sample's place in `rows`, row_length its length before the cut. The result is kept in the `datasets`
    cache under a hash of rows, tokenizer and limits.

    Raises ConfigError where no row is left, where a prompt leaves no room for a response, and for foreign token ids.
    """
    _check_rows(rows, tokenizer)
    content = [json.dumps(row.values, default=np.ndarray.tolist) for row in rows]
    limits = max_length, max_prompt_length
    key = fingerprint(content, tokenizer, limits)
    raw = datasets.Dataset.from_dict({"row": content})
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    dataset = raw.map(
        lambda batch, numbers: _encode([json.loads(row) for row in batch["row"]], numbers, tokenizer, *limits),
        batched=True,
        with_indices=True,
        remove_columns=["row"],
        features=ROW,
        cache_file_name=str(arrow_file(key)),
        new_fingerprint=key,
    )
    if progress:
        datasets.enable_progress_bar()
    if not len(dataset):
        raise ConfigError(
            f"{rows[0].where} and all others: the prompts exceed {max_prompt_length} tokens, so no row is left; raise "
            "data.max_prompt_length"
        )
    for number, length in zip(dataset["row"][:], dataset["prompt_length"][:], strict=True):
        where = rows[number].where
        _check_prompt(where, length)
        if length >= max_length:
            raise ConfigError(
                f"{where}: the prompt has {length} tokens and fills all {max_length}: nothing to learn; "
                "raise data.max_length, or lower data.max_prompt_length"
            )
    return dataset


def outputs_of(row: Row) -> list[str]:
    """All outputs of a row of JSON. Raises ConfigError where there is none, and for one that is not text."""
    outputs = row.outputs if isinstance(row.outputs, list) else [row.outputs]
    if not outputs or not all(isinstance(text, str) for text in outputs):
        got = json.dumps(row.outputs)[:60]
        raise ConfigError(f'{row.where}: "output" must be a text or a list of texts to compare with, got {got}')
    return outputs


def references(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The texts that a response to each row is compared with: all its outputs. Raises what `outputs_of` does."""
    return [
        [tokenizer.decode(row.values["output_ids"], skip_special_tokens=True)]
        if "output_ids" in row.values
        else outputs_of(row)
        for row in rows
    ]


def encode_prompts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts in tokens, as `tokenise` has them.

    Raises ConfigError for an empty one, foreign token ids, and messages where the tokenizer has no chat template.
    """
    _check_rows(rows, tokenizer)
    values = [row.values for row in rows]
    if "prompt_ids" in values[0]:  # then all have them
        prompts = [np.asarray(row["prompt_ids"]).tolist() for row in values]
    else:
        prompts = tokenizer([_prompt(row, tokenizer) for row in values], add_special_tokens=False)["input_ids"]
    for row, prompt in zip(rows, prompts, strict=True):
        _check_prompt(row.where, len(prompt))
    return prompts


def _check_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    chat = next((row for row in rows if "messages" in row.values), None)
    if chat is not None and tokenizer.chat_template is None:
        raise ConfigError(f"{chat.where}: has messages, but the tokenizer has no chat template; use prompt and output")
    for row in rows:
        for ids in (row.values[key] for key in ("prompt_ids", "output_ids") if key in row.values):
            indexed_dataset.check_ids(row.where, ids, len(tokenizer))


def _check_prompt(where: str, length: int) -> None:
    if length == 0:
        raise ConfigError(f"{where}: the prompt is empty: nothing predicts the first token of the response")


def _prompt(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return row["prompt"]


def fingerprint(content: list, tokenizer: PreTrainedTokenizerBase, limits: tuple[int | None, ...]) -> str:
    """A hash of all that tokenised data depend on; `content` is what JSON can hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    identity = [content, state, tokenizer.eos_token, getattr(tokenizer, "chat_template", None), limits]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def arrow_file(key: str) -> pathlib.Path:
    """Where tokenised data are kept."""
    folder = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "abkd_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.arrow"


def _encode(
    rows: list[dict],
    numbers: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int | None,
) -> dict[str, list]:
    columns = {name: [] for name in ROW}
    binary = "prompt_ids" in rows[0]  # then all are
    pairs = [(row["prompt_ids"], row["output_ids"]) for row in rows] if binary else _token_ids(rows, tokenizer)
    for number, (prompt, response) in zip(numbers, pairs, strict=True):
        if max_prompt_length is None or len(prompt) <= max_prompt_length:
            whole = prompt + response
            sample = whole[:max_length], len(prompt), number, len(whole)
            for column, value in zip(columns.values(), sample, strict=True):
                column.append(value)
    return columns


def _token_ids(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """The tokens of each row's prompt, and of its response and the end, unless it is said not to have ended."""
    prompts = [_prompt(row, tokenizer) for row in rows]
    outputs = [row["messages"][-1]["content"] if "messages" in row else row["output"] for row in rows]
    wholes = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    ends = [[tokenizer.eos_token_id] if row.get("ended", True) else [] for row in rows]
    return [
        (prompt, whole[len(prompt) :] + end) for prompt, whole, end in zip(prompt_ids, whole_ids, ends, strict=True)
    ]


def describe_long_rows(
    rows: list[Row], dataset: datasets.Dataset, max_length: int, max_prompt_length: int | None
) -> str:
    """What `tokenise` did to rows that are too long, for people; empty where there were none."""
    kept = set(dataset["row"][:])
    left_out = [row.where for number, row in enumerate(rows) if number not in kept]
    cut = sum(length > max_length for length in dataset["row_length"][:])
    notes = []
    if cut:
        notes.append(f"{cut} of {len(rows)} rows exceed {max_length} tokens and are cut")
    if left_out:
        first = left_out[0] + ", …" * (len(left_out) > 1)
        notes.append(f"{len(left_out)} rows are left out: their prompts exceed {max_prompt_length} tokens ({first})")
    return "; ".join(notes)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Whole sequences end to end, T tokens in all, N of them predicting a token of a response."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], restarting at 0 with every sequence
    cu_seqlens: Tensor  # [sequences + 1], int32: where each begins, and T
    max_seqlen: int
    positions: Tensor  # [N], indices into T whose next token is in the response
    labels: Tensor  # [N], those next tokens; on the CPU
    samples: list[dict]  # as packed
    is_text: bool = False  # blocks of plain text

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch with everything but the labels on `device`."""
        moved = ("input_ids", "position_ids", "cu_seqlens", "positions")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})

    def pin(self) -> Batch:
        """The same batch in page-locked memory, which a GPU copies from while the processor goes on."""
        pinned = ("input_ids", "position_ids", "cu_seqlens", "positions", "labels")
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in pinned})


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """What one step trains on, on all ranks together, and the micro-batches that are this rank's."""

    samples: list[dict]
    text: list[dict]  # blocks of plain text
    parts: list[Batch]  # those of text come last
    most_tokens: int  # that a rank has

    @property
    def labels(self) -> int:
        return _count_labels(self.samples)

    @property
    def text_labels(self) -> int:
        return _count_labels(self.text)

    def pin(self) -> StepBatch:
        return dataclasses.replace(self, parts=[part.pin() for part in self.parts])


def _count_labels(samples: list[dict]) -> int:
    return sum(len(sample["input_ids"]) - sample["prompt_length"] for sample in samples)


def share_out(samples: list[dict], text: list[dict], max_tokens: int) -> StepBatch:
    """Deals a step's samples and blocks to the ranks, and packs this rank's.

    Every rank gets as many micro-batches as the others, where there are samples for that.
    """
    parts, loads = [], [0] * distributed.world()
    for items, is_text in ((samples, False), (text, True)):
        lengths = [len(item["input_ids"]) for item in items]
        shares = distributed.deal(lengths)
        groups = [_groups([items[place] for place in share], max_tokens) for share in shares]
        own = _cut(groups[distributed.rank()], max(map(len, groups)))
        parts += [dataclasses.replace(_join(group), is_text=is_text) for group in own]
        loads = [load + sum(lengths[place] for place in share) for load, share in zip(loads, shares, strict=True)]
    return StepBatch(samples, text, parts, max(loads))


def pack(samples: list[dict], max_tokens: int) -> list[Batch]:
    """Samples in order, in as many micro-batches as a budget of max_tokens asks for."""
    return [_join(group) for group in _groups(samples, max_tokens)]


def _groups(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    groups, used = [], 0
    for sample in samples:
        length = len(sample["input_ids"])
        if not groups or used + length > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(sample)
        used += length
    return groups


def _cut(groups: list[list[dict]], count: int) -> list[list[dict]]:
    """So many groups: those with the most samples are halved."""
    groups = list(groups)
    while len(groups) < count and groups and len(most := max(groups, key=len)) > 1:
        place, half = groups.index(most), len(most) // 2
        groups[place : place + 1] = most[:half], most[half:]
    return groups


def _join(samples: list[dict]) -> Batch:
    lengths = [len(sample["input_ids"]) for sample in samples]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    # The last token of a prompt predicts the first of the response; the last of a sequence predicts nothing.
    positions = torch.cat(
        [
            torch.arange(start + sample["prompt_length"] - 1, start + length - 1)
            for start, length, sample in zip(starts, lengths, samples, strict=False)
        ]
    )
    input_ids = torch.tensor([token for sample in samples for token in sample["input_ids"]])
    return Batch(
        input_ids=input_ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        positions=positions,
        labels=input_ids[positions + 1],
        samples=samples,
    )


@functools.lru_cache(maxsize=4)  # an epoch of the rows, of the plain text, of prompts, and of rollouts
def batch_rows(rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of an epoch's batches: they depend on these four alone; a last, incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]


def step_samples(dataset: datasets.Dataset, batch_size: int, seed: int, step: int) -> list[dict]:
    """The samples of a step, counted from 0: epoch after epoch of `batch_rows`, and a function of these four alone.

    Samples carry their "index" in the data set: the teacher's cache finds them by it.
    """
    epoch, batch = divmod(step, len(dataset) // batch_size)
    indices = batch_rows(len(dataset), batch_size, seed, epoch)[batch]
    columns = dataset[indices] | {"index": indices}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while the caller is busy with the last."""
    end = object()
    start = None
    if torch.cuda.is_initialized():  # a new thread begins with the first GPU
        start = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    with ThreadPoolExecutor(1, "ahead", start) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
