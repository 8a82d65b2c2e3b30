// prepare on Hopper, bf16: what the scan takes of a chunk that is the same for all its slices of dv (OPERATOR.md,
// section 4). Gated:
//
//   P . Lambda,  P_ts = scale e^{Gamma_t - Gamma_s} q_t . k_s,  Lambda_ts = lambda_t[slot_t(s)]
//   w_t[j] = scale lambda_t[pi_t(j)] e^{Gamma_t + log decay of slot j since it was written}
//   and which slots change, of what (ChunkPlan, abi.cuh).
//
// Gated delta rule, with A, Tm, W, Kd and Kh as in prepare.cu:
//
//   P . Lambda,  P = (A Tm) diag(beta);  w_t[j] = lambda_t[pi_t(j)];  Qt = scale e^Gamma Q - A W
//   -Kd^T W: the transition of a slot less e^{Gamma_C}, so that the scan lets a state pass in one product;  Kh
//   and which slots merge, which tokens end where (DeltaPlan, abi.cuh).
//
// One block of 256 threads per chunk of 64 tokens and value head (grid: abi.cuh; a place without a chunk returns at
// once). P . Lambda leaves as the left operands of the scan's products (a product's fragments are those of the next
// one's left operand), the weights in the order in which a thread of the scan reads them.
//
// Shared memory, gated: 27,728 bytes + 256 M. Floor: bytes; at S3 0.27 GB of q and k, 63 MB of lambda, 117 MB written:
// 0.15 ms. Numerics: sums in f32, P . Lambda rounded once to bf16, the weights f32.
//
// Shared memory, delta rule: 83,984 bytes + 256 M, two blocks a multiprocessor. At dk = 128 it makes 14 MFLOP a chunk and head
// (products of two planes by two; the transition takes 45%) and writes 95,440 bytes, at S3 0.78 GB: 0.3 ms. Numerics:
// operands in two planes; what leaves is rounded once to bf16, but Kh, which stays in the states, in two planes.
//
// Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): gated 64 (four blocks a multiprocessor), delta 83.

#include "common/chunk.cuh"
#include "common/delta.cuh"
#include "common/invert.cuh"

