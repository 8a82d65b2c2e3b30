// The adjoint of segment: soft boundaries, and the gradient of the final R (OPERATOR.md, sections 3 and 4; the log is a
// constant).
//
//   drift_backward         dc_t = v_t . dv_t; dI_t = dc_t c'(I_t); dtau = -sum of dI_t
//   segment_states         R before every chunk: sum over the open segment's tokens of e^{Gamma_u - Gamma_s} k_s v_s^T
//   segment_scalars        num_t, N = |R|^2 before every token, and the adjoints of both, in reverse
//   segment_open_backward  dR in reverse: dR = e^Gamma_u dR' (no boundary in the chunk) + sum over carried t of w_t k_t v_t^T
//   segment_backward       what num_t, E_t, N and R' give to k, v and g
//   segment_log_backward   what the decay since R's newest token gives to g of the chunk before
//
// All is kept as segment keeps it: R as it was at the open segment's newest token u that is not zero, c = num / sqrt(E N),
// E = |k|^2 |v|^2, num_t = sum of e^{Gamma_u - Gamma_s} (k_t . k_s)(v_t . v_s), and with the decay d since u
// N <- d^2 N + 2 d num + E. So a decay that the whole segment shares has no gradient by construction, not by cancelling.
// The adjoints of num, E and d are linear in that of N after the chunk: they are found for dI alone and for a unit
// of that, so that what crosses chunks is one number (and dR, which no scalar hangs on).
//
// Grids: drift_backward, segment_scalars, segment_backward: chunks of the window x HV; segment_states and
// segment_open_backward: rows x slices of 16 columns of dv, chunk after chunk, the slice of R (of dR) in registers;
// segment_log_backward: rows. Blocks of 256 threads.
//
// Numerics: k, v in their planes, R, dR, pairs and decayed keys in two; scalars in f64.
//
// Shared memory: segment_states, segment_open_backward 71,424 bytes at most; segment_scalars 32,320, segment_backward 87,616
// (bf16). Registers: at the end of the file. Not yet timed; segment_scalars has C steps of one thread, as has the end of
// segment_backward.

#include "common/window.cuh"

namespace dla {
namespace {

// Below this drift its derivative is taken as 0 (src/reference/forward.rs).
constexpr float DRIFT_FLOOR = 1.0f / 64.0f;
constexpr float FORGOTTEN = -700.0f;
// e to this is within f32: decays are below 0 but for zero tokens past the newest one.
constexpr float MOST_LOG = 80.0f;

DEVICE void store2_of(Bf16* to, float x0, float x1) { *reinterpret_cast<uint32_t*>(to) = pack_bf16(x0, x1); }
DEVICE void store2_of(F16* to, float x0, float x1) {
    *reinterpret_cast<uint32_t*>(to) = f32_to_f16(x0) | static_cast<uint32_t>(f32_to_f16(x1)) << 16;
}
DEVICE void store2_of(F32* to, float x0, float x1) { *reinterpret_cast<float2*>(to) = make_float2(x0, x1); }

template <typename T>
DEVICE void drift_backward(const DriftBackwardParams& p) {
    constexpr int C = T::CHUNK;
    const Extents& e = p.extents;
    const int dv = e.dv, column = lane_index() * 8;
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    if (chunk.len == 0) return;
    const Row row = chunk.row;
    Carve carve{dynamic_shared()};
    double* const parts = carve.take<double>(C);
    carve.check();
    const float tau = p.tau[row.head];
    const bool first_opens = p.chunk_len[chunk.place] == 0;  // a row's first token has no choice
    for (int t = warp_index(); t < chunk.len; t += WARPS) {
        const int64_t at = row.at(chunk.first + t);
        float x[8] = {}, d[8] = {}, dot = 0;
        if (column < dv) {
            load8(static_cast<const T*>(p.v) + at * dv + column, x);
            load8(reinterpret_cast<const F32*>(p.d_v + (chunk.kept * C + t) * dv + column), d);
            if (p.dv) store8(static_cast<T*>(p.dv) + at * dv + column, d);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) dot += x[i] * d[i];
        dot = warp_sum(dot);
        if (lane_index() > 0) continue;
        float slope = 0;
        if (e.capacity > 1 && !(t == 0 && first_opens)) {
            const float tail = expf(-fabsf((p.drift[at] - tau) / p.temperature)), under = 1.0f + tail;
            slope = tail / (under * under) / p.temperature;
            if (p.events[at] == EXTEND) slope = -slope;
        }
        const float of_drift = dot * slope;
        p.ddrift[at] = of_drift;
        parts[t] = of_drift;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int t = 0; t < chunk.len; t++) sum -= parts[t];
        p.tau_sums[chunk.place] = sum;
    }
}

// Which tokens of a chunk open a segment and which are not zero.
struct Tokens {
    uint64_t opens, live;
    int len;
    // Of the segment that is open before token t: its first token, and its newest one that is not zero; -1: carried in.
    METHOD int start(int t) const { return top(opens & below(t)); }
    METHOD int newest(int t) const { return top((opens | live) & below(t)); }
    // Tokens that are judged against the carried segment.
    METHOD int carried() const { return opens == 0 ? len : __ffsll(opens); }
    METHOD static uint64_t below(int t) { return t >= 64 ? ~uint64_t(0) : (uint64_t(1) << t) - 1; }
    METHOD static int top(uint64_t bits) {
        const uint32_t high = static_cast<uint32_t>(bits >> 32), low = static_cast<uint32_t>(bits);
        return high ? 63 - __clz(high) : low ? 31 - __clz(low) : -1;
    }
};

// By every warp by itself. `energy` of the chunk.
DEVICE Tokens tokens_of(const uint8_t* events, const float* energy, const Row& row, int64_t first, int len) {
    const int lane = lane_index();
    uint32_t opens[2], live[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = half * 32 + lane;
        opens[half] = __ballot_sync(ALL, t < len && events[row.at(first + (t < len ? t : 0))] != EXTEND);
        live[half] = __ballot_sync(ALL, t < len && energy[t < len ? t : 0] > 0);
    }
    return {static_cast<uint64_t>(opens[1]) << 32 | opens[0], static_cast<uint64_t>(live[1]) << 32 | live[0], len};
}

// Where scalars of a chunk stand: arrays of C, then single ones.
enum Scalars { NUM = 0, NUM_UNIT, ENERGY, ENERGY_UNIT, SINCE, SINCE_UNIT, PRODUCT, SCALAR_ARRAYS = 8 };
enum Singles { SQUARED = 0, SQUARED_UNIT, EXIT_SQUARED, OWN_LOG, NEWEST, EXIT_LOG };
template <int C>
constexpr int SCALARS_OF = SCALAR_ARRAYS * C + 8;

// A row's slice of R, 16 columns: warp w has keys 16 w.. and 16 (w + 8)...
struct OpenSlice {
    float c[2][2][4];
    // Calls f(key, column, x0, x1) for two neighbouring columns.
    template <typename F>
    METHOD void each(int dk, F f) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const int key = (warp_index() + i * WARPS) * 16 + lane_index() / 4 + j / 2 % 2 * 8;
                if (key < dk) f(key, j / 4 * 8 + lane_index() % 4 * 2, c[i][j / 4][j % 4], c[i][j / 4][j % 4 + 1]);
            }
    }
    // += sum over tokens of keys_t values_t^T.
    template <int PARTS>
    METHOD void add(const Tile<2>& keys, const Tile<PARTS>& values, int width, int from, int to) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int key = (warp_index() + i * WARPS) * 16;
            if (key >= width) continue;
            for (int t = from / 16 * 16; t < to; t += 16) {
                uint32_t a[2][4], b[PARTS][4];
                load_a_trans(keys, key, t, a);
                load_b_trans(values, 0, t, b);
                multiply<2, PARTS>(c[i], a, b);
            }
        }
    }
};

