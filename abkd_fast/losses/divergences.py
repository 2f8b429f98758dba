"""The catalog of divergences between a teacher p and a student q: plain values that the kernels understand.

All are true divergences, 0 if p = q: forward terms are KL(p, q), not the cross-entropy that some codes report.
"""

import dataclasses
import difflib
import enum
import math
from typing import ClassVar


class Family(enum.IntEnum):
    """The families that the kernels implement. The numbers are the same as in csrc/row_call.h."""

    CROSS_ENTROPY = 0
    ALPHA_BETA = 1
    ALPHA_NET = 2
    WEIGHTED_KL = 3
    BALANCED_KL = 4
    ADAPTIVE_KL = 5
    MIXTURE = 6
    TOTAL_VARIATION = 7


class Divergence:
    """Base class of the catalog. `str(divergence)` is its spelling, which `parse` reads."""

    name: ClassVar[str] = ""  # as `parse` reads it; empty if it does not
    title: ClassVar[str]  # the papers' name
    family: ClassVar[Family]
    per: ClassVar[str] = "token"  # "batch" if the gradient of a row is known only when all rows are measured
    excluded: ClassVar[str] = ""  # why 0 and 1 are excluded, if the numbers must be between them

    @property
    def parameters(self) -> list[float]:
        """The numbers that the kernel of `family` takes. By default they are the fields that are numbers, in order."""
        return [float(value) for value in vars(self).values() if not isinstance(value, str)]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float | int) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a finite number")
            if self.excluded and not 0 < value < 1:
                ends = f"both excluded ({self.excluded})"
                raise ValueError(f"{name} is {value}, expected a number between 0 and 1, {ends}")

    def __str__(self) -> str:
        values = ",".join(str(value).removesuffix(".0") for value in vars(self).values())
        return f"{self.name}:{values}" if values else self.name


@dataclasses.dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta divergence (ABKD, ICML 2025, equation 5), for every real alpha and beta.

    D(p, q) = -1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta)], and its limits where a denominator is 0: (1, 0) is the forward KL
    divergence, (0, 1) the reverse one, (.5, .5) four times the squared Hellinger distance, (1, 1) half the squared
    distance. The limits have the factor 1 / alpha^2 (or 1 / beta^2), so D is continuous in alpha and beta. The
    published code has 1 / alpha there, which is the same at (1, 0) and (0, 1).

    The defaults are those of the paper for GPT-2. For OpenLLaMA2 it has (.1, .8).
    """

    alpha: float = 0.2
    beta: float = 0.7
    name, title, family = "ab", "ABKD", Family.ALPHA_BETA


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p, q) = sum p log(p / q), word-level distillation (FKL, FKLD). TRL: `beta=0`."""

    name, title, family = "fkl", "FKLD", Family.WEIGHTED_KL
    parameters: ClassVar[list[float]] = [1.0, 0.0]


