"""How far a quantized teacher's probabilities are from the model's own: `python benchmarks/quantized.py MODEL ROWS`.

MODEL is a folder or Hub name, ROWS a file of rows. Means over the tokens of the first responses, in float32. Memory
is that of the loaded weights.
"""

import dataclasses

import torch
from torch import Tensor

from abkd_fast.config.models import ModelConfig
from abkd_fast.data.batches import Batch, pack
from abkd_fast.models import loading
from harness import Report
from workload import read_samples, rows_parser

DEVICE = torch.device("cpu")


@torch.no_grad()
def read(spec: ModelConfig, batches: list[Batch]) -> tuple[Tensor, int, float]:
    """The model's log-probabilities at the labels [N, V], its bytes, and how the check finds it."""
    meta = loading.read_meta_model(spec, "teacher")
    model = loading.load(spec, meta.whole, "teacher", torch.float32, DEVICE).eval()
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # tied ones count once
    size = sum(tensor.nbytes for tensor in tensors.values())
    difference, _ = model.difference((9, 5))
    logits = torch.cat([model.logit_map(model.head(model.hidden_states(batch))) for batch in batches])
    return logits.float().log_softmax(1), size, difference


def main() -> None:
    parser, _ = rows_parser(__doc__, "quantized")
    options = vars(parser.parse_args())
    plain = ModelConfig(path=options["model"])
    samples = read_samples(options)
    batches = pack(samples, options["max_length"])
    labels = torch.cat([batch.labels for batch in batches])[:, None]

    report, rows, own = Report(DEVICE, options), [], None
    with report.kept("quantized"):
        for wish in (None, "8bit", "4bit"):
            log_p, size, difference = read(dataclasses.replace(plain, quantize=wish), batches)
            own = log_p if own is None else own
            row = {"name": wish or "float32", "megabytes": size / 1e6, "check": difference}
            row["loss"] = -log_p.gather(1, labels).mean().item()
            if wish:
                row["kl"] = (own.exp() * (own - log_p)).sum(1).mean().item()
                row["same"] = (own.argmax(1) == log_p.argmax(1)).double().mean().item()
            rows.append(row)
        columns = {"megabytes": "MB|.0f", "kl": "KL divergence|.2g", "same": "same most probable token|.0%"}
        columns |= {"loss": "loss on the responses|.3f", "check": "check|.1e"}
        title = f"{options['model'].rstrip('/').rpartition('/')[2]}, {len(labels)} tokens of {len(samples)} responses"
        report.table("quantized", title, rows, columns)


if __name__ == "__main__":
    main()
