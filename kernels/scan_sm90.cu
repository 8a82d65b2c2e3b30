// scan on Hopper, gated, bf16: reads all slots, then transition, merge and append (OPERATOR.md, section 4).
//
//   O = sum_j diag(w[:,j]) Q S_j + (P . Lambda) V
//   S'_i = sum over j that end in i of decay_j S_j + sum over s that end in i of decay_s k_s v_s^T
//
// A chunk's tokens are written a chunk late: at a chunk's entry the states hold the tokens before the chunk before, whose
// own are read as tokens (P . Lambda is 64 x 128). By then most of their slots have merged, so that fewer states change: 3.6
// a chunk of 64 tokens of which each opens a slot (M = 30, density), which take in 3.5 states and 3.4 runs of tokens.
//
// A block has WARPGROUPS groups of 128 threads, each with 8 columns of dv and all slots of them, and four warps that
// bring what they read (and leave their registers to two groups). Grid: N HV x dv / (8 WARPGROUPS), slices of a row next
// to each other.
//
// Read. The slots are one operand [dk][8 SLOTS] in shared memory: a chunk of 64 tokens is a chain of dk / 16
// wgmma m64n(8 SLOTS)k16 with Q in registers. A thread's accumulators 4 j .. 4 j + 3 are slot j's, so the sum over slots
// is arithmetic inside the thread; (P . Lambda) V is eight wgmma m64n8k16 more. Where there are two groups they take turns
// at the tensor cores: while one reads, the other sums and writes.
// Write. Only slots that the plan names are touched, every warp its share of dk, two slots at a time: K^T V by mma, a slot's
// tokens masked in, plus the states that it takes in. (A slot a warp was slower: 2.35 ms for 2.17.)
//
// Slots stand in places and never move. A state is kept relative to the end of the chunk that has its last token; its decay
// since is in the weights. A place without a state has weight 0, and its first write takes nothing in. A state has 16 bits of
// mantissa: the upper 8 are the operand, a bf16 rounded to nearest; the others, signed, a plane of bytes. So a slot that
// merges in every chunk loses 2^-17 each time, not 2^-9.
//
// Rows of dk stand as a thread's 8-byte loads of Q want them: of 16, row 4 c + e at 2 c + e (e < 2) or 2 c + e + 6.
//
// Shared memory (bytes; W = WARPGROUPS): slots W (SLOTS dk 24 + 64); weights 256 SLOTS to a multiple of 4; P . Lambda
// 13,312; K 128 dk; V 3 W 1,024; plans 2 (592 + 32 SLOTS); barriers 64. At dk = 128: 30 slots, W = 2: 231,648. Where weights
// and P . Lambda find no room (64 slots at dk = 128) threads load them.
// Floor: 2 dk SLOTS 8 x 64 FLOP a group and chunk, 1,024 clocks of the tensor cores at dk = 128, M = 30.
// Measured on an H100 (1 x 32,768 x 16 heads, dk = dv = 128, M = 30, every token a merge; tokens written at once in
// brackets): density 2.17 ms (2.86), mass 1.66 (2.07); without any change of states 1.62 (1.09): P . Lambda and V were then
// asked for when both groups had read, so that the first waited for the copy in every chunk. A warp's chain of dependent
// instructions through a chunk's changes takes 3,300 of 7,600 clocks.
// Since then they are asked for when both groups hold P . Lambda in registers, before their products. Predicted, not measured:
// a copy's latency, some 1,000 clocks of a chunk, no longer in the groups' round.
// Numerics: q, k exact, states bf16 in the read, P . Lambda bf16, v with its decay in two planes; sums f32.

#include "common/hopper.cuh"
#include "common/replay.cuh"

namespace dla {
namespace {

constexpr int GROUP = 128;     // threads of a group
constexpr int COLUMNS = 8;     // of dv, a group
constexpr int BRINGING = 128;  // threads that bring a chunk's rows
constexpr int REST = sizeof(ChunkPlan) - offsetof(ChunkPlan, exit_len);  // bytes of a plan that the last chunk alone needs
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
// Part w of four has SHARE tiles of 16 rows; a thread's elements of it: of every tile rows g and g + 8, columns 2 c and 2 c + 1.
template <int DK, int SLOTS>
struct Slots {
    static constexpr int SHARE = DK / 64;
    static constexpr int OTHERS = SLOTS * DK * 8 + 64;     // second plane
    static constexpr int LOWER = 2 * SLOTS * DK * 8 + 64;
    static constexpr int BYTES = SLOTS * DK * 24 + 64;

    unsigned char *all, *upper, *lower;  // of the group; of the thread

    METHOD static Slots of(unsigned char* all, int g, int c) {
        // Row 4 i + e of 16 is thread i's element e of its 8-byte load of Q.
        const int stands = (g % 4 < 2 ? 0 : OTHERS) + (g / 4 * 2 + g % 2) * 16;
        return {all, all + stands + c * 4, all + LOWER + (g * 4 + c) * SHARE * 4};
    }

