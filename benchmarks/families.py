"""Every causal language model of transformers, small and random: which are right here, and how they are trained.

`python benchmarks/families.py` examines all of them and writes the table of docs/models.md. For each family it compares
loss, gradients and greedy generation, beyond its windows and chunks, with transformers' own eager forward pass.
"""

import argparse
import copy
import inspect
import pathlib
import time
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abkd_fast.config.sampling import SamplingParams
from abkd_fast.config.training import TrainConfig
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.generation.sampling import sample
from abkd_fast.losses.fused_linear import fused_linear_cross_entropy
from abkd_fast.models import forms
from abkd_fast.models.causal_lm import CausalLM
from abkd_fast.training import costs

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "models.md"
LENGTHS = (37, 30, 12, 3)  # tokens of the rows
NEW_TOKENS = 12
LOSS, GRADIENT = 1e-5, 1e-3  # the largest relative differences that count as agreement
VOCABULARY = 211

# The sizes of a small model, by the names that configurations have for them.
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("shared_intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state"), 8),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"num_key_value_heads": 4}  # latent attention has as many key heads as heads
HALVES = ["linear_attention", "full_attention"]
# What else a small model of a family needs, so that all kinds of its layers are there.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu", "dots3_note_text"), MLA),
    "axk1": {**MLA, "n_group": 2, "topk_group": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.125, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": HALVES, "num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_hidden_layers": 4, "floor_scale": 8},
    "longcat_flash": {"num_layers": 1, "num_key_value_heads": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi3": {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_next": {"num_hidden_layers": 2, "layer_types": HALVES, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 9,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Families that are no language models of text alone, or whose configuration can't be made small.
LEFT_OUT = [
    "blt",
    "emu3",
    "fuyu",
    "git",
    "got_ocr2",
    "mllama",
    "moshi",
    "musicgen",
    "musicgen_melody",
    "phi4_multimodal",
    "whisper",
    "xlm",
    "reformer",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "moss_transcribe_diarize",
    "cwm",
]


def text_kind(model_type: str) -> type[PretrainedConfig]:
    """The class of a family's configuration: of the language model alone, where it has other parts."""
    return type(AutoConfig.for_model(model_type).get_text_config(decoder=True))


def small_config(model_type: str) -> PretrainedConfig:
    kind = text_kind(model_type)
    default = vars(kind())
    known = {name for name, value in default.items() if value is not None} | {"vocab_size"}
    names = known & {*inspect.signature(kind.__init__).parameters}
    changes = CHANGES.get(model_type, CHANGES.get(kind.model_type, {}))
    return kind(**{name: SIZES[name] for name in SIZES if name in names} | changes)


FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*LEFT_OUT})


class Finding(NamedTuple):
    """How one family is trained, and how far that is from transformers' own passes."""

    family: str
    form: str  # "packed", "padded" or "refused"
    reason: str = ""  # why not packed
    loss: float = 0.0  # the relative difference
    gradient: float = 0.0  # the largest of all weights, relative to its norm
    generation: bool = True  # whether greedy generation gives the same tokens
    memory: int = 0  # bytes that a dry run tells
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        return self.form == "refused" or (self.loss <= LOSS and self.gradient <= GRADIENT and self.generation)


def examine(family: str) -> Finding:
    """Compares one family with transformers. Raises what is not a refusal in one line."""
    started, config = time.perf_counter(), small_config(family)
    try:
        form = forms.choose(config, "student")
    except ConfigError as error:
        return Finding(
            family, "refused", str(error).partition("can't be trained: ")[2], seconds=time.perf_counter() - started
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    own = copy.deepcopy(model)
    student = form.build(model, "student")
    return Finding(
        family,
        student.form,
        form.problem or "",
        *compare_training(student, own),
        compare_generation(student, own),
        memory(config, form),
        time.perf_counter() - started,
    )


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "spans": [len(row) // 3, len(row)]} for row in ids]


def compare_training(student: CausalLM, own: PreTrainedModel) -> tuple[float, float]:
    """The relative differences of the loss, and of the gradient of the worst weight."""
    samples = rows()
    (batch,) = pack(samples, sum(LENGTHS))
    losses = student(
        batch,
        lambda head: fused_linear_cross_entropy(**head.arguments("student"), labels=batch.labels, reduction="sum"),
    )
    losses.backward()
    expected = sum(own_loss(own, sample) for sample in samples)
    expected.backward()
    theirs = dict(own.named_parameters())
    largest = max(float(p.grad.norm()) for p in theirs.values() if p.grad is not None)
    worst = 0.0
    for name, parameter in student.model.named_parameters():
        ours, their = (torch.zeros(()) if x.grad is None else x.grad for x in (parameter, theirs[name]))
        # A weight without influence (a key's bias) has a gradient of rounding errors alone.
        worst = max(worst, float((ours - their).norm() / their.norm().clamp(min=1e-4 * largest)))
    return abs(losses.item() - expected.item()) / abs(expected.item()), worst


def own_loss(model: PreTrainedModel, sample: dict) -> Tensor:
    ids, (start, stop) = torch.tensor(sample["input_ids"]), sample["spans"]
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return torch.nn.functional.cross_entropy(logits[start - 1 : stop - 1], ids[start:stop], reduction="sum")


@torch.no_grad()
def compare_generation(student: CausalLM, own: PreTrainedModel) -> bool:
    """Whether greedy generation gives the most probable tokens of the model's own whole forward pass."""
    prompts = [sample["input_ids"] for sample in rows()]
    settings = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    responses = sample(student, prompts, settings, [0] * len(prompts))
    for prompt, response in zip(prompts, responses, strict=True):
        read = own_logits(own, prompt, response, anew=student.longest_decoded is not None)
        # Two tokens within rounding of a tie may change places.
        chosen = read.gather(1, torch.tensor(response)[:, None])[:, 0]
        if (read.max(1).values - chosen).max() > 1e-4 * read.abs().max() or len(response) != NEW_TOKENS:
            return False
    return True


def own_logits(model: PreTrainedModel, prompt: list[int], response: list[int], anew: bool) -> Tensor:
    """The model's logits before each token of a response. anew: it reads again for each, as LongRoPE demands."""
    ids, first = prompt + response, len(prompt)
    if not anew:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1]
    ends = range(first, len(ids))
    return torch.cat([model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, -1:] for end in ends])


def memory(config: PretrainedConfig, form: forms.Form) -> int:
    """What a dry run tells: the bytes that training needs."""
    with torch.device("meta"):
        cost = costs.ModelCost(AutoModelForCausalLM.from_config(config))
    (batch,) = pack(rows(), sum(LENGTHS))
    step = costs.StepCost(cost, None, cost, False)
    parts = costs.memory(step, config, batch, TrainConfig(), torch.float32, torch.device("cpu"))
    return sum(number for _, number in parts) + int(step.flops(rows()) == 0)


def table(findings: list[Finding]) -> str:
    """The findings in Markdown."""

    def cells(found: Finding) -> tuple[str, ...]:
        if found.form == "refused":
            return found.family, found.form, found.reason, "", "", ""
        numbers = f"{found.loss:.0e}", f"{found.gradient:.0e}", "same" if found.generation else "**differs**"
        return found.family, found.form, found.reason, *numbers

    lines = ["family", "form", "why", "loss", "gradient", "greedy"], ["---"] * 6, *map(cells, findings)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; default: all, and the document is written")
    chosen = parser.parse_args().families
    transformers.utils.logging.set_verbosity_error()
    findings = []
    for family in chosen or FAMILIES:
        findings.append(examine(family))
        print(*findings[-1], sep="  ", flush=True)
    text = table(findings)
    counts = {form: sum(found.form == form for found in findings) for form in ("packed", "padded", "refused")}
    told = ", ".join(f"{count} {form}" for form, count in counts.items())
    text = f"{len(findings)} families of transformers {transformers.__version__}: {told}.\n\n{text}"
    print(text)
    if not chosen:
        begin, rest = DOCUMENT.read_text().split("<!-- families -->\n")
        _, end = rest.split("<!-- end -->")
        DOCUMENT.write_text(f"{begin}<!-- families -->\n{text}\n<!-- end -->{end}")


if __name__ == "__main__":
    main()
