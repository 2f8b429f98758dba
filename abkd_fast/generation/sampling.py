"""Fast batched generation: which sequences are in the batch, and which token each of them gets next.

transformers 5.24 has no equivalent. Its `generate` pads prompts and keeps finished sequences in the batch, with its
static or compiled cache, too. Its `generate_batch` has one seed for all, no n-gram ban, and is slower on a CPU.
"""

import collections
import contextlib
import itertools
import math
import numbers
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..config.sampling import SamplingParams
from ..errors import ConfigError
from ..losses.arguments import shared_vocabulary
from ..models.causal_lm import CausalLM
from ..models.loading import max_positions
from .decoder import Decoder, prepared, upload
from .graphs import graph_decoder
from .own_cache import OwnCacheDecoder

PREFILL_TOKENS = 4096  # the most tokens of prompts that enter together; a single prompt may have more


def sample(
    model: CausalLM | PreTrainedModel,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int] | int,
    batch_size: int = 32,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Samples responses to prompts.

    A response depends on its prompt and seed, not on other prompts or batch_size:

    - On a CPU in float32 this is exact if the model's widths are multiples of 32, as they usually are: the logits have
      the same bits in any batch.
    - Elsewhere products round differently with the number of sequences. Two tokens within rounding of a tie may then
      change places: hardly ever in float32, now and then in bfloat16.
    - A padded model reads one sequence at a time, with transformers' own cache. So it has the same bits in any batch,
      and takes as long as batches of one.

    Args:
        model: a causal language model. It is in eval mode meanwhile. On a CPU in float32 sampling takes the memory of
            its weights once more. On a GPU a packed one has to compute in 16 bits: by its own type, or under autocast.
        prompts: the tokens of each prompt.
        seeds: one whole number for each prompt; numbers that are equal modulo 2^64 are the same seed. A single number
            gives each prompt a seed of its own, by its place.
        batch_size: how many sequences are in progress at most.
        on_response: is called with the prompt's number and the response when a response ends.

    Returns the tokens of the responses, in the prompts' order. A response ends with an end token (included), at its
    length limit, or where the model has no more positions.

    Raises ConfigError for prompts that are no lists of tokens, an empty prompt, one that leaves no room for a response,
    seeds that are not as many as the prompts, a batch_size below 1, a model that is right neither packed nor padded,
    and a packed one that computes in more than 16 bits on a GPU.
    """
    return [sequence.response for sequence in _run([model], 0.0, prompts, settings, seeds, batch_size, on_response)]


def sample_mixture(
    student: CausalLM | PreTrainedModel,
    teacher: CausalLM | PreTrainedModel,
    teacher_weight: float,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int] | int,
    batch_size: int = 32,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> list[tuple[list[int], list[float], list[float]]]:
    """Samples as `sample` does, from (1 - teacher_weight) q + teacher_weight p: MiniLLM's teacher-mixed sampling.

    q and p are the next-token probabilities of student and teacher, over the common prefix of their vocabularies.
    Returns for each prompt (response, log q of its tokens, log p of its tokens), both before temperature and bans.
    Raises ConfigError as `sample` does, and for a weight that is not from 0 to 1.
    """
    if not 0 <= teacher_weight <= 1:
        raise ConfigError(f"teacher_weight is {teacher_weight}, expected at least 0 and at most 1")
    models = [student, teacher]
    run = _run(models, teacher_weight, prompts, settings, seeds, batch_size, on_response)
    return [(sequence.response, *sequence.log_probs) for sequence in run]


class _Sequence:
    """One prompt and the response so far."""

    def __init__(self, index: int, prompt: list[int], seed: int, limit: int, ngram_size: int) -> None:
        self.index = index
        self.tokens, self.prompt_length, self.seed, self.limit = [], len(prompt), seed, limit
        self.log_probs = [], []  # the student's and the teacher's; empty unless their mixture is sampled
        # The tokens that have followed each sequence of ngram_size - 1 tokens.
        self.ngram_size, self.followers = ngram_size, collections.defaultdict(list)
        for token in prompt:
            self.append(token)

    @property
    def response(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.ngram_size and len(self.tokens) >= self.ngram_size:
            *prefix, last = self.tokens[-self.ngram_size :]
            self.followers[tuple(prefix)].append(last)

    def has_ended(self, settings: SamplingParams) -> bool:
        return self.new_tokens == self.limit or self.tokens[-1] in settings.eos_token_ids

    def banned(self) -> list[int]:
        """The tokens that would repeat an n-gram."""
        if not self.ngram_size or len(self.tokens) < self.ngram_size - 1:
            return []
        return self.followers.get(tuple(self.tokens[len(self.tokens) - self.ngram_size + 1 :]), [])


def response_seeds(questions: Iterable[tuple[int, int]]) -> list[int]:
    """Sampling seeds for pairs (seed, row). A response depends on these two and its prompt, on nothing else."""
    return [(seed << 32) + row for seed, row in questions]


def _check_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """The prompts, also from tensors, as lists of whole numbers. Raises ConfigError for text, and for a single one."""
    checked = []
    for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(prompt, str):
            problem = f"prompt {index} is text ({prompt[:20]!r}), expected its tokens"
            raise ConfigError(f'{problem}: tokenizer(text)["input_ids"], or tokenizer.apply_chat_template')
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # of a tensor or an array
        if not isinstance(prompt, list | tuple) or not all(isinstance(token, numbers.Integral) for token in prompt):
            raise ConfigError(
                f"prompt {index} is {str(prompt)[:20]}, expected a list of tokens: prompts is a list of them"
            )
        checked.append([*map(int, prompt)])
    return checked


@torch.no_grad()
def _run(
    models: list[CausalLM | PreTrainedModel],
    teacher_weight: float,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int] | int,
    batch_size: int,
    on_response: Callable[[int, list[int]], None] | None,
) -> list[_Sequence]:
    """Continuous batching: when sequences end, waiting prompts take their slots."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    prompts = _check_prompts(prompts)
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # of a tensor or an array
    if isinstance(seeds, int):
        seeds = response_seeds((seeds, place) for place in range(len(prompts)))
    if len(seeds) != len(prompts):
        raise ConfigError(
            f"there are {len(seeds)} seeds and {len(prompts)} prompts: give one number, or one per prompt"
        )
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(prepared(model)) for model in models]
        sequences = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            limit = _limit(models, prompt, settings, index)
            sequences.append(_Sequence(index, prompt, seed, limit, settings.no_repeat_ngram_size))
        capacity = max((len(sequence.tokens) + sequence.limit for sequence in sequences), default=0)
        kinds = [_decoder_kind(model, capacity) for model in models]
        # Decoders that read sequences one by one gain nothing from several in progress.
        slots = min(batch_size, len(prompts)) if set(kinds) != {OwnCacheDecoder} else 1
        decoders = [stack.enter_context(make(m, slots, capacity)) for make, m in zip(kinds, models, strict=True)]
        waiting = collections.deque(sorted(sequences, key=lambda sequence: -len(sequence.tokens)))
        running: dict[int, _Sequence] = {}
        while waiting or running:
            free = [slot for slot in range(slots) if slot not in running]
            # Some enter together: all others wait for a prefill.
            entering = _enter(waiting, free) if len(free) >= slots / 8 or not running else {}
            active = entering or running
            tokens = {slot: sequence.tokens for slot, sequence in active.items()}
            logits = [decoder.prefill(tokens) if entering else decoder.decode(tokens) for decoder in decoders]
            _advance(list(active.values()), logits, teacher_weight, settings)
            running = running | entering  # not in place: `active` may be the same dictionary
            for slot, sequence in active.items():
                if sequence.has_ended(settings):
                    del running[slot]
                    if on_response:
                        on_response(sequence.index, sequence.response)
    return sequences


