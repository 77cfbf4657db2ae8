"""python -m minidiff COMMAND: demo, train, sample, check, bench, info."""

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
    from .kernels import BACKENDS, FLOATS, OPS
    p = argparse.ArgumentParser(prog="minidiff", description="Score-based generative modelling, "
                                "its samplers and their fused kernels.",
                                epilog=EPILOG + "demo")
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, example):
        c = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                epilog=EPILOG + name + example)
        c.set_defaults(run=run)
        c.add_argument("--seed", type=int, default=0, help="names the run's noise (default 0)")
        c.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
        return c

    def backend(c):
        c.add_argument("--backend", default="auto", choices=("auto", *BACKENDS),
                       help="what runs the updates (default auto: by device)")

    def own(c, what):
        c.add_argument("--kernel", metavar="FILE.py", help=f"{what} your own: functions named like "
                       "ops (see the README)")

    def data(c):
        c.add_argument("--data", default="digits", help="digits, mixture, moons, checkerboard or "
                       "FILE.npz (default digits)")
        c.add_argument("--steps", type=positive, help="training iterations (default 1250 for "
                       "images, 3000 for points)")

    c = command("demo", run_demo, "train on handwritten digits, sample with every family, "
                "measure and draw", " --data moons")
    data(c)
    backend(c)
    c.add_argument("--out", default="out", help="folder for demo.png and the model (default out)")

    c = command("train", run_train, "train a score network", " --data digits --out out")
    data(c)
    backend(c)
    c.add_argument("--batch", type=positive, help="samples a batch (default 128 for "
                   "images, 512 for points)")
    c.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    c.add_argument("--save-every", type=positive, default=200, metavar="N",
                   help="iterations between saves (default 200)")
    c.add_argument("--resume", action="store_true", help="go on from OUT/state.safetensors")
    c.add_argument("--out", default="out", help="folder for the state and the model (default out)")

    from .families import FAMILIES
    c = command("sample", run_sample, "sample a trained network",
                " --model out/model.safetensors --family ddim --n 64 --out digits.npz")
    backend(c)
    c.add_argument("--model", default="out/model.safetensors", help="a model that demo or train "
                   "wrote (default out/model.safetensors)")
    c.add_argument("--family", default="ddim", choices=FAMILIES, help="sampler (default ddim)")
    c.add_argument("--n", type=positive, default=64, help="how many (default 64)")
    c.add_argument("--evaluations", type=positive, help="about how many network evaluations")
    c.add_argument("--out", default="samples.npz", help="where to write x (default samples.npz)")

    c = command("check", run_check, "compare every op on every backend with NumPy, bit for bit",
                " --backend host --json check.json")
    c.add_argument("--backend", action="append", choices=BACKENDS, help="only this one "
                   "(repeatable); it must be able to run")
    c.add_argument("--op", action="append", choices=(*OPS, "norms", "noise_norms", "dsm_loss"),
                   help="only this one (repeatable)")
    c.add_argument("--dtype", action="append", choices=FLOATS, help="only this one (repeatable)")
    own(c, "check")
    c.add_argument("--json", "--out", metavar="F", help="write the rows as JSON")

    c = command("bench", run_bench, "time every kernel, whole samplers and growth against what "
                "users write today, after a gate", " --op langevin --elements 1048576")
    c.add_argument("--backend", action="append", help="a backend or a peer (repeatable; default: "
                   "all that run here)")
    c.add_argument("--op", action="append", choices=(*OPS, "dsm_loss", "corrector"),
                   help="(repeatable; default: the whole suite, minutes; with other options "
                   "langevin, or what --kernel holds)")
    c.add_argument("--elements", type=positive, action="append", help="(repeatable; default 2^20, "
                   "2^22 and 2^24)")
    c.add_argument("--dtype", choices=FLOATS, help="(default float32)")
    own(c, "time")
    c.add_argument("--json", "--out", metavar="F", help="write the rows as JSON; into a folder, "
                   "named by date and machine")
    c.add_argument("--compare", metavar="OLD.json", help="say what got slower beyond noise than "
                   "in an older run, and exit 1 if anything did")
    c.add_argument("--report", nargs="?", const="", metavar="FOLDER", help="time nothing: table "
                   "and figures of the newest results there (default bench/results)")

    c = command("info", run_info, "say what this machine can run", " --out info.json")
    c.add_argument("--backend", action="append", choices=BACKENDS, help="only this one "
                   "(repeatable)")
    c.add_argument("--json", "--out", metavar="F", help="write it as JSON")
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
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = train.Trainer(data.train, kernels, args.steps, args.batch, args.lr, seed=args.seed,
                            device=device(args), backend=args.backend)
    run = metadata(data, trainer) | {"batch": trainer.batch, "lr": args.lr}
    state = out / "state.safetensors"
    if args.resume:
        tensors, saved = train.read(state)
        step = saved.pop("step", None)
        if saved != run:
            raise ValueError(f"{state} is of another run: {saved}, not {run}")
        trainer.restore(tensors, step)
    elif state.exists():
        raise ValueError(f"{state} exists: --resume it, or choose another --out")
    return train.run(trainer, out, run, args.save_every)


