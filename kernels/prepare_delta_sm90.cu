// prepare on Hopper, gated delta rule, bf16: what the scan takes of a chunk of C = 128 tokens that is the same for all its
// slices of dv (OPERATOR.md, section 4), with A, L, Tm, W, Kd and Kh as there:
//
//   P . Lambda,  P = (A Tm) diag(beta),  Lambda_ts = lambda_t[slot_t(s)];  w_t[j] = lambda_t[pi_t(j)]
//   Qt = scale e^Gamma Q - (P diag(e^Gamma)) K        = scale e^Gamma Q - A W
//   W' = diag(e^{Gamma_C - Gamma}) Tm diag(beta e^Gamma) K,  F = -K^T W' = -Kd^T W: the transition of a slot less e^{Gamma_C}
//   Kh = diag(beta) Tm^T diag(e^{Gamma_C - Gamma}) K
//   and which slots merge, which tokens end where (DeltaPlan, abi.cuh).
//
// So K as it comes is the right operand of every product of dk columns, and the factors go to the left one.
//
// One block of two groups of 128 threads per chunk and value head (grid: abi.cuh; a place without a chunk returns at once);
// group i has tokens 64 i .. 64 i + 63 as rows. Tm = [[T11, 0], [T21, T22]] of 64 x 64: each group inverts its own, by blocks of 16
// in f32, then twice (T_BB L_BA) T_AA by mma; the second group makes T21 so. Everything else is wgmma, left operands in
// registers. P . Lambda and Qt leave as left operands of the scan's products, the weights in the order in which a thread of the
// scan reads them.
//
// Slots are stretches of tokens, so slot_t(s) is a count: of the items (entry slots, then tokens) up to s that begin a slot at t.
// A thread follows an item from the token that makes it begin one to that which merges it away.
//
// Shared memory (bytes; D = dk as computed): keys 256 D; Tm, then W', 49,152; lambda 512 M; blocks of 16 8,704; the rest 6,976:
// D = 128, M = 32: 113,984, two blocks a multiprocessor.
// Floor, not measured: at D = 128 11,000 clocks of the tensor cores a chunk and head, at S3 0.2 ms; it writes 139,472 bytes a chunk
// and head, at S3 0.57 GB: 0.3 ms with what it reads.
// Numerics: sums in f32. A, Tm and the left operands of W' and Kh in two planes; P diag(e^Gamma) and W' rounded once to bf16, and so
// is what leaves.

#include "common/delta.cuh"
#include "common/hopper.cuh"
#include "common/replay.cuh"

namespace dla {
namespace {

// A matrix of bf16 planes in shared memory, each [columns / 8][ROWS][8]: a right operand of wgmma, and ldmatrix reads blocks of
// it without conflicts.
template <int PARTS, int ROWS, int WIDTH>
struct Planes {
    static constexpr int PLANE = ROWS * WIDTH;
    uint16_t* data;

    METHOD uint16_t* at(int part, int row, int column) const {
        return data + part * PLANE + column / 8 * ROWS * 8 + row * 8 + column % 8;
    }
    METHOD void put2(int row, int column, float x0, float x1) const {
        uint32_t planes[PARTS];
        split<PARTS>(x0, x1, planes);
#pragma unroll
        for (int part = 0; part < PARTS; part++) *reinterpret_cast<uint32_t*>(at(part, row, column)) = planes[part];
    }
    // As load_a, load_a_trans and load_b_trans of tile.cuh.
    METHOD void load_a(int row, int k, uint32_t (&a)[PARTS][4]) const {
        const int lane = lane_index();
#pragma unroll
        for (int part = 0; part < PARTS; part++) ldmatrix_x4(a[part], at(part, row + lane % 16, k + lane / 16 * 8));
    }
    METHOD void load_a_trans(int row, int k, uint32_t (&a)[PARTS][4]) const {
        const int lane = lane_index();
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            ldmatrix_x4_trans(a[part], at(part, k + lane % 8 + lane / 16 * 8, row + lane / 8 % 2 * 8));
    }
    METHOD void load_b_trans(int column, int k, uint32_t (&b)[PARTS][4]) const {
        const int lane = lane_index();
#pragma unroll
        for (int part = 0; part < PARTS; part++) ldmatrix_x4_trans(b[part], at(part, k + lane % 16, column + lane / 16 * 8));
    }
    // The right operand of 16 rows from `row` on, all columns.
    METHOD uint64_t operand(int part, int row) const { return wgmma_operand(at(part, row, 0), ROWS * 16); }
};

using Quadrant = Planes<2, 64, 64>;

constexpr int GROUP_THREADS = 128;

// Where a chunk's events put its entry slots and tokens: which items begin a slot after every token.
struct Heads {
    static constexpr int C = DELTA_CHUNK, ENTRIES = 32, WORDS = 1 + C / 32;

