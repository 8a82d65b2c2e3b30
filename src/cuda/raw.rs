//! Calls on arrays that are on the GPU already: addresses in, addresses out.

use super::abi::DevicePointer;
use super::backward::BackwardCall;
use super::driver::call;
use super::plan::{BackwardPlan, Plan};
use super::step::StepPlan;
use crate::error::{Error, Result};
use crate::options::Read;
use crate::problem::Shape;
use cudarc::driver::sys::{self, CUresult};

/// Addresses of a call's arguments on the GPU; 0 is absent. All arrays are contiguous and row-major.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawInputs {
    /// Queries, `[B,T,H,dk]`.
    pub q: DevicePointer,
    /// Keys, `[B,T,H,dk]`.
    pub k: DevicePointer,
    /// Values, `[B,T,HV,dv]`.
    pub v: DevicePointer,
    /// Log decay, `[B,T,HV]` f32, at most 0; absent is 0.
    pub g: DevicePointer,
    /// Write strength of the gated delta rule, `[B,T,HV]` f32.
    pub beta: DevicePointer,
    /// Given read weights, `[B,T,HV,lambda_columns]` f32.
    pub lambda: DevicePointer,
    /// Columns of lambda, M or more.
    pub lambda_columns: usize,
    /// Routed reads: slope, `[HV]` f32.
    pub slope: DevicePointer,
    /// Routed reads: bias, `[HV]` f32.
    pub bias: DevicePointer,
    /// Routed reads: logits, `[B,T,HV,logit_columns]` f32; absent is 0.
    pub logits: DevicePointer,
    /// Columns of the logits, M or more.
    pub logit_columns: usize,
    /// Drift from which a token opens a slot, `[HV]` f32.
    pub tau: DevicePointer,
    /// The caller's own event log, `[B,T,HV]` u8; absent, it is computed.
    pub events: DevicePointer,
    /// Packed sequences: offsets, `[N+1]` i64; absent, N = B sequences of T tokens.
    pub cu_seqlens: DevicePointer,
    /// Cache to resume from; absent, sequences begin empty.
    pub cache: Option<RawCache>,
}

/// Addresses of a cache's arrays, chronological as [`Cache`](crate::Cache).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawCache {
    /// Slot states S, `[N,HV,M,dk,dv]` f32.
    pub states: DevicePointer,
    /// Slots held m, `[N,HV]` u32.
    pub len: DevicePointer,
    /// Tokens n of every slot, `[N,HV,M]` u32.
    pub tokens: DevicePointer,
    /// Summed drift J of every slot in units of 2^-12, `[N,HV,M]` u32.
    pub drift: DevicePointer,
    /// The open segment's plain decayed sum R, `[N,HV,dk,dv]` f32.
    pub open: DevicePointer,
    /// Routed reads: key sums of every slot, `[N,HV,M,dk]` f32.
    pub keys: DevicePointer,
}

/// Addresses of a call's results on the GPU: written whole, whatever they held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawOutputs {
    /// Output, `[B,T,HV,dv]`, dtype of q.
    pub o: DevicePointer,
    /// Drift I of every token, `[B,T,HV]` f32.
    pub drift: DevicePointer,
    /// Event log, `[B,T,HV]` u8. May be the caller's own log, which is then what it was.
    pub events: DevicePointer,
    /// Routed reads: read weights, `[B,T,HV,M]` f32.
    pub lambda: DevicePointer,
    /// Final cache, where the plan was made for one. None of its arrays is one of the initial cache's.
    pub cache: Option<RawCache>,
}

/// Addresses of what the forward left and the backward takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawForward {
    /// Event log, `[B,T,HV]` u8.
    pub events: DevicePointer,
    /// Drift, `[B,T,HV]` f32: read with soft boundaries, or where the final cache has a gradient.
    pub drift: DevicePointer,
    /// Routed reads: read weights, `[B,T,HV,M]` f32.
    pub lambda: DevicePointer,
}

/// Addresses of the gradients of a cache's arrays, chronological as [`CacheGradients`](crate::CacheGradients). One that is 0
/// is, given, a gradient of zeros, and else not wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawCacheGradients {
    /// Gradient of the states, `[N,HV,M,dk,dv]` f32.
    pub states: DevicePointer,
    /// Gradient of the open segment's R, `[N,HV,dk,dv]` f32.
    pub open: DevicePointer,
    /// Routed reads: gradient of the key sums, `[N,HV,M,dk]` f32.
    pub keys: DevicePointer,
}

