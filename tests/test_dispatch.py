"""Which backend runs, how that is told, and that nothing falls back silently."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch, native
from fastattn.backends.base import Backend
from fastattn.problem import Problem

ROOT = Path(__file__).parent.parent


class Refusing(Backend):
    """A backend that runs nothing, for stated reasons."""

    name = "refusing"

    def __init__(self, reason: str | None = None, refusals: tuple[str, ...] = ()) -> None:
        self._reason, self._refusals = reason, list(refusals)

    @property
    def reason(self) -> str | None:
        return self._reason

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        return self._refusals

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        raise AssertionError("a backend that refused was run")

    def kernel(self, problem: Problem) -> str:
        return "none"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the backends by a refusing one and the reference."""

    def _install(*args: object, **keywords: object) -> None:
        reference = dispatch._BACKENDS["reference"]
        refusing = Refusing(*args, **keywords)  # type: ignore[arg-type]
        monkeypatch.setattr(dispatch, "_BACKENDS", {"refusing": refusing, "reference": reference})
        monkeypatch.setattr(dispatch, "_warned", set())

    return _install


def _qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)


def test_backends() -> None:
    listed = fastattn.backends()
    names = [b.name for b in listed]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference", "asked last, because it can do everything"
    for b in listed:
        assert b.available == (b.reason is None)
        assert b.name in repr(b)
        assert b.available or b.reason in repr(b)
    assert listed[-1].available


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the checkout's sources")
def test_the_native_backend_is_built() -> None:
    """Where the sources are, the suite must not pass by skipping the kernels."""
    assert native.load_cpu_library(), native.load_error
    assert {b.name: b for b in fastattn.backends()}["cpu"].available


def test_named_backend_runs(backend: str, device: str) -> None:
    q, k, v = (x.to(device) for x in _qkv())
    fastattn.attention(
        q, k, v, mask=fastattn.Causal(), bias=fastattn.ALiBi(torch.ones(2, device=device)), backend=backend
    )
    last = fastattn.last_call()
    assert last.backend == backend
    assert last.features == ["causal", "slopes"]
    assert last.kernel == fastattn.explain(q, k, v, backend=backend).kernel


def test_first_available_backend_runs_by_default() -> None:
    fastattn.attention(*_qkv())
    able = [b.name for b in fastattn.backends() if b.available and b.name in ("cpu", "reference")]
    assert fastattn.last_call().backend == able[0]


def test_last_call_is_of_this_thread() -> None:
    import threading

    fastattn.attention(*_qkv(), backend="reference")
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(fastattn.last_call()))
    thread.start()
    thread.join()
    assert seen == [None]
    assert fastattn.last_call().backend == "reference"


def test_explain(backend: str, device: str) -> None:
    q, k, v = (x.to(device) for x in _qkv())
    bias = fastattn.DistanceTable(torch.zeros(2, 3, device=device))
    before = fastattn.last_call()
    told = fastattn.explain(q, k, v, mask=fastattn.SlidingWindow(1, 1), bias=bias, backend=backend)
    assert told.backend == backend
    assert told.features == ["window", "table"]
    assert isinstance(told.plan, dict)
    assert set(told.refusals) == {b.name for b in fastattn.backends()} - {backend}
    assert all(reasons and all(isinstance(r, str) for r in reasons) for reasons in told.refusals.values())
    text = str(told)
    assert text.startswith(f"{backend}: {told.kernel}")
    assert "window, table" in text
    for name, reasons in told.refusals.items():
        assert f"not {name}: {'; '.join(reasons)}" in text
    assert fastattn.last_call() == before, "explain runs nothing"


def test_explain_a_plain_call() -> None:
    assert "plain" in str(fastattn.explain(*_qkv(), backend="reference"))


def test_explain_draws_no_random_numbers_it_would_change_the_next_call() -> None:
    torch.manual_seed(0)
    want = fastattn.attention(*_qkv(), dropout_p=0.5)
    torch.manual_seed(0)
    q, k, v = _qkv()
    fastattn.explain(q, k, v, dropout_p=0.5)
    assert torch.equal(fastattn.attention(q, k, v, dropout_p=0.5), want)


