// The noise contract and the affine update, one source for two machines: NVRTC compiles it
// for the GPU, a C++ compiler for the CPU. Contraction must be off in both.
//   out = ((c0*u0 + c1*u1) + c2*u2 ...) + cz*z
//   z = normal(seed, sample, element, step, tag)
// The macros STORAGE, OPERANDS, DRAWS, CLIP, SUMS, KEYS, and on a GPU ALIGNED, choose a
// variant. With KEYS each row has a seed and an id of its own.
// With CLIP, u1 is first replaced by min(max(p0*u0 + p1*u1, lo), hi). With SUMS the squares
// of the result e are added up a row: 1 stores nothing else, 2 the loss's gradient
// ((2*w)*e)*c0, 3 e. 4 stores nothing and adds up those of c0*u0, and those of cz*z.
#ifdef __CUDACC_RTC__
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")
FN float as_float(u32 i) { return __uint_as_float(i); }
FN u32 as_uint(float f) { return __float_as_uint(f); }
FN float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
// two constants would make two instructions of it
FN u32 and_or(u32 w, u32 keep, u32 set) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "r"(keep), "r"(set));
    return r;
}
// sqrt.rn without its range check, seven instructions: 1e-7 < x < 46 here
FN float root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    float s = x * y, h = y * .5f;
    return __fmaf_rn(__fmaf_rn(-s, s, x), h, s);
}
// left to itself the compiler adds 0 to the high half of every product in a loop
FN u64 mul32(u64 a, u32 m) {
    u64 product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"((u32)a), "r"(m));
    return product;
}
#else
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;
#define FN inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 10")
FN float as_float(u32 i) { float f; memcpy(&f, &i, 4); return f; }
FN u32 as_uint(float f) { u32 i; memcpy(&i, &f, 4); return i; }
FN float root(float x) { return sqrtf(x); }
FN u32 and_or(u32 w, u32 keep, u32 set) { return (w & keep) | set; }
// a machine without the instruction: libm's function takes twice as long as float64 does,
// which rounds the same wherever the noise is
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(LIBM_FMA)
enum { HAS_FMA = 1 };
#else
enum { HAS_FMA = 0 };
#endif
FN float fused(float x, float y, float z) {
    return HAS_FMA ? __builtin_fmaf(x, y, z) : (float)((double)x * y + z);
}

// eight, four or two counters at once: 64-bit products of the low halves. GCC would take
// three instructions for one if it were left to find them.
#ifdef __SSE2__
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
enum { LANES = 8 };
#define MUL_LOW(a, m) _mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(m))
#elif defined(__AVX2__)
enum { LANES = 4 };
#define MUL_LOW(a, m) _mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(m))
#elif defined(__SSE2__)
enum { LANES = 2 };
#define MUL_LOW(a, m) _mm_mul_epu32((__m128i)(a), _mm_set1_epi64x(m))
#else
enum { LANES = 2 };
#define MUL_LOW(a, m) (((a) & 0xffffffffu) * m)
#endif
typedef u64 Lanes __attribute__((vector_size(8 * LANES)));
typedef u32 Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef u64 Pairs __attribute__((vector_size(8 * LANES), aligned(4), may_alias));
FN Lanes mul32(Lanes a, u32 m) { return (Lanes)MUL_LOW(a, m); }
FN u64 mul32(u64 a, u32 m) { return (u64)(u32)a * m; }
#endif

// ---- the noise contract (minidiff/noise.py) ----

struct Key { u64 seed; i64 id; };  // a row's, with KEYS

