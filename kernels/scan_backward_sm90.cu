// scan_backward on Hopper, gated, bf16: the adjoint of the scan, chunks in reverse (OPERATOR.md, section 4), for one of V and K.
// The scan writes tokens a chunk late, so at chunk c's exit those of chunk c - 1. With dS' the adjoint of the exit bank, of dV:
//
//   dV_c = (P . Lambda)_{c,c}^T dO_c + (P . Lambda)_{c+1,c}^T dO_{c+1} + rows decay_s k_s^T e^{Gamma_C} dS'_{e(s)}, both of c + 1
//   dS_j = e^{Gamma_C} dS'_{e(j)} + Q^T (w_j . dO)
//
// dK is the same with q and do, k and v exchanged. In what follows Q, K are the two whose whole rows a block reads (WIDTH, as
// computed), O and V those of which it has 8 columns.
//
// A block has 8 columns of O and V and all slots: two groups of 128 threads with half of the slots each, and four warps that
// bring what they read. Grid: N HV x columns / 8, slices of a row next to each other.
//
// dS^T is in f32 in the registers of the warp that owns it: 8 slots of a group are one m64, warp w has slots 2 w (rows 0 to 7) and
// 2 w + 1; they are the accumulators of the product that adds to them, m64n(WIDTH)k16, four steps of 16 tokens: left operand
// (w_j[t] dO[t, column])^T, made in registers, right operand Q in shared memory. Only operands are rounded.
// Merge. Its adjoint is a copy, from place to place through shared memory, STAGED at a time.
// Write. dS' of the slots that hold tokens of the chunk before is rounded to bf16 in shared memory. While the products run
// half of the warps read it by mma, 16 tokens each; the others add the pairs of tokens, and what the first left them one chunk
// earlier, and put dV out.
// Decay. An adjoint is `grown` times what stands in the registers, one factor for all of a row: a chunk's decay goes into it, and
// its inverse into the left operands. When it falls below 2^-32 it is multiplied in.
// The order. The next chunk's first left operands are made while the last products run, so that between products there are
// only rounding, copies, and a barrier.
// Places whose slot holds none of the bank's tokens have anything finite in them: their weights are 0, no one reads them.
//
// Shared memory (bytes; D = WIDTH, M = SLOTS): of two chunks Q 136 D, K 136 D, weights 256 M, pairs 13,312, O 1,024, V 1,024, plan
// 720; rounded states 16 D M; copies 256 D; parts 4,096; barriers and block 208. D = 128, M = 32: 220,784.
// Floor: 1,024 clocks of the tensor cores a chunk and block at D = 128, M = 32; at S3 256 blocks on 132
// multiprocessors, two rounds of 512 chunks: 0.6 ms. Through L2 come 57 KB a chunk and block.
// Measured in an earlier form on an H100 (no decay in `grown`, one warp for states and pairs of 16 tokens, addresses of the copies
// read anew for each): 3.1 ms at S3, 1.55 at S1; 2.3 and 1.2 without copies of Q and K. There the warps that bring took 57% of
// the time to issue copies. This form has not been timed.
// Numerics: operands bf16 (w . dO and dS' rounded once each), sums and dS f32.

#include "common/hopper.cuh"
#include "common/row.cuh"

namespace dla {
namespace {

template <int WIDTH, int SLOTS>
struct Reverse {
    static constexpr int C = Bf16::CHUNK;
    static constexpr int GROUP = 128, GROUPS = 2;      // threads of a group
    static constexpr int BRINGING = 128;               // threads that bring
    static constexpr int COLUMNS = 8;
    static constexpr int STAGED = 4;                   // slots copied at once
    static constexpr int BOTH_GROUPS = 3;              // a barrier
    static constexpr int STEPS = WIDTH / 16;           // of a row
    static constexpr int WIDE = WIDTH / 2;             // accumulators of 8 slots
    static constexpr int EIGHTS = SLOTS / 8 / GROUPS;  // of a group's slots
    static constexpr int OWN = EIGHTS * 2;             // slots of a warp
    static constexpr int PAIRS = 26, CROSS = 16;       // blocks of 16 x 16; those with the chunk before
    static constexpr int PLAN = offsetof(BackwardPlan, last_number);
    static constexpr int UNIT = C * 8 + 32;            // elements from 8 of n to the next in a matrix, so that a copy's banks differ
    static constexpr int ROWS = WIDTH / 8 * UNIT;
    static constexpr int AHEAD = 3;                    // chunks that L2 is asked for before they are brought
    static constexpr uint8_t NONE = 255;
    static constexpr float LEAST_GROWN = 1.0f / 4294967296.0f;
    static_assert(PLAN % 16 == 0);

