"""The catalogue of divergences between a teacher p and a student q: plain values that the kernels understand."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class AlphaBeta:
    """Alpha-beta divergence (ABKD, ICML 2025, equation 5), for every real alpha and beta.

    D(p, q) = -1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta)], and its limits where a denominator is 0: (1, 0) is the forward KL
    divergence, (0, 1) the reverse one, (.5, .5) four times the squared Hellinger distance, (1, 1) half the squared
    distance. The limits carry 1 / alpha^2 (or 1 / beta^2), so D is continuous in alpha and beta; the published code
    has 1 / alpha there, which is the same at (1, 0) and (0, 1).

    The defaults are the paper's for GPT-2; for OpenLLaMA2 it takes (.1, .8).
    """

    alpha: float = 0.2
    beta: float = 0.7
    family: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a finite number")

    @property
    def parameters(self) -> list[float]:
        return [float(self.alpha), float(self.beta)]

    def __str__(self) -> str:
        return f"ab:{self.alpha:g},{self.beta:g}"


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """No teacher: the cross-entropy with the labels alone (supervised fine-tuning)."""

    family: ClassVar[int] = 0
    parameters: ClassVar[list[float]] = []


Divergence = AlphaBeta
BY_NAME = {"ab": AlphaBeta}


def parse(text: str) -> Divergence:
    """A divergence from its spelling, "name" or "name:number,number": `parse("ab:0.2,0.7")`.

    Raises ValueError where the name is unknown, or the numbers are not numbers or too many.
    """
    name, _, arguments = text.partition(":")
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0)
        raise ValueError(f'loss "{text}": unknown divergence "{name}"; did you mean "{near[0]}"?')
    fields = [field.name for field in dataclasses.fields(BY_NAME[name])]
    try:
        numbers = [float(number) for number in arguments.split(",")] if arguments else []
    except ValueError:
        raise ValueError(f'loss "{text}": expected numbers after the colon, as in "{BY_NAME[name]()}"') from None
    if len(numbers) > len(fields):
        raise ValueError(f'loss "{text}": at most {len(fields)} numbers ({", ".join(fields)}), got {len(numbers)}')
    return BY_NAME[name](*numbers)
