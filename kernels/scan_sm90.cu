// scan on Hopper, gated, bf16: reads all slots, then transition, merge and append (OPERATOR.md, section 4).
//
//   O = sum_j diag(w[:,j]) Q S_j + (P . Lambda) V
//   S'_i = sum over j that end in i of decay_j S_j + sum over s that end in i of decay_s k_s v_s^T
//
// A block has WARPGROUPS groups of 128 threads, each with 8 columns of dv and all slots of them, and four warps that
// bring what they read (and leave their registers to two groups). Grid: N HV x dv / (8 WARPGROUPS), slices of a row next
// to each other.
//
// Read. The slots are one operand [dk][8 SLOTS] in shared memory: a chunk of 64 tokens is a chain of dk / 16
// wgmma m64n(8 SLOTS)k16 with Q in registers. A thread's accumulators 4 j .. 4 j + 3 are slot j's, so the sum over slots
// is arithmetic inside the thread; (P . Lambda) V is added by mma. Where there are two groups they take turns at
// the tensor cores: while one reads, the other sums and writes.
// Write. Only slots that the chunk changes are touched (by the plan; 3 of 30 under mass, 9 under density, where every
// token opens one): first what merges, all warps on the same, then K^T V by mma, a slot's tokens masked in, a slot a warp.
// (Measured: with four warps at every slot's tokens, or one warp at all that a slot merges, a chunk took 6,500 clocks more than
// without writes.)
//
// Slots stand in places and never move. A state is kept relative to the chunk in which it was last written; its decay since
// is in the weights. It has 16 bits of mantissa: the upper 8 are the operand, a bf16 rounded to nearest; the others,
// signed, a plane of bytes. So a slot that merges in every chunk loses 2^-17 each time, not 2^-9.
//
// Rows of dk stand as a thread's 8-byte loads of Q want them: of 16, row 4 c + e at 2 c + e (e < 2) or 2 c + e + 6.
//
// Shared memory (bytes; W = WARPGROUPS): slots W SLOTS dk 24; weights 256 SLOTS to a multiple of 4; a stage, one or two: K
// 128 dk, V W 1024, plan 1,104; barriers 64. At dk = 128: 30 slots, W = 2: 231,648.
// Floor: 2 dk SLOTS 8 x 64 FLOP a group and chunk, 1,024 clocks of the tensor cores at dk = 128, M = 30.
// Numerics: q, k exact, states bf16 in the read, P . Lambda bf16, v with its decay in two planes; sums f32.

#include "common/hopper.cuh"
#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int GROUP = 128;     // threads of a group
constexpr int COLUMNS = 8;     // of dv, a group
constexpr int BRINGING = 128;  // threads that bring a chunk's rows
constexpr int PLAN = 1104;     // bytes of a plan that every chunk needs
constexpr int NO_STATE = 255;  // exit_place of a slot without a state

DEVICE uint32_t phase(int64_t uses) { return static_cast<uint32_t>(uses & 1); }

// A matrix [64][DK] of bf16, its 16-byte units permuted within a row so that eight rows' same unit lie in
// different banks.
template <int DK>
struct Rows {
    uint16_t* data;
    METHOD uint16_t* unit(int row, int unit) const { return data + row * DK + (unit ^ (row & 7)) * 8; }
};

// The slots of a group, element (k, column) of a place: the upper half in two planes, of 16 rows of k those that stand first
// in a step of the product and the others, each [place][step][8][8]; the second plane 64 bytes off, so that a warp's rows lie
// in different banks. The lower bytes as their threads have them.
// A thread's: of the warp's tiles of 16 rows, rows g and g + 8, columns 2 c and 2 c + 1.
template <int DK, int SLOTS>
struct Slots {
    static constexpr int SHARE = DK / 64;                  // tiles of a warp
    static constexpr int OTHERS = SLOTS * DK * 8 + 64;     // second plane
    static constexpr int LOWER = 2 * SLOTS * DK * 8 + 64;
    static constexpr int BYTES = SLOTS * DK * 24 + 64;

    unsigned char *all, *upper, *lower;  // of the group; of the thread