    // `full` when a chunk has come, `empty` when every warp has read it; `read` when the rounded states have been.
    struct Barriers {
        Barrier full[2], empty[2], read;
    };

    // One problem: what a block reads and leaves, whichever of V and K it is for.
    struct Block {
        Row row;
        int width, columns;           // of the rows, of all slices
        const Bf16 *queries, *keys;   // token 0's row; `key` elements from token to token
        const Bf16 *outputs, *values; // token 0's first column
        int64_t rows_step, columns_step;
        int64_t place0;               // of the window's first chunk
        int column;                   // the first
        int exchanged;
        int chunks;                   // of the window
        int64_t from, to;

        METHOD Block(const ScanBackwardSm90Params& p) {
            const Extents& e = p.extents;
            exchanged = p.exchanged;
            width = exchanged ? e.dv : e.dk, columns = exchanged ? e.dk : e.dv;
            const int slices = columns / COLUMNS;
            column = blockIdx.x % slices * COLUMNS;
            const int64_t index = blockIdx.x / slices;
            row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
            from = p.from, to = row.len < p.to ? row.len : p.to;
            chunks = to > from ? static_cast<int>((to - from + C - 1) / C) : 0;
            place0 = place_in_window(e, row, p.from, p.to, p.from, C);
            const Bf16* const of_keys[2] = {static_cast<const Bf16*>(p.q) + row.key_at(0) * e.dk,
                                            static_cast<const Bf16*>(p.k) + row.key_at(0) * e.dk};
            const Bf16* const of_values[2] = {static_cast<const Bf16*>(p.d_o) + row.at(0) * e.dv,
                                              static_cast<const Bf16*>(p.v) + row.at(0) * e.dv};
            const int64_t key_step = static_cast<int64_t>(e.heads) * e.dk, value_step = static_cast<int64_t>(e.value_heads) * e.dv;
            queries = exchanged ? of_values[0] : of_keys[0], keys = exchanged ? of_values[1] : of_keys[1];
            outputs = (exchanged ? of_keys[0] : of_values[0]) + column, values = (exchanged ? of_keys[1] : of_values[1]) + column;
            rows_step = exchanged ? value_step : key_step, columns_step = exchanged ? key_step : value_step;
        }

        // Where chunk n of the window stands in what prepare leaves.
        METHOD int64_t index(int n) const { return (place0 + n) * row.value_heads + row.head; }
        // Element (k, v) of a state.
        METHOD int64_t in_state(int wide, int thin) const {
            return exchanged ? static_cast<int64_t>(thin) * width + wide : static_cast<int64_t>(wide) * columns + thin;
        }
    };

    // Matrices [t][n] stand as [n / 8][t / 8][t % 8][n % 8], UNIT from 8 of n to the next.
    uint16_t* queries;   // [2][ROWS]
    uint16_t* keys;      // [2][ROWS], of the chunk before
    float4* weights;     // [2][SLOTS][4][4]
    uint4* pairs;        // [2][PAIRS][32]
    uint16_t* outputs;   // [2][C][8]
    uint16_t* values;    // [2][C][8], of the chunk before
    unsigned char* plans;
    uint4* rounded;      // [SLOTS][STEPS / 2][32]: dS' as right operands, two steps at a time
    float4* staged;      // [2][STAGED][STEPS][32]
    float4* parts;       // [2][4][32]: what the states add to dV, for the warps that put it out
    Barriers* barriers;
    Block* block;        // in shared memory, for it would take 30 registers

