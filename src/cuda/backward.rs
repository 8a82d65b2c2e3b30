//! The backward: the adjoints of scan -> prepare -> route -> segment, a group of sequences at a time and of that a window
//! of chunks at a time, from the last to the first. Memory is bounded by a budget, not by T: states before the windows
//! are kept sparsely and computed again (checkpoints.rs).
//!
//! Knows no device: [`Backward::run`] hands every launch to a [`Launcher`], the driver's (launch.rs) or the emulator's
//! (tests/kernels_on_cpu.rs).

use super::abi::{
    BANK_PLACES_BYTES, DevicePointer, DriftBackwardParams, Extents, Geometry, GroupSumParams, HeadSumsParams,
    PrepareBackwardParams, PrepareParams, RouteBackwardParams, RouteSumsParams, SEGMENT_THREADS,
    ScanBackwardParams, ScanStatesParams, SegmentBackwardParams, SegmentParams, SegmentStatesParams,
    SlotsParams, THREADS,
};
use super::checkpoints::{self, Step};
use super::plan::Call;
use super::raw::{RawCache, RawCacheGradients, RawForward, RawGradients, RawInputs, RawUpstream};
use super::workspace::ALIGNMENT;
use crate::error::Result;
use crate::options::{Read, Recurrence, SlotOrder, Soft};
use crate::problem::Shape;
use crate::tensor::Dtype;
use hopper::Hopper;
use std::ops::Range;

mod hopper;

/// Bytes of workspace that a backward keeps within, where the least that it needs allows.
pub const BUDGET: usize = 480_000_000;

/// Most chunks of a window.
const MOST_CHUNKS: usize = 16;

/// Places for states that a backward has at least, where it has as many windows.
const FEWEST_PLACES: usize = 4;

/// The kernels of the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackwardKernel {
    /// events -> what every chunk does to the slots.
    SlotsMaps,
    /// And so the slots at every chunk's entry.
    Slots,
    /// k -> sums of keys within chunks.
    RouteSums,
    /// k -> sums of keys before chunks.
    RouteBases,
    /// P and, delta rule, Qt, W, Kh.
    Prepare,
    /// The bank, carried forward.
    ScanStates,
    /// The adjoint of scan.
    ScanBackward,
    /// The adjoint of prepare.
    PrepareBackward,
    /// Gradients of q and k of the value heads, summed.
    GroupSum,
    /// dV -> the drift's gradient.
    DriftBackward,
    /// The adjoint of route, but for what passes from chunk to chunk.
    RouteBackward,
    /// What passes from chunk to chunk.
    RouteBackwardKeys,
    /// Sums over all chunks.
    HeadSums,
    /// k, v, g -> energies and key factors, as segment takes them.
    SegmentGram,
    /// R before chunks.
    SegmentStates,
    /// The adjoint of segment, in four.
    SegmentScalars,
    /// Of R from chunk to chunk.
    SegmentOpenBackward,
    /// Of k, v and g.
    SegmentBackward,
    /// Of the decay since R's newest token.
    SegmentLogBackward,
    /// Hopper: g -> its sums before chunks.
    GammasSm90,
    /// Hopper: what the scan for dQ takes.
    PrepareQueriesSm90,
    /// Hopper: dQ, and what the states give to dlambda.
    ScanQueriesSm90,
    /// Hopper: the states alone.
    ScanStatesSm90,
    /// Hopper: what the adjoint of scan takes, and gradients by way of pairs.
    PrepareBackwardSm90,
    /// Hopper: the adjoint of scan, for dV.
    ScanBackwardValuesSm90,
    /// Hopper: the same for dK.
    ScanBackwardKeysSm90,
    /// Hopper: dlambda.
    LambdaBackwardSm90,
    /// Hopper: dg by way of the states where windows meet.
    AnchorsSm90,
    /// Hopper: the same at rows' ends.
    EndAnchorsSm90,
    /// Hopper: what tokens give to dg by way of the states.
    GFlowSm90,
    /// Hopper: dg.
    GBackwardSm90,
}

