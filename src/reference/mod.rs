//! The definition in f64, token by token (OPERATOR.md, section 3), and its gradients. Obvious before
//! fast: every other engine is judged by this one.
//!
//! [`Engine`] takes and returns the caller's dtypes. [`forward`] and [`backward`] work on f64
//! [`Arguments`], so that results can be compared unrounded and gradients checked by differences.

mod backward;
mod forward;
mod linear;

pub use backward::backward;
pub(crate) use backward::backward_row;
pub use forward::forward;
pub(crate) use forward::{DRIFT_FLOOR, Row, confidence, forward_row};

use crate::cache::{Cache, CacheDims, CacheGradients};
use crate::engine::{Forward, RouteGradients, SoftGradients, Step};
use crate::error::Result;
use crate::options::{L2NORM_EPS, Read, Recurrence};
use crate::problem::{OutputGradients, Problem};
use crate::tensor::{Buffer, Tensor};

/// Every differentiable argument of a call in f64, in the layouts of [`Inputs`](crate::Inputs).
#[derive(Debug, Clone)]
pub struct Arguments {
    /// Queries, `[B,T,H,dk]`.
    pub q: Vec<f64>,
    /// Keys, `[B,T,H,dk]`.
    pub k: Vec<f64>,
    /// Values, `[B,T,HV,dv]`.
    pub v: Vec<f64>,
    /// Log decay, `[B,T,HV]`; zeros where the call has none.
    pub g: Vec<f64>,
    /// Write strength, `[B,T,HV]`; ones where the call has none.
    pub beta: Vec<f64>,
    /// Given read weights, `[B,T,HV,M or more]`.
    pub lambda: Option<Vec<f64>>,
    /// Route slope, `[HV]`.
    pub slope: Vec<f64>,
    /// Route bias, `[HV]`.
    pub bias: Vec<f64>,
    /// Route logits, `[B,T,HV,M or more]`.
    pub logits: Option<Vec<f64>>,
    /// Boundary threshold, `[HV]`. Boundaries are decided by the f32 one; soft boundaries take this.
    pub tau: Vec<f64>,
    /// Initial states.
    pub cache: Option<States>,
}

/// The differentiable part of a cache in f64, in the layouts of [`Cache`].
#[derive(Debug, Clone, PartialEq)]
pub struct States {
    /// Slot states, `[N,HV,M,dk,dv]`.
    pub states: Vec<f64>,
    /// The open segment's R, `[N,HV,dk,dv]`.
    pub open: Vec<f64>,
    /// Key sums, `[N,HV,M,dk]`.
    pub keys: Vec<f64>,
}

impl States {
    /// Zeros.
    pub fn zeros(dims: CacheDims) -> Self {
        let rows = dims.rows();
        States {
            states: vec![0.0; rows * dims.bank()],
            open: vec![0.0; rows * dims.state()],
            keys: vec![0.0; rows * dims.key_bank()],
        }
    }

    /// The states of `cache`.
    pub fn of(cache: &Cache) -> Self {
        Self::from_parts(cache.dims, &cache.states, &cache.open, cache.keys.as_deref())
    }

    fn from_parts(dims: CacheDims, states: &[f32], open: &[f32], keys: Option<&[f32]>) -> Self {
        States {
            states: to_f64(states),
            open: to_f64(open),
            keys: keys.map_or_else(|| vec![0.0; dims.rows() * dims.key_bank()], to_f64),
        }
    }
}

/// Results of [`forward`].
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Output, `[B,T,HV,dv]`.
    pub o: Vec<f64>,
    /// Drift, `[B,T,HV]`. Decisions take it rounded to f32.
    pub drift: Vec<f64>,
    /// Event log, `[B,T,HV]`.
    pub events: Vec<u8>,
    /// Read weights by column, `[B,T,HV,M]`, where reads are routed.
    pub lambda: Option<Vec<f64>>,
    /// Final states.
    pub cache: States,
    /// Slots held at the end, their tokens and drift, as in [`Cache`].
    pub len: Vec<u32>,
    /// Tokens of every slot at the end.
    pub tokens: Vec<u32>,
    /// Summed drift of every slot at the end.
    pub summed_drift: Vec<u32>,
}

/// Results of [`backward`]: the gradient of every one of the [`Arguments`], and of the drift.
#[derive(Debug, Clone)]
pub struct ArgumentGradients {
    /// Gradients in the layouts of the arguments.
    pub arguments: Arguments,
    /// Gradient of the drift, `[B,T,HV]`; zeros without soft boundaries.
    pub drift: Vec<f64>,
    /// Norm of the terms that the gradients of slope, bias and tau are sums of.
    pub terms: Terms,
}

/// Norms `sqrt(sum x^2)` of the terms of a sum over tokens (and slots), `[HV]`. Where the terms cancel, a
/// relative error says nothing of the sum: it is judged against these.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Terms {
    /// Of the gradient of the route's slope.
    pub slope: Vec<f64>,
    /// Of the gradient of the route's bias.
    pub bias: Vec<f64>,
    /// Of the gradient of tau.
    pub tau: Vec<f64>,
}

