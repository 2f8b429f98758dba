"""Chat templates: a row of messages becomes turns, each a prompt and the response that the assistant gives to it."""

import dataclasses
import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from ..config.schema import DataConfig
from ..errors import ConfigError, reading
from .time_limit import time_limit

PROBE = "answer"  # an answer that no template changes
SECONDS = 5.0  # that a rendering may compute; a long row takes a few hundredths
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of thoughts in a message; a template knows one


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How rows become tokens, besides the tokenizer and its chat template: the keys of `data` with these names."""

    train_on: typing.Literal["all", "last"] = "all"
    begin_token: typing.Literal["auto", True, False] = "auto"
    chat_template_kwargs: dict | None = None

    @classmethod
    def from_config(cls, data: DataConfig) -> "PromptFormat":
        return cls(**{field.name: getattr(data, field.name) for field in dataclasses.fields(cls)})


class Turn(typing.NamedTuple):
    """An answer of the assistant, as text."""

    prompt: str  # everything before it: what the model is given when it answers
    response: str | None  # with the end of turn that the template renders; None where a model is to write it
    is_closed: bool  # whether nothing has to follow; else the tokenizer's end token does


class ChatTemplate:
    """A tokenizer's chat template, and what one trial conversation tells about it.

    Attributes:
        end: the token that ends a turn of the assistant; None if the template has none.
        end_text: its text; empty if there is none.
        after: the text after the answer where it is the last message.
        tail: the text of a turn after the answer, up to the end token.
        header: what the model has to write before an answer, because the generation prompt lacks it.
        generation: the generation prompt.
        opening: what it has and the rendering of an answer lacks: "<think>" and a line end in R1's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict | None) -> None:
        """Raises ConfigError for a template that can't render a question and an answer, and for reserved arguments."""
        self.tokenizer, self.kwargs = tokenizer, kwargs or {}
        reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & self.kwargs.keys()
        if reserved:
            raise ConfigError(f"data.chat_template_kwargs: {min(reserved)} is no value of the template: leave it out")
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        self.added = {token: index for token, index in added.items() if token.strip()}  # Gemma's has line ends, too
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}
        try:
            alone, prompt = (self.render([question], generates) for generates in (False, True))
            whole = self.render([question, answer], False)
        except ConfigError as error:
            raise ConfigError(f"the chat template can't render a question and an answer: {error}") from None
        before, found, self.after = whole.rpartition(PROBE)
        if not found:
            raise ConfigError("the chat template renders no answer of the assistant: give data.chat_template")
        same = common_length(prompt, before)
        self.opening, self.header = prompt[same:], before[same:]
        self.generation = prompt[common_length(alone, prompt) :]
        try:
            history = self.render([question, answer, question], True).partition(PROBE)[2]
        except ConfigError:
            history = self.after
        self._find_end(self.after[: common_length(self.after, history)] or self.after)

    def _find_end(self, after: str) -> None:
        """Finds the end of a turn in what follows an answer everywhere, in the middle of a conversation as at its end.

        It is the first token of the tokenizer's own there, with those that follow at once (Command R7B has two).
        """
        tokens = "|".join(re.escape(token) for token in sorted(self.added, key=len, reverse=True))
        found = re.search(f"(?:{tokens})*({tokens})", after) if tokens else None
        self.end_text = found[1] if found else ""
        self.end = self.added[found[1]] if found else None
        self.tail = after[: found.end()] if found else self.after.rstrip()

    def render(self, messages: list[dict], generates: bool, tools: list | None = None) -> str:
        """The text of messages; with `generates` the beginning of an answer follows. Raises ConfigError."""
        with reading("the chat template fails"), time_limit(SECONDS):  # it is a program, and may do anything
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generates, **self.kwargs
            )
            text.encode()  # half of a surrogate pair is no text
            return text

    def prompt(self, values: dict) -> str:
        """The text before the last answer, or of all messages where the last is not the assistant's."""
        messages, tools, trained = values["messages"], values.get("tools"), trained_answers(values)
        before = messages[: trained[-1]] if trained else messages
        self._check_marks(before, None, tools)
        return self.render(before, True, tools)

    def turns(self, values: dict, train_on: str) -> Iterator[Turn]:
        """The trained answers of a row. Raises ConfigError where the template can't render it, or would lose a part."""
        messages, trained = values["messages"], trained_answers(values)
        if not trained:
            raise ConfigError("no answer of the assistant is trained: all have weight 0")
        for index in trained if train_on == "all" else trained[-1:]:
            turn = self._turn(messages[:index], messages[index], values.get("tools"))
            if values.get("ended") is False and index == len(messages) - 1:
                turn = Turn(turn.prompt, turn.response.removesuffix(self.tail), True)
            yield turn

    def _turn(self, before: list[dict], answer: dict, tools: list | None) -> Turn:
        if not before:
            raise ConfigError(
                "begins with an answer, to which there is no prompt: begin with the user's message, give the answer "
                '"weight": 0, or set data.train_on=last'
            )
        answer = self._without_end(answer)
        prompt, whole = self.render(before, True, tools), self.render([*before, answer], False, tools)
        is_whole = whole.startswith(prompt)
        self._check_marks(before, answer if is_whole else {**answer, **dict.fromkeys(THOUGHTS)}, tools)
        if is_whole:
            response, is_closed = self._cut(whole.removeprefix(prompt))
        elif self.opening:
            response, is_closed = self._as_written(answer) + self.tail, self.end is not None
        else:
            raise ConfigError(
                "the chat template renders the messages before an answer in another way once it is there: give another "
                "as data.chat_template, or other data.chat_template_kwargs"
            )
        _check_rendered("content", answer.get("content"), self.generation + response)
        return Turn(prompt, response, is_closed)

    def _check_marks(self, before: list[dict], answer: dict | None, tools: list | None) -> None:
        """Raises ConfigError if a message before an answer, a tool, a call of one, or its thoughts reach no text.

        A word is written at the end of each, and has to be in the text. Thoughts of earlier answers may be left out.
        """
        marks: dict[str, str] = {}
        offered = [_mark_function(marks, "a tool", tool) for tool in tools] if tools else tools
        marked = [_mark(marks, message, ()) for message in before]
        marked += [] if answer is None else [_mark(marks, answer, THOUGHTS)]
        if not marks:
            return
        try:
            text = self.render(marked, answer is None, offered)
        except ConfigError:  # of a template that knows the names of its tools
            return
        if lost := next((what for mark, what in marks.items() if mark not in text), None):
            raise ConfigError(f"the chat template loses {lost}: give another as data.chat_template")

    def _without_end(self, answer: dict) -> dict:
        """The answer without the end token that it may bring itself."""
        content = answer.get("content")
        if not self.end_text or not content or self.end_text not in content:
            return answer
        content = content.rstrip().removesuffix(self.end_text)
        if self.end_text in content:
            raise ConfigError(f"an answer has the end of turn {self.end_text} in its middle: remove it")
        return {**answer, "content": content}

    def _cut(self, rendered: str) -> tuple[str, bool]:
        """A rendered answer up to its end of turn, and whether this is a token."""
        if self.end_text and self.end_text in rendered:
            stops = [place.end() for place in re.finditer(re.escape(self.end_text), rendered)]
            # Phi 3's template may write the end token once more. Elsewhere the token may also end a part of an answer.
            stop = next((stop for stop in stops if not self._without_tokens(rendered[stop:])), stops[-1])
            return rendered[:stop], True
        if self.end is None and rendered.endswith(self.after):
            return rendered.removesuffix(self.after) + self.tail, False
        rendered = rendered.rstrip()  # calls of tools may have an end of their own
        return rendered, any(rendered.endswith(token) for token in self.added if token)

    def _without_tokens(self, text: str) -> str:
        """What is left of a text without white space and tokens of the tokenizer's own."""
        for token in filter(None, self.added):
            text = text.replace(token, "")
        return text.strip()

    def _as_written(self, answer: dict) -> str:
        """An answer after the generation prompt, where the template's own rendering does not begin with that."""
        content, opening = answer.get("content") or "", self.opening.strip()
        if not opening:
            return content
        begin = opening.split()[0]
        end = begin[0] + "/" + begin[1:]  # <think> and </think>
        thoughts = answer.get("reasoning_content")
        if end in opening:  # the thoughts are over, and there are none
            if thoughts or begin in content:
                raise ConfigError(
                    f"the generation prompt closes {begin}, but the answer has thoughts: see data.chat_template_kwargs"
                )
            return content
        if thoughts and begin in content:
            raise ConfigError(f"has both reasoning_content and {begin} in its content: give one")
        if thoughts:
            return f"{thoughts}\n{end}\n\n{content}"
        if content.lstrip().startswith(begin) or end in content:
            return content.lstrip().removeprefix(begin).lstrip("\n")
        raise ConfigError(
            f"the chat template's generation prompt opens {opening}, but the answer has none: give reasoning_content, "
            "or a template without it as data.chat_template"
        )


