"""At which sizes: named lists of cases, one builder per suite, chosen by the device they run on.

Sizes keep the number of tokens (batch times length) constant over a sweep, as the field does, so that a plot against
length shows the quadratic part alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch

from fastattn.bench.additive import ADDITIVE_SCENARIOS
from fastattn.bench.cpu_suites import CPU_SUITES
from fastattn.bench.models import FUNCTIONS, MODEL_SCENARIOS
from fastattn.bench.modules import ATTENTION_SCENARIOS, ENCODER_SCENARIOS
from fastattn.bench.rows import ROTARY_SCENARIOS, SOFTMAX_SCENARIOS
from fastattn.bench.scenarios import Case, Shape
from fastattn.bench.suite import Suite

CPU_PEERS = ("fastattn", "sdpa", "sdpa-flash", "sdpa-math", "naive")
# The library's own choice, and each backend by name.
GPU_OURS = ("fastattn", "fastattn-cuda", "fastattn-triton")
GPU_PEERS = (*GPU_OURS, "sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "naive")
# against length: without those that hold the scores, whose time grows past everybody else's
GPU_SWEEP_PEERS = tuple(peer for peer in GPU_PEERS if peer not in ("sdpa-math", "naive"))
GPU_WIDTHS = ((128, 16), (64, 32), (256, 8))  # head dim, heads: the same 2048 wide model in all
COMPILED_PEERS = ("flex", "naive-compiled")
FLASH_PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4")
LIBRARY_PEERS = (*FLASH_PEERS, "xformers")


def _sweep(
    suite: str,
    scenarios: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    lengths: tuple[int, ...],
    *,
    tokens: int,
    heads: int,
    dim: int,
    **sizes: int,
) -> list[Case]:
    return [
        Case(suite, scenario, Shape(max(1, tokens // length), heads, length, length, dim, **sizes), dtype)
        for dtype in dtypes
        for scenario in scenarios
        for length in lengths
    ]


def _peers(device: str) -> tuple[str, ...]:
    return CPU_PEERS if device == "cpu" else (*GPU_PEERS, *LIBRARY_PEERS)


def _sweep_peers(device: str) -> tuple[str, ...]:
    return CPU_PEERS if device == "cpu" else (*GPU_SWEEP_PEERS, *FLASH_PEERS)


def _one_length(device: str, quick: bool) -> tuple[Shape, torch.dtype]:
    """Size and dtype of the suites that compare features instead of lengths."""
    if device == "cpu":
        return Shape(1, 8, 512 if quick else 2048, 512 if quick else 2048, 64), torch.float32
    return Shape(4, 16, 1024 if quick else 4096, 1024 if quick else 4096, 128), torch.bfloat16


def attention(device: str, quick: bool) -> Suite:
    """Plain and causal attention against length."""
    names = ("plain", "causal")
    if device == "cpu":
        tokens, lengths = (2048, (256, 1024)) if quick else (4096, (256, 512, 1024, 2048, 4096))
        cases = _sweep("attention", names, (torch.float32,), lengths, tokens=tokens, heads=8, dim=64)
        if not quick:
            cases += _sweep("attention", names, (torch.bfloat16,), (512, 2048), tokens=tokens, heads=8, dim=64)
    else:
        lengths = (1024, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16384)
        cases = []
        for dim, heads in GPU_WIDTHS[:1] if quick else GPU_WIDTHS:
            cases += _sweep("attention", names, (torch.bfloat16,), lengths, tokens=16384, heads=heads, dim=dim)
    return Suite("attention", "plain and causal attention", tuple(cases), _sweep_peers(device))


def hopper(device: str, quick: bool) -> Suite:
    """The sm_90a kernels, which run only where they are asked for: with and without the exponentials held in place,
    beside the others of ours and whoever is fastest; two biases, which are to cost them little."""
    lengths = (1024, 4096) if quick else (16384, 4096, 1024, 8192, 2048, 512)
    tokens, dtype = (4096, torch.bfloat16) if device == "cpu" else (16384, torch.bfloat16)
    cases = [
        case
        for length in lengths
        for dim, heads in (GPU_WIDTHS[:1] if quick else GPU_WIDTHS)
        for case in _sweep("hopper", ("plain", "causal"), (dtype,), (length,), tokens=tokens, heads=heads, dim=dim)
    ]
    cases += _sweep("hopper", ("t5", "alibi"), (dtype,), lengths[:2], tokens=tokens, heads=16, dim=128)
    ours = ("fastattn-hopper", "fastattn-hopper-unpinned", "fastattn-cuda", "fastattn-triton")
    peers = (*ours, "sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn", "flex")
    return Suite("hopper", "the sm_90a kernels", tuple(cases), peers)


def float8(device: str, quick: bool) -> Suite:
    """The sm_90a kernel of 8-bit operands, beside the same numbers in bfloat16; forward alone."""
    lengths = (1024,) if quick else (4096, 16384, 1024)
    cases = [
        replace(case, directions=("forward",))
        for length in lengths
        for dim, heads in (GPU_WIDTHS[:1] if quick else GPU_WIDTHS)
        for case in _sweep(
            "float8", ("float8", "float8-causal"), (torch.bfloat16,), (length,),
            tokens=1024 if device == "cpu" else 16384, heads=heads, dim=dim,
        )
    ]  # fmt: skip
    peers = ("fastattn-float8", "fastattn-hopper", "fastattn-cuda", "sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn")
    return Suite("float8", "8-bit operands on sm_90a", tuple(cases), peers)


def compiled(device: str, quick: bool) -> Suite:
    """Peers that are compiled for every case, on few of them: compilation would eat the time of a full sweep."""
    if device == "cpu":
        shape, dtype = _one_length(device, quick)
        cases = [Case("compiled", name, shape, dtype) for name in ("causal", "window", "alibi")]
        return Suite("compiled", "compiled peers", tuple(cases), ("fastattn", "sdpa", "naive", "flex"))
    widths = GPU_WIDTHS[:1] if quick else GPU_WIDTHS
    cases = [
        Case("compiled", name, Shape(4, heads, 4096, 4096, dim), torch.bfloat16)
        for name in ("plain", "causal")
        for dim, heads in widths
    ]
    biased = ("t5", "table", "alibi", "window-1024", "documents", "dense-bias")
    cases += [Case("compiled", name, Shape(4, 16, 4096, 4096, 128), torch.bfloat16) for name in biased]
    peers = (*GPU_OURS, "sdpa", "naive", *COMPILED_PEERS)
    return Suite("compiled", "compiled peers", tuple(cases), peers)


def mask(device: str, quick: bool) -> Suite:
    """Structured and arbitrary masks, GQA, at one length."""
    shape, dtype = _one_length(device, quick)
    names = ("causal", "window", "lengths", "prefix", "documents", "bool-mask")
    cases = [Case("mask", name, shape, dtype) for name in names]
    cases.append(Case("mask", "causal", replace(shape, kv_heads=shape.heads // 4), dtype))
    return Suite("mask", "masks", tuple(cases), _peers(device))


def bias(device: str, quick: bool) -> Suite:
    """Biases with the gradients of their parameters, rotation, softcap, sink, dropout, at one length."""
    shape, dtype = _one_length(device, quick)
    names = ("alibi", "alibi-learned", "t5", "table", "dense-bias", "rotary", "softcap", "sink", "dropout")
    cases = [Case("bias", name, shape, dtype) for name in names]
    return Suite("bias", "biases, rotation, dropout", tuple(cases), _peers(device))


# encodings that attention sees; absolute ones are a sum before it
POSITIONAL = (
    "plain", "causal", "rotary", "rotary-trailing", "rotary-learned", "mrope", "xpos", "alibi", "alibi-sides", "t5",
    "table", "kerple", "kerple-power", "sandwich", "fire", "shaw-keys", "shaw", "transformer-xl",
    "transformer-xl-wide", "deberta", "sam", "cosine",
)  # fmt: skip


def positional(device: str, quick: bool) -> Suite:
    """Every positional encoding with the gradients of its parameters, beside the kernel without one."""
    if device == "cpu":
        shape, dtype, windows = Shape(1, 8, 512 if quick else 2048, 512 if quick else 2048, 64), torch.float32, 64
    else:
        # half the length of other suites: the dense forms of most encodings have to fit beside each other
        shape, dtype, windows = Shape(2, 16, 2048, 2048, 64), torch.bfloat16, 2048
    cases = [Case("positional", name, shape, dtype) for name in POSITIONAL]
    cases.append(Case("positional", "swin", Shape(windows, shape.heads, 64, 64, 32), dtype))
    ours = ("fastattn",) if device == "cpu" else ("fastattn", "fastattn-triton")
    return Suite("positional", "positional encodings", tuple(cases), (*ours, "sdpa", "naive", "flex"))


def sweep(device: str, quick: bool) -> Suite:
    """What a fused kernel exists for, a T5 bias and ALiBi, against length; on a GPU sparse masks as well."""
    if device == "cpu":
        lengths = (256, 1024) if quick else (256, 512, 1024, 2048)
        cases = _sweep("sweep", ("t5", "alibi"), (torch.float32,), lengths, tokens=2048, heads=8, dim=64)
        return Suite("sweep", "T5 bias and ALiBi against length", tuple(cases), _peers(device))
    names, dtypes, cases = ("t5", "alibi", "window-1024", "documents"), (torch.bfloat16,), []
    for dim, heads in GPU_WIDTHS[:1] if quick else GPU_WIDTHS:
        # three lengths at one width, the middle one at the others
        lengths = (1024, 4096) if quick else (512, 4096, 16384) if dim == 128 else (4096,)
        cases += _sweep("sweep", names, dtypes, lengths, tokens=16384, heads=heads, dim=dim)
    return Suite("sweep", "biases and sparse masks against length", tuple(cases), _sweep_peers(device))


def module(device: str, quick: bool) -> Suite:
    """nn.MultiheadAttention against its replacement: self-attention, with padding, with returned weights; encoders."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = (128, 512) if quick else (128, 512, 2048)
    tokens = 4096 if device == "cpu" else 16384
    cases = _sweep("module", ATTENTION_SCENARIOS[:3], (dtype,), lengths, tokens=tokens, heads=8, dim=64)
    cases += _sweep("module", ENCODER_SCENARIOS[:2], (dtype,), lengths[:2], tokens=tokens, heads=8, dim=64)
    return Suite("module", "multi-head attention modules", tuple(cases), ("fastattn-mha", "nn-mha"), baseline="nn-mha")


