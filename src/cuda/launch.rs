//! One function per stage: its parameters and its launch.

use super::abi::{
    DevicePointer, Extents, PrepareParams, RouteBankParams, RouteParams, ScanParams, SegmentParams,
};
use super::driver::call;
use super::module::Kernel;
use super::plan::Plan;
use super::raw::{RawCache, RawInputs, RawOutputs};
use crate::error::Result;
use crate::options::Read;
use cudarc::driver::sys::CUstream;

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
        let cache = outputs.cache.unwrap_or(RawCache {
            states: 0,
            len: workspace + layout.len as u64,
            tokens: workspace + layout.tokens as u64,
            drift: workspace + layout.drift as u64,
            open: workspace + layout.open as u64,
            keys: workspace + layout.keys as u64,
        });
        let extents = Extents { cu_seqlens: inputs.cu_seqlens, ..plan.extents };
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

    /// k, v, g -> drift, events; n, J and R of the cache.
    pub(super) fn segment(&self, stream: CUstream) -> Result<()> {
        let params = SegmentParams {
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
            mass: self.plan.mass.into(),
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launch(&self.plan.pipeline.segment, &params, stream)
    }

    /// q, k, g, beta -> what a chunk needs that knows nothing of slots.
    pub(super) fn prepare(&self, stream: CUstream) -> Result<()> {
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
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launch(&self.plan.pipeline.prepare, &params, stream)
    }

    /// q, k, events -> lambda. Given reads have no such stage.
    pub(super) fn route(&self, stream: CUstream) -> Result<()> {
        let Some([bank, route]) = &self.plan.pipeline.route else { return Ok(()) };
        let layout = &self.plan.layout;
        let (bank_keys, bank_tokens) = (self.at(layout.bank_keys), self.at(layout.bank_tokens));
        let bank_len = self.at(layout.bank_len);
        let params = RouteBankParams {
            extents: self.extents,
            k: self.inputs.k,
            events: self.outputs.events,
            initial_len: self.initial.len,
            initial_tokens: self.initial.tokens,
            initial_keys: self.initial.keys,
            bank_keys,
            bank_tokens,
            bank_len,
            keys: self.cache.keys,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launch(bank, &params, stream)?;
        let params = RouteParams {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            events: self.outputs.events,
            slope: self.inputs.slope,
            bias: self.inputs.bias,
            logits: self.inputs.logits,
            bank_keys,
            bank_tokens,
            bank_len,
            lambda: self.outputs.lambda,
            logit_columns: self.inputs.logit_columns as i32,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launch(route, &params, stream)
    }

    /// Everything -> o and the states of the cache.
    pub(super) fn scan(&self, stream: CUstream) -> Result<()> {
        let layout = &self.plan.layout;
        let (lambda, lambda_columns) = match self.plan.read {
            Read::Given => (self.inputs.lambda, self.inputs.lambda_columns),
            Read::Routed => (self.outputs.lambda, self.plan.shape.capacity),
        };
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
        launch(&self.plan.pipeline.scan, &params, stream)
    }
}

/// Launches `kernel` with its one parameter, the struct `params`. A grid without blocks is no launch.
fn launch<P>(kernel: &Kernel, params: &P, stream: CUstream) -> Result<()> {
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