/// Addresses of the gradients of a call's results.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawUpstream {
    /// Gradient of o, `[B,T,HV,dv]`, dtype of q.
    pub o: DevicePointer,
    /// Gradient of the final cache, where the plan was made for one.
    pub cache: Option<RawCacheGradients>,
}

/// Addresses of the gradients of a call's arguments: written whole, whatever they held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawGradients {
    /// Gradient of q, `[B,T,H,dk]`, dtype of q.
    pub q: DevicePointer,
    /// Gradient of k, `[B,T,H,dk]`, dtype of q.
    pub k: DevicePointer,
    /// Gradient of v, `[B,T,HV,dv]`, dtype of q.
    pub v: DevicePointer,
    /// Gradient of g, `[B,T,HV]` f32; 0: not wanted.
    pub g: DevicePointer,
    /// Gradient of beta, `[B,T,HV]` f32: gated delta rule.
    pub beta: DevicePointer,
    /// Given reads: gradient of lambda, `[B,T,HV,lambda_columns]` f32, columns without a slot 0.
    pub lambda: DevicePointer,
    /// Routed reads: gradient of the slope, `[HV]` f32.
    pub slope: DevicePointer,
    /// Routed reads: gradient of the bias, `[HV]` f32.
    pub bias: DevicePointer,
    /// Routed reads: gradient of the logits, `[B,T,HV,logit_columns]` f32, columns without a slot 0; 0: not wanted.
    pub logits: DevicePointer,
    /// Soft boundaries: gradient of tau, `[HV]` f32.
    pub tau: DevicePointer,
    /// Soft boundaries: gradient of the drift, `[B,T,HV]` f32.
    pub drift: DevicePointer,
    /// Gradient of the initial cache, if there was one and it is wanted.
    pub cache: Option<RawCacheGradients>,
}

/// Alignment of what the kernels read and write 16 bytes at a time.
const WIDE: u64 = 16;

/// An address to be checked.
struct Address {
    name: &'static str,
    address: DevicePointer,
    alignment: u64,
    /// Whether the array has elements: without, any address will do.
    elements: bool,
    required: bool,
}

/// Checks every address of a call: there where it must be, aligned, and of GPU `ordinal`.
pub(super) fn check(
    plan: &Plan,
    ordinal: usize,
    inputs: &RawInputs,
    outputs: &RawOutputs,
    workspace: (DevicePointer, usize),
) -> Result<()> {
    let Shape { capacity, sequences, .. } = plan.shape;
    let (some_tokens, some_rows) = (plan.shape.tokens() > 0, sequences > 0);
    let routed = plan.read == Read::Routed;
    check_columns(inputs, routed, capacity)?;
    if inputs.cu_seqlens == 0 && sequences != plan.shape.batch {
        return Err(Error::Missing {
            name: "cu_seqlens",
            why: "there are not as many sequences as batch entries",
        });
    }
    if outputs.cache.is_some() != plan.final_cache {
        let why = if plan.final_cache {
            "absent, and the plan was made for a call that gives it room"
        } else {
            "not expected: the plan was made for a call without it"
        };
        return Err(Error::Plan { name: "final cache", why });
    }
    let (bytes, needed) = (workspace.1, plan.workspace_bytes());
    if bytes < needed {
        return Err(Error::Workspace { expected: needed, given: bytes });
    }
    let token = |name, address, alignment, required| Address {
        name,
        address,
        alignment,
        elements: some_tokens,
        required,
    };
    let row = |name, address, alignment, required| Address {
        name,
        address,
        alignment,
        elements: some_rows,
        required,
    };
    let given = !routed;
    let arguments = [
        token("q", inputs.q, WIDE, true),
        token("k", inputs.k, WIDE, true),
        token("v", inputs.v, WIDE, true),
        token("g", inputs.g, 4, false),
        token("beta", inputs.beta, 4, plan.delta),
        token("lambda", if given { inputs.lambda } else { 0 }, 4, given),
        row("route_slope", if routed { inputs.slope } else { 0 }, 4, routed),
        row("route_bias", if routed { inputs.bias } else { 0 }, 4, routed),
        token("route_logits", if routed { inputs.logits } else { 0 }, 4, false),
        row("tau", inputs.tau, 4, true),
        token("events", inputs.events, 1, false),
        row("cu_seqlens", inputs.cu_seqlens, 8, false),
        token("o", outputs.o, WIDE, true),
        token("drift", outputs.drift, 4, true),
        token("events", outputs.events, 1, true),
        token("lambda", if routed { outputs.lambda } else { 0 }, 4, routed),
        Address {
            name: "workspace",
            address: workspace.0,
            alignment: WIDE,
            elements: needed > 0,
            required: true,
        },
    ];
    let caches = [inputs.cache, outputs.cache].into_iter().flatten().flat_map(|cache| {
        [
            row("cache_states", cache.states, WIDE, true),
            row("cache_len", cache.len, 4, true),
            row("cache_tokens", cache.tokens, 4, true),
            row("cache_drift", cache.drift, 4, true),
            row("cache_open", cache.open, WIDE, true),
            row("cache_keys", if routed { cache.keys } else { 0 }, 4, routed),
        ]
    });
    for address in arguments.into_iter().chain(caches) {
        check_address(&address, ordinal, workspace)?;
    }
    if let (Some(initial), Some(last)) = (inputs.cache, outputs.cache)
        && some_rows
        && (initial.open == last.open || initial.states == last.states)
    {
        return Err(Error::Plan {
            name: "final cache",
            why: "expected memory of its own, not the initial cache's",
        });
    }
    Ok(())
}

