// prepare_backward on Hopper, gated, bf16: what the reverse scan takes of a chunk that is the same for all its slices, and the
// gradients by way of the pairs of tokens that the chunk reads (OPERATOR.md, section 4). As the scan writes tokens a chunk
// late, these are tokens s of the chunk and of the chunk before:
//
//   P_ts = scale D_ts q_t . k_s,  P'_ts = scale D_ts do_t . v_s,  D_ts = e^{Gamma_t - Gamma_s},  Lambda_ts = lambda_t[slot_t(s)]
//   (P . Lambda)^T for dV, (P' . Lambda)^T for dK
//   w_t[j] = scale lambda_t[pi_t(j)] e^{Gamma_t}, 0 for slots without a token older than these
//   dlambda_t[i] = sum over s in slot i at t of (do_t . v_s) P_ts
//   dg_u = sum over s < u <= t of (do_t . v_s) P_ts Lambda_ts
//   and which slots merge, which tokens end where (BackwardPlan, abi.cuh).
//
// One block of 256 threads per chunk of 64 tokens and value head (grid: abi.cuh; a place without a chunk returns at once).
// K Q^T and V dO^T by mma, 26 blocks of 16 x 16 of either: tokens s are rows, for then a product's fragments are those of the
// transposed pairs as left operands.
//
// Shared memory: 20,928 bytes + 512 M and 384 (D + 8) or 33,792, whichever is more; D = max(dk, dv) to 16. Registers a thread (nvcc
// 13.0.88, sm_90a, no spills, no stack): 128, two blocks a multiprocessor.
// Floor: bytes; at dk = dv = 128 it reads 48 KB of q and k and as much of v and do a chunk and head (a third from L2: two chunks
// read each k and v) and writes 44 KB: at S3 0.54 + 0.36 GB, 0.3 ms. Measured on an H100 under a profiler, 8,192 tokens and 16
// heads (a quarter of S3): 0.27 ms, before loads were moved ahead of the first barrier; not timed since.
// Numerics: sums in f32, pairs rounded once to bf16, all else f32. dg by prefix sums over 128 tokens at most, never over a
// sequence, for it would be what is left of terms far larger than itself.

#include "common/chunk.cuh"
#include "common/hopper.cuh"

