// Sums of the keys of slots, from the prefix sums that route_sums and route_bases leave (route.cu).
#pragma once

#include "replay.cuh"

namespace dla {

// Tokens between two rows of route_sums.
constexpr int GRANULE = 8;

DEVICE void store_f32x8(float* to, const float (&x)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
DEVICE void load_f32x8(const float* from, float (&x)[8]) { load8(reinterpret_cast<const F32*>(from), x); }

// Eight elements as load8 reads them.
template <typename T>
struct Eight {
    uint4 words;
};
template <>
struct Eight<F32> {
    float4 words[2];
};

// Sums of the keys of `count` neighbouring slots, `width` columns from `from` on: calls take(j, group, x) with eight
// columns of slot j, zeros from `count` to `rows`. Slot j starts at starts[j] (as in chunk_starts) and the last ends at
// starts[count]. `partial`: count + 1 rows of `width`. By the block, a barrier inside.
template <typename T, typename Params, typename Take>
DEVICE void key_sums(const Params& p, const Row& row, const int* starts, int count, int rows, int from, int width,
                     float* partial, Take take) {
    constexpr int C = T::CHUNK, GRANULES = C / GRANULE;
    const Extents& e = p.extents;
    // A thread has the same eight columns of every (THREADS / groups)-th row.
    const int dk = e.dk, groups = width / 8, group = threadIdx.x % groups, column = from + group * 8;
    const T* const k = static_cast<const T*>(p.k);
    const int64_t place = first_chunk(row, C);
    // From its chunk's first token to every bound.
    for (int j = threadIdx.x / groups; j <= count; j += THREADS / groups) {
        const int start = starts[j];
        float x[8] = {};
        if (start > 0 && column < dk) {
            const int chunk = start / C, offset = start % C, granule = (offset + GRANULE / 2) / GRANULE;
            if (granule > 0) {
                const int64_t at = ((place + chunk) * e.heads + row.key_head) * GRANULES + granule - 1;
                load_f32x8(p.sums + at * dk + column, x);
            }
            const bool beyond = granule * GRANULE > offset;
            const int low = beyond ? start : chunk * C + granule * GRANULE;
            const int high = beyond ? chunk * C + granule * GRANULE : start;
            // All loads before the sums; keys of no part in them are zeros.
            Eight<T> key[GRANULE / 2];
            float by[GRANULE / 2];
            const int64_t at = row.key_at(low);
            const T* const keys = k + at * dk + column;
            const int stride = e.heads * dk;
#pragma unroll
            for (int r = 0; r < GRANULE / 2; r++) {
                const bool live = low + r < high && low + r < row.len;
                key[r] = {};
                by[r] = beyond ? -1.0f : 1.0f;
                if (live) key[r] = *reinterpret_cast<const Eight<T>*>(keys + r * stride);
                if (live && p.qk_l2norm) by[r] *= p.key_factors[at + r * e.heads];
            }
#pragma unroll
            for (int r = 0; r < GRANULE / 2; r++) {
                float of_key[8];
                load8(reinterpret_cast<const T*>(&key[r]), of_key);
#pragma unroll
                for (int c = 0; c < 8; c++) x[c] += by[r] * of_key[c];
            }
        }
        store_f32x8(partial + j * width + group * 8, x);
    }
    __syncthreads();
    for (int j = threadIdx.x / groups; j < rows; j += THREADS / groups) {
        float x[8] = {};
        if (j < count && column < dk) {
            const int start = starts[j], end = starts[j + 1];
            float less[8];
            load_f32x8(partial + j * width + group * 8, less);
            load_f32x8(partial + (j + 1) * width + group * 8, x);
#pragma unroll
            for (int c = 0; c < 8; c++) x[c] -= less[c];
            const int chunk = start > 0 ? start / C : 0, last = end > 0 ? end / C : 0;
            if (chunk != last) {
                const int64_t stride = static_cast<int64_t>(e.heads) * dk;
                const double* const bases = p.bases + place * stride + row.key_head * dk + column;
                const auto* const a = reinterpret_cast<const double2*>(bases + chunk * stride);
                const auto* const b = reinterpret_cast<const double2*>(bases + last * stride);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    x[2 * c] += static_cast<float>(b[c].x - a[c].x);
                    x[2 * c + 1] += static_cast<float>(b[c].y - a[c].y);
                }
            }
            if (start < 0) {
                // Slots of the initial cache: one as a rule.
                const int64_t initial = row.index() * e.capacity + p.initial_len[row.index()];
                for (int item = start; item < end && item < 0; item++) {
                    float keys[8];
                    load_f32x8(p.initial_keys + (initial + item) * dk + column, keys);
#pragma unroll
                    for (int c = 0; c < 8; c++) x[c] += keys[c];
                }
            }
        }
        take(j, group, x);
    }
}

}  // namespace dla
