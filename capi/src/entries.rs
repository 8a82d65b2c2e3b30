//! Caches for decoding that the library holds: many sequences, each in an entry of its own, stepped in place.

use crate::call::{self, Arguments, CacheOf, Parsed, Place, ResultsOf, Wanted, cache_of, option, product};
use crate::cuda::{self, ALIGNMENT, Key, Rest};
use crate::status::{Outcome, guarded};
use crate::types::{CacheArrays, Call, CallOptions, Results, StateDtypeCode, Status};
use crate::{addressed, answer, cpu, parse};
use dla::cuda::cudarc::driver::sys::{self, CUresult};
use dla::cuda::{Engine, Memory, PrefillPlan, Rows, StepPlan};
use dla::{Entries, EntrySpec, Error, MOST_STEP_TOKENS, Read, StateDtype};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Entries of a decoding cache: see `dla_entries_create`. Calls of several threads take turns.
pub struct EntriesHandle(Mutex<Held>);

struct Held {
    spec: EntrySpec,
    /// Entries in use, as the engine knows them too.
    taken: Vec<bool>,
    kind: Kind,
}

enum Kind {
    Cpu(dla::cpu::Entries),
    Gpu(Box<Gpu>),
}

struct Gpu {
    entries: dla::cuda::Entries,
    /// Handle of the stream.
    stream: usize,
    /// By batch size: rows on the GPU, and what they are set to.
    rows: HashMap<usize, (Rows, Option<Vec<usize>>)>,
    /// By options, extents and tau. None is given up while the handle lives: graphs may have been captured with it.
    steps: HashMap<(Key, u32), Step>,
    prefills: HashMap<Key, PrefillPlan>,
}

/// A step's plan, and room for what its kernels write and the caller does not want.
struct Step {
    plan: StepPlan,
    rest: Rest,
    room: Memory,
}

/// Prefills kept. Where lengths are ever new all are forgotten at once; they hold no memory.
const MOST_PREFILLS: usize = 1024;

impl Held {
    fn new(parsed: &Parsed<'_>, count: usize, states: i32) -> Outcome<Held> {
        let states = match states {
            x if x == StateDtypeCode::F32 as i32 => StateDtype::F32,
            x if x == StateDtypeCode::Bf16 as i32 => StateDtype::Bf16,
            x => return option("states", "a dla_state_dtype", x),
        };
        let spec = EntrySpec::of(&parsed.options, &parsed.shape, count, states);
        let extents = [count, spec.value_heads, spec.capacity + 2, spec.dk, spec.dv];
        // An engine's own record of a value head has less.
        let records = count.saturating_mul(spec.value_heads).saturating_mul(1 << 10);
        if product(&extents).is_none() || Vec::<u8>::new().try_reserve_exact(records).is_err() {
            let expected = "[entries,HV,M,dk,dv] of a size that fits memory".to_owned();
            return Err(Error::Shape { name: "entries", expected, given: format!("{extents:?}") }.into());
        }
        let kind = match parsed.place {
            Place::Cpu => Kind::Cpu(dla::cpu::Entries::new(spec)?),
            Place::Cuda { ordinal } => {
                dla::cuda::available()?;
                // SAFETY: null or a stream that outlives the handle, as the caller of the C function says.
                let engine = unsafe { Engine::from_raw_stream(ordinal, parsed.call.stream.cast()) }?;
                Kind::Gpu(Box::new(Gpu {
                    entries: dla::cuda::Entries::new(Arc::new(engine), spec)?,
                    stream: parsed.call.stream.addr(),
                    rows: HashMap::new(),
                    steps: HashMap::new(),
                    prefills: HashMap::new(),
                }))
            }
        };
        Ok(Held { spec, taken: vec![false; count], kind })
    }

    fn engines(&mut self) -> &mut dyn Entries {
        match &mut self.kind {
            Kind::Cpu(entries) => entries,
            Kind::Gpu(gpu) => &mut gpu.entries,
        }
    }