    // Elements 4 tile + 2 half + n. With 0x8080 added to an f32's bits the upper half is the bf16 nearest to it, and the next
    // byte what is left, less 0x80.
    METHOD void load(int place, int part, float (&x)[SHARE * 4]) const {
        const unsigned char* const from = upper + place * DK * 8 + part * SHARE * 128;
        const unsigned char* const low_from = lower + place * DK * 8 + part * SHARE * 128;
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
    METHOD void store(int place, int part, const float (&x)[SHARE * 4]) const {
        unsigned char* const to = upper + place * DK * 8 + part * SHARE * 128;
        unsigned char* const low_to = lower + place * DK * 8 + part * SHARE * 128;
        uint32_t low[SHARE];
#pragma unroll
        for (int tile = 0; tile < SHARE; tile++) {
            uint32_t bits[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Adding to the bits of the NaN that sums make, 0x7fffffff, would turn it into a zero.
                const int as_is = static_cast<int>(__float_as_uint(x[tile * 4 + i]));
                bits[i] = static_cast<uint32_t>(as_is < 0x7fc00000 ? as_is : 0x7fc00000) + 0x8080;
            }
            *reinterpret_cast<uint32_t*>(to + tile * 128) = __byte_perm(bits[0], bits[1], 0x7632);
            *reinterpret_cast<uint32_t*>(to + tile * 128 + 64) = __byte_perm(bits[2], bits[3], 0x7632);
            low[tile] = __byte_perm(__byte_perm(bits[0], bits[1], 0x51), __byte_perm(bits[2], bits[3], 0x51), 0x5410);
        }
        if constexpr (SHARE == 4) *reinterpret_cast<uint4*>(low_to) = make_uint4(low[0], low[1], low[2], low[3]);
        else if constexpr (SHARE == 2) *reinterpret_cast<uint2*>(low_to) = make_uint2(low[0], low[1]);
        else *reinterpret_cast<uint32_t*>(low_to) = low[0];
    }
};

// o in bf16, dQ in f32: more is done to it.
template <bool EXCHANGED>
struct OutOf {
    using Type = Bf16;
};
template <>
struct OutOf<true> {
    using Type = float;
};
DEVICE void store2(Bf16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack_bf16(x, y); }
DEVICE void store2(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }

// EXCHANGED: q -> do, k -> v, v -> k, for dQ: rows are of dv and by value head, columns of dk and by key head.
// Without READS the states alone are carried on, by a writer for every group.
template <int DK, int SLOTS, int WARPGROUPS, bool EXCHANGED, bool READS>
struct Scan {
    static constexpr int C = Bf16::CHUNK;
    // A group's read is products of 16 slots and of what remains.
    static constexpr int PARTS = (SLOTS + 15) / 16, REMAINING = SLOTS - (PARTS - 1) * 16;
    static_assert(PARTS == 1 || PARTS == 2 || REMAINING == 16, "products by turns have the same shape");
    static constexpr int QUADS = (SLOTS + 3) / 4;
    static constexpr int TILES = DK / 16;             // of 16 rows of dk
    static constexpr int SHARE = TILES / 4;           // of a warp
    static constexpr int STEPS = TILES < 8 ? TILES : 8;  // Q's operands held at once: large heads have no registers for all
    static_assert(TILES % STEPS == 0);
    static constexpr int BANK = Slots<DK, SLOTS>::BYTES;
    static constexpr int PAIRS = PAIR_BLOCKS * 512;   // bytes
    static constexpr int PLAN = offsetof(ChunkPlan, changed) + SLOTS * sizeof(SlotChange);
    static constexpr bool DIRECT = SLOTS * DK > 32 * 128;  // no room for P . Lambda and weights: threads load them
    static constexpr int VALUES = 2;                  // chunks of V: read; read a chunk late, written and overwritten

    // Phases: `full` when the copies have come, `empty` when every warp that reads them has. `early`: P . Lambda, V, plan.
    // `keys`: K of the chunk before. By group of columns: `read` when a chunk's product is done, so that its slots may be
    // written and the other group's product begin; `written` when a chunk's slots stand, the first time those that the window
    // begins with.
    struct Barriers {
        Barrier early_full, weights_full, keys_full;
        Barrier early_empty, weights_empty, keys_empty;
        Barrier read[2], written[2];
        Barrier bank_full[2];
    };

    unsigned char* banks;  // [WARPGROUPS][BANK]
    float4* weights;
    uint4* pairs;
    Rows<DK> k_rows;
    uint16_t* values;      // [VALUES][WARPGROUPS][64][8]
    unsigned char* plans;  // [2][PLAN]
    Barriers* barriers;

    METHOD void take(Carve& carve) {
        banks = carve.take<unsigned char>(WARPGROUPS * BANK);
        weights = carve.take<float4>(DIRECT ? 0 : C * QUADS);
        pairs = carve.take<uint4>(DIRECT ? REST / 16 : PAIRS / 16);
        k_rows.data = carve.take<uint16_t>(C * DK);
        values = carve.take<uint16_t>(VALUES * WARPGROUPS * C * COLUMNS);
        plans = carve.take<unsigned char>(2 * PLAN);
        barriers = carve.take<Barriers>(1);
        carve.check();
    }

