// route: read weights from content (OPERATOR.md, section 6), in three kernels, all parallel over chunks.
//
//   kappa_{t,i} = (1 / n_{t,i}) sum over the tokens s of slot i, s <= t, of k_s
//   lambda_t[i] = sigmoid(slope q_t . kappa_{t,i} + bias + logits_t[i])
//
// A slot is a stretch of neighbouring tokens, so its sum of keys at a chunk's entry is a difference of two prefix
// sums; where the slots start segment has written (chunk_starts). No bank of key sums is ever stored.
//
// route_sums: one block per chunk and KEY head. Sums of the chunk's keys up to tokens 8, 16, ... of it, f32.
// route_bases: one block per sequence, key head and 8 columns. Sums of all keys before every chunk, f64.
// route: one block per chunk and value head. For every slot held at the chunk's entry the key sum:
// the nearest of route_sums' rows and at most 4 keys on either side of it, and the difference of two bases
// where a slot reaches over chunks. Then Q [K_j | K]^T by mma; then every token's row of scores folds into slots, a
// token's items cut into four (eight) runs; then the weights, a warp a row. The last chunk's block also
// leaves the final cache's key sums, by the same differences.
//
// Numerics: q and k exact in their planes, the slots' f32 sums in two; sums in f32, l2 factors applied after the
// products. A prefix from the sequence's start would lose a one-token slot's digits; here f32 sums never span more
// than a chunk (an error of at most C 2^-24 of a mean key), what is longer is a difference of f64.
//
// Shared memory: route_sums (C + C / 8 dk) 4, at most 8,448 bytes; route_bases 2,048; route (bf16, M = 30, dk = 128) 74,672,
// so that three blocks stand on an SM of Hopper, and at most 100,528. Registers: at the end of the file.
//
// Counts at S3 (H = HV = 16, M = 30, dk = 128, bf16, every token a boundary). Workspace: sums 34 MB, bases 8 MB.
//   route_sums   reads k, writes the sums: 168 MB, 0.06 ms. It and route_bases need no log: they run beside segment
//   route_bases  4 MB read, 8 written, in three trips to memory: some 5 us
//   route        memory: q, k 268 MB, lambda 63, starts 16, sums once 34: 0.38 GB, 0.13 ms. L2: q and k 32 KB a block, and
//                for each of 30 slots a row of sums (512 bytes), 2 keys on average (256 each) and for a quarter
//                of them two bases (1 KB each): 45 KB; 0.63 GB in all, 0.12 ms. Some 12,000 warp instructions
//                a block, 0.11 ms at full issue; 416 mma a block; 2,048 exponentials
// Predicted, not measured: route 0.17 ms, route_sums and route_bases 0.065 ms.
// The other ways counted: a bank a chunk writes and reads 126 MB each; prefixes at every boundary of a chunk are as
// many as slots in the worst case, 126 MB; rows every 16 tokens halve the sums and add 15 KB of keys a block.

#include "common/key_sums.cuh"

