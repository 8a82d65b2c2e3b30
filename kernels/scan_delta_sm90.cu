// scan on Hopper, gated delta rule, bf16: reads all slots, then merge, transition and append (OPERATOR.md, section 4), by
// chunks of C = 128 tokens.
//
//   O = sum_j diag(w[:,j]) Qt S_j + (P . Lambda) V
//   S'_i = e^{Gamma_C} S + F S + sum over r that end in i of Kh_r v_r^T,  S = sum over j that end in i of S_j,  F = -Kd^T W
//
// A block has two groups of 128 threads and a warp that brings what they read. A group has COLUMNS columns of dv with all slots
// of them and meets the other nowhere, so that one multiplies while the other does not. Grid: N HV x dv / (2 COLUMNS), slices
// of a row next to each other.
//
// A state is in f32 in the registers of the warp that owns it, transposed: the accumulators of the product that lets it
// pass, which adds to them. 64 rows of a product (a block of slots) are 64 / COLUMNS slots of COLUMNS columns. Rounded to bf16,
// a state is in shared memory too, as right operand of the read.
//
// Read, 64 tokens at a time. Qt in registers, a block of slots a product: m64n64k16, dk / 16 steps. A thread's accumulators
// are of the slots of its columns, so the sum over slots is arithmetic inside the thread, and where COLUMNS is 4 between two.
// (P . Lambda) V is m64n8k16, both operands in shared memory.
// Merge. Slots that merge away are handed over in f32 where the slots are read from, half as many at a time; the group adds up
// those that merge into one.
// Transition and write, of a block of slots: m64n(dk)k16, dk / 16 steps with F, then with Kh, two at a time, those of the C / 16 of
// which a token ends in the block; left operands S^T and V^T, the latter masked by slot. Only operands are rounded.
//
// F, and not W and Kd one after the other: as many clocks, one wait less, no rounding of W S, and no registers for W S, so that
// the states fit there. Why 128 tokens: F acts once for twice the tokens, and no more entry slots merge away in a chunk than of 64
// (density, M = 30, merges at every token: about 12); prepare pays with blocks of 64 tokens by 64 (prepare_delta_sm90.cu).
//
// Shared memory (bytes; D = dk as computed, N = SLOTS COLUMNS): slots 4 N D; F D D 2; Kh 256 D; Qt 256 D; weights 512 SLOTS;
// P . Lambda 24,576; V 8,192; plans 416; barriers 96; SLOTS. D = 128, SLOTS = 32, COLUMNS = 4: 213,536.
// Predicted, not measured: clocks of the tensor cores a chunk and block at D = 128, M = 32: read 2,048, own tokens 430, transition
// 2,048, write 1,480 under density and 1,200 under mass (random tokens, M = 30, a merge at every token: 11.6 and 9.4 steps
// of 16, in pairs), 2,048 where every step is multiplied. At D = 64: 2,048, 430, 1,024, and 990 and 660 of 2,048. At S3 256
// blocks on 132 multiprocessors: two rounds of 256 chunks, 1.75 and 1.67 ms at 1.755 GHz. About 2,600 instructions a warp and
// chunk, and a scheduler has two such warps. With every step multiplied an H100 took 3.17 ms at S3 under mass: 10,900
// clocks a chunk, 6,570 of them products. Through L2 come 142 KB a chunk and block.
// Considered: F once for two chunks (slots relative to the first one's beginning, Qt of the second carrying the transition
// of the first, its tokens read as pairs): transition 1,024 less, own tokens 290 more, 11% of the products, and half of the
// merging; prepare 2,000 clocks more a chunk and head.
// Numerics: operands bf16, sums and states f32. On the emulator, dk = 128, 1,024 tokens without decay, o is off by
// up to 3.5e-3, states by 2.9e-3; with decays of 0.02 at most 2.7e-3 and 1.8e-3 (simulated with Kh in two planes: 3.0e-3 and
// 2.0e-3, and the write would cost twice).

#include "common/delta.cuh"
#include "common/hopper.cuh"
#include "common/row.cuh"