// W is u64, or on the CPU a vector of them; only the low 32 bits of a word count
template <class W, class K> FN void philox(W &c0, W &c1, W &c2, W &c3, K k0, K k1) {
    UNROLL for (int i = 0; i < 10; i++) {
        W p0 = mul32(c0, 0xD2511F53u), p1 = mul32(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c1 = p1;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

FN float horner(float, float p) { return p; }
template <class... C> FN float horner(float x, float p, float c, C... rest) {
    return horner(x, fused(p, x, c), rest...);
}

FN float radius(u32 w) {
    int i = (int)as_uint((float)w);
    int m = (int)and_or((u32)i, 0x7fffff, 0x4f000000);
    int e = m - i;
    e = e < 1 << 28 ? e : 1 << 28;
    e = e > 0 ? e : 0;
    float t = fused(as_float((u32)m), -0x1p-31f, 2.f);  // exact, and so the same unfused
    float p = horner(t, .005525609944015741f, -.012809298001229763f, .018886156380176544f,
                     -.005654762499034405f, .01648067869246006f, .030460314825177193f,
                     .08340802788734436f, .2499976009130478f);
    return root(fused((float)e, 1.6525916635146132e-07f, fused(t * t, p, t)));
}

FN void cos_sin(u32 w, float &c, float &s) {
    float g = as_float(and_or(w, 0x7ffffe, 0x40000001)) - 3.f;
    float y = g * g;
    float sin = horner(y, -3.6274606827646494e-05f, .0024905067402869463f,
                       -.0807456523180008f, .7853981852531433f) * g;
    float cos = horner(y, -.0003189094422850758f, .015850016847252846f,
                       -.30842435359954834f, 1.f);
    bool exchanged = (int)(w << 1) < 0;  // bit 30
    c = exchanged ? sin : cos;
    s = exchanged ? cos : sin;
}

FN void pair(u32 w0, u32 w1, float &z0, float &z1) {
    float r = as_float(as_uint(radius(w0)) ^ (w1 & 1u << 31)), c, s;
    cos_sin(w1, c, s);
    z0 = r * c;
    z1 = r * s;
}

// ---- storage: F32, BF16 and F16 hold 32 or 16 bits; arithmetic is float32 ----

struct F32 {
    float v;
    static FN float load(F32 x) { return x.v; }
    static FN F32 store(float f) { F32 x; x.v = f; return x; }
};

struct BF16 {
    unsigned short v;
    static FN float load(BF16 x) { return as_float((u32)x.v << 16); }
    static FN BF16 store(float f) {
        BF16 x;
#ifdef __CUDACC_RTC__
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.v) : "f"(f));
#else
        u32 i = as_uint(f), r = (i + 0x7fff + ((i >> 16) & 1)) >> 16;
        x.v = (unsigned short)((i & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : r);
#endif
        return x;
    }
};

struct F16 {
    unsigned short v;
    static FN float load(F16 x) {
#ifdef __CUDACC_RTC__
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.v));
        return f;
#else
        u32 m = (u32)(x.v & 0x7fff) << 13, finite = as_uint(as_float(m) * 0x1p112f);
        u32 sign = (u32)(x.v & 0x8000) << 16;
        return as_float((m >= 0x0f800000 ? m | 0x7f800000 : finite) | sign);
#endif
    }
    static FN F16 store(float f) {
        F16 x;
#ifdef __CUDACC_RTC__
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.v) : "f"(f));
#else
        u32 i = as_uint(f), m = i & 0x7fffffff;
        u32 normal = (m + 0xfff + ((m >> 13) & 1) - 0x38000000) >> 13;
        u32 subnormal = as_uint(as_float(m) + .5f) - 0x3f000000;  // the sum rounds at 2^-24
        u32 r = m < 0x38800000 ? subnormal : normal;
        r = m >= 0x47800000 ? (m > 0x7f800000 ? 0x7e00 : 0x7c00) : r;
        x.v = (unsigned short)(r | (i >> 16 & 0x8000));
#endif
        return x;
    }
};

// ---- the update of one element ----

#define WIDTH (OPERANDS + DRAWS + 4 * CLIP + (SUMS == 2))
enum { TERMS = SUMS == 4 ? 2 : 1, STORES = SUMS != 1 && SUMS != 4 };  // sums a row; whether e

