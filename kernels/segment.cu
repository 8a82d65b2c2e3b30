// segment: drift, boundaries and merges of every token, from k, v and g alone (OPERATOR.md, section 4).
//
//   X_ts = D_ts (k_t . k_s)(v_t . v_s),  E_t = |k_t|^2 |v_t|^2
//   num_t = sum over the open segment's tokens s < t of X_ts  [+ e^Gamma_t k_t^T R v_t, R carried in]
//   I_t = sqrt(2 - 2 num_t / sqrt(E_t N)),  N <- e^{2 g_t} N + 2 num_t + E_t
//
// Two kernels. `segment_gram` is parallel over 32 tokens at a time and does all that is heavy: for every token
// that might start a segment it walks to the next boundary, 32 tokens ahead at most, and leaves the drift on
// the way, where the boundary is, and which boundaries follow in the same 32 tokens. `segment` is the chain
// over the tokens of a row: 4 warps, which take 64 tokens a round, a barrier a round, each a round behind the last.
//   warp 1 finds boundaries by look-up;
//   warp 3 sums drift and makes keys;
//   warp 0 merges;
//   warp 2 writes events and the slots held at every chunk's entry;
//   all four, where no boundary lies within 32 tokens, carry R (section "The slow path").
//
// Merges. A slot is known by the boundary that begins it, and that by its prefix sums of drift and of tokens;
// to merge is to drop a boundary. What boundaries and sums come does not hang on the merges, so warp 3 has
// them ready. A lane holds one slot for its life, and so is its place (SegmentParams::chunk_place); the slot's rank
// among all makes the low bits of its key. It holds the keys (cost, rank) of its slot with the next one, two and three,
// and divides for that with the next four: whatever pair goes, the keys that remain are there already, and a link of
// the chain is one redux.min, two comparisons and two selects. No lane asks another: the boundaries stand in shared
// memory in their order, and where a pair goes those before it move up. That takes M <= 32, no log of the caller's and
// sums that cannot saturate (cached drift + 8192 units a token below 2^32); what else there is takes the ledger
// of the definition, one token at a time.
//
// Grid and block: segment_gram places of chunks x HV x C / 32, 128 threads; segment 1 to 4 rows a block, 128 threads
// a row. A block of the chain keeps a block of the scan off its multiprocessor, hence several rows.
//
// R stands in global memory (the cache's own array; 64 KiB at dk = dv = 128, so in L2) as it was at its newest
// token that is not zero, with |R|^2 taken from R itself at every update and the log decay since: c asks no
// scale, and what strong decay leaves of a segment is far below f32.
//
// Numerics: k and v are exact in their planes, of f32 three, since a soft boundary's gradient takes the drift's error over its
// temperature; R and the decayed keys take two planes, of f32 three. Decisions are those of src/events.rs, bit for bit. The
// product |k| |v| must lie within 1e-19 and 1e19.
//
// Shared memory: segment_gram 36,096 bytes at dk = dv = 128 (bf16, k and v whole; else 28,928), segment 11,472 a row.
// Workspace 142 bytes a token and head, 128 of them for the walks, of which a walk of one step fills 4. Registers: at
// the end of the file.
//
// Measured on an H100 at 1.98 GHz, S3, density, a merge at every token. segment_gram 0.27 ms, 0.51 before it took rows
// whole (floor 0.09: 0.27 GB). The chain 51 ns a token with one row a block, 56 with four, before the steps of merges
// were unrolled by sixteen with little carried from one to the next; that is counted from the SASS (74 clocks within, 110
// at either end of eight steps then, 25 at the end of sixteen now) as 40 to 44, not measured. A link is bound by
// redux.min, 44 clocks until another instruction has its result; 26 to 34 follow. The slow path: 300 clocks a token or
// more.

#include "common/ledger.cuh"
#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int STARTS = 32;       // tokens of a table
constexpr int WINDOW = 64;       // tokens that the walks of a table see
constexpr int REACH = 32;        // most tokens of a walk
constexpr int PITCH = WINDOW + 2;
constexpr int BLOCK = 64;        // tokens of a round
constexpr int TILE = 16;         // tokens of a step of the slow path
constexpr int CHAIN_WARPS = SEGMENT_THREADS / 32;
constexpr int FAST_SLOTS = 32;   // most slots of the fast merges

// Planes of k and v, and of R and the decayed keys.
template <typename T> constexpr int PLANES = T::PARTS;
template <> constexpr int PLANES<F32> = 3;
template <typename T> constexpr int OPEN_PLANES = PLANES<T> > 2 ? PLANES<T> : 2;

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

