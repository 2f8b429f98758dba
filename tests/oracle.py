"""A float64 oracle that shares no formula with the kernels or with reference.py.

Alpha-beta divergences come from quadrature of the integral that defines them, all others from their textbook
definitions, differentiated by autograd. `exact` has the latter once more in 60 digits, for rows beyond float64.
"""

import mpmath
import numpy as np
import torch

from abkd_fast.losses import divergences

# 96 Gauss points integrate e^(rate t) over [0, d] up to rounding if |rate d| < 100, as for all logits of these tests.
NODES, WEIGHTS = (0.5 * x for x in np.polynomial.legendre.leggauss(96))
NODES = NODES + 0.5

LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, -0.5), (-0.3, 0.3)]
REGULAR = [(0.2, 0.7), (0.5, 0.5), (1.0, 1.0), (2.0, -1.0)]
GRID = LIMITS + REGULAR
ALPHA_BETA = [f"ab:{alpha:g},{beta:g}" for alpha, beta in GRID]
# At least one spelling of every other family. The weights of wsd and of the mixtures are not symmetric.
SMOOTH = ["fkl", "rkl", "wsd:0.3", "jsd:0.1", "jsd:0.7", "sfkl:0.1", "srkl:0.1", "hellinger", "alpha:0.3"]
ADAPTIVE = ["bdkd", "akl", "akl:0.9", "alphanet:0.2,0.8,batch", "alphanet:0.2,0.8,token"]
FAMILIES = [*SMOOTH, *ADAPTIVE, "tvd"]


def neighbors(delta):
    """Points at a distance of about delta from those with alpha, beta, their sum, or all of them 0."""
    near_alpha = [(delta, 0.7), (-delta, 0.7), (delta, 1.0)]
    near_beta = [(0.7, delta), (0.7, -delta), (1.0, delta)]
    near_sum = [(0.5, -0.5 + delta), (-0.3, 0.3 - delta)]
    return near_alpha + near_beta + near_sum + [(delta, delta), (delta, -delta), (-delta, delta / 3)]


def integrand(a, t, alpha, beta):
    """p^(alpha + beta) e^(beta t) (e^(alpha t) - 1) / alpha with every growing factor in one exponent."""
    exponent = (alpha + beta) * a + beta * t + (alpha * t).clamp(min=0)
    bounded = -torch.expm1(-abs(alpha) * t.abs()) / abs(alpha) if alpha else t.abs()
    return torch.exp(exponent) * bounded * t.sign()


def terms(a, b, alpha, beta):
    """Each token's divergence and its derivative by log q, from float64 log-probabilities a (teacher), b (student)."""
    d = b - a
    value = torch.zeros_like(d)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine each of hundreds of operations would wait 8 ms for a second thread
    for node, weight in zip(NODES.tolist(), WEIGHTS.tolist(), strict=True):
        value += weight * integrand(a, node * d, alpha, beta)
    torch.set_num_threads(threads)
    return value * d, integrand(a, d, alpha, beta)


def row_losses(student, teacher, alpha, beta, labels=None, temperature=1.0, hard_weight=0.0, value=True):
    """Losses [N] and the gradient [N, V] of their sum, as `abkd_fast.divergence_loss` documents them.

    value=False leaves out the quadrature, and so allows log-ratios of any size.
    """
    z, y = student.detach().double(), teacher.detach().double()
    a, b = torch.log_softmax(y / temperature, 1), torch.log_softmax(z / temperature, 1)
    share, u = terms(a, b, alpha, beta) if value else (torch.full_like(a, torch.nan), integrand(a, b - a, alpha, beta))
    losses = (1 - hard_weight) * share.sum(1)
    gradient = (1 - hard_weight) / temperature * (u - b.exp() * u.sum(1, keepdim=True))
    if labels is not None:
        kept = labels != -100
        if hard_weight:
            target = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1]).double()
            losses -= hard_weight * (target * torch.log_softmax(z, 1)).sum(1)
            gradient += hard_weight * (torch.softmax(z, 1) - target)
        losses, gradient = losses * kept, gradient * kept[:, None]
    return losses, gradient


