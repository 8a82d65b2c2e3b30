// prepare_backward: the adjoint of prepare, and of what of the scan lies within a chunk (OPERATOR.md, section 4).
//
// The scan's adjoint leaves, in slices over dv that are summed here in their order, dQt, dKh (dW, dKd), the states' part of
// dlambda, and of Gamma_C.
//
//   dP = (dO V^T) . Lambda,  dlambda_t[slot_t(s)] += (dO V^T)_ts P_ts
//   gated:  dA = dP,  dQ = scale e^Gamma dQt + scale (dA . D) K,  dK = scale (dA . D)^T Q + e^{Gamma_C - Gamma} dKh
//   delta rule, with B = Tm diag(beta), Kt = e^Gamma K, Kd = e^{Gamma_C - Gamma} K, all matrices lower triangles:
//     U = dQt Kt^T,  N = dP - U,  dA = N B^T,  E = A^T N + Kd dKh^T + dW Kt^T,  dL = -tril(Tm^T E B^T, -1)
//     dK += e^{Gamma_C - Gamma} (dKd + B dKh) + e^Gamma (B^T dW - P^T dQt) + (dL . beta D) K + (dL . beta D)^T K
//     dbeta_s = sum over u of Tm_us E_us + sum over r of dL_sr (K K^T . D)_sr
//   (prepare's adjoint as section 4 has it, W = B Kt and Kh = diag(beta) Tm^T Kd put in; so W, Kh and Qt are not made
//   again, and what is as long as dk meets C x C matrices alone.)
//
// A decay e^{Gamma_t - Gamma_s} gives gradient . value to every g_u with s < u <= t, and is summed that way: under strong
// decay the gradient of g is what is left of terms far larger than itself. Sums over pairs in f32 by row, the rest in f64.
//
// One block of 256 threads per chunk of the window and value head. The dimensions are worked through 64 columns at a
// time. C x C products are made in blocks of 16 x 16, the block index-th of the lower triangle by warp index % 8, and stay
// in that warp's registers.
//
// Numerics: q, k, v, dO in their planes (exact, f32 to 2^-17); all that is computed enters a product in two planes,
// accumulates in f32 and leaves in f32. The delta rule in f32 takes three planes of everything: with two, dbeta was off by up
// to 1.1e-4 on the emulator. Factors of qk_l2norm are multiplied into C x C matrices and out of the results.
//
// Shared memory, C = 64 (bf16) / C = 32, whatever the head size: gated 75,648 / 33,216 bytes, delta rule 98,176 / 56,256.
// Registers: at the end of the file. Not yet timed: at S3 the partial sums of 8 slices are 4.3 GB, by far the most bytes.

#include "common/invert.cuh"
#include "common/window.cuh"

