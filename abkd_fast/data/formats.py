"""The formats of rows that people bring: recognized by their columns, checked, and brought to three shapes.

These are {"prompt", "output"} (text), {"messages"} and {"prompt_ids", "output_ids"}; see `Row` in rows.py.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import ConfigError, nearest
from . import messages
from .messages import WAY_OUT
from .strict_json import show

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
TEACHER = ("teacher_prompt", "teacher_messages")  # what the teacher reads in place of the prompt, in any format
# What `data.columns` gives names to.
OURS = ("prompt", "instruction", "input", "output", "messages", "tools", "teacher", *TEACHER)

CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question")
INPUTS = ("input", "context")
OUTPUTS = ("output", "completion", "response", "answer")
CHAT_COLUMNS = ("system", "system_prompt", "tools")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
COLUMNS = {*CHATS, *PROMPTS, *INPUTS, *OUTPUTS, "prompt_ids", "output_ids"}  # those that make a row, or a part of one


@dataclasses.dataclass(frozen=True)
class Format:
    """A format, and how its rows are read: `read(values, answer)` gives the row's shape and its references."""

    title: str
    key: str  # rows are of the first format whose key has a value
    columns: tuple[str, ...]  # all that it reads, besides its key, TEACHER and "ended"
    read: Callable[[dict, str], tuple[dict, object]]

    @property
    def used(self) -> set[str]:
        return {self.key, *self.columns, *TEACHER, "ended"}


@dataclasses.dataclass(frozen=True)
class CheckedRow:
    values: dict  # one of the three shapes
    outputs: object  # the reference text or texts, unchecked
    format: Format


def check_row(values: object, where: str, answer: str = "required") -> CheckedRow:
    """Converts a row. A value that is null is missing.

    Args:
        where: file and line, with which errors begin.
        answer: "required"; "optional": it may be missing or empty; "ignored": it is taken away, unchecked.

    Raises ConfigError for values that are missing, ambiguous, of a wrong type, or empty.
    """
    try:
        if not isinstance(values, dict):
            raise ConfigError(f"expected a JSON object with instruction, input and output, got {show(values)}")
        present = {key: value for key, value in values.items() if value is not None}
        ended = present.get("ended", True)
        if not isinstance(ended, bool):
            raise ConfigError(f'"ended" must be true or false, got {show(ended)}')
        form = _recognize(present, values)
        if media := [key for key in MEDIA if present.get(key)]:
            raise ConfigError(f'has "{media[0]}", and only text can be read; {WAY_OUT}')
        row, outputs = form.read(present, answer)
        if answer != "ignored":
            row |= _read_teacher(present, row)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    has_answer = "output" in row or ("messages" in row and "is_prompt" not in row)
    if not ended and has_answer and "prompt_ids" not in row:
        row["ended"] = False  # an answer that was cut has no end token
    return CheckedRow(row, outputs, form)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises ConfigError for a `data.columns` that maps no name of ours to names of columns."""
    if not columns:
        raise ConfigError("data.columns: is empty; leave it out, or name columns", "data.columns")
    for ours, theirs in columns.items():
        if ours not in OURS:
            raise ConfigError(f'data.columns: "{ours}" is no name of ours{nearest(str(ours), OURS)}', "data.columns")
        if not isinstance(theirs, str):
            raise ConfigError(f"data.columns: {ours} must be a column's name, got {show(theirs)}", "data.columns")


def _recognize(present: dict, values: dict) -> Format:
    there = [form for form in FORMATS if form.key in present]
    if there:
        return next((form for form in there if not _is_blank(present[form.key])), there[0])
    keys = f"{', '.join(values) or 'none'} (expected instruction, input, output; data.columns maps other names)"
    if "text" in present:
        keys += "; plain text is for data.pretrain"
    raise ConfigError(f'missing "instruction"; keys are {keys}')


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value


def _only(values: dict, keys: tuple[str, ...]) -> str | None:
    """The one of these keys that has a value. An empty text counts where no other key has a value."""
    there = [key for key in keys if key in values]
    filled = [key for key in there if not _is_blank(values[key])]
    if len(filled) > 1:
        raise ConfigError(f'has both "{filled[0]}" and "{filled[1]}": one must decide; {WAY_OUT}')
    return (filled or there or [None])[0]


def _text(values: dict, key: str) -> str:
    value = values[key]
    if isinstance(value, str):
        return value
    hint = "; write one object for each row" if isinstance(value, list) else ""
    raise ConfigError(f'"{key}" must be text, got {show(value)}{hint}')


def _read_ids(values: dict, answer: str) -> tuple[dict, object]:
    """Token ids, and the text beside them if there is some, as `generate` writes them.

    The ids of an ignored answer stay, as references. `messages` are those before the answer.
    """
    row, reference = {}, values.get("output")
    if "messages" in values:
        row, reference = messages.convert_row(values, values["messages"], "messages", "ignored")
    elif "prompt" in values:
        row["prompt"] = _text(values, "prompt")
    for key in ("prompt_ids", "output_ids"):
        ids = values.get(key)
        if ids is None and key == "output_ids" and answer != "required":
            continue
        if isinstance(ids, np.ndarray):  # of a binary file
            row[key] = ids
            continue
        if not isinstance(ids, list) or not {*map(type, ids)} <= {int}:
            raise ConfigError(f'"{key}" must be a list of whole numbers, got {show(ids)}')
        try:
            row[key] = np.array(ids, dtype=np.int32)
        except OverflowError:
            raise ConfigError(f'"{key}" has a number that is no token id') from None
    if "output_ids" in row and not len(row["output_ids"]):
        if answer == "required":
            raise ConfigError('"output_ids" is empty: nothing to learn')
        del row["output_ids"]
    if "output_ids" in row and answer != "ignored" and isinstance(reference, str):
        row["output"] = reference
    return row, reference


def _read_messages(values: dict, answer: str) -> tuple[dict, object]:
    key = _only(values, CHATS)
    return messages.convert_row(values, values[key], key, answer)


def _read_prompt(values: dict, answer: str) -> tuple[dict, object]:
    _only(values, PROMPTS)
    key = _only(values, OUTPUTS)
    completion = values.get(key)
    is_chat = _is_messages(completion)
    if not _is_messages(before := values["prompt"]):
        if is_chat:
            raise ConfigError(f'"{key}" is a list of messages, but "prompt" is not: give two texts, or two lists')
        return _read_text(values, _text(values, "prompt"), answer)
    _refuse(values, INPUTS)
    first = _first(completion)
    after = completion if is_chat else [{"role": "assistant", "content": first}] if first else []
    if not after and answer == "required":
        raise _missing_output(values, key)
    title = f"prompt and {key}" if after else "prompt"
    row, reference = messages.convert_row(values, [*before, *after], title, answer, len(before))
    return row, completion if after and not is_chat else reference


def _read_teacher(values: dict, row: dict) -> dict:
    """The prompt that the teacher reads in place of the row's own, where it has one."""
    key = next((key for key in TEACHER if key in values), None)
    if key is None:
        return {}
    if {*TEACHER} <= values.keys():
        raise ConfigError(f'has both "{TEACHER[0]}" and "{TEACHER[1]}": give one')
    if key == "teacher_prompt":
        if "messages" in row:
            raise ConfigError('has "teacher_prompt" beside messages: give "teacher_messages"')
        if not _text(values, key):
            raise ConfigError(f'"{key}" is empty: leave it out where the teacher reads the row\'s own prompt')
        return {key: values[key]}
    if "messages" not in row and "prompt_ids" not in row:
        raise ConfigError('has "teacher_messages" beside a prompt that is text: give "teacher_prompt"')
    return {key: messages.convert_teacher(values, values[key], key)}