namespace dla {
namespace {

constexpr int GROUP = 128;    // threads of a group
constexpr int GROUPS = 2;
constexpr int BOTH_GROUPS = 3;  // a barrier; 1 and 2 are the groups'

// Left operands: made on this side of it.
template <int STEPS>
DEVICE void hold(uint32_t (&a)[STEPS][4]) {
#pragma unroll
    for (int i = 0; i < STEPS * 4; i++) a[i / 4][i % 4] = opaque(static_cast<int>(a[i / 4][i % 4]));
}

DEVICE uint32_t phase(int64_t uses) { return static_cast<uint32_t>(uses & 1); }

// What a block has: a sequence and value head, columns of dv from `column` on, tokens before `to`.
struct Slice {
    Row row;
    int column;
    int64_t to;
};

template <int DK, int SLOTS, int COLUMNS>
struct Scan {
    static constexpr int C = DELTA_CHUNK, HALF = 64, STEPS = DK / 16;
    static constexpr int WIDE = DK / 2;                  // accumulators of a block of slots
    static constexpr int BLOCKS = SLOTS * COLUMNS / 64;  // of slots
    static constexpr int PLACES = 64 / COLUMNS;          // of a block
    static constexpr int QUADS = SLOTS / 4;
    static constexpr int QUERIES = HALF * DK / 2, WEIGHTS = HALF * SLOTS;  // elements of 64 tokens
    static constexpr int TRANSITION = DeltaLayout{DK}.transition(), WRITES = DeltaLayout{DK}.writes();
    static constexpr int PAIRS = DeltaLayout::PAIRS;
    static constexpr int VALUES = GROUPS * C * 8;
    static constexpr int STAGED = SLOTS / 2;             // slots of a group that merge away at once, where slots are read from
    static constexpr int SLOT = DK / 4 * COLUMNS;        // a group's part of a slot in f32, in 16 bytes
    static constexpr int WIDTH = GROUPS * COLUMNS;       // columns of a block

    // `full` when the copies have come, `empty` when every warp that reads them has.
    struct Barriers {
        Barrier read_full[2], values_full[2], transition_full, writes_full;
        Barrier read_empty[2], values_empty[2], transition_empty, writes_empty;
    };

    uint16_t* slots;        // [GROUPS][BLOCKS][8][DK][8]
    uint16_t* transition;   // [DK / 8][DK][8]
    uint16_t* writes;       // [DK / 8][C][8]
    uint4* queries;         // [2]
    float4* weights;        // [2]
    uint32_t* pairs;
    uint16_t* values;       // [2][GROUPS][C][8], of 4 columns twice
    DeltaPlan* plans;       // [2]
    uint8_t* slot_at;       // [SLOTS] the slot, oldest first, that stands at a place
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        slots = carve.take<uint16_t>(GROUPS * SLOTS * COLUMNS * DK);
        transition = carve.take<uint16_t>(TRANSITION);
        writes = carve.take<uint16_t>(WRITES);
        queries = carve.take<uint4>(2 * QUERIES / 4);
        weights = carve.take<float4>(2 * WEIGHTS / 4);
        pairs = carve.take<uint32_t>(PAIRS);
        values = carve.take<uint16_t>(2 * VALUES);
        plans = carve.take<DeltaPlan>(2);
        slot_at = carve.take<uint8_t>(SLOTS);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    METHOD void init_barriers() const {
        for (int i = 0; i < 2; i++) {
            barrier_init(&barriers->read_full[i], 1), barrier_init(&barriers->values_full[i], 33);
            barrier_init(&barriers->read_empty[i], 4 * GROUPS), barrier_init(&barriers->values_empty[i], 4 * GROUPS);
        }
        barrier_init(&barriers->transition_full, 1), barrier_init(&barriers->writes_full, 1);
        barrier_init(&barriers->transition_empty, 4 * GROUPS), barrier_init(&barriers->writes_empty, 4 * GROUPS);
        fence_barriers();
    }

    METHOD static Slice slice_of(const ScanDeltaSm90Params& p, int block) {
        const Extents& e = p.extents;
        const int slices = (e.dv + WIDTH - 1) / WIDTH;
        const int64_t index = block / slices;
        Slice slice;
        slice.row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
        slice.column = block % slices * WIDTH;
        slice.to = slice.row.len < p.to ? slice.row.len : p.to;
        return slice;
    }

    // The first column of a group; the last one's again where dv ends before.
    METHOD int column_of_group(const Extents& e, int column, int group) const {
        const int own = column + group * COLUMNS;
        return own < e.dv ? own : e.dv - COLUMNS;
    }

