// prepare: what the scan needs of a chunk and that knows nothing of slots (OPERATOR.md, section 4).
//
//   A = scale (Q K^T) . D                      P = A                       (gated)
//   Tm = (I + tril(diag(beta) (K K^T . D), -1))^-1
//   W = Tm (beta e^Gamma K)                    P = (A Tm) diag(beta)       (gated delta rule)
//   Qt = scale e^Gamma Q - A W                 Kh = diag(beta) Tm^T (e^{Gamma_C - Gamma} K)
//
// One block of 256 threads per chunk and value head (grid.x = places of chunks x HV, abi.cuh; a place without a
// chunk returns at once). The key dimension is worked through 64 columns at a time: first for Q K^T and K K^T,
// then for W, Kh and Qt. Tm is inverted in f32 by blocks of 16: the diagonal blocks by substitution, one thread
// a column; the others by T_ij = -T_ii sum over k of L_ik T_kj, one thread an element.
//
// Numerics: whatever is computed here enters a product in two planes, and is rounded once, on leaving, to
// bf16 (bf16 inputs) or two planes of it (f16, f32; for the backward whatever the inputs).
//
// Shared memory, delta rule: 93,440 bytes (bf16, C = 64) and 38,528 (C = 32), gated 19,712 and 19,072; whatever the head
// size. Registers: at the end of the file. Floor: bytes. Predicted, not measured, at S3: gated reads 0.27 GB and
// writes 67 MB, 0.12 ms; delta writes 470 MB and makes 14 MFLOP a chunk and head, 0.4 ms.

#include "common/invert.cuh"
#include "common/row.cuh"

namespace dla {
namespace {

// Writes a pair of a matrix [count][rows][width] of planes in global memory, count 1 or 2.
DEVICE void store2(uint16_t* to, int count, int rows, int width, int row, int column, float x0, float x1) {
    uint32_t planes[2];
    split<2>(x0, x1, planes);
    *reinterpret_cast<uint32_t*>(to + row * width + column) = planes[0];
    if (count == 2) *reinterpret_cast<uint32_t*>(to + (rows + row) * width + column) = planes[1];
}

template <typename T, bool DELTA>
DEVICE void prepare(const PrepareParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, PITCH = C + 1, BLOCKS = C / 16;
    const Extents& e = p.extents;
    const int dk = e.dk, width = padded(dk);
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int64_t place = blockIdx.x / e.value_heads;
    const int64_t in_window = chunks_of_window(e, p.from, p.to, C);
    const int64_t sequence = p.to > 0 ? place / in_window : sequence_of_chunk(e, place, C);
    const Row row = row_of(e, sequence, blockIdx.x % e.value_heads);
    const int64_t first = p.to > 0 ? p.from + place % in_window * C : (place - first_chunk(row, C)) * C;
    if (first >= row.len) return;
    const int len = row.len - first < C ? static_cast<int>(row.len - first) : C;
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);

    Carve carve{dynamic_shared()};
    Gamma* const gamma = carve.take<Gamma>(C);
    float* const beta = carve.take<float>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    // Queries and keys as they come; later, delta rule, the two keys that Tm multiplies.
    unsigned char* const reused = carve.next;
    const Tile<PARTS> queries = carve.tile<PARTS>(C, SLICE), keys = carve.tile<PARTS>(C, SLICE);
    Tile<2> tm_planes, a_planes, kb, kd, w;
    float* lower = nullptr;
    float* tm = nullptr;
    if constexpr (DELTA) {
        carve.next = reused;
        kb = carve.tile<2>(C, SLICE), kd = carve.tile<2>(C, SLICE);
        tm_planes = carve.tile<2>(C, C), a_planes = carve.tile<2>(C, C);
        // L is dead when W is first written, Tm in f32 when the keys are.
        lower = reinterpret_cast<float*>(carve.next);
        w = carve.tile<2>(C, SLICE);
        tm = reinterpret_cast<float*>(reused);
    }
    carve.check();

