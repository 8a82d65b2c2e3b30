//! What crosses the boundary. Every struct that may grow begins with its size: set it to `sizeof`, and fill the rest with
//! zeros before use, so that what a later version adds is absent.

use std::ffi::c_void;

/// What came of a call.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done; on a GPU: launched.
    Ok = 0,
    /// A buffer, an extent or a struct's size is wrong, or not for a GPU.
    Shape = 1,
    /// A dtype is wrong.
    Dtype = 2,
    /// An argument that the call needs is absent.
    Missing = 3,
    /// An argument is given that the call does not read.
    Unexpected = 4,
    /// An element is out of its domain: of g, of cu_seqlens, of an event log, of a cache, of a list of entries; or all entries
    /// are taken.
    Value = 5,
    /// An option is out of its range.
    Option = 6,
    /// An address is misaligned, or not of this device.
    Pointer = 7,
    /// The workspace is too small.
    Workspace = 8,
    /// There is no GPU, no driver, or no kernel for it.
    Device = 9,
    /// The device does not have this part of the operator yet.
    NotBuilt = 10,
    /// Memory cannot be had.
    Memory = 11,
    /// A call of the CUDA driver failed.
    Cuda = 12,
    /// A defect of the library; it is unharmed, and the results are not to be used.
    Internal = 13,
}

/// Dtype of q, k, v, o and their gradients.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeCode {
    /// IEEE single precision.
    F32 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half precision.
    F16 = 2,
}

/// How slots evolve.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecurrenceCode {
    /// `S <- e^g S`.
    Gated = 0,
    /// `S <- e^g (S - beta k (k^T S))`.
    GatedDelta = 1,
}

/// Which pair of slots merges.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeCode {
    /// Least drift per token.
    Density = 0,
    /// Least summed drift.
    Mass = 1,
}

/// Where read weights come from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadCode {
    /// lambda.
    Given = 0,
    /// `sigmoid(slope q . kappa + bias + logits)`.
    Routed = 1,
}

/// Which slot column 0 of lambda and of the logits weighs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotOrderCode {
    /// The oldest.
    OldestFirst = 0,
    /// The open one.
    NewestFirst = 1,
}

/// How entries keep their states.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDtypeCode {
    /// IEEE single precision.
    F32 = 0,
    /// bfloat16 to read, and 8 more bits beside it that are touched only where a state is written. On a GPU alone.
    Bf16 = 1,
}

/// Where the buffers of a call are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceCode {
    /// Memory of the host; calls return when they are done.
    Cpu = 0,
    /// Memory of a GPU, in its primary context; calls return when they are launched on the stream.
    Cuda = 1,
}

/// An array: contiguous, row-major, exactly as many bytes as its extents say. `{NULL, 0}` is absent.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Address of the first element: of the host, or of the GPU.
    pub data: *mut c_void,
    /// Bytes.
    pub bytes: usize,
}

/// Options of a call: set by `dla_options_init`, then changed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CallOptions {
    /// `sizeof(dla_options)`.
    pub size: usize,
    /// A `dla_recurrence`.
    pub recurrence: i32,
    /// A `dla_merge`.
    pub merge: i32,
    /// A `dla_read`.
    pub read: i32,
    /// A `dla_slot_order`.
    pub slot_order: i32,
    /// Most slots held, M, 1 to 64.
    pub capacity: i32,
    /// Not 0: q and k to unit norm first.
    pub qk_l2norm: i32,
    /// Drift from which a token opens a slot, 0 to 2; not read where the call has a `tau` of its own.
    pub tau: f32,
    /// Factor of q; NaN: `dk^-1/2`.
    pub scale: f32,
    /// Above 0: soft boundaries of this width in the backward; 0: none.
    pub soft_temperature: f32,
    /// Not 0: soft boundaries carry the drift's gradient on into k, v and g.
    pub soft_through_drift: i32,
}

/// Arrays of a state cache, chronological: slot 0 is the oldest, unused slots are zero.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CacheArrays {
    /// Slot states, `[N,HV,M,dk,dv]` f32.
    pub states: Buffer,
    /// Slots held, `[N,HV]` u32.
    pub len: Buffer,
    /// Tokens of every slot, `[N,HV,M]` u32.
    pub tokens: Buffer,
    /// Summed drift of every slot in units of 2^-12, `[N,HV,M]` u32.
    pub drift: Buffer,
    /// The open segment's plain decayed sum, `[N,HV,dk,dv]` f32.
    pub open: Buffer,
    /// Key sums of every slot, `[N,HV,M,dk]` f32; with routed reads.
    pub keys: Buffer,
}