impl BackwardKernel {
    /// File that a portable one is in.
    fn stage(self) -> &'static str {
        use BackwardKernel::*;
        match self {
            Slots | SlotsMaps => "slots",
            RouteSums | RouteBases => "route",
            Prepare => "prepare",
            SegmentGram => "segment",
            ScanStates | ScanBackward => "scan_backward",
            PrepareBackward => "prepare_backward",
            GroupSum | HeadSums => "group_sum",
            DriftBackward | SegmentStates | SegmentScalars | SegmentOpenBackward | SegmentBackward
            | SegmentLogBackward => "segment_backward",
            RouteBackward | RouteBackwardKeys => "route_backward",
            _ => unreachable!("a kernel of Hopper"),
        }
    }

    /// Name of a portable one.
    fn name(self, delta: bool, dtype: Dtype) -> String {
        use BackwardKernel::*;
        let recurrence = if delta { "delta" } else { "gated" };
        match self {
            Slots => "slots".to_owned(),
            SlotsMaps => "slots_maps".to_owned(),
            HeadSums => "head_sums".to_owned(),
            Prepare => format!("prepare_{recurrence}_{dtype}"),
            ScanStates => format!("scan_states_{recurrence}_{dtype}"),
            ScanBackward => format!("scan_backward_{recurrence}_{dtype}"),
            PrepareBackward => format!("prepare_backward_{recurrence}_{dtype}"),
            RouteSums => format!("route_sums_{dtype}"),
            RouteBases => format!("route_bases_{dtype}"),
            GroupSum => format!("group_sum_{dtype}"),
            DriftBackward => format!("drift_backward_{dtype}"),
            RouteBackward => format!("route_backward_{dtype}"),
            RouteBackwardKeys => format!("route_backward_keys_{dtype}"),
            SegmentStates => format!("segment_states_{dtype}"),
            SegmentScalars => format!("segment_scalars_{dtype}"),
            SegmentOpenBackward => format!("segment_open_backward_{dtype}"),
            SegmentBackward => format!("segment_backward_{dtype}"),
            SegmentLogBackward => format!("segment_log_backward_{dtype}"),
            SegmentGram => format!("segment_gram_{dtype}"),
            _ => unreachable!("a kernel of Hopper"),
        }
    }

    /// Threads of a block of a portable one.
    fn threads(self) -> u32 {
        match self {
            BackwardKernel::Slots => 32,
            BackwardKernel::SegmentGram => SEGMENT_THREADS,
            _ => THREADS,
        }
    }

    /// Shared memory of a block of a portable one.
    fn shared_bytes(self, g: &Geometry) -> usize {
        use BackwardKernel::*;
        match self {
            Slots | SlotsMaps => 0,
            RouteSums => g.route_sums_shared_bytes(),
            RouteBases => g.route_bases_shared_bytes(),
            Prepare => g.prepare_shared_bytes(),
            ScanStates => g.scan_states_shared_bytes(),
            ScanBackward => g.scan_backward_shared_bytes(),
            PrepareBackward => g.prepare_backward_shared_bytes(),
            GroupSum => 0,
            HeadSums => g.head_sums_shared_bytes(),
            RouteBackward => g.route_backward_shared_bytes(),
            RouteBackwardKeys => g.route_backward_keys_shared_bytes(),
            DriftBackward => g.drift_backward_shared_bytes(),
            SegmentGram => g.segment_gram_shared_bytes(),
            SegmentStates | SegmentOpenBackward => g.segment_states_shared_bytes(),
            SegmentScalars => g.segment_scalars_shared_bytes(),
            SegmentBackward => g.segment_backward_shared_bytes(),
            SegmentLogBackward => 0,
            _ => unreachable!("a kernel of Hopper"),
        }
    }
}

/// How a kernel of a backward is found and launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelForm {
    /// Which.
    pub kernel: BackwardKernel,
    /// Its name.
    pub name: String,
    /// File that it is in.
    pub stage: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: usize,
}

/// Takes arrays of a workspace one after the other.
trait TakeArray {
    /// The next array, of as many bytes as the product of `factors`: where it stands; `None` where there are not so many.
    fn take(&mut self, factors: &[usize]) -> Option<usize>;
}

/// Bytes taken so far.
struct Taken(usize);

impl TakeArray for Taken {
    fn take(&mut self, factors: &[usize]) -> Option<usize> {
        let at = self.0;
        let bytes = factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor))?;
        self.0 = at.checked_add(bytes)?.checked_next_multiple_of(ALIGNMENT)?;
        Some(at)
    }
}

/// What launches kernels.
pub trait Launcher {
    /// Launches a kernel with its one parameter, the struct `params`. A grid without blocks is no launch.
    ///
    /// # Errors
    /// What the device says.
    fn launch<P>(&mut self, kernel: BackwardKernel, blocks: usize, params: &P) -> Result<()>;

    /// Zeros memory.
    ///
    /// # Errors
    /// What the device says.
    fn zero(&mut self, at: DevicePointer, bytes: usize) -> Result<()>;
}

/// Where the arrays of the workspace stand, in bytes from its beginning. An array that the call does not need has no
/// bytes. Chunks, windows and rows are those of the largest group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Layout {
    chunk_len: usize,
    chunk_starts: usize,
    key_sums: usize,
    key_bases: usize,
    key_factors: usize,
    slope_sums: usize,
    bias_sums: usize,
    tau_sums: usize,
    /// A window's, as its kernels leave it for each other (abi.cuh).
    p: usize,
    qt: usize,
    w: usize,
    kh: usize,
    entries: usize,
    d_qt: usize,
    d_kh: usize,
    d_w: usize,
    d_kd: usize,
    d_weights: usize,
    d_total: usize,
    d_v: usize,
    d_q: usize,
    d_k: usize,
    d_slots: usize,
    key_bank: usize,
    exits: usize,
    open: usize,
    open_log: usize,
    scalars: usize,
    d_open: usize,
    scratch: usize,
    /// From window to window: adjoints of the states, the key sums, and R.
    d_bank: usize,
    d_keys: usize,
    d_carried: usize,
    d_carried_scalars: usize,
    /// What segment_gram leaves, of all tokens.
    walks: usize,
    reach: usize,
    energy: usize,
    factor: usize,
    totals: usize,
    next: usize,
    /// R before every window.
    opens: usize,
    open_logs: usize,
    /// Banks for states before windows.
    banks: usize,
    /// What Hopper's kernels have in place of the portable ones' p to d_total.
    hopper: hopper::Layout,
    bytes: usize,
}

/// A backward's schedule, scalars and workspace.
#[derive(Debug, Clone)]
pub struct Backward {
    /// Of one group at most.
    geometry: Geometry,
    shape: Shape,
    dtype: Dtype,
    /// Sequences of a group.
    group: usize,
    /// Chunks of a window, and windows.
    chunks: usize,
    windows: usize,
    /// Places for states before windows.
    places: usize,
    routed: bool,
    soft: Option<Soft>,
    /// Whether R has an adjoint.
    through_open: bool,
    /// Whether the final cache has a gradient.
    final_gradient: bool,
    newest_first: bool,
    qk_l2norm: bool,
    scale: f32,
    /// Hopper's kernels, where they are to be taken.
    hopper: Option<Hopper>,
    layout: Layout,
}

