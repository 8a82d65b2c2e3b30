//! The kernels' parameters: `#[repr(C)]` twins of `kernels/abi.cuh`, where every field is described. Sizes
//! and offsets are asserted on both sides. Device pointers are their addresses; 0 is null.
//!
//! Also what a launch of each kernel takes beside its parameters: grid and shared memory. Blocks have
//! [`THREADS`] threads, those of `segment_gram_*` [`SEGMENT_THREADS`], those of `segment_*` as many a row.

// Fields are described once, in abi.cuh.
#![allow(missing_docs)]

use std::mem::{offset_of, size_of};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// Threads of a block of `segment_gram_*`, and of a row of `segment_*`.
pub const SEGMENT_THREADS: u32 = 128;

/// Rows that a block of `segment_*` takes at most.
pub const SEGMENT_ROWS: usize = 4;

/// Bytes of a row's record between two windows of `segment_*`.
pub const SEGMENT_STATE_BYTES: usize = 1608;

/// Windows of `segment_*` begin at multiples of this.
pub const SEGMENT_WINDOW: usize = 64;

/// Address on the device; 0 is null.
pub type DevicePointer = u64;

/// Shape of a call.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Extents {
    pub cu_seqlens: DevicePointer,
    pub sequences: i64,
    pub time: i64,
    pub heads: i32,
    pub value_heads: i32,
    pub dk: i32,
    pub dv: i32,
    pub capacity: i32,
    pub newest_first: i32,
}

/// Parameters of `segment_gram_*` and `segment_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SegmentParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub tau: DevicePointer,
    pub log: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_tokens: DevicePointer,
    pub initial_drift: DevicePointer,
    pub initial_open: DevicePointer,
    pub drift: DevicePointer,
    pub events: DevicePointer,
    pub len: DevicePointer,
    pub tokens: DevicePointer,
    pub summed_drift: DevicePointer,
    pub open: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub chunk_place: DevicePointer,
    pub chunk_log: DevicePointer,
    pub walks: DevicePointer,
    pub reach: DevicePointer,
    pub energy: DevicePointer,
    pub factor: DevicePointer,
    pub totals: DevicePointer,
    pub next: DevicePointer,
    pub state: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub mass: i32,
    pub qk_l2norm: i32,
}

/// Parameters of `prepare_gated_*` and `prepare_delta_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub g: DevicePointer,
    pub beta: DevicePointer,
    pub p: DevicePointer,
    pub qt: DevicePointer,
    pub w: DevicePointer,
    pub kh: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub scale: f32,
    pub qk_l2norm: i32,
}

/// Parameters of `route_sums_*` and `route_bases_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteSumsParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub sums: DevicePointer,
    pub bases: DevicePointer,
    pub key_factors: DevicePointer,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `route_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub events: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub sums: DevicePointer,
    pub bases: DevicePointer,
    pub key_factors: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_tokens: DevicePointer,
    pub initial_keys: DevicePointer,
    pub slope: DevicePointer,
    pub bias: DevicePointer,
    pub logits: DevicePointer,
    pub lambda: DevicePointer,
    pub keys: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub logit_columns: i32,
    pub qk_l2norm: i32,
}

/// Parameters of `scan_gated_*` and `scan_delta_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub p: DevicePointer,
    pub qt: DevicePointer,
    pub w: DevicePointer,
    pub kh: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_states: DevicePointer,
    pub bank: DevicePointer,
    pub o: DevicePointer,
    pub states: DevicePointer,
    pub lambda_columns: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Bytes of a `ChunkPlan`.
pub const CHUNK_PLAN_BYTES: usize = 3360;
/// Bytes of it before its changes, of one of these, and of what the last chunk alone has.
const PLAN_CHANGES: usize = 592;
const SLOT_CHANGE_BYTES: usize = 32;
const PLAN_REST: usize = 720;
/// Blocks of 16 x 16 of a chunk's P . Lambda.
const PAIR_BLOCKS: usize = 26;
/// Threads of `gammas_sm90`, and its shared memory.
pub const GAMMAS_THREADS: u32 = 1024;
pub const GAMMAS_SHARED_BYTES: usize = 2 * 32 * 8;

/// Parameters of `gammas_sm90`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GammasSm90Params {
    pub extents: Extents,
    pub g: DevicePointer,
    pub gammas: DevicePointer,
}

/// Parameters of `prepare_sm90_bf16` and `prepare_queries_sm90_bf16`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub chunk_place: DevicePointer,
    pub gammas: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub plans: DevicePointer,
    pub normed: DevicePointer,
    pub entry_factor: DevicePointer,
    pub slot_of: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub lambda_columns: i32,
    pub slots: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
}

/// Parameters of `scan_sm90_*` and `scan_queries_sm90_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub plans: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_states: DevicePointer,
    pub source: DevicePointer,
    pub banks: DevicePointer,
    pub o: DevicePointer,
    pub thin_q: DevicePointer,
    pub d_reads: DevicePointer,
    pub states: DevicePointer,
    pub from: i64,
    pub to: i64,
}

/// Bytes of a `BackwardPlan`.
pub const BACKWARD_PLAN_BYTES: usize = 1344;

/// Parameters of `prepare_backward_sm90_bf16`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareBackwardSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub d_o: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub chunk_place: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub plans: DevicePointer,
    pub d_weights: DevicePointer,
    pub d_g: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub lambda_columns: i32,
    pub slots: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
}

/// Parameters of `scan_backward_sm90_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanBackwardSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub d_o: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub plans: DevicePointer,
    pub initial_len: DevicePointer,
    pub final_states: DevicePointer,
    pub initial_states: DevicePointer,
    pub carried: DevicePointer,
    pub out: DevicePointer,
    pub flow: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub exchanged: i32,
    pub out_f32: i32,
}

const _: () = assert!(
    size_of::<PrepareBackwardSm90Params>() == 200
        && offset_of!(PrepareBackwardSm90Params, pairs) == 128
        && offset_of!(PrepareBackwardSm90Params, lambda_columns) == 184
);
const _: () = assert!(
    size_of::<ScanBackwardSm90Params>() == 176
        && offset_of!(ScanBackwardSm90Params, initial_len) == 104
        && offset_of!(ScanBackwardSm90Params, exchanged) == 168
);

/// Parameters of `lambda_backward_sm90`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct LambdaBackwardSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub d_reads: DevicePointer,
    pub entry_factor: DevicePointer,
    pub slot_of: DevicePointer,
    pub d_weights: DevicePointer,
    pub dlambda: DevicePointer,
    pub d_slots: DevicePointer,
    pub read: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub places: i64,
    pub slices: i32,
    pub slots: i32,
    pub lambda_columns: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `anchors_sm90`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct AnchorsSm90Params {
    pub extents: Extents,
    pub carried: DevicePointer,
    pub banks: DevicePointer,
    pub initial_states: DevicePointer,
    pub entry_factor: DevicePointer,
    pub anchors: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub width: i32,
    pub carried_slots: i32,
    pub bank_slots: i32,
    pub groups: i32,
    pub factor_slots: i32,
    pub reserved: i32,
}

