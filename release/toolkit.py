"""A CUDA toolkit of a given release: the machine's own, or nvcc and its headers from PyPI, in build/cuda-13.2.

    python release/toolkit.py 13.2      # prints CUDA_HOME

PyPI has nvcc from 13.0 on: the packages of CUDA 12 hold ptxas and no compiler.  For those, install NVIDIA's toolkit and
set CUDA_HOME.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402

# Parts of the package cuda-toolkit, which names the versions that belong together.
PARTS = "nvcc,crt,nvvm,cudart,cccl"


def home_of(cuda: str) -> Path | None:
    """What CUDA_HOME must be to compile with this release; None where nvcc on PATH is of it already.

    Raises RuntimeError where it is neither here nor on PyPI.
    """
    nvcc = build_cuda.find_nvcc()
    if nvcc and build_cuda.release(nvcc) == cuda:
        return None
    major = int(cuda.split(".")[0])
    if major < 13:
        raise RuntimeError(f"nvcc {cuda} is not here and PyPI has none before 13.0: install it and set CUDA_HOME to it")
    packages = ROOT / "build" / f"cuda-{cuda}"
    home = packages / "nvidia" / f"cu{major}"
    if not (home / "bin" / "nvcc").exists():
        print(f"nvcc {cuda} is not here: downloading it from PyPI into {packages}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        subprocess.run([*pip, f"cuda-toolkit[{PARTS}]=={cuda}.*"], check=True)
    return home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cuda", help="release, such as 13.2")
    home = home_of(parser.parse_args().cuda)
    if home is None:
        nvcc = build_cuda.find_nvcc()
        assert nvcc is not None
        home = build_cuda.toolkit(nvcc)
    print(home)


if __name__ == "__main__":
    main()
