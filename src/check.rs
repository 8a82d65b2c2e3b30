//! Random cases and the one measure by which every engine is judged: `dla check`, the tests and the
//! GPU suite share them. Feature `check`.

use crate::cache::{Cache, CacheGradients};
use crate::engine::{Engine, Gradients};
use crate::error::{Error, Result};
use crate::events::{EXTEND, Ledger, plan};
use crate::options::{Merge, Options, Read, Recurrence, SlotOrder, Soft, Tau};
use crate::problem::{Inputs, OutputGradients, Problem, Route, Shape};
use crate::reference::{self, Arguments, Upstream};
use crate::tensor::{Buffer, Dtype, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use rand_distr::StandardNormal;

/// What a case is drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Options of the call.
    pub options: Options,
    /// B; packed sequences take 1.
    pub batch: usize,
    /// T.
    pub time: usize,
    /// H.
    pub heads: usize,
    /// HV.
    pub value_heads: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
    /// Dtype of q, k, v and the gradient of o.
    pub dtype: Dtype,
    /// Share of tokens whose content is new: 1 draws every token by itself.
    pub boundary_rate: f64,
    /// Log decays are drawn from `[-decay, 0]`; `None` leaves g out.
    pub decay: Option<f32>,
    /// Route logits, where reads are routed.
    pub logits: bool,
    /// Columns of lambda (or the logits) past M.
    pub extra_columns: usize,
    /// Lengths of packed sequences; they sum to T.
    pub packed: Option<Vec<usize>>,
    /// Resume from a cache of random states.
    pub resumed: bool,
    /// Give a gradient of the final cache.
    pub final_gradient: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            options: Options::default(),
            batch: 1,
            time: 64,
            heads: 1,
            value_heads: 1,
            dk: 16,
            dv: 16,
            dtype: Dtype::F32,
            boundary_rate: 1.0,
            decay: Some(0.1),
            logits: false,
            extra_columns: 0,
            packed: None,
            resumed: false,
            final_gradient: false,
        }
    }
}

/// Owned arguments of one call.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it was drawn from.
    pub recipe: Recipe,
    /// Seed it was drawn with.
    pub seed: u64,
    /// Queries.
    pub q: Buffer,
    /// Keys.
    pub k: Buffer,
    /// Values.
    pub v: Buffer,
    /// Log decay.
    pub g: Option<Vec<f32>>,
    /// Write strength.
    pub beta: Option<Vec<f32>>,
    /// Given read weights.
    pub lambda: Option<Vec<f32>>,
    /// Parameters of routed reads.
    pub route: Option<CaseRoute>,
    /// Packed offsets.
    pub cu_seqlens: Option<Vec<i64>>,
    /// Initial cache.
    pub cache: Option<Cache>,
    /// Gradient of o.
    pub d_o: Buffer,
    /// Gradient of the final cache.
    pub d_cache: Option<CacheGradients>,
}

/// Owned parameters of routed reads.
#[derive(Debug, Clone)]
pub struct CaseRoute {
    /// Slope.
    pub slope: Vec<f32>,
    /// Bias.
    pub bias: Vec<f32>,
    /// Logits.
    pub logits: Option<Vec<f32>>,
}

fn normal(rng: &mut impl Rng) -> f32 {
    rng.sample(StandardNormal)
}

fn normals(rng: &mut impl Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(rng)).collect()
}

