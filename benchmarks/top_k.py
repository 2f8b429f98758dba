"""What a loss loses if only the teacher's k likeliest tokens are known: `python benchmarks/top_k.py MODEL ROWS`.

MODEL, a folder or Hub name, is the teacher. The students are its first layers, and itself with noise on every weight.
ROWS is a file of rows. "rest" is the loss with one outcome for all other tokens (`teacher.top_k`), "renormalized" that
of both models' probabilities divided by their sums over the k tokens. The errors are relative to the loss over the
whole vocabulary: those of its value, of the gradients of the hidden states (as one vector: what each token learns), and
of the gradient of the output projection (what the batch learns).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from abkd_fast import divergence_loss, fused_linear_divergence, fused_linear_top_k
from abkd_fast.config.models import ModelConfig
from abkd_fast.data.batches import Batch, pack
from abkd_fast.losses.arguments import LinearHead
from abkd_fast.losses.divergences import Divergence, parse
from abkd_fast.models import loading
from abkd_fast.models.causal_lm import CausalLM
from harness import Report
from workload import read_samples, rows_parser

DEVICE = torch.device("cpu")
PARTS = ("value", "tokens", "batch")  # of a loss: itself, the gradient by hidden states, and by the output projection


@torch.no_grad()
def read(model: CausalLM, batches: list[Batch]) -> LinearHead:
    hidden = torch.cat([model.hidden_states(batch) for batch in batches])
    return LinearHead(hidden, model.head.weight.detach(), None, model.logit_map)


def with_noise(model: CausalLM, share: float) -> CausalLM:
    """The model with normal noise on every weight, as large as a share of the weight."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + share * torch.randn_like(parameter)
    return model


def with_layers(model: CausalLM, share: float) -> CausalLM:
    """The model with a share of its layers, the first ones."""
    model, count = copy.deepcopy(model), len(model.layers)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            del module[round(share * count) :]
    return model


def dense(head: LinearHead, teacher: LinearHead, divergence: Divergence) -> Tensor:
    return fused_linear_divergence(**head.arguments("student"), **teacher.arguments("teacher"), divergence=divergence)


def rest(head: LinearHead, known: Tensor, ids: Tensor, divergence: Divergence) -> Tensor:
    tokens = {"top_ids": ids, "top_log_probs": known}
    return fused_linear_top_k(**head.arguments("student"), **tokens, divergence=divergence)


def renormalized(head: LinearHead, known: Tensor, ids: Tensor, divergence: Divergence) -> Tensor:
    logits = head.logit_map(head.hidden @ head.weight.T)
    return divergence_loss(logits.gather(1, ids), known, divergence)


def measure(loss_of: Callable[..., Tensor], student: LinearHead, *arguments: object) -> list[Tensor]:
    """The loss, and the gradients of hidden states and output projection."""
    hidden, weight = (x.clone().requires_grad_() for x in student.tensors[:2])
    loss = loss_of(student._replace(hidden=hidden, weight=weight), *arguments)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def compare(student: LinearHead, teacher: LinearHead, log_p: Tensor, name: str, sizes: list[int]) -> list[dict]:
    """A row for each k: the errors of both ways."""
    divergence = parse(name)
    whole, rows = measure(dense, student, teacher, divergence), []
    for k in sizes:
        row = {"loss": name, "k": k, "value": whole[0].item()}
        for loss_of in (rest, renormalized):
            pairs = zip(PARTS, measure(loss_of, student, *log_p.topk(k), divergence), whole, strict=True)
            errors = {part: ((x - exact).norm() / exact.norm()).item() for part, x, exact in pairs}
            row |= {f"{loss_of.__name__} {part}": error for part, error in errors.items()}
        rows.append(row)
    return rows


def main() -> None:
    parser, add = rows_parser(__doc__, "top_k", count=24)
    add("--losses", nargs="+", default=["fkl", "rkl", "ab:0.2,0.7", "jsd:0.5"], help="default: %(default)s")
    add("--k", type=int, nargs="+", default=[20, 100, 1000], help="default: %(default)s")
    options = vars(parser.parse_args())
    spec = ModelConfig(path=options["model"])
    samples = read_samples(options)
    batches = pack(samples, options["max_length"])
    model = loading.load(spec, loading.read_meta_model(spec, "teacher").whole, "teacher", torch.float32, DEVICE).eval()
    teacher = read(model, batches)
    students = {"noise of 10 %": with_noise(model, 0.1), "two thirds of the layers": with_layers(model, 2 / 3)}
    log_p = teacher.logit_map(teacher.hidden @ teacher.weight.T).log_softmax(1)

    report = Report(DEVICE, options)
    with report.kept("top_k"):
        title = f"{options['model'].rstrip('/').rpartition('/')[2]}, {len(log_p)} tokens of {len(samples)} responses"
        masses = [
            {"name": f"{k} tokens", "rest": 1 - log_p.topk(k).values.exp().sum(1).mean().item()} for k in options["k"]
        ]
        report.table("top_k", title, masses, {"rest": "the teacher's rest|.2%"})
        columns = {"loss": "loss", "k": "k", "value": "value|.3g"}
        for kind in ("rest", "renormalized"):
            columns |= {f"{kind} {part}": f"{kind}: {part}|.2%" for part in PARTS}
        for name, model in students.items():
            head = read(model, batches)
            rows = [row for loss in options["losses"] for row in compare(head, teacher, log_p, loss, options["k"])]
            report.table("top_k", f"student: {name}", rows, columns)


if __name__ == "__main__":
    main()
