"""The generated instances are what their table says, and as few as promised."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"
if not FOLDER.exists():
    pytest.skip("not in a checkout: no kernel sources", allow_module_level=True)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_instances", FOLDER / "generate_instances.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_files_are_current(generator: ModuleType) -> None:
    wanted = generator.files()
    stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    left = [path.name for path in (FOLDER / "instances").glob("*") if path not in wanted]
    assert not stale + left, f"{stale + left}: run python csrc/cuda/generate_instances.py"


def test_few_enough(generator: ModuleType) -> None:
    names = [instance.name for instance in generator.instances()]
    hopper = [name for name in names if name.startswith("hopper_")]
    assert len(names) == len(set(names))
    assert len(names) - len(hopper) <= generator.LIMIT == 60
    assert len(hopper) <= generator.HOPPER_LIMIT == 70
