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

// Threads of a block of segment_gram and of a row of segment, and rows of its block at most; shared memory of a row,
// whatever the head size; bytes of a row's record between windows.
constexpr int SEGMENT_THREADS = 128;
constexpr int SEGMENT_ROWS = 4;
constexpr int SEGMENT_SHARED_BYTES = 11472;
constexpr int SEGMENT_STATE_BYTES = 1608;

// k, v, g -> drift, events; n, J and R of the cache; the slots at every chunk's entry. segment_gram, grid
// (B T / C + N) x HV x C / 32, then segment, grid N x HV by the rows of a block, 1 to SEGMENT_ROWS. Both take tokens
// from..to of every sequence: windows come in order, the workspace stays. What "row's end" marks is written by the
// window in which the row ends.
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
// stands at start / C + n + c, so that no one has to count the chunks of packed sequences. Of the backward, grid W x HV:
// chunks from..to of every sequence, each at its place among W, and two planes of what is left whatever the dtype.
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
    int64_t from, to;   // a window of the backward; to = 0: every chunk, at its place among all
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
    // Of prepare_queries_sm90, which prepares for dQ: q is do, k is v, and W as the backward has it (PrepareParams).
    const void* normed;           // [B,T,H,dk] k, read under qk_l2norm
    float* entry_factor;          // [W, HV, slots] out: decay of the state at a place until the chunk's entry, 0: no state
    uint8_t* slot_of;             // [W, HV, C, slots] out: slot that the state at a place is in after a token, 255: no state
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t lambda_columns;       // M or more
    int32_t slots;                // places that have weights, a multiple of 4
    float scale;
    int32_t qk_l2norm;
};

// Everything -> o and the states of the cache, on Hopper. Grid N x HV x dv / columns of a block. As scan_queries_sm90, with q -> do,
// k -> v, v -> k: dQ, and what dlambda takes of the states; grid N x HV x dk / columns.
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
    const unsigned char* source;    // what blocks held at `from`, as it stands in shared memory; from = 0: not read
    unsigned char* banks;           // out: the same at `to`, where the row goes on; may be `source`, or null: not wanted
    void* o;                        // [B,T,HV,dv] out; scan_queries_sm90: [W, HV, C, dk] f32 of queries as the read uses them, or
                                    //   null: only the states are carried on
    const void* thin_q;             // scan_queries_sm90: [B,T,H,dk] q
    float* d_reads;                 // and [dk / 8, W, HV, 4, slots / 4, 2, 8, 4] out, as the weights stand: q_t . (S do_t) over 8
                                    //   columns of dk
    float* states;                  // [N,HV,M,dk,dv] out where the row ends, unused slots 0; or null: not wanted
    int64_t from, to;               // window of every sequence, multiples of C; in order
};

// Tokens of a chunk of the delta rule's prepare and scan on Hopper.
constexpr int DELTA_CHUNK = 128;

// What a chunk of the delta rule's scan on Hopper does to its slots, by place. Entry slots that merge away are numbered,
// oldest first.
struct DeltaPlan {
    uint8_t gone[32];          // number of the entry slot here that merges away, else 255
    uint8_t merged_from[32];   // numbers of those that merge into the slot that stands here
    uint8_t merged_to[32];
    uint8_t tokens_from[32];   // tokens of the chunk that end here
    uint8_t tokens_to[32];
uint32_t firsts;           // numbers that are the first to merge into their slot, a bit each
    uint32_t merges;           // entry slots that merge away
    float decay;               // e^{Gamma_C}
    uint32_t exit_len;         // slots held after the chunk
    uint8_t exit_place[32];    // of exit slot i
};

// q, k, g, beta, events, lambda -> what the delta rule's scan on Hopper takes of a chunk of C = DELTA_CHUNK tokens. Grid W x HV
// (PrepareSm90Params; in chunks of this C).
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
    uint32_t* pairs;              // [W, HV, 12, 2, 8, 8, 4] bf16 pairs out: P . Lambda as left operands (DeltaLayout)
    float* weights;               // [W, HV, C / 16, slots / 4, 2, 8, 4] out: by 16 tokens, four places, half, row, place
    uint32_t* queries;            // [W, HV, C / 16, D / 16, 32, 4] bf16 pairs out: Qt as left operands, by 16 tokens, step, lane
    uint16_t* transition;         // [W, HV, D D] bf16 out: (-Kd^T W)^T [k][n]
    uint16_t* writes;             // [W, HV, C D] bf16 out: Kh [t][n]
    DeltaPlan* plans;             // [W, HV] out
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t lambda_columns;       // M or more
    int32_t slots;                // places that have weights: 16 or 32
    int32_t alternate;            // four places are: 0 neighbours, 1 of eight the even or the odd ones
    float scale;
    int32_t qk_l2norm;
    int32_t reserved;
};

