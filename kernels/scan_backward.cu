// The adjoint of scan (OPERATOR.md, section 4, Backward), a window of chunks at a time, from the last to the first.
//
// scan_states carries the bank forward without reading: it leaves checkpoints, and for one window the bank at every
// chunk's entry. scan_backward then takes the window's chunks in reverse. With R_j = dO S_j^T, dS' the adjoint of the
// states at a chunk's end, e(j) the exit slot of j, Lambda and w as in scan.cu:
//
//   dQt = sum over j of w_j R_j             dlambda_t[pi_t(j)] += Qt_t . R_j,t
//   dV = (P . Lambda)^T dO + rows Kh_r dS'_{e(r)}       dKh_r = dS'_{e(r)} v_r
//   dS_j = e^{Gamma_C} dS'_{e(j)} + Qt^T (w_j . dO)  [- W^T H_{e(j)}]     H_i = Kd dS'_i
//   dGamma_C += e^{Gamma_C} sum over i of <dS'_i, S^_i>,  S^_i the sum of the entry slots that end in i
//   dW -= sum over i of H_i S^_i^T,  dKd -= sum over i of (W S^_i) dS'_i^T    (gated delta rule)
//
// One block of 256 threads per sequence, value head and slice of 16 value columns, as scan. What sums over value columns
// is left slice by slice, for prepare_backward to add in order: no atomics. In a chunk, first a warp takes exit slots
// (rows of dV and dKh; H, then W S^), then 16 columns of keys, for which it goes through all slots (dW and dKd; then dQt,
// dlambda and dS): there every sum over slots stays in registers. Where dk has fewer than 8 tiles of 16, several warps share a tile and
// split the slots.
//
// Banks of dS: f32 masters as scan's, tiles of 16 keys x 16 columns as products leave them: lane l holds keys l / 4 (and
// + 8) x columns 2 (l % 4), + 1 (and those + 8). In place: of the slots that merge, the first takes the exit slot's place, the
// others those of slots that open in the chunk.
//
// Numerics: q, k, v and dO in their planes, with decays and read weights on what they meet; all that is computed (P, Qt, W, Kh,
// the states, dS', H, W S^, w . dO) in two planes. In one, bf16, each is off by 1e-3, and what cancels by more: dbeta of nearly
// repeated keys, where v_t and S^T k_t all but agree, by 9e-3; dg and the route's bias of one head, sums over the sequence of
// terms of either sign, by 6e-3. Sums over slots and columns in f32, dGamma_C in f64.
//
// Shared memory: as scan's and dO; at most (bf16 delta, dk = 256, M = 64) 99,936 bytes. Registers: at the end of the
// file. Floor: 2.1 times the forward's products, 1.5 ms at S3; bf16 makes twice as many. Predicted, not measured, at S3, M = 30:
// dS in and out of L2 and the entry banks from memory, 94 MB a chunk of all rows, 8 ms; the sweeps of scan_states each about 4.

#include "common/bank.cuh"

namespace dla {
namespace {

// The states of a row and slice in a bank of all rows (abi.cuh), and where its slots lie.
DEVICE Bank bank_of(float* bank, const Extents& e, int64_t block) {
    const int width = padded(e.dk);
    return {bank + block * e.capacity * width * 16, width / 16};
}
DEVICE BankPlaces* places_of(float* bank, const Extents& e, int64_t block) {
    const int64_t blocks = e.sequences * e.value_heads * (padded(e.dv) / 16);
    return reinterpret_cast<BankPlaces*>(bank + blocks * e.capacity * padded(e.dk) * 16) + block;
}

// Of 8 x 8 blocks of a left operand, those of the right operand of its transpose, and the other way round.
template <int PARTS>
DEVICE void transpose(uint32_t (&x)[PARTS][4]) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[part][i] = transpose_8x8(x[part][i]);
}

template <int PARTS>
DEVICE void load_planes(const uint4* from, uint32_t (&x)[PARTS][4]) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const uint4 raw = from[part * 32 + lane_index()];
        x[part][0] = raw.x, x[part][1] = raw.y, x[part][2] = raw.z, x[part][3] = raw.w;
    }
}
template <int PARTS>
DEVICE void store_planes(uint4* to, const uint32_t (&x)[PARTS][4]) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        to[part * 32 + lane_index()] = make_uint4(x[part][0], x[part][1], x[part][2], x[part][3]);
}

// Columns from..from + count of prepared rows [C][width] of two planes, to columns at.. of a tile. By the block.
template <int C>
DEVICE void copy_columns(const Tile<2>& tile, int at, const uint16_t* rows, int width, int from, int count) {
    const int groups = count / 8;
    for (int i = threadIdx.x; i < 2 * C * groups; i += THREADS) {
        const int row = i / groups, column = i % groups * 8;
        *reinterpret_cast<uint4*>(tile.data + row / C * tile.plane + row % C * tile.stride + at + column) =
            *reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(row) * width + from + column);
    }
}

// Columns of Qt and of W, delta rule, that are in shared memory at once.
DEVICE int columns_at_once(int width) { return width < WARPS * 16 ? width : WARPS * 16; }

