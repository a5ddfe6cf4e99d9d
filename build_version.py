"""The version of a build, made here and nowhere else: in the metadata, and so in the name of the wheel.

`0.1.0` for a build from source, `0.1.0+cpu` and `0.1.0+cu130` for wheels to hand out (FASTATTN_LOCAL_VERSION=1).  A
source distribution never has the local part: an installer that was promised 0.1.0 refuses to get 0.1.0+cpu from it.
"""

from __future__ import annotations

import os

VERSION = "0.1.0"


def local_label(cuda: str | None) -> str:
    """What a build is for, of the release of its CUDA toolkit: "cu130" of "13.0", "cpu" of None."""
    return "cu" + cuda.replace(".", "") if cuda else "cpu"


def version(cuda: str | None) -> str:
    """The version of a build with this CUDA toolkit ("13.0"), or without the CUDA library (None)."""
    local = os.environ.get("FASTATTN_LOCAL_VERSION") == "1"
    return f"{VERSION}+{local_label(cuda)}" if local else VERSION
