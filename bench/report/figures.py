"""Two figures of the rows: speedup against size; whole samplers. Read on light and on dark."""

from functools import wraps

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

from ..speed.rows import main_rows  # noqa: E402

GREY = "#808080"  # 4 : 1 on white as on a near-black page
COLOURS = {"torch_eager": "#3d85c6", "torch_inplace": "#d9822b", "torch_compile": "#4ca64c",
           "numpy_rng": "#a56cc1", "cupy_expr": "#d1495b", "curand": "#5b8c8c",
           "diffusers": "#b08d2e"}
STYLE = {"text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY,
         "ytick.color": GREY, "font.size": 11, "axes.spines.top": False,
         "axes.spines.right": False}


def _save(figure, file):
    figure.savefig(file, dpi=120, bbox_inches="tight", transparent=True)
    plt.close(figure)
    return file


def _styled(f):
    """A figure drawn in STYLE."""
    @wraps(f)
    def draws(*args):
        with plt.rc_context(STYLE):
            return f(*args)
    return draws


def _factor(v, _):
    return f"{v:g}x"


def _power(v, _):
    return f"$2^{{{round(v).bit_length() - 1}}}$"


def _spread(ends, gap):
    """Heights of the labels, in the order of `ends`, at least `gap` times the one below."""
    heights, last = {}, 0.
    for name, y in sorted(ends.items(), key=lambda e: e[1]):
        heights[name] = last = max(y, last * gap)
    return heights


@_styled
def speedups(file, rows, backend):
    """A line a peer: how many times longer it takes than our backend, against elements."""
    ours = [r for r in rows if r["backend"] == backend and r["speedup"]]
    peers = {p: [(r["elements"], r["speedup"][p]) for r in ours if p in r["speedup"]]
             for p in dict.fromkeys(p for r in ours for p in r["speedup"])}
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    every = [v for points in peers.values() for _, v in points]
    labels = _spread({p: points[-1][1] for p, points in peers.items()},
                     (max(*every, 2) / min(*every, 1))**(1 / 16))
    for peer, points in peers.items():
        axis.plot(*zip(*points), color=COLOURS[peer], lw=2.2, marker="o", ms=4)
        axis.annotate(peer.replace("_", " "), (points[-1][0], labels[peer]), xytext=(8, 0),
                      textcoords="offset points", color=COLOURS[peer], va="center")
    axis.axhline(1, color=GREY, lw=1, ls=":")
    axis.set(xscale="log", yscale="log", xlabel="elements",
             title=f"{ours[0]['op']}: how many times as long as {backend} a peer takes")
    axis.xaxis.set_major_locator(FixedLocator([r["elements"] for r in ours]))
    axis.xaxis.set_major_formatter(FuncFormatter(_power))
    axis.yaxis.set_major_locator(FixedLocator([.125, .25, .5, 1, 2, 4, 8, 16, 32, 64]))
    axis.yaxis.set_major_formatter(FuncFormatter(_factor))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    return _save(figure, file)


@_styled
def samplers(file, rows):
    """A line a loop: our ms a step and diffusers', joined; the factor between them."""
    ours = [r for r in rows if r["backend"] != "diffusers" and r["speedup"].get("diffusers")]
    figure, axis = plt.subplots(figsize=(7.2, .8 + .3 * len(ours)))
    for y, r in enumerate(reversed(ours)):
        here, over = r["seconds"] * 1e3, r["speedup"]["diffusers"]
        axis.plot([here, here * over], [y, y], color=GREY, lw=1.5, zorder=1)
        axis.scatter([here], [y], color=COLOURS["torch_eager"], s=40, zorder=2)
        axis.scatter([here * over], [y], color=COLOURS["torch_inplace"], s=40, zorder=2)
        axis.annotate(f"{over:.1f}x", (max(here, here * over), y), xytext=(8, 0),
                      textcoords="offset points", va="center")
    axis.set_yticks(range(len(ours)), [f"{r['op'].replace('_', ' ')}, {r['network']}, "
                                       f"{'x'.join(map(str, r['shape']))}"
                                       + (", graph" if r["backend"].endswith("_graph") else "")
                                       for r in reversed(ours)])
    axis.set(xscale="log", xlabel="ms a step")
    axis.margins(x=.12)
    axis.set_title("minidiff", color=COLOURS["torch_eager"], loc="left")
    axis.set_title("diffusers", color=COLOURS["torch_inplace"], loc="right")
    return _save(figure, file)


def draw(folder, rows):
    """Both figures of one machine's rows into folder; those whose rows are there."""
    where = "cpu" if rows[0]["machine"]["gpu"] == "none" else "gpu"
    form, files = main_rows(rows), []
    best = min((r for r in form if r["speedup"]), key=lambda r: r["seconds"] / r["elements"],
               default=None)
    if best and len({r["elements"] for r in form}) > 1:
        files.append(speedups(folder / f"speedup-{where}.png", form, best["backend"]))
    if any(r["kind"] == "sampler" and r["speedup"] for r in rows):
        files.append(samplers(folder / f"samplers-{where}.png",
                              [r for r in rows if r["kind"] == "sampler" and r["seconds"]]))
    return files
