//! The adjoint of **segment**: the gradient of the drift (soft boundaries) and of the final R carried
//! into k, v, g and the initial R, the log held constant.
//!
//! All is kept as segment keeps it, relative to the open segment's newest token u that is not zero:
//! `num_t = sum_s e^{Gamma_u - Gamma_s} (k_t . k_s)(v_t . v_s)`, N = |R|^2 at u, `c = num / sqrt(E N)`,
//! `E = |k|^2 |v|^2`, and with the decay d since u, `N <- d^2 N + 2 d num + E`. So a decay that the whole
//! segment shares has no gradient by construction, not by cancelling.

use super::matrix::{Into, View, ViewMut, add_scaled, dot, dot_f64, multiply};
use super::prepare_backward::ChunkGradients;
use super::row::{CHUNK, Chunk};
use super::segment::{Open, Segmented};
use crate::events::EXTEND;
use crate::reference::DRIFT_FLOOR;

/// Adjoint of an [`Open`], carried from chunk to chunk in reverse.
pub(crate) struct OpenAdjoint {
    /// Of R as it was at its newest token, `[dk, dv]`.
    r: Vec<f32>,
    /// Of its squared norm.
    squared: f64,
    /// Of the log decay since then.
    log: f64,
}

impl OpenAdjoint {
    /// From the gradient of the final R.
    pub(crate) fn new(open: &Open, d_r: &[f32]) -> Self {
        let decay = open.log.exp();
        OpenAdjoint {
            r: d_r.iter().map(|d| decay as f32 * d).collect(),
            squared: 0.0,
            log: decay * dot_f64(d_r, &open.r),
        }
    }

    /// The gradient of the initial R, whose squared norm is its own function.
    pub(crate) fn finish(mut self, initial: &[f32]) -> Vec<f32> {
        add_scaled(&mut self.r, (2.0 * self.squared) as f32, initial);
        self.r
    }
}

/// Where a token's open segment lies in the chunk.
#[derive(Clone, Copy)]
struct Place {
    /// First token of the segment; `None`: it was carried in.
    start: Option<usize>,
    /// Newest token that is not zero; `None`: R holds it.
    newest: Option<usize>,
}

/// The segment that was open before every token, and last the one that is open after the chunk.
fn places(events: &[u8], energy: &[f64]) -> Vec<Place> {
    let mut place = Place { start: None, newest: None };
    let mut out = vec![place];
    for (t, (&event, &energy)) in events.iter().zip(energy).enumerate() {
        if event != EXTEND {
            place = Place { start: Some(t), newest: Some(t) };
        } else if energy > 0.0 {
            place.newest = Some(t);
        }
        out.push(place);
    }
    out
}

