// All kernels as one shared library for tests/kernels_on_cpu.rs.
#include "../../kernels/segment.cu"
#if __has_include("../../kernels/prepare.cu")
#include "../../kernels/prepare.cu"
#endif
#if __has_include("../../kernels/route.cu")
#include "../../kernels/route.cu"
#endif
#if __has_include("../../kernels/scan.cu")
#include "../../kernels/scan.cu"
#endif

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
    RUN_DTYPES(segment);
#if __has_include("../../kernels/prepare.cu")
    RUN_DTYPES(prepare_gated);
    RUN_DTYPES(prepare_delta);
#endif
#if __has_include("../../kernels/route.cu")
    RUN_DTYPES(route_bank);
    RUN_DTYPES(route);
#endif
#if __has_include("../../kernels/scan.cu")
    RUN_DTYPES(scan_gated);
    RUN_DTYPES(scan_delta);
#endif
    snprintf(error, error_bytes, "%s: %s", name, wrong.c_str());
    return wrong.empty() ? 0 : 1;
}
