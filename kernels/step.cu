// step: a few tokens of every batch row, in place, on the entries that the rows name (OPERATOR.md, section 5).
//
// Slots stand still; what moves is their order. Of the slots held, most are only read: a slot's decay is a factor e^log
// beside it, and under the delta rule, whose transition is the same for every slot, a slot may lack that of the last
// tokens (its `pending` ones). With A_j = I - beta_j k_j k_j^T and y_j = A_t .. A_(j+1) beta_j k_j, by then
//   A_t .. A_(s+1) S = S - sum over j > s of y_j (k_j^T S),   so   q^T A_t .. A_(s+1) S = (q - sum_j (q . y_j) k_j)^T S:
// the slot is read by another query, and is brought up to date when it is written: where it merges, is extended, or
// has lacked STEP_RING tokens. Those turns are spread over the places. y_t v_t^T is what a token's write has become.
//
// A block has one batch row, value head and slice of dv. Every block decides the events by itself, from all of R and in
// one order of summation, so that those of a head agree bit for bit. None writes what another may still read: the slot
// that holds R is never written where it stands, and the record is written by the block that arrives last.
//
// States are f32, or bf16 with 8 bits more in a second plane: reads take the first plane alone, 2 bytes an element.
//
// Where blocks are many, warp 0 decides first; then the block reads the slots that are not written, a thread eight columns of
// every so many rows of all of them, and o of the others is had as they are written.
//
// Where blocks are few, nothing else would fill that time, and one token's slots are read as they stand (EARLY, gated):
//   o = sum_j c_j (q^T S_j) + scale lambda (q . k_t) v_t,   c_j = scale lambda[pi(j)] e^(log_j + g),
// pi(j) being where slot j ends: what is merged is read by the same c as its other part. q^T S_j asks for no decision, c_j
// does. A warp takes slot after slot, 32 lanes being rows by groups of eight columns, and leaves q^T S_j in shared memory;
// warp 0 decides meanwhile, then takes slots too; behind one barrier comes the sum. What is read is on its way to L2 from the
// moment that the order is known (`ahead` slots of it), while R is read and its sums are made. What is written goes to places
// that nobody reads, of which there are two unless R has one of its own: so warps write between the slots that they read,
// some rows at a time, once it is decided. What is left is written behind the barrier. Which warp does what depends on the
// time it takes, what comes of it does not.
//
// A block walks its code once, and so waits for the code itself: loops are not unrolled but where that puts loads in flight.
//
// Numerics: f32, decisions in f64 as far as they are sums; e^log from an f64 sum.
// Shared memory: Shared (4.4 KB for one token) and Rows, twin of StepForm::shared_bytes (src/cuda/abi.rs). For M = 30 and dk =
// dv = 128, one token: EARLY of 32 columns 10 KB; else, of 128, 10 KB gated and 38 under the delta rule.

#include "common/ledger.cuh"

namespace dla {
namespace step {

constexpr int MOST_PLACES = MOST_SLOTS + STEP_SPARE_PLACES;
// A segment that has decayed by more is 0 in f64 too, and so has no direction.
constexpr double FORGOTTEN = -700.0;
// Tokens whose k_j^T S one look at a slot makes.
constexpr int BATCH = 4;
// Thread that asks which block of a row and head comes last: it has written nothing.
constexpr int ASKS = 32;

struct StateF32 {
    static constexpr bool REST = false;
    float value;
};
struct StateBf16 {
    static constexpr bool REST = true;
    uint16_t bits;
};

// Eight elements as a read takes them.
template <typename S>
struct Raw;
template <>
struct Raw<StateF32> {
    uint4 low, high;
};
template <>
struct Raw<StateBf16> {
    uint4 all;
};
// `ONCE`: this block has not written it.
template <bool ONCE>
DEVICE void load_raw(const StateF32* from, Raw<StateF32>& raw) {
    if constexpr (ONCE) raw.low = load_once(from), raw.high = load_once(from + 4);
    else raw.low = reinterpret_cast<const uint4*>(from)[0], raw.high = reinterpret_cast<const uint4*>(from)[1];
}
template <bool ONCE>
DEVICE void load_raw(const StateBf16* from, Raw<StateBf16>& raw) {
    if constexpr (ONCE) raw.all = load_once(from);
    else raw.all = *reinterpret_cast<const uint4*>(from);
}
DEVICE void clear(Raw<StateF32>& raw) { raw.low = raw.high = make_uint4(0, 0, 0, 0); }
DEVICE void clear(Raw<StateBf16>& raw) { raw.all = make_uint4(0, 0, 0, 0); }
DEVICE void unpack(const Raw<StateF32>& raw, float (&x)[8]) {
    x[0] = __uint_as_float(raw.low.x), x[1] = __uint_as_float(raw.low.y);
    x[2] = __uint_as_float(raw.low.z), x[3] = __uint_as_float(raw.low.w);
    x[4] = __uint_as_float(raw.high.x), x[5] = __uint_as_float(raw.high.y);
    x[6] = __uint_as_float(raw.high.z), x[7] = __uint_as_float(raw.high.w);
}
DEVICE void unpack(const Raw<StateBf16>& raw, float (&x)[8]) {
    const uint32_t pairs[4] = {raw.all.x, raw.all.y, raw.all.z, raw.all.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = low_bf16(pairs[i]), x[2 * i + 1] = high_bf16(pairs[i]);
}

// And all that is known of them.
template <typename S>
struct Words;
template <>
struct Words<StateF32> {
    Raw<StateF32> first;
};
template <>
struct Words<StateBf16> {
    Raw<StateBf16> first;
    uint2 rest;
};
DEVICE void unpack(const Words<StateF32>& words, float (&x)[8]) { unpack(words.first, x); }
DEVICE void unpack(const Words<StateBf16>& words, float (&x)[8]) {
    const uint4 raw = words.first.all;
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const uint32_t high = e % 2 ? pairs[e / 2] & 0xffff0000u : pairs[e / 2] << 16;
        const uint32_t word = e < 4 ? words.rest.x : words.rest.y;
        // Sign and magnitude as one integer: the rest is added across exponents.
        const int32_t low = static_cast<int32_t>(word << (24 - 8 * (e % 4))) >> 24;
        x[e] = __uint_as_float(high + static_cast<uint32_t>(low) * 256u);
    }
}

// States of one entry and value head.
template <typename S>
struct Bank {
    S* states;
    int8_t* rest;
    int64_t base;  // in both
    int dk, dv;

    METHOD int64_t at(int place, int row, int column) const {
        return base + (place * (dk * dv) + row * dv + column);
    }
    // All that is known of eight elements: as it lies there, and as numbers.
    METHOD void load_words(int place, int row, int column, Words<S>& words) const {
        load_raw<false>(states + at(place, row, column), words.first);
        if constexpr (S::REST) words.rest = *reinterpret_cast<const uint2*>(rest + at(place, row, column));
    }
    METHOD void load(int place, int row, int column, float (&x)[8]) const {
        Words<S> words;
        load_words(place, row, column, words);
        unpack(words, x);
    }
    METHOD void store(int place, int row, int column, const float (&x)[8]) const {
        const int64_t i = at(place, row, column);
        if constexpr (S::REST) {
            uint32_t pairs[4] = {}, more[2] = {};
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const uint32_t bits = __float_as_uint(x[e]);
                uint32_t high = (bits + 0x8000u) >> 16;
                int32_t low = (static_cast<int32_t>(bits - (high << 16)) + 128) >> 8;
                low = low > 127 ? 127 : low;
                // Infinity and NaN stay what they are.
                if ((bits & 0x7f800000u) == 0x7f800000u) high = bits >> 16 | (bits & 0x7fffffu ? 0x40u : 0u), low = 0;
                pairs[e / 2] |= high << 16 * (e % 2);
                more[e / 4] |= (static_cast<uint32_t>(low) & 0xffu) << 8 * (e % 4);
            }
            *reinterpret_cast<uint4*>(states + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            *reinterpret_cast<uint2*>(rest + i) = make_uint2(more[0], more[1]);
        } else {
            store8(reinterpret_cast<F32*>(states + i), x);
        }
    }
};

template <typename S>
DEVICE Bank<S> bank_of(const StepBank& bank, int64_t row, int capacity, int dk, int dv) {
    const int64_t first = row * (capacity + STEP_SPARE_PLACES) * (dk * dv);
    return {static_cast<S*>(bank.states), bank.rest, first, dk, dv};
}

// Which elements of a slice of states a thread has of a block, or of a warp, which has up to 256 columns: eight columns of
// every `stride`-th row. Columns first, so that lanes read what lies side by side.
struct Tiles {
    int group, across;  // its columns among those of the slice, groups of them (a power of 2)
    int first, stride;  // rows
    int column;         // of dv
    bool live;

