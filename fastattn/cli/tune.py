"""``python -m fastattn tune``: search the Triton tile table on this GPU and write the rows that beat it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fastattn.cli.console import Console, escape

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", default="64,128,256", help="comma-separated")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--length", type=int, default=4096, help="queries and keys (default 4096)")
    parser.add_argument("--tokens", type=int, default=16384, help="batch times length (default 16384)")
    parser.add_argument("--gain", type=float, default=1.03, help="a row is written if it is this much faster")
    parser.add_argument("--out", type=Path, default=Path("fastattn-tiles.json"), help="the row file to write")


def main(options: argparse.Namespace) -> int:
    console = Console()
    if not torch.cuda.is_available():
        console.print("[red]error:[/red] tune needs a GPU that torch can use")
        return 2
    from triton.testing import do_bench

    import fastattn
    from fastattn.functional import lower
    from fastattn.triton_kernels import tiles, tuning
    from fastattn.triton_kernels.attention import target

    device = torch.device("cuda", torch.cuda.current_device())
    (capability, memory), dtype = target(device), DTYPES[options.dtype]
    rows = []
    for dim in map(int, options.head_dims.split(",")):
        heads, batch = max(1, 2048 // dim), max(1, options.tokens // options.length)
        shape = (batch, heads, options.length, dim)
        query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        problem = lower(query, key, value, mask=fastattn.Causal())
        for kernel in tuning.KERNELS:
            default = tiles.tile(kernel, dim, dtype.itemsize, capability, memory)
            choices = [default, *(c for c in tuning.candidates(dim, dtype.itemsize, memory) if c != default)]
            console.print(f"{kernel}, D = {dim}, {options.dtype}: {len(choices)} tiles")
            trials = tuning.search(
                kernel, problem, choices, lambda call: do_bench(call, quantiles=[0.5], return_mode="median") / 1e3
            )
            table = next(t for t in trials if t.tile == default)
            for trial in trials[:3]:
                took = "failed" if trial.seconds is None else f"{1e3 * trial.seconds:.3f} ms"
                console.print(f"  {took}  {tuple(trial.tile)}")
            for trial in trials:
                if trial.seconds is None:
                    console.print(f"  {tuple(trial.tile)}: {escape(trial.reason)}")
            best = trials[0]
            if best.seconds is None or (table.seconds is not None and best.seconds * options.gain > table.seconds):
                console.print(f"  the table's {tuple(default)} stays")
                continue
            rows.append(
                {
                    "kernel": kernel,
                    "head_dim": dim,
                    "itemsize": dtype.itemsize,
                    "capability": list(capability),
                    "shared_memory": memory,
                    "tile": list(best.tile),
                    "seconds": best.seconds,
                    "table_seconds": table.seconds,
                    "device": torch.cuda.get_device_name(device),
                    "torch": torch.__version__,
                }
            )
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"{len(rows)} rows in {options.out}; use them with FASTATTN_TILES={options.out}")
    return 0