    uint8_t* events;  // [C]
    uint8_t* len;     // [C] slots held after token t
    uint8_t* merged;  // [C] the item that token t merges away
    uint32_t* words;  // [C][WORDS] entry slots (bit j of the first), tokens

    METHOD void take(Carve& carve) {
        events = carve.take<uint8_t>(C);
        len = carve.take<uint8_t>(C);
        merged = carve.take<uint8_t>(C);
        words = carve.take<uint32_t>(C * WORDS);
    }

    // Replays `tokens` events from `entry` slots on. By the block; ends with a barrier.
    METHOD void run(const uint8_t* log, const Row& row, int64_t first, int tokens, int entry) const {
        const int warp = warp_index(), lane = lane_index();
        if (warp == 0) {
            // m grows with every slot that opens without a merge.
            int held = entry;
#pragma unroll
            for (int from = 0; from < C; from += 32) {
                const int t = from + lane, event = t < tokens ? log[row.at(first + t)] : EXTEND;
                const uint32_t opens = __ballot_sync(ALL, event == OPEN);
                events[t] = event;
                len[t] = held + __popc(opens & ((2u << lane) - 1));
                held += __popc(opens);
            }
        }
        __syncthreads();
        if (warp < WORDS) {
            const int born = (warp - 1) * 32 + lane;  // of an entry slot: before
            const bool opens = warp > 0 && born < tokens && events[born] != EXTEND;
            const int opens_at = opens ? len[born] - 1 : 0;
            bool begins = warp == 0 && lane < entry;
            int at = lane;
#pragma unroll 4
            for (int t = warp == 0 ? 0 : (warp - 1) * 32; t < tokens; t++) {
                // The slot that merges away: none is 255.
                const int event = events[t], gone = event >= MERGE ? event - MERGE + 1 : 255;
                if (begins && at == gone) begins = false, merged[t] = warp * 32 + lane;
                if (at > gone) at--;
                if (t == born) begins = opens, at = opens_at;
                const uint32_t word = __ballot_sync(ALL, begins);
                if (lane == 0) words[t * WORDS + warp] = word;
            }
        }
        __syncthreads();
    }