    METHOD Tiles(int from, int to, int thread, int threads) {
        const int groups = (to - from) / 8;
        across = 1;
        while (across < groups) across *= 2;
        group = thread % across, first = thread / across;
        stride = threads / across;
        column = from + group * 8;
        live = group < groups;
    }
    METHOD Tiles(int from, int to) : Tiles(from, to, threadIdx.x, THREADS) {}
};

// Sum over the lanes of a warp that share a lane's columns, to those columns' place in shared memory. Lanes halve what they
// keep while there are more to share with.
DEVICE void sum_rows(const Tiles& tiles, float (&x)[8], float* to) {
    const int lane = lane_index();
    int by = tiles.across, kept = 8, first = 0;
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        if (by >= 32) break;
        const bool upper = lane & by;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float given = upper ? x[i] : x[i + half];
            x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(ALL, given, by);
        }
        first += upper ? half : 0;
        kept = half, by *= 2;
    }
    const bool writes = tiles.live && lane < by;
#pragma unroll 1
    for (; by < 32; by *= 2) x[0] += __shfl_xor_sync(ALL, x[0], by);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (writes && i < kept) to[first + i] = x[i];
}

// Sum over the threads that share a thread's columns, of `width` columns: rows of `scratch` [WARPS][width], one a warp.
DEVICE void to_scratch(const Tiles& tiles, float (&x)[8], float* scratch, int width) {
#pragma unroll 1
    for (int by = tiles.across; by < 32; by *= 2) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += __shfl_xor_sync(ALL, x[i], by);
    }
    // Where a warp has fewer lanes than there are groups, it has no columns of the others.
    if (tiles.live && lane_index() < tiles.across)
        store8(reinterpret_cast<F32*>(scratch + warp_index() * width + tiles.group * 8), x);
}
DEVICE float from_scratch(const float* scratch, int width, int column) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += scratch[warp * width + column];
    return sum;
}

// Slots that end in one, as a write takes them up: slots `from`..`to` of those held.
struct Sources {
    const uint8_t* place;
    const uint8_t* pending;
    const float* factor;
    int from, to;
};

// Most tokens that one of them lacks.
DEVICE int most_lacking(const Sources& sources) {
    int lacks = 0;
    for (int j = sources.from; j < sources.to; j++) lacks = lacks > sources.pending[j] ? lacks : sources.pending[j];
    return lacks;
}

// `sum` += over this thread's rows, and over the sources, factor k_j^T S, of the `rows` tokens j from `first` on, as far as
// the source lacks them. `ring`: tokens before this call. AHEAD rows are in flight.
template <int AHEAD, int TOKENS, typename S>
DEVICE void own_products(const Bank<S>& bank, const Tiles& tiles, const Sources& sources, const float* keys, int first,
                         int rows, int ring, float (&sum)[TOKENS][8]) {
    if (!tiles.live) return;
    for (int j = sources.from; j < sources.to; j++) {
        const int lacks = ring - sources.pending[j] - first, place = sources.place[j];
        const float factor = sources.factor[j];
#pragma unroll 1
        for (int r0 = tiles.first; r0 < bank.dk; r0 += tiles.stride * AHEAD) {
            Words<S> words[AHEAD] = {};
#pragma unroll
            for (int n = 0; n < AHEAD; n++) {
                const int r = r0 + n * tiles.stride;
                if (r < bank.dk) bank.load_words(place, r, tiles.column, words[n]);
            }
#pragma unroll
            for (int n = 0; n < AHEAD; n++) {
                const int r = r0 + n * tiles.stride;
                if (r >= bank.dk) break;
                float x[8];
                unpack(words[n], x);
                const float* key = keys + first * bank.dk + r;
#pragma unroll
                for (int c = 0; c < TOKENS; c++) {
                    const float k = c >= lacks && c < rows ? factor * key[c * bank.dk] : 0.0f;
#pragma unroll
                    for (int i = 0; i < 8; i++) sum[c][i] += k * x[i];
                }
            }
        }
    }
}

// In units of which rows are in flight: two have no room on sm_86 and sm_89.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int PRODUCTS_AHEAD = 1;
#else
constexpr int PRODUCTS_AHEAD = 2;
#endif

// u [rows][width] = those sums over all rows. By the block; ends with a barrier.
template <typename S>
DEVICE void products(const Bank<S>& bank, const Tiles& tiles, const Sources& sources, const float* keys, int first,
                     int rows, int ring, float* scratch, float* u, int width) {
#pragma unroll 1
    for (int batch = 0; batch < rows; batch += BATCH) {
        float sum[BATCH][8] = {};
        own_products<PRODUCTS_AHEAD * (S::REST ? 4 : 2)>(bank, tiles, sources, keys, first + batch, rows - batch, ring, sum);
#pragma unroll
        for (int c = 0; c < BATCH; c++) to_scratch(tiles, sum[c], scratch + c * WARPS * width, width);
        __syncthreads();
        for (int i = threadIdx.x; i < BATCH * width; i += THREADS) {
            const int c = i / width;
            if (batch + c < rows)
                u[(batch + c) * width + i % width] = from_scratch(scratch + c * WARPS * width, width, i % width);
        }
        __syncthreads();
    }
}

// Element i of q, k or v.
DEVICE float input(const void* x, int64_t i, int dtype) {
    if (dtype == 0) return load1(static_cast<const Bf16*>(x) + i);
    if (dtype == 1) return load1(static_cast<const F16*>(x) + i);
    return load1(static_cast<const F32*>(x) + i);
}
DEVICE void output(void* x, int64_t i, float value, int dtype) {
    if (dtype == 0) static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
    else if (dtype == 1) static_cast<uint16_t*>(x)[i] = f32_to_f16(value);
    else static_cast<float*>(x)[i] = value;
}

DEVICE float warp_dot(const float* a, const float* b, int width) {
    float sum = 0;
#pragma unroll 1
    for (int i = lane_index(); i < width; i += 32) sum += a[i] * b[i];
    return warp_sum(sum);
}

// What a block knows of its row, at the beginning of its shared memory.
template <bool DELTA, int TOKENS>
struct Shared {
    static constexpr int RING = DELTA ? STEP_RING : 0;
    static constexpr int LIST = RING + TOKENS;  // tokens whose k is at hand: those of the ring, then this call's

    StepRecord record;                        // as it was
    StepRecord next;                          // as it will be
    double gamma[TOKENS];                     // inclusive sums of g
    float g[TOKENS], beta[TOKENS];
    float tau, open_factor;                   // e^(log + Gamma of the last token) of R
    float dots[3][TOKENS][TOKENS];            // k.k, v.v, q.k, s <= t
    float reads[TOKENS][LIST];                // q_t . y_j, delta rule
    float sums[WARPS][TOKENS + 1];            // k^T R v of every token, and |R|^2
    float score[TOKENS * MOST_SLOTS];         // routed: q . K of the slots held before; given: columns of lambda
    float weight[TOKENS * MOST_SLOTS];        // routed: read weight of every slot, by slot
    float coefficient[TOKENS * MOST_SLOTS];   // of every slot held before: scale lambda e^(log + Gamma)
    float factor[MOST_SLOTS];                 // of every slot held before: e^(log + Gamma of the last token)
    float pair[TOKENS][TOKENS];               // scale lambda e^(Gamma_t - Gamma_s) (q_t . write of s)
    float after[TOKENS];                      // e^(Gamma of the last token - Gamma_s)
    uint32_t tokens[TOKENS * MOST_SLOTS];     // routed: n of every slot after token t
    // Slots before, after; whether R has a place of its own before, after; first token of the open segment, -1: it was open
    // before; place of R after; whether this block came last; length of the list; the next slot, and unit of a
    // write, that a warp takes; whether warps may write while others read; slots that are written; 2: which, by bits.
    int32_t facts[16];
    uint8_t pending[MOST_SLOTS];              // of the slots held before
    uint8_t place[TOKENS * MOST_SLOTS];       // pi_t(j)
    uint8_t old_from[MOST_SLOTS], old_to[MOST_SLOTS];  // slots that end in a slot held after
    uint8_t new_from[MOST_SLOTS], new_to[MOST_SLOTS];  // tokens that end in it
    uint8_t written[MOST_SLOTS];              // 1: it is written
    uint8_t list[MOST_SLOTS];                 // slots held before that are only read; none if EARLY
    uint8_t slot[TOKENS][TOKENS];             // slot_t(s)
    uint8_t len[TOKENS];                      // slots held after token t
};
template <bool DELTA, int T>
constexpr int SHARED_BYTES =
    (2 * 1200 + 8 * T + 4 * (3 * T + 4 * T * T + T * Shared<DELTA, T>::LIST + WARPS * (T + 1) + 64 * (4 * T + 1) + 2) + 64 +
     7 * 64 + 64 * T + T * T + T + 7) / 8 * 8;
