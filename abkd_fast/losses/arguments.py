"""The arguments of the losses: their bundles, and the checks of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence

MAX_PADDING = 1024


class LogitMap(NamedTuple):
    """What a model does to the products of its output projection: x becomes softcap tanh(scale x / softcap).

    Without a softcap (0) it becomes scale x. Gemma 2 has a softcap, Cohere and Granite have a scale.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return (logits / self.softcap).tanh() * self.softcap if self.softcap else logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the map at `logits`."""
        if not self.softcap:
            return self.scale
        return self.scale / (logits * (self.scale / self.softcap)).cosh().square()


class LinearHead(NamedTuple):
    """The hidden states of a model and the output projection that reads them: logits = map(hidden weight^T + bias)."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    logit_map: LogitMap = LogitMap()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self[:3]

    def arguments(self, role: str) -> dict[str, Tensor | float | None]:
        """The keyword arguments of a fused loss that describe this model: "student" or "teacher"."""
        values = {
            "hidden": self.hidden,
            "weight": self.weight,
            "bias": self.bias,
            "logit_scale": self.logit_map.scale,
            "softcap": self.logit_map.softcap or None,
        }
        return {f"{role}_{name}": value for name, value in values.items()}

    def prefix(self, count: int) -> "LinearHead":
        """The head over the first `count` tokens of the vocabulary.

        Where these are all, it is the head itself: the backward pass of a slice would copy the projection's gradient.
        """
        if len(self.weight) == count:
            return self
        return self._replace(weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])


class LossSpec(NamedTuple):
    """The loss of a row: (1 - hard_weight) divergence at `temperature` + hard_weight cross-entropy at temperature 1."""

    divergence: Divergence
    temperature: float = 1.0
    hard_weight: float = 0.0
    student_map: LogitMap = LogitMap()
    teacher_map: LogitMap = LogitMap()

    @classmethod
    def of(cls, divergence: Divergence, temperature: float, hard_weight: float, maps: list[float]) -> "LossSpec":
        """The spec with these `maps`."""
        return cls(divergence, temperature, hard_weight, LogitMap(*maps[:2]), LogitMap(*maps[2:]))

    @property
    def maps(self) -> list[float]:
        """The maps as the compiled operators take them: none, or scale and softcap of student and teacher."""
        maps = self.student_map, self.teacher_map
        return [] if all(x == LogitMap() for x in maps) else [float(number) for x in maps for number in x]


class Rows(NamedTuple):
    """The logits and labels of N tokens, and their loss: `struct Rows` in csrc/row_call.h."""

    student: Tensor  # [N, V], before the model's map
    teacher: Tensor | None  # [N, V]; None for the cross-entropy alone. Its type may differ from the student's
    labels: Tensor | None  # [N], int64; -100 for a row that doesn't count
    spec: LossSpec


def loss_dtype(logits: Tensor) -> torch.dtype:
    """The type of losses, and of sums over the vocabulary or the tokens, for logits or hidden states."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_loss(spec: LossSpec, reduction: str, labels: Tensor | None, tokens: int) -> Tensor | None:
    """Returns what `check_labels` returns. Raises ValueError also for a number out of range or an unknown reduction."""
    if not 0 < spec.temperature < math.inf:
        raise ValueError(f"temperature is {spec.temperature}, expected a positive number")
    if not 0 <= spec.hard_weight <= 1:
        raise ValueError(f"hard_weight is {spec.hard_weight}, expected 0 to 1")
    for model, (scale, softcap) in (("student", spec.student_map), ("teacher", spec.teacher_map)):
        if not 0 < scale < math.inf:
            raise ValueError(f"{model}_logit_scale is {scale}, expected a positive number")
        if not 0 <= softcap < math.inf:
            raise ValueError(f"{model}_softcap is {softcap}, expected a positive number, or None for no softcap")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}", expected "mean", "sum" or "none"')
    return check_labels(labels, tokens, spec.hard_weight)


def check_labels(labels: Tensor | None, tokens: int, hard_weight: float) -> Tensor | None:
    """Returns `labels` as contiguous int64 [tokens]. Raises ValueError for missing labels or another shape."""
    if labels is None:
        if hard_weight:
            raise ValueError(f"hard_weight is {hard_weight}: the cross-entropy needs labels")
        return None
    if labels.shape != (tokens,):
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{tokens}], one for each row of logits")
    return labels.long().contiguous()


def check_label_range(labels: Tensor, spec: LossSpec, vocab: int) -> None:
    """Raises ValueError for a label that the vocabulary lacks. Those on a GPU aren't read: their loss is infinite."""
    if spec.hard_weight and labels.device.type == "cpu":
        wrong = (labels != -100) & ((labels < 0) | (labels >= vocab))
        if wrong.any():
            row = int(wrong.int().argmax())
            raise ValueError(f"labels[{row}] is {int(labels[row])}, expected -100 or 0 to {vocab - 1}")


def check_head(model: str, head: LinearHead) -> None:
    """Raises ValueError if the shapes of hidden states, projection and bias don't fit together."""
    hidden, weight, bias = head.tensors
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"{model} hidden states and projection have shapes {shapes}, expected [N, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{model} bias has shape {list(bias.shape)}, expected [{len(weight)}]")


def shared_vocabulary(student: int, teacher: int) -> int:
    """The length of the common prefix of two padded vocabularies.

    Different models pad the vocabulary of one tokenizer to different sizes (Qwen: 151,936 and 152,064). Distributions
    are compared over the common prefix. Raises ValueError for sizes further apart than any padding.
    """
    if abs(student - teacher) > MAX_PADDING:
        raise ValueError(
            f"the student has {student} vocabulary entries and the teacher {teacher}: distillation needs one "
            "vocabulary (sizes that differ only by padding are cut to the common prefix)"
        )
    return min(student, teacher)


def count_kept(labels: Tensor | None, rows: Tensor) -> Tensor:
    """The number of `rows` [N, ...] that count, at least 1: a scalar in the type of their loss, on their device."""
    dtype = loss_dtype(rows)
    if labels is not None and labels.device == rows.device:
        return (labels != -100).sum().clamp(min=1).to(dtype)
    # A number that the host knows is no copy for which a GPU's stream would wait.
    count = rows.shape[0] if labels is None else int((labels != -100).sum())
    return torch.full((), max(1, count), dtype=dtype, device=rows.device)
