"""The demo's pictures: samples of each family and one trajectory; quality against evaluations."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

FLOWS = "ddim", "pf_ode", "heun", "dpmpp_2m", "pf_ode_adaptive"
COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "black"  # Okabe-Ito


def _images(axis, x, title):
    """A row of images, side by side with a gap."""
    x = np.pad(x[:, 0] if x.shape[1] == 1 else x.mean(1), ((0, 0), (1, 1), (1, 1)),
               constant_values=-1.)
    axis.imshow(np.concatenate(list(x), 1), cmap="gray_r", vmin=-1, vmax=1,
                interpolation="nearest")
    axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _points(axis, x, title):
    axis.scatter(x[:, 0], x[:, 1], s=2, color="black", linewidths=0)
    axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=9)


def picture(file, data, samples, trajectory, columns=16):
    """Write a PNG. samples: {family: (n, *shape)}; trajectory: states of one family's first
    sample, noise to data, (k, *shape)."""
    rows = {"data": data.held, **samples}
    if len(data.shape) == 3:
        rows = {name: x[:columns] for name, x in rows.items()}
        last = len(trajectory) - 1
        pick = np.linspace(.3 * last, last, columns).round().astype(int)  # before: only noise
        rows["one trajectory"] = trajectory[pick]
        figure, axes = plt.subplots(len(rows), 1, figsize=(9, .62 * len(rows)))
        for axis, (name, x) in zip(axes, rows.items()):
            _images(axis, np.clip(x, -1, 1), name.replace("_", " "))
    else:
        across = -(-(len(rows) + 1) // 3)
        figure, axes = plt.subplots(3, across, figsize=(2.6 * across, 8))
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, x) in zip(axes.flat, rows.items()):
            axis.axis("on")
            _points(axis, x, name.replace("_", " "))
        axis = axes.flat[len(rows)]
        axis.axis("on")
        _points(axis, data.held, "one trajectory")
        axis.plot(trajectory[:, 0], trajectory[:, 1], color="tab:red", lw=1)
    figure.tight_layout(pad=.4)
    figure.savefig(file, dpi=120, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def curves(file, rows, best):
    """Write a PNG of SVM accuracy against network evaluations, log scale, a line a family, on
    white so that dark pages show it too; rows as `demo.measure`'s, best that of real data."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True)
    families = {f: "probability flow" if f in FLOWS else "reverse SDE" if f.startswith("reverse")
                else "ancestral, Langevin, corrected" for f, *_ in rows}
    for axis, title in zip(axes, dict.fromkeys(("probability flow", *families.values()))):
        shown = [f for f, group in families.items() if group == title]
        for color, marker, family in zip(COLORS, "os^Dvp*", shown, strict=False):
            _, n, _, accuracy, error, _ = zip(*sorted(r for r in rows if r[0] == family))
            axis.errorbar(n, accuracy, error, color=color, marker=marker, ms=4, lw=1.2,
                          label=family.replace("_", " "))
        axis.axhline(best, color="gray", lw=1, ls="--")
        axis.set(xscale="log", xlabel="evaluations of the network", title=title, ylim=(.45, 1.02))
        axis.set_xticks([10, 20, 40, 80], ["10", "20", "40", "80"], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(.5, -.16))
    axes[0].set_ylabel("SVM accuracy (dashed: real data)")
    figure.tight_layout()
    figure.savefig(file, dpi=120, facecolor="white")
    plt.close(figure)
