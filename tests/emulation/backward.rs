//! The adjoints of prepare, route and segment, emulated: the scan's adjoint is computed here in f64, by the chunk
//! (OPERATOR.md, section 4), and what the kernels make of it is judged against the reference's gradients.

use super::*;
use dla::Soft;
use dla::check::error_of_sums;
use dla::cuda::abi::{
    DriftBackwardParams, GroupSumParams, HeadSumsParams, PrepareBackwardParams, RouteBackwardParams,
    SegmentBackwardParams, SegmentStatesParams,
};
use dla::events::MERGE;
use dla::reference::Upstream;
use std::collections::BTreeMap;

/// What the adjoint of the scan leaves of one chunk, all slices summed.
struct ChunkAdjoint {
    /// `[len, dk]`.
    qt: Vec<f64>,
    kh: Vec<f64>,
    w: Vec<f64>,
    kd: Vec<f64>,
    /// By slot, `[len, M]`.
    weights: Vec<f64>,
    total: f64,
    /// `[len, dv]`.
    v: Vec<f64>,
}

/// A matrix, row-major.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    columns: usize,
    x: Vec<f64>,
}

impl Matrix {
    fn new(rows: usize, columns: usize, of: impl Fn(usize, usize) -> f64) -> Self {
        let x = (0..rows * columns).map(|at| of(at / columns, at % columns)).collect();
        Matrix { rows, columns, x }
    }

    fn at(&self, r: usize, c: usize) -> f64 {
        self.x[r * self.columns + c]
    }

    fn t(&self) -> Self {
        Matrix::new(self.columns, self.rows, |r, c| self.at(c, r))
    }

    fn times(&self, other: &Matrix) -> Self {
        assert_eq!(self.columns, other.rows);
        let mut out = Matrix::new(self.rows, other.columns, |_, _| 0.0);
        for r in 0..self.rows {
            for i in 0..self.columns {
                let x = self.at(r, i);
                for c in 0..other.columns {
                    out.x[r * other.columns + c] += x * other.at(i, c);
                }
            }
        }
        out
    }

    fn add(&mut self, factor: f64, other: &Matrix) {
        self.x.iter_mut().zip(&other.x).for_each(|(x, y)| *x += factor * y);
    }

    fn dot(&self, other: &Matrix) -> f64 {
        self.x.iter().zip(&other.x).map(|(x, y)| x * y).sum()
    }
}

/// A chunk with all that the scan takes of it.
struct Prepared {
    len: usize,
    qt: Matrix,
    p: Matrix,
    kh: Matrix,
    w: Matrix,
    kd: Matrix,
    v: Matrix,
    total: f64,
    /// Places of entry slots and tokens, and slots held, after every token.
    places: Vec<Vec<usize>>,
    slots: Vec<Vec<usize>>,
    held: Vec<usize>,
}

/// Tokens of one sequence and value head.
struct ModelRow<'a> {
    case: &'a Case,
    problem: &'a Problem<'a>,
    arguments: &'a Arguments,
    lambda: &'a [f64],
    lambda_columns: usize,
    sequence: usize,
    head: usize,
}

