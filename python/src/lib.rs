//! The C ABI for Python: addresses and bytes in, exceptions out. What the numbers mean is in `dla/_call.py`, which alone
//! calls this.

mod xla;

use dla_capi::*;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::ffi::{CStr, c_void};
use std::ptr::null;

/// Address and bytes; `(0, 0)` is absent.
type Pair = (usize, usize);

/// recurrence, merge, read, slot order, capacity, l2 norm, soft through drift; tau, scale, soft temperature.
type OptionsTuple = ([i32; 7], [f32; 3]);

/// device, ordinal, stream, workspace.
type PlaceTuple = (i32, i32, usize, Pair);

/// dtype, then B, T, H, HV, dk, dv, N, columns of lambda and of the logits.
type ExtentsTuple = (i32, [usize; 9]);

fn buffer((address, bytes): Pair) -> Buffer {
    Buffer { data: std::ptr::with_exposed_provenance_mut::<c_void>(address), bytes }
}

fn cache([states, len, tokens, drift, open, keys]: [Pair; 6]) -> CacheArrays {
    CacheArrays {
        states: buffer(states),
        len: buffer(len),
        tokens: buffer(tokens),
        drift: buffer(drift),
        open: buffer(open),
        keys: buffer(keys),
    }
}

pub(crate) fn options((codes, numbers): OptionsTuple) -> CallOptions {
    let [recurrence, merge, read, slot_order, capacity, qk_l2norm, soft_through_drift] = codes;
    let [tau, scale, soft_temperature] = numbers;
    CallOptions {
        size: size_of::<CallOptions>(),
        recurrence,
        merge,
        read,
        slot_order,
        capacity,
        qk_l2norm,
        tau,
        scale,
        soft_temperature,
        soft_through_drift,
    }
}

/// A call without its cache, whose struct must stand still.
fn call(place: PlaceTuple, extents: ExtentsTuple, arguments: [Pair; 12]) -> Call {
    let (device, ordinal, stream, workspace) = place;
    let (dtype, [batch, time, heads, value_heads, dk, dv, sequences, lambda_columns, logit_columns]) =
        extents;
    let [q, k, v, g, beta, lambda, route_slope, route_bias, route_logits, tau, events, cu_seqlens] =
        arguments.map(buffer);
    Call {
        device,
        ordinal,
        stream: std::ptr::with_exposed_provenance_mut::<c_void>(stream),
        workspace: buffer(workspace),
        dtype,
        batch,
        time,
        heads,
        value_heads,
        dk,
        dv,
        sequences,
        lambda_columns,
        logit_columns,
        q,
        k,
        v,
        g,
        beta,
        lambda,
        route_slope,
        route_bias,
        route_logits,
        tau,
        events,
        cu_seqlens,
        ..Call::default()
    }
}

/// The message of this thread's call that failed.
pub(crate) fn message() -> String {
    // SAFETY: a string that stays until this thread's next failure.
    unsafe { CStr::from_ptr(dla_error_message()) }.to_string_lossy().into_owned()
}

fn told((status, message): (Status, String)) -> PyResult<()> {
    Err(match status {
        Status::Ok => return Ok(()),
        Status::Dtype => PyTypeError::new_err(message),
        Status::Shape
        | Status::Missing
        | Status::Unexpected
        | Status::Value
        | Status::Option
        | Status::Pointer
        | Status::Workspace => PyValueError::new_err(message),
        Status::NotBuilt => PyNotImplementedError::new_err(message),
        Status::Memory => PyMemoryError::new_err(message),
        Status::Device | Status::Cuda | Status::Internal => PyRuntimeError::new_err(message),
    })
}

/// Makes a call without the interpreter's lock. The message is taken on the thread that failed.
fn unlocked(py: Python<'_>, call: impl FnOnce() -> Status) -> PyResult<()> {
    /// Addresses, which say nothing of threads.
    struct Carried<T>(T);
    // SAFETY: what the addresses name is the caller's, who waits; no Python object is touched.
    unsafe impl<T> Send for Carried<T> {}
    impl<T: FnOnce() -> Status> Carried<T> {
        fn run(self) -> (Status, String) {
            let status = (self.0)();
            (status, if status == Status::Ok { String::new() } else { message() })
        }
    }
    let carried = Carried(call);
    told(py.detach(move || carried.run()))
}

