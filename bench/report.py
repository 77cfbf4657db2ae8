"""Results as data: rows kept as JSON, one file a machine and date, and what is read off them.

The README's table lies between two markers and is only ever written from such a file.
"""

import json
import os
import re
import time
from pathlib import Path

from .machine import machine
from .peers import PEERS
from .rows import label
from .run import FORM

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- bench: start -->", "<!-- bench: end -->"
KEYS = "kind", "op", "backend", "dtype", "shape", "network", "against", "given_z"


def save(target, rows):
    """Rows as JSON, one a line, whole or not at all; a folder gets a file named by date and
    machine. Returns the file."""
    target = Path(target)
    if target.is_dir():
        m = machine()
        name = m["processor"] if m["gpu"] == "none" else m["gpu"]
        target /= f"{time.strftime('%Y-%m-%d')}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
        target = target.with_name(target.name.replace("-.json", ".json"))
    part = Path(f"{target}.part")
    part.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    os.replace(part, target)
    return target


def load(file):
    """Rows of a file. ValueError in one line where it holds none."""
    try:
        rows = json.loads(Path(file).read_text())
        good = [r for r in rows if {"op", "backend", "dtype", "elements", "seconds"} <= r.keys()
                and (not r["seconds"] or {"machine", "quartiles"} <= r.keys())]
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ValueError(f"{file}: not a list of rows that bench wrote ({e})") from e
    if not good or len(good) < len(rows):
        raise ValueError(f"{file}: not a list of rows that bench wrote")
    return [{"kind": "update", "shape": [r["elements"]], "reason": None, "given_z": False} | r
            for r in good]


def newest(folder=RESULTS):
    """{(processor, gpu): rows of the last file by name}. ValueError without any."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        rows = load(file)
        m = rows[0].get("machine", {})
        found[m.get("processor"), m.get("gpu")] = rows
    if not found:
        raise ValueError(f"{folder}: no results yet; write them with bench --json {folder}")
    return found


# ---- the table ----

def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _times(row, peer):
    over = row["speedup"].get(peer)
    return f"{over:.1f}" if over else "-"


def _updates(rows):
    """A line an op and size of the fastest contract backend; speedups over each peer."""
    ours = [r for r in rows if r["kind"] == "update" and r["backend"] not in PEERS and r["seconds"]]
    best = {}
    for r in ours:
        key = r["op"], r["dtype"], tuple(r["shape"]), r["given_z"]
        best[key] = min(r, best.get(key, r), key=lambda r: r["seconds"])
    peers = [p for p in PEERS if any(p in r["speedup"] for r in ours)]
    yield _line(["op", "shape", "dtype", "backend", "ns an element", "of copy",
                 *(f"x {p}" for p in peers)])
    yield _line(["---"] * (6 + len(peers)))
    for r in best.values():
        copy = r["fraction_of_copy"]
        yield _line([r["op"], "x".join(map(str, r["shape"])), r["dtype"], label(r),
                     f"{r['seconds'] / r['elements'] * 1e9:.3g}", f"{copy:.2f}" if copy else "-",
                     *(_times(r, p) for p in peers)])


def _samplers(rows):
    """A line a loop: ours and diffusers', ms a step."""
    rows = [r for r in rows if r["kind"] == "sampler" and r["seconds"]]
    if not rows:
        return
    yield from ("", _line(["sampler", "network", "batch", "backend", "ms a step", "x diffusers"]),
                _line(["---"] * 6))
    for r in (r for r in rows if r["backend"] != "diffusers"):
        yield _line([f"{r['op']}, {r['steps']} steps", r["network"], "x".join(map(str, r["shape"])),
                     r["backend"], f"{r['seconds'] * 1e3:.3f}", _times(r, "diffusers")])


def _not_measured(rows):
    """Each peer or loop that no row times, with the reasons."""
    timed = {r["backend"] for r in rows if r["seconds"]}
    reasons = dict.fromkeys(f"{r['backend']}: {r['reason']}" for r in rows
                            if not r["seconds"] and (r["backend"] not in timed
                                                     or r["kind"] == "sampler"))
    return f"Not measured: {'; '.join(reasons)}." if reasons else ""


