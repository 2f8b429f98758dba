"""Small models with random weights, and their own logits with padding."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.models import attention
from abkd_fast.models.packed import PackedCausalLM


def samples(lengths, vocab=211, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(vocab, (n,), generator=generator).tolist(), "spans": [max(1, n // 3), n]}
        for n in lengths
    ]


def build(config, dtype, seed=0, **changes):
    """A model whose logits are not nearly uniform, so that differences show."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**config, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return PackedCausalLM(model.eval(), "student")


def padded_logits(model, rows):
    """The model's own logits with padding, a mask and transformers' own attention, at the response positions."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.stack([F.pad(torch.tensor(row["input_ids"]), (0, longest - len(row["input_ids"]))) for row in rows])
    mask = torch.stack([torch.arange(longest) < len(row["input_ids"]) for row in rows]).long()
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(attention.NAME)
    kept = [logits[i, row["spans"][0] - 1 : len(row["input_ids"]) - 1] for i, row in enumerate(rows)]
    return torch.cat(kept)
