//! Both passes on a GPU: candle's storages by address, on candle's stream; what it gives is memory of candle's.

use super::{Call, Log, NAMES};
use crate::cuda::{Call as Planned, Engine, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream};
use crate::problem::Shape as Extents;
use crate::tensor::Dtype;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, Shape, Storage, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// One element, for the operators that stand for arguments.
pub(super) fn element(storage: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let device = storage.device();
    let zero = device.alloc_zeros::<f32>(1)?;
    Ok((CudaStorage::wrap_cuda_slice(zero, device.clone()), Shape::from(1)))
}

/// The engine of a stream, kept: it has a stream and events of its own.
fn engine(stream: &Arc<CudaStream>) -> Result<Arc<Engine>> {
    static ENGINES: OnceLock<Mutex<HashMap<usize, Arc<Engine>>>> = OnceLock::new();
    let mut engines = ENGINES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    // The engine holds the stream, so that its address is nobody else's.
    let key = Arc::as_ptr(stream).addr();
    if let Some(engine) = engines.get(&key) {
        return Ok(engine.clone());
    }
    let engine = Arc::new(Engine::from_stream(stream.clone()).map_err(Error::wrap)?);
    engines.insert(key, engine.clone());
    Ok(engine)
}

/// The address of a contiguous tensor's first element; 0 where there is no tensor.
fn address(
    name: &str,
    x: Option<&Tensor>,
    dtype: DType,
    shape: &[usize],
    stream: &CudaStream,
) -> Result<u64> {
    let Some(x) = x else { return Ok(0) };
    if x.dtype() != dtype {
        let (expected, given) = (dtype.as_str(), x.dtype().as_str());
        return Err(Error::msg(format!("{name}: expected dtype {expected}, got {given}")));
    }
    if x.dims() != shape {
        return Err(Error::msg(format!("{name}: expected shape {shape:?}, got {:?}", x.dims())));
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::msg(format!("{name}: expected a tensor of the GPU")));
    };
    fn of<T: CudaDType + DeviceRepr>(storage: &CudaStorage, stream: &CudaStream) -> Result<u64> {
        // The guard would record an event for other streams: the tensor outlives the launch, on its own stream.
        let (at, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
        Ok(at)
    }
    let begin = match dtype {
        DType::F32 => of::<f32>(storage, stream)?,
        DType::BF16 => of::<bf16>(storage, stream)?,
        DType::F16 => of::<f16>(storage, stream)?,
        other => {
            return Err(Error::msg(format!("{name}: expected f32, bf16 or f16, got {}", other.as_str())));
        }
    };
    Ok(begin + (layout.start_offset() * dtype.size_in_bytes()) as u64)
}

/// A call's arguments on the GPU: their addresses, extents and engine.
struct Site {
    engine: Arc<Engine>,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    extents: Extents,
    dtype: Dtype,
    inputs: RawInputs,
    /// tau of every value head, held for its memory.
    _tau: CudaSlice<f32>,
}