    // The warp that brings what a chunk needs: whole pieces as prepare left them, by one lane, and V.
    METHOD void bring(const ScanDeltaSm90Params& p, const Row& row, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int lane = lane_index();
        const Bf16* const v = static_cast<const Bf16*>(p.v);
        const int64_t place0 = first_of_window(e, row, from, p.to, C), chunks = to > from ? (to - from + C - 1) / C : 0;
        for (int64_t n = 0; n < chunks; n++) {
            const int64_t first = from + n * C, index = (place0 + n) * e.value_heads + row.head;
            const int buffer = n % 2;
            Barrier* const full = &barriers->values_full[buffer];
            barrier_wait(&barriers->values_empty[buffer], phase(n / 2 + 1));
            if (lane == 0) {
                barrier_expect(full, sizeof(DeltaPlan));
                copy_bulk(plans + buffer, p.plans + index, sizeof(DeltaPlan), full);
            }
            for (int i = lane; i < GROUPS * C; i += 32) {
                const int group = i / C, t = i % C;
                const bool live = first + t < row.len;
                uint16_t* const to_row = values + buffer * VALUES + i * 8;
                const Bf16* const from_row =
                    v + row.at(live ? first + t : first) * e.dv + column_of_group(e, column, group);
                if constexpr (COLUMNS == 8) {
                    copy_async_16(to_row, from_row, live);
                } else {
                    copy_async_8(to_row, from_row, live);
                    copy_async_8(to_row + 4, from_row, live);
                }
            }
            copies_arrive(full);
            for (int half = 0; half < 2; half++) {
                barrier_wait(&barriers->read_empty[half], phase(n + 1));
                if (lane > 0) continue;
                Barrier* const arrived = &barriers->read_full[half];
                const int begin = DeltaLayout::pair(half, 0), count = (half ? PAIRS : DeltaLayout::pair(1, 0)) - begin;
                barrier_expect(arrived, QUERIES * 4 + WEIGHTS * 4 + count * 4);
                copy_bulk(queries + half * QUERIES / 4, p.queries + (index * 2 + half) * QUERIES, QUERIES * 4, arrived);
                copy_bulk(weights + half * WEIGHTS / 4, p.weights + (index * 2 + half) * WEIGHTS, WEIGHTS * 4, arrived);
                copy_bulk(pairs + begin, p.pairs + index * PAIRS + begin, count * 4, arrived);
            }
            barrier_wait(&barriers->transition_empty, phase(n + 1));
            if (lane == 0) {
                barrier_expect(&barriers->transition_full, TRANSITION * 2);
                copy_bulk(transition, p.transition + index * TRANSITION, TRANSITION * 2, &barriers->transition_full);
            }
            barrier_wait(&barriers->writes_empty, phase(n + 1));
            if (lane == 0) {
                barrier_expect(&barriers->writes_full, WRITES * 2);
                copy_bulk(writes, p.writes + index * WRITES, WRITES * 2, &barriers->writes_full);
            }
        }
    }

    // States by way of shared memory, where slots are read from, so that whole sectors of memory are touched: calls
    // f(place, k, column of the block, four columns) for all of them, and then puts these into the registers (`in`), or before
    // takes them from there. By both groups, half of the slots at a time; ends with a barrier of both.
    template <typename F>
    METHOD void exchange(float (&mine)[BLOCKS][WIDE], F f, bool in) const {
        constexpr int AT_ONCE = BLOCKS / 2, PLACES_AT_ONCE = AT_ONCE * PLACES;
        const int thread = threadIdx.x, warp = thread % GROUP / 32, g = thread % 32 / 4, c2 = thread % 4 * 2;
        float* const room = reinterpret_cast<float*>(slots);
        const auto move = [&](int pass) {
#pragma unroll
            for (int i = 0; i < AT_ONCE * 2; i++) {
                const int place = i / 2 * PLACES + (warp * 16 + i % 2 * 8 + g) / COLUMNS;
                float* const at = room + place * DK * WIDTH + c2 * WIDTH + thread / GROUP * COLUMNS + g % COLUMNS;
#pragma unroll
                for (int x = 0; x < WIDE / 2; x++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (half != pass) continue;
                        float& y = mine[half * AT_ONCE + i / 2][x / 2 * 4 + i % 2 * 2 + x % 2];
                        float& z = at[(x / 2 * 8 + x % 2) * WIDTH];
                        if (in) y = z;
                        else z = y;
                    }
            }
        };
#pragma unroll 1
        for (int pass = 0; pass < 2; pass++) {
            group_barrier(BOTH_GROUPS, GROUPS * GROUP);
            if (!in) {
                move(pass);
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
            }
            for (int i = thread; i < PLACES_AT_ONCE * DK * WIDTH / 4; i += GROUPS * GROUP) {
                float4& x = reinterpret_cast<float4*>(room)[i];
                const int row = i / (WIDTH / 4);
                f(pass * PLACES_AT_ONCE + row / DK, row % DK, i % (WIDTH / 4) * 4, x);
            }
            if (in) {
                copies_wait();
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
                move(pass);
            }
        }
        group_barrier(BOTH_GROUPS, GROUPS * GROUP);
    }

