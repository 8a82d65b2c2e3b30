// scan on Hopper, gated, bf16: reads all slots, then transition, merge and append (OPERATOR.md, section 4).
//
//   O = sum_j diag(w[:,j]) Q S_j + (P . Lambda) V
//   S'_i = sum over j that end in i of decay_j S_j + sum over s that end in i of decay_s k_s v_s^T
//
// A block has WARPGROUPS groups of 128 threads, each with 8 columns of dv and all slots of them, and four warps that
// bring what they read (and leave their registers to two groups). Grid: N HV x dv / (8 WARPGROUPS), slices of a row next to each other.
//
// Read. The slots are one operand [dk][8 SLOTS] in shared memory: a chunk of 64 tokens is a chain of dk / 16
// wgmma m64n(8 SLOTS)k16 with Q in registers. A thread's accumulators 4 j .. 4 j + 3 are slot j's, so the sum over slots
// is arithmetic inside the thread; (P . Lambda) V is added by mma. Where there are two groups they take turns at
// the tensor cores: while one reads, the other sums and writes.
// Write. Only slots that the chunk changes are touched (by the plan; 3 of 30 under mass, 9 under density, where every
// token opens one): K^T V by mma, a slot's tokens masked in, then what it merges.
//
// Slots stand in places and never move. A state is kept relative to the chunk in which it was last written; its decay since
// is in the weights. It has 16 bits of mantissa: the upper 8 are the operand, a bf16 rounded to nearest; the others,
// signed, a plane of bytes. So a slot that merges in every chunk loses 2^-17 each time, not 2^-9.
//
// Shared memory (bytes; W = WARPGROUPS): slots W SLOTS dk 24; Q and K 256 dk, or 128 dk where they share it; weights
// 256 SLOTS to a multiple of 4; V W 1024; plans W 1,616; barriers 96. At dk = 128: 30 slots, W = 2: 230,656.
// Floor: 2 dk SLOTS 8 x 64 FLOP a group and chunk, 1,024 clocks of the tensor cores at dk = 128, M = 30.
// Numerics: q, k exact, states bf16 in the read, P . Lambda bf16, v with its decay in two planes; sums f32.

#include "common/hopper.cuh"
#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int GROUP = 128;   // threads of a group
constexpr int COLUMNS = 8;   // of dv, a group
constexpr int BRINGING = 4;  // warps that bring a chunk's rows, two and two
constexpr int PLAN = 1616;   // bytes of a plan that every chunk needs

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

// Bits that keep the elements of a right operand's fragment whose tokens (bit 0, bit 1 of `in`) are in.
DEVICE uint32_t mask_of(uint32_t in) { return (in & 1 ? 0xffffu : 0u) | (in & 2 ? 0xffff0000u : 0u); }

template <int DK, int SLOTS, int WARPGROUPS>
struct Scan {
    static constexpr int C = Bf16::CHUNK;
    static constexpr int PARTS = SLOTS > 32 ? 2 : 1;       // products of a read
    static constexpr int AT_ONCE = SLOTS / PARTS;          // slots of one
    static constexpr int QUADS = (SLOTS + 3) / 4;
    static constexpr int TILES = DK / 64;                  // of 16 rows of dk, a warp
    static constexpr bool ONE_BUFFER = DK * SLOTS > 4096;  // Q and K take turns, for want of room
    static constexpr int PLANS = WARPGROUPS;               // groups are up to a chunk apart
    static constexpr int BANK = SLOTS * DK * 24;           // bytes of a group's slots

    // Phases: `full` when the copies have come, `empty` when every warp that reads them has.
    struct Barriers {
        Barrier q_full, kv_full, weights_full, plan_full[2];
        Barrier q_empty, kv_empty, weights_empty, plan_empty[2];
        Barrier turn[2];  // the other group may read
    };

