// route_backward: the adjoint of routed reads (OPERATOR.md, section 6), given that of lambda by slot. With lambda = sigmoid(x),
// u = dlambda lambda (1 - lambda), s = q . kappa, n the slot's tokens, e = slope u / n and E_tj = e_t[pi_t(j)],
// E_ts = e_t[slot_t(s)]:
//
//   dlogits = u;  dslope += u s;  dbias += u
//   dQ += E_j K_j + E_s K;  dK += E_s^T Q + dK'_{e(s)};  dK_j = dK'_{e(j)} + E_j^T Q
//
// route_backward: one block of 256 threads per chunk of the window and value head. Key sums K_j of the slots held at the
// chunk's entry as in route.cu, from prefix sums; scores Q [K_j | K]^T, folded by the replayed log, so that
// lambda (1 - lambda) has its digits where lambda is near 1; then E and its products. It leaves E_j^T Q and where every
// entry slot and token ends.
// route_backward_keys: one block per row and 32 columns of dk carries dK_j through the window's chunks in reverse: a
// gather and a sum a chunk, and adds dK'_{e(s)} to dK.
//
// Numerics: q, k in their planes, K_j and E in two; sums in f32, those of slope and bias in f64 by the chunk (head_sums adds
// them up). Factors of qk_l2norm are multiplied into E and out of the results.
//
// Shared memory: route_backward 98,912 bytes at most (bf16, M = 64); route_backward_keys 256 M + 128 bytes.
// Registers: at the end of the file.

#include "common/key_sums.cuh"
#include "common/window.cuh"

namespace dla {
namespace {

constexpr int KEY_COLUMNS = 32;

DEVICE double warp_sum_f64(double x) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(ALL, x, by);
    return x;
}

template <typename T>
DEVICE void route_backward(const RouteBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BEGINS = MOST_SLOTS + 1, ROWS = C / 16;
    const Extents& e = p.extents;
    const int dk = e.dk, capacity = e.capacity, slots = padded(capacity), pitch = slots + C + 1, slot_pitch = slots + 1;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    const int len = chunk.len;
    if (len == 0) return;
    const Row row = chunk.row;
    const int64_t first = chunk.first;
    const T* const q_rows = static_cast<const T*>(p.q) + row.key_at(first) * dk;
    const T* const k_rows = static_cast<const T*>(p.k) + row.key_at(first) * dk;
    const int64_t stride = static_cast<int64_t>(e.heads) * dk;
    const int m = p.chunk_len[chunk.place];

    // Items are the slots held at the chunk's entry, columns 0..m, and its tokens, from column `slots` on.
    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    int* const starts = carve.take<int>(MOST_SLOTS + 1);               // where the slots held at the entry start
    int64_t* const before = carve.take<int64_t>(MOST_SLOTS + C + 1);   // tokens from token 0 on to an item
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    double* const totals = carve.take<double>(2 * WARPS);
    const Tile<2> weights = carve.tile<2>(C, slots + C);               // E
    // A slice of the operands; between the products scores, sums by slot (then e) and where slots begin.
    Carve between = carve;
    const Tile<PARTS> queries = carve.tile<PARTS>(C, SLICE);
    const Tile<2> bank = carve.tile<2>(slots, SLICE);
    float* const partial = reinterpret_cast<float*>(carve.next);       // dead when the keys come
    Carve beside = carve;
    beside.take<float>((capacity + 1) * SLICE);
    const Tile<PARTS> keys = carve.tile<PARTS>(C, SLICE);
    float* const scores = between.take<float>(C * pitch);
    float* const of_slot = between.take<float>(C * slot_pitch);
    uint8_t* const begins = between.take<uint8_t>(C * BEGINS);         // item at which a slot starts, at token t
    carve.check(), beside.check(), between.check();

    if (thread < m) starts[thread] = p.chunk_starts[chunk.place * capacity + thread];
    if (thread == m) starts[m] = static_cast<int>(first);
    for (int t = warp; t < C; t += WARPS) {
        const float factor = norm_factor(t < len ? q_rows + t * stride : nullptr, dk, p.qk_l2norm);
        if (lane == 0) {
            q_factor[t] = factor;
            k_factor[t] = p.qk_l2norm && t < len ? p.key_factors[row.key_at(first + t)] : 1.0f;
        }
    }
    replay.run(p.events, row, first, len, m);
    for (int item = thread; item <= slots + len; item += THREADS) {
        int64_t tokens = first + item - slots;
        if (item < m && starts[item] >= 0) tokens = starts[item];
        if (item < m && starts[item] < 0) {
            const int64_t initial = row.index() * capacity + p.initial_len[row.index()];
            tokens = 0;
            for (int j = starts[item]; j < 0; j++) tokens -= p.initial_tokens[initial + j];
        }
        before[item] = tokens;
    }
    for (int i = thread; i < MOST_SLOTS + len; i += THREADS) {
        uint8_t* const to = p.exits + chunk.kept * (MOST_SLOTS + C) + i;
        if (i < m) *to = replay.of_slot(len - 1, i);
        if (i >= MOST_SLOTS) *to = replay.of_token(len - 1, i - MOST_SLOTS);
    }
    // Slices of Q, K_j and K. By the block; ends with a barrier.
    const auto load_operands = [&](int column) {
        __syncthreads();
        if (m > 0)
            key_sums<T>(p, row, starts, m, slots, column, SLICE, partial,
                        [&](int j, int group, const float (&x)[8]) { put8(bank, j, group * 8, x); });
        __syncthreads();
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            load_slice(queries, t, group, t < len ? q_rows + t * stride : nullptr, column, dk, 1.0f);
            load_slice(keys, t, group, t < len ? k_rows + t * stride : nullptr, column, dk, 1.0f);
        }
        __syncthreads();
    };

