"""The compiled host's cache: what is loaded is whole, ours, and from this compiler."""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from minidiff import kernels
from minidiff.__main__ import main
from minidiff.chunks import NetScore, compile_first, samples
from minidiff.families import FAMILIES
from minidiff.kernels import build, on_host, update
from minidiff.kernels.launch import NotCompiled
from minidiff.train import Trainer

pytestmark = pytest.mark.skipif(kernels.why_not("host") is not None, reason="no C++ compiler")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
KEPT = on_host.library, on_host._native, on_host._function, build.folder, build.version
SOURCE = 'extern "C" int answer() { return 42; }'
FLAGS = "-shared", "-fPIC"


def forget():
    """Whatever this process knows of compilers, folders and libraries."""
    for f in KEPT:
        f.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own, in a process that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "minidiff"
    monkeypatch.undo()
    forget()


def answer(*flags):
    """42, by a library of the smallest source."""
    return build.library(SOURCE, *FLAGS, *flags).answer()


def fake(folder, body):
    """A C++ compiler that is a shell script: $@ are its arguments."""
    script = folder / "c++"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def too_slow():
    raise build.TooSlow("c++ took more than 0.5 seconds")


def ended(pids):
    """Whether the process whose number a file holds has ended, within ten seconds."""
    state = Path(f"/proc/{int(pids.read_text())}/stat")
    for _ in range(1000):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(.01)
    return False


# ---- bytes ----

def test_what_was_built_is_loaded_again_by_its_bytes(cache):
    assert answer() == 42
    file, = cache.glob("*.so")
    assert file.name.startswith("host-")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [*cache.glob(f"{build.PART}*")]
    made = file.stat().st_ino
    forget()
    assert answer() == 42 and file.stat().st_ino == made  # not built again


def test_a_damaged_library_is_never_loaded(cache):
    """200 flips and cuts: each is found, and taken away."""
    answer()
    file, = cache.glob("*.so")
    whole = file.read_bytes()
    file.rename(file.with_suffix(".loaded"))  # stays as it is
    file.write_bytes(whole)
    key = file.name.split("-")[1]
    assert build.whole_one(key) == file
    draw = random.Random(0)
    for k in range(200):
        damaged = bytearray(whole)
        if k % 2:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(whole)):]
        file.write_bytes(damaged)
        assert build.whole_one(key) is None and not file.exists()
    file.write_bytes(whole[:1000])
    assert answer() == 42  # and not SIGBUS
    assert file.read_bytes() == whole


def test_a_whole_library_that_does_not_load_is_built_again(cache):
    """One of another machine, in a home that both share."""
    answer()
    file, = cache.glob("*.so")
    file.unlink()
    other = b"of another machine"
    foreign = file.with_name(f"{file.name.rpartition('-')[0]}-{build.digest(other)}.so")
    foreign.write_bytes(other)
    assert answer() == 42 and foreign.exists() and file.exists()


def test_a_library_is_flushed_before_it_is_named_and_its_name_after(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(build, "flush", lambda path: seen.append(path.name))
    monkeypatch.setattr(build.os, "replace", lambda a, b, real=os.replace: (
        seen.append("replace"), real(a, b)))
    answer()
    assert seen == ["library.so", "replace", "minidiff"]


def test_two_processes_may_build_at_once(cache):
    line = [sys.executable, "-c", "import numpy as np; from minidiff.kernels import update\n"
            "print(update([np.ones((2, 3), 'f')], [2.], backend='host').sum())"]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].split() for p in both] == [["12.0"]] * 2
    assert len([*cache.glob("*.so")]) == 2 and not [*cache.glob(f"{build.PART}*")]


# ---- folders ----

def others(folder):
    os.chown(folder, 12345, 12345)


def everyone(folder):
    folder.chmod(0o777)


def group(folder):
    folder.chmod(0o720)


def link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def a_file(folder):
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize("spoil, words", [
    (others, "belongs to another user"), (everyone, "can be written by other users"),
    (group, "can be written by other users"), (link, "is a link"), (a_file, "exists")])
