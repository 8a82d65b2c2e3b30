// segment: drift, boundaries and merges of every token, from k, v and g alone (OPERATOR.md, section 4).
//
//   X_ts = D_ts (k_t . k_s)(v_t . v_s),  E_t = |k_t|^2 |v_t|^2
//   num_t = sum over the open segment's tokens s < t of X_ts  [+ e^Gamma_t k_t^T R v_t, R carried in]
//   I_t = sqrt(2 - 2 num_t / sqrt(E_t N)),  N <- e^{2 g_t} N + 2 num_t + E_t
//
// One block of 256 threads per sequence and value head (grid.x = N HV), S = 32 tokens at a time:
//   1. Gram matrices K K^T and V V^T by mma, norms, Gamma.
//   2. For EVERY possible start a of the open segment, the drift of every later token (lane a walks t), so
//      that what is left to decide in order is a look-up per token: boundary, then a = t.
//   3. The carried segment's k^T R v, by tiles of 16 tokens, only as far as no boundary has come.
//   4. Merges, by one warp: lane i holds slots i and i + 32; a pair's cost and index are one key.
//   5. R, once a chunk, over the tokens of the segment that is open then.
//
// R stands in global memory (the cache's own array; 64 KiB at dk = dv = 128, so in L2) as it was at its newest
// token that is not zero, with |R|^2 taken from R itself once a chunk and the log decay since: c asks no
// scale, and what strong decay leaves of a segment is far below f32.
//
// Numerics: k and v are exact in their planes (f32: 2^-17); R and the decayed keys take two planes whatever the
// dtype. Decisions are those of src/events.rs, bit for bit. The product |k| |v| must lie within 1e-19 and 1e19.
//
// Shared memory: planes x 2 x 32 x (dk + dv + 16) + 9,936 bytes: bf16 27,344 at 128, 43,728 at 256; f16 and f32
// 44,752 and 77,520. Registers: at the end of the file. Predicted, not measured: 150 to 250 clocks a token, most of
// it the merge link (division, shuffles, redux) and step 2's walk, which nothing yet overlaps; so 32,768 tokens in 3
// to 5 ms whatever the heads. The floor is the chain, 70 clocks: 1.3 ms.

#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int S = 32;       // tokens at a time
constexpr int PITCH = S + 1;

// A segment that has decayed by more is 0 in f64 too, and so has no direction.
constexpr float FORGOTTEN = -700.0f;

struct Shared {
    float* x;         // [S][PITCH] K K^T, then X, then sums of X over s >= a, then drift by start
    float* values;    // [S][PITCH] V V^T
    float* whole;     // [S] sums over all s < t, for the carried segment
    float* carried;   // [WARPS][16] partial k^T R v
    Gamma* gamma;     // [S]
    float* energy;    // [S]
    float* factor;    // [S] what keys are multiplied by
    float* score;     // [S]
    float* sums;      // [WARPS]
    int* newest;      // [S] last token before t that is not zero, or -1
    uint8_t* events;  // [S] of a caller's log
    int* start;       // token at which the open segment starts, -1 while it is the carried one
};

// I = sqrt(2 - 2 c), a zero norm giving c = 0.
DEVICE float drift_of(float numerator, float energy, float squared) {
    const float norms = sqrtf(energy) * sqrtf(squared);
    const float cosine = norms > 0 ? fminf(numerator / norms, 1.0f) : 0.0f;
    return sqrtf(fmaxf(2.0f - 2.0f * cosine, 0.0f));
}

// What a segment is known by while its tokens are walked: |R|^2 as it was at its newest token that is not zero.
struct Walk {
    float squared;
    Gamma at;     // Gamma of that token
    float log;    // decay before the chunk since then, carried segments
    // Judges token t, whose numerator is relative to that token.
    METHOD float judge(float numerator, float energy, Gamma gamma) {
        const float since = minus(gamma, at) + log;
        if (since < FORGOTTEN) squared = 0;
        const float score = drift_of(numerator, energy, squared);
        if (energy > 0) {
            const float decay = expf(since);
            squared = fmaxf(squared * decay * decay + 2 * numerator * decay + energy, 0.0f);
            at = gamma, log = 0;
        }
        return score;
    }
};