    // Items up to bit `bit` of a word.
    METHOD static int count(uint32_t word, int bit) { return __popc(word & ((2u << bit) - 1)); }
    // pi_t(j).
    METHOD int of_slot(int t, int j) const { return count(words[t * WORDS], j) - 1; }
    // Slots at t that begin before token `s`, a multiple of 32.
    METHOD int before(int t, int s) const {
        int sum = 0;
        for (int word = 0; word <= s / 32; word++) sum += __popc(words[t * WORDS + word]);
        return sum;
    }
    METHOD uint32_t tokens_from(int t, int s) const { return words[t * WORDS + 1 + s / 32]; }
};

// The scan's plan, by one warp; `begins` [ENTRIES + 2] and `link` [C] are scratch.
DEVICE void make_plan(const Heads& heads, int tokens, int entry, const uint8_t* entry_place, uint8_t* begins, uint8_t* link,
                      float decay, DeltaPlan* plan) {
    constexpr int C = Heads::C, ENTRIES = Heads::ENTRIES, FOUND = 128;  // + place; less: the token whose place it is
    const int lane = lane_index(), exit_len = heads.len[tokens - 1];

    // The slot that a token opens takes the place of the one that merges away then, which is that of the item that began it,
    // or if none merges the next free one.
    for (int t = lane; t < C; t += 32) {
        const int event = t < tokens ? heads.events[t] : EXTEND;
        int to = FOUND;
        if (event == OPEN) to = FOUND + heads.len[t] - 1;
        if (event >= MERGE) {
            const int item = heads.merged[t];
            to = item < ENTRIES ? FOUND + entry_place[item] : item - ENTRIES;
        }
        link[t] = to;
    }
    __syncwarp();
    for (bool more = true; more;) {
        more = false;
        int next[C / 32];
#pragma unroll
        for (int i = 0; i < C / 32; i++) {
            const int to = link[lane + 32 * i];
            next[i] = to < FOUND ? link[to] : to;
            more |= to < FOUND;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < C / 32; i++) link[lane + 32 * i] = next[i];
        more = __any_sync(ALL, more);
        __syncwarp();
    }

    // The items that begin the slots held after the chunk.
    uint32_t kept = 0;
    int rank = 0;
    for (int word = 0; word < Heads::WORDS; word++) {
        const bool inside = word == 0 || (word - 1) * 32 < tokens;
        const uint32_t bits = inside ? heads.words[(tokens - 1) * Heads::WORDS + word] : 0;
        if (word == 0) kept = bits;
        if (bits >> lane & 1) begins[rank + Heads::count(bits, lane) - 1] = word * 32 + lane;
        rank += __popc(bits);
    }
    if (lane == 0) begins[exit_len] = ENTRIES + tokens;
    plan->gone[lane] = 255;
    plan->merged_from[lane] = plan->merged_to[lane] = plan->tokens_from[lane] = plan->tokens_to[lane] = 0;
    plan->exit_place[lane] = 0;
    __syncwarp();
    const uint32_t entries = entry == ENTRIES ? ~0u : (1u << entry) - 1, gone = entries & ~kept;
    const auto before = [&](int slot) { return __popc(slot == ENTRIES ? gone : gone & ((1u << slot) - 1)); };
    if (gone >> lane & 1) plan->gone[entry_place[lane]] = before(lane);
    if (lane < exit_len) {
        const int item = begins[lane], next = begins[lane + 1];
        const int place = item < ENTRIES ? entry_place[item] : link[item - ENTRIES] - FOUND;
        if (item < ENTRIES) {
            plan->merged_from[place] = before(item), plan->merged_to[place] = before(next < ENTRIES ? next : entry);
            plan->tokens_to[place] = next > ENTRIES ? next - ENTRIES : 0;
        } else {
            plan->tokens_from[place] = item - ENTRIES, plan->tokens_to[place] = next - ENTRIES;
        }
        plan->exit_place[lane] = place;
    }
    __syncwarp();
    const int from = plan->merged_from[lane];
    const uint32_t firsts = __reduce_or_sync(ALL, from < plan->merged_to[lane] ? 1u << from : 0);
    if (lane == 0) plan->merges = __popc(gone), plan->firsts = firsts, plan->decay = decay, plan->exit_len = exit_len;
}

// The product's fragments as left operands of the next one in two planes: 64 columns, 16 at a step.
DEVICE void left_operands(const float (&c)[32], uint32_t (&a)[4][2][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t planes[2];
        split<2>(c[i * 2], c[i * 2 + 1], planes);
        a[i / 4][0][i % 4] = planes[0], a[i / 4][1][i % 4] = planes[1];
    }
}

// C [64, 64] (+)= A B in two planes, by a group.
DEVICE void multiply_planes(float (&c)[32], const uint32_t (&a)[4][2][4], const Quadrant& b, bool accumulate) {
    wgmma_hold(c);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) {
        wgmma_bf16(c, a[step][1], b.operand(0, step * 16), accumulate || step > 0);
        wgmma_bf16(c, a[step][0], b.operand(1, step * 16), 1);
        wgmma_bf16(c, a[step][0], b.operand(0, step * 16), 1);
    }
    wgmma_commit();
    wgmma_wait();
    wgmma_hold(c);
}

// A left operand whose column k is multiplied by factor[k].
DEVICE void multiply_columns(uint32_t (&a)[2][4], const float* factor) {
    const int c2 = lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = *reinterpret_cast<const float2*>(factor + i / 2 * 8 + c2);
        uint32_t planes[2];
        split<2>((low_bf16(a[0][i]) + low_bf16(a[1][i])) * f.x, (high_bf16(a[0][i]) + high_bf16(a[1][i])) * f.y, planes);
        a[0][i] = planes[0], a[1][i] = planes[1];
    }
}

