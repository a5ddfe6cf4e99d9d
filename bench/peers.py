"""By whom: every implementation of attention we compare with, through its public interface.

A peer prepares a case once (masks that are constants of a training run are built here, outside the clock, which
favours the peers that need them) and returns a closure for one forward pass.  What a step of training must redo,
such as gathering a bias from a learned table, happens inside the closure.  A peer that cannot do a case raises: the
message is shown in its row.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.bench.additive import AdditiveInputs, prepare_additive
from fastattn.bench.models import ModelInputs, prepare_model
from fastattn.bench.modules import ModuleInputs, prepare_module
from fastattn.bench.rows import RowInputs, prepare_rows
from fastattn.bench.scenario import ALL_HEADS
from fastattn.bench.scenarios import SCENARIOS, WINDOWS, Inputs, dense_terms, naive_attention

AnyInputs = Inputs | AdditiveInputs | ModuleInputs | RowInputs


class CannotError(Exception):
    """This peer has no way to compute this case."""


@dataclass
class Prepared:
    """One variant, ready to run: `forward()` gives the output, or outputs, whose gradient is taken against `leaves`."""

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    grad_out: Tensor | tuple[Tensor, ...]
    threads: int | None = None  # of the CPU, where they are not those of the run

    def step(self) -> tuple[Tensor, ...]:
        """One training step's share: forward and the gradient of every leaf."""
        return self.gradients(self.forward())

    def gradients(self, out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.threads is None:
            return torch.autograd.grad(out, list(self.leaves.values()), self.grad_out)
        with on_threads(self.threads):
            return torch.autograd.grad(out, list(self.leaves.values()), self.grad_out)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch's CPU threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Peer:
    name: str
    title: str
    prepare: Callable[[Inputs], Callable[[], Tensor]]
    threads: int | None = None  # of the CPU, where they are not those of the run
    without: bool = False  # computes the scenario that is left without the case's feature
    slack: float = 1.0  # what its budget is multiplied by, where it rounds to fewer bits than the case's dtype


def _fastattn(inputs: Inputs, backend: str | None = None) -> Callable[[], Tensor]:
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]

    def forward() -> Tensor:
        return scenario.function(
            inputs.query, inputs.key, inputs.value, backend=backend, **scenario.arguments(shape, inputs.extras)
        )

    return forward


def _cuda(inputs: Inputs, asked: str = "0") -> Callable[[], Tensor]:
    """The cuda backend; `asked` is what the environment says of its sm_90a kernels, for the forward and the gradients
    that follow it."""
    attention = _fastattn(inputs, backend="cuda")

    def forward() -> Tensor:
        os.environ["FASTATTN_CUDA_HOPPER"] = asked
        return attention()

    if asked == "0":
        return forward
    if inputs.query.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise CannotError("the sm_90a kernels need a GPU of capability 9.0")
    os.environ["FASTATTN_CUDA_HOPPER"] = asked
    reason = fastattn.explain(inputs.query, inputs.key, inputs.value, backend="cuda").plan.get("not_hopper")
    if reason is not None:
        raise CannotError(f"the sm_90a kernels do not take it: {reason}")
    return forward


def _float8(inputs: Inputs) -> Callable[[], Tensor]:
    """The kernel for 8-bit operands, whose numbers these are; no gradients."""
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    if scenario.numbers is not torch.float8_e4m3fn:
        raise CannotError("the numbers of the case are not float8_e4m3fn's")
    operands = [x.detach().to(scenario.numbers) for x in (inputs.query, inputs.key, inputs.value)]
    scales = {
        f"{name}_scale": torch.ones(x.shape[1], device=x.device)
        for name, x in zip(("query", "key", "value"), operands, strict=True)
    }
    arguments = {**scenario.arguments(shape, inputs.extras), **scales, "backend": "cuda"}

    def forward() -> Tensor:
        os.environ["FASTATTN_CUDA_HOPPER"] = "1"
        return fastattn.attention(*operands, **arguments)

    os.environ["FASTATTN_CUDA_HOPPER"] = "1"
    notes = fastattn.explain(*operands, **arguments).notes
    if notes:
        raise CannotError(notes[0])
    return forward