def test_a_folder_that_others_may_write_to_is_not_trusted(cache, spoil, words):
    """A library planted there under the right names is not loaded."""
    if spoil is others and os.getuid():
        pytest.skip("only root gives folders away")
    cache.mkdir(mode=0o700)
    answer()
    planted = [file.read_bytes() for file in cache.glob("*.so")]
    for file in cache.glob("*.so"):
        file.unlink()
    spoil(cache)
    forget()
    with pytest.warns(UserWarning, match=f"{words}.*this process compiles its own.*XDG") as seen:
        assert answer() == 42
    assert planted and [w.category for w in seen].count(UserWarning) == 1
    private = build.folder()
    assert private != cache and stat.S_IMODE(private.stat().st_mode) == 0o700
    assert len([*private.glob("*.so")]) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_that_others_may_replace_is_not_trusted(cache, when):
    """The one above is open to all: looked at before every library, not once a process."""
    if when == "after":
        answer()
    cache.parent.chmod(0o777)
    if when == "before":
        with pytest.warns(UserWarning, match="can be written by other users"):
            assert answer() == 42
        assert not [*cache.glob("*.so")]
        cache.parent.chmod(0o1777)  # as /tmp: who may write there renames nothing of others
        forget()
        assert answer() == 42 and len([*cache.glob("*.so")]) == 1
    else:
        with pytest.raises(NotCompiled, match="can be written by other users"):
            answer("-DANOTHER")


def test_a_folder_that_is_taken_away_is_made_again(cache):
    answer()
    shutil.rmtree(cache)
    assert answer("-DANOTHER") == 42 and stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_what_is_no_file_is_no_library(cache):
    """A pipe would not end, a device neither; each is taken away."""
    answer()
    file, = cache.glob("*.so")
    for make in (os.mkfifo, lambda f: f.symlink_to("/dev/zero")):
        file.unlink()
        make(file)
        assert answer() == 42 and stat.S_ISREG(file.lstat().st_mode)


def test_a_forked_process_leaves_its_parents_folder(cache):
    """Its end would take the folder away, and the parent's next kernel with it."""
    code = ("import os, sys\nimport numpy as np\nfrom minidiff.kernels import update\n"
            "X = np.ones((2, 3), np.float32)\nupdate([X], [2.], backend='host')\n"
            "if os.fork() == 0: sys.exit(0)\nos.wait()\n"
            "print(update([X, X], [2., 1.], backend='host').sum())\n"
            "from minidiff.kernels import build\nprint(build.folder())")
    done = subprocess.run([sys.executable, "-W", "ignore::UserWarning", "-c", code],
                          capture_output=True, text=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": "/proc/none"})
    assert not done.stderr
    total, folder = done.stdout.split()
    assert total == "18.0" and not Path(folder).exists()


def test_a_folder_that_others_may_read_is_closed_to_them(cache):
    cache.mkdir(mode=0o755)
    assert build.folder() == cache and stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_nothing_is_kept_where_nothing_is_run(cache, monkeypatch):
    """noexec: the cache's file system, then also that of temporary files."""
    real = os.statvfs

    class Noexec:
        f_flag = os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda f: Noexec if Path(f) == cache else real(f))
    with pytest.warns(UserWarning, match="noexec"):
        assert answer() == 42
    forget()
    monkeypatch.setattr(os, "statvfs", lambda f: Noexec)
    with pytest.raises(NotCompiled, match="noexec.*nor made for this process.*noexec"):
        answer()
    with pytest.raises(RuntimeError, match="^backend 'host': no libraries can be kept"):
        update([X], [2.], backend="host")
    with pytest.warns(UserWarning, match="backend 'torch' instead of host: no libraries"):
        assert np.array_equal(update([X], [2.]), 2 * X)