    METHOD void take(Carve& carve) {
        queries = carve.take<uint16_t>(2 * ROWS);
        keys = carve.take<uint16_t>(2 * ROWS);
        weights = carve.take<float4>(2 * SLOTS * 16);
        pairs = carve.take<uint4>(2 * PAIRS * 32);
        outputs = carve.take<uint16_t>(2 * C * COLUMNS);
        values = carve.take<uint16_t>(2 * C * COLUMNS);
        plans = carve.take<unsigned char>(2 * PLAN);
        rounded = carve.take<uint4>(SLOTS * STEPS / 2 * 32);
        staged = carve.take<float4>(2 * STAGED * STEPS * 32);
        parts = carve.take<float4>(2 * 4 * 32);
        barriers = carve.take<Barriers>(1);
        block = carve.take<Block>(1);
        carve.check();
    }

    METHOD void init_barriers() const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            barrier_init(&barriers->full[i], BRINGING + 1);
            barrier_init(&barriers->empty[i], 4 * GROUPS);
        }
        barrier_init(&barriers->read, 4);
        fence_barriers();
    }

    DEVICE uint32_t phase(int64_t uses) { return static_cast<uint32_t>(uses & 1); }

    // The warps that bring the chunks.
    METHOD void bring(const ScanBackwardSm90Params& p) const {
        const Block& b = *block;
        const int thread = threadIdx.x % BRINGING;
        // At once a warp brings 128 bytes of 4 rows, all warps of as many rows as fit.
        constexpr int WIDTHS = WIDTH / 64, STEP = 4 * (BRINGING / 32) / WIDTHS;
        const int unit = thread / 32 % WIDTHS * 8 + thread % 32 / 8 * 2 + thread % 2;
        const int t0 = thread / 32 / WIDTHS * 4 + thread / 2 % 4;
        const bool live_unit = unit * 8 < b.width, of_outputs = thread < C;
        const int chunks = b.chunks, thin_t = thread % C;
        const int step = static_cast<int>(STEP * b.rows_step);
        const int64_t chunk_step = C * b.rows_step, thin_step = C * b.columns_step;
        const int64_t last = b.from + (chunks - 1) * static_cast<int64_t>(C), last_len = b.row.len - last;
        int len = last_len < C ? static_cast<int>(last_len) : C;
        const Bf16* queries_at = b.queries + (last + t0) * b.rows_step + unit * 8;
        const Bf16* keys_at = b.keys + (last - C + t0) * b.rows_step + unit * 8;
        const Bf16* thin_at = (of_outputs ? b.outputs : b.values - thin_step) + (last + thin_t) * b.columns_step;
        const bool starts = b.from == 0;
#pragma unroll 1
        for (int m = 0; m < chunks; m++, len = C) {
            const int buffer = m % 2, n = chunks - 1 - m;
            const bool follows = n > 0 || !starts;  // there is a chunk before
            if (n >= AHEAD) ask_for(p, n - AHEAD, thread);
            barrier_wait(&barriers->empty[buffer], phase(m / 2 + 1));
            if (thread == 0) {
                const int64_t index = b.index(n);
                Barrier* const full = &barriers->full[buffer];
                barrier_expect(full, SLOTS * C * 4 + PAIRS * 512 + PLAN);
                copy_bulk(plans + buffer * PLAN, p.plans + index, PLAN, full);
                copy_bulk(weights + buffer * SLOTS * 16, p.weights + index * C * SLOTS, SLOTS * C * 4, full);
                copy_bulk(pairs + buffer * PAIRS * 32, p.pairs + (index * 2 + b.exchanged) * PAIRS * 128, PAIRS * 512, full);
            }
            // Where nothing is read zeros are left.
            {
                uint16_t* const to = queries + buffer * ROWS + unit * UNIT + t0 * 8;
#pragma unroll
                for (int i = 0; i < C / STEP; i++)
                    copy_async_16(to + i * STEP * 8, queries_at + static_cast<int64_t>(i) * step, t0 + i * STEP < len && live_unit);
                queries_at -= chunk_step;
            }
            if (follows) {
                uint16_t* const to = keys + buffer * ROWS + unit * UNIT + t0 * 8;
#pragma unroll
                for (int i = 0; i < C / STEP; i++)
                    copy_async_16(to + i * STEP * 8, keys_at + static_cast<int64_t>(i) * step, live_unit);
                keys_at -= chunk_step;
            }
            uint16_t* const thin_to = (of_outputs ? outputs : values) + (buffer * C + thin_t) * COLUMNS;
            if (of_outputs || (p.flow && follows)) copy_async_16(thin_to, thin_at, !of_outputs || thin_t < len);
            thin_at -= thin_step;
            copies_arrive(&barriers->full[buffer]);
        }
    }