// What is the same for a warp and whose lanes the compiler cannot know together: then it asks at every collective.
DEVICE uint32_t uniform(uint32_t x) { return __reduce_or_sync(ALL, x); }

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

// Warp r has rows 16 r to 16 r + 15 of the Gram matrices, and what is right of column 16 (r - 2): no walk sees more.
constexpr int GRAM_TILES = 3;
DEVICE int gram_column(int r, int i) { return (r < GRAM_TILES ? 0 : r - GRAM_TILES + 1) + i; }

// Gram matrix of a tile's rows, by warp r of the block.
template <int PARTS>
DEVICE void gram(const Tile<PARTS>& tile, int r, int width, float (&out)[GRAM_TILES][2][4]) {
    for (int step = 0; step < width; step += 16) {
        uint32_t a[PARTS][4], b[PARTS][4];
        load_a(tile, r * 16, step, a);
#pragma unroll
        for (int i = 0; i < GRAM_TILES; i++) {
            const int c = gram_column(r, i);
            if (c > r) continue;
            if (c < r) {
                load_b(tile, c * 16, step, b);
            } else {
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    b[part][0] = a[part][0], b[part][1] = a[part][2], b[part][2] = a[part][1], b[part][3] = a[part][3];
            }
            multiply<PARTS, PARTS>(out[i], a, b);
        }
    }
}

template <typename T>
DEVICE void segment_gram(const SegmentParams& p) {
    constexpr int PARTS = PLANES<T>, C = T::CHUNK, EACH = C / STARTS;
    const Extents& e = p.extents;
    const int warp = uniform(warp_index()), lane = lane_index(), thread = threadIdx.x;
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
    // [REACH][PITCH] X of t and t - 1 - d, then its sums. The operands are dead when it is first written.
    float* const x = reinterpret_cast<float*>(carve.next);
    carve.take<float>(REACH * PITCH);
    carve.check();
    carve.next = reinterpret_cast<unsigned char*>(x);

    // 1. Gram matrices, both in the same fragments; norms.
    float grams[2][GRAM_TILES][2][4];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int i = 0; i < GRAM_TILES; i++) clear(grams[which][i]);
    const auto norm = [&](int t, float kk, float vv) {
        const float scale = p.qk_l2norm ? 1.0f / sqrtf(kk + L2NORM_EPS) : 1.0f;
        factor[t] = scale;
        energy[t] = kk * scale * scale * vv;
    };
    if constexpr (PARTS == 1) {
        // All columns at once, as they are; norms are the diagonals.
        const Tile<1> keys = carve.tile<1>(WINDOW, padded(e.dk)), values = carve.tile<1>(WINDOW, padded(e.dv));
        carve.check();
        const auto copy = [&](const Tile<1>& tile, const T* from, int width, int64_t pitch) {
            constexpr int AT_ONCE = SEGMENT_THREADS / 8;
            const int t = thread / 8;
            for (int column = thread % 8 * 8; column < padded(width); column += 64) {
                const T* at = from + t * pitch + column;
                uint16_t* to = tile.data + t * tile.stride + column;
#pragma unroll
                for (int i = 0; i < WINDOW / AT_ONCE; i++, at += AT_ONCE * pitch, to += AT_ONCE * tile.stride) {
                    const bool live = t + i * AT_ONCE < len && column < width;
                    copy_async_16(to, live ? at : from, live);
                }
            }
        };
        copy(keys, k + row.key_at(first) * e.dk, e.dk, static_cast<int64_t>(e.heads) * e.dk);
        copy(values, v + row.at(first) * e.dv, e.dv, static_cast<int64_t>(e.value_heads) * e.dv);
        if (warp == 0) load_gamma(p.g, row, first, len, WINDOW, gamma);
        copies_wait();
        __syncthreads();
        gram(keys, warp, e.dk, grams[0]);
        gram(values, warp, e.dv, grams[1]);
        const int g = lane / 4;
        if (lane % 4 == g / 2) {
            const int i = warp < GRAM_TILES ? warp : GRAM_TILES - 1;
#pragma unroll
            for (int at = 0; at < GRAM_TILES; at++) {
                if (at != i) continue;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const auto& kk = grams[0][at][half];
                    const auto& vv = grams[1][at][half];
                    norm(warp * 16 + half * 8 + g, g % 2 ? kk[half * 2 + 1] : kk[half * 2],
                         g % 2 ? vv[half * 2 + 1] : vv[half * 2]);
                }
            }
        }
    } else {
        constexpr int ROWS = WINDOW * 8 / SEGMENT_THREADS;  // rows that a thread loads eight columns of
        const Tile<PARTS> tile = carve.tile<PARTS>(WINDOW, SLICE);
        carve.check();
        float norms[2][ROWS] = {};
        for (int which = 0; which < 2; which++) {
            const int width = which ? e.dv : e.dk;
            for (int column = 0; column < width; column += SLICE) {
                const int group = column + thread % 8 * 8;
                __syncthreads();
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    const int t = thread / 8 + i * (SEGMENT_THREADS / 8);
                    float values[8] = {}, sum = 0;
                    if (t < len && group < width) {
                        const T* from = which ? v + row.at(first + t) * e.dv : k + row.key_at(first + t) * e.dk;
                        load8(from + group, values);
                    }
#pragma unroll
                    for (int j = 0; j < 8; j++) sum += values[j] * values[j];
                    if (which) norms[1][i] += sum;
                    else norms[0][i] += sum;
                    put8(tile, t, thread % 8 * 8, values);
                }
                __syncthreads();
                const int rest = width - column < SLICE ? width - column : SLICE;
                if (which) gram(tile, warp, rest, grams[1]);
                else gram(tile, warp, rest, grams[0]);
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
            if (thread % 8 == 0) norm(thread / 8 + i * (SEGMENT_THREADS / 8), kk, vv);
        }
        if (warp == 0) load_gamma(p.g, row, first, len, WINDOW, gamma);
    }
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
    {
        int last[2];
        Gamma from[2];
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = warp * 16 + lane / 4 + half * 8;
            last[half] = newest[t], scale[half] = factor[t];
            from[half] = gamma[last[half] < 0 ? 0 : last[half]];
        }
