//! **step** on the GPU: kernels, slices and the launch.

use super::abi::{DevicePointer, STEP_SPARE_PLACES, StepBank, StepForm, StepParams};
use super::engine::Engine;
use super::entries::Places;
use super::forward::{Arena, Offset};
use super::launch::launch;
use super::memory::{Memory, bytes_of_mut};
use super::module::{Choice, Kernel};
use super::raw::{RawInputs, RawOutputs};
use crate::engine::Step;
use crate::entries::MOST_STEP_TOKENS;
use crate::error::{Error, Result};
use crate::options::{Merge, Options, Read, SlotOrder};
use crate::problem::{Problem, Shape};
use crate::tensor::{Buffer, Dtype};
use cudarc::driver::sys::CUstream;

/// A step's kernel and scalars, chosen once: launched as often as its shape comes.
#[derive(Debug, Clone)]
pub struct StepPlan {
    kernel: Kernel,
    form: StepForm,
    pub(super) shape: Shape,
    pub(super) read: Read,
    slices: usize,
    width: usize,
    dtype: Dtype,
    newest_first: bool,
    mass: bool,
    qk_l2norm: bool,
    scale: f32,
    /// Places that are staged in shared memory.
    staged: usize,
}

/// A number that a benchmark asks for in place of the plan's own choice: `DLA_CUDA_STEP_SLICES`, blocks of a row and value
/// head, and `DLA_CUDA_STEP_STAGED`, the most places that are staged, 0 for none. Read when a plan is made.
fn asked(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

impl StepPlan {
    /// Options and extents are the entries'; the context is bound.
    pub(super) fn new(
        engine: &Engine,
        places: &Places,
        options: &Options,
        shape: &Shape,
        dtype: Dtype,
    ) -> Result<StepPlan> {
        if !(1..=MOST_STEP_TOKENS).contains(&shape.time) || shape.sequences != shape.batch {
            return Err(Error::Shape {
                name: "q",
                expected: format!("[B,T,H,dk] with T = 1 to {MOST_STEP_TOKENS} for a step"),
                given: format!("{:?}", [shape.batch, shape.time, shape.heads, shape.dk]),
            });
        }
        let multiprocessors = engine.multiprocessors().max(1);
        let rows = shape.batch.saturating_mul(shape.value_heads);
        // Blocks for every multiprocessor, of 16 columns or more.
        let wanted = multiprocessors.div_ceil(rows.max(1)).clamp(1, shape.dv.div_ceil(16));
        let slices = if rows * wanted > multiprocessors
            && wanted > 1
            && rows * (wanted - 1) * 8 >= multiprocessors * 7
        {
            wanted - 1
        } else {
            wanted
        };
        let slices = asked("DLA_CUDA_STEP_SLICES").unwrap_or(slices);
        Self::of_slices(engine, places, options, shape, dtype, slices)
    }

    /// With `slices` blocks a row and value head, or more where shared memory asks for it.
    fn of_slices(
        engine: &Engine,
        places: &Places,
        options: &Options,
        shape: &Shape,
        dtype: Dtype,
        slices: usize,
    ) -> Result<StepPlan> {
        let rows = shape.batch.saturating_mul(shape.value_heads);
        let limit = engine.device().shared_bytes_limit()?;
        let tokens = match shape.time {
            1 => &[1][..],
            2..=4 => &[4],
            // Two launches of four where one of eight has no room.
            _ => &[8, 4],
        };
        let groups = shape.dv / 8;
        let fitting = tokens.iter().find_map(|&tokens| {
            let form = places.form(tokens);
            (slices.clamp(1, groups)..=groups).find_map(|slices| {
                let width = groups.div_ceil(slices) * 8;
                (form.shared_bytes(shape.dk, shape.dv, width) <= limit).then_some((form, width))
            })
        });
        let (form, width) = fitting.ok_or(Error::Limit {
            name: "shared memory of a block of step",
            limit: limit as u64,
            given: places.form(4).shared_bytes(shape.dk, shape.dv, 8) as u64,
        })?;
        let slices = shape.dv.div_ceil(width);
        let blocks = rows.saturating_mul(slices);
        let mut shared_bytes = form.shared_bytes(shape.dk, shape.dv, width);
        // Where blocks are few, most of the states fit shared memory, and come while it is decided what becomes of them.
        let crowd = blocks.div_ceil(engine.multiprocessors().max(1)).max(1);
        let room = (engine.device().shared_bytes_of_all()? / crowd).saturating_sub(1024).min(limit);
        let each = form.staged_bytes(shape.dk, width);
        let staged = (room.saturating_sub(shared_bytes) / each).min(shape.capacity + STEP_SPARE_PLACES);
        // By itself none: staged states took 40 us for 32 gated and 94 for 77 under the delta rule (B = 1, 32 heads of 128, H100).
        let staged = staged.min(asked("DLA_CUDA_STEP_STAGED").unwrap_or(0));
        let staged = if form.tokens == 1 && crowd <= 2 && 3 * staged >= shape.capacity { staged } else { 0 };
        let form = StepForm { staged: staged > 0, ..form };
        shared_bytes += staged * each;
        let kernel = Choice::portable("step", form.name(), blocks, shared_bytes).resolve(engine.device())?;
        Ok(StepPlan {
            kernel,
            form,
            shape: *shape,
            read: options.read,
            slices,
            width,
            dtype,
            newest_first: options.slot_order == SlotOrder::NewestFirst,
            mass: options.merge == Merge::Mass,
            qk_l2norm: options.qk_l2norm,
            scale: options.scale.unwrap_or_else(|| (1.0 / (shape.dk as f64).sqrt()) as f32),
            staged,
        })
    }

    /// Blocks of a batch row and value head.
    pub fn slices(&self) -> usize {
        self.slices
    }

    /// Gated delta rule.
    pub(super) fn delta(&self) -> bool {
        self.form.delta
    }

    /// Addresses have been checked, the context is bound.
    pub(super) fn launch(
        &self,
        bank: &StepBank,
        entries: DevicePointer,
        inputs: &RawInputs,
        outputs: &RawOutputs,
        stream: CUstream,
    ) -> Result<()> {
        let shape = &self.shape;
        let routed = self.read == Read::Routed;
        let when = |wanted: bool, address: DevicePointer| if wanted { address } else { 0 };
        let params = StepParams {
            bank: *bank,
            entries,
            q: inputs.q,
            k: inputs.k,
            v: inputs.v,
            g: inputs.g,
            beta: inputs.beta,
            lambda: when(!routed, inputs.lambda),
            slope: inputs.slope,
            bias: inputs.bias,
            logits: when(routed, inputs.logits),
            tau: inputs.tau,
            log: inputs.events,
            o: outputs.o,
            drift: outputs.drift,
            events: outputs.events,
            weights: outputs.lambda,
            batch: shape.batch as i64,
            time: shape.time as i32,
            from: 0,
            tokens: 0,
            heads: shape.heads as i32,
            value_heads: shape.value_heads as i32,
            dk: shape.dk as i32,
            dv: shape.dv as i32,
            capacity: shape.capacity as i32,
            slices: self.slices as i32,
            width: self.width as i32,
            lambda_columns: inputs.lambda_columns as i32,
            logit_columns: inputs.logit_columns as i32,
            dtype: match self.dtype {
                Dtype::Bf16 => 0,
                Dtype::F16 => 1,
                Dtype::F32 => 2,
            },
            newest_first: self.newest_first.into(),
            mass: self.mass.into(),
            qk_l2norm: self.qk_l2norm.into(),
            scale: self.scale,
            staged: self.staged as i32,
        };
        for from in (0..shape.time).step_by(self.form.tokens) {
            let tokens = self.form.tokens.min(shape.time - from);
            let params = StepParams { from: from as i32, tokens: tokens as i32, ..params };
            launch(&self.kernel, &params, stream)?;
        }
        Ok(())
    }
}

/// Room for the results of a call, but for its cache.
pub(super) struct Results {
    o: Offset,
    drift: Offset,
    events: Offset,
    lambda: Option<Offset>,
}

impl Results {
    pub(super) fn room(arena: &mut Arena<'_>, problem: &Problem<'_>) -> Self {
        let shape = problem.shape();
        let per_token = shape.tokens() * shape.value_heads;
        let routed = problem.options().read == Read::Routed;
        Results {
            o: arena.room(per_token * shape.dv * problem.dtype().bytes()),
            drift: arena.room(per_token * 4),
            events: arena.room(per_token),
            lambda: routed.then(|| arena.room(per_token * shape.capacity * 4)),
        }
    }

    pub(super) fn raw(&self, base: u64) -> RawOutputs {
        RawOutputs {
            o: base + self.o as u64,
            drift: base + self.drift as u64,
            events: base + self.events as u64,
            lambda: self.lambda.map_or(0, |lambda| base + lambda as u64),
            cache: None,
        }
    }

    /// Waits for the stream and copies them to the host.
    pub(super) fn download(&self, engine: &Engine, memory: &Memory, problem: &Problem<'_>) -> Result<Step> {
        let shape = problem.shape();
        let per_token = shape.tokens() * shape.value_heads;
        let mut o = Buffer::zeros(problem.dtype(), per_token * shape.dv);
        let (mut drift, mut events) = (vec![0f32; per_token], vec![0u8; per_token]);
        let mut lambda = self.lambda.map(|_| vec![0f32; per_token * shape.capacity]);
        let get = |offset, to: &mut [u8]| memory.download(offset, to, engine.raw_stream());
        get(
            self.o,
            match &mut o {
                Buffer::F32(x) => bytes_of_mut(x),
                Buffer::Bf16(x) => bytes_of_mut(x),
                Buffer::F16(x) => bytes_of_mut(x),
            },
        )?;
        get(self.drift, bytes_of_mut(&mut drift))?;
        get(self.events, &mut events)?;
        if let (Some(offset), Some(lambda)) = (self.lambda, &mut lambda) {
            get(offset, bytes_of_mut(lambda))?;
        }
        Ok(Step { o, drift, events, lambda })
    }
}
