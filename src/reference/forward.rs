//! The six steps of OPERATOR.md, section 3, for one token after the other.

use super::linear::{add_outer, add_scaled, dot, norm, scale, transposed_times};
use super::{Arguments, Outputs, States, l2norm_factor};
use crate::events::{EXTEND, Ledger, MERGE};
use crate::options::{Merge, Options, Read, Recurrence, Soft};
use crate::problem::{Problem, Shape};
use rayon::prelude::*;

/// Below this drift its derivative, -1 / I in the cosine, is taken as 0: a token that the open
/// segment already holds has no direction in which to drift.
pub(crate) const DRIFT_FLOOR: f64 = 1.0 / 64.0;

/// What the steps read of one token.
pub(crate) struct Token {
    /// Query and key as the recurrence uses them (normalised where the options say so).
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) g: f64,
    pub(crate) beta: f64,
}

/// One sequence and value head: where its tokens lie in the arguments.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) arguments: &'a Arguments,
    /// Sequence n, value head.
    pub(crate) sequence: usize,
    pub(crate) head: usize,
}

/// All rows of a problem, in the order of the cache.
pub(crate) fn rows<'a>(
    problem: &'a Problem<'a>,
    arguments: &'a Arguments,
) -> impl IndexedParallelIterator<Item = Row<'a>> {
    let heads = problem.shape().value_heads;
    (0..problem.sequences().len() * heads)
        .into_par_iter()
        .map(move |index| Row::new(problem, arguments, index))
}

impl<'a> Row<'a> {
    /// Row `index` of N x HV.
    pub(crate) fn new(problem: &'a Problem<'a>, arguments: &'a Arguments, index: usize) -> Self {
        let heads = problem.shape().value_heads;
        Row { problem, arguments, sequence: index / heads, head: index % heads }
    }

    pub(crate) fn shape(&self) -> &'a Shape {
        self.problem.shape()
    }

    pub(crate) fn options(&self) -> &'a Options {
        self.problem.options()
    }

    /// Index among N x HV.
    pub(crate) fn index(&self) -> usize {
        self.sequence * self.shape().value_heads + self.head
    }

    pub(crate) fn len(&self) -> usize {
        self.problem.sequences()[self.sequence].len
    }

    /// Index of token t in a `[B,T,HV]` array.
    pub(crate) fn at(&self, t: usize) -> usize {
        (self.problem.sequences()[self.sequence].start + t) * self.shape().value_heads + self.head
    }

    /// Index of token t in a `[B,T,H]` array.
    pub(crate) fn key_at(&self, t: usize) -> usize {
        let shape = self.shape();
        (self.problem.sequences()[self.sequence].start + t) * shape.heads + shape.key_head(self.head)
    }

    pub(crate) fn token(&self, t: usize) -> Token {
        let (at, key_at) = (self.at(t), self.key_at(t));
        let Shape { dk, dv, .. } = *self.shape();
        let mut q = self.arguments.q[key_at * dk..][..dk].to_vec();
        let mut k = self.arguments.k[key_at * dk..][..dk].to_vec();
        if self.options().qk_l2norm {
            for x in [&mut q, &mut k] {
                let factor = l2norm_factor(x);
                scale(x, factor);
            }
        }
        Token {
            q,
            k,
            v: self.arguments.v[at * dv..][..dv].to_vec(),
            g: self.arguments.g[at],
            beta: self.arguments.beta[at],
        }
    }

    /// Index in `lambda` (or the logits) of the weight of slot i at token t, with m slots held.
    pub(crate) fn weight_at(&self, columns: usize, t: usize, i: usize, m: usize) -> usize {
        self.at(t) * columns + self.options().slot_order.column(i, m)
    }

    /// Weight of slot i at token t: given, or `sigmoid(slope q . kappa_i + bias + logit)`.
    pub(crate) fn weight(&self, memory: &Memory, token: &Token, t: usize, i: usize) -> f64 {
        let m = memory.ledger.len();
        match &self.arguments.lambda {
            Some(lambda) => lambda[self.weight_at(self.problem.lambda_columns(), t, i, m)],
            None => {
                let logit = self
                    .arguments
                    .logits
                    .as_ref()
                    .map_or(0.0, |logits| logits[self.weight_at(self.problem.logit_columns(), t, i, m)]);
                let score = self.arguments.slope[self.head] * memory.score(token, i);
                sigmoid(score + self.arguments.bias[self.head] + logit)
            }
        }
    }

    /// The memory that this row begins with.
    pub(crate) fn initial_memory(&self) -> Memory {
        let dims = self.shape().cache_dims();
        let ledger = self.problem.initial_ledger(self.problem.inputs().cache, self.index());
        let (row, m) = (self.index(), ledger.len());
        let Some(cache) = &self.arguments.cache else {
            return Memory { ledger, states: Vec::new(), keys: Vec::new(), open: vec![0.0; dims.state()] };
        };
        let states = cache.states[row * dims.bank()..][..dims.bank()].chunks(dims.state());
        let keys = cache.keys[row * dims.key_bank()..][..dims.key_bank()].chunks(dims.dk);
        Memory {
            ledger,
            states: states.take(m).map(<[f64]>::to_vec).collect(),
            keys: keys.take(m).map(<[f64]>::to_vec).collect(),
            open: cache.open[row * dims.state()..][..dims.state()].to_vec(),
        }
    }
}

