"""The package: what importing it takes, where it is found, and what its pages say."""

import doctest
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from inspect import getdoc, signature
from pathlib import Path

import pytest

import minidiff
from minidiff import kernels
from minidiff.affine import operands
from minidiff.kernels.check.words import shown

ROOT = Path(__file__).parents[2]
IMPORTED = """
import sys
from time import process_time
start = process_time()
import numpy
middle, before = process_time(), {*sys.modules}
import minidiff, minidiff.noise, minidiff.samplers, minidiff.kernels
end = process_time()
packages = {name.split(".")[0] for name in {*sys.modules} - before}
print(*packages - sys.stdlib_module_names, end - middle < middle - start)
"""


def test_import_needs_numpy_alone_and_less_time_than_numpys_own():
    """Processor time, which a busy machine does not stretch; measured, a quarter of NumPy's."""
    out = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True,
                         check=True)
    assert out.stdout.split() == ["minidiff", "True"]


PAGES = "README.md", "minidiff/README.md", "kernels/README.md", "bench/README.md"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_and_tests_that_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert links and all((folder / link).exists() for link in links)
    tests = re.findall(r"def (test_\w+)", "".join(
        f.read_text() for f in (ROOT / "tests").rglob("test_*.py")))
    tests += [f.stem for f in (ROOT / "tests").rglob("test_*.py")]
    for name in re.findall(r"`(test_\w+)", text):
        assert any(test.startswith(name) for test in tests), name


def test_readme_example_prints_what_the_readme_says():
    text = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n.*?```text\n(.*?)```", text, re.S).groups()
    out = subprocess.run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + code],
                         capture_output=True, text=True, check=True)
    assert out.stdout == printed


def test_readme_is_short_and_shows_a_picture_early():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1500
    before = re.sub(r"```.*?```", "", text[:text.index("![")], flags=re.S)
    assert len(before.split()) <= 150


def test_the_kernels_page_follows_one_element_through_the_stages_that_check_prints():
    """Every number of the walk, in hexadecimal or decimal, stands in `check --stages`."""
    page = (ROOT / "kernels" / "README.md").read_text()
    walk = page.split("## One element", 1)[1]
    stages = shown()
    bits = re.findall(r"`([0-9a-f]{8})`", walk)
    values = re.findall(r"-?\d\.\d{6,}", walk)
    assert len(bits) == 7 and len(values) == 3
    for number in bits + values:
        assert number in stages, number


def test_the_kernels_page_lists_every_row_and_what_it_takes():
    """Its table is the code's: step, operands, noise and parameters of each row."""
    page = (ROOT / "kernels" / "README.md").read_text()
    for op in kernels.OPS.values():
        stages = [op.step, *[op.denoise] * bool(op.denoise)]
        takes = {}  # in order
        for f in stages:
            takes |= dict.fromkeys(p for p in signature(f).parameters if p not in operands(f))
        where = op.step.__module__.removeprefix("minidiff.")
        row = [f"`{op.name}`", f"`{where}.{op.step.__name__}`", ", ".join(op.operands),
               "z" if op.noise else "", ", ".join(f"`{p}`" for p in takes)]
        assert f"\n| {' | '.join(row)} |\n" in page, op.name
        assert "\nExample:\n" in getdoc(op.step) or op.name == "normal"


@pytest.mark.parametrize("name", ["updates", "sums", "torch_ops"])
def test_the_kernels_examples_print_what_they_say(name):
    module = import_module(f"minidiff.kernels.{name}")
    for test in doctest.DocTestFinder().find(module):
        said = []
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert not said, "".join(said)
    public = [f for f, v in vars(module).items()
              if getattr(v, "__module__", "") == module.__name__ and f[0] != "_"]
    for f in {*public} - {"register"}:
        assert "\nExample:\n    >>> " in getdoc(getattr(module, f)), f


def test_from_the_clones_parent_folder_the_package_is_found(tmp_path):
    """There the clone's own name, without a package in it, stands first on Python's path."""
    try:
        distribution("minidiff")
    except PackageNotFoundError:
        pytest.skip("not installed")
    (tmp_path / "minidiff").symlink_to(ROOT, target_is_directory=True)
    for code in (["-m", "minidiff", "--version"],
                 ["-c", "import minidiff.kernels, minidiff.bench; print(minidiff.__version__)"]):
        done = subprocess.run([sys.executable, *code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == minidiff.__version__, done.stderr


def test_walking_the_package_finds_its_modules_alone():
    names = [m.name for m in pkgutil.walk_packages(minidiff.__path__, "minidiff.")]
    assert len(names) == len(set(names)) and "minidiff.noise" in names
    assert not {n for n in names if n.split(".")[1] in ("minidiff", "tests", "setup")}
    for name in ("minidiff.tests", "minidiff.setup", "minidiff.minidiff"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_a_clone_that_is_not_installed_finds_its_rooms():
    code = "import minidiff.kernels, minidiff.bench; print(minidiff.kernels.__file__)"
    path = os.pathsep.join(p for p in sys.path if "site-packages" in p)
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": path})
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py", done.stderr