namespace dla {
namespace {

template <typename T, bool DELTA>
DEVICE void prepare_backward(const PrepareBackwardParams& p) {
    constexpr int PARTS = T::PARTS, C = T::CHUNK, BLOCKS = C / 16, PITCH = C + 1;
    constexpr int LOWER = BLOCKS * (BLOCKS + 1) / 2, MINE = (LOWER + WARPS - 1) / WARPS;
    constexpr int ITEMS = C * SLICE / 8 / THREADS;                         // eights of a slice of a thread
    constexpr int WIDE = BLOCKS * (SLICE / 16) / WARPS;                    // blocks of a slice of a warp
    // The delta rule's dbeta is what is left of far larger sums: f32 enters them whole.
    constexpr bool WHOLE = DELTA && sizeof(T) == 4;
    constexpr int PLANES = WHOLE ? 3 : PARTS, DEEP = WHOLE ? 3 : 2;
    const Extents& e = p.extents;
    const int dk = e.dk, dv = e.dv, width = padded(dk), capacity = e.capacity;
    const int warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const WindowChunk chunk = chunk_of_block(e, blockIdx.x, p.from, p.to, C);
    const int len = chunk.len;
    if (len == 0) return;
    const Row row = chunk.row;
    const int64_t first = chunk.first;
    const T* const q = static_cast<const T*>(p.q);
    const T* const k = static_cast<const T*>(p.k);
    const T* const v = static_cast<const T*>(p.v);
    const T* const d_o = static_cast<const T*>(p.d_o);
    const int64_t slice_rows = p.places * e.value_heads * C;               // rows of one slice's partial sums
    float* const dq_out = p.d_q + chunk.kept * C * dk;
    float* const dk_out = p.d_k + chunk.kept * C * dk;

    Carve carve{dynamic_shared()};
    Replay<C> replay;
    replay.take(carve);
    Gamma* const gamma = carve.take<Gamma>(C);
    double* const from_start = carve.take<double>(C);                      // gradient through e^Gamma_t
    double* const to_end = carve.take<double>(C);                          // through e^{Gamma_C - Gamma_s}
    float* const beta = carve.take<float>(C);
    float* const q_factor = carve.take<float>(C);
    float* const k_factor = carve.take<float>(C);
    float* const start_decay = carve.take<float>(C);                       // e^Gamma
    float* const end_decay = carve.take<float>(C);                         // e^{Gamma_C - Gamma}
    float* const sums = DELTA ? carve.take<float>(4 * BLOCKS * C) : nullptr;
    // C x C matrices: A, then the gradient of Q K^T; delta rule: Tm, then the gradient of K K^T; P, then E.
    const Tile<DEEP> a_planes = carve.tile<DEEP>(C, C);
    const Tile<DEEP> tm_planes = DELTA ? carve.tile<DEEP>(C, C) : a_planes;
    // Operands of the first products; L and Tm in f32; Y, pairs and where slots begin; P, and slices of K and of
    // what it meets (queries, at the end).
    unsigned char* const reused = carve.next;
    const Tile<DEEP> p_planes = carve.tile<DEEP>(C, C);
    float* const pairs = reinterpret_cast<float*>(reused);                 // [C][PITCH]
    unsigned char* const slices = carve.next;
    const Tile<PLANES> keys = carve.tile<PLANES>(C, SLICE);
    const Tile<DEEP> rows = carve.tile<DEEP>(C, SLICE);
    const Tile<PLANES> queries = {rows.data, rows.stride, rows.plane};
    Carve scratch{slices};
    float* const y = scratch.take<float>(C * PITCH);
    uint8_t* const begins = scratch.take<uint8_t>(C * (MOST_SLOTS + 1));   // first token of every slot, at token t
    Carve inversion{reused};
    float* const lower = inversion.take<float>(C * PITCH);
    float* const tm = inversion.take<float>(C * PITCH);
    carve.check(), scratch.check(), inversion.check();

    for (int t = warp; t < C; t += WARPS) {
        const bool live = t < len;
        const float qf = norm_factor(live ? q + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        const float kf = norm_factor(live ? k + row.key_at(first + t) * dk : nullptr, dk, p.qk_l2norm);
        if (lane == 0) {
            q_factor[t] = qf, k_factor[t] = kf;
            beta[t] = DELTA && live ? p.beta[row.at(first + t)] : 0.0f;
            from_start[t] = to_end[t] = 0;
        }
    }
    if (warp == 0) load_gamma(p.g, row, first, len, C, gamma);
    replay.run(p.events, row, first, len, p.chunk_len[chunk.place]);
    for (int t = thread; t < C; t += THREADS) {
        start_decay[t] = expf(value(gamma[t]));
        end_decay[t] = expf(minus(gamma[C - 1], gamma[t]));
    }

    // Calls f(i, t0, s0) for this warp's i-th block of a lower triangle.
    const auto each_block = [&](auto f) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int r, n;
            lower_block(warp + i * WARPS, r, n);
            if (warp + i * WARPS < LOWER) f(i, r * 16, n * 16);
        }
    };
    // Calls f(i, t0, d0) for this warp's i-th block of a slice.
    const auto each_wide = [&](auto f) {
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            const int block = warp + i * WARPS;
            f(i, block / (SLICE / 16) * 16, block % (SLICE / 16) * 16);
        }
    };
    const auto load_rows = [&](const Tile<PLANES>& tile, const T* from, int64_t stride, int column, int to) {
        for (int i = thread; i < C * SLICE / 8; i += THREADS) {
            const int t = i / (SLICE / 8), group = i % (SLICE / 8);
            load_slice(tile, t, group, t < len ? from + t * stride : nullptr, column, to, 1.0f);
        }
    };
    const T* const q_rows = q + row.key_at(first) * dk;
    const T* const k_rows = k + row.key_at(first) * dk;
    const int64_t key_stride = static_cast<int64_t>(e.heads) * dk, value_stride = static_cast<int64_t>(e.value_heads) * dv;