@pytest.mark.parametrize("kind", ["unavailable", "unsupported"])
def test_asking_for_a_backend_that_refuses(kind: str, install: Callable[..., None]) -> None:
    install(**({"reason": "not built"} if kind == "unavailable" else {"refusals": ("no sinks", "no float64")}))
    expected = "not built" if kind == "unavailable" else "no sinks; no float64"
    with pytest.raises(fastattn.UnsupportedError, match=rf"backend 'refusing' cannot run this call: {expected}"):
        fastattn.attention(*_qkv(), backend="refusing")
    assert issubclass(fastattn.UnsupportedError, NotImplementedError)


def test_fallback_warns_once_for_each_reason(install: Callable[..., None]) -> None:
    install(refusals=("no sinks",))
    with pytest.warns(RuntimeWarning, match=r"slow reference formula \(refusing: no sinks\)") as caught:
        fastattn.attention(*_qkv())
    assert caught[0].filename == __file__, "points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*_qkv())
        fastattn.attention(*_qkv(), backend="reference")  # what is asked for is no fallback
    assert fastattn.last_call().refusals == {}
    dispatch._BACKENDS["refusing"]._refusals.append("no tables")
    with pytest.warns(RuntimeWarning, match="no sinks, no tables"):
        fastattn.attention(*_qkv())
    assert fastattn.last_call().refusals == {"refusing": ["no sinks", "no tables"]}


def test_sdpa_fallback_warning(install: Callable[..., None]) -> None:
    install(reason="not built")
    with pytest.warns(RuntimeWarning, match="refusing: not built"):
        fastattn.scaled_dot_product_attention(*_qkv())


def test_strict_makes_falling_back_an_error(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install(reason="not built")
    monkeypatch.setenv("FASTATTN_STRICT", "1")
    with pytest.raises(fastattn.UnsupportedError, match=r"FASTATTN_STRICT=1.*refusing: not built"):
        fastattn.attention(*_qkv())
    fastattn.attention(*_qkv(), backend="reference")
    monkeypatch.setenv("FASTATTN_STRICT", "0")
    with pytest.warns(RuntimeWarning):
        fastattn.attention(*_qkv())


def test_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*reference.*got 'gpu'"):
        fastattn.attention(*_qkv(), backend="gpu")


def test_a_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    """In a fresh interpreter whose library path is empty: import works, the reference runs, the reason is told."""
    code = (
        "import warnings, torch, fastattn, fastattn.native as n, pathlib\n"
        f"n.library_path = pathlib.Path({str(tmp_path)!r}) / 'none.so'\n"
        "cpu = {b.name: b for b in fastattn.backends()}['cpu']\n"
        "assert not cpu.available and 'pip install' in cpu.reason, cpu.reason\n"
        "assert n.cpu_info() == {}\n"
        "q = torch.randn(1, 1, 2, 4)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    fastattn.attention(q, q, q)\n"
        "assert any('pip install' in str(w.message) for w in caught)\n"
        "assert fastattn.last_call().backend == 'reference'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "FASTATTN_STRICT": "0"})


def test_a_broken_library_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    code = (
        "import fastattn, fastattn.native as n, pathlib\n"
        f"n.library_path = pathlib.Path({str(tmp_path)!r}) / 'broken.so'\n"
        "cpu = {b.name: b for b in fastattn.backends()}['cpu']\n"
        "assert not cpu.available and 'did not load' in cpu.reason and 'broken.so' in cpu.reason, cpu.reason\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_version() -> None:
    assert fastattn.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = fastattn.nothing_here
    assert set(fastattn.__all__) <= set(dir(fastattn)) | {"__version__"}


@pytest.mark.skipif(not native.load_cpu_library(), reason="the native library is not built")
def test_explain_gives_the_tiles_of_the_cpu_kernel() -> None:
    query, key = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 1000, 64)
    plan = fastattn.explain(query, key, key, backend="cpu").plan
    assert plan["query_rows"] == 1
    assert plan["heads"] == 4, "the query heads of one key head share its tiles in decoding"
    assert 0 < plan["keys"] <= 512
    assert plan["work_items"] >= 4
    assert plan["scratch_bytes_per_thread"] < 2**21