// Inverts I + L of 64 x 64 by a group, in place: `tile` has L below the blocks of 16 on the diagonal, zeros above them; `diagonal`
// [16][17] of each warp the block on the diagonal. What is read last is written before a barrier that the caller has.
DEVICE void invert_quadrant(const Quadrant& tile, const float* diagonal, int group) {
    const int warp = warp_index() % 4, lane = lane_index(), r0 = warp * 16;
    // A lane has a column, both halves of the warp the same ones.
    {
        const int column = lane % 16;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int u = 0; u < 15; u++)
#pragma unroll
            for (int i = u + 1; i < 16; i++) x[i] -= diagonal[i * 17 + u] * x[u];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            uint32_t planes[2];
            split<2>(x[i], 0.0f, planes);
            *tile.at(lane / 16, r0 + i, r0 + column) = static_cast<uint16_t>(lane < 16 ? planes[0] : planes[1]);
        }
    }
    group_barrier(1 + group, GROUP_THREADS);
    const auto left_of = [](const float(&c)[2][4], uint32_t(&a)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t planes[2];
            split<2>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1], planes);
            a[0][i] = planes[0], a[1][i] = planes[1];
        }
    };
    uint32_t a[2][4], b[2][4];
    float c[2][4];
    if (warp % 2 == 1) {
        clear(c);
        tile.load_a(r0, r0, a), tile.load_b_trans(r0 - 16, r0, b);
        multiply<2, 2>(c, a, b);
        left_of(c, a);
        clear(c);
        tile.load_b_trans(r0 - 16, r0 - 16, b);
        multiply<2, 2>(c, a, b);
        each_pair(c, [&](int r, int n, float x0, float x1) { tile.put2(r0 + r, r0 - 16 + n, -x0, -x1); });
    }
    group_barrier(1 + group, GROUP_THREADS);
    uint32_t x[2][2][4];
    if (warp >= 2) {
#pragma unroll
        for (int v = 0; v < 2; v++) {
            clear(c);
            for (int u = 32; u <= r0; u += 16) {
                tile.load_a(r0, u, a), tile.load_b_trans(v * 16, u, b);
                multiply<2, 2>(c, a, b);
            }
            left_of(c, x[v]);
        }
    }
    group_barrier(1 + group, GROUP_THREADS);
    if (warp >= 2) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            clear(c);
#pragma unroll
            for (int v = column; v < 2; v++) {
                tile.load_b_trans(column * 16, v * 16, b);
                multiply<2, 2>(c, x[v], b);
            }
            each_pair(c, [&](int r, int n, float x0, float x1) { tile.put2(r0 + r, column * 16 + n, -x0, -x1); });
        }
    }
}

