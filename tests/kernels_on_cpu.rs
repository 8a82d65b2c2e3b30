//! The CUDA kernels' own sources on the CPU: compiled as C++ with a small emulator (tests/emulation), every
//! thread a fiber, and judged against the f64 reference with the kernels' own event log. Needs g++ with
//! C++20; without it every test here says that it is skipped. `DLA_EMULATION=require` fails instead.

use dla::check::{Case, Recipe, relative_error};
use dla::cuda::abi::{
    DevicePointer, Extents, Geometry, PrepareParams, RouteParams, RouteSumsParams, SEGMENT_ROWS,
    SEGMENT_STATE_BYTES, ScanParams, SegmentParams,
};
use dla::events::{EXTEND, Ledger, OPEN, plan};
use dla::reference::{self, Arguments};
use dla::{Cache, Dtype, Merge, Options, Problem, Read, Recurrence, SlotOrder};
use half::{bf16, f16};
use library::{Emulate, emulator};
use std::ffi::{c_int, c_void};

#[path = "emulation/backward.rs"]
mod backward;
#[path = "emulation/hopper.rs"]
mod hopper;
#[path = "emulation/hopper_backward.rs"]
mod hopper_backward;
#[path = "emulation/library.rs"]
mod library;
#[path = "emulation/step.rs"]
mod step;
#[path = "emulation/whole_backward.rs"]
mod whole_backward;

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        from: i64,
    ) -> *mut c_void;
    fn mprotect(at: *mut c_void, bytes: usize, protection: c_int) -> c_int;
    fn munmap(at: *mut c_void, bytes: usize) -> c_int;
}

fn launch<P>(emulate: Emulate, name: &str, grid: usize, shared_bytes: usize, params: &P) {
    let wrong = try_launch(emulate, name, grid, shared_bytes, params);
    assert!(wrong.is_none(), "{}", wrong.unwrap());
}

/// What went wrong, if anything did.
fn try_launch<P>(
    emulate: Emulate,
    name: &str,
    grid: usize,
    shared_bytes: usize,
    params: &P,
) -> Option<String> {
    // SAFETY: `params` is the twin of the struct that this kernel takes, and its pointers lie in live buffers
    // of the sizes that abi.cuh asks for.
    unsafe { emulate.run(name, grid, 0, shared_bytes, std::ptr::from_ref(params).cast()) }
}

// SAFETY: memory of this process, owned.
unsafe impl Send for Array {}

/// A poisoned array on "the device", 16-byte aligned, that ends where memory does: what reads or writes 16 bytes past its
/// end faults.
struct Array {
    mapped: *mut u8,
    mapped_bytes: usize,
    bytes: usize,
}

const POISON: u8 = 0xff;
const PAGE: usize = 4096;

impl Array {
    fn poisoned(bytes: usize) -> Self {
        let mapped_bytes = bytes.next_multiple_of(PAGE) + PAGE;
        // SAFETY: new memory of this process: private, anonymous; the last page is out of bounds.
        let mapped = unsafe {
            let mapped = mmap(std::ptr::null_mut(), mapped_bytes, 3, 0x22, -1, 0).cast::<u8>();
            assert!(mapped as isize != -1 && mprotect(mapped.add(mapped_bytes - PAGE).cast(), PAGE, 0) == 0);
            std::ptr::write_bytes(mapped, POISON, mapped_bytes - PAGE);
            mapped
        };
        Array { mapped, mapped_bytes, bytes }
    }

    /// The array and what is left to a multiple of 16 bytes.
    fn whole(&self) -> &[u8] {
        let bytes = self.bytes.next_multiple_of(16);
        // SAFETY: mapped above, the last bytes before the page out of bounds.
        unsafe { std::slice::from_raw_parts(self.mapped.add(self.mapped_bytes - PAGE - bytes), bytes) }
    }

    fn of<T: bytemuck::Pod>(x: &[T]) -> Self {
        let array = Array::poisoned(size_of_val(x));
        // SAFETY: as `whole`; no one else has the array yet.
        let to = unsafe { std::slice::from_raw_parts_mut(array.whole().as_ptr().cast_mut(), array.bytes) };
        to.copy_from_slice(bytemuck::cast_slice(x));
        array
    }

    fn of_buffer(x: &dla::Buffer) -> Self {
        match x {
            dla::Buffer::F32(x) => Array::of(x),
            dla::Buffer::Bf16(x) => Array::of(&x.iter().map(|x| x.to_bits()).collect::<Vec<_>>()),
            dla::Buffer::F16(x) => Array::of(&x.iter().map(|x| x.to_bits()).collect::<Vec<_>>()),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `whole`; borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.whole().as_ptr().cast_mut(), self.bytes) }
    }

    fn pointer(&self) -> DevicePointer {
        self.whole().as_ptr() as DevicePointer
    }

    fn get<T: bytemuck::Pod>(&self) -> Vec<T> {
        let bytes = self.whole();
        assert!(bytes[self.bytes..].iter().all(|&byte| byte == POISON), "written past the end of an array");
        bytes[..self.bytes].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: mapped by `poisoned`, once.
        unsafe { munmap(self.mapped.cast(), self.mapped_bytes) };
    }
}