    Slots<DK> slots;
    Rows<DK> q_rows, k_rows;
    float4* weights;
    uint16_t* values;  // [WARPGROUPS][64][8]
    unsigned char* plans;  // [PLANS][PLAN]
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        slots.upper = carve.take<unsigned char>(WARPGROUPS * SLOTS * DK * 16);
        slots.lower = carve.take<unsigned char>(WARPGROUPS * SLOTS * DK * 8);
        q_rows.data = carve.take<uint16_t>(C * DK);
        k_rows.data = ONE_BUFFER ? q_rows.data : carve.take<uint16_t>(C * DK);
        weights = carve.take<float4>(C * QUADS);
        values = carve.take<uint16_t>(WARPGROUPS * C * COLUMNS);
        plans = carve.take<unsigned char>(PLANS * PLAN);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    METHOD void init_barriers() const {
        constexpr int WARPS_READING = 4 * WARPGROUPS;
#pragma unroll
        for (int i = 0; i < 5; i++) barrier_init(&barriers->q_full + i, BRINGING * 16);
#pragma unroll
        for (int i = 0; i < 5; i++) barrier_init(&barriers->q_empty + i, WARPS_READING);
#pragma unroll
        for (int i = 0; i < 2; i++) barrier_init(&barriers->turn[i], 4);
        fence_barriers();
    }

    // The warps that bring what a chunk reads: two of them Q and the weights, two K, V and the plan.
    METHOD void bring(const ScanSm90Params& p, const Row& row, int slice, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, warp = warp_index() % BRINGING;
        const int thread = warp % 2 * 32 + lane_index();  // of 64
        const Bf16* const v = static_cast<const Bf16*>(p.v);
        constexpr int UNITS = DK / 8, STEP = 64 / UNITS;
        const int unit = thread % UNITS;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), step = static_cast<int64_t>(STEP) * row.heads * dk;
        const auto rows = [&](const Rows<DK>& into, const void* tensor, int64_t first, int len) {
            const Bf16* at = static_cast<const Bf16*>(tensor) + row.key_at(first + thread / UNITS) * dk + unit * 8;
#pragma unroll 8
            for (int t = thread / UNITS; t < C; t += STEP) {
                copy_async_16(into.unit(t, unit), at, t < len && unit * 8 < dk);
                if (t + STEP < len) at += step;
            }
        };
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            const int64_t index = (place0 + n) * e.value_heads + row.head;
            if (warp < 2) {
                barrier_wait(&barriers->q_empty, phase(n + 1));
                if (ONE_BUFFER) barrier_wait(&barriers->kv_empty, phase(n + 1));
                rows(q_rows, p.q, first, len);
                copies_arrive(&barriers->q_full);

                barrier_wait(&barriers->weights_empty, phase(n + 1));
                const float4* const weights_in = reinterpret_cast<const float4*>(p.weights) + index * C * QUADS;
#pragma unroll
                for (int i = 0; i < QUADS; i++) copy_async_16(weights + thread + i * 64, weights_in + thread + i * 64, true);
                copies_arrive(&barriers->weights_full);
            } else {
                barrier_wait(&barriers->plan_empty[n % PLANS], phase(n / PLANS + 1));
                for (int i = thread; i < PLAN / 16; i += 64)
                    copy_async_16(plans + n % PLANS * PLAN + i * 16,
                                  reinterpret_cast<const unsigned char*>(p.plans + index) + i * 16, true);
                copies_arrive(&barriers->plan_full[n % PLANS]);

                barrier_wait(&barriers->kv_empty, phase(n + 1));
                if (ONE_BUFFER) barrier_wait(&barriers->q_empty, phase(n));
                rows(k_rows, p.k, first, len);
                const bool live = thread < len;
                const Bf16* const v_at = v + row.at(first + (live ? thread : 0)) * dv;
#pragma unroll
                for (int group = 0; group < WARPGROUPS; group++) {
                    const int column = slice + group * COLUMNS;
                    copy_async_16(values + (group * C + thread) * COLUMNS, v_at + (column < dv ? column : 0), live && column < dv);
                }
                copies_arrive(&barriers->kv_full);
            }
        }
    }

    // One group: 8 columns of dv from `column` on.
    METHOD void compute(const ScanSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = e.dk, dv = e.dv, capacity = e.capacity;
        const int lane = lane_index(), warp = warp_index() % 4, g = lane / 4, c2 = lane % 4 * 2;
        const Slots<DK> mine = {slots.upper + group * SLOTS * DK * 16, slots.lower + group * SLOTS * DK * 8};
        const uint16_t* const v_rows = values + group * C * COLUMNS;
        const bool live_columns = column < dv;
        const int64_t place0 = first_of_window(e, row, from, p.to, C), state = static_cast<int64_t>(dk) * dv;
        // Row of dk and column of this thread's elements (tile, half) of a slot.
        const auto k_of = [&](int tile, int half) { return (warp * TILES + tile) * 16 + half * 8 + g; };

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
                for (int n = 0; n < TILES * 2; n++) {
                    const int k = k_of(n / 2, n % 2);
                    float2 x = make_float2(0, 0);
                    if (k < dk && live_columns)
                        x = *reinterpret_cast<const float2*>(in + static_cast<int64_t>(k) * dv + column + c2);
                    mine.store2(i, k, c2, x.x, x.y);
                }
            }
        }
        fence_async();
        group_barrier(1 + group, GROUP);

        uint32_t q[DK / 16][4];
        const auto take_q = [&](int64_t n) {
            barrier_wait(&barriers->q_full, phase(n));
#pragma unroll
            for (int step = 0; step < DK / 16; step++)
                ldmatrix_x4(q[step], q_rows.unit(warp * 16 + lane % 16, step * 2 + lane / 16));
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->q_empty);
        };
        if (from < to) take_q(0);

        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            const int64_t index = (place0 + n) * e.value_heads + row.head;

            // Read.
            float out[4] = {};
            uint4 pairs[4];
            if (WARPGROUPS == 2) barrier_wait(&barriers->turn[group], phase(n + 1 - group));
