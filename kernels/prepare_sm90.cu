// prepare on Hopper, bf16: what the scan takes of a chunk that is the same for all its slices of dv (OPERATOR.md,
// section 4). Gated:
//
//   P . Lambda,  P_ts = scale e^{Gamma_t - Gamma_s} q_t . k_s,  Lambda_ts = lambda_t[slot_t(s)], s in the chunk or the one before
//   w_t[j] = scale lambda_t[pi_t(j)] e^{Gamma_t + log decay of slot j's state until the chunk}
//   and which states change, of what (ChunkPlan, abi.cuh). Gamma at chunks' entries by gammas_sm90, before.
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
// Shared memory, gated: 15,552 bytes + 384 (dk + 8) + 256 M; at dk = 128, M = 30 three blocks a multiprocessor. Floor: bytes; at
// S3 0.27 GB of q and k, 63 MB of lambda, 190 MB written: 0.17 ms; measured 0.36 on an H100 (and gammas_sm90 0.03), half its
// issue slots busy. Numerics: sums in f32, P . Lambda rounded once to bf16, the weights f32, decays 2^x approximate.
//
// Shared memory, delta rule: 83,984 bytes + 256 M, two blocks a multiprocessor. At dk = 128 it makes 14 MFLOP a chunk and head
// (products of two planes by two; the transition takes 45%) and writes 95,440 bytes, at S3 0.78 GB: 0.3 ms. Numerics:
// operands in two planes; what leaves is rounded once to bf16, but Kh, which stays in the states, in two planes.
//
// Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): gated 69, gammas 48, delta 83.

#include "common/delta.cuh"
#include "common/invert.cuh"
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
template <typename R>
DEVICE void exit_places(const R& replay, const Exits& exits, int len, int entry, const uint8_t* entry_place,
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

// Replay (replay.cuh), an item's places together and 4 bytes more than C apart: then neither the items of a token nor the
// tokens of an item share a bank.
struct Items {
    static constexpr int C = Bf16::CHUNK, PITCH = C + 4;
    uint8_t* events;  // [C]
    uint8_t* merges;  // [C] event - MERGE
    uint8_t* len;     // [C] slots held after token t
    uint8_t* place;   // [MOST_SLOTS + C][PITCH]

    METHOD void take(Carve& carve) {
        events = carve.take<uint8_t>(C);
        merges = carve.take<uint8_t>(C);
        len = carve.take<uint8_t>(C);
        place = carve.take<uint8_t>((MOST_SLOTS + C) * PITCH);
    }

    METHOD const uint8_t* slot(int j) const { return place + j * PITCH; }
    METHOD const uint8_t* token(int s) const { return place + (MOST_SLOTS + s) * PITCH; }
    METHOD int of_slot(int t, int j) const { return slot(j)[t]; }
    METHOD int of_token(int t, int s) const { return token(s)[t]; }

    // By one warp.
    METHOD void read(const uint8_t* log, const Row& row, int64_t first, int tokens, int entry) const {
        const int lane = lane_index();
        int held = entry;
#pragma unroll
        for (int from = 0; from < C; from += 32) {
            const int t = from + lane, event = t < tokens ? log[row.at(first + t)] : EXTEND;
            const uint32_t opens = __ballot_sync(ALL, event == OPEN);
            events[t] = event, merges[t] = event - MERGE;
            len[t] = held + __popc(opens & ((2u << lane) - 1));
            held += __popc(opens);
        }
    }

    // One item through the chunk. Before it opens a token is at 0, where no merge finds it.
    METHOD void follow(int item) const {
        const int from = item < MOST_SLOTS ? -1 : item - MOST_SLOTS;
        uint32_t at = item < MOST_SLOTS ? item : 0;
        const uint32_t opened = from < 0 ? 0 : len[from] - 1;
        uint32_t* const to = reinterpret_cast<uint32_t*>(place + item * PITCH);
#pragma unroll 4
        for (int four = 0; four < C / 4; four++) {
            const uint32_t all = reinterpret_cast<const uint32_t*>(merges)[four];
            uint32_t places = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // EXTEND and OPEN are above every slot here.
                if ((all >> 8 * i & 0xff) < at) at--;
                if (four * 4 + i == from) at = opened;
                places |= at << 8 * i;
            }
            to[four] = places;
        }
    }
};