def _decoder_kind(model: CausalLM, capacity: int) -> Callable[[CausalLM, int, int], Decoder]:
    """What makes the decoder for a model and sequences of up to `capacity` tokens."""
    longest = capacity if model.longest_decoded is None else model.longest_decoded
    if model.form != "packed" or longest < capacity:
        return OwnCacheDecoder
    return graph_decoder if model.head.weight.device.type == "cuda" else Decoder


def _limit(models: list[CausalLM], prompt: list[int], settings: SamplingParams, index: int) -> int:
    """How many new tokens a prompt may get. Raises ConfigError if it is none."""
    if not prompt:
        raise ConfigError(f"prompt {index} is empty: nothing predicts the first token of the response")
    limit = settings.max_new_tokens
    positions = [(model.key, max_positions(model.causal_lm.config)) for model in models]
    rooms = {f"the {key} {room} positions": room for key, room in positions if room is not None}
    if settings.max_length is not None:
        rooms[f"max_length is {settings.max_length}"] = settings.max_length
    for what, room in rooms.items():
        limit = min(limit, room - len(prompt))
        if limit < 1:
            raise ConfigError(f"prompt {index} has {len(prompt)} tokens, and {what}: no room for a response")
    return limit


def _enter(waiting: collections.deque[_Sequence], free: list[int]) -> dict[int, _Sequence]:
    """Takes as many waiting sequences as there are free slots, and as one prefill may read."""
    entering, tokens = {}, 0
    for slot in free:
        if not waiting or (entering and tokens + len(waiting[0].tokens) > PREFILL_TOKENS):
            break
        entering[slot] = waiting.popleft()
        tokens += len(entering[slot].tokens)
    return entering


