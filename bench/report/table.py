"""Tables of results, between two markers of a page, only ever written from files of rows."""

import os
from pathlib import Path
from statistics import median

from ...files import whole
from ..peers import PEERS
from ..speed.rows import is_ours, label, measured, size
from ..speed.state import warning
from .figures import draw
from .results import RESULTS, newest

START, END = "<!-- bench: start -->", "<!-- bench: end -->"
FIRST = "<!-- race: start -->", "<!-- race: end -->"  # of the project's own page
FIRST_OPS = {"cpu": ("normal", "langevin"), "gpu": ("normal", "langevin", "ddpm_clipped")}
FIRST_PEERS = "torch_eager", "torch_inplace", "torch_compile"


def _table(header, lines):
    """A table's Markdown, line by line."""
    for cells in (header, ["---"] * len(header), *lines):
        yield f"| {' | '.join(cells)} |"


def _times(row, peer):
    """A speedup, and its interval where it is known."""
    factor, bounds = row["speedup"].get(peer), row["interval"].get(peer)
    if not factor:
        return "-"
    return f"{factor:.1f}" + (f" ({bounds[0]:.1f}-{bounds[1]:.1f})" if bounds else "")


def _best(rows):
    """The updates of the fastest contract backend, a row an op, dtype and size; a user's
    are not ours."""
    best = {}
    for r in measured(rows):
        key = r["op"], r["dtype"], size(r), r["given_z"]
        ours = r["kind"] == "update" and is_ours(r) and not r["again"]
        if ours and (key not in best or r["seconds"] < best[key]["seconds"]):
            best[key] = r
    return list(best.values())


def _each(row, seconds):
    """Nanoseconds an element."""
    return f"{seconds / row['elements'] * 1e9:.3g}" if seconds else "-"


def _copy(row):
    """The share of the copy rate."""
    share = row["fraction_of_copy"]
    return f"{share:.2f}" if share else "-"


def _updates(rows):
    """A line an op and size; speedups over each peer."""
    best = _best(rows)
    peers = [p for p in PEERS if any(p in r["speedup"] for r in best)]
    header = ["op", "shape", "dtype", "backend", "ns an element", "p95", "of copy"]
    lines = [[r["op"], size(r), r["dtype"], label(r), _each(r, r["seconds"]),
              _each(r, r.get("p95")), _copy(r), *(_times(r, p) for p in peers)] for r in best]
    return _table([*header, *(f"x {p}" for p in peers)], lines)


def _first(machines):
    """A few lines for the project's own page: float32, each op's largest size."""
    lines = []
    for rows in machines:
        m = rows[0]["machine"]
        kind, place = "gpu", m["gpu"]
        if m["gpu"] == "none":
            kind, place = "cpu", f"{m['processor']}, {m['cores']} cores"
        for op in FIRST_OPS[kind]:
            found = [r for r in _best(rows) if (r["op"], r["dtype"]) == (op, "float32")]
            if found:
                r = max(found, key=lambda r: r["elements"])
                lines.append([place, op, size(r), r["backend"], _each(r, r["seconds"]), _copy(r),
                              *(_times(r, p) for p in FIRST_PEERS)])
    return _table(["where", "op", "shape", "backend", "ns an element", "of copy",
                   *(f"x {p}" for p in FIRST_PEERS)], lines)


def _samplers(rows):
    """A line a loop: ours and diffusers', ms a step."""
    rows = [r for r in measured(rows) if r["kind"] == "sampler"]
    if not rows:
        return []
    header = ["sampler", "network", "batch", "backend", "ms a step", "x diffusers"]
    return ["", *_table(header, (
        [f"{r['op']}, {r['steps']} steps", r["network"], size(r), r["backend"],
         f"{r['seconds'] * 1e3:.3f}", _times(r, "diffusers")]
        for r in rows if r["backend"] != "diffusers"))]


def _again(rows):
    """What noise is: the ratios of what was timed twice, where it was."""
    ratios = [r["speedup"][r["backend"]] for r in measured(rows) if r["again"]]
    if not ratios:
        return ""
    covered = sum(low <= 1 <= high for low, high in (
        r["interval"][r["backend"]] for r in measured(rows) if r["again"]))
    return (f"The same code timed twice: {len(ratios)} ratios, median {median(ratios):.2f}, all "
            f"within {min(ratios):.2f} and {max(ratios):.2f}; {covered} of the intervals hold 1.")


def _not_measured(rows):
    """Each peer or loop that no row times, with the reasons."""
    timed = {r["backend"] for r in measured(rows)}
    reasons = dict.fromkeys(f"{r['backend']}: {r['reason']}" for r in rows
                            if not r["seconds"] and (r["backend"] not in timed
                                                     or r["kind"] == "sampler"))
    return f"Not measured: {'; '.join(reasons)}." if reasons else ""


def table(rows):
    """Markdown of one machine's rows: what it is, updates, samplers."""
    m = rows[0]["machine"]
    shown = "processor", "cores", "gpu", "python", "system", "spin"
    versions = ", ".join(f"{k} {v}" for k, v in m.items() if k not in shown)
    return [f"{m['processor']}, {m['cores']} cores, GPU {m['gpu']}; Python {m['python']}, "
            f"{versions}.{_state(rows)}", "", *_updates(rows), *_samplers(rows), "",
            _again(rows), "", _not_measured(rows)]


def _state(rows):
    """The state that the machine was in, where it is known."""
    state = rows[0]["state"]
    if not state:
        return ""
    clocks = next(filter(None, (r.get("clocks") for r in rows)), {})
    mhz = "".join(f"; {v} MHz" for v in clocks.values() if v)
    lines = [f"Others took {state['others'] or 0:.0%} of the cores when it began, load "
             f"{state['load']}; malloc {state['malloc']}{mhz}.", *warning(state)]
    return " " + " ".join(lines)


def _write(page, start, end, text):
    """Put text between a page's markers, where it has them."""
    old = page.read_text() if page.is_file() else ""
    if start in old:
        if end not in old:
            raise ValueError(f"{page}: {start} without {end}")
        head, rest = old.split(start, 1)
        _, tail = rest.split(end, 1)
        with whole(page) as part:
            part.write_text(f"{head}{start}\n{text}\n{end}{tail}")


def report(folder=RESULTS):
    """The tables of the newest results, put between the markers of the README beside the
    folder, and a few lines between those of the project's; figures beside the results.
    Returns the first text."""
    folder, parts = Path(folder), []
    readme = folder.absolute().parent / "README.md"
    machines = list(newest(folder).values())
    for rows in machines:
        parts.append("\n".join(table(rows)).strip())
        for file in draw(folder, rows):
            place = os.path.relpath(file, readme.parent)
            parts.append(f"![{file.stem.replace('-', ', ')}]({place})")
    text = "\n\n".join(parts)
    _write(readme, START, END, text)
    _write(readme.parent.parent / "README.md", *FIRST, "\n".join(_first(machines)))
    return text
