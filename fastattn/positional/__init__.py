"""Positional encodings by name: pure functions that make tables, and the objects that `fastattn.attention` takes.

`fastattn.nn` has a module with the parameters of each.  Everything here lowers to what the kernels know already: a
distance table, rotary tables, a dense bias, or columns appended to queries and keys.
"""

from fastattn.positional.content import ContentBias
from fastattn.positional.deberta import Disentangled
from fastattn.positional.decomposed import Decomposed
from fastattn.positional.fire import FIRE
from fastattn.positional.relative import KERPLE, Sandwich
from fastattn.positional.rotary_tables import (
    axial_pairs,
    frequencies_of,
    grid_positions,
    rotary_angles,
    rotary_tables,
    section_pairs,
    xpos_scale,
)
from fastattn.positional.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RotaryScaling,
    YaRNScaling,
    rotary_frequencies,
    scaling_from_config,
)
from fastattn.positional.shaw import ShawKeys, shaw_attention
from fastattn.positional.sinusoid import sinusoidal_embedding
from fastattn.positional.transformer_xl import TransformerXL
from fastattn.positional.windows import cosine_attention, log_spaced_offsets, shifted_window_ids, window_bias

__all__ = [
    "FIRE",
    "KERPLE",
    "ContentBias",
    "Decomposed",
    "Disentangled",
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRoPEScaling",
    "NTKScaling",
    "RotaryScaling",
    "Sandwich",
    "ShawKeys",
    "TransformerXL",
    "YaRNScaling",
    "axial_pairs",
    "cosine_attention",
    "frequencies_of",
    "grid_positions",
    "log_spaced_offsets",
    "rotary_angles",
    "rotary_frequencies",
    "rotary_tables",
    "scaling_from_config",
    "section_pairs",
    "shaw_attention",
    "shifted_window_ids",
    "sinusoidal_embedding",
    "window_bias",
    "xpos_scale",
]