def _advance(sequences: list[_Sequence], logits: list[Tensor], teacher_weight: float, settings: SamplingParams) -> None:
    """Appends the next token to B sequences, given logits [B, V] of the model, or of student and teacher."""
    scores = logits[0]
    if len(logits) > 1:
        # The losses of what is written compare the same tokens.
        vocabulary = settings.vocabulary or shared_vocabulary(*(x.shape[1] for x in logits))
        student, teacher = (x[:, :vocabulary].log_softmax(1) for x in logits)
        scores = ((1 - teacher_weight) * student.exp() + teacher_weight * teacher.exp()).log()
    tokens = _choose(scores, sequences, settings)
    values = [x.gather(1, tokens[:, None])[:, 0] for x in (student, teacher)] if len(logits) > 1 else []
    numbers = torch.stack([x.double() for x in (tokens, *values)]).tolist()  # the host waits for a GPU here, once
    for sequence, token, *log_probs in zip(sequences, *numbers, strict=True):
        sequence.append(int(token))
        for known, log_prob in zip(sequence.log_probs, log_probs, strict=False):
            known.append(log_prob)


def _choose(scores: Tensor, sequences: list[_Sequence], settings: SamplingParams) -> Tensor:
    """Returns the next token of each sequence, [B].

    scores: log-probabilities up to a constant, [B, V]; may be overwritten.
    """
    scores = scores[:, : settings.vocabulary]
    bans = []  # pairs of row and token
    for row, sequence in enumerate(sequences):
        ends = settings.eos_token_ids if sequence.new_tokens < settings.min_new_tokens else ()
        bans += [(row, token) for token in (*sequence.banned(), *ends)]
    seeds = [sequence.seed % 2**64 - 2**63 for sequence in sequences]
    steps = [sequence.new_tokens for sequence in sequences]
    uploaded = upload([*seeds, *steps, *itertools.chain(*bans)], scores.device)
    seeds, steps = uploaded[: 2 * len(sequences)].view(2, -1)
    if bans:
        rows, tokens = uploaded[2 * len(sequences) :].view(-1, 2).T
        scores.index_put_((rows, tokens), scores.new_full((), -math.inf))  # a plain number would be uploaded
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
    return _draw(scores.softmax(1), seeds, steps)


def _draw(probabilities: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    """Draws one token for each row of probabilities [B, V], with the random numbers of its seed and step: [B].

    Draws a block of tokens, then a token of that block. Each is the winner of an exponential race (argmax of p / e).
    That takes 2 sqrt(V) random numbers; a race of all tokens takes V. It is as exact for rare tokens as for frequent
    ones; the inverse of a cumulative sum is not.
    """
    rows, vocabulary = probabilities.shape
    width = math.isqrt(vocabulary - 1) + 1
    blocks = F.pad(probabilities, (0, width * width - vocabulary)).view(rows, width, width)
    noise = _exponentials(seeds, steps, 2 * width)
    block = (blocks.sum(2) / noise[:, :width]).argmax(1)
    inside = blocks[torch.arange(rows, device=block.device), block]
    return block * width + (inside / noise[:, width:]).argmax(1)


def _exponentials(seeds: Tensor, steps: Tensor, count: int) -> Tensor:
    """Exponentially distributed numbers [B, count], float64, that depend on seed, step and column (SplitMix64)."""
    key = _mix(_mix(seeds) + steps)
    columns = torch.arange(1, count + 1, device=seeds.device)
    bits = _mix(key[:, None] + columns * -0x61C8864680B583EB)  # 2^64 / golden ratio, as a signed number
    return -((_shift(bits, 12) + 0.5) * 2.0**-52).log()  # neither 0 nor infinite


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on 64-bit numbers. Products wrap around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills in zeros (>> copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
