"""How setup.py builds native code: what is compiled again, and when the CUDA library is built at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "build_objects.py").exists():
    pytest.skip("not in a checkout: nothing is built", allow_module_level=True)
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
from build_objects import Unit, compile_all  # noqa: E402

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_compiles_what_changed_and_nothing_else(tmp_path: Path) -> None:
    header, source = tmp_path / "number.h", tmp_path / "unit.cpp"
    header.write_text("constexpr int number = 1;\n")
    source.write_text('#include "number.h"\nint get() { return number; }\n')

    def unit(*flags: str) -> Unit:
        return Unit((COMPILER, *flags), source, tmp_path / "objects" / "unit.o")

    def age(path: Path, seconds: float) -> None:
        made = unit().target.stat().st_mtime
        os.utime(path, (made + seconds, made + seconds))

    assert not unit().is_current()
    compile_all([unit()])
    age(header, -10)
    age(source, -10)
    assert unit().is_current()
    assert not unit("-O2").is_current(), "other flags"
    age(header, 10)
    assert not unit().is_current(), "a newer header"
    age(header, -10)
    header.unlink()
    assert not unit().is_current(), "a header that is gone"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_an_error_carries_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int get() { return nowhere; }\n")
    with pytest.raises(RuntimeError, match=r"wrong\.cpp for wrong failed(.|\n)*nowhere"):
        compile_all([Unit((COMPILER,), source, tmp_path / "wrong.o")])


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"FASTATTN_CUDA": "0"}, False),
        ({"FASTATTN_CUDA": "1"}, True),
        ({"FASTATTN_CUDA_ARCHS": "90a"}, True),
        ({"FASTATTN_CUDA": "0", "FASTATTN_CUDA_ARCHS": "90a"}, False),
    ],
    ids=str,
)
def test_the_cuda_library_is_built_on_request(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTATTN_CUDA", "FASTATTN_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build_cuda.wanted() is wanted


@pytest.mark.parametrize(
    ("given", "archs"),
    [("80;90a", ["80", "90a"]), ("8.0 sm_90a, 120", ["80", "90a", "120"]), ("", ["80", "90a"])],
)
def test_architectures(given: str, archs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", given)
    assert build_cuda.architectures() == archs
    flags = build_cuda.code_flags(archs)
    assert all(f"arch=compute_{arch},code=sm_{arch}" in flags for arch in archs)
    newest = "120" if "120" in archs else "80"
    assert flags[-1] == f"arch=compute_{newest},code=compute_{newest}", "GPUs that come later take the PTX"


@pytest.mark.parametrize("given", ["70", "sm90", "hopper", "90b"])
def test_an_architecture_nobody_has(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", given)
    with pytest.raises(RuntimeError, match="FASTATTN_CUDA_ARCHS"):
        build_cuda.architectures()


def test_every_source_is_in_the_library() -> None:
    folder = ROOT / "csrc" / "cuda"
    assert {path.name for path in folder.glob("instances/*.cu")} == {path.name for path in build_cuda.instances()}
    host = {path for name in ("features", "attention", "hopper", "rows") for path in (folder / name).glob("*.cpp")} | {
        folder / "ops.cpp",
        folder / "tensor_map.cpp",
    }
    assert host == set(build_cuda.host_sources())


def test_instances_of_one_architecture_are_compiled_for_it_alone() -> None:
    for path in build_cuda.instances():
        alone = path.stem.startswith("hopper_")
        assert build_cuda.archs_of(path, ["80", "90a"]) == (["90a"] if alone else ["80", "90a"])
        # a library without it links to the instance, which is empty there and refused by the launcher
        assert build_cuda.archs_of(path, ["80"]) == ["80"]


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu)"
)
def test_the_kernels_compile_for_arm64() -> None:
    """The generic path, without a warning.  Nothing here runs it: `info` says so there."""
    command = [
        "aarch64-linux-gnu-g++",
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-S",
        "-o",
        "/dev/null",
    ]
    for source, flags in (
        ("kernels.cpp", ["-DFASTATTN_ISA=baseline", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]),
        ("dispatch.cpp", []),
    ):
        done = subprocess.run([*command, *flags, str(ROOT / "csrc" / "cpu" / source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
