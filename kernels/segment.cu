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
// them ready. Lane j holds the key (cost, index) of pair j, those of slots j to j + 2 and j to j + 3, and divides
// for that of j to j + 4: whatever pair goes, the keys that remain are there already, and a link of the chain is
// one redux.min and two selects. A division has two links' time. That takes M <= 32, no log of the caller's and
// sums that cannot saturate (cached drift + 8192 units a token below 2^32); what else there is takes the ledger
// of the definition, one token at a time.
//
// Grid and block: segment_gram places of chunks x HV x C / 32, segment N x HV; 128 threads both.
//
// R stands in global memory (the cache's own array; 64 KiB at dk = dv = 128, so in L2) as it was at its newest
// token that is not zero, with |R|^2 taken from R itself at every update and the log decay since: c asks no
// scale, and what strong decay leaves of a segment is far below f32.
//
// Numerics: k and v are exact in their planes (f32: 2^-17); R and the decayed keys take two planes whatever the
// dtype. Decisions are those of src/events.rs, bit for bit. The product |k| |v| must lie within 1e-19 and 1e19.
//
// Shared memory, whatever the head size: segment_gram 17,920 bytes (bf16) and 19,712, segment 9,280. Workspace 142
// bytes a token and head, 128 of them for the walks, of which a walk of one step fills 4. Registers: at the end of
// the file. Predicted, not measured, from the SASS of sm_90a: the loop of merges issues 46 instructions a token, 21 of
// them at half rate; 50 to 60 clocks a token with a merge at each, and some 5 for a round's start; so 32,768 tokens in
// 1.0 to 1.2 ms at 1.75 GHz whatever the heads. segment_gram makes 82 kFLOP a token and head, reads k and v twice
// (once from L2): 0.1 to 0.2 ms at S3. The slow path: 300 clocks a token or more.

#include "common/ledger.cuh"
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
    union {
        float drift[BLOCK];
        uint32_t steps[BLOCK];  // warp 2 alone
        uint4 steps4[BLOCK / 4];
    };
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

// What the warps keep from round to round, and a row from window to window.
struct State {
    Find find;
    uint32_t slots[2][MOST_SLOTS];  // prefix sums of drift and tokens, or the sums of every slot
    int items[MOST_SLOTS];
    int places[MOST_SLOTS];
    double logs[MOST_SLOTS];
    int merged, published;  // slots held
};
static_assert(sizeof(State) == SEGMENT_STATE_BYTES);

// All of it at fixed addresses: a pointer to each part would take registers, as the row would.
struct Shared {
    Boundaries boundaries[2];
    State state;
    Row row;
    int64_t window_end;
    Round rounds[3];
    float carried[CHAIN_WARPS][TILE];
    float sums[CHAIN_WARPS];
    Gamma gamma[32];
    float energy[TILE], factor[TILE], decay[TILE];
    float keys[TILE * (TILE + 1)];
    float values[TILE * (TILE + 1)];
};
static_assert(sizeof(Shared) == SEGMENT_SHARED_BYTES);

DEVICE Shared& shared_of_block() { return *reinterpret_cast<Shared*>(dynamic_shared()); }

// ---- The slow path: R, 16 tokens at a time ----

// Tokens of a tile, operands straight from global memory; rows past `len` are zero.
template <typename T>
struct Operand {
    const T* data;
    int pitch;
    int width, len;
    METHOD void pair(int t, int column, float& x0, float& x1) const {
        x0 = x1 = 0;
        if (t < len && column < width) load2(data + t * pitch + column, x0, x1);
    }
    // The same tokens; addresses made from them are not kept in registers over the loop that asks.
    METHOD Operand afresh() const { return {data, opaque(pitch), width, len}; }
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
    return {static_cast<const T*>(p.k) + row.key_at(first) * p.extents.dk, p.extents.heads * p.extents.dk,
            p.extents.dk, len};
}
template <typename T>
DEVICE Operand<T> values_at(const SegmentParams& p, const Row& row, int64_t first, int len) {
    return {static_cast<const T*>(p.v) + row.at(first) * p.extents.dv,
            p.extents.value_heads * p.extents.dv, p.extents.dv, len};
}

DEVICE float* open_of(const SegmentParams& p, const Row& row) {
    return p.open + row.index() * p.extents.dk * p.extents.dv;
}

