"""Distill language models with the alpha-beta divergence, fast. See README.md."""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "losses.divergences": """
        AKL AlphaBeta AlphaDivergence AlphaNet BDKD ForwardKL Hellinger JensenShannon ReverseKL SkewForwardKL
        SkewReverseKL TotalVariation WSD parse
    """,
    "losses.row_ops": "build_info",
    "losses.logits": "divergence_loss",
    "generation.sampling": "SamplingParams sample sample_mixture",
    "losses.fused_linear": "fused_linear_cross_entropy fused_linear_divergence",
    "losses.policy_gradient": "fused_linear_policy_gradient",
    "losses.top_k": "fused_linear_top_k",
    "api": "Result distill",
}
_RENAMED = {"SamplingSettings": "SamplingParams"}  # earlier names, which scripts may have
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted({*_HOME, *_RENAMED})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Public names load on first use, so that `python -m abkd_fast.train --help` need not wait for PyTorch."""
    name = _RENAMED.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module 'abkd_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"abkd_fast.{_HOME[name]}"), name)
