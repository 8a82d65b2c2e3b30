// One sequence and value head: where its tokens lie, and a chunk's log decays.
#pragma once

#include "../abi.cuh"
#include "tile.cuh"

namespace dla {

// Log decays below this are taken as this: e^-800 is 0 even in f64.
constexpr float LEAST_G = -800.0f;
constexpr double LOG2E = 1.4426950408889634;
// Added to the squared norm of a q or k row under qk_l2norm.
constexpr float L2NORM_EPS = 1e-6f;

struct Row {
    int64_t sequence;
    int head;
    int64_t start, len;  // tokens of the flat axis
    int value_heads, heads, key_head;

    // Index in a [B,T,HV] array, and in a [B,T,H] one.
    METHOD int64_t at(int64_t t) const { return (start + t) * value_heads + head; }
    METHOD int64_t key_at(int64_t t) const { return (start + t) * heads + key_head; }
    METHOD int64_t index() const { return sequence * value_heads + head; }
};

DEVICE int64_t start_of(const Extents& e, int64_t sequence) {
    return e.cu_seqlens ? e.cu_seqlens[sequence] : sequence * e.time;
}

DEVICE Row row_of(const Extents& e, int64_t sequence, int head) {
    const int64_t start = start_of(e, sequence);
    return {sequence, head, start, start_of(e, sequence + 1) - start, e.value_heads, e.heads,
            head / (e.value_heads / e.heads)};
}

// The sequence whose chunks stand at `place` among all (abi.cuh): the last that begins there or before.
DEVICE int64_t sequence_of_chunk(const Extents& e, int64_t place, int chunk) {
    int64_t low = 0, high = e.sequences - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (start_of(e, middle) / chunk + middle <= place) low = middle;
        else high = middle - 1;
    }
    return low;
}

DEVICE int64_t first_chunk(const Row& row, int chunk) { return row.start / chunk + row.sequence; }

// Chunks of a window of a sequence of e.time tokens.
DEVICE int64_t chunks_of_window(const Extents& e, int64_t from, int64_t to, int chunk) {
    const int64_t end = to < e.time ? to : e.time;
    return end > from ? (end - from + chunk - 1) / chunk : 0;
}

// Where what is kept of the window's first chunk stands (abi.cuh, PrepareSm90Params); the others follow.
DEVICE int64_t first_of_window(const Extents& e, const Row& row, int64_t from, int64_t to, int chunk) {
    return e.cu_seqlens ? first_chunk(row, chunk) + from / chunk : row.sequence * chunks_of_window(e, from, to, chunk);
}

// The backward's windows, packed or not: a chunk's place among W = N x chunks of the window, sequence by sequence.
DEVICE int64_t place_in_window(const Extents& e, const Row& row, int64_t from, int64_t to, int64_t first, int chunk) {
    return row.sequence * chunks_of_window(e, from, to, chunk) + (first - from) / chunk;
}

// Column of lambda that weighs slot `slot` while `len` are held.
DEVICE int column_of(const Extents& e, int slot, int len) { return e.newest_first ? len - 1 - slot : slot; }

// Gamma in two f32, so that differences of large sums keep their digits.
struct Gamma {
    float high, low;
};
DEVICE float minus(Gamma a, Gamma b) { return (a.high - b.high) + (a.low - b.low); }
DEVICE float value(Gamma a) { return a.high + a.low; }

// Inclusive sums of g over a chunk of at most 64 tokens, `chunk` entries: those past `len` repeat the last. By
// one warp. `unit`: a factor of them.
DEVICE void load_gamma(const float* g, const Row& row, int64_t first, int len, int chunk, Gamma* gamma, double unit = 1) {
    const int lane = lane_index();
    double carry = 0;
    for (int from = 0; from < chunk; from += 32) {
        const int t = from + lane;
        double sum = 0;
        if (g && t < len) sum = fmaxf(g[row.at(first + t)], LEAST_G);
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const double below = __shfl_up_sync(ALL, sum, by);
            if (lane >= by) sum += below;
        }
        sum += carry;
        carry = __shfl_sync(ALL, sum, 31);
        const double scaled = sum * unit;
        const float high = static_cast<float>(scaled);
        gamma[t] = {high, static_cast<float>(scaled - high)};
    }
}

// Reads row `from` (width elements, null: zeros) into planes, its padding zeroed; returns its squared norm.
// By one warp. `factor` scales it, exactly nothing where it is 1.
template <int PARTS, typename T>
DEVICE float load_row(const Tile<PARTS>& tile, int row, const T* from, int width, float factor) {
    const int column = lane_index() * 8;
    float x[8] = {}, sum = 0;
    if (from && column < width) {
        load8(from + column, x);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum += x[i] * x[i];
            x[i] *= factor;
        }
    }
    if (column < padded(width)) put8(tile, row, column, x);
    return warp_sum(sum);
}

// Columns of dk that prepare and route work on at a time.
constexpr int SLICE = 64;

// Eight columns of a slice that begins at `column`, of a row (null: zeros) times `factor`.
template <int PARTS, typename T>
DEVICE void load_slice(const Tile<PARTS>& tile, int row, int group, const T* from, int column, int width,
                       float factor) {
    float x[8] = {};
    if (from && column + group * 8 < width) {
        load8(from + column + group * 8, x);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= factor;
    }
    put8(tile, row, group * 8, x);
}

// Factor of a row under qk_l2norm, by one warp.
template <typename T>
DEVICE float norm_factor(const T* from, int width, bool normalise) {
    if (!normalise) return 1.0f;
    const int column = lane_index() * 8;
    float x[8] = {}, sum = 0;
    if (from && column < width) load8(from + column, x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(warp_sum(sum) + L2NORM_EPS);
}

}  // namespace dla
