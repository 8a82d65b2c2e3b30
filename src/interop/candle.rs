//! candle: [`attention`], a differentiable operator on candle's tensors. Feature `candle`; with `candle-cuda` it runs on a
//! GPU too, on candle's own stream, without a copy.
//!
//! candle's custom operators take three tensors, this one up to nine. So there are four in the graph: three that stand for
//! three arguments each, with a result of one element, and one that takes those and computes. In the backward that one,
//! which comes first, computes every gradient, and the three hand them on.

#[cfg(feature = "candle-cuda")]
mod cuda;

use crate::cache::Cache;
use crate::cpu;
use crate::engine::{Engine, Gradients};
use crate::options::{Options, Read, Recurrence, Tau};
use crate::problem::{Inputs, OutputGradients, Problem, Route};
use crate::tensor::{Buffer, Data, Tensor as View};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor,
};
use std::sync::{Arc, Mutex, PoisonError};

/// Arguments of a call, as those of [`Inputs`].
#[derive(Debug, Clone)]
pub struct Arguments {
    /// Queries, `[B,T,H,dk]`, f32, bf16 or f16.
    pub q: Tensor,
    /// Keys, `[B,T,H,dk]`, dtype of q.
    pub k: Tensor,
    /// Values, `[B,T,HV,dv]`, dtype of q.
    pub v: Tensor,
    /// Log decay, `[B,T,HV]` f32, at most 0.
    pub g: Option<Tensor>,
    /// Write strength of the gated delta rule, `[B,T,HV]` f32.
    pub beta: Option<Tensor>,
    /// Given read weights, `[B,T,HV,M]` f32.
    pub lambda: Option<Tensor>,
    /// Routed reads: slope, `[HV]` f32.
    pub slope: Option<Tensor>,
    /// Routed reads: bias, `[HV]` f32.
    pub bias: Option<Tensor>,
    /// Routed reads: logits, `[B,T,HV,M]` f32.
    pub logits: Option<Tensor>,
}

impl Arguments {
    /// Queries, keys and values; all else absent.
    pub fn new(q: Tensor, k: Tensor, v: Tensor) -> Self {
        Arguments { q, k, v, g: None, beta: None, lambda: None, slope: None, bias: None, logits: None }
    }

    fn get(&self) -> [Option<&Tensor>; 9] {
        [
            Some(&self.q),
            Some(&self.k),
            Some(&self.v),
            self.g.as_ref(),
            self.beta.as_ref(),
            self.lambda.as_ref(),
            self.slope.as_ref(),
            self.bias.as_ref(),
            self.logits.as_ref(),
        ]
    }

    /// The same values, each contiguous.
    fn contiguous(&self) -> Result<Arguments> {
        let of = |x: &Option<Tensor>| x.as_ref().map(Tensor::contiguous).transpose();
        Ok(Arguments {
            q: self.q.contiguous()?,
            k: self.k.contiguous()?,
            v: self.v.contiguous()?,
            g: of(&self.g)?,
            beta: of(&self.beta)?,
            lambda: of(&self.lambda)?,
            slope: of(&self.slope)?,
            bias: of(&self.bias)?,
            logits: of(&self.logits)?,
        })
    }
}

/// Names of [`Arguments`], in their order.
const NAMES: [&str; 9] = ["q", "k", "v", "g", "beta", "lambda", "route_slope", "route_bias", "route_logits"];

/// Results of [`attention`].
#[derive(Debug, Clone)]
pub struct Output {
    /// Output, `[B,T,HV,dv]`, dtype of q; differentiable.
    pub o: Tensor,
    /// Event log, `[B,T,HV]` u8.
    pub events: Tensor,
    /// States after the last token of every sequence, of the host; `None` on a GPU. It has no gradient.
    pub cache: Option<Cache>,
}

/// Dynamic Linear Attention of candle's tensors, on the device that they are on. `cache` are states to resume from, on the
/// CPU. Arguments that are not contiguous are made so, which copies them.
///
/// # Errors
/// As [`Problem::new`] and the forward, with the argument's name. On a GPU: without the feature `candle-cuda`, or with a
/// cache.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use dla::interop::candle::{Arguments, attention};
///
/// let q = Var::randn(0f32, 1., (1, 64, 2, 16), &Device::Cpu)?;
/// let mut arguments = Arguments::new(q.as_tensor().clone(), q.as_tensor().clone(), q.as_tensor().clone());
/// arguments.lambda = Some(Tensor::ones((1, 64, 2, 30), candle_core::DType::F32, &Device::Cpu)?);
/// let output = attention(&arguments, &dla::Options::default(), None)?;
/// let gradients = output.o.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).unwrap().dims(), [1, 64, 2, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn attention(arguments: &Arguments, options: &Options, cache: Option<&Cache>) -> Result<Output> {
    let arguments = arguments.contiguous()?;
    let device = arguments.q.device().clone();
    for (name, x) in NAMES.iter().zip(arguments.get()) {
        if let Some(x) = x
            && !x.device().same_device(&device)
        {
            return Err(Error::msg(format!("{name}: expected a tensor of q's device, got one of another")));
        }
    }
    let call = Arc::new(Call {
        arguments,
        options: options.clone(),
        cache: cache.cloned(),
        results: Mutex::default(),
        gradients: Mutex::default(),
    });
    let q = &call.arguments.q;
    let tokens = [0, 1, 2].map(|group| {
        // An absent argument is stood for by q, which then gets nothing from here.
        let [a, b, c] = [0, 1, 2].map(|i| call.arguments.get()[3 * group + i].unwrap_or(q));
        a.apply_op3(b, c, Stand { call: call.clone(), group })
    });
    let [first, second, third] = tokens;
    let o = first?.apply_op3(&second?, &third?, Compute { call: call.clone() })?;
    let results = call.results.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Results { log, cache } = results.ok_or_else(|| Error::msg("internal: the forward left no log"))?;
    let events = log.events.clone();
    *call.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(Kept::Log(log));
    Ok(Output { o, events, cache })
}