/// Parameters of `end_anchors_sm90`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct EndAnchorsSm90Params {
    pub extents: Extents,
    pub gradient: DevicePointer,
    pub states: DevicePointer,
    pub anchors: DevicePointer,
}

/// Parameters of `g_flow_sm90` and `g_backward_sm90`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GBackwardSm90Params {
    pub extents: Extents,
    pub plans: DevicePointer,
    pub read: DevicePointer,
    pub flow: [DevicePointer; 2],
    pub net: DevicePointer,
    pub d_g: DevicePointer,
    pub anchors: DevicePointer,
    pub end_anchors: DevicePointer,
    pub carried_g: DevicePointer,
    pub carried: DevicePointer,
    pub dg: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub slices: [i32; 2],
    pub anchor_slices: i32,
    pub reserved: i32,
}

const _: () = {
    assert!(size_of::<LambdaBackwardSm90Params>() == 192);
    assert!(offset_of!(LambdaBackwardSm90Params, dlambda) == 120);
    assert!(offset_of!(LambdaBackwardSm90Params, slices) == 168);
    assert!(size_of::<AnchorsSm90Params>() == 128 && offset_of!(AnchorsSm90Params, from) == 88);
    assert!(offset_of!(AnchorsSm90Params, width) == 104);
    assert!(size_of::<EndAnchorsSm90Params>() == 72);
    assert!(size_of::<GBackwardSm90Params>() == 168 && offset_of!(GBackwardSm90Params, dg) == 128);
    assert!(offset_of!(GBackwardSm90Params, slices) == 152);
};

/// Bytes of a `DeltaPlan`.
pub const DELTA_PLAN_BYTES: usize = 208;

/// Tokens of a chunk of the delta rule's prepare and scan on Hopper.
pub const DELTA_CHUNK: usize = 128;

/// Parameters of `prepare_delta_sm90_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareDeltaSm90Params {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub g: DevicePointer,
    pub beta: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_place: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub queries: DevicePointer,
    pub transition: DevicePointer,
    pub writes: DevicePointer,
    pub plans: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub lambda_columns: i32,
    pub slots: i32,
    pub alternate: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `scan_delta_sm90_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanDeltaSm90Params {
    pub extents: Extents,
    pub v: DevicePointer,
    pub pairs: DevicePointer,
    pub weights: DevicePointer,
    pub queries: DevicePointer,
    pub transition: DevicePointer,
    pub writes: DevicePointer,
    pub plans: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_states: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_place: DevicePointer,
    pub o: DevicePointer,
    pub states: DevicePointer,
    pub from: i64,
    pub to: i64,
}

/// Bytes of a `BankPlaces`.
pub const BANK_PLACES_BYTES: usize = 576;

/// Parameters of `slots_maps` and `slots`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SlotsParams {
    pub extents: Extents,
    pub events: DevicePointer,
    pub initial_len: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub chunk_place: DevicePointer,
    pub chunk: i32,
    pub parts: i32,
}

/// Parameters of `scan_states_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanStatesParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub chunk_len: DevicePointer,
    pub w: DevicePointer,
    pub kh: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_states: DevicePointer,
    pub source: DevicePointer,
    pub bank: DevicePointer,
    pub entries: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `scan_backward_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ScanBackwardParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub d_o: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub p: DevicePointer,
    pub qt: DevicePointer,
    pub w: DevicePointer,
    pub kh: DevicePointer,
    pub initial_len: DevicePointer,
    pub entries: DevicePointer,
    pub scratch: DevicePointer,
    pub d_bank: DevicePointer,
    pub final_states: DevicePointer,
    pub initial_gradient: DevicePointer,
    pub d_qt: DevicePointer,
    pub d_kh: DevicePointer,
    pub d_w: DevicePointer,
    pub d_kd: DevicePointer,
    pub d_weights: DevicePointer,
    pub d_total: DevicePointer,
    pub d_v: DevicePointer,
    pub dv: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub places: i64,
    pub lambda_columns: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `prepare_backward_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PrepareBackwardParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub beta: DevicePointer,
    pub d_o: DevicePointer,
    pub events: DevicePointer,
    pub lambda: DevicePointer,
    pub chunk_len: DevicePointer,
    pub d_qt: DevicePointer,
    pub d_kh: DevicePointer,
    pub d_w: DevicePointer,
    pub d_kd: DevicePointer,
    pub d_weights: DevicePointer,
    pub d_total: DevicePointer,
    pub d_q: DevicePointer,
    pub d_k: DevicePointer,
    pub dg: DevicePointer,
    pub dbeta: DevicePointer,
    pub dlambda: DevicePointer,
    pub d_slots: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub places: i64,
    pub slices: i32,
    pub lambda_columns: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
}

/// Parameters of `group_sum_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GroupSumParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub d_q: DevicePointer,
    pub d_k: DevicePointer,
    pub dq: DevicePointer,
    pub dk: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `drift_backward_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DriftBackwardParams {
    pub extents: Extents,
    pub v: DevicePointer,
    pub d_v: DevicePointer,
    pub events: DevicePointer,
    pub drift: DevicePointer,
    pub chunk_len: DevicePointer,
    pub tau: DevicePointer,
    pub ddrift: DevicePointer,
    pub tau_sums: DevicePointer,
    pub dv: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub temperature: f32,
    pub reserved: i32,
}

/// Parameters of `route_backward_*` and `route_backward_keys_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteBackwardParams {
    pub extents: Extents,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub events: DevicePointer,
    pub chunk_len: DevicePointer,
    pub chunk_starts: DevicePointer,
    pub sums: DevicePointer,
    pub bases: DevicePointer,
    pub key_factors: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_tokens: DevicePointer,
    pub initial_keys: DevicePointer,
    pub slope: DevicePointer,
    pub bias: DevicePointer,
    pub logits: DevicePointer,
    pub d_slots: DevicePointer,
    pub final_keys: DevicePointer,
    pub d_q: DevicePointer,
    pub d_k: DevicePointer,
    pub dlogits: DevicePointer,
    pub slope_sums: DevicePointer,
    pub bias_sums: DevicePointer,
    pub d_bank: DevicePointer,
    pub exits: DevicePointer,
    pub d_keys: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub logit_columns: i32,
    pub qk_l2norm: i32,
}

/// Parameters of `head_sums`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadSumsParams {
    pub extents: Extents,
    pub sums: DevicePointer,
    pub out: DevicePointer,
    pub chunk: i32,
    pub add: i32,
}

/// Parameters of `segment_states_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SegmentStatesParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub energy: DevicePointer,
    pub factor: DevicePointer,
    pub initial_open: DevicePointer,
    pub entry: DevicePointer,
    pub entry_log: DevicePointer,
    pub open: DevicePointer,
    pub open_log: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub stride: i64,
    pub saves: i64,
    pub entry_step: i64,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

