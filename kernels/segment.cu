// segment: drift, boundaries and merges of every token, from k, v and g alone (OPERATOR.md, section 4).
//
//   X_ts = D_ts (k_t . k_s)(v_t . v_s),  E_t = |k_t|^2 |v_t|^2
//   num_t = sum over the open segment's tokens s < t of X_ts  [+ e^Gamma_t k_t^T R v_t, R carried in]
//   I_t = sqrt(2 - 2 num_t / sqrt(E_t N)),  N <- e^{2 g_t} N + 2 num_t + E_t
//
// Two kernels. `segment_gram` is parallel over 32 tokens at a time and does all that is heavy: for every token
// that might start a segment it walks to the next boundary, 32 tokens ahead at most, and leaves the drift on
// the way, where the boundary is, and which boundaries follow in the same 32 tokens. `segment` is the chain
// over the tokens of a row: one block of 4 warps, which takes 64 tokens a round, a barrier a round.
//   warp 1 finds boundaries by look-up, and sums drift;
//   warp 0, a round behind, merges;
//   warp 2, another round behind, writes events and the slots held at every chunk's entry;
//   all four, where no boundary lies within 32 tokens, carry R (section "The slow path").
//
// Merges. A slot is known by the boundary that begins it, and that by its prefix sums of drift and of tokens;
// to merge is to drop a boundary. What boundaries and sums come does not hang on the merges, so warp 1 has
// them ready. Lane j holds the key (cost, index) of pair j, that of slots j to j + 2, j + 3, and computes that
// of j + 4: whatever pair goes, the keys that remain are there already, and a link of the chain is one
// redux.min and two selects. The division is two links behind.
//
// R stands in global memory (the cache's own array; 64 KiB at dk = dv = 128, so in L2) as it was at its newest
// token that is not zero, with |R|^2 taken from R itself at every update and the log decay since: c asks no
// scale, and what strong decay leaves of a segment is far below f32.
//
// Numerics: k and v are exact in their planes (f32: 2^-17); R and the decayed keys take two planes whatever the
// dtype. Decisions are those of src/events.rs, bit for bit. The product |k| |v| must lie within 1e-19 and 1e19.
//
// Shared memory: segment_gram GRAM_BYTES, segment CHAIN_BYTES, whatever the head size.

#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int STARTS = 32;       // tokens of a table
constexpr int WINDOW = 64;       // tokens that the walks of a table see
constexpr int REACH = 32;        // most tokens of a walk
constexpr int PITCH = WINDOW + 1;
constexpr int BLOCK = 64;        // tokens of a round
constexpr int TILE = 16;         // tokens of a step of the slow path
constexpr int CHAIN_WARPS = SEGMENT_THREADS / 32;
constexpr int FAST_SLOTS = 32;   // most slots of the fast merges
constexpr uint32_t NONE = 0xffffffffu;

// A segment that has decayed by more is 0 in f64 too, and so has no direction.
constexpr float FORGOTTEN = -700.0f;

// I = sqrt(2 - 2 c), a zero norm giving c = 0.
DEVICE float drift_of(float numerator, float energy, float squared) {
    const float norms = sqrtf(energy) * sqrtf(squared);
    const float cosine = norms > 0 ? fmaxf(fminf(numerator / norms, 1.0f), -1.0f) : 0.0f;
    return sqrtf(fmaxf(2.0f - 2.0f * cosine, 0.0f));
}