static_assert(sizeof(Shared<false, 1>) == SHARED_BYTES<false, 1> && sizeof(Shared<true, 1>) == SHARED_BYTES<true, 1>);
static_assert(sizeof(Shared<false, 4>) == SHARED_BYTES<false, 4> && sizeof(Shared<true, 4>) == SHARED_BYTES<true, 4>);
static_assert(sizeof(Shared<false, 8>) == SHARED_BYTES<false, 8> && sizeof(Shared<true, 8>) == SHARED_BYTES<true, 8>);

// What follows it, of sizes that the call has.
template <bool DELTA, int TOKENS, bool EARLY>
struct Rows {
    static constexpr int RING = Shared<DELTA, TOKENS>::RING, LIST = Shared<DELTA, TOKENS>::LIST;

    float* q;        // [TOKENS][dk], of unit norm under qk_l2norm, as keys
    float* keys;     // [LIST][dk]
    float* v;        // [TOKENS][dv]
    float* y;        // [LIST][dk], delta rule
    float* queries;  // [TOKENS][RING + 1][dk], delta rule: by what a slot lacked before the call
    float* u;        // [LIST][width], delta rule
    float* scratch;  // [BATCH or 1][WARPS][width]; none if EARLY
    float* each;     // [capacity][width] if EARLY: q^T S of every slot

    METHOD Rows(int dk, int dv, int width, int capacity) {
        Carve carve{dynamic_shared()};
        carve.take<Shared<DELTA, TOKENS>>(1);
        q = carve.take<float>(TOKENS * dk);
        keys = carve.take<float>(LIST * dk);
        v = carve.take<float>(TOKENS * dv);
        y = carve.take<float>(DELTA ? LIST * dk : 0);
        queries = carve.take<float>(DELTA ? TOKENS * (RING + 1) * dk : 0);
        u = carve.take<float>(DELTA ? LIST * width : 0);
        scratch = carve.take<float>(EARLY ? 0 : (DELTA ? BATCH : 1) * WARPS * width);
        each = carve.take<float>(EARLY ? capacity * width : 0);
        carve.check();
    }

    METHOD float* new_key(int t, int dk) const { return keys + (RING + t) * dk; }
};
enum Fact {
    BEFORE, AFTER, APART, APART_AFTER, OPENED, OPEN_PLACE, LAST, LISTED, NEXT_SLOT, NEXT_UNIT, DECIDED, WRITES, WRITTEN
};
enum Dot { KK, VV, QK };

// Slots that are written, oldest first.
struct Written {
    uint64_t left;

    template <typename Block>
    METHOD explicit Written(const Block& sh)
        : left(static_cast<uint64_t>(static_cast<uint32_t>(sh.facts[WRITTEN + 1])) << 32 |
               static_cast<uint32_t>(sh.facts[WRITTEN])) {}
    METHOD int take() {
        const int slot = __ffsll(static_cast<long long>(left)) - 1;
        left &= left - 1;
        return slot;
    }
};

// Places that something has.
struct Places {
    uint64_t low = 0;
    uint32_t high = 0;

    METHOD bool has(int place) const {
        return place < 64 ? low >> place & 1 : high >> (place - 64) & 1;
    }
    METHOD void add(int place) {
        if (place < 64) low |= 1ull << place;
        else high |= 1u << (place - 64);
    }
    // What any lane has added.
    METHOD void share() {
        const uint32_t first = __reduce_or_sync(ALL, static_cast<uint32_t>(low));
        const uint32_t second = __reduce_or_sync(ALL, static_cast<uint32_t>(low >> 32));
        low = static_cast<uint64_t>(second) << 32 | first;
        high = __reduce_or_sync(ALL, high);
    }
    // The first that nothing has.
    METHOD int take() {
        const int place = ~low ? __ffsll(static_cast<long long>(~low)) - 1 : 64 + __ffs(~high) - 1;
        add(place);
        return place;
    }
};

// Step 2 to 4 of OPERATOR.md, section 3, for every token of the call, and what becomes of every slot. By one warp. `early`:
// gated, no slot is written where one stands, unless R has a place of its own.
template <bool DELTA, int TOKENS>
DEVICE void decide(const StepParams& p, Shared<DELTA, TOKENS>& sh, int64_t first_at, bool leads, bool early) {
    const int lane = lane_index(), count = p.tokens;
    const StepRecord& record = sh.record;
    const bool apart = sh.facts[APART] != 0, routed = !p.lambda;
    const int before = record.len;
    Ledger ledger;
    ledger.len = before;
    int at[2], of_token = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        ledger.tokens[half] = i < before ? record.tokens[i] : 0;
        ledger.drift[half] = i < before ? record.drift[i] : 0;
        at[half] = i;
    }
    double squared = 0;
    for (int warp = 0; warp < WARPS; warp++) squared += sh.sums[warp][TOKENS];
    const double held_log = before > 0 ? record.log[record.open] : 0.0;
    if (before == 0) squared = 0;
    // First token of the open segment in this call, and the newest token that is not zero; -1: before the call. All is
    // kept relative to that one: c asks no scale.
    int start = -1, newest = -1;
    double since = held_log;
#pragma unroll 1
    for (int t = 0; t < count; t++) {
        since += sh.g[t];
        if (since < FORGOTTEN) squared = 0;
        double numerator = 0;
        if constexpr (TOKENS > 1) {
#pragma unroll 1
            for (int s = start > 0 ? start : 0; s <= newest; s++)
                numerator += exp(sh.gamma[newest] - sh.gamma[s]) * sh.dots[KK][t][s] * sh.dots[VV][t][s];
        }
        if (start < 0 && squared > 0) {
            double carried = 0;
            for (int warp = 0; warp < WARPS; warp++) carried += sh.sums[warp][t];
            numerator += (TOKENS == 1 || newest < 0 ? 1.0 : exp(held_log + sh.gamma[newest])) * carried;
        }
        const double energy = static_cast<double>(sh.dots[KK][t][t]) * sh.dots[VV][t][t], norms = energy * squared;
        double cosine = norms > 0 ? numerator * rsqrt(norms) : 0.0;
        if (cosine > 1) cosine = 1;
        const float score = sqrtf(static_cast<float>(2.0 - 2.0 * cosine));
        int event;
        if (p.log) {
            event = p.log[first_at + static_cast<int64_t>(t) * p.value_heads];
        } else {
            const bool boundary = ledger.len == 0 || (p.capacity > 1 && score >= sh.tau);
            event = !boundary ? EXTEND : ledger.len < p.capacity ? OPEN : MERGE + cheapest_pair(ledger, p.mass);
        }
        apply(ledger, event, score);
        if (event >= MERGE) {
            const int merged = event - MERGE;
            if (at[0] > merged) at[0]--;
            if (at[1] > merged) at[1]--;
            if (of_token > merged) of_token--;
        }
        if (lane == t) of_token = ledger.len - 1;
        if (lane == 0) {
            sh.len[t] = ledger.len;
            if (leads) {
                p.drift[first_at + static_cast<int64_t>(t) * p.value_heads] = score;
                p.events[first_at + static_cast<int64_t>(t) * p.value_heads] = event;
            }
        }
        if (lane <= t) sh.slot[t][lane] = of_token;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sh.place[t * MOST_SLOTS + lane + 32 * half] = at[half];
            if (routed) sh.tokens[t * MOST_SLOTS + lane + 32 * half] = ledger.tokens[half];
        }
        if (event != EXTEND) {
            start = newest = t, since = 0, squared = energy;
        } else if (TOKENS > 1 && energy > 0 && t + 1 < count) {
            const double decay = exp(since);
            squared = squared * decay * decay + 2.0 * numerator * decay + energy;
            if (squared < 0) squared = 0;
            newest = t, since = 0;
        }
    }
    const int after = ledger.len, last = count - 1;
    StepRecord& next = sh.next;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        next.tokens[i] = i < after ? ledger.tokens[half] : 0;
        next.drift[i] = i < after ? ledger.drift[half] : 0;
        sh.old_from[i] = sh.old_to[i] = sh.new_from[i] = sh.new_to[i] = 0;
    }
    __syncwarp();
    // What ends where: stretches of time, so of slots and of tokens that follow one another.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int j = lane + 32 * half;
        if (j < before) {
            const uint8_t* places = sh.place + last * MOST_SLOTS;
            if (j == 0 || places[j - 1] != places[j]) sh.old_from[places[j]] = j;
            if (j == before - 1 || places[j + 1] != places[j]) sh.old_to[places[j]] = j + 1;
        }
    }
    if (lane < count) {
        const uint8_t* slots = sh.slot[last];
        if (lane == 0 || slots[lane - 1] != slots[lane]) sh.new_from[slots[lane]] = lane;
        if (lane == last || slots[lane + 1] != slots[lane]) sh.new_to[slots[lane]] = lane + 1;
    }
    __syncwarp();
    // A slot keeps the place of its oldest part, unless that is where R stands, which others may be reading.
    const bool carried = start < 0;
    const bool own = DELTA || (apart && carried), apart_writes = !DELTA && early && !apart;
    Places used;
    uint32_t fresh[2];
    int place[2], writes = 0;
    bool written[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        const bool there = i < after;
        const int from = there ? sh.old_from[i] : 0, sources = there ? sh.old_to[i] - from : 0;
        const bool tokens = there && sh.new_to[i] > sh.new_from[i];
        const bool moves = sources == 0 || (!apart && tokens && sources == 1) || (apart_writes && sources > 1);
        place[half] = sources > 0 ? record.order[from] : 0;
        written[half] = there && (tokens || sources > 1);
        if (DELTA && there && !written[half]) {
            // Its turn: the one place in STEP_RING of every token, so that none ever lacks more.
            const uint32_t turn = (record.phase + STEP_RING - place[half] % STEP_RING) % STEP_RING;
            written[half] = turn == 0 || turn + count > STEP_RING || record.pending[place[half]] + count > STEP_RING;
        }
        fresh[half] = __ballot_sync(ALL, there && moves);
        if (there && !moves) used.add(place[half]);
        if (apart_writes && i < before) used.add(record.order[i]);
    }
    if (before > 0) used.add(record.open);
    used.share();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (uint32_t left = fresh[half]; left; left &= left - 1) {
            const int taken = used.take();
            if (lane == __ffs(left) - 1) place[half] = taken;
        }
    }
    const int own_place = own ? used.take() : 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half;
        next.order[i] = i < after ? place[half] : 0;
        sh.written[i] = written[half];
        const uint32_t all = __ballot_sync(ALL, written[half]);
        writes += __popc(all);
        if (lane == 0) sh.facts[WRITTEN + half] = static_cast<int32_t>(all), sh.facts[WRITES] = writes;
    }
    __syncwarp();
    // The slots that are only read.
    int listed = 0;
