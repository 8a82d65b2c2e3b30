//! **prepare**: what the scan needs of a chunk and that knows nothing of slots (OPERATOR.md, section 4):
//! the read query Qt, the intra matrix P, the write key Kh and, for the delta rule, the transition's
//! W and Kd. `scale` stands in Qt and P.

use super::matrix::{Into, View, ViewMut, add_scaled, multiply, scale};
use super::row::{CHUNK, Chunk};
use crate::options::Recurrence;
use crate::problem::Shape;

/// A prepared chunk, row-major; the first `len` rows of each are valid.
pub(crate) struct Prepared {
    pub(crate) recurrence: Recurrence,
    /// `Q K^T`, all pairs, before decay and scale, `[len, len]`.
    pub(crate) qk: Vec<f32>,
    /// Decay `D_ts` for s <= t, else 0, `[len, len]`.
    pub(crate) decay: Vec<f32>,
    /// `A = scale (Q K^T) . D`, `[len, len]`.
    pub(crate) a: Vec<f32>,
    /// Intra matrix; for the gated recurrence A.
    p: Vec<f32>,
    /// Read query, `[len, dk]`.
    pub(crate) qt: Vec<f32>,
    /// `e^{Gamma_C - Gamma} K`, `[len, dk]`.
    pub(crate) kd: Vec<f32>,
    /// Write key; for the gated recurrence Kd.
    kh: Vec<f32>,
    /// `Tm (beta e^Gamma K)`, `[len, dk]`.
    pub(crate) w: Vec<f32>,
    /// `K K^T`, all pairs, `[len, len]`.
    pub(crate) kk: Vec<f32>,
    /// `Tm = (I + tril(diag(beta) (K K^T . D), -1))^-1`, `[len, len]`.
    pub(crate) tm: Vec<f32>,
    /// `beta e^Gamma K`, `[len, dk]`.
    pub(crate) kb: Vec<f32>,
    /// Gamma_C, and `e^{Gamma_C}`.
    pub(crate) total_log: f64,
    pub(crate) total: f32,
    /// `e^Gamma`, `[len]`.
    pub(crate) to_start: Vec<f32>,
    /// `e^{Gamma_C - Gamma}`, `[len]`.
    pub(crate) to_end: Vec<f32>,
}

impl Prepared {
    pub(crate) fn new(shape: &Shape, recurrence: Recurrence) -> Self {
        let rows = |width: usize| vec![0.0; CHUNK * width];
        let delta = recurrence == Recurrence::GatedDelta;
        let delta_rows = |width: usize| if delta { rows(width) } else { Vec::new() };
        Prepared {
            recurrence,
            qk: rows(CHUNK),
            decay: rows(CHUNK),
            a: rows(CHUNK),
            p: delta_rows(CHUNK),
            qt: rows(shape.dk),
            kd: rows(shape.dk),
            kh: delta_rows(shape.dk),
            w: delta_rows(shape.dk),
            kk: delta_rows(CHUNK),
            tm: delta_rows(CHUNK),
            kb: delta_rows(shape.dk),
            total_log: 0.0,
            total: 1.0,
            to_start: rows(1),
            to_end: rows(1),
        }
    }

    /// Intra matrix P, lower triangle, `[len, len]`.
    pub(crate) fn p(&self) -> &[f32] {
        if self.recurrence == Recurrence::Gated { &self.a } else { &self.p }
    }

    /// Write key Kh, `[len, dk]`.
    pub(crate) fn kh(&self) -> &[f32] {
        if self.recurrence == Recurrence::Gated { &self.kd } else { &self.kh }
    }
}

/// `D_ts = e^{Gamma_t - Gamma_s}` for s <= t, else 0.
fn decay_matrix(gamma: &[f64], out: &mut [f32]) {
    let len = gamma.len();
    out[..len * len].fill(0.0);
    let total = gamma.last().map_or(0.0, |last| -last);
    if total < 600.0 {
        // Both factors are within f64's range, so that 2 C exponentials do for C^2 / 2.
        let up: Vec<f64> = gamma.iter().map(|gamma| (-gamma).exp()).collect();
        for t in 0..len {
            let down = gamma[t].exp();
            let row = &mut out[t * len..][..=t];
            row.iter_mut().zip(&up).for_each(|(out, up)| *out = (down * up) as f32);
        }
    } else {
        for t in 0..len {
            for s in 0..=t {
                out[t * len + s] = (gamma[t] - gamma[s]).exp() as f32;
            }
        }
    }
}