/// Parameters of `segment_scalars_*`, `segment_open_backward_*`, `segment_backward_*` and `segment_log_backward_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SegmentBackwardParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub events: DevicePointer,
    pub energy: DevicePointer,
    pub factor: DevicePointer,
    pub drift: DevicePointer,
    pub ddrift: DevicePointer,
    pub open: DevicePointer,
    pub open_log: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_open: DevicePointer,
    pub final_open: DevicePointer,
    pub d_v: DevicePointer,
    pub dv: DevicePointer,
    pub d_k: DevicePointer,
    pub dg: DevicePointer,
    pub scalars: DevicePointer,
    pub d_open: DevicePointer,
    pub d_carried: DevicePointer,
    pub d_carried_scalars: DevicePointer,
    pub from: i64,
    pub to: i64,
    pub qk_l2norm: i32,
    pub reserved: i32,
}

const _: () = {
    assert!(size_of::<ScanStatesParams>() == 168 && offset_of!(ScanStatesParams, initial_len) == 104);
    assert!(offset_of!(ScanStatesParams, entries) == 136 && offset_of!(ScanStatesParams, qk_l2norm) == 160);
    assert!(size_of::<SlotsParams>() == 96 && offset_of!(SlotsParams, chunk_len) == 64);
    assert!(offset_of!(SlotsParams, chunk) == 88);
    assert!(size_of::<ScanBackwardParams>() == 296 && offset_of!(ScanBackwardParams, final_states) == 176);
    assert!(offset_of!(ScanBackwardParams, qk_l2norm) == 288);
    assert!(size_of::<PrepareBackwardParams>() == 256 && offset_of!(PrepareBackwardParams, d_weights) == 152);
    assert!(offset_of!(PrepareBackwardParams, qk_l2norm) == 252);
    assert!(size_of::<GroupSumParams>() == 120 && offset_of!(GroupSumParams, dq) == 80);
    assert!(offset_of!(GroupSumParams, qk_l2norm) == 112);
    assert!(size_of::<DriftBackwardParams>() == 144 && offset_of!(DriftBackwardParams, ddrift) == 96);
    assert!(offset_of!(DriftBackwardParams, temperature) == 136);
    assert!(size_of::<RouteBackwardParams>() == 264 && offset_of!(RouteBackwardParams, logits) == 152);
    assert!(offset_of!(RouteBackwardParams, qk_l2norm) == 260);
    assert!(size_of::<HeadSumsParams>() == 72 && offset_of!(HeadSumsParams, out) == 56);
    assert!(offset_of!(HeadSumsParams, chunk) == 64);
    assert!(size_of::<SegmentStatesParams>() == 184 && offset_of!(SegmentStatesParams, open) == 120);
    assert!(offset_of!(SegmentStatesParams, qk_l2norm) == 176);
    assert!(size_of::<SegmentBackwardParams>() == 240 && offset_of!(SegmentBackwardParams, d_v) == 152);
    assert!(offset_of!(SegmentBackwardParams, qk_l2norm) == 232);
    assert!(size_of::<PrepareDeltaSm90Params>() == 200);
    assert!(offset_of!(PrepareDeltaSm90Params, pairs) == 112);
    assert!(offset_of!(PrepareDeltaSm90Params, from) == 160);
    assert!(offset_of!(PrepareDeltaSm90Params, qk_l2norm) == 192);
    assert!(size_of::<ScanDeltaSm90Params>() == 168);
    assert!(offset_of!(ScanDeltaSm90Params, initial_len) == 104);
    assert!(offset_of!(ScanDeltaSm90Params, from) == 152);
    assert!(size_of::<PrepareSm90Params>() == 200 && offset_of!(PrepareSm90Params, pairs) == 120);
    assert!(offset_of!(PrepareSm90Params, lambda_columns) == 184);
    assert!(size_of::<GammasSm90Params>() == 64 && offset_of!(GammasSm90Params, gammas) == 56);
    assert!(size_of::<ScanSm90Params>() == 176 && offset_of!(ScanSm90Params, initial_len) == 96);
    assert!(offset_of!(ScanSm90Params, from) == 160);
    assert!(size_of::<Extents>() == 48 && offset_of!(Extents, heads) == 24);
    assert!(offset_of!(Extents, newest_first) == 44);
    assert!(size_of::<SegmentParams>() == 280 && offset_of!(SegmentParams, k) == 48);
    assert!(offset_of!(SegmentParams, drift) == 120 && offset_of!(SegmentParams, open) == 160);
    assert!(offset_of!(SegmentParams, walks) == 200 && offset_of!(SegmentParams, from) == 256);
    assert!(offset_of!(SegmentParams, qk_l2norm) == 276);
    assert!(size_of::<PrepareParams>() == 136 && offset_of!(PrepareParams, p) == 80);
    assert!(offset_of!(PrepareParams, scale) == 128);
    assert!(size_of::<RouteSumsParams>() == 88 && offset_of!(RouteSumsParams, sums) == 56);
    assert!(offset_of!(RouteSumsParams, qk_l2norm) == 80);
    assert!(size_of::<RouteParams>() == 200 && offset_of!(RouteParams, sums) == 88);
    assert!(offset_of!(RouteParams, slope) == 136 && offset_of!(RouteParams, logit_columns) == 192);
    assert!(size_of::<ScanParams>() == 184 && offset_of!(ScanParams, p) == 96);
    assert!(offset_of!(ScanParams, bank) == 144 && offset_of!(ScanParams, lambda_columns) == 168);
};

/// Places for states of an entry and value head beyond M.
pub const STEP_SPARE_PLACES: usize = 2;

/// Tokens whose transition a slot's state may lack, delta rule.
pub const STEP_RING: usize = 7;

/// Bytes of a `StepRecord`. All zeros: the sequence has not begun.
pub const STEP_RECORD_BYTES: usize = 1200;

/// Arrays of a cache's entries.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct StepBank {
    pub states: DevicePointer,
    pub rest: DevicePointer,
    pub keys: DevicePointer,
    pub ring: DevicePointer,
    pub records: DevicePointer,
    pub arrived: DevicePointer,
    pub entries: i64,
}

/// Parameters of `step_gated_*` and `step_delta_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct StepParams {
    pub bank: StepBank,
    pub entries: DevicePointer,
    pub q: DevicePointer,
    pub k: DevicePointer,
    pub v: DevicePointer,
    pub g: DevicePointer,
    pub beta: DevicePointer,
    pub lambda: DevicePointer,
    pub slope: DevicePointer,
    pub bias: DevicePointer,
    pub logits: DevicePointer,
    pub tau: DevicePointer,
    pub log: DevicePointer,
    pub o: DevicePointer,
    pub drift: DevicePointer,
    pub events: DevicePointer,
    pub weights: DevicePointer,
    pub batch: i64,
    pub time: i32,
    pub from: i32,
    pub tokens: i32,
    pub heads: i32,
    pub value_heads: i32,
    pub dk: i32,
    pub dv: i32,
    pub capacity: i32,
    pub slices: i32,
    pub width: i32,
    pub lambda_columns: i32,
    pub logit_columns: i32,
    pub dtype: i32,
    pub newest_first: i32,
    pub mass: i32,
    pub qk_l2norm: i32,
    pub scale: f32,
    pub ahead: i32,
}