namespace dla {
namespace {

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

DEVICE void prepare_delta_sm90(const PrepareDeltaSm90Params& p) {
    constexpr int C = Bf16::CHUNK, PITCH = C + 1, BLOCKS = 10, MINE = 2;
    const Extents& e = p.extents;
    const Chunk chunk = chunk_of(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, entered = chunk.place * e.value_heads + row.head;
    const int64_t index = chunk.kept * e.value_heads + row.head;
    const int len = chunk.len, dk = e.dk, width = p.width, capacity = e.capacity;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const Bf16* const q = static_cast<const Bf16*>(p.q);
    const Bf16* const k = static_cast<const Bf16*>(p.k);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const beta = carve.take<float>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    uint8_t* const entry_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const exit_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const slot_at = carve.take<uint8_t>(MOST_SLOTS);  // entry slot at a place
    DeltaPlan* const plan = carve.take<DeltaPlan>(1);
    float* const lambda = carve.take<float>(C * capacity);
    // One after another: queries and keys as they come; Tm in f32; the keys that Tm or W multiplies.
    unsigned char* const reused = carve.next;
    const Tile<1> queries = carve.tile<1>(C, SLICE), raw_keys = carve.tile<1>(C, SLICE);
    carve.next = reused;
    const Tile<2> keys = carve.tile<2>(C, SLICE);
    float* const tm = reinterpret_cast<float*>(reused);
    const Tile<2> tm_planes = carve.tile<2>(C, C), a_planes = carve.tile<2>(C, C);
    float* const lower = reinterpret_cast<float*>(carve.next);  // dead when W is first written
    const Tile<2> w = carve.tile<2>(C, SLICE);
    carve.check();

    const int entry = static_cast<int>(p.chunk_len[entered]);
    if (thread < MOST_SLOTS) slot_at[thread] = 255;
    for (int t = warp; t < C; t += WARPS) {
        const bool live = t < len;
        const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        if (lane == 0) q_factor[t] = qf, k_factor[t] = kf, beta[t] = live ? p.beta[row.at(first + t)] : 0.0f;
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
    }
    replay.run(p.events, row, first, len, entry);
    exits.find(replay, len, entry);
    const int exit_len = replay.len[len - 1];
    const auto weight_of = [&](int t, int slot) { return lambda[t * capacity + column_of(e, slot, replay.len[t])]; };

    // Q K^T and K K^T: warp w has blocks w and w + 8 of 16 x 16.
    float qk[MINE][2][4], kk[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(qk[i]), clear(kk[i]);
    for (int column = 0; column < width; column += SLICE) {
        __syncthreads();
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            const int64_t at = row.key_at(first + t) * dk;
            load_slice(queries, t, group, t < len ? q + at : nullptr, column, dk, 1.0f);
            load_slice(raw_keys, t, group, t < len ? k + at : nullptr, column, dk, 1.0f);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = warp + i * WARPS, t = block_row(block), s = block - t * (t + 1) / 2;
            if (block >= BLOCKS) continue;
#pragma unroll
            for (int from = 0; from < SLICE; from += 16) {
                uint32_t a[1][4], b[1][4];
                load_b(raw_keys, s * 16, from, b);
                load_a(queries, t * 16, from, a);
                multiply<1, 1>(qk[i], a, b);
                load_a(raw_keys, t * 16, from, a);
                multiply<1, 1>(kk[i], a, b);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = warp + i * WARPS, t0 = block_row(block) * 16, s0 = (block - t0 / 16 * (t0 / 16 + 1) / 2) * 16;
        if (block >= BLOCKS) continue;
        const auto decay = [&](int t, int s) { return s <= t ? expf(minus(gamma[t], gamma[s])) * k_factor[s] : 0.0f; };
        each_pair(qk[i], [&](int r, int n, float x0, float x1) {
            const int t = t0 + r, s = s0 + n;
            const float factor = p.scale * q_factor[t];
            put2(a_planes, t, s, x0 * factor * decay(t, s), x1 * factor * decay(t, s + 1));
        });
        each_pair(kk[i], [&](int r, int n, float x0, float x1) {
            const int t = t0 + r, s = s0 + n;
            const float factor = beta[t] * k_factor[t];
            lower[t * PITCH + s] = s < t ? x0 * factor * decay(t, s) : 0.0f;
            lower[t * PITCH + s + 1] = s + 1 < t ? x1 * factor * decay(t, s + 1) : 0.0f;
        });
    }
    __syncthreads();
    invert<C>(lower, tm);
    for (int i = thread; i < C * C / 2; i += THREADS) {
        const int t = i / (C / 2), s = i % (C / 2) * 2;
        put2(tm_planes, t, s, s <= t ? tm[t * PITCH + s] : 0.0f, s + 1 <= t ? tm[t * PITCH + s + 1] : 0.0f);
    }
    __syncthreads();

    // P . Lambda.
    for (int block = warp; block < BLOCKS; block += WARPS) {
        const int t0 = block_row(block) * 16, s0 = (block - t0 / 16 * (t0 / 16 + 1) / 2) * 16;
        float c[2][4];
        clear(c);
        for (int u = s0; u <= t0; u += 16) {
            uint32_t a[2][4], b[2][4];
            load_a(a_planes, t0, u, a);
            load_b_trans(tm_planes, s0, u, b);
            multiply<2, 2>(c, a, b);
        }
        uint32_t operand[4];
        int n = 0;
        each_pair(c, [&](int r, int column, float x0, float x1) {
            const int t = t0 + r;
            const auto pair = [&](float x, int s) {
                return t < len && s <= t ? x * beta[s] * weight_of(t, replay.of_token(t, s)) : 0.0f;
            };
            operand[n++] = pack_bf16(pair(x0, s0 + column), pair(x1, s0 + column + 1));
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
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int slot = slot_at[quad * 4 + n];
                if (slot != 255) x[n] = weight_of(t, replay.of_slot(t, slot));
            }
        }
        reinterpret_cast<float4*>(p.weights)[index * C * quads + i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    // The plan; lane i has entry and exit slot i, then place i.
    if (warp == 0) {
        exit_places(replay, exits, len, entry, entry_place, exit_place);
        __syncwarp();
        plan->gone[lane] = 255;
        plan->merged_from[lane] = plan->merged_to[lane] = plan->tokens_from[lane] = plan->tokens_to[lane] = 0;
        __syncwarp();
        const bool gone = lane < entry && exits.entries[replay.of_slot(len - 1, lane)].from != lane;
        const uint32_t merged = __ballot_sync(ALL, gone);
        const auto before = [&](int slot) { return __popc(slot == 32 ? merged : merged & ((1u << slot) - 1)); };
        if (gone) plan->gone[entry_place[lane]] = before(lane);
        const int place = exit_place[lane];
        if (lane < exit_len) {
            const Exits::Range entries = exits.entries[lane], tokens = exits.tokens[lane];
            plan->merged_from[place] = before(entries.from), plan->merged_to[place] = before(entries.to);
            plan->tokens_from[place] = tokens.from, plan->tokens_to[place] = tokens.to;
        }
        plan->exit_place[lane] = lane < exit_len ? place : 0;
        __syncwarp();
        const int from = plan->tokens_from[lane], to = plan->tokens_to[lane];
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint32_t places = __ballot_sync(ALL, from < step * 16 + 16 && to > step * 16 && to > from);
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (lane == n) plan->steps[n] = (step ? plan->steps[n] : 0) | (places >> (n * 8) & 0xff ? 1 << step : 0);
        }
        if (lane == 0) plan->merges = __popc(merged), plan->decay = expf(value(gamma[C - 1])), plan->exit_len = exit_len;
        __syncwarp();
        if (lane < static_cast<int>(sizeof(DeltaPlan) / 16))
            reinterpret_cast<uint4*>(p.plans + index)[lane] = reinterpret_cast<const uint4*>(plan)[lane];
    }

    // 64 columns of W at a time, and what is made of them.
    const DeltaLayout layout = {width};
    uint32_t* const queries_out = p.queries + index * layout.queries();
    uint16_t* const transition_out = p.transition + index * layout.transition();
    uint16_t* const writes_out = p.writes + index * layout.writes();
    const auto load_keys = [&](int column, auto factor) {
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            load_slice(keys, t, group, t < len ? k + row.key_at(first + t) * dk : nullptr, column, dk, factor(t) * k_factor[t]);
        }
    };
    for (int column = 0; column < width; column += SLICE) {
        load_keys(column, [&](int t) { return beta[t] * expf(value(gamma[t])); });
        __syncthreads();
        // W = Tm (beta e^Gamma K).
        for (int block = warp; block < C / 16 * (SLICE / 16); block += WARPS) {
            const int t0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
            float c[2][4];
            clear(c);
            for (int u = 0; u <= t0; u += 16) {
                uint32_t a[2][4], b[2][4];
                load_a(tm_planes, t0, u, a);
                load_b_trans(keys, d0, u, b);
                multiply<2, 2>(c, a, b);
            }
            each_pair(c, [&](int r, int n, float x0, float x1) { put2(w, t0 + r, d0 + n, x0, x1); });
        }
        __syncthreads();
        // Qt = scale e^Gamma Q - A W.
        for (int block = warp; block < C / 16 * (SLICE / 16); block += WARPS) {
            const int t0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
            float c[2][4];
            clear(c);
            for (int u = 0; u <= t0; u += 16) {
                uint32_t a[2][4], b[2][4];
                load_a(a_planes, t0, u, a);
                load_b_trans(w, d0, u, b);
                multiply<2, 2>(c, a, b);
            }
            uint32_t operand[4];
            int i = 0;
            each_pair(c, [&](int r, int n, float x0, float x1) {
                const int t = t0 + r, d = column + d0 + n;
                float q0 = 0, q1 = 0;
                if (t < len && d < dk) load2(q + row.key_at(first + t) * dk + d, q0, q1);
                const float factor = p.scale * expf(value(gamma[t])) * q_factor[t];
                operand[i++] = pack_bf16(factor * q0 - x0, factor * q1 - x1);
            });
            reinterpret_cast<uint4*>(queries_out)[layout.query(t0 / 16, (column + d0) / 16, lane)] =
                make_uint4(operand[0], operand[1], operand[2], operand[3]);
        }
        // (-Kd^T W)^T, and once for each column, Kh = diag(beta) Tm^T Kd.
        for (int other = 0; other < width; other += SLICE) {
            if (other > 0) __syncthreads();
            load_keys(other, [&](int t) { return expf(minus(gamma[C - 1], gamma[t])); });
            __syncthreads();
            for (int block = warp; block < SLICE / 16 * (SLICE / 16); block += WARPS) {
                const int k0 = block / (SLICE / 16) * 16, n0 = block % (SLICE / 16) * 16;
                float c[2][4];
                clear(c);
#pragma unroll
                for (int t = 0; t < C; t += 16) {
                    uint32_t a[2][4], b[2][4];
                    load_a_trans(w, k0, t, a);
                    load_b_trans(keys, n0, t, b);
                    multiply<2, 2>(c, a, b);
                }
                each_pair(c, [&](int r, int n, float x0, float x1) {
                    *reinterpret_cast<uint32_t*>(transition_out + layout.at(width, column + k0 + r, other + n0 + n)) =
                        pack_bf16(-x0, -x1);
                });
            }
            if (other != column) continue;
            for (int block = warp; block < C / 16 * (SLICE / 16); block += WARPS) {
                const int t0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
                float c[2][4];
                clear(c);
                for (int u = t0; u < C; u += 16) {
                    uint32_t a[2][4], b[2][4];
                    load_a_trans(tm_planes, t0, u, a);
                    load_b_trans(keys, d0, u, b);
                    multiply<2, 2>(c, a, b);
                }
                each_pair(c, [&](int r, int n, float x0, float x1) {
                    uint32_t planes[2];
                    split<2>(beta[t0 + r] * x0, beta[t0 + r] * x1, planes);
#pragma unroll
                    for (int plane = 0; plane < 2; plane++)
                        *reinterpret_cast<uint32_t*>(writes_out + plane * C * width + layout.at(C, t0 + r, other + d0 + n)) =
                            planes[plane];
                });
            }
        }
        __syncthreads();
    }
}

}  // namespace
}  // namespace dla

KERNEL BLOCKS_OF(dla::THREADS, 4) prepare_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90(p); }
KERNEL BLOCK_OF(dla::THREADS) prepare_delta_sm90_bf16(const __grid_constant__ dla::PrepareDeltaSm90Params p) {
    dla::prepare_delta_sm90(p);
}
