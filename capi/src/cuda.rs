//! A call on memory of a GPU: launched on the caller's stream, with the caller's workspace; nothing is allocated, and
//! nothing waited for.

use crate::call::{Arguments, Array, CacheOf, GradientsOf, Parsed, Place, ResultsOf, UpstreamOf};
use crate::status::Outcome;
use dla::cuda::cudarc::driver::sys::{self, CUresult};
use dla::cuda::{
    CacheStepPlan, Call, Engine, Plan, RawCache, RawCacheGradients, RawForward, RawGradients, RawInputs,
    RawOutputs, RawUpstream, ReplayPlan,
};
use dla::{Error, Tau};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Alignment of what is put into the workspace.
pub(crate) const ALIGNMENT: usize = 256;

/// Plans kept for a stream. Where lengths are ever new, all are forgotten at once, and those in use made again.
const MOST_PLANS: usize = 1024;

/// Streams known. Beyond as many all are forgotten at once.
const MOST_STREAMS: usize = 256;

/// What a plan depends on: options, presence of arrays, extents.
pub(crate) type Key = ([i32; 9], u32, [usize; 10]);

/// Plans of one kind of call.
struct Plans<P>(Mutex<HashMap<Key, Arc<P>>>);

impl<P> Default for Plans<P> {
    fn default() -> Self {
        Plans(Mutex::default())
    }
}

impl<P> Plans<P> {
    fn get(&self, key: Key, make: impl FnOnce() -> dla::Result<P>) -> Outcome<Arc<P>> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(make()?);
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }
}

/// The engine of one stream, and the plans of the calls that it has seen.
struct Stream {
    engine: Engine,
    forwards: Plans<Plan>,
    backwards: Plans<ReplayPlan>,
    steps: Plans<CacheStepPlan>,
}

/// Streams by GPU and handle.
type Streams = Mutex<HashMap<(usize, usize), Arc<Stream>>>;

fn stream(parsed: &Parsed<'_>) -> Outcome<Arc<Stream>> {
    static STREAMS: OnceLock<Streams> = OnceLock::new();
    let Place::Cuda { ordinal } = parsed.place else { unreachable!("called for a GPU") };
    let handle = parsed.call.stream.cast();
    let key = (ordinal, parsed.call.stream.addr());
    let streams = STREAMS.get_or_init(Streams::default);
    let mut streams = streams.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stream) = streams.get(&key) {
        return Ok(stream.clone());
    }
    dla::cuda::available()?;
    // SAFETY: null or a live stream, as the caller of this call says; an engine touches its stream in calls alone, and
    // each of those vouches for the handle anew.
    let engine = unsafe { Engine::from_raw_stream(ordinal, handle) }?;
    if streams.len() >= MOST_STREAMS {
        streams.clear();
    }
    let stream = Arc::new(Stream {
        engine,
        forwards: Plans::default(),
        backwards: Plans::default(),
        steps: Plans::default(),
    });
    streams.insert(key, stream.clone());
    Ok(stream)
}

/// A key; `present` has a bit for every array whose absence makes another plan.
pub(crate) fn key(parsed: &Parsed<'_>, present: u32) -> Key {
    let (o, s) = (&parsed.options, parsed.shape);
    let soft = o.soft.map_or(0, |soft| 1 + i32::from(soft.through_drift));
    (
        [
            o.recurrence as i32,
            o.merge as i32,
            o.read as i32,
            o.slot_order as i32,
            i32::from(o.qk_l2norm) + 2 * i32::from(o.scale.is_some()),
            o.scale.unwrap_or(0.0).to_bits() as i32,
            parsed.dtype as i32,
            soft,
            o.soft.map_or(0, |soft| soft.temperature.to_bits() as i32),
        ],
        present,
        [
            s.batch,
            s.time,
            s.heads,
            s.value_heads,
            s.dk,
            s.dv,
            s.capacity,
            s.sequences,
            parsed.lambda_columns,
            parsed.logit_columns,
        ],
    )
}

pub(crate) fn call<'a>(parsed: &'a Parsed<'_>, final_cache: bool) -> Call<'a> {
    Call { options: &parsed.options, shape: parsed.shape, dtype: parsed.dtype, final_cache }
}

impl Stream {
    fn forward(&self, parsed: &Parsed<'_>, final_cache: bool) -> Outcome<Arc<Plan>> {
        let make = || self.engine.plan(&call(parsed, final_cache));
        self.forwards.get(key(parsed, final_cache.into()), make)
    }