template <typename T, bool DELTA>
DEVICE void scan_states(const ScanStatesParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), capacity = e.capacity, slices = padded(dv) / 16;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int64_t block = blockIdx.x, index = block / slices;
    const int slice = block % slices * 16;
    const Row row = row_of(e, index / e.value_heads, index % e.value_heads);
    if (p.from >= row.len) return;
    const T* const k = static_cast<const T*>(p.k);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    double* const logs = carve.take<double>(MOST_SLOTS);
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const k_factor = carve.take<float>(C);  // what a key is in Kd
    uint8_t* const order = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const next = carve.take<uint8_t>(MOST_SLOTS);
    // Gated: with the keys' factors.
    constexpr int VALUES = DELTA ? PARTS : 2, MADE = DELTA ? 2 : PARTS;
    const Tile<VALUES> values = carve.tile<VALUES>(C, 16);
    const Tile<MADE> rows = carve.tile<MADE>(C, width);  // W, then Kh; gated: keys
    // Keys, delta rule; wide ones of C = 64 by turns with W.
    const bool turns = DELTA && PARTS == 1 && width > WARPS * 16;
    Tile<PARTS> keys = Tile<PARTS>::at(rows.data, C, width);
    if (DELTA && !turns) keys = carve.tile<PARTS>(C, width);
    carve.check();

    // The bank at `from`.
    const Bank bank = bank_of(p.bank, e, block);
    BankPlaces* const places = places_of(p.bank, e, block);
    const int64_t place0 = first_chunk(row, C);
    int m = p.chunk_len[(place0 + p.from / C) * e.value_heads + row.head];
    if (p.source == p.bank) {
        for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = places->order[i], logs[i] = places->logs[i];
    } else if (p.source) {
        float* const from = const_cast<float*>(p.source);
        const Bank source = bank_of(from, e, block);
        const BankPlaces* const held = places_of(from, e, block);
        for (int i = warp; i < m * bank.tiles; i += WARPS) {
            float x[8];
            source.load(held->order[i / bank.tiles], i % bank.tiles, x);
            bank.store(i / bank.tiles, i % bank.tiles, x);
        }
        for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = i, logs[i] = i < m ? held->logs[held->order[i]] : 0;
    } else {
        if (m > 0) load_initial(bank, p.initial_states + index * capacity * dk * dv, m, dk, dv, slice);
        for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = i, logs[i] = 0;
    }

    const int64_t until = p.to < row.len ? p.to : row.len;
    for (int64_t first = p.from; first < until; first += C) {
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t chunk = place_in_window(e, row, p.from, p.to, first, C) * e.value_heads + row.head;
        __syncthreads();
        if (p.entries) {
            uint4* const to = static_cast<uint4*>(p.entries) +
                              (chunk * slices + slice / 16) * capacity * bank.tiles * 2 * 32;
            for (int i = warp; i < m * bank.tiles; i += WARPS) {
                const int place = order[i / bank.tiles];
                const float factor = DELTA ? 1.0f : expf(static_cast<float>(logs[place]));
                float x[8];
                uint32_t planes[2][4];
                bank.load(place, i % bank.tiles, x);
#pragma unroll
                for (int n = 0; n < 8; n++) x[n] *= factor;
                operand<2>(x, planes);
                transpose(planes);
                store_planes(to + static_cast<int64_t>(i) * 2 * 32, planes);
            }
            if (first + C >= until) return;
        }
        if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
        for (int t = warp; t < C; t += WARPS) {
            const float kf = norm_factor(t < len ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
            if (lane == 0) k_factor[t] = kf;
        }
        replay.run(p.events, row, first, len, m);
        exits.find(replay, len, m);
        const int exit_count = replay.len[len - 1];
        const Gamma total = gamma[C - 1];
        const int64_t prepared = chunk * 2 * C * width;
        for (int t = thread; t < C; t += THREADS) k_factor[t] *= expf(minus(total, gamma[t]));
        __syncthreads();
        load_columns(values, static_cast<const T*>(p.v), row, first, len, slice, dv, DELTA ? nullptr : k_factor);
        const auto load_keys = [&] {
            for (int t = warp; t < C; t += WARPS)
                load_row(keys, t, t < len ? k + row.key_at(first + t) * dk : nullptr, dk, 1.0f);
        };
        if constexpr (DELTA) {
            const float decay = expf(value(total));
            for (int from = 0; from < m; from += WARPS) {
                const bool mine = from + warp < m;
                if (from == 0 || turns) {
                    __syncthreads();
                    copy_planes<2, C>(rows, p.w + prepared, width);
                    if (!turns) load_keys();
                    __syncthreads();
                }
                Wide<C> held;
                if (mine) times_w<2, C>(bank, order[from + warp], rows, held);
                if (turns) {
                    __syncthreads();
                    load_keys();
                    __syncthreads();
                }
                if (mine) less_kd<PARTS, C>(bank, order[from + warp], keys, k_factor, decay, held);
            }
            __syncthreads();
            copy_planes<2, C>(rows, p.kh + prepared, width);
        } else {
            load_keys();
        }
        write_exits<C, DELTA>(bank, exits, exit_count, order, next, logs,
                                     static_cast<double>(total.high) + total.low, values, rows);
        m = exit_count;
    }
    __syncthreads();
    for (int i = thread; i < MOST_SLOTS; i += THREADS) places->order[i] = order[i], places->logs[i] = logs[i];
}

