//! The GPU: kernels as this build compiled them. No engine launches them yet: they are checked on the CPU,
//! by `tests/kernels_on_cpu.rs`, and have not run on a card.

#[doc(hidden)]
pub mod abi;
mod module;

pub use module::{FATBINS, Fatbin};

use crate::error::{Error, Result};

/// Whether the operator can run on a GPU.
///
/// # Errors
/// Says why it cannot: so far always, for no engine launches the kernels yet.
pub fn available() -> Result<()> {
    let reason = if FATBINS.is_empty() {
        "this build has no GPU kernels (DLA_NVCC=pip compiles them) and no engine that launches them yet: use the cpu engine"
    } else {
        "this build has GPU kernels but no engine that launches them yet: use the cpu engine"
    };
    Err(Error::Device(reason.to_owned()))
}