    fn backward(&self, parsed: &Parsed<'_>, raw: &RawBackward) -> Outcome<Arc<ReplayPlan>> {
        let RawBackward { inputs, forward, upstream, gradients: d } = raw;
        let read = [forward.drift, forward.lambda, d.q, d.k, d.v, d.beta];
        let read = read.iter().chain([&d.lambda, &d.slope, &d.bias, &d.tau, &d.drift]);
        let present = read.fold(u32::from(upstream.cache.is_some()), |all, &x| 2 * all + u32::from(x != 0));
        let make = || {
            let call = call(parsed, upstream.cache.is_some());
            self.engine.plan_replay(&call, inputs, forward, d)
        };
        self.backwards.get(key(parsed, present), make)
    }

    fn step(&self, parsed: &Parsed<'_>) -> Outcome<Arc<CacheStepPlan>> {
        self.steps.get(key(parsed, 0), || self.engine.plan_step(&call(parsed, true)))
    }
}

/// Where in the workspace, behind a plan's own, stands what the kernels write and the caller does not want, and tau.
pub(crate) struct Rest {
    pub tau: Option<usize>,
    drift: Option<usize>,
    events: Option<usize>,
    lambda: Option<usize>,
    pub bytes: usize,
}

impl Rest {
    /// Of a call that has results, whose plan has a workspace of `plan` bytes.
    pub fn new(parsed: &Parsed<'_>, results: &ResultsOf, plan: usize) -> Rest {
        let mut end = plan;
        let mut room = |absent: bool, bytes: usize| {
            absent.then(|| {
                let at = end.next_multiple_of(ALIGNMENT);
                end = at + bytes;
                at
            })
        };
        let tokens = parsed.per_token();
        Rest {
            tau: room(!parsed.call.tau.is_present(), parsed.shape.value_heads * 4),
            drift: room(results.drift.is_none(), tokens * 4),
            events: room(results.events.is_none(), tokens),
            lambda: room(parsed.routed() && results.lambda.is_none(), tokens * parsed.shape.capacity * 4),
            bytes: end.next_multiple_of(ALIGNMENT),
        }
    }

    /// Results, those that are not wanted in the workspace.
    pub fn outputs(&self, results: &ResultsOf, base: u64) -> RawOutputs {
        let or = |array, at: Option<usize>| at.map_or(address(array), |at| base + at as u64);
        RawOutputs {
            o: address(Some(results.o)),
            drift: or(results.drift, self.drift),
            events: or(results.events, self.events),
            lambda: or(results.lambda, self.lambda),
            cache: results.cache.as_ref().map(raw_cache),
        }
    }
}

/// The address of a call's workspace of `needed` bytes.
pub(crate) fn workspace(parsed: &Parsed<'_>, needed: usize) -> Outcome<u64> {
    let workspace = parsed.call.workspace;
    let base = workspace.data.addr() as u64;
    if workspace.bytes < needed {
        return Err(Error::Workspace { expected: needed, given: workspace.bytes }.into());
    }
    if needed > 0 && base == 0 {
        return Err(Error::Missing { name: "workspace", why: "its address is null" }.into());
    }
    if !base.is_multiple_of(ALIGNMENT as u64) {
        let alignment = ALIGNMENT as u64;
        return Err(Error::Misaligned { name: "workspace", alignment, given: base }.into());
    }
    Ok(base)
}

/// Arguments; tau where it is.
pub(crate) fn raw_inputs(parsed: &Parsed<'_>, arguments: &Arguments, tau: u64) -> RawInputs {
    RawInputs {
        q: address(arguments.q),
        k: address(arguments.k),
        v: address(arguments.v),
        g: address(arguments.g),
        beta: address(arguments.beta),
        lambda: address(arguments.lambda),
        lambda_columns: parsed.lambda_columns,
        slope: address(arguments.slope),
        bias: address(arguments.bias),
        logits: address(arguments.logits),
        logit_columns: parsed.logit_columns,
        tau,
        events: address(arguments.events),
        cu_seqlens: address(arguments.cu_seqlens),
        cache: arguments.cache.as_ref().map(raw_cache),
    }
}

pub(crate) fn address(array: Option<Array>) -> u64 {
    array.map_or(0, |array| array.address.addr() as u64)
}

fn raw_cache(cache: &CacheOf) -> RawCache {
    RawCache {
        states: address(cache.states),
        len: address(cache.len),
        tokens: address(cache.tokens),
        drift: address(cache.drift),
        open: address(cache.open),
        keys: address(cache.keys),
    }
}