namespace dla {
namespace {

template <typename T>
DEVICE void route_sums(const RouteSumsParams& p) {
    constexpr int C = T::CHUNK, GRANULES = C / GRANULE;
    const Extents& e = p.extents;
    const int dk = e.dk, thread = threadIdx.x;
    const int64_t place = blockIdx.x / e.heads;
    const int key_head = blockIdx.x % e.heads;
    const Row row = row_of(e, sequence_of_chunk(e, place, C), key_head * (e.value_heads / e.heads));
    const int64_t first = (place - first_chunk(row, C)) * C;
    // A group of the backward's packed sequences does not begin at the first token.
    if (first < 0 || first >= row.len) return;
    const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
    const T* const k = static_cast<const T*>(p.k);

    Carve carve{dynamic_shared()};
    float* const factor = carve.take<float>(C);
    float* const sums = carve.take<float>(GRANULES * dk);
    carve.check();

    if (p.qk_l2norm) {
        for (int t = warp_index(); t < len; t += WARPS) {
            const int64_t at = row.key_at(first + t);
            const float x = norm_factor(k + at * dk, dk, true);
            if (lane_index() == 0) factor[t] = p.key_factors[at] = x;
        }
        __syncthreads();
    }
    // At most 8 x 32 groups of eight tokens and columns.
    const int groups = dk / 8, granule = thread / groups, column = thread % groups * 8;
    float sum[8] = {};
    if (granule < GRANULES) {
        const int own = granule * GRANULE, stride = e.heads * dk;
        const T* const from = k + row.key_at(first + own) * dk + column;
#pragma unroll
        for (int i = 0; i < GRANULE; i++) {
            float x[8] = {};
            if (own + i < len) load8(from + i * stride, x);
            const float by = p.qk_l2norm && own + i < len ? factor[own + i] : 1.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) sum[c] += by * x[c];
        }
        store_f32x8(sums + granule * dk + column, sum);
    }
    __syncthreads();
    if (granule < GRANULES) {
        float before[8] = {};
#pragma unroll 1
        for (int g = 0; g < granule; g++) {
            float x[8];
            load_f32x8(sums + g * dk + column, x);
#pragma unroll
            for (int c = 0; c < 8; c++) before[c] += x[c];
        }
#pragma unroll
        for (int c = 0; c < 8; c++) sum[c] += before[c];
        store_f32x8(p.sums + ((place * e.heads + key_head) * GRANULES + granule) * dk + column, sum);
    }
}

template <typename T>
DEVICE void route_bases(const RouteSumsParams& p) {
    constexpr int C = T::CHUNK, GRANULES = C / GRANULE, COLUMNS = 8, RUNS = THREADS / COLUMNS, BATCH = 8;
    const Extents& e = p.extents;
    const int dk = e.dk, groups = dk / COLUMNS;
    const int group = blockIdx.x % groups, key_head = blockIdx.x / groups % e.heads;
    const Row row = row_of(e, blockIdx.x / groups / e.heads, key_head * (e.value_heads / e.heads));
    const int run = threadIdx.x / COLUMNS, across = threadIdx.x % COLUMNS, column = group * COLUMNS + across;

    Carve carve{dynamic_shared()};
    double* const of_run = carve.take<double>(RUNS * COLUMNS);
    carve.check();

    // Bases of chunks 0..=full; a thread has a run of them, in one column.
    const int64_t full = row.len / C, each = (full + 1 + RUNS - 1) / RUNS, from = run * each;
    const int64_t to = from + each < full + 1 ? from + each : full + 1;
    const int64_t at = first_chunk(row, C) * e.heads + key_head;
    const float* const totals = p.sums + (at * GRANULES + GRANULES - 1) * dk + column;
    const int64_t stride = static_cast<int64_t>(e.heads) * GRANULES * dk;
    const auto batch = [&](int64_t chunk, float (&x)[BATCH]) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) x[i] = chunk + i < to && chunk + i < full ? totals[(chunk + i) * stride] : 0.0f;
    };
    double sum = 0;
    for (int64_t chunk = from; chunk < to; chunk += BATCH) {
        float x[BATCH];
        batch(chunk, x);
#pragma unroll
        for (int i = 0; i < BATCH; i++) sum += x[i];
    }
    of_run[threadIdx.x] = sum;
    __syncthreads();
    double base = 0;
    for (int r = 0; r < run; r++) base += of_run[r * COLUMNS + across];
    for (int64_t chunk = from; chunk < to; chunk += BATCH) {
        float x[BATCH];
        batch(chunk, x);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (chunk + i < to) p.bases[(at + (chunk + i) * e.heads) * dk + column] = base;
            base += x[i];
        }
    }
}

// The final cache's key sums of the slots that begin at `starts`, the rest zeros. By the block.
template <typename T>
DEVICE void final_keys(const RouteParams& p, const Row& row, const int* starts, int count, int width, float* partial) {
    const int dk = p.extents.dk, capacity = p.extents.capacity;
    float* const keys = p.keys + row.index() * capacity * dk;
    for (int from = 0; from < dk; from += width) {
        __syncthreads();
        key_sums<T>(p, row, starts, count, capacity, from, width, partial, [&](int j, int group, const float (&x)[8]) {
            const int column = from + group * 8;
            if (column < dk) store_f32x8(keys + j * dk + column, x);
        });
    }
}

