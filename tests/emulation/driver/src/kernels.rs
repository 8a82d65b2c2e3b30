//! The kernels: those of kernels/, compiled for this machine.

use crate::library::{self, Emulate};
use crate::work::Launch;
use cudarc::driver::sys::CUresult;
use std::sync::{Mutex, OnceLock};

/// DLA_EMULATED_TRACE=1: every launch is told on stderr.
fn trace() -> bool {
    static TRACE: OnceLock<bool> = OnceLock::new();
    *TRACE.get_or_init(|| std::env::var_os("DLA_EMULATED_TRACE").is_some_and(|value| value == "1"))
}

/// What runs, for the signal handler.
static RUNNING: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn emulator() -> Emulate {
    static EMULATOR: OnceLock<Emulate> = OnceLock::new();
    *EMULATOR.get_or_init(|| library::emulator().unwrap_or_else(|| crate::stop("no C++ compiler")))
}

/// The file that holds a kernel and the bytes of its parameters; `None` where there is no such kernel.
pub fn find(kernel: &str) -> Option<(&'static str, usize)> {
    let bytes = emulator().params_bytes(kernel)?;
    Some((library::file_of(kernel), bytes))
}

/// The kernels that run now; for a signal handler.
pub fn running() -> Vec<String> {
    RUNNING.try_lock().map(|running| running.clone()).unwrap_or_default()
}

fn with_running(change: impl FnOnce(&mut Vec<String>)) {
    change(&mut RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
}

pub fn run(launch: &Launch) -> Result<(), CUresult> {
    let Launch { kernel, grid, threads, shared_bytes, params } = launch;
    if trace() {
        eprintln!("emulated card: {kernel}, {grid} x {threads}, {shared_bytes} bytes of shared memory");
    }
    with_running(|running| running.push(kernel.clone()));
    // SAFETY: the parameters are as long as this kernel's; what they point to is the caller's to answer for, as on a card.
    let wrong = unsafe { emulator().run(kernel, *grid, *threads, *shared_bytes, params.as_ptr().cast()) };
    with_running(|running| {
        if let Some(at) = running.iter().position(|name| name == kernel) {
            running.swap_remove(at);
        }
    });
    match wrong {
        None => Ok(()),
        Some(wrong) => {
            eprintln!("emulated card: {wrong}");
            Err(CUresult::CUDA_ERROR_LAUNCH_FAILED)
        }
    }
}