// Tokens and drift of two slots, and the keys by which pairs are compared (src/events.rs).
struct Ledger {
    uint32_t tokens[2], drift[2];  // slots lane and lane + 32
    int len;
};

DEVICE uint32_t saturating(uint32_t a, uint32_t b) { return a + b < a ? 0xffffffffu : a + b; }

// Slot i + 1 for the lane that holds slot i.
DEVICE void next_slot(const uint32_t (&x)[2], uint32_t (&next)[2]) {
    const int lane = lane_index();
    const uint32_t low = __shfl_down_sync(ALL, x[0], 1), high = __shfl_down_sync(ALL, x[1], 1);
    const uint32_t first_high = __shfl_sync(ALL, x[1], 0);
    next[0] = lane == 31 ? first_high : low;
    next[1] = lane == 31 ? 0 : high;
}

// The pair of least cost, the oldest winning a tie.
DEVICE int cheapest_pair(const Ledger& ledger, bool mass) {
    uint32_t tokens[2], drift[2], best = 0xffffffffu;
    next_slot(ledger.tokens, tokens);
    next_slot(ledger.drift, drift);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane_index() + 32 * half;
        if (i + 1 >= ledger.len) continue;
        const float sum = __uint2float_rn(saturating(ledger.drift[half], drift[half]));
        const float cost =
            mass ? sum : __fdiv_rn(sum, __uint2float_rn(saturating(ledger.tokens[half], tokens[half])));
        const uint32_t key = (__float_as_uint(cost) & ~63u) | i;
        best = key < best ? key : best;
    }
    return __reduce_min_sync(ALL, best) & 63;
}

DEVICE void apply(Ledger& ledger, uint8_t event, float score) {
    const int lane = lane_index();
    const uint32_t drift = __float2uint_rn(__fmul_rn(score, 4096.0f));
    if (event >= MERGE) {
        uint32_t tokens[2], drifts[2];
        next_slot(ledger.tokens, tokens);
        next_slot(ledger.drift, drifts);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half, merged = event - MERGE;
            if (i == merged) {
                ledger.tokens[half] = saturating(ledger.tokens[half], tokens[half]);
                ledger.drift[half] = saturating(ledger.drift[half], drifts[half]);
            } else if (i > merged) {
                ledger.tokens[half] = tokens[half];
                ledger.drift[half] = drifts[half];
            }
        }
        ledger.len--;
    }
    const bool opens = event != EXTEND;
    const int slot = opens ? ledger.len : ledger.len - 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (lane + 32 * half == slot) {
            ledger.tokens[half] = opens ? 1 : saturating(ledger.tokens[half], 1);
            ledger.drift[half] = opens ? drift : saturating(ledger.drift[half], drift);
        }
    }
    ledger.len += opens;
}

// Gram matrices of the chunk, lower triangle: warps 0 to 2 K K^T, warps 3 to 5 V V^T.
template <int PARTS>
DEVICE void gram(const Tile<PARTS>& keys, const Tile<PARTS>& values, int dk, int dv, const Shared& shared) {
    const int warp = warp_index();
    if (warp >= 6) return;
    const Tile<PARTS> tile = {warp < 3 ? keys.data : values.data, warp < 3 ? keys.stride : values.stride,
                              warp < 3 ? keys.plane : values.plane};
    const int width = warp < 3 ? dk : dv, which = warp % 3;
    const int row = which == 0 ? 0 : 16, column = which == 2 ? 16 : 0;
    float c[2][4];
    clear(c);
    for (int k = 0; k < width; k += 16) {
        uint32_t a[PARTS][4], b[PARTS][4];
        load_a(tile, row, k, a);
        load_b(tile, column, k, b);
        multiply<PARTS, PARTS>(c, a, b);
    }
    float* out = warp < 3 ? shared.x : shared.values;
    each_pair(c, [&](int r, int n, float x0, float x1) {
        float* at = out + (row + r) * PITCH + column + n;
        at[0] = x0, at[1] = x1;
    });
}