template <int D>
DEVICE void prepare_delta_sm90(const PrepareDeltaSm90Params& p) {
    constexpr int C = DELTA_CHUNK, HALF = 64, PAIRS = DeltaLayout::PAIRS;
    constexpr DeltaLayout layout = {D};
    const Extents& e = p.extents;
    const int head = blockIdx.x % e.value_heads;
    const int64_t kept = blockIdx.x / e.value_heads;
    Row row;
    int64_t first;
    if (e.cu_seqlens) {
        row = row_of(e, sequence_of_chunk(e, kept, C), head);
        first = (kept - first_chunk(row, C)) * C;
    } else {
        const int64_t chunks = chunks_of_window(e, p.from, p.to, C);
        row = row_of(e, kept / chunks, head);
        first = p.from + kept % chunks * C;
    }
    const int64_t left = row.len - first;
    if (first < p.from || first >= p.to || left <= 0) return;
    const int len = left < C ? static_cast<int>(left) : C;
    const int64_t entered = (first_chunk(row, HALF) + first / HALF) * e.value_heads + row.head;
    const int64_t index = kept * e.value_heads + row.head;
    const int dk = e.dk, capacity = e.capacity;
    const int thread = threadIdx.x, lane = lane_index(), group = warp_index() / 4, warp = warp_index() % 4;
    const int g = lane / 4, c2 = lane % 4 * 2;
    // Of a chunk's first token, and from token to token.
    const int64_t at_token = row.at(first);
    const Bf16* const q = static_cast<const Bf16*>(p.q) + row.key_at(first) * dk;
    const Bf16* const k = static_cast<const Bf16*>(p.k) + row.key_at(first) * dk;
    const int key_stride = e.heads * dk;
    const auto key_row = [&](int t) { return static_cast<int64_t>(t) * key_stride; };

    Carve carve{dynamic_shared()};
    Heads heads;
    heads.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const beta = carve.take<float>(C);
    float* const q_factor = carve.take<float>(C);      // of rows under qk_l2norm, with scale
    float* const k_factor = carve.take<float>(C);
    float* const from_entry = carve.take<float>(C);    // beta e^Gamma, of the key as it comes
    float* const to_exit = carve.take<float>(C);       // e^{Gamma_C - Gamma}, likewise
    uint8_t* const entry_place = carve.take<uint8_t>(Heads::ENTRIES);
    uint8_t* const slot_at = carve.take<uint8_t>(Heads::ENTRIES);  // entry slot at a place
    uint8_t* const begins = carve.take<uint8_t>(Heads::ENTRIES + 2);
    uint8_t* const link = carve.take<uint8_t>(C);
    DeltaPlan* const plan = carve.take<DeltaPlan>(1);
    float* const diagonals = carve.take<float>(WARPS * 16 * 17);
    float* const lambda = carve.take<float>(C * capacity);
    const Planes<1, C, D> keys = {carve.take<uint16_t>(C * D)};
    uint16_t* const quadrants = carve.take<uint16_t>(3 * 2 * HALF * HALF);  // T11, T21, T22; then W'
    carve.check();
    const auto quadrant = [&](int i, int j) { return Quadrant{quadrants + (i + j) * 2 * HALF * HALF}; };

    // Eight tokens by four groups of columns a warp: whole sectors from memory, no bank twice.
    for (int i = thread; i < C * D / 8; i += THREADS) {
        const int t = i % 8 + i / D * 8, column = i / 8 % (D / 8) * 8;
        const bool live = t < len && column < dk;
        copy_async_16(keys.at(0, t, column), k + key_row(live ? t : 0) + (live ? column : 0), live);
    }
    const int entry = static_cast<int>(p.chunk_len[entered]);
    if (thread < Heads::ENTRIES) slot_at[thread] = 255;
    for (int t = warp_index(); t < len; t += WARPS) {
        const float* const from = p.lambda + (at_token + static_cast<int64_t>(t) * e.value_heads) * p.lambda_columns;
        if (lane < capacity) copy_async_4(lambda + t * capacity + lane, from + lane, true);
    }
    if (p.qk_l2norm) {
        for (int t = warp_index(); t < C; t += WARPS) {
            const bool live = t < len;
            const float qf = norm_factor(live ? q + key_row(t) : nullptr, dk, true);
            const float kf = norm_factor(live ? k + key_row(t) : nullptr, dk, true);
            if (lane == 0) q_factor[t] = p.scale * qf, k_factor[t] = kf;
        }
    } else if (thread < C) {
        q_factor[thread] = p.scale, k_factor[thread] = 1.0f;
    }
    if (warp_index() == 7) load_gamma(p.g, row, first, len, C, gamma);
    if (thread < C) beta[thread] = thread < len ? p.beta[at_token + static_cast<int64_t>(thread) * e.value_heads] : 0.0f;
    __syncthreads();
    if (thread < C) {
        from_entry[thread] = beta[thread] * k_factor[thread] * exp_approx(value(gamma[thread]));
        to_exit[thread] = k_factor[thread] * exp_approx(minus(gamma[C - 1], gamma[thread]));
    }
    if (thread < Heads::ENTRIES) {
        const bool held = thread < entry;
        const int place = held ? p.chunk_place[entered * capacity + thread] : 0;
        entry_place[thread] = place;
        if (held) slot_at[place] = thread;
    }
    heads.run(p.events, row, first, len, entry);
    const auto weight_of = [&](int t, int slot) { return lambda[t * capacity + column_of(e, slot, heads.len[t])]; };

    copies_wait();
    fence_async();
    __syncthreads();

    // The weights of four places at a time: neighbours, or where a thread of the scan has every other place, of those.
    const int quads = p.slots / 4, shift = __ffs(quads) - 1;  // a power of two
    for (int i = thread; i < C * quads; i += THREADS) {
        const int row_in = i % 8, half = i / 8 % 2, quad = i / 16 & (quads - 1);
        const int t = (i >> (4 + shift)) * 16 + half * 8 + row_in;
        float x[4] = {};
        if (t < len) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int slot = slot_at[p.alternate ? quad / 2 * 8 + quad % 2 + n * 2 : quad * 4 + n];
                if (slot != 255) x[n] = weight_of(t, heads.of_slot(t, slot));
            }
        }
        reinterpret_cast<float4*>(p.weights)[index * C * quads + i] = make_float4(x[0], x[1], x[2], x[3]);
    }

    // e^{Gamma_t - Gamma_s} and the key's factor, of s and the next; no more than 1 past the diagonal.
    const auto decays = [&](int t, int s, float(&x)[2]) {
        const Gamma at = gamma[t];
        const float4 of = *reinterpret_cast<const float4*>(gamma + s);
        const float2 factor = *reinterpret_cast<const float2*>(k_factor + s);
        x[0] = exp_approx(fminf(minus(at, {of.x, of.y}), 0.0f)) * factor.x;
        x[1] = exp_approx(fminf(minus(at, {of.z, of.w}), 0.0f)) * factor.y;
    };

    // L, the group's rows; 64 columns at a time.
    const int t0 = group * HALF + warp * 16;