/// Parameters of `step_gather_*` and `step_scatter_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct StepCacheParams {
    pub bank: StepBank,
    pub entries: DevicePointer,
    pub states: DevicePointer,
    pub len: DevicePointer,
    pub tokens: DevicePointer,
    pub drift: DevicePointer,
    pub open: DevicePointer,
    pub keys: DevicePointer,
    pub list: DevicePointer,
    pub sequences: i64,
    pub value_heads: i32,
    pub dk: i32,
    pub dv: i32,
    pub capacity: i32,
}

const _: () = {
    assert!(size_of::<StepBank>() == 56 && size_of::<StepParams>() == 264);
    assert!(offset_of!(StepParams, q) == 64 && offset_of!(StepParams, batch) == 184);
    assert!(offset_of!(StepParams, ahead) == 260);
    assert!(size_of::<StepCacheParams>() == 144 && offset_of!(StepCacheParams, sequences) == 120);
};

/// One of the kernels of step: `step_{recurrence}_{states}_{tokens}`, and those that take entries to a chronological
/// cache and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepForm {
    /// Gated delta rule.
    pub delta: bool,
    /// States in bf16, with a second plane.
    pub bf16: bool,
    /// Most tokens of a launch: 1, 4 or 8.
    pub tokens: usize,
    /// Every slot is read before it is decided what becomes of them; gated, of one token alone, and of 256 columns a block at most.
    pub early: bool,
}

impl StepForm {
    fn recurrence(&self) -> &'static str {
        if self.delta { "delta" } else { "gated" }
    }

    fn states(&self) -> &'static str {
        if self.bf16 { "bf16" } else { "f32" }
    }

    /// Name of the kernel.
    pub fn name(&self) -> String {
        let early = if self.early { "_early" } else { "" };
        format!("step_{}_{}_{}{early}", self.recurrence(), self.states(), self.tokens)
    }

    /// Name of the kernel that makes a chronological cache of entries.
    pub fn gather_name(&self) -> String {
        format!("step_gather_{}_{}", self.recurrence(), self.states())
    }

    /// Name of the kernel that makes entries of a chronological cache.
    pub fn scatter_name(&self) -> String {
        format!("step_scatter_{}", self.states())
    }

    /// Shared memory, a block having `width` columns of dv, of slots up to `capacity`.
    pub fn shared_bytes(&self, dk: usize, dv: usize, width: usize, capacity: usize) -> usize {
        let (t, ring) = (self.tokens, if self.delta { STEP_RING } else { 0 });
        let list = ring + t;
        let floats = 3 * t + 4 * t * t + t * list + 8 * (t + 1) + 64 * (4 * t + 1) + 2;
        let fixed = 2 * STEP_RECORD_BYTES + 8 * t + 4 * floats + 64 + 7 * 64 + 64 * t + t * t + t;
        let array = |floats: usize| (4 * floats).next_multiple_of(16);
        let delta = |floats: usize| if self.delta { array(floats) } else { 0 };
        fixed.next_multiple_of(16)
            + array(t * dk)
            + array(list * dk)
            + array(t * dv)
            + delta(list * dk)
            + delta(t * (ring + 1) * dk)
            + delta(list * width)
            + if self.early {
                array(capacity * width)
            } else {
                array(if self.delta { 4 } else { 1 } * 8 * width)
            }
    }

    /// Shared memory of the kernel that makes a chronological cache of entries.
    pub fn gather_shared_bytes(&self, dk: usize, dv: usize) -> usize {
        let array = |floats: usize| (4 * floats).next_multiple_of(16);
        2 * array(STEP_RING * dk) + array(STEP_RING * dv) + array(4 * 8 * dv)
    }
}

/// Sizes that launches and workspaces are made of.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// bf16 planes of an operand: 1 for bf16 inputs, else 2.
    pub parts: usize,
    /// Sequences N.
    pub sequences: usize,
    /// Tokens B x T.
    pub tokens: usize,
    /// Key heads H.
    pub heads: usize,
    /// Value heads HV.
    pub value_heads: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
    /// Most slots, M.
    pub capacity: usize,
    /// Gated delta rule.
    pub delta: bool,
}

impl Geometry {
    /// Tokens C of a chunk.
    pub fn chunk(&self) -> usize {
        64 / self.parts
    }

    /// Places of chunks, used or not: chunk c of a sequence stands at `start / C + n + c`.
    pub fn chunks(&self) -> usize {
        self.tokens / self.chunk() + self.sequences
    }

    /// Rows N x HV.
    pub fn rows(&self) -> usize {
        self.sequences * self.value_heads
    }

    /// dk as computed.
    pub fn padded_dk(&self) -> usize {
        self.dk.next_multiple_of(16)
    }

    /// Slices of 16 value columns.
    pub fn slices(&self) -> usize {
        self.dv.div_ceil(16)
    }

    /// Elements of P.
    pub fn p_len(&self) -> usize {
        self.chunks() * self.value_heads * self.parts * self.chunk() * self.chunk()
    }

    /// Elements of each of Qt, W and Kh.
    pub fn prepared_len(&self) -> usize {
        self.chunks() * self.value_heads * self.parts * self.chunk() * self.padded_dk()
    }

    /// Elements of the scan's bank.
    pub fn bank_len(&self) -> usize {
        self.rows() * self.slices() * 16 * self.capacity * self.padded_dk()
    }

    /// Bytes of one operand in shared memory.
    fn tile(parts: usize, rows: usize, width: usize) -> usize {
        parts * rows * (width + 8) * 2
    }

    /// Blocks of `segment_gram_*`.
    pub fn segment_gram_blocks(&self) -> usize {
        self.chunks() * self.value_heads * self.chunk() / 32
    }

    /// Elements of `chunk_starts`, `chunk_place` and `chunk_log`.
    pub fn chunk_slots_len(&self) -> usize {
        self.chunks() * self.value_heads * self.capacity
    }

    /// Elements of `reach`, `energy`, `factor` and `next`; of `walks` 32 times as many, of `totals` a 32nd.
    pub fn starts_len(&self) -> usize {
        self.chunks() * self.value_heads * self.chunk()
    }

    /// Shared memory of `segment_gram_*`.
    pub fn segment_gram_shared_bytes(&self) -> usize {
        let operands = if self.parts == 1 {
            Self::tile(1, 64, self.padded_dk()) + Self::tile(1, 64, self.dv.next_multiple_of(16))
        } else {
            // An f32 in three planes, f16 in two of them.
            Self::tile(3, 64, 64)
        };
        64 * 8 + 3 * 64 * 4 + (32 * 66 * 4).max(operands)
    }