@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q, p) = sum q log(q / p) (RKL, RKLD). TRL: `beta=1`."""

    name, title, family = "rkl", "RKLD", Family.WEIGHTED_KL
    parameters: ClassVar[list[float]] = [0.0, 1.0]


@dataclasses.dataclass(frozen=True)
class WSD(Divergence):
    """Weighted sum of both directions: (1 - lam) KL(p, q) + lam KL(q, p). `lam` weights the reverse one."""

    lam: float = 0.5
    name, title, family = "wsd", "WSD", Family.WEIGHTED_KL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam is {self.lam}, expected 0 (forward KL) to 1 (reverse KL)")

    @property
    def parameters(self) -> list[float]:
        return [1.0 - self.lam, float(self.lam)]


@dataclasses.dataclass(frozen=True)
class BDKD(Divergence):
    """Both directions, weighted in each row by the entropies: wT KL(p, q) + wS KL(q, p).

    wT is 3 if H(p) > H(q), else 1; wS is 3 if H(q) > H(p), else 1. The entropies have the full precision of the
    kernels. (In the published code they are NaN in 16 bits, and every weight is 1.) The weights are constants for the
    gradient.
    """

    name, title, family = "bdkd", "BDKD", Family.BALANCED_KL


@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence):
    """lam KL(q, m) + (1 - lam) KL(p, m) with m = (1 - lam) p + lam q: `lam` is the student's share.

    TRL's `beta` is the teacher's share: `lam = 1 - beta`. (In TRL beta 0 and 1 mean forward and reverse KL. Here the
    limits would be 0, and are excluded.) The default .1 is that of the ABKD paper; DistiLLM's scripts have .9.
    """

    lam: float = 0.1
    name, title, family = "jsd", "JSD", Family.MIXTURE
    excluded = "the divergence vanishes there: take fkl or rkl"

    @property
    def parameters(self) -> list[float]:
        return [float(self.lam), float(self.lam), 1.0 - self.lam]


@dataclasses.dataclass(frozen=True)
class AKL(Divergence):
    """Both directions, weighted row by row: h KL(p, q) + (1 - h) KL(q, p) (AKL, "Rethinking KL divergence in KD").

    h is the share of the teacher's head in sum |p - q|. The head has the teacher's likeliest tokens: as many as have
    `mu` or less together, and at least one. Tokens that tie with the first one beyond the head are outside. h is .5 if
    p = q, and a constant for the gradient.
    """

    mu: float = 0.5
    name, title, family = "akl", "AKL", Family.ADAPTIVE_KL
    excluded = "the probability of the head"


@dataclasses.dataclass(frozen=True)
class TotalVariation(Divergence):
    """Half of sum |p - q| (TVD)."""

    name, title, family = "tvd", "TVD", Family.TOTAL_VARIATION


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p, m) with m = lam p + (1 - lam) q (DistiLLM's SKL): `lam` is the teacher's share."""

    lam: float = 0.1
    name, title, family = "sfkl", "SFKL", Family.MIXTURE
    excluded = "0 is fkl, 1 is nothing"

    @property
    def parameters(self) -> list[float]:
        return [1.0 - self.lam, 0.0, 1.0]


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q, m) with m = (1 - lam) p + lam q (DistiLLM's SRKL): `lam` is the student's share."""

    lam: float = 0.1
    name, title, family = "srkl", "SRKL", Family.MIXTURE
    excluded = "0 is rkl, 1 is nothing"

    @property
    def parameters(self) -> list[float]:
        return [float(self.lam), 1.0, 0.0]


@dataclasses.dataclass(frozen=True)
class AlphaNet(Divergence):
    """The larger of two alpha-divergences (AlphaNet). Only the larger one has a gradient.

    `per="token"` compares the two divergences of each row. `per="batch"` compares their means over all rows of a call,
    as the published code of ABKD does. In training a call is one micro-batch, so the loss then depends on
    train.max_tokens and on the number of processes.
    """

    alpha1: float = 0.2
    alpha2: float = 0.8
    per: str = "token"
    name, title, family = "alphanet", "AlphaNet", Family.ALPHA_NET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("batch", "token"):
            raise ValueError(f'per is "{self.per}", expected "batch" or "token"')

    @property
    def branches(self) -> "tuple[AlphaDivergence, AlphaDivergence]":
        return AlphaDivergence(self.alpha1), AlphaDivergence(self.alpha2)


@dataclasses.dataclass(frozen=True)
class Hellinger(Divergence):
    """2 sum (sqrt p - sqrt q)^2, four times the squared Hellinger distance: `AlphaBeta(.5, .5)`."""

    name, title, family = "hellinger", "Hellinger", Family.ALPHA_BETA
    parameters: ClassVar[list[float]] = [0.5, 0.5]


@dataclasses.dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)): `AlphaBeta(alpha, 1 - alpha)`."""

    alpha: float = 0.5
    name, title, family = "alpha", "Alpha", Family.ALPHA_BETA

    @property
    def parameters(self) -> list[float]:
        return [float(self.alpha), 1.0 - self.alpha]


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Divergence):
    """No teacher: only the cross-entropy with the labels (supervised fine-tuning). `parse` does not read it."""

    family = Family.CROSS_ENTROPY


BY_NAME: dict[str, type[Divergence]] = {kind.name: kind for kind in Divergence.__subclasses__() if kind.name}


def parse(text: str) -> Divergence:
    """The divergence with a spelling "name" or "name:value,value", as in `parse("ab:0.2,0.7")`.

    Raises ValueError if the name is unknown, or if the values are too many, of the wrong type or out of range.
    """
    name, _, arguments = text.partition(":")
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.3)
        hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(BY_NAME)}"
        raise ValueError(f'loss "{text}": unknown divergence "{name}"; {hint}')
    fields = dataclasses.fields(BY_NAME[name])
    words = arguments.split(",") if arguments else []
    if len(words) > len(fields):
        names = ", ".join(field.name for field in fields)
        expected = f"at most {len(fields)} values ({names})" if fields else "none"
        raise ValueError(f'loss "{text}": {expected} after the name, got {len(words)}')
    try:
        values = [type(field.default)(word.strip()) for word, field in zip(words, fields, strict=False)]
    except ValueError:
        raise ValueError(f'loss "{text}": expected numbers after the colon, as in "{BY_NAME[name]()}"') from None
    try:
        return BY_NAME[name](*values)
    except ValueError as error:
        raise ValueError(f'loss "{text}": {error}') from None