#pragma unroll
        for (int i = 0; i < GRAM_TILES; i++) {
            const int column = gram_column(warp, i);
            if (column > warp) continue;
            Gamma at[4];
            float scales[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int s = column * 16 + j / 2 * 8 + lane % 4 * 2 + j % 2;
                at[j] = gamma[s], scales[j] = factor[s];
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int half = j / 2 % 2, by = j / 4 * 2 + j % 2;
                const int t = warp * 16 + lane / 4 + half * 8;
                const int s = column * 16 + j / 4 * 8 + lane % 4 * 2 + j % 2, d = t - 1 - s;
                const float kk = grams[0][i][j / 4][j % 4], vv = grams[1][i][j / 4][j % 4];
                const float value = __expf(minus(from[half], at[by])) * (kk * scale[half] * scales[by]) * vv;
                if (d >= 0 && d < REACH) x[d * PITCH + t] = s <= last[half] ? value : 0.0f;
            }
        }
    }
    __syncthreads();
    // What no token has is not read by what has one: it comes later in the sum.
    if (thread < WINDOW) {
        constexpr int AT_ONCE = 8;
        float sum = 0;
#pragma unroll 1
        for (int d = 0; d < REACH; d += AT_ONCE) {
            float terms[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) terms[i] = x[(d + i) * PITCH + thread];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) x[(d + i) * PITCH + thread] = sum += terms[i];
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
            const float score = walk.judge(x[(d - 1) * PITCH + t], energy[t], gamma[t]);
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
constexpr int OLD = 64;    // of a slot that a chunk began with
// Rank of no slot: past every pair for a round's steps, and within the list.
constexpr int NO_SLOT = FAST_SLOTS + BLOCK + 1;
static_assert(NO_SLOT + 5 < LIST);

// Of a round, from warp 3 to warp 0. Twice.
struct Boundaries {
    uint2 list[LIST];           // prefix sums of drift and tokens where slots begin: those held, then those to come
    uint4 begun[BLOCK];         // of the slot before boundary n: its sums, its keys with the next two and three
    uint32_t pair[BLOCK + 4];   // its key with the next one, as of the newest slot
};

// Of a round, for all. Four times.
struct Round {
    float drift[BLOCK];
    uint8_t events[BLOCK];  // of boundary n; of the fast merges the pair, where it is one
    uint64_t boundaries;    // tokens that are boundaries
    int held;               // slots before
    int counts[2];          // boundaries of every chunk
    uint32_t tokens;        // sum over all slots before
    struct {
        uint8_t place[FAST_SLOTS], known[FAST_SLOTS];  // of slot i: where it lies, what begins it (`publish`)
    } exits[2];                                        // of every chunk, fast merges
};

// Of a round's tokens, as segment_gram leaves it. Twice: one is on its way.
struct Ahead {
    uint32_t reach[BLOCK];
    uint8_t next[BLOCK];
};

// Where the search for boundaries stands.
struct Search {
    int64_t start;    // of the open segment; CARRIED: before the row; NO_SEGMENT
    int64_t next;     // the boundary after it, or UNKNOWN
    int64_t done;     // tokens judged
    int64_t covered;  // R holds the open segment up to here; UNKNOWN: R is not there
};
// And, from `drift` on, what warp 3 knows a round later.
struct Find : Search {
    float squared;    // |R|^2 and the log decay since R's newest token
    float log;
    uint32_t drift, tokens;    // sums over all slots
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
    Round rounds[4];
    Ahead aheads[2];
    uint32_t ranks[FAST_SLOTS];  // fast merges: which slot lies in place i
    float carried[CHAIN_WARPS][TILE];
    float sums[CHAIN_WARPS];
    Gamma gamma[32];
    float energy[TILE], factor[TILE], decay[TILE];
    float keys[TILE * (TILE + 1)];
    float values[TILE * (TILE + 1)];
};
static_assert(sizeof(Shared) == SEGMENT_SHARED_BYTES);

// A block takes as many rows as it has fours of warps. Which warp of a row's does what goes round from row to row: warps
// with the same role stand on different schedulers.
DEVICE int row_in_block() { return threadIdx.x / SEGMENT_THREADS; }
DEVICE int role_index() { return (threadIdx.x / 32 - row_in_block()) % CHAIN_WARPS; }
DEVICE int row_thread() { return role_index() * 32 + lane_index(); }
DEVICE void row_barrier() { part_barrier(1 + row_in_block(), SEGMENT_THREADS); }

DEVICE Shared& shared_of_row() { return reinterpret_cast<Shared*>(dynamic_shared())[row_in_block()]; }

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
    Shared& shared = shared_of_row();
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
    constexpr int PARTS = PLANES<T>;
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
    if constexpr (PA == 3) mma_bf16(c, a[2], b[0][0], b[0][1]);
    if constexpr (PB == 3) mma_bf16(c, a[0], b[2][0], b[2][1]);
    if constexpr (PA + PB > 4) mma_bf16(c, a[1], b[1][0], b[1][1]);
    if constexpr (PA >= 2) mma_bf16(c, a[1], b[0][0], b[0][1]);
    if constexpr (PB >= 2) mma_bf16(c, a[0], b[1][0], b[1][1]);
    mma_bf16(c, a[0], b[0][0], b[0][1]);
}

