"""What is said of a line of PTX that the emulator does not know."""

import re

from minidiff.kernels import on_triton

KNOWN = "3.6.0", "3.7.1", "3.8.0", "3.9.0"  # the Tritons whose code runs here; see .ci/run


def compiler(text):
    """Who made a PTX file, as its head says: Triton, or NVRTC."""
    if "LLVM NVPTX" in text:
        return f"Triton {getattr(on_triton.triton, '__version__', '')}"
    found = re.search(r"Cuda compilation tools, .* V([\d.]+)", text)
    return f"NVRTC {found[1]}" if found else "unnamed PTX"


def unknown(line, program, file, why=""):
    """NotImplementedError, to be raised: one line, for whoever must write what lacks."""
    why = f" ({' '.join(why.split())})" if why else ""
    return NotImplementedError(
        f"{line} is not written in tests/emulator/{file}{why}: it is in kernel "
        f"{program.kernel!r} of {program.compiler}. Write it there, or test with a Triton "
        f"that is known: {', '.join(KNOWN)}")