namespace dla {
namespace {

DEVICE void prepare_backward_sm90(const PrepareBackwardSm90Params& p) {
    constexpr int C = Bf16::CHUNK, CROSS = 16, BLOCKS = 26, MINE = 4;
    constexpr int SLOTS_PITCH = 2 * C + 4;        // bytes: rows of the table of slots in different banks
    constexpr int PART = 2 * C / 4, PITCH = 2 * C + 4;  // of y: four threads a row, in banks of their own
    constexpr uint8_t NONE = 255;
    const Extents& e = p.extents;
    const Chunk chunk = chunk_of_backward(p);
    if (chunk.len == 0) return;
    const Row& row = chunk.row;
    const int64_t first = chunk.first, entered = chunk.place * e.value_heads + row.head;
    const int64_t index = chunk.kept * e.value_heads + row.head;
    const bool follows = first > 0;  // there is a chunk before
    const int len = chunk.len, dk = e.dk, dv = e.dv, capacity = e.capacity;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const Bf16* const q = static_cast<const Bf16*>(p.q);
    const Bf16* const k = static_cast<const Bf16*>(p.k);
    const Bf16* const v = static_cast<const Bf16*>(p.v);
    const Bf16* const d_o = static_cast<const Bf16*>(p.d_o);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    Gamma* const gamma_before = carve.take<Gamma>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(2 * C);             // of the chunk before, then of its own, as all of 2 C
    uint8_t* const entry_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const exit_place = carve.take<uint8_t>(MOST_SLOTS);
    uint8_t* const slot_at = carve.take<uint8_t>(MOST_SLOTS);     // entry slot at a place, if it is in the bank
    uint8_t* const slot_before = carve.take<uint8_t>(C);          // entry slot of a token of the chunk before
    int* const starts = carve.take<int>(MOST_SLOTS);
    float* const read_factor = carve.take<float>(C);              // scale e^{Gamma_t}, times the query's norm factor
    uint8_t* const slots = carve.take<uint8_t>(C * SLOTS_PITCH);  // slot at t of token s of 2 C
    BackwardPlan* const plan = carve.take<BackwardPlan>(1);
    float* const lambda = carve.take<float>(C * capacity);
    float* const d_weights = carve.take<float>(C * capacity);
    // The operands, then the products (do_t . v_s) P_ts.
    const int wide = padded(dk > dv ? dk : dv);
    unsigned char* const reused = carve.next;
    const Tile<1> reads = carve.tile<1>(C, wide), written = carve.tile<1>(2 * C, wide);
    unsigned char* const end_of_tiles = carve.next;
    carve.next = reused;
    float* const y = carve.take<float>(C * PITCH);  // [C][PITCH]: token t, then s, s / PART further on
    if (carve.next < end_of_tiles) carve.next = end_of_tiles;
    carve.check();

    const int entry = static_cast<int>(p.chunk_len[entered]);
    const int bank_end = follows ? static_cast<int>(first - C) : 0;  // tokens before it are in the bank
    if (thread < MOST_SLOTS) slot_at[thread] = NONE;
    // Rows of q or do, and of k or v from the chunk before on: 16 bytes at a time, zeros where there are none.
    const auto bring = [&](int width, const Bf16* read_from, const Bf16* written_from, int64_t step) {
        const int units = padded(width) / 8;
        for (int unit = lane / 4; unit < units; unit += 8) {
            const int column = unit * 8, from = column < width ? column : 0;
#pragma unroll
            for (int i = 0; i < 3 * C / (4 * WARPS); i++) {
                const int r = i * 4 * WARPS + warp * 4 + lane % 4;
                if (i < C / (4 * WARPS)) {
                    const bool live = r < len;
                    copy_async_16(reads.data + r * reads.stride + column, read_from + (live ? r * step : 0) + from, live && column < width);
                } else {
                    const int t = r - 2 * C;  // of the chunk
                    const bool live = t < 0 ? follows : t < len;
                    copy_async_16(written.data + (r - C) * written.stride + column, written_from + (live ? t * step : 0) + from,
                                  live && column < width);
                }
            }
        }
    };
    bring(dk, q + row.key_at(first) * dk, k + row.key_at(first) * dk, static_cast<int64_t>(e.heads) * dk);
    if (p.qk_l2norm) {
        for (int s = warp; s < 3 * C; s += WARPS) {
            const bool live = s < C ? s < len : s < 2 * C ? follows : s - 2 * C < len;
            const Bf16* const of = s < C ? q + row.key_at(first + s) * dk : k + row.key_at(first + s - 2 * C) * dk;
            const float factor = norm_factor(live ? of : nullptr, dk, true);
            if (lane == 0) (s < C ? q_factor[s] : k_factor[s - C]) = factor;
        }
    } else {
        if (thread < C) q_factor[thread] = 1;
        else if (thread < 3 * C) k_factor[thread - C] = 1;
    }
    if (thread < len) prefetch_line(p.events + row.at(first + thread));
    {
        float x[C / WARPS];
#pragma unroll
        for (int i = 0; i < C / WARPS; i++) {
            const int t = i * WARPS + warp;
            x[i] = lane < capacity && t < len ? p.lambda[row.at(first + t) * p.lambda_columns + lane] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < C / WARPS; i++)
            if (lane < capacity) lambda[(i * WARPS + warp) * capacity + lane] = x[i];
    }
    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
    if (warp == 1 && follows) load_gamma(p.g, row, first - C, C, C, gamma_before);
    const bool held = thread < entry;
    int start = 0, place = 0;
    if (held) start = p.chunk_starts[entered * capacity + thread], place = p.chunk_place[entered * capacity + thread];
    if (thread < MOST_SLOTS) starts[thread] = start;
    __syncthreads();
    if (thread < MOST_SLOTS) {
        entry_place[thread] = place;
        if (held && starts[thread] < bank_end) slot_at[place] = thread;
    } else if (thread < MOST_SLOTS + C) {
        // The last slot that starts there or before.
        const int s = thread - MOST_SLOTS, token = static_cast<int>(first) - C + s;
        int low = 0, high = entry;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (starts[middle] <= token) low = middle + 1;
            else high = middle;
        }
        slot_before[s] = low > 0 ? low - 1 : 0;
    }
    replay.run(p.events, row, first, len, entry);
    exits.find(replay, len, entry);
    const int exit_len = replay.len[len - 1];
    const auto weight_of = [&](int t, int slot) { return lambda[t * capacity + column_of(e, slot, replay.len[t])]; };
#pragma unroll
    for (int i = 0; i < C * C / 4 / THREADS; i++) {
        const int t = i * (THREADS / (C / 4)) + thread / (C / 4), s = thread % (C / 4) * 4;
        if (t >= len) continue;
        uint8_t* const to = slots + t * SLOTS_PITCH + s;
        // Of tokens after t anything.
        *reinterpret_cast<uint32_t*>(to + C) = *reinterpret_cast<const uint32_t*>(replay.place + t * replay.ITEMS + MOST_SLOTS + s);
        if (!follows) continue;
        const uint32_t before = *reinterpret_cast<const uint32_t*>(slot_before + s);
        uint32_t four = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) four |= static_cast<uint32_t>(replay.of_slot(t, before >> 8 * n & 0xff)) << 8 * n;
        *reinterpret_cast<uint32_t*>(to) = four;
    }
    for (int i = thread; i < C * capacity; i += THREADS) d_weights[i] = 0;
    if (thread < C) read_factor[thread] = p.scale * q_factor[thread] * expf(value(gamma[thread]));
    const auto slot_of = [&](int t, int s) { return slots[t * SLOTS_PITCH + s]; };
    const auto y_at = [&](int t, int s) { return y + t * PITCH + s + s / PART; };