// carried[warp][t] = part of k_t^T R v_t, as (V R^T) . K: the fragments of R^T lie as R does. Warps take
// columns of dk in turn.
template <typename T>
DEVICE void carried_products(const Operand<T>& keys, const Operand<T>& values, const float* open) {
    Shared& shared = shared_of_row();
    constexpr int PARTS = PLANES<T>, HELD = OPEN_PLANES<T>;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float row_sums[2] = {0, 0};
#pragma unroll 1
    for (int column = role_index() * 8; column < dk; column += CHAIN_WARPS * 8) {
        float c[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int k = 0; k < dv; k += 16) {
            uint32_t a[PARTS][4], b[HELD][2];
            values.afresh().template rows<PARTS>(k, a);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int from = k + i * 8 + c2;
                float2 r = make_float2(0, 0);
                if (from < dv) r = *reinterpret_cast<const float2*>(open + (column + g) * dv + from);
                uint32_t planes[HELD];
                split<HELD>(r.x, r.y, planes);
#pragma unroll
                for (int part = 0; part < HELD; part++) b[part][i] = planes[part];
            }
            multiply_half<PARTS, HELD>(c, a, b);
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
        if (lane_index() % 4 == 0) shared.carried[role_index()][g + i * 8] = row_sums[i];
    }
}

// R = keep R + sum over a tile's tokens of decay_s k_s v_s^T; returns the thread's part of |R|^2.
template <typename T>
DEVICE float update_open(const Operand<T>& keys, const Operand<T>& values, float* open, float keep,
                         const float* decay) {
    constexpr int PARTS = PLANES<T>, HELD = OPEN_PLANES<T>;
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2, dk = keys.width, dv = values.width;
    float squared = 0;
#pragma unroll 1
    for (int row = role_index() * 16; row < dk; row += CHAIN_WARPS * 16) {
        uint32_t a[HELD][4];
        const Operand<T> here = keys.afresh();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = i / 2 * 8 + c2, m = row + g + i % 2 * 8;
            uint32_t planes[HELD];
            split<HELD>(decay[t] * here.one(t, m), decay[t + 1] * here.one(t + 1, m), planes);
#pragma unroll
            for (int part = 0; part < HELD; part++) a[part][i] = planes[part];
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
            multiply_half<HELD, PARTS>(c, a, b);
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
    row_barrier();
    if (lane_index() == 0) sums[role_index()] = x;
    row_barrier();
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < CHAIN_WARPS; warp++) sum += sums[warp];
    return sum;
}

