//! **segment**: drift, boundaries and merges of a chunk, from k, v and g alone (OPERATOR.md, section 4).
//!
//! With `X_ts = D_ts (k_t . k_s)(v_t . v_s)` a token's numerator is the sum of X over the open
//! segment's tokens, plus `e^Gamma_t k_t^T R v_t` where the segment was carried in; and
//! `|R|^2` follows `N_t = e^{2 g_t} N_{t-1} + 2 num_t + E_t`.
//!
//! Blocks of 16 tokens: pairs cost little (2 x 16 (dk + dv) FLOP a token), the product with the
//! carried R is made only for the tokens before a block's first boundary, and R itself is brought
//! up to date once a block.

use super::matrix::{Into, View, ViewMut, dot, dot_f64, multiply};
use super::row::{CHUNK, Chunk};
use crate::events::{EXTEND, Ledger};
use crate::options::Merge;

const BLOCK: usize = 16;

/// What the open segment is known by, carried from block to block.
#[derive(Clone)]
pub(crate) struct Open {
    /// R up to the factor `e^log`, `[dk, dv]`.
    pub(crate) r: Vec<f32>,
    /// Log of the factor. Not 0 only while zero tokens alone have followed: an R that has decayed
    /// far below f32 still has a direction.
    pub(crate) log: f64,
    /// `|R|^2 e^{-2 log}`.
    squared: f64,
    pub(crate) ledger: Ledger,
}

/// How events are decided.
pub(crate) enum Decide<'a> {
    /// By the rules.
    Rules { tau: f32, capacity: usize, merge: Merge },
    /// By a log of the chunk's tokens.
    Log(&'a [u8]),
}

/// Results of a chunk; the first `len` entries of each are valid.
pub(crate) struct Segmented {
    pub(crate) events: Vec<u8>,
    pub(crate) drift: Vec<f32>,
    /// Numerator, `|R|^2` before the token, and `|k|^2 |v|^2`, of every token.
    pub(crate) numerator: Vec<f64>,
    pub(crate) squared: Vec<f64>,
    pub(crate) energy: Vec<f64>,
}

impl Segmented {
    pub(crate) fn new() -> Self {
        Segmented {
            events: vec![0; CHUNK],
            drift: vec![0.0; CHUNK],
            numerator: vec![0.0; CHUNK],
            squared: vec![0.0; CHUNK],
            energy: vec![0.0; CHUNK],
        }
    }
}

/// Scratch of [`segment`].
pub(crate) struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    carried: Vec<f32>,
    decayed: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new(dk: usize, dv: usize) -> Self {
        Scratch {
            keys: vec![0.0; BLOCK * BLOCK],
            values: vec![0.0; BLOCK * BLOCK],
            carried: vec![0.0; BLOCK * dv],
            decayed: vec![0.0; BLOCK * dk],
        }
    }
}

impl Open {
    pub(crate) fn new(ledger: Ledger, r: Vec<f32>) -> Self {
        let squared = dot_f64(&r, &r);
        Open { r, log: 0.0, squared, ledger }
    }

    /// R itself.
    pub(crate) fn store(&self, out: &mut [f32]) {
        let factor = self.log.exp() as f32;
        out.iter_mut().zip(&self.r).for_each(|(out, r)| *out = factor * r);
    }
}

/// `I = sqrt(2 - 2 c)`, a zero norm giving c = 0.
pub(crate) fn drift(numerator: f64, energy: f64, squared: f64) -> f32 {
    let norms = (energy * squared).sqrt();
    let cosine = if norms > 0.0 { (numerator / norms).min(1.0) } else { 0.0 };
    (2.0 - 2.0 * cosine).sqrt() as f32
}

/// Judges every token of `chunk` and takes its event.
pub(crate) fn segment(
    open: &mut Open,
    chunk: &Chunk,
    decide: &Decide,
    out: &mut Segmented,
    scratch: &mut Scratch,
) {
    for first in (0..chunk.len).step_by(BLOCK) {
        block(open, chunk, first, BLOCK.min(chunk.len - first), decide, out, scratch);
    }
}

