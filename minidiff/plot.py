"""The demo's pictures: samples, a trajectory, quality against its costs, the loss."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from .files import whole  # noqa: E402

FLOWS = "ddim", "pf_ode", "flow_matching", "heun", "dpmpp_2m", "pf_ode_adaptive"
# colours that a colour-blind reader tells apart
OKABE_ITO = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "black"
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=OKABE_ITO)
MARKERS = "os^Dvp*"
GREY = plt.get_cmap("gray_r").with_extremes(bad=OKABE_ITO[5])  # bad: NaN, what is covered
CAPTION = """ddim, pf ode, pf ode adaptive, flow matching, heun and dpmpp 2m show nearly
the same samples: from one noise all follow one map to the data, the probability flow."""
TICKS = 10, 20, 40, 80  # evaluations


def _write(file, figure, **options):
    """Write a figure as PNG, whole or not at all, and forget it."""
    with whole(file) as part:
        figure.savefig(part, dpi=120, facecolor="white", **options)
    plt.close(figure)


def _images(axis, x, title):
    """A row of images, side by side with a gap."""
    grey = x[:, 0] if x.shape[1] == 1 else x.mean(1)
    gap = (1, 1)
    framed = np.pad(grey, ((0, 0), gap, gap), constant_values=-1.)
    strip = np.concatenate(list(framed), 1)
    axis.imshow(strip, cmap=GREY, vmin=-1, vmax=1, interpolation="nearest")
    axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9,
                    parse_math=False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _points(axis, x, title):
    """A scatter plot of the first two coordinates of points, (n, D)."""
    axis.scatter(x[:, 0], x[:, 1], s=2, color="black", linewidths=0)
    limits = (-1.3, 1.3)
    axis.set(xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=9, parse_math=False)


def _name(family):
    """A family's name in words."""
    return family.replace("_", " ")


def _image_rows(rows, columns):
    """A figure with a row of images for each name, white where there are too few."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, .62 * len(rows)))
    for axis, (name, x) in zip(axes, rows.items()):
        row = np.full((columns, *x.shape[1:]), -1.)
        row[:len(x)] = x[:columns]
        _images(axis, np.clip(row, -1, 1), _name(name))
    return figure


def _scatter_plots(rows, trajectory):
    """A figure with a scatter plot for each name, and the trajectory over the data."""
    rows = {**rows, "one trajectory": rows["data"]}
    down = 3 if len(rows) < 22 else 4
    across = -(-len(rows) // down)
    figure, axes = plt.subplots(down, across, figsize=(2.6 * across, 2.7 * down))
    for axis, (name, x) in zip(axes.flat, rows.items()):
        _points(axis, x, _name(name))
    last = axes.flat[len(rows) - 1]
    last.plot(trajectory[:, 0], trajectory[:, 1], color=OKABE_ITO[1], lw=1)
    for unused in axes.flat[len(rows):]:
        unused.axis("off")
    return figure


def picture(file, data, samples, trajectory, columns=16):
    """Write a PNG of held-out data, samples and one trajectory from noise to data.

    samples: {family or class: (n, *shape)}; trajectory: the states of one sample,
    (k, *shape). CAPTION stands below.
    """
    rows = {"data": data.held, **samples}
    if len(data.shape) == 3:
        last = len(trajectory) - 1
        moments = np.linspace(.3 * last, last, columns)  # before that there is only noise
        rows["one trajectory"] = trajectory[moments.round().astype(int)]
        figure = _image_rows(rows, columns)
    else:
        figure = _scatter_plots(rows, trajectory)
    figure.tight_layout(pad=.4, h_pad=.8)
    figure.supxlabel(CAPTION, y=0, va="top", fontsize=9)
    _write(file, figure, bbox_inches="tight")


def completions(file, rows, columns=16):
    """Write a PNG of images that are covered, and completed in several ways.

    rows: {what: (n, *shape)}, NaN where an image is covered.
    """
    figure = _image_rows(rows, columns)
    figure.tight_layout(pad=.4, h_pad=.8)
    _write(file, figure, bbox_inches="tight")


def _panel(family):
    """The title of the panel that a family's curve stands in."""
    if family in FLOWS:
        return "probability flow"
    if family.startswith("reverse"):
        return "reverse SDE"
    return "ancestral, Langevin, corrected"


