"""Tests of the Triton kernels in Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so these tests need TRITON_INTERPRET=1 in the environment of the
whole process; `tests/test_triton_interpreted.py` runs them so.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