// A tile of dS between its master and states [dk][dv] of a cache.
template <typename F>
DEVICE void each_of_tile(int tile, int slice, int dk, int dv, F f) {
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int key = tile * 16 + g + n / 2 % 2 * 8, column = slice + n / 4 * 8 + c2 + n % 2;
        if (key < dk && column < dv) f(n, static_cast<int64_t>(key) * dv + column);
    }
}

// A tile of dS as the right operand dS^T.
template <int PARTS>
DEVICE void right_operand(const float (&x)[8], uint32_t (&b)[PARTS][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int from = i % 2 * 4 + i / 2 * 2;
        uint32_t planes[PARTS];
        split<PARTS>(x[from], x[from + 1], planes);
#pragma unroll
        for (int part = 0; part < PARTS; part++) b[part][i] = planes[part];
    }
}

// dS^T as a right operand -> dS as one.
template <int PARTS>
DEVICE void turn(uint32_t (&b)[PARTS][4]) {
    transpose(b);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const uint32_t x = b[part][1];
        b[part][1] = b[part][2], b[part][2] = x;
    }
}

// What the planes of a right operand S^T add up to, in the order of a tile of dS.
template <int PARTS>
DEVICE void add_planes(const uint32_t (&b)[PARTS][4], float (&sum)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int to = i % 2 * 4 + i / 2 * 2;
        float low = low_bf16(b[0][i]), high = high_bf16(b[0][i]);
        if constexpr (PARTS == 2) low += low_bf16(b[1][i]), high += high_bf16(b[1][i]);
        sum[to] += low, sum[to + 1] += high;
    }
}

DEVICE float product_of(const float (&x)[8], const float (&y)[8]) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) sum += x[n] * y[n];
    return sum;
}

// Accumulators of a [C, 16] product as left operands.
template <int PARTS>
DEVICE void left_operand(const float (&c)[2][4], float sign, uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t planes[PARTS];
        split<PARTS>(sign * c[i / 2][i % 2 * 2], sign * c[i / 2][i % 2 * 2 + 1], planes);
#pragma unroll
        for (int part = 0; part < PARTS; part++) a[part][i] = planes[part];
    }
}

// What a block keeps for itself between the parts of a chunk, in global memory: dlambda by tile of keys, and, delta rule,
// of every exit slot -H as left and as right operands and -W S^ as left operands.
template <int C, bool DELTA>
struct Scratch {
    static constexpr int BLOCKS = C / 16, HELD = 3 * 2;
    float* weights;  // [8, M, C]
    uint4* held;     // [M, C / 16, HELD, 32]

    METHOD Scratch(void* scratch, int64_t block, int capacity) {
        const int64_t bytes = capacity * (WARPS * C * 4 + (DELTA ? BLOCKS * HELD * 512 : 0));
        unsigned char* const from = static_cast<unsigned char*>(scratch) + block * bytes;
        weights = reinterpret_cast<float*>(from);
        held = reinterpret_cast<uint4*>(from + capacity * (WARPS * C * 4));
    }
    METHOD float* weights_of(int tile, int capacity, int slot) const {
        return weights + (static_cast<int64_t>(tile) * capacity + slot) * C;
    }
    // -H as a right operand, -H and -W S^ as left ones, all in two planes.
    METHOD uint4* right_h(int slot, int n) const { return held + (slot * BLOCKS + n) * HELD * 32; }
    METHOD uint4* left_h(int slot, int n) const { return right_h(slot, n) + 2 * 32; }
    METHOD uint4* left_ws(int slot, int n) const { return right_h(slot, n) + 4 * 32; }
};

// Has the compiler hold operands as they are.
template <int BLOCKS, int PARTS>
DEVICE void keep(uint32_t (&x)[BLOCKS][PARTS][4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS * PARTS * 4; i++) {
        uint32_t& held = x[i / 4 / PARTS][i / 4 % PARTS][i % 4];
        held = static_cast<uint32_t>(opaque(static_cast<int>(held)));
    }
}

// Adds a warp's [C, 16] products to rows [len][width] of partial sums, groups of warps in turn. By the block.
template <int C>
DEVICE void store_sums(const float (&sums)[C / 16][2][4], float* to, int len, int width, int tile, bool mine, int group,
                       int groups) {
    for (int turn = 0; turn < groups; turn++) {
        if (mine && group == turn) {
#pragma unroll
            for (int n = 0; n < C / 16; n++)
                each_pair(sums[n], [&](int t, int key, float x0, float x1) {
                    if (n * 16 + t >= len) return;
                    float2* const at = reinterpret_cast<float2*>(to + static_cast<int64_t>(n * 16 + t) * width + tile * 16 + key);
                    const float2 held = turn > 0 ? *at : make_float2(0, 0);
                    *at = make_float2(held.x + x0, held.y + x1);
                });
        }
        if (groups > 1) __syncthreads();
    }
}