def test_a_relative_cache_is_ignored(cache, monkeypatch):
    """As the XDG standard says: it would be another one in each folder."""
    for home in ("cache", "./cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.setenv("HOME", str(cache.parent))
        forget()
        assert build.folder() == cache.parent / ".cache/minidiff"


def test_without_a_home_a_process_has_its_own(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(UserWarning, match="no libraries can be kept .no home."):
        assert answer() == 42


def test_what_killed_compilations_left_is_taken_away(cache):
    """Not what another process is compiling now."""
    for name, age in (("old", 3 * build.LIMIT), ("new", 0)):
        part = cache / f"{build.PART}{name}"
        part.mkdir(parents=True)
        (part / "library.so").write_text("half")
        os.utime(part, (time.time() - age, time.time() - age))
    cache.chmod(0o700)
    assert answer() == 42
    assert [part.name for part in cache.glob(f"{build.PART}*")] == [f"{build.PART}new"]


# ---- compilers ----

def test_the_compiler_is_what_cxx_says_with_its_flags(cache, monkeypatch):
    plain, = build.compiler()
    monkeypatch.setenv("CXX", f"{plain} -DNAME='a b' -O1")
    assert build.compiler() == [plain, "-DNAME=a b", "-O1"]
    assert answer() == 42
    monkeypatch.setenv("CXX", plain)
    assert answer() == 42
    assert len([*cache.glob("*.so")]) == 2


@pytest.mark.parametrize("given, words", [
    ("no-such-compiler", "CXX=no-such-compiler: no-such-compiler is not found"),
    ("/none/g++ -O2", "CXX=/none/g.. -O2: /none/g.. is not found"),
    ("g++ 'half", "CXX=g.. 'half: No closing quotation"),
    ("sh -c 'exit 3'", "sh failed: exit status 3")])
def test_a_compiler_that_was_asked_for_is_not_replaced(cache, monkeypatch, given, words):
    monkeypatch.setenv("CXX", given)
    with pytest.raises(RuntimeError, match=f"^backend 'host': {words}$"):
        update([X], [2.], backend="host")
    with pytest.warns(UserWarning, match=f"^backend 'torch' instead of host: {words}$"):
        assert np.array_equal(update([X], [2.]), 2 * X)


def test_no_compiler_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="no C.. compiler found: install g.. or clang"):
        update([X], [1.], backend="host")
    with pytest.warns(UserWarning, match="'torch' instead of host: no C.. compiler"):
        assert kernels.backend("auto").NAME == "torch"
    with pytest.warns(UserWarning):
        assert np.array_equal(update([X], [2.]), 2 * X)


def test_another_version_compiles_again(cache, monkeypatch, tmp_path):
    real, = build.compiler()
    for version in "12":
        monkeypatch.setenv("CXX", fake(tmp_path, f'[ "$1" = --version ] && echo {version} && exit\n'
                                                 f'exec {real} "$@"'))
        build.version.cache_clear()
        assert answer() == 42
    assert len([*cache.glob("*.so")]) == 2


def test_another_cpu_compiles_again(cache, monkeypatch):
    """-march=native would be another's: a home may be shared by several machines."""
    for name in ("one", "another"):
        monkeypatch.setattr(build, "cpu", lambda name=name: name)
        assert answer() == 42
    assert len([*cache.glob("*.so")]) == 2


def test_a_compiler_that_hangs_is_ended_with_all_it_started(cache, monkeypatch, tmp_path):
    pids = tmp_path / "pids"
    monkeypatch.setenv("CXX", fake(tmp_path, f"sleep 60 & echo $! > {pids}; wait"))
    monkeypatch.setattr(build, "LIMIT", .5)
    begun = time.monotonic()
    with pytest.raises(build.TooSlow, match="more than 0.5 seconds"):
        answer()
    assert ended(pids) and time.monotonic() < begun + 40  # it would sleep for 60
    calls = []
    monkeypatch.setattr(build, "finished", lambda *_: calls.append(0) or too_slow())
    assert "0.5 seconds" in kernels.why_not("host") and len(calls) == 1  # not again


def test_an_interrupted_compilation_ends_with_all_it_started(cache, monkeypatch, tmp_path):
    pids = tmp_path / "pids"
    monkeypatch.setenv("CXX", fake(
        tmp_path, f'[ "$1" = --version ] && exit\nsleep 60 & echo $! > {pids}\n'
                  f"sleep .5; kill -INT {os.getpid()}; wait"))
    with pytest.raises(KeyboardInterrupt):
        answer()
    assert ended(pids)
    assert not [*cache.glob("*")]


def refuses(folder, macro, says):
    """A compiler that fails on a source with this macro, and counts how often it did."""
    real, = build.compiler()
    return fake(folder, f'case "$*" in *{macro}*) echo . >> {folder}/failed; {says};; esac\n'
                        f'exec {real} "$@"')


@pytest.mark.parametrize("says, words", [
    ("echo 'cc1plus: note: x'; echo 'fatal error: cannot write: No space left on device'; exit 1",
     "fatal error: cannot write: No space left on device"),
    ("echo 'c++: fatal error: Killed signal terminated program cc1plus'; exit 1",
     "c..: fatal error: Killed signal terminated program cc1plus"),
    ("kill -9 $$", "exit status -9")])
def test_a_later_variant_that_fails_is_said_or_done_by_torch(cache, monkeypatch, tmp_path, says,
                                                             words):
    """The first was compiled; of the others one is not. It is tried once."""
    monkeypatch.setenv("CXX", refuses(tmp_path, "-DOPERANDS=3", says))
    for _ in range(2):
        assert np.array_equal(update([X, X], [2., 1.], backend="host"), 3 * X)
        with pytest.raises(RuntimeError, match=rf"^backend 'host': c\+\+ failed: {words}$"):
            update([X] * 3, [1., 2., 3.], backend="host")
        with pytest.warns(UserWarning, match=rf"'torch' instead of host: c\+\+ failed: {words}$"):
            assert np.array_equal(update([X] * 3, [1., 2., 3.]), 6 * X)
    assert (tmp_path / "failed").read_text() == ".\n"


def test_a_sum_that_cannot_be_compiled_is_torchs(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", refuses(tmp_path, "-DSUMS=[123]", "exit 1"))
    with pytest.warns(UserWarning, match="'torch' instead of host"):
        got = [kernels.norms(X), kernels.noise_norms(X, seed=3), *kernels.dsm_loss(X, [1.] * 3)]
    want = [kernels.norms(X, backend="numpy"), kernels.noise_norms(X, seed=3, backend="numpy"),
            *kernels.dsm_loss(X, [1.] * 3, backend="numpy")]
    assert all(np.array_equal(a, b) for a, b in zip(got, want))
    with pytest.raises(RuntimeError, match="backend 'host'"):
        kernels.norms(X, backend="host")


def test_a_process_that_is_killed_while_it_compiles_spoils_nothing(cache, tmp_path):
    """Ten, each at another moment."""
    line = [sys.executable, "-c", "import numpy as np; from minidiff.kernels import update\n"
            "print('compiles', flush=True)\n"
            "print(update([np.ones((2, 3), 'f')], [2.], backend='host').sum())"]
    for k in range(10):
        p = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(.15 * k)
        p.send_signal(signal.SIGKILL)
        p.communicate()
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1] == "12.0" and not done.stderr


def test_the_warning_points_at_the_users_line(cache, monkeypatch):
    """Also where torch's compiler is loaded, which then stands between two lines of ours."""
    import torch._dynamo  # noqa: F401
    monkeypatch.setenv("CXX", "no-such-compiler")
    calls = [lambda: update([X], [2.]), lambda: kernels.apply("langevin", X, X, eps=.1),
             lambda: kernels.normal((2, 3)), lambda: kernels.norms(X),
             lambda: kernels.bind([X], [2.])(0)]
    for call in calls:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        assert {w.filename for w in seen} == {__file__}


def test_a_demo_that_cannot_compile_ends_before_it_trains(cache, monkeypatch, tmp_path, refused):
    """dpmpp_2m's step, of four operands, comes minutes after the first kernel."""
    monkeypatch.setenv("CXX", refuses(tmp_path, "-DOPERANDS=4", "exit 1"))
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("it trains"))
    out = tmp_path / "out"
    refused("backend 'host': c++ failed: exit status 1",
            argv=["demo", "--backend", "host", "--out", str(out)])
    assert not [*out.glob("*.safetensors")]
    compile_first((1, 8, 8), ["ddim"], kernels, backend="host")
    with pytest.warns(UserWarning, match="'torch' instead of host"):
        compile_first((1, 8, 8), FAMILIES, kernels)