impl Backward {
    /// The backward of a call on a card of `processors` multiprocessors, within `budget` bytes of workspace if that is
    /// possible; `call.final_cache`: whether the final cache has a gradient. `None` where the workspace would be of more
    /// bytes than there are addresses. `hopper`: with the kernels of compute capability 9.0 where there are any: bf16, gated,
    /// head sizes up to 128, at most 32 slots, no soft boundaries.
    pub fn new(call: &Call<'_>, processors: usize, budget: usize, hopper: bool) -> Option<Backward> {
        let Call { options, shape, dtype, final_cache } = *call;
        let delta = options.recurrence == Recurrence::GatedDelta;
        let geometry = |sequences: usize| Geometry {
            parts: if dtype == Dtype::Bf16 { 1 } else { 2 },
            sequences,
            tokens: if shape.sequences == shape.batch { sequences * shape.time } else { shape.tokens() },
            heads: shape.heads,
            value_heads: shape.value_heads,
            dk: shape.dk,
            dv: shape.dv,
            capacity: shape.capacity,
            delta,
        };
        // Soft boundaries sum v . dV over tokens, which cancels: the portable ones know dV better.
        let hopper = hopper && dtype == Dtype::Bf16 && options.soft.is_none();
        let choose = |sequences| Hopper::choose(&geometry(1), processors, sequences);
        let hopper = if hopper { choose(1) } else { None };
        let blocks = match &hopper {
            Some(hopper) => hopper.blocks(&geometry(1)),
            None => geometry(1).rows() * geometry(1).slices(),
        };
        let group = group(shape.sequences, blocks, processors);
        let hopper = hopper.and_then(|_| choose(group));
        let geometry = geometry(group);
        let chunk = geometry.chunk();
        let all_chunks = shape.time.div_ceil(chunk).max(1);
        let mut backward = Backward {
            geometry,
            shape,
            dtype,
            group,
            chunks: 1,
            windows: all_chunks,
            places: 1,
            routed: options.read == Read::Routed,
            soft: options.soft,
            through_open: final_cache || options.soft.is_some_and(|soft| soft.through_drift),
            final_gradient: final_cache,
            newest_first: options.slot_order == SlotOrder::NewestFirst,
            qk_l2norm: options.qk_l2norm,
            scale: options.scale.unwrap_or_else(|| (1.0 / (shape.dk as f64).sqrt()) as f32),
            hopper,
            layout: Layout::default(),
        };
        let most_chunks = if hopper.is_some() { hopper::MOST_CHUNKS } else { MOST_CHUNKS };
        // Of all lengths of a window the one that leaves the least to be computed again, within the budget; where none
        // is within it, the one that takes the least memory.
        let mut best: Option<(bool, usize, Backward)> = None;
        for chunks in 1..=most_chunks.min(all_chunks) {
            backward.chunks = chunks;
            backward.windows = all_chunks.div_ceil(chunks);
            backward.places = 0;
            let without = backward.lay_out()?.bytes;
            let bank = backward.bank_bytes().max(1);
            let most = (backward.windows - 1).max(1);
            backward.places = (budget.saturating_sub(without) / bank).clamp(FEWEST_PLACES.min(most), most);
            backward.layout = backward.lay_out()?;
            let over = backward.layout.bytes > budget;
            let swept = chunks * checkpoints::cost(backward.windows, backward.places);
            let score = if over { backward.layout.bytes } else { swept };
            let better = best.as_ref().is_none_or(|(was_over, was, _)| (over, score) < (*was_over, *was));
            if better {
                best = Some((over, score, backward.clone()));
            }
        }
        best.map(|(_, _, backward)| backward)
    }

