//! What the tests of decoding share: sequences drawn whole, taken piece by piece through entries, and judged by the f64
//! reference over all that was taken, with the engine's own event log.

use dla::check::{Case, Recipe, relative_error};
use dla::events::{Ledger, plan};
use dla::reference::{self, Arguments};
use dla::{
    Buffer, Cache, Dtype, Entries, EntrySpec, Inputs, MOST_STEP_TOKENS, Merge, Options, Problem, Read,
    Recurrence, Route, SlotOrder, StateDtype, Step, Tensor,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

/// What makes entries.
pub struct Maker {
    pub name: &'static str,
    pub states: &'static [StateDtype],
    pub make: fn(EntrySpec) -> dla::Result<Box<dyn Entries>>,
}

impl Maker {
    /// Largest relative error of o, lambda and the cache.
    pub fn bound(&self, dtype: Dtype, states: StateDtype) -> f64 {
        match (self.name, dtype, states) {
            (_, _, StateDtype::Bf16) => 1e-2,
            ("cpu", Dtype::F32, _) => 1e-5,
            ("cpu", Dtype::Bf16, _) => 1.0 / 256.0 + 1e-5,
            ("cpu", Dtype::F16, _) => 1.0 / 2048.0 + 1e-5,
            (_, Dtype::F32, _) => 1e-4,
            (_, Dtype::F16, _) => 1e-3,
            (_, Dtype::Bf16, _) => 4e-3,
        }
    }
}

/// The largest errors of a test; of one on a GPU written down for the evidence.
pub struct Record {
    pub name: String,
    /// Card and driver, for the evidence.
    pub card: Option<(String, String)>,
    pub worst: Mutex<BTreeMap<String, f64>>,
}

impl Record {
    pub fn of(test: &str, maker: &Maker) -> Self {
        let card = (maker.name == "cuda").then(|| {
            let engine = dla::cuda::Engine::new(0).unwrap();
            (engine.card().unwrap(), engine.driver_version().unwrap())
        });
        Record { name: format!("{test}_{}", maker.name), card, worst: Mutex::default() }
    }

    pub fn take(&self, tensor: &str, error: f64) {
        let mut worst = self.worst.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let held = worst.entry(tensor.to_owned()).or_default();
        *held = if error.is_nan() { f64::INFINITY } else { held.max(error) };
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let worst = self.worst.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        println!("{}: {worst:?}", self.name);
        let (Some(folder), Some((card, driver))) = (std::env::var_os("DLA_EVIDENCE"), &self.card) else {
            return;
        };
        let errors: Vec<String> =
            worst.iter().map(|(tensor, &error)| format!("{tensor:?}: {:e}", error.min(f64::MAX))).collect();
        let line = format!(
            "{{\"name\": {:?}, \"card\": {card:?}, \"driver\": {driver:?}, \"source_hash\": {:?}, \"passed\": {}, \"worst\": {{{}}}}}\n",
            self.name,
            dla::cuda::SOURCE_HASH,
            !std::thread::panicking(),
            errors.join(", ")
        );
        let path = std::path::Path::new(&folder).join(format!("test-{}.json", self.name));
        if let Err(error) = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, line)) {
            println!("{}: {error}", path.display());
        }
    }
}

/// A sequence, drawn whole, and what an engine has made of it so far.
pub struct Sequence {
    pub case: Case,
    pub at: usize,
    pub o: Vec<f64>,
    pub drift: Vec<f32>,
    pub events: Vec<u8>,
    pub lambda: Vec<f64>,
}

impl Sequence {
    /// Sequences of one recipe, which share the route's slope and bias as a model's heads do.
    pub fn draw(recipe: &Recipe, seeds: impl Iterator<Item = u64>) -> Vec<Sequence> {
        let mut route = None;
        seeds
            .map(|seed| {
                let mut case = recipe.draw(seed);
                if let Some(own) = &mut case.route {
                    let (slope, bias) = route.get_or_insert_with(|| (own.slope.clone(), own.bias.clone()));
                    (own.slope, own.bias) = (slope.clone(), bias.clone());
                }
                Sequence { case, at: 0, o: vec![], drift: vec![], events: vec![], lambda: vec![] }
            })
            .collect()
    }

