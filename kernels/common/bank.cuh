// The slots' states of one row and slice of 16 value columns, in f32 in global memory, and what a chunk does to them
// (OPERATOR.md, section 4): the transition of the gated delta rule, and the exit, which merges and appends.
#pragma once

#include "replay.cuh"

namespace dla {

// Where the states of one row and slice lie. A tile is 16 keys x 16 columns: lane l holds, of the columns l / 4
// and l / 4 + 8, keys 2 (l % 4), + 1, and those + 8: x[0..1] (column, key), x[2..3] (column + 8, key), x[4..7] the
// same of key + 8.
struct Bank {
    float* states;  // [M][tiles][32][8]
    int tiles;      // dk / 16

    METHOD float* tile(int place, int tile) const {
        return states + ((static_cast<int64_t>(place) * tiles + tile) * 32 + lane_index()) * 8;
    }
    METHOD void load(int place, int tile, float (&x)[8]) const {
        load8(reinterpret_cast<const F32*>(this->tile(place, tile)), x);
    }
    METHOD void store(int place, int tile, const float (&x)[8]) const {
        store8(reinterpret_cast<F32*>(this->tile(place, tile)), x);
    }
};

// A tile as the left operand S^T.
template <int PARTS>
DEVICE void operand(const float (&x)[8], uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t planes[PARTS];
        split<PARTS>(x[2 * i], x[2 * i + 1], planes);
#pragma unroll
        for (int part = 0; part < PARTS; part++) a[part][i] = planes[part];
    }
}

// Accumulators of a [16, C] product.
template <int C>
struct Wide {
    float c[C / 16][2][4];
    METHOD void clear() {
#pragma unroll
        for (int n = 0; n < C / 16; n++) dla::clear(c[n]);
    }
};

// Prepared rows [C][width] of planes into shared memory, 16-byte loads.
template <int PARTS, int C>
DEVICE void copy_planes(const Tile<PARTS>& tile, const uint16_t* from, int width) {
    const int groups = width / 8;
    for (int i = threadIdx.x; i < PARTS * C * groups; i += THREADS) {
        const int row = i / groups, column = i % groups * 8;
        *reinterpret_cast<uint4*>(tile.data + row / C * tile.plane + row % C * tile.stride + column) =
            *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(row) * width + column);
    }
}

// A slice's 16 columns of a chunk of values, of tokens past `len` and columns past dv zeros. `factor`: of every token, or null.
template <int PARTS, typename T>
DEVICE void load_columns(const Tile<PARTS>& tile, const T* from, const Row& row, int64_t first, int len, int slice,
                         int dv, const float* factor = nullptr) {
    for (int i = threadIdx.x; i < T::CHUNK * 2; i += THREADS) {
        const int t = i / 2, column = i % 2 * 8;
        float x[8] = {};
        if (t < len && slice + column < dv) load8(from + row.at(first + t) * dv + slice + column, x);
        if (factor) {
#pragma unroll
            for (int n = 0; n < 8; n++) x[n] *= factor[t];
        }
        put8(tile, t, column, x);
    }
}

// P . Lambda: P [parts][C][C] of planes by the read weight of the slot that holds each token.
template <int PARTS, int C>
DEVICE void weigh_pairs(const Tile<2>& pairs, const uint16_t* p, const Replay<C>& replay, const Extents& e, const Row& row,
                        const float* lambda, int columns, int64_t first, int len) {
    for (int i = threadIdx.x; i < C * C / 2; i += THREADS) {
        const int t = i / (C / 2), s = i % (C / 2) * 2;
        float x[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (t >= len || s + n > t) continue;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                x[n] += __uint_as_float(static_cast<uint32_t>(p[(part * C + t) * C + s + n]) << 16);
            const int column = column_of(e, replay.of_token(t, s + n), replay.len[t]);
            x[n] *= lambda[row.at(first + t) * columns + column];
        }
        put2(pairs, t, s, x[0], x[1]);
    }
}

// Initial states [M][dk][dv] of a cache row, columns from `slice` on, into places 0 to m - 1. By the block.
DEVICE void load_initial(const Bank& bank, const float* from, int m, int dk, int dv, int slice) {
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2;
    const int64_t state = static_cast<int64_t>(dk) * dv;
    for (int i = warp_index(); i < m * bank.tiles; i += WARPS) {
        const int slot = i / bank.tiles, tile = i % bank.tiles;
        float x[8];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int key = tile * 16 + n / 4 * 8 + c2 + n % 2, column = slice + g + n / 2 % 2 * 8;
            x[n] = key < dk && column < dv ? from[slot * state + static_cast<int64_t>(key) * dv + column] : 0.0f;
        }
        bank.store(slot, tile, x);
    }
}