    /// Bytes of workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.layout.bytes
    }

    /// Extents of a group, for shared memory.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Kernels that a run launches.
    pub fn kernels(&self) -> Vec<KernelForm> {
        use BackwardKernel::*;
        let mut kernels = vec![SlotsMaps, Slots, GroupSum];
        match &self.hopper {
            Some(_) => kernels.extend(Hopper::KERNELS),
            None => kernels.extend([Prepare, ScanStates, ScanBackward, PrepareBackward]),
        }
        if self.routed {
            kernels.extend([RouteSums, RouteBases, RouteBackward, RouteBackwardKeys]);
        }
        if self.soft.is_some() {
            kernels.push(DriftBackward);
        }
        if self.routed || self.soft.is_some() {
            kernels.push(HeadSums);
        }
        if self.through_open {
            kernels.extend([SegmentGram, SegmentStates, SegmentScalars, SegmentOpenBackward]);
            kernels.extend([SegmentBackward, SegmentLogBackward]);
        }
        let form = |kernel: BackwardKernel| {
            let g = &self.geometry;
            let own = self.hopper.as_ref().and_then(|hopper| hopper.kernel(kernel, g));
            let (name, stage, threads, shared_bytes) = own.unwrap_or_else(|| {
                (kernel.name(g.delta, self.dtype), kernel.stage(), kernel.threads(), kernel.shared_bytes(g))
            });
            KernelForm { kernel, name, stage, threads, shared_bytes }
        };
        kernels.into_iter().map(form).collect()
    }

    /// Whether Hopper's kernels are taken.
    pub fn on_hopper(&self) -> bool {
        self.hopper.is_some()
    }

    /// Bytes of the states before a window.
    fn bank_bytes(&self) -> usize {
        self.hopper.as_ref().map_or(self.geometry.bank_bytes(), |hopper| hopper.bank_bytes(&self.geometry))
    }

    /// Whether Hopper's scan leaves dK as it is asked for: nothing more is added to it, no heads share a key, no norm is between.
    fn keys_at_once(&self) -> bool {
        let adds = self.routed || self.through_open || self.soft.is_some();
        self.hopper.is_some() && !adds && !self.qk_l2norm && self.shape.heads == self.shape.value_heads
    }

    /// Whether sequences are packed. One sequence of all tokens is not, whatever says so.
    fn packed(&self) -> bool {
        self.shape.sequences != self.shape.batch
    }

    /// Tokens of a window.
    fn window(&self) -> usize {
        self.chunks * self.geometry.chunk()
    }

    fn lay_out(&self) -> Option<Layout> {
        let g = &self.geometry;
        let mut taken = Taken(0);
        let mut take =
            |wanted: bool, factors: &[usize]| if wanted { taken.take(factors) } else { Some(taken.0) };
        let (all, rows, heads, chunk, parts) = (g.chunks(), g.rows(), g.value_heads, g.chunk(), 2);
        let (width, slices, capacity) = (g.padded_dk(), g.slices(), g.capacity);
        let places = self.group.checked_mul(self.chunks)?;
        let (soft, open, routed) = (self.soft.is_some(), self.through_open, self.routed);
        let always = true;
        let portable = self.hopper.is_none();
        let chunk_len = take(always, &[4, all, heads])?;
        let chunk_starts = take(always, &[4, all, heads, capacity])?;
        let key_sums = take(routed, &[4, all, g.heads, chunk / 8, g.dk])?;
        let key_bases = take(routed, &[8, all, g.heads, g.dk])?;
        let key_factors = take(routed && self.qk_l2norm, &[4, g.tokens, g.heads])?;
        let slope_sums = take(routed, &[8, all, heads])?;
        let bias_sums = take(routed, &[8, all, heads])?;
        let tau_sums = take(soft, &[8, all, heads])?;
        let p = take(portable, &[2, places, heads, parts, chunk, chunk])?;
        let prepared = [2, places, heads, parts, chunk, width];
        let qt = take(portable && g.delta, &prepared)?;
        let w = take(portable && g.delta, &prepared)?;
        let kh = take(portable && g.delta, &prepared)?;
        let entries = take(portable, &[16, places, heads, slices, capacity, width / 16, parts, 32])?;
        let partial = [4, slices, places, heads, chunk, width];
        let d_qt = take(portable, &partial)?;
        let d_kh = take(portable, &partial)?;
        let d_w = take(portable && g.delta, &partial)?;
        let d_kd = take(portable && g.delta, &partial)?;
        let d_weights = take(portable, &[4, slices, places, heads, chunk, capacity])?;
        let d_total = take(portable, &[8, slices, places, heads])?;
        let d_v = take(soft || open, &[4, places, heads, chunk, g.dv])?;
        let d_q = take(always, &[4, places, heads, chunk, g.dk])?;
        let d_k = take(!self.keys_at_once(), &[4, places, heads, chunk, g.dk])?;
        let d_slots = take(routed, &[4, places, heads, chunk, capacity])?;
        let key_bank = take(routed, &[4, places, heads, capacity, g.dk])?;
        let exits = take(routed, &[places, heads, 64 + chunk])?;
        let state = g.dk.checked_mul(g.dv)?;
        let open_bytes = [4, places, heads, state];
        let open_at = take(open, &open_bytes)?;
        let open_log = take(open, &[8, places, heads])?;
        let scalars = take(open, &[8, places, heads, 8 * chunk + 8])?;
        let d_open = take(open, &open_bytes)?;
        let scratch = take(portable, &[g.scan_backward_scratch_bytes()])?;
        let d_bank = take(portable, &[rows, slices, 64 * capacity * width + BANK_PLACES_BYTES])?;
        let d_keys = take(routed, &[4, rows, capacity, g.dk])?;
        let d_carried = take(open, &[4, rows, state])?;
        let d_carried_scalars = take(open, &[8, rows, 1 + slices])?;
        let walks = take(open, &[4, all, heads, chunk, 32])?;
        let [reach, energy, factor] = [0; 3].map(|_| take(open, &[4, all, heads, chunk]));
        let (reach, energy, factor) = (reach?, energy?, factor?);
        let totals = take(open, &[8, all, heads, chunk / 32])?;
        let next = take(open, &[all, heads, chunk])?;
        let opens = take(open, &[4, rows, self.windows, state])?;
        let open_logs = take(open, &[8, rows, self.windows])?;
        let banks = take(always, &[self.places, self.bank_bytes()])?;
        let hopper = match &self.hopper {
            Some(hopper) => hopper.lay_out(g, places, self.final_gradient, &mut taken)?,
            None => hopper::Layout::default(),
        };
        let bytes = taken.0;
        Some(Layout {
            chunk_len,
            chunk_starts,
            key_sums,
            key_bases,
            key_factors,
            slope_sums,
            bias_sums,
            tau_sums,
            p,
            qt,
            w,
            kh,
            entries,
            d_qt,
            d_kh,
            d_w,
            d_kd,
            d_weights,
            d_total,
            d_v,
            d_q,
            d_k,
            d_slots,
            key_bank,
            exits,
            open: open_at,
            open_log,
            scalars,
            d_open,
            scratch,
            d_bank,
            d_keys,
            d_carried,
            d_carried_scalars,
            walks,
            reach,
            energy,
            factor,
            totals,
            next,
            opens,
            open_logs,
            banks,
            hopper,
            bytes,
        })
    }

    /// Launches everything. All addresses have been checked.
    ///
    /// # Errors
    /// What the launcher says.
    pub fn run(&self, call: &BackwardCall, launcher: &mut impl Launcher) -> Result<()> {
        let sequences = self.shape.sequences;
        let mut first = 0;
        while first < sequences || first == 0 {
            let count = self.group.min(sequences - first);
            Pass::new(self, call, first, count).run(launcher)?;
            first += count.max(1);
        }
        Ok(())
    }
}

