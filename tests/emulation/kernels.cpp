// All kernels as one shared library for tests/kernels_on_cpu.rs.
#include "../../kernels/segment.cu"
#include "../../kernels/prepare.cu"
#include "../../kernels/route.cu"
#include "../../kernels/scan.cu"

// What the emulator must catch.
struct NoParams {};
static void wrong_barrier(NoParams) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads(), __syncthreads();
}
static void wrong_collective(NoParams) {
    if (threadIdx.x != 7) __shfl_sync(0xffffffffu, 1.0f, 0);
}
static void wrong_write(NoParams) { dla::dynamic_shared()[dla::dynamic_shared_bytes() + threadIdx.x % 2] = 1; }
static void wrong_launch(NoParams) {
    dla::Carve carve{dla::dynamic_shared()};
    carve.take<float>(1000);
    carve.check();
}

// Runs kernel `name`; 0, or 1 and what went wrong.
extern "C" int dla_emulate(const char* name, unsigned grid, unsigned shared_bytes, const void* params, char* error,
                           size_t error_bytes) {
    std::string wrong = "no such kernel";
    const auto run = [&]<typename P>(const char* kernel, void (*function)(P)) {
        if (strcmp(name, kernel) != 0) return;
        P copy;
        memcpy(&copy, params, sizeof copy);
        wrong = emulation::launch(grid, dla::THREADS, shared_bytes, [&] { function(copy); });
    };
#define RUN(kernel) run(#kernel, kernel)
#define RUN_DTYPES(stem) RUN(stem##_bf16), RUN(stem##_f16), RUN(stem##_f32)
    RUN(wrong_barrier), RUN(wrong_collective), RUN(wrong_write), RUN(wrong_launch);
    RUN_DTYPES(segment);
    RUN_DTYPES(prepare_gated);
    RUN_DTYPES(prepare_delta);
    RUN_DTYPES(route_sums);
    RUN_DTYPES(route_bases);
    RUN_DTYPES(route);
    RUN_DTYPES(scan_gated);
    RUN_DTYPES(scan_delta);
    snprintf(error, error_bytes, "%s: %s", name, wrong.c_str());
    return wrong.empty() ? 0 : 1;
}