fn pick<T: Copy>(rng: &mut impl Rng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

/// Rows `[T, heads, width]` of unit scale in which a share `rate` of the tokens bring new content.
fn content(
    rng: &mut StdRng,
    shape: (usize, usize, usize),
    rate: f64,
    fresh: &mut dyn FnMut(&mut StdRng, usize) -> bool,
) -> Vec<f32> {
    let (tokens, heads, width) = shape;
    let mut base = normals(rng, heads * width);
    let mut out = Vec::with_capacity(tokens * heads * width);
    for token in 0..tokens {
        if fresh(rng, token) {
            base = normals(rng, heads * width);
        }
        let noise = if rate < 1.0 { 0.1 } else { 0.0 };
        out.extend(base.iter().map(|x| x + noise * normal(rng)));
    }
    out
}

impl Recipe {
    /// Draws the arguments.
    pub fn draw(&self, seed: u64) -> Case {
        let mut rng = StdRng::seed_from_u64(seed);
        let Recipe { batch, time, heads, value_heads, dk, dv, dtype, .. } = *self;
        let options = &self.options;
        let tokens = batch * time;
        let rate = self.boundary_rate;
        let fresh: Vec<bool> = (0..tokens).map(|_| rng.random_bool(rate)).collect();
        let mut follow = |_: &mut StdRng, token: usize| fresh[token];
        let q = normals(&mut rng, tokens * heads * dk);
        let mut k = content(&mut rng, (tokens, heads, dk), rate, &mut follow);
        let v = content(&mut rng, (tokens, value_heads, dv), rate, &mut follow);
        // Keys of unit norm, as models have them: the delta rule contracts only then.
        let unit = |x: &mut Vec<f32>| {
            for row in x.chunks_exact_mut(dk) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
                row.iter_mut().for_each(|x| *x /= norm);
            }
        };
        unit(&mut k);
        let per_token = tokens * value_heads;
        let columns = options.capacity + self.extra_columns;
        let sequences = self.packed.as_ref().map_or(batch, Vec::len);
        let g = self.decay.map(|decay| (0..per_token).map(|_| -decay * rng.random::<f32>()).collect());
        let beta = (options.recurrence == Recurrence::GatedDelta)
            .then(|| (0..per_token).map(|_| rng.random::<f32>()).collect());
        let lambda = (options.read == Read::Given)
            .then(|| (0..per_token * columns).map(|_| rng.random_range(0.05..1.5)).collect());
        let route = (options.read == Read::Routed).then(|| {
            let slope = (0..value_heads).map(|_| rng.random_range(2.0..10.0)).collect();
            let logits = self.logits.then(|| normals(&mut rng, per_token * columns));
            CaseRoute { slope, bias: normals(&mut rng, value_heads), logits }
        });
        let cu_seqlens = self.packed.as_ref().map(|lengths| {
            let mut offset = 0;
            let ends = lengths.iter().map(|&len| {
                offset += len as i64;
                offset
            });
            std::iter::once(0).chain(ends).collect()
        });
        let shape = Shape { batch, time, heads, value_heads, dk, dv, capacity: options.capacity, sequences };
        let cache = self.resumed.then(|| random_cache(&mut rng, &shape, options.read));
        let d_cache = self.final_gradient.then(|| {
            let dims = shape.cache_dims();
            let mut gradients = CacheGradients::zeros(dims, options.read);
            let keys = gradients.keys.iter_mut();
            for x in [&mut gradients.states, &mut gradients.open].into_iter().chain(keys).flatten() {
                *x = normal(&mut rng);
            }
            gradients
        });
        let d_o = normals(&mut rng, per_token * dv);
        Case {
            recipe: self.clone(),
            seed,
            q: Buffer::from_f32(dtype, &q),
            k: Buffer::from_f32(dtype, &k),
            v: Buffer::from_f32(dtype, &v),
            g,
            beta,
            lambda,
            route,
            cu_seqlens,
            cache,
            d_o: Buffer::from_f32(dtype, &d_o),
            d_cache,
        }
    }
}

/// A cache as some earlier call might have left it; about every fourth sequence is still empty.
fn random_cache(rng: &mut StdRng, shape: &Shape, read: Read) -> Cache {
    let dims = shape.cache_dims();
    let mut cache = Cache::empty(dims, read);
    for row in 0..dims.rows() {
        let m = if rng.random_bool(0.25) { 0 } else { rng.random_range(1..=dims.capacity) };
        cache.len[row] = m as u32;
        for i in 0..m {
            let slot = row * dims.capacity + i;
            cache.tokens[slot] = rng.random_range(1..40);
            cache.drift[slot] = cache.tokens[slot] * rng.random_range(100..6000);
            let spread = 0.3 * (cache.tokens[slot] as f32).sqrt();
            for x in &mut cache.states[slot * dims.state()..][..dims.state()] {
                *x = spread * normal(rng);
            }
            if let Some(keys) = &mut cache.keys {
                for x in &mut keys[slot * dims.dk..][..dims.dk] {
                    *x = spread * normal(rng);
                }
            }
        }
        if m > 0 {
            for x in &mut cache.open[row * dims.state()..][..dims.state()] {
                *x = 0.5 * normal(rng);
            }
        }
    }
    cache
}

