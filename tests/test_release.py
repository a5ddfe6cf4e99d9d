"""How wheels are made, checked, listed and published.  The building itself is .ci/run's."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "release").is_dir():
    pytest.skip("not in a checkout: nothing is built", allow_module_level=True)
sys.path[:0] = [str(ROOT), str(ROOT / "release")]

import build_cuda  # noqa: E402
import build_glibc  # noqa: E402
import build_version  # noqa: E402

pytest.importorskip("packaging", reason="packaging is not installed (pip install --group release)")
import index  # noqa: E402
import report  # noqa: E402
import toolkit  # noqa: E402

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"
BUILDS = [ROOT / "setup.py", *sorted(ROOT.glob("build_*.py"))]


@pytest.mark.parametrize(("cuda", "local"), [(None, "cpu"), ("13.0", "cu130"), ("12.6", "cu126")])
def test_one_function_makes_the_version(cuda: str | None, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_LOCAL_VERSION", raising=False)
    assert build_version.version(cuda) == build_version.VERSION, "a build from source is what its sdist promised"
    monkeypatch.setenv("FASTATTN_LOCAL_VERSION", "1")
    assert build_version.version(cuda) == f"{build_version.VERSION}+{local}"


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.name)
def test_a_build_does_not_touch_the_network(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert not imported & {"urllib", "http", "socket", "ssl", "ftplib", "requests", "httpx", "pip", "toolkit"}
    assert not re.search(r"\b(curl|wget|git|pip\W+install)\b", re.sub(r'""".*?"""', "", path.read_text(), flags=re.S))


@pytest.mark.skipif(
    COMPILER is None or shutil.which("nm") is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler, nm and Linux",
)
def test_links_against_the_glibc_of_2018(tmp_path: Path) -> None:
    """Functions that newer glibcs have moved or changed, and the variable that libstdc++ asks for: found as they were.
    One function stays that has not changed and one that is younger than the rest of its library."""
    source = tmp_path / "unit.cpp"
    source.write_text(
        "#include <cmath>\n#include <dlfcn.h>\n#include <memory>\n"
        'extern "C" double all(double x) { return exp(x) + tanh(x) + std::log2((float)x); }\n'
        'extern "C" void* found(const char* name) { return dlsym(RTLD_DEFAULT, name); }\n'
        'extern "C" int shared(int n) { auto a = std::make_shared<int>(n), b = a; return *b + (int)b.use_count(); }\n'
    )
    command, output = [str(COMPILER), "-shared", "-fPIC", "-fno-builtin", str(source)], tmp_path / "unit.so"
    build_glibc.link(command, ["-Wl,--as-needed", "-lm"], output, tmp_path / "stubs")
    used = build_glibc.used_symbols(output)
    assert {"exp", "tanh", "log2f", "dlsym"} <= used.keys()
    assert all(version <= build_glibc.OLDEST for version in used.values()), used
    unit = ctypes.CDLL(str(output))
    unit.all.restype, unit.all.argtypes = ctypes.c_double, [ctypes.c_double]
    unit.found.restype, unit.found.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    assert unit.all(1.0) == pytest.approx(2.718281828 + 0.761594156)
    assert unit.found(b"malloc")
    assert unit.shared(40) == 42


def _wheel(folder: Path, version: str, extra: dict[str, str] | None = None) -> Path:
    path = folder / f"fastattn-{version}-py3-none-manylinux_2_28_x86_64.whl"
    about = f"fastattn-{version}.dist-info"
    files = {
        "fastattn/triton_kernels/attention_forward.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.4\nName: fastattn\nVersion: {version}\nRequires-Python: >=3.10\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_28_x86_64\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | (extra or {})).items():
            archive.writestr(name, content)
    return path


def test_index_lists_each_build_with_its_hash(tmp_path: Path) -> None:
    dist, site = tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    wheels = [_wheel(dist, version) for version in ("0.1.0+cpu", "0.2.0+cpu", "0.1.0+cu130")]
    pages = index.write(wheels, site, "https://example.org/wheels")
    names = {str(page.relative_to(site)) for page in pages}
    roots = ("", "cpu/", "cu130/")
    assert names == {f"{root}{page}" for root in roots for page in ("index.html", "fastattn/index.html")}
    links = re.findall(
        r'href="(.*?)#sha256=(\w+)" data-requires-python="(.*?)"', (site / "cpu/fastattn/index.html").read_text()
    )
    assert [link for link, _, _ in links] == [
        f"https://example.org/wheels/fastattn-{version}%2Bcpu-py3-none-manylinux_2_28_x86_64.whl"
        for version in ("0.1.0", "0.2.0")
    ]
    assert links[0][1] == hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    assert {python for _, _, python in links} == {"&gt;=3.10"}
    assert (site / "fastattn/index.html").read_text().count("href") == 3


@pytest.mark.parametrize("damaged", [False, True])
def test_pip_takes_a_wheel_from_the_index_and_holds_it_to_its_hash(damaged: bool, tmp_path: Path) -> None:
    dist, site = tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    wheels = [_wheel(dist, "0.1.0+cpu"), _wheel(dist, "0.1.0+cu130")]
    index.write(wheels, site)
    (kept,) = site.glob("cu130/*.whl")
    if damaged:
        kept.write_bytes(kept.read_bytes() + b"\0")
    pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir"]
    platform = ["--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]
    command = [*pip, *platform, "--index-url", f"{site.as_uri()}/cu130/", "--dest", str(tmp_path / "got"), "fastattn"]
    done = subprocess.run(command, capture_output=True, text=True)
    if damaged:
        assert done.returncode and "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "got" / wheels[1].name).read_bytes() == wheels[1].read_bytes()


def _library(name: str, **changes: object) -> report.Library:
    torch = ["libtorch_cpu.so", "libtorch_cuda.so"] if "cuda" in name else ["libtorch_cpu.so"]
    code = {"machine_code": ["80", "90a", "120"], "ptx": ["120"], "kernels": 60} if "cuda" in name else {}
    fields = {"needed": ["libc.so.6", *torch], "oldest": {}, "torch_abi": "2.10.0", "foreign_symbols": [], **code}
    return report.Library(name=name, size=10**6, **(fields | changes))


# what is changed about a right wheel for CUDA 13.0, and what is then said
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "version": ({"version": "0.1.0+cu128"}, "should end in +cu130"),
    "name": ({"path": Path("fastattn-0.1.0-py3-none-manylinux_2_28_x86_64.whl")}, "the name says 0.1.0"),
    "platform": ({"tags": ["py3-none-linux_x86_64"]}, "tags"),
    "size": ({"size": 61 * 10**6}, "61.0 MB"),
    "native": ({"files": ["fastattn/_native.so"]}, "_native"),
    "triton": ({"files": ["fastattn/__init__.py"]}, "no Triton kernels"),
    "no cuda": ({"libraries": {"libfastattn_cpu.so": _library("libfastattn_cpu.so")}}, "expected"),
}
WRONG_LIBRARY: dict[str, tuple[dict[str, object], str]] = {
    "libraries": ({"needed": ["libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.13"]}, "libcudart"),
    "shims": ({"needed": ["libtorch_cpu.so", "libc.so.6"]}, "does not name"),
    "symbols": ({"foreign_symbols": ["_ZN3c105ErrorC1E"]}, "_ZN3c105ErrorC1E"),
    "abi": ({"torch_abi": "unstable"}, "unstable"),
    "young torch": ({"torch_abi": "2.13.0"}, "2.13.0"),
    "machine code": ({"machine_code": ["80", "120"]}, "machine code"),
    "no ptx": ({"ptx": []}, "PTX"),
    "too much ptx": ({"ptx": ["80", "120"]}, "PTX"),
}


def _right() -> report.Contents:
    return report.Contents(
        path=Path(f"fastattn-{build_version.VERSION}+cu130-py3-none-manylinux_2_28_x86_64.whl"),
        size=10**7,
        sha256="",
        version=f"{build_version.VERSION}+cu130",
        tags=["py3-none-manylinux_2_28_x86_64"],
        requires=["torch>=2.10"],
        files=["fastattn/triton_kernels/attention_forward.py"],
        unpacked=2 * 10**7,
        libraries={name: _library(name) for name in ("libfastattn_cpu.so", "libfastattn_cuda.so")},
    )


def test_a_right_wheel_passes() -> None:
    assert report.problems(_right(), "13.0", ["80", "90a", "120"]) == []
    report.expect(_right(), "13.0", "80;90a;120")


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_wheel_does_not(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(said)):
        report.expect(dataclasses.replace(_right(), **changes), "13.0", "80;90a;120")


@pytest.mark.parametrize(("changes", "said"), WRONG_LIBRARY.values(), ids=WRONG_LIBRARY)
def test_a_wrong_library_does_not(changes: dict[str, object], said: str) -> None:
    right = _right()
    libraries = right.libraries | {"libfastattn_cuda.so": _library("libfastattn_cuda.so", **changes)}
    with pytest.raises(RuntimeError, match=re.escape(said)):
        report.expect(dataclasses.replace(right, libraries=libraries), "13.0", "80;90a;120")


def test_a_wheel_is_read_from_its_file(tmp_path: Path) -> None:
    contents = report.Contents.read(_wheel(tmp_path, "0.1.0+cpu", {"fastattn/module.py": "x = 1\n"}))
    assert contents.version == "0.1.0+cpu"
    assert contents.tags == ["py3-none-manylinux_2_28_x86_64"]
    assert contents.sha256 in str(contents)
    assert "2 modules, 1 of them of the Triton kernels" in str(contents)


def test_a_toolkit_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match=r"nvcc 12\.6 is not here and PyPI has none.*CUDA_HOME"):
        toolkit.home_of("12.6")


def test_the_toolkit_that_is_here_is_taken() -> None:
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither in CUDA_HOME nor on PATH")
    assert toolkit.home_of(build_cuda.release(nvcc)) is None


def test_the_workflow_is_a_workflow_and_runs_only_what_is_here() -> None:
    """By GitHub's own schema; each step that runs something runs a script of release/ or a target of make."""
    yaml = pytest.importorskip("ruamel.yaml", reason="comes with check-jsonschema (pip install 'fastattn[dev]')")
    check = Path(sys.executable).with_name("check-jsonschema")
    subprocess.run([check, "--builtin-schema", "vendor.github-workflows", WORKFLOW], check=True, capture_output=True)
    jobs = yaml.YAML(typ="safe").load(WORKFLOW.read_text())["jobs"]
    matrix = jobs["wheel"]["strategy"]["matrix"]
    assert {build["name"] for build in matrix["build"]} == {"cpu", "cu126", "cu128", "cu130"}
    assert {machine["name"] for machine in matrix["machine"]} == {"x86_64", "aarch64"}
    for build in matrix["build"]:
        assert build["name"] == build_version.local_label(build["cuda"])
        assert not build["cuda"] or f"cuda:{build['cuda']}." in build["image"]
        assert not build["archs"] or build_cuda.architectures(build["archs"])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) >= 7
    for command in commands:
        scripts = re.findall(r"release/\w+\.\w+", command)
        assert all((ROOT / script).is_file() for script in scripts), command
        made = re.match(r"make (\w+)", command)
        # the one thing that cannot run anywhere else: a release on the site itself
        assert scripts or (made and made[1] in targets) or command.startswith("gh release create"), command
        for script in (ROOT / name for name in scripts if name.endswith(".sh")):
            assert os.access(script, os.X_OK), f"{script} cannot be run"