def evaluate(student, teacher, divergence, labels=None, temperature=1.0, hard_weight=0.0):
    """Losses [N] and the gradient [N, V] of their sum, for any divergence."""
    if isinstance(divergence, divergences.AlphaBeta):
        return row_losses(student, teacher, *divergence.parameters, labels, temperature, hard_weight)
    kept = torch.ones(len(student), dtype=torch.bool) if labels is None else labels != -100
    z, y = student.detach().double()[kept].requires_grad_(), teacher.detach().double()[kept]
    a, b = (y / temperature).log_softmax(1), (z / temperature).log_softmax(1)
    loss = (1 - hard_weight) * definition(a, b, divergence)
    if hard_weight:
        loss = loss + hard_weight * torch.nn.functional.cross_entropy(z, labels[kept], reduction="none")
    losses, gradient = (torch.zeros(shape, dtype=torch.float64) for shape in (len(student), student.shape))
    losses[kept], gradient[kept] = loss.detach(), torch.autograd.grad(loss.sum(), z)[0]
    return losses, gradient


def kl(a, b):
    return (a.exp() * (a - b)).sum(1)


def alpha_divergence(a, b, alpha):
    return (1 - (a.exp() ** alpha * b.exp() ** (1 - alpha)).sum(1)) / (alpha * (1 - alpha))


def definition(a, b, divergence):
    """The divergence [N] of each row, from log p = a and log q = b, as the literature defines it."""
    p, q = a.exp(), b.exp()
    match divergence:
        case divergences.ForwardKL():
            return kl(a, b)
        case divergences.ReverseKL():
            return kl(b, a)
        case divergences.WSD(lam):
            return (1 - lam) * kl(a, b) + lam * kl(b, a)
        case divergences.BDKD():
            teacher, student = (-(x.exp() * x).sum(1).detach() for x in (a, b))
            return (1 + 2 * (teacher > student)) * kl(a, b) + (1 + 2 * (student > teacher)) * kl(b, a)
        case divergences.AKL(mu):
            share = p.new_tensor([head_share(*row, mu) for row in zip(p.tolist(), q.tolist(), strict=True)])
            return share * kl(a, b) + (1 - share) * kl(b, a)
        case divergences.JensenShannon(lam):
            log_m = ((1 - lam) * p + lam * q).log()
            return lam * kl(b, log_m) + (1 - lam) * kl(a, log_m)
        case divergences.SkewForwardKL(lam):
            return kl(a, (lam * p + (1 - lam) * q).log())
        case divergences.SkewReverseKL(lam):
            return kl(b, ((1 - lam) * p + lam * q).log())
        case divergences.TotalVariation():
            return 0.5 * (p - q).abs().sum(1)
        case divergences.Hellinger():
            return 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(1)
        case divergences.AlphaDivergence(alpha):
            return alpha_divergence(a, b, alpha)
        case divergences.AlphaNet(alpha1, alpha2, per):
            first, second = alpha_divergence(a, b, alpha1), alpha_divergence(a, b, alpha2)
            if per == "token":
                return torch.where(first >= second, first, second)
            return first if first.mean() >= second.mean() else second
    raise TypeError(divergence)


def head_share(p, q, mu):
    """AKL's weight of KL(p, q), by a sort. p and q are lists of numbers of any type."""
    order = sorted(p, reverse=True)
    mass, beyond = 0, order[-1]
    for x in order:
        mass = mass + x
        if mass > mu:
            beyond = x
            break
    least = min((x for x in p if x > beyond), default=order[0])
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    total = sum(gaps)
    return sum(gap for x, gap in zip(p, gaps, strict=True) if x >= least) / total if total else 0.5