/// Extents, place and arguments of a call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// `sizeof(dla_call)`.
    pub size: usize,
    /// A `dla_device`.
    pub device: i32,
    /// GPU, counted from 0.
    pub ordinal: i32,
    /// CUDA stream that the call takes its turn on; NULL is the default stream.
    pub stream: *mut c_void,
    /// On a GPU: as many bytes as the workspace function of the call says, a multiple of 256 its address; free again when
    /// the stream has come past the call.
    pub workspace: Buffer,
    /// A `dla_dtype`: of q, k, v, o and their gradients.
    pub dtype: i32,
    /// Zero.
    pub reserved: i32,
    /// B.
    pub batch: usize,
    /// T.
    pub time: usize,
    /// H.
    pub heads: usize,
    /// HV, a multiple of H.
    pub value_heads: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
    /// N, the number of packed sequences, where there are `cu_seqlens`; else 0.
    pub sequences: usize,
    /// Columns of lambda, M or more; 0: M.
    pub lambda_columns: usize,
    /// Columns of the route's logits, M or more; 0: M.
    pub logit_columns: usize,
    /// Queries, `[B,T,H,dk]`.
    pub q: Buffer,
    /// Keys, `[B,T,H,dk]`.
    pub k: Buffer,
    /// Values, `[B,T,HV,dv]`.
    pub v: Buffer,
    /// Log decay, `[B,T,HV]` f32, at most 0; absent is 0.
    pub g: Buffer,
    /// Write strength of the gated delta rule, `[B,T,HV]` f32.
    pub beta: Buffer,
    /// Given reads: weights, `[B,T,HV,lambda_columns]` f32.
    pub lambda: Buffer,
    /// Routed reads: slope, `[HV]` f32.
    pub route_slope: Buffer,
    /// Routed reads: bias, `[HV]` f32.
    pub route_bias: Buffer,
    /// Routed reads: logits, `[B,T,HV,logit_columns]` f32; absent is 0.
    pub route_logits: Buffer,
    /// Drift from which a token opens a slot, `[HV]` f32; absent: that of the options for every head.
    pub tau: Buffer,
    /// Event log, `[B,T,HV]` u8. Forward and step: the caller's own; absent, it is computed. Backward: the forward's.
    pub events: Buffer,
    /// Offsets of packed sequences, `[N+1]` i64, from 0 to T; B = 1.
    pub cu_seqlens: Buffer,
    /// Cache to resume from; NULL: sequences begin empty.
    pub cache: *const CacheArrays,
}

/// Where the results of a forward or a step go. What is absent is not wanted.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Results {
    /// `sizeof(dla_results)`.
    pub size: usize,
    /// Output, `[B,T,HV,dv]`; never absent.
    pub o: Buffer,
    /// Drift of every token, `[B,T,HV]` f32.
    pub drift: Buffer,
    /// Event log, `[B,T,HV]` u8: the backward needs it.
    pub events: Buffer,
    /// Routed reads: read weights, `[B,T,HV,M]` f32.
    pub lambda: Buffer,
    /// Final cache; NULL: not wanted. Not the arrays of the initial one. A step takes none: it changes its own.
    pub cache: *const CacheArrays,
}

/// Gradients of the results, given to a backward; and results that it need not compute again.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Upstream {
    /// `sizeof(dla_upstream)`.
    pub size: usize,
    /// Gradient of o, `[B,T,HV,dv]`.
    pub o: Buffer,
    /// Gradient of the final cache, of which states, open and keys are read; what is absent is 0.
    pub cache: *const CacheArrays,
    /// The forward's drift, `[B,T,HV]` f32. Read on a GPU alone, with soft boundaries or a gradient of the final cache;
    /// absent, it is computed again.
    pub drift: Buffer,
    /// Routed reads: the forward's read weights, `[B,T,HV,M]` f32. Read on a GPU alone; absent, they are computed again.
    pub lambda: Buffer,
}

/// Where the gradients of a backward go: extents as the arguments'. What is absent is not wanted.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Gradients {
    /// `sizeof(dla_gradients)`.
    pub size: usize,
    /// Of q.
    pub q: Buffer,
    /// Of k.
    pub k: Buffer,
    /// Of v.
    pub v: Buffer,
    /// Of g, f32; where g was given.
    pub g: Buffer,
    /// Of beta, f32.
    pub beta: Buffer,
    /// Of given read weights, f32, as many columns.
    pub lambda: Buffer,
    /// Of the route's slope, `[HV]` f32.
    pub route_slope: Buffer,
    /// Of the route's bias, `[HV]` f32.
    pub route_bias: Buffer,
    /// Of the route's logits, f32, as many columns.
    pub route_logits: Buffer,
    /// Of tau, `[HV]` f32; with soft boundaries.
    pub tau: Buffer,
    /// Of the drift, `[B,T,HV]` f32; with soft boundaries.
    pub drift: Buffer,
    /// Of the initial cache: states, open and keys; NULL: not wanted.
    pub cache: *const CacheArrays,
}

