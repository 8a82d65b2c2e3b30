//! **step** on the emulator: entries whose kernels run on the CPU, judged as every engine's are (tests/decode).

use super::{Array, Emulate, emulator, launch};
use dla::cuda::abi::{
    STEP_RECORD_BYTES, STEP_RING, STEP_SPARE_PLACES, StepBank, StepCacheParams, StepForm, StepParams,
};
use dla::{
    Cache, Dtype, Engine as _, Entries, EntrySpec, Error, Inputs, Merge, Problem, Read, Recurrence,
    SlotOrder, StateDtype, Step,
};
use harness::*;
use proptest::prelude::*;

#[path = "../decode/harness.rs"]
mod harness;

/// Entries in this process' memory, stepped by the kernels.
struct Emulated {
    emulate: Emulate,
    spec: EntrySpec,
    /// Blocks of a row and head.
    slices: usize,
    /// Whether the next token alone is the business of the kernels that read before they decide: by turns.
    early: bool,
    taken: Vec<bool>,
    states: Array,
    rest: Array,
    keys: Array,
    ring: Array,
    records: Array,
    arrived: Array,
}

impl Emulated {
    fn new(emulate: Emulate, spec: EntrySpec, slices: usize) -> Self {
        let rows = spec.entries * spec.value_heads;
        let places = spec.capacity + STEP_SPARE_PLACES;
        let elements = rows * places * spec.dk * spec.dv;
        let (delta, bf16) = (spec.recurrence == Recurrence::GatedDelta, spec.states == StateDtype::Bf16);
        let routed = spec.read == Read::Routed;
        let when = |wanted: bool, bytes: usize| Array::poisoned(if wanted { bytes } else { 0 });
        Emulated {
            emulate,
            spec,
            slices,
            early: true,
            taken: vec![false; spec.entries],
            states: Array::poisoned(elements * if bf16 { 2 } else { 4 }),
            rest: when(bf16, elements),
            keys: when(routed, rows * places * spec.dk * 4),
            ring: when(delta, rows * 2 * STEP_RING * spec.dk * 4),
            records: Array::poisoned(rows * STEP_RECORD_BYTES),
            arrived: Array::of(&vec![0u32; rows]),
        }
    }

    fn form(&self, tokens: usize) -> StepForm {
        let delta = self.spec.recurrence == Recurrence::GatedDelta;
        StepForm { delta, bf16: self.spec.states == StateDtype::Bf16, tokens, early: false }
    }

    fn bank(&self) -> StepBank {
        StepBank {
            states: self.states.pointer(),
            rest: self.rest.pointer(),
            keys: self.keys.pointer(),
            ring: self.ring.pointer(),
            records: self.records.pointer(),
            arrived: self.arrived.pointer(),
            entries: self.spec.entries as i64,
        }
    }

    fn cache_params(&self, entries: &Array, arrays: &[Array; 6], sequences: usize) -> StepCacheParams {
        let [states, len, tokens, drift, open, keys] = arrays.each_ref().map(Array::pointer);
        StepCacheParams {
            bank: self.bank(),
            entries: entries.pointer(),
            states,
            len,
            tokens,
            drift,
            open,
            keys: if self.spec.read == Read::Routed { keys } else { 0 },
            list: 0,
            sequences: sequences as i64,
            value_heads: self.spec.value_heads as i32,
            dk: self.spec.dk as i32,
            dv: self.spec.dv as i32,
            capacity: self.spec.capacity as i32,
        }
    }
}

fn indices(entries: &[usize]) -> Array {
    Array::of(&entries.iter().map(|&entry| entry as i32).collect::<Vec<_>>())
}

impl Entries for Emulated {
    fn spec(&self) -> &EntrySpec {
        &self.spec
    }

    fn take(&mut self) -> dla::Result<usize> {
        let entry = self.taken.iter().position(|taken| !taken).unwrap();
        self.taken[entry] = true;
        self.reset(entry)?;
        Ok(entry)
    }

    fn release(&mut self, entry: usize) -> dla::Result<()> {
        self.taken[entry] = false;
        Ok(())
    }

