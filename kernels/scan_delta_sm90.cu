// scan on Hopper, gated delta rule, bf16: reads all slots, then merge, transition and append (OPERATOR.md, section 4).
//
//   O = sum_j diag(w[:,j]) Qt S_j + (P . Lambda) V
//   S'_i = e^{Gamma_C} S + F S + sum over r that end in i of Kh_r v_r^T,  S = sum over j that end in i of S_j,  F = -Kd^T W
//
// A block has 8 columns of dv and all slots of them: two groups of 128 threads with half of the slots each, and a warp
// that brings what they read. Grid: N HV x dv / 8, slices of a row next to each other.
//
// A state is in f32 in the registers of the warp that owns it, transposed: the accumulators of the product that lets it
// pass, which adds to them. 8 slots of a group are one m64: warp w has slots 2 w (rows 0 to 7) and 2 w + 1. Rounded to bf16, a
// state is in shared memory too, as right operand of the read.
//
// Read. Qt in registers, 8 slots a product: m64n64k16, dk / 16 steps. A thread's accumulators 4 j .. 4 j + 3 are slot
// j's, so the sum over slots is arithmetic inside the thread; the groups' parts are added through shared memory, half of
// the tokens in each group, and (P . Lambda) V by mma, while the transition runs.
// Merge. Slots that merge away are handed over through shared memory, STAGED at a time.
// Transition and write, of 8 slots: m64n(dk)k16, dk / 16 steps with F, and one in two planes with Kh for each 16 tokens of
// which some end here; left operands S^T and V^T, the latter masked by slot. Only operands are rounded.
//
// F, and not W and Kd one after the other: as many clocks, one wait less, no rounding of W S, and no registers for W S, so that
// the states fit there. In registers a state costs two instructions an element and chunk; as 16 + 8 bits in shared memory
// it would cost about ten, 2,800 clocks of every scheduler.
//
// Shared memory (bytes; D = dk as computed, M = SLOTS): slots M D 16; F of two chunks D D 4; Kh 256 D; Qt 128 D; weights 256 M;
// V 2,048; parts of O 4,096; plans 416; merging 256 D; barriers 64. D = 128, M = 32: 227,808.
// Floor, not measured: clocks of the tensor cores a chunk and block at D = 128, M = 32: read 1,024, transition 2,048, write 128
// for each 16 tokens and 8 slots where they meet, 512 to 2,048, about 1,280 where every token opens a slot: 4,350. At S3
// 256 blocks on 132 multiprocessors: two rounds of 512 chunks, 2.5 ms. Through L2 come 97 KB a chunk and block, so 22 bytes
// a clock and multiprocessor.
// Numerics: operands bf16, Kh in two planes, sums and states f32. On the emulator, dk = 128, 1,024 tokens without
// decay, o is off by up to 3.1e-3, states by 1.8e-3 (simulated with Kh in one plane: 3.5e-3 and 2.3e-3).

#include "common/delta.cuh"
#include "common/hopper.cuh"
#include "common/row.cuh"

namespace dla {
namespace {

constexpr int GROUP = 128;    // threads of a group
constexpr int GROUPS = 2;
constexpr int COLUMNS = 8;    // of dv
constexpr int STAGED = 4;     // slots that merge away at once
constexpr int BOTH_GROUPS = 3;  // a barrier; 1 and 2 are the groups'

DEVICE uint32_t phase(int64_t uses) { return static_cast<uint32_t>(uses & 1); }

// Bits of an operand's pair whose tokens (bit 0, bit 1 of `in`) are in.
DEVICE uint32_t mask_of(uint32_t in) { return (in & 1 ? 0xffffu : 0u) | (in & 2 ? 0xffff0000u : 0u); }

template <int DK, int SLOTS>
struct Scan {
    static constexpr int C = Bf16::CHUNK, STEPS = DK / 16;
    static constexpr int WIDE = DK / 2;                // accumulators of 8 slots
    static constexpr int EIGHTS = SLOTS / 8 / GROUPS;  // of a group's slots
    static constexpr int OWN = EIGHTS * 2;             // slots of a warp
    static constexpr int QUADS = SLOTS / 4;
    static constexpr int PLANES = DeltaLayout::WRITE_PLANES;
    static constexpr int QUERIES = DeltaLayout{DK}.queries(), TRANSITION = DeltaLayout{DK}.transition();
    static constexpr int WRITES = DeltaLayout{DK}.writes();

