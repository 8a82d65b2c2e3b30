//! The operator on an NVIDIA GPU.

use super::abi::DevicePointer;
use super::backward::{BackwardCall, BackwardKernel};
use super::driver::call;
use super::entries::CacheStepPlan;
use super::forward::{self, Resident};
use super::launch::{Backwards, Stages, TimedBackwards};
use super::memory::Memory;
use super::module::{self, Device};
use super::plan::{BackwardPlan, Call, Plan};
use super::raw::{self, RawCache, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream};
use super::replay::ReplayPlan;
use super::stream::{self, Clock, OwnStream, SideStream, Timeline};
use crate::cache::Cache;
use crate::engine::{Forward, Gradients, Step};
use crate::error::{Error, Result};
use crate::problem::{OutputGradients, Problem};
use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaContext, CudaStream};
use std::sync::{Arc, Mutex, PoisonError};

/// One GPU and one stream of it. Engines of one GPU share its kernels, which are loaded when they are first
/// needed and kept until the process ends.
///
/// Two ways in: [`forward`](crate::Engine::forward) of the trait takes tensors of the host, copies them, and waits;
/// [`Engine::launch`] takes addresses on the GPU, allocates nothing and waits for nothing.
#[derive(Debug)]
pub struct Engine {
    device: Arc<Device>,
    stream: Main,
    /// Held while a call is being launched: two calls at once would mix up their forks and joins.
    side: Mutex<SideStream>,
}

/// The stream that an engine launches on.
#[derive(Debug)]
enum Main {
    Own(OwnStream),
    Shared(Arc<CudaStream>),
}

impl Engine {
    /// GPU `ordinal`, counted from 0, with a stream of its own, in the primary context: the one that other
    /// libraries of this process use too.
    ///
    /// # Errors
    /// [`Error::NoKernels`], [`Error::NoDriver`], [`Error::OldDriver`], [`Error::NoDevice`]; else what the driver says.
    pub fn new(ordinal: usize) -> Result<Self> {
        let device = Device::of_ordinal(ordinal)?;
        let stream = Main::Own(OwnStream::new(&device)?);
        Engine::with(device, stream)
    }

