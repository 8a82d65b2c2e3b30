//! A stream with a second one beside it, and clocks.

use super::driver::{self, call};
use super::engine::Engine;
use super::module::Device;
use super::plan::MOST_WINDOWS;
use crate::engine::Stage;
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUstream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An event of the driver.
#[derive(Debug)]
pub(super) struct Event {
    device: Arc<Device>,
    event: CUevent,
}

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// `timing`: the event tells when it came to pass.
    pub(super) fn new(device: &Arc<Device>, timing: bool) -> Result<Event> {
        device.bind()?;
        let flags = if timing {
            sys::CUevent_flags::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
        };
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle; the context is bound.
        unsafe { call!(cuEventCreate(&mut event, flags as u32)) }?;
        Ok(Event { device: device.clone(), event })
    }

    pub(super) fn record(&self, stream: CUstream) -> Result<()> {
        // SAFETY: event and stream are of the bound context.
        unsafe { call!(cuEventRecord(self.event, stream)) }
    }

    /// Has `stream` wait for it.
    fn hold(&self, stream: CUstream) -> Result<()> {
        // SAFETY: event and stream are of the bound context.
        unsafe { call!(cuStreamWaitEvent(stream, self.event, 0)) }
    }

    pub(super) fn ms_since(&self, earlier: &Event) -> Result<f64> {
        // SAFETY: both events are live and keep time.
        unsafe {
            call!(cuEventSynchronize(self.event))?;
            cudarc::driver::result::event::elapsed(earlier.event, self.event)
                .map(f64::from)
                .map_err(|error| super::module::wrapped("cuEventElapsedTime", error))
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created above, destroyed once; the driver frees it when it has come to pass.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

/// A stream of our own.
#[derive(Debug)]
pub(super) struct OwnStream {
    device: Arc<Device>,
    stream: CUstream,
}

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for OwnStream {}
// SAFETY: as above.
unsafe impl Sync for OwnStream {}

impl OwnStream {
    pub(super) fn new(device: &Arc<Device>) -> Result<OwnStream> {
        device.bind()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle; the context is bound.
        unsafe { call!(cuStreamCreate(&mut stream, flags)) }?;
        Ok(OwnStream { device: device.clone(), stream })
    }

    pub(super) fn raw(&self) -> CUstream {
        self.stream
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created above, destroyed once; the driver finishes what it holds first.
            unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
    }
}

/// A second stream that runs beside a main one between a fork and a join, in a captured graph too.
#[derive(Debug)]
pub(super) struct SideStream {
    stream: OwnStream,
    forked: Event,
    joined: Event,
}

impl SideStream {
    pub(super) fn new(device: &Arc<Device>) -> Result<SideStream> {
        Ok(SideStream {
            stream: OwnStream::new(device)?,
            forked: Event::new(device, false)?,
            joined: Event::new(device, false)?,
        })
    }

    /// What is launched here from now on comes after all that `main` holds so far.
    pub(super) fn fork(&self, main: CUstream) -> Result<CUstream> {
        self.forked.record(main)?;
        self.forked.hold(self.stream.raw())?;
        Ok(self.stream.raw())
    }

    /// What is launched on `main` from now on comes after all that was launched here.
    pub(super) fn join(&self, main: CUstream) -> Result<()> {
        self.joined.record(self.stream.raw())?;
        self.joined.hold(main)
    }
}

/// When the stages of one call began and ended on the GPU.
#[derive(Debug)]
pub struct Timeline {
    /// Begin and end of every stage, in the order of [`Stage::ALL`], a window after the other.
    marks: [Vec<[Event; 2]>; 4],
    /// Bit 4 w + s: stage s of window w has been timed.
    timed: AtomicU64,
}

impl Timeline {
    pub(super) fn new(device: &Arc<Device>) -> Result<Timeline> {
        let event = || Event::new(device, true);
        let pair = || Ok([event()?, event()?]);
        let stage = || (0..MOST_WINDOWS).map(|_| pair()).collect::<Result<_>>();
        Ok(Timeline { marks: [stage()?, stage()?, stage()?, stage()?], timed: AtomicU64::new(0) })
    }

    /// Forgets the last call.
    pub(super) fn begin(&self) {
        self.timed.store(0, Ordering::Relaxed);
    }

    /// Times what `launch` puts on the stream as `stage` of a window.
    pub(super) fn time(
        &self,
        stage: Stage,
        window: usize,
        stream: CUstream,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some([begin, end]) = self.marks[stage as usize].get(window) else { return launch() };
        begin.record(stream)?;
        launch()?;
        end.record(stream)?;
        self.timed.fetch_or(1 << (4 * window + stage as usize), Ordering::Relaxed);
        Ok(())
    }

    /// Waits for the call and returns the milliseconds of every stage, in the order of [`Stage::ALL`].
    ///
    /// # Errors
    /// Where the call failed on the GPU, or there was none.
    pub fn stage_ms(&self) -> Result<[f64; 4]> {
        let mut ms = [0.0; 4];
        let timed = self.timed.load(Ordering::Relaxed);
        for (stage, (ms, windows)) in ms.iter_mut().zip(&self.marks).enumerate() {
            for (window, [begin, end]) in windows.iter().enumerate() {
                if timed >> (4 * window + stage) & 1 == 1 {
                    *ms += end.ms_since(begin)?;
                }
            }
        }
        Ok(ms)
    }
}

/// Two moments of an engine's stream, on the GPU's own clock.
#[derive(Debug)]
pub struct Clock {
    started: Event,
    stopped: Event,
}

impl Clock {
    pub(super) fn new(device: &Arc<Device>) -> Result<Clock> {
        Ok(Clock { started: Event::new(device, true)?, stopped: Event::new(device, true)? })
    }

    /// Starts when all that the engine's stream holds so far is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn start(&self, engine: &Engine) -> Result<()> {
        self.started.record(engine.raw_stream())
    }

    /// Stops when all that the engine's stream holds so far is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stop(&self, engine: &Engine) -> Result<()> {
        self.stopped.record(engine.raw_stream())
    }

    /// Waits until it has stopped; milliseconds from start to stop.
    ///
    /// # Errors
    /// Where it was not started and stopped, or what ran between failed.
    pub fn ms(&self) -> Result<f64> {
        self.stopped.ms_since(&self.started)
    }
}

/// Waits for all that a stream holds.
pub(super) fn synchronize(stream: CUstream) -> Result<()> {
    // SAFETY: the stream is one of the bound context.
    driver::check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
}
