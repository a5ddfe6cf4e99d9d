"""The instruction layer of the CUDA kernels (csrc/cuda/arch) against the PTX manual's tables, written down here on
their own; in the simulator and, where there is one, on a GPU.  And the simulator against kernels with one bug each."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
NO_NVCC = "nvcc is not on PATH"

try:
    from fastattn import _native
except ModuleNotFoundError:  # not any ImportError: a module that is there and broken must be seen
    _native = None
NO_SIMULATOR = "fastattn._native is not built (python build_native.py)"

Run = Callable[..., None]
in_simulator = pytest.mark.skipif(_native is None, reason=NO_SIMULATOR)


def _nvcc(*arguments: str) -> None:
    result = subprocess.run([NVCC, "-std=c++20", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def gpu_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same test kernels, compiled for the GPU at hand."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if NVCC is None:
        pytest.skip(NO_NVCC)
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}{minor}" + ("a" if major == 9 else "")
    path = tmp_path_factory.mktemp("cuda") / "instruction_tests.so"
    _nvcc("-shared", "-Xcompiler=-fPIC", f"-gencode=arch=compute_{target},code=sm_{target}", "-o", str(path),
          str(CSRC / "instruction_tests" / "instances.cu"))  # fmt: skip
    library = ctypes.CDLL(str(path))
    library.fastattn_instruction_test.restype = ctypes.c_char_p
    return library


def _on_gpu(library: ctypes.CDLL) -> Run:
    def run(
        name: str,
        tensors: dict[str, Tensor],
        n: tuple[int, ...] = (),
        grid: tuple[int, ...] = (),
        shared_bytes: int = 0,
    ) -> None:
        there = {key: tensor.cuda() for key, tensor in tensors.items()}
        pointers = [
            (ctypes.c_void_p * 4)(
                *(there[f"{kind}{i}"].data_ptr() if f"{kind}{i}" in there else None for i in range(4))
            )
            for kind in ("in", "out")
        ]
        numbers = (ctypes.c_int * 4)(*n)
        blocks = (ctypes.c_int * 3)(*(*grid, 1, 1, 1)[:3])
        error = library.fastattn_instruction_test(name.encode(), *pointers, numbers, blocks, shared_bytes)
        if error is not None:
            raise RuntimeError(error.decode())
        torch.cuda.synchronize()
        for key, tensor in tensors.items():
            tensor.copy_(there[key])

    return run


@pytest.fixture(params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs an instruction test by name on CPU tensors, in the simulator or on a GPU."""
    if request.param == "gpu":
        return _on_gpu(request.getfixturevalue("gpu_library"))
    if _native is None:
        pytest.skip(NO_SIMULATOR)
    return _native.simulate_instruction_test


@pytest.fixture
def options() -> Iterator[Callable[..., dict[str, Any]]]:
    before = _native.options()
    yield _native.options
    _native.options(**before)


def _random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