def _sdpa_terms(inputs: Inputs, built_once: bool = False) -> tuple[Callable[[], Tensor | None], bool]:
    """How SDPA is told mask and bias: a closure for attn_mask, and the is_causal flag."""
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    if scenario.softcap or scenario.sink:
        raise CannotError("scaled_dot_product_attention has no softcap and no sink")
    if scenario.value_term is not None:
        raise CannotError("scaled_dot_product_attention gives no weights, and has no term beside the values")
    if scenario.causal and shape.offset == 0 and not scenario.dense_bias:
        return lambda: None, True

    def build() -> Tensor | None:
        mask, bias = dense_terms(inputs)
        if bias is None:
            return mask
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        bias = bias.to(inputs.query.dtype)
        if not torch.is_grad_enabled():
            bias = bias.detach()  # SDPA goes by requires_grad even without a graph, and would take the math backend
        return bias[None] if bias.dim() == 3 else bias  # a 3-D mask would take the math backend as well

    if scenario.dense_bias and scenario.parameters and not built_once:
        return build, False  # the bias changes with its parameters: gathered anew in every step
    with torch.no_grad():
        constant = build()

    def built() -> Tensor | None:
        if built_once and torch.is_grad_enabled():
            raise CannotError("a bias that is built once is for inference: its parameters would get no gradient")
        return constant

    return built, False


def _sdpa(
    inputs: Inputs,
    backend: SDPBackend | None = None,
    function: Callable[..., Tensor] = F.scaled_dot_product_attention,
    built_once: bool = False,
) -> Callable[[], Tensor]:
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    attn_mask, is_causal = _sdpa_terms(inputs, built_once)

    def forward() -> Tensor:
        query, key = inputs.query, inputs.key
        if scenario.transform is not None:
            query, key = scenario.transform(shape, inputs.extras, query, key, ALL_HEADS)
            query, key = query.to(inputs.query.dtype), key.to(inputs.key.dtype)
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return function(
                query,
                key,
                inputs.value,
                attn_mask=attn_mask(),
                dropout_p=scenario.dropout_p,
                is_causal=is_causal,
                enable_gqa=shape.kv_heads != shape.heads,
            )

    return forward


def _naive(inputs: Inputs) -> Callable[[], Tensor]:
    with torch.no_grad():
        mask, bias = dense_terms(inputs)
    learned = SCENARIOS[inputs.case.scenario].dense_bias and SCENARIOS[inputs.case.scenario].parameters

    def forward() -> Tensor:
        current = dense_terms(inputs)[1] if learned else bias
        current = None if current is None else current.to(inputs.query.dtype)
        return naive_attention(inputs, mask=mask, bias=current)

    return forward


def _naive_compiled(inputs: Inputs) -> Callable[[], Tensor]:
    return torch.compile(_naive(inputs), dynamic=False)


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    if scenario.dropout_p or scenario.sink:
        raise CannotError("flex_attention has no dropout, and a sink only as arithmetic on its lse")
    if (scenario.dense_bias is not None and scenario.score_mod is None) or scenario.value_term is not None:
        raise CannotError(f"no score_mod was written for {scenario.title}")
    extras = inputs.extras
    if inputs.query.device.type == "cpu":  # inference there refuses whatever requires a gradient, no_grad or not
        extras = {name: tensor.detach() for name, tensor in extras.items()}
    block_mask = None
    if scenario.mask_mod is not None:
        mod = scenario.mask_mod(shape, extras)
        per_batch = shape.batch if set(inputs.extras) & {"lengths", "prefix", "query_ids", "mask"} else None
        block_mask = create_block_mask(
            mod, per_batch, None, shape.query_length, shape.key_length, device=str(inputs.query.device)
        )
    score_mod = scenario.score_mod(shape, extras) if scenario.score_mod is not None else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        query, key, value = inputs.query, inputs.key, inputs.value
        if not torch.is_grad_enabled():
            query, key, value = query.detach(), key.detach(), value.detach()
        if scenario.transform is not None:
            query, key = scenario.transform(shape, extras, query, key, ALL_HEADS)
            query, key = query.to(inputs.query.dtype), key.to(inputs.key.dtype)
        return compiled(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=block_mask,
            enable_gqa=shape.kv_heads != shape.heads,
        )

    return forward


