//! A cache of entries on the GPU: allocation, bookkeeping, and entries in and out as chronological caches.

use super::abi::{
    DevicePointer, STEP_RECORD_BYTES, STEP_RING, STEP_SPARE_PLACES, StepBank, StepCacheParams, StepForm,
};
use super::driver::call;
use super::engine::Engine;
use super::forward::{Arena, CacheOffsets};
use super::launch::launch;
use super::memory::{Memory, bytes_of, bytes_of_mut};
use super::module::{Choice, Kernel};
use super::plan::{Call, Plan, check_head_sizes, check_shape};
use super::raw::{self, RawCache, RawInputs, RawOutputs};
use super::step::{Results, StepPlan};
use crate::cache::{Cache, CacheDims};
use crate::engine::Step;
use crate::entries::{EntrySpec, Roster, StateDtype};
use crate::error::{Error, Result};
use crate::events::Ledger;
use crate::options::{Options, Read, Recurrence};
use crate::problem::{Problem, Shape};
use crate::tensor::Dtype;
use std::sync::Arc;

/// A cache for decoding on a GPU, on one engine's stream.
///
/// Two ways in: the trait's [`step`](crate::Entries::step) and [`prefill`](crate::Entries::prefill) take tensors of
/// the host, copy them, and wait; [`Entries::launch`] and [`Entries::launch_prefill`] take addresses on the GPU,
/// allocate nothing, wait for nothing, and may be captured into a graph. Which entries a launch uses lies on the GPU
/// too ([`Rows`]), so that a captured step serves sequences that come and go.
#[derive(Debug)]
pub struct Entries {
    engine: Arc<Engine>,
    pool: Pool,
}

/// Which entry every batch row of a launch uses, on the GPU. Rows past those that are set rest: nothing of theirs is
/// read or written.
#[derive(Debug)]
pub struct Rows {
    memory: Memory,
    count: usize,
}

impl Rows {
    /// Address of `[B]` i32.
    pub fn address(&self) -> DevicePointer {
        self.memory.address()
    }

    /// Rows, B.
    pub fn count(&self) -> usize {
        self.count
    }
}

/// A prefill's kernels and workspace, chosen once.
#[derive(Debug, Clone)]
pub struct PrefillPlan {
    plan: Plan,
    initial: CacheOffsets,
    last: CacheOffsets,
    forward: usize,
    bytes: usize,
}

impl PrefillPlan {
    /// Bytes of workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.bytes
    }
}

impl Entries {
    /// `spec.entries` free entries on the GPU of `engine`.
    ///
    /// # Errors
    /// [`Error::HeadSize`], [`Error::Option`] and [`Error::Shape`] where the spec is out of range;
    /// [`Error::OutOfMemory`]; [`Error::Architecture`] where there are no kernels for this GPU.
    pub fn new(engine: Arc<Engine>, spec: EntrySpec) -> Result<Self> {
        let pool = Pool::new(&engine, spec)?;
        Ok(Entries { engine, pool })
    }

    /// The engine on whose stream everything happens.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Bytes of an entry on the GPU.
    pub fn entry_bytes(&self) -> usize {
        self.pool.places.bytes / self.pool.roster.spec.entries.max(1)
    }

    /// Room for the entries of `count` batch rows, all at rest.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the driver says.
    pub fn rows(&self, count: usize) -> Result<Rows> {
        let rows = Rows { memory: self.engine.allocate(4 * count)?, count };
        self.engine.fill(&rows.memory, 0xff)?;
        Ok(rows)
    }

    /// Has row b use `entries[b]`, and those past them rest, in the stream's order.
    ///
    /// # Errors
    /// [`Error::Entry`] where an entry is not taken or comes twice, [`Error::Shape`] where there are more entries than
    /// rows: the rows are then as they were.
    pub fn set_rows(&self, rows: &Rows, entries: &[usize]) -> Result<()> {
        if entries.len() > rows.count {
            return Err(Error::Shape {
                name: "entries",
                expected: format!("at most {}", rows.count),
                given: entries.len().to_string(),
            });
        }
        self.pool.roster.check_distinct("entries", entries)?;
        let mut indices: Vec<i32> = entries.iter().map(|&entry| entry as i32).collect();
        indices.resize(rows.count, -1);
        self.engine.bind()?;
        rows.memory.upload(0, bytes_of(&indices), self.engine.raw_stream())
    }