    /// All are taken, and where `distinct` none comes twice.
    fn check(&self, name: &'static str, list: &[usize], distinct: bool) -> Outcome<()> {
        let mut seen = vec![false; if distinct { self.taken.len() } else { 0 }];
        for (index, &given) in list.iter().enumerate() {
            let expected = match self.taken.get(given) {
                None => "an entry of the cache",
                Some(false) => "an entry that is taken",
                Some(true) if distinct && std::mem::replace(&mut seen[given], true) => {
                    "an entry that no row before it has"
                }
                Some(true) => continue,
            };
            return Err(Error::Entry { name, expected, given, index }.into());
        }
        Ok(())
    }

    /// The call is made where the entries are.
    fn check_place(&self, parsed: &Parsed<'_>) -> Outcome<()> {
        let place = match &self.kind {
            Kind::Cpu(_) => Place::Cpu,
            Kind::Gpu(gpu) => Place::Cuda { ordinal: gpu.entries.engine().ordinal() },
        };
        if parsed.place != place {
            return option(
                "device",
                &format!("that of the entries, {place:?}"),
                format!("{:?}", parsed.place),
            );
        }
        let given = parsed.call.stream.addr();
        match &self.kind {
            Kind::Gpu(gpu) if given != gpu.stream => {
                option("stream", &format!("that of the entries, {:#x}", gpu.stream), format!("{given:#x}"))
            }
            _ => Ok(()),
        }
    }

    /// Arrays of `count` sequences.
    fn arrays(&self, arrays: &CacheArrays, count: usize) -> Outcome<CacheOf> {
        let dims = self.spec.dims(count);
        if product(&[count, dims.value_heads, dims.capacity, dims.dk, dims.dv]).is_none() {
            let expected = "a list of a size that fits memory".to_owned();
            return Err(Error::Shape { name: "entries", expected, given: count.to_string() }.into());
        }
        cache_of(dims, self.spec.read == Read::Routed, arrays, Wanted::All)
    }

    /// # Safety
    /// The arrays are there.
    unsafe fn export(&mut self, list: &[usize], arrays: &CacheOf) -> Outcome<()> {
        self.check("entries", list, false)?;
        if let Kind::Gpu(gpu) = &self.kind {
            gpu.check_addresses(arrays)?;
        }
        let cache = self.engines().export(list)?;
        match &self.kind {
            Kind::Cpu(_) => cpu::give_cache(arrays, &cache),
            Kind::Gpu(gpu) => {
                let counts =
                    [(arrays.len, &cache.len), (arrays.tokens, &cache.tokens), (arrays.drift, &cache.drift)];
                for (array, from) in counts {
                    gpu.upload(cuda::address(array), from)?;
                }
                gpu.upload(cuda::address(arrays.states), &cache.states)?;
                gpu.upload(cuda::address(arrays.open), &cache.open)?;
                gpu.upload(cuda::address(arrays.keys), cache.keys.as_deref().unwrap_or_default())?;
                gpu.entries.engine().synchronize()?;
            }
        }
        Ok(())
    }

    /// # Safety
    /// The arrays are there.
    unsafe fn import(&mut self, list: &[usize], arrays: &CacheOf) -> Outcome<()> {
        self.check("entries", list, true)?;
        let dims = self.spec.dims(list.len());
        let cache = match &self.kind {
            // SAFETY: as the caller says.
            Kind::Cpu(_) => unsafe { cpu::take_cache(dims, arrays) }?,
            Kind::Gpu(gpu) => {
                gpu.check_addresses(arrays)?;
                let mut cache = dla::Cache::empty(dims, self.spec.read);
                gpu.download(cuda::address(arrays.states), &mut cache.states)?;
                gpu.download(cuda::address(arrays.len), &mut cache.len)?;
                gpu.download(cuda::address(arrays.tokens), &mut cache.tokens)?;
                gpu.download(cuda::address(arrays.drift), &mut cache.drift)?;
                gpu.download(cuda::address(arrays.open), &mut cache.open)?;
                gpu.download(cuda::address(arrays.keys), cache.keys.as_deref_mut().unwrap_or_default())?;
                cache
            }
        };
        Ok(self.engines().import(list, &cache)?)
    }