    METHOD static Slots of(unsigned char* all, int warp, int g, int c) {
        // Row 4 i + e of 16 is thread i's element e of its 8-byte load of Q.
        const int stands = (g % 4 < 2 ? 0 : OTHERS) + (g / 4 * 2 + g % 2) * 16;
        return {all, all + stands + warp * SHARE * 128 + c * 4, all + LOWER + (warp * 32 + g * 4 + c) * SHARE * 4};
    }

    // Elements 4 tile + 2 half + n. With 0x8080 added to an f32's bits the upper half is the bf16 nearest to it, and the next
    // byte what is left, less 0x80.
    METHOD void load(int place, float (&x)[SHARE * 4]) const {
        const unsigned char* const from = upper + place * DK * 8;
        const unsigned char* const low_from = lower + place * DK * 8;
        uint32_t low[SHARE];
        if constexpr (SHARE == 4) {
            const uint4 all = *reinterpret_cast<const uint4*>(low_from);
            low[0] = all.x, low[1] = all.y, low[2] = all.z, low[3] = all.w;
        } else if constexpr (SHARE == 2) {
            const uint2 all = *reinterpret_cast<const uint2*>(low_from);
            low[0] = all.x, low[1] = all.y;
        } else {
            low[0] = *reinterpret_cast<const uint32_t*>(low_from);
        }
#pragma unroll
        for (int tile = 0; tile < SHARE; tile++) {
            const uint32_t top = *reinterpret_cast<const uint32_t*>(from + tile * 128);
            const uint32_t bottom = *reinterpret_cast<const uint32_t*>(from + tile * 128 + 64);
            const uint32_t even = low[tile] & 0x00ff00ffu, odd = low[tile] >> 8 & 0x00ff00ffu;
            x[tile * 4] = __uint_as_float(__byte_perm(top, even, 0x1045) - 0x8000);
            x[tile * 4 + 1] = __uint_as_float(__byte_perm(top, odd, 0x3245) - 0x8000);
            x[tile * 4 + 2] = __uint_as_float(__byte_perm(bottom, even, 0x1067) - 0x8000);
            x[tile * 4 + 3] = __uint_as_float(__byte_perm(bottom, odd, 0x3267) - 0x8000);
        }
    }
    METHOD void store(int place, float (&x)[SHARE * 4]) const {
        // Adding to the bits of the NaN that sums make would turn it into a zero.
        float sum = 0;
#pragma unroll
        for (int i = 0; i < SHARE * 4; i++) sum += x[i];
        if (sum != sum) {
#pragma unroll
            for (int i = 0; i < SHARE * 4; i++)
                if (x[i] != x[i]) x[i] = __uint_as_float(0x7fc00000u);
        }
        unsigned char* const to = upper + place * DK * 8;
        unsigned char* const low_to = lower + place * DK * 8;
        uint32_t low[SHARE];
#pragma unroll
        for (int tile = 0; tile < SHARE; tile++) {
            uint32_t bits[4];
#pragma unroll
            for (int i = 0; i < 4; i++) bits[i] = __float_as_uint(x[tile * 4 + i]) + 0x8080;
            *reinterpret_cast<uint32_t*>(to + tile * 128) = __byte_perm(bits[0], bits[1], 0x7632);
            *reinterpret_cast<uint32_t*>(to + tile * 128 + 64) = __byte_perm(bits[2], bits[3], 0x7632);
            low[tile] = __byte_perm(__byte_perm(bits[0], bits[1], 0x51), __byte_perm(bits[2], bits[3], 0x51), 0x5410);
        }
        if constexpr (SHARE == 4) *reinterpret_cast<uint4*>(low_to) = make_uint4(low[0], low[1], low[2], low[3]);
        else if constexpr (SHARE == 2) *reinterpret_cast<uint2*>(low_to) = make_uint2(low[0], low[1]);
        else *reinterpret_cast<uint32_t*>(low_to) = low[0];
    }
};

template <int DK, int SLOTS, int WARPGROUPS>
struct Scan {
    static constexpr int C = Bf16::CHUNK;
    static constexpr int PARTS = SLOTS > 32 ? 2 : 1;  // products of a read
    static constexpr int AT_ONCE = SLOTS / PARTS;     // slots of one
    static constexpr int QUADS = (SLOTS + 3) / 4;
    static constexpr int TILES = DK / 16;             // of 16 rows of dk
    static constexpr int SHARE = TILES / 4;           // of a warp
    static constexpr int STEPS = TILES < 8 ? TILES : 8;  // Q's operands held at once: large heads have no registers for all
    static constexpr int BANK = Slots<DK, SLOTS>::BYTES;
    static constexpr int PAIRS = PAIR_BLOCKS * 512;   // bytes
    static constexpr int VALUES = 3;                  // chunks of V: read, read a chunk late and written, coming

