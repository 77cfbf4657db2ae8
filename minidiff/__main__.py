"""python -m minidiff COMMAND: tour, demo, train, sample, eval, check, bench, info.

A command has a function for its options, one for what it does, and an entry in `parser`.
"""

from . import __version__, terminal

if __name__ == "__main__":  # before anything else is loaded
    terminal.end_on_interrupt()

# ruff: noqa: E402
import argparse
import os
import secrets
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path

DESCRIPTION = "Score-based generative modelling, its samplers and their fused kernels."
EXAMPLE = "example: python -m minidiff "
# how torch begins what it says where NumPy raises MemoryError
TOO_MUCH = "[enforce fail at alloc", "Storage size calculation", "CUDA out of memory"
OPS_OF_SUMS = "norms", "noise_norms", "dsm_loss"
BYTES = 64  # that a check takes at least for an element: four operands, noise, results


# ---- options that commands share; add is a parser's add_argument ----

def text(word):
    """A word that is there: an empty one is a variable of the shell that was not set."""
    if not word:
        raise argparse.ArgumentTypeError("must not be empty")
    return word


def positive(text):
    """A whole number of at least 1, of 63 bits."""
    value = int(text)
    if not 1 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be at least 1 and below 2^63, got {text}")
    return value


def integers(text):
    """Whole numbers between commas."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers between commas, such as 3,1,4, got {text!r}") from None


def ulp(text):
    """How many units in the last place are near: beyond 2^20 nothing would be wrong."""
    value = positive(text)
    if value > 2**20:
        raise argparse.ArgumentTypeError(f"must be at most 2^20, got {text}; see --rtol")
    return value


def guidance(text):
    """A weight of `guidance.guided`."""
    value = float(text)
    if not abs(value) < 1e6:
        raise argparse.ArgumentTypeError(f"must be within a million of 0, got {text}")
    return value


def evaluations(text):
    """How many network evaluations: a million take hours."""
    value = positive(text)
    if value > 1_000_000:
        raise argparse.ArgumentTypeError(f"must be at most 1000000, got {text}")
    return value


def tolerance(text):
    """A relative tolerance."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def backend_option(add):
    """One backend, which runs the updates of a training or a sampler."""
    from .kernels import BACKENDS
    add("--backend", choices=("auto", *BACKENDS), default="auto",
        help="what runs the updates (default auto)")


def training_options(add):
    """What demo and train share."""
    backend_option(add)
    add("--data", default="digits",
        help="digits, mixture, moons, checkerboard or FILE.npz (default digits)")
    add("--steps", type=positive,
        help="training iterations (default 3000 for points, 1250 for images, 4000 for "
             "those of more than 256 pixels)")
    add("--out", default="out", help="folder for what is written (default out)")


def model_options(add):
    """What sample and eval share."""
    from .families import FAMILIES
    backend_option(add)
    add("--model", default="out/model.safetensors",
        help="a model that demo or train wrote (default out/model.safetensors)")
    add("--family", choices=FAMILIES, help="sampler (default ddim)")
    add("--evaluations", type=evaluations,
        help="about how many network evaluations; guided samples take twice as many")
    add("--guidance", type=guidance, metavar="W",
        help="by how much samples follow their class: 0 not at all, 1 as the data do (the "
             "default), 2 and more beyond that, clearer and less diverse")


def kernel_options(add):
    """A user's own kernels, to be checked or timed."""
    add("--kernel", metavar="FILE.py", action="append",
        help="your own: functions named like ops, or a version, langevin_v2 (repeatable; "
             "see the README)")
    add("--ulp", type=ulp, metavar="N",
        help="with --kernel: it need not be equal, N units in the last place are near "
             "enough")
    add("--rtol", type=tolerance, metavar="R",
        help="with --kernel: the same, R (1 + |expected|)")


def json_option(add):
    """A file for the result."""
    add("--json", "--out", metavar="F", help="write the result as JSON")


# ---- what the commands share ----