impl ModelRow<'_> {
    fn token(&self, t: usize) -> usize {
        self.problem.sequences()[self.sequence].start + t
    }

    fn at(&self, t: usize) -> usize {
        self.token(t) * self.problem.shape().value_heads + self.head
    }

    fn index(&self) -> usize {
        self.sequence * self.problem.shape().value_heads + self.head
    }

    fn unit(&self, x: &[f64], t: usize) -> Vec<f64> {
        let shape = self.problem.shape();
        let at = self.token(t) * shape.heads + shape.key_head(self.head);
        let x = &x[at * shape.dk..][..shape.dk];
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let factor =
            if self.problem.options().qk_l2norm { 1.0 / (squares + 1e-6f32 as f64).sqrt() } else { 1.0 };
        x.iter().map(|x| factor * x).collect()
    }

    /// Read weight of slot i at token t while m are held.
    fn weight(&self, t: usize, i: usize, m: usize) -> f64 {
        let column = self.problem.options().slot_order.column(i, m);
        self.lambda[self.at(t) * self.lambda_columns + column]
    }

    fn prepare(&self, events: &[u8], first: usize, len: usize, entry: usize) -> Prepared {
        let shape = self.problem.shape();
        let (dk, dv) = (shape.dk, shape.dv);
        let scale = f64::from(self.problem.scale());
        let q: Vec<_> = (first..first + len).map(|t| self.unit(&self.arguments.q, t)).collect();
        let k: Vec<_> = (first..first + len).map(|t| self.unit(&self.arguments.k, t)).collect();
        let (q, k) = (Matrix::new(len, dk, |t, d| q[t][d]), Matrix::new(len, dk, |t, d| k[t][d]));
        let v = Matrix::new(len, dv, |t, d| self.arguments.v[self.at(first + t) * dv + d]);
        let mut gamma = Vec::new();
        let mut sum = 0.0;
        for t in first..first + len {
            sum += self.arguments.g[self.at(t)].max(-800.0);
            gamma.push(sum);
        }
        let total = sum;
        let decay = |t: usize, s: usize| if s <= t { (gamma[t] - gamma[s]).exp() } else { 0.0 };
        let a = q.times(&k.t());
        let a = Matrix::new(len, len, |t, s| scale * a.at(t, s) * decay(t, s));
        let kd = Matrix::new(len, dk, |t, d| (total - gamma[t]).exp() * k.at(t, d));
        let mut qt = Matrix::new(len, dk, |t, d| scale * gamma[t].exp() * q.at(t, d));
        let (mut p, mut kh, mut w) = (a.clone(), kd.clone(), Matrix::new(len, dk, |_, _| 0.0));
        if self.problem.options().recurrence == Recurrence::GatedDelta {
            let beta: Vec<f64> = (first..first + len).map(|t| self.arguments.beta[self.at(t)]).collect();
            let kk = k.times(&k.t());
            let mut tm = Matrix::new(len, len, |t, s| f64::from(t == s));
            for t in 0..len {
                for s in 0..t {
                    let l = beta[t] * kk.at(t, s) * decay(t, s);
                    for u in 0..=s {
                        tm.x[t * len + u] -= l * tm.at(s, u);
                    }
                }
            }
            w = tm.times(&Matrix::new(len, dk, |t, d| beta[t] * gamma[t].exp() * k.at(t, d)));
            qt.add(-1.0, &a.times(&w));
            p = a.times(&tm);
            p = Matrix::new(len, len, |t, s| p.at(t, s) * beta[s]);
            kh = tm.t().times(&kd);
            kh = Matrix::new(len, dk, |t, d| beta[t] * kh.at(t, d));
        }
        let (mut places, mut slots, mut held) = (Vec::new(), Vec::new(), Vec::new());
        let (mut of_entry, mut of_token, mut m): (Vec<usize>, Vec<usize>, _) =
            ((0..entry).collect(), Vec::new(), entry);
        for t in first..first + len {
            let event = events[self.at(t)];
            if event >= MERGE {
                let pair = usize::from(event - MERGE);
                of_entry.iter_mut().chain(&mut of_token).for_each(|at| *at -= usize::from(*at > pair));
                m -= 1;
            }
            m += usize::from(event != EXTEND);
            of_token.push(m - 1);
            places.push(of_entry.clone());
            slots.push(of_token.clone());
            held.push(m);
        }
        Prepared { len, qt, p, kh, w, kd, v, total, places, slots, held }
    }

    /// The adjoint of the scan, chunk by chunk, and of the row's initial states.
    fn adjoint(&self, events: &[u8], upstream: &Upstream, chunk: usize) -> Vec<ChunkAdjoint> {
        let shape = self.problem.shape();
        let (dk, dv, capacity) = (shape.dk, shape.dv, shape.capacity);
        let delta = self.problem.options().recurrence == Recurrence::GatedDelta;
        let len = self.problem.sequences()[self.sequence].len;
        let row_states = |states: &[f64], m: usize| -> Vec<Matrix> {
            let from = self.index() * capacity * dk * dv;
            (0..m).map(|i| Matrix::new(dk, dv, |r, c| states[from + (i * dk + r) * dv + c])).collect()
        };
        let initial = self.case.cache.as_ref().map_or(0, |cache| cache.len[self.index()] as usize);
        let mut states = self.arguments.cache.as_ref().map_or(Vec::new(), |c| row_states(&c.states, initial));
        let mut chunks = Vec::new();
        for first in (0..len).step_by(chunk) {
            let prepared = self.prepare(events, first, chunk.min(len - first), states.len());
            let last = prepared.len - 1;
            let zero = Matrix::new(dk, dv, |_, _| 0.0);
            let mut next = vec![zero; prepared.held[last]];
            for (j, state) in states.iter().enumerate() {
                let to = &mut next[prepared.places[last][j]];
                to.add(prepared.total.exp(), state);
                to.add(-1.0, &prepared.kd.t().times(&prepared.w.times(state)));
            }
            for (s, &to) in prepared.slots[last].iter().enumerate() {
                next[to].add(1.0, &Matrix::new(dk, dv, |r, c| prepared.kh.at(s, r) * prepared.v.at(s, c)));
            }
            chunks.push((first, prepared, std::mem::replace(&mut states, next)));
        }
        let m = states.len();
        let mut d_states = match &upstream.cache {
            Some(cache) => row_states(&cache.states, m),
            None => vec![Matrix::new(dk, dv, |_, _| 0.0); m],
        };
        let mut out = Vec::new();
        for (first, chunk, states) in chunks.into_iter().rev() {
            let len = chunk.len;
            let d_o = Matrix::new(len, dv, |t, d| upstream.o[self.at(first + t) * dv + d]);
            let rows = |width| Matrix::new(len, width, |_, _| 0.0);
            let (mut qt, mut kh, mut w, mut kd) = (rows(dk), rows(dk), rows(dk), rows(dk));
            let mut weights = vec![0.0; len * capacity];
            let mut total = 0.0;
            let pairs = Matrix::new(len, len, |t, s| {
                if s > t {
                    0.0
                } else {
                    chunk.p.at(t, s) * self.weight(first + t, chunk.slots[t][s], chunk.held[t])
                }
            });
            let mut v = pairs.t().times(&d_o);
            for s in 0..len {
                let d_exit = &d_states[chunk.slots[len - 1][s]];
                for r in 0..dk {
                    for c in 0..dv {
                        v.x[s * dv + c] += chunk.kh.at(s, r) * d_exit.at(r, c);
                        kh.x[s * dk + r] += d_exit.at(r, c) * chunk.v.at(s, c);
                    }
                }
            }
            let mut d_entry = Vec::new();
            for (j, state) in states.iter().enumerate() {
                let d_exit = &d_states[chunk.places[len - 1][j]];
                let read = d_o.times(&state.t());
                let weight = |t: usize| self.weight(first + t, chunk.places[t][j], chunk.held[t]);
                for t in 0..len {
                    for d in 0..dk {
                        qt.x[t * dk + d] += weight(t) * read.at(t, d);
                        weights[t * capacity + chunk.places[t][j]] += chunk.qt.at(t, d) * read.at(t, d);
                    }
                }
                total += chunk.total.exp() * d_exit.dot(state);
                let mut d_slot = Matrix::new(dk, dv, |r, c| chunk.total.exp() * d_exit.at(r, c));
                d_slot.add(1.0, &chunk.qt.t().times(&Matrix::new(len, dv, |t, d| weight(t) * d_o.at(t, d))));
                if delta {
                    let held = chunk.kd.times(d_exit);
                    w.add(-1.0, &held.times(&state.t()));
                    kd.add(-1.0, &chunk.w.times(state).times(&d_exit.t()));
                    d_slot.add(-1.0, &chunk.w.t().times(&held));
                }
                d_entry.push(d_slot);
            }
            d_states = d_entry;
            out.push(ChunkAdjoint { qt: qt.x, kh: kh.x, w: w.x, kd: kd.x, weights, total, v: v.x });
        }
        out.reverse();
        out
    }
}

