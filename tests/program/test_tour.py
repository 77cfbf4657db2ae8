"""The tour: each picture shows what its caption says, read off the figure itself."""

import inspect

import numpy as np
import pytest
from PIL import Image

from minidiff import kernels, plot, tour
from minidiff.__main__ import main
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
    assert len(tour.FIGURES) == 8 and "8 pictures in" in out


def test_a_figure_is_some_twenty_statements():
    for make in tour.FIGURES.values():
        body = inspect.getsource(make).split('"""', 2)[2]
        assert len(body.split("\n")) <= 34, make.__name__


def test_another_seed_is_another_picture_and_the_same_is_the_same():
    a, b, other = (tour.score_field(seed).axes[0].lines[0].get_ydata() for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != other).all()


def test_langevin_keeps_its_weights_and_annealed_langevin_finds_the_datas():
    """Of 2,000 points a weight of .2 is right to 6 sqrt(.2 .8 / 2000) = .054, one of .5 to .067."""
    left = [float(axis.get_title().split(":")[1].split()[0])
            for axis in tour.langevin_weights().axes]
    assert left == pytest.approx([.2, .5, .2], abs=.067)


def test_four_objectives_have_one_minimum_and_differ_by_constants():
    figure = tour.four_losses()
    curves = {label.split(":")[0]: xy for label, xy in lines(figure.axes[1]).items()
              if label[0] != "_"}
    assert list(curves) == ["explicit", "implicit", "sliced", "denoising"]
    for xy in curves.values():
        assert abs(xy[xy[:, 1].argmin(), 0] - 1) <= .021  # one step of the grid
        assert xy[:, 1].min() == 0
    # the same points, so that what a mean over them misses is small: at .6 the terms' std is
    # below 6 for implicit, 20 for sliced, 2^14 points and more
    for name, std in (("implicit", 6), ("sliced", 20)):
        assert abs(curves[name] - curves["explicit"])[:, 1].max() < 6 * std / 20000**.5


def test_the_objectives_of_the_tour_are_the_chapters():
    data = Mixture([.5, .5], [[-1., 0.], [1., 0.]], .25)
    found = tour.losses(1., data, n=1000)
    assert found["explicit"] == 0 and list(found) == ["explicit", "implicit", "sliced", "denoising"]


def test_the_forward_chain_ends_in_noise_and_the_backward_chain_in_the_data():
    axes = tour.ddpm_there_and_back().axes
    clouds = [np.asarray(axis.collections[0].get_offsets()) for axis in axes]
    there, back = clouds[:6], clouds[6:]
    for x in (there[-1], back[-1]):  # 800 points: std to 6 / sqrt(2 800) = .15, mean to .21
        assert abs(x.std(0) - 1).max() < .15 and abs(x.mean(0)).max() < .22
    # the moons' std is .99 and .52 here: back is where there began
    assert abs(back[0].std(0) - there[0].std(0)).max() < .15
    assert back[0].std(0)[1] < .7


def test_both_reversals_end_at_the_modes():
    for axis in tour.reversal().axes:
        ends = np.array([line.get_ydata()[-1] for line in axis.lines])
        assert len(ends) == 8
        # modes of std .17 at -1.4 and 1: six of them
        assert (np.minimum(abs(ends + 1.4), abs(ends - 1)) < 1.04).all()
    starts = [[line.get_ydata()[0] for line in axis.lines] for axis in tour.reversal().axes]
    assert starts[0] == starts[1]


def test_every_solver_that_states_an_order_is_drawn_and_has_it():
    """On Gaussian data, without noise: the slope itself is to .06, as in the oracles' tests."""
    found = [tour.solver_errors(n) for n in (128, 256, 512)]
    assert set(found[0]) == {op.step for op in kernels.OPS.values() if hasattr(op.step, "order")}
    for step in found[0]:
        errors = [errors_of[step] for errors_of in found]
        slope, _ = np.polyfit(np.log([128, 256, 512]), np.log(errors), 1)
        assert -slope == pytest.approx(step.order, abs=.06), step.__name__
    assert len(tour.orders().axes[0].get_legend().get_texts()) == len(found[0])


def test_the_processes_are_one_distribution_at_equal_noise_over_signal():
    a, sigma, ratio = (lines(axis) for axis in tour.processes().axes)
    assert list(a) == ["VE", "VP", "SubVP"]
    for name in a:
        np.testing.assert_array_equal(ratio[name][:, 1], sigma[name][:, 1] / a[name][:, 1])
    assert (a["VE"][:, 1] == 1).all() and sigma["VE"][-1, 1] == pytest.approx(50)
    assert (sigma["SubVP"][:, 1] <= sigma["VP"][:, 1]).all()
    np.testing.assert_allclose(a["VP"][:, 1]**2 + sigma["VP"][:, 1]**2, 1)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below", ""):
        assert main(["tour", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"minidiff tour: --out {out}") and said.count("\n") == 1
