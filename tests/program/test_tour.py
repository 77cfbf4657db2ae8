"""The tour: each picture shows what its caption says, read off the figure itself."""

import ast
import inspect
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from minidiff import kernels, plot, samplers, score_matching, sde, tour
from minidiff.__main__ import main
from minidiff.noise import PERTURBATION, normal
from minidiff.targets import Mixture


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plot.plt.close("all")


def lines(axis):
    return {line.get_label(): line.get_xydata() for line in axis.lines}


def test_every_picture_is_written_with_its_caption(tmp_path, capsys):
    assert main(["tour", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name, make in tour.FIGURES.items():
        with Image.open(tmp_path / "new" / name) as picture:
            assert min(picture.size) >= 300
            if name.endswith(".gif"):
                assert picture.n_frames > 50
            else:
                assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert " ".join(make.__doc__.split()) in words and name in out
    assert len(tour.FIGURES) == 10 and "10 pictures in" in out


def statements(f):
    """Simple statements of a function, its docstring apart."""
    nodes = ast.walk(ast.parse(inspect.getsource(f)))
    return sum(isinstance(node, ast.stmt) for node in nodes) - 2


def test_a_figure_is_some_twenty_statements():
    for make in tour.FIGURES.values():
        assert 5 < statements(make) <= 24, (make.__name__, statements(make))


def test_another_seed_is_another_picture_and_the_same_is_the_same():
    a, b, other = (tour.score_field(seed).axes[0].lines[0].get_ydata() for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != other).all()


def test_arrows_are_the_score_and_paths_go_to_where_the_density_is():
    for axis, sigma in zip(tour.score_field().axes, (.1, .4, 1.2)):
        noised = tour.THREE.noised(1, sigma)
        arrows, = (c for c in axis.collections if hasattr(c, "U"))
        at = np.column_stack((arrows.X, arrows.Y))
        s = noised.score(at)
        drawn = np.column_stack((arrows.U, arrows.V))
        length = np.linalg.norm(s, axis=1, keepdims=True)
        np.testing.assert_allclose(drawn, s / length**.5, rtol=1e-12)
        assert arrows.scale == 75 and str(sigma) in axis.get_title()
        paths = np.stack([line.get_xydata() for line in axis.lines[:-1]])
        first, last = (noised.log_density(paths[:, k]).mean() for k in (0, -1))
        assert paths.shape == (5, 121, 2) and (last > first or sigma > 1)
        shown = axis.images[0].get_array()
        row, column = np.unravel_index(shown.argmax(), shown.shape)
        peak = np.linspace(-3.2, 3.2, 160)[[column, row]]
        assert noised.log_density(peak) == pytest.approx(np.log(shown.max()))


def test_langevin_keeps_its_weights_and_annealed_langevin_finds_the_datas():
    """Of 2,000 points a weight of .2 is right to 6 sqrt(.2 .8 / 2000) = .054, one of .5 to .067."""
    axes = tour.langevin_weights().axes
    names, left = zip(*(axis.get_title().split(":") for axis in axes))
    assert names == ("start", "Langevin", "annealed Langevin", "data")
    assert [float(text.split()[0]) for text in left] == pytest.approx([.5, .5, .2, .2], abs=.067)
    for axis, text in zip(axes, left):
        points, = axis.collections
        x, colors = points.get_offsets(), points.get_facecolors()
        on_the_left = (colors == to_rgba(tour.ORANGE)).all(1)
        np.testing.assert_array_equal(on_the_left, x.sum(1) < 0)
        assert round(on_the_left.mean(), 2) == float(text.split()[0])


def test_four_objectives_have_one_minimum_and_differ_as_the_caption_says():
    figure = tour.four_losses()
    curves = {label.split(":")[0]: xy for label, xy in lines(figure.axes[1]).items()
              if label[0] != "_"}
    assert list(curves) == ["explicit", "implicit", "sliced", "denoising"]
    for xy in curves.values():
        assert abs(xy[xy[:, 1].argmin(), 0] - 1) <= .021  # one step of the grid
        assert xy[:, 1].min() == 0
    # the terms' std at .6 is below 6 for implicit, 20 for sliced: what means over 20,000 miss
    for name, std in (("implicit", 6), ("sliced", 20)):
        assert abs(curves[name] - curves["explicit"])[:, 1].max() < 6 * std / 20000**.5


def test_denoising_is_the_explicit_objective_of_the_noisy_data_plus_a_constant():
    """Over the same noise; what differs is a mean of products of independent numbers, whose std
    here is below 3."""
    data, n, sigma = Mixture([.5, .5], [[-1., 0.], [1., 0.]], .25), 20000, .4
    x = data.sample(n, 0) + sigma * normal((n, 2), 0, tag=PERTURBATION)
    constant = tour.losses(1., data)["denoising"]
    for m in (.6, .8, 1.3):
        s = Mixture([.5, .5], [[-m, 0.], [m, 0.]], .25).noised(1, sigma).score(x)
        want = score_matching.explicit(s, data.noised(1, sigma).score(x))
        found = tour.losses(m, data)
        assert found["denoising"] - constant == pytest.approx(want, abs=6 * 3 / n**.5)
        assert found["denoising"] - constant < .7 * found["explicit"]  # another curve


def test_the_forward_chain_ends_in_noise_and_the_backward_chain_in_the_data():
    axes = tour.ddpm_there_and_back().axes
    clouds = [np.asarray(axis.collections[0].get_offsets()) for axis in axes]
    there, back = clouds[:6], clouds[6:]
    steps = [int(axis.get_title().split()[1]) for axis in axes[:6]]
    assert steps == [0, 60, 150, 300, 500, 1000]
    assert [axis.get_title() for axis in axes[6:]] == [f"{i} steps to go" for i in steps]
    # 800 points of variance v each: v to 6 v sqrt(2 / 800) = .3 v
    shares = np.append(1., np.cumprod(1 - np.linspace(1e-4, .02, 1000)))[steps]
    moons = there[0].var(0)
    for clouds in (there, back):
        for x, share in zip(clouds, shares):
            np.testing.assert_allclose(x.var(0), share * moons + 1 - share, rtol=.3)
    np.testing.assert_array_equal(back[-1], samplers.prior((800, 2)))


def test_the_processes_are_one_distribution_at_equal_noise_over_signal():
    figure = tour.processes()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["mean: a", "spread: sigma", "std, data of std 1", "noise over signal"]
    a, sigma, std, ratio = (lines(axis) for axis in figure.axes)
    assert list(a) == ["VE", "VP", "SubVP", "FlowMatching"]
    for kind in (sde.VE(), sde.VP(), sde.SubVP(), sde.FlowMatching()):
        name = type(kind).__name__
        t = a[name][:, 0]
        np.testing.assert_array_equal(a[name][:, 1], kind.marginal(t)[0])
        np.testing.assert_array_equal(sigma[name][:, 1], kind.marginal(t)[1])
        np.testing.assert_array_equal(ratio[name][:, 1], sigma[name][:, 1] / a[name][:, 1])
    np.testing.assert_allclose(std["VP"][:, 1], 1)
    assert (std["SubVP"][:, 1] <= 1).all() and std["VE"][-1, 1] > 50


def test_the_reversals_run_over_the_density_of_their_time():
    axes = tour.reversal().axes
    assert [axis.get_title() for axis in axes] == ["reverse SDE", "probability flow"]
    starts = [[line.get_ydata()[0] for line in axis.lines] for axis in axes]
    assert starts[0] == starts[1] and len(starts[0]) == 8
    times = np.linspace(1, 1e-3, 601)
    for axis in axes:
        shade = axis.collections[0].get_array().reshape(300, 601)
        for column in (0, 300, 600):
            p = np.exp(tour.LINE.noised(*sde.VP().marginal(times[column])).log_density(
                np.linspace(-3, 3, 300)[:, None]))
            np.testing.assert_allclose(shade[:, column], (p / p.max())**.6, rtol=1e-10)
        for line in axis.lines:
            np.testing.assert_array_equal(line.get_xdata(), times)
            end = line.get_ydata()[-1]
            assert min(abs(end + 1.4), abs(end - 1)) < 6 * .17  # the modes' std
        assert axis.get_xlim()[0] > axis.get_xlim()[1]  # noise on the left
    shaken, smooth = (np.abs(np.diff(axis.lines[0].get_ydata(), 2)).max() for axis in axes)
    assert shaken > 100 * smooth


def test_every_solver_that_states_an_order_is_drawn_and_has_it():
    """On Gaussian data, without noise: the slope itself is to .06, as in the oracles' tests."""
    axis = tour.orders().axes[0]
    marked = [line for line in axis.lines if line.get_label()[0] != "_"]
    stated = [line for line in axis.lines if line.get_label()[0] == "_"]
    steps = {f"{op.step.__module__[9:]}.{op.step.__name__}": op.step
             for op in kernels.OPS.values() if hasattr(op.step, "order")}
    assert {line.get_label().split(":")[0] for line in marked} == set(steps)
    assert len({line.get_color() for line in marked}) == len(marked) == len(stated)
    for line, grey in zip(marked, stated):
        name, said = line.get_label().split(": ")
        order, measured = map(float, re.fullmatch(r"states (\d), measured (.*)", said).groups())
        assert order == steps[name].order == pytest.approx(measured, abs=.06)
        n, errors = line.get_xydata()[1:].T
        assert -np.polyfit(np.log(n), np.log(errors), 1)[0] == pytest.approx(measured, abs=.005)
        n, errors = grey.get_xydata().T
        assert -np.polyfit(np.log(n), np.log(errors), 1)[0] == pytest.approx(order)


def test_the_flow_ends_in_the_mixture_over_its_own_density():
    moving = tour.flow()
    axis, = moving._fig.axes
    for k, t in ((0, 1.), (40, (1 / 3)**2), (60, 0.), (75, 0.)):
        moving._func(k)
        assert axis.get_title() == f"t = {t:.3f}"
        shown = axis.images[0].get_array()
        noised = tour.THREE.noised(*sde.VP().marginal(t))
        np.testing.assert_allclose(
            shown, np.exp(noised.log_density(tour.points_of_a_square(2.6, 160))), rtol=1e-9)
    x = np.asarray(axis.collections[0].get_offsets())
    nearest = ((x[:, None] - tour.THREE.means)**2).sum(-1).argmin(1)
    # 700 points: a weight of .5 to 6 sqrt(.25 / 700) = .11
    weights = np.bincount(nearest, minlength=3) / len(x)
    np.testing.assert_allclose(weights, tour.THREE.weights, atol=.115)
    moving._draw_was_started = True  # it was looked at, frame by frame


def test_guided_samples_keep_off_the_other_class():
    """At w = 1 they are the class: half at either mode, with its variances. Beyond, their mean
    leaves it, away from the third mode, and they vary less along that line."""
    at_1, at_3 = (np.asarray(axis.collections[0].get_offsets())
                  for axis in tour.guidance().axes[2:])
    for x in (at_1, at_3):
        assert x.shape == (1500, 2)
    # 1,500 points: a half is right to 6 sqrt(.25 / 1500) = .077, a mean to 6 std / sqrt(n)
    nearest = ((at_1[:, None] - tour.ALL.means)**2).sum(-1).argmin(1)
    assert abs((at_1[:, 0] < -.6).mean() - .5) < .077 and (nearest == 2).mean() < .05
    away = tour.CLASS.means.mean(0) - tour.ALL.means[2]
    away /= np.linalg.norm(away)
    mean, std = at_1.mean(0) @ away, (at_1 @ away).std()
    exact = tour.CLASS.means @ away
    assert abs(mean - exact.mean()) < 6 * std / 1500**.5
    assert abs(std - (.15 + exact.var())**.5) < .1 * std
    assert at_3.mean(0) @ away > mean + .2 and (at_3 @ away).std() < .9 * std
    nearest = ((at_3[:, None] - tour.ALL.means)**2).sum(-1).argmin(1)
    assert (nearest != 2).all()


def test_the_guided_arrows_go_on_from_the_classes():
    """Both pictures have the arrows that they name, at the same points."""
    of_class, of_guided = (axis.collections[0] for axis in tour.guidance().axes[:2])
    at = np.stack((of_class.X, of_class.Y), -1)
    s, s_y = (data.noised(1, .5).score(at) for data in (tour.ALL, tour.CLASS))
    for arrows, shown in ((of_class, s_y), (of_guided, 3 * s_y - 2 * s)):
        u = np.stack((arrows.U, arrows.V), -1)
        length = np.linalg.norm(u, axis=-1, keepdims=True)
        np.testing.assert_allclose(u * length, shown, rtol=1e-9)


def test_paths_of_pairs_are_straight_in_flow_matching_and_curved_in_vp():
    """Seven black paths of pairs, seven orange ones of the flow, from the same starts. No path
    of a flow crosses another, as pairs do, and all bend."""
    *panels, _ = tour.straight_and_curved().axes
    bends = {}
    for axis in panels:
        t = axis.lines[0].get_xdata()
        assert len(axis.lines) == 14
        for name, own in (("pair", axis.lines[:7]), ("flow", axis.lines[7:])):
            x = np.array([line.get_ydata() for line in own])
            chord = x[:, :1] + (x[:, -1:] - x[:, :1]) * (t - t[0]) / (t[-1] - t[0])
            bends[axis.get_title(), name] = abs(x - chord).max(1)
            order = np.argsort(x[:, 0])
            crossed = (np.diff(x[order], axis=0) < 0).any()
            assert crossed == (name == "pair")
        # a flow starts as its pair does, but for the share of x0 that is left
        pairs, flows = ([line.get_ydata()[0] for line in own]
                        for own in (axis.lines[:7], axis.lines[7:]))
        np.testing.assert_allclose(flows, pairs, rtol=0, atol=.02)
    assert bends["flow matching", "pair"].max() < 1e-12 < .1 < bends["VP", "pair"].min()
    assert (bends["flow matching", "flow"] > .02).all()


@pytest.mark.parametrize("process, unsteady", [(sde.VP(), .95), (sde.FlowMatching(), .56)])
def test_flow_matchings_velocity_is_steadier(process, unsteady):
    """The mean square of a path's velocity less its chord's [Liu et al. 2023, their S], over
    2,000 starts; a time from 0 to 1."""
    x = process.prior_std * samplers.prior((2000, 1)).astype(float)
    score = tour.score_by_time(tour.LINE, process)
    path = np.stack([x, *samplers.pf_ode(score, x, process, 1000, samplers.Reference())])
    velocity = np.diff(path, axis=0) * 1000
    chord = path[-1] - path[0]
    assert ((velocity - chord)**2).mean() == pytest.approx(unsteady, abs=.02)


def test_few_even_steps_end_nearer_on_straighter_paths():
    """As the caption says: half as far off with four steps, no nearer with 16. Both errors are
    distances from the one flow's end, and fall as 1 / steps."""
    axis = tour.straight_and_curved().axes[2]
    far = lines(axis)
    vp, flow = far["VP"], far["flow matching"]
    assert list(vp[:, 0]) == [4, 8, 16, 32, 64, 128]
    assert flow[0, 1] < .6 * vp[0, 1]
    assert (abs(np.log(flow[1:, 1] / vp[1:, 1])) < .2).all()
    for errors in (vp, flow):
        assert errors[-1, 1] < errors[2, 1] / 5 and errors[-1, 1] < .006


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        assert main(["tour", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"minidiff tour: --out {out}") and said.count("\n") == 1