/// Where a window's chunks stand: `(place in the window, place among all, chunk)` of every row's chunks.
fn window_chunks(
    problem: &Problem,
    geometry: &Geometry,
    (from, to): (usize, usize),
) -> Vec<(usize, usize, (usize, usize))> {
    let (shape, chunk) = (problem.shape(), geometry.chunk());
    let each = to.min(shape.time).saturating_sub(from).div_ceil(chunk);
    let mut out = Vec::new();
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for first in (from..to.min(sequence.len)).step_by(chunk) {
            let place = sequence.start / chunk + n + first / chunk;
            let kept = n * each + (first - from) / chunk;
            out.push((kept, place, (n, first / chunk)));
        }
    }
    out
}

/// `|k|^2 |v|^2` of every token and what its key is multiplied by, as segment_gram leaves them.
fn energies(case: &Case, problem: &Problem, arguments: &Arguments, chunk: usize) -> (Vec<f32>, Vec<f32>) {
    let shape = problem.shape();
    let len = (shape.tokens() / chunk + shape.sequences) * shape.value_heads * chunk;
    let (mut energy, mut factor) = (vec![f32::NAN; len], vec![f32::NAN; len]);
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..shape.value_heads {
            let row =
                ModelRow { case, problem, arguments, lambda: &[], lambda_columns: 0, sequence: n, head };
            for t in 0..sequence.len {
                let place = sequence.start / chunk + n + t / chunk;
                let at = (place * shape.value_heads + head) * chunk + t % chunk;
                let unit: f64 = row.unit(&arguments.k, t).iter().map(|x| x * x).sum();
                let raw_at = row.token(t) * shape.heads + shape.key_head(head);
                let raw: f64 = arguments.k[raw_at * shape.dk..][..shape.dk].iter().map(|x| x * x).sum();
                let v: f64 = arguments.v[row.at(t) * shape.dv..][..shape.dv].iter().map(|x| x * x).sum();
                energy[at] = (unit * v) as f32;
                factor[at] = if problem.options().qk_l2norm { 1.0 / (raw + 1e-6).sqrt() as f32 } else { 1.0 };
            }
        }
    }
    (energy, factor)
}

/// Every gradient that a case asks for, by its name.
type Tensors = BTreeMap<&'static str, Vec<f64>>;

fn buffer(array: &Array, dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F32 => array.get::<f32>().iter().map(|&x| x.into()).collect(),
        Dtype::Bf16 => array.get::<u16>().iter().map(|&x| bf16::from_bits(x).to_f64()).collect(),
        Dtype::F16 => array.get::<u16>().iter().map(|&x| f16::from_bits(x).to_f64()).collect(),
    }
}

