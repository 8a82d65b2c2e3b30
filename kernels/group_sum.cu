// group_sum: what value heads of a group give to the q and k that they share, summed in f32 in the heads' order; through
// qk_l2norm, y = f x, f = (|x|^2 + eps)^-1/2: dx = f (dy - y (y . dy)); rounded once. Of q alone where dk has been left by what
// computed it. One block of 256 threads per chunk of the window and key head, a warp a token.
//
// head_sums: sums over all tokens that chunks have left in parts (of dslope, dbias, dtau), in f64. One block of 256 threads
// per value head: every 256th chunk is a thread's, then threads in pairs, always in the same order.
//
// Shared memory: none; 2,048 bytes. Bytes bound group_sum: it reads 8 and writes 4 (bf16) a token, value head and column.

#include "common/window.cuh"

namespace dla {
namespace {

template <typename T>
DEVICE void group_sum(const GroupSumParams& p) {
    constexpr int C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, group = e.value_heads / e.heads, column = lane_index() * 8;
    const int64_t block = blockIdx.x / e.heads * static_cast<int64_t>(e.value_heads) + blockIdx.x % e.heads * group;
    const WindowChunk chunk = chunk_of_block(e, block, p.from, p.to, C);
    const bool inside = column < dk;
    for (int t = warp_index(); t < chunk.len; t += WARPS) {
        const int64_t at = chunk.row.key_at(chunk.first + t) * dk + column;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            if (which && !p.d_k) continue;
            const float* const from = (which ? p.d_k : p.d_q) + (chunk.kept * C + t) * dk + column;
            float sum[8] = {};
            for (int head = 0; head < group && inside; head++) {
                float x[8];
                load8(reinterpret_cast<const F32*>(from + static_cast<int64_t>(head) * C * dk), x);
#pragma unroll
                for (int i = 0; i < 8; i++) sum[i] += x[i];
            }
            if (p.qk_l2norm) {
                float x[8] = {}, squares = 0, dot = 0;
                if (inside) load8(static_cast<const T*>(which ? p.k : p.q) + at, x);
#pragma unroll
                for (int i = 0; i < 8; i++) squares += x[i] * x[i], dot += x[i] * sum[i];
                const float factor = 1.0f / sqrtf(warp_sum(squares) + L2NORM_EPS);
                const float projection = factor * (factor * warp_sum(dot));
#pragma unroll
                for (int i = 0; i < 8; i++) sum[i] = factor * (sum[i] - projection * x[i]);
            }
            if (inside) store8(static_cast<T*>(which ? p.dk : p.dq) + at, sum);
        }
    }
}

DEVICE void sum_of_head(const HeadSumsParams& p) {
    const Extents& e = p.extents;
    const int thread = threadIdx.x, head = blockIdx.x;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(THREADS);
    carve.check();
    // Places of chunks: those before the last sequence's end.
    const int64_t places = start_of(e, e.sequences) / p.chunk + e.sequences;
    double sum = 0;
    for (int64_t place = thread; place < places; place += THREADS) {
        const Row row = row_of(e, sequence_of_chunk(e, place, p.chunk), head);
        const int64_t first = (place - first_chunk(row, p.chunk)) * p.chunk;
        if (first >= 0 && first < row.len) sum += p.sums[place * e.value_heads + head];
    }
    parts[thread] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) parts[thread] += parts[thread + half];
    }
    if (thread == 0) p.out[head] = static_cast<float>(parts[0] + (p.add ? p.out[head] : 0.0f));
}

}  // namespace
}  // namespace dla

#define GROUP_SUM(name, T) \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::GroupSumParams p) { dla::group_sum<dla::T>(p); }
GROUP_SUM(group_sum_bf16, Bf16)
GROUP_SUM(group_sum_f16, F16)
GROUP_SUM(group_sum_f32, F32)
KERNEL BLOCK_OF(dla::THREADS) head_sums(const __grid_constant__ dla::HeadSumsParams p) { dla::sum_of_head(p); }