#pragma unroll
    for (int half = 0; half < 2 && !early; half++) {
        const int j = lane + 32 * half;
        const bool only = j < before && !sh.written[sh.place[last * MOST_SLOTS + j]];
        const uint32_t all = __ballot_sync(ALL, only);
        if (only) sh.list[listed + __popc(all & ((1u << lane) - 1))] = j;
        listed += __popc(all);
    }
    // Factors and what was lacking, of the slots held before.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int j = lane + 32 * half;
        if (j < before) {
            const int from = record.order[j];
            sh.factor[j] = expf(static_cast<float>(record.log[from] + sh.gamma[last]));
            sh.pending[j] = DELTA ? record.pending[from] : 0;
        }
        const int i = j;
        if (i < after) {
            const int to = next.order[i];
            const bool writes = sh.written[i];
            next.log[to] = writes ? 0.0 : record.log[to] + sh.gamma[last];
            if (DELTA) next.pending[to] = writes ? 0 : record.pending[to] + count;
        }
    }
    if (lane < count) sh.after[lane] = expf(static_cast<float>(sh.gamma[last] - sh.gamma[lane]));
    if (lane == 0) {
        next.len = after;
        next.phase = record.phase + count;
        next.reserved = 0;
        if (own) next.log[own_place] = 0.0;
        sh.open_factor = before > 0 ? expf(static_cast<float>(held_log + sh.gamma[last])) : 0.0f;
        next.unused[0] = next.unused[1] = 0;
        sh.facts[BEFORE] = before, sh.facts[AFTER] = after;
        sh.facts[LISTED] = listed;
        sh.facts[APART_AFTER] = own, sh.facts[OPENED] = start;
    }
    __syncwarp();
    if (lane == 0) {
        next.open = own ? own_place : static_cast<int>(next.order[after - 1]);
        sh.facts[OPEN_PLACE] = next.open;
    }
}

// o of the slots that are only read.
template <bool DELTA, typename S, int TOKENS, int UNROLL>
DEVICE void read(const Bank<S>& bank, const Shared<DELTA, TOKENS>& sh, const Rows<DELTA, TOKENS, false>& rows,
                 const Tiles& tiles, int count, float (&o)[TOKENS][8]) {
    if (!tiles.live) return;
    const int dk = bank.dk, end = sh.facts[LISTED] * dk;
    // Rounded up: what it gives for x / dk is exact below 2^14.
    const uint32_t inverse = 0xffffffffu / static_cast<uint32_t>(dk) + 1;
    for (int x0 = tiles.first; x0 < end; x0 += tiles.stride * UNROLL) {
        Raw<S> raw[UNROLL];
#pragma unroll
        for (int n = 0; n < UNROLL; n++) {
            const int x = x0 + n * tiles.stride;
            const int listed = __umulhi(static_cast<uint32_t>(x), inverse);
            if (x < end)
                load_raw<true>(bank.states + bank.at(sh.record.order[sh.list[listed]], x - listed * dk, tiles.column), raw[n]);
            else clear(raw[n]);
        }
#pragma unroll
        for (int n = 0; n < UNROLL; n++) {
            const int x = x0 + n * tiles.stride;
            if (x >= end) break;
            // Not kept from above: registers are what bounds how much is in flight.
            const int listed = __umulhi(static_cast<uint32_t>(opaque(x)), inverse), row = x - listed * dk;
            const int slot = sh.list[listed];
            float s[8];
            unpack(raw[n], s);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                if (TOKENS > 1 && t >= count) break;
                const float* q = DELTA ? rows.queries + (t * (STEP_RING + 1) + sh.pending[slot]) * dk : rows.q + t * dk;
                const float c = sh.coefficient[t * MOST_SLOTS + slot] * q[row];
#pragma unroll
                for (int i = 0; i < 8; i++) o[t][i] += c * s[i];
            }
        }
    }
}

// The next number of a count, for a warp.
DEVICE int take(int32_t* count) {
    const int number = lane_index() == 0 ? take_number(count) : 0;
    return __shfl_sync(ALL, number, 0);
}

// Rows `begin`..`end` of a slot are written, by the threads that have `tiles`; READ: with o of its sources. `u`: of the
// lacks + count tokens from the first that a source lacks on.
template <bool READ, int TALL, bool DELTA, typename S, int TOKENS, bool EARLY>
DEVICE void write_slot(const Bank<S>& bank, const Shared<DELTA, TOKENS>& sh, const Rows<DELTA, TOKENS, EARLY>& rows,
                       const Tiles& tiles, const Sources& sources, int slot, int begin, int end, int lacks, const float* u,
                       int count, int width, float (&o)[TOKENS][8]) {
    constexpr int RING = Shared<DELTA, TOKENS>::RING;
    const int dk = bank.dk, dv = bank.dv;
    const int target = sh.next.order[slot], new_from = sh.new_from[slot], new_to = sh.new_to[slot];
    if (!tiles.live) return;
#pragma unroll 1
    for (int r0 = begin + tiles.first; r0 < end; r0 += tiles.stride * TALL) {
        float sum[TALL][8] = {};
#pragma unroll(READ ? 1 : 2)
        for (int j = sources.from; j < sources.to; j++) {
            Words<S> words[TALL] = {};
#pragma unroll
            for (int n = 0; n < TALL; n++) {
                const int r = r0 + n * tiles.stride;
                if (r < end) bank.load_words(sh.record.order[j], r, tiles.column, words[n]);
            }
            const float factor = sh.factor[j];
#pragma unroll
            for (int n = 0; n < TALL; n++) {
                const int r = r0 + n * tiles.stride;
                if (r >= end) break;
                float s[8];
                unpack(words[n], s);
#pragma unroll
                for (int c = 0; c < 8; c++) sum[n][c] += factor * s[c];
#pragma unroll
                for (int t = 0; t < (READ ? TOKENS : 0); t++) {
                    if (TOKENS > 1 && t >= count) break;
                    const float* q = DELTA ? rows.queries + (t * (RING + 1) + sh.pending[j]) * dk : rows.q + t * dk;
                    const float on = sh.coefficient[t * MOST_SLOTS + j] * q[r];
#pragma unroll
                    for (int c = 0; c < 8; c++) o[t][c] += on * s[c];
                }
            }
        }
        if constexpr (DELTA) {
            if (sources.from < sources.to) {
#pragma unroll 2
                for (int lacked = 0; lacked < lacks + count; lacked++) {
                    const float* y = rows.y + (RING - lacks + lacked) * dk;
                    float x[8];
                    load8(reinterpret_cast<const F32*>(u + lacked * width + tiles.group * 8), x);
#pragma unroll
                    for (int n = 0; n < TALL; n++) {
                        const int r = r0 + n * tiles.stride;
                        if (r >= end) break;
#pragma unroll
                        for (int c = 0; c < 8; c++) sum[n][c] -= y[r] * x[c];
                    }
                }
            }
        }
#pragma unroll 1
        for (int s = new_from; s < new_to; s++) {
            const float* write = DELTA ? rows.y + (RING + s) * dk : rows.new_key(s, dk);
            const float* v = rows.v + s * dv + tiles.column;
#pragma unroll
            for (int n = 0; n < TALL; n++) {
                const int r = r0 + n * tiles.stride;
                if (r >= end) break;
                const float k = sh.after[s] * write[r];
#pragma unroll
                for (int c = 0; c < 8; c++) sum[n][c] += k * v[c];
            }
        }
#pragma unroll
        for (int n = 0; n < TALL; n++) {
            const int r = r0 + n * tiles.stride;
            if (r >= end) break;
            bank.store(target, r, tiles.column, sum[n]);
        }
    }
}

