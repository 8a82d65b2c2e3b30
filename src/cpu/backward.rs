//! The backward: the log is replayed, states at the chunks' entries are recomputed from checkpoints
//! every sqrt(chunks) chunks, and the adjoints of scan -> route -> prepare -> segment run in reverse.

use super::clock::Clock;
use super::forward::{each_slice, initial_open, initial_states, load_weights, logit};
use super::matrix::{Into, View, ViewMut, multiply};
use super::prepare::{Prepared, prepare};
use super::prepare_backward::{ChunkGradients, PreparedAdjoint, prepare_backward};
use super::route::{KeyBank, Route, RouteSums, Routed, route, route_backward};
use super::row::{CHUNK, Chunk, Row, Shared, SharedBuffer, normalise_adjoint};
use super::scan::{Bank, BankAdjoint, slices, weigh_pairs};
use super::segment::{Decide, Open, Scratch, Segmented, segment};
use super::segment_backward::{OpenAdjoint, segment_backward};
use crate::cache::CacheGradients;
use crate::engine::{Gradients, RouteGradients, SoftGradients, Stage};
use crate::events::Replay;
use crate::options::{Read, Recurrence, Soft};
use crate::problem::{OutputGradients, Problem, Shape};
use crate::reference::{self, Arguments, Upstream};
use crate::tensor::{Buffer, Dtype};
use rayon::prelude::*;
use std::sync::OnceLock;

/// Where the rows of a backward write; every row its own elements.
struct Sink<'a> {
    /// dq and dk `[B,T,HV,dk]`: of every value head by itself where heads are grouped.
    q: SharedBuffer<'a>,
    k: SharedBuffer<'a>,
    v: SharedBuffer<'a>,
    g: Option<Shared<'a, f32>>,
    beta: Option<Shared<'a, f32>>,
    lambda: Option<Shared<'a, f32>>,
    logits: Option<Shared<'a, f32>>,
    drift: Option<Shared<'a, f32>>,
    states: Option<Shared<'a, f32>>,
    open: Option<Shared<'a, f32>>,
    keys: Option<Shared<'a, f32>>,
}

/// Sums over a row's tokens.
#[derive(Default)]
struct RowSums {
    route: RouteSums,
    tau: f64,
}