#pragma unroll 1
    for (int half = 0; half <= group; half++) {
        float c[32];
        {
            uint32_t a[D / 16][4];
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                uint32_t one[1][4];
                keys.load_a(t0, step * 16, one);
#pragma unroll
                for (int i = 0; i < 4; i++) a[step][i] = one[0][i];
            }
            wgmma_hold(c);
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < D / 16; step++)
                wgmma_bf16_nk(c, a[step], wgmma_operand_nk(keys.at(0, half * HALF, step * 16), C * 16), step > 0);
            wgmma_commit();
            wgmma_wait();
            wgmma_hold(c);
        }
        const Quadrant tile = quadrant(group, half);
        float* const diagonal = diagonals + warp_index() * 16 * 17;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int t = t0 + r * 8 + g, s = half * HALF + n * 8 + c2;
                const float factor = beta[t] * k_factor[t];
                float x[2];
                decays(t, s, x);
#pragma unroll
                for (int i = 0; i < 2; i++) x[i] = s + i < t ? c[n * 4 + r * 2 + i] * (factor * x[i]) : 0.0f;
                tile.put2(warp * 16 + r * 8 + g, n * 8 + c2, x[0], x[1]);
                if (half == group && n / 2 == warp) {
                    float* const to = diagonal + (r * 8 + g) * 17 + n % 2 * 8 + c2;
                    to[0] = x[0], to[1] = x[1];
                }
            }
    }
    __syncwarp();
    invert_quadrant(quadrant(group, group), diagonals + warp_index() * 16 * 17, group);
    // The first group has less to do.
    if (warp_index() == 0) {
        make_plan(heads, len, entry, entry_place, begins, link, exp_approx(value(gamma[C - 1])), plan);
        __syncwarp();
        if (lane < static_cast<int>(sizeof(DeltaPlan) / 16))
            reinterpret_cast<uint4*>(p.plans + index)[lane] = reinterpret_cast<const uint4*>(plan)[lane];
    }
    fence_async();
    __syncthreads();
    if (group == 1) {
        // T21 = -(T22 L21) T11.
        float c[32];
        uint32_t a[4][2][4];
#pragma unroll
        for (int step = 0; step < 4; step++) quadrant(1, 1).load_a(warp * 16, step * 16, a[step]);
        multiply_planes(c, a, quadrant(1, 0), false);
        left_operands(c, a);
        multiply_planes(c, a, quadrant(0, 0), false);
        group_barrier(2, GROUP_THREADS);  // L21 has been read
#pragma unroll
        for (int i = 0; i < 16; i++)
            quadrant(1, 0).put2(warp * 16 + i % 2 * 8 + g, i / 2 * 8 + c2, -c[i * 2], -c[i * 2 + 1]);
        fence_async();
        group_barrier(2, GROUP_THREADS);
    }

    // P, 64 columns at a time. A is made anew for each: registers, and code for one.
    uint32_t left_of_keys[4][4];  // P diag(e^Gamma)
    uint32_t* const stash = reinterpret_cast<uint32_t*>(diagonals) + thread % GROUP_THREADS;  // of group 1, its first 64 columns
    const int row_block = group * 4 + warp;
    // Of a left operand of queries, as they come.
    const auto query_pair = [&](int step, int i) {
        const int t = t0 + i % 2 * 8 + g, d = step * 16 + i / 2 * 8 + c2;
        return t < len && d < dk ? *reinterpret_cast<const uint32_t*>(q + key_row(t) + d) : 0u;
    };
    {
        const auto query_operands = [&](int half, uint32_t(&a)[4][2][4]) {
            float c[32];
            // Queries of 64 columns at a time: registers.
#pragma unroll
            for (int column = 0; column < D; column += 64) {
                uint32_t x[4][4];
#pragma unroll
                for (int step = 0; step < 4; step++)
#pragma unroll
                    for (int i = 0; i < 4; i++) x[step][i] = query_pair(column / 16 + step, i);
                wgmma_hold(c);
                wgmma_begin();
#pragma unroll
                for (int step = 0; step < 4; step++)
                    wgmma_bf16_nk(c, x[step], wgmma_operand_nk(keys.at(0, half * HALF, column + step * 16), C * 16),
                                  column + step > 0);
                wgmma_commit();
                wgmma_wait();
                wgmma_hold(c);
            }
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int t = t0 + r * 8 + g, s = half * HALF + n * 8 + c2;
                    const float factor = q_factor[t];
                    float decay[2];
                    decays(t, s, decay);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& x = c[n * 4 + r * 2 + i];
                        x = s + i <= t ? x * (factor * decay[i]) : 0.0f;
                    }
                }
            left_operands(c, a);
        };
        uint32_t* const pairs_out = p.pairs + index * PAIRS;
        // What is made of 64 columns of A Tm: by a thread, of two rows.
        const auto finish = [&](const float(&c)[32], int half, uint32_t(&a)[4][4]) {
            const float* row_weights[2];
            uint32_t words[2][2];
            int slots[2][2];  // that begin before the 32 tokens of a word, less one
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int t = t0 + r * 8 + g;
                // Rows past the end have no weights; none is read.
                const bool live = t < len;
                row_weights[r] = lambda + (live ? t * capacity + (e.newest_first ? heads.len[t] - 1 : 0) : 0);
                slots[r][0] = live ? heads.before(t, half * HALF) - 1 : 0;
                words[r][0] = live ? heads.tokens_from(t, half * HALF) : 0;
                const bool second = live && half * HALF + 32 <= t;
                words[r][1] = second ? heads.tokens_from(t, half * HALF + 32) : 0;
                slots[r][1] = slots[r][0] + __popc(words[r][0]);
            }
            const int direction = e.newest_first ? -1 : 1;
