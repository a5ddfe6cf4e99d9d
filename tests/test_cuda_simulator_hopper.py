"""What sm_90a adds to the instruction layer (csrc/cuda/arch/hopper.h, wgmma.h) against the PTX manual's layouts,
written down here on their own; in the simulator and, where there is one, on an H100.  And the simulator against kernels
with one bug each."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_cuda_simulator import CSRC, NO_NVCC, NO_SIMULATOR, NVCC, _nvcc
from torch import Tensor

try:
    from fastattn import _native
except ModuleNotFoundError:  # not any ImportError: a module that is there and broken must be seen
    _native = None

in_simulator = pytest.mark.skipif(_native is None, reason=NO_SIMULATOR)
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


class Map:
    """The tensor map of a box: sizes and box with the innermost dimension last, as torch has them."""

    def __init__(self, tensor: Tensor, box: tuple[int, ...], swizzle: int = 0) -> None:
        assert tensor.stride(-1) == 1
        self.tensor, self.box, self.swizzle = tensor, box, swizzle
        self.size = list(reversed(tensor.shape))
        self.stride_bytes = [stride * tensor.element_size() for stride in reversed(tensor.stride()[:-1])]

    @property
    def bytes_of_box(self) -> int:
        return self.tensor.element_size() * torch.Size(self.box).numel()

    def simulated(self) -> bytes:
        return _native.encode_tensor_map(
            self.tensor, self.size, self.stride_bytes, list(reversed(self.box)), self.swizzle
        )

    def encoded_by_driver(self, there: Tensor) -> bytes:
        dtype = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}[self.tensor.dtype]
        rank = len(self.size)
        map_ = (ctypes.c_uint64 * 32)()
        start = ctypes.addressof(map_) + -ctypes.addressof(map_) % 64
        status = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
            ctypes.c_void_p(start), dtype, rank, ctypes.c_void_p(there.data_ptr()),
            (ctypes.c_uint64 * rank)(*self.size), (ctypes.c_uint64 * max(rank - 1, 1))(*self.stride_bytes),
            (ctypes.c_uint32 * rank)(*reversed(self.box)), (ctypes.c_uint32 * rank)(*[1] * rank),
            0, {0: 0, 32: 1, 64: 2, 128: 3}[self.swizzle], 0, 0,
        )  # fmt: skip
        assert status == 0, f"cuTensorMapEncodeTiled: error {status}"
        return ctypes.string_at(start, 128)


Run = Callable[..., None]


def _simulate(
    name: str,
    tensors: dict[str, Tensor],
    n: tuple[int, ...] = (),
    grid: tuple[int, ...] = (1,),
    shared_bytes: int = 0,
    maps: tuple[tuple[str, Map], ...] = (),
) -> None:
    encoded = [map_.simulated() for _, map_ in maps]
    _native.simulate_instruction_test(name, tensors, n=n, grid=grid, shared_bytes=shared_bytes, maps=encoded)


@pytest.fixture(scope="session")
def hopper_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same test kernels, compiled for sm_90a."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch sees no GPU of compute capability 9.0")
    if NVCC is None:
        pytest.skip(NO_NVCC)
    path = tmp_path_factory.mktemp("cuda") / "hopper_tests.so"
    _nvcc("-shared", "-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a", "-o", str(path),
          str(CSRC / "instruction_tests" / "hopper_instances.cu"))  # fmt: skip
    library = ctypes.CDLL(str(path))
    library.fastattn_hopper_test.restype = ctypes.c_char_p
    return library


def _on_device(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


def _on_gpu(library: ctypes.CDLL) -> Run:
    def run(
        name: str,
        tensors: dict[str, Tensor],
        n: tuple[int, ...] = (),
        grid: tuple[int, ...] = (1,),
        shared_bytes: int = 0,
        maps: tuple[tuple[str, Map], ...] = (),
    ) -> None:
        there = {key: _on_device(tensor) for key, tensor in tensors.items()}
        pointers = [
            (ctypes.c_void_p * 4)(
                *(there[f"{kind}{i}"].data_ptr() if f"{kind}{i}" in there else None for i in range(4))
            )
            for kind in ("in", "out")
        ]
        encoded = b"".join(map_.encoded_by_driver(there[key]) for key, map_ in maps).ljust(256, b"\0")
        blocks = (ctypes.c_int * 3)(*(*grid, 1, 1, 1)[:3])
        error = library.fastattn_hopper_test(
            name.encode(), *pointers, (ctypes.c_int * 4)(*n), blocks, shared_bytes, encoded
        )
        if error is not None:
            raise RuntimeError(error.decode())
        torch.cuda.synchronize()
        for key, tensor in tensors.items():
            tensor.copy_(there[key])

    return run


@pytest.fixture(params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs an instruction test for sm_90a by name on CPU tensors, in the simulator or on a GPU."""
    if request.param == "gpu":
        return _on_gpu(request.getfixturevalue("hopper_library"))
    if _native is None:
        pytest.skip(NO_SIMULATOR)
    return _simulate


