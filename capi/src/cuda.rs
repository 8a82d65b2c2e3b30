//! A call on memory of a GPU: launched on the caller's stream, with the caller's workspace; nothing is allocated, and
//! nothing waited for.

use crate::call::{Arguments, Array, CacheOf, GradientsOf, Parsed, Place, ResultsOf, UpstreamOf};
use crate::status::Outcome;
use dla::cuda::cudarc::driver::sys::{self, CUresult, CUstream};
use dla::cuda::{Call, Engine, Plan, RawCache, RawInputs, RawOutputs};
use dla::{Error, Tau};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Alignment of what is put into the workspace.
const ALIGNMENT: usize = 256;

/// Plans kept for a stream. Where lengths are ever new, all are forgotten at once, and those in use made again.
const MOST_PLANS: usize = 1024;

/// Streams known. Beyond as many all are forgotten at once.
const MOST_STREAMS: usize = 256;

/// What a plan depends on.
type Key = ([i32; 7], [usize; 8]);

/// The engine of one stream, and the plans of the calls that it has seen.
struct Stream {
    engine: Engine,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
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
    let stream = Arc::new(Stream { engine, plans: Mutex::default() });
    streams.insert(key, stream.clone());
    Ok(stream)
}

impl Stream {
    fn plan(&self, parsed: &Parsed<'_>, final_cache: bool) -> Outcome<Arc<Plan>> {
        let (o, s) = (&parsed.options, parsed.shape);
        let key = (
            [
                o.recurrence as i32,
                o.merge as i32,
                o.read as i32,
                o.slot_order as i32,
                i32::from(o.qk_l2norm) + 2 * i32::from(final_cache) + 4 * i32::from(o.scale.is_some()),
                o.scale.unwrap_or(0.0).to_bits() as i32,
                parsed.dtype as i32,
            ],
            [s.batch, s.time, s.heads, s.value_heads, s.dk, s.dv, s.capacity, s.sequences],
        );
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let call = Call { options: o, shape: s, dtype: parsed.dtype, final_cache };
        let plan = Arc::new(self.engine.plan(&call)?);
        if plans.len() >= MOST_PLANS {
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    fn raw(&self) -> CUstream {
        self.engine.raw_stream()
    }
}

/// Where in the workspace stands what the kernels write and the caller does not want, and tau.
struct Rest {
    tau: Option<usize>,
    drift: Option<usize>,
    events: Option<usize>,
    lambda: Option<usize>,
    bytes: usize,
}

impl Rest {
    fn new(parsed: &Parsed<'_>, plan: &Plan, tau: bool, wanted: [bool; 3]) -> Rest {
        let mut end = plan.workspace_bytes();
        let mut room = |absent: bool, bytes: usize| {
            absent.then(|| {
                let at = end.next_multiple_of(ALIGNMENT);
                end = at + bytes;
                at
            })
        };
        let tokens = parsed.per_token();
        let [drift, events, lambda] = wanted;
        Rest {
            tau: room(!tau, parsed.shape.value_heads * 4),
            drift: room(!drift, tokens * 4),
            events: room(!events, tokens),
            lambda: room(parsed.routed() && !lambda, tokens * parsed.shape.capacity * 4),
            bytes: end.next_multiple_of(ALIGNMENT),
        }
    }
}

fn address(array: Option<Array>) -> u64 {
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

/// A scalar tau checked as the host's calls check it.
fn check_options(parsed: &Parsed<'_>) -> Outcome<f32> {
    let option = |name, expected: &str, given: f32| {
        Err(Error::Option { name, expected: expected.to_owned(), given: given.to_string() }.into())
    };
    let tau = match parsed.options.tau {
        Tau::PerCall(tau) if tau.is_nan() => return option("tau", "a number", tau),
        Tau::PerCall(tau) => tau,
        Tau::PerHead(_) => unreachable!("options hold one tau"),
    };
    match parsed.options.scale {
        Some(scale) if !scale.is_finite() => option("scale", "a finite number", scale),
        _ => Ok(tau),
    }
}

/// Bytes of workspace of a forward.
pub(crate) fn forward_workspace(parsed: &Parsed<'_>, results: &ResultsOf) -> Outcome<usize> {
    check_options(parsed)?;
    let plan = stream(parsed)?.plan(parsed, results.cache.is_some())?;
    let wanted = [results.drift.is_some(), results.events.is_some(), results.lambda.is_some()];
    Ok(Rest::new(parsed, &plan, parsed.call.tau.is_present(), wanted).bytes)
}

/// # Safety
/// As [`Engine::launch`].
pub(crate) unsafe fn forward(parsed: &Parsed<'_>, arguments: &Arguments, results: &ResultsOf) -> Outcome<()> {
    let tau = check_options(parsed)?;
    let stream = stream(parsed)?;
    let plan = stream.plan(parsed, results.cache.is_some())?;
    let wanted = [results.drift.is_some(), results.events.is_some(), results.lambda.is_some()];
    let rest = Rest::new(parsed, &plan, arguments.tau.is_some(), wanted);
    let workspace = parsed.call.workspace;
    let base = workspace.data.addr() as u64;
    if workspace.bytes < rest.bytes {
        return Err(Error::Workspace { expected: rest.bytes, given: workspace.bytes }.into());
    }
    if !base.is_multiple_of(ALIGNMENT as u64) {
        let alignment = ALIGNMENT as u64;
        return Err(Error::Misaligned { name: "workspace", alignment, given: base }.into());
    }
    let within = |at: Option<usize>| at.map(|at| base + at as u64);
    let inputs = RawInputs {
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
        tau: within(rest.tau).unwrap_or(address(arguments.tau)),
        events: address(arguments.events),
        cu_seqlens: address(arguments.cu_seqlens),
        cache: arguments.cache.as_ref().map(raw_cache),
    };
    let outputs = RawOutputs {
        o: address(Some(results.o)),
        drift: within(rest.drift).unwrap_or(address(results.drift)),
        events: within(rest.events).unwrap_or(address(results.events)),
        lambda: within(rest.lambda).unwrap_or(address(results.lambda)),
        cache: results.cache.as_ref().map(raw_cache),
    };
    if let Some(at) = within(rest.tau) {
        fill(&stream, at, tau, parsed.shape.value_heads)?;
    }
    // SAFETY: the plan is of this engine's GPU; the arrays have the bytes that their extents say; the rest the caller
    // of the C function answers for.
    unsafe { stream.engine.launch(&plan, &inputs, &outputs, (base, plan.workspace_bytes()), None) }?;
    Ok(())
}

/// Fills `count` floats with one value, in the stream's order.
fn fill(stream: &Stream, at: u64, value: f32, count: usize) -> Outcome<()> {
    let failed = |call, code: CUresult| match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(Error::Cuda { call, name: format!("{code:?}"), code: code as u32 }),
    };
    if at == 0 {
        return Err(Error::Missing { name: "workspace", why: "its address is null" }.into());
    }
    let context = stream.engine.context();
    context.bind_to_thread().map_err(|error| Error::Cuda {
        call: "cuCtxSetCurrent",
        name: format!("{:?}", error.0),
        code: error.0 as u32,
    })?;
    // SAFETY: in the workspace, which is as long as was checked.
    let code = unsafe { sys::cuMemsetD32Async(at, value.to_bits(), count, stream.raw()) };
    Ok(failed("cuMemsetD32Async", code)?)
}

/// Bytes of workspace of a backward.
pub(crate) fn backward_workspace(parsed: &Parsed<'_>, _: &GradientsOf) -> Outcome<usize> {
    stream(parsed)?;
    not_built("backward")
}

/// # Safety
/// As [`forward`].
pub(crate) unsafe fn backward(
    parsed: &Parsed<'_>,
    _: &Arguments,
    _: &UpstreamOf,
    _: &GradientsOf,
) -> Outcome<()> {
    stream(parsed)?;
    not_built("backward")
}

/// Bytes of workspace of a step.
pub(crate) fn step_workspace(parsed: &Parsed<'_>, _: &ResultsOf) -> Outcome<usize> {
    stream(parsed)?;
    not_built("step")
}

/// # Safety
/// As [`forward`].
pub(crate) unsafe fn step(parsed: &Parsed<'_>, _: &Arguments, _: &CacheOf, _: &ResultsOf) -> Outcome<()> {
    stream(parsed)?;
    not_built("step")
}

fn not_built<T>(what: &'static str) -> Outcome<T> {
    Err(Error::NotBuilt { engine: "cuda", what }.into())
}

/// Zeros on a GPU, for a cache that the library holds.
pub(crate) fn zeros(parsed: &Parsed<'_>, bytes: usize) -> Outcome<dla::cuda::Memory> {
    let stream = stream(parsed)?;
    let memory = stream.engine.allocate(bytes)?;
    stream.engine.fill(&memory, 0)?;
    Ok(memory)
}