/// The kernels' backward in windows between `cuts`, the last first.
fn backward(
    emulate: Emulate,
    case: &Case,
    problem: &Problem,
    segmented: &Segmented,
    cuts: &[usize],
) -> Tensors {
    let shape = *problem.shape();
    let options = problem.options();
    let dtype = problem.dtype();
    let (heads, dk, dv, capacity) = (shape.value_heads, shape.dk, shape.dv, shape.capacity);
    let per_token = shape.tokens() * heads;
    let delta = options.recurrence == Recurrence::GatedDelta;
    let geometry = geometry_of(problem);
    let (chunk, width, slices) = (geometry.chunk(), geometry.padded_dk(), geometry.slices());
    let arguments = Arguments::of(problem);
    let upstream = Upstream::of(problem, &case.upstream());
    let forward = reference::forward(problem, &arguments, Some(&segmented.events), None);
    let (lambda, lambda_columns) = match &arguments.lambda {
        Some(lambda) => (lambda, problem.lambda_columns()),
        None => (forward.lambda.as_ref().unwrap(), capacity),
    };
    let adjoints: Vec<Vec<ChunkAdjoint>> = (0..shape.sequences * heads)
        .map(|row| {
            let (sequence, head) = (row / heads, row % heads);
            let row =
                ModelRow { case, problem, arguments: &arguments, lambda, lambda_columns, sequence, head };
            row.adjoint(&segmented.events, &upstream, chunk)
        })
        .collect();

    let floats = |x: &Option<Vec<f32>>| x.as_ref().map(|x| Array::of(x));
    let cu_seqlens = case.cu_seqlens.as_ref().map(|x| Array::of(x));
    let extents = extents_of(problem, pointer(&cu_seqlens));
    let (q, k, v) = (Array::of_buffer(&case.q), Array::of_buffer(&case.k), Array::of_buffer(&case.v));
    let (g, beta, d_o) = (floats(&case.g), floats(&case.beta), Array::of_buffer(&case.d_o));
    let events = Array::of(&segmented.events);
    let chunk_len = Array::of(&segmented.chunk_len);
    let lambda = Array::of(&lambda.iter().map(|&x| x as f32).collect::<Vec<_>>());
    let kernel = |stem: &str| format!("{stem}_{dtype}");

    let tokens = |array: bool, bytes: usize| array.then(|| Array::poisoned(per_token * bytes));
    let (dg, dbeta) = (tokens(case.g.is_some(), 4), tokens(delta, 4));
    let dlambda = tokens(case.lambda.is_some(), lambda_columns * 4);
    let rows = shape.tokens() * shape.heads * dk * dtype.bytes();
    let (dq, d_k) = (Array::poisoned(rows), Array::poisoned(rows));
    let (initial_len, initial_tokens) =
        (case.cache.as_ref().map(|c| Array::of(&c.len)), case.cache.as_ref().map(|c| Array::of(&c.tokens)));
    let keys_of = |keys: Option<&Vec<f32>>| keys.map(|keys| Array::of(keys));
    let initial_keys = keys_of(case.cache.as_ref().and_then(|cache| cache.keys.as_ref()));
    let final_keys = keys_of(case.d_cache.as_ref().and_then(|cache| cache.keys.as_ref()));
    let chunk_starts = Array::of(&segmented.chunk_starts);
    let routed = case.route.as_ref().map(|route| {
        let sums = Array::poisoned(geometry.route_sums_len() * 4);
        let bases = Array::poisoned(geometry.route_bases_len() * 8);
        let key_factors = options.qk_l2norm.then(|| Array::poisoned(shape.tokens() * shape.heads * 4));
        let params = RouteSumsParams {
            extents,
            k: k.pointer(),
            sums: sums.pointer(),
            bases: bases.pointer(),
            key_factors: pointer(&key_factors),
            qk_l2norm: options.qk_l2norm.into(),
            reserved: 0,
        };
        let (blocks, shared_bytes) = (geometry.route_sums_blocks(), geometry.route_sums_shared_bytes());
        launch(emulate, &kernel("route_sums"), blocks, shared_bytes, &params);
        let (blocks, shared_bytes) = (geometry.route_bases_blocks(), geometry.route_bases_shared_bytes());
        launch(emulate, &kernel("route_bases"), blocks, shared_bytes, &params);
        let (slope, bias) = (Array::of(&route.slope), Array::of(&route.bias));
        (sums, bases, key_factors, slope, bias, floats(&route.logits))
    });
    let logit_columns = problem.logit_columns();
    let has_logits = case.route.as_ref().is_some_and(|route| route.logits.is_some());
    let dlogits = tokens(has_logits, logit_columns * 4);
    let parts = || Array::poisoned(geometry.head_parts_len() * 8);
    let (slope_sums, bias_sums) = (parts(), parts());
    let d_keys = Array::poisoned(shape.sequences * heads * capacity * dk * 4);

    // Soft boundaries, and the open segment's R before every chunk.
    let soft = options.soft;
    let through_open = case.d_cache.is_some() || soft.is_some_and(|soft| soft.through_drift);
    let (drift, ddrift) = (Array::of(&segmented.drift), tokens(soft.is_some(), 4));
    let taus = Array::of(&(0..heads).map(|head| options.tau.of(head)).collect::<Vec<_>>());
    let tau_sums = parts();
    let dv_out = (soft.is_some() || through_open).then(|| Array::poisoned(per_token * dv * dtype.bytes()));
    let (energy, factor) = energies(case, problem, &arguments, chunk);
    let (energy, factor) = (Array::of(&energy), Array::of(&factor));
    let initial_open = case.cache.as_ref().map(|cache| Array::of(&cache.open));
    let final_open = case.d_cache.as_ref().map(|cache| Array::of(&cache.open));
    let rows_of_heads = shape.sequences * heads;
    let d_carried = Array::poisoned(rows_of_heads * dk * dv * 4);
    let d_carried_scalars = Array::poisoned(geometry.carried_scalars_len() * 8);
    let saves = shape.time.div_ceil(chunk);
    let all_open = Array::poisoned(rows_of_heads * saves * dk * dv * 4);
    let all_logs = Array::poisoned(rows_of_heads * saves * 8);
    let states = SegmentStatesParams {
        extents,
        k: k.pointer(),
        v: v.pointer(),
        g: pointer(&g),
        events: events.pointer(),
        energy: energy.pointer(),
        factor: factor.pointer(),
        initial_open: pointer(&initial_open),
        entry: 0,
        entry_log: 0,
        open: all_open.pointer(),
        open_log: all_logs.pointer(),
        from: 0,
        to: i64::MAX / 64 * 64,
        stride: 1,
        saves: saves as i64,
        entry_step: 0,
        qk_l2norm: options.qk_l2norm.into(),
        reserved: 0,
    };
    let state_blocks = geometry.segment_states_blocks();
    let state_bytes = geometry.segment_states_shared_bytes();
    if through_open {
        launch(emulate, &kernel("segment_states"), state_blocks, state_bytes, &states);
    }
    let mut out = Tensors::new();
    let mut dv_model = vec![0.0; per_token * dv];

    for window in cuts.windows(2).rev() {
        let (from, to) = (window[0], window[1]);
        let places = geometry.window_places(shape.time, from, to);
        let blocks = geometry.window_blocks(places);
        // The scan's partial sums; what no chunk has is poison.
        let mut partials = vec![vec![f32::NAN; geometry.scan_partials_len(places)]; 4];
        let mut weights = vec![f32::NAN; geometry.weight_partials_len(places)];
        let mut totals = vec![f64::NAN; geometry.total_partials_len(places)];
        let mut d_v = vec![f32::NAN; places * heads * chunk * dv];
        for (kept, _, (n, index)) in window_chunks(problem, &geometry, (from, to)) {
            for head in 0..heads {
                let of = &adjoints[n * heads + head][index];
                let len = of.qt.len() / dk;
                let at = kept * heads + head;
                for slice in 0..slices {
                    // Parts that sum to one.
                    let part = if slice == 0 { 1.0 - 0.25 * (slices - 1) as f64 } else { 0.25 };
                    let slice_at = slice * places * heads + at;
                    for (to, from) in partials.iter_mut().zip([&of.qt, &of.kh, &of.w, &of.kd]) {
                        for t in 0..len {
                            for d in 0..dk {
                                to[(slice_at * chunk + t) * width + d] = (part * from[t * dk + d]) as f32;
                            }
                        }
                    }
                    for (i, x) in of.weights.iter().enumerate() {
                        weights[slice_at * chunk * capacity + i] = (part * x) as f32;
                    }
                    totals[slice_at] = part * of.total;
                }
                for (i, &x) in of.v.iter().enumerate() {
                    d_v[at * chunk * dv + i] = x as f32;
                    let t = problem.sequences()[n].start + index * chunk + i / dv;
                    dv_model[(t * heads + head) * dv + i % dv] = x;
                }
            }
        }
        let partials: Vec<Array> = partials.iter().map(|x| Array::of(x)).collect();
        let (weights, totals) = (Array::of(&weights), Array::of(&totals));
        let head_gradients = || Array::poisoned(geometry.head_gradients_len(places) * 4);
        let (of_q, of_k) = (head_gradients(), head_gradients());
        let d_slots =
            (options.read == Read::Routed).then(|| Array::poisoned(geometry.slot_gradients_len(places) * 4));
        let prepare = PrepareBackwardParams {
            extents,
            q: q.pointer(),
            k: k.pointer(),
            v: v.pointer(),
            g: pointer(&g),
            beta: pointer(&beta),
            d_o: d_o.pointer(),
            events: events.pointer(),
            lambda: lambda.pointer(),
            chunk_len: chunk_len.pointer(),
            d_qt: partials[0].pointer(),
            d_kh: partials[1].pointer(),
            d_w: partials[2].pointer(),
            d_kd: partials[3].pointer(),
            d_weights: weights.pointer(),
            d_total: totals.pointer(),
            d_q: of_q.pointer(),
            d_k: of_k.pointer(),
            dg: pointer(&dg),
            dbeta: pointer(&dbeta),
            dlambda: pointer(&dlambda),
            d_slots: pointer(&d_slots),
            from: from as i64,
            to: to as i64,
            places: places as i64,
            slices: slices as i32,
            lambda_columns: lambda_columns as i32,
            scale: problem.scale(),
            qk_l2norm: options.qk_l2norm.into(),
        };
        let name = kernel(if delta { "prepare_backward_delta" } else { "prepare_backward_gated" });
        launch(emulate, &name, blocks, geometry.prepare_backward_shared_bytes(), &prepare);

        if let (Some((sums, bases, key_factors, slope, bias, logits)), Some(d_slots)) = (&routed, &d_slots) {
            let d_bank = Array::poisoned(geometry.key_bank_gradients_len(places) * 4);
            let exits = Array::poisoned(geometry.exits_len(places));
            let params = RouteBackwardParams {
                extents,
                q: q.pointer(),
                k: k.pointer(),
                events: events.pointer(),
                chunk_len: chunk_len.pointer(),
                chunk_starts: chunk_starts.pointer(),
                sums: sums.pointer(),
                bases: bases.pointer(),
                key_factors: pointer(key_factors),
                initial_len: pointer(&initial_len),
                initial_tokens: pointer(&initial_tokens),
                initial_keys: pointer(&initial_keys),
                slope: slope.pointer(),
                bias: bias.pointer(),
                logits: pointer(logits),
                d_slots: d_slots.pointer(),
                final_keys: pointer(&final_keys),
                d_q: of_q.pointer(),
                d_k: of_k.pointer(),
                dlogits: pointer(&dlogits),
                slope_sums: slope_sums.pointer(),
                bias_sums: bias_sums.pointer(),
                d_bank: d_bank.pointer(),
                exits: exits.pointer(),
                d_keys: d_keys.pointer(),
                from: from as i64,
                to: to as i64,
                logit_columns: logit_columns as i32,
                qk_l2norm: options.qk_l2norm.into(),
            };
            launch(
                emulate,
                &kernel("route_backward"),
                blocks,
                geometry.route_backward_shared_bytes(),
                &params,
            );
            let blocks = geometry.route_backward_keys_blocks();
            let shared_bytes = geometry.route_backward_keys_shared_bytes();
            launch(emulate, &kernel("route_backward_keys"), blocks, shared_bytes, &params);
            d_bank.get::<f32>();
            exits.get::<u8>();
        }

        let d_v = Array::of(&d_v);
        if let (Some(soft), Some(ddrift)) = (soft, &ddrift) {
            let params = DriftBackwardParams {
                extents,
                v: v.pointer(),
                d_v: d_v.pointer(),
                events: events.pointer(),
                drift: drift.pointer(),
                chunk_len: chunk_len.pointer(),
                tau: taus.pointer(),
                ddrift: ddrift.pointer(),
                tau_sums: tau_sums.pointer(),
                dv: if through_open { 0 } else { pointer(&dv_out) },
                from: from as i64,
                to: to as i64,
                temperature: soft.temperature,
                reserved: 0,
            };
            launch(
                emulate,
                &kernel("drift_backward"),
                blocks,
                geometry.drift_backward_shared_bytes(),
                &params,
            );
        }
        if through_open {
            let open = Array::poisoned(geometry.open_states_len(places) * 4);
            let d_open = Array::poisoned(geometry.open_states_len(places) * 4);
            let open_log = Array::poisoned(places * heads * 8);
            let scalars = Array::poisoned(geometry.segment_scalars_len(places) * 8);
            let states = SegmentStatesParams {
                entry: all_open.pointer() + (from / chunk * dk * dv * 4) as u64,
                entry_log: all_logs.pointer() + (from / chunk * 8) as u64,
                open: open.pointer(),
                open_log: open_log.pointer(),
                from: from as i64,
                to: to as i64,
                saves: 0,
                entry_step: saves as i64,
                ..states
            };
            launch(emulate, &kernel("segment_states"), state_blocks, state_bytes, &states);
            let through_drift = soft.is_some_and(|soft| soft.through_drift);
            let params = SegmentBackwardParams {
                extents,
                k: k.pointer(),
                v: v.pointer(),
                g: pointer(&g),
                events: events.pointer(),
                energy: energy.pointer(),
                factor: factor.pointer(),
                drift: drift.pointer(),
                ddrift: if through_drift { pointer(&ddrift) } else { 0 },
                open: open.pointer(),
                open_log: open_log.pointer(),
                initial_len: pointer(&initial_len),
                initial_open: pointer(&initial_open),
                final_open: pointer(&final_open),
                d_v: d_v.pointer(),
                dv: pointer(&dv_out),
                d_k: of_k.pointer(),
                dg: pointer(&dg),
                scalars: scalars.pointer(),
                d_open: d_open.pointer(),
                d_carried: d_carried.pointer(),
                d_carried_scalars: d_carried_scalars.pointer(),
                from: from as i64,
                to: to as i64,
                qk_l2norm: options.qk_l2norm.into(),
                reserved: 0,
            };
            let bytes = geometry.segment_scalars_shared_bytes();
            launch(emulate, &kernel("segment_scalars"), blocks, bytes, &params);
            launch(emulate, &kernel("segment_open_backward"), state_blocks, state_bytes, &params);
            let bytes = geometry.segment_backward_shared_bytes();
            launch(emulate, &kernel("segment_backward"), blocks, bytes, &params);
            launch(emulate, &kernel("segment_log_backward"), rows_of_heads, 0, &params);
            for array in [&open, &d_open, &open_log, &scalars, &d_carried, &d_carried_scalars] {
                array.get::<u8>();
            }
        }

        let group_sum = GroupSumParams {
            extents,
            q: q.pointer(),
            k: k.pointer(),
            d_q: of_q.pointer(),
            d_k: of_k.pointer(),
            dq: dq.pointer(),
            dk: d_k.pointer(),
            from: from as i64,
            to: to as i64,
            qk_l2norm: options.qk_l2norm.into(),
            reserved: 0,
        };
        launch(emulate, &kernel("group_sum"), geometry.group_sum_blocks(places), 0, &group_sum);
        for array in [&of_q, &of_k].into_iter().chain(&d_slots) {
            array.get::<f32>();
        }
    }
    let sum_of_heads = |sums: &Array| {
        let out = Array::poisoned(heads * 4);
        let params =
            HeadSumsParams { extents, sums: sums.pointer(), out: out.pointer(), chunk: chunk as i32, add: 0 };
        launch(emulate, "head_sums", heads, geometry.head_sums_shared_bytes(), &params);
        buffer(&out, Dtype::F32)
    };
    if routed.is_some() {
        out.insert("dslope", sum_of_heads(&slope_sums));
        out.insert("dbias", sum_of_heads(&bias_sums));
        if case.cache.is_some() {
            out.insert("dcache_keys", buffer(&d_keys, Dtype::F32));
        }
    }
    out.insert("dq", buffer(&dq, dtype));
    out.insert("dk", buffer(&d_k, dtype));
    out.insert("dv", dv_out.map_or(dv_model, |dv| buffer(&dv, dtype)));
    if let Some(ddrift) = &ddrift {
        out.insert("ddrift", buffer(ddrift, Dtype::F32));
        out.insert("dtau", sum_of_heads(&tau_sums));
    }
    if through_open && case.cache.is_some() {
        out.insert("dcache_open", buffer(&d_carried, Dtype::F32));
    }
    for (name, array) in [("dg", &dg), ("dbeta", &dbeta), ("dlambda", &dlambda), ("dlogits", &dlogits)] {
        if let Some(array) = array {
            out.insert(name, buffer(array, Dtype::F32));
        }
    }
    out
}

