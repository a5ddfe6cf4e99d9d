"""Installs a wheel into a fresh environment in which there is no compiler, and runs it: smoke.py, `info`, `verify`.

    python release/try_wheel.py dist/fastattn-*.whl                  # with the torch of the Python that runs this
    python release/try_wheel.py dist/fastattn-*.whl --torch 2.10.0   # with that one, from an index

A torch that is downloaded need not be one for CPUs, and on x86-64 those on PyPI are not: it comes without the three
gigabytes of CUDA libraries that it asks for, and finds empty ones by their names.  That serves to load libraries and to
compute on the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What torch needs to be imported, beside itself; what fastattn's commands need is less.
REQUIRED = ("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions")
# Torch takes addresses of this one's functions when it is loaded, so it has to be the real one; it is small.
RUNTIME = {"12": "nvidia-cuda-runtime-cu12==12.{minor}.*", "13": "nvidia-cuda-runtime==13.{minor}.*"}
SYSTEM = re.compile(r"(ld-linux.*|lib(c|dl|gcc_s|m|pthread|rt|stdc\+\+)\.so.*)")


class Environment:
    """A fresh virtual environment, and how to run things in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"

    def install(self, *what: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # pip warns of what --no-deps leaves out: that is meant
        done = subprocess.run([*command, *what], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)

    def run(self, *arguments: str, **variables: str) -> None:
        """Run Python with nothing on PATH, away from every checkout."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTATTN"))}
        environment |= {"PATH": str(self.folder / "nothing"), **variables}
        subprocess.run([str(self.python), *arguments], check=True, cwd=self.folder, env=environment)


def borrow_dependencies(environment: Environment) -> None:
    """See what the Python that runs this has installed.  A path added through a .pth file has its own .pth files left
    unread, that of an editable install of fastattn among them."""
    (environment.site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")


def install_torch(environment: Environment, version: str) -> None:
    """This torch, and stand-ins for the CUDA libraries that are not here."""
    environment.install(f"torch=={version}")
    environment.install(*REQUIRED)
    libraries = environment.site / "torch" / "lib"
    cuda = re.search(r"cuda.*= '(\d+)\.(\d+)'", (libraries.parent / "version.py").read_text())
    if cuda is None:
        return
    environment.install(RUNTIME[cuda[1]].format(minor=cuda[2]))
    needed = set()
    for library in libraries.glob("*.so*"):
        dynamic = subprocess.run(
            ["readelf", "--dynamic", "--wide", library], check=True, capture_output=True, text=True
        )
        needed |= set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", dynamic.stdout))
    here = {path.name for path in [*libraries.iterdir(), *environment.site.glob("nvidia/**/*.so*")]}
    for name in sorted(needed - here):
        if not SYSTEM.fullmatch(name):
            compiler = [os.environ.get("CXX", "g++"), "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            nothing = "void stands_in(void) {}\n"
            subprocess.run([*compiler, "-", "-o", str(libraries / name)], input=nothing, text=True, check=True)
    # functions are looked for when they are called, which is never
    (environment.site / "lazy.pth").write_text("import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n")


def upstream_triton_kernels(environment: Environment) -> None:
    """A package of the name that fastattn.triton_kernels has in the checkout, as Triton's own project has one."""
    package = environment.site / "triton_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("upstream = True\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", help="version to install, such as 2.10.0; by default, that of this Python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = Environment(Path(scratch) / "venv")
        environment.install(str(options.wheel))
        if options.torch:
            install_torch(environment, options.torch)
        else:
            borrow_dependencies(environment)
        upstream_triton_kernels(environment)
        environment.run(str(HERE / "smoke.py"), str(environment.site), FASTATTN_STRICT="1")
        environment.run("-m", "fastattn", "info")
        environment.run("-m", "fastattn", "verify", "--dtype", "float32", "--device", "cpu")


if __name__ == "__main__":
    main()