impl Site {
    fn new(call: &Call, device: &CudaDevice) -> Result<Site> {
        call.check_presence()?;
        if call.cache.is_some() {
            return Err(Error::msg("cache: not expected; on a GPU candle's sequences begin empty"));
        }
        let a = &call.arguments;
        let dtype = match a.q.dtype() {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::Bf16,
            DType::F16 => Dtype::F16,
            other => return Err(Error::msg(format!("q: expected f32, bf16 or f16, got {}", other.as_str()))),
        };
        let (batch, time, heads, dk) = a.q.dims4()?;
        let (_, _, value_heads, dv) = a.v.dims4()?;
        let capacity = call.options.capacity;
        let extents = Extents { batch, time, heads, value_heads, dk, dv, capacity, sequences: batch };
        let stream = device.cuda_stream();
        let engine = engine(&stream)?;

        let (rows, values) = ([batch, time, heads, dk], [batch, time, value_heads, dv]);
        let per_token = [batch, time, value_heads];
        let columns =
            |x: &Option<Tensor>| x.as_ref().and_then(|x| x.dims().get(3).copied()).unwrap_or(capacity);
        let (lambda_columns, logit_columns) = (columns(&a.lambda), columns(&a.logits));
        let per_slot = |columns| [batch, time, value_heads, columns];
        let (own, f32) = (a.q.dtype(), DType::F32);
        let [q, k, v, g, beta, lambda, slope, bias, logits] = a.get();
        let at = |i: usize, x, dtype, shape: &[usize]| address(NAMES[i], x, dtype, shape, &stream);
        let tau: CudaSlice<f32> = device.clone_htod(&call.taus(value_heads)?)?;
        let inputs = RawInputs {
            q: at(0, q, own, &rows)?,
            k: at(1, k, own, &rows)?,
            v: at(2, v, own, &values)?,
            g: at(3, g, f32, &per_token)?,
            beta: at(4, beta, f32, &per_token)?,
            lambda: at(5, lambda, f32, &per_slot(lambda_columns))?,
            lambda_columns,
            slope: at(6, slope, f32, &[value_heads])?,
            bias: at(7, bias, f32, &[value_heads])?,
            logits: at(8, logits, f32, &per_slot(logit_columns))?,
            logit_columns,
            tau: tau.device_ptr(&stream).0,
            events: 0,
            cu_seqlens: 0,
            cache: None,
        };
        Ok(Site { engine, device: device.clone(), stream, extents, dtype, inputs, _tau: tau })
    }

    fn planned<'a>(&self, call: &'a Call) -> Planned<'a> {
        Planned { options: &call.options, shape: self.extents, dtype: self.dtype, final_cache: false }
    }

    /// Memory that is not filled, and its address.
    fn room<T: CudaDType + DeviceRepr>(&self, elements: usize) -> Result<(CudaSlice<T>, u64)> {
        // SAFETY: written whole by the call before anything reads it.
        let mut room = unsafe { self.device.alloc::<T>(elements) }?;
        let at = room.device_ptr_mut(&self.stream).0;
        Ok((room, at))
    }

    fn tensor<T: WrapSlice>(&self, x: CudaSlice<T>, shape: &[usize]) -> Tensor {
        let storage = Storage::Cuda(T::wrap(x, &self.device));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    }

    /// A tensor of q's dtype that is not filled, and its address.
    fn tensor_like_q(&self, shape: &[usize]) -> Result<(Tensor, u64)> {
        let elements = shape.iter().product();
        Ok(match self.dtype {
            Dtype::F32 => self.room::<f32>(elements).map(|(x, at)| (self.tensor(x, shape), at))?,
            Dtype::Bf16 => self.room::<bf16>(elements).map(|(x, at)| (self.tensor(x, shape), at))?,
            Dtype::F16 => self.room::<f16>(elements).map(|(x, at)| (self.tensor(x, shape), at))?,
        })
    }

    fn floats(&self, shape: &[usize]) -> Result<(Tensor, u64)> {
        let (x, at) = self.room::<f32>(shape.iter().product())?;
        Ok((self.tensor(x, shape), at))
    }
}

/// An element whose slices are storages of candle.
trait WrapSlice: Sized {
    fn wrap(x: CudaSlice<Self>, device: &CudaDevice) -> CudaStorage;
}

macro_rules! wrap_slice {
    ($($t:ty),*) => {$(
        impl WrapSlice for $t {
            fn wrap(x: CudaSlice<$t>, device: &CudaDevice) -> CudaStorage {
                CudaStorage::wrap_cuda_slice(x, device.clone())
            }
        }
    )*};
}
wrap_slice!(f32, bf16, f16, u8);

/// Computes o and the log.
pub(super) fn compute(call: &Call, like: &CudaStorage) -> Result<(CudaStorage, Shape, Log)> {
    match call.arguments.q.dtype() {
        DType::F32 => typed::<f32>(call, like),
        DType::BF16 => typed::<bf16>(call, like),
        DType::F16 => typed::<f16>(call, like),
        other => Err(Error::msg(format!("q: expected f32, bf16 or f16, got {}", other.as_str()))),
    }
}