    // `full` when the copies have come, `empty` when every warp that reads them has.
    struct Barriers {
        Barrier read_full, early_full[2], late_full;     // Qt and weights; F, V and plan; Kh
        Barrier read_empty, early_empty[2], late_empty;
    };

    uint16_t* slots;        // [SLOTS][DK][8]
    uint16_t* transition;   // [2][DK / 8][DK][8]
    uint16_t* writes;       // [PLANES][DK / 8][C][8]
    uint4* queries;
    float4* weights;
    uint16_t* values;       // [2][C][8]
    float4* parts;          // [2][4][32] of O
    DeltaPlan* plans;       // [2]
    float4* staged;         // [2][STAGED][DK / 16][32]
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        slots = carve.take<uint16_t>(SLOTS * DK * COLUMNS);
        transition = carve.take<uint16_t>(2 * TRANSITION);
        writes = carve.take<uint16_t>(WRITES);
        queries = carve.take<uint4>(QUERIES / 4);
        weights = carve.take<float4>(C * QUADS);
        values = carve.take<uint16_t>(2 * C * COLUMNS);
        parts = carve.take<float4>(2 * GROUP);
        plans = carve.take<DeltaPlan>(2);
        staged = carve.take<float4>(2 * STAGED * DK * 2);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    METHOD void init_barriers() const {
        barrier_init(&barriers->read_full, 1);
        barrier_init(&barriers->early_full[0], 33), barrier_init(&barriers->early_full[1], 33);
        barrier_init(&barriers->late_full, 1);
#pragma unroll
        for (int i = 0; i < 4; i++) barrier_init(&barriers->read_empty + i, 4 * GROUPS);
        fence_barriers();
    }

    // The warp that brings what a chunk needs: whole pieces as prepare left them, by one lane, and V.
    METHOD void bring(const ScanDeltaSm90Params& p, const Row& row, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int lane = lane_index();
        const Bf16* const v = static_cast<const Bf16*>(p.v);
        const int64_t place0 = first_of_window(e, row, from, p.to, C), chunks = to > from ? (to - from + C - 1) / C : 0;
        const auto early = [&](int64_t n) {
            const int64_t first = from + n * C, index = (place0 + n) * e.value_heads + row.head;
            const int buffer = n % 2;
            Barrier* const full = &barriers->early_full[buffer];
            barrier_wait(&barriers->early_empty[buffer], phase(n / 2 + 1));
            if (lane == 0) {
                barrier_expect(full, TRANSITION * 2 + sizeof(DeltaPlan));
                copy_bulk(transition + buffer * TRANSITION, p.transition + index * TRANSITION,
                          TRANSITION * 2, full);
                copy_bulk(plans + buffer, p.plans + index, sizeof(DeltaPlan), full);
            }
#pragma unroll
            for (int t = lane; t < C; t += 32) {
                const bool live = first + t < row.len;
                copy_async_16(values + (buffer * C + t) * COLUMNS, v + row.at(live ? first + t : first) * e.dv + column, live);
            }
            copies_arrive(full);
        };
        if (chunks > 0) early(0);
        for (int64_t n = 0; n < chunks; n++) {
            const int64_t index = (place0 + n) * e.value_heads + row.head;
            barrier_wait(&barriers->read_empty, phase(n + 1));
            if (lane == 0) {
                barrier_expect(&barriers->read_full, QUERIES * 4 + C * SLOTS * 4);
                copy_bulk(queries, p.queries + index * QUERIES, QUERIES * 4, &barriers->read_full);
                copy_bulk(weights, p.weights + index * C * SLOTS, C * SLOTS * 4, &barriers->read_full);
            }
            barrier_wait(&barriers->late_empty, phase(n + 1));
            if (lane == 0) {
                barrier_expect(&barriers->late_full, WRITES * 2);
                copy_bulk(writes, p.writes + index * WRITES, WRITES * 2, &barriers->late_full);
            }
            if (n + 1 < chunks) early(n + 1);
        }
    }

    METHOD uint16_t* slot(int place, int k) const { return slots + (place * DK + k) * COLUMNS; }