// Gated: unit after unit of what is written to places that nobody reads, some rows of a slot a warp; false: all are taken.
template <typename S>
DEVICE bool write_apart(const Bank<S>& bank, Shared<false, 1>& sh, const Rows<false, 1, true>& rows, const Tiles& of_warp,
                        int width) {
    constexpr int TALL = S::REST ? 4 : 2;
    const int tall = of_warp.stride * TALL, parts = (bank.dk + tall - 1) / tall;
    const int unit = take(&sh.facts[NEXT_UNIT]), n = unit / parts, begin = (unit - n * parts) * tall;
    if (n >= sh.facts[WRITES]) return false;
    Written slots(sh);
    int slot = slots.take();
    for (int i = 0; i < n; i++) slot = slots.take();
    const Sources sources{sh.record.order, sh.pending, sh.factor, sh.old_from[slot], sh.old_to[slot]};
    const int end = begin + tall < bank.dk ? begin + tall : bank.dk;
    float none[1][8];
    write_slot<false, TALL>(bank, sh, rows, of_warp, sources, slot, begin, end, 0, nullptr, 1, width, none);
    return true;
}

// Gated: o of every slot held, alone, as it stands: a warp takes slot after slot, UNROLL rows of 32 lanes in flight, those of
// the next slot too. What may be written meanwhile is.
template <typename S, int UNROLL>
DEVICE void stream(const Bank<S>& bank, Shared<false, 1>& sh, const Rows<false, 1, true>& rows, int from, int to, int width) {
    const int dk = bank.dk, before = sh.record.len, lane = lane_index();
    const Tiles tiles(from, to, lane, 32);
    const int step = tiles.stride * bank.dv;
    const auto start = [&](int slot) {
        return bank.states + bank.at(sh.record.order[slot], tiles.first, tiles.column);
    };
    int slot = take(&sh.facts[NEXT_SLOT]);
    if (slot >= before) return;
    const S* here = start(slot);
    Raw<S> raw[UNROLL];
#pragma unroll
    for (int n = 0; n < UNROLL; n++) {
        if (tiles.live && tiles.first + n * tiles.stride < dk) load_raw<true>(here + n * step, raw[n]);
        else clear(raw[n]);
    }
#pragma unroll 1
    while (true) {
        if (__shfl_sync(ALL, is_published(&sh.facts[DECIDED]), 0)) write_apart(bank, sh, rows, tiles, width);
        const int next = take(&sh.facts[NEXT_SLOT]);
        const bool more = next < before;
        const S* const there = more ? start(next) : here;
        float o[8] = {};
#pragma unroll 1
        for (int base = 0; base < dk; base += tiles.stride * UNROLL) {
            const int r0 = base + tiles.first, ahead = base + tiles.stride * UNROLL;
            // What is asked for while this is summed.
            const bool same = ahead < dk;
            const int first = same ? ahead + tiles.first : more && tiles.live ? tiles.first : dk;
            const S* const from_there = same ? here + UNROLL * step : there;
            const int end = tiles.live ? dk : 0;
#pragma unroll
            for (int n = 0; n < UNROLL; n++) {
                const int r = r0 + n * tiles.stride;
                if (r < dk) {
                    float s[8];
                    unpack(raw[n], s);
                    const float c = rows.q[r];
#pragma unroll
                    for (int i = 0; i < 8; i++) o[i] += c * s[i];
                }
                if (first + n * tiles.stride < end) load_raw<true>(from_there + n * step, raw[n]);
            }
            here = from_there;
        }
        sum_rows(tiles, o, rows.each + slot * width + tiles.group * 8);
        if (!more) break;
        slot = next;
    }
}

// The slots that are written, oldest first, and o of them unless EARLY; and R. What a thread reads of a place, no other
// writes, so that a place that is freed may be taken by a later slot.
template <bool DELTA, typename S, int TOKENS, bool EARLY>
DEVICE void write(const Bank<S>& bank, const Shared<DELTA, TOKENS>& sh, const Rows<DELTA, TOKENS, EARLY>& rows,
                  const Tiles& tiles, int from, int to, int count, int width, float (&o)[TOKENS][8]) {
    constexpr int RING = Shared<DELTA, TOKENS>::RING;
    const int dk = bank.dk, dv = bank.dv;
#pragma unroll 1
    for (Written slots(sh); slots.left;) {
        const int i = slots.take();
        const Sources sources{sh.record.order, sh.pending, sh.factor, sh.old_from[i], sh.old_to[i]};
        int lacks = 0;
        if constexpr (DELTA) {
            if (sources.from < sources.to) {
                lacks = most_lacking(sources);
                products(bank, tiles, sources, rows.keys, RING - lacks, lacks + count, RING, rows.scratch, rows.u, width);
            }
        }
        // Rows at once: they share u.
        write_slot<!EARLY, DELTA && S::REST ? 4 : 2>(bank, sh, rows, tiles, sources, i, 0, dk, lacks, rows.u, count, width, o);
    }
    if (!tiles.live) return;
    // R, where it has a place of its own: what was open, unless a slot has opened.
    if (sh.facts[APART_AFTER]) {
        const int start = sh.facts[OPENED];
        const bool carried = start < 0 && sh.facts[BEFORE] > 0;
        const float factor = sh.open_factor;
        for (int r = tiles.first; r < dk; r += tiles.stride) {
            float sum[8] = {};
            if (carried) {
                bank.load(sh.record.open, r, tiles.column, sum);
#pragma unroll
                for (int c = 0; c < 8; c++) sum[c] *= factor;
            }
#pragma unroll 1
            for (int s = start < 0 ? 0 : start; s < count; s++) {
                const float k = sh.after[s] * rows.new_key(s, dk)[r];
#pragma unroll
                for (int c = 0; c < 8; c++) sum[c] += k * rows.v[s * dv + tiles.column + c];
            }
            bank.store(sh.facts[OPEN_PLACE], r, tiles.column, sum);
        }
    }
}

// Element i of q, k or v as it lies there, and its value: a value that is asked for at once would be waited for at once.
DEVICE uint32_t input_bits(const void* x, int64_t i, int dtype) {
    return dtype == 2 ? static_cast<const uint32_t*>(x)[i] : static_cast<const uint16_t*>(x)[i];
}
DEVICE float input_value(uint32_t bits, int dtype) {
    if (dtype == 2) return __uint_as_float(bits);
    return dtype == 0 ? __uint_as_float(bits << 16) : f16_to_f32(static_cast<uint16_t>(bits));
}

// The entry of a sequence.
DEVICE int entry_of(const int32_t* entries, int64_t row) { return entries ? entries[row] : static_cast<int>(row); }

