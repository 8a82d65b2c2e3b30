// g_backward on Hopper, gated, bf16: dg (OPERATOR.md, section 4). With x(s, t) what token t's read of what token s wrote gives to
// the sum of o . do,
//
//   dg_u = sum over s < u <= t of x(s, t)
//
// Pairs of tokens that are read as pairs (prepare_backward_sm90) are summed there. Of those that meet by way of the states
//
//   dg_u = dg_{u+1} + read_u - flow_u,  read_u = sum over s of x(s, u) = q_u . dq_u,  flow_u = sum over t of x(u, t) = v_u . dv_u = k_u . dk_u
//
// so that nothing of the size of a state is needed at every token. A row's end it begins from is <dS, S> of the final states, 0
// where they have no gradient. The roundings of read and flow add up as a walk, so where windows meet it is measured too: as <dS, S>
// of the bank, plus the flow of the chunk before, which no bank has yet (tokens are written a chunk late). That has roundings too.
// Either's variance is, but for one factor, the sum of the squares of what it is the sum of: V of read by slots and slices and of
// flow by slices, A of <dS, S> by slots and columns. So they are weighed as a Kalman smoother does, the state being dg at chunks'
// ends: from the last chunk to the first, then back. At a row's beginning without initial states A = 0.
// Where the decay is strong dg by way of the states all but vanishes inside a row, which no sum of roundings does: at every
// chunk's beginning 0 is an anchor too, with the variance of the reads that follow (P, in units of roundings, and not to be
// relied on: times 64).
//
// anchors_sm90, end_anchors_sm90: a block of 256 threads has 8 columns of dk. g_flow_sm90: 256 threads a chunk and value head, four a token.
// g_backward_sm90: 256 threads a row, a warp a chunk
// at a time, at most 32 chunks. Shared memory: 64 bytes, none, 64 + 56 bytes a chunk. Floors: bytes, the states 7 M dk dv a window
// and row: at S3 21 us of a window's anchors. Measured on an H100 before loads were asked for together and before what is not of the
// chain left it: anchors 68 us a window at S3, g_backward 38, g_flow 10; not timed since.
// Numerics: sums in f64, but over slices in f32; roundings of flow and read are those of dv, dk and dq before they are
// rounded, about 2e-3 of a token's.

#include "common/window.cuh"