#pragma unroll 1
            for (int part = 0; part < PARTS; part++) {
                float read[AT_ONCE * 4];  // the first product overwrites it
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < DK / 16; step++)
                    wgmma_bf16(read, q[step], wgmma_operand(mine.upper_at(part * AT_ONCE, step * 16, 0), DK * 16), step > 0);
                wgmma_commit();
                if (part == PARTS - 1) {
#pragma unroll
                    for (int s = 0; s < 4; s++)
                        if (s <= warp)
                            pairs[s] = reinterpret_cast<const uint4*>(p.pairs)[(index * 10 + warp * (warp + 1) / 2 + s) * 32 + lane];
                }
                wgmma_wait();
                if (part == PARTS - 1 && WARPGROUPS == 2) {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&barriers->turn[1 - group]);
                }
                if (part == 0) barrier_wait(&barriers->weights_full, phase(n));
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
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->weights_empty);

            // The chunk's own tokens; o.
            barrier_wait(&barriers->kv_full, phase(n));
            uint32_t v[2][4];  // right operands of 32 tokens each
#pragma unroll
            for (int half = 0; half < 2; half++) ldmatrix_x4_trans(v[half], v_rows + (half * 32 + lane) * COLUMNS);
            uint32_t k[TILES][4][4];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int s = 0; s < 4; s++)
                    ldmatrix_x4_trans(k[tile][s], k_rows.unit(s * 16 + lane % 8 + lane / 16 * 8,
                                                              (warp * TILES + tile) * 2 + lane / 8 % 2));
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->kv_empty);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                if (s > warp) continue;
                const uint32_t a[4] = {pairs[s].x, pairs[s].y, pairs[s].z, pairs[s].w};
                mma_bf16(out, a, v[s / 2][s % 2 * 2], v[s / 2][s % 2 * 2 + 1]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int t = warp * 16 + half * 8 + g;
                if (t < len && live_columns)
                    *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(p.o) + row.at(first + t) * dv + column + c2) =
                        pack_bf16(out[half * 2], out[half * 2 + 1]);
            }

            // The next chunk's Q while the products' registers are free: its buffer can be filled again.
            if (first + C < to) take_q(n + 1);

            // Write: v with its decay, in two planes.
            barrier_wait(&barriers->plan_full[n % PLANS], phase(n / PLANS));
            const ChunkPlan& plan = *reinterpret_cast<const ChunkPlan*>(plans + n % PLANS * PLAN);
            uint32_t vd[2][4][2];