// Gamma, norms and factors of a tile, by one warp.
template <typename T>
DEVICE void describe(const SegmentParams& p, const Row& row, int64_t first, int len) {
    Shared& shared = shared_of_block();
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
#pragma unroll 1
    for (int k = 0; k < x.width; k += 16) {
        uint32_t a[PARTS][4], b[PARTS][4];
        x.afresh().template rows<PARTS>(k, a);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            b[part][0] = a[part][0], b[part][1] = a[part][2], b[part][2] = a[part][1], b[part][3] = a[part][3];
        multiply<PARTS, PARTS>(c, a, b);
    }
    each_pair(c, [&](int r, int n, float x0, float x1) {
        out[r * (TILE + 1) + n] = x0, out[r * (TILE + 1) + n + 1] = x1;
    });
}

// C [16, 8] += A B, low parts first: half of what `multiply` makes, in half the registers.
template <int PA, int PB>
DEVICE void multiply_half(float (&c)[4], const uint32_t (&a)[PA][4], const uint32_t (&b)[PB][2]) {
    if constexpr (PA == 2) mma_bf16(c, a[1], b[0][0], b[0][1]);
    if constexpr (PB == 2) mma_bf16(c, a[0], b[1][0], b[1][1]);
    mma_bf16(c, a[0], b[0][0], b[0][1]);
}

// carried[warp][t] = part of k_t^T R v_t, as (V R^T) . K: the fragments of R^T lie as R does. Warps take
// columns of dk in turn.
template <typename T>
DEVICE void carried_products(const Operand<T>& keys, const Operand<T>& values, const float* open) {
    Shared& shared = shared_of_block();
    constexpr int PARTS = T::PARTS;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float row_sums[2] = {0, 0};
#pragma unroll 1
    for (int column = warp_index() * 8; column < dk; column += CHAIN_WARPS * 8) {
        float c[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int k = 0; k < dv; k += 16) {
            uint32_t a[PARTS][4], b[2][2];
            values.afresh().template rows<PARTS>(k, a);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int from = k + i * 8 + c2;
                float2 r = make_float2(0, 0);
                if (from < dv) r = *reinterpret_cast<const float2*>(open + (column + g) * dv + from);
                uint32_t planes[2];
                split<2>(r.x, r.y, planes);
                b[0][i] = planes[0], b[1][i] = planes[1];
            }
            multiply_half<PARTS, 2>(c, a, b);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x0, x1;
            keys.pair(g + i * 8, column + c2, x0, x1);
            row_sums[i] += c[2 * i] * x0 + c[2 * i + 1] * x1;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 1);
        row_sums[i] += __shfl_xor_sync(ALL, row_sums[i], 2);
        if (lane_index() % 4 == 0) shared.carried[warp_index()][g + i * 8] = row_sums[i];
    }
}