fn at<T>(x: &Option<T>) -> *const T {
    x.as_ref().map_or(null(), |x| x)
}

/// Bytes of workspace of a forward with these results: o, drift, events, lambda.
#[pyfunction]
fn forward_workspace(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    results: [Pair; 4],
    last: Option<[Pair; 6]>,
) -> PyResult<usize> {
    let (options, call, last) = (options(settings), call(place, extents, arguments), last.map(cache));
    let [o, drift, events, lambda] = results.map(buffer);
    let results = Results { o, drift, events, lambda, cache: at(&last), ..Results::default() };
    let mut bytes = 0;
    // SAFETY: structs are as they say; buffers are not read.
    unlocked(py, || unsafe { dla_forward_workspace(&options, &call, &results, &mut bytes) })?;
    Ok(bytes)
}

/// All tokens: o, drift, events, lambda, and the final cache.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn forward(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    first: Option<[Pair; 6]>,
    results: [Pair; 4],
    last: Option<[Pair; 6]>,
) -> PyResult<()> {
    let (first, last) = (first.map(cache), last.map(cache));
    let options = options(settings);
    let call = Call { cache: at(&first), ..call(place, extents, arguments) };
    let [o, drift, events, lambda] = results.map(buffer);
    let results = Results { o, drift, events, lambda, cache: at(&last), ..Results::default() };
    // SAFETY: structs are as they say; that the buffers are, dla/_call.py answers for.
    unlocked(py, || unsafe { dla_forward(&options, &call, &results) })
}

fn gradients(wanted: [Pair; 10], cache: *const CacheArrays) -> Gradients {
    let [q, k, v, g, beta, lambda, route_slope, route_bias, route_logits, tau] = wanted.map(buffer);
    Gradients {
        q,
        k,
        v,
        g,
        beta,
        lambda,
        route_slope,
        route_bias,
        route_logits,
        tau,
        cache,
        ..Gradients::default()
    }
}

/// States, open and key sums of a cache's gradient.
fn cache_gradients([states, open, keys]: [Pair; 3]) -> CacheArrays {
    CacheArrays { states: buffer(states), open: buffer(open), keys: buffer(keys), ..CacheArrays::ABSENT }
}

/// What a backward takes beside the arguments.
fn upstream(d_o: Pair, kept: [Pair; 2], cache: *const CacheArrays) -> Upstream {
    let [drift, lambda] = kept.map(buffer);
    Upstream { o: buffer(d_o), cache, drift, lambda, ..Upstream::default() }
}

/// Bytes of workspace of a backward that gives these gradients; `kept`: the forward's drift and routed read weights.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn backward_workspace(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    first: Option<[Pair; 6]>,
    d_o: Pair,
    d_last: Option<[Pair; 3]>,
    kept: [Pair; 2],
    wanted: [Pair; 10],
    d_first: Option<[Pair; 3]>,
) -> PyResult<usize> {
    let first = first.map(cache);
    let (d_last, d_first) = (d_last.map(cache_gradients), d_first.map(cache_gradients));
    let options = options(settings);
    let call = Call { cache: at(&first), ..call(place, extents, arguments) };
    let (upstream, wanted) = (upstream(d_o, kept, at(&d_last)), gradients(wanted, at(&d_first)));
    let mut bytes = 0;
    // SAFETY: structs are as they say; buffers are not read.
    unlocked(py, || unsafe { dla_backward_workspace(&options, &call, &upstream, &wanted, &mut bytes) })?;
    Ok(bytes)
}

/// Gradients of the arguments.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn backward(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    first: Option<[Pair; 6]>,
    d_o: Pair,
    d_last: Option<[Pair; 3]>,
    kept: [Pair; 2],
    wanted: [Pair; 10],
    d_first: Option<[Pair; 3]>,
) -> PyResult<()> {
    let first = first.map(cache);
    let (d_last, d_first) = (d_last.map(cache_gradients), d_first.map(cache_gradients));
    let options = options(settings);
    let call = Call { cache: at(&first), ..call(place, extents, arguments) };
    let (upstream, wanted) = (upstream(d_o, kept, at(&d_last)), gradients(wanted, at(&d_first)));
    // SAFETY: structs are as they say; that the buffers are, dla/_call.py answers for.
    unlocked(py, || unsafe { dla_backward(&options, &call, &upstream, &wanted) })
}