    METHOD static int wide(const Extents& e) { return EXCHANGED ? e.dv : e.dk; }
    METHOD static int thin(const Extents& e) { return EXCHANGED ? e.dk : e.dv; }
    METHOD static int64_t wide_at(const Row& row, int64_t t) { return EXCHANGED ? row.at(t) : row.key_at(t); }
    METHOD static int64_t thin_at(const Row& row, int64_t t) { return EXCHANGED ? row.key_at(t) : row.at(t); }
    METHOD static int wide_heads(const Row& row) { return EXCHANGED ? row.value_heads : row.heads; }
    METHOD static int64_t first_place(const Extents& e, const Row& row, int64_t from, int64_t to) {
        return EXCHANGED ? place_in_window(e, row, from, to, from, C) : first_of_window(e, row, from, to, C);
    }
    // Two neighbours of a thread's elements of a state [dk][dv].
    METHOD static int64_t in_state(const Extents& e, int k, int column) {
        return EXCHANGED ? static_cast<int64_t>(column) * e.dv + k : static_cast<int64_t>(k) * e.dv + column;
    }
    METHOD static float2 load_state(const float* state, const Extents& e, int k, int column) {
        const float* const at = state + in_state(e, k, column);
        return EXCHANGED ? make_float2(at[0], at[e.dv]) : *reinterpret_cast<const float2*>(at);
    }

    // V of chunk n, -1 the one before the window, and its plan.
    METHOD uint16_t* values_of(int64_t n) const { return values + (n + 1) % VALUES * (WARPGROUPS * C * COLUMNS); }
    METHOD ChunkPlan* plan_of(int64_t n) const { return reinterpret_cast<ChunkPlan*>(plans + n % 2 * PLAN); }

    METHOD void init_barriers() const {
        barrier_init(&barriers->early_full, BRINGING + 1), barrier_init(&barriers->weights_full, 1);
        barrier_init(&barriers->keys_full, BRINGING);
        barrier_init(&barriers->early_empty, 4 * (READS + WARPGROUPS));
        barrier_init(&barriers->weights_empty, 4), barrier_init(&barriers->keys_empty, 4 * WARPGROUPS);
        for (int group = 0; group < 2; group++) {
            barrier_init(&barriers->read[group], 4), barrier_init(&barriers->written[group], 4);
            barrier_init(&barriers->bank_full[group], 1);
        }
        fence_barriers();
    }

