"""Kernels compiled for a GPU that need not be here, and their machine code, read.

Triton and NVRTC make machine code for a card without one, and `cuobjdump`, which Triton
brings, prints it. So what a kernel takes is counted: issue slots an element, registers,
bytes of an access.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from ...kernels import on_cupy, on_triton

WARP = 32
UNROLLED = 4  # packs a turn of CUDA C's loop makes
# what takes the pipe of integers and logic, and what the one of multiply-adds: of products
# too, whose own rate is not told apart. A 2 is two of them in one, of sm_100
INTEGER = re.compile("(LOP3|IADD3?|VIADD|LEA|SHF|PRMT|SEL|FSEL|FSETP|ISETP|VIMNMX|"
                     "VIADDMNMX|I2FP|F2FP|PLOP3|IABS|POPC)$")
FLOAT = re.compile("(FFMA2?|FMUL2?|FADD2?|IMAD)$")
COUNTED = {"local": r"\b(LDL|STL)", "double": r"\bD(ADD|MUL|FMA)|F64",
           "root": r"\bMUFU\.RSQ", "load16": r"\bLDG\.E\.(EF\.)?128",
           "store16": r"\bSTG\.E\.(EF\.)?128", "store": r"\bSTG"}


class Code(NamedTuple):
    """A kernel's machine code: its file, its name there, elements that what is counted of
    it makes a thread, and whether it is one loop that makes them."""

    cubin: bytes
    name: str
    elements: int
    loop: bool


def why_not_read(name):
    """Why what a backend compiles cannot be read here, or None."""
    if not on_triton.triton or not tool().exists():
        return "cuobjdump, which triton brings, is not here: pip install triton"
    return why_not(name)


def why_not(name):
    """Why a backend cannot be compiled here, or None."""
    if name == "triton":
        if on_triton.INTERPRET:
            return "TRITON_INTERPRET is set"
        return None if on_triton.triton else "triton is not installed: pip install triton"
    try:
        from cupy.cuda import nvrtc
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as e:
        return f"no NVRTC: pip install -e '.[cuda13]' ({e})".splitlines()[0]


# ---- two compilers ----

def asked(architecture):
    """What Triton asks of a driver, for one that is not there: 90 is sm_90."""
    from triton.backends.compiler import GPUTarget
    number = lambda *_: architecture  # as a device: what was compiled is kept by it
    return SimpleNamespace(get_current_device=number, get_current_stream=number,
                           get_current_target=lambda: GPUTarget("cuda", architecture, WARP))


@contextmanager
def target(architecture):
    """Meanwhile Triton compiles for it."""
    from triton.runtime import driver
    try:
        before = driver.active
    except RuntimeError:  # no GPU
        before = None
    driver.set_active(asked(architecture))
    try:
        yield
    finally:
        driver.set_active(before)


def by_triton(launch, architecture, counter=None):
    """The Code of a `kernels.launch.Launch`; its step is a number, or a counter's."""
    plan = on_triton.planned(launch)
    with target(architecture):
        found = on_triton.warmed_up(plan, counter)
    of = plan.options
    tile = of["ROWS"] * of["COLUMNS"] * 4 * of["V"]
    each = tile // (WARP * on_triton.WARPS)
    return Code(found.asm["cubin"], found.metadata.name, each, False)


def by_nvrtc(launch, architecture):
    """The same by NVRTC, whatever its step is."""
    options = on_cupy.options(launch.aligned(), *launch.variant())
    cubin = on_cupy.machine_code((*options, f"--gpu-architecture=sm_{architecture}"))
    return Code(cubin, "update", UNROLLED * 16 // launch.out.element_size(), True)


COMPILERS = {"triton": by_triton, "cupy": by_nvrtc}


# ---- what they made ----

def tool():
    """The path of cuobjdump."""
    folder = Path(on_triton.triton.__file__).parent
    return folder / "backends/nvidia/bin/cuobjdump"


def printed(cubin, name, option):
    """What cuobjdump says of a function of a file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool(), option, "-fun", name, file.name], check=True,
                              capture_output=True, text=True).stdout


def lines(cubin, name):
    """(address, instruction) of a function, in order, without those that do nothing."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", printed(cubin, name, "-sass"))
    return [(int(at, 16), line) for at, line in found if "NOP" not in line]


def instructions(cubin, name):
    """Those of a function."""
    return [line for _, line in lines(cubin, name)]


def resources(cubin, name):
    """Its registers, bytes of stack and of shared memory."""
    usage = printed(cubin, name, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups()
    return dict(zip(("registers", "stack", "shared"), map(int, found)))


def counted(cubin, name):
    """How many of the instructions that matter a function has, and its resources."""
    code = instructions(cubin, name)

    def number(pattern):
        return sum(bool(re.search(pattern, line)) for line in code)
    found = {what: number(pattern) for what, pattern in COUNTED.items()}
    found["fma"] = number(r"\bFFMA") + number(r"\bFFMA2")  # which makes two
    return resources(cubin, name) | {"instructions": len(code)} | found


def longest_loop(cubin, name):
    """The instructions of its longest loop."""
    code = lines(cubin, name)
    jumps = [(re.search(r"BRA .*?(0x\w+)", line), at) for at, line in code]
    loops = [(int(jump[1], 16), at) for jump, at in jumps if jump]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [line for at, line in code if first <= at <= last]


def slots(code, floats=1, integers=2):
    """Issue slots of instructions: one each, or more where those of one pipe, which takes
    so many for each, are the longer part."""
    names = [re.sub(r"^@!?U?P\d+ ", "", line).split()[0].split(".")[0] for line in code]
    of_floats = sum(1 + (name[-1] == "2") for name in names if FLOAT.match(name))
    of_integers = sum(bool(INTEGER.match(name)) for name in names)
    return max(len(names), floats * of_floats, integers * of_integers)


def slots_an_element(code, **pipes):
    """Issue slots that a Code takes for an element."""
    of_code = longest_loop if code.loop else instructions
    return slots(of_code(code.cubin, code.name), **pipes) / code.elements
