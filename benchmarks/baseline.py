"""The published way of a training step, written from its description, and the methods that timing.py times.

The code released with ABKD, DistiLLM and MiniLLM pads every sample to the full length. Student and teacher compute
logits at every position, the teacher in every step. Losses are eager PyTorch over the whole vocabulary. Responses come
from transformers' `generate`, by batches padded on the left, until the longest one is done.

To the baseline's advantage, this is left out: float16 with loss scaling, DeepSpeed, guards against infinite logits,
synchronizations (two a step, and one for every token of MiniLLM's rollouts), all-reduces, and the second response to
every prompt that MiniLLM generates for its log.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.activations import ACT2FN

from abkd_fast.data.batches import StepBatch, prompt_of
from abkd_fast.losses.divergences import AlphaBeta, AlphaNet, JensenShannon, SkewForwardKL
from abkd_fast.teacher.teacher import Teacher
from abkd_fast.training.trainer import Trainer
from kernels import alpha_beta_rows, softmaxes
from workload import LENGTH, NEW_TOKENS, response_lengths

PROMPT_LENGTH = 256  # prompts are padded to it before generation
CHUNK = 16  # prompts that MiniLLM generates from at once

WAYS = {"published": "published way", "ours": "ours", "cached": "ours, teacher's states cached"}
PARTS = {"data": "trains on the data", "rollout": "writes responses"}
PARTS |= {"new": "trains on new responses", "again": "trains on old responses"}

Device = torch.device | str
Key = tuple[str, str, str]  # method, way, part
Numbers = tuple[Tensor, Tensor]  # a step's loss and gradient norm
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student logits [B, S, V], teacher logits [B, S, V], labels [B, S]


class PaddedBatch(NamedTuple):
    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    labels: Tensor  # [B, S]: the next token if it belongs to the response, else -100


def pad(rows: list[list[int]], length: int | None, device: Device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, length], padded with 0; None is the length of the longest row."""
    length = length or max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def pad_samples(samples: list[dict], length: int | None, device: torch.device) -> PaddedBatch:
    """Samples of the trainer's data set, padded on the right."""
    ids, mask = pad([sample["input_ids"] for sample in samples], length, "cpu")
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        begin, end = sample["spans"]
        labels[row, begin - 1 : end - 1] = ids[row, begin:end]
    return PaddedBatch(*(x.to(device) for x in (ids, mask, labels)))


