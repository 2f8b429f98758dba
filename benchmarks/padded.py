"""What the padded form costs: the same Llama packed and padded, at Dolly's lengths: `python benchmarks/padded.py`.

train     forward and backward pass of a step's samples, cross-entropy of the responses
generate  greedy responses to a step's prompts
"""

import copy

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import harness
from abkd_fast.config.sampling import SamplingParams
from abkd_fast.data.batches import pack
from abkd_fast.device import choose_dtype
from abkd_fast.generation.sampling import sample
from abkd_fast.losses.fused_linear import fused_linear_cross_entropy
from abkd_fast.models.causal_lm import CausalLM
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.models.padded import PaddedCausalLM, padded_tokens
from harness import TIME, Report
from workload import LENGTH, draw_samples

SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def train(model: CausalLM, samples: list[dict], device: torch.device) -> None:
    for part in pack(samples, 8192):
        part = part.to(device)
        options = {"labels": part.labels, "reduction": "sum"}
        model(part, lambda head: fused_linear_cross_entropy(**head.arguments("student"), **options)).backward()  # noqa: B023
    model.zero_grad()


def main() -> None:
    parser, add = harness.parser(__doc__, "padded", repeats=7, quick=True)
    add("--samples", type=int, default=32, help="of a step (default: %(default)s)")
    add("--new-tokens", type=int, default=64, help="of each response (default: %(default)s)")
    options = vars(parser.parse_args())
    device, quick = torch.device(options["device"]), options["quick"]
    vocab, tokens = (211, 4) if quick else (32000, options["new_tokens"])
    config = AutoConfig.for_model("llama", vocab_size=vocab, **(TINY if quick else SHAPE))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device)
    models = {"packed": PackedCausalLM(copy.deepcopy(model), "student"), "padded": PaddedCausalLM(model, "student")}

    generator = np.random.default_rng(0)
    prompts, responses = draw_samples(1, options["samples"], generator)
    lengths = np.minimum(prompts + responses, LENGTH)
    rows = [generator.integers(1, vocab, size=length).tolist() for length in lengths]
    samples = [{"input_ids": row, "spans": [int(n), len(row)]} for row, n in zip(rows, prompts, strict=True)]
    asked = [row[:n] for row, n in zip(rows, prompts, strict=True)]
    settings = SamplingParams(max_new_tokens=tokens, temperature=0.0)
    seeds = [0] * len(asked)

    report = Report(device, options, judge=not quick)
    columns = {**TIME, "ratio": "ratio|.2f"}
    bfloat16 = choose_dtype("auto", device) == torch.bfloat16
    with report.kept("padded"), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        added = padded_tokens([*lengths]) / lengths.sum() - 1
        runs = {name: lambda model=model: train(model, samples, device) for name, model in models.items()}
        title = f"Training on {len(rows)} samples, {lengths.sum()} tokens; padding adds {added:.0%}"
        report.table("train", title, harness.compare(runs, options["repeats"]), columns)
        runs = {name: lambda model=model: sample(model, asked, settings, seeds) for name, model in models.items()}
        title = f"Generation of {tokens} tokens to each of {len(asked)} prompts"
        report.table("generate", title, harness.compare(runs, options["repeats"]), columns)


if __name__ == "__main__":
    main()
