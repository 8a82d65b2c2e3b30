// The only inline PTX. Everything here is a small named function; under DLA_ON_CPU (tests/emulation) the
// same names have host bodies, and nothing else of the kernels knows where it runs.
#pragma once

#include <stdint.h>

#ifdef DLA_ON_CPU
#include "cuda_on_cpu.hpp"
#define DEVICE static inline
#define METHOD inline
#define KERNEL extern "C" void
#define BLOCK_OF(threads)
#define BLOCKS_OF(threads, blocks)
#else
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define BLOCK_OF(threads) __launch_bounds__(threads, 1)
#define BLOCKS_OF(threads, blocks) __launch_bounds__(threads, blocks)
#endif

namespace dla {

#ifdef DLA_ON_CPU

using emulation::copies_wait;
using emulation::copy_async_16;
using emulation::copy_async_4;
using emulation::dynamic_shared;
using emulation::dynamic_shared_bytes;
using emulation::exp2_approx;
using emulation::f16_to_f32;
using emulation::f32_to_f16;
using emulation::ldmatrix_x4;
using emulation::ldmatrix_x4_trans;
using emulation::mma_bf16;
using emulation::opaque;
using emulation::pack_bf16;
using emulation::quotient;
using emulation::reciprocal;
using emulation::shared_address;
using emulation::sign_masks;
using emulation::shared_uint2;
using emulation::trap;

#else

// The block's dynamic shared memory.
DEVICE unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    return shared_memory;
}

// Bytes that the launch gave the block.
DEVICE uint32_t dynamic_shared_bytes() {
    uint32_t bytes;
    asm volatile("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// The IEEE quotient of two integers below 2^32 in f32, the divisor not 0, in two parts: the instructions of
// __fdiv_rn without its look for operands out of range and the branch (nvcc 13.0.88, SASS compared).
DEVICE float reciprocal(float b) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
}
DEVICE float quotient(float a, float b, float reciprocal_of_b) {
    const float q = __fmul_rn(a, reciprocal_of_b);
    return __fmaf_rn(reciprocal_of_b, __fmaf_rn(-b, q, a), q);
}

// x, of which the compiler knows nothing: what is computed from it is not moved out of a loop.
DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Where `of` lies in shared memory, in 32 bits, and what lies there: written before the last barrier of warp or block.
DEVICE uint32_t shared_address(const void* of) { return static_cast<uint32_t>(__cvta_generic_to_shared(of)); }
DEVICE uint2 shared_uint2(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
}

// 0xffff where byte 0 is negative, 0xffff0000 where byte 1 is.
DEVICE uint32_t sign_masks(uint32_t x) {
    uint32_t masks;
    asm("prmt.b32 %0, %1, %1, 0x9988;" : "=r"(masks) : "r"(x));
    return masks;
}

DEVICE void trap() { asm volatile("trap;"); }

// Copies 16 bytes to shared memory, zeros where not `live`.
DEVICE void copy_async_16(void* to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 16 : 0)
                 : "memory");
}
// Copies 4 bytes.
DEVICE void copy_async_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Waits for the copies of this thread.
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two f32 rounded to nearest even, `low` in the low half.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// 2^x within 2 units of the last place (PTX ISA, ex2.approx); below 2^-126 zero.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float f16_to_f32(uint16_t x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
    return out;
}

DEVICE uint16_t f32_to_f16(float x) {
    uint16_t out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and
// receives, of each matrix, elements (l / 4, 2 (l % 4)) and the one to its right.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const uint16_t* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same of the transposed matrices.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const uint16_t* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// C [16, 8] += A [16, 16] B [16, 8], f32 accumulation. With g = lane / 4, c = lane % 4: a[0] holds
// A(g, 2c..), a[1] A(g + 8, 2c..), a[2] A(g, 2c + 8..), a[3] A(g + 8, 2c + 8..); b0 holds B(2c.., g), b1
// B(2c + 8.., g); c[0..1] C(g, 2c..), c[2..3] C(g + 8, 2c..).
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace dla
