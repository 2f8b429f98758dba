"""The samples as the teacher reads them: the same responses, after another prompt."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .chat import PromptFormat, common_length, trained_answers
from .encode import Encoder, Sample
from .formats import TEACHER
from .rows import Row

SHOWN = 30  # so many characters of a response are named in an error


@dataclasses.dataclass(frozen=True)
class TeacherFormat:
    """How the teacher's prompts become tokens."""

    tokenizer: PreTrainedTokenizerBase  # the run's, with the teacher's chat template if that has its own
    style: PromptFormat
    system: str | None = None  # text before every prompt; before messages, a system message
    has_template: bool = False  # whether messages are rendered in another way than for the student
    key: str = "teacher"  # in the configuration, for messages

    def has_own_prompt(self, row: Row) -> bool:
        """Whether the teacher reads another prompt than the student."""
        is_rendered = self.has_template and "messages" in row.values
        return bool(self.system) or is_rendered or any(key in row.values for key in TEACHER)

    def settings(self, rows: list[Row]) -> tuple:
        """All that tokens depend on, besides the rows' values and the student's tokenizer."""
        return self.system, self.tokenizer.chat_template, dataclasses.asdict(self.style)

    def prompts(self) -> "TeacherPrompts":
        return TeacherPrompts(self)


@dataclasses.dataclass(frozen=True)
class SeveralFormats:
    """How the prompts of several teachers become tokens: each row has its own teacher."""

    formats: dict[str, TeacherFormat]  # by the teacher's name

    def has_own_prompt(self, row: Row) -> bool:
        return self.formats[row.teacher].has_own_prompt(row)

    def settings(self, rows: list[Row]) -> tuple:
        return {name: form.settings(rows) for name, form in self.formats.items()}, [row.teacher for row in rows]

    def prompts(self) -> "SeveralPrompts":
        return SeveralPrompts({name: form.prompts() for name, form in self.formats.items()})


class CutSample(NamedTuple):
    """A student's sample after its cut."""

    input_ids: list[int]
    spans: list[int]
    row: int  # the index of its row
    row_length: int  # its length before the cut
    first: int = 0  # the number of its first trained answer in the row
    is_cut: bool = False  # whether its last response is

    @property
    def responses(self) -> list[list[int]]:
        return [self.input_ids[start:stop] for start, stop in zip(self.spans[::2], self.spans[1::2], strict=True)]


