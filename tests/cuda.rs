//! The CUDA engine on a GPU, against the f64 reference on the same rounded inputs, with the GPU's own event log.
//!
//! Skips, with a line that says so, where there is no GPU; `DLA_CUDA=require` fails instead. `DLA_CUDA_SMALL=1`: few
//! small cases that still run every kernel, for compute-sanitizer. `DLA_CUDA_LONG=1`: the case of 2,097,152 tokens
//! too (80 GB). `DLA_CUDA_SEED`: first seed. `DLA_EVIDENCE`: folder that takes a JSON file a test.

use dla::check::{Case, Recipe, relative_error};
use dla::cuda::cudarc::driver::sys;
use dla::cuda::{self, Call, Engine, Memory, Plan, RawCache, RawInputs, RawOutputs};
use dla::events::{EXTEND, Ledger, OPEN, plan};
use dla::reference::{self, Arguments};
use dla::{
    Buffer, Cache, Dtype, Engine as _, Error, Forward, Merge, Options, Problem, Read, Recurrence, Shape,
    SlotOrder, Tau,
};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

#[path = "cuda/backward.rs"]
mod backward;

/// The first GPU; `None` where there is none.
fn engine() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| match Engine::new(0) {
        Ok(engine) => {
            println!("on {}, driver of CUDA {}", engine.card().unwrap(), engine.driver_version().unwrap());
            Some(engine)
        }
        Err(error) => {
            assert!(std::env::var_os("DLA_CUDA").is_none_or(|value| value != "require"), "{error}");
            None
        }
    });
    if engine.is_none() {
        println!("SKIPPED: no GPU: {}", cuda::available().unwrap_err());
    }
    engine.as_ref()
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

fn small() -> bool {
    is_set("DLA_CUDA_SMALL")
}

fn first_seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let given = std::env::var("DLA_CUDA_SEED").ok().map(|seed| seed.parse().unwrap());
        given.unwrap_or_else(|| rand::random_range(0..1 << 40))
    })
}

/// The largest errors of a test; printed, and written down for the evidence, when it ends, passed or not.
struct Record {
    name: &'static str,
    worst: Mutex<BTreeMap<String, f64>>,
}

impl Record {
    fn of(name: &'static str) -> Self {
        println!("{name}: seeds from {}", first_seed());
        Record { name, worst: Mutex::default() }
    }

    fn take(&self, tensor: &str, error: f64) {
        let mut worst = self.worst.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let held = worst.entry(tensor.to_owned()).or_default();
        *held = if error.is_nan() { f64::INFINITY } else { held.max(error) };
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let worst = self.worst.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        println!("{}: {worst:?}", self.name);
        if let Some(folder) = std::env::var_os("DLA_EVIDENCE") {
            let errors: Vec<String> = worst
                .iter()
                .map(|(tensor, &error)| format!("{tensor:?}: {:e}", error.min(f64::MAX)))
                .collect();
            let line = format!(
                "{{\"name\": {:?}, \"card\": {:?}, \"driver\": {:?}, \"source_hash\": {:?}, \"passed\": {}, \"worst\": {{{}}}}}\n",
                self.name,
                engine().and_then(|engine| engine.card().ok()).unwrap_or_default(),
                engine().and_then(|engine| engine.driver_version().ok()).unwrap_or_default(),
                cuda::SOURCE_HASH,
                !std::thread::panicking(),
                errors.join(", ")
            );
            let path = std::path::Path::new(&folder).join(format!("test-{}.json", self.name));
            if let Err(error) = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, line)) {
                println!("{}: {error}", path.display());
            }
        }
    }
}

/// Largest relative error of o, lambda and the cache by dtype of the inputs.
fn bound(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 4e-3,
        Dtype::F16 => 1e-3,
        Dtype::F32 => 1e-4,
    }
}

/// Largest error of the drift; so near to tau a decision may differ.
const DRIFT_BOUND: f64 = 2e-3;

/// The slots that a cache row holds, by way of the public interface: a token that opens each with its whole
/// drift, the others with none.
fn ledger_of(cache: Option<&Cache>, row: usize) -> Ledger {
    let mut ledger = Ledger::default();
    let Some(cache) = cache else { return ledger };
    for i in 0..cache.len[row] as usize {
        let slot = row * cache.dims.capacity + i;
        ledger.apply(OPEN, cache.drift[slot] as f32 / 4096.0);
        (1..cache.tokens[slot]).for_each(|_| ledger.apply(EXTEND, 0.0));
    }
    ledger
}

/// The log is what the GPU's own drift asks for, byte for byte, or the caller's; the cache counts what it did.
fn judge_log(problem: &Problem, out: &Forward, name: &str) {
    let (shape, options) = (*problem.shape(), problem.options());
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..shape.value_heads {
            let row = n * shape.value_heads + head;
            let at = |t: usize| (sequence.start + t) * shape.value_heads + head;
            let drift: Vec<f32> = (0..sequence.len).map(|t| out.drift[at(t)]).collect();
            let events: Vec<u8> = (0..sequence.len).map(|t| out.events[at(t)]).collect();
            let mut ledger = ledger_of(problem.inputs().cache, row);
            match problem.inputs().events {
                Some(log) => {
                    assert!(events.iter().enumerate().all(|(t, &event)| event == log[at(t)]), "{name}: log");
                    events.iter().zip(&drift).for_each(|(&event, &drift)| ledger.apply(event, drift));
                }
                None => {
                    let planned =
                        plan(&drift, options.tau.of(head), shape.capacity, options.merge, &mut ledger);
                    assert!(events == planned, "{name}: events of row {row}");
                }
            }
            let slots = row * shape.capacity..(row + 1) * shape.capacity;
            let padded = |x: &[u32]| {
                let mut x = x.to_vec();
                x.resize(shape.capacity, 0);
                x
            };
            assert_eq!(out.cache.len[row] as usize, ledger.len(), "{name}: cache_len of row {row}");
            assert_eq!(
                out.cache.tokens[slots.clone()],
                padded(ledger.tokens()),
                "{name}: cache_tokens of row {row}"
            );
            assert_eq!(out.cache.drift[slots], padded(ledger.drift()), "{name}: cache_drift of row {row}");
        }
    }
}

