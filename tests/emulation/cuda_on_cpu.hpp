// Just enough of CUDA to run the kernels of this crate on a CPU, block by block: every thread of a block is
// a fiber, a warp's collectives and the block's barriers are where fibers wait for each other.
//
// What it catches: threads of a block (or lanes of a warp) that wait at different places or never come,
// writes past the block's shared memory, and, since that memory is filled with NaN patterns before every
// block, reads of what nobody wrote. What it cannot: races between warps (fibers run in one fixed order; or
// in the reverse of it, DLA_EMULATION_REVERSED=1), timing, memory spaces. Blocks run on as many threads as there are cores.
//
// C++20, no dependencies. Fragment layouts are those of the PTX ISA, mma.m16n8k16 and ldmatrix.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {

constexpr unsigned WARP = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK = 256 * 1024;
constexpr size_t GUARD = 4096;

// Where a fiber stands.
enum class State { Ready, AtBarrier, AtCollective, Waiting, Done };

struct Fiber {
    void* stack = nullptr;
#if defined(__x86_64__)
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
    State state = State::Done;
    int line = 0;
    unsigned thread = 0;
    const std::function<bool()>* over = nullptr;  // what it waits for, in State::Waiting
};

// What the lanes of a warp hand to each other.
struct Exchange {
    unsigned arrived = 0;
    int line = 0;
    uint64_t in[WARP];
    uint64_t out[WARP];
    uint32_t a[WARP][4], b[WARP][2];
    float c[WARP][4];
    const uint16_t* rows[WARP];
    uint32_t r[WARP][4];
    float* d[WARP];
};

// A barrier of some of a block's threads.
struct Group {
    unsigned arrived = 0, generation = 0;
};

struct Machine {
    Fiber fibers[MOST_THREADS];
    Exchange warps[MOST_THREADS / WARP];
    Group groups[16];
    Fiber* current = nullptr;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
    const std::function<void()>* kernel = nullptr;
    unsigned block_threads = 0;
    unsigned char* shared = nullptr;
    size_t shared_capacity = 0;
    uint32_t shared_bytes = 0;
    std::string error;
};

