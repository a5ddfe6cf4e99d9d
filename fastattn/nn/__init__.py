"""Modules and model surgery."""

from fastattn.nn.additive_attention import AdditiveAttention
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.replace import ReplacementReport, replace_attention, restore_attention

__all__ = ["AdditiveAttention", "MultiheadAttention", "ReplacementReport", "replace_attention", "restore_attention"]