// R = keep R + sum over a tile's tokens of decay_s k_s v_s^T; returns the thread's part of |R|^2.
template <typename T>
DEVICE float update_open(const Operand<T>& keys, const Operand<T>& values, float* open, float keep,
                         const float* decay) {
    constexpr int PARTS = T::PARTS;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float squared = 0;
#pragma unroll 1
    for (int row = warp_index() * 16; row < dk; row += CHAIN_WARPS * 16) {
        uint32_t a[2][4];
        const Operand<T> here = keys.afresh();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = i / 2 * 8 + c2, m = row + g + i % 2 * 8;
            uint32_t planes[2];
            split<2>(decay[t] * here.one(t, m), decay[t + 1] * here.one(t + 1, m), planes);
            a[0][i] = planes[0], a[1][i] = planes[1];
        }
#pragma unroll 1
        for (int column = 0; column < dv; column += 8) {
            float c[4] = {0, 0, 0, 0};
            uint32_t b[PARTS][2];
            const Operand<T> there = values.afresh();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = i * 8 + c2;
                uint32_t planes[PARTS];
                split<PARTS>(there.one(t, column + g), there.one(t + 1, column + g), planes);
#pragma unroll
                for (int part = 0; part < PARTS; part++) b[part][i] = planes[part];
            }
            multiply_half<2, PARTS>(c, a, b);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (row + g + i * 8 >= dk) continue;
                float2* at = reinterpret_cast<float2*>(open + (row + g + i * 8) * dv + column + c2);
                float x0 = c[2 * i], x1 = c[2 * i + 1];
                if (keep != 0) {
                    const float2 held = *at;
                    x0 += keep * held.x, x1 += keep * held.y;
                }
                *at = make_float2(x0, x1);
                squared += x0 * x0 + x1 * x1;
            }
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
DEVICE void cover(const SegmentParams& p, const Row& row, int64_t first, int len) {
    Shared& shared = shared_of_block();
    Find& find = shared.state.find;
    __syncthreads();
    if (warp_index() == 0) describe<T>(p, row, first, len);
    __syncthreads();
    const bool fresh = first == find.start;
    const float log = find.log, old = find.squared;
    int newest = -1;
#pragma unroll 1
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
            shared.decay[t] =
                t <= newest ? shared.factor[t] * expf(minus(shared.gamma[newest], shared.gamma[t])) : 0.0f;
        }
        __syncthreads();
        const float keep = fresh || old == 0 ? 0.0f : expf(log + value(shared.gamma[newest]));
        const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
        squared = block_sum(update_open(keys, values, open_of(p, row), keep, shared.decay), shared.sums);
        since = minus(end, shared.gamma[newest]);
    }
    if (threadIdx.x == 0) {
        find.squared = squared;
        find.log = since;
        find.covered = first + len;
    }
    __syncthreads();
}

// Takes the open segment's tokens before `to` into R. By the block.
template <typename T>
DEVICE void bring(const SegmentParams& p, const Row& row, int64_t to) {
    Find& find = shared_of_block().state.find;
    __syncthreads();
    if (threadIdx.x == 0 && find.covered == UNKNOWN) find.covered = find.start < 0 ? to : find.start;
    __syncthreads();
#pragma unroll 1
    while (find.covered < to) {
        const int64_t first = find.covered;
        cover<T>(p, row, first, static_cast<int>(least(TILE, to - first)));
    }
}

// Judges the tokens of a tile against R, up to a boundary. By the block; begins and ends with a barrier.
template <typename T>
DEVICE void judge(const SegmentParams& p, const Row& row, int64_t first, int len, float* drift) {
    Shared& shared = shared_of_block();
    Find& find = shared.state.find;
    const int warp = warp_index(), lane = lane_index();
    const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
    __syncthreads();
    const float squared = find.squared, log = find.log;
    if (warp == 0) small_gram(keys, shared.keys);
    if (warp == 2) small_gram(values, shared.values);
    if (warp == 1) describe<T>(p, row, first, len);
    if (squared > 0) carried_products(keys, values, open_of(p, row));
    __syncthreads();
    if (warp == 1) {
        const int t = lane % TILE;
        const uint32_t live = __ballot_sync(ALL, lane < TILE && shared.energy[t] > 0);
        const int newest = highest(live & ((1u << t) - 1));
        float numerator = 0;
#pragma unroll 1
        for (int s = 0; s <= newest; s++)
            numerator += expf(minus(shared.gamma[newest], shared.gamma[s])) *
                         (shared.keys[t * (TILE + 1) + s] * shared.factor[t] * shared.factor[s]) *
                         shared.values[t * (TILE + 1) + s];
        __syncwarp();
        if (squared > 0) {
            float product = 0;
#pragma unroll
            for (int w = 0; w < CHAIN_WARPS; w++) product += shared.carried[w][t];
            const float since = newest < 0 ? 0.0f : log + value(shared.gamma[newest]);
            numerator += expf(since) * product * shared.factor[t];
        }
        const bool opens = p.log && t < len && p.log[row.at(first + t)] != EXTEND;
        const uint32_t logged = __ballot_sync(ALL, opens);
        const float tau = p.tau[row.head];
        Walk walk = {squared, {0, 0}, log};
        int boundary = -1;
#pragma unroll 1
        for (int i = 0; i < len && boundary < 0; i++) {
            const float score = walk.judge(__shfl_sync(ALL, numerator, i), shared.energy[i], shared.gamma[i]);
            if (lane == 0) drift[i] = score;
            if (p.log ? logged >> i & 1 : p.extents.capacity > 1 && score >= tau) boundary = i;
        }
        if (lane == 0) {
            find.done = boundary < 0 ? first + len : first + boundary + 1;
            if (boundary >= 0) {
                find.next = first + boundary;
                find.covered = UNKNOWN;
            }
        }
    }
    __syncthreads();
}

