"""Rows of chat: messages with role and content, or with from and value, brought to one form."""

import sys

from ..errors import ConfigError
from .strict_json import parse, show

# Whose words a message is, by the names that data sets have for it. Chat templates know the names on the right.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "model", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
    **{role: role for role in ("system", "developer", "ipython", "environment", "documents")},
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys in which templates look for a thought
TEXT_PARTS = ("text", "input_text", "output_text")
WEIGHTS = ("weight", "train")


def convert_row(values: dict, messages: object, key: str, answer: str, first: int = 0) -> tuple[dict, object]:
    """The row {"messages", "tools", "trained"} (the last two only where they say something), and the reference text.

    Args:
        values: the row, for the columns system, system_prompt and tools.
        messages: its messages, or their JSON text; `key` is their name in errors.
        answer: "required", "optional" or "ignored", as in `read_rows`.
        first: the first message that may be trained.

    Raises ConfigError, with the reason alone.
    """
    messages = _from_json(messages, key)
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f'"{key}" must be a list of objects with role and content, got {show(messages)}')
    reference = None
    if answer == "ignored" and _role(messages[-1], key) == "assistant":
        places = [place for place, one in enumerate(messages) if _role(one, key) == "assistant" and _is_trained(one)]
        place = max((place for place in places if place >= first), default=len(messages) - 1)
        messages, last = messages[:place], messages[place]
        reference = last.get("content", last.get("value"))  # unchecked: it isn't given to a model
        reference = _join_parts(reference) if _is_text_parts(reference) else reference
    converted, weights = zip(*(_convert(one, key) for one in messages), strict=True) if messages else ((), ())
    system = _system(values)
    if system is not None and converted and converted[0]["role"] == "system":
        if converted[0]["content"] != system:
            raise ConfigError(f'has a column with a system prompt, and another one in "{key}"; {WAY_OUT}')
        system = None
    head = [] if system is None else [{"role": "system", "content": system}]
    row = {"messages": [*head, *converted], **_tools(values)}
    if answer == "ignored":
        if not converted:
            raise ConfigError(f'"{key}" has no message before the answer')
        return row | _prompt_mark(row["messages"]), reference
    trained = [
        number + len(head)
        for number, (one, weight) in enumerate(zip(converted, weights, strict=True))
        if one["role"] == "assistant" and weight and number >= first
    ]
    return _check_answer(row, trained, key, answer)


WAY_OUT = "data.columns says which columns are read"


def _check_answer(row: dict, trained: list[int], key: str, answer: str) -> tuple[dict, object]:
    """Checks the last message, and adds "trained" unless all of the assistant's messages are trained."""
    messages = row["messages"]
    last, reference = messages[-1], None
    for number, one in enumerate(messages[:-1], 1):
        if one["role"] == "assistant" and not _says_something(one):
            raise ConfigError(f"message {number}, by the assistant, is empty: nothing to learn")
    if last["role"] == "assistant":
        if not _says_something(last):
            if answer == "required":
                raise ConfigError("the last message is empty: nothing to learn")
            del messages[-1]
            trained = [number for number in trained if number < len(messages)]
            row |= _prompt_mark(messages)
        else:
            if not trained:
                raise ConfigError("all messages of the assistant have weight 0: nothing to learn")
            reference = messages[trained[-1]]["content"]
    elif answer == "required":
        expected = f'"{key}" must be objects with role and content, the last by the assistant'
        raise ConfigError(f"{expected}, but the last is by the {last['role']}")
    if not messages or (reference is not None and len(messages) < 2):
        raise ConfigError(f'"{key}" begins with the answer: the last by the assistant must follow a question')
    if trained != [number for number, one in enumerate(messages) if one["role"] == "assistant"]:
        row["trained"] = trained
    return row, reference


def _prompt_mark(messages: list[dict]) -> dict:
    """What says that messages come before an answer to be written, where their roles don't say it."""
    return {"is_prompt": True} if messages and messages[-1]["role"] == "assistant" else {}


