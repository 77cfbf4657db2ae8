"""One run in several processes, by torchrun: the same file, the same batches, one end."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minidiff import data, kernels, processes, train, weights
from minidiff.__main__ import main
from minidiff.chunks import in_chunks
from minidiff.processes import Processes

ROOT = Path(__file__).parents[2]
DIGITS = data.load("digits")


class Part(Processes):
    """One of several processes, without the others."""

    def parallel(self, net):
        return net


@pytest.fixture
def launch():
    """launch(*argv): the command in two processes, as a user starts it; None outlive a test."""
    started = []

    def start(*argv, torchrun=()):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node=2", *torchrun, "-m", "minidiff", *map(str, argv)]
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for process in started:
        for pid in [*children(process), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(process):
    """The pids of what torchrun started."""
    try:
        said = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return []
    return [*map(int, said.split())]


def read_until(pattern, launched):
    """What was printed up to a pattern. It fails where the output ends before, or never does."""
    late = threading.Timer(120, launched.kill)
    late.start()
    text = ""
    while not re.search(pattern, text):
        letter = launched.stdout.read(1)
        assert letter, text
        text += letter
    late.cancel()
    return text


def rank(pid):
    """The rank that torchrun gave to a process, or None."""
    try:
        said = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in said if word.startswith("RANK=")), None)


def process_of(launched, number):
    """The pid of a rank; it is waited for."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for pid in children(launched):
            if rank(pid) == number:
                return pid
        time.sleep(.05)
    pytest.fail("torchrun starts nothing")


# ---- samples ----

