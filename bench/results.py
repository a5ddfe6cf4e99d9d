"""Long-form rows: one measurement of one variant per row, in CSV files that later runs extend."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import fastattn
from fastattn import native
from fastattn.bench.scenarios import Case

# A later run of the same thing replaces the row; everything else is kept beside it.
KEY = (
    "device", "isa", "threads", "torch", "triton", "fastattn", "commit", "suite", "case", "variant", "direction",
    "dtype", "batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where rows were measured."""

    date: str
    device: str  # GPU name, or CPU model
    isa: str  # compute capability, or the instruction set of the CPU kernels
    threads: int
    torch: str
    triton: str
    fastattn: str
    commit: str


@dataclass(frozen=True)
class Row:
    """One line of the CSV.  Times in seconds; empty where not measured, with the reason in `note`."""

    date: str
    device: str
    isa: str
    threads: int
    torch: str
    triton: str
    fastattn: str
    commit: str
    suite: str
    case: str
    variant: str
    direction: str  # forward (inference) | backward | both (a training step's forward and backward)
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    status: str  # ok | cannot | wrong | skipped
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    samples: int = 0
    host_s: float | None = None  # median until the host was free again, where the device has a queue of its own
    ratio: float | None = None  # baseline's time over this one's: above 1 is faster than the baseline
    baseline: str = ""
    tflops: float | None = None  # by forward_flops in scenarios.py, times 1, 2.5, 3.5
    gb_per_s: float | None = None  # 1e9 bytes, by attention_bytes in scenarios.py and moved_bytes in rows.py
    fraction: float | None = None  # of what the ceilings of the same run allow, see roofline.py
    ceiling: str = ""  # the ceiling that is lower for this case
    peak_gb: float | None = None  # 1e9 bytes above the level before the call
    error: float | None = None  # largest error over its budget, at the gate
    kernel: str = ""  # which of fastattn's kernels ran
    note: str = ""

    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEY)


FIELDS = tuple(f.name for f in fields(Row))
_INTEGERS = frozenset(f.name for f in fields(Row) if f.type == "int")
_NUMBERS = frozenset(f.name for f in fields(Row) if "float" in str(f.type))


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Processor")):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout the package runs from, "+" when its sources differ from it; empty outside one."""
    root = Path(fastattn.__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "-C", str(root), "diff", "--quiet", "HEAD", "--", "fastattn", "csrc", "triton_kernels", "setup.py"],
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip() + ("+" if changed.returncode else "")


def environment(device: str) -> Environment:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        name = cpu_model()
        isa = str(native.cpu_info().get("isa", "")) if native.load_cpu_library() else ""
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        device=name,
        isa=isa,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton_version,
        fastattn=fastattn.__version__,
        commit=os.environ.get("FASTATTN_COMMIT") or commit(),  # a copy without .git is told its commit
    )


def make_row(where: Environment, case: Case, variant: str, direction: str, **measured: object) -> Row:
    shape = case.shape
    return Row(
        **asdict(where),
        suite=case.suite,
        case=case.name,
        variant=variant,
        direction=direction,
        dtype=str(case.dtype).removeprefix("torch."),
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        query_length=shape.query_length,
        key_length=shape.key_length,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        **measured,  # type: ignore[arg-type]
    )


def read(path: Path) -> list[Row]:
    """Rows of a file; columns that a later version added are empty in older rows, unknown ones are dropped."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            values: dict[str, object] = {}
            for name in FIELDS:
                text = record.get(name) or ""
                if name in _INTEGERS:
                    values[name] = int(text or 0)
                elif name in _NUMBERS:
                    values[name] = float(text) if text else None
                else:
                    values[name] = text
            rows.append(Row(**values))  # type: ignore[arg-type]
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """Merge rows into the file: the newest of equal keys stays, the order is stable."""
    merged = {row.key(): row for row in read(path)}
    merged |= {row.key(): row for row in rows}
    replace_csv(path, FIELDS, ({name: _text(value) for name, value in asdict(row).items()} for row in merged.values()))


def replace_csv(path: Path, fields: Sequence[str], lines: Iterable[dict[str, object]]) -> None:
    """A new file in the place of the old one; a run that is killed leaves one of the two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    partial.replace(path)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest run of each case on each device: suites are measured again when what they measure has changed."""
    rows = list(rows)
    newest = {_subject(row): row.commit for row in rows}  # the last one in the file
    return [row for row in rows if row.commit == newest[_subject(row)]]


def _subject(row: Row) -> tuple[str, ...]:
    return (row.device, row.isa, row.suite, row.case, row.dtype)


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
