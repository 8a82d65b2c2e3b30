//! A stand-in for libcuda: one card without a card. Its kernels are those of `kernels/`, compiled for this machine and
//! emulated (tests/emulation), found by their names; what a module's image holds is not read.
//!
//! It refuses what a driver refuses, as far as this crate asks for it, and is stricter where a driver is not: memory is poisoned
//! and ends at an inaccessible page, and nothing runs before something waits for it. What goes wrong on the card is told on
//! stderr. A function of the driver that is not here is not to be found, by its name, for who asks for it.
//! `scripts/emulated` runs a command with it; docs/building.md.

mod card;
mod faults;
mod kernels;
#[path = "../../library.rs"]
mod library;
mod memory;
mod work;

use card::{MEMORY, card};
use cudarc::driver::sys::{self, CUresult};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::{Arc, Mutex};
use sys::CUresult::*;
use work::{
    Capture, Event, Executable, Function, Launch, Locked, Recorded, Stream, Work, finish, finish_all, lock,
};

/// Ends the process: the stand-in cannot go on, or has caught what no error code would show.
fn stop(what: &str) -> ! {
    eprintln!("emulated card: {what}");
    std::process::abort()
}

type Outcome = Result<(), CUresult>;

/// The context of the one card.
const CONTEXT: sys::CUcontext = 0x10 as sys::CUcontext;
/// What a fatbin begins with.
const FATBIN: u32 = 0xba55_ed50;
/// CUDA 13.0.
const VERSION: c_int = 13_000;
/// Shared memory of a block that needs no asking for.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

thread_local! {
    static CURRENT: Cell<sys::CUcontext> = const { Cell::new(std::ptr::null_mut()) };
}

/// The state of an initialised driver that still works.
fn state() -> Result<Locked, CUresult> {
    let state = lock();
    match state.broken {
        _ if !state.initialised => Err(CUDA_ERROR_NOT_INITIALIZED),
        Some(error) => Err(error),
        None => Ok(state),
    }
}

/// The state, where this thread has a context.
fn current() -> Result<Locked, CUresult> {
    let state = state()?;
    match CURRENT.get().is_null() {
        true => Err(CUDA_ERROR_INVALID_CONTEXT),
        false if state.retained == 0 => Err(CUDA_ERROR_CONTEXT_IS_DESTROYED),
        false => Ok(state),
    }
}

/// Writes a result where the caller wants it.
///
/// # Safety
/// `to` is null or has room for it.
unsafe fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    Ok(())
}

fn code(outcome: Outcome) -> CUresult {
    outcome.err().unwrap_or(CUDA_SUCCESS)
}

/// A stream's number. 1 is another name of the null stream.
fn stream_of(stream: sys::CUstream) -> usize {
    if stream as usize == 1 { 0 } else { stream as usize }
}

/// Functions of the driver, each held against cudarc's signature of it.
macro_rules! driver {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $kind),*) -> CUresult {
                let call = || -> Outcome { $body };
                code(call())
            }
            const _: unsafe fn($($kind),*) -> CUresult = sys::$name;
        )*
    };
}