pub(crate) fn backward(
    problem: &Problem,
    events: &[u8],
    upstream: &OutputGradients,
    clock: &Clock,
) -> Gradients {
    let shape = *problem.shape();
    let Shape { heads, value_heads, dk, dv, .. } = shape;
    let (inputs, options, dtype) = (problem.inputs(), problem.options(), problem.dtype());
    let per_token = shape.tokens() * value_heads;
    let routed = options.read == Read::Routed;
    let grouped = value_heads > heads;
    // Grouped heads are summed in f32 before they are rounded.
    let head_dtype = if grouped { Dtype::F32 } else { dtype };
    let mut q = Buffer::zeros(head_dtype, per_token * dk);
    let mut k = Buffer::zeros(head_dtype, per_token * dk);
    let mut v = Buffer::zeros(dtype, per_token * dv);
    let zeros = |len: usize| vec![0.0f32; len];
    let mut g = inputs.g.map(|_| zeros(per_token));
    let mut beta = (options.recurrence == Recurrence::GatedDelta).then(|| zeros(per_token));
    let mut lambda = inputs.lambda.map(|_| zeros(per_token * problem.lambda_columns()));
    let mut logits =
        inputs.route.and_then(|route| route.logits).map(|_| zeros(per_token * problem.logit_columns()));
    let mut drift = options.soft.map(|_| zeros(per_token));
    let mut cache = inputs.cache.map(|cache| CacheGradients::zeros(cache.dims, options.read));
    let (mut states, mut open, mut keys) = (None, None, None);
    if let Some(cache) = &mut cache {
        states = Some(Shared::new(&mut cache.states));
        open = Some(Shared::new(&mut cache.open));
        keys = cache.keys.as_deref_mut().map(Shared::new);
    }
    let sink = Sink {
        q: SharedBuffer::new(&mut q),
        k: SharedBuffer::new(&mut k),
        v: SharedBuffer::new(&mut v),
        g: g.as_deref_mut().map(Shared::new),
        beta: beta.as_deref_mut().map(Shared::new),
        lambda: lambda.as_deref_mut().map(Shared::new),
        logits: logits.as_deref_mut().map(Shared::new),
        drift: drift.as_deref_mut().map(Shared::new),
        states,
        open,
        keys,
    };
    let rows = shape.cache_dims().rows();
    let split = rows < rayon::current_num_threads();
    let in_f64 = OnceLock::new();
    let sums: Vec<RowSums> = (0..rows)
        .into_par_iter()
        .map(|index| {
            let row = Row::new(problem, index);
            let upstream_finite = || {
                let mut d_o = vec![0.0; dv];
                (0..row.len()).all(|t| {
                    upstream.o.data().load(row.at(t) * dv, &mut d_o);
                    d_o.iter().all(|x| x.is_finite())
                })
            };
            if row.has_non_finite() || !upstream_finite() {
                let (arguments, upstream) =
                    in_f64.get_or_init(|| (Arguments::of(problem), Upstream::of(problem, upstream)));
                non_finite_row(row, arguments, events, upstream, &sink)
            } else {
                backward_row(row, events, upstream, &sink, clock, split)
            }
        })
        .collect();

    let per_head = |of: &dyn Fn(&RowSums) -> f64| -> Vec<f32> {
        let mut out = vec![0.0f64; value_heads];
        sums.iter().enumerate().for_each(|(row, sums)| out[row % value_heads] += of(sums));
        out.into_iter().map(|x| x as f32).collect()
    };
    let group = value_heads / heads;
    Gradients {
        q: if grouped { sum_groups(&q, group, dk, dtype) } else { q },
        k: if grouped { sum_groups(&k, group, dk, dtype) } else { k },
        v,
        g,
        beta,
        lambda,
        route: routed.then(|| RouteGradients {
            slope: per_head(&|sums| sums.route.slope),
            bias: per_head(&|sums| sums.route.bias),
            logits,
        }),
        soft: drift.map(|drift| SoftGradients { tau: per_head(&|sums| sums.tau), drift }),
        cache,
    }
}

/// Sums `[B,T,HV,dk]` over the value heads of each group, in their order, to `[B,T,H,dk]`.
fn sum_groups(x: &Buffer, group: usize, dk: usize, dtype: Dtype) -> Buffer {
    let Buffer::F32(x) = x else { return Buffer::zeros(dtype, 0) };
    let mut sums = vec![0.0f32; x.len() / group];
    sums.par_chunks_mut(dk).zip(x.par_chunks(group * dk)).for_each(|(sum, heads)| {
        for head in heads.chunks_exact(dk) {
            super::matrix::add_scaled(sum, 1.0, head);
        }
    });
    match dtype {
        Dtype::F32 => Buffer::F32(sums),
        _ => Buffer::from_f32(dtype, &sums),
    }
}

/// What the forward held at the entry of a chunk.
#[derive(Clone)]
struct Entry {
    /// Of every slice of value columns, `[m, dk, width]`.
    states: Vec<Vec<f32>>,
    open: Open,
    keys: KeyBank,
}

/// The forward of a row without its reads: what every chunk's entry held.
struct Writer<'a> {
    row: Row<'a>,
    events: &'a [u8],
    banks: Vec<Bank>,
    open: Open,
    keys: KeyBank,
    chunk: Chunk,
    segmented: Segmented,
    scratch: Scratch,
    prepared: Prepared,
    replay: Replay,
    split: bool,
    /// Whether drift or R have a gradient, so that the open segment is followed.
    follow_open: bool,
}

impl<'a> Writer<'a> {
    fn new(row: Row<'a>, events: &'a [u8], follow_open: bool, split: bool) -> Self {
        let shape = row.shape();
        let options = row.problem.options();
        let mut writer = Writer {
            row,
            events,
            banks: Vec::new(),
            open: initial_open(&row),
            keys: KeyBank::initial(&row),
            chunk: Chunk::new(shape),
            segmented: Segmented::new(),
            scratch: Scratch::new(shape.dk, shape.dv),
            prepared: Prepared::new(shape, options.recurrence),
            replay: Replay::default(),
            split,
            follow_open,
        };
        writer.banks =
            slices(shape.dv).map(|columns| writer.bank(initial_states(&row), shape.dv, columns)).collect();
        writer
    }

