// g_backward on Hopper, gated, bf16: dg (OPERATOR.md, section 4). With x(s, t) what token t's read of what token s wrote gives to
// the sum of o . do,
//
//   dg_u = sum over s < u <= t of x(s, t)
//
// Pairs of tokens that are read as pairs (prepare_backward_sm90) are summed there. Of those that meet by way of the states
//
//   dg_u = dg_{u+1} + read_u - flow_u,  read_u = sum over s of x(s, u) = q_u . dq_u,  flow_u = sum over t of x(u, t) = v_u . dv_u = k_u . dk_u
//
// so that nothing of the size of a state is needed at every token. Where windows meet it is <dS, S> of the bank, plus the flow of
// the chunk before, which no bank has yet (tokens are written a chunk late); there the sums begin and end, and what they differ by
// at the end is taken off evenly over the window, so that roundings of a long sequence do not add up. At a row's end it is 0.
//
// anchors_sm90: a block of 256 threads has 8 columns of dk. g_flow_sm90: 256 threads a chunk and value head, four a token.
// g_backward_sm90: 256 threads a row. Shared memory: 2,048 bytes, none, 2,072 bytes. Floors: bytes, the states 6 M dk dv a window
// and row. Numerics: sums in f64, but over slices in f32; roundings of flow and read are those of dv, dk and dq before they are
// rounded, about 2e-3 of a token's, and add up as a walk between two anchors: 3e-3 sqrt(W / 6) of a token's for a window of W.

#include "common/window.cuh"

namespace dla {
namespace {

// Sum over the block's 256 threads, in pairs, to thread 0. `parts`: [256].
DEVICE double block_sum(double x, double* parts) {
    const int thread = threadIdx.x;
    parts[thread] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) parts[thread] += parts[thread + half];
    }
    __syncthreads();
    const double sum = parts[0];
    __syncthreads();
    return sum;
}

DEVICE void anchors(const AnchorsSm90Params& p) {
    constexpr int C = Bf16::CHUNK, COLUMNS = 8;
    const Extents& e = p.extents;
    const int slices = e.dk / COLUMNS, slice = blockIdx.x % slices, thread = threadIdx.x;
    const int64_t index = blockIdx.x / slices;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from) return;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(THREADS);
    carve.check();
    const float* const factors =
        p.entry_factor + (place_in_window(e, row, p.from, p.to, p.from, C) * e.value_heads + row.head) * p.factor_slots;
    // As a block of scan_queries_sm90 holds its states (Slots, scan_sm90.cu): of two bytes the upper ones.
    const int64_t blocks = (slices + p.groups - 1) / p.groups;
    const int64_t bytes = static_cast<int64_t>(p.bank_slots) * p.width * 24 + 64;
    const unsigned char* const bank = p.banks + (index * blocks * p.groups + slice) * bytes;
    const int others = p.bank_slots * p.width * 8 + 64;
    // As a thread of scan_backward_sm90 holds its adjoints.
    const int group = thread / 128, warp = thread % 128 / 32, lane = thread % 32, column = lane / 4, c2 = lane % 4 * 2;
    const int eights = p.carried_slots / 16, wide = p.width / 2, fours = eights * wide / 4;
    const float4* const carried = reinterpret_cast<const float4*>(p.carried) + static_cast<int64_t>(blockIdx.x) * (fours + 2) * 256 + thread;
    const float grown = carried[(fours + 1) * 256].x;
    double sum = 0;
    for (int i = 0; i < fours; i++) {
        const int place = (group * eights + i * 4 / wide) * 8 + warp * 2, k = i * 4 % wide / 4 * 8 + c2;
        const float4 x = carried[i * 256];
        const float adjoint[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
        for (int own = 0; own < 2; own++) {
            if (place + own >= p.bank_slots || place + own >= p.factor_slots) continue;
            const float factor = factors[place + own];
            if (factor == 0) continue;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int g = (k + n) % 8;
                const unsigned char* const at = bank + (g % 4 < 2 ? 0 : others) + (g / 4 * 2 + g % 2) * 16 + column * 2 +
                                                (place + own) * p.width * 8 + (k + n) / 16 * 128 + (k + n) / 8 % 2 * 64;
                const float state = __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16);
                sum += static_cast<double>(adjoint[own][n]) * (state * factor);
            }
        }
    }
    sum = block_sum(sum * grown, parts);
    if (thread == 0) p.anchors[blockIdx.x] = sum;
}

