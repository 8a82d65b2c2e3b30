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

// Threads of a block of segment_gram and of segment; shared memory of segment, whatever the head size; bytes of a
// row's record between windows.
constexpr int SEGMENT_THREADS = 128;
constexpr int SEGMENT_SHARED_BYTES = 9280;
constexpr int SEGMENT_STATE_BYTES = 1608;

// k, v, g -> drift, events; n, J and R of the cache; the slots at every chunk's entry. segment_gram, grid
// (B T / C + N) x HV x C / 32, then segment, grid N x HV. Both take tokens from..to of every sequence: windows
// come in order, the workspace stays. What "row's end" marks is written by the window in which the row ends.
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
    uint32_t* len;                  // [N,HV] out, row's end
    uint32_t* tokens;               // [N,HV,M] out, row's end, unused slots 0
    uint32_t* summed_drift;         // [N,HV,M] out, row's end, unused slots 0
    float* open;                    // [N,HV,dk,dv] out, row's end; R lives here meanwhile. Not initial_open
    uint32_t* chunk_len;            // [B T / C + N, HV] out: slots held at a chunk's entry
    int32_t* chunk_starts;          // [B T / C + N, HV, M] out, oldest first, 0 past those held: the token at which the
                                    //   slot starts, or j - m for one that starts with slot j of m initial ones
    uint8_t* chunk_place;           // [B T / C + N, HV, M] out, 0 past those held: where the slot lies. Initial slot j: j; a
                                    //   merge leaves the older's and frees the other's for the slot that opens
    float* chunk_log;               // [B T / C + N, HV, M] out, by place: sum of g over the chunks since the one in which
                                    //   the slot was last extended, merged or opened
    float* walks;                   // [B T / C + N, HV, C / 32, 32, 32] workspace, and all below
    uint32_t* reach;                // [B T / C + N, HV, C]
    float* energy;                  // [B T / C + N, HV, C]
    float* factor;                  // [B T / C + N, HV, C]
    double* totals;                 // [B T / C + N, HV, C / 32]
    uint8_t* next;                  // [B T / C + N, HV, C]
    void* state;                    // [N,HV] records of SEGMENT_STATE_BYTES, 8-byte aligned
    int64_t from, to;               // the window, multiples of 64; to may exceed every length
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

