"""Bad input: each row raises the stated error, which names the argument, what was expected and what came."""

# A row of the table is a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import (
    ALiBi,
    BoolMask,
    Causal,
    DenseBias,
    DistanceTable,
    Documents,
    KeyLengths,
    PrefixLM,
    Rotary,
    SlidingWindow,
    T5Bias,
    alibi_slopes,
)

B, H, HK, SQ, SK, D = 2, 4, 2, 5, 7, 8


def _inputs() -> SimpleNamespace:
    """Fresh valid tensors, for a row to spoil."""
    torch.manual_seed(0)
    return SimpleNamespace(
        q=torch.randn(B, H, SQ, D),
        k=torch.randn(B, HK, SK, D),
        v=torch.randn(B, HK, SK, D),
        cos=torch.ones(16, D // 2),
        sin=torch.zeros(16, D // 2),
        ids=torch.zeros(B, SQ, dtype=torch.int64),
        lengths=torch.tensor([3, 7]),
    )


def _call(x: SimpleNamespace, **keywords: Any) -> Tensor:
    return fastattn.attention(x.q, x.k, x.v, backend=x.backend, **keywords)


def _qkv(x: SimpleNamespace, q: Any = None, k: Any = None, v: Any = None) -> Tensor:
    q, k, v = (given if given is not None else have for given, have in ((q, x.q), (k, x.k), (v, x.v)))
    return fastattn.attention(q, k, v, backend=x.backend)


def _float8(x: SimpleNamespace, dtype: torch.dtype = torch.float8_e4m3fn, **keywords: Any) -> Tensor:
    return fastattn.attention(*(t.to(dtype) for t in (x.q, x.k, x.v)), backend=x.backend, **keywords)


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(B, H, SQ, D), 0.1, 0, torch.qint8)


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(H, SQ, D), torch.zeros(H, 2, D)])


META = torch.device("meta")
FLOAT8 = torch.float8_e4m3fn
ones = torch.ones
Row = tuple[str, Callable[[SimpleNamespace], object], type[Exception], str, str, str]