/// Judges results by the reference, and returns the error of o.
fn judge(problem: &Problem, out: &Forward, name: &str, record: &Record) -> f64 {
    let (shape, options, dtype) = (*problem.shape(), problem.options(), problem.dtype());
    judge_log(problem, out, name);
    let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let expected = reference::forward(problem, &Arguments::of(problem), Some(&out.events), None);

    let off = out.drift.iter().zip(&expected.drift).map(|(&x, r)| (f64::from(x) - r).abs());
    let off = off.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst });
    record.take(&format!("drift {dtype}"), off);
    assert!(off <= DRIFT_BOUND, "{name}: drift off by {off:.2e}");

    // Along the GPU's own decisions, the reference would have taken them too, but within rounding of tau.
    if problem.inputs().events.is_none() {
        for (n, sequence) in problem.sequences().iter().enumerate() {
            for head in 0..shape.value_heads {
                let (tau, row) = (f64::from(options.tau.of(head)), n * shape.value_heads + head);
                let mut slots = problem.inputs().cache.map_or(0, |cache| cache.len[row] as usize);
                for t in sequence.start..sequence.start + sequence.len {
                    let at = t * shape.value_heads + head;
                    let (opened, drift) = (out.events[at] != EXTEND, expected.drift[at]);
                    let forced = slots == 0 || shape.capacity == 1;
                    let near = (drift - tau).abs();
                    if !forced && opened != (drift >= tau) {
                        record.take(&format!("decision {dtype}"), near);
                        assert!(near <= DRIFT_BOUND, "{name}: decision of element {at}, {near:.2e} from tau");
                    }
                    slots = slots.max(1);
                }
            }
        }
    }
    let judge = |tensor: &str, x: &[f64], reference: &[f64]| {
        let (error, at) = relative_error(x, reference);
        record.take(&format!("{tensor} {dtype}"), error);
        assert!(error <= bound(dtype), "{name}: {tensor} off by {error:.2e}, most at element {at}");
        error
    };
    judge("cache_open", &f64s(&out.cache.open), &expected.cache.open);
    judge("cache_states", &f64s(&out.cache.states), &expected.cache.states);
    match (&out.lambda, &expected.lambda) {
        (Some(lambda), Some(expected)) => drop(judge("lambda", &f64s(lambda), expected)),
        (lambda, _) => assert!(lambda.is_none(), "{name}: lambda that was given is no result"),
    }
    match &out.cache.keys {
        Some(keys) => drop(judge("cache_keys", &f64s(keys), &expected.cache.keys)),
        None => assert!(options.read == Read::Given, "{name}: no cache_keys"),
    }
    judge("o", &out.o.to_f64(), &expected.o)
}

fn check_all(engine: &Engine, recipes: &[Recipe], record: &Record) {
    recipes.par_iter().enumerate().for_each(|(index, recipe)| {
        let case = recipe.draw(first_seed() + index as u64);
        let problem = case.problem().unwrap();
        let out = Poisoned::run(engine, &problem);
        judge(&problem, &out, &case.describe(), record);
    });
}

/// An array on the GPU with a canary behind it, poisoned before use.
struct Array {
    memory: Memory,
    bytes: usize,
}

const POISON: u8 = 0xff;
const CANARY: usize = 256;

impl Array {
    fn poisoned(engine: &Engine, bytes: usize) -> Self {
        let memory = engine.allocate(bytes + CANARY).unwrap();
        engine.fill(&memory, POISON).unwrap();
        Array { memory, bytes }
    }

    fn of<T: bytemuck::Pod>(engine: &Engine, x: &[T]) -> Self {
        let array = Array::poisoned(engine, size_of_val(x));
        engine.upload(&array.memory, 0, bytemuck::cast_slice(x)).unwrap();
        array
    }