/// Sequences of a group: as few as leave no more than a seventh of the card's time unused, `blocks` of which it computes
/// at once for a sequence.
fn group(sequences: usize, blocks: usize, processors: usize) -> usize {
    let busy = |group: usize| {
        let blocks = group * blocks.max(1);
        blocks as f64 / (blocks.div_ceil(processors.max(1)) * processors.max(1)) as f64
    };
    let most = sequences.clamp(1, (4 * processors.max(1)).div_ceil(blocks.max(1)));
    let mut best = 1;
    for group in 1..=most {
        if busy(group) > busy(best) + 1e-9 {
            best = group;
        }
        if busy(best) > 0.86 {
            break;
        }
    }
    best
}

/// Addresses of one backward.
#[derive(Debug, Clone, Copy, Default)]
pub struct BackwardCall {
    /// Arguments of the forward.
    pub inputs: RawInputs,
    /// What the forward left.
    pub forward: RawForward,
    /// Gradients of the results.
    pub upstream: RawUpstream,
    /// Gradients of the arguments.
    pub gradients: RawGradients,
    /// Workspace.
    pub workspace: DevicePointer,
}

/// A group of sequences: its own addresses.
struct Pass<'a> {
    plan: &'a Backward,
    geometry: Geometry,
    extents: Extents,
    inputs: RawInputs,
    forward: RawForward,
    upstream: RawUpstream,
    gradients: RawGradients,
    initial: RawCache,
    final_gradient: RawCacheGradients,
    initial_gradient: RawCacheGradients,
    lambda: DevicePointer,
    lambda_columns: usize,
    workspace: DevicePointer,
    first: bool,
}

/// `address` moved on by `elements` of `bytes` bytes; null stays null.
fn on(address: DevicePointer, elements: usize, bytes: usize) -> DevicePointer {
    if address == 0 { 0 } else { address + (elements * bytes) as u64 }
}

impl<'a> Pass<'a> {
    fn new(plan: &'a Backward, call: &BackwardCall, first: usize, sequences: usize) -> Self {
        let Shape { time, heads, value_heads, dk, dv, capacity, .. } = plan.shape;
        let bytes = plan.dtype.bytes();
        // Packed, all tokens are everybody's; else a sequence's tokens are its own.
        let tokens = if plan.packed() { 0 } else { first * time };
        let rows = first * value_heads;
        let key = |x| on(x, tokens * heads * dk, bytes);
        let value = |x| on(x, tokens * value_heads * dv, bytes);
        let scalar = |x, size| on(x, tokens * value_heads, size);
        let columns = |x, columns: usize| on(x, tokens * value_heads * columns, 4);
        let cache = |x: RawCache| RawCache {
            states: on(x.states, rows * capacity * dk * dv, 4),
            len: on(x.len, rows, 4),
            tokens: on(x.tokens, rows * capacity, 4),
            drift: on(x.drift, rows * capacity, 4),
            open: on(x.open, rows * dk * dv, 4),
            keys: on(x.keys, rows * capacity * dk, 4),
        };
        let cache_gradients = |x: RawCacheGradients| RawCacheGradients {
            states: on(x.states, rows * capacity * dk * dv, 4),
            open: on(x.open, rows * dk * dv, 4),
            keys: on(x.keys, rows * capacity * dk, 4),
        };
        let BackwardCall { inputs, forward, upstream, gradients, workspace } = *call;
        let inputs = RawInputs {
            q: key(inputs.q),
            k: key(inputs.k),
            v: value(inputs.v),
            g: scalar(inputs.g, 4),
            beta: scalar(inputs.beta, 4),
            lambda: columns(inputs.lambda, inputs.lambda_columns),
            logits: columns(inputs.logits, inputs.logit_columns),
            cu_seqlens: on(inputs.cu_seqlens, first, 8),
            cache: inputs.cache.map(cache),
            ..inputs
        };
        let forward = RawForward {
            events: scalar(forward.events, 1),
            drift: scalar(forward.drift, 4),
            lambda: columns(forward.lambda, capacity),
        };
        let upstream = RawUpstream { o: value(upstream.o), cache: upstream.cache.map(cache_gradients) };
        let gradients = RawGradients {
            q: key(gradients.q),
            k: key(gradients.k),
            v: value(gradients.v),
            g: scalar(gradients.g, 4),
            beta: scalar(gradients.beta, 4),
            lambda: columns(gradients.lambda, inputs.lambda_columns),
            logits: columns(gradients.logits, inputs.logit_columns),
            drift: scalar(gradients.drift, 4),
            cache: gradients.cache.map(cache_gradients),
            ..gradients
        };
        let (lambda, lambda_columns) =
            if plan.routed { (forward.lambda, capacity) } else { (inputs.lambda, inputs.lambda_columns) };
        let packed = plan.packed();
        let geometry = Geometry {
            sequences,
            tokens: if packed { plan.geometry.tokens } else { sequences * time },
            ..plan.geometry
        };
        let extents = Extents {
            cu_seqlens: if packed { inputs.cu_seqlens } else { 0 },
            sequences: sequences as i64,
            time: time as i64,
            heads: heads as i32,
            value_heads: value_heads as i32,
            dk: dk as i32,
            dv: dv as i32,
            capacity: capacity as i32,
            newest_first: plan.newest_first.into(),
        };
        Pass {
            plan,
            geometry,
            extents,
            inputs,
            forward,
            upstream,
            gradients,
            initial: inputs.cache.unwrap_or_default(),
            final_gradient: upstream.cache.unwrap_or_default(),
            initial_gradient: gradients.cache.unwrap_or_default(),
            lambda,
            lambda_columns,
            workspace,
            first: first == 0,
        }
    }

    fn at(&self, offset: usize) -> DevicePointer {
        self.workspace + offset as u64
    }

    fn bank(&self, place: usize) -> DevicePointer {
        self.at(self.plan.layout.banks + place * self.plan.bank_bytes())
    }

