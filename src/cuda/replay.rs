//! A backward of a call that has kept the log, and of the rest what it liked: the drift and routed read weights, where the
//! backward takes them and they were not kept, are computed again; gradients that nobody wants are written to the
//! workspace.

use super::abi::DevicePointer;
use super::engine::Engine;
use super::forward;
use super::launch::Stages;
use super::plan::{BackwardPlan, Call, Plan};
use super::raw::{self, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream};
use super::workspace::ALIGNMENT;
use crate::error::{Error, Result};
use crate::options::Read;

/// A replay's kernels and workspace, chosen once.
#[derive(Debug, Clone)]
pub struct ReplayPlan {
    backward: BackwardPlan,
    /// segment and route, where they run again: in the workspace before the backward does.
    decisions: Option<Plan>,
    /// Where stands in the workspace what was not kept and what is not wanted.
    drift: Option<usize>,
    lambda: Option<usize>,
    unwanted: Unwanted,
    bytes: usize,
}

/// Room for gradients that the kernels write in any case.
#[derive(Debug, Clone, Copy)]
struct Unwanted {
    q: Option<usize>,
    k: Option<usize>,
    v: Option<usize>,
    beta: Option<usize>,
    lambda: Option<usize>,
    slope: Option<usize>,
    bias: Option<usize>,
    tau: Option<usize>,
    drift: Option<usize>,
}

impl ReplayPlan {
    pub(super) fn new(
        engine: &Engine,
        call: &Call<'_>,
        inputs: &RawInputs,
        forward: &RawForward,
        gradients: &RawGradients,
    ) -> Result<ReplayPlan> {
        let backward = engine.plan_backward(call)?;
        let (options, shape) = (call.options, &call.shape);
        let routed = options.read == Read::Routed;
        let lacks_drift = (backward.soft || backward.through_open) && forward.drift == 0;
        let lacks_lambda = routed && forward.lambda == 0;
        let decisions = match lacks_drift || lacks_lambda {
            true => Some(engine.plan(&Call { final_cache: false, ..*call })?),
            false => None,
        };
        let mut end = decisions.as_ref().map_or(0, Plan::workspace_bytes).max(backward.workspace_bytes());
        let tokens = shape.tokens().saturating_mul(shape.value_heads);
        let mut room = |absent: bool, factors: [usize; 3]| {
            absent.then(|| {
                let at = end.checked_next_multiple_of(ALIGNMENT)?;
                let bytes = factors.iter().try_fold(1usize, |all, &factor| all.checked_mul(factor))?;
                end = at.checked_add(bytes)?;
                Some(at)
            })
        };
        let (element, heads) = (call.dtype.bytes(), shape.value_heads);
        let keys = [shape.tokens(), shape.heads * shape.dk, element];
        let rooms = [
            // Both are written where either is.
            room(decisions.is_some() && forward.drift == 0, [tokens, 1, 4]),
            room(lacks_lambda, [tokens, shape.capacity, 4]),
            room(gradients.q == 0, keys),
            room(gradients.k == 0, keys),
            room(gradients.v == 0, [tokens, shape.dv, element]),
            room(backward.delta && gradients.beta == 0, [tokens, 1, 4]),
            room(!routed && gradients.lambda == 0, [tokens, inputs.lambda_columns, 4]),
            room(routed && gradients.slope == 0, [heads, 1, 4]),
            room(routed && gradients.bias == 0, [heads, 1, 4]),
            room(backward.soft && gradients.tau == 0, [heads, 1, 4]),
            room(backward.soft && gradients.drift == 0, [tokens, 1, 4]),
        ];
        let too_large = Error::OutOfMemory { bytes: usize::MAX, free: 0 };
        if rooms.contains(&Some(None)) {
            return Err(too_large);
        }
        let bytes = end.checked_next_multiple_of(ALIGNMENT).ok_or(too_large)?;
        let [drift, lambda, q, k, v, beta, d_lambda, slope, bias, tau, d_drift] = rooms.map(Option::flatten);
        let unwanted = Unwanted { q, k, v, beta, lambda: d_lambda, slope, bias, tau, drift: d_drift };
        Ok(ReplayPlan { backward, decisions, drift, lambda, unwanted, bytes })
    }

    /// Bytes of workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a launch reads tau.
    pub fn reads_tau(&self) -> bool {
        self.backward.soft || self.backward.through_open || self.decisions.is_some()
    }

    /// Addresses are checked here; the context is bound.
    ///
    /// # Safety
    /// As [`Engine::launch_replay`].
    pub(super) unsafe fn launch(
        &self,
        engine: &Engine,
        inputs: &RawInputs,
        forward: &RawForward,
        upstream: &RawUpstream,
        gradients: &RawGradients,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        let (base, given) = workspace;
        if given < self.bytes {
            return Err(Error::Workspace { expected: self.bytes, given });
        }
        let or = |address: DevicePointer, room: Option<usize>| match (address, room) {
            (0, Some(at)) => base + at as u64,
            (address, _) => address,
        };
        let forward = RawForward {
            events: forward.events,
            drift: or(forward.drift, self.drift),
            lambda: or(forward.lambda, self.lambda),
        };
        let unwanted = &self.unwanted;
        let gradients = RawGradients {
            q: or(gradients.q, unwanted.q),
            k: or(gradients.k, unwanted.k),
            v: or(gradients.v, unwanted.v),
            beta: or(gradients.beta, unwanted.beta),
            lambda: or(gradients.lambda, unwanted.lambda),
            slope: or(gradients.slope, unwanted.slope),
            bias: or(gradients.bias, unwanted.bias),
            tau: or(gradients.tau, unwanted.tau),
            drift: or(gradients.drift, unwanted.drift),
            ..*gradients
        };
        if let Some(plan) = &self.decisions {
            // Only these stages: o is not there to be written.
            let inputs = RawInputs { events: forward.events, ..*inputs };
            let outputs = RawOutputs {
                o: 0,
                drift: forward.drift,
                events: forward.events,
                lambda: forward.lambda,
                cache: None,
            };
            raw::check_decisions(plan, engine.ordinal(), &inputs, &outputs, workspace)?;
            forward::decide(&Stages::new(plan, &inputs, &outputs, base), engine.raw_stream())?;
        }
        // SAFETY: as the caller says; what was not kept is in the workspace, of the extents of this call.
        unsafe { engine.launch_backward(&self.backward, inputs, &forward, upstream, &gradients, workspace) }
    }
}