    /// Rows of a block of `segment_*` on a card of `processors` multiprocessors. `beside`: while the scan runs, whose
    /// blocks want a multiprocessor each; else rows share one where there are more, and where there are many, registers
    /// hold six rows in blocks of two, four in a block of four.
    pub fn segment_rows(&self, processors: usize, beside: bool) -> usize {
        let share = match self.rows().div_ceil(processors.max(1)) {
            _ if beside => SEGMENT_ROWS,
            share @ ..=SEGMENT_ROWS => share,
            _ => 2,
        };
        share.min(self.rows()).max(1)
    }

    /// Shared memory of a row of `segment_*`, SEGMENT_SHARED_BYTES of abi.cuh: the same for every size.
    pub fn segment_shared_bytes(&self) -> usize {
        11472
    }

    /// Shared memory of `prepare_*`.
    pub fn prepare_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let columns = chunk * 8 + 3 * chunk * 4;
        if self.delta {
            columns + 3 * Self::tile(2, chunk, 64) + 2 * Self::tile(2, chunk, chunk)
        } else {
            columns + 2 * Self::tile(self.parts, chunk, 64)
        }
    }

    /// Shared memory of a chunk's replay.
    fn replay_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        2 * chunk + chunk * (64 + chunk)
    }

    /// Elements of route's `sums`, f32.
    pub fn route_sums_len(&self) -> usize {
        self.chunks() * self.heads * self.chunk() / 8 * self.dk
    }

    /// Elements of route's `bases`, f64.
    pub fn route_bases_len(&self) -> usize {
        self.chunks() * self.heads * self.dk
    }

    /// Blocks of `route_sums_*`.
    pub fn route_sums_blocks(&self) -> usize {
        self.chunks().saturating_mul(self.heads)
    }

    /// Blocks of `route_bases_*`.
    pub fn route_bases_blocks(&self) -> usize {
        self.sequences.saturating_mul(self.heads * self.dk / 8)
    }

    /// Blocks of `route_*` for the window `from..to` of every sequence; `packed`: there are cu_seqlens.
    pub fn route_blocks(&self, time: usize, packed: bool, from: usize, to: usize) -> usize {
        let places = if packed {
            self.chunks()
        } else {
            self.sequences * to.min(time).saturating_sub(from).div_ceil(self.chunk()).max(1)
        };
        places.saturating_mul(self.value_heads)
    }

    /// Shared memory of `route_sums_*`.
    pub fn route_sums_shared_bytes(&self) -> usize {
        self.chunk() * 4 + self.chunk() / 8 * self.dk * 4
    }

    /// Shared memory of `route_bases_*`.
    pub fn route_bases_shared_bytes(&self) -> usize {
        THREADS as usize * 8
    }

    /// Shared memory of `route_*`.
    pub fn route_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let slots = self.capacity.next_multiple_of(16);
        let width = if self.dk > 64 && self.capacity <= 32 { 128 } else { 64 };
        let items = 3 * chunk + 64 + chunk + (chunk * 65).next_multiple_of(16);
        let bounds = 2 * (65usize * 4).next_multiple_of(16);
        let counts = ((64 + chunk + 1) * 8).next_multiple_of(16) + 2 * chunk * 4;
        let operands = 2 * Self::tile(self.parts, chunk, width)
            + Self::tile(2, slots, width)
            + (self.capacity + 1) * width * 4;
        let scores = chunk * (slots + chunk + 1) * 4;
        let sums = chunk * (slots + 1) * 4;
        let rest = if self.dk <= width { operands.max(scores + sums) } else { scores + operands.max(sums) };
        items + bounds + counts + rest.next_multiple_of(16)
    }

    /// Shared memory of `scan_*`.
    pub fn scan_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let pitch = (chunk + 1) * 4;
        let rows = Self::tile(self.parts, chunk, self.padded_dk());
        let operands = if self.delta { 2 * rows } else { rows };
        self.replay_shared_bytes()
            + 2 * 64 * 2
            + 64 * 8
            + chunk * 8
            + 2 * chunk * 4
            + 2 * 64
            + (self.capacity * pitch).next_multiple_of(16)
            + Self::tile(self.parts, chunk, 16)
            + operands.max(8 * 16 * pitch).max(Self::tile(2, chunk, chunk))
    }

    /// Bytes of a bank of states and where its slots lie (abi.cuh, BankPlaces).
    pub fn bank_bytes(&self) -> usize {
        4 * self.bank_len() + self.rows() * self.slices() * BANK_PLACES_BYTES
    }

    /// Bytes of the entry banks of `places` chunks, two planes of every state.
    pub fn entries_bytes(&self, places: usize) -> usize {
        places * self.value_heads * self.slices() * self.capacity * (self.padded_dk() / 16) * 2 * 32 * 16
    }

    /// Bytes of the scratch of `scan_backward_*`.
    pub fn scan_backward_scratch_bytes(&self) -> usize {
        let chunk = self.chunk();
        let held = if self.delta { chunk / 16 * 6 * 512 } else { 0 };
        self.rows() * self.slices() * self.capacity * (8 * chunk * 4 + held)
    }

    /// Shared memory of `scan_states_*`.
    pub fn scan_states_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let width = self.padded_dk();
        let keys = Self::tile(self.parts, chunk, width);
        // Where there is no room for both, keys take turns with W.
        let beside = if self.parts == 1 && width > 128 { 0 } else { keys };
        self.replay_shared_bytes()
            + 2 * 64 * 2
            + 64 * 8
            + chunk * 8
            + chunk * 4
            + 2 * 64
            + if self.delta {
                Self::tile(self.parts, chunk, 16) + Self::tile(2, chunk, width) + beside
            } else {
                Self::tile(2, chunk, 16) + keys
            }
    }

    /// Shared memory of `scan_backward_*`.
    pub fn scan_backward_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let weights = (self.capacity * (chunk + 2) * 4).next_multiple_of(16);
        let width = self.padded_dk();
        let rows = if self.delta {
            Self::tile(2, chunk, 2 * width.min(128))
        } else {
            Self::tile(self.parts, chunk, width) + (chunk * 17 * 4).next_multiple_of(16)
        };
        // What all threads know of the chunk.
        96 + self.replay_shared_bytes()
            + 2 * 64 * 2
            + chunk * 8
            + 2 * chunk * 4
            + 8 * 8
            + 2 * 64
            + if self.delta { weights } else { 2 * weights }
            + 2 * Self::tile(self.parts, chunk, 16)
            + rows.max(Self::tile(2, chunk, chunk))
    }

    /// Places of chunks W of the backward's window `from..to` of every sequence of at most `time` tokens.
    pub fn window_places(&self, time: usize, from: usize, to: usize) -> usize {
        self.sequences * to.min(time).saturating_sub(from).div_ceil(self.chunk())
    }

    /// Blocks of a kernel with one for every place of a window and value head.
    pub fn window_blocks(&self, places: usize) -> usize {
        places.saturating_mul(self.value_heads)
    }

    /// Elements of each of `d_qt`, `d_kh`, `d_w` and `d_kd` for `places` of chunks.
    pub fn scan_partials_len(&self, places: usize) -> usize {
        self.slices() * places * self.value_heads * self.chunk() * self.padded_dk()
    }

    /// Elements of the partial `d_weights`.
    pub fn weight_partials_len(&self, places: usize) -> usize {
        self.slices() * self.slot_gradients_len(places)
    }

    /// Elements of the partial `d_total`, f64.
    pub fn total_partials_len(&self, places: usize) -> usize {
        self.slices() * places * self.value_heads
    }

    /// Elements of `d_slots`.
    pub fn slot_gradients_len(&self, places: usize) -> usize {
        places * self.value_heads * self.chunk() * self.capacity
    }

    /// Elements of each of `d_q` and `d_k`, of every value head.
    pub fn head_gradients_len(&self, places: usize) -> usize {
        places * self.value_heads * self.chunk() * self.dk
    }

    /// Shared memory of `prepare_backward_*`.
    pub fn prepare_backward_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        // The delta rule takes three planes of f32, and has room for them in f16.
        let (planes, deep) = if self.delta && self.parts == 2 { (3, 3) } else { (self.parts, 2) };
        let square = Self::tile(deep, chunk, chunk);
        let columns = self.replay_shared_bytes() + 3 * chunk * 8 + 5 * chunk * 4;
        let slices = Self::tile(planes, chunk, 64) + Self::tile(deep, chunk, 64);
        let matrices = chunk * (chunk + 1) * 4;
        let scratch = matrices + (chunk * 65).next_multiple_of(16);
        let reused = (square + slices.max(scratch)).max(2 * matrices);
        let squares = if self.delta { 4 * chunk / 16 * chunk * 4 + 2 * square } else { square };
        columns + squares + reused
    }

    /// Blocks of `group_sum_*`.
    pub fn group_sum_blocks(&self, places: usize) -> usize {
        places.saturating_mul(self.heads)
    }

    /// Shared memory of `route_backward_*`.
    pub fn route_backward_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let slots = self.capacity.next_multiple_of(16);
        let items = self.replay_shared_bytes()
            + (65usize * 4).next_multiple_of(16)
            + ((64 + chunk + 1) * 8).next_multiple_of(16)
            + 2 * chunk * 4
            + 2 * 8 * 8
            + Self::tile(2, chunk, slots + chunk);
        let keys = Self::tile(self.parts, chunk, 64).max((self.capacity + 1) * 64 * 4);
        let operands = Self::tile(self.parts, chunk, 64) + Self::tile(2, slots, 64) + keys;
        let scores =
            chunk * (slots + chunk + 1) * 4 + chunk * (slots + 1) * 4 + (chunk * 65).next_multiple_of(16);
        items + operands.max(scores)
    }

    /// Blocks of `route_backward_keys_*`.
    pub fn route_backward_keys_blocks(&self) -> usize {
        self.rows().saturating_mul(self.dk.div_ceil(32))
    }

    /// Shared memory of `route_backward_keys_*`.
    pub fn route_backward_keys_shared_bytes(&self) -> usize {
        2 * self.capacity * 32 * 4 + 64 + self.chunk()
    }

    /// Elements of route's `d_bank`.
    pub fn key_bank_gradients_len(&self, places: usize) -> usize {
        places * self.value_heads * self.capacity * self.dk
    }

    /// Bytes of route's `exits`.
    pub fn exits_len(&self, places: usize) -> usize {
        places * self.value_heads * (64 + self.chunk())
    }

    /// Shared memory of `drift_backward_*`.
    pub fn drift_backward_shared_bytes(&self) -> usize {
        self.chunk() * 8
    }

    /// Elements of `open` and of `d_open` for `places` of chunks; of `open_log` one for `dk` x `dv` of them.
    pub fn open_states_len(&self, places: usize) -> usize {
        places * self.value_heads * self.dk * self.dv
    }

    /// Elements of the `scalars` of segment's adjoint, f64.
    pub fn segment_scalars_len(&self, places: usize) -> usize {
        places * self.value_heads * (8 * self.chunk() + 8)
    }

    /// Elements of `d_carried_scalars`, f64.
    pub fn carried_scalars_len(&self) -> usize {
        self.rows() * (1 + self.slices())
    }

    /// Blocks of `segment_states_*` and of `segment_open_backward_*`.
    pub fn segment_states_blocks(&self) -> usize {
        self.rows().saturating_mul(self.slices())
    }

    /// Shared memory of `segment_states_*` and of `segment_open_backward_*`.
    pub fn segment_states_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        chunk * 12 + Self::tile(2, chunk, self.padded_dk()) + Self::tile(self.parts, chunk, 16)
    }

    /// Shared memory of `segment_scalars_*`.
    pub fn segment_scalars_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let operands = Self::tile(self.parts, chunk, 64) + Self::tile(2, 64, 64);
        chunk * (6 * 8 + 6 * 4) + 8 * 8 + operands.max(chunk * (chunk + 1) * 4)
    }

    /// Shared memory of `segment_backward_*`.
    pub fn segment_backward_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let open = 2 * Self::tile(2, 64, 64);
        chunk * (4 * 8 + 10 * 4)
            + 8 * 8
            + 2 * Self::tile(2, chunk, chunk)
            + Self::tile(self.parts, chunk, 64)
            + open.max(chunk * (chunk + 1) * 4)
    }

    /// Elements of each head's parts of the gradients of slope, bias and tau, f64.
    pub fn head_parts_len(&self) -> usize {
        self.chunks() * self.value_heads
    }

    /// Shared memory of `head_sums`; its blocks are value heads.
    pub fn head_sums_shared_bytes(&self) -> usize {
        THREADS as usize * 8
    }
}