// What a segment is known by while its tokens are walked: |R|^2 as it was at its newest token that is not zero.
struct Walk {
    float squared;
    Gamma at;   // Gamma of that token
    float log;  // decay before the tile since then, carried segments
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

DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
DEVICE int highest(uint32_t mask) { return 31 - __clz(mask); }

// Where the table of a row's tokens 32 b to 32 b + 31 stands: tables lie as chunks do.
template <int C>
struct Tables {
    int64_t first;  // the row's first chunk
    int value_heads, head;
    METHOD int64_t at(int64_t b) const {
        constexpr int EACH = C / STARTS;
        return ((first + b / EACH) * value_heads + head) * EACH + b % EACH;
    }
    // Of a token.
    METHOD int64_t of(int64_t t) const { return at(t / STARTS) * STARTS + t % STARTS; }
    // Drift of token t in the segment that starts at `start`, at most REACH before it.
    METHOD int64_t walk(int64_t start, int64_t t) const {
        return (at(start / STARTS) * REACH + (t - start - 1)) * STARTS + start % STARTS;
    }
};

template <typename T>
DEVICE Tables<T::CHUNK> tables_of(const Row& row) {
    return {first_chunk(row, T::CHUNK), row.value_heads, row.head};
}

// ---- segment_gram ----

template <typename T>
DEVICE void segment_gram(const SegmentParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, EACH = C / STARTS, TILES = 10, WARP_TILES = 3;
    constexpr int ROWS = WINDOW * 8 / SEGMENT_THREADS;  // rows that a thread loads eight columns of
    const Extents& e = p.extents;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int64_t chunk = blockIdx.x / EACH, place = chunk / e.value_heads;
    const Row row = row_of(e, sequence_of_chunk(e, place, C), chunk % e.value_heads);
    const int64_t first = (place - first_chunk(row, C)) * C + blockIdx.x % EACH * STARTS;
    if (first >= row.len || first < p.from || first >= p.to) return;
    const int64_t table = blockIdx.x;
    const int len = static_cast<int>(least(row.len - first, WINDOW));
    const T* const k = static_cast<const T*>(p.k);
    const T* const v = static_cast<const T*>(p.v);

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(WINDOW);
    float* const energy = carve.take<float>(WINDOW);
    float* const factor = carve.take<float>(WINDOW);
    int* const newest = carve.take<int>(WINDOW);  // last token before t that is not zero, or -1
    // [WINDOW][PITCH] X, then its sums over s >= a. The operands' slices are dead when it is first written.
    float* const x = reinterpret_cast<float*>(carve.next);
    const Tile<PARTS> tile = carve.tile<PARTS>(WINDOW, SLICE);
    carve.next = reinterpret_cast<unsigned char*>(x);
    carve.take<float>(WINDOW * PITCH > Tile<PARTS>::elements(WINDOW, SLICE) / 2
                          ? WINDOW * PITCH
                          : Tile<PARTS>::elements(WINDOW, SLICE) / 2);
    carve.check();

    // 1. Gram matrices, lower triangle, both in the same fragments; norms.
    float grams[2][WARP_TILES][2][4];
    float norms[2][ROWS];
#pragma unroll
    for (int which = 0; which < 2; which++) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++) clear(grams[which][i]);
#pragma unroll
        for (int i = 0; i < ROWS; i++) norms[which][i] = 0;
        const int width = which ? e.dv : e.dk;
        for (int column = 0; column < width; column += SLICE) {
            const int group = column + thread % 8 * 8;
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int t = thread / 8 + i * (SEGMENT_THREADS / 8);
                float values[8] = {};
                if (t < len && group < width) {
                    const T* from = which ? v + row.at(first + t) * e.dv : k + row.key_at(first + t) * e.dk;
                    load8(from + group, values);
                }
#pragma unroll
                for (int j = 0; j < 8; j++) norms[which][i] += values[j] * values[j];
                put8(tile, t, thread % 8 * 8, values);
            }
            __syncthreads();
            for (int step = 0; step < SLICE && column + step < width; step += 16) {
#pragma unroll
                for (int i = 0; i < WARP_TILES; i++) {
                    const int at = warp + i * 4, r = at < 1 ? 0 : at < 3 ? 1 : at < 6 ? 2 : 3;
                    if (at >= TILES) continue;
                    uint32_t a[PARTS][4], b[PARTS][4];
                    load_a(tile, r * 16, step, a);
                    load_b(tile, (at - r * (r + 1) / 2) * 16, step, b);
                    multiply<PARTS, PARTS>(grams[which][i], a, b);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float kk = norms[0][i], vv = norms[1][i];
#pragma unroll
        for (int by = 1; by < 8; by *= 2) {
            kk += __shfl_xor_sync(ALL, kk, by);
            vv += __shfl_xor_sync(ALL, vv, by);
        }
        const float scale = p.qk_l2norm ? 1.0f / sqrtf(kk + L2NORM_EPS) : 1.0f;
        const int t = thread / 8 + i * (SEGMENT_THREADS / 8);
        if (thread % 8 == 0) {
            factor[t] = scale;
            energy[t] = kk * scale * scale * vv;
        }
    }
    if (warp == 0) load_gamma(p.g, row, first, len, WINDOW, gamma);
    __syncthreads();
    if (warp < 2) {
        const uint32_t low = __ballot_sync(ALL, energy[lane] > 0), high = __ballot_sync(ALL, energy[32 + lane] > 0);
        const uint32_t below = (1u << lane) - 1;
        newest[thread] = warp == 0              ? highest(low & below)
                         : (high & below) != 0 ? 32 + highest(high & below)
                                               : highest(low);
    }
    if (warp == 2) {
        p.energy[table * STARTS + lane] = energy[lane];
        p.factor[table * STARTS + lane] = factor[lane];
        if (lane == 0) p.totals[table] = static_cast<double>(gamma[31].high) + gamma[31].low;
    }
    __syncthreads();

    // 2. X relative to the newest token before t.
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const int at = warp + i * 4, r = at < 1 ? 0 : at < 3 ? 1 : at < 6 ? 2 : 3, column = at - r * (r + 1) / 2;
        if (at >= TILES) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = r * 16 + lane / 4 + j / 2 % 2 * 8;
            const int s = column * 16 + j / 4 * 8 + lane % 4 * 2 + j % 2;
            const float kk = grams[0][i][j / 4][j % 4], vv = grams[1][i][j / 4][j % 4];
            if (s >= t) continue;
            const int last = newest[t];
            x[t * PITCH + s] =
                s <= last ? expf(minus(gamma[last], gamma[s])) * (kk * factor[t] * factor[s]) * vv : 0.0f;
        }
    }
    __syncthreads();
    if (thread < WINDOW) {
        float sum = 0;
        for (int s = thread - 1; s >= 0; s--) {
            sum += x[thread * PITCH + s];
            x[thread * PITCH + s] = sum;
        }
    }
    __syncthreads();
    if (warp != 0) return;

    // 3. Lane a walks from a to the next boundary.
    const float tau = p.tau[row.head];
    Walk walk = {energy[lane], gamma[lane], 0};
    int next = 0;  // distance of the boundary; 0: none within reach
    bool walking = lane < len;
    for (int d = 1; d <= REACH && __any_sync(ALL, walking); d++) {
        const int t = lane + d;
        walking = walking && t < len;
        if (walking) {
            const float score = walk.judge(x[t * PITCH + lane], energy[t], gamma[t]);
            p.walks[(table * REACH + d - 1) * STARTS + lane] = score;
            if (p.log ? p.log[row.at(first + t)] != EXTEND : e.capacity > 1 && score >= tau) {
                next = d;
                walking = false;
            }
        }
    }
    // Boundaries of these tokens that follow from a, itself one: pointers doubled.
    uint32_t reach = 1u << lane;
    int to = next == 0 ? STARTS : lane + next;
#pragma unroll
    for (int i = 0; i < 5; i++) {
        const uint32_t more = __shfl_sync(ALL, reach, to % STARTS);
        const int further = __shfl_sync(ALL, to, to % STARTS);
        if (to < STARTS) reach |= more, to = further;
    }
    p.next[table * STARTS + lane] = next;
    p.reach[table * STARTS + lane] = reach;
}

