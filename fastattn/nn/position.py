"""What the `position` argument of the attention modules may be, and what a call makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from torch import Tensor, nn

from fastattn.biases import Bias, DenseBias, _parts
from fastattn.functional import attention, lower
from fastattn.nn.absolute import LearnedEmbedding, SinusoidalEmbedding
from fastattn.nn.content import ShawAttention
from fastattn.nn.image import CosineAttention
from fastattn.nn.relative import KERPLE, ALiBi, ClippedBias, T5Bias
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.positional.decomposed import Decomposed
from fastattn.positional.fire import FIRE
from fastattn.positional.shaw import ShawKeys
from fastattn.positional.windows import cosine_operands
from fastattn.problem import Problem
from fastattn.rotary import Rotary
from fastattn.validation import describe, fail

if TYPE_CHECKING:
    from fastattn.nn.multihead_attention import MultiheadAttention
    from fastattn.nn.padding import Packed

OneEncoding: TypeAlias = nn.Module | Bias | Rotary
Encodings: TypeAlias = OneEncoding | Sequence[OneEncoding]
# an encoding, several of them, or a function without arguments that makes one
Position: TypeAlias = Encodings | Callable[[], Encodings]

_EXPECTED = (
    "an encoding of fastattn.nn (RotaryEmbedding, T5Bias, ALiBi, ...), a fastattn Bias or Rotary, a sequence of them, "
    "or a function without arguments that makes one"
)


def make_position(position: Position | None, head_dim: int | None = None) -> nn.Module | Bias | Rotary | None:
    """The attribute to keep for a `position` argument: a module (several: a ModuleList), or an object without state.

    Raises:
        TypeError: it is no encoding, or an absolute one, which belongs to the input of the model.
        ValueError: a rotary embedding of another head dimension.
    """
    if position is None or isinstance(position, (nn.Module, Bias, Rotary)):
        made = position
    elif isinstance(position, (list, tuple)):
        if not all(isinstance(part, nn.Module) for part in position):
            fail(TypeError, "position", "modules of fastattn.nn in the sequence", describe(position))
        made = nn.ModuleList(position)
    elif callable(position):
        return make_position(position(), head_dim)
    else:
        fail(TypeError, "position", _EXPECTED, describe(position))
    for part in parts_of(made):
        if isinstance(part, (SinusoidalEmbedding, LearnedEmbedding)):
            fail(
                TypeError,
                "position",
                "an encoding inside attention (an absolute embedding is added to the embeddings before the model)",
                type(part).__name__,
            )
        if isinstance(part, RotaryEmbedding) and head_dim is not None and part.head_dim != head_dim:
            fail(ValueError, "position", f"a RotaryEmbedding of head_dim = {head_dim}", part.head_dim)
    return made


def copy_position(position: Position | None) -> Position | None:
    """The same encoding with parameters of its own; a function makes another anyway."""
    return position if position is None or _is_function(position) else copy.deepcopy(position)


def _is_function(position: Position) -> bool:
    return callable(position) and not isinstance(position, nn.Module)


def parts_of(position: nn.Module | Bias | Rotary | None) -> Iterator[OneEncoding]:
    if isinstance(position, nn.ModuleList):
        yield from position
    elif position is not None:
        yield position


class Encoding(NamedTuple):
    """What the encodings of one call come to."""

    rotary: Rotary | None = None
    bias: Bias | None = None
    operator: ShawAttention | CosineAttention | None = None

    def run(self, query: Tensor, key: Tensor, value: Tensor, **call: object) -> Tensor:
        """`fastattn.attention` with the encoding; `call` holds its mask, bias, dropout_p and query_offset."""
        arguments = self._arguments(call)
        if self.operator is not None:
            return self.operator(query, key, value, **arguments)
        return attention(query, key, value, **arguments)  # type: ignore[call-overload,no-any-return]

    def lower(self, query: Tensor, key: Tensor, value: Tensor, **call: object) -> Problem:
        """The same call as a `Problem`; of Shaw's vectors only those of the keys, which make the weights."""
        arguments = self._arguments(call)
        if isinstance(self.operator, ShawAttention) and self.operator.key_embeddings is not None:
            shaw = ShawKeys(self.operator.key_embeddings)
            bias = arguments.get("bias")
            arguments["bias"] = shaw if bias is None else bias + shaw  # type: ignore[operator]
        elif isinstance(self.operator, CosineAttention):
            query, key = cosine_operands(query, key, self.operator.logit_scale, largest=self.operator.largest)
            arguments["scale"] = 1.0
        return lower(query, key, value, **arguments)  # type: ignore[arg-type]

    def _arguments(self, call: dict[str, object]) -> dict[str, object]:
        bias: Bias | None = call.get("bias")  # type: ignore[assignment]
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        arguments = {**call, "bias": bias}
        return arguments if self.rotary is None else {**arguments, "rotary": self.rotary}