// carried[warp][t] = part of k_t^T R v_t of 16 tokens from `first` on, as (V R^T) . K: the fragments of R^T lie
// as R does. Warps take columns of dk in turn.
template <int PARTS>
DEVICE void carried_products(const Tile<PARTS>& keys, const Tile<PARTS>& values, const float* open, int dk, int dv,
                             int first, const Shared& shared) {
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2;
    float row_sums[2] = {0, 0};
    for (int column = warp_index() * 16; column < padded(dk); column += WARPS * 16) {
        float c[2][4];
        clear(c);
        for (int k = 0; k < padded(dv); k += 16) {
            uint32_t a[PARTS][4], b[2][4];
            load_a(values, first, k, a);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = column + i / 2 * 8 + g, from = k + i % 2 * 8 + c2;
                float2 r = make_float2(0, 0);
                if (n < dk && from < dv) r = *reinterpret_cast<const float2*>(open + n * dv + from);
                uint32_t planes[2];
                split<2>(r.x, r.y, planes);
                b[0][i] = planes[0], b[1][i] = planes[1];
            }
            multiply<PARTS, 2>(c, a, b);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                row_sums[i / 2] += c[half][i] * get(keys, first + g + i / 2 * 8, column + half * 8 + c2 + i % 2);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 1);
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 2);
        if (lane_index() % 4 == 0) shared.carried[warp_index() * 16 + g + i * 8] = row_sums[i];
    }
}

// R = keep R + sum over tokens of decay_s k_s v_s^T; returns the thread's part of |R|^2. decay[s] is 0 where s
// has no part in it.
template <int PARTS>
DEVICE float update_open(const Tile<PARTS>& keys, const Tile<PARTS>& values, float* open, int dk, int dv, float keep,
                         const float* decay) {
    const int c2 = lane_index() % 4 * 2;
    const int columns = padded(dv) / 16, tiles = padded(dk) / 16 * columns;
    float squared = 0;
    for (int tile = warp_index(); tile < tiles; tile += WARPS) {
        const int row = tile / columns * 16, column = tile % columns * 16;
        float c[2][4];
        clear(c);
#pragma unroll
        for (int k = 0; k < S; k += 16) {
            uint32_t raw[PARTS][4], a[2][4], b[PARTS][4];
            load_a_trans(keys, row, k, raw);
            load_b_trans(values, column, k, b);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* at = decay + k + i / 2 * 8 + c2;
                float x0 = low_bf16(raw[0][i]), x1 = high_bf16(raw[0][i]);
                if constexpr (PARTS == 2) x0 += low_bf16(raw[1][i]), x1 += high_bf16(raw[1][i]);
                uint32_t planes[2];
                split<2>(at[0] * x0, at[1] * x1, planes);
                a[0][i] = planes[0], a[1][i] = planes[1];
            }
            multiply<2, PARTS>(c, a, b);
        }
        each_pair(c, [&](int r, int n, float x0, float x1) {
            if (row + r >= dk || column + n >= dv) return;
            float2* at = reinterpret_cast<float2*>(open + (row + r) * dv + column + n);
            if (keep != 0) {
                const float2 held = *at;
                x0 += keep * held.x, x1 += keep * held.y;
            }
            *at = make_float2(x0, x1);
            squared += x0 * x0 + x1 * x1;
        });
    }
    return squared;
}

// Sum over the block, in one order; every thread gets it. Two barriers.
DEVICE float block_sum(float x, float* sums) {
    x = warp_sum(x);
    __syncthreads();
    if (lane_index() == 0) sums[warp_index()] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += sums[warp];
    return sum;
}