/// The slots held, oldest first, and the open segment.
#[derive(Clone)]
pub(crate) struct Memory {
    /// n and J.
    pub(crate) ledger: Ledger,
    /// S.
    pub(crate) states: Vec<Vec<f64>>,
    /// Key sums, n kappa.
    pub(crate) keys: Vec<Vec<f64>>,
    /// R.
    pub(crate) open: Vec<f64>,
}

/// Who decides a token's event.
#[derive(Clone, Copy)]
pub(crate) enum Decide {
    /// The rules.
    Rules { tau: f32, capacity: usize, merge: Merge },
    /// A log.
    Log(u8),
}

impl Memory {
    /// Steps 1 to 5 for one token. Returns its drift and event.
    pub(crate) fn take(
        &mut self,
        recurrence: Recurrence,
        token: &Token,
        decide: Decide,
        confidence: impl FnOnce(&Memory, f64, u8) -> f64,
    ) -> (f64, u8) {
        let Token { k, v, g, beta, .. } = token;
        let decay = g.exp();
        // 1. Transition of every slot.
        for state in &mut self.states {
            if recurrence == Recurrence::GatedDelta {
                let held = transposed_times(state, k);
                add_outer(state, -beta, k, &held);
            }
            scale(state, decay);
        }
        scale(&mut self.open, decay);
        // 2. Drift of the token against the open segment.
        let drift = self.drift(token);
        // 3. Boundary; 4. capacity.
        let event = match decide {
            Decide::Log(event) => event,
            Decide::Rules { tau, capacity, merge } => self.ledger.decide(drift as f32, tau, capacity, merge),
        };
        let factor = confidence(self, drift, event);
        self.ledger.apply(event, drift as f32);
        if event >= MERGE {
            let i = usize::from(event - MERGE);
            let (state, keys) = (self.states.remove(i + 1), self.keys.remove(i + 1));
            add_scaled(&mut self.states[i], 1.0, &state);
            add_scaled(&mut self.keys[i], 1.0, &keys);
        }
        // 5. Write.
        if event != EXTEND {
            self.states.push(vec![0.0; k.len() * v.len()]);
            self.keys.push(vec![0.0; k.len()]);
            self.open.fill(0.0);
        }
        let strength = match recurrence {
            Recurrence::Gated => 1.0,
            Recurrence::GatedDelta => *beta,
        };
        if let (Some(state), Some(keys)) = (self.states.last_mut(), self.keys.last_mut()) {
            add_outer(state, strength * factor, k, v);
            add_scaled(keys, 1.0, k);
        }
        add_outer(&mut self.open, 1.0, k, v);
        (drift, event)
    }

    /// `c = k^T R v / (|k| |v| |R|)`, 0 where a norm is; R already decayed to the token.
    pub(crate) fn cosine(&self, token: &Token) -> f64 {
        let norms = norm(&token.k) * norm(&token.v) * norm(&self.open);
        if norms == 0.0 {
            return 0.0;
        }
        dot(&transposed_times(&self.open, &token.k), &token.v) / norms
    }

    /// `I = sqrt(2 - 2 c)`.
    pub(crate) fn drift(&self, token: &Token) -> f64 {
        let squared = 2.0 - 2.0 * self.cosine(token);
        // Rounding may leave c a little above 1; a NaN stays one.
        if squared < 0.0 { 0.0 } else { squared.sqrt() }
    }