/// Largest relative error of a gradient by dtype of the inputs.
fn gradient_bound(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 5e-3,
        Dtype::F16 => 1.5e-3,
        Dtype::F32 => 1e-4,
    }
}

fn check_backward(emulate: Emulate, case: &Case, cuts: &[usize], worst: &mut Worst) -> Tensors {
    let problem = case.problem().unwrap();
    let dtype = problem.dtype();
    let segmented = run(emulate, case, &problem, &[0, i64::MAX / 64 * 64], true).0;
    let out = backward(emulate, case, &problem, &segmented, cuts);
    let mut upstream = Upstream::of(&problem, &case.upstream());
    // The gradient of the drift is judged as such; what it is carried on to, given the kernels' own.
    upstream.drift = out.get("ddrift").cloned();
    let reference::ArgumentGradients { arguments: expected, drift, terms } =
        reference::backward(&problem, &Arguments::of(&problem), &segmented.events, &upstream);
    for (&tensor, x) in &out {
        let reference = match tensor {
            "dq" => &expected.q,
            "dk" => &expected.k,
            "dv" => &expected.v,
            "dg" => &expected.g,
            "dbeta" => &expected.beta,
            "dlambda" => expected.lambda.as_ref().unwrap(),
            "dlogits" => expected.logits.as_ref().unwrap(),
            "dcache_keys" => &expected.cache.as_ref().unwrap().keys,
            "dcache_open" => &expected.cache.as_ref().unwrap().open,
            "ddrift" => &drift,
            "dtau" => &expected.tau,
            "dslope" => &expected.slope,
            "dbias" => &expected.bias,
            _ => panic!("{tensor}"),
        };
        let (error, at) = match tensor {
            "dslope" => error_of_sums(x, reference, &terms.slope),
            "dbias" => error_of_sums(x, reference, &terms.bias),
            "dtau" => error_of_sums(x, reference, &terms.tau),
            _ => relative_error(x, reference),
        };
        worst.take(dtype, tensor, error);
        let (bound, name) = (gradient_bound(dtype), case.describe());
        assert!(error <= bound, "{name}: {tensor} off by {error:.2e}, most at element {at}");
    }
    out
}