    fn bank(&self, states: &[f32], dv: usize, columns: std::ops::Range<usize>) -> Bank {
        let Shape { dk, capacity, .. } = *self.row.shape();
        Bank::new(states, capacity, (dk, dv), columns, self.row.problem.options().recurrence)
    }

    fn entry(&self) -> Entry {
        Entry {
            states: self.banks.iter().map(Bank::snapshot).collect(),
            open: self.open.clone(),
            keys: self.keys.clone(),
        }
    }

    /// Back to a checkpoint.
    fn rewind(&mut self, entry: &Entry) {
        self.banks = entry
            .states
            .iter()
            .zip(slices(self.row.shape().dv))
            .map(|(states, columns)| {
                let width = columns.len();
                let mut bank = self.bank(states, width, 0..width);
                bank.columns = columns;
                bank
            })
            .collect();
        self.open = entry.open.clone();
        self.keys = entry.keys.clone();
    }

    /// Loads a chunk and replays its log: `chunk`, `segmented` and `replay` are then its own, and
    /// `open` is that of its exit.
    fn load(&mut self, tokens: std::ops::Range<usize>) {
        let len = tokens.len();
        self.chunk.load(&self.row, tokens.clone());
        let log: Vec<u8> = tokens.map(|t| self.events[self.row.at(t)]).collect();
        let entry = self.open.ledger.len();
        if self.follow_open {
            let decide = Decide::Log(&log);
            segment(&mut self.open, &self.chunk, &decide, &mut self.segmented, &mut self.scratch);
        } else {
            log.iter().for_each(|&event| self.open.ledger.apply(event, 0.0));
            self.segmented.events[..len].copy_from_slice(&log);
        }
        self.replay.run(entry, &log);
    }

    /// Writes a chunk.
    fn advance(&mut self, tokens: std::ops::Range<usize>, clock: &Clock) {
        let len = tokens.len();
        let dv = self.row.shape().dv;
        clock.time(Stage::Segment, || self.load(tokens));
        clock.time(Stage::Prepare, || prepare(&self.chunk, 1.0, false, &mut self.prepared));
        if self.row.problem.options().read == Read::Routed {
            clock.time(Stage::Route, || self.keys.advance(&self.chunk, &self.replay));
        }
        let (chunk, prepared, replay) = (&self.chunk, &self.prepared, &self.replay);
        each_slice(&mut self.banks, self.split, |bank| {
            clock.time(Stage::Scan, || bank.scan((prepared, replay), len, &chunk.v, dv, None));
        });
    }
}

fn backward_row(
    row: Row,
    events: &[u8],
    upstream: &OutputGradients,
    sink: &Sink,
    clock: &Clock,
    split: bool,
) -> RowSums {
    let soft = row.problem.options().soft;
    let follow_open = soft.is_some() || upstream.cache.is_some();
    let chunks: Vec<_> = row.chunks().collect();
    let stride = chunks.len().isqrt().max(1);
    let mut writer = Writer::new(row, events, follow_open, split);
    let mut checkpoints = Vec::new();
    for (index, tokens) in chunks.iter().enumerate() {
        if index % stride == 0 {
            checkpoints.push(writer.entry());
        }
        writer.advance(tokens.clone(), clock);
    }

    let mut reverse = Reverse::new(&row, &writer, upstream);
    for (block, checkpoint) in checkpoints.into_iter().enumerate().rev() {
        let first = block * stride;
        let last = (first + stride).min(chunks.len());
        writer.rewind(&checkpoint);
        let mut entries = vec![checkpoint];
        for tokens in &chunks[first..last - 1] {
            writer.advance(tokens.clone(), clock);
            entries.push(writer.entry());
        }
        for (tokens, entry) in chunks[first..last].iter().zip(&entries).rev() {
            writer.open = entry.open.clone();
            clock.time(Stage::Segment, || writer.load(tokens.clone()));
            reverse.chunk(&mut writer, tokens.clone(), entry, upstream, sink, clock);
        }
    }
    reverse.finish(&row, sink)
}

