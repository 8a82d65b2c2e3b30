//! The forward: segment -> prepare -> route -> scan.

use super::engine::Engine;
use super::launch::Stages;
use super::memory::{Memory, bytes_of, bytes_of_mut};
use super::plan::{Call, Plan};
use super::raw::{RawCache, RawInputs, RawOutputs};
use super::stream::{SideStream, Timeline};
use crate::cache::Cache;
use crate::engine::{Forward, Stage};
use crate::error::Result;
use crate::options::Read;
use crate::problem::Problem;
use crate::tensor::{Buffer, Data, Tensor};
use cudarc::driver::sys::CUstream;

/// The stages on `main`; beside it the chain of segment, a window ahead of what reads its log.
pub(super) fn forked(stages: &Stages<'_>, main: CUstream, side: &SideStream) -> Result<()> {
    let beside = side.fork(main)?;
    stages.segment_gram(beside)?;
    stages.gammas(main)?;
    stages.route_sums(main)?;
    for window in stages.windows() {
        stages.segment(window.clone(), beside)?;
        if !stages.prepares_from_log() {
            stages.prepare(window.clone(), main)?;
        }
        side.join(main)?;
        stages.route(window.clone(), main)?;
        if stages.prepares_from_log() {
            stages.prepare(window.clone(), main)?;
        }
        stages.scan(window, main)?;
    }
    Ok(())
}

/// The stages one after another, timed.
pub(super) fn timed(stages: &Stages<'_>, main: CUstream, timeline: &Timeline) -> Result<()> {
    timeline.begin();
    timeline.time(Stage::Segment, 0, main, || {
        stages.segment_gram(main)?;
        stages.segment(0..i64::MAX as usize, main)
    })?;
    timeline.time(Stage::Route, 0, main, || {
        stages.route_sums(main)?;
        stages.route(0..i64::MAX as usize, main)
    })?;
    for (index, window) in stages.windows().enumerate() {
        timeline.time(Stage::Prepare, index, main, || {
            if index == 0 {
                stages.gammas(main)?;
            }
            stages.prepare(window.clone(), main)
        })?;
        timeline.time(Stage::Scan, index, main, || stages.scan(window, main))?;
    }
    Ok(())
}

/// Arrays of a call in one piece of memory.
#[derive(Default)]
struct Arena<'a> {
    uploads: Vec<(usize, &'a [u8])>,
    bytes: usize,
}

/// Where an array of an arena stands, in bytes from its beginning.
type Offset = usize;

impl<'a> Arena<'a> {
    fn room(&mut self, bytes: usize) -> Offset {
        let at = self.bytes;
        // Beyond all addresses an allocation fails, and says so.
        self.bytes = at.saturating_add(bytes).checked_next_multiple_of(256).unwrap_or(usize::MAX);
        at
    }

    fn array(&mut self, bytes: &'a [u8]) -> Offset {
        let at = self.room(bytes.len());
        self.uploads.push((at, bytes));
        at
    }

    fn tensor(&mut self, tensor: &Tensor<'a>) -> Offset {
        self.array(match tensor.data() {
            Data::F32(x) => bytes_of(x),
            Data::Bf16(x) => bytes_of(x),
            Data::F16(x) => bytes_of(x),
        })
    }
}

/// Where the arrays of a cache stand.
#[derive(Clone, Copy)]
struct CacheOffsets {
    states: Offset,
    len: Offset,
    tokens: Offset,
    drift: Offset,
    open: Offset,
    keys: Option<Offset>,
}

impl CacheOffsets {
    fn raw(&self, base: u64) -> RawCache {
        RawCache {
            states: base + self.states as u64,
            len: base + self.len as u64,
            tokens: base + self.tokens as u64,
            drift: base + self.drift as u64,
            open: base + self.open as u64,
            keys: self.keys.map_or(0, |keys| base + keys as u64),
        }
    }
}

/// A problem's arrays on the GPU, with room for its results and the workspace.
pub(super) struct Resident {
    memory: Memory,
    plan: Plan,
    inputs: RawInputs,
    outputs: RawOutputs,
    workspace: Offset,
    o: Offset,
    drift: Offset,
    events: Offset,
    lambda: Option<Offset>,
    cache: CacheOffsets,
}

