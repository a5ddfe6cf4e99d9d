"""Modules and model surgery."""

from fastattn.nn.absolute import LearnedEmbedding, SinusoidalEmbedding
from fastattn.nn.additive_attention import AdditiveAttention
from fastattn.nn.content import DisentangledBias, ShawAttention, TransformerXLBias
from fastattn.nn.image import CosineAttention, DecomposedBias, SwinBias, SwinV2Bias
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.relative import FIRE, KERPLE, ALiBi, ClippedBias, T5Bias
from fastattn.nn.replace import ReplacementReport, replace_attention, restore_attention
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "FIRE",
    "KERPLE",
    "ALiBi",
    "AdditiveAttention",
    "ClippedBias",
    "CosineAttention",
    "DecomposedBias",
    "DisentangledBias",
    "LearnedEmbedding",
    "MultiheadAttention",
    "ReplacementReport",
    "RotaryEmbedding",
    "ShawAttention",
    "SinusoidalEmbedding",
    "SwinBias",
    "SwinV2Bias",
    "T5Bias",
    "TransformerXLBias",
    "replace_attention",
    "restore_attention",
]