# name, call, exception, argument named, what was expected, what came
ROWS: list[Row] = [
    # query, key, value
    ("query of rank 3", lambda x: _qkv(x, q=x.q[0]), ValueError, "query", "four dimensions", r"\(4, 5, 8\)"),
    ("query of rank 5", lambda x: _qkv(x, q=x.q[None]), ValueError, "query", "four dimensions", r"\(1, 2, 4, 5, 8\)"),
    ("key of rank 2", lambda x: _qkv(x, k=x.k[0, 0]), ValueError, "key", "four dimensions", r"\(7, 8\)"),
    ("value of rank 0", lambda x: _qkv(x, v=x.v.sum()), ValueError, "value", "four dimensions", r"\(\)"),
    ("query a list", lambda x: _qkv(x, q=[1.0]), TypeError, "query", "torch.Tensor", "list"),
    ("mask a string", lambda x: _call(x, mask="causal"), TypeError, "mask", "BoolMask", "str 'causal'"),
    ("key a numpy array", lambda x: _qkv(x, k=x.k.numpy()), TypeError, "key", "torch.Tensor", "ndarray"),
    ("value a string", lambda x: _qkv(x, v="v"), TypeError, "value", "torch.Tensor", "'v'"),
    ("integer query", lambda x: _qkv(x, q=x.q.long()), TypeError, "query", "float32", "int64"),
    ("bool key", lambda x: _qkv(x, k=x.k > 0), TypeError, "key", "float32", "bool"),
    ("complex value", lambda x: _qkv(x, v=x.v + 0j), TypeError, "value", "float32", "complex64"),
    ("float8 query", lambda x: _qkv(x, q=x.q.to(FLOAT8)), TypeError, "key", "float8_e4m3fn like another", "float32"),
    ("float8 key", lambda x: _qkv(x, k=x.k.to(FLOAT8)), TypeError, "query", "float8_e4m3fn like another", "float32"),
    ("float8 query and key", lambda x: _qkv(x, q=x.q.to(FLOAT8), k=x.k.to(FLOAT8)), TypeError, "value", "float8_e4m3fn", "float32"),
    ("float8 of five bits", lambda x: _float8(x, torch.float8_e5m2), TypeError, "query", "bfloat16", "float8_e5m2"),
    ("float8 elsewhere", lambda x: _qkv(x, q=x.q.to(FLOAT8), k=x.k.to(FLOAT8).to(META), v=x.v.to(FLOAT8)), ValueError, "key", "like query", "meta"),
    ("float8 of another batch", lambda x: _qkv(x, q=x.q.to(FLOAT8), k=x.k[:1].to(FLOAT8), v=x.v.to(FLOAT8)), ValueError, "key", "batch size 2", "1, 2, 7, 8"),
    ("float8 with a gradient", lambda x: _qkv(x, q=x.q.to(FLOAT8), k=x.k.to(FLOAT8).requires_grad_(), v=x.v.to(FLOAT8)), NotImplementedError,
     "key", "no gradient", "float8"),
    ("scale for float32", lambda x: _call(x, key_scale=ones(2)), TypeError, "key_scale", "None, as .*float8_e4m3fn", "float32"),
    ("query_scale for other heads", lambda x: _float8(x, query_scale=ones(2)), ValueError, "query_scale", r"\(4,\) or \(2, 4\)", r"\(2,\)"),
    ("key_scale for query heads", lambda x: _float8(x, key_scale=ones(2, 4)), ValueError, "key_scale", r"\(2,\) or \(2, 2\)", r"\(2, 4\)"),
    ("value_scale of rank 0", lambda x: _float8(x, value_scale=torch.tensor(1.0)), ValueError, "value_scale", r"\(2,\)", r"\(\)"),
    ("value_scale a number", lambda x: _float8(x, value_scale=0.5), TypeError, "value_scale", "torch.Tensor", "0.5"),
    ("query_scale of halves", lambda x: _float8(x, query_scale=ones(4).half()), TypeError, "query_scale", "float32", "float16"),
    ("key_scale elsewhere", lambda x: _float8(x, key_scale=ones(2, device=META)), ValueError, "key_scale", "like query", "meta"),
    ("key_scale negative", lambda x: _float8(x, key_scale=torch.tensor([1.0, -2.0])), ValueError, "key_scale", ">= 0", "-2"),
    ("value_scale nan", lambda x: _float8(x, value_scale=torch.tensor([1.0, float("nan")])), ValueError, "value_scale", "finite", "nan"),
    ("query_scale infinite", lambda x: _float8(x, query_scale=ones(4) / 0), ValueError, "query_scale", "finite", "inf"),
    ("value_scale with a gradient", lambda x: _float8(x, value_scale=ones(2).requires_grad_()), NotImplementedError, "value_scale", "no gradient", "float32"),
    ("float8 and a bad mask", lambda x: _float8(x, mask=KeyLengths(x.lengths + 1)), ValueError, "KeyLengths.lengths", r"\[0, 7\]", r"\[4, 8\]"),
    ("float8 and a bad bias", lambda x: _float8(x, bias=ALiBi(ones(3))), ValueError, "ALiBi.slopes", r"\(4,\)", r"\(3,\)"),
    ("float8 and no dropout_p", lambda x: _float8(x, dropout_p=None), TypeError, "dropout_p", "a number", "None"),
    ("float8 and a bad scale", lambda x: _float8(x, scale="1"), TypeError, "scale", "a number", "'1'"),
    ("float8 and a bad sink", lambda x: _float8(x, sink=ones(3)), ValueError, "sink", r"\(4,\)", r"\(3,\)"),
    ("float8 and a bad backend", lambda x: fastattn.attention(*(t.to(FLOAT8) for t in (x.q, x.k, x.v)), backend="fpga"), ValueError,
     "backend", "reference", "'fpga'"),
    ("key of another dtype", lambda x: _qkv(x, k=x.k.double()), TypeError, "key", "float32 like query", "float64"),
    ("value of another dtype", lambda x: _qkv(x, v=x.v.half()), TypeError, "value", "float32 like query", "float16"),
    ("key on another device", lambda x: _qkv(x, k=x.k.to(META)), ValueError, "key", "like query", "meta"),
    ("value on another device", lambda x: _qkv(x, v=x.v.to(META)), ValueError, "value", "like query", "meta"),
    ("sparse query", lambda x: _qkv(x, q=x.q.to_sparse()), NotImplementedError, "query", "dense", "sparse"),
    ("csr value", lambda x: _qkv(x, v=x.v[0, 0].to_sparse_csr()), NotImplementedError, "value", "dense", "sparse_csr"),
    ("quantized query", lambda x: _qkv(x, q=_quantized()), NotImplementedError, "query", "dequantize", "qint8"),
    ("nested query", lambda x: _qkv(x, q=_nested()), NotImplementedError, "query", "KeyLengths", "nested"),
    ("nested key", lambda x: _qkv(x, k=_nested()), NotImplementedError, "key", "KeyLengths", "nested"),
    ("key of another batch", lambda x: _qkv(x, k=x.k[:1]), ValueError, "key", "batch size 2", r"\(1, 2, 7, 8\)"),
    ("value of another batch", lambda x: _qkv(x, v=x.v[:1]), ValueError, "value", "batch size 2", r"\(1, 2, 7, 8\)"),
    ("head dimensions differ", lambda x: _qkv(x, k=x.k[..., :6]), ValueError, "key", "dimension 8", r"\(2, 2, 7, 6\)"),
    ("value too short", lambda x: _qkv(x, v=x.v[:, :, :6]), ValueError, "value", r"\(2, 7\) like key", r"\(2, 2, 6, 8\)"),
    ("value with other heads", lambda x: _qkv(x, v=x.v[:, :1]), ValueError, "value", r"\(2, 7\)", r"\(2, 1, 7, 8\)"),
    ("heads not a multiple", lambda x: _qkv(x, q=x.q[:, :3]), ValueError, "query", "multiple of key's 2", r"\(2, 3, 5, 8\)"),
    ("more key heads than query heads", lambda x: _qkv(x, q=x.q[:, :1]), ValueError, "query", "multiple", r"\(2, 1,"),
    ("no key heads", lambda x: _qkv(x, k=x.k[:, :0], v=x.v[:, :0]), ValueError, "query", "multiple of key's 0", "2, 4, 5"),
    # numbers
    ("scale nan", lambda x: _call(x, scale=float("nan")), ValueError, "scale", "finite", "nan"),
    ("scale infinite", lambda x: _call(x, scale=float("inf")), ValueError, "scale", "finite", "inf"),
    ("scale a string", lambda x: _call(x, scale="1"), TypeError, "scale", "a number", "'1'"),
    ("scale a tensor", lambda x: _call(x, scale=ones(2)), TypeError, "scale", "a number", "tensor"),
    ("scale a bool", lambda x: _call(x, scale=True), TypeError, "scale", "a number", "bool"),
    ("softcap 0", lambda x: _call(x, softcap=0), ValueError, "softcap", "> 0", "0"),
    ("softcap negative", lambda x: _call(x, softcap=-3.0), ValueError, "softcap", "> 0", "-3"),
    ("softcap infinite", lambda x: _call(x, softcap=float("inf")), ValueError, "softcap", "finite", "inf"),
    ("softcap a list", lambda x: _call(x, softcap=[30.0]), TypeError, "softcap", "a number", "list"),
    ("dropout_p negative", lambda x: _call(x, dropout_p=-0.1), ValueError, "dropout_p", r"\[0, 1\]", "-0.1"),
    ("dropout_p above 1", lambda x: _call(x, dropout_p=1.5), ValueError, "dropout_p", r"\[0, 1\]", "1.5"),
    ("dropout_p nan", lambda x: _call(x, dropout_p=float("nan")), ValueError, "dropout_p", "finite", "nan"),
    ("dropout_p a string", lambda x: _call(x, dropout_p="0.1"), TypeError, "dropout_p", "a number", "'0.1'"),
    ("dropout_p None", lambda x: _call(x, dropout_p=None), TypeError, "dropout_p", "a number", "None"),
    ("query_offset a float", lambda x: _call(x, query_offset=2.0), TypeError, "query_offset", "an int", "2.0"),
    ("query_offset a bool", lambda x: _call(x, query_offset=True), TypeError, "query_offset", "an int", "bool"),
    ("query_offset a float tensor", lambda x: _call(x, query_offset=ones(B)), TypeError, "query_offset", "integer", "float32"),
    ("query_offset of another shape", lambda x: _call(x, query_offset=x.ids[0]), ValueError, "query_offset", r"\(2,\)", r"\(5,\)"),
    ("query_offset 0-dimensional", lambda x: _call(x, query_offset=torch.tensor(2)), ValueError, "query_offset", r"\(2,\)", r"\(\)"),
    ("query_offset elsewhere", lambda x: _call(x, query_offset=x.lengths.to(META)), ValueError, "query_offset", "like query", "meta"),
    ("unknown backend", lambda x: fastattn.attention(x.q, x.k, x.v, backend="fpga"), ValueError, "backend", "reference", "'fpga'"),
    # sink
    ("sink of another shape", lambda x: _call(x, sink=ones(3)), ValueError, "sink", r"\(4,\) or \(2, 4\)", r"\(3,\)"),
    ("sink an int tensor", lambda x: _call(x, sink=ones(4).long()), TypeError, "sink", "float32", "int64"),
    ("sink a number", lambda x: _call(x, sink=1.0), TypeError, "sink", "torch.Tensor", "1.0"),
    ("sink elsewhere", lambda x: _call(x, sink=ones(4, device=META)), ValueError, "sink", "like query", "meta"),
    # masks
    ("mask a tensor", lambda x: _call(x, mask=ones(SQ, SK).bool()), TypeError, "mask", "BoolMask", "tensor"),
    ("mask a bias", lambda x: _call(x, mask=DenseBias(ones(SQ, SK))), TypeError, "mask", "mask", "DenseBias"),
    ("mask the class", lambda x: _call(x, mask=Causal), TypeError, "mask", "mask", "Causal"),
    ("window negative left", lambda x: SlidingWindow(-1, 0), ValueError, "SlidingWindow.left", ">= 0", "-1"),
    ("window negative right", lambda x: SlidingWindow(0, -2), ValueError, "SlidingWindow.right", ">= 0", "-2"),
    ("window a float", lambda x: SlidingWindow(1.5, 0), TypeError, "SlidingWindow.left", "an int", "1.5"),
    ("window a bool", lambda x: SlidingWindow(1, True), TypeError, "SlidingWindow.right", "an int", "bool"),
    ("lengths a list", lambda x: KeyLengths([3, 7]), TypeError, "KeyLengths.lengths", "torch.Tensor", "list"),
    ("lengths float", lambda x: KeyLengths(ones(2)), TypeError, "KeyLengths.lengths", "integer", "float32"),
    ("lengths bool", lambda x: KeyLengths(ones(2).bool()), TypeError, "KeyLengths.lengths", "integer", "bool"),
    ("lengths of rank 2", lambda x: KeyLengths(x.ids), ValueError, "KeyLengths.lengths", r"\(B,\)", r"\(2, 5\)"),
    ("lengths of another batch", lambda x: _call(x, mask=KeyLengths(x.ids[0])), ValueError, "KeyLengths.lengths", r"\(2,\)", r"\(5,\)"),
    ("lengths past Sk", lambda x: _call(x, mask=KeyLengths(x.lengths + 1)), ValueError, "KeyLengths.lengths", r"\[0, 7\]", r"\[4, 8\]"),
    ("lengths negative", lambda x: _call(x, mask=KeyLengths(x.lengths - 4)), ValueError, "KeyLengths.lengths", r"\[0, 7\]", r"\[-1, 3\]"),
    ("lengths elsewhere", lambda x: _call(x, mask=KeyLengths(x.lengths.to(META))), ValueError, "KeyLengths.lengths", "like query", "meta"),
    ("prefix negative", lambda x: _call(x, mask=PrefixLM(x.lengths - 4)), ValueError, "PrefixLM.prefix_lengths", ">= 0", r"\[-1, 3\]"),
    ("prefix float", lambda x: PrefixLM(ones(2)), TypeError, "PrefixLM.prefix_lengths", "integer", "float32"),
    ("prefix of another batch", lambda x: _call(x, mask=PrefixLM(x.lengths[:1])), ValueError, "PrefixLM.prefix_lengths", r"\(2,\)", r"\(1,\)"),
    ("documents float", lambda x: Documents(x.ids.float()), TypeError, "Documents.query_ids", "integer", "float32"),
    ("documents of rank 3", lambda x: Documents(x.ids[None]), ValueError, "Documents.query_ids", r"\(B, S\)", r"\(1, 2, 5\)"),
    ("documents without key ids", lambda x: _call(x, mask=Documents(x.ids)), ValueError, "Documents.key_ids", r"\(2, 7\)", r"\(2, 5\)"),
    ("document keys of another length", lambda x: _call(x, mask=Documents(x.ids, x.ids)), ValueError, "Documents.key_ids", r"\(2, 7\)", r"\(2, 5\)"),
    ("document queries of another length", lambda x: _call(x, mask=Documents(x.ids[:, :3], ones(B, SK).long())), ValueError,
     "Documents.query_ids", r"\(2, 5\)", r"\(2, 3\)"),
    ("bool mask of floats", lambda x: BoolMask(ones(SQ, SK)), TypeError, "BoolMask.tensor", "DenseBias", "float32"),
    ("bool mask a list", lambda x: BoolMask([True]), TypeError, "BoolMask.tensor", "torch.Tensor", "list"),
    ("bool mask of another length", lambda x: _call(x, mask=BoolMask(ones(SQ, SQ).bool())), ValueError, "BoolMask.tensor", r"\(2, 4, 5, 7\)", r"1, 5, 5"),
    ("bool mask of rank 5", lambda x: _call(x, mask=BoolMask(ones(1, 1, 1, 1, 1).bool())), ValueError, "BoolMask.tensor", "at most 4", "1, 1, 1, 1, 1"),
    ("bool mask of another batch", lambda x: _call(x, mask=BoolMask(ones(3, 1, 1, 1).bool())), ValueError, "BoolMask.tensor", "broadcast", r"\(3, 1, 1, 1\)"),
    ("bool mask elsewhere", lambda x: _call(x, mask=BoolMask(ones(1, device=META).bool())), ValueError, "BoolMask.tensor", "like query", "meta"),
    ("one bad mask of two", lambda x: _call(x, mask=Causal() & KeyLengths(x.lengths + 1)), ValueError, "KeyLengths.lengths", r"\[0, 7\]", r"\[4, 8\]"),
    # biases
    ("bias a tensor", lambda x: _call(x, bias=ones(SQ, SK)), TypeError, "bias", "DenseBias", "tensor"),
    ("bias a mask", lambda x: _call(x, bias=Causal()), TypeError, "bias", "bias", "Causal"),
    ("dense bias of ints", lambda x: DenseBias(x.ids), TypeError, "DenseBias.tensor", "float32", "int64"),
    ("dense bias of bools", lambda x: DenseBias(ones(1).bool()), TypeError, "DenseBias.tensor", "float32", "bool"),
    ("dense bias a number", lambda x: DenseBias(1.0), TypeError, "DenseBias.tensor", "torch.Tensor", "1.0"),
    ("dense bias not broadcastable", lambda x: _call(x, bias=DenseBias(ones(3, 1, 1))), ValueError, "DenseBias.tensor", r"\(2, 4, 5, 7\)", "3, 1, 1"),
    ("dense bias too many keys", lambda x: _call(x, bias=DenseBias(ones(SQ, SK + 1))), ValueError, "DenseBias.tensor", "broadcast", "5, 8"),
    ("dense bias of rank 5", lambda x: _call(x, bias=DenseBias(ones(1, 1, 1, 1, 1))), ValueError, "DenseBias.tensor", "at most 4", "1, 1, 1, 1, 1"),
    ("dense bias elsewhere", lambda x: _call(x, bias=DenseBias(ones(1, device=META))), ValueError, "DenseBias.tensor", "like query", "meta"),
    ("sparse dense bias", lambda x: DenseBias(ones(2, 2).to_sparse()), NotImplementedError, "DenseBias.tensor", "dense", "sparse"),
    ("slopes for other heads", lambda x: _call(x, bias=ALiBi(ones(HK))), ValueError, "ALiBi.slopes", r"\(4,\) or \(2, 4\)", r"\(2,\)"),
    ("slopes of rank 3", lambda x: ALiBi(ones(1, 1, H)), ValueError, "ALiBi.slopes", r"\(Hq,\)", r"\(1, 1, 4\)"),
    ("slopes of ints", lambda x: ALiBi(ones(H).int()), TypeError, "ALiBi.slopes", "float32", "int32"),
    ("slopes for no heads", lambda x: alibi_slopes(0), ValueError, "num_heads", ">= 1", "0"),
    ("slopes for half a head", lambda x: alibi_slopes(2.5), TypeError, "num_heads", "an int", "2.5"),
    ("table of rank 1", lambda x: DistanceTable(ones(9)), ValueError, "DistanceTable.table", r"\(Hq, T\)", r"\(9,\)"),
    ("table without columns", lambda x: DistanceTable(ones(H, 0), left=0), ValueError, "DistanceTable.table", "T >= 1", r"\(4, 0\)"),
    ("even table without left", lambda x: DistanceTable(ones(H, 8)), ValueError, "DistanceTable.table", "odd", r"\(4, 8\)"),
    ("table left past its columns", lambda x: DistanceTable(ones(H, 8), left=8), ValueError, "DistanceTable.left", "< 8", "8"),
    ("table left negative", lambda x: DistanceTable(ones(H, 8), left=-1), ValueError, "DistanceTable.left", ">= 0", "-1"),
    ("table left a float", lambda x: DistanceTable(ones(H, 8), left=4.0), TypeError, "DistanceTable.left", "an int", "4.0"),
    ("table for other heads", lambda x: _call(x, bias=DistanceTable(ones(3, 9))), ValueError, "DistanceTable.table", r"\(4, 9\)", r"\(3, 9\)"),
    ("table of ints", lambda x: DistanceTable(ones(H, 9).long()), TypeError, "DistanceTable.table", "float32", "int64"),
    ("t5 weight of rank 1", lambda x: T5Bias(ones(32)), ValueError, "T5Bias.weight", "num_buckets, Hq", r"\(32,\)"),
    ("t5 odd buckets", lambda x: T5Bias(ones(31, H)), ValueError, "T5Bias.weight", "even number", r"\(31, 4\)"),
    ("t5 too few buckets", lambda x: T5Bias(ones(1, H), bidirectional=False), ValueError, "T5Bias.weight", "at least 2", r"\(1, 4\)"),
    ("t5 max_distance too small", lambda x: T5Bias(ones(32, H), max_distance=8), ValueError, "T5Bias.max_distance", ">= 9", "8"),
    ("t5 max_distance a float", lambda x: T5Bias(ones(32, H), max_distance=128.0), TypeError, "T5Bias.max_distance", "an int", "128.0"),
    ("t5 bidirectional an int", lambda x: T5Bias(ones(32, H), 1), TypeError, "T5Bias.bidirectional", "a bool", "1"),
    ("t5 for other heads", lambda x: _call(x, bias=T5Bias(ones(32, 3))), ValueError, "T5Bias.weight", r"\(32, 4\)", r"\(32, 3\)"),
    ("one bad bias of two", lambda x: _call(x, bias=DenseBias(ones(1)) + ALiBi(ones(3))), ValueError, "ALiBi.slopes", r"\(4,\)", r"\(3,\)"),
    # rotary
    ("rotary a tuple", lambda x: _call(x, rotary=(x.cos, x.sin)), TypeError, "rotary", "fastattn.Rotary", "tuple"),
    ("cos of rank 1", lambda x: Rotary(x.cos[0], x.sin[0]), ValueError, "Rotary.cos", r"\(P, R/2\)", r"\(4,\)"),
    ("cos of ints", lambda x: Rotary(x.cos.long(), x.sin), TypeError, "Rotary.cos", "float32", "int64"),
    ("sin a list", lambda x: Rotary(x.cos, [0.0]), TypeError, "Rotary.sin", "torch.Tensor", "list"),
    ("sin unlike cos", lambda x: Rotary(x.cos, x.sin[:3]), ValueError, "Rotary.sin", r"\(1, 16, 4\)", r"\(1, 3, 4\)"),
    ("key_cos alone", lambda x: Rotary(x.cos, x.sin, key_cos=x.cos), ValueError, "Rotary.key_cos, key_sin", "both or neither", "one"),
    ("key tables of another width", lambda x: Rotary(x.cos, x.sin, key_cos=x.cos[:, :2], key_sin=x.sin[:, :2]), ValueError,
     "Rotary.key_cos", "4 columns", r"16, 2\)"),
    ("interleaved an int", lambda x: Rotary(x.cos, x.sin, 1), TypeError, "Rotary.interleaved", "a bool", "1"),
    ("rotary wider than the head", lambda x: _call(x, rotary=Rotary(ones(16, 5), ones(16, 5))), ValueError, "Rotary.cos", "at most D/2 = 4", r"16, 5\)"),
    ("rotary with too few rows", lambda x: _call(x, rotary=Rotary(x.cos[:6], x.sin[:6])), ValueError, "Rotary.key_cos", "Sk = 7", r"6, 4\)"),
    ("rotary of another batch", lambda x: _call(x, rotary=Rotary(ones(3, 16, 4), ones(3, 16, 4))), ValueError, "Rotary.cos", "B = 2", r"\(3, 16, 4\)"),
    ("rotary elsewhere", lambda x: _call(x, rotary=Rotary(x.cos.to(META), x.sin.to(META))), ValueError, "Rotary.cos", "like query", "meta"),
    ("rotary before its first row", lambda x: _call(x, rotary=Rotary(x.cos, x.sin), query_offset=-1), ValueError, "query_offset", r"\[0, 11\]", "-1"),
    ("rotary past its last row", lambda x: _call(x, rotary=Rotary(x.cos, x.sin), query_offset=12), ValueError, "query_offset", r"\[0, 11\]", "12"),
    ("rotary past its last row for one sequence", lambda x: _call(x, rotary=Rotary(x.cos, x.sin), query_offset=torch.tensor([0, 12])), ValueError,
     "query_offset", r"\[0, 11\]", r"\[0, 12\]"),
]  # fmt: skip


