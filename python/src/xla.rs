//! Handlers that XLA calls (its FFI, version 0 of the C API: xla/ffi/api/c_api.h, which jax ships). The structs are twins
//! of those, as far as they are read: what XLA adds later stands behind.
//!
//! A call site has two attributes, that dla/jax.py makes: `codes`, i64: the options' seven, dtype, nine extents, and which
//! operands and results there are, a bit each; `numbers`, f32: tau, scale, soft temperature.

use crate::{message, options};
use dla_capi::*;
use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Extension {
    struct_size: usize,
    kind: i32,
    next: *mut Extension,
}

/// Kind of an [`Extension`] that asks what the handler is.
const METADATA: i32 = 1;

#[repr(C)]
struct MetadataExtension {
    base: Extension,
    metadata: *mut Metadata,
}

#[repr(C)]
struct Metadata {
    struct_size: usize,
    version: Version,
    traits: u32,
}

#[repr(C)]
struct Version {
    struct_size: usize,
    extension: *mut Extension,
    major: i32,
    minor: i32,
}

#[repr(C)]
struct ErrorCreate {
    struct_size: usize,
    extension: *mut Extension,
    message: *const c_char,
    code: i32,
}

#[repr(C)]
struct StreamGet {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    stream: *mut c_void,
}

#[repr(C)]
struct Allocate {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    size: usize,
    alignment: usize,
    data: *mut c_void,
}

#[repr(C)]
struct OrdinalGet {
    struct_size: usize,
    extension: *mut Extension,
    context: *mut c_void,
    ordinal: i32,
}

type Function = *mut c_void;

#[repr(C)]
struct Api {
    struct_size: usize,
    extension: *mut Extension,
    version: Version,
    internal: *const c_void,
    error_create: Option<unsafe extern "C" fn(*mut ErrorCreate) -> *mut c_void>,
    _error_get_message: Function,
    _error_destroy: Function,
    _handler_register: Function,
    stream_get: Option<unsafe extern "C" fn(*mut StreamGet) -> *mut c_void>,
    _type_register: Function,
    _context_get: Function,
    _state_set: Function,
    _state_get: Function,
    allocate: Option<unsafe extern "C" fn(*mut Allocate) -> *mut c_void>,
    _free: Function,
    _schedule: Function,
    _threads: Function,
    _future: [Function; 3],
    _run_id: Function,
    ordinal_get: Option<unsafe extern "C" fn(*mut OrdinalGet) -> *mut c_void>,
}

#[repr(C)]
struct Arrays {
    struct_size: usize,
    extension: *mut Extension,
    size: i64,
    types: *const i32,
    items: *const *const c_void,
}

#[repr(C)]
struct Span {
    at: *const u8,
    len: usize,
}

#[repr(C)]
struct Attributes {
    struct_size: usize,
    extension: *mut Extension,
    size: i64,
    types: *const i32,
    names: *const *const Span,
    items: *const *const c_void,
}

/// Type of an attribute that is an array.
const ARRAY: i32 = 1;

#[repr(C)]
struct AttributeArray {
    dtype: i32,
    size: usize,
    data: *const c_void,
}

#[repr(C)]
struct XlaBuffer {
    struct_size: usize,
    extension: *mut Extension,
    dtype: i32,
    data: *mut c_void,
    rank: i64,
    dims: *const i64,
}

#[repr(C)]
pub(crate) struct Frame {
    struct_size: usize,
    extension: *mut Extension,
    api: *const Api,
    context: *mut c_void,
    stage: i32,
    arguments: Arrays,
    results: Arrays,
    attributes: Attributes,
}

const EXECUTE: i32 = 3;

/// Alignment of a workspace.
const WORKSPACE_ALIGNMENT: usize = 256;

const S64: i32 = 5;
const F32: i32 = 11;

fn width(dtype: i32) -> Option<usize> {
    Some(match dtype {
        1 | 2 | 6 => 1,
        3 | 7 | 10 | 16 => 2,
        4 | 8 | 11 => 4,
        5 | 9 | 12 => 8,
        _ => return None,
    })
}

