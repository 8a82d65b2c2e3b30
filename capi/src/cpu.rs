//! A call on memory of the host.

use crate::call::{Arguments, Array, CacheOf, GradientsOf, Parsed, ResultsOf, UpstreamOf};
use crate::pool;
use crate::status::Outcome;
use dla::{
    Buffer, Cache, CacheDims, CacheGradients, CacheMut, Data, Dtype, Engine, Entries, Error, Inputs, Options,
    OutputGradients, Problem, Route, Step, Tau, Tensor, cpu,
};
use half::{bf16, f16};

/// The elements of an array.
///
/// # Safety
/// The array's bytes are there, and written by nobody for the time 'a; every pattern of bits is a T.
unsafe fn elements<'a, T>(array: Array) -> Outcome<&'a [T]> {
    let at = aligned::<T>(array)?;
    // SAFETY: aligned, not null, and as long as the caller says.
    Ok(unsafe { std::slice::from_raw_parts(at, array.bytes / size_of::<T>()) })
}

/// # Safety
/// As [`elements`], and read by nobody else.
unsafe fn elements_mut<'a, T>(array: Array) -> Outcome<&'a mut [T]> {
    let at = aligned::<T>(array)?;
    // SAFETY: aligned, not null, and as long as the caller says.
    Ok(unsafe { std::slice::from_raw_parts_mut(at, array.bytes / size_of::<T>()) })
}

fn aligned<T>(array: Array) -> Outcome<*mut T> {
    if array.bytes == 0 {
        return Ok(std::ptr::NonNull::dangling().as_ptr());
    }
    let at = array.address.cast::<T>();
    if !at.is_aligned() {
        let (alignment, given) = (align_of::<T>() as u64, at.addr() as u64);
        return Err(Error::Misaligned { name: array.name, alignment, given }.into());
    }
    Ok(at)
}

/// Copies a result out; nothing borrows it any more.
fn give<T: Copy>(array: Option<Array>, result: Option<&[T]>) {
    if let (Some(array), Some(result)) = (array, result) {
        debug_assert_eq!(size_of_val(result), array.bytes, "{}", array.name);
        let bytes = array.bytes.min(size_of_val(result));
        // SAFETY: the array has as many bytes, as the caller of the C function says; its alignment is not asked for.
        unsafe { std::ptr::copy_nonoverlapping(result.as_ptr().cast(), array.address, bytes) };
    }
}

fn give_buffer(array: Option<Array>, result: &Buffer) {
    match result.data() {
        Data::F32(x) => give(array, Some(x)),
        Data::Bf16(x) => give(array, Some(x)),
        Data::F16(x) => give(array, Some(x)),
    }
}

/// A cache of a caller's arrays.
///
/// # Safety
/// The arrays are there.
pub(crate) unsafe fn take_cache(dims: CacheDims, arrays: &CacheOf) -> Outcome<Cache> {
    // SAFETY: there, as the caller says.
    let floats = |array: Option<Array>| match array {
        Some(array) => unsafe { elements::<f32>(array) }.map(<[f32]>::to_vec),
        None => Ok(Vec::new()),
    };
    // SAFETY: as above.
    let counts = |array: Option<Array>| match array {
        Some(array) => unsafe { elements::<u32>(array) }.map(<[u32]>::to_vec),
        None => Ok(Vec::new()),
    };
    Ok(Cache {
        dims,
        states: floats(arrays.states)?,
        len: counts(arrays.len)?,
        tokens: counts(arrays.tokens)?,
        drift: counts(arrays.drift)?,
        open: floats(arrays.open)?,
        keys: arrays.keys.map(|keys| floats(Some(keys))).transpose()?,
    })
}

/// Copies a cache out.
pub(crate) fn give_cache(arrays: &CacheOf, cache: &Cache) {
    let Cache { states, len, tokens, drift, open, keys, .. } = cache;
    give(arrays.states, Some(states));
    give(arrays.len, Some(len));
    give(arrays.tokens, Some(tokens));
    give(arrays.drift, Some(drift));
    give(arrays.open, Some(open));
    give(arrays.keys, keys.as_deref());
}

/// Copies the results of a step out.
fn give_step(results: &ResultsOf, step: &Step) {
    give_buffer(Some(results.o), &step.o);
    give(results.drift, Some(&step.drift));
    give(results.events, Some(&step.events));
    give(results.lambda, step.lambda.as_deref());
}

/// What a problem borrows beside the caller's arrays.
struct Owned {
    options: Options,
    cache: Option<Cache>,
}