/// The adjoint of prepare: every dtype and recurrence over head sizes, capacities, boundary rates, decays, grouped heads, packed
/// and resumed sequences, a gradient of the final states, windows.
#[test]
fn prepare_backward() {
    let Some(emulate) = emulator() else { return };
    let seed = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    let sizes = [(8, 24), (24, 8), (64, 72), (72, 64), (136, 16), (16, 128), (40, 40)];
    let mut at = 0;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
            for packed in [false, true, false] {
                let (dk, dv) = sizes[at % sizes.len()];
                let options = Options {
                    recurrence,
                    capacity: [30, 3, 2, 64, 1][at % 5],
                    slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
                    qk_l2norm: at % 3 == 2,
                    ..Options::default()
                };
                let recipe = Recipe {
                    options,
                    time: if packed { 134 } else { [131, 64, 70][at % 3] },
                    heads: 1 + at % 2,
                    value_heads: 2,
                    dk,
                    dv,
                    dtype,
                    boundary_rate: [1.0, 0.25, 0.01][at / 2 % 3],
                    decay: [Some(0.1), None, Some(1.0), Some(50.0)][at / 3 % 4],
                    extra_columns: at % 3,
                    packed: packed.then(|| vec![0, 1, 66, 0, 33, 34, 0]),
                    resumed: at % 3 != 1,
                    final_gradient: at % 2 == 1,
                    ..Recipe::default()
                };
                let mut case = recipe.draw(seed + at as u64);
                if let Some(cache) = &mut case.d_cache {
                    cache.open.fill(0.0);
                }
                check_backward(emulate, &case, &[0, 64, 192], &mut worst);
                at += 1;
            }
        }
    }
    println!("{:?}", worst.0);
}