/// One call, shared by its four operators.
struct Call {
    arguments: Arguments,
    options: Options,
    cache: Option<Cache>,
    results: Mutex<Option<Results>>,
    gradients: Mutex<Option<Kept>>,
}

/// What a forward gives beside o.
struct Results {
    log: Log,
    cache: Option<Cache>,
}

/// What the backward takes of a forward: the event log and, of a GPU, what would be computed again.
#[derive(Clone)]
struct Log {
    events: Tensor,
    /// Drift, with soft boundaries.
    #[cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]
    drift: Option<Tensor>,
    /// Routed read weights.
    #[cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]
    weights: Option<Tensor>,
}

/// What is kept for the backward, and in it.
enum Kept {
    Log(Log),
    /// Gradients of the nine arguments, each handed on once.
    Gradients(Log, Box<[Option<Tensor>; 9]>),
}

impl Kept {
    fn log(&self) -> &Log {
        match self {
            Kept::Log(log) | Kept::Gradients(log, _) => log,
        }
    }
}

/// The elements of a contiguous tensor of the CPU.
fn elements<'a>(storage: &'a Storage, layout: &Layout, name: &str) -> Result<Data<'a>> {
    let Storage::Cpu(storage) = storage else {
        return Err(Error::msg(format!("{name}: expected a tensor of the CPU")));
    };
    let Some((begin, end)) = layout.contiguous_offsets() else {
        return Err(Error::msg(format!("{name}: expected a contiguous tensor")));
    };
    match storage {
        CpuStorage::F32(x) => Ok(Data::F32(&x[begin..end])),
        CpuStorage::BF16(x) => Ok(Data::Bf16(&x[begin..end])),
        CpuStorage::F16(x) => Ok(Data::F16(&x[begin..end])),
        other => {
            let dtype = candle_core::backend::BackendStorage::dtype(other);
            Err(Error::msg(format!("{name}: expected dtype f32, bf16 or f16, got {}", dtype.as_str())))
        }
    }
}

