"""The contract in Triton, for CUDA tensors; for CPU tensors under TRITON_INTERPRET=1.

A program owns a tile of ROWS samples by COLUMNS quads. Philox multiplies 32 by 32 to 64 bits
in one instruction; a quad's four normals are joined so that a thread stores 16 bytes.
"""

import os
from functools import cache

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

NAME = "triton"
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
TAKES = "tensor" if INTERPRET else "cuda"
QUADS = 512   # quads a program, about: 16 elements a thread of 128
WARPS = 4


@cache
def missing():
    """None, or what Triton lacks here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed: pip install torch"
    if not triton:
        return "triton is not installed: pip install triton"
    if INTERPRET or torch.cuda.is_available():
        return None
    return "no CUDA device; TRITON_INTERPRET=1 runs it in Triton's interpreter, slowly"


if triton:
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
    def radius(w, INTERPRETED: tl.constexpr):
        u = w.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        i = tl.minimum(u.to(tl.int32, bitcast=True), 0x3F7FFFFF)
        e = (i - 0x3F2AAAAB) & -0x800000
        t = (i - e).to(tl.float32, bitcast=True) - 1.
        p = t * -.280527225337371 + .30777078035381056
        p = p * t + -.2799161311212554
        p = p * t + .32831921841281836
        p = p * t + -.40022337369302013
        p = p * t + .5001563777039499
        p = p * t + -.666663962746524
        p = p * t + .9999987215778645
        v = ((t * t) * p - 2. * t) + e.to(tl.float32) * -1.6525916589735634e-07
        if INTERPRETED:
            return tl.sqrt_rn(v)
        # sqrt.rn without its range check: 1e-7 < v < 46
        return tl.inline_asm_elementwise(
            "{ .reg .f32 y, s, h; rsqrt.approx.ftz.f32 y, $1; mul.rn.f32 s, $1, y; "
            "mul.rn.f32 h, y, 0f3F000000; neg.f32 y, s; fma.rn.f32 y, y, s, $1; "
            "fma.rn.f32 $0, y, h, s; }", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def cos_sin(w):
        q = (w + 0x20000000) >> 30
        a = (w - (q << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
        a2 = a * a
        p = a2 * -.00019515283191224998 + .008332160761852269
        p = p * a2 + -.16666654609548479
        sin = (((p * a2) * a) + a).to(tl.uint32, bitcast=True)
        p = a2 * -.0013591853552147096 + .04165577704174116
        p = p * a2 + -.49999884745877027
        cos = (p * a2 + 1.).to(tl.uint32, bitcast=True)
        swap = (cos ^ sin) & (0 - (q & 1))
        cos = cos ^ swap ^ (((q + 1) & 2) << 30)
        sin = sin ^ swap ^ ((q & 2) << 30)
        return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)

    @triton.jit
    def normal4(quad, sample, step, tag, k0, k1, INTERPRETED: tl.constexpr):
        """[rows, quads, 2, 2]: z0 z1 z2 z3 of each quad."""
        quad, sample = tl.broadcast(quad, sample)
        w0, w1, w2, w3 = philox(quad, sample, step, tag, k0, k1)
        r0 = radius(w0, INTERPRETED)
        r1 = radius(w2, INTERPRETED)
        c0, s0 = cos_sin(w1)
        c1, s1 = cos_sin(w3)
        return tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1))

    @triton.jit
    def load(ptr, mask, BF16_INTERPRETED: tl.constexpr):
        x = tl.load(ptr, mask=mask, other=0.)
        if BF16_INTERPRETED:  # the interpreter's own conversion loses subnormals
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return x.to(tl.float32)

    @triton.jit
    def store(ptr, x, mask, BF16_INTERPRETED: tl.constexpr):
        if BF16_INTERPRETED:  # and truncates
            i = x.to(tl.uint32, bitcast=True)
            r = ((i + 0x7FFF + ((i >> 16) & 1)) >> 16)
            r = tl.where((i & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, r).to(tl.uint16)
            tl.store(ptr, r.to(tl.bfloat16, bitcast=True), mask=mask)
        else:
            tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["k0", "k1", "sample", "step", "tag", "rows", "packs"])
    def kernel(out, u0, u1, u2, u3, sums, coef, counter, rows, batch, size, packs, tiles,
               k0, k1, sample, step, tag, OPERANDS: tl.constexpr, DRAWS: tl.constexpr,
               CLIP: tl.constexpr, SUMS: tl.constexpr, PER_SAMPLE: tl.constexpr,
               COUNTED: tl.constexpr,
               ALIGNED: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
               BF16_INTERPRETED: tl.constexpr):
        LOSS: tl.constexpr = SUMS and OPERANDS > 0 and DRAWS > 0
        WIDTH: tl.constexpr = OPERANDS + DRAWS + 4 * CLIP + LOSS
        pid = tl.program_id(0)
        b = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        j = (pid % tiles).to(tl.int64) * (COLUMNS * 4 * V) + tl.arange(0, COLUMNS * 4 * V)[None, :]
        if ALIGNED:  # the compiler must see the row's length as a multiple of a pack
            length = packs.to(tl.int64) * (4 * V)
            at = b * length + j
            mask = (b < batch) & (j < length)
        else:
            at = b * size + j
            mask = (b < batch) & (j < size)
        if COUNTED:
            now = tl.load(counter)
            c = coef + tl.maximum(tl.minimum(now, rows - 1), 0) * WIDTH
            now = now.to(tl.uint32)
            c_mask = None
        elif PER_SAMPLE:
            c = coef + b * WIDTH
            now = step.to(tl.uint32)
            c_mask = b < batch
        else:
            c = coef
            now = step.to(tl.uint32)
            c_mask = None
        if OPERANDS > 0:
            x0 = load(u0 + at, mask, BF16_INTERPRETED)
            total = tl.load(c, mask=c_mask) * x0
        if OPERANDS > 1:
            x1 = load(u1 + at, mask, BF16_INTERPRETED)
            if CLIP:
                x1 = tl.load(c + WIDTH - 4, mask=c_mask) * x0 \
                    + tl.load(c + WIDTH - 3, mask=c_mask) * x1
                lo = tl.load(c + WIDTH - 2, mask=c_mask)
                hi = tl.load(c + WIDTH - 1, mask=c_mask)
                x1 = tl.where(x1 < lo, lo, x1)
                x1 = tl.where(x1 > hi, hi, x1)
            total = total + tl.load(c + 1, mask=c_mask) * x1
        if OPERANDS > 2:
            total = total + tl.load(c + 2, mask=c_mask) * load(u2 + at, mask, BF16_INTERPRETED)
        if OPERANDS > 3:
            total = total + tl.load(c + 3, mask=c_mask) * load(u3 + at, mask, BF16_INTERPRETED)
        if DRAWS:
            ids = (b + sample).to(tl.uint32)
            t = tl.zeros_like(ids) + tag.to(tl.uint32)
            key0 = k0.to(tl.uint32)
            key1 = k1.to(tl.uint32)
            quad = (column * V).to(tl.uint32)
            z = normal4(quad, ids, now, t, key0, key1, INTERPRETED)
            if V == 2:
                z1 = normal4(quad + 1, ids, now, t, key0, key1, INTERPRETED)
                z = tl.permute(tl.join(z, z1), (0, 1, 4, 2, 3))
            z = tl.reshape(z, (ROWS, COLUMNS * 4 * V))
            cz = tl.load(c + OPERANDS, mask=c_mask)
            if OPERANDS > 0:
                total = total + cz * z
            else:
                total = cz * z
        if SUMS:  # a quad's squares in float32, quads in float64
            q = tl.where(mask, total * total, 0.)
            even, odd = tl.split(tl.reshape(q, (ROWS, COLUMNS * V, 2, 2)))
            first, second = tl.split(even + odd)
            partial = tl.sum((first + second).to(tl.float64), axis=1)
            row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            tl.store(sums + row * tiles + pid % tiles, partial, mask=row < batch)
        if LOSS:
            w = tl.load(c + WIDTH - 1, mask=c_mask)
            total = ((2. * w) * total) * tl.load(c, mask=c_mask)
        if LOSS or not SUMS:
            store(out + at, total, mask, BF16_INTERPRETED)


def tile(size, v):
    """(ROWS, COLUMNS, column tiles): powers of two, about QUADS quads together."""
    packs = -(-size // (4 * v))
    columns = min(triton.next_power_of_2(packs), QUADS // v)
    return QUADS // v // columns, columns, -(-packs // columns)


def signed(word):
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def arguments(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=None):
    """The kernel's grid, arguments and constants. sums: a float64 (batch, tiles) or None."""
    batch, size = shape
    first = (operands or [out])[0]
    v = 4 // first.element_size()
    rows, columns, tiles = tile(size, v)
    if INTERPRET:  # one program costs 25 ms there
        rows = min(triton.next_power_of_2(batch), max(1, 8192 // columns))
    counted = hasattr(step, "data_ptr")
    u = [first if out is None else out, *operands, *[first] * (4 - len(operands))]
    aligned = size % (4 * v) == 0 and all(t.data_ptr() % 16 == 0 for t in u)
    constants = dict(
        OPERANDS=len(operands), DRAWS=int(draws), CLIP=int(clips), SUMS=int(sums is not None),
        COUNTED=counted, PER_SAMPLE=not counted and len(coef) > 1, ALIGNED=aligned, V=v,
        ROWS=rows, COLUMNS=columns, INTERPRETED=INTERPRET,
        BF16_INTERPRETED=INTERPRET and "bfloat16" in str(first.dtype))
    return (-(-batch // rows) * tiles,), (
        *u, coef if sums is None else sums, coef, step if counted else coef, len(coef), batch,
        size, size // (4 * v), tiles, signed(seed), signed(seed >> 32), signed(sample),
        0 if counted else signed(step), tag), constants


def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=False):
    """See on_numpy.update. coef: float32 (rows, width), a CUDA tensor or (interpreter) NumPy."""
    import torch
    first = (operands or [out])[0]
    tiles = tile(shape[1], 4 // first.element_size())[2]
    partial = torch.empty((shape[0], tiles), dtype=torch.float64, device=first.device) \
        if sums else None
    grid, args, constants = arguments(out, operands, torch.as_tensor(coef), draws, clips, shape,
                                      seed, sample, step, tag, partial)
    with torch.cuda.device(first.device if first.is_cuda else -1):
        kernel[grid](*args, **constants, num_warps=WARPS, enable_fp_fusion=False)
    return partial.sum(1) if sums else None
