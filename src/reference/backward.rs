//! Gradients of the six steps, token by token in reverse, with the log held constant.
//!
//! Written against [`forward`](super::forward): what step n does to a memory, the adjoint of step n
//! undoes to the memory's adjoint, in the opposite order. Memories before every token are
//! recomputed from checkpoints every sqrt(T) tokens.

use super::forward::{DRIFT_FLOOR, Decide, Memory, Row, Token, confidence, rows, store};
use super::linear::{add_outer, add_scaled, dot, norm, scale, times, transposed_times};
use super::{ArgumentGradients, Arguments, Terms, Upstream, l2norm_factor};
use crate::events::{EXTEND, MERGE};
use crate::options::{Read, Recurrence};
use crate::problem::{Problem, Shape};
use rayon::prelude::*;

/// Adjoint of a [`Memory`].
pub(crate) struct Adjoint {
    /// dS, oldest slot first.
    pub(crate) states: Vec<Vec<f64>>,
    /// Adjoint of the key sums.
    pub(crate) keys: Vec<Vec<f64>>,
    /// dR.
    pub(crate) open: Vec<f64>,
}

/// Gradients of one token.
#[derive(Default)]
pub(crate) struct TokenGradients {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) g: f64,
    pub(crate) beta: f64,
    /// Of the read weight of every slot held (given), or of its logit (routed).
    pub(crate) weights: Vec<f64>,
    pub(crate) drift: f64,
}

/// Gradients of every argument. `events` is the log of the forward.
pub fn backward(
    problem: &Problem,
    arguments: &Arguments,
    events: &[u8],
    upstream: &Upstream,
) -> ArgumentGradients {
    let Shape { dk, dv, value_heads, .. } = *problem.shape();
    let dims = problem.shape().cache_dims();
    let mut gradients = ArgumentGradients {
        arguments: arguments.zeros_like(),
        drift: vec![0.0; problem.shape().tokens() * value_heads],
        terms: Terms {
            slope: vec![0.0; value_heads],
            bias: vec![0.0; value_heads],
            tau: vec![0.0; value_heads],
        },
    };
    let results: Vec<_> =
        rows(problem, arguments).map(|row| (row, backward_row(row, events, upstream))).collect();
    for (row, result) in results {
        let out = &mut gradients.arguments;
        for (t, token) in result.tokens.iter().enumerate() {
            let (at, key_at) = (row.at(t), row.key_at(t));
            // Value heads of one group share their q and k.
            add_scaled(&mut out.q[key_at * dk..][..dk], 1.0, &token.q);
            add_scaled(&mut out.k[key_at * dk..][..dk], 1.0, &token.k);
            out.v[at * dv..][..dv].copy_from_slice(&token.v);
            out.g[at] = token.g;
            out.beta[at] = token.beta;
            gradients.drift[at] = token.drift;
            let m = token.weights.len();
            let weights = match problem.options().read {
                Read::Given => out.lambda.as_mut().map(|lambda| (lambda, problem.lambda_columns())),
                Read::Routed => out.logits.as_mut().map(|logits| (logits, problem.logit_columns())),
            };
            if let Some((weights, columns)) = weights {
                for (i, &weight) in token.weights.iter().enumerate() {
                    weights[row.weight_at(columns, t, i, m)] = weight;
                }
            }
        }
        let terms = &mut gradients.terms;
        for (sum, terms, x) in [
            (&mut out.slope, &mut terms.slope, result.slope),
            (&mut out.bias, &mut terms.bias, result.bias),
            (&mut out.tau, &mut terms.tau, result.tau),
        ] {
            sum[row.head] += x.sum;
            terms[row.head] = terms[row.head].hypot(x.squares.sqrt());
        }
        if let Some(cache) = &mut out.cache {
            let Adjoint { states, keys, open } = &result.initial;
            store(cache, dims, row.index(), states, keys, open);
        }
    }
    gradients
}

/// `dx` of `y = x / sqrt(|x|^2 + eps)` in place of `dy`.
fn l2norm_adjoint(x: &[f64], dy: &mut [f64]) {
    let factor = l2norm_factor(x);
    let projection = dot(x, dy) * factor * factor;
    scale(dy, factor);
    add_scaled(dy, -factor * projection, x);
}

/// A sum over tokens, and that of its terms' squares.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sum {
    pub(crate) sum: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, x: f64) {
        self.sum += x;
        self.squares += x * x;
    }
}