    /// `q . kappa_i`, kappa the mean key of slot i.
    pub(crate) fn score(&self, token: &Token, i: usize) -> f64 {
        dot(&token.q, &self.keys[i]) / f64::from(self.ledger.tokens()[i])
    }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Confidence c of a token's decision under soft boundaries, and its derivative in the drift.
/// A decision that was forced (no slot yet, or a capacity of 1) does not depend on the drift.
pub(crate) fn confidence(
    soft: Soft,
    tau: f64,
    drift: f64,
    event: u8,
    slots: usize,
    capacity: usize,
) -> (f64, f64) {
    if slots == 0 || capacity == 1 {
        return (1.0, 0.0);
    }
    let temperature = f64::from(soft.temperature);
    let p = sigmoid((drift - tau) / temperature);
    let slope = p * (1.0 - p) / temperature;
    if event == EXTEND { (1.0 - p, -slope) } else { (p, slope) }
}

/// The operator on `arguments` in place of the problem's own. `events`: a log to replay, else the
/// rules decide. `confidences` `[B,T,HV]`: the c of every token at the point of expansion, for
/// soft boundaries to be checked by differences: the write is multiplied by 1 + c - that c.
pub fn forward(
    problem: &Problem,
    arguments: &Arguments,
    events: Option<&[u8]>,
    confidences: Option<&[f64]>,
) -> Outputs {
    let options = problem.options();
    let shape = problem.shape();
    let dims = shape.cache_dims();
    let per_token = shape.tokens() * shape.value_heads;
    let mut outputs = Outputs {
        o: vec![0.0; per_token * shape.dv],
        drift: vec![0.0; per_token],
        events: vec![0; per_token],
        lambda: (options.read == Read::Routed).then(|| vec![0.0; per_token * shape.capacity]),
        cache: States::zeros(dims),
        len: vec![0; dims.rows()],
        tokens: vec![0; dims.rows() * dims.capacity],
        summed_drift: vec![0; dims.rows() * dims.capacity],
    };
    let results: Vec<_> = rows(problem, arguments)
        .map(|row| {
            let mut tokens = Vec::with_capacity(row.len());
            let memory = forward_row(row, events, confidences, |_, token| tokens.push(token));
            (row, (tokens, memory))
        })
        .collect();
    for (row, (tokens, memory)) in results {
        for (t, result) in tokens.into_iter().enumerate() {
            let at = row.at(t);
            outputs.o[at * shape.dv..][..shape.dv].copy_from_slice(&result.o);
            outputs.drift[at] = result.drift;
            outputs.events[at] = result.event;
            if let Some(lambda) = &mut outputs.lambda {
                let m = result.weights.len();
                for (i, &weight) in result.weights.iter().enumerate() {
                    lambda[row.weight_at(shape.capacity, t, i, m)] = weight;
                }
            }
        }
        let (index, m) = (row.index(), memory.ledger.len());
        outputs.len[index] = m as u32;
        let slots = index * dims.capacity..index * dims.capacity + m;
        outputs.tokens[slots.clone()].copy_from_slice(memory.ledger.tokens());
        outputs.summed_drift[slots].copy_from_slice(memory.ledger.drift());
        store(&mut outputs.cache, dims, index, &memory.states, &memory.keys, &memory.open);
    }
    outputs
}

/// Writes one row of a cache in f64.
pub(crate) fn store(
    cache: &mut States,
    dims: crate::CacheDims,
    row: usize,
    states: &[Vec<f64>],
    keys: &[Vec<f64>],
    open: &[f64],
) {
    for (i, state) in states.iter().enumerate() {
        cache.states[row * dims.bank() + i * dims.state()..][..dims.state()].copy_from_slice(state);
    }
    for (i, keys) in keys.iter().enumerate() {
        cache.keys[row * dims.key_bank() + i * dims.dk..][..dims.dk].copy_from_slice(keys);
    }
    cache.open[row * dims.state()..][..dims.state()].copy_from_slice(open);
}

/// What one token gives.
pub(crate) struct TokenOutputs {
    pub(crate) o: Vec<f64>,
    pub(crate) drift: f64,
    pub(crate) event: u8,
    /// Read weight of every slot held, oldest first.
    pub(crate) weights: Vec<f64>,
}

/// One row token by token, each handed on as it comes; returns the final memory.
pub(crate) fn forward_row(
    row: Row,
    events: Option<&[u8]>,
    confidences: Option<&[f64]>,
    mut each: impl FnMut(usize, TokenOutputs),
) -> Memory {
    let options = row.options();
    let rules =
        Decide::Rules { tau: options.tau.of(row.head), capacity: options.capacity, merge: options.merge };
    let mut memory = row.initial_memory();
    for t in 0..row.len() {
        let token = row.token(t);
        let decide = events.map_or(rules, |events| Decide::Log(events[row.at(t)]));
        let factor = |memory: &Memory, drift: f64, event: u8| match (options.soft, confidences) {
            (Some(soft), Some(confidences)) => {
                let tau = row.arguments.tau[row.head];
                let slots = memory.ledger.len();
                let (c, _) = confidence(soft, tau, drift, event, slots, options.capacity);
                1.0 + c - confidences[row.at(t)]
            }
            _ => 1.0,
        };
        let (drift, event) = memory.take(options.recurrence, &token, decide, factor);
        // 6. Read.
        let mut o = vec![0.0; row.shape().dv];
        let mut weights = Vec::with_capacity(memory.states.len());
        for (i, state) in memory.states.iter().enumerate() {
            let weight = row.weight(&memory, &token, t, i);
            let read = transposed_times(state, &token.q);
            add_scaled(&mut o, f64::from(row.problem.scale()) * weight, &read);
            weights.push(weight);
        }
        each(t, TokenOutputs { o, drift, event, weights });
    }
    memory
}
