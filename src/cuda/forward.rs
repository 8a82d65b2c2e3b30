//! The forward: segment -> prepare -> route -> scan; and both passes for arguments of the host.

use super::engine::Engine;
use super::launch::Stages;
use super::memory::{Memory, bytes_of, bytes_of_mut};
use super::plan::{Call, Plan};
use super::raw::{RawCache, RawCacheGradients, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream};
use super::stream::{SideStream, Timeline};
use crate::cache::{Cache, CacheGradients};
use crate::engine::{Forward, Gradients, RouteGradients, SoftGradients, Stage};
use crate::error::Result;
use crate::options::{Read, Recurrence};
use crate::problem::{OutputGradients, Problem};
use crate::tensor::{Buffer, Data, Tensor};
use cudarc::driver::sys::CUstream;

/// The stages on `main`; beside it the chain of segment, a window ahead of what reads its log, where that is worth the two
/// streams' waiting for each other.
pub(super) fn launched(stages: &Stages<'_>, main: CUstream, side: &SideStream) -> Result<()> {
    let window = stages.windows().next();
    let Some(window) = window.filter(|_| stages.are_short()) else { return forked(stages, main, side) };
    stages.segment_gram(main)?;
    stages.gammas(main)?;
    stages.route_sums(main)?;
    stages.segment(window.clone(), main)?;
    stages.route(window.clone(), main)?;
    stages.prepare(window.clone(), main)?;
    stages.scan(window, main)
}

fn forked(stages: &Stages<'_>, main: CUstream, side: &SideStream) -> Result<()> {
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

/// The stages that make drift and lambda of a log that is given.
pub(super) fn decide(stages: &Stages<'_>, main: CUstream) -> Result<()> {
    let all = 0..i64::MAX as usize;
    stages.segment_gram(main)?;
    stages.segment(all.clone(), main)?;
    stages.route_sums(main)?;
    stages.route(all, main)
}

/// Arrays of a call in one piece of memory.
#[derive(Default)]
pub(super) struct Arena<'a> {
    uploads: Vec<(usize, &'a [u8])>,
    bytes: usize,
}

/// Where an array of an arena stands, in bytes from its beginning.
pub(super) type Offset = usize;

impl<'a> Arena<'a> {
    pub(super) fn room(&mut self, bytes: usize) -> Offset {
        let at = self.bytes;
        // Beyond all addresses an allocation fails, and says so.
        self.bytes = at.saturating_add(bytes).checked_next_multiple_of(256).unwrap_or(usize::MAX);
        at
    }

    pub(super) fn array(&mut self, bytes: &'a [u8]) -> Offset {
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

    /// Bytes of all.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The arguments of a problem, but for its cache; `taus` is tau of every value head.
    pub(super) fn inputs(&mut self, problem: &Problem<'a>, taus: &'a [f32]) -> InputOffsets {
        let inputs = *problem.inputs();
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| self.tensor(&x));
        let [g, beta, lambda] = [inputs.g, inputs.beta, inputs.lambda].map(|x| x.map(|x| self.tensor(&x)));
        InputOffsets {
            qkv: [q, k, v],
            g,
            beta,
            lambda,
            lambda_columns: problem.lambda_columns(),
            slope: inputs.route.map(|route| self.tensor(&route.slope)),
            bias: inputs.route.map(|route| self.tensor(&route.bias)),
            logits: inputs.route.and_then(|route| route.logits).map(|logits| self.tensor(&logits)),
            logit_columns: problem.logit_columns(),
            tau: self.array(bytes_of(taus)),
            events: inputs.events.map(|events| self.array(events)),
            cu_seqlens: inputs.cu_seqlens.map(|offsets| self.array(bytes_of(offsets))),
        }
    }

    /// Memory for all, what is of the host copied to it.
    pub(super) fn upload(&self, engine: &Engine) -> Result<Memory> {
        let memory = engine.allocate(self.bytes)?;
        for &(at, bytes) in &self.uploads {
            memory.upload(at, bytes, engine.raw_stream())?;
        }
        Ok(memory)
    }
}

/// Where the arguments of a call stand.
pub(super) struct InputOffsets {
    qkv: [Offset; 3],
    g: Option<Offset>,
    beta: Option<Offset>,
    lambda: Option<Offset>,
    lambda_columns: usize,
    slope: Option<Offset>,
    bias: Option<Offset>,
    logits: Option<Offset>,
    logit_columns: usize,
    tau: Offset,
    events: Option<Offset>,
    cu_seqlens: Option<Offset>,
}

impl InputOffsets {
    pub(super) fn raw(&self, base: u64) -> RawInputs {
        let address = |offset: Option<Offset>| offset.map_or(0, |offset| base + offset as u64);
        let [q, k, v] = self.qkv.map(|offset| base + offset as u64);
        RawInputs {
            q,
            k,
            v,
            g: address(self.g),
            beta: address(self.beta),
            lambda: address(self.lambda),
            lambda_columns: self.lambda_columns,
            slope: address(self.slope),
            bias: address(self.bias),
            logits: address(self.logits),
            logit_columns: self.logit_columns,
            tau: base + self.tau as u64,
            events: address(self.events),
            cu_seqlens: address(self.cu_seqlens),
            cache: None,
        }
    }
}

/// Where the arrays of a cache stand.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheOffsets {
    pub(super) states: Offset,
    pub(super) len: Offset,
    pub(super) tokens: Offset,
    pub(super) drift: Offset,
    pub(super) open: Offset,
    pub(super) keys: Option<Offset>,
}

