/* C ABI of Dynamic Linear Attention. Generated from capi/src by cbindgen:
 * DLA_BLESS=1 cargo test -p dla-capi --test header
 *
 * Every function returns a status; DLA_STATUS_OK is 0. What was wrong, with the argument's name, is in
 * dla_error_message() of the same thread. No function unwinds, and none keeps a pointer that it was given.
 * The mathematics and every name are in docs/OPERATOR.md; docs/c.md has an example.
 */

#ifndef DLA_H
#define DLA_H

#include <stdint.h>
#include <stddef.h>

// What came of a call.
typedef enum {
  // Done; on a GPU: launched.
  DLA_STATUS_OK = 0,
  // A buffer, an extent or a struct's size is wrong, or not for a GPU.
  DLA_STATUS_SHAPE = 1,
  // A dtype is wrong.
  DLA_STATUS_DTYPE = 2,
  // An argument that the call needs is absent.
  DLA_STATUS_MISSING = 3,
  // An argument is given that the call does not read.
  DLA_STATUS_UNEXPECTED = 4,
  // An element is out of its domain: of g, of cu_seqlens, of an event log, of a cache, of a list of entries; or all entries
  // are taken.
  DLA_STATUS_VALUE = 5,
  // An option is out of its range.
  DLA_STATUS_OPTION = 6,
  // An address is misaligned, or not of this device.
  DLA_STATUS_POINTER = 7,
  // The workspace is too small.
  DLA_STATUS_WORKSPACE = 8,
  // There is no GPU, no driver, or no kernel for it.
  DLA_STATUS_DEVICE = 9,
  // The device does not have this part of the operator yet.
  DLA_STATUS_NOT_BUILT = 10,
  // Memory cannot be had.
  DLA_STATUS_MEMORY = 11,
  // A call of the CUDA driver failed.
  DLA_STATUS_CUDA = 12,
  // A defect of the library; it is unharmed, and the results are not to be used.
  DLA_STATUS_INTERNAL = 13,
} dla_status;

// Dtype of q, k, v, o and their gradients.
typedef enum {
  // IEEE single precision.
  DLA_DTYPE_F32 = 0,
  // bfloat16.
  DLA_DTYPE_BF16 = 1,
  // IEEE half precision.
  DLA_DTYPE_F16 = 2,
} dla_dtype;

// How slots evolve.
typedef enum {
  // `S <- e^g S`.
  DLA_RECURRENCE_GATED = 0,
  // `S <- e^g (S - beta k (k^T S))`.
  DLA_RECURRENCE_GATED_DELTA = 1,
} dla_recurrence;

// Which pair of slots merges.
typedef enum {
  // Least drift per token.
  DLA_MERGE_DENSITY = 0,
  // Least summed drift.
  DLA_MERGE_MASS = 1,
} dla_merge;

// Where read weights come from.
typedef enum {
  // lambda.
  DLA_READ_GIVEN = 0,
  // `sigmoid(slope q . kappa + bias + logits)`.
  DLA_READ_ROUTED = 1,
} dla_read;

// Which slot column 0 of lambda and of the logits weighs.
typedef enum {
  // The oldest.
  DLA_SLOT_ORDER_OLDEST_FIRST = 0,
  // The open one.
  DLA_SLOT_ORDER_NEWEST_FIRST = 1,
} dla_slot_order;

// Where the buffers of a call are.
typedef enum {
  // Memory of the host; calls return when they are done.
  DLA_DEVICE_CPU = 0,
  // Memory of a GPU, in its primary context; calls return when they are launched on the stream.
  DLA_DEVICE_CUDA = 1,
} dla_device;

// How entries keep their states.
typedef enum {
  // IEEE single precision.
  DLA_STATE_DTYPE_F32 = 0,
  // bfloat16 to read, and 8 more bits beside it that are touched only where a state is written. On a GPU alone.
  DLA_STATE_DTYPE_BF16 = 1,
} dla_state_dtype;