def _first(outputs: object) -> object:
    """The answer that is trained: of several, as in the papers, the first."""
    return outputs[0] if isinstance(outputs, list) and outputs else outputs


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _read_instruction(values: dict, answer: str) -> tuple[dict, object]:
    key, extra = _only(values, PROMPTS), _only(values, INPUTS)
    context = _text(values, extra) if extra else ""
    template = PROMPT_WITH_INPUT if context else PROMPT
    return _read_text(values, template.format(instruction=_text(values, key), input=context), answer)


def _read_text(values: dict, prompt: str, answer: str) -> tuple[dict, object]:
    _refuse(values, (*CHAT_COLUMNS, *(INPUTS if _only(values, PROMPTS) == "prompt" else ())))
    key = _only(values, OUTPUTS)
    outputs = values.get(key)
    if answer == "ignored":
        return {"prompt": prompt}, outputs
    first = _first(outputs)
    if answer == "optional" and (first is None or (isinstance(first, str) and not first.strip())):
        return {"prompt": prompt}, outputs
    if first is None:
        raise _missing_output(values, key)
    if not _text({key: first}, key).strip():
        raise ConfigError(f'"{key}" is empty: nothing to learn')
    return {"prompt": prompt, "output": first}, outputs


def _refuse(values: dict, keys: tuple[str, ...]) -> None:
    """Raises ConfigError for a value that the prompt has no place for."""
    for key in keys:
        if not _is_blank(values.get(key, "")) and (key, values[key]) not in (("tools", []), ("tools", {})):
            problem = f'has "{key}", for which "{_only(values, PROMPTS)}" has no place'
            raise ConfigError(f"{problem}: bring messages, or name the columns to read in data.columns")


def _missing_output(values: dict, key: str | None) -> ConfigError:
    if key is None:
        keys = f"{', '.join(values)} (null counts as missing; expected one of {', '.join(OUTPUTS)})"
        return ConfigError(f'missing "output"; keys are {keys}')
    if _is_blank(values[key]):
        return ConfigError(f'"{key}" is empty: nothing to learn')
    return ConfigError(f'"{key}" must be text, got {show(values[key])}')


FORMATS = (
    Format("token ids", "prompt_ids", ("output_ids", "prompt", "output", "messages", *CHAT_COLUMNS), _read_ids),
    Format("messages", "messages", CHAT_COLUMNS, _read_messages),
    Format("conversations (ShareGPT)", "conversations", CHAT_COLUMNS, _read_messages),
    Format("prompt and output", "prompt", (*OUTPUTS, *CHAT_COLUMNS), _read_prompt),
    Format("instruction, input and output (the papers' prompt)", "instruction", (*INPUTS, *OUTPUTS), _read_instruction),
    Format("question and answer (the papers' prompt)", "question", (*INPUTS, *OUTPUTS), _read_instruction),
)
