// The inverse of a unit lower triangular matrix, in f32, by the block.
#pragma once

#include "tile.cuh"

namespace dla {

// Inverts I + L, L [C][C + 1] strictly lower, into the lower triangle of tm [C][C + 1]; the upper is scratch.
template <int C>
DEVICE void invert(const float* lower, float* tm) {
    constexpr int PITCH = C + 1;
    const int thread = threadIdx.x;
    if (thread < C) {
        const int base = thread / 16 * 16;
        for (int t = base; t < base + 16; t++) {
            float x = t == thread ? 1.0f : 0.0f;
            if (t > thread) {
                for (int u = thread; u < t; u++) x -= lower[t * PITCH + u] * tm[u * PITCH + thread];
                tm[t * PITCH + thread] = x;
            } else if (t == thread) {
                tm[t * PITCH + thread] = x;
            }
        }
    }
    __syncthreads();
    for (int distance = 1; distance < C / 16; distance++) {
        // The sum over k, put into the block across the diagonal.
        for (int i = thread; i < (C / 16 - distance) * 256; i += THREADS) {
            const int column = i / 256 * 16, row = column + distance * 16, r = i / 16 % 16, n = i % 16;
            float x = 0;
            for (int u = column; u < row; u++)
                x += u < column + 16 && u < column + n ? 0.0f : lower[(row + r) * PITCH + u] * tm[u * PITCH + column + n];
            tm[(column + r) * PITCH + row + n] = x;
        }
        __syncthreads();
        for (int i = thread; i < (C / 16 - distance) * 256; i += THREADS) {
            const int column = i / 256 * 16, row = column + distance * 16, r = i / 16 % 16, n = i % 16;
            float x = 0;
            for (int u = 0; u <= r; u++) x -= tm[(row + r) * PITCH + row + u] * tm[(column + u) * PITCH + row + n];
            tm[(row + r) * PITCH + column + n] = x;
        }
        __syncthreads();
    }
}

}  // namespace dla
