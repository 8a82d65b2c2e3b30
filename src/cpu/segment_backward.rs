//! The adjoint of **segment**: the gradient of the drift (soft boundaries) and of the final R carried
//! into k, v, g and the initial R, the log held constant.
//!
//! Per token, with num, the squared norm N before it and E = |k|^2 |v|^2:
//! `c = num / sqrt(E N)`, `I = sqrt(2 - 2 c)`, `N_t = e^{2 g_t} N_{t-1}` before and
//! `N_t + 2 num + E` (or E, where a slot opens) after the token. So all but the pairs and the products
//! with the carried R is a recursion of scalars.

use super::matrix::{Into, View, ViewMut, add_scaled, dot, dot_f64, multiply};
use super::prepare_backward::ChunkGradients;
use super::row::{CHUNK, Chunk};
use super::segment::Segmented;
use crate::events::EXTEND;
use crate::reference::DRIFT_FLOOR;

/// Adjoint of the open segment, carried from chunk to chunk in reverse.
pub(crate) struct OpenAdjoint {
    /// dR, `[dk, dv]`.
    pub(crate) r: Vec<f32>,
    /// Adjoint of |R|^2 beside that of R.
    pub(crate) squared: f64,
}

/// Adds the gradients of one chunk. `r` is R before the chunk. `d_drift [len]`; `dv [len, dv]`.
pub(crate) fn segment_backward(
    chunk: &Chunk,
    segmented: &Segmented,
    r: &[f32],
    d_drift: &[f32],
    adjoint: &mut OpenAdjoint,
    out: &mut ChunkGradients,
    d_v: &mut [f32],
) {
    let len = chunk.len;
    let (dk, dv) = (chunk.k.len() / CHUNK, chunk.v.len() / CHUNK);
    if len == 0 {
        return;
    }
    let events = &segmented.events[..len];
    let (k, v) = (View::new(&chunk.k, len, dk), View::new(&chunk.v, len, dv));
    let mut keys = vec![0.0; len * len];
    let mut values = vec![0.0; len * len];
    multiply(ViewMut::new(&mut keys, len, len), Into::Set, 1.0, k, k.t());
    multiply(ViewMut::new(&mut values, len, len), Into::Set, 1.0, v, v.t());

    // First token of the segment that was open before token t; none: the carried one.
    let mut open = None;
    let start: Vec<Option<usize>> = (0..len)
        .map(|t| {
            let before = open;
            if events[t] != EXTEND {
                open = Some(t);
            }
            before
        })
        .collect();

    // Scalars, in reverse: dnum, and the adjoint of |R|^2.
    let mut d_numerator = vec![0.0f64; len];
    let mut d_squared = adjoint.squared;
    for t in (0..len).rev() {
        let (numerator, squared, energy) =
            (segmented.numerator[t], segmented.squared[t], segmented.energy[t]);
        let mut d_energy = d_squared;
        let mut d_before = 0.0;
        if events[t] == EXTEND {
            d_before = d_squared;
            d_numerator[t] = 2.0 * d_squared;
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
        // N before the token is e^{2 g} times N after the one before it.
        out.decay.g[t] += 2.0 * d_before * squared;
        d_squared = d_before * (2.0 * chunk.g[t]).exp();
    }
    adjoint.squared = d_squared;

    // Products with the carried R: num_t holds e^Gamma_t k_t^T R v_t up to the first boundary.
    let carried = start.iter().take_while(|start| start.is_none()).count();
    let (k_first, v_first) = (View::new(&chunk.k, carried, dk), View::new(&chunk.v, carried, dv));
    let entry = View::new(r, dk, dv);
    let mut r_v = vec![0.0f32; carried * dk];
    let mut k_r = vec![0.0f32; carried * dv];
    multiply(ViewMut::new(&mut r_v, carried, dk), Into::Set, 1.0, v_first, entry.t());
    multiply(ViewMut::new(&mut k_r, carried, dv), Into::Set, 1.0, k_first, entry);
    let mut weighted = vec![0.0f32; carried * dv];

    // Pairs: num_t holds sum_s D_ts (k_t . k_s)(v_t . v_s).
    let mut by_keys = vec![0.0f32; len * len];
    let mut by_values = vec![0.0f32; len * len];
    let mut parts = vec![0.0f64; len];
    for t in 0..len {
        let from = start[t].unwrap_or(0);
        let mut in_carried = 0.0;
        if t < carried {
            let weight = d_numerator[t] * chunk.gamma[t].exp();
            let (r_v, k_r) = (&r_v[t * dk..][..dk], &k_r[t * dv..][..dv]);
            in_carried = chunk.gamma[t].exp() * f64::from(dot(r_v, &chunk.k[t * dk..][..dk]));
            add_scaled(&mut out.k[t * dk..][..dk], weight as f32, r_v);
            add_scaled(&mut d_v[t * dv..][..dv], weight as f32, k_r);
            add_scaled(&mut weighted[t * dv..][..dv], weight as f32, &chunk.v[t * dv..][..dv]);
        }
        for s in from..t {
            let at = t * len + s;
            let decay = (chunk.gamma[t] - chunk.gamma[s]).exp();
            parts[s] = decay * f64::from(keys[at]) * f64::from(values[at]);
            by_values[at] = (d_numerator[t] * decay * f64::from(values[at])) as f32;
            by_keys[at] = (d_numerator[t] * decay * f64::from(keys[at])) as f32;
        }
        // A decay that all parts share cancels in c. So that its gradient does too, the parts must
        // sum to the numerator that was judged: the largest takes what rounding has left over.
        let left = segmented.numerator[t] - in_carried - parts[from..t].iter().sum::<f64>();
        let largest = (from..t).max_by(|&a, &b| parts[a].abs().total_cmp(&parts[b].abs()));
        match largest {
            Some(s) if parts[s].abs() >= in_carried.abs() => parts[s] += left,
            _ if t < carried => in_carried += left,
            _ => {}
        }
        out.decay.from_start[t] += d_numerator[t] * in_carried;
        let mut before = 0.0;
        for s in from..t {
            before += d_numerator[t] * parts[s];
            out.decay.g[s + 1] += before;
        }
    }
    for (pairs, x, out, width) in [(&by_values, k, &mut out.k[..], dk), (&by_keys, v, &mut d_v[..], dv)] {
        let pairs = View::new(pairs, len, len);
        multiply(ViewMut::new(out, len, width), Into::Add(1.0), 1.0, pairs, x);
        multiply(ViewMut::new(out, len, width), Into::Add(1.0), 1.0, pairs.t(), x);
    }

    // R after the chunk: sum of e^{Gamma_C - Gamma_s} k_s v_s^T over the last segment.
    let total = chunk.total();
    let mut d_entry = vec![0.0f32; dk * dv];
    let first = open.unwrap_or(0);
    let tokens = len - first;
    let exit = View::new(&adjoint.r, dk, dv);
    let mut dr_v = vec![0.0f32; tokens * dk];
    let mut k_dr = vec![0.0f32; tokens * dv];
    let (k_last, v_last) =
        (View::new(&chunk.k[first * dk..], tokens, dk), View::new(&chunk.v[first * dv..], tokens, dv));
    multiply(ViewMut::new(&mut dr_v, tokens, dk), Into::Set, 1.0, v_last, exit.t());
    multiply(ViewMut::new(&mut k_dr, tokens, dv), Into::Set, 1.0, k_last, exit);
    for s in first..len {
        let (dr_v, k_dr) = (&dr_v[(s - first) * dk..][..dk], &k_dr[(s - first) * dv..][..dv]);
        let factor = (total - chunk.gamma[s]).exp() as f32;
        let x = f64::from(factor) * f64::from(dot(dr_v, &chunk.k[s * dk..][..dk]));
        out.decay.to_end[s] += x;
        add_scaled(&mut out.k[s * dk..][..dk], factor, dr_v);
        add_scaled(&mut d_v[s * dv..][..dv], factor, k_dr);
    }
    if open.is_none() {
        let decay = total.exp() as f32;
        out.decay.total += f64::from(decay) * dot_f64(&adjoint.r, r);
        add_scaled(&mut d_entry, decay, &adjoint.r);
    }

    let weighted = View::new(&weighted, carried, dv);
    multiply(ViewMut::new(&mut d_entry, dk, dv), Into::Add(1.0), 1.0, k_first.t(), weighted);
    adjoint.r = d_entry;
}
