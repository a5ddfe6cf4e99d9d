"""Run with the site-packages folder of a clean environment: the installed wheel imports, computes and is right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fastattn
from fastattn import native
from fastattn.problem import Problem

IMPORT_SECONDS = 0.3  # beyond torch
site = Path(sys.argv[1]).resolve()


def comes_from_the_wheel() -> None:
    assert site in Path(fastattn.__file__).resolve().parents, f"imported {fastattn.__file__}, not the wheel in {site}"
    assert not list((site / "fastattn").glob("_native*")), "the developers' module is in the wheel"
    for compiler in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ninja"):
        assert shutil.which(compiler) is None, f"{compiler} is on PATH: {os.environ['PATH']}"


def imports_quickly() -> str:
    """The best of five, in processes of their own: the others waited for the disk or for somebody else."""
    code = "import time, torch; start = time.perf_counter(); import fastattn; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(5)]
    seconds = min(float(run.stdout) for run in runs)
    assert seconds < IMPORT_SECONDS, f"import fastattn takes {seconds:.2f} s beyond torch"
    return f"imports in {seconds:.2f} s"


def finds_its_triton_kernels() -> None:
    """Its own, beside a package of that name (release/try_wheel.py puts one there)."""
    import triton_kernels

    assert triton_kernels.upstream and triton_kernels.__file__ == str(site / "triton_kernels" / "__init__.py")
    assert (site / "fastattn" / "triton_kernels" / "attention_forward.py").exists()
    from fastattn.triton_kernels import tiles  # of those that need no Triton

    assert Path(tiles.__file__).is_relative_to(site / "fastattn")


def computes() -> str:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 65, 32, requires_grad=True) for _ in range(3))
    slopes = fastattn.alibi_slopes(4).requires_grad_()
    out = fastattn.attention(query, key, value, mask=fastattn.Causal(), bias=fastattn.ALiBi(slopes))
    ran = fastattn.last_call().backend
    assert ran == "cpu", f"ran on {ran}: the wheel's native library did not ({native.load_error})"
    out.sum().backward()

    distance = torch.arange(65)[None, :] - torch.arange(65)[:, None]
    scores = query.double() @ key.double().mT / 32**0.5 - slopes.double()[:, None, None] * distance.abs()
    exact = scores.masked_fill(distance > 0, float("-inf")).softmax(-1) @ value.double()
    error = (out - exact).abs().max().item()
    assert error < 1e-5, f"max abs error {error}"
    (expected,) = torch.autograd.grad(exact.sum(), slopes)
    assert torch.allclose(slopes.grad, expected.float(), rtol=1e-4, atol=1e-4)
    return f"max abs error {error:.1e}, backend {ran}"


def replaces_attention() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 7, 32)
    before = model(x)
    fastattn.replace_attention(model)
    assert torch.allclose(model(x), before, atol=1e-5)


def names_what_is_wrong() -> None:
    """The library's own words for an argument nobody but a test can get to it.  Numbers are written through a stream:
    the library has code of its own for those (csrc/common/own_sstream.h)."""
    query = torch.randn(1, 1, 4, 8)
    problem = Problem(query=query, key=query, value=query, scale=1.0, key_lengths=torch.ones(12, dtype=torch.int64))
    assert native.load_cpu_library(), native.load_error
    said = None
    try:
        torch.ops.fastattn.cpu_forward(*problem.arguments())
    except RuntimeError as error:
        said = str(error)
    assert said and "key_lengths has size 12 in dimension 0, expected 1" in said, said


def has_the_cuda_library_it_should() -> str:
    """Its operators register themselves with a torch that is built for CUDA, also where there is no GPU.  For a CUDA of
    another major release they are there and refused."""
    reason = {backend.name: backend.reason for backend in fastattn.backends()}["cuda"]
    path = site / "fastattn" / "lib" / "libfastattn_cuda.so"
    local = fastattn.__version__.partition("+")[2]
    if torch.version.cuda is None:
        assert "without CUDA" in reason and "pip install" in reason, reason
        return "torch is built without CUDA"
    if not path.exists():
        assert local != "cpu" or "built for CPUs" in reason, reason
        return "no CUDA library"
    assert native.load_cuda_library() or "pip install" in native.cuda_load_error, native.cuda_load_error
    major = torch.version.cuda.split(".")[0]
    assert native.load_cuda_library() == local.startswith(f"cu{major}"), (local, torch.version.cuda)
    operator = torch.ops.fastattn.cuda_forward.default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA"), "no kernel is registered"
    return f"CUDA library: {reason}"


comes_from_the_wheel()
finds_its_triton_kernels()
replaces_attention()
names_what_is_wrong()
said = [imports_quickly(), computes(), has_the_cuda_library_it_should()]
print(f"fastattn {fastattn.__version__} from the wheel, torch {torch.__version__}: {'; '.join(said)}")