/// Gradients of one row.
pub(crate) struct RowGradients {
    pub(crate) tokens: Vec<TokenGradients>,
    pub(crate) slope: Sum,
    pub(crate) bias: Sum,
    pub(crate) tau: Sum,
    /// Adjoint of the memory that the row began with.
    pub(crate) initial: Adjoint,
}

pub(crate) fn backward_row(row: Row, events: &[u8], upstream: &Upstream) -> RowGradients {
    let options = row.options();
    let advance = |memory: &mut Memory, t: usize| {
        memory.take(options.recurrence, &row.token(t), Decide::Log(events[row.at(t)]), |_, _, _| 1.0);
    };
    let stride = row.len().isqrt().max(1);
    let mut memory = row.initial_memory();
    let mut checkpoints = Vec::new();
    for t in 0..row.len() {
        if t % stride == 0 {
            checkpoints.push(memory.clone());
        }
        advance(&mut memory, t);
    }

    let mut adjoint = final_adjoint(&row, &memory, upstream);
    let mut result = RowGradients {
        tokens: Vec::with_capacity(row.len()),
        slope: Sum::default(),
        bias: Sum::default(),
        tau: Sum::default(),
        initial: Adjoint { states: Vec::new(), keys: Vec::new(), open: Vec::new() },
    };
    for (block, checkpoint) in checkpoints.into_iter().enumerate().rev() {
        let first = block * stride;
        let last = (first + stride).min(row.len());
        let mut memories = vec![checkpoint];
        for t in first..last {
            let mut memory = memories[t - first].clone();
            advance(&mut memory, t);
            memories.push(memory);
        }
        for t in (first..last).rev() {
            let (before, after) = (&memories[t - first], &memories[t - first + 1]);
            let at = row.at(t);
            let d_o = &upstream.o[at * row.shape().dv..][..row.shape().dv];
            let d_drift = upstream.drift.as_ref().map(|drift| drift[at]);
            let mut token = adjoint.take(&row, t, before, after, events[at], (d_o, d_drift), &mut result);
            if options.qk_l2norm {
                let (dk, key_at) = (row.shape().dk, row.key_at(t));
                l2norm_adjoint(&row.arguments.q[key_at * dk..][..dk], &mut token.q);
                l2norm_adjoint(&row.arguments.k[key_at * dk..][..dk], &mut token.k);
            }
            result.tokens.push(token);
        }
    }
    result.tokens.reverse();
    result.initial = adjoint;
    result
}

/// The adjoint of the final memory: what the caller's gradient of the final cache says of it.
fn final_adjoint(row: &Row, memory: &Memory, upstream: &Upstream) -> Adjoint {
    let dims = row.shape().cache_dims();
    let (index, m) = (row.index(), memory.ledger.len());
    match &upstream.cache {
        None => Adjoint {
            states: vec![vec![0.0; dims.state()]; m],
            keys: vec![vec![0.0; dims.dk]; m],
            open: vec![0.0; dims.state()],
        },
        Some(cache) => Adjoint {
            states: (0..m)
                .map(|i| cache.states[index * dims.bank() + i * dims.state()..][..dims.state()].to_vec())
                .collect(),
            keys: (0..m)
                .map(|i| cache.keys[index * dims.key_bank() + i * dims.dk..][..dims.dk].to_vec())
                .collect(),
            open: cache.open[index * dims.state()..][..dims.state()].to_vec(),
        },
    }
}