// Keys of a chunk times factors, and a slice of its values, for OpenSlice::add. By the block, no barrier.
template <typename T, int PARTS>
DEVICE void load_outer(const Tile<2>& keys, const Tile<PARTS>& values, const T* k, const T* v, const Row& row, int64_t first,
                       int len, int dk, int dv, int slice, const float* factor) {
    constexpr int C = T::CHUNK;
    for (int t = warp_index(); t < C; t += WARPS) {
        const bool live = t < len && factor[t] != 0;
        load_row(keys, t, live ? k + row.key_at(first + t) * dk : nullptr, dk, live ? factor[t] : 0.0f);
    }
    for (int i = threadIdx.x; i < C * 2; i += THREADS) {
        const int t = i / 2, column = i % 2 * 8;
        float x[8] = {};
        if (t < len && slice + column < dv) load8(v + row.at(first + t) * dv + slice + column, x);
        put8(values, t, column, x);
    }
}

template <typename T>
DEVICE void segment_states(const SegmentStatesParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), slices = padded(dv) / 16, thread = threadIdx.x;
    const int64_t index = blockIdx.x / slices, state = static_cast<int64_t>(dk) * dv;
    const int slice = static_cast<int>(blockIdx.x % slices) * 16;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from) return;

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const factor = carve.take<float>(C);
    const Tile<2> keys = carve.tile<2>(C, width);
    const Tile<PARTS> values = carve.tile<PARTS>(C, 16);
    carve.check();

    const float* entry = p.initial_open ? p.initial_open + index * state : nullptr;
    double log = 0;
    if (p.from > 0) entry = p.entry + index * p.entry_step * state, log = p.entry_log[index * p.entry_step];
    OpenSlice r;
    r.each(width, [&](int key, int column, float& x0, float& x1) {
        const bool live = entry && key < dk && slice + column < dv;
        x0 = live ? entry[static_cast<int64_t>(key) * dv + slice + column] : 0.0f;
        x1 = live ? entry[static_cast<int64_t>(key) * dv + slice + column + 1] : 0.0f;
    });
    const int64_t end = row.len < p.to ? row.len : p.to;
    for (int64_t first = p.from; first < end; first += C) {
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t chunk = (first - p.from) / C, place = (first_chunk(row, C) + first / C) * e.value_heads + row.head;
        if (chunk % p.stride == 0) {
            const int64_t at = p.saves > 0 ? index * p.saves + chunk / p.stride
                                           : (place_in_window(e, row, p.from, p.to, p.from, C) + chunk) * e.value_heads + row.head;
            r.each(dk, [&](int key, int column, float& x0, float& x1) {
                if (slice + column < dv)
                    *reinterpret_cast<float2*>(p.open + at * state + static_cast<int64_t>(key) * dv + slice + column) =
                        make_float2(x0, x1);
            });
            if (slice == 0 && thread == 0) p.open_log[at] = log;
        }
        __syncthreads();
        if (warp_index() == 0) load_gamma(p.g, row, first, len, C, gamma);
        const Tokens tokens = tokens_of(p.events, p.energy + place * C, row, first, len);
        const int start = tokens.start(len), newest = tokens.newest(len);
        __syncthreads();
        if (newest < 0) {
            log += static_cast<double>(gamma[C - 1].high) + gamma[C - 1].low;
            continue;
        }
        const int from = start < 0 ? 0 : start;
        for (int t = thread; t < C; t += THREADS)
            factor[t] = t >= from && t <= newest
                            ? expf(minus(gamma[newest], gamma[t])) * (p.qk_l2norm ? p.factor[place * C + t] : 1.0f)
                            : 0.0f;
        __syncthreads();
        load_outer<T>(keys, values, static_cast<const T*>(p.k), static_cast<const T*>(p.v), row, first, len, dk, dv, slice,
                      factor);
        const double at_newest = static_cast<double>(gamma[newest].high) + gamma[newest].low;
        const float keep = start < 0 ? expf(static_cast<float>(log + at_newest)) : 0.0f;
        r.each(width, [&](int, int, float& x0, float& x1) { x0 *= keep, x1 *= keep; });
        __syncthreads();
        r.add(keys, values, width, from, newest + 1);
        log = minus(gamma[C - 1], gamma[newest]);
    }
}

