//! **scan**: reading all slots, and the fused transition, merge and append (OPERATOR.md, section 4), for
//! one slice of value columns.
//!
//! - read: `O = sum_j diag(w[:,j]) Qt S_j + (P . Lambda) V`, `w_t[j] = lambda_t[pi_t(j)]`,
//!   `Lambda_ts = lambda_t[slot_t(s)]`
//! - write: `S'_i = sum over j that end in i of transition(S_j) + sum over r that end in i of Kh_r v_r^T`
//!
//! Slots stand still; their order is a table. Under the gated recurrence a slot that nothing ends in
//! is not touched: its decay is kept as a factor.

use super::matrix::{Into, View, ViewMut, add_scaled, multiply, scale};
use super::prepare::Prepared;
use super::row::CHUNK;
use crate::events::Replay;
use crate::options::Recurrence;
use std::ops::Range;

/// Most value columns of a slice. A row of products as wide as this runs at full rate, and a state
/// of dk = 128 stays in the second-level cache while it is worked on.
const SLICE: usize = 64;

/// Slices of the value columns. They depend on dv alone, so that results do not depend on threads.
pub(crate) fn slices(dv: usize) -> impl Iterator<Item = Range<usize>> {
    let count = dv.div_ceil(SLICE);
    let width = dv.div_ceil(count);
    (0..count).map(move |slice| slice * width..((slice + 1) * width).min(dv))
}

/// The states of one row and slice.
pub(crate) struct Bank {
    /// Value columns, of dv.
    pub(crate) columns: Range<usize>,
    dk: usize,
    /// Where slot j (0 the oldest) stands.
    order: Vec<usize>,
    /// Places that no slot has.
    free: Vec<usize>,
    /// States up to the factor `e^log`, `[M, dk, width]`.
    states: Vec<f32>,
    log: Vec<f64>,
    /// `Qt S_j` (and `W S_j`), `[2 len, width]`.
    products: Vec<f32>,
    /// `P . Lambda`, `[len, len]`.
    weighted: Vec<f32>,
    /// Values of the chunk, `[len, width]`.
    v: Vec<f32>,
    /// `[Qt; W]`, `[2 len, dk]`: delta rule.
    stacked: Vec<f32>,
    /// Output of the chunk, `[len, width]`.
    pub(crate) o: Vec<f32>,
}

/// `Lambda . P`: the lower triangle of P by the read weight of the slot that holds each token.
/// `weights [len, M]` by slot.
pub(crate) fn weigh_pairs(
    p: &[f32],
    weights: &[f32],
    capacity: usize,
    replay: &Replay,
    len: usize,
    out: &mut [f32],
) {
    out[..len * len].fill(0.0);
    for t in 0..len {
        let weights = &weights[t * capacity..][..capacity];
        for (s, &slot) in replay.slots(t).iter().enumerate() {
            out[t * len + s] = p[t * len + s] * weights[usize::from(slot)];
        }
    }
}

/// Columns `columns` of a row-major matrix `[len, width]`, made contiguous.
pub(crate) fn gather_columns(x: &[f32], width: usize, columns: &Range<usize>, out: &mut [f32]) {
    for (out, x) in out.chunks_exact_mut(columns.len()).zip(x.chunks_exact(width)) {
        out.copy_from_slice(&x[columns.clone()]);
    }
}

impl Bank {
    /// The states of a cache row, `[m, dk, dv]`, oldest first.
    pub(crate) fn new(
        states: &[f32],
        capacity: usize,
        (dk, dv): (usize, usize),
        columns: Range<usize>,
        recurrence: Recurrence,
    ) -> Self {
        let m = states.len() / (dk * dv);
        let width = columns.len();
        let mut held = vec![0.0; capacity * dk * width];
        gather_columns(states, dv, &columns, &mut held[..m * dk * width]);
        let stacked = if recurrence == Recurrence::GatedDelta { 2 * CHUNK * dk } else { 0 };
        Bank {
            columns,
            dk,
            order: (0..m).collect(),
            free: (m..capacity).rev().collect(),
            states: held,
            log: vec![0.0; capacity],
            products: vec![0.0; 2 * CHUNK * width],
            weighted: vec![0.0; CHUNK * CHUNK],
            v: vec![0.0; CHUNK * width],
            stacked: vec![0.0; stacked],
            o: vec![0.0; CHUNK * width],
        }
    }

    /// Elements of one slot's state.
    fn state(&self) -> usize {
        self.dk * self.columns.len()
    }