    // The warps that bring what every chunk reads.
    METHOD void bring(const ScanSm90Params& p, const Row& row, int slice, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = wide(e), dv = thin(e), thread = threadIdx.x % BRINGING;
        constexpr int UNITS = DK / 8, STEP = BRINGING / UNITS;
        const int unit = thread % UNITS, group = thread / C, t_of_v = thread % C, column = slice + group * COLUMNS;
        const int64_t place0 = first_place(e, row, from, p.to), step = static_cast<int64_t>(STEP) * wide_heads(row) * dk;
        // `live` tokens of a chunk, zeros after them.
        const auto bring_values = [&](int64_t n, int64_t first, int live_tokens) {
            if (group >= WARPGROUPS) return;
            const bool live = t_of_v < live_tokens && column < dv;
            copy_async_16(values_of(n) + (group * C + t_of_v) * COLUMNS,
                          static_cast<const Bf16*>(p.v) + thin_at(row, live ? first + t_of_v : from) * dv + (live ? column : 0), live);
        };
        const auto bring_keys = [&](int64_t first, int live_tokens) {
            const Bf16* at = static_cast<const Bf16*>(p.k) + wide_at(row, live_tokens ? first + thread / UNITS : from) * dk + unit * 8;
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
                barrier_expect(&barriers->early_full, (DIRECT || !READS ? 0 : PAIRS) + PLAN);
                if (!DIRECT && READS) bring_from(pairs, p.pairs + index * (PAIRS / 4), PAIRS, &barriers->early_full);
                bring_from(plan_of(n), p.plans + index, PLAN, &barriers->early_full);
            }
            if (n == 0) bring_values(-1, first - C, first > 0 ? C : 0);
            bring_values(n, first, len_of(first));
            copies_arrive(&barriers->early_full);

            if (!DIRECT && READS && thread == 0) {
                barrier_wait(&barriers->weights_empty, phase(n + 1));
                barrier_expect(&barriers->weights_full, C * QUADS * 16);
                bring_from(weights, p.weights + index * (C * QUADS * 4), C * QUADS * 16, &barriers->weights_full);
            }
            barrier_wait(&barriers->keys_empty, phase(n + 1));
            bring_keys(first - C, first > 0 ? C : 0);
            copies_arrive(&barriers->keys_full);
        }
        // For the final states the last chunk's keys and the rest of its plan.
        if (n == 0 || to < row.len || !p.states) return;
        index -= e.value_heads;
        barrier_wait(&barriers->early_empty, phase(n + 1));
        if (thread == 0) {
            // The only arrivals: no V comes.
            barrier_expect(&barriers->early_full, REST);
            bring_from(pairs, &p.plans[index].exit_len, REST, &barriers->early_full);
        }
        copies_arrive(&barriers->early_full);
        barrier_wait(&barriers->keys_empty, phase(n + 1));
        bring_keys(from + (n - 1) * C, len_of(from + (n - 1) * C));
        copies_arrive(&barriers->keys_full);
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
    METHOD void apply_factors(uint32_t (&v)[4][2][2], const uint32_t (&raw)[4][2], const float* factors, int lane) const {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 factor = *reinterpret_cast<const float2*>(factors + s * 16 + i * 8 + lane % 4 * 2);
                split<2>(factor.x * low_bf16(raw[s][i]), factor.y * high_bf16(raw[s][i]), v[s][i]);
            }
    }
    // A chunk's keys as left operands of K^T V: the warp's tiles, 16 tokens a step.
    METHOD void load_keys(uint32_t (&keys)[4][SHARE][4], int warp, int lane) const {
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int tile = 0; tile < SHARE; tile++)
                ldmatrix_x4_trans(keys[s][tile],
                                  k_rows.unit(s * 16 + lane % 8 + lane / 16 * 8, (warp * SHARE + tile) * 2 + lane / 8 % 2));
    }
    // sum[i] += K^T V of the tokens whose bits are set in tokens[i] (SlotChange), all of them in the steps that are set.
    template <int COUNT>
    METHOD void add_tokens(float (&sum)[COUNT][SHARE][4], const uint32_t (&keys)[4][SHARE][4], const uint32_t (&v)[4][2][2],
                           const uint32_t (&tokens)[COUNT], uint32_t steps) const {
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (!(steps >> s & 1)) continue;
#pragma unroll
            for (int plane = 1; plane >= 0; plane--)
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const uint32_t upper = sign_masks(tokens[i] << 2 * s), lower = sign_masks(tokens[i] << (2 * s + 1));
#pragma unroll
                    for (int tile = 0; tile < SHARE; tile++)
                        mma_bf16(sum[i][tile], keys[s][tile], v[s][0][plane] & upper, v[s][1][plane] & lower);
                }
        }
    }

    // sum over a product's slots of their weights times it, into `out`; quads of slots from `first_quad` on. Of dlambda
    // (EXCHANGED): of four slots each of the four threads of a row gets one's sum over its columns.
    template <int REGISTERS>
    METHOD static void sum_slots(float (&out)[4], const float (&read)[REGISTERS], const float4* weights, const uint32_t (&of_q)[2],
                                 float* reads_at, bool live_columns, int c) {
        constexpr int ALL_SLOTS = REGISTERS / 4, MINE = (ALL_SLOTS + 3) / 4;
        // Of four slots those of the upper row and those of the lower, asked for one ahead: there are no registers for all.
        float4 next = weights[0];
#pragma unroll
        for (int quad = 0; quad < MINE; quad++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float w[4] = {next.x, next.y, next.z, next.w};
                keep_order();
                if (quad * 2 + half + 1 < MINE * 2) next = weights[(quad * 2 + half + 1) / 2 * 16 + (1 - half) * 8];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int slot = quad * 4 + i;
                    if (slot >= ALL_SLOTS) continue;
                    out[half * 2] += w[i] * read[slot * 4 + half * 2];
                    out[half * 2 + 1] += w[i] * read[slot * 4 + half * 2 + 1];
                }
            }
            if constexpr (EXCHANGED) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int slot = quad * 4 + i;
                        x[i] = slot >= ALL_SLOTS ? 0.0f
                                                 : low_bf16(of_q[half]) * read[slot * 4 + half * 2] +
                                                       high_bf16(of_q[half]) * read[slot * 4 + half * 2 + 1];
                    }
                    const bool odd = c & 1, late = c & 2;
