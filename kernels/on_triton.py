"""The contract in Triton, for CUDA tensors; for CPU tensors under TRITON_INTERPRET=1, which
has no bfloat16 of its own: there float32 is computed and torch rounds it.

A program owns a tile of ROWS samples by COLUMNS quads. Philox multiplies 32 by 32 to 64
bits in one instruction; a quad's four normals are joined so that a thread stores 16 bytes.
"""

import os
from functools import cache, partial
from typing import Any, NamedTuple

try:
    import torch
    import triton
    import triton.language as tl
except ImportError as e:
    triton = None
    ABSENT = e.name

from .. import noise
from . import driver
from .launch import Result

NAME = "triton"
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
TAKES = "cpu" if INTERPRET else "cuda"
QUADS = 1024  # a program's, about: 32 elements a thread of 128, where noise is most of it
WARPS = 4


@cache
def why_not():
    """Why Triton cannot run here, or None."""
    if not triton:
        return f"{ABSENT} is not installed: pip install {ABSENT}"
    if INTERPRET:
        return None
    if torch.cuda.is_available():
        return contracts(torch.cuda.get_device_capability())
    return "no CUDA device; TRITON_INTERPRET=1 runs it in Triton's interpreter, slowly"


def contracts(capability):
    """Why Triton does not return these bits on a GPU of this compute capability, or None.

    From sm_100 on there are instructions on two float32 at once. Triton 3.6's assembler
    fuses a product and a sum of them, though it is told not to.
    """
    major, minor = map(int, triton.__version__.split(".")[:2])
    if capability >= (10, 0) and (major, minor) < (3, 7):
        return (f"Triton {triton.__version__} fuses products and sums on this GPU, and so "
                "returns other bits: install Triton 3.7 or newer, or CuPy")
    return None