def chat_template(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> ChatTemplate | None:
    """The tokenizer's chat template; None where it has none. Raises ConfigError for one that can't be used."""
    return None if tokenizer.chat_template is None else ChatTemplate(tokenizer, style.chat_template_kwargs)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> int | None:
    """The token with which the chat template ends a turn of the assistant; None where there is none.

    A template that can't be used has none: rows without messages don't need it.
    """
    try:
        template = chat_template(tokenizer, style)
    except ConfigError:
        return None
    return None if template is None else template.end


def trained_answers(values: dict) -> list[int]:
    """The places of the answers that are trained; none where all messages come before an answer to be written."""
    if values.get("is_prompt") or values["messages"][-1]["role"] != "assistant":
        return []
    answers = [index for index, message in enumerate(values["messages"]) if message["role"] == "assistant"]
    return [index for index in answers if index in values.get("trained", answers)]


def common_length(first: str, second: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _mark(marks: dict[str, str], message: dict, thoughts: tuple[str, ...]) -> dict:
    """A copy of a message with a mark in each part that a template may lose. Adds what the marks stand for."""
    marked = {**message}
    if message["role"] != "assistant" and isinstance(message.get("content"), str) and message["content"].strip():
        marked["content"] = _mark_text(marks, f"a {message['role']} message", message["content"])
    for key in thoughts:
        if isinstance(message.get(key), str) and message[key].strip():
            marked[key] = _mark_text(marks, key, message[key])
    if isinstance(message.get("tool_calls"), list):
        marked["tool_calls"] = [_mark_function(marks, "a tool call", call) for call in message["tool_calls"]]
    return marked


def _mark_function(marks: dict[str, str], what: str, value: object) -> object:
    """A tool, or a call of one, with marks in its name and the texts of its arguments."""
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict):
        return {**value, "function": _mark_function(marks, what, value["function"])}
    marked = {**value}
    if isinstance(value.get("name"), str):
        marked["name"] = _mark_text(marks, what, value["name"])
    arguments = value.get("arguments")
    if isinstance(arguments, dict):
        marked["arguments"] = {
            key: _mark_text(marks, what, one) if isinstance(one, str) else one for key, one in arguments.items()
        }
    return marked


def _mark_text(marks: dict[str, str], what: str, text: str) -> str:
    mark = f"qzx{len(marks)}xzq"  # a word that no template changes
    marks[mark] = what
    return text + mark


def _check_rendered(what: str, text: str | None, rendered: str) -> None:
    """Raises ConfigError if a text of the user's is lost. White space may change, and JSON may escape characters."""
    if not isinstance(text, str):
        return
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    if not any("".join(form.split()) in "".join(rendered.split()) for form in (text, escaped)):
        raise ConfigError(f"the chat template loses {what} ({text[:40]!r}): give another as data.chat_template")