// Takes the tokens of a tile into R. By the block; begins and ends with a barrier.
template <typename T>
DEVICE void cover(const SegmentParams& p, const Row& row, int64_t first, int len) {
    Shared& shared = shared_of_row();
    Find& find = shared.state.find;
    row_barrier();
    if (role_index() == 0) describe<T>(p, row, first, len);
    row_barrier();
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
        row_barrier();
    } else {
        if (row_thread() < TILE) {
            const int t = row_thread();
            shared.decay[t] =
                t <= newest ? shared.factor[t] * expf(minus(shared.gamma[newest], shared.gamma[t])) : 0.0f;
        }
        row_barrier();
        const float keep = fresh || old == 0 ? 0.0f : expf(log + value(shared.gamma[newest]));
        const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
        squared = block_sum(update_open(keys, values, open_of(p, row), keep, shared.decay), shared.sums);
        since = minus(end, shared.gamma[newest]);
    }
    if (row_thread() == 0) {
        find.squared = squared;
        find.log = since;
        find.covered = first + len;
    }
    row_barrier();
}

// Takes the open segment's tokens before `to` into R. By the block.
template <typename T>
DEVICE void bring(const SegmentParams& p, const Row& row, int64_t to) {
    Find& find = shared_of_row().state.find;
    row_barrier();
    if (row_thread() == 0 && find.covered == UNKNOWN) find.covered = find.start < 0 ? to : find.start;
    row_barrier();
#pragma unroll 1
    while (find.covered < to) {
        const int64_t first = find.covered;
        cover<T>(p, row, first, static_cast<int>(least(TILE, to - first)));
    }
}

// Judges the tokens of a tile against R, up to a boundary. By the block; begins and ends with a barrier.
template <typename T>
DEVICE void judge(const SegmentParams& p, const Row& row, int64_t first, int len, float* drift) {
    Shared& shared = shared_of_row();
    Find& find = shared.state.find;
    const int warp = role_index(), lane = lane_index();
    const Operand<T> keys = keys_at<T>(p, row, first, len), values = values_at<T>(p, row, first, len);
    row_barrier();
    const float squared = find.squared, log = find.log;
    if (warp == 0) small_gram(keys, shared.keys);
    if (warp == 2) small_gram(values, shared.values);
    if (warp == 1) describe<T>(p, row, first, len);
    if (squared > 0) carried_products(keys, values, open_of(p, row));
    row_barrier();
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
    row_barrier();
}

// Judges a tile of the round's tokens by R from find.done on, fewer tokens where a boundary comes. R is brought
// there first; what is judged it takes next time.
template <typename T>
DEVICE void slow_path(const SegmentParams& p, const Row& row, int64_t first, Round& round) {
    Shared& shared = shared_of_row();
    Find& find = shared.state.find;
    bring<T>(p, row, find.done);
    const int64_t from = find.done;
    const int64_t end = least(first + BLOCK, shared.window_end);
    judge<T>(p, row, from, static_cast<int>(least(TILE, end - from)), round.drift + (from - first));
}

// ---- Warp 1: boundaries ----

// Starts to fetch what the round that begins at `first` looks up.
template <typename T>
DEVICE void fetch(const SegmentParams& p, const Row& row, int64_t first, Ahead& ahead) {
    const auto tables = tables_of<T>(row);
    const int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t from = first + half * STARTS;
        if (from >= row.len) break;
        const int64_t at = tables.of(from);
        if (lane < 8) copy_async_16(ahead.reach + half * STARTS + lane * 4, p.reach + at + lane * 4, true);
        else if (lane < 10) copy_async_16(ahead.next + half * STARTS + (lane - 8) * 16, p.next + at + (lane - 8) * 16, true);
    }
}

// Looks up what it can of the round's tokens from find.done on.
template <typename T>
DEVICE void look_up(const SegmentParams& p, const Row& row, int64_t first, const Ahead& ahead, Round& round) {
    Shared& shared = shared_of_row();
    Find& find = shared.state.find;
    const int64_t end = least(first + BLOCK, shared.window_end);
    const auto tables = tables_of<T>(row);
    const int lane = lane_index();
    int nexts[2] = {0, 0};
    uint32_t reaches[2] = {0, 0};
    uint64_t boundaries = round.boundaries;
    Search now = find;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = half * STARTS + lane;
        if (first + i < end) nexts[half] = ahead.next[i], reaches[half] = ahead.reach[i];
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
        if (t >= now.done && t < stop) {
            float* const drift = round.drift + (t - first);
            if (start < 0) *drift = sqrtf(2.0f);
            else copy_async_4(drift, p.walks + tables.walk(start, t));
        }
        boundaries |= static_cast<uint64_t>(mask) << half * STARTS;
        now.done = most(now.done, stop);
    }
    if (lane == 0) {
        find.start = now.start, find.next = now.next, find.done = now.done, find.covered = now.covered;
        round.boundaries = boundaries;
    }
    copies_wait();
    __syncwarp();
}