impl Call {
    /// Has `run` see the call as a problem of the CPU.
    fn with_problem<R>(&self, run: impl FnOnce(&Problem<'_>) -> crate::Result<R>) -> Result<R> {
        let arguments = self.arguments.get();
        let held: Vec<_> = arguments.iter().map(|x| x.map(Tensor::storage_and_layout)).collect();
        let mut views = [None; 9];
        for ((view, held), (name, x)) in views.iter_mut().zip(&held).zip(NAMES.iter().zip(arguments)) {
            if let (Some((storage, layout)), Some(x)) = (held, x) {
                *view = Some(View::new(elements(storage, layout, name)?, x.dims()));
            }
        }
        let [Some(q), Some(k), Some(v), g, beta, lambda, slope, bias, logits] = views else {
            return Err(Error::msg("q, k or v: missing"));
        };
        let mut inputs = Inputs::new(q, k, v);
        inputs.g = g;
        inputs.beta = beta;
        inputs.lambda = lambda;
        inputs.route = match (slope, bias) {
            (Some(slope), Some(bias)) => Some(Route { slope, bias, logits }),
            _ => None,
        };
        inputs.cache = self.cache.as_ref();
        let problem = Problem::new(&self.options, inputs).map_err(Error::wrap)?;
        run(&problem).map_err(Error::wrap)
    }

    fn compute(&self) -> Result<(CpuStorage, Shape)> {
        let forward = self.with_problem(|problem| cpu::Engine.forward(problem))?;
        let v = self.arguments.v.dims();
        let events = Tensor::from_vec(forward.events, &v[..3], &Device::Cpu)?;
        let log = Log { events, drift: None, weights: None };
        let results = Results { log, cache: Some(forward.cache) };
        *self.results.lock().unwrap_or_else(PoisonError::into_inner) = Some(results);
        let o = match forward.o {
            Buffer::F32(x) => CpuStorage::F32(x),
            Buffer::Bf16(x) => CpuStorage::BF16(x),
            Buffer::F16(x) => CpuStorage::F16(x),
        };
        Ok((o, v.into()))
    }

    /// Gradients of the nine arguments from that of o.
    fn differentiate(&self, log: &Log, d_o: &Tensor) -> Result<[Option<Tensor>; 9]> {
        #[cfg(feature = "candle-cuda")]
        if d_o.device().is_cuda() {
            return cuda::differentiate(self, log, d_o);
        }
        let (d_o, events) = (d_o.contiguous()?, log.events.flatten_all()?.to_vec1::<u8>()?);
        let (storage, layout) = d_o.storage_and_layout();
        let upstream =
            OutputGradients { o: View::new(elements(&storage, layout, "do")?, d_o.dims()), cache: None };
        let Gradients { q, k, v, g, beta, lambda, route, .. } =
            self.with_problem(|problem| cpu::Engine.backward(problem, &events, &upstream))?;
        let (slope, bias, logits) = match route {
            Some(route) => (Some(route.slope), Some(route.bias), route.logits),
            None => (None, None, None),
        };
        let buffers = [
            Some(q),
            Some(k),
            Some(v),
            g.map(Buffer::F32),
            beta.map(Buffer::F32),
            lambda.map(Buffer::F32),
            slope.map(Buffer::F32),
            bias.map(Buffer::F32),
            logits.map(Buffer::F32),
        ];
        let mut gradients = [const { None }; 9];
        for ((gradient, buffer), x) in gradients.iter_mut().zip(buffers).zip(self.arguments.get()) {
            let (Some(buffer), Some(x)) = (buffer, x) else { continue };
            *gradient = Some(match buffer {
                Buffer::F32(data) => Tensor::from_vec(data, x.dims(), &Device::Cpu)?,
                Buffer::Bf16(data) => Tensor::from_vec(data, x.dims(), &Device::Cpu)?,
                Buffer::F16(data) => Tensor::from_vec(data, x.dims(), &Device::Cpu)?,
            });
        }
        Ok(gradients)
    }

    /// tau of every value head.
    #[cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]
    fn taus(&self, value_heads: usize) -> Result<Vec<f32>> {
        match &self.options.tau {
            Tau::PerHead(taus) if taus.len() != value_heads => {
                Err(Error::msg(format!("tau: expected {value_heads} numbers, got {}", taus.len())))
            }
            tau => Ok((0..value_heads).map(|head| tau.of(head)).collect()),
        }
    }

    /// What the CUDA engine takes for granted and a problem of the CPU checks.
    #[cfg_attr(not(feature = "candle-cuda"), allow(dead_code))]
    fn check_presence(&self) -> Result<()> {
        let a = &self.arguments;
        let routed = self.options.read == Read::Routed;
        let delta = self.options.recurrence == Recurrence::GatedDelta;
        for (name, given, wanted) in [
            ("beta", a.beta.is_some(), delta),
            ("lambda", a.lambda.is_some(), !routed),
            ("route_slope", a.slope.is_some(), routed),
            ("route_bias", a.bias.is_some(), routed),
        ] {
            if given != wanted {
                let what = if wanted { "missing" } else { "not expected" };
                return Err(Error::msg(format!("{name}: {what} with these options")));
            }
        }
        Ok(())
    }
}

/// Three arguments as one element.
struct Stand {
    call: Arc<Call>,
    /// The first, second or third of three.
    group: usize,
}

impl CustomOp3 for Stand {
    fn name(&self) -> &'static str {
        "dla-arguments"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::element(storage)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut kept = self.call.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Kept::Gradients(_, gradients)) = &mut *kept else {
            return Err(Error::msg("internal: gradients are asked for before they are computed"));
        };
        let mut next = |i: usize| gradients[3 * self.group + i].take();
        Ok((next(0), next(1), next(2)))
    }
}

/// The operator itself.
struct Compute {
    call: Arc<Call>,
}

impl CustomOp3 for Compute {
    fn name(&self) -> &'static str {
        "dla"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.call.compute()
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (o, shape, log) = cuda::compute(&self.call, storage)?;
        let results = Results { log, cache: None };
        *self.call.results.lock().unwrap_or_else(PoisonError::into_inner) = Some(results);
        Ok((o, shape))
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Err(Error::msg("device: this build of dla has no feature candle-cuda"))
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let log = match &*self.call.gradients.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(kept) => kept.log().clone(),
            None => return Err(Error::msg("internal: the log is gone")),
        };
        let gradients = self.call.differentiate(&log, d_o)?;
        let kept = Kept::Gradients(log, Box::new(gradients));
        *self.call.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        let zero = |x: &Tensor| Tensor::zeros(1, DType::F32, x.device()).map(Some);
        Ok((zero(first)?, zero(second)?, zero(third)?))
    }
}
