//! The engine on an NVIDIA GPU: kernels compiled ahead, libcuda loaded when it is first needed. Forward, backward and
//! decoding.
//!
//! [`Engine`] is one GPU and one stream. [`Engine::launch`] takes addresses on the GPU ([`RawInputs`],
//! [`RawOutputs`]) and a [`Plan`], which chose the kernels and says how much workspace they need;
//! [`Engine::launch_backward`] the same of the backward, with a [`BackwardPlan`]; [`Engine::launch_replay`] is a backward
//! that has kept no more than the log, [`Engine::launch_step`] a step of chronological caches. [`Entries`] are the caches of
//! sequences that are being decoded.

#[doc(hidden)]
pub mod abi;
#[doc(hidden)]
pub mod backward;
mod checkpoints;
mod driver;
mod engine;
mod entries;
mod forward;
mod graph;
mod launch;
mod memory;
mod module;
mod plan;
mod raw;
mod replay;
mod step;
mod stream;
mod workspace;

pub use abi::DevicePointer;
pub use cudarc;
pub use engine::Engine;
pub use entries::{CacheStepPlan, Entries, PrefillPlan, Rows};
pub use graph::Graph;
pub use memory::Memory;
pub use module::{FATBINS, Fatbin, SOURCE_HASH};
pub use plan::{BackwardPlan, Call, Plan};
pub use raw::{RawCache, RawCacheGradients, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream};
pub use replay::ReplayPlan;
pub use step::StepPlan;
pub use stream::{Clock, Timeline};

use crate::error::{Error, Result};

/// Whether the operator can run on a GPU here: this build has kernels, there is a driver, and it shows a GPU.
///
/// # Errors
/// Says what is missing: [`Error::NoKernels`], [`Error::NoDriver`], [`Error::OldDriver`] or [`Error::NoDevice`].
pub fn available() -> Result<()> {
    if FATBINS.is_empty() {
        return Err(Error::NoKernels);
    }
    driver::init()?;
    match driver::device_count()? {
        0 => Err(Error::NoDevice { count: 0, given: 0 }),
        _ => Ok(()),
    }
}