    // Asks for chunk n, the slices of a row each for their share.
    METHOD void ask_for(const ScanBackwardSm90Params& p, int n, int thread) const {
        const Block& b = *block;
        const int64_t first = b.from + static_cast<int64_t>(n) * C, index = b.index(n);
        const int t = thread % C, slices = b.columns / COLUMNS;
#pragma unroll 1
        for (int share = b.column / COLUMNS; share < 6; share += slices) {
            if (share < 2) {
                if (thread > 0) continue;
                if (share == 0) prefetch_bulk(p.pairs + (index * 2 + b.exchanged) * PAIRS * 128, PAIRS * 512);
                else prefetch_bulk(p.weights + index * C * SLOTS, SLOTS * C * 4), prefetch_bulk(p.plans + index, PLAN);
                continue;
            }
            const bool thin = share >= 4;
            const int width = thin ? b.columns : b.width, column = thread / C * 64;
            if (column >= width || (share % 2 == 1 && first == 0)) continue;
            const int64_t token = share % 2 == 1 ? first - C + t : first + t;
            const Bf16* const of = share == 2 ? b.queries : share == 3 ? b.keys : share == 4 ? b.outputs - b.column : b.values - b.column;
            if (share < 5 || p.flow) prefetch_line(of + token * (thin ? b.columns_step : b.rows_step) + column);
        }
    }