// What all threads know of the chunk that a block is at: in shared memory, as registers are few.
struct Current {
    Row row;
    int64_t first;    // token
    int64_t chunk;    // place in the window, times HV plus the head
    int64_t partial;  // the same with the slice before it
    float decay;      // e^{Gamma_C}
    int len, m, exit_count;  // tokens, entry slots, exit slots
};
static_assert(sizeof(Current) <= 96);

template <typename T, bool DELTA>
DEVICE void scan_backward(const ScanBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BLOCKS = C / 16, PITCH = C + 2;
    constexpr int QUERY = DELTA ? 2 : PARTS;  // planes of Qt; gated, of q
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), capacity = e.capacity, slices = padded(dv) / 16;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int g = lane / 4, c2 = lane % 4 * 2;
    const int64_t block = blockIdx.x;
    const int index = static_cast<int>(block / slices), slice = static_cast<int>(block % slices) * 16;
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);
    const T* const v = static_cast<const T*>(p.v);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    Current& now = *carve.take<Current>(1);
    const Row& row = now.row;
    if (thread == 0) now.row = row_of(e, index / e.value_heads, index % e.value_heads);
    __syncthreads();
    if (p.from > 0 && p.from >= row.len) return;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const q_factor = carve.take<float>(C);  // what q is in Qt, gated
    float* const k_factor = carve.take<float>(C);  // what k is in Kd
    double* const totals = carve.take<double>(WARPS);
    uint8_t* const order = carve.take<uint8_t>(MOST_SLOTS);  // place in dS of every exit slot, oldest first
    uint8_t* const next = carve.take<uint8_t>(MOST_SLOTS);   // of every entry slot
    float* const weights = carve.take<float>(capacity * PITCH);  // lambda, later its gradient, [entry slot][token]
    // The same times what q is in Qt, gated.
    float* const reads = DELTA ? weights : carve.take<float>(capacity * PITCH);
    const Tile<PARTS> values = carve.tile<PARTS>(C, 16), d_o = carve.tile<PARTS>(C, 16);
    // One after another: P . Lambda; gated: keys, and beside them dV; queries; delta rule: Kh; keys; W; columns of Qt and W.
    unsigned char* const reused = carve.next;
    const Tile<2> pairs = carve.tile<2>(C, C);
    unsigned char* const end_of_pairs = carve.next;
    carve.next = reused;
    const Tile<PARTS> rows = carve.tile<PARTS>(C, width);
    float* const beside = DELTA ? nullptr : carve.take<float>(C * 17);
    unsigned char* const end_of_rows = carve.next;
    carve.next = reused;
    const int columns = columns_at_once(width);
    Tile<2> made, both;
    if constexpr (DELTA) {
        made = Tile<2>::at(rows.data, C, width);
        both = carve.tile<2>(C, 2 * columns);  // no smaller than `made`
    }
    const Tile<QUERY> query = Tile<QUERY>::at(rows.data, C, DELTA ? 2 * columns : width);
    if (carve.next < end_of_rows) carve.next = end_of_rows;
    if (carve.next < end_of_pairs) carve.next = end_of_pairs;
    carve.check();

    const Bank d_bank = bank_of(p.d_bank, e, block);
    BankPlaces* const kept = places_of(p.d_bank, e, block);
    const Scratch<C, DELTA> scratch(p.scratch, block, capacity);
    const int tiles = width / 16;
    // A warp's tile of keys in a pass over them, and which of the groups of warps that share tiles it is of.
    const int at_once = tiles < WARPS ? tiles : WARPS, groups = WARPS / at_once;
    const int column = warp % at_once, group = warp / at_once;
    const int64_t state = static_cast<int64_t>(dk) * dv;

    // The adjoint of the final states, or what the next window left.
    if (row.len <= p.to) {
        for (int i = warp; i < capacity * tiles; i += WARPS) {
            float x[8] = {};
            if (p.final_states)
                each_of_tile(i % tiles, slice, dk, dv, [&](int n, int64_t at) {
                    x[n] = p.final_states[(index * capacity + i / tiles) * state + at];
                });
            d_bank.store(i / tiles, i % tiles, x);
        }
        for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = i;
    } else {
        for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = kept->order[i];
    }

    if (thread == 0) now.m = p.initial_len ? p.initial_len[index] : 0;  // of a row without tokens
    const int chunks = static_cast<int>(((p.to < row.len ? p.to : row.len) - p.from + C - 1) / C);
    for (int c = chunks - 1; c >= 0; c--) {
        __syncthreads();
        if (thread == 0) {
            const int64_t first = p.from + static_cast<int64_t>(c) * C, place = place_in_window(e, row, p.from, p.to, first, C);
            now.first = first;
            now.chunk = place * e.value_heads + row.head;
            now.partial = (slice / 16 * p.places + place) * e.value_heads + row.head;
            now.len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            now.m = p.chunk_len[(first_chunk(row, C) + first / C) * e.value_heads + row.head];
        }
        __syncthreads();
        const int64_t &first = now.first, &chunk = now.chunk, &partial = now.partial;
        const int &len = now.len, &m = now.m, &exit_count = now.exit_count;
        const float& decay = now.decay;

        // The chunk's log, decays, values and dO.
        if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
        for (int t = warp; t < C; t += WARPS) {
            const bool live = t < len;
            const float qf = norm_factor(!DELTA && live ? q + row.key_at(first + t) * dk : nullptr, dk, !DELTA && p.qk_l2norm);
            const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
            if (lane == 0) q_factor[t] = qf, k_factor[t] = kf;
        }
        load_columns(values, v, row, first, len, slice, dv);
        load_columns(d_o, static_cast<const T*>(p.d_o), row, first, len, slice, dv);
        replay.run(p.events, row, first, len, m);
        exits.find(replay, len, m);
        const Gamma& total = gamma[C - 1];
        if (thread == 0) now.exit_count = replay.len[len - 1], now.decay = expf(value(total));
        for (int t = thread; t < C; t += THREADS) k_factor[t] *= expf(minus(total, gamma[t]));
        __syncthreads();

        for (int i = thread; i < m * C; i += THREADS) {
            const int j = i / C, t = i % C;
            float weight = 0;
            if (t < len) {
                const int column = column_of(e, replay.of_slot(t, j), replay.len[t]);
                weight = p.lambda[row.at(first + t) * p.lambda_columns + column];
            }
            weights[j * PITCH + t] = weight;
            if constexpr (!DELTA) reads[j * PITCH + t] = weight * (p.scale * q_factor[t] * expf(value(gamma[t])));
        }
        weigh_pairs<2>(pairs, p.p + chunk * 2 * C * C, replay, e, row, p.lambda, p.lambda_columns, first, len);
        if (thread == 0) {
            // Places of entry slots: the exit slot's own, and those in which nothing but tokens stood.
            uint64_t taken = 0;
            for (int i = 0; i < exit_count; i++)
                if (exits.entries[i].from < exits.entries[i].to) taken |= uint64_t{1} << order[i];
            for (int i = 0; i < exit_count; i++)
                for (int j = exits.entries[i].from; j < exits.entries[i].to; j++) {
                    next[j] = j == exits.entries[i].from ? order[i] : __ffsll(~taken) - 1;
                    taken |= uint64_t{1} << next[j];
                }
        }
        __syncthreads();

        // dV = (P . Lambda)^T dO, 16 tokens a warp.
        float within[2][4];
        clear(within);
        if (warp < BLOCKS) {
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                if (n < warp) continue;
                uint32_t a[2][4], b[PARTS][4];
                load_a_trans(pairs, warp * 16, n * 16, a);
                load_b_trans(d_o, 0, n * 16, b);
                multiply<2, PARTS>(within, a, b);
            }
        }
        __syncthreads();

        // dV += rows Kh dS', dKh = rows V dS'^T, exit slots a warp.
        const auto load_keys = [&] {
            for (int t = warp; t < C; t += WARPS)
                load_row(rows, t, t < len ? k + row.key_at(first + t) * dk : nullptr, dk, 1.0f);
        };
        if constexpr (DELTA) copy_planes<2, C>(made, p.kh + chunk * 2 * C * width, width);
        else load_keys();
        __syncthreads();
        float* const d_kh = p.d_kh + partial * C * width;
        // Delta rule: dV stands where dQt will.
        constexpr int V_PITCH = DELTA ? 16 : 17;
        float* const d_v = DELTA ? p.d_qt + partial * C * width : beside;
        for (int i = warp; i < exit_count; i += WARPS) {
            const int from = exits.tokens[i].from, to = exits.tokens[i].to;
            if (from == to) continue;
            float written[BLOCKS][2][4];
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) clear(written[n]);
#pragma unroll 1
            for (int tile = 0; tile < tiles; tile++) {
                float x[8];
                uint32_t b[2][4];
                d_bank.load(order[i], tile, x);
                right_operand<2>(x, b);
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    if (n * 16 >= to || n * 16 + 16 <= from) continue;
                    uint32_t a[PARTS][4];
                    float c[2][4];
                    clear(c);
                    load_a(values, n * 16, 0, a);
                    multiply<PARTS, 2>(c, a, b);
                    each_pair(c, [&](int r, int key, float x0, float x1) {
                        const int t = n * 16 + r;
                        if (t >= from && t < to)
                            *reinterpret_cast<float2*>(d_kh + static_cast<int64_t>(t) * width + tile * 16 + key) =
                                make_float2(x0, x1);
                    });
                }
                turn(b);
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    if (n * 16 >= to || n * 16 + 16 <= from) continue;
                    if constexpr (DELTA) {
                        uint32_t a[2][4];
                        load_a(made, n * 16, tile * 16, a);
                        multiply<2, 2>(written[n], a, b);
                    } else {
                        uint32_t a[PARTS][4];
                        load_a(rows, n * 16, tile * 16, a);
                        multiply<PARTS, 2>(written[n], a, b);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < BLOCKS; n++)
                each_pair(written[n], [&](int r, int column, float x0, float x1) {
                    const int t = n * 16 + r;
                    if (t < from || t >= to) return;
                    const float factor = DELTA ? 1.0f : k_factor[t];
                    d_v[t * V_PITCH + column] = factor * x0, d_v[t * V_PITCH + column + 1] = factor * x1;
                });
        }
        __syncthreads();
        if (warp < BLOCKS)
            each_pair(within, [&](int r, int column, float x0, float x1) {
                const int t = warp * 16 + r;
                if (t < len) d_v[t * V_PITCH + column] += x0, d_v[t * V_PITCH + column + 1] += x1;
            });
        __syncthreads();
        for (int i = thread; i < 2 * len; i += THREADS) {
            const int t = i % len, column = i / len * 8;
            if (slice + column >= dv) continue;
            float x[8];
#pragma unroll
            for (int n = 0; n < 8; n++) x[n] = d_v[t * V_PITCH + column + n];
            if (p.dv) store8(static_cast<T*>(p.dv) + row.at(first + t) * dv + slice + column, x);
            if (p.d_v) store8(reinterpret_cast<F32*>(p.d_v) + (chunk * C + t) * dv + slice + column, x);
        }
        __syncthreads();

        const uint4* const entries = static_cast<const uint4*>(p.entries) +
                                     (chunk * slices + slice / 16) * capacity * tiles * 2 * 32;
        double sum_of_total = 0;
        // H = Kd dS', then W S^, exit slots a warp.
        if constexpr (DELTA) {
            load_keys();
            __syncthreads();
            for (int i = warp; i < exit_count; i += WARPS) {
                if (exits.entries[i].from == exits.entries[i].to) continue;
                float h[BLOCKS][2][4];
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) clear(h[n]);
#pragma unroll 1
                for (int tile = 0; tile < tiles; tile++) {
                    float x[8];
                    uint32_t b[2][4];
                    d_bank.load(order[i], tile, x);
                    right_operand<2>(x, b);
                    turn(b);
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t a[PARTS][4];
                        load_a(rows, n * 16, tile * 16, a);
                        multiply<PARTS, 2>(h[n], a, b);
                    }
                }
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
                    for (int j = 0; j < 8; j++) h[n][j / 4][j % 4] *= k_factor[n * 16 + g + j % 4 / 2 * 8];
                    uint32_t planes[2][4];
                    left_operand<2>(h[n], -1.0f, planes);
                    store_planes(scratch.left_h(i, n), planes);
                    transpose(planes);
                    store_planes(scratch.right_h(i, n), planes);
                }
            }
            __syncthreads();
            copy_planes<2, C>(made, p.w + chunk * 2 * C * width, width);
            __syncthreads();
            for (int i = warp; i < exit_count; i += WARPS) {
                const int from = exits.entries[i].from, to = exits.entries[i].to;
                if (from == to) continue;
                float ws[BLOCKS][2][4];
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) clear(ws[n]);
#pragma unroll 1
                for (int tile = 0; tile < tiles; tile++) {
                    float sum[8] = {};
                    uint32_t s[2][4];
                    for (int j = from; j < to; j++) {
                        load_planes(entries + (static_cast<int64_t>(j) * tiles + tile) * 2 * 32, s);
                        add_planes(s, sum);
                    }
                    right_operand<2>(sum, s);
                    turn(s);
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t a[2][4];
                        load_a(made, n * 16, tile * 16, a);
                        multiply<2, 2>(ws[n], a, s);
                    }
                }
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    uint32_t planes[2][4];
                    left_operand<2>(ws[n], -1.0f, planes);
                    store_planes(scratch.left_ws(i, n), planes);
                }
            }
        } else {
            for (int t = warp; t < C; t += WARPS)
                load_row(rows, t, t < len ? q + row.key_at(first + t) * dk : nullptr, dk, 1.0f);
        }
        if constexpr (!DELTA)
            for (int t = thread; t < C; t += THREADS) q_factor[t] *= p.scale * expf(value(gamma[t]));
        __syncthreads();

        // 16 columns of keys a warp: all slots.
        for (int pass = 0; pass < tiles; pass += at_once) {
            const int tile = pass + column;
            const int from_column = DELTA ? pass * 16 : 0;  // of what is in shared memory
            if constexpr (DELTA) {
                const int count = width - from_column < columns ? width - from_column : columns;
                __syncthreads();
                copy_columns<C>(both, 0, p.qt + chunk * 2 * C * width, width, from_column, count);
                copy_columns<C>(both, columns, p.w + chunk * 2 * C * width, width, from_column, count);
                __syncthreads();
            }
            const int key = tile * 16 - from_column;
            const bool mine = tile < tiles && group < groups;
            // dW and dKd by themselves: beside dQt no registers were left for operands in two planes.
            if constexpr (DELTA) {
                float d_w[BLOCKS][2][4], d_kd[BLOCKS][2][4];
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) clear(d_w[n]), clear(d_kd[n]);
#pragma unroll 1
                for (int i = group; i < exit_count; i += groups) {
                    const int from = exits.entries[i].from, to = exits.entries[i].to;
                    if (!mine || from == to) continue;
                    float x[8], sum[8] = {};
                    d_bank.load(order[i], tile, x);
                    uint32_t right[2][4];
                    right_operand<2>(x, right);
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t a[2][4];
                        load_planes(scratch.left_ws(i, n), a);
                        multiply<2, 2>(d_kd[n], a, right);
                    }
                    for (int j = from; j < to; j++) {
                        load_planes(entries + (static_cast<int64_t>(j) * tiles + tile) * 2 * 32, right);
                        add_planes(right, sum);
                    }
                    sum_of_total += product_of(x, sum);
                    right_operand<2>(sum, right);
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t a[2][4];
                        load_planes(scratch.left_h(i, n), a);
                        multiply<2, 2>(d_w[n], a, right);
                    }
                }
                const int64_t at = partial * C * width;
                store_sums<C>(d_w, p.d_w + at, len, width, tile, mine, group, groups);
                store_sums<C>(d_kd, p.d_kd + at, len, width, tile, mine, group, groups);
            }
            float d_qt[BLOCKS][2][4];
            // Qt as left operand and as products leave R; the delta rule has no registers to hold them.
            uint32_t queries[BLOCKS][QUERY][4], own[BLOCKS][QUERY][4];
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                clear(d_qt[n]);
                if (DELTA || !mine) continue;
                load_a_trans(query, key, n * 16, queries[n]);
                load_a(query, n * 16, key, own[n]);
            }
