"""The published way of a training step, written from its description: what timing.py compares with.

That of the code released with ABKD, and with DistiLLM and MiniLLM before it: every sample is padded to the full
length, student and teacher compute logits at every position, losses are eager PyTorch over the whole vocabulary, and
the teacher runs in every step. Responses are written by transformers' `generate`, to prompts padded on the left, until
the longest of a batch is done.

Left out, to its advantage: float16 with loss scaling, DeepSpeed, its guards against infinite logits, its
synchronizations (two a step, and one for every token of MiniLLM's rollouts) and all-reduces, and the second response to
every prompt that MiniLLM generates for its log.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.activations import ACT2FN

from abkd_fast.config.methods import MiniLLMConfig
from abkd_fast.config.schema import OptimConfig
from abkd_fast.losses.divergences import AlphaBeta, AlphaNet, JensenShannon, SkewForwardKL
from rivals import published_rows
from workload import NEW_TOKENS

PROMPT_LENGTH = 256  # that prompts are padded to before generation
CHUNK = 16  # prompts that MiniLLM generates from at once

# Of student logits [B, S, V], teacher logits [B, S, V] and labels [B, S].
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    labels: Tensor  # [B, S]: the next token where it is of the response, else -100

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.input_ids, self.attention_mask


def pad(samples: list[dict], length: int, device: torch.device) -> PaddedBatch:
    """Samples of the trainer's data set, each padded on the right to `length` tokens."""
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, sample in enumerate(samples):
        ids, prompt = torch.tensor(sample["input_ids"]), sample["prompt_length"]
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt - 1 : len(ids) - 1] = ids[prompt:]
    return PaddedBatch(input_ids.to(device), attention_mask.to(device), labels.to(device))


def _mean(rows: Tensor, labels: Tensor) -> Tensor:
    """Of [B, S] over the positions that have a label."""
    kept = labels != -100
    return (rows * kept).sum() / kept.sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float().flatten(0, 1), labels.flatten())


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As released: KL(p, q) and the entropy of p, that is, the cross-entropy of q under p."""
    p = teacher.softmax(-1, dtype=torch.float32)
    return _mean(-(p * student.log_softmax(-1, dtype=torch.float32)).sum(-1), labels)


def alpha_beta(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    divergence = AlphaBeta()
    return _mean(published_rows(student, teacher, divergence.alpha, divergence.beta), labels)


def alphanet(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The larger of two batch means, as released."""
    branches = [(branch.alpha, 1 - branch.alpha) for branch in AlphaNet().branches]
    return torch.maximum(*(_mean(published_rows(student, teacher, *branch), labels) for branch in branches))


def jensen_shannon(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    lam = JensenShannon().lam
    p, q = teacher.softmax(-1, dtype=torch.float32), student.softmax(-1, dtype=torch.float32)
    log_p, log_q = teacher.log_softmax(-1, dtype=torch.float32), student.log_softmax(-1, dtype=torch.float32)
    log_m = ((1 - lam) * p + lam * q).log()
    return _mean(lam * (q * (log_q - log_m)).sum(-1) + (1 - lam) * (p * (log_p - log_m)).sum(-1), labels)


def skew_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As released: with the entropy of p, as `forward_kl`."""
    lam = SkewForwardKL().lam
    p, q = teacher.softmax(-1, dtype=torch.float32), student.softmax(-1, dtype=torch.float32)
    return _mean(-(p * (lam * p + (1 - lam) * q).log()).sum(-1), labels)


class EachAtItsLength(StoppingCriteria):
    """Ends every response at a length of its own, where random weights would hardly ever write the end token."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.ends = PROMPT_LENGTH + torch.tensor(lengths, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return self.ends <= input_ids.shape[1]


class TeacherMix(LogitsProcessor):
    """MiniLLM's sampling: (1 - weight) q + weight p, the teacher running beside the student."""

    def __init__(self, teacher: nn.Module, attention_mask: Tensor, weight: float) -> None:
        self.teacher, self.attention_mask, self.weight, self.cache = teacher, attention_mask, weight, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = input_ids.shape[1]
        mask = F.pad(self.attention_mask, (0, width - self.attention_mask.shape[1]), value=1)
        new = slice(None) if self.cache is None else slice(-1, None)
        out = self.teacher(
            input_ids=input_ids[:, new],
            attention_mask=mask,
            position_ids=token_positions(mask)[:, new],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        q, p = scores.softmax(-1, dtype=torch.float32), out.logits[:, -1].softmax(-1, dtype=torch.float32)
        return ((1 - self.weight) * q + self.weight * p).log()


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """MiniLLM's responses R behind their prompts P, and what is known of them when they are written."""

    input_ids: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R]: padding to the left of prompts and to the right of responses is 0
    log_probs: Tensor  # [B, R], of the student that wrote
    weights: Tensor  # [B, R]: its probability over the mixture's
    rewards: Tensor  # [B, R], 0 in the padding

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.input_ids, self.attention_mask

    @property
    def mask(self) -> Tensor:
        """[B, R]"""
        return self.attention_mask[:, PROMPT_LENGTH:]

    def first(self, count: int) -> RolloutBatch:
        return RolloutBatch(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))