// Judges a tile of the round's tokens by R from find.done on, fewer tokens where a boundary comes. R is brought
// there first; what is judged it takes next time.
template <typename T>
DEVICE void slow_path(const SegmentParams& p, const Row& row, int64_t first, Round& round) {
    Shared& shared = shared_of_block();
    Find& find = shared.state.find;
    bring<T>(p, row, find.done);
    const int64_t from = find.done;
    const int64_t end = least(first + BLOCK, shared.window_end);
    judge<T>(p, row, from, static_cast<int>(least(TILE, end - from)), round.drift + (from - first));
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

// Key of merging what begins at a and ends at b, index left out; in two halves, for the loop of merges.
template <bool MASS>
struct Cost {
    float drift = 0, tokens = 1, reciprocal = 1;
    METHOD void start(uint2 a, uint2 b) {
        drift = __uint2float_rn(b.x - a.x);
        if constexpr (!MASS) {
            tokens = __uint2float_rn(b.y - a.y);
            reciprocal = dla::reciprocal(tokens);
        }
    }
    METHOD uint32_t key() const {
        const float cost = MASS ? drift : quotient(drift, tokens, reciprocal);
        return __float_as_uint(cost) & ~63u;
    }
};
template <bool MASS>
DEVICE uint32_t key_of(uint2 a, uint2 b) {
    Cost<MASS> cost;
    cost.start(a, b);
    return cost.key();
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

// A round that begins at `first`, as far as look-ups go.
template <typename T>
DEVICE void search(const SegmentParams& p, const Row& row, int64_t first, bool fast, Round& round, Boundaries& out) {
    Shared& shared = shared_of_block();
    const int64_t end = least(first + BLOCK, shared.window_end);
    look_up<T>(p, row, first, end, round, shared.state.find);
    if (shared.state.find.done == end) finish_round(p, row, first, end, fast, round, out, shared.state.find);
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
    const bool edge = lane == last;
    uint32_t k = NONE, r = NONE, q = NONE;
    if (lane <= last) {
        const uint2 from = list[lane];
        k = key_of<MASS>(from, list[lane + 2]) | lane;
        r = key_of<MASS>(from, list[lane + 3]);
        q = key_of<MASS>(from, list[lane + 4]);
    }
    // Addresses: where slot j begins, where j + 5 does.
    const uint32_t base = shared_address(list);
    uint32_t slot = base + lane * 8, end = slot + 40, edge_slot = base + (last + 1) * 8;
    uint32_t q_down = NONE;
    int before = 64;  // the pair of the step before; at first one that moves nothing
    uint2 from = shared_uint2(slot), to = shared_uint2(end);
    Cost<MASS> cost;
#pragma unroll 4
    for (int i = 0; i < steps; i++) {
        const uint32_t best = __reduce_min_sync(ALL, k);
        // While it comes. The key of five, of the list before the last step: its division began then.
        const uint32_t s = cost.key();
        q = position > before ? q_down : position + 3 >= before ? s : q;
        cost.start(from, to);
        const uint4 f = future[i];
        uint32_t k_down = __shfl_down_sync(ALL, k, 1) - 1;
        uint32_t r_down = __shfl_down_sync(ALL, r, 1);
        q_down = __shfl_down_sync(ALL, q, 1);
        uint32_t slot_down = __shfl_down_sync(ALL, slot, 1), end_down = __shfl_down_sync(ALL, end, 1);
        if (edge) k_down = f.x, r_down = f.y, q_down = f.z, slot_down = edge_slot, end_down = edge_slot + 40;
        edge_slot += 8;
        const uint32_t r_key = r | lane;

        const int j = best & 63;
        const bool above = position > j;
        k = above ? k_down : position + 1 >= j ? r_key : k;
        r = above ? r_down : position + 2 >= j ? q : r;
        slot = above ? slot_down : slot;
        end = position + 4 >= j ? end_down : end;
        from = shared_uint2(slot), to = shared_uint2(end);
        before = j;
        events[i] = MERGE + j;
    }
    return lane <= last ? static_cast<int>(slot - base) / 8 : lane + steps;
}

// A round's boundaries.
DEVICE void merge_round(const SegmentParams& p, const Row& row, int64_t first, int64_t end, bool fast, State& state,
                        Boundaries& in, Round& round) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    int held = state.merged;
    if (fast) {
        const int count = round.count, opens = count < capacity - held ? count : capacity - held;
        const int steps = count - opens;
        if (count == 0) return;
        if (lane < held) in.list[lane] = make_uint2(state.slots[0][lane], state.slots[1][lane]);
        for (int n = lane; n < opens; n += 32) round.events[n] = OPEN;
        __syncwarp();
        held += opens;
        int slot = lane;
        if (steps > 0) {
            slot = p.mass ? merge_steps<true>(in.list, in.future + opens, capacity, steps, round.events + opens)
                          : merge_steps<false>(in.list, in.future + opens, capacity, steps, round.events + opens);
        }
        if (lane < held) state.slots[0][lane] = in.list[slot].x, state.slots[1][lane] = in.list[slot].y;
    } else {
        Ledger ledger = {{state.slots[1][lane], state.slots[1][lane + 32]},
                         {state.slots[0][lane], state.slots[0][lane + 32]},
                         held};
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
        state.slots[0][lane] = ledger.drift[0], state.slots[0][lane + 32] = ledger.drift[1];
        state.slots[1][lane] = ledger.tokens[0], state.slots[1][lane + 32] = ledger.tokens[1];
        held = ledger.len;
    }
    __syncwarp();
    if (lane == 0) state.merged = held;
    __syncwarp();
}

// ---- Warp 2: events and the slots at every chunk's entry ----

// Decay of a chunk's tokens.
template <typename T>
DEVICE double total_of(const SegmentParams& p, const Tables<T::CHUNK>& tables, int64_t first, int64_t end) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < T::CHUNK / STARTS; i++) {
        const int64_t from = first + i * STARTS;
        if (from < end) total += p.totals[tables.at(from / STARTS)];
    }
    return total;
}