// Everything -> o and the states of the cache, delta rule, on Hopper. Grid N x HV x dv / columns of a block, rounded up.
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

// ---- The backward. Its kernels take tokens from..to of every sequence, windows from the last to the first. What they leave
// for each other of a chunk stands at its place among W = N x chunks of the window (of T tokens, packed or not), sequence
// by sequence; rows past the chunk's tokens are neither written nor read. Of a slot, "by slot" is by its rank at the
// token, oldest first.

// Where the slots of a bank lie, behind the states of all banks: [N,HV,(dv to 16) / 16]. A bank of N HV rows is
// [N,HV,(dv to 16) / 16,M,(dk to 16) / 16,32,8] f32 and then these.
struct BankPlaces {
    double logs[64];    // by place, gated: decay since the state was written
    uint8_t order[64];  // place of every slot, oldest first
};

// events -> the slots at every chunk's entry, as segment leaves them: slots_maps, then slots. Grids N x HV x parts, THREADS
// threads, and N x HV, 32 threads.
struct SlotsParams {
    Extents extents;
    const uint8_t* events;        // [B,T,HV]
    const uint32_t* initial_len;  // [N,HV], or null: no initial cache
    uint32_t* chunk_len;          // [B T / C + N, HV] out
    int32_t* chunk_starts;        // [B T / C + N, HV, M] out
    uint8_t* chunk_place;         // [B T / C + N, HV, M] out, or null
    int32_t chunk;                // C
    int32_t parts;                // blocks of a row and head
};

// A scan that only writes: the bank at `from` -> the bank at `to` and, where wanted, at every chunk's entry. Grid
// N x HV x (dv to 16) / 16.
struct ScanStatesParams {
    Extents extents;
    const void* k;               // [B,T,H,dk]
    const void* v;               // [B,T,HV,dv]
    const float* g;              // [B,T,HV], or null: 0
    const uint8_t* events;       // [B,T,HV]
    const uint32_t* chunk_len;   // as slots leaves them
    const uint16_t* w;           // [W, HV, 2, C, dk to 16] bf16, delta rule
    const uint16_t* kh;          // as w
    const uint32_t* initial_len; // [N,HV], or null: no initial cache
    const float* initial_states; // [N,HV,M,dk,dv]
    const float* source;         // bank at `from`, may be `bank`; or null: the initial cache, from = 0
    float* bank;                 // bank at `to`; of no use where `entries` is wanted
    void* entries;               // [W, HV, slices, M, (dk to 16) / 16, 2, 32] 16 bytes out: the bank at every chunk's entry, by
                                 //   slot, as right operands S^T; or null
    int64_t from, to;
    int32_t qk_l2norm;
    int32_t reserved;
};

// The adjoint of the scan for one window. Grid N x HV x (dv to 16) / 16 = slices.
struct ScanBackwardParams {
    Extents extents;
    const void* q;               // [B,T,H,dk]
    const void* k;               // [B,T,H,dk]
    const void* v;               // [B,T,HV,dv]
    const float* g;              // [B,T,HV], or null: 0
    const void* d_o;             // [B,T,HV,dv]
    const uint8_t* events;       // [B,T,HV]
    const float* lambda;         // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;   // as slots leaves them
    const uint16_t* p;           // [W, HV, 2, C, C] bf16
    const uint16_t* qt;          // [W, HV, 2, C, dk to 16] bf16, delta rule
    const uint16_t* w;           // as qt
    const uint16_t* kh;          // as qt
    const uint32_t* initial_len; // [N,HV], or null: no initial cache
    const void* entries;         // as scan_states leaves them
    void* scratch;               // [N,HV,slices] of scan_backward_scratch bytes
    float* d_bank;               // a bank, in and out: adjoint of the states at `to` and at `from`; in only where the row goes on
                                 //   past `to`
    const float* final_states;   // [N,HV,M,dk,dv] gradient of the final states, or null: 0
    float* initial_gradient;     // [N,HV,M,dk,dv] out where from = 0, unused slots 0; or null
    float* d_qt;                 // [slices, W, HV, C, dk to 16] out
    float* d_kh;                 // as d_qt
    float* d_w;                  // as d_qt, delta rule
    float* d_kd;                 // as d_qt, delta rule
    float* d_weights;            // [slices, W, HV, C, M] out, by slot: by way of the states, 0 for slots held that have none
    double* d_total;             // [slices, W, HV] out: of Gamma_C by way of the transition
    float* d_v;                  // [W, HV, C, dv] out, or null
    void* dv;                    // [B,T,HV,dv] out of the dtype, or null
    int64_t from, to;
    int64_t places;              // W
    int32_t lambda_columns;
    float scale;
    int32_t qk_l2norm;
    int32_t reserved;
};

