// scan: reads all slots, and writes: transition, merge and append in one (OPERATOR.md, section 4).
//
//   O = sum over j of diag(w[:,j]) Qt S_j + (P . Lambda) V,  w_t[j] = lambda_t[pi_t(j)], Lambda_ts = lambda_t[slot_t(s)]
//   S'_i = sum over j that end in i of transition(S_j) + sum over r that end in i of Kh_r v_r^T
//   transition(S) = e^{Gamma_C} S (gated),  e^{Gamma_C} S - Kd^T (W S) (gated delta rule)
//
// One block of 256 threads per sequence, value head and slice of 16 value columns (grid.x = N HV slices, the slice
// running fastest), chunk after chunk. Everything is computed transposed: O^T = S^T Qt^T with the slice's 16
// columns as rows, so that a state, as products leave it (C fragments of S^T), is the left operand of the next
// product without moving, and W S likewise goes from accumulators straight into the product with Kd. Warp w reads
// (and lets pass) entry slots w, w + 8, ...; after a barrier it writes exit slots w, w + 8, ...; the warps'
// parts of O are summed in one order.
//
// Bank: f32 masters in global memory (L2), 16 x 16 tiles in fragment order, so that a lane loads 32 contiguous
// bytes; a slot keeps its place while its rank changes. Under the gated recurrence a slot in which nothing ends is
// not touched: its decay is a factor in double, put into the weights. Slots are never re-rounded: operands are
// made from the masters at every read. Everything about where and how states lie is in `Bank`.
//
// Numerics: gated reads use q itself (scale, e^Gamma and the slots' decay are in the f32 weights), so bf16 rounds
// the states, P and Kh, and o once at the end. The delta rule also rounds Qt, W and Kd; its transition takes the
// states and W S in two planes, for what is rounded there stays (with one plane: o off by up to 4.0e-3 and states
// by 3.6e-3 on the emulator, against 3.5e-3 and 2.7e-3).
//
// Shared memory: C = 64 / planes; union of operands max(planes C (dk + 8) 2 (x 2, delta), 8 x 16 x (C + 1) x 4)
// + planes C 24 2 (V) + M (C + 1) 4 (weights) + C (64 + C) + 2.1 KB: bf16, dk = 128, M = 32: 55 KB; at most (bf16
// delta, dk = 256, M = 64) 97,536 bytes.
// Registers: at the end of the file. Floor: the reading product, 0.73 ms at S3 on an H100. Predicted, not
// measured, at S3, M = 32: the bank's 17 GB through L2 at about 4 TB/s, 4 ms gated; twice that and the transition's
// products, in two planes, under the delta rule: more than 10 ms.

#include "common/bank.cuh"

namespace dla {
namespace {

template <typename T, bool DELTA>
DEVICE void scan(const ScanParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BLOCKS = C / 16, PITCH = C + 1;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), capacity = e.capacity, slices = padded(dv) / 16;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int g = lane / 4, c2 = lane % 4 * 2;
    const int64_t index = blockIdx.x / slices;
    const int slice = blockIdx.x % slices * 16;
    const Row row = row_of(e, index / e.value_heads, index % e.value_heads);
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);
    const T* const v = static_cast<const T*>(p.v);
    T* const o = static_cast<T*>(p.o);

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Exits exits;
    exits.take(carve);
    double* const logs = carve.take<double>(MOST_SLOTS);      // decay of every place since it was written
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    uint8_t* const order = carve.take<uint8_t>(MOST_SLOTS);   // place of every slot, oldest first
    uint8_t* const next = carve.take<uint8_t>(MOST_SLOTS);    // the same after the chunk
    float* const weights = carve.take<float>(capacity * PITCH);  // [entry slot][token]
    const Tile<PARTS> values = carve.tile<PARTS>(C, 16);
    // One after another: P . Lambda; Qt; the warps' parts of O; W and Kd; Kh.
    unsigned char* const reused = carve.next;
    float* const parts_of_o = carve.take<float>(WARPS * 16 * PITCH);
    unsigned char* const end_of_parts = carve.next;
    carve.next = reused;
    const Tile<2> pairs = carve.tile<2>(C, C);  // P is rounded once already
    carve.next = reused;
    const Tile<PARTS> rows = carve.tile<PARTS>(C, width);
    const Tile<PARTS> more = DELTA ? carve.tile<PARTS>(C, width) : rows;
    if (carve.next < end_of_parts) carve.next = end_of_parts;
    carve.check();

    const Bank bank = {p.bank + (index * slices + slice / 16) * capacity * width * 16, width / 16};
    const int64_t state = static_cast<int64_t>(dk) * dv;
    int m = p.initial_len ? p.initial_len[index] : 0;
    if (m > 0) load_initial(bank, p.initial_states + index * capacity * state, m, dk, dv, slice);
    for (int i = thread; i < MOST_SLOTS; i += THREADS) order[i] = i, logs[i] = 0;

