"""The table of results, between two markers of a page, only ever written from a file of
rows."""

import os
from pathlib import Path

from ..peers import PEERS
from ..speed.rows import label, measured, size
from .figures import draw
from .results import RESULTS, newest

START, END = "<!-- bench: start -->", "<!-- bench: end -->"


def _table(header, lines):
    """A table's Markdown, line by line."""
    for cells in (header, ["---"] * len(header), *lines):
        yield f"| {' | '.join(cells)} |"


def _times(row, peer):
    factor = row["speedup"].get(peer)
    return f"{factor:.1f}" if factor else "-"


def _updates(rows):
    """A line an op and size of the fastest contract backend; speedups over each peer."""
    ours = [r for r in measured(rows) if r["kind"] == "update" and r["backend"] not in PEERS]
    best = {}
    for r in ours:
        key = r["op"], r["dtype"], size(r), r["given_z"]
        if key not in best or r["seconds"] < best[key]["seconds"]:
            best[key] = r
    peers = [p for p in PEERS if any(p in r["speedup"] for r in ours)]
    header = ["op", "shape", "dtype", "backend", "ns an element", "of copy"]
    lines = []
    for r in best.values():
        copy = r["fraction_of_copy"]
        lines.append([r["op"], size(r), r["dtype"], label(r),
                      f"{r['seconds'] / r['elements'] * 1e9:.3g}", f"{copy:.2f}" if copy else "-",
                      *(_times(r, p) for p in peers)])
    return _table([*header, *(f"x {p}" for p in peers)], lines)


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
            f"{versions}.", "", *_updates(rows), *_samplers(rows), "", _not_measured(rows)]


def report(folder=RESULTS):
    """The table of the newest results, printed and put between the README's markers;
    figures beside the results. Returns the text."""
    folder, parts = Path(folder), []
    readme = folder.absolute().parent / "README.md"
    for rows in newest(folder).values():
        parts.append("\n".join(table(rows)).strip())
        for file in draw(folder, rows):
            place = os.path.relpath(file, readme.parent)
            parts.append(f"![{file.stem.replace('-', ', ')}]({place})")
    text = "\n\n".join(parts)
    page = readme.read_text() if readme.is_file() else ""
    if START in page:
        if END not in page:
            raise ValueError(f"{readme}: {START} without {END}")
        head, rest = page.split(START, 1)
        _, tail = rest.split(END, 1)
        readme.write_text(f"{head}{START}\n{text}\n{END}{tail}")
    return text
