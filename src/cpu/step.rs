//! **step**: one token per sequence, in place (OPERATOR.md, section 5). One pass transitions every slot and moves it
//! to its new place, a second reads them all.

use super::matrix::{add_scaled, dot, dot_f64, scale};
use super::route::Route;
use super::row::{Chunk, Row};
use super::segment::drift;
use crate::cache::CacheMut;
use crate::engine::Step;
use crate::events::{EXTEND, MERGE};
use crate::options::{Read, Recurrence};
use crate::problem::{Problem, Shape};
use crate::tensor::Buffer;
use rayon::prelude::*;

/// One row of a cache.
struct CacheRow<'a> {
    states: &'a mut [f32],
    len: &'a mut u32,
    tokens: &'a mut [u32],
    drift: &'a mut [u32],
    open: &'a mut [f32],
    keys: &'a mut [f32],
}

/// What one row's token gives.
struct RowStep {
    o: Vec<f32>,
    drift: f32,
    event: u8,
    /// Read weights of the slots held, oldest first.
    weights: Vec<f32>,
}

pub(crate) fn step(problem: &Problem, cache: CacheMut<'_>) -> Step {
    let Shape { value_heads, capacity, dv, .. } = *problem.shape();
    let dims = cache.dims;
    let order = problem.options().slot_order;
    let before: Vec<_> = (0..dims.rows()).map(|row| cache.view().ledger(row)).collect();
    // Without key sums every row gets an empty slice of them.
    let mut no_keys = [];
    let (keys, key_bank) = match cache.keys {
        Some(keys) => (keys, dims.key_bank()),
        None => (&mut no_keys[..], 0),
    };
    let mut keys: Vec<&mut [f32]> = match key_bank {
        0 => (0..dims.rows()).map(|_| &mut [][..]).collect(),
        width => keys.chunks_exact_mut(width).collect(),
    };
    let results: Vec<RowStep> = cache
        .states
        .par_chunks_exact_mut(dims.bank())
        .zip(cache.len)
        .zip(cache.tokens.par_chunks_exact_mut(dims.capacity))
        .zip(cache.drift.par_chunks_exact_mut(dims.capacity))
        .zip(cache.open.par_chunks_exact_mut(dims.state()))
        .zip(&mut keys)
        .zip(before)
        .enumerate()
        .map(|(index, ((((((states, len), tokens), drift), open), keys), ledger))| {
            let row = Row::new(problem, index);
            step_row(row, ledger, CacheRow { states, len, tokens, drift, open, keys })
        })
        .collect();

    let mut o = vec![0.0; dims.rows() * dv];
    let mut lambda = (problem.options().read == Read::Routed).then(|| vec![0.0; dims.rows() * capacity]);
    for (index, result) in results.iter().enumerate() {
        let row = Row::new(problem, index);
        debug_assert_eq!(row.at(0), row.sequence * value_heads + row.head);
        o[row.at(0) * dv..][..dv].copy_from_slice(&result.o);
        if let Some(lambda) = &mut lambda {
            let m = result.weights.len();
            for (i, &weight) in result.weights.iter().enumerate() {
                lambda[row.at(0) * capacity + order.column(i, m)] = weight;
            }
        }
    }
    // Rows stand in the order of [B, 1, HV].
    Step {
        o: Buffer::from_f32(problem.dtype(), &o),
        drift: results.iter().map(|result| result.drift).collect(),
        events: results.iter().map(|result| result.event).collect(),
        lambda,
    }
}

/// `S^T k`.
pub(super) fn transposed_times(state: &[f32], k: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (row, &k) in state.chunks_exact(out.len()).zip(k) {
        add_scaled(out, k, row);
    }
}

/// `S += a k v^T`.
pub(super) fn add_outer(state: &mut [f32], a: f32, k: &[f32], v: &[f32]) {
    for (row, &k) in state.chunks_exact_mut(v.len()).zip(k) {
        add_scaled(row, a * k, v);
    }
}