// ---- Warp 3: sums and keys ----

// Key of merging what begins at a and ends at b, index left out; in two halves, for the loop of merges.
template <bool MASS>
struct Cost {
    float drift = 0, tokens = 1, approximate = 1;
    METHOD void start(uint2 a, uint2 b) {
        drift = __uint2float_rn(b.x - a.x);
        if constexpr (!MASS) {
            tokens = __uint2float_rn(b.y - a.y);
            approximate = approximate_reciprocal(tokens);
        }
    }
    // All of its bits. `nothing` is 0: what comes of it comes after it.
    METHOD uint32_t bits(uint32_t nothing = 0) const {
        if constexpr (MASS) return __float_as_uint(drift);
        else return __float_as_uint(quotient(drift, tokens, __uint_as_float(__float_as_uint(approximate) | nothing)));
    }
};
template <bool MASS>
DEVICE uint32_t key_of(uint2 a, uint2 b) {
    Cost<MASS> cost;
    cost.start(a, b);
    return cost.bits() & ~63u;
}

// Drift, its sums, and the keys ahead of a round whose tokens are judged.
template <int C>
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
            const uint32_t index = capacity - 1;
            const auto key = [&](int ahead) {
                return p.mass ? key_of<true>(from, at[ahead]) : key_of<false>(from, at[ahead]);
            };
            out.begun[n] = make_uint4(from.x, from.y, key(2), key(3));
            out.pair[n] = key(1) | index;
        }
    }
    if (lane == 0) {
        round.held = held;
#pragma unroll
        for (int chunk = 0; chunk < BLOCK / C; chunk++) {
            const uint64_t here = boundaries >> chunk * C;
            round.counts[chunk] = C < 64 ? __popc(static_cast<uint32_t>(here)) : __popcll(here);
        }
        round.tokens = tokens;
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

// Merges at `steps` boundaries, the list full: `list` holds `capacity` slots and then the boundaries, `begun` and
// `pair` begin with the newest slot. A lane holds what lies in a place, `rank` says which slot that is. The list moves
// up as slots go: after n steps slot j stands at n + j.
//
// At step i, with j the pair that goes, the keys of slots j - 1 and j to the next become those to the next but one,
// and the new slot takes the lane of slot j + 1. All else waits until the next pair is being found: keys to two ahead
// follow a step later and those to three ahead two, from a division that begins when the list has moved.
template <bool MASS>
DEVICE void merge_steps(const uint2* list, const uint4* begun, const uint32_t* pair, int capacity, int steps,
                        uint32_t zero, uint8_t* events, uint32_t& rank) {
    int left = uniform(steps);
    const uint32_t last = capacity - 1;
    const bool holds = rank <= last;
    uint32_t base = shared_address(list), begins = shared_address(begun), pairs = shared_address(pair);
    uint2 own = list[rank];
    uint32_t k = key_of<MASS>(own, list[rank + 2]) | rank;
    uint32_t r = key_of<MASS>(own, list[rank + 3]), q = key_of<MASS>(own, list[rank + 4]);
    if (rank >= last) k = NONE;
    uint32_t x = shared_uint(pairs);
    uint2 to = shared_uint2(base + rank * 8 + 40);
    Cost<MASS> cost;
    // How far the pair that went lies past the lane's slot, and the one before; more than MOST_SLOTS: before it.
    uint32_t below = rank == last ? NONE : holds ? 32 : NONE - 1, earlier = 32;
    const auto step = [&] {
        const uint32_t best = __reduce_min_sync(ALL, k);
        // While it comes.
        const bool above = below >= MOST_SLOTS, freed = below == NONE;
        if (earlier <= 3) q = cost.bits(k & zero);
        move_if(below <= 2, r, q);
        cost.start(own, to);
        decrement_if(above, rank);
        move_if(freed, rank, last);
        const uint32_t at = base + rank * 8;
        if (!above) put_shared(at, own);
        __syncwarp();
        to = shared_uint2(at + 40);
        const uint32_t kept = (r & ~63u) | rank;
        move_if(freed, k, x);
        const uint32_t moved = k - 1;
        x = shared_uint(pairs + 4);
        shared_uint4_if(freed, begins, own.x, own.y, r, q);
        base += 8, begins += 16, pairs += 4;

        const uint32_t j = best & 63;
        earlier = below, below = j - rank;
        const uint32_t past = below == NONE ? NONE : moved, stays = below <= 1 ? kept : k;
        k = j < rank ? past : stays;
        *events++ = j;
    };
#pragma unroll 1
    for (; left >= 16; left -= 16) {
#pragma unroll
        for (int i = 0; i < 16; i++) step();
    }
#pragma unroll 1
    for (; left > 0; left--) step();
    const bool above = below >= MOST_SLOTS;
    decrement_if(above, rank);
    move_if(below == NONE, rank, last);
    if (!above) put_shared(base + rank * 8, own);
    __syncwarp();
}

// A round's boundaries. The list of the next round begins with what this one leaves.
template <int C>
DEVICE void merge_round(const SegmentParams& p, const Row& row, int64_t first, int64_t end, bool fast, State& state,
                        Boundaries& in, Boundaries& next, Round& round) {
    const int lane = lane_index(), capacity = p.extents.capacity;
    if (fast) {
        uint32_t* const ranks = shared_of_row().ranks;
        uint32_t rank = ranks[lane];
        int room = capacity - round.held;
        int gone = 0, n = 0;  // merges, boundaries
        const uint32_t tokens = round.tokens;
#pragma unroll
        for (int chunk = 0; chunk < BLOCK / C; chunk++) {
            const int count = round.counts[chunk];
            const int opens = count < room ? count : room, steps = count - opens, held = capacity - room;
            const uint32_t entered = rank;
            if (lane >= held && lane < held + opens) rank = lane;
            room -= opens, n += opens;
            const uint2* const list = in.list + gone;
            const uint32_t zero = p.mass & 2;
            if (p.mass)
                merge_steps<true>(list, in.begun + n, in.pair + n, capacity, steps, zero, round.events + n, rank);
            else
                merge_steps<false>(list, in.begun + n, in.pair + n, capacity, steps, zero, round.events + n, rank);
            gone += steps, n += steps;
            if (static_cast<int>(rank) < held + opens) {
                const uint32_t token = in.list[gone + rank].y - tokens - chunk * C;
                round.exits[chunk].place[rank] = lane;
                round.exits[chunk].known[rank] = token < C ? token : OLD | entered;
            } else {
                rank = NO_SLOT;
            }
        }
        ranks[lane] = rank;
        if (lane < capacity - room) next.list[lane] = in.list[gone + lane];
    } else {
        Ledger ledger = {{state.slots[1][lane], state.slots[1][lane + 32]},
                         {state.slots[0][lane], state.slots[0][lane + 32]},
                         state.merged};
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
        __syncwarp();
        if (lane == 0) state.merged = ledger.len;
    }
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

// One round of fast merges: slots are opened until all are held, and from then on every boundary merges. What the
// chunk leaves comes from warp 0; a slot is known by its token in the chunk or, if the chunk began with it, by its
// index then and OLD. One that neither began in the chunk nor ends where it did when the chunk began has tokens of
// the chunk; the open one has.
template <typename T>
DEVICE void publish(const SegmentParams& p, const Row& row, int64_t first, int64_t end, const Round& round, State& state) {
    constexpr int C = T::CHUNK;
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
#pragma unroll
        for (int half = 0; half < C / 32; half++) {
            const int t = half * 32 + lane, i = __popcll(boundaries & ((uint64_t(1) << t) - 1));
            uint8_t event = EXTEND;
            if (boundaries >> t & 1) event = i < opens ? OPEN : MERGE + round.events[n + i];
            if (from + t < end) p.events[row.at(from + t)] = event;
        }
        n += count;
        const int entered = held;
        held += opens;
        const bool newest = lane == held - 1;
        const uint32_t known = round.exits[chunk].known[lane];
        place = round.exits[chunk].place[lane];

        // A slot that the chunk's first token begins follows those that the chunk began with.
        const int old = __shfl_sync(ALL, item, known & 31);
        item = known & OLD ? old : static_cast<int>(from) + static_cast<int>(known);
        const uint32_t as = known == 0 ? OLD + entered : known;
        const uint32_t after = __shfl_down_sync(ALL, as, 1);
        const bool touched = lane < held && (newest || !(known & OLD) || after != known + 1);
        const uint32_t places = __reduce_or_sync(ALL, touched ? 1u << place : 0);
        log = places >> lane & 1 ? 0.0 : log + total;
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
    if (p.from > 0 || role_index() != 0) return fast;
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
    const int lane = lane_index(), warp = uniform(role_index()), thread = row_thread();
    const int rows = blockDim.x / SEGMENT_THREADS;
    if (dynamic_shared_bytes() < rows * sizeof(Shared)) trap();
    Shared& shared = shared_of_row();
    const int64_t index = static_cast<int64_t>(blockIdx.x) * rows + row_in_block();
    if (__any_sync(ALL, index >= e.sequences * e.value_heads)) return;
    {
        const Row own = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
        if (__any_sync(ALL, own.len <= p.from && p.from > 0)) return;
        if (thread == 0) {
            shared.row = own;
            shared.window_end = least(p.to, own.len);
        }
        row_barrier();
    }
    const Row& row = shared.row;
    const int64_t& window_end = shared.window_end;
    const int rounds = uniform(static_cast<int>((window_end - p.from + BLOCK - 1) / BLOCK));

    State& state = shared.state;
    constexpr int WORDS = sizeof(State) / 4;
    uint32_t* const words = reinterpret_cast<uint32_t*>(&state);
    const auto saved = [&] { return static_cast<uint32_t*>(p.state) + row.index() * WORDS; };
    const bool fast = __any_sync(ALL, begin(p, row, state));
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
    row_barrier();
    if (warp == 0 && fast) {
        shared.ranks[lane] = NO_SLOT;
        __syncwarp();
        if (lane < state.merged) {
            shared.ranks[state.places[lane]] = lane;
            shared.boundaries[0].list[lane] = make_uint2(state.slots[0][lane], state.slots[1][lane]);
        }
        __syncwarp();
    }

    if (warp == 1) fetch<T>(p, row, p.from, shared.aheads[0]);
    for (int i = 0; i < rounds + 3; i++) {
        const int64_t first = p.from + static_cast<int64_t>(i) * BLOCK;
        const auto round = [&](int back) -> Round& { return shared.rounds[(i - back) & 3]; };
        const auto begin_of = [&](int back) { return first - back * BLOCK; };
        const auto end_of = [&](int back) { return least(first + (1 - back) * BLOCK, window_end); };
        if (warp == 0 && i >= 2 && i < rounds + 2)
            merge_round<T::CHUNK>(p, row, begin_of(2), end_of(2), fast, state, shared.boundaries[i % 2],
                                  shared.boundaries[(i - 1) % 2], round(2));
        if (warp == 1 && i < rounds) {
            if (lane == 0) round(0).boundaries = 0;
            copies_wait();
            __syncwarp();
            fetch<T>(p, row, first + BLOCK, shared.aheads[(i + 1) % 2]);
            look_up<T>(p, row, first, shared.aheads[i % 2], round(0));
        }
        if (warp == 2 && i >= 3) {
            if (fast) publish<T>(p, row, begin_of(3), end_of(3), round(3), state);
            else publish_any<T>(p, row, begin_of(3), end_of(3), round(3), state);
        }
        if (warp == 3 && i >= 1 && i < rounds + 1)
            finish_round<T::CHUNK>(p, row, begin_of(1), end_of(1), fast, round(1), shared.boundaries[(i - 1) % 2],
                                   state.find);
        row_barrier();
        while (i < rounds) {
            // Not kept over the fast part of the round.
            const int now = opaque(i);
            const int64_t from = p.from + static_cast<int64_t>(now) * BLOCK;
            if (__any_sync(ALL, shared.state.find.done >= least(from + BLOCK, window_end))) break;
            slow_path<T>(p, row, from, shared.rounds[now & 3]);
            if (warp == 1) look_up<T>(p, row, from, shared.aheads[now % 2], shared.rounds[now & 3]);
            row_barrier();
        }
    }

    if (warp == 0 && fast) {
        const int held = state.find.held;
        const uint2 begins = shared.boundaries[rounds % 2].list[lane];
        if (lane < held) state.slots[0][lane] = begins.x, state.slots[1][lane] = begins.y;
        if (lane == 0) state.merged = held;
    }
    row_barrier();
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

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: segment_gram bf16 90 / 94 / 96 /
// 96, f16 131 / 135 / 148 / 149, f32 144 / 145 / 142 / 142; segment bf16 80 / 80 / 101 / 108, f16 and f32 94 / 93 /
// 114 / 123 at most.
#define KERNELS(suffix, T)                                                                                      \
    KERNEL BLOCK_OF(dla::SEGMENT_THREADS) segment_gram_##suffix(const __grid_constant__ dla::SegmentParams p) { \
        dla::segment_gram<dla::T>(p);                                                                           \
    }                                                                                                           \
    KERNEL BLOCK_OF(dla::SEGMENT_ROWS * dla::SEGMENT_THREADS)                                                   \
        segment_##suffix(const __grid_constant__ dla::SegmentParams p) {                                        \
        dla::segment<dla::T>(p);                                                                                \
    }
KERNELS(bf16, Bf16)
KERNELS(f16, F16)
KERNELS(f32, F32)
