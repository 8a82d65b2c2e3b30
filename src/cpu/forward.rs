//! The forward: chunk by chunk, segment -> prepare -> route -> scan.

use super::clock::Clock;
use super::prepare::{Prepared, prepare};
use super::route::{KeyBank, Route, Routed, route};
use super::row::{CHUNK, Chunk, Row, Shared, SharedBuffer};
use super::scan::{Bank, slices};
use super::segment::{Decide, Open, Scratch, Segmented, segment};
use crate::cache::Cache;
use crate::engine::{Forward, Stage};
use crate::events::Replay;
use crate::options::Read;
use crate::problem::{Problem, Shape};
use crate::reference::{self, Arguments};
use crate::tensor::Buffer;
use rayon::prelude::*;
use std::sync::OnceLock;

/// Where the rows of a forward write; every row its own elements.
struct Sink<'a> {
    o: SharedBuffer<'a>,
    drift: Shared<'a, f32>,
    events: Shared<'a, u8>,
    lambda: Option<Shared<'a, f32>>,
    states: Shared<'a, f32>,
    len: Shared<'a, u32>,
    tokens: Shared<'a, u32>,
    summed_drift: Shared<'a, u32>,
    open: Shared<'a, f32>,
    keys: Option<Shared<'a, f32>>,
}

pub(crate) fn forward(problem: &Problem, clock: &Clock) -> Forward {
    let shape = problem.shape();
    let per_token = shape.tokens() * shape.value_heads;
    let routed = problem.options().read == Read::Routed;
    let mut result = Forward {
        o: Buffer::zeros(problem.dtype(), per_token * shape.dv),
        drift: vec![0.0; per_token],
        events: vec![0; per_token],
        lambda: routed.then(|| vec![0.0; per_token * shape.capacity]),
        cache: Cache::empty(shape.cache_dims(), problem.options().read),
    };
    let sink = Sink {
        o: SharedBuffer::new(&mut result.o),
        drift: Shared::new(&mut result.drift),
        events: Shared::new(&mut result.events),
        lambda: result.lambda.as_deref_mut().map(Shared::new),
        states: Shared::new(&mut result.cache.states),
        len: Shared::new(&mut result.cache.len),
        tokens: Shared::new(&mut result.cache.tokens),
        summed_drift: Shared::new(&mut result.cache.drift),
        open: Shared::new(&mut result.cache.open),
        keys: result.cache.keys.as_deref_mut().map(Shared::new),
    };
    let rows = shape.cache_dims().rows();
    let split = rows < rayon::current_num_threads();
    let in_f64 = OnceLock::new();
    (0..rows).into_par_iter().for_each(|index| {
        let row = Row::new(problem, index);
        if row.has_non_finite() {
            non_finite_row(row, in_f64.get_or_init(|| Arguments::of(problem)), &sink);
        } else {
            forward_row(row, &sink, clock, split);
        }
    });
    result
}

/// Runs `work` for every slice of value columns: on several threads where rows leave some idle.
pub(crate) fn each_slice<T: Send>(slices: &mut [T], split: bool, work: impl Fn(&mut T) + Send + Sync) {
    if split && slices.len() > 1 {
        slices.par_iter_mut().for_each(work);
    } else {
        slices.iter_mut().for_each(work);
    }
}

/// The states that a row begins with, `[m, dk, dv]`.
pub(crate) fn initial_states<'a>(row: &Row<'a>) -> &'a [f32] {
    row.problem.inputs().cache.map_or(&[], |cache| {
        let (dims, index) = (cache.dims, row.index());
        &cache.states[index * dims.bank()..][..cache.len[index] as usize * dims.state()]
    })
}

/// The open segment that a row begins with.
pub(crate) fn initial_open(row: &Row) -> Open {
    let (dims, index) = (row.shape().cache_dims(), row.index());
    let cache = row.problem.inputs().cache;
    let r = cache.map_or_else(
        || vec![0.0; dims.state()],
        |cache| cache.open[index * dims.state()..][..dims.state()].to_vec(),
    );
    Open::new(row.problem.initial_ledger(cache, index), r)
}

/// Given read weights of a chunk, `[len, M]` by slot.
pub(crate) fn load_weights(row: &Row, first: usize, replay: &Replay, len: usize, out: &mut [f32]) {
    let capacity = row.shape().capacity;
    let Some(lambda) = row.problem.inputs().lambda else { return };
    let columns = row.problem.lambda_columns();
    let mut loaded = vec![0.0; capacity];
    for t in 0..len {
        lambda.data().load(row.at(first + t) * columns, &mut loaded);
        let m = replay.len(t);
        for i in 0..m {
            out[t * capacity + i] = loaded[row.problem.options().slot_order.column(i, m)];
        }
    }
}

/// Logit of slot i of m at token t.
pub(crate) fn logit(row: &Row, t: usize, i: usize, m: usize) -> f32 {
    let logits = row.problem.inputs().route.and_then(|route| route.logits);
    logits.map_or(0.0, |logits| {
        let column = row.problem.options().slot_order.column(i, m);
        let mut x = [0.0];
        logits.data().load(row.at(t) * row.problem.logit_columns() + column, &mut x);
        x[0]
    })
}