def _curve(axis, rows, color, marker):
    """One family's accuracy against its evaluations, with error bars."""
    rows = sorted(rows)
    evaluations = [row.evaluations for row in rows]
    accuracy = [row.quality.accuracy for row in rows]
    error = [row.quality.error for row in rows]
    axis.errorbar(evaluations, accuracy, error, color=color, marker=marker, ms=4,
                  lw=1.2, label=_name(rows[0].family))


def curves(file, rows, best):
    """Write a PNG of SVM accuracy against network evaluations, a curve a family.

    rows: `demo.Measured`; best: the accuracy of real data. The ground is white, so that a
    dark page shows the figure too.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True)
    families = dict.fromkeys(row.family for row in rows)
    panels = dict.fromkeys(("probability flow", *map(_panel, families)))
    for axis, title in zip(axes, panels):
        shown = [family for family in families if _panel(family) == title]
        for color, marker, family in zip(OKABE_ITO, MARKERS, shown, strict=False):
            of_family = [row for row in rows if row.family == family]
            _curve(axis, of_family, color, marker)
        axis.axhline(best, color="gray", lw=1, ls="--")
        axis.set(xscale="log", xlabel="evaluations of the network", title=title,
                 ylim=(.45, 1.02))
        axis.set_xticks(TICKS, map(str, TICKS))
        axis.minorticks_off()
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(.5, -.16))
    axes[0].set_ylabel("SVM accuracy (dashed: real data)")
    figure.tight_layout()
    _write(file, figure)


def training(file, points, real):
    """Write a PNG of quality against what training cost: iterations below, time above.

    points: `demo.Trained`; real: the `quality.Quality` of real data, drawn dashed.
    """
    labelled = real.clear is not None
    figure, axes = plt.subplots(1, 1 + labelled, figsize=(6 + 3 * labelled, 4),
                                squeeze=False)
    panels = [("SVM accuracy", "accuracy", "error")]
    if labelled:
        panels.append(("clear class", "clear", "clear_error"))
    iterations = [point.iterations for point in points]
    for axis, (label, figure_of, error_of) in zip(axes.flat, panels):
        values = [getattr(point.quality, figure_of) for point in points]
        errors = [getattr(point.quality, error_of) for point in points]
        axis.errorbar(iterations, values, errors, marker="o", ms=4, lw=1.2)
        axis.axhline(getattr(real, figure_of), color="gray", lw=1, ls="--")
        axis.set(xscale="log", xlabel="training iterations",
                 ylabel=f"{label} (dashed: real data)")
        axis.set_xticks(iterations, map(str, iterations))
        axis.minorticks_off()
        above = axis.secondary_xaxis("top")
        above.set_xticks(iterations, [f"{point.seconds:.0f} s" for point in points])
        above.minorticks_off()
    figure.suptitle("one training on its way: its learning rate falls to 0 at the end",
                    fontsize=9)
    figure.tight_layout()
    _write(file, figure)


def loss_levels(file, rows):
    """Write a PNG of a network's loss by noise level, and of the exact score's.

    rows: as `demo.losses` returns them.
    """
    sigma, loss, floor, left = zip(*rows)
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(sigma, loss, "o-", label="the trained network")
    axis.plot(sigma, floor, "--", label="the exact score: the floor of any network's")
    axis.plot(sigma, left, ".-", label="what is left between them")
    axis.set(xscale="log", yscale="log", xlabel="noise level sigma", ylabel="loss")
    axis.legend()
    figure.tight_layout()
    _write(file, figure)