// The adjoint of prepare, and of what of the scan lies within a chunk. Grid W x HV.
struct PrepareBackwardParams {
    Extents extents;
    const void* q;               // [B,T,H,dk]
    const void* k;               // [B,T,H,dk]
    const void* v;               // [B,T,HV,dv]
    const float* g;              // [B,T,HV], or null: 0
    const float* beta;           // [B,T,HV], delta rule
    const void* d_o;             // [B,T,HV,dv]
    const uint8_t* events;       // [B,T,HV]
    const float* lambda;         // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;   // as segment leaves them
    const float* d_qt;           // the scan's partial sums (ScanBackwardParams)
    const float* d_kh;
    const float* d_w;            // delta rule
    const float* d_kd;           // delta rule
    const float* d_weights;
    const double* d_total;
    float* d_q;                  // [W, HV, C, dk] out: of queries and keys as the recurrence uses them, of this value head
    float* d_k;                  // [W, HV, C, dk] out
    float* dg;                   // [B,T,HV] out, or null
    float* dbeta;                // [B,T,HV] out, delta rule
    float* dlambda;              // [B,T,HV,lambda_columns] out, columns without a slot 0; or null
    float* d_slots;              // [W, HV, C, M] out: the same by slot, for route_backward, slots not held 0; or null
    int64_t from, to;
    int64_t places;              // W
    int32_t slices;              // of the partial sums
    int32_t lambda_columns;      // M or more
    float scale;
    int32_t qk_l2norm;
};

// Gradients of q and k of every value head -> of q and k: summed over the group, through the norm, rounded. Grid W x H.
struct GroupSumParams {
    Extents extents;
    const void* q;     // [B,T,H,dk], read under qk_l2norm
    const void* k;
    const float* d_q;  // [W, HV, C, dk]
    const float* d_k;  // or null: dk is not written
    void* dq;          // [B,T,H,dk] out
    void* dk;          // [B,T,H,dk] out
    int64_t from, to;
    int32_t qk_l2norm;
    int32_t reserved;
};

// Soft boundaries: dV -> the drift's gradient. Without the adjoint of segment it also leaves dV. Grid W x HV.
struct DriftBackwardParams {
    Extents extents;
    const void* v;              // [B,T,HV,dv]
    const float* d_v;           // [W, HV, C, dv], complete but for the adjoint of segment
    const uint8_t* events;      // [B,T,HV]
    const float* drift;         // [B,T,HV], the forward's
    const uint32_t* chunk_len;  // as segment leaves them
    const float* tau;           // [HV]
    float* ddrift;              // [B,T,HV] out
    double* tau_sums;           // [B T / C + N, HV] out: of dtau
    void* dv;                   // [B,T,HV,dv] out of the dtype, or null: segment_backward leaves it
    int64_t from, to;
    float temperature;
    int32_t reserved;
};

// The adjoint of route, route_backward (grid W x HV), then route_backward_keys (grid N x HV x (dk to 32) / 32).
struct RouteBackwardParams {
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
    const float* d_slots;           // [W, HV, C, M] as prepare_backward leaves them
    const float* final_keys;        // [N,HV,M,dk] gradient of the final cache's key sums, or null: 0
    float* d_q;                     // [W, HV, C, dk] in and out
    float* d_k;                     // [W, HV, C, dk] in and out
    float* dlogits;                 // [B,T,HV,logit_columns] out, columns without a slot 0; or null
    double* slope_sums;             // [B T / C + N, HV] out: of dslope
    double* bias_sums;              // [B T / C + N, HV] out: of dbias
    float* d_bank;                  // [W, HV, M, dk] workspace: E_j^T Q
    uint8_t* exits;                 // [W, HV, 64 + C] workspace: exit slot of every entry slot and token
    float* d_keys;                  // [N,HV,M,dk] in and out: adjoint of the key sums at to and at from, by slot; in only where the
                                    //   row goes on past to. From window to window; after the last the initial cache's, unused slots 0
    int64_t from, to;
    int32_t logit_columns;          // M or more
    int32_t qk_l2norm;
};

