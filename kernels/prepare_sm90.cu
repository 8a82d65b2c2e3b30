// prepare on Hopper, bf16: what the scan takes of a chunk that is the same for all its slices of dv (OPERATOR.md,
// section 4), gated:
//
//   P . Lambda,  P_ts = scale e^{Gamma_t - Gamma_s} q_t . k_s,  Lambda_ts = lambda_t[slot_t(s)], s in the chunk or the one before
//   w_t[j] = scale lambda_t[pi_t(j)] e^{Gamma_t + log decay of slot j's state until the chunk}
//   and which states change, of what (ChunkPlan, abi.cuh). Gamma at chunks' entries by gammas_sm90, before.
//
// One block of 256 threads per chunk of 64 tokens and value head (grid: abi.cuh; a place without a chunk returns at
// once). P . Lambda leaves as the left operands of the scan's products (a product's fragments are those of the next
// one's left operand), the weights in the order in which a thread of the scan reads them.
//
// Shared memory: 15,552 bytes + 384 (dk + 8) + 256 M; at dk = 128, M = 30 three blocks a multiprocessor. Floor: bytes; at
// S3 0.27 GB of q and k, 63 MB of lambda, 190 MB written: 0.17 ms; measured 0.36 on an H100 (and gammas_sm90 0.03), half its
// issue slots busy. Numerics: sums in f32, P . Lambda rounded once to bf16, the weights f32, decays 2^x approximate.
//
// Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): 69, gammas 48.

#include "common/chunk.cuh"

namespace dla {
namespace {

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
template <bool EXCHANGED>
DEVICE void copy_rows(const Tile<1>& tile, const Bf16* from, const Row& row, int64_t first, int live, int dk) {
    constexpr int C = Bf16::CHUNK;
    const auto at = [&](int64_t t) { return EXCHANGED ? row.at(t) : row.key_at(t); };
    const int units = padded(dk) / 8, shift = units <= 8 ? 3 : units <= 16 ? 4 : 5;
    const int unit = threadIdx.x & ((1 << shift) - 1), rows = THREADS >> shift;
    if (unit >= units) return;
    for (int t = threadIdx.x >> shift; t < C; t += rows) {
        const bool inside = t < live && unit * 8 < dk;
        copy_async_16(tile.data + t * tile.stride + unit * 8,
                      from + at(first + (inside ? t : 0)) * dk + (inside ? unit * 8 : 0), inside);
    }
}

// A chunk's tokens are written a chunk late (scan_sm90.cu). So at its entry the states hold the tokens before the
// chunk before: those of entry slots that start there, a prefix of them. What is before the chunk and not in a state, the
// chunk before, is read as tokens. All from where slots start, so that chunks know nothing of each other.
// EXCHANGED: for scan_queries_sm90, where q is do, k is v, and v is k with its norm factor.
template <bool EXCHANGED>
DEVICE void prepare_sm90(const PrepareSm90Params& p) {
    constexpr int C = Bf16::CHUNK;
    constexpr int32_t NEVER = 0x7fffffff;
    const Extents& e = p.extents;
    const Chunk chunk = EXCHANGED ? chunk_of_backward(p) : chunk_of(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, entered = chunk.place * e.value_heads + row.head;
    const int64_t index = chunk.kept * e.value_heads + row.head;
    const int len = chunk.len, dk = EXCHANGED ? e.dv : e.dk, width = padded(dk), capacity = e.capacity;
    const bool reads = !EXCHANGED || p.pairs;  // else the plan is all that is wanted
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

    if (reads) {
        copy_rows<EXCHANGED>(queries, q, row, first, len, dk);
        copy_rows<EXCHANGED>(keys, k, row, first, len, dk);
        copy_rows<EXCHANGED>(lag_keys, k, row, before, lagged ? C : 0, dk);
    }
    for (int t = warp; t < len && reads; t += WARPS) {
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
            const Bf16* const normed = EXCHANGED ? static_cast<const Bf16*>(p.normed) : k;
            const float qf = EXCHANGED ? 1.0f : norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, true);
            const float kf = norm_factor(live ? normed + row.key_at(first + t) * e.dk : nullptr, e.dk, true);
            const float lf = norm_factor(lagged ? normed + row.key_at(before + t) * e.dk : nullptr, e.dk, true);
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
    for (int i = thread; i < C * quads && reads; i += THREADS) {
        const int g = i % 8, half = i / 8 % 2, quad = i / 16 & (quads - 1), t = (i >> (4 + shift)) * 16 + half * 8 + g;
        float x[4] = {};
        uint32_t now = ~0u;  // slots that the four are in
        if (t < len) {
            const float factor = row_factor[t];
            const float* const at = base(t);
            const uint32_t slots = reinterpret_cast<const uint32_t*>(slot_at)[quad];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int slot = slots >> 8 * n & 0xff;
                if (slot == 255) continue;
                const int at_t = items.of_slot(t, slot);
                x[n] = factor * decay[slot] * at[way * at_t];
                if (EXCHANGED) now ^= static_cast<uint32_t>(at_t ^ 0xff) << 8 * n;
            }
        }
        reinterpret_cast<float4*>(p.weights)[index * C * quads + i] = make_float4(x[0], x[1], x[2], x[3]);
        if (EXCHANGED) reinterpret_cast<uint32_t*>(p.slot_of)[(index * C + t) * quads + quad] = now;
    }
    if (EXCHANGED && thread < p.slots)
        p.entry_factor[index * p.slots + thread] = slot_at[thread] == 255 ? 0.0f : decay[slot_at[thread]];

    // P . Lambda, by blocks of 16 x 16: warp w the tokens from 16 (w % 4) on, warps 0 to 3 with the chunk before, the others
    // with the chunk itself.
    const int t0 = warp % 4 * 16, blocks = !reads ? 0 : warp < 4 ? 4 : warp - 3;
    float qk[4][2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) clear(qk[i]);
    const Tile<1> with = warp < 4 ? lag_keys : keys;
    for (int from = 0; from < width && reads; from += 16) {
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

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(dla::GAMMAS_THREADS) gammas_sm90(const __grid_constant__ dla::GammasSm90Params p) { dla::gammas_sm90(p); }
KERNEL BLOCKS_OF(dla::THREADS, 3) prepare_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90<false>(p); }
KERNEL BLOCKS_OF(dla::THREADS, 3) prepare_queries_sm90_bf16(const __grid_constant__ dla::PrepareSm90Params p) { dla::prepare_sm90<true>(p); }