NO_ENCODING = Encoding()


def encode(position: nn.Module | Bias | Rotary | None, key_length: int, first: int = 0) -> Encoding:
    """The encoding of a call whose keys stand at the positions first ... first + key_length - 1.

    Raises:
        TypeError: a module that gives neither a Bias nor a Rotary.
        ValueError: several rotations; one that depends on absolute positions and does not know them (`first` > 0).
    """
    if position is None:
        return NO_ENCODING
    rotary: Rotary | None = None
    bias: Bias | None = None
    operator: ShawAttention | CosineAttention | None = None
    for part in parts_of(position):
        if isinstance(part, (ShawAttention, CosineAttention)):
            if operator is not None:
                fail(ValueError, "position", "at most one of ShawAttention and CosineAttention", describe(position))
            operator = part
            continue
        if isinstance(part, RotaryEmbedding):
            given: object = part(first + key_length)
        else:
            given = part() if isinstance(part, nn.Module) else part
        if isinstance(given, Rotary):
            if rotary is not None:
                fail(ValueError, "position", "at most one rotation", describe(position))
            rotary = _rotary_from(given, first) if first else given
        elif isinstance(given, Bias):
            if first:
                _check_relative(given)
            bias = given if bias is None else bias + given
        else:
            fail(TypeError, "position", "a module whose call gives a fastattn Bias or Rotary", describe(given))
    if rotary is not None and isinstance(operator, ShawAttention):
        fail(ValueError, "position", "ShawAttention without a rotation", describe(position))
    return Encoding(rotary, bias, operator)


def _rotary_from(rotary: Rotary, first: int) -> Rotary:
    """The tables without their first rows, so that row 0 is the position `first`."""
    return Rotary(
        rotary.cos[:, first:],
        rotary.sin[:, first:],
        rotary.interleaved,
        trailing=rotary.trailing,
        key_cos=rotary.key_cos[:, first:],
        key_sin=rotary.key_sin[:, first:],
    )


_BY_DISTANCE = (ALiBi, ClippedBias, KERPLE, ShawAttention, T5Bias)
_BY_TABLE = (RotaryEmbedding, Rotary, CosineAttention)  # told of each token's position, or without one


def can_pack(position: nn.Module | Bias | Rotary | None, *, gaps: bool) -> bool:
    """Whether tokens of several sequences in a row can have this encoding (`encode_packed`).

    With `gaps`, tokens that stand next to each other need not have done so in their sequence.
    """
    kinds = _BY_TABLE if gaps else (*_BY_TABLE, *_BY_DISTANCE)
    return all(isinstance(part, kinds) for part in parts_of(position))


def encode_packed(position: nn.Module | Bias | Rotary | None, packed: Packed) -> Encoding:
    """The encoding of a call whose tokens are those of a batch, sequence after sequence, each from position 0."""
    encoding = encode(position, packed.length)
    if encoding.rotary is None:
        return encoding

    def rows(table: Tensor) -> Tensor:
        return table[packed.sequences if table.shape[0] > 1 else 0, packed.positions][None]

    rotary = encoding.rotary
    own = rotary.key_cos is rotary.cos
    return encoding._replace(
        rotary=Rotary(
            rows(rotary.cos),
            rows(rotary.sin),
            rotary.interleaved,
            trailing=rotary.trailing,
            key_cos=None if own else rows(rotary.key_cos),
            key_sin=None if own else rows(rotary.key_sin),
        )
    )


def _check_relative(bias: Bias) -> None:
    for part in _parts(bias):
        if isinstance(part, (FIRE, DenseBias, Decomposed)):
            fail(
                ValueError,
                "position",
                "a bias of distances where a sliding cache has dropped keys",
                f"{type(part).__name__}, which depends on the position itself",
            )


def own_position(module: MultiheadAttention) -> nn.Module | Bias | Rotary | None:
    """The module's encoding; a replaced module of torch has none."""
    # where there is none, getattr by itself makes and drops an error with a sentence in it, in more than a microsecond
    if "position" in module._modules or "position" in module.__dict__ or hasattr(type(module), "position"):
        return module.position
    return None