def test_the_table_is_long_and_names_are_unique() -> None:
    assert len(ROWS) >= 60
    assert len({name for name, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_bad_input(row: Row, backend: str) -> None:
    _, call, kind, argument, expected, came = row
    x = _inputs()
    before = {name: t.clone() for name, t in vars(x).items()}
    x.backend = backend
    with pytest.raises(kind) as caught:
        call(x)
    message = str(caught.value)
    assert type(caught.value) is kind, "a subclass would be another promise"
    assert re.match(rf"{re.escape(argument)}: expected ", message), message
    wanted, _, got = message.removeprefix(f"{argument}: expected ").rpartition(", got ")
    assert re.search(expected, wanted), message
    assert re.search(came, got), message
    for name, tensor in before.items():
        assert torch.equal(getattr(x, name), tensor), f"{name} was changed"


@pytest.mark.parametrize("function", [fastattn.attention, fastattn.explain])
def test_explain_raises_the_same(function: Callable[..., object]) -> None:
    x = _inputs()
    with pytest.raises(ValueError, match=r"scale: expected a finite number, got float nan"):
        function(x.q, x.k, x.v, scale=float("nan"))


def _valid() -> Iterator[dict[str, Any]]:
    """Input that looks wrong and is not."""
    x = _inputs()
    yield {"scale": 2}
    yield {"scale": torch.tensor(0.5).item()}
    yield {"softcap": 30}
    yield {"dropout_p": 0}
    yield {"dropout_p": 1}
    yield {"query_offset": -100}
    yield {"query_offset": torch.tensor([3, 4], dtype=torch.int32)}
    yield {"mask": KeyLengths(torch.tensor([0, SK], dtype=torch.uint8))}
    yield {"mask": PrefixLM(torch.tensor([0, 1000]))}
    yield {"mask": BoolMask(torch.tensor(True))}
    yield {"mask": SlidingWindow(None, 10**9)}
    yield {"bias": DenseBias(torch.zeros(1, dtype=torch.float64))}
    yield {"bias": DenseBias(torch.zeros(SQ, SK, dtype=torch.float16))}
    yield {"bias": ALiBi(torch.zeros(H, dtype=torch.bfloat16))}
    yield {"sink": torch.zeros(H, dtype=torch.float64)}
    yield {"rotary": Rotary(x.cos.double(), x.sin.double())}


@pytest.mark.parametrize("keywords", list(_valid()), ids=str)
def test_unusual_but_valid(keywords: dict[str, Any], backend: str) -> None:
    x = _inputs()
    x.backend = backend
    assert _call(x, **keywords).isfinite().all()