impl Case {
    /// A case over shapes, options, dtypes and boundary rates; the same seed, the same case.
    pub fn random(seed: u64) -> Case {
        let mut rng = StdRng::seed_from_u64(seed ^ 0xd1a5_eed0);
        let soft = rng
            .random_bool(0.3)
            .then(|| Soft { temperature: rng.random_range(0.05..0.5), through_drift: rng.random_bool(0.5) });
        // Few tokens, and soft boundaries (a resumed R is seen by few tokens), come in many rows: of a
        // gradient that hangs on one inner product, that product may be what cancels.
        let heads = pick(&mut rng, &[1, 1, 2, 3]);
        let group = if soft.is_some() { 4 } else { pick(&mut rng, &[1, 1, 2, 3]) };
        let value_heads = heads * group;
        let capacity = pick(&mut rng, &[1, 2, 3, 4, 8, 16, 30, 30, 64]);
        let time = pick(&mut rng, &[1, 5, 63, 64, 65, 100, 200, 300, 513]);
        let short = time <= 5;
        let packed = (!short && rng.random_bool(0.3)).then(|| {
            let mut cuts: Vec<usize> =
                (0..rng.random_range(0..4)).map(|_| rng.random_range(0..=time)).collect();
            cuts.sort_unstable();
            let bounds: Vec<usize> = std::iter::once(0).chain(cuts).chain([time]).collect();
            bounds.windows(2).map(|pair| pair[1] - pair[0]).collect()
        });
        let read = pick(&mut rng, &[Read::Given, Read::Routed]);
        let tau = if rng.random_bool(0.7) {
            Tau::PerCall(0.6)
        } else {
            Tau::PerHead((0..value_heads).map(|_| rng.random_range(0.3..1.2)).collect())
        };
        let recipe = Recipe {
            options: Options {
                recurrence: pick(&mut rng, &[Recurrence::Gated, Recurrence::GatedDelta]),
                capacity,
                tau,
                merge: pick(&mut rng, &[Merge::Density, Merge::Mass]),
                read,
                slot_order: pick(&mut rng, &[SlotOrder::OldestFirst, SlotOrder::NewestFirst]),
                scale: rng.random_bool(0.2).then_some(0.5),
                qk_l2norm: rng.random_bool(0.3),
                soft,
            },
            batch: match (packed.is_some(), short) {
                (true, _) => 1,
                (false, true) => 16,
                (false, false) => pick(&mut rng, &[1, 1, 2]),
            },
            time,
            heads,
            value_heads,
            dk: pick(&mut rng, &[8, 16, 24, 64, 128]),
            dv: pick(&mut rng, &[8, 16, 40, 64, 128]),
            dtype: pick(&mut rng, &[Dtype::F32, Dtype::Bf16, Dtype::F16]),
            boundary_rate: pick(&mut rng, &[0.01, 0.25, 1.0]),
            decay: pick(&mut rng, &[None, Some(0.05), Some(1.0), Some(50.0)]),
            logits: rng.random_bool(0.5),
            extra_columns: pick(&mut rng, &[0, 0, 3]),
            packed,
            resumed: rng.random_bool(0.4),
            final_gradient: rng.random_bool(0.5),
        };
        recipe.draw(seed)
    }

