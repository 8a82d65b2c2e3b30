// One kernel file as a shared library: library.rs includes it in front of this one and defines FILE_ with its name, so
// that what nvcc compiles by itself is compiled by itself here.
#include <cstdio>
#include <cstring>
#include <string>

#ifdef FILE_slots
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
#endif

// Runs kernel `name` in blocks of `block` threads, 0: as many as it is listed with; with no parameters only looks for it
// and says how many bytes they take. 0, or 1 and what went wrong, or 2 where there is no such kernel.
extern "C" int dla_emulate(const char* name, unsigned grid, unsigned block, unsigned shared_bytes, const void* params,
                           size_t* params_bytes, char* error, size_t error_bytes) {
    bool found = false;
    std::string wrong;
    const auto run = [&]<typename P>(const char* kernel, void (*function)(P), unsigned threads = dla::THREADS) {
        if (found || strcmp(name, kernel) != 0 || (block != 0 && block != threads)) return;
        found = true;
        *params_bytes = sizeof(P);
        if (!params) return;
        P copy;
        memcpy(&copy, params, sizeof copy);
        wrong = emulation::launch(grid, threads, shared_bytes, [&] { function(copy); });
    };
#define RUN(kernel, ...) run(#kernel, kernel __VA_OPT__(, ) __VA_ARGS__)
#define RUN_OF(threads, kernel) RUN(kernel, threads)
#define RUN_DTYPES_OF(threads, stem) \
    RUN_OF(threads, stem##_bf16), RUN_OF(threads, stem##_f16), RUN_OF(threads, stem##_f32)
#define RUN_DTYPES(stem) RUN(stem##_bf16), RUN(stem##_f16), RUN(stem##_f32)
#if defined FILE_segment
    RUN_DTYPES_OF(dla::SEGMENT_THREADS, segment_gram);
    RUN_DTYPES_OF(dla::SEGMENT_THREADS, segment);
    // Blocks of several rows.
    for (unsigned rows = 2; rows <= dla::SEGMENT_ROWS; rows++) RUN_DTYPES_OF(rows * dla::SEGMENT_THREADS, segment);
    run("segment_rows_bf16", segment_bf16, dla::SEGMENT_ROWS * dla::SEGMENT_THREADS);
    run("segment_rows_f16", segment_f16, dla::SEGMENT_ROWS * dla::SEGMENT_THREADS);
    run("segment_rows_f32", segment_f32, dla::SEGMENT_ROWS * dla::SEGMENT_THREADS);
#elif defined FILE_prepare
    RUN_DTYPES(prepare_gated);
    RUN_DTYPES(prepare_delta);
#elif defined FILE_route
    RUN_DTYPES(route_sums);
    RUN_DTYPES(route_bases);
    RUN_DTYPES(route);
#elif defined FILE_scan
    RUN_DTYPES(scan_gated);
    RUN_DTYPES(scan_delta);
#elif defined FILE_step
    RUN(step_gated_bf16_1), RUN(step_gated_bf16_4), RUN(step_gated_bf16_8);
    RUN(step_gated_f32_1), RUN(step_gated_f32_4), RUN(step_gated_f32_8);
    RUN(step_delta_bf16_1), RUN(step_delta_bf16_4), RUN(step_delta_bf16_8);
    RUN(step_delta_f32_1), RUN(step_delta_f32_4), RUN(step_delta_f32_8);
    RUN(step_gated_bf16_1_early), RUN(step_gated_f32_1_early);
    RUN(step_gather_gated_bf16), RUN(step_gather_gated_f32), RUN(step_gather_delta_bf16), RUN(step_gather_delta_f32);
    RUN(step_scatter_bf16), RUN(step_scatter_f32);
#elif defined FILE_slots
    RUN(wrong_barrier), RUN(wrong_collective), RUN(wrong_write), RUN(wrong_launch);
    RUN(slots_maps), RUN(slots, 32);
#elif defined FILE_scan_backward
    RUN_DTYPES(scan_states_gated);
    RUN_DTYPES(scan_states_delta);
    RUN_DTYPES(scan_backward_gated);
    RUN_DTYPES(scan_backward_delta);
#elif defined FILE_prepare_backward
    RUN_DTYPES(prepare_backward_gated);
    RUN_DTYPES(prepare_backward_delta);
#elif defined FILE_group_sum
    RUN_DTYPES(group_sum);
    RUN(head_sums);
#elif defined FILE_route_backward
    RUN_DTYPES(route_backward);
    RUN_DTYPES(route_backward_keys);
#elif defined FILE_segment_backward
    RUN_DTYPES(drift_backward);
    RUN_DTYPES(segment_states);
    RUN_DTYPES(segment_scalars);
    RUN_DTYPES(segment_open_backward);
    RUN_DTYPES(segment_backward);
    RUN_DTYPES(segment_log_backward);
#elif defined FILE_prepare_sm90
    RUN(gammas_sm90, dla::GAMMAS_THREADS);
    RUN(prepare_sm90_bf16), RUN(prepare_queries_sm90_bf16);
#elif defined FILE_scan_sm90
    RUN(scan_sm90_64_16_2, 512), RUN(scan_sm90_64_30_2, 512), RUN(scan_sm90_64_32_2, 512), RUN(scan_sm90_64_64_1, 384);
    RUN(scan_sm90_128_16_2, 512), RUN(scan_sm90_128_30_1, 384), RUN(scan_sm90_128_30_2, 512);
    RUN(scan_sm90_128_32_1, 384), RUN(scan_sm90_128_64_1, 384);
    RUN(scan_sm90_256_16_1, 384);
    RUN(scan_queries_sm90_64_16_2, 512), RUN(scan_queries_sm90_64_32_2, 512), RUN(scan_queries_sm90_128_16_2, 512);
    RUN(scan_queries_sm90_128_30_1, 384), RUN(scan_queries_sm90_128_30_2, 512), RUN(scan_queries_sm90_128_32_1, 384);
    RUN(scan_states_sm90_64_16_2, 384), RUN(scan_states_sm90_64_32_2, 384), RUN(scan_states_sm90_128_16_2, 384);
    RUN(scan_states_sm90_128_30_1, 256), RUN(scan_states_sm90_128_30_2, 384), RUN(scan_states_sm90_128_32_1, 256);
#elif defined FILE_prepare_delta_sm90
    RUN(prepare_delta_sm90_64), RUN(prepare_delta_sm90_128);
#elif defined FILE_scan_delta_sm90
    RUN(scan_delta_sm90_64_16, 384), RUN(scan_delta_sm90_64_32, 384);
    RUN(scan_delta_sm90_128_16, 384), RUN(scan_delta_sm90_128_32, 384);
#elif defined FILE_prepare_backward_sm90
    RUN(prepare_backward_sm90_bf16);
#elif defined FILE_scan_backward_sm90
    RUN(scan_backward_sm90_64_16, 384), RUN(scan_backward_sm90_64_32, 384);
    RUN(scan_backward_sm90_128_16, 384), RUN(scan_backward_sm90_128_32, 384);
#elif defined FILE_lambda_backward_sm90
    RUN(lambda_backward_sm90);
#elif defined FILE_g_backward_sm90
    RUN(anchors_sm90), RUN(end_anchors_sm90), RUN(g_flow_sm90), RUN(g_backward_sm90);
#else
#error "a kernel file that has no list here"
#endif
    snprintf(error, error_bytes, "%s: %s", name, found ? wrong.c_str() : "no such kernel, or not of so many threads");
    return found ? !wrong.empty() : 2;
}
