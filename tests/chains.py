"""A model that says what a test wants: from some tokens on it follows a chain of tokens, and it has a chat template."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.data import quickstart
from conftest import LLAMA

END_OF_TURN = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(**changes):
    """The quickstart's tokenizer with a chat template whose end of turn is not its end token."""
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END_OF_TURN]})
    tokenizer.chat_template = CHATML
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def save_chain_model(folder, tokenizer, follow, ends=None):
    """Saves a model that writes follow[t], or else t + 1, after token t, with all but certainty.

    ends: the eos_token_id of its generation_config.json.
    """
    torch.manual_seed(0)
    vocabulary = 1024
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": vocabulary, "hidden_size": 64, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in model.model.layers:  # each token's own embedding reaches the head
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.randn(vocabulary, config.hidden_size)
        model.model.embed_tokens.weight.copy_(embeddings)
        successors = [follow.get(token, (token + 1) % vocabulary) for token in range(vocabulary)]
        head = torch.zeros(vocabulary, config.hidden_size)
        head.index_add_(0, torch.tensor(successors), 2 * embeddings)
        model.lm_head.weight.copy_(head)
    if ends is not None:
        model.generation_config.eos_token_id, model.generation_config._from_model_config = ends, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