    /// # Safety
    /// Every array of the call is there.
    unsafe fn step(
        &mut self,
        parsed: &Parsed<'_>,
        arguments: &Arguments,
        list: &[usize],
        results: &ResultsOf,
    ) -> Outcome<()> {
        self.check_place(parsed)?;
        if arguments.cu_seqlens.is_some() {
            let why = "a step takes as many tokens of every row";
            return Err(Error::Unexpected { name: "cu_seqlens", why }.into());
        }
        let shape = parsed.shape;
        if !(1..=MOST_STEP_TOKENS).contains(&shape.time) {
            let expected = format!("[B,T,H,dk] with T = 1 to {MOST_STEP_TOKENS} for a step");
            let given = format!("{:?}", [shape.batch, shape.time, shape.heads, shape.dk]);
            return Err(Error::Shape { name: "q", expected, given }.into());
        }
        check_count("entries", list, shape.batch)?;
        self.check("entries", list, true)?;
        match &mut self.kind {
            // SAFETY: as the caller says.
            Kind::Cpu(held) => unsafe { cpu::on_entries(held, parsed, arguments, (None, list), results) },
            // SAFETY: as the caller says.
            Kind::Gpu(gpu) => unsafe { gpu.step(parsed, arguments, list, results) },
        }
    }

    /// # Safety
    /// Every array of the call is there.
    unsafe fn prefill(
        &mut self,
        parsed: &Parsed<'_>,
        arguments: &Arguments,
        (from, to): (&[usize], &[usize]),
        results: &ResultsOf,
    ) -> Outcome<()> {
        self.check_place(parsed)?;
        // Where one list is given for both, it is known by the name that a step's has.
        let names = if std::ptr::eq(from, to) { ["entries"; 2] } else { ["from", "to"] };
        check_count(names[0], from, parsed.shape.sequences)?;
        check_count(names[1], to, parsed.shape.sequences)?;
        self.check(names[0], from, false)?;
        self.check(names[1], to, true)?;
        match &mut self.kind {
            // SAFETY: as the caller says.
            Kind::Cpu(held) => unsafe { cpu::on_entries(held, parsed, arguments, (Some(from), to), results) },
            // SAFETY: as the caller says.
            Kind::Gpu(gpu) => unsafe { gpu.prefill(parsed, arguments, (from, to), results) },
        }
    }
}

fn check_count(name: &'static str, list: &[usize], rows: usize) -> Outcome<()> {
    if list.len() != rows {
        let expected = format!("one entry a row, {rows}");
        return Err(Error::Shape { name, expected, given: list.len().to_string() }.into());
    }
    Ok(())
}

impl Gpu {
    fn capturing(&self) -> bool {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: writes one number; the stream is this engine's.
        let code = unsafe { sys::cuStreamIsCapturing(self.entries.engine().raw_stream(), &mut status) };
        code == CUresult::CUDA_SUCCESS && status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
    }

    /// Refuses what cannot be captured.
    fn not_captured(&self, why: &'static str) -> Outcome<()> {
        cuda::bind(self.entries.engine())?;
        if self.capturing() {
            return Err(Error::Unexpected { name: "stream", why }.into());
        }
        Ok(())
    }

