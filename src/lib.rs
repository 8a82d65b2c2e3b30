//! Dynamic Linear Attention (arXiv 2606.10650): linear attention whose memory is up to M states.
#![warn(missing_docs)]

mod cache;
#[cfg(feature = "check")]
pub mod check;
pub mod cpu;
mod engine;
mod error;
pub mod events;
mod options;
mod problem;
pub mod reference;
mod tensor;

pub use cache::{Cache, CacheDims, CacheGradients};
pub use engine::{Engine, Forward, Gradients, RouteGradients, SoftGradients, Stage, StageTimes, Step};
pub use error::{Error, Result};
pub use options::{L2NORM_EPS, MAX_CAPACITY, Merge, Options, Read, Recurrence, SlotOrder, Soft, Tau};
pub use problem::{Inputs, OutputGradients, Problem, Route, Sequence, Shape};
pub use tensor::{Buffer, Data, Dtype, Tensor};
