//! The kernels that this build holds, as build.rs left them.

/// The kernels of one stage, compiled.
#[derive(Debug, Clone, Copy)]
pub struct Fatbin {
    /// Stage, as its file is named.
    pub stage: &'static str,
    /// Hash of the sources that it was compiled from.
    pub source_hash: u64,
    /// Architectures that it holds SASS for; PTX of compute_80 besides.
    pub archs: &'static str,
    /// The fatbin itself.
    pub image: &'static [u8],
}

/// All stages, or none where the build found no nvcc.
pub const FATBINS: &[Fatbin] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