namespace dla {
namespace {

// Sum over the block's 256 threads, in pairs within a warp. `parts`: [WARPS].
DEVICE double block_sum(double x, double* parts) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(ALL, x, by);
    if (lane_index() == 0) parts[warp_index()] = x;
    __syncthreads();
    double sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += parts[warp];
    __syncthreads();
    return sum;
}

DEVICE void anchors(const AnchorsSm90Params& p) {
    constexpr int C = Bf16::CHUNK, COLUMNS = 8, AT_ONCE = 4;
    const Extents& e = p.extents;
    const int slices = e.dk / COLUMNS, slice = blockIdx.x % slices, thread = threadIdx.x;
    const int64_t index = blockIdx.x / slices;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from) return;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(WARPS);
    carve.check();
    const float* const factors =
        p.entry_factor + (place_in_window(e, row, p.from, p.to, p.from, C) * e.value_heads + row.head) * p.factor_slots;
    // As a block of scan_queries_sm90 holds its states (Slots, scan_sm90.cu): an upper half and a byte.
    const int64_t blocks = (slices + p.groups - 1) / p.groups;
    const int64_t bytes = static_cast<int64_t>(p.bank_slots) * p.width * 24 + 64;
    const unsigned char* const bank = p.banks + (index * blocks * p.groups + slice) * bytes;
    const int others = p.bank_slots * p.width * 8 + 64, lower = others + p.bank_slots * p.width * 8, share = p.width / 64;
    // As a thread of scan_backward_sm90 holds its adjoints.
    const int group = thread / 128, warp = thread % 128 / 32, lane = thread % 32, column = lane / 4, c2 = lane % 4 * 2;
    const int eights = p.carried_slots / 16, wide = p.width / 2, fours = wide / 4;  // of eight slots: a multiple of AT_ONCE
    const float4* carried = reinterpret_cast<const float4*>(p.carried) + static_cast<int64_t>(blockIdx.x) * (eights * fours + 2) * 256 + thread;
    const float grown = carried[(eights * fours + 1) * 256].x;
    // Of rows c2 and c2 + 1 of the first 8 of a place.
    int upper_at[2], low_at[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int g = c2 + n;
        upper_at[n] = (g % 4 < 2 ? 0 : others) + (g / 4 * 2 + g % 2) * 16 + column * 2;
        low_at[n] = lower + (g * 4 + column / 2) * share * 4 + column % 2;
    }
    const int low_step = share == 1 ? 128 : 4;  // from 16 rows to the next
    double sum = 0, squares = 0;
    for (int eight = 0; eight < eights; eight++, carried += fours * 256) {
        // Of two places.
        const int place = (group * eights + eight) * 8 + warp * 2;
        float factor[2], parts_of[2] = {};
#pragma unroll
        for (int own = 0; own < 2; own++)
            factor[own] = place + own < p.bank_slots && place + own < p.factor_slots ? factors[place + own] : 0.0f;
        const auto add = [&](int own, int n, const float4& x, float state) {
            parts_of[own] += (own ? (n ? x.w : x.z) : (n ? x.y : x.x)) * state;
        };
        if (p.from == 0) {
            for (int i = 0; i < fours; i++) {
                const float4 adjoint = carried[i * 256];
#pragma unroll
                for (int own = 0; own < 2; own++) {
                    if (factor[own] == 0) continue;
                    const float* const state = p.initial_states + (index * e.capacity + place + own) * e.dk * e.dv +
                                               static_cast<int64_t>(slice * COLUMNS + column) * e.dv + i * 8 + c2;
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        if (i * 8 + c2 + n < e.dv) add(own, n, adjoint, state[n]);
                }
            }
        } else {
            for (int from = 0; from < fours; from += AT_ONCE) {
                // All is asked for before any of it is waited for.
                float4 adjoints[AT_ONCE];
                uint32_t upper[AT_ONCE][2][2] = {}, low[AT_ONCE][2][2] = {};
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) adjoints[i] = carried[(from + i) * 256];
#pragma unroll
                for (int own = 0; own < 2; own++) {
                    if (factor[own] == 0) continue;
                    const unsigned char* const at = bank + (place + own) * p.width * 8 + from * 64;
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                        for (int n = 0; n < 2; n++) {
                            upper[i][own][n] = *reinterpret_cast<const uint16_t*>(at + upper_at[n] + i * 64);
                            low[i][own][n] = at[low_at[n] + i / 2 * low_step + i % 2 * 2];
                        }
                }
#pragma unroll
                for (int own = 0; own < 2; own++) {
                    if (factor[own] == 0) continue;
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                        for (int n = 0; n < 2; n++)
                            add(own, n, adjoints[i], __uint_as_float((upper[i][own][n] << 16 | low[i][own][n] << 8) - 0x8000) * factor[own]);
                }
            }
        }
#pragma unroll
        for (int own = 0; own < 2; own++) {
            float x = parts_of[own] * grown;
            x += __shfl_xor_sync(ALL, x, 1);
            x += __shfl_xor_sync(ALL, x, 2);
            if (lane % 4 == 0) sum += x, squares += static_cast<double>(x) * x;
        }
    }
    sum = block_sum(sum, parts);
    squares = block_sum(squares, parts);
    if (thread == 0) p.anchors[blockIdx.x * 2] = sum, p.anchors[blockIdx.x * 2 + 1] = squares;
}

// <dS, S> of the final states, over 8 rows of dk: a warp a slot and row.
DEVICE void end_anchors(const EndAnchorsSm90Params& p) {
    constexpr int ROWS = 8;
    const Extents& e = p.extents;
    const int slices = e.dk / ROWS, slice = blockIdx.x % slices, lane = lane_index();
    const int64_t index = blockIdx.x / slices;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(WARPS);
    carve.check();
    double sum = 0, squares = 0;
    for (int i = warp_index(); i < e.capacity * ROWS; i += WARPS) {
        const int64_t at = ((index * e.capacity + i / ROWS) * e.dk + slice * ROWS + i % ROWS) * e.dv;
        float x = 0;
        for (int column = lane; column < e.dv; column += 32) x += p.gradient[at + column] * p.states[at + column];
        x = warp_sum(x);
        if (lane == 0) sum += x, squares += static_cast<double>(x) * x;
    }
    sum = block_sum(sum, parts);
    squares = block_sum(squares, parts);
    if (threadIdx.x == 0) p.anchors[blockIdx.x * 2] = sum, p.anchors[blockIdx.x * 2 + 1] = squares;
}