// ---- The chain: what its warps hand to each other ----

constexpr int LIST = 104;  // slots held, boundaries of a round, and what the keys look ahead

// Of a round, from warp 1 to warp 0. Twice.
struct Boundaries {
    uint2 list[LIST];     // prefix sums of drift and tokens where slots begin: those held, then those to come
    uint4 future[BLOCK];  // keys of the slot before boundary n and the next one, two, three
};

// Of a round, for warp 2 as well. Three times.
struct Round {
    float drift[BLOCK];
    uint8_t events[BLOCK];  // of boundary n
    uint64_t boundaries;    // tokens that are boundaries
    int held, count;        // slots before; boundaries
};

// Where the search for boundaries stands.
struct Find {
    int64_t start;    // of the open segment; CARRIED: before the row; NO_SEGMENT
    int64_t next;     // the boundary after it, or UNKNOWN
    int64_t done;     // tokens judged
    int64_t covered;  // R holds the open segment up to here; UNKNOWN: R is not there
    float squared;    // |R|^2 and the log decay since R's newest token
    float log;
    uint32_t drift, tokens;    // sums over all slots at `done`, rounds alone
    uint32_t last[2];          // the same where the open slot begins
    int held;                  // slots
    int reserved;
};
constexpr int64_t CARRIED = -1, NO_SEGMENT = -2, UNKNOWN = -1;

// A row between two windows.
struct State {
    Find find;
    uint32_t slots[2][MOST_SLOTS];  // prefix sums of drift and tokens, or the sums of every slot
    int items[MOST_SLOTS];
    int places[MOST_SLOTS];
    double logs[MOST_SLOTS];
    int merged, published;  // slots held
};
static_assert(sizeof(State) == SEGMENT_STATE_BYTES);

struct Shared {
    Boundaries* boundaries;  // [2]
    Round* rounds;           // [3]
    Find* find;
    float* keys;             // [TILE][TILE + 1]
    float* values;           // [TILE][TILE + 1]
    float* carried;          // [CHAIN_WARPS][TILE]
    float* sums;             // [CHAIN_WARPS]
    Gamma* gamma;            // [32]
    float* energy;           // [TILE]
    float* factor;           // [TILE]
    float* decay;            // [TILE]
};

// ---- The slow path: R, 16 tokens at a time ----

// Tokens of a tile, operands straight from global memory; rows past `len` are zero.
template <typename T>
struct Operand {
    const T* data;
    int64_t pitch;
    int width, len;
    METHOD void pair(int t, int column, float& x0, float& x1) const {
        x0 = x1 = 0;
        if (t < len && column < width) load2(data + t * pitch + column, x0, x1);
    }
    METHOD float one(int t, int column) const {
        return t < len && column < width ? load1(data + t * pitch + column) : 0.0f;
    }
    // The left operand [token][column] at column k.
    template <int PARTS>
    METHOD void rows(int k, uint32_t (&a)[PARTS][4]) const {
        const int g = lane_index() / 4, c2 = lane_index() % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x0, x1;
            pair(g + i % 2 * 8, k + i / 2 * 8 + c2, x0, x1);
            uint32_t planes[PARTS];
            split<PARTS>(x0, x1, planes);
#pragma unroll
            for (int part = 0; part < PARTS; part++) a[part][i] = planes[part];
        }
    }
};

template <typename T>
DEVICE Operand<T> keys_at(const SegmentParams& p, const Row& row, int64_t first, int len) {
    return {static_cast<const T*>(p.k) + row.key_at(first) * p.extents.dk, int64_t(p.extents.heads) * p.extents.dk,
            p.extents.dk, len};
}
template <typename T>
DEVICE Operand<T> values_at(const SegmentParams& p, const Row& row, int64_t first, int len) {
    return {static_cast<const T*>(p.v) + row.at(first) * p.extents.dv,
            int64_t(p.extents.value_heads) * p.extents.dv, p.extents.dv, len};
}

// Gamma, norms and factors of a tile, by one warp.
template <typename T>
DEVICE void describe(const SegmentParams& p, const Row& row, int64_t first, int len, const Shared& shared) {
    const int lane = lane_index();
    load_gamma(p.g, row, first, len, 32, shared.gamma);
    if (lane < TILE) {
        const int64_t at = tables_of<T>(row).of(first + (lane < len ? lane : 0));
        shared.energy[lane] = lane < len ? p.energy[at] : 0.0f;
        shared.factor[lane] = lane < len ? p.factor[at] : 0.0f;
    }
    __syncwarp();
}

// Gram matrix of a tile, by one warp.
template <typename T>
DEVICE void small_gram(const Operand<T>& x, float* out) {
    constexpr int PARTS = T::PARTS;
    float c[2][4];
    clear(c);
    for (int k = 0; k < x.width; k += 16) {
        uint32_t a[PARTS][4], b[PARTS][4];
        x.template rows<PARTS>(k, a);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            b[part][0] = a[part][0], b[part][1] = a[part][2], b[part][2] = a[part][1], b[part][3] = a[part][3];
        multiply<PARTS, PARTS>(c, a, b);
    }
    each_pair(c, [&](int r, int n, float x0, float x1) {
        out[r * (TILE + 1) + n] = x0, out[r * (TILE + 1) + n + 1] = x1;
    });
}