def device(args):
    """The torch device asked for, or the best one here. ValueError if it is missing."""
    import torch

    from .kernels.arguments import place
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = args.processes.device(name)
    try:
        torch.empty(0, device=place(name))
    except ValueError as e:
        raise ValueError(f"--{e}") from None
    except RuntimeError as e:  # a GPU that does not answer
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from e
    return name


def where(args):
    """What decides a run's noise and where it is computed: seed, device and backend."""
    return {"seed": args.seed, "device": device(args), "backend": args.backend}


def check_ends(model, saved):
    """ValueError where a model does not know the units of its data."""
    if saved["ends"] is None:
        raise ValueError(f"{model} was written before models kept the scale of their data, "
                         "so that what it returns has no units: train it again")


def conditions_of(args, saved, label=None, **known):
    """The `Conditions` of a model's samples. ValueError where it knows no classes."""
    from .conditions import Conditions
    classes = saved["classes"]
    if not classes:
        asked = "--label" if label is not None else "--guidance"
        if label is not None or args.guidance is not None:
            raise ValueError(f"{asked}: {args.model} was trained without classes; see "
                             "train --labels")
    elif label is not None and label not in classes:
        raise ValueError(f"--label {label}: {args.model} knows "
                         f"{', '.join(list(classes)[:20])}")
    elif label is not None and args.guidance == 0:
        raise ValueError("--guidance 0 forgets the class, and --label asks for one")
    w = 1. if args.guidance is None else args.guidance
    return Conditions(classes, label, w, **known)


def check_trained_on(model, saved):
    """ValueError where a model does not know the data that it was trained on."""
    if "digest" not in saved:
        raise ValueError(f"{model} was written before models kept which data they saw, so "
                         "that held-out samples may be among them: train it again")


# ---- tour ----

def tour_options(add):
    """The options of tour."""
    add("--out", default="out/tour", help="folder for the pictures (default out/tour)")


def run_tour(args):
    """See tour.tour."""
    from .files import make_folder
    from .tour import tour
    tour(make_folder(args.out), args.seed)


# ---- demo ----

def run_demo(args):
    """See demo.demo."""
    from . import kernels
    from .data import load
    from .demo import demo
    from .files import only_run
    data = load(args.data, args.seed)
    with only_run(args.out) as out:
        demo(data, out, kernels, args.steps, **where(args))


# ---- train ----

def train_options(add):
    """The options of train."""
    training_options(add)
    add("--batch", type=positive,
        help="samples a batch (default 512 for points, 128 for images, 32 for those of "
             "more than 256 pixels)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    add("--objective", choices=("denoising", "implicit", "sliced", "sliced_vr"),
        default="denoising",
        help="of score matching; the others differentiate the network: for small data "
             "(default denoising)")
    add("--weighting", choices=("edm", "sigma2", "likelihood", "flow"),
        help="of the loss over noise levels, flow for flow matching (default edm; sigma2 "
             "for the other objectives)")
    add("--labels", action="store_true",
        help="learn each class's score too, of data whose classes are known")
    add("--save-every", type=positive, default=200, metavar="N",
        help="iterations between saves (default 200)")
    add("--resume", nargs="?", const=True, metavar="FILE",
        help="go on from OUT/state.safetensors, or from FILE, such as the save before it, "
             "OUT/state.previous")