@pytest.fixture
def options() -> Iterator[Callable[..., dict[str, Any]]]:
    before = _native.options()
    yield _native.options
    _native.options(**before)


# ---- Tensor copies


def _swizzled(address: int, width: int) -> int:
    """Where the hardware keeps the 16 bytes at `address`: bits 4 to 6, or fewer, take in bits 7 to 9."""
    return address ^ (address >> 7 & width // 16 - 1) << 4 if width else address


def _in_shared_memory(box: Tensor, width: int) -> Tensor:
    """The bytes of a box as they lie in shared memory, from an address that is a multiple of 1024."""
    rows = box.contiguous().view(torch.uint8).view(-1, 16)
    return torch.stack([rows[_swizzled(16 * i, width) // 16] for i in range(len(rows))])


def _box(tensor: Tensor, at: tuple[int, ...], box: tuple[int, ...]) -> Tensor:
    result = torch.zeros(box, dtype=tensor.dtype)
    for index in itertools.product(*map(range, box)):
        source = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= s < size for s, size in zip(source, tensor.shape, strict=True)):
            result[index] = tensor[source]
    return result


BOXES = {
    2: ((20, 72), (8, 64)),
    3: ((3, 10, 40), (2, 4, 32)),
    4: ((2, 3, 9, 24), (1, 2, 8, 16)),
    5: ((2, 2, 3, 5, 16), (2, 1, 2, 4, 16)),
}


@pytest.mark.parametrize("rank", BOXES)
@pytest.mark.parametrize("place", ["inside", "before", "behind"])
def test_tensor_load(run: Run, rank: int, place: str) -> None:
    shape, box = BOXES[rank]
    tensor = torch.randn(*shape).half()
    at = tuple(
        {"inside": 0, "before": -1 - i % 2, "behind": size - edge + 1}[place]
        for i, (size, edge) in enumerate(zip(shape, box, strict=True))
    )
    width = box[-1] * 2
    map_ = Map(tensor, box, width)
    out = torch.zeros(map_.bytes_of_box, dtype=torch.uint8)
    arguments = torch.tensor([map_.bytes_of_box, *reversed(at), *[0] * (5 - rank)], dtype=torch.int32)
    run(
        f"tensor_load_{rank}d", {"in0": arguments, "in1": tensor, "out0": out}, shared_bytes=8192, maps=(("in1", map_),)
    )
    assert torch.equal(out.view(-1, 16), _in_shared_memory(_box(tensor, at, box), width))


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (16, 64), (4, 32)])
def test_tensor_load_of_bytes(run: Run, rows: int, columns: int) -> None:
    """Coordinates count bytes, and what lies outside is zero."""
    tensor = torch.randint(1, 256, (rows, columns + 16), dtype=torch.uint8)
    map_ = Map(tensor, (rows, columns), columns)
    out = torch.zeros(map_.bytes_of_box, dtype=torch.uint8)
    arguments = torch.tensor([map_.bytes_of_box, 37, -1, 0, 0, 0], dtype=torch.int32)
    tensors = {"in0": arguments, "in1": tensor, "out0": out}
    run("tensor_load_2d", tensors, shared_bytes=8192, maps=(("in1", map_),))
    assert torch.equal(out.view(-1, 16), _in_shared_memory(_box(tensor, (-1, 37), (rows, columns)), columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_load_without_swizzle(run: Run, dtype: torch.dtype) -> None:
    tensor = torch.randn(16, 40).to(dtype)[:, :32]
    map_ = Map(tensor, (8, 16))
    out = torch.zeros(8, 16, dtype=dtype)
    arguments = torch.tensor([map_.bytes_of_box, 8, 4, 0, 0, 0], dtype=torch.int32)
    tensors = {"in0": arguments, "in1": tensor, "out0": out}
    run("tensor_load_2d", tensors, shared_bytes=8192, maps=(("in1", map_),))
    assert torch.equal(out, tensor[4:12, 8:24])


REFUSED = {
    "the address is not a multiple of 16": lambda t: Map(t[:, 1:], (8, 8)),
    "dimension 1 has a stride of 72 bytes": lambda t: Map(t.flatten()[:1080].view(30, 36)[:, :32], (8, 8)),
    "dimension 1 has a box of 257, not 1 to 256": lambda t: Map(t, (257, 8)),
    "a row of the box has 24 bytes: not a multiple": lambda t: Map(t, (8, 12)),
    "a row of the box has 128 bytes, the swizzle 64": lambda t: Map(t, (8, 64), 64),
}


@in_simulator
@pytest.mark.parametrize("message", REFUSED)
def test_tensor_maps_that_the_hardware_refuses(message: str) -> None:
    tensor = torch.zeros(32, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        REFUSED[message](tensor).simulated()


@pytest.mark.parametrize("rank", BOXES)
@pytest.mark.parametrize("place", ["inside", "before", "behind"])
def test_tensor_store(run: Run, rank: int, place: str) -> None:
    shape, box = BOXES[rank]
    tensor, values = torch.randn(*shape).half(), torch.randn(*box).half()
    at = tuple(
        {"inside": 0, "before": -1 - i % 2, "behind": size - edge + 1}[place]
        for i, (size, edge) in enumerate(zip(shape, box, strict=True))
    )
    width = box[-1] * 2
    map_ = Map(tensor, box, width)
    expected = tensor.clone()
    for index in itertools.product(*map(range, box)):
        target = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= t < size for t, size in zip(target, shape, strict=True)):
            expected[target] = values[index]
    arguments = torch.tensor([map_.bytes_of_box, *reversed(at), *[0] * (5 - rank)], dtype=torch.int32)
    tensors = {"in0": arguments, "in1": _in_shared_memory(values, width), "out0": tensor}
    run(f"tensor_store_{rank}d", tensors, shared_bytes=8192, maps=(("out0", map_),))
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_ring(run: Run, count: int) -> None:
    numbers = torch.randint(-99, 99, (count, 32)).float()
    out = torch.zeros(2, 32)
    run("ring", {"in0": numbers, "out0": out}, n=(count,), shared_bytes=1024, maps=(("in0", Map(numbers, (1, 32))),))
    assert torch.equal(out, numbers.sum(0).expand(2, 32))


@in_simulator
def test_tensor_loads_feed_products_in_any_order(options: Callable[..., dict[str, Any]]) -> None:
    for seed in range(10):
        options(seed=seed)
        test_tensor_loads_feed_products(_simulate, "bf16", seed % 2)


@in_simulator
def test_ring_in_any_order(options: Callable[..., dict[str, Any]]) -> None:
    numbers = torch.randint(-99, 99, (9, 32)).float()
    for seed in range(20):
        options(seed=seed)
        out = torch.zeros(2, 32)
        _simulate("ring", {"in0": numbers, "out0": out}, n=(9,), shared_bytes=1024, maps=(("", Map(numbers, (1, 32))),))
        assert torch.equal(out, numbers.sum(0).expand(2, 32))


def test_bulk_copies(run: Run) -> None:
    numbers, out = torch.randint(-99, 99, (64,)).float(), torch.randint(-99, 99, (64,)).float()
    expected = out + 3 * numbers
    run("bulk_copies", {"in0": numbers, "out0": out}, n=(64,), grid=(3,), shared_bytes=1024)
    assert torch.equal(out, expected)


def test_one_lane_is_elected(run: Run) -> None:
    out = torch.zeros(2, 32, dtype=torch.int32)
    run("elections", {"out0": out})
    assert out.sum(1).tolist() == [1, 1]


# ---- Products


def _accumulator(matrix: Tensor) -> Tensor:
    """matrix[64][n] as the registers of 128 threads hold it."""
    n = matrix.shape[1]
    thread, i = torch.arange(128).view(-1, 1), torch.arange(n // 2)
    return matrix[
        thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    ].contiguous()


def _registers(a: Tensor) -> Tensor:
    """a[64][16 steps] as operand registers: [step][thread][4][2]."""
    thread, i = torch.arange(128).view(-1, 1, 1), torch.arange(4).view(-1, 1)
    row = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8
    column = thread % 4 * 2 + i // 2 * 8 + torch.arange(2)
    return torch.stack([a[:, k : k + 16][row, column] for k in range(0, a.shape[1], 16)]).contiguous()


def _operand(matrix: Tensor, mn_major: bool, width: int, start: int) -> tuple[Tensor, list[int]]:
    """matrix[mn][k] of 16-bit numbers in shared memory from byte `start`, and the descriptor of each 16 of k.

    After the manual's canonical layouts: units are 16 bytes, w = width / 16 of them are a row of the pattern.
    """
    rows, depth = matrix.shape
    unit = 16
    w = max(width // 16, 1)
    code = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    image = torch.zeros(rows * depth, dtype=torch.int16)
    bits = matrix.view(torch.int16)

    def descriptor(at: int, leading: int, stride: int) -> int:
        value = (start + at) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62
        return value - 2**64 if value >= 2**63 else value

    if mn_major:
        # patterns of 8 w numbers along mn and 8 along k; those along k follow each other first
        leading, stride = (depth * w * unit, 8 * w * unit) if width else (8 * unit, depth * unit)
        for mn, k in itertools.product(range(rows), range(depth)):
            chunk = mn // 8
            if width:
                at = chunk // w * leading + k // 8 * stride + k % 8 * w * unit + chunk % w * unit
            else:
                at = chunk * stride + k // 8 * leading + k % 8 * unit
            image[(_swizzled(start + at, width) - start) // 2 + mn % 8] = bits[mn, k]
        return image, [
            descriptor(k // 8 * (stride if width else leading), leading, stride) for k in range(0, depth, 16)
        ]
    # panels of 8 w numbers along k, each of all rows
    leading, stride = (unit, 8 * w * unit) if width else (rows * unit, 8 * unit)
    panel = rows * w * unit
    for mn, k in itertools.product(range(rows), range(depth)):
        at = k // (8 * w) * panel + mn // 8 * stride + mn % 8 * w * unit + k // 8 % w * unit
        image[(_swizzled(start + at, width) - start) // 2 + k % 8] = bits[mn, k]
    return image, [descriptor(k // (8 * w) * panel + k // 8 % w * unit, leading, stride) for k in range(0, depth, 16)]


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize(
    ("n", "width_a", "width_b", "kind"),
    [
        (64, 128, 128, 0), (128, 128, 128, 1), (128, 128, 128, 2), (64, 128, 128, 3), (128, 128, 128, 4),
        (64, 128, 128, 5), (48, 64, 32, 0), (96, 64, 64, 1), (96, 64, 64, 2), (96, 32, 32, 3), (176, 128, 64, 0),
        (16, 32, 32, 1), (16, 0, 0, 0), (48, 0, 0, 3), (256, 0, 128, 1), (256, 128, 64, 5),
    ],
)  # fmt: skip
def test_products(run: Run, suffix: str, n: int, width_a: int, width_b: int, kind: int) -> None:
    """d += a b over four steps; kind: bit 0 transposes B, bit 1 A, bit 2 takes A from registers."""
    depth, dtype = 64, DTYPES[suffix]
    a, b = torch.randn(64, depth).to(dtype), torch.randn(n, depth).to(dtype)
    begin = torch.randn(64, n)
    image_a, descriptors_a = _operand(a, bool(kind & 2), width_a, 0)
    image_b, descriptors_b = _operand(b, bool(kind & 1), width_b, 2 * a.numel())
    image = torch.cat([image_a, image_b])
    out = _accumulator(begin)
    tensors = {
        "in0": image,
        "in1": torch.tensor([list(pair) for pair in zip(descriptors_a, descriptors_b, strict=True)]),
        "in2": _registers(a),
        "out0": out,
    }
    size = 2 * image.numel()
    run(f"products_{suffix}_{n}_{kind}", tensors, n=(size, depth // 16), shared_bytes=size)
    exact = begin.double() + a.double() @ b.double().T
    bound = (depth + 1) * 2.0**-23 * (begin.double().abs() + a.double().abs() @ b.double().abs().T)
    assert ((out.double() - _accumulator(exact)).abs() <= _accumulator(bound)).all()


# ---- 8 bits


def _registers_of_bytes(a: Tensor) -> Tensor:
    """a[64][32 steps] of bytes as operand registers: [step][thread][4][4]."""
    thread, i = torch.arange(128).view(-1, 1, 1), torch.arange(4).view(-1, 1)
    row = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8
    column = thread % 4 * 4 + i // 2 * 16 + torch.arange(4)
    return torch.stack([a[:, k : k + 32][row, column] for k in range(0, a.shape[1], 32)]).contiguous()


def _multiply_e4m3(run: Run, a: Tensor, b: Tensor, begin: Tensor, width: int, registers: bool) -> Tensor:
    """begin[64][n] + a[64][k] b[n][k]^T by products, as registers hold it."""
    n, depth = b.shape[0], a.shape[1]
    # rows of bytes lie as rows of half as many numbers of 16 bits do
    bytes_a, bytes_b = a.view(torch.uint8), b.view(torch.uint8)
    image_a, descriptors_a = _operand(bytes_a.view(torch.int16), False, width, 0)
    image_b, descriptors_b = _operand(bytes_b.view(torch.int16), False, width, a.numel())
    image = torch.cat([image_a, image_b])
    out = _accumulator(begin)
    tensors = {
        "in0": image,
        "in1": torch.tensor([list(pair) for pair in zip(descriptors_a, descriptors_b, strict=True)]),
        "in2": _registers_of_bytes(bytes_a),
        "out0": out,
    }
    size = 2 * image.numel()
    run(f"products_e4m3_{n}_{4 if registers else 0}", tensors, n=(size, depth // 32), shared_bytes=size)
    return out


@pytest.mark.parametrize(
    ("n", "width", "registers"),
    [
        (64, 128, False), (96, 128, True), (128, 64, False), (128, 64, True), (160, 32, False), (192, 128, False),
        (256, 64, True), (256, 0, True),
    ],
)  # fmt: skip
def test_products_of_8_bits(run: Run, n: int, width: int, registers: bool) -> None:
    """Integers whose sums the chip has exactly, though it adds with fewer bits than float32."""
    a, b = torch.randint(-4, 5, (64, 128)), torch.randint(-4, 5, (n, 128))
    begin = torch.randint(-64, 65, (64, n)).float()
    out = _multiply_e4m3(run, *(x.float().to(torch.float8_e4m3fn) for x in (a, b)), begin, width, registers)
    assert torch.equal(out, _accumulator(begin + (a @ b.T).float()))


def test_products_know_every_number_of_8_bits(run: Run) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    a = codes.repeat(8).view(64, 32).view(torch.float8_e4m3fn)
    b = torch.eye(64, 32).to(torch.float8_e4m3fn)
    for left, right in ((a, b), (torch.eye(64, 32).to(torch.float8_e4m3fn), a)):
        out = _multiply_e4m3(run, left, right, torch.zeros(64, 64), 32, False)
        assert torch.equal(out, _accumulator(left.float() @ right.float().T))


def test_nan_of_8_bits(run: Run) -> None:
    a, b = torch.ones(64, 32).to(torch.float8_e4m3fn), torch.zeros(64, 32).to(torch.float8_e4m3fn)
    for row, code in ((3, 0x7F), (9, 0xFF)):
        a.view(torch.uint8)[row, 5] = code
    out = _multiply_e4m3(run, a, b, torch.zeros(64, 64), 32, False)
    expected = torch.zeros(64, 64)
    expected[[3, 9]] = torch.nan
    assert torch.equal(out.isnan(), _accumulator(expected).isnan())
    assert (out.nan_to_num(nan=0) == 0).all()


def test_pack_to_8_bits(run: Run) -> None:
    """As torch rounds, and beyond 448 to it; NaN becomes 0x7F."""
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].sort().values
    middle = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([
        exact, middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf)),
        torch.randn(5000) * 4, torch.rand(1000) * 2**-8, torch.tensor([1e-30, -1e-40, 2**-10, -(2**-10), 0.0, -0.0]),
        torch.tensor([447.9, 448.1, 464.0, 465.0, 1e30, torch.inf, -449.0, -torch.inf, torch.nan, -torch.nan]),
    ])  # fmt: skip
    values = torch.cat([values, values.new_zeros(-len(values) % 4)])
    out = torch.zeros(len(values), dtype=torch.uint8)
    run("pack_e4m3", {"in0": values, "out0": out}, n=(len(values) // 4,))
    number = ~values.isnan()
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(out[number], expected[number])
    assert (out[~number] == 0x7F).all()


def test_byte_permutations(run: Run) -> None:
    words = torch.randint(-(2**31), 2**31, (64, 2), dtype=torch.int64).to(torch.int32)
    chosen = torch.randint(0, 8, (64, 4))
    selector = (chosen * 16 ** torch.arange(4)).sum(1, keepdim=True).to(torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    run("byte_permutations", {"in0": torch.cat([words, selector], 1).contiguous(), "out0": out}, n=(64,))
    assert torch.equal(out.view(torch.uint8).view(64, 4), words.view(torch.uint8).view(64, 8).gather(1, chosen))


# ---- Tiles


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("transposed", [0, 1])
def test_tensor_loads_feed_products(run: Run, suffix: str, transposed: int) -> None:
    a, b = torch.randint(-8, 9, (2, 128, 128)).to(DTYPES[suffix])
    out = torch.zeros(128, 128)
    run(
        f"matrix_product_{suffix}_{transposed}", {"in0": a, "in1": b, "out0": out}, shared_bytes=65536 + 16,
        maps=(("in0", Map(a, (64, 64), 128)), ("in1", Map(b, (64, 64), 128))),
    )  # fmt: skip
    assert torch.equal(out, a.float() @ (b.float() if transposed else b.float().T))


# ---- Bugs that the simulator must find.  name: what the error must say

PLANTED = {
    "barrier_nobody_completes": r"deadlock: threads 0-63 wait for parity 0 .*\(in phase 0, 1 of 2 arrived\)",
    "polled_barrier_nobody_completes": r"deadlock: threads 0-63 wait for parity 0 .*\+ 24584 \(in phase 0, 0 of 2",
    "stale_parity": r"load of 4 bytes .*(a tensor copy is under way that thread 0 .* has not completed|never written)",
    "parity_of_the_next_phase": r"deadlock: threads 0-63 wait for parity 1 .*\(in phase 1, 0 of 1 arrived\)",
    "too_few_bytes_announced": r"deadlock: .*\(in phase 0, 1 of 1 arrived, 64 bytes came that were not announced\)",
    "too_many_bytes_announced": r"deadlock: .*in phase 0, 1 of 1 arrived, 64 bytes announced that have not come\)",
    "bytes_never_announced": r"the block has ended, and this copy is still under way",
    "one_arrival_too_many": r"thread 2 .*mbarrier_arrive .*: one more than the 2 arrivals",
    "barrier_without_init": r"mbarrier_arrive at .*, where no mbarrier is initialised",
    "barrier_initialised_twice": r"thread 1 .*mbarrier_init of .*, which is initialised already",
    "misaligned_mbarrier": r"misaligned mbarrier_init of 8 bytes",
    "barrier_not_yet_shown": r"thread 1 .*race: mbarrier_arrive of .* not ordered after the write by thread 0",
    "store_over_mbarrier": r"store of 4 bytes at .*, where an mbarrier is",
    "missing_init_fence": r"a copy uses the mbarrier .* without mbarrier_init_fence between",
    "arrival_without_sync_warp": r"load of 4 bytes .*(never written|is not ordered after the write by thread)",
    "load_not_waited_for": r"load of 4 bytes .* a tensor copy is under way that thread 0",
    "wait_for_another_load": r"(load of 4 bytes .* a tensor copy is under way|race: load .* write by a tensor copy)",
    "another_thread_waited": r"race: load of 4 bytes .* is not ordered after the write by a tensor copy",
    "load_into_what_is_read": r"(race: tensor_load .* after the read by|load .* a tensor copy is under way)",
    "two_loads_to_one_place": r"tensor_load of 8192 bytes .*, where a tensor copy is under way that thread 0",
    "load_over_unfenced_stores": r"missing fence_async_shared: tensor_load of 8192 bytes .* wrote at .*load_over",
    "load_still_under_way": r"thread 0 .*the block has ended, and this copy is still under way",
    "misaligned_tensor_load": r"tensor_load of 8192 bytes at shared_base\(\) \+ 64: not a multiple of 128",
    "tensor_load_behind_shared": r"tensor_load of 8192 bytes at shared_base\(\) \+ 24448 is outside",
    "tensor_load_of_another_rank": r"tensor_load of 3 dimensions with a tensor map of 2",
    "tensor_load_without_map": r"this is no tensor map that encode_tensor_map made",
    "tensor_store_to_input": r"tensor_store of 128 bytes of global memory: `in0` of 8192 bytes may only be read",
    "store_without_proxy_fence": r"missing fence_async_shared: bulk_reduce_add of 1024 .* wrote at .*store_without",
    "proxy_fence_before_barrier": r"missing fence_async_shared: bulk_reduce_add .* thread 1 \(warp 0, lane 1\) wrote",
    "store_without_barrier": r"race: bulk_reduce_add of 1024 bytes .* is not ordered after the write by thread 0",
    "source_overwritten": r"store of 16 bytes .*, which a store to global memory by thread 0 .* is still reading",
    "source_overwritten_after_older_group": r"store of 16 bytes .*, which a store to global .* is still reading",
    "source_overwritten_without_barrier": r"race: (store .* the wait for a store to|bulk_reduce_add .* the write)",
    "exit_before_source_is_read": r"the thread exits, and this store may not have read its shared memory yet",
    "store_not_committed": r"the thread exits, and this store was never committed",
    "odd_bulk_load": r"bulk_load of 24 bytes: size and address must be multiples of 16",
    "missing_warpgroup_fence": r"missing warpgroup_fence: registers of this product may have been used",
    "fence_missing_after_wait": r"missing warpgroup_fence: registers of this product may have been used",
    "accumulator_scaled_after_fence": r"missing warpgroup_fence: the accumulator's registers were written after",
    "operand_registers_after_fence": r"missing warpgroup_fence: registers of this product may have been used",
    "accumulator_read_before_wait": r"store of a number that depends on an accumulator whose product was not waited f",
    "accumulator_packed_before_wait": r"a number is rounded that depends on an accumulator whose product thread \d",
    "accumulator_packed_to_8_bits_before_wait": r"a number is rounded that depends on an accumulator whose product",
    "transposed_without_proxy_fence": r"missing fence_async_shared: operand A of 16 bytes .* wrote at .*transposed_w",
    "wait_for_older_products": r"store of a number that depends on an accumulator whose product was not waited for",
    "products_not_committed": r"store of a number that depends on an accumulator whose product was not waited for",
    "accumulator_written_before_wait": r"register 3 of an accumulator was written before the wait for its product",
    "products_never_waited_for": r"the warp exits, and products that it issued are still under way",
    "operand_without_proxy_fence": r"missing fence_async_shared: operand A of 16 bytes .* wrote at .*operand_w",
    "operand_without_barrier": r"race: operand A of 16 bytes .* is not ordered after the write by thread",
    "operand_still_loading": r"operand A of 16 bytes .* a tensor copy is under way that thread 0",
    "operand_never_written": r"operand B of 16 bytes .*was never written",
    "operand_behind_shared": r"operand B of 16 bytes .* is outside the block's 24704 bytes",
    "operand_overwritten": r"store of 16 bytes .*, which a product of warps 0-3 at .* is still reading",
    "operand_overwritten_by_another_warp": r"store of 16 bytes .* (is still reading|after the wait for a product)",
    "stage_released_before_wait": r"thread 128 .*tensor_load .*, which a product of warps 0-3 at .* is still reading",
    "stage_released_by_one_warp": r"thread 128 .*tensor_load .* a product of warps 0-3 at ",
    "product_of_three_warps": r"deadlock: threads 0-95 wait for the rest of their warpgroup at a product",
    "warps_at_different_products": r"divergent warpgroup: this warp is at a product .*, warp \d waits at a product",
    "different_descriptors": r"thread 32 .*the descriptors of a product differ between the threads of a warpgroup",
    "overlapping_accumulators": r"the accumulator of 64 x 32 shares registers with one of another shape",
    "registers_never_given": r"deadlock: threads 0-127 exited; threads 128-383 wait for 240 registers .* pool has 0",
    "too_few_registers_given": r"deadlock: .*threads \d+-383 wait for 240 registers .* have 168 and the block's pool",
    "decrease_to_more_registers": r"registers_decrease to 200, where the warp has 168",
    "increase_to_fewer_registers": r"registers_increase to 200, where the warp has 240",
    "registers_of_one_warp": r"warps of one warpgroup have different numbers of registers: warp 1 168, warp 0 24",
}
NO_LINE = {  # errors that name no line
    "accumulator_packed_before_wait", "accumulator_packed_to_8_bits_before_wait", "registers_of_one_warp",
}  # fmt: skip


@in_simulator
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(name: str) -> None:
    numbers = torch.randn(64, 64).half()
    tensors = {"in0": numbers, "out0": torch.zeros(256)}
    with pytest.raises(RuntimeError, match=PLANTED[name]) as caught:
        _simulate(name, tensors, shared_bytes=3 * 8192 + 128, maps=(("in0", Map(numbers, (64, 64), 128)),))
    assert f"simulated kernel test_{name}, block (0, 0, 0)" in str(caught.value)
    assert name in NO_LINE or "hopper_planted_bugs.h:" in str(caught.value)
    # nothing of the failed launch is left
    out = torch.zeros(2, 32, dtype=torch.int32)
    _simulate("elections", {"out0": out})
    assert out.sum(1).tolist() == [1, 1]


@in_simulator
@pytest.mark.parametrize("seed", [1, 2])
def test_planted_bugs_are_found_in_any_order(seed: int, options: Callable[..., dict[str, Any]]) -> None:
    options(seed=seed)
    numbers = torch.randn(64, 64).half()
    maps = (("in0", Map(numbers, (64, 64), 128)),)
    for name in PLANTED:
        if name == "load_still_under_way":  # it may have come by then
            continue
        with pytest.raises(RuntimeError, match=f"simulated kernel test_{name}, block"):
            _simulate(name, {"in0": numbers, "out0": torch.zeros(256)}, shared_bytes=3 * 8192 + 128, maps=maps)


@in_simulator
def test_the_harness_of_planted_bugs_has_none() -> None:
    """What those kernels share, used rightly: the same kernel without its bug passes."""
    numbers = torch.randint(-4, 5, (64, 64)).half()
    out = torch.zeros(256)
    tensors = {"in0": numbers, "out0": out}
    arguments = {"shared_bytes": 3 * 8192 + 128, "maps": (("in0", Map(numbers, (64, 64), 128)),)}
    _simulate("stage_released_before_wait", tensors, n=(1,), **arguments)
    product = 2 * numbers[:, :16].float() @ numbers[:, :16].float().T
    assert torch.equal(out[:128], _accumulator(product).sum(1))


@in_simulator
def test_races_can_be_switched_off(options: Callable[..., dict[str, Any]]) -> None:
    """Order and fences go unchecked then; what is under way still is not."""
    numbers = torch.randn(64, 64).half()
    tensors = {"in0": numbers, "out0": torch.zeros(256)}
    arguments = {"shared_bytes": 3 * 8192 + 128, "maps": (("in0", Map(numbers, (64, 64), 128)),)}
    options(races=False)
    _simulate("operand_without_proxy_fence", tensors, **arguments)
    with pytest.raises(RuntimeError, match="is still reading"):
        _simulate("operand_overwritten", tensors, **arguments)


@in_simulator
def test_report_counts_instructions() -> None:
    a, b = torch.zeros(2, 128, 128, dtype=torch.float16)
    out = torch.zeros(128, 128)
    maps = (("in0", Map(a, (64, 64), 128)), ("in1", Map(b, (64, 64), 128)))
    _simulate("matrix_product_f16_0", {"in0": a, "in1": b, "out0": out}, shared_bytes=65536 + 16, maps=maps)
    report = _native.last_report()
    assert (report["warpgroup_products"], report["tensor_copies"]) == (16, 8)