/// The adjoint of a row's memory, and what one chunk's adjoint needs.
struct Reverse {
    banks: Vec<BankAdjoint>,
    keys: Vec<f32>,
    open: OpenAdjoint,
    /// R that the row began with, whose squared norm has a gradient of its own.
    initial_r: Vec<f32>,
    gradients: ChunkGradients,
    routed: Routed,
    d_o: Vec<f32>,
    d_v: Vec<f32>,
    sums: RowSums,
    soft: Option<Soft>,
    through_open: bool,
}

impl Reverse {
    fn new(row: &Row, writer: &Writer, upstream: &OutputGradients) -> Self {
        let Shape { dk, dv, capacity, .. } = *row.shape();
        let options = row.problem.options();
        let (dims, index, m) = (row.shape().cache_dims(), row.index(), writer.open.ledger.len());
        let (states, open, keys) = match upstream.cache {
            None => (vec![0.0; m * dims.state()], vec![0.0; dims.state()], vec![0.0; m * dk]),
            Some(cache) => (
                cache.states[index * dims.bank()..][..m * dims.state()].to_vec(),
                cache.open[index * dims.state()..][..dims.state()].to_vec(),
                cache
                    .keys
                    .as_ref()
                    .map_or_else(Vec::new, |keys| keys[index * dims.key_bank()..][..m * dk].to_vec()),
            ),
        };
        Reverse {
            banks: slices(dv)
                .map(|columns| BankAdjoint::new(&states, capacity, (dk, dv), columns, options.recurrence))
                .collect(),
            keys,
            open: OpenAdjoint::new(&writer.open, &open),
            initial_r: initial_open(row).r,
            gradients: ChunkGradients::new(dk),
            routed: Routed::new(capacity),
            d_o: vec![0.0; CHUNK * dv],
            d_v: vec![0.0; CHUNK * dv],
            sums: RowSums::default(),
            soft: options.soft,
            through_open: upstream.cache.is_some() || options.soft.is_some_and(|soft| soft.through_drift),
        }
    }

