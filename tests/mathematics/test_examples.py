"""The chapters' examples run, and say what they print."""

import ast
import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import minidiff

FOLDER = Path(minidiff.noise.__file__).parent
CHAPTERS = "targets", "score_matching", "predictions", "langevin", "ddpm", "sde"
ALL = {f.stem for f in FOLDER.glob("*.py")} | {"kernels"}
OTHERS = ("solvers", "samplers", "likelihood", "families", "noise", "affine", "engine",
          "arguments")


@pytest.mark.parametrize("name", CHAPTERS + OTHERS)
def test_examples_print_what_they_say(name):
    module = import_module(f"minidiff.{name}")
    said = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module, extraglobs={"np": np}):
        runner.run(test, out=said.append)
    assert not said, "".join(said)
    assert runner.tries or name not in CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
def test_everything_public_of_a_chapter_has_an_example(name):
    module = import_module(f"minidiff.{name}")
    public = {f: v for f, v in vars(module).items()
              if getattr(v, "__module__", "") == module.__name__ and f[0] != "_"}
    if name == "targets":
        public |= {f"Mixture.{f}": v for f, v in vars(module.Mixture).items()
                   if f[0] != "_" and callable(v)}
    assert len(public) >= 3
    for f, v in public.items():
        assert "\nExample:\n    >>> " in inspect.getdoc(v), f


@pytest.mark.parametrize("name", CHAPTERS + OTHERS)
def test_everything_public_of_the_mathematics_has_a_docstring(name):
    """And a module's own tells its idea, a paragraph or more, and what comes next."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    doc = ast.get_docstring(tree)
    assert doc.count("\n\n") >= 1
    following, = re.findall(r"Next:\s+`(\w+)[\w.]*`", doc)
    assert following in ALL
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for parent in [tree, *classes]:
        for node in parent.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                assert ast.get_docstring(node), node.name