def split(samples: list[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of samples."""
    responses = [sample["input_ids"][slice(*sample["spans"])] for sample in samples]
    return [prompt_of(sample) for sample in samples], responses


def generate(model: nn.Module, prompts: list[list[int]], length: int | None, new_tokens: int, **more: object) -> Tensor:
    """Responses [B, R] of transformers' `generate` at temperature 1, to prompts padded on the left."""
    ids, mask = pad(prompts, length, model.device, left=True)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
    return model.generate(input_ids=ids, attention_mask=mask, **sampling, **more)[:, ids.shape[1] :]


def _mean(rows: Tensor, labels: Tensor) -> Tensor:
    """The mean of [B, S] over the positions that have a label."""
    kept = labels != -100
    return (rows * kept).sum() / kept.sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float().flatten(0, 1), labels.flatten())


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(p, q) plus the entropy of p, as released: the cross-entropy of q under p."""
    p = teacher.softmax(-1, dtype=torch.float32)
    return _mean(-(p * student.log_softmax(-1, dtype=torch.float32)).sum(-1), labels)


def alpha_beta(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return _mean(alpha_beta_rows(student, teacher, AlphaBeta().alpha, AlphaBeta().beta), labels)


def alphanet(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The larger of two batch means, as released."""
    branches = [(branch.alpha, 1 - branch.alpha) for branch in AlphaNet().branches]
    return torch.maximum(*(_mean(alpha_beta_rows(student, teacher, *branch), labels) for branch in branches))


def jensen_shannon(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    lam, (p, q) = JensenShannon().lam, softmaxes(student, teacher)
    log_p, log_q = teacher.log_softmax(-1, dtype=torch.float32), student.log_softmax(-1, dtype=torch.float32)
    log_m = ((1 - lam) * p + lam * q).log()
    return _mean(lam * (q * (log_q - log_m)).sum(-1) + (1 - lam) * (p * (log_p - log_m)).sum(-1), labels)


def skew_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The divergence plus the entropy of p, as released."""
    lam, (p, q) = SkewForwardKL().lam, softmaxes(student, teacher)
    return _mean(-(p * (lam * p + (1 - lam) * q).log()).sum(-1), labels)


class TeacherMix(LogitsProcessor):
    """MiniLLM's sampling from (1 - weight) q + weight p. The teacher runs beside the student."""

    def __init__(self, teacher: nn.Module, attention_mask: Tensor, weight: float) -> None:
        self.teacher, self.attention_mask, self.weight, self.cache = teacher, attention_mask, weight, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = F.pad(self.attention_mask, (0, input_ids.shape[1] - self.attention_mask.shape[1]), value=1)
        new = slice(None) if self.cache is None else slice(-1, None)
        cache = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        inputs = {"input_ids": input_ids[:, new], "attention_mask": mask, "position_ids": token_positions(mask)[:, new]}
        out = self.teacher(**inputs, **cache)
        self.cache = out.past_key_values
        p, q = softmaxes(scores, out.logits[:, -1])
        return ((1 - self.weight) * q + self.weight * p).log()


class RolloutBatch(NamedTuple):
    """MiniLLM's responses R behind their prompts P, and what is known when they are written."""

    input_ids: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R]: 0 in the padding, left of prompts and right of responses
    log_probs: Tensor  # [B, R], of the student that wrote
    weights: Tensor  # [B, R]: its probability over the mixture's
    rewards: Tensor  # [B, R], 0 in the padding
    mask: Tensor  # [B, R]: 1 where there is a response


@dataclasses.dataclass(frozen=True)
class Method:
    method: str  # as in a configuration, like the loss
    loss: str | None = None  # None without a teacher
    baseline_loss: Loss | None = None
    has_entropy: bool = False  # the baseline's value contains the teacher's entropy besides the divergence
    # How much of each part there is for a sample trained on: prompts answered for "rollout", else a share of the steps.
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: {"data": 1.0})
    on_policy: dict = dataclasses.field(default_factory=dict)  # of the configuration: every step writes

    @property
    def is_on_policy(self) -> bool:
        return "rollout" in self.parts