FN float affine(const float *c, float *u, float z) {
    float e = 0.f;
    if (CLIP) {  // NaN passes
        float d = c[WIDTH - 4] * u[0] + c[WIDTH - 3] * u[1];
        d = d < c[WIDTH - 2] ? c[WIDTH - 2] : d;
        u[1] = d > c[WIDTH - 1] ? c[WIDTH - 1] : d;
    }
    UNROLL for (int k = 0; k < OPERANDS; k++) e = k ? e + c[k] * u[k] : c[k] * u[k];
    if (DRAWS && TERMS == 1) e = OPERANDS ? e + c[OPERANDS] * z : c[OPERANDS] * z;
    return e;
}

FN float stored(const float *c, float e) {
    return SUMS == 2 ? ((2.f * c[WIDTH - 1]) * e) * c[0] : e;
}

#ifdef __CUDACC_RTC__
// ---- GPU: a thread moves packs of 16 bytes ----

#define PACK (16 / (int)sizeof(STORAGE))
struct alignas(16) Pack { STORAGE e[PACK]; };

// Elements of a row from x on: a whole pack where rows are aligned, else `count` of them.
FN Pack read(const STORAGE *x, int count) {
    if (ALIGNED) return *(const Pack *)x;
    Pack p;
    UNROLL for (int e = 0; e < PACK; e++)
        if (e < count) p.e[e] = x[e];
    return p;
}

FN void write(STORAGE *x, Pack p, int count) {
    if (ALIGNED) *(Pack *)x = p;
    else UNROLL for (int e = 0; e < PACK; e++)
        if (e < count) x[e] = p.e[e];
}

