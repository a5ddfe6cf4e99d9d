"""Which backends run where: the one place that the tests of GPU kernels are parametrised by."""

from __future__ import annotations

import pytest

import fastattn

# Backends that run on CUDA tensors.  Their tests are in test_gpu.py; those of the other files make CPU tensors.
GPU_BACKENDS = ("triton", "cuda")

FUSED_ON_GPU = [
    pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=str(b.reason))])
    for b in fastattn.backends()
    if b.name in GPU_BACKENDS
]