def run_sample(args):
    """Write x (n, *shape), float32, in [-1, 1]."""
    import numpy as np
    import torch

    from . import kernels
    from .data import Data
    from .demo import NetScore, sample
    from .train import load_model
    if Path(args.out).suffix not in ("", ".npz"):
        raise ValueError(f"--out {args.out}: samples are written as .npz")
    net, saved = load_model(args.model, device(args))
    score = NetScore(net)
    *_, x = sample(score, saved["shape"], args.family, args.n, kernels, args.evaluations,
                   args.seed, device(args), args.backend)
    x = Data(saved["data"], np.empty((0, *saved["shape"])), np.empty(0),
             saved["levels"]).quantize(x.cpu().numpy())
    if not np.isfinite(x).all():
        raise FloatingPointError(f"{args.family}: samples are not finite")
    out = Path(args.out if args.out.endswith(".npz") else args.out + ".npz")
    part = out.with_suffix(".part")
    with open(part, "wb") as f:
        np.savez(f, x=x)
    os.replace(part, out)
    print(f"{out}: {args.n} samples of {saved['data']}, {args.family}, {score.evaluations} "
          f"evaluations, torch {torch.__version__}")


def run_check(args):
    """Rows, a summary, and exit 1 on any failure."""
    import torch
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from .bench import check
    from .bench.own import Own
    from .kernels import FLOATS
    device(args)
    dtypes = args.dtype or FLOATS
    if args.kernel:
        if args.backend:
            raise ValueError("--kernel checks your own functions, not a --backend")
        rows = Own(args.kernel, args.op).check(args.dtype or ("float32",), args.seed)
    else:
        rows = check.check(args.op, args.backend, dtypes, args.seed)
    rows = check.report(rows)
    if args.json:
        write_json(args.json, rows)
    return int(any(r["passed"] is False for r in rows) or not any(r["passed"] for r in rows))


def run_bench(args):
    """Gate, then times; exit 2 where the gate fails, 1 where --compare finds something slower."""
    from .bench import report
    from .bench.own import Own
    from .bench.run import FORM, bench
    from .bench.suite import show_all, suite
    if args.report is not None:
        return print(report.report(args.report or report.RESULTS))
    old = args.compare and report.load(args.compare)
    own = Own(args.kernel, args.op) if args.kernel else None
    if args.op or args.backend or args.elements or args.dtype or own:
        rows = bench(args.op or (list(own.functions) if own else [FORM.name]), args.backend,
                     args.elements, args.dtype or "float32", device(args), args.seed, own)
    else:
        rows = suite(device(args), args.seed)
    print(show_all(rows))
    if args.json:
        print(report.save(args.json, rows))
    return report.compare(old, rows) if old else 0


def run_info(args):
    """Versions, devices, backends."""
    from .bench.machine import machine
    from .kernels import BACKENDS, missing
    found = machine() | {"device": device(args)} | {
        name: missing(name) or "runs" for name in args.backend or BACKENDS}
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