    // K Q^T and V dO^T, rows s of 2 C: block i of a warp is warp + i WARPS; those with the chunk before row by row, then its own
    // from the diagonal on.
    const auto own_row = [](int block) { return block < 4 ? 0 : block < 7 ? 1 : block < 9 ? 2 : 3; };
    const auto row_of_block = [&](int block) { return block < CROSS ? block / 4 * 16 : C + own_row(block - CROSS) * 16; };
    const auto column_of_block = [&](int block) {
        if (block < CROSS) return block % 4 * 16;
        const int own = own_row(block - CROSS);
        return (block - CROSS - (own == 0 ? 0 : own == 1 ? 3 : own == 2 ? 5 : 6)) * 16;
    };
    float kq[MINE][2][4], vd[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(kq[i]), clear(vd[i]);
    const auto products = [&](float (&c)[MINE][2][4], int width) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = warp + i * WARPS;
            if (block >= BLOCKS) continue;
            const int s0 = row_of_block(block), t0 = column_of_block(block);
#pragma unroll 4
            for (int from = 0; from < width; from += 16) {
                uint32_t a[1][4], b[1][4];
                load_a(written, s0, from, a);
                load_b(reads, t0, from, b);
                multiply<1, 1>(c[i], a, b);
            }
        }
    };
    copies_wait();
    __syncthreads();
    products(kq, dk);
    __syncthreads();
    bring(dv, d_o + row.at(first) * dv, v + row.at(first) * dv, static_cast<int64_t>(e.value_heads) * dv);
    copies_wait();
    __syncthreads();
    products(vd, dv);
    __syncthreads();

    const Gamma total_before = gamma_before[C - 1], total = gamma[C - 1];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = warp + i * WARPS;
        if (block >= BLOCKS) continue;
        const int s0 = row_of_block(block), t0 = column_of_block(block), g = lane / 4, c2 = lane % 4 * 2;
        uint32_t operand[2][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int s = s0 + g + n % 2 * 8, half = n / 2;
            float pairs[2][2] = {};
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int t = t0 + half * 8 + c2 + x;
                float product = 0;
                if (t < len && (s < C ? follows : s - C <= t)) {
                    const float log = s < C ? value(gamma[t]) + minus(total_before, gamma_before[s]) : minus(gamma[t], gamma[s - C]);
                    const float factor = p.scale * q_factor[t] * __expf(log), weight = weight_of(t, slot_of(t, s));
                    const float of_keys = kq[i][half][n % 2 * 2 + x] * factor * k_factor[s], of_values = vd[i][half][n % 2 * 2 + x];
                    pairs[0][x] = of_keys * weight;
                    pairs[1][x] = of_values * factor * weight;
                    product = of_values * of_keys;
                }
                *y_at(t, s) = product;
            }
            operand[0][n] = pack_bf16(pairs[0][0], pairs[0][1]);
            operand[1][n] = pack_bf16(pairs[1][0], pairs[1][1]);
        }
