// route: read weights from content (OPERATOR.md, section 6), in two kernels.
//
//   kappa_{t,i} = (1 / n_{t,i}) sum over the tokens s of slot i, s <= t, of k_s
//   lambda_t[i] = sigmoid(slope q_t . kappa_{t,i} + bias + logits_t[i])
//
// route_bank: the sums of keys K_j and the tokens n_j of every slot held before each chunk, and of the final
// cache. One block of 256 threads per sequence and value head (grid.x = N HV), chunk after chunk; a thread has one
// key column and folds it by the replayed log. Slots are stretches of time, so folding in place, oldest first, is
// enough: an exit slot is never later than its entry slots.
//
// route: one block of 256 threads per chunk and value head (grid.x as prepare). Q [K_j | K]^T by mma, 64 columns of
// dk at a time: the scores against the entry bank and against the chunk's own keys; then one thread a token folds
// its row into slots and makes the weights.
//
// Numerics: q and k exact in their planes, the bank's f32 sums in two; sums in f32, l2 factors applied after the
// products.
//
// Shared memory: route_bank 8,832 bytes (C = 64) and 3,520 (C = 32); route 45,696 and 40,256; whatever the head size.
// Registers: at the end of the file. Floor: bytes, 0.12 ms at S3 if the bank were a difference of prefix sums
// and never written. Predicted, not measured, at S3: the bank's chain, 512 chunks of some 3 us each, 1.5 ms; its
// 126 MB written and read, 0.1 ms; route itself 0.3 ms. The chain is what to cut first.

#include "common/replay.cuh"

namespace dla {
namespace {

template <typename T>
DEVICE void route_bank(const RouteBankParams& p) {
    constexpr int C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, capacity = e.capacity, thread = threadIdx.x;
    const Row row = row_of(e, blockIdx.x / e.value_heads, blockIdx.x % e.value_heads);
    const T* const k = static_cast<const T*>(p.k);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    float* const k_factor = carve.take<float>(C);
    uint32_t* const counts = carve.take<uint32_t>(MOST_SLOTS);  // tokens of every slot held
    carve.check();

    // The bank is worked on where the cache will have it.
    int m = p.initial_len ? p.initial_len[row.index()] : 0;
    float* const bank = p.keys + row.index() * capacity * dk;
    for (int i = thread; i < capacity * dk; i += THREADS)
        bank[i] = i < m * dk ? p.initial_keys[row.index() * capacity * dk + i] : 0.0f;
    for (int i = thread; i < m; i += THREADS) counts[i] = p.initial_tokens[row.index() * capacity + i];

    for (int64_t first = 0; first < row.len; first += C) {
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t chunk = (first_chunk(row, C) + first / C) * e.value_heads + row.head;
        __syncthreads();
        for (int i = thread; i < m * dk; i += THREADS) p.bank_keys[chunk * capacity * dk + i] = bank[i];
        for (int i = thread; i < m; i += THREADS) p.bank_tokens[chunk * capacity + i] = counts[i];
        if (thread == 0) p.bank_len[chunk] = m;
        for (int t = warp_index(); t < C; t += WARPS) {
            const T* from = t < len ? k + row.key_at(first + t) * dk : nullptr;
            const float factor = norm_factor(from, dk, p.qk_l2norm);
            if (lane_index() == 0) k_factor[t] = factor;
        }
        replay.run(p.events, row, first, len, m);
        const int exit_count = replay.len[len - 1];
        const auto exit = [&](int item) {
            return item < m ? replay.of_slot(len - 1, item) : replay.of_token(len - 1, item - m);
        };
        if (thread < dk) {
            float sum = 0;
            int to = exit(0);
            for (int item = 0; item < m + len; item++) {
                const int slot = exit(item);
                if (slot != to) {
                    bank[to * dk + thread] = sum;
                    sum = 0, to = slot;
                }
                if (item < m) {
                    sum += bank[item * dk + thread];
                } else {
                    const T* from = k + row.key_at(first + item - m) * dk + thread;
                    sum += k_factor[item - m] * load1(from);
                }
            }
            bank[to * dk + thread] = sum;
            for (int slot = exit_count; slot < m; slot++) bank[slot * dk + thread] = 0;
        }
        if (thread == THREADS - 1) {
            uint32_t sum = 0;
            int to = exit(0);
            for (int item = 0; item < m + len; item++) {
                const int slot = exit(item);
                if (slot != to) {
                    counts[to] = sum;
                    sum = 0, to = slot;
                }
                const uint32_t tokens = item < m ? counts[item] : 1;
                sum = sum + tokens < sum ? 0xffffffffu : sum + tokens;
            }
            counts[to] = sum;
        }
        m = exit_count;
    }
}

template <typename T>
DEVICE void route(const RouteParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, COLUMNS = MOST_SLOTS + C, PITCH = COLUMNS + 1;
    const Extents& e = p.extents;
    const int dk = e.dk, capacity = e.capacity;
    const int warp = warp_index(), thread = threadIdx.x;
    const int64_t place = blockIdx.x / e.value_heads;
    const Row row = row_of(e, sequence_of_chunk(e, place, C), blockIdx.x % e.value_heads);
    const int64_t first = (place - first_chunk(row, C)) * C;
    if (first >= row.len) return;
    const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);
    const int64_t chunk = place * e.value_heads + row.head;
    const int m = p.bank_len[chunk];
    const float* const bank = p.bank_keys + chunk * capacity * dk;

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    // The operands; after the products, the scores.
    float* const scores = reinterpret_cast<float*>(carve.next);
    Carve other = carve;
    const Tile<PARTS> queries = carve.tile<PARTS>(C, SLICE), keys = carve.tile<PARTS>(C, SLICE);
    const Tile<2> slots = carve.tile<2>(MOST_SLOTS, SLICE);
    other.take<float>(C * PITCH);
    carve.check(), other.check();