    /// Chooses the kernels of a step: `shape.batch` rows of `shape.time` tokens, 1 to 8.
    ///
    /// # Errors
    /// [`Error::Plan`] where the call is not of these entries' options and extents; [`Error::Shape`], [`Error::Limit`].
    pub fn plan(&self, options: &Options, shape: &Shape, dtype: Dtype) -> Result<StepPlan> {
        self.pool.roster.check_call(options, shape)?;
        self.engine.bind()?;
        StepPlan::new(&self.engine, &self.pool.places, options, shape, dtype)
    }

    /// Launches a step on the engine's stream: allocates nothing, waits for nothing, and may be captured into a graph.
    /// `entries` is an address of `[B]` i32, such as [`Rows::address`]; a row whose entry is negative, or is not there,
    /// rests. Of `inputs` cu_seqlens and cache, of `outputs` cache are absent.
    ///
    /// # Errors
    /// Before anything is launched: an address that is null, misaligned or not of this GPU. After: what the driver says.
    ///
    /// # Safety
    /// The plan is of these entries. Every array has the extents that its field says and stays until the stream has come
    /// past the call; outputs overlap nothing else. On the GPU, unseen from here: no entry comes twice; a caller's own
    /// log holds events that can happen.
    pub unsafe fn launch(
        &self,
        plan: &StepPlan,
        entries: DevicePointer,
        inputs: &RawInputs,
        outputs: &RawOutputs,
    ) -> Result<()> {
        self.engine.bind()?;
        raw::check_step(plan, self.engine.ordinal(), Some(entries), inputs, outputs, (0, 0))?;
        plan.launch(&self.pool.bank, entries, inputs, outputs, self.engine.raw_stream())
    }

    /// Chooses the kernels of a prefill and lays out its workspace.
    ///
    /// # Errors
    /// As [`Engine::plan`]; [`Error::Plan`] where the call is not of these entries' options and extents.
    pub fn plan_prefill(&self, call: &Call<'_>) -> Result<PrefillPlan> {
        self.pool.roster.check_call(call.options, &call.shape)?;
        self.pool.plan_prefill(&self.engine, call)
    }

    /// Launches a prefill on the engine's stream: sequence n goes on from entry `from[n]` and leaves its states in
    /// `to[n]`, both addresses of `[N]` i32. As [`Engine::launch`] but for the caches, which are the entries.
    ///
    /// # Errors
    /// As [`Engine::launch`].
    ///
    /// # Safety
    /// As [`Engine::launch`]; every entry is one of the cache's, none comes twice in `to`.
    pub unsafe fn launch_prefill(
        &self,
        plan: &PrefillPlan,
        (from, to): (DevicePointer, DevicePointer),
        inputs: &RawInputs,
        outputs: &RawOutputs,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.pool.launch_prefill(&self.engine, plan, (from, to), inputs, outputs, workspace) }
    }
}

/// Where the arrays of entries stand in one piece of memory, and the kernels that move caches in and out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    spec: EntrySpec,
    gather: Kernel,
    scatter: Kernel,
    /// Begin and bytes of every array, of as many bytes an entry.
    arrays: [(usize, usize); 5],
    records: usize,
    arrived: usize,
    bytes: usize,
}

impl Places {
    pub(super) fn new(engine: &Engine, spec: EntrySpec) -> Result<Places> {
        check_head_sizes(spec.dk, spec.dv)?;
        let limit = i32::MAX as u64;
        if spec.entries as u64 > limit {
            return Err(Error::Limit { name: "entries", limit, given: spec.entries as u64 });
        }
        engine.bind()?;
        let form = Self::form_of(&spec, 1);
        let kernel = |name: String, shared_bytes| {
            Choice::portable("step", name, 0, shared_bytes).resolve(engine.device())
        };
        let gather = kernel(form.gather_name(), form.gather_shared_bytes(spec.dk, spec.dv))?;
        let scatter = kernel(form.scatter_name(), 0)?;
        let (rows, places) = (spec.entries * spec.value_heads, spec.capacity + STEP_SPARE_PLACES);
        // Counted in Roster::new.
        let elements = rows * places * spec.dk * spec.dv;
        let when = |wanted: bool, bytes: usize| if wanted { bytes } else { 0 };
        let sizes = [
            elements * if form.bf16 { 2 } else { 4 },
            when(form.bf16, elements),
            when(spec.read == Read::Routed, rows * places * spec.dk * 4),
            when(form.delta, rows * 2 * STEP_RING * spec.dk * 4),
            rows * STEP_RECORD_BYTES,
        ];
        let mut bytes = 0;
        let mut room = |size: usize| {
            let at = bytes;
            bytes = (at + size).next_multiple_of(256);
            (at, size)
        };
        let arrays = sizes.map(&mut room);
        let (arrived, _) = room(4 * rows);
        Ok(Places { spec, gather, scatter, arrays, records: arrays[4].0, arrived, bytes })
    }