    for (int t = warp; t < C; t += WARPS) {
        const bool live = t < len;
        const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        if (lane == 0) {
            q_factor[t] = qf, k_factor[t] = kf;
            beta[t] = DELTA && live ? p.beta[row.at(first + t)] : 0.0f;
        }
    }
    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);

    // Q K^T and K K^T: warp w has blocks w and w + 8 of 16 x 16, in rows.
    constexpr int MINE = (BLOCKS * BLOCKS + WARPS - 1) / WARPS;
    float qk[MINE][2][4], kk[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(qk[i]), clear(kk[i]);
    for (int column = 0; column < width; column += SLICE) {
        __syncthreads();
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            const int64_t at = row.key_at(first + t) * dk;
            load_slice(queries, t, group, t < len ? q + at : nullptr, column, dk, 1.0f);
            load_slice(keys, t, group, t < len ? k + at : nullptr, column, dk, 1.0f);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int block = warp + i * WARPS, t = block / BLOCKS * 16, s = block % BLOCKS * 16;
            if (block >= BLOCKS * BLOCKS || s > t) continue;
            for (int from = 0; from < SLICE; from += 16) {
                uint32_t a[PARTS][4], b[PARTS][4];
                load_b(keys, s, from, b);
                load_a(queries, t, from, a);
                multiply<PARTS, PARTS>(qk[i], a, b);
                if constexpr (DELTA) {
                    load_a(keys, t, from, a);
                    multiply<PARTS, PARTS>(kk[i], a, b);
                }
            }
        }
    }
    __syncthreads();