    pub fn left(&self) -> usize {
        self.case.recipe.time - self.at
    }

    pub fn take(&mut self, step: &Step, row: usize, rows: usize) {
        let part = |len: usize| row * len / rows..(row + 1) * len / rows;
        self.drift.extend(&step.drift[part(step.drift.len())]);
        self.events.extend(&step.events[part(step.events.len())]);
        let o = step.o.to_f64();
        self.o.extend(&o[part(o.len())]);
        if let Some(lambda) = &step.lambda {
            self.lambda.extend(lambda[part(lambda.len())].iter().map(|&x| f64::from(x)));
        }
        self.at += step.drift.len() / rows / self.case.recipe.value_heads;
    }

    /// Judges what has been made so far, and the entry's cache.
    pub fn judge(&self, cache: &Cache, bound: f64, record: &Record) {
        let recipe = &self.case.recipe;
        let name = format!("{}, {} tokens", self.case.describe(), self.at);
        let batch = Batch::of(&[(&self.case, 0..self.at)]);
        let problem = Problem::new(&recipe.options, batch.inputs()).unwrap();
        let expected = reference::forward(&problem, &Arguments::of(&problem), Some(&self.events), None);
        let heads = recipe.value_heads;
        for head in 0..heads {
            let drift: Vec<f32> = self.drift.iter().skip(head).step_by(heads).copied().collect();
            let events: Vec<u8> = self.events.iter().skip(head).step_by(heads).copied().collect();
            let mut ledger = Ledger::default();
            let tau = recipe.options.tau.of(head);
            let planned = plan(&drift, tau, recipe.options.capacity, recipe.options.merge, &mut ledger);
            assert_eq!(events, planned, "{name}: events of head {head}");
            let m = ledger.len();
            assert_eq!(cache.len[head] as usize, m, "{name}");
            let slots = head * recipe.options.capacity..head * recipe.options.capacity + m;
            assert_eq!(&cache.tokens[slots.clone()], ledger.tokens(), "{name}");
            assert_eq!(&cache.drift[slots], ledger.drift(), "{name}");
        }
        let off = self.drift.iter().zip(&expected.drift).map(|(&x, r)| (f64::from(x) - r).abs());
        let off = off.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst });
        record.take("drift", off);
        assert!(off <= 3e-3, "{name}: drift off by {off:.2e}");
        let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        let judge = |tensor: &str, x: &[f64], reference: &[f64]| {
            let (error, at) = relative_error(x, reference);
            record.take(tensor, error);
            assert!(error <= bound, "{name}: {tensor} off by {error:.2e}, most at element {at}");
        };
        judge("o", &self.o, &expected.o);
        judge("cache_states", &f64s(&cache.states), &expected.cache.states);
        judge("cache_open", &f64s(&cache.open), &expected.cache.open);
        if let Some(lambda) = &expected.lambda {
            judge("lambda", &self.lambda, lambda);
            judge("cache_keys", &f64s(cache.keys.as_ref().unwrap()), &expected.cache.keys);
        }
    }
}

/// Arguments of a call: stretches of sequences, as many tokens each, side by side.
pub struct Batch {
    pub recipe: Recipe,
    pub rows: usize,
    pub time: usize,
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    /// g, beta, lambda, logits.
    pub rest: [Option<Vec<f32>>; 4],
    pub slope: Vec<f32>,
    pub bias: Vec<f32>,
}

pub fn join(dtype: Dtype, parts: &[(&Buffer, Range<usize>)], width: usize) -> Buffer {
    macro_rules! joined {
        ($kind:ident) => {
            Buffer::$kind(
                parts
                    .iter()
                    .flat_map(|(x, range)| match x {
                        Buffer::$kind(x) => x[range.start * width..range.end * width].to_vec(),
                        _ => unreachable!("drawn in one dtype"),
                    })
                    .collect(),
            )
        };
    }
    match dtype {
        Dtype::F32 => joined!(F32),
        Dtype::Bf16 => joined!(Bf16),
        Dtype::F16 => joined!(F16),
    }
}