/// One of the scans on Hopper: `scan_sm90_{dk}_{slots}_{groups}` (the table at the end of scan_sm90.cu) or, for the
/// delta rule, `scan_delta_sm90_{dk}_{slots}`. Workspaces are sized in `places` of chunks, [`ScanSm90::places`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanSm90 {
    /// Gated delta rule.
    pub delta: bool,
    /// Key dimension as computed.
    pub dk: usize,
    /// Places for slots.
    pub slots: usize,
    /// Groups of 128 threads.
    pub groups: usize,
}

impl ScanSm90 {
    const GATED: [(usize, usize, usize); 10] = [
        (64, 16, 2),
        (64, 30, 2),
        (64, 32, 2),
        (64, 64, 1),
        (128, 16, 2),
        (128, 30, 2),
        (128, 30, 1),
        (128, 32, 1),
        (128, 64, 1),
        (256, 16, 1),
    ];
    const DELTA: [(usize, usize, usize); 4] = [(64, 16, 2), (64, 32, 2), (128, 16, 2), (128, 32, 2)];

    /// The scan for a problem on a card of `processors` multiprocessors; `None` where the portable one computes it: inputs
    /// other than bf16, dk above 128 with more than 16 slots, the delta rule with dk above 128 or more than 32 slots.
    pub fn choose(geometry: &Geometry, processors: usize) -> Option<Self> {
        if geometry.parts != 1 {
            return None;
        }
        let delta = geometry.delta;
        let table: &[_] = if delta { &Self::DELTA } else { &Self::GATED };
        let fits =
            |&&(dk, slots, _): &&(usize, usize, usize)| dk >= geometry.dk && slots >= geometry.capacity;
        // Two groups a block where that leaves no multiprocessor idle.
        let crowded = geometry.rows() * geometry.dv.div_ceil(16) * 2 > processors;
        let mut fitting = table.iter().filter(fits);
        let &(dk, slots, groups) = fitting.next()?;
        let scan = ScanSm90 { delta, dk, slots, groups };
        let thin = table.contains(&(dk, slots, 1));
        Some(if crowded || !thin { scan } else { ScanSm90 { groups: 1, ..scan } })
    }