// q, k, events, slots, sums of keys -> lambda and, in a row's last window, the final cache's key sums. Grid:
// (cu_seqlens ? B T / C + N : N x chunks of the window, at least one) x HV.
struct RouteParams {
    Extents extents;
    const void* q;                  // [B,T,H,dk]
    const void* k;                  // [B,T,H,dk]
    const uint8_t* events;          // [B,T,HV]
    const uint32_t* chunk_len;      // as segment leaves them
    const int32_t* chunk_starts;
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
    int64_t from, to;               // window of every sequence, multiples of C; to may exceed every length
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

// g -> its sums before chunks. Grid N x HV, GAMMAS_THREADS threads.
constexpr int GAMMAS_THREADS = 1024;
struct GammasSm90Params {
    Extents extents;
    const float* g;   // [B,T,HV], or null: 0
    double* gammas;   // [B T / C + N, HV] out: over the sequence's tokens before the chunk
};

// An exit slot whose state changes: entry slots that have a state and merge, tokens of the chunk before.
struct SlotChange {
    // Its tokens, of those that a thread has as a right operand: t with t % 8 / 2 = c at [c], bit 7 - t / 8 of byte t % 2.
    uint16_t tokens[4];
    uint8_t place;
    uint8_t steps;     // bit s: it has tokens of 16 s to 16 s + 15
    uint8_t entries;   // entry slots
    uint8_t first;     // the first of them
    uint32_t entry_place;  // of that
    float factor;          // of that
    uint32_t reserved[3];
};

// What a chunk of the scan on Hopper does to its slots' states, which hold the tokens before the chunk before. Slots stand in
// places (SegmentParams) and stay there.
struct ChunkPlan {
    float value_factor[64];   // decay of token s of the chunk before until that chunk's end, times its key's norm factor
    float factor[64];         // of entry slot j's state in the one it goes into
    uint8_t entry_place[64];  // of entry slot j
    uint32_t changes;         // entries of `changed`, the others 0
    uint32_t reserved[3];
    SlotChange changed[64];   // oldest first; no more than there are places
    // From here on for a row's last chunk alone.
    uint32_t exit_len;            // slots held after the chunk
    uint32_t reserved_too[3];
    float exit_factor[64];        // decay of exit slot i's state until the chunk's end
    float exit_value_factor[64];  // of token s of the chunk until its end, times its key's norm factor
    uint8_t exit_place[64];       // of exit slot i, 255: it has no state
    uint8_t exit_from[64];        // tokens of the chunk that are in exit slot i
    uint8_t exit_to[64];
};
constexpr int PAIR_BLOCKS = 26;  // of a chunk's P . Lambda: of 16 x 16, 16 with the chunk before and 10 with itself

// q, k, g, events, lambda -> what the scan on Hopper takes of a chunk. Grid: W x HV. What it leaves of a chunk stands where
// the chunk does among W = cu_seqlens ? B T / C + N : N x chunks of the window, sequence by sequence.
struct PrepareSm90Params {
    Extents extents;
    const void* q;                // [B,T,H,dk]
    const void* k;                // [B,T,H,dk]
    const float* g;               // [B,T,HV], or null: 0
    const uint8_t* events;        // [B,T,HV]
    const float* lambda;          // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;    // as segment leaves them
    const int32_t* chunk_starts;
    const uint8_t* chunk_place;
    const double* gammas;         // as gammas_sm90 leaves them
    uint32_t* pairs;              // [W, HV, PAIR_BLOCKS, 32, 4] bf16 pairs out: P . Lambda as left operands; by 16 tokens, those
                                  //   with the chunk before, then those with the chunk itself up to the diagonal
    float* weights;               // [W, HV, 4, slots / 4, 2, 8, 4] out: by warp, place / 4, half, row, place % 4
    ChunkPlan* plans;             // [W, HV] out
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t lambda_columns;       // M or more
    int32_t slots;                // places that have weights, a multiple of 4
    float scale;
    int32_t qk_l2norm;
};

// Everything -> o and the states of the cache, on Hopper. Grid N x HV x dv / columns of a block.
struct ScanSm90Params {
    Extents extents;
    const void* q;                  // [B,T,H,dk]
    const void* k;                  // [B,T,H,dk]
    const void* v;                  // [B,T,HV,dv]
    const uint32_t* pairs;          // as prepare_sm90 leaves them
    const float* weights;
    const ChunkPlan* plans;
    const uint32_t* initial_len;    // [N,HV], or null: no initial cache
    const float* initial_states;    // [N,HV,M,dk,dv]
    unsigned char* banks;           // what a block holds between windows, as it stands in shared memory; or null: one window
    void* o;                        // [B,T,HV,dv] out
    float* states;                  // [N,HV,M,dk,dv] out where the row ends, unused slots 0; or null: not wanted
    int64_t from, to;               // window of every sequence, multiples of C; in order
};

// What a chunk of the delta rule's scan on Hopper does to its slots, by place. Entry slots that merge away are numbered,
// oldest first.
struct DeltaPlan {
    uint8_t gone[32];          // number of the entry slot here that merges away, else 255
    uint8_t merged_from[32];   // numbers of those that merge into the slot that stands here
    uint8_t merged_to[32];
    uint8_t tokens_from[32];   // tokens of the chunk that end here
    uint8_t tokens_to[32];
    uint8_t steps[4];          // of places 8 n to 8 n + 7: bit s, tokens 16 s to 16 s + 15 have some that end there
    uint32_t merges;           // entry slots that merge away
    float decay;               // e^{Gamma_C}
    uint32_t exit_len;         // slots held after the chunk
    uint8_t exit_place[32];    // of exit slot i
};

// q, k, g, beta, events, lambda -> what the delta rule's scan on Hopper takes of a chunk. Grid W x HV (PrepareSm90Params).
// D = width: dk as computed, 64 or 128. Matrices [k][n] stand as right operands: blocks of 8 x 8, [n / 8][k / 8][k % 8][n % 8].
struct PrepareDeltaSm90Params {
    Extents extents;
    const void* q;                // [B,T,H,dk]
    const void* k;                // [B,T,H,dk]
    const float* g;               // [B,T,HV], or null: 0
    const float* beta;            // [B,T,HV]
    const uint8_t* events;        // [B,T,HV]
    const float* lambda;          // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;    // as segment leaves them
    const uint8_t* chunk_place;
    uint32_t* pairs;              // [W, HV, 10, 32, 4] bf16 pairs out: P . Lambda, lower blocks, as left operands
    float* weights;               // [W, HV, 4, slots / 4, 2, 8, 4] out: by warp, place / 4, half, row, place % 4
    uint32_t* queries;            // [W, HV, 4, D / 16, 32, 4] bf16 pairs out: Qt as left operands, by warp, step, lane
    uint16_t* transition;         // [W, HV, D D] bf16 out: (-Kd^T W)^T [k][n]
    uint16_t* writes;             // [W, HV, 2, C D] bf16 out: Kh [t][n], two planes
    DeltaPlan* plans;             // [W, HV] out
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t lambda_columns;       // M or more
    int32_t slots;                // places that have weights: 16 or 32
    int32_t width;                // D
    float scale;
    int32_t qk_l2norm;
    int32_t reserved;
};

// Everything -> o and the states of the cache, delta rule, on Hopper. Grid N x HV x dv / 8.
struct ScanDeltaSm90Params {
    Extents extents;
    const void* v;                  // [B,T,HV,dv]
    const uint32_t* pairs;          // as prepare_delta_sm90 leaves them
    const float* weights;
    const uint32_t* queries;
    const uint16_t* transition;
    const uint16_t* writes;
    const DeltaPlan* plans;
    const uint32_t* initial_len;    // [N,HV], or null: no initial cache
    const float* initial_states;    // [N,HV,M,dk,dv]
    const uint32_t* chunk_len;      // as segment leaves them; read where from > 0
    const uint8_t* chunk_place;
    void* o;                        // [B,T,HV,dv] out
    float* states;                  // [N,HV,M,dk,dv] out, unused slots 0; null only where the window is everything
    int64_t from, to;               // window of every sequence, multiples of C
};

static_assert(sizeof(DeltaPlan) == 208 && offsetof(DeltaPlan, steps) == 160 && offsetof(DeltaPlan, exit_place) == 176);
static_assert(sizeof(PrepareDeltaSm90Params) == 200 && offsetof(PrepareDeltaSm90Params, pairs) == 112 &&
              offsetof(PrepareDeltaSm90Params, from) == 160 && offsetof(PrepareDeltaSm90Params, qk_l2norm) == 192);
static_assert(sizeof(ScanDeltaSm90Params) == 168 && offsetof(ScanDeltaSm90Params, initial_len) == 104 &&
              offsetof(ScanDeltaSm90Params, from) == 152);
static_assert(sizeof(GammasSm90Params) == 64 && offsetof(GammasSm90Params, gammas) == 56);
static_assert(sizeof(SlotChange) == 32 && sizeof(ChunkPlan) == 3360 && offsetof(ChunkPlan, changed) == 592 &&
              offsetof(ChunkPlan, exit_len) == 2640 && offsetof(ChunkPlan, exit_place) == 3168);
static_assert(sizeof(PrepareSm90Params) == 176 && offsetof(PrepareSm90Params, pairs) == 120 &&
              offsetof(PrepareSm90Params, lambda_columns) == 160);
static_assert(sizeof(ScanSm90Params) == 152 && offsetof(ScanSm90Params, initial_len) == 96 &&
              offsetof(ScanSm90Params, from) == 136);
static_assert(sizeof(Extents) == 48 && offsetof(Extents, heads) == 24 && offsetof(Extents, newest_first) == 44);
static_assert(sizeof(SegmentParams) == 280 && offsetof(SegmentParams, k) == 48 && offsetof(SegmentParams, drift) == 120 &&
              offsetof(SegmentParams, open) == 160 && offsetof(SegmentParams, walks) == 200 &&
              offsetof(SegmentParams, from) == 256 && offsetof(SegmentParams, qk_l2norm) == 276);
static_assert(sizeof(PrepareParams) == 120 && offsetof(PrepareParams, p) == 80 && offsetof(PrepareParams, scale) == 112);
static_assert(sizeof(RouteSumsParams) == 88 && offsetof(RouteSumsParams, sums) == 56 &&
              offsetof(RouteSumsParams, qk_l2norm) == 80);
static_assert(sizeof(RouteParams) == 200 && offsetof(RouteParams, sums) == 88 && offsetof(RouteParams, slope) == 136 &&
              offsetof(RouteParams, logit_columns) == 192);
static_assert(sizeof(ScanParams) == 184 && offsetof(ScanParams, p) == 96 && offsetof(ScanParams, bank) == 144 &&
              offsetof(ScanParams, lambda_columns) == 168);

}  // namespace dla
