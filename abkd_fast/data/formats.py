"""The formats of rows that people bring: checked, and converted to one shape."""

from __future__ import annotations

import json

from ..errors import ConfigError

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


def without_output(values: object) -> object:
    """The same row with an empty output, or with an empty last message by the assistant."""
    if not isinstance(values, dict):
        return values
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        return {**values, "output": ""}
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return {"messages": [*messages, {"role": "assistant", "content": ""}]}


def outputs_in(values: dict) -> object:
    """The output, or the list of outputs, of a row that `check_row` has accepted."""
    if "messages" not in values:
        return values.get("output")
    last = values["messages"][-1]
    return last.get("content") if last["role"] == "assistant" else None


def check_row(values: object, where: str, empty_output: bool = False) -> dict:
    """Converts a row to {"messages": [...]} or {"prompt": text, "output": text}, with "ended": False for a cut answer.

    Raises ConfigError, which begins with `where`, for values that are missing, of a wrong type, or empty. An empty
    output is accepted with `empty_output`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object with instruction, input and output")
    ended = {"ended": False} if values.get("ended") is False else {}  # an answer that was cut has no end token
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
        values = {**values, "output": values["output"][0]}  # the papers train on the first of several references
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