    fn of_buffer(engine: &Engine, x: dla::Data) -> Self {
        match x {
            dla::Data::F32(x) => Array::of(engine, x),
            dla::Data::Bf16(x) => Array::of(engine, x),
            dla::Data::F16(x) => Array::of(engine, x),
        }
    }

    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn get<T: bytemuck::Pod + Default>(&self, engine: &Engine) -> Vec<T> {
        let mut bytes = vec![0u8; self.bytes + CANARY];
        engine.download(&self.memory, 0, &mut bytes).unwrap();
        assert!(bytes[self.bytes..].iter().all(|&byte| byte == POISON), "written past the end of an array");
        bytes[..self.bytes].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

/// A problem's arrays by way of the raw interface.
struct Poisoned {
    held: Vec<Array>,
    plan: Plan,
    inputs: RawInputs,
    outputs: RawOutputs,
    results: [Array; 8],
    lambda: Option<Array>,
    keys: Option<Array>,
    workspace: Array,
}

impl Poisoned {
    fn new(engine: &Engine, problem: &Problem) -> Self {
        let (shape, options) = (*problem.shape(), problem.options());
        let (dims, given) = (shape.cache_dims(), *problem.inputs());
        let routed = options.read == Read::Routed;
        let mut held = Vec::new();
        let mut keep = |array: Array| {
            held.push(array);
            held[held.len() - 1].address()
        };
        let mut tensor = |x: &dla::Tensor| keep(Array::of_buffer(engine, x.data()));
        let [q, k, v] = [given.q, given.k, given.v].map(|x| tensor(&x));
        let [g, beta, lambda] = [given.g, given.beta, given.lambda].map(|x| x.map_or(0, |x| tensor(&x)));
        let route = given.route;
        let slope = route.map_or(0, |route| tensor(&route.slope));
        let bias = route.map_or(0, |route| tensor(&route.bias));
        let logits = route.and_then(|route| route.logits).map_or(0, |logits| tensor(&logits));
        let taus: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();
        let tau = keep(Array::of(engine, &taus));
        let events = given.events.map_or(0, |events| keep(Array::of(engine, events)));
        let cu_seqlens = given.cu_seqlens.map_or(0, |offsets| keep(Array::of(engine, offsets)));
        let cache = given.cache.map(|cache| RawCache {
            states: keep(Array::of(engine, &cache.states)),
            len: keep(Array::of(engine, &cache.len)),
            tokens: keep(Array::of(engine, &cache.tokens)),
            drift: keep(Array::of(engine, &cache.drift)),
            open: keep(Array::of(engine, &cache.open)),
            keys: cache.keys.as_ref().map_or(0, |keys| keep(Array::of(engine, keys))),
        });
        let inputs = RawInputs {
            q,
            k,
            v,
            g,
            beta,
            lambda,
            lambda_columns: problem.lambda_columns(),
            slope,
            bias,
            logits,
            logit_columns: problem.logit_columns(),
            tau,
            events,
            cu_seqlens,
            cache,
        };
        let per_token = shape.tokens() * shape.value_heads;
        let rows = dims.rows();
        let results = [
            per_token * shape.dv * problem.dtype().bytes(),
            per_token * 4,
            per_token,
            rows * dims.bank() * 4,
            rows * 4,
            rows * dims.capacity * 4,
            rows * dims.capacity * 4,
            rows * dims.state() * 4,
        ]
        .map(|bytes| Array::poisoned(engine, bytes));
        let lambda = routed.then(|| Array::poisoned(engine, per_token * shape.capacity * 4));
        let keys = routed.then(|| Array::poisoned(engine, rows * dims.key_bank() * 4));
        let address = |array: &Option<Array>| array.as_ref().map_or(0, Array::address);
        let outputs = RawOutputs {
            o: results[0].address(),
            drift: results[1].address(),
            events: results[2].address(),
            lambda: address(&lambda),
            cache: Some(RawCache {
                states: results[3].address(),
                len: results[4].address(),
                tokens: results[5].address(),
                drift: results[6].address(),
                open: results[7].address(),
                keys: address(&keys),
            }),
        };
        let plan = engine.plan(&Call::of(problem)).unwrap();
        let workspace = Array::poisoned(engine, plan.workspace_bytes());
        Poisoned { held, plan, inputs, outputs, results, lambda, keys, workspace }
    }

    fn workspace(&self) -> (u64, usize) {
        (self.workspace.address(), self.plan.workspace_bytes())
    }

    fn launch(&self, engine: &Engine) {
        // SAFETY: every array is as long as the problem says, and the problem was validated.
        unsafe { engine.launch(&self.plan, &self.inputs, &self.outputs, self.workspace(), None) }.unwrap();
    }

    fn poison(&self, engine: &Engine) {
        let optional = self.lambda.iter().chain(&self.keys);
        for array in self.results.iter().chain(optional).chain([&self.workspace]) {
            engine.fill(&array.memory, POISON).unwrap();
        }
    }

    fn read(&self, engine: &Engine, problem: &Problem) -> Forward {
        let dims = problem.shape().cache_dims();
        let [o, drift, events, states, len, tokens, summed_drift, open] = &self.results;
        self.workspace.get::<u8>(engine);
        for array in &self.held {
            array.get::<u8>(engine);
        }
        Forward {
            o: match problem.dtype() {
                Dtype::F32 => Buffer::F32(o.get(engine)),
                Dtype::Bf16 => Buffer::Bf16(o.get(engine)),
                Dtype::F16 => Buffer::F16(o.get(engine)),
            },
            drift: drift.get(engine),
            events: events.get(engine),
            lambda: self.lambda.as_ref().map(|lambda| lambda.get(engine)),
            cache: Cache {
                dims,
                states: states.get(engine),
                len: len.get(engine),
                tokens: tokens.get(engine),
                drift: summed_drift.get(engine),
                open: open.get(engine),
                keys: self.keys.as_ref().map(|keys| keys.get(engine)),
            },
        }
    }

    fn run(engine: &Engine, problem: &Problem) -> Forward {
        let arrays = Poisoned::new(engine, problem);
        arrays.launch(engine);
        arrays.read(engine, problem)
    }
}

/// The same bits.
fn assert_same(a: &Forward, b: &Forward, name: &str) {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let o = |x: &Forward| x.o.to_f64().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(o(a) == o(b), "{name}: o");
    assert!(bits(&a.drift) == bits(&b.drift), "{name}: drift");
    assert!(a.events == b.events, "{name}: events");
    assert!(a.lambda.as_deref().map(bits) == b.lambda.as_deref().map(bits), "{name}: lambda");
    assert!(bits(&a.cache.states) == bits(&b.cache.states), "{name}: cache_states");
    assert!(bits(&a.cache.open) == bits(&b.cache.open), "{name}: cache_open");
    assert!(a.cache.len == b.cache.len && a.cache.tokens == b.cache.tokens, "{name}: cache");
    assert!(a.cache.drift == b.cache.drift, "{name}: cache_drift");
    assert!(a.cache.keys.as_deref().map(bits) == b.cache.keys.as_deref().map(bits), "{name}: cache_keys");
}

const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];
const RECURRENCES: [Recurrence; 2] = [Recurrence::Gated, Recurrence::GatedDelta];

/// Every dtype and recurrence with both reads, over capacities, head sizes, boundary rates, ragged and packed
/// lengths, resumed caches and grouped heads: each value of each at least twice.
fn every_kernel_recipes() -> Vec<Recipe> {
    let sizes = [(8, 24), (64, 64), (24, 8), (128, 128), (64, 72), (72, 64), (128, 16), (16, 128), (40, 40)];
    let sizes = if small() { &[(8, 24), (24, 8), (40, 40)][..] } else { &sizes[..] };
    let mut recipes = Vec::new();
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            for read in [Read::Given, Read::Routed] {
                for packed in [false, true] {
                    let at = recipes.len();
                    let (dk, dv) = sizes[at % sizes.len()];
                    let options = Options {
                        recurrence,
                        capacity: [30, 3, 2, 64, 1][at % 5],
                        merge: if at % 3 == 0 { Merge::Mass } else { Merge::Density },
                        read,
                        slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
                        qk_l2norm: at % 5 == 2,
                        ..Options::default()
                    };
                    recipes.push(Recipe {
                        options,
                        batch: if packed { 1 } else { 1 + at % 2 },
                        time: if packed { 134 } else { [131, 64, 70][at % 3] },
                        heads: 1 + at % 2,
                        value_heads: 2,
                        dk,
                        dv,
                        dtype,
                        boundary_rate: [1.0, 0.25, 0.01][at / 2 % 3],
                        decay: [Some(0.1), None, Some(1.0), Some(50.0)][at / 3 % 4],
                        logits: at % 2 == 0,
                        extra_columns: at % 3,
                        packed: packed.then(|| vec![0, 1, 66, 0, 33, 34, 0]),
                        resumed: at % 3 != 1,
                        ..Recipe::default()
                    });
                }
            }
        }
    }
    recipes
}

