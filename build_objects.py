"""Compiles objects in parallel, and only those whose sources, headers or flags have changed.  Used by setup.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Unit:
    """One object: `command` compiles `source` to `target`.  The compiler must understand -MD -MF."""

    command: tuple[str, ...]
    source: Path
    target: Path
    mode: str = "-c"

    def line(self) -> list[str]:
        files = ["-MF", str(self.dependencies), self.mode, str(self.source), "-o", str(self.target)]
        return [*self.command, "-MD", *files]

    @property
    def dependencies(self) -> Path:
        return self.target.with_suffix(".d")

    @property
    def stamp(self) -> Path:
        return self.target.with_suffix(".flags")

    def is_current(self) -> bool:
        """Whether the object is newer than everything it was made from, and was made with these flags."""
        if not (self.target.exists() and self.dependencies.exists() and self.stamp.exists()):
            return False
        if self.stamp.read_text() != str(self.line()):
            return False
        made = self.target.stat().st_mtime
        # "target: first second \<newline> third"; a header that is gone makes its object stale
        names = self.dependencies.read_text().replace("\\\n", " ").partition(": ")[2].split()
        paths = [self.source, *map(Path, names)]
        return all(path.exists() and path.stat().st_mtime < made for path in paths)

    def compile(self) -> None:
        if self.is_current():
            return
        self.stamp.unlink(missing_ok=True)
        result = subprocess.run(self.line(), capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"compiling {self.source.name} for {self.target.stem} failed:\n{result.stderr[-4000:]}")
        if result.stderr:
            print(result.stderr, file=sys.stderr)
        self.stamp.write_text(str(self.line()))


def relative_paths(*folders: str | Path) -> list[str]:
    """Flags of the compiler: the names of files in what is compiled start at these folders, the innermost last.  The
    same sources make the same binary wherever they lie, and no builder's home shows in a message."""
    return [f"-ffile-prefix-map={Path(folder).resolve()}/=" for folder in folders]


def compile_all(units: Sequence[Unit]) -> None:
    """Compile every unit, MAX_JOBS (default: one per core) at a time.  Put the slowest first."""
    for unit in units:
        unit.target.parent.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Unit.compile, units))