/// Options checked as the host's calls check them; tau.
pub(crate) fn check_options(parsed: &Parsed<'_>) -> Outcome<f32> {
    let option = |name, expected: &str, given: f32| {
        Err(Error::Option { name, expected: expected.to_owned(), given: given.to_string() }.into())
    };
    let tau = match parsed.options.tau {
        Tau::PerCall(tau) if tau.is_nan() && !parsed.call.tau.is_present() => {
            return option("tau", "a number", tau);
        }
        Tau::PerCall(tau) => tau,
        Tau::PerHead(_) => unreachable!("options hold one tau"),
    };
    if let Some(soft) = parsed.options.soft
        && !(soft.temperature > 0.0 && soft.temperature.is_finite())
    {
        return option("temperature", "a finite number above 0", soft.temperature);
    }
    match parsed.options.scale {
        Some(scale) if !scale.is_finite() => option("scale", "a finite number", scale),
        _ => Ok(tau),
    }
}

/// Bytes of workspace of a forward.
pub(crate) fn forward_workspace(parsed: &Parsed<'_>, results: &ResultsOf) -> Outcome<usize> {
    check_options(parsed)?;
    let plan = stream(parsed)?.forward(parsed, results.cache.is_some())?;
    Ok(Rest::new(parsed, results, plan.workspace_bytes()).bytes)
}

/// # Safety
/// As [`Engine::launch`].
pub(crate) unsafe fn forward(parsed: &Parsed<'_>, arguments: &Arguments, results: &ResultsOf) -> Outcome<()> {
    let tau = check_options(parsed)?;
    let stream = stream(parsed)?;
    let plan = stream.forward(parsed, results.cache.is_some())?;
    let rest = Rest::new(parsed, results, plan.workspace_bytes());
    let base = workspace(parsed, rest.bytes)?;
    let tau = stream.tau(parsed, arguments, tau, rest.tau.map(|at| base + at as u64))?;
    let (inputs, outputs) = (raw_inputs(parsed, arguments, tau), rest.outputs(results, base));
    // SAFETY: the plan is of this engine's GPU; the arrays have the bytes that their extents say; the rest the caller
    // of the C function answers for.
    unsafe { stream.engine.launch(&plan, &inputs, &outputs, (base, rest.bytes), None) }?;
    Ok(())
}

impl Stream {
    /// The address of tau of every value head: the call's, or that of the options put where there is room.
    fn tau(&self, parsed: &Parsed<'_>, arguments: &Arguments, tau: f32, room: Option<u64>) -> Outcome<u64> {
        let Some(at) = room else { return Ok(address(arguments.tau)) };
        fill(&self.engine, at, tau, parsed.shape.value_heads)?;
        Ok(at)
    }
}

/// Fills `count` floats with one value, in the stream's order.
pub(crate) fn fill(engine: &Engine, at: u64, value: f32, count: usize) -> Outcome<()> {
    bind(engine)?;
    // SAFETY: in the workspace, which is as long as was checked.
    let code = unsafe { sys::cuMemsetD32Async(at, value.to_bits(), count, engine.raw_stream()) };
    checked("cuMemsetD32Async", code)
}

/// What the driver says.
pub(crate) fn checked(call: &'static str, code: CUresult) -> Outcome<()> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::Cuda { call, name: format!("{code:?}"), code: code as u32 }.into()),
    }
}

/// Makes the engine's context this thread's.
pub(crate) fn bind(engine: &Engine) -> Outcome<()> {
    engine.context().bind_to_thread().or_else(|error| checked("cuCtxSetCurrent", error.0))
}

/// Addresses of a backward, without tau.
struct RawBackward {
    inputs: RawInputs,
    forward: RawForward,
    upstream: RawUpstream,
    gradients: RawGradients,
}

impl RawBackward {
    fn new(
        parsed: &Parsed<'_>,
        arguments: Option<&Arguments>,
        upstream: &UpstreamOf,
        wanted: &GradientsOf,
    ) -> RawBackward {
        let cache = |cache: &CacheOf| RawCacheGradients {
            states: address(cache.states),
            open: address(cache.open),
            keys: address(cache.keys),
        };
        let columns = RawInputs {
            lambda_columns: parsed.lambda_columns,
            logit_columns: parsed.logit_columns,
            ..RawInputs::default()
        };
        RawBackward {
            inputs: arguments.map_or(columns, |arguments| raw_inputs(parsed, arguments, 0)),
            forward: RawForward {
                events: address(arguments.and_then(|arguments| arguments.events)),
                drift: address(upstream.drift),
                lambda: address(upstream.lambda),
            },
            upstream: RawUpstream {
                o: address(Some(upstream.o)),
                cache: upstream.cache.as_ref().filter(|cache| cache.has_gradient()).map(cache),
            },
            gradients: RawGradients {
                q: address(wanted.q),
                k: address(wanted.k),
                v: address(wanted.v),
                g: address(wanted.g),
                beta: address(wanted.beta),
                lambda: address(wanted.lambda),
                slope: address(wanted.slope),
                bias: address(wanted.bias),
                logits: address(wanted.logits),
                tau: address(wanted.tau),
                drift: address(wanted.drift),
                cache: wanted.cache.as_ref().map(cache),
            },
        }
    }
}

