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

constexpr int GROUP = 128;   // threads of a group
constexpr int COLUMNS = 8;   // of dv, a group
constexpr int MERGED_AT_ONCE = 4;
constexpr int BRINGING = 128;  // threads that bring a chunk's rows
constexpr int PLAN = 1104;   // bytes of a plan that every chunk needs

DEVICE uint32_t phase(int64_t uses) { return static_cast<uint32_t>(uses & 1); }

// A matrix [64][DK] of bf16, its 16-byte units permuted within a row so that eight rows' same unit lie in
// different banks.
template <int DK>
struct Rows {
    uint16_t* data;
    METHOD uint16_t* unit(int row, int unit) const { return data + row * DK + (unit ^ (row & 7)) * 8; }
};

// The slots of a group: element (k, column) of a place in the plane of upper halves at (k / 8) 128 + (k % 8) 16 + 2 column
// bytes from the place's start, in that of bytes at half of it.
template <int DK>
struct Slots {
    unsigned char *upper, *lower;

    METHOD unsigned char* upper_at(int place, int k, int column) const { return upper + place * DK * 16 + k * 16 + column * 2; }
    METHOD unsigned char* lower_at(int place, int k, int column) const { return lower + place * DK * 8 + k * 8 + column; }

    // Two neighbours in a row. With 0x8080 added to an f32's bits the upper half is the bf16 nearest to it, and the next
    // byte what is left, less 0x80.
    METHOD void load2(int place, int k, int column, float& x0, float& x1) const {
        const uint32_t high = *reinterpret_cast<const uint32_t*>(upper_at(place, k, column));
        const uint32_t low = *reinterpret_cast<const uint16_t*>(lower_at(place, k, column));
        x0 = __uint_as_float(__byte_perm(high, low, 0x1046) - 0x8000);
        x1 = __uint_as_float(__byte_perm(high, low, 0x3256) - 0x8000);
    }
    METHOD void store2(int place, int k, int column, float x0, float x1) const {
        const uint32_t a = __float_as_uint(x0) + 0x8080, b = __float_as_uint(x1) + 0x8080;
        *reinterpret_cast<uint32_t*>(upper_at(place, k, column)) = __byte_perm(a, b, 0x7632);
        *reinterpret_cast<uint16_t*>(lower_at(place, k, column)) = static_cast<uint16_t>(__byte_perm(a, b, 0x51));
    }
    METHOD void clear(int thread) const {
        reinterpret_cast<uint4*>(upper)[thread] = make_uint4(0, 0, 0, 0);
        reinterpret_cast<uint2*>(lower)[thread] = make_uint2(0x80808080, 0x80808080);
    }
};

// Adding to the bits of the NaN that sums make would turn it into a zero.
DEVICE void keep_nan(float& x) {
    if (x != x) x = __uint_as_float(0x7fc00000u);
}

template <int DK, int SLOTS, int WARPGROUPS>
struct Scan {
    static constexpr int C = Bf16::CHUNK;
    static constexpr int PARTS = SLOTS > 32 ? 2 : 1;  // products of a read
    static constexpr int AT_ONCE = SLOTS / PARTS;     // slots of one
    static constexpr int QUADS = (SLOTS + 3) / 4;
    static constexpr int TILES = DK / 16;             // of 16 rows of dk
    static constexpr int STEPS = TILES < 8 ? TILES : 8;  // Q's operands held at once: large heads have no registers for all
    static constexpr int BANK = SLOTS * DK * 24;      // bytes of a group's slots
    static constexpr int STAGE = C * DK * 2 + WARPGROUPS * C * COLUMNS * 2 + PLAN;
    static constexpr int FIXED = WARPGROUPS * BANK + C * QUADS * 16 + 64;
    static constexpr int STAGES = FIXED + 2 * STAGE <= 232448 ? 2 : 1;

    // Phases: `full` when the copies have come, `empty` when every warp that reads them has.
    struct Barriers {
        Barrier full[2], weights_full;
        Barrier empty[2], weights_empty;
        Barrier turn[2];  // the other group may read
    };

    // What a chunk writes from.
    struct Stage {
        Rows<DK> k_rows;
        uint16_t* values;  // [WARPGROUPS][64][8]
        ChunkPlan* plan;
    };

    Slots<DK> slots;
    float4* weights;
    unsigned char* stages;
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        slots.upper = carve.take<unsigned char>(WARPGROUPS * SLOTS * DK * 16);
        slots.lower = carve.take<unsigned char>(WARPGROUPS * SLOTS * DK * 8);
        weights = carve.take<float4>(C * QUADS);
        stages = carve.take<unsigned char>(STAGES * STAGE);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    METHOD Stage stage(int64_t n) const {
        unsigned char* const at = stages + (STAGES == 2 ? n % 2 * STAGE : 0);
        return {{reinterpret_cast<uint16_t*>(at)},
                reinterpret_cast<uint16_t*>(at + C * DK * 2),
                reinterpret_cast<ChunkPlan*>(at + C * DK * 2 + WARPGROUPS * C * COLUMNS * 2)};
    }