def run_train(args):
    """Train, saving every N iterations; Ctrl-C saves and exits with 130."""
    from . import kernels, train
    from .data import load
    from .files import only_run
    processes = args.processes
    if not 0 < args.lr < 3e38:  # of float32
        raise ValueError(f"--lr must be positive and finite in float32, got {args.lr}")
    data = load(args.data, args.seed)
    if args.batch and args.batch > len(data.train):
        raise ValueError(f"--batch {args.batch}: {data.name} has {len(data.train)} samples")
    if args.labels and data.labels is None:
        raise ValueError(f"--labels: of {data.name} no classes are known; call them y, one "
                         "for each sample")
    print(data.about)
    options = where(args)
    processes.open(options["device"])
    if data.digest != processes.from_first(data.digest):
        raise ValueError(f"--data {data.name}: it holds other samples than the first "
                         "process's")
    with only_run(args.out) if processes.first else nullcontext(Path(args.out)) as out:
        trainer = train.Trainer(data.train, kernels, args.steps, batch=args.batch,
                                lr=args.lr, levels=data.levels, weighting=args.weighting,
                                objective=args.objective, processes=processes,
                                labels=data.labels if args.labels else None,
                                classes=len(data.classes) if args.labels else 0, **options)
        run = train.metadata(data, trainer) | {
            "batch": trainer.batch, "lr": args.lr, "weighting": trainer.weighting,
            "objective": args.objective}
        resumed = args.resume is not None
        if resumed:
            own = out / "state.safetensors"
            train.resume(trainer, own if args.resume is True else args.resume, run)
        if processes.first:
            train.claim(out, run, resumed)
        name = kernels.backend(args.backend, trainer.device.partition(":")[0]).NAME
        of_each = f", {processes.size} processes" if processes.size > 1 else ""
        print(f"{trainer.steps} iterations of {trainer.batch} samples, {args.objective} "
              f"score matching, weighting {trainer.weighting}, peak learning rate "
              f"{args.lr:g}; seed {args.seed}, on {trainer.device} by {name}{of_each}")
        return train.run(trainer, out, run, args.save_every)


# ---- sample ----

def sample_options(add):
    """The options of sample."""
    model_options(add)
    add("--samples", "--n", dest="n", type=positive, metavar="N",
        help="how many (default 64); torchrun takes --n for its own")
    add("--seeds", type=integers, metavar="I,J,...",
        help="a seed for each sample, in place of --n and --seed: the noise of a sample "
             "then follows from its own, in any order and number (--seeds=-1,2 where the "
             "first is negative)")
    add("--label", metavar="CLASS",
        help="of this class alone, as the data call it (default: of each as often as in "
             "the data)")
    add("--known", metavar="FILE.npz",
        help="complete samples: x, (n, ...), NaN where nothing is known. Sample i has what "
             "is known of row i; more than n begin again with the first")
    add("--units", choices=("model", "data"), default="model",
        help="of x, and of --known: the network's, [-1, 1], or those of the data (default "
             "model)")
    add("--out", default="samples.npz",
        help="where to write x, and y, the classes, where they were asked for (default "
             "samples.npz)")


def samples_file(args):
    """The file that --out names, a Path. ValueError where none can be written."""
    from .files import check_file
    out = Path(args.out)
    if args.out.endswith(os.sep):
        raise ValueError(f"--out {args.out}: a folder; samples are written to a file")
    if out.suffix not in ("", ".npz"):
        raise ValueError(f"--out {out}: samples are written as .npz")
    if out.name and not out.suffix:
        out = out.with_name(f"{out.name}.npz")
    check_file("--out", args.out)
    check_file("--out", out)
    return out


def as_written(saved, family, units):
    """A function that makes a chunk of samples what is written: grey levels, in the units.

    saved: the model's metadata. FloatingPointError where a sample is not finite.
    """
    import numpy as np

    from .data import Data
    none = np.empty((0, *saved["shape"]))
    data = Data(saved["data"], none, none, saved["levels"], saved["ends"])

    def finished(x):
        if not np.isfinite(x).all():
            raise FloatingPointError(f"{family}: samples are not finite")
        x = data.quantize(x)
        return data.in_own_units(x) if units == "data" else x

    return finished


def what_is_known(args, saved, family):
    """What --known names, as `Conditions` takes it. ValueError where it cannot be used."""
    from .conditions import known_parts
    if family == "pf_ode_adaptive":
        raise ValueError("--known: the steps of pf_ode_adaptive are the batch's: choose "
                         "another --family")
    ends = saved["ends"] if args.units == "data" else (-1., 1.)
    known, noise_std = known_parts(args.known, saved["shape"], saved["levels"], ends)
    return {"known": known, "noise_std": noise_std}


