"""The native build: shared libraries in `fastattn/lib`, loaded with `torch.ops.load_library`.

`libfastattn_cpu.so` is always built, `libfastattn_cuda.so` when it is asked for (build_cuda.py).

`csrc/cpu/kernels.cpp` is compiled once per instruction set with that set's flags; which one runs is decided at run
time, so a binary built anywhere runs everywhere (never -march=native).  The library has no Python symbol in it and
touches libtorch through its stable ABI only: the wheel is tagged `py3-none-<platform>`.  Nothing is downloaded.
Metadata is in pyproject.toml, the version in build_version.py; release/README.md tells how wheels to hand out are made.

Environment: CXX (the compiler), MAX_JOBS (parallel compilations), FASTATTN_CXXFLAGS (extra flags, e.g. sanitizers),
FASTATTN_SKIP_NATIVE=1 (pure Python: every call takes the reference backend), FASTATTN_CUDA=1 (the CUDA library too),
FASTATTN_LOCAL_VERSION=1 (+cpu or +cu130 in the version), FASTATTN_INDEX_URL (where this wheel's siblings are found).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
# a build backend does not look beside setup.py by itself
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
import build_glibc  # noqa: E402
import build_native  # noqa: E402
import build_version  # noqa: E402
from build_objects import Unit, compile_all, relative_paths  # noqa: E402

LIBRARY = Path("fastattn", "lib", "libfastattn_cpu.so")
# Where each extension's library goes, by the extension's name.
LIBRARIES = {"fastattn.lib." + path.stem: path for path in (LIBRARY, build_cuda.LIBRARY)}

# No -ffast-math: NaN and infinity have meaning here.  Contraction into fused multiply-adds is wanted.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-semantic-interposition"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"),
    # GCC 12's own intrinsics headers set these off (`__m512 __Y = __Y`)
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_ISAS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": AVX2,
}


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets to compile for this architecture, the slowest to compile first."""
    isas = dict(X86_ISAS) if platform.machine() in ("x86_64", "AMD64") else {}
    return {**isas, "baseline": []}


class BuildNative(build_ext):
    """Builds each library as its module says, and puts it where fastattn looks for it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(LIBRARIES[fullname])

    def get_ext_fullpath(self, ext_name: str) -> str:
        return str(Path(self.build_lib) / LIBRARIES[ext_name])

    def run(self) -> None:
        if self.editable_mode:  # where a wheel's objects are, instead of a folder that is gone afterwards
            base = self.get_finalized_command("build").build_base
            self.build_temp = str(Path(base) / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        super().run()
        if self.editable_mode or self.inplace:
            build_native.build()

    def copy_extensions_to_source(self) -> None:
        """For editable installs.  Moved into place, so that a process that has the old library mapped keeps it."""
        for ext in self.extensions:
            target = ROOT / LIBRARIES[ext.name]
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".so.new")
            shutil.copyfile(self.get_ext_fullpath(ext.name), fresh)
            os.replace(fresh, target)

    def build_extension(self, ext: Extension) -> None:
        import torch.utils.cpp_extension as cpp_extension

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("fastattn needs a C++20 compiler: install g++ (>= 12), or set CXX")
        build = build_cuda.build if LIBRARIES[ext.name] == build_cuda.LIBRARY else build_cpu
        build(
            Path(self.get_ext_fullpath(ext.name)),
            Path(self.build_temp) / LIBRARIES[ext.name].stem,
            compiler,
            cpp_extension.include_paths(),
            cpp_extension.library_paths(),
        )


def build_cpu(
    output: Path, objects: Path, compiler: str, include_paths: Sequence[str], library_paths: Sequence[str]
) -> None:
    """Compiles each (source, instruction set) with its own flags, in parallel, and links them."""
    flags = [*CXX_FLAGS, *relative_paths(ROOT, *include_paths), *os.environ.get("FASTATTN_CXXFLAGS", "").split()]
    csrc = ROOT / "csrc"
    torch = ["-include", str(csrc / "common" / "own_sstream.h"), *(f"-isystem{path}" for path in include_paths)]
    units = [
        Unit((compiler, *flags, *options, f"-DFASTATTN_ISA={isa}"), csrc / "cpu" / "kernels.cpp", objects / f"{isa}.o")
        for isa, options in isa_flags().items()
    ]
    units.append(Unit((compiler, *flags, *torch), csrc / "ops.cpp", objects / "ops.o"))
    units.append(Unit((compiler, *flags), csrc / "cpu" / "dispatch.cpp", objects / "dispatch.o"))
    compile_all(units)
    output.parent.mkdir(parents=True, exist_ok=True)
    libraries = [*(f"-L{path}" for path in library_paths), "-Wl,--as-needed", "-lstdc++", "-ltorch_cpu"]
    command = [compiler, "-shared", *flags, *(str(unit.target) for unit in units)]
    build_glibc.link(command, libraries, output, objects / "glibc")


class PlatformWheel(bdist_wheel):
    """A wheel for any Python of one platform: the library is not tied to an interpreter."""

    def run(self) -> None:
        # what an earlier build left there would be packed too: modules that are gone, a CUDA library for other GPUs
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class PlainSdist(sdist):
    """Sources are not for one build: their version has no local part."""

    def run(self) -> None:
        self.distribution.metadata.version = build_version.VERSION
        super().run()


def packages() -> tuple[list[str], dict[str, str]]:
    """Packages of the wheel and where they lie; `triton_kernels` and `bench` live at the top of the checkout."""
    outside = {"fastattn.triton_kernels": "triton_kernels", "fastattn.bench": "bench"}
    directories = {name: folder for name, folder in outside.items() if (ROOT / folder / "__init__.py").exists()}
    names = [".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("fastattn/**/__init__.py")]
    for name, folder in directories.items():
        inner = [path.parent.relative_to(ROOT / folder).parts for path in (ROOT / folder).glob("**/__init__.py")]
        names += [".".join([name, *parts]) for parts in inner]
    return sorted(names), directories


def project_urls() -> dict[str, str]:
    """Where the wheels for other CUDA versions are, for fastattn/native.py to name in its errors."""
    index = os.environ.get("FASTATTN_INDEX_URL")
    return {"Wheels": index} if index else {}


names, directories = packages()
# The source list only tells setuptools that there is something to build.
extensions = [Extension("fastattn.lib.libfastattn_cpu", ["csrc/ops.cpp"])]
if build_cuda.wanted():
    extensions.append(Extension("fastattn.lib.libfastattn_cuda", ["csrc/cuda/ops.cpp"]))
setup(
    version=build_version.version(build_cuda.release() if build_cuda.wanted() else None),
    project_urls=project_urls(),
    packages=names,
    package_dir=directories,
    package_data={"fastattn": ["py.typed"], "fastattn.bench": ["*.j2"]},
    include_package_data=False,
    ext_modules=extensions if os.environ.get("FASTATTN_SKIP_NATIVE") != "1" else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel, "sdist": PlainSdist},
)