    /// The rows of a batch size, set to `list`: uploaded where it is another than before. Entries have been checked.
    fn set_rows(&mut self, batch: usize, list: &[usize]) -> Outcome<u64> {
        if let Some((rows, Some(set))) = self.rows.get(&batch)
            && set == list
        {
            return Ok(rows.address());
        }
        self.not_captured("it is being captured, and rows are set before: call dla_entries_set_rows")?;
        let (rows, set) = match self.rows.entry(batch) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(room) => room.insert((self.entries.rows(batch)?, None)),
        };
        *set = None;
        self.entries.set_rows(rows, list)?;
        *set = Some(list.to_vec());
        Ok(rows.address())
    }

    /// # Safety
    /// As [`dla::cuda::Entries::launch`]; entries have been checked.
    unsafe fn step(
        &mut self,
        parsed: &Parsed<'_>,
        arguments: &Arguments,
        list: &[usize],
        results: &ResultsOf,
    ) -> Outcome<()> {
        let tau = cuda::check_options(parsed)?;
        let wanted = [arguments.tau, results.drift, results.events, results.lambda];
        let present = wanted.iter().fold(0, |all, x| 2 * all + u32::from(x.is_some()));
        let key = (cuda::key(parsed, present), tau.to_bits());
        if !self.steps.contains_key(&key) {
            self.not_captured(
                "it is being captured, and a step of this shape and these options comes before",
            )?;
            let plan = self.entries.plan(&parsed.options, &parsed.shape, parsed.dtype)?;
            let rest = Rest::new(parsed, results, 0);
            let engine = self.entries.engine();
            let room = engine.allocate(rest.bytes)?;
            if let Some(at) = rest.tau {
                cuda::fill(engine, room.address() + at as u64, tau, parsed.shape.value_heads)?;
            }
            self.steps.insert(key, Step { plan, rest, room });
        }
        if parsed.shape.batch == 0 {
            return Ok(());
        }
        let rows = self.set_rows(parsed.shape.batch, list)?;
        let Step { plan, rest, room } = &self.steps[&key];
        let base = room.address();
        let tau = rest.tau.map_or(cuda::address(arguments.tau), |at| base + at as u64);
        let (inputs, outputs) = (cuda::raw_inputs(parsed, arguments, tau), rest.outputs(results, base));
        // SAFETY: the plan is of these entries, none of which comes twice; the arrays have the bytes that their extents say;
        // the rest the caller answers for.
        unsafe { self.entries.launch(plan, rows, &inputs, &outputs) }?;
        Ok(())
    }

    fn plan_prefill(&mut self, parsed: &Parsed<'_>) -> Outcome<&PrefillPlan> {
        cuda::check_options(parsed)?;
        let key = cuda::key(parsed, 0);
        if !self.prefills.contains_key(&key) {
            let plan = self.entries.plan_prefill(&cuda::call(parsed, true))?;
            if self.prefills.len() >= MOST_PREFILLS {
                self.prefills.clear();
            }
            self.prefills.insert(key, plan);
        }
        Ok(&self.prefills[&key])
    }

    /// What a prefill has in its workspace behind the plan's own; where the two lists are; bytes of all.
    fn prefill_room(
        parsed: &Parsed<'_>,
        results: &ResultsOf,
        plan: &PrefillPlan,
    ) -> (Rest, [usize; 2], usize) {
        let rest = Rest::new(parsed, results, plan.workspace_bytes());
        let list = (parsed.shape.sequences * 4).next_multiple_of(ALIGNMENT);
        let lists = [rest.bytes, rest.bytes + list];
        let bytes = rest.bytes + 2 * list;
        (rest, lists, bytes)
    }

    /// # Safety
    /// As [`dla::cuda::Entries::launch_prefill`]; entries have been checked.
    unsafe fn prefill(
        &mut self,
        parsed: &Parsed<'_>,
        arguments: &Arguments,
        (from, to): (&[usize], &[usize]),
        results: &ResultsOf,
    ) -> Outcome<()> {
        let tau = cuda::check_options(parsed)?;
        self.not_captured("it is being captured, and the lists of a prefill come from the host")?;
        let plan = self.plan_prefill(parsed)?.clone();
        let (rest, lists, bytes) = Self::prefill_room(parsed, results, &plan);
        let base = cuda::workspace(parsed, bytes)?;
        let tau = match rest.tau.map(|at| base + at as u64) {
            None => cuda::address(arguments.tau),
            Some(at) => {
                cuda::fill(self.entries.engine(), at, tau, parsed.shape.value_heads)?;
                at
            }
        };
        let lists = lists.map(|at| base + at as u64);
        for (at, list) in lists.iter().zip([from, to]) {
            let list: Vec<i32> = list.iter().map(|&entry| entry as i32).collect();
            self.upload(*at, &list)?;
        }
        let (inputs, outputs) = (cuda::raw_inputs(parsed, arguments, tau), rest.outputs(results, base));
        let room = (base, bytes);
        // SAFETY: as in `step`.
        unsafe { self.entries.launch_prefill(&plan, (lists[0], lists[1]), &inputs, &outputs, room) }?;
        Ok(())
    }

    /// Arrays of a cache are of this GPU.
    fn check_addresses(&self, arrays: &CacheOf) -> Outcome<()> {
        let engine = self.entries.engine();
        cuda::bind(engine)?;
        let CacheOf { states, len, tokens, drift, open, keys } = *arrays;
        for array in [states, len, tokens, drift, open, keys].into_iter().flatten() {
            if array.bytes == 0 {
                continue;
            }
            let (address, mut found) = (array.address.addr() as u64, -1i32);
            if !address.is_multiple_of(4) {
                return Err(Error::Misaligned { name: array.name, alignment: 4, given: address }.into());
            }
            let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
            // SAFETY: the driver looks the address up and does not read at it; it writes one int.
            let code = unsafe { sys::cuPointerGetAttribute((&raw mut found).cast(), attribute, address) };
            if code != CUresult::CUDA_ERROR_INVALID_VALUE {
                cuda::checked("cuPointerGetAttribute", code)?;
            }
            if usize::try_from(found) != Ok(engine.ordinal()) {
                let (name, ordinal) = (array.name, engine.ordinal());
                return Err(Error::ForeignPointer { name, ordinal, given: format!("{address:#x}") }.into());
            }
        }
        Ok(())
    }

    /// Copies numbers to an address that was checked, in the stream's order.
    fn upload<T: Copy>(&self, to: u64, from: &[T]) -> Outcome<()> {
        if from.is_empty() {
            return Ok(());
        }
        let engine = self.entries.engine();
        cuda::bind(engine)?;
        let (at, bytes) = (from.as_ptr().cast(), size_of_val(from));
        // SAFETY: both are as long as said. Of memory that is not page-locked the driver has taken its own copy by the time
        // that it returns.
        cuda::checked("cuMemcpyHtoDAsync_v2", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, at, bytes, engine.raw_stream())
        })
    }

    /// Copies numbers from an address that was checked, and waits for the stream.
    fn download<T: Copy>(&self, from: u64, to: &mut [T]) -> Outcome<()> {
        if to.is_empty() {
            return Ok(());
        }
        let engine = self.entries.engine();
        cuda::bind(engine)?;
        let (at, bytes) = (to.as_mut_ptr().cast(), size_of_val(to));
        // SAFETY: both are as long as said, and `to` is borrowed until the stream has been waited for.
        cuda::checked("cuMemcpyDtoHAsync_v2", unsafe {
            sys::cuMemcpyDtoHAsync_v2(at, from, bytes, engine.raw_stream())
        })?;
        Ok(engine.synchronize()?)
    }
}