// One axis of blocks (grid.y ends at 65,535): block = (row tile, column tile). A block is
// blockDim.x >> columns rows by 1 << columns threads, each with `packs` packs of its row.
// coef is [batch, WIDTH] (per_sample) or [rows, WIDTH], whose row is the counter's, held.
extern "C" __global__ void update(STORAGE *out, const STORAGE *u0, const STORAGE *u1,
        const STORAGE *u2, const STORAGE *u3, double *sums, const float *coef,
        const Key *keys, int per_sample, i64 rows, i64 batch, i64 size, u64 seed,
        u32 sample, u32 tag, int columns, int packs, u32 column_tiles, const i64 *counter,
        u32 step) {
    i64 tile = blockIdx.x / column_tiles;
    i64 b = tile * (blockDim.x >> columns) + (threadIdx.x >> columns);
    i64 pack = ((i64)(blockIdx.x % column_tiles) * packs << columns)
        + (threadIdx.x & ((1 << columns) - 1));
    i64 now = counter ? *counter : 0, mine = b < batch ? b : 0;
    i64 row = per_sample ? mine : now < 0 ? 0 : now < rows ? now : rows - 1;
    Key key = KEYS ? keys[mine] : Key{seed, sample + b};
    step += (u32)now;
    float c[WIDTH];
    UNROLL for (int k = 0; k < WIDTH; k++) c[k] = coef[row * WIDTH + k];
    i64 j = pack * PACK, left = b < batch ? size - j : 0;
    const STORAGE *u[4] = {u0 + b * size + j, u1 + b * size + j, u2 + b * size + j,
                           u3 + b * size + j};
    out += b * size + j;
    u32 quad = (u32)(j / 4);
    const int stride = PACK << columns;
    u64 most = left > 0 ? (u64)(left + stride - 1) / PACK >> columns : 0;
    packs = most < packs ? (int)most : packs;
    double squares[TERMS] = {};
    _Pragma("unroll 4") for (int n = 0; n < packs; n++) {
        int count = left < PACK ? (int)left : PACK;
        Pack in[OPERANDS + 1], result;
        UNROLL for (int k = 0; k < OPERANDS; k++) in[k] = read(u[k], count);
        float z[PACK], q[TERMS][PACK];
        UNROLL for (int v = 0; v < PACK / 4 && DRAWS; v++) {
            u64 w0 = quad + v, w1 = (u32)key.id, w2 = step, w3 = tag;
            philox(w0, w1, w2, w3, (u32)key.seed, (u32)(key.seed >> 32));
            pair((u32)w0, (u32)w1, z[4 * v], z[4 * v + 1]);
            pair((u32)w2, (u32)w3, z[4 * v + 2], z[4 * v + 3]);
        }
        UNROLL for (int e = 0; e < PACK; e++) {
            float value[OPERANDS + 1];
            UNROLL for (int k = 0; k < OPERANDS; k++) value[k] = STORAGE::load(in[k].e[e]);
            float sum = affine(c, value, DRAWS ? z[e] : 0.f);
            result.e[e] = STORAGE::store(stored(c, sum));
            float term[2] = {sum, TERMS == 2 ? c[1] * z[e] : 0.f};
            UNROLL for (int t = 0; t < TERMS; t++)
                q[t][e] = ALIGNED || e < count ? term[t] * term[t] : 0.f;
        }
        UNROLL for (int t = 0; t < TERMS; t++)
            UNROLL for (int e = 0; e < PACK && SUMS; e += 4)
                squares[t] += (q[t][e] + q[t][e + 1]) + (q[t][e + 2] + q[t][e + 3]);
        if (STORES) write(out, result, count);
        UNROLL for (int k = 0; k < OPERANDS; k++) u[k] += stride;
        out += stride;
        quad += stride / 4;
        left -= stride;
    }
    if (SUMS) {  // a row's threads are neighbours: a warp adds up before it touches memory
        int lanes = columns < 5 ? 1 << columns : 32;
        bool alone = column_tiles == 1 && columns <= 5;  // a warp has the row: see on_cupy.py
        UNROLL for (int t = 0; t < TERMS; t++) {
            double s = squares[t], *at = sums + b * TERMS + t;
            for (int d = lanes / 2; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
            if (b >= batch || threadIdx.x % lanes) continue;
            if (alone) *at = s;
            else atomicAdd(at, s);
        }
    }
}

#else
// ---- CPU: blocks of up to 256 quads, the noise to the stack, then one pass ----

enum { QUADS = 256 };

struct Job {
    STORAGE *out;
    double *sums;
    const float *coef;
    const Key *keys;
    i64 per_sample, batch, size;
    u64 seed;
    i64 sample, step, tag, threads;
    const STORAGE *u[4];
};

FN float at(float c, i64) { return c; }
FN float at(const float *c, i64 i) { return c[i]; }

// float16 by the CPU's own conversions, a block at a time; all else stays where it lies
template <class T> FN const T *widen(const T *x, F32 *, i64) { return x; }
template <class T> FN T *target(T *x, F32 *) { return x; }
template <class T> FN void narrow(const T *, T *, i64) {}
#ifdef __F16C__
static const F32 *widen(const F16 *x, F32 *f, i64 n) {
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        __m128i half = _mm_loadu_si128((const __m128i *)(x + i));
        _mm256_storeu_ps(&f[i].v, _mm256_cvtph_ps(half));
    }
    for (; i < n; i++) f[i].v = F16::load(x[i]);
    return f;
}

FN F32 *target(F16 *, F32 *f) { return f; }

static void narrow(const F32 *f, F16 *x, i64 n) {
    i64 i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(x + i), _mm256_cvtps_ph(_mm256_loadu_ps(&f[i].v), 0));
    for (; i < n; i++) x[i] = F16::store(f[i].v);
}
#endif

// C is a float, one coefficient for the block, or a pointer, one an element. Fills sum. out
// may be an operand itself: nothing is carried from one element to the next.
template <class T, class C>
static void pass(T *out, const T *const *u, const float *z, const C *c, i64 n,
                 float (*sum)[4 * QUADS]) {
#pragma GCC ivdep
    for (i64 i = 0; i < n; i++) {
        float c_i[WIDTH], u_i[OPERANDS + 1];
        UNROLL for (int k = 0; k < WIDTH; k++) c_i[k] = at(c[k], i);
        UNROLL for (int k = 0; k < OPERANDS; k++) u_i[k] = T::load(u[k][i]);
        float e = affine(c_i, u_i, DRAWS ? z[i] : 0.f);
        if (SUMS) sum[0][i] = e;
        if (TERMS == 2) sum[1][i] = c_i[1] * z[i];
        if (STORES) out[i] = T::store(stored(c_i, e));
    }
}