/// Bytes of workspace of a step.
#[pyfunction]
fn step_workspace(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    results: [Pair; 4],
) -> PyResult<usize> {
    let (options, call) = (options(settings), call(place, extents, arguments));
    let [o, drift, events, lambda] = results.map(buffer);
    let results = Results { o, drift, events, lambda, ..Results::default() };
    let mut bytes = 0;
    // SAFETY: structs are as they say; buffers are not read.
    unlocked(py, || unsafe { dla_step_workspace(&options, &call, &results, &mut bytes) })?;
    Ok(bytes)
}

/// One token, in place: o, drift, events, lambda.
#[pyfunction]
fn step(
    py: Python<'_>,
    settings: OptionsTuple,
    place: PlaceTuple,
    extents: ExtentsTuple,
    arguments: [Pair; 12],
    states: [Pair; 6],
    results: [Pair; 4],
) -> PyResult<()> {
    let (options, call, states) = (options(settings), call(place, extents, arguments), cache(states));
    let [o, drift, events, lambda] = results.map(buffer);
    let results = Results { o, drift, events, lambda, ..Results::default() };
    // SAFETY: structs are as they say; that the buffers are, dla/_call.py answers for.
    unlocked(py, || unsafe { dla_step(&options, &call, &states, &results) })
}

/// What the kernels read 16 bytes at a time must begin at such an address.
const ALIGNMENT: usize = 16;

/// Address of what has no elements: it is there all the same.
const EMPTY: usize = 256;

/// An array's place among those of its kind, and its bytes.
type Place = (usize, usize);

/// A call whose arrays' places and bytes are known: from one to the next only addresses are new. Tensors are objects
/// with `is_contiguous` and `data_ptr`, in tuples.
#[pyclass(frozen, module = "dla._native")]
struct Prepared {
    settings: OptionsTuple,
    /// Device, ordinal.
    on: (i32, i32),
    extents: ExtentsTuple,
    /// Of the twelve arguments and the state's six.
    given: Vec<Place>,
    /// Address of tau of every head where it is not given; 0: that of the settings.
    tau: usize,
    /// Of d_o, the final state's three gradients, the forward's drift and routed read weights.
    upstream: Vec<Place>,
    /// Of what the call writes: a forward's ten results, a step's four, a backward's thirteen gradients.
    written: Vec<Place>,
}

/// Puts the addresses of `tensors` at their places: of as many tensors as there are places, or of all. Where one is not
/// contiguous, or `aligned` and is not, false.
fn put(to: &mut [Pair], tensors: &Bound<'_, PyTuple>, places: &[Place], aligned: bool) -> PyResult<bool> {
    let py = tensors.py();
    let all = tensors.len() == to.len();
    for (order, &(place, bytes)) in places.iter().enumerate() {
        let x = tensors.get_borrowed_item(if all { place } else { order })?;
        let address: usize = x.call_method0(intern!(py, "data_ptr"))?.extract()?;
        if aligned
            && (!address.is_multiple_of(ALIGNMENT)
                || !x.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()?)
        {
            return Ok(false);
        }
        to[place] = (if address == 0 { EMPTY } else { address }, bytes);
    }
    Ok(true)
}

/// Places alone, for a question of bytes.
fn marked<const N: usize>(places: &[Place]) -> [Pair; N] {
    let mut to = [(0, 0); N];
    for &(place, bytes) in places {
        to[place] = (EMPTY, bytes);
    }
    to
}

fn six(all: &[Pair; 18]) -> Option<[Pair; 6]> {
    let state: [Pair; 6] = std::array::from_fn(|i| all[12 + i]);
    state.iter().any(|&pair| pair != (0, 0)).then_some(state)
}

fn twelve(all: &[Pair; 18]) -> [Pair; 12] {
    std::array::from_fn(|i| all[i])
}

/// A forward's ten results: o, drift, events, lambda, and the final state where there is one.
fn of_forward(all: &[Pair; 10]) -> ([Pair; 4], Option<[Pair; 6]>) {
    let last: [Pair; 6] = std::array::from_fn(|i| all[4 + i]);
    (std::array::from_fn(|i| all[i]), last.iter().any(|&pair| pair != (0, 0)).then_some(last))
}

