"""The house rules that a parser can check: floors, sizes, and what each module says of itself."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Lowest first; a room imports only from floors below its own, and from itself.
FLOORS = (
    {"errors", "types", "masking"},
    {"storage"},
    {"losses", "models", "metrics"},
    {"sampling", "rewards", "data", "parallel"},
    {"training", "checkpoints"},
    {"evaluation"},
    {"stages"},
    {"experiments"},
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((ROOT / "rlhf_jax").rglob("*.py")) + sorted((ROOT / "experiments").rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "experiments" if parts[0] == "experiments" else parts[1].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] for name in names if name.startswith("rlhf_jax.")}
    return {room for room in rooms if room in FLOOR} | (
        {"experiments"} if any(name.split(".")[0] == "experiments" for name in names) else set()
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        assert not imported_rooms(ast.parse(path.read_text())), (
            "the package's root imports nothing of its own"
        )
        return
    upward = {
        other
        for other in imported_rooms(ast.parse(path.read_text())) - {room}
        if FLOOR[other] >= FLOOR[room] and (room, other) not in ALLOWED
    }
    assert not upward, f"{room} may not import {sorted(upward)}"


# training runs the loop, which saves: two rooms of one floor, in one direction.
ALLOWED = {("training", "checkpoints"), ("losses", "masking")}


def test_data_workers_never_touch_jax_numpy():
    for path in (ROOT / "rlhf_jax" / "data").glob("*.py"):
        assert "jax.numpy" not in path.read_text(), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for_and_stays_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module begins with what it is for"
    documented = [tree] + [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    prose = sum((ast.get_docstring(node, clean=False) or "").count("\n") + 1 for node in documented)
    assert text.count("\n") - prose <= 400, "split by concept"


def test_nothing_is_swallowed_evaluated_or_pickled():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                assert not all(isinstance(child, ast.Pass) for child in node.body), where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"exec", "eval"}, where
            if isinstance(node, ast.Import):
                assert all(alias.name != "pickle" for alias in node.names), where
