"""What is written is whole or not there; a folder is one run's; streams may be closed."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import demo, files, plot, terminal, tour, weights
from minidiff.__main__ import main
from minidiff.bench import report

ROOT = Path(__file__).parents[2]
MOONS = ["train", "--data", "moons", "--batch", "64", "--steps", "3"]


def minidiff(*argv, shell="", **options):
    """Run a command in a process of its own, its output as bytes; shell: redirections."""
    line = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-m", "minidiff", *argv]
    return subprocess.run(line, capture_output=True, cwd=ROOT, timeout=120, **options)


# ---- whole or not at all ----

def broken_disk(monkeypatch, call, number):
    """Have a function of os fail with an error number, as it does on a full disk."""
    def fails(*arguments, **options):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, fails)


def write_text(file):
    with files.whole(file) as part:
        part.write_text("new")


def write_figure(write):
    def writes(file):
        figure = plot.plt.figure()
        write(file, figure)
    return writes


WRITERS = {
    "text": ("t.txt", write_text),
    "json": ("t.json", lambda file: files.write_json(file, [1])),
    "weights": ("t.safetensors", lambda file: weights.save(file, {"x": torch.ones(2)}, {})),
    "picture": ("t.png", write_figure(plot._write)),
    "tour": ("t.png", write_figure(tour.write)),
    "loss": ("t.png", lambda file: plot.loss_levels(file, [(.1, .5, .4, .1), (1., .7, .5, .2)])),
    "rows": ("t.json", lambda file: report.results.save(file, [{"op": "langevin"}])),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("call, number", [("fsync", errno.ENOSPC), ("replace", errno.EIO)])
def test_a_full_disk_leaves_the_old_file(writer, call, number, tmp_path, monkeypatch):
    name, write = WRITERS[writer]
    file = tmp_path / name
    file.write_bytes(b"old")
    broken_disk(monkeypatch, call, number)
    with pytest.raises(OSError, match=f"{name}: not written, .* untouched .{os.strerror(number)}"):
        write(file)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("argv", [
    ["sample", "--model"], ["eval", "--model"], ["train", "--data", "moons", "--steps", "1",
                                                 "--resume"], ["bench", "--op", "langevin",
                                                               "--compare"]], ids="-".join)
def test_what_would_be_read_without_end_is_refused(argv, tmp_path, refused, monkeypatch):
    """A device, a pipe that nobody writes to, a folder; 2^40 bytes that are no memory."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    more = ["--out", "o"] if argv[0] == "train" else []
    for file, words in (("/dev/zero", "not a file"), ("pipe", "not a file"),
                        ("/", "is a directory"), ("none", "no such file")):
        refused(f"{file}: {words}", argv=[*argv, file, *more])
    if argv[0] != "bench":
        with open("large", "wb") as f:
            f.truncate(1 << 40)
        refused("out of memory (large holds 1099511627776 bytes)", argv=[*argv, "large", *more])


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_data_that_would_be_read_without_end_are_refused(kind, tmp_path, refused):
    file = tmp_path / "x.npz"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    refused(f"{file}: not a file", argv=["train", "--data", str(file), "--out", str(tmp_path)])


