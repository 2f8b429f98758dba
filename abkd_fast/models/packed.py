"""A causal language model on packed batches, cut between its body and its output projection."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import Batch, pack
from ..errors import ConfigError, first_line
from ..losses.arguments import LinearHead
from . import attention


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product of `x` computes in, under the autocast that is in force."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class PackedCausalLM(nn.Module):
    """A causal language model on packed batches, cut between its body and its output projection.

    A call computes the loss within the module's own forward pass. Wrappers that gather or hook parameters there (FSDP,
    DDP) therefore see the output projection, too.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        """Takes a transformers model, or peft's wrapper around one, and replaces its attention.

        Raises ConfigError, with the reason, for models whose attention can't be replaced.
        """
        super().__init__()
        self.model = model
        self.key = key
        with self._explained():
            self.causal_lm.set_attn_implementation(attention.NAME)

    @property
    def has_adapter(self) -> bool:
        return not isinstance(self.model, PreTrainedModel)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model. An attached adapter lies within its projections."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def head(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    def checkpoint_layers(self) -> None:
        """Makes layers keep their inputs alone; backward computes them again, with the same dropout."""
        if not self.causal_lm.supports_gradient_checkpointing:
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"train.gradient_checkpointing: a {kind} model has none; set it to false")
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        # The line above also made the embeddings require a gradient, which only the reentrant kind needs.
        self.causal_lm.disable_input_require_grads()

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [N, H] at batch.positions."""
        states = self.run_body(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        return states[0].index_select(0, batch.positions)  # indexing would sort the positions in its backward pass

    def run_body(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, **options: Any
    ) -> Tensor:
        """Final hidden states [1, T, H] of packed tokens [1, T]. options: for the attention function."""
        lengths = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
        options |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths}
        body = self.causal_lm.base_model
        with self._without_casts() if input_ids.is_cuda else contextlib.nullcontext():
            return body(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options).last_hidden_state

    def _without_casts(self) -> contextlib.AbstractContextManager:
        """Turns a GPU's autocast off if all weights have its type.

        Results stay the same: kernels of norms and fused activations compute 16 bits in float32 and round once. Under
        autocast a norm takes four casts, of its input, its two weights and its result.
        """
        has_type = all(parameter.dtype == torch.bfloat16 for parameter in self.model.parameters())
        return torch.autocast("cuda", enabled=False) if has_type else contextlib.nullcontext()

    @property
    def layers(self) -> nn.ModuleList:
        count = self.causal_lm.config.num_hidden_layers
        stacks = (module for module in self.causal_lm.base_model.modules() if isinstance(module, nn.ModuleList))
        return next(stack for stack in stacks if len(stack) == count)

    def compile(self, **options: Any) -> None:
        """Compiles the layers for any number of tokens, with these options of torch.compile. They share one code."""
        for layer in self.layers:
            layer.compile(dynamic=True, **options)

    def forward(self, batch: Batch, loss: Callable[[LinearHead], Tensor]) -> Tensor:
        """`loss` of the hidden states at batch.positions, in the type of products, and the output projection.

        The projection has that type, too, on a CPU. On a GPU it stays as it is: the fused losses cast it themselves,
        and its gradient then keeps their float32.
        """
        hidden = self.hidden_states(batch)
        hidden = hidden.to(compute_dtype(hidden))
        weight, bias = self.head.weight, self.head.bias
        if not hidden.is_cuda:
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        return loss(LinearHead(hidden, weight, bias))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"{self.key}: a {kind} model can't be trained packed: {first_line(error)}") from None

    @torch.no_grad()
    def check(self) -> None:
        """Compares two short packed rows with the model's own padded forward pass.

        Raises ConfigError where the logits differ, or where attention was not called once a layer. So a model with
        soft-capped or scaled logits, recurrent state, or attention of its own is refused, never silently wrong.
        """
        config = self.causal_lm.config
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(config.vocab_size, (length,), generator=generator) for length in (9, 5)]
        samples = [{"input_ids": row.tolist(), "spans": [1, len(row)]} for row in rows]
        (batch,) = pack(samples, max_tokens=14)
        batch = batch.to(device)
        training = self.model.training
        self.model.eval()
        with self._explained():
            before = attention.calls
            hidden = self(batch, lambda student: student.hidden)
            calls = attention.calls - before
            packed = self.head(hidden.to(self.head.weight.dtype)).float()  # [12, V]
            padded = self._padded_logits(rows, device)
            self.model.train(training)
            if calls != config.num_hidden_layers:
                share = f"{calls} of its {config.num_hidden_layers} layers"
                raise ValueError(f"{share} use transformers' attention interface (recurrent or custom layers)")
            if packed.shape != padded.shape:
                raise ValueError(f"its output projection gives {packed.shape[1]} logits, the model {padded.shape[1]}")
            worst = ((packed - padded).abs().max() / padded.abs().max().clamp(min=1e-3)).item()
            tolerance = 2e-3 if compute_dtype(hidden) in (torch.float32, torch.float64) else 5e-2
            if not worst < tolerance:
                traits = ("final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping")
                named = [f"{name} = {value}" for name in traits if (value := getattr(config, name, None)) is not None]
                text = f"its logits differ from hidden states times output projection by {worst:.1e} relative"
                raise ValueError(f"{text} ({', '.join(named)})" if named else text)

    def _padded_logits(self, rows: list[Tensor], device: torch.device) -> Tensor:
        """The model's own logits at the positions that `pack` keeps, from a right-padded batch with a mask."""
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        self.causal_lm.set_attn_implementation("sdpa")
        try:
            logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits  # [2, longest, V]
        finally:
            self.causal_lm.set_attn_implementation(attention.NAME)
        return torch.cat([logits[i, : len(row) - 1] for i, row in enumerate(rows)]).float()

    def weights(self) -> dict[str, Tensor]:
        """The tensors to save, by the model's own names. Tied ones are left out; so are frozen ones with an adapter."""
        parameters = dict(self.model.named_parameters())
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - parameters.keys()
        frozen = {name for name, parameter in parameters.items() if self.has_adapter and not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied | frozen}

    def save(self, folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]) -> None:
        """Writes weights, configuration and tokenizer in Hugging Face layout. A LoRA model writes its adapter alone.

        weights: the result of `weights`, or a copy of it.
        """
        # Without this peft asks the Hub every time whether embeddings belong to the adapter.
        options = {"save_embedding_layers": False} if self.has_adapter else {}
        self.model.save_pretrained(folder, state_dict=weights, **options)
        tokenizer.save_pretrained(folder)
