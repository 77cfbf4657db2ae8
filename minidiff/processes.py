"""One run in several processes, on one machine or more, as torchrun starts them.

Samples and batches are divided by rows, and noise is named by a row's place in the whole.
So the process that computes a row changes no bit of its noise.
"""

import io
import os
import signal
import sys
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import terminal

LOST = ("another process of this run has ended or does not answer; files are as they were "
        "last saved")
SIGNS = "Connection closed", "Connection reset", "Broken pipe", "Timed out"  # of gloo
MEET = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # what a launcher sets for each


class Processes:
    """This process among those of a run, and what they tell each other.

    rank: which one this is; size: how many there are; store: what torchrun shares among
    them. The first, of rank 0, writes the files and speaks.
    """

    def __init__(self, rank=0, size=1, store=None):
        self.rank = rank
        self.size = size
        self.store = store
        self.first = rank == 0
        self.stderr = None  # where the others are silent

    def device(self, name):
        """The device of this process: of GPUs each process has one of its own."""
        if self.size == 1 or name == "cpu":
            return name
        own = int(os.environ.get("LOCAL_RANK", self.rank))
        here = torch.cuda.device_count()
        if name != "cuda":
            raise ValueError(f"--device {name}: every process takes a GPU of its own: "
                             "--device cuda")
        if own >= here > 0:
            raise ValueError(f"--device cuda: {here} GPUs here, and more processes: "
                             f"--nproc-per-node={here}")
        return f"cuda:{own}"

    def open(self, device):
        """Have the processes know each other: gloo on CPUs, NCCL for tensors on GPUs."""
        if self.size == 1:
            return
        on_gpu = device != "cpu"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                store=self.store, rank=self.rank, world_size=self.size)
        signal.signal(signal.SIGTERM, _end)

    def close(self):
        """Leave the others, once all is told."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def rows(self, n):
        """This process's rows of a batch of n, a slice. ValueError unless n divides."""
        each, left = divmod(n, self.size)
        if left:
            raise ValueError(f"--batch {n}: {self.size} processes cannot have equally many "
                             "samples of it")
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, given):
        """What every process gives, in the order of ranks; the others get nothing."""
        if self.size == 1:
            return [given]
        found = [None] * self.size if self.first else None
        dist.gather_object(given, found)
        return found or []

    def from_first(self, given):
        """What the first process gives."""
        if self.size == 1:
            return given
        told = [given]
        dist.broadcast_object_list(told)
        return told[0]

    def mean(self, u):
        """The mean of a tensor over the processes."""
        if self.size == 1:
            return u
        u = u.clone()
        dist.all_reduce(u)
        return u / self.size

    def any(self, flag):
        """Whether a flag is set in any process."""
        if self.size == 1:
            return bool(flag)
        count = torch.tensor(int(bool(flag)), device="cpu")
        dist.all_reduce(count)
        return count.item() > 0

    def parallel(self, net):
        """A network whose gradients become the mean over the processes."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net)

    def explain(self, text):
        """Print why the run ends, if no other process has."""
        try:
            speaks = self.store is None or self.store.add("ended", 1) == 1
        except dist.DistError:  # where torchrun itself has ended
            speaks = True
        if speaks:
            amid_a_bar = dist.is_initialized() and not self.first  # the first one's
            print("\n" * amid_a_bar + text, file=self.stderr or sys.stderr)

    def reason(self, error):
        """What an error says, in one line: LOST where another process does not answer."""
        said = str(error)
        if self.size == 1 or not isinstance(error, RuntimeError):
            return said
        if any(sign in said for sign in SIGNS):
            return LOST
        return said.splitlines()[0]  # below it stands torch's own stack

    @contextmanager
    def explaining(self):
        """Where this ends the process, as wrong options do, one process says why."""
        if self.size == 1:
            yield
            return
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                yield
        except SystemExit:
            if text := said.getvalue().strip():
                self.explain(text)
            raise


ALONE = Processes()


def _end(*_):
    """What torchrun's SIGTERM does: what is half-written is cleared away on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise RuntimeError(LOST)


def join():
    """The `Processes` of this run. All but the first are silent from here on.

    ValueError or RuntimeError where what the launcher set leads nowhere.
    """
    launched = all(os.environ.get(name) for name in MEET)
    if not launched or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    found = Processes(rank, size, dist.PrefixStore(attempt, store))
    if rank:
        found.stderr = terminal.silence()
    return found