/// d_o, the final state's gradients where there is one, what was kept.
fn of_upstream(all: &[Pair; 6]) -> (Pair, Option<[Pair; 3]>, [Pair; 2]) {
    let last = [all[1], all[2], all[3]];
    (all[0], last.iter().any(|&pair| pair != (0, 0)).then_some(last), [all[4], all[5]])
}

/// Ten gradients, and those of the initial state where one is wanted.
fn of_backward(all: &[Pair; 13]) -> ([Pair; 10], Option<[Pair; 3]>) {
    let first = [all[10], all[11], all[12]];
    (std::array::from_fn(|i| all[i]), first.iter().any(|&pair| pair != (0, 0)).then_some(first))
}

impl Prepared {
    fn place(&self, stream: usize, workspace: Pair) -> PlaceTuple {
        (self.on.0, self.on.1, stream, workspace)
    }

    fn with_tau(&self, mut all: [Pair; 18]) -> [Pair; 18] {
        if self.tau != 0 && all[9] == (0, 0) {
            all[9] = (self.tau, self.extents.1[3] * 4);
        }
        all
    }

    fn asked(&self) -> [Pair; 18] {
        self.with_tau(marked(&self.given))
    }

    /// Where the tensors are; nothing where one must be copied first.
    fn all(&self, tensors: &Bound<'_, PyTuple>) -> PyResult<Option<[Pair; 18]>> {
        let mut all = [(0, 0); 18];
        Ok(put(&mut all, tensors, &self.given, true)?.then(|| self.with_tau(all)))
    }

    /// Results of a call that has no cache.
    fn only_results(&self, outputs: &Bound<'_, PyTuple>) -> PyResult<Results> {
        let [o, drift, events, lambda] = self.written(outputs)?.map(buffer);
        Ok(Results { o, drift, events, lambda, ..Results::default() })
    }

    fn written<const N: usize>(&self, tensors: &Bound<'_, PyTuple>) -> PyResult<[Pair; N]> {
        let mut all = [(0, 0); N];
        put(&mut all, tensors, &self.written, false)?;
        Ok(all)
    }
}

