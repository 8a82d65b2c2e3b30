//! The C ABI: `include/dla.h` is generated from this crate, and says to a C programmer what is said here. The bindings to
//! Python and JAX go through the same functions.
//!
//! A pointer that is not null must be what its field says: that is the one thing which cannot be checked. Everything else
//! is, before anything is computed or written.
#![warn(missing_docs)]

mod cache;
mod call;
mod cpu;
mod cuda;
mod entries;
mod pool;
mod status;
mod types;

pub use cache::CacheHandle;
pub use entries::{
    EntriesHandle, dla_entries_copy, dla_entries_create, dla_entries_destroy, dla_entries_export,
    dla_entries_import, dla_entries_prefill, dla_entries_prefill_workspace, dla_entries_release,
    dla_entries_reset, dla_entries_set_rows, dla_entries_step, dla_entries_take,
};
pub use status::Failure;
pub use types::{
    Buffer, CacheArrays, Call, CallOptions, DeviceCode, DtypeCode, Gradients, MergeCode, ReadCode,
    RecurrenceCode, Results, SlotOrderCode, StateDtypeCode, Status, Upstream,
};

use call::{Parsed, Place, ResultsOf, Wanted};
use dla::Error;
use status::{Outcome, guarded};
use std::ffi::c_char;

/// Version of the library: "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn dla_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What was wrong with this thread's last call that failed: the argument, what was expected and what came, in one line.
/// Valid until the next call of the thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn dla_error_message() -> *const c_char {
    status::message()
}

/// Whether a GPU can be used: this build has kernels, there is a driver, and it shows a GPU. The message says what is
/// missing.
#[unsafe(no_mangle)]
pub extern "C" fn dla_cuda_available() -> Status {
    guarded(|| Ok(dla::cuda::available()?))
}

/// Sets options to their defaults, those of the paper. `size` is `sizeof(dla_options)`.
///
/// # Safety
/// `options` is null or points to `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_options_init(options: *mut CallOptions, size: usize) -> Status {
    guarded(|| {
        if size != size_of::<CallOptions>() {
            let (expected, given) = (format!("{} bytes", size_of::<CallOptions>()), format!("{size} bytes"));
            return Err(Error::Shape { name: "options", expected, given }.into());
        }
        addressed("options", options)?;
        // SAFETY: aligned, and as the caller says.
        unsafe { options.write(CallOptions::default()) };
        Ok(())
    })
}

/// Reads options and call.
///
/// # Safety
/// Each is null or a struct of its kind.
unsafe fn parse<'a>(options: *const CallOptions, call: *const Call) -> Outcome<Parsed<'a>> {
    // SAFETY: as the caller says.
    let (options, call) = unsafe { (call::read(options)?, call::read(call)?) };
    Parsed::new(options, call)
}

/// Writes the answer of a workspace query.
///
/// # Safety
/// `to` is null or points to a `size_t`.
unsafe fn answer(to: *mut usize, bytes: usize) -> Outcome<()> {
    addressed("bytes", to)?;
    // SAFETY: aligned, and as the caller says.
    unsafe { to.write(bytes) };
    Ok(())
}

/// There is something at an address, as far as it says itself.
fn addressed<T>(name: &'static str, at: *const T) -> Outcome<()> {
    if at.is_null() || !at.is_aligned() {
        return Err(Error::Missing { name, why: "its address is null" }.into());
    }
    Ok(())
}

/// Bytes of workspace of a call that has results; `of`: on a GPU.
///
/// # Safety
/// Every pointer is null or what its type says.
unsafe fn workspace(
    options: *const CallOptions,
    call: *const Call,
    results: *const Results,
    bytes: *mut usize,
    of: fn(&Parsed<'_>, &ResultsOf) -> Outcome<usize>,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let (parsed, results) = unsafe { (parse(options, call)?, call::read(results)?) };
        let results = parsed.results(results)?;
        let needed = match parsed.place {
            Place::Cpu => 0,
            Place::Cuda { .. } => of(&parsed, &results)?,
        };
        // SAFETY: as the caller says.
        unsafe { answer(bytes, needed) }
    })
}

/// Bytes of workspace that `dla_forward` needs for a call of these extents and results; of the buffers only whether they
/// are there, and their bytes, are read. On the CPU: 0.
///
/// # Safety
/// Every pointer is null or what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_forward_workspace(
    options: *const CallOptions,
    call: *const Call,
    results: *const Results,
    bytes: *mut usize,
) -> Status {
    // SAFETY: as the caller says.
    unsafe { workspace(options, call, results, bytes, cuda::forward_workspace) }
}

/// All tokens of all sequences: `o`, and what else `results` has room for.
///
/// # Safety
/// Every pointer is null or what its type says; buffers hold their bytes, on the device of the call. Outputs overlap
/// nothing else. On a GPU all of it stays until the stream has come past the call, and what the host cannot see holds:
/// cu_seqlens runs from 0 to T without descending, a given log holds events that can happen, an initial cache at most M
/// slots a row and a token or more a slot, g is at most 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_forward(
    options: *const CallOptions,
    call: *const Call,
    results: *const Results,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let (parsed, results) = unsafe { (parse(options, call)?, call::read(results)?) };
        let (arguments, results) = (parsed.arguments()?, parsed.results(results)?);
        // SAFETY: as the caller says.
        match parsed.place {
            Place::Cpu => unsafe { cpu::forward(&parsed, &arguments, &results) },
            Place::Cuda { .. } => unsafe { cuda::forward(&parsed, &arguments, &results) },
        }
    })
}