    // Puts a warp's two slots, from `place` on, where the read finds them.
    METHOD void publish(const float (&state)[WIDE], int place) const {
        const int lane = lane_index();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = pack_bf16(state[step * 8 + i * 2], state[step * 8 + i * 2 + 1]);
            stmatrix_x4_trans(slot(place + lane / 8 % 2, step * 16 + lane / 16 * 8 + lane % 8), pairs);
        }
    }

    METHOD void compute(const ScanDeltaSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, capacity = e.capacity;
        const int lane = lane_index(), warp = warp_index() % 4, g = lane / 4, c2 = lane % 4 * 2;
        const int64_t entered = (first_chunk(row, C) + from / C) * e.value_heads + row.head;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), state = static_cast<int64_t>(dk) * dv;
        float* const states = p.states ? p.states + row.index() * capacity * state : nullptr;
        const bool finishes = warp / 2 == group;  // the tokens of this warp's rows, for both groups

        // Element 4 n + 2 half + i of eight slots: k = 8 n + c2 + i, column g of place_of(2 eight + half).
        float mine[EIGHTS][WIDE];
        const auto place_of = [&](int own) { return (group * EIGHTS + own / 2) * 8 + warp * 2 + own % 2; };

        // The slots that the window begins with; every other place zero, for a read multiplies them all.
        const bool resumed = from > 0;
        int held = 0;
        if (resumed) held = static_cast<int>(p.chunk_len[entered]);
        else if (p.initial_len) held = static_cast<int>(p.initial_len[row.index()]);
#pragma unroll
        for (int i = 0; i < EIGHTS * WIDE; i++) mine[i / WIDE][i % WIDE] = 0;
#pragma unroll 1
        for (int i = 0; i < held; i++) {
            const float* const in = resumed ? states + i * state : p.initial_states + (row.index() * capacity + i) * state;
            const int place = resumed ? p.chunk_place[entered * capacity + i] : i;
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                if (place != place_of(own)) continue;
#pragma unroll
                for (int n = 0; n < WIDE / 2; n++) {
                    const int k = n / 2 * 8 + c2 + n % 2;
                    if (k < dk) mine[own / 2][n / 2 * 4 + own % 2 * 2 + n % 2] = in[static_cast<int64_t>(k) * dv + column + g];
                }
            }
        }
#pragma unroll
        for (int eight = 0; eight < EIGHTS; eight++) publish(mine[eight], place_of(eight * 2));
        fence_async();
        group_barrier(1 + group, GROUP);