/// The entries of a handle, while nobody else has them.
///
/// # Safety
/// `at` is null or a handle that is not destroyed.
unsafe fn held<'a>(at: *const EntriesHandle) -> Outcome<MutexGuard<'a, Held>> {
    if at.is_null() {
        return Err(Error::Missing { name: "entries", why: "the handle is null" }.into());
    }
    // SAFETY: as the caller says.
    Ok(unsafe { &*at }.0.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A list of entries in memory of the host.
///
/// # Safety
/// `at` is null or points to `count` sizes.
unsafe fn list<'a>(name: &'static str, at: *const usize, count: usize) -> Outcome<&'a [usize]> {
    if count == 0 {
        return Ok(&[]);
    }
    if at.is_null() {
        return Err(Error::Missing { name, why: "its address is null" }.into());
    }
    if !at.is_aligned() {
        let (alignment, given) = (align_of::<usize>() as u64, at.addr() as u64);
        return Err(Error::Misaligned { name, alignment, given }.into());
    }
    if count > isize::MAX as usize / size_of::<usize>() {
        let (expected, given) = ("a list of a size that fits memory".to_owned(), count.to_string());
        return Err(Error::Shape { name, expected, given }.into());
    }
    // SAFETY: aligned, not null, and as long as the caller says.
    Ok(unsafe { std::slice::from_raw_parts(at, count) })
}

/// # Safety
/// `at` is null or such a struct.
unsafe fn arrays<'a>(at: *const CacheArrays) -> Outcome<&'a CacheArrays> {
    addressed("cache", at)?;
    // SAFETY: aligned, and as the caller says.
    Ok(unsafe { &*at })
}

/// A cache for decoding: `count` free entries on the device and the stream of the call, for its options and extents (HV, dk,
/// dv, M, recurrence, read; of the others and the buffers none is kept). `states` is a `dla_state_dtype`. `*entries` is set
/// where the status is `DLA_STATUS_OK`, else NULL.
///
/// # Safety
/// Every pointer is null or what its type says; on a GPU the stream outlives the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_create(
    options: *const CallOptions,
    call: *const Call,
    count: usize,
    states: i32,
    entries: *mut *mut EntriesHandle,
) -> Status {
    guarded(|| {
        addressed("entries", entries)?;
        // SAFETY: aligned, and as the caller says.
        unsafe { entries.write(std::ptr::null_mut()) };
        // SAFETY: as the caller says.
        let held = Held::new(&unsafe { parse(options, call) }?, count, states)?;
        // SAFETY: as above.
        unsafe { entries.write(Box::into_raw(Box::new(EntriesHandle(Mutex::new(held))))) };
        Ok(())
    })
}

