// prepare on Hopper, bf16: what the scan takes of a chunk that is the same for all its slices of dv (OPERATOR.md,
// section 4), gated:
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
//
// Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): 64 (four blocks a multiprocessor).

#include "common/replay.cuh"

namespace dla {
namespace {

struct Chunk {
    Row row;
    int64_t first;  // token of the sequence
    int64_t place;  // among all chunks, as segment numbers them
    int64_t kept;   // where what is made of it stands (abi.cuh)
    int len;        // 0: no such chunk
};

template <typename Params>
DEVICE Chunk chunk_of(const Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const int head = blockIdx.x % e.value_heads;
    const int64_t at = blockIdx.x / e.value_heads;
    Chunk chunk;
    if (e.cu_seqlens) {
        chunk.row = row_of(e, sequence_of_chunk(e, at, C), head);
        chunk.first = (at - first_chunk(chunk.row, C)) * C;
    } else {
        const int64_t chunks = chunks_of_window(e, p.from, p.to, C);
        chunk.row = row_of(e, at / chunks, head);
        chunk.first = p.from + at % chunks * C;
    }
    chunk.kept = at;
    chunk.place = first_chunk(chunk.row, C) + chunk.first / C;
    const int64_t left = chunk.row.len - chunk.first;
    const bool inside = chunk.first >= p.from && chunk.first < p.to && left > 0;
    chunk.len = !inside ? 0 : left < C ? static_cast<int>(left) : C;
    return chunk;
}

// The places of the slots that are held after the chunk (0: not held), by one warp; lane i has tokens and slots i and
// i + 32. The slot that a token opens takes the place of the one that merges away then, which is that of its first item,
// or if none merges the next free one. An item is an entry slot or a token that opened a slot: so tokens lead to tokens.
template <int CHUNK>
DEVICE void exit_places(const Replay<CHUNK>& replay, const Exits& exits, int len, int entry, const uint8_t* entry_place,
                        uint8_t* exit_place) {
    constexpr int FOUND = 128;  // + place; less: the token whose place it is
    const int lane = lane_index();
    int link[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = lane + 32 * half, event = t < len ? replay.events[t] : EXTEND;
        link[half] = FOUND;
        if (event == OPEN) link[half] = FOUND + replay.len[t] - 1;
        if (event >= MERGE) {
            // The first of entry slots, then tokens before t that is in the slot, or beyond it.
            const int gone = event - MERGE + 1;
            int low = 0, high = entry + t;
            while (low < high) {
                const int middle = (low + high) / 2;
                const int at = t == 0           ? middle
                               : middle < entry ? replay.of_slot(t - 1, middle)
                                                : replay.of_token(t - 1, middle - entry);
                if (at < gone) low = middle + 1;
                else high = middle;
            }
            link[half] = low < entry ? FOUND + entry_place[low] : low - entry;
        }
    }
    const auto of_token = [&](int token) {
        const int low = __shfl_sync(ALL, link[0], token % 32), high = __shfl_sync(ALL, link[1], token % 32);
        return token % 64 < 32 ? low : high;
    };
    while (__any_sync(ALL, link[0] < FOUND || link[1] < FOUND)) {
        const int low = of_token(link[0]), high = of_token(link[1]);
        if (link[0] < FOUND) link[0] = low;
        if (link[1] < FOUND) link[1] = high;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half, opened = of_token(exits.tokens[i].from) - FOUND;
        const Exits::Range entries = exits.entries[i];
        const bool held = i < replay.len[len - 1];
        exit_place[i] = !held ? 0 : entries.from < entries.to ? entry_place[entries.from] : opened;
    }
}

// Row of block `block` of the ten of a lower triangle of 4 x 4 blocks, counted row after row.
DEVICE int block_row(int block) { return block >= 6 ? 3 : block >= 3 ? 2 : block >= 1 ? 1 : 0; }

DEVICE void prepare_sm90(const PrepareSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const Chunk chunk = chunk_of(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, entered = chunk.place * e.value_heads + row.head;
    const int64_t index = chunk.kept * e.value_heads + row.head;
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

    const int entry = static_cast<int>(p.chunk_len[entered]);
    if (thread < MOST_SLOTS) slot_at[thread] = 255;
    for (int t = warp; t < C; t += WARPS) {
        const bool live = t < len;
        const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        if (lane == 0) q_factor[t] = qf, k_factor[t] = kf;
    }
    for (int t = warp; t < len; t += WARPS) {
        const float* const from = p.lambda + row.at(first + t) * p.lambda_columns;
        for (int i = lane; i < capacity; i += 32) lambda[t * capacity + i] = from[i];
    }
    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
    __syncthreads();
    if (thread < MOST_SLOTS) {
        const bool held = thread < entry;
        const int place = held ? p.chunk_place[entered * capacity + thread] : 0;
        entry_place[thread] = place;
        if (held) slot_at[place] = thread;
        logs[thread] = thread < capacity ? p.chunk_log[entered * capacity + thread] : 0.0f;
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
            const int t = block_row(block), s = block - t * (t + 1) / 2;
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
        const int t0 = block_row(block), s0 = (block - t0 * (t0 + 1) / 2) * 16;
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
    const int quads = p.slots / 4, shift = __ffs(quads) - 1;  // a power of two
    for (int i = thread; i < C * quads; i += THREADS) {
        const int g = i % 8, half = i / 8 % 2, quad = i / 16 & (quads - 1), t = (i >> (4 + shift)) * 16 + half * 8 + g;
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
    if (warp == WARPS - 1) exit_places(replay, exits, len, entry, entry_place, exit_place);
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
            if (changed)
                plan->changed[changes + __popc(all & ((1u << lane) - 1))] =
                    static_cast<uint64_t>(exit_place[i]) | static_cast<uint64_t>(entries.from) << 8 |
                    static_cast<uint64_t>(entries.to) << 16 | static_cast<uint64_t>(tokens.from) << 24 |
                    static_cast<uint64_t>(tokens.to) << 32;
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

KERNEL BLOCKS_OF(dla::THREADS, 4) prepare_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90(p); }