    /// The tokens of windows `first..last`.
    fn tokens(&self, windows: Range<usize>) -> Range<usize> {
        let window = self.plan.window();
        windows.start * window..windows.end * window
    }

    fn window_places(&self, window: &Range<usize>) -> usize {
        self.geometry.window_places(self.plan.shape.time, window.start, window.end)
    }

    /// Blocks of a kernel that has one for every place of a window and value head.
    fn window_blocks(&self, window: &Range<usize>) -> usize {
        self.geometry.window_blocks(self.window_places(window))
    }

    fn scan_blocks(&self) -> usize {
        self.geometry.rows() * self.geometry.slices()
    }

    fn run(&self, launcher: &mut impl Launcher) -> Result<()> {
        self.slots(launcher)?;
        if self.plan.hopper.is_some() {
            self.gammas(launcher)?;
        }
        if self.plan.routed {
            self.route_sums(launcher)?;
        }
        if self.plan.through_open {
            self.segment_gram(launcher)?;
            self.segment_states(None, launcher)?;
        }
        let Shape { dk, dv, .. } = self.plan.shape;
        if !self.plan.through_open && self.initial_gradient.open != 0 {
            launcher.zero(self.initial_gradient.open, self.geometry.rows() * dk * dv * 4)?;
        }
        let (windows, places) = (self.plan.windows, self.plan.places);
        checkpoints::walk(windows, places, &mut |step| match step {
            Step::Advance { from, to, first, last } => self.advance(from, to, first..last, launcher),
            Step::Reverse { from, window } => self.reverse(from, window, launcher),
        })?;
        let layout = &self.plan.layout;
        if self.plan.routed {
            self.head_sums(layout.slope_sums, self.gradients.slope, launcher)?;
            self.head_sums(layout.bias_sums, self.gradients.bias, launcher)?;
        }
        if self.plan.soft.is_some() {
            self.head_sums(layout.tau_sums, self.gradients.tau, launcher)?;
        }
        Ok(())
    }

    /// events -> the slots at every chunk's entry.
    fn slots(&self, launcher: &mut impl Launcher) -> Result<()> {
        let (layout, rows) = (&self.plan.layout, self.geometry.rows());
        // A warp a chunk, and some blocks for every multiprocessor of the largest card.
        let chunks = self.plan.shape.time.div_ceil(self.geometry.chunk());
        let parts = chunks.div_ceil(8).min(1024_usize.div_ceil(rows.max(1))).max(1);
        let params = SlotsParams {
            extents: self.extents,
            events: self.forward.events,
            initial_len: self.initial.len,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            chunk_place: self.chunk_place(),
            chunk: self.geometry.chunk() as i32,
            parts: parts as i32,
        };
        launcher.launch(BackwardKernel::SlotsMaps, rows * parts, &params)?;
        launcher.launch(BackwardKernel::Slots, rows, &params)
    }

