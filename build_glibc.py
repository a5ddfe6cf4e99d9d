"""Links a library on a new Linux so that it loads on an old one: it asks for nothing of glibc younger than 2.28.

glibc gives a function a new version when it changes in a corner (exp no longer calls a handler of errors) or when it
moves (dlopen from libdl to libc), and keeps the old version for ever.  The linker takes the newest it sees.  So what is
linked is looked at, and where it is too young linked again, with stubs in front that have the old names and versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Version = tuple[int, ...]
OLDEST: Version = (2, 28)  # of manylinux_2_28, which torch's own wheels ask for
# Where functions were before libc took them in, by how their names begin.
FORMER_HOMES = {"pthread_": "libpthread.so.0", "sem_": "libpthread.so.0", "dl": "libdl.so.2", "shm_": "librt.so.1"}
# A variable of 2.32: whether there is one thread, so that references are counted without atomics.  "No" is never wrong.
SINGLE_THREADED = "__libc_single_threaded"


def link(command: Sequence[str], libraries: Sequence[str], output: Path, scratch: Path) -> None:
    """Link `output` with `command` (the compiler, its flags and the objects) and `libraries` (flags that come last).

    What the system's glibc keeps no old version of stays young; `auditwheel show` then says so.
    """
    subprocess.run([*command, "-o", str(output), *libraries], check=True)
    used = used_symbols(output) if sys.platform.startswith("linux") else {}
    if any(version > OLDEST for version in used.values()):
        scratch.mkdir(parents=True, exist_ok=True)
        stubs = [*_stubs(command[0], used, scratch), *_single_threaded(command[0], used, scratch)]
        subprocess.run([*command, "-o", str(output), *libraries, *map(str, stubs)], check=True)


def used_symbols(library: Path) -> dict[str, Version]:
    """What a library takes of glibc, and in which version."""
    return dict(_symbols(library, "U", "--undefined-only"))


def _stubs(compiler: str, used: dict[str, Version], scratch: Path) -> list[Path]:
    """Libraries named like those of glibc that have something too young, with all that is used of them, at the oldest
    version there is of it: the linker looks into no second library of the same name."""
    homes: dict[str, dict[str, Version]] = {}
    for library in ("libc.so.6", "libm.so.6"):
        asked = [compiler, f"-print-file-name={library}"]
        path = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
        for name, version in _symbols(path, "[TWi]", "--defined-only"):
            if name in used:
                home = next((home for start, home in FORMER_HOMES.items() if name.startswith(start)), library)
                held = homes.setdefault(home, {})
                # the one in use, unless that is too young: then the oldest
                held[name] = used[name] if used[name] <= OLDEST else min(held.get(name, version), version)
    stubs = []
    for home, held in sorted(homes.items()):
        if all(used[name] <= OLDEST for name in held):
            continue
        nodes: dict[Version, list[str]] = {}
        for name, version in sorted(held.items()):
            nodes.setdefault(version, []).append(name)
        script, flags = scratch / f"{home}.map", ["-shared", "-fPIC", "-nostdlib", "-fno-builtin"]
        script.write_text(
            "".join(f"GLIBC_{'.'.join(map(str, v))} {{ {'; '.join(nodes[v])}; }};\n" for v in sorted(nodes))
        )
        source = "".join(f"void {name}(void) {{}}\n" for name in held)
        link_flags = f"-Wl,-soname,{home},--version-script={script}"
        stubs.append(_compile(compiler, [*flags, link_flags], source, scratch / home))
    return stubs


def _single_threaded(compiler: str, names: Iterable[str], scratch: Path) -> list[Path]:
    if SINGLE_THREADED not in names:
        return []
    source = f'__attribute__((visibility("hidden"))) char {SINGLE_THREADED} = 0;\n'
    return [_compile(compiler, ["-c", "-fPIC"], source, scratch / "single_threaded.o")]


def _compile(compiler: str, flags: Sequence[str], source: str, target: Path) -> Path:
    subprocess.run([compiler, "-x", "c", *flags, "-", "-o", str(target)], input=source, text=True, check=True)
    return target


def _symbols(library: Path, kind: str, which: str) -> list[tuple[str, Version]]:
    """The dynamic symbols of glibc that a library has or wants, by their versions."""
    command = ["nm", "--dynamic", "--with-symbol-versions", which, str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(rf" {kind} (\w+)@@?GLIBC_([\d.]+)$", listed, re.MULTILINE)
    return [(name, tuple(map(int, version.split(".")))) for name, version in found]
