"""Fast batched generation: which sequences are in the batch, and which token each of them gets next.

What transformers 5.24 has of this does not give it: `generate` pads prompts and keeps finished sequences in the batch,
also with its static or compiled cache; `generate_batch` has one seed for all, no n-gram ban, and is slower on a CPU.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..config.sampling import SamplingParams
from ..errors import ConfigError
from ..losses.arguments import shared_vocabulary
from ..models.packed import PackedCausalLM
from .decoder import Decoder, prepared

PREFILL_TOKENS = 4096  # prompts that enter together have at most so many tokens, unless it is a single one


def sample(
    model: PackedCausalLM | PreTrainedModel,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int],
    batch_size: int = 32,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Responses to prompts, in tokens, in the prompts' order, the end token included where one came.

    A response depends on its prompt and seed, not on the others or batch_size. On a CPU in float32 this is exact where
    a model's widths are multiples of 32, as they usually are: logits are the same bits in any company. Elsewhere
    products round differently with the number of rows, and two tokens within rounding of a tie may change places: as
    seldom as rounding is small against 1, hardly ever in float32, now and then in bfloat16.

    At most batch_size sequences are in progress; a response also ends where the model has no more positions.

    Args:
        model: is in eval mode meanwhile, and takes the memory of its weights once more on a CPU in float32.
        prompts: tokens of each.
        seeds: one a prompt, whole numbers that count modulo 2^64.
        on_response: is called with each response as it ends, after its prompt's number.

    Raises ConfigError for an empty prompt, one without room for a response, a batch_size below 1, and a model that
    packing can't do.
    """
    return [sequence.response for sequence in _run([model], 0.0, prompts, settings, seeds, batch_size, on_response)]


def sample_mixture(
    student: PackedCausalLM | PreTrainedModel,
    teacher: PackedCausalLM | PreTrainedModel,
    teacher_weight: float,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int],
    batch_size: int = 32,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> list[tuple[list[int], list[float], list[float]]]:
    """As `sample`, from (1 - teacher_weight) q + teacher_weight p: MiniLLM's teacher-mixed sampling.

    q and p are the next-token probabilities of student and teacher, over the common prefix of their vocabularies.
    Returns each response with log q and log p of its tokens, before temperature and bans. Raises ConfigError for a
    weight that is not from 0 to 1, too.
    """
    if not 0 <= teacher_weight <= 1:
        raise ConfigError(f"teacher_weight is {teacher_weight}, expected at least 0 and at most 1")
    models = [student, teacher]
    run = _run(models, teacher_weight, prompts, settings, seeds, batch_size, on_response)
    return [(sequence.response, *sequence.log_probs) for sequence in run]