// Sums of all chunks' shares, in their order: of dslope, dbias, dtau. Grid HV.
struct HeadSumsParams {
    Extents extents;
    const double* sums;  // [B T / C + N, HV], as left by all windows; a sequence's places alone are read
    float* out;          // [HV]
    int32_t chunk;       // C
    int32_t add;         // 1: to what `out` holds
};

// The open segment's R, before every chunk of a window or at every stride-th. Grid N x HV x (dv to 16) / 16.
struct SegmentStatesParams {
    Extents extents;
    const void* k;              // [B,T,H,dk]
    const void* v;              // [B,T,HV,dv]
    const float* g;             // [B,T,HV], or null: 0
    const uint8_t* events;      // [B,T,HV]
    const float* energy;        // [B T / C + N, HV, C] as segment_gram leaves them
    const float* factor;        // [B T / C + N, HV, C], read under qk_l2norm
    const float* initial_open;  // [N,HV,dk,dv], or null: no initial cache
    const float* entry;         // [N,HV,dk,dv] R before from, read where from > 0
    const double* entry_log;    // [N,HV] log decay since R's newest token that is not zero, up to `from`
    float* open;                // [N,HV,saves,dk,dv] out: R before chunks 0, stride, 2 stride.. of the window, as it was at its
                                //   newest token that is not zero; saves = 0: [W,HV,dk,dv], before every chunk
    double* open_log;           // [N,HV,saves] out, or [W,HV]: the log decay since then
    int64_t from, to;
    int64_t stride;             // chunks, 1 where saves = 0
    int64_t saves;              // room for, of a row
    int64_t entry_step;         // entries of `entry` and `entry_log` from row to row
    int32_t qk_l2norm;
    int32_t reserved;
};

// The adjoint of segment: segment_scalars (grid W x HV), segment_open_backward (N x HV x (dv to 16) / 16), segment_backward
// (W x HV), segment_log_backward (N x HV).
struct SegmentBackwardParams {
    Extents extents;
    const void* k;                // [B,T,H,dk]
    const void* v;                // [B,T,HV,dv]
    const float* g;               // [B,T,HV], or null: 0
    const uint8_t* events;        // [B,T,HV]
    const float* energy;          // [B T / C + N, HV, C] as segment_gram leaves them
    const float* factor;          // [B T / C + N, HV, C], read under qk_l2norm
    const float* drift;           // [B,T,HV], the forward's
    const float* ddrift;          // [B,T,HV], or null: 0, the gradient of the final R alone
    const float* open;            // [W,HV,dk,dv] as segment_states leaves them
    const double* open_log;       // [W,HV]
    const uint32_t* initial_len;  // [N,HV], or null: no initial cache
    const float* initial_open;    // [N,HV,dk,dv]
    const float* final_open;      // [N,HV,dk,dv] gradient of the final R, or null: 0
    const float* d_v;             // [W,HV,C,dv]
    void* dv;                     // [B,T,HV,dv] out of the dtype: d_v and what is found here
    float* d_k;                   // [W,HV,C,dk] in and out
    float* dg;                    // [B,T,HV] in and out, or null
    double* scalars;              // [W,HV,8 C + 8] workspace
    float* d_open;                // [W,HV,dk,dv] workspace: adjoint of R after every chunk
    float* d_carried;             // [N,HV,dk,dv] in and out: adjoint of R at to and at from; in only where the row goes on past
                                  //   to. From window to window; after the last the gradient of the initial R
    double* d_carried_scalars;    // [N,HV,1 + (dv to 16) / 16] from window to window
    int64_t from, to;
    int32_t qk_l2norm;
    int32_t reserved;
};

static_assert(sizeof(BankPlaces) == 576 && offsetof(BankPlaces, order) == 512);
static_assert(sizeof(SlotsParams) == 96 && offsetof(SlotsParams, chunk_len) == 64 && offsetof(SlotsParams, chunk) == 88);
static_assert(sizeof(ScanStatesParams) == 168 && offsetof(ScanStatesParams, initial_len) == 104 &&
              offsetof(ScanStatesParams, entries) == 136 && offsetof(ScanStatesParams, qk_l2norm) == 160);
static_assert(sizeof(ScanBackwardParams) == 296 && offsetof(ScanBackwardParams, final_states) == 176 &&
              offsetof(ScanBackwardParams, qk_l2norm) == 288);
static_assert(sizeof(PrepareBackwardParams) == 256 && offsetof(PrepareBackwardParams, d_weights) == 152 &&
              offsetof(PrepareBackwardParams, qk_l2norm) == 252);
