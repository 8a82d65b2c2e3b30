// lambda_backward on Hopper, gated, bf16: the gradient of the read weights (OPERATOR.md, section 4),
//
//   dlambda_t[i] = scale e^{Gamma_t} sum over places j in slot i at t of e^{log decay of j's state until the chunk} q_t . (S_j do_t)
//                  + what the pairs of tokens give (prepare_backward_sm90)
//   read_t = sum over i of lambda_t[i] (the first part)_i = q_t . dq_t by way of the states, for dg
//
// from what every slice of dk leaves of q_t . (S_j do_t) (scan_queries_sm90).
//
// One block of 256 threads per chunk of 64 tokens and value head. Sums over slices by place, then over the places of a slot,
// always in the same order. Shared memory (bytes): 64 (8 (S + 4) + S) for S places, 1,088 more. Floor: bytes; it reads 4 S dk / 8 a
// token: at S3, M = 30 1.1 GB, 0.36 ms where it comes from memory, and a window's may still be in L2. Measured on an H100 when places
// were read one at a time and slices after the first barrier: 0.87 ms; not timed since.

#include "common/chunk.cuh"

namespace dla {
namespace {

DEVICE void lambda_backward_sm90(const LambdaBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    constexpr int MINE = C * 32 / 4 / THREADS;  // fours of places of a thread, of 32 places at most
    const Extents& e = p.extents;
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, index = chunk.kept;
    const int len = chunk.len, capacity = e.capacity, slots = p.slots, quads = slots / 4, pitch = slots + 4;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const factor = carve.take<float>(C);
    float* const entry_factor = carve.take<float>(MOST_SLOTS);
    float* const by_place = carve.take<float>(C * pitch);  // [C][pitch]
    float* const squares_of = carve.take<float>(C * pitch);  // the same of the slices' squares
    uint8_t* const slot_of = carve.take<uint8_t>(C * slots);
    uint8_t* const held = carve.take<uint8_t>(C);          // slots after a token
    carve.check();

    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
    if (warp == 1) {
        int count = static_cast<int>(p.chunk_len[chunk.place]);
        for (int from = 0; from < C; from += 32) {
            const int t = from + lane;
            const uint32_t opens = __ballot_sync(ALL, t < len && p.events[row.at(first + t)] == OPEN);
            held[t] = count + __popc(opens & ((2u << lane) - 1));
            count += __popc(opens);
        }
    }
    if (thread >= 64 && thread < 64 + slots) entry_factor[thread - 64] = p.entry_factor[index * slots + thread - 64];
    for (int i = thread; i < C * slots / 4; i += THREADS)
        reinterpret_cast<uint32_t*>(slot_of)[i] = reinterpret_cast<const uint32_t*>(p.slot_of + index * C * slots)[i];
    for (int t = warp; t < len; t += WARPS) {
        const float norm = norm_factor(static_cast<const Bf16*>(p.q) + row.key_at(first + t) * e.dk, e.dk, p.qk_l2norm);
        if (lane == 0) factor[t] = p.scale * norm;
    }
    // Sums over slices, as the weights stand: by 16 tokens, four places, half, row.
    const auto token_of = [&](int i) { return i / 16 / quads * 16 + i % 16; };
    const auto live = [&](int i) { return i < C * quads && token_of(i) < len; };
    const int64_t step = p.places * e.value_heads * C * slots;
    const float* from = p.d_reads + index * C * slots + thread * 4;
    float4 sums[MINE] = {}, squares[MINE] = {};
#pragma unroll 4
    for (int slice = 0; slice < p.slices; slice++, from += step)
#pragma unroll
        for (int n = 0; n < MINE; n++) {
            if (!live(n * THREADS + thread)) continue;
            const float4 x = *reinterpret_cast<const float4*>(from + n * THREADS * 4);
            float4 &sum = sums[n], &of_slices = squares[n];
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
            of_slices.x += x.x * x.x, of_slices.y += x.y * x.y, of_slices.z += x.z * x.z, of_slices.w += x.w * x.w;
        }
    __syncthreads();
    if (thread < len) factor[thread] *= expf(value(gamma[thread]));
    __syncthreads();
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int i = n * THREADS + thread;
        if (!live(i)) continue;
        const int t = token_of(i), quad = i / 16 % quads;
        const float4 decay = *reinterpret_cast<const float4*>(entry_factor + quad * 4);
        const float x = factor[t] * decay.x, y = factor[t] * decay.y, z = factor[t] * decay.z, w = factor[t] * decay.w;
        *reinterpret_cast<float4*>(by_place + t * pitch + quad * 4) = make_float4(sums[n].x * x, sums[n].y * y, sums[n].z * z, sums[n].w * w);
        *reinterpret_cast<float4*>(squares_of + t * pitch + quad * 4) =
            make_float4(squares[n].x * (x * x), squares[n].y * (y * y), squares[n].z * (z * z), squares[n].w * (w * w));
    }
    __syncthreads();

    // A warp a token, a lane slots i and i + 32.
    for (int t = warp; t < len; t += WARPS) {
        const int count = held[t];
        float read = 0, squares = 0;
        for (int i = lane; i < p.lambda_columns || i < capacity; i += 32) {
            // Slot i, and where it stands.
            float sum = 0, of_slices = 0;
#pragma unroll 4
            for (int quad = 0; quad < quads; quad++) {
                const uint32_t at = *reinterpret_cast<const uint32_t*>(slot_of + t * slots + quad * 4);
                const float4 x = *reinterpret_cast<const float4*>(by_place + t * pitch + quad * 4);
                const float4 y = *reinterpret_cast<const float4*>(squares_of + t * pitch + quad * 4);
                const float of_places[4] = {x.x, x.y, x.z, x.w}, their_squares[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (static_cast<int>(at >> 8 * n & 0xff) == i) sum += of_places[n], of_slices += their_squares[n];
            }
            const bool present = i < count;
            const int column = present ? column_of(e, i, count) : i;
            if (present) {
                const float weight = p.lambda[row.at(first + t) * p.lambda_columns + column];
                read += sum * weight, squares += of_slices * (weight * weight);
            }
            const float all = present ? sum + p.d_weights[(index * C + t) * capacity + i] : 0.0f;
            if (p.dlambda && i < p.lambda_columns) p.dlambda[row.at(first + t) * p.lambda_columns + column] = all;
            if (p.d_slots && i < capacity) p.d_slots[(index * C + t) * capacity + i] = all;
        }
        read = warp_sum(read), squares = warp_sum(squares);
        if (p.read && lane == 0) reinterpret_cast<float2*>(p.read)[index * C + t] = make_float2(read, squares);
    }
}

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(dla::THREADS) lambda_backward_sm90(const __grid_constant__ dla::LambdaBackwardSm90Params p) {
    dla::lambda_backward_sm90(p);
}