    /// The case in a line.
    pub fn describe(&self) -> String {
        let Recipe { options, batch, time, heads, value_heads, dk, dv, dtype, .. } = &self.recipe;
        format!(
            "seed {}: B,T,H,HV,dk,dv = {batch},{time},{heads},{value_heads},{dk},{dv} {dtype} {:?} M = {} {:?} {:?} rate {} decay {:?}{}{}{}",
            self.seed,
            options.recurrence,
            options.capacity,
            options.merge,
            options.read,
            self.recipe.boundary_rate,
            self.recipe.decay,
            if self.recipe.packed.is_some() { " packed" } else { "" },
            if self.recipe.resumed { " resumed" } else { "" },
            if options.soft.is_some() { " soft" } else { "" },
        )
    }

    /// Borrowed arguments.
    pub fn inputs(&self) -> Inputs<'_> {
        let Recipe { options, batch, time, heads, value_heads, dk, dv, .. } = &self.recipe;
        let (b, t, h, hv) = (*batch, *time, *heads, *value_heads);
        let columns = options.capacity + self.recipe.extra_columns;
        Inputs {
            q: Tensor::new(&self.q, &[b, t, h, *dk]),
            k: Tensor::new(&self.k, &[b, t, h, *dk]),
            v: Tensor::new(&self.v, &[b, t, hv, *dv]),
            g: self.g.as_ref().map(|g| Tensor::new(g, &[b, t, hv])),
            beta: self.beta.as_ref().map(|beta| Tensor::new(beta, &[b, t, hv])),
            lambda: self.lambda.as_ref().map(|lambda| Tensor::new(lambda, &[b, t, hv, columns])),
            route: self.route.as_ref().map(|CaseRoute { slope, bias, logits }| Route {
                slope: Tensor::new(slope, &[hv]),
                bias: Tensor::new(bias, &[hv]),
                logits: logits.as_ref().map(|logits| Tensor::new(logits, &[b, t, hv, columns])),
            }),
            events: None,
            cu_seqlens: self.cu_seqlens.as_deref(),
            cache: self.cache.as_ref(),
        }
    }

    /// The validated call.
    ///
    /// # Errors
    /// None for a drawn case; where its fields were changed, as [`Problem::new`].
    pub fn problem(&self) -> Result<Problem<'_>> {
        Problem::new(&self.recipe.options, self.inputs())
    }

    /// Gradients given to the backward.
    pub fn upstream(&self) -> OutputGradients<'_> {
        let Recipe { batch, time, value_heads, dv, .. } = self.recipe;
        OutputGradients {
            o: Tensor::new(&self.d_o, &[batch, time, value_heads, dv]),
            cache: self.d_cache.as_ref(),
        }
    }
}

/// One tensor of one engine against the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Name, as files spell it.
    pub tensor: &'static str,
    /// `|x - reference| / |reference|` in the 2-norm; infinite where a value is not finite.
    pub error: f64,
    /// Largest error that passes.
    pub bound: f64,
    /// Flat index of the element that is furthest off.
    pub worst: usize,
}

impl Comparison {
    /// Within the bound. NaN never is.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// Relative norm error of `x`, and where it is furthest off.
pub fn relative_error(x: &[f64], reference: &[f64]) -> (f64, usize) {
    if x.len() != reference.len() {
        return (f64::INFINITY, 0);
    }
    let mut worst = (-1.0, 0);
    let (mut difference, mut norm) = (0.0, 0.0);
    for (index, (x, r)) in x.iter().zip(reference).enumerate() {
        let mut d = (x - r).abs();
        if !d.is_finite() {
            return (f64::INFINITY, index);
        }
        // What f32 cannot hold is no error.
        if d < f32::MIN_POSITIVE.into() {
            d = 0.0;
        }
        if d > worst.0 {
            worst = (d, index);
        }
        difference += d * d;
        norm += r * r;
    }
    // Where the reference is exactly 0, anything else is wrong.
    let error = match (difference == 0.0, norm == 0.0) {
        (true, _) => 0.0,
        (false, true) => f64::INFINITY,
        (false, false) => (difference / norm).sqrt(),
    };
    (error, worst.1)
}

/// Relative norm error of sums over many terms, against the larger of the sums' norm and that of the
/// terms: where terms cancel, no arithmetic that rounds them has a small error relative to the sum.
pub fn error_of_sums(x: &[f64], reference: &[f64], terms: &[f64]) -> (f64, usize) {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (error, worst) = relative_error(x, reference);
    let (sums, terms) = (norm(reference), norm(terms));
    if error.is_finite() && terms > sums { (error * sums / terms, worst) } else { (error, worst) }
}

/// Largest relative errors that pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Tensors that are f32 whatever the inputs.
    pub f32: f64,
    /// Tensors rounded to bf16.
    pub bf16: f64,
    /// Tensors rounded to f16.
    pub f16: f64,
    /// Absolute error of the drift.
    pub drift: f64,
    /// Distance from tau within which a decision may differ.
    pub decision: f64,
}

