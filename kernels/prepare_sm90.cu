// prepare on Hopper, gated, bf16: what the scan takes of a chunk that is the same for all its slices of dv
// (OPERATOR.md, section 4).
//
//   P . Lambda,  P_ts = scale e^{Gamma_t - Gamma_s} q_t . k_s,  Lambda_ts = lambda_t[slot_t(s)]
//   w_t[j] = scale lambda_t[pi_t(j)] e^{Gamma_t + log decay of slot j since it was written}
//   and which slots change, of what (ChunkPlan, abi.cuh).
//
// One block of 256 threads per chunk of 64 tokens and value head (grid: abi.cuh; a place without a chunk returns at
// once). P . Lambda leaves as the left operands of the scan's products (a product's fragments are those of the next
// one's left operand), the weights in the order in which a thread of the scan reads them.
//
// Shared memory: 27,728 bytes + 256 M. Floor: bytes; at S3 0.27 GB of q and k, 63 MB of lambda, 117 MB written:
// 0.15 ms. Numerics: sums in f32, P . Lambda rounded once to bf16, the weights f32.

#include "common/replay.cuh"

namespace dla {
namespace {

struct Chunk {
    Row row;
    int64_t first;  // token of the sequence
    int64_t place;
    int len;        // 0: no such chunk
};

DEVICE Chunk chunk_of(const PrepareSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const int head = blockIdx.x % e.value_heads;
    const int64_t at = blockIdx.x / e.value_heads;
    Chunk chunk;
    if (e.cu_seqlens) {
        chunk.row = row_of(e, sequence_of_chunk(e, at, C), head);
        chunk.first = (at - first_chunk(chunk.row, C)) * C;
    } else {
        const int64_t end = p.to < e.time ? p.to : e.time, chunks = (end - p.from + C - 1) / C;
        chunk.row = row_of(e, at / chunks, head);
        chunk.first = p.from + at % chunks * C;
    }
    chunk.place = first_chunk(chunk.row, C) + chunk.first / C;
    const int64_t left = chunk.row.len - chunk.first;
    const bool inside = chunk.first >= p.from && chunk.first < p.to && left > 0;
    chunk.len = !inside ? 0 : left < C ? static_cast<int>(left) : C;
    return chunk;
}

// The places of the slots that are held after the chunk, by one warp: lane i has slots i and i + 32.
template <int CHUNK>
DEVICE void exit_places(const Replay<CHUNK>& replay, int len, int entry, const uint8_t* entry_place, uint8_t* exit_place) {
    const int lane = lane_index();
    int low = entry_place[lane], high = entry_place[lane + 32], held = entry;
    for (int t = 0; t < len; t++) {
        const int event = replay.events[t];
        if (event == EXTEND) continue;
        int place = held;
        if (event >= MERGE) {
            const int merged = event - MERGE, gone = merged + 1;
            const int from_low = __shfl_sync(ALL, low, gone % 32), from_high = __shfl_sync(ALL, high, gone % 32);
            place = gone < 32 ? from_low : from_high;
            int next_low = __shfl_down_sync(ALL, low, 1), next_high = __shfl_down_sync(ALL, high, 1);
            const int first_high = __shfl_sync(ALL, high, 0);
            if (lane == 31) next_low = first_high;
            if (lane > merged) low = next_low;
            if (lane + 32 > merged) high = next_high;
            held--;
        }
        if (lane == held) low = place;
        if (lane + 32 == held) high = place;
        held++;
    }
    exit_place[lane] = low, exit_place[lane + 32] = high;
}

DEVICE void prepare_sm90(const PrepareSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const Chunk chunk = chunk_of(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, index = chunk.place * e.value_heads + row.head;
    const int len = chunk.len, dk = e.dk, width = padded(dk), capacity = e.capacity;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const Bf16* const q = static_cast<const Bf16*>(p.q);
    const Bf16* const k = static_cast<const Bf16*>(p.k);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    float* const logs = carve.take<float>(MOST_SLOTS);            // by place
    uint8_t* const entry_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const exit_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const slot_at = carve.take<uint8_t>(MOST_SLOTS);     // entry slot at a place
    const Tile<1> queries = carve.tile<1>(C, SLICE), keys = carve.tile<1>(C, SLICE);
    float* const lambda = carve.take<float>(C * capacity);
    carve.check();

    const int entry = static_cast<int>(p.chunk_len[index]);
    if (thread < MOST_SLOTS) slot_at[thread] = 255;
    for (int t = warp; t < C; t += WARPS) {
        const bool live = t < len;
        const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        if (lane == 0) q_factor[t] = qf, k_factor[t] = kf;
    }
    for (int i = thread; i < len * capacity; i += THREADS)
        lambda[i] = p.lambda[row.at(first + i / capacity) * p.lambda_columns + i % capacity];
    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
    __syncthreads();
    if (thread < MOST_SLOTS) {
        const bool held = thread < entry;
        const int place = held ? p.chunk_place[index * capacity + thread] : 0;
        entry_place[thread] = place;
        if (held) slot_at[place] = thread;
        logs[thread] = thread < capacity ? p.chunk_log[index * capacity + thread] : 0.0f;
    }
    replay.run(p.events, row, first, len, entry);
    exits.find(replay, len, entry);
    const int exit_len = replay.len[len - 1];
    const auto weight_of = [&](int t, int slot) { return lambda[t * capacity + column_of(e, slot, replay.len[t])]; };

    // P . Lambda, by blocks of 16 x 16 from the top left on, row after row: warp w has blocks w and w + 8 of ten.
    constexpr int BLOCKS = 10, MINE = 2;
    float qk[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(qk[i]);
    for (int column = 0; column < width; column += SLICE) {
        __syncthreads();
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            const int64_t at = row.key_at(first + t) * dk;
            load_slice(queries, t, group, t < len ? q + at : nullptr, column, dk, 1.0f);
            load_slice(keys, t, group, t < len ? k + at : nullptr, column, dk, 1.0f);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = warp + i * WARPS;
            if (block >= BLOCKS) continue;
            const int t = block >= 6 ? 3 : block >= 3 ? 2 : block >= 1 ? 1 : 0, s = block - t * (t + 1) / 2;
#pragma unroll
            for (int from = 0; from < SLICE; from += 16) {
                uint32_t a[1][4], b[1][4];
                load_a(queries, t * 16, from, a);
                load_b(keys, s * 16, from, b);
                multiply<1, 1>(qk[i], a, b);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = warp + i * WARPS;
        if (block >= BLOCKS) continue;
        const int t0 = (block >= 6 ? 3 : block >= 3 ? 2 : block >= 1 ? 1 : 0), s0 = (block - t0 * (t0 + 1) / 2) * 16;
        uint32_t operand[4];
        int n = 0;
        each_pair(qk[i], [&](int r, int column, float x0, float x1) {
            const int t = t0 * 16 + r, s = s0 + column;
            const float factor = p.scale * q_factor[t];
            const auto pair = [&](float x, int s) {
                if (t >= len || s > t) return 0.0f;
                return x * factor * k_factor[s] * expf(minus(gamma[t], gamma[s])) * weight_of(t, replay.of_token(t, s));
            };
            operand[n++] = pack_bf16(pair(x0, s), pair(x1, s + 1));
        });
        reinterpret_cast<uint4*>(p.pairs)[(index * BLOCKS + block) * 32 + lane] =
            make_uint4(operand[0], operand[1], operand[2], operand[3]);
    }

    // The weights of four neighbouring places at a time.
    const int quads = p.slots / 4;
    for (int i = thread; i < C * quads; i += THREADS) {
        const int g = i % 8, half = i / 8 % 2, quad = i / 16 % quads, t = i / (16 * quads) * 16 + half * 8 + g;
        float x[4] = {};
        if (t < len) {
            const float factor = p.scale * q_factor[t];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int place = quad * 4 + n, slot = slot_at[place];
                if (slot == 255) continue;
                x[n] = factor * weight_of(t, replay.of_slot(t, slot)) * expf(value(gamma[t]) + logs[place]);
            }
        }
        reinterpret_cast<float4*>(p.weights)[index * C * quads + i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    // The plan.
    ChunkPlan* const plan = p.plans + index;
    const Gamma total = gamma[C - 1];
    if (warp == 0) exit_places(replay, len, entry, entry_place, exit_place);
    __syncthreads();
    if (warp == 0) {
        int changes = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            const Exits::Range entries = exits.entries[i], tokens = exits.tokens[i];
            const bool same = entries.to - entries.from == 1 && tokens.to == tokens.from;
            const bool changed = i < exit_len && !same;
            const uint32_t all = __ballot_sync(ALL, changed);
            if (changed) {
                const auto below = [](int t) { return t == 64 ? ~uint64_t{0} : (uint64_t{1} << t) - 1; };
                plan->changed[changes + __popc(all & ((1u << lane) - 1))] = {
                    below(tokens.to) & ~below(tokens.from), exit_place[i], entries.from, entries.to, {}};
            }
            changes += __popc(all);
            plan->exit_place[i] = exit_place[i];
            plan->exit_factor[i] = i < exit_len && same ? expf(logs[exit_place[i]] + value(total)) : 1.0f;
        }
        if (lane == 0) plan->changes = changes, plan->exit_len = exit_len;
    } else if (warp < 4) {
        const int i = thread - 32;
        if (i < C) plan->value_factor[i] = i < len ? k_factor[i] * expf(minus(total, gamma[i])) : 0.0f;
    } else if (warp < 6) {
        const int j = thread - 128;
        plan->factor[j] = j < entry ? expf(logs[entry_place[j]] + value(total)) : 0.0f;
        plan->entry_place[j] = entry_place[j];
    }
}

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(dla::THREADS) prepare_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90(p); }