    // 1. dO V^T, Q K^T, K K^T.
    float ov[MINE][2][4], qk[MINE][2][4], kk[MINE][2][4];
#pragma unroll
    for (int i = 0; i < MINE; i++) clear(ov[i]), clear(qk[i]), clear(kk[i]);
    for (int column = 0; column < dv; column += SLICE) {
        __syncthreads();
        load_rows(queries, d_o + row.at(first) * dv, value_stride, column, dv);
        load_rows(keys, v + row.at(first) * dv, value_stride, column, dv);
        __syncthreads();
        each_block([&](int i, int t0, int s0) {
            for (int from = 0; from < SLICE && column + from < dv; from += 16) {
                uint32_t a[PLANES][4], b[PLANES][4];
                load_a(queries, t0, from, a);
                load_b(keys, s0, from, b);
                multiply<PLANES, PLANES>(ov[i], a, b);
            }
        });
    }
    for (int column = 0; column < dk; column += SLICE) {
        __syncthreads();
        load_rows(queries, q_rows, key_stride, column, dk);
        load_rows(keys, k_rows, key_stride, column, dk);
        __syncthreads();
        each_block([&](int i, int t0, int s0) {
            for (int from = 0; from < SLICE && column + from < dk; from += 16) {
                uint32_t a[PLANES][4], b[PLANES][4];
                load_b(keys, s0, from, b);
                load_a(queries, t0, from, a);
                multiply<PLANES, PLANES>(qk[i], a, b);
                if constexpr (DELTA) {
                    load_a(keys, t0, from, a);
                    multiply<PLANES, PLANES>(kk[i], a, b);
                }
            }
        });
    }
    __syncthreads();

    const auto decay = [&](int t, int s) { return s <= t ? expf(minus(gamma[t], gamma[s])) : 0.0f; };
    // Element (t, s) of a fragment's j-th number.
    const auto row_of_element = [&](int t0, int j) { return t0 + lane / 4 + j % 4 / 2 * 8; };
    const auto column_of_element = [&](int s0, int j) { return s0 + j / 4 * 8 + lane % 4 * 2 + j % 2; };