// carried[warp][t] = part of k_t^T R v_t, as (V R^T) . K: the fragments of R^T lie as R does. Warps take
// columns of dk in turn.
template <typename T>
DEVICE void carried_products(const Operand<T>& keys, const Operand<T>& values, const float* open,
                             const Shared& shared) {
    constexpr int PARTS = T::PARTS;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float row_sums[2] = {0, 0};
    for (int column = warp_index() * 16; column < dk; column += CHAIN_WARPS * 16) {
        float c[2][4];
        clear(c);
        for (int k = 0; k < dv; k += 16) {
            uint32_t a[PARTS][4], b[2][4];
            values.template rows<PARTS>(k, a);
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
            for (int i = 0; i < 2; i++) {
                float x0, x1;
                keys.pair(g + i * 8, column + half * 8 + c2, x0, x1);
                row_sums[i] += c[half][2 * i] * x0 + c[half][2 * i + 1] * x1;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 1);
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 2);
        if (lane_index() % 4 == 0) shared.carried[warp_index() * TILE + g + i * 8] = row_sums[i];
    }
}

// R = keep R + sum over a tile's tokens of decay_s k_s v_s^T; returns the thread's part of |R|^2.
template <typename T>
DEVICE float update_open(const Operand<T>& keys, const Operand<T>& values, float* open, float keep,
                         const float* decay) {
    constexpr int PARTS = T::PARTS;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float squared = 0;
    for (int row = warp_index() * 16; row < dk; row += CHAIN_WARPS * 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = i / 2 * 8 + c2, m = row + g + i % 2 * 8;
            uint32_t planes[2];
            split<2>(decay[t] * keys.one(t, m), decay[t + 1] * keys.one(t + 1, m), planes);
            a[0][i] = planes[0], a[1][i] = planes[1];
        }
        for (int column = 0; column < dv; column += 16) {
            float c[2][4];
            clear(c);
            uint32_t b[PARTS][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = i % 2 * 8 + c2, n = column + g + i / 2 * 8;
                uint32_t planes[PARTS];
                split<PARTS>(values.one(t, n), values.one(t + 1, n), planes);
#pragma unroll
                for (int part = 0; part < PARTS; part++) b[part][i] = planes[part];
            }
            multiply<2, PARTS>(c, a, b);
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
    for (int warp = 0; warp < CHAIN_WARPS; warp++) sum += sums[warp];
    return sum;
}

// Takes the tokens of a tile into R. By the block; begins and ends with a barrier.
template <typename T>
DEVICE void cover(const SegmentParams& p, const Row& row, float* open, int64_t first, int len, const Shared& shared) {
    Find* const find = shared.find;
    __syncthreads();
    if (warp_index() == 0) describe<T>(p, row, first, len, shared);
    __syncthreads();
    const bool fresh = first == find->start;
    const float log = find->log, old = find->squared;
    int newest = -1;
    for (int t = 0; t < len; t++) newest = shared.energy[t] > 0 ? t : newest;
    if (fresh && newest < 0) newest = 0;
    const Gamma end = shared.gamma[len - 1];
    float squared, since;
    if (newest < 0) {
        since = log + value(end);
        squared = since < FORGOTTEN ? 0 : old;
        __syncthreads();
    } else {
        if (threadIdx.x < TILE) {
            const int t = threadIdx.x;
            shared.decay[t] = t <= newest ? shared.factor[t] * expf(minus(shared.gamma[newest], shared.gamma[t])) : 0.0f;
        }
        __syncthreads();
        const float keep = fresh || old == 0 ? 0.0f : expf(log + value(shared.gamma[newest]));
        const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
        squared = block_sum(update_open(keys, values, open, keep, shared.decay), shared.sums);
        since = minus(end, shared.gamma[newest]);
    }
    if (threadIdx.x == 0) {
        find->squared = squared;
        find->log = since;
        find->covered = first + len;
    }
    __syncthreads();
}

// Judges the tokens of a tile against R, up to a boundary. By the block; begins and ends with a barrier.
template <typename T>
DEVICE void judge(const SegmentParams& p, const Row& row, const float* open, int64_t first, int len, float* drift,
                  const Shared& shared) {
    Find* const find = shared.find;
    const int warp = warp_index(), lane = lane_index();
    const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
    __syncthreads();
    const float squared = find->squared, log = find->log;
    if (warp == 0) small_gram(keys, shared.keys);
    if (warp == 2) small_gram(values, shared.values);
    if (warp == 1) describe<T>(p, row, first, len, shared);
    if (squared > 0) carried_products(keys, values, open, shared);
    __syncthreads();
    if (warp == 1) {
        const int t = lane % TILE;
        const uint32_t live = __ballot_sync(ALL, lane < TILE && shared.energy[t] > 0);
        const int newest = highest(live & ((1u << t) - 1));
        float numerator = 0;
        for (int s = 0; s <= newest; s++)
            numerator += expf(minus(shared.gamma[newest], shared.gamma[s])) *
                         (shared.keys[t * (TILE + 1) + s] * shared.factor[t] * shared.factor[s]) *
                         shared.values[t * (TILE + 1) + s];
        __syncwarp();
        if (squared > 0) {
            float product = 0;
#pragma unroll
            for (int w = 0; w < CHAIN_WARPS; w++) product += shared.carried[w * TILE + t];
            const float since = newest < 0 ? 0.0f : log + value(shared.gamma[newest]);
            numerator += expf(since) * product * shared.factor[t];
        }
        const bool opens = p.log && t < len && p.log[row.at(first + t)] != EXTEND;
        const uint32_t logged = __ballot_sync(ALL, opens);
        const float tau = p.tau[row.head];
        Walk walk = {squared, {0, 0}, log};
        int boundary = -1;
        for (int i = 0; i < len && boundary < 0; i++) {
            const float score = walk.judge(__shfl_sync(ALL, numerator, i), shared.energy[i], shared.gamma[i]);
            if (lane == 0) drift[i] = score;
            if (p.log ? logged >> i & 1 : p.extents.capacity > 1 && score >= tau) boundary = i;
        }
        if (lane == 0) {
            find->done = boundary < 0 ? first + len : first + boundary + 1;
            if (boundary >= 0) {
                find->next = first + boundary;
                find->covered = UNKNOWN;
            }
        }
    }
    __syncthreads();
}

// Judges by R from find.done on: one tile, or fewer tokens where a boundary comes.
template <typename T>
DEVICE void slow_path(const SegmentParams& p, const Row& row, float* open, int64_t first, int64_t end, Round& round,
                      const Shared& shared) {
    const int64_t from = shared.find->done;
    int64_t covered = shared.find->covered;
    if (covered == UNKNOWN) covered = shared.find->start;
    for (; covered < from; covered += TILE)
        cover<T>(p, row, open, covered, static_cast<int>(least(TILE, from - covered)), shared);
    const int len = static_cast<int>(least(TILE, end - from));
    judge<T>(p, row, open, from, len, round.drift + (from - first), shared);
    if (shared.find->covered != UNKNOWN) cover<T>(p, row, open, from, len, shared);
}

// ---- Warp 1: boundaries ----

// Looks up what it can of the round's tokens first..end from find.done on.
template <typename T>
DEVICE void look_up(const SegmentParams& p, const Row& row, int64_t first, int64_t end, Round& round, Find& find) {
    const auto tables = tables_of<T>(row);
    const int lane = lane_index();
    int nexts[2] = {0, 0};
    uint32_t reaches[2] = {0, 0};
    uint64_t boundaries = round.boundaries;
    Find now = find;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t t = first + half * STARTS + lane;
        if (t < end) nexts[half] = p.next[tables.of(t)], reaches[half] = p.reach[tables.of(t)];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t from = first + half * STARTS, to = least(from + STARTS, end), t = from + lane;
        const bool here = now.next != UNKNOWN && now.next < to;
        if (from >= to || now.done < from || (now.done >= to && !(here && now.next >= from))) continue;
        const int64_t before = now.start;
        int64_t stop = to;
        uint32_t mask = 0;
        if (here) {
            mask = __shfl_sync(ALL, reaches[half], static_cast<int>(now.next - from));
            const int last = highest(mask), distance = __shfl_sync(ALL, nexts[half], last);
            now.start = from + last;
            now.next = distance ? now.start + distance : UNKNOWN;
            now.covered = UNKNOWN;
        } else if (now.next == UNKNOWN) {
            stop = now.start < 0 ? 0 : least(to, now.start + REACH + 1);
        }
        const uint32_t below = mask & ((1u << lane) - 1);
        const int64_t start = below ? from + highest(below) : before;
        if (t >= now.done && t < stop)
            round.drift[t - first] = start < 0 ? sqrtf(2.0f) : p.walks[tables.walk(start, t)];
        boundaries |= static_cast<uint64_t>(mask) << half * STARTS;
        now.done = most(now.done, stop);
    }
    if (lane == 0) {
        find.start = now.start, find.next = now.next, find.done = now.done, find.covered = now.covered;
        round.boundaries = boundaries;
    }
    __syncwarp();
}

