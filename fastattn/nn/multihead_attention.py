"""A drop-in `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.nn.cache import KVCache, MemoryCache
from fastattn.nn.classes import as_leaf, share_state
from fastattn.nn.core import multi_head_attention
from fastattn.nn.position import Encodings, Position, make_position
from fastattn.validation import check_index, fail

if TYPE_CHECKING:
    from fastattn.nn.padding import Packed


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` computed by fastattn: same arguments, same parameters, same results.

    A subclass, so `isinstance` checks, the order of initialisation (same seed, same weights), ``state_dict`` keys in
    both directions, attributes, ``deepcopy`` and ``pickle`` are torch's own.  Only ``forward`` differs.  Weights are
    read as attributes at every call and nothing is cached, so parametrizations, pruning, weight sharing and
    `torch.func.functional_call` work.

    Args:
        embed_dim: E, the model dimension.
        num_heads: H; must divide E.
        dropout: probability of dropping an attention weight while training.
        bias: whether the projections have biases.
        add_bias_kv: one learned key and value more for every sequence.
        add_zero_attn: one zero key and value more for every sequence.
        kdim, vdim: features of keys and values; default E.
        batch_first: inputs and outputs are (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        position: a positional encoding inside attention: a module of `fastattn.nn` (`RotaryEmbedding(E // H)`,
            `T5Bias(H)`, `ALiBi(H)`, `ShawAttention`, ...), a `fastattn` Bias or Rotary, several of these in a
            sequence, or a function without arguments that makes one.  Any module whose call without arguments gives
            a Bias or a Rotary will do.  It becomes the submodule `position`, with its parameters in the state dict.
            Queries and keys both start at position 0.  Absolute embeddings (`SinusoidalEmbedding`,
            `LearnedEmbedding`) are added to the input of a model and are refused here.
        num_kv_heads: heads of keys and values, a divisor of H (grouped-query attention, Ainslie et al., 2023; 1 is
            multi-query attention).  The projections have (E + 2 Hk D) rows in the packed case and Hk D each
            otherwise.  Default H.

    Where it differs from torch, on purpose:

    * A query whose keys are all masked (bool masks or -inf) attends to nothing: its attention is 0, so its output is
      ``out_proj.bias``, its weights are 0, its gradients 0.  torch returns NaN for it or 0, depending on the path it
      takes.  ``finfo.min`` is a number, not a mask: a row full of it is the uniform average, as in torch.
    * ``is_causal=True`` without ``attn_mask`` is a causal mask (query i sees keys j <= i), alone or on top of
      ``key_padding_mask``.  torch raises an error, or ignores it on its inference fast path.  With ``attn_mask`` it
      is the hint torch documents: trusted when neither weights nor a padding mask are in play, otherwise the mask
      counts.  The keys of ``add_bias_kv`` and ``add_zero_attn`` are visible either way, as under the mask itself;
      torch's hint hides them.
    * bool and float masks may be mixed without a warning; a float32 mask is taken for every dtype of the query.
    * Dropout draws from Philox keyed on the place of each weight; seeds do not reproduce torch's masks.  The weights
      returned are those of the very call, after dropout, as in torch.
    * ``out_proj`` is called, not only read, so its hooks run.
    * The output is always contiguous; torch's may be a transposed view.
    * It is not scriptable by `torch.jit.script`; use `torch.compile` or `torch.export`.
    * `torch.nn.TransformerEncoderLayer` bypasses any ``self_attn`` in inference by a fused operator that only takes
      its weights.  `fastattn.replace_attention` turns that off; a module assigned by hand warns when it is bypassed.

    No derivative of a derivative and no forward-mode derivative exists for the fused kernels; both raise an error.
    Nested tensors go through torch's own implementation, which takes some in inference and refuses the rest.

    Shapes and formula: Vaswani et al., "Attention is all you need", 2017, and the documentation of
    `torch.nn.MultiheadAttention`.
    """

    num_kv_heads: int | None = None  # as many as query heads, as in a replaced module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Position | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if num_kv_heads is not None and check_index("num_kv_heads", num_kv_heads, least=1) != num_heads:
            self._group_heads(num_kv_heads)
        if position is not None:
            if add_bias_kv or add_zero_attn:
                fail(ValueError, "position", "None with add_bias_kv or add_zero_attn", type(position).__name__)
            self.position = make_position(position, self.head_dim)

    def _group_heads(self, num_kv_heads: int) -> None:
        """Fewer rows in the projections of keys and values, initialised as torch's."""
        if self.num_heads % num_kv_heads:
            fail(ValueError, "num_kv_heads", f"a divisor of num_heads = {self.num_heads}", num_kv_heads)
        self.num_kv_heads = num_kv_heads
        rows = self.head_dim * num_kv_heads

        def smaller(name: str, *shape: int) -> None:
            have = getattr(self, name)
            if have is not None:
                setattr(self, name, torch.nn.Parameter(have.new_empty(shape)))

        smaller("in_proj_weight", self.embed_dim + 2 * rows, self.embed_dim)
        smaller("k_proj_weight", rows, self.kdim)
        smaller("v_proj_weight", rows, self.vdim)
        smaller("in_proj_bias", self.embed_dim + 2 * rows)
        smaller("bias_k", 1, 1, rows)
        smaller("bias_v", 1, 1, rows)
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        position: Encodings | None = None,
        cache: KVCache | MemoryCache | None = None,
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries over keys and values.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, or (L, E) without a batch.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S).  bool: True = ignore this key.  Floating (float32 or the query's dtype):
                added to the scores; may require a gradient.
            need_weights: also return the attention weights.  On CPUs one kernel gives both and saves nothing of the
                weights' size for the backward; on GPUs the weights are computed on top of the fused kernel, in the
                memory of the returned tensor.  Pass False where they are not used.
            attn_mask: (L, S) or (N * H, L, S), index n * H + h; bool with True = may not attend, or floating.
            average_attn_weights: average the returned weights over the heads.
            is_causal: see the class.
            position: an encoding for this call, as a stack passes the one that its layers share; not a function, and
                only for a module without one.
            cache: a `KVCache`: self-attention over the tokens it holds and the new ones, causal, whatever `is_causal`
                says; `attn_mask` must be None, `key_padding_mask` is bool and covers the new tokens.  A `MemoryCache`:
                attention over a memory that is projected at the first call only.
            packed: from a `TransformerEncoder` that does without padding: query, key and value are the tokens of its
                batch, one sequence after the other, and each attends to its own.

        Returns:
            Output in the query's layout, and the weights (N, L, S), or (N, H, L, S) without averaging, without N for
            unbatched input; None without need_weights.  S counts the added bias and zero keys, which come last.

        Raises:
            AssertionError, RuntimeError: ranks, sizes or dtypes that do not fit, with torch's messages.
            ValueError: `dropout` is not a probability; a position or a cache beside bias and zero keys.
            NotImplementedError: on second or forward-mode derivatives, when they are asked for.
        """
        if isinstance(query, torch.fx.Proxy):
            call = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return as_leaf(self, call, {"position": position, "cache": cache, "packed": packed})
        if _is_foreign(query, key, value):
            if position is not None or cache is not None or self.num_kv_heads or hasattr(self, "position"):
                fail(
                    NotImplementedError,
                    "query, key, value",
                    "plain dense tensors with position, num_kv_heads or a cache, which torch's implementation lacks",
                    type(query).__name__,
                )
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return multi_head_attention(
            self,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            position=position,
            cache=cache,
            packed=packed,
        )

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """torch's method of this name, which only its fused inference paths call.

        When it is not this module that is running, the caller is about to bypass it, so say so.
        """
        if not query.is_nested:
            warnings.warn(
                "a fused inference path of torch is about to bypass fastattn.nn.MultiheadAttention and use its weights "
                "directly; call fastattn.replace_attention(model) to turn that path off",
                RuntimeWarning,
                stacklevel=3,
            )
        return super().merge_masks(attn_mask, key_padding_mask, query)

    @classmethod
    def from_torch(cls, mha: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """A fastattn module to put in the place of `mha`.

        Parameters, buffers, submodules (also parametrizations) and hooks are the same objects, not copies, so
        optimizers, tied weights and hook handles stay valid; the training flag and plain attributes are taken over as
        they are now.  `mha` itself is left as it is.  A hook registered on either later runs for both.

        Raises:
            TypeError: `mha` is not a `torch.nn.MultiheadAttention`, or of a subclass, which may compute something else.
            ValueError: its ``forward`` is overridden on the instance.
        """
        return share_state(mha, cls)


def _is_foreign(*tensors: Tensor) -> bool:
    """Whether only torch's own implementation knows these tensors."""
    return any(x.is_nested for x in tensors) or _overrides_torch(*tensors)


def _overrides_torch(*tensors: Tensor) -> bool:
    """Whether a tensor type handles torch functions by itself, so that torch's function must be the one it sees."""
    for x in tensors:
        if type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
            continue
        handler = getattr(type(x), "__torch_function__", None)
        if handler is None or handler is torch._C._disabled_torch_function_impl:
            continue
        if getattr(handler, "__func__", None) is not torch.Tensor.__torch_function__.__func__:
            return True
    return False