# flash_attn_func by generation: module, words that are arguments of this generation beside causal and window_size, and
# how its window says "no limit"
FLASH_ATTN: dict[int, tuple[str, tuple[str, ...], int | None]] = {
    2: ("flash_attn", ("softcap", "dropout_p", "alibi_slopes"), -1),
    3: ("flash_attn_interface", ("softcap",), -1),
    4: ("flash_attn.cute", ("softcap", "learnable_sink"), None),
}


def _flash_attn(inputs: Inputs, generation: int = 2) -> Callable[[], Tensor]:
    """flash-attn takes (B, S, heads, D), half precision, and masks that end at the last key."""
    module, words, no_limit = FLASH_ATTN[generation]
    flash_attn_func = _imported(module).flash_attn_func
    scenario = SCENARIOS[inputs.case.scenario]
    wanted = {"softcap": scenario.softcap, "dropout_p": scenario.dropout_p}
    if scenario.name == "alibi":
        wanted["alibi_slopes"] = inputs.extras["slopes"]
    if scenario.sink:
        wanted["learnable_sink"] = inputs.extras["sink"].to(inputs.query.dtype)
    given = {name: value for name, value in wanted.items() if isinstance(value, Tensor) or value}
    supported = ("plain", "causal", *WINDOWS, "alibi", "softcap", "dropout", "sink")
    if scenario.name not in supported or not set(given) <= set(words):
        raise CannotError(f"{module}.flash_attn_func has no argument for {scenario.title}")
    window = (WINDOWS[scenario.name] - 1, 0) if scenario.name in WINDOWS else (no_limit, no_limit)

    def forward() -> Tensor:
        out = flash_attn_func(
            *(t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value)),
            causal=scenario.dense_mask is not None,
            window_size=window,
            **given,
        )
        out = out[0] if isinstance(out, tuple) else out  # some generations give the log-sum-exp as well
        return out.transpose(1, 2)

    return forward


