"""The rooms, read off their sources: which may import which, and how much a reader finds."""

import ast
import io
import re
import statistics
import token
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"minidiff": ROOT / "minidiff", "minidiff.kernels": ROOT / "kernels",
           "minidiff.bench": ROOT / "bench"}


MATHEMATICS = ("targets", "score_matching", "predictions", "langevin", "ddpm", "sde", "solvers",
               "samplers", "engine", "likelihood", "guidance", "noise", "affine", "arguments",
               "families")

# where the program meets users' files, terminals, compilers and other processes
EDGES = "npz", "files", "weights", "terminal", "processes"
BUILD = ROOT / "kernels/build.py"


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


def test_the_mathematics_never_imports_kernels_or_torch():
    for name in MATHEMATICS:
        source = (ROOT / "minidiff" / f"{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) (torch|\.kernels|\.net|\.train)", source, re.M)


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


def tokens_a_line(text):
    """How many tokens of code each line has; docstrings and comments have none."""
    free = {token.NEWLINE, token.NL, token.INDENT, token.DEDENT, token.ENDMARKER, token.COMMENT}
    said = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            said.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    found, inside = Counter(), 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = token.tok_name[t.type]  # an f-string is one token, as it is before Python 3.12
        if not (t.type in free or t.start[0] in said or inside):
            found[t.start[0]] += 1
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return found


ROOMS = {
    "mathematics": [ROOT / "minidiff" / f"{name}.py" for name in ("__init__", *MATHEMATICS)],
    "program": [f for f in (ROOT / "minidiff").glob("*.py")
                if f.stem not in ("__init__", *MATHEMATICS, *EDGES)],
    "edges": [BUILD, *(ROOT / "minidiff" / f"{name}.py" for name in EDGES)],
    "kernels": [*{*(ROOT / "kernels").glob("*.py")} - {BUILD}],
    "kernels/check": [*(ROOT / "kernels/check").glob("*.py")],
    "kernels/check/yours": [*(ROOT / "kernels/check/yours").glob("*.py")],
    "bench": [*(ROOT / "bench").rglob("*.py")]}


@pytest.mark.parametrize("room, ceiling", [
    ("mathematics", 15_300), ("program", 23_800), ("edges", 7_400),
    ("kernels", 14_700), ("kernels/check", 10_500),
    ("kernels/check/yours", 7_000), ("bench", 27_000)])
def test_a_room_can_be_read_in_one_sitting(room, ceiling):
    """A ceiling in tokens of code; sentences are free.

    That of mathematics was 12,500: what is no number, no shape or no plain array is named there by
    300, the loops' keywords, spelled out, take 100, the chapter on conditions 1,200, flow matching,
    as a process, a prediction, two families and a network's way to all others, 550, DDPM's bound
    and the density of a step 600. That of kernels was 11,500: a seed a row on five backends and in
    the operators, runs that are claimed, copies and a constant step beside a counter took 800;
    keywords that are spelled out, the operators as functions, what transforms and compilers pass,
    and coefficients beyond float32 1,300, noise for other libraries' samplers 200, what a compiler
    is handed, apart from a launch, and which one is refused 250, norms of a score and of its noise
    in one pass 400. That of program was 15,000: the tour's eight pictures take 3,300; chunks take
    800, and a training's rows, places and other processes 400; a network that follows the image
    600, figures of any number of samples and of their classes 700, what a longer training brings,
    drawn, 700; classes, guidance and known parts, from a network to samples and pictures, 2,700,
    the tour's ninth and tenth pictures 750, the bound on held-out data and a weighting 450. What
    meets users' files, terminals, compilers and other processes is a room of its own, edges: 5,500,
    900 for processes, 900 for labels and what they are called. That of check was 8,500: what
    explains a difference takes 2,400, and a user's kernels, in a process of their own, have a room
    of their own. That of bench was 19,000: a clock outside a user's process takes 2,000, three
    peers 1,200, intervals and the machine's state 900, rows of a file, looked at one by one, 400;
    machine code of cards that are not here, read, and the times that follow from it 1,900, a GPU's
    three calls, what it takes without the host, two norms checked, and other sizes of a program,
    1,600.
    """
    assert sum(tokens_a_line(f.read_text()).total() for f in ROOMS[room]) <= ceiling


def test_the_cuda_c_can_be_read_in_one_sitting():
    assert len((ROOT / "kernels/kernels.cu").read_text().splitlines()) <= 505


@pytest.mark.parametrize("room, most", [
    ("mathematics", 20), ("program", 20), ("edges", 20), ("kernels", 20), ("kernels/check", 20),
    ("kernels/check/yours", 20), ("bench", 24)])
def test_a_page_has_air(room, most):
    """Nine lines in ten have at most so many tokens; those of minidiff and kernels 92 columns."""
    lines = [n for f in ROOMS[room] for n in tokens_a_line(f.read_text()).values()]
    assert statistics.quantiles(lines, n=10)[8] <= most
    if room != "bench":
        assert all(len(line) <= 92 for f in ROOMS[room] for line in f.read_text().splitlines())
