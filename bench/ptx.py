"""A GPU in NumPy: runs the PTX that a kernel was compiled to, an instruction at a time.

emulate() has `triton` and `cupy` take CPU tensors and run there what they compile for sm_90; how
a device rounds is said by the names of the instructions. As much of the language as the kernels
here use; anything else is an error, not a guess. Where warps share memory they run in turn up to
a barrier, the last first: what one takes before an earlier one has written it shows. Addresses
outside of the launch's own tensors, or not a multiple of their access, are errors. Not exact on
a device is rsqrt.approx alone, here rounded to nearest: the root made of it is sqrt.rn's own
(tests/test_compile.py).
"""

import ctypes
import re
from functools import cache
from types import SimpleNamespace

import numpy as np

from ..kernels import on_cupy, on_triton
from . import words

KINDS = {"pred": np.dtype("?")} | {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in zip("fsub", "fiuu") for bits in (16, 32, 64)}
U32, U64 = KINDS["u32"], KINDS["u64"]
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum,
          "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
          "rem": np.fmod, "div": lambda a, b: (a.astype(np.float64) / b).astype(a.dtype)}
INTEGER = {"min", "max", "rem", "div"}  # other things for floats; div here of up to 32 bits
MODIFIERS = {"rn", "lo", "hi", "wide", "to", "global"}  # of BINARY and UNARY; rsqrt has its own
UNARY = {"neg": np.negative, "not": np.invert, "cvta": lambda a: a,
         "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)}
NAMES = re.compile(r"[%\w]+")
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal}


def wide(a):
    """Integers as ones of twice the bits."""
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def shift(name, a, n):
    """shl or shr; by all the bits of a or more leaves nothing, or the sign."""
    last = 8 * a.itemsize - 1
    by = np.minimum(n, last).astype(a.dtype)
    if name == "shr" and a.dtype.kind == "i":
        return a >> by
    return np.where(n > last, 0, a << by if name == "shl" else a >> by).astype(a.dtype)


def fma(a, b, c):
    """float32 a*b + c rounded once: in float64 first, to odd where that is inexact."""
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    odd = s.view(np.int64) + np.where((error > 0) == (s > 0), 1, -1)
    inexact = (error != 0) & (s.view(np.int64) % 2 == 0)
    return np.where(inexact, odd.view(np.float64), s).astype(np.float32)


def convert(a, to, source):
    """cvt.to.source."""
    if source == "bf16":
        return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16":
        i = a.view(np.uint32)
        return np.where(np.isnan(a), 0x7FFF, (i + 0x7FFF + (i >> 16 & 1)) >> 16).astype(np.uint16)
    return a.astype(KINDS[to])