// One round, 32 slots at most, no log of the caller's: slots are opened until all are held, and from then on every
// boundary merges. Lane j holds a word for slot j, what it is known by above and its place below; at a merge of pair
// j the words past slot j move down, and the new slot takes the place of slot j + 1. A slot is known by its token in
// the chunk or, if the chunk began with it, by its index then and OLD. One that neither began in the chunk nor ends
// where it did when the chunk began has tokens of the chunk; the open one has.
template <typename T>
DEVICE void publish(const SegmentParams& p, const Row& row, int64_t first, int64_t end, Round& round, State& state) {
    constexpr int C = T::CHUNK;
    constexpr uint32_t OLD = 64, PLACE = 31;
    const Extents& e = p.extents;
    const int lane = lane_index(), capacity = e.capacity;
    const auto tables = tables_of<T>(row);
    int item = state.items[lane], place = state.places[lane], held = state.published, n = 0;
    double log = state.logs[lane];
#pragma unroll
    for (int chunk = 0; chunk < BLOCK / C; chunk++) {
        const int64_t from = first + chunk * C;
        if (from >= end) break;
        const int64_t at = (tables.first + first / C + chunk) * e.value_heads + row.head;
        if (lane == 0) p.chunk_len[at] = held;
        // What is not held is read, ahead of how many are, and not used.
        if (lane < capacity) {
            p.chunk_starts[at * capacity + lane] = lane < held ? item : 0;
            p.chunk_place[at * capacity + lane] = lane < held ? place : 0;
            p.chunk_log[at * capacity + lane] = static_cast<float>(log);
        }
        const double total = total_of<T>(p, tables, from, end);

        uint64_t boundaries = round.boundaries >> chunk * C;
        if constexpr (C < 64) boundaries &= (uint64_t(1) << C) - 1;
        const int count = __popcll(boundaries), opens = count < capacity - held ? count : capacity - held;
        // Tokens that open from the front, those that merge at the end, with the slot that goes. No drift is needed
        // any more.
        uint32_t* const steps = round.steps;
#pragma unroll
        for (int half = 0; half < C / 32; half++) {
            const int t = half * 32 + lane;
            uint8_t event = EXTEND;
            if (boundaries >> t & 1) {
                const int i = __popcll(boundaries & ((uint64_t(1) << t) - 1));
                event = round.events[n + i];
                steps[i < opens ? i : BLOCK - count + i] = t * 32 + (i < opens ? 0 : event - MERGE + 1);
            }
            if (from + t < end) p.events[row.at(from + t)] = event;
        }
        n += count;
        __syncwarp();
        uint32_t word = (OLD | lane) * 32 + place;
        if (lane >= held && lane < held + opens) word = steps[lane - held] | lane;
        const int entered = held;
        held += opens;
        const bool newest = lane == held - 1;
        const auto merge = [&](uint32_t step) {
            const uint32_t down = __shfl_down_sync(ALL, word, 1), goes = __shfl_sync(ALL, word, step & 31);
            word = lane >= static_cast<int>(step & 31) ? down : word;
            word = newest ? ((goes ^ step) & PLACE) ^ step : word;
        };
        uint32_t i = BLOCK - count + opens;
#pragma unroll 1
        for (; i % 4 != 0; i++) merge(steps[i]);
#pragma unroll 2
        for (; i < BLOCK; i += 4) {
            const uint4 four = round.steps4[i / 4];
            merge(four.x), merge(four.y), merge(four.z), merge(four.w);
        }

        // A slot that the chunk's first token begins follows those that the chunk began with.
        uint32_t known = word / 32;
        const int old = __shfl_sync(ALL, item, known & 31);
        item = known & OLD ? old : static_cast<int>(from) + static_cast<int>(known);
        place = word & PLACE;
        const uint32_t as = known == 0 ? OLD + entered : known;
        const uint32_t after = __shfl_down_sync(ALL, as, 1);
        const bool touched = lane < held && (newest || !(known & OLD) || after != known + 1);
        const uint32_t places = __reduce_or_sync(ALL, touched ? 1u << place : 0);
        log = places >> lane & 1 ? 0.0 : log + total;
        __syncwarp();
    }
    state.items[lane] = item, state.places[lane] = place, state.logs[lane] = log;
    __syncwarp();
    if (lane == 0) state.published = held;
    __syncwarp();
}