def test_two_processes_write_the_file_of_one(launch, model, tmp_path):
    """Byte for byte, though the third chunk is nobody's second turn but the first's."""
    argv = ["sample", "--model", model, "--evaluations", "3", "--samples", "250", "--out"]
    assert main([*argv, str(tmp_path / "one.npz")]) == 0
    launched = launch(*argv, tmp_path / "two.npz")
    text, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, text
    assert text.count("250 samples of digits, ddim, 3 evaluations") == 1
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_chunks_are_dealt_in_turns(count):
    """What the first process puts together from what each was asked for."""
    asked = {}

    def chunk(first):
        asked.setdefault(first // 4 % count, []).append(first)
        return np.arange(first, first + 4)

    class All(Part):
        def gather(self, given):
            start = given[0]
            return [given] + [chunk(start + 4 * k) if start + 4 * k < 30 else None
                              for k in range(1, count)]
    found = np.concatenate([*in_chunks(chunk, 30, 4, All(0, count), show=False)])
    assert (found == np.arange(30)).all()
    assert sorted(sum(asked.values(), [])) == [*range(0, 30, 4)]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_run(killed, launch, model, tmp_path):
    """With one line, and nothing is left of the file."""
    out = tmp_path / "samples" / "x.npz"
    out.parent.mkdir()
    launched = launch("sample", "--model", model, "--samples", "1000000", "--out", out)
    pid = process_of(launched, killed)
    read_until(r" [1-9]\d*/1000000 ", launched)  # chunks have come
    os.kill(pid, signal.SIGKILL)
    rest, _ = launched.communicate(timeout=60)
    assert launched.returncode
    assert rest.count("minidiff sample: ") == rest.count(processes.LOST) == 1
    assert not [*out.parent.iterdir()]


# ---- training ----

def seen(part, objective="denoising"):
    """What the network sees in each of three iterations: [(x, sigma)], and the losses."""
    run = train.Trainer(DIGITS.train, kernels, 9, batch=24, seed=5, levels=DIGITS.levels,
                        processes=part, objective=objective)
    inputs = []

    def network(x, sigma):
        inputs.append((x, sigma))
        return -x / (sigma**2 + .25).view(-1, 1, 1, 1)
    run.network = network
    losses, gradients = [], []
    for run.step in (0, 3, 100):  # 100 is in another epoch
        _, loss, gradient = run.objective()
        losses.append(loss.item())
        gradients.append(gradient)
    return inputs, losses, gradients


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_parts_of_a_batch_are_the_batch(count):
    """Data, dequantisation, levels and noise equal by bits.

    A loss is a float64 mean rounded once. So the float32 mean of the parts' is off by half
    an ulp of each part's, of the whole's, and of each of the additions and the division,
    count + 2 halves in all, of ulps that are at most those of the largest part.
    """
    whole, losses, gradients = seen(Part())
    parts = [seen(Part(k, count)) for k in range(count)]
    for k in range(3):
        for j in (0, 1):
            joined = torch.cat([inputs[k][j] for inputs, *_ in parts])
            assert torch.equal(joined, whole[k][j])
        each = np.array([part[1][k] for part in parts], np.float32)
        assert abs(each.mean() - losses[k]) <= (count + 2) / 2 * np.spacing(each.max())
        joined = torch.cat([part[2][k] for part in parts]) / count
        # the weight lambda / B is rounded once in either, and a division by 3 too
        assert (joined - gradients[k]).abs().max() <= 2**-22 * gradients[k].abs().max()


def test_a_batch_that_does_not_divide_and_functional_objectives_are_refused():
    with pytest.raises(ValueError, match="--batch 24: 5 processes cannot have equally many"):
        seen(Part(0, 5))
    with pytest.raises(ValueError, match="--objective sliced .* in one process alone"):
        seen(Part(0, 2), "sliced")


def test_training_in_two_processes_and_on_in_one(launch, tmp_path, capsys):
    """The same run but for rounding: far closer to one process's than the way they went.

    Six iterations at a rate of at most 6 / 50 of .002 move a weight by some 1e-3 at most.
    What rounding moves is a thousandth of that or less: the gradients differ in their last
    bits, and Adam returns that ratio but for a weight whose gradient is nearly 0.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    argv = ["train", "--data", "moons", "--steps", "6", "--save-every", "4", "--batch", "64"]
    assert main([*argv, "--out", str(one)]) == 0
    launched = launch(*argv, "--out", two)
    text, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, text
    assert text.count("6 iterations of 64 samples") == text.count(": 6 iterations, ") == 1
    assert text.count("2 processes") == 1
    # the bar's last loss is the batch's: either is rounded to its third digit
    one_loss, two_loss = (float(re.findall(r"loss=([\d.]+)", said)[-1])
                          for said in (capsys.readouterr().err, text))
    assert abs(one_loss - two_loss) < .0015
    (a, said), (b, said_by_two) = (weights.read(out / "state.safetensors") for out in (one, two))
    assert said_by_two["circumstances"]["processes"] == 2
    assert weights.read(two / "state.previous")[1]["step"] == 4  # the first process alone saves
    assert {k: v for k, v in said.items() if k != "circumstances"} == {
        k: v for k, v in said_by_two.items() if k != "circumstances"}
    torch.manual_seed(0)
    start = train.ScoreNet((2,)).state_dict()
    way = torch.cat([(a[f"net.{k}"] - u).flatten() for k, u in start.items()]).norm()
    apart = torch.cat([(a[f"net.{k}"] - b[f"net.{k}"]).flatten() for k in start]).norm()
    assert way > 0 and apart < way / 1000
    capsys.readouterr()
    resumed = ["--resume", str(two / "state.previous"), "--out", str(tmp_path / "three")]
    assert main([*argv, *resumed]) == 0
    assert "processes 2, now 1: the bits may differ" in capsys.readouterr().out
    c, said = weights.read(tmp_path / "three" / "state.safetensors")
    assert said["step"] == 6 and said["circumstances"]["processes"] == 1
    apart = torch.cat([(a[f"net.{k}"] - c[f"net.{k}"]).flatten() for k in start]).norm()
    assert apart < way / 1000


def test_an_interrupt_of_any_process_saves_and_ends_all(launch, tmp_path):
    """At one iteration, although the others learn of it from that one alone."""
    launched = launch("train", "--data", "moons", "--steps", "100000", "--save-every", "90000",
                      "--batch", "64", "--out", tmp_path)
    pid = process_of(launched, 1)
    text = read_until("loss=", launched)
    os.kill(pid, signal.SIGINT)
    text += launched.communicate(timeout=60)[0]
    _, saved = weights.read(tmp_path / "state.safetensors")
    said = f"stopped at iteration {saved['step']}; --resume goes on from {tmp_path}"
    assert launched.returncode and text.count(said) == 1


# ---- one end, said once ----

class Store:
    """What torchrun shares among processes, of one process."""

    def __init__(self):
        self.counts = {}

    def add(self, key, n):
        self.counts[key] = self.counts.get(key, 0) + n
        return self.counts[key]


def test_the_first_process_that_ends_says_why(capsys):
    store = Store()
    for k in (1, 0, 2):
        Processes(k, 3, store).explain(f"why {k}")
    assert capsys.readouterr().err == "why 1\n"


def test_wrong_options_are_said_once(monkeypatch, capsys):
    store = Store()
    for k in range(3):
        monkeypatch.setattr(processes, "join", lambda k=k: Processes(k, 3, store))
        with pytest.raises(SystemExit) as stop:
            main(["train", "--steps", "many"])
        assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("usage: ") == said.count("argument --steps: invalid") == 1


@pytest.mark.parametrize("command", ["tour", "demo", "eval", "check", "bench", "info"])
def test_other_commands_are_one_process(command, monkeypatch, refused):
    monkeypatch.setattr(processes, "join", lambda: Processes(0, 2, Store()))
    refused(f"minidiff {command}: one process does it", argv=[command])


@pytest.mark.parametrize("message, said", [
    ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]", processes.LOST),
    ("[gloo/transport/tcp/device.cc:84] Unable to find address for: nosuch\nException raised",
     "minidiff sample: [gloo/transport/tcp/device.cc:84] Unable to find address for: nosuch")])
def test_what_cannot_be_reached_is_named(message, said, monkeypatch, refused, model):
    """And what is no lost process keeps its own line."""
    def lose(*_):
        raise dist.DistBackendError(message)
    monkeypatch.setattr(processes, "join", lambda: Processes(0, 2, Store()))
    monkeypatch.setattr(Processes, "open", lose)
    refused(said, argv=["sample", "--model", model])


def test_a_line_is_said_where_torchrun_itself_has_ended(monkeypatch, refused, model):
    class Gone(Store):
        def add(self, key, n):
            raise dist.DistNetworkError("Failed to recv")
    monkeypatch.setattr(processes, "join", lambda: Processes(0, 2, Gone()))
    monkeypatch.setattr(Processes, "open", lambda *_: None)
    refused("minidiff sample: nowhere", argv=["sample", "--model", "nowhere", "--samples", "1"])


def test_data_that_differ_among_machines_are_refused(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(processes, "join", lambda: Processes(1, 2, Store()))
    monkeypatch.setattr(Processes, "open", lambda *_: None)
    monkeypatch.setattr(Processes, "from_first", lambda *_: "of others")
    refused("--data moons: it holds other samples than the first process's",
            argv=["train", "--data", "moons", "--out", str(tmp_path)])


@pytest.mark.parametrize("size, port, said", [
    ("two", "29500", "invalid literal"), ("2", "99999", "port must have value from 0 to 65535")])
def test_what_a_launcher_set_wrong_is_one_line(size, port, said, monkeypatch, refused):
    for name, value in (("WORLD_SIZE", size), ("MASTER_PORT", port), ("RANK", "0"),
                        ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    refused("minidiff: the processes cannot meet: ", said, argv=["--version"])


@pytest.mark.parametrize("size", ["2", "", "many"])
def test_a_size_alone_is_no_launchers(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert processes.join() is processes.ALONE


def test_a_run_that_is_restarted_meets_anew(launch, model, tmp_path):
    """torchrun --max-restarts: the second attempt finds no address of the first."""
    out = tmp_path / "samples" / "x.npz"
    out.parent.mkdir()
    launched = launch("sample", "--model", model, "--samples", "7200", "--evaluations", "3",
                      "--out", out, torchrun=["--max-restarts=1"])
    pid = process_of(launched, 1)
    read_until(r" [1-9]\d*/7200 ", launched)
    os.kill(pid, signal.SIGKILL)
    text = launched.communicate(timeout=120)[0]
    assert launched.returncode == 0 and "7200 samples of digits" in text, text
    assert [*out.parent.iterdir()] == [out]


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pair = Processes(1, 2)
    for own, expected in ((0, "cuda:0"), (1, "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", str(own))
        assert pair.device("cuda") == expected and pair.device("cpu") == "cpu"
    assert Processes().device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="every process takes a GPU of its own: --device cuda"):
        pair.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="2 GPUs here, and more processes"):
        pair.device("cuda")