        // Where a chunk's pairs and this thread's first part of o are, and the tokens from there on.
        const uint4* pairs_at = reinterpret_cast<const uint4*>(p.pairs) +
                                ((place0 * e.value_heads + row.head) * 10 + warp * (warp + 1) / 2) * 32 + lane;
        Bf16* o_at = static_cast<Bf16*>(p.o) + row.at(from + warp * 16 + g) * dv + column + c2;
        int64_t tokens_left = row.len - from - warp * 16 - g;
        const int chunks = to > from ? static_cast<int>((to - from + C - 1) / C) : 0;
        uint32_t rounds = 0;
#pragma unroll 1
        for (int n = 0; n < chunks; n++) {
            const int buffer = n % 2;

            // Read.
            float out[4] = {};
            barrier_wait(&barriers->read_full, phase(n));
            {
                uint32_t q[STEPS][4];
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    const uint4 x = queries[DeltaLayout{DK}.query(warp, step, lane)];
                    q[step][0] = x.x, q[step][1] = x.y, q[step][2] = x.z, q[step][3] = x.w;
                }
#pragma unroll
                for (int eight = 0; eight < EIGHTS; eight++) {
                    float read[32];  // the first product overwrites it
                    wgmma_begin();
#pragma unroll
                    for (int step = 0; step < STEPS; step++)
                        wgmma_bf16(read, q[step], wgmma_operand(slot((group * EIGHTS + eight) * 8, step * 16), DK * 16),
                                   step > 0);
                    wgmma_commit();
                    wgmma_wait();
                    wgmma_hold(read);
#pragma unroll
                    for (int quad = 0; quad < 2; quad++) {
                        const float4* const at = weights + (warp * QUADS + (group * EIGHTS + eight) * 2 + quad) * 16 + g;
                        const float4 top = at[0], bottom = at[8];
                        const float w[2][4] = {{top.x, top.y, top.z, top.w}, {bottom.x, bottom.y, bottom.z, bottom.w}};
#pragma unroll
                        for (int i = 0; i < 4; i++)
#pragma unroll
                            for (int x = 0; x < 4; x++) out[x] += w[x / 2][i] * read[(quad * 4 + i) * 4 + x];
                    }
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->read_empty);

            // The other group's half of the tokens; the slots that merge away. What is written here was last read before the
            // barrier before last.
            if (!finishes) parts[buffer * GROUP + warp * 32 + lane] = make_float4(out[0], out[1], out[2], out[3]);
            barrier_wait(&barriers->early_full[buffer], phase(n / 2));
            const DeltaPlan& plan = plans[buffer];
            const int merges = static_cast<int>(plan.merges);
            int staged_from = 0;
#pragma unroll 1
            do {
                float4* const stage = staged + (rounds++ % 2) * STAGED * DK * 2 + lane;
#pragma unroll
                for (int own = 0; own < OWN; own++) {
                    const int number = plan.gone[place_of(own)] - staged_from;
                    if (number < 0 || number >= STAGED) continue;
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        float* const x = &mine[own / 2][i * 8 + own % 2 * 2];
                        stage[(number * STEPS + i) * 32] = make_float4(x[0], x[1], x[4], x[5]);
                        x[0] = x[1] = x[4] = x[5] = 0;
                    }
                }
                group_barrier(BOTH_GROUPS, GROUPS * GROUP);
#pragma unroll
                for (int own = 0; own < OWN; own++) {
                    int number = plan.merged_from[place_of(own)] - staged_from;
                    int end = plan.merged_to[place_of(own)] - staged_from;
                    number = number > 0 ? number : 0, end = end < STAGED ? end : STAGED;
#pragma unroll 1
                    for (; number < end; number++) {
#pragma unroll
                        for (int i = 0; i < STEPS; i++) {
                            const float4 y = stage[(number * STEPS + i) * 32];
                            float* const x = &mine[own / 2][i * 8 + own % 2 * 2];
                            x[0] += y.x, x[1] += y.y, x[4] += y.z, x[5] += y.w;
                        }
                    }
                }
                staged_from += STAGED;
            } while (staged_from < merges);

