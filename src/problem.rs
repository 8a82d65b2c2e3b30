//! A call, validated once: the engines trust a [`Problem`].

use crate::cache::{Cache, CacheDims, CacheGradients, CacheRef};
use crate::error::{Error, Result};
use crate::events::Ledger;
use crate::options::{Options, Read, Recurrence};
use crate::tensor::{Dtype, Tensor};

/// Borrowed arguments of a call. Build with [`Inputs::new`] and set what else the options read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, `[B,T,H,dk]`, f32, bf16 or f16.
    pub q: Tensor<'a>,
    /// Keys, `[B,T,H,dk]`, dtype of q.
    pub k: Tensor<'a>,
    /// Values, `[B,T,HV,dv]`, dtype of q; HV a multiple of H.
    pub v: Tensor<'a>,
    /// Log decay, `[B,T,HV]` f32, at most 0; absent is 0.
    pub g: Option<Tensor<'a>>,
    /// Write strength of the gated delta rule, `[B,T,HV]` f32.
    pub beta: Option<Tensor<'a>>,
    /// Read weights with [`Read::Given`], `[B,T,HV,M]` f32; columns past M are not read.
    pub lambda: Option<Tensor<'a>>,
    /// Parameters of the read weights with [`Read::Routed`].
    pub route: Option<Route<'a>>,
    /// The caller's own event log, `[B,T,HV]`; absent, it is computed.
    pub events: Option<&'a [u8]>,
    /// Packed sequences: offsets `[N+1]` from 0 to T, not descending; B = 1.
    pub cu_seqlens: Option<&'a [i64]>,
    /// States to resume from, one per sequence; absent, sequences begin empty.
    pub cache: Option<&'a Cache>,
}

/// Parameters of routed reads (OPERATOR.md, section 6).
#[derive(Debug, Clone, Copy)]
pub struct Route<'a> {
    /// Slope of the score `q . kappa`, `[HV]` f32.
    pub slope: Tensor<'a>,
    /// Bias, `[HV]` f32.
    pub bias: Tensor<'a>,
    /// Logits of the token, `[B,T,HV,M]` f32; absent is 0. Columns past M are not read.
    pub logits: Option<Tensor<'a>>,
}

impl<'a> Inputs<'a> {
    /// Queries, keys and values; all else absent.
    pub fn new(q: Tensor<'a>, k: Tensor<'a>, v: Tensor<'a>) -> Self {
        Inputs {
            q,
            k,
            v,
            g: None,
            beta: None,
            lambda: None,
            route: None,
            events: None,
            cu_seqlens: None,
            cache: None,
        }
    }
}

/// Extents of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Batch entries, B.
    pub batch: usize,
    /// Tokens of a batch entry, T.
    pub time: usize,
    /// Query and key heads, H.
    pub heads: usize,
    /// Value heads, HV.
    pub value_heads: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
    /// Most slots, M.
    pub capacity: usize,
    /// Sequences, N: B, or the number of packed ones.
    pub sequences: usize,
}

impl Shape {
    /// Tokens of all batch entries, B x T.
    pub fn tokens(&self) -> usize {
        self.batch * self.time
    }

    /// Query and key head that value head `head` reads.
    #[inline]
    pub fn key_head(&self, head: usize) -> usize {
        head / (self.value_heads / self.heads)
    }

    /// Extents of this call's cache.
    pub fn cache_dims(&self) -> CacheDims {
        CacheDims {
            sequences: self.sequences,
            value_heads: self.value_heads,
            capacity: self.capacity,
            dk: self.dk,
            dv: self.dv,
        }
    }
}

/// One sequence: a stretch of the flat token axis `[B x T]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// First token.
    pub start: usize,
    /// Tokens.
    pub len: usize,
}

/// A validated call.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    inputs: Inputs<'a>,
    options: Options,
    shape: Shape,
    sequences: Vec<Sequence>,
}

/// Gradients of a call's results, given to the backward.
#[derive(Debug, Clone, Copy)]
pub struct OutputGradients<'a> {
    /// Gradient of o, `[B,T,HV,dv]`, dtype of q.
    pub o: Tensor<'a>,
    /// Gradient of the final cache; absent is 0.
    pub cache: Option<&'a CacheGradients>,
}