impl Batch {
    pub fn of(parts: &[(&Case, Range<usize>)]) -> Batch {
        let recipe = parts[0].0.recipe.clone();
        let Recipe { heads, value_heads, dk, dv, dtype, .. } = recipe;
        let columns = recipe.options.capacity + recipe.extra_columns;
        let rows = |pick: fn(&Case) -> &Buffer, width: usize| {
            let parts: Vec<_> = parts.iter().map(|(case, range)| (pick(case), range.clone())).collect();
            join(dtype, &parts, width)
        };
        let floats = |pick: fn(&Case) -> Option<&Vec<f32>>, width: usize| {
            pick(parts[0].0)?;
            let part = |(case, range): &(&Case, Range<usize>)| {
                pick(case).unwrap()[range.start * width..range.end * width].to_vec()
            };
            Some(parts.iter().flat_map(part).collect::<Vec<f32>>())
        };
        let route = parts[0].0.route.as_ref();
        Batch {
            rows: parts.len(),
            time: parts[0].1.len(),
            q: rows(|case| &case.q, heads * dk),
            k: rows(|case| &case.k, heads * dk),
            v: rows(|case| &case.v, value_heads * dv),
            rest: [
                floats(|case| case.g.as_ref(), value_heads),
                floats(|case| case.beta.as_ref(), value_heads),
                floats(|case| case.lambda.as_ref(), value_heads * columns),
                floats(|case| case.route.as_ref()?.logits.as_ref(), value_heads * columns),
            ],
            slope: route.map_or_else(Vec::new, |route| route.slope.clone()),
            bias: route.map_or_else(Vec::new, |route| route.bias.clone()),
            recipe,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        let Recipe { heads, value_heads, dk, dv, ref options, .. } = self.recipe;
        let (b, t, columns) = (self.rows, self.time, options.capacity + self.recipe.extra_columns);
        let mut inputs = Inputs::new(
            Tensor::new(&self.q, &[b, t, heads, dk]),
            Tensor::new(&self.k, &[b, t, heads, dk]),
            Tensor::new(&self.v, &[b, t, value_heads, dv]),
        );
        let [g, beta, lambda, logits] = &self.rest;
        inputs.g = g.as_ref().map(|g| Tensor::new(g, &[b, t, value_heads]));
        inputs.beta = beta.as_ref().map(|beta| Tensor::new(beta, &[b, t, value_heads]));
        inputs.lambda = lambda.as_ref().map(|x| Tensor::new(x, &[b, t, value_heads, columns]));
        inputs.route = (options.read == Read::Routed).then(|| Route {
            slope: Tensor::new(&self.slope, &[value_heads]),
            bias: Tensor::new(&self.bias, &[value_heads]),
            logits: logits.as_ref().map(|x| Tensor::new(x, &[b, t, value_heads, columns])),
        });
        inputs
    }
}

pub fn spec_of(recipe: &Recipe, entries: usize, states: StateDtype) -> EntrySpec {
    let Recipe { value_heads, dk, dv, ref options, .. } = *recipe;
    EntrySpec {
        entries,
        value_heads,
        capacity: options.capacity,
        dk,
        dv,
        recurrence: options.recurrence,
        read: options.read,
        states,
    }
}

/// The next `tokens` of sequences, each in its entry.
pub fn advance(
    cache: &mut dyn Entries,
    rows: &mut [(&mut Sequence, usize)],
    tokens: usize,
    prefill: bool,
) -> dla::Result<()> {
    let parts: Vec<_> = rows.iter().map(|(s, _)| (&s.case, s.at..s.at + tokens)).collect();
    let batch = Batch::of(&parts);
    let entries: Vec<usize> = rows.iter().map(|(_, entry)| *entry).collect();
    let problem = Problem::new(&batch.recipe.options, batch.inputs())?;
    let step = if prefill {
        cache.prefill(&problem, &entries, &entries)?
    } else {
        cache.step(&problem, &entries)?
    };
    let count = rows.len();
    for (row, (sequence, _)) in rows.iter_mut().enumerate() {
        sequence.take(&step, row, count);
    }
    Ok(())
}

/// Prefill in pieces, then steps of `tokens` each, a few sequences at once; judged at the end.
pub fn check_stream(
    maker: &Maker,
    recipe: &Recipe,
    states: StateDtype,
    pieces: &[usize],
    tokens: usize,
    record: &Record,
) {
    let mut sequences = Sequence::draw(recipe, 7..9);
    let mut cache = (maker.make)(spec_of(recipe, 3, states)).unwrap();
    let entries: Vec<usize> = sequences.iter().map(|_| cache.take().unwrap()).rev().collect();
    let mut rows: Vec<_> = sequences.iter_mut().zip(entries.iter().copied()).collect();
    for &piece in pieces {
        advance(cache.as_mut(), &mut rows, piece, true).unwrap();
    }
    while rows[0].0.left() > 0 {
        let tokens = tokens.min(rows[0].0.left());
        advance(cache.as_mut(), &mut rows, tokens, false).unwrap();
    }
    for (sequence, &entry) in sequences.iter().zip(&entries) {
        let held = cache.export(&[entry]).unwrap();
        sequence.judge(&held, maker.bound(recipe.dtype, states), record);
    }
}

pub const RECURRENCES: [Recurrence; 2] = [Recurrence::Gated, Recurrence::GatedDelta];

/// Every recurrence, read, merge rule and dtype, one to eight tokens at a time, from nothing and after a prefill of 18 or
/// 33 tokens, `time` tokens in all; `most` cases.
pub fn every_kind_of_step(maker: &Maker, most: usize, time: usize) {
    let record = Record::of("every_kind_of_step", maker);
    let mut at = 0;
    for &states in maker.states {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for recurrence in RECURRENCES {
                for read in [Read::Given, Read::Routed] {
                    for merge in [Merge::Density, Merge::Mass] {
                        let sizes = [(16, 24), (64, 64), (8, 8), (128, 128), (72, 40), (24, 136)];
                        let (dk, dv) = sizes[at % sizes.len()];
                        let options = Options {
                            recurrence,
                            read,
                            merge,
                            capacity: [30, 3, 2, 64, 1, 7][at / 2 % 6],
                            slot_order: [SlotOrder::OldestFirst, SlotOrder::NewestFirst][at / 3 % 2],
                            qk_l2norm: at % 5 == 2,
                            ..Options::default()
                        };
                        let recipe = Recipe {
                            options,
                            time,
                            heads: 1 + at % 2,
                            value_heads: 2,
                            dk,
                            dv,
                            dtype,
                            boundary_rate: [1.0, 0.25, 0.01][at % 3],
                            decay: [Some(0.1), None, Some(1.0), Some(50.0)][at / 3 % 4],
                            logits: at % 2 == 0,
                            extra_columns: at % 3,
                            ..Recipe::default()
                        };
                        let pieces: &[usize] = [&[][..], &[33], &[1, 17]][at % 3];
                        let tokens = [1, 1, 2, 3, 4, 8, 1, 5][at % 8];
                        check_stream(maker, &recipe, states, pieces, tokens, &record);
                        at += 1;
                        if at == most {
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// What happens to a server's sequences.
#[derive(Debug, Clone)]
pub enum Action {
    /// A sequence begins, or one that waits goes on, by a prefill of so many tokens at most.
    Prefill(usize, usize),
    /// Some sequences take a step of so many tokens.
    Step(u8, usize),
    /// A sequence moves to another entry.
    Move(usize),
    /// A sequence leaves for good, by way of its exported cache, and comes back.
    Leave(usize),
    /// A stranger takes an entry, writes, and goes.
    Stranger(usize),
}

pub fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        1 => (0usize..4, 1usize..40).prop_map(|(who, tokens)| Action::Prefill(who, tokens)),
        6 => (any::<u8>(), 1usize..=MOST_STEP_TOKENS).prop_map(|(who, tokens)| Action::Step(who, tokens)),
        1 => (0usize..4).prop_map(Action::Move),
        1 => (0usize..4).prop_map(Action::Leave),
        1 => (1usize..20).prop_map(Action::Stranger),
    ]
}

pub fn drawn_recipe() -> impl Strategy<Value = Recipe> {
    let options = (any::<[bool; 4]>(), prop::sample::select(vec![1usize, 2, 3, 8, 30])).prop_map(
        |([delta, mass, routed, newest], capacity)| Options {
            recurrence: RECURRENCES[usize::from(delta)],
            merge: if mass { Merge::Mass } else { Merge::Density },
            read: if routed { Read::Routed } else { Read::Given },
            slot_order: if newest { SlotOrder::NewestFirst } else { SlotOrder::OldestFirst },
            capacity,
            ..Options::default()
        },
    );
    let rate = prop::sample::select(vec![0.05, 0.4, 1.0]);
    (options, rate, any::<bool>()).prop_map(|(options, boundary_rate, decays)| Recipe {
        options,
        time: 80,
        heads: 1,
        value_heads: 2,
        dk: 16,
        dv: 24,
        boundary_rate,
        decay: decays.then_some(0.3),
        ..Recipe::default()
    })
}

pub fn run_actions(maker: &Maker, recipe: &Recipe, states: StateDtype, actions: &[Action], seed: u64) {
    let record = Record::of("joins_leaves_and_splits", maker);
    let mut sequences = Sequence::draw(recipe, seed..seed + 4);
    let mut stranger = Sequence::draw(recipe, seed + 4..seed + 5);
    let mut cache = (maker.make)(spec_of(recipe, 6, states)).unwrap();
    let mut entries: Vec<usize> = sequences.iter().map(|_| cache.take().unwrap()).collect();
    for action in actions {
        match *action {
            Action::Prefill(who, tokens) => {
                let sequence = &mut sequences[who];
                let tokens = tokens.min(sequence.left());
                if tokens > 0 {
                    advance(cache.as_mut(), &mut [(sequence, entries[who])], tokens, true).unwrap();
                }
            }
            Action::Step(who, tokens) => {
                let mut rows: Vec<_> = sequences
                    .iter_mut()
                    .zip(entries.iter().copied())
                    .enumerate()
                    .filter(|(i, (sequence, _))| who >> i & 1 == 1 && sequence.left() >= tokens)
                    .map(|(_, row)| row)
                    .collect();
                if who >> 7 == 1 {
                    rows.reverse();
                }
                if !rows.is_empty() {
                    advance(cache.as_mut(), &mut rows, tokens, false).unwrap();
                }
            }
            Action::Move(who) => {
                let to = cache.take().unwrap();
                cache.copy(entries[who], to).unwrap();
                cache.release(entries[who]).unwrap();
                entries[who] = to;
            }
            Action::Leave(who) => {
                let held = cache.export(&[entries[who]]).unwrap();
                cache.release(entries[who]).unwrap();
                entries[who] = cache.take().unwrap();
                cache.import(&[entries[who]], &held).unwrap();
            }
            Action::Stranger(tokens) => {
                let entry = cache.take().unwrap();
                stranger[0].at = 0;
                advance(cache.as_mut(), &mut [(&mut stranger[0], entry)], tokens, true).unwrap();
                cache.reset(entry).unwrap();
                assert_eq!(cache.export(&[entry]).unwrap().len, vec![0; recipe.value_heads]);
                cache.release(entry).unwrap();
            }
        }
    }
    for (sequence, &entry) in sequences.iter().zip(&entries) {
        if sequence.at > 0 {
            let held = cache.export(&[entry]).unwrap();
            sequence.judge(&held, maker.bound(recipe.dtype, states), &record);
        }
    }
}