#pragma unroll
                    for (int i = 0; i < 4; i += 2)
                        x[i] = (odd ? x[i + 1] : x[i]) + __shfl_xor_sync(ALL, odd ? x[i] : x[i + 1], 1);
                    x[0] = (late ? x[2] : x[0]) + __shfl_xor_sync(ALL, late ? x[0] : x[2], 2);
                    if (live_columns) reads_at[quad * 64 + half * 32] = x[0];
                }
            }
        }
    }

    // Reads the slots of the block's columns, 8 from `slice` on for every group.
    METHOD void read(const ScanSm90Params& p, const Row& row, int slice, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = wide(e), dv = thin(e), capacity = e.capacity;
        const int lane = lane_index(), warp = __shfl_sync(ALL, warp_index() % 4, 0), g = lane / 4, c = lane % 4, c2 = c * 2;

        // A chunk's Q: a left operand a step. Tokens 16 warp + g and 8 later. Every load is made, whatever it is for, so that none
        // waits for another: past the row's end the last token's (whose output no one writes), past dk the first
        // elements (which meet zeros).
        uint2 q_top[STEPS], q_bottom[STEPS];
        const uint32_t q_row = static_cast<uint32_t>(wide_heads(row) * dk * 2);
        const auto load_q = [&](int64_t first, int from_step) {
            const int64_t last = row.len - 1, begin = first < last ? first : last;
            const int rows = last - begin < C ? static_cast<int>(last - begin) : C, top = warp * 16 + g;
            const unsigned char* const at =
                reinterpret_cast<const unsigned char*>(static_cast<const Bf16*>(p.q) + wide_at(row, begin) * dk);
            const uint32_t top_at = (top < rows ? top : rows) * q_row, bottom_at = (top + 8 < rows ? top + 8 : rows) * q_row;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const int k = (from_step + step) * 16 + c * 4;
                const uint32_t live = k < dk ? k * 2 : 0;
                q_top[step] = *reinterpret_cast<const uint2*>(at + (top_at + live));
                q_bottom[step] = *reinterpret_cast<const uint2*>(at + (bottom_at + live));
            }
        };
        if (STEPS == TILES && from < to) load_q(from, 0);

        const uint64_t operand = wgmma_operand(banks, DK * 8, Slots<DK, SLOTS>::OTHERS);
        const int64_t chunk0 = first_place(e, row, from, p.to) * e.value_heads + row.head;
        const uint4* all_pairs = DIRECT ? reinterpret_cast<const uint4*>(p.pairs) + chunk0 * (PAIRS / 16) : pairs;
        const float4* my_weights = (DIRECT ? reinterpret_cast<const float4*>(p.weights) + chunk0 * (C * QUADS) : weights) +
                                   warp * QUADS * 16 + g;
        // dQ stands as what is kept of its chunk.
        const int64_t o_first = EXCHANGED ? chunk0 * C + warp * 16 + g : row.at(from + warp * 16 + g);
        auto* o_at = static_cast<typename OutOf<EXCHANGED>::Type*>(p.o) + o_first * dv + slice + c2;
        const int64_t o_row = EXCHANGED ? dv : static_cast<int64_t>(e.value_heads) * dv;
        const int64_t o_chunk = static_cast<int64_t>(C) * e.value_heads * dv;
        // Of dlambda: q of the block's columns and, by slot, what a group's columns give.
        const Bf16* const thin_q = static_cast<const Bf16*>(p.thin_q) + slice + c2;
        float* reads_at = nullptr;
        int64_t reads_group = 0;
        if (EXCHANGED) {
            reads_group = e.sequences * chunks_of_window(e, from, p.to, C) * e.value_heads * (C * QUADS * 4);
            reads_at = p.d_reads + slice / COLUMNS * reads_group + chunk0 * (C * QUADS * 4) + (warp * QUADS * 16 + g) * 4 + c;
        }
        // 0, which the compiler cannot know: copies of Q would be made as soon as it is loaded, and wait for it there.
        const uint32_t zero = static_cast<uint32_t>(capacity) >> 16;
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
            [[maybe_unused]] uint32_t of_q[WARPGROUPS][2] = {};
            if (EXCHANGED) {
#pragma unroll
                for (int group = 0; group < WARPGROUPS; group++) {
                    if (slice + group * COLUMNS >= dv) continue;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int t = warp * 16 + half * 8 + g;
                        of_q[group][half] = *reinterpret_cast<const uint32_t*>(thin_q + thin_at(row, first + (t < len ? t : 0)) * dv +
                                                                               group * COLUMNS);
                    }
                }
            }
            // The tokens that are not in the slots, those of the chunk before and this one's up to the diagonal.
            float out[WARPGROUPS][4] = {};
            barrier_wait(&barriers->early_full, phase(n));
            {
                const uint4* const my_pairs = all_pairs + ((warp * 4 + warp * (warp + 1) / 2) * 32 + anew(lane));
                uint32_t before[WARPGROUPS][4][2], now[WARPGROUPS][4][2];
#pragma unroll
                for (int group = 0; group < WARPGROUPS; group++) {
                    load_values(before[group], values_of(n - 1) + group * C * COLUMNS, lane);
                    load_values(now[group], values_of(n) + group * C * COLUMNS, lane);
                }
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const uint4 x = my_pairs[s * 32];
#pragma unroll
                    for (int group = 0; group < WARPGROUPS; group++)
                        mma_bf16(out[group], {x.x, x.y, x.z, x.w}, before[group][s][0], before[group][s][1]);
                }
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    if (s > warp) continue;
                    const uint4 x = my_pairs[(4 + s) * 32];
