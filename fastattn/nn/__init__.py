"""Modules and model surgery."""

from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.relative import FIRE, KERPLE, ALiBi, ClippedBias, T5Bias
from fastattn.nn.replace import ReplacementReport, replace_attention, restore_attention
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "FIRE",
    "KERPLE",
    "ALiBi",
    "ClippedBias",
    "MultiheadAttention",
    "ReplacementReport",
    "RotaryEmbedding",
    "T5Bias",
    "replace_attention",
    "restore_attention",
]