fn pointer(array: &Option<Array>) -> DevicePointer {
    array.as_ref().map_or(0, Array::pointer)
}

/// What the kernels made of a case.
struct Outputs {
    o: Vec<f64>,
    lambda: Option<Vec<f32>>,
    states: Vec<f32>,
    keys: Option<Vec<f32>>,
    segmented: Segmented,
}

fn forward(emulate: Emulate, case: &Case, problem: &Problem) -> Outputs {
    run(emulate, case, problem, &[0, i64::MAX / 64 * 64], false).1.unwrap()
}

/// What segment makes of a case, in windows between `cuts`.
#[derive(Clone, PartialEq, Debug)]
struct Segmented {
    drift: Vec<f32>,
    events: Vec<u8>,
    len: Vec<u32>,
    tokens: Vec<u32>,
    summed_drift: Vec<u32>,
    open: Vec<f32>,
    chunk_len: Vec<u32>,
    chunk_starts: Vec<i32>,
    chunk_place: Vec<u8>,
    chunk_log: Vec<f32>,
}

fn geometry_of(problem: &Problem) -> Geometry {
    let shape = problem.shape();
    Geometry {
        parts: if problem.dtype() == Dtype::Bf16 { 1 } else { 2 },
        sequences: shape.sequences,
        tokens: shape.tokens(),
        heads: shape.heads,
        value_heads: shape.value_heads,
        dk: shape.dk,
        dv: shape.dv,
        capacity: shape.capacity,
        delta: problem.options().recurrence == Recurrence::GatedDelta,
    }
}

fn extents_of(problem: &Problem, cu_seqlens: DevicePointer) -> Extents {
    let shape = problem.shape();
    Extents {
        cu_seqlens,
        sequences: shape.sequences as i64,
        time: shape.time as i64,
        heads: shape.heads as i32,
        value_heads: shape.value_heads as i32,
        dk: shape.dk as i32,
        dv: shape.dv as i32,
        capacity: shape.capacity as i32,
        newest_first: (problem.options().slot_order == SlotOrder::NewestFirst).into(),
    }
}