// The words of LANES counters from i on: w0 w2 of one after the other in `even`, w1 w3 in
// `odd`; of half a quad w0 alone, and w1.
template <class K> FN void draw(const Job &job, Lanes quad, Lanes sample, K k0, K k1,
                                u32 *even, u32 *odd, i64 i, bool half) {
    Lanes c2 = quad * 0 + (u32)job.step, c3 = quad * 0 + (u32)job.tag;
    philox(quad, sample, c2, c3, k0, k1);
    if (half) {
        *(Words *)(even + i) = __builtin_convertvector(quad, Words);
        *(Words *)(odd + i) = __builtin_convertvector(sample, Words);
        return;
    }
    *(Pairs *)(even + 2 * i) = (Pairs)((quad & 0xffffffff) | c2 << 32);
    *(Pairs *)(odd + 2 * i) = (Pairs)((sample & 0xffffffff) | c3 << 32);
}

// Operands and result of LANES counters come to the cache while words are made: else a core
// computes and waits for memory in turn.
FN void fetch(const Job &job, i64 start) {
    for (i64 line = 0; line < 4 * LANES * (i64)sizeof(STORAGE); line += 64) {
        for (int k = 0; k < OPERANDS; k++)
            __builtin_prefetch((const char *)(job.u[k] + start) + line);
        if (STORES) __builtin_prefetch((const char *)(job.out + start) + line, 1);
    }
}

FN u64 seed_of(const Job &job, i64 b) { return KEYS ? job.keys[b].seed : job.seed; }
FN u32 id_of(const Job &job, i64 b) { return KEYS ? job.keys[b].id : job.sample + b; }
FN Lanes lanes(const u32 *x) { return __builtin_convertvector(*(const Words *)x, Lanes); }

// z for `rows` rows from b, elements j ... j+n of each
static void noise(const Job &job, i64 b, i64 rows, i64 j, i64 n, float *z) {
    u32 quad[QUADS], sample[QUADS], k0[QUADS], k1[QUADS], even[2 * QUADS], odd[2 * QUADS];
    const i64 quads = (n + 3) / 4, total = rows * quads, start = b * job.size + j;
    const u64 seed = seed_of(job, b);
    if (rows == 1) {
        Lanes c0 = {}, c1 = c0 + id_of(job, b);
        for (int l = 0; l < LANES; l++) c0[l] = (u64)(j / 4 + l);
        for (i64 i = 0; i < total; i += LANES, c0 += (u64)LANES) {
            fetch(job, start + 4 * i);
            draw(job, c0, c1, (u32)seed, (u32)(seed >> 32), even, odd, i, n == 2);
        }
    } else {
        auto put = [&](i64 i, i64 r, i64 q) {
            quad[i] = (u32)(j / 4 + q);
            sample[i] = id_of(job, b + r);
            u64 key = seed_of(job, b + r);
            k0[i] = (u32)key, k1[i] = (u32)(key >> 32);
        };
        if (quads == 1)  // a loop that the compiler makes vectors of
            for (i64 r = 0; r < rows; r++) put(r, r, 0);
        else for (i64 r = 0; r < rows; r++)
            for (i64 q = 0; q < quads; q++) put(r * quads + q, r, q);
        for (i64 i = 0; i < total; i += LANES) {
            fetch(job, start + 4 * i);
            Lanes c0 = lanes(quad + i), c1 = lanes(sample + i);
            if (KEYS) draw(job, c0, c1, lanes(k0 + i), lanes(k1 + i), even, odd, i, n == 2);
            else draw(job, c0, c1, (u32)seed, (u32)(seed >> 32), even, odd, i, n == 2);
        }
    }
    const i64 pairs = n == 2 ? total : 2 * total;  // half of each quad leaves no gap
#pragma omp simd
    for (i64 i = 0; i < pairs; i++) pair(even[i], odd[i], z[2 * i], z[2 * i + 1]);
    if (n % 4 && n != 2)  // close the gap after each row's last quad
        for (i64 r = 1; r < rows; r++)
            for (i64 i = 0; i < n; i++) z[r * n + i] = z[r * 4 * quads + i];
}

