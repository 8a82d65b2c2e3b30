//! One function per stage: its parameters and its launch.

use super::abi::{
    DevicePointer, Extents, GammasSm90Params, PrepareDeltaSm90Params, PrepareParams, PrepareSm90Params,
    RouteParams, RouteSumsParams, ScanDeltaSm90Params, ScanParams, ScanSm90, ScanSm90Params, SegmentParams,
};
use super::backward::{BackwardKernel, Launcher};
use super::driver::call;
use super::module::{Device, Kernel, blocks_of};
use super::plan::{Plan, Scan};
use super::raw::{RawCache, RawInputs, RawOutputs};
use super::stream::Event;
use crate::error::{Error, Result};
use crate::options::Read;
use cudarc::driver::sys::CUstream;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of all value heads of a call whose stages follow each other on one stream: launching them takes longer than they do.
const MOST_SHORT: usize = 1024;

/// A plan with the addresses of one call.
pub(super) struct Stages<'a> {
    plan: &'a Plan,
    inputs: RawInputs,
    outputs: RawOutputs,
    workspace: DevicePointer,
    /// The final cache, or its stand-in in the workspace.
    cache: RawCache,
    /// The initial cache, or null.
    initial: RawCache,
    extents: Extents,
}

impl<'a> Stages<'a> {
    /// All addresses have been checked.
    pub(super) fn new(
        plan: &'a Plan,
        inputs: &RawInputs,
        outputs: &RawOutputs,
        workspace: DevicePointer,
    ) -> Self {
        let layout = &plan.layout;
        let states = if plan.hands_states_over() { workspace + layout.states as u64 } else { 0 };
        let cache = outputs.cache.unwrap_or(RawCache {
            states,
            len: workspace + layout.len as u64,
            tokens: workspace + layout.tokens as u64,
            drift: workspace + layout.drift as u64,
            open: workspace + layout.open as u64,
            keys: workspace + layout.keys as u64,
        });
        // One sequence of all tokens is not packed, whatever says so: the plan may have cut it into windows.
        let packed = plan.shape.sequences != plan.shape.batch;
        let cu_seqlens = if packed { inputs.cu_seqlens } else { 0 };
        let extents = Extents { cu_seqlens, ..plan.extents };
        Stages {
            plan,
            inputs: *inputs,
            outputs: *outputs,
            workspace,
            cache,
            initial: inputs.cache.unwrap_or_default(),
            extents,
        }
    }

    fn at(&self, offset: usize) -> DevicePointer {
        self.workspace + offset as u64
    }

    /// The windows of tokens, in order, that the stages after segment_gram are launched for.
    pub(super) fn windows(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (window, time) = (self.plan.window, self.plan.shape.time);
        (0..time.max(1)).step_by(window).map(move |from| from..from + window)
    }

    /// Whether every stage is over about as soon as it is launched: a second stream would win nothing.
    pub(super) fn are_short(&self) -> bool {
        let shape = &self.plan.shape;
        self.plan.window >= shape.time && shape.tokens() * shape.value_heads <= MOST_SHORT
    }

    /// Whether prepare needs the log, and so comes after it.
    pub(super) fn prepares_from_log(&self) -> bool {
        matches!(self.plan.pipeline.scan, Scan::Hopper { .. })
    }

    fn segment_params(&self, window: Range<usize>) -> SegmentParams {
        let layout = &self.plan.layout;
        SegmentParams {
            extents: self.extents,
            k: self.inputs.k,
            v: self.inputs.v,
            g: self.inputs.g,
            tau: self.inputs.tau,
            log: self.inputs.events,
            initial_len: self.initial.len,
            initial_tokens: self.initial.tokens,
            initial_drift: self.initial.drift,
            initial_open: self.initial.open,
            drift: self.outputs.drift,
            events: self.outputs.events,
            len: self.cache.len,
            tokens: self.cache.tokens,
            summed_drift: self.cache.drift,
            open: self.cache.open,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            chunk_place: self.at(layout.chunk_place),
            chunk_log: self.at(layout.chunk_log),
            walks: self.at(layout.walks),
            reach: self.at(layout.reach),
            energy: self.at(layout.energy),
            factor: self.at(layout.factor),
            totals: self.at(layout.totals),
            next: self.at(layout.next),
            state: self.at(layout.state),
            from: window.start as i64,
            to: window.end as i64,
            mass: self.plan.mass.into(),
            qk_l2norm: self.plan.qk_l2norm.into(),
        }
    }

