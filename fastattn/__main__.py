"""``python -m fastattn info | demo | bench | verify | tune``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "info": "versions, CPU features, GPUs, kernels compiled, and what is missing",
    "demo": "replace the attention of a real pretrained encoder: parity, time, memory",
    "bench": "speed and memory against every other implementation here",
    "verify": "parity of every feature with the float64 formula, on this machine",
    "tune": "search the tile sizes of the Triton kernels on this GPU",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Exact attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if argv is None else argv
    chosen = next((a for a in arguments if a in COMMANDS), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the others stay unimported: `info` must work where the demo's packages are missing
            module = importlib.import_module(f"fastattn.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.main)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