// Sum over slices of what token t of the row writes that is read, dV's and dK's in the mean.
DEVICE float flow_of(const GBackwardSm90Params& p, const Row& row, int64_t t, int part, int parts) {
    const Extents& e = p.extents;
    const int64_t step = start_of(e, e.sequences) * e.value_heads, at = row.at(t);
    float sum = 0;
#pragma unroll
    for (int which = 0; which < 2; which++)
        for (int slice = part; slice < p.slices[which]; slice += parts) sum += p.flow[which][slice * step + at];
    return 0.5f * sum;
}

DEVICE void g_flow(const GBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK, PARTS = THREADS / C;
    const WindowChunk chunk = chunk_of_block(p.extents, blockIdx.x, p.from, p.to, C);
    const int t = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
    float sum = t < chunk.len ? flow_of(p, chunk.row, chunk.first + t, part, PARTS) : 0.0f;
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    if (part == 0 && t < chunk.len) p.net[chunk.kept * C + t] = p.read[chunk.kept * C + t] - sum;
}

DEVICE void g_backward(const GBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const int64_t index = blockIdx.x;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from) return;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(THREADS);
    double* const warps = carve.take<double>(WARPS + 1);
    carve.check();
    const int64_t end = row.len < p.to ? row.len : p.to, tokens = end - p.from;
    const int64_t place0 = place_in_window(e, row, p.from, p.to, p.from, C);
    // What is kept of token from + i.
    const auto kept = [&](int64_t i) { return ((place0 + i / C) * e.value_heads + row.head) * C + i % C; };

    double sum = 0;
    for (int64_t i = thread; i < tokens; i += THREADS) sum += p.net[kept(i)];
    const double all = block_sum(sum, parts);
    // At the window's beginning.
    double begin = 0;
    if (p.from > 0) {
        sum = 0;
        const int t = thread / 4;
        sum = flow_of(p, row, p.from - C + t, thread % 4, 4);
        if (thread < p.anchor_slices) sum += p.anchors[index * p.anchor_slices + thread];
        begin = block_sum(sum, parts);
    }
    const double right = row.len > p.to ? p.carried[index] : 0.0;
    const bool known = p.from > 0 || !p.resumed;
    const double off = known ? (right + all - begin) / static_cast<double>(tokens) : 0.0;
    __syncthreads();
    if (thread == 0) p.carried[index] = begin;

    // From the last token to the first, 256 at a time.
    double after = right;
    for (int64_t done = 0; done < tokens; done += THREADS) {
        const int64_t i = tokens - 1 - done - thread;
        double x = i >= 0 ? p.net[kept(i)] : 0.0;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const double before = __shfl_up_sync(ALL, x, by);
            if (lane >= by) x += before;
        }
        if (lane == 31) warps[warp] = x;
        __syncthreads();
        double sum = after;
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) sum += warps[w];
            after += warps[w];
        }
        __syncthreads();
        if (i < 0) continue;
        double pairs = p.d_g[(kept(i) - i % C) * 2 + C + i % C];
        // The next chunk's share.
        if (i / C * C + C < tokens) pairs += p.d_g[(kept(i + C - i % C)) * 2 + i % C];
        else if (row.len > p.to) pairs += p.carried_g[index * C + i % C];
        p.dg[row.at(p.from + i)] = static_cast<float>(sum + x - off * static_cast<double>(tokens - i) + pairs);
    }
    __syncthreads();
    if (thread < C && p.from > 0) p.carried_g[index * C + thread] = p.d_g[kept(0) * 2 + thread];
}

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(dla::THREADS) anchors_sm90(const __grid_constant__ dla::AnchorsSm90Params p) { dla::anchors(p); }
KERNEL BLOCK_OF(dla::THREADS) g_flow_sm90(const __grid_constant__ dla::GBackwardSm90Params p) { dla::g_flow(p); }
KERNEL BLOCK_OF(dla::THREADS) g_backward_sm90(const __grid_constant__ dla::GBackwardSm90Params p) { dla::g_backward(p); }