fn run(
    emulate: Emulate,
    case: &Case,
    problem: &Problem,
    cuts: &[i64],
    only_segment: bool,
) -> (Segmented, Option<Outputs>) {
    let shape = *problem.shape();
    let options = problem.options();
    let dims = shape.cache_dims();
    let dtype = problem.dtype();
    let per_token = shape.tokens() * shape.value_heads;
    let delta = options.recurrence == Recurrence::GatedDelta;
    let geometry = geometry_of(problem);
    let floats = |x: &Option<Vec<f32>>| x.as_ref().map(|x| Array::of(x));
    let cu_seqlens = case.cu_seqlens.as_ref().map(|x| Array::of(x));
    let extents = extents_of(problem, pointer(&cu_seqlens));
    let (q, k, v) = (Array::of_buffer(&case.q), Array::of_buffer(&case.k), Array::of_buffer(&case.v));
    let (g, beta) = (floats(&case.g), floats(&case.beta));
    let tau: Vec<f32> = (0..shape.value_heads).map(|head| options.tau.of(head)).collect();
    let tau = Array::of(&tau);
    let log = problem.inputs().events.map(Array::of);
    let cache = case.cache.as_ref();
    let initial_len = cache.map(|cache| Array::of(&cache.len));
    let initial_tokens = cache.map(|cache| Array::of(&cache.tokens));
    let initial_drift = cache.map(|cache| Array::of(&cache.drift));
    let initial_open = cache.map(|cache| Array::of(&cache.open));
    let initial_states = cache.map(|cache| Array::of(&cache.states));
    let initial_keys = cache.and_then(|cache| cache.keys.as_ref()).map(|keys| Array::of(keys));
    let slots = dims.rows() * dims.capacity;
    let drift = Array::poisoned(per_token * 4);
    let events = Array::poisoned(per_token);
    let (len, tokens) = (Array::poisoned(dims.rows() * 4), Array::poisoned(slots * 4));
    let summed_drift = Array::poisoned(slots * 4);
    let open = Array::poisoned(dims.rows() * dims.state() * 4);
    let kernel = |stem: &str| format!("{stem}_{dtype}");

    let places = geometry.chunks() * shape.value_heads;
    let chunk_len = Array::poisoned(places * 4);
    let chunk_starts = Array::poisoned(geometry.chunk_slots_len() * 4);
    let chunk_place = Array::poisoned(geometry.chunk_slots_len());
    let chunk_log = Array::poisoned(geometry.chunk_slots_len() * 4);
    let starts = geometry.starts_len();
    let walks = Array::poisoned(starts * 32 * 4);
    let (reach, next) = (Array::poisoned(starts * 4), Array::poisoned(starts));
    let (energy, factor) = (Array::poisoned(starts * 4), Array::poisoned(starts * 4));
    let totals = Array::poisoned(starts / 32 * 8);
    let state = Array::poisoned(dims.rows() * SEGMENT_STATE_BYTES);

    let segment = SegmentParams {
        extents,
        k: k.pointer(),
        v: v.pointer(),
        g: pointer(&g),
        tau: tau.pointer(),
        log: pointer(&log),
        initial_len: pointer(&initial_len),
        initial_tokens: pointer(&initial_tokens),
        initial_drift: pointer(&initial_drift),
        initial_open: pointer(&initial_open),
        drift: drift.pointer(),
        events: events.pointer(),
        len: len.pointer(),
        tokens: tokens.pointer(),
        summed_drift: summed_drift.pointer(),
        open: open.pointer(),
        chunk_len: chunk_len.pointer(),
        chunk_starts: chunk_starts.pointer(),
        chunk_place: chunk_place.pointer(),
        chunk_log: chunk_log.pointer(),
        walks: walks.pointer(),
        reach: reach.pointer(),
        energy: energy.pointer(),
        factor: factor.pointer(),
        totals: totals.pointer(),
        next: next.pointer(),
        state: state.pointer(),
        from: 0,
        to: 0,
        mass: (options.merge == Merge::Mass).into(),
        qk_l2norm: options.qk_l2norm.into(),
    };
    for window in cuts.windows(2) {
        let segment = SegmentParams { from: window[0], to: window[1], ..segment };
        let shared_bytes = geometry.segment_gram_shared_bytes();
        launch(emulate, &kernel("segment_gram"), geometry.segment_gram_blocks(), shared_bytes, &segment);
        let (stem, rows) =
            if shape.capacity % 2 == 0 { ("segment", 1) } else { ("segment_rows", SEGMENT_ROWS) };
        let shared_bytes = rows * geometry.segment_shared_bytes();
        launch(emulate, &kernel(stem), dims.rows().div_ceil(rows), shared_bytes, &segment);
    }
    for array in [&walks, &reach, &next, &energy, &factor, &totals, &state] {
        array.get::<u8>();
    }
    let segmented = Segmented {
        drift: drift.get(),
        events: events.get(),
        len: len.get(),
        tokens: tokens.get(),
        summed_drift: summed_drift.get(),
        open: open.get(),
        chunk_len: chunk_len.get(),
        chunk_starts: chunk_starts.get(),
        chunk_place: chunk_place.get(),
        chunk_log: chunk_log.get(),
    };
    if only_segment {
        return (segmented, None);
    }

    let p = Array::poisoned(geometry.p_len() * 2);
    let prepared = || Array::poisoned(if delta { geometry.prepared_len() * 2 } else { 0 });
    let (qt, w, kh) = (prepared(), prepared(), prepared());
    let prepare = PrepareParams {
        extents,
        q: q.pointer(),
        k: k.pointer(),
        g: pointer(&g),
        beta: pointer(&beta),
        p: p.pointer(),
        qt: qt.pointer(),
        w: w.pointer(),
        kh: kh.pointer(),
        from: 0,
        to: 0,
        scale: problem.scale(),
        qk_l2norm: options.qk_l2norm.into(),
    };
    let recurrence = if delta { "delta" } else { "gated" };
    let name = kernel(&format!("prepare_{recurrence}"));
    launch(emulate, &name, places, geometry.prepare_shared_bytes(), &prepare);

    let routed = options.read == Read::Routed;
    let when_routed = |bytes: usize| Array::poisoned(if routed { bytes } else { 0 });
    let keys = when_routed(dims.rows() * dims.key_bank() * 4);
    let lambda = match &case.lambda {
        Some(lambda) => Array::of(lambda),
        None => Array::poisoned(per_token * shape.capacity * 4),
    };
    if let Some(route) = &case.route {
        let sums = Array::poisoned(geometry.route_sums_len() * 4);
        let bases = Array::poisoned(geometry.route_bases_len() * 8);
        let key_factors = options.qk_l2norm.then(|| Array::poisoned(shape.tokens() * shape.heads * 4));
        let key_sums = RouteSumsParams {
            extents,
            k: k.pointer(),
            sums: sums.pointer(),
            bases: bases.pointer(),
            key_factors: pointer(&key_factors),
            qk_l2norm: options.qk_l2norm.into(),
            reserved: 0,
        };
        let (blocks, shared_bytes) = (geometry.route_sums_blocks(), geometry.route_sums_shared_bytes());
        launch(emulate, &kernel("route_sums"), blocks, shared_bytes, &key_sums);
        let (blocks, shared_bytes) = (geometry.route_bases_blocks(), geometry.route_bases_shared_bytes());
        launch(emulate, &kernel("route_bases"), blocks, shared_bytes, &key_sums);
        let (slope, bias, logits) = (Array::of(&route.slope), Array::of(&route.bias), floats(&route.logits));
        let route = RouteParams {
            extents,
            q: q.pointer(),
            k: k.pointer(),
            events: events.pointer(),
            chunk_len: chunk_len.pointer(),
            chunk_starts: chunk_starts.pointer(),
            sums: sums.pointer(),
            bases: bases.pointer(),
            key_factors: pointer(&key_factors),
            initial_len: pointer(&initial_len),
            initial_tokens: pointer(&initial_tokens),
            initial_keys: pointer(&initial_keys),
            slope: slope.pointer(),
            bias: bias.pointer(),
            logits: pointer(&logits),
            lambda: lambda.pointer(),
            keys: keys.pointer(),
            from: 0,
            to: 0,
            logit_columns: problem.logit_columns() as i32,
            qk_l2norm: options.qk_l2norm.into(),
        };
        for window in cuts.windows(2) {
            let route = RouteParams { from: window[0], to: window[1], ..route };
            let (from, to) = (window[0] as usize, window[1] as usize);
            let blocks = geometry.route_blocks(shape.time, cu_seqlens.is_some(), from, to);
            launch(emulate, &kernel("route"), blocks, geometry.route_shared_bytes(), &route);
        }
        sums.get::<f32>();
        bases.get::<f64>();
        key_factors.iter().for_each(|factors| drop(factors.get::<f32>()));
    }

    let o = Array::poisoned(per_token * shape.dv * dtype.bytes());
    let states = Array::poisoned(dims.rows() * dims.bank() * 4);
    let bank = Array::poisoned(geometry.bank_len() * 4);
    let scan = ScanParams {
        extents,
        q: q.pointer(),
        k: k.pointer(),
        v: v.pointer(),
        g: pointer(&g),
        events: events.pointer(),
        lambda: lambda.pointer(),
        p: p.pointer(),
        qt: qt.pointer(),
        w: w.pointer(),
        kh: kh.pointer(),
        initial_len: pointer(&initial_len),
        initial_states: pointer(&initial_states),
        bank: bank.pointer(),
        o: o.pointer(),
        states: states.pointer(),
        lambda_columns: problem.lambda_columns() as i32,
        scale: problem.scale(),
        qk_l2norm: options.qk_l2norm.into(),
        reserved: 0,
    };
    let name = kernel(&format!("scan_{recurrence}"));
    let blocks = dims.rows() * geometry.slices();
    launch(emulate, &name, blocks, geometry.scan_shared_bytes(), &scan);
    // Workspaces: nothing past their ends.
    for array in [&p, &qt, &w, &kh] {
        array.get::<u16>();
    }
    bank.get::<f32>();

    let o = match dtype {
        Dtype::F32 => o.get::<f32>().iter().map(|&x| x.into()).collect(),
        Dtype::Bf16 => o.get::<u16>().iter().map(|&x| bf16::from_bits(x).to_f64()).collect(),
        Dtype::F16 => o.get::<u16>().iter().map(|&x| f16::from_bits(x).to_f64()).collect(),
    };
    let outputs = Outputs {
        o,
        lambda: routed.then(|| lambda.get()),
        states: states.get(),
        keys: routed.then(|| keys.get()),
        segmented: segmented.clone(),
    };
    (segmented, Some(outputs))
}