// Sum over the block, every thread gets it; `parts` of WARPS. A barrier before and after.
DEVICE double block_sum_f64(double x, double* parts) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(ALL, x, by);
    __syncthreads();
    if (lane_index() == 0) parts[warp_index()] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += parts[w];
    return x;
}

// Rows and 64 columns of a matrix of f32, from (row, column) on, in two planes. By the block.
DEVICE void load_square(const Tile<2>& tile, const float* from, int row, int column, int rows, int columns) {
    for (int i = threadIdx.x; i < SLICE * SLICE / 8; i += THREADS) {
        const int r = i / (SLICE / 8), group = i % (SLICE / 8);
        const bool live = row + r < rows;
        load_slice(tile, r, group, live ? reinterpret_cast<const F32*>(from) + static_cast<int64_t>(row + r) * columns : nullptr,
                   column, columns, 1.0f);
    }
}
template <typename T, int PARTS>
DEVICE void load_tokens(const Tile<PARTS>& tile, const T* from, int64_t stride, int len, int column, int width) {
    for (int i = threadIdx.x; i < T::CHUNK * SLICE / 8; i += THREADS) {
        const int t = i / (SLICE / 8), group = i % (SLICE / 8);
        load_slice(tile, t, group, t < len ? from + t * stride : nullptr, column, width, 1.0f);
    }
}

// The Gram matrix of a chunk's rows, lower blocks. By the block; begins with a barrier.
template <typename T, int PARTS, int MINE>
DEVICE void gram(const Tile<PARTS>& tile, const T* from, int64_t stride, int len, int width, float (&c)[MINE][2][4]) {
    constexpr int BLOCKS = T::CHUNK / 16, LOWER = BLOCKS * (BLOCKS + 1) / 2;
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(c[i]);
    for (int column = 0; column < width; column += SLICE) {
        __syncthreads();
        load_tokens(tile, from, stride, len, column, width);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int r, n;
            lower_block(warp_index() + i * WARPS, r, n);
            if (warp_index() + i * WARPS >= LOWER) continue;
            for (int step = 0; step < SLICE && column + step < width; step += 16) {
                uint32_t a[PARTS][4], b[PARTS][4];
                load_a(tile, r * 16, step, a);
                load_b(tile, n * 16, step, b);
                multiply<PARTS, PARTS>(c[i], a, b);
            }
        }
    }
}