@cache
def parsed(text, kernel):
    """A kernel of a PTX file: its instructions, (guard or None, parts of the name, operands);
    where each label stands; bytes of its registers, by prefix, and of its parameters."""
    head, body = re.search(rf"\.entry {kernel}\((.*?)\n\{{(.*?)\n\}}", text, re.S).groups()
    body = re.sub(r"//.*|/\*.*?\*/|^\s*\.(loc|pragma|file)\b.*$", "", body, flags=re.M)
    code, labels = [], {}
    for statement in body.split(";"):
        while m := re.match(r"\s*(?:[{}]|(\$\w+):)", statement):
            labels[m[1]] = len(code)
            statement = statement[m.end():]
        if statement.strip() and not statement.strip().startswith("."):
            guard, name, rest = re.match(r"\s*(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement,
                                         re.S).groups()
            code.append((guard, name.replace("::", ".").split("."), [
                o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*", rest)]))
    return SimpleNamespace(
        code=code, labels={o[0]: labels[o[0]] for _, name, o in code if name[0] == "bra"},
        registers={name: KINDS[kind].itemsize for kind, name in
                   re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)},
        parameters=[int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head)])


class Memory:
    """Arrays at their own addresses, (start, bytes) each, and nothing between them."""

    def __init__(self, arrays):
        self.arrays = [(start, np.frombuffer((ctypes.c_uint8 * n).from_address(start), np.uint8))
                       for start, n in {*arrays} if n]

    def parts(self, address, size):
        """(which of the addresses, an array, its bytes there) for each array they lie in."""
        if (address % size).any():
            raise MemoryError(f"an access of {size} bytes is not aligned")
        left = np.ones(len(address), bool)
        for start, data in self.arrays:
            offset = address - start
            here = left & (offset >= 0) & (offset + size <= len(data))
            left &= ~here
            yield here, data, offset[here, None] + np.arange(size)
        if left.any():
            raise MemoryError(f"{left.sum()} accesses lie outside of every array")

    def load(self, address, size):
        out = np.empty((len(address), size), np.uint8)
        for here, data, at in self.parts(address, size):
            out[here] = data[at]
        return out

    def store(self, address, value):
        for here, data, at in self.parts(address, value.shape[1]):
            data[at] = value[here]


class Warps:
    """The same warps of every block, one instruction at a time for all threads that are at it."""

    def __init__(self, program, parameters, memory, shared, blocks, threads, warps):
        self.code, self.labels, self.sizes = program.code, program.labels, program.registers
        self.whole = {i for i, (_, name, _) in enumerate(self.code) if "sync" in name}
        self.stops = self.whole | {*self.labels.values()}
        self.parameters, self.memory = parameters, memory
        block, thread = np.indices((len(blocks), 32 * len(warps))).reshape(2, -1)
        self.registers = {"%tid.x": (thread + 32 * warps[0]).astype(U32),
                          "%ctaid.x": blocks[block], "%ntid.x": np.full_like(block, threads, U32),
                          "global_smem": np.zeros_like(block, U32)}
        self.at, self.lane = np.zeros_like(block), np.arange(len(block), dtype=U32) % 32
        self.shared_size = shared.shape[1]
        self.shared = shared.ctypes.data + block * self.shared_size

    def run(self):
        """To the next barrier (True) or the end (False)."""
        end = len(self.code)
        while self.at.min() < end:
            here, active = self.ready()
            while True:
                guard, name, operands = self.code[here]
                here += 1
                self.on = active & self.holds(guard)
                if name[0] == "bar":
                    assert active.all(), "blocks that part before a barrier: not written"
                    self.at[:] = here
                    return True
                if name[0] in ("bra", "ret"):
                    self.at[active] = here
                    self.at[self.on] = self.labels[operands[0]] if operands else end
                    break
                if self.on.any():
                    getattr(self, name[0], self.value)(name, *operands)
                if here in self.stops:
                    self.at[active] = here
                    break
        return False

    def ready(self):
        """Those who are behind: where, and which; not a warp whose others are still to come."""
        for here in np.unique(self.at[self.at < len(self.code)]):
            active = self.at == here
            if here in self.whole:
                active &= active.reshape(-1, 32).all(1).repeat(32)
            if active.any():
                return here, active
        raise RuntimeError("threads that wait for each other for ever")

    def holds(self, guard):
        if not guard:
            return True
        return ~self.registers[guard[1:]] if guard[0] == "!" else self.registers[guard]

    def get(self, operand, kind):
        """A register or a number, one value a thread."""
        if operand in self.registers:
            assert self.registers[operand].itemsize == kind.itemsize, (operand, kind)
            return self.registers[operand].view(kind)
        if operand[0] == "%":  # never written: a NaN
            return np.full(len(self.at), -1, f"i{kind.itemsize}").view(kind)
        bits = re.sub("^0[fFdD](?=[0-9A-F])", "0x", operand).rstrip("U")
        bits = int(bits, 0) % (1 << 8 * kind.itemsize)
        return np.full(len(self.at), bits, f"u{kind.itemsize}").view(kind)

    def put(self, register, value):
        old = self.registers.get(register)
        if old is not None and not self.on.all():
            value = np.where(self.on, value, old.view(value.dtype))
        self.registers[register] = np.ascontiguousarray(value)

    # ---- instructions, by their names ----

    def value(self, name, out, *operands):
        """out = what a name without a method of its own makes of operands of one type."""
        kind, verb = KINDS[name[-1]], name[0]
        if verb == "rsqrt":
            assert name[1:] == ["approx", "ftz", "f32"], name
        elif {*name[1:-1]} - MODIFIERS or verb in INTEGER and kind.kind == "f" \
                or verb == "div" and kind.itemsize == 8:
            raise NotImplementedError(".".join(name))
        a, *more = (self.get(o, kind) for o in operands)
        if verb == "mul" and name[1] in ("wide", "hi"):
            a, more = wide(a), [wide(more[0])]
        value = BINARY[verb](a, *more) if more else UNARY[verb](a)
        self.put(out, (value >> 8 * kind.itemsize).astype(kind) if name[1] == "hi" else value)

    def fma(self, name, out, *operands):
        assert name == ["fma", "rn", "f32"]
        self.put(out, fma(*(self.get(o, KINDS["f32"]) for o in operands)))

    def mad(self, name, out, a, b, c):
        assert name[1] in ("lo", "wide"), name
        a, b = (self.get(o, KINDS[name[2]]) for o in (a, b))
        a, b = (wide(a), wide(b)) if name[1] == "wide" else (a, b)
        self.put(out, a * b + self.get(c, a.dtype))

    def shl(self, name, out, a, n):
        self.put(out, shift(name[0], self.get(a, KINDS[name[-1]]), self.get(n, U32)))
    shr = shl

    def bfe(self, name, out, a, start, length):
        a, length = self.get(a, KINDS[name[-1]]), self.get(length, U32)
        up = U32.type(8 * a.itemsize) - length
        self.put(out, shift("shr", shift("shl", a, up - self.get(start, U32)), up))

    def bfi(self, name, out, a, b, start, length):
        a, b = (self.get(o, KINDS[name[-1]]) for o in (a, b))
        start, length = (self.get(o, U32) for o in (start, length))
        mask = shift("shl", ~shift("shl", ~(0 * a), length), start)
        self.put(out, (b & ~mask) | (shift("shl", a, start) & mask))

    def prmt(self, name, out, a, b, pick):
        """Each byte one of the eight of a and b, or where its bit 3 is set that one's sign."""
        assert name == ["prmt", "b32"]
        given = np.stack([self.get(a, U32), self.get(b, U32)], -1).view(np.uint8)
        pick = self.get(pick, U32)[:, None] >> np.arange(0, 16, 4, dtype=U32)
        byte = np.take_along_axis(given, (pick & 7).astype(int), 1)
        self.put(out, np.where(pick & 8, 0 - (byte >> 7), byte).astype(np.uint8).view(U32)[:, 0])

    def setp(self, name, out, a, b):
        _, compare, kind = name
        self.put(out, COMPARE[compare](self.get(a, KINDS[kind]), self.get(b, KINDS[kind])))

    def selp(self, name, out, a, b, p):
        kind = KINDS[name[-1]]
        self.put(out, np.where(self.get(p, KINDS["pred"]), self.get(a, kind), self.get(b, kind)))

    def cvt(self, name, out, *operands):
        *how, to, source = name[1:]
        assert how in ([], ["rn"]), name
        kind = KINDS["u16" if source == "bf16" else source]
        pair = [convert(self.get(o, kind), to.removesuffix("x2"), source) for o in operands]
        if to.endswith("x2"):  # the first operand is the upper half
            self.put(out, np.stack(pair[::-1], -1).view(U32)[:, 0])
        else:
            self.put(out, pair[0])

    def mov(self, name, out, a):
        """A register, or a vector of halves to or from one."""
        kind = KINDS[name[-1]]
        if out[0] == "{":
            low, high = NAMES.findall(out)
            parts = self.get(a, kind).view(f"u{kind.itemsize // 2}")
            self.put(low, parts[::2])
            self.put(high, parts[1::2])
        elif a[0] == "{":
            half = np.dtype(f"u{kind.itemsize // 2}")
            parts = [self.get(n, half) for n in NAMES.findall(a)]
            self.put(out, np.stack(parts, -1).view(kind)[:, 0])
        else:
            self.put(out, self.get(a, kind))

    def shfl(self, name, out, a, distance, clamp, members):
        a, distance, clamp, members = (self.get(o, U32) for o in (a, distance, clamp, members))
        assert name[1:] == ["sync", "bfly", "b32"], name
        assert (clamp == 31).all() and (members == 2**32 - 1).all(), "not a whole warp"
        other = np.arange(len(a)) // 32 * 32 + (self.lane ^ distance) % 32
        self.put(out.split("|")[0], a[other])

    # ---- memory ----

    def addresses(self, space, operand):
        register, _, offset = operand.strip("[] ").partition("+")
        kind = U64 if space == "global" else U32
        at = self.get(register.strip(), kind).astype(np.int64) + int(offset or "0", 0)
        if space == "shared":
            if (at[self.on] >= self.shared_size).any():
                raise MemoryError("an access beyond the block's shared memory")
            at = at + self.shared
        return at[self.on]

    def bytes_of(self, registers, kind):
        """The registers of each active thread, side by side; of a wider one its low bytes."""
        parts = [self.registers[r][self.on, None].view(np.uint8)[:, :kind.itemsize]
                 if r in self.registers else self.get(r, kind)[self.on, None].view(np.uint8)
                 for r in registers]
        return np.concatenate(parts, 1)

    def fill(self, registers, kind, data):
        """The opposite of bytes_of."""
        for register, part in zip(registers, np.ascontiguousarray(data).view(kind).T, strict=True):
            size = self.sizes.get(register.rstrip("0123456789"), kind.itemsize)
            value = np.zeros(len(self.on), f"{kind.kind}{size}")  # extended, with its sign if any
            value[self.on] = part
            self.put(register, value)

    def ld(self, name, out, address):
        space, kind, registers = name[1], KINDS[name[-1]], NAMES.findall(out)
        if space == "param":
            value = int(self.parameters[int(address.strip("[]").rpartition("_")[2])]) % 2**64
            data = np.full((self.on.sum(), 1), value, U64).astype(f"u{kind.itemsize}")
        else:
            data = self.memory.load(self.addresses(space, address),
                                    len(registers) * kind.itemsize)
        self.fill(registers, kind, data)

    def st(self, name, address, given):
        self.memory.store(self.addresses(name[1], address),
                          self.bytes_of(NAMES.findall(given), KINDS[name[-1]]))

    def atom(self, name, out, address, given):
        assert name == ["atom", "global", "add", "f64"]
        for at, a in zip(self.addresses("global", address), self.get(given, KINDS["f64"])[self.on]):
            old = self.memory.load(at[None], 8)
            self.memory.store(at[None], (old.view(np.float64) + a).view(np.uint8))

    def rows(self, name, operand):
        """Addresses, [warp, matrix, thread], of the four bytes of 8 x 8 matrices of 16 bits
        that a thread holds: thread 8 m + r gives where row r of matrix m is."""
        assert name[1:] == ["sync", "aligned", "m8n8", "x4", "shared", "b16"], name
        rows, thread = self.addresses("shared", operand).reshape(-1, 4, 8), np.arange(32)
        return (rows[:, :, thread // 4] + 4 * (thread % 4)).swapaxes(1, 2).reshape(-1)

    def ldmatrix(self, name, out, address):
        at = self.rows(name, address)
        self.fill(NAMES.findall(out), U32, self.memory.load(at, 4).reshape(-1, 16))

    def stmatrix(self, name, address, given):
        at = self.rows(name, address)
        data = self.bytes_of(NAMES.findall(given), U32)
        self.memory.store(at, data.reshape(-1, 4))


def run(text, kernel, arguments, places, threads, shared=0):
    """Launch a kernel of a PTX file: tensors, which alone it may touch, and integers; which
    blocks of the grid, a block's threads, its bytes of shared memory."""
    tensors = [a for a in arguments if hasattr(a, "data_ptr")]
    scratch = np.full((len(places), max(16, shared)), 0xFF, np.uint8)
    memory = Memory([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
                    + [(scratch.ctypes.data, scratch.nbytes)])
    parameters = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments]
    program = parsed(text, kernel)
    for a, size in zip(arguments, program.parameters):
        assert not isinstance(a, np.generic) or a.itemsize == size, "passed as it is, too long"
    groups = [range(threads // 32)]
    if shared:
        groups = [range(w, w + 1) for w in reversed(groups[0])]
    groups = [Warps(program, parameters, memory, scratch, np.asarray(places, U32), threads, warps)
              for warps in groups]
    with np.errstate(all="ignore"):
        while (more := {group.run() for group in groups}) != {False}:
            assert more == {True}, "a barrier that not every warp comes to"


# ---- the backends on it ----

blocks = range  # of a grid, those that run


class Launcher:
    """A Triton kernel, launched here: `compiled` is what the last launch ran."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.options = options
            self.compiled = found = self.kernel.warmup(*arguments, grid=grid, **options)
            run(found.asm["ptx"], found.metadata.name, arguments, blocks(grid[0]),
                32 * found.metadata.num_warps, found.metadata.shared)
        return launch


@cache
def compiled_by_nvrtc(variant, more="", cubin=False):
    """The PTX, or the machine code for sm_90, of kernels.cu and `more`."""
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(on_cupy.SOURCE.read_text() + more, "kernels.cu", [], [])
    nvrtc.compileProgram(program, [*on_cupy.options(*variant), "--gpu-architecture="
                                   + ("sm_90" if cubin else "compute_90")])
    # CuPy drops the last byte
    return nvrtc.getCUBIN(program) + b"\0" if cubin else nvrtc.getPTX(program).decode()


def launch(device, grid, arguments, *variant, name="update", more=""):
    """on_cupy.launch here."""
    run(compiled_by_nvrtc(variant, more), name, arguments, blocks(grid), on_cupy.THREADS)


@cache
def missing(name):
    """None, or what lacks for compiling a backend's kernels here."""
    if name == "triton":
        return "TRITON_INTERPRET is set" if on_triton.INTERPRET else \
            None if on_triton.triton else "triton is not installed: pip install triton"
    try:
        compiled_by_nvrtc(("float32", 0, True, False))
    except (ImportError, OSError, RuntimeError) as e:
        return f"NVRTC is not installed: pip install -e '.[cuda13]' ({type(e).__name__})"


@cache
def emulate():
    """From here on, in this process, `triton` and `cupy` run what they compile on the CPU."""
    for name, module in (("triton", on_triton), ("cupy", on_cupy)):
        if not missing(name):
            module.TAKES, module.missing = "cpu", lambda: None
    on_cupy.launch = launch
    if not missing("triton"):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        none = lambda *_: 0
        driver.set_active(SimpleNamespace(get_current_device=none, get_current_stream=none,
                                          get_current_target=lambda: GPUTarget("cuda", 90, 32)))
        for module, name in ((on_triton, "kernel"), (words, "_words"), (words, "_radii")):
            setattr(module, name, Launcher(getattr(module, name)))