/// Checks every address of a step; without a list of entries row b is entry b. `room`: its workspace, or nothing.
pub(super) fn check_step(
    plan: &StepPlan,
    ordinal: usize,
    entries: Option<DevicePointer>,
    inputs: &RawInputs,
    outputs: &RawOutputs,
    room: (DevicePointer, usize),
) -> Result<()> {
    let routed = plan.read == Read::Routed;
    let capacity = plan.shape.capacity;
    check_columns(inputs, routed, capacity)?;
    if inputs.cu_seqlens != 0 {
        return Err(Error::Unexpected {
            name: "cu_seqlens",
            why: "a step takes as many tokens of every row",
        });
    }
    if inputs.cache.is_some() || outputs.cache.is_some() {
        return Err(Error::Unexpected { name: "cache", why: "the entries hold what the call goes on from" });
    }
    let elements = plan.shape.batch > 0;
    let argument =
        |name, address, alignment, required| Address { name, address, alignment, elements, required };
    let when = |wanted: bool, address: DevicePointer| if wanted { address } else { 0 };
    for address in [
        argument("entries", entries.unwrap_or(0), 4, entries.is_some()),
        argument("q", inputs.q, WIDE, true),
        argument("k", inputs.k, WIDE, true),
        argument("v", inputs.v, WIDE, true),
        argument("g", inputs.g, 4, false),
        argument("beta", when(plan.delta(), inputs.beta), 4, plan.delta()),
        argument("lambda", when(!routed, inputs.lambda), 4, !routed),
        argument("route_slope", when(routed, inputs.slope), 4, routed),
        argument("route_bias", when(routed, inputs.bias), 4, routed),
        argument("route_logits", when(routed, inputs.logits), 4, false),
        argument("tau", inputs.tau, 4, true),
        argument("events", inputs.events, 1, false),
        argument("o", outputs.o, WIDE, true),
        argument("drift", outputs.drift, 4, true),
        argument("events", outputs.events, 1, true),
        argument("lambda", when(routed, outputs.lambda), 4, routed),
    ] {
        check_address(&address, ordinal, room)?;
    }
    Ok(())
}

/// Checks the cache and the workspace of a step of chronological caches.
pub(super) fn check_step_cache(
    plan: &StepPlan,
    ordinal: usize,
    cache: &RawCache,
    workspace: (DevicePointer, usize),
    needed: usize,
) -> Result<()> {
    if workspace.1 < needed {
        return Err(Error::Workspace { expected: needed, given: workspace.1 });
    }
    let routed = plan.read == Read::Routed;
    let argument = |name, address, alignment| Address {
        name,
        address,
        alignment,
        elements: plan.shape.sequences > 0,
        required: true,
    };
    let arrays = [
        argument("workspace", workspace.0, WIDE),
        argument("cache_states", cache.states, WIDE),
        argument("cache_len", cache.len, 4),
        argument("cache_tokens", cache.tokens, 4),
        argument("cache_drift", cache.drift, 4),
        argument("cache_open", cache.open, WIDE),
    ];
    for address in arrays.into_iter().chain(routed.then(|| argument("cache_keys", cache.keys, 4))) {
        check_address(&address, ordinal, workspace)?;
    }
    Ok(())
}