#pragma unroll
            for (int block = 0; block < 4; block++) {
                uint32_t operand[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = block * 2 + i / 2, r = i % 2, t = t0 + r * 8 + g, s = half * HALF + n * 8 + c2;
                    const float x0 = c[n * 4 + r * 2], x1 = c[n * 4 + r * 2 + 1];
                    const float2 factor = *reinterpret_cast<const float2*>(from_entry + s);
                    a[block][i] = pack_bf16(x0 * factor.x, x1 * factor.y);
                    // Past the diagonal a token has no slot.
                    const float2 b = *reinterpret_cast<const float2*>(beta + s);
                    const int slot = slots[r][n / 4] + Heads::count(words[r][n / 4], n % 4 * 8 + c2);
                    const int next = slot + (words[r][n / 4] >> (n % 4 * 8 + c2 + 1) & 1);
                    const bool live = t < len && s <= t, live_next = t < len && s < t;
                    const float y0 = live ? x0 * b.x * row_weights[r][slot * direction] : 0.0f;
                    const float y1 = live_next ? x1 * b.y * row_weights[r][next * direction] : 0.0f;
                    operand[i] = pack_bf16(y0, y1);
                }
                // A block of 8 x 8 each.
                uint32_t* const to = pairs_out + DeltaLayout::pair(group, half * 4 + block) + warp * 64 + lane;
#pragma unroll
                for (int i = 0; i < 4; i++) to[i / 2 * 256 + i % 2 * 32] = operand[i];
            }
        };