/// Largest relative error of o, lambda and the cache by dtype of the inputs.
fn bound(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 4e-3,
        Dtype::F16 => 1e-3,
        Dtype::F32 => 1e-4,
    }
}

/// The slots that a cache row holds, by way of the public interface: a token that opens each with its whole
/// drift, the others with none.
fn ledger_of(cache: Option<&Cache>, row: usize) -> Ledger {
    let mut ledger = Ledger::default();
    let Some(cache) = cache else { return ledger };
    for i in 0..cache.len[row] as usize {
        let slot = row * cache.dims.capacity + i;
        ledger.apply(OPEN, cache.drift[slot] as f32 / 4096.0);
        (1..cache.tokens[slot]).for_each(|_| ledger.apply(EXTEND, 0.0));
    }
    ledger
}

/// Largest errors over the cases of a test.
#[derive(Default)]
struct Worst(std::collections::BTreeMap<String, f64>);

impl Worst {
    fn take(&mut self, dtype: Dtype, tensor: &str, error: f64) {
        let worst = self.0.entry(format!("{dtype} {tensor}")).or_default();
        *worst = worst.max(error);
    }
}

/// The log is what the kernels' own drift asks for, byte for byte, or the caller's; so are the cache's sums and
/// the slots at every chunk's entry.
fn check_decisions(case: &Case, problem: &Problem, out: &Segmented) {
    let shape = *problem.shape();
    let options = problem.options();
    let name = case.describe();
    let capacity = shape.capacity;
    let chunk = if problem.dtype() == Dtype::Bf16 { 64 } else { 32 };
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..shape.value_heads {
            let row = n * shape.value_heads + head;
            let at = |t: usize| (sequence.start + t) * shape.value_heads + head;
            let drift: Vec<f32> = (0..sequence.len).map(|t| out.drift[at(t)]).collect();
            let events: Vec<u8> = (0..sequence.len).map(|t| out.events[at(t)]).collect();
            let mut ledger = ledger_of(case.cache.as_ref(), row);
            let entry = ledger.len();
            match problem.inputs().events {
                Some(log) => {
                    assert!(events.iter().enumerate().all(|(t, &event)| event == log[at(t)]), "{name}: log");
                    events.iter().zip(&drift).for_each(|(&event, &drift)| ledger.apply(event, drift));
                }
                None => {
                    let tau = options.tau.of(head);
                    let planned = plan(&drift, tau, capacity, options.merge, &mut ledger);
                    assert_eq!(events, planned, "{name}: events of row {row}");
                }
            }
            let slots = row * capacity..(row + 1) * capacity;
            let padded = |x: &[u32]| {
                let mut x = x.to_vec();
                x.resize(capacity, 0);
                x
            };
            assert_eq!(out.len[row] as usize, ledger.len(), "{name}: cache_len of row {row}");
            assert_eq!(out.tokens[slots.clone()], padded(ledger.tokens()), "{name}: cache_tokens of {row}");
            assert_eq!(out.summed_drift[slots], padded(ledger.drift()), "{name}: cache_drift of {row}");

            // The slots at every chunk's entry: where each starts, lies, and its log decay since it changed.
            let mut held: Vec<(i32, u8)> = (0..entry).map(|j| (j as i32 - entry as i32, j as u8)).collect();
            let mut logs = vec![0.0f64; capacity];
            for first in (0..sequence.len).step_by(chunk) {
                let place = sequence.start / chunk + n + first / chunk;
                let at_place = place * shape.value_heads + head;
                let slots = at_place * capacity..(at_place + 1) * capacity;
                let describe = || format!("{name}: row {row}, chunk at {first}");
                assert_eq!(out.chunk_len[at_place] as usize, held.len(), "{}", describe());
                for (i, &(start, place)) in held.iter().enumerate() {
                    assert_eq!(out.chunk_starts[slots.start + i], start, "{}: slot {i}", describe());
                    assert_eq!(out.chunk_place[slots.start + i], place, "{}: slot {i}", describe());
                    let (log, expected) = (out.chunk_log[slots.start + place as usize], logs[place as usize]);
                    assert!(
                        (f64::from(log) - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                        "{}: log of place {place}: {log} for {expected}",
                        describe()
                    );
                }
                let mut touched = vec![false; capacity];
                let mut total = 0.0;
                for t in first..sequence.len.min(first + chunk) {
                    match events[t] {
                        EXTEND => touched[held.last().unwrap().1 as usize] = true,
                        event => {
                            let mut place = held.len() as u8;
                            if event != OPEN {
                                let i = usize::from(event - dla::events::MERGE);
                                touched[held[i].1 as usize] = true;
                                place = held.remove(i + 1).1;
                            }
                            held.push((t as i32, place));
                            touched[place as usize] = true;
                        }
                    }
                    total += case.g.as_ref().map_or(0.0, |g| f64::from(g[at(t)].max(-800.0)));
                }
                for (log, touched) in logs.iter_mut().zip(touched) {
                    *log = if touched { 0.0 } else { *log + total };
                }
            }
        }
    }
}