fn step_row(row: Row, mut ledger: crate::events::Ledger, cache: CacheRow) -> RowStep {
    let shape = row.shape();
    let Shape { dk, dv, capacity, .. } = *shape;
    let options = row.problem.options();
    let mut chunk = Chunk::new(shape);
    chunk.load(&row, 0..1);
    let (q, k, v) = (&chunk.q[..dk], &chunk.k[..dk], &chunk.v[..dv]);
    let (decay, beta) = (chunk.g[0].exp() as f32, chunk.beta[0]);

    // Drift against the open segment, then the event: neither asks the slots' states.
    let mut product = vec![0.0; dv];
    transposed_times(cache.open, k, &mut product);
    let energy = dot_f64(k, k) * dot_f64(v, v);
    let score = drift(dot_f64(&product, v), energy, dot_f64(cache.open, cache.open));
    let event = match row.problem.inputs().events {
        Some(events) => events[row.at(0)],
        None => ledger.decide(score, options.tau.of(row.head), capacity, options.merge),
    };
    let held = ledger.len();
    ledger.apply(event, score);
    let m = ledger.len();
    if event == EXTEND {
        scale(cache.open, decay);
    } else {
        cache.open.fill(0.0);
    }
    add_outer(cache.open, 1.0, k, v);

    // Transition of every slot, in its new place.
    let state = dk * dv;
    let merged = if event >= MERGE { usize::from(event - MERGE) } else { held };
    let place = |slot: usize| slot - usize::from(slot > merged);
    for slot in 0..held {
        let to = place(slot);
        let (low, high) = cache.states.split_at_mut(slot * state);
        let from = &mut high[..state];
        match options.recurrence {
            Recurrence::Gated => scale(from, decay),
            Recurrence::GatedDelta => {
                transposed_times(from, k, &mut product);
                for (row, &k) in from.chunks_exact_mut(dv).zip(k) {
                    row.iter_mut().zip(&product).for_each(|(s, held)| *s = decay * (*s - beta * k * held));
                }
            }
        }
        if to != slot {
            let target = &mut low[to * state..][..state];
            if slot == merged + 1 { add_scaled(target, 1.0, from) } else { target.copy_from_slice(from) }
        }
        if !cache.keys.is_empty() && to != slot {
            let (low, high) = cache.keys.split_at_mut(slot * dk);
            let target = &mut low[to * dk..][..dk];
            if slot == merged + 1 {
                add_scaled(target, 1.0, &high[..dk])
            } else {
                target.copy_from_slice(&high[..dk])
            }
        }
    }

    // Write into the open slot.
    let strength = match options.recurrence {
        Recurrence::Gated => 1.0,
        Recurrence::GatedDelta => beta,
    };
    let open = &mut cache.states[(m - 1) * state..][..state];
    if event != EXTEND {
        open.fill(0.0);
    }
    add_outer(open, strength, k, v);
    if !cache.keys.is_empty() {
        let keys = &mut cache.keys[(m - 1) * dk..][..dk];
        if event != EXTEND {
            keys.fill(0.0);
        }
        add_scaled(keys, 1.0, k);
    }
    *cache.len = m as u32;
    cache.tokens[..m].copy_from_slice(ledger.tokens());
    cache.drift[..m].copy_from_slice(ledger.drift());

    // Read.
    let weights = weights(&row, 0, q, |i| &cache.keys[i * dk..][..dk], &ledger);
    let mut o = vec![0.0; dv];
    for (slot, &weight) in weights.iter().enumerate() {
        transposed_times(&cache.states[slot * state..][..state], q, &mut product);
        add_scaled(&mut o, row.problem.scale() * weight, &product);
    }
    RowStep { o, drift: score, event, weights }
}

/// Read weights at token t of the slots held, oldest first; `keys(i)`: key sums of slot i.
pub(super) fn weights<'a>(
    row: &Row,
    t: usize,
    q: &[f32],
    keys: impl Fn(usize) -> &'a [f32],
    ledger: &crate::events::Ledger,
) -> Vec<f32> {
    let m = ledger.len();
    let problem = row.problem;
    match (Route::of(row), problem.inputs().lambda) {
        (Some(Route { slope, bias }), _) => (0..m)
            .map(|i| {
                let score = dot(q, keys(i)) / ledger.tokens()[i] as f32;
                let x = slope * score + bias + super::forward::logit(row, t, i, m);
                1.0 / (1.0 + (-x).exp())
            })
            .collect(),
        (None, Some(lambda)) => {
            let columns = problem.lambda_columns();
            let mut given = vec![0.0; columns];
            lambda.data().load(row.at(t) * columns, &mut given);
            (0..m).map(|i| given[problem.options().slot_order.column(i, m)]).collect()
        }
        (None, None) => Vec::new(),
    }
}
