//! The kernels' parameters: `#[repr(C)]` twins of `kernels/abi.cuh`, where every field is described. Sizes
//! and offsets are asserted on both sides. Device pointers are their addresses; 0 is null.
//!
//! Also what a launch of each kernel takes beside its parameters: grid and shared memory. Blocks have
//! [`THREADS`] threads, those of `segment_gram_*` and `segment_*` [`SEGMENT_THREADS`].

// Fields are described once, in abi.cuh.
#![allow(missing_docs)]

use std::mem::{offset_of, size_of};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// Threads of a block of `segment_gram_*` and `segment_*`.
pub const SEGMENT_THREADS: u32 = 128;

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

/// Parameters of `prepare_sm90_bf16`.
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
    pub from: i64,
    pub to: i64,
    pub lambda_columns: i32,
    pub slots: i32,
    pub scale: f32,
    pub qk_l2norm: i32,
}

/// Parameters of `scan_sm90_*`.
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
    pub banks: DevicePointer,
    pub o: DevicePointer,
    pub states: DevicePointer,
    pub from: i64,
    pub to: i64,
}

/// Bytes of a `DeltaPlan`.
pub const DELTA_PLAN_BYTES: usize = 208;

/// Parameters of `prepare_delta_sm90_bf16`.
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
    pub width: i32,
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

const _: () = {
    assert!(size_of::<PrepareDeltaSm90Params>() == 200);
    assert!(offset_of!(PrepareDeltaSm90Params, pairs) == 112);
    assert!(offset_of!(PrepareDeltaSm90Params, from) == 160);
    assert!(offset_of!(PrepareDeltaSm90Params, qk_l2norm) == 192);
    assert!(size_of::<ScanDeltaSm90Params>() == 168);
    assert!(offset_of!(ScanDeltaSm90Params, initial_len) == 104);
    assert!(offset_of!(ScanDeltaSm90Params, from) == 152);
    assert!(size_of::<PrepareSm90Params>() == 176 && offset_of!(PrepareSm90Params, pairs) == 120);
    assert!(offset_of!(PrepareSm90Params, lambda_columns) == 160);
    assert!(size_of::<GammasSm90Params>() == 64 && offset_of!(GammasSm90Params, gammas) == 56);
    assert!(size_of::<ScanSm90Params>() == 152 && offset_of!(ScanSm90Params, initial_len) == 96);
    assert!(offset_of!(ScanSm90Params, from) == 136);
    assert!(size_of::<Extents>() == 48 && offset_of!(Extents, heads) == 24);
    assert!(offset_of!(Extents, newest_first) == 44);
    assert!(size_of::<SegmentParams>() == 280 && offset_of!(SegmentParams, k) == 48);
    assert!(offset_of!(SegmentParams, drift) == 120 && offset_of!(SegmentParams, open) == 160);
    assert!(offset_of!(SegmentParams, walks) == 200 && offset_of!(SegmentParams, from) == 256);
    assert!(offset_of!(SegmentParams, qk_l2norm) == 276);
    assert!(size_of::<PrepareParams>() == 120 && offset_of!(PrepareParams, p) == 80);
    assert!(offset_of!(PrepareParams, scale) == 112);
    assert!(size_of::<RouteSumsParams>() == 88 && offset_of!(RouteSumsParams, sums) == 56);
    assert!(offset_of!(RouteSumsParams, qk_l2norm) == 80);
    assert!(size_of::<RouteParams>() == 200 && offset_of!(RouteParams, sums) == 88);
    assert!(offset_of!(RouteParams, slope) == 136 && offset_of!(RouteParams, logit_columns) == 192);
    assert!(size_of::<ScanParams>() == 184 && offset_of!(ScanParams, p) == 96);
    assert!(offset_of!(ScanParams, bank) == 144 && offset_of!(ScanParams, lambda_columns) == 168);
};

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
        64 * 8 + 3 * 64 * 4 + (64 * 65 * 4).max(Self::tile(self.parts, 64, 64))
    }

    /// Shared memory of `segment_*`, SEGMENT_SHARED_BYTES of abi.cuh: the same for every size.
    pub fn segment_shared_bytes(&self) -> usize {
        9280
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
    /// Groups of 128 threads, each with 8 columns of dv; under the delta rule they share 8.
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
        if self.delta { "prepare_delta_sm90_bf16" } else { "prepare_sm90_bf16" }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        128 * (self.groups as u32 + 1)
    }

    /// Columns of dv of a block.
    pub fn columns(&self) -> usize {
        if self.delta { 8 } else { 8 * self.groups }
    }

    /// Places that have weights.
    pub fn weight_slots(&self) -> usize {
        self.slots.next_multiple_of(4)
    }

    /// Shared memory.
    pub fn shared_bytes(&self) -> usize {
        if self.delta {
            return self.slots * self.dk * 16
                + 2 * self.dk * self.dk * 2
                + 2 * 64 * self.dk * 2
                + 64 * self.dk * 2
                + 64 * self.slots * 4
                + 2 * 64 * 8 * 2
                + 2 * 128 * 16
                + 2 * DELTA_PLAN_BYTES
                + 2 * 4 * self.dk * 32
                + 64;
        }
        // The largest has no room for P . Lambda and weights.
        let direct = self.slots * self.dk > 32 * 128;
        let read = if direct { PLAN_REST } else { 64 * self.weight_slots() * 4 + PAIR_BLOCKS * 512 };
        let plans = 2 * (PLAN_CHANGES + self.slots * SLOT_CHANGE_BYTES);
        self.bank_bytes() + read + 64 * self.dk * 2 + 3 * self.groups * 64 * 8 * 2 + plans + 64
    }

    /// Shared memory of the kernel that prepares for it.
    pub fn prepare_shared_bytes(&self, geometry: &Geometry) -> usize {
        let lambda = 64 * geometry.capacity * 4;
        if self.delta {
            let replay = geometry.replay_shared_bytes() + 2 * 64 * 2;
            return replay
                + 64 * 8
                + 3 * 64 * 4
                + 3 * 64
                + DELTA_PLAN_BYTES
                + 4 * Geometry::tile(2, 64, 64)
                + lambda;
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
        if packed {
            geometry.chunks()
        } else {
            geometry.sequences * to.min(time).saturating_sub(from).div_ceil(64)
        }
    }

    /// Elements (u32) of P . Lambda.
    pub fn pairs_len(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * if self.delta { 10 } else { PAIR_BLOCKS } * 32 * 4
    }

    /// Elements (f32) of the weights.
    pub fn weights_len(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * 64 * self.weight_slots()
    }

    /// Bytes of the plans.
    pub fn plans_bytes(&self, geometry: &Geometry, places: usize) -> usize {
        places * geometry.value_heads * if self.delta { DELTA_PLAN_BYTES } else { CHUNK_PLAN_BYTES }
    }

    /// Elements (u32) of Qt, delta rule.
    pub fn queries_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * 64 * self.dk / 2 } else { 0 }
    }

    /// Elements (u16) of the transitions, delta rule.
    pub fn transition_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * self.dk * self.dk } else { 0 }
    }

    /// Elements (u16) of Kh, delta rule.
    pub fn writes_len(&self, geometry: &Geometry, places: usize) -> usize {
        if self.delta { places * geometry.value_heads * 2 * 64 * self.dk } else { 0 }
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