def test_samples_that_cannot_be_compiled_ask_the_network_nothing(cache, monkeypatch, tmp_path,
                                                                 refused, capsys):
    argv = ["train", "--data", "moons", "--steps", "2", "--batch", "9", "--out", str(tmp_path)]
    assert main(argv) == 0
    capsys.readouterr()
    forget()
    monkeypatch.setenv("CXX", refuses(tmp_path, "-DOPERANDS=4", "exit 1"))
    monkeypatch.setattr(NetScore, "__call__", lambda *_: pytest.fail("it is asked"))
    model = ["--model", str(tmp_path / "model.safetensors"), "--family", "dpmpp_2m"]
    for more in (["sample", "--out", str(tmp_path / "x.npz")], ["eval"]):
        refused("backend 'host': c++ failed: exit status 1",
                argv=[*more, *model, "--backend", "host"])
    assert not (tmp_path / "x.npz").exists()


def test_what_is_compiled_first_is_all_that_is_needed(cache):
    """Also for seeds a row; samples are then made without a compiler."""
    for seed in (0, [3, 4]):
        compile_first((2,), FAMILIES if seed == 0 else ["ddim"], kernels, seed=seed)
    os.environ["CXX"] = "no-such-compiler"
    try:
        for family in FAMILIES:
            x, = samples(lambda x, sigma: -x, (2,), family, 5, kernels, 20, backend="host")
        x, = samples(lambda x, sigma: -x, (2,), "ddim", 3, kernels, seed=[3, 4, 5])
        assert x.shape == (3, 2)
    finally:
        del os.environ["CXX"]