    fn form_of(spec: &EntrySpec, tokens: usize) -> StepForm {
        let delta = spec.recurrence == Recurrence::GatedDelta;
        StepForm { delta, bf16: spec.states == StateDtype::Bf16, tokens, early: false }
    }

    pub(super) fn form(&self, tokens: usize) -> StepForm {
        Self::form_of(&self.spec, tokens)
    }

    /// The arrays in memory at `base`.
    fn bank(&self, base: DevicePointer) -> StepBank {
        let at = |(offset, size): (usize, usize)| if size > 0 { base + offset as u64 } else { 0 };
        let [states, rest, keys, ring, records] = self.arrays.map(at);
        let arrived = base + self.arrived as u64;
        StepBank { states, rest, keys, ring, records, arrived, entries: self.spec.entries as i64 }
    }

    /// Gathers entries to a chronological cache, or scatters them from it; without a list sequence n is entry n, and where
    /// caches come in `list` becomes such a list, if it is not null.
    fn move_cache(
        &self,
        engine: &Engine,
        kernel: &Kernel,
        bank: &StepBank,
        (entries, list): (DevicePointer, DevicePointer),
        cache: &RawCache,
        sequences: usize,
    ) -> Result<()> {
        let spec = &self.spec;
        let blocks = sequences.saturating_mul(spec.value_heads * (spec.capacity + 1));
        let limit = i32::MAX as u64;
        let blocks = u32::try_from(blocks)
            .ok()
            .filter(|&blocks| u64::from(blocks) <= limit)
            .ok_or(Error::Limit { name: "sequences x value heads x slots", limit, given: blocks as u64 })?;
        let params = StepCacheParams {
            bank: *bank,
            entries,
            states: cache.states,
            len: cache.len,
            tokens: cache.tokens,
            drift: cache.drift,
            open: cache.open,
            keys: if spec.read == Read::Routed { cache.keys } else { 0 },
            list,
            sequences: sequences as i64,
            value_heads: spec.value_heads as i32,
            dk: spec.dk as i32,
            dv: spec.dv as i32,
            capacity: spec.capacity as i32,
        };
        launch(&Kernel { blocks, ..*kernel }, &params, engine.raw_stream())
    }
}

/// The arrays, without an engine.
#[derive(Debug)]
pub(super) struct Pool {
    roster: Roster,
    places: Places,
    bank: StepBank,
    memory: Memory,
}

impl Pool {
    fn new(engine: &Engine, spec: EntrySpec) -> Result<Pool> {
        let roster = Roster::new(spec)?;
        let places = Places::new(engine, spec)?;
        let memory = engine.allocate(places.bytes)?;
        // Records, and what has arrived, begin as zeros.
        memory.fill_range(places.records, places.bytes - places.records, 0, engine.raw_stream())?;
        Ok(Pool { roster, places, bank: places.bank(memory.address()), memory })
    }

    fn spec(&self) -> &EntrySpec {
        &self.roster.spec
    }

    fn take(&mut self, engine: &Engine) -> Result<usize> {
        let entry = self.roster.take()?;
        self.clear(engine, entry)?;
        Ok(entry)
    }

    fn clear(&self, engine: &Engine, entry: usize) -> Result<()> {
        engine.bind()?;
        let bytes = self.spec().value_heads * STEP_RECORD_BYTES;
        self.memory.fill_range(self.places.records + entry * bytes, bytes, 0, engine.raw_stream())
    }

    fn copy(&self, engine: &Engine, from: usize, to: usize) -> Result<()> {
        engine.bind()?;
        for (at, size) in self.places.arrays {
            let each = size / self.spec().entries;
            self.memory.copy_range(at + from * each, at + to * each, each, engine.raw_stream())?;
        }
        Ok(())
    }

    fn gather(&self, engine: &Engine, entries: DevicePointer, to: &RawCache, sequences: usize) -> Result<()> {
        self.places.move_cache(engine, &self.places.gather, &self.bank, (entries, 0), to, sequences)
    }

    fn scatter(
        &self,
        engine: &Engine,
        entries: DevicePointer,
        from: &RawCache,
        sequences: usize,
    ) -> Result<()> {
        self.places.move_cache(engine, &self.places.scatter, &self.bank, (entries, 0), from, sequences)
    }