@pytest.mark.parametrize("writer", WRITERS)
def test_an_interrupt_leaves_the_old_file(writer, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt
    name, write = WRITERS[writer]
    file = tmp_path / name
    file.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(file)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_flushed_before_it_is_named_and_its_folder_after(writer, tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)

        def noted(*arguments, name=name, plain=plain):
            target = arguments[0]
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{target}")
            calls.append((name, os.path.basename(target)))
            return plain(*arguments)
        monkeypatch.setattr(os, name, noted)
    name, write = WRITERS[writer]
    write(tmp_path / name)
    part = f".part-{os.getpid()}{Path(name).suffix}"
    once = [("fsync", part), ("replace", part), ("fsync", tmp_path.name)]
    assert calls == once
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    if writer == "weights":  # the file that is replaced has a new name, by a link or a copy
        spare = f".part-{os.getpid()}.previous"
        renamed = [("replace", spare), ("fsync", tmp_path.name)]
        for links in (True, False):
            calls.clear()
            if not links:
                broken_disk(monkeypatch, "link", errno.EPERM)
            weights.save(tmp_path / name, {"x": torch.full((2,), 7. + links)}, {})
            assert calls == [("fsync", spare)] * (not links) + once + renamed


def test_a_link_stays_one_and_long_names_are_written(tmp_path):
    there, link = tmp_path / "there.txt", tmp_path / "link.txt"
    there.write_text("old")
    link.symlink_to(there)
    write_text(link)
    assert link.is_symlink() and there.read_text() == "new"
    longest = tmp_path / ("n" * 251 + ".txt")
    write_text(longest)
    assert longest.read_text() == "new"


def test_a_link_to_another_kind_of_name_and_the_mode_are_kept(tmp_path):
    """numpy.savez and matplotlib add endings to names that lack them."""
    for link, target in (("x.npz", "samples"), ("p.png", "picture.old")):
        (tmp_path / link).symlink_to(tmp_path / target)
    plot._write(tmp_path / "p.png", plot.plt.figure())
    assert main([*MOONS, "--out", str(tmp_path)]) == 0
    model = tmp_path / "model.safetensors"
    assert main(["sample", "--model", str(model), "--n", "2", "--evaluations", "4", "--out",
                 str(tmp_path / "x.npz")]) == 0
    assert (tmp_path / "picture.old").read_bytes().startswith(b"\x89PNG")
    assert np.load(tmp_path / "samples")["x"].shape == (2, 2)
    assert not list(tmp_path.glob(".part*"))
    model.chmod(0o640)
    weights.save(model, {"x": torch.ones(1)}, {})
    assert model.stat().st_mode & 0o777 == 0o640


def test_a_folder_in_the_place_of_samples_is_found_first(tmp_path, refused):
    (tmp_path / "foo.npz").mkdir()
    refused("foo.npz", "not a file", argv=["sample", "--out", str(tmp_path / "foo")])


def test_a_run_clears_away_only_what_runs_leave(tmp_path):
    for name in (".part-7.png", ".part-7.safetensors", ".part-7.previous", ".part-7.json",
                 ".part-7.npz", "mine.png"):
        (tmp_path / name).write_text("")
    with files.only_run(tmp_path):
        assert {f.name for f in tmp_path.iterdir()} == {".lock", ".part-7.json", ".part-7.npz",
                                                        "mine.png"}


def test_a_killed_demo_leaves_no_half_picture(tmp_path):
    """The last picture is being written when the process dies: it is whole or absent."""
    code = ("import os, sys; from pathlib import Path; from minidiff import files, plot;"
            "figure = plot.plt.figure(); figure.savefig = lambda part, **k: ("
            "Path(part).write_bytes(b'half'), os._exit(9));"
            "plot._write(sys.argv[1], figure)")
    file = tmp_path / "p.png"
    assert subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT).returncode == 9
    assert not file.exists() and len(list(tmp_path.iterdir())) == 1
    with files.only_run(tmp_path):  # the next run clears it away
        assert [f.name for f in tmp_path.iterdir()] == [".lock"]


# ---- the folder of a run ----

def test_two_runs_do_not_share_a_folder(tmp_path, refused):
    with files.only_run(tmp_path):
        for argv in (MOONS, ["demo", "--data", "moons"]):
            refused(f"--out {tmp_path}: another run is writing there",
                    argv=[*argv, "--out", str(tmp_path)])
    assert main([*MOONS, "--out", str(tmp_path)]) == 0


def test_a_lock_ends_with_its_run(tmp_path, monkeypatch):
    """At once, not when Python forgets the object."""
    kept, plain = [], files.FileLock

    def remembered(file):
        kept.append(plain(file))
        return kept[-1]
    monkeypatch.setattr(files, "FileLock", remembered)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), files.only_run(tmp_path):
            1 / 0  # noqa: B018
    assert len(kept) == 2 and not any(lock.is_locked for lock in kept)


def test_a_lock_ends_with_its_process(tmp_path):
    code = ("import sys, time; from minidiff import files\n"
            "with files.only_run(sys.argv[1]): print(1, flush=True); time.sleep(100)")
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                         cwd=ROOT)
    p.stdout.readline()
    with pytest.raises(ValueError, match="another run"), files.only_run(tmp_path):
        pass
    p.kill()
    p.wait()
    with files.only_run(tmp_path):
        pass