fn check(emulate: Emulate, case: &Case, worst: &mut Worst) {
    let problem = case.problem().unwrap();
    check_problem(emulate, case, &problem, worst);
}

fn check_problem(emulate: Emulate, case: &Case, problem: &Problem, worst: &mut Worst) {
    let out = forward(emulate, case, problem);
    let segmented = &out.segmented;
    let dtype = problem.dtype();
    let name = case.describe();
    let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    check_decisions(case, problem, segmented);
    let expected = reference::forward(problem, &Arguments::of(problem), Some(&segmented.events), None);
    let off = segmented.drift.iter().zip(&expected.drift).map(|(&x, r)| (f64::from(x) - r).abs());
    let off = off.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst });
    worst.take(dtype, "drift", off);
    assert!(off <= 2e-3, "{name}: drift off by {off:.2e}");
    let mut judge = |tensor: &str, x: &[f64], reference: &[f64]| {
        let (error, at) = relative_error(x, reference);
        worst.take(dtype, tensor, error);
        assert!(error <= bound(dtype), "{name}: {tensor} off by {error:.2e}, most at element {at}");
    };
    judge("cache_open", &f64s(&segmented.open), &expected.cache.open);
    judge("o", &out.o, &expected.o);
    judge("cache_states", &f64s(&out.states), &expected.cache.states);
    if let (Some(lambda), Some(expected)) = (&out.lambda, &expected.lambda) {
        judge("lambda", &f64s(lambda), expected);
    }
    if let Some(keys) = &out.keys {
        judge("cache_keys", &f64s(keys), &expected.cache.keys);
    }
}