    // Phases: `full` when the copies have come, `empty` when every warp that reads them has. `early`: P . Lambda, V, plan;
    // `late`: weights, K of the chunk before.
    struct Barriers {
        Barrier early_full, late_full;
        Barrier early_empty, late_empty;
        Barrier turn[2];  // the other group has read, so this one may
    };

    unsigned char* banks;  // [WARPGROUPS][BANK]
    float4* weights;
    uint4* pairs;
    Rows<DK> k_rows;
    uint16_t* values;      // [VALUES][WARPGROUPS][64][8]
    ChunkPlan* plans;      // [2]
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        banks = carve.take<unsigned char>(WARPGROUPS * BANK);
        weights = carve.take<float4>(C * QUADS);
        pairs = carve.take<uint4>(PAIRS / 16);
        k_rows.data = carve.take<uint16_t>(C * DK);
        values = carve.take<uint16_t>(VALUES * WARPGROUPS * C * COLUMNS);
        plans = carve.take<ChunkPlan>(2);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    // V of chunk n, -1 the one before the window, and its plan.
    METHOD uint16_t* values_of(int64_t n) const { return values + (n + 1) % VALUES * (WARPGROUPS * C * COLUMNS); }
    METHOD ChunkPlan* plan_of(int64_t n) const { return plans + n % 2; }

    METHOD void init_barriers() const {
        barrier_init(&barriers->early_full, BRINGING + 1), barrier_init(&barriers->late_full, BRINGING + 1);
        barrier_init(&barriers->early_empty, 4 * WARPGROUPS), barrier_init(&barriers->late_empty, 4 * WARPGROUPS);
        barrier_init(&barriers->turn[0], 4), barrier_init(&barriers->turn[1], 4);
        fence_barriers();
    }