impl<'a> Problem<'a> {
    /// Validates a call.
    ///
    /// # Errors
    /// Names the first argument that is missing, has the wrong rank, extent, dtype or values, or an
    /// option out of range.
    pub fn new(options: &Options, inputs: Inputs<'a>) -> Result<Self> {
        let &[batch, time, heads, dk] = rank("q", &inputs.q, "[B,T,H,dk]")?;
        let &[.., value_heads, dv] = rank::<4>("v", &inputs.v, "[B,T,HV,dv]")?;
        for (name, extent) in [("H", heads), ("dk", dk)] {
            if extent == 0 {
                return shape_error("q", format!("[B,T,H,dk] with {name} >= 1"), &inputs.q);
            }
        }
        if value_heads == 0 || dv == 0 || value_heads % heads != 0 {
            return shape_error(
                "v",
                format!("[B,T,HV,dv] with dv >= 1 and HV a multiple of H = {heads}"),
                &inputs.v,
            );
        }
        options.validate(value_heads)?;
        let capacity = options.capacity;

        exact("q", &inputs.q, "[B,T,H,dk]", &[batch, time, heads, dk])?;
        exact("k", &inputs.k, "[B,T,H,dk]", &[batch, time, heads, dk])?;
        exact("v", &inputs.v, "[B,T,HV,dv]", &[batch, time, value_heads, dv])?;
        same_dtype("k", &inputs.k, inputs.q.dtype())?;
        same_dtype("v", &inputs.v, inputs.q.dtype())?;

        let per_token = |name, tensor: &Tensor| {
            exact(name, tensor, "[B,T,HV]", &[batch, time, value_heads])?;
            f32s(name, tensor).map(|_| ())
        };
        if let Some(g) = &inputs.g {
            per_token("g", g)?;
            if let Some((index, &given)) =
                f32s("g", g)?.iter().enumerate().find(|(_, g)| g.is_nan() || **g > 0.0)
            {
                return Err(Error::Value { name: "g", expected: "at most 0", given: given.into(), index });
            }
        }
        match (options.recurrence, &inputs.beta) {
            (Recurrence::GatedDelta, Some(beta)) => per_token("beta", beta)?,
            (Recurrence::GatedDelta, None) => {
                return Err(Error::Missing {
                    name: "beta",
                    why: "the gated delta rule writes with strength beta [B,T,HV]",
                });
            }
            (Recurrence::Gated, None) => {}
            (Recurrence::Gated, Some(_)) => {
                return Err(Error::Unexpected {
                    name: "beta",
                    why: "the gated recurrence has no write strength",
                });
            }
        }
        let per_slot = |name, tensor: &Tensor| {
            let expected = [batch, time, value_heads, capacity];
            match tensor.shape() {
                [b, t, h, columns] if [*b, *t, *h] == expected[..3] && *columns >= capacity => {
                    exact(name, tensor, "[B,T,HV,M]", &[batch, time, value_heads, *columns])?;
                }
                _ => return shape_error(name, format!("[B,T,HV,M] = {expected:?}, M or more"), tensor),
            }
            f32s(name, tensor).map(|_| ())
        };
        match (options.read, &inputs.lambda, &inputs.route) {
            (Read::Given, Some(lambda), None) => per_slot("lambda", lambda)?,
            (Read::Given, None, _) => {
                return Err(Error::Missing {
                    name: "lambda",
                    why: "reads are given, with lambda [B,T,HV,M]",
                });
            }
            (Read::Given, Some(_), Some(_)) => {
                return Err(Error::Unexpected { name: "route", why: "reads are given" });
            }
            (Read::Routed, None, Some(route)) => {
                exact("route_slope", &route.slope, "[HV]", &[value_heads])?;
                f32s("route_slope", &route.slope)?;
                exact("route_bias", &route.bias, "[HV]", &[value_heads])?;
                f32s("route_bias", &route.bias)?;
                if let Some(logits) = &route.logits {
                    per_slot("route_logits", logits)?;
                }
            }
            (Read::Routed, _, None) => {
                return Err(Error::Missing {
                    name: "route_slope",
                    why: "reads are routed, with route_slope and route_bias [HV]",
                });
            }
            (Read::Routed, Some(_), Some(_)) => {
                return Err(Error::Unexpected { name: "lambda", why: "reads are routed" });
            }
        }

        let sequences = match inputs.cu_seqlens {
            Some(offsets) => packed(offsets, batch, time)?,
            None => {
                // With T = 0 any B has as many elements as were given: none.
                let mut sequences = Vec::new();
                if sequences.try_reserve_exact(batch).is_err() {
                    return shape_error("q", "[B,T,H,dk] of a size that fits memory".to_owned(), &inputs.q);
                }
                sequences.extend((0..batch).map(|b| Sequence { start: b * time, len: time }));
                sequences
            }
        };
        let cache = [value_heads, capacity, dk, dv, size_of::<f64>()];
        let bytes = cache.iter().try_fold(sequences.len(), |product, &dim| product.checked_mul(dim));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(Error::Shape {
                name: "cache_states",
                expected: "[N,HV,M,dk,dv] of a size that fits memory".to_owned(),
                given: format!("{:?}", [sequences.len(), value_heads, capacity, dk, dv]),
            });
        }
        let shape = Shape { batch, time, heads, value_heads, dk, dv, capacity, sequences: sequences.len() };
        if let Some(cache) = inputs.cache {
            cache.validate(&shape, options.read)?;
        }
        let problem = Problem { inputs, options: options.clone(), shape, sequences };
        if let Some(events) = inputs.events {
            problem.check_events_len(events)?;
        }
        Ok(problem)
    }

    /// Arguments.
    pub fn inputs(&self) -> &Inputs<'a> {
        &self.inputs
    }

    /// Options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Extents.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Sequences of the flat token axis.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// Dtype of q, k, v, o and their gradients.
    pub fn dtype(&self) -> Dtype {
        self.inputs.q.dtype()
    }

    /// Factor of q in the read.
    pub fn scale(&self) -> f32 {
        self.options.scale.unwrap_or_else(|| (1.0 / (self.shape.dk as f64).sqrt()) as f32)
    }

    /// Columns of `lambda` (and of its gradient), M or more.
    pub fn lambda_columns(&self) -> usize {
        self.inputs.lambda.map_or(self.shape.capacity, |lambda| lambda.shape()[3])
    }

    /// Columns of the route's logits (and of their gradient), M or more.
    pub fn logit_columns(&self) -> usize {
        let logits = self.inputs.route.and_then(|route| route.logits);
        logits.map_or(self.shape.capacity, |logits| logits.shape()[3])
    }

    /// The slots that `row = sequence x HV + head` begins with.
    pub(crate) fn initial_ledger(&self, cache: Option<&Cache>, row: usize) -> Ledger {
        cache.map_or_else(Ledger::default, |cache| cache.view().ledger(row))
    }

    fn check_events_len(&self, events: &[u8]) -> Result<()> {
        let expected = self.shape.tokens() * self.shape.value_heads;
        if events.len() != expected {
            let Shape { batch, time, value_heads, .. } = self.shape;
            return Err(Error::Shape {
                name: "events",
                expected: format!("[B,T,HV] = [{batch}, {time}, {value_heads}], {expected} elements"),
                given: format!("{} elements", events.len()),
            });
        }
        Ok(())
    }

    /// Checks that every event of a log can happen, sequences beginning from `cache`.
    pub(crate) fn check_events(&self, events: &[u8], cache: Option<&Cache>) -> Result<()> {
        self.check_events_from(events, |row| self.initial_ledger(cache, row))
    }

    /// The same, row `row` of N x HV beginning with the slots `initial(row)`.
    pub(crate) fn check_events_from(&self, events: &[u8], initial: impl Fn(usize) -> Ledger) -> Result<()> {
        self.check_events_len(events)?;
        let Shape { time, value_heads, capacity, .. } = self.shape;
        for (n, sequence) in self.sequences.iter().enumerate() {
            for head in 0..value_heads {
                let mut ledger = initial(n * value_heads + head);
                for token in sequence.start..sequence.start + sequence.len {
                    let event = events[token * value_heads + head];
                    if !ledger.allows(event, capacity) {
                        return Err(Error::Event {
                            expected: ledger.possible(capacity),
                            given: event,
                            batch: token / time,
                            token: token % time,
                            head,
                            slots: ledger.len(),
                        });
                    }
                    ledger.apply(event, 0.0);
                }
            }
        }
        Ok(())
    }

    /// Checks what the forward reads beside the problem.
    pub(crate) fn check_forward(&self) -> Result<()> {
        self.inputs.events.map_or(Ok(()), |events| self.check_events(events, self.inputs.cache))
    }

    /// Checks what the backward reads beside the problem.
    pub(crate) fn check_backward(&self, events: &[u8], upstream: &OutputGradients) -> Result<()> {
        let Shape { batch, time, value_heads, dv, .. } = self.shape;
        exact("do", &upstream.o, "[B,T,HV,dv]", &[batch, time, value_heads, dv])?;
        same_dtype("do", &upstream.o, self.dtype())?;
        if let Some(cache) = upstream.cache {
            cache.validate(self.shape.cache_dims(), self.options.read)?;
        }
        self.check_events(events, self.inputs.cache)
    }

    /// Checks what a step reads beside the problem.
    pub(crate) fn check_step(&self, cache: &Cache) -> Result<()> {
        self.check_step_from(cache.view())
    }

    /// [`Self::check_step`] of a cache whose arrays belong to someone else.
    pub(crate) fn check_step_from(&self, cache: CacheRef<'_>) -> Result<()> {
        if self.inputs.cu_seqlens.is_some() {
            return Err(Error::Unexpected {
                name: "cu_seqlens",
                why: "a step takes one token per batch entry",
            });
        }
        if self.inputs.cache.is_some() {
            return Err(Error::Unexpected { name: "cache", why: "a step takes the cache that it changes" });
        }
        if self.shape.time != 1 {
            return shape_error("q", "[B,T,H,dk] with T = 1 for a step".to_owned(), &self.inputs.q);
        }
        cache.validate(&self.shape, self.options.read)?;
        self.inputs.events.map_or(Ok(()), |events| self.check_events_from(events, |row| cache.ledger(row)))
    }
}