    METHOD void compute(const ScanDeltaSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, capacity = e.capacity;
        const int lane = lane_index(), warp = warp_index() % 4, g = lane / 4, c = lane % 4, c2 = c * 2;
        const int column0 = column_of_group(e, column, group);
        const int64_t entered = (first_chunk(row, HALF) + from / HALF) * e.value_heads + row.head;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), state = static_cast<int64_t>(dk) * dv;
        const bool resumed = from > 0;
        uint16_t* const own_slots = slots + group * SLOTS * COLUMNS * DK;

        // Element 4 n + 2 half + i of a block of slots: k = 8 n + c2 + i, column g % COLUMNS of place_of(block, half).
        float mine[BLOCKS][WIDE];
        const int first_place = (warp * 16 + g) / COLUMNS;
        const auto place_of = [&](int block, int half) { return first_place + block * PLACES + half * (8 / COLUMNS); };
        // Puts a warp's rows of a block where the read finds them.
        const auto publish = [&](int block) {
            uint16_t* const at = own_slots + (block * 8 + warp * 2 + lane / 8 % 2) * DK * 8 + (lane / 16 * 8 + lane % 8) * 8;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                uint32_t pack[4];
#pragma unroll
                for (int i = 0; i < 4; i++) pack[i] = pack_bf16(mine[block][step * 8 + i * 2], mine[block][step * 8 + i * 2 + 1]);
                stmatrix_x4_trans(at + step * 128, pack);
            }
        };

        // The slots that the window begins with; every other place zero, for a read multiplies them all.
        int held = 0;
        if (resumed) held = static_cast<int>(p.chunk_len[entered]);
        else if (p.initial_len) held = static_cast<int>(p.initial_len[row.index()]);
#pragma unroll
        for (int i = 0; i < BLOCKS * WIDE; i++) mine[i / WIDE][i % WIDE] = 0;
        if (held > 0) {
            const int thread = threadIdx.x;
            if (thread < held) slot_at[resumed ? p.chunk_place[entered * capacity + thread] : thread] = thread;
            const float* const in = (resumed ? p.states : p.initial_states) + row.index() * capacity * state + column;
            exchange(mine, [&](int place, int k, int at, float4& x) {
                const bool live = place < held && k < dk && column + at < dv;
                copy_async_16(&x, live ? in + slot_at[place] * state + static_cast<int64_t>(k) * dv + at : in, live);
            }, true);
        }
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) publish(block);
        fence_async();
        group_barrier(1 + group, GROUP);