// States of N sequences: see `dla_cache_create`.
typedef struct dla_cache dla_cache;

// Entries of a decoding cache: see `dla_entries_create`. Calls of several threads take turns.
typedef struct dla_entries dla_entries;

// Options of a call: set by `dla_options_init`, then changed.
typedef struct {
  // `sizeof(dla_options)`.
  size_t size;
  // A `dla_recurrence`.
  int32_t recurrence;
  // A `dla_merge`.
  int32_t merge;
  // A `dla_read`.
  int32_t read;
  // A `dla_slot_order`.
  int32_t slot_order;
  // Most slots held, M, 1 to 64.
  int32_t capacity;
  // Not 0: q and k to unit norm first.
  int32_t qk_l2norm;
  // Drift from which a token opens a slot, 0 to 2; not read where the call has a `tau` of its own.
  float tau;
  // Factor of q; NaN: `dk^-1/2`.
  float scale;
  // Above 0: soft boundaries of this width in the backward; 0: none.
  float soft_temperature;
  // Not 0: soft boundaries carry the drift's gradient on into k, v and g.
  int32_t soft_through_drift;
} dla_options;

// An array: contiguous, row-major, exactly as many bytes as its extents say. `{NULL, 0}` is absent.
typedef struct {
  // Address of the first element: of the host, or of the GPU.
  void *data;
  // Bytes.
  size_t bytes;
} dla_buffer;

// Arrays of a state cache, chronological: slot 0 is the oldest, unused slots are zero.
typedef struct {
  // Slot states, `[N,HV,M,dk,dv]` f32.
  dla_buffer states;
  // Slots held, `[N,HV]` u32.
  dla_buffer len;
  // Tokens of every slot, `[N,HV,M]` u32.
  dla_buffer tokens;
  // Summed drift of every slot in units of 2^-12, `[N,HV,M]` u32.
  dla_buffer drift;
  // The open segment's plain decayed sum, `[N,HV,dk,dv]` f32.
  dla_buffer open;
  // Key sums of every slot, `[N,HV,M,dk]` f32; with routed reads.
  dla_buffer keys;
} dla_cache_arrays;
// No array.
#define dla_cache_arrays_ABSENT (dla_cache_arrays){ .states = dla_buffer_ABSENT, .len = dla_buffer_ABSENT, .tokens = dla_buffer_ABSENT, .drift = dla_buffer_ABSENT, .open = dla_buffer_ABSENT, .keys = dla_buffer_ABSENT }

// Extents, place and arguments of a call.
typedef struct {
  // `sizeof(dla_call)`.
  size_t size;
  // A `dla_device`.
  int32_t device;
  // GPU, counted from 0.
  int32_t ordinal;
  // CUDA stream that the call takes its turn on; NULL is the default stream.
  void *stream;
  // On a GPU: as many bytes as the workspace function of the call says, a multiple of 256 its address; free again when
  // the stream has come past the call.
  dla_buffer workspace;
  // A `dla_dtype`: of q, k, v, o and their gradients.
  int32_t dtype;
  // Zero.
  int32_t reserved;
  // B.
  size_t batch;
  // T.
  size_t time;
  // H.
  size_t heads;
  // HV, a multiple of H.
  size_t value_heads;
  // Key dimension.
  size_t dk;
  // Value dimension.
  size_t dv;
  // N, the number of packed sequences, where there are `cu_seqlens`; else 0.
  size_t sequences;
  // Columns of lambda, M or more; 0: M.
  size_t lambda_columns;
  // Columns of the route's logits, M or more; 0: M.
  size_t logit_columns;
  // Queries, `[B,T,H,dk]`.
  dla_buffer q;
  // Keys, `[B,T,H,dk]`.
  dla_buffer k;
  // Values, `[B,T,HV,dv]`.
  dla_buffer v;
  // Log decay, `[B,T,HV]` f32, at most 0; absent is 0.
  dla_buffer g;
  // Write strength of the gated delta rule, `[B,T,HV]` f32.
  dla_buffer beta;
  // Given reads: weights, `[B,T,HV,lambda_columns]` f32.
  dla_buffer lambda;
  // Routed reads: slope, `[HV]` f32.
  dla_buffer route_slope;
  // Routed reads: bias, `[HV]` f32.
  dla_buffer route_bias;
  // Routed reads: logits, `[B,T,HV,logit_columns]` f32; absent is 0.
  dla_buffer route_logits;
  // Drift from which a token opens a slot, `[HV]` f32; absent: that of the options for every head.
  dla_buffer tau;
  // Event log, `[B,T,HV]` u8. Forward and step: the caller's own; absent, it is computed. Backward: the forward's.
  dla_buffer events;
  // Offsets of packed sequences, `[N+1]` i64, from 0 to T; B = 1.
  dla_buffer cu_seqlens;
  // Cache to resume from; NULL: sequences begin empty.
  const dla_cache_arrays *cache;
} dla_call;

