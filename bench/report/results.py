"""Results as data: rows kept as JSON, one file a machine and date."""

import json
import math
import re
import time
from pathlib import Path

from ...files import require_file, whole
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
    """Rows of a file. ValueError in one line where it holds anything else."""
    require_file(file)
    try:
        rows = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as e:  # a text may be nested without end
        raise ValueError(f"{file}: not a list of rows that bench wrote ({e})") from e
    if isinstance(rows, list):
        rows = [BEFORE | {"shape": [r.get("elements")]} | r if isinstance(r, dict) else r
                for r in rows]
    if not isinstance(rows, list) or not rows or not all(map(is_row, rows)):
        raise ValueError(f"{file}: not a list of rows that bench wrote")
    return rows


# ---- what a row holds ----

# what older files do not say
BEFORE = {"kind": "update", "reason": None, "given_z": False, "again": False, "speedup": {},
          "interval": {}, "state": None}


def is_number(v):
    """Whether a value is a number, positive or 0 and finite."""
    return type(v) in (int, float) and 0 <= v < math.inf


def is_whole(v):
    """Whether a value is a whole number of at least 1."""
    return type(v) is int and v > 0


def is_text(v):
    """Whether a value is text."""
    return isinstance(v, str)


def is_flag(v):
    """Whether a value is true or false."""
    return isinstance(v, bool)


def is_pair(v):
    """Whether a value is two numbers, an interval."""
    return isinstance(v, list) and len(v) == 2 and all(map(is_number, v))


def is_shape(v):
    """Whether a value is a shape."""
    return isinstance(v, list) and bool(v) and all(map(is_whole, v))


def are(check, *names):
    """A check of a dict: all its values are such, these names among them."""
    def checked(v):
        return isinstance(v, dict) and {*names} <= v.keys() and all(map(check, v.values()))
    return checked


NEEDED = {"op": is_text, "backend": is_text, "dtype": is_text, "kind": is_text,
          "elements": is_whole, "shape": is_shape, "given_z": is_flag, "again": is_flag,
          "speedup": are(is_number), "interval": are(lambda v: v is None or is_pair(v)),
          "machine": are(is_text, "processor", "cores", "gpu", "python")}
KNOWN = {"reason": is_text, "network": is_text, "steps": is_whole, "rounds": is_whole,
         "seconds": is_number, "quartiles": is_pair, "p95": is_number,
         "fraction_of_copy": is_number, "state": are(lambda v: True, "others", "load", "malloc"),
         "clocks": are(lambda v: v is None or is_number(v))}


def is_row(row):
    """Whether a row is one that bench wrote: each value that is read later is of its kind.

    What is KNOWN may be None. What has a time has its quartiles.
    """
    if not isinstance(row, dict):
        return False
    if not all(check(row.get(name)) for name, check in NEEDED.items()):
        return False
    if not all(row.get(name) is None or check(row[name]) for name, check in KNOWN.items()):
        return False
    if not row.get("seconds"):
        return True
    by_itself = not row["again"] or row["backend"] in row["speedup"]
    looped = row["kind"] != "sampler" or bool(row.get("steps"))
    return bool(row.get("quartiles")) and by_itself and looped


def newest(folder):
    """{(processor, gpu): rows of the last file by name}. ValueError without any."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: not a folder")
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        rows = load(file)
        m = rows[0]["machine"]
        found[m["processor"], m["gpu"]] = rows
    if not found:
        raise ValueError(f"{folder}: no results yet; write them with bench --json {folder}")
    return found
