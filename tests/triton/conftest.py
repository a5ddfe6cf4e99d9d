"""Tests of the Triton kernels in Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so these tests need TRITON_INTERPRET=1 in the environment of the
whole process; `tests/test_triton_interpreted.py` runs them so.
"""

from __future__ import annotations

import os
from collections.abc import Callable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def _patch_once_a_launch(patch: Callable) -> Callable:
    """`patch` prepares triton.language for a function; where a launch has already done so for its module, it is free.

    The interpreter prepares it again whenever one function of a kernel calls another, a quarter of the time of a test.
    """
    done: set[int] = set()

    class Prepared:
        def __init__(self, restore: Callable[[], None] = lambda: None) -> None:
            self._restore = restore

        def restore(self) -> None:  # at the end of a launch
            done.clear()
            self._restore()

    def once(function: Callable) -> Prepared:
        if id(function.__globals__) in done:
            return Prepared()
        done.add(id(function.__globals__))
        return Prepared(patch(function).restore)

    return once


if INTERPRETED:
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang"):  # not of Triton's interface
        interpreter._patch_lang = _patch_once_a_launch(interpreter._patch_lang)