// Key of merging what begins at a and ends at b, index left out.
template <bool MASS>
DEVICE uint32_t key_of(uint2 a, uint2 b) {
    float cost = __uint2float_rn(b.x - a.x);
    if constexpr (!MASS) cost = divide(cost, __uint2float_rn(b.y - a.y));
    return __float_as_uint(cost) & ~63u;
}

// Drift, its sums, and the keys ahead of a round whose tokens are judged.
DEVICE void finish_round(const SegmentParams& p, const Row& row, int64_t first, int64_t end, bool fast,
                         Round& round, Boundaries& out, Find& find) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    const uint64_t boundaries = round.boundaries;
    const int held = find.held, count = __popcll(boundaries);
    uint32_t total = find.drift;
    const uint32_t tokens = find.tokens;
    const uint2 last = make_uint2(find.last[0], find.last[1]);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = half * 32 + lane;
        uint32_t units = 0;
        if (first + t < end) {
            const float score = round.drift[t];
            p.drift[row.at(first + t)] = score;
            units = __float2uint_rn(__fmul_rn(score, 4096.0f));
        }
        uint32_t sum = units;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const uint32_t below = __shfl_up_sync(ALL, sum, by);
            if (lane >= by) sum += below;
        }
        if (fast && boundaries >> t & 1)
            out.list[held + __popcll(boundaries & ((uint64_t(1) << t) - 1))] =
                make_uint2(total + sum - units, tokens + t);
        total += __shfl_sync(ALL, sum, 31);
    }
    __syncwarp();
    const int after = static_cast<int>(least(held + count, capacity));
    if (fast) {
        if (lane < 4) out.list[held + count + lane] = make_uint2(total, tokens + static_cast<uint32_t>(end - first));
        __syncwarp();
        for (int n = lane; n < count; n += 32) {
            const uint2* at = out.list + held + n;
            const uint2 from = n == 0 ? last : at[-1];
            const uint32_t index = capacity - 2;
            out.future[n] = p.mass ? make_uint4(key_of<true>(from, at[1]) | index, key_of<true>(from, at[2]),
                                                key_of<true>(from, at[3]), 0)
                                   : make_uint4(key_of<false>(from, at[1]) | index, key_of<false>(from, at[2]),
                                                key_of<false>(from, at[3]), 0);
        }
    }
    if (lane == 0) {
        round.held = held;
        round.count = count;
        find.drift = total;
        find.tokens = tokens + static_cast<uint32_t>(end - first);
        if (fast && count > 0) {
            find.last[0] = out.list[held + count - 1].x;
            find.last[1] = out.list[held + count - 1].y;
        }
        find.held = after;
    }
    __syncwarp();
}

// ---- Warp 0: merges ----