class PublishedTrainer:
    """Steps on the very weights of two given models, with modules and an optimizer of its own."""

    def __init__(self, student: nn.Module, teacher: nn.Module, optim: OptimConfig, minillm: MiniLLMConfig) -> None:
        self.student, self.teacher, self.minillm = *map(_as_given, (student, teacher)), minillm
        groups = [
            {"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in student.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.clip_norm = optim.clip_norm

    def step(self, batch: PaddedBatch, loss: Loss | None, text: PaddedBatch | None = None) -> tuple[Tensor, Tensor]:
        """One optimizer step on a divergence, or on the cross-entropy alone; returns its loss and gradient norm.

        With a divergence the cross-entropy is computed all the same, and multiplied by 0: so does the released code,
        whose scripts set its share, 1 - kd_ratio, to 0. `text`: plain text, whose cross-entropy is added.
        """
        student = _logits(self.student, *batch.inputs)
        if loss is None:
            total = cross_entropy(student, batch.labels)
        else:
            with torch.no_grad():
                teacher = _logits(self.teacher, *batch.inputs)
            total = 0.0 * cross_entropy(student, batch.labels) + loss(student, teacher, batch.labels)
            del teacher
        del student
        if text is not None:
            total = total + cross_entropy(_logits(self.student, *text.inputs), text.labels)
        return self._update(total)

    def _update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.detach(), norm

    @torch.no_grad()
    def write(self, samples: list[dict], lengths: list[int], teacher_weight: float = 0.0) -> list[dict]:
        """The samples with responses of these lengths, by the student or by its mixture with the teacher."""
        device = self.student.device
        prompts = [sample["input_ids"][: sample["prompt_length"]] for sample in samples]
        input_ids, attention_mask = _pad_left(prompts, device)
        mix = [TeacherMix(self.teacher, attention_mask, teacher_weight)] if teacher_weight else []
        training = self.student.training
        self.student.eval()
        tokens = self.student.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            logits_processor=mix,
            stopping_criteria=[EachAtItsLength(lengths, device)],
        )[:, PROMPT_LENGTH:].tolist()
        self.student.train(training)
        return [
            {"input_ids": prompt + response[:length], "prompt_length": len(prompt)}
            for prompt, response, length in zip(prompts, tokens, lengths, strict=True)
        ]

    def roll_out(self, samples: list[dict], lengths: list[int]) -> RolloutBatch:
        """MiniLLM's rollouts, CHUNK prompts at a time."""
        chunks = []
        for start in range(0, len(samples), CHUNK):
            chunk = slice(start, start + CHUNK)
            chunks.append(self.score(self.write(samples[chunk], lengths[chunk], self.minillm.teacher_weight)))
        fields = (field.name for field in dataclasses.fields(RolloutBatch))
        return RolloutBatch(*(torch.cat([getattr(chunk, name) for chunk in chunks]) for name in fields))

    @torch.no_grad()
    def score(self, samples: list[dict]) -> RolloutBatch:
        """What MiniLLM keeps of responses that the mixture has written."""
        settings, device = self.minillm, self.student.device
        prompts, prompt_mask = _pad_left([sample["input_ids"][: sample["prompt_length"]] for sample in samples], device)
        responses = torch.zeros(len(samples), NEW_TOKENS, dtype=torch.int64)  # [B, R]
        mask = torch.zeros_like(responses)
        for row, sample in enumerate(samples):
            response = sample["input_ids"][sample["prompt_length"] :]
            responses[row, : len(response)], mask[row, : len(response)] = torch.tensor(response), 1
        responses, mask = responses.to(device), mask.to(device)
        inputs = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, mask], 1)
        of_student, of_teacher = (
            _of_tokens(_response_log_probs(_logits(model, *inputs)), responses)
            for model in (self.student, self.teacher)
        )
        weight = settings.teacher_weight
        mixture = ((1 - weight) * of_student.exp() + weight * of_teacher.exp()).log()
        rewards = (of_teacher - of_student) / settings.reward_scale
        rewards = rewards.clamp(-settings.clip_reward, settings.clip_reward) * mask
        return RolloutBatch(*inputs, of_student, (of_student - mixture).exp(), rewards)

    def policy_step(self, rollouts: RolloutBatch, text: PaddedBatch | None = None) -> tuple[Tensor, Tensor]:
        """One optimizer step of MiniLLM; plain text goes through the models together with the rollouts.

        Advantages are normalized over the tokens. The released code counts the padding's zeros as well.
        """
        settings, count = self.minillm, len(rollouts.input_ids)
        inputs = rollouts.inputs
        if text is not None:
            inputs = tuple(torch.cat(parts) for parts in zip(inputs, text.inputs, strict=True))
        student = _logits(self.student, *inputs)
        with torch.no_grad():
            teacher = _logits(self.teacher, *inputs)
        log_q, log_p = (_response_log_probs(logits[:count]) for logits in (student, teacher))
        own = _of_tokens(log_q, rollouts.input_ids[:, PROMPT_LENGTH:])
        ratios = rollouts.weights * (own - rollouts.log_probs).exp()
        clipped = ratios.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
        advantages = _advantages(rollouts.rewards, rollouts.mask, settings.gamma)
        rows = torch.maximum(-advantages * ratios, -advantages * clipped) + (log_q.exp() * (log_q - log_p)).sum(-1)
        total = (rows * rollouts.mask).sum() / rollouts.mask.sum()
        if text is not None:
            total = total + (1 - settings.text_kd) * cross_entropy(student[count:], text.labels)
            total = total + settings.text_kd * forward_kl(student[count:], teacher[count:], text.labels)
        return self._update(total)

    @torch.no_grad()
    def teacher_entropy(self, batch: PaddedBatch) -> Tensor:
        """What the value of `forward_kl` has besides the divergence."""
        teacher = _logits(self.teacher, *batch.inputs)
        return forward_kl(teacher, teacher, batch.labels)