static_assert(sizeof(GroupSumParams) == 120 && offsetof(GroupSumParams, dq) == 80 &&
              offsetof(GroupSumParams, qk_l2norm) == 112);
static_assert(sizeof(DriftBackwardParams) == 144 && offsetof(DriftBackwardParams, ddrift) == 96 &&
              offsetof(DriftBackwardParams, temperature) == 136);
static_assert(sizeof(RouteBackwardParams) == 264 && offsetof(RouteBackwardParams, logits) == 152 &&
              offsetof(RouteBackwardParams, qk_l2norm) == 260);
static_assert(sizeof(HeadSumsParams) == 72 && offsetof(HeadSumsParams, out) == 56 &&
              offsetof(HeadSumsParams, chunk) == 64);
static_assert(sizeof(SegmentStatesParams) == 184 && offsetof(SegmentStatesParams, open) == 120 &&
              offsetof(SegmentStatesParams, qk_l2norm) == 176);
static_assert(sizeof(SegmentBackwardParams) == 240 && offsetof(SegmentBackwardParams, d_v) == 152 &&
              offsetof(SegmentBackwardParams, qk_l2norm) == 232);
// What a chunk of the reverse scan on Hopper does to the adjoints of its slots, by place unless said. The scan writes tokens a
// chunk late: at a chunk's end those of the chunk before; only slots with older tokens are in its bank.
struct BackwardPlan {
    struct Slot {
        uint8_t published;       // number of the exit slot here among those that hold tokens of the chunk before, else 255
        uint8_t copied;          // number of the exit slot here among those into which slots of the bank merge, else 255
        uint8_t copy_of;         // number of the one that the entry slot here merges into and does not give its place to, else 255
        uint8_t last_published;  // a row's last chunk: as `published`, of its own tokens, which the final states hold too
    } slots[32];
    uint8_t number[64];      // of the exit slot of token s of the chunk before, among those published
    float factor[2][64];     // decay of token s of the chunk before until that one's end; [0]: times its key's norm factor
    uint32_t copies;         // exit slots numbered by `copied`
    float decay;             // e^{Gamma_C}
    uint32_t reserved[2];
    // From here on for a row's last chunk alone: the same of its own tokens.
    uint8_t last_number[64];
    float last_factor[2][64];
    uint32_t exit_len;       // slots held after the chunk
    uint32_t reserved_too[3];
    uint8_t exit_place[32];  // of exit slot i
};

// q, k, v, g, do, events, lambda -> what the reverse scan on Hopper takes of a chunk, and the gradients by way of the pairs of
// tokens that the chunk reads: its own and the chunk's before. Grid W x HV, of the backward (PrepareParams).
struct PrepareBackwardSm90Params {
    Extents extents;
    const void* q;                // [B,T,H,dk]
    const void* k;                // [B,T,H,dk]
    const void* v;                // [B,T,HV,dv]
    const void* d_o;              // [B,T,HV,dv]
    const float* g;               // [B,T,HV], or null: 0
    const uint8_t* events;        // [B,T,HV]
    const float* lambda;          // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;    // as segment leaves them
    const int32_t* chunk_starts;
    const uint8_t* chunk_place;
    uint32_t* pairs;              // [W, HV, 2, 26, 32, 4] bf16 pairs out: (P . Lambda)^T as left operands, of dV and of dK
    float* weights;               // [W, HV, slots, 4, 4, 4] out: by place, 16 tokens, c, tokens 2 c, + 1, + 8, + 9 of these
    BackwardPlan* plans;          // [W, HV] out
    float* d_weights;             // [W, HV, C, M] out: of the read weights by way of the pairs, by slot; slots not held 0
    float* d_g;                   // [W, HV, 2, C] out: of g by way of the pairs: for tokens of the chunk before, and its own
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t lambda_columns;       // M or more
    int32_t slots;                // places that have weights: 16 or 32
    float scale;
    int32_t qk_l2norm;
};