impl Owned {
    /// # Safety
    /// The arrays are there.
    unsafe fn new(parsed: &Parsed<'_>, arguments: &Arguments) -> Outcome<Owned> {
        let mut options = parsed.options.clone();
        if let Some(tau) = arguments.tau {
            // SAFETY: there, as the caller says.
            options.tau = Tau::PerHead(unsafe { elements::<f32>(tau) }?.to_vec());
        }
        let Some(arrays) = &arguments.cache else { return Ok(Owned { options, cache: None }) };
        // SAFETY: there, as the caller says.
        let cache = unsafe { take_cache(parsed.dims(), arrays) }?;
        Ok(Owned { options, cache: Some(cache) })
    }

    /// # Safety
    /// The arrays are there for as long as the problem.
    unsafe fn problem<'a>(&'a self, parsed: &Parsed<'_>, arguments: &Arguments) -> Outcome<Problem<'a>> {
        let s = parsed.shape;
        let (rows, values) = ([s.batch, s.time, s.heads, s.dk], [s.batch, s.time, s.value_heads, s.dv]);
        let per_token = [s.batch, s.time, s.value_heads];
        let per_slot = |columns| [s.batch, s.time, s.value_heads, columns];
        // SAFETY: there, as the caller says.
        let data = |array: Option<Array>| -> Outcome<Data<'a>> {
            let array = array.expect("a needed array is there");
            Ok(unsafe {
                match parsed.dtype {
                    Dtype::F32 => Data::F32(elements::<f32>(array)?),
                    Dtype::Bf16 => Data::Bf16(elements::<bf16>(array)?),
                    Dtype::F16 => Data::F16(elements::<f16>(array)?),
                }
            })
        };
        // SAFETY: there, as the caller says.
        let floats = |array: Option<Array>, shape: &[usize]| -> Outcome<Option<Tensor<'a>>> {
            array.map(|array| Ok(Tensor::new(unsafe { elements::<f32>(array) }?, shape))).transpose()
        };
        let mut inputs = Inputs::new(
            Tensor::new(data(arguments.q)?, &rows),
            Tensor::new(data(arguments.k)?, &rows),
            Tensor::new(data(arguments.v)?, &values),
        );
        inputs.g = floats(arguments.g, &per_token)?;
        inputs.beta = floats(arguments.beta, &per_token)?;
        inputs.lambda = floats(arguments.lambda, &per_slot(parsed.lambda_columns))?;
        let (slope, bias) =
            (floats(arguments.slope, &[s.value_heads])?, floats(arguments.bias, &[s.value_heads])?);
        let logits = floats(arguments.logits, &per_slot(parsed.logit_columns))?;
        if let (Some(slope), Some(bias)) = (slope, bias) {
            inputs.route = Some(Route { slope, bias, logits });
        }
        // SAFETY: there, as the caller says.
        unsafe {
            inputs.events = arguments.events.map(|array| elements::<u8>(array)).transpose()?;
            inputs.cu_seqlens = arguments.cu_seqlens.map(|array| elements::<i64>(array)).transpose()?;
        }
        inputs.cache = self.cache.as_ref();
        fits(parsed)?;
        Ok(Problem::new(&self.options, inputs)?)
    }
}

/// Asks for the memory that a call without tokens takes all the same: extents alone can name more than there is.
fn fits(parsed: &Parsed<'_>) -> Outcome<()> {
    let dims = parsed.dims();
    // States twice, as an engine holds them and as they come out, and a chunk's rows.
    let states = dims.rows().max(1).saturating_mul(dims.bank() + dims.state() + dims.key_bank());
    let elements = states.saturating_mul(2).saturating_add((dims.dk + dims.dv).saturating_mul(256));
    if Vec::<f32>::new().try_reserve_exact(elements).is_err() {
        return Err(Error::OutOfMemory { bytes: elements.saturating_mul(4), free: 0 }.into());
    }
    Ok(())
}

/// # Safety
/// Every array of the call is there.
pub(crate) unsafe fn forward(parsed: &Parsed<'_>, arguments: &Arguments, results: &ResultsOf) -> Outcome<()> {
    // SAFETY: as the caller says.
    let owned = unsafe { Owned::new(parsed, arguments) }?;
    // SAFETY: as the caller says.
    let problem = unsafe { owned.problem(parsed, arguments) }?;
    let forward = pool::run(|| cpu::Engine.forward(&problem))?;
    drop(problem);
    give_buffer(Some(results.o), &forward.o);
    give(results.drift, Some(&forward.drift));
    give(results.events, Some(&forward.events));
    give(results.lambda, forward.lambda.as_deref());
    if let Some(arrays) = &results.cache {
        give_cache(arrays, &forward.cache);
    }
    Ok(())
}