template <typename T>
DEVICE void segment_scalars(const SegmentBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BLOCKS = C / 16, PITCH = C + 1;
    constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2, MINE = (LOWER + WARPS - 1) / WARPS, WIDE = BLOCKS * 4 / WARPS;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    const int len = chunk.len;
    if (len == 0) return;
    const Row row = chunk.row;
    const T* const k = static_cast<const T*>(p.k) + row.key_at(chunk.first) * dk;
    const T* const v = static_cast<const T*>(p.v) + row.at(chunk.first) * dv;
    const int64_t key_stride = static_cast<int64_t>(e.heads) * dk, value_stride = static_cast<int64_t>(e.value_heads) * dv;
    const float* const open = p.open + chunk.kept * dk * dv;
    const double log = p.open_log[chunk.kept];
    const float* const energy_in = p.energy + chunk.place * C;

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    double* const numerator = carve.take<double>(C);
    double* const decay = carve.take<double>(C);      // since the newest token
    double* const squared = carve.take<double>(C);    // N before the token
    double* const after = carve.take<double>(2 * C);  // the adjoint of N after it
    double* const parts = carve.take<double>(WARPS);
    float* const factor = carve.take<float>(C);
    float* const products = carve.take<float>(4 * C); // k R v, by 16 columns of a slice
    float* const carried_of = carve.take<float>(C);
    unsigned char* const reused = carve.next;
    const Tile<PARTS> rows = carve.tile<PARTS>(C, SLICE);
    const Tile<2> square = carve.tile<2>(SLICE, SLICE);
    carve.check();
    Carve other{reused};
    float* const pairs = other.take<float>(C * PITCH);
    other.check();

    const Tokens tokens = tokens_of(p.events, energy_in, row, chunk.first, len);
    const int carried = tokens.carried();
    if (warp == 0) load_gamma(p.g, row, chunk.first, len, C, gamma);
    for (int t = thread; t < C; t += THREADS) {
        factor[t] = p.qk_l2norm && t < len ? p.factor[chunk.place * C + t] : 1.0f;
        carried_of[t] = 0;
    }

    // k_t^T R v_t of the carried tokens, and |R|^2.
    double norm = 0;
    for (int key = 0; key < dk; key += SLICE) {
        float c[WIDE][2][4];
#pragma unroll
        for (int i = 0; i < WIDE; i++) clear(c[i]);
        for (int column = 0; column < dv; column += SLICE) {
            __syncthreads();
            load_tokens(rows, v, value_stride, len, column, dv);
            load_square(square, open, key, column, dk, dv);
            for (int i = thread; i < SLICE * SLICE / 8; i += THREADS) {
                const int r = key + i / (SLICE / 8), n = column + i % (SLICE / 8) * 8;
                if (r >= dk || n >= dv) continue;
                float x[8];
                load8(reinterpret_cast<const F32*>(open + static_cast<int64_t>(r) * dv + n), x);
#pragma unroll
                for (int j = 0; j < 8; j++) norm += static_cast<double>(x[j]) * x[j];
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
                if (t0 >= carried) continue;
                for (int step = 0; step < SLICE && column + step < dv; step += 16) {
                    uint32_t a[PARTS][4], b[2][4];
                    load_a(rows, t0, step, a);
                    load_b(square, d0, step, b);
                    multiply<PARTS, 2>(c[i], a, b);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = t0 + lane / 4 + j / 2 % 2 * 8, d = key + d0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
                c[i][j / 4][j % 4] *= t < len && d < dk ? load1(k + t * key_stride + d) : 0.0f;
            }
            row_sums(c[i], products + block % 4 * C + t0);
        }
        __syncthreads();
        if (thread < C)
            carried_of[thread] += ((products[thread] + products[C + thread]) + (products[2 * C + thread] + products[3 * C + thread])) *
                                  factor[thread];
    }
    norm = block_sum_f64(norm, parts);

    float kk[MINE][2][4], vv[MINE][2][4];
    gram(rows, k, key_stride, len, dk, kk);
    gram(rows, v, value_stride, len, dv, vv);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        int r, n;
        lower_block(warp + i * WARPS, r, n);
        if (warp + i * WARPS >= LOWER) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = r * 16 + lane / 4 + j / 2 % 2 * 8, s = n * 16 + j / 4 * 8 + lane % 4 * 2 + j % 2;
            pairs[t * PITCH + s] = kk[i][j / 4][j % 4] * (factor[t] * factor[s]) * vv[i][j / 4][j % 4];
        }
    }
    __syncthreads();
    if (thread < len) {
        const int t = thread, start = tokens.start(t), newest = tokens.newest(t);
        const double at = static_cast<double>(gamma[t].high) + gamma[t].low;
        const double since = newest < 0 ? log + at : minus(gamma[t], gamma[newest]);
        double sum = 0;
        for (int s = start < 0 ? 0 : start; s <= newest; s++)
            sum += static_cast<double>(expf(minus(gamma[newest], gamma[s]))) * pairs[t * PITCH + s];
        if (start < 0) {
            const double by = newest < 0 ? 0.0 : log + static_cast<double>(gamma[newest].high) + gamma[newest].low;
            sum += static_cast<double>(expf(static_cast<float>(by))) * carried_of[t];
        }
        numerator[t] = sum;
        decay[t] = since < FORGOTTEN ? -1.0 : static_cast<double>(expf(static_cast<float>(since)));
    }
    __syncthreads();
    const auto energy = [&](int t) { return static_cast<double>(energy_in[t]); };
    if (thread == 0) {
        double now = norm;
        for (int t = 0; t < len; t++) {
            // A segment that has decayed by more than f64 holds has no direction.
            if (decay[t] < 0) now = 0, decay[t] = 0;
            squared[t] = now;
            if (tokens.opens >> t & 1) now = energy(t);
            else if (tokens.live >> t & 1) {
                now = now * decay[t] * decay[t] + 2 * numerator[t] * decay[t] + energy(t);
                if (now < 0) now = 0;
            }
        }
    }
    __syncthreads();

    // The adjoints in reverse, by two threads: of the drift's gradient alone, and of a unit of N's.
    if (thread == 0 || thread == 32) {
        const bool unit = thread == 32;
        double* const of_after = after + (unit ? C : 0);
        double* const out = p.scalars + chunk.kept * SCALARS_OF<C>;
        double of_squared = 0;
        for (int t = 0; t < len; t++) of_after[t] = 0;
        const int last = tokens.newest(len);
        if (unit && last >= 0) of_after[last] = 1;
        if (unit && last < 0) of_squared = 1;
        for (int t = len - 1; t >= 0; t--) {
            double of_num = 0, of_energy = 0, of_before = 0, of_since = 0;
            const double d = decay[t], of_t = of_after[t], num = numerator[t], n = squared[t];
            if (tokens.opens >> t & 1) of_energy = of_t;
            else if (tokens.live >> t & 1) {
                of_energy = of_t;
                of_before = d * d * of_t;
                of_num = 2 * d * of_t;
                of_since = 2 * d * (d * n + num) * of_t;
            }
            if (!unit && p.ddrift) {
                const int64_t at = row.at(chunk.first + t);
                const double of_drift = p.ddrift[at], drift = p.drift[at], norms = sqrt(energy(t) * n);
                if (of_drift != 0 && drift >= DRIFT_FLOOR && norms > 0) {
                    const double of_cosine = -of_drift / drift, cosine = num / norms;
                    of_num += of_cosine / norms;
                    of_energy -= of_cosine * cosine / (2 * energy(t));
                    of_before -= of_cosine * cosine / (2 * n);
                }
            }
            const int newest = tokens.newest(t);
            if (newest >= 0) of_after[newest] += of_before;
            else of_squared += of_before;
            out[(unit ? NUM_UNIT : NUM) * C + t] = of_num;
            out[(unit ? ENERGY_UNIT : ENERGY) * C + t] = of_energy;
            out[(unit ? SINCE_UNIT : SINCE) * C + t] = of_since;
            if (!unit) out[PRODUCT * C + t] = carried_of[t];
        }
        out[SCALAR_ARRAYS * C + (unit ? SQUARED_UNIT : SQUARED)] = of_squared;
    }
}

