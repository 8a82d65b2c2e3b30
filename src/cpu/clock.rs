//! Time per stage, summed over threads.

use crate::engine::{Stage, StageTimes};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Collects the time of every stage of one call.
pub(crate) struct Clock {
    start: Instant,
    nanos: [AtomicU64; 4],
}

impl Clock {
    pub(crate) fn start() -> Self {
        Clock { start: Instant::now(), nanos: Default::default() }
    }

    /// Runs `work` on the account of `stage`.
    pub(crate) fn time<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.nanos[stage as usize].fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    pub(crate) fn times(&self) -> StageTimes {
        StageTimes {
            wall_ms: self.start.elapsed().as_secs_f64() * 1e3,
            stage_ms: self.nanos.each_ref().map(|nanos| nanos.load(Ordering::Relaxed) as f64 / 1e6),
        }
    }
}
