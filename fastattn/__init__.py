"""fastattn: attention for PyTorch with any positional encoding and any mask, at flash speed, on any machine."""

from fastattn.additive import additive_attention
from fastattn.biases import ALiBi, Bias, DenseBias, DistanceTable, T5Bias, alibi_slopes
from fastattn.dispatch import Explanation, UnsupportedError
from fastattn.functional import attention, backends, explain, last_call
from fastattn.masks import BoolMask, Causal, Documents, KeyLengths, Mask, PrefixLM, SlidingWindow
from fastattn.nn import replace_attention, restore_attention
from fastattn.rotary import Rotary
from fastattn.rotate import apply_rotary
from fastattn.sdpa import scaled_dot_product_attention
from fastattn.softmax import masked_softmax

__all__ = [
    "ALiBi",
    "Bias",
    "BoolMask",
    "Causal",
    "DenseBias",
    "DistanceTable",
    "Documents",
    "Explanation",
    "KeyLengths",
    "Mask",
    "PrefixLM",
    "Rotary",
    "SlidingWindow",
    "T5Bias",
    "UnsupportedError",
    "__version__",
    "additive_attention",
    "alibi_slopes",
    "apply_rotary",
    "attention",
    "backends",
    "explain",
    "last_call",
    "masked_softmax",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> str:
    # Read on demand: importlib.metadata costs more than the rest of this import.
    if name == "__version__":
        from importlib.metadata import version

        return version("fastattn")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