@pytest.mark.parametrize("command", ["train", "demo", "tour"])
def test_a_folder_that_cannot_be_written_is_refused_first(command, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(demo, "Trainer", lambda *a, **k: pytest.fail("trained"))
    more = [] if command == "tour" else ["--data", "moons"]
    (tmp_path / "file").write_text("")
    locked = tmp_path / "locked"
    (locked / ".lock").mkdir(parents=True)
    if command != "tour":
        refused("locked: it cannot be locked", argv=[command, *more, "--out", str(locked)])
    for out in ("/proc/self", "/proc/none", str(tmp_path / "file"), str(tmp_path / "file" / "o")):
        refused(f"--out {out}: no files can be written there",
                argv=[command, *more, "--out", out])


@pytest.mark.parametrize("argv", [["sample", "--out", "/proc/x.npz"],
                                  ["eval", "--json", "/proc/x.json"],
                                  ["check", "--json", "/proc/self/x.json"],
                                  ["info", "--out", "/proc/x.json"]])
def test_a_file_that_cannot_be_written_is_refused_first(argv, refused):
    refused(argv[-1], "not a file in a folder that can be written", argv=argv)


# ---- streams ----

INFO = ["info", "--backend", "numpy"]


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_break_nothing(shell, tmp_path):
    """Nor does a message end up in a file that got the number of a closed stream."""
    done = minidiff(*MOONS, "--out", str(tmp_path), shell=shell)
    assert done.returncode == 0, done
    for name in ("model.safetensors", "state.safetensors"):
        weights.read(tmp_path / name)


@pytest.mark.parametrize("shell", ["2> >(exec true)", "> >(exec true)", "2>/dev/full"])
def test_a_reader_that_left_breaks_nothing(shell, tmp_path):
    done = minidiff(*MOONS, "--out", str(tmp_path), shell=shell)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    assert b"Exception ignored" not in done.stderr
    weights.read(tmp_path / "model.safetensors")


def test_a_closed_streams_number_is_not_given_away(tmp_path):
    """Else what a library writes to its standard error would be in a file."""
    code = ("import os, sys; from minidiff import terminal; terminal.open_streams();"
            "sys.exit(open(sys.argv[1], 'w').fileno())")
    for shell in ("", "2>&-", "<&- >&- 2>&-"):
        line = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-c", code,
                str(tmp_path / "f")]
        assert subprocess.run(line, cwd=ROOT).returncode >= 3


def test_what_could_not_be_printed_is_said(tmp_path):
    done = minidiff(*MOONS, "--out", str(tmp_path), shell=">/dev/full")
    assert done.returncode == 2 and b"not all could be printed (No space left" in done.stderr
    weights.read(tmp_path / "model.safetensors")
    done = minidiff("train", "--help", shell="> >(exec true)")
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_on_any_terminal(encoding, tmp_path):
    """Train on such a file into such a folder, sample, measure on the file that the model names."""
    name = "café 雪 \n \x1b[2J " + os.fsdecode(b"\xff\xfe")
    folder = tmp_path / name
    folder.mkdir()
    data = str(folder / f"{name}.npz")
    np.savez(data, x=np.random.default_rng(0).normal(size=(400, 2)))
    model = str(folder / "model.safetensors")
    usual = dict(os.environ, PYTHONIOENCODING=encoding)
    for argv in (["train", "--data", data, "--steps", "2", "--out", str(folder)],
                 ["sample", "--model", model, "--n", "3", "--evaluations", "4", "--out",
                  str(folder / f"{name} sampled")],
                 ["eval", "--model", model, "--n", "9", "--evaluations", "4"]):
        done = minidiff(*argv, env=usual)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-500:]
    done = minidiff("eval", "--model", str(folder / "absent"), env=usual)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert b"\x1b" not in done.stderr
    assert np.load(folder / f"{name} sampled.npz")["x"].shape == (3, 2)


def test_text_is_printable_in_one_line():
    assert terminal.printable("a b é \t\n\x1b\udcff") == r"a b é \t\n\x1b\udcff"


# ---- Ctrl-C ----

def interrupt(process):
    """Send Ctrl-C as a terminal does: to the process and all that it started."""
    os.killpg(process.pid, signal.SIGINT)