    METHOD void compute(const ScanBackwardSm90Params& p, int group) const {
        const Extents& e = p.extents;
        const Block& b = *block;
        const Row& row = b.row;
        const int capacity = e.capacity;
        const int lane = opaque(lane_index()), warp = __shfl_sync(ALL, warp_index() % 4, 0), g = lane / 4, c = lane % 4, c2 = c * 2;
        const int64_t state = static_cast<int64_t>(e.dk) * e.dv;
        // Of the 16 tokens from 16 warp on either group has a warp: one for what the states add to dV, one for the pairs.
        const bool of_states = warp / 2 == group;
        const int token = warp * 16 + g;

        // Element 4 n + 2 half + i of eight slots: row 8 n + c2 + i, column g of place_of(2 eight + half).
        float mine[EIGHTS][WIDE];
        const auto place_of = [&](int own) { return (group * EIGHTS + own / 2) * 8 + warp * 2 + own % 2; };
        float grown = 1;    // the adjoints are this times what stands in `mine`, so that a chunk's decay needs no pass over them
        float out[4] = {};  // of tokens token and token + 8: what the chunk after theirs adds to dV, by way of states or pairs

        // Of a chunk's plan, for every own slot in turn.
        using Slot = BackwardPlan::Slot;
        uint2 slots[EIGHTS];
        const auto load_slots = [&](const BackwardPlan* plan) {
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++)
                slots[eight] = *reinterpret_cast<const uint2*>(plan->slots + place_of(eight * 2));
        };
        const auto of_slot = [&](int own, size_t field) {
            return static_cast<int>((own % 2 ? slots[own / 2].y : slots[own / 2].x) >> 8 * field & 0xff);
        };
        // Rounds the slots that this field numbers.
        const auto publish = [&](size_t field) {
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                const int number = of_slot(own, field);
                if (number == NONE) continue;
                const float* const x = &mine[own / 2][own % 2 * 2];
#pragma unroll
                for (int i = 0; i < STEPS / 2; i++)
                    rounded[(number * (STEPS / 2) + i) * 32 + lane] =
                        make_uint4(pack_bf16(x[i * 16], x[i * 16 + 1]), pack_bf16(x[i * 16 + 4], x[i * 16 + 5]),
                                   pack_bf16(x[i * 16 + 8], x[i * 16 + 9]), pack_bf16(x[i * 16 + 12], x[i * 16 + 13]));
            }
        };
        // k_s^T dS'_{e(s)} of 16 tokens: by(number of a slot, product) for all that have some of them.
        const auto through_states = [&](const uint8_t* numbers, auto load_key, float (&sum)[4]) {
            const int top = numbers[token], bottom = numbers[token + 8];
            const int begin = numbers[warp * 16], end = numbers[warp * 16 + 15];
#pragma unroll 1
            for (int number = begin; number <= end; number++) {
                float x[2][4] = {};
#pragma unroll
                for (int i = 0; i < STEPS / 2; i++) {
                    const uint4 right = rounded[(number * (STEPS / 2) + i) * 32 + lane];
                    uint32_t left[4];
                    load_key(i * 2, left);
                    mma_bf16(x[0], left, right.x, right.y);
                    load_key(i * 2 + 1, left);
                    mma_bf16(x[1], left, right.z, right.w);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (top == number) sum[i] = x[0][i] + x[1][i];
                    if (bottom == number) sum[2 + i] = x[0][2 + i] + x[1][2 + i];
                }
            }
        };
        // v_s . dV_s of the block's columns; `first`: of the tokens' chunk, `pair`: of a token's values, two of them.
        const auto leave_flow = [&](int64_t first, auto pair, const float (&x)[4]) {
            const int64_t at = static_cast<int64_t>(b.column / COLUMNS) * start_of(e, e.sequences) * e.value_heads + row.at(first);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = token + half * 8;
                const uint32_t v = pair(t);
                float sum = low_bf16(v) * x[half * 2] + high_bf16(v) * x[half * 2 + 1];
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                if (c == 0 && first + t < row.len) p.flow[at + static_cast<int64_t>(t) * e.value_heads] = sum;
            }
        };
        const auto held_at_start = [&] { return p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0; };

        // What the window begins with, at its end.
        const auto carried_at = [&] {
            return reinterpret_cast<float4*>(p.carried) +
                   static_cast<int64_t>(blockIdx.x) * (EIGHTS * WIDE / 4 + 2) * 256 + group * GROUP + warp * 32 + lane;
        };
        const bool goes_on = row.len > p.to;
        const BackwardPlan* const last = !goes_on && b.chunks > 0 ? p.plans + b.index(b.chunks - 1) : nullptr;