// Of more slots, or with a log of the caller's: one token at a time.
template <typename T>
DEVICE void publish_any(const SegmentParams& p, const Row& row, int64_t first, int64_t end, const Round& round,
                        State& state) {
    constexpr int C = T::CHUNK;
    const Extents& e = p.extents;
    const int lane = lane_index();
    const auto tables = tables_of<T>(row);
    const uint64_t boundaries = round.boundaries;
    int items[2], places[2];  // of slots lane and lane + 32
    double logs[2];           // of places lane and lane + 32
    int held = state.published;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = half * 32 + lane;
        items[half] = state.items[i], places[half] = state.places[i], logs[half] = state.logs[i];
    }
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
        if (lane == 0) p.chunk_len[at] = held;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = half * 32 + lane;
            if (i < e.capacity) {
                p.chunk_starts[at * e.capacity + i] = i < held ? items[half] : 0;
                p.chunk_place[at * e.capacity + i] = i < held ? places[half] : 0;
                p.chunk_log[at * e.capacity + i] = static_cast<float>(logs[half]);
            }
        }
        uint64_t left = boundaries >> chunk * C, touched = 0;
        if constexpr (C < 64) left &= (uint64_t(1) << C) - 1;
        if (!(left & 1)) {
            const int open = held - 1;
            const int place = open < 32 ? __shfl_sync(ALL, places[0], open) : __shfl_sync(ALL, places[1], open - 32);
            touched = uint64_t(1) << place;
        }
        while (left) {
            const int t = __ffsll(left) - 1;
            left &= left - 1;
            const uint8_t event = round.events[n++];
            int place = held;
            if (event >= MERGE) {
                const int j = event - MERGE;
                const int kept = j < 32 ? __shfl_sync(ALL, places[0], j) : __shfl_sync(ALL, places[1], j - 32);
                place = j < 31 ? __shfl_sync(ALL, places[0], j + 1) : __shfl_sync(ALL, places[1], j - 31);
                int next_items[2], next_places[2];
                next_slot(items, next_items);
                next_slot(places, next_places);
#pragma unroll
                for (int half = 0; half < 2; half++)
                    if (half * 32 + lane > j) items[half] = next_items[half], places[half] = next_places[half];
                touched |= uint64_t(1) << kept;
                held--;
            }
            touched |= uint64_t(1) << place;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half * 32 + lane == held) {
                    items[half] = static_cast<int>(first) + chunk * C + t;
                    places[half] = place;
                }
            }
            held++;
        }
        const double total = total_of<T>(p, tables, first + chunk * C, end);