#[test]
fn every_kernel() {
    let Some(engine) = engine() else { return };
    check_all(engine, &every_kernel_recipes(), &Record::of("every_kernel"));
}

/// Every scan that Hopper has of its own, and with rows enough for the wide form of the one that has two; other cards compute
/// the same cases by the portable one.
#[test]
fn every_scan_of_hopper() {
    let Some(engine) = engine() else { return };
    let record = Record::of("every_scan_of_hopper");
    let gated =
        [(64, 16), (64, 30), (64, 32), (64, 64), (128, 16), (128, 30), (128, 32), (128, 64), (256, 16)];
    let delta = [(64, 16), (64, 32), (128, 16), (128, 32)];
    let sizes = gated.map(|size| (Recurrence::Gated, size)).into_iter();
    let sizes = sizes.chain(delta.map(|size| (Recurrence::GatedDelta, size)));
    let mut recipes: Vec<Recipe> = sizes
        .enumerate()
        .map(|(at, (recurrence, (dk, capacity)))| Recipe {
            options: Options {
                recurrence,
                capacity,
                read: if at % 3 == 0 { Read::Routed } else { Read::Given },
                ..Options::default()
            },
            time: 134,
            value_heads: 2,
            dk,
            dv: 24,
            dtype: Dtype::Bf16,
            packed: (at % 4 == 1).then(|| vec![0, 1, 66, 0, 67]),
            resumed: at % 2 == 1,
            ..Recipe::default()
        })
        .collect();
    let rows = engine.multiprocessors() / 16 + 1;
    recipes.push(Recipe {
        time: 66,
        dk: 128,
        dv: 128,
        value_heads: rows,
        dtype: Dtype::Bf16,
        ..Recipe::default()
    });
    check_all(engine, &recipes, &record);
}

/// A sequence that is cut into windows: the chain runs ahead of the scan on a stream of its own.
#[test]
fn windows() {
    let Some(engine) = engine() else { return };
    let record = Record::of("windows");
    let mut recipes = Vec::new();
    for recurrence in RECURRENCES {
        for read in [Read::Given, Read::Routed] {
            recipes.push(Recipe {
                options: Options { recurrence, read, capacity: 5, ..Options::default() },
                time: 4100,
                dk: 16,
                dv: 8,
                dtype: Dtype::Bf16,
                ..Recipe::default()
            });
        }
    }
    check_all(engine, &recipes, &record);
}

#[test]
fn boundary_rates_at_the_sizes_of_models() {
    let Some(engine) = engine() else { return };
    let record = Record::of("boundary_rates_at_the_sizes_of_models");
    if small() {
        return;
    }
    let mut recipes = Vec::new();
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            for boundary_rate in [0.01, 0.25, 1.0] {
                for merge in [Merge::Density, Merge::Mass] {
                    let read = if recipes.len() % 2 == 0 { Read::Given } else { Read::Routed };
                    let size = [(128, 128), (64, 64), (256, 256)][recipes.len() / 2 % 3];
                    recipes.push(Recipe {
                        options: Options { recurrence, merge, read, ..Options::default() },
                        time: if size.0 == 256 { 200 } else { 512 },
                        dk: size.0,
                        dv: size.1,
                        dtype,
                        boundary_rate,
                        ..Recipe::default()
                    });
                }
            }
        }
    }
    check_all(engine, &recipes, &record);
}

