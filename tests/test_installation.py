"""What an installation that does not fit says: one sentence with the command that mends it; and that the rest works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn
from fastattn import native

REST = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    fastattn.attention(q, q, q, mask=fastattn.Causal()).sum().backward()
assert q.grad is not None and fastattn.last_call().backend == RUNS, fastattn.last_call()
said = [str(warning.message) for warning in caught]
"""


def _run(code: str, where: Path = Path(fastattn.__file__).parent.parent, runs: str = "cpu") -> str:
    """Standard output of `code` in a fresh interpreter in a folder, and that attention runs on the backend `runs`."""
    environment = {**os.environ, "FASTATTN_STRICT": "0"}
    command = [sys.executable, "-c", code + REST.replace("RUNS", repr(runs)) + "print(*said)\n"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=where)
    assert done.returncode == 0, done.stderr
    return done.stdout


REASON = "\nprint({b.name: b.reason for b in fastattn.backends()}[%r])\n"


def test_torch_too_old() -> None:
    """At first use, once: the native kernels are left out and the plain formula runs."""
    said = _run('import torch; torch.__version__ = "2.9.1+cpu"\nimport fastattn' + REASON % "cpu", runs="reference")
    sentence = "torch 2.9.1+cpu is too old for the native kernels, which need 2.10 or newer; install it with: "
    command = "pip install --upgrade 'torch>=2.10'"
    assert said.startswith(f"{sentence}{command}\n")
    assert said.count(sentence) == 2, "as the reason, and in the warning of the fall back"


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1", "2.13.0+cpu", "3.0.0"])
def test_torch_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.torch, "__version__", version)
    assert native._torch_is_too_old() is None


# A wheel as an installer leaves it, a CUDA library that says what it is built for, and a torch for CUDA 12.8.
WHEEL = """
import importlib.metadata, json, pathlib, torch
from email.message import Message
about = Message()
about["Version"] = "0.1.0+LOCAL"
if INDEX:
    about["Project-URL"] = "Wheels, https://example.org/wheels"
importlib.metadata.metadata = lambda name: about
importlib.metadata.version = lambda name: about["Version"]
torch.version.cuda = "12.8"
import fastattn, fastattn.native as native
library = torch.library.Library("fastattn", "FRAGMENT")
library.define("cuda_info() -> str")
told = json.dumps({"architectures": "80", "runtime": "RUNTIME"})
library.impl("cuda_info", lambda: told, "CompositeExplicitAutograd")
native.cuda_library_path = pathlib.Path(PATH)
load = torch.ops.load_library
torch.ops.load_library = lambda path: None if path == PATH else load(path)
"""


def _wheel(local: str, runtime: str, path: Path, index: bool = False) -> str:
    code = WHEEL.replace("LOCAL", local).replace("RUNTIME", runtime)
    return code.replace("PATH", repr(str(path))).replace("INDEX", str(index))


@pytest.mark.parametrize("index", [False, True])
def test_a_wheel_for_another_cuda(index: bool, tmp_path: Path) -> None:
    (library := tmp_path / "libfastattn_cuda.so").touch()
    said = _run(_wheel("cu130", "13.0", library, index) + REASON % "cuda").splitlines()[0]
    where = " --index-url https://example.org/wheels" if index else ""
    assert said == (
        "this fastattn is built for CUDA 13.0 and this torch for CUDA 12.8; install the one that fits with: "
        f"pip install --force-reinstall --no-deps 'fastattn==0.1.0+cu128'{where}"
    )


def test_a_wheel_for_another_release_of_the_same_major_cuda_serves(tmp_path: Path) -> None:
    (library := tmp_path / "libfastattn_cuda.so").touch()
    assert _run(_wheel("cu126", "12.6", library) + REASON % "cuda").splitlines()[0] == "no GPU that torch can use"


def test_a_wheel_for_cpus_under_a_torch_for_cuda(tmp_path: Path) -> None:
    said = _run(_wheel("cpu", "", tmp_path / "none.so") + REASON % "cuda").splitlines()[0]
    assert said == (
        "this fastattn is built for CPUs; install the one that fits torch with: "
        "pip install --force-reinstall --no-deps 'fastattn==0.1.0+cu128'"
    )


def test_a_torch_without_cuda() -> None:
    said = _run("import torch; torch.version.cuda = None\nimport fastattn" + REASON % "cuda").splitlines()[0]
    assert said == (
        "this torch is built without CUDA; install one that has it with: pip install --force-reinstall torch"
    )


def test_triton_missing() -> None:
    """As where its distribution does not exist: every import of it fails."""
    code = (
        "import importlib.abc, importlib.util, sys, torch\n"
        "class Nothing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find_spec(name, *a)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "import fastattn"
    )
    said = _run(code + REASON % "triton").splitlines()[0]
    assert said == "triton is not installed; install it with: pip install triton"


@pytest.mark.parametrize(
    ("capability", "built_for", "has"),
    [
        ((8, 0), "80 90a", True),
        ((8, 9), "80 90a", True),  # machine code of a smaller minor
        ((9, 0), "80 90a", True),
        ((9, 0), "90", True),
        ((8, 0), "86 90a", False),
        ((10, 0), "80 90a", True),  # PTX of 80
        ((10, 0), "90a", False),  # there is no PTX of 90a
        ((10, 0), "80 90a 100a 120", True),
        ((10, 3), "80 90a 100a 120", False),  # not 100a's, and older than the PTX of 120
        ((10, 3), "80 90a 100f 120", True),
        ((12, 1), "80 90a 100a 120", True),
        ((13, 0), "80 90a 100a 120", True),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], built_for: str, has: bool) -> None:
    assert native.has_code_for(capability, built_for) is has


def test_a_gpu_without_code_is_told_which_build_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import cuda

    monkeypatch.setattr(cuda.torch.cuda, "get_device_capability", lambda index: (10, 3))
    monkeypatch.setattr(cuda.native, "cuda_info", lambda: {"architectures": "80 90a 100a 120"})
    said = cuda._missing_code.__wrapped__(0)
    assert "80 90a 100a 120 and has no code for compute capability 10.3" in said
    assert "FASTATTN_CUDA_ARCHS=103 pip install" in said


def test_the_triton_kernels_beside_upstreams_package(tmp_path: Path) -> None:
    """Triton's own project has a package of the name that ours has in the checkout: each is found by its own name,
    anywhere but in the checkout itself."""
    upstream = tmp_path / "triton_kernels"
    upstream.mkdir()
    (upstream / "__init__.py").write_text("upstream = True\n")
    code = (
        "import torch, triton_kernels, fastattn, fastattn.triton_kernels.tiles as tiles\n"
        "assert triton_kernels.upstream, triton_kernels\n"
        "print(tiles.__file__)"
    )
    found = Path(_run(code + "\n", tmp_path).splitlines()[0])
    assert found.parent.name == "triton_kernels" and tmp_path not in found.parents
    assert re.search(r"^def |^class ", found.read_text(), re.MULTILINE)
