"""python -m minidiff COMMAND: demo, train, sample, eval, check, bench, info."""

import argparse
import json
import os
import sys
from pathlib import Path

from . import __version__

EPILOG = "example: python -m minidiff "


def positive(text):
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser():
    """The commands and their options."""
    from .families import FAMILIES
    from .kernels import BACKENDS, FLOATS, OPS

    def one(default, text, **kw):
        return {"default": default, "help": f"{text} (default {default})", **kw}

    def some(choices=None, text="only this one", **kw):
        return {"action": "append", "choices": choices, "help": f"{text} (repeatable)", **kw}

    common = {"--seed": one(0, "names the run's noise", type=int),
              "--device": {"help": "cpu, cuda or cuda:N (default: cuda if there is one)"}}
    backend = {"--backend": one("auto", "what runs the updates", choices=("auto", *BACKENDS))}
    data = backend | {
        "--data": one("digits", "digits, mixture, moons, checkerboard or FILE.npz"),
        "--steps": {"type": positive, "help": "training iterations (default 1250 for images, 3000 "
                    "for points)"},
        "--out": one("out", "folder for what is written")}
    model = backend | {
        "--model": one("out/model.safetensors", "a model that demo or train wrote"),
        "--family": one("ddim", "sampler", choices=FAMILIES),
        "--evaluations": {"type": positive, "help": "about how many network evaluations"}}
    dtype = {"--dtype": some(FLOATS)}
    own = {"--kernel": {"metavar": "FILE.py",
                        "help": "your own: functions named like ops (see the README)"}}
    written = {"--json --out": {"metavar": "F", "help": "write the result as JSON"}}
    commands = (
        (run_demo, "train on handwritten digits, sample with every family, measure and draw",
         " --data moons", data),
        (run_train, "train a score network", " --data digits --out out", data | {
            "--batch": {"type": positive, "help": "samples a batch (default 128 for images, 512 "
                        "for points)"},
            "--lr": one(2e-3, "peak learning rate", type=float),
            "--objective": one("denoising", "of score matching; the others differentiate the "
                               "network: for small data", choices=(
                                   "denoising", "implicit", "sliced", "sliced_vr")),
            "--weighting": {"choices": ("edm", "sigma2", "likelihood"), "help": "of the loss over "
                            "noise levels (default edm; sigma2 for the other objectives)"},
            "--save-every": one(200, "iterations between saves", type=positive, metavar="N"),
            "--resume": {"action": "store_true", "help": "go on from OUT/state.safetensors"}}),
        (run_sample, "sample a trained network",
         " --model out/model.safetensors --family ddim --n 64 --out digits.npz", model | {
             "--n": one(64, "how many", type=positive),
             "--units": one("model", "of x: the network's, [-1, 1], or those of the data",
                            choices=("model", "data")),
             "--out": one("samples.npz", "where to write x")}),
        (run_eval, "measure a trained network on held-out data: its samples, or the likelihood",
         " --likelihood --model out/model.safetensors --out eval.json", model | written | {
             "--family": {"choices": FAMILIES, "help": "sampler (default ddim)"},
             "--n": one(360, "how many samples", type=positive),
             "--likelihood": {"action": "store_true", "help": "bits/dim by the probability flow"},
             "--data": {"help": "a data set, which is scaled as the model's was (default: the one "
                        "it was trained on)"}}),
        (run_check, "compare every op on every backend with NumPy, bit for bit",
         " --backend host --json check.json", dtype | own | written | {
             "--backend": some(BACKENDS, "only this one; it must be able to run"),
             "--stages": {"action": "store_true", "help": "print one counter's noise stage by "
                          "stage, words to normals and an update, for whoever writes a kernel"},
             "--op": some((*OPS, "norms", "noise_norms", "dsm_loss"))}),
        (run_bench, "time every kernel and whole samplers against what users write today, "
         "after a gate", " --op langevin --elements 1048576", own | written | {
             "--backend": some(text="a backend or a peer; default: all that run here"),
             "--op": some((*OPS, "norms", "noise_norms", "dsm_loss", "corrector"), "default: the "
                          "whole suite, minutes; with other options langevin, or the --kernel's"),
             "--elements": some(text="default 2^20, 2^22 and 2^24", type=positive),
             "--dtype": {"choices": FLOATS, "help": "(default float32)"},
             "--compare": {"metavar": "OLD.json", "help": "say what got slower beyond noise than "
                           "in an older run, and exit 1 if anything did"},
             "--report": {"nargs": "?", "const": "", "metavar": "FOLDER", "help": "time nothing: "
                          "table and figures of the newest results (default bench/results)"}}),
        (run_info, "say what this machine can run", " --out info.json", written | {
            "--backend": some(BACKENDS)}))
    p = argparse.ArgumentParser(prog="minidiff", description="Score-based generative modelling, "
                                "its samplers and their fused kernels.", epilog=EPILOG + "demo")
    p.add_argument("--version", action="version", version=__version__)
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, text, example, options in commands:
        name = run.__name__.removeprefix("run_")
        c = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                           epilog=EPILOG + name + example)
        c.set_defaults(run=run)
        for option, settings in (common | options).items():
            c.add_argument(*option.split(), **settings)
    return p


