"""The checkout against another commit, in turns: ``python -m fastattn bench --against GITREF``.

The commit is checked out into a throw-away worktree and built there; where its native sources are those of this
checkout, the library that lies here is taken.  Both sides run this checkout's bench, each in a process of its own, and
take turns over every case, so that what differs is the package alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

import fastattn
from fastattn.bench.compare import merge
from fastattn.bench.measure import Options, ReadyCase, measure_case, ready_case
from fastattn.bench.results import Row, environment
from fastattn.bench.suites import SUITES
from fastattn.cli.console import Step

ROOT = Path(fastattn.__file__).resolve().parents[1]
NATIVE = ("csrc", "setup.py", "build_cuda.py", "build_native.py", "build_objects.py")
ROUNDS = 3


class AgainstError(RuntimeError):
    """The other commit could not be had, built or run; the message says which and why."""


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=check)
    except OSError as error:
        raise AgainstError(f"git: {error}") from error
    except subprocess.CalledProcessError as error:
        raise AgainstError(f"git {arguments[0]}: {error.stderr.strip() or error}") from error


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A built worktree of the commit, gone at the end.

    Raises:
        AgainstError: not a checkout, no such commit, or it does not build.
    """
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}", check=False)
    if found.returncode:
        raise AgainstError(f"{ref!r} names no commit of {ROOT}")
    commit = found.stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix="fastattn-against-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--detach", str(tree), commit)
        build(tree, commit)
        # this checkout's bench for both: what is measured and how must not differ
        (tree / "fastattn" / "bench").symlink_to(ROOT / "bench")
        # where an editable install of this checkout would find this one's
        (tree / "fastattn" / "triton_kernels").symlink_to(tree / "triton_kernels")
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree), check=False)
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune", check=False)


def build(tree: Path, commit: str) -> None:
    """The native libraries of the worktree: this checkout's where the sources are the same, else compiled."""
    same = _git("diff", "--quiet", commit, "--", *NATIVE, check=False).returncode == 0
    libraries = [*ROOT.glob("fastattn/lib/*.so"), *ROOT.glob("fastattn/_native*.so")]
    if same and libraries:
        for library in libraries:
            target = tree / library.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target)
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, "FASTATTN_NATIVE": "0"})
    if done.returncode:
        raise AgainstError(f"{commit[:10]} does not build: {done.stderr.strip()[-400:]}")


@dataclass
class Side:
    """A process with one version of the package, which measures a case when it is asked to."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, tree: Path, options: Options) -> Side:
        environ = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, "-m", "fastattn.bench.against", "--tree", str(tree), "--device", options.device]
        command += ["--budget", str(options.budget), "--threads", str(torch.get_num_threads())]
        command += ["--quick"] if options.quick else []
        command += ["--peers", ",".join(options.peers)] if options.peers else []
        pipe = subprocess.PIPE
        return cls(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ, cwd=tree))

    def measure(self, suite: str, index: int) -> list[Row]:
        """Rows of one turn."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps([suite, index]) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # its last words are on the terminal
        line = stdout.readline()
        if not line:
            raise AgainstError(f"{self.name}: the process ended with code {self.process.wait()}, see above")
        return [Row(**values) for values in json.loads(line)]

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run(ref: str, options: Options, step: Step, rounds: int = ROUNDS) -> tuple[list[Row], list[Row]]:
    """Rows of the other commit and of this checkout, from turns over every case of the suites.

    Raises:
        AgainstError: see `checkout`; or one side died.
    """
    cases = [
        (name, index)
        for name in options.suites
        if not (suite := SUITES[name](options.device, options.quick)).only_memory
        for index in range(len(suite.cases))
    ]
    before: list[Row] = []
    after: list[Row] = []
    with checkout(ref) as tree:
        sides = [Side.start(ref, tree, options), Side.start("this checkout", ROOT, options)]
        try:
            for done, (name, index) in enumerate(cases):
                step(f"{name}, case {index + 1}", done, len(cases))
                turns: tuple[list[list[Row]], list[list[Row]]] = ([], [])
                for turn in range(rounds):
                    for which in (0, 1) if turn % 2 == 0 else (1, 0):
                        turns[which].append(sides[which].measure(name, index))
                before += merge(turns[0])
                after += merge(turns[1])
        finally:
            for side in sides:
                side.stop()
    return before, after


def serve(options: Options, requests: IO[str], answers: IO[str]) -> None:
    """Measure one turn of [suite, index] for every line that comes in; a case is made ready once."""
    where = environment(options.device)
    current: tuple[str, int] | None = None
    ready: ReadyCase | None = None
    for line in requests:
        name, index = json.loads(line)
        suite = SUITES[name](options.device, options.quick)
        torch.set_num_threads(1 if suite.per_call else where.threads)
        if (name, index) != current or ready is None:
            ready, current = None, (name, index)  # the last case's tensors first: two may not fit
            ready = ready_case(suite, suite.cases[index], options, where)
        rows = ready.gated.refused + measure_case(ready, options, where)
        answers.write(json.dumps([dataclasses.asdict(row) for row in rows]) + "\n")
        answers.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="One side of `fastattn bench --against`: reads cases, writes rows.")
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers")
    options = parser.parse_args()
    if Path(fastattn.__file__).resolve().parents[1] != options.tree.resolve():
        raise SystemExit(f"fastattn came from {fastattn.__file__}, not from {options.tree}")
    torch.set_num_threads(options.threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints must not end up among the rows
    peers = options.peers.split(",") if options.peers else None
    chosen = Options([], options.device, options.quick, peers, options.budget)
    serve(chosen, sys.stdin, answers)


if __name__ == "__main__":
    main()