    /// The states, oldest first, `[m, dk, width]`.
    pub(crate) fn snapshot(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.order.len() * self.state());
        for &place in &self.order {
            let factor = self.log[place].exp() as f32;
            out.extend(self.states[place * self.state()..][..self.state()].iter().map(|s| factor * s));
        }
        out
    }

    /// Reads and writes one chunk. `v [len, dv]`, `weights [len, M]` by slot; without `weights` it
    /// only writes.
    pub(crate) fn scan(
        &mut self,
        chunk: (&Prepared, &Replay),
        len: usize,
        v: &[f32],
        dv: usize,
        weights: Option<(&[f32], usize)>,
    ) {
        let (prepared, replay) = chunk;
        let width = self.columns.len();
        gather_columns(&v[..len * dv], dv, &self.columns, &mut self.v);
        if let Some((weights, capacity)) = weights {
            weigh_pairs(prepared.p(), weights, capacity, replay, len, &mut self.weighted);
            multiply(
                ViewMut::new(&mut self.o, len, width),
                Into::Set,
                1.0,
                View::new(&self.weighted, len, len),
                View::new(&self.v, len, width),
            );
        }
        match prepared.recurrence {
            Recurrence::Gated => self.read_gated(prepared, replay, len, weights),
            Recurrence::GatedDelta => self.transition_delta(prepared, replay, len, weights),
        }
        self.exit(prepared, replay);
    }

    /// `O += sum_j diag(w[:,j]) Qt S_j`; decays stay factors.
    fn read_gated(
        &mut self,
        prepared: &Prepared,
        replay: &Replay,
        len: usize,
        weights: Option<(&[f32], usize)>,
    ) {
        let (width, state) = (self.columns.len(), self.state());
        if let Some(weights) = weights {
            let qt = View::new(&prepared.qt, len, self.dk);
            for (j, &place) in self.order.iter().enumerate() {
                let factor = self.log[place].exp() as f32;
                if factor == 0.0 {
                    continue;
                }
                let slot = View::new(&self.states[place * state..][..state], self.dk, width);
                multiply(ViewMut::new(&mut self.products, len, width), Into::Set, 1.0, qt, slot);
                add_read(&mut self.o, &self.products, width, j, factor, weights, replay, len);
            }
        }
        for &place in &self.order {
            self.log[place] += prepared.total_log;
        }
    }

    /// `O += sum_j diag(w[:,j]) Qt S_j` and `S_j <- e^{Gamma_C} S_j - Kd^T (W S_j)`.
    fn transition_delta(
        &mut self,
        prepared: &Prepared,
        replay: &Replay,
        len: usize,
        weights: Option<(&[f32], usize)>,
    ) {
        let (dk, width, state) = (self.dk, self.columns.len(), self.state());
        // One product reads the slot for both: the rows of Qt above those of W.
        let queries = if weights.is_some() { len } else { 0 };
        self.stacked[..queries * dk].copy_from_slice(&prepared.qt[..queries * dk]);
        self.stacked[queries * dk..][..len * dk].copy_from_slice(&prepared.w[..len * dk]);
        let rows = queries + len;
        let stacked = View::new(&self.stacked, rows, dk);
        let kd = View::new(&prepared.kd, len, dk);
        for (j, &place) in self.order.iter().enumerate() {
            let slot = &mut self.states[place * state..][..state];
            let products = ViewMut::new(&mut self.products, rows, width);
            multiply(products, Into::Set, 1.0, stacked, View::new(slot, dk, width));
            if let Some(weights) = weights {
                add_read(&mut self.o, &self.products, width, j, 1.0, weights, replay, len);
            }
            let held = View::new(&self.products[queries * width..], len, width);
            let slot = ViewMut::new(slot, dk, width);
            multiply(slot, Into::Add(prepared.total), -1.0, kd.t(), held);
        }
    }

    /// Merges what ends together and appends the chunk's tokens.
    fn exit(&mut self, prepared: &Prepared, replay: &Replay) {
        let (dk, width, state) = (self.dk, self.columns.len(), self.state());
        let exits = replay.exits();
        let mut order = Vec::with_capacity(exits.len());
        for exit in exits {
            let mut entries = exit.entries.clone().map(|j| self.order[j]);
            let kept = entries.next();
            // A slot opened in this chunk takes a place that a merge before it (slots are visited
            // oldest first, and new ones come last) or the capacity has left free.
            let Some(place) = kept.or_else(|| self.free.pop()) else { continue };
            order.push(place);
            let touched = exit.entries.len() > 1 || !exit.tokens.is_empty();
            if kept.is_some() && touched {
                let factor = self.log[place].exp() as f32;
                scale(&mut self.states[place * state..][..state], factor);
            }
            if touched {
                self.log[place] = 0.0;
            }
            for other in entries {
                let factor = self.log[other].exp() as f32;
                let (into, from) = two(&mut self.states, state, place, other);
                add_scaled(into, factor, from);
                self.free.push(other);
            }
            if !exit.tokens.is_empty() {
                let (first, len) = (exit.tokens.start, exit.tokens.len());
                multiply(
                    ViewMut::new(&mut self.states[place * state..][..state], dk, width),
                    if kept.is_some() { Into::Add(1.0) } else { Into::Set },
                    1.0,
                    View::new(&prepared.kh()[first * dk..], len, dk).t(),
                    View::new(&self.v[first * width..], len, width),
                );
            }
        }
        self.order = order;
    }
}