    fn reset(&mut self, entry: usize) -> dla::Result<()> {
        let bytes = self.spec.value_heads * STEP_RECORD_BYTES;
        self.records.bytes_mut()[entry * bytes..][..bytes].fill(0);
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize) -> dla::Result<()> {
        for array in [&mut self.states, &mut self.rest, &mut self.keys, &mut self.ring, &mut self.records] {
            let bytes = array.bytes_mut();
            let each = bytes.len() / self.spec.entries;
            bytes.copy_within(from * each..(from + 1) * each, to * each);
        }
        Ok(())
    }

    fn export(&self, entries: &[usize]) -> dla::Result<Cache> {
        let dims = self.spec.dims(entries.len());
        let rows = dims.rows();
        let arrays = [
            rows * dims.bank(),
            rows,
            rows * dims.capacity,
            rows * dims.capacity,
            rows * dims.state(),
            if self.spec.read == Read::Routed { rows * dims.key_bank() } else { 0 },
        ]
        .map(|elements| Array::poisoned(4 * elements));
        let list = indices(entries);
        let params = self.cache_params(&list, &arrays, entries.len());
        let form = self.form(1);
        let shared_bytes = form.gather_shared_bytes(dims.dk, dims.dv);
        launch(self.emulate, &form.gather_name(), rows * (dims.capacity + 1), shared_bytes, &params);
        let [states, len, tokens, drift, open, keys] = &arrays;
        Ok(Cache {
            dims,
            states: states.get(),
            len: len.get(),
            tokens: tokens.get(),
            drift: drift.get(),
            open: open.get(),
            keys: (self.spec.read == Read::Routed).then(|| keys.get()),
        })
    }

    fn import(&mut self, entries: &[usize], cache: &Cache) -> dla::Result<()> {
        let arrays = [
            Array::of(&cache.states),
            Array::of(&cache.len),
            Array::of(&cache.tokens),
            Array::of(&cache.drift),
            Array::of(&cache.open),
            Array::of(cache.keys.as_deref().unwrap_or(&[])),
        ];
        let list = indices(entries);
        let params = self.cache_params(&list, &arrays, entries.len());
        let blocks = cache.dims.rows() * (cache.dims.capacity + 1);
        launch(self.emulate, &self.form(1).scatter_name(), blocks, 0, &params);
        Ok(())
    }

