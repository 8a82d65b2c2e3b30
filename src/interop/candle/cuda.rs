//! The forward on a GPU: candle's storages by address, on candle's stream; what it gives is memory of candle's.

use super::{Call, NAMES};
use crate::cuda::{Call as Planned, Engine, RawInputs, RawOutputs};
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

/// Computes o and the log.
pub(super) fn compute(call: &Call, like: &CudaStorage) -> Result<(CudaStorage, Shape, Tensor)> {
    call.check_presence()?;
    if call.cache.is_some() {
        return Err(Error::msg("cache: not expected; on a GPU candle's sequences begin empty"));
    }
    let a = &call.arguments;
    match a.q.dtype() {
        DType::F32 => typed::<f32>(call, like, Dtype::F32),
        DType::BF16 => typed::<bf16>(call, like, Dtype::Bf16),
        DType::F16 => typed::<f16>(call, like, Dtype::F16),
        other => Err(Error::msg(format!("q: expected f32, bf16 or f16, got {}", other.as_str()))),
    }
}

fn typed<T: CudaDType + DeviceRepr>(
    call: &Call,
    like: &CudaStorage,
    dtype: Dtype,
) -> Result<(CudaStorage, Shape, Tensor)> {
    let a = &call.arguments;
    let (batch, time, heads, dk) = a.q.dims4()?;
    let (_, _, value_heads, dv) = a.v.dims4()?;
    let capacity = call.options.capacity;
    let extents = Extents { batch, time, heads, value_heads, dk, dv, capacity, sequences: batch };
    let device: &CudaDevice = like.device();
    let stream = device.cuda_stream();
    let engine = engine(&stream)?;
    let planned = Planned { options: &call.options, shape: extents, dtype, final_cache: false };
    let plan = engine.plan(&planned).map_err(Error::wrap)?;

    let (rows, values) = ([batch, time, heads, dk], [batch, time, value_heads, dv]);
    let per_token = [batch, time, value_heads];
    let columns = |x: &Option<Tensor>| x.as_ref().and_then(|x| x.dims().get(3).copied()).unwrap_or(capacity);
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
    let tokens = batch * time * value_heads;
    let routed = call.options.read == crate::Read::Routed;
    // SAFETY: written whole by the call before anything reads it.
    let (mut o, mut drift, mut events, mut weights, mut workspace) = unsafe {
        (
            device.alloc::<T>(tokens * dv)?,
            device.alloc::<f32>(tokens)?,
            device.alloc::<u8>(tokens)?,
            device.alloc::<f32>(if routed { tokens * capacity } else { 1 })?,
            device.alloc::<u8>(plan.workspace_bytes().max(1))?,
        )
    };
    let outputs = RawOutputs {
        o: o.device_ptr_mut(&stream).0,
        drift: drift.device_ptr_mut(&stream).0,
        events: events.device_ptr_mut(&stream).0,
        lambda: if routed { weights.device_ptr_mut(&stream).0 } else { 0 },
        cache: None,
    };
    let room = (workspace.device_ptr_mut(&stream).0, plan.workspace_bytes());
    // SAFETY: the plan is of this engine's GPU; arrays have the shapes that were checked; all were allocated on this
    // stream, in whose order they are freed. That g is at most 0 is the caller's to see to, as on any GPU.
    unsafe { engine.launch(&plan, &inputs, &outputs, room, None) }.map_err(Error::wrap)?;
    let events = Storage::Cuda(CudaStorage::wrap_cuda_slice(events, device.clone()));
    let events = Tensor::from_storage(events, &per_token[..], BackpropOp::none(), false);
    Ok((CudaStorage::wrap_cuda_slice(o, device.clone()), Shape::from(&values[..]), events))
}