#pragma unroll
        for (int half = 0; half < 2; half++)
            logs[half] = touched >> (half * 32 + lane) & 1 ? 0.0 : logs[half] + total;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = half * 32 + lane;
        state.items[i] = items[half], state.places[i] = places[half], state.logs[i] = logs[half];
    }
    __syncwarp();
    if (lane == 0) state.published = held;
    __syncwarp();
}

// ---- The chain ----

// Whether the fast merges are exact for a row; unless a window has left the row's state, the slots that it begins
// with. By every warp, warp 0 writes.
DEVICE bool begin(const SegmentParams& p, const Row& row, State& state) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    const int64_t slots = row.index() * capacity;
    const int held = p.initial_len ? p.initial_len[row.index()] : 0;
    uint32_t slot_drift[2] = {0, 0}, slot_tokens[2] = {0, 0};
    uint64_t drift = 0, tokens = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        if (i < held) {
            drift += slot_drift[half] = p.initial_drift[slots + i];
            tokens += slot_tokens[half] = p.initial_tokens[slots + i];
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
    if (p.from > 0 || warp_index() != 0) return fast;
    if (fast) {
        const uint32_t own_drift = slot_drift[0], own_tokens = slot_tokens[0];
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const uint32_t d = __shfl_up_sync(ALL, slot_drift[0], by), n = __shfl_up_sync(ALL, slot_tokens[0], by);
            if (lane >= by) slot_drift[0] += d, slot_tokens[0] += n;
        }
        slot_drift[0] -= own_drift, slot_tokens[0] -= own_tokens;
    }
    const int open = held > 0 ? held - 1 : 0;
    const uint32_t last_drift = __shfl_sync(ALL, slot_drift[0], open % 32);
    const uint32_t last_tokens = __shfl_sync(ALL, slot_tokens[0], open % 32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        state.slots[0][i] = slot_drift[half], state.slots[1][i] = slot_tokens[half];
        state.items[i] = i - held, state.places[i] = i, state.logs[i] = 0;
    }
    if (lane == 0) {
        state.merged = state.published = held;
        state.find = {held ? CARRIED : NO_SEGMENT,
                      held ? UNKNOWN : 0,
                      0,
                      held ? 0 : UNKNOWN,
                      0,
                      0,
                      static_cast<uint32_t>(drift),
                      static_cast<uint32_t>(tokens),
                      {last_drift, last_tokens},
                      held,
                      0};
    }
    return fast;
}

