"""Against an older run: what got slower beyond noise."""

from statistics import median_high

from ...machine import machine
from ..peers import PEERS
from ..speed.rows import measured

KEYS = "kind", "op", "backend", "dtype", "shape", "network", "against", "given_z", "again"


def _key(row):
    return tuple(str(row.get(k)) for k in KEYS)


def _error(row):
    """Standard error of a median: 1.25 sigma / sqrt(n), a normal's quartiles 1.35 sigma
    apart."""
    low, high = row["quartiles"]
    return .93 * (high - low) / row.get("rounds", 7)**.5


def slower(old, new):
    """(lines that say which of our rows got slower beyond noise, the machine's own drift).

    drift: the median change of the peers, whose code is not ours; None without any. A row
    is slower if, divided by drift, its lower quartile lies above the old upper one and its
    median above the old median by over four standard errors of their difference.
    """
    before = {_key(r): r for r in measured(old)}
    pairs = [(before[_key(r)], r) for r in measured(new) if _key(r) in before]
    if not pairs:
        raise ValueError("no row in common with the older run")
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs if a["backend"] in PEERS]
    drift = median_high(ratios) if ratios else None
    scale, lines = drift or 1., []
    for a, b in pairs:
        then, now = a["seconds"], b["seconds"] / scale
        rise = now - then
        noise = 4 * (_error(a)**2 + (_error(b) / scale)**2)**.5
        apart = b["quartiles"][0] / scale > a["quartiles"][1]
        if a["backend"] not in PEERS and apart and rise > noise:
            known = " ".join(k for k in _key(b) if k not in ("None", "False"))
            lines.append(f"slower: {known}: {then * 1e6:.1f} -> {now * 1e6:.1f} us, "
                         f"{100 * rise / then:.0f} % (noise {100 * noise / then:.0f} %)")
    return lines, drift


def require_same_machine(old):
    """ValueError where older rows are of another machine than this."""
    there, here = old[0]["machine"], machine()
    if any(there[k] != here[k] for k in ("processor", "cores", "gpu")):
        raise ValueError(f"the older run is of another machine: {there['processor']}, "
                         f"{there['cores']} cores, GPU {there['gpu']}")


def compare(old, new):
    """Prints what got slower than in older rows; 1 if anything did."""
    there, here = old[0]["machine"], new[0]["machine"]
    lines, drift = slower(old, new)
    for k in sorted(here):
        if here[k] != there.get(k):
            print(f"{k}: {there.get(k)} then, {here[k]} now")
    print("\n".join(lines or ["nothing got slower beyond noise"]))
    known = f"x {drift:.2f}, taken out" if drift else "not known, as no peer was timed in both runs"
    print(f"the machine's own drift, by the peers: {known}; noise is four standard errors of two "
          "medians, from their quartiles, which must lie apart")
    return int(bool(lines))