// Where the results of a forward or a step go. What is absent is not wanted.
typedef struct {
  // `sizeof(dla_results)`.
  size_t size;
  // Output, `[B,T,HV,dv]`; never absent.
  dla_buffer o;
  // Drift of every token, `[B,T,HV]` f32.
  dla_buffer drift;
  // Event log, `[B,T,HV]` u8: the backward needs it.
  dla_buffer events;
  // Routed reads: read weights, `[B,T,HV,M]` f32.
  dla_buffer lambda;
  // Final cache; NULL: not wanted. Not the arrays of the initial one. A step takes none: it changes its own.
  const dla_cache_arrays *cache;
} dla_results;

// Gradients of the results, given to a backward; and results that it need not compute again.
typedef struct {
  // `sizeof(dla_upstream)`.
  size_t size;
  // Gradient of o, `[B,T,HV,dv]`.
  dla_buffer o;
  // Gradient of the final cache, of which states, open and keys are read; what is absent is 0.
  const dla_cache_arrays *cache;
  // The forward's drift, `[B,T,HV]` f32. Read on a GPU alone, with soft boundaries or a gradient of the final cache;
  // absent, it is computed again.
  dla_buffer drift;
  // Routed reads: the forward's read weights, `[B,T,HV,M]` f32. Read on a GPU alone; absent, they are computed again.
  dla_buffer lambda;
} dla_upstream;

// Where the gradients of a backward go: extents as the arguments'. What is absent is not wanted.
typedef struct {
  // `sizeof(dla_gradients)`.
  size_t size;
  // Of q.
  dla_buffer q;
  // Of k.
  dla_buffer k;
  // Of v.
  dla_buffer v;
  // Of g, f32; where g was given.
  dla_buffer g;
  // Of beta, f32.
  dla_buffer beta;
  // Of given read weights, f32, as many columns.
  dla_buffer lambda;
  // Of the route's slope, `[HV]` f32.
  dla_buffer route_slope;
  // Of the route's bias, `[HV]` f32.
  dla_buffer route_bias;
  // Of the route's logits, f32, as many columns.
  dla_buffer route_logits;
  // Of tau, `[HV]` f32; with soft boundaries.
  dla_buffer tau;
  // Of the drift, `[B,T,HV]` f32; with soft boundaries.
  dla_buffer drift;
  // Of the initial cache: states, open and keys; NULL: not wanted.
  const dla_cache_arrays *cache;
} dla_gradients;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the library: "0.1.0".
const char *dla_version(void);

// What was wrong with this thread's last call that failed: the argument, what was expected and what came, in one line.
// Valid until the next call of the thread that fails.
const char *dla_error_message(void);

// Whether a GPU can be used: this build has kernels, there is a driver, and it shows a GPU. The message says what is
// missing.
dla_status dla_cuda_available(void);

// Sets options to their defaults, those of the paper. `size` is `sizeof(dla_options)`.
//
// Safety:
// `options` is null or points to `size` bytes.
dla_status dla_options_init(dla_options *options, size_t size);