// `rows` rows from b, elements j ... j+n of each (a whole row unless rows is 1)
static void block(const Job &job, i64 b, i64 rows, i64 j, i64 n, double *sums, i64 stride) {
    float z[4 * QUADS], sum[TERMS][4 * QUADS], wide[WIDTH][4 * QUADS];
    F32 buffer[5][4 * QUADS];
    const float *wides[WIDTH], *c = job.coef + (job.per_sample ? b * WIDTH : 0);
    decltype(widen(job.u[0], buffer[0], 0)) u[4];
    auto out = target(job.out + b * job.size + j, buffer[4]);
    if (DRAWS) noise(job, b, rows, j, n, z);
    for (int k = 0; k < OPERANDS; k++)
        u[k] = widen(job.u[k] + b * job.size + j, buffer[k], rows * n);
    if (rows == 1 || !job.per_sample) pass(out, u, z, c, rows * n, sum);
    else {
        for (int k = 0; k < WIDTH; k++) {
            wides[k] = wide[k];
            for (i64 r = 0; r < rows; r++)
                for (i64 i = 0; i < n; i++) wide[k][r * n + i] = c[r * WIDTH + k];
        }
        pass(out, u, z, wides, rows * n, sum);
    }
    if (STORES) narrow(out, job.out + b * job.size + j, rows * n);
    for (i64 k = 0; SUMS && k < rows * TERMS; k++) {
        i64 r = k / TERMS, t = k % TERMS;
        const float *e = sum[t] + r * n;
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (i64 i = 0; i < n / 4 * 4; i += 4)
            total += (e[i] * e[i] + e[i + 1] * e[i + 1])
                + (e[i + 2] * e[i + 2] + e[i + 3] * e[i + 3]);
        float q[3] = {0, 0, 0};
        for (i64 i = n / 4 * 4; i < n; i++) q[i % 4] = e[i] * e[i];
        sums[r * stride * TERMS + t] = total + ((q[0] + q[1]) + q[2]);
    }
}

// While it lives its thread rounds to nearest, keeps subnormals and traps nothing, whatever
// the caller has set, as torch.set_flush_denormal does; other threads keep what they had
struct Exact {
#ifdef __SSE2__
    const u32 given = _mm_getcsr();
    bool other() const { return (given & 0xffc0) != 0x1f80; }  // but for flags raised
    Exact() { if (other()) _mm_setcsr(0x1f80); asm volatile("" ::: "memory"); }
    ~Exact() { asm volatile("" ::: "memory"); if (other()) _mm_setcsr(given); }
#else
    fenv_t given;
    Exact() { fegetenv(&given), fesetenv(FE_DFL_ENV); }
    ~Exact() { fesetenv(&given); }
#endif
};

extern "C" int minidiff_has_fma() { return HAS_FMA; }

extern "C" void minidiff_update(const Job *given) {
    const Job job = *given;
    i64 quads = (job.size + 3) / 4;
    i64 rows = quads < QUADS ? QUADS / quads : 1;             // rows a block, or
    i64 columns = (quads + QUADS - 1) / QUADS;                // blocks a row
    i64 blocks = (job.batch + rows - 1) / rows * columns;
    const int threads = (int)job.threads;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
    for (i64 i = 0; i < blocks; i++) {
        i64 b = i / columns * rows, j = i % columns * 4 * QUADS;
        i64 r = job.batch - b < rows ? job.batch - b : rows;
        i64 n = job.size - j < 4 * QUADS ? job.size - j : 4 * QUADS;
        Exact exact;
        double *sums = job.sums + (b * columns + i % columns) * TERMS;
        block(job, b, r, j, n, sums, columns);
    }
}
#endif
