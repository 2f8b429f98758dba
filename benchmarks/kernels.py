"""The loss alone, against what it replaces and against its floor: `python benchmarks/kernels.py`.

losses    alpha-beta divergence between logits, against the published formulation and a compiled log-space one
families  every divergence of the catalog, against the alpha-beta one
fused     from hidden states, GPT-2 XL to GPT-2, against the bare matrix products, and Liger-Kernel and TRL if installed
memory    the same against the number of tokens: time, and memory beyond inputs and results
accuracy  errors of value and gradient against float64

Everything is forward and backward, in medians of interleaved runs. Tables go to the terminal; JSON, Markdown and a plot
to --out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from abkd_fast import AlphaBeta, divergence_loss, fused_linear_divergence
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.chunks import choose_chunk_tokens
from abkd_fast.losses.divergences import BY_NAME, AlphaNet
from harness import MIB, Report, at_least, at_most, available_memory, measure, peak_memory, spread
from rivals import DIVERGENCE, PEER_DIVERGENCE, PEERS, log_space, published, published_linear

TIME = {"name": ("", ""), "ms": ("ms", ".2f"), "range": ("min..max", "")}
PUBLISHED_TENSORS = 10  # of N x V float32 that the published formulation holds at once, and one to spare
OURS, PUBLISHED, FLOOR = "fused_linear_divergence", "published formulation", "four matrix products"
COLOURS = {OURS: "#0072b2", PUBLISHED: "#d55e00", FLOOR: "#999999"}  # told apart with any color vision
QUICK = {"rows": 4, "tokens": 64, "vocab": 1009, "widths": [16, 32], "sweep": [32, 64, 128], "repeats": 2}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def step(loss: Callable[..., Tensor], *arguments: object) -> Callable[[], None]:
    """Forward and backward of loss(*arguments), results thrown away."""
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def run() -> None:
        loss(*arguments).backward()
        for leaf in leaves:
            leaf.grad = None

    return run


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.report = Report(self.device, vars(options), judge=not options.quick)
        # As trained: on a GPU in bfloat16, on the CPU in float32.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    def logits(self, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Student's and teacher's: as wide as a language model's, and a good way apart."""
        teacher = self.normal(rows, self.options.vocab, scale=3.0)
        student = teacher + self.normal(rows, self.options.vocab)
        return student.to(dtype).requires_grad_(), teacher.to(dtype)

    def models(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and projections of student and teacher."""
        vocab, tensors = self.options.vocab, []
        for width in self.options.widths:
            tensors += self.normal(tokens, width, dtype=self.dtype), self.normal(vocab, width, scale=3 * width**-0.5)
        hidden, weight, teacher_hidden, teacher_weight = (x.to(self.dtype) for x in tensors)
        return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight

    def rival(self, name: str, expected: Tensor, loss: Callable[..., Tensor], *arguments: object) -> bool:
        """Whether `loss` runs here; its value must be the expected one."""
        try:
            value = loss(*arguments)
            value.backward()
        except Exception as error:  # a missing package or compiler shows itself in many ways
            reason = str(error).strip() or type(error).__name__
            self.report.note(f"{name}: skipped ({reason.splitlines()[0]})")
            return False
        finally:
            for x in arguments:
                x.grad = None
        self.report.note(f"value: {expected.item():.6f}, {name} {value.item():.6f}")
        torch.testing.assert_close(value.detach().float(), expected, rtol=1e-3, atol=0)
        return True

    def losses(self) -> None:
        student, teacher = self.logits(self.options.rows)
        candidates, targets = {"divergence_loss": step(divergence_loss, student, teacher, DIVERGENCE)}, {}
        rivals = {
            PUBLISHED: (published, 15),
            "log-space, torch.compile": (torch.compile(log_space, dynamic=False), 1.8),
        }
        if self.options.quick:
            del rivals["log-space, torch.compile"]
            self.report.note("torch.compile: skipped (--quick: compiling takes longer than all the rest)")
        with torch.no_grad():
            value = divergence_loss(student, teacher, DIVERGENCE)
        for name, (loss, times_faster) in rivals.items():
            if self.rival(name, value, loss, student, teacher):
                candidates[name], targets[name] = step(loss, student, teacher), at_least(times_faster)
        rows = [spread(name, values) for name, values in measure(candidates, self.options.repeats).items()]
        for row in rows:
            row["ratio"] = row["ms"] / rows[0]["ms"]
            if row["name"] in targets:
                row["target"] = targets[row["name"]]
        title = f"{DIVERGENCE} between logits {list(student.shape)}, float32"
        self.report.table("losses", title, rows, {**TIME, "ratio": ("x ours", ".2f")})
        self.row_kernel()

    def row_kernel(self) -> None:
        """The kernel below `divergence_loss`, that the fused loss calls too: how near it comes to the memory's rate."""
        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (x.detach() for x in self.logits(self.options.tokens, dtype))
            gradient = torch.empty_like(student)
            candidates = {
                f"copy, {short(dtype)}": lambda out=gradient, source=teacher: out.copy_(source),
                f"row kernel, {short(dtype)}": lambda s=student, t=teacher, out=gradient: row_ops.row_losses(
                    Rows(s, t, None, LossSpec(DIVERGENCE)), gradient=out
                ),
            }
            times = measure(candidates, self.options.repeats)
            for (name, values), passes in zip(times.items(), (2, 3), strict=True):  # reads and writes of a logit
                row = spread(name, values)
                rows.append({**row, "gb_per_s": passes * student.nbytes / row["ms"] / 1e6})
            rows[-1]["percent_of_copy"] = 100 * rows[-1]["gb_per_s"] / rows[-2]["gb_per_s"]
        columns = {**TIME, "gb_per_s": ("GB/s", ".1f"), "percent_of_copy": ("% of copy", ".0f")}
        self.report.table("losses", f"row kernel, logits {list(student.shape)}, values and gradient", rows, columns)

    def families(self) -> None:
        student, teacher = self.logits(self.options.rows)
        kinds = {str(kind): kind for kind in (*(kind() for kind in BY_NAME.values()), AlphaNet(per="token"))}
        candidates = {name: step(divergence_loss, student, teacher, kind) for name, kind in kinds.items()}
        times = measure(candidates, self.options.repeats)
        rows = [spread(name, values) for name, values in times.items()]
        reference_ms = next(row["ms"] for row in rows if row["name"] == str(AlphaBeta()))
        for row in rows:
            row["ratio"] = row["ms"] / reference_ms
            row["target"] = at_most(3 if row["name"].startswith("akl") else 2)
        title = f"every divergence between logits {list(student.shape)}, float32"
        self.report.table("families", title, rows, {**TIME, "ratio": ("x ab", ".2f")})

    def products(self, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Callable:
        """The four products that no way of computing the loss and its gradients can do without: its floor.

        They write into memory that is there already, which spares them what a caller pays for fresh results.
        """
        hidden, weight = hidden.detach(), weight.detach()
        student, teacher = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
        of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def run() -> None:
            torch.mm(hidden, weight.T, out=student)
            torch.mm(teacher_hidden, teacher_weight.T, out=teacher)
            torch.mm(student, weight, out=of_hidden)
            torch.mm(student.T, hidden, out=of_weight)

        return run

    def fused(self) -> None:
        tokens, widths = self.options.tokens, self.options.widths
        tensors = self.models(tokens)
        candidates = {FLOOR: self.products(*tensors), OURS: step(fused_linear_divergence, *tensors, DIVERGENCE)}
        if self.device.type == "cuda":
            in_bfloat16 = functools.partial(fused_linear_divergence, logits_dtype=torch.bfloat16)
            candidates[f"{OURS}, bfloat16 logits"] = step(in_bfloat16, *tensors, DIVERGENCE)
        candidates[f"{OURS}, {PEER_DIVERGENCE}"] = step(fused_linear_divergence, *tensors, PEER_DIVERGENCE)
        with torch.no_grad():
            value = fused_linear_divergence(*tensors, PEER_DIVERGENCE)
        for name, loss in PEERS.items():
            if self.rival(name, value, loss, *tensors):
                candidates[f"{name}, {PEER_DIVERGENCE}"] = step(loss, *tensors)
        times = measure(candidates, self.options.repeats)
        rows = [spread(name, values) for name, values in times.items()]
        flops = 2 * tokens * self.options.vocab * (3 * widths[0] + widths[1])
        for row in rows:
            row["ratio"] = row["ms"] / rows[0]["ms"]
            row["percent_of_floor"] = 100 / row["ratio"]
            row["tflops"] = flops / row["ms"] / 1e9
            if row["name"] == OURS:
                row["target"] = at_most(1.25 if self.device.type == "cuda" else 1.10)
        title = f"from hidden states {widths[1]} and {widths[0]} wide, {tokens} tokens, {short(self.dtype)}"
        columns = {"ratio": ("x floor", ".3f"), "percent_of_floor": ("% of floor", ".1f"), "tflops": ("TFLOP/s", ".2f")}
        self.report.table("fused", title, rows, {**TIME, **columns})

    def memory(self) -> None:
        rows = []
        sweep = sorted(self.options.sweep)
        for tokens in sweep:
            tensors = self.models(tokens)
            results = sum(x.nbytes for x in tensors[:2])  # gradients, alive at the end
            candidates = {OURS: step(fused_linear_divergence, *tensors, DIVERGENCE)}
            if PUBLISHED_TENSORS * 4 * tokens * self.options.vocab < available_memory(self.device) / 2:
                candidates[PUBLISHED] = step(published_linear, *tensors)
            else:
                self.report.note(f"{PUBLISHED}: left out at {tokens} tokens, it could exceed the memory")
            bytes_held = {name: peak_memory(run, self.device) - results for name, run in candidates.items()}
            candidates[FLOOR] = self.products(*tensors)
            candidates[FLOOR]()
            times = measure(candidates, min(3, self.options.repeats), warm=True)
            chunk = choose_chunk_tokens(tokens, self.options.vocab, 2, torch.float32, self.device)
            for name, values in times.items():
                rows.append(spread(name, values, tokens=tokens, bytes=bytes_held.get(name)))
                rows[-1]["mib"] = bytes_held[name] / MIB if name in bytes_held else None
                rows[-1]["chunk"] = chunk if name == OURS else None
        columns = {"tokens": ("tokens", "d"), **TIME, "mib": ("extra MiB", ".1f"), "chunk": ("rows a chunk", "d")}
        title = f"against the number of tokens, {short(self.dtype)}; memory beyond inputs and results"
        self.report.table("memory", title, rows, columns)

        held = {(row["name"], row["tokens"]): row["bytes"] for row in rows if row["bytes"]}
        first, last = sweep[0], sweep[-1]
        growth = held[OURS, last] / held[OURS, first]
        both = [tokens for tokens in sweep if (PUBLISHED, tokens) in held]
        summary = [{"name": f"ours, {last} over {first} tokens", "ratio": growth, "target": at_most(1.05)}]
        summary[0]["percent"] = 100 * (growth - 1)
        if both:
            at = 4096 if 4096 in both else both[-1]
            ratio = held[PUBLISHED, at] / held[OURS, at]
            summary.append({"name": f"published over ours, {at} tokens", "ratio": ratio, "target": at_least(20)})
        columns = {"name": ("memory", ""), "ratio": ("ratio", ".3f"), "percent": ("growth, %", ".1f")}
        self.report.table("memory", "growth", summary, columns)
        self.plot(rows)

    def plot(self, rows: list[dict]) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            self.report.note("plot: skipped, matplotlib is not installed (pip install '.[bench]')")
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
        for panel, key, label in zip(panels, ("ms", "mib"), ("time, ms", "extra memory, MiB"), strict=True):
            for (name, color), marker in zip(COLOURS.items(), "os^", strict=True):
                points = [(row["tokens"], row[key]) for row in rows if row["name"] == name and row[key] is not None]
                if points:
                    panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
            panel.set(xlabel="tokens", ylabel=label, yscale="log")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
            panel.legend()
        figure.suptitle(f"{DIVERGENCE} from hidden states, {self.report.content['machine']['device']}", fontsize=10)
        path = self.options.out / "kernels.png"
        figure.savefig(path, dpi=150)
        self.report.note(f"plot: {path}")

    def accuracy(self) -> None:
        student, teacher = (x.detach() for x in self.logits(self.options.rows))
        kinds = [AlphaNet(per="token") if kind is AlphaNet else kind() for kind in BY_NAME.values()]
        exact = {}
        for kind in kinds:
            gradient = torch.empty_like(student, dtype=torch.float64)
            rows = Rows(student.double(), teacher.double(), None, LossSpec(kind))
            exact[str(kind)] = reference.row_losses(rows, gradient), gradient

        def errors(name: str, kind: str, losses: Tensor, gradient: Tensor) -> dict:
            """The worst row's, relative: of the loss, and of the gradient in the Euclidean norm."""
            value, slope = exact[kind]
            of_gradient = (gradient.double() - slope).norm(dim=1) / slope.norm(dim=1)
            of_value = (losses.double() - value).abs() / value
            return {"name": name, "value": of_value.max().item(), "gradient": of_gradient.max().item()}

        rows = []
        for kind in kinds:
            gradient = torch.empty_like(student)
            losses = row_ops.row_losses(Rows(student, teacher, None, LossSpec(kind)), gradient=gradient)
            rows.append(errors(str(kind), str(kind), losses, gradient))
        leaf = student.clone().requires_grad_()
        losses = torch.stack([published(z[None], y[None]) for z, y in zip(leaf, teacher, strict=True)])
        losses.sum().backward()
        rows.append(errors(f"{PUBLISHED}, {DIVERGENCE}", str(DIVERGENCE), losses.detach(), leaf.grad))
        columns = {"name": ("", ""), "value": ("of the value", ".1e"), "gradient": ("of the gradient", ".1e")}
        title = f"errors against float64, logits {list(student.shape)}, float32, the worst row"
        self.report.table("accuracy", title, rows, columns)


SECTIONS = ("losses", "families", "fused", "memory", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    results = pathlib.Path(__file__).parent / "results" / "kernels"
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="default: all")
    parser.add_argument("--rows", type=int, default=256, help="rows of logits (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=50257, help="default: %(default)s, GPT-2's")
    parser.add_argument("--tokens", type=int, default=4096 if gpu else 512, help="of fused (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs=2, default=[768, 1600], help="student's, teacher's (GPT-2, XL)")
    parser.add_argument("--sweep", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="tokens of memory")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: %(default)s; memory: at most 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    benchmark = Benchmark(options)
    try:
        for section in SECTIONS:
            if section in options.only:
                getattr(benchmark, section)()
    finally:  # what was measured before a failure is kept
        benchmark.report.save(options.out / "kernels.json")


if __name__ == "__main__":
    main()
