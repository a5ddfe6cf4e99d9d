"""Imports point downward only, and importing fastattn stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent

# From the bottom up; a module may import from its own layer (but see test_no_cycles) and from those above it here.
LAYERS: list[tuple[str, ...]] = [
    ("problem", "softmax_problem", "rotation", "additive_problem", "quantized_problem", "philox"),
    ("reference", "ops"),
    ("autograd", "softmax_autograd", "rotation_autograd", "additive_autograd", "weights_autograd", "native"),
    ("backends", "triton_kernels"),
    ("dispatch",),
    ("validation",),
    ("lowering",),
    ("masks", "biases", "rotary"),
    ("float8",),
    ("functional", "softmax", "rotate", "additive", "positional"),
    ("sdpa",),
    ("", "nn", "integrations"),
    ("cli", "bench", "__main__"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _layer(module: str) -> str:
    """The first name below the package: fastattn.backends.cpu is of the layer backends; fastattn itself is ''."""
    return [*module.split("."), ""][1]


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fastattn", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(module: str, path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """The fastattn modules that a file imports; not what it imports under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fastattn")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "fastattn"):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = any(inner == name for name, _ in ALL)
                yield inner if is_module else base


ALL = list(_modules())


@pytest.mark.parametrize(("module", "path"), ALL, ids=[name for name, _ in ALL])
def test_imports_point_downward(module: str, path: Path) -> None:
    assert _layer(module) in LEVEL, f"{module}: a new module; give it a layer in this file"
    for imported in _imports(module, path):
        if _layer(imported) == "" and _layer(module) in ("nn", "integrations", "cli", "bench", "__main__"):
            continue  # users of the public API
        assert LEVEL[_layer(imported)] <= LEVEL[_layer(module)], f"{module} imports {imported}, which is above it"
        assert imported != module


def test_backends_do_not_know_each_other() -> None:
    names = [name for name, _ in ALL if name.startswith("fastattn.backends.") and not name.endswith(".base")]
    for module, path in ALL:
        if module in names:
            assert not set(_imports(module, path)) & (set(names) - {module}), module


def test_the_narrow_waist_imports_nothing_of_the_package() -> None:
    for module, path in ALL:
        if module in ("fastattn.problem", "fastattn.philox"):
            assert not list(_imports(module, path))


def test_no_cycles() -> None:
    graph = {module: set(_imports(module, path, top_level_only=True)) - {"fastattn"} for module, path in ALL}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_import_is_light() -> None:
    """Nothing optional, nothing slow, no native build comes with the import."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new & {'numpy', 'rich', 'matplotlib', 'transformers', 'triton', 'setuptools'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.stdout.strip() == ""