    // The warps that bring what every chunk reads.
    METHOD void bring(const ScanSm90Params& p, const Row& row, int slice, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, thread = threadIdx.x % BRINGING;
        constexpr int UNITS = DK / 8, STEP = BRINGING / UNITS;
        const int unit = thread % UNITS, group = thread / C, t_of_v = thread % C, column = slice + group * COLUMNS;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), step = static_cast<int64_t>(STEP) * row.heads * dk;
        // `live` tokens of a chunk, zeros after them.
        const auto bring_values = [&](int64_t n, int64_t first, int live_tokens) {
            if (group >= WARPGROUPS) return;
            const bool live = t_of_v < live_tokens && column < dv;
            copy_async_16(values_of(n) + (group * C + t_of_v) * COLUMNS,
                          static_cast<const Bf16*>(p.v) + row.at(live ? first + t_of_v : from) * dv + (live ? column : 0), live);
        };
        const auto bring_keys = [&](int64_t first, int live_tokens) {
            const Bf16* at = static_cast<const Bf16*>(p.k) + row.key_at(live_tokens ? first + thread / UNITS : from) * dk + unit * 8;
#pragma unroll 8
            for (int t = thread / UNITS; t < C; t += STEP) {
                copy_async_16(k_rows.unit(t, unit), at, t < live_tokens && unit * 8 < dk);
                if (t + STEP < live_tokens) at += step;
            }
        };
        const auto len_of = [&](int64_t first) { return row.len - first < C ? static_cast<int>(row.len - first) : C; };
        const auto bring_from = [&](void* to, const void* from, int bytes, Barrier* barrier) {
            copy_bulk(to, from, static_cast<uint32_t>(bytes), barrier);
        };
        int64_t n = 0, index = place0 * e.value_heads + row.head;
        for (int64_t first = from; first < to; first += C, n++, index += e.value_heads) {
            barrier_wait(&barriers->early_empty, phase(n + 1));
            if (thread == 0) {
                barrier_expect(&barriers->early_full, PAIRS + PLAN);
                bring_from(pairs, p.pairs + index * (PAIRS / 4), PAIRS, &barriers->early_full);
                bring_from(plan_of(n), p.plans + index, PLAN, &barriers->early_full);
            }
            if (n == 0) bring_values(-1, first - C, first > 0 ? C : 0);
            bring_values(n, first, len_of(first));
            copies_arrive(&barriers->early_full);

            barrier_wait(&barriers->late_empty, phase(n + 1));
            if (thread == 0) {
                barrier_expect(&barriers->late_full, C * QUADS * 16);
                bring_from(weights, p.weights + index * (C * QUADS * 4), C * QUADS * 16, &barriers->late_full);
            }
            bring_keys(first - C, first > 0 ? C : 0);
            copies_arrive(&barriers->late_full);
        }
        // For the final states the last chunk's keys and the rest of its plan.
        if (n == 0 || to < row.len || !p.states) return;
        constexpr int REST = static_cast<int>(sizeof(ChunkPlan)) - PLAN;
        index -= e.value_heads, n--;
        barrier_wait(&barriers->late_empty, phase(n));
        if (thread == 0) {
            barrier_expect(&barriers->late_full, REST);
            bring_from(reinterpret_cast<unsigned char*>(plan_of(n)) + PLAN,
                       reinterpret_cast<const unsigned char*>(p.plans + index) + PLAN, REST, &barriers->late_full);
        }
        bring_keys(from + n * C, len_of(from + n * C));
        copies_arrive(&barriers->late_full);
    }

    // A chunk's keys as left operands of K^T V: rows of dk of the warp's tiles, 16 tokens a step.
    METHOD void load_keys(uint32_t (&keys)[4][SHARE][4], int warp, int lane) const {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int tile = 0; tile < SHARE; tile++)
                ldmatrix_x4_trans(keys[s][tile],
                                  k_rows.unit(s * 16 + lane % 8 + lane / 16 * 8, (warp * SHARE + tile) * 2 + lane / 8 % 2));
    }
    // A chunk's values, 16 tokens a step.
    METHOD void load_values(uint32_t (&v)[4][2], const uint16_t* from, int lane) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t two[4];
            ldmatrix_x4_trans(two, from + (half * 32 + lane) * COLUMNS);
            v[half * 2][0] = two[0], v[half * 2][1] = two[1], v[half * 2 + 1][0] = two[2], v[half * 2 + 1][1] = two[3];
        }
    }
    // The same times their factors, in two planes.
    METHOD void load_factored(uint32_t (&v)[4][2][2], const uint16_t* from, const float* factors, int lane) const {
        uint32_t raw[4][2];
        load_values(raw, from, lane);
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 factor = *reinterpret_cast<const float2*>(factors + s * 16 + i * 8 + lane % 4 * 2);
                split<2>(factor.x * low_bf16(raw[s][i]), factor.y * high_bf16(raw[s][i]), v[s][i]);
            }
    }
    // x += K^T V of tokens from..to.
    METHOD void add_tokens(float (&x)[SHARE * 4], const uint32_t (&keys)[4][SHARE][4], const uint32_t (&v)[4][2][2], int from,
                           int to, int lane) const {
        float sums[SHARE][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (from >= s * 16 + 16 || to <= s * 16) continue;
            uint32_t masked[2][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = s * 16 + i * 8 + lane % 4 * 2;
                const uint32_t mask = (t >= from && t < to ? 0xffffu : 0u) | (t + 1 >= from && t + 1 < to ? 0xffff0000u : 0u);
                masked[0][i] = v[s][i][0] & mask, masked[1][i] = v[s][i][1] & mask;
            }
#pragma unroll
            for (int plane = 1; plane >= 0; plane--)
#pragma unroll
                for (int tile = 0; tile < SHARE; tile++) mma_bf16(sums[tile], keys[s][tile], masked[plane][0], masked[plane][1]);
        }
#pragma unroll
        for (int i = 0; i < SHARE * 4; i++) x[i] += sums[i / 4][i % 4];
    }

    // One group: 8 columns of dv from `column` on.
    METHOD void compute(const ScanSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, capacity = e.capacity;
        const int lane = lane_index(), warp = __shfl_sync(ALL, warp_index() % 4, 0), g = lane / 4, c = lane % 4, c2 = c * 2;
        const Slots<DK, SLOTS> mine = Slots<DK, SLOTS>::of(banks + group * BANK, warp, g, c);
        const bool live_columns = column < dv;
        const int64_t state = static_cast<int64_t>(dk) * dv;
        // Row of dk of the thread's elements (Slots).
        const auto k_of = [&](int tile, int half) { return (warp * SHARE + tile) * 16 + half * 8 + g; };

        // The slots that the window begins with; every other place zero, for a read multiplies them all.
        const int thread = threadIdx.x % GROUP;
        uint4* const left = reinterpret_cast<uint4*>(p.banks + (static_cast<int64_t>(blockIdx.x) * WARPGROUPS + group) * BANK);
        if (from > 0) {
            for (int i = thread; i < BANK / 16; i += GROUP) reinterpret_cast<uint4*>(mine.all)[i] = left[i];
        } else {
            const int held = p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0;
#pragma unroll 2
            for (int i = 0; i < SLOTS; i++) {
                float x[SHARE * 4] = {};
                if (i < held) {
                    const float* const in = p.initial_states + (row.index() * capacity + i) * state;
#pragma unroll
                    for (int n = 0; n < SHARE * 2; n++) {
                        const int k = k_of(n / 2, n % 2);
                        if (k >= dk || !live_columns) continue;
                        const float2 two = *reinterpret_cast<const float2*>(in + static_cast<int64_t>(k) * dv + column + c2);
                        x[n * 2] = two.x, x[n * 2 + 1] = two.y;
                    }
                }
                mine.store(i, x);
            }
        }
        fence_async();
        group_barrier(1 + group, GROUP);

        // A chunk's Q: a left operand a step. Tokens 16 warp + g and 8 later. Every load is made, whatever it is for, so that none
        // waits for another: past the row's end the last token's (whose output no one writes), past dk the first
        // elements (which meet zeros).
        uint2 q_top[STEPS], q_bottom[STEPS];
        const auto load_q = [&](int64_t first, int from_step) {
            const int64_t last = row.len - 1, top_t = first + warp * 16 + g, bottom_t = top_t + 8;
            const Bf16* const q_at = static_cast<const Bf16*>(p.q);
            const Bf16* const top_at = q_at + row.key_at(top_t < last ? top_t : last) * dk;
            const Bf16* const bottom_at = q_at + row.key_at(bottom_t < last ? bottom_t : last) * dk;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const int k = (from_step + step) * 16 + c * 4, live = k < dk ? k : 0;
                q_top[step] = *reinterpret_cast<const uint2*>(top_at + live);
                q_bottom[step] = *reinterpret_cast<const uint2*>(bottom_at + live);
            }
        };
        if (STEPS == TILES && from < to) load_q(from, 0);

        const uint64_t operand = wgmma_operand(mine.all, DK * 8, Slots<DK, SLOTS>::OTHERS);
        const uint4* const my_pairs = pairs + (warp * 4 + warp * (warp + 1) / 2) * 32 + lane;
        Barrier* const my_turn = &barriers->turn[group];
        Barrier* const read_done = &barriers->turn[1 - group];
        Bf16* o_at = static_cast<Bf16*>(p.o) + row.at(from + warp * 16 + g) * dv + column + c2;
        const int64_t o_row = static_cast<int64_t>(e.value_heads) * dv;
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            const ChunkPlan& plan = *plan_of(n);

            // Read.
            float out[4] = {};
            if (WARPGROUPS == 2) barrier_wait(my_turn, phase(n + 1 - group));
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                float read[AT_ONCE * 4];  // the first product overwrites it
#pragma unroll
                for (int from_step = 0; from_step < TILES; from_step += STEPS) {
                    if (from_step > 0) wgmma_wait();
                    if (STEPS < TILES) load_q(first, from_step);
                    uint32_t q[STEPS][4];
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
                        q[step][0] = q_top[step].x, q[step][1] = q_bottom[step].x;
                        q[step][2] = q_top[step].y, q[step][3] = q_bottom[step].y;
                    }
                    wgmma_begin();
