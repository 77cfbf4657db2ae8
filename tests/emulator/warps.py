"""Threads in warps: registers, and what each instruction does to them."""

import re

import numpy as np

from .arithmetic import (
    BINARY,
    COMPARE,
    F32,
    KINDS,
    MODIFIERS,
    U32,
    U64,
    UNARY,
    convert,
    fma,
    need,
    rsqrt,
    shift,
    wide,
)
from .unknown import unknown

NAMES = re.compile(r"-?[%\w]+")


class Warps:
    """The same warps of every block, one instruction at a time for all threads that are at it."""

    def __init__(self, program, parameters, memory, shared, blocks, threads, warps):
        self.code, self.labels, self.sizes = program.code, program.labels, program.registers
        self.program = program
        self.whole = {i for i, (_, name, *_) in enumerate(self.code) if "sync" in name}
        self.stops = self.whole | {*self.labels.values()}
        self.parameters, self.memory = parameters, memory
        block, thread = np.indices((len(blocks), 32 * len(warps))).reshape(2, -1)
        thread += 32 * warps[0]
        self.registers = {"%tid.x": thread.astype(U32), "%ctaid.x": blocks[block],
                          "%ntid.x": np.full_like(block, threads, U32),
                          "global_smem": np.zeros_like(block, U32)}
        self.at, self.lane = np.zeros_like(block), np.arange(len(block), dtype=U32) % 32
        self.base = {"global": 0, "shared": shared.ctypes.data + block * shared.shape[1]}
        self.who = {"global": block * threads + thread, "shared": block * threads + thread // 32}
        self.shared_size = shared.shape[1]

    def run(self):
        """To the next barrier (True) or the end (False). RuntimeError begins with the line of
        PTX; it is NotImplementedError where the line is none that is written here."""
        end = len(self.code)
        while self.at.min() < end:
            here, active = self.ready()
            while True:
                guard, name, operands, line = self.code[here]
                here += 1
                try:
                    self.on = active & self.holds(guard)
                    need(guard is None or here - 1 not in self.whole, "guarded")
                    if name[0] == "bar":
                        need(name == ["bar", "sync"] and operands == ["0"])
                        need(active.all(), "not every thread comes to it")
                        self.at[:] = here
                        return True
                    if name[0] in ("bra", "ret", "exit"):
                        need(name[1:] in ([], ["uni"]))
                        need(len(operands) == (name[0] == "bra"))
                        self.at[active] = here
                        self.at[self.on] = self.labels[operands[0]] if operands else end
                        break
                    if self.on.any():
                        getattr(self, "do_" + name[0], self.do)(name, *operands)
                except MemoryError as e:
                    raise RuntimeError(f"{line} {e}") from e
                except NotImplementedError as e:
                    raise unknown(line, self.program, "warps.py", str(e)) from e
                except Exception as e:  # a form that the method does not expect
                    why = f"{type(e).__name__}: {e}"
                    raise unknown(line, self.program, "warps.py", why) from e
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
        p = self.get(guard.removeprefix("!"), KINDS["pred"])
        return ~p if guard[0] == "!" else p

    def get(self, operand, kind, cut=False):
        """A register or a number, one value a thread; of a wider register its low bits if cut."""
        if operand in self.registers:
            value = self.registers[operand]
            more = value.itemsize // kind.itemsize
            need(value.itemsize == kind.itemsize or cut and more, f"{operand} is no {kind}")
            return value.view(f"u{kind.itemsize}")[::more].view(kind) if more > 1 else \
                value.view(kind)
        if operand[0] == "%":  # never written: a NaN
            size = self.sizes[operand.rstrip("0123456789")]
            return np.full(len(self.at), -1, f"i{size}").view(f"u{kind.itemsize}")[
                ::size // kind.itemsize].view(kind)
        bits = re.sub("^0[fFdD](?=[0-9A-Fa-f])", "0x", operand).rstrip("U")
        bits = int(bits, 0) % (1 << 8 * kind.itemsize)
        return np.full(len(self.at), bits, f"u{kind.itemsize}").view(kind)

    def put(self, register, value):
        need(NAMES.fullmatch(register), register)
        if not self.on.all():
            value = np.where(self.on, value, self.get(register, value.dtype))
        self.registers[register] = np.ascontiguousarray(value)

    # ---- instructions, by their names ----

    def do(self, name, out, *operands):
        """out = what a name without a method of its own makes of operands of one type."""
        verb, *modifiers, kind = name
        kind = KINDS[kind]
        need(tuple(modifiers) in MODIFIERS[verb, "f" if kind.kind == "f" else "i"])
        need(len(operands) == 1 + (verb in BINARY))
        need(verb != "div" or kind.itemsize == 4)
        a, *more = (self.get(o, kind) for o in operands)
        if modifiers in (["wide"], ["hi"]):
            a, more = wide(a), [wide(more[0])]
        value = BINARY[verb](a, *more) if more else UNARY[verb](a)
        self.put(out, (value >> 8 * kind.itemsize).astype(kind) if modifiers == ["hi"] else value)

    def do_rsqrt(self, name, out, a):
        need(name[1:] == ["approx", "ftz", "f32"])
        self.put(out, rsqrt(self.get(a, F32)))

    def do_fma(self, name, out, *operands):
        need(name[1:] == ["rn", "f32"])
        self.put(out, fma(*(self.get(o, F32) for o in operands)))

    def do_mad(self, name, out, a, b, c):
        _, how, kind = name
        need(how in ("lo", "wide") and kind[0] != "f")
        a, b = (self.get(o, KINDS[kind]) for o in (a, b))
        a, b = (wide(a), wide(b)) if how == "wide" else (a, b)
        self.put(out, a * b + self.get(c, a.dtype))

    def do_shl(self, name, out, a, n):
        verb, kind = name
        self.put(out, shift(verb, self.get(a, KINDS[kind]), self.get(n, U32)))
    do_shr = do_shl

    def do_bfe(self, name, out, a, start, length):
        need(name[1:] in (["u32"], ["s32"]))
        a, length = self.get(a, KINDS[name[1]]), self.get(length, U32)
        up = 64 - length
        a = shift("shl", shift("shr", wide(a), self.get(start, U32)), up)
        self.put(out, shift("shr", a, up).astype(KINDS[name[1]]))

    def do_bfi(self, name, out, a, b, start, length):
        a, b = (self.get(o, KINDS[name[1]]) for o in (a, b))
        start, length = (self.get(o, U32) for o in (start, length))
        mask = shift("shl", ~shift("shl", ~(0 * a), length), start)
        self.put(out, (b & ~mask) | (shift("shl", a, start) & mask))

    def do_prmt(self, name, out, a, b, pick):
        """Each byte one of the eight of a and b, or where its bit 3 is set that one's sign."""
        need(name == ["prmt", "b32"])
        given = np.stack([self.get(a, U32), self.get(b, U32)], -1).view(np.uint8)
        pick = self.get(pick, U32)[:, None] >> np.arange(0, 16, 4, dtype=U32)
        byte = np.take_along_axis(given, (pick & 7).astype(int), 1)
        self.put(out, np.where(pick & 8, 0 - (byte >> 7), byte).astype(np.uint8).view(U32)[:, 0])

    def do_lop3(self, name, out, a, b, c, table):
        """Of bits a, b, c the table's bit 4a + 2b + c."""
        need(name == ["lop3", "b32"])
        a, b, c = (self.get(o, U32) for o in (a, b, c))
        value = np.zeros_like(a)
        for i in range(8):
            if int(table, 0) >> i & 1:
                value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        self.put(out, value)

    def do_setp(self, name, out, a, b):
        """Ordered: false where there is a NaN."""
        _, compare, kind = name
        a, b = self.get(a, KINDS[kind]), self.get(b, KINDS[kind])
        self.put(out, COMPARE[compare](a, b) & (a == a) & (b == b))

    def do_selp(self, name, out, a, b, p):
        _, kind = name
        a, b = self.get(a, KINDS[kind]), self.get(b, KINDS[kind])
        self.put(out, np.where(self.get(p, KINDS["pred"]), a, b))

    def do_cvt(self, name, out, *operands):
        """To a narrower float by .rn alone; of two operands the first is the upper half."""
        *how, to, source = name[1:]
        need(how == (["rn"] if to[0] in "fb" and source != "bf16" and source[1:] != "16"
                     and (source, to) != ("f32", "f64") else []))
        kind = KINDS["u16" if source == "bf16" else source]
        pair = [convert(self.get(o, kind, cut=True), to.removesuffix("x2"), source)
                for o in operands]
        need(len(pair) == 1 + to.endswith("x2"))
        self.put(out, np.stack(pair[::-1], -1).view(U32)[:, 0] if pair[1:] else pair[0])

    def do_mov(self, name, out, a):
        """A register, or a vector of halves to or from one."""
        _, kind = name
        kind = KINDS[kind]
        if out[0] == "{":
            low, high = NAMES.findall(out)
            parts = self.get(a, kind).view(f"u{kind.itemsize // 2}")
            self.put(low, parts[::2])
            self.put(high, parts[1::2])
        elif a[0] == "{":
            half = np.dtype(f"u{kind.itemsize // 2}")
            low, high = (self.get(n, half) for n in NAMES.findall(a))
            self.put(out, np.stack((low, high), -1).view(kind)[:, 0])
        else:
            self.put(out, self.get(a, kind))

    def do_shfl(self, name, out, a, distance, clamp, members):
        a, distance, clamp, members = (self.get(o, U32) for o in (a, distance, clamp, members))
        whole = (clamp == 31) & (members == 2**32 - 1) | ~self.on
        need(name[1:] == ["sync", "bfly", "b32"])
        need(whole.all(), "of a part of a warp")
        out, _, valid = out.partition("|")
        other = np.arange(len(a)) // 32 * 32 + (self.lane ^ distance) % 32
        self.put(out, a[other])
        if valid:
            self.put(valid, np.ones(len(a), bool))

    # ---- memory ----

    def places(self, space, operand, size):
        """Addresses of the active threads, and who they are."""
        register, _, offset = operand.strip("[] ").partition("+")
        at = self.get(register.strip(), U64 if space == "global" else U32).astype(np.int64)
        at = at + int(offset or "0", 0)
        if space == "shared" and ((at < 0) | (at + size > self.shared_size))[self.on].any():
            raise MemoryError("outside of the block's shared memory")
        return (at + self.base[space])[self.on], self.who[space][self.on]

    def bytes_of(self, registers, kind):
        """The registers of each active thread, side by side; of a wider one its low bytes."""
        return np.concatenate([self.get(r, kind, cut=True)[self.on, None].view(np.uint8)
                               for r in registers], 1)

    def fill(self, registers, kind, data):
        """The opposite of bytes_of; a wider register is filled with the sign, if any."""
        for register, part in zip(registers, np.ascontiguousarray(data).view(kind).T, strict=True):
            size = self.sizes.get(register.rstrip("0123456789"), kind.itemsize)
            value = np.zeros(len(self.on), f"{kind.kind}{size}")
            value[self.on] = part
            self.put(register, value)

    def do_ld(self, name, out, address):
        space, kind, registers = name[1], KINDS[name[-1]], NAMES.findall(out)
        size = len(registers) * kind.itemsize
        need(name[2:-1] == [f"v{len(registers)}"] * ("{" in out and len(registers) > 1))
        if space == "param":
            index = int(re.fullmatch(r"\[\w+_param_(\d+)\]", address)[1])
            value, bytes_ = self.parameters[index]
            need(bytes_ == size, f"a parameter of {bytes_} bytes")
            data = np.full((self.on.sum(), 1), int(value) % 2**64, U64).view(np.uint8)[:, :size]
        else:
            at, who = self.places(space, address, size)
            data = self.memory[space].load(at, size, who)
        self.fill(registers, kind, data)

    def do_st(self, name, address, given):
        registers = NAMES.findall(given)
        need(name[2:-1] == [f"v{len(registers)}"] * (len(registers) > 1))
        data = self.bytes_of(registers, KINDS[name[-1]])
        at, who = self.places(name[1], address, data.shape[1])
        self.memory[name[1]].store(at, data, who)

    def do_atom(self, name, out, address, given):
        """One thread after another; a race with what is no atom."""
        need(name == ["atom", "global", "add", "f64"])
        memory, kind, all_ = self.memory["global"], KINDS["f64"], np.array([-1])
        at, _ = self.places("global", address, 8)
        old = np.zeros(len(self.on), kind)
        for i, a in zip(np.flatnonzero(self.on), at):
            was = memory.load(a[None], 8, all_).view(kind)
            old[i] = was[0, 0]
            memory.store(a[None], (was + self.get(given, kind)[i]).view(np.uint8), all_)
        self.put(out, old)

    def rows(self, name, operand):
        """Places, [warp, matrix, row], of the rows of 8 x 8 matrices of 16 bits, and who uses
        them, [warp, thread, matrix]: thread 8 m + r gives where row r of matrix m is."""
        trans = ["trans"] * (name[0] == "ldmatrix" and "trans" in name)
        need(name[1:] == ["sync", "aligned", "m8n8", "x4", *trans, "shared", "b16"])
        rows, who = self.places("shared", operand, 16)
        if (rows % 16).any():
            raise MemoryError("a row of 16 bytes is not aligned")
        return rows.reshape(-1, 4, 8), who.repeat(4)

    def in_rows(self, rows):
        """Places of the four bytes that a thread holds of each matrix: two neighbours of a row."""
        thread = np.arange(32)
        return (rows[:, :, thread // 4] + 4 * (thread % 4)).swapaxes(1, 2).ravel()

    def do_ldmatrix(self, name, out, address):
        rows, who = self.rows(name, address)
        if "trans" not in name:
            data = self.memory["shared"].load(self.in_rows(rows), 4, who)
        else:  # two neighbours of a column
            thread = np.arange(32)
            halves = [(rows[:, :, 2 * (thread % 4) + k] + 2 * (thread // 4)).swapaxes(1, 2).ravel()
                      for k in (0, 1)]
            data = np.concatenate([self.memory["shared"].load(at, 2, who) for at in halves], 1)
        self.fill(NAMES.findall(out), U32, data.reshape(-1, 16))

    def do_stmatrix(self, name, address, given):
        rows, who = self.rows(name, address)
        data = self.bytes_of(NAMES.findall(given), U32)
        self.memory["shared"].store(self.in_rows(rows), data.reshape(-1, 4), who)
