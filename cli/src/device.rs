//! `--device`: which engine computes.

use dla::{Cache, Engine, Error, Forward, Gradients, OutputGradients, Problem, Step};

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Device {
    /// A GPU where there is one, else the CPU.
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
            Device::Auto if dla::cuda::available().is_ok() => Box::new(Auto(dla::cuda::Engine::new(0)?)),
            Device::Auto | Device::Cpu => Box::new(dla::cpu::Engine),
            Device::Reference => Box::new(dla::reference::Engine),
            Device::Cuda => Box::new(dla::cuda::Engine::new(0)?),
        })
    }
}

/// The GPU, and the CPU for what the GPU's engine does not have.
struct Auto(dla::cuda::Engine);

impl Engine for Auto {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn forward(&self, problem: &Problem) -> dla::Result<Forward> {
        match self.0.forward(problem) {
            Err(Error::HeadSize { .. } | Error::Limit { .. } | Error::OutOfMemory { .. }) => {
                dla::cpu::Engine.forward(problem)
            }
            result => result,
        }
    }

    fn backward(
        &self,
        problem: &Problem,
        events: &[u8],
        upstream: &OutputGradients,
    ) -> dla::Result<Gradients> {
        match self.0.backward(problem, events, upstream) {
            Err(Error::HeadSize { .. } | Error::Limit { .. } | Error::OutOfMemory { .. }) => {
                dla::cpu::Engine.backward(problem, events, upstream)
            }
            result => result,
        }
    }

    fn step(&self, problem: &Problem, cache: &mut Cache) -> dla::Result<Step> {
        match self.0.step(problem, cache) {
            Err(Error::NotBuilt { .. }) => dla::cpu::Engine.step(problem, cache),
            result => result,
        }
    }
}
