"""Writes wgmma.h: an accumulator of n / 2 registers is n / 2 operands of the instruction, so each n has its own text.

python csrc/cuda/arch/generate_wgmma.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("wgmma.h")
WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
TYPES = {"Half": "f16", "BFloat16": "bf16"}
WIDTHS_OF_8_BITS = (64, 96, 128, 160, 192, 256)

HEADER = """\
// Written by generate_wgmma.py.  d (64 x N, float32) = a b, plus d where `accumulate`; K is 16, of E4M3 32.
//
// Thread i of the warpgroup, lane l = i % 32: d[j] is row 16 (i / 32) + l / 4 + 8 ((j / 2) % 2), column
// 8 (j / 4) + 2 (l % 4) + j % 2.  `shared` takes both operands from shared memory through descriptors; `registers`
// takes A as load_matrix_x4 and multiply_m16n8k16 know it: the same bytes of a row for 8 bits as for 16, so a[0] has
// columns 4 (l % 4) to 4 (l % 4) + 3 of E4M3 and a[2] those 16 columns on.  kTransposeA, kTransposeB: the operand's
// rows run along M or N; those of E4M3 run along K.
#pragma once

#include "types.h"

namespace fastattn::cuda {

template <class T, int N>
struct WarpgroupMultiply;

// clang-format off
"""


def product(kind: str, ptx_type: str, n: int) -> str:
    registers = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(registers))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    eight = ptx_type == "e4m3"
    simulated_type = "sim::Operands::" + {"f16": "kHalf", "bf16": "kBFloat16", "e4m3": "kE4M3"}[ptx_type]
    if kind == "shared":
        simulated_a, simulated_flags = "nullptr, a", "kTransposeA, kTransposeB"
        template, parameter = "int kTransposeA, int kTransposeB", "uint64_t a"
        operand, inputs, after = "%{0}", '"l"(a)', 1
        flags, constants = ", %{0}, %{1}", '"n"(kTransposeA), "n"(kTransposeB)'
    else:
        simulated_a, simulated_flags = "a, 0", "false, kTransposeB"
        template, parameter = "int kTransposeB", "const uint32_t (&a)[4]"
        operand, inputs, after = "{{%{0}, %{1}, %{2}, %{3}}}", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])', 4
        flags, constants = ", %{0}", '"n"(kTransposeB)'
    a = operand.format(*range(registers, registers + after))
    b, accumulate, first_flag = (registers + after + i for i in range(3))
    flags = flags.format(first_flag, first_flag + 1)
    asserted = ""
    if eight:
        never = " && ".join(f"{name} == 0" for name in re.findall(r"kTranspose\w", template))
        flags, constants, asserted = "", "", f"    static_assert({never});\n"
    constants = constants and f", {constants}"
    return f"""\
  template <{template}>
  static FASTATTN_DEVICE void {kind}(float (&d)[{registers}], {parameter}, uint64_t b,
                                     bool accumulate FASTATTN_WHERE) {{
{asserted}#ifdef __CUDACC__
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{accumulate}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{32 if eight else 16}.f32.{ptx_type}.{ptx_type} "
        "{{{accumulators}}}, "
        "{a}, %{b}, p, 1, 1{flags};\\n}}"
        : {outputs}
        : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)){constants});
#else
    sim::warpgroup_multiply(d, {n}, {simulated_a}, b, accumulate, {simulated_type}, {simulated_flags}, where);
#endif
  }}
"""


def generate() -> str:
    parts = [HEADER]
    every = [(name, ptx_type, n) for name, ptx_type in TYPES.items() for n in WIDTHS]
    every += [("E4M3", "e4m3", n) for n in WIDTHS_OF_8_BITS]
    for name, ptx_type, n in every:
        body = "\n".join(product(kind, ptx_type, n) for kind in ("shared", "registers"))
        parts.append(f"template <>\nstruct WarpgroupMultiply<{name}, {n}> {{\n{body}}};\n\n")
    parts.append("// clang-format on\n\n}  // namespace fastattn::cuda\n")
    return "".join(parts)


if __name__ == "__main__":
    text = generate()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text() == text else f"{TARGET} is not what {Path(__file__).name} writes")
    TARGET.write_text(text)