// The first of `count` ascending ones that is at least x.
DEVICE int first_from(const int32_t* ascending, int count, int64_t x) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (ascending[middle] < x) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Row `t` of a matrix [C][dk] to the tile, zeros where not `live`; by the block, complete after copies_wait.
DEVICE void copy_rows(const Tile<1>& tile, const Bf16* from, const Row& row, int64_t first, int live, int dk) {
    constexpr int C = Bf16::CHUNK;
    const int units = padded(dk) / 8, shift = units <= 8 ? 3 : units <= 16 ? 4 : 5;
    const int unit = threadIdx.x & ((1 << shift) - 1), rows = THREADS >> shift;
    if (unit >= units) return;
    for (int t = threadIdx.x >> shift; t < C; t += rows) {
        const bool inside = t < live && unit * 8 < dk;
        copy_async_16(tile.data + t * tile.stride + unit * 8,
                      from + row.key_at(first + (inside ? t : 0)) * dk + (inside ? unit * 8 : 0), inside);
    }
}

// A chunk's tokens are written a chunk late (scan_sm90.cu). So at its entry the states hold the tokens before the
// chunk before: those of entry slots that start there, a prefix of them. What is before the chunk and not in a state, the
// chunk before, is read as tokens. All from where slots start, so that chunks know nothing of each other.
DEVICE void prepare_sm90(const PrepareSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    constexpr int32_t NEVER = 0x7fffffff;
    const Extents& e = p.extents;
    const Chunk chunk = chunk_of(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, entered = chunk.place * e.value_heads + row.head;
    const int64_t index = chunk.kept * e.value_heads + row.head;
    const int len = chunk.len, dk = e.dk, width = padded(dk), capacity = e.capacity;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const bool lagged = first >= C, last = first + C >= row.len;
    // Segment's record of the next chunk has what stands at this one's end; that of another window may not be written yet.
    const bool recorded = !last && first + C < p.to;
    const int64_t before = lagged ? first - C : 0;  // the chunk before, if there is one
    const Bf16* const q = static_cast<const Bf16*>(p.q);
    const Bf16* const k = static_cast<const Bf16*>(p.k);

    Carve carve{dynamic_shared()};
    Items items;
    items.take(carve);
    Exits exits;
    exits.take(carve);
    ChunkPlan* const plan = carve.take<ChunkPlan>(1);
    Gamma* const gamma = carve.take<Gamma>(C);         // in units of log 2
    Gamma* const lag_gamma = carve.take<Gamma>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    float* const lag_factor = carve.take<float>(C);
    float* const row_factor = carve.take<float>(C);    // of the query, with its decay since the chunk's entry
    float* const behind = carve.take<float>(MOST_SLOTS);  // log2 decay of entry slot j's state until the chunk's entry
    float* const decay = carve.take<float>(MOST_SLOTS);   // and the decay
    int32_t* const starts = carve.take<int32_t>(MOST_SLOTS);
    int32_t* const exit_starts = carve.take<int32_t>(MOST_SLOTS);
    uint8_t* const exit_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const slot_at = carve.take<uint8_t>(MOST_SLOTS);   // entry slot whose state is at a place, else 255
    uint8_t* const lag_slot = carve.take<uint8_t>(C);           // entry slot of a token of the chunk before
    const Tile<1> queries = carve.tile<1>(C, width), keys = carve.tile<1>(C, width), lag_keys = carve.tile<1>(C, width);
    float* const lambda = carve.take<float>(C * capacity);
    carve.check();

    copy_rows(queries, q, row, first, len, dk);
    copy_rows(keys, k, row, first, len, dk);
    copy_rows(lag_keys, k, row, before, lagged ? C : 0, dk);
    for (int t = warp; t < len; t += WARPS) {
        const float* const from = p.lambda + row.at(first + t) * p.lambda_columns;
        for (int i = lane; i < capacity; i += 32) copy_async_4(lambda + t * capacity + i, from + i);
    }
    const int entry = static_cast<int>(p.chunk_len[entered]);
    if (warp == 0) items.read(p.events, row, first, len, entry);
    if (warp == 1) load_gamma(p.g, row, first, len, C, gamma, LOG2E);
    if (warp == 2) load_gamma(p.g, row, before, lagged ? C : 0, C, lag_gamma, LOG2E);
    if (thread >= 128 && thread < 128 + MOST_SLOTS) {
        const int j = thread - 128;
        const bool held = j < entry;
        starts[j] = held ? p.chunk_starts[entered * capacity + j] : NEVER;
        plan->entry_place[j] = held ? p.chunk_place[entered * capacity + j] : 0;
        plan->factor[j] = 0;
        reinterpret_cast<uint4*>(plan->changed)[2 * j] = make_uint4(0, 0, 0, 0);
        reinterpret_cast<uint4*>(plan->changed)[2 * j + 1] = make_uint4(0, 0, 0, 0);
        slot_at[j] = 255;
    }
    if (thread >= 192 && recorded) {
        const int i = thread - 192;
        const int64_t next = entered + e.value_heads;
        const bool held = i < static_cast<int>(p.chunk_len[next]);
        exit_starts[i] = held ? p.chunk_starts[next * capacity + i] : NEVER;
        exit_place[i] = held ? p.chunk_place[next * capacity + i] : 0;
    }
    if (p.qk_l2norm) {
        for (int t = warp; t < C; t += WARPS) {
            const bool live = t < len;
            const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, true);
            const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, true);
            const float lf = norm_factor(lagged ? k + row.key_at(before + t) * dk : nullptr, dk, true);
            if (lane == 0) q_factor[t] = p.scale * qf, k_factor[t] = kf, lag_factor[t] = lf;
        }
    } else if (thread < C) {
        q_factor[thread] = p.scale, k_factor[thread] = 1.0f, lag_factor[thread] = 1.0f;
    }
    __syncthreads();

    if (thread < MOST_SLOTS + C) {
        items.follow(thread);
    } else if (thread < 192) {
        // A state is kept relative to the end of the chunk that has its last token.
        const int j = thread - 128;
        const int32_t written = static_cast<int32_t>(before);
        float log = 0;
        if (starts[j] < written || starts[j] < 0) {
            const int32_t end = j + 1 < entry ? starts[j + 1] : NEVER, bound = end < written ? end : written;
            const int64_t chunks_before = first / C, at = bound > 0 ? (bound + C - 1) / C : 0;
            const double* const here = p.gammas + entered;
            log = static_cast<float>((here[0] - here[(at - chunks_before) * e.value_heads]) * LOG2E);
            slot_at[plan->entry_place[j]] = j;
        }
        behind[j] = log;
        decay[j] = exp2_approx(log);
    } else {
        const int t = thread - 192;
        row_factor[t] = q_factor[t] * exp2_approx(value(gamma[t]));
        plan->value_factor[t] = lagged ? lag_factor[t] * exp2_approx(minus(lag_gamma[C - 1], lag_gamma[t])) : 0.0f;
        lag_slot[t] = lagged ? first_from(starts, entry, before + t + 1) - 1 : 0;
    }
    copies_wait();
    __syncthreads();
    const int exit_len = items.len[len - 1];
    if (!recorded) {
        exits.find(items, len, entry);
        if (warp == 0) exit_places(items, exits, len, entry, plan->entry_place, exit_place);
        else if (thread >= 64 && thread < 64 + MOST_SLOTS) {
            const int i = thread - 64;
            const Exits::Range entries = exits.entries[i];
            exit_starts[i] = i >= exit_len               ? NEVER
                             : entries.from < entries.to ? starts[entries.from]
                                                         : static_cast<int32_t>(first) + exits.tokens[i].from;
        }
        __syncthreads();
    }

    // Column of lambda that weighs slot 0 at token t, and the way to the next slot's.
    const int way = e.newest_first ? -1 : 1;
    const auto base = [&](int t) { return lambda + t * capacity + (e.newest_first ? items.len[t] - 1 : 0); };

    // The weights of four neighbouring places at a time.
    const int quads = p.slots / 4, shift = __ffs(quads) - 1;  // a power of two
    for (int i = thread; i < C * quads; i += THREADS) {
        const int g = i % 8, half = i / 8 % 2, quad = i / 16 & (quads - 1), t = (i >> (4 + shift)) * 16 + half * 8 + g;
        float x[4] = {};
        if (t < len) {
            const float factor = row_factor[t];
            const float* const at = base(t);
            const uint32_t slots = reinterpret_cast<const uint32_t*>(slot_at)[quad];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int slot = slots >> 8 * n & 0xff;
                if (slot != 255) x[n] = factor * decay[slot] * at[way * items.of_slot(t, slot)];
            }
        }
        reinterpret_cast<float4*>(p.weights)[index * C * quads + i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    // P . Lambda, by blocks of 16 x 16: warp w the tokens from 16 (w % 4) on, warps 0 to 3 with the chunk before, the others
    // with the chunk itself.
    const int t0 = warp % 4 * 16, blocks = warp < 4 ? 4 : warp - 3;
    float qk[4][2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) clear(qk[i]);
    const Tile<1> with = warp < 4 ? lag_keys : keys;
    for (int from = 0; from < width; from += 16) {
        uint32_t a[1][4], b[1][4];
        load_a(queries, t0, from, a);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= blocks) break;
            load_b(with, i * 16, from, b);
            multiply<1, 1>(qk[i], a, b);
        }
    }
    uint4* const pairs = reinterpret_cast<uint4*>(p.pairs) +
                         (index * PAIR_BLOCKS + warp % 4 * 4 + t0 / 16 * (t0 / 16 + 1) / 2 + (warp < 4 ? 0 : 4)) * 32 + lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i >= blocks) break;
        uint32_t operand[4];
        int n = 0;
        each_pair(qk[i], [&](int r, int column, float x0, float x1) {
            const int t = t0 + r, s = i * 16 + column;
            const float* const at = base(t);
            float y[2] = {x0, x1};
            if (warp < 4) {
#pragma unroll
                for (int m = 0; m < 2; m++)
                    y[m] = lagged && t < len ? y[m] * row_factor[t] * plan->value_factor[s + m] *
                                                   at[way * items.of_slot(t, lag_slot[s + m])]
                                             : 0.0f;
            } else {
                const float factor = q_factor[t];
                const Gamma own = gamma[t];
#pragma unroll
                for (int m = 0; m < 2; m++)
                    y[m] = t < len && s + m <= t ? y[m] * factor * k_factor[s + m] * exp2_approx(minus(own, gamma[s + m])) *
                                                       at[way * items.of_token(t, s + m)]
                                                 : 0.0f;
            }
            operand[n++] = pack_bf16(y[0], y[1]);
        });
        pairs[i * 32] = make_uint4(operand[0], operand[1], operand[2], operand[3]);
    }

    // The plan.
    const Gamma total = gamma[C - 1];
    if (warp == 4) {
        // Entry slots that have a state.
        const int held = first_from(starts, entry, before);
        int changes = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half;
            const bool present = i < exit_len;
            const int32_t start = present ? exit_starts[i] : NEVER, end = i + 1 < exit_len ? exit_starts[i + 1] : NEVER;
            const auto among = [&](int64_t from) {
                const auto inside = [&](int32_t x) { return static_cast<uint8_t>(x <= from ? 0 : x - from < C ? x - from : C); };
                return Exits::Range{inside(start), inside(end)};
            };
            int from = first_from(starts, entry, start), to = first_from(starts, entry, end);
            if (from > held) from = held;
            if (to > held) to = held;
            const Exits::Range tokens = lagged ? among(before) : Exits::Range{0, 0};
            const bool written = tokens.from < tokens.to;
            // Of the state that the exit slot then has.
            const float log = written || to == from ? 0.0f : behind[to - 1];
            const bool changed = present && (written || to - from > 1);
            if (changed) {
                for (int j = from; j < to; j++) plan->factor[j] = exp2_approx(behind[j] - log);
            }
            const uint32_t all = __ballot_sync(ALL, changed);
            if (changed) {
                SlotChange& change = plan->changed[changes + __popc(all & ((1u << lane) - 1))];
                // Of a thread's tokens in one byte those below `bound`.
                const auto below = [](int bound, int least) {
                    const int count = bound - least + 7 < 0 ? 0 : (bound - least + 7) / 8;
                    return 0xff00 >> (count < 8 ? count : 8) & 0xff;
                };
                int steps = 0;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const int even = below(tokens.to, 2 * n) & ~below(tokens.from, 2 * n);
                    const int odd = below(tokens.to, 2 * n + 1) & ~below(tokens.from, 2 * n + 1);
                    change.tokens[n] = even | odd << 8;
                    if (tokens.from < 16 * n + 16 && tokens.to > 16 * n) steps |= 1 << n;
                }
                change.place = exit_place[i], change.steps = steps, change.entries = to - from, change.first = from;
                if (from < to) change.entry_place = plan->entry_place[from], change.factor = plan->factor[from];
            }
            changes += __popc(all);
            const bool state = present && (written || to > from);
            const Exits::Range own = among(first);
            plan->exit_place[i] = state ? exit_place[i] : 255;
            plan->exit_factor[i] = state ? exp2_approx(log + value(total)) : 0.0f;
            plan->exit_from[i] = present ? own.from : 0;
            plan->exit_to[i] = present ? own.to : 0;
        }
        if (lane < 3) plan->reserved[lane] = plan->reserved_too[lane] = 0;
        if (lane == 0) plan->changes = changes, plan->exit_len = exit_len;
    } else if (warp == 5) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = lane + 32 * half;
            plan->exit_value_factor[t] = t < len ? k_factor[t] * exp2_approx(minus(total, gamma[t])) : 0.0f;
        }
    }
    __syncthreads();
    constexpr int UNITS = sizeof(ChunkPlan) / 16, REST = offsetof(ChunkPlan, exit_len) / 16;
    const int used = static_cast<int>(offsetof(ChunkPlan, changed) + p.slots * sizeof(SlotChange)) / 16;
    for (int i = thread; i < UNITS; i += THREADS)
        if (i < used || (last && i >= REST)) reinterpret_cast<uint4*>(p.plans + index)[i] = reinterpret_cast<const uint4*>(plan)[i];
}