/// The adjoint of route: every dtype with both recurrences, as above, and many chunks of few slots.
#[test]
fn route_backward() {
    let Some(emulate) = emulator() else { return };
    let seed = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    let sizes = [(8, 24), (72, 8), (64, 16), (136, 16), (16, 8), (40, 40)];
    let mut at = 0;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for packed in [false, true, false, false] {
            let (dk, dv) = sizes[at % sizes.len()];
            let options = Options {
                recurrence: [Recurrence::Gated, Recurrence::GatedDelta][at % 2],
                capacity: [30, 3, 2, 64, 1][at % 5],
                slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
                read: Read::Routed,
                qk_l2norm: at % 3 == 2,
                ..Options::default()
            };
            let recipe = Recipe {
                options,
                time: if packed { 134 } else { [131, 64, 70, 331][at % 4] },
                heads: 1 + at % 2,
                value_heads: 2,
                dk,
                dv,
                dtype,
                boundary_rate: [1.0, 0.25, 0.01][at / 2 % 3],
                decay: [Some(0.1), None, Some(1.0)][at / 3 % 3],
                logits: at % 3 != 0,
                extra_columns: at % 3,
                packed: packed.then(|| vec![0, 1, 66, 0, 33, 34, 0]),
                resumed: at % 3 != 1,
                final_gradient: at % 2 == 1,
                ..Recipe::default()
            };
            let mut case = recipe.draw(seed + at as u64);
            if let Some(cache) = &mut case.d_cache {
                cache.open.fill(0.0);
            }
            check_backward(emulate, &case, &[0, 64, 192, 384], &mut worst);
            at += 1;
        }
    }
    println!("{:?}", worst.0);
}