fn shape_error<T>(name: &'static str, expected: String, tensor: &Tensor) -> Result<T> {
    Err(Error::Shape { name, expected, given: format!("{:?}", tensor.extents) })
}

/// The extents of a tensor of rank R.
fn rank<'t, const R: usize>(name: &'static str, tensor: &'t Tensor, layout: &str) -> Result<&'t [usize; R]> {
    match tensor.shape().try_into() {
        Ok(dims) => Ok(dims),
        Err(_) => shape_error(name, format!("rank {R}, {layout}"), tensor),
    }
}

/// Extents exactly `dims`, with as many elements as they say.
fn exact(name: &'static str, tensor: &Tensor, layout: &str, dims: &[usize]) -> Result<()> {
    if tensor.shape() != dims {
        return shape_error(name, format!("{layout} = {dims:?}"), tensor);
    }
    let elements = dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    if elements != Some(tensor.data().len()) {
        let expected = elements.map_or("a size that fits memory".to_owned(), |n| format!("{n} elements"));
        return Err(Error::Shape { name, expected, given: format!("{} elements", tensor.data().len()) });
    }
    Ok(())
}

fn same_dtype(name: &'static str, tensor: &Tensor, expected: Dtype) -> Result<()> {
    if tensor.dtype() != expected {
        return Err(Error::Dtype {
            name,
            expected: format!("{expected}, as q"),
            given: tensor.dtype().to_string(),
        });
    }
    Ok(())
}