REUSE = {"rollout": 0.25, "new": 0.25, "again": 0.75}
HALF, REPLAY = {"data": 0.5, "rollout": 0.5, "new": 0.5}, {"data": 0.5, "rollout": 0.25, "new": 0.25, "again": 0.25}
METHODS = {
    "SFT": Method("sft"),
    "KD": Method("kd", "fkl", forward_kl, has_entropy=True),
    "MiniLLM": Method("minillm", "rkl", parts=REUSE),
    "GKD": Method("gkd", "jsd:0.1", jensen_shannon, parts=HALF, on_policy={"fraction": 1.0, "replay_rows": 0}),
    "DISTILLM": Method(
        "distillm", "sfkl:0.1", skew_forward_kl, has_entropy=True, parts=REPLAY, on_policy={"threshold": 1.0}
    ),
    "AlphaNet": Method("kd", "alphanet:0.2,0.8,batch", alphanet),
    "ABKD": Method("ab", "ab:0.2,0.7", alpha_beta),
}
NOTES = {  # where the shares come from
    "MiniLLM": "every response is trained on in 4 epochs, as published",
    "GKD": "half of the steps write responses and train on as many, as published",
    "DISTILLM": "its threshold, which follows the dev loss, is assumed to be .5 on average, so half of the steps "
    "train on responses; by its decreasing schedule half of those write new ones, and the others replay",
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One batch, for either side."""

    batch: StepBatch
    samples: list[dict]
    text: list[dict]  # blocks of plain text
    padded: PaddedBatch
    padded_text: PaddedBatch | None
    prompts: list[dict]  # answered by MiniLLM's rollouts; those of the samples come first
    baseline_prompts: list[dict]  # of these a chunk, or as many as a step needs


@contextlib.contextmanager
def train_mode(module: nn.Module, dropout: bool) -> Iterator[None]:
    """Trains without dropout, as MiniLLM does on responses, unless `dropout`."""
    training = module.training
    module.train(training and dropout)
    yield
    module.train(training)


class Baseline:
    """The published way's steps on a trainer's very weights, with modules and an optimizer of its own."""

    def __init__(self, trainer: Trainer, teacher: Teacher) -> None:
        student, optim = trainer.student.model, trainer.config.optim
        self.student, self.teacher, self.minillm = _twin(student), _twin(teacher.model.model), trainer.config.minillm
        self.device, self.precision, self.clip_norm = trainer.device, trainer.precision, optim.clip_norm
        self.written: dict[str, list[dict] | RolloutBatch] = {}
        matrices, vectors = ([p for p in student.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def run(self, key: Key, turn: Turn) -> Numbers | None:
        """One step: writes responses, or trains."""
        name, _, part = key
        is_minillm = name == "MiniLLM"
        with self.precision():
            if part == "rollout":
                samples = turn.baseline_prompts if is_minillm else turn.samples
                self.written[name] = self.roll_out(samples) if is_minillm else self.write(samples)
                return None
            if part != "data" and is_minillm:
                rollouts = RolloutBatch(*(field[: len(turn.samples)] for field in self.written[name]))
                with train_mode(self.student, dropout=False):
                    return self.policy_step(rollouts, turn.padded_text)
            padded = turn.padded if part == "data" else pad_samples(self.written[name], LENGTH, self.device)
            return self.step(padded, METHODS[name].baseline_loss, turn.padded_text)

    def take(self, name: str, samples: list[dict]) -> None:
        """Replaces what was written by given responses."""
        with self.precision():
            self.written[name] = self.score(samples) if name == "MiniLLM" else samples

    def entropy(self, key: Key, turn: Turn) -> float:
        """The part of a loss's value that is not the divergence."""
        name, _, part = key
        with self.precision():
            if name == "MiniLLM" and turn.padded_text is not None:
                return self.minillm.text_kd * self.teacher_entropy(turn.padded_text)
            if METHODS[name].has_entropy:
                samples = turn.samples if part == "data" else self.written[name]
                return self.teacher_entropy(pad_samples(samples, None, self.device))
        return 0.0

    def step(self, batch: PaddedBatch, loss: Loss | None, text: PaddedBatch | None = None) -> Numbers:
        """One optimizer step on a divergence, or on the cross-entropy alone; returns its loss and gradient norm.

        With a divergence the cross-entropy is computed, too, and multiplied by 0. So does the released code, whose
        scripts set its share, 1 - kd_ratio, to 0. The cross-entropy of plain text, `text`, is added.
        """
        student = _logits(self.student, *batch[:2])
        if loss is None:
            total = cross_entropy(student, batch.labels)
        else:
            with torch.no_grad():
                teacher = _logits(self.teacher, *batch[:2])
            total = 0.0 * cross_entropy(student, batch.labels) + loss(student, teacher, batch.labels)
            del teacher
        del student
        if text is not None:
            total = total + cross_entropy(_logits(self.student, *text[:2]), text.labels)
        return self.update(total)

    def update(self, total: Tensor) -> Numbers:
        total.backward()
        return total.detach(), self.step_optimizer()

    def step_optimizer(self) -> Tensor:
        """Clipping and AdamW; returns the gradient norm."""
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def write(self, samples: list[dict], teacher_weight: float = 0.0) -> list[dict]:
        """The samples with responses of their `response_lengths`, by the student or by its mixture with the teacher."""
        lengths, prompts, training = response_lengths(samples), split(samples)[0], self.student.training
        mask = pad(prompts, PROMPT_LENGTH, self.device, left=True)[1]
        ends = PROMPT_LENGTH + torch.tensor(
            lengths, device=self.device
        )  # random weights hardly ever write the end token
        rules = {"stopping_criteria": [lambda ids, scores, **_: ends <= ids.shape[1]], "pad_token_id": 0}
        if teacher_weight:
            rules["logits_processor"] = [TeacherMix(self.teacher, mask, teacher_weight)]
        self.student.eval()
        tokens = generate(self.student, prompts, PROMPT_LENGTH, NEW_TOKENS, **rules).tolist()
        self.student.train(training)
        return [
            {"input_ids": prompt + response[:length], "spans": [len(prompt), len(prompt + response[:length])]}
            for prompt, response, length in zip(prompts, tokens, lengths, strict=True)
        ]

    def roll_out(self, samples: list[dict]) -> RolloutBatch:
        """MiniLLM's rollouts, CHUNK prompts at a time."""
        parts = (samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK))
        chunks = [self.score(self.write(part, self.minillm.teacher_weight)) for part in parts]
        return RolloutBatch(*map(torch.cat, zip(*chunks, strict=True)))

    @torch.no_grad()
    def score(self, samples: list[dict]) -> RolloutBatch:
        """The parts that MiniLLM keeps of responses of the mixture."""
        settings, (prompts, responses) = self.minillm, split(samples)
        prompts, prompt_mask = pad(prompts, PROMPT_LENGTH, self.device, left=True)
        responses, mask = pad(responses, NEW_TOKENS, self.device)
        inputs = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
        models = self.student, self.teacher
        log_q, log_p = (_gather(_response_log_probs(_logits(model, *inputs)), responses) for model in models)
        weight = settings.teacher_weight
        mixture = ((1 - weight) * log_q.exp() + weight * log_p.exp()).log()
        rewards = ((log_p - log_q) / settings.reward_scale).clamp(-settings.clip_reward, settings.clip_reward) * mask
        return RolloutBatch(*inputs, log_q, (log_q - mixture).exp(), rewards, mask)

    def policy_step(self, rollouts: RolloutBatch, text: PaddedBatch | None = None) -> Numbers:
        """One optimizer step of MiniLLM; plain text goes through the models together with the rollouts.

        Advantages are normalized over the tokens. The released code counts the padding's zeros as well.
        """
        settings, count, inputs = self.minillm, len(rollouts.input_ids), rollouts[:2]
        if text is not None:
            inputs = tuple(map(torch.cat, zip(inputs, text[:2], strict=True)))
        student = _logits(self.student, *inputs)
        with torch.no_grad():
            teacher = _logits(self.teacher, *inputs)
        log_q, log_p = (_response_log_probs(logits[:count]) for logits in (student, teacher))
        own = _gather(log_q, rollouts.input_ids[:, PROMPT_LENGTH:])
        ratios = rollouts.weights * (own - rollouts.log_probs).exp()
        clipped = ratios.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
        advantages = _advantages(rollouts.rewards, rollouts.mask, settings.gamma)
        rows = torch.maximum(-advantages * ratios, -advantages * clipped) + (log_q.exp() * (log_q - log_p)).sum(-1)
        total = (rows * rollouts.mask).sum() / rollouts.mask.sum()
        if text is not None:
            total = total + (1 - settings.text_kd) * cross_entropy(student[count:], text.labels)
            total = total + settings.text_kd * forward_kl(student[count:], teacher[count:], text.labels)
        return self.update(total)

    @torch.no_grad()
    def teacher_entropy(self, batch: PaddedBatch) -> float:
        """The part of `forward_kl`'s value that is not the divergence."""
        teacher = _logits(self.teacher, *batch[:2])
        return forward_kl(teacher, teacher, batch.labels).item()


