"""What is in a wheel, read from the file itself, and whether that is what it should be.

    python release/report.py dist/*.whl                                   # prints
    python release/report.py dist/*.whl --cuda 13.0 --archs "80;90a"      # and checks

nm and readelf (binutils) read the libraries, torch-abi-audit what they need of torch, cuobjdump (in the package triton)
the code for GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
import build_version  # noqa: E402

LIMIT = 60 * 10**6  # bytes of a wheel for four architectures: the goal
SYSTEM = (
    "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
)  # fmt: skip
# Of torch, the libraries that hold the shims of its stable ABI.
TORCH = {"libfastattn_cpu.so": ("libtorch_cpu.so",), "libfastattn_cuda.so": ("libtorch_cpu.so", "libtorch_cuda.so")}
OLDEST_TORCH = "2.10.0"
# What every C compiler puts into a library, resolved or not.
WEAK = ("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__")


@dataclass
class Library:
    """A native library of a wheel."""

    name: str
    size: int
    needed: list[str]
    oldest: dict[str, str]  # the youngest version it asks for, of each of GLIBC, GLIBCXX, CXXABI, GCC
    torch_abi: str  # the oldest torch with all that it asks for, "unstable" if that is not of the stable ABI
    foreign_symbols: list[str]  # neither of torch's stable ABI nor versioned, as all of the system's are
    machine_code: list[str] = field(default_factory=list)  # "80", "90a"
    ptx: list[str] = field(default_factory=list)
    kernels: int = 0

    @classmethod
    def read(cls, path: Path) -> Library:
        dynamic = _run("readelf", "--dynamic", "--wide", path)
        symbols = [line.split()[-1] for line in _run("nm", "--dynamic", "--undefined-only", path).splitlines()]
        oldest: dict[str, tuple[int, ...]] = {}
        for family, version in re.findall(r"@([A-Z]+)_([\d.]+)", " ".join(symbols)):
            oldest[family] = max(oldest.get(family, ()), tuple(map(int, version.split("."))))
        torch = [name for name in symbols if re.match(r"(aoti_)?torch_", name)]
        library = cls(
            name=path.name,
            size=path.stat().st_size,
            needed=sorted(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", dynamic)),
            oldest={family: ".".join(map(str, version)) for family, version in sorted(oldest.items())},
            torch_abi=_torch_abi(path),
            foreign_symbols=[name for name in symbols if "@" not in name and name not in (*torch, *WEAK)],
        )
        if "cuda" in path.name:
            code = re.findall(r"\.sm_(\w+)\.cubin", _run(_cuobjdump(), "--list-elf", path))
            library.machine_code = sorted(set(code), key=_by_number)
            library.kernels = len(code) // max(1, len(library.machine_code))
            ptx = re.findall(r"\.sm_(\w+)\.ptx", _run(_cuobjdump(), "--list-ptx", path))
            library.ptx = sorted(set(ptx), key=_by_number)
        return library

    def lines(self) -> list[str]:
        young = ", ".join(f"{family} {version}" for family, version in self.oldest.items())
        lines = [
            f"{self.name}: {self.size / 1e6:.2f} MB",
            f"  needs {' '.join(self.needed)}",
            f"  asks for {young}; torch's stable ABI of {self.torch_abi}",
        ]
        if self.machine_code:
            lines.append(
                f"  machine code for sm_{' sm_'.join(self.machine_code)}, {self.kernels} files of kernels each"
            )
            lines.append(f"  PTX for {' '.join(f'compute_{arch}' for arch in self.ptx) or 'nothing'}")
        return lines


@dataclass
class Contents:
    """What a wheel is and holds."""

    path: Path
    size: int
    sha256: str
    version: str
    tags: list[str]
    requires: list[str]
    files: list[str]
    unpacked: int
    libraries: dict[str, Library]

    @classmethod
    def read(cls, wheel: Path) -> Contents:
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
            (about,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = HeaderParser().parsestr(archive.read(about).decode())
            tags = HeaderParser().parsestr(archive.read(about.replace("METADATA", "WHEEL")).decode()).get_all("Tag")
            native = [name for name in archive.namelist() if name.endswith(".so")]
            libraries = [Library.read(Path(archive.extract(name, scratch))) for name in native]
            return cls(
                path=wheel,
                size=wheel.stat().st_size,
                sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
                version=metadata["Version"],
                tags=sorted(tags or ()),
                requires=[line for line in metadata.get_all("Requires-Dist") or () if "extra" not in line],
                files=archive.namelist(),
                unpacked=sum(info.file_size for info in archive.infolist()),
                libraries={library.name: library for library in libraries},
            )

    def __str__(self) -> str:
        modules = [name for name in self.files if name.endswith(".py")]
        triton = [name for name in modules if name.startswith("fastattn/triton_kernels/")]
        lines = [
            self.path.name,
            f"sha256 {self.sha256}",
            f"{self.size / 1e6:.2f} MB, {self.unpacked / 1e6:.2f} MB unpacked",
            f"version {self.version}, {' '.join(self.tags)}",
            f"requires {', '.join(self.requires)}",
            f"{len(self.files)} files: {len(modules)} modules, {len(triton)} of them of the Triton kernels, and",
        ]
        return "\n".join([*lines, *(line for library in self.libraries.values() for line in library.lines()), ""])


def problems(contents: Contents, cuda: str | None, archs: Sequence[str]) -> list[str]:
    """What is not as it should be in a wheel for this CUDA release (None: for CPUs) and these architectures."""
    found = []

    def check(holds: bool, otherwise: str) -> None:
        if not holds:
            found.append(otherwise)

    version, local = contents.version, build_version.local_label(cuda)
    check(version == f"{build_version.VERSION}+{local}", f"the version is {version}; it should end in +{local}")
    _, named, _, tags = parse_wheel_filename(contents.path.name)
    check(str(named) == version, f"the name says {named}, the metadata {version}")
    check(
        {str(tag) for tag in tags} == set(contents.tags), f"the name says {contents.path.name}, WHEEL {contents.tags}"
    )
    check(all(tag.startswith("py3-none-manylinux_") for tag in contents.tags), f"tags {contents.tags}")
    expected = {"libfastattn_cpu.so"} | ({"libfastattn_cuda.so"} if cuda else set())
    check(set(contents.libraries) == expected, f"libraries {sorted(contents.libraries)}; expected {sorted(expected)}")
    check(not any("_native" in name for name in contents.files), "it holds the developers' module fastattn._native")
    check("fastattn/triton_kernels/attention_forward.py" in contents.files, "no Triton kernels")
    check(contents.size <= LIMIT, f"{contents.size / 1e6:.1f} MB; the goal is {LIMIT / 1e6:.0f}")
    for library in contents.libraries.values():
        others = set(library.needed) - {*SYSTEM, *TORCH.get(library.name, ())}
        check(not others, f"{library.name} needs {sorted(others)}")
        missing = set(TORCH.get(library.name, ())) - set(library.needed)
        check(not missing, f"{library.name} does not name {sorted(missing)}: loading would fail on its first shim")
        check(not library.foreign_symbols, f"{library.name} asks for {library.foreign_symbols}")
        check(library.torch_abi == OLDEST_TORCH, f"{library.name} needs the ABI of torch {library.torch_abi}")
    if cuda and "libfastattn_cuda.so" in contents.libraries:
        library = contents.libraries["libfastattn_cuda.so"]
        check(library.machine_code == sorted(archs, key=_by_number), f"machine code for {library.machine_code}")
        newest = max((arch for arch in archs if arch.isdigit()), key=int, default=None)
        check(
            library.ptx == ([newest] if newest else []), f"PTX for {library.ptx}; expected the newest, {newest}, alone"
        )
    return found


def expect(contents: Contents, cuda: str | None, archs: str) -> None:
    """Raises RuntimeError with everything that is not as it should be."""
    if found := problems(contents, cuda, build_cuda.architectures(archs) if cuda else ()):
        raise RuntimeError(f"{contents.path.name}: " + "; ".join(found))


def _by_number(arch: str) -> tuple[int, str]:
    return int(re.sub(r"\D", "", arch)), arch


def _torch_abi(library: Path) -> str:
    audit = json.loads(_run(Path(sys.executable).with_name("torch-abi-audit"), "--json", library))["bundled_libs"][0][
        "torch"
    ]
    return str(audit["min_torch_version"]) if audit["stable"] else "unstable"


def _cuobjdump() -> Path:
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("cuobjdump comes with triton, which is not installed; install it with: pip install triton")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--cuda", help="check that it is a wheel for this CUDA release; cpu: for none")
    parser.add_argument("--archs", default="", help="the architectures it was built for")
    options = parser.parse_args()
    for wheel in options.wheels:
        contents = Contents.read(wheel)
        print(contents)
        if options.cuda:
            expect(contents, None if options.cuda == "cpu" else options.cuda, options.archs)


if __name__ == "__main__":
    main()