/// What a handler could not do, and how XLA counts that.
type Outcome<T> = Result<T, (i32, String)>;

const INVALID: i32 = 3;
const INTERNAL: i32 = 13;

fn of_status(status: Status) -> Outcome<()> {
    let code = match status {
        Status::Ok => return Ok(()),
        Status::NotBuilt => 12,
        Status::Memory => 8,
        Status::Device => 9,
        Status::Cuda | Status::Internal => INTERNAL,
        _ => INVALID,
    };
    Err((code, message()))
}

/// Buffers of which some are there: `mask` says which.
///
/// # Safety
/// `arrays` is XLA's.
unsafe fn buffers<const N: usize>(arrays: &Arrays, mask: i64) -> Outcome<[Buffer; N]> {
    let mut all = [Buffer::ABSENT; N];
    let mut next = 0;
    for (index, buffer) in all.iter_mut().enumerate() {
        if mask >> index & 1 == 0 {
            continue;
        }
        if next >= arrays.size {
            return Err((INTERNAL, format!("dla: {} buffers came, more are named", arrays.size)));
        }
        // SAFETY: as many as its size says, all of them buffers.
        let given = unsafe { &**arrays.items.add(next as usize).cast::<*const XlaBuffer>() };
        next += 1;
        let width = width(given.dtype).ok_or((INVALID, format!("dla: dtype {} of XLA", given.dtype)))?;
        // SAFETY: as many as its rank says.
        let elements: i64 = (0..given.rank).map(|i| unsafe { *given.dims.add(i as usize) }).product();
        *buffer = Buffer { data: given.data, bytes: elements as usize * width };
        // Without elements it is there all the same.
        if buffer.bytes == 0 && buffer.data.is_null() {
            buffer.data = std::ptr::without_provenance_mut(256);
        }
    }
    Ok(all)
}

/// # Safety
/// `frame` is XLA's.
unsafe fn attribute<'a, T>(frame: &'a Frame, name: &str, dtype: i32) -> Outcome<&'a [T]> {
    let attributes = &frame.attributes;
    for index in 0..attributes.size as usize {
        // SAFETY: as many as its size says.
        unsafe {
            let span = &**attributes.names.add(index);
            if std::slice::from_raw_parts(span.at, span.len) != name.as_bytes()
                || *attributes.types.add(index) != ARRAY
            {
                continue;
            }
            let array = &**attributes.items.add(index).cast::<*const AttributeArray>();
            if array.dtype == dtype {
                return Ok(std::slice::from_raw_parts(array.data.cast(), array.size));
            }
        }
    }
    Err((INTERNAL, format!("dla: no attribute {name}")))
}

/// Codes of a call site.
const CODES: usize = 19;