/// `o_t += factor w_t[j] products_t`.
#[allow(clippy::too_many_arguments)]
fn add_read(
    o: &mut [f32],
    products: &[f32],
    width: usize,
    j: usize,
    factor: f32,
    (weights, capacity): (&[f32], usize),
    replay: &Replay,
    len: usize,
) {
    let rows = o.chunks_exact_mut(width).zip(products.chunks_exact(width));
    for (t, (o, product)) in rows.enumerate().take(len) {
        let weight = weights[t * capacity + usize::from(replay.places(t)[j])];
        add_scaled(o, factor * weight, product);
    }
}

/// States `a` and `b`, the first to be written.
fn two(states: &mut [f32], state: usize, a: usize, b: usize) -> (&mut [f32], &[f32]) {
    if a < b {
        let (low, high) = states.split_at_mut(b * state);
        (&mut low[a * state..][..state], &high[..state])
    } else {
        let (low, high) = states.split_at_mut(a * state);
        (&mut high[..state], &low[b * state..][..state])
    }
}

/// What one chunk's adjoint gives, of one slice of value columns.
pub(crate) struct ScanGradients {
    /// Adjoints of the chunk's Qt and Kh, `[len, dk]`; of W and Kd, delta rule.
    pub(crate) qt: Vec<f32>,
    pub(crate) kh: Vec<f32>,
    pub(crate) w: Vec<f32>,
    pub(crate) kd: Vec<f32>,
    /// Gradient of the read weights by way of the states, `[len, M]` by slot.
    pub(crate) weights: Vec<f32>,
    /// Gradient of v, `[len, width]`.
    pub(crate) v: Vec<f32>,
    /// Gradient of Gamma_C by way of the transition.
    pub(crate) total: f64,
}

/// The adjoint of the scan for one row and slice of value columns, chunk by chunk in reverse.
pub(crate) struct BankAdjoint {
    pub(crate) columns: Range<usize>,
    dk: usize,
    capacity: usize,
    /// dS of the slots held, oldest first, `[m, dk, width]`.
    pub(crate) states: Vec<f32>,
    pub(crate) gradients: ScanGradients,
    d_o: Vec<f32>,
    weighted_do: Vec<f32>,
    v: Vec<f32>,
    weighted: Vec<f32>,
    reads: Vec<f32>,
    held: Vec<f32>,
}

impl BankAdjoint {
    /// From the adjoint of the final states, `[m, dk, dv]` oldest first.
    pub(crate) fn new(
        states: &[f32],
        capacity: usize,
        (dk, dv): (usize, usize),
        columns: Range<usize>,
        recurrence: Recurrence,
    ) -> Self {
        let width = columns.len();
        let mut held = vec![0.0; states.len() / dv * width];
        gather_columns(states, dv, &columns, &mut held);
        let rows = |width: usize| vec![0.0; CHUNK * width];
        let delta = if recurrence == Recurrence::GatedDelta { dk } else { 0 };
        BankAdjoint {
            columns,
            dk,
            capacity,
            states: held,
            gradients: ScanGradients {
                qt: rows(dk),
                kh: rows(dk),
                w: rows(delta),
                kd: rows(delta),
                weights: rows(capacity),
                v: rows(width),
                total: 0.0,
            },
            d_o: rows(width),
            weighted_do: rows(width),
            v: rows(width),
            weighted: rows(CHUNK),
            reads: rows(dk),
            held: rows(width),
        }
    }