#pragma unroll
        for (int i = 0; i < EIGHTS * WIDE; i++) mine[i / WIDE][i % WIDE] = 0;
        if (goes_on) {
            const float4* const carried = carried_at();
#pragma unroll
            for (int i = 0; i < EIGHTS * WIDE / 4; i++) {
                const float4 x = carried[i * 256];
                float* const to = &mine[i * 4 / WIDE][i * 4 % WIDE];
                to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
            }
            const float4 x = carried[EIGHTS * WIDE / 4 * 256];
            out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
            grown = carried[(EIGHTS * WIDE / 4 + 1) * 256].x;
        } else if (p.final_states) {
            const int held = last ? static_cast<int>(last->exit_len) : held_at_start();
#pragma unroll 1
            for (int i = 0; i < held; i++) {
                const int place = last ? last->exit_place[i] : i;
#pragma unroll
                for (int own = 0; own < OWN; own++) {
                    if (place != place_of(own)) continue;
                    const float* in = p.final_states + (row.index() * capacity + i) * state + b.in_state(c2, b.column + g);
                    const int64_t step = opaque(static_cast<int>(b.in_state(1, 0)));
#pragma unroll
                    for (int n = 0; n < STEPS * 2; n++, in += 8 * step)
                        if (n * 8 < b.width) {
                            float* const x = &mine[own / 2][n * 4 + own % 2 * 2];
                            x[0] = in[0], x[1] = in[step];
                        }
                }
            }
        }
        // The final states hold the last chunk's tokens too.
        if (last) {
            const int64_t first = b.from + static_cast<int64_t>(b.chunks - 1) * C;
            const int len = static_cast<int>(row.len - first);
            if (p.final_states) {
                load_slots(last);
                publish(offsetof(Slot, last_published));
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
                if (of_states) {
                    const auto load_key = [&](int step, uint32_t (&left)[4]) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int t = token + i % 2 * 8, k = step * 16 + i / 2 * 8 + c2;
                            left[i] = t < len && k < b.width
                                          ? *reinterpret_cast<const uint32_t*>(b.keys + (first + t) * b.rows_step + k)
                                          : 0u;
                        }
                    };
                    through_states(last->last_number, load_key, out);
#pragma unroll
                    for (int i = 0; i < 4; i++) out[i] *= last->last_factor[b.exchanged][token + i / 2 * 8];
                }
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
            }
            if (of_states && p.flow) {
                const auto pair = [&](int t) {
                    return t < len ? *reinterpret_cast<const uint32_t*>(b.values + (first + t) * b.columns_step + c2) : 0u;
                };
                leave_flow(first, pair, out);
            }
        }

        if (of_states) parts[(4 + warp) * 32 + lane] = make_float4(out[0], out[1], out[2], out[3]);

        // This thread's first part of dV in the window's last chunk, and the tokens from there on.
        const int64_t out_step = p.out_f32 ? b.columns : static_cast<int64_t>(b.row.value_heads) * b.columns;
        const int64_t out_chunk = static_cast<int64_t>(C) * b.row.value_heads * b.columns;
        const int64_t out_first = p.out_f32 ? b.index(b.chunks - 1) * C + token
                                            : b.row.at(b.from + (b.chunks - 1) * static_cast<int64_t>(C) + token);
        int64_t out_at = out_first * b.columns + b.column + c2;
        const auto put_out = [&](int tokens_left) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half * 8 >= tokens_left) continue;
                const int64_t at = out_at + half * 8 * out_step;
                if (p.out_f32) *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = make_float2(out[half * 2], out[half * 2 + 1]);
                else *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(p.out) + at) = pack_bf16(out[half * 2], out[half * 2 + 1]);
            }
        };

        // O's fragments of a chunk are right operands of 16 tokens and, transposed, left ones of 8 columns alike.
        uint32_t o[2][4], left[EIGHTS][4][4];
        float shrink = 1;  // of all adjoints, before the chunk
        const auto load_outputs = [&](int buffer) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                ldmatrix_x4_trans(o[half], outputs + (buffer * C + half * 32 + lane) * COLUMNS);
        };
        const auto weigh = [&](int buffer, int eight) {
            const float4* const weight = weights + (buffer * SLOTS + place_of(eight * 2)) * 16 + c;
            const float inverse = 1.0f / grown;
#pragma unroll
            for (int step = 0; step < 4; step++) {
                const uint32_t early = o[step / 2][step % 2 * 2], late = o[step / 2][step % 2 * 2 + 1];
                const float x[4] = {low_bf16(early) * inverse, high_bf16(early) * inverse, low_bf16(late) * inverse,
                                    high_bf16(late) * inverse};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float4 w = weight[half * 16 + step * 4];
                    left[eight][step][half] = pack_bf16(w.x * x[0], w.y * x[1]);
                    left[eight][step][2 + half] = pack_bf16(w.z * x[2], w.w * x[3]);
                }
            }
        };
        const auto await_chunk = [&](int m) {
            const int buffer = m % 2;
            barrier_wait(&barriers->full[buffer], phase(m / 2));
            fence_async();
            const BackwardPlan* const plan = reinterpret_cast<const BackwardPlan*>(plans + buffer * PLAN);
            load_slots(plan);
            grown *= plan->decay;
            shrink = grown < LEAST_GROWN ? grown : 1.0f;
            if (grown < LEAST_GROWN) grown = 1;
            load_outputs(buffer);
            weigh(buffer, 0);
        };

        const int chunks = b.chunks;
        uint32_t rounds = 0;
        if (chunks > 0) await_chunk(0);