#pragma unroll
                    for (int group = 0; group < WARPGROUPS; group++)
                        mma_bf16(out[group], {x.x, x.y, x.z, x.w}, now[group][s][0], now[group][s][1]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->early_empty);
            uint32_t q[STEPS][4];
            const auto take_q = [&] {
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    q[step][0] = q_top[step].x ^ zero, q[step][1] = q_bottom[step].x ^ zero;
                    q[step][2] = q_top[step].y ^ zero, q[step][3] = q_bottom[step].y ^ zero;
                }
            };
            if (STEPS == TILES) take_q();

            // Product i: part i % PARTS of group i / PARTS. While it runs the one before is summed.
            constexpr int PRODUCTS = WARPGROUPS * PARTS;
            float even[(PARTS == 1 ? REMAINING : 16) * 4], odd[(PARTS <= 2 ? REMAINING : 16) * 4];  // first overwritten
            const auto begin = [&](auto& read, int i) {
                const int group = i / PARTS, part = i % PARTS;
                if (part == 0) barrier_wait(&barriers->written[group], phase(n));
#pragma unroll
                for (int from_step = 0; from_step < TILES; from_step += STEPS) {
                    if (from_step > 0) wgmma_wait();
                    if (STEPS < TILES) load_q(first, from_step), take_q();
                    wgmma_begin();
#pragma unroll
                    for (int step = 0; step < STEPS; step++)
                        wgmma_bf16(read, q[step], operand + (group * BANK + part * 16 * DK * 8 + (from_step + step) * 128) / 16,
                                   from_step + step > 0);
                    wgmma_commit();
                }
            };
            const auto sum = [&](const auto& read, int i) {
                const int group = i / PARTS, part = i % PARTS;
                sum_slots(out[group], read, my_weights + part * 4 * 16, of_q[group],
                          EXCHANGED ? reads_at + group * reads_group + part * 4 * 64 : nullptr, slice + group * COLUMNS < dv, c);
            };
            const auto is_read = [&](int i) {
                if (i % PARTS != PARTS - 1) return;
                __syncwarp();
                if (lane == 0) barrier_arrive(&barriers->read[i / PARTS]);
            };
            begin(even, 0);
            if (!DIRECT) barrier_wait(&barriers->weights_full, phase(n));
#pragma unroll
            for (int i = 0; i < PRODUCTS; i++) {
                const bool another = i + 1 < PRODUCTS;
                // The next group's slots may still be written, while others wait for this one's to be read.
                const bool waits = !another || (i + 1) % PARTS == 0;
                if (waits) wgmma_wait();
                if (i % 2 == 0) {
                    if (waits) wgmma_hold(even), is_read(i);
                    if (another) begin(odd, i + 1);
                    if (!waits) wgmma_wait_but<1>(), wgmma_hold(even), is_read(i);
                    sum(even, i);
                } else {
                    if (waits) wgmma_hold(odd), is_read(i);
                    if (another) begin(even, i + 1);
                    if (!waits) wgmma_wait_but<1>(), wgmma_hold(odd), is_read(i);
                    sum(odd, i);
                }
                // The next chunk's Q; after the last chunk too, for under a condition the loads would be waited for here.
                if (STEPS == TILES && i == PRODUCTS / 2) load_q(first + C, 0);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->weights_empty);
#pragma unroll
            for (int group = 0; group < WARPGROUPS; group++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (warp * 16 + half * 8 + g < len && slice + group * COLUMNS < dv)
                        store2(o_at + half * 8 * o_row + group * COLUMNS, out[group][half * 2], out[group][half * 2 + 1]);
                }
            o_at += o_chunk;
            if (EXCHANGED) reads_at += static_cast<int64_t>(e.value_heads) * (C * QUADS * 4);
            if (DIRECT) all_pairs += static_cast<int64_t>(e.value_heads) * (PAIRS / 16), my_weights += static_cast<int64_t>(e.value_heads) * C * QUADS;
        }
    }

    // Writes the slots of a group of columns, 8 from `column` on.
    METHOD void write(const ScanSm90Params& p, const Row& row, int group, int column, int64_t from, int64_t to) const {
        const Extents& e = p.extents;
        const int dk = wide(e), dv = thin(e), capacity = e.capacity;
        const int lane = lane_index(), warp = __shfl_sync(ALL, warp_index() % 4, 0), g = lane / 4, c = lane % 4, c2 = c * 2;
        const int thread = threadIdx.x % GROUP;
        const bool live_columns = column < dv;
        const int64_t state = static_cast<int64_t>(dk) * dv;
        const Slots<DK, SLOTS> mine = Slots<DK, SLOTS>::of(banks + group * BANK, g, c);
        const int64_t bank_at = (static_cast<int64_t>(blockIdx.x) * WARPGROUPS + group) * BANK;
        // Row of dk of the thread's elements (Slots).
        const auto k_of = [&](int tile, int half) { return (warp * SHARE + tile) * 16 + half * 8 + g; };
        // What the next products read.
        const auto hand_over = [&] {
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->written[group]);
        };

        // The slots that the window begins with; every other place zero, for a read multiplies them all.
        if (from > 0) {
            if (thread == 0) {
                barrier_expect(&barriers->bank_full[group], BANK);
                copy_bulk(mine.all, p.source + bank_at, BANK, &barriers->bank_full[group]);
            }
            barrier_wait(&barriers->bank_full[group], phase(0));
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
                        const float2 two = load_state(in, e, k, column + c2);
                        x[n * 2] = two.x, x[n * 2 + 1] = two.y;
                    }
                }
                mine.store(i, warp, x);
            }
        }
        hand_over();

        // Every warp its share of dk, so that none waits for another; oldest first, so that nothing is overwritten that a later
        // slot takes in.
        int64_t n = 0;
        for (int64_t first = from; first < to; first += C, n++) {
            const ChunkPlan& plan = *plan_of(n);
            uint32_t keys[4][SHARE][4], v[4][2], factored[4][2][2];
            barrier_wait(&barriers->early_full, phase(n));
            load_values(v, values_of(n - 1) + group * C * COLUMNS, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->early_empty);
            barrier_wait(&barriers->keys_full, phase(n));
            load_keys(keys, warp, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(&barriers->keys_empty);
            const int changes = static_cast<int>(plan.changes);
            apply_factors(factored, v, plan.value_factor, lane);
            // Two at a time, so that one's instructions fill the other's waits, and what to do next is asked for ahead. All that
            // two take in is loaded before either is stored; none of it is the older's place (oldest first).
            uint4 next[2];
            float next_factor[2];
            const auto ask = [&](int change) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const SlotChange* const at = plan.changed + (change + i < changes ? change + i : 0);
                    next[i] = *reinterpret_cast<const uint4*>(at), next_factor[i] = at->factor;
                }
            };
            ask(0);
            if (READS) barrier_wait(&barriers->read[group], phase(n));
