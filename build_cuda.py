"""The CUDA library, `fastattn/lib/libfastattn_cuda.so`: built by setup.py when asked for, with nvcc, on any machine.

No GPU is needed and no torch with CUDA: the library touches torch through its stable ABI alone, and the CUDA runtime is
linked into it.  It is never built without being asked for, because that takes minutes:

    FASTATTN_CUDA=1 pip install --no-build-isolation -e .

Environment: FASTATTN_CUDA (1: build it), FASTATTN_CUDA_ARCHS (architectures, for instance "80;90a;120", which also asks
for the build), CUDA_HOME (the toolkit; else nvcc on PATH), MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import build_glibc
from build_objects import Unit, compile_all, relative_paths

ROOT = Path(__file__).parent
LIBRARY = Path("fastattn", "lib", "libfastattn_cuda.so")
# Machine code of sm_80 runs on 8.x, that of sm_90a on 9.0; PTX of the newest plain one is for all GPUs that follow.
DEFAULT_ARCHS = "80;90a"
# -compress-all: every image of the library, which makes it less than half as large
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"),
    "-Xfatbin=-compress-all",
]
HOST_FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"),
    # USE_CUDA uncovers the shims for streams; 2.10 is the oldest torch the library is to load in
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-include", str(ROOT / "csrc" / "common" / "own_sstream.h")),
]


def wanted() -> bool:
    """Whether the environment asks for this library."""
    asked = os.environ.get("FASTATTN_CUDA")
    return asked == "1" or (asked != "0" and bool(os.environ.get("FASTATTN_CUDA_ARCHS")))


def architectures(given: str | None = None) -> list[str]:
    """Compute capabilities to build for, such as "80" or "90a": of a list in words, by default the environment's."""
    given = given or os.environ.get("FASTATTN_CUDA_ARCHS") or DEFAULT_ARCHS
    archs = [arch.strip().removeprefix("sm_").replace(".", "") for arch in re.split("[;, ]+", given) if arch.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(re.sub(r"\D", "", arch)) < 80:
            raise RuntimeError(
                f"FASTATTN_CUDA_ARCHS: expected capabilities of 8.0 or newer such as 80;90a, got {arch!r}"
            )
    return archs


def find_nvcc() -> str | None:
    """Path of nvcc, from CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def _found_nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("FASTATTN_CUDA=1 needs nvcc: install the CUDA toolkit, and set CUDA_HOME or PATH to it")
    return nvcc


def release(nvcc: str | None = None) -> str:
    """The release of a toolkit by its nvcc, such as "13.0"; by default of the one that builds."""
    nvcc = nvcc or _found_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no release:\n{said[-2000:]}")
    return found[1]


def toolkit(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself knows it: what is on PATH may be a link or a script."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    if top is None:
        raise RuntimeError(f"{nvcc} does not say where its toolkit is:\n{said[-2000:]}")
    return Path(top[1].strip()).resolve()


def code_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's flags for machine code of every architecture, and for PTX of the newest that newer GPUs can take."""
    flags = [flag for arch in archs for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    portable = [int(arch) for arch in archs if arch.isdigit()]
    if portable:
        flags += ["-gencode", f"arch=compute_{max(portable)},code=compute_{max(portable)}"]
    return flags


def archs_of(instance: Path, archs: Sequence[str]) -> Sequence[str]:
    """What an instance is compiled for: one of sm_90a alone is empty elsewhere, and then never launched."""
    return ["90a"] if instance.stem.startswith("hopper_") and "90a" in archs else archs


def instances() -> list[Path]:
    """The generated kernel instances, the slowest to compile (the widest heads) first."""
    paths = (ROOT / "csrc" / "cuda" / "instances").glob("*.cu")

    def width(path: Path) -> int:
        found = re.search(r"_d(\d+)$", path.stem)
        return int(found[1]) if found else 0

    return sorted(paths, key=lambda path: (-width(path), path.name))


def host_sources() -> list[Path]:
    """Plain C++: what picks tiles and launches, and the operators."""
    cuda = ROOT / "csrc" / "cuda"
    folders = ("features", "rows", "attention", "hopper")
    found = (path for folder in folders for path in sorted(cuda.glob(f"{folder}/*.cpp")))
    return [cuda / "ops.cpp", cuda / "tensor_map.cpp", *found]


def build(
    output: Path, objects: Path, compiler: str, include_paths: Sequence[str], library_paths: Sequence[str]
) -> None:
    """Compile and link the library into `output`; `include_paths` and `library_paths` are torch's."""
    nvcc = _found_nvcc()
    top = toolkit(nvcc)
    archs = architectures()
    device = (nvcc, "-ccbin", compiler, *NVCC_FLAGS)
    known = f'-DFASTATTN_CUDA_ARCHS="{" ".join(archs)}"'  # for `python -m fastattn info`
    includes = (*include_paths, top / "include")
    host = (compiler, *HOST_FLAGS, *relative_paths(ROOT, *includes), known, *(f"-isystem{path}" for path in includes))
    units = [
        Unit((*device, *code_flags(archs_of(path, archs))), path, objects / f"{path.stem}.o") for path in instances()
    ]
    units += [Unit(host, path, objects / f"{path.parent.name}_{path.stem}.o") for path in host_sources()]
    compile_all(units)

    output.parent.mkdir(parents=True, exist_ok=True)
    stub = _stub(objects, compiler)
    paths = [*(f"-L{path}" for path in library_paths), f"-L{stub.parent}", f"-L{top / 'lib64'}", f"-L{top / 'lib'}"]
    libraries = [
        *("-Wl,--as-needed", "-lstdc++", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"),
        *("-Wl,--exclude-libs,ALL", "-lcudart_static", "-lpthread", "-ldl", "-lrt"),
    ]
    command = [compiler, "-shared", *(str(unit.target) for unit in units)]
    build_glibc.link(command, [*paths, *libraries], output, objects / "glibc")


def _stub(objects: Path, compiler: str) -> Path:
    """A library with the name of torch's CUDA library and nothing else, to link against.

    The shims for streams live in libtorch_cuda.so, which a torch for CPUs does not have.  Without its name among the
    needed libraries, loading fails on the first of them.
    """
    source, stub = objects / "stub" / "torch_cuda.c", objects / "stub" / "libtorch_cuda.so"
    if not stub.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("void fastattn_stub_of_libtorch_cuda(void) {}\n")
        subprocess.run(
            [compiler, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source), "-o", str(stub)],
            check=True,
        )
    return stub
