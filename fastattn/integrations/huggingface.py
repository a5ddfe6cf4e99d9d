"""Models of Hugging Face transformers with fastattn's attention, by way of their `AttentionInterface`.

::

    from fastattn.integrations import huggingface

    print(huggingface.use(model))       # a model that exists
    huggingface.register()              # or, for those to come:
    model = AutoModel.from_pretrained(name, attn_implementation="fastattn")

Parameters, caches, generation, training and `torch.compile` are the model's own, as with its "sdpa".  Beyond that this
takes softcaps (Gemma 2), sinks (gpt-oss), position biases and float masks with gradients (T5, Swin), and gives the
weights where ``output_attentions=True`` asks for them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import Bias, DenseBias
from fastattn.dispatch import UnsupportedError
from fastattn.functional import attention, lower
from fastattn.masks import BoolMask, Causal, Mask
from fastattn.problem import Problem
from fastattn.softmax import masked_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["NAME", "Report", "attention_forward", "make_mask", "register", "use"]

NAME = "fastattn"
_NOT_TAKEN = "its attention does not go through transformers' AttentionInterface, so it would not call fastattn"


@dataclass(frozen=True)
class Report:
    """What `use` did.

    Attributes:
        using: class names of the model and of the models inside it whose attention is fastattn's now.
        left: for each of them whose attention is not, the reason.
    """

    using: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"using fastattn: {', '.join(self.using)}"]
        return "\n".join(lines + [f"left {name}: {reason}" for name, reason in self.left.items()])


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to transformers; once is enough, more does no harm.

    Raises:
        ImportError: transformers is not installed, or is so old that it takes no functions for attention and masks.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"fastattn.integrations.huggingface needs transformers; it is tested with 5.24: {error}"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def use(model: PreTrainedModel) -> Report:
    """Let a model of transformers, and the models inside it, compute attention with fastattn, in place.

    ``model.set_attn_implementation("sdpa")`` changes it back.

    Raises:
        ImportError: as `register`.
        TypeError: not a model of transformers.
        UnsupportedError: a model whose attention does not go through transformers' `AttentionInterface` (Bloom, MPT,
            DeBERTa and others): it would never call fastattn.
    """
    register()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}; "
            "fastattn.replace_attention replaces torch.nn.MultiheadAttention in any model"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedError(f"{type(model).__name__}: {_NOT_TAKEN}")
    model.set_attn_implementation(NAME)
    using, left = [], {}
    for inner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        name = type(inner).__name__
        if not inner._can_set_attn_implementation():
            left[name] = _NOT_TAKEN
        elif inner.config._attn_implementation == NAME:
            using.append(name)
        else:
            left[name] = f"transformers left it at {inner.config._attn_implementation!r}"
    return Report(tuple(dict.fromkeys(using)), left)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for each layer of attention: the function that `register` registers.

    Args:
        module: the layer; its ``is_causal`` (True where it has none) counts where the argument is None.
        query: (B, Hq, Lq, D).
        key, value: (B, Hk, Lk, D) and (B, Hk, Lk, Dv), heads of a group not repeated.
        attention_mask: (B|1, Hq|1, Lq|1, Lk); bool, True = may attend, or floating, which is added and may require a
            gradient (Swin).  None is causal where the layer is and there is more than one query, by position from the
            first key on: keys beyond the last query are then the free places of a static cache.
        dropout: probability; 0 in eval.
        scaling: of the scores; None = 1 / sqrt(D).
        softcap: cap of the scores, or None.
        position_bias: (B|1, Hq|1, Lq|1, Lk) floating, added to the scores, with gradient.
        s_aux: (Hq,), a sink for each head.
        kwargs: what else models hand on; ``output_attentions`` asks for the weights, and nothing else is read.

    Returns:
        Output (B, Lq, Hq, Dv), contiguous, and the weights (B, Hq, Lq, Lk) or None.
    """
    queries = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = queries > 1 and attention_mask is None and causal
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    batch = max(query.shape[0], key.shape[0])  # learned queries have none of their own
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))

    mask: Mask | None = Causal() if causal else None
    bias: Bias | None = None if position_bias is None else DenseBias(position_bias)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = BoolMask(attention_mask)
    elif attention_mask is not None:
        added = DenseBias(attention_mask)
        bias = added if bias is None else bias + added
    call = {"mask": mask, "bias": bias, "scale": scaling, "softcap": softcap, "sink": s_aux, "dropout_p": dropout}
    weights = None
    if kwargs.get("output_attentions"):
        out, weights = _with_weights(query, key, value, **call)
    else:
        out = attention(query, key, value, **call)  # type: ignore[call-overload]
    return out.transpose(1, 2).contiguous(), weights


def _with_weights(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """Output and weights: from one kernel where it gives both, else weights written out beside it, without dropout."""
    problem = lower(query, key, value, **call)
    assert isinstance(problem, Problem)
    if dispatch.gives_weights(problem, None) and call["dropout_p"] < 1:
        out, weights = dispatch.run_with_weights(problem, average=False, leading=0)
        assert weights is not None
        return out, weights.to(query.dtype)
    out, lse = attention(query, key, value, return_lse=True, **call)
    scale = problem.scale
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * scale
    if call["softcap"] is not None:
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
    weights = masked_softmax(scores, mask=call["mask"], bias=call["bias"])
    if call["sink"] is not None:  # its share of the denominator
        weights = weights * -torch.expm1(call["sink"][:, None].to(lse.dtype) - lse)[..., None].to(weights.dtype)
    return out, weights


def make_mask(*args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> Tensor | None:
    """What transformers makes a model's mask with: "sdpa"'s bool mask, or None where `attention_forward` needs none.

    A model that does not hand its attention to a function reads its mask itself, as numbers to add: it gets those.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    takes_functions = config is not None and _takes_functions(type(config))
    return (sdpa_mask if takes_functions else eager_mask)(*args, config=config, **kwargs)


def _takes_functions(config: type[PreTrainedConfig]) -> bool:
    """Whether the models of this configuration are known to hand their attention to a function."""
    from transformers import PreTrainedModel

    module = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    for found in vars(module).values() if module is not None else ():
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__module__ == module.__name__:  # type: ignore[union-attr]
            return found._can_set_attn_implementation()
    return False


# what torch.compiler.assume_constant_result sets (see native.py)
_takes_functions._dynamo_marked_constant = True  # type: ignore[attr-defined]