    METHOD void init_barriers() const {
#pragma unroll
        for (int i = 0; i < 3; i++) barrier_init(&barriers->full[0] + i, BRINGING);
#pragma unroll
        for (int i = 0; i < 3; i++) barrier_init(&barriers->empty[0] + i, 4 * WARPGROUPS);
#pragma unroll
        for (int i = 0; i < 2; i++) barrier_init(&barriers->turn[i], 4);
        fence_barriers();
    }

    // The warps that bring K, V, plan and weights of every chunk.
    METHOD void bring(const ScanSm90Params& p, const Row& row, int slice, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, thread = threadIdx.x % BRINGING;
        constexpr int UNITS = DK / 8, STEP = BRINGING / UNITS;
        const int unit = thread % UNITS, group = thread / C, t_of_v = thread % C, column = slice + group * COLUMNS;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), step = static_cast<int64_t>(STEP) * row.heads * dk;
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            const int64_t index = (place0 + n) * e.value_heads + row.head;
            const int which = STAGES == 2 ? static_cast<int>(n % 2) : 0;
            const Stage into = stage(n);
            barrier_wait(&barriers->empty[which], phase(n / STAGES + 1));
            const Bf16* at = static_cast<const Bf16*>(p.k) + row.key_at(first + thread / UNITS) * dk + unit * 8;
#pragma unroll 8
            for (int t = thread / UNITS; t < C; t += STEP) {
                copy_async_16(into.k_rows.unit(t, unit), at, t < len && unit * 8 < dk);
                if (t + STEP < len) at += step;
            }
            if (group < WARPGROUPS) {
                const bool live = t_of_v < len && column < dv;
                copy_async_16(into.values + (group * C + t_of_v) * COLUMNS,
                              static_cast<const Bf16*>(p.v) + row.at(first + (live ? t_of_v : 0)) * dv + (live ? column : 0), live);
            }
            if (thread < PLAN / 16)
                copy_async_16(reinterpret_cast<unsigned char*>(into.plan) + thread * 16,
                              reinterpret_cast<const unsigned char*>(p.plans + index) + thread * 16, true);
            copies_arrive(&barriers->full[which]);