def _twin(model: nn.Module) -> nn.Module:
    """A GPT-2 of the very same parameters, with transformers' default attention and activations."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.set_attn_implementation("sdpa")
    for block in twin.transformer.h:
        block.mlp.act = ACT2FN[twin.config.activation_function]
    twin.generation_config.eos_token_id = None  # `write` ends responses
    return twin


def token_positions(attention_mask: Tensor) -> Tensor:
    """Positions from 0, counted without the padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, S, V]"""
    positions = token_positions(attention_mask)
    return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits


def _response_log_probs(logits: Tensor) -> Tensor:
    """From rollouts' logits [B, P + R, V] the log-probabilities at every token of the responses: [B, R, V]."""
    return logits[:, PROMPT_LENGTH - 1 : -1].log_softmax(-1, dtype=torch.float32)


def _gather(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities [B, R] of the tokens [B, R], from [B, R, V]."""
    return log_probs.gather(-1, tokens[..., None])[..., 0]


def _advantages(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sums of the rewards [B, R] to come, over their number, normalized over the tokens."""
    later, sums = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(1)):
        later = reward + gamma * later
        sums.append(later)
    counts = mask.flip(1).cumsum(1).flip(1)
    returns = torch.stack(sums[::-1], 1) / counts.clamp(min=1)
    variance, mean = torch.var_mean(returns[mask == 1], correction=0)
    return (returns - mean) / (variance + 1e-8).sqrt()
