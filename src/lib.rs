//! Dynamic Linear Attention (arXiv 2606.10650): linear attention whose memory is up to M states instead of
//! one.
//!
//! A token whose content drifts from the open state by `tau` or more opens a new state; when M are
//! held, the adjacent pair that carries least information merges; a read weighs every state. The
//! mathematics, and every name used here, is in `docs/OPERATOR.md`.
//!
//! # The pipeline
//!
//! 1. **segment**: k, v and g give every token's drift, its boundary and the merge it forces: the
//!    [event log](events), one byte per token and value head. Everything downstream replays it.
//! 2. **prepare**: what a chunk of tokens needs that knows nothing of slots.
//! 3. **route**: read weights from content, where reads are [routed](Read::Routed).
//! 4. **scan**: reads all slots; transitions, merges and appends them.
//!
//! and **step**, all of it for one token per sequence, in place: on a [`Cache`], or on the [`Entries`] of a server's
//! cache, of which every call names those that its rows use.
//!
//! # The API
//!
//! [`Inputs`] borrow tensors in f32, bf16 or f16; with [`Options`] they are validated once into a
//! [`Problem`], which every [`Engine`] trusts: [`reference::Engine`], the definition in f64, and
//! [`cpu::Engine`], the chunkwise form, and [`cuda::Engine`], on a GPU. Layouts are those of flash-linear-attention: q, k
//! `[B,T,H,dk]`, v and o `[B,T,HV,dv]`, g and beta `[B,T,HV]`, lambda `[B,T,HV,M]`, with HV a multiple
//! of H.
#![warn(missing_docs)]

mod cache;
#[cfg(feature = "check")]
pub mod check;
pub mod cpu;
pub mod cuda;
mod engine;
mod entries;
mod error;
pub mod events;
pub mod interop;
mod options;
mod problem;
pub mod reference;
mod tensor;

pub use cache::{Cache, CacheDims, CacheGradients, CacheMut};
pub use engine::{Engine, Forward, Gradients, RouteGradients, SoftGradients, Stage, StageTimes, Step};
pub use entries::{Entries, EntrySpec, MOST_STEP_TOKENS, StateDtype};
pub use error::{Error, Result};
pub use options::{L2NORM_EPS, MAX_CAPACITY, Merge, Options, Read, Recurrence, SlotOrder, Soft, Tau};
pub use problem::{Inputs, OutputGradients, Problem, Route, Sequence, Shape};
pub use tensor::{Buffer, Data, Dtype, Tensor};

/// The README's code, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