def exact(student, teacher, divergence):
    """Value and gradient (floats) for one row of logits (lists), in 60 digits. Any gap, and -inf, is allowed."""
    with mpmath.workdps(60):
        p, q = softmax(teacher), softmax(student)
        weights = exact_weights(p, q, divergence)
        step = mpmath.mpf(10) ** -20  # central differences are then good to 40 digits
        gradient = []
        for v, logit in enumerate(student):
            sides = [softmax([*student[:v], logit + h, *student[v + 1 :]]) for h in (step, -step)]
            up, down = (exact_value(p, side, divergence, weights) for side in sides)
            gradient.append(float((up - down) / (2 * step)))
        return float(exact_value(p, q, divergence, weights)), gradient


def softmax(logits):
    largest = max(logits)
    powers = [mpmath.exp(mpmath.mpf(x) - largest) for x in logits]
    return [x / sum(powers) for x in powers]


def exact_kl(p, q):
    return sum((x * mpmath.log(x / y) if y else mpmath.inf) for x, y in zip(p, q, strict=True) if x)


def exact_weights(p, q, divergence):
    """The constants of the gradient: the weights of KL(p, q) and KL(q, p), or AlphaNet's choice."""
    match divergence:
        case divergences.BDKD():
            teacher, student = (-sum(x * mpmath.log(x) for x in side if x) for side in (p, q))
            return 1 + 2 * (teacher > student), 1 + 2 * (student > teacher)
        case divergences.AKL(mu):
            share = head_share(p, q, mu)
            return share, 1 - share
        case divergences.WSD(lam):
            return 1 - mpmath.mpf(lam), lam
        case divergences.AlphaNet(alpha1, alpha2):
            values = [exact_value(p, q, divergences.AlphaDivergence(alpha), None) for alpha in (alpha1, alpha2)]
            return alpha1 if values[0] >= values[1] else alpha2
    return None


def exact_value(p, q, divergence, weights):
    def mixed(weight):
        return [(1 - mpmath.mpf(weight)) * x + weight * y for x, y in zip(p, q, strict=True)]

    match divergence:
        case divergences.ForwardKL():
            return exact_kl(p, q)
        case divergences.ReverseKL():
            return exact_kl(q, p)
        case divergences.WSD() | divergences.BDKD() | divergences.AKL():
            return weights[0] * exact_kl(p, q) + weights[1] * exact_kl(q, p)
        case divergences.JensenShannon(lam):
            return lam * exact_kl(q, mixed(lam)) + (1 - mpmath.mpf(lam)) * exact_kl(p, mixed(lam))
        case divergences.SkewForwardKL(lam):
            return exact_kl(p, mixed(1 - mpmath.mpf(lam)))
        case divergences.SkewReverseKL(lam):
            return exact_kl(q, mixed(lam))
        case divergences.TotalVariation():
            return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
        case divergences.Hellinger():
            return 2 * sum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in zip(p, q, strict=True))
        case divergences.AlphaDivergence(alpha):
            alpha = mpmath.mpf(alpha)
        case divergences.AlphaNet():
            alpha = mpmath.mpf(weights)
    return (1 - sum(x**alpha * y ** (1 - alpha) for x, y in zip(p, q, strict=True))) / (alpha * (1 - alpha))


def gpt2_like_logits(rows, vocab, seed=0):
    """Student and teacher logits, float32: Zipf's law with noise. At V=50257 log p reaches -35, and KL is about .5."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]) if rows else torch.zeros(0, 1)
    noise = torch.randn(2, rows, vocab, generator=generator)
    teacher = -2.0 * torch.log1p(rank) + 2.0 * noise[0]
    return teacher + noise[1], teacher


def independent_logits(rows, vocab, seed=0):
    """Student and teacher logits, float32, that have nothing in common. At V=50257 the likely tokens of one side have
    next to no probability on the other."""
    return 6.0 * torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(seed))


def mild_logits(rows, vocab, dtype=torch.float32, seed=0):
    """Logits for few tokens. A steep distribution would have one probability near 1, whose logarithm has no digits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64).to(dtype).unbind()


def relative_errors(got, expected):
    """The L2 error of each row of `got`, divided by the L2 norm of the same row of `expected`."""
    got, expected = got.detach().double(), expected.double()
    if got.dim() == 1:
        got, expected = got[:, None], expected[:, None]
    return (got - expected).norm(dim=1) / expected.norm(dim=1)
