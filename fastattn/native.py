"""Finds and loads the native libraries.  Importing this module loads nothing but what is on disk already: no build,
no download.  What cannot be loaded is told in one sentence with the command that mends it; the rest goes on without."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path

import torch

from fastattn import ops as _ops  # noqa: F401  the schemas must exist before a library registers kernels for them

OLDEST_TORCH = (2, 10)
# in a checkout
BUILD_CPU = "pip install --no-build-isolation -e ."
BUILD_CUDA = f"FASTATTN_CUDA=1 {BUILD_CPU}   (needs nvcc)"

_lib = Path(__file__).parent / "lib"
# FASTATTN_CPU_LIBRARY names another build of the library: one with sanitizers (make sanitize), say.
library_path: Path = Path(os.environ.get("FASTATTN_CPU_LIBRARY") or _lib / "libfastattn_cpu.so")
load_error: str | None = None
cuda_library_path: Path = _lib / "libfastattn_cuda.so"
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


def _torch_is_too_old() -> str | None:
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        return (
            f"torch {torch.__version__} is too old for the native kernels, which need 2.10 or newer; "
            "install it with: pip install --upgrade 'torch>=2.10'"
        )
    return None


def _error_of_loading(path: Path, build: str) -> str | None:
    """Load a library; why it cannot be, and what would make it so, or None."""
    if not path.exists():
        return f"{path} is not there; build it with: {build}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # without the path, which the words of the loader begin with
        words = str(error).splitlines()[0].removeprefix(f"{path}: ")
        return f"{path} did not load: {words}; build it for this system with: {build}"
    return None


def _wheel_for_this_cuda() -> str:
    """The command that installs the wheel for torch's CUDA.  An index is named if the metadata have one (setup.py)."""
    from importlib.metadata import metadata

    about = metadata("fastattn")
    urls = dict(str(line).split(", ", 1) for line in about.get_all("Project-URL") or ())
    index = f" --index-url {urls['Wheels']}" if "Wheels" in urls else ""
    wanted = f"{str(about['Version']).partition('+')[0]}+cu{str(torch.version.cuda).replace('.', '')}"
    return f"pip install --force-reinstall --no-deps 'fastattn=={wanted}'{index}"


def _is_a_wheel_for_cpus() -> bool:
    from importlib.metadata import version

    return version("fastattn").endswith("+cpu")


def _error_of_cuda(built_for: str) -> str | None:
    """Why a library with the runtime of this CUDA release cannot serve this torch, if it cannot.

    Within a major release CUDA's runtimes and drivers serve each other; of another one, the driver that suffices for
    torch need not know this library's runtime, and would say so at the first kernel only.
    """
    if built_for.split(".")[0] == str(torch.version.cuda).split(".")[0]:
        return None
    return (
        f"this fastattn is built for CUDA {built_for} and this torch for CUDA {torch.version.cuda}; "
        f"install the one that fits with: {_wheel_for_this_cuda()}"
    )


@lru_cache(maxsize=1)
def _load_once() -> bool:
    global load_error
    load_error = _torch_is_too_old() or _error_of_loading(library_path, BUILD_CPU)
    return load_error is None


@lru_cache(maxsize=1)
def _load_cuda_once() -> bool:
    global cuda_load_error
    cuda_load_error = _why_no_cuda()
    return cuda_load_error is None


def _why_no_cuda() -> str | None:
    if torch.version.cuda is None:  # the library needs symbols that a torch for CPUs does not have
        return "this torch is built without CUDA; install one that has it with: pip install --force-reinstall torch"
    if error := _torch_is_too_old():
        return error
    if not cuda_library_path.exists() and _is_a_wheel_for_cpus():
        return f"this fastattn is built for CPUs; install the one that fits torch with: {_wheel_for_this_cuda()}"
    return _error_of_loading(cuda_library_path, BUILD_CUDA) or _error_of_cuda(
        json.loads(torch.ops.fastattn.cuda_info())["runtime"]
    )


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


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a CUDA library built for these architectures ("80 90a 120") has code that such a GPU can run.

    Machine code runs on its own major capability from its minor one on; with the suffix "a" on that capability alone,
    with "f" on its family, which is the same.  Of the newest without a suffix there is PTX as well (build_cuda.py).
    """
    plain = []
    for name in architectures.split():
        major, minor, suffix = re.fullmatch(r"(\d+)(\d)([af]?)", name).groups()  # type: ignore[union-attr]
        arch = (int(major), int(minor))
        if capability == arch or (suffix != "a" and capability[0] == arch[0] and capability >= arch):
            return True
        if not suffix:
            plain.append(arch)
    return bool(plain) and capability >= max(plain)