/// Every dtype and recurrence with both reads, over capacities, head sizes, boundary rates, ragged and packed
/// lengths, resumed caches and grouped heads: each value of each at least twice.
#[test]
fn every_kernel() {
    let Some(emulate) = emulator() else { return };
    let seed = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    let sizes = [(8, 24), (24, 8), (64, 72), (72, 64), (128, 16), (16, 128), (40, 40)];
    let mut at = 0;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
            for read in [Read::Given, Read::Routed] {
                for packed in [false, true] {
                    let (dk, dv) = sizes[at % sizes.len()];
                    let options = Options {
                        recurrence,
                        capacity: [30, 3, 2, 64, 1][at % 5],
                        merge: if at % 3 == 0 { Merge::Mass } else { Merge::Density },
                        read,
                        slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
                        qk_l2norm: at % 5 == 2,
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
                        logits: at % 2 == 0,
                        extra_columns: at % 3,
                        packed: packed.then(|| vec![0, 1, 66, 0, 33, 34, 0]),
                        resumed: at % 3 != 1,
                        ..Recipe::default()
                    };
                    check(emulate, &recipe.draw(seed + at as u64), &mut worst);
                    at += 1;
                }
            }
        }
    }
    println!("{:?}", worst.0);
}

/// segment alone: capacities on both sides of every bound, long segments, caches whose sums saturate, zero tokens,
/// and windows, which must give the bits of one window.
#[test]
fn segment_decides() {
    let Some(emulate) = emulator() else { return };
    let seed = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst: f64 = 0.0;
    for (at, capacity) in [1, 2, 3, 30, 31, 32, 33, 64, 5, 30, 32, 64].into_iter().enumerate() {
        for (turn, boundary_rate) in [1.0, 0.5, 0.1, 0.01, 0.0].into_iter().enumerate() {
            let draw = at * 5 + turn;
            let options = Options {
                capacity,
                merge: if draw % 2 == 0 { Merge::Density } else { Merge::Mass },
                qk_l2norm: draw % 3 == 0,
                ..Options::default()
            };
            let recipe = Recipe {
                options,
                time: 450,
                heads: 1,
                value_heads: 2,
                dk: [16, 8, 24][draw % 3],
                dv: [8, 40, 16][draw / 3 % 3],
                dtype: [Dtype::Bf16, Dtype::F16, Dtype::F32][draw % 3],
                boundary_rate,
                decay: [Some(0.1), None, Some(1.0), Some(50.0)][draw / 2 % 4],
                packed: (draw % 4 == 1).then(|| vec![0, 129, 1, 320, 0]),
                resumed: draw % 3 != 1,
                ..Recipe::default()
            };
            let mut case = recipe.draw(seed + draw as u64);
            if let (Some(cache), true) = (&mut case.cache, draw % 7 == 0) {
                // Sums that saturate; exact in f32, as ledger_of needs them.
                for row in 0..cache.dims.rows() {
                    for i in 0..cache.len[row] as usize {
                        cache.drift[row * capacity + i] = 0xffff_ff00 - 0x400 * (i as u32 % 3);
                    }
                }
            }
            if draw % 5 == 2 {
                zero_tokens(&mut case);
            }
            let problem = case.problem().unwrap();
            let one = run(emulate, &case, &problem, &[0, i64::MAX / 64 * 64], true).0;
            check_decisions(&case, &problem, &one);
            let expected = reference::forward(&problem, &Arguments::of(&problem), Some(&one.events), None);
            let off = one.drift.iter().zip(&expected.drift).map(|(&x, r)| (f64::from(x) - r).abs());
            let off = off.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst });
            assert!(off <= 2e-3, "{}: drift off by {off:.2e}", case.describe());
            worst = worst.max(off);
            let open: Vec<f64> = one.open.iter().map(|&x| x.into()).collect();
            let (error, _) = relative_error(&open, &expected.cache.open);
            assert!(error <= bound(problem.dtype()), "{}: cache_open off by {error:.2e}", case.describe());

            let mut cuts: Vec<i64> = (1..8).filter(|_| rand::random_bool(0.5)).map(|cut| cut * 64).collect();
            cuts.insert(0, 0);
            cuts.push(512);
            let cut = run(emulate, &case, &problem, &cuts, true).0;
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let name = format!("{}: windows {cuts:?}", case.describe());
            assert_eq!(bits(&one.drift), bits(&cut.drift), "{name}");
            assert_eq!(bits(&one.open), bits(&cut.open), "{name}");
            assert_eq!((&one.events, &one.len), (&cut.events, &cut.len), "{name}");
            assert_eq!((&one.tokens, &one.summed_drift), (&cut.tokens, &cut.summed_drift), "{name}");
            assert_eq!((&one.chunk_len, &one.chunk_starts), (&cut.chunk_len, &cut.chunk_starts), "{name}");
            assert_eq!(one.chunk_place, cut.chunk_place, "{name}");
            assert_eq!(bits(&one.chunk_log), bits(&cut.chunk_log), "{name}");
        }
    }
    println!("drift off by at most {worst:.1e}");
}

