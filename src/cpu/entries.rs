//! **step** on entries: tokens one after another, slots where they stand. Under the gated rule a slot that is not
//! written is not touched: its decay is a factor beside it.

use super::matrix::{add_scaled, dot_f64, scale};
use super::row::{Chunk, Row};
use super::segment::drift;
use super::step::{add_outer, transposed_times, weights};
use crate::cache::Cache;
use crate::engine::{Engine as _, Forward, Step};
use crate::entries::{EntrySpec, Roster, StateDtype};
use crate::error::{Error, Result};
use crate::events::{EXTEND, Ledger, MERGE};
use crate::options::{Read, Recurrence};
use crate::problem::{Problem, Shape};
use crate::tensor::Buffer;
use rayon::prelude::*;

/// A cache for decoding in this machine's memory, states in f32.
#[derive(Debug, Clone)]
pub struct Entries {
    roster: Roster,
    /// `[entries, HV]`.
    rows: Vec<Held>,
}

/// What one entry and value head holds. Nothing is allocated before it begins.
#[derive(Debug, Clone, Default)]
struct Held {
    ledger: Ledger,
    /// Place of every slot, oldest first; then the places that are free.
    order: Vec<usize>,
    /// By place, relative to `e^log`, `[M, dk, dv]`.
    states: Vec<f32>,
    log: Vec<f64>,
    /// Key sums by place, `[M, dk]`; none where reads are given.
    keys: Vec<f32>,
    /// R, `[dk, dv]`.
    open: Vec<f32>,
}

/// What one token gives.
struct Token {
    o: Vec<f32>,
    drift: f32,
    event: u8,
    /// Read weights of the slots held, oldest first.
    weights: Vec<f32>,
}

impl Entries {
    /// `spec.entries` free entries.
    ///
    /// # Errors
    /// [`Error::Option`] and [`Error::Shape`] where the spec is out of range, or asks for bf16.
    pub fn new(spec: EntrySpec) -> Result<Self> {
        if spec.states != StateDtype::F32 {
            return Err(Error::Option {
                name: "states",
                expected: "f32 on the CPU".to_owned(),
                given: "bf16".to_owned(),
            });
        }
        let rows = vec![Held::default(); spec.entries * spec.value_heads];
        Ok(Entries { roster: Roster::new(spec)?, rows })
    }

    fn rows_of(&self, entry: usize) -> std::ops::Range<usize> {
        let heads = self.roster.spec.value_heads;
        entry * heads..(entry + 1) * heads
    }

    fn clear(&mut self, entry: usize) {
        let range = self.rows_of(entry);
        self.rows[range].fill(Held::default());
    }

    /// The entries of a checked call, chronological.
    fn gather(&self, entries: &[usize]) -> Cache {
        let spec = &self.roster.spec;
        let dims = spec.dims(entries.len());
        let mut cache = Cache::empty(dims, spec.read);
        let held = entries.iter().flat_map(|&entry| &self.rows[self.rows_of(entry)]);
        for (row, held) in held.enumerate() {
            let m = held.ledger.len();
            if m == 0 {
                continue;
            }
            cache.len[row] = m as u32;
            cache.tokens[row * dims.capacity..][..m].copy_from_slice(held.ledger.tokens());
            cache.drift[row * dims.capacity..][..m].copy_from_slice(held.ledger.drift());
            cache.open[row * dims.state()..][..dims.state()].copy_from_slice(&held.open);
            for (i, &place) in held.order[..m].iter().enumerate() {
                let state = &mut cache.states[row * dims.bank() + i * dims.state()..][..dims.state()];
                let factor = held.log[place].exp() as f32;
                state.copy_from_slice(&held.states[place * dims.state()..][..dims.state()]);
                scale(state, factor);
                if let Some(keys) = &mut cache.keys {
                    keys[row * dims.key_bank() + i * dims.dk..][..dims.dk]
                        .copy_from_slice(&held.keys[place * dims.dk..][..dims.dk]);
                }
            }
        }
        cache
    }

    fn scatter(&mut self, entries: &[usize], cache: &Cache) {
        let (dims, heads) = (cache.dims, cache.dims.value_heads);
        for (n, &entry) in entries.iter().enumerate() {
            self.clear(entry);
            for head in 0..heads {
                let (row, m) = (n * heads + head, cache.len[n * heads + head] as usize);
                if m == 0 {
                    continue;
                }
                let held = &mut self.rows[entry * heads + head];
                held.begin(&self.roster.spec);
                let slots = row * dims.capacity..(row + 1) * dims.capacity;
                held.ledger = Ledger::resume(m, &cache.tokens[slots.clone()], &cache.drift[slots]);
                held.states[..m * dims.state()]
                    .copy_from_slice(&cache.states[row * dims.bank()..][..m * dims.state()]);
                held.open.copy_from_slice(&cache.open[row * dims.state()..][..dims.state()]);
                if let Some(keys) = &cache.keys {
                    let width = held.keys.len();
                    held.keys.copy_from_slice(&keys[row * dims.key_bank()..][..width]);
                }
            }
        }
    }
}

