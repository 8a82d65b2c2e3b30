//! `--device`: which engine computes.

use anyhow::bail;
use dla::Engine;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Device {
    /// The best of this machine: the CPU, until there is a CUDA engine.
    #[default]
    Auto,
    /// The chunkwise engine on the CPU.
    Cpu,
    /// The definition, token by token in f64: exact and slow.
    Reference,
    /// An NVIDIA GPU.
    Cuda,
}

impl Device {
    /// The engine.
    pub fn engine(self) -> anyhow::Result<Box<dyn Engine>> {
        Ok(match self {
            Device::Auto | Device::Cpu => Box::new(dla::cpu::Engine),
            Device::Reference => Box::new(dla::reference::Engine),
            Device::Cuda => bail!(match dla::cuda::available() {
                Err(error) => error.to_string(),
                Ok(()) => "device: this command line does not drive the GPU yet".to_owned(),
            }),
        })
    }
}
