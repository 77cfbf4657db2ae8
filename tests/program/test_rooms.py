"""Which room may import which, read off the sources: arrows point one way, and none in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"minidiff": ROOT / "minidiff", "minidiff.kernels": ROOT / "kernels",
           "minidiff.bench": ROOT / "bench"}


def modules():
    """{name: file} of every module."""
    found = {}
    for room, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((room, *parts))] = file
    return found


MODULES = modules()


def imports(name):
    """The modules of ours that a module imports, wherever in it."""
    file = MODULES[name]
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")
            above = above[:len(above) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:  # a module of the package, or a name in it
                inside = f"{module}.{alias.name}"
                found.add(inside if inside in MODULES else module)
    return found & MODULES.keys()


GRAPH = {name: imports(name) for name in MODULES}


def test_no_import_goes_in_a_circle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*path, name])
            done.add(name)
    for name in sorted(GRAPH):
        visit(name, [])
    assert len(done) > 40


@pytest.mark.parametrize("room, never", [
    ("minidiff.kernels.check", "minidiff.bench"),
    ("minidiff.kernels", "minidiff.bench"),
    ("minidiff.bench.peers", "minidiff.bench.report"),
    ("minidiff.bench.speed", "minidiff.bench.report"),
    ("minidiff.bench.speed", "minidiff.bench.device")])
def test_a_room_never_imports_another(room, never):
    names = [name for name in GRAPH if f"{name}.".startswith(f"{room}.")]
    assert names
    for name in names:
        assert not [other for other in GRAPH[name] if f"{other}.".startswith(f"{never}.")]