/// Bytes of workspace that `dla_backward` needs, as `dla_forward_workspace` says. On the CPU: 0.
///
/// # Safety
/// Every pointer is null or what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_backward_workspace(
    options: *const CallOptions,
    call: *const Call,
    upstream: *const Upstream,
    gradients: *const Gradients,
    bytes: *mut usize,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let parsed = unsafe { parse(options, call)? };
        // SAFETY: as the caller says.
        let (upstream, gradients) = unsafe { (call::read(upstream)?, call::read(gradients)?) };
        let (upstream, gradients) = (parsed.upstream(upstream)?, parsed.gradients(gradients)?);
        let needed = match parsed.place {
            Place::Cpu => 0,
            Place::Cuda { .. } => cuda::backward_workspace(&parsed, &upstream, &gradients)?,
        };
        // SAFETY: as the caller says.
        unsafe { answer(bytes, needed) }
    })
}

/// Gradients of the arguments from those of the results. `call` is that of the forward, with its log as `events`.
///
/// # Safety
/// As `dla_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_backward(
    options: *const CallOptions,
    call: *const Call,
    upstream: *const Upstream,
    gradients: *const Gradients,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let parsed = unsafe { parse(options, call)? };
        // SAFETY: as the caller says.
        let (upstream, gradients) = unsafe { (call::read(upstream)?, call::read(gradients)?) };
        let arguments = parsed.arguments()?;
        let (upstream, gradients) = (parsed.upstream(upstream)?, parsed.gradients(gradients)?);
        // SAFETY: as the caller says.
        match parsed.place {
            Place::Cpu => unsafe { cpu::backward(&parsed, arguments, &upstream, &gradients) },
            Place::Cuda { .. } => unsafe { cuda::backward(&parsed, &arguments, &upstream, &gradients) },
        }
    })
}

/// Bytes of workspace that `dla_step` needs. On the CPU: 0.
///
/// # Safety
/// Every pointer is null or what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_step_workspace(
    options: *const CallOptions,
    call: *const Call,
    results: *const Results,
    bytes: *mut usize,
) -> Status {
    // SAFETY: as the caller says.
    unsafe { workspace(options, call, results, bytes, cuda::step_workspace) }
}

/// One token per batch entry (T = 1), in place: batch entry b continues sequence b of `cache`. On a GPU all states are
/// moved three times.
///
/// # Safety
/// As `dla_forward`; the cache's arrays are used by nobody else meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_step(
    options: *const CallOptions,
    call: *const Call,
    cache: *const CacheArrays,
    results: *const Results,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let (parsed, results) = unsafe { (parse(options, call)?, call::read(results)?) };
        if cache.is_null() || !cache.is_aligned() {
            return Err(Error::Missing { name: "cache", why: "a step changes it" }.into());
        }
        if parsed.call.cu_seqlens.is_present() {
            let why = "a step takes one token per batch entry";
            return Err(Error::Unexpected { name: "cu_seqlens", why }.into());
        }
        if !parsed.call.cache.is_null() || !results.cache.is_null() {
            let why = "a step takes the cache that it changes";
            return Err(Error::Unexpected { name: "call.cache or results.cache", why }.into());
        }
        // SAFETY: as the caller says.
        let cache = parsed.cache(unsafe { &*cache }, Wanted::All)?;
        let (arguments, results) = (parsed.arguments()?, parsed.results(results)?);
        // SAFETY: as the caller says.
        match parsed.place {
            Place::Cpu => unsafe { cpu::step(&parsed, &arguments, &cache, &results) },
            Place::Cuda { .. } => unsafe { cuda::step(&parsed, &arguments, &cache, &results) },
        }
    })
}

/// A cache of sequences that have not begun, on the device of the call, for its extents and options; no buffer of the call
/// is read. `*cache` is set where the status is `DLA_STATUS_OK`, else NULL.
///
/// # Safety
/// Every pointer is null or what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_cache_create(
    options: *const CallOptions,
    call: *const Call,
    cache: *mut *mut CacheHandle,
) -> Status {
    guarded(|| {
        addressed("cache", cache)?;
        // SAFETY: aligned, and as the caller says.
        unsafe { cache.write(std::ptr::null_mut()) };
        // SAFETY: as the caller says.
        let handle = CacheHandle::new(&unsafe { parse(options, call) }?)?;
        // SAFETY: as above.
        unsafe { cache.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    })
}

/// The arrays of a cache, to be given to forward, backward and step; they live as long as the cache.
///
/// # Safety
/// `cache` is null or of `dla_cache_create` and not destroyed; `arrays` is null or points to a `dla_cache_arrays`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_cache_view(cache: *const CacheHandle, arrays: *mut CacheArrays) -> Status {
    guarded(|| {
        if cache.is_null() || arrays.is_null() || !arrays.is_aligned() {
            return Err(Error::Missing { name: "cache", why: "an address is null" }.into());
        }
        // SAFETY: as the caller says.
        unsafe { arrays.write((*cache).arrays()) };
        Ok(())
    })
}

/// Frees a cache; on a GPU, wait for the stream first. NULL is no cache, and nothing happens.
///
/// # Safety
/// `cache` is null or of `dla_cache_create`, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_cache_destroy(cache: *mut CacheHandle) {
    if !cache.is_null() {
        guarded(|| {
            // SAFETY: made by `Box::into_raw`, destroyed once, as the caller says.
            drop(unsafe { Box::from_raw(cache) });
            Ok(())
        });
    }
}