    for (int t = warp; t < C; t += WARPS) {
        const int64_t at = row.key_at(first + t) * dk;
        const float qf = norm_factor(t < len ? q + at : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(t < len ? k + at : nullptr, dk, p.qk_l2norm);
        if (lane_index() == 0) q_factor[t] = qf, k_factor[t] = kf;
    }
    replay.run(p.events, row, first, len, m);

    // Warp w has blocks w, w + 8, ... of 16 x 16 of Q [K_j | K]^T, in rows.
    constexpr int ACROSS = COLUMNS / 16, BLOCKS = C / 16 * ACROSS, MINE = (BLOCKS + WARPS - 1) / WARPS;
    float c[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(c[i]);
    for (int column = 0; column < padded(dk); column += SLICE) {
        __syncthreads();
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            const int64_t at = row.key_at(first + t) * dk;
            load_slice(queries, t, group, t < len ? q + at : nullptr, column, dk, 1.0f);
            load_slice(keys, t, group, t < len ? k + at : nullptr, column, dk, 1.0f);
        }
        for (int i = thread; i < MOST_SLOTS * SLICE / 8; i += THREADS) {
            const int j = i / (SLICE / 8), group = i % (SLICE / 8);
            const F32* from = reinterpret_cast<const F32*>(bank + j * dk);
            load_slice(slots, j, group, j < m ? from : nullptr, column, dk, 1.0f);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = warp + i * WARPS, t = block / ACROSS * 16, n = block % ACROSS * 16;
            if (block >= BLOCKS) continue;
            for (int from = 0; from < SLICE; from += 16) {
                uint32_t a[PARTS][4];
                load_a(queries, t, from, a);
                if (n < MOST_SLOTS) {
                    uint32_t b[2][4];
                    load_b(slots, n, from, b);
                    multiply<PARTS, 2>(c[i], a, b);
                } else {
                    uint32_t b[PARTS][4];
                    load_b(keys, n - MOST_SLOTS, from, b);
                    multiply<PARTS, PARTS>(c[i], a, b);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = warp + i * WARPS, t0 = block / ACROSS * 16, n0 = block % ACROSS * 16;
        if (block >= BLOCKS) continue;
        each_pair(c[i], [&](int r, int n, float x0, float x1) {
            const int t = t0 + r, s = n0 + n - MOST_SLOTS;
            float* at = scores + t * PITCH + n0 + n;
            at[0] = x0 * q_factor[t] * (s < 0 ? 1.0f : k_factor[s]);
            at[1] = x1 * q_factor[t] * (s < 0 ? 1.0f : k_factor[s + 1]);
        });
    }
    __syncthreads();

    // Items end in slots in order, so a token's row is folded in one walk.
    const float slope = p.slope[row.head], bias = p.bias[row.head];
    for (int t = thread; t < len; t += THREADS) {
        const int held = replay.len[t];
        const int64_t at = row.at(first + t);
        float* const lambda = p.lambda + at * capacity;
        for (int i = held; i < capacity; i++) lambda[i] = 0;
        float sum = 0, tokens = 0;
        int to = 0;
        for (int item = 0; item <= m + t + 1; item++) {
            const bool end = item == m + t + 1;
            const int slot = end ? -1 : item < m ? replay.of_slot(t, item) : replay.of_token(t, item - m);
            if (slot != to) {
                const int column = column_of(e, to, held);
                const float logit = p.logits ? p.logits[at * p.logit_columns + column] : 0.0f;
                const float x = slope * (sum / tokens) + bias + logit;
                const float tail = expf(-fabsf(x)), over = 1.0f / (1.0f + tail);
                lambda[column] = x >= 0 ? over : tail * over;
                sum = 0, tokens = 0, to = slot;
            }
            if (end) break;
            sum += scores[t * PITCH + (item < m ? item : MOST_SLOTS + item - m)];
            tokens += item < m ? __uint2float_rn(p.bank_tokens[chunk * capacity + item]) : 1.0f;
        }
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: route_bank 94 to 96 / 80 to 90 / 60
// to 64 / 56 to 60, route 92 to 95 / 93 to 94 / 80 to 86 / 80 to 89.
#define ROUTE(name, Params, function, T) \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::Params p) { dla::function<dla::T>(p); }
ROUTE(route_bank_bf16, RouteBankParams, route_bank, Bf16)
ROUTE(route_bank_f16, RouteBankParams, route_bank, F16)
ROUTE(route_bank_f32, RouteBankParams, route_bank, F32)
ROUTE(route_bf16, RouteParams, route, Bf16)
ROUTE(route_f16, RouteParams, route, F16)
ROUTE(route_f32, RouteParams, route, F32)