#pragma unroll 1
        for (int m = 0; m < chunks; m++) {
            const int buffer = m % 2;
            const BackwardPlan& plan = *reinterpret_cast<const BackwardPlan*>(plans + buffer * PLAN);
            if (shrink != 1) {
#pragma unroll
                for (int i = 0; i < EIGHTS * WIDE; i++) mine[i / WIDE][i % WIDE] *= shrink;
            }

            // Rounded states; copies. What is staged here was last read before the barrier before last.
            barrier_wait(&barriers->read, phase(m + 1));
            publish(offsetof(Slot, published));
            const int copies = static_cast<int>(plan.copies);
            int staged_from = 0;
#pragma unroll 1
            do {
                float4* const stage = staged + (rounds++ % 2) * STAGED * STEPS * 32 + lane;
#pragma unroll
                for (int own = 0; own < OWN; own++) {
                    const int number = of_slot(own, offsetof(Slot, copied)) - staged_from;
                    if (number < 0 || number >= STAGED) continue;
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        const float* const x = &mine[own / 2][i * 8 + own % 2 * 2];
                        stage[(number * STEPS + i) * 32] = make_float4(x[0], x[1], x[4], x[5]);
                    }
                }
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
#pragma unroll
                for (int own = 0; own < OWN; own++) {
                    const int number = of_slot(own, offsetof(Slot, copy_of)) - staged_from;
                    if (number < 0 || number >= STAGED) continue;
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        const float4 y = stage[(number * STEPS + i) * 32];
                        float* const x = &mine[own / 2][i * 8 + own % 2 * 2];
                        x[0] = y.x, x[1] = y.y, x[4] = y.z, x[5] = y.w;
                    }
                }
                staged_from += STAGED;
            } while (staged_from < copies);

            // The products.
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++) wgmma_hold(mine[eight]);
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++) {
                if (eight > 0) weigh(buffer, eight);
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < 4; step++)
                    wgmma_bf16(mine[eight], left[eight][step], wgmma_operand(queries + buffer * ROWS + step * 128, UNIT * 2), 1);
                wgmma_commit();
            }

            // dV, of a chunk by the states when the next is at work, by the pairs when it is itself.
            const int64_t first = b.from + static_cast<int64_t>(chunks - 1 - m) * C;
            if (of_states) {
                if (first > 0) {
                    const auto load_key = [&](int step, uint32_t (&left)[4]) {
                        ldmatrix_x4(left, keys + buffer * ROWS + (step * 2 + lane / 16) * UNIT + (warp * 16 + lane % 16) * 8);
                    };
                    through_states(plan.number, load_key, out);
#pragma unroll
                    for (int i = 0; i < 4; i++) out[i] *= plan.factor[b.exchanged][token + i / 2 * 8] * grown;
                    parts[(m % 2 * 4 + warp) * 32 + lane] = make_float4(out[0], out[1], out[2], out[3]);
                    if (p.flow) {
                        const auto pair = [&](int t) {
                            return *reinterpret_cast<const uint32_t*>(values + (buffer * C + t) * COLUMNS + c2);
                        };
                        leave_flow(first - C, pair, out);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(&barriers->read);
            } else {
                const auto add_pairs = [&](int block, int steps_from) {
#pragma unroll
                    for (int step = 0; step < 4; step++) {
                        if (step < steps_from) continue;
                        const uint4 x = pairs[(buffer * PAIRS + block + step) * 32 + lane];
                        const uint32_t of_tokens[4] = {x.x, x.y, x.z, x.w};
                        mma_bf16(out, of_tokens, o[step / 2][step % 2 * 2], o[step / 2][step % 2 * 2 + 1]);
                    }
                };
                // Rows of the triangle begin at its blocks 0, 4, 7 and 9.
                add_pairs(CROSS + (warp == 0 ? 0 : warp == 1 ? 3 : warp == 2 ? 5 : 6), warp);
                const float4 part = parts[((m + 1) % 2 * 4 + warp) * 32 + lane];
                out[0] += part.x, out[1] += part.y, out[2] += part.z, out[3] += part.w;
                const int64_t tokens_left = b.row.len - first - token;
                put_out(tokens_left < C ? static_cast<int>(tokens_left) : C);
                out_at -= out_chunk;
#pragma unroll
                for (int i = 0; i < 4; i++) out[i] = 0;
                if (first > 0) add_pairs(warp * 4, 0);
            }
            // The next chunk's first left operands while the last products run.
            if (EIGHTS > 1) wgmma_wait_first();
            if (EIGHTS > 1 && m + 1 < chunks) await_chunk(m + 1);
            wgmma_wait();
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++) wgmma_hold(mine[eight]);
            if (EIGHTS == 1 && m + 1 < chunks) await_chunk(m + 1);
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->empty[buffer]);
        }

        if (b.from > 0 || p.flow) {
            // For the window before, and for dg (g_backward_sm90.cu).
            float4* const carried = carried_at();
#pragma unroll
            for (int i = 0; i < EIGHTS * WIDE / 4; i++) {
                const float* const x = &mine[i * 4 / WIDE][i * 4 % WIDE];
                carried[i * 256] = make_float4(x[0], x[1], x[2], x[3]);
            }
            carried[EIGHTS * WIDE / 4 * 256] = make_float4(out[0], out[1], out[2], out[3]);
            carried[(EIGHTS * WIDE / 4 + 1) * 256] = make_float4(grown, 0, 0, 0);
        }
        if (b.from > 0 || !p.initial_states) return;
        const int initial_held = held_at_start();