def table(rows):
    """Markdown of one machine's rows: what it is, updates, samplers, growth."""
    from .growth import show_growth
    m, grown = rows[0]["machine"], [r for r in rows if r["kind"] == "growth"]
    versions = ", ".join(f"{k} {v}" for k, v in m.items() if k not in
                         ("processor", "cores", "gpu", "python", "system", "spin"))
    yield f"{m['processor']}, {m['cores']} cores, GPU {m['gpu']}; Python {m['python']}, {versions}."
    yield from ("", *_updates(rows), *_samplers(rows))
    if grown:
        yield from ("", "```text", show_growth(grown), "```")
    yield from ("", _not_measured(rows))


def report(folder=RESULTS, readme=None):
    """The table of the newest results, printed and put between the README's markers; figures
    beside the results. Returns the text."""
    from .figures import draw
    folder = Path(folder)
    readme, parts = Path(readme or folder.absolute().parents[1] / "README.md"), []
    for rows in newest(folder).values():
        parts += ["\n".join(table(rows)).strip(), *(
            f"![{file.stem.replace('-', ', ')}]({os.path.relpath(file, readme.parent)})"
            for file in draw(folder, rows))]
    text = "\n\n".join(parts)
    if readme.is_file() and START in (old := readme.read_text()):
        if END not in old:
            raise ValueError(f"{readme}: {START} without {END}")
        head, rest = old.split(START, 1)
        readme.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")
    return text


# ---- against an older run ----

def _key(row):
    return tuple(str(row.get(k)) for k in KEYS)


def _error(row):
    """Standard error of a median: 1.25 sigma / sqrt(n), a normal's quartiles 1.35 sigma apart."""
    low, high = row["quartiles"]
    return .93 * (high - low) / row.get("rounds", 7)**.5


def slower(old, new):
    """(lines that say which of our rows got slower beyond noise, the machine's own drift).

    drift: the median change of the peers, whose code is not ours; None without any. A row is
    slower if, divided by drift, its lower quartile lies above the old upper one and its median
    above the old median by over four standard errors of their difference.
    """
    before = {_key(r): r for r in old if r["seconds"]}
    pairs = [(before[_key(r)], r) for r in new if r["seconds"] and _key(r) in before]
    if not pairs:
        raise ValueError("no row in common with the older run")
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs if a["backend"] in PEERS)
    drift = ratios[len(ratios) // 2] if ratios else None
    lines = []
    for a, b in pairs:
        now, low, error = (v / (drift or 1.) for v in (b["seconds"], b["quartiles"][0], _error(b)))
        rise, noise = now - a["seconds"], 4 * (_error(a)**2 + error**2)**.5
        if a["backend"] not in PEERS and low > a["quartiles"][1] and rise > noise:
            known = [k for k in _key(b) if k not in ("None", "False")]
            lines.append(f"slower: {' '.join(known)}: "
                         f"{a['seconds'] * 1e6:.1f} -> {now * 1e6:.1f} us, "
                         f"{100 * rise / a['seconds']:.0f} % (noise "
                         f"{100 * noise / a['seconds']:.0f} %)")
    return lines, drift


def compare(old, new):
    """Prints what got slower than in older rows; 1 if anything did. ValueError where they are of
    another machine."""
    there, here = (rows[0]["machine"] for rows in (old, new))
    if any(there[k] != here[k] for k in ("processor", "cores", "gpu")):
        raise ValueError(f"the older run is of another machine: {there['processor']}, "
                         f"{there['cores']} cores, GPU {there['gpu']}")
    lines, drift = slower(old, new)
    for k in sorted(k for k in here if here[k] != there.get(k)):
        print(f"{k}: {there.get(k)} then, {here[k]} now")
    print("\n".join(lines or ["nothing got slower beyond noise"]))
    known = f"x {drift:.2f}, taken out" if drift else "not known, as no peer was timed in both runs"
    print(f"the machine's own drift, by the peers: {known}; noise is four standard errors of two "
          "medians, from their quartiles, which must lie apart")
    return int(bool(lines))


def form_rows(rows):
    """Rows of the update x' = a x + b s + c z in float32, 1024 wide or one row, by size."""
    own = [r for r in rows if r["kind"] == "update" and r["op"] == FORM.name
           and r["dtype"] == "float32" and not r["given_z"]
           and r["shape"][-1] in (1024, r["elements"])]
    return sorted(own, key=lambda r: r["elements"])