    /// The adjoint of one chunk's [`Bank::scan`]. `entry` holds the states before it, `[m, dk, width]`;
    /// `self.states` goes from the adjoint of the exit states to that of the entry states.
    pub(crate) fn scan(
        &mut self,
        chunk: (&Prepared, &Replay),
        len: usize,
        (v, d_o): (&[f32], &[f32]),
        dv: usize,
        weights: &[f32],
        entry: &[f32],
    ) {
        let (prepared, replay) = chunk;
        let (dk, capacity, width) = (self.dk, self.capacity, self.columns.len());
        let state = dk * width;
        gather_columns(&v[..len * dv], dv, &self.columns, &mut self.v);
        gather_columns(&d_o[..len * dv], dv, &self.columns, &mut self.d_o);
        let out = &mut self.gradients;
        for x in [&mut out.qt, &mut out.kh, &mut out.w, &mut out.kd, &mut out.weights] {
            x.fill(0.0);
        }
        out.total = 0.0;

        // dV = (P . Lambda)^T dO + rows Kh_r dS'; dKh_r = dS' v_r.
        weigh_pairs(prepared.p(), weights, capacity, replay, len, &mut self.weighted);
        let d_o = View::new(&self.d_o, len, width);
        multiply(
            ViewMut::new(&mut out.v, len, width),
            Into::Set,
            1.0,
            View::new(&self.weighted, len, len).t(),
            d_o,
        );
        let exits = replay.exits();
        for (i, exit) in exits.iter().enumerate().filter(|(_, exit)| !exit.tokens.is_empty()) {
            let (first, tokens) = (exit.tokens.start, exit.tokens.len());
            let d_exit = View::new(&self.states[i * state..], dk, width);
            let kh = View::new(&prepared.kh()[first * dk..], tokens, dk);
            let dv_rows = ViewMut::new(&mut out.v[first * width..], tokens, width);
            multiply(dv_rows, Into::Add(1.0), 1.0, kh, d_exit);
            let values = View::new(&self.v[first * width..], tokens, width);
            let dkh_rows = ViewMut::new(&mut out.kh[first * dk..], tokens, dk);
            multiply(dkh_rows, Into::Set, 1.0, values, d_exit.t());
        }

        // The adjoint of a merge is a copy.
        let mut d_entry = vec![0.0; replay.entry() * state];
        for (i, exit) in exits.iter().enumerate() {
            for j in exit.entries.clone() {
                d_entry[j * state..][..state].copy_from_slice(&self.states[i * state..][..state]);
            }
        }

        let delta = prepared.recurrence == Recurrence::GatedDelta;
        let (qt, kd) = (View::new(&prepared.qt, len, dk), View::new(&prepared.kd, len, dk));
        for (j, (d_slot, slot)) in d_entry.chunks_exact_mut(state).zip(entry.chunks_exact(state)).enumerate()
        {
            let slot_view = View::new(slot, dk, width);
            // R_j = dO S_j^T: dQt += w_j R_j, dlambda_t[pi_t(j)] += Qt_t . R_j,t.
            multiply(ViewMut::new(&mut self.reads, len, dk), Into::Set, 1.0, d_o, slot_view.t());
            for t in 0..len {
                let at = t * capacity + usize::from(replay.places(t)[j]);
                let read = &self.reads[t * dk..][..dk];
                out.weights[at] += super::matrix::dot(&prepared.qt[t * dk..][..dk], read);
                add_scaled(&mut out.qt[t * dk..][..dk], weights[at], read);
                let weighted = &mut self.weighted_do[t * width..][..width];
                let d_o = &self.d_o[t * width..][..width];
                weighted.iter_mut().zip(d_o).for_each(|(out, d_o)| *out = weights[at] * d_o);
            }
            out.total += f64::from(prepared.total) * super::matrix::dot_f64(d_slot, slot);
            if delta {
                // dW -= (Kd dS') S_j^T, dKd -= (W S_j) dS'^T.
                let w = View::new(&prepared.w, len, dk);
                let held = ViewMut::new(&mut self.held, len, width);
                multiply(held, Into::Set, 1.0, w, slot_view);
                let d_exit = View::new(d_slot, dk, width);
                let d_kd = ViewMut::new(&mut out.kd, len, dk);
                multiply(d_kd, Into::Add(1.0), -1.0, View::new(&self.held, len, width), d_exit.t());
                let held = ViewMut::new(&mut self.held, len, width);
                multiply(held, Into::Set, 1.0, kd, d_exit);
                let d_w = ViewMut::new(&mut out.w, len, dk);
                multiply(d_w, Into::Add(1.0), -1.0, View::new(&self.held, len, width), slot_view.t());
            }
            // dS_j = e^{Gamma_C} dS' + Qt^T (w_j . dO) [- W^T (Kd dS')].
            let weighted = View::new(&self.weighted_do, len, width);
            let d_state = ViewMut::new(d_slot, dk, width);
            multiply(d_state, Into::Add(prepared.total), 1.0, qt.t(), weighted);
            if delta {
                let w = View::new(&prepared.w, len, dk).t();
                let held = View::new(&self.held, len, width);
                multiply(ViewMut::new(d_slot, dk, width), Into::Add(1.0), -1.0, w, held);
            }
        }
        self.states = d_entry;
    }
}