/// Puts zeros in stretches of k and of v.
fn zero_tokens(case: &mut Case) {
    let (dk, dv) = (case.recipe.dk * case.recipe.heads, case.recipe.dv * case.recipe.value_heads);
    let zero = |x: &mut dla::Buffer, range: std::ops::Range<usize>| match x {
        dla::Buffer::F32(x) => x[range].fill(0.0),
        dla::Buffer::Bf16(x) => x[range].fill(bf16::ZERO),
        dla::Buffer::F16(x) => x[range].fill(f16::ZERO),
    };
    for (from, to) in [(0, 3), (60, 140), (200, 201), (300, 337)] {
        zero(&mut case.k, from * dk..to * dk);
    }
    for (from, to) in [(20, 30), (250, 260), (440, 450)] {
        zero(&mut case.v, from * dv..to * dv);
    }
}

/// The emulator sees what it is there to see.
#[test]
fn emulator_catches_mistakes() {
    let Some(emulate) = emulator() else { return };
    for (kernel, expected) in [
        ("wrong_barrier", "barrier"),
        ("wrong_collective", "collective"),
        ("wrong_write", "past its end"),
        ("wrong_launch", "trap"),
        ("missing", "no such kernel"),
    ] {
        let wrong = try_launch(emulate, kernel, 2, 64, &0u64).unwrap_or_default();
        assert!(wrong.contains(expected), "{kernel}: {wrong:?}");
    }
}

/// A caller's own log, and the wide heads.
#[test]
fn own_log_and_wide_heads() {
    let Some(emulate) = emulator() else { return };
    let mut worst = Worst::default();
    let options = Options { capacity: 4, ..Options::default() };
    let recipe = Recipe { options, time: 90, value_heads: 2, resumed: true, ..Recipe::default() };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let case = Recipe { dtype, ..recipe.clone() }.draw(rand::random());
        let dims = case.problem().unwrap().shape().cache_dims();
        let mut log = vec![0; 90 * dims.value_heads];
        for row in 0..dims.rows() {
            let mut ledger = ledger_of(case.cache.as_ref(), row);
            for t in 0..90 {
                let choices =
                    (0..6).filter(|&event| ledger.allows(event, dims.capacity)).collect::<Vec<u8>>();
                let event = choices[rand::random_range(0..choices.len())];
                ledger.apply(event, 0.0);
                log[t * dims.value_heads + row] = event;
            }
        }
        let mut inputs = case.inputs();
        inputs.events = Some(&log);
        let problem = Problem::new(&case.recipe.options, inputs).unwrap();
        check_problem(emulate, &case, &problem, &mut worst);
    }
    for (dtype, recurrence) in [(Dtype::Bf16, Recurrence::GatedDelta), (Dtype::F32, Recurrence::GatedDelta)] {
        let options =
            Options { recurrence, capacity: 3, read: Read::Routed, qk_l2norm: true, ..Options::default() };
        let recipe = Recipe { options, time: 40, dk: 256, dv: 256, dtype, ..Recipe::default() };
        check(emulate, &recipe.draw(rand::random()), &mut worst);
    }
    println!("{:?}", worst.0);
}