def start(*argv, **options):
    return subprocess.Popen([sys.executable, "-m", "minidiff", *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
                            **options)


ENDED = 130, -signal.SIGINT  # what a shell shows as 130


@pytest.mark.parametrize("seconds", [.03, .06, .1, .2, .3, .5, .7, .9, 1.2, 1.6])
def test_an_early_interrupt_is_quiet(seconds, tmp_path):
    """From `end_on_interrupt` on; before it, while Python starts, Ctrl-C is Python's.

    A traceback may end no later than that call: how far Python is by then, nobody knows.
    """
    p = start("demo", "--data", "moons", "--out", str(tmp_path))
    time.sleep(seconds)
    interrupt(p)
    out, error = p.communicate(timeout=60)
    assert p.returncode in ENDED
    lines = re.findall(r'__main__\.py", line (\d+)', error)
    source = (ROOT / "minidiff/__main__.py").read_text().splitlines()
    ours = source.index("    terminal.end_on_interrupt()") + 1
    assert all(int(line) <= ours for line in lines), error


def test_nothing_is_loaded_while_an_interrupt_would_raise():
    """argparse is the first thing that a command loads, torch, which would abort, the largest."""
    code = ("import builtins, runpy, signal, sys\n"
            "plain = builtins.__import__\n"
            "def load(name, *more, **options):\n"
            "    if name in ('argparse', 'torch') and name not in sys.modules:\n"
            "        print(name, signal.getsignal(signal.SIGINT).name)\n"
            "    return plain(name, *more, **options)\n"
            "builtins.__import__ = load\n"
            "sys.argv = ['minidiff', 'info', '--backend', 'numpy']\n"
            "runpy.run_module('minidiff', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[:2] == ["argparse SIG_DFL", "torch SIG_DFL"], done


def test_an_interrupt_at_the_end_changes_nothing(tmp_path):
    """Once main is done, Ctrl-C is ignored: the exit code is the command's."""
    code = ("import os, signal, sys; from minidiff import terminal\n"
            "def main(): return 7\n"
            "class Late:\n"
            "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
            "late = Late()\n"
            "sys.exit(terminal.run(main))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 7 and not done.stderr


@pytest.mark.parametrize("apart", [.001, .02, .2])
def test_two_interrupts_are_as_quiet_as_one(apart, tmp_path):
    p = start(*MOONS, "--steps", "99999", "--save-every", "5", "--out", str(tmp_path))
    end = time.monotonic() + 60
    while not (tmp_path / "state.safetensors").exists():
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.02)
    interrupt(p)
    time.sleep(apart)
    interrupt(p)
    _, error = p.communicate(timeout=60)
    assert p.returncode in ENDED and "Traceback" not in error and "ignored" not in error
    weights.read(tmp_path / "state.safetensors")


def test_an_interrupt_while_the_compiler_runs(tmp_path):
    """A slow compiler: training finishes its iteration and saves; a check ends."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("no C++ compiler")
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\ncase \"$*\" in *$SLOW*) ;; *) exec {compiler} \"$@\";; esac\n"
                    f"echo >> {tmp_path}/started\nsleep 1\n{compiler} \"$@\"\n"
                    f"code=$?\necho >> {tmp_path}/ended\nexit $code\n")
    slow.chmod(0o755)
    said = {}
    # the first kernel is compiled before training begins, that of one operand while it goes on
    for argv, of in (([*MOONS, "--steps", "9999", "--out", str(tmp_path / "o")], "OPERANDS=1"),
                     (["check", "--backend", "host", "--op", "normal"], "OPERANDS=0"),
                     ([*MOONS, "--steps", "9999", "--out", str(tmp_path / "p")], "OPERANDS=0")):
        usual = dict(os.environ, CXX=str(slow), SLOW=of,
                     XDG_CACHE_HOME=str(tmp_path / f"cache{len(said)}"))
        p = start(*argv, env=usual)
        end = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert p.poll() is None and time.monotonic() < end
            time.sleep(.02)
        interrupt(p)
        said[argv[0], of], error = p.communicate(timeout=60)
        if argv[0] == "train" and of == "OPERANDS=1":  # the compiler was not interrupted
            assert (tmp_path / "started").read_text() == (tmp_path / "ended").read_text()
        assert p.returncode == 130 and "Traceback" not in error, error
        (tmp_path / "started").unlink()
    step = weights.read(tmp_path / "o" / "state.safetensors")[1]["step"]
    assert step >= 1 and f"stopped at iteration {step}; --resume" in said["train", "OPERANDS=1"]
    assert not (tmp_path / "p" / "state.safetensors").exists()  # nothing was trained