#pragma unroll 1
        for (int half = 0; half <= group; half++) {
            float c[32];
#pragma unroll 1
            for (int u = half; u <= group; u++) {
                uint32_t a[4][2][4];
                query_operands(u, a);
                multiply_planes(c, a, quadrant(u, half), u > half);
            }
            finish(c, half, left_of_keys);
            if (half < group) {
#pragma unroll
                for (int i = 0; i < 16; i++) stash[i * GROUP_THREADS] = left_of_keys[i / 4][i % 4];
            }
        }
    }

    // Qt.
    {
        float c[D / 2];
#pragma unroll 1
        for (int half = group; half >= 0; half--) {
            if (half < group) {
#pragma unroll
                for (int i = 0; i < 16; i++) left_of_keys[i / 4][i % 4] = stash[i * GROUP_THREADS];
            }
            wgmma_hold(c);
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < 4; step++)
                wgmma_bf16(c, left_of_keys[step], keys.operand(0, half * HALF + step * 16), half < group || step > 0);
            wgmma_commit();
            wgmma_wait();
            wgmma_hold(c);
        }
        uint32_t* const out = p.queries + index * layout.queries();
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) factor[r] = q_factor[t0 + r * 8 + g] * exp_approx(value(gamma[t0 + r * 8 + g]));
#pragma unroll
        for (int from = 0; from < D / 16; from += 4) {
            uint32_t x[4][4];
#pragma unroll
            for (int i = 0; i < 16; i++) x[i / 4][i % 4] = query_pair(from + i / 4, i % 4);
#pragma unroll
            for (int step = 0; step < 4; step++) {
                uint32_t operand[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = (from + step) * 2 + i / 2, r = i % 2;
                    operand[i] = pack_bf16(factor[r] * low_bf16(x[step][i]) - c[n * 4 + r * 2],
                                           factor[r] * high_bf16(x[step][i]) - c[n * 4 + r * 2 + 1]);
                }
                reinterpret_cast<uint4*>(out)[layout.query(row_block, from + step, lane)] =
                    make_uint4(operand[0], operand[1], operand[2], operand[3]);
            }
        }
    }

    // Products of 64 rows of Tm or its transpose with keys.
    const auto times_keys = [&](float(&c)[D / 2], const Quadrant& tile, int half, bool transposed, const float* factor,
                                bool accumulate) {
        uint32_t a[4][2][4];
#pragma unroll
        for (int step = 0; step < 4; step++) {
            if (transposed) tile.load_a_trans(warp * 16, step * 16, a[step]);
            else tile.load_a(warp * 16, step * 16, a[step]);
            multiply_columns(a[step], factor + half * HALF + step * 16);
        }
        wgmma_hold(c);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 4; step++)
#pragma unroll
            for (int part = 1; part >= 0; part--)
                wgmma_bf16(c, a[step][part], keys.operand(0, half * HALF + step * 16), accumulate || step > 0 || part == 0);
        wgmma_commit();
        wgmma_wait();
        wgmma_hold(c);
    };
    float c[D / 2];
    // Kh.
#pragma unroll 1
    for (int half = group; half < 2; half++) {
        // T21, and that nobody reads P's operands any more.
        if (half == 1) __syncthreads();
        times_keys(c, quadrant(half, group), half, true, to_exit, half > group);
    }
    uint16_t* const writes_out = p.writes + index * layout.writes();
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        const int t = t0 + i % 2 * 8 + g;
        *reinterpret_cast<uint32_t*>(writes_out + layout.at(C, t, i / 2 * 8 + c2)) =
            pack_bf16(beta[t] * c[i * 2], beta[t] * c[i * 2 + 1]);
    }
    // W'.
#pragma unroll 1
    for (int half = 0; half <= group; half++) times_keys(c, quadrant(group, half), half, false, from_entry, half > 0);
    __syncthreads();
    // Where Tm was, by an address that is not made of Tm's.
    const Planes<1, C, D> w = {quadrants + opaque(0)};
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        const int t = t0 + i % 2 * 8 + g;
        w.put2(t, i / 2 * 8 + c2, to_exit[t] * c[i * 2], to_exit[t] * c[i * 2 + 1]);
    }
    __syncthreads();
    // F.
    const int d0 = opaque(t0);  // not computed ahead, in registers that the product before needs
    if (d0 < D) {
        uint32_t a[C / 16][4];
#pragma unroll
        for (int step = 0; step < C / 16; step++) {
            uint32_t one[1][4];
            w.load_a_trans(d0, step * 16, one);
#pragma unroll
            for (int i = 0; i < 4; i++) a[step][i] = one[0][i];
        }
        wgmma_hold(c);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < C / 16; step++) wgmma_bf16(c, a[step], keys.operand(0, step * 16), step > 0);
        wgmma_commit();
        wgmma_wait();
        wgmma_hold(c);
        uint16_t* const transition_out = p.transition + index * layout.transition();
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            *reinterpret_cast<uint32_t*>(transition_out + layout.at(D, d0 + i % 2 * 8 + g, i / 2 * 8 + c2)) =
                pack_bf16(-c[i * 2], -c[i * 2 + 1]);
    }
}

}  // namespace
}  // namespace dla

// Head size as computed. Registers a thread (nvcc 13.0.88, sm_90a, no spills, no stack): 125 and 128.
KERNEL BLOCKS_OF(dla::THREADS, 2) prepare_delta_sm90_64(const __grid_constant__ dla::PrepareDeltaSm90Params p) {
    dla::prepare_delta_sm90<64>(p);
}
KERNEL BLOCKS_OF(dla::THREADS, 2) prepare_delta_sm90_128(const __grid_constant__ dla::PrepareDeltaSm90Params p) {
    dla::prepare_delta_sm90<128>(p);
}