# ---- Compilation


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason=NO_NVCC)
@pytest.mark.parametrize(
    ("source", "targets"),
    [("instances.cu", ("80", "90a")), ("hopper.cu", ("90a",)), ("hopper_instances.cu", ("90a",))],
    ids=["instructions", "hopper", "hopper_tests"],
)
def test_compiles_with_nvcc(source: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    generate = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    _nvcc(
        "-Werror=all-warnings", *generate, "-c", "-o", str(tmp_path / "x.o"), str(CSRC / "instruction_tests" / source)
    )


def test_wgmma_header_is_what_its_script_writes() -> None:
    subprocess.run([sys.executable, str(CSRC / "arch" / "generate_wgmma.py"), "--check"], check=True)


# ---- Threads and warps


def test_positions(run: Run) -> None:
    grid, threads = (3, 2, 2), 64
    out = torch.full((12 * threads, 8), -1, dtype=torch.int32)
    run("positions", {"out0": out}, grid=grid)
    expected = [
        [t, t % 32, t // 32, threads, x, y, z, grid[0]]
        for z in range(grid[2])
        for y in range(grid[1])
        for x in range(grid[0])
        for t in range(threads)
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("argument", [0, 1, 2, 7, 16, 31])
def test_shuffles(run: Run, argument: int) -> None:
    values = _random_words(32)
    lanes = torch.randint(0, 96, (32,), dtype=torch.int32)
    out = torch.zeros(4, 32, dtype=torch.int32)
    xor_float, broadcast = torch.zeros(32), torch.zeros(32, dtype=torch.int32)
    run("shuffles", {"in0": values, "in1": lanes, "out0": out, "out1": xor_float, "out2": broadcast}, n=(argument,))
    lane = torch.arange(32)
    assert torch.equal(out[0], values[lanes.long() % 32])
    assert torch.equal(out[1], values[lane ^ argument])
    assert torch.equal(out[2], values[torch.where(lane >= argument, lane - argument, lane)])
    assert torch.equal(out[3], values[torch.where(lane + argument < 32, lane + argument, lane)])
    assert torch.equal(xor_float, (lane ^ 1).float())
    assert (broadcast == -5).all()


@pytest.mark.parametrize("chance", [0.0, 0.02, 0.5, 1.0])
def test_votes(run: Run, chance: float) -> None:
    predicate = (torch.rand(64) < chance).to(torch.int32)
    out = torch.zeros(64, 5, dtype=torch.int32)
    run("votes", {"in0": predicate, "out0": out})
    for thread in range(64):
        warp = predicate[thread // 32 * 32 :][:32].tolist()
        bits = sum(bit << lane for lane, bit in enumerate(warp))
        votes = [bits & 0xFFFFFFFF, int(any(warp)), int(all(warp)), int(predicate.any()), int(predicate.sum())]
        assert [value & 0xFFFFFFFF for value in out[thread].tolist()] == votes


# ---- Numbers


def _awkward_floats(dtype: torch.dtype) -> Tensor:
    """Random bits, all magnitudes, halves between neighbours of the 16-bit type, subnormal numbers, overflow."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    narrow = narrow[narrow.isfinite()]
    following = torch.nextafter(narrow, torch.tensor(float("inf")))
    bits = _random_words(4096).view(torch.float32)
    halves = (narrow.view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)).view(torch.float32)
    tiny = torch.arange(4096) * 2.0**-27
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, -65536.0, 3.4e38, float("inf"), -float("inf")])
    return torch.cat([narrow, following, halves, bits, tiny, special, torch.tensor([float("nan")])])


@pytest.mark.parametrize(("suffix", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_pack_rounds_as_torch_does(run: Run, suffix: str, dtype: torch.dtype) -> None:
    values = _awkward_floats(dtype)
    values = torch.cat([values, values.new_zeros(len(values) % 2)])
    pairs, singles = (torch.zeros(len(values), dtype=torch.int16) for _ in range(2))
    run(f"pack_{suffix}", {"in0": values, "out0": pairs, "out1": singles}, n=(len(values) // 2,))
    expected = values.to(dtype)
    assert torch.equal(pairs, singles)
    number = ~expected.isnan()
    assert torch.equal(pairs[number], expected.view(torch.int16)[number])
    assert (pairs[~number] == 0x7FFF).all()


@pytest.mark.parametrize(("suffix", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_unpack_is_exact(run: Run, suffix: str, dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    pairs, singles = torch.zeros(2**16), torch.zeros(2**16)
    run(f"unpack_{suffix}", {"in0": values, "out0": pairs, "out1": singles}, n=(2**15,))
    for result in (pairs, singles):
        assert torch.equal(result.isnan(), values.isnan())
        number = ~values.isnan()
        assert torch.equal(result.view(torch.int32)[number], values.float().view(torch.int32)[number])


def test_fast_functions_within_their_bounds(run: Run) -> None:
    x = torch.cat(
        [torch.linspace(-160, 140, 20001), torch.randn(4096), torch.rand(4096) * 4, 2.0 ** torch.arange(-126, 128)]
    )
    exp2, log2, reciprocal, constants = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x), torch.zeros(3)
    run("functions", {"in0": x, "out0": exp2, "out1": log2, "out2": reciprocal, "out3": constants}, n=(len(x),))
    wide = x.double()
    exact = torch.exp2(wide)
    normal = (exact >= 2.0**-126) & (exact < 2.0**128)
    assert ((exp2.double() - exact).abs()[normal] <= 2.0**-22 * exact[normal]).all()
    assert (exp2[exact < 2.0**-126] == 0).all()
    assert (exp2[exact >= 2.0**128] == float("inf")).all()
    positive = x > 0
    exact = torch.log2(wide[positive])
    near = (wide[positive] > 0.5) & (wide[positive] < 2)
    assert ((log2[positive].double() - exact).abs() <= torch.where(near, 2.0**-22, 2.0**-22 * exact.abs())).all()
    usable = (1 / wide).abs() >= 2.0**-126
    assert ((reciprocal.double() - 1 / wide).abs()[usable] <= 2.0**-23 * (1 / wide).abs()[usable]).all()
    assert constants[0] == float("inf")
    assert constants[1].isnan()
    assert constants[2] == -2.5


def test_fast_functions_of_special_numbers(run: Run) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -1.0, 1e-40, -1e-40])
    results = [torch.zeros_like(x) for _ in range(3)]
    constants = torch.zeros(3)
    run(
        "functions",
        dict(zip(("in0", "out0", "out1", "out2", "out3"), (x, *results, constants), strict=True)),
        n=(len(x),),
    )
    expected = [
        [1.0, 1.0, inf, 0.0, nan, 0.5, 1.0, 1.0],
        [-inf, -inf, inf, nan, nan, nan, -inf, -inf],
        [inf, -inf, 0.0, -0.0, nan, -1.0, inf, -inf],
    ]
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result.isnan(), torch.tensor(want).isnan())
        number = ~result.isnan()
        assert torch.equal(result[number], torch.tensor(want)[number])
        assert torch.equal(result[number].signbit(), torch.tensor(want)[number].signbit())


# ---- Memory


@pytest.mark.parametrize("through_constant", [0, 1], ids=["constant", "global"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_units_of_every_size(run: Run, size: int, through_constant: int) -> None:
    values = torch.randint(0, 256, (64, size), dtype=torch.uint8)
    out = torch.zeros_like(values)
    run(f"copy_{size}", {"in0": values, "out0": out}, n=(through_constant,), shared_bytes=64 * size)
    assert torch.equal(out, values.flip(0))


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.uint8), (2, torch.int16)])
def test_neighbours_in_a_word_do_not_race(run: Run, size: int, dtype: torch.dtype) -> None:
    out = torch.zeros(64, dtype=dtype)
    run(f"own_units_{size}", {"out0": out}, n=(3,), shared_bytes=64 * size)
    assert torch.equal(out, (torch.arange(64) + 3).to(dtype))


def test_atomics(run: Run) -> None:
    at = torch.randint(0, 5, (64,), dtype=torch.int32)
    floats, ints = torch.randint(-50, 50, (64,)).float(), torch.randint(-50, 50, (64,), dtype=torch.int32)
    sums, counts = torch.ones(5), torch.ones(5, dtype=torch.int32)
    run("atomics", {"in0": at, "in1": floats, "in2": ints, "out0": sums, "out1": counts})
    assert torch.equal(sums, torch.ones(5).index_add(0, at, floats))
    assert torch.equal(counts, torch.ones(5, dtype=torch.int32).index_add(0, at, ints))


def test_orderly_use_of_global_memory(run: Run) -> None:
    out, total, halves = (torch.zeros(n, dtype=t) for n, t in ((128, torch.int32), (1, torch.int32), (2, torch.int16)))
    run("orderly_global", {"out0": out, "out1": total, "out2": halves}, grid=(2,))
    assert torch.equal(out, torch.arange(63, -1, -1, dtype=torch.int32).repeat(2))
    assert total.item() == 128
    assert halves.tolist() == [1, 1]


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_asynchronous_copies_and_their_zeros(run: Run, chance: float) -> None:
    """Where a copy is not valid its source lies far outside the tensor: it must not be read."""
    valid = (torch.rand(64) < chance).to(torch.int32)
    wide, narrow = _random_words(64, 4), _random_words(64)
    out_wide, out_narrow = torch.full_like(wide, 7), torch.full_like(narrow, 7)
    run(
        "copies",
        {"in0": wide, "in1": valid, "in2": narrow, "out0": out_wide, "out1": out_narrow},
        shared_bytes=1024 + 256,
    )
    assert torch.equal(out_wide, (wide * valid[:, None]).flip(0))
    assert torch.equal(out_narrow, (narrow * valid).flip(0))


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_named_barriers_hand_over(run: Run, rounds: int) -> None:
    values = torch.randint(0, 1000, (rounds, 64), dtype=torch.int32)
    out = torch.zeros(rounds, 32, dtype=torch.int32)
    run("handover", {"in0": values, "out0": out}, n=(rounds,), shared_bytes=256)
    assert torch.equal(out, values[:, :32] + values[:, 32:])


# ---- Matrices.  "Matrix fragments for mma.m16n8k16" of the PTX manual, as index formulas of element i of a lane.


def _a_index(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, in_group * 2 + (i & 1) + (0 if i < 4 else 8)


def _b_index(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return in_group * 2 + (i & 1) + (0 if i < 2 else 8), group


def _c_index(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), in_group * 2 + (i & 1)


def _fragments(matrix: Tensor, index: Callable[[int, int], tuple[int, int]], count: int) -> Tensor:
    rows, columns = np.array([[index(lane, i) for i in range(count)] for lane in range(32)]).transpose(2, 0, 1)
    return matrix[rows, columns].contiguous()


def test_fragments_cover_their_matrices() -> None:
    """The tables above: each element once."""
    for index, count, shape in ((_a_index, 8, (16, 16)), (_b_index, 4, (16, 8)), (_c_index, 4, (16, 8))):
        seen = _fragments(torch.arange(shape[0] * shape[1]).view(shape), index, count)
        assert seen.flatten().sort().values.tolist() == list(range(shape[0] * shape[1]))


DTYPES = [("f16", torch.float16), ("bf16", torch.bfloat16)]


@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_multiply_of_integers_is_exact(run: Run, suffix: str, dtype: torch.dtype) -> None:
    a, b = (torch.randint(-16, 17, shape).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randint(-1000, 1000, (16, 8)).float()
    out = torch.zeros(32, 4)
    run(
        f"multiply_{suffix}",
        {
            "in0": _fragments(a, _a_index, 8),
            "in1": _fragments(b, _b_index, 4),
            "in2": _fragments(c, _c_index, 4),
            "out0": out,
        },
    )
    assert torch.equal(out, _fragments((c.double() + a.double() @ b.double()).float(), _c_index, 4))


@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_multiply_sums_in_float32(run: Run, suffix: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    a[3, 5], b[7, 2] = 2.0**-14, 2.0**-15  # small beside the rest, and subnormal in float16
    c = torch.randn(16, 8)
    out = torch.zeros(32, 4)
    fragments = (_fragments(a, _a_index, 8), _fragments(b, _b_index, 4), _fragments(c, _c_index, 4), out)
    run(f"multiply_{suffix}", dict(zip(("in0", "in1", "in2", "out0"), fragments, strict=True)))
    exact = c.double() + a.double() @ b.double()
    size = c.double().abs() + a.double().abs() @ b.double().abs()
    # 17 additions; a GPU aligns the terms of a group to the largest and cuts them off
    bound = _fragments(17 * 2.0**-23 * size, _c_index, 4)
    assert ((out.double() - _fragments(exact, _c_index, 4)).abs() <= bound).all()


@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_multiply_keeps_nan_and_infinity(run: Run, suffix: str, dtype: torch.dtype) -> None:
    a, b, c = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype), torch.zeros(16, 8)
    a[2, 3], a[5, 0], c[9, 1] = float("inf"), float("nan"), -float("inf")
    out = torch.zeros(32, 4)
    fragments = (_fragments(a, _a_index, 8), _fragments(b, _b_index, 4), _fragments(c, _c_index, 4), out)
    run(f"multiply_{suffix}", dict(zip(("in0", "in1", "in2", "out0"), fragments, strict=True)))
    expected = torch.full((16, 8), 16.0)
    expected[2], expected[5], expected[9, 1] = float("inf"), float("nan"), -float("inf")
    assert torch.equal(out.nan_to_num(nan=1e30), _fragments(expected, _c_index, 4).nan_to_num(nan=1e30))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("matrices", [2, 4])
def test_load_matrix(run: Run, matrices: int, transposed: bool) -> None:
    """ldmatrix: rows of matrix i are named by lanes 8 i to 8 i + 7, in any order; .trans gives columns."""
    values = torch.randint(-(2**15), 2**15, (32, 8), dtype=torch.int16)
    rows = torch.randperm(32).to(torch.int32)
    out = torch.zeros(32, matrices, 2, dtype=torch.int16)
    name = f"load_matrix_x{matrices}" + ("_transposed" if transposed else "")
    run(name, {"in0": values, "in1": rows, "out0": out}, shared_bytes=512)
    stored = values[rows.long()].view(4, 8, 8)
    for lane in range(32):
        for i in range(matrices):
            matrix = stored[i].T if transposed else stored[i]
            assert out[lane, i].tolist() == matrix[lane // 4, lane % 4 * 2 :][:2].tolist()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_store_matrix(run: Run, transposed: bool) -> None:
    if run is not getattr(_native, "simulate_instruction_test", None) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("stmatrix needs sm_90")
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    rows = torch.randperm(32).to(torch.int32)
    oriented = matrices.mT if transposed else matrices
    registers = torch.stack([oriented[:, lane // 4, lane % 4 * 2 :][:, :2] for lane in range(32)])
    out = torch.zeros(32, 8, dtype=torch.int16)
    name = "store_matrix_x4" + ("_transposed" if transposed else "")
    run(name, {"in0": registers.contiguous(), "in1": rows, "out0": out}, shared_bytes=512)
    assert torch.equal(out[rows.long()], matrices.view(32, 8))


@pytest.mark.parametrize(("suffix", "dtype"), DTYPES)
def test_products_from_shared_memory(run: Run, suffix: str, dtype: torch.dtype) -> None:
    """load_matrix feeds multiply as kernels do it, and a forgotten transpose shows."""
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    expected = _fragments(a.float() @ b.float(), _c_index, 4)
    right = {}
    for variant, operand in ((0, b.T.contiguous()), (1, b), (2, b)):
        out = torch.zeros(32, 4)
        run(f"multiply_from_shared_{suffix}", {"in0": a, "in1": operand, "out0": out}, n=(variant,), shared_bytes=768)
        right[variant] = torch.equal(out, expected)
    assert right == {0: True, 1: True, 2: False}


# ---- Bugs that the simulator must find.  name: (bytes of shared memory, of in0, of out0, what the error must say)

PLANTED = {
    "missing_barrier": (256, 0, 256, r"load of 4 bytes at .*(never written|race)"),
    "missing_second_barrier": (256, 0, 256, r"race: (store|load) .* not ordered after the (read|write) by thread"),
    "missing_sync_warp": (128, 0, 128, r"load of 4 bytes at .*(never written|race)"),
    "shuffle_for_sync_warp": (128, 0, 128, r"race: load .* not ordered after the write by thread \d+ \(warp 0"),
    "missing_sync_before_load_matrix": (512, 0, 128, r"race: load_matrix .* not ordered after the write"),
    "missing_wait": (1024, 1024, 1024, r"an asynchronous copy is under way that thread \d+ .* has not waited for"),
    "wait_for_older_group": (2048, 1024, 1024, r"asynchronous copy is under way .* has not waited for"),
    "missing_commit": (1024, 1024, 1024, r"asynchronous copy is under way .* has not waited for"),
    "missing_barrier_after_wait": (1024, 1024, 1024, r"(asynchronous copy is under way|race: load)"),
    "refill_before_barrier": (1024, 1024, 256, r"race: asynchronous copy .* not ordered after the read by warp \d+"),
    "store_behind_shared": (256, 0, 0, r"thread 63 .*store of 4 bytes at shared_base\(\) \+ 256 is outside .*256"),
    "store_before_shared": (256, 0, 0, r"thread 0 .*store of 4 bytes at shared_base\(\) - 4 is outside"),
    "unset_shared_address": (256, 0, 0, r"thread 0 .*at shared_base\(\) - 1024 is outside"),
    "store_behind_global": (0, 0, 256, r"thread 63 .*store of 4 bytes .*`out0` of 256 bytes, .* at offset 256"),
    "load_before_global": (0, 256, 256, r"thread 0 .*load of 4 bytes .*`in0` of 256 bytes, .* at offset -4"),
    "copy_behind_global": (1024, 1024, 0, r"thread 63 .*asynchronous copy of 16 bytes .*at offset 1024"),
    "store_to_input": (0, 256, 0, r"store of 4 bytes .*`in0` of 256 bytes may only be read"),
    "atomic_to_input": (0, 256, 0, r"atomic_add of 4 bytes .*`in0` of 256 bytes may only be read"),
    "misaligned_shared": (512, 0, 0, r"thread 1 .*misaligned store of 8 bytes at shared_base\(\) \+ 4"),
    "misaligned_global": (0, 512, 256, r"thread 1 .*misaligned load of 8 bytes of global memory"),
    "misaligned_load_matrix": (1024, 0, 128, r"lane 1.*misaligned load_matrix of 16 bytes at shared_base\(\) \+ 8"),
    "misaligned_copy": (1024, 1024, 0, r"thread 1 .*misaligned asynchronous copy of 16 bytes of global memory"),
    "divergent_shuffle": (0, 0, 128, r"divergent warp: this thread is at sync_warp .*lanes 0-15 wait at a shuffle"),
    "divergent_multiply": (0, 0, 128, r"divergent warp: .*lane 7 .*exited|lanes 0-6 wait at multiply .* exited"),
    "divergent_barrier": (0, 0, 0, r"divergent warp: .* at sync_block .*lanes 0-15 wait at sync_block"),
    "exit_before_barrier": (
        0, 0, 0, r"deadlock: threads 0-63 wait at barrier 0 .*64 of 96 .*; threads 64-95 exited"),
    "deadlocked_barriers": (
        0, 0, 0, r"deadlock: threads 0-31 wait at barrier 1 .*32 of 64.*; threads 32-63 wait at barrier 2 .*32 of 64"),
    "barrier_for_different_counts": (0, 0, 0, r"barrier 1 for 32 threads, where others came for 64"),
    "barrier_for_half_a_warp": (0, 0, 0, r"barrier 1 for 16 threads: not a multiple of 32"),
    "barrier_number_16": (0, 0, 0, r"barrier 16 of 0 to 15"),
    "uninitialised_shared": (256, 0, 256, r"thread 5 .*byte 0 of them was never written"),
    "uninitialised_matrix_row": (512, 0, 128, r"lane 9\).*load_matrix .*was never written"),
}  # fmt: skip


@in_simulator
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(name: str) -> None:
    shared_bytes, input_bytes, output_bytes, message = PLANTED[name]
    tensors = {}
    if input_bytes:
        tensors["in0"] = torch.zeros(input_bytes // 4, dtype=torch.int32)
    if output_bytes:
        tensors["out0"] = torch.zeros(output_bytes // 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message) as caught:
        _native.simulate_instruction_test(name, tensors, shared_bytes=shared_bytes)
    assert f"simulated kernel test_{name}, block (0, 0, 0)" in str(caught.value)
    assert "planted_bugs.h:" in str(caught.value)
    # nothing of the failed launch is left
    out = torch.zeros(64, 8, dtype=torch.int32)
    _native.simulate_instruction_test("positions", {"out0": out})
    assert out[:, 0].tolist() == list(range(64))


BETWEEN_BLOCKS = {
    "blocks_store_the_same": r"block \(1, 0, 0\).*store .* not ordered after the write by block \(0, 0, 0\), thread 0 ",
    "blocks_add_without_atomics": r"block \(1, 0, 0\).*load .* not ordered after the write by block \(0, 0, 0\)",
    "block_reads_another": r"block \(1, 0, 0\).*load .* not ordered after the write by block \(0, 0, 0\)",
    "block_writes_what_another_read": r"block \(1, 0, 0\).*store .* not ordered after the read by block \(0, 0, 0\)",
    "store_beside_atomics": r"block \(1, 0, 0\).*store .* not ordered after the write by block \(0, 0, 0\)",
    "missing_barrier_in_global": r"block \(0, 0, 0\).*race in global memory: .* not ordered after the .* by block \(0",
}


@in_simulator
@pytest.mark.parametrize("name", BETWEEN_BLOCKS)
def test_planted_race_in_global_memory_is_found(name: str, options: Callable[..., dict[str, Any]]) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=BETWEEN_BLOCKS[name]) as caught:
        _native.simulate_instruction_test(name, {"out0": out}, grid=(3,))
    assert "race in global memory" in str(caught.value)
    assert "planted_bugs.h:" in str(caught.value)
    options(races=False)
    _native.simulate_instruction_test(name, {"out0": out}, grid=(3,))


@in_simulator
def test_races_can_be_switched_off(options: Callable[..., dict[str, Any]]) -> None:
    options(races=False)
    tensors = {"in0": torch.zeros(256, dtype=torch.int32), "out0": torch.zeros(64, dtype=torch.int32)}
    _native.simulate_instruction_test("refill_before_barrier", tensors, shared_bytes=1024)
    options(races=True)
    with pytest.raises(RuntimeError, match="race"):
        _native.simulate_instruction_test("refill_before_barrier", tensors, shared_bytes=1024)


@in_simulator
def test_uninitialised_registers_hold_a_strange_number() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    _native.simulate_instruction_test("uninitialised_register", {"out0": out}, n=(0, 2))
    assert (out == torch.tensor(0xFEFEFEFE - 2**32, dtype=torch.int32)).all()


@in_simulator
def test_launches_that_no_gpu_would_take() -> None:
    out = {"out0": torch.zeros(64 * 8, dtype=torch.int32)}
    for arguments, message in (
        ({"grid": (0,)}, "the grid is empty"),
        ({"grid": (1, 65536)}, "at most 65535"),
        ({"shared_bytes": 163 * 1024 + 16}, "a block may have 166912"),
        ({"shared_bytes": -1}, "bytes of shared memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _native.simulate_instruction_test("positions", out, **arguments)
    with pytest.raises(ValueError, match="no instruction test"):
        _native.simulate_instruction_test("unheard_of", {})
    with pytest.raises(TypeError, match="out0 must be a tensor"):
        _native.simulate_instruction_test("positions", {"out0": 3})


# ---- What accesses cost


def _traffic(name: str, pattern: list[int], unit: int) -> dict[str, tuple[int, int]]:
    """(ideal, actual) of each kind of access of a kernel in which lane l accesses unit pattern[l]."""
    count = max(pattern) + 1
    tensors = {
        "in0": torch.zeros(count * unit, dtype=torch.uint8),
        "in1": torch.tensor(pattern, dtype=torch.int32),
        "out0": torch.zeros(32 * unit, dtype=torch.uint8),
    }
    _native.simulate_instruction_test(name, tensors, n=(count,), shared_bytes=max(count * unit, 8192))
    report = _native.last_report()
    lines = {line["access"]: line for line in report["lines"] if line["function"].startswith(name.rpartition("_")[0])}
    return {access: (line["ideal"], line["actual"]) for access, line in lines.items()}


@in_simulator
@pytest.mark.parametrize(
    ("unit", "pattern", "wavefronts", "sectors"),
    [
        (4, list(range(32)), (1, 1), (4, 4)),
        (4, list(range(31, -1, -1)), (1, 1), (4, 4)),
        (4, [0] * 32, (1, 1), (1, 1)),
        (4, list(range(0, 64, 2)), (1, 2), (4, 8)),
        (4, list(range(0, 128, 4)), (1, 4), (4, 16)),
        (4, list(range(0, 32 * 32, 32)), (1, 32), (4, 32)),
        (4, list(range(0, 33 * 32, 33)), (1, 1), (4, 32)),
        (4, [lane % 2 * 32 for lane in range(32)], (1, 2), (1, 2)),
        (4, list(range(1, 33)), (1, 1), (4, 5)),
        (1, list(range(32)), (1, 1), (1, 1)),
        (8, list(range(32)), (2, 2), (8, 8)),
        (8, list(range(0, 64, 2)), (2, 4), (8, 16)),
        (16, list(range(32)), (4, 4), (16, 16)),
        (16, [lane * 8 for lane in range(32)], (4, 32), (16, 32)),
        # the XOR swizzle of rows of 128 bytes: chunk c of row r at c ^ (r % 8)
        (16, [row * 8 + (3 ^ row % 8) for row in range(32)], (4, 4), (16, 32)),
    ],
)
def test_wavefronts_and_sectors(
    unit: int, pattern: list[int], wavefronts: tuple[int, int], sectors: tuple[int, int]
) -> None:
    traffic = _traffic(f"access_pattern_{unit}", pattern, unit)
    assert traffic["load_shared"] == wavefronts
    assert traffic["load_global"] == sectors


@in_simulator
@pytest.mark.parametrize(
    ("pattern", "wavefronts"),
    [
        (list(range(32)), 4),
        ([row * 8 for row in range(32)], 32),
        ([row * 8 + (row % 8) for row in range(32)], 4),
        ([row * 4 for row in range(32)], 16),
    ],
)
def test_wavefronts_of_load_matrix(pattern: list[int], wavefronts: int) -> None:
    tensors = {"in1": torch.tensor(pattern, dtype=torch.int32), "out0": torch.zeros(32, dtype=torch.int32)}
    _native.simulate_instruction_test("matrix_pattern", tensors, shared_bytes=8192)
    assert _native.last_report()["traffic"]["load_matrix"] == {"requests": 1, "ideal": 4, "actual": wavefronts}


@in_simulator
def test_predicated_accesses_are_matched_between_meetings() -> None:
    """A third of the lanes loads in each round: four requests of lanes three words apart, each over four sectors."""
    tensors = {"in0": torch.zeros(128), "out0": torch.zeros(32)}
    _native.simulate_instruction_test("predicated_pattern", tensors)
    assert _native.last_report()["traffic"]["load_constant"] == {"requests": 4, "ideal": 4 * 2, "actual": 4 * 4}


@in_simulator
def test_report_counts_instructions() -> None:
    _native.clear_reports()
    tensors = {
        "in0": torch.zeros(16, 16, dtype=torch.float16),
        "in1": torch.zeros(16, 8, dtype=torch.float16),
        "out0": torch.zeros(3, 32, 4),
    }
    _native.simulate_instruction_test("multiply_from_shared_f16", tensors, grid=(3,), shared_bytes=768)
    (report,) = _native.reports()
    assert (report["kernel"], report["grid"], report["threads"]) == ("test_multiply_from_shared_f16", (3, 1, 1), 32)
    assert (report["products"], report["warp_barriers"], report["block_barriers"]) == (3, 3, 0)
    assert report["traffic"]["load_matrix"]["requests"] == 6
