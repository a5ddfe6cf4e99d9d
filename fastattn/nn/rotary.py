"""Rotary position embedding as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastattn.functional import lower_offset
from fastattn.nn.full_precision import FullPrecision
from fastattn.positional.rotary_tables import (
    axial_pairs,
    frequencies_of,
    rotary_angles,
    rotary_tables,
    section_pairs,
    xpos_scale,
)
from fastattn.positional.scaling import RotaryScaling
from fastattn.rotary import Rotary
from fastattn.rotate import apply_rotary
from fastattn.validation import check_index, check_tensor, describe, fail, is_readable

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(FullPrecision):
    """Rotary position embedding with every common layout and scaling rule (Su et al., "RoFormer", 2021).

    Two ways to use it::

        rope = fastattn.nn.RotaryEmbedding(64, base=500000.0, scaling=Llama3Scaling())
        out = fastattn.attention(q, k, v, rotary=rope(k.shape[2]))   # rotated inside the kernel, cache holds raw keys
        q, k = rope.rotate(q, k, positions)                          # rotated before they are cached

    Angles, cos and sin are computed in float64 and stored in float32 whatever the module is cast to: ``.half()``,
    ``.to(torch.bfloat16)`` and autocast leave them alone.  There is no state to save unless frequencies are learned.

    Args:
        head_dim: D.
        base: of the frequencies, base^(-2k/R).
        width: R, how many dimensions rotate; default all.
        trailing: the last R rotate instead of the first.
        interleaved: pairs are (2k, 2k + 1) as in GPT-J instead of (k, k + R/2) as in Llama.
        scaling: a rule of `fastattn.positional.scaling` for longer contexts.
        xpos_base: xPos with this scale base (512 in the paper): queries grow and keys shrink with their position, so
            that scores decay with distance (Sun et al., 2023).  Meant for causal attention.
        axial: number of axes of axial embedding (2 for images): each turns its share of the pairs, with the spectrum
            of R / axial dimensions.  Positions then have a leading dimension of that size, see `grid_positions`.
        sections: sizes of M-RoPE's sections in pairs, for instance (16, 24, 24): one spectrum, dealt out to
            (time, height, width).  Positions then have a leading dimension of len(sections).
        interleaved_sections: deal the pairs out in turn (Qwen3-VL) instead of in runs (Qwen2-VL).
        learned: the frequencies are a parameter, ``inv_freq`` (R/2,) float32.  The rotation then runs in plain torch
            before the kernel, which has no gradient for its tables: d angle = y0 dy1 - y1 dy0 of a rotated pair y,
            and d inv_freq the sum of position * d angle.
        device: of the parameter and of the tables made for a length.

    Raises:
        TypeError, ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        width: int | None = None,
        trailing: bool = False,
        interleaved: bool = False,
        scaling: RotaryScaling | None = None,
        xpos_base: float | None = None,
        axial: int = 1,
        sections: Sequence[int] | None = None,
        interleaved_sections: bool = False,
        learned: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = check_index("head_dim", head_dim, least=2)
        self.width = head_dim if width is None else check_index("width", width, least=2)
        if self.width > head_dim or self.width % 2:
            fail(ValueError, "width", f"an even int <= head_dim = {head_dim}", self.width)
        if scaling is not None and not isinstance(scaling, RotaryScaling):
            fail(TypeError, "scaling", "a rule of fastattn.positional.scaling", describe(scaling))
        if check_index("axial", axial, least=1) > 1 and sections is not None:
            fail(ValueError, "sections", "None with axial > 1", describe(sections))
        self.base, self.scaling, self.xpos_base = base, scaling, xpos_base
        self.trailing, self.interleaved = trailing, interleaved
        self.axes = axial if sections is None else len(sections)
        if xpos_base is not None and self.axes > 1:
            fail(ValueError, "xpos_base", "None with several axes", xpos_base)
        self._spectra = axial
        self._axis_of_pair: Tensor | None = None
        if sections is not None:
            self._axis_of_pair = section_pairs(sections, interleaved=interleaved_sections)
            if len(self._axis_of_pair) != self.width // 2:
                fail(ValueError, "sections", f"numbers that add up to R/2 = {self.width // 2}", describe(sections))
        elif axial > 1:
            self._axis_of_pair = axial_pairs(self.width, axial)
        inv_freq, _ = frequencies_of(self.width, base, scaling, axes=axial)
        if learned and scaling is not None and scaling.needs_length:
            fail(ValueError, "learned", "False with a rule that depends on the length", True)
        self.inv_freq = nn.Parameter(inv_freq.float().to(device)) if learned else None
        # where tables are made: follows the module to another device, its dtype is never looked at
        self.register_buffer("_anchor", torch.empty(0, device=device), persistent=False)
        self._cached: Rotary | None = None
        self._spectrum: tuple[Tensor, float] | None = None

    def extra_repr(self) -> str:
        parts = [f"{self.head_dim}, base={self.base:g}"]
        if self.width != self.head_dim:
            parts.append(f"width={self.width}")
        parts += [f"{name}=True" for name in ("trailing", "interleaved") if getattr(self, name)]
        if self.scaling is not None:
            parts.append(f"scaling={self.scaling}")
        if self.xpos_base is not None:
            parts.append(f"xpos_base={self.xpos_base:g}")
        if self.axes > 1:
            parts.append(f"axes={self.axes}")
        if self.inv_freq is not None:
            parts.append("learned=True")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        self._cached = self._spectrum = None
        return super()._apply(fn, recurse)

    # -- tables ------------------------------------------------------------------------------------------------------

    def tables(
        self, positions: int | Tensor, *, length: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """cos and sin (S, R/2) or (B, S, R/2) float32, and those of the keys where they differ (xPos), else None.

        Args:
            positions: n for 0 ... n - 1 on every axis; or integer or floating (S,) or (B, S), with several axes
                (axes, S) or (axes, B, S).
            length: for rules that depend on it, and the center of xPos; default: the largest position + 1, which has
                to be given where looking would wait for a device.
        """
        positions = self._positions(positions)
        if length is None and self._needs_length:
            if not is_readable(positions):
                fail(ValueError, "length", "given, since reading positions would wait for their device", None)
            length = int(positions.max()) + 1 if positions.numel() else 0
        inv_freq, amplitude = self._frequencies(length, positions.device)
        pairs = None if self._axis_of_pair is None else self._axis_of_pair.to(positions.device)
        angles = rotary_angles(positions, inv_freq, pairs)
        dtype = torch.float64 if self.inv_freq is not None and self.inv_freq.dtype == torch.float64 else torch.float32
        if self.xpos_base is None:
            return *rotary_tables(angles, amplitude, dtype=dtype), None, None
        assert length is not None
        scale = xpos_scale(positions, self.width, length // 2, self.xpos_base)
        cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
        cos, sin, key_cos, key_sin = [t.to(dtype) for t in (cos * scale, sin * scale, cos / scale, sin / scale)]
        return cos, sin, key_cos, key_sin

    def _frequencies(self, length: int | None, device: torch.device) -> tuple[Tensor, float]:
        """inv_freq in float64 on the device, and the amplitude; made once where they do not depend on the length."""
        if self._spectrum is not None and self._spectrum[0].device == device:
            return self._spectrum

        def make() -> tuple[Tensor, float]:
            inv_freq, amplitude = frequencies_of(self.width, self.base, self.scaling, length, axes=self._spectra)
            return inv_freq.to(device), amplitude

        if self.inv_freq is not None:
            return self.inv_freq.double().to(device), make()[1]
        if torch.compiler.is_compiling() or (self.scaling is not None and self.scaling.needs_length):
            return make()
        with torch.inference_mode(False):
            self._spectrum = make()
        return self._spectrum

    @property
    def _needs_length(self) -> bool:
        return self.xpos_base is not None or (self.scaling is not None and self.scaling.needs_length)

    def _positions(self, positions: int | Tensor) -> Tensor:
        """Checked positions (S,) or (B, S), with several axes in front of that."""
        if not isinstance(positions, Tensor):
            rows = torch.arange(check_index("positions", positions, least=0), device=self._anchor.device)
            return rows if self._axis_of_pair is None else rows.expand(self.axes, -1)
        check_tensor("positions", positions)
        many = self._axis_of_pair is not None
        if positions.dim() not in ((2, 3) if many else (1, 2)) or (many and positions.shape[0] != self.axes):
            expected = f"shape ({self.axes}, S) or ({self.axes}, B, S)" if many else "shape (S,) or (B, S)"
            fail(ValueError, "positions", expected, positions)
        return positions

    # -- rotation ----------------------------------------------------------------------------------------------------

    def forward(self, positions: int | Tensor, *, length: int | None = None) -> Rotary:
        """The `rotary` argument of `fastattn.attention`: query i takes the row i + query_offset, key j the row j.

        Args:
            positions: the number of keys, or the position of every key, as in `tables`.  With `query_offset=None`
                queries are the last of them; a tensor of offsets (B,) gives every sequence its own.
            length: as in `tables`.
        """
        if isinstance(positions, Tensor) or self.inv_freq is not None or self._needs_length or self.axes > 1:
            return self._rotary(positions, length)
        if torch.compiler.is_compiling():  # no state inside a graph
            return self._rotary(positions, length)
        if self._cached is None or self._cached.cos.shape[1] < positions:
            # half as long again: a cache that grows by one token per call does not make tables at each
            rows = check_index("positions", positions, least=0)
            with torch.inference_mode(False):  # what is kept from inference serves training as well
                self._cached = self._rotary(max(256, rows + rows // 2), None)
        return self._cached

    def _rotary(self, positions: int | Tensor, length: int | None) -> Rotary:
        cos, sin, key_cos, key_sin = self.tables(positions, length=length)
        return Rotary(
            cos, sin, interleaved=self.interleaved, trailing=self.trailing, key_cos=key_cos, key_sin=key_sin
        )  # fmt: skip

    def rotate(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor | None = None,
        *,
        query_offset: int | Tensor = 0,
        length: int | None = None,
        inplace: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotated query (B, Hq, S, D) and key (B, Hk, S, D), as `fastattn.apply_rotary`, before keys are cached.

        Args:
            positions: of each token, as in `tables`.  None: offset, offset + 1, ...
            query_offset: position of the first token, an int or an integer tensor (B,); only without `positions`.
            length, inplace, backend: as in `tables` and `fastattn.apply_rotary`.
        """
        if positions is None:
            count = check_tensor("query", query).shape[-2]
            offset = lower_offset({}, query_offset, query.shape[0], count, count, query.device)
            rows = torch.arange(count, device=query.device)
            positions = rows + (offset[:, None] if isinstance(offset, Tensor) else offset)
            if self._axis_of_pair is not None:
                positions = positions.expand(self.axes, *positions.shape)
        cos, sin, key_cos, key_sin = self.tables(positions, length=length)
        how = {
            "interleaved": self.interleaved, "trailing": self.trailing, "inplace": inplace, "backend": backend,
        }  # fmt: skip
        if key_cos is None or key_sin is None:
            return apply_rotary(query, key, cos, sin, **how)
        # two tables, so two passes, each beside an operand without heads
        turned, _ = apply_rotary(query, key[:, :0], cos, sin, **how)
        return turned, apply_rotary(query[:, :0], key, key_cos, key_sin, **how)[1]