// Bytes of workspace that `dla_forward` needs for a call of these extents and results; of the buffers only whether they
// are there, and their bytes, are read. On the CPU: 0.
//
// Safety:
// Every pointer is null or what its type says.
dla_status dla_forward_workspace(const dla_options *options,
                                 const dla_call *call,
                                 const dla_results *results,
                                 size_t *bytes);

// All tokens of all sequences: `o`, and what else `results` has room for.
//
// Safety:
// Every pointer is null or what its type says; buffers hold their bytes, on the device of the call. Outputs overlap
// nothing else. On a GPU all of it stays until the stream has come past the call, and what the host cannot see holds:
// cu_seqlens runs from 0 to T without descending, a given log holds events that can happen, an initial cache at most M
// slots a row and a token or more a slot, g is at most 0.
dla_status dla_forward(const dla_options *options,
                       const dla_call *call,
                       const dla_results *results);

// Bytes of workspace that `dla_backward` needs, as `dla_forward_workspace` says. On the CPU: 0.
//
// Safety:
// Every pointer is null or what its type says.
dla_status dla_backward_workspace(const dla_options *options,
                                  const dla_call *call,
                                  const dla_upstream *upstream,
                                  const dla_gradients *gradients,
                                  size_t *bytes);

// Gradients of the arguments from those of the results. `call` is that of the forward, with its log as `events`.
//
// Safety:
// As `dla_forward`.
dla_status dla_backward(const dla_options *options,
                        const dla_call *call,
                        const dla_upstream *upstream,
                        const dla_gradients *gradients);

// Bytes of workspace that `dla_step` needs. On the CPU: 0.
//
// Safety:
// Every pointer is null or what its type says.
dla_status dla_step_workspace(const dla_options *options,
                              const dla_call *call,
                              const dla_results *results,
                              size_t *bytes);

// One token per batch entry (T = 1), in place: batch entry b continues sequence b of `cache`. On a GPU all states are
// moved three times.
//
// Safety:
// As `dla_forward`; the cache's arrays are used by nobody else meanwhile.
dla_status dla_step(const dla_options *options,
                    const dla_call *call,
                    const dla_cache_arrays *cache,
                    const dla_results *results);

// A cache of sequences that have not begun, on the device of the call, for its extents and options; no buffer of the call
// is read. `*cache` is set where the status is `DLA_STATUS_OK`, else NULL.
//
// Safety:
// Every pointer is null or what its type says.
dla_status dla_cache_create(const dla_options *options,
                            const dla_call *call,
                            dla_cache **cache);

// The arrays of a cache, to be given to forward, backward and step; they live as long as the cache.
//
// Safety:
// `cache` is null or of `dla_cache_create` and not destroyed; `arrays` is null or points to a `dla_cache_arrays`.
dla_status dla_cache_view(const dla_cache *cache, dla_cache_arrays *arrays);

// Frees a cache; on a GPU, wait for the stream first. NULL is no cache, and nothing happens.
//
// Safety:
// `cache` is null or of `dla_cache_create`, and not used again.
void dla_cache_destroy(dla_cache *cache);

// A cache for decoding: `count` free entries on the device and the stream of the call, for its options and extents (HV, dk,
// dv, M, recurrence, read; of the others and the buffers none is kept). `states` is a `dla_state_dtype`. `*entries` is set
// where the status is `DLA_STATUS_OK`, else NULL.
//
// Safety:
// Every pointer is null or what its type says; on a GPU the stream outlives the handle.
dla_status dla_entries_create(const dla_options *options,
                              const dla_call *call,
                              size_t count,
                              int32_t states,
                              dla_entries **entries);

// Frees entries, once their stream has come past all that was launched. NULL is none, and nothing happens.
//
// Safety:
// `entries` is null or of `dla_entries_create`, and not used again; graphs that were captured with it neither.
void dla_entries_destroy(dla_entries *entries);