    fn export(&self, engine: &Engine, entries: &[usize]) -> Result<Cache> {
        let indices: Vec<i32> = entries.iter().map(|&entry| entry as i32).collect();
        let mut arena = Arena::default();
        let list = arena.array(bytes_of(&indices));
        let dims = self.spec().dims(entries.len());
        let room = CacheOffsets::room(&mut arena, dims, self.spec().read);
        let memory = arena.upload(engine)?;
        let (base, list) = (memory.address(), memory.address() + list as u64);
        self.gather(engine, list, &room.raw(base), entries.len())?;
        room.download(engine, &memory, dims, self.spec().read)
    }

    fn import(&self, engine: &Engine, entries: &[usize], cache: &Cache) -> Result<()> {
        let indices: Vec<i32> = entries.iter().map(|&entry| entry as i32).collect();
        let mut arena = Arena::default();
        let list = arena.array(bytes_of(&indices));
        let given = CacheOffsets::of(&mut arena, cache);
        let memory = arena.upload(engine)?;
        let (base, list) = (memory.address(), memory.address() + list as u64);
        self.scatter(engine, list, &given.raw(base), entries.len())?;
        // The arena is freed on return.
        engine.synchronize()
    }

    /// The slots that an entry and value head holds.
    fn ledger(record: &[u8]) -> Ledger {
        let word = |i: usize| {
            record
                .get(4 * i..4 * i + 4)
                .map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
        };
        let array = |from: usize| (from..from + crate::MAX_CAPACITY).map(word).collect::<Vec<_>>();
        Ledger::resume(
            (word(0) as usize).min(crate::MAX_CAPACITY),
            &array(4),
            &array(4 + crate::MAX_CAPACITY),
        )
    }

    fn step(&self, engine: &Engine, problem: &Problem<'_>, entries: &[usize]) -> Result<Step> {
        self.roster.check_step(problem, entries)?;
        let heads = self.spec().value_heads;
        if let Some(events) = problem.inputs().events {
            let each = heads * STEP_RECORD_BYTES;
            let mut records = vec![0u8; entries.len() * each];
            for (row, &entry) in entries.iter().enumerate() {
                let to = &mut records[row * each..][..each];
                engine.download(&self.memory, self.places.records + entry * each, to)?;
            }
            let ledger = |row: usize| Self::ledger(&records[row * STEP_RECORD_BYTES..][..STEP_RECORD_BYTES]);
            problem.check_events_from(events, ledger)?;
        }
        engine.bind()?;
        let plan = StepPlan::new(engine, &self.places, problem.options(), problem.shape(), problem.dtype())?;
        let indices: Vec<i32> = entries.iter().map(|&entry| entry as i32).collect();
        let taus: Vec<f32> = (0..heads).map(|head| problem.options().tau.of(head)).collect();
        let mut arena = Arena::default();
        let list = arena.array(bytes_of(&indices));
        let inputs = arena.inputs(problem, &taus);
        let results = Results::room(&mut arena, problem);
        let memory = arena.upload(engine)?;
        let base = memory.address();
        plan.launch(
            &self.bank,
            base + list as u64,
            &inputs.raw(base),
            &results.raw(base),
            engine.raw_stream(),
        )?;
        results.download(engine, &memory, problem)
    }

    fn plan_prefill(&self, engine: &Engine, call: &Call<'_>) -> Result<PrefillPlan> {
        let plan = engine.plan(&Call { final_cache: true, ..*call })?;
        let dims = call.shape.cache_dims();
        let mut arena = Arena::default();
        let initial = CacheOffsets::room(&mut arena, dims, call.options.read);
        let last = CacheOffsets::room(&mut arena, dims, call.options.read);
        let forward = arena.room(plan.workspace_bytes());
        Ok(PrefillPlan { plan, initial, last, forward, bytes: arena.bytes() })
    }