template <typename T>
DEVICE void route(const RouteParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, capacity = e.capacity, slots = padded(capacity), pitch = slots + C + 1, sums_pitch = slots + 1;
    // Columns of dk at a time: as many as leave room for three blocks of a usual size, and for one of any.
    const int width = dk > 64 && capacity <= 32 ? 128 : 64, groups = width / 8;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    // As prepare's grid, or the window's chunks alone.
    const int head = blockIdx.x % e.value_heads;
    int64_t sequence = blockIdx.x / e.value_heads, place = sequence, first = 0;
    if (e.cu_seqlens) {
        sequence = sequence_of_chunk(e, place, C);
    } else {
        const int64_t end = p.to < e.time ? p.to : e.time, chunks = end > p.from ? (end - p.from + C - 1) / C : 1;
        first = p.from + sequence % chunks * C;
        sequence /= chunks;
    }
    const Row row = row_of(e, sequence, head);
    if (e.cu_seqlens) first = (place - first_chunk(row, C)) * C;
    else place = first_chunk(row, C) + first / C;
    if (first < p.from || first >= p.to) return;
    if (first >= row.len) {
        // A row without tokens keeps its cache.
        if (row.len == 0 && first == 0) {
            const int m = p.initial_len ? p.initial_len[row.index()] : 0;
            const int64_t at = row.index() * capacity * dk;
            for (int i = thread; i < capacity * dk; i += THREADS) p.keys[at + i] = i < m * dk ? p.initial_keys[at + i] : 0.0f;
        }
        return;
    }
    const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);
    const int64_t chunk = place * e.value_heads + row.head;

    constexpr int BEGINS = MOST_SLOTS + 1;

    // Items are the slots held at the chunk's entry, columns 0..m, and its tokens, from column `slots` on.
    Carve carve{dynamic_shared()};
    uint8_t* const events = carve.take<uint8_t>(C);
    uint8_t* const merges = carve.take<uint8_t>(C);                      // older slot of the pair that token t merges, or 255
    uint8_t* const held = carve.take<uint8_t>(C);                        // slots held after token t
    uint8_t* const until = carve.take<uint8_t>(MOST_SLOTS + C);          // item starts a slot up to this token, exclusive
    uint8_t* const begins = carve.take<uint8_t>(C * BEGINS);             // item at which a slot starts, at token t
    int* const starts = carve.take<int>(MOST_SLOTS + 1);                 // where the slots held at the entry start
    int* const exits = carve.take<int>(MOST_SLOTS + 1);                  // and those after the chunk
    int64_t* const before = carve.take<int64_t>(MOST_SLOTS + C + 1);     // tokens from token 0 on to an item
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    // The operands; after the products, the scores and their sums by slot. Scores of several slices stand apart.
    const bool once = dk <= width;
    float* const apart = once ? nullptr : carve.take<float>(C * pitch);
    Carve other = carve;
    const Tile<PARTS> queries = carve.tile<PARTS>(C, width), keys = carve.tile<PARTS>(C, width);
    const Tile<2> bank = carve.tile<2>(slots, width);
    float* const partial = carve.take<float>((capacity + 1) * width);
    float* const scores = once ? other.take<float>(C * pitch) : apart;
    float* const sums = other.take<float>(C * sums_pitch);
    carve.check(), other.check();

    const auto load_operands = [&](int column) {
        const int group = thread % groups, stride = e.heads * dk;
        const bool inside = column + group * 8 < dk;
        const int64_t from = row.key_at(first) * dk + (inside ? column + group * 8 : 0);
#pragma unroll 2
        for (int t = thread / groups; t < C; t += THREADS / groups) {
            const bool live = t < len && inside;
            const int64_t at = from + (t < len ? t * stride : 0);
            if constexpr (PARTS == 1) {
                copy_async_16(queries.data + t * queries.stride + group * 8, q + at, live);
                copy_async_16(keys.data + t * keys.stride + group * 8, k + at, live);
            } else {
                float x[8] = {}, squares = 0;
                if (live) load8(q + at, x);
                put8(queries, t, group * 8, x);
                float y[8] = {};
                if (live) load8(k + at, y);
                put8(keys, t, group * 8, y);
                if (!p.qk_l2norm) continue;
#pragma unroll
                for (int i = 0; i < 8; i++) squares += x[i] * x[i];
                for (int by = groups / 2; by > 0; by /= 2) squares += __shfl_xor_sync(ALL, squares, by);
                if (column > 0) squares += q_factor[t];
                if (group == 0) q_factor[t] = column + width < dk ? squares : 1.0f / sqrtf(squares + L2NORM_EPS);
            }
        }
    };
    // The same of queries that lie in shared memory as they are. By the block; ends with a barrier.
    const auto norms = [&](int column) {
        for (int t = warp; t < C; t += WARPS) {
            float squares = 0;
            for (int i = 2 * lane; i < width; i += 64) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(queries.data + t * queries.stride + i);
                squares += low_bf16(pair) * low_bf16(pair) + high_bf16(pair) * high_bf16(pair);
            }
            squares = warp_sum(squares) + (column > 0 ? q_factor[t] : 0.0f);
            if (lane == 0) q_factor[t] = column + width < dk ? squares : 1.0f / sqrtf(squares + L2NORM_EPS);
        }
        __syncthreads();
    };
    // All that memory has to bring before the first barrier is asked for at once.
    int event = EXTEND, start = 0;
    float factor = 1;
    if (thread < len) event = p.events[row.at(first + thread)];
    if (thread < len && p.qk_l2norm) factor = p.key_factors[row.key_at(first + thread)];
    if (thread < capacity) start = p.chunk_starts[chunk * capacity + thread];
    const int m = p.chunk_len[chunk];
    load_operands(0);
    if (thread < C) {
        events[thread] = event;
        merges[thread] = event >= MERGE ? event - MERGE : 255;
        k_factor[thread] = factor;
    }
    if (thread < m) starts[thread] = start;
    if (thread == m) starts[m] = static_cast<int>(first);
    __syncthreads();

    // One thread an item: until which token it starts a slot.
    const bool opens_low = lane < len && events[lane] == OPEN;
    const bool opens_high = C > 32 && lane + 32 < len && events[(lane + 32) % C] == OPEN;
    const uint32_t low = __ballot_sync(ALL, opens_low), high = __ballot_sync(ALL, opens_high);
    const uint64_t opens = static_cast<uint64_t>(high) << 32 | low;
    const auto held_after = [&](int t) { return m + __popcll(opens & ((uint64_t(2) << t) - 1)); };
    const int token = thread - MOST_SLOTS;
    int at = -1, from = 0, ends = 0;
    if (thread < m) at = thread;
    if (token >= 0 && token < len && events[token] != EXTEND) at = held_after(token) - 1, from = token + 1;
    if (thread < MOST_SLOTS + C) {
        if (at >= 0) ends = C;
        for (int t = from / 8 * 8; t < len && at >= 0; t += 8) {
            const uint64_t eight = *reinterpret_cast<const uint64_t*>(merges + t);
            const uint64_t past = t < from ? (uint64_t(1) << (from - t) * 8) - 1 : 0;
            const uint32_t pairs[2] = {static_cast<uint32_t>(eight | past), static_cast<uint32_t>((eight | past) >> 32)};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int pair = pairs[i / 4] >> i % 4 * 8 & 255;
                const bool merged = at == pair + 1;
                ends = merged ? t + i : ends;
                at = merged ? -1 : at - (at > pair);
            }
        }
        if (thread < slots) until[thread] = ends;
        if (token >= 0) until[slots + token] = ends;
    }
    for (int item = thread; item <= slots + len; item += THREADS) {
        int64_t tokens = first + item - slots;
        if (item < m && starts[item] >= 0) tokens = starts[item];
        if (item < m && starts[item] < 0) {
            const int64_t initial = row.index() * capacity + p.initial_len[row.index()];
            tokens = 0;
            for (int j = starts[item]; j < 0; j++) tokens -= p.initial_tokens[initial + j];
        }
        before[item] = tokens;
    }
    if (thread < len) held[thread] = held_after(thread);

    // Q [K_j | K]^T. A warp has 16 tokens and every SPLIT-th of the blocks of 16 columns, but none after its tokens.
    constexpr int ROWS = C / 16, SPLIT = WARPS / ROWS, MINE = (MOST_SLOTS / 16 + ROWS + SPLIT - 1) / SPLIT;
    const int tokens_of = warp % ROWS, share = warp / ROWS, slot_blocks = slots / 16;
    for (int column = 0; column < dk; column += width) {
        if (column > 0) {
            __syncthreads();
            load_operands(column);
        }
        key_sums<T>(p, row, starts, m, slots, column, width, partial,
                    [&](int j, int group, const float (&x)[8]) { put8(bank, j, group * 8, x); });
        if constexpr (PARTS == 1) copies_wait();
        __syncthreads();
        if constexpr (PARTS == 1) {
            if (p.qk_l2norm) norms(column);
        }
        float c[MINE][2][4];
#pragma unroll
        for (int i = 0; i < MINE; i++) clear(c[i]);
        const int inner = padded(dk) - column < width ? padded(dk) - column : width;
        for (int from = 0; from < inner; from += 16) {
            uint32_t a[PARTS][4];
            load_a(queries, tokens_of * 16, from, a);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const int block = share + i * SPLIT, n = block - slot_blocks;
                if (n < 0) {
                    uint32_t b[2][4];
                    load_b(bank, block * 16, from, b);
                    multiply<PARTS, 2>(c[i], a, b);
                } else if (n <= tokens_of) {
                    uint32_t b[PARTS][4];
                    load_b(keys, n * 16, from, b);
                    multiply<PARTS, PARTS>(c[i], a, b);
                }
            }
        }
        // The last slice's scores are the scores; those before add up in shared memory, every element by its thread.
        if (once) __syncthreads();
        const bool last = column + width >= dk;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = share + i * SPLIT;
            if (block - slot_blocks > tokens_of) continue;
            each_pair(c[i], [&](int r, int n, float x0, float x1) {
                const int t = tokens_of * 16 + r, s = block * 16 + n - slots;
                float* to = scores + t * pitch + block * 16 + n;
                if (column > 0) x0 += to[0], x1 += to[1];
                if (last && p.qk_l2norm) {
                    x0 *= q_factor[t] * (s < 0 ? 1.0f : k_factor[s]);
                    x1 *= q_factor[t] * (s < 0 ? 1.0f : k_factor[s + 1]);
                }
                to[0] = x0, to[1] = x1;
            });
        }
    }
    __syncthreads();

    // Sums by slot. The items of a token are cut into RUNS runs, a thread each; those of a token stand in one warp.
    {
        constexpr int RUNS = THREADS / C, TOKENS = 32 / RUNS;
        const int t = warp * TOKENS + lane % TOKENS, run = lane / TOKENS;
        const int each = ((slots + C) / RUNS + 3) / 4 * 4, from = run * each;
        const int last = t < len ? slots + t : -1, end = from + each < last + 1 ? from + each : last + 1;
        const float* const score = scores + t * pitch;
        float* const sum_of = sums + t * sums_pitch;
        uint8_t* const begin_of = begins + t * BEGINS;
        // Bits 7, 15, 23, 31: which of four items start a slot. Bytes are at most C, so none borrows.
        const auto starting = [&](int item) {
            const uint32_t four = *reinterpret_cast<const uint32_t*>(until + item);
            const uint32_t bits = ((four | 0x80808080u) - (t + 1) * 0x01010101u) & 0x80808080u;
            return end - item < 4 ? bits & ((1u << (end - item) * 8) - 1) : bits;
        };
        int mine = 0;
        for (int item = from; item < end; item += 4) mine += __popc(starting(item));
        int slot = mine;
#pragma unroll
        for (int by = TOKENS; by < 32; by *= 2) {
            const int below = __shfl_up_sync(ALL, slot, by);
            if (lane >= by) slot += below;
        }
        slot -= mine + 1;
        // `lead` goes to the slot that a run before has begun.
        float sum = 0, lead = 0;
        bool begun = false;
        for (int item = from; item < end; item += 4) {
            const uint32_t bits = starting(item);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (bits >> (8 * i + 7) & 1) {
                    if (begun) sum_of[slot] = sum;
                    else lead = sum;
                    begun = true, sum = 0;
                    begin_of[++slot] = item + i;
                }
                if (item + i < end) sum += score[item + i];
            }
        }
        if (!begun) lead = sum;
        bool open = begun;
