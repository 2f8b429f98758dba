"""What rounded teacher's states do to losses and gradients: `python benchmarks/states.py MODEL ROWS`.

MODEL is a folder or Hub name of the teacher, ROWS a file of rows. The students are the same model without some of its
layers. All is computed in float32; the teacher's states alone are rounded, as a cache in bfloat16 or float8 keeps them.
Differences are relative to exact states:

loss       of all tokens; and the mean difference of one token's loss, by the mean loss
gradient   of one token's hidden state, the mean; and of the output projection, which sums over all tokens
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from abkd_fast import fused_linear_divergence
from abkd_fast.losses.divergences import parse
from abkd_fast.teacher.shards import FLOAT8, Part, row_bytes
from harness import Report
from workload import read_samples, rows_parser

LOSSES = ("fkl", "rkl", "ab:0.2,0.7", "jsd:0.5")
LEFT_OUT = (1, 6)  # layers of the students


@torch.no_grad()
def states(model: nn.Module, samples: list[dict]) -> Tensor:
    """The hidden states [N, H] that predict the trained tokens."""
    rows = []
    for sample in samples:
        (start, stop), ids = sample["spans"][:2], torch.tensor([sample["input_ids"]])
        rows.append(model.base_model(ids, use_cache=False).last_hidden_state[0, start - 1 : stop - 1])
    return torch.cat(rows)


def without_layers(model: nn.Module, count: int) -> nn.Module:
    """The model without `count` of its layers, spread evenly."""
    layers = model.base_model.layers
    left_out = {round((number + 0.5) * len(layers) / count) for number in range(count)}
    model.base_model.layers = nn.ModuleList(layer for place, layer in enumerate(layers) if place not in left_out)
    return model


def losses_and_gradients(loss: str, student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every token [N], the gradient of every hidden state [N, H], and that of the projection [V, H]."""
    hidden, projection = (tensor.detach().clone().requires_grad_() for tensor in (student, weight))
    values = fused_linear_divergence(hidden, projection, teacher, weight, parse(loss), reduction="none")
    values.sum().backward()
    return values.detach(), hidden.grad, projection.grad


def compare(loss: str, student: Tensor, exact: Tensor, weight: Tensor) -> list[dict]:
    """A row for each type that states may be kept in."""
    values, gradients, total = losses_and_gradients(loss, student, exact, weight)
    rows = []
    for name, dtype in (("bfloat16", torch.bfloat16), ("float8", FLOAT8)):
        rounded = Part.of(exact, dtype).decode(torch.float32)
        now, gradients_now, total_now = losses_and_gradients(loss, student, rounded, weight)
        errors = (gradients_now - gradients).norm(dim=1) / gradients.norm(dim=1)
        row = {"name": f"{loss}, {name}", "value": values.mean().item(), "bytes": row_bytes(exact.shape[1], dtype)}
        row["loss"] = (now.sum() / values.sum() - 1).abs().item()
        row["token_loss"] = ((now - values).abs().mean() / values.mean()).item()
        row["token_gradient"] = errors.mean().item()
        row["gradient"] = ((total_now - total).norm() / total.norm()).item()
        rows.append(row)
    return rows


def main() -> None:
    parser, _ = rows_parser(__doc__, "states")
    options = vars(parser.parse_args())
    samples = read_samples(options)
    report = Report(torch.device("cpu"), options)
    with report.kept("states"):
        for count in LEFT_OUT:
            model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).eval()
            exact, weight = states(model, samples), model.get_output_embeddings().weight
            student = states(without_layers(model, count), samples)
            rows = [row for loss in LOSSES for row in compare(loss, student, exact, weight)]
            columns = {"bytes": "bytes a token", "value": "loss|.3f", "loss": "error of the loss|.1e"}
            columns |= {"token_loss": "of a token's|.1e", "token_gradient": "of a token's gradient|.1e"}
            columns |= {"gradient": "of the batch's gradient|.1e"}
            name = options["model"].rstrip("/").rpartition("/")[2]
            title = f"{name}, student without {count} of its layers, {len(exact)} tokens of {len(samples)} responses"
            report.table("states", title, rows, columns)


if __name__ == "__main__":
    main()