impl Arguments {
    /// The arguments of `problem`.
    pub fn of(problem: &Problem) -> Self {
        let inputs = problem.inputs();
        let shape = problem.shape();
        let per_token = shape.tokens() * shape.value_heads;
        let or_fill = |tensor: Option<Tensor>, fill: f64| {
            tensor.map_or_else(|| vec![fill; per_token], |tensor| tensor.data().to_f64())
        };
        let per_head = |tensor: Option<Tensor>| {
            tensor.map_or_else(|| vec![0.0; shape.value_heads], |tensor| tensor.data().to_f64())
        };
        Arguments {
            q: inputs.q.data().to_f64(),
            k: inputs.k.data().to_f64(),
            v: inputs.v.data().to_f64(),
            g: or_fill(inputs.g, 0.0),
            beta: or_fill(inputs.beta, 1.0),
            lambda: inputs.lambda.map(|lambda| lambda.data().to_f64()),
            slope: per_head(inputs.route.map(|route| route.slope)),
            bias: per_head(inputs.route.map(|route| route.bias)),
            logits: inputs.route.and_then(|route| route.logits).map(|logits| logits.data().to_f64()),
            tau: (0..shape.value_heads).map(|head| problem.options().tau.of(head).into()).collect(),
            cache: inputs.cache.map(States::of),
        }
    }

    /// Zeros of the same extents.
    fn zeros_like(&self) -> Self {
        let zeros = |x: &Vec<f64>| vec![0.0; x.len()];
        Arguments {
            q: zeros(&self.q),
            k: zeros(&self.k),
            v: zeros(&self.v),
            g: zeros(&self.g),
            beta: zeros(&self.beta),
            lambda: self.lambda.as_ref().map(zeros),
            slope: zeros(&self.slope),
            bias: zeros(&self.bias),
            logits: self.logits.as_ref().map(zeros),
            tau: zeros(&self.tau),
            cache: self.cache.as_ref().map(|cache| States {
                states: zeros(&cache.states),
                open: zeros(&cache.open),
                keys: zeros(&cache.keys),
            }),
        }
    }
}

/// Upstream gradients of [`backward`] in f64.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Gradient of o, `[B,T,HV,dv]`.
    pub o: Vec<f64>,
    /// Gradient of the final states.
    pub cache: Option<States>,
    /// Carried on as the gradient of the drift, `[B,T,HV]`, in place of that which soft boundaries give: so
    /// that what follows from it can be judged by itself.
    pub drift: Option<Vec<f64>>,
}

impl Upstream {
    /// The gradients of `upstream`.
    pub fn of(problem: &Problem, upstream: &OutputGradients) -> Self {
        let dims = problem.shape().cache_dims();
        let states = |cache: &CacheGradients| {
            States::from_parts(dims, &cache.states, &cache.open, cache.keys.as_deref())
        };
        Upstream { o: upstream.o.data().to_f64(), cache: upstream.cache.map(states), drift: None }
    }
}

/// The definition behind the common API.
#[derive(Debug, Clone, Copy, Default)]
pub struct Engine;

impl crate::engine::Engine for Engine {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        problem.check_forward()?;
        let outputs = forward(problem, &Arguments::of(problem), problem.inputs().events, None);
        Ok(Forward {
            o: Buffer::from_f64(problem.dtype(), &outputs.o),
            drift: to_f32(&outputs.drift),
            events: outputs.events,
            lambda: outputs.lambda.as_deref().map(to_f32),
            cache: Cache {
                dims: problem.shape().cache_dims(),
                states: to_f32(&outputs.cache.states),
                len: outputs.len,
                tokens: outputs.tokens,
                drift: outputs.summed_drift,
                open: to_f32(&outputs.cache.open),
                keys: (problem.options().read == Read::Routed).then(|| to_f32(&outputs.cache.keys)),
            },
        })
    }

    fn backward(
        &self,
        problem: &Problem<'_>,
        events: &[u8],
        upstream: &OutputGradients<'_>,
    ) -> Result<crate::Gradients> {
        problem.check_backward(events, upstream)?;
        let arguments = Arguments::of(problem);
        let gradients = backward(problem, &arguments, events, &Upstream::of(problem, upstream));
        Ok(gradients.round(problem))
    }

    fn step(&self, problem: &Problem<'_>, cache: &mut Cache) -> Result<Step> {
        problem.check_step(cache)?;
        let mut inputs = *problem.inputs();
        let held = cache.clone();
        inputs.cache = Some(&held);
        let resumed = Problem::new(problem.options(), inputs)?;
        let Forward { o, drift, events, lambda, cache: after } = self.forward(&resumed)?;
        *cache = after;
        Ok(Step { o, drift, events, lambda })
    }
}

impl ArgumentGradients {
    /// The gradients that `problem` asks for, in the dtypes of the API.
    pub fn round(&self, problem: &Problem) -> crate::Gradients {
        let ArgumentGradients { arguments, drift, .. } = self;
        let options = problem.options();
        let inputs = problem.inputs();
        let dtype = problem.dtype();
        let routed = options.read == Read::Routed;
        crate::Gradients {
            q: Buffer::from_f64(dtype, &arguments.q),
            k: Buffer::from_f64(dtype, &arguments.k),
            v: Buffer::from_f64(dtype, &arguments.v),
            g: inputs.g.map(|_| to_f32(&arguments.g)),
            beta: (options.recurrence == Recurrence::GatedDelta).then(|| to_f32(&arguments.beta)),
            lambda: arguments.lambda.as_deref().map(to_f32),
            route: routed.then(|| RouteGradients {
                slope: to_f32(&arguments.slope),
                bias: to_f32(&arguments.bias),
                logits: arguments.logits.as_deref().map(to_f32),
            }),
            soft: options.soft.map(|_| SoftGradients { tau: to_f32(&arguments.tau), drift: to_f32(drift) }),
            cache: arguments.cache.as_ref().map(|cache| CacheGradients {
                states: to_f32(&cache.states),
                open: to_f32(&cache.open),
                keys: routed.then(|| to_f32(&cache.keys)),
            }),
        }
    }
}

/// Reciprocal norm by which a q or k row is multiplied under `qk_l2norm`.
pub(crate) fn l2norm_factor(row: &[f64]) -> f64 {
    1.0 / (linear::dot(row, row) + L2NORM_EPS).sqrt()
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}