impl Bounds {
    /// An engine that computes in f32 and rounds its results once.
    ///
    /// Rounding alone costs up to half a unit in the last place, 2^-8 of a bf16 and 2^-11 of an f16. Near I = 0 an
    /// error e of the cosine is an error sqrt(2 e) of the drift.
    pub const F32: Bounds =
        Bounds { f32: 1e-5, bf16: 1.0 / 256.0 + 1e-5, f16: 1.0 / 2048.0 + 1e-5, drift: 3e-3, decision: 1e-4 };

    /// The CUDA engine: products of bf16 planes, whose number goes by the dtype of q, k and v.
    pub fn cuda(dtype: Dtype) -> Bounds {
        let (bf16, f16) = (4e-3, 1e-3);
        let f32 = match dtype {
            Dtype::Bf16 => bf16,
            Dtype::F16 => f16,
            Dtype::F32 => 1e-4,
        };
        Bounds { f32, bf16, f16, drift: 2e-3, decision: 2e-3 }
    }

    /// Gradients of the CUDA engine.
    pub fn cuda_gradients(dtype: Dtype) -> Bounds {
        let (bf16, f16) = (5e-3, 1.5e-3);
        let f32 = match dtype {
            Dtype::Bf16 => bf16,
            Dtype::F16 => f16,
            Dtype::F32 => 1e-4,
        };
        Bounds { f32, bf16, f16, ..Bounds::cuda(dtype) }
    }

    /// Bound of a tensor that is returned in `dtype`. An f16 below 2^-14 has fewer digits: half of its
    /// last place, 2^-25, is allowed to every element.
    pub fn rounded(&self, dtype: Dtype, reference: &[f64]) -> f64 {
        match dtype {
            Dtype::F32 => self.f32,
            Dtype::Bf16 => self.bf16,
            Dtype::F16 => {
                let norm = reference.iter().map(|x| x * x).sum::<f64>().sqrt();
                let subnormal = (reference.len() as f64).sqrt() / f64::from(1u32 << 25);
                self.f16 + if norm > 0.0 { subnormal / norm } else { 0.0 }
            }
        }
    }
}

/// Runs `engine` forward and, where it has one, backward, and compares every result with the reference on the same
/// inputs and the engine's own log. `drift` and `decisions` are absolute: the former away from
/// nothing (I is of order 1), the latter the largest distance from tau of a decision that the
/// reference's drift would have taken otherwise; infinite where the log is not what the engine's
/// own drift asks for, byte for byte.
///
/// # Errors
/// Those of the engine.
pub fn compare(engine: &dyn Engine, case: &Case) -> Result<Vec<Comparison>> {
    let dtype = case.recipe.dtype;
    let (bounds, gradients) = match engine.name() {
        "cuda" => (Bounds::cuda(dtype), Bounds::cuda_gradients(dtype)),
        _ => (Bounds::F32, Bounds::F32),
    };
    compare_within(engine, case, bounds, gradients)
}

