"""A causal language model, cut between its body and its output projection. `packed.py` and `padded.py` run the body."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.batches import Batch, pack
from ..errors import ConfigError, first_line
from ..losses.arguments import LinearHead, LogitMap
from . import quantized
from .attention import recomputation
from .experts import Experts

if TYPE_CHECKING:
    from .wrappers import Wrapper


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product of `x` computes in, under the autocast that is in force."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class CausalLM(nn.Module):
    """A causal language model, cut between its body and its output projection.

    A call computes the loss within the module's own forward pass. Wrappers that gather or hook parameters there (FSDP,
    DDP) therefore see the output projection, too.
    """

    form: ClassVar[str]  # "packed" or "padded"
    tolerance: float | None = None  # of `check`, for weights whose rounding depends on the batch
    can_compile = True

    def __init__(self, model: nn.Module, key: str, logit_map: LogitMap = LogitMap()) -> None:  # noqa: B008 - a tuple
        """Takes a transformers model, or peft's wrapper around one. logit_map: what follows its output projection."""
        super().__init__()
        self.model, self.key, self.logit_map = model, key, logit_map
        self.experts: Experts | None = None  # those of a student that is a mixture
        self.wrapper: Wrapper | None = None  # the multimodal model that it is a part of; for saving
        self.entry: Callable[..., object] | None = None  # runs the model by way of what wraps it; None: nothing does
        self.longest_decoded = rope_border(model)  # tokens of a sequence whose keys stay as they are; None: any number

    @property
    def saved_model(self) -> nn.Module:
        """What is saved: the model, the multimodal model around it, or peft's wrapper around either."""
        return self.wrapper.model if self.wrapper else self.model

    @property
    def has_adapter(self) -> bool:
        return not isinstance(self.saved_model, PreTrainedModel)

    @property
    def adapter_rank(self) -> int | None:
        return self.saved_model.peft_config["default"].r if self.has_adapter else None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model. An attached adapter lies within its projections."""
        return self.model if isinstance(self.model, PreTrainedModel) else self.model.get_base_model()

    @property
    def head(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the body, in their order."""
        found: list[nn.Module] = []
        for module in self.causal_lm.modules():
            is_layer = isinstance(module, GradientCheckpointingLayer)
            if is_layer and not any(module in {*layer.modules()} for layer in found):
                found.append(module)
        return found or _longest_stack(self.causal_lm)

    def checkpoint_layers(self) -> None:
        """Makes layers keep their inputs alone; backward computes them again, with the same dropout."""
        if not self.causal_lm.supports_gradient_checkpointing:
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"train.gradient_checkpointing: a {kind} model has none; set it to false")
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputation})
        # The line above also made the embeddings require a gradient, which only the reentrant kind needs.
        self.causal_lm.disable_input_require_grads()

    def compile(self, **options: Any) -> None:
        """Compiles the layers for any number of tokens, with these options of torch.compile. They share one code."""
        for layer in self.layers:
            layer.compile(dynamic=True, **options)

    def hidden_states(self, batch: Batch) -> Tensor:
        """What the output projection reads [N, H] at batch.positions."""
        raise NotImplementedError

    def run(self, is_token: Tensor | None = None, **inputs: Any) -> Tensor:
        """What the output projection reads [B, L, H]: the model's own forward pass without that product.

        is_token: [B, L], 0 at padding, else 1; None: there is no padding. In training it decides which tokens the
        experts count.
        """
        kept, given = [], self.head.__dict__.get("forward")

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden[..., :1]  # what follows the projection, such as a softcap, is applied by the losses

        self.head.forward = keep
        try:
            with self._without_casts() if self.head.weight.is_cuda else contextlib.nullcontext():
                if self.experts and self.model.training and torch.is_grad_enabled():
                    self.experts.run(self.entry or self.causal_lm, is_token, inputs)
                else:
                    (self.entry or self.causal_lm)(use_cache=False, **inputs)
        finally:
            del self.head.forward
            if given is not None:
                self.head.forward = given
        if len(kept) != 1:
            raise ValueError(f"its forward pass calls its output projection {len(kept)} times, expected once")
        return kept[0]

    def _without_casts(self) -> contextlib.AbstractContextManager:
        """Turns a GPU's autocast off if all weights have its type.

        Results stay the same: kernels of norms and fused activations compute 16 bits in float32 and round once. Under
        autocast a norm takes four casts, of its input, its two weights and its result.
        """
        has_type = all(parameter.dtype == torch.bfloat16 for parameter in self.model.parameters())
        return torch.autocast("cuda", enabled=False) if has_type else contextlib.nullcontext()

    def forward(self, batch: Batch, loss: Callable[[LinearHead], Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """`loss` of the hidden states at batch.positions, in the type of products, and the output projection.

        The projection has that type, too, on a CPU. On a GPU it stays as it is: the fused losses cast it themselves,
        and its gradient then keeps their float32.

        In training with an auxiliary loss of routers the result is a pair, `loss` and this loss before its factor, for
        the micro-batch's share of the step's tokens.
        """
        value = loss(self.linear_head(self.hidden_states(batch)))
        router_loss = self.experts.take_loss() if self.experts else None
        return value if router_loss is None else (value, router_loss * (batch.token_share / batch.tokens))

    def linear_head(self, hidden: Tensor) -> LinearHead:
        """What a loss reads: hidden states [N, H] in the type of products, and the output projection."""
        hidden = hidden.to(compute_dtype(hidden))
        weight, bias = self.head.weight, self.head.bias
        if not hidden.is_cuda:
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        return LinearHead(hidden, weight, bias, self.logit_map)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Errors become a ConfigError that names the model."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of many kinds: models have code of their own
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"{self.key}: a {kind} model can't be trained {self.form}: {first_line(error)}") from None

    @torch.no_grad()
    def check(self, lengths: tuple[int, ...] = (9, 5)) -> None:
        """Compares the logits of short rows with those of the model's own forward pass, row by row.

        Raises ConfigError where they differ, and for weights that are not finite. So no model is silently wrong.
        """
        self._check_weights()
        training = self.model.training
        self.model.eval()
        with self.explained():
            difference, dtype = self.difference(lengths)
            self.model.train(training)
            if math.isnan(difference):
                raise ValueError("its logits are not finite, although its weights are")
            tolerance = self.tolerance or (2e-3 if dtype in (torch.float32, torch.float64) else 5e-2)
            if not difference < tolerance:
                raise ValueError(f"its logits differ from those of its own forward pass by {difference:.1e} relative")

    def _check_weights(self) -> None:
        """Raises ConfigError where they are not finite. Quantized ones are left out: 8 bits may have no infinity."""
        named = [(name, p.detach()) for name, p in self.model.named_parameters() if not p.is_meta]
        wide = {name: p for name, p in named if p.is_floating_point() and p.itemsize > 1}
        if not get_total_norm(wide.values(), math.inf).isfinite():
            name = next(name for name, p in wide.items() if not p.isfinite().all())
            raise ConfigError(f"{self.key}: weights of {name} are not finite: get the model again")

    def difference(self, lengths: tuple[int, ...]) -> tuple[float, torch.dtype]:
        """The largest difference between the logits of rows of these lengths and the model's own, relative to the
        largest logit; and the type of the hidden states."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.causal_lm.config.vocab_size
        rows = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
        samples = [{"input_ids": row.tolist(), "spans": [1, len(row)]} for row in rows]
        device = self.head.weight.device
        (batch,) = pack(samples, max_tokens=sum(lengths))
        hidden = self(batch.to(device), lambda student: student.hidden)
        head = self.head
        ours = self.logit_map(F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)).float()
        own = self.own_logits([row.to(device) for row in rows])
        if ours.shape != own.shape:
            raise ValueError(f"its output projection gives {ours.shape[1]} logits, the model {own.shape[1]}")
        return ((ours - own).abs().max() / own.abs().max().clamp(min=1e-3)).item(), hidden.dtype

    def own_logits(self, rows: list[Tensor]) -> Tensor:
        """The logits of the model's own forward pass on each row alone, without those after its last token."""
        with self.own_attention():
            logits = [self.model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows]
        return torch.cat(logits).float()

    def own_attention(self) -> contextlib.AbstractContextManager:
        """A context in which the model computes its attention as transformers defines it."""
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """The tensors to save, by the names of the model that is saved.

        Tied ones are left out; so are frozen ones with an adapter.
        """
        parameters = dict(self.model.named_parameters())
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - parameters.keys()
        frozen = {name for name, parameter in parameters.items() if self.has_adapter and not parameter.requires_grad}
        saved = parameters.keys() | {name for name, _ in self.model.named_buffers()}  # not what quantized layers add
        left_out = tied | frozen
        state = self.model.state_dict()
        kept = {name: tensor for name, tensor in state.items() if name in saved and name not in left_out}
        return {self.wrapper.names[name]: tensor for name, tensor in kept.items()} if self.wrapper else kept

    def save(self, folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]) -> None:
        """Writes weights, configuration and tokenizer in Hugging Face layout. A LoRA model writes its adapter alone.

        weights: the result of `weights`, or a copy of it.
        """
        if self.has_adapter:
            # Without the option peft asks the Hub every time whether embeddings belong to the adapter.
            self.saved_model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
            base = self.saved_model.get_base_model()
            quantized.save_settings(base, folder)
            base.generation_config.save_pretrained(folder)  # with the ends of responses; peft leaves it out
        elif self.wrapper:
            self.wrapper.save(folder, weights)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def long_ropes(model: nn.Module) -> list[nn.Module]:
    """The modules of LongRoPE: they rotate the keys of longer sequences differently, from their first token on."""
    return [module for module in model.modules() if getattr(module, "rope_type", None) == "longrope"]


def original_length(rope: nn.Module) -> int:
    """How many tokens a sequence may have that LongRoPE counts as short."""
    return rope.config.rope_parameters["original_max_position_embeddings"]


def rope_border(model: nn.Module) -> int | None:
    """How many tokens a sequence may have that a model counts as short; None where there is no such border."""
    return min(map(original_length, long_ropes(model)), default=None)


def _longest_stack(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that does not mark them: its list of modules with the most weights."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=()))