    fn step(&mut self, problem: &Problem<'_>, entries: &[usize]) -> dla::Result<Step> {
        let (shape, options, inputs) = (*problem.shape(), problem.options(), *problem.inputs());
        let tensor = |x: dla::Tensor| match x.data() {
            dla::Data::F32(x) => Array::of(x),
            dla::Data::Bf16(x) => Array::of(x),
            dla::Data::F16(x) => Array::of(x),
        };
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(tensor);
        let [g, beta, lambda] = [inputs.g, inputs.beta, inputs.lambda].map(|x| x.map(tensor));
        let slope = inputs.route.map(|route| tensor(route.slope));
        let bias = inputs.route.map(|route| tensor(route.bias));
        let logits = inputs.route.and_then(|route| route.logits).map(tensor);
        let tau: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();
        let (tau, log) = (Array::of(&tau), inputs.events.map(Array::of));
        let per_token = shape.tokens() * shape.value_heads;
        let o = Array::poisoned(per_token * shape.dv * problem.dtype().bytes());
        let (drift, events) = (Array::poisoned(4 * per_token), Array::poisoned(per_token));
        let routed = options.read == Read::Routed;
        let weights = Array::poisoned(if routed { 4 * per_token * shape.capacity } else { 0 });
        let list = indices(entries);
        let pointer = |array: &Option<Array>| array.as_ref().map_or(0, Array::pointer);
        let width = (shape.dv / 8).div_ceil(self.slices) * 8;
        let slices = shape.dv.div_ceil(width);
        let tokens = [1, 4, 8].into_iter().find(|&tokens| tokens >= shape.time).unwrap();
        let form = self.form(tokens);
        let form = StepForm { early: tokens == 1 && !form.delta && self.early && width <= 256, ..form };
        self.early ^= tokens == 1;
        let shared_bytes = form.shared_bytes(shape.dk, shape.dv, width, shape.capacity);
        let mut from = 0;
        while from < shape.time {
            let count = tokens.min(shape.time - from);
            let params = StepParams {
                bank: self.bank(),
                entries: list.pointer(),
                q: q.pointer(),
                k: k.pointer(),
                v: v.pointer(),
                g: pointer(&g),
                beta: pointer(&beta),
                lambda: pointer(&lambda),
                slope: pointer(&slope),
                bias: pointer(&bias),
                logits: pointer(&logits),
                tau: tau.pointer(),
                log: pointer(&log),
                o: o.pointer(),
                drift: drift.pointer(),
                events: events.pointer(),
                weights: weights.pointer(),
                batch: shape.batch as i64,
                time: shape.time as i32,
                from: from as i32,
                tokens: count as i32,
                heads: shape.heads as i32,
                value_heads: shape.value_heads as i32,
                dk: shape.dk as i32,
                dv: shape.dv as i32,
                capacity: shape.capacity as i32,
                slices: slices as i32,
                width: width as i32,
                lambda_columns: problem.lambda_columns() as i32,
                logit_columns: problem.logit_columns() as i32,
                dtype: match problem.dtype() {
                    Dtype::Bf16 => 0,
                    Dtype::F16 => 1,
                    Dtype::F32 => 2,
                },
                newest_first: (options.slot_order == SlotOrder::NewestFirst).into(),
                mass: (options.merge == Merge::Mass).into(),
                qk_l2norm: options.qk_l2norm.into(),
                scale: problem.scale(),
                ahead: (shape.capacity / 2) as i32,
            };
            let blocks = shape.batch * shape.value_heads * slices;
            launch(self.emulate, &form.name(), blocks, shared_bytes, &params);
            from += count;
        }
        assert!(self.arrived.get::<u32>().iter().all(|&arrived| arrived == 0));
        for array in [&self.states, &self.rest, &self.keys, &self.ring, &self.records] {
            array.get::<u8>();
        }
        Ok(Step {
            o: match problem.dtype() {
                Dtype::F32 => dla::Buffer::F32(o.get()),
                Dtype::Bf16 => dla::Buffer::Bf16(o.get()),
                Dtype::F16 => dla::Buffer::F16(o.get()),
            },
            drift: drift.get(),
            events: events.get(),
            lambda: routed.then(|| weights.get()),
        })
    }

    /// By the CPU engine, between a gather and a scatter.
    fn prefill(&mut self, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> dla::Result<Step> {
        let cache = self.export(from)?;
        let inputs = Inputs { cache: Some(&cache), ..*problem.inputs() };
        let forward = dla::cpu::Engine.forward(&Problem::new(problem.options(), inputs)?)?;
        self.import(to, &forward.cache)?;
        let dla::Forward { o, drift, events, lambda, .. } = forward;
        Ok(Step { o, drift, events, lambda })
    }
}

/// Another number of slices whenever the extents differ.
fn make(spec: EntrySpec) -> dla::Result<Box<dyn Entries>> {
    let emulate = emulator().ok_or(Error::NoKernels)?;
    let slices = 1 + (spec.capacity + spec.dk / 8) % 3;
    Ok(Box::new(Emulated::new(emulate, spec, slices)))
}

fn maker() -> Option<Maker> {
    emulator()?;
    Some(Maker { name: "emulated", states: &[StateDtype::F32, StateDtype::Bf16], make })
}

#[test]
fn step_of_every_kind() {
    let Some(maker) = maker() else { return };
    every_kind_of_step(&maker, usize::MAX, 50);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn step_joins_leaves_and_splits(
        recipe in drawn_recipe(),
        actions in prop::collection::vec(action(), 1..40),
        seed in 0u64..1000,
    ) {
        if let Some(maker) = maker() {
            for &states in maker.states {
                run_actions(&maker, &recipe, states, &actions, seed);
            }
        }
    }
}