#[pymethods]
impl Prepared {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        settings: OptionsTuple,
        on: (i32, i32),
        extents: ExtentsTuple,
        given: Vec<Place>,
        tau: usize,
        upstream: Vec<Place>,
        written: Vec<Place>,
    ) -> PyResult<Self> {
        let within = |places: &[Place], most| places.iter().all(|&(place, _)| place < most);
        if !within(&given, 18) || !within(&upstream, 6) || !within(&written, 13) {
            return Err(PyValueError::new_err("places: expected those of arguments and results"));
        }
        Ok(Prepared { settings, on, extents, given, tau, upstream, written })
    }

    fn forward_workspace(&self, py: Python<'_>, stream: usize) -> PyResult<usize> {
        let (all, (results, last)) = (self.asked(), of_forward(&marked(&self.written)));
        let place = self.place(stream, (0, 0));
        forward_workspace(py, self.settings, place, self.extents, twelve(&all), results, last)
    }

    /// As the function; false, and nothing done, where a tensor must be copied first.
    fn forward(
        &self,
        py: Python<'_>,
        stream: usize,
        workspace: Pair,
        tensors: &Bound<'_, PyTuple>,
        outputs: &Bound<'_, PyTuple>,
    ) -> PyResult<bool> {
        let Some(all) = self.all(tensors)? else { return Ok(false) };
        let (results, last) = of_forward(&self.written(outputs)?);
        let place = self.place(stream, workspace);
        forward(py, self.settings, place, self.extents, twelve(&all), six(&all), results, last)?;
        Ok(true)
    }

    fn step_workspace(&self, py: Python<'_>, stream: usize) -> PyResult<usize> {
        let place = self.place(stream, (0, 0));
        let results = marked(&self.written);
        step_workspace(py, self.settings, place, self.extents, twelve(&self.asked()), results)
    }

    /// As `forward`.
    fn step(
        &self,
        py: Python<'_>,
        stream: usize,
        workspace: Pair,
        tensors: &Bound<'_, PyTuple>,
        outputs: &Bound<'_, PyTuple>,
    ) -> PyResult<bool> {
        let Some(all) = self.all(tensors)? else { return Ok(false) };
        let place = self.place(stream, workspace);
        let states = six(&all).unwrap_or_default();
        step(py, self.settings, place, self.extents, twelve(&all), states, self.written(outputs)?)?;
        Ok(true)
    }

    /// A step of entries, as `forward`; it takes no workspace.
    fn entries_step(
        &self,
        py: Python<'_>,
        stream: usize,
        tensors: &Bound<'_, PyTuple>,
        outputs: &Bound<'_, PyTuple>,
        held: &Entries,
        entries: Vec<usize>,
    ) -> PyResult<bool> {
        let Some(all) = self.all(tensors)? else { return Ok(false) };
        let (options, results) = (options(self.settings), self.only_results(outputs)?);
        let call = call(self.place(stream, (0, 0)), self.extents, twelve(&all));
        let (list, count) = (entries.as_ptr(), entries.len());
        // SAFETY: structs are as they say; that the buffers are, dla/torch/_op.py answers for.
        unlocked(py, || unsafe { dla_entries_step(held.0, &options, &call, list, count, &results) })?;
        Ok(true)
    }

    fn entries_prefill_workspace(&self, py: Python<'_>, stream: usize, held: &Entries) -> PyResult<usize> {
        let options = options(self.settings);
        let call = call(self.place(stream, (0, 0)), self.extents, twelve(&self.asked()));
        let [o, drift, events, lambda] = marked(&self.written).map(buffer);
        let results = Results { o, drift, events, lambda, ..Results::default() };
        let mut bytes = 0;
        // SAFETY: structs are as they say; buffers are not read.
        unlocked(py, || unsafe {
            dla_entries_prefill_workspace(held.0, &options, &call, &results, &mut bytes)
        })?;
        Ok(bytes)
    }

    /// A prefill of entries, each to itself, as `forward`.
    #[allow(clippy::too_many_arguments)]
    fn entries_prefill(
        &self,
        py: Python<'_>,
        stream: usize,
        workspace: Pair,
        tensors: &Bound<'_, PyTuple>,
        outputs: &Bound<'_, PyTuple>,
        held: &Entries,
        entries: Vec<usize>,
    ) -> PyResult<bool> {
        let Some(all) = self.all(tensors)? else { return Ok(false) };
        let (options, results) = (options(self.settings), self.only_results(outputs)?);
        let call = call(self.place(stream, workspace), self.extents, twelve(&all));
        let (list, count) = (entries.as_ptr(), entries.len());
        // SAFETY: as in `entries_step`.
        unlocked(py, || unsafe {
            dla_entries_prefill(held.0, &options, &call, list, list, count, &results)
        })?;
        Ok(true)
    }

    fn backward_workspace(&self, py: Python<'_>, stream: usize) -> PyResult<usize> {
        let all = self.asked();
        let (d_o, d_last, kept) = of_upstream(&marked(&self.upstream));
        let (wanted, d_first) = of_backward(&marked(&self.written));
        let (place, arguments) = (self.place(stream, (0, 0)), twelve(&all));
        let (settings, extents) = (self.settings, self.extents);
        backward_workspace(
            py,
            settings,
            place,
            extents,
            arguments,
            six(&all),
            d_o,
            d_last,
            kept,
            wanted,
            d_first,
        )
    }

    /// As `forward`; `upstream`: those of its six that there are, in order, or all.
    fn backward(
        &self,
        py: Python<'_>,
        stream: usize,
        workspace: Pair,
        tensors: &Bound<'_, PyTuple>,
        upstream: &Bound<'_, PyTuple>,
        outputs: &Bound<'_, PyTuple>,
    ) -> PyResult<bool> {
        let Some(all) = self.all(tensors)? else { return Ok(false) };
        let mut given = [(0, 0); 6];
        if !put(&mut given, upstream, &self.upstream, true)? {
            return Ok(false);
        }
        let (d_o, d_last, kept) = of_upstream(&given);
        let (wanted, d_first) = of_backward(&self.written(outputs)?);
        let (place, arguments) = (self.place(stream, workspace), twelve(&all));
        let (settings, extents) = (self.settings, self.extents);
        backward(py, settings, place, extents, arguments, six(&all), d_o, d_last, kept, wanted, d_first)?;
        Ok(true)
    }
}