#[test]
fn head_sizes() {
    let Some(engine) = engine() else { return };
    let record = Record::of("head_sizes");
    let mut recipes = Vec::new();
    for dk in (8..=256).step_by(if small() { 120 } else { 8 }) {
        let at = recipes.len();
        let dv = if at % 3 == 0 { dk } else { 8 * (1 + (dk / 8 * 7) % 32) };
        recipes.push(Recipe {
            options: Options {
                recurrence: RECURRENCES[at % 2],
                capacity: 4,
                read: if at / 2 % 2 == 0 { Read::Given } else { Read::Routed },
                ..Options::default()
            },
            time: 70,
            dk,
            dv,
            dtype: DTYPES[at % 3],
            resumed: at % 4 == 0,
            ..Recipe::default()
        });
    }
    check_all(engine, &recipes, &record);
}

#[test]
fn capacities() {
    let Some(engine) = engine() else { return };
    let record = Record::of("capacities");
    let recipe = |capacity: usize| Recipe {
        options: Options {
            recurrence: RECURRENCES[capacity / 2 % 2],
            capacity,
            merge: if capacity.is_multiple_of(2) { Merge::Mass } else { Merge::Density },
            read: if (capacity / 4).is_multiple_of(2) { Read::Given } else { Read::Routed },
            ..Options::default()
        },
        time: 150,
        value_heads: 2,
        dtype: DTYPES[capacity % 3],
        ..Recipe::default()
    };
    let recipes: Vec<Recipe> = (1..=64).step_by(if small() { 21 } else { 1 }).map(recipe).collect();
    check_all(engine, &recipes, &record);
}

#[test]
fn lengths() {
    let Some(engine) = engine() else { return };
    let record = Record::of("lengths");
    let times = [0, 1, 2, 15, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 1000, 4096];
    let mut recipes = Vec::new();
    for &time in &times[..if small() { 11 } else { times.len() }] {
        for recurrence in RECURRENCES {
            let at = recipes.len();
            recipes.push(Recipe {
                options: Options {
                    recurrence,
                    capacity: 8,
                    read: if at % 3 == 0 { Read::Routed } else { Read::Given },
                    tau: Tau::PerHead(vec![0.6, 0.0]),
                    ..Options::default()
                },
                time,
                heads: 2,
                value_heads: 2,
                dk: 32,
                dv: 32,
                dtype: DTYPES[at % 3],
                resumed: at % 4 < 2,
                ..Recipe::default()
            });
        }
    }
    // No sequence at all, and none with a token.
    for packed in [vec![], vec![0, 0, 0]] {
        recipes.push(Recipe { time: 0, packed: Some(packed), ..Recipe::default() });
    }
    recipes.push(Recipe { batch: 0, time: 5, ..Recipe::default() });
    check_all(engine, &recipes, &record);
}

/// The error of o does not grow with T.
#[test]
fn long_sequences_stay_exact() {
    let Some(engine) = engine() else { return };
    let record = Record::of("long_sequences_stay_exact");
    if small() {
        return;
    }
    let mut recipes = Vec::new();
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            for time in [4096, 65_536] {
                recipes.push(Recipe {
                    options: Options { recurrence, capacity: 8, ..Options::default() },
                    time,
                    dk: 32,
                    dv: 32,
                    dtype,
                    ..Recipe::default()
                });
            }
        }
    }
    let errors: Vec<f64> = recipes
        .par_iter()
        .map(|recipe| {
            let case = recipe.draw(first_seed());
            let problem = case.problem().unwrap();
            judge(&problem, &engine.forward(&problem).unwrap(), &case.describe(), &record)
        })
        .collect();
    for (pair, recipes) in errors.chunks_exact(2).zip(recipes.chunks_exact(2)) {
        let growth = pair[1] / pair[0];
        println!(
            "{} {:?}: o {:.2e}, {:.2e}",
            recipes[0].dtype, recipes[0].options.recurrence, pair[0], pair[1]
        );
        record.take("growth of o from 4096 to 65536", growth);
        assert!(growth <= 1.5, "{}: o {pair:?}", recipes[0].dtype);
    }
}

#[test]
fn own_log() {
    let Some(engine) = engine() else { return };
    let record = Record::of("own_log");
    let options = Options { capacity: 4, ..Options::default() };
    let recipe = Recipe { options, time: 90, value_heads: 2, resumed: true, ..Recipe::default() };
    for dtype in DTYPES {
        let case = Recipe { dtype, ..recipe.clone() }.draw(first_seed());
        let dims = case.problem().unwrap().shape().cache_dims();
        let mut log = vec![0; 90 * dims.value_heads];
        for row in 0..dims.rows() {
            let mut ledger = ledger_of(case.cache.as_ref(), row);
            for t in 0..90 {
                let choices =
                    (0..6).filter(|&event| ledger.allows(event, dims.capacity)).collect::<Vec<u8>>();
                let event = choices[rand::random_range(0..choices.len())];
                ledger.apply(event, 0.0);
                log[t * dims.value_heads + row] = event;
            }
        }
        let mut inputs = case.inputs();
        inputs.events = Some(&log);
        let problem = Problem::new(&case.recipe.options, inputs).unwrap();
        judge(&problem, &Poisoned::run(engine, &problem), &case.describe(), &record);

        // One that cannot happen is named, as by every engine.
        log[0] = 250;
        let mut inputs = case.inputs();
        inputs.events = Some(&log);
        let problem = Problem::new(&case.recipe.options, inputs).unwrap();
        let error = engine.forward(&problem).unwrap_err();
        assert_eq!(error, dla::cpu::Engine.forward(&problem).unwrap_err());
    }
}