// What R has decayed by before token t's numerator takes it: up to the segment's newest token.
DEVICE float carried_decay(const Tokens& tokens, const Gamma* gamma, double log, int t) {
    const int newest = tokens.newest(t);
    return newest < 0 ? 1.0f : expf(static_cast<float>(log + static_cast<double>(gamma[newest].high) + gamma[newest].low));
}

template <typename T>
DEVICE void segment_open_backward(const SegmentBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), slices = padded(dv) / 16, thread = threadIdx.x;
    const int64_t index = blockIdx.x / slices, state = static_cast<int64_t>(dk) * dv;
    const int which = static_cast<int>(blockIdx.x % slices), slice = which * 16;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from && (row.len > 0 || p.from > 0)) return;

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const factor = carve.take<float>(C);
    const Tile<2> keys = carve.tile<2>(C, width);
    const Tile<PARTS> values = carve.tile<PARTS>(C, 16);
    carve.check();

    // Element (key, column) of a state.
    const auto at = [&](int key, int column) { return static_cast<int64_t>(key) * dv + slice + column; };
    double* const carried_squared = p.d_carried_scalars + index * (slices + 1) + 1 + which;
    float* const carried = p.d_carried + index * state;
    const bool goes_on = row.len > p.to;
    double of_squared = goes_on ? *carried_squared : 0.0;
    const float* const entering = goes_on ? carried : p.final_open ? p.final_open + index * state : nullptr;
    OpenSlice r;
    r.each(width, [&](int key, int column, float& x0, float& x1) {
        const bool live = entering && key < dk && slice + column < dv;
        x0 = live ? entering[at(key, column)] : 0.0f, x1 = live ? entering[at(key, column) + 1] : 0.0f;
    });
    const int64_t end = row.len < p.to ? row.len : p.to, chunks = (end - p.from + C - 1) / C;
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t first = p.from + chunk * C;
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t place = (first_chunk(row, C) + first / C) * e.value_heads + row.head;
        const int64_t kept = (place_in_window(e, row, p.from, p.to, p.from, C) + chunk) * e.value_heads + row.head;
        double* const scalars = p.scalars + kept * SCALARS_OF<C>;
        const double log = p.open_log[kept];
        __syncthreads();
        if (warp_index() == 0) load_gamma(p.g, row, first, len, C, gamma);
        const Tokens tokens = tokens_of(p.events, p.energy + place * C, row, first, len);
        const int carried_tokens = tokens.carried(), start = tokens.start(len), newest = tokens.newest(len);
        __syncthreads();
        if (first + C >= row.len) {
            // The final R is that of the newest token, decayed since.
            const double since = newest < 0 ? log + static_cast<double>(gamma[C - 1].high) + gamma[C - 1].low
                                            : minus(gamma[C - 1], gamma[newest]);
            const float by = expf(static_cast<float>(since));
            r.each(width, [&](int, int, float& x0, float& x1) { x0 *= by, x1 *= by; });
        }
        r.each(dk, [&](int key, int column, float& x0, float& x1) {
            if (slice + column < dv) *reinterpret_cast<float2*>(p.d_open + kept * state + at(key, column)) = make_float2(x0, x1);
        });
        if (which == 0 && thread == 0) scalars[SCALAR_ARRAYS * C + EXIT_SQUARED] = of_squared;
        for (int t = thread; t < C; t += THREADS) {
            factor[t] = 0;
            if (t >= carried_tokens) continue;
            const double of_num = scalars[NUM * C + t] + of_squared * scalars[NUM_UNIT * C + t];
            factor[t] = static_cast<float>(of_num * carried_decay(tokens, gamma, log, t)) *
                        (p.qk_l2norm ? p.factor[place * C + t] : 1.0f);
        }
        __syncthreads();
        load_outer<T>(keys, values, static_cast<const T*>(p.k), static_cast<const T*>(p.v), row, first, len, dk, dv, slice,
                      factor);
        const float keep = start >= 0 ? 0.0f : carried_decay(tokens, gamma, log, len);
        r.each(width, [&](int, int, float& x0, float& x1) { x0 *= keep, x1 *= keep; });
        __syncthreads();
        r.add(keys, values, width, 0, carried_tokens);
        of_squared = scalars[SCALAR_ARRAYS * C + SQUARED] + of_squared * scalars[SCALAR_ARRAYS * C + SQUARED_UNIT];
    }
    r.each(dk, [&](int key, int column, float& x0, float& x1) {
        if (slice + column >= dv) return;
        float2 x = make_float2(x0, x1);
        if (p.from == 0 && p.initial_open) {
            const float* const initial = p.initial_open + index * state + at(key, column);
            x.x += static_cast<float>(2 * of_squared) * initial[0], x.y += static_cast<float>(2 * of_squared) * initial[1];
        }
        *reinterpret_cast<float2*>(carried + at(key, column)) = x;
    });
    if (thread == 0) *carried_squared = of_squared;
}