    /// # Safety
    /// As [`Entries::launch_prefill`].
    unsafe fn launch_prefill(
        &self,
        engine: &Engine,
        plan: &PrefillPlan,
        (from, to): (DevicePointer, DevicePointer),
        inputs: &RawInputs,
        outputs: &RawOutputs,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        engine.bind()?;
        let (base, given) = workspace;
        if given < plan.bytes {
            return Err(Error::Workspace { expected: plan.bytes, given });
        }
        let (initial, last) = (plan.initial.raw(base), plan.last.raw(base));
        let inputs = RawInputs { cache: Some(initial), ..*inputs };
        let outputs = RawOutputs { cache: Some(last), ..*outputs };
        let forward = (base + plan.forward as u64, plan.plan.workspace_bytes());
        raw::check(&plan.plan, engine.ordinal(), &inputs, &outputs, forward)?;
        let sequences = plan.plan.shape.sequences;
        self.gather(engine, from, &initial, sequences)?;
        // SAFETY: the caches are of the workspace, laid out for this plan; the rest as the caller says.
        unsafe { engine.launch(&plan.plan, &inputs, &outputs, forward, None) }?;
        self.scatter(engine, to, &last, sequences)
    }

    fn prefill(&self, engine: &Engine, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> Result<Step> {
        self.roster.check_prefill(problem, from, to)?;
        if problem.inputs().events.is_some() {
            // The log is checked from where the entries stand.
            let cache = self.export(engine, from)?;
            let inputs = crate::Inputs { cache: Some(&cache), ..*problem.inputs() };
            Problem::new(problem.options(), inputs)?.check_forward()?;
        }
        let call = Call::of(problem);
        let plan = self.plan_prefill(engine, &call)?;
        let indices = |entries: &[usize]| entries.iter().map(|&entry| entry as i32).collect::<Vec<_>>();
        let (from, to) = (indices(from), indices(to));
        let heads = problem.shape().value_heads;
        let taus: Vec<f32> = (0..heads).map(|head| problem.options().tau.of(head)).collect();
        let mut arena = Arena::default();
        let (from, to) = (arena.array(bytes_of(&from)), arena.array(bytes_of(&to)));
        let inputs = arena.inputs(problem, &taus);
        let results = Results::room(&mut arena, problem);
        let workspace = arena.room(plan.workspace_bytes());
        let memory = arena.upload(engine)?;
        let base = memory.address();
        let lists = (base + from as u64, base + to as u64);
        let workspace = (base + workspace as u64, plan.workspace_bytes());
        // SAFETY: every address is of `memory`, of the sizes that a validated problem has; entries, log and offsets
        // have been validated on the host.
        unsafe {
            self.launch_prefill(engine, &plan, lists, &inputs.raw(base), &results.raw(base), workspace)
        }?;
        results.download(engine, &memory, problem)
    }
}

/// A step of chronological caches, chosen once: entries in the workspace, for the time of a launch.
#[derive(Debug, Clone)]
pub struct CacheStepPlan {
    places: Places,
    step: StepPlan,
}

impl CacheStepPlan {
    pub(super) fn new(engine: &Engine, call: &Call<'_>) -> Result<CacheStepPlan> {
        let Call { options, shape, dtype, .. } = call;
        if shape.time != 1 {
            return Err(Error::Shape {
                name: "q",
                expected: "[B,T,H,dk] with T = 1 for a step".to_owned(),
                given: format!("{:?}", [shape.batch, shape.time, shape.heads, shape.dk]),
            });
        }
        let spec = EntrySpec::of(options, shape, shape.sequences, StateDtype::F32);
        check_shape(shape)?;
        // Counts what Places::new multiplies.
        Roster::check_spec(&spec)?;
        let places = Places::new(engine, spec)?;
        Ok(CacheStepPlan { places, step: StepPlan::new(engine, &places, options, shape, *dtype)? })
    }

    /// Bytes of workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.list() + 4 * self.step.shape.sequences
    }

    /// Where in the workspace the rows' entries are listed.
    fn list(&self) -> usize {
        self.places.bytes.next_multiple_of(16)
    }

    /// Addresses are checked here; the context is bound.
    pub(super) fn launch(
        &self,
        engine: &Engine,
        inputs: &RawInputs,
        outputs: &RawOutputs,
        cache: &RawCache,
        workspace: (DevicePointer, usize),
    ) -> Result<()> {
        let sequences = self.step.shape.sequences;
        let ordinal = engine.ordinal();
        raw::check_step(&self.step, ordinal, None, inputs, outputs, workspace)?;
        raw::check_step_cache(&self.step, ordinal, cache, workspace, self.workspace_bytes())?;
        if sequences == 0 {
            return Ok(());
        }
        let (places, bank) = (&self.places, self.places.bank(workspace.0));
        let (zeros, stream) = (places.bytes - places.records, engine.raw_stream());
        // SAFETY: in the workspace, which is as long as was checked; the stream is one of the bound context.
        unsafe { call!(cuMemsetD8Async(workspace.0 + places.records as u64, 0, zeros, stream)) }?;
        let list = workspace.0 + self.list() as u64;
        places.move_cache(engine, &places.scatter, &bank, (0, list), cache, sequences)?;
        self.step.launch(&bank, list, inputs, outputs, stream)?;
        places.move_cache(engine, &places.gather, &bank, (0, 0), cache, sequences)
    }
}