/// # Safety
/// `frame` is XLA's, in the execution of a call site that dla/jax.py made.
unsafe fn run(frame: &Frame, cuda: bool, backward: bool) -> Outcome<()> {
    // SAFETY: as the caller says.
    let (codes, numbers) =
        unsafe { (attribute::<i64>(frame, "codes", S64)?, attribute::<f32>(frame, "numbers", F32)?) };
    let (Ok(codes), Ok(numbers)) = (<[i64; CODES]>::try_from(codes), <[f32; 3]>::try_from(numbers)) else {
        return Err((INTERNAL, "dla: codes or numbers of another version".to_owned()));
    };
    let options = options((std::array::from_fn(|i| codes[i] as i32), numbers));
    let extents: [usize; 9] = std::array::from_fn(|i| codes[8 + i] as usize);
    let [batch, time, heads, value_heads, dk, dv, sequences, lambda_columns, logit_columns] = extents;
    // SAFETY: as the caller says.
    let operands: [Buffer; 24] = unsafe { buffers(&frame.arguments, codes[17]) }?;
    // SAFETY: as the caller says.
    let results: [Buffer; 13] = unsafe { buffers(&frame.results, codes[18]) }?;
    let [q, k, v, g, beta, lambda, route_slope, route_bias, route_logits, tau, events, cu_seqlens, ..] =
        operands;
    let cache = |at: usize| CacheArrays {
        states: operands[at],
        len: operands[at + 1],
        tokens: operands[at + 2],
        drift: operands[at + 3],
        open: operands[at + 4],
        keys: operands[at + 5],
    };
    let first = cache(12);
    let mut call = Call {
        dtype: codes[7] as i32,
        batch,
        time,
        heads,
        value_heads,
        dk,
        dv,
        sequences,
        lambda_columns,
        logit_columns,
        q,
        k,
        v,
        g,
        beta,
        lambda,
        route_slope,
        route_bias,
        route_logits,
        tau,
        events,
        cu_seqlens,
        cache: if first.states.is_present() { &first } else { null() },
        ..Call::default()
    };
    if cuda {
        // SAFETY: as the caller says.
        unsafe { place(frame, &mut call) }?;
    }
    let gradients = |states: Buffer, open: Buffer, keys: Buffer| CacheArrays {
        states,
        open,
        keys,
        ..CacheArrays::ABSENT
    };
    if backward {
        let d_last = gradients(operands[19], operands[20], operands[21]);
        let d_first = gradients(results[10], results[11], results[12]);
        let some = |arrays: &CacheArrays| {
            arrays.states.is_present() || arrays.open.is_present() || arrays.keys.is_present()
        };
        let upstream = Upstream {
            o: operands[18],
            cache: if some(&d_last) { &d_last } else { null() },
            drift: operands[22],
            lambda: operands[23],
            ..Upstream::default()
        };
        let [q, k, v, g, beta, lambda, route_slope, route_bias, route_logits, tau, ..] = results;
        let wanted = Gradients {
            q,
            k,
            v,
            g,
            beta,
            lambda,
            route_slope,
            route_bias,
            route_logits,
            tau,
            cache: if some(&d_first) { &d_first } else { null() },
            ..Gradients::default()
        };
        // SAFETY: XLA's buffers, of the bytes that their dims say.
        unsafe {
            if cuda {
                let mut bytes = 0;
                of_status(dla_backward_workspace(&options, &call, &upstream, &wanted, &mut bytes))?;
                call.workspace = workspace(frame, bytes)?;
            }
            of_status(dla_backward(&options, &call, &upstream, &wanted))
        }
    } else {
        let last = CacheArrays {
            states: results[4],
            len: results[5],
            tokens: results[6],
            drift: results[7],
            open: results[8],
            keys: results[9],
        };
        let results = Results {
            o: results[0],
            drift: results[1],
            events: results[2],
            lambda: results[3],
            cache: if last.states.is_present() { &last } else { null() },
            ..Results::default()
        };
        // SAFETY: as above.
        unsafe {
            if cuda {
                let mut bytes = 0;
                of_status(dla_forward_workspace(&options, &call, &results, &mut bytes))?;
                call.workspace = workspace(frame, bytes)?;
            }
            of_status(dla_forward(&options, &call, &results))
        }
    }
}

/// The GPU and the stream of a call.
///
/// # Safety
/// `frame` is XLA's.
unsafe fn place(frame: &Frame, call: &mut Call) -> Outcome<()> {
    // SAFETY: as the caller says.
    let api = unsafe { &*frame.api };
    let missing = |what: &str| (INTERNAL, format!("dla: XLA gives no {what}"));
    let (extension, context) = (null_mut(), frame.context);
    let mut stream =
        StreamGet { struct_size: size_of::<StreamGet>(), extension, context, stream: null_mut() };
    let mut ordinal = OrdinalGet { struct_size: size_of::<OrdinalGet>(), extension, context, ordinal: 0 };
    let get = api.stream_get.ok_or_else(|| missing("stream"))?;
    // SAFETY: a function of XLA, and its struct.
    if !unsafe { get(&mut stream) }.is_null() {
        return Err(missing("stream"));
    }
    // An older XLA has no such function.
    if api.struct_size >= size_of::<Api>() {
        let get = api.ordinal_get.ok_or_else(|| missing("device"))?;
        // SAFETY: as above.
        if !unsafe { get(&mut ordinal) }.is_null() {
            return Err(missing("device"));
        }
    }
    call.device = DeviceCode::Cuda as i32;
    call.stream = stream.stream;
    call.ordinal = ordinal.ordinal;
    Ok(())
}