template <typename T>
DEVICE void segment(const SegmentParams& p) {
    constexpr int PARTS = T::PARTS;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, capacity = e.capacity;
    const int lane = lane_index(), warp = warp_index();
    const Row row = row_of(e, blockIdx.x / e.value_heads, blockIdx.x % e.value_heads);
    const T* const k = static_cast<const T*>(p.k);
    const T* const v = static_cast<const T*>(p.v);

    Carve carve{dynamic_shared()};
    const Tile<PARTS> keys = carve.tile<PARTS>(S, padded(dk));
    const Tile<PARTS> values = carve.tile<PARTS>(S, padded(dv));
    Shared shared;
    shared.x = carve.take<float>(S * PITCH);
    shared.values = carve.take<float>(S * PITCH);
    shared.whole = carve.take<float>(S);
    shared.carried = carve.take<float>(WARPS * 16);
    shared.gamma = carve.take<Gamma>(S);
    shared.energy = carve.take<float>(S);
    shared.factor = carve.take<float>(S);
    shared.score = carve.take<float>(S);
    shared.sums = carve.take<float>(WARPS);
    shared.newest = carve.take<int>(S);
    shared.events = carve.take<uint8_t>(S);
    shared.start = carve.take<int>(1);
    carve.check();

    // The slots that the row begins with.
    const int64_t slots = row.index() * capacity;
    const int64_t state = row.index() * dk * dv;
    Ledger ledger = {{0, 0}, {0, 0}, 0};
    if (p.initial_len) {
        ledger.len = p.initial_len[row.index()];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            if (i < ledger.len) {
                ledger.tokens[half] = p.initial_tokens[slots + i];
                ledger.drift[half] = p.initial_drift[slots + i];
            }
        }
    }
    float* const open = p.open + state;
    float squared = 0;  // |R|^2 and the log decay since R's newest token
    float log = 0;
    for (int i = threadIdx.x * 4; i < dk * dv; i += THREADS * 4) {
        float4 r = make_float4(0, 0, 0, 0);
        if (p.initial_len) r = *reinterpret_cast<const float4*>(p.initial_open + state + i);
        *reinterpret_cast<float4*>(open + i) = r;
        squared += r.x * r.x + r.y * r.y + r.z * r.z + r.w * r.w;
    }
    squared = block_sum(squared, shared.sums);
    const float tau = p.tau[row.head];

    for (int64_t first = 0; first < row.len; first += S) {
        const int len = row.len - first < S ? static_cast<int>(row.len - first) : S;

        // 1. Rows, norms, Gamma.
        for (int t = warp; t < S; t += WARPS) {
            const T* key = t < len ? k + row.key_at(first + t) * dk : nullptr;
            const T* val = t < len ? v + row.at(first + t) * dv : nullptr;
            const float kk = load_row(keys, t, key, dk, 1.0f), vv = load_row(values, t, val, dv, 1.0f);
            const float factor = p.qk_l2norm ? 1.0f / sqrtf(kk + L2NORM_EPS) : 1.0f;
            if (lane == 0) {
                shared.factor[t] = factor;
                shared.energy[t] = kk * factor * factor * vv;
            }
        }
        if (warp == 0) load_gamma(p.g, row, first, len, S, shared.gamma);
        if (warp == 1 && p.log && lane < len) shared.events[lane] = p.log[row.at(first + lane)];
        __syncthreads();
        gram(keys, values, dk, dv, shared);
        if (warp == 7) {
            const uint32_t live = __ballot_sync(ALL, shared.energy[lane] > 0);
            const uint32_t before = live & ((1u << lane) - 1);
            shared.newest[lane] = 31 - __clz(before);
        }
        __syncthreads();

        // 2. X relative to the newest token before t, its sums over s >= a, and the drift by start a.
        for (int i = threadIdx.x; i < S * S; i += THREADS) {
            const int t = i / S, s = i % S, newest = shared.newest[t];
            if (s >= t) continue;
            float x = 0;
            if (s <= newest) {
                const float pair = shared.x[t * PITCH + s] * shared.factor[t] * shared.factor[s];
                x = expf(minus(shared.gamma[newest], shared.gamma[s])) * pair * shared.values[t * PITCH + s];
            }
            shared.x[t * PITCH + s] = x;
        }
        __syncthreads();
        if (warp == 0) {
            float sum = 0;
            for (int s = lane - 1; s >= 0; s--) {
                sum += shared.x[lane * PITCH + s];
                shared.x[lane * PITCH + s] = sum;
            }
            shared.whole[lane] = sum;
            __syncwarp();
            Walk walk = {shared.energy[lane], shared.gamma[lane], 0};
            for (int t = lane + 1; t < len; t++) {
                float* at = shared.x + t * PITCH + lane;
                *at = walk.judge(*at, shared.energy[t], shared.gamma[t]);
            }
            __syncwarp();
        }

        // 3. The carried segment, up to a boundary; then the look-up.
        int start = -1;
        Walk walk = {squared, {0, 0}, log};
        for (int tile = 0; tile < len; tile += 16) {
            if (squared > 0 && walk.squared > 0) carried_products(keys, values, open, dk, dv, tile, shared);
            __syncthreads();
            if (warp == 0) {
                for (int t = tile; t < tile + 16 && t < len; t++) {
                    float score;
                    if (start < 0) {
                        const int newest = shared.newest[t];
                        float numerator = newest < 0 ? 0.0f : shared.whole[t];
                        if (walk.squared > 0 && squared > 0) {
                            float product = 0;
#pragma unroll
                            for (int w = 0; w < WARPS; w++) product += shared.carried[w * 16 + t - tile];
                            const float since = newest < 0 ? 0.0f : log + value(shared.gamma[newest]);
                            numerator += expf(since) * product * shared.factor[t];
                        }
                        score = walk.judge(numerator, shared.energy[t], shared.gamma[t]);
                    } else {
                        score = shared.x[t * PITCH + start];
                    }
                    const bool boundary = p.log ? shared.events[t] != EXTEND
                                                : (ledger.len == 0 && first == 0 && t == 0) ||
                                                      (capacity > 1 && score >= tau);
                    if (boundary) start = t;
                    if (lane == 0) shared.score[t] = score;
                }
                if (lane == 0) {
                    *shared.start = start;
                    shared.sums[0] = walk.squared;
                }
            }
            __syncthreads();
            start = *shared.start;
            // A carried segment of zeros, with nothing but zeros since, needs no products.
            walk.squared = start < 0 ? (warp == 0 ? walk.squared : shared.sums[0]) : 0.0f;
        }

        // 4. Merges and results.
        if (warp == 0) {
            for (int t = 0; t < len; t++) {
                const float score = shared.score[t];
                uint8_t event = EXTEND;
                if (p.log) {
                    event = shared.events[t];
                } else if (ledger.len == 0 || (capacity > 1 && score >= tau)) {
                    event = ledger.len < capacity ? OPEN : MERGE + cheapest_pair(ledger, p.mass);
                }
                apply(ledger, event, score);
                if (lane == 0) {
                    p.drift[row.at(first + t)] = score;
                    p.events[row.at(first + t)] = event;
                }
            }
        }

        // 5. R, as it is at the newest token that is not zero.
        int newest = shared.newest[S - 1];
        if (shared.energy[S - 1] > 0) newest = S - 1;
        if (start >= 0 && newest < start) newest = start;
        const Gamma end = shared.gamma[len - 1];
        if (newest < 0) {
            log += value(end);
            if (log < FORGOTTEN) squared = 0;
            __syncthreads();
            continue;
        }
        float* const decay = shared.whole;
        if (warp == 0) {
            const bool part = lane <= newest && lane >= start;
            decay[lane] =
                part ? shared.factor[lane] * expf(minus(shared.gamma[newest], shared.gamma[lane])) : 0.0f;
        }
        __syncthreads();
        const float keep = start >= 0 || squared == 0 ? 0.0f : expf(log + value(shared.gamma[newest]));
        squared = block_sum(update_open(keys, values, open, dk, dv, keep, decay), shared.sums);
        log = minus(end, shared.gamma[newest]);
        __syncthreads();
    }

    // The cache: R itself, and what the slots hold.
    const float factor = expf(log);
    if (log != 0) {
        for (int i = threadIdx.x; i < dk * dv; i += THREADS) open[i] *= factor;
    }
    if (warp == 0) {
        if (lane == 0) p.len[row.index()] = ledger.len;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            if (i < capacity) {
                p.tokens[slots + i] = i < ledger.len ? ledger.tokens[half] : 0;
                p.summed_drift[slots + i] = i < ledger.len ? ledger.drift[half] : 0;
            }
        }
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: bf16 95 / 98 / 119 / 122,
// f16 and f32 112 / 112 / 133 / 128.
KERNEL BLOCK_OF(dla::THREADS) segment_bf16(const __grid_constant__ dla::SegmentParams p) { dla::segment<dla::Bf16>(p); }
KERNEL BLOCK_OF(dla::THREADS) segment_f16(const __grid_constant__ dla::SegmentParams p) { dla::segment<dla::F16>(p); }
KERNEL BLOCK_OF(dla::THREADS) segment_f32(const __grid_constant__ dla::SegmentParams p) { dla::segment<dla::F32>(p); }