template <typename T>
DEVICE void segment_backward(const SegmentBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BLOCKS = C / 16, PITCH = C + 1;
    constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2, MINE = (LOWER + WARPS - 1) / WARPS, WIDE = BLOCKS * 4 / WARPS;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    const int len = chunk.len;
    if (len == 0) return;
    const Row row = chunk.row;
    const T* const k = static_cast<const T*>(p.k) + row.key_at(chunk.first) * dk;
    const T* const v = static_cast<const T*>(p.v) + row.at(chunk.first) * dv;
    const int64_t key_stride = static_cast<int64_t>(e.heads) * dk, value_stride = static_cast<int64_t>(e.value_heads) * dv;
    const float* const open = p.open + chunk.kept * dk * dv;
    const float* const d_open = p.d_open + chunk.kept * dk * dv;
    const double log = p.open_log[chunk.kept];
    double* const scalars = p.scalars + chunk.kept * SCALARS_OF<C>;
    double* const singles = scalars + SCALAR_ARRAYS * C;

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    double* const of_num = carve.take<double>(C);
    double* const of_g = carve.take<double>(C);
    double* const exits = carve.take<double>(C);      // <dR', what the token gives to R'>
    double* const parts = carve.take<double>(WARPS);
    float* const factor = carve.take<float>(C);
    float* const of_open = carve.take<float>(C);      // weights of R v_t and k_t R
    float* const of_exit = carve.take<float>(C);      // of dR' v_t and k_t dR'
    float* const of_norm = carve.take<float>(C);      // twice the adjoint of E
    float* const key_squares = carve.take<float>(C);
    float* const value_squares = carve.take<float>(C);
    float* const products = carve.take<float>(4 * C);
    const Tile<2> by_values = carve.tile<2>(C, C), by_keys = carve.tile<2>(C, C);
    const Tile<PARTS> rows = carve.tile<PARTS>(C, SLICE);
    unsigned char* const reused = carve.next;
    const Tile<2> before = carve.tile<2>(SLICE, SLICE), behind = carve.tile<2>(SLICE, SLICE);
    carve.check();
    Carve other{reused};
    float* const pairs = other.take<float>(C * PITCH);
    other.check();

    const Tokens tokens = tokens_of(p.events, p.energy + chunk.place * C, row, chunk.first, len);
    const int carried = tokens.carried(), start = tokens.start(len), newest = tokens.newest(len);
    const int segment = start < 0 ? 0 : start;
    if (warp == 0) load_gamma(p.g, row, chunk.first, len, C, gamma);
    __syncthreads();
    const double of_squared = singles[EXIT_SQUARED];
    for (int t = thread; t < C; t += THREADS) {
        factor[t] = p.qk_l2norm && t < len ? p.factor[chunk.place * C + t] : 1.0f;
        of_num[t] = of_g[t] = exits[t] = 0;
        of_open[t] = of_exit[t] = of_norm[t] = 0;
        if (t >= len) continue;
        of_num[t] = scalars[NUM * C + t] + of_squared * scalars[NUM_UNIT * C + t];
        of_norm[t] = static_cast<float>(2 * (scalars[ENERGY * C + t] + of_squared * scalars[ENERGY_UNIT * C + t]));
        if (t < carried) of_open[t] = static_cast<float>(of_num[t] * carried_decay(tokens, gamma, log, t));
        if (t >= segment) {
            const float since = newest < 0 ? static_cast<float>(-log) - value(gamma[t]) : minus(gamma[newest], gamma[t]);
            of_exit[t] = expf(since < MOST_LOG ? since : MOST_LOG);
        }
    }
    for (int t = warp; t < C; t += WARPS) {
        float x[8] = {}, y[8] = {}, squares = 0, more = 0;
        if (t < len && lane * 8 < dk) load8(k + t * key_stride + lane * 8, x);
        if (t < len && lane * 8 < dv) load8(v + t * value_stride + lane * 8, y);
#pragma unroll
        for (int i = 0; i < 8; i++) squares += x[i] * x[i], more += y[i] * y[i];
        squares = warp_sum(squares), more = warp_sum(more);
        if (lane == 0) key_squares[t] = squares, value_squares[t] = more;
    }

    // Pairs: weights of v_t . v_s and of k_t . k_s (both factors of qk_l2norm in the latter's partner), and what they give to g.
    float kk[MINE][2][4], vv[MINE][2][4];
    gram(rows, k, key_stride, len, dk, kk);
    gram(rows, v, value_stride, len, dv, vv);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        int r, n;
        lower_block(warp + i * WARPS, r, n);
        if (warp + i * WARPS >= LOWER) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = r * 16 + lane / 4 + j / 2 % 2 * 8, s = n * 16 + j / 4 * 8 + lane % 4 * 2 + j % 2;
            float weight = 0;
            const int from = tokens.start(t), last = tokens.newest(t);
            if (t < len && s < t && s >= (from < 0 ? 0 : from) && of_num[t] != 0) {
                const float since = last < 0 ? static_cast<float>(-log) - value(gamma[s]) : minus(gamma[last], gamma[s]);
                weight = static_cast<float>(of_num[t] * expf(since < MOST_LOG ? since : MOST_LOG));
            }
            float& of_keys = kk[i][j / 4][j % 4];
            float& of_values = vv[i][j / 4][j % 4];
            const float both = factor[t] * factor[s];
            // Zero tokens past the newest have no part in num.
            pairs[t * PITCH + s] = s <= last ? weight * both * of_keys * of_values : 0.0f;
            of_keys *= weight * both, of_values *= weight * both;
        }
        each_pair(vv[i], [&](int a, int b, float x0, float x1) { put2(by_values, r * 16 + a, n * 16 + b, x0, x1); });
        each_pair(kk[i], [&](int a, int b, float x0, float x1) { put2(by_keys, r * 16 + a, n * 16 + b, x0, x1); });
    }
    __syncthreads();
    if (thread < len) {
        float sum = 0;
        for (int s = 0; s < thread; s++) sum += pairs[thread * PITCH + s], pairs[thread * PITCH + s] = sum;
    }
    __syncthreads();
    if (thread < len) {
        // Through decays from s to the newest token before t: g_u with s < u <= newest.
        double sum = 0;
        for (int t = 0; t < len; t++)
            if (thread > 0 && thread <= tokens.newest(t) && thread > tokens.start(t)) sum += pairs[t * PITCH + thread - 1];
        of_g[thread] = sum;
    }

    // dK: slices of R and of dR' from memory.
    float* const dk_out = p.d_k + chunk.kept * C * dk;
    double inner = 0;  // <dR', R>
    // C += (by + by^T) rows, strictly lower pairs.
    const auto add_pairs = [&](float (&c)[2][4], const Tile<2>& by, int t0, int d0) {
        for (int from = 0; from < C; from += 16) {
            uint32_t a[2][4], b[PARTS][4];
            load_b_trans(rows, d0, from, b);
            if (from <= t0) {
                load_a(by, t0, from, a);
                multiply<2, PARTS>(c, a, b);
            }
            if (from >= t0) {
                load_a_trans(by, t0, from, a);
                multiply<2, PARTS>(c, a, b);
            }
        }
    };
    for (int key = 0; key < dk; key += SLICE) {
        float c[WIDE][2][4], d[WIDE][2][4];
#pragma unroll
        for (int i = 0; i < WIDE; i++) clear(c[i]), clear(d[i]);
        for (int column = 0; column < dv; column += SLICE) {
            __syncthreads();
            load_tokens(rows, v, value_stride, len, column, dv);
            load_square(before, open, key, column, dk, dv);
            load_square(behind, d_open, key, column, dk, dv);
            for (int i = thread; i < SLICE * SLICE / 8; i += THREADS) {
                const int r = key + i / (SLICE / 8), n = column + i % (SLICE / 8) * 8;
                if (r >= dk || n >= dv) continue;
                float x[8], y[8];
                load8(reinterpret_cast<const F32*>(open + static_cast<int64_t>(r) * dv + n), x);
                load8(reinterpret_cast<const F32*>(d_open + static_cast<int64_t>(r) * dv + n), y);
#pragma unroll
                for (int j = 0; j < 8; j++) inner += static_cast<double>(x[j]) * y[j];
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
                for (int step = 0; step < SLICE && column + step < dv; step += 16) {
                    uint32_t a[PARTS][4], b[2][4];
                    load_a(rows, t0, step, a);
                    load_b(before, d0, step, b);
                    multiply<PARTS, 2>(c[i], a, b);
                    load_b(behind, d0, step, b);
                    multiply<PARTS, 2>(d[i], a, b);
                }
            }
        }
        __syncthreads();
        load_tokens(rows, k, key_stride, len, key, dk);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
            float by_pairs[2][4], dots[2][4];
            clear(by_pairs);
            add_pairs(by_pairs, by_values, t0, d0);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = t0 + lane / 4 + j / 2 % 2 * 8, n = key + d0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
                const float of_key = t < len && n < dk ? load1(k + t * key_stride + n) * factor[t] : 0.0f;
                const float exit = d[i][j / 4][j % 4];
                dots[j / 4][j % 4] = exit * of_key;
                if (t < len && n < dk)
                    dk_out[t * dk + n] += of_open[t] * c[i][j / 4][j % 4] + of_exit[t] * exit + by_pairs[j / 4][j % 4] / factor[t] +
                                          of_norm[t] * value_squares[t] * of_key;
            }
            row_sums(dots, products + block % 4 * C + t0);
        }
        __syncthreads();
        if (thread < len)
            exits[thread] += static_cast<double>(of_exit[thread]) * ((products[thread] + products[C + thread]) +
                                                                     (products[2 * C + thread] + products[3 * C + thread]));
    }
    inner = block_sum_f64(inner, parts);

    // dV, the same with R and dR' as they lie.
    const float* const d_v = p.d_v + chunk.kept * C * dv;
    T* const dv_out = static_cast<T*>(p.dv) + row.at(chunk.first) * dv;
    for (int column = 0; column < dv; column += SLICE) {
        float c[WIDE][2][4], d[WIDE][2][4];
#pragma unroll
        for (int i = 0; i < WIDE; i++) clear(c[i]), clear(d[i]);
        for (int key = 0; key < dk; key += SLICE) {
            __syncthreads();
            load_tokens(rows, k, key_stride, len, key, dk);
            load_square(before, open, key, column, dk, dv);
            load_square(behind, d_open, key, column, dk, dv);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
                for (int step = 0; step < SLICE && key + step < dk; step += 16) {
                    uint32_t a[PARTS][4], b[2][4];
                    load_a(rows, t0, step, a);
                    load_b_trans(before, d0, step, b);
                    multiply<PARTS, 2>(c[i], a, b);
                    load_b_trans(behind, d0, step, b);
                    multiply<PARTS, 2>(d[i], a, b);
                }
            }
        }
        __syncthreads();
        load_tokens(rows, v, value_stride, len, column, dv);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            const int block = warp + i * WARPS, t0 = block / 4 * 16, d0 = block % 4 * 16;
            float by_pairs[2][4];
            clear(by_pairs);
            add_pairs(by_pairs, by_keys, t0, d0);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const int t = t0 + lane / 4 + j / 2 % 2 * 8, n = column + d0 + j / 4 * 8 + lane % 4 * 2;
                if (t >= len || n >= dv) continue;
                float x[2], of_value[2];
                load2(v + t * value_stride + n, of_value[0], of_value[1]);