    /// The part of segment that is parallel over chunks, for all tokens.
    pub(super) fn segment_gram(&self, stream: CUstream) -> Result<()> {
        let [gram, _] = &self.plan.pipeline.segment;
        // Past every length: a window may end where it likes.
        launch(gram, &self.segment_params(0..i64::MAX as usize), stream)
    }

    /// k, v, g -> drift, events; n, J and R of the cache: the chain over a window's tokens.
    pub(super) fn segment(&self, window: Range<usize>, stream: CUstream) -> Result<()> {
        let [_, chain] = &self.plan.pipeline.segment;
        launch(chain, &self.segment_params(window), stream)
    }

    /// Given or routed read weights, and their columns.
    fn lambda(&self) -> (DevicePointer, usize) {
        match self.plan.read {
            Read::Given => (self.inputs.lambda, self.inputs.lambda_columns),
            Read::Routed => (self.outputs.lambda, self.plan.shape.capacity),
        }
    }

    /// q, k, g, beta -> what a chunk needs that knows nothing of slots; on Hopper q, k, g, the log and lambda -> what a
    /// chunk's slices share.
    pub(super) fn prepare(&self, window: Range<usize>, stream: CUstream) -> Result<()> {
        let layout = &self.plan.layout;
        let (lambda, lambda_columns) = self.lambda();
        match &self.plan.pipeline.scan {
            Scan::Portable { prepare, .. } => {
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
                    from: 0,
                    to: 0,
                    scale: self.plan.scale,
                    qk_l2norm: self.plan.qk_l2norm.into(),
                };
                launch(prepare, &params, stream)
            }
            Scan::Hopper { form, prepare, .. } => {
                let (time, packed) = (self.plan.shape.time, self.extents.cu_seqlens != 0);
                let places = ScanSm90::places(&self.plan.geometry, time, packed, window.start, window.end);
                let blocks = ScanSm90::prepare_blocks(&self.plan.geometry, places);
                // At most those of all tokens, which the plan has counted.
                let kernel = Kernel { blocks: (blocks as u32).min(prepare.blocks), ..*prepare };
                if form.delta {
                    let params = PrepareDeltaSm90Params {
                        extents: self.extents,
                        q: self.inputs.q,
                        k: self.inputs.k,
                        g: self.inputs.g,
                        beta: self.inputs.beta,
                        events: self.outputs.events,
                        lambda,
                        chunk_len: self.at(layout.chunk_len),
                        chunk_place: self.at(layout.chunk_place),
                        pairs: self.at(layout.pairs),
                        weights: self.at(layout.weights),
                        queries: self.at(layout.queries),
                        transition: self.at(layout.transition),
                        writes: self.at(layout.writes),
                        plans: self.at(layout.plans),
                        from: window.start as i64,
                        to: window.end as i64,
                        lambda_columns: lambda_columns as i32,
                        slots: form.weight_slots() as i32,
                        alternate: form.alternate().into(),
                        scale: self.plan.scale,
                        qk_l2norm: self.plan.qk_l2norm.into(),
                        reserved: 0,
                    };
                    return launch(&kernel, &params, stream);
                }
                let params = PrepareSm90Params {
                    extents: self.extents,
                    q: self.inputs.q,
                    k: self.inputs.k,
                    g: self.inputs.g,
                    events: self.outputs.events,
                    lambda,
                    chunk_len: self.at(layout.chunk_len),
                    chunk_starts: self.at(layout.chunk_starts),
                    chunk_place: self.at(layout.chunk_place),
                    gammas: self.at(layout.gammas),
                    pairs: self.at(layout.pairs),
                    weights: self.at(layout.weights),
                    plans: self.at(layout.plans),
                    from: window.start as i64,
                    to: window.end as i64,
                    lambda_columns: lambda_columns as i32,
                    slots: form.weight_slots() as i32,
                    scale: self.plan.scale,
                    qk_l2norm: self.plan.qk_l2norm.into(),
                    ..PrepareSm90Params::default()
                };
                launch(&kernel, &params, stream)
            }
        }
    }

    /// g -> its sums before every chunk, for prepare on Hopper. Others have no such stage.
    pub(super) fn gammas(&self, stream: CUstream) -> Result<()> {
        let Scan::Hopper { gammas: Some(kernel), .. } = &self.plan.pipeline.scan else { return Ok(()) };
        let gammas = self.at(self.plan.layout.gammas);
        let params = GammasSm90Params { extents: self.extents, g: self.inputs.g, gammas };
        launch(kernel, &params, stream)
    }

    /// k -> sums of keys, of all tokens: the part of route that knows nothing of the log. Given reads have no such stage.
    pub(super) fn route_sums(&self, stream: CUstream) -> Result<()> {
        let Some([sums, bases, _]) = &self.plan.pipeline.route else { return Ok(()) };
        let layout = &self.plan.layout;
        let params = RouteSumsParams {
            extents: self.extents,
            k: self.inputs.k,
            sums: self.at(layout.key_sums),
            bases: self.at(layout.key_bases),
            key_factors: self.at(layout.key_factors),
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launch(sums, &params, stream)?;
        launch(bases, &params, stream)
    }

    /// q, k, events, sums of keys -> lambda of a window's tokens. Given reads have no such stage.
    pub(super) fn route(&self, window: Range<usize>, stream: CUstream) -> Result<()> {
        let Some([_, _, route]) = &self.plan.pipeline.route else { return Ok(()) };
        let layout = &self.plan.layout;
        let params = RouteParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            events: self.outputs.events,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            sums: self.at(layout.key_sums),
            bases: self.at(layout.key_bases),
            key_factors: self.at(layout.key_factors),
            initial_len: self.initial.len,
            initial_tokens: self.initial.tokens,
            initial_keys: self.initial.keys,
            slope: self.inputs.slope,
            bias: self.inputs.bias,
            logits: self.inputs.logits,
            lambda: self.outputs.lambda,
            keys: self.cache.keys,
            from: window.start as i64,
            to: window.end as i64,
            logit_columns: self.inputs.logit_columns as i32,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        let (time, packed) = (self.plan.shape.time, self.extents.cu_seqlens != 0);
        let blocks = self.plan.geometry.route_blocks(time, packed, window.start, window.end);
        // At most those of all tokens, which the plan has counted.
        let kernel = Kernel { blocks: (blocks as u32).min(route.blocks), ..*route };
        launch(&kernel, &params, stream)
    }

    /// Everything -> o and the states of the cache.
    pub(super) fn scan(&self, window: Range<usize>, stream: CUstream) -> Result<()> {
        let layout = &self.plan.layout;
        let (lambda, lambda_columns) = self.lambda();
        match &self.plan.pipeline.scan {
            Scan::Portable { scan, .. } => {
                let params = ScanParams {
                    extents: self.extents,
                    q: self.inputs.q,
                    k: self.inputs.k,
                    v: self.inputs.v,
                    g: self.inputs.g,
                    events: self.outputs.events,
                    lambda,
                    p: self.at(layout.p),
                    qt: self.at(layout.qt),
                    w: self.at(layout.w),
                    kh: self.at(layout.kh),
                    initial_len: self.initial.len,
                    initial_states: self.initial.states,
                    bank: self.at(layout.bank),
                    o: self.outputs.o,
                    states: self.cache.states,
                    lambda_columns: lambda_columns as i32,
                    scale: self.plan.scale,
                    qk_l2norm: self.plan.qk_l2norm.into(),
                    reserved: 0,
                };
                launch(scan, &params, stream)
            }
            Scan::Hopper { form, scan, .. } if form.delta => {
                let params = ScanDeltaSm90Params {
                    extents: self.extents,
                    v: self.inputs.v,
                    pairs: self.at(layout.pairs),
                    weights: self.at(layout.weights),
                    queries: self.at(layout.queries),
                    transition: self.at(layout.transition),
                    writes: self.at(layout.writes),
                    plans: self.at(layout.plans),
                    initial_len: self.initial.len,
                    initial_states: self.initial.states,
                    chunk_len: self.at(layout.chunk_len),
                    chunk_place: self.at(layout.chunk_place),
                    o: self.outputs.o,
                    states: self.cache.states,
                    from: window.start as i64,
                    to: window.end as i64,
                };
                launch(scan, &params, stream)
            }
            Scan::Hopper { scan, .. } => {
                let params = ScanSm90Params {
                    extents: self.extents,
                    q: self.inputs.q,
                    k: self.inputs.k,
                    v: self.inputs.v,
                    pairs: self.at(layout.pairs),
                    weights: self.at(layout.weights),
                    plans: self.at(layout.plans),
                    initial_len: self.initial.len,
                    initial_states: self.initial.states,
                    source: self.at(layout.banks),
                    banks: self.at(layout.banks),
                    o: self.outputs.o,
                    states: self.cache.states,
                    from: window.start as i64,
                    to: window.end as i64,
                    ..ScanSm90Params::default()
                };
                launch(scan, &params, stream)
            }
        }
    }
}