template <bool DELTA, typename S, int TOKENS, int UNROLL, bool EARLY>
DEVICE void run(const StepParams& p) {
    constexpr int RING = Shared<DELTA, TOKENS>::RING;
    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const uint32_t batch_row = blockIdx.x / static_cast<uint32_t>(p.slices);
    const int slice = blockIdx.x - batch_row * p.slices;
    const int64_t b = batch_row / static_cast<uint32_t>(p.value_heads);
    const int head = batch_row - static_cast<uint32_t>(b) * p.value_heads;
    const int entry = p.entries[b];
    const int dk = p.dk, dv = p.dv, count = p.tokens;
    const int key_head = head / (p.value_heads / p.heads);
    const int from = slice * p.width, to = from + p.width < dv ? from + p.width : dv;
    const bool leads = slice == 0, routed = !p.lambda;
    static_assert(!EARLY || (TOKENS == 1 && !DELTA));
    // The record; the call's tokens. Token t is element first + t HV of a [B,T,HV] array. A thread's first load of
    // each is under way before any is waited for, the entry's number too.
    const int64_t first_token = b * p.time + p.from, first_at = first_token * p.value_heads + head;
    constexpr int RECORD = static_cast<int>(sizeof(StepRecord) / 16);
    static_assert(RECORD <= THREADS);
    const auto key_at = [&](int i) {
        const int t = TOKENS == 1 ? 0 : i / dk;
        return ((first_token + t) * p.heads + key_head) * dk + i - t * dk;
    };
    const auto value_at = [&](int i) {
        const int t = TOKENS == 1 ? 0 : i / dv;
        return (first_at + static_cast<int64_t>(t) * p.value_heads) * dv + i - t * dv;
    };
    uint4 of_record = {};
    uint32_t of_q = 0, of_k = 0, of_v = 0;
    float of_g[TOKENS], of_beta[TOKENS], tau = 0, lambda = 0;
    if (thread < count * dk) {
        of_q = input_bits(p.q, key_at(thread), p.dtype);
        of_k = input_bits(p.k, key_at(thread), p.dtype);
    }
    if (thread < count * dv) of_v = input_bits(p.v, value_at(thread), p.dtype);
    if (thread == 0) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const int64_t at = first_at + static_cast<int64_t>(t) * p.value_heads;
            of_g[t] = p.g && t < count ? p.g[at] : 0.0f;
            of_beta[t] = DELTA && t < count ? p.beta[at] : 1.0f;
        }
        tau = p.tau[head];
    }
    if (TOKENS == 1 && !routed && thread < p.capacity) lambda = p.lambda[first_at * p.lambda_columns + thread];
    if (entry < 0 || entry >= p.bank.entries) return;
    const int64_t row = static_cast<int64_t>(entry) * p.value_heads + head;
    const StepRecord* record = p.bank.records + row;
    float* const ring = DELTA ? p.bank.ring + row * (2 * STEP_RING * dk) : nullptr;
    if (thread < RECORD) of_record = reinterpret_cast<const uint4*>(record)[thread];
    auto& sh = *reinterpret_cast<Shared<DELTA, TOKENS>*>(dynamic_shared());
    const Rows<DELTA, TOKENS, EARLY> rows(dk, dv, p.width, p.capacity);
    const auto bank = bank_of<S>(p.bank, row, p.capacity, dk, dv);
    if constexpr (EARLY) {
        // States are on their way to L2 before anything else is known: every block of a row and head asks for some slots, and
        // the first for R, for which the decision waits.
        if (warp == WARPS - 1) {
            static_assert(offsetof(StepRecord, len) == 0 && offsetof(StepRecord, open) == 8);
            const uint4 head = *reinterpret_cast<const uint4*>(record);
            const int first = slice + lane * p.slices;
            int place = first < MOST_SLOTS ? record->order[first] : 0;
            const int held = static_cast<int>(head.x), end = held < p.ahead ? held : p.ahead;
            // At most what a prefetch takes.
            const int all = dk * dv * static_cast<int>(sizeof(S)), bytes = all < 1 << 19 ? all : 1 << 19;
            if (leads && lane == 0 && end > 0) prefetch_span(bank.states + bank.at(head.z, 0, 0), bytes);
#pragma unroll 1
            for (int j = first; j < end; j += 32 * p.slices) {
                if (j != first) place = record->order[j];
                prefetch_span(bank.states + bank.at(place, 0, 0), bytes);
            }
        }
    }

    if (thread < RECORD) reinterpret_cast<uint4*>(&sh.record)[thread] = of_record;
    if (thread < count * dk) {
        rows.q[thread] = input_value(of_q, p.dtype);
        rows.keys[RING * dk + thread] = input_value(of_k, p.dtype);
    }
    if (thread < count * dv) rows.v[thread] = input_value(of_v, p.dtype);
#pragma unroll 1
    for (int i = thread + THREADS; i < count * dk; i += THREADS) {
        rows.q[i] = input(p.q, key_at(i), p.dtype);
        rows.keys[RING * dk + i] = input(p.k, key_at(i), p.dtype);
    }