/// Routed reads over many chunks of keys with a mean: a slot of one token beside one of thousands, resumed and not, every
/// width of slices, grouped heads.
#[test]
fn route_of_long_sequences() {
    let Some(emulate) = emulator() else { return };
    let mut worst = Worst::default();
    for (i, dtype) in [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().cycle().take(6).enumerate() {
        let options = Options {
            capacity: [30, 64, 5][i % 3],
            read: Read::Routed,
            qk_l2norm: i == 4,
            merge: if i < 3 { Merge::Density } else { Merge::Mass },
            ..Options::default()
        };
        let recipe = Recipe {
            options,
            time: [1100, 700, 640][i % 3],
            heads: 1,
            value_heads: 1 + i % 2,
            dk: [16, 136, 72][(i + i / 3) % 3],
            dv: 8,
            dtype,
            boundary_rate: [1.0, 0.25][i / 3],
            logits: i % 2 == 0,
            resumed: i % 2 == 1,
            ..Recipe::default()
        };
        let mut case = recipe.draw(rand::random());
        shift(&mut case.k, 1.0);
        check(emulate, &case, &mut worst);
        // Windows change nothing.
        let problem = case.problem().unwrap();
        let whole = forward(emulate, &case, &problem);
        let cut = run(emulate, &case, &problem, &[0, 192, 640, 1 << 40], false).1.unwrap();
        assert!(whole.lambda == cut.lambda && whole.keys == cut.keys, "{}", case.describe());
    }
    println!("{:?}", worst.0);
}

/// Adds to every element.
fn shift(x: &mut dla::Buffer, by: f32) {
    match x {
        dla::Buffer::F32(x) => x.iter_mut().for_each(|x| *x += by),
        dla::Buffer::Bf16(x) => x.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() + by)),
        dla::Buffer::F16(x) => x.iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() + by)),
    }
}

/// Shared memory of every kernel fits the smallest cards that are built for (99 KiB a block) at any size.
#[test]
fn shared_memory_fits() {
    for (parts, delta) in [(1, false), (1, true), (2, false), (2, true)] {
        let geometry = Geometry {
            parts,
            sequences: 1,
            tokens: 1,
            heads: 1,
            value_heads: 1,
            dk: 256,
            dv: 256,
            capacity: 64,
            delta,
        };
        let bytes = [
            geometry.segment_gram_shared_bytes(),
            SEGMENT_ROWS * geometry.segment_shared_bytes(),
            geometry.prepare_shared_bytes(),
            geometry.route_sums_shared_bytes(),
            geometry.route_bases_shared_bytes(),
            geometry.route_shared_bytes(),
            geometry.scan_shared_bytes(),
            geometry.prepare_backward_shared_bytes(),
            geometry.route_backward_shared_bytes(),
            geometry.route_backward_keys_shared_bytes(),
            geometry.segment_states_shared_bytes(),
            geometry.segment_scalars_shared_bytes(),
            geometry.segment_backward_shared_bytes(),
        ];
        println!(
            "{parts} parts, delta {delta}: segment_gram, segment, prepare, route_sums, route_bases, route, scan, then prepare_backward, route_backward, its keys, segment_states, segment_scalars, segment_backward {bytes:?}"
        );
        assert!(bytes.iter().all(|&bytes| bytes <= 99 * 1024), "{geometry:?}: {bytes:?}");
        // Route takes more columns at a time where slots are few; three blocks an SM of Hopper's at a usual size.
        let few = Geometry { capacity: 32, ..geometry }.route_shared_bytes();
        let usual = Geometry { capacity: 30, dk: 128, ..geometry }.route_shared_bytes();
        println!("route at M = 32, dk = 256: {few}; at M = 30, dk = 128: {usual}");
        assert!(few <= 99 * 1024 && 3 * (usual + 1024) <= 228 * 1024, "{few} {usual}");
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// `DLA_EMULATION_SEEDS` random cases, 4 by default, from seed `DLA_EMULATION_FIRST`.
#[test]
fn random_cases() {
    let Some(emulate) = emulator() else { return };
    let first = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    let count = setting("DLA_EMULATION_SEEDS").unwrap_or(4);
    println!("seeds from {first}");
    let mut worst = Worst::default();
    for seed in first..first + count {
        check(emulate, &Case::random(seed), &mut worst);
    }
    println!("{:?}", worst.0);
}

/// The bounds' margin where bf16 rounds most often: the delta rule, over sizes, decays, capacities. Minutes.
#[test]
#[ignore = "minutes; run by hand"]
fn bf16_delta_margin() {
    let Some(emulate) = emulator() else { return };
    let mut worst = Worst::default();
    for (dk, dv) in [(16, 64), (128, 32)] {
        for decay in [None, Some(0.1)] {
            for capacity in [1, 4, 30] {
                for boundary_rate in [0.01, 0.25, 1.0] {
                    let options =
                        Options { recurrence: Recurrence::GatedDelta, capacity, ..Options::default() };
                    let recipe = Recipe {
                        options,
                        time: 320,
                        dk,
                        dv,
                        dtype: Dtype::Bf16,
                        boundary_rate,
                        decay,
                        ..Recipe::default()
                    };
                    let mut one = Worst::default();
                    check(emulate, &recipe.draw(rand::random()), &mut one);
                    println!("{dk} {dv} {decay:?} M = {capacity} rate {boundary_rate}: {:?}", one.0);
                    one.0.iter().for_each(|(tensor, &error)| worst.take(Dtype::Bf16, tensor, error));
                }
            }
        }
    }
    println!("{:?}", worst.0);
}