/// Launches a backward's kernels on a stream.
pub(super) struct Backwards<'a> {
    pub(super) kernels: &'a [(BackwardKernel, Kernel)],
    pub(super) stream: CUstream,
}

impl Launcher for Backwards<'_> {
    fn launch<P>(&mut self, kernel: BackwardKernel, blocks: usize, params: &P) -> Result<()> {
        let found = self.kernels.iter().find(|(name, _)| *name == kernel);
        // The plan has resolved every kernel that its schedule names, and counted their blocks.
        let Some((_, kernel)) = found else { return Err(Error::NoKernels) };
        launch(&Kernel { blocks: blocks_of(blocks)?, ..*kernel }, params, self.stream)
    }

    fn zero(&mut self, at: DevicePointer, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller answers for the array, which is as long as the schedule says.
        unsafe { call!(cuMemsetD8Async(at, 0, bytes, self.stream)) }
    }
}

/// The same with the moments before and after every launch.
pub(super) struct TimedBackwards<'a> {
    pub(super) launcher: Backwards<'a>,
    pub(super) device: &'a Arc<Device>,
    pub(super) marks: Vec<(BackwardKernel, [Event; 2])>,
}

impl Launcher for TimedBackwards<'_> {
    fn launch<P>(&mut self, kernel: BackwardKernel, blocks: usize, params: &P) -> Result<()> {
        let marks = [Event::new(self.device, true)?, Event::new(self.device, true)?];
        marks[0].record(self.launcher.stream)?;
        self.launcher.launch(kernel, blocks, params)?;
        marks[1].record(self.launcher.stream)?;
        self.marks.push((kernel, marks));
        Ok(())
    }

    fn zero(&mut self, at: DevicePointer, bytes: usize) -> Result<()> {
        self.launcher.zero(at, bytes)
    }
}

/// Launches `kernel` with its one parameter, the struct `params`. A grid without blocks is no launch.
pub(super) fn launch<P>(kernel: &Kernel, params: &P, stream: CUstream) -> Result<()> {
    if kernel.blocks == 0 {
        return Ok(());
    }
    let mut parameters = [std::ptr::from_ref(params).cast_mut().cast()];
    // SAFETY: `params` is the twin of the struct that this kernel takes by value (abi.rs), and the driver copies it
    // before it returns; its addresses are the caller's to answer for (raw.rs). Grid, block and shared memory are
    // those that the plan chose for this kernel. The stream is one of the bound context.
    unsafe {
        call!(cuLaunchKernel(
            kernel.function.0,
            kernel.blocks,
            1,
            1,
            kernel.threads,
            1,
            1,
            kernel.shared_bytes,
            stream,
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        ))
    }
}
