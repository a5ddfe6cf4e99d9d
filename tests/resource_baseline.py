"""What kernels took when they were last looked at: figures by compiler version and kernel, in tests/resources."""

from __future__ import annotations

import fcntl
import json
import tempfile
from pathlib import Path

Figures = dict[str, list[int]]


def read_versions(path: Path) -> dict[str, Figures]:
    """All there is, by compiler version."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_baseline(path: Path, version: str) -> Figures:
    """The figures of each kernel as that compiler version makes it."""
    return read_versions(path).get(version, {})


def add_to_baseline(path: Path, version: str, found: Figures) -> None:
    """Write what was found over what was known, one kernel a line."""
    path.parent.mkdir(exist_ok=True)
    with open(Path(tempfile.gettempdir()) / f"fastattn-{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        everything = read_versions(path)
        everything.setdefault(version, {}).update(found)
        blocks = []
        for name, kernels in sorted(everything.items()):
            rows = ",\n".join(f"  {json.dumps(kernel)}: {figures}" for kernel, figures in sorted(kernels.items()))
            blocks.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
        partial = path.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
        partial.replace(path)  # whoever reads it meanwhile has the old one whole