        // This thread's part of o: two columns of tokens from row g on.
        Bf16* o_at = static_cast<Bf16*>(p.o) + row.at(from + warp * 16 + g) * dv + column0 + c2 % COLUMNS;
        const int chunks = to > from ? static_cast<int>((to - from + C - 1) / C) : 0;
        const int last_tokens = static_cast<int>(to - from - static_cast<int64_t>(chunks - 1) * C);  // of the last chunk
#pragma unroll 1
        for (int n = 0; n < chunks; n++) {
            const int buffer = n % 2;
            const uint16_t* const own_values = values + buffer * VALUES + group * C * 8;

            // Read.
            barrier_wait(&barriers->values_full[buffer], phase(n / 2));
            fence_async();  // V came by copies of threads
            const auto own_tokens = [&](float(&sum)[4], int half, int step) {
                wgmma_bf16_shared(sum, wgmma_operand_nk(pairs + DeltaLayout::pair(half, step), 1024),
                                  wgmma_operand(own_values + step * 128, 128));
            };
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
                float out[4] = {}, own[4] = {};
                barrier_wait(&barriers->read_full[half], phase(n));
                {
                    uint32_t q[STEPS][4];
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        const uint4 x = queries[half * QUERIES / 4 + (warp * STEPS + step) * 32 + lane];
                        q[step][0] = x.x, q[step][1] = x.y, q[step][2] = x.z, q[step][3] = x.w;
                    }
#pragma unroll
                    for (int block = 0; block < BLOCKS; block++) {
                        float read[32];  // the first product overwrites it
                        if (block == 0) {
                            // The chunk's own tokens.
                            wgmma_hold(own);
                            wgmma_begin();
#pragma unroll
                            for (int step = 0; step < 4; step++) own_tokens(own, half, step);
                            if (half > 0) {
                                wgmma_begin();
#pragma unroll
                                for (int step = 4; step < 8; step++) own_tokens(own, half, step);
                            }
                        }
                        wgmma_begin();
#pragma unroll
                        for (int step = 0; step < STEPS; step++)
                            wgmma_bf16(read, q[step], wgmma_operand(own_slots + block * 64 * DK + step * 128, DK * 16), step > 0);
                        wgmma_commit();
                        // Before the wait: the products take longer.
                        float4 w[2][2];
#pragma unroll
                        for (int quad = 0; quad < 2; quad++) {
                            const int which = COLUMNS == 8 ? block * 2 + quad : block * 4 + quad * 2 + c / 2;
                            const float4* const at = weights + half * WEIGHTS / 4 + (warp * QUADS + which) * 16 + g;
                            w[quad][0] = at[0], w[quad][1] = at[8];
                        }
                        wgmma_wait();
                        wgmma_hold(read);
                        if (block == 0) wgmma_hold(own);
#pragma unroll
                        for (int quad = 0; quad < 2; quad++)
#pragma unroll
                            for (int x = 0; x < 4; x++) {
                                const float4 of = w[quad][x / 2];
                                const float* const y = read + quad * 16 + x;
                                out[x] += of.x * y[0], out[x] += of.y * y[4], out[x] += of.z * y[8], out[x] += of.w * y[12];
                            }
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(&barriers->read_empty[half]);
                if constexpr (COLUMNS == 4) {
#pragma unroll
                    for (int x = 0; x < 4; x++) out[x] += __shfl_xor_sync(ALL, out[x], 2);
                }
#pragma unroll
                for (int x = 0; x < 4; x++) out[x] += own[x];
                // From this thread's first row on.
                const int thread = opaque(static_cast<int>(threadIdx.x));  // found anew: no register kept
                const bool stores = column + thread / GROUP * COLUMNS < dv;
                const int tokens =
                    (n + 1 < chunks ? C : last_tokens) - half * HALF - thread % GROUP / 32 * 16 - thread % 32 / 4;
                const int64_t row8 = static_cast<int64_t>(opaque(e.value_heads)) * (dv * 8);  // eight tokens on; no register kept
                if constexpr (COLUMNS == 4) {
                    const bool lower = c >= 2;
                    if (stores && (lower ? 8 : 0) < tokens)
                        *reinterpret_cast<uint32_t*>(o_at + (lower ? row8 : 0)) =
                            lower ? pack_bf16(out[2], out[3]) : pack_bf16(out[0], out[1]);
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (stores && i * 8 < tokens)
                            *reinterpret_cast<uint32_t*>(o_at + i * row8) = pack_bf16(out[i * 2], out[i * 2 + 1]);
                }
                o_at += row8 * 8;
            }

            // The slots that merge away. They are handed over where the slots are read from, once all are.
            const DeltaPlan& plan = plans[buffer];
            const int merges = static_cast<int>(plan.merges);
            float4* const stage = reinterpret_cast<float4*>(own_slots) + g % COLUMNS * 4 + c;
            uint32_t merged[BLOCKS][2];  // the slot's number, if it goes; from where and to where others merge into it
#pragma unroll
            for (int i = 0; i < BLOCKS * 2; i++) {
                const int place = place_of(i / 2, i % 2);
                merged[i / 2][i % 2] = plan.gone[place] | plan.merged_from[place] << 8 | plan.merged_to[place] << 16;
            }
#pragma unroll 1
            for (int staged_from = 0; staged_from < merges; staged_from += STAGED) {
                group_barrier(1 + group, GROUP);
#pragma unroll
                for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int number = static_cast<int>(merged[block][half] & 0xff) - staged_from;
                        if (number < 0 || number >= STAGED) continue;
#pragma unroll
                        for (int i = 0; i < STEPS; i++) {
                            float* const x = &mine[block][i * 8 + half * 2];
                            stage[number * SLOT + i * COLUMNS * 4] = make_float4(x[0], x[1], x[4], x[5]);
                            x[0] = x[1] = x[4] = x[5] = 0;
                        }
                    }
                __syncwarp();
                group_barrier(1 + group, GROUP);
                // Those that merge into one slot are added up by the whole group, into the first of them.
                const int count = merges - staged_from < STAGED ? merges - staged_from : STAGED;
                const uint32_t firsts = plan.firsts >> staged_from | 1;
                for (int i = threadIdx.x % GROUP; i < SLOT; i += GROUP) {
                    float4* const at = reinterpret_cast<float4*>(own_slots) + i;
                    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
                    for (int number = count - 1; number >= 0; number--) {
                        const float4 x = at[number * SLOT];
                        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
                        if (firsts >> number & 1) at[number * SLOT] = sum, sum = make_float4(0, 0, 0, 0);
                    }
                }
                group_barrier(1 + group, GROUP);
#pragma unroll
                for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int number = static_cast<int>(merged[block][half] >> 8 & 0xff) - staged_from;
                        if (number < 0) number = 0;
                        if (number >= count || number >= static_cast<int>(merged[block][half] >> 16) - staged_from) continue;
#pragma unroll
                        for (int i = 0; i < STEPS; i++) {
                            const float4 y = stage[number * SLOT + i * COLUMNS * 4];
                            float* const x = &mine[block][i * 8 + half * 2];
                            x[0] += y.x, x[1] += y.y, x[4] += y.z, x[5] += y.w;
                        }
                    }
                __syncwarp();
            }

            // Transition and write. V's fragments as right operands of 16 tokens and V^T's as left ones, of both rows of a thread,
            // are alike. Of a block only the steps of 16 tokens of which some end in it are multiplied; every warp finds the same.
            const float decay = plan.decay;
            const int writer = opaque(static_cast<int>(threadIdx.x)) % 32;  // the lane, kept by no register through the read
            barrier_wait(&barriers->transition_full, phase(n));
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                uint32_t a[STEPS][4];
#pragma unroll
                for (int i = 0; i < WIDE / 2; i++) a[i / 4][i % 4] = pack_bf16(mine[block][i * 2], mine[block][i * 2 + 1]);