#pragma unroll 1
            for (int change = 0; change < changes; change += 2) {
                const bool two = change + 1 < changes;
                float sum[2][SHARE][4] = {}, x[2][SHARE * 4], factor[2];
                uint32_t place[2], steps[2], tokens[2], entries[2], first_entry[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 what = next[i];
                    const bool live = i == 0 || two;
                    tokens[i] = live ? (c < 2 ? what.x : what.y) >> c % 2 * 16 : 0;
                    place[i] = what.z & 0xff, steps[i] = live ? what.z >> 8 & 0xff : 0;
                    entries[i] = live ? what.z >> 16 & 0xff : 0;
                    first_entry[i] = what.z >> 24, factor[i] = next_factor[i];
                    mine.load(what.w, warp, x[i]);
                }
                ask(change + 2);
                add_tokens(sum, keys, factored, tokens, steps[0] | steps[1]);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int m = 0; m < SHARE * 4; m++)
                        x[i][m] = sum[i][m / 4][m % 4] + (entries[i] ? factor[i] * x[i][m] : 0.0f);
                const uint32_t most = entries[0] > entries[1] ? entries[0] : entries[1];
#pragma unroll 1
                for (uint32_t j = 1; j < most; j++) {
                    float other[2][SHARE * 4], times[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (j >= entries[i]) continue;
                        mine.load(plan.entry_place[first_entry[i] + j], warp, other[i]);
                        times[i] = plan.factor[first_entry[i] + j];
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (j >= entries[i]) continue;
#pragma unroll
                        for (int m = 0; m < SHARE * 4; m++) x[i][m] += times[i] * other[i][m];
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (i == 0 || two) mine.store(place[i], warp, x[i]);
            }
            hand_over();
        }

        if (to < row.len) {
            if (!p.banks) return;
            group_barrier(1 + group, GROUP);
            uint4* const left = reinterpret_cast<uint4*>(p.banks + bank_at);
#pragma unroll 4
            for (int i = thread; i < BANK / 16; i += GROUP) left[i] = reinterpret_cast<const uint4*>(mine.all)[i];
            return;
        }
        // The cache, oldest first, unused slots zero: states and the last chunk's tokens.
        if (!p.states) return;
        if (to == 0) {
            const int held = p.initial_len ? static_cast<int>(p.initial_len[row.index()]) : 0;
            for (int i = 0; i < capacity; i++) {
                float x[SHARE * 4] = {};
                if (i < held) mine.load(i, warp, x);
                put_state(p, row, x, i, warp, g, column, c2);
            }
            return;
        }
        // The rest of its plan.
        struct Rest {
            uint32_t len, reserved[3];
            float factor[MOST_SLOTS], value_factor[C];
            uint8_t place[MOST_SLOTS], from[MOST_SLOTS], to[MOST_SLOTS];
        };
        static_assert(sizeof(Rest) == REST);
        const Rest& rest = *reinterpret_cast<const Rest*>(pairs);
        barrier_wait(&barriers->early_full, phase(n));
        barrier_wait(&barriers->keys_full, phase(n));
        uint32_t keys[4][SHARE][4], v[4][2], factored[4][2][2];
        load_keys(keys, warp, lane);
        load_values(v, values_of(n - 1) + group * C * COLUMNS, lane);
        apply_factors(factored, v, rest.value_factor, lane);
        const int held = static_cast<int>(rest.len);
