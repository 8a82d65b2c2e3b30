//! The emulated driver (tests/emulation/driver) refuses what a driver refuses, and shows what a card may hide. Runs under
//! `scripts/emulated`; elsewhere it skips, with a line that says so.

use dla::cuda::Engine;
use dla::cuda::cudarc::driver::sys::{self, CUresult};
use std::ffi::{CString, c_void};
use std::sync::OnceLock;
use sys::CUresult::*;

fn engine() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| {
        let engine = Engine::new(0).ok()?;
        engine.card().ok()?.starts_with("emulated").then_some(engine)
    });
    if engine.is_none() {
        println!("SKIPPED: no emulated driver: scripts/emulated runs a command with it");
    }
    let engine = engine.as_ref()?;
    engine.synchronize().unwrap();
    Some(engine)
}

/// A header without code.
const FATBIN: [u32; 4] = [0xba55_ed50, 0x0010_0001, 0, 0];

fn module() -> sys::CUmodule {
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is there.
    assert_eq!(unsafe { sys::cuModuleLoadData(&mut module, FATBIN.as_ptr().cast()) }, CUDA_SUCCESS);
    module
}

fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, CUresult> {
    let (name, mut function) = (CString::new(name).unwrap(), std::ptr::null_mut());
    // SAFETY: the module is loaded, the name ends with a zero.
    let code = unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
    if code == CUDA_SUCCESS { Ok(function) } else { Err(code) }
}