def run_sample(args):
    """Write x (n, *shape), float32 in [-1, 1], or in the units of the data."""
    import torch

    from . import kernels
    from .chunks import NetScore, compile_first, evaluations_of, samples
    from .files import write_samples
    from .weights import load_model
    processes = args.processes
    out = samples_file(args) if processes.first else None
    if args.seeds and (args.n or args.seed):
        raise ValueError("--seeds names a sample each: without --n and --seed")
    options = where(args)
    if args.seeds:
        options |= {"seed": args.seeds}
    processes.open(options["device"])
    net, saved = processes.from_first(load_model(args.model) if processes.first else None)
    net = net.to(options["device"], memory_format=torch.channels_last)
    if args.units == "data":
        check_ends(args.model, saved)
    family = args.family or "ddim"
    shape = saved["shape"]
    known = {}
    if args.known:
        if args.guidance is not None and args.label is None:
            raise ValueError("--guidance: with --known it is for a --label, else the class "
                             "follows from what is known")
        own = what_is_known(args, saved, family) if processes.first else None
        known = processes.from_first(own)
    conditions = conditions_of(args, saved, args.label, **known)
    n = len(args.seeds or ()) or args.n or len(known.get("known", ())) or 64
    if n > 1 << 32:
        raise ValueError(f"--n {n}: a seed has 2^32 samples; others have another --seed")
    options["conditions"] = conditions
    compile_first(shape, [family], kernels, **options)
    score = NetScore(net)
    start = time.perf_counter()
    parts = samples(score, shape, family, n, kernels, args.evaluations,
                    processes=processes, **options)
    if not processes.first:
        deque(parts)  # the first process gathers what it draws
        return
    also = {"y": conditions.in_words(n, options["seed"])} if conditions.told else {}
    parts = conditions.completed(parts)
    write_samples(out, n, map(as_written(saved, family, args.units), parts), also)
    rate = n / (time.perf_counter() - start)
    evaluations = evaluations_of(score, shape, n, processes)
    terminal.say(f"{out}: {n} samples of {saved['data']}, {family}, {evaluations} "
                 f"evaluations, {rate:.1f} samples a second, torch {torch.__version__}")


# ---- eval ----

def eval_options(add):
    """The options of eval."""
    model_options(add)
    json_option(add)
    add("--samples", "--n", dest="n", type=positive, default=360, metavar="N",
        help="how many (default 360); of them the SVM and the likelihood take as many as "
             "are held out")
    add("--likelihood", action="store_true",
        help="bits/dim by the probability flow, and DDPM's bound of 1000 evaluations: "
             "minutes")
    add("--data", help="a data set, which is scaled as the model's was (default: the one "
                       "it was trained on)")


def run_eval(args):
    """bits/dim of held-out data, or how good samples are beside it."""
    from .data import load
    from .files import write_json
    from .npz import BY_HASH
    from .weights import load_model
    net, saved = load_model(args.model, device(args))
    check_ends(args.model, saved)
    check_trained_on(args.model, saved)
    name = args.data or saved["data"]
    if not args.data and name.endswith(".npz") and not os.path.exists(name):
        raise ValueError(f"{name}, which the model was trained on, is not there: say where "
                         "by --data")
    data = load(name, saved["seed"], saved["ends"], saved["levels"])
    if not args.data and data.digest != saved["digest"]:
        raise ValueError(f"{name} is no longer what the model was trained on; to measure "
                         f"the model on what it holds now: --data {name}")
    print(data.about)
    same = data.digest == saved["digest"]
    if not same and not data.split == saved["split"] == BY_HASH:
        split = saved["split"]
        terminal.say(f"the model was trained on other data, held out {split}: what is held "
                     f"out {data.split} here may be among them")
    of_data = {"shape": list(data.shape), "levels": data.levels}
    of_model = {"shape": saved["shape"], "levels": saved["levels"]}
    if of_data != of_model:
        raise ValueError(f"--data {data.name}: {of_data}, but the model is of {of_model}")
    evaluate = eval_likelihood if args.likelihood else eval_samples
    result = evaluate(args, net, data, saved)
    if args.json:
        write_json(args.json, result)