def _as_given(model: nn.Module) -> nn.Module:
    """A GPT-2 of the very same parameters, with the attention and activations that transformers gives by default."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.set_attn_implementation("sdpa")
    for block in twin.transformer.h:
        block.mlp.act = ACT2FN[twin.config.activation_function]
    twin.generation_config.eos_token_id = None  # EachAtItsLength ends responses
    return twin


def _pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, PROMPT_LENGTH] both."""
    widths = [PROMPT_LENGTH - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * width + prompt for width, prompt in zip(widths, prompts, strict=True)])
    mask = torch.arange(PROMPT_LENGTH) >= torch.tensor(widths)[:, None]
    return ids.to(device), mask.long().to(device)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Those of the tokens that are no padding, from 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, S, V]"""
    positions = token_positions(attention_mask)
    return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits


def _response_log_probs(logits: Tensor) -> Tensor:
    """Of rollouts' logits [B, P + R, V], for every token of the responses: [B, R, V]."""
    return logits[:, PROMPT_LENGTH - 1 : -1].log_softmax(-1, dtype=torch.float32)


def _of_tokens(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Of [B, R, V] those of the tokens [B, R]."""
    return log_probs.gather(-1, tokens[..., None])[..., 0]


def _advantages(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sums of the rewards [B, R] to come over their number, normalized over the tokens."""
    later, sums = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(1)):
        later = reward + gamma * later
        sums.append(later)
    counts = mask.flip(1).cumsum(1).flip(1)
    returns = torch.stack(sums[::-1], 1) / counts.clamp(min=1)
    variance, mean = torch.var_mean(returns[mask == 1], correction=0)
    return (returns - mean) / (variance + 1e-8).sqrt()
