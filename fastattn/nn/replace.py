"""Model surgery: let the attention modules inside a model be computed by fastattn, and undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.nn.classes import class_like, plain_class
from fastattn.nn.layers import TransformerEncoderLayer
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.transformer import TransformerEncoder

# Remembered on the changed modules themselves, so that copies and pickles of the model can be restored too.
_ORIGINAL_CLASS = "_fastattn_original_class"
_SAVED_SWITCHES = "_fastattn_saved_switches"

# What `MultiheadAttention.forward` reads.  The weights are looked at apart.
_READ = ("embed_dim", "num_heads", "dropout", "batch_first", "bias_k", "bias_v", "add_zero_attn", "in_proj_bias")
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_TORCH_STATE = frozenset((*_WEIGHTS, "in_proj_bias", "bias_k", "bias_v", "out_proj", "parametrizations"))


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_attention` did.

    Attributes:
        replaced: path of every replaced module; a module used in several places has several paths.
        left: for each attention module that was not replaced, the reason.
        aliases: for each path of `replaced` that is a further use of a module, the path of its first.
        stacks: paths of the encoder layers and encoders of torch that are fastattn's too.
        fused_paths: paths of the layers and encoders whose fused inference path, which bypasses ``self_attn``, is off.
    """

    replaced: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()
    fused_paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return (
                "nothing to replace: the model has no torch.nn.MultiheadAttention "
                "(models of transformers: fastattn.integrations.huggingface.use)"
            )
        lines = [f"replaced {len(self.replaced) - len(self.aliases)} attention modules, left {len(self.left)}"]
        for path in self.replaced:
            same = f" (the same module as {self.aliases[path]})" if path in self.aliases else ""
            lines.append(f"  replaced {path}{same}")
        lines += [f"  left     {path}: {reason}" for path, reason in self.left.items()]
        lines += [f"  with it  {path or 'the model itself'}" for path in self.stacks]
        lines += [f"  fused inference path off: {path or 'the model itself'}" for path in self.fused_paths]
        return "\n".join(lines)


def replace_attention(
    model: torch.nn.Module,
    *,
    filter: Callable[[str, torch.nn.Module], bool] | None = None,
    strict: bool = True,
) -> ReplacementReport:
    """Let every `torch.nn.MultiheadAttention` inside `model` be computed by fastattn, in place.

    The module objects stay and change their class to `fastattn.nn.MultiheadAttention`, so parameters, optimizers,
    hooks, tied modules, training flags, devices and every other reference to them stay valid, and nothing is copied.
    `restore_attention` changes them back, which code that asks for exactly torch's class needs first (the conversion
    of torch.ao.nn.quantizable, for one).

    `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerEncoder` have inference paths that never call
    ``self_attn`` but hand its weights to a fused operator, or turn padded batches into nested tensors.  Call this on
    the whole model so that they are seen: torch's own become `fastattn.nn.TransformerEncoderLayer` and
    `fastattn.nn.TransformerEncoder` in the same way, which leave padding out in inference where torch does.  In others
    that hold a fastattn module, subclasses and copies of libraries, these paths are switched off
    (``activation_relu_or_gelu = 0``, ``use_nested_tensor = False``), and such an encoder computes padded positions
    instead of leaving them 0.

    Args:
        model: any module that contains attention modules.
        filter: called as filter(path, module) for every attention module, subclasses included; True selects it.  A
            subclass that is selected becomes a plain fastattn module: what it overrides is off until it is restored.
            By default the modules whose class is exactly `torch.nn.MultiheadAttention`, parametrized or not, are
            selected; subclasses are left, with the reason in the report, since they may compute something else.
        strict: whether a module that is selected but cannot be replaced is an error, raised before anything has
            changed; otherwise it is left, with the reason in the report.  A module cannot be replaced when it is
            compiled by TorchScript, when ``forward`` is overridden on the instance, or when its parameters are not
            torch's.  Modules that nothing selects, and modules that are fastattn's already, are no error.

    Returns:
        A `ReplacementReport`; ``print`` it.

    Raises:
        TypeError: `model` is not a module, or `filter` is not callable.
        ValueError: `model` is itself an attention module; or, with strict, a selected module cannot be replaced.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a callable (path, module) -> bool, got {type(filter).__name__}")
    if _is_attention(model):
        raise ValueError(
            "model: expected a module that contains attention modules, got one that is itself a "
            f"{type(model).__name__}; "
            "assign the module returned by fastattn.nn.MultiheadAttention.from_torch(mha) instead"
        )

    paths: dict[torch.nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_attention(module):
            paths.setdefault(module, []).append(path)

    selected: list[torch.nn.MultiheadAttention] = []
    left: dict[str, str] = {}
    obstacles: dict[str, str] = {}
    for module, (path, *_) in paths.items():
        reason = _why_not_selected(path, module, filter)
        obstacle = None if reason else _obstacle(module)
        if reason:
            left[path] = reason
        elif obstacle:
            left[path] = obstacles[path] = obstacle
        else:
            selected.append(module)  # type: ignore[arg-type]
    if strict and obstacles:
        listing = "; ".join(f"{path}: {why}" for path, why in obstacles.items())
        raise ValueError(
            f"model: cannot replace {len(obstacles)} of its attention modules, and nothing was changed ({listing}); "
            "pass strict=False to leave them, or a filter that does not select them"
        )

    for module in selected:
        _change_class(module, MultiheadAttention)
    stacks = []
    for is_own, cls in ((_is_own_layer, TransformerEncoderLayer), (_is_own_encoder, TransformerEncoder)):
        for path, module in model.named_modules():
            if is_own(module):
                _change_class(module, cls)
                stacks.append(path)
    fused_paths = [path for path, module in model.named_modules() if _switch_off_fused_paths(module)]
    return ReplacementReport(
        replaced=tuple(path for module in selected for path in paths[module]),
        left=left,
        aliases={path: paths[module][0] for module in selected for path in paths[module][1:]},
        stacks=tuple(stacks),
        fused_paths=tuple(fused_paths),
    )


def restore_attention(model: torch.nn.Module) -> tuple[str, ...]:
    """Undo `replace_attention`, in place: classes and switches are what they were; parameters are what they are now.

    Modules that were fastattn's before are left.  Works on copies and unpickled models too.

    Returns:
        The paths of the attention modules that are torch's again.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    restored = []
    for path, module in model.named_modules():
        if _ORIGINAL_CLASS in vars(module):
            if isinstance(module, MultiheadAttention):
                restored.append(path)
            module.__class__ = class_like(module, vars(module)[_ORIGINAL_CLASS])
            delattr(module, _ORIGINAL_CLASS)
        for name, value in vars(module).pop(_SAVED_SWITCHES, {}).items():
            setattr(module, name, value)
    return tuple(restored)


