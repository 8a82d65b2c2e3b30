//! Launches captured once and replayed.

use super::driver::call;
use super::engine::Engine;
use super::module::Device;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUgraph, CUgraphExec};
use std::sync::Arc;

/// What was launched on an engine's stream while it was captured, ready to be launched again as one.
#[derive(Debug)]
pub struct Graph {
    device: Arc<Device>,
    graph: CUgraph,
    executable: CUgraphExec,
}

// SAFETY: handles that the driver takes from any thread; a launch borrows the graph alone.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` launches on the engine's stream: nothing of it runs. `work` may neither wait nor allocate.
    ///
    /// # Errors
    /// That of `work`; what the driver says.
    pub fn capture(engine: &Engine, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        engine.bind()?;
        let stream = engine.raw_stream();
        let mut graph = Graph {
            device: engine.device().clone(),
            graph: std::ptr::null_mut(),
            executable: std::ptr::null_mut(),
        };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is the engine's, its context bound; the handles are written before they are used.
        unsafe {
            call!(cuStreamBeginCapture_v2(stream, mode))?;
            let worked = work();
            let ended = call!(cuStreamEndCapture(stream, &mut graph.graph));
            worked?;
            ended?;
            call!(cuGraphInstantiateWithFlags(&mut graph.executable, graph.graph, 0))?;
        }
        Ok(graph)
    }

    /// Launches it on the stream of an engine of the same GPU.
    ///
    /// # Errors
    /// [`Error::ForeignPointer`] where the engine is of another context; what the driver says.
    ///
    /// # Safety
    /// What the captured launches ask of their arrays holds now too.
    pub unsafe fn replay(&mut self, engine: &Engine) -> Result<()> {
        if !Arc::ptr_eq(&self.device, engine.device()) {
            let given = "a graph of another GPU or context".to_owned();
            return Err(Error::ForeignPointer { name: "graph", ordinal: engine.ordinal(), given });
        }
        engine.bind()?;
        // SAFETY: instantiated in this context; the arrays are the caller's to answer for.
        unsafe { call!(cuGraphLaunch(self.executable, engine.raw_stream())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        // SAFETY: made above, destroyed once; null where it did not come so far.
        unsafe {
            if !self.executable.is_null() {
                sys::cuGraphExecDestroy(self.executable);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