// The adjoint of the gated scan on Hopper, in reverse, for dV or, with the roles of q and do, k and v exchanged, for dK. Windows
// come from the last to the first. Grid N x HV x dv / 8, or dk / 8.
struct ScanBackwardSm90Params {
    Extents extents;
    const void* q;                // [B,T,H,dk]
    const void* k;                // [B,T,H,dk]
    const void* v;                // [B,T,HV,dv]
    const void* d_o;              // [B,T,HV,dv]
    const uint32_t* pairs;        // as prepare_backward_sm90 leaves them
    const float* weights;
    const BackwardPlan* plans;
    const uint32_t* initial_len;  // [N,HV], or null: no initial cache
    const float* final_states;    // [N,HV,M,dk,dv] gradient of the final states, or null: 0
    float* initial_states;        // [N,HV,M,dk,dv] out where from = 0: gradient of the initial ones, unused slots 0; or null
    float* carried;               // [blocks, WIDTH SLOTS / 128 + 2, 256, 4] from window to window (WIDTH: dk, exchanged dv, as
                                  //   computed), one for dV and one for dK; or null: one window, and no flow
    void* out;                    // dV out, bf16 [B,T,HV,dv] or f32 [W,HV,C,dv]; exchanged dk for dv: of keys as the recurrence
                                  //   uses them, of this value head. Of tokens from the window's first chunk on
    float* flow;                  // [dv / 8 or dk / 8, B T, HV] out: v_t . dV_t by way of the states, over a block's columns (k_t . dK_t,
                                  //   exchanged, sums to the same); of tokens from the chunk before the window's first on; or null
    int64_t from, to;             // window of every sequence, multiples of C
    int32_t exchanged;            // 1: dK
    int32_t out_f32;              // 1: `out` is f32, else bf16
};

// What the states give to dlambda, of the slices of scan_queries_sm90, and what pairs give -> dlambda; read_t = sum over slots of
// lambda_t dlambda_t by way of the states. Grid W x HV, of the backward.
struct LambdaBackwardSm90Params {
    Extents extents;
    const void* q;              // [B,T,H,dk], read under qk_l2norm
    const float* g;             // [B,T,HV], or null: 0
    const uint8_t* events;      // [B,T,HV]
    const float* lambda;        // [B,T,HV,lambda_columns]
    const uint32_t* chunk_len;  // as segment leaves them
    const float* d_reads;       // as scan_queries_sm90 leaves them
    const float* entry_factor;  // as prepare_queries_sm90 leaves them
    const uint8_t* slot_of;
    const float* d_weights;     // as prepare_backward_sm90 leaves them
    float* dlambda;             // [B,T,HV,lambda_columns] out, columns without a slot 0; or null: routed
    float* d_slots;             // [W, HV, C, M] out, the same by slot; or null
    float* read;                // [W, HV, C, 2] out, and its variance (g_backward_sm90.cu); or null: no gradient of g
    int64_t from, to;
    int64_t places;             // W
    int32_t slices;             // of dk
    int32_t slots;              // places that have weights
    int32_t lambda_columns;
    float scale;
    int32_t qk_l2norm;
    int32_t reserved;
};

// <dS, S> at a window's beginning, over 8 columns of dk: the adjoint as scan_backward_sm90 leaves it, exchanged, the states as
// scan_queries_sm90 found them. Grid N x HV x dk / 8. Rows that do not go on at `from`: nothing.
struct AnchorsSm90Params {
    Extents extents;
    const float* carried;         // of scan_backward_sm90, exchanged
    const unsigned char* banks;   // `source` of scan_queries_sm90; not read where from = 0
    const float* initial_states;  // [N,HV,M,dk,dv], read where from = 0
    const float* entry_factor;    // of the window's first chunk
    double* anchors;              // [N, HV, dk / 8, 2] out, and its variance (g_backward_sm90.cu)
    int64_t from, to;
    int32_t width;                // of dv as both compute it
    int32_t carried_slots;        // places, of scan_backward_sm90
    int32_t bank_slots;           // of scan_queries_sm90
    int32_t groups;               // of 8 columns in its block
    int32_t factor_slots;         // places in entry_factor
    int32_t reserved;
};

// <dS, S> of the final states, over 8 columns of dk. Grid N x HV x dk / 8.
struct EndAnchorsSm90Params {
    Extents extents;
    const float* gradient;  // [N,HV,M,dk,dv]
    const float* states;    // [N,HV,M,dk,dv]
    double* anchors;        // [N, HV, dk / 8, 2] out, and its variance (g_backward_sm90.cu)
};

// dg of a window: pairs, and by way of the states. g_flow_sm90 (grid W x HV, of the backward) sums over slices, g_backward_sm90 (grid
// N x HV) over tokens. Windows come from the last to the first.
struct GBackwardSm90Params {
    Extents extents;
    const BackwardPlan* plans;  // as prepare_backward_sm90 leaves them
    const float* read;       // as lambda_backward_sm90 leaves it
    const float* flow[2];    // as scan_backward_sm90 leaves it, dV's and dK's
    float* net;              // [W, HV, C, 2]: read less flow, of tokens of the window, and its variance
    const float* d_g;        // as prepare_backward_sm90 leaves it
    const double* anchors;   // as anchors_sm90 leaves them; or null: from = 0 and no initial states
    const double* end_anchors;  // as end_anchors_sm90 leaves them; or null: the final states have no gradient
    float* carried_g;        // [N,HV,C] from window to window: of `d_g`, for tokens of the chunk before the window
    double* carried;         // [N,HV,3] from window to window: dg by way of the states at its beginning, its variance, and P
    float* dg;               // [B,T,HV] out
    int64_t from, to;
    int32_t slices[2];       // of flow
    int32_t anchor_slices;
    int32_t reserved;
};