fn forward_row(row: Row, sink: &Sink, clock: &Clock, split: bool) {
    let shape = row.shape();
    let Shape { dk, dv, capacity, .. } = *shape;
    let options = row.problem.options();
    let read_scale = row.problem.scale();
    let mut open = initial_open(&row);
    let mut banks: Vec<Bank> = slices(dv)
        .map(|columns| Bank::new(initial_states(&row), capacity, (dk, dv), columns, options.recurrence))
        .collect();
    let routing = Route::of(&row);
    let mut key_bank = KeyBank::initial(&row);
    let mut chunk = Chunk::new(shape);
    let mut segmented = Segmented::new();
    let mut scratch = Scratch::new(dk, dv);
    let mut prepared = Prepared::new(shape, options.recurrence);
    let mut replay = Replay::default();
    let mut routed = Routed::new(capacity);
    let mut o = vec![0.0; CHUNK * dv];
    let mut log = vec![0; CHUNK];

    for tokens in row.chunks() {
        let (first, len) = (tokens.start, tokens.len());
        let entry = open.ledger.len();
        clock.time(Stage::Segment, || {
            chunk.load(&row, tokens.clone());
            let decide = match row.problem.inputs().events {
                Some(events) => {
                    tokens.clone().zip(&mut log).for_each(|(t, event)| *event = events[row.at(t)]);
                    Decide::Log(&log[..len])
                }
                None => Decide::Rules { tau: options.tau.of(row.head), capacity, merge: options.merge },
            };
            segment(&mut open, &chunk, &decide, &mut segmented, &mut scratch);
            replay.run(entry, &segmented.events[..len]);
        });
        clock.time(Stage::Prepare, || prepare(&chunk, read_scale, true, &mut prepared));
        clock.time(Stage::Route, || match routing {
            Some(routing) => {
                let logit = |t, i, m| logit(&row, first + t, i, m);
                route(routing, &key_bank, &chunk, &prepared.qk, &replay, logit, &mut routed);
                key_bank.advance(&chunk, &replay);
            }
            None => load_weights(&row, first, &replay, len, &mut routed.weights),
        });
        each_slice(&mut banks, split, |bank| {
            let weights = Some((&routed.weights[..], capacity));
            clock.time(Stage::Scan, || bank.scan((&prepared, &replay), len, &chunk.v, dv, weights));
        });
        for bank in &banks {
            let width = bank.columns.len();
            for (o, slice) in o.chunks_exact_mut(dv).zip(bank.o.chunks_exact(width)).take(len) {
                o[bank.columns.clone()].copy_from_slice(slice);
            }
        }
        for (i, t) in tokens.enumerate() {
            let m = replay.len(i);
            let weights = &routed.weights[i * capacity..][..m];
            write_token(&row, sink, t, &o[i * dv..][..dv], segmented.drift[i], segmented.events[i], weights);
        }
    }

    let mut states = vec![0.0; open.ledger.len() * shape.cache_dims().state()];
    for bank in &banks {
        let width = bank.columns.len();
        let held = bank.snapshot();
        for (state, slice) in states.chunks_exact_mut(dv).zip(held.chunks_exact(width)) {
            state[bank.columns.clone()].copy_from_slice(slice);
        }
    }
    let mut r = vec![0.0; dk * dv];
    open.store(&mut r);
    write_cache(&row, sink, &open.ledger, &states, &r, &key_bank.keys);
}

fn write_token(row: &Row, sink: &Sink, t: usize, o: &[f32], drift: f32, event: u8, weights: &[f32]) {
    let at = row.at(t);
    let capacity = row.shape().capacity;
    // SAFETY: token t of a sequence and value head is written by this row alone, once.
    unsafe {
        sink.o.store(at * o.len(), o);
        sink.drift.slice(at, 1)[0] = drift;
        sink.events.slice(at, 1)[0] = event;
        if let Some(lambda) = &sink.lambda {
            let lambda = lambda.slice(at * capacity, capacity);
            for (i, &weight) in weights.iter().enumerate() {
                lambda[row.problem.options().slot_order.column(i, weights.len())] = weight;
            }
        }
    }
}

fn write_cache(
    row: &Row,
    sink: &Sink,
    ledger: &crate::events::Ledger,
    states: &[f32],
    open: &[f32],
    keys: &[f32],
) {
    let (dims, index, m) = (row.shape().cache_dims(), row.index(), ledger.len());
    // SAFETY: a cache row is written by its own sequence and value head alone.
    unsafe {
        sink.states.slice(index * dims.bank(), states.len()).copy_from_slice(states);
        sink.len.slice(index, 1)[0] = m as u32;
        sink.tokens.slice(index * dims.capacity, m).copy_from_slice(ledger.tokens());
        sink.summed_drift.slice(index * dims.capacity, m).copy_from_slice(ledger.drift());
        sink.open.slice(index * dims.state(), dims.state()).copy_from_slice(open);
        if let Some(out) = &sink.keys {
            out.slice(index * dims.key_bank(), keys.len()).copy_from_slice(keys);
        }
    }
}

/// A row that holds NaN or infinity goes through the definition itself: the chunkwise form would carry
/// them to earlier tokens of their chunk (0 x NaN above the diagonal).
fn non_finite_row(row: Row, arguments: &Arguments, sink: &Sink) {
    let f32s = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
    let definition = reference::Row::new(row.problem, arguments, row.index());
    let memory = reference::forward_row(definition, row.problem.inputs().events, None, |t, token| {
        let (o, weights) = (f32s(&token.o), f32s(&token.weights));
        write_token(&row, sink, t, &o, token.drift as f32, token.event, &weights);
    });
    let states = f32s(&memory.states.concat());
    write_cache(&row, sink, &memory.ledger, &states, &f32s(&memory.open), &f32s(&memory.keys.concat()));
}
