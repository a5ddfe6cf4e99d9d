"""Finds and loads the native libraries.  Importing this module loads nothing but what is on disk already: no build,
no download."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

from fastattn import ops as _ops  # noqa: F401  the schemas must exist before a library registers kernels for them

library_path: Path = Path(__file__).parent / "lib" / "libfastattn_cpu.so"
load_error: str | None = None
cuda_library_path: Path = library_path.with_name("libfastattn_cuda.so")
cuda_load_error: str | None = None


def load_cpu_library() -> bool:
    """Load libfastattn_cpu.so once.  False, with the reason in `load_error`, when that cannot be done."""
    return _load_once()


# What torch.compiler.assume_constant_result sets, without the seconds that its import of torch._dynamo takes: the
# compiler then asks while it traces, instead of tracing the file system.
load_cpu_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_cuda_library() -> bool:
    """Load libfastattn_cuda.so once.  False, with the reason in `cuda_load_error`, when that cannot be done."""
    return _load_cuda_once()


load_cuda_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _error_of_loading(path: Path, build: str) -> str | None:
    """Load a library; why it cannot be, and what would make it so, or None."""
    if not path.exists():
        return f"{path} is not there; build it with: {build}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} did not load: {str(error).splitlines()[0]}"
    return None


@lru_cache(maxsize=1)
def _load_once() -> bool:
    global load_error
    load_error = _error_of_loading(library_path, "pip install --no-build-isolation -e .")
    return load_error is None


@lru_cache(maxsize=1)
def _load_cuda_once() -> bool:
    global cuda_load_error
    if torch.version.cuda is None:  # it needs symbols that a torch for CPUs does not have
        cuda_load_error = "this torch is built without CUDA"
    else:
        cuda_load_error = _error_of_loading(
            cuda_library_path, "FASTATTN_CUDA=1 pip install --no-build-isolation -e .   (needs nvcc)"
        )
    return cuda_load_error is None


@lru_cache(maxsize=1)
def cpu_info() -> dict[str, object]:
    """What the native CPU library says of itself and of this processor: the instruction set chosen, those compiled
    in, and the features found.  Empty when the library is not loaded."""
    return json.loads(torch.ops.fastattn.cpu_info()) if load_cpu_library() else {}


@lru_cache(maxsize=1)
def cuda_info() -> dict[str, object]:
    """What the native CUDA library says of itself: the architectures compiled in and the CUDA runtime in it.  Empty
    when the library is not loaded."""
    return json.loads(torch.ops.fastattn.cuda_info()) if load_cuda_library() else {}
