"""Writes the kernel instances: one small .cu file each in `instances/`, and their declarations in `instances.h`.

    python csrc/cuda/generate_instances.py

An instance is a kernel at one element type and head dimension.  Whatever else a call asks for is a branch at run time,
the same for all threads of a block: that is what keeps the number of instances, and the time to compile them, small.
`tests/test_cuda_instances.py` fails when the files are not what this table says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
LIMIT = 60  # instances of the whole library, those of sm_90a aside
HOPPER_LIMIT = 70  # instances for sm_90a alone

TYPES = {"f16": "Half", "bf16": "BFloat16", "f32": "float", "e4m3": "E4M3"}
HALF_TYPES = ("f16", "bf16")
ALL_TYPES = ("f16", "bf16", "f32")
DIMS = (32, 64, 96, 128, 192, 256)
HOPPER_DIMS = (64, 96, 128, 192, 256)
DECODE_DIMS = (64, 128, 256)  # reading fewer columns than the kernel has costs it nothing


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it is instantiated for.  {type} and {dim} in the C++ expressions are filled in."""

    name: str
    header: str  # relative to csrc/cuda
    params: str
    function: str
    threads: str
    min_blocks: str = "1"  # blocks that a multiprocessor must hold at once: bounds the registers
    types: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()


KERNELS = (
    Kernel(
        "forward", "attention/forward.h", "ForwardParams", "attention_forward<ForwardConfig<{type}, {dim}>>",
        "forward_tiles({dim}).threads()", "forward_tiles({dim}).min_blocks", HALF_TYPES, DIMS,
    ),
    Kernel(
        "backward_kv", "attention/backward_kv.h", "BackwardParams",
        "attention_backward_kv<BackwardKvConfig<{type}, {dim}>>", "backward_kv_tiles({dim}).threads()", "1",
        HALF_TYPES, DIMS,
    ),
    Kernel(
        "backward_q", "attention/backward_q.h", "BackwardParams",
        "attention_backward_q<BackwardQConfig<{type}, {dim}>>", "backward_q_tiles({dim}).threads()", "1",
        HALF_TYPES, DIMS,
    ),
    Kernel(
        "decode", "attention/decode.h", "DecodeParams", "attention_decode<DecodeConfig<{type}, {dim}>>",
        "decode_tiles({dim}).threads()", "1", HALF_TYPES, DECODE_DIMS,
    ),
    Kernel(
        "parameter_gradient", "attention/parameter_gradient.h", "ParameterParams",
        "attention_parameter_gradient<ParameterConfig<{type}>>", "ParameterTiles::kThreads", "2", HALF_TYPES,
    ),
    # bound by memory or small: element types are branches at run time
    Kernel("attention_spans", "attention/spans.h", "SpansParams", "attention_spans", "SpansTiles::kThreads", "4"),
    Kernel("attention_delta", "attention/delta.h", "DeltaParams", "attention_delta", "DeltaTiles::kThreads", "8"),
    Kernel(
        "attention_combine", "attention/combine.h", "CombineParams", "attention_combine", "CombineTiles::kThreads", "4",
    ),
    Kernel("attention_sum", "attention/sums.h", "SumParams", "attention_sum", "SumTiles::kThreads", "4"),
    Kernel("rotary", "rows/rotary.h", "RotaryParams", "rotary<{type}>", "kRotaryThreads", "2", ALL_TYPES),
    Kernel(
        "softmax_forward", "rows/softmax_forward.h", "SoftmaxParams", "softmax_forward<{type}>", "kRowThreads", "2",
        ALL_TYPES,
    ),
    Kernel(
        "softmax_backward", "rows/softmax_backward.h", "SoftmaxGradientParams", "softmax_backward<{type}>",
        "kRowThreads", "3", ALL_TYPES,
    ),
    # the two 16-bit types share one: they differ in a conversion
    Kernel("line_sum", "rows/line_sum.h", "LineSumParams", "line_sum<{type}>", "kLineThreads", "4", ("f16", "f32")),
    Kernel("part_sum", "rows/part_sum.h", "PartSumParams", "part_sum", "kRowThreads", "4"),
    # sm_90a: with every stage as a branch, with none but intervals of keys, and that without held exponentials
    Kernel(
        "hopper_forward", "hopper/forward.h", "HopperForwardParams",
        "hopper_attention_forward<HopperForwardConfig<{type}, {dim}, false>>",
        "hopper_forward_tiles({dim}, false).threads()", "1", HALF_TYPES, HOPPER_DIMS,
    ),
    Kernel(
        "hopper_forward_plain", "hopper/forward.h", "HopperForwardParams",
        "hopper_attention_forward<HopperForwardConfig<{type}, {dim}, true>>",
        "hopper_forward_tiles({dim}, true).threads()", "1", HALF_TYPES, HOPPER_DIMS,
    ),
    Kernel(
        "hopper_forward_unpinned", "hopper/forward.h", "HopperForwardParams",
        "hopper_attention_forward<HopperForwardConfig<{type}, {dim}, true, false>>",
        "hopper_forward_tiles({dim}, true).threads()", "1", ("bf16",), (64, 128, 256),
    ),
    *(
        Kernel(
            f"hopper_forward{suffix}", "hopper/forward.h", "HopperForwardParams",
            f"hopper_attention_forward<HopperForwardConfig<{{type}}, {{dim}}, {plain}>>",
            f"hopper_e4m3_tiles({{dim}}, {plain}).threads()", "1", ("e4m3",), (64, 128, 256),
        )
        for suffix, plain in (("", "false"), ("_plain", "true"))
    ),
    *(
        Kernel(
            f"hopper_backward_{side.lower()}{suffix}", f"hopper/backward_{side.lower()}.h", "HopperBackwardParams",
            f"hopper_attention_backward_{side.lower()}<HopperBackward{side}Config<{{type}}, {{dim}}, {plain}>>",
            f"HopperBackward{side}Tiles::kThreads", "1", HALF_TYPES, HOPPER_DIMS,
        )
        for side in ("Q", "Kv")
        for suffix, plain in (("", "false"), ("_plain", "true"))
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One kernel at one type and dimension."""

    name: str
    kernel: Kernel
    function: str
    threads: str
    min_blocks: str

    def source(self) -> str:
        arguments = f"{self.name}, {self.kernel.params}, ({self.function}), {self.threads}, {self.min_blocks}"
        return (
            f"// Written by generate_instances.py.\n// clang-format off\n"
            f'#include "../{self.kernel.header}"\n\n'
            f"namespace fastattn::cuda {{\n"
            f"FASTATTN_KERNEL({arguments})\n"
            f"}}  // namespace fastattn::cuda\n"
        )

    def declaration(self) -> str:
        return f"void {self.name}(const Launch&, const {self.kernel.params}&);\n"


def instances() -> Iterator[Instance]:
    """Every instance, in the order of the table."""
    for kernel in KERNELS:
        for type_name in kernel.types or ("",):
            for dim in kernel.dims or (0,):
                parts = [kernel.name, type_name, f"d{dim}" if dim else ""]

                def fill(text: str, type_name: str = type_name, dim: int = dim) -> str:
                    return text.replace("{type}", TYPES.get(type_name, "")).replace("{dim}", str(dim))

                yield Instance(
                    "_".join(filter(None, parts)), kernel,
                    fill(kernel.function), fill(kernel.threads), fill(kernel.min_blocks),
                )  # fmt: skip


def files() -> dict[Path, str]:
    """What every generated file must hold."""
    listed = list(instances())
    hopper = sum(instance.kernel.name.startswith("hopper") for instance in listed)
    if len(listed) - hopper > LIMIT or hopper > HOPPER_LIMIT:
        raise ValueError(f"{len(listed) - hopper} and {hopper} instances, at most {LIMIT} and {HOPPER_LIMIT}")
    headers = sorted({str(Path(kernel.header).parent / "params.h") for kernel in KERNELS})
    declarations = (
        "// Written by generate_instances.py: the launch function of every kernel instance.\n"
        "#pragma once\n\n"
        '#include "arch/launch.h"\n'
        + "".join(f'#include "{header}"\n' for header in headers)
        + "\nnamespace fastattn::cuda {\n\n"
        + "".join(instance.declaration() for instance in listed)
        + "\n}  // namespace fastattn::cuda\n"
    )
    result = {FOLDER / "instances" / f"{instance.name}.cu": instance.source() for instance in listed}
    result[FOLDER / "instances.h"] = declarations
    return result


def main() -> None:
    wanted = files()
    for path in (FOLDER / "instances").glob("*.cu"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        # an untouched file keeps its time, and its object
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