#pragma unroll 1
    for (int i = thread + THREADS; i < count * dv; i += THREADS) rows.v[i] = input(p.v, value_at(i), p.dtype);
    if constexpr (DELTA) {
#pragma unroll 4
        for (int i = thread; i < RING * dk; i += THREADS) {
            rows.keys[i] = ring[i];
            rows.y[i] = ring[RING * dk + i];
        }
    }
    if (thread == 0) {
        double sum = 0;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= count) break;
            sh.g[t] = p.g ? fmaxf(of_g[t], LEAST_G) : 0.0f;
            sh.gamma[t] = sum += sh.g[t];
            sh.beta[t] = of_beta[t];
        }
        sh.tau = tau;
        sh.facts[NEXT_SLOT] = sh.facts[NEXT_UNIT] = sh.facts[DECIDED] = 0;
    }
    if (!routed) {
        if constexpr (TOKENS == 1) {
            if (thread < p.capacity) sh.score[thread] = lambda;
        } else {
            for (int i = thread; i < count * p.capacity; i += THREADS) {
                const int t = i / p.capacity, column = i - t * p.capacity;
                const int64_t at = first_at + static_cast<int64_t>(t) * p.value_heads;
                sh.score[t * MOST_SLOTS + column] = p.lambda[at * p.lambda_columns + column];
            }
        }
    }
    __syncthreads();
    if (p.qk_l2norm) {
#pragma unroll 1
        for (int i = warp; i < 2 * count; i += WARPS) {
            float* x = i < count ? rows.q + i * dk : rows.new_key(i - count, dk);
            const float norm = 1.0f / sqrtf(warp_dot(x, x, dk) + L2NORM_EPS);
#pragma unroll 1
            for (int c = lane; c < dk; c += 32) x[c] *= norm;
        }
        __syncthreads();
    }
    const int before = sh.record.len;
    // R: every block reads all of it, in one order. Where it stands apart from the open slot, it has a place of its own.
    const bool apart = DELTA || (before > 0 && sh.record.open != sh.record.order[before - 1]);
    if (thread == 0) sh.facts[APART] = apart;
    {
        float sum[TOKENS + 1] = {};
        if (before > 0) {
            const Tiles whole(0, dv);
            if (whole.live) {
                constexpr int AHEAD = S::REST ? 8 : 4;
#pragma unroll 1
                for (int r0 = whole.first; r0 < dk; r0 += whole.stride * AHEAD) {
                    Raw<S> raw[AHEAD];
#pragma unroll
                    for (int n = 0; n < AHEAD; n++) {
                        const int r = r0 + n * whole.stride;
                        if (r < dk) load_raw<true>(bank.states + bank.at(sh.record.open, r, whole.column), raw[n]);
                        else clear(raw[n]);
                    }
#pragma unroll
                    for (int n = 0; n < AHEAD; n++) {
                        const int r = r0 + n * whole.stride;
                        if (r >= dk) break;
                        float x[8];
                        unpack(raw[n], x);
#pragma unroll
                        for (int i = 0; i < 8; i++) sum[TOKENS] += x[i] * x[i];
#pragma unroll
                        for (int t = 0; t < TOKENS; t++) {
                            if (TOKENS > 1 && t >= count) break;
                            float dot = 0;
#pragma unroll
                            for (int i = 0; i < 8; i++) dot += x[i] * rows.v[t * dv + whole.column + i];
                            sum[t] += rows.new_key(t, dk)[r] * dot;
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i <= TOKENS; i++) {
            const float all = warp_sum(sum[i]);
            if (lane == 0) sh.sums[warp][i] = all;
        }
    }
    // Products of the call's own tokens.
#pragma unroll 1
    for (int i = warp; i < 3 * count * count; i += WARPS) {
        const int which = i / (count * count), t = i / count % count, s = i % count;
        if (s > t) continue;
        const float* a = which == KK ? rows.new_key(t, dk) : which == VV ? rows.v + t * dv : rows.q + t * dk;
        const float* c = which == VV ? rows.v + s * dv : rows.new_key(s, dk);
        const float dot = warp_dot(a, c, which == VV ? dv : dk);
        if (lane == 0) sh.dots[which][t][s] = dot;
    }
    // What the ring's tokens, and the call's, have become by token t; q_t on them.
    if constexpr (DELTA) {
        for (int t = 0; t < count; t++) {
            const float* k = rows.new_key(t, dk);
            for (int j = warp; j <= RING + t; j += WARPS) {
                float* y = rows.y + j * dk;
                const bool own = j == RING + t;
                const float held = own ? 0.0f : sh.beta[t] * warp_dot(k, y, dk);
                for (int c = lane; c < dk; c += 32) y[c] = own ? sh.beta[t] * k[c] : y[c] - held * k[c];
                __syncwarp();
                const float on = warp_dot(rows.q + t * dk, y, dk);
                if (lane == 0) sh.reads[t][j] = on;
            }
            // The next token's turn takes up the same rows of y in the same warps.
        }
    }
    // Queries of slots that lack the call's tokens and 0, 1, .. of those before.
    const auto make_queries = [&](int first, int stride) {
        for (int i = first; i < count * dk; i += stride) {
            const int t = i / dk, c = i - t * dk;
            float x = rows.q[i];
            for (int s = 0; s <= t; s++) x -= sh.reads[t][RING + s] * rows.new_key(s, dk)[c];
            rows.queries[t * (RING + 1) * dk + c] = x;
            for (int lacks = 1; lacks <= RING; lacks++) {
                x -= sh.reads[t][RING - lacks] * rows.keys[(RING - lacks) * dk + c];
                rows.queries[(t * (RING + 1) + lacks) * dk + c] = x;
            }
        }
    };
    // q on the key sums of the slots held, four slots a warp in flight.
    const auto score = [&] {
        constexpr int AT_ONCE = 4;
        const float* const sums = p.bank.keys + row * (p.capacity + STEP_SPARE_PLACES) * dk;
#pragma unroll 1
        for (int i = warp * AT_ONCE; i < count * MOST_SLOTS; i += WARPS * AT_ONCE) {
            const int t = i / MOST_SLOTS, j = i % MOST_SLOTS;
            if (j >= before) continue;
            float on[AT_ONCE] = {};
#pragma unroll 2
            for (int c = lane; c < dk; c += 32) {
#pragma unroll
                for (int n = 0; n < AT_ONCE; n++) {
                    const int place = sh.record.order[j + n < before ? j + n : j];
                    on[n] += rows.q[t * dk + c] * sums[place * dk + c];
                }
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                const float all = warp_sum(on[n]);
                if (lane == 0 && j + n < before) sh.score[i + n] = all;
            }
        }
    };
    // Read weights, of slot s at token t where reads are given, and in sh.weight where they are routed; and what every slot
    // held before, and every token of the call, counts for in o. By the block, or by a warp.
    const auto weigh = [&](int begin, int stride) {
        const Extents order{.newest_first = p.newest_first};
        if (routed) {
#pragma unroll 1
            for (int i = begin; i < count * MOST_SLOTS; i += stride) {
                const int t = i / MOST_SLOTS, s = i % MOST_SLOTS, held = sh.len[t];
                const int64_t at = first_at + static_cast<int64_t>(t) * p.value_heads;
                const int column = column_of(order, s, held);
                float weight = 0;
                if (s < held) {
                    float score = 0;
#pragma unroll 1
                    for (int j = 0; j < before; j++)
                        if (sh.place[t * MOST_SLOTS + j] == s) score += sh.score[t * MOST_SLOTS + j];
#pragma unroll 1
                    for (int r = 0; r <= t; r++)
                        if (sh.slot[t][r] == s) score += sh.dots[QK][t][r];
                    score = score / __uint2float_rn(sh.tokens[i]) * p.slope[head] + p.bias[head];
                    if (p.logits) score += p.logits[at * p.logit_columns + column];
                    const float tail = expf(-fabsf(score)), over = 1.0f / (1.0f + tail);
                    weight = score >= 0 ? over : tail * over;
                    if (score != score) weight = score;
                }
                sh.weight[i] = weight;
                if (leads && s < p.capacity) p.weights[at * p.capacity + (s < held ? column : s)] = weight;
            }
            if constexpr (EARLY) __syncwarp();
            else __syncthreads();
        }
        const auto weight = [&](int t, int s) {
            return routed ? sh.weight[t * MOST_SLOTS + s] : sh.score[t * MOST_SLOTS + column_of(order, s, sh.len[t])];
        };
#pragma unroll 1
        for (int i = begin; i < count * MOST_SLOTS; i += stride) {
            const int t = i / MOST_SLOTS, j = i % MOST_SLOTS;
            if (j >= before) continue;
            const float decay = expf(static_cast<float>(sh.record.log[sh.record.order[j]] + sh.gamma[t]));
            sh.coefficient[i] = p.scale * weight(t, sh.place[i]) * decay;
        }
#pragma unroll 1
        for (int i = begin; i < count * count; i += stride) {
            const int t = i / count, s = i % count;
            if (s > t) continue;
            const float on = DELTA ? sh.reads[t][RING + s] : sh.dots[QK][t][s];
            const float decay = expf(static_cast<float>(sh.gamma[t] - sh.gamma[s]));
            sh.pair[t][s] = p.scale * weight(t, sh.slot[t][s]) * decay * on;
        }
    };
    // What is written is brought to L2 while the other slots are read.
    const auto prefetch_written = [&](int begin, int stride) {
#pragma unroll 1
        for (Written slots(sh); slots.left;) {
            const int i = slots.take();
#pragma unroll 1
            for (int j = sh.old_from[i]; j < sh.old_to[i]; j++) {
                const int place = sh.record.order[j];
#pragma unroll 1
                for (int r = begin; r < dk; r += stride) {
                    if constexpr (S::REST)
#pragma unroll 1
                        for (int c = from; c < to; c += 128) prefetch(bank.rest + bank.at(place, r, c));
                    if constexpr (!EARLY)
#pragma unroll 1
                        for (int c = from; c < to; c += 128 / sizeof(S)) prefetch(bank.states + bank.at(place, r, c));
                }
            }
        }
    };
    const Tiles tiles(from, to);
    float o[TOKENS][8] = {};
    // Which block comes last is asked once all has been read that others of this row and head may write, and is known later.
    uint32_t came_before = 0;
    if constexpr (EARLY) {
        if (routed) score();
        __syncthreads();
        if (thread == ASKS && p.slices > 1) came_before = arrive(p.bank.arrived + row);
        if (warp == 0) {
            decide(p, sh, first_at, leads, true);
            __syncwarp();
            // What is written goes to places that nobody reads, unless R has one of its own.
            if (!apart && lane == 0) publish(&sh.facts[DECIDED]);
            weigh(lane, 32);
            if (apart) prefetch_written(lane, 32);
        }
        stream<S, UNROLL>(bank, sh, rows, from, to, p.width);
        if (thread == ASKS) sh.facts[LAST] = came_before == static_cast<uint32_t>(p.slices) - 1;
        __syncthreads();
        // The warps that come last have the fewest slots to write.
#pragma unroll 1
        for (int c = THREADS - 1 - thread; c < to - from; c += THREADS) {
            float sum = 0;
#pragma unroll 4
            for (int j = 0; j < before; j++) sum += sh.coefficient[j] * rows.each[j * p.width + c];
            output(p.o, first_at * dv + from + c, sum + sh.pair[0][0] * rows.v[from + c], p.dtype);
        }
        if (apart) {
            write<DELTA, S, TOKENS, EARLY>(bank, sh, rows, tiles, from, to, count, p.width, o);
        } else {
            const Tiles of_warp(from, to, lane, 32);
#pragma unroll 1
            while (write_apart(bank, sh, rows, of_warp, p.width)) {}
        }
    } else {
        __syncthreads();
        if (warp == 0) decide(p, sh, first_at, leads, false);
        else if constexpr (DELTA) make_queries(thread - 32, THREADS - 32);
        if (routed) score();
        __syncthreads();
        weigh(thread, THREADS);
        if constexpr (DELTA) prefetch_written(thread, THREADS);
        __syncthreads();
        read<DELTA, S, TOKENS, UNROLL>(bank, sh, rows, tiles, count, o);
        if (thread == ASKS && p.slices > 1) came_before = arrive(p.bank.arrived + row);
        write<DELTA, S, TOKENS, EARLY>(bank, sh, rows, tiles, from, to, count, p.width, o);

        // o of the slots, and of the call's own tokens.
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (TOKENS > 1 && t >= count) break;
            if (DELTA || t > 0) __syncthreads();
            to_scratch(tiles, o[t], rows.scratch, p.width);
            __syncthreads();
#pragma unroll 1
            for (int c = thread; c < to - from; c += THREADS) {
                float sum = from_scratch(rows.scratch, p.width, c);
#pragma unroll 1
                for (int s = 0; s <= t; s++) sum += sh.pair[t][s] * rows.v[s * dv + from + c];
                output(p.o, (first_at + static_cast<int64_t>(t) * p.value_heads) * dv + from + c, sum, p.dtype);
            }
        }
        if (thread == ASKS) sh.facts[LAST] = came_before == static_cast<uint32_t>(p.slices) - 1;
        __syncthreads();
    }

    // The block that came last writes what all have read: record, ring, key sums.
    if (!sh.facts[LAST]) return;
    if (thread == ASKS && p.slices > 1) p.bank.arrived[row] = 0;
    for (int i = thread; i < static_cast<int>(sizeof(StepRecord) / 16); i += THREADS)
        reinterpret_cast<uint4*>(p.bank.records + row)[i] = reinterpret_cast<const uint4*>(&sh.next)[i];
    if constexpr (DELTA) {
        for (int i = thread; i < RING * dk; i += THREADS) {
            ring[i] = rows.keys[count * dk + i];
            ring[RING * dk + i] = rows.y[count * dk + i];
        }
    }
    float* const key_sums = p.bank.keys + row * (p.capacity + STEP_SPARE_PLACES) * dk;
#pragma unroll 1
    for (int c = thread; routed && c < dk; c += THREADS) {
#pragma unroll 1
        for (Written slots(sh); slots.left;) {
            const int i = slots.take();
            const int sources = sh.old_to[i] - sh.old_from[i];
            if (sources == 1 && sh.new_from[i] == sh.new_to[i]) continue;
            float sum = 0;
#pragma unroll 1
            for (int j = sh.old_from[i]; j < sh.old_to[i]; j++) sum += key_sums[sh.record.order[j] * dk + c];
#pragma unroll 1
            for (int s = sh.new_from[i]; s < sh.new_to[i]; s++) sum += rows.new_key(s, dk)[c];
            key_sums[sh.next.order[i] * dk + c] = sum;
        }
    }
}

// Entries -> a chronological cache.
template <bool DELTA, typename S>
DEVICE void gather(const StepCacheParams& p) {
    const int dk = p.dk, dv = p.dv, slot = blockIdx.x % (p.capacity + 1), thread = threadIdx.x;
    const int64_t out_row = blockIdx.x / (p.capacity + 1);
    const int64_t row = static_cast<int64_t>(entry_of(p.entries, out_row / p.value_heads)) * p.value_heads + out_row % p.value_heads;
    const auto bank = bank_of<S>(p.bank, row, p.capacity, dk, dv);
    const StepRecord& record = p.bank.records[row];
    const int len = record.len;
    Carve carve{dynamic_shared()};
    float* keys = carve.take<float>(STEP_RING * dk);
    float* y = carve.take<float>(STEP_RING * dk);
    float* u = carve.take<float>(STEP_RING * dv);
    float* scratch = carve.take<float>(BATCH * WARPS * dv);
    carve.check();
    // R, and what there is one of for a row.
    const bool open = slot == p.capacity, held = open ? len > 0 : slot < len;
    if (open) {
        if (thread == 0) p.len[out_row] = len;
        for (int i = thread; i < p.capacity; i += THREADS) {
            p.tokens[out_row * p.capacity + i] = i < len ? record.tokens[i] : 0;
            p.drift[out_row * p.capacity + i] = i < len ? record.drift[i] : 0;
        }
    }
    const uint8_t place = !held ? 0 : open ? static_cast<uint8_t>(record.open) : record.order[slot];
    const uint8_t lacks = DELTA && held && !open ? record.pending[place] : 0;
    const float factor = held ? expf(static_cast<float>(record.log[place])) : 0.0f, one = 1.0f;
    if (DELTA && lacks > 0) {
        const float* ring = p.bank.ring + row * (2 * STEP_RING * dk);
        for (int i = thread; i < STEP_RING * dk; i += THREADS) keys[i] = ring[i], y[i] = ring[STEP_RING * dk + i];
        __syncthreads();
    }
    float* to = open ? p.open + out_row * dk * dv : p.states + (out_row * p.capacity + slot) * (dk * dv);
    const Tiles tiles(0, dv);
    if (DELTA && lacks > 0)
        products(bank, tiles, {&place, &lacks, &one, 0, 1}, keys, STEP_RING - lacks, lacks, STEP_RING, scratch, u, dv);
    for (int r = tiles.first; tiles.live && r < dk; r += tiles.stride) {
        float x[8] = {};
        if (held) bank.load(place, r, tiles.column, x);
        for (int n = 0; n < lacks; n++) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] -= y[(STEP_RING - lacks + n) * dk + r] * u[n * dv + tiles.column + i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= factor;
        store8(reinterpret_cast<F32*>(to + r * dv + tiles.column), x);
    }
    if (p.keys && !open) {
        const float* sums = p.bank.keys + (row * (p.capacity + STEP_SPARE_PLACES) + place) * dk;
        for (int c = thread; c < dk; c += THREADS) p.keys[(out_row * p.capacity + slot) * dk + c] = held ? sums[c] : 0.0f;
    }
}

// A chronological cache -> entries. R gets a place of its own, whatever the open slot holds.
template <typename S>
DEVICE void scatter(const StepCacheParams& p) {
    const int dk = p.dk, dv = p.dv, slot = blockIdx.x % (p.capacity + 1), thread = threadIdx.x;
    const int64_t in_row = blockIdx.x / (p.capacity + 1);
    const int64_t row = static_cast<int64_t>(entry_of(p.entries, in_row / p.value_heads)) * p.value_heads + in_row % p.value_heads;
    const auto bank = bank_of<S>(p.bank, row, p.capacity, dk, dv);
    const int len = p.len[in_row];
    if (slot == p.capacity) {
        StepRecord& record = p.bank.records[row];
        if (thread == 0) {
            record.len = len;
            record.phase = record.reserved = 0;
            record.open = p.capacity;
            const int64_t sequence = in_row / p.value_heads;
            if (p.list && in_row % p.value_heads == 0) p.list[sequence] = static_cast<int32_t>(sequence);
        }
        if (thread < MOST_SLOTS) {
            const bool held = thread < len;
            record.tokens[thread] = held ? p.tokens[in_row * p.capacity + thread] : 0;
            record.drift[thread] = held ? p.drift[in_row * p.capacity + thread] : 0;
            record.order[thread] = held ? thread : 0;
        }
        if (thread < MOST_PLACES) record.log[thread] = 0.0, record.pending[thread] = 0;
    }
    if (slot >= len && slot != p.capacity) return;
    const float* states = slot == p.capacity ? p.open + in_row * dk * dv : p.states + (in_row * p.capacity + slot) * (dk * dv);
    const Tiles tiles(0, dv);
    for (int r = tiles.first; tiles.live && len > 0 && r < dk; r += tiles.stride) {
        float x[8];
        load8(reinterpret_cast<const F32*>(states + r * dv + tiles.column), x);
        bank.store(slot, r, tiles.column, x);
    }
    if (p.keys && slot < len) {
        float* sums = p.bank.keys + (row * (p.capacity + STEP_SPARE_PLACES) + slot) * dk;
        for (int c = thread; c < dk; c += THREADS) sums[c] = p.keys[(in_row * p.capacity + slot) * dk + c];
    }
}

}  // namespace step
}  // namespace dla