#[test]
fn random_cases() {
    let Some(engine) = engine() else { return };
    let record = Record::of("random_cases");
    let count = if small() { 2 } else { 48 };
    (first_seed()..first_seed() + count).into_par_iter().for_each(|seed| {
        let case = Case::random(seed);
        let problem = case.problem().unwrap();
        judge(&problem, &engine.forward(&problem).unwrap(), &case.describe(), &record);
    });
}

/// Offsets that name one sequence of all tokens, whole chunks of them: no block has more than that sequence.
#[test]
fn a_lone_packed_sequence() {
    let Some(engine) = engine() else { return };
    let record = Record::of("a_lone_packed_sequence");
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            let recipe = Recipe {
                options: Options { recurrence, read: Read::Routed, ..Options::default() },
                time: 64,
                packed: Some(vec![64]),
                heads: 3,
                value_heads: 9,
                dk: 64,
                dv: 64,
                dtype,
                ..Recipe::default()
            };
            let case = recipe.draw(first_seed());
            let problem = case.problem().unwrap();
            judge(&problem, &engine.forward(&problem).unwrap(), &case.describe(), &record);
        }
    }
}

/// Two runs, another stream, another order, the host's way in and a replayed graph all give the same bits.
#[test]
fn same_bits_however_it_is_run() {
    let Some(engine) = engine() else { return };
    let _record = Record::of("same_bits_however_it_is_run");
    let own = Engine::new(0).unwrap();
    for (index, recipe) in every_kernel_recipes().iter().enumerate() {
        let case = recipe.draw(first_seed() + index as u64);
        let (problem, name) = (case.problem().unwrap(), case.describe());
        let arrays = Poisoned::new(&own, &problem);
        arrays.launch(&own);
        let first = arrays.read(&own, &problem);
        arrays.poison(&own);
        arrays.launch(&own);
        assert_same(&first, &arrays.read(&own, &problem), &name);
        assert_same(&first, &engine.forward(&problem).unwrap(), &name);

        // The stages one after another, timed.
        arrays.poison(&own);
        let timeline = own.timeline().unwrap();
        // SAFETY: as in `launch`.
        unsafe {
            own.launch(&arrays.plan, &arrays.inputs, &arrays.outputs, arrays.workspace(), Some(&timeline))
        }
        .unwrap();
        assert!(timeline.stage_ms().unwrap().iter().all(|&ms| (0.0..1e4).contains(&ms)));
        assert_same(&first, &arrays.read(&own, &problem), &name);

        let graph = Graph::capture(&own, || arrays.launch(&own));
        for _ in 0..2 {
            arrays.poison(&own);
            graph.launch(&own);
            assert_same(&first, &arrays.read(&own, &problem), &name);
        }
    }
}

/// A captured and instantiated graph.
struct Graph {
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

impl Graph {
    fn capture(engine: &Engine, work: impl FnOnce()) -> Self {
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        let stream = engine.raw_stream();
        engine.synchronize().unwrap();
        // SAFETY: stream and context are the engine's; handles are used after they were written.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            sys::cuStreamBeginCapture_v2(stream, mode).result().unwrap();
            work();
            sys::cuStreamEndCapture(stream, &mut graph).result().unwrap();
            sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().unwrap();
        }
        Graph { graph, executable }
    }

    fn launch(&self, engine: &Engine) {
        // SAFETY: instantiated above.
        unsafe { sys::cuGraphLaunch(self.executable, engine.raw_stream()).result().unwrap() };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made above, destroyed once.
        unsafe {
            sys::cuGraphExecDestroy(self.executable);
            sys::cuGraphDestroy(self.graph);
        }
    }
}