// Takes a free entry for a sequence that has not begun, and writes its index to `*entry`. Where all are taken:
// `DLA_STATUS_VALUE`.
//
// Safety:
// `entries` is null or a handle; `entry` is null or points to a `size_t`.
dla_status dla_entries_take(dla_entries *entries, size_t *entry);

// Frees an entry. Rows of a captured step that name it are to be set anew before the graph is replayed.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_release(dla_entries *entries, size_t entry);

// Forgets what an entry holds: its sequence has not begun.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_reset(dla_entries *entries, size_t entry);

// Makes entry `to` what entry `from` is.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_copy(dla_entries *entries, size_t from, size_t to);

// Copies entries into chronological arrays of `count` sequences (N = count), on the device of the entries. An entry may come
// twice. On a GPU it waits for the stream.
//
// Safety:
// `entries` is null or a handle; `list` is null or points to `count` indices of the host; `to` is null or such arrays.
dla_status dla_entries_export(dla_entries *entries,
                              const size_t *list,
                              size_t count,
                              const dla_cache_arrays *to);

// Makes entries what the sequences of chronological arrays are, one each; the arrays are on the device of the entries. On a
// GPU it waits for the stream.
//
// Safety:
// As `dla_entries_export`.
dla_status dla_entries_import(dla_entries *entries,
                              const size_t *list,
                              size_t count,
                              const dla_cache_arrays *from);

// Has a captured step of `batch` rows use other entries when it is replayed: row b uses `list[b]`; rows past `count` rest, and
// nothing of theirs is read or written. In the stream's order. All steps of a batch size share their rows, and `dla_entries_step`
// sets them too. On the CPU entries are only checked.
//
// Safety:
// `entries` is null or a handle; `list` is null or points to `count` indices of the host.
dla_status dla_entries_set_rows(dla_entries *entries,
                                size_t batch,
                                const size_t *list,
                                size_t count);

// One to eight tokens a row, in place: batch row b goes on in entry `list[b]`, and `count` is B. On a GPU the call launches on
// the stream of the entries, which must be the call's, and returns; it needs no workspace, allocates nothing after the first
// call of a shape and its options, copies the list where it is another than in the last call of that batch size, and can be captured
// into a graph after a call with the same list.
//
// Safety:
// As `dla_forward`; `entries` is null or a handle; `list` is null or points to `count` indices of the host.
dla_status dla_entries_step(dla_entries *entries,
                            const dla_options *options,
                            const dla_call *call,
                            const size_t *list,
                            size_t count,
                            const dla_results *results);

// Bytes of workspace that `dla_entries_prefill` needs, as `dla_forward_workspace` says. On the CPU: 0.
//
// Safety:
// Every pointer is null or what its type says; `entries` is null or a handle.
dla_status dla_entries_prefill_workspace(dla_entries *entries,
                                         const dla_options *options,
                                         const dla_call *call,
                                         const dla_results *results,
                                         size_t *bytes);

// A forward over any number of tokens: sequence n goes on from entry `from[n]` and leaves its states in entry `to[n]`, which may
// be the same; `count` is N. An entry may come twice in `from`: sequences with a common beginning. On a GPU it launches and returns, and
// cannot be captured.
//
// Safety:
// As `dla_forward`; `entries` is null or a handle; each list is null or points to `count` indices of the host.
dla_status dla_entries_prefill(dla_entries *entries,
                               const dla_options *options,
                               const dla_call *call,
                               const size_t *from,
                               const size_t *to,
                               size_t count,
                               const dla_results *results);

// A cache for decoding: `count` free entries on the device and the stream of the call, for its options and extents (HV, dk,
// dv, M, recurrence, read; of the others and the buffers none is kept). `states` is a `dla_state_dtype`. `*entries` is set
// where the status is `DLA_STATUS_OK`, else NULL.
//
// Safety:
// Every pointer is null or what its type says; on a GPU the stream outlives the handle.
dla_status dla_entries_create(const dla_options *options,
                              const dla_call *call,
                              size_t count,
                              int32_t states,
                              dla_entries **entries);