// Merges at `steps` boundaries, the list full: `list` holds `capacity` slots and then the boundaries, `future`
// begins at the first of them. Returns which of the list lane j's slot is. At step i, with j the pair that goes:
// keys of j + 2 become at once what they are after it; those of j + 3 and j + 4 follow while the next pair is
// being found, and those of j + 5, which take a division, a step later.
template <bool MASS>
DEVICE int merge_steps(const uint2* list, const uint4* future, int capacity, int steps, uint8_t* events) {
    const int lane = lane_index(), last = capacity - 2;
    // Lanes past the last pair never change.
    const int position = lane <= last ? lane : -8;
    const bool edge = lane == last, ahead = lane + 5 > last;
    uint32_t k = NONE, r = NONE, q = NONE;
    if (lane <= last) {
        const uint2 from = list[lane];
        k = key_of<MASS>(from, list[lane + 2]) | lane;
        r = key_of<MASS>(from, list[lane + 3]);
        q = key_of<MASS>(from, list[lane + 4]);
    }
    int slot = lane, slot_down = 0;
    bool above = false, near_two = false, near_three = false;  // of the last step
    bool above_before = false, near_before = false;            // of the one before
    uint32_t r_down = 0, q_down = 0, q_future = 0, s = 0;
    uint2 from = make_uint2(0, 0), to = make_uint2(0, 1);
    for (int i = 0; i < steps; i++) {
        const uint32_t best = __reduce_min_sync(ALL, k);
        // While it comes: the keys that the last two steps left.
        const uint4 f = future[i];
        uint32_t k_down = __shfl_down_sync(ALL, k, 1) - 1;
        if (edge) k_down = f.x;
        q = above_before ? q_down : near_before ? s : q;
        r = above ? r_down : near_two ? q : r;
        slot = above ? slot_down : slot;
        r_down = __shfl_down_sync(ALL, r, 1);
        q_down = __shfl_down_sync(ALL, q, 1);
        slot_down = __shfl_down_sync(ALL, slot, 1);
        int end = __shfl_down_sync(ALL, slot, 5);
        if (edge) r_down = f.y, q_down = q_future, slot_down = last + 1 + i;
        q_future = f.z;
        if (ahead) end = lane + 5 + i;
        s = key_of<MASS>(from, to);
        from = list[slot], to = list[end];
        const uint32_t r_key = r | lane;
        above_before = above, near_before = near_three;

        const int j = best & 63;
        above = position > j, near_two = position + 2 >= j, near_three = position + 3 >= j;
        k = above ? k_down : position + 1 >= j ? r_key : k;
        events[i] = MERGE + j;
    }
    if (above) slot = slot_down;
    return lane <= last ? slot : lane + steps;
}

// Tokens and drift of two slots a lane, and the keys by which pairs are compared (src/events.rs): what the
// fast merges cannot do, and a caller's log.
struct Ledger {
    uint32_t tokens[2], drift[2];  // slots lane and lane + 32
    int len;
};

DEVICE uint32_t saturating(uint32_t a, uint32_t b) { return a + b < a ? 0xffffffffu : a + b; }

// Slot i + 1 for the lane that holds slot i.
template <typename X>
DEVICE void next_slot(const X (&x)[2], X (&next)[2]) {
    const int lane = lane_index();
    const X low = __shfl_down_sync(ALL, x[0], 1), high = __shfl_down_sync(ALL, x[1], 1);
    const X first_high = __shfl_sync(ALL, x[1], 0);
    next[0] = lane == 31 ? first_high : low;
    next[1] = lane == 31 ? 0 : high;
}

// The pair of least cost, the oldest winning a tie.
DEVICE int cheapest_pair(const Ledger& ledger, bool mass) {
    uint32_t tokens[2], drift[2], best = NONE;
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

// A round's boundaries. On the fast path ledger.drift[0] and tokens[0] are prefix sums where slots begin.
DEVICE void merge_round(const SegmentParams& p, const Row& row, int64_t first, int64_t end, bool fast,
                        Ledger& ledger, Boundaries& in, Round& round) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    if (fast) {
        const int count = round.count, opens = static_cast<int>(least(count, capacity - ledger.len));
        const int steps = count - opens;
        if (count == 0) return;
        if (lane < ledger.len) in.list[lane] = make_uint2(ledger.drift[0], ledger.tokens[0]);
        for (int n = lane; n < opens; n += 32) round.events[n] = OPEN;
        __syncwarp();
        ledger.len += opens;
        int slot = lane;
        if (steps > 0) {
            slot = p.mass ? merge_steps<true>(in.list, in.future + opens, capacity, steps, round.events + opens)
                          : merge_steps<false>(in.list, in.future + opens, capacity, steps, round.events + opens);
        }
        if (lane < ledger.len) ledger.drift[0] = in.list[slot].x, ledger.tokens[0] = in.list[slot].y;
        return;
    }
    int n = 0;
    for (int t = 0; first + t < end; t++) {
        uint8_t event = EXTEND;
        if (round.boundaries >> t & 1) {
            if (p.log) event = p.log[row.at(first + t)];
            else event = ledger.len < capacity ? OPEN : MERGE + cheapest_pair(ledger, p.mass);
            if (lane == 0) round.events[n] = event;
            n++;
        }
        apply(ledger, event, round.drift[t]);
    }
}

// ---- Warp 2: events and the slots at every chunk's entry ----

struct Published {
    int items[2], places[2];  // of slots lane and lane + 32
    double logs[2];           // of places lane and lane + 32
    int len;
};

template <typename T, int HALVES>
DEVICE void publish(const SegmentParams& p, const Row& row, int64_t first, int64_t end, const Round& round,
                    Published& now) {
    constexpr int C = T::CHUNK, EACH = C / STARTS;
    const Extents& e = p.extents;
    const int lane = lane_index();
    const auto tables = tables_of<T>(row);
    const uint64_t boundaries = round.boundaries;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = half * 32 + lane;
        if (first + t < end)
            p.events[row.at(first + t)] =
                boundaries >> t & 1 ? round.events[__popcll(boundaries & ((uint64_t(1) << t) - 1))] : EXTEND;
    }
    int n = 0;