class _Sequence:
    """One prompt and what has been generated for it."""

    def __init__(self, index: int, prompt: list[int], seed: int, limit: int, ngram_size: int) -> None:
        self.index = index
        self.tokens, self.prompt_length, self.seed, self.limit = list(prompt), len(prompt), seed, limit
        self.log_probs = [], []  # of a mixture: student's and teacher's
        self.ngram_size, self.followers = ngram_size, collections.defaultdict(list)
        if ngram_size:
            for end in range(ngram_size, len(prompt) + 1):
                self._remember(end)

    @property
    def response(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.ngram_size and len(self.tokens) >= self.ngram_size:
            self._remember(len(self.tokens))

    def _remember(self, end: int) -> None:
        *prefix, last = self.tokens[end - self.ngram_size : end]
        self.followers[tuple(prefix)].append(last)

    def has_ended(self, settings: SamplingParams) -> bool:
        return self.new_tokens == self.limit or self.tokens[-1] in settings.eos_token_ids

    def banned(self) -> list[int]:
        """The tokens that would repeat an n-gram."""
        if not self.ngram_size or len(self.tokens) < self.ngram_size - 1:
            return []
        return self.followers.get(tuple(self.tokens[len(self.tokens) - self.ngram_size + 1 :]), [])


@torch.no_grad()
def _run(
    models: list[PackedCausalLM | PreTrainedModel],
    teacher_weight: float,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int],
    batch_size: int,
    on_response: Callable[[int, list[int]], None] | None,
) -> list[_Sequence]:
    """Continuous batching: whenever sequences have ended, waiting prompts take their slots."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(prepared(model)) for model in models]
        limits = [_limit(models, prompt, settings, index) for index, prompt in enumerate(prompts)]
        sequences = [
            _Sequence(index, *values, settings.no_repeat_ngram_size)
            for index, values in enumerate(zip(prompts, seeds, limits, strict=True))
        ]
        slots = min(batch_size, len(prompts))
        capacity = max((len(sequence.tokens) + sequence.limit for sequence in sequences), default=0)
        decoders = [Decoder(model, slots, capacity) for model in models]
        waiting = collections.deque(sorted(sequences, key=lambda sequence: -len(sequence.tokens)))
        running: dict[int, _Sequence] = {}
        while waiting or running:
            entering = _enter(waiting, [slot for slot in range(slots) if slot not in running])
            active = entering or running
            tokens = {slot: sequence.tokens for slot, sequence in active.items()}
            logits = [decoder.prefill(tokens) if entering else decoder.decode(tokens) for decoder in decoders]
            _advance(list(active.values()), logits, teacher_weight, settings)
            running = running | entering  # never in place: `active` may be the same dictionary
            for slot, sequence in active.items():
                if sequence.has_ended(settings):
                    del running[slot]
                    if on_response:
                        on_response(sequence.index, sequence.response)
    return sequences


def _limit(models: list[PackedCausalLM], prompt: list[int], settings: SamplingParams, index: int) -> int:
    """How many new tokens a prompt may get."""
    if not prompt:
        raise ConfigError(f"prompt {index} is empty: nothing predicts the first token of the response")
    limit = settings.max_new_tokens
    rooms = {f"the {m.key} {room} positions": room for m in models if (room := _positions(m)) is not None}
    if settings.max_length is not None:
        rooms[f"max_length is {settings.max_length}"] = settings.max_length
    for what, room in rooms.items():
        limit = min(limit, room - len(prompt))
        if limit < 1:
            raise ConfigError(f"prompt {index} has {len(prompt)} tokens, and {what}: no room for a response")
    return limit


def _positions(model: PackedCausalLM) -> int | None:
    return getattr(model.causal_lm.config, "max_position_embeddings", None)


def _enter(waiting: collections.deque[_Sequence], free: list[int]) -> dict[int, _Sequence]:
    """Takes waiting sequences for free slots, as many as are read at once."""
    entering, tokens = {}, 0
    for slot in free:
        if not waiting or (entering and tokens + len(waiting[0].tokens) > PREFILL_TOKENS):
            break
        entering[slot] = waiting.popleft()
        tokens += len(entering[slot].tokens)
    return entering


def _advance(sequences: list[_Sequence], logits: list[Tensor], teacher_weight: float, settings: SamplingParams) -> None:
    """Gives B sequences their next tokens, from logits [B, V], or from those of student and teacher."""
    scores = logits[0]
    if len(logits) > 1:
        vocabulary = shared_vocabulary(*(x.shape[1] for x in logits))
        student, teacher = (x[:, :vocabulary].log_softmax(1) for x in logits)
        scores = ((1 - teacher_weight) * student.exp() + teacher_weight * teacher.exp()).log()
    tokens = _choose(scores, sequences, settings)
    if len(logits) > 1:
        for model, log_probs in enumerate((student, teacher)):
            for sequence, value in zip(sequences, log_probs.gather(1, tokens[:, None])[:, 0].tolist(), strict=True):
                sequence.log_probs[model].append(value)
    for sequence, token in zip(sequences, tokens.tolist(), strict=True):
        sequence.append(token)


def _choose(scores: Tensor, sequences: list[_Sequence], settings: SamplingParams) -> Tensor:
    """The next token of each sequence, [B], from log-probabilities up to a constant [B, V], which it may overwrite."""
    scores = scores[:, : settings.vocabulary]
    for row, sequence in enumerate(sequences):
        banned = sequence.banned()
        if sequence.new_tokens < settings.min_new_tokens:
            banned = [*banned, *settings.eos_token_ids]
        if banned:
            scores[row, banned] = -math.inf
    if settings.temperature == 0:
        return scores.argmax(1)
    if settings.temperature != 1:
        scores /= settings.temperature
    if 0 < settings.top_k < scores.shape[1]:
        scores.masked_fill_(scores < scores.topk(settings.top_k, 1).values[:, -1:], -math.inf)
    if settings.top_p < 1:
        ascending, order = scores.sort(1)
        dropped = ascending.softmax(1).cumsum(1) <= 1 - settings.top_p
        dropped[:, -1] = False
        scores.masked_fill_(dropped.scatter(1, order, dropped), -math.inf)
    seeds = torch.tensor([[s.seed % 2**64 - 2**63, s.new_tokens] for s in sequences], device=scores.device)
    return _draw(scores.softmax(1), *seeds.T)


def _draw(probabilities: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    """A token of each row [B, V], by the random numbers of its seed and step: [B].

    First a block of tokens, then one within it, each the winner of an exponential race (argmax of p / e): that needs
    2 sqrt(V) random numbers, where a race of all tokens needs V, and unlike the inverse of a cumulative sum it is as
    exact for rare tokens as for frequent ones.
    """
    rows, vocabulary = probabilities.shape
    width = math.isqrt(vocabulary - 1) + 1
    blocks = F.pad(probabilities, (0, width * width - vocabulary)).view(rows, width, width)
    noise = _exponentials(seeds, steps, 2 * width)
    block = (blocks.sum(2) / noise[:, :width]).argmax(1)
    inside = blocks[torch.arange(rows, device=block.device), block]
    return block * width + (inside / noise[:, width:]).argmax(1)


def _exponentials(seeds: Tensor, steps: Tensor, count: int) -> Tensor:
    """Exponentially distributed numbers [B, count] in float64: functions of seed, step and column (SplitMix64)."""
    key = _mix(_mix(seeds) + steps)
    columns = torch.arange(1, count + 1, device=seeds.device)
    bits = _mix(key[:, None] + columns * -0x61C8864680B583EB)  # 2^64 / golden ratio, as a signed number
    return -((_shift(bits, 12) + 0.5) * 2.0**-52).log()  # neither 0 nor infinite


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, on 64 bits; products wrap around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, filling in zeros where >> copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