    for (int64_t first = 0; first < row.len; first += C) {
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t chunk = (first_chunk(row, C) + first / C) * e.value_heads + row.head;
        __syncthreads();

        // The chunk's log, decays and values.
        if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
        for (int t = warp; t < C; t += WARPS) {
            const bool live = t < len;
            const float qf = norm_factor(!DELTA && live ? q + row.key_at(first + t) * dk : nullptr, dk, !DELTA && p.qk_l2norm);
            const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
            if (lane == 0) q_factor[t] = qf, k_factor[t] = kf;
        }
        load_columns(values, v, row, first, len, slice, dv);
        replay.run(p.events, row, first, len, m);
        exits.find(replay, len, m);
        const int exit_count = replay.len[len - 1];
        const Gamma total = gamma[C - 1];

        // Weights of entry slots and of pairs.
        const float* const lambda = p.lambda;
        for (int i = thread; i < m * C; i += THREADS) {
            const int j = i / C, t = i % C;
            float weight = 0;
            if (t < len) {
                const int column = column_of(e, replay.of_slot(t, j), replay.len[t]);
                weight = lambda[row.at(first + t) * p.lambda_columns + column];
                if constexpr (!DELTA) {
                    const double log = static_cast<double>(gamma[t].high) + gamma[t].low + logs[order[j]];
                    weight *= p.scale * q_factor[t] * expf(static_cast<float>(log));
                }
            }
            weights[j * PITCH + t] = weight;
        }
        weigh_pairs<PARTS>(pairs, p.p + chunk * PARTS * C * C, replay, e, row, lambda, p.lambda_columns, first, len);
        __syncthreads();

        // O^T = V^T (P . Lambda)^T: warp w takes tokens 16 w.. of the sum.
        Wide<C> out;
        out.clear();
        if (warp < BLOCKS) {
            uint32_t a[PARTS][4], b[2][4];
            load_a_trans(values, 0, warp * 16, a);
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                load_b(pairs, n * 16, warp * 16, b);
                multiply<PARTS, 2>(out.c[n], a, b);
            }
        }
        __syncthreads();

        // O^T += sum over j of S_j^T Qt^T diag(w[:,j]).
        const int64_t prepared = chunk * PARTS * C * width;
        if constexpr (DELTA) copy_planes<PARTS, C>(rows, p.qt + prepared, width);
        else
            for (int t = warp; t < C; t += WARPS)
                load_row(rows, t, t < len ? q + row.key_at(first + t) * dk : nullptr, dk, 1.0f);
        __syncthreads();
        for (int j = warp; j < m; j += WARPS) {
            Wide<C> read;
            read.clear();
            for (int tile = 0; tile < bank.tiles; tile++) {
                float x[8];
                uint32_t a[PARTS][4], b[PARTS][4];
                bank.load(order[j], tile, x);
                operand<PARTS>(x, a);
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    load_b(rows, n * 16, tile * 16, b);
                    multiply<PARTS, PARTS>(read.c[n], a, b);
                }
            }
#pragma unroll
            for (int n = 0; n < BLOCKS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        out.c[n][half][i] += weights[j * PITCH + n * 16 + half * 8 + c2 + i % 2] * read.c[n][half][i];
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
            each_pair(out.c[n], [&](int column, int t, float x0, float x1) {
                float* at = parts_of_o + (warp * 16 + column) * PITCH + n * 16 + t;
                at[0] = x0, at[1] = x1;
            });
        __syncthreads();
        for (int i = thread; i < 2 * len; i += THREADS) {
            const int t = i % len, column = i / len * 8;
            if (slice + column >= dv) continue;
            float x[8];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                x[n] = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) x[n] += parts_of_o[(w * 16 + column + n) * PITCH + t];
            }
            store8(o + row.at(first + t) * dv + slice + column, x);
        }
        __syncthreads();

        // Transition: S_j <- e^{Gamma_C} S_j - Kd^T (W S_j), the states and W S_j in two planes whatever the dtype:
        // what is rounded here stays in the state.
        if constexpr (DELTA) {
            copy_planes<PARTS, C>(rows, p.w + prepared, width);
            for (int t = warp; t < C; t += WARPS)
                load_row(more, t, t < len ? k + row.key_at(first + t) * dk : nullptr, dk,
                         expf(minus(total, gamma[t])) * k_factor[t]);
            __syncthreads();
            transition<PARTS, C>(bank, order, m, rows, more, expf(value(total)));
            __syncthreads();
        }

        // Exit: what ends together is added where its oldest part stands; a new slot takes a place that is free
        // once all that is merged away has been read.
        if constexpr (DELTA) copy_planes<PARTS, C>(rows, p.kh + prepared, width);
        else
            for (int t = warp; t < C; t += WARPS)
                load_row(rows, t, t < len ? k + row.key_at(first + t) * dk : nullptr, dk,
                         expf(minus(total, gamma[t])) * k_factor[t]);
        write_exits<C, DELTA>(bank, exits, exit_count, order, next, logs,
                                     static_cast<double>(total.high) + total.low, values, rows);
        m = exit_count;
    }

    // The cache, oldest first; unused slots zero.
    __syncthreads();
    if (!p.states) return;
    for (int i = warp; i < capacity * bank.tiles; i += WARPS) {
        const int slot = i / bank.tiles, tile = i % bank.tiles;
        float x[8] = {};
        float factor = 0;
        if (slot < m) {
            bank.load(order[slot], tile, x);
            factor = DELTA ? 1.0f : expf(static_cast<float>(logs[order[slot]]));
        }
        float* to = p.states + (index * capacity + slot) * state;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int key = tile * 16 + n / 4 * 8 + c2 + n % 2, column = slice + g + n / 2 % 2 * 8;
            if (key < dk && column < dv) to[static_cast<int64_t>(key) * dv + column] = factor * x[n];
        }
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: gated bf16 187 / 186 / 219 / 216,
// f16 and f32 137 to 143 / 130 to 136 / 153 / 150; delta bf16 199 / 200 / 227 / 216, f16 and f32 147 to 153 / 144 to
// 150 / 169 / 164.
#define SCAN(name, T, DELTA) \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::ScanParams p) { dla::scan<dla::T, DELTA>(p); }
SCAN(scan_gated_bf16, Bf16, false)
SCAN(scan_gated_f16, F16, false)
SCAN(scan_gated_f32, F32, false)
SCAN(scan_delta_bf16, Bf16, true)
SCAN(scan_delta_f16, F16, true)
SCAN(scan_delta_f32, F32, true)