#pragma unroll
                    for (int step = 0; step < STEPS; step++)
                        wgmma_bf16(read, q[step], operand + (part * AT_ONCE * DK * 8 + (from_step + step) * 128) / 16,
                                   from_step + step > 0);
                    wgmma_commit();
                }
                if (part == 0) {
                    // While the products run: the tokens that are not in the slots, this chunk's and those of the one before.
                    // Blocks beyond the diagonal are none: zeros of V instead, for a branch would end the products' overlap.
                    barrier_wait(&barriers->early_full, phase(n));
                    uint32_t v[4][2];
                    load_values(v, values_of(n - 1) + group * C * COLUMNS, lane);
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        const uint4 x = my_pairs[s * 32];
                        const uint32_t a[4] = {x.x, x.y, x.z, x.w};
                        mma_bf16(out, a, v[s][0], v[s][1]);
                    }
                    load_values(v, values_of(n) + group * C * COLUMNS, lane);
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        const bool within = s <= warp;
                        const uint4 x = my_pairs[(4 + (within ? s : warp)) * 32];
                        const uint32_t a[4] = {x.x, x.y, x.z, x.w};
                        mma_bf16(out, a, within ? v[s][0] : 0, within ? v[s][1] : 0);
                    }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&barriers->early_empty);
                    barrier_wait(&barriers->late_full, phase(n));
                }
                wgmma_wait();
                wgmma_hold(read);
                if (part == PARTS - 1) {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(read_done);
                    // The next chunk's Q, now that the products are done with its registers; after the last chunk too, for
                    // under a condition the loads would be waited for here.
                    if (STEPS == TILES) load_q(first + C, 0);
                }
