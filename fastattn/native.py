"""Finds and loads the native library.  Importing this module loads nothing but what is on disk already: no build,
no download."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

from fastattn import ops as _ops  # noqa: F401  the schemas must exist before a library registers kernels for them

library_path: Path = Path(__file__).parent / "lib" / "libfastattn_cpu.so"
load_error: str | None = None


def load_cpu_library() -> bool:
    """Load libfastattn_cpu.so once.  False, with the reason in `load_error`, when that cannot be done."""
    return _load_once()


# What torch.compiler.assume_constant_result sets, without the seconds that its import of torch._dynamo takes: the
# compiler then asks while it traces, instead of tracing the file system.
load_cpu_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _load_once() -> bool:
    global load_error
    if not library_path.exists():
        load_error = f"{library_path} is not there; build it with: pip install --no-build-isolation -e ."
        return False
    try:
        torch.ops.load_library(str(library_path))
    except (OSError, RuntimeError) as error:
        load_error = f"{library_path} did not load: {str(error).splitlines()[0]}"
        return False
    return True


@lru_cache(maxsize=1)
def cpu_info() -> dict[str, object]:
    """What the native CPU library says of itself and of this processor: the instruction set chosen, those compiled
    in, and the features found.  Empty when the library is not loaded."""
    return json.loads(torch.ops.fastattn.cpu_info()) if load_cpu_library() else {}