// The transition of the state at `place`, S <- decay S - Kd^T (W S), in two halves; the state and W S in two planes whatever
// the dtype: what is rounded here stays in the state. By a warp. First held = (W S)^T.
template <int PARTS, int C>
DEVICE void times_w(const Bank& bank, int place, const Tile<PARTS>& w, Wide<C>& held) {
    held.clear();
    for (int tile = 0; tile < bank.tiles; tile++) {
        float x[8];
        uint32_t a[2][4], b[PARTS][4];
        bank.load(place, tile, x);
        operand<2>(x, a);
#pragma unroll
        for (int n = 0; n < C / 16; n++) {
            load_b(w, n * 16, tile * 16, b);
            multiply<2, PARTS>(held.c[n], a, b);
        }
    }
}
// Then S <- decay S - Kd^T held^T, Kd = diag(factor) kd; `factor`: null, 1.
template <int PARTS, int C>
DEVICE void less_kd(const Bank& bank, int place, const Tile<PARTS>& kd, const float* factor, float decay,
                    const Wide<C>& held) {
    constexpr int BLOCKS = C / 16;
    const int c2 = lane_index() % 4 * 2;
    uint32_t a[BLOCKS][2][4];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = -held.c[n][i / 4][i % 4];
            if (factor) x[i] *= factor[n * 16 + i / 4 * 8 + c2 + i % 2];
        }
        operand<2>(x, a[n]);
    }
    for (int tile = 0; tile < bank.tiles; tile++) {
        float x[8], c[2][4];
        bank.load(place, tile, x);
#pragma unroll
        for (int i = 0; i < 8; i++) c[i / 4][i % 4] = decay * x[i];
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            uint32_t b[PARTS][4];
            load_b_trans(kd, tile * 16, n * 16, b);
            multiply<2, PARTS>(c, a[n], b);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = c[i / 4][i % 4];
        bank.store(place, tile, x);
    }
}

// The same of all m slots. By the block; no barrier.
template <int PARTS, int C>
DEVICE void transition(const Bank& bank, const uint8_t* order, int m, const Tile<PARTS>& w, const Tile<PARTS>& kd,
                       float decay) {
    for (int j = warp_index(); j < m; j += WARPS) {
        Wide<C> held;
        times_w<PARTS, C>(bank, order[j], w, held);
        less_kd<PARTS, C>(bank, order[j], kd, nullptr, decay, held);
    }
}

// The exit: what ends together is added where its oldest part stands, a new slot takes a place that is free once all
// that is merged away has been read. Slot i of the chunk's end then lies in order[i]; `next` is scratch. `logs`, gated:
// the places' decay since they were written, brought to the chunk's end. `keys`, `values`: the rows of Kh V are those of
// keys values. By the block, after a barrier; without one at its end.
template <int C, bool DELTA, int VALUES, int KEYS>
DEVICE void write_exits(const Bank& bank, const Exits& exits, int exit_count, uint8_t* order, uint8_t* next, double* logs,
                        double total_log, const Tile<VALUES>& values, const Tile<KEYS>& keys) {
    const int thread = threadIdx.x, warp = warp_index(), c2 = lane_index() % 4 * 2;
    if (thread == 0) {
        uint64_t taken = 0;
        for (int i = 0; i < exit_count; i++) {
            const Exits::Range from = exits.entries[i];
            if (from.from < from.to) next[i] = order[from.from], taken |= uint64_t{1} << next[i];
        }
        for (int i = 0; i < exit_count; i++) {
            const Exits::Range from = exits.entries[i];
            if (from.from < from.to) continue;
            next[i] = __ffsll(~taken) - 1;
            taken |= uint64_t{1} << next[i];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int opened = 0; opened < 2; opened++) {
        for (int i = warp; i < exit_count; i += WARPS) {
            const Exits::Range entries = exits.entries[i], tokens = exits.tokens[i];
            const int kept = entries.to - entries.from, added = tokens.to - tokens.from;
            if ((kept == 0) != (opened == 1) || (kept == 1 && added == 0)) continue;
            for (int tile = 0; tile < bank.tiles; tile++) {
                float c[2][4];
                clear(c);
                for (int j = entries.from; j < entries.to; j++) {
                    const float factor = DELTA ? 1.0f : expf(static_cast<float>(logs[order[j]] + total_log));
                    float x[8];
                    bank.load(order[j], tile, x);
#pragma unroll
                    for (int n = 0; n < 8; n++) c[n / 4][n % 4] += factor * x[n];
                }
                for (int s = tokens.from / 16 * 16; s < tokens.to; s += 16) {
                    uint32_t a[VALUES][4], b[KEYS][4];
                    load_a_trans(values, 0, s, a);
                    load_b_trans(keys, tile * 16, s, b);
                    // Tokens of other slots have no part in this one.
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const int t = s + n / 2 * 8 + c2;
                        uint32_t mask = 0;
                        if (t >= tokens.from && t < tokens.to) mask |= 0x0000ffffu;
                        if (t + 1 >= tokens.from && t + 1 < tokens.to) mask |= 0xffff0000u;
#pragma unroll
                        for (int part = 0; part < VALUES; part++) a[part][n] &= mask;
                    }
                    multiply<VALUES, KEYS>(c, a, b);
                }
                float x[8];
#pragma unroll
                for (int n = 0; n < 8; n++) x[n] = c[n / 4][n % 4];
                bank.store(next[i], tile, x);
            }
        }
        __syncthreads();
    }
    if (!DELTA) {
        for (int i = thread; i < exit_count; i += THREADS) {
            const Exits::Range entries = exits.entries[i], tokens = exits.tokens[i];
            const bool touched = entries.to - entries.from != 1 || tokens.to > tokens.from;
            // Places of exit slots are distinct: each is written by one thread.
            logs[next[i]] = touched ? 0.0 : logs[next[i]] + total_log;
        }
    }
    for (int i = thread; i < exit_count; i += THREADS) order[i] = next[i];
}

}  // namespace dla