#pragma unroll
            for (int s = 0; s < 4; s++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair = v[s / 2][s % 2 * 2 + i];
                    const float2 factor = *reinterpret_cast<const float2*>(plan.value_factor + s * 16 + i * 8 + c2);
                    uint32_t planes[2];
                    split<2>(factor.x * low_bf16(pair), factor.y * high_bf16(pair), planes);
                    vd[0][s][i] = planes[0], vd[1][s][i] = planes[1];
                }
            const int changes = static_cast<int>(plan.changes);
            group_barrier(1 + group, GROUP);  // every warp has read the slots
            // Several slots at a time: one alone would wait for its own products, loads and sums one after the other.
            constexpr int BATCH = TILES > 2 ? 2 : 4;
#pragma unroll 1
            for (int first_change = 0; first_change < changes; first_change += BATCH) {
                uint64_t tokens[BATCH];
                int place[BATCH], entries_from[BATCH], entries_to[BATCH];
                float sum[BATCH][TILES][4];
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    uint4 raw = make_uint4(0, 0, 0, 0);
                    if (first_change + b < changes) raw = *reinterpret_cast<const uint4*>(plan.changed + first_change + b);
                    tokens[b] = static_cast<uint64_t>(raw.y) << 32 | raw.x;
                    place[b] = raw.z & 0xff, entries_from[b] = raw.z >> 8 & 0xff, entries_to[b] = raw.z >> 16 & 0xff;
#pragma unroll
                    for (int i = 0; i < TILES * 4; i++) sum[b][i / 4][i % 4] = 0;
                }
#pragma unroll
                for (int s = 0; s < 4; s++)
#pragma unroll
                    for (int b = 0; b < BATCH; b++) {
                        const uint32_t in = static_cast<uint32_t>(tokens[b] >> (s * 16)) & 0xffff;
                        if (in == 0) continue;
                        const uint32_t low = mask_of(in >> c2), high = mask_of(in >> (8 + c2));
#pragma unroll
                        for (int plane = 1; plane >= 0; plane--)
#pragma unroll
                            for (int tile = 0; tile < TILES; tile++)
                                mma_bf16(sum[b][tile], k[tile][s], vd[plane][s][0] & low, vd[plane][s][1] & high);
                    }
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
#pragma unroll 1
                    for (int j = entries_from[b]; j < entries_to[b]; j += 2) {
                        const int next = j + 1 < entries_to[b] ? j + 1 : j;
                        const int from_place[2] = {plan.entry_place[j], plan.entry_place[next]};
                        const float factor[2] = {plan.factor[j], next == j ? 0.0f : plan.factor[next]};
                        float x[2][TILES * 2][2];
#pragma unroll
                        for (int two = 0; two < 2; two++)
#pragma unroll
                            for (int i = 0; i < TILES * 2; i++)
                                mine.load2(from_place[two], k_of(i / 2, i % 2), c2, x[two][i][0], x[two][i][1]);
#pragma unroll
                        for (int two = 0; two < 2; two++)
#pragma unroll
                            for (int i = 0; i < TILES * 4; i++) sum[b][i / 4][i % 4] += factor[two] * x[two][i / 2][i % 2];
                    }
                }
                // Adding to the bits of the NaN that sums make would turn it into a zero.
                float all = 0;
#pragma unroll
                for (int i = 0; i < BATCH * TILES; i++) {
                    const float* const x = sum[i / TILES][i % TILES];
                    all += (x[0] + x[1]) + (x[2] + x[3]);
                }
                if (all != all) {
#pragma unroll
                    for (int i = 0; i < BATCH * TILES * 4; i++) {
                        float& x = sum[i / (TILES * 4)][i / 4 % TILES][i % 4];
                        if (x != x) x = __uint_as_float(0x7fc00000u);
                    }
                }
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    if (first_change + b >= changes) continue;
#pragma unroll
                    for (int i = 0; i < TILES * 2; i++)
                        mine.store2(place[b], k_of(i / 2, i % 2), c2, sum[b][i / 2][i % 2 * 2], sum[b][i / 2][i % 2 * 2 + 1]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->plan_empty[n % PLANS]);
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
            for (int n = 0; n < TILES * 2; n++) {
                const int k = k_of(n / 2, n % 2);
                float2 x = make_float2(0, 0);
                if (i < held) mine.load2(place, k, c2, x.x, x.y);
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
    const int group = warp_index() / 4;
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
SCAN_SM90(256, 30, 1)