// Kernels by recurrence, states and most tokens of a launch: loads in flight a thread, whether all slots are read before it
// is decided what becomes of them, blocks a multiprocessor.
#define STEP(name, delta, states, tokens, unroll, early, blocks)                             \
    KERNEL BLOCKS_OF(dla::THREADS, blocks) name(const __grid_constant__ dla::StepParams p) { \
        dla::step::run<delta, dla::step::states, tokens, unroll, early>(p);                  \
    }
STEP(step_gated_bf16_1, false, StateBf16, 1, 8, false, 3)
STEP(step_gated_bf16_1_early, false, StateBf16, 1, 16, true, 1)
STEP(step_gated_bf16_4, false, StateBf16, 4, 8, false, 2)
STEP(step_gated_bf16_8, false, StateBf16, 8, 4, false, 1)
STEP(step_gated_f32_1, false, StateF32, 1, 6, false, 2)
STEP(step_gated_f32_1_early, false, StateF32, 1, 8, true, 1)
STEP(step_gated_f32_4, false, StateF32, 4, 4, false, 2)
STEP(step_gated_f32_8, false, StateF32, 8, 2, false, 1)
STEP(step_delta_bf16_1, true, StateBf16, 1, 16, false, 2)
STEP(step_delta_bf16_4, true, StateBf16, 4, 12, false, 1)
STEP(step_delta_bf16_8, true, StateBf16, 8, 4, false, 1)
STEP(step_delta_f32_1, true, StateF32, 1, 8, false, 2)
STEP(step_delta_f32_4, true, StateF32, 4, 6, false, 1)
STEP(step_delta_f32_8, true, StateF32, 8, 2, false, 1)

#define STEP_CACHE(name, ...) \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::StepCacheParams p) { dla::step::__VA_ARGS__(p); }
STEP_CACHE(step_gather_gated_bf16, gather<false, dla::step::StateBf16>)
STEP_CACHE(step_gather_gated_f32, gather<false, dla::step::StateF32>)
STEP_CACHE(step_gather_delta_bf16, gather<true, dla::step::StateBf16>)
STEP_CACHE(step_gather_delta_f32, gather<true, dla::step::StateF32>)
STEP_CACHE(step_scatter_bf16, scatter<dla::step::StateBf16>)
STEP_CACHE(step_scatter_f32, scatter<dla::step::StateF32>)