def _convert(raw: dict, key: str) -> tuple[dict, bool]:
    """The message with role and content, and whether it may be trained. Other keys stay, unless they are null."""
    role = _role(raw, key)
    others = {sys.intern(name): value for name, value in raw.items() if value is not None}
    content = others.pop("value", None) if "from" in others else None
    named = others.pop("role", None) or others.pop("from")
    content = others.pop("content", content)
    is_trained = _is_trained({name: others.pop(name) for name in WEIGHTS if name in others})
    call = others.pop("function_call", None)
    if str(named).lower() == "function_call":  # ShareGPT's role of a message that is a call
        call, content = _from_json(content, "function_call"), None
    if call is not None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ConfigError(f"a function call must be an object with name and arguments, got {show(call)}")
        others["tool_calls"] = [{"type": "function", "function": call}]
    calls = others.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(_function(one) for one in calls)):
        raise ConfigError(
            f'"tool_calls" must be a list of objects, each with the name of a function, got {show(calls)}'
        )
    if calls:
        others["tool_calls"] = [_with_object(one) for one in calls]
    else:
        others.pop("tool_calls", None)
    for name in THOUGHTS:
        if not isinstance(others.get(name, ""), str):
            raise ConfigError(f'"{name}" of a message must be text, got {show(others[name])}')
    if content is None and role == "assistant" and ("tool_calls" in raw or _says_something(others)):
        content = ""
    return {"role": role, "content": _join_parts(content), **others}, is_trained


def _is_trained(message: dict) -> bool:
    """Whether a message may be trained: OpenAI's "weight" (0 or 1) and Axolotl's "train" (false or true) say so."""
    for name in WEIGHTS:
        if message.get(name) not in (None, 0, 1):
            raise ConfigError(f'"{name}" of a message must be 0 or 1, got {show(message[name])}')
    return all(message.get(name) in (None, 1) for name in WEIGHTS)


def _function(value: object) -> dict | None:
    """The part of a tool, or of a call of one, that has its name; None where there is no name."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _with_object(call: dict) -> dict:
    """The call of a tool with its arguments as an object. OpenAI writes them as text; templates would quote that."""
    function = _function(call)
    try:
        arguments = parse(function["arguments"]) if isinstance(function.get("arguments"), str) else None
    except ConfigError:  # they stay as they are
        arguments = None
    if not isinstance(arguments, dict):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _says_something(message: dict) -> bool:
    thoughts = (message.get(key) for key in THOUGHTS)
    return bool(
        message.get("content", "").strip()
        or message.get("tool_calls")
        or any(isinstance(text, str) and text.strip() for text in thoughts)
    )


def _role(message: dict, key: str) -> str:
    named = message.get("role") or message.get("from")
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        got = f"got {show(named)}" if named is not None else f"keys are {', '.join(message) or 'none'}"
        raise ConfigError(f'"{key}" must be objects with role and content; roles are {", ".join(ROLES)}; {got}')
    return role


def _is_text_parts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, str)
        or (isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS)
        for part in content
    )


def _join_parts(content: object) -> str:
    """The text of a message: its content, or that of all its parts."""
    if isinstance(content, str):
        return content
    if _is_text_parts(content):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if isinstance(content, list):
        kinds = (part.get("type") if isinstance(part, dict) else part for part in content)
        other = next((kind for kind in kinds if not isinstance(kind, str) or kind not in TEXT_PARTS), content[0])
        raise ConfigError(f'"content" has a part of type {show(other)}: only text can be read')
    raise ConfigError(f'"content" of a message must be text or a list of text parts, got {show(content)}')


def _system(values: dict) -> str | None:
    named = [key for key in ("system", "system_prompt") if values.get(key)]
    if len(named) > 1:
        raise ConfigError(f'has both "system" and "system_prompt"; {WAY_OUT}')
    if not named:
        return None
    if not isinstance(values[named[0]], str):
        raise ConfigError(f'"{named[0]}" must be text, got {show(values[named[0]])}')
    return values[named[0]]


def _tools(values: dict) -> dict:
    tools = _from_json(values.get("tools") or None, "tools") or []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(map(_function, tools)):
        expected = "must be a list of objects, each with a function's name, or the JSON text of one"
        raise ConfigError(f'"tools" {expected}, got {show(tools)}')
    return {"tools": tools} if tools else {}


def _from_json(value: object, key: str) -> object:
    """The value that JSON text stands for (CSV has text alone); other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ConfigError as error:
        raise ConfigError(f'"{key}" must be a list, or its JSON text: {error}') from None