template <typename T>
DEVICE void segment(const SegmentParams& p) {
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, capacity = e.capacity;
    const int lane = lane_index(), warp = warp_index(), thread = threadIdx.x;
    if (dynamic_shared_bytes() < sizeof(Shared)) trap();
    Shared& shared = shared_of_block();
    {
        const Row own = row_of(e, blockIdx.x / e.value_heads, blockIdx.x % e.value_heads);
        if (own.len <= p.from && p.from > 0) return;
        if (thread == 0) {
            shared.row = own;
            shared.window_end = least(p.to, own.len);
        }
        __syncthreads();
    }
    const Row& row = shared.row;
    const int64_t& window_end = shared.window_end;
    const int rounds = static_cast<int>((window_end - p.from + BLOCK - 1) / BLOCK);

    State& state = shared.state;
    constexpr int WORDS = sizeof(State) / 4;
    uint32_t* const words = reinterpret_cast<uint32_t*>(&state);
    const auto saved = [&] { return static_cast<uint32_t*>(p.state) + row.index() * WORDS; };
    const bool fast = begin(p, row, state);
    if (p.from > 0) {
#pragma unroll 1
        for (int i = thread; i < WORDS; i += SEGMENT_THREADS) words[i] = saved()[i];
    } else if (p.initial_len ? p.initial_len[row.index()] > 0 || row.len == 0 : row.len == 0) {
        float* const open = open_of(p, row);
        float squared = 0;
#pragma unroll 1
        for (int i = thread * 4; i < dk * dv; i += SEGMENT_THREADS * 4) {
            float4 r = make_float4(0, 0, 0, 0);
            if (p.initial_len) r = *reinterpret_cast<const float4*>(p.initial_open + row.index() * dk * dv + i);
            *reinterpret_cast<float4*>(open + i) = r;
            squared += r.x * r.x + r.y * r.y + r.z * r.z + r.w * r.w;
        }
        squared = block_sum(squared, shared.sums);
        if (thread == 0) state.find.squared = squared;
    }
    __syncthreads();

    for (int i = 0; i < rounds + 2; i++) {
        const int64_t first = p.from + static_cast<int64_t>(i) * BLOCK;
        Round& round = shared.rounds[i % 3];
        if (warp == 0 && i >= 1 && i <= rounds)
            merge_round(p, row, first - BLOCK, least(first, window_end), fast, state,
                        shared.boundaries[(i - 1) % 2], shared.rounds[(i - 1) % 3]);
        if (warp == 1 && i < rounds) {
            if (lane == 0) round.boundaries = 0;
            __syncwarp();
            search<T>(p, row, first, fast, round, shared.boundaries[i % 2]);
        }
        if (warp == 2 && i >= 2) {
            const int64_t to = least(first - BLOCK, window_end);
            const int64_t from = first - 2 * BLOCK;
            if (capacity > 32 || p.log) publish_any<T>(p, row, from, to, shared.rounds[(i - 2) % 3], state);
            else publish<T>(p, row, from, to, shared.rounds[(i - 2) % 3], state);
        }
        __syncthreads();
        while (i < rounds) {
            // Not kept over the fast part of the round.
            const int64_t from = p.from + static_cast<int64_t>(opaque(i)) * BLOCK;
            if (shared.state.find.done >= least(from + BLOCK, window_end)) break;
            slow_path<T>(p, row, from, shared.rounds[i % 3]);
            if (warp == 1) search<T>(p, row, from, fast, shared.rounds[i % 3], shared.boundaries[i % 2]);
            __syncthreads();
        }
    }

    if (window_end < row.len) {
#pragma unroll 1
        for (int i = thread; i < WORDS; i += SEGMENT_THREADS) saved()[i] = words[i];
        return;
    }

    // The row's end: R itself, and what the slots hold.
    bring<T>(p, row, row.len);
    const float log = shared.state.find.log;
    if (log != 0) {
        const float factor = expf(log);
        float* const open = open_of(p, row);
#pragma unroll 1
        for (int i = thread; i < dk * dv; i += SEGMENT_THREADS) open[i] *= factor;
    }
    const int held = state.merged;
    if (thread == 0) p.len[row.index()] = held;
    if (thread < capacity) {
        uint32_t drift = 0, tokens = 0;
        if (thread < held) {
            drift = state.slots[0][thread], tokens = state.slots[1][thread];
            if (fast) {
                const bool newest = thread == held - 1;
                drift = (newest ? state.find.drift : state.slots[0][thread + 1]) - drift;
                tokens = (newest ? state.find.tokens : state.slots[1][thread + 1]) - tokens;
            }
        }
        p.tokens[row.index() * capacity + thread] = tokens;
        p.summed_drift[row.index() * capacity + thread] = drift;
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: segment_gram bf16 108 / 113 / 149 /
// 151, f16 132 / 136 / 123 / 125, f32 140 / 148 / 140 / 142; segment at most 72 everywhere, which is what BLOCKS_OF
// asks: it is to stand beside other blocks, and at 64 it spills.
#define KERNELS(suffix, T)                                                                                      \
    KERNEL BLOCK_OF(dla::SEGMENT_THREADS) segment_gram_##suffix(const __grid_constant__ dla::SegmentParams p) { \
        dla::segment_gram<dla::T>(p);                                                                           \
    }                                                                                                           \
    KERNEL BLOCKS_OF(dla::SEGMENT_THREADS, 7) segment_##suffix(const __grid_constant__ dla::SegmentParams p) {  \
        dla::segment<dla::T>(p);                                                                                \
    }
KERNELS(bf16, Bf16)
KERNELS(f16, F16)
KERNELS(f32, F32)