fn typed<T>(call: &Call, like: &CudaStorage) -> Result<(CudaStorage, Shape, Log)>
where
    T: CudaDType + DeviceRepr + WrapSlice,
{
    let site = Site::new(call, like.device())?;
    let plan = site.engine.plan(&site.planned(call)).map_err(Error::wrap)?;
    let Extents { batch, time, value_heads, dv, capacity, .. } = site.extents;
    let per_token = [batch, time, value_heads];
    let tokens: usize = per_token.iter().product();
    let routed = call.options.read == crate::Read::Routed;
    let (o, at_o) = site.room::<T>(tokens * dv)?;
    let (drift, at_drift) = site.floats(&per_token)?;
    let (events, at_events) = site.room::<u8>(tokens)?;
    let weights = routed.then(|| site.floats(&[batch, time, value_heads, capacity])).transpose()?;
    let (_workspace, at) = site.room::<u8>(plan.workspace_bytes().max(1))?;
    let outputs = RawOutputs {
        o: at_o,
        drift: at_drift,
        events: at_events,
        lambda: weights.as_ref().map_or(0, |(_, at)| *at),
        cache: None,
    };
    let room = (at, plan.workspace_bytes());
    // SAFETY: the plan is of this engine's GPU; arrays have the shapes that were checked; all were allocated on this
    // stream, in whose order they are freed. That g is at most 0 is the caller's to see to, as on any GPU.
    unsafe { site.engine.launch(&plan, &site.inputs, &outputs, room, None) }.map_err(Error::wrap)?;
    let log = Log {
        events: site.tensor(events, &per_token),
        drift: call.options.soft.map(|_| drift),
        weights: weights.map(|(weights, _)| weights),
    };
    Ok((T::wrap(o, &site.device), Shape::from(&[batch, time, value_heads, dv][..]), log))
}

/// Gradients of the nine arguments from that of o.
pub(super) fn differentiate(call: &Call, log: &Log, d_o: &Tensor) -> Result<[Option<Tensor>; 9]> {
    let site = Site::new(call, d_o.device().as_cuda_device()?)?;
    let a = &call.arguments;
    let d_o = d_o.contiguous()?;
    let upstream =
        RawUpstream { o: address("do", Some(&d_o), a.q.dtype(), a.v.dims(), &site.stream)?, cache: None };
    let Extents { batch, time, value_heads, capacity, .. } = site.extents;
    let per_token = [batch, time, value_heads];
    // The log is of u8, and so not one of address's.
    let (storage, layout) = log.events.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::msg("events: expected a tensor of the GPU"));
    };
    let events = storage.as_cuda_slice::<u8>()?.device_ptr(&site.stream).0 + layout.start_offset() as u64;
    let kept = |name, x: &Option<Tensor>, shape: &[usize]| {
        address(name, x.as_ref(), DType::F32, shape, &site.stream)
    };
    let forward = RawForward {
        events,
        drift: kept("drift", &log.drift, &per_token)?,
        lambda: kept("lambda", &log.weights, &[batch, time, value_heads, capacity])?,
    };
    let mut given = [const { None }; 9];
    let mut at = [0; 9];
    for (i, x) in a.get().into_iter().enumerate() {
        let Some(x) = x else { continue };
        let (gradient, address) = if i < 3 { site.tensor_like_q(x.dims())? } else { site.floats(x.dims())? };
        (given[i], at[i]) = (Some(gradient), address);
    }
    let [q, k, v, g, beta, lambda, slope, bias, logits] = at;
    let gradients = RawGradients { q, k, v, g, beta, lambda, slope, bias, logits, ..RawGradients::default() };
    let planned = site.planned(call);
    let plan = site.engine.plan_replay(&planned, &site.inputs, &forward, &gradients).map_err(Error::wrap)?;
    let (_workspace, at) = site.room::<u8>(plan.workspace_bytes().max(1))?;
    let room = (at, plan.workspace_bytes());
    // SAFETY: as in `typed`; the log is that of these arguments.
    unsafe { site.engine.launch_replay(&plan, &site.inputs, &forward, &upstream, &gradients, room) }
        .map_err(Error::wrap)?;
    Ok(given)
}