#pragma unroll
        for (int of = 0; of < 2; of++)
            reinterpret_cast<uint4*>(p.pairs)[((index * 2 + of) * BLOCKS + block) * 32 + lane] =
                make_uint4(operand[of][0], operand[of][1], operand[of][2], operand[of][3]);
    }

    // The weights, four tokens at a time.
    for (int i = thread; i < p.slots * C / 4; i += THREADS) {
        const int c = i % 4, step = i / 4 % 4, slot = slot_at[i / 16];
        float x[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int t = step * 16 + c * 2 + n % 2 + n / 2 * 8;
            x[n] = slot == NONE || t >= len
                       ? 0.0f
                       : read_factor[t] * weight_of(t, replay.of_slot(t, slot));
        }
        reinterpret_cast<float4*>(p.weights)[index * p.slots * (C / 4) + i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    // The plan; lane i has entry slot, exit slot or place i, tokens i and i + 32.
    if (warp == WARPS - 1) exit_places(replay, exits, len, entry, entry_place, exit_place);
    __syncthreads();
    if (warp == 0) {
        const auto before = [&](uint32_t slots, int slot) { return __popc(slots & ((1u << slot) - 1)); };
        const auto in_bank = [&](int slot) { return starts[slot] < bank_end; };
        const Exits::Range entries = exits.entries[lane], tokens = exits.tokens[lane];
        const bool held = lane < exit_len;
        const int place = exit_place[lane];
        // Slots of the bank come first, so the others that merge into an exit slot are no matter.
        const uint32_t copied = __ballot_sync(ALL, held && entries.from + 1 < entries.to && in_bank(entries.from + 1));
        uint32_t tokens_in = 0;
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (follows) tokens_in |= 1u << replay.of_slot(len - 1, slot_before[lane + 32 * half]);
        const uint32_t published = __reduce_or_sync(ALL, tokens_in);
        const uint32_t last_published = __ballot_sync(ALL, held && tokens.from < tokens.to);
        plan->slots[lane] = {NONE, NONE, NONE, NONE};
        plan->exit_place[lane] = held ? place : 0;
        __syncwarp();
        if (held && (copied >> lane & 1)) plan->slots[place].copied = before(copied, lane);
        if (held && (published >> lane & 1)) plan->slots[place].published = before(published, lane);
        if (held && (last_published >> lane & 1)) plan->slots[place].last_published = before(last_published, lane);
        if (lane < entry && in_bank(lane)) {
            const int exit = replay.of_slot(len - 1, lane);
            if (exits.entries[exit].from != lane) plan->slots[entry_place[lane]].copy_of = before(copied, exit);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int s = lane + 32 * half, last = s < len ? s : len - 1;
            plan->number[s] = follows ? before(published, replay.of_slot(len - 1, slot_before[s])) : 0;
            const float decay = follows ? expf(minus(total_before, gamma_before[s])) : 0.0f;
            plan->factor[0][s] = decay * k_factor[s], plan->factor[1][s] = decay;
            plan->last_number[s] = before(last_published, replay.of_token(len - 1, last));
            const float last_decay = s < len ? expf(minus(total, gamma[s])) : 0.0f;
            plan->last_factor[0][s] = last_decay * k_factor[C + s], plan->last_factor[1][s] = last_decay;
        }
        if (lane < 2) plan->reserved[lane] = 0;
        if (lane < 3) plan->reserved_too[lane] = 0;
        if (lane == 0) plan->copies = __popc(copied), plan->decay = expf(value(total)), plan->exit_len = exit_len;
        __syncwarp();
        for (int i = lane; i < static_cast<int>(sizeof(BackwardPlan) / 16); i += 32)
            reinterpret_cast<uint4*>(p.plans + index)[i] = reinterpret_cast<const uint4*>(plan)[i];
    }

    // Four threads a row: dlambda, a slot's tokens being neighbours, and for dg sums over s < u in the row.
    {
        const int t = thread / 4, part = thread % 4, begin = part * PART;
        const int from = begin < C && !follows ? C : begin, until = C + t + 1 < begin + PART ? C + t + 1 : begin + PART;
        const int end = t < len && until > from ? until : from;
        float* const at = y_at(t, begin) - begin;
        int slot = -1, first_slot = -1;
        float sum = 0, first_sum = 0, total = 0, weight = 0;
        const auto leave = [&] {
            if (slot < 0) return;
            if (first_slot < 0) first_slot = slot, first_sum = sum;
            else d_weights[t * capacity + slot] = sum;
        };
        for (int s = from; s < end; s++) {
            const int now = slot_of(t, s);
            if (now != slot) {
                leave();
                slot = now, sum = 0, weight = weight_of(t, now);
            }
            sum += at[s];
            const float x = at[s] * weight;
            at[s] = x;
            total += x;
        }
        leave();
        // A thread's first slot may be the one before's last.
        float running = 0;
#pragma unroll
        for (int other = 0; other < 4; other++) {
            __syncwarp();
            if (part == other && first_slot >= 0) d_weights[t * capacity + first_slot] += first_sum;
            const float x = __shfl_sync(ALL, total, lane / 4 * 4 + other);
            if (part > other) running += x;
        }
#pragma unroll 4
        for (int s = begin; s < begin + PART; s++) {
            const float x = s >= from && s < end ? at[s] : 0.0f;
            at[s] = running;
            running += x;
        }
    }
    __syncthreads();
    for (int i = thread; i < len * capacity; i += THREADS) p.d_weights[index * C * capacity + i] = d_weights[i];
    float* const other_half = k_factor;  // no longer read
    const int u = thread % (2 * C), half = thread / (2 * C), begin = half * (C / 2);
    float sum = 0;
    for (int t = begin; t < begin + C / 2 && t < len; t++)
        if (C + t >= u) sum += *y_at(t, u);
    if (half == 1) other_half[u] = sum;
    __syncthreads();
    if (half == 0) p.d_g[index * 2 * C + u] = sum + other_half[u];
}

}  // namespace
}  // namespace dla

KERNEL BLOCKS_OF(dla::THREADS, 2) prepare_backward_sm90_bf16(const __grid_constant__ dla::PrepareBackwardSm90Params p) {
    dla::prepare_backward_sm90(p);
}
