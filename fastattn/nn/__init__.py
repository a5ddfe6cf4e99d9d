"""Modules and model surgery."""

from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.replace import ReplacementReport, replace_attention, restore_attention
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "MultiheadAttention",
    "ReplacementReport",
    "RotaryEmbedding",
    "replace_attention",
    "restore_attention",
]