// SAFETY of all of them: that of the driver, which takes its callers' addresses and handles as these do; handles are looked up,
// addresses on the card too.
driver! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        faults::explain();
        lock().initialised = true;
        Ok(())
    }

    fn cuDriverGetVersion(version: *mut c_int) { unsafe { put(version, VERSION) } }

    fn cuDeviceGetCount(count: *mut c_int) {
        state()?;
        unsafe { put(count, 1) }
    }

    fn cuDeviceGet(device: *mut sys::CUdevice, ordinal: c_int) {
        state()?;
        if ordinal != 0 {
            return Err(CUDA_ERROR_INVALID_DEVICE);
        }
        unsafe { put(device, 0) }
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: sys::CUdevice) {
        device_of(device)?;
        let bytes = card().name.to_bytes_with_nul();
        if name.is_null() || (len as usize) < bytes.len() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        unsafe { bytes.as_ptr().copy_to(name.cast(), bytes.len()) };
        Ok(())
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: sys::CUdevice) {
        device_of(device)?;
        unsafe { put(bytes, MEMORY) }
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: sys::CUdevice_attribute, device: sys::CUdevice) {
        device_of(device)?;
        let found = card().attribute(attribute);
        unsafe { put(value, found.unwrap_or_else(|| stop(&format!("{attribute:?}: not in card.rs")))) }
    }

    fn cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, device: sys::CUdevice) {
        device_of(device)?;
        state()?.retained += 1;
        unsafe { put(context, CONTEXT) }
    }

    fn cuDevicePrimaryCtxRelease_v2(device: sys::CUdevice) {
        device_of(device)?;
        let mut state = state()?;
        state.retained = state.retained.checked_sub(1).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        Ok(())
    }

    fn cuCtxGetCurrent(context: *mut sys::CUcontext) {
        state()?;
        unsafe { put(context, CURRENT.get()) }
    }

    fn cuCtxSetCurrent(context: sys::CUcontext) {
        if !context.is_null() && (context != CONTEXT || state()?.retained == 0) {
            return Err(CUDA_ERROR_INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    }

    fn cuCtxSynchronize() {
        current()?.check_no_capture_here()?;
        finish_all()
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let free_bytes = current()?.memory.free_bytes();
        unsafe {
            put(free, free_bytes)?;
            put(total, MEMORY)
        }
    }

    fn cuMemAlloc_v2(address: *mut sys::CUdeviceptr, bytes: usize) {
        let mut state = current()?;
        state.check_no_capture_here()?;
        unsafe { put(address, state.memory.allocate(bytes)?) }
    }

    fn cuMemFree_v2(address: sys::CUdeviceptr) {
        current()?.check_no_capture_here()?;
        if address == 0 {
            return Ok(());
        }
        finish_all()?;
        current()?.memory.free(address)
    }

    fn cuMemAllocAsync(address: *mut sys::CUdeviceptr, bytes: usize, stream: sys::CUstream) {
        let mut state = current()?;
        state.check_not_captured(stream_of(stream))?;
        unsafe { put(address, state.memory.allocate(bytes)?) }
    }

    fn cuMemFreeAsync(address: sys::CUdeviceptr, stream: sys::CUstream) {
        // What another stream still holds of it is the caller's mistake; that it is freed at once would only hide it.
        synchronize(stream_of(stream))?;
        current()?.memory.free(address)
    }

    fn cuMemGetAddressRange_v2(base: *mut sys::CUdeviceptr, bytes: *mut usize, address: sys::CUdeviceptr) {
        let (found, whole) = current()?.memory.find(address).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        unsafe {
            put(base, found)?;
            put(bytes, whole)
        }
    }

    fn cuPointerGetAttribute(data: *mut c_void, attribute: sys::CUpointer_attribute, address: sys::CUdeviceptr) {
        use sys::CUpointer_attribute::*;
        let (base, bytes) = current()?.memory.find(address).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        unsafe {
            match attribute {
                CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL => put(data.cast::<c_int>(), 0),
                CU_POINTER_ATTRIBUTE_CONTEXT => put(data.cast(), CONTEXT),
                CU_POINTER_ATTRIBUTE_MEMORY_TYPE => put(data.cast(), sys::CUmemorytype::CU_MEMORYTYPE_DEVICE),
                CU_POINTER_ATTRIBUTE_DEVICE_POINTER => put(data.cast(), address),
                CU_POINTER_ATTRIBUTE_RANGE_START_ADDR => put(data.cast(), base),
                CU_POINTER_ATTRIBUTE_RANGE_SIZE => put(data.cast(), bytes),
                _ => stop(&format!("{attribute:?}: not in lib.rs")),
            }
        }
    }

    fn cuMemsetD8Async(at: sys::CUdeviceptr, value: u8, count: usize, stream: sys::CUstream) {
        fill(at, value.into(), 1, count, stream)
    }

    fn cuMemsetD32Async(at: sys::CUdeviceptr, value: c_uint, count: usize, stream: sys::CUstream) {
        fill(at, value, 4, count, stream)
    }

    fn cuMemcpyDtoDAsync_v2(to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream) {
        let mut state = current()?;
        state.memory.check(to, bytes)?;
        state.memory.check(from, bytes)?;
        state.push(stream_of(stream), Work::Copy { from, to, bytes })
    }

    fn cuMemcpyHtoDAsync_v2(to: sys::CUdeviceptr, from: *const c_void, bytes: usize, stream: sys::CUstream) {
        let mut state = current()?;
        state.memory.check(to, bytes)?;
        let stream = stream_of(stream);
        if state.stream(stream)?.capture.is_some() {
            return state.push(stream, Work::Copy { from: from as u64, to, bytes });
        }
        let from = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) };
        state.push(stream, Work::Upload { from: from.into(), to })
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream) {
        let mut state = current()?;
        state.memory.check(from, bytes)?;
        let stream = stream_of(stream);
        state.push(stream, Work::Copy { from, to: to as u64, bytes })?;
        if state.stream(stream)?.capture.is_some() {
            return Ok(());
        }
        drop(state);
        // Memory that is not page-locked: the driver returns when it is written.
        synchronize(stream)
    }

    fn cuMemcpyDtoD_v2(to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize) {
        current()?.check_no_capture_here()?;
        pass(unsafe { cuMemcpyDtoDAsync_v2(to, from, bytes, std::ptr::null_mut()) })
    }

    fn cuMemcpyHtoD_v2(to: sys::CUdeviceptr, from: *const c_void, bytes: usize) {
        current()?.check_no_capture_here()?;
        pass(unsafe { cuMemcpyHtoDAsync_v2(to, from, bytes, std::ptr::null_mut()) })?;
        synchronize(0)
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: sys::CUdeviceptr, bytes: usize) {
        current()?.check_no_capture_here()?;
        pass(unsafe { cuMemcpyDtoHAsync_v2(to, from, bytes, std::ptr::null_mut()) })
    }

    fn cuMemsetD8_v2(at: sys::CUdeviceptr, value: u8, count: usize) {
        current()?.check_no_capture_here()?;
        fill(at, value.into(), 1, count, std::ptr::null_mut())
    }

    fn cuStreamCreate(stream: *mut sys::CUstream, flags: c_uint) {
        let mut state = current()?;
        let handle = state.handle();
        let blocking = flags & sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint == 0;
        state.streams.insert(handle, Stream { blocking, ..Stream::default() });
        unsafe { put(stream, handle as sys::CUstream) }
    }

    fn cuStreamDestroy_v2(stream: sys::CUstream) {
        let handle = stream_of(stream);
        if handle == 0 {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        synchronize(handle)?;
        current()?.streams.remove(&handle);
        Ok(())
    }

    fn cuStreamSynchronize(stream: sys::CUstream) { synchronize(stream_of(stream)) }

    fn cuStreamQuery(stream: sys::CUstream) {
        // Asking sets it going; here that is done at once.
        synchronize(stream_of(stream))
    }

    fn cuStreamGetCtx(stream: sys::CUstream, context: *mut sys::CUcontext) {
        current()?.stream(stream_of(stream))?;
        unsafe { put(context, CONTEXT) }
    }

    fn cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, _flags: c_uint) {
        let mut state = current()?;
        let handle = stream_of(stream);
        let recorded = state.event(event as usize)?.recorded.clone();
        let capture = state.stream(handle)?.capture.clone();
        match (recorded, capture) {
            (Recorded::Never, _) => Ok(()),
            (Recorded::Stream(_), Some(_)) => Err(CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
            (Recorded::Stream(node), None) => {
                if !node.is_done() {
                    state.append(handle, Work::Mark, Some(node));
                }
                Ok(())
            }
            (Recorded::Captured(capture, after), held) => {
                if !state.captures.contains_key(&capture) {
                    return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
                }
                let mut all = match held {
                    Some((own, _)) if own != capture => return Err(CUDA_ERROR_STREAM_CAPTURE_MERGE),
                    Some((_, own)) => own,
                    None => Vec::new(),
                };
                all.extend(after);
                state.stream(handle)?.capture = Some((capture, all));
                Ok(())
            }
        }
    }

    fn cuEventCreate(event: *mut sys::CUevent, flags: c_uint) {
        let mut state = current()?;
        let handle = state.handle();
        let timing = flags & sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint == 0;
        state.events.insert(handle, Event { recorded: Recorded::Never, timing });
        unsafe { put(event, handle as sys::CUevent) }
    }

    fn cuEventDestroy_v2(event: sys::CUevent) {
        current()?.events.remove(&(event as usize)).map(drop).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuEventRecord(event: sys::CUevent, stream: sys::CUstream) {
        let mut state = current()?;
        let handle = stream_of(stream);
        state.event(event as usize)?;
        let recorded = match state.stream(handle)?.capture.clone() {
            Some((capture, after)) => Recorded::Captured(capture, after),
            None => Recorded::Stream(state.append(handle, Work::Mark, None)),
        };
        state.event(event as usize)?.recorded = recorded;
        Ok(())
    }

    fn cuEventSynchronize(event: sys::CUevent) {
        let recorded = current()?.event(event as usize)?.recorded.clone();
        match recorded {
            Recorded::Never => Ok(()),
            Recorded::Stream(node) => finish(&node),
            Recorded::Captured(..) => Err(CUDA_ERROR_CAPTURED_EVENT),
        }
    }

    fn cuEventQuery(event: sys::CUevent) { pass(unsafe { cuEventSynchronize(event) }) }

    fn cuModuleLoadData(module: *mut sys::CUmodule, image: *const c_void) {
        let mut state = current()?;
        if image.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        if unsafe { image.cast::<u32>().read_unaligned() } != FATBIN {
            return Err(CUDA_ERROR_INVALID_IMAGE);
        }
        let handle = state.handle();
        state.modules.insert(handle, None);
        unsafe { put(module, handle as sys::CUmodule) }
    }

    fn cuModuleUnload(module: sys::CUmodule) {
        current()?.modules.remove(&(module as usize)).map(drop).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuModuleGetFunction(function: *mut sys::CUfunction, module: sys::CUmodule, name: *const c_char) {
        if !current()?.modules.contains_key(&(module as usize)) {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        if name.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let kernel = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        // The file may have to be compiled first, without the lock.
        let (file, params_bytes) = kernels::find(&kernel).ok_or(CUDA_ERROR_NOT_FOUND)?;
        if file.ends_with("_sm90") && card().capability != (9, 0) {
            return Err(CUDA_ERROR_NO_BINARY_FOR_GPU);
        }
        let mut state = current()?;
        // The first function says which file the module is; those of another file are not in it.
        if *state.modules.entry(module as usize).or_default().get_or_insert(file) != file {
            return Err(CUDA_ERROR_NOT_FOUND);
        }
        let handle = state.handle();
        state.functions.insert(handle, Function { kernel, params_bytes, shared_bytes: PLAIN_SHARED_BYTES });
        unsafe { put(function, handle as sys::CUfunction) }
    }

    fn cuFuncSetAttribute(function: sys::CUfunction, attribute: sys::CUfunction_attribute, value: c_int) {
        use sys::CUfunction_attribute::*;
        let mut state = current()?;
        let function = state.functions.get_mut(&(function as usize)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        match attribute {
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES => {
                if !(0..=card().block_shared_bytes()).contains(&value) {
                    return Err(CUDA_ERROR_INVALID_VALUE);
                }
                function.shared_bytes = value as u32;
            }
            // How the multiprocessor's memory is split, and clusters of more than 8 blocks: of no moment here.
            CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            | CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED => {}
            _ => stop(&format!("{attribute:?}: not in lib.rs")),
        }
        Ok(())
    }

    fn cuFuncGetAttribute(value: *mut c_int, attribute: sys::CUfunction_attribute, function: sys::CUfunction) {
        use sys::CUfunction_attribute::*;
        let state = current()?;
        let function = state.functions.get(&(function as usize)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        match attribute {
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES => unsafe { put(value, function.shared_bytes as c_int) },
            _ => stop(&format!("{attribute:?}: not in lib.rs")),
        }
    }

    fn cuLaunchKernel(
        function: sys::CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: sys::CUstream,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if !extra.is_null() {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        unsafe { launch(function, grid, block, shared_bytes, stream, params) }
    }

    fn cuLaunchKernelEx(
        config: *const sys::CUlaunchConfig,
        function: sys::CUfunction,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) {
        use sys::CUlaunchAttributeID::*;
        if config.is_null() || !extra.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let c = unsafe { &*config };
        for index in 0..c.numAttrs as usize {
            let attribute = unsafe { &*c.attrs.add(index) };
            match attribute.id {
                CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION => {
                    let cluster = unsafe { attribute.value.clusterDim };
                    let whole = cluster.x > 0 && cluster.y == 1 && cluster.z == 1 && c.gridDimX % cluster.x == 0;
                    if card().capability.0 < 9 || !whole || cluster.x > 16 {
                        return Err(CUDA_ERROR_INVALID_CLUSTER_SIZE);
                    }
                }
                // A launch comes after all before it in its stream: sooner is not promised.
                CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION | CU_LAUNCH_ATTRIBUTE_PRIORITY => {}
                other => stop(&format!("{other:?}: not in lib.rs")),
            }
        }
        let (grid, block) =
            ([c.gridDimX, c.gridDimY, c.gridDimZ], [c.blockDimX, c.blockDimY, c.blockDimZ]);
        unsafe { launch(function, grid, block, c.sharedMemBytes, c.hStream, params) }
    }

    fn cuStreamBeginCapture_v2(stream: sys::CUstream, _mode: sys::CUstreamCaptureMode) {
        let mut state = current()?;
        let origin = stream_of(stream);
        if origin == 0 {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        if state.stream(origin)?.capture.is_some() {
            return Err(CUDA_ERROR_ILLEGAL_STATE);
        }
        let handle = state.handle();
        let thread = std::thread::current().id();
        state.captures.insert(handle, Capture { origin, thread, templates: Vec::new() });
        state.stream(origin)?.capture = Some((handle, Vec::new()));
        Ok(())
    }

    fn cuStreamIsCapturing(stream: sys::CUstream, status: *mut sys::CUstreamCaptureStatus) {
        use sys::CUstreamCaptureStatus::*;
        let captured = current()?.stream(stream_of(stream))?.capture.is_some();
        let found = if captured { CU_STREAM_CAPTURE_STATUS_ACTIVE } else { CU_STREAM_CAPTURE_STATUS_NONE };
        unsafe { put(status, found) }
    }

    fn cuStreamEndCapture(stream: sys::CUstream, graph: *mut sys::CUgraph) {
        let mut state = current()?;
        let origin = stream_of(stream);
        let Some((handle, last)) = state.stream(origin)?.capture.clone() else {
            return Err(CUDA_ERROR_ILLEGAL_STATE);
        };
        if state.captures.get(&handle).is_none_or(|capture| capture.origin != origin) {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        }
        for stream in state.streams.values_mut() {
            if stream.capture.as_ref().is_some_and(|(of, _)| *of == handle) {
                stream.capture = None;
            }
        }
        let Some(capture) = state.captures.remove(&handle) else { return Err(CUDA_ERROR_ILLEGAL_STATE) };
        if capture.thread != std::thread::current().id() {
            return Err(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        // All work of the other streams must have come back to this one.
        let mut joined = vec![false; capture.templates.len()];
        let mut stack = last;
        while let Some(at) = stack.pop() {
            if !std::mem::replace(&mut joined[at], true) {
                stack.extend(&capture.templates[at].after);
            }
        }
        if joined.contains(&false) {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        }
        let handle = state.handle();
        state.graphs.insert(handle, capture.templates.into());
        unsafe { put(graph, handle as sys::CUgraph) }
    }

    fn cuGraphInstantiateWithFlags(executable: *mut sys::CUgraphExec, graph: sys::CUgraph, _flags: c_ulonglong) {
        let mut state = current()?;
        let templates = state.graphs.get(&(graph as usize)).cloned().ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let handle = state.handle();
        state.executables.insert(handle, Executable { templates, last: None });
        unsafe { put(executable, handle as sys::CUgraphExec) }
    }

    fn cuGraphLaunch(executable: sys::CUgraphExec, stream: sys::CUstream) {
        let mut state = current()?;
        let stream = stream_of(stream);
        state.stream(stream)?;
        let held = state.executables.get(&(executable as usize)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let (templates, last) = (held.templates.clone(), held.last.clone());
        if state.stream(stream)?.capture.is_some() {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        // One launch of an executable graph comes after the other, in whatever streams.
        let node = state.append(stream, Work::Graph(templates), last);
        if let Some(held) = state.executables.get_mut(&(executable as usize)) {
            held.last = Some(node);
        }
        Ok(())
    }

    fn cuGraphExecDestroy(executable: sys::CUgraphExec) {
        let removed = current()?.executables.remove(&(executable as usize));
        removed.map(drop).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuGraphDestroy(graph: sys::CUgraph) {
        current()?.graphs.remove(&(graph as usize)).map(drop).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuGetErrorName(error: CUresult, name: *mut *const c_char) { unsafe { put(name, name_of(error)) } }

    fn cuGetErrorString(error: CUresult, text: *mut *const c_char) { unsafe { put(text, name_of(error)) } }
}

/// As CUDA 12 has it and as CUDA 13 has it: cudarc knows one of the two.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: sys::CUevent, end: sys::CUevent) -> CUresult {
    let call = || {
        let mut state = current()?;
        for event in [start, end] {
            let event = state.event(event as usize)?;
            match &event.recorded {
                Recorded::Stream(node) if event.timing => {
                    if !node.is_done() {
                        return Err(CUDA_ERROR_NOT_READY);
                    }
                }
                _ => return Err(CUDA_ERROR_INVALID_HANDLE),
            }
        }
        // No time passes on this card.
        // SAFETY: the caller's.
        unsafe { put(ms, 0.0) }
    };
    code(call())
}

/// # Safety
/// As [`cuEventElapsedTime`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, start: sys::CUevent, end: sys::CUevent) -> CUresult {
    // SAFETY: the caller's.
    unsafe { cuEventElapsedTime(ms, start, end) }
}

fn pass(code: CUresult) -> Outcome {
    if code == CUDA_SUCCESS { Ok(()) } else { Err(code) }
}

fn device_of(device: sys::CUdevice) -> Outcome {
    state()?;
    if device == 0 { Ok(()) } else { Err(CUDA_ERROR_INVALID_DEVICE) }
}

fn synchronize(stream: usize) -> Outcome {
    let mut state = current()?;
    state.check_not_captured(stream)?;
    let last = state.stream(stream)?.last.clone();
    drop(state);
    last.as_ref().map_or(Ok(()), finish)
}

fn fill(at: sys::CUdeviceptr, value: u32, width: usize, count: usize, stream: sys::CUstream) -> Outcome {
    let mut state = current()?;
    let bytes = count.checked_mul(width).ok_or(CUDA_ERROR_INVALID_VALUE)?;
    state.memory.check(at, bytes)?;
    if !at.is_multiple_of(width as u64) {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    state.push(stream_of(stream), Work::Fill { at, value, width, count })
}

/// # Safety
/// `params` holds the address of the struct that the kernel takes.
unsafe fn launch(
    function: sys::CUfunction,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: sys::CUstream,
    params: *mut *mut c_void,
) -> Outcome {
    let mut state = current()?;
    let function = state.functions.get(&(function as usize)).cloned().ok_or(CUDA_ERROR_INVALID_HANDLE)?;
    state.stream(stream_of(stream))?;
    let threads = block.iter().try_fold(1u32, |threads, &extent| threads.checked_mul(extent));
    let limits = [i32::MAX as u32, 65_535, 65_535];
    if grid.iter().zip(limits).any(|(&blocks, most)| blocks == 0 || blocks > most)
        || threads.is_none_or(|threads| threads == 0 || threads > 1024)
        || shared_bytes > function.shared_bytes
        || params.is_null()
    {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    if grid[1..] != [1, 1] || block[1..] != [1, 1] {
        stop(&format!("{}: a grid or block of more than one dimension is not emulated", function.kernel));
    }
    // SAFETY: the caller's; the struct is as long as the kernel's own.
    let copied: Arc<[u64]> = unsafe {
        let mut words = vec![0u64; function.params_bytes.div_ceil(8)];
        (*params).cast::<u8>().copy_to(words.as_mut_ptr().cast(), function.params_bytes);
        words.into()
    };
    let launch = Launch {
        kernel: function.kernel,
        grid: grid[0] as usize,
        threads: block[0] as usize,
        shared_bytes: shared_bytes as usize,
        params: copied,
    };
    state.push(stream_of(stream), Work::Launch(launch))
}

/// The name of an error, for as long as the process lives.
fn name_of(error: CUresult) -> *const c_char {
    static NAMES: Mutex<Option<HashMap<u32, CString>>> = Mutex::new(None);
    let mut names = NAMES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let name = || CString::new(format!("{error:?}")).unwrap_or_default();
    names.get_or_insert_default().entry(error as u32).or_insert_with(name).as_ptr()
}