#pragma unroll 1
            for (int i = group; i < exit_count; i += groups) {
                const int from = exits.entries[i].from, to = exits.entries[i].to;
                if (!mine || from == to) continue;
                float x[8], base[2][4], sum[8] = {};
                d_bank.load(order[i], tile, x);
#pragma unroll
                for (int n = 0; n < 8; n++) base[n / 4][n % 4] = decay * x[n];
                if constexpr (DELTA) {
                    uint32_t right[2][4];
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t a[2][4];
                        load_a_trans(both, columns + key, n * 16, a);
                        load_planes(scratch.right_h(i, n), right);
                        multiply<2, 2>(base, a, right);
                    }
                }
#pragma unroll 1
                for (int j = from; j < to; j++) {
                    uint32_t s[2][4];
                    load_planes(entries + (static_cast<int64_t>(j) * tiles + tile) * 2 * 32, s);
                    if constexpr (!DELTA) add_planes(s, sum);
                    const float* const weight = weights + j * PITCH;
                    const float* const read = reads + j * PITCH;
                    // Held as they are: unpacked, they would not fit.
                    if constexpr (!DELTA) keep(own);

                    // R: its part of dQt and of dlambda.
                    float share[2 * BLOCKS];
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        float r[2][4];
                        clear(r);
                        uint32_t left[PARTS][4];
                        load_a(d_o, n * 16, 0, left);
                        multiply<PARTS, 2>(r, left, s);
                        if constexpr (DELTA) load_a(query, n * 16, key, own[n]);
#pragma unroll
                        for (int lower = 0; lower < 2; lower++) {
                            const float w = weight[n * 16 + lower * 8 + g];
                            float sum_of_keys = 0;
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                const float r0 = r[half][2 * lower], r1 = r[half][2 * lower + 1];
#pragma unroll
                                for (int part = 0; part < QUERY; part++) {
                                    const uint32_t pair = own[n][part][2 * half + lower];
                                    sum_of_keys += low_bf16(pair) * r0 + high_bf16(pair) * r1;
                                }
                                d_qt[n][half][2 * lower] += w * r0;
                                d_qt[n][half][2 * lower + 1] += w * r1;
                            }
                            share[2 * n + lower] = sum_of_keys;
                        }
                    }
                    // Over the four lanes that hold a token's keys: each keeps the sums of a fourth of the tokens.
