//! The kernels: those of kernels/, compiled for this machine.

use crate::library::{self, Emulate};
use crate::work::Launch;
use cudarc::driver::sys::CUresult;
use std::cell::RefCell;
use std::sync::OnceLock;

thread_local! {
    /// What runs here, for the signal handler.
    static RUNNING: RefCell<String> = const { RefCell::new(String::new()) };
}

fn emulator() -> Emulate {
    static EMULATOR: OnceLock<Emulate> = OnceLock::new();
    *EMULATOR.get_or_init(|| {
        crate::faults::explain();
        library::emulator().unwrap_or_else(|| crate::stop("no C++ compiler"))
    })
}

/// The file that holds a kernel and the bytes of its parameters; `None` where there is no such kernel.
pub fn find(kernel: &str) -> Option<(&'static str, usize)> {
    let bytes = emulator().params_bytes(kernel)?;
    Some((library::file_of(kernel), bytes))
}

/// The kernel that runs on this thread.
pub fn running() -> String {
    RUNNING
        .try_with(|running| running.try_borrow().map(|name| name.clone()).unwrap_or_default())
        .unwrap_or_default()
}

pub fn run(launch: &Launch) -> Result<(), CUresult> {
    let Launch { kernel, grid, threads, shared_bytes, params } = launch;
    RUNNING.with(|running| kernel.clone_into(&mut running.borrow_mut()));
    // SAFETY: the parameters are as long as this kernel's; what they point to is the caller's to answer for, as on a card.
    let wrong = unsafe { emulator().run(kernel, *grid, *threads, *shared_bytes, params.as_ptr().cast()) };
    RUNNING.with(|running| running.borrow_mut().clear());
    match wrong {
        None => Ok(()),
        Some(wrong) => {
            eprintln!("emulated card: {wrong}");
            Err(CUresult::CUDA_ERROR_LAUNCH_FAILED)
        }
    }
}