// g -> its sums before every chunk. One block a row, a thread 8 tokens.
DEVICE void gammas_sm90(const GammasSm90Params& p) {
    constexpr int C = Bf16::CHUNK, EACH = 8, BLOCK = GAMMAS_THREADS, WARPS_HERE = BLOCK / 32, AT_ONCE = BLOCK * EACH / C;
    static_assert(WARPS_HERE == 32);
    const Extents& e = p.extents;
    const Row row = row_of(e, blockIdx.x / e.value_heads, static_cast<int>(blockIdx.x % e.value_heads));
    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    Carve carve{dynamic_shared()};
    double* const sums = carve.take<double>(2 * WARPS_HERE);
    carve.check();
    const int64_t chunks = (row.len + C - 1) / C;
    double* const out = p.gammas + first_chunk(row, C) * e.value_heads + row.head;
    double carry = 0;
    for (int64_t from = 0, n = 0; from < chunks; from += AT_ONCE, n++) {
        const int64_t first = from * C + thread * EACH;
        double own = 0;
        if (p.g) {
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (first + i < row.len) own += fmaxf(p.g[row.at(first + i)], LEAST_G);
        }
        double sum = own;
        const auto scan = [&](double& x) {
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const double below = __shfl_up_sync(ALL, x, by);
                if (lane >= by) x += below;
            }
        };
        scan(sum);
        double* const here = sums + n % 2 * WARPS_HERE;
        if (lane == 31) here[warp] = sum;
        __syncthreads();
        double warps = here[lane];
        scan(warps);
        const double below = __shfl_sync(ALL, warps, warp == 0 ? 0 : warp - 1);
        const int64_t chunk = from + thread / (C / EACH);
        if (thread % (C / EACH) == 0 && chunk < chunks)
            out[chunk * e.value_heads] = carry + (warp == 0 ? 0 : below) + (sum - own);
        carry += __shfl_sync(ALL, warps, 31);
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

KERNEL BLOCK_OF(dla::GAMMAS_THREADS) gammas_sm90(const __grid_constant__ dla::GammasSm90Params p) { dla::gammas_sm90(p); }
KERNEL BLOCKS_OF(dla::THREADS, 3) prepare_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90(p); }
KERNEL BLOCK_OF(dla::THREADS) prepare_delta_sm90_bf16(const __grid_constant__ dla::PrepareDeltaSm90Params p) {
    dla::prepare_delta_sm90(p);
}
