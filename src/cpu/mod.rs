//! The chunkwise engine without a GPU (OPERATOR.md, section 4): f32 accumulation, rayon over sequences and
//! heads (and slices of value columns where those are few).
//!
//! A stage bears the name that it has everywhere: segment, prepare, route, scan, and step. Results do
//! not depend on the number of threads. A sequence and head that holds NaN or infinity runs through
//! the definition ([`reference`](crate::reference)) instead, token by token.

mod backward;
mod clock;
mod entries;
mod forward;
mod matrix;
mod prepare;
mod prepare_backward;
mod route;
mod row;
mod scan;
mod segment;
mod segment_backward;
mod step;

use crate::cache::{Cache, CacheMut};
use crate::engine::{Forward, Gradients, StageTimes, Step};
use crate::error::Result;
use crate::problem::{OutputGradients, Problem};
use clock::Clock;
pub use entries::Entries;

/// The operator on this machine's processors.
#[derive(Debug, Clone, Copy, Default)]
pub struct Engine;

impl Engine {
    /// [`forward`](crate::Engine::forward), and where its time went.
    ///
    /// # Errors
    /// As the forward.
    pub fn forward_timed(&self, problem: &Problem<'_>) -> Result<(Forward, StageTimes)> {
        problem.check_forward()?;
        let clock = Clock::start();
        let forward = forward::forward(problem, &clock);
        Ok((forward, clock.times()))
    }

    /// [`backward`](crate::Engine::backward), and where its time went.
    ///
    /// # Errors
    /// As the backward.
    pub fn backward_timed(
        &self,
        problem: &Problem<'_>,
        events: &[u8],
        upstream: &OutputGradients<'_>,
    ) -> Result<(Gradients, StageTimes)> {
        problem.check_backward(events, upstream)?;
        let clock = Clock::start();
        let gradients = backward::backward(problem, events, upstream, &clock);
        Ok((gradients, clock.times()))
    }

    /// [`step`](crate::Engine::step) on a cache whose arrays belong to someone else.
    ///
    /// # Errors
    /// As the step.
    pub fn step_in_place(&self, problem: &Problem<'_>, cache: CacheMut<'_>) -> Result<Step> {
        problem.check_step_from(cache.view())?;
        Ok(step::step(problem, cache))
    }
}

impl crate::engine::Engine for Engine {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        self.forward_timed(problem).map(|(forward, _)| forward)
    }

    fn backward(
        &self,
        problem: &Problem<'_>,
        events: &[u8],
        upstream: &OutputGradients<'_>,
    ) -> Result<Gradients> {
        self.backward_timed(problem, events, upstream).map(|(gradients, _)| gradients)
    }

    fn step(&self, problem: &Problem<'_>, cache: &mut Cache) -> Result<Step> {
        self.step_in_place(problem, cache.view_mut())
    }
}
