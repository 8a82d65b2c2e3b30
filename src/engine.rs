//! What an engine does, and what it returns.

use crate::cache::{Cache, CacheGradients};
use crate::error::Result;
use crate::problem::{OutputGradients, Problem};
use crate::tensor::Buffer;

/// Results of a forward.
#[derive(Debug, Clone)]
pub struct Forward {
    /// Output, `[B,T,HV,dv]`, dtype of q.
    pub o: Buffer,
    /// Drift I of every token, `[B,T,HV]`.
    pub drift: Vec<f32>,
    /// Event log, `[B,T,HV]`: all that the backward needs beside the inputs.
    pub events: Vec<u8>,
    /// Routed read weights, `[B,T,HV,M]`; `None` where the caller gave them.
    pub lambda: Option<Vec<f32>>,
    /// States after the last token of every sequence.
    pub cache: Cache,
}

/// Results of one decoding step, T = 1 but on [`Entries`](crate::Entries).
#[derive(Debug, Clone)]
pub struct Step {
    /// Output, `[B,T,HV,dv]`, dtype of q.
    pub o: Buffer,
    /// Drift I, `[B,T,HV]`.
    pub drift: Vec<f32>,
    /// Events, `[B,T,HV]`.
    pub events: Vec<u8>,
    /// Routed read weights, `[B,T,HV,M]`; `None` where the caller gave them.
    pub lambda: Option<Vec<f32>>,
}

/// Results of a backward. What the call did not read has no gradient.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Gradient of q, `[B,T,H,dk]`, dtype of q, summed over the value heads that read it.
    pub q: Buffer,
    /// Gradient of k, `[B,T,H,dk]`, dtype of q, summed over the value heads that read it.
    pub k: Buffer,
    /// Gradient of v, `[B,T,HV,dv]`, dtype of q.
    pub v: Buffer,
    /// Gradient of g, `[B,T,HV]`.
    pub g: Option<Vec<f32>>,
    /// Gradient of beta, `[B,T,HV]`.
    pub beta: Option<Vec<f32>>,
    /// Gradient of given read weights, `[B,T,HV,M]` (as many columns as lambda has).
    pub lambda: Option<Vec<f32>>,
    /// Gradients of the route's parameters, where reads are routed.
    pub route: Option<RouteGradients>,
    /// Gradients of tau and of the drift, with soft boundaries.
    pub soft: Option<SoftGradients>,
    /// Gradient of the initial cache, where one was given.
    pub cache: Option<CacheGradients>,
}

/// Gradients of [`Route`](crate::Route).
#[derive(Debug, Clone)]
pub struct RouteGradients {
    /// Gradient of the slope, `[HV]`.
    pub slope: Vec<f32>,
    /// Gradient of the bias, `[HV]`.
    pub bias: Vec<f32>,
    /// Gradient of the logits, `[B,T,HV,M]` (as many columns as they have); `None` where there are none.
    pub logits: Option<Vec<f32>>,
}

/// Gradients that soft boundaries give.
#[derive(Debug, Clone)]
pub struct SoftGradients {
    /// Gradient of tau, `[HV]`; of one tau per call, their sum.
    pub tau: Vec<f32>,
    /// Gradient of the drift, `[B,T,HV]`.
    pub drift: Vec<f32>,
}

/// The operator on one kind of machine.
pub trait Engine: Send + Sync {
    /// Name of the engine, as the command line spells it.
    fn name(&self) -> &'static str;

    /// All tokens of all sequences (OPERATOR.md, section 3).
    ///
    /// # Errors
    /// Where the caller's own event log cannot happen, or the device fails.
    fn forward(&self, problem: &Problem<'_>) -> Result<Forward>;

    /// Gradients of every argument from those of the results. `events` is the log that the forward
    /// returned (or took); it is a constant in the backward.
    ///
    /// # Errors
    /// Where `events` or `upstream` does not fit the problem, or the device fails.
    fn backward(
        &self,
        problem: &Problem<'_>,
        events: &[u8],
        upstream: &OutputGradients<'_>,
    ) -> Result<Gradients>;

    /// One token per batch entry (T = 1), in place: batch entry b continues sequence b of `cache`.
    ///
    /// # Errors
    /// Where the problem is no step, or the cache does not fit it; the cache is then unchanged.
    fn step(&self, problem: &Problem<'_>, cache: &mut Cache) -> Result<Step>;
}

/// The stages of the pipeline, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Drift, boundaries and merges: k, v, g to the event log.
    Segment,
    /// What a chunk needs that knows nothing of slots.
    Prepare,
    /// Read weights from content (routed reads only).
    Route,
    /// Reading all slots; transition, merge and append.
    Scan,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Stage; 4] = [Stage::Segment, Stage::Prepare, Stage::Route, Stage::Scan];

    /// Name, as equations, kernels and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Segment => "segment",
            Stage::Prepare => "prepare",
            Stage::Route => "route",
            Stage::Scan => "scan",
        }
    }
}

/// Where the time of one call went.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTimes {
    /// Time of the call, from entry to return.
    pub wall_ms: f64,
    /// Time in each stage, in the order of [`Stage::ALL`]: on the CPU summed over threads.
    pub stage_ms: [f64; 4],
}

impl StageTimes {
    /// Time in one stage.
    pub fn stage_ms(&self, stage: Stage) -> f64 {
        self.stage_ms[stage as usize]
    }
}