    // 1. Scores. A warp has 16 tokens and every SPLIT-th of the blocks of 16 columns, but none after its tokens.
    constexpr int SPLIT = WARPS / ROWS, MINE = (MOST_SLOTS / 16 + ROWS + SPLIT - 1) / SPLIT;
    const int tokens_of = warp % ROWS, share = warp / ROWS, slot_blocks = slots / 16;
    float c[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(c[i]);
    for (int column = 0; column < dk; column += SLICE) {
        load_operands(column);
        for (int from = 0; from < SLICE && column + from < dk; from += 16) {
            uint32_t a[PARTS][4];
            load_a(queries, tokens_of * 16, from, a);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const int block = share + i * SPLIT, n = block - slot_blocks;
                if (n < 0 && m > 0) {
                    uint32_t b[2][4];
                    load_b(bank, block * 16, from, b);
                    multiply<PARTS, 2>(c[i], a, b);
                } else if (n >= 0 && n <= tokens_of) {
                    uint32_t b[PARTS][4];
                    load_b(keys, n * 16, from, b);
                    multiply<PARTS, PARTS>(c[i], a, b);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = share + i * SPLIT;
        if (block - slot_blocks > tokens_of) continue;
        each_pair(c[i], [&](int r, int n, float x0, float x1) {
            const int t = tokens_of * 16 + r, s = block * 16 + n - slots;
            float* to = scores + t * pitch + block * 16 + n;
            to[0] = x0 * q_factor[t] * (s < 0 ? 1.0f : k_factor[s]);
            to[1] = x1 * q_factor[t] * (s < 0 ? 1.0f : k_factor[s + 1]);
        });
    }
    // Where slots begin: at an item whose slot the item before does not share.
    for (int i = thread; i < len * (slots + C); i += THREADS) {
        const int t = i / (slots + C), item = i % (slots + C), s = item - slots;
        if ((s < 0 && item >= m) || s > t) continue;
        const int slot = s < 0 ? replay.of_slot(t, item) : replay.of_token(t, s);
        int other = -1;
        if (s < 0 && item > 0) other = replay.of_slot(t, item - 1);
        if (s == 0 && m > 0) other = replay.of_slot(t, m - 1);
        if (s > 0) other = replay.of_token(t, s - 1);
        if (other != slot) begins[t * BEGINS + slot] = item;
        if (s == t) begins[t * BEGINS + slot + 1] = item + 1;
    }
    __syncthreads();

    // 2. u, and e in the place of the sums by slot.
    const float slope = p.slope[row.head], bias = p.bias[row.head];
    const int columns = p.dlogits ? p.logit_columns : capacity;
    double slope_sum = 0, bias_sum = 0;
    for (int i = thread; i < len * columns; i += THREADS) {
        const int t = i / columns, column = i % columns, held = replay.len[t];
        const int64_t at = row.at(first + t) * p.logit_columns + column;
        float u = 0;
        if (column < held) {
            const int slot = column_of(e, column, held);
            const int from = begins[t * BEGINS + slot], end = begins[t * BEGINS + slot + 1];
            float score = 0;
            for (int item = from; item < end && item < m; item++) score += scores[t * pitch + item];
            for (int item = from > slots ? from : slots; item < end; item++) score += scores[t * pitch + item];
            const int64_t many = before[end] - before[from];
            const float tokens = __uint2float_rn(many > 0xffffffffll ? 0xffffffffu : static_cast<uint32_t>(many));
            score /= tokens;
            const float x = slope * score + bias + (p.logits ? p.logits[at] : 0.0f);
            const float tail = expf(-fabsf(x)), over = 1.0f / (1.0f + tail);
            u = p.d_slots[(chunk.kept * C + t) * capacity + slot] * (tail * over * over);
            slope_sum += static_cast<double>(u) * score;
            bias_sum += u;
            of_slot[t * slot_pitch + slot] = slope * u / tokens;
        }
        if (p.dlogits) p.dlogits[at] = u;
    }
    slope_sum = warp_sum_f64(slope_sum), bias_sum = warp_sum_f64(bias_sum);
    if (lane == 0) totals[warp] = slope_sum, totals[WARPS + warp] = bias_sum;
    __syncthreads();
    if (thread == 0) {
        slope_sum = bias_sum = 0;
        for (int w = 0; w < WARPS; w++) slope_sum += totals[w], bias_sum += totals[WARPS + w];
        p.slope_sums[chunk.place] = slope_sum;
        p.bias_sums[chunk.place] = bias_sum;
    }

    // 3. E, with both factors of qk_l2norm.
    for (int i = thread; i < C * (slots + C) / 2; i += THREADS) {
        const int t = i / ((slots + C) / 2), item = i % ((slots + C) / 2) * 2;
        float x[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int s = item + n - slots;
            x[n] = 0;
            if (t >= len || s > t || (s < 0 && item + n >= m)) continue;
            const int slot = s < 0 ? replay.of_slot(t, item + n) : replay.of_token(t, s);
            x[n] = of_slot[t * slot_pitch + slot] * q_factor[t] * (s < 0 ? 1.0f : k_factor[s]);
        }
        put2(weights, t, item, x[0], x[1]);
    }

    // 4. Products, slice by slice: blocks of dQ and dK, then of E_j^T Q.
    float* const dq_out = p.d_q + chunk.kept * C * dk;
    float* const dk_out = p.d_k + chunk.kept * C * dk;
    float* const bank_out = p.d_bank + chunk.kept * capacity * dk;
    for (int column = 0; column < dk; column += SLICE) {
        load_operands(column);
        for (int block = warp; block < (ROWS + slot_blocks) * (SLICE / 16); block += WARPS) {
            const int r0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
            if (column + d0 >= dk) continue;
            if (r0 >= C) {
                if (r0 - C >= m) continue;
                float sum[2][4];
                clear(sum);
                for (int from = 0; from < C; from += 16) {
                    uint32_t a[2][4], b[PARTS][4];
                    load_a_trans(weights, r0 - C, from, a);
                    load_b_trans(queries, d0, from, b);
                    multiply<2, PARTS>(sum, a, b);
                }
                each_pair(sum, [&](int r, int n, float x0, float x1) {
                    const int j = r0 - C + r, d = column + d0 + n;
                    if (j < m && d < dk) *reinterpret_cast<float2*>(bank_out + j * dk + d) = make_float2(x0, x1);
                });
                continue;
            }
            float by_keys[2][4], by_queries[2][4];
            clear(by_keys), clear(by_queries);
            for (int from = 0; from < slots && from < m; from += 16) {
                uint32_t a[2][4], b[2][4];
                load_a(weights, r0, from, a);
                load_b_trans(bank, d0, from, b);
                multiply<2, 2>(by_keys, a, b);
            }
            for (int from = 0; from < C; from += 16) {
                uint32_t a[2][4], b[PARTS][4];
                if (from <= r0) {
                    load_a(weights, r0, slots + from, a);
                    load_b_trans(keys, d0, from, b);
                    multiply<2, PARTS>(by_keys, a, b);
                }
                if (from >= r0) {
                    load_a_trans(weights, slots + r0, from, a);
                    load_b_trans(queries, d0, from, b);
                    multiply<2, PARTS>(by_queries, a, b);
                }
            }
            const auto add = [&](float* out, const float (&c)[2][4], const float* factor) {
                each_pair(c, [&](int r, int n, float x0, float x1) {
                    const int t = r0 + r, d = column + d0 + n;
                    if (t >= len || d >= dk) return;
                    float2* const to = reinterpret_cast<float2*>(out + t * dk + d);
                    float2 x = *to;
                    x.x += x0 / factor[t], x.y += x1 / factor[t];
                    *to = x;
                });
            };
            add(dq_out, by_keys, q_factor);
            add(dk_out, by_queries, k_factor);
        }
    }
}

template <typename T>
DEVICE void route_backward_keys(const RouteBackwardParams& p) {
    constexpr int C = T::CHUNK, ITEMS = MOST_SLOTS + C, ROWS = THREADS / KEY_COLUMNS;
    const Extents& e = p.extents;
    const int dk = e.dk, capacity = e.capacity, thread = threadIdx.x;
    const int groups = (dk + KEY_COLUMNS - 1) / KEY_COLUMNS, across = thread % KEY_COLUMNS, of_row = thread / KEY_COLUMNS;
    const int column = static_cast<int>(blockIdx.x % groups) * KEY_COLUMNS + across;
    const int64_t index = blockIdx.x / groups;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    const bool live = column < dk;
    float* const carried = p.d_keys + index * capacity * dk + column;
    if (row.len <= p.from && (row.len > 0 || p.from > 0)) return;

    Carve carve{dynamic_shared()};
    float* now = carve.take<float>(capacity * KEY_COLUMNS);
    float* next = carve.take<float>(capacity * KEY_COLUMNS);
    uint8_t* const exits = carve.take<uint8_t>(ITEMS);
    carve.check();

    const float* const entering = row.len > p.to ? carried : p.final_keys ? p.final_keys + index * capacity * dk + column : nullptr;
    for (int j = of_row; j < capacity; j += ROWS)
        now[j * KEY_COLUMNS + across] = live && entering ? entering[j * dk] : 0.0f;
    // Slots held at `from`; those past them are never read.
    int m = p.initial_len ? p.initial_len[index] : 0;
    const int64_t end = row.len < p.to ? row.len : p.to, chunks = (end - p.from + C - 1) / C;
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t at = p.from / C + chunk;
        const int64_t kept = (place_in_window(e, row, p.from, p.to, p.from, C) + chunk) * e.value_heads + row.head;
        const int64_t left = row.len - at * C;
        const int len = left < C ? static_cast<int>(left) : C;
        m = p.chunk_len[(first_chunk(row, C) + at) * e.value_heads + row.head];
        __syncthreads();
        for (int i = thread; i < ITEMS; i += THREADS)
            if (i < m || (i >= MOST_SLOTS && i < MOST_SLOTS + len)) exits[i] = p.exits[kept * ITEMS + i];
        __syncthreads();
        if (live) {
            for (int j = of_row; j < m; j += ROWS)
                next[j * KEY_COLUMNS + across] =
                    now[exits[j] * KEY_COLUMNS + across] + p.d_bank[(kept * capacity + j) * dk + column];
            for (int s = of_row; s < len; s += ROWS)
                p.d_k[(kept * C + s) * dk + column] += now[exits[MOST_SLOTS + s] * KEY_COLUMNS + across];
        }
        float* const swapped = now;
        now = next, next = swapped;
    }
    __syncthreads();
    for (int j = of_row; live && j < capacity; j += ROWS) {
        if (j < m) carried[j * dk] = now[j * KEY_COLUMNS + across];
        else if (p.from == 0) carried[j * dk] = 0;
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_90a: route_backward 128 to 140, route_backward_keys 56.
#define ROUTE_BACKWARD(name, function, T)                                                \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::RouteBackwardParams p) { \
        dla::function<dla::T>(p);                                                        \
    }
ROUTE_BACKWARD(route_backward_bf16, route_backward, Bf16)
ROUTE_BACKWARD(route_backward_f16, route_backward, F16)
ROUTE_BACKWARD(route_backward_f32, route_backward, F32)
ROUTE_BACKWARD(route_backward_keys_bf16, route_backward_keys, Bf16)
ROUTE_BACKWARD(route_backward_keys_f16, route_backward_keys, F16)
ROUTE_BACKWARD(route_backward_keys_f32, route_backward_keys, F32)