            // Transition and write. V's fragments are right operands of 16 tokens and V^T's, of both slots, alike.
            uint32_t v[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++)
                ldmatrix_x4_trans(v[half], values + (buffer * C + half * 32 + lane) * COLUMNS);
            const uint16_t* const f = transition + buffer * TRANSITION;
#pragma unroll
            for (int eight = 0; eight < EIGHTS; eight++) {
                uint32_t a[STEPS][4];
#pragma unroll
                for (int i = 0; i < WIDE / 2; i++) a[i / 4][i % 4] = pack_bf16(mine[eight][i * 2], mine[eight][i * 2 + 1]);
                const float decay = plan.decay;
#pragma unroll
                for (int i = 0; i < WIDE; i++) mine[eight][i] *= decay;
                uint64_t in[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int place = place_of(eight * 2 + half);
                    const int begin = plan.tokens_from[place], end = plan.tokens_to[place];
                    in[half] = end > begin ? ~uint64_t{0} >> (64 - (end - begin)) << begin : 0;
                }
                const uint32_t steps = plan.steps[group * EIGHTS + eight];
                if (eight == 0) barrier_wait(&barriers->late_full, phase(n));
                wgmma_hold(mine[eight]);
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    wgmma_bf16(mine[eight], a[step], wgmma_operand(f + step * 128, DK * 16), 1);
                wgmma_commit();

                if (eight > 0) {
                    publish(mine[eight - 1], place_of(eight * 2 - 2));
                } else if (finishes) {
                    // The chunk's own tokens; o.
                    uint4 pairs[4];
#pragma unroll
                    for (int s = 0; s < 4; s++)
                        if (s <= warp)
                            pairs[s] = pairs_at[s * 32];
                    const float4 other = parts[buffer * GROUP + warp * 32 + lane];
                    out[0] += other.x, out[1] += other.y, out[2] += other.z, out[3] += other.w;
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        if (s > warp) continue;
                        const uint32_t left[4] = {pairs[s].x, pairs[s].y, pairs[s].z, pairs[s].w};
                        mma_bf16(out, left, v[s / 2][s % 2 * 2], v[s / 2][s % 2 * 2 + 1]);
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (half * 8 < tokens_left)
                            *reinterpret_cast<uint32_t*>(o_at + static_cast<int64_t>(half * 8) * e.value_heads * dv) =
                                pack_bf16(out[half * 2], out[half * 2 + 1]);
                }
                wgmma_wait();
                wgmma_hold(mine[eight]);
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    if (!(steps >> s & 1)) continue;
                    uint32_t tokens[4];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        tokens[i] = v[s / 2][s % 2 * 2 + i / 2] &
                                    mask_of(static_cast<uint32_t>(in[i % 2] >> (s * 16 + i / 2 * 8 + c2)));
                    // A wait each: products in flight across a branch would be serialised.
                    wgmma_begin();
#pragma unroll
                    for (int plane = PLANES - 1; plane >= 0; plane--)
                        wgmma_bf16(mine[eight], tokens, wgmma_operand(writes + plane * C * DK + s * 128, C * 16), 1);
                    wgmma_commit();
                    wgmma_wait();
                    wgmma_hold(mine[eight]);
                }
            }
            publish(mine[EIGHTS - 1], place_of(OWN - 2));
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->early_empty[buffer]), barrier_arrive(&barriers->late_empty);
            fence_async();
            group_barrier(1 + group, GROUP);
            pairs_at += e.value_heads * 10 * 32;
            o_at += static_cast<int64_t>(C) * e.value_heads * dv;
            tokens_left -= C;
        }

        // The states, for the cache and the next window alike.
        if (!states) return;
        const DeltaPlan* last = nullptr;
        if (chunks > 0) {
            last = p.plans + (place0 + chunks - 1) * e.value_heads + row.head;
            held = static_cast<int>(last->exit_len);
        }
#pragma unroll 1
        for (int i = 0; i < capacity; i++) {
            const int place = i >= held ? i : last ? last->exit_place[i] : i;
            const bool used = i < held;
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                if (place != place_of(own)) continue;
#pragma unroll
                for (int x = 0; x < WIDE / 2; x++) {
                    const int k = x / 2 * 8 + c2 + x % 2;
                    if (k < dk)
                        states[i * state + static_cast<int64_t>(k) * dv + column + g] =
                            used ? mine[own / 2][x / 2 * 4 + own % 2 * 2 + x % 2] : 0.0f;
                }
            }
        }
    }
};

template <int DK, int SLOTS>
DEVICE void scan_delta_sm90(const ScanDeltaSm90Params& p) {
    const Extents& e = p.extents;
    const int slices = e.dv / COLUMNS, column = blockIdx.x % slices * COLUMNS;
    const int64_t index = blockIdx.x / slices;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (p.from > 0 && row.len <= p.from) return;
    const int64_t to = row.len < p.to ? row.len : p.to;

    Carve carve{dynamic_shared()};
    Scan<DK, SLOTS> scan;
    scan.take(carve);
    if (threadIdx.x == 0) scan.init_barriers();
    __syncthreads();
    const int group = warp_index() / 4;
    if (group == GROUPS) {
        registers_fewer<40>();
        if (warp_index() == 4 * GROUPS) scan.bring(p, row, column, p.from, to);
    } else {
        registers_more<232>();
        scan.compute(p, row, group, column, p.from, to);
    }
}

}  // namespace
}  // namespace dla

// Head size as computed, slots. Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): 168 at launch, then 232 in the
// groups and 40 beside them.
#define SCAN_DELTA_SM90(DK, SLOTS)                                                                              \
    KERNEL BLOCK_OF(384) scan_delta_sm90_##DK##_##SLOTS(const __grid_constant__ dla::ScanDeltaSm90Params p) { \
        dla::scan_delta_sm90<DK, SLOTS>(p);                                                                     \
    }
SCAN_DELTA_SM90(64, 16)
SCAN_DELTA_SM90(64, 32)
SCAN_DELTA_SM90(128, 16)
SCAN_DELTA_SM90(128, 32)