/// Memory of XLA for the time of the call.
///
/// # Safety
/// `frame` is XLA's.
unsafe fn workspace(frame: &Frame, bytes: usize) -> Outcome<Buffer> {
    let mut request = Allocate {
        struct_size: size_of::<Allocate>(),
        extension: null_mut(),
        context: frame.context,
        size: bytes + WORKSPACE_ALIGNMENT,
        // XLA aligns to no more than this, when it is asked to.
        alignment: 16,
        data: null_mut(),
    };
    // SAFETY: as the caller says.
    let allocate = unsafe { &*frame.api }.allocate;
    let allocate = allocate.ok_or((INTERNAL, "dla: XLA gives no memory".to_owned()))?;
    // SAFETY: a function of XLA, and its struct.
    if !unsafe { allocate(&mut request) }.is_null() {
        return Err((8, format!("workspace: out of memory: {bytes} bytes asked for")));
    }
    let skip = request.data.addr().next_multiple_of(WORKSPACE_ALIGNMENT) - request.data.addr();
    Ok(Buffer { data: request.data.wrapping_byte_add(skip), bytes })
}

/// Answers XLA, or runs.
///
/// # Safety
/// XLA calls it.
unsafe fn handle(frame: *mut Frame, cuda: bool, backward: bool) -> *mut c_void {
    // SAFETY: as the caller says.
    let frame = unsafe { &*frame };
    if !frame.extension.is_null() {
        // SAFETY: XLA's; an extension of this kind is one of metadata.
        unsafe {
            if (*frame.extension).kind == METADATA {
                let metadata = &mut *(*frame.extension.cast::<MetadataExtension>()).metadata;
                metadata.version.major = 0;
                metadata.version.minor = (*frame.api).version.minor.min(3);
                // Not to be captured into a CUDA graph: XLA's scratch memory is another's when a graph is replayed.
                metadata.traits = 0;
                return null_mut();
            }
        }
    }
    if frame.stage != EXECUTE {
        return null_mut();
    }
    // SAFETY: as the caller says.
    let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { run(frame, cuda, backward) }));
    let (code, message) = match outcome {
        Ok(Ok(())) => return null_mut(),
        Ok(Err(failure)) => failure,
        Err(_) => (INTERNAL, "internal: a defect of the library".to_owned()),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let struct_size = size_of::<ErrorCreate>();
    let mut request = ErrorCreate { struct_size, extension: null_mut(), message: message.as_ptr(), code };
    // SAFETY: XLA's function and struct; it copies the message.
    match unsafe { (*frame.api).error_create } {
        Some(create) => unsafe { create(&mut request) },
        None => null_mut(),
    }
}

unsafe extern "C" fn forward_cpu(frame: *mut Frame) -> *mut c_void {
    // SAFETY: XLA calls it.
    unsafe { handle(frame, false, false) }
}

unsafe extern "C" fn backward_cpu(frame: *mut Frame) -> *mut c_void {
    // SAFETY: XLA calls it.
    unsafe { handle(frame, false, true) }
}

unsafe extern "C" fn forward_cuda(frame: *mut Frame) -> *mut c_void {
    // SAFETY: XLA calls it.
    unsafe { handle(frame, true, false) }
}

unsafe extern "C" fn backward_cuda(frame: *mut Frame) -> *mut c_void {
    // SAFETY: XLA calls it.
    unsafe { handle(frame, true, true) }
}

type Handler = unsafe extern "C" fn(*mut Frame) -> *mut c_void;

/// Every handler, by name and platform.
pub(crate) fn handlers() -> Vec<(&'static str, usize)> {
    let all: [(&str, Handler); 4] = [
        ("forward_cpu", forward_cpu),
        ("backward_cpu", backward_cpu),
        ("forward_cuda", forward_cuda),
        ("backward_cuda", backward_cuda),
    ];
    all.map(|(name, handler)| (name, handler as usize)).to_vec()
}