/// Soft boundaries, with the drift's gradient and without, and the gradient of the final R: over dtypes, head sizes, capacities,
/// boundary rates, decays, grouped heads, packed and resumed sequences, windows, zero tokens.
#[test]
fn segment_backward() {
    let Some(emulate) = emulator() else { return };
    let seed = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    let sizes = [(8, 24), (72, 8), (64, 16), (136, 16), (16, 72), (40, 40)];
    let mut at = 0;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for packed in [false, true, false, false] {
            let (dk, dv) = sizes[at % sizes.len()];
            let through_drift = at % 3 != 1;
            let options = Options {
                recurrence: [Recurrence::Gated, Recurrence::GatedDelta][at / 2 % 2],
                capacity: [30, 3, 1, 64, 2][at % 5],
                qk_l2norm: at % 3 == 2,
                soft: (at % 5 != 3).then_some(Soft { temperature: 0.2, through_drift }),
                ..Options::default()
            };
            let recipe = Recipe {
                options,
                time: if packed { 134 } else { [131, 64, 70, 331][at % 4] },
                heads: 1 + at % 2,
                value_heads: 4,
                dk,
                dv,
                dtype,
                boundary_rate: [1.0, 0.25, 0.01][at % 3],
                decay: [Some(0.1), None, Some(1.0)][at / 3 % 3],
                packed: packed.then(|| vec![0, 1, 66, 0, 33, 34, 0]),
                resumed: at % 2 == 1,
                final_gradient: at % 4 != 0,
                ..Recipe::default()
            };
            let case = recipe.draw(seed + at as u64);
            check_backward(emulate, &case, &[0, 64, 192, 384], &mut worst);
            at += 1;
        }
    }
    // Long segments, carried in and on; zero tokens; decay that leaves nothing.
    for (i, dtype) in [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().enumerate() {
        let options = Options {
            capacity: 4,
            tau: dla::Tau::PerCall([1.2, 1.9, 1.2, 1.2][i]),
            qk_l2norm: i == 2,
            soft: Some(Soft { temperature: 0.3, through_drift: true }),
            ..Options::default()
        };
        let recipe = Recipe {
            options,
            time: 450,
            value_heads: 2,
            dk: 16,
            dv: 8,
            dtype,
            boundary_rate: 0.01,
            decay: [Some(0.05), None, Some(0.5), Some(50.0)][i],
            resumed: true,
            final_gradient: i % 2 == 0,
            ..Recipe::default()
        };
        let mut case = recipe.draw(seed + 100 + i as u64);
        if i != 1 {
            zero_tokens(&mut case);
        }
        check_backward(emulate, &case, &[0, 128, 320, 512], &mut worst);
    }
    println!("{:?}", worst.0);
}
