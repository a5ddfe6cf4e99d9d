"""fastattn: attention for PyTorch with any positional encoding and any mask, at flash speed, on any machine."""

from fastattn.additive import additive_attention
from fastattn.biases import ALiBi, Bias, DenseBias, DistanceTable, T5Bias, alibi_slopes
from fastattn.dispatch import Explanation, UnsupportedError
from fastattn.functional import attention, backends, explain, last_call
from fastattn.masks import BoolMask, Causal, Documents, KeyLengths, Mask, PrefixLM, SlidingWindow
from fastattn.nn import inspect, plot_attention, replace_attention, restore_attention
from fastattn.positional import (
    FIRE,
    KERPLE,
    Decomposed,
    Disentangled,
    Sandwich,
    ShawKeys,
    TransformerXL,
    cosine_attention,
    shaw_attention,
)
from fastattn.rotary import Rotary
from fastattn.rotate import apply_rotary
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.softmax import masked_softmax

__all__ = [
    "FIRE",
    "KERPLE",
    "ALiBi",
    "Bias",
    "BoolMask",
    "Causal",
    "Decomposed",
    "DenseBias",
    "Disentangled",
    "DistanceTable",
    "Documents",
    "Explanation",
    "KeyLengths",
    "Mask",
    "PrefixLM",
    "Rotary",
    "Sandwich",
    "ShawKeys",
    "SlidingWindow",
    "T5Bias",
    "TransformerXL",
    "UnsupportedError",
    "__version__",
    "additive_attention",
    "alibi_slopes",
    "apply_rotary",
    "attention",
    "backends",
    "cosine_attention",
    "explain",
    "inspect",
    "last_call",
    "masked_softmax",
    "plot_attention",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
    "shaw_attention",
]


def __getattr__(name: str) -> str:
    # Read on demand: importlib.metadata costs more than the rest of this import.
    if name == "__version__":
        from importlib.metadata import version

        return version("fastattn")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
