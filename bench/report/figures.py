"""Two figures of the rows: speedup against size; whole samplers. Read on light and on
dark."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from ...files import whole  # noqa: E402
from ..speed.rows import main_rows, size  # noqa: E402

GREY = "#808080"  # 4 : 1 on white as on a near-black page
COLOURS = {"torch_eager": "#3d85c6", "torch_inplace": "#d9822b", "torch_compile": "#4ca64c",
           "numpy_rng": "#a56cc1", "cupy_expr": "#d1495b", "curand": "#5b8c8c",
           "diffusers": "#b08d2e", "mkl": "#2f9e9e", "mkl_philox": "#8a6d5b",
           "jax": "#c05fa0", "torch_random": "#6f8f3a"}
OURS, THEIRS = COLOURS["torch_eager"], COLOURS["torch_inplace"]
BESIDE = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
STYLE = {"text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY,
         "ytick.color": GREY, "font.size": 11, "axes.spines.top": False,
         "axes.spines.right": False}


def _save(figure, file):
    with whole(file) as part:
        figure.savefig(part, dpi=120, bbox_inches="tight", transparent=True)
    plt.close(figure)
    return file


@plt.rc_context(STYLE)
def speedups(file, rows, backend):
    """A line a peer: how many times longer it takes than our backend, against elements."""
    ours = [r for r in rows if r["backend"] == backend and r["speedup"] and not r["again"]]
    peers, between = {}, {}
    for r in ours:
        for peer, factor in r["speedup"].items():
            peers.setdefault(peer, []).append((r["elements"], factor))
            low, high = r["interval"].get(peer) or (factor, factor)
            between.setdefault(peer, []).append((r["elements"], low, high))
    every = [factor for r in ours for factor in r["speedup"].values()]
    gap = (max(*every, 2) / min(*every, 1))**(1 / 16)
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    height = 0.
    for peer, points in sorted(peers.items(), key=lambda item: item[1][-1][1]):
        last, factor = points[-1]
        height = max(factor, height * gap)  # a label stands clear of the one below
        axis.plot(*zip(*points), color=COLOURS[peer], lw=2.2, marker="o", ms=4)
        axis.fill_between(*zip(*between[peer]), color=COLOURS[peer], alpha=.25, lw=0)
        axis.annotate(peer.replace("_", " "), (last, height), color=COLOURS[peer], **BESIDE)
    axis.axhline(1, color=GREY, lw=1, ls=":")
    axis.set(xscale="log", xlabel="elements",
             title=f"{ours[0]['op'].capitalize()} update: a peer's time divided by ours, "
                   "95 % intervals")
    sizes = [r["elements"] for r in ours]
    axis.set_xticks(sizes, [f"$2^{{{n.bit_length() - 1}}}$" for n in sizes])
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.minorticks_off()
    return _save(figure, file)


@plt.rc_context(STYLE)
def samplers(file, ours):
    """A line a loop: our ms a step and diffusers', joined; the factor between them."""
    figure, axis = plt.subplots(figsize=(7.2, .8 + .3 * len(ours)))
    names = []
    for y, r in enumerate(reversed(ours)):
        here, factor = r["seconds"] * 1e3, r["speedup"]["diffusers"]
        there = here * factor
        axis.plot([here, there], [y, y], color=GREY, lw=1.5, zorder=1)
        axis.scatter([here, there], [y, y], color=[OURS, THEIRS], s=40, zorder=2)
        axis.annotate(f"{factor:.1f}x", (max(here, there), y), **BESIDE)
        graph = ", graph" * r["backend"].endswith("_graph")
        names.append(f"{r['op'].replace('_', ' ')}, {r['network']}, {size(r)}{graph}")
    axis.set_yticks(range(len(ours)), names)
    axis.set(xscale="log", xlabel="ms a step")
    axis.margins(x=.12)
    axis.set_title("minidiff", color=OURS, loc="left")
    axis.set_title("diffusers", color=THEIRS, loc="right")
    return _save(figure, file)


def draw(folder, rows):
    """Both figures of one machine's rows into folder; those whose rows are there."""
    where = "cpu" if rows[0]["machine"]["gpu"] == "none" else "gpu"
    main, files = main_rows(rows), []
    raced = [r for r in main if r["speedup"]]
    if raced and len({r["elements"] for r in main}) > 1:
        best = min(raced, key=lambda r: r["seconds"] / r["elements"])
        files.append(speedups(folder / f"speedup-{where}.png", main, best["backend"]))
    loops = [r for r in rows if r["kind"] == "sampler" and r["speedup"]]
    if loops:
        files.append(samplers(folder / f"samplers-{where}.png", loops))
    return files