#pragma unroll
                for (int i = 0; i < WIDE; i++) mine[block][i] *= decay;
                wgmma_hold(mine[block]);
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    wgmma_bf16(mine[block], a[step], wgmma_operand(transition + step * 128, DK * 16), 1);
                wgmma_commit();
                if (block == 0) {
                    // Nothing is read where slots are published.
                    group_barrier(1 + group, GROUP);
                } else {
                    publish(block - 1);
                }
                int begin[2];
                uint32_t count[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int place = place_of(block, half);
                    begin[half] = c2 - plan.tokens_from[place];
                    count[half] = static_cast<uint32_t>(plan.tokens_to[place] - plan.tokens_from[place]);
                }
                if (block == 0) barrier_wait(&barriers->writes_full, phase(n));
                uint32_t todo;
                {
                    const uint32_t begins = plan.tokens_from[writer], ends = plan.tokens_to[writer];
                    const bool any = begins < ends && writer / PLACES == block;
                    todo = __reduce_or_sync(ALL, any ? (2u << (ends - 1) / 16) - (1u << begins / 16) : 0);
                }
                // Two steps a round, zeros where one is left; the next round's operands are made under the products of this one.
                int step[2];
                uint32_t tokens[2][4];
                const auto take = [&](int(&to_step)[2], uint32_t(&to)[2][4]) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const bool any = todo != 0;
                        to_step[i] = any ? __ffs(todo) - 1 : 0;
                        todo &= todo - 1;
                        uint32_t v[4];  // both matrices twice
                        ldmatrix_x4_trans(v, own_values + (to_step[i] * 16 + writer % 16) * 8);
