//! The adjoint of **prepare** (OPERATOR.md, section 4): from the adjoints of Qt, P, Kh (and W, Kd) to
//! those of q, k, beta and g.
//!
//! A decay `e^{Gamma_t - Gamma_s}` gives `gradient . value` to every g_u with s < u <= t, and is summed
//! that way. (Summing it into Gamma_t, out of Gamma_s, and cumulating is shorter, but under strong
//! decay the gradient of g is what is left of terms far larger than itself.)

use super::matrix::{Into, View, ViewMut, add_scaled, dot, multiply};
use super::prepare::Prepared;
use super::row::{CHUNK, Chunk};
use crate::options::Recurrence;

/// Adjoints that the scan left of a prepared chunk; the first `len` rows of each are valid.
pub(crate) struct PreparedAdjoint {
    /// Of Qt, Kh; of W and Kd, delta rule, `[len, dk]`.
    pub(crate) qt: Vec<f32>,
    pub(crate) kh: Vec<f32>,
    pub(crate) w: Vec<f32>,
    pub(crate) kd: Vec<f32>,
    /// Of P, lower triangle, `[len, len]`.
    pub(crate) p: Vec<f32>,
    /// Of Gamma_C by way of the transition.
    pub(crate) total: f64,
}

/// Gradients of a chunk's inputs, `[len, dk]` and `[len]`.
pub(crate) struct ChunkGradients {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) beta: Vec<f32>,
    pub(crate) decay: DecayGradients,
}

/// Gradients of g, gathered by the decays that they come through.
pub(crate) struct DecayGradients {
    /// Of g itself.
    pub(crate) g: Vec<f64>,
    /// Through `e^{Gamma_t}`: for every g_u with u <= t.
    pub(crate) from_start: Vec<f64>,
    /// Through `e^{Gamma_C - Gamma_s}`: for every g_u with u > s.
    pub(crate) to_end: Vec<f64>,
    /// Through `e^{Gamma_C}`: for every g.
    pub(crate) total: f64,
}

impl DecayGradients {
    fn new() -> Self {
        let zeros = || vec![0.0; CHUNK];
        DecayGradients { g: zeros(), from_start: zeros(), to_end: zeros(), total: 0.0 }
    }

    fn clear(&mut self) {
        self.g.fill(0.0);
        self.from_start.fill(0.0);
        self.to_end.fill(0.0);
        self.total = 0.0;
    }

    /// Through the decays of a lower triangle of pairs, `gradient . value`, `[len, len]`.
    pub(crate) fn add_pairs(&mut self, gradient: &[f32], value: &[f32], len: usize) {
        for t in 0..len {
            let mut before = 0.0;
            for u in 1..=t {
                let at = t * len + u - 1;
                before += f64::from(gradient[at]) * f64::from(value[at]);
                self.g[u] += before;
            }
        }
    }

    /// The gradient of every g of a chunk of `len` tokens, left in `g`.
    pub(crate) fn finish(&mut self, len: usize) {
        let mut after = self.total;
        for u in (0..len).rev() {
            after += self.from_start[u];
            self.g[u] += after;
        }
        let mut before = 0.0;
        for u in 1..len {
            before += self.to_end[u - 1];
            self.g[u] += before;
        }
    }
}