impl Held {
    fn begin(&mut self, spec: &EntrySpec) {
        let state = spec.dk * spec.dv;
        let keys = if spec.read == Read::Routed { spec.capacity * spec.dk } else { 0 };
        *self = Held {
            ledger: Ledger::default(),
            order: (0..spec.capacity).collect(),
            states: vec![0.0; spec.capacity * state],
            log: vec![0.0; spec.capacity],
            keys: vec![0.0; keys],
            open: vec![0.0; state],
        };
    }

    /// Token t of a row: steps 1 to 6 of OPERATOR.md, section 3.
    fn take(&mut self, row: &Row, t: usize, chunk: &Chunk) -> Token {
        let Shape { dk, dv, capacity, .. } = *row.shape();
        let options = row.problem.options();
        let state = dk * dv;
        let (q, k, v) = (&chunk.q[t * dk..][..dk], &chunk.k[t * dk..][..dk], &chunk.v[t * dv..][..dv]);
        let (g, beta) = (chunk.g[t], chunk.beta[t]);
        let decay = g.exp() as f32;

        // Drift against the open segment, then the event: neither asks the slots' states.
        let mut product = vec![0.0; dv];
        transposed_times(&self.open, k, &mut product);
        let energy = dot_f64(k, k) * dot_f64(v, v);
        let score = drift(dot_f64(&product, v), energy, dot_f64(&self.open, &self.open));
        let event = match row.problem.inputs().events {
            Some(events) => events[row.at(t)],
            None => self.ledger.decide(score, options.tau.of(row.head), capacity, options.merge),
        };
        let held = self.ledger.len();
        self.ledger.apply(event, score);
        let m = self.ledger.len();
        if event == EXTEND {
            scale(&mut self.open, decay);
        } else {
            self.open.fill(0.0);
        }
        add_outer(&mut self.open, 1.0, k, v);

        // Transition.
        for &place in &self.order[..held] {
            match options.recurrence {
                Recurrence::Gated => self.log[place] += g,
                Recurrence::GatedDelta => {
                    let slot = &mut self.states[place * state..][..state];
                    transposed_times(slot, k, &mut product);
                    for (row, &k) in slot.chunks_exact_mut(dv).zip(k) {
                        row.iter_mut()
                            .zip(&product)
                            .for_each(|(s, held)| *s = decay * (*s - beta * k * held));
                    }
                }
            }
        }
        // Merge: the older slot's place takes both, the other is free.
        if event >= MERGE {
            let i = usize::from(event - MERGE);
            let (into, from) = (self.order[i], self.order.remove(i + 1));
            self.materialise(into, state);
            let factor = self.log[from].exp() as f32;
            let [target, source] = two(&mut self.states, state, into, from);
            add_scaled(target, factor, source);
            if !self.keys.is_empty() {
                let [target, source] = two(&mut self.keys, dk, into, from);
                add_scaled(target, 1.0, source);
            }
            self.order.push(from);
        }
        // Write.
        let place = self.order[m - 1];
        let slot = place * state..(place + 1) * state;
        if event == EXTEND {
            self.materialise(place, state);
        } else {
            self.states[slot.clone()].fill(0.0);
            self.log[place] = 0.0;
        }
        let strength = if options.recurrence == Recurrence::Gated { 1.0 } else { beta };
        add_outer(&mut self.states[slot], strength, k, v);
        if !self.keys.is_empty() {
            let keys = &mut self.keys[place * dk..][..dk];
            if event != EXTEND {
                keys.fill(0.0);
            }
            add_scaled(keys, 1.0, k);
        }

        // Read.
        let keys = |i: usize| &self.keys[self.order[i] * dk..][..dk];
        let weights = weights(row, t, q, keys, &self.ledger);
        let mut o = vec![0.0; dv];
        for (&place, &weight) in self.order.iter().zip(&weights) {
            let factor = row.problem.scale() * weight * self.log[place].exp() as f32;
            transposed_times(&self.states[place * state..][..state], q, &mut product);
            add_scaled(&mut o, factor, &product);
        }
        Token { o, drift: score, event, weights }
    }