/// Where tau of every value head goes, behind a plan's own workspace, and the bytes of both.
fn with_tau(parsed: &Parsed<'_>, plan: &ReplayPlan) -> (Option<usize>, usize) {
    let bytes = plan.workspace_bytes();
    if !plan.reads_tau() || parsed.call.tau.is_present() {
        return (None, bytes);
    }
    let at = bytes.next_multiple_of(ALIGNMENT);
    (Some(at), (at + parsed.shape.value_heads * 4).next_multiple_of(ALIGNMENT))
}

/// Bytes of workspace of a backward.
pub(crate) fn backward_workspace(
    parsed: &Parsed<'_>,
    upstream: &UpstreamOf,
    wanted: &GradientsOf,
) -> Outcome<usize> {
    check_options(parsed)?;
    let plan = stream(parsed)?.backward(parsed, &RawBackward::new(parsed, None, upstream, wanted))?;
    Ok(with_tau(parsed, &plan).1)
}

/// # Safety
/// As [`Engine::launch_replay`].
pub(crate) unsafe fn backward(
    parsed: &Parsed<'_>,
    arguments: &Arguments,
    upstream: &UpstreamOf,
    wanted: &GradientsOf,
) -> Outcome<()> {
    let tau = check_options(parsed)?;
    if arguments.events.is_none() {
        return Err(Error::Missing { name: "events", why: "the backward replays the forward's log" }.into());
    }
    let stream = stream(parsed)?;
    let mut raw = RawBackward::new(parsed, Some(arguments), upstream, wanted);
    let plan = stream.backward(parsed, &raw)?;
    let (room, bytes) = with_tau(parsed, &plan);
    let base = workspace(parsed, bytes)?;
    raw.inputs.tau = stream.tau(parsed, arguments, tau, room.map(|at| base + at as u64))?;
    let RawBackward { inputs, forward, upstream, gradients } = &raw;
    let room = (base, bytes);
    // SAFETY: as in `forward`; that the log is of these arguments the caller of the C function answers for.
    unsafe { stream.engine.launch_replay(&plan, inputs, forward, upstream, gradients, room) }?;
    Ok(())
}

/// Bytes of workspace of a step.
pub(crate) fn step_workspace(parsed: &Parsed<'_>, results: &ResultsOf) -> Outcome<usize> {
    check_options(parsed)?;
    let plan = stream(parsed)?.step(parsed)?;
    Ok(Rest::new(parsed, results, plan.workspace_bytes()).bytes)
}

/// # Safety
/// As [`Engine::launch_step`].
pub(crate) unsafe fn step(
    parsed: &Parsed<'_>,
    arguments: &Arguments,
    cache: &CacheOf,
    results: &ResultsOf,
) -> Outcome<()> {
    let tau = check_options(parsed)?;
    let stream = stream(parsed)?;
    let plan = stream.step(parsed)?;
    let rest = Rest::new(parsed, results, plan.workspace_bytes());
    let base = workspace(parsed, rest.bytes)?;
    let tau = stream.tau(parsed, arguments, tau, rest.tau.map(|at| base + at as u64))?;
    let (inputs, outputs) = (raw_inputs(parsed, arguments, tau), rest.outputs(results, base));
    let room = (base, rest.bytes);
    // SAFETY: as in `forward`.
    unsafe { stream.engine.launch_step(&plan, &inputs, &outputs, &raw_cache(cache), room) }?;
    Ok(())
}

/// Zeros on a GPU, for a cache that the library holds.
pub(crate) fn zeros(parsed: &Parsed<'_>, bytes: usize) -> Outcome<dla::cuda::Memory> {
    let stream = stream(parsed)?;
    let memory = stream.engine.allocate(bytes)?;
    stream.engine.fill(&memory, 0)?;
    Ok(memory)
}
