/* Forward, backward and decoding from C, on the CPU. Checks what it computes, and exits with 1 where it is wrong.
 *
 * cargo build --release -p dla-capi
 * cc examples/c/dla.c -Iinclude -Ltarget/release -ldla_capi -lm -o dla_c && LD_LIBRARY_PATH=target/release ./dla_c
 */
#include "dla.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 1, T = 96, H = 2, D = 16, M = 4 };

static void must(dla_status status) {
  if (status != DLA_STATUS_OK) {
    fprintf(stderr, "%s\n", dla_error_message());
    exit(1);
  }
}

static dla_buffer floats(float *x, size_t count) {
  dla_buffer buffer = {x, count * sizeof *x};
  return buffer;
}

/* Uniform in [-1, 1), the same at every run. */
static float uniform(void) {
  static uint32_t x = 1;
  x = x * 1664525u + 1013904223u;
  return (float)(x >> 8) / 8388608.0f - 1.0f;
}

int main(void) {
  static float q[B * T * H * D], k[B * T * H * D], v[B * T * H * D], g[B * T * H], lambda[B * T * H * M];
  static float o[B * T * H * D], dq[B * T * H * D], dk[B * T * H * D], dv[B * T * H * D], one[B * H * D];
  static uint8_t events[B * T * H];
  for (int i = 0; i < B * T * H * D; i++) q[i] = uniform(), k[i] = uniform(), v[i] = uniform();
  for (int i = 0; i < B * T * H; i++) g[i] = -0.05f;
  for (int i = 0; i < B * T * H * M; i++) lambda[i] = 1.0f + 0.5f * uniform();

  dla_options options;
  must(dla_options_init(&options, sizeof options));
  options.capacity = M;
  options.merge = DLA_MERGE_MASS;
  options.qk_l2norm = 1;

  /* What is zero is absent, or its default. */
  dla_call call;
  memset(&call, 0, sizeof call);
  call.size = sizeof call;
  call.dtype = DLA_DTYPE_F32;
  call.batch = B, call.time = T, call.heads = H, call.value_heads = H, call.dk = D, call.dv = D;
  call.q = floats(q, B * T * H * D);
  call.k = floats(k, B * T * H * D);
  call.v = floats(v, B * T * H * D);
  call.g = floats(g, B * T * H);
  call.lambda = floats(lambda, B * T * H * M);

  dla_results results;
  memset(&results, 0, sizeof results);
  results.size = sizeof results;
  results.o = floats(o, B * T * H * D);
  results.events.data = events, results.events.bytes = sizeof events;
  must(dla_forward(&options, &call, &results));

  /* The gradient of |o|^2 / 2. */
  dla_call replay = call;
  replay.events = results.events;
  dla_upstream upstream;
  memset(&upstream, 0, sizeof upstream);
  upstream.size = sizeof upstream;
  upstream.o = results.o;
  dla_gradients gradients;
  memset(&gradients, 0, sizeof gradients);
  gradients.size = sizeof gradients;
  gradients.q = floats(dq, B * T * H * D);
  gradients.k = floats(dk, B * T * H * D);
  gradients.v = floats(dv, B * T * H * D);
  must(dla_backward(&options, &replay, &upstream, &gradients));
  /* o is linear in v, so <v, dv> = <o, do> = |o|^2. */
  double given = 0.0, through = 0.0;
  for (int i = 0; i < B * T * H * D; i++) given += (double)o[i] * o[i], through += (double)v[i] * dv[i];
  if (!(fabs(given - through) <= 1e-4 * given)) {
    fprintf(stderr, "<v, dv> = %g, |o|^2 = %g\n", through, given);
    return 1;
  }

  /* The same tokens one at a time, the states in a cache that the library holds; and as a server does, in an entry, whose states
     are not moved. */
  dla_call token = call;
  token.time = 1;
  dla_cache *cache;
  dla_cache_arrays states;
  must(dla_cache_create(&options, &token, &cache));
  must(dla_cache_view(cache, &states));
  dla_results result;
  memset(&result, 0, sizeof result);
  result.size = sizeof result;
  result.o = floats(one, B * H * D);
  double difference = 0.0;
  dla_entries *entries;
  size_t entry;
  must(dla_entries_create(&options, &token, 4, DLA_STATE_DTYPE_F32, &entries));
  must(dla_entries_take(entries, &entry));
  for (int t = 0; t < T; t++) {
    token.q = floats(q + t * H * D, H * D);
    token.k = floats(k + t * H * D, H * D);
    token.v = floats(v + t * H * D, H * D);
    token.g = floats(g + t * H, H);
    token.lambda = floats(lambda + t * H * M, H * M);
    must(dla_step(&options, &token, &states, &result));
    for (int i = 0; i < H * D; i++) difference += pow((double)one[i] - o[t * H * D + i], 2);
    must(dla_entries_step(entries, &options, &token, &entry, 1, &result));
    for (int i = 0; i < H * D; i++) difference += pow((double)one[i] - o[t * H * D + i], 2);
  }
  uint32_t held = *(uint32_t *)states.len.data;
  dla_cache_destroy(cache);
  dla_entries_destroy(entries);
  if (!(difference <= 1e-10 * given)) {
    fprintf(stderr, "steps differ from the forward: %g\n", sqrt(difference / given));
    return 1;
  }

  /* A wrong call says what is wrong, and with what. */
  call.v.bytes -= 4;
  if (dla_forward(&options, &call, &results) != DLA_STATUS_SHAPE || !strstr(dla_error_message(), "v: expected")) return 1;

  printf("dla %s: |o| = %g, %u slots held, and an error reads \"%s\"\n", dla_version(), sqrt(given), held,
         dla_error_message());
  return 0;
}