impl Resident {
    /// Copies a problem's arguments to the GPU.
    pub(super) fn new(engine: &Engine, problem: &Problem<'_>) -> Result<Resident> {
        let plan = engine.plan(&Call::of(problem))?;
        let (inputs, shape) = (*problem.inputs(), *problem.shape());
        let (dims, options) = (shape.cache_dims(), problem.options());
        let routed = options.read == Read::Routed;
        let taus: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();
        let mut arena = Arena::default();
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| arena.tensor(&x));
        let [g, beta, lambda] = [inputs.g, inputs.beta, inputs.lambda].map(|x| x.map(|x| arena.tensor(&x)));
        let slope = inputs.route.map(|route| arena.tensor(&route.slope));
        let bias = inputs.route.map(|route| arena.tensor(&route.bias));
        let logits = inputs.route.and_then(|route| route.logits).map(|logits| arena.tensor(&logits));
        let tau = arena.array(bytes_of(&taus));
        let log = inputs.events.map(|events| arena.array(events));
        let cu_seqlens = inputs.cu_seqlens.map(|offsets| arena.array(bytes_of(offsets)));
        let initial = inputs.cache.map(|cache| CacheOffsets {
            states: arena.array(bytes_of(&cache.states)),
            len: arena.array(bytes_of(&cache.len)),
            tokens: arena.array(bytes_of(&cache.tokens)),
            drift: arena.array(bytes_of(&cache.drift)),
            open: arena.array(bytes_of(&cache.open)),
            keys: cache.keys.as_ref().map(|keys| arena.array(bytes_of(keys))),
        });
        let per_token = shape.tokens() * shape.value_heads;
        let rows = dims.rows();
        let o = arena.room(per_token * shape.dv * problem.dtype().bytes());
        let drift = arena.room(per_token * 4);
        let events = arena.room(per_token);
        let routed_lambda = routed.then(|| arena.room(per_token * shape.capacity * 4));
        let cache = CacheOffsets {
            states: arena.room(rows * dims.bank() * 4),
            len: arena.room(rows * 4),
            tokens: arena.room(rows * dims.capacity * 4),
            drift: arena.room(rows * dims.capacity * 4),
            open: arena.room(rows * dims.state() * 4),
            keys: routed.then(|| arena.room(rows * dims.key_bank() * 4)),
        };
        let workspace = arena.room(plan.workspace_bytes());

        let memory = engine.allocate(arena.bytes)?;
        for &(at, bytes) in &arena.uploads {
            memory.upload(at, bytes, engine.raw_stream())?;
        }
        let base = memory.address();
        let address = |offset: Option<Offset>| offset.map_or(0, |offset| base + offset as u64);
        let inputs = RawInputs {
            q: base + q as u64,
            k: base + k as u64,
            v: base + v as u64,
            g: address(g),
            beta: address(beta),
            lambda: address(lambda),
            lambda_columns: problem.lambda_columns(),
            slope: address(slope),
            bias: address(bias),
            logits: address(logits),
            logit_columns: problem.logit_columns(),
            tau: base + tau as u64,
            events: address(log),
            cu_seqlens: address(cu_seqlens),
            cache: initial.map(|initial| initial.raw(base)),
        };
        let outputs = RawOutputs {
            o: base + o as u64,
            drift: base + drift as u64,
            events: base + events as u64,
            lambda: address(routed_lambda),
            cache: Some(cache.raw(base)),
        };
        let lambda = routed_lambda;
        Ok(Resident { memory, plan, inputs, outputs, workspace, o, drift, events, lambda, cache })
    }

    /// Launches the stages.
    pub(super) fn launch(&self, engine: &Engine) -> Result<()> {
        let workspace = (self.memory.address() + self.workspace as u64, self.plan.workspace_bytes());
        // SAFETY: every address is of `self.memory`, of the sizes that a validated problem has, and the log, the
        // offsets and the cache have been validated on the host.
        unsafe { engine.launch(&self.plan, &self.inputs, &self.outputs, workspace, None) }
    }

    /// Copies the results back.
    pub(super) fn results(&self, engine: &Engine, problem: &Problem<'_>) -> Result<Forward> {
        let shape = problem.shape();
        let per_token = shape.tokens() * shape.value_heads;
        let mut cache = Cache::empty(shape.cache_dims(), problem.options().read);
        let mut o = Buffer::zeros(problem.dtype(), per_token * shape.dv);
        let (mut drift, mut events) = (vec![0f32; per_token], vec![0u8; per_token]);
        let mut lambda = self.lambda.map(|_| vec![0f32; per_token * shape.capacity]);
        let get = |offset, to: &mut [u8]| self.memory.download(offset, to, engine.raw_stream());
        get(
            self.o,
            match &mut o {
                Buffer::F32(x) => bytes_of_mut(x),
                Buffer::Bf16(x) => bytes_of_mut(x),
                Buffer::F16(x) => bytes_of_mut(x),
            },
        )?;
        get(self.drift, bytes_of_mut(&mut drift))?;
        get(self.events, &mut events)?;
        if let (Some(offset), Some(lambda)) = (self.lambda, &mut lambda) {
            get(offset, bytes_of_mut(lambda))?;
        }
        get(self.cache.states, bytes_of_mut(&mut cache.states))?;
        get(self.cache.len, bytes_of_mut(&mut cache.len))?;
        get(self.cache.tokens, bytes_of_mut(&mut cache.tokens))?;
        get(self.cache.drift, bytes_of_mut(&mut cache.drift))?;
        get(self.cache.open, bytes_of_mut(&mut cache.open))?;
        if let (Some(offset), Some(keys)) = (self.cache.keys, &mut cache.keys) {
            get(offset, bytes_of_mut(keys))?;
        }
        Ok(Forward { o, drift, events, lambda, cache })
    }
}