#pragma unroll
                        for (int x = 0; x < 4; x++) {
                            const uint32_t at = static_cast<uint32_t>(to_step[i] * 16 + x / 2 * 8 + begin[x % 2]);
                            const uint32_t live = any ? count[x % 2] : 0;
                            to[i][x] = v[x / 2] & ((at < live ? 0xffffu : 0u) | (at + 1 < live ? 0xffff0000u : 0u));
                        }
                    }
                };
                bool more = todo != 0;
                take(step, tokens);
                hold(tokens);
                wgmma_wait();
                wgmma_hold(mine[block]);
                const auto round = [&](const int(&now)[2], uint32_t(&left)[2][4], int(&then)[2], uint32_t(&next)[2][4]) {
                    hold(left);
                    wgmma_begin();
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        wgmma_bf16(mine[block], left[i], wgmma_operand(writes + now[i] * 128, C * 16), 1);
                    wgmma_commit();
                    more = todo != 0;
                    if (more) {
                        take(then, next);
                        hold(next);
                    }
                    wgmma_wait();
                    wgmma_hold(mine[block]);
                };
#pragma unroll 1
                while (more) {
                    int next_step[2];
                    uint32_t next[2][4];
                    round(step, tokens, next_step, next);
                    if (!more) break;
                    round(next_step, next, step, tokens);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->transition_empty);
            publish(BLOCKS - 1);
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->values_empty[buffer]), barrier_arrive(&barriers->writes_empty);
            fence_async();
            group_barrier(1 + group, GROUP);
        }

        // The states, for the cache and the next window alike. Nothing of the above is kept for it in registers.
        if (!p.states) return;
        const Slice end = slice_of(p, opaque(static_cast<int>(blockIdx.x)));
        const int thread = opaque(static_cast<int>(threadIdx.x));
        int left = 0;
        if (end.to > p.from) {
            const int64_t last = first_of_window(e, end.row, p.from, p.to, C) + (end.to - p.from - 1) / C;
            const DeltaPlan& plan = p.plans[last * e.value_heads + end.row.head];
            left = static_cast<int>(plan.exit_len);
            if (thread < left) slot_at[plan.exit_place[thread]] = thread;
        } else if (p.initial_len) {
            left = static_cast<int>(p.initial_len[end.row.index()]);
            if (thread < left) slot_at[thread] = thread;
        }
        const int64_t size = static_cast<int64_t>(e.dk) * e.dv;
        float* const out = p.states + end.row.index() * e.capacity * size + end.column;
        exchange(mine, [&](int place, int k, int at, float4& x) {
            if (place >= e.capacity || k >= e.dk || end.column + at >= e.dv) return;
            const bool used = place < left;
            *reinterpret_cast<float4*>(out + (used ? slot_at[place] : place) * size + static_cast<int64_t>(k) * e.dv + at) =
                used ? x : make_float4(0, 0, 0, 0);
        }, false);
    }
};

template <int DK, int SLOTS, int COLUMNS>
DEVICE void scan_delta_sm90(const ScanDeltaSm90Params& p) {
    const Slice slice = Scan<DK, SLOTS, COLUMNS>::slice_of(p, static_cast<int>(blockIdx.x));
    if (p.from > 0 && slice.row.len <= p.from) return;

    Carve carve{dynamic_shared()};
    Scan<DK, SLOTS, COLUMNS> scan;
    scan.take(carve);
    if (threadIdx.x == 0) scan.init_barriers();
    __syncthreads();
    const int group = warp_index() / 4;
    if (group == GROUPS) {
        registers_fewer<40>();
        if (warp_index() == 4 * GROUPS) scan.bring(p, slice.row, slice.column, p.from, slice.to);
    } else {
        registers_more<232>();
        scan.compute(p, slice.row, group, slice.column, p.from, slice.to);
    }
}

}  // namespace
}  // namespace dla

// Head size as computed, slots, columns of a group: as many as its registers hold, 8 at most. Registers a thread
// (nvcc 13.0.88, sm_90a, no spills, no stack): 168 at launch, then 232 in the groups and 40 beside them.
#define SCAN_DELTA_SM90(DK, SLOTS, COLUMNS)                                                                    \
    KERNEL BLOCK_OF(384) scan_delta_sm90_##DK##_##SLOTS(const __grid_constant__ dla::ScanDeltaSm90Params p) { \
        dla::scan_delta_sm90<DK, SLOTS, COLUMNS>(p);                                                           \
    }
SCAN_DELTA_SM90(64, 16, 8)
SCAN_DELTA_SM90(64, 32, 8)
SCAN_DELTA_SM90(128, 16, 8)
SCAN_DELTA_SM90(128, 32, 4)