#pragma unroll 1
        for (int i = 0; i < capacity; i++) {
            float x[SHARE * 4] = {};
            if (i < held) {
                const int place = rest.place[i], tokens_from = rest.from[i], tokens_to = rest.to[i];
                if (place != NO_STATE) {
                    mine.load(place, warp, x);
                    const float factor = rest.factor[i];
#pragma unroll
                    for (int m = 0; m < SHARE * 4; m++) x[m] *= factor;
                }
                if (tokens_from < tokens_to) {
                    uint32_t tokens = 0, steps = 0;
#pragma unroll
                    for (int eight = 0; eight < 8; eight++) {
                        const int t = eight * 8 + c2;
                        tokens |= (t >= tokens_from && t < tokens_to ? 0x80u : 0u) >> eight;
                        tokens |= (t + 1 >= tokens_from && t + 1 < tokens_to ? 0x8000u : 0u) >> eight;
                        if (tokens_from < eight * 8 + 8 && tokens_to > eight * 8) steps |= 1u << eight / 2;
                    }
                    float sum[1][SHARE][4] = {};
                    const uint32_t those[1] = {tokens};
                    add_tokens(sum, keys, factored, those, steps);
#pragma unroll
                    for (int m = 0; m < SHARE * 4; m++) x[m] += sum[0][m / 4][m % 4];
                }
            }
            put_state(p, row, x, i, warp, g, column, c2);
        }
    }

    // A thread's elements of slot i of the final cache.
    METHOD void put_state(const ScanSm90Params& p, const Row& row, const float (&x)[SHARE * 4], int i, int warp, int g, int column,
                          int c2) const {
        const int dk = wide(p.extents), dv = thin(p.extents);
        float* const state = p.states + (row.index() * p.extents.capacity + i) * (static_cast<int64_t>(dk) * dv);
#pragma unroll
        for (int n = 0; n < SHARE * 2; n++) {
            const int k = (warp * SHARE + n / 2) * 16 + n % 2 * 8 + g;
            if (k >= dk || column >= dv) continue;
            float* const out = state + in_state(p.extents, k, column + c2);
            if (EXCHANGED) out[0] = x[n * 2], out[dk] = x[n * 2 + 1];
            else *reinterpret_cast<float2*>(out) = make_float2(x[n * 2], x[n * 2 + 1]);
        }
    }
};

template <int DK, int SLOTS, int WARPGROUPS, bool EXCHANGED, bool READS>
DEVICE void scan_sm90(const ScanSm90Params& p) {
    const Extents& e = p.extents;
    constexpr int WIDTH = WARPGROUPS * COLUMNS;
    using Scan = Scan<DK, SLOTS, WARPGROUPS, EXCHANGED, READS>;
    const int slices = (Scan::thin(e) + WIDTH - 1) / WIDTH, slice = blockIdx.x % slices * WIDTH;
    const int64_t index = blockIdx.x / slices;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (p.from > 0 && row.len <= p.from) return;
    const int64_t to = row.len < p.to ? row.len : p.to;

    Carve carve{dynamic_shared()};
    Scan scan;
    scan.take(carve);
    if (threadIdx.x == 0) scan.init_barriers();
    __syncthreads();
    // The reader, which holds the products, gets the registers that the others leave: those of READS + WARPGROUPS + 1 groups.
    const int group = __shfl_sync(ALL, warp_index() / 4, 0);
    if (group == READS + WARPGROUPS) {
        registers_fewer<56>();
        scan.bring(p, row, slice, p.from, to);
    } else if (group >= READS) {
        if (!READS) registers_more<224>();
        else if (WARPGROUPS == 2) registers_fewer<120>();
        else registers_more<208>();
        const int mine = group - READS;
        scan.write(p, row, mine, slice + mine * COLUMNS, p.from, to);
    } else if constexpr (READS) {
        registers_more<WARPGROUPS == 2 ? 216 : 232>();
        scan.read(p, row, slice, p.from, to);
    }
}

}  // namespace
}  // namespace dla

// One table of what exists: head size as computed, slots, groups of 8 columns. 30 slots is the default M and the most
// that two groups have room for at dk = 128; one group where two do not fit.
#define SCAN_SM90(DK, SLOTS, WARPGROUPS)                                                          \
    KERNEL BLOCK_OF((WARPGROUPS + 2) * 128) scan_sm90_##DK##_##SLOTS##_##WARPGROUPS(               \
        const __grid_constant__ dla::ScanSm90Params p) {                                          \
        dla::scan_sm90<DK, SLOTS, WARPGROUPS, false, true>(p);                                     \
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

// For dQ: size of do's and v's rows as computed, slots, groups of 8 columns of dk. scan_states: without a read.
#define SCAN_QUERIES_SM90(DV, SLOTS, WARPGROUPS)                                                  \
    KERNEL BLOCK_OF((WARPGROUPS + 2) * 128) scan_queries_sm90_##DV##_##SLOTS##_##WARPGROUPS(       \
        const __grid_constant__ dla::ScanSm90Params p) {                                          \
        dla::scan_sm90<DV, SLOTS, WARPGROUPS, true, true>(p);                                      \
    }                                                                                             \
    KERNEL BLOCK_OF((WARPGROUPS + 1) * 128) scan_states_sm90_##DV##_##SLOTS##_##WARPGROUPS(        \
        const __grid_constant__ dla::ScanSm90Params p) {                                          \
        dla::scan_sm90<DV, SLOTS, WARPGROUPS, true, false>(p);                                     \
    }
SCAN_QUERIES_SM90(64, 16, 2)
SCAN_QUERIES_SM90(64, 32, 2)
SCAN_QUERIES_SM90(128, 16, 2)
SCAN_QUERIES_SM90(128, 30, 1)
SCAN_QUERIES_SM90(128, 30, 2)
SCAN_QUERIES_SM90(128, 32, 1)