// Sum over slices of what token t of the row writes that is read, dV's and dK's in the mean, and its variance.
DEVICE float2 flow_of(const GBackwardSm90Params& p, const Row& row, int64_t t, int part, int parts) {
    const Extents& e = p.extents;
    const int64_t step = start_of(e, e.sequences) * e.value_heads, at = row.at(t);
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int which = 0; which < 2; which++)
        for (int slice = part; slice < p.slices[which]; slice += parts) {
            const float x = 0.5f * p.flow[which][slice * step + at];
            sum.x += x, sum.y += x * x;
        }
    return sum;
}

DEVICE void g_flow(const GBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK, PARTS = THREADS / C;
    const WindowChunk chunk = chunk_of_block(p.extents, blockIdx.x, p.from, p.to, C);
    const int t = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
    float2 sum = t < chunk.len ? flow_of(p, chunk.row, chunk.first + t, part, PARTS) : make_float2(0, 0);
#pragma unroll
    for (int by = 1; by < PARTS; by *= 2) {
        sum.x += __shfl_xor_sync(ALL, sum.x, by);
        sum.y += __shfl_xor_sync(ALL, sum.y, by);
    }
    if (part > 0 || t >= chunk.len) return;
    const float2 read = reinterpret_cast<const float2*>(p.read)[chunk.kept * C + t];
    reinterpret_cast<float2*>(p.net)[chunk.kept * C + t] = make_float2(read.x - sum.x, read.y + sum.y);
}

// A chunk of a window: sums of its tokens, then dg by way of the states.
struct Walk {
    double net, squares;    // of its tokens
    double after, walk;     // at its end: dg, and its variance, of what is right of it
    double off;             // at its beginning: what is to be taken off the sum there; before it is known, the chunk's decay
    double reads;           // squares of its reads
    double share;           // of `off` that falls at its end
};

DEVICE void g_backward(const GBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    constexpr int MINE = 4;                    // chunks of a warp
    constexpr double UNRELIABLE = 64 * 2.5e5;  // of P: a rounding is 2e-3
    const Extents& e = p.extents;
    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const int64_t index = blockIdx.x;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from) return;
    const int64_t end = row.len < p.to ? row.len : p.to;
    const int tokens = static_cast<int>(end - p.from), chunks = (tokens + C - 1) / C;
    if (chunks > MINE * WARPS) trap();
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(WARPS);
    Walk* const walks = carve.take<Walk>(chunks);
    carve.check();
    const int64_t first = place_in_window(e, row, p.from, p.to, p.from, C) * e.value_heads + row.head;
    // What is kept of token i of a chunk.
    const auto kept = [&](int chunk, int i) { return (first + static_cast<int64_t>(chunk) * e.value_heads) * C + i; };

    // All that is read, asked for at once. Of chunk WARPS n + warp a lane has tokens 32 half + 31 - lane.
    float2 net[MINE][2];
    float reads_of[MINE][2], of_pairs[MINE][2], of_later[MINE][2], decays[MINE];
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int chunk = n * WARPS + warp;
        decays[n] = chunk < chunks ? p.plans[first + static_cast<int64_t>(chunk) * e.value_heads].decay : 0.0f;
        // The next chunk's share of a token's pairs.
        const float* const later = chunk + 1 < chunks ? p.d_g + kept(chunk + 1, 0) * 2 : row.len > p.to ? p.carried_g + index * C : nullptr;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = half * 32 + 31 - lane;
            const bool inside = chunk * C + i < tokens;
            net[n][half] = inside ? reinterpret_cast<const float2*>(p.net)[kept(chunk, i)] : make_float2(0, 0);
            reads_of[n][half] = inside ? reinterpret_cast<const float2*>(p.read)[kept(chunk, i)].y : 0.0f;
            of_pairs[n][half] = inside ? p.d_g[kept(chunk, 0) * 2 + C + i] : 0.0f;
            of_later[n][half] = inside && later ? later[i] : 0.0f;
        }
    }
    // At the window's beginning, as measured, and its variance; and at the row's end.
    double begin = 0, of_anchor = 0, right = 0, walk = 0, reads = 0, sum = 0, squares = 0;
    const auto add = [&](const double* anchors) {
        if (thread >= p.anchor_slices) return;
        const double* const anchor = anchors + (index * p.anchor_slices + thread) * 2;
        sum += anchor[0], squares += anchor[1];
    };
    if (p.anchors) {
        const float2 flow = p.from > 0 ? flow_of(p, row, p.from - C + thread / 4, thread % 4, 4) : make_float2(0, 0);
        sum = flow.x, squares = flow.y;
        add(p.anchors);
        begin = block_sum(sum, parts), of_anchor = block_sum(squares, parts);
    }
    double* const carried = p.carried + index * 3;
    if (row.len > p.to) {
        right = carried[0], walk = carried[1], reads = carried[2];
    } else if (p.end_anchors) {
        sum = squares = 0;
        add(p.end_anchors);
        right = block_sum(sum, parts), walk = reads = block_sum(squares, parts);
    }