#pragma unroll 1
        for (int i = 0; i < capacity; i++) {
            const bool used = i < initial_held;
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                if (i != place_of(own)) continue;
                float* to = p.initial_states + (row.index() * capacity + i) * state + b.in_state(c2, b.column + g);
                const int64_t step = opaque(static_cast<int>(b.in_state(1, 0)));
#pragma unroll
                for (int n = 0; n < STEPS * 2; n++, to += 8 * step)
                    if (n * 8 < b.width) {
                        const float* const x = &mine[own / 2][n * 4 + own % 2 * 2];
                        to[0] = used ? x[0] * grown : 0.0f, to[step] = used ? x[1] * grown : 0.0f;
                    }
            }
        }
    }
};

template <int WIDTH, int SLOTS>
DEVICE void scan_backward_sm90(const ScanBackwardSm90Params& p) {
    using Reverse = Reverse<WIDTH, SLOTS>;
    Carve carve{dynamic_shared()};
    Reverse reverse;
    reverse.take(carve);
    if (threadIdx.x == 0) reverse.init_barriers(), *reverse.block = typename Reverse::Block(p);
    __syncthreads();
    if (p.from > 0 && reverse.block->row.len <= p.from) return;
    const int group = __shfl_sync(ALL, warp_index() / 4, 0);
    // What a block is launched with is all that it can share out: one more, and the groups wait for ever.
    constexpr int FEWER = 56, MORE = 224;
    static_assert(FEWER + 2 * MORE == 3 * 168);
    if (group == Reverse::GROUPS) {
        registers_fewer<FEWER>();
        reverse.bring(p);
    } else {
        registers_more<MORE>();
        reverse.compute(p, group);
    }
}

}  // namespace
}  // namespace dla

// Size of a row as computed, slots. Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): 168 at launch, then 224 in the
// groups and 56 beside them (168 x 3 is all that a block can share out).
#define SCAN_BACKWARD_SM90(WIDTH, SLOTS)                                                          \
    KERNEL BLOCK_OF(384) scan_backward_sm90_##WIDTH##_##SLOTS(                                    \
        const __grid_constant__ dla::ScanBackwardSm90Params p) {                                  \
        dla::scan_backward_sm90<WIDTH, SLOTS>(p);                                                 \
    }
SCAN_BACKWARD_SM90(64, 16)
SCAN_BACKWARD_SM90(64, 32)
SCAN_BACKWARD_SM90(128, 16)
SCAN_BACKWARD_SM90(128, 32)