#pragma unroll
                for (int quad = 0; quad < (AT_ONCE + 3) / 4; quad++) {
                    const float4* const at = weights + (warp * QUADS + part * AT_ONCE / 4 + quad) * 16 + g;
                    const float4 top = at[0], bottom = at[8];
                    const float w[2][4] = {{top.x, top.y, top.z, top.w}, {bottom.x, bottom.y, bottom.z, bottom.w}};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int slot = quad * 4 + i;
                        if (slot >= AT_ONCE) continue;
#pragma unroll
                        for (int x = 0; x < 4; x++) out[x] += w[x / 2][i] * read[slot * 4 + x];
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (warp * 16 + half * 8 + g < len && live_columns)
                    *reinterpret_cast<uint32_t*>(o_at + half * 8 * o_row) = pack_bf16(out[half * 2], out[half * 2 + 1]);
            }
            o_at += C * o_row;

            // Write: every warp its share of dk, so that no warp waits for another; a slot at a time, oldest first, so that
            // none is overwritten that a later one takes in.
            uint32_t keys[4][SHARE][4], v[4][2][2];
            load_keys(keys, warp, lane);
            load_factored(v, values_of(n - 1) + group * C * COLUMNS, plan.value_factor, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->late_empty);
            barrier_wait(read_done, phase(n));
            const int changes = static_cast<int>(plan.changes);
            uint64_t next = plan.changed[0];
#pragma unroll 1
            for (int change = 0; change < changes; change++) {
                const uint64_t what = next;
                next = plan.changed[change + 1 < changes ? change + 1 : change];
                const int place = what & 0xff, entries_from = what >> 8 & 0xff, entries_to = what >> 16 & 0xff;
                const int tokens_from = what >> 24 & 0xff, tokens_to = what >> 32 & 0xff;
                float sum[SHARE * 4] = {};
                if (tokens_from < tokens_to) add_tokens(sum, keys, v, tokens_from, tokens_to, lane);
#pragma unroll 1
                for (int j = entries_from; j < entries_to; j++) {
                    float x[SHARE * 4];
                    mine.load(plan.entry_place[j], x);
                    const float factor = plan.factor[j];
#pragma unroll
                    for (int i = 0; i < SHARE * 4; i++) sum[i] += factor * x[i];
                }
                mine.store(place, sum);
            }
            fence_async();
            group_barrier(1 + group, GROUP);
        }

        if (to < row.len) {
            for (int i = thread; i < BANK / 16; i += GROUP) left[i] = reinterpret_cast<const uint4*>(mine.all)[i];
            return;
        }
        // The cache, oldest first, unused slots zero: states and the last chunk's tokens.
        if (!p.states) return;
        if (to == 0) {
            const int held = p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0;
            for (int i = 0; i < capacity; i++) {
                float x[SHARE * 4] = {};
                if (i < held) mine.load(i, x);
                put_state(p, row, x, i, warp, g, column, c2);
            }
            return;
        }
        const ChunkPlan& plan = *plan_of(n - 1);
        barrier_wait(&barriers->late_full, phase(n));
        uint32_t keys[4][SHARE][4], v[4][2][2];
        load_keys(keys, warp, lane);
        load_factored(v, values_of(n - 1) + group * C * COLUMNS, plan.exit_value_factor, lane);
        const int held = static_cast<int>(plan.exit_len);
