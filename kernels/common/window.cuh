// The backward's windows: which chunk a block has, and sums over what the scan's slices leave (abi.cuh).
#pragma once

#include "replay.cuh"

namespace dla {

struct WindowChunk {
    Row row;
    int64_t first;  // token
    int64_t kept;   // place in the window, times HV plus the head: where what is kept of it stands
    int64_t place;  // the same among all chunks
    int len;        // tokens; 0: no chunk of the window
};

// The chunk of block `block` of a grid W x HV.
DEVICE WindowChunk chunk_of_block(const Extents& e, int64_t block, int64_t from, int64_t to, int chunk) {
    const int head = static_cast<int>(block % e.value_heads);
    const int64_t at = block / e.value_heads;
    WindowChunk c;
    const int64_t chunks = chunks_of_window(e, from, to, chunk);
    c.row = row_of(e, at / chunks, head);
    c.first = from + at % chunks * chunk;
    c.kept = block;
    c.place = (first_chunk(c.row, chunk) + c.first / chunk) * e.value_heads + head;
    const int64_t left = c.row.len - c.first;
    const bool inside = c.first >= from && c.first < to && left > 0;
    c.len = !inside ? 0 : left < chunk ? static_cast<int>(left) : chunk;
    return c;
}

// Block (r, n) of 16 x 16, the index-th of a lower triangle, row by row.
DEVICE void lower_block(int index, int& r, int& n) {
    r = index < 1 ? 0 : index < 3 ? 1 : index < 6 ? 2 : 3;
    n = index - r * (r + 1) / 2;
}

// Sums over the rows (over the columns) of a 16 x 16 product, to [16]. By one warp.
DEVICE void column_sums(const float (&c)[2][4], float* to) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = c[half][i] + c[half][i + 2];
#pragma unroll
            for (int by = 4; by < 32; by *= 2) x += __shfl_xor_sync(ALL, x, by);
            if (lane_index() < 4) to[half * 8 + lane_index() * 2 + i] = x;
        }
}
DEVICE void row_sums(const float (&c)[2][4], float* to) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float x = (c[0][2 * i] + c[0][2 * i + 1]) + (c[1][2 * i] + c[1][2 * i + 1]);
#pragma unroll
        for (int by = 1; by < 4; by *= 2) x += __shfl_xor_sync(ALL, x, by);
        if (lane_index() % 4 == 0) to[lane_index() / 4 + i * 8] = x;
    }
}

}  // namespace dla