/// Entries of a decoding cache, freed with the last reference.
#[pyclass(frozen, module = "dla._native")]
struct Entries(*mut EntriesHandle);

// SAFETY: calls of several threads take turns in the library.
unsafe impl Send for Entries {}
// SAFETY: as above.
unsafe impl Sync for Entries {}

impl Drop for Entries {
    fn drop(&mut self) {
        // SAFETY: of this library, destroyed once; who calls holds a reference.
        unsafe { dla_entries_destroy(self.0) };
    }
}

#[pymethods]
impl Entries {
    #[new]
    fn new(
        py: Python<'_>,
        settings: OptionsTuple,
        place: PlaceTuple,
        extents: ExtentsTuple,
        count: usize,
        states: i32,
    ) -> PyResult<Self> {
        let (options, call) = (options(settings), call(place, extents, [(0, 0); 12]));
        let mut at = std::ptr::null_mut();
        // SAFETY: structs are as they say; that the stream outlives this, the framework answers for.
        unlocked(py, || unsafe { dla_entries_create(&options, &call, count, states, &mut at) })?;
        Ok(Entries(at))
    }

    fn take(&self, py: Python<'_>) -> PyResult<usize> {
        let mut entry = 0;
        // SAFETY: a handle that lives, here and below.
        unlocked(py, || unsafe { dla_entries_take(self.0, &mut entry) })?;
        Ok(entry)
    }

    fn release(&self, py: Python<'_>, entry: usize) -> PyResult<()> {
        // SAFETY: as above.
        unlocked(py, || unsafe { dla_entries_release(self.0, entry) })
    }

    fn reset(&self, py: Python<'_>, entry: usize) -> PyResult<()> {
        // SAFETY: as above.
        unlocked(py, || unsafe { dla_entries_reset(self.0, entry) })
    }

    fn copy(&self, py: Python<'_>, from: usize, to: usize) -> PyResult<()> {
        // SAFETY: as above.
        unlocked(py, || unsafe { dla_entries_copy(self.0, from, to) })
    }

    fn set_rows(&self, py: Python<'_>, batch: usize, entries: Vec<usize>) -> PyResult<()> {
        // SAFETY: as above; the list is as long as said.
        unlocked(py, || unsafe { dla_entries_set_rows(self.0, batch, entries.as_ptr(), entries.len()) })
    }

    /// Into a state's six arrays.
    fn export(&self, py: Python<'_>, entries: Vec<usize>, to: [Pair; 6]) -> PyResult<()> {
        let to = cache(to);
        // SAFETY: as above; that the buffers are, dla/torch/_entries.py answers for.
        unlocked(py, || unsafe { dla_entries_export(self.0, entries.as_ptr(), entries.len(), &to) })
    }

    /// From a state's six arrays.
    fn import_(&self, py: Python<'_>, entries: Vec<usize>, from: [Pair; 6]) -> PyResult<()> {
        let from = cache(from);
        // SAFETY: as in `export`.
        unlocked(py, || unsafe { dla_entries_import(self.0, entries.as_ptr(), entries.len(), &from) })
    }
}

/// Raises where no GPU can be used, and says what is missing.
#[pyfunction]
fn check_cuda(py: Python<'_>) -> PyResult<()> {
    unlocked(py, || dla_cuda_available())
}

/// Addresses of the handlers that XLA calls, by name.
#[pyfunction]
fn xla_handlers() -> Vec<(&'static str, usize)> {
    xla::handlers()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Prepared>()?;
    module.add_class::<Entries>()?;
    module.add_function(wrap_pyfunction!(forward_workspace, module)?)?;
    module.add_function(wrap_pyfunction!(forward, module)?)?;
    module.add_function(wrap_pyfunction!(backward_workspace, module)?)?;
    module.add_function(wrap_pyfunction!(backward, module)?)?;
    module.add_function(wrap_pyfunction!(step_workspace, module)?)?;
    module.add_function(wrap_pyfunction!(step, module)?)?;
    module.add_function(wrap_pyfunction!(check_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(xla_handlers, module)?)
}
