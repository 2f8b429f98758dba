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


def convert_row(values: dict, messages: object, key: str, answer: str, first: int = 0) -> tuple[dict, object]:
    """The row {"messages"}, with "tools", "trained" and "is_prompt" where they say something; and the reference text.

    Args:
        values: the row, for the columns system, system_prompt and tools.
        messages: its messages, or their JSON text; `key` is their name in errors.
        answer: "required", "optional" or "ignored", as in `read_rows`. The ignored answer is the last message; if that
            has weight 0, the last that is trained. The messages from it on are taken away.
        first: the first message that may be trained.

    Raises ConfigError, with the reason alone.
    """
    messages = _from_json(messages, key)
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f'"{key}" must be a list of objects with role and content, got {show(messages)}')
    last = messages[-1]
    has_answer = _role(last, key) == "assistant"
    is_last = has_answer and _is_trained(last)
    if answer == "ignored" and is_last:
        messages = messages[:-1]  # unchecked: it isn't given to a model
    converted, weights = zip(*(_convert(one, key) for one in messages), strict=True) if messages else ((), ())
    system = _system(values)
    if system is not None and converted and converted[0]["role"] == "system":
        if converted[0]["content"] != system:
            raise ConfigError(f'has a column with a system prompt, and another one in "{key}"; {WAY_OUT}')
        system = None
    head = [] if system is None else [{"role": "system", "content": system}]
    row = {"messages": [*head, *converted], **_tools(values)}
    trained = [
        number + len(head)
        for number, (one, weight) in enumerate(zip(converted, weights, strict=True))
        if one["role"] == "assistant" and weight and number >= first and _says_something(one)
    ]
    if answer != "ignored":
        return _check_answer(row, trained, key, answer)
    reference = None
    if is_last:
        calls = last.get("tool_calls") or last.get("function_call")
        reference = None if calls else last.get("content", last.get("value"))  # of a call the text says a part at most
        reference = _join_parts(reference) if _is_text_parts(reference) else reference
    elif has_answer:
        if not trained:
            raise ConfigError(UNTRAINED)
        reference = row["messages"][trained[-1]]["content"]
        del row["messages"][trained[-1] :]
    if len(row["messages"]) == len(head):
        raise ConfigError(f'"{key}" has no message before the answer')
    return {**row, "is_prompt": True}, reference


def convert_teacher(values: dict, messages: object, key: str) -> list[dict]:
    """The messages that the teacher reads, in our form: up to the answer, or with it. Raises ConfigError.

    The row's system prompt comes before them, unless they have one of their own.
    """
    messages = _from_json(messages, key)
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, dict) and _role(first, key) == "system":
        values = {name: value for name, value in values.items() if name not in ("system", "system_prompt")}
    try:
        return convert_row(values, messages, key, "optional")[0]["messages"]
    except ConfigError as error:
        raise ConfigError(f'"{key}": {error}') from None


WAY_OUT = "data.columns says which columns are read"
UNTRAINED = "all messages of the assistant are empty or have weight 0: nothing to learn"


def _check_answer(row: dict, trained: list[int], key: str, answer: str) -> tuple[dict, object]:
    """Checks the last message, and adds "trained" unless all of the assistant's messages are trained.

    Adds "is_prompt" where there is no answer.
    """
    messages = row["messages"]
    last, reference = messages[-1], None
    if last["role"] == "assistant":
        if not _says_something(last):
            if answer == "required":
                raise ConfigError("the last message is empty: nothing to learn")
            del messages[-1]
            row["is_prompt"] = True
        else:
            reference = last["content"]
            if not trained:
                raise ConfigError(UNTRAINED)
    elif answer == "required":
        expected = f'"{key}" must be objects with role and content, the last by the assistant'
        raise ConfigError(f"{expected}, but the last is by the {last['role']}")
    else:
        row["is_prompt"] = True
    if not messages or (reference is not None and len(messages) < 2):
        raise ConfigError(f'"{key}" begins with the answer: the last by the assistant must follow a question')
    if trained != [number for number, one in enumerate(messages) if one["role"] == "assistant"]:
        row["trained"] = trained
    return row, reference


def _convert(raw: dict, key: str) -> tuple[dict, bool]:
    """The message with role and content, and whether it may be trained. Other keys stay, unless they are null."""
    role = _role(raw, key)
    others = {sys.intern(name): value for name, value in raw.items() if value is not None}
    content = others.pop("value", None) if "from" in others else None
    named = others.pop("role", None) or others.pop("from")
    content = others.pop("content", content)
    for name in ("weight", "train"):
        others.pop(name, None)
    for name in THOUGHTS:
        if not isinstance(others.get(name, ""), str):
            raise ConfigError(f'"{name}" of a message must be text, got {show(others[name])}')
    call = others.pop("function_call", None)
    if str(named).lower() == "function_call":  # ShareGPT's role of a message that is a call
        call, content = _from_json(content, "function_call"), None
    if call is not None:
        others["tool_calls"] = [{"type": "function", "function": call}]
    calls = others.pop("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
        raise ConfigError(f'"tool_calls" must be a list of objects, got {show(calls)}')
    if calls:
        others["tool_calls"] = [_convert_call(one) for one in calls]
    if content is None and role == "assistant" and ("tool_calls" in raw or _says_something(others)):
        content = ""
    return {"role": role, "content": _join_parts(content), **others}, _is_trained(raw)


def _is_trained(message: dict) -> bool:
    """Whether "weight" (OpenAI) or "train" (Axolotl) of a message leave it to be trained."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise ConfigError(f'"weight" of a message must be 0 or 1, got {show(weight)}')
    if not isinstance(train, (bool, type(None))):
        raise ConfigError(f'"train" of a message must be true or false, got {show(train)}')
    if None not in (weight, train) and weight != train:
        raise ConfigError(f'a message has "weight" {show(weight)} and "train" {show(train)}: leave out one')
    return weight != 0 and train is not False


def _convert_call(call: dict) -> dict:
    """A call of a tool, with arguments as an object: templates write them as JSON, and would write text twice so."""
    function = call.get("function", call)
    if not _has_name(function):
        raise ConfigError(f"a function call must be an object with name and arguments, got {show(function)}")
    try:
        arguments = _from_json(function.get("arguments"), "arguments")
    except ConfigError:  # no JSON: what the model wrote
        return call
    if not isinstance(arguments, dict):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _has_name(function: object) -> bool:
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def _says_something(message: dict) -> bool:
    return bool(message.get("tool_calls")) or any(message.get(key, "").strip() for key in ("content", *THOUGHTS))


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
    named = [key for key in ("system", "system_prompt") if values.get(key) not in (None, "")]
    if len(named) > 1:
        raise ConfigError(f'has both "system" and "system_prompt"; {WAY_OUT}')
    if not named:
        return None
    if not isinstance(values[named[0]], str):
        raise ConfigError(f'"{named[0]}" must be text, got {show(values[named[0]])}')
    return values[named[0]]


def _tools(values: dict) -> dict:
    tools = values.get("tools")
    tools = None if tools == "" else _from_json(tools, "tools")
    if tools in (None, [], {}):
        return {}
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f'"tools" must be a list of objects, or the JSON text of one, got {show(tools)}')
    if nameless := [tool for tool in tools if not _has_name(tool.get("function", tool))]:
        raise ConfigError(f'"tools" must be functions with a name, got {show(nameless[0])}')
    return {"tools": tools}


def _from_json(value: object, key: str) -> object:
    """The value that JSON text stands for (CSV has text alone); other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ConfigError as error:
        raise ConfigError(f'"{key}" must be a list, or its JSON text: {error}') from None