/// Frees entries, once their stream has come past all that was launched. NULL is none, and nothing happens.
///
/// # Safety
/// `entries` is null or of `dla_entries_create`, and not used again; graphs that were captured with it neither.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_destroy(entries: *mut EntriesHandle) {
    if !entries.is_null() {
        guarded(|| {
            // SAFETY: made by `Box::into_raw`, destroyed once, as the caller says.
            let handle = unsafe { Box::from_raw(entries) };
            let held = handle.0.into_inner().unwrap_or_else(PoisonError::into_inner);
            let Kind::Gpu(gpu) = &held.kind else { return Ok(()) };
            let mut current = std::ptr::null_mut();
            // SAFETY: writes one handle.
            let known = unsafe { sys::cuCtxGetCurrent(&mut current) } == CUresult::CUDA_SUCCESS;
            // What is wrong with the stream has nowhere to go, and the memory is freed all the same.
            let _ = gpu.entries.engine().synchronize();
            drop(held);
            if known {
                // Entries may be destroyed wherever a collector runs: the context that was current there is so again.
                // SAFETY: null, or a context that was current a moment ago.
                unsafe { sys::cuCtxSetCurrent(current) };
            }
            Ok(())
        });
    }
}

/// Takes a free entry for a sequence that has not begun, and writes its index to `*entry`. Where all are taken:
/// `DLA_STATUS_VALUE`.
///
/// # Safety
/// `entries` is null or a handle; `entry` is null or points to a `size_t`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_take(entries: *mut EntriesHandle, entry: *mut usize) -> Status {
    guarded(|| {
        addressed("entry", entry)?;
        // SAFETY: as the caller says.
        let mut held = unsafe { held(entries) }?;
        let taken = held.engines().take()?;
        held.taken[taken] = true;
        // SAFETY: aligned, and as the caller says.
        unsafe { entry.write(taken) };
        Ok(())
    })
}

/// Frees an entry. Rows of a captured step that name it are to be set anew before the graph is replayed.
///
/// # Safety
/// `entries` is null or a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_release(entries: *mut EntriesHandle, entry: usize) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let mut held = unsafe { held(entries) }?;
        held.engines().release(entry)?;
        held.taken[entry] = false;
        Ok(())
    })
}

/// Forgets what an entry holds: its sequence has not begun.
///
/// # Safety
/// `entries` is null or a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_reset(entries: *mut EntriesHandle, entry: usize) -> Status {
    // SAFETY: as the caller says.
    guarded(|| Ok(unsafe { held(entries) }?.engines().reset(entry)?))
}

/// Makes entry `to` what entry `from` is.
///
/// # Safety
/// `entries` is null or a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_copy(entries: *mut EntriesHandle, from: usize, to: usize) -> Status {
    // SAFETY: as the caller says.
    guarded(|| Ok(unsafe { held(entries) }?.engines().copy(from, to)?))
}

/// Copies entries into chronological arrays of `count` sequences (N = count), on the device of the entries. An entry may come
/// twice. On a GPU it waits for the stream.
///
/// # Safety
/// `entries` is null or a handle; `list` is null or points to `count` indices of the host; `to` is null or such arrays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_export(
    entries: *mut EntriesHandle,
    list: *const usize,
    count: usize,
    to: *const CacheArrays,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        unsafe {
            let (mut held, list) = (held(entries)?, self::list("entries", list, count)?);
            let arrays = held.arrays(arrays(to)?, count)?;
            held.export(list, &arrays)
        }
    })
}

/// Makes entries what the sequences of chronological arrays are, one each; the arrays are on the device of the entries. On a
/// GPU it waits for the stream.
///
/// # Safety
/// As `dla_entries_export`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_import(
    entries: *mut EntriesHandle,
    list: *const usize,
    count: usize,
    from: *const CacheArrays,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        unsafe {
            let (mut held, list) = (held(entries)?, self::list("entries", list, count)?);
            let arrays = held.arrays(arrays(from)?, count)?;
            held.import(list, &arrays)
        }
    })
}

