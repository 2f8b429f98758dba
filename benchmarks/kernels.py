"""The loss alone: `python benchmarks/kernels.py`. Medians of interleaved runs in one process, forward and backward.

(1) alpha-beta divergence between logits, against the published formulation (powers of softmax, autograd);
(2) the fused linear loss at GPT-2 XL -> GPT-2 shapes, against its four bare matrix products, which are the floor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import abkd_fast
from abkd_fast import AlphaBeta, divergence_loss, fused_linear_divergence

DIVERGENCE = AlphaBeta(0.2, 0.7)


def published(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Equation 5 as it is usually written down, in eager PyTorch."""
    alpha, beta = DIVERGENCE.alpha, DIVERGENCE.beta
    p, q = teacher.softmax(-1), student.softmax(-1)
    total = alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1).mean() / (alpha * beta)


def measure(candidates: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every candidate, run in turn; the first round warms up."""
    times = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in times.items()}


def report(title: str, times: dict[str, list[float]], floor: str) -> None:
    print(f"\n{title}")
    reference = statistics.median(times[floor])
    for name, values in times.items():
        middle = statistics.median(values)
        spread = f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}"
        print(f"  {name:24} {middle * 1e3:9.1f} ms  ({spread})  {middle / reference:6.2f} x {floor}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of logits in (1)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in (2)")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {abkd_fast.build_info()}")
    torch.manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, device=device) * scale

    teacher = normal(options.rows, options.vocab, scale=3.0)
    student = (teacher + normal(options.rows, options.vocab, scale=1.0)).requires_grad_()

    def run(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    ours, theirs = divergence_loss(student, teacher, DIVERGENCE), published(student, teacher)
    times = measure(
        {
            "published formulation": lambda: run(lambda: published(student, teacher), student),
            "divergence_loss": lambda: run(lambda: divergence_loss(student, teacher, DIVERGENCE), student),
        },
        options.repeats,
    )
    report(f"{DIVERGENCE} on logits {options.rows} x {options.vocab}, float32", times, "divergence_loss")
    print(f"  both compute {ours.item():.6f} and {theirs.item():.6f}")

    hidden = normal(options.tokens, 768, scale=1.0).requires_grad_()
    weight = normal(options.vocab, 768, scale=3 * 768**-0.5).requires_grad_()
    teacher_hidden = normal(options.tokens, 1600, scale=1.0)
    teacher_weight = normal(options.vocab, 1600, scale=3 * 1600**-0.5)

    @torch.no_grad()
    def products() -> None:
        logits = hidden @ weight.T
        teacher_hidden @ teacher_weight.T
        logits @ weight
        logits.T @ hidden

    tensors = (hidden, weight, teacher_hidden, teacher_weight, DIVERGENCE)
    times = measure(
        {
            "four matrix products": products,
            "fused_linear_divergence": lambda: run(lambda: fused_linear_divergence(*tensors), hidden, weight),
        },
        options.repeats,
    )
    title = f"{DIVERGENCE} from hidden states, 1600 and 768 wide, {options.tokens} tokens, float32"
    report(title, times, "four matrix products")


if __name__ == "__main__":
    main()
