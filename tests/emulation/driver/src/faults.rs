//! A fault in a kernel says which, and where.

use crate::{kernels, work};
use std::ffi::{c_int, c_void};
use std::sync::Once;

/// Has a fault explained before the process ends by it.
pub fn explain() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a handler of the type that SA_SIGINFO asks for; zero is an empty mask.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut());
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    });
}

/// Not safe in the letter, since it allocates: the process ends here in any case.
extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the system's own record of the fault; the default action is put back and ends the process when the fault comes again.
    let address = unsafe {
        libc::signal(signal, libc::SIG_DFL);
        (*info).si_addr() as u64
    };
    let place = work::try_lock().map_or_else(String::new, |state| state.memory.describe(address));
    eprintln!("emulated card: fault at {address:#x}, {place}, while these ran: {:?}", kernels::running());
}