#pragma unroll
    for (int chunk = 0; chunk < BLOCK / C; chunk++) {
        if (first + chunk * C >= end) break;
        const int64_t at = (tables.first + first / C + chunk) * e.value_heads + row.head;
        if (lane == 0) p.chunk_len[at] = now.len;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int i = half * 32 + lane;
            if (i < now.len) {
                p.chunk_starts[at * e.capacity + i] = now.items[half];
                p.chunk_place[at * e.capacity + i] = now.places[half];
            }
            // Places not held are not read.
            if (i < e.capacity) p.chunk_log[at * e.capacity + i] = static_cast<float>(now.logs[half]);
        }
        uint64_t left = boundaries >> chunk * C, touched = 0;
        if constexpr (C < 64) left &= (uint64_t(1) << C) - 1;
        if (!(left & 1)) {
            const int open = now.len - 1;
            touched = uint64_t(1) << __shfl_sync(ALL, now.places[HALVES == 2 && open >= 32], open % 32);
        }
        while (left) {
            const int t = __ffsll(left) - 1;
            left &= left - 1;
            const uint8_t event = round.events[n++];
            int place = now.len;
            if (event >= MERGE) {
                const int j = event - MERGE;
                int kept, nexts[2], places[2];
                if constexpr (HALVES == 2) {
                    kept = j < 32 ? __shfl_sync(ALL, now.places[0], j) : __shfl_sync(ALL, now.places[1], j - 32);
                    place = j < 31 ? __shfl_sync(ALL, now.places[0], j + 1) : __shfl_sync(ALL, now.places[1], j - 31);
                    next_slot(now.items, nexts);
                    next_slot(now.places, places);
                } else {
                    kept = __shfl_sync(ALL, now.places[0], j);
                    place = __shfl_sync(ALL, now.places[0], j + 1);
                    nexts[0] = __shfl_down_sync(ALL, now.items[0], 1);
                    places[0] = __shfl_down_sync(ALL, now.places[0], 1);
                }
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    if (half * 32 + lane > j) now.items[half] = nexts[half], now.places[half] = places[half];
                touched |= uint64_t(1) << kept;
                now.len--;
            }
            touched |= uint64_t(1) << place;
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                if (half * 32 + lane == now.len) {
                    now.items[half] = static_cast<int>(first) + chunk * C + t;
                    now.places[half] = place;
                }
            }
            now.len++;
        }
        double total = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t from = first + chunk * C + i * STARTS;
            if (from < end) total += p.totals[tables.at(from / STARTS)];
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            now.logs[half] = touched >> (half * 32 + lane) & 1 ? 0.0 : now.logs[half] + total;
    }
}

// ---- The chain ----

// The slots that a row begins with, every warp its own part; whether the fast merges are exact for it.
DEVICE bool begin(const SegmentParams& p, const Row& row, Find& find, Ledger& ledger, Published& published) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    const int64_t slots = row.index() * capacity;
    ledger = {{0, 0}, {0, 0}, 0};
    if (p.initial_len) ledger.len = p.initial_len[row.index()];
    published = {{lane - ledger.len, lane + 32 - ledger.len}, {lane, lane + 32}, {0, 0}, ledger.len};
    uint64_t drift = 0, tokens = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        if (i < ledger.len) {
            drift += ledger.drift[half] = p.initial_drift[slots + i];
            tokens += ledger.tokens[half] = p.initial_tokens[slots + i];
        }
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        drift += __shfl_xor_sync(ALL, drift, by);
        tokens += __shfl_xor_sync(ALL, tokens, by);
    }
    // No score is above 2, 8192 units.
    const bool fast = !p.log && capacity <= FAST_SLOTS && drift + 8192 * static_cast<uint64_t>(row.len) < NONE &&
                      tokens + static_cast<uint64_t>(row.len) < NONE;
    if (fast) {
        const uint32_t own_drift = ledger.drift[0], own_tokens = ledger.tokens[0];
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const uint32_t d = __shfl_up_sync(ALL, ledger.drift[0], by), n = __shfl_up_sync(ALL, ledger.tokens[0], by);
            if (lane >= by) ledger.drift[0] += d, ledger.tokens[0] += n;
        }
        ledger.drift[0] -= own_drift, ledger.tokens[0] -= own_tokens;
    }
    const int open = ledger.len > 0 ? ledger.len - 1 : 0;
    const uint32_t last_drift = __shfl_sync(ALL, ledger.drift[0], open % 32);
    const uint32_t last_tokens = __shfl_sync(ALL, ledger.tokens[0], open % 32);
    if (warp_index() == 1 && lane == 0) {
        find = {ledger.len ? CARRIED : NO_SEGMENT,
                ledger.len ? UNKNOWN : 0,
                0,
                ledger.len ? 0 : UNKNOWN,
                0,
                0,
                static_cast<uint32_t>(drift),
                static_cast<uint32_t>(tokens),
                {last_drift, last_tokens},
                ledger.len,
                0};
    }
    return fast;
}

