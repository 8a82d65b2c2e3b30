// One parameter struct per kernel. Twins of src/cuda/abi.rs: sizes and offsets are asserted on both sides.
// Device pointers throughout; all arrays are contiguous and row-major; q, k, v and prepared arrays begin on
// 16 bytes. A pointer that may be null says so. C is the chunk of the dtype (tile.cuh: 64 for bf16, else 32).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dla {

// Shape of a call. Row r = sequence x HV + value head.
struct Extents {
    const int64_t* cu_seqlens;  // [N+1], or null: N = B sequences of T tokens
    int64_t sequences;          // N
    int64_t time;               // T
    int32_t heads;              // H
    int32_t value_heads;        // HV, a multiple of H
    int32_t dk, dv;             // multiples of 8, at most 256
    int32_t capacity;           // M, 1..=64
    int32_t newest_first;       // columns of lambda and logits: 0 = oldest slot first, 1 = newest
};

// k, v, g -> drift, events; n, J and R of the cache. Grid N x HV.
struct SegmentParams {
    Extents extents;
    const void* k;                  // [B,T,H,dk]
    const void* v;                  // [B,T,HV,dv]
    const float* g;                 // [B,T,HV], or null: 0
    const float* tau;               // [HV]
    const uint8_t* log;             // [B,T,HV] events to replay, or null: the rules decide
    const uint32_t* initial_len;    // [N,HV], or null: no initial cache
    const uint32_t* initial_tokens; // [N,HV,M]
    const uint32_t* initial_drift;  // [N,HV,M]
    const float* initial_open;      // [N,HV,dk,dv]
    float* drift;                   // [B,T,HV] out
    uint8_t* events;                // [B,T,HV] out
    uint32_t* len;                  // [N,HV] out
    uint32_t* tokens;               // [N,HV,M] out, unused slots 0
    uint32_t* summed_drift;         // [N,HV,M] out, unused slots 0
    float* open;                    // [N,HV,dk,dv] out; R lives here while the kernel runs. Not initial_open
    int32_t mass;                   // merge cost: 0 density, 1 mass
    int32_t qk_l2norm;              // 1: keys of unit norm
};

// q, k, g, beta -> P and, for the delta rule, Qt, W, Kh. Grid (B T / C + N) x HV: chunk c of sequence n
// stands at start / C + n + c, so that no one has to count the chunks of packed sequences.
struct PrepareParams {
    Extents extents;
    const void* q;      // [B,T,H,dk]
    const void* k;      // [B,T,H,dk]
    const float* g;     // [B,T,HV], or null: 0
    const float* beta;  // [B,T,HV], delta rule
    uint16_t* p;        // [B T / C + N, HV, parts, C, C] bf16 out
    uint16_t* qt;       // [B T / C + N, HV, parts, C, dk to 16] bf16 out, delta rule
    uint16_t* w;        // as qt
    uint16_t* kh;       // as qt
    float scale;        // factor of q in the read
    int32_t qk_l2norm;  // 1: queries and keys of unit norm
};

// k -> sums of keys, from which route takes those of slots. route_sums, grid (B T / C + N) x H, then route_bases, grid
// N x H x dk / 8.
struct RouteSumsParams {
    Extents extents;
    const void* k;       // [B,T,H,dk]
    float* sums;         // [B T / C + N, H, C / 8, dk] out: of a chunk's tokens before its 8th, 16th, ..., C-th
    double* bases;       // [B T / C + N, H, dk] out: of the sequence's tokens before a chunk
    float* key_factors;  // [B,T,H] out, of keys under qk_l2norm; or null without
    int32_t qk_l2norm;
    int32_t reserved;
};

// q, k, events, slots, sums of keys -> lambda and the final cache's key sums. Grid as prepare.
struct RouteParams {
    Extents extents;
    const void* q;                  // [B,T,H,dk]
    const void* k;                  // [B,T,H,dk]
    const uint8_t* events;          // [B,T,HV]
    const uint32_t* chunk_len;      // [B T / C + N, HV]: slots held at a chunk's entry
    const int32_t* chunk_starts;    // [B T / C + N, HV, M]: the token at which each starts, oldest first, or j - m0 for
                                    //   one that starts with slot j of m0 initial ones
    const float* sums;              // as route_sums and route_bases leave them
    const double* bases;
    const float* key_factors;       // or null without qk_l2norm
    const uint32_t* initial_len;    // [N,HV], or null: no initial cache
    const uint32_t* initial_tokens; // [N,HV,M]
    const float* initial_keys;      // [N,HV,M,dk]
    const float* slope;             // [HV]
    const float* bias;              // [HV]
    const float* logits;            // [B,T,HV,logit_columns], or null: 0
    float* lambda;                  // [B,T,HV,M] out, columns without a slot 0
    float* keys;                    // [N,HV,M,dk] out, unused slots 0
    int32_t logit_columns;          // M or more
    int32_t qk_l2norm;
};

// Everything -> o and the states of the cache. Grid N x HV x (dv to 16) / 16.
struct ScanParams {
    Extents extents;
    const void* q;               // [B,T,H,dk]
    const void* k;               // [B,T,H,dk]
    const void* v;               // [B,T,HV,dv]
    const float* g;              // [B,T,HV], or null: 0
    const uint8_t* events;       // [B,T,HV]
    const float* lambda;         // [B,T,HV,lambda_columns]
    const uint16_t* p;           // as prepare leaves them
    const uint16_t* qt;          // delta rule
    const uint16_t* w;           // delta rule
    const uint16_t* kh;          // delta rule
    const uint32_t* initial_len; // [N,HV], or null: no initial cache
    const float* initial_states; // [N,HV,M,dk,dv]
    float* bank;                 // [N,HV,(dv to 16) / 16,M,(dk to 16) / 16,32,8] workspace: masters in fragments
    void* o;                     // [B,T,HV,dv] out
    float* states;               // [N,HV,M,dk,dv] out, unused slots 0; or null: not wanted
    int32_t lambda_columns;      // M or more
    float scale;
    int32_t qk_l2norm;
    int32_t reserved;
};

static_assert(sizeof(Extents) == 48 && offsetof(Extents, heads) == 24 && offsetof(Extents, newest_first) == 44);
static_assert(sizeof(SegmentParams) == 176 && offsetof(SegmentParams, k) == 48 && offsetof(SegmentParams, drift) == 120 &&
              offsetof(SegmentParams, open) == 160 && offsetof(SegmentParams, qk_l2norm) == 172);
static_assert(sizeof(PrepareParams) == 120 && offsetof(PrepareParams, p) == 80 && offsetof(PrepareParams, scale) == 112);
static_assert(sizeof(RouteSumsParams) == 88 && offsetof(RouteSumsParams, sums) == 56 &&
              offsetof(RouteSumsParams, qk_l2norm) == 80);
static_assert(sizeof(RouteParams) == 184 && offsetof(RouteParams, sums) == 88 && offsetof(RouteParams, slope) == 136 &&
              offsetof(RouteParams, logit_columns) == 176);
static_assert(sizeof(ScanParams) == 184 && offsetof(ScanParams, p) == 96 && offsetof(ScanParams, bank) == 144 &&
              offsetof(ScanParams, lambda_columns) == 168);

}  // namespace dla
