"""A module of ours in the place of one of torch: its class changed while its state stays, and a leaf of fx's traces."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

Attention = TypeVar("Attention", bound=torch.nn.MultiheadAttention)
Module = TypeVar("Module", bound=torch.nn.Module)

# What a class body gets from `type` itself and cannot be given.
_IMPLICIT = frozenset({"__dict__", "__weakref__"})
_STRUCTURE = ("_parameters", "_buffers", "_modules")


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The module's class; under the class that `torch.nn.utils.parametrize` has slipped in, if it has."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def class_like(module: torch.nn.Module, base: type[Module]) -> type[Module]:
    """`base`, or for a parametrized module a class over `base` with the module's parametrized properties."""
    if not is_parametrized(module):
        return base
    namespace = {name: value for name, value in vars(type(module)).items() if name not in _IMPLICIT}
    return type(f"Parametrized{base.__name__}", (base,), namespace)


def share_state(module: torch.nn.MultiheadAttention, base: type[Attention]) -> Attention:
    """A new module of class `base` with the parameters, buffers, submodules and hooks of `module`.

    Raises:
        TypeError: `module` is not exactly a `torch.nn.MultiheadAttention` (parametrized or not).
        ValueError: its ``forward`` is overridden on the instance, which no class can change.
    """
    if not isinstance(module, torch.nn.MultiheadAttention) or plain_class(module) is not torch.nn.MultiheadAttention:
        raise TypeError(
            f"mha: expected a torch.nn.MultiheadAttention, not a subclass of it, got {type(module).__name__}"
        )
    if "forward" in vars(module):
        raise ValueError("mha: expected a module that runs its class's forward, got one overridden on the instance")
    cls = class_like(module, base)
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    # Own dictionaries over the same objects, so that parametrizing one module leaves the other whole.  The
    # hooks' dictionaries stay shared: a handle removes its hook from the one it was registered in.
    for name in _STRUCTURE:
        twin.__dict__[name] = module.__dict__[name].copy()
    return twin


def as_leaf(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The call as one node of a symbolic trace, like that of a torch module; the first argument is its proxy."""
    tracer = arguments[0].tracer
    given = {name: x for name, x in named.items() if x is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)