/// Every wrong argument is a typed error before anything is launched, and the context goes on working.
#[test]
fn wrong_arguments() {
    let Some(engine) = engine() else { return };
    let _record = Record::of("wrong_arguments");
    let delta = Options { recurrence: Recurrence::GatedDelta, capacity: 4, ..Options::default() };
    let case = Recipe { options: delta, dtype: Dtype::Bf16, resumed: true, ..Recipe::default() }.draw(1);
    let problem = case.problem().unwrap();
    let arrays = Poisoned::new(engine, &problem);
    let expect = |inputs: RawInputs, outputs: RawOutputs, workspace: (u64, usize), text: &str| {
        // SAFETY: refused before anything is launched.
        let result = unsafe { engine.launch(&arrays.plan, &inputs, &outputs, workspace, None) };
        let error = result.expect_err(text).to_string();
        assert!(error.contains(text), "{error}; expected {text}");
    };
    let (inputs, outputs, workspace) = (arrays.inputs, arrays.outputs, arrays.workspace());
    let host = Box::new([0f32; 64]);
    let initial = inputs.cache.unwrap();
    expect(RawInputs { q: 0, ..inputs }, outputs, workspace, "q: missing");
    expect(RawInputs { beta: 0, ..inputs }, outputs, workspace, "beta: missing");
    expect(
        RawInputs { k: inputs.k + 8, ..inputs },
        outputs,
        workspace,
        "k: expected an address that is a multiple",
    );
    expect(
        RawInputs { tau: inputs.tau + 2, ..inputs },
        outputs,
        workspace,
        "tau: expected an address that is a",
    );
    let on_host = host.as_ptr() as u64 / 16 * 16;
    expect(RawInputs { v: on_host, ..inputs }, outputs, workspace, "v: expected an address of GPU 0, got");
    expect(RawInputs { lambda_columns: 3, ..inputs }, outputs, workspace, "lambda: expected shape");
    expect(inputs, RawOutputs { o: outputs.o + 2, ..outputs }, workspace, "o: expected an address");
    expect(inputs, RawOutputs { events: 0, ..outputs }, workspace, "events: missing");
    expect(inputs, RawOutputs { cache: None, ..outputs }, workspace, "final cache: absent");
    expect(inputs, RawOutputs { cache: Some(initial), ..outputs }, workspace, "final cache: expected memory");
    expect(inputs, outputs, (workspace.0, workspace.1 - 1), "workspace: expected at least");
    expect(inputs, outputs, (workspace.0 + 4, workspace.1), "workspace: expected an address");
    expect(inputs, outputs, (0, workspace.1), "workspace: missing");

    let plan = |shape: Shape, options: &Options| {
        let call = Call { options, shape, dtype: Dtype::F16, final_cache: false };
        engine.plan(&call).expect_err("a wrong shape")
    };
    let (shape, options) = (*problem.shape(), problem.options());
    assert_eq!(plan(Shape { dk: 12, ..shape }, options), Error::HeadSize { name: "dk", given: 12 });
    assert_eq!(plan(Shape { dv: 264, ..shape }, options), Error::HeadSize { name: "dv", given: 264 });
    assert!(matches!(plan(Shape { capacity: 65, ..shape }, options), Error::Option { name: "capacity", .. }));
    let many = Shape { batch: 1 << 40, time: 64, sequences: 1 << 30, ..shape };
    assert!(matches!(plan(many, options), Error::Limit { .. }));
    assert!(matches!(engine.allocate(1 << 46), Err(Error::OutOfMemory { .. })));
    let odd = Recipe { dk: 12, ..Recipe::default() }.draw(1);
    let error = engine.forward(&odd.problem().unwrap()).unwrap_err();
    assert_eq!(error, Error::HeadSize { name: "dk", given: 12 });
    assert!(matches!(Engine::new(4096), Err(Error::NoDevice { given: 4096, .. })));
    assert!(matches!(
        engine.backward(&problem, &[], &case.upstream()),
        Err(Error::Shape { name: "events", .. })
    ));

    // The context is as usable as before.
    arrays.launch(engine);
    judge(
        &problem,
        &arrays.read(engine, &problem),
        "after wrong arguments",
        &Record::of("after_wrong_arguments"),
    );
}

/// Without room for the final cache, the other results are the same.
#[test]
fn without_a_final_cache() {
    let Some(engine) = engine() else { return };
    let _record = Record::of("without_a_final_cache");
    let recurrences = [Recurrence::Gated, Recurrence::GatedDelta];
    // One window, and two.
    let times = if small() { vec![130] } else { vec![130, 5000] };
    let calls = times.iter().flat_map(|&time| {
        recurrences.into_iter().flat_map(move |recurrence| {
            [Read::Given, Read::Routed].into_iter().map(move |read| (time, recurrence, read))
        })
    });
    for (time, recurrence, read) in calls {
        let options = Options { capacity: 5, read, recurrence, ..Options::default() };
        let case = Recipe { options, time, dtype: Dtype::Bf16, resumed: true, ..Recipe::default() }.draw(2);
        let problem = case.problem().unwrap();
        let mut arrays = Poisoned::new(engine, &problem);
        arrays.launch(engine);
        let whole = arrays.read(engine, &problem);
        arrays.plan = engine.plan(&Call { final_cache: false, ..Call::of(&problem) }).unwrap();
        arrays.outputs.cache = None;
        arrays.workspace = Array::poisoned(engine, arrays.plan.workspace_bytes());
        arrays.poison(engine);
        arrays.launch(engine);
        let part = arrays.read(engine, &problem);
        assert!(part.cache.states.iter().all(|x| x.is_nan()), "the cache was written");
        assert_same(&Forward { cache: whole.cache.clone(), ..part }, &whole, "without a final cache");
    }
}

/// Another library's stream: the default stream of the primary context, and one of cudarc's.
#[test]
fn other_streams() {
    let Some(engine) = engine() else { return };
    let _record = Record::of("other_streams");
    let case = Recipe { time: 70, dtype: Dtype::F16, ..Recipe::default() }.draw(first_seed());
    let problem = case.problem().unwrap();
    let expected = engine.forward(&problem).unwrap();
    let default = engine.context().default_stream();
    assert_same(
        &Engine::from_stream(default).unwrap().forward(&problem).unwrap(),
        &expected,
        "default stream",
    );
    let stream = engine.context().new_stream().unwrap();
    // SAFETY: the stream outlives the engine.
    let raw = unsafe { Engine::from_raw_stream(0, stream.cu_stream()) }.unwrap();
    assert_same(&raw.forward(&problem).unwrap(), &expected, "a stream of cudarc's");
    drop(raw);
    // SAFETY: null is the default stream.
    let null = unsafe { Engine::from_raw_stream(0, std::ptr::null_mut()) }.unwrap();
    assert_same(&null.forward(&problem).unwrap(), &expected, "null");
}

/// More sequences than a grid's second or third dimension counts.
#[test]
fn seventy_thousand_sequences_of_one_token() {
    let Some(engine) = engine() else { return };
    let record = Record::of("seventy_thousand_sequences_of_one_token");
    if small() {
        return;
    }
    for (recurrence, read) in [(Recurrence::Gated, Read::Routed), (Recurrence::GatedDelta, Read::Given)] {
        let options = Options { recurrence, read, capacity: 2, ..Options::default() };
        let recipe = Recipe { options, batch: 70_000, time: 1, dtype: Dtype::Bf16, ..Recipe::default() };
        let case = recipe.draw(first_seed());
        let problem = case.problem().unwrap();
        judge(&problem, &engine.forward(&problem).unwrap(), &case.describe(), &record);
    }
}