#pragma unroll
                    for (int by = 1; by < 4; by *= 2) {
                        const int kept_shares = 2 * BLOCKS / (2 * by);
                        const bool upper = lane & by;
#pragma unroll
                        for (int i = 0; i < kept_shares; i++) {
                            const float sent = upper ? share[i] : share[i + kept_shares];
                            const float own = upper ? share[i + kept_shares] : share[i];
                            share[i] = own + __shfl_xor_sync(ALL, sent, by);
                        }
                    }
                    float* const d_weight = scratch.weights_of(column, capacity, j);
#pragma unroll
                    for (int i = 0; i < BLOCKS / 2; i++) {
                        const int at = (lane & 1 ? BLOCKS : 0) + (lane & 2 ? BLOCKS / 2 : 0) + i;
                        float* const to_share = d_weight + at * 8 + g;
                        *to_share = pass > 0 ? *to_share + share[i] : share[i];
                    }

                    __syncwarp();  // nothing of the above is put off, for want of registers
                    // dS_j = e^{Gamma_C} dS' [- W^T H] + Qt^T (w_j . dO).
                    float c[2][4];
#pragma unroll
                    for (int n = 0; n < 8; n++) c[n / 4][n % 4] = base[n / 4][n % 4];
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        uint32_t right[PARTS][4], b[2][4];
                        load_b_trans(d_o, 0, n * 16, right);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int t = n * 16 + i % 2 * 8 + c2;
                            const float2 w = *reinterpret_cast<const float2*>(read + t);
                            float low = low_bf16(right[0][i]), high = high_bf16(right[0][i]);
                            if constexpr (PARTS == 2) low += low_bf16(right[1][i]), high += high_bf16(right[1][i]);
                            uint32_t planes[2];
                            split<2>(w.x * low, w.y * high, planes);
                            b[0][i] = planes[0], b[1][i] = planes[1];
                        }
                        if constexpr (DELTA) load_a_trans(query, key, n * 16, queries[n]);
                        multiply<QUERY, 2>(c, queries[n], b);
                    }
                    float out[8];