static_assert(sizeof(BackwardPlan) == 1344 && offsetof(BackwardPlan, last_number) == 720 &&
              offsetof(BackwardPlan, exit_place) == 1312);
static_assert(sizeof(PrepareBackwardSm90Params) == 200 && offsetof(PrepareBackwardSm90Params, pairs) == 128 &&
              offsetof(PrepareBackwardSm90Params, lambda_columns) == 184);
static_assert(sizeof(ScanBackwardSm90Params) == 176 && offsetof(ScanBackwardSm90Params, initial_len) == 104 &&
              offsetof(ScanBackwardSm90Params, exchanged) == 168);
static_assert(sizeof(LambdaBackwardSm90Params) == 192 && offsetof(LambdaBackwardSm90Params, dlambda) == 120 &&
              offsetof(LambdaBackwardSm90Params, slices) == 168);
static_assert(sizeof(AnchorsSm90Params) == 128 && offsetof(AnchorsSm90Params, from) == 88 && offsetof(AnchorsSm90Params, width) == 104);
static_assert(sizeof(EndAnchorsSm90Params) == 72);
static_assert(sizeof(GBackwardSm90Params) == 168 && offsetof(GBackwardSm90Params, dg) == 128 &&
              offsetof(GBackwardSm90Params, slices) == 152);
static_assert(sizeof(DeltaPlan) == 208 && offsetof(DeltaPlan, firsts) == 160 && offsetof(DeltaPlan, exit_place) == 176);
static_assert(sizeof(PrepareDeltaSm90Params) == 200 && offsetof(PrepareDeltaSm90Params, pairs) == 112 &&
              offsetof(PrepareDeltaSm90Params, from) == 160 && offsetof(PrepareDeltaSm90Params, qk_l2norm) == 192);
static_assert(sizeof(ScanDeltaSm90Params) == 168 && offsetof(ScanDeltaSm90Params, initial_len) == 104 &&
              offsetof(ScanDeltaSm90Params, from) == 152);
static_assert(sizeof(GammasSm90Params) == 64 && offsetof(GammasSm90Params, gammas) == 56);
static_assert(sizeof(SlotChange) == 32 && sizeof(ChunkPlan) == 3360 && offsetof(ChunkPlan, changed) == 592 &&
              offsetof(ChunkPlan, exit_len) == 2640 && offsetof(ChunkPlan, exit_place) == 3168);
static_assert(sizeof(PrepareSm90Params) == 200 && offsetof(PrepareSm90Params, pairs) == 120 &&
              offsetof(PrepareSm90Params, lambda_columns) == 184);
static_assert(sizeof(ScanSm90Params) == 176 && offsetof(ScanSm90Params, initial_len) == 96 &&
              offsetof(ScanSm90Params, from) == 160);
static_assert(sizeof(Extents) == 48 && offsetof(Extents, heads) == 24 && offsetof(Extents, newest_first) == 44);
static_assert(sizeof(SegmentParams) == 280 && offsetof(SegmentParams, k) == 48 && offsetof(SegmentParams, drift) == 120 &&
              offsetof(SegmentParams, open) == 160 && offsetof(SegmentParams, walks) == 200 &&
              offsetof(SegmentParams, from) == 256 && offsetof(SegmentParams, qk_l2norm) == 276);
static_assert(sizeof(PrepareParams) == 136 && offsetof(PrepareParams, p) == 80 && offsetof(PrepareParams, scale) == 128);
static_assert(sizeof(RouteSumsParams) == 88 && offsetof(RouteSumsParams, sums) == 56 &&
              offsetof(RouteSumsParams, qk_l2norm) == 80);
static_assert(sizeof(RouteParams) == 200 && offsetof(RouteParams, sums) == 88 && offsetof(RouteParams, slope) == 136 &&
              offsetof(RouteParams, logit_columns) == 192);
static_assert(sizeof(ScanParams) == 184 && offsetof(ScanParams, p) == 96 && offsetof(ScanParams, bank) == 144 &&
              offsetof(ScanParams, lambda_columns) == 168);