/// Checks every address of a backward.
pub(super) fn check_backward(
    plan: &BackwardPlan,
    ordinal: usize,
    call: &BackwardCall,
    workspace_bytes: usize,
) -> Result<()> {
    let BackwardCall { inputs, forward, upstream, gradients, workspace } = call;
    let Shape { capacity, sequences, .. } = plan.shape;
    let (some_tokens, some_rows) = (plan.shape.tokens() > 0, sequences > 0);
    let routed = plan.read == Read::Routed;
    check_columns(inputs, routed, capacity)?;
    if inputs.cu_seqlens == 0 && sequences != plan.shape.batch {
        return Err(Error::Missing {
            name: "cu_seqlens",
            why: "there are not as many sequences as batch entries",
        });
    }
    if upstream.cache.is_some() != plan.final_gradient {
        let why = if plan.final_gradient {
            "absent, and the plan was made for a call that gives it"
        } else {
            "not expected: the plan was made for a call without it"
        };
        return Err(Error::Plan { name: "gradient of the final cache", why });
    }
    if gradients.cache.is_some() && inputs.cache.is_none() {
        return Err(Error::Plan {
            name: "gradient of the initial cache",
            why: "not expected: there is no initial cache",
        });
    }
    let needed = plan.workspace_bytes();
    if workspace_bytes < needed {
        return Err(Error::Workspace { expected: needed, given: workspace_bytes });
    }
    let token = |name, address, alignment, required| Address {
        name,
        address,
        alignment,
        elements: some_tokens,
        required,
    };
    let row = |name, address, alignment, required| Address {
        name,
        address,
        alignment,
        elements: some_rows,
        required,
    };
    let when = |wanted: bool, address: DevicePointer| if wanted { address } else { 0 };
    let given = !routed;
    let arguments = [
        token("q", inputs.q, WIDE, true),
        token("k", inputs.k, WIDE, true),
        token("v", inputs.v, WIDE, true),
        token("g", inputs.g, 4, false),
        token("beta", inputs.beta, 4, plan.delta),
        token("lambda", when(given, inputs.lambda), 4, given),
        row("route_slope", when(routed, inputs.slope), 4, routed),
        row("route_bias", when(routed, inputs.bias), 4, routed),
        token("route_logits", when(routed, inputs.logits), 4, false),
        row("tau", when(plan.soft || plan.through_open, inputs.tau), 4, plan.soft || plan.through_open),
        row("cu_seqlens", inputs.cu_seqlens, 8, false),
        token("events", forward.events, 1, true),
        token("drift", forward.drift, 4, plan.soft || plan.through_open),
        token("lambda", when(routed, forward.lambda), 4, routed),
        token("do", upstream.o, WIDE, true),
        token("dq", gradients.q, WIDE, true),
        token("dk", gradients.k, WIDE, true),
        token("dv", gradients.v, WIDE, true),
        token("dg", gradients.g, 4, false),
        token("dbeta", gradients.beta, 4, plan.delta),
        token("dlambda", when(given, gradients.lambda), 4, given),
        row("droute_slope", when(routed, gradients.slope), 4, routed),
        row("droute_bias", when(routed, gradients.bias), 4, routed),
        token("droute_logits", when(routed, gradients.logits), 4, false),
        row("dtau", when(plan.soft, gradients.tau), 4, plan.soft),
        token("ddrift", when(plan.soft, gradients.drift), 4, plan.soft),
        Address {
            name: "workspace",
            address: *workspace,
            alignment: WIDE,
            elements: needed > 0,
            required: true,
        },
    ];
    let caches = inputs.cache.into_iter().flat_map(|cache| {
        [
            row("cache_states", cache.states, WIDE, true),
            row("cache_len", cache.len, 4, true),
            row("cache_tokens", when(routed, cache.tokens), 4, routed),
            row("cache_open", when(plan.through_open, cache.open), WIDE, plan.through_open),
            row("cache_keys", when(routed, cache.keys), 4, routed),
        ]
    });
    let cache_gradients = [upstream.cache, gradients.cache].into_iter().flatten().flat_map(|cache| {
        [
            row("dcache_states", cache.states, WIDE, false),
            row("dcache_open", cache.open, WIDE, false),
            row("dcache_keys", when(routed, cache.keys), 4, false),
        ]
    });
    for address in arguments.into_iter().chain(caches).chain(cache_gradients) {
        check_address(&address, ordinal, (*workspace, workspace_bytes))?;
    }
    Ok(())
}

