//! The kernels' parameters: `#[repr(C)]` twins of `kernels/abi.cuh`, where every field is described. Sizes
//! and offsets are asserted on both sides. Device pointers are their addresses; 0 is null.
//!
//! Also what a launch of each kernel takes beside its parameters: grid and shared memory. Blocks have
//! [`THREADS`] threads.

// Fields are described once, in abi.cuh.
#![allow(missing_docs)]

use std::mem::{offset_of, size_of};

/// Threads of every block.
pub const THREADS: u32 = 256;

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

/// Parameters of `segment_*`.
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
    assert!(size_of::<SegmentParams>() == 176 && offset_of!(SegmentParams, k) == 48);
    assert!(offset_of!(SegmentParams, drift) == 120 && offset_of!(SegmentParams, open) == 160);
    assert!(offset_of!(SegmentParams, qk_l2norm) == 172);
    assert!(size_of::<PrepareParams>() == 120 && offset_of!(PrepareParams, p) == 80);
    assert!(offset_of!(PrepareParams, scale) == 112);
    assert!(size_of::<RouteSumsParams>() == 88 && offset_of!(RouteSumsParams, sums) == 56);
    assert!(offset_of!(RouteSumsParams, qk_l2norm) == 80);
    assert!(size_of::<RouteParams>() == 184 && offset_of!(RouteParams, sums) == 88);
    assert!(offset_of!(RouteParams, slope) == 136 && offset_of!(RouteParams, logit_columns) == 176);
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

    /// Shared memory of `segment_*`.
    pub fn segment_shared_bytes(&self) -> usize {
        let tile = |width: usize| Self::tile(self.parts, 32, width.next_multiple_of(16));
        tile(self.dk)
            + tile(self.dv)
            + 2 * 32 * 33 * 4
            + 32 * 4
            + 8 * 16 * 4
            + 32 * 8
            + 4 * 32 * 4
            + 32
            + 32
            + 16
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
        self.chunks() * self.heads
    }

    /// Blocks of `route_bases_*`.
    pub fn route_bases_blocks(&self) -> usize {
        self.sequences * self.heads * self.dk / 8
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