    /// The GPU and the context of another library's stream; what is launched takes its turn on it.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        super::available()?;
        Engine::with(Device::of(stream.context().clone())?, Main::Shared(stream))
    }

    /// As [`Engine::from_stream`], of a stream known by its handle (null: the default stream), in the primary context
    /// of GPU `ordinal`.
    ///
    /// # Errors
    /// As [`Engine::new`]; [`Error::ForeignPointer`] where the stream is of another context.
    ///
    /// # Safety
    /// `stream` is null or a stream that outlives the engine.
    pub unsafe fn from_raw_stream(ordinal: usize, stream: CUstream) -> Result<Self> {
        let device = Device::of_ordinal(ordinal)?;
        device.bind()?;
        if !stream.is_null() && raw::context_of(stream)? != device.context().cu_ctx() {
            let given = "a stream of another GPU or context".to_owned();
            return Err(Error::ForeignPointer { name: "stream", ordinal, given });
        }
        // SAFETY: of this context, as was just asked, and it outlives the engine, as the caller says.
        let stream = unsafe { device.context().wrap_borrowed_stream(stream) };
        Engine::with(device, Main::Shared(stream))
    }

    fn with(device: Arc<Device>, stream: Main) -> Result<Self> {
        let side = Mutex::new(SideStream::new(&device)?);
        Ok(Engine { device, stream, side })
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn bind(&self) -> Result<()> {
        self.device.bind()
    }

    /// The stream that this engine launches on.
    pub fn raw_stream(&self) -> CUstream {
        match &self.stream {
            Main::Own(stream) => stream.raw(),
            Main::Shared(stream) => stream.cu_stream(),
        }
    }

    /// The context, as cudarc holds it.
    pub fn context(&self) -> &Arc<CudaContext> {
        self.device.context()
    }

    /// Ordinal of the GPU.
    pub fn ordinal(&self) -> usize {
        self.device.ordinal()
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.device.capability()
    }

    /// Multiprocessors of the GPU.
    pub fn multiprocessors(&self) -> usize {
        self.device.multiprocessors().max(0) as usize
    }

    /// Name of the GPU, as its driver spells it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn card(&self) -> Result<String> {
        self.context().name().map_err(|error| module::wrapped("cuDeviceGetName", error))
    }

    /// Version of CUDA that the driver knows, as `major.minor`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn driver_version(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: writes one int.
        unsafe { call!(cuDriverGetVersion(&mut version)) }?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    /// Chooses a call's kernels, loads those that no call has needed before, and lays out the workspace.
    ///
    /// # Errors
    /// [`Error::HeadSize`], [`Error::Limit`] and [`Error::Option`] where the kernels cannot do the call;
    /// [`Error::Architecture`] where there are none for this GPU.
    pub fn plan(&self, call: &Call<'_>) -> Result<Plan> {
        self.device.bind()?;
        Plan::new(&self.device, call)
    }

    /// Launches a call on this engine's stream: allocates nothing, waits for nothing, and may be captured into a
    /// graph. With a `timeline` the stages run one after another and are timed; without, some run at once.
    ///
    /// `workspace` is an address and its bytes, [`Plan::workspace_bytes`] or more, whatever it holds; it must not be
    /// used until the stream has come past the call.
    ///
    /// # Errors
    /// Before anything is launched: an address that is null, misaligned or not of this GPU, a workspace that is too
    /// small, arguments other than the plan was made for. After: what the driver says.
    ///
    /// # Safety
    /// The plan is of this GPU. Every array has the extents that its field says and stays until the stream has come
    /// past the call; outputs overlap nothing else. On the GPU, unseen from here: `cu_seqlens` runs from 0 to T without
    /// descending; a caller's own log holds events that can happen; an initial cache holds at most M slots a row, and
    /// at least one token a slot.
    pub unsafe fn launch(
        &self,
        plan: &Plan,
        inputs: &RawInputs,
        outputs: &RawOutputs,
        workspace: (DevicePointer, usize),
        timeline: Option<&Timeline>,
    ) -> Result<()> {
        self.device.bind()?;
        raw::check(plan, self.ordinal(), inputs, outputs, workspace)?;
        let stages = Stages::new(plan, inputs, outputs, workspace.0);
        let side = self.side.lock().unwrap_or_else(PoisonError::into_inner);
        match timeline {
            None => forward::launched(&stages, self.raw_stream(), &side),
            Some(timeline) => forward::timed(&stages, self.raw_stream(), timeline),
        }
    }

    /// Chooses a backward's kernels and schedule, loads those that no call has needed before, and lays out the workspace.
    /// `call.final_cache` says whether the final cache has a gradient.
    ///
    /// # Errors
    /// As [`Engine::plan`].
    pub fn plan_backward(&self, call: &Call<'_>) -> Result<BackwardPlan> {
        self.device.bind()?;
        BackwardPlan::new(&self.device, call)
    }

    /// Launches a backward on this engine's stream: allocates nothing, waits for nothing, and may be captured into a
    /// graph. `inputs` are the forward's; of `inputs.events` it takes no notice, the log is `forward.events`. Two runs
    /// leave the same bits.
    ///
    /// `workspace` is an address and its bytes, [`BackwardPlan::workspace_bytes`] or more, whatever it holds; it must not
    /// be used until the stream has come past the call.
    ///
    /// # Errors
    /// As [`Engine::launch`].
    ///
    /// # Safety
    /// As [`Engine::launch`]; `forward` holds what a forward of the same inputs left.
    pub unsafe fn launch_backward(
        &self,
        plan: &BackwardPlan,
        inputs: &RawInputs,
        forward: &RawForward,
        upstream: &RawUpstream,
        gradients: &RawGradients,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        let call = self.backward_call(plan, inputs, forward, upstream, gradients, workspace)?;
        let mut launcher = Backwards { kernels: &plan.kernels, stream: self.raw_stream() };
        plan.backward.run(&call, &mut launcher)
    }

    /// Chooses a backward that computes again what of the forward was not kept. Of the addresses only whether they are 0 is
    /// read: of `forward.drift` and `forward.lambda`, what was not kept; of `gradients`, what is not wanted.
    /// `call.final_cache` says whether the final cache has a gradient.
    ///
    /// # Errors
    /// As [`Engine::plan`].
    pub fn plan_replay(
        &self,
        call: &Call<'_>,
        inputs: &RawInputs,
        forward: &RawForward,
        gradients: &RawGradients,
    ) -> Result<ReplayPlan> {
        self.device.bind()?;
        ReplayPlan::new(self, call, inputs, forward, gradients)
    }

    /// Launches a backward as [`Engine::launch_backward`] does, before it, where the plan says so, segment and route.
    /// What is 0 is what was so for the plan. The workspace is of [`ReplayPlan::workspace_bytes`] or more.
    ///
    /// # Errors
    /// As [`Engine::launch`].
    ///
    /// # Safety
    /// As [`Engine::launch_backward`].
    pub unsafe fn launch_replay(
        &self,
        plan: &ReplayPlan,
        inputs: &RawInputs,
        forward: &RawForward,
        upstream: &RawUpstream,
        gradients: &RawGradients,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        self.device.bind()?;
        // SAFETY: as the caller says.
        unsafe { plan.launch(self, inputs, forward, upstream, gradients, workspace) }
    }

    /// Chooses the kernels of a step of chronological caches, T = 1.
    ///
    /// # Errors
    /// As [`Engine::plan`]; [`Error::Shape`].
    pub fn plan_step(&self, call: &Call<'_>) -> Result<CacheStepPlan> {
        self.device.bind()?;
        CacheStepPlan::new(self, call)
    }

    /// Launches a step on this engine's stream, batch entry b going on from sequence b of `cache`, which is changed in
    /// place: allocates nothing, waits for nothing, and may be captured into a graph. It moves all states three times;
    /// [`Entries`](super::Entries) move none. Of `inputs` cu_seqlens and cache, of `outputs` cache are absent.
    ///
    /// # Errors
    /// As [`Engine::launch`].
    ///
    /// # Safety
    /// As [`Engine::launch`].
    pub unsafe fn launch_step(
        &self,
        plan: &CacheStepPlan,
        inputs: &RawInputs,
        outputs: &RawOutputs,
        cache: &RawCache,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        self.device.bind()?;
        plan.launch(self, inputs, outputs, cache, workspace)
    }

    /// Launches a backward as [`Engine::launch_backward`] does, waits for it, and returns how long every kernel took on the
    /// GPU: its name, launches, and milliseconds of all of them, in the order in which they were first launched.
    ///
    /// # Errors
    /// As [`Engine::launch`], and where the call fails on the GPU.
    ///
    /// # Safety
    /// As [`Engine::launch_backward`].
    pub unsafe fn time_backward(
        &self,
        plan: &BackwardPlan,
        inputs: &RawInputs,
        forward: &RawForward,
        upstream: &RawUpstream,
        gradients: &RawGradients,
        workspace: (DevicePointer, usize),
    ) -> Result<Vec<(String, usize, f64)>> {
        let call = self.backward_call(plan, inputs, forward, upstream, gradients, workspace)?;
        let launcher = Backwards { kernels: &plan.kernels, stream: self.raw_stream() };
        let mut launcher = TimedBackwards { launcher, device: &self.device, marks: Vec::new() };
        plan.backward.run(&call, &mut launcher)?;
        let mut times: Vec<(BackwardKernel, usize, f64)> = Vec::new();
        for (kernel, [begin, end]) in &launcher.marks {
            let ms = end.ms_since(begin)?;
            match times.iter_mut().find(|(name, _, _)| name == kernel) {
                Some((_, launches, sum)) => (*launches, *sum) = (*launches + 1, *sum + ms),
                None => times.push((*kernel, 1, ms)),
            }
        }
        let forms = plan.backward.kernels();
        let name = |kernel| forms.iter().find(|form| form.kernel == kernel).map(|form| form.name.clone());
        Ok(times
            .into_iter()
            .filter_map(|(kernel, launches, ms)| Some((name(kernel)?, launches, ms)))
            .collect())
    }

    /// Binds the context and checks the addresses of a backward.
    fn backward_call(
        &self,
        plan: &BackwardPlan,
        inputs: &RawInputs,
        forward: &RawForward,
        upstream: &RawUpstream,
        gradients: &RawGradients,
        workspace: (DevicePointer, usize),
    ) -> Result<BackwardCall> {
        self.device.bind()?;
        let call = BackwardCall {
            inputs: *inputs,
            forward: *forward,
            upstream: *upstream,
            gradients: *gradients,
            workspace: workspace.0,
        };
        raw::check_backward(plan, self.ordinal(), &call, workspace.1)?;
        Ok(call)
    }

    /// A clock for [`Engine::launch`].
    ///
    /// # Errors
    /// What the driver says.
    pub fn timeline(&self) -> Result<Timeline> {
        Timeline::new(&self.device)
    }

    /// A clock for anything else on this engine's stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn clock(&self) -> Result<Clock> {
        Clock::new(&self.device)
    }

    /// Copies all of `from` to the beginning of `to`, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Shape`] where `to` is shorter; else what the driver says.
    pub fn copy(&self, from: &Memory, to: &Memory) -> Result<()> {
        self.device.bind()?;
        from.copy(to, self.raw_stream())
    }

    /// Memory on this GPU.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::new(&self.device, bytes)
    }

    /// Fills memory with one byte, in the stream's order.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill(&self, memory: &Memory, byte: u8) -> Result<()> {
        self.device.bind()?;
        memory.fill(byte, self.raw_stream())
    }

    /// Copies bytes to the GPU, in the stream's order, and waits.
    ///
    /// # Errors
    /// [`Error::Shape`] where they reach past the memory's end; else what the driver says.
    pub fn upload(&self, memory: &Memory, offset: usize, from: &[u8]) -> Result<()> {
        self.device.bind()?;
        memory.upload(offset, from, self.raw_stream())?;
        stream::synchronize(self.raw_stream())
    }

    /// Copies bytes from the GPU, in the stream's order, and waits.
    ///
    /// # Errors
    /// [`Error::Shape`] where they reach past the memory's end; else what the driver says.
    pub fn download(&self, memory: &Memory, offset: usize, to: &mut [u8]) -> Result<()> {
        self.device.bind()?;
        memory.download(offset, to, self.raw_stream())
    }

    /// Waits for all that the stream holds.
    ///
    /// # Errors
    /// What the driver says: also of a call before that failed on the GPU.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        stream::synchronize(self.raw_stream())
    }
}

impl crate::engine::Engine for Engine {
    fn name(&self) -> &'static str {
        "cuda"
    }

    /// Copies the arguments to the GPU, computes there, and copies the results back. What [`Engine::plan`] says of
    /// head sizes and extents holds here too.
    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        problem.check_forward()?;
        let resident = Resident::new(self, problem)?;
        resident.launch(self)?;
        resident.results(self, problem)
    }

    /// Copies the arguments to the GPU, computes there, and copies the gradients back. Where the backward takes more of
    /// the forward than its log (routed reads, soft boundaries, a gradient of the final cache), segment and route run first.
    fn backward(
        &self,
        problem: &Problem<'_>,
        events: &[u8],
        upstream: &OutputGradients<'_>,
    ) -> Result<Gradients> {
        problem.check_backward(events, upstream)?;
        forward::backward(self, problem, events, upstream)
    }

    /// Copies the cache to the GPU and back: [`Entries`](super::Entries) keep it there.
    fn step(&self, problem: &Problem<'_>, cache: &mut Cache) -> Result<Step> {
        super::entries::step_cache(self, problem, cache)
    }
}