def huggingface(device: str, quick: bool) -> Suite:
    """Two layers of models of transformers: padded, grouped heads, windows, softcap, a T5 bias and its gradient."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = (256,) if quick else (512, 2048)
    tokens = 4096 if device == "cpu" else 16384
    cases = _sweep("huggingface", MODEL_SCENARIOS, (dtype,), lengths, tokens=tokens, heads=8, dim=64)
    return Suite("huggingface", "models of transformers", tuple(cases), tuple(FUNCTIONS), baseline="hf-sdpa")


def decode(device: str, quick: bool) -> Suite:
    """One new query against a long cache, with and without GQA."""
    lengths = (1024,) if quick else (1024, 4096, 16384)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cases = [
        Case("decode", "plain", Shape(4, 16, 1, length, 64, kv_heads=kv_heads), dtype, ("forward",))
        for kv_heads in (16, 4)
        for length in lengths
    ]
    return Suite("decode", "one query against a cache", tuple(cases), _peers(device))


def overhead(device: str, quick: bool) -> Suite:
    """Microseconds per call where there is nothing to compute: what the call itself costs.  launches.py adds what a
    Triton call costs the host."""
    shape = Shape(1, 2, 8, 8, 16)
    cases = tuple(Case("overhead", name, shape) for name in ("plain", "causal", "alibi"))
    ours = ("fastattn",) if device == "cpu" else ("fastattn", "fastattn-triton")
    peers = (*ours, "fastattn-sdpa", "sdpa", "naive")
    return Suite("overhead", "host overhead on a tiny call", cases, peers, per_call=True)


def _row_peers(device: str, quick: bool) -> tuple[str, ...]:
    ours = ("fastattn",) if device == "cpu" else GPU_OURS
    return (*ours, "naive") if quick and device == "cpu" else (*ours, "naive", "naive-compiled")


def softmax(device: str, quick: bool) -> Suite:
    """The masked softmax by itself, by row length: plain, causal, of documents, under a bool mask, with a bias."""
    if device == "cpu":
        lengths, dtypes, elements, heads = (
            (256, 1024) if quick else (128, 512, 2048),
            (torch.float32, torch.bfloat16),
            2**23,
            8,
        )
    else:
        lengths, dtypes, elements, heads = (
            (1024, 4096) if quick else (1024, 4096, 16384),
            (torch.bfloat16,),
            2**29,
            16,
        )
    cases = [
        Case("softmax", scenario, Shape(max(1, elements // (heads * length**2)), heads, length, length, 0), dtype)
        for dtype in dtypes
        for scenario in SOFTMAX_SCENARIOS
        for length in lengths
    ]
    return Suite("softmax", "masked softmax", tuple(cases), _row_peers(device, quick), baseline="naive")


def rotary(device: str, quick: bool) -> Suite:
    """The rotation by itself, queries and keys of a model with grouped heads, laid out as (B, S, H, D)."""
    tokens, dtypes = (4096, (torch.float32, torch.bfloat16)) if device == "cpu" else (16384, (torch.bfloat16,))
    lengths = (1024,) if quick else (128, 1024, 4096)
    cases = [
        Case("rotary", scenario, Shape(tokens // length, 16, length, length, 128, kv_heads=4), dtype)
        for dtype in dtypes
        for scenario in ROTARY_SCENARIOS
        for length in lengths
    ]
    return Suite("rotary", "rotary embedding", tuple(cases), (*_row_peers(device, quick), "liger"), baseline="naive")


def additive(device: str, quick: bool) -> Suite:
    """Additive attention: one head of 512 wide states, as in the paper, and several heads against length."""
    if device == "cpu":
        lengths, dtypes = (
            ((128, 256), (torch.float32,)) if quick else ((128, 256, 512), (torch.float32, torch.bfloat16))
        )
        cases = _sweep("additive", ADDITIVE_SCENARIOS, dtypes, lengths, tokens=512, heads=4, dim=64)
        cases.append(Case("additive", "additive", Shape(8, 1, 50, 50, 512), torch.float32))
    else:
        lengths = (512,) if quick else (256, 512, 1024)
        cases = _sweep("additive", ADDITIVE_SCENARIOS, (torch.bfloat16,), lengths, tokens=1024, heads=8, dim=64)
        cases.append(Case("additive", "additive", Shape(64, 1, 50, 50, 512), torch.bfloat16))
    return Suite("additive", "additive attention", tuple(cases), _row_peers(device, quick), baseline="naive")


HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None

SUITES: dict[str, Callable[[str, bool], Suite]] = {
    "attention": attention,
    "hopper": hopper,
    "float8": float8,
    "sweep": sweep,
    "mask": mask,
    "bias": bias,
    "positional": positional,
    "module": module,
    "huggingface": huggingface,
    "decode": decode,
    "overhead": overhead,
    "compiled": compiled,
    "softmax": softmax,
    "rotary": rotary,
    "additive": additive,
    **CPU_SUITES,
}
# groups: names that stand for several suites
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(name for name in SUITES if name not in CPU_SUITES and (name != "huggingface" or HAS_TRANSFORMERS)),
    "cpu": tuple(CPU_SUITES),  # what has goals
    "gpu": (
        "attention",
        "overhead",
        "sweep",
        "rotary",
        "softmax",
        "compiled",
        "bias",
        "additive",
        "mask",
        "module",
        "positional",
    ),  # what matters most first: time may run out
}


def resolve(names: list[str]) -> list[str]:
    """Suite names with groups spelled out, in order, once each.

    Raises:
        ValueError: an unknown name.
    """
    chosen: list[str] = []
    for name in names:
        if name not in SUITES and name not in GROUPS:
            raise ValueError(f"unknown suite {name!r}; choose from {', '.join((*SUITES, *GROUPS))}")
        for member in GROUPS.get(name, (name,)):
            if member not in chosen:
                chosen.append(member)
    return chosen