#pragma unroll
                    for (int n = 0; n < 8; n++) out[n] = c[n / 4][n % 4];
                    d_bank.store(next[j], tile, out);
                }
                if constexpr (!DELTA) sum_of_total += product_of(x, sum);
            }
            const int64_t at = partial * C * width;
            store_sums<C>(d_qt, p.d_qt + at, len, width, tile, mine, group, groups);
        }
#pragma unroll
        for (int by = 16; by > 0; by /= 2) sum_of_total += __shfl_xor_sync(ALL, sum_of_total, by);
        if (lane == 0) totals[warp] = sum_of_total;
        __syncthreads();

        // dlambda by way of the states: over the tiles of keys, then the entry slots that stand together at a token.
        if (thread == 0) {
            double sum = 0;
            for (int w = 0; w < WARPS; w++) sum += totals[w];
            p.d_total[partial] = static_cast<double>(decay) * sum;
        }
        for (int i = thread; i < m * C; i += THREADS) {
            const int j = i / C, t = i % C;
            float sum = 0;
            for (int tile = 0; tile < at_once; tile++) sum += scratch.weights_of(tile, capacity, j)[t];
            weights[j * PITCH + t] = DELTA ? sum : q_factor[t] * sum;
        }
        __syncthreads();
        if (thread < len) {
            float* const to = p.d_weights + (partial * C + thread) * capacity;
            const int held = replay.len[thread];
            int j = 0;
            for (int slot = 0; slot < held; slot++) {
                float sum = 0;
                for (; j < m && replay.of_slot(thread, j) == slot; j++) sum += weights[j * PITCH + thread];
                to[slot] = sum;
            }
        }
        for (int i = thread; i < m; i += THREADS) order[i] = next[i];
    }

    __syncthreads();
    if (p.from > 0) {
        for (int i = thread; i < MOST_SLOTS; i += THREADS) kept->order[i] = order[i];
    } else if (p.initial_gradient) {
        for (int i = warp; i < capacity * tiles; i += WARPS) {
            const int slot = i / tiles;
            float x[8] = {};
            if (slot < now.m) d_bank.load(order[slot], i % tiles, x);
            each_of_tile(i % tiles, slice, dk, dv, [&](int n, int64_t at) {
                p.initial_gradient[(index * capacity + slot) * state + at] = x[n];
            });
        }
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: scan_backward gated bf16 204 / 233 / 254 /
// 253, f16 and f32 163 / 193 / 242 / 244, delta bf16 218 / 216 / 244 / 250, f16 and f32 141 / 145 / 226 / 232; scan_states gated
// 126 to 128 / 111 to 124 / 108 to 112 / 112 to 121, delta bf16 180 / 180 / 207 / 190, f16 and f32 125 to 133 / 114 to 119 /
// 149 / 137.
#define SCAN_BACKWARD(recurrence, dtype, T, DELTA)                                                                     \
    KERNEL BLOCK_OF(dla::THREADS) scan_states_##recurrence##_##dtype(const __grid_constant__ dla::ScanStatesParams p) { \
        dla::scan_states<dla::T, DELTA>(p);                                                                            \
    }                                                                                                                  \
    KERNEL BLOCK_OF(dla::THREADS)                                                                                      \
        scan_backward_##recurrence##_##dtype(const __grid_constant__ dla::ScanBackwardParams p) {                       \
        dla::scan_backward<dla::T, DELTA>(p);                                                                          \
    }
SCAN_BACKWARD(gated, bf16, Bf16, false)
SCAN_BACKWARD(gated, f16, F16, false)
SCAN_BACKWARD(gated, f32, F32, false)
SCAN_BACKWARD(delta, bf16, Bf16, true)
SCAN_BACKWARD(delta, f16, F16, true)
SCAN_BACKWARD(delta, f32, F32, true)
