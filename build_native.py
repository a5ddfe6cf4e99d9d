"""Builds `fastattn._native`: the CUDA kernels for the simulator, with g++, as a Python module for developers.

`setup.py` calls `build` for editable installs and leaves it out of wheels.  One object per source, in parallel, and
only what changed: dependencies are what the compiler says they are.

Environment: FASTATTN_NATIVE=0 (do not build), CXX, MAX_JOBS, FASTATTN_NATIVE_CXXFLAGS (extra flags).
Alone: python build_native.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from build_objects import Unit, compile_all

ROOT = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"

FLAGS = [
    # -fno-trapping-math: selects between floats become vector code, as in the CPU library
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-g1"),
    # a local variable that is read before it is written holds a strange number, not yesterday's right one
    "-ftrivial-auto-var-init=pattern",
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    # GCC's warning does not see that what a loop reads an earlier loop wrote; the pattern above is the real check
    "-Wno-maybe-uninitialized",
]


def sources() -> list[Path]:
    """Host sources and kernel instances.  Instances first: they take longest."""
    instances = [*CUDA.glob("instances/*.cu"), *CUDA.glob("instruction_tests/*instances.cu")]
    host = [
        path
        for folder in ("features", "attention", "hopper", "rows", "sim", "native")
        for path in (CUDA / folder).glob("*.cpp")
    ]
    return [*sorted(instances), *sorted(host)]


def module_path() -> Path:
    return ROOT / "fastattn" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def reason_not_to_build() -> str | None:
    if os.environ.get("FASTATTN_NATIVE") == "0":
        return "FASTATTN_NATIVE=0"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def build(root: Path = ROOT) -> Path | None:
    """Compiles and links what changed.  The module's path, or None, with a line that says why there is none.

    Raises RuntimeError with the compiler's words where a source does not compile.
    """
    if reason := reason_not_to_build():
        print(f"fastattn._native is not built: {reason}")
        return None
    import pybind11

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("fastattn._native needs a C++20 compiler: install g++ (>= 12), or set CXX")
    objects = root / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    extra = os.environ.get("FASTATTN_NATIVE_CXXFLAGS", "").split()
    units = []
    for source in sources():
        python = includes if source.parent.name == "native" else []
        target = objects / ("-".join(source.relative_to(CUDA).with_suffix("").parts) + ".o")
        units.append(Unit((compiler, *FLAGS, *extra, *python, "-x", "c++"), source, target))
    compile_all(units)
    targets = [unit.target for unit in units]

    module = module_path()
    if module.exists() and all(target.stat().st_mtime <= module.stat().st_mtime for target in targets):
        return module
    # moved into place, so that a process that has the old module mapped keeps it
    fresh = module.with_suffix(".new")
    subprocess.run([compiler, "-shared", *map(str, targets), "-o", str(fresh)], check=True)
    os.replace(fresh, module)
    return module


if __name__ == "__main__":
    print(build())