    /// Takes the factor of a place into its state.
    fn materialise(&mut self, place: usize, state: usize) {
        if self.log[place] != 0.0 {
            let factor = self.log[place].exp() as f32;
            scale(&mut self.states[place * state..][..state], factor);
            self.log[place] = 0.0;
        }
    }
}

/// Rows `a` and `b` of a matrix of rows of `width`; they differ.
fn two(x: &mut [f32], width: usize, a: usize, b: usize) -> [&mut [f32]; 2] {
    let (low, high) = x.split_at_mut(a.max(b) * width);
    let (first, second) = (&mut low[a.min(b) * width..][..width], &mut high[..width]);
    if a < b { [first, second] } else { [second, first] }
}

impl crate::entries::Entries for Entries {
    fn spec(&self) -> &EntrySpec {
        &self.roster.spec
    }

    fn take(&mut self) -> Result<usize> {
        let entry = self.roster.take()?;
        self.clear(entry);
        Ok(entry)
    }

    fn release(&mut self, entry: usize) -> Result<()> {
        self.roster.release(entry)?;
        self.clear(entry);
        Ok(())
    }

    fn reset(&mut self, entry: usize) -> Result<()> {
        self.roster.check("entry", &[entry])?;
        self.clear(entry);
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        self.roster.check("from", &[from])?;
        self.roster.check("to", &[to])?;
        if from != to {
            for (from, to) in self.rows_of(from).zip(self.rows_of(to)) {
                self.rows[to] = self.rows[from].clone();
            }
        }
        Ok(())
    }

    fn export(&self, entries: &[usize]) -> Result<Cache> {
        self.roster.check("entries", entries)?;
        Ok(self.gather(entries))
    }

    fn import(&mut self, entries: &[usize], cache: &Cache) -> Result<()> {
        self.roster.check_import(entries, cache)?;
        self.scatter(entries, cache);
        Ok(())
    }

    fn step(&mut self, problem: &Problem<'_>, entries: &[usize]) -> Result<Step> {
        self.roster.check_step(problem, entries)?;
        let spec = self.roster.spec;
        let heads = spec.value_heads;
        if let Some(events) = problem.inputs().events {
            let ledger = |row: usize| self.rows[entries[row / heads] * heads + row % heads].ledger.clone();
            problem.check_events_from(events, ledger)?;
        }
        // The rows that the call names, each borrowed once, in the call's order.
        let mut borrowed: Vec<Option<&mut [Held]>> = self.rows.chunks_exact_mut(heads).map(Some).collect();
        let rows = entries.iter().filter_map(|&entry| borrowed[entry].take());
        let rows: Vec<(usize, &mut Held)> = rows.flatten().enumerate().collect();
        let results: Vec<(usize, Vec<Token>)> = rows
            .into_par_iter()
            .map(|(index, held)| {
                let row = Row::new(problem, index);
                let mut chunk = Chunk::new(problem.shape());
                chunk.load(&row, 0..problem.shape().time);
                if held.states.is_empty() {
                    held.begin(&spec);
                }
                (index, (0..problem.shape().time).map(|t| held.take(&row, t, &chunk)).collect())
            })
            .collect();

        let Shape { dv, capacity, .. } = *problem.shape();
        let per_token = problem.shape().tokens() * heads;
        let routed = spec.read == Read::Routed;
        let (mut o, mut drift) = (vec![0.0; per_token * dv], vec![0.0; per_token]);
        let mut events = vec![0; per_token];
        let mut lambda = routed.then(|| vec![0.0; per_token * capacity]);
        for (index, tokens) in results {
            let row = Row::new(problem, index);
            for (t, token) in tokens.into_iter().enumerate() {
                let at = row.at(t);
                o[at * dv..][..dv].copy_from_slice(&token.o);
                (drift[at], events[at]) = (token.drift, token.event);
                if let Some(lambda) = &mut lambda {
                    let m = token.weights.len();
                    for (i, &weight) in token.weights.iter().enumerate() {
                        lambda[at * capacity + problem.options().slot_order.column(i, m)] = weight;
                    }
                }
            }
        }
        Ok(Step { o: Buffer::from_f32(problem.dtype(), &o), drift, events, lambda })
    }

    fn prefill(&mut self, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> Result<Step> {
        self.roster.check_prefill(problem, from, to)?;
        let cache = self.gather(from);
        let inputs = crate::Inputs { cache: Some(&cache), ..*problem.inputs() };
        let resumed = Problem::new(problem.options(), inputs)?;
        let Forward { o, drift, events, lambda, cache } = super::Engine.forward(&resumed)?;
        self.scatter(to, &cache);
        Ok(Step { o, drift, events, lambda })
    }
}