/// Checks the addresses that segment and route take and a backward may not: those that it takes are checked there.
pub(super) fn check_decisions(
    plan: &Plan,
    ordinal: usize,
    inputs: &RawInputs,
    outputs: &RawOutputs,
    workspace: (DevicePointer, usize),
) -> Result<()> {
    let routed = plan.read == Read::Routed;
    check_columns(inputs, routed, plan.shape.capacity)?;
    let (tokens, rows) = (plan.shape.tokens() > 0, plan.shape.sequences > 0);
    let argument = |name, address, alignment, elements, required| Address {
        name,
        address,
        alignment,
        elements,
        required,
    };
    let arguments = [
        argument("workspace", workspace.0, WIDE, true, true),
        argument("q", inputs.q, WIDE, tokens, true),
        argument("k", inputs.k, WIDE, tokens, true),
        argument("v", inputs.v, WIDE, tokens, true),
        argument("g", inputs.g, 4, tokens, false),
        argument("tau", inputs.tau, 4, rows, true),
        argument("cu_seqlens", inputs.cu_seqlens, 8, rows, plan.shape.sequences != plan.shape.batch),
        argument("events", outputs.events, 1, tokens, true),
        argument("drift", outputs.drift, 4, tokens, true),
    ];
    let routes = [
        argument("route_slope", inputs.slope, 4, rows, true),
        argument("route_bias", inputs.bias, 4, rows, true),
        argument("route_logits", inputs.logits, 4, tokens, false),
        argument("lambda", outputs.lambda, 4, tokens, true),
    ];
    let caches = inputs.cache.into_iter().flat_map(|cache| {
        [
            argument("cache_len", cache.len, 4, rows, true),
            argument("cache_tokens", cache.tokens, 4, rows, true),
            argument("cache_drift", cache.drift, 4, rows, true),
            argument("cache_open", cache.open, WIDE, rows, true),
            argument("cache_keys", if routed { cache.keys } else { 0 }, 4, rows, routed),
        ]
    });
    for address in arguments.into_iter().chain(routes.into_iter().filter(|_| routed)).chain(caches) {
        check_address(&address, ordinal, workspace)?;
    }
    Ok(())
}

/// Checks that weights and logits have enough columns.
fn check_columns(inputs: &RawInputs, routed: bool, capacity: usize) -> Result<()> {
    for (name, wanted, given) in [
        ("lambda", !routed, inputs.lambda_columns),
        ("route_logits", routed && inputs.logits != 0, inputs.logit_columns),
    ] {
        if wanted && (given < capacity || given > i32::MAX as usize) {
            let expected = format!("[B,T,HV,M] with M = {capacity} columns or more");
            return Err(Error::Shape { name, expected, given: format!("{given} columns") });
        }
    }
    Ok(())
}

/// `room`: address and bytes of the workspace. What lies in it is where it is: the driver is asked of its beginning alone.
fn check_address(address: &Address, ordinal: usize, room: (DevicePointer, usize)) -> Result<()> {
    let &Address { name, address, alignment, elements, required } = address;
    if !elements {
        return Ok(());
    }
    if address == 0 {
        return if required {
            Err(Error::Missing { name, why: "this call reads or writes it: its address is null" })
        } else {
            Ok(())
        };
    }
    if address % alignment != 0 {
        return Err(Error::Misaligned { name, alignment, given: address });
    }
    if address > room.0 && address - room.0 < room.1 as u64 {
        return Ok(());
    }
    let mut found: i32 = -1;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
    // SAFETY: the driver looks the address up and does not read at it; it writes one int.
    let code =
        unsafe { sys::cuPointerGetAttribute(std::ptr::from_mut(&mut found).cast(), attribute, address) };
    let foreign = |given: String| Err(Error::ForeignPointer { name, ordinal, given });
    match code {
        CUresult::CUDA_ERROR_INVALID_VALUE => foreign(format!("{address:#x}, which CUDA does not know")),
        code => {
            super::driver::check("cuPointerGetAttribute", code)?;
            if usize::try_from(found) == Ok(ordinal) {
                Ok(())
            } else {
                foreign(format!("one of GPU {found}"))
            }
        }
    }
}

/// The context that a stream belongs to.
pub(super) fn context_of(stream: sys::CUstream) -> Result<sys::CUcontext> {
    let mut context = std::ptr::null_mut();
    // SAFETY: writes one handle; that the stream is one is the caller's to answer for.
    unsafe { call!(cuStreamGetCtx(stream, &mut context)) }?;
    Ok(context)
}