impl CacheOffsets {
    /// A cache of the host.
    pub(super) fn of<'a>(arena: &mut Arena<'a>, cache: &'a Cache) -> Self {
        CacheOffsets {
            states: arena.array(bytes_of(&cache.states)),
            len: arena.array(bytes_of(&cache.len)),
            tokens: arena.array(bytes_of(&cache.tokens)),
            drift: arena.array(bytes_of(&cache.drift)),
            open: arena.array(bytes_of(&cache.open)),
            keys: cache.keys.as_ref().map(|keys| arena.array(bytes_of(keys))),
        }
    }

    pub(super) fn raw(&self, base: u64) -> RawCache {
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
        let shape = *problem.shape();
        let (dims, options) = (shape.cache_dims(), problem.options());
        let routed = options.read == Read::Routed;
        let taus: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();
        let mut arena = Arena::default();
        let inputs = arena.inputs(problem, &taus);
        let initial = problem.inputs().cache.map(|cache| CacheOffsets::of(&mut arena, cache));
        let per_token = shape.tokens() * shape.value_heads;
        let o = arena.room(per_token * shape.dv * problem.dtype().bytes());
        let drift = arena.room(per_token * 4);
        let events = arena.room(per_token);
        let routed_lambda = routed.then(|| arena.room(per_token * shape.capacity * 4));
        let cache = CacheOffsets::room(&mut arena, dims, options.read);
        let workspace = arena.room(plan.workspace_bytes());

        let memory = arena.upload(engine)?;
        let base = memory.address();
        let address = |offset: Option<Offset>| offset.map_or(0, |offset| base + offset as u64);
        let inputs = RawInputs { cache: initial.map(|initial| initial.raw(base)), ..inputs.raw(base) };
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
        let mut o = Buffer::zeros(problem.dtype(), per_token * shape.dv);
        let (mut drift, mut events) = (vec![0f32; per_token], vec![0u8; per_token]);
        let mut lambda = self.lambda.map(|_| vec![0f32; per_token * shape.capacity]);
        let get = |offset, to: &mut [u8]| self.memory.download(offset, to, engine.raw_stream());
        get(self.o, buffer_bytes(&mut o))?;
        get(self.drift, bytes_of_mut(&mut drift))?;
        get(self.events, &mut events)?;
        if let (Some(offset), Some(lambda)) = (self.lambda, &mut lambda) {
            get(offset, bytes_of_mut(lambda))?;
        }
        let cache = self.cache.download(engine, &self.memory, shape.cache_dims(), problem.options().read)?;
        Ok(Forward { o, drift, events, lambda, cache })
    }
}