    const int64_t chunk = place * e.value_heads + row.head;
    const int planes = p.to > 0 ? 2 : PARTS;  // that are left of what is computed
    uint16_t* const p_out = p.p + chunk * planes * C * C;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int block = warp + i * WARPS, t0 = block / BLOCKS * 16, s0 = block % BLOCKS * 16;
        if (block >= BLOCKS * BLOCKS) continue;
        const auto decay = [&](int t, int s) { return s <= t ? expf(minus(gamma[t], gamma[s])) * k_factor[s] : 0.0f; };
        each_pair(qk[i], [&](int r, int n, float x0, float x1) {
            const int t = t0 + r, s = s0 + n;
            const float factor = p.scale * q_factor[t];
            x0 *= factor * decay(t, s), x1 *= factor * decay(t, s + 1);
            if constexpr (DELTA) put2(a_planes, t, s, x0, x1);
            else store2(p_out, planes, C, C, t, s, x0, x1);
        });
        if constexpr (DELTA) {
            each_pair(kk[i], [&](int r, int n, float x0, float x1) {
                const int t = t0 + r, s = s0 + n;
                const float factor = beta[t] * k_factor[t];
                lower[t * PITCH + s] = s < t ? x0 * factor * decay(t, s) : 0.0f;
                lower[t * PITCH + s + 1] = s + 1 < t ? x1 * factor * decay(t, s + 1) : 0.0f;
            });
        }
    }
    if constexpr (!DELTA) return;

    __syncthreads();
    invert<C>(lower, tm);
    for (int i = thread; i < C * C / 2; i += THREADS) {
        const int t = i / (C / 2), s = i % (C / 2) * 2;
        put2(tm_planes, t, s, s <= t ? tm[t * PITCH + s] : 0.0f, s + 1 <= t ? tm[t * PITCH + s + 1] : 0.0f);
    }
    __syncthreads();

    // P = (A Tm) diag(beta).
    for (int block = warp; block < BLOCKS * BLOCKS; block += WARPS) {
        const int t0 = block / BLOCKS * 16, s0 = block % BLOCKS * 16;
        float c[2][4];
        clear(c);
        for (int u = s0; u <= t0; u += 16) {
            uint32_t a[2][4], b[2][4];
            load_a(a_planes, t0, u, a);
            load_b_trans(tm_planes, s0, u, b);
            multiply<2, 2>(c, a, b);
        }
        each_pair(c, [&](int r, int n, float x0, float x1) {
            const int t = t0 + r, s = s0 + n;
            store2(p_out, planes, C, C, t, s, s <= t ? x0 * beta[s] : 0.0f, s + 1 <= t ? x1 * beta[s + 1] : 0.0f);
        });
    }

    const int64_t prepared = chunk * planes * C * width;
    for (int column = 0; column < width; column += SLICE) {
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            const T* from = t < len ? k + row.key_at(first + t) * dk : nullptr;
            load_slice(kb, t, group, from, column, dk, beta[t] * expf(value(gamma[t])) * k_factor[t]);
            load_slice(kd, t, group, from, column, dk, expf(minus(gamma[C - 1], gamma[t])) * k_factor[t]);
        }
        __syncthreads();
        // W = Tm (beta e^Gamma K), Kh = diag(beta) Tm^T Kd.
        for (int block = warp; block < BLOCKS * (SLICE / 16); block += WARPS) {
            const int t0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
            float c[2][4];
            uint32_t a[2][4], b[2][4];
            clear(c);
            for (int u = 0; u <= t0; u += 16) {
                load_a(tm_planes, t0, u, a);
                load_b_trans(kb, d0, u, b);
                multiply<2, 2>(c, a, b);
            }
            each_pair(c, [&](int r, int n, float x0, float x1) {
                put2(w, t0 + r, d0 + n, x0, x1);
                if (column + d0 < width) store2(p.w + prepared, planes, C, width, t0 + r, column + d0 + n, x0, x1);
            });
            clear(c);
            for (int u = t0; u < C; u += 16) {
                load_a_trans(tm_planes, t0, u, a);
                load_b_trans(kd, d0, u, b);
                multiply<2, 2>(c, a, b);
            }
            each_pair(c, [&](int r, int n, float x0, float x1) {
                const float strength = beta[t0 + r];
                if (column + d0 < width)
                    store2(p.kh + prepared, planes, C, width, t0 + r, column + d0 + n, strength * x0, strength * x1);
            });
        }
        __syncthreads();
        // Qt = scale e^Gamma Q - A W.
        for (int block = warp; block < BLOCKS * (SLICE / 16); block += WARPS) {
            const int t0 = block / (SLICE / 16) * 16, d0 = block % (SLICE / 16) * 16;
            if (column + d0 >= width) continue;
            float c[2][4];
            clear(c);
            for (int u = 0; u <= t0; u += 16) {
                uint32_t a[2][4], b[2][4];
                load_a(a_planes, t0, u, a);
                load_b_trans(w, d0, u, b);
                multiply<2, 2>(c, a, b);
            }
            each_pair(c, [&](int r, int n, float x0, float x1) {
                const int t = t0 + r, d = column + d0 + n;
                float q0 = 0, q1 = 0;
                if (t < len && d < dk) load2(q + row.key_at(first + t) * dk + d, q0, q1);
                const float factor = p.scale * expf(value(gamma[t])) * q_factor[t];
                store2(p.qt + prepared, planes, C, width, t, d, factor * q0 - x0, factor * q1 - x1);
            });
        }
    }
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: gated 57 to 61 / 58 to 62 / 55 to
// 67 / 54 to 66, delta 72 to 79 / 81 to 84 / 78 to 87 / 72 to 84.
#define PREPARE(name, T, DELTA) \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::PrepareParams p) { dla::prepare<dla::T, DELTA>(p); }
PREPARE(prepare_gated_bf16, Bf16, false)
PREPARE(prepare_gated_f16, F16, false)
PREPARE(prepare_gated_f32, F32, false)
PREPARE(prepare_delta_bf16, Bf16, true)
PREPARE(prepare_delta_f16, F16, true)
PREPARE(prepare_delta_f32, F32, true)