            barrier_wait(&barriers->weights_empty, phase(n + 1));
            const float4* const weights_in = reinterpret_cast<const float4*>(p.weights) + index * C * QUADS;
#pragma unroll
            for (int i = thread; i < C * QUADS; i += BRINGING) copy_async_16(weights + i, weights_in + i, true);
            copies_arrive(&barriers->weights_full);
        }
    }

    // One group: 8 columns of dv from `column` on.
    METHOD void compute(const ScanSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, capacity = e.capacity;
        const int lane = lane_index(), warp = __shfl_sync(ALL, warp_index() % 4, 0), g = lane / 4, c = lane % 4, c2 = c * 2;
        const Slots<DK> mine = {slots.upper + group * SLOTS * DK * 16, slots.lower + group * SLOTS * DK * 8};
        const bool live_columns = column < dv;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), state = static_cast<int64_t>(dk) * dv;
        // Where rows g and g + 8 of a tile stand (half = 0, 1).
        const int g_at = g % 4 < 2 ? g / 4 * 2 + g % 2 : g / 4 * 2 + g % 2 + 8;
        const auto stands = [&](int tile, int half) { return tile * 16 + g_at + half * 4; };
        // The warp's share of a slot, where all warps work at one.
        constexpr int SHARE = TILES / 4;
        const auto k_of = [&](int tile, int half) { return (warp * SHARE + tile) * 16 + half * 8 + g; };

        // The slots that the window begins with; every other place zero, for a read multiplies them all.
        const int thread = threadIdx.x % GROUP;
        uint4* const left = reinterpret_cast<uint4*>(p.banks + (static_cast<int64_t>(blockIdx.x) * WARPGROUPS + group) * BANK);
        if (from > 0) {
            for (int i = thread; i < SLOTS * DK; i += GROUP) reinterpret_cast<uint4*>(mine.upper)[i] = left[i];
            for (int i = thread; i < SLOTS * DK / 2; i += GROUP) reinterpret_cast<uint4*>(mine.lower)[i] = left[SLOTS * DK + i];
        } else {
            for (int i = thread; i < SLOTS * DK; i += GROUP) mine.clear(i);
            group_barrier(1 + group, GROUP);
            const int held = p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0;
#pragma unroll 2
            for (int i = 0; i < held; i++) {
                const float* const in = p.initial_states + (row.index() * capacity + i) * state;
#pragma unroll
                for (int n = 0; n < SHARE * 2; n++) {
                    const int k = k_of(n / 2, n % 2);
                    float2 x = make_float2(0, 0);
                    if (k < dk && live_columns)
                        x = *reinterpret_cast<const float2*>(in + static_cast<int64_t>(k) * dv + column + c2);
                    mine.store2(i, stands(warp * SHARE + n / 2, n % 2), c2, x.x, x.y);
                }
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

        const uint64_t operand = wgmma_operand(mine.upper, DK * 16);
        const uint4* pairs_at = reinterpret_cast<const uint4*>(p.pairs) +
                                ((place0 * e.value_heads + row.head) * 10 + warp * (warp + 1) / 2) * 32 + lane;
        Bf16* o_at = static_cast<Bf16*>(p.o) + row.at(from + warp * 16 + g) * dv + column + c2;
        const int64_t o_row = static_cast<int64_t>(e.value_heads) * dv;
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            const int which = STAGES == 2 ? static_cast<int>(n % 2) : 0;
            const Stage stage = this->stage(n);

            // Read.
            float out[4] = {};
            uint4 pairs[4];
            const auto load_pairs = [&] {
#pragma unroll
                for (int s = 0; s < 4; s++)
                    if (s <= warp) pairs[s] = pairs_at[s * 32];
            };
            if (WARPGROUPS == 2) barrier_wait(&barriers->turn[group], phase(n + 1 - group));
#pragma unroll 1
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
                        wgmma_bf16(read, q[step], operand + part * AT_ONCE * DK + (from_step + step) * 16, from_step + step > 0);
                    wgmma_commit();
                }
                if (STEPS == TILES && part == PARTS - 1) load_pairs();
                if (part == 0) barrier_wait(&barriers->weights_full, phase(n));
                wgmma_wait();
                if (part == PARTS - 1) {
                    if (WARPGROUPS == 2) {
                        __syncwarp();
                        if (lane == 0) barrier_arrive(&barriers->turn[1 - group]);
                    }
                    // The next chunk's Q, now that the products are done with its registers.
                    if (STEPS == TILES && first + C < to) load_q(first + C, 0);
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
            if (STEPS < TILES) load_pairs();
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->weights_empty);
            pairs_at += static_cast<int64_t>(e.value_heads) * 320;

            // The chunk's own tokens; o.
            barrier_wait(&barriers->full[which], phase(n / STAGES));
            uint32_t v[2][4];  // right operands of 32 tokens each
#pragma unroll
            for (int half = 0; half < 2; half++)
                ldmatrix_x4_trans(v[half], stage.values + (group * C + half * 32 + lane) * COLUMNS);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                if (s > warp) continue;
                const uint32_t a[4] = {pairs[s].x, pairs[s].y, pairs[s].z, pairs[s].w};
                mma_bf16(out, a, v[s / 2][s % 2 * 2], v[s / 2][s % 2 * 2 + 1]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (warp * 16 + half * 8 + g < len && live_columns)
                    *reinterpret_cast<uint32_t*>(o_at + half * 8 * o_row) = pack_bf16(out[half * 2], out[half * 2 + 1]);
            }
            o_at += C * o_row;

            // Write. First what merges, every warp its share of dk, a few entry slots at a time, into the oldest one's place.
            const ChunkPlan& plan = *stage.plan;
            const int changes = static_cast<int>(plan.changes);
            group_barrier(1 + group, GROUP);  // every warp has read the slots
#pragma unroll 1
            for (int change = 0; change < changes; change++) {
                const uint64_t what = plan.changed[change];
                const int place = what & 0xff, entries_from = what >> 8 & 0xff, entries_to = what >> 16 & 0xff;
                if (entries_from == entries_to) break;  // so do none of the later ones
                float sum[SHARE * 2][2] = {};
#pragma unroll 1
                for (int j = entries_from; j < entries_to; j += MERGED_AT_ONCE) {
                    float x[MERGED_AT_ONCE][SHARE * 2][2], factor[MERGED_AT_ONCE];
#pragma unroll
                    for (int m = 0; m < MERGED_AT_ONCE; m++) {
                        // Past the last the last again, times nothing.
                        const bool live = j + m < entries_to;
                        const int entry = live ? j + m : entries_to - 1, from_place = plan.entry_place[entry];
                        factor[m] = live ? plan.factor[entry] : 0.0f;
#pragma unroll
                        for (int i = 0; i < SHARE * 2; i++)
                            mine.load2(from_place, stands(warp * SHARE + i / 2, i % 2), c2, x[m][i][0], x[m][i][1]);
                    }
#pragma unroll
                    for (int m = 0; m < MERGED_AT_ONCE; m++)
#pragma unroll
                        for (int i = 0; i < SHARE * 4; i++) sum[i / 2][i % 2] += factor[m] * x[m][i / 2][i % 2];
                }
                float all = 0;
#pragma unroll
                for (int i = 0; i < SHARE * 2; i++) all += sum[i][0] + sum[i][1];
                if (all != all) {
#pragma unroll
                    for (int i = 0; i < SHARE * 4; i++) keep_nan(sum[i / 2][i % 2]);
                }
#pragma unroll
                for (int i = 0; i < SHARE * 2; i++)
                    mine.store2(place, stands(warp * SHARE + i / 2, i % 2), c2, sum[i][0], sum[i][1]);
            }
            group_barrier(1 + group, GROUP);

            // Then the chunk's tokens, every warp the slots that fall to it.
#pragma unroll 1
            for (int change = warp; change < changes; change += 4) {
                const uint64_t what = plan.changed[change];
                const int place = what & 0xff;
                const bool merged = (what >> 8 & 0xff) != (what >> 16 & 0xff);
                const int tokens_from = what >> 24 & 0xff, tokens_to = what >> 32 & 0xff;
                if (tokens_from == tokens_to) continue;
                float sum[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES * 4; i++) sum[i / 4][i % 4] = 0;
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    if (tokens_from >= s * 16 + 16 || tokens_to <= s * 16) continue;
                    uint32_t vd[2][2];  // v with its decay: planes, halves of the step
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int t = s * 16 + i * 8 + c2;
                        const uint32_t pair = v[s / 2][s % 2 * 2 + i];
                        const float2 factor = *reinterpret_cast<const float2*>(plan.value_factor + t);
                        const float x0 = t >= tokens_from && t < tokens_to ? factor.x * low_bf16(pair) : 0.0f;
                        const float x1 = t + 1 >= tokens_from && t + 1 < tokens_to ? factor.y * high_bf16(pair) : 0.0f;
                        uint32_t planes[2];
                        split<2>(x0, x1, planes);
                        vd[0][i] = planes[0], vd[1][i] = planes[1];
                    }
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        uint32_t k[4];
                        ldmatrix_x4_trans(k, stage.k_rows.unit(s * 16 + lane % 8 + lane / 16 * 8, tile * 2 + lane / 8 % 2));
                        mma_bf16(sum[tile], k, vd[1][0], vd[1][1]);
                        mma_bf16(sum[tile], k, vd[0][0], vd[0][1]);
                    }
                }
                if (merged) {
#pragma unroll
                    for (int i = 0; i < TILES * 2; i++) {
                        if (i == 16) keep_order();  // of large heads all loads at once would need more registers than there are
                        float x0, x1;
                        mine.load2(place, stands(i / 2, i % 2), c2, x0, x1);
                        sum[i / 2][i % 2 * 2] += x0, sum[i / 2][i % 2 * 2 + 1] += x1;
                    }
                }
                float all[4] = {};