template <typename T>
DEVICE void segment(const SegmentParams& p) {
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, capacity = e.capacity;
    const int lane = lane_index(), warp = warp_index(), thread = threadIdx.x;
    const Row row = row_of(e, blockIdx.x / e.value_heads, blockIdx.x % e.value_heads);
    if (row.len <= p.from && p.from > 0) return;
    const int64_t window_end = least(p.to, row.len);
    const int rounds = static_cast<int>((window_end - p.from + BLOCK - 1) / BLOCK);

    Carve carve{dynamic_shared()};
    Shared shared;
    shared.boundaries = carve.take<Boundaries>(2);
    shared.rounds = carve.take<Round>(3);
    shared.find = carve.take<Find>(1);
    shared.keys = carve.take<float>(TILE * (TILE + 1));
    shared.values = carve.take<float>(TILE * (TILE + 1));
    shared.carried = carve.take<float>(CHAIN_WARPS * TILE);
    shared.sums = carve.take<float>(CHAIN_WARPS);
    shared.gamma = carve.take<Gamma>(32);
    shared.energy = carve.take<float>(TILE);
    shared.factor = carve.take<float>(TILE);
    shared.decay = carve.take<float>(TILE);
    carve.check();

    float* const open = p.open + row.index() * dk * dv;
    State& state = static_cast<State*>(p.state)[row.index()];
    Ledger ledger;
    Published published;
    const bool fast = begin(p, row, *shared.find, ledger, published);
    if (p.from > 0) {
        if (thread == 32) *shared.find = state.find;
        ledger.len = state.merged, published.len = state.published;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + half * 32;
            ledger.drift[half] = state.slots[0][i], ledger.tokens[half] = state.slots[1][i];
            published.items[half] = state.items[i], published.places[half] = state.places[i];
            published.logs[half] = state.logs[i];
        }
    } else if (published.len > 0 || row.len == 0) {
        float squared = 0;
        for (int i = thread * 4; i < dk * dv; i += SEGMENT_THREADS * 4) {
            float4 r = make_float4(0, 0, 0, 0);
            if (p.initial_len) r = *reinterpret_cast<const float4*>(p.initial_open + row.index() * dk * dv + i);
            *reinterpret_cast<float4*>(open + i) = r;
            squared += r.x * r.x + r.y * r.y + r.z * r.z + r.w * r.w;
        }
        squared = block_sum(squared, shared.sums);
        if (thread == 32) shared.find->squared = squared;
    }
    __syncthreads();

    for (int i = 0; i < rounds + 2; i++) {
        const int64_t first = p.from + static_cast<int64_t>(i) * BLOCK, end = least(first + BLOCK, window_end);
        Round& round = shared.rounds[i % 3];
        if (warp == 0 && i >= 1 && i <= rounds)
            merge_round(p, row, first - BLOCK, least(first, window_end), fast, ledger,
                        shared.boundaries[(i - 1) % 2], shared.rounds[(i - 1) % 3]);
        if (warp == 1 && i < rounds) {
            if (lane == 0) round.boundaries = 0;
            __syncwarp();
            look_up<T>(p, row, first, end, round, *shared.find);
            if (shared.find->done == end)
                finish_round(p, row, first, end, fast, round, shared.boundaries[i % 2], *shared.find);
        }
        if (warp == 2 && i >= 2) {
            const int64_t to = least(first - BLOCK, window_end);
            if (capacity > 32) publish<T, 2>(p, row, first - 2 * BLOCK, to, shared.rounds[(i - 2) % 3], published);
            else publish<T, 1>(p, row, first - 2 * BLOCK, to, shared.rounds[(i - 2) % 3], published);
        }
        __syncthreads();
        while (i < rounds && shared.find->done < end) {
            slow_path<T>(p, row, open, first, end, round, shared);
            if (warp == 1) {
                look_up<T>(p, row, first, end, round, *shared.find);
                if (shared.find->done == end)
                    finish_round(p, row, first, end, fast, round, shared.boundaries[i % 2], *shared.find);
            }
            __syncthreads();
        }
    }

    if (window_end < row.len) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + half * 32;
            if (warp == 0) state.slots[0][i] = ledger.drift[half], state.slots[1][i] = ledger.tokens[half];
            if (warp == 2) {
                state.items[i] = published.items[half], state.places[i] = published.places[half];
                state.logs[i] = published.logs[half];
            }
        }
        if (thread == 0) state.merged = ledger.len;
        if (thread == 32) state.find = *shared.find;
        if (thread == 64) state.published = published.len;
        return;
    }

    // The row's end: R itself, and what the slots hold.
    int64_t covered = shared.find->covered;
    if (covered == UNKNOWN) covered = shared.find->start < 0 ? row.len : shared.find->start;
    for (; covered < row.len; covered += TILE)
        cover<T>(p, row, open, covered, static_cast<int>(least(TILE, row.len - covered)), shared);
    const float log = shared.find->log;
    if (log != 0) {
        const float factor = expf(log);
        for (int i = thread; i < dk * dv; i += SEGMENT_THREADS) open[i] *= factor;
    }
    if (warp == 0) {
        if (lane == 0) p.len[row.index()] = ledger.len;
        if (fast) {
            const uint32_t drift = __shfl_down_sync(ALL, ledger.drift[0], 1);
            const uint32_t tokens = __shfl_down_sync(ALL, ledger.tokens[0], 1);
            const bool newest = lane == ledger.len - 1;
            ledger.drift[0] = (newest ? shared.find->drift : drift) - ledger.drift[0];
            ledger.tokens[0] = (newest ? shared.find->tokens : tokens) - ledger.tokens[0];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            if (i < capacity) {
                p.tokens[row.index() * capacity + i] = i < ledger.len ? ledger.tokens[half] : 0;
                p.summed_drift[row.index() * capacity + i] = i < ledger.len ? ledger.drift[half] : 0;
            }
        }
    }
}

}  // namespace
}  // namespace dla

#define KERNELS(suffix, T)                                                                                      \
    KERNEL BLOCK_OF(dla::SEGMENT_THREADS) segment_gram_##suffix(const __grid_constant__ dla::SegmentParams p) { \
        dla::segment_gram<dla::T>(p);                                                                           \
    }                                                                                                           \
    KERNEL BLOCKS_OF(dla::SEGMENT_THREADS, 8) segment_##suffix(const __grid_constant__ dla::SegmentParams p) {  \
        dla::segment<dla::T>(p);                                                                                \
    }
KERNELS(bf16, Bf16)
KERNELS(f16, F16)
KERNELS(f32, F32)
