"""Modules and model surgery."""

from fastattn.nn.absolute import LearnedEmbedding, SinusoidalEmbedding
from fastattn.nn.additive_attention import AdditiveAttention
from fastattn.nn.cache import DecodingCache, KVCache, LayerCache, MemoryCache
from fastattn.nn.content import DisentangledBias, ShawAttention, TransformerXLBias
from fastattn.nn.image import CosineAttention, DecomposedBias, SwinBias, SwinV2Bias
from fastattn.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.plot import plot_attention
from fastattn.nn.recording import AttentionRecord, RecordedCall, RecordingLimitError, inspect
from fastattn.nn.relative import FIRE, KERPLE, ALiBi, ClippedBias, T5Bias
from fastattn.nn.replace import ReplacementReport, replace_attention, restore_attention
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.sharing import TiedLinear, layer_groups
from fastattn.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "FIRE",
    "KERPLE",
    "ALiBi",
    "AdditiveAttention",
    "AttentionRecord",
    "ClippedBias",
    "CosineAttention",
    "DecodingCache",
    "DecomposedBias",
    "DisentangledBias",
    "KVCache",
    "LayerCache",
    "LearnedEmbedding",
    "MemoryCache",
    "MultiheadAttention",
    "RecordedCall",
    "RecordingLimitError",
    "ReplacementReport",
    "RotaryEmbedding",
    "ShawAttention",
    "SinusoidalEmbedding",
    "SwinBias",
    "SwinV2Bias",
    "T5Bias",
    "TiedLinear",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerXLBias",
    "inspect",
    "layer_groups",
    "plot_attention",
    "replace_attention",
    "restore_attention",
]