#pragma unroll 1
        for (int i = 0; i < capacity; i++) {
            float x[SHARE * 4] = {};
            if (i < held) {
                const int place = plan.exit_place[i], tokens_from = plan.exit_from[i], tokens_to = plan.exit_to[i];
                if (place != NO_STATE) {
                    mine.load(place, x);
                    const float factor = plan.exit_factor[i];
#pragma unroll
                    for (int m = 0; m < SHARE * 4; m++) x[m] *= factor;
                }
                if (tokens_from < tokens_to) add_tokens(x, keys, v, tokens_from, tokens_to, lane);
            }
            put_state(p, row, x, i, warp, g, column, c2);
        }
    }

    // A thread's elements of slot i of the final cache.
    METHOD void put_state(const ScanSm90Params& p, const Row& row, const float (&x)[SHARE * 4], int i, int warp, int g, int column,
                          int c2) const {
        const int dk = p.extents.dk, dv = p.extents.dv;
        float* const out = p.states + (row.index() * p.extents.capacity + i) * (static_cast<int64_t>(dk) * dv) + column + c2;
#pragma unroll
        for (int n = 0; n < SHARE * 2; n++) {
            const int k = (warp * SHARE + n / 2) * 16 + n % 2 * 8 + g;
            if (k < dk && column < dv)
                *reinterpret_cast<float2*>(out + static_cast<int64_t>(k) * dv) = make_float2(x[n * 2], x[n * 2 + 1]);
        }
    }
};

template <int DK, int SLOTS, int WARPGROUPS>
DEVICE void scan_sm90(const ScanSm90Params& p) {
    const Extents& e = p.extents;
    constexpr int WIDTH = WARPGROUPS * COLUMNS;
    const int slices = (e.dv + WIDTH - 1) / WIDTH, slice = blockIdx.x % slices * WIDTH;
    const int64_t index = blockIdx.x / slices;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (p.from > 0 && row.len <= p.from) return;
    const int64_t to = row.len < p.to ? row.len : p.to;

    Carve carve{dynamic_shared()};
    Scan<DK, SLOTS, WARPGROUPS> scan;
    scan.take(carve);
    if (threadIdx.x == 0) scan.init_barriers();
    __syncthreads();
    const int group = __shfl_sync(ALL, warp_index() / 4, 0);
    if (group == WARPGROUPS) {
        if (WARPGROUPS == 2) registers_fewer<40>();
        scan.bring(p, row, slice, p.from, to);
    } else {
        if (WARPGROUPS == 2) registers_more<232>();
        scan.compute(p, row, group, slice + group * COLUMNS, p.from, to);
    }
}

}  // namespace
}  // namespace dla

// One table of what exists: head size as computed, slots, groups of 8 columns. 30 slots is the default M and the most
// that two groups have room for at dk = 128; one group where two do not fit.
#define SCAN_SM90(DK, SLOTS, WARPGROUPS)                                                          \
    KERNEL BLOCK_OF(WARPGROUPS * 128 + 128) scan_sm90_##DK##_##SLOTS##_##WARPGROUPS(               \
        const __grid_constant__ dla::ScanSm90Params p) {                                          \
        dla::scan_sm90<DK, SLOTS, WARPGROUPS>(p);                                                 \
    }
SCAN_SM90(64, 16, 2)
SCAN_SM90(64, 30, 2)
SCAN_SM90(64, 32, 2)
SCAN_SM90(64, 64, 1)
SCAN_SM90(128, 16, 2)
SCAN_SM90(128, 30, 1)
SCAN_SM90(128, 30, 2)
SCAN_SM90(128, 32, 1)
SCAN_SM90(128, 64, 1)
SCAN_SM90(256, 16, 1)