def _change_class(module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    setattr(module, _ORIGINAL_CLASS, plain_class(module))
    module.__class__ = class_like(module, cls)


def _holds_attention(layer: torch.nn.Module) -> bool:
    return isinstance(getattr(layer, "self_attn", None), MultiheadAttention)


def _is_own_layer(module: torch.nn.Module) -> bool:
    """torch's own encoder layer, no subclass, around a fastattn module."""
    return (
        plain_class(module) is torch.nn.TransformerEncoderLayer
        and vars(module).keys().isdisjoint(("forward", "_sa_block", "_ff_block"))
        and _holds_attention(module)
    )


def _is_own_encoder(module: torch.nn.Module) -> bool:
    """torch's own encoder, no subclass, whose layers are all fastattn's."""
    return (
        plain_class(module) is torch.nn.TransformerEncoder
        and "forward" not in vars(module)
        and len(module.layers) > 0  # type: ignore[arg-type]
        and all(plain_class(layer) is TransformerEncoderLayer for layer in module.layers)  # type: ignore[union-attr]
    )


def _is_attention(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) == torch.nn.MultiheadAttention.__name__
    return isinstance(module, torch.nn.MultiheadAttention)


def _why_not_selected(
    path: str, module: torch.nn.Module, filter: Callable[[str, torch.nn.Module], bool] | None
) -> str | None:
    if isinstance(module, MultiheadAttention):
        return "is a fastattn module already"
    if filter is not None:
        return None if filter(path, module) else "not selected by filter"
    cls = plain_class(module)
    if isinstance(module, torch.jit.ScriptModule) or cls is torch.nn.MultiheadAttention:
        return None
    return (
        f"is a {cls.__module__}.{cls.__qualname__}, a subclass of torch.nn.MultiheadAttention that may compute "
        "something else; select it with filter if it does not"
    )


def _obstacle(module: torch.nn.Module) -> str | None:
    """Why a selected module cannot be computed by fastattn; None when it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    lacking = [name for name in _READ if not hasattr(module, name)]
    packed = getattr(module, "_qkv_same_embed_dim", True)
    weights = _WEIGHTS[:1] if packed else _WEIGHTS[1:]
    lacking += [name for name in weights if not isinstance(getattr(module, name, None), Tensor)]
    if not isinstance(getattr(module, "out_proj", None), torch.nn.Module):
        lacking.append("out_proj")
    if lacking:
        return f"lacks {', '.join(lacking)}"
    if plain_class(module) is not torch.nn.MultiheadAttention:
        state = {*module._parameters, *module._buffers, *module._modules}
        foreign = sorted(state - _TORCH_STATE)
        if foreign:
            return f"computes with {', '.join(foreign)}, which torch's class does not have"
    return None


def _switch_off_fused_paths(module: torch.nn.Module) -> bool:
    """Keep a layer or encoder that holds a fastattn module from bypassing it; whether there was anything to do.

    By attribute, not by class: libraries carry copies of torch's layers that read the same switches.
    """
    switches: dict[str, object] = {}
    if _holds_attention(module):
        switches["activation_relu_or_gelu"] = 0
    layers = getattr(module, "layers", None)
    foreign = isinstance(layers, torch.nn.Module) and not isinstance(module, TransformerEncoder)
    if foreign and any(map(_holds_attention, layers.children())):
        switches["use_nested_tensor"] = False
    active = {name: off for name, off in switches.items() if getattr(module, name, False)}
    for name, off in active.items():
        vars(module).setdefault(_SAVED_SWITCHES, {})[name] = getattr(module, name)
        setattr(module, name, off)
    return bool(active)