    /// Name of the kernel.
    pub fn name(&self) -> String {
        if self.delta {
            format!("scan_delta_sm90_{}_{}", self.dk, self.slots)
        } else {
            format!("scan_sm90_{}_{}_{}", self.dk, self.slots, self.groups)
        }
    }

    /// File that it is in.
    pub fn stage(&self) -> &'static str {
        if self.delta { "scan_delta_sm90" } else { "scan_sm90" }
    }

    /// Name of the kernel that prepares for it.
    pub fn prepare_name(&self) -> &'static str {
        match (self.delta, self.dk) {
            (false, _) => "prepare_sm90_bf16",
            (true, 64) => "prepare_delta_sm90_64",
            (true, _) => "prepare_delta_sm90_128",
        }
    }

    /// File that it is in.
    pub fn prepare_stage(&self) -> &'static str {
        if self.delta { "prepare_delta_sm90" } else { "prepare_sm90" }
    }

    /// Tokens of a chunk; windows begin at multiples of this.
    pub fn chunk(&self) -> usize {
        if self.delta { DELTA_CHUNK } else { 64 }
    }

    /// Columns of dv of a group of threads: eight, or half of them where a group's registers hold no more.
    fn group_columns(&self) -> usize {
        if self.delta && self.slots * self.dk > 2048 { 4 } else { 8 }
    }

    /// Whether a thread of the scan has every other slot (`PrepareDeltaSm90Params::alternate`).
    pub fn alternate(&self) -> bool {
        self.group_columns() == 4
    }

    /// Threads of a block: groups of columns, the gated scan's writer, those that bring.
    pub fn threads(&self) -> u32 {
        128 * (self.groups as u32 + if self.delta { 1 } else { 2 })
    }

    /// Columns of dv of a block.
    pub fn columns(&self) -> usize {
        self.group_columns() * self.groups
    }

    /// Places that have weights.
    pub fn weight_slots(&self) -> usize {
        self.slots.next_multiple_of(4)
    }

    /// Shared memory.
    pub fn shared_bytes(&self) -> usize {
        if self.delta {
            return 4 * self.slots * self.group_columns() * self.dk
                + self.dk * self.dk * 2
                + 2 * DELTA_CHUNK * self.dk * 2
                + DELTA_CHUNK * self.slots * 4
                + 48 * 512
                + 2 * 2 * DELTA_CHUNK * 16
                + 2 * DELTA_PLAN_BYTES
                + self.slots
                + 96;
        }
        // The largest has no room for P . Lambda and weights.
        let direct = self.slots * self.dk > 32 * 128;
        let read = if direct { PLAN_REST } else { 64 * self.weight_slots() * 4 + PAIR_BLOCKS * 512 };
        let plans = 2 * (PLAN_CHANGES + self.slots * SLOT_CHANGE_BYTES);
        self.bank_bytes() + read + 64 * self.dk * 2 + 2 * self.groups * 64 * 8 * 2 + plans + 112
    }

    /// Shared memory of the kernel that prepares for it.
    pub fn prepare_shared_bytes(&self, geometry: &Geometry) -> usize {
        let lambda = 64 * geometry.capacity * 4;
        if self.delta {
            let replay = 3 * DELTA_CHUNK + DELTA_CHUNK * 5 * 4;
            let per_token = DELTA_CHUNK * 8 + 5 * DELTA_CHUNK * 4 + DELTA_CHUNK;
            let plan = 32 + 32 + 48 + DELTA_PLAN_BYTES;
            return replay
                + per_token
                + plan
                + 8 * 16 * 17 * 4
                + DELTA_CHUNK * geometry.capacity * 4
                + DELTA_CHUNK * self.dk * 2
                + 3 * 2 * 64 * 64 * 2;
        }
        let replay = 3 * 64 + (64 + 64) * 68 + 2 * 64 * 2;
        let numbers = 2 * 64 * 8 + 4 * 64 * 4 + 4 * 64 * 4 + 3 * 64;
        replay + CHUNK_PLAN_BYTES + numbers + 3 * Geometry::tile(1, 64, geometry.padded_dk()) + lambda
    }

    /// Bytes that a block of the gated scan leaves to the next window's.
    pub fn bank_bytes(&self) -> usize {
        if self.delta { 0 } else { self.groups * (self.slots * self.dk * 24 + 64) }
    }

    /// Places of chunks for the window `from..to` of every sequence; `packed`: there are cu_seqlens.
    pub fn places(geometry: &Geometry, time: usize, packed: bool, from: usize, to: usize) -> usize {
        let chunk = if geometry.delta { DELTA_CHUNK } else { 64 };
        if packed {
            geometry.tokens / chunk + geometry.sequences
        } else {
            geometry.sequences * to.min(time).saturating_sub(from).div_ceil(chunk)
        }
    }

    /// Elements (u32) of P . Lambda.
    pub fn pairs_len(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * if self.delta { 48 } else { PAIR_BLOCKS } * 32 * 4
    }

    /// Elements (f32) of the weights.
    pub fn weights_len(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * self.chunk() * self.weight_slots()
    }

    /// Bytes of the plans.
    pub fn plans_bytes(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * if self.delta { DELTA_PLAN_BYTES } else { CHUNK_PLAN_BYTES }
    }

    /// Elements (u32) of Qt, delta rule.
    pub fn queries_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * DELTA_CHUNK * self.dk / 2 } else { 0 }
    }

    /// Elements (u16) of the transitions, delta rule.
    pub fn transition_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * self.dk * self.dk } else { 0 }
    }

    /// Elements (u16) of Kh, delta rule.
    pub fn writes_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * DELTA_CHUNK * self.dk } else { 0 }
    }

    /// Blocks of the kernel that prepares for it.
    pub fn prepare_blocks(geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads
    }

    /// Blocks of the scan.
    pub fn blocks(&self, geometry: &Geometry) -> usize {
        geometry.rows() * geometry.dv.div_ceil(self.columns())
    }
}

/// The forward scan on Hopper with q -> do, k -> v, v -> k, gated, for dQ: `scan_queries_sm90_{dv}_{slots}_{groups}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanQueriesSm90(ScanSm90);