    // 2. A; delta rule: Tm. K K^T . D stays in kk, A in qk.
    each_block([&](int i, int t0, int s0) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = row_of_element(t0, j), s = column_of_element(s0, j);
            const float d = decay(t, s) * k_factor[s];
            qk[i][j / 4][j % 4] *= p.scale * q_factor[t] * d;
            if constexpr (DELTA) {
                kk[i][j / 4][j % 4] *= k_factor[t] * d;
                lower[t * PITCH + s] = s < t ? beta[t] * kk[i][j / 4][j % 4] : 0.0f;
            }
        }
        if constexpr (DELTA) each_pair(qk[i], [&](int r, int n, float x0, float x1) { put2(a_planes, t0 + r, s0 + n, x0, x1); });
    });
    if constexpr (DELTA) {
        __syncthreads();
        invert<C>(lower, tm);
        for (int i = thread; i < C * C / 2; i += THREADS) {
            const int t = i / (C / 2), s = i % (C / 2) * 2;
            put2(tm_planes, t, s, s <= t ? tm[t * PITCH + s] : 0.0f, s + 1 <= t ? tm[t * PITCH + s + 1] : 0.0f);
        }
        __syncthreads();
    }

    // 3. P, dP (in ov), Y and what it adds to dlambda.
    float intra[MINE][2][4];
    each_block([&](int i, int t0, int s0) {
        if constexpr (DELTA) {
            clear(intra[i]);
            for (int u = s0; u <= t0; u += 16) {
                uint32_t a[DEEP][4], b[DEEP][4];
                load_a(a_planes, t0, u, a);
                load_b_trans(tm_planes, s0, u, b);
                multiply<DEEP, DEEP>(intra[i], a, b);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = row_of_element(t0, j), s = column_of_element(s0, j);
            float& x = ov[i][j / 4][j % 4];
            float& of_p = intra[i][j / 4][j % 4];
            of_p = DELTA ? (s <= t ? of_p * beta[s] : 0.0f) : qk[i][j / 4][j % 4];
            y[t * PITCH + s] = x * of_p;
            float weight = 0;
            if (s <= t && t < len) {
                const int column = column_of(e, replay.of_token(t, s), replay.len[t]);
                weight = p.lambda[row.at(first + t) * p.lambda_columns + column];
            }
            x *= weight;
            if constexpr (!DELTA) pairs[t * PITCH + s] = x * of_p;
        }
        if constexpr (DELTA)
            each_pair(intra[i], [&](int r, int n, float x0, float x1) { put2(p_planes, t0 + r, s0 + n, x0, x1); });
    });
    for (int i = thread; i < C * C; i += THREADS) {
        const int t = i / C, s = i % C;
        if (t >= len || s > t) continue;
        const int slot = replay.of_token(t, s);
        if (s == 0 || replay.of_token(t, s - 1) != slot) begins[t * (MOST_SLOTS + 1) + slot] = s;
    }
    __syncthreads();
    // Tokens of a chunk have slots from a first one up to the last that is held.
    const int64_t weight_slice = slice_rows * capacity, weights_at = chunk.kept * C * capacity;
    const int columns = p.dlambda ? p.lambda_columns : capacity;
    for (int i = thread; i < len * columns; i += THREADS) {
        const int t = i / columns, column = i % columns, held = replay.len[t];
        float x = 0;
        int slot = column;
        if (column < held) {
            if (p.dlambda) slot = column_of(e, column, held);
            for (int slice = 0; slice < p.slices; slice++)
                x += p.d_weights[slice * weight_slice + weights_at + t * capacity + slot];
            if (slot >= replay.of_token(t, 0)) {
                const int end = slot + 1 < held ? begins[t * (MOST_SLOTS + 1) + slot + 1] : t + 1;
                float within = 0;
                for (int s = begins[t * (MOST_SLOTS + 1) + slot]; s < end; s++) within += y[t * PITCH + s];
                x += within;
            }
        }
        if (p.dlambda) p.dlambda[row.at(first + t) * columns + column] = x;
        if (p.d_slots && slot < capacity) p.d_slots[weights_at + t * capacity + slot] = x;
    }
    __syncthreads();

    // 4. What is as long as dk: eights of columns of rows are a thread's.
    double total = 0;
    if (thread < C)
        for (int slice = 0; slice < p.slices; slice++) total += p.d_total[slice * p.places * e.value_heads + chunk.kept];
    const int64_t partial_slice = slice_rows * width, partial_at = chunk.kept * C * width;
    // The sum over slices of the item-th eight of a thread.
    const auto partial = [&](const float* from, int item, int column, float (&x)[8]) {
        const int i = thread + item * THREADS, t = i / (SLICE / 8), d = column + i % (SLICE / 8) * 8;
#pragma unroll
        for (int n = 0; n < 8; n++) x[n] = 0;
        if (t >= len || d >= dk) return;
#pragma unroll 4
        for (int slice = 0; slice < p.slices; slice++) {
            float one[8];
            load8(reinterpret_cast<const F32*>(from + slice * partial_slice + partial_at + t * width + d), one);
#pragma unroll
            for (int n = 0; n < 8; n++) x[n] += one[n];
        }
    };
    // Adds factor x . (the row of `from`) over the row to sums[t]; writes by * x.
    const auto finish = [&](int item, int column, const float (&x)[8], const T* from, float factor, double* sums, float by,
                            float* out) {
        const int i = thread + item * THREADS, t = i / (SLICE / 8), group = i % (SLICE / 8), d = column + group * 8;
        float of_row[8] = {}, dot = 0;
        if (t < len && d < dk) {
            load8(from + t * key_stride + d, of_row);
            float scaled[8];
#pragma unroll
            for (int n = 0; n < 8; n++) dot += x[n] * of_row[n], scaled[n] = by * x[n];
            store8(reinterpret_cast<F32*>(out + t * dk + d), scaled);
        }
#pragma unroll
        for (int lanes = 1; lanes < SLICE / 8; lanes *= 2) dot += __shfl_xor_sync(ALL, dot, lanes);
        if (group == 0) sums[t] += static_cast<double>(factor) * dot;
    };
    const auto put = [&](int item, const float (&x)[8], float by) {
        const int i = thread + item * THREADS;
        float scaled[8];
#pragma unroll
        for (int n = 0; n < 8; n++) scaled[n] = by * x[n];
        put8(rows, i / (SLICE / 8), i % (SLICE / 8) * 8, scaled);
    };
    const auto token_of = [&](int item) { return (thread + item * THREADS) / (SLICE / 8); };

    float u_matrix[MINE][2][4], u_w[MINE][2][4], z[MINE][2][4];
    if constexpr (DELTA) {
#pragma unroll
        for (int i = 0; i < MINE; i++) clear(u_matrix[i]), clear(u_w[i]), clear(z[i]);
    }
    for (int column = 0; column < dk; column += SLICE) {
        float x[ITEMS][8];
        if constexpr (DELTA) {
            // The slices of K and of dQt.
            __syncthreads();
            load_rows(keys, k_rows, key_stride, column, dk);
        }
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            const int t = token_of(item);
            const float factor = p.scale * start_decay[t];
            partial(p.d_qt, item, column, x[item]);
            finish(item, column, x[item], q_rows, factor * q_factor[t], from_start, factor, dq_out);
            if constexpr (DELTA) put(item, x[item], 1.0f);
            partial(DELTA ? p.d_kd : p.d_kh, item, column, x[item]);
            finish(item, column, x[item], k_rows, end_decay[t] * k_factor[t], to_end, end_decay[t], dk_out);
        }
        if constexpr (DELTA) {
            const int steps = dk - column < SLICE ? padded(dk - column) : SLICE;
            // rows K^T, or with `transposed` K rows^T.
            const auto gram = [&](float (&c)[MINE][2][4], bool transposed) {
                each_block([&](int i, int t0, int s0) {
                    for (int from = 0; from < steps; from += 16) {
                        if (transposed) {
                            uint32_t a[PLANES][4], b[DEEP][4];
                            load_a(keys, t0, from, a);
                            load_b(rows, s0, from, b);
                            multiply<PLANES, DEEP>(c[i], a, b);
                        } else {
                            uint32_t a[DEEP][4], b[PLANES][4];
                            load_a(rows, t0, from, a);
                            load_b(keys, s0, from, b);
                            multiply<DEEP, PLANES>(c[i], a, b);
                        }
                    }
                });
            };
            float c[WIDE][2][4], by_tm[WIDE][2][4];
            __syncthreads();
            gram(u_matrix, false);
            each_wide([&](int i, int t0, int d0) {
                clear(c[i]);
                for (int from = t0; from < C; from += 16) {
                    uint32_t a[DEEP][4], b[DEEP][4];
                    load_a_trans(p_planes, t0, from, a);
                    load_b_trans(rows, d0, from, b);
                    multiply<DEEP, DEEP>(c[i], a, b);
                }
            });
            __syncthreads();
#pragma unroll
            for (int item = 0; item < ITEMS; item++) {
                partial(p.d_w, item, column, x[item]);
                put(item, x[item], 1.0f);
            }
            __syncthreads();
            gram(u_w, false);
            each_wide([&](int i, int t0, int d0) {
                clear(by_tm[i]);
                for (int from = t0; from < C; from += 16) {
                    uint32_t a[DEEP][4], b[DEEP][4];
                    load_a_trans(tm_planes, t0, from, a);
                    load_b_trans(rows, d0, from, b);
                    multiply<DEEP, DEEP>(by_tm[i], a, b);
                }
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int t = row_of_element(t0, j);
                    float& of_c = c[i][j / 4][j % 4];
                    of_c = start_decay[t] * (beta[t] * by_tm[i][j / 4][j % 4] - of_c);
                }
                clear(by_tm[i]);
            });
            __syncthreads();
#pragma unroll
            for (int item = 0; item < ITEMS; item++) {
                partial(p.d_kh, item, column, x[item]);
                put(item, x[item], 1.0f);
            }
            __syncthreads();
            gram(z, true);
            __syncthreads();
#pragma unroll
            for (int item = 0; item < ITEMS; item++) put(item, x[item], beta[token_of(item)]);
            __syncthreads();
            each_wide([&](int i, int t0, int d0) {
                for (int from = 0; from <= t0; from += 16) {
                    uint32_t a[DEEP][4], b[DEEP][4];
                    load_a(tm_planes, t0, from, a);
                    load_b_trans(rows, d0, from, b);
                    multiply<DEEP, DEEP>(by_tm[i], a, b);
                }
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const int t = row_of_element(t0, j), d = column + column_of_element(d0, j);
                    if (t >= len || d >= dk) continue;
                    float2* const to = reinterpret_cast<float2*>(dk_out + t * dk + d);
                    float2 out = *to;
                    out.x += c[i][j / 4][j % 4] + end_decay[t] * by_tm[i][j / 4][j % 4];
                    out.y += c[i][j / 4][j % 4 + 1] + end_decay[t] * by_tm[i][j / 4][j % 4 + 1];
                    *to = out;
                }
            });
        }
    }

    // 5. Delta rule: from N and E to dA (in ov) and dL (in kk's place), pairs.
    if constexpr (DELTA) {
        float* const start_sums = sums;                       // [BLOCKS][C] each
        float* const end_sums = sums + BLOCKS * C;
        float* const beta_columns = sums + 2 * BLOCKS * C;
        float* const beta_rows = sums + 3 * BLOCKS * C;
        __syncthreads();
        const Tile<DEEP> square = Tile<DEEP>::at(rows.data, C, C);
        const auto put_square = [&](const Tile<DEEP>& tile, const float (&c)[2][4], int t0, int s0, bool by_beta) {
            each_pair(c, [&](int r, int n, float x0, float x1) {
                const int s = s0 + n;
                put2(tile, t0 + r, s, by_beta ? x0 * beta[s] : x0, by_beta ? x1 * beta[s + 1] : x1);
            });
        };
        each_block([&](int i, int t0, int s0) {
            float by_column[2][4], by_row[2][4];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = row_of_element(t0, j), s = column_of_element(s0, j);
                const float keep = s <= t ? 1.0f : 0.0f, start = start_decay[s] * k_factor[s];
                float& of_u = u_matrix[i][j / 4][j % 4];
                float& of_w = u_w[i][j / 4][j % 4];
                float& of_z = z[i][j / 4][j % 4];
                of_u *= keep * start, of_w *= keep * start, of_z *= keep * end_decay[t] * k_factor[t];
                const float by = get(tm_planes, t, s) * beta[s];
                by_column[j / 4][j % 4] = by * of_w - intra[i][j / 4][j % 4] * of_u;
                by_row[j / 4][j % 4] = by * of_z;
                ov[i][j / 4][j % 4] -= of_u;  // N
                of_z += of_w;
            }
            column_sums(by_column, start_sums + t0 / 16 * C + s0);
            row_sums(by_row, end_sums + s0 / 16 * C + t0);
            put_square(square, ov[i], t0, s0, false);
        });
        // Blocks above the diagonal are never read.
        __syncthreads();
        each_block([&](int i, int t0, int s0) {
            for (int from = t0; from < C; from += 16) {
                uint32_t a[DEEP][4], b[DEEP][4];
                load_a_trans(a_planes, t0, from, a);
                load_b_trans(square, s0, from, b);
                multiply<DEEP, DEEP>(z[i], a, b);
            }
            float by_column[2][4];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = row_of_element(t0, j), s = column_of_element(s0, j);
                float& of_e = z[i][j / 4][j % 4];
                by_column[j / 4][j % 4] = s <= t ? get(tm_planes, t, s) * of_e : 0.0f;
                if (s >= t) of_e = 0;  // of dTm the lower triangle without diagonal has a part in dL
            }
            column_sums(by_column, beta_columns + t0 / 16 * C + s0);
            put_square(p_planes, z[i], t0, s0, false);
        });
        __syncthreads();
        each_block([&](int i, int t0, int s0) { put_square(square, ov[i], t0, s0, true); });
        __syncthreads();
        each_block([&](int i, int t0, int s0) {
            clear(ov[i]), clear(z[i]);
            for (int from = 0; from <= s0; from += 16) {
                uint32_t a[DEEP][4], b[DEEP][4];
                load_a(square, t0, from, a);
                load_b(tm_planes, s0, from, b);
                multiply<DEEP, DEEP>(ov[i], a, b);
            }
            for (int from = t0; from < C; from += 16) {
                uint32_t a[DEEP][4], b[DEEP][4];
                load_a_trans(tm_planes, t0, from, a);
                load_b_trans(p_planes, s0, from, b);
                multiply<DEEP, DEEP>(z[i], a, b);
            }
        });
        __syncthreads();
        each_block([&](int i, int t0, int s0) { put_square(square, z[i], t0, s0, true); });
        __syncthreads();
        each_block([&](int i, int t0, int s0) {
            clear(z[i]);
            for (int from = 0; from <= s0; from += 16) {
                uint32_t a[DEEP][4], b[DEEP][4];
                load_a(square, t0, from, a);
                load_b(tm_planes, s0, from, b);
                multiply<DEEP, DEEP>(z[i], a, b);
            }
            float by_row[2][4];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int t = row_of_element(t0, j), s = column_of_element(s0, j);
                float& of_l = z[i][j / 4][j % 4];
                float& of_k = kk[i][j / 4][j % 4];
                of_l = s < t ? -of_l : 0.0f;
                by_row[j / 4][j % 4] = of_l * of_k;
                of_l *= beta[t];
                if (s > t) ov[i][j / 4][j % 4] = 0;
                pairs[t * PITCH + s] = ov[i][j / 4][j % 4] * qk[i][j / 4][j % 4] + of_l * of_k;
            }
            row_sums(by_row, beta_rows + s0 / 16 * C + t0);
        });
        __syncthreads();
    }

    // 6. The gradients of Q K^T and K K^T with both factors of qk_l2norm, and what they add to dQ and dK.
    each_block([&](int i, int t0, int s0) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int t = row_of_element(t0, j), s = column_of_element(s0, j);
            const float d = decay(t, s) * k_factor[s];
            ov[i][j / 4][j % 4] *= p.scale * q_factor[t] * d;
            if constexpr (DELTA) z[i][j / 4][j % 4] *= k_factor[t] * d;
        }
        each_pair(ov[i], [&](int r, int n, float x0, float x1) { put2(a_planes, t0 + r, s0 + n, x0, x1); });
        if constexpr (DELTA)
            each_pair(z[i], [&](int r, int n, float x0, float x1) { put2(tm_planes, t0 + r, s0 + n, x0, x1); });
    });
    if (thread < len) {
        // In f32: what a row has given up to every token.
        float before = 0;
        for (int s = 0; s < thread; s++) {
            before += pairs[thread * PITCH + s];
            pairs[thread * PITCH + s] = before;
        }
    }
    for (int column = 0; column < dk; column += SLICE) {
        __syncthreads();
        load_rows(queries, q_rows, key_stride, column, dk);
        load_rows(keys, k_rows, key_stride, column, dk);
        __syncthreads();
        each_wide([&](int i, int t0, int d0) {
            float by_keys[2][4], by_queries[2][4];
            clear(by_keys), clear(by_queries);
            for (int from = 0; from < C; from += 16) {
                uint32_t a[DEEP][4], b[PLANES][4];
                if (from <= t0) {
                    load_b_trans(keys, d0, from, b);
                    load_a(a_planes, t0, from, a);
                    multiply<DEEP, PLANES>(by_keys, a, b);
                    if constexpr (DELTA) {
                        load_a(tm_planes, t0, from, a);
                        multiply<DEEP, PLANES>(by_queries, a, b);
                    }
                }
                if (from >= t0) {
                    load_b_trans(queries, d0, from, b);
                    load_a_trans(a_planes, t0, from, a);
                    multiply<DEEP, PLANES>(by_queries, a, b);
                    if constexpr (DELTA) {
                        load_b_trans(keys, d0, from, b);
                        load_a_trans(tm_planes, t0, from, a);
                        multiply<DEEP, PLANES>(by_queries, a, b);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const int t = row_of_element(t0, j), d = column + column_of_element(d0, j);
                if (t >= len || d >= dk) continue;
                float2* const dq_to = reinterpret_cast<float2*>(dq_out + t * dk + d);
                float2* const dk_to = reinterpret_cast<float2*>(dk_out + t * dk + d);
                float2 of_q = *dq_to, of_k = *dk_to;
                const float q_norm = q_factor[t], k_norm = k_factor[t];
                of_q.x += by_keys[j / 4][j % 4] / q_norm, of_q.y += by_keys[j / 4][j % 4 + 1] / q_norm;
                of_k.x += by_queries[j / 4][j % 4] / k_norm, of_k.y += by_queries[j / 4][j % 4 + 1] / k_norm;
                *dq_to = of_q, *dk_to = of_k;
            }
        });
    }

    // 7. dg, dbeta.
    if (thread >= len) return;
    if constexpr (DELTA) {
        float x = 0;
        for (int block = thread / 16; block < BLOCKS; block++) x += sums[(2 * BLOCKS + block) * C + thread];
        for (int block = 0; block <= thread / 16; block++) x += sums[(3 * BLOCKS + block) * C + thread];
        p.dbeta[row.at(first + thread)] = x;
    }
    if (!p.dg) return;
    double x = total;
    for (int t = 0; t < len; t++) {
        double of_start = from_start[t], of_end = to_end[t];
        if constexpr (DELTA) {
            for (int block = t / 16; block < BLOCKS; block++) of_start += sums[block * C + t];
            for (int block = 0; block <= t / 16; block++) of_end += sums[(BLOCKS + block) * C + t];
        }
        x += t < thread ? of_end : of_start;
        if (t >= thread && thread > 0) x += pairs[t * PITCH + thread - 1];
    }
    p.dg[row.at(first + thread)] = static_cast<float>(x);
}

}  // namespace
}  // namespace dla

// Registers a thread (nvcc 13.0.88, no spills, no stack), sm_80 / 90a / 100 / 120: gated 106 to 124 / 111 to 128 / 124 to 142 /
// 122 to 142, delta bf16 242 / 246 / 255 / 255, f16 and f32 154 / 157 to 162 / 198 / 198.
#define PREPARE_BACKWARD(name, T, DELTA)                                                  \
    KERNEL BLOCK_OF(dla::THREADS) name(const __grid_constant__ dla::PrepareBackwardParams p) { \
        dla::prepare_backward<dla::T, DELTA>(p);                                          \
    }
PREPARE_BACKWARD(prepare_backward_gated_bf16, Bf16, false)
PREPARE_BACKWARD(prepare_backward_gated_f16, F16, false)
PREPARE_BACKWARD(prepare_backward_gated_f32, F32, false)
PREPARE_BACKWARD(prepare_backward_delta_bf16, Bf16, true)
PREPARE_BACKWARD(prepare_backward_delta_f16, F16, true)
PREPARE_BACKWARD(prepare_backward_delta_f32, F32, true)