impl Adjoint {
    /// The adjoint of one token's steps: from that of the memory after to that of the memory before.
    #[allow(clippy::too_many_arguments)]
    fn take(
        &mut self,
        row: &Row,
        t: usize,
        before: &Memory,
        after: &Memory,
        event: u8,
        (d_o, d_drift): (&[f64], Option<f64>),
        sums: &mut RowGradients,
    ) -> TokenGradients {
        let options = row.options();
        let token = row.token(t);
        let Token { q, k, v, g, beta } = &token;
        let decay = g.exp();
        let mut out = TokenGradients {
            q: vec![0.0; q.len()],
            k: vec![0.0; k.len()],
            v: vec![0.0; v.len()],
            ..Default::default()
        };

        // 6. Read: o = scale sum_i lambda_i q^T S_i.
        let factor = f64::from(row.problem.scale());
        for (i, state) in after.states.iter().enumerate() {
            let lambda = row.weight(after, &token, t, i);
            let read = times(state, d_o);
            add_scaled(&mut out.q, factor * lambda, &read);
            add_outer(&mut self.states[i], factor * lambda, q, d_o);
            let dlambda = factor * dot(q, &read);
            if options.read == Read::Given {
                out.weights.push(dlambda);
                continue;
            }
            // lambda = sigmoid(slope s + bias + logit), s = q . K / n.
            let u = dlambda * lambda * (1.0 - lambda);
            let slope = row.arguments.slope[row.head];
            let e = slope * u / f64::from(after.ledger.tokens()[i]);
            out.weights.push(u);
            sums.slope.add(u * after.score(&token, i));
            sums.bias.add(u);
            add_scaled(&mut out.q, e, &after.keys[i]);
            add_scaled(&mut self.keys[i], e, q);
        }

        // 5. Write: S += strength k v^T into the open slot, k into its key sum, k v^T into R.
        let open = self.states.len() - 1;
        let strength = match options.recurrence {
            Recurrence::Gated => 1.0,
            Recurrence::GatedDelta => *beta,
        };
        let write_k = times(&self.states[open], v);
        let write_v = transposed_times(&self.states[open], k);
        add_scaled(&mut out.k, strength, &write_k);
        add_scaled(&mut out.v, strength, &write_v);
        if options.recurrence == Recurrence::GatedDelta {
            out.beta += dot(k, &write_k);
        }
        add_scaled(&mut out.k, 1.0, &self.keys[open]);
        add_scaled(&mut out.k, 1.0, &times(&self.open, v));
        add_scaled(&mut out.v, 1.0, &transposed_times(&self.open, k));
        // The write is multiplied by 1 + c - c: dc = <dw, w>.
        let d_confidence = strength * dot(k, &write_k);
        if event != EXTEND {
            self.states.pop();
            self.keys.pop();
            self.open.fill(0.0);
        }

        // 4. Capacity: the adjoint of a sum is a copy.
        if event >= MERGE {
            let i = usize::from(event - MERGE);
            self.states.insert(i + 1, self.states[i].clone());
            self.keys.insert(i + 1, self.keys[i].clone());
        }

        // 3. and 2. Boundary and drift, where boundaries are soft.
        let mut decayed = before.open.clone();
        scale(&mut decayed, decay);
        if let Some(soft) = options.soft {
            let probe = Memory { open: decayed.clone(), ..before.clone() };
            let (drift, slots) = (probe.drift(&token), before.ledger.len());
            let tau = row.arguments.tau[row.head];
            let (_, slope) = confidence(soft, tau, drift, event, slots, options.capacity);
            out.drift = d_confidence * slope;
            sums.tau.add(-out.drift);
            if soft.through_drift {
                self.drift(&probe, &token, d_drift.unwrap_or(out.drift), &mut out);
            }
        }

        // 1. Transition: S <- e^g (S - beta k (k^T S)), R <- e^g R.
        out.g += dot(&self.open, &decayed);
        scale(&mut self.open, decay);
        for (adjoint, state) in self.states.iter_mut().zip(&before.states) {
            match options.recurrence {
                Recurrence::Gated => {
                    out.g += decay * dot(adjoint, state);
                }
                Recurrence::GatedDelta => {
                    let held = transposed_times(state, k);
                    let d_held = transposed_times(adjoint, k);
                    let cross = dot(&held, &d_held);
                    out.g += decay * (dot(adjoint, state) - beta * cross);
                    out.beta -= decay * cross;
                    add_scaled(&mut out.k, -decay * beta, &times(adjoint, &held));
                    add_scaled(&mut out.k, -decay * beta, &times(state, &d_held));
                    add_outer(adjoint, -beta, k, &d_held);
                }
            }
            scale(adjoint, decay);
        }
        out
    }

    /// The adjoint of `I = sqrt(2 - 2 c)`, `c = k^T R v / (|k| |v| |R|)`.
    fn drift(&mut self, memory: &Memory, token: &Token, d_drift: f64, out: &mut TokenGradients) {
        let (Token { k, v, .. }, r) = (token, &memory.open);
        let (c, drift) = (memory.cosine(token), memory.drift(token));
        let norms = norm(k) * norm(v) * norm(r);
        if drift < DRIFT_FLOOR || norms == 0.0 {
            return;
        }
        let d_cosine = -d_drift / drift;
        add_scaled(&mut out.k, d_cosine / norms, &times(r, v));
        add_scaled(&mut out.v, d_cosine / norms, &transposed_times(r, k));
        add_outer(&mut self.open, d_cosine / norms, k, v);
        add_scaled(&mut out.k, -d_cosine * c / dot(k, k), k);
        add_scaled(&mut out.v, -d_cosine * c / dot(v, v), v);
        add_scaled(&mut self.open, -d_cosine * c / dot(r, r), r);
    }
}