def _imported(module: str) -> ModuleType:
    """The peer's module; its own words where it is here and does not import."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        raise CannotError(f"{top} is not installed")
    return importlib.import_module(module)


def _xformers(inputs: Inputs) -> Callable[[], Tensor]:
    """xformers takes (B, S, heads, D); masks as its own objects, biases as tensors of the full shape."""
    ops = _imported("xformers.ops")
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    if scenario.softcap or scenario.sink or scenario.value_term is not None:
        raise CannotError("memory_efficient_attention has no softcap, no sink and no term beside the values")
    if shape.kv_heads != shape.heads:
        raise CannotError("memory_efficient_attention takes grouped heads in five dimensions: not compared")
    terms, is_causal = _sdpa_terms(inputs)
    full = (shape.batch, shape.heads, shape.query_length, shape.key_length)

    def build() -> object:
        if is_causal:
            return ops.LowerTriangularMask()
        dense = terms()
        if dense is None:
            return None
        if dense.dtype == torch.bool:
            dense = torch.zeros_like(dense, dtype=inputs.query.dtype).masked_fill(~dense, float("-inf"))
        return dense.expand(full)

    learned = scenario.dense_bias is not None and bool(scenario.parameters)
    constant = None if learned else build()

    def forward() -> Tensor:
        query, key = inputs.query, inputs.key
        if scenario.transform is not None:
            query, key = scenario.transform(shape, inputs.extras, query, key, ALL_HEADS)
        query, key, value = (t.to(inputs.query.dtype).transpose(1, 2) for t in (query, key, inputs.value))
        return ops.memory_efficient_attention(
            query, key, value, attn_bias=build() if learned else constant, p=scenario.dropout_p
        ).transpose(1, 2)

    return forward


def _module_only(inputs: Inputs) -> Callable[[], Tensor]:
    raise CannotError("compares modules, not functions")


def _rotary_only(inputs: Inputs) -> Callable[[], Tensor]:
    raise CannotError("has a rotation, and no attention")


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("fastattn", "fastattn.attention, its own choice", _fastattn),
        Peer("fastattn-cuda", "fastattn.attention, backend cuda", _cuda),
        Peer(
            "fastattn-hopper",
            "fastattn.attention, backend cuda, sm_90a kernels",
            functools.partial(_cuda, asked="1"),
        ),
        Peer(
            "fastattn-hopper-unpinned",
            "the same, exponentials where the compiler puts them",
            functools.partial(_cuda, asked="unpinned"),
        ),
        # weights with three bits of mantissa where bfloat16 has seven
        Peer("fastattn-float8", "fastattn.attention, backend cuda, 8-bit operands", _float8, slack=2.0**4),
        Peer("fastattn-triton", "fastattn.attention, backend triton", functools.partial(_fastattn, backend="triton")),
        Peer("fastattn-without", "fastattn.attention without the feature of the case", _fastattn, without=True),
        Peer("fastattn-1-thread", "fastattn.attention on one thread", _fastattn, threads=1),
        Peer(
            "fastattn-sdpa",
            "fastattn.scaled_dot_product_attention",
            functools.partial(_sdpa, function=fastattn.scaled_dot_product_attention),
        ),
        Peer("sdpa", "torch SDPA, its own choice", _sdpa),
        Peer("sdpa-built", "torch SDPA, dense bias built once", functools.partial(_sdpa, built_once=True)),
        Peer("sdpa-flash", "torch SDPA, flash", functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
        Peer(
            "sdpa-efficient",
            "torch SDPA, memory-efficient",
            functools.partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
        ),
        Peer("sdpa-cudnn", "torch SDPA, cuDNN", functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
        Peer("sdpa-math", "torch SDPA, math", functools.partial(_sdpa, backend=SDPBackend.MATH)),
        Peer("flex", "FlexAttention, compiled", _flex),
        Peer("naive", "the naive formula", _naive),
        Peer("naive-compiled", "the naive formula under torch.compile", _naive_compiled),
        Peer("flash-attn", "flash-attn 2", _flash_attn),
        Peer("flash-attn-3", "flash-attn 3", functools.partial(_flash_attn, generation=3)),
        Peer("flash-attn-4", "flash-attn 4", functools.partial(_flash_attn, generation=4)),
        Peer("xformers", "xformers", _xformers),
        Peer("fastattn-mha", "fastattn's module in its place", _module_only),
        Peer("nn-mha", "torch.nn's module", _module_only),
        Peer("fastattn-hf", "fastattn as an attention function of transformers", _module_only),
        Peer("hf-sdpa", "transformers' function for SDPA", _module_only),
        Peer("hf-eager", "transformers' own formula", _module_only),
        Peer("liger", "Liger's rotary embedding, on copies: it turns its operands in place", _rotary_only),
    )
}


def prepare(peer: str, inputs: AnyInputs) -> Prepared:
    """The peer's closure for the case.  Raises whatever the peer raises for a case it cannot do."""
    if isinstance(inputs, ModuleInputs):
        prepare_it = prepare_model if isinstance(inputs, ModelInputs) else prepare_module
        forward, leaves = prepare_it(peer, inputs)  # type: ignore[arg-type]
        return Prepared(forward, leaves, inputs.grad_out)
    if isinstance(inputs, AdditiveInputs):
        return Prepared(prepare_additive(peer, inputs), inputs.leaves, inputs.grad_out)
    if isinstance(inputs, RowInputs):
        return Prepared(prepare_rows(peer, inputs), inputs.leaves, inputs.grad_out)
    forward, threads = PEERS[peer].prepare(inputs), PEERS[peer].threads
    if threads is None:
        return Prepared(forward, inputs.leaves(), inputs.grad_out)

    def limited() -> Tensor:
        with on_threads(threads):
            return forward()

    return Prepared(limited, inputs.leaves(), inputs.grad_out, threads)