// Frees entries, once their stream has come past all that was launched. NULL is none, and nothing happens.
//
// Safety:
// `entries` is null or of `dla_entries_create`, and not used again; graphs that were captured with it neither.
void dla_entries_destroy(dla_entries *entries);

// Takes a free entry for a sequence that has not begun, and writes its index to `*entry`. Where all are taken:
// `DLA_STATUS_VALUE`.
//
// Safety:
// `entries` is null or a handle; `entry` is null or points to a `size_t`.
dla_status dla_entries_take(dla_entries *entries, size_t *entry);

// Frees an entry. Rows of a captured step that name it are to be set anew before the graph is replayed.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_release(dla_entries *entries, size_t entry);

// Forgets what an entry holds: its sequence has not begun.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_reset(dla_entries *entries, size_t entry);

// Makes entry `to` what entry `from` is.
//
// Safety:
// `entries` is null or a handle.
dla_status dla_entries_copy(dla_entries *entries, size_t from, size_t to);

// Copies entries into chronological arrays of `count` sequences (N = count), on the device of the entries. An entry may come
// twice. On a GPU it waits for the stream.
//
// Safety:
// `entries` is null or a handle; `list` is null or points to `count` indices of the host; `to` is null or such arrays.
dla_status dla_entries_export(dla_entries *entries,
                              const size_t *list,
                              size_t count,
                              const dla_cache_arrays *to);

// Makes entries what the sequences of chronological arrays are, one each; the arrays are on the device of the entries. On a
// GPU it waits for the stream.
//
// Safety:
// As `dla_entries_export`.
dla_status dla_entries_import(dla_entries *entries,
                              const size_t *list,
                              size_t count,
                              const dla_cache_arrays *from);

// Has a captured step of `batch` rows use other entries when it is replayed: row b uses `list[b]`; rows past `count` rest, and
// nothing of theirs is read or written. In the stream's order. All steps of a batch size share their rows, and `dla_entries_step`
// sets them too. On the CPU entries are only checked.
//
// Safety:
// `entries` is null or a handle; `list` is null or points to `count` indices of the host.
dla_status dla_entries_set_rows(dla_entries *entries,
                                size_t batch,
                                const size_t *list,
                                size_t count);

// One to eight tokens a row, in place: batch row b goes on in entry `list[b]`, and `count` is B. On a GPU the call launches on
// the stream of the entries, which must be the call's, and returns; it needs no workspace, allocates nothing after the first
// call of a shape and its options, copies the list where it is another than in the last call of that batch size, and can be captured
// into a graph after a call with the same list.
//
// Safety:
// As `dla_forward`; `entries` is null or a handle; `list` is null or points to `count` indices of the host.
dla_status dla_entries_step(dla_entries *entries,
                            const dla_options *options,
                            const dla_call *call,
                            const size_t *list,
                            size_t count,
                            const dla_results *results);

// Bytes of workspace that `dla_entries_prefill` needs, as `dla_forward_workspace` says. On the CPU: 0.
//
// Safety:
// Every pointer is null or what its type says; `entries` is null or a handle.
dla_status dla_entries_prefill_workspace(dla_entries *entries,
                                         const dla_options *options,
                                         const dla_call *call,
                                         const dla_results *results,
                                         size_t *bytes);

// A forward over any number of tokens: sequence n goes on from entry `from[n]` and leaves its states in entry `to[n]`, which may
// be the same; `count` is N. An entry may come twice in `from`: sequences with a common beginning. On a GPU it launches and returns, and
// cannot be captured.
//
// Safety:
// As `dla_forward`; `entries` is null or a handle; each list is null or points to `count` indices of the host.
dla_status dla_entries_prefill(dla_entries *entries,
                               const dla_options *options,
                               const dla_call *call,
                               const size_t *from,
                               const size_t *to,
                               size_t count,
                               const dla_results *results);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DLA_H */