/// The backward of a problem of the host.
pub(super) fn backward(
    engine: &Engine,
    problem: &Problem<'_>,
    events: &[u8],
    upstream: &OutputGradients<'_>,
) -> Result<Gradients> {
    let (options, shape, dtype) = (problem.options(), *problem.shape(), problem.dtype());
    let call = Call { final_cache: upstream.cache.is_some(), ..Call::of(problem) };
    let routed = options.read == Read::Routed;
    let (soft, resumed) = (options.soft.is_some(), problem.inputs().cache.is_some());
    let (dims, per_token) = (shape.cache_dims(), shape.tokens() * shape.value_heads);
    let (keys, values) = (shape.tokens() * shape.heads * shape.dk, per_token * shape.dv);
    let taus: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();

    let mut arena = Arena::default();
    let inputs = arena.inputs(problem, &taus);
    let initial = problem.inputs().cache.map(|cache| CacheOffsets::of(&mut arena, cache));
    let log = arena.array(events);
    let d_o = arena.tensor(&upstream.o);
    let final_cache = upstream.cache.map(|cache| GradientOffsets {
        states: arena.array(bytes_of(&cache.states)),
        open: arena.array(bytes_of(&cache.open)),
        keys: cache.keys.as_ref().map(|keys| arena.array(bytes_of(keys))),
    });
    let [dq, dk] = [0; 2].map(|_| arena.room(keys * dtype.bytes()));
    let dv = arena.room(values * dtype.bytes());
    let mut room = |wanted: bool, count: usize| wanted.then(|| arena.room(count * 4));
    let given = *problem.inputs();
    let dg = room(given.g.is_some(), per_token);
    let dbeta = room(options.recurrence == Recurrence::GatedDelta, per_token);
    let dlambda = room(!routed, per_token * problem.lambda_columns());
    let [dslope, dbias] = [0; 2].map(|_| room(routed, shape.value_heads));
    let has_logits = given.route.is_some_and(|route| route.logits.is_some());
    let dlogits = room(routed && has_logits, per_token * problem.logit_columns());
    let dtau = room(soft, shape.value_heads);
    let ddrift = room(soft, per_token);
    let initial_cache = resumed.then(|| GradientOffsets {
        states: arena.room(dims.rows() * dims.bank() * 4),
        open: arena.room(dims.rows() * dims.state() * 4),
        keys: routed.then(|| arena.room(dims.rows() * dims.key_bank() * 4)),
    });
    let address = |base: u64, offset: Option<Offset>| offset.map_or(0, |offset| base + offset as u64);
    let gradients = |base: u64| RawGradients {
        q: base + dq as u64,
        k: base + dk as u64,
        v: base + dv as u64,
        g: address(base, dg),
        beta: address(base, dbeta),
        lambda: address(base, dlambda),
        slope: address(base, dslope),
        bias: address(base, dbias),
        logits: address(base, dlogits),
        tau: address(base, dtau),
        drift: address(base, ddrift),
        cache: initial_cache.map(|cache| cache.raw(base)),
    };
    let raw_inputs =
        |base: u64| RawInputs { cache: initial.map(|initial| initial.raw(base)), ..inputs.raw(base) };
    let kept = |base: u64| RawForward { events: base + log as u64, ..RawForward::default() };
    // Any address will do where only presence is asked for.
    const ANYWHERE: u64 = 256;
    let plan = engine.plan_replay(&call, &raw_inputs(ANYWHERE), &kept(ANYWHERE), &gradients(ANYWHERE))?;
    let workspace = arena.room(plan.workspace_bytes());
    let memory = arena.upload(engine)?;
    let base = memory.address();
    let upstream = RawUpstream { o: base + d_o as u64, cache: final_cache.map(|cache| cache.raw(base)) };
    let workspace = (base + workspace as u64, plan.workspace_bytes());
    // SAFETY: every address is of the arena, of the sizes that a validated problem has; log, offsets and caches have been
    // validated on the host.
    unsafe {
        engine.launch_replay(&plan, &raw_inputs(base), &kept(base), &upstream, &gradients(base), workspace)
    }?;

    let floats = |offset: Option<Offset>, count: usize| -> Result<Option<Vec<f32>>> {
        let Some(offset) = offset else { return Ok(None) };
        let mut out = vec![0f32; count];
        memory.download(offset, bytes_of_mut(&mut out), engine.raw_stream())?;
        Ok(Some(out))
    };
    let buffer = |offset, count| -> Result<Buffer> {
        let mut out = Buffer::zeros(dtype, count);
        memory.download(offset, buffer_bytes(&mut out), engine.raw_stream())?;
        Ok(out)
    };
    let heads = |offset| Ok(floats(offset, shape.value_heads)?.unwrap_or_default());
    Ok(Gradients {
        q: buffer(dq, keys)?,
        k: buffer(dk, keys)?,
        v: buffer(dv, values)?,
        g: floats(dg, per_token)?,
        beta: floats(dbeta, per_token)?,
        lambda: floats(dlambda, per_token * problem.lambda_columns())?,
        route: match routed {
            true => Some(RouteGradients {
                slope: heads(dslope)?,
                bias: heads(dbias)?,
                logits: floats(dlogits, per_token * problem.logit_columns())?,
            }),
            false => None,
        },
        soft: match floats(ddrift, per_token)? {
            Some(drift) => Some(SoftGradients { tau: heads(dtau)?, drift }),
            None => None,
        },
        cache: match initial_cache {
            Some(cache) => Some(CacheGradients {
                states: floats(Some(cache.states), dims.rows() * dims.bank())?.unwrap_or_default(),
                open: floats(Some(cache.open), dims.rows() * dims.state())?.unwrap_or_default(),
                keys: floats(cache.keys, dims.rows() * dims.key_bank())?,
            }),
            None => None,
        },
    })
}

/// Where the gradients of a cache stand.
#[derive(Clone, Copy)]
struct GradientOffsets {
    states: Offset,
    open: Offset,
    keys: Option<Offset>,
}

impl GradientOffsets {
    fn raw(&self, base: u64) -> RawCacheGradients {
        RawCacheGradients {
            states: base + self.states as u64,
            open: base + self.open as u64,
            keys: self.keys.map_or(0, |keys| base + keys as u64),
        }
    }
}

fn buffer_bytes(x: &mut Buffer) -> &mut [u8] {
    match x {
        Buffer::F32(x) => bytes_of_mut(x),
        Buffer::Bf16(x) => bytes_of_mut(x),
        Buffer::F16(x) => bytes_of_mut(x),
    }
}
