"""Tokenizers of models: read, given a chat template, kept for later, compared; and the tokens that end a response."""

import json
import pathlib
from collections.abc import Callable

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..config.models import ModelConfig
from ..data import quickstart
from ..data.chat import PromptFormat, chat_template, end_of_turn
from ..data.encode import begin_token
from ..errors import TOO_DEEP, ConfigError, is_deep, reading
from ..files import check_path_length, entries, is_local_path


def read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """A tokenizer; "quickstart" is that of the generated tasks. Raises ConfigError where there is none."""
    if path == "quickstart":
        return quickstart.tokenizer()
    check_path_length(key, path)
    folder = pathlib.Path(path)
    if folder.is_dir() and not any(entries(folder, f"{kind}*") for kind in ("tokenizer", "vocab", "spiece")):
        raise ConfigError(f"{key}: {path} is a folder without a tokenizer; name another as tokenizer")
    if not folder.exists() and is_local_path(path):
        raise ConfigError(f"{key}: {path}: no tokenizer there (no such folder)")
    with reading(f"{key}: {path}: no tokenizer there"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")  # some can be read, and encode nothing
        if is_deep(tokenizer.init_kwargs):
            raise ValueError(f"tokenizer_config.json {TOO_DEEP}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: {path}: has no end token (eos_token), which every response needs")
    return tokenizer


def tokenizer_path(spec: ModelConfig) -> str:
    """Where a model's tokenizer is: in the folder of its adapter if that has one, or with the model."""
    settings = pathlib.Path(spec.adapter or "", "tokenizer_config.json")
    return spec.adapter if spec.adapter and settings.exists() else spec.path


def use_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None, key: str, style: PromptFormat) -> None:
    """Takes the chat template in a file in place of the tokenizer's. Raises ConfigError for a file that has none."""
    if path is None:
        return
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{key}: {path}: can't be read ({reason}); expected a file with a chat template") from None
    if not text.strip():
        raise ConfigError(f"{key}: {path}: is empty, expected a chat template")
    tokenizer.chat_template = text
    try:
        chat_template(tokenizer, style)
    except ConfigError as error:
        raise ConfigError(f"{key}: {path}: {error}") from None


def keep_chat_format(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> None:
    """Writes the values of a chat template, and a begin token that it lacks, into the template itself.

    The tokenizer is saved with the model, so later commands and other tools render prompts as in training. They may
    still give other values. A template that can't be used stays as it is: rows without messages don't need it.
    """
    try:
        template = chat_template(tokenizer, style)
    except ConfigError:
        return
    if template is None:
        return
    added = _kept_values(style)
    question = template.render([{"role": "user", "content": "question"}], True)
    if style.begin_token is True and not question.startswith(tokenizer.bos_token or ""):
        added += "{{ bos_token }}"

    _rewrite_templates(tokenizer, lambda text: text if text.startswith(added) else added + text)


def take_back_values(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> None:
    """Takes the values that `keep_chat_format` has written out of the chat template again."""
    _rewrite_templates(tokenizer, lambda text: text.removeprefix(_kept_values(style)))


def _kept_values(style: PromptFormat) -> str:
    values = [
        f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}"
        for key, value in (style.chat_template_kwargs or {}).items()
    ]
    return "".join(values) + ("{{ '' }}" if values else "")  # else a line end that follows a block would vanish


def _rewrite_templates(tokenizer: PreTrainedTokenizerBase, rewrite: Callable[[str], str]) -> None:
    texts = tokenizer.chat_template
    if isinstance(texts, dict):  # several by name, as Command R has
        tokenizer.chat_template = {name: rewrite(text) for name, text in texts.items()}
    elif texts is not None:
        tokenizer.chat_template = rewrite(texts)


def keep_begin_token(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> bool:
    """Makes a tokenizer add a begin token to plain text, or none, as the style says. Returns whether it does now.

    The tokenizer is saved with the model, and later commands and other tools ask it.
    """
    if style.begin_token == "auto":
        return True
    auto, wanted = PromptFormat(), begin_token(tokenizer, style, is_chat=False)
    if begin_token(tokenizer, auto, is_chat=False) != wanted:
        tokenizer.add_bos_token = bool(wanted)
    return begin_token(tokenizer, auto, is_chat=False) == wanted


def end_tokens(path: str | None, tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> tuple[int, ...]:
    """The tokens that end what a model writes, from three sources; each is one of the tokenizer's:

    - the tokenizer's end token;
    - `eos_token_id` of the model's generation_config.json, a number or a list;
    - the token with which the chat template ends a turn of the assistant.

    Args:
        path: the model's folder or Hub name; None for random weights.

    Raises ConfigError for a damaged generation_config.json, and for a chat template that can't be used.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer, style), *(_generation_ends(path) if path else ())}
    return tuple(sorted(token for token in ends - {None} if 0 <= token < len(tokenizer)))


def template_ids(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> list[int]:
    """The tokens of a question and an answer, as the chat template renders them; none without a template of use."""
    try:
        template = chat_template(tokenizer, style)
    except ConfigError:  # rows without messages don't need it
        template = None
    if template is None:
        return []
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    texts = template.render([question], True), template.render([question, answer], False)
    return [token for ids in tokenizer([*texts], add_special_tokens=False)["input_ids"] for token in ids]


def _generation_ends(path: str) -> list[int]:
    try:
        file = cached_file(path, GENERATION_CONFIG_NAME)
    except OSError:  # there is none, or the Hub can't be asked; transformers goes on without it, too
        return []
    with reading(f"{file} can't be read", ": get it again"):
        values = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
        ends, is_derived = values.get("eos_token_id"), values.get("_from_model_config", False)
        if is_deep(values):
            raise ValueError(f"it {TOO_DEEP}")
    several = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in several):
        shown = json.dumps(ends)[:60]
        raise ConfigError(f"{file}: eos_token_id is {shown}, expected the number of a token, or a list of such")
    if is_derived and ends is not None and ends == getattr(_default_config(path), "eos_token_id", None):
        return []  # the default of the configuration's class; with this tokenizer it may be another token
    return several


def _default_config(path: str) -> PretrainedConfig:
    return type(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(decoder=True))()


def set_end_tokens(model: PreTrainedModel, ends: tuple[int, ...]) -> None:
    """Makes the generation_config.json that is saved with a model name these tokens. All else stays as published."""
    settings = model.generation_config
    settings.eos_token_id, settings._from_model_config = ends[0] if len(ends) == 1 else list(ends), False
    # transformers refuses to save values that don't fit together, such as a temperature without do_sample, unless they
    # were published so. It knows that by this hash.
    settings._original_object_hash = hash(settings)
