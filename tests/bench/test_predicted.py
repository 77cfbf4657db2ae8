"""What is predicted of a GPU's kernels, held to what an H100 and an H200 took."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minidiff.__main__ import main
from minidiff.bench.device import compiled, predicted
from minidiff.bench.report.results import RESULTS
from minidiff.kernels import OPS

needs = pytest.mark.skipif(compiled.why_not("cupy") is not None, reason="no NVRTC")


def test_every_row_and_sum_is_predicted():
    assert set(predicted.KERNELS) == {*OPS, "norms", "noise_norms", "dsm_loss", "corrector"}
    arrays = {op: sum(kernel.arrays for kernel in kernels)
              for op, kernels in predicted.KERNELS.items()}
    assert arrays["normal"] == 1 and arrays["langevin"] == 3 and arrays["dpmpp_2m"] == 5
    assert arrays["noise_norms"] == 0 and arrays["dsm_loss"] == 2 and arrays["corrector"] == 4


@pytest.mark.parametrize("card", predicted.CARDS.values(), ids=predicted.CARDS)
def test_a_cards_figures_are_of_one_kind(card):
    """A card issues 128 slots a multiprocessor and clock: so its published operations a second
    are a clock and a number of multiprocessors that there are."""
    clocks = {"A100": 1.41, "H100": 1.98, "H200": 1.98, "B200": 1.98, "RTX5090": 2.407}
    many = {"A100": 108, "H100": 132, "H200": 132, "B200": 148, "RTX5090": 170}
    name, = (name for name, other in predicted.CARDS.items() if other == card)
    assert card.slots == pytest.approx(many[name] * 128 * clocks[name] * 1e9, rel=.01)
    # a memory's pins and their rate, Gbit/s
    bits = {"A100": (5120, 3.19), "H100": (5120, 5.23), "H200": (6144, 6.25),
            "B200": (8192, 7.8), "RTX5090": (512, 28.)}
    pins, rate = bits[name]
    assert card.giga == pytest.approx(pins / 8 * rate, rel=.01)


@pytest.mark.parametrize("code, floats, integers, slots", [
    (["FFMA R1, R2, R3, R4", "MUFU.RSQ R1, R2", "LDG.E.128 R1"], 1, 2, 3),
    (["LOP3.LUT R1", "@P0 IADD3 R1", "@!UP1 FFMA R1"], 1, 2, 4),
    (["LOP3.LUT R1", "IADD3 R1", "FFMA R1"], 1, 1, 3),
    (["FFMA2 R1", "IMAD.WIDE.U32 R1", "FADD R1", "LOP3 R1"], 2, 2, 8)])
def test_slots_are_those_of_the_longer_pipe(code, floats, integers, slots):
    assert compiled.slots(code, floats, integers) == slots


def measured(file):
    """Rows of our backends that are long enough that a launch does not count, and of updates:
    for a sum the host launches several kernels, and it was the host that was timed."""
    found = json.loads((RESULTS / "device" / file).read_text())
    if isinstance(found, dict):
        found = [row for part in found["parts"].values() for row in part.get("rows", ())]
    return [r for r in found if r["seconds"] and r["backend"] in predicted.ISSUE
            and r["elements"] >= 1 << 26 and r["shape"][-1] == predicted.WIDTH and r["op"] in OPS
            and not r.get("again")]


# ddpm_clipped had 12 warps a multiprocessor on the H200; it has 16 since, and took 192 us
BEFORE = "ddpm_clipped"
MEASURED = [("H100", "2026-11-27-h100-0.3.0-speed.json"),
            ("H200", "2026-11-27-h200-0.2.0-speed.json")]


@pytest.fixture(scope="module", params=MEASURED, ids=lambda given: given[0])
def both(request, tmp_path_factory):
    """Rows of a card: predicted, as they were kept of this Triton, and measured. Triton compiles
    outside of its interpreter: in another process."""
    card, file = request.param
    out = tmp_path_factory.mktemp("info") / f"{card}.json"
    run = subprocess.run(
        [sys.executable, "-m", "minidiff", "info", "--kernels", card, "--json", str(out)],
        env=os.environ | {"TRITON_INTERPRET": "0"}, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    found, lines = json.loads(out.read_text()), run.stdout.splitlines()
    assert found["card"] == card and found["machine"]["minidiff"]
    assert len(lines) == 4 + 2 * len(predicted.KERNELS) and "as published" in lines[0]
    kept = json.loads((RESULTS / "device" / f"predicted-{card.lower()}.json").read_text())
    rows, before = (
        {(r["op"], r["dtype"], r["backend"]): r for r in of["rows"]} for of in (found, kept))
    if found["machine"]["triton"] != kept["machine"]["triton"]:
        before = None  # another compiler's
    assert len(rows) == 2 * len(predicted.ISSUE) * len(predicted.KERNELS)
    return rows, before, measured(file)


@needs
@pytest.mark.parametrize("backend, error", [("triton", .09), ("cupy", .19)])
def test_a_gpu_took_what_is_predicted(both, backend, error):
    """CUDA C takes longer where bytes and slots are near each other: there they do not hide each
    other wholly."""
    found, _, rows = both
    rows = [r for r in rows if r["backend"] == backend and not (
        r["op"] == BEFORE and r["machine"]["gpu"] == "NVIDIA H200")]
    assert len(rows) >= 10
    for r in rows:
        prediction = found[r["op"], r["dtype"], backend]
        seconds = prediction["seconds"] * r["elements"] / prediction["elements"]
        assert seconds == pytest.approx(r["seconds"], rel=error), (r["op"], r["dtype"], seconds)


@needs
def test_what_limits_a_row(both):
    """Bytes, where there are many; the noise itself is made as fast as slots are issued."""
    found, *_ = both
    for backend in predicted.ISSUE:
        assert found["dpmpp_2m", "float32", backend]["limit"] == "memory"
        assert found["langevin", "float32", backend]["limit"] == "memory"
        assert found["normal", "float32", backend]["limit"] == "issue"


@needs
def test_the_predictions_that_are_kept_are_these_kernels(both):
    """But for what another NVRTC makes of them. After a change of a kernel: info --kernels CARD
    --json bench/results/device/predicted-CARD.json."""
    found, kept, _ = both
    if kept is None:
        pytest.skip("they are another Triton's")
    assert found.keys() == kept.keys()
    for key, row in found.items():
        assert row["seconds"] == pytest.approx(kept[key]["seconds"], rel=.08), key
        assert row["bytes"] == kept[key]["bytes"], key


@needs
@pytest.mark.parametrize("before", [None, SimpleNamespace()])
def test_triton_asks_another_driver_meanwhile(monkeypatch, before):
    """And afterwards the one that was there, or none, where there is no GPU."""
    driver = pytest.importorskip("triton.runtime").driver
    monkeypatch.setattr(driver, "_active", before)
    with compiled.target(100):
        target = driver.active.get_current_target()
        assert (target.backend, target.arch) == ("cuda", 100)
        assert driver.active.get_current_device() == 100
    assert driver._active is before


@pytest.mark.parametrize("given, said", [
    (["H200", "--backend", "numpy"], "--backend: kernels of a GPU are those of triton and cupy"),
    (["X"], "--kernels: X is not known: name one of A100, H100, H200, B200, RTX5090"),
    ([], "--kernels: no GPU is here: name one of A100, H100, H200, B200, RTX5090")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_known(given, said, capsys):
    assert main(["info", "--kernels", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(compiled.why_not("triton") is None, reason="Triton compiles here")
def test_what_cannot_be_compiled_is_said(capsys, tmp_path):
    """Alone it is an error, and no file is written."""
    out = tmp_path / "rows.json"
    assert main(["info", "--kernels", "a100", "--backend", "triton", "--json", str(out)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("minidiff info: triton: ") and not out.exists()