/// [`crate::Engine::step`]: a cache of the host, copied to the GPU and back.
pub(super) fn step_cache(engine: &Engine, problem: &Problem<'_>, cache: &mut Cache) -> Result<Step> {
    problem.check_step(cache)?;
    engine.bind()?;
    let plan = CacheStepPlan::new(engine, &Call::of(problem))?;
    let (dims, read) = (cache.dims, problem.options().read);
    let taus: Vec<f32> = (0..dims.value_heads).map(|head| problem.options().tau.of(head)).collect();
    let (step, moved) = {
        let mut arena = Arena::default();
        let inputs = arena.inputs(problem, &taus);
        let moved = CacheOffsets::of(&mut arena, cache);
        let results = Results::room(&mut arena, problem);
        let workspace = arena.room(plan.workspace_bytes());
        let memory = arena.upload(engine)?;
        let base = memory.address();
        let workspace = (base + workspace as u64, plan.workspace_bytes());
        plan.launch(engine, &inputs.raw(base), &results.raw(base), &moved.raw(base), workspace)?;
        (results.download(engine, &memory, problem)?, moved.download(engine, &memory, dims, read)?)
    };
    *cache = moved;
    Ok(step)
}

impl CacheOffsets {
    /// Room for a chronological cache.
    pub(super) fn room(arena: &mut Arena<'_>, dims: CacheDims, read: Read) -> Self {
        let rows = dims.rows();
        CacheOffsets {
            states: arena.room(rows * dims.bank() * 4),
            len: arena.room(rows * 4),
            tokens: arena.room(rows * dims.capacity * 4),
            drift: arena.room(rows * dims.capacity * 4),
            open: arena.room(rows * dims.state() * 4),
            keys: (read == Read::Routed).then(|| arena.room(rows * dims.key_bank() * 4)),
        }
    }

    /// Copies it to the host.
    pub(super) fn download(
        &self,
        engine: &Engine,
        memory: &Memory,
        dims: CacheDims,
        read: Read,
    ) -> Result<Cache> {
        let mut cache = Cache::empty(dims, read);
        let get = |offset, to: &mut [u8]| memory.download(offset, to, engine.raw_stream());
        get(self.states, bytes_of_mut(&mut cache.states))?;
        get(self.len, bytes_of_mut(&mut cache.len))?;
        get(self.tokens, bytes_of_mut(&mut cache.tokens))?;
        get(self.drift, bytes_of_mut(&mut cache.drift))?;
        get(self.open, bytes_of_mut(&mut cache.open))?;
        if let (Some(offset), Some(keys)) = (self.keys, &mut cache.keys) {
            get(offset, bytes_of_mut(keys))?;
        }
        Ok(cache)
    }
}

impl crate::entries::Entries for Entries {
    fn spec(&self) -> &EntrySpec {
        self.pool.spec()
    }

    fn take(&mut self) -> Result<usize> {
        self.pool.take(&self.engine)
    }

    fn release(&mut self, entry: usize) -> Result<()> {
        self.pool.roster.release(entry)
    }

    fn reset(&mut self, entry: usize) -> Result<()> {
        self.pool.roster.check("entry", &[entry])?;
        self.pool.clear(&self.engine, entry)
    }

    fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        self.pool.roster.check("from", &[from])?;
        self.pool.roster.check("to", &[to])?;
        if from == to { Ok(()) } else { self.pool.copy(&self.engine, from, to) }
    }

    fn export(&self, entries: &[usize]) -> Result<Cache> {
        self.pool.roster.check("entries", entries)?;
        self.pool.export(&self.engine, entries)
    }

    fn import(&mut self, entries: &[usize], cache: &Cache) -> Result<()> {
        self.pool.roster.check_import(entries, cache)?;
        self.pool.import(&self.engine, entries, cache)
    }

    fn step(&mut self, problem: &Problem<'_>, entries: &[usize]) -> Result<Step> {
        self.pool.step(&self.engine, problem, entries)
    }

    fn prefill(&mut self, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> Result<Step> {
        self.pool.prefill(&self.engine, problem, from, to)
    }
}