/// Launches a kernel that takes no parameters to speak of.
fn launch(
    function: sys::CUfunction,
    grid: u32,
    threads: u32,
    shared_bytes: u32,
    stream: sys::CUstream,
) -> CUresult {
    let mut nothing = [0u64; 64];
    let mut params = [nothing.as_mut_ptr().cast::<c_void>()];
    // SAFETY: the parameters are longer than any kernel's, and the kernel of these tests reads none.
    unsafe {
        sys::cuLaunchKernel(
            function,
            grid,
            1,
            1,
            threads,
            1,
            1,
            shared_bytes,
            stream,
            params.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    }
}

#[test]
fn what_a_driver_refuses() {
    let Some(engine) = engine() else { return };
    let stream = engine.raw_stream();
    let memory = engine.allocate(100).unwrap();
    let at = memory.address();
    let limit = engine
        .context()
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    let (limit, most) =
        (limit.unwrap(), sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
    let none = 8 as sys::CUstream;
    // SAFETY: refused, or of this test's own memory.
    unsafe {
        assert_eq!(sys::cuMemFree_v2(at + 4), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuMemsetD8Async(at, 0, 101, stream), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuMemsetD8Async(at, 0, 100, none), CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(sys::cuMemcpyDtoDAsync_v2(at, at + 60, 41, stream), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuStreamSynchronize(none), CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(
            sys::cuModuleLoadData(&mut std::ptr::null_mut(), [0u32; 4].as_ptr().cast()),
            CUDA_ERROR_INVALID_IMAGE
        );
        let slots = function(module(), "slots").unwrap();
        assert_eq!(sys::cuFuncSetAttribute(slots, most, limit + 1), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(launch(slots, 1, 32, (48 << 10) + 1, stream), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuFuncSetAttribute(slots, most, limit), CUDA_SUCCESS);
    }
    let module = module();
    assert_eq!(function(module, "nothing_f32"), Err(CUDA_ERROR_NOT_FOUND));
    let slots = function(module, "slots").unwrap();
    // Of another file.
    assert_eq!(function(module, "group_sum_f32"), Err(CUDA_ERROR_NOT_FOUND));
    assert_eq!(launch(slots, 0, 32, 0, stream), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(slots, 1, 0, 0, stream), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(slots, 1, 2048, 0, stream), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(slots, 1, 32, 0, none), CUDA_ERROR_INVALID_HANDLE);
    assert_eq!(launch(std::ptr::null_mut(), 1, 32, 0, stream), CUDA_ERROR_INVALID_HANDLE);
    // A thread without a context.
    let code = std::thread::spawn(|| {
        // SAFETY: writes one address, or nothing.
        unsafe { sys::cuMemAlloc_v2(&mut 0, 16) }
    });
    assert_eq!(code.join().unwrap(), CUDA_ERROR_INVALID_CONTEXT);
    engine.synchronize().unwrap();
}

/// Two streams of one context, and an event.
struct Streams {
    streams: [sys::CUstream; 2],
    event: sys::CUevent,
}

impl Streams {
    fn new() -> Self {
        let (mut streams, mut event) = ([std::ptr::null_mut(); 2], std::ptr::null_mut());
        // SAFETY: writes handles.
        unsafe {
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            streams
                .iter_mut()
                .for_each(|stream| assert_eq!(sys::cuStreamCreate(stream, flags), CUDA_SUCCESS));
            assert_eq!(sys::cuEventCreate(&mut event, 0), CUDA_SUCCESS);
        }
        Streams { streams, event }
    }

    /// The second stream waits for the first.
    fn order(&self) {
        // SAFETY: live handles.
        unsafe {
            assert_eq!(sys::cuEventRecord(self.event, self.streams[0]), CUDA_SUCCESS);
            assert_eq!(sys::cuStreamWaitEvent(self.streams[1], self.event, 0), CUDA_SUCCESS);
        }
    }

    fn begin(&self) {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live handle.
        assert_eq!(unsafe { sys::cuStreamBeginCapture_v2(self.streams[0], mode) }, CUDA_SUCCESS);
    }

    fn end(&self) -> Result<sys::CUgraph, CUresult> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: a live handle, and room for one.
        let code = unsafe { sys::cuStreamEndCapture(self.streams[0], &mut graph) };
        if code == CUDA_SUCCESS { Ok(graph) } else { Err(code) }
    }
}

/// A stream that should have waited for another finds what was there before: every time, not now and then.
#[test]
fn an_order_that_was_forgotten_shows() {
    let Some(engine) = engine() else { return };
    let [a, b] = [(); 2].map(|()| engine.allocate(4).unwrap());
    let Streams { streams: [first, second], .. } = Streams::new();
    let in_order = Streams::new();
    let run = |streams: [sys::CUstream; 2], order: &dyn Fn()| {
        let mut read = [0u8; 4];
        // SAFETY: memory of this test's own, as long as is said.
        unsafe {
            assert_eq!(sys::cuMemsetD8Async(a.address(), 1, 4, streams[0]), CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(streams[0]), CUDA_SUCCESS);
            assert_eq!(sys::cuMemsetD8Async(a.address(), 2, 4, streams[0]), CUDA_SUCCESS);
            order();
            assert_eq!(sys::cuMemcpyDtoDAsync_v2(b.address(), a.address(), 4, streams[1]), CUDA_SUCCESS);
            let to = read.as_mut_ptr().cast();
            assert_eq!(sys::cuMemcpyDtoHAsync_v2(to, b.address(), 4, streams[1]), CUDA_SUCCESS);
        }
        read
    };
    assert_eq!(run([first, second], &|| {}), [1; 4]);
    assert_eq!(run(in_order.streams, &|| in_order.order()), [2; 4]);
}

#[test]
fn what_a_capture_refuses() {
    let Some(engine) = engine() else { return };
    let memory = engine.allocate(4).unwrap();
    let s = Streams::new();
    let fill = |stream, value| {
        // SAFETY: memory of this test's own.
        assert_eq!(unsafe { sys::cuMemsetD8Async(memory.address(), value, 4, stream) }, CUDA_SUCCESS);
    };
    assert_eq!(s.end(), Err(CUDA_ERROR_ILLEGAL_STATE));
    fill(s.streams[0], 9);
    s.begin();
    // SAFETY: live handles; refused.
    unsafe {
        assert_eq!(sys::cuStreamSynchronize(s.streams[0]), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(sys::cuMemAlloc_v2(&mut 0, 16), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    // The second stream goes its own way and does not come back.
    s.order();
    fill(s.streams[1], 5);
    assert_eq!(s.end(), Err(CUDA_ERROR_STREAM_CAPTURE_UNJOINED));

    // It comes back: nothing has run, and then all of it has, in order, each time.
    let back = Streams { streams: [s.streams[1], s.streams[0]], ..Streams::new() };
    s.begin();
    fill(s.streams[0], 6);
    s.order();
    fill(s.streams[1], 7);
    back.order();
    let graph = s.end().unwrap();
    let read = || {
        let mut bytes = [0u8; 4];
        // SAFETY: as long as is said.
        unsafe { assert_eq!(sys::cuStreamSynchronize(s.streams[0]), CUDA_SUCCESS) };
        engine.download(&memory, 0, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(read(), [9; 4]);
    let mut executable = std::ptr::null_mut();
    // SAFETY: live handles.
    unsafe { assert_eq!(sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0), CUDA_SUCCESS) };
    for _ in 0..2 {
        fill(s.streams[0], 1);
        // SAFETY: live handles.
        unsafe { assert_eq!(sys::cuGraphLaunch(executable, s.streams[0]), CUDA_SUCCESS) };
        assert_eq!(read(), [7; 4]);
    }
}

/// What ends the process, or spoils its context: each in a process of its own.
#[test]
fn what_goes_wrong_on_the_card_is_told() {
    if let Ok(what) = std::env::var("DLA_EMULATED_WRONG") {
        let engine = engine().unwrap();
        let stream = engine.raw_stream();
        match what.as_str() {
            // Within the 256 bytes that an allocation is aligned to.
            "written beyond an allocation" => {
                let memory = engine.allocate(100).unwrap();
                // SAFETY: the last bytes before the page out of bounds.
                unsafe { (memory.address() as *mut u8).add(101).write(0) };
                drop(memory);
            }
            "past the end of an allocation of 256 bytes" => {
                let memory = engine.allocate(256).unwrap();
                // SAFETY: none: it faults.
                unsafe { (memory.address() as *const u8).add(256).read_volatile() };
            }
            "trap" => {
                let kernel = function(module(), "wrong_launch").unwrap();
                assert_eq!(launch(kernel, 1, 256, 64, stream), CUDA_SUCCESS);
                let error = engine.synchronize().unwrap_err().to_string();
                assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{error}");
                assert!(engine.allocate(4).is_err(), "the context goes on");
            }
            other => panic!("{other}"),
        }
        return;
    }
    if engine().is_none() {
        return;
    }
    for what in ["written beyond an allocation", "past the end of an allocation of 256 bytes", "trap"] {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "what_goes_wrong_on_the_card_is_told", "--nocapture"])
            .env("DLA_EMULATED_WRONG", what)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("emulated card: ") && text.contains(what), "{what}: {text}");
        assert_eq!(output.status.success(), what == "trap", "{what}: {text}");
    }
}
