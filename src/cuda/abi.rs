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

/// Parameters of `route_bank_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteBankParams {
    pub extents: Extents,
    pub k: DevicePointer,
    pub events: DevicePointer,
    pub initial_len: DevicePointer,
    pub initial_tokens: DevicePointer,
    pub initial_keys: DevicePointer,
    pub bank_keys: DevicePointer,
    pub bank_tokens: DevicePointer,
    pub bank_len: DevicePointer,
    pub keys: DevicePointer,
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
    pub slope: DevicePointer,
    pub bias: DevicePointer,
    pub logits: DevicePointer,
    pub bank_keys: DevicePointer,
    pub bank_tokens: DevicePointer,
    pub bank_len: DevicePointer,
    pub lambda: DevicePointer,
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

const _: () = {
    assert!(size_of::<Extents>() == 48 && offset_of!(Extents, heads) == 24);
    assert!(offset_of!(Extents, newest_first) == 44);
    assert!(size_of::<SegmentParams>() == 280 && offset_of!(SegmentParams, k) == 48);
    assert!(offset_of!(SegmentParams, drift) == 120 && offset_of!(SegmentParams, open) == 160);
    assert!(offset_of!(SegmentParams, walks) == 200 && offset_of!(SegmentParams, from) == 256);
    assert!(offset_of!(SegmentParams, qk_l2norm) == 276);
    assert!(size_of::<PrepareParams>() == 120 && offset_of!(PrepareParams, p) == 80);
    assert!(offset_of!(PrepareParams, scale) == 112);
    assert!(size_of::<RouteBankParams>() == 128 && offset_of!(RouteBankParams, bank_keys) == 88);
    assert!(offset_of!(RouteBankParams, qk_l2norm) == 120);
    assert!(size_of::<RouteParams>() == 136 && offset_of!(RouteParams, bank_keys) == 96);
    assert!(offset_of!(RouteParams, logit_columns) == 128);
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

    /// Shared memory of `route_bank_*`.
    pub fn route_bank_shared_bytes(&self) -> usize {
        self.replay_shared_bytes() + self.chunk() * 4 + 64 * 4
    }

    /// Shared memory of `route_*`.
    pub fn route_shared_bytes(&self) -> usize {
        let chunk = self.chunk();
        let operands = 2 * Self::tile(self.parts, chunk, 64) + Self::tile(2, 64, 64);
        let scores = chunk * (64 + chunk + 1) * 4;
        self.replay_shared_bytes() + 2 * chunk * 4 + operands.max(scores).next_multiple_of(16)
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