/// # Safety
/// Every array of the call is there.
pub(crate) unsafe fn backward(
    parsed: &Parsed<'_>,
    mut arguments: Arguments,
    upstream: &UpstreamOf,
    wanted: &GradientsOf,
) -> Outcome<()> {
    // The log is an argument of its own, and one that is wrong is the backward's to find.
    let Some(events) = arguments.events.take() else {
        return Err(Error::Missing { name: "events", why: "the backward replays the forward's log" }.into());
    };
    // SAFETY: as the caller says.
    let owned = unsafe { Owned::new(parsed, &arguments) }?;
    // SAFETY: as the caller says.
    let problem = unsafe { owned.problem(parsed, &arguments) }?;
    // SAFETY: as the caller says.
    let events = unsafe { elements::<u8>(events) }?;
    let cache = match &upstream.cache {
        None => None,
        Some(arrays) => {
            let mut given = CacheGradients::zeros(parsed.dims(), parsed.options.read);
            let take = |array: Option<Array>, to: Option<&mut Vec<f32>>| -> Outcome<()> {
                if let (Some(array), Some(to)) = (array, to) {
                    // SAFETY: as the caller says.
                    to.copy_from_slice(unsafe { elements::<f32>(array) }?);
                }
                Ok(())
            };
            take(arrays.states, Some(&mut given.states))?;
            take(arrays.open, Some(&mut given.open))?;
            take(arrays.keys, given.keys.as_mut())?;
            Some(given)
        }
    };
    let s = parsed.shape;
    let values = [s.batch, s.time, s.value_heads, s.dv];
    // SAFETY: as the caller says.
    let d_o = unsafe {
        match parsed.dtype {
            Dtype::F32 => Tensor::new(elements::<f32>(upstream.o)?, &values),
            Dtype::Bf16 => Tensor::new(elements::<bf16>(upstream.o)?, &values),
            Dtype::F16 => Tensor::new(elements::<f16>(upstream.o)?, &values),
        }
    };
    let upstream = OutputGradients { o: d_o, cache: cache.as_ref() };
    let gradients = pool::run(|| cpu::Engine.backward(&problem, events, &upstream))?;
    drop(problem);
    give_buffer(wanted.q, &gradients.q);
    give_buffer(wanted.k, &gradients.k);
    give_buffer(wanted.v, &gradients.v);
    give(wanted.g, gradients.g.as_deref());
    give(wanted.beta, gradients.beta.as_deref());
    give(wanted.lambda, gradients.lambda.as_deref());
    if let Some(route) = &gradients.route {
        give(wanted.slope, Some(&route.slope));
        give(wanted.bias, Some(&route.bias));
        give(wanted.logits, route.logits.as_deref());
    }
    if let Some(soft) = &gradients.soft {
        give(wanted.tau, Some(&soft.tau));
        give(wanted.drift, Some(&soft.drift));
    }
    if let (Some(arrays), Some(cache)) = (&wanted.cache, &gradients.cache) {
        give(arrays.states, Some(&cache.states));
        give(arrays.open, Some(&cache.open));
        give(arrays.keys, cache.keys.as_deref());
    }
    Ok(())
}

/// # Safety
/// Every array of the call is there, and those of the cache are nobody else's.
pub(crate) unsafe fn step(
    parsed: &Parsed<'_>,
    arguments: &Arguments,
    cache: &CacheOf,
    results: &ResultsOf,
) -> Outcome<()> {
    // SAFETY: as the caller says.
    let owned = unsafe { Owned::new(parsed, arguments) }?;
    // SAFETY: as the caller says.
    let problem = unsafe { owned.problem(parsed, arguments) }?;
    let needed = |array: Option<Array>| array.expect("a needed array is there");
    // SAFETY: as the caller says.
    let cache = unsafe {
        CacheMut {
            dims: parsed.dims(),
            states: elements_mut(needed(cache.states))?,
            len: elements_mut(needed(cache.len))?,
            tokens: elements_mut(needed(cache.tokens))?,
            drift: elements_mut(needed(cache.drift))?,
            open: elements_mut(needed(cache.open))?,
            keys: cache.keys.map(|keys| elements_mut(keys)).transpose()?,
        }
    };
    let step = pool::run(|| cpu::Engine.step_in_place(&problem, cache))?;
    drop(problem);
    give_step(results, &step);
    Ok(())
}

/// A step of entries, or with `from` a prefill, to `entries`.
///
/// # Safety
/// Every array of the call is there.
pub(crate) unsafe fn on_entries(
    held: &mut cpu::Entries,
    parsed: &Parsed<'_>,
    arguments: &Arguments,
    (from, entries): (Option<&[usize]>, &[usize]),
    results: &ResultsOf,
) -> Outcome<()> {
    // SAFETY: as the caller says.
    let owned = unsafe { Owned::new(parsed, arguments) }?;
    // SAFETY: as the caller says.
    let problem = unsafe { owned.problem(parsed, arguments) }?;
    let step = pool::run(|| match from {
        None => held.step(&problem, entries),
        Some(from) => held.prefill(&problem, from, entries),
    })?;
    drop(problem);
    give_step(results, &step);
    Ok(())
}