impl ScanQueriesSm90 {
    const TABLE: [(usize, usize, usize); 6] =
        [(64, 16, 2), (64, 32, 2), (128, 16, 2), (128, 30, 2), (128, 30, 1), (128, 32, 1)];

    /// The scan for a problem on a card of `processors` multiprocessors, which a launch has `sequences` sequences of; `None`
    /// where there is none: inputs other than bf16, the delta rule, more than 32 slots, dv above 128.
    pub fn choose(geometry: &Geometry, processors: usize, sequences: usize) -> Option<Self> {
        if geometry.parts != 1 || geometry.delta {
            return None;
        }
        let fits = |&&(wide, slots, _): &&_| wide >= geometry.dv && slots >= geometry.capacity;
        let &(dk, slots, groups) = Self::TABLE.iter().find(fits)?;
        // One group a block where two would leave multiprocessors idle.
        let crowded = sequences * geometry.value_heads * geometry.dk.div_ceil(16) * 2 > processors;
        let groups = if !crowded && Self::TABLE.contains(&(dk, slots, 1)) { 1 } else { groups };
        Some(ScanQueriesSm90(ScanSm90 { delta: false, dk, slots, groups }))
    }

    /// What it reads and writes, as the kernel has it.
    fn exchanged(geometry: &Geometry) -> Geometry {
        Geometry { dk: geometry.dv, dv: geometry.dk, ..*geometry }
    }

    /// Name of the kernel.
    pub fn name(&self) -> String {
        format!("scan_queries_sm90_{}_{}_{}", self.0.dk, self.0.slots, self.0.groups)
    }

    /// Name of the kernel that carries the states on and reads nothing.
    pub fn states_name(&self) -> String {
        format!("scan_states_sm90_{}_{}_{}", self.0.dk, self.0.slots, self.0.groups)
    }

    /// Threads of a block of that: a writer for every group of columns, those that bring.
    pub fn states_threads(&self) -> u32 {
        128 * (self.0.groups as u32 + 1)
    }

    /// Places for slots.
    pub fn slots(&self) -> usize {
        self.0.slots
    }

    /// Groups of 8 columns of a block.
    pub fn groups(&self) -> usize {
        self.0.groups
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.0.threads()
    }

    /// Places that have weights.
    pub fn weight_slots(&self) -> usize {
        self.0.weight_slots()
    }

    /// Shared memory.
    pub fn shared_bytes(&self) -> usize {
        self.0.shared_bytes()
    }

    /// Shared memory of the kernel that prepares for it.
    pub fn prepare_shared_bytes(&self, geometry: &Geometry) -> usize {
        self.0.prepare_shared_bytes(&Self::exchanged(geometry))
    }

    /// Bytes that a block leaves to the next window's.
    pub fn bank_bytes(&self) -> usize {
        self.0.bank_bytes()
    }

    /// Elements (u32) of the pairs.
    pub fn pairs_len(&self, geometry: &Geometry, places: usize) -> usize {
        self.0.pairs_len(geometry, places)
    }

    /// Bytes of the plans.
    pub fn plans_bytes(&self, geometry: &Geometry, places: usize) -> usize {
        self.0.plans_bytes(geometry, places)
    }

    /// Blocks of the scan.
    pub fn blocks(&self, geometry: &Geometry) -> usize {
        self.0.blocks(&Self::exchanged(geometry))
    }
}

/// The reverse scan on Hopper, gated, for dV and, exchanged, for dK: `scan_backward_sm90_{width}_{slots}`. Workspaces are
/// sized in `places` of chunks, [`ScanSm90::places`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanBackwardSm90 {
    /// Width of q's and k's rows as computed; exchanged, of do's and v's.
    pub width: usize,
    /// Places for slots.
    pub slots: usize,
    /// For dK.
    pub exchanged: bool,
}

impl ScanBackwardSm90 {
    /// Name of the kernel that prepares for both.
    pub const PREPARE_NAME: &'static str = "prepare_backward_sm90_bf16";

    /// The scan for dV or dK; `None` where there is none: inputs other than bf16, the delta rule, more than 32 slots, head
    /// sizes above 128.
    pub fn choose(geometry: &Geometry, exchanged: bool) -> Option<Self> {
        let most = geometry.dk.max(geometry.dv);
        if geometry.parts != 1 || geometry.delta || geometry.capacity > 32 || most > 128 {
            return None;
        }
        let width = if exchanged { geometry.dv } else { geometry.dk };
        Some(ScanBackwardSm90 {
            width: if width <= 64 { 64 } else { 128 },
            slots: if geometry.capacity <= 16 { 16 } else { 32 },
            exchanged,
        })
    }

    /// Name of the kernel.
    pub fn name(&self) -> String {
        format!("scan_backward_sm90_{}_{}", self.width, self.slots)
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        384
    }

    /// Shared memory.
    pub fn shared_bytes(&self) -> usize {
        let chunk = 2 * 136 * self.width + 64 * self.slots * 4 + 26 * 512 + 2 * 64 * 8 * 2 + 720;
        2 * chunk + 16 * self.width * self.slots + 256 * self.width + 4096 + 48 + 160
    }

    /// Shared memory of the kernel that prepares.
    pub fn prepare_shared_bytes(geometry: &Geometry) -> usize {
        geometry.replay_shared_bytes()
            + 2 * 64 * 2
            + 2 * 64 * 8
            + 3 * 64 * 4
            + 4 * 64
            + 64 * 4
            + 64 * 4
            + 64 * 132
            + BACKWARD_PLAN_BYTES
            + 2 * 64 * geometry.capacity * 4
            + (64 * 132 * 4).max(3 * 64 * (geometry.dk.max(geometry.dv).next_multiple_of(16) + 8) * 2)
    }

    /// Elements (u32) of the pairs.
    pub fn pairs_len(geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * 2 * 26 * 128
    }

    /// Elements (f32) of the weights.
    pub fn weights_len(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * 64 * self.slots
    }

    /// Bytes of the plans.
    pub fn plans_bytes(geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * BACKWARD_PLAN_BYTES
    }

    /// Elements (f32) of `d_weights`.
    pub fn d_weights_len(geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * 64 * geometry.capacity
    }

    /// Elements (f32) of `d_g`.
    pub fn d_g_len(geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * 2 * 64
    }

    /// Slices of 8 columns: of dv, exchanged of dk.
    pub fn slices(&self, geometry: &Geometry) -> usize {
        if self.exchanged { geometry.dk / 8 } else { geometry.dv / 8 }
    }

    /// Blocks.
    pub fn blocks(&self, geometry: &Geometry) -> usize {
        geometry.rows() * self.slices(geometry)
    }

    /// Elements (f32) that go from window to window.
    pub fn carried_len(&self, geometry: &Geometry) -> usize {
        self.blocks(geometry) * (self.width * self.slots / 128 + 2) * 1024
    }

    /// Elements (f32) of `flow`.
    pub fn flow_len(&self, geometry: &Geometry) -> usize {
        self.slices(geometry) * geometry.tokens * geometry.value_heads
    }
}
