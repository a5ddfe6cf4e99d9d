"""The public function `masked_softmax`: the softmax of attention for scores that are already there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import Bias
from fastattn.functional import dense_rows, lower_mask_and_bias, lower_offset
from fastattn.lowering import Draft
from fastattn.masks import Mask
from fastattn.softmax_problem import SoftmaxProblem
from fastattn.validation import check_floating, check_number, fail

__all__ = ["masked_softmax"]


def masked_softmax(
    scores: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float = 1.0,
    query_offset: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax over the last dimension of scale * scores + bias, with 0 where masked, in one pass over the scores.

    Takes every mask and bias of `fastattn.attention` and treats them the same way: masks of intervals (causal,
    windows, lengths, prefixes) are arithmetic, so what they hide is written as 0 without being read; broadcast masks
    and biases are read as they are, never expanded.  A row that is masked throughout gives 0, with gradient 0 (torch
    gives NaN).  NaN or infinity at a masked place, in scores, bias or the incoming gradient, is never seen.  A place
    whose score plus bias is -inf counts as masked; a row that sees NaN or +inf is NaN where it is not masked.

    Differentiable in the scores and in every bias parameter: with y the result and dy its gradient (the softmax
    Jacobian, for instance Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for the forward)::

        dS      = y * (dy - sum(y * dy))       # gradient of score + bias
        dscores = scale * dS                   # bias parameters sum dS over what they broadcast to

    Only the result is kept for that, not the scores.  Gradients of parameters have their shape, are summed in float32
    (float64 for float64 scores) or wider, and are the same bits on every run.

    Args:
        scores: (B, H, Sq, Sk), float32, float64, bfloat16 or float16; computed in float32 (float64).  Any strides; no
            copy where the last dimension is dense.  Not cast under autocast.
        mask, bias: as in `attention`, for H heads.
        scale: finite number that multiplies the scores, before the bias.
        query_offset: position of row 0 among the columns, an int or an integer tensor (B,); None means Sk - Sq.
        backend: name of the backend to use; None picks the first that can.

    Returns:
        (B, H, Sq, Sk), dtype of the scores, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what was expected and what came.
        fastattn.UnsupportedError: the backend asked for cannot run this call, with its reasons.
    """
    check_floating("scores", scores)
    if scores.dim() != 4:
        fail(ValueError, "scores", "four dimensions (batch, heads, queries, keys)", scores)
    batch, heads, rows, columns = scores.shape
    fields: dict[str, object] = {}
    offset = lower_offset(fields, query_offset, batch, rows, columns, scores.device)
    parameter_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    draft = Draft(batch, heads, rows, columns, 0, scores.device, parameter_dtype, offset, fields)
    lower_mask_and_bias(draft, mask, bias)
    problem = SoftmaxProblem(scores=dense_rows(scores), scale=check_number("scale", scale), **fields)  # type: ignore[arg-type]
    return dispatch.softmax(problem, backend)