/// Adds the gradients of one chunk. `open` is the segment before the chunk. `d_drift [len]`;
/// `d_v [len, dv]`.
pub(crate) fn segment_backward(
    chunk: &Chunk,
    segmented: &Segmented,
    open: &Open,
    d_drift: &[f32],
    adjoint: &mut OpenAdjoint,
    out: &mut ChunkGradients,
    d_v: &mut [f32],
) {
    let len = chunk.len;
    let (dk, dv) = (chunk.k.len() / CHUNK, chunk.v.len() / CHUNK);
    let places = places(&segmented.events[..len], &segmented.energy[..len]);
    let (k, v) = (View::new(&chunk.k, len, dk), View::new(&chunk.v, len, dv));
    let mut keys = vec![0.0; len * len];
    let mut values = vec![0.0; len * len];
    multiply(ViewMut::new(&mut keys, len, len), Into::Set, 1.0, k, k.t());
    multiply(ViewMut::new(&mut values, len, len), Into::Set, 1.0, v, v.t());
    let gamma = &chunk.gamma[..len];

    // The decay since the newest token, at the chunk's end.
    let last = places[len];
    let mut d_log = 0.0;
    match last.newest {
        Some(newest) => out.decay.to_end[newest] += adjoint.log,
        None => {
            out.decay.total += adjoint.log;
            d_log = adjoint.log;
        }
    }

    // Scalars, in reverse: dnum, and the adjoint of N as it is after each token.
    let mut d_numerator = vec![0.0f64; len];
    let mut d_after = vec![0.0f64; len];
    let mut d_squared = 0.0;
    match last.newest {
        Some(newest) => d_after[newest] = adjoint.squared,
        None => d_squared = adjoint.squared,
    }
    for t in (0..len).rev() {
        let (numerator, squared, energy) =
            (segmented.numerator[t], segmented.squared[t], segmented.energy[t]);
        let mut d_before = 0.0;
        let mut d_energy = 0.0;
        if segmented.events[t] != EXTEND {
            d_energy = d_after[t];
        } else if energy > 0.0 {
            let decay = segmented.since[t].exp();
            d_energy = d_after[t];
            d_before = decay * decay * d_after[t];
            d_numerator[t] = 2.0 * decay * d_after[t];
            // The decay since the newest token: g of those after it.
            let d_since = 2.0 * decay * (decay * squared + numerator) * d_after[t];
            out.decay.from_start[t] += d_since;
            match places[t].newest {
                Some(newest) => out.decay.from_start[newest] -= d_since,
                None => d_log += d_since,
            }
        }
        let drift = f64::from(segmented.drift[t]);
        let norms = (energy * squared).sqrt();
        if d_drift[t] != 0.0 && drift >= DRIFT_FLOOR && norms > 0.0 {
            let d_cosine = -f64::from(d_drift[t]) / drift;
            let cosine = numerator / norms;
            d_numerator[t] += d_cosine / norms;
            d_energy -= d_cosine * cosine / (2.0 * energy);
            d_before -= d_cosine * cosine / (2.0 * squared);
        }
        // E = |k|^2 |v|^2.
        let (kt, vt) = (&chunk.k[t * dk..][..dk], &chunk.v[t * dv..][..dv]);
        add_scaled(&mut out.k[t * dk..][..dk], (2.0 * d_energy * dot_f64(vt, vt)) as f32, kt);
        add_scaled(&mut d_v[t * dv..][..dv], (2.0 * d_energy * dot_f64(kt, kt)) as f32, vt);
        match places[t].newest {
            Some(newest) => d_after[newest] += d_before,
            None => d_squared += d_before,
        }
    }

    // Products with the carried R, for the tokens up to the first boundary.
    let carried = places[..len].iter().take_while(|place| place.start.is_none()).count();
    // What R has decayed by, up to the newest token.
    let decay_of = |place: Place| place.newest.map_or(0.0, |newest| open.log + gamma[newest]).exp();
    let (k_first, v_first) = (View::new(&chunk.k, carried, dk), View::new(&chunk.v, carried, dv));
    let entry = View::new(&open.r, dk, dv);
    let mut r_v = vec![0.0f32; carried * dk];
    let mut k_r = vec![0.0f32; carried * dv];
    multiply(ViewMut::new(&mut r_v, carried, dk), Into::Set, 1.0, v_first, entry.t());
    multiply(ViewMut::new(&mut k_r, carried, dv), Into::Set, 1.0, k_first, entry);
    let mut weighted = vec![0.0f32; carried * dv];

    // Pairs.
    let mut by_keys = vec![0.0f32; len * len];
    let mut by_values = vec![0.0f32; len * len];
    let mut parts = vec![0.0f64; len];
    for t in 0..len {
        let place = places[t];
        let mut in_carried = 0.0;
        if t < carried {
            let decay = decay_of(place);
            let weight = (d_numerator[t] * decay) as f32;
            let (r_v, k_r) = (&r_v[t * dk..][..dk], &k_r[t * dv..][..dv]);
            in_carried = decay * f64::from(dot(r_v, &chunk.k[t * dk..][..dk]));
            add_scaled(&mut out.k[t * dk..][..dk], weight, r_v);
            add_scaled(&mut d_v[t * dv..][..dv], weight, k_r);
            add_scaled(&mut weighted[t * dv..][..dv], weight, &chunk.v[t * dv..][..dv]);
        }
        // Zero tokens after the newest have no part in num, but a derivative.
        let from = place.start.unwrap_or(0);
        let base = place.newest.map_or(-open.log, |newest| gamma[newest]);
        if d_numerator[t] != 0.0 {
            for s in from..t {
                let at = t * len + s;
                let decay = (base - gamma[s]).exp();
                parts[s] = decay * f64::from(keys[at]) * f64::from(values[at]);
                by_values[at] = (d_numerator[t] * decay * f64::from(values[at])) as f32;
                by_keys[at] = (d_numerator[t] * decay * f64::from(keys[at])) as f32;
            }
        }
        let Some(newest) = place.newest else { continue };
        let d_carried = d_numerator[t] * in_carried;
        out.decay.from_start[newest] += d_carried;
        d_log += d_carried;
        let mut before = 0.0;
        for s in from..newest {
            before += d_numerator[t] * parts[s];
            out.decay.g[s + 1] += before;
        }
    }
    for (pairs, x, out, width) in [(&by_values, k, &mut out.k[..], dk), (&by_keys, v, &mut d_v[..], dv)] {
        let pairs = View::new(pairs, len, len);
        multiply(ViewMut::new(out, len, width), Into::Add(1.0), 1.0, pairs, x);
        multiply(ViewMut::new(out, len, width), Into::Add(1.0), 1.0, pairs.t(), x);
    }

    // R after the chunk: sum of e^{Gamma_u - Gamma_s} k_s v_s^T over the last segment, [+ e^Gamma_u R].
    let first = last.start.unwrap_or(0);
    let tokens = len - first;
    let exit = View::new(&adjoint.r, dk, dv);
    let mut dr_v = vec![0.0f32; tokens * dk];
    let mut k_dr = vec![0.0f32; tokens * dv];
    let k_last = View::new(&chunk.k[first * dk..], tokens, dk);
    let v_last = View::new(&chunk.v[first * dv..], tokens, dv);
    multiply(ViewMut::new(&mut dr_v, tokens, dk), Into::Set, 1.0, v_last, exit.t());
    multiply(ViewMut::new(&mut k_dr, tokens, dv), Into::Set, 1.0, k_last, exit);
    let base = last.newest.map_or(-open.log, |newest| gamma[newest]);
    let mut before = 0.0;
    for s in first..len {
        let (dr_v, k_dr) = (&dr_v[(s - first) * dk..][..dk], &k_dr[(s - first) * dv..][..dv]);
        let factor = (base - gamma[s]).exp() as f32;
        if last.newest.is_some_and(|newest| s <= newest) {
            out.decay.g[s] += before;
            before += f64::from(factor) * f64::from(dot(dr_v, &chunk.k[s * dk..][..dk]));
        }
        add_scaled(&mut out.k[s * dk..][..dk], factor, dr_v);
        add_scaled(&mut d_v[s * dv..][..dv], factor, k_dr);
    }
    let mut d_entry = vec![0.0f32; dk * dv];
    match (last.start, last.newest) {
        (Some(_), _) => {}
        (None, None) => d_entry.copy_from_slice(&adjoint.r),
        (None, Some(newest)) => {
            let decay = decay_of(last);
            let d_decay = decay * dot_f64(&adjoint.r, &open.r);
            out.decay.from_start[newest] += d_decay;
            d_log += d_decay;
            add_scaled(&mut d_entry, decay as f32, &adjoint.r);
        }
    }
    let weighted = View::new(&weighted, carried, dv);
    multiply(ViewMut::new(&mut d_entry, dk, dv), Into::Add(1.0), 1.0, k_first.t(), weighted);
    *adjoint = OpenAdjoint { r: d_entry, squared: d_squared, log: d_log };
}