#pragma unroll
        for (int after = 1; after < RUNS; after++) {
            const float next = __shfl_down_sync(ALL, lead, after * TOKENS);
            const int starts_there = __shfl_down_sync(ALL, mine, after * TOKENS);
            if (open && run + after < RUNS) sum += next, open = starts_there == 0;
        }
        if (begun) sum_of[slot] = sum;
        if (run == 0 && t < len) begin_of[held[t]] = last + 1;
    }
    __syncthreads();

    const float slope = p.slope[row.head], bias = p.bias[row.head];
    for (int t = warp; t < len; t += WARPS) {
        const int now = held[t];
        const int64_t at = row.at(first + t);
        const uint8_t* const begin_of = begins + t * BEGINS;
        for (int column = lane; column < capacity; column += 32) {
            float weight = 0;
            if (column < now) {
                const int slot = e.newest_first ? now - 1 - column : column;
                const int64_t many = before[begin_of[slot + 1]] - before[begin_of[slot]];
                const float tokens = __uint2float_rn(many > 0xffffffffll ? 0xffffffffu : static_cast<uint32_t>(many));
                const float logit = p.logits ? p.logits[at * p.logit_columns + column] : 0.0f;
                const float x = slope * __fdividef(sums[t * sums_pitch + slot], tokens) + bias + logit;
                const float tail = __expf(-fabsf(x)), over = __fdividef(1.0f, 1.0f + tail);
                weight = x >= 0 ? over : tail * over;
            }
            p.lambda[at * capacity + column] = weight;
        }
    }

    if (first + C >= row.len) {
        const int now = held[len - 1];
        for (int i = thread; i <= now; i += THREADS) {
            const int item = begins[(len - 1) * BEGINS + i];
            exits[i] = item < slots ? starts[item] : static_cast<int>(first) + item - slots;
        }
        final_keys<T>(p, row, exits, now, width, partial);
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: route_sums 70 to 80 on all, route_bases
// 56 / 56 / 72 / 77, route_bf16 128 / 80 / 128 / 126, route_f16 and _f32 up to 128.
// Blocks of route that a multiprocessor's shared memory holds at a usual size: of 228 KiB three, else two. Two planes
// want more registers than a third block leaves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define ROUTE_BLOCKS 3
#else
#define ROUTE_BLOCKS 2
#endif

#define ROUTE(name, Params, function, blocks, T)                                        \
    KERNEL BLOCKS_OF(dla::THREADS, blocks) name(const __grid_constant__ dla::Params p) { \
        dla::function<dla::T>(p);                                                       \
    }
ROUTE(route_sums_bf16, RouteSumsParams, route_sums, 3, Bf16)
ROUTE(route_sums_f16, RouteSumsParams, route_sums, 3, F16)
ROUTE(route_sums_f32, RouteSumsParams, route_sums, 3, F32)
ROUTE(route_bases_bf16, RouteSumsParams, route_bases, 3, Bf16)
ROUTE(route_bases_f16, RouteSumsParams, route_bases, 3, F16)
ROUTE(route_bases_f32, RouteSumsParams, route_bases, 3, F32)
ROUTE(route_bf16, RouteParams, route, ROUTE_BLOCKS, Bf16)
ROUTE(route_f16, RouteParams, route, 2, F16)
ROUTE(route_f32, RouteParams, route, 2, F32)
