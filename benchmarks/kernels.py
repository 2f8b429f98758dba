"""The loss alone, against what it replaces and against its floor: `python benchmarks/kernels.py`.

products  the matrix products around the row kernel, with rows of logits as far apart as they are long, or aligned
rows      the row kernel by itself, with the gradient and without a teacher
losses    alpha-beta divergence between logits, against the published formulation and a compiled log-space one
families  every divergence of the catalog, against the alpha-beta one
fused     from hidden states, GPT-2 XL to GPT-2, against the bare matrix products, and Liger-Kernel and TRL if installed
memory    the same against the number of tokens: time, and memory beyond inputs and results
accuracy  errors of value and gradient against float64
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import harness
from abkd_fast import AlphaBeta, divergence_loss, fused_linear_divergence
from abkd_fast.device import free_memory
from abkd_fast.errors import first_line
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.chunks import choose_chunk_tokens, gradient_dtype, row_bytes
from abkd_fast.losses.divergences import BY_NAME, AlphaNet, CrossEntropy, JensenShannon
from chart import draw_lines
from harness import MIB, TIME, Report, compare, peak_memory

DIVERGENCE = AlphaBeta(0.2, 0.7)
PEER_DIVERGENCE = JensenShannon()
PEER_BETA = 1 - PEER_DIVERGENCE.lam  # both peers give this name to the teacher's share of the mixture
ALIGNMENT = 64  # elements: rows of logits that begin at multiples of it keep a GPU's products fast
PUBLISHED_TENSORS = 10  # of N x V float32 that the published formulation holds at once, and one to spare
OURS, PUBLISHED, FLOOR = "fused_linear_divergence", "published formulation", "four matrix products"
COMPILED = "log-space, torch.compile"
SECTIONS = ("products", "rows", "losses", "families", "fused", "memory", "accuracy")
# Rows of logits, vocabulary (GPT-2's), widths of student and teacher (GPT-2 and XL), tokens of the section memory.
FULL = {"rows": 256, "vocab": 50257, "widths": [768, 1600], "sweep": [512, 1024, 2048, 4096, 8192]}
QUICK = {"rows": 4, "tokens": 64, "vocab": 1009, "widths": [16, 32], "sweep": [32, 64, 128], "repeats": 2}


def softmaxes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """p of the teacher and q of the student."""
    return teacher.softmax(-1, dtype=torch.float32), student.softmax(-1, dtype=torch.float32)


def alpha_beta_rows(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """Equation 5 as it is usually written: eager PyTorch, powers of float32 softmaxes. [..., V] to [...]."""
    p, q = softmaxes(student, teacher)
    total = alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1) / (alpha * beta)


def published(student: Tensor, teacher: Tensor) -> Tensor:
    return alpha_beta_rows(student, teacher, DIVERGENCE.alpha, DIVERGENCE.beta).mean()


def log_space(student: Tensor, teacher: Tensor) -> Tensor:
    """The same written for a compiler: only exponentials, whose gradients need no powers."""
    alpha, beta = DIVERGENCE.alpha, DIVERGENCE.beta
    a, b = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    total = alpha + beta
    terms = alpha / total * (total * a).exp() + beta / total * (total * b).exp() - (alpha * a + beta * b).exp()
    return terms.sum(-1).mean() / (alpha * beta)


def liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Liger-Kernel's fused linear JSD with its defaults: the projection's gradient is summed in the weights' type."""
    if not hidden.is_cuda:
        raise RuntimeError("it needs a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(hidden, weight, teacher_hidden, teacher_weight, jsd_beta=PEER_BETA)


def trl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """TRL's chunked JSD. It makes the logits again in backward, and computes the student's entropy besides."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # not public: it may move

    mask = torch.ones(1, len(hidden), device=hidden.device)
    return _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, PEER_BETA)[0]


PEERS = {"Liger-Kernel": liger, "TRL": trl}


def step(loss: Callable[..., Tensor], *arguments: object) -> Callable[[], None]:
    """Forward and backward of loss(*arguments); the results are thrown away."""
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(loss(*arguments), leaves)


def matrix_products(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Callable:
    """The four products that no way of computing the loss and its gradients can avoid: its floor.

    They write into existing memory, which spares them what a caller pays for fresh results.
    """
    hidden, weight = hidden.detach(), weight.detach()
    student, teacher = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
    products = (hidden, weight.T, student), (teacher_hidden, teacher_weight.T, teacher)
    products += (student, weight, torch.empty_like(hidden)), (student.T, hidden, torch.empty_like(weight))
    return lambda: [torch.mm(a, b, out=out) for a, b, out in products]


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.vocab = options, torch.device(options.device), options.vocab
        self.report = Report(self.device, vars(options), judge=not options.quick)
        self.type = "bfloat16" if options.device == "cuda" else "float32"  # as in training

    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, as wide as a language model's, and a good way apart."""
        teacher = 3 * torch.randn(self.options.rows, self.vocab, device=self.device)
        return (teacher + torch.randn_like(teacher)).requires_grad_(), teacher

    def models(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and projections of student and teacher."""
        tensors = []
        for width in self.options.widths:
            states, weight = (torch.randn(rows, width, device=self.device) for rows in (tokens, self.vocab))
            tensors += states, weight * (3 * width**-0.5)
        hidden, weight, *teacher = (x.to(getattr(torch, self.type)) for x in tensors)
        return hidden.requires_grad_(), weight.requires_grad_(), *teacher

    def runs(self, name: str, expected: Tensor, loss: Callable[..., Tensor], *arguments: Tensor) -> bool:
        """Whether another implementation runs here. Its value must be the expected one."""
        try:
            value = loss(*arguments)
            torch.autograd.grad(value, [x for x in arguments if x.requires_grad])
        except Exception as error:  # a missing package or compiler shows itself in many ways
            self.report.note(f"{name}: skipped ({first_line(error)})")
            return False
        self.report.note(f"value: {expected.item():.6f}, {name} {value.item():.6f}")
        torch.testing.assert_close(value.detach().float(), expected, rtol=1e-3, atol=0)
        return True

    def products(self) -> None:
        hidden, weight = (x.detach() for x in self.models(self.options.tokens)[:2])
        results = torch.empty_like(hidden), torch.empty_like(weight)
        candidates = {}
        for stride in (self.vocab, -(-self.vocab // ALIGNMENT) * ALIGNMENT):
            logits = hidden.new_ones(len(hidden), stride)[:, : self.vocab]
            products = {
                "logits": (hidden, weight.T, logits),
                "gradient of the hidden states": (logits, weight, results[0]),
                "gradient of the weight": (logits.T, hidden, results[1]),
            }
            for name, (a, b, out) in products.items():
                candidates[f"{name}, rows {stride} apart"] = functools.partial(torch.mm, a, b, out=out)
        rows, work = compare(candidates, self.options.repeats), 2 * hidden.numel() * self.vocab
        for row in rows:
            row["tflops"] = work / row["ms"] / 1e9
        title = f"products with logits [{len(hidden)}, {self.vocab}], {hidden.shape[1]} wide, {self.type}"
        self.report.table("products", title, rows, TIME | {"tflops": "TFLOP/s|.2f"})

    def rows(self) -> None:
        candidates, sizes = {}, {}
        for dtype in dict.fromkeys((torch.float32, getattr(torch, self.type))):
            stride = -(-self.vocab // ALIGNMENT) * ALIGNMENT
            student, teacher = (3 * torch.randn(2, self.options.tokens, stride, device=self.device)).to(dtype)
            student, teacher = student[:, : self.vocab], teacher[:, : self.vocab]
            gradient, labels = torch.empty_like(student), torch.zeros(len(student), dtype=int, device=self.device)
            kinds = {str(DIVERGENCE): Rows(student, teacher, None, LossSpec(DIVERGENCE))}
            kinds["cross-entropy"] = Rows(student, None, labels, LossSpec(CrossEntropy(), hard_weight=1.0))
            for name, call in kinds.items():
                name = f"{name}, {str(dtype).removeprefix('torch.')}"
                candidates[name] = functools.partial(row_ops.row_losses, call, gradient)
                sizes[name] = (2 if call.teacher is None else 3) * dtype.itemsize
        rows, elements = compare(candidates, self.options.repeats), self.options.tokens * self.vocab
        for row in rows:
            row |= {"ps": 1e9 * row["ms"] / elements, "gb": sizes[row["name"]] * elements / row["ms"] / 1e6}
        title = f"the row kernel, logits and gradient [{self.options.tokens}, {self.vocab}]"
        self.report.table("rows", title, rows, TIME | {"ps": "ps a logit|.2f", "gb": "GB/s, each read once|.0f"})

    def losses(self) -> None:
        student, teacher = self.logits()
        candidates = {"divergence_loss": step(divergence_loss, student, teacher, DIVERGENCE)}
        others = {PUBLISHED: published}
        if not self.options.quick:  # compiling takes longer than all the rest
            others[COMPILED] = torch.compile(log_space, dynamic=False)
        value = divergence_loss(student.detach(), teacher, DIVERGENCE)
        for name, loss in others.items():
            if self.runs(name, value, loss, student, teacher):
                candidates[name] = step(loss, student, teacher)
        rows = compare(candidates, self.options.repeats)
        for row in rows[1:]:
            row["target"] = {"at_least": {PUBLISHED: 15, COMPILED: 1.8}[row["name"]]}
        title = f"{DIVERGENCE} between logits {list(student.shape)}, float32"
        self.report.table("losses", title, rows, TIME | {"ratio": "x ours|.2f"})

    def families(self) -> None:
        student, teacher = self.logits()
        kinds = DIVERGENCE, *(kind() for kind in BY_NAME.values()), AlphaNet(per="batch")
        candidates = {str(kind): step(divergence_loss, student, teacher, kind) for kind in kinds}
        rows = compare(candidates, self.options.repeats)
        for row in rows:
            row["target"] = {"at_most": 3 if row["name"].startswith("akl") else 2}
        title = f"every divergence between logits {list(student.shape)}, float32"
        self.report.table("families", title, rows, TIME | {"ratio": "x ab|.2f"})

    def fused(self) -> None:
        tokens, (width, teacher_width) = self.options.tokens, self.options.widths
        tensors = self.models(tokens)
        candidates = {FLOOR: matrix_products(*tensors), OURS: step(fused_linear_divergence, *tensors, DIVERGENCE)}
        if self.device.type == "cuda":
            loss = functools.partial(fused_linear_divergence, logits_dtype=torch.bfloat16)
            candidates[f"{OURS}, bfloat16 logits"] = step(loss, *tensors, DIVERGENCE)
        candidates[f"{OURS}, {PEER_DIVERGENCE}"] = step(fused_linear_divergence, *tensors, PEER_DIVERGENCE)
        value = fused_linear_divergence(*(x.detach() for x in tensors), PEER_DIVERGENCE)
        for name, loss in PEERS.items():
            if self.runs(name, value, loss, *tensors):
                candidates[f"{name}, {PEER_DIVERGENCE}"] = step(loss, *tensors)
        rows = compare(candidates, self.options.repeats)
        for row in rows:
            row["tflops"] = 2 * tokens * self.vocab * (3 * width + teacher_width) / row["ms"] / 1e9
        rows[1]["target"] = {"at_most": 1.25 if self.device.type == "cuda" else 1.10}
        title = f"from hidden states {teacher_width} and {width} wide, {tokens} tokens, {self.type}"
        self.report.table("fused", title, rows, TIME | {"ratio": "x floor|.3f", "tflops": "TFLOP/s|.2f"})

    def memory(self) -> None:
        rows = []
        for tokens in self.options.sweep:
            tensors = self.models(tokens)
            results = sum(x.nbytes for x in tensors[:2])  # gradients, alive at the end
            candidates = {OURS: step(fused_linear_divergence, *tensors, DIVERGENCE)}
            torch.cuda.empty_cache()
            if PUBLISHED_TENSORS * 4 * tokens * self.vocab < free_memory(self.device) / 2:
                candidates[PUBLISHED] = step(lambda z, w, y, v: published(z @ w.T, y @ v.T), *tensors)
            else:
                self.report.note(f"{PUBLISHED}: left out at {tokens} tokens, it could exceed the memory")
            held = {name: peak_memory(run, self.device) - results for name, run in candidates.items()}
            candidates[FLOOR] = matrix_products(*tensors)
            candidates[FLOOR]()
            separate = gradient_dtype(tensors[0].dtype, torch.float32, self.device)
            bytes_of_row = row_bytes(self.vocab, 2, torch.float32, separate)
            chunk = choose_chunk_tokens(tokens, bytes_of_row, self.device)
            for row in compare(candidates, min(3, self.options.repeats), warm=True):
                size = held.get(row["name"])
                row |= {"tokens": tokens, "bytes": size, "mib": size and size / MIB}
                rows.append(row | {"chunk": chunk if row["name"] == OURS else None})
        columns = {"tokens": "tokens|d", "name": ""} | TIME | {"mib": "extra MiB|.1f", "chunk": "rows a chunk|d"}
        title = f"against the number of tokens, {self.type}; memory beyond inputs and results"
        self.report.table("memory", title, rows, columns)
        title = f"{DIVERGENCE} from hidden states, {self.report.content['machine']['device']}"
        draw_lines(rows, (OURS, PUBLISHED, FLOOR), title, self.report)

    def accuracy(self) -> None:
        """The worst row's relative errors: of the loss, and of the gradient in the Euclidean norm."""
        student, teacher = (x.detach() for x in self.logits())
        rows = []
        for kind in (kind() for kind in BY_NAME.values()):
            spec, gradient = LossSpec(kind), torch.empty_like(student)
            exact = torch.empty_like(student, dtype=torch.float64)
            expected = reference.row_losses(Rows(student.double(), teacher.double(), None, spec), exact)
            results = {str(kind): (row_ops.row_losses(Rows(student, teacher, None, spec), gradient), gradient)}
            if kind == DIVERGENCE:
                leaf = student.clone().requires_grad_()
                losses = alpha_beta_rows(leaf, teacher, kind.alpha, kind.beta)
                results[f"{PUBLISHED}, {kind}"] = losses.detach(), *torch.autograd.grad(losses.sum(), leaf)
            for name, (losses, slope) in results.items():
                errors, slopes = (losses - expected).abs() / expected, (slope - exact).norm(dim=1) / exact.norm(dim=1)
                rows.append({"name": name, "value": errors.max().item(), "gradient": slopes.max().item()})
        title = f"errors against float64, logits {list(student.shape)}, float32, the worst row"
        self.report.table("accuracy", title, rows, {"value": "of the value|.1e", "gradient": "of the gradient|.1e"})


def main() -> None:
    parser, add = harness.parser(__doc__, "kernels", repeats=7, quick=True)
    add("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="default: all")
    options = parser.parse_args()
    vars(options).update(QUICK if options.quick else FULL | {"tokens": 4096 if options.device == "cuda" else 512})
    torch.manual_seed(0)
    benchmark = Benchmark(options)
    with benchmark.report.kept("kernels"):
        for section in SECTIONS:
            if section in options.only:
                getattr(benchmark, section)()


if __name__ == "__main__":
    main()