def device(args):
    """The torch device asked for, or the best one here. ValueError if it is missing."""
    import torch
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from e
    return name


def check_file(option, file):
    """ValueError where no file can be written, or would replace one of another kind."""
    folder = Path(file).parent
    if option == "--json" and Path(file).suffix != ".json":
        raise ValueError(f"{option} {file}: results are written as .json")
    if Path(file).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {file}: not a file in a folder that can be written")


def write_json(file, rows):
    """Rows to a file, whole or not at all."""
    part = Path(str(file) + ".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, file)


def run_demo(args):
    """See demo.demo."""
    from . import kernels
    from .data import load
    from .demo import demo
    demo(load(args.data, args.seed), args.out, kernels, args.steps, seed=args.seed,
         device=device(args), backend=args.backend)


def run_train(args):
    """Train, saving every N iterations; Ctrl-C saves and exits with 130."""
    from . import kernels, train
    from .data import load
    from .demo import metadata
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr must be positive, got {args.lr}")
    data = load(args.data, args.seed)
    if args.batch and args.batch > len(data.train):
        raise ValueError(f"--batch {args.batch}: {data.name} has {len(data.train)} samples")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = train.Trainer(data.train, kernels, args.steps, args.batch, args.lr, seed=args.seed,
                            device=device(args), backend=args.backend, levels=data.levels,
                            weighting=args.weighting, objective=args.objective)
    run = metadata(data, trainer) | {"batch": trainer.batch, "lr": args.lr,
                                     "weighting": trainer.weighting, "objective": args.objective}
    state = out / "state.safetensors"
    if args.resume:
        tensors, saved = train.read(state)
        step = saved.pop("step", None)
        if saved != run:
            raise ValueError(f"{state} is of another run: {saved}, not {run}")
        try:
            trainer.restore(tensors, step)
        except (ValueError, RuntimeError, KeyError) as e:
            raise ValueError(f"{state}: {str(e).splitlines()[0]}") from e
    elif state.exists():
        raise ValueError(f"{state} exists: --resume it, or choose another --out")
    return train.run(trainer, out, run, args.save_every)


def run_sample(args):
    """Write x (n, *shape), float32 in [-1, 1], or in the units of the data."""
    import numpy as np
    import torch

    from . import kernels
    from .data import Data
    from .demo import NetScore, sample
    from .train import load_model
    if Path(args.out).suffix not in ("", ".npz"):
        raise ValueError(f"--out {args.out}: samples are written as .npz")
    check_file("--out", args.out)
    net, saved = load_model(args.model, device(args))
    if args.units == "data":
        check_ends(args.model, saved)
    score = NetScore(net)
    *_, x = sample(score, saved["shape"], args.family, args.n, kernels, args.evaluations,
                   args.seed, device(args), args.backend)
    data = Data(saved["data"], np.empty((0, *saved["shape"])), np.empty(0), saved["levels"],
                saved["ends"])
    x = data.quantize(x.cpu().numpy())
    x = data.in_own_units(x) if args.units == "data" else x
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{args.family}: samples are not finite")
    out = Path(args.out if args.out.endswith(".npz") else args.out + ".npz")
    part = out.with_suffix(".part")
    with open(part, "wb") as f:
        np.savez(f, x=x)
    os.replace(part, out)
    print(f"{out}: {args.n} samples of {saved['data']}, {args.family}, {score.evaluations} "
          f"evaluations, torch {torch.__version__}")


def check_ends(model, saved):
    """ValueError where a model does not know the units of its data."""
    if saved["ends"] is None:
        raise ValueError(f"{model} was written before models kept the scale of their data, so "
                         "that what it returns has no units: train it again")


def run_eval(args):
    """bits/dim of held-out data, or how good samples are beside it."""
    from . import kernels
    from .data import SETS, load
    from .demo import likelihood, measure
    from .train import load_model
    net, saved = load_model(args.model, device(args))
    name = args.data or saved["data"]
    if name not in ("digits", *SETS):
        check_ends(args.model, saved)
    data = load(name, saved.get("seed", 0), saved["ends"])
    own, of_model = ({k: m[k] for k in ("shape", "levels")} for m in (vars(data) | {
        "shape": list(data.shape)}, saved))
    if own != of_model:
        raise ValueError(f"--data {data.name}: {own}, but the model is of {of_model}")
    n, least = min(args.n, len(data.held)), 2 if args.likelihood else 5
    if n < least:
        raise ValueError(f"--n {n}: at least {least} are needed")
    family = args.family or "ddim"
    if args.likelihood and (args.backend != "auto" or args.evaluations or args.family):
        raise ValueError("--likelihood runs RK45: without --backend, --evaluations and --family")
    if args.likelihood:
        mean, error, evaluations = likelihood(net, data, n, args.seed, device(args))
        row = {"bits_per_dim": mean, "error": error}
    else:
        (_, evaluations, _, accuracy, error, nearest), _, _ = measure(
            net, data, family, n, kernels, args.evaluations, args.seed, device(args),
            args.backend)
        print(f"{family}: SVM accuracy {accuracy:.3f} +- {error:.3f}, nearest {nearest:.2f}, "
              f"{evaluations} evaluations")
        row = {"family": family, "accuracy": accuracy, "error": error, "nearest": nearest}
    if args.json:
        write_json(args.json, row | {"n": n, "evaluations": evaluations, "data": data.name})


def run_check(args):
    """Rows, a summary, and exit 1 on any failure."""
    import torch
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from .kernels import FLOATS, check
    from .kernels.check import words
    from .kernels.check.yours import UserKernels
    if args.stages:
        if args.backend or args.kernel or args.op or args.dtype or args.json:
            raise ValueError("--stages prints one counter of the contract and takes --seed alone")
        return print(words.shown(args.seed))
    device(args)
    dtypes = args.dtype or FLOATS
    if args.kernel:
        if args.backend:
            raise ValueError("--kernel checks your own functions, not a --backend")
        rows = UserKernels(args.kernel, args.op).check(args.dtype or ("float32",), args.seed)
    else:
        rows = check.check(args.op, args.backend, dtypes, args.seed)
    rows = check.report(rows)
    if args.json:
        write_json(args.json, rows)
    return int(any(r["passed"] is False for r in rows) or not any(r["passed"] for r in rows))


def run_bench(args):
    """Gate, then times; exit 2 where the gate fails, 1 where --compare finds something slower."""
    from .bench import report
    from .bench.speed.rows import MAIN_OP
    from .bench.speed.run import bench
    from .bench.speed.suite import show_all, suite
    from .kernels.check.yours import UserKernels
    if args.report is not None:
        return print(report.report(args.report or report.RESULTS))
    if odd := [n for n in args.elements or () if n > 1024 and n % 1024]:
        raise ValueError(f"--elements {odd[0]}: a multiple of 1024, or below it")
    old = args.compare and report.load(args.compare)
    own = UserKernels(args.kernel, args.op) if args.kernel else None
    if args.op or args.backend or args.elements or args.dtype or own:
        rows = bench(args.op or (list(own.functions) if own else [MAIN_OP.name]), args.backend,
                     args.elements, args.dtype or "float32", device(args), args.seed, own)
    else:
        rows = suite(device(args), args.seed)
    print(show_all(rows))
    if args.json:
        print(report.save(args.json, rows))
    return report.compare(old, rows) if old else 0


def run_info(args):
    """Versions, devices, backends."""
    from .kernels import BACKENDS, missing, on_host
    from .machine import machine
    found = machine() | {"device": device(args)} | {
        name: missing(name) or "runs" for name in args.backend or BACKENDS}
    if found.get("host") == "runs" and not on_host.has_fma():
        found["host"] = "runs, its noise by float64 and so at less than half the speed: this " \
                        "CPU has no fused multiply-add"
    for key, value in found.items():
        print(f"{key:<14}{value}")
    if args.json:
        write_json(args.json, found)


def main(argv=None):
    """Run a command; what a user can mend is one line and exit 2."""
    try:
        args = parser().parse_args(argv)
    except ModuleNotFoundError as e:
        sys.exit(f"minidiff: {e}; install this folder first: pip install --use-pep517 -e .")
    try:
        if (file := getattr(args, "json", None)) and not (args.run is run_bench
                                                          and Path(file).is_dir()):
            check_file("--json", file)
        return args.run(args) or 0
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as e:
        if os.environ.get("MINIDIFF_TRACEBACK"):
            raise
        print(f"minidiff {args.command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