/// Has a captured step of `batch` rows use other entries when it is replayed: row b uses `list[b]`; rows past `count` rest, and
/// nothing of theirs is read or written. In the stream's order. All steps of a batch size share their rows, and `dla_entries_step`
/// sets them too. On the CPU entries are only checked.
///
/// # Safety
/// `entries` is null or a handle; `list` is null or points to `count` indices of the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_set_rows(
    entries: *mut EntriesHandle,
    batch: usize,
    list: *const usize,
    count: usize,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        let (mut held, list) = unsafe { (held(entries)?, self::list("entries", list, count)?) };
        if count > batch {
            let (expected, given) = (format!("at most {batch} entries"), count.to_string());
            return Err(Error::Shape { name: "entries", expected, given }.into());
        }
        // No step has more: an entry comes once.
        if batch > held.taken.len() {
            let (expected, given) =
                (format!("at most {} rows, as many as entries", held.taken.len()), batch.to_string());
            return Err(Error::Shape { name: "batch", expected, given }.into());
        }
        held.check("entries", list, true)?;
        match &mut held.kind {
            Kind::Cpu(_) => Ok(()),
            Kind::Gpu(gpu) => gpu.set_rows(batch, list).map(drop),
        }
    })
}

/// One to eight tokens a row, in place: batch row b goes on in entry `list[b]`, and `count` is B. On a GPU the call launches on
/// the stream of the entries, which must be the call's, and returns; it needs no workspace, allocates nothing after the first
/// call of a shape and its options, copies the list where it is another than in the last call of that batch size, and can be captured
/// into a graph after a call with the same list.
///
/// # Safety
/// As `dla_forward`; `entries` is null or a handle; `list` is null or points to `count` indices of the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_step(
    entries: *mut EntriesHandle,
    options: *const CallOptions,
    call: *const Call,
    list: *const usize,
    count: usize,
    results: *const Results,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        unsafe {
            let (parsed, results) = (parse(options, call)?, call::read(results)?);
            parsed.without_cache(results)?;
            let (arguments, results) = (parsed.arguments()?, parsed.results(results)?);
            let (mut held, list) = (held(entries)?, self::list("entries", list, count)?);
            held.step(&parsed, &arguments, list, &results)
        }
    })
}

/// Bytes of workspace that `dla_entries_prefill` needs, as `dla_forward_workspace` says. On the CPU: 0.
///
/// # Safety
/// Every pointer is null or what its type says; `entries` is null or a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_prefill_workspace(
    entries: *mut EntriesHandle,
    options: *const CallOptions,
    call: *const Call,
    results: *const Results,
    bytes: *mut usize,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        unsafe {
            let (parsed, results) = (parse(options, call)?, call::read(results)?);
            let results = parsed.results(results)?;
            let mut held = held(entries)?;
            held.check_place(&parsed)?;
            let needed = match &mut held.kind {
                Kind::Cpu(_) => 0,
                Kind::Gpu(gpu) => Gpu::prefill_room(&parsed, &results, gpu.plan_prefill(&parsed)?).2,
            };
            answer(bytes, needed)
        }
    })
}

/// A forward over any number of tokens: sequence n goes on from entry `from[n]` and leaves its states in entry `to[n]`, which may
/// be the same; `count` is N. An entry may come twice in `from`: sequences with a common beginning. On a GPU it launches and returns, and
/// cannot be captured.
///
/// # Safety
/// As `dla_forward`; `entries` is null or a handle; each list is null or points to `count` indices of the host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dla_entries_prefill(
    entries: *mut EntriesHandle,
    options: *const CallOptions,
    call: *const Call,
    from: *const usize,
    to: *const usize,
    count: usize,
    results: *const Results,
) -> Status {
    guarded(|| {
        // SAFETY: as the caller says.
        unsafe {
            let (parsed, results) = (parse(options, call)?, call::read(results)?);
            parsed.without_cache(results)?;
            let (arguments, results) = (parsed.arguments()?, parsed.results(results)?);
            let lists = (list("from", from, count)?, list("to", to, count)?);
            held(entries)?.prefill(&parsed, &arguments, lists, &results)
        }
    })
}