fn block(
    open: &mut Open,
    chunk: &Chunk,
    first: usize,
    len: usize,
    decide: &Decide,
    out: &mut Segmented,
    scratch: &mut Scratch,
) {
    let (dk, dv) = (chunk.k.len() / CHUNK, chunk.v.len() / CHUNK);
    let k = &chunk.k[first * dk..][..len * dk];
    let v = &chunk.v[first * dv..][..len * dv];
    let (keys, values) = (View::new(k, len, dk), View::new(v, len, dv));
    multiply(ViewMut::new(&mut scratch.keys, len, len), Into::Set, 1.0, keys, keys.t());
    multiply(ViewMut::new(&mut scratch.values, len, len), Into::Set, 1.0, values, values.t());
    // Gamma from the block's first token on.
    let before = chunk.gamma[first] - chunk.g[first];
    let gamma = |t: usize| chunk.gamma[first + t] - before;

    // First token of the open segment in this block; none while the segment is the carried one.
    let mut start = None;
    // Rows of K R that are there.
    let mut carried_rows = 0;
    // Nothing but zero tokens have joined the carried segment: its scale does not matter.
    let mut pure = true;
    let mut squared = open.squared;
    for t in 0..len {
        let (kt, vt) = (&k[t * dk..][..dk], &v[t * dv..][..dv]);
        let energy = dot_f64(kt, kt) * dot_f64(vt, vt);
        let pairs = |from: usize| -> f64 {
            (from..t)
                .map(|s| {
                    let x = f64::from(scratch.keys[t * len + s]) * f64::from(scratch.values[t * len + s]);
                    (gamma(t) - gamma(s)).exp() * x
                })
                .sum()
        };
        let mut numerator = pairs(start.unwrap_or(0));
        if !pure {
            squared *= (2.0 * chunk.g[first + t]).exp();
        }
        if start.is_none() && squared > 0.0 {
            if t >= carried_rows {
                // Most tokens open a slot, so a block's first token is asked alone.
                let rows = match decide {
                    _ if t == 0 => 1,
                    Decide::Log(log) => {
                        let to = (t..len).find(|&t| log[first + t] != EXTEND).unwrap_or(len - 1);
                        to + 1 - t
                    }
                    Decide::Rules { .. } => len - t,
                };
                multiply(
                    ViewMut::new(&mut scratch.carried[t * dv..], rows, dv),
                    Into::Set,
                    1.0,
                    View::new(&k[t * dk..], rows, dk),
                    View::new(&open.r, dk, dv),
                );
                carried_rows = t + rows;
            }
            let carried = f64::from(dot(&scratch.carried[t * dv..][..dv], vt));
            if pure {
                numerator = carried;
            } else {
                numerator += (open.log + gamma(t)).exp() * carried;
            }
        }
        let score = drift(numerator, energy, squared);
        let event = match decide {
            Decide::Log(log) => log[first + t],
            &Decide::Rules { tau, capacity, merge } => open.ledger.decide(score, tau, capacity, merge),
        };
        open.ledger.apply(event, score);
        out.drift[first + t] = score;
        out.events[first + t] = event;
        out.energy[first + t] = energy;
        // In true units, whatever the scale that the segment is carried in.
        let scale = if pure { (open.log + gamma(t)).exp() } else { 1.0 };
        out.numerator[first + t] = numerator * scale;
        out.squared[first + t] = squared * scale * scale;
        if event != EXTEND {
            (start, pure, squared) = (Some(t), false, energy);
        } else if energy > 0.0 {
            if pure {
                numerator *= scale;
                squared *= scale * scale;
                pure = false;
            }
            squared = (squared + 2.0 * numerator + energy).max(0.0);
        }
    }

    // R = [e^Gamma R] + sum e^{Gamma_end - Gamma_s} k_s v_s^T over the open segment's tokens.
    open.squared = squared;
    let total = gamma(len - 1);
    if pure {
        open.log += total;
        return;
    }
    let from = start.unwrap_or(0);
    for s in from..len {
        let factor = (total - gamma(s)).exp() as f32;
        let decayed = &mut scratch.decayed[(s - from) * dk..][..dk];
        decayed.iter_mut().zip(&k[s * dk..][..dk]).for_each(|(out, k)| *out = factor * k);
    }
    let into = match start {
        Some(_) => Into::Set,
        None => Into::Add((open.log + total).exp() as f32),
    };
    let keys = View::new(&scratch.decayed, len - from, dk).t();
    let values = View::new(&v[from * dv..], len - from, dv);
    multiply(ViewMut::new(&mut open.r, dk, dv), into, 1.0, keys, values);
    open.log = 0.0;
}