def require_enough(n, least):
    """ValueError unless n samples are enough for a figure and its error."""
    if n < least:
        raise ValueError(f"{n} samples: at least {least} are needed")


def eval_likelihood(args, net, data, saved):
    """The bits/dim of --n held-out samples, or of all, as a result for --json."""
    from .demo import bound, likelihood
    n = min(args.n, len(data.held))
    require_enough(n, 2)
    guided = args.guidance is not None
    if args.backend != "auto" or args.evaluations or args.family or guided:
        raise ValueError("--likelihood runs RK45: without --backend, --evaluations, "
                         "--family and --guidance")
    if data.classes != tuple(saved["classes"] or ()):
        data = replace(data, held_labels=None)  # those are of other classes
    place = device(args)
    bits, error, evaluations = likelihood(net, data, n, args.seed, place)
    at_most, bound_error, bound_evaluations = bound(net, data, n, args.seed, place)
    return {"bits_per_dim": bits, "error": error, "evaluations": evaluations,
            "bound": at_most, "bound_error": bound_error,
            "bound_evaluations": bound_evaluations, "n": n, "data": data.name}


def eval_samples(args, net, data, saved):
    """The quality of --n samples, beside real data's, as a result for --json."""
    from . import kernels
    from .chunks import compile_first
    from .demo import measure, table
    from .quality import Judge
    n = args.n
    held = len(data.held)
    require_enough(min(n, held, len(data.train)), 5)
    family = args.family or "ddim"
    options = where(args) | {"conditions": conditions_of(args, saved)}
    compile_first(data.shape, [family], kernels, **options)
    judge = Judge(data, show=True)
    row, *_ = measure(net, judge, family, n, kernels, args.evaluations, show=True,
                      **options)
    real = judge.of_data(n)
    print(table([row], real, judge.right))
    print(f"{n} samples, {n / row.seconds:.1f} a second; {min(n, held)} compared with as "
          f"many held out of {terminal.printable(data.name)}")
    return {"family": family, **row.quality._asdict(), "n": n,
            "evaluations": row.evaluations, "data": data.name, "real": real._asdict()}


# ---- check ----

def check_options(add):
    """The options of check."""
    from .kernels import BACKENDS, FLOATS, OPS
    add("--dtype", action="append", choices=FLOATS, help="only this one (repeatable)")
    kernel_options(add)
    json_option(add)
    add("--backend", action="append", choices=BACKENDS,
        help="only this one; it must be able to run (repeatable)")
    add("--shape", action="append", type=integers, metavar="B,N,...",
        help="only this one, samples first (repeatable)")
    add("--elements", action="append", type=positive, metavar="N",
        help="the same, N elements as one sample (repeatable)")
    add("--stages", action="store_true",
        help="print one counter's noise stage by stage, words to normals and an update, "
             "for whoever writes a kernel")
    add("--op", action="append", choices=(*OPS, *OPS_OF_SUMS),
        help="only this one (repeatable)")


def run_check(args):
    """Rows, a summary, and exit 1 on any failure."""
    import torch
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from .files import write_json
    from .kernels import FLOATS, check
    from .kernels.check import words
    from .kernels.check.yours import apart
    from .npz import free_memory
    options = (args.backend, args.kernel, args.op, args.dtype, args.json, args.shape,
               args.elements, args.device)
    if args.stages and any(options):
        raise ValueError("--stages prints one counter of the contract and takes --seed "
                         "alone")
    if args.stages:
        print(words.shown(args.seed or 0))
        return 0
    device(args)
    near = nearness(args)
    shapes = [tuple(sizes) for sizes in args.shape or ()]
    shapes += [(1, n) for n in args.elements or ()]
    if any(min(sizes) < 0 for sizes in shapes):
        raise ValueError("--shape: a size cannot be negative")
    for sizes in shapes:
        if BYTES * prod(sizes) > min(free_memory(), 1 << 60):
            raise MemoryError(f"--shape {','.join(map(str, sizes))}")
    if args.kernel and args.backend:
        raise ValueError("--kernel checks your own functions, not a --backend")
    seed = args.seed
    if args.kernel:
        if seed is None:
            seed = secrets.randbits(32)  # no kernel can know it
        rows = apart.check(args.kernel, args.op, args.dtype or ("float32",), seed,
                           shapes or None, near)
    else:
        rows = check.check(args.op, args.backend, args.dtype or FLOATS, seed or 0,
                           shapes or None)
    rows = check.report(rows)
    if args.kernel:
        print(f"--seed {seed} checks the same again")
    if args.json:
        write_json(args.json, rows)
    passed = [row["passed"] for row in rows]
    return int(False in passed or True not in passed)


