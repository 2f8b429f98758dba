"""From checked rows to the tokens of their samples: nothing is lost, added or merged between prompt and response."""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, reading
from . import indexed_dataset
from .chat import ChatTemplate, PromptFormat, Turn, chat_template
from .generated import check_text
from .rows import Row

LONG_TEXT = 32  # characters a token: where a text has more, only its beginning can matter
ANCHORS = ("\n", "", "a", ".")  # where a token would cross the seam, a response is encoded after one of these
NO_TEMPLATE = (
    "has messages, but the tokenizer has no chat template; name another tokenizer (the teacher's may have one), or "
    "give data.chat_template (--chat-template of commands), or use prompt and output"
)
EMPTY_PROMPT = "the prompt is empty: nothing predicts the first token of the response"


class Sample(NamedTuple):
    """A sample before any cut."""

    input_ids: list[int]
    spans: list[int]  # start and stop of every trained response, one after the other


class Encoder:
    """Encodes rows with one tokenizer, in one format.

    - The tokens of a prompt are those of its text alone: these are what a model is given when it answers.
    - The tokens of a response are the rest of prompt and response encoded together, as in the papers. Where the whole
      does not begin with the prompt's tokens, the response is encoded apart, such that both decode to the whole text.
    - The end of a response is what the chat template renders, or else the tokenizer's end token. It is never doubled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: PromptFormat, max_length: float = math.inf) -> None:
        """Of texts that give more than max_length tokens only the beginning is encoded.

        Raises ConfigError for a begin token that the tokenizer lacks.
        """
        self.tokenizer, self.style, self.max_length = tokenizer, style, max_length
        try:
            self.template, self.problem = chat_template(tokenizer, style), NO_TEMPLATE
        except ConfigError as error:  # of no importance to rows without messages
            self.template, self.problem = None, str(error)
        self.end = tokenizer.eos_token_id
        self.ends = {self.end, self.template.end if self.template else None} - {None}
        self.begins = {is_chat: begin_token(tokenizer, style, is_chat) for is_chat in (False, True)}

    def encode(self, rows: Sequence[Row]) -> list[list[Sample] | ConfigError]:
        """The samples of each row, or why it can't be used.

        A row of messages gives one sample with a span for each turn where the template renders the history of a turn as
        it was trained. Where it does not, a new sample begins: Qwen 3's takes the thoughts out of earlier turns.
        """
        results: list[list[Sample] | ConfigError] = [[] for _ in rows]
        turns: list[tuple[int, Turn]] = []
        for index, row in enumerate(rows):
            try:
                if "prompt_ids" in row.values:
                    results[index] = [self._take_ids(row)]
                else:
                    turns += [(index, turn) for turn in self._turns(row.values)]
            except ConfigError as error:
                results[index] = error
        try:
            encoded = self._encode_turns([turn for _, turn in turns])
        except ConfigError as error:  # the tokenizer fails, and does not say at which text
            return [error] if len(rows) == 1 else [self.encode([row])[0] for row in rows]
        for (index, turn), ids in zip(turns, encoded, strict=True):
            if isinstance(samples := results[index], ConfigError):
                continue
            try:
                _append(samples, *self._complete(turn, *ids, is_chat="messages" in rows[index].values))
            except ConfigError as error:
                results[index] = error
        return results

    def encode_prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The tokens before the last answer of each row. Raises ConfigError for a row that can't be used."""
        prompts: list[list[int] | str] = []
        for row in rows:
            try:
                prompts.append(self._prompt(row))
            except ConfigError as error:
                raise ConfigError(f"{row.where}: {error}") from None
        try:
            ids = iter(self._ids([prompt for prompt in prompts if isinstance(prompt, str)]))
        except ConfigError as error:
            for row in rows if len(rows) > 1 else ():
                self.encode_prompts([row])
            raise ConfigError(f"{rows[0].where}: {error}") from error
        for index, row in enumerate(rows):
            if isinstance(prompts[index], str):
                prompts[index] = self._with_begin(next(ids), "messages" in row.values)
            if not prompts[index]:
                raise ConfigError(f"{row.where}: {EMPTY_PROMPT}")
        return prompts

    def describe(self, rows: Sequence[Row]) -> str:
        """One line for people: what prompts begin with, what is trained, and what ends it."""
        if any("prompt_ids" in row.values for row in rows):
            is_mixed = not all("prompt_ids" in row.values for row in rows)
            return "token ids as they are in the data" + (", other rows as text" if is_mixed else "")
        is_chat = self.template is not None and any("messages" in row.values for row in rows)
        begin = f"prompts begin with {self.tokenizer.bos_token}" if self.begins[is_chat] else "no begin token"
        if not is_chat:
            return f"{begin}, responses end with {self.tokenizer.eos_token}"
        turns = "all turns of the assistant are" if self.style.train_on == "all" else "the assistant's last turn is"
        end, header = self.template.end_text or self.tokenizer.eos_token, self.template.header.strip()
        line = f"chat template; {turns} trained, up to {end}"
        if self.begins[True]:
            line += f"; {begin}"
        if header:
            line += f"; the model also learns {header!r}, which the template's generation prompt lacks"
        if "strftime_now" in str(self.tokenizer.chat_template):
            line += "; the template writes the date, which stored tokens keep"
        return line

    def _prompt(self, row: Row) -> list[int] | str:
        """The tokens before the last answer of a row, or their text."""
        if "prompt_ids" in row.values:
            ids, (start, _) = self._take_ids(row)
            return ids[:start]
        return self._need_template().prompt(row.values) if "messages" in row.values else row.values["prompt"]

    def _take_ids(self, row: Row) -> Sample:
        """The sample of a row that has token ids. Nothing is added to these."""
        prompt, response = (_array(row.values.get(key, ())) for key in ("prompt_ids", "output_ids"))
        for ids in (prompt, response):
            indexed_dataset.check_ids(ids, len(self.tokenizer))
        if not len(prompt):
            raise ConfigError(EMPTY_PROMPT)
        check_text(row.values, self.tokenizer)
        ids = [*prompt.tolist(), *response.tolist()]
        return Sample(ids, [len(prompt), len(ids)])

    def _turns(self, values: dict) -> list[Turn]:
        """The trained answers of a row. The response is None where a model is to write it."""
        if "messages" not in values:
            return [Turn(values["prompt"], values.get("output"), values.get("ended") is False)]
        template = self._need_template()
        if values.get("is_prompt") or values["messages"][-1]["role"] != "assistant":
            return [Turn(template.prompt(values), None, True)]
        return list(template.turns(values, self.style.train_on))

    def _need_template(self) -> ChatTemplate:
        if self.template is None:
            raise ConfigError(self.problem)
        return self.template

    def _encode_turns(self, turns: list[Turn]) -> list[tuple[list[int], list[int] | None]]:
        """The tokens of each prompt, and of its response; None for a response that has none after this prompt."""
        limit = LONG_TEXT * self.max_length
        whole = [(turn.prompt, turn.response or "") for turn in turns]
        short = [(_shorten(prompt, limit), _shorten(response, limit)) for prompt, response in whole]
        encoded = self._encode_pairs(short)
        for index, (prompt, response) in enumerate(encoded):
            is_known = len(prompt) + len(response or ()) > self.max_length
            if short[index] != whole[index] and not is_known:  # its tokens are longer than those of other texts
                (encoded[index],) = self._encode_pairs([whole[index]])
        return encoded

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int] | None]]:
        ids = self._ids([text for prompt, response in pairs for text in (prompt, prompt + response)])
        encoded = []
        for (_, response), prompt, whole in zip(pairs, ids[::2], ids[1::2], strict=True):
            fits = whole[: len(prompt)] == prompt
            encoded.append((prompt, whole[len(prompt) :] if fits else self._encode_apart(prompt, response, whole)))
        return encoded

    def _encode_apart(self, prompt: list[int], response: str, whole: list[int]) -> list[int] | None:
        """The tokens of a response that decode to its text after the tokens of its prompt; None if none are found."""
        for anchor in ANCHORS:
            start, ids = self._ids([anchor, anchor + response])
            rest, is_after = ids[len(start) :], ids[: len(start)] == start
            if is_after and self._is_text(prompt + rest, self._decode(prompt) + response, self._decode(whole)):
                return rest
        return None

    def _is_text(self, ids: list[int], *texts: str) -> bool:
        """Whether tokens decode to one of the texts, or to what a tokenizer's normalization makes of it."""
        decoded = self._decode(ids)
        return decoded in texts or unicodedata.normalize("NFKC", decoded) in (
            unicodedata.normalize("NFKC", text) for text in texts
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        with reading("the tokenizer can't encode its text"):
            return self.tokenizer(texts, **options, verbose=False)["input_ids"]

    def _with_begin(self, prompt: list[int], is_chat: bool) -> list[int]:
        begin = self.begins[is_chat]
        return prompt if prompt[: len(begin)] == begin else begin + prompt

    def _complete(
        self, turn: Turn, prompt: list[int], response: list[int] | None, is_chat: bool
    ) -> tuple[list[int], list[int]]:
        """Prompt and response with their begin and end. Raises ConfigError where one of them can't be used."""
        prompt = self._with_begin(prompt, is_chat)
        if not prompt:
            raise ConfigError(EMPTY_PROMPT)
        if turn.response is None:
            return prompt, []
        if not response:
            raise ConfigError(
                f"the tokenizer has no tokens for {turn.response[:20]!r} that continue {turn.prompt[-20:]!r}: change "
                "where prompt and output meet"
            )
        if not turn.is_closed and response[-1] not in self.ends:
            response = [*response, self.end]
        if middle := [end for end in self.ends if end in response[:-1]]:
            token = self.tokenizer.convert_ids_to_tokens(min(middle))
            raise ConfigError(f"the response has the end token {token} in its middle: generation would end there")
        return prompt, response


def begin_token(tokenizer: PreTrainedTokenizerBase, style: PromptFormat, is_chat: bool) -> list[int]:
    """The begin token of prompts, or nothing. Raises ConfigError if one is asked for that the tokenizer lacks."""
    begin = tokenizer.bos_token_id
    if style.begin_token is True:
        if begin is None:
            raise ConfigError("begin_token is true, but the tokenizer has no begin token (bos_token)")
        return [begin]
    adds = begin is not None and not is_chat and tokenizer("a")["input_ids"][:1] == [begin]
    return [begin] if style.begin_token == "auto" and adds else []


def _array(ids: np.ndarray | list[int]) -> np.ndarray:
    return ids if isinstance(ids, np.ndarray) else np.array(ids, dtype=np.int64)


def _append(samples: list[Sample], prompt: list[int], response: list[int]) -> None:
    """Adds a turn to the last sample of its row if that is how its prompt begins, or else as a new sample."""
    spans = [len(prompt), len(prompt) + len(response)]
    if samples and prompt[: len(samples[-1].input_ids)] == samples[-1].input_ids:
        spans = samples.pop().spans + spans
    samples.append(Sample(prompt + response, spans))


def _shorten(text: str, limit: float) -> str:
    """The beginning of a long text, up to a space, where a token begins, or far behind the tokens that are kept."""
    if len(text) <= limit:
        return text
    end = int(limit)
    while (end := text.rfind(" ", int(limit) // 2, end)) > 0:
        if not text[end - 1].isspace():
            return text[:end]
    return text[: int(limit)]