    /// k -> sums of keys, as route takes them.
    fn route_sums(&self, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = RouteSumsParams {
            extents: self.extents,
            k: self.inputs.k,
            sums: self.at(layout.key_sums),
            bases: self.at(layout.key_bases),
            key_factors: if self.plan.qk_l2norm { self.at(layout.key_factors) } else { 0 },
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launcher.launch(BackwardKernel::RouteSums, self.geometry.route_sums_blocks(), &params)?;
        launcher.launch(BackwardKernel::RouteBases, self.geometry.route_bases_blocks(), &params)
    }

    /// q, k, g, beta -> P and, delta rule, Qt, W, Kh of a window.
    fn prepare(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = PrepareParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            g: self.inputs.g,
            beta: self.inputs.beta,
            p: self.at(layout.p),
            qt: self.at(layout.qt),
            w: self.at(layout.w),
            kh: self.at(layout.kh),
            from: window.start as i64,
            to: window.end as i64,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launcher.launch(BackwardKernel::Prepare, self.window_blocks(window), &params)
    }

    fn scan_states(
        &self,
        from: Option<usize>,
        to: usize,
        window: &Range<usize>,
        entries: DevicePointer,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let layout = &self.plan.layout;
        let params = ScanStatesParams {
            extents: self.extents,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            events: self.forward.events,
            chunk_len: self.at(layout.chunk_len),
            w: self.at(layout.w),
            kh: self.at(layout.kh),
            initial_len: self.initial.len,
            initial_states: self.initial.states,
            source: from.map_or(0, |place| self.bank(place)),
            bank: self.bank(to),
            entries,
            from: window.start as i64,
            to: window.end as i64,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launcher.launch(BackwardKernel::ScanStates, self.scan_blocks(), &params)
    }

    /// Carries the states over windows.
    fn advance(
        &self,
        from: Option<usize>,
        to: usize,
        windows: Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        if let Some(hopper) = &self.plan.hopper {
            return self.advance_hopper(hopper, from, to, windows, launcher);
        }
        if !self.geometry.delta {
            return self.scan_states(from, to, &self.tokens(windows), 0, launcher);
        }
        // W and Kh are there for a window at a time.
        let mut from = from;
        for window in windows {
            let window = self.tokens(window..window + 1);
            self.prepare(&window, launcher)?;
            self.scan_states(from, to, &window, 0, launcher)?;
            from = Some(to);
        }
        Ok(())
    }

    /// The adjoint of a window.
    fn reverse(&self, from: Option<usize>, window: usize, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let tokens = self.tokens(window..window + 1);
        if let Some(hopper) = &self.plan.hopper {
            self.reverse_hopper(hopper, from, &tokens, launcher)?;
        } else {
            self.prepare(&tokens, launcher)?;
            self.scan_states(from, from.unwrap_or(0), &tokens, self.at(layout.entries), launcher)?;
            self.scan_backward(&tokens, launcher)?;
            self.prepare_backward(&tokens, launcher)?;
        }
        if self.plan.routed {
            self.route_backward(&tokens, launcher)?;
        }
        if let Some(soft) = self.plan.soft {
            self.drift_backward(soft, &tokens, launcher)?;
        }
        if self.plan.through_open {
            self.segment_states(Some(window), launcher)?;
            self.segment_backward(&tokens, launcher)?;
        }
        self.group_sum(&tokens, launcher)
    }

    fn scan_backward(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let in_f32 = self.plan.soft.is_some() || self.plan.through_open;
        let params = ScanBackwardParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            d_o: self.upstream.o,
            events: self.forward.events,
            lambda: self.lambda,
            chunk_len: self.at(layout.chunk_len),
            p: self.at(layout.p),
            qt: self.at(layout.qt),
            w: self.at(layout.w),
            kh: self.at(layout.kh),
            initial_len: self.initial.len,
            entries: self.at(layout.entries),
            scratch: self.at(layout.scratch),
            d_bank: self.at(layout.d_bank),
            final_states: self.final_gradient.states,
            initial_gradient: self.initial_gradient.states,
            d_qt: self.at(layout.d_qt),
            d_kh: self.at(layout.d_kh),
            d_w: self.at(layout.d_w),
            d_kd: self.at(layout.d_kd),
            d_weights: self.at(layout.d_weights),
            d_total: self.at(layout.d_total),
            d_v: if in_f32 { self.at(layout.d_v) } else { 0 },
            dv: if in_f32 { 0 } else { self.gradients.v },
            from: window.start as i64,
            to: window.end as i64,
            places: self.window_places(window) as i64,
            lambda_columns: self.lambda_columns as i32,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launcher.launch(BackwardKernel::ScanBackward, self.scan_blocks(), &params)
    }

    fn prepare_backward(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = PrepareBackwardParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            beta: self.inputs.beta,
            d_o: self.upstream.o,
            events: self.forward.events,
            lambda: self.lambda,
            chunk_len: self.at(layout.chunk_len),
            d_qt: self.at(layout.d_qt),
            d_kh: self.at(layout.d_kh),
            d_w: self.at(layout.d_w),
            d_kd: self.at(layout.d_kd),
            d_weights: self.at(layout.d_weights),
            d_total: self.at(layout.d_total),
            d_q: self.at(layout.d_q),
            d_k: self.at(layout.d_k),
            dg: self.gradients.g,
            dbeta: self.gradients.beta,
            dlambda: if self.plan.routed { 0 } else { self.gradients.lambda },
            d_slots: if self.plan.routed { self.at(layout.d_slots) } else { 0 },
            from: window.start as i64,
            to: window.end as i64,
            places: self.window_places(window) as i64,
            slices: self.geometry.slices() as i32,
            lambda_columns: self.lambda_columns as i32,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launcher.launch(BackwardKernel::PrepareBackward, self.window_blocks(window), &params)
    }

    /// Sums of what the chunks have left, added to those of the groups before.
    fn head_sums(&self, sums: usize, out: DevicePointer, launcher: &mut impl Launcher) -> Result<()> {
        let params = HeadSumsParams {
            extents: self.extents,
            sums: self.at(sums),
            out,
            chunk: self.geometry.chunk() as i32,
            add: (!self.first).into(),
        };
        launcher.launch(BackwardKernel::HeadSums, self.geometry.value_heads, &params)
    }

    fn route_backward(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let d_keys = self.initial_gradient.keys;
        let params = RouteBackwardParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            events: self.forward.events,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            sums: self.at(layout.key_sums),
            bases: self.at(layout.key_bases),
            key_factors: if self.plan.qk_l2norm { self.at(layout.key_factors) } else { 0 },
            initial_len: self.initial.len,
            initial_tokens: self.initial.tokens,
            initial_keys: self.initial.keys,
            slope: self.inputs.slope,
            bias: self.inputs.bias,
            logits: self.inputs.logits,
            d_slots: self.at(layout.d_slots),
            final_keys: self.final_gradient.keys,
            d_q: self.at(layout.d_q),
            d_k: self.at(layout.d_k),
            dlogits: self.gradients.logits,
            slope_sums: self.at(layout.slope_sums),
            bias_sums: self.at(layout.bias_sums),
            d_bank: self.at(layout.key_bank),
            exits: self.at(layout.exits),
            d_keys: if d_keys == 0 { self.at(layout.d_keys) } else { d_keys },
            from: window.start as i64,
            to: window.end as i64,
            logit_columns: self.inputs.logit_columns as i32,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launcher.launch(BackwardKernel::RouteBackward, self.window_blocks(window), &params)?;
        let blocks = self.geometry.route_backward_keys_blocks();
        launcher.launch(BackwardKernel::RouteBackwardKeys, blocks, &params)
    }

    /// dV -> the gradient of the drift; also dv, where R has no adjoint.
    fn drift_backward(&self, soft: Soft, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = DriftBackwardParams {
            extents: self.extents,
            v: self.inputs.v,
            d_v: self.at(layout.d_v),
            events: self.forward.events,
            drift: self.forward.drift,
            chunk_len: self.at(layout.chunk_len),
            tau: self.inputs.tau,
            ddrift: self.gradients.drift,
            tau_sums: self.at(layout.tau_sums),
            dv: if self.plan.through_open { 0 } else { self.gradients.v },
            from: window.start as i64,
            to: window.end as i64,
            temperature: soft.temperature,
            reserved: 0,
        };
        launcher.launch(BackwardKernel::DriftBackward, self.window_blocks(window), &params)
    }

    /// k, v, g -> what segment knows of every token, of all tokens.
    fn segment_gram(&self, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = SegmentParams {
            extents: self.extents,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            tau: self.inputs.tau,
            walks: self.at(layout.walks),
            reach: self.at(layout.reach),
            energy: self.at(layout.energy),
            factor: self.at(layout.factor),
            totals: self.at(layout.totals),
            next: self.at(layout.next),
            from: 0,
            to: i64::MAX,
            qk_l2norm: self.plan.qk_l2norm.into(),
            ..SegmentParams::default()
        };
        launcher.launch(BackwardKernel::SegmentGram, self.geometry.segment_gram_blocks(), &params)
    }

    /// R before every window, or before the chunks of one.
    fn segment_states(&self, window: Option<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let Shape { dk, dv, .. } = self.plan.shape;
        let tokens = self.tokens(window.map_or(0..self.plan.windows, |window| window..window + 1));
        let first = window.unwrap_or(0);
        let params = SegmentStatesParams {
            extents: self.extents,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            events: self.forward.events,
            energy: self.at(layout.energy),
            factor: self.at(layout.factor),
            initial_open: self.initial.open,
            entry: self.at(layout.opens + first * dk * dv * 4),
            entry_log: self.at(layout.open_logs + first * 8),
            open: self.at(if window.is_some() { layout.open } else { layout.opens }),
            open_log: self.at(if window.is_some() { layout.open_log } else { layout.open_logs }),
            from: tokens.start as i64,
            to: tokens.end as i64,
            stride: if window.is_some() { 1 } else { self.plan.chunks as i64 },
            saves: if window.is_some() { 0 } else { self.plan.windows as i64 },
            entry_step: self.plan.windows as i64,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        let blocks = self.geometry.segment_states_blocks();
        launcher.launch(BackwardKernel::SegmentStates, blocks, &params)
    }

    fn segment_backward(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let d_open = self.initial_gradient.open;
        let through_drift = self.plan.soft.is_some_and(|soft| soft.through_drift);
        let params = SegmentBackwardParams {
            extents: self.extents,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            events: self.forward.events,
            energy: self.at(layout.energy),
            factor: self.at(layout.factor),
            drift: self.forward.drift,
            ddrift: if through_drift { self.gradients.drift } else { 0 },
            open: self.at(layout.open),
            open_log: self.at(layout.open_log),
            initial_len: self.initial.len,
            initial_open: self.initial.open,
            final_open: self.final_gradient.open,
            d_v: self.at(layout.d_v),
            dv: self.gradients.v,
            d_k: self.at(layout.d_k),
            dg: self.gradients.g,
            scalars: self.at(layout.scalars),
            d_open: self.at(layout.d_open),
            d_carried: if d_open == 0 { self.at(layout.d_carried) } else { d_open },
            d_carried_scalars: self.at(layout.d_carried_scalars),
            from: window.start as i64,
            to: window.end as i64,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        let (chunks, rows) = (self.window_blocks(window), self.geometry.rows());
        let slices = self.geometry.segment_states_blocks();
        launcher.launch(BackwardKernel::SegmentScalars, chunks, &params)?;
        launcher.launch(BackwardKernel::SegmentOpenBackward, slices, &params)?;
        launcher.launch(BackwardKernel::SegmentBackward, chunks, &params)?;
        launcher.launch(BackwardKernel::SegmentLogBackward, rows, &params)
    }

    /// Gradients of q and k, where that is not given already: over a group's value heads, through their norm.
    fn group_sum(&self, window: &Range<usize>, launcher: &mut impl Launcher) -> Result<()> {
        let layout = &self.plan.layout;
        let params = GroupSumParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            d_q: self.at(layout.d_q),
            d_k: if self.plan.keys_at_once() { 0 } else { self.at(layout.d_k) },
            dq: self.gradients.q,
            dk: self.gradients.k,
            from: window.start as i64,
            to: window.end as i64,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        let blocks = self.geometry.group_sum_blocks(self.window_places(window));
        launcher.launch(BackwardKernel::GroupSum, blocks, &params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    /// Sizes S1 to S6 at which kernels are compared: B, T, HV, dk = dv.
    const SIZES: [(usize, usize, usize, usize); 6] = [
        (4, 4096, 16, 128),
        (2, 8192, 16, 128),
        (1, 32_768, 16, 128),
        (1, 131_072, 8, 128),
        (8, 2048, 32, 64),
        (32, 1024, 16, 128),
    ];

    #[test]
    fn workspaces_stay_within_the_budget() {
        for (batch, time, heads, dk) in SIZES {
            for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
                for read in [Read::Given, Read::Routed] {
                    let options = Options { recurrence, read, ..Options::default() };
                    let shape = Shape {
                        batch,
                        time,
                        heads,
                        value_heads: heads,
                        dk,
                        dv: dk,
                        capacity: 30,
                        sequences: batch,
                    };
                    let call = Call { options: &options, shape, dtype: Dtype::Bf16, final_cache: false };
                    for hopper in [false, true] {
                        let plan = Backward::new(&call, 132, BUDGET, hopper).unwrap();
                        let Backward { group, chunks, windows, places, .. } = plan;
                        let bytes = plan.workspace_bytes();
                        println!(
                            "{batch},{time},{heads},{dk} {recurrence:?} {read:?} hopper {}: {} MB, groups of {group}, \
                             {windows} windows of {chunks} chunks, {places} places, {} windows carried over",
                            plan.on_hopper(),
                            bytes / 1_000_000,
                            checkpoints::cost(windows, places),
                        );
                        assert!(bytes <= BUDGET, "{batch},{time} {recurrence:?} {read:?}: {bytes} bytes");
                        assert_eq!(plan.on_hopper(), hopper && recurrence == Recurrence::Gated);
                    }
                }
            }
        }
    }
}