inline thread_local Machine machine;
inline thread_local dim3 thread_index, block_index, block_extent, grid_extent;

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack, and goes on on another.
__attribute__((noinline, naked)) inline void switch_stack(void** /*save*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

__attribute__((noinline)) inline void to_scheduler() {
    Machine& m = machine;
#if defined(__x86_64__)
    switch_stack(&m.current->sp, m.scheduler);
#else
    swapcontext(&m.current->context, &m.scheduler);
#endif
}

__attribute__((noinline)) inline void run_fiber(Fiber& fiber) {
    Machine& m = machine;
    m.current = &fiber;
    thread_index = {fiber.thread, 0, 0};
#if defined(__x86_64__)
    switch_stack(&m.scheduler, fiber.sp);
#else
    swapcontext(&m.scheduler, &fiber.context);
#endif
}

inline void fiber_main() {
    (*machine.kernel)();
    machine.current->state = State::Done;
    to_scheduler();
    abort();
}

inline void start_fiber(Fiber& fiber, unsigned thread) {
    if (!fiber.stack) {
        fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fiber.stack == MAP_FAILED) abort();
    }
    fiber.thread = thread;
    fiber.state = State::Ready;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(static_cast<unsigned char*>(fiber.stack) + STACK);
    *--top = nullptr;  // Where a return address would stand: the ABI's alignment at a function's entry.
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.sp = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack = {.ss_sp = fiber.stack, .ss_size = STACK};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

inline void fail(const std::string& what) {
    Machine& m = machine;
    if (m.error.empty()) {
        char place[96];
        snprintf(place, sizeof place, " (block %u, thread %u)", block_index.x, m.current ? m.current->thread : 0);
        m.error = what + place;
    }
}

inline void trap() {
    fail("trap");
    machine.current->state = State::Done;
    to_scheduler();
}

// __syncthreads.
inline void barrier(int line) {
    Fiber& fiber = *machine.current;
    fiber.state = State::AtBarrier;
    fiber.line = line;
    to_scheduler();
}

// Goes on once `over` is true.
inline void wait_until(int line, const std::function<bool()>& over) {
    Fiber& fiber = *machine.current;
    while (!over()) {
        fiber.over = &over;
        fiber.line = line;
        fiber.state = State::Waiting;
        to_scheduler();
    }
}

// A collective of the whole warp: every lane deposits, the last one works, all go on.
template <typename Deposit, typename Work>
inline void collective(int line, Deposit deposit, Work work) {
    Machine& m = machine;
    Fiber& fiber = *m.current;
    Exchange& warp = m.warps[fiber.thread / WARP];
    if (warp.arrived == 0) warp.line = line;
    if (warp.line != line) fail("lanes of a warp at different collectives, lines " + std::to_string(warp.line) +
                                " and " + std::to_string(line));
    deposit(warp, fiber.thread % WARP);
    fiber.line = line;
    if (++warp.arrived == WARP) {
        work(warp);
        warp.arrived = 0;
        const unsigned first = fiber.thread / WARP * WARP;
        for (unsigned lane = 0; lane < WARP; lane++) m.fibers[first + lane].state = State::Ready;
        return;
    }
    fiber.state = State::AtCollective;
    to_scheduler();
}

inline void run_block() {
    Machine& m = machine;
    static const bool reversed = getenv("DLA_EMULATION_REVERSED") != nullptr;
    const unsigned warps = m.block_threads / WARP;
    memset(m.shared, 0xff, m.shared_bytes + GUARD);
    for (unsigned thread = 0; thread < m.block_threads; thread++) start_fiber(m.fibers[thread], thread);
    for (unsigned warp = 0; warp < warps; warp++) m.warps[warp].arrived = 0;
    for (Group& group : m.groups) group = {};
    while (m.error.empty()) {
        bool progress = false;
        for (unsigned w = 0; w < warps; w++) {
            const unsigned warp = reversed ? warps - 1 - w : w;
            bool ran = true;
            while (ran && m.error.empty()) {
                ran = false;
                for (unsigned lane = 0; lane < WARP; lane++) {
                    Fiber& fiber = m.fibers[warp * WARP + lane];
                    if (fiber.state == State::Ready) {
                        run_fiber(fiber);
                        ran = progress = true;
                    }
                }
            }
        }
        if (!m.error.empty()) break;
        bool woken = false, asleep = false;
        for (unsigned thread = 0; thread < m.block_threads; thread++) {
            Fiber& fiber = m.fibers[thread];
            if (fiber.state != State::Waiting) continue;
            asleep = true;
            if ((*fiber.over)()) fiber.state = State::Ready, woken = true;
        }
        if (woken) continue;
        if (asleep) {
            for (unsigned thread = 0; thread < m.block_threads; thread++) {
                m.current = &m.fibers[thread];
                if (m.current->state == State::Waiting)
                    fail("a thread waits in vain, line " + std::to_string(m.current->line));
            }
            break;
        }
        unsigned done = 0, waiting = 0;
        int line = 0;
        for (unsigned thread = 0; thread < m.block_threads; thread++) {
            Fiber& fiber = m.fibers[thread];
            m.current = &fiber;
            if (fiber.state == State::Done) done++;
            if (fiber.state == State::AtCollective)
                fail("a lane waits at the collective of line " + std::to_string(fiber.line) +
                     " that others of its warp never reach");
            if (fiber.state == State::AtBarrier) {
                if (waiting++ == 0) line = fiber.line;
                if (fiber.line != line)
                    fail("threads wait at different barriers, lines " + std::to_string(line) + " and " +
                         std::to_string(fiber.line));
            }
        }
        if (done == m.block_threads) break;
        if (done > 0 && m.error.empty())
            fail("threads wait at the barrier of line " + std::to_string(line) + " that others have left past");
        if (!progress && m.error.empty()) fail("no thread can go on");
        for (unsigned thread = 0; thread < m.block_threads; thread++) m.fibers[thread].state = State::Ready;
    }
    for (size_t i = 0; i < GUARD; i++) {
        if (m.shared[m.shared_bytes + i] != 0xff) {
            fail("shared memory written " + std::to_string(i) + " bytes past its end");
            break;
        }
    }
}

// A grid's blocks, which any thread may take one by one.
struct Grid {
    const std::function<void()>* kernel;
    unsigned blocks, threads;
    uint32_t shared;
    std::atomic<unsigned> next{0};
    std::mutex guard;
    std::string error;
};

inline void run_blocks(Grid& grid) {
    Machine& m = machine;
    m.error.clear();
    if (m.shared_capacity < grid.shared + GUARD) {
        free(m.shared);
        m.shared_capacity = grid.shared + GUARD;
        m.shared = static_cast<unsigned char*>(aligned_alloc(1024, (m.shared_capacity + 1023) / 1024 * 1024));
    }
    m.shared_bytes = grid.shared;
    m.block_threads = grid.threads;
    m.kernel = grid.kernel;
    block_extent = {grid.threads, 1, 1};
    grid_extent = {grid.blocks, 1, 1};
    for (unsigned block; m.error.empty() && (block = grid.next++) < grid.blocks;) {
        block_index = {block, 0, 0};
        run_block();
    }
    if (m.error.empty()) return;
    grid.next = grid.blocks;
    const std::lock_guard lock(grid.guard);
    if (grid.error.empty()) grid.error = m.error;
}

// Threads that help with one grid at a time, one for every other core; DLA_EMULATION_THREADS=1: none.
struct Crew {
    std::mutex guard;
    std::condition_variable called, left;
    Grid* grid = nullptr;
    unsigned calls = 0, inside = 0;

    static Crew* of_process() {
        // Never destroyed: its threads wait on it to the end.
        static Crew* const crew = new Crew;
        return crew;
    }
    Crew() {
        const char* asked = getenv("DLA_EMULATION_THREADS");
        const unsigned threads = asked ? unsigned(atoi(asked)) : std::thread::hardware_concurrency();
        for (unsigned i = 1; i < std::min(threads, 16u); i++) std::thread([this] { help(); }).detach();
    }
    void help() {
        std::unique_lock lock(guard);
        for (unsigned seen = 0;; inside--, left.notify_all()) {
            called.wait(lock, [&] { return grid && calls != seen; });
            seen = calls;
            inside++;
            Grid& taken = *grid;
            lock.unlock();
            run_blocks(taken);
            lock.lock();
        }
    }
    // False: it is at another grid.
    bool run(Grid& all) {
        std::unique_lock lock(guard);
        if (grid || inside) return false;
        grid = &all;
        calls++;
        called.notify_all();
        lock.unlock();
        run_blocks(all);
        lock.lock();
        grid = nullptr;
        left.wait(lock, [&] { return inside == 0; });
        return true;
    }
};

// Runs a grid; returns what went wrong, empty if nothing did.
inline std::string launch(unsigned grid, unsigned block, uint32_t shared, const std::function<void()>& kernel) {
    if (block == 0 || block % WARP != 0 || block > MOST_THREADS) return "a block of " + std::to_string(block);
    if (shared > 232448) return "more shared memory than any GPU has: " + std::to_string(shared);
    Grid all{.kernel = &kernel, .blocks = grid, .threads = block, .shared = shared};
    if (grid < 2 || !Crew::of_process()->run(all)) run_blocks(all);
    return all.error;
}

inline unsigned char* dynamic_shared() { return machine.shared; }
inline uint32_t dynamic_shared_bytes() { return machine.shared_bytes; }

inline uint32_t shared_address(const void* of) { return static_cast<const unsigned char*>(of) - machine.shared; }
template <typename X>
inline X shared_at(uint32_t address) {
    if (address % sizeof(X) != 0 || address + sizeof(X) > machine.shared_bytes) fail("a load outside shared memory");
    X x;
    memcpy(&x, machine.shared + address % machine.shared_bytes, sizeof x);
    return x;
}
inline uint2 shared_uint2(uint32_t address) { return shared_at<uint2>(address); }
inline uint32_t shared_uint(uint32_t address) { return shared_at<uint32_t>(address); }
inline void shared_uint4_if(bool live, uint32_t address, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
    if (!live) return;
    const auto four = shared_at<uint4>(address);
    x = four.x, y = four.y, z = four.z, w = four.w;
}
inline void put_shared(uint32_t address, uint2 x) {
    if (address % 8 != 0 || address + 8 > machine.shared_bytes) return fail("a store outside shared memory");
    memcpy(machine.shared + address, &x, sizeof x);
}
inline int opaque(int x) { return x; }
inline float approximate_reciprocal(float) { return 0; }
inline uint4 load_once(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a load of 16 misaligned bytes");
    uint4 x;
    memcpy(&x, from, sizeof x);
    return x;
}
inline void prefetch(const void*) {}
inline void prefetch_span(const void* from, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes >> 20 != 0)
        fail("a prefetch that is not aligned, or of too much");
}
inline void publish(int32_t* flag) { *flag = 1; }
inline int is_published(const int32_t* flag) { return *flag; }
inline int32_t take_number(int32_t* count) { return (*count)++; }
inline uint32_t arrive(uint32_t* count) { return std::atomic_ref(*count)++; }
inline float quotient(float a, float b, float) { return a / b; }

inline float bf16_bits_to_f32(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline uint32_t f32_to_bf16_bits(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return f32_to_bf16_bits(low) | f32_to_bf16_bits(high) << 16; }

inline float f16_to_f32(uint16_t x) {
    const uint32_t sign = uint32_t(x >> 15) << 31, exponent = x >> 10 & 31, mantissa = x & 1023;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t f32_to_f16(float x) {
    const uint16_t sign = uint16_t(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
    const float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | uint16_t(nearbyintf(size * 0x1p24f));
    const uint32_t bits = std::bit_cast<uint32_t>(size);
    return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline void mma_bf16_at(int line, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const unsigned self = machine.current->thread % WARP;
    Exchange& mine = machine.warps[machine.current->thread / WARP];
    collective(
        line,
        [&](Exchange& warp, unsigned lane) {
            memcpy(warp.a[lane], a, sizeof a);
            memcpy(warp.c[lane], c, sizeof c);
            warp.b[lane][0] = b0, warp.b[lane][1] = b1;
        },
        [](Exchange& warp) {
            float A[16][16], B[16][8], C[16][8];
            for (unsigned lane = 0; lane < WARP; lane++) {
                const unsigned g = lane / 4, c2 = lane % 4 * 2;
                for (unsigned i = 0; i < 4; i++) {
                    const unsigned row = g + i % 2 * 8, k = c2 + i / 2 * 8;
                    A[row][k] = bf16_bits_to_f32(warp.a[lane][i] & 0xffff);
                    A[row][k + 1] = bf16_bits_to_f32(warp.a[lane][i] >> 16);
                }
                for (unsigned i = 0; i < 2; i++) {
                    B[c2 + i * 8][g] = bf16_bits_to_f32(warp.b[lane][i] & 0xffff);
                    B[c2 + i * 8 + 1][g] = bf16_bits_to_f32(warp.b[lane][i] >> 16);
                }
                C[g][c2] = warp.c[lane][0], C[g][c2 + 1] = warp.c[lane][1];
                C[g + 8][c2] = warp.c[lane][2], C[g + 8][c2 + 1] = warp.c[lane][3];
            }
            for (unsigned m = 0; m < 16; m++)
                for (unsigned k = 0; k < 16; k++)
                    for (unsigned n = 0; n < 8; n++) C[m][n] += A[m][k] * B[k][n];
            for (unsigned lane = 0; lane < WARP; lane++) {
                const unsigned g = lane / 4, c2 = lane % 4 * 2;
                warp.c[lane][0] = C[g][c2], warp.c[lane][1] = C[g][c2 + 1];
                warp.c[lane][2] = C[g + 8][c2], warp.c[lane][3] = C[g + 8][c2 + 1];
            }
        });
    memcpy(c, mine.c[self], sizeof c);
}

inline void ldmatrix_at(int line, uint32_t (&r)[4], const uint16_t* row, bool transposed) {
    const unsigned self = machine.current->thread % WARP;
    Exchange& mine = machine.warps[machine.current->thread / WARP];
    const auto at = reinterpret_cast<const unsigned char*>(row);
    if (at < machine.shared || at + 16 > machine.shared + machine.shared_bytes) {
        fail("ldmatrix outside shared memory, line " + std::to_string(line));
        row = reinterpret_cast<const uint16_t*>(machine.shared);
    }
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a misaligned row, line " + std::to_string(line));
    collective(
        line, [&](Exchange& warp, unsigned lane) { warp.rows[lane] = row; },
        [&](Exchange& warp) {
            for (unsigned lane = 0; lane < WARP; lane++) {
                const unsigned g = lane / 4, c2 = lane % 4 * 2;
                for (unsigned i = 0; i < 4; i++) {
                    const uint16_t* const* rows = warp.rows + i * 8;
                    const uint32_t low = transposed ? rows[c2][g] : rows[g][c2];
                    const uint32_t high = transposed ? rows[c2 + 1][g] : rows[g][c2 + 1];
                    warp.r[lane][i] = low | high << 16;
                }
            }
        });
    memcpy(r, mine.r[self], sizeof r);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16_at(-1, c, a, b0, b1);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const uint16_t* row) { ldmatrix_at(-2, r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const uint16_t* row) { ldmatrix_at(-3, r, row, true); }

inline uint32_t transpose_8x8(uint32_t x) {
    const unsigned self = machine.current->thread % WARP;
    Exchange& mine = machine.warps[machine.current->thread / WARP];
    collective(
        -8, [&](Exchange& warp, unsigned lane) { warp.in[lane] = x; },
        [](Exchange& warp) {
            const auto at = [&](unsigned row, unsigned column) {
                return uint32_t(warp.in[row * 4 + column / 2] >> 16 * (column % 2) & 0xffff);
            };
            for (unsigned lane = 0; lane < WARP; lane++) {
                const unsigned row = lane / 4, column = lane % 4 * 2;
                warp.out[lane] = at(column, row) | at(column + 1, row) << 16;
            }
        });
    return uint32_t(mine.out[self]);
}

// An mbarrier: arrivals left and expected, and phases that have ended.
struct Phases {
    uint16_t left, expected;
    uint32_t ended;
};
static_assert(sizeof(Phases) == 8);

inline void barrier_init(uint64_t* barrier, uint32_t count) {
    *barrier = std::bit_cast<uint64_t>(Phases{uint16_t(count), uint16_t(count), 0});
}
inline void fence_barriers() {}
inline void barrier_arrive(uint64_t* barrier) {
    auto phases = std::bit_cast<Phases>(*barrier);
    if (--phases.left == 0) phases.left = phases.expected, phases.ended++;
    *barrier = std::bit_cast<uint64_t>(phases);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    wait_until(-4, [=] { return (std::bit_cast<Phases>(*barrier).ended & 1) != parity; });
}
inline void copy_async_16(void* to, const void* from, bool live) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (live && reinterpret_cast<uintptr_t>(from) % 16 != 0))
        fail("a copy that is not aligned");
    if (live) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
inline void copy_async_4(void* to, const void* from, bool live = true) {
    if (live) memcpy(to, from, 4);
    else memset(to, 0, 4);
}
inline void copy_async_8(void* to, const void* from, bool live) {
    if (reinterpret_cast<uintptr_t>(to) % 8 != 0 || (live && reinterpret_cast<uintptr_t>(from) % 8 != 0))
        fail("a copy that is not aligned");
    if (live) memcpy(to, from, 8);
    else memset(to, 0, 8);
}
inline float exp_approx(float x) { return expf(x); }
inline uint32_t sign_masks(uint32_t x) { return (x & 0x80 ? 0xffffu : 0) | (x & 0x8000 ? 0xffff0000u : 0); }
inline float exp2_approx(float x) { return exp2f(x); }
inline void copies_wait() {}
inline void copies_commit() {}
template <int N>
inline void copies_wait_but() {}
inline void copies_arrive(uint64_t* barrier) { barrier_arrive(barrier); }
// Its bytes have come when it returns, so the phase has only the arrivals to wait for.
inline void barrier_expect(uint64_t* barrier, uint32_t) { barrier_arrive(barrier); }
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t*) {
    const auto at = static_cast<unsigned char*>(to);
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
        fail("a bulk copy that is not aligned");
    if (at < machine.shared || at + bytes > machine.shared + machine.shared_bytes) return fail("a bulk copy outside shared memory");
    memcpy(to, from, bytes);
}
inline void prefetch_bulk(const void*, uint32_t) {}
inline void prefetch_line(const void*) {}
inline void stmatrix_x4_trans(uint16_t* row, const uint32_t (&r)[4]) {
    const auto at = reinterpret_cast<unsigned char*>(row);
    if (at < machine.shared || at + 16 > machine.shared + machine.shared_bytes || reinterpret_cast<uintptr_t>(row) % 16 != 0)
        return fail("stmatrix outside shared memory or misaligned");
    collective(
        -7,
        [&](Exchange& warp, unsigned lane) {
            warp.rows[lane] = row;
            memcpy(warp.r[lane], r, sizeof r);
        },
        [](Exchange& warp) {
            for (unsigned lane = 0; lane < WARP; lane++)
                for (unsigned i = 0; i < 4; i++)
                    for (unsigned n = 0; n < 2; n++)
                        const_cast<uint16_t*>(warp.rows[i * 8 + lane % 4 * 2 + n])[lane / 4] = uint16_t(warp.r[lane][i] >> 16 * n);
        });
}
inline void group_barrier(int id, int threads) {
    Group& group = machine.groups[id];
    const unsigned generation = group.generation;
    if (++group.arrived == unsigned(threads)) group.arrived = 0, group.generation++;
    else wait_until(-5, [&group, generation] { return group.generation != generation; });
}

// The warpgroup's product, a warp's 16 rows at a time and at once. Operands as wgmma_operand makes them: offset in
// shared memory and strides.
template <int>
inline void registers_fewer() {}
template <int>
inline void registers_more() {}
inline void fence_async() {}
inline int anew(int x) { return x; }
inline void keep_order() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {}
inline void wgmma_wait_first() {}
template <int>
inline void wgmma_wait_but() {}
template <size_t N>
inline void wgmma_hold(float (&)[N]) {}
inline uint64_t wgmma_operand(const void* at, uint32_t across, uint32_t down = 128) {
    const auto offset = static_cast<const unsigned char*>(at) - machine.shared;
    if (offset < 0 || offset % 16 != 0 || offset + 256 > machine.shared_bytes) fail("an operand outside shared memory");
    return uint64_t(offset / 16) | uint64_t(down / 16) << 16 | uint64_t(across / 16) << 32;
}
template <size_t REGISTERS>
inline void wgmma_of(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, int accumulate, bool nk) {
    constexpr unsigned N = REGISTERS * 2;
    collective(
        -6,
        [&](Exchange& warp, unsigned lane) {
            memcpy(warp.a[lane], a, sizeof a);
            warp.d[lane] = d;
        },
        [=](Exchange& warp) {
            static thread_local float A[16][16], B[16][N], D[16][N];
            for (unsigned lane = 0; lane < WARP; lane++) {
                const unsigned g = lane / 4, c2 = lane % 4 * 2;
                for (unsigned i = 0; i < 4; i++) {
                    const unsigned row = g + i % 2 * 8, k = c2 + i / 2 * 8;
                    A[row][k] = bf16_bits_to_f32(warp.a[lane][i] & 0xffff);
                    A[row][k + 1] = bf16_bits_to_f32(warp.a[lane][i] >> 16);
                }
            }
            const unsigned char* from = machine.shared + (b & 0x3fff) * 16;
            const size_t across = (b >> 32 & 0x3fff) * 16, down = (b >> 16 & 0x3fff) * 16;
            for (unsigned k = 0; k < 16; k++)
                for (unsigned n = 0; n < N; n++) {
                    uint16_t bits;
                    memcpy(&bits,
                           nk ? from + n / 8 * 128 + k / 8 * across + n % 8 * 16 + k % 8 * 2
                              : from + n / 8 * across + k / 8 * down + k % 8 * 16 + n % 8 * 2,
                           2);
                    B[k][n] = bf16_bits_to_f32(bits);
                }
            memset(D, 0, sizeof D);
            for (unsigned m = 0; m < 16; m++)
                for (unsigned k = 0; k < 16; k++)
                    for (unsigned n = 0; n < N; n++) D[m][n] += A[m][k] * B[k][n];
            for (unsigned lane = 0; lane < WARP; lane++)
                for (unsigned i = 0; i < REGISTERS; i++) {
                    const unsigned row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                    warp.d[lane][i] = D[row][column] + (accumulate ? warp.d[lane][i] : 0.0f);
                }
        });
}

template <size_t REGISTERS>
inline void wgmma_bf16(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    wgmma_of(d, a, b, accumulate, false);
}
template <size_t REGISTERS>
inline void wgmma_bf16_nk(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    wgmma_of(d, a, b, accumulate, true);
}
inline void wgmma_bf16_shared(float (&d)[4], uint64_t a, uint64_t b) {
    uint32_t left[4];
    const unsigned lane = machine.current->thread % WARP, first = machine.current->thread / WARP % 4 * 16;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned m = first + lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        const size_t along = (a >> 32 & 0x3fff) * 16;
        memcpy(left + i, machine.shared + (a & 0x3fff) * 16 + m / 8 * 128 + k / 8 * along + m % 8 * 16 + k % 8 * 2, 4);
    }
    wgmma_of(d, left, b, true, false);
}
inline uint64_t wgmma_operand_nk(const void* at, uint32_t along) { return wgmma_operand(at, along); }

// All lanes put a value in; lane l takes out what `pick` makes of them.
template <typename T, typename Pick>
inline T exchange(int line, uint32_t mask, T value, Pick pick) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffff) fail("a warp collective with a partial mask, line " + std::to_string(line));
    const unsigned self = machine.current->thread % WARP;
    Exchange& mine = machine.warps[machine.current->thread / WARP];
    collective(
        line,
        [&](Exchange& warp, unsigned lane) {
            warp.in[lane] = 0;
            memcpy(&warp.in[lane], &value, sizeof value);
        },
        [](Exchange& warp) { memcpy(warp.out, warp.in, sizeof warp.out); });
    // The next collective of the warp may write `in`, none writes `out` before every lane has come.
    return pick(mine.out, self);
}

template <typename T>
inline T taken(const uint64_t* values, unsigned lane) {
    T value;
    memcpy(&value, &values[lane], sizeof value);
    return value;
}

template <typename T>
inline T shuffle(int line, uint32_t mask, T value, unsigned from) {
    return exchange(line, mask, value, [=](const uint64_t* all, unsigned) { return taken<T>(all, from % WARP); });
}
template <typename T>
inline T shuffle_xor(int line, uint32_t mask, T value, unsigned by) {
    return exchange(line, mask, value, [=](const uint64_t* all, unsigned lane) { return taken<T>(all, lane ^ by); });
}
template <typename T>
inline T shuffle_up(int line, uint32_t mask, T value, unsigned by) {
    return exchange(line, mask, value,
                    [=](const uint64_t* all, unsigned lane) { return taken<T>(all, lane < by ? lane : lane - by); });
}
template <typename T>
inline T shuffle_down(int line, uint32_t mask, T value, unsigned by) {
    return exchange(line, mask, value, [=](const uint64_t* all, unsigned lane) {
        return taken<T>(all, lane + by < WARP ? lane + by : lane);
    });
}
inline uint32_t ballot(int line, uint32_t mask, bool value) {
    return exchange(line, mask, uint32_t(value), [](const uint64_t* all, unsigned) {
        uint32_t bits = 0;
        for (unsigned lane = 0; lane < WARP; lane++) bits |= uint32_t(all[lane] != 0) << lane;
        return bits;
    });
}
inline uint32_t least(int line, uint32_t mask, uint32_t value) {
    return exchange(line, mask, value, [](const uint64_t* all, unsigned) {
        uint64_t least = ~uint64_t(0);
        for (unsigned lane = 0; lane < WARP; lane++) least = all[lane] < least ? all[lane] : least;
        return uint32_t(least);
    });
}
inline uint32_t any_bits(int line, uint32_t mask, uint32_t value) {
    return exchange(line, mask, value, [](const uint64_t* all, unsigned) {
        uint64_t bits = 0;
        for (unsigned lane = 0; lane < WARP; lane++) bits |= all[lane];
        return uint32_t(bits);
    });
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_extent)
#define gridDim (emulation::grid_extent)
#define __syncthreads() emulation::barrier(__LINE__)
#define __syncwarp() ((void)emulation::exchange(__LINE__, 0xffffffff, 0u, [](const uint64_t*, unsigned) { return 0u; }))
#define __shfl_sync(mask, value, from) emulation::shuffle(__LINE__, mask, value, from)
#define __shfl_xor_sync(mask, value, by) emulation::shuffle_xor(__LINE__, mask, value, by)
#define __shfl_up_sync(mask, value, by) emulation::shuffle_up(__LINE__, mask, value, by)
#define __shfl_down_sync(mask, value, by) emulation::shuffle_down(__LINE__, mask, value, by)
#define __ballot_sync(mask, value) emulation::ballot(__LINE__, mask, value)
#define __any_sync(mask, value) (emulation::ballot(__LINE__, mask, value) != 0)
#define __all_sync(mask, value) (emulation::ballot(__LINE__, mask, value) == 0xffffffffu)
#define __reduce_min_sync(mask, value) emulation::least(__LINE__, mask, value)
#define __reduce_or_sync(mask, value) emulation::any_bits(__LINE__, mask, value)

static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdividef(float a, float b) { return a / b; }
// A macro: the C library has a function of this name.
#define __expf(a) expf(a)
static inline double rsqrt(double a) { return 1.0 / sqrt(a); }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __uint2float_rn(uint32_t x) { return float(x); }
static inline uint32_t __float2uint_rn(float x) {
    if (!(x > 0.0f)) return 0;
    return x >= 4294967296.0f ? 0xffffffffu : uint32_t(nearbyintf(x));
}
static inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
static inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t pick) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> (pick >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return out;
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
static inline int __popc(uint32_t x) { return std::popcount(x); }
static inline int __popcll(uint64_t x) { return std::popcount(x); }
static inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
static inline int __ffsll(uint64_t x) { return x ? std::countr_zero(x) + 1 : 0; }
static inline int __clz(uint32_t x) { return std::countl_zero(x); }
