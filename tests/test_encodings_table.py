"""The README's table of positional encodings names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastattn
from fastattn import nn, positional

README = Path(fastattn.__file__).parents[1] / "README.md"


def _rows() -> list[list[str]]:
    if not README.exists():
        pytest.skip("installed without its README")
    section = README.read_text().split("## Positional encodings")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_object_and_module_exists() -> None:
    rows = _rows()
    assert len(rows) > 10
    for _, objects, modules, *_ in rows:
        for name in re.findall(r"`([\w.]+)`", objects):
            assert hasattr(positional, name.removeprefix("positional.")) or hasattr(fastattn, name), name
        for name in re.findall(r"`(\w+)`", modules):
            assert hasattr(nn, name), name


def test_every_module_of_an_encoding_is_in_the_table() -> None:
    listed = {name for _, _, modules, *_ in _rows() for name in re.findall(r"`(\w+)`", modules)}
    others = {
        "AdditiveAttention",
        "AttentionRecord",
        "DecodingCache",
        "KVCache",
        "LayerCache",
        "MemoryCache",
        "RecordedCall",
        "RecordingLimitError",
        "TiedLinear",
        "Transformer",
        "TransformerDecoder",
        "TransformerDecoderLayer",
        "TransformerEncoder",
        "TransformerEncoderLayer",
        "inspect",
        "layer_groups",
        "plot_attention",
        "MultiheadAttention",
        "ReplacementReport",
        "replace_attention",
        "restore_attention",
    }
    assert listed == set(nn.__all__) - others


def test_exports_exist_once() -> None:
    for module in (fastattn, nn, positional):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name), name
