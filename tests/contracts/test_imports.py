"""Which way the imports run, and what must not be written anywhere in the library. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "ldm").rglob("*.py"))
PROGRAMS = [ROOT / "main.py", *sorted((ROOT / "scripts").glob("*.py"))]

# Part of ldm -> parts it may import besides itself. `data` knows no model, training and inference do not know each other.
BASE = {"util", "imaging"}
MAY_IMPORT = {
    "util": set(),
    "imaging": {"util"},
    "processes": {"util"},
    "lr_scheduler": {"util"},
    "data": BASE,
    "modules": BASE,
    "models": BASE | {"modules"},
    "training": BASE | {"processes", "lr_scheduler", "modules", "models", "data"},
    "inference": BASE | {"processes", "modules", "models", "data"},
    "metrics": BASE | {"modules", "models", "data", "inference"},
}
# The one door for weights lies above the models that start from a file: they reach it when they load, not when they are imported.
DOOR = "ldm.inference.checkpoint"
PURE = ("ldm/modules/diffusionmodules/schedule.py", "ldm/modules/diffusionmodules/parameterization.py")
# Files in which the accelerator's name stands for a reason: the values of a flag, the state of its random generator, its memory.
NAMES_CUDA = {"ldm/inference/options.py", "ldm/training/state.py", "ldm/training/callbacks.py", "ldm/training/progress.py"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def nodes(path: Path) -> Iterator[tuple[ast.AST, bool]]:
    """Every node of a file, and whether it stands inside a function."""
    stack: list[tuple[ast.AST, bool]] = [(tree(path), False)]
    while stack:
        node, inside = stack.pop()
        yield node, inside
        deeper = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        stack += [(child, deeper) for child in ast.iter_child_nodes(node)]


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(module, inside a function, line) of everything a file imports; `from a import b` counts as a.b where that is a module."""
    for node, inside in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if is_module(name) else str(node.module)), inside, node.lineno


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def part_of(name: str) -> str | None:
    """ldm.modules.ema -> modules; None for what is not of ldm, and for the bare package."""
    head, _, rest = name.partition(".")
    return rest.split(".")[0] if head == "ldm" and rest else None


def where(path: Path, node: ast.AST | int) -> str:
    line = node if isinstance(node, int) else getattr(node, "lineno", 0)
    return f"{path.relative_to(ROOT)}:{line}"


def keywords(path: Path, name: str, value: object) -> list[tuple[ast.Call, str]]:
    """Calls with the keyword `name=value`, and the name of what is called."""
    found = []
    for node, _ in nodes(path):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in node.keywords):
                found.append((node, called))
    return found


def test_direction_of_imports():
    wrong = []
    for path in LIBRARY:
        own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own == "__init__":
            continue
        for name, inside, line in imports(path):
            other = part_of(name)
            through_the_door = name == DOOR and inside and own in ("modules", "models")
            if other not in (None, own, *MAY_IMPORT[own]) and not through_the_door:
                wrong.append(f"{where(path, line)}: ldm.{own} imports {name}")
    assert wrong == []


def test_the_library_does_not_know_programs_and_tests():
    wrong = [where(p, line) for p in LIBRARY for name, _, line in imports(p) if name.split(".")[0] in ("main", "scripts", "tests", "setup")]
    assert wrong == []


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_numpy_and_torch_only(name):
    foreign = {module for module, _, _ in imports(ROOT / name) if module.split(".")[0] not in sys.stdlib_module_names}
    assert {module.split(".")[0] for module in foreign} <= {"torch", "numpy", "ldm"}
    assert {module for module in foreign if module.startswith("ldm")} <= {"ldm.util"}


def test_the_library_does_not_print():
    wrong = [
        where(path, node)
        for path in LIBRARY
        for node, _ in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert wrong == []


def test_no_device_by_name():
    """Device and dtype come from the data: neither `.cuda()` and `torch.cuda`, nor "cuda" as a string."""
    wrong = []
    for path in LIBRARY:
        if path.relative_to(ROOT).as_posix() in NAMES_CUDA:
            continue
        for node, _ in nodes(path):
            literal = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0] == "cuda"
            if literal or (isinstance(node, ast.Attribute) and node.attr == "cuda"):
                wrong.append(where(path, node))
    assert wrong == []


def test_nothing_is_loaded_loosely():
    """Names must match, files are read without running code from them, and no error is swallowed whole."""
    wrong = []
    for path in [*LIBRARY, *PROGRAMS]:
        wrong += [f"{where(path, node)}: strict=False" for node, called in keywords(path, "strict", False) if called != "zip"]
        wrong += [f"{where(path, node)}: weights_only=False" for node, _ in keywords(path, "weights_only", False)]
        wrong += [f"{where(path, node)}: allow_pickle=True" for node, _ in keywords(path, "allow_pickle", True)]
        safe = {id(node) for node, _ in keywords(path, "weights_only", True)}
        for node, _ in nodes(path):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{where(path, node)}: bare except")
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "torch.load" and id(node) not in safe:
                wrong.append(f"{where(path, node)}: torch.load without weights_only=True")
            if called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"):
                wrong.append(f"{where(path, node)}: {called}")
    assert wrong == []


def test_every_module_says_what_it_is():
    assert [where(path, 1) for path in [*LIBRARY, *PROGRAMS] if not (ast.get_docstring(tree(path)) or "").strip()] == []


def test_the_package_and_its_helpers_come_without_torch():
    code = "import sys, ldm, ldm.util; sys.exit(', '.join(n for n in ('torch', 'numpy', 'omegaconf', 'PIL') if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"import ldm.util also imports {done.stderr}"
