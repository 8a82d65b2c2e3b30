//! **step** on the GPU: kernels, slices and the launch.

use super::abi::{DevicePointer, StepBank, StepForm, StepParams};
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
    /// Slots that are brought to L2 before all else.
    ahead: usize,
}

/// First planes that are brought to L2 before all else, bytes of all rows together: what comes while R is read. 20.0 us a step of B = 1
/// with 4 to 12 slots of 1 MiB, 21.7 with none, 20.5 with 25 (H100).
const MOST_AHEAD: usize = 8 << 20;

/// Most columns of a block that reads early.
const WIDEST_EARLY: usize = 256;

/// A number that a benchmark asks for in place of the plan's own choice: `DLA_CUDA_STEP_SLICES`, blocks of a row and value
/// head; `DLA_CUDA_STEP_EARLY`, whether every slot is read before it is decided what becomes of them, 0 or 1; and
/// `DLA_CUDA_STEP_AHEAD`, the slots that are then brought to L2 before all else. Read when a plan is made.
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
                (form.shared_bytes(shape.dk, shape.dv, width, shape.capacity) <= limit)
                    .then_some((form, width))
            })
        });
        let (form, width) = fitting.ok_or(Error::Limit {
            name: "shared memory of a block of step",
            limit: limit as u64,
            given: places.form(4).shared_bytes(shape.dk, shape.dv, 8, shape.capacity) as u64,
        })?;
        let slices = shape.dv.div_ceil(width);
        let blocks = rows.saturating_mul(slices);
        // Where every block runs at once and is alone, what it reads does not wait for what it decides. Elsewhere others fill
        // that time, and slots that are written would be read twice.
        let early = StepForm { early: true, ..form };
        let wanted =
            asked("DLA_CUDA_STEP_EARLY").map_or(blocks <= engine.multiprocessors(), |asked| asked > 0);
        let fits =
            width <= WIDEST_EARLY && early.shared_bytes(shape.dk, shape.dv, width, shape.capacity) <= limit;
        let form = if form.tokens == 1 && !form.delta && wanted && fits { early } else { form };
        let slot_bytes = rows.saturating_mul(shape.dk * shape.dv * if form.bf16 { 2 } else { 4 });
        let ahead =
            asked("DLA_CUDA_STEP_AHEAD").unwrap_or(MOST_AHEAD / slot_bytes.max(1)).min(shape.capacity);
        let shared_bytes = form.shared_bytes(shape.dk, shape.dv, width, shape.capacity);
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
            ahead,
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
            ahead: self.ahead as i32,
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