/// The elements of a tensor that must be f32.
pub(crate) fn f32s<'a>(name: &'static str, tensor: &Tensor<'a>) -> Result<&'a [f32]> {
    match tensor.data() {
        crate::tensor::Data::F32(x) => Ok(x),
        _ => Err(Error::Dtype { name, expected: "f32".to_owned(), given: tensor.dtype().to_string() }),
    }
}

fn packed(offsets: &[i64], batch: usize, time: usize) -> Result<Vec<Sequence>> {
    let wrong = |expected: String, index: usize| {
        Err(Error::CuSeqlens { expected, given: offsets.get(index).copied().unwrap_or(0), index })
    };
    if batch != 1 {
        return Err(Error::Unexpected { name: "cu_seqlens", why: "packed sequences take B = 1" });
    }
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return Err(Error::Shape {
            name: "cu_seqlens",
            expected: "[N+1], N + 1 >= 1".to_owned(),
            given: "[0]".to_owned(),
        });
    };
    if first != 0 {
        return wrong("0".to_owned(), 0);
    }
    if let Some(index) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
        return wrong(format!("at least {}, the offset before", offsets[index - 1]), index);
    }
    if usize::try_from(last) != Ok(time) {
        return wrong(format!("T = {time}"), offsets.len() - 1);
    }
    let sequence = |pair: &[i64]| Sequence { start: pair[0] as usize, len: (pair[1] - pair[0]) as usize };
    Ok(offsets.windows(2).map(sequence).collect())
}