#pragma unroll
                for (int m = 0; m < 2; m++)
                    x[m] = d_v[t * dv + n + m] +
                           factor[t] * (of_open[t] * c[i][j / 4][j % 4 + m] + of_exit[t] * d[i][j / 4][j % 4 + m]) +
                           by_pairs[j / 4][j % 4 + m] +
                           of_norm[t] * (key_squares[t] * factor[t] * factor[t]) * of_value[m];
                store2_of(dv_out + t * value_stride + n, x[0], x[1]);
            }
        }
    }
    __syncthreads();

    // Decays: from_start[t] is for every g_u with u <= t. By one thread, C steps of sums.
    if (thread == 0) {
        double own = 0, exit_log = 0;
        double* const from_start = exits;
        // Through R' to the newest token: tokens of the last segment, and R.
        double sum = 0;
        for (int s = segment; s <= newest; s++) {
            of_g[s] += sum;
            sum += exits[s];
            exits[s] = 0;
        }
        exit_log = sum;
        for (int s = newest < segment ? segment : newest + 1; s < len; s++) exits[s] = 0;
        for (int s = 0; s < segment; s++) exits[s] = 0;
        if (start < 0) {
            const double of_decay = static_cast<double>(carried_decay(tokens, gamma, log, len)) * inner;
            exit_log += of_decay;
            if (newest >= 0) from_start[newest] += of_decay, own += of_decay;
        }
        for (int t = 0; t < len; t++) {
            const int last = tokens.newest(t);
            const double of_since = scalars[SINCE * C + t] + of_squared * scalars[SINCE_UNIT * C + t];
            from_start[t] += of_since;
            if (last >= 0) from_start[last] -= of_since;
            else own += of_since;
            if (t < carried && last >= 0) {
                const double in_carried = static_cast<double>(of_open[t]) * scalars[PRODUCT * C + t];
                from_start[last] += in_carried;
                own += in_carried;
            }
        }
        double after = 0;
        for (int t = len - 1; t >= 0; t--) {
            after += from_start[t];
            of_g[t] += after;
        }
        singles[OWN_LOG] = own;
        singles[NEWEST] = newest;
        singles[EXIT_LOG] = exit_log;
    }
    __syncthreads();
    if (p.dg && thread < len) p.dg[row.at(chunk.first + thread)] += static_cast<float>(of_g[thread]);
}

