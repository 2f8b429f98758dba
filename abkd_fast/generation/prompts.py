"""Answers to a few prompts, for people."""

import pathlib

from ..config.models import ModelConfig
from ..config.sampling import SamplingParams
from ..data.chat import PromptFormat
from ..data.rows import Row
from ..data.tokenize import encode_prompts
from ..models import loading, tokenizers
from .answers import Generator
from .sampling import response_seeds


def answer(
    spec: ModelConfig,
    texts: list[str],
    is_chat: bool,
    sampling: SamplingParams,
    *,
    seed: int,
    batch_size: int,
    tokenizer: str | None,
    style: PromptFormat,
    chat_template: str | None,
    device: str,
    dtype: str,
) -> list[str]:
    """A model's answers to prompts, or with is_chat to a user's messages. Raises ConfigError."""
    named = tokenizer or tokenizers.tokenizer_path(spec), "tokenizer"
    model = Generator(spec, named, sampling, batch_size, device, dtype, style, chat_template)
    messages = ([{"role": "user", "content": text}] for text in texts)
    values = [{"messages": each, "is_prompt": True} for each in messages] if is_chat else [{"prompt": t} for t in texts]
    rows = [Row(f"--prompt {number}", each) for number, each in enumerate(values, 1)]
    prompts = encode_prompts(rows, model.tokenizer, style)
    loading.check_prompts(model.hf_config, zip((row.where for row in rows), prompts, strict=True))
    answers = [""] * len(prompts)

    def keep(number: int, response: list[int]) -> None:
        ids = [token for token in response if token < len(model.tokenizer)]
        answers[number] = model.tokenizer.decode(ids, skip_special_tokens=True)

    with model.loaded(pathlib.Path("the answer")):
        model.generate(prompts, response_seeds((seed, index) for index in range(len(prompts))), keep, "answers")
    return answers
