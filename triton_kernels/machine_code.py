"""What a compiler made of a kernel, read from its machine code with the tools inside the triton package."""

from __future__ import annotations

import collections
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class MachineCode:
    """What one kernel takes.  Bytes and counts as the disassembler prints them."""

    registers: int
    stack: int  # local memory of a thread: what does not fit its registers
    shared: int  # static; without what a launch adds
    opcodes: collections.Counter[str]  # by mnemonic without suffixes, such as HMMA

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def products(self) -> int:
        """Tensor core instructions: mma.sync, wgmma and tcgen05."""
        return sum(self.opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "IMMA"))


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: Path) -> str:
    """The machine code of a cubin, an instruction a line."""
    return subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def read_machine_code(cubin: Path) -> MachineCode:
    """The only kernel of a cubin; with several, the most that any takes and the counts of all together."""
    usage = subprocess.run(
        [_tool("cuobjdump"), "-res-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    sass = disassemble(cubin)

    def most(what: str) -> int:
        return max(int(n) for n in re.findall(rf"{what}:(\d+)", usage))

    return MachineCode(
        registers=most("REG"),
        stack=most("STACK"),
        shared=most("SHARED"),
        opcodes=collections.Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)", sass)),
    )
