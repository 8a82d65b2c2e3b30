// Matrices in shared memory and the products of them that a warp makes.
//
// Every operand is a sum of `parts` bf16 planes, products accumulate in f32. One plane is a bf16 number
// itself. Two planes hold the upper 16 to 17 bits of an f32 (and an f16 exactly, without its narrow range);
// a product of two such operands leaves out low x low and so is good to about 2^-16. So bf16 inputs cost one
// mma a product, f16 and f32 three, and all share one code. Three planes hold an f32 whole: where what is left of a sum
// is far smaller than its terms.
#pragma once

#include "ptx.cuh"

namespace dla {

// The element types of q, k, v and o. PARTS: planes of an operand; CHUNK: tokens worked on at once, fewer
// where operands are twice as large, so that either fits the 99 KiB of the smallest card.
struct Bf16 {
    static constexpr int PARTS = 1, CHUNK = 64;
    uint16_t bits;
};
struct F16 {
    static constexpr int PARTS = 2, CHUNK = 32;
    uint16_t bits;
};
struct F32 {
    static constexpr int PARTS = 2, CHUNK = 32;
    float value;
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

DEVICE int padded(int width) { return (width + 15) / 16 * 16; }
DEVICE int lane_index() { return threadIdx.x % 32; }
DEVICE int warp_index() { return threadIdx.x / 32; }

DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Eight elements, 16-byte loads.
DEVICE void load8(const Bf16* from, float (&x)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = low_bf16(pairs[i]), x[2 * i + 1] = high_bf16(pairs[i]);
}
DEVICE void load8(const F16* from, float (&x)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = f16_to_f32(static_cast<uint16_t>(pairs[i]));
        x[2 * i + 1] = f16_to_f32(static_cast<uint16_t>(pairs[i] >> 16));
    }
}
DEVICE void load8(const F32* from, float (&x)[8]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// One element; two.
DEVICE float load1(const Bf16* from) { return __uint_as_float(static_cast<uint32_t>(from->bits) << 16); }
DEVICE float load1(const F16* from) { return f16_to_f32(from->bits); }
DEVICE float load1(const F32* from) { return from->value; }
DEVICE void load2(const Bf16* from, float& x0, float& x1) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
    x0 = low_bf16(pair), x1 = high_bf16(pair);
}
DEVICE void load2(const F16* from, float& x0, float& x1) {
    x0 = f16_to_f32(from[0].bits), x1 = f16_to_f32(from[1].bits);
}
DEVICE void load2(const F32* from, float& x0, float& x1) { x0 = from[0].value, x1 = from[1].value; }

// Eight elements, rounded once.
DEVICE void store8(Bf16* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                                               pack_bf16(x[6], x[7]));
}
DEVICE void store8(F16* to, const float (&x)[8]) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = f32_to_f16(x[2 * i]) | static_cast<uint32_t>(f32_to_f16(x[2 * i + 1])) << 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
DEVICE void store8(F32* to, const float (&x)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// A pair of numbers as planes.
template <int PARTS>
DEVICE void split(float x0, float x1, uint32_t (&planes)[PARTS]) {
    planes[0] = pack_bf16(x0, x1);
    if constexpr (PARTS >= 2) {
        const float y0 = x0 - low_bf16(planes[0]), y1 = x1 - high_bf16(planes[0]);
        planes[1] = pack_bf16(y0, y1);
        if constexpr (PARTS == 3) planes[2] = pack_bf16(y0 - low_bf16(planes[1]), y1 - high_bf16(planes[1]));
    }
}

// A matrix in shared memory. Rows are 16-byte aligned; 8 elements beyond a multiple of 16 keep the eight rows
// of an ldmatrix in different banks.
template <int PARTS>
struct Tile {
    uint16_t* data;
    int stride;  // elements from row to row
    int plane;   // elements from plane to plane

    DEVICE Tile at(uint16_t* data, int rows, int width) { return {data, width + 8, rows * (width + 8)}; }
    DEVICE int elements(int rows, int width) { return PARTS * rows * (width + 8); }
};

template <int PARTS>
DEVICE void put2(const Tile<PARTS>& tile, int row, int column, float x0, float x1) {
    uint32_t planes[PARTS];
    split<PARTS>(x0, x1, planes);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        *reinterpret_cast<uint32_t*>(tile.data + part * tile.plane + row * tile.stride + column) = planes[part];
}

template <int PARTS>
DEVICE void put8(const Tile<PARTS>& tile, int row, int column, const float (&x)[8]) {
    uint32_t planes[4][PARTS];
#pragma unroll
    for (int i = 0; i < 4; i++) split<PARTS>(x[2 * i], x[2 * i + 1], planes[i]);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        *reinterpret_cast<uint4*>(tile.data + part * tile.plane + row * tile.stride + column) =
            make_uint4(planes[0][part], planes[1][part], planes[2][part], planes[3][part]);
}

template <int PARTS>
DEVICE float get(const Tile<PARTS>& tile, int row, int column) {
    float x = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        x += __uint_as_float(static_cast<uint32_t>(tile.data[part * tile.plane + row * tile.stride + column]) << 16);
    return x;
}

// The 16 x 16 left operand at (row, k) of a matrix stored [m][k].
template <int PARTS>
DEVICE void load_a(const Tile<PARTS>& tile, int row, int k, uint32_t (&a)[PARTS][4]) {
    const int lane = lane_index();
    const uint16_t* from = tile.data + (row + lane % 16) * tile.stride + k + lane / 16 * 8;
#pragma unroll
    for (int part = 0; part < PARTS; part++) ldmatrix_x4(a[part], from + part * tile.plane);
}

// The same of a matrix stored [k][m].
template <int PARTS>
DEVICE void load_a_trans(const Tile<PARTS>& tile, int row, int k, uint32_t (&a)[PARTS][4]) {
    const int lane = lane_index();
    const uint16_t* from = tile.data + (k + lane % 8 + lane / 16 * 8) * tile.stride + row + lane / 8 % 2 * 8;
#pragma unroll
    for (int part = 0; part < PARTS; part++) ldmatrix_x4_trans(a[part], from + part * tile.plane);
}

// The 16 x 16 right operand at (k, column) of a matrix stored [n][k]: b[part][0..1] are the fragments of the
// first eight columns, b[part][2..3] of the others.
template <int PARTS>
DEVICE void load_b(const Tile<PARTS>& tile, int column, int k, uint32_t (&b)[PARTS][4]) {
    const int lane = lane_index();
    const uint16_t* from = tile.data + (column + lane % 8 + lane / 16 * 8) * tile.stride + k + lane / 8 % 2 * 8;
#pragma unroll
    for (int part = 0; part < PARTS; part++) ldmatrix_x4(b[part], from + part * tile.plane);
}

// The same of a matrix stored [k][n].
template <int PARTS>
DEVICE void load_b_trans(const Tile<PARTS>& tile, int column, int k, uint32_t (&b)[PARTS][4]) {
    const int lane = lane_index();
    const uint16_t* from = tile.data + (k + lane % 16) * tile.stride + column + lane / 16 * 8;
#pragma unroll
    for (int part = 0; part < PARTS; part++) ldmatrix_x4_trans(b[part], from + part * tile.plane);
}

// C [16, 16] += A B, low parts first; c[0] the first eight columns, c[1] the others.
template <int PA, int PB>
DEVICE void multiply(float (&c)[2][4], const uint32_t (&a)[PA][4], const uint32_t (&b)[PB][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if constexpr (PA == 3) mma_bf16(c[half], a[2], b[0][2 * half], b[0][2 * half + 1]);
        if constexpr (PB == 3) mma_bf16(c[half], a[0], b[2][2 * half], b[2][2 * half + 1]);
        if constexpr (PA >= 2 && PB >= 2 && PA + PB > 4) mma_bf16(c[half], a[1], b[1][2 * half], b[1][2 * half + 1]);
        if constexpr (PA >= 2) mma_bf16(c[half], a[1], b[0][2 * half], b[0][2 * half + 1]);
        if constexpr (PB >= 2) mma_bf16(c[half], a[0], b[1][2 * half], b[1][2 * half + 1]);
        mma_bf16(c[half], a[0], b[0][2 * half], b[0][2 * half + 1]);
    }
}

DEVICE void clear(float (&c)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[half][i] = 0;
}

// Calls f(row, column, x0, x1) for the two neighbours of every fragment row of a 16 x 16 product.
template <typename F>
DEVICE void each_pair(const float (&c)[2][4], F f) {
    const int g = lane_index() / 4, c2 = lane_index() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        f(g, half * 8 + c2, c[half][0], c[half][1]);
        f(g + 8, half * 8 + c2, c[half][2], c[half][3]);
    }
}

// Sums over a warp; every lane gets the same bits.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(ALL, x, by);
    return x;
}

// Cuts dynamic shared memory into arrays, each 16-byte aligned.
struct Carve {
    unsigned char* next;
    template <typename X>
    METHOD X* take(int count) {
        X* array = reinterpret_cast<X*>(next);
        next += (count * static_cast<int>(sizeof(X)) + 15) / 16 * 16;
        return array;
    }
    template <int PARTS>
    METHOD Tile<PARTS> tile(int rows, int width) {
        return Tile<PARTS>::at(take<uint16_t>(Tile<PARTS>::elements(rows, width)), rows, width);
    }
    // The launch must have given what was taken.
    METHOD void check() const {
        if (next > dynamic_shared() + dynamic_shared_bytes()) trap();
    }
};

}  // namespace dla
