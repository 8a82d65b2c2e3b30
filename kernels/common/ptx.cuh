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

using emulation::copies_commit;
using emulation::copies_wait;
using emulation::copies_wait_but;
using emulation::copy_async_16;
using emulation::copy_async_4;
using emulation::dynamic_shared;
using emulation::dynamic_shared_bytes;
using emulation::arrive;
using emulation::exp2_approx;
using emulation::copy_async_8;
using emulation::exp_approx;
using emulation::f16_to_f32;
using emulation::f32_to_f16;
using emulation::ldmatrix_x4;
using emulation::ldmatrix_x4_trans;
using emulation::load_once;
using emulation::mma_bf16;
using emulation::opaque;
using emulation::pack_bf16;
DEVICE void part_barrier(int id, int threads) { emulation::group_barrier(id, threads); }
using emulation::prefetch;
using emulation::prefetch_span;
using emulation::take_number;
using emulation::publish;
using emulation::is_published;
using emulation::quotient;
using emulation::approximate_reciprocal;
using emulation::shared_address;
using emulation::put_shared;
DEVICE void move_if(bool live, uint32_t& to, uint32_t from) { to = live ? from : to; }
DEVICE void decrement_if(bool live, uint32_t& x) { x -= live; }
using emulation::shared_uint;
using emulation::sign_masks;
using emulation::shared_uint2;
using emulation::shared_uint4_if;
using emulation::transpose_8x8;
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
DEVICE float approximate_reciprocal(float b) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return y;
}
DEVICE float quotient(float a, float b, float approximate) {
    const float y = __fmaf_rn(approximate, __fmaf_rn(-b, approximate, 1.0f), approximate);
    const float q = __fmul_rn(a, y);
    return __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
}

// e^x to 2^-22 and 2^-23 |x|, 0 where it is below 2^-126.
DEVICE float exp_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
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
DEVICE uint32_t shared_uint(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}
// Loads where `live`, else leaves what is there.
DEVICE void shared_uint4_if(bool live, uint32_t address, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n @p ld.shared.v2.u32 {%0, %1}, [%4];\n"
        " @p ld.shared.v2.u32 {%2, %3}, [%4 + 8];\n}"
        : "+r"(x), "+r"(y), "+r"(z), "+r"(w)
        : "r"(address), "r"(static_cast<int>(live)));
}
// Each one instruction with a predicate.
DEVICE void move_if(bool live, uint32_t& to, uint32_t from) {
    asm("{\n .reg .pred p;\n setp.ne.s32 p, %2, 0;\n @p mov.b32 %0, %1;\n}" : "+r"(to) : "r"(from), "r"(static_cast<int>(live)));
}
DEVICE void decrement_if(bool live, uint32_t& x) {
    asm("{\n .reg .pred p;\n setp.ne.s32 p, %1, 0;\n @p sub.u32 %0, %0, 1;\n}" : "+r"(x) : "r"(static_cast<int>(live)));
}
DEVICE void put_shared(uint32_t address, uint2 x) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}

// Barrier `id` (1..15) of `threads` threads of the block.
DEVICE void part_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 16 bytes that are read once: they take no place in L1.
DEVICE uint4 load_once(const void* from) {
    uint4 x;
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(from));
    return x;
}
// Has the line of 128 bytes brought to L2.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// Asks for `bytes`, a multiple of 16 below 2^20, to be in L2 when they are wanted.
DEVICE void prefetch_span(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#else
#pragma unroll 1
    for (uint32_t i = 0; i < bytes; i += 128) prefetch(static_cast<const uint8_t*>(from) + i);
#endif
}
// Sets a flag in shared memory behind all that this warp has written there; whether it is set, before all that is read then.
DEVICE void publish(int32_t* flag) {
    asm volatile("st.release.cta.shared.s32 [%0], 1;" ::"r"(shared_address(flag)) : "memory");
}
// No fence, which would wait for loads that are in flight.
DEVICE int is_published(const int32_t* flag) {
    int set;
    asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(set) : "r"(shared_address(flag)) : "memory");
    return set;
}
// The next number of a count in shared memory, from 0 on.
DEVICE int take_number(int32_t* count) { return atomicAdd(count, 1); }
// Counts an arrival: how many came before. What this thread did before is done for those that come after.
DEVICE uint32_t arrive(uint32_t* count) {
    __threadfence();
    return atomicAdd(count, 1u);
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
// The same of 4 and of 8 bytes.
DEVICE void copy_async_4(void* to, const void* from, bool live = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 4 : 0)
                 : "memory");
}
DEVICE void copy_async_8(void* to, const void* from, bool live) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 8 : 0)
                 : "memory");
}
// Waits for the copies of this thread.
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Ends a group of this thread's copies; waits for all groups but the last N.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copies_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

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

// An 8 x 8 matrix of 16-bit elements transposed: lane l gives and receives elements (l / 4, 2 (l % 4)) and the one to its right.
DEVICE uint32_t transpose_8x8(uint32_t x) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
    return out;
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