/// A struct of the boundary that begins with its size.
pub(crate) trait Prefixed {
    const NAME: &'static str;
    fn size(&self) -> usize;
}

macro_rules! prefixed {
    ($($name:ident: $spelled:literal),*) => {$(
        impl Prefixed for $name {
            const NAME: &'static str = $spelled;
            fn size(&self) -> usize {
                self.size
            }
        }
    )*};
}
prefixed!(CallOptions: "options", Call: "call", Results: "results", Upstream: "upstream", Gradients: "gradients");

impl Buffer {
    /// No array.
    pub const ABSENT: Buffer = Buffer { data: std::ptr::null_mut(), bytes: 0 };

    /// Whether there is one.
    pub fn is_present(&self) -> bool {
        !self.data.is_null() || self.bytes > 0
    }
}

impl CacheArrays {
    /// No array.
    pub const ABSENT: CacheArrays = CacheArrays {
        states: Buffer::ABSENT,
        len: Buffer::ABSENT,
        tokens: Buffer::ABSENT,
        drift: Buffer::ABSENT,
        open: Buffer::ABSENT,
        keys: Buffer::ABSENT,
    };
}

impl Default for CallOptions {
    fn default() -> Self {
        let defaults = dla::Options::default();
        let dla::Tau::PerCall(tau) = defaults.tau else { unreachable!("the default is one tau") };
        CallOptions {
            size: size_of::<CallOptions>(),
            recurrence: RecurrenceCode::Gated as i32,
            merge: MergeCode::Density as i32,
            read: ReadCode::Given as i32,
            slot_order: SlotOrderCode::OldestFirst as i32,
            capacity: defaults.capacity as i32,
            qk_l2norm: 0,
            tau,
            scale: f32::NAN,
            soft_temperature: 0.0,
            soft_through_drift: 0,
        }
    }
}

impl Default for Call {
    fn default() -> Self {
        Call {
            size: size_of::<Call>(),
            device: DeviceCode::Cpu as i32,
            ordinal: 0,
            stream: std::ptr::null_mut(),
            workspace: Buffer::ABSENT,
            dtype: DtypeCode::F32 as i32,
            reserved: 0,
            batch: 0,
            time: 0,
            heads: 0,
            value_heads: 0,
            dk: 0,
            dv: 0,
            sequences: 0,
            lambda_columns: 0,
            logit_columns: 0,
            q: Buffer::ABSENT,
            k: Buffer::ABSENT,
            v: Buffer::ABSENT,
            g: Buffer::ABSENT,
            beta: Buffer::ABSENT,
            lambda: Buffer::ABSENT,
            route_slope: Buffer::ABSENT,
            route_bias: Buffer::ABSENT,
            route_logits: Buffer::ABSENT,
            tau: Buffer::ABSENT,
            events: Buffer::ABSENT,
            cu_seqlens: Buffer::ABSENT,
            cache: std::ptr::null(),
        }
    }
}

impl Default for Results {
    fn default() -> Self {
        Results {
            size: size_of::<Results>(),
            o: Buffer::ABSENT,
            drift: Buffer::ABSENT,
            events: Buffer::ABSENT,
            lambda: Buffer::ABSENT,
            cache: std::ptr::null(),
        }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Upstream {
            size: size_of::<Upstream>(),
            o: Buffer::ABSENT,
            cache: std::ptr::null(),
            drift: Buffer::ABSENT,
            lambda: Buffer::ABSENT,
        }
    }
}

impl Default for Gradients {
    fn default() -> Self {
        Gradients {
            size: size_of::<Gradients>(),
            q: Buffer::ABSENT,
            k: Buffer::ABSENT,
            v: Buffer::ABSENT,
            g: Buffer::ABSENT,
            beta: Buffer::ABSENT,
            lambda: Buffer::ABSENT,
            route_slope: Buffer::ABSENT,
            route_bias: Buffer::ABSENT,
            route_logits: Buffer::ABSENT,
            tau: Buffer::ABSENT,
            drift: Buffer::ABSENT,
            cache: std::ptr::null(),
        }
    }
}