#pragma unroll
                for (int i = 0; i < TILES * 4; i++) all[i % 4] += sum[i / 4][i % 4];
                const float whole = (all[0] + all[1]) + (all[2] + all[3]);
                if (whole != whole) {
#pragma unroll
                    for (int i = 0; i < TILES * 4; i++) keep_nan(sum[i / 4][i % 4]);
                }
#pragma unroll
                for (int i = 0; i < TILES * 2; i++)
                    mine.store2(place, stands(i / 2, i % 2), c2, sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->empty[which]);
            fence_async();
            group_barrier(1 + group, GROUP);
        }

        if (to < row.len) {
            for (int i = thread; i < SLOTS * DK; i += GROUP) left[i] = reinterpret_cast<const uint4*>(mine.upper)[i];
            for (int i = thread; i < SLOTS * DK / 2; i += GROUP) left[SLOTS * DK + i] = reinterpret_cast<const uint4*>(mine.lower)[i];
            return;
        }
        // The cache, oldest first; unused slots zero.
        if (!p.states) return;
        const ChunkPlan* const last = to > 0 ? p.plans + (place0 + (to - 1 - from) / C) * e.value_heads + row.head : nullptr;
        const int held = last ? static_cast<int>(last->exit_len) : p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0;
#pragma unroll 2
        for (int i = 0; i < capacity; i++) {
            const int place = i >= held ? 0 : last ? last->exit_place[i] : i;
            const float factor = i < held && last ? last->exit_factor[i] : 1.0f;
            float* const out = p.states + (row.index() * capacity + i) * state;
#pragma unroll
            for (int n = 0; n < SHARE * 2; n++) {
                const int k = k_of(n / 2, n % 2);
                float2 x = make_float2(0, 0);
                if (i < held) mine.load2(place, stands(warp * SHARE + n / 2, n % 2), c2, x.x, x.y);
                if (k < dk && live_columns)
                    *reinterpret_cast<float2*>(out + static_cast<int64_t>(k) * dv + column + c2) =
                        make_float2(factor * x.x, factor * x.y);
            }
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