/// [`compare`] within other bounds, those of the results and of the gradients.
///
/// # Errors
/// Those of the engine.
pub fn compare_within(
    engine: &dyn Engine,
    case: &Case,
    bounds: Bounds,
    of_gradients: Bounds,
) -> Result<Vec<Comparison>> {
    let problem = case.problem()?;
    let forward = engine.forward(&problem)?;
    let arguments = Arguments::of(&problem);
    let expected = reference::forward(&problem, &arguments, Some(&forward.events), None);
    let mut rows = Vec::new();
    let mut row = |tensor, x: &[f64], reference: &[f64], bound| {
        let (error, worst) = relative_error(x, reference);
        rows.push(Comparison { tensor, error, bound, worst });
    };
    let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let u32s = |x: &[u32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let rounded = |reference: &[f64]| bounds.rounded(problem.dtype(), reference);

    row("o", &forward.o.to_f64(), &expected.o, rounded(&expected.o));
    row("cache_states", &f64s(&forward.cache.states), &expected.cache.states, bounds.f32);
    row("cache_open", &f64s(&forward.cache.open), &expected.cache.open, bounds.f32);
    row("cache_len", &u32s(&forward.cache.len), &u32s(&expected.len), 0.0);
    row("cache_tokens", &u32s(&forward.cache.tokens), &u32s(&expected.tokens), 0.0);
    // Sums of drift in units of 2^-12, each rounded: judged by the mean over a slot's tokens.
    let summed = forward.cache.drift.iter().zip(&expected.summed_drift).zip(&expected.tokens);
    let summed = summed.map(|((&x, &r), &n)| f64::from(x.abs_diff(r)) / f64::from(n.max(1)) / 4096.0);
    let (summed, at) = largest(summed);
    if let (Some(lambda), Some(expected)) = (&forward.lambda, &expected.lambda) {
        row("lambda", &f64s(lambda), expected, bounds.f32);
    }
    if let Some(keys) = &forward.cache.keys {
        row("cache_keys", &f64s(keys), &expected.cache.keys, bounds.f32);
    }

    let off = forward.drift.iter().zip(&expected.drift).map(|(&x, r)| (f64::from(x) - r).abs());
    let worst = largest(off);
    rows.push(Comparison { tensor: "drift", error: worst.0, bound: bounds.drift, worst: worst.1 });
    let bound = bounds.drift + 1.0 / 4096.0;
    rows.push(Comparison { tensor: "cache_drift", error: summed, bound, worst: at });
    rows.push(decisions(&problem, &forward.drift, &forward.events, &expected.drift, bounds.decision));

    match engine.backward(&problem, &forward.events, &case.upstream()) {
        Err(Error::NotBuilt { .. }) => {}
        gradients => {
            rows.extend(compare_gradients(case, &problem, &forward.events, &gradients?, of_gradients));
        }
    }
    Ok(rows)
}

/// Compares every gradient with the reference's.
pub fn compare_gradients(
    case: &Case,
    problem: &Problem,
    events: &[u8],
    gradients: &Gradients,
    bounds: Bounds,
) -> Vec<Comparison> {
    let mut rows = Vec::new();
    let mut row = |tensor, x: &[f64], reference: &[f64], bound| {
        let (error, worst) = relative_error(x, reference);
        rows.push(Comparison { tensor, error, bound, worst });
    };
    let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let rounded = |reference: &[f64]| bounds.rounded(problem.dtype(), reference);
    let mut upstream = Upstream::of(problem, &case.upstream());
    // The gradient of the drift is judged as such. What it is carried on to hangs, in a resumed R, on
    // single tokens, whose v . dv may be what cancels: that is judged given the engine's own.
    upstream.drift = gradients.soft.as_ref().map(|soft| f64s(&soft.drift));
    let reference::ArgumentGradients { arguments: expected_gradients, drift: expected_drift, terms } =
        reference::backward(problem, &Arguments::of(problem), events, &upstream);
    let options = problem.options();
    row("dq", &gradients.q.to_f64(), &expected_gradients.q, rounded(&expected_gradients.q));
    row("dk", &gradients.k.to_f64(), &expected_gradients.k, rounded(&expected_gradients.k));
    row("dv", &gradients.v.to_f64(), &expected_gradients.v, rounded(&expected_gradients.v));
    let mut optional = |tensor, x: Option<&Vec<f32>>, reference: Option<&Vec<f64>>| match (x, reference) {
        (Some(x), Some(reference)) => row(tensor, &f64s(x), reference, bounds.f32),
        (None, None) => {}
        // One side has a gradient that the other lacks.
        _ => row(tensor, &[], &[0.0], bounds.f32),
    };
    optional("dg", gradients.g.as_ref(), case.g.as_ref().map(|_| &expected_gradients.g));
    optional("dbeta", gradients.beta.as_ref(), case.beta.as_ref().map(|_| &expected_gradients.beta));
    optional("dlambda", gradients.lambda.as_ref(), expected_gradients.lambda.as_ref());
    let (routed, route) = (case.route.is_some(), gradients.route.as_ref());
    optional(
        "droute_logits",
        route.and_then(|route| route.logits.as_ref()),
        expected_gradients.logits.as_ref(),
    );
    let soft = gradients.soft.as_ref();
    optional("ddrift", soft.map(|soft| &soft.drift), options.soft.map(|_| &expected_drift));
    let (cache, expected_cache) = (gradients.cache.as_ref(), expected_gradients.cache.as_ref());
    optional("dcache_states", cache.map(|c| &c.states), expected_cache.map(|c| &c.states));
    optional("dcache_open", cache.map(|c| &c.open), expected_cache.map(|c| &c.open));
    optional(
        "dcache_keys",
        cache.and_then(|c| c.keys.as_ref()),
        expected_cache.filter(|_| routed).map(|c| &c.keys),
    );

    for (tensor, x, reference, terms) in [
        ("droute_slope", route.map(|route| &route.slope), &expected_gradients.slope, &terms.slope),
        ("droute_bias", route.map(|route| &route.bias), &expected_gradients.bias, &terms.bias),
        ("dtau", soft.map(|soft| &soft.tau), &expected_gradients.tau, &terms.tau),
    ] {
        let expected = if tensor == "dtau" { options.soft.is_some() } else { routed };
        match x {
            Some(x) if expected => {
                let (error, worst) = error_of_sums(&f64s(x), reference, terms);
                rows.push(Comparison { tensor, error, bound: bounds.f32, worst });
            }
            None if !expected => {}
            _ => rows.push(Comparison { tensor, error: f64::INFINITY, bound: bounds.f32, worst: 0 }),
        }
    }
    rows
}

/// The largest number and where it stands; NaN is the largest of all.
fn largest(x: impl Iterator<Item = f64>) -> (f64, usize) {
    x.enumerate().fold((0.0, 0), |worst, (at, x)| if x > worst.0 || x.is_nan() { (x, at) } else { worst })
}

fn decisions(problem: &Problem, drift: &[f32], events: &[u8], expected: &[f64], bound: f64) -> Comparison {
    let Shape { value_heads, capacity, .. } = *problem.shape();
    let options = problem.options();
    let mut worst = (0.0, 0);
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..value_heads {
            let at = |t: usize| (sequence.start + t) * value_heads + head;
            let tau = options.tau.of(head);
            let scores: Vec<f32> = (0..sequence.len).map(|t| drift[at(t)]).collect();
            let mut ledger = problem.initial_ledger(problem.inputs().cache, n * value_heads + head);
            let mut held: Ledger = ledger.clone();
            let planned = plan(&scores, tau, capacity, options.merge, &mut ledger);
            for (t, &event) in planned.iter().enumerate() {
                if event != events[at(t)] {
                    worst = (f64::INFINITY, at(t));
                    break;
                }
                let forced = held.len() == 0 || capacity == 1;
                let (chosen, off) = (event != EXTEND, expected[at(t)] - f64::from(tau));
                if !forced && chosen != (off >= 0.0) && off.abs() > worst.0 {
                    worst = (off.abs(), at(t));
                }
                held.apply(event, scores[t]);
            }
        }
    }
    Comparison { tensor: "decisions", error: worst.0, bound, worst: worst.1 }
}