def nearness(args):
    """What a user's kernels are held to, if not to the bits: --ulp, --rtol."""
    from .kernels.check.compare import Near
    if not args.ulp and not args.rtol:
        return None
    if not args.kernel:
        raise ValueError("--ulp and --rtol are for a --kernel: ours return the same bits")
    return Near(args.ulp or 0, args.rtol or 0.)


# ---- bench ----

def bench_options(add):
    """The options of bench."""
    from .kernels import FLOATS, OPS
    kernel_options(add)
    json_option(add)
    add("--backend", action="append",
        help="a backend or a peer; default: all that run here (repeatable)")
    add("--op", action="append", choices=(*OPS, *OPS_OF_SUMS, "corrector"),
        help="default: the whole suite, minutes; with other options langevin, or the "
             "--kernel's (repeatable)")
    add("--elements", action="append", type=positive,
        help="default 2^20, 2^22 and 2^24 (repeatable)")
    add("--width", type=positive, metavar="D", help="elements of a row (default 1024)")
    add("--dtype", choices=FLOATS, help="(default float32)")
    add("--compare", metavar="OLD.json",
        help="say what got slower beyond noise than in an older run, and exit 1 if "
             "anything did")
    add("--report", nargs="?", const=True, metavar="FOLDER",
        help="time nothing: table and figures of the newest results (default "
             "bench/results)")


def run_bench(args):
    """Gate, then times; exit 2 if the gate fails, 1 if --compare finds slower ones."""
    from .bench import report
    from .bench.speed.rows import MAIN_OP
    from .bench.speed.run import bench
    from .bench.speed.state import state
    from .bench.speed.suite import show_all, suite
    from .bench.speed.yours import UserKernels
    if args.report is not None:
        print(report.report(report.RESULTS if args.report is True else args.report))
        return 0
    width = args.width or 1024
    for n in args.elements or []:
        if n > width and n % width:
            raise ValueError(f"--elements {n}: a multiple of {width}, the --width of a "
                             "row, or below it")
    old = args.compare and report.load(args.compare)
    if old:
        report.require_same_machine(old)  # before minutes of timing
    near = nearness(args)
    state()  # before anything of ours runs
    asked = args.op, args.backend, args.elements, args.dtype, args.kernel, args.width
    if any(asked):
        mine = UserKernels(*args.kernel, ops=args.op, near=near) if args.kernel else None
        with mine or nullcontext():
            default = mine.ops if mine else [MAIN_OP.name]
            rows = bench(args.op or default, args.backend, args.elements,
                         args.dtype or "float32", device(args), seed=args.seed,
                         user_kernels=mine, width=width)
    else:
        rows = suite(device(args), args.seed)
    print(show_all(rows))
    if args.json:
        print(report.save(args.json, rows))
    return report.compare(old, rows) if old else 0


# ---- info ----

def info_options(add):
    """The options of info."""
    from .kernels import BACKENDS
    json_option(add)
    add("--backend", action="append", choices=BACKENDS, help="only this one (repeatable)")
    add("--kernels", nargs="?", const="here", metavar="GPU",
        help="compile each row for a GPU, which need not be here, and predict its time: "
             "A100, H100, H200, B200 or RTX5090 (default the one here)")