    fn chunk(
        &mut self,
        writer: &mut Writer,
        tokens: std::ops::Range<usize>,
        entry: &Entry,
        upstream: &OutputGradients,
        sink: &Sink,
        clock: &Clock,
    ) {
        let row = writer.row;
        let Shape { dk, dv, capacity, .. } = *row.shape();
        let (first, len) = (tokens.start, tokens.len());
        let read_scale = row.problem.scale();
        let Writer { chunk, prepared, replay, segmented, .. } = writer;
        let (chunk, replay) = (&*chunk, &*replay);
        for (i, t) in tokens.clone().enumerate() {
            upstream.o.data().load(row.at(t) * dv, &mut self.d_o[i * dv..][..dv]);
        }
        clock.time(Stage::Prepare, || prepare(chunk, read_scale, true, prepared));
        let prepared = &*prepared;
        let routing = Route::of(&row);
        clock.time(Stage::Route, || match routing {
            Some(routing) => {
                let logit = |t, i, m| logit(&row, first + t, i, m);
                route(routing, &entry.keys, chunk, &prepared.qk, replay, logit, &mut self.routed);
            }
            None => load_weights(&row, first, replay, len, &mut self.routed.weights),
        });

        // scan
        let weights = &self.routed.weights;
        let d_o = &self.d_o;
        let mut work: Vec<_> = self.banks.iter_mut().zip(&entry.states).collect();
        each_slice(&mut work, writer.split, |(bank, states)| {
            clock.time(Stage::Scan, || {
                bank.scan((prepared, replay), len, (&chunk.v, d_o), dv, weights, states);
            });
        });
        let mut d_weights = vec![0.0f32; len * capacity];
        let adjoint = clock.time(Stage::Scan, || {
            // Slices in their order, so that sums do not depend on threads.
            let sum = |of: &dyn Fn(&BankAdjoint) -> &[f32], width: usize| -> Vec<f32> {
                let mut out = vec![0.0; if of(&self.banks[0]).is_empty() { 0 } else { len * width }];
                for bank in &self.banks {
                    super::matrix::add_scaled(&mut out, 1.0, of(bank));
                }
                out
            };
            d_weights = sum(&|bank| &bank.gradients.weights, capacity);
            for bank in &self.banks {
                let width = bank.columns.len();
                let rows = self.d_v.chunks_exact_mut(dv).zip(bank.gradients.v.chunks_exact(width));
                for (d_v, slice) in rows.take(len) {
                    d_v[bank.columns.clone()].copy_from_slice(slice);
                }
            }
            // dP = (dO V^T) . Lambda; dlambda_t[slot_t(s)] += (dO V^T)_ts P_ts.
            let mut pairs = vec![0.0; len * len];
            let (d_o, v) = (View::new(&self.d_o, len, dv), View::new(&chunk.v, len, dv));
            multiply(ViewMut::new(&mut pairs, len, len), Into::Set, 1.0, d_o, v.t());
            for t in 0..len {
                for (s, &slot) in replay.slots(t).iter().enumerate() {
                    d_weights[t * capacity + usize::from(slot)] +=
                        pairs[t * len + s] * prepared.p()[t * len + s];
                }
            }
            let mut p = vec![0.0; len * len];
            weigh_pairs(&pairs, &self.routed.weights, capacity, replay, len, &mut p);
            PreparedAdjoint {
                qt: sum(&|bank| &bank.gradients.qt, dk),
                kh: sum(&|bank| &bank.gradients.kh, dk),
                w: sum(&|bank| &bank.gradients.w, dk),
                kd: sum(&|bank| &bank.gradients.kd, dk),
                p,
                total: self.banks.iter().map(|bank| bank.gradients.total).sum(),
            }
        });

        // Soft boundaries: dc_t = v_t . dv_t by way of the write, dI_t from the confidence.
        let mut d_drift = vec![0.0f32; len];
        if let Some(soft) = self.soft {
            let options = row.problem.options();
            let tau = f64::from(options.tau.of(row.head));
            for t in 0..len {
                let slots = if t == 0 { replay.entry() } else { replay.len(t - 1) };
                let drift = f64::from(segmented.drift[t]);
                let event = segmented.events[t];
                let (_, slope) = reference::confidence(soft, tau, drift, event, slots, options.capacity);
                let at = t * dv..(t + 1) * dv;
                let d_confidence = super::matrix::dot(&chunk.v[at.clone()], &self.d_v[at]);
                let d = f64::from(d_confidence) * slope;
                d_drift[t] = d as f32;
                self.sums.tau -= d;
            }
        }

        // route, prepare, segment
        let out = &mut self.gradients;
        out.clear();
        clock.time(Stage::Prepare, || {
            prepare_backward(chunk, prepared, read_scale, adjoint, out);
        });
        if let Some(routing) = routing {
            clock.time(Stage::Route, || {
                route_backward(
                    routing,
                    &entry.keys,
                    chunk,
                    replay,
                    &mut self.routed,
                    &mut d_weights,
                    &mut self.keys,
                    &mut out.q,
                    &mut out.k,
                    &mut self.sums.route,
                );
            });
        }
        let d_drift_on =
            if self.soft.is_some_and(|soft| soft.through_drift) { d_drift.clone() } else { vec![0.0; len] };
        if self.through_open {
            clock.time(Stage::Segment, || {
                let open = &entry.open;
                segment_backward(chunk, segmented, open, &d_drift_on, &mut self.open, out, &mut self.d_v);
            });
        }
        self.store(&row, tokens, chunk, replay, &d_weights, &d_drift, sink);
    }

    #[allow(clippy::too_many_arguments)]
    fn store(
        &mut self,
        row: &Row,
        tokens: std::ops::Range<usize>,
        chunk: &Chunk,
        replay: &Replay,
        d_weights: &[f32],
        d_drift: &[f32],
        sink: &Sink,
    ) {
        let Shape { dk, dv, capacity, .. } = *row.shape();
        let options = row.problem.options();
        let out = &mut self.gradients;
        out.decay.finish(chunk.len);
        for (i, t) in tokens.enumerate() {
            let at = row.at(t);
            let (d_q, d_k) = (&mut out.q[i * dk..][..dk], &mut out.k[i * dk..][..dk]);
            if options.qk_l2norm {
                normalise_adjoint(&chunk.q[i * dk..][..dk], chunk.q_factor[i], d_q);
                normalise_adjoint(&chunk.k[i * dk..][..dk], chunk.k_factor[i], d_k);
            }
            let m = replay.len(i);
            let weights = &d_weights[i * capacity..][..m];
            // SAFETY: token t of a sequence and value head is written by this row alone, once.
            unsafe {
                sink.q.store(at * dk, d_q);
                sink.k.store(at * dk, d_k);
                sink.v.store(at * dv, &self.d_v[i * dv..][..dv]);
                store_scalar(&sink.g, at, out.decay.g[i] as f32);
                store_scalar(&sink.beta, at, out.beta[i]);
                store_scalar(&sink.drift, at, d_drift[i]);
                store_weights(row, sink, at, weights);
            }
        }
    }