// Places for states of an entry and value head beyond M: one for R where that is not the open slot's state, one that is free
// at every moment, so that no block of a step writes what another may still read.
constexpr int STEP_SPARE_PLACES = 2;
// Tokens whose transition a slot's state may lack, delta rule.
constexpr int STEP_RING = 7;

// What a cache holds of an entry and value head beside the arrays: all zeros before its sequence begins.
struct StepRecord {
    uint32_t len;               // slots held, m
    uint32_t phase;             // tokens taken, modulo 2^32
    uint32_t open;              // place of R: the open slot's, or one of its own
    uint32_t reserved;
    uint32_t tokens[64];        // n, oldest first
    uint32_t drift[64];         // J, oldest first
    double log[66];             // by place: the state is e^log times what is there
    uint8_t order[64];          // place of every slot, oldest first
    uint8_t pending[72];        // by place, delta rule: of so many of the last tokens the state lacks the transition
    uint32_t unused[2];
};

// Arrays of a cache. Row e HV + h is entry e, value head h; P = M + STEP_SPARE_PLACES.
struct StepBank {
    void* states;         // [entries,HV,P,dk,dv] f32 or bf16
    int8_t* rest;         // [entries,HV,P,dk,dv], bf16 states: 8 more bits of each
    float* keys;          // [entries,HV,P,dk] key sums; routed reads
    float* ring;          // [entries,HV,2,STEP_RING,dk], delta rule: k of the last tokens, the newest last; and beta k with the
                          //   transitions since, y
    StepRecord* records;  // [entries,HV]
    uint32_t* arrived;    // [entries,HV], 0 between launches
    int64_t entries;
};

// A step of `tokens` tokens from `from` on of every batch row. Grid B x HV x slices.
struct StepParams {
    StepBank bank;
    const int32_t* entries;  // [B]: the row's entry; the row rests where that is negative or not below bank.entries
    const void* q;           // [B,T,H,dk]
    const void* k;           // [B,T,H,dk]
    const void* v;           // [B,T,HV,dv]
    const float* g;          // [B,T,HV], or null: 0
    const float* beta;       // [B,T,HV], delta rule
    const float* lambda;     // [B,T,HV,lambda_columns], or null: reads are routed
    const float* slope;      // [HV], routed
    const float* bias;       // [HV], routed
    const float* logits;     // [B,T,HV,logit_columns], or null: 0
    const float* tau;        // [HV]
    const uint8_t* log;      // [B,T,HV] events to replay, or null: the rules decide
    void* o;                 // [B,T,HV,dv] out
    float* drift;            // [B,T,HV] out
    uint8_t* events;         // [B,T,HV] out
    float* weights;          // [B,T,HV,M] out, routed: read weights, columns without a slot 0
    int64_t batch;
    int32_t time, from, tokens;
    int32_t heads, value_heads, dk, dv, capacity;
    int32_t slices, width;   // blocks of a batch row and value head, and columns of dv of each, a multiple of 8
    int32_t lambda_columns, logit_columns;
    int32_t dtype;           // of q, k, v, o: 0 bf16, 1 f16, 2 f32
    int32_t newest_first, mass, qk_l2norm;
    float scale;
    int32_t ahead;           // step_*_early: slots, from the oldest on, that are brought to L2 before all else
};

// Between entries and a chronological cache (OPERATOR.md, section 5). Grid N x HV x (M + 1).
struct StepCacheParams {
    StepBank bank;
    const int32_t* entries;  // [N]: the entry of every sequence; null: n
    float* states;           // [N,HV,M,dk,dv]
    uint32_t* len;           // [N,HV]
    uint32_t* tokens;        // [N,HV,M]
    uint32_t* drift;         // [N,HV,M]
    float* open;             // [N,HV,dk,dv]
    float* keys;             // [N,HV,M,dk], routed reads
    int32_t* list;           // [N] out, of those that bring caches in: n, a list for the step; or null
    int64_t sequences;
    int32_t value_heads, dk, dv, capacity;
};

static_assert(sizeof(StepRecord) == 1200 && offsetof(StepRecord, log) == 528 && offsetof(StepRecord, order) == 1056 &&
              offsetof(StepRecord, pending) == 1120);
static_assert(sizeof(StepBank) == 56 && sizeof(StepParams) == 264 && offsetof(StepParams, q) == 64 &&
              offsetof(StepParams, batch) == 184 && offsetof(StepParams, ahead) == 260);
static_assert(sizeof(StepCacheParams) == 144 && offsetof(StepCacheParams, sequences) == 120);

}  // namespace dla
