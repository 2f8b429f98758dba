"""The published way of a training step, written from its description: the baseline of timing.py.

The code released with ABKD, and with DistiLLM and MiniLLM before it, does this:
- It pads every sample to the full length.
- Student and teacher compute logits at every position. The teacher runs in every step.
- Losses are eager PyTorch over the whole vocabulary.
- transformers' `generate` writes responses to prompts padded on the left, until the longest of a batch is done.

To the baseline's advantage, this is left out: float16 with loss scaling, DeepSpeed, guards against infinite logits,
synchronizations (two a step, and one for every token of MiniLLM's rollouts), all-reduces, and the second response to
every prompt that MiniLLM generates for its log.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.activations import ACT2FN

from abkd_fast.config.methods import MiniLLMConfig
from abkd_fast.config.schema import OptimConfig
from abkd_fast.losses.divergences import AlphaBeta, AlphaNet, JensenShannon, SkewForwardKL
from kernels import alpha_beta_rows, softmaxes
from workload import NEW_TOKENS, response_lengths

PROMPT_LENGTH = 256  # prompts are padded to it before generation
CHUNK = 16  # prompts that MiniLLM generates from at once

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student logits [B, S, V], teacher logits [B, S, V], labels [B, S]


class PaddedBatch(NamedTuple):
    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    labels: Tensor  # [B, S]: the next token if it belongs to the response, else -100


def pad(
    rows: list[list[int]], length: int | None, device: torch.device | str, left: bool = False
) -> tuple[Tensor, Tensor]:
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
        begin, end = sample["prompt_length"], len(sample["input_ids"])
        labels[row, begin - 1 : end - 1] = ids[row, begin:end]
    return PaddedBatch(*(x.to(device) for x in (ids, mask, labels)))


def split(samples: list[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of samples."""
    pairs = ((sample["input_ids"], sample["prompt_length"]) for sample in samples)
    prompts, responses = zip(*((ids[:prompt], ids[prompt:]) for ids, prompt in pairs), strict=True)
    return [*prompts], [*responses]


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
    divergence = AlphaBeta()
    return _mean(alpha_beta_rows(student, teacher, divergence.alpha, divergence.beta), labels)


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


class EachAtItsLength(StoppingCriteria):
    """Ends every response at a length of its own. Random weights would hardly ever write the end token."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.ends = PROMPT_LENGTH + torch.tensor(lengths, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return self.ends <= input_ids.shape[1]


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

    @property
    def mask(self) -> Tensor:
        """[B, R]"""
        return self.attention_mask[:, PROMPT_LENGTH:]


class BaselineTrainer:
    """Steps on the very weights of two given models, with modules and an optimizer of its own."""

    def __init__(self, student: nn.Module, teacher: nn.Module, optim: OptimConfig, minillm: MiniLLMConfig) -> None:
        self.student, self.teacher, self.minillm = _twin(student), _twin(teacher), minillm
        groups = [
            {"params": [p for p in student.parameters() if (p.dim() > 1) == decays], "weight_decay": weight_decay}
            for decays, weight_decay in ((True, optim.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.clip_norm = optim.clip_norm

    def step(self, batch: PaddedBatch, loss: Loss | None, text: PaddedBatch | None = None) -> tuple[Tensor, Tensor]:
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

    def update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Backward pass, clipping and AdamW; returns loss and gradient norm."""
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
        lengths, prompts = response_lengths(samples), split(samples)[0]
        device, training = self.student.device, self.student.training
        mask = pad(prompts, PROMPT_LENGTH, device, left=True)[1]
        mix = [TeacherMix(self.teacher, mask, teacher_weight)] if teacher_weight else []
        rules = {"logits_processor": mix, "stopping_criteria": [EachAtItsLength(lengths, device)], "pad_token_id": 0}
        self.student.eval()
        tokens = generate(self.student, prompts, PROMPT_LENGTH, NEW_TOKENS, **rules).tolist()
        self.student.train(training)
        return [
            {"input_ids": prompt + response[:length], "prompt_length": len(prompt)}
            for prompt, response, length in zip(prompts, tokens, lengths, strict=True)
        ]

    def roll_out(self, samples: list[dict]) -> RolloutBatch:
        """MiniLLM's rollouts, CHUNK prompts at a time."""
        parts = (samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK))
        chunks = [self.score(self.write(part, self.minillm.teacher_weight)) for part in parts]
        return RolloutBatch(*map(torch.cat, zip(*chunks, strict=True)))

    @torch.no_grad()
    def score(self, samples: list[dict]) -> RolloutBatch:
        """What MiniLLM keeps of responses that the mixture has written."""
        settings, device, (prompts, responses) = self.minillm, self.student.device, split(samples)
        prompts, prompt_mask = pad(prompts, PROMPT_LENGTH, device, left=True)
        responses, mask = pad(responses, NEW_TOKENS, device)
        inputs = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
        models = self.student, self.teacher
        log_q, log_p = (_gather(_response_log_probs(_logits(model, *inputs)), responses) for model in models)
        weight = settings.teacher_weight
        mixture = ((1 - weight) * log_q.exp() + weight * log_p.exp()).log()
        rewards = ((log_p - log_q) / settings.reward_scale).clamp(-settings.clip_reward, settings.clip_reward) * mask
        return RolloutBatch(*inputs, log_q, (log_q - mixture).exp(), rewards)

    def policy_step(self, rollouts: RolloutBatch, text: PaddedBatch | None = None) -> tuple[Tensor, Tensor]:
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
    def teacher_entropy(self, batch: PaddedBatch) -> Tensor:
        """The part of `forward_kl`'s value that is not the divergence."""
        teacher = _logits(self.teacher, *batch[:2])
        return forward_kl(teacher, teacher, batch.labels)


def _twin(model: nn.Module) -> nn.Module:
    """A GPT-2 of the very same parameters, with transformers' default attention and activations."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.set_attn_implementation("sdpa")
    for block in twin.transformer.h:
        block.mlp.act = ACT2FN[twin.config.activation_function]
    twin.generation_config.eos_token_id = None  # EachAtItsLength ends responses
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