// The decay since R's newest token, at every chunk's end: g of the tokens after it. By one warp.
template <typename T>
DEVICE void segment_log_backward(const SegmentBackwardParams& p) {
    constexpr int C = T::CHUNK;
    const Extents& e = p.extents;
    const int64_t index = blockIdx.x;
    const Row row = row_of(e, index / e.value_heads, static_cast<int>(index % e.value_heads));
    if (row.len <= p.from || threadIdx.x >= 32) return;
    double* const carried = p.d_carried_scalars + index * (padded(e.dv) / 16 + 1);
    double of_log = row.len > p.to ? *carried : 0.0;
    const int64_t end = row.len < p.to ? row.len : p.to, chunks = (end - p.from + C - 1) / C;
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t first = p.from + chunk * C;
        const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
        const int64_t kept = (place_in_window(e, row, p.from, p.to, p.from, C) + chunk) * e.value_heads + row.head;
        const double* const singles = p.scalars + kept * SCALARS_OF<C> + SCALAR_ARRAYS * C;
        if (first + C >= row.len) of_log = p.final_open ? singles[EXIT_LOG] : 0.0;
        const int newest = static_cast<int>(singles[NEWEST]);
        if (p.dg && of_log != 0)
            for (int t = newest + 1 + lane_index(); t < len; t += 32) p.dg[row.at(first + t)] += static_cast<float>(of_log);
        of_log = singles[OWN_LOG] + (newest < 0 ? of_log : 0.0);
    }
    __syncwarp();
    if (lane_index() == 0) *carried = of_log;
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a: drift_backward 54 / 56 at most, segment_states 83 / 89,
// segment_scalars 107 / 106, segment_open_backward 100 / 98, segment_backward 147 / 154, segment_log_backward 40 / 48.
#define SEGMENT_BACKWARD(name, Params, function)                                                   \
    KERNEL BLOCK_OF(dla::THREADS) name##_bf16(const __grid_constant__ dla::Params p) { dla::function<dla::Bf16>(p); } \
    KERNEL BLOCK_OF(dla::THREADS) name##_f16(const __grid_constant__ dla::Params p) { dla::function<dla::F16>(p); }   \
    KERNEL BLOCK_OF(dla::THREADS) name##_f32(const __grid_constant__ dla::Params p) { dla::function<dla::F32>(p); }
SEGMENT_BACKWARD(drift_backward, DriftBackwardParams, drift_backward)
SEGMENT_BACKWARD(segment_states, SegmentStatesParams, segment_states)
SEGMENT_BACKWARD(segment_scalars, SegmentBackwardParams, segment_scalars)
SEGMENT_BACKWARD(segment_open_backward, SegmentBackwardParams, segment_open_backward)
SEGMENT_BACKWARD(segment_backward, SegmentBackwardParams, segment_backward)
SEGMENT_BACKWARD(segment_log_backward, SegmentBackwardParams, segment_log_backward)
