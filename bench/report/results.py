"""Results as data: rows kept as JSON, one file a machine and date."""

import json
import re
import time
from pathlib import Path

from ...files import whole
from ...machine import machine

RESULTS = Path(__file__).parents[1] / "results"


def save(target, rows):
    """Rows as JSON, one a line, whole or not at all; a folder gets a file named by date and
    machine. Returns the file."""
    target = Path(target)
    if target.is_dir():
        m = machine()
        name = m["processor"] if m["gpu"] == "none" else m["gpu"]
        name = re.sub(r"[^a-z0-9]+", "-", f"{time.strftime('%Y-%m-%d')}-{name}".lower())
        target /= f"{name.rstrip('-')}.json"
    with whole(target) as part:
        part.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
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
    # what older files do not say
    said = {"kind": "update", "reason": None, "given_z": False, "again": False,
            "interval": {}, "state": None}
    return [said | {"shape": [r["elements"]]} | r for r in good]


def newest(folder):
    """{(processor, gpu): rows of the last file by name}. ValueError without any."""
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        rows = load(file)
        m = rows[0]["machine"]
        found[m["processor"], m["gpu"]] = rows
    if not found:
        raise ValueError(f"{folder}: no results yet; write them with bench --json {folder}")
    return found