    /// Writes the gradient of the initial cache.
    fn finish(self, row: &Row, sink: &Sink) -> RowSums {
        let Shape { dk, dv, .. } = *row.shape();
        let (dims, index) = (row.shape().cache_dims(), row.index());
        // SAFETY: a cache row is written by its own sequence and value head alone.
        unsafe {
            if let Some(states) = &sink.states {
                for bank in &self.banks {
                    let width = bank.columns.len();
                    let out = states.slice(index * dims.bank(), bank.states.len() / width * dv);
                    for (out, slice) in out.chunks_exact_mut(dv).zip(bank.states.chunks_exact(width)) {
                        out[bank.columns.clone()].copy_from_slice(slice);
                    }
                }
            }
            if let Some(open) = &sink.open {
                let d_r = self.open.finish(&self.initial_r);
                open.slice(index * dims.state(), dk * dv).copy_from_slice(&d_r);
            }
            if let Some(keys) = &sink.keys {
                keys.slice(index * dims.key_bank(), self.keys.len()).copy_from_slice(&self.keys);
            }
        }
        self.sums
    }
}

/// # Safety
/// No two threads may store the same element.
unsafe fn store_scalar(out: &Option<Shared<f32>>, at: usize, x: f32) {
    if let Some(out) = out {
        // SAFETY: by this function's contract.
        unsafe { out.slice(at, 1)[0] = x };
    }
}

/// # Safety
/// No two threads may store the weights of the same token and head.
unsafe fn store_weights(row: &Row, sink: &Sink, at: usize, weights: &[f32]) {
    let problem = row.problem;
    let targets = [(&sink.lambda, problem.lambda_columns()), (&sink.logits, problem.logit_columns())];
    for (out, columns) in targets {
        if let Some(out) = out {
            // SAFETY: by this function's contract.
            let out = unsafe { out.slice(at * columns, columns) };
            for (i, &weight) in weights.iter().enumerate() {
                out[problem.options().slot_order.column(i, weights.len())] = weight;
            }
        }
    }
}

/// A row that holds NaN or infinity: the adjoint of the definition itself, as in the forward.
fn non_finite_row(
    row: Row,
    arguments: &Arguments,
    events: &[u8],
    upstream: &Upstream,
    sink: &Sink,
) -> RowSums {
    let Shape { dk, dv, .. } = *row.shape();
    let (dims, index) = (row.shape().cache_dims(), row.index());
    let f32s = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
    let definition = reference::Row::new(row.problem, arguments, index);
    let gradients = reference::backward_row(definition, events, upstream);
    for (t, token) in gradients.tokens.iter().enumerate() {
        let at = row.at(t);
        // SAFETY: token t of a sequence and value head is written by this row alone, once.
        unsafe {
            sink.q.store(at * dk, &f32s(&token.q));
            sink.k.store(at * dk, &f32s(&token.k));
            sink.v.store(at * dv, &f32s(&token.v));
            store_scalar(&sink.g, at, token.g as f32);
            store_scalar(&sink.beta, at, token.beta as f32);
            store_scalar(&sink.drift, at, token.drift as f32);
            store_weights(&row, sink, at, &f32s(&token.weights));
        }
    }
    // SAFETY: a cache row is written by its own sequence and value head alone.
    unsafe {
        for (out, x, stride) in [
            (&sink.states, gradients.initial.states.concat(), dims.bank()),
            (&sink.open, gradients.initial.open.clone(), dims.state()),
            (&sink.keys, gradients.initial.keys.concat(), dims.key_bank()),
        ] {
            if let Some(out) = out {
                out.slice(index * stride, x.len()).copy_from_slice(&f32s(&x));
            }
        }
    }
    RowSums {
        route: RouteSums { slope: gradients.slope.sum, bias: gradients.bias.sum },
        tau: gradients.tau.sum,
    }
}