if triton:
    LOG = tl.constexpr(noise.LOG)
    SIN = tl.constexpr(noise.SIN)
    COS = tl.constexpr(noise.COS)
    LOG_SCALE = tl.constexpr(noise.LOG_SCALE)
    INTERPRETED = tl.constexpr(INTERPRET)

    @triton.jit
    def philox(c0, c1, c2, c3, k0, k1):
        for _ in tl.static_range(10):
            p0 = c0.to(tl.uint64) * 0xD2511F53
            p1 = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c1 = p1.to(tl.uint32)
            c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c3 = p0.to(tl.uint32)
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        return c0, c1, c2, c3

    @triton.jit
    def fma(x, y, z):
        if INTERPRETED:  # older ones round twice; float64 does not, wherever noise is
            return (x.to(tl.float64) * y + z).to(tl.float32)
        return tl.fma(x, y, z)

    @triton.jit
    def horner(x, C: tl.constexpr, N: tl.constexpr):
        p = tl.zeros_like(x) + C[0]
        for k in tl.static_range(1, N):
            p = fma(p, x, tl.zeros_like(x) + C[k])
        return p

    @triton.jit
    def and_or(w, keep, bits):
        if INTERPRETED:
            return (w & keep) | bits
        # two constants would make two instructions of it
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [w, keep, bits],
            dtype=tl.int32, is_pure=True, pack=1)

    @triton.jit
    def clamped_difference(m, i):
        """max(min(m - i, 2^28), 0), which one instruction of sm_90 does in this order."""
        if INTERPRETED:
            return tl.maximum(tl.minimum(m - i, 1 << 28), 0)
        return tl.inline_asm_elementwise(
            "{ .reg .s32 d; sub.s32 d, $1, $2; "
            "min.s32 d, d, 268435456; max.s32 $0, d, 0; }",
            "=r,r,r", [m, i],
            dtype=tl.int32, is_pure=True, pack=1)

    @triton.jit
    def radius(w):
        i = w.to(tl.float32).to(tl.int32, bitcast=True)
        m = and_or(i, 0x7FFFFF, 0x4F000000)
        scale = tl.zeros_like(w).to(tl.float32) - 4.656612873077393e-10
        m_float = m.to(tl.float32, bitcast=True)
        t = fma(m_float, scale, 2.)  # exact, fused or not
        e = clamped_difference(m, i).to(tl.float32)
        p = horner(t, LOG, 8)
        v = fma(t * t, p, t)
        v = fma(e, tl.zeros_like(e) + LOG_SCALE, v)
        if INTERPRETED:
            return tl.sqrt_rn(v)
        # sqrt.rn without its range check: 1e-7 < v < 46
        return tl.inline_asm_elementwise(
            "{ .reg .f32 y, s, h; rsqrt.approx.ftz.f32 y, $1; mul.rn.f32 s, $1, y; "
            "mul.rn.f32 h, y, 0f3F000000; neg.f32 y, s; fma.rn.f32 y, y, s, $1; "
            "fma.rn.f32 $0, y, h, s; }", "=f,f", [v],
            dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def cos_sin(w):
        i = w.to(tl.int32, bitcast=True)
        g = and_or(i, 0x7FFFFE, 0x40000001)
        g = g.to(tl.float32, bitcast=True) - 3.
        y = g * g
        sin = horner(y, SIN, 4) * g
        cos = horner(y, COS, 4)
        exchanged = (w << 1).to(tl.int32, bitcast=True) < 0  # bit 30
        return tl.where(exchanged, sin, cos), tl.where(exchanged, cos, sin)

    @triton.jit
    def pair(w0, w1):
        r = radius(w0).to(tl.uint32, bitcast=True)
        r = r ^ (w1 & 0x80000000)
        r = r.to(tl.float32, bitcast=True)
        cos, sin = cos_sin(w1)
        return r * cos, r * sin

    @triton.jit
    def normal4(quad, sample, step, tag, k0, k1):
        """[rows, quads, 2, 2]: z0 z1 z2 z3 of each quad; a key may be one a row."""
        quad, sample = tl.broadcast(quad, sample)
        w0, w1, w2, w3 = philox(quad, sample, step, tag, k0, k1)
        z0, z1 = pair(w0, w1)
        z2, z3 = pair(w2, w3)
        return tl.join(tl.join(z0, z2), tl.join(z1, z3))

    @triton.jit
    def load(u, at, mask):
        return tl.load(u + at, mask=mask, other=0.).to(tl.float32)

    @triton.jit
    def squares(e, mask):
        """Of each row: a quad's in float32, quads added in float64."""
        ROWS: tl.constexpr = e.shape[0]
        QUADS: tl.constexpr = e.shape[1] // 4
        q = tl.where(mask, e * e, 0.)
        q = tl.reshape(q, (ROWS, QUADS, 2, 2))
        even, odd = tl.split(q)
        first, second = tl.split(even + odd)
        return tl.sum((first + second).to(tl.float64), axis=1)

    # as they are: a 1 would become a constant, and that a kernel of its own
    INTEGERS = "rows batch size packs tiles k0 k1 sample tag step"

    @triton.jit
    def coefficient(c, k, mask):
        return tl.load(c + k, mask=mask)

    @triton.jit(do_not_specialize=INTEGERS.split(),
                do_not_specialize_on_alignment=["counter"])
    def kernel(out, u0, u1, u2, u3, sums, coef, keys,
               rows, batch, size, packs, tiles,
               k0, k1, sample, tag, counter, step,
               OPERANDS: tl.constexpr, DRAWS: tl.constexpr, CLIP: tl.constexpr,
               SUMS: tl.constexpr, KEYS: tl.constexpr, PER_SAMPLE: tl.constexpr,
               COUNTED: tl.constexpr, ALIGNED: tl.constexpr, V: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """A launch: Result is SUMS; V packs of 16 bytes hold so many quads."""
        WIDTH: tl.constexpr = OPERANDS + DRAWS + 4 * CLIP + (SUMS == 2)
        PACK: tl.constexpr = 4 * V
        ELEMENTS: tl.constexpr = COLUMNS * PACK
        pid = tl.program_id(0)
        tile = pid // tiles
        part = pid % tiles
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        b = row[:, None]
        column = part * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        j = part.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
        # the compiler must see an aligned row's length as a multiple of a pack
        length = packs.to(tl.int64) * PACK if ALIGNED else size.to(tl.int64)
        at = b * length + j
        mask = (b < batch) & (j < length)

        # the coefficients: one row, one a sample, or the one that the counter chooses
        c = coef
        c_mask = None
        if PER_SAMPLE:
            c += b * WIDTH
            c_mask = b < batch
        elif COUNTED:
            chosen = tl.maximum(tl.minimum(tl.load(counter), rows - 1), 0)
            c += chosen * WIDTH

        if OPERANDS > 0:
            x = load(u0, at, mask)
            total = coefficient(c, 0, c_mask) * x
        if OPERANDS > 1:
            s = load(u1, at, mask)
            if CLIP:
                p0 = coefficient(c, WIDTH - 4, c_mask)
                p1 = coefficient(c, WIDTH - 3, c_mask)
                lo = coefficient(c, WIDTH - 2, c_mask)
                hi = coefficient(c, WIDTH - 1, c_mask)
                s = p0 * x + p1 * s
                s = tl.where(s < lo, lo, s)
                s = tl.where(s > hi, hi, s)
            total += coefficient(c, 1, c_mask) * s
        for k in tl.static_range(2, OPERANDS):
            u = load(u2 if k == 2 else u3, at, mask)
            total += coefficient(c, k, c_mask) * u

        if DRAWS:
            if KEYS:  # read once a row
                key = tl.load(keys + 2 * b, mask=b < batch)
                key0 = key.to(tl.uint32)
                key1 = (key >> 32).to(tl.uint32)
                ids = tl.load(keys + 2 * b + 1, mask=b < batch).to(tl.uint32)
            else:
                key0 = k0.to(tl.uint32)
                key1 = k1.to(tl.uint32)
                ids = (b + sample).to(tl.uint32)
            t = tl.zeros_like(ids) + tag.to(tl.uint32)
            quad = (column * V).to(tl.uint32)
            n = step.to(tl.uint32)
            if COUNTED:
                n += tl.load(counter).to(tl.uint32)
            z = normal4(quad, ids, n, t, key0, key1)
            if V == 2:
                z1 = normal4(quad + 1, ids, n, t, key0, key1)
                z = tl.permute(tl.join(z, z1), (0, 1, 4, 2, 3))
            z = tl.reshape(z, (ROWS, ELEMENTS))
            z = coefficient(c, OPERANDS, c_mask) * z
            if SUMS != 4:
                total = total + z if OPERANDS > 0 else z

        if SUMS > 0:
            TERMS: tl.constexpr = 2 if SUMS == 4 else 1
            place = sums + (row * tiles + part) * TERMS
            tl.store(place, squares(total, mask), mask=row < batch)
            if SUMS == 4:
                tl.store(place + 1, squares(z, mask), mask=row < batch)
        if SUMS == 2:
            c0 = coefficient(c, 0, c_mask)
            w = coefficient(c, WIDTH - 1, c_mask)
            total = ((2. * w) * total) * c0
        if SUMS != 1 and SUMS != 4:
            tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def tile(size, v, quads):
    """(ROWS, COLUMNS, column tiles): powers of two, about so many quads together."""
    packs = -(-size // (4 * v))
    columns = min(triton.next_power_of_2(packs), quads // v)
    return quads // v // columns, columns, -(-packs // columns)


def loaded(device, found):
    """What Triton compiled, as the driver's kernel."""
    of = found.metadata
    if of.global_scratch_size or of.shared > 48 << 10:
        raise RuntimeError("Triton's kernel wants memory that the launch does not give")
    threads_a_block = 32 * of.num_warps
    return driver.load(device, found.asm["cubin"], of.name, threads_a_block, of.shared)


class Plan(NamedTuple):
    """A launch as Triton takes it.

    blocks: programs. arguments: the kernel's, up to the counter and the step. options: its
    constants and the compiler's, up to COUNTED. sums: float64 (batch, column tiles), (...,
    2) of two terms, or None.
    """

    blocks: int
    arguments: list
    options: dict
    sums: Any


def planned(launch):
    """The Plan of a `launch.Launch`."""
    out, operands, coef = launch.out, launch.operands, launch.coef
    batch, size = out.shape
    v = 4 // out.element_size()
    keyed = launch.keys is not None
    has_rows = launch.rows != "all"
    beside_noise = len(operands) + launch.clips + keyed + has_rows
    two_sums = launch.result == Result.TERMS and v == 2
    few = launch.draws and beside_noise <= 2 and not two_sums
    quads = QUADS if few else QUADS // 2  # else registers would not do for so many
    rows, columns, tiles = tile(size, v, quads)
    if INTERPRET:  # one program costs 25 ms there
        rows = min(triton.next_power_of_2(batch), max(1, 8192 // columns))
    sums = None
    if launch.result:
        sums = out.new_empty((batch, tiles, *launch.sums()[1:]), dtype=torch.float64)
    u = [out, *operands]
    u += [out] * (5 - len(u))
    numbers = [len(coef), batch, size, size // (4 * v), tiles]
    numbers += [noise.signed(word, 32) for word in (
        launch.seed, launch.seed >> 32, launch.sample, launch.tag)]
    tables = [coef if table is None else table for table in (sums, coef, launch.keys)]
    options = {
        "OPERANDS": len(operands),
        "DRAWS": int(launch.draws),
        "CLIP": int(launch.clips),
        "SUMS": launch.result,
        "KEYS": keyed,
        "PER_SAMPLE": launch.rows == "sample",
        "ALIGNED": launch.aligned(),
        "V": v,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
    return Plan(-(-batch // rows) * tiles, [*u, *tables, *numbers], options, sums)


def kind(argument):
    """What Triton tells apart: a tensor's dtype and alignment, whether a number is long."""
    if isinstance(argument, int):
        return argument >> 31 not in (0, -1)
    return argument.dtype, argument.data_ptr() % 16 == 0


kept = {}


def warmed_up(plan, counter):
    """What Triton makes of a Plan; with a counter, a tensor, another than with None."""
    last = counter, 0
    if counter is None:
        last = plan.arguments[0], 0  # a tensor stands for the counter that there is not
    return kernel.warmup(*plan.arguments, *last, grid=(1,), COUNTED=counter is not None,
                         **plan.options)


def compiled(device, plan, counter):
    """The kernel of a Plan, kept by all that Triton makes a difference of."""
    kinds = map(kind, plan.arguments)
    key = device, counter is not None, *kinds, *plan.options.values()
    if key not in kept:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            found = warmed_up(plan, counter)
        kept[key] = loaded(device, found)
    return kept[key]


def prepare(launch):
    """run(step) of a `launch.Launch`: its kernel is kept, its arguments are packed."""
    device, first_step = launch.out.device, launch.first_step
    if INTERPRET:
        return partial(interpreted, launch)
    plan = planned(launch)
    launches = {}

    def prepared(counter):
        """The launch with a counter, or with a number for its step."""
        found = compiled(device, plan, counter)
        return driver.prepare(device, found, plan.blocks, plan.arguments, first_step)

    def run(step):
        counted = not isinstance(step, int)
        if counted not in launches:
            launches[counted] = prepared(step if counted else None)
        launches[counted](step)
        return total(plan.sums)
    return run


def total(sums):
    """What the tiles of each row add up to, or None."""
    if sums is None:
        return None
    return sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)


def interpreted(launch, step):
    """In the interpreter, which has no bfloat16 of its own: float32, rounded by torch."""
    out = launch.out
    if out.dtype == torch.bfloat16:
        operands = [u.float() for u in launch.operands]
        wide = launch._replace(out=out.float(), operands=operands)
        sums = interpreted(wide, step)
        if launch.writes():
            out.copy_(wide.out)
        return sums
    plan = planned(launch)
    counted = not isinstance(step, int)
    last = step, noise.signed(launch.first_step, 32)
    if not counted:
        last = out, noise.signed(step, 32)  # out stands for none
    kernel[plan.blocks,](*plan.arguments, *last, COUNTED=counted, **plan.options)
    return total(plan.sums)