class TeacherPrompts:
    """Puts the student's responses behind the teacher's prompts. The trained tokens are the same, in number and id."""

    def __init__(self, form: TeacherFormat) -> None:
        self.form = form
        # The answers to be trained are named one by one. No prompt is too long: the model's positions limit it.
        self.encoder = Encoder(form.tokenizer, dataclasses.replace(form.style, train_on="all"))

    def views(self, rows: dict[int, Row], samples: list[CutSample]) -> list[Sample | ConfigError]:
        """For each sample what the teacher reads, or why it can't. rows: by the index that samples have."""
        read = self._read({index: row for index, row in rows.items() if self.form.has_own_prompt(row)})
        views = []
        for sample in samples:
            theirs = read.get(sample.row)
            try:
                if isinstance(theirs, ConfigError):
                    raise theirs
                is_given = "prompt_ids" in rows[sample.row].values  # the response, as ids
                own = Sample(sample.input_ids, sample.spans)
                views.append(own if theirs is None else self._view(sample, theirs, is_given))
            except ConfigError as error:
                problem = str(error).replace("data.chat_template", f"{self.form.key}.chat_template")
                views.append(ConfigError(f"as the teacher reads it: {problem}"))
        return views

    def _read(self, rows: dict[int, Row]) -> dict[int, list[Sample] | ConfigError]:
        """The teacher's samples of each row."""
        read, rewritten = {}, {}
        for index, row in rows.items():
            try:
                rewritten[index] = Row(row.where, self._rewrite(row.values))
            except ConfigError as error:
                read[index] = error
        return read | dict(zip(rewritten, self.encoder.encode([*rewritten.values()]), strict=True))

    def _rewrite(self, values: dict) -> dict:
        """The row with the teacher's prompt in place of its own. Token ids are left out."""
        if "teacher_messages" in values or ("messages" in values and "teacher_prompt" not in values):
            return self._rewrite_messages(values)
        prompt = values.get("teacher_prompt", values.get("prompt"))
        if prompt is None:
            raise ConfigError("token ids alone have no text that teacher.system could stand before: add the prompt")
        kept = () if "prompt_ids" in values else ("output", "ended")
        return {"prompt": (self.form.system or "") + prompt, **{key: values[key] for key in kept if key in values}}

    def _rewrite_messages(self, values: dict) -> dict:
        messages, theirs = values.get("messages", []), values.get("teacher_messages")
        trained = [] if "prompt_ids" in values else trained_answers(values)
        trained = trained[-1:] if self.form.style.train_on == "last" else trained
        if theirs is not None:
            messages, trained = _paired(messages, theirs, trained)
        if self.form.system:
            messages, added = _with_system(messages, self.form.system)
            trained = [index + added for index in trained]
        row = {"messages": messages, **{key: values[key] for key in ("tools", "ended") if key in values}}
        return row | ({"trained": trained} if trained else {"is_prompt": True})

    def _view(self, sample: CutSample, theirs: list[Sample], is_given: bool) -> Sample:
        """The responses of a sample behind the prompts in the teacher's samples of its row.

        is_given: the teacher's samples have no responses to compare with.
        """
        turns = [
            (number, start, stop)
            for number, one in enumerate(theirs)
            for start, stop in zip(one.spans[::2], one.spans[1::2], strict=True)
        ][sample.first : sample.first + len(sample.spans) // 2]
        if len({number for number, *_ in turns}) > 1:
            raise ConfigError("its chat template renders the history of an answer in another way: data.train_on=last")
        source, ids, spans, done = theirs[turns[0][0]].input_ids, [], [], 0
        for place, ((_, start, stop), response) in enumerate(zip(turns, sample.responses, strict=True), 1):
            if not is_given:
                self._check_same(source, start, stop, response, sample.is_cut and place == len(turns))
            ids += source[done:start]
            spans += [len(ids), len(ids) + len(response)]
            ids += response
            done = stop
        return Sample(ids, spans)

    def _check_same(self, source: list[int], start: int, stop: int, response: list[int], is_cut: bool) -> None:
        """Raises ConfigError unless the response is what the teacher's prompt is followed by, or its beginning.

        The tokens may differ where prompt and response meet. Their text must not.
        """
        theirs = source[start : start + len(response) if is_cut else stop]
        if theirs == response:
            return
        before, whole, own = map(self._decode, (source[:start], source[:stop], source[:start] + response))
        # A cut may end within a character.
        if whole == own or (is_cut and whole.startswith(own.rstrip("\N{REPLACEMENT CHARACTER}"))):
            return
        same = max(common_length(whole, own), len(before))
        shown = (repr(text[same : same + SHOWN]) for text in (whole, own))
        raise ConfigError("its response has {} in place of {}: the trained tokens must be the same".format(*shown))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.form.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class SeveralPrompts:
    """The same with several teachers, each for its rows."""

    def __init__(self, prompts: dict[str, TeacherPrompts]) -> None:
        self.prompts = prompts

    def views(self, rows: dict[int, Row], samples: list[CutSample]) -> list[Sample | ConfigError]:
        found: dict[int, Sample | ConfigError] = {}  # by the place of a sample
        for name, prompts in self.prompts.items():
            own = {index: row for index, row in rows.items() if row.teacher == name}
            places = [place for place, sample in enumerate(samples) if sample.row in own]
            found |= zip(places, prompts.views(own, [samples[place] for place in places]), strict=True)
        return [found[place] for place in range(len(samples))]


def _paired(own: list[dict], theirs: list[dict], trained: list[int]) -> tuple[list[dict], list[int]]:
    """The teacher's messages, with the row's answer if they end before it, and which answers in them are trained.

    Answers are paired from the end.
    """
    if not trained:
        if theirs[-1]["role"] == "assistant":
            raise ConfigError('"teacher_messages" ends with an answer, but the row has no such message: leave it out')
        return theirs, []
    theirs = theirs if theirs[-1]["role"] == "assistant" else [*theirs, own[-1]]
    answers = _answers(theirs)
    from_end = [len(_answers(own[index:])) for index in trained]
    if from_end[0] > len(answers):
        problem = f'"teacher_messages" has {len(answers)} answers, but of the row the last {from_end[0]} are trained'
        raise ConfigError(f"{problem}: give the whole conversation, or set data.train_on=last")
    return theirs, [answers[-place] for place in from_end]


def _answers(messages: list[dict]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _with_system(messages: list[dict], system: str) -> tuple[list[dict], int]:
    """The messages after a system message; the text of one that is there follows. And how many messages are new."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages], 1
    first = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
    return [first, *messages[1:]], 0