#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int chunk = n * WARPS + warp;
        if (chunk >= chunks) break;
        double x = static_cast<double>(net[n][0].x) + net[n][1].x, y = static_cast<double>(net[n][0].y) + net[n][1].y, z = reads_of[n][0] + reads_of[n][1];
#pragma unroll
        for (int by = 16; by > 0; by /= 2) {
            x += __shfl_xor_sync(ALL, x, by), y += __shfl_xor_sync(ALL, y, by), z += __shfl_xor_sync(ALL, z, by);
        }
        if (lane > 0) continue;
        Walk& at = walks[chunk];
        at.net = x, at.squares = y, at.reads = z, at.off = decays[n];
    }
    __syncthreads();
    if (thread == 0) {
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            Walk& at = walks[chunk];
            at.after = right, at.walk = walk;
            reads = at.reads + at.off * at.off * reads;
            const auto weigh = [&](double& x, double& of, double measured, double of_measured) {
                const double share = of > 0 ? of / (of + of_measured) : 0.0;
                x += (measured - x) * share, of *= 1 - share;
            };
            right += at.net, walk += at.squares;
            // Not at a row's beginning, where initial states are read as they are.
            if (chunk > 0 || p.from > 0) weigh(right, walk, 0, UNRELIABLE * reads);
            if (chunk == 0) weigh(right, walk, begin, of_anchor);
        }
        carried[0] = right, carried[1] = walk, carried[2] = reads;
    }
    __syncthreads();
    if (thread < chunks) {
        const Walk at = walks[thread];
        const double variance = at.walk + at.squares;
        walks[thread].share = variance > 0 ? at.walk / variance : 0.0;
    }
    __syncthreads();
    // And back: what has been learnt further left.
    if (thread == 0)
        for (int chunk = 0; chunk < chunks; chunk++) {
            Walk& at = walks[chunk];
            at.off = at.after + at.net - right;
            right = at.after - at.off * at.share;
        }
    __syncthreads();

#pragma unroll
    for (int n = 0; n < MINE; n++) {
        const int chunk = n * WARPS + warp;
        if (chunk >= chunks) break;
        const Walk at = walks[chunk];
        const double variance = at.walk + at.squares;
        double after = at.after, walk_after = at.walk;
        // From the last token to the first.
#pragma unroll
        for (int half = 1; half >= 0; half--) {
            const int i = half * 32 + 31 - lane;
            double x = net[n][half].x, y = net[n][half].y;
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const double before = __shfl_up_sync(ALL, x, by), walk_before = __shfl_up_sync(ALL, y, by);
                if (lane >= by) x += before, y += walk_before;
            }
            x += after, y += walk_after;
            after = __shfl_sync(ALL, x, 31), walk_after = __shfl_sync(ALL, y, 31);
            if (chunk * C + i >= tokens) continue;
            const double of_states = x - (variance > 0 ? at.off * (y / variance) : 0.0);
            p.dg[row.at(p.from + chunk * C + i)] = static_cast<float>(of_states + (of_pairs[n][half] + of_later[n][half]));
        }
    }
    // All have read it before the first barrier.
    if (thread < C && p.from > 0) p.carried_g[index * C + thread] = p.d_g[kept(0, 0) * 2 + thread];
}

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(dla::THREADS) anchors_sm90(const __grid_constant__ dla::AnchorsSm90Params p) { dla::anchors(p); }
KERNEL BLOCK_OF(dla::THREADS) end_anchors_sm90(const __grid_constant__ dla::EndAnchorsSm90Params p) { dla::end_anchors(p); }
KERNEL BLOCK_OF(dla::THREADS) g_flow_sm90(const __grid_constant__ dla::GBackwardSm90Params p) { dla::g_flow(p); }
KERNEL BLOCK_OF(dla::THREADS) g_backward_sm90(const __grid_constant__ dla::GBackwardSm90Params p) { dla::g_backward(p); }