/// (1, 2097152, 8, 128, 128) in bf16: runs, decides as it should, ends finite, and begins as a short one does.
#[test]
fn two_million_tokens() {
    let Some(engine) = engine() else { return };
    if !is_set("DLA_CUDA_LONG") {
        println!("SKIPPED: 2,097,152 tokens: needs DLA_CUDA_LONG=1 and 80 GB");
        return;
    }
    let _record = Record::of("two_million_tokens");
    let (piece, pieces, heads, d, capacity) = (65_536, 32, 8, 128, 30);
    let options = Options { capacity, ..Options::default() };
    let recipe = Recipe {
        options: options.clone(),
        time: piece,
        heads,
        value_heads: heads,
        dk: d,
        dv: d,
        dtype: Dtype::Bf16,
        ..Recipe::default()
    };
    let case = recipe.draw(first_seed());
    let problem = case.problem().unwrap();
    let short = engine.forward(&problem).unwrap();

    let time = piece * pieces;
    let shape = Shape { time, ..*problem.shape() };
    let repeat = |x: &[u8]| {
        let memory = engine.allocate(x.len() * pieces).unwrap();
        (0..pieces).for_each(|i| engine.upload(&memory, i * x.len(), x).unwrap());
        memory
    };
    let bytes = |x: &Buffer| match x {
        Buffer::Bf16(x) => bytemuck::cast_slice::<_, u8>(x).to_vec(),
        _ => unreachable!("drawn in bf16"),
    };
    let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| repeat(&bytes(x)));
    let floats = |x: &Option<Vec<f32>>| repeat(bytemuck::cast_slice(x.as_ref().unwrap()));
    let (g, lambda) = (floats(&case.g), floats(&case.lambda));
    let tau = engine.allocate(heads * 4).unwrap();
    engine.upload(&tau, 0, bytemuck::cast_slice(&vec![0.6f32; heads])).unwrap();
    let plan_of =
        engine.plan(&Call { options: &options, shape, dtype: Dtype::Bf16, final_cache: false }).unwrap();
    let workspace = engine.allocate(plan_of.workspace_bytes()).unwrap();
    let o = engine.allocate(time * heads * d * 2).unwrap();
    let drift = engine.allocate(time * heads * 4).unwrap();
    let events = engine.allocate(time * heads).unwrap();
    for memory in [&o, &drift, &events, &workspace] {
        engine.fill(memory, POISON).unwrap();
    }
    let inputs = RawInputs {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        g: g.address(),
        lambda: lambda.address(),
        lambda_columns: capacity,
        tau: tau.address(),
        ..RawInputs::default()
    };
    let outputs = RawOutputs {
        o: o.address(),
        drift: drift.address(),
        events: events.address(),
        ..RawOutputs::default()
    };
    let start = Instant::now();
    // SAFETY: every array is of the extents of `shape`.
    unsafe { engine.launch(&plan_of, &inputs, &outputs, (workspace.address(), workspace.bytes()), None) }
        .unwrap();
    engine.synchronize().unwrap();
    println!("2,097,152 tokens x 8 heads: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);

    let mut bits = vec![0u16; piece * heads * d];
    engine.download(&o, 0, bytemuck::cast_slice_mut(&mut bits)).unwrap();
    let first: Vec<u16> = bytemuck::cast_slice(&bytes(&short.o)).to_vec();
    assert!(bits == first, "the first tokens are not those of a short sequence");
    for i in 0..pieces {
        engine.download(&o, i * piece * heads * d * 2, bytemuck::cast_slice_mut(&mut bits)).unwrap();
        assert!(bits.iter().all(|&x| half::bf16::from_bits(x).is_finite()), "piece {i}");
    }
    let (mut scores, mut log) = (vec![0f32; time * heads], vec![0u8; time * heads]);
    engine.download(&drift, 0, bytemuck::cast_slice_mut(&mut scores)).unwrap();
    engine.download(&events, 0, &mut log).unwrap();
    (0..heads).into_par_iter().for_each(|head| {
        let scores: Vec<f32> = scores.iter().skip(head).step_by(heads).copied().collect();
        let log: Vec<u8> = log.iter().skip(head).step_by(heads).copied().collect();
        let planned = plan(&scores, 0.6, capacity, Merge::Density, &mut Ledger::default());
        assert!(log == planned, "events of head {head}");
    });
}

/// A fresh process: context, kernels and the first call. The rest of this test runs in the child that it starts.
#[test]
fn first_call_is_quick() {
    if std::env::var_os("DLA_CUDA_FIRST").is_some() {
        let start = Instant::now();
        let engine = Engine::new(0).unwrap();
        let context_ms = start.elapsed().as_secs_f64() * 1e3;
        let case = Recipe { time: 200, dtype: Dtype::Bf16, ..Recipe::default() }.draw(1);
        let problem = case.problem().unwrap();
        let start = Instant::now();
        engine.forward(&problem).unwrap();
        let first_ms = start.elapsed().as_secs_f64() * 1e3;
        println!("first call: {context_ms:.1} {first_ms:.1} ms");
        return;
    }
    if engine().is_none() {
        return;
    }
    let record = Record::of("first_call_is_quick");
    if small() {
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "first_call_is_quick", "--nocapture"])
        .env("DLA_CUDA_FIRST", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.split_once("first call: ")).expect(&text).1;
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    println!("context {} ms, first call with its kernels {} ms", numbers[0], numbers[1]);
    record.take("context_ms", numbers[0]);
    record.take("first_call_ms", numbers[1]);
    assert!(numbers[1] <= 100.0, "{line}");
}