impl ChunkGradients {
    pub(crate) fn new(dk: usize) -> Self {
        ChunkGradients {
            q: vec![0.0; CHUNK * dk],
            k: vec![0.0; CHUNK * dk],
            beta: vec![0.0; CHUNK],
            decay: DecayGradients::new(),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.q.fill(0.0);
        self.k.fill(0.0);
        self.beta.fill(0.0);
        self.decay.clear();
    }
}

/// `C = a B` as a new matrix.
fn product(a: View, b: View, rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    multiply(ViewMut::new(&mut out, rows, cols), Into::Set, 1.0, a, b);
    out
}

/// Adds the gradients of one chunk to `out`.
pub(crate) fn prepare_backward(
    chunk: &Chunk,
    prepared: &Prepared,
    read_scale: f32,
    mut adjoint: PreparedAdjoint,
    out: &mut ChunkGradients,
) {
    let len = chunk.len;
    let dk = chunk.k.len() / CHUNK;
    let row = |t: usize| t * dk..(t + 1) * dk;
    let (q, k) = (View::new(&chunk.q, len, dk), View::new(&chunk.k, len, dk));

    // Qt = scale e^Gamma Q [- A W].
    for t in 0..len {
        let at = row(t);
        let factor = read_scale * prepared.to_start[t];
        let d = dot(&adjoint.qt[at.clone()], &chunk.q[at.clone()]);
        out.decay.from_start[t] += f64::from(factor) * f64::from(d);
        add_scaled(&mut out.q[at.clone()], factor, &adjoint.qt[at]);
    }
    if prepared.recurrence == Recurrence::GatedDelta {
        delta(chunk, prepared, &mut adjoint, out);
    }
    // A = scale (Q K^T) . D; for the gated recurrence P is A.
    let mut d_a = adjoint.p;
    out.decay.add_pairs(&d_a, &prepared.a, len);
    d_a.iter_mut().zip(&prepared.decay).for_each(|(d_a, decay)| *d_a *= read_scale * decay);
    let d_a = View::new(&d_a, len, len);
    multiply(ViewMut::new(&mut out.q, len, dk), Into::Add(1.0), 1.0, d_a, k);
    multiply(ViewMut::new(&mut out.k, len, dk), Into::Add(1.0), 1.0, d_a.t(), q);

    // Kd = e^{Gamma_C - Gamma} K; for the gated recurrence Kh is Kd.
    let d_kd = match prepared.recurrence {
        Recurrence::Gated => &adjoint.kh,
        Recurrence::GatedDelta => &adjoint.kd,
    };
    for s in 0..len {
        let at = row(s);
        let x = f64::from(dot(&d_kd[at.clone()], &prepared.kd[at.clone()]));
        out.decay.to_end[s] += x;
        add_scaled(&mut out.k[at.clone()], prepared.to_end[s], &d_kd[at]);
    }
    out.decay.total += adjoint.total;
}

/// What the delta rule adds. Leaves in `adjoint.p` the adjoint of A, in `adjoint.kd` that of Kd.
fn delta(chunk: &Chunk, prepared: &Prepared, adjoint: &mut PreparedAdjoint, out: &mut ChunkGradients) {
    let len = chunk.len;
    let dk = chunk.k.len() / CHUNK;
    let beta = &chunk.beta[..len];
    let (tm, a) = (View::new(&prepared.tm, len, len), View::new(&prepared.a, len, len));
    let (w, kd, kb) =
        (View::new(&prepared.w, len, dk), View::new(&prepared.kd, len, dk), View::new(&prepared.kb, len, dk));
    let k = View::new(&chunk.k, len, dk);

    // P = (A Tm) diag(beta).
    let a_tm = product(a, tm, len, len);
    let mut d_a_tm = vec![0.0; len * len];
    for t in 0..len {
        for s in 0..=t {
            let d_p = adjoint.p[t * len + s];
            out.beta[s] += d_p * a_tm[t * len + s];
            d_a_tm[t * len + s] = d_p * beta[s];
        }
    }
    let d_a_tm = View::new(&d_a_tm, len, len);
    let mut d_a = product(d_a_tm, tm.t(), len, len);
    let mut d_tm = product(a.t(), d_a_tm, len, len);

    // Qt = ... - A W.
    let d_qt = View::new(&adjoint.qt, len, dk);
    multiply(ViewMut::new(&mut d_a, len, len), Into::Add(1.0), -1.0, d_qt, w.t());
    multiply(ViewMut::new(&mut adjoint.w, len, dk), Into::Add(1.0), -1.0, a.t(), d_qt);

    // Kh = diag(beta) Tm^T Kd.
    let tm_kd = product(tm.t(), kd, len, dk);
    for s in 0..len {
        let at = s * dk..(s + 1) * dk;
        out.beta[s] += dot(&adjoint.kh[at.clone()], &tm_kd[at.clone()]);
        super::matrix::scale(&mut adjoint.kh[at], beta[s]);
    }
    let d_kh = View::new(&adjoint.kh, len, dk);
    multiply(ViewMut::new(&mut d_tm, len, len), Into::Add(1.0), 1.0, kd, d_kh.t());
    multiply(ViewMut::new(&mut adjoint.kd, len, dk), Into::Add(1.0), 1.0, tm, d_kh);

    // W = Tm Kb, Kb = beta e^Gamma K.
    let d_w = View::new(&adjoint.w, len, dk);
    multiply(ViewMut::new(&mut d_tm, len, len), Into::Add(1.0), 1.0, d_w, kb.t());
    let d_kb = product(tm.t(), d_w, len, dk);
    for t in 0..len {
        let at = t * dk..(t + 1) * dk;
        let d = dot(&d_kb[at.clone()], &chunk.k[at.clone()]) * prepared.to_start[t];
        out.beta[t] += d;
        out.decay.from_start[t] += f64::from(beta[t]) * f64::from(d);
        add_scaled(&mut out.k[at.clone()], beta[t] * prepared.to_start[t], &d_kb[at]);
    }

    // Tm = (I + L)^-1: dL = -tril(Tm^T dTm Tm^T, -1), L = diag(beta) (K K^T . D).
    let left = product(tm.t(), View::new(&d_tm, len, len), len, len);
    let mut d_l = product(View::new(&left, len, len), tm.t(), len, len);
    for t in 0..len {
        for s in 0..len {
            let at = t * len + s;
            if s >= t {
                d_l[at] = 0.0;
                continue;
            }
            out.beta[t] -= d_l[at] * prepared.kk[at] * prepared.decay[at];
            d_l[at] *= -beta[t] * prepared.decay[at];
        }
    }
    out.decay.add_pairs(&d_l, &prepared.kk, len);
    let d_l = View::new(&d_l, len, len);
    multiply(ViewMut::new(&mut out.k, len, dk), Into::Add(1.0), 1.0, d_l, k);
    multiply(ViewMut::new(&mut out.k, len, dk), Into::Add(1.0), 1.0, d_l.t(), k);

    // A is lower triangular: what the products put above the diagonal is no gradient.
    for t in 0..len {
        d_a[t * len + t + 1..(t + 1) * len].fill(0.0);
    }
    adjoint.p = d_a;
}