/// Rows of `x` times `factors`.
fn scaled_rows(x: &[f32], width: usize, factors: impl Iterator<Item = f32>, out: &mut [f32]) {
    for ((x, factor), out) in x.chunks_exact(width).zip(factors).zip(out.chunks_exact_mut(width)) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
    }
}

/// Prepares `chunk`; `reads` = false leaves out all but what writing takes (Kh, W, Kd).
pub(crate) fn prepare(chunk: &Chunk, read_scale: f32, reads: bool, out: &mut Prepared) {
    let len = chunk.len;
    let dk = chunk.k.len() / CHUNK;
    let gamma = &chunk.gamma[..len];
    let total = chunk.total();
    let delta = out.recurrence == Recurrence::GatedDelta;
    (out.total_log, out.total) = (total, total.exp() as f32);
    for (t, gamma) in gamma.iter().enumerate() {
        out.to_start[t] = gamma.exp() as f32;
        out.to_end[t] = (total - gamma).exp() as f32;
    }
    let to_end = out.to_end[..len].iter().copied();
    scaled_rows(&chunk.k, dk, to_end, &mut out.kd);
    let (q, k) = (View::new(&chunk.q, len, dk), View::new(&chunk.k, len, dk));
    if reads || delta {
        decay_matrix(gamma, &mut out.decay);
    }
    if reads {
        scaled_rows(&chunk.q, dk, out.to_start[..len].iter().map(|x| read_scale * x), &mut out.qt);
        multiply(ViewMut::new(&mut out.qk, len, len), Into::Set, 1.0, q, k.t());
        let a = out.a[..len * len].iter_mut();
        for ((a, qk), decay) in a.zip(&out.qk).zip(&out.decay) {
            *a = read_scale * qk * decay;
        }
    }
    if !delta {
        return;
    }

    // L = tril(diag(beta) (K K^T . D), -1); Tm = (I + L)^-1 by forward substitution.
    multiply(ViewMut::new(&mut out.kk, len, len), Into::Set, 1.0, k, k.t());
    let beta = &chunk.beta[..len];
    out.tm[..len * len].fill(0.0);
    for t in 0..len {
        let (above, row) = out.tm.split_at_mut(t * len);
        for s in 0..t {
            let l = beta[t] * out.kk[t * len + s] * out.decay[t * len + s];
            add_scaled(&mut row[..=s], -l, &above[s * len..][..=s]);
        }
        row[t] = 1.0;
    }
    let tm = View::new(&out.tm, len, len);
    let strengths = beta.iter().zip(&out.to_start).map(|(beta, to_start)| beta * to_start);
    scaled_rows(&chunk.k, dk, strengths, &mut out.kb);
    multiply(ViewMut::new(&mut out.w, len, dk), Into::Set, 1.0, tm, View::new(&out.kb, len, dk));
    let kd = View::new(&out.kd, len, dk);
    multiply(ViewMut::new(&mut out.kh, len, dk), Into::Set, 1.0, tm.t(), kd);
    for (row, &beta) in out.kh.chunks_exact_mut(dk).zip(beta) {
        scale(row, beta);
    }
    if reads {
        let a = View::new(&out.a, len, len);
        let w = View::new(&out.w, len, dk);
        multiply(ViewMut::new(&mut out.qt, len, dk), Into::Add(1.0), -1.0, a, w);
        multiply(ViewMut::new(&mut out.p, len, len), Into::Set, 1.0, a, tm);
        for row in out.p[..len * len].chunks_exact_mut(len) {
            row.iter_mut().zip(beta).for_each(|(p, beta)| *p *= beta);
        }
        // The product of two lower triangles is one, up to the sign of its zeros.
        for t in 0..len {
            out.p[t * len + t + 1..(t + 1) * len].fill(0.0);
        }
    }
}