def run_info(args):
    """Versions, devices, backends; or what is predicted of a GPU's kernels."""
    from .files import write_json
    from .kernels import BACKENDS, on_host, why_not
    from .machine import machine
    if args.kernels:
        from .bench.device.predicted import predictions
        found = predictions(args.kernels, args.backend)
        if args.json:
            write_json(args.json, found)
        return
    found = machine() | {"device": device(args)}
    for name in args.backend or BACKENDS:
        found[name] = why_not(name) or "runs"
    if found.get("host") == "runs" and not on_host.has_fma():
        found["host"] = ("runs, its noise by float64 and so at less than half the speed: "
                         "this CPU has no fused multiply-add")
    for key, value in found.items():
        print(f"{key:<14}{value}")
    if args.json:
        write_json(args.json, found)


# ---- all of them ----

def parser():
    """The parser of every command line: options in `args`, what to run in `args.run`."""
    top = argparse.ArgumentParser(prog="minidiff", description=DESCRIPTION,
                                  epilog=EXAMPLE + "demo")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, options, run, help, example):
        description = help[0].upper() + help[1:] + "."
        one = commands.add_parser(name, help=help, description=description,
                                  epilog=f"{EXAMPLE}{name} {example}")
        one.register("type", None, text)  # of options that name no other
        add = one.add_argument
        usual = "a new one for --kernel, else 0" if run is run_check else "0"
        add("--seed", type=int, default=None if run is run_check else 0,
            help=f"names the run's noise (default {usual})")
        if run is not run_tour:  # it computes in NumPy
            add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
        options(add)
        one.set_defaults(run=run)

    command("tour", tour_options, run_tour,
            "draw the field in pictures, from exact scores: nothing is trained",
            "--out out/tour")
    command("demo", training_options, run_demo,
            "train on handwritten digits, sample with every family, measure and draw",
            "--data mnist.npz --out out/mnist")
    command("train", train_options, run_train,
            "train a score network, in one process or by torchrun in several",
            "--data digits --out out")
    command("sample", sample_options, run_sample,
            "sample a trained network, in one process or by torchrun in several",
            "--model out/model.safetensors --family ddim --n 64 --out digits.npz")
    command("eval", eval_options, run_eval,
            "measure a trained network on held-out data: its samples, or the likelihood",
            "--likelihood --model out/model.safetensors --out eval.json")
    command("check", check_options, run_check,
            "compare every op on every backend with NumPy, bit for bit",
            "--backend host --json check.json")
    command("bench", bench_options, run_bench,
            "time every kernel and whole samplers against what users write today, after "
            "a gate",
            "--op langevin --elements 1048576")
    command("info", info_options, run_info,
            "say what this machine can run",
            "--out info.json")
    return top


def main(argv=None):
    """Run a command. Returns its exit code; what a user can mend is one line and 2."""
    try:
        from .processes import join
        processes = join()
        with processes.explaining():
            args = parser().parse_args(argv)
        terminal.raise_on_interrupt()
    except ModuleNotFoundError as e:
        sys.exit(f"minidiff: {e}; install this folder first: pip install --use-pep517 -e .")
    except (ValueError, RuntimeError) as e:
        said = str(e).splitlines()[0]
        print(f"minidiff: the processes cannot meet: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    args.processes = processes
    try:
        if processes.size > 1 and args.run not in (run_train, run_sample):
            raise ValueError("one process does it; torchrun is for train and sample")
        file = getattr(args, "json", None)
        takes_folders = args.run is run_bench
        if file and not (takes_folders and Path(file).is_dir()):
            from .files import check_file
            check_file("--json", file)
        code = args.run(args) or 0
        processes.close()
        return code
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as e:
        if os.environ.get("MINIDIFF_TRACEBACK"):
            raise
        said = processes.reason(e)
        if said.startswith(TOO_MUCH):
            said = "out of memory: ask for less"
    except MemoryError as e:
        said = f"out of memory ({e}): ask for less"
    except KeyboardInterrupt:
        return 130
    processes.explain(terminal.printable(f"minidiff {args.command}: {said}"))
    return 2


def command():
    """What the shell runs: `main` of its words, on streams that may be closed."""
    terminal.end_on_interrupt()
    sys.exit(terminal.run(main))


if __name__ == "__main__":
    command()
