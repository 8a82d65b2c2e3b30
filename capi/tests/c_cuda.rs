//! Forward, backward and step through the C ABI on a GPU's memory: the bits of the engine's own calls, judged by the CPU
//! engine; workspaces exactly as long as asked for, and poisoned; replayed from a CUDA graph.
//!
//! Skips, with a line that says so, where there is no GPU; `DLA_CUDA=require` fails instead. `scripts/emulated` runs it
//! without one.

mod common;

use common::{message, options};
use dla::check::{Case, Recipe, relative_error};
use dla::cuda::{Engine, Graph, Memory};
use dla::{
    Buffer as Elements, Cache, CacheGradients, Data, Dtype, Engine as _, Inputs, Merge, Options, Problem,
    Read, Recurrence, SlotOrder, Soft, Tau, cpu,
};
use dla_capi::*;
use std::ffi::c_void;
use std::ptr::null;

fn engine() -> Option<Engine> {
    match Engine::new(0) {
        Ok(engine) => Some(engine),
        Err(error) => {
            assert!(std::env::var_os("DLA_CUDA").is_none_or(|value| value != "require"), "{error}");
            println!("SKIPPED: no GPU: {error}");
            None
        }
    }
}

/// Bytes of plain numbers.
fn bytes_of<T: Copy>(x: &[T]) -> &[u8] {
    // SAFETY: numbers without padding.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

fn buffer_bytes(x: &Elements) -> &[u8] {
    match x.data() {
        Data::F32(x) => bytes_of(x),
        Data::Bf16(x) => bytes_of(x),
        Data::F16(x) => bytes_of(x),
    }
}

/// Arrays on the GPU.
struct Device<'a> {
    engine: &'a Engine,
    held: Vec<Memory>,
}

impl Device<'_> {
    fn keep(&mut self, memory: Memory) -> Buffer {
        let data = std::ptr::with_exposed_provenance_mut::<c_void>(memory.address() as usize);
        let bytes = memory.bytes();
        self.held.push(memory);
        Buffer { data, bytes }
    }

    /// Room for a result, all bits set: NaN.
    fn poisoned(&mut self, bytes: usize) -> Buffer {
        let memory = self.engine.allocate(bytes).unwrap();
        self.engine.fill(&memory, 0xff).unwrap();
        self.keep(memory)
    }

    fn of(&mut self, x: &[u8]) -> Buffer {
        let memory = self.engine.allocate(x.len()).unwrap();
        self.engine.upload(&memory, 0, x).unwrap();
        self.keep(memory)
    }

    fn floats(&mut self, x: Option<&Vec<f32>>) -> Buffer {
        x.map_or(Buffer::ABSENT, |x| self.of(bytes_of(x)))
    }

    fn room_of(&mut self, x: Option<&Vec<f32>>) -> Buffer {
        x.map_or(Buffer::ABSENT, |x| self.poisoned(size_of_val(&x[..])))
    }

    fn cache(&mut self, cache: &Cache) -> CacheArrays {
        CacheArrays {
            states: self.of(bytes_of(&cache.states)),
            len: self.of(bytes_of(&cache.len)),
            tokens: self.of(bytes_of(&cache.tokens)),
            drift: self.of(bytes_of(&cache.drift)),
            open: self.of(bytes_of(&cache.open)),
            keys: self.floats(cache.keys.as_ref()),
        }
    }

    /// Room for a cache like this one.
    fn room_of_cache(&mut self, like: &Cache) -> CacheArrays {
        let mut room = |bytes: &[u8]| self.poisoned(bytes.len());
        CacheArrays {
            states: room(bytes_of(&like.states)),
            len: room(bytes_of(&like.len)),
            tokens: room(bytes_of(&like.tokens)),
            drift: room(bytes_of(&like.drift)),
            open: room(bytes_of(&like.open)),
            keys: like.keys.as_ref().map_or(Buffer::ABSENT, |keys| room(bytes_of(keys))),
        }
    }

    fn gradients(&mut self, cache: &CacheGradients) -> CacheArrays {
        CacheArrays {
            states: self.of(bytes_of(&cache.states)),
            open: self.of(bytes_of(&cache.open)),
            keys: self.floats(cache.keys.as_ref()),
            ..CacheArrays::ABSENT
        }
    }

    /// The arguments of a case; its cache must stand still, and is put into `cache`.
    fn call(&mut self, case: &Case, cache: &mut CacheArrays) -> Call {
        let recipe = &case.recipe;
        let columns = recipe.options.capacity + recipe.extra_columns;
        let route = case.route.as_ref();
        if let Some(given) = &case.cache {
            *cache = self.cache(given);
        }
        Call {
            device: DeviceCode::Cuda as i32,
            stream: self.engine.raw_stream().cast(),
            dtype: recipe.dtype as i32,
            batch: recipe.batch,
            time: recipe.time,
            heads: recipe.heads,
            value_heads: recipe.value_heads,
            dk: recipe.dk,
            dv: recipe.dv,
            sequences: recipe.packed.as_ref().map_or(0, Vec::len),
            lambda_columns: columns,
            logit_columns: columns,
            q: self.of(buffer_bytes(&case.q)),
            k: self.of(buffer_bytes(&case.k)),
            v: self.of(buffer_bytes(&case.v)),
            g: self.floats(case.g.as_ref()),
            beta: self.floats(case.beta.as_ref()),
            lambda: self.floats(case.lambda.as_ref()),
            route_slope: self.floats(route.map(|route| &route.slope)),
            route_bias: self.floats(route.map(|route| &route.bias)),
            route_logits: self.floats(route.and_then(|route| route.logits.as_ref())),
            tau: match &recipe.options.tau {
                Tau::PerHead(taus) => self.of(bytes_of(taus)),
                Tau::PerCall(_) => Buffer::ABSENT,
            },
            cu_seqlens: case.cu_seqlens.as_ref().map_or(Buffer::ABSENT, |x| self.of(bytes_of(x))),
            cache: if case.cache.is_some() { cache } else { null() },
            ..Call::default()
        }
    }

    fn get(&self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.bytes];
        if let Some(memory) = self.held.iter().find(|memory| memory.address() == buffer.data.addr() as u64)
            && buffer.bytes > 0
        {
            self.engine.download(memory, 0, &mut bytes).unwrap();
        }
        bytes
    }

    fn get_f32(&self, buffer: Buffer) -> Vec<f32> {
        self.get(buffer).chunks_exact(4).map(|x| f32::from_ne_bytes(x.try_into().unwrap())).collect()
    }

    fn get_elements(&self, dtype: Dtype, buffer: Buffer) -> Elements {
        let bytes = self.get(buffer);
        let halves = || bytes.chunks_exact(2).map(|x| u16::from_ne_bytes(x.try_into().unwrap()));
        match dtype {
            Dtype::F32 => Elements::F32(self.get_f32(buffer)),
            Dtype::Bf16 => Elements::Bf16(halves().map(half::bf16::from_bits).collect()),
            Dtype::F16 => Elements::F16(halves().map(half::f16::from_bits).collect()),
        }
    }
}

/// A call's workspace of exactly the bytes that `query` says; the address is null in the query.
fn with_workspace(
    device: &mut Device<'_>,
    call: &mut Call,
    query: impl FnOnce(&Call, &mut usize) -> Status,
) -> usize {
    let mut bytes = 0;
    assert_eq!(query(call, &mut bytes), Status::Ok, "{}", message());
    call.workspace = device.poisoned(bytes);
    bytes
}

fn close(name: &str, x: &[f64], expected: &[f64], bound: f64) {
    let (error, worst) = relative_error(x, expected);
    assert!(error <= bound, "{name}: off by {error:.2e}, most at element {worst}, bound {bound:.0e}");
}

fn elements(x: &Elements) -> Vec<f64> {
    match x.data() {
        Data::F32(x) => wide(x),
        Data::Bf16(x) => x.iter().map(|x| x.to_f64()).collect(),
        Data::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// Recipes that together take every optional argument.
fn recipes() -> Vec<Recipe> {
    let base = Recipe {
        time: 90,
        batch: 2,
        value_heads: 2,
        boundary_rate: 0.6,
        options: Options { capacity: 4, ..Options::default() },
        ..Recipe::default()
    };
    let of = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = base.clone();
        change(&mut recipe);
        recipe
    };
    vec![
        of(&|r| r.decay = None),
        of(&|r| {
            r.options.recurrence = Recurrence::GatedDelta;
            r.options.qk_l2norm = true;
            r.dtype = Dtype::Bf16;
            r.resumed = true;
            r.extra_columns = 2;
        }),
        of(&|r| {
            r.options.read = Read::Routed;
            r.options.merge = Merge::Mass;
            r.options.soft = Some(Soft { temperature: 0.1, through_drift: false });
            r.logits = true;
            r.batch = 1;
            r.packed = Some(vec![70, 0, 20]);
        }),
        of(&|r| {
            r.options.recurrence = Recurrence::GatedDelta;
            r.options.read = Read::Routed;
            r.options.slot_order = SlotOrder::NewestFirst;
            r.options.soft = Some(Soft { temperature: 0.1, through_drift: true });
            r.options.tau = Tau::PerHead(vec![0.5, 0.7]);
            r.options.qk_l2norm = true;
            r.resumed = true;
            r.final_gradient = true;
        }),
        of(&|r| {
            r.options.merge = Merge::Mass;
            r.dtype = Dtype::F16;
            r.resumed = true;
            r.final_gradient = true;
        }),
    ]
}

#[test]
fn both_passes_are_the_engines_bits() {
    let Some(engine) = engine() else { return };
    for (index, recipe) in recipes().into_iter().enumerate() {
        let seed = rand::random_range(0..1u64 << 40);
        let case = recipe.draw(seed);
        println!("{}, seed {seed}", case.describe());
        let problem = case.problem().unwrap();
        let expected = engine.forward(&problem).unwrap();
        let gradients = engine.backward(&problem, &expected.events, &case.upstream()).unwrap();
        let (dtype, routed) = (recipe.dtype, recipe.options.read == Read::Routed);

        let mut device = Device { engine: &engine, held: Vec::new() };
        let mut initial = CacheArrays::ABSENT;
        let settings = options(&recipe.options);
        let mut call = device.call(&case, &mut initial);
        let tokens = problem.shape().tokens() * recipe.value_heads;
        // All results, or those alone that the backward needs.
        let all = index % 2 == 1;
        let wish = |device: &mut Device<'_>, wanted: bool, bytes| {
            if wanted { device.poisoned(bytes) } else { Buffer::ABSENT }
        };
        let last = device.room_of_cache(&expected.cache);
        let results = Results {
            o: device.poisoned(buffer_bytes(&expected.o).len()),
            drift: wish(&mut device, all, tokens * 4),
            events: device.poisoned(tokens),
            lambda: wish(&mut device, all && routed, tokens * recipe.options.capacity * 4),
            cache: if all { &last } else { null() },
            ..Results::default()
        };
        // SAFETY: structs and buffers are as they say, here and below.
        with_workspace(&mut device, &mut call, |call, bytes| unsafe {
            dla_forward_workspace(&settings, call, &results, bytes)
        });
        // SAFETY: as above.
        let status = unsafe { dla_forward(&settings, &call, &results) };
        assert_eq!(status, Status::Ok, "{}", message());
        assert_eq!(device.get_elements(dtype, results.o), expected.o);
        assert_eq!(device.get(results.events), expected.events);
        if all {
            assert_eq!(device.get_f32(results.drift), expected.drift);
            assert_eq!(device.get_f32(last.states), expected.cache.states);
            assert_eq!(device.get(last.len), bytes_of(&expected.cache.len));
            assert_eq!(device.get(last.tokens), bytes_of(&expected.cache.tokens));
            assert_eq!(device.get(last.drift), bytes_of(&expected.cache.drift));
            assert_eq!(device.get_f32(last.open), expected.cache.open);
            if let (Some(keys), Some(lambda)) = (&expected.cache.keys, &expected.lambda) {
                assert_eq!(device.get_f32(last.keys), *keys);
                assert_eq!(device.get_f32(results.lambda), *lambda);
            }
        }

        let d_last = case.d_cache.as_ref().map(|cache| device.gradients(cache));
        let upstream = Upstream {
            o: device.of(buffer_bytes(&case.d_o)),
            cache: d_last.as_ref().map_or(null(), |arrays| arrays),
            // Kept, or computed again.
            drift: results.drift,
            lambda: results.lambda,
            ..Upstream::default()
        };
        let route = gradients.route.as_ref();
        let soft = gradients.soft.as_ref();
        let d_first = gradients.cache.as_ref().map(|cache| CacheArrays {
            states: device.room_of(Some(&cache.states)),
            open: device.room_of(Some(&cache.open)),
            keys: device.room_of(cache.keys.as_ref()),
            ..CacheArrays::ABSENT
        });
        let whole = Gradients {
            q: device.poisoned(buffer_bytes(&gradients.q).len()),
            k: device.poisoned(buffer_bytes(&gradients.k).len()),
            v: device.poisoned(buffer_bytes(&gradients.v).len()),
            g: device.room_of(gradients.g.as_ref()),
            beta: device.room_of(gradients.beta.as_ref()),
            lambda: device.room_of(gradients.lambda.as_ref()),
            route_slope: device.room_of(route.map(|route| &route.slope)),
            route_bias: device.room_of(route.map(|route| &route.bias)),
            route_logits: device.room_of(route.and_then(|route| route.logits.as_ref())),
            tau: device.room_of(soft.map(|soft| &soft.tau)),
            drift: device.room_of(soft.map(|soft| &soft.drift)),
            cache: d_first.as_ref().map_or(null(), |arrays| arrays),
            ..Gradients::default()
        };
        call.events = results.events;
        // Of k alone; then all.
        let alone = Gradients { k: device.poisoned(whole.k.bytes), ..Gradients::default() };
        for (wanted, all) in [(&alone, false), (&whole, true)] {
            with_workspace(&mut device, &mut call, |call, bytes| unsafe {
                dla_backward_workspace(&settings, call, &upstream, wanted, bytes)
            });
            // SAFETY: as above.
            let status = unsafe { dla_backward(&settings, &call, &upstream, wanted) };
            assert_eq!(status, Status::Ok, "{}", message());
            assert_eq!(device.get_elements(dtype, wanted.k), gradients.k);
            if !all {
                continue;
            }
            assert_eq!(device.get_elements(dtype, wanted.q), gradients.q);
            assert_eq!(device.get_elements(dtype, wanted.v), gradients.v);
            let same = |name: &str, given: Buffer, expected: Option<&Vec<f32>>| {
                if let Some(expected) = expected {
                    assert_eq!(&device.get_f32(given), expected, "{name}");
                }
            };
            same("dg", wanted.g, gradients.g.as_ref());
            same("dbeta", wanted.beta, gradients.beta.as_ref());
            same("dlambda", wanted.lambda, gradients.lambda.as_ref());
            same("dslope", wanted.route_slope, route.map(|route| &route.slope));
            same("dbias", wanted.route_bias, route.map(|route| &route.bias));
            same("dlogits", wanted.route_logits, route.and_then(|route| route.logits.as_ref()));
            same("dtau", wanted.tau, soft.map(|soft| &soft.tau));
            same("ddrift", wanted.drift, soft.map(|soft| &soft.drift));
            if let (Some(arrays), Some(cache)) = (&d_first, &gradients.cache) {
                same("dcache_states", arrays.states, Some(&cache.states));
                same("dcache_open", arrays.open, Some(&cache.open));
                same("dcache_keys", arrays.keys, cache.keys.as_ref());
            }
        }

        // The engine's own calls by the CPU's, along the same log.
        let bound = match dtype {
            Dtype::Bf16 => 2e-2,
            Dtype::F16 => 5e-3,
            Dtype::F32 => 1e-3,
        };
        let log = expected.events.as_slice();
        let along =
            Problem::new(problem.options(), Inputs { events: Some(log), ..*problem.inputs() }).unwrap();
        let judge = cpu::Engine.forward(&along).unwrap();
        close("o", &elements(&expected.o), &elements(&judge.o), bound);
        let judge = cpu::Engine.backward(&problem, log, &case.upstream()).unwrap();
        for (name, x, y) in
            [("dq", &gradients.q, &judge.q), ("dk", &gradients.k, &judge.k), ("dv", &gradients.v, &judge.v)]
        {
            close(name, &elements(x), &elements(y), bound);
        }
        if let (Some(x), Some(y)) = (&gradients.lambda, &judge.lambda) {
            close("dlambda", &wide(x), &wide(y), bound);
        }
        if let (Some(x), Some(y)) = (&gradients.cache, &judge.cache) {
            close("dcache_states", &wide(&x.states), &wide(&y.states), bound);
        }
    }
}

#[test]
fn steps_in_place_are_the_engines_bits() {
    let Some(engine) = engine() else { return };
    for (recurrence, read, dtype) in
        [(Recurrence::Gated, Read::Given, Dtype::Bf16), (Recurrence::GatedDelta, Read::Routed, Dtype::F32)]
    {
        let options = Options { recurrence, read, capacity: 3, ..Options::default() };
        let recipe = Recipe {
            options,
            batch: 3,
            time: 1,
            value_heads: 2,
            resumed: true,
            dtype,
            logits: true,
            ..Recipe::default()
        };
        let seed = rand::random_range(0..1u64 << 40);
        let case = recipe.draw(seed);
        println!("{}, seed {seed}", case.describe());
        let mut cache = case.cache.clone().unwrap();
        let mut expected_by_cpu = cache.clone();
        let inputs = Inputs { cache: None, ..case.inputs() };
        let problem = Problem::new(&case.recipe.options, inputs).unwrap();

        let mut device = Device { engine: &engine, held: Vec::new() };
        let mut states = CacheArrays::ABSENT;
        let settings = common::options(&case.recipe.options);
        let mut call = device.call(&case, &mut states);
        call.cache = null();
        let results = Results {
            o: device.poisoned(3 * 2 * 16 * dtype.bytes()),
            events: device.poisoned(3 * 2),
            ..Results::default()
        };
        // SAFETY: structs and buffers are as they say, here and below.
        with_workspace(&mut device, &mut call, |call, bytes| unsafe {
            dla_step_workspace(&settings, call, &results, bytes)
        });
        // The first also makes the plan, which a capture may not.
        let step = || {
            // SAFETY: as above.
            let status = unsafe { dla_step(&settings, &call, &states, &results) };
            assert_eq!(status, Status::Ok, "{}", message());
        };
        let check = |cache: &Cache, o: &Elements, events: &[u8]| {
            assert_eq!(device.get_elements(dtype, results.o), *o);
            assert_eq!(device.get(results.events), events);
            assert_eq!(device.get_f32(states.states), cache.states);
            assert_eq!(device.get(states.len), bytes_of(&cache.len));
            assert_eq!(device.get(states.tokens), bytes_of(&cache.tokens));
            assert_eq!(device.get(states.drift), bytes_of(&cache.drift));
            assert_eq!(device.get_f32(states.open), cache.open);
            if let Some(keys) = &cache.keys {
                assert_eq!(device.get_f32(states.keys), *keys);
            }
        };
        let mut graph = None;
        for turn in 0..4 {
            let expected = engine.step(&problem, &mut cache).unwrap();
            match (turn, &mut graph) {
                (0, _) => step(),
                (_, None) => {
                    let mut captured = Graph::capture(&engine, || {
                        step();
                        Ok(())
                    })
                    .unwrap();
                    // SAFETY: the arrays are still there.
                    unsafe { captured.replay(&engine) }.unwrap();
                    graph = Some(captured);
                }
                // SAFETY: as above.
                (_, Some(graph)) => unsafe { graph.replay(&engine) }.unwrap(),
            }
            check(&cache, &expected.o, &expected.events);
            let along = Problem::new(
                problem.options(),
                Inputs { events: Some(&expected.events), ..*problem.inputs() },
            );
            let judge = cpu::Engine.step(&along.unwrap(), &mut expected_by_cpu).unwrap();
            let bound = if dtype == Dtype::Bf16 { 1e-2 } else { 1e-4 };
            close("o", &elements(&expected.o), &elements(&judge.o), bound);
            close("states", &wide(&cache.states), &wide(&expected_by_cpu.states), 1e-4);
        }
    }
}

/// Forward and backward of one step of training in a graph, replayed on other numbers.
#[test]
fn both_passes_replay_from_a_graph() {
    let Some(engine) = engine() else { return };
    let mut options = recipes()[2].options.clone();
    options.soft = None;
    let recipe = Recipe { options, logits: true, time: 70, value_heads: 2, ..Recipe::default() };
    let seed = rand::random_range(0..1u64 << 40);
    println!("seed {seed}");
    let (case, other) = (recipe.draw(seed), recipe.draw(seed + 1));
    let mut device = Device { engine: &engine, held: Vec::new() };
    let mut initial = CacheArrays::ABSENT;
    let settings = common::options(&recipe.options);
    let mut call = device.call(&case, &mut initial);
    let tokens = recipe.time * recipe.value_heads;
    let results = Results {
        o: device.poisoned(tokens * recipe.dv * 4),
        events: device.poisoned(tokens),
        ..Results::default()
    };
    let upstream = Upstream { o: device.of(buffer_bytes(&case.d_o)), ..Upstream::default() };
    let wanted = Gradients {
        q: device.poisoned(call.q.bytes),
        route_slope: device.poisoned(call.route_slope.bytes),
        ..Gradients::default()
    };
    let mut replay = call;
    replay.events = results.events;
    // SAFETY: structs and buffers are as they say, here and below.
    with_workspace(&mut device, &mut call, |call, bytes| unsafe {
        dla_forward_workspace(&settings, call, &results, bytes)
    });
    // SAFETY: as above.
    let needed = with_workspace(&mut device, &mut replay, |call, bytes| unsafe {
        dla_backward_workspace(&settings, call, &upstream, &wanted, bytes)
    });
    let mut graph = Graph::capture(&engine, || {
        // SAFETY: as above.
        unsafe {
            assert_eq!(dla_forward(&settings, &call, &results), Status::Ok, "{}", message());
            let status = dla_backward(&settings, &replay, &upstream, &wanted);
            assert_eq!(status, Status::Ok, "{}", message());
        }
        Ok(())
    })
    .unwrap();
    for case in [&case, &other] {
        for (buffer, x) in [(call.q, &case.q), (call.k, &case.k), (call.v, &case.v), (upstream.o, &case.d_o)]
        {
            let memory = device.held.iter().find(|memory| memory.address() == buffer.data.addr() as u64);
            engine.upload(memory.unwrap(), 0, buffer_bytes(x)).unwrap();
        }
        // SAFETY: the arrays are still there.
        unsafe { graph.replay(&engine) }.unwrap();
        // The gates and the route of the first.
        let (q, k, v, d_o) = (case.q.clone(), case.k.clone(), case.v.clone(), case.d_o.clone());
        let same = Case { q, k, v, d_o, ..recipe.draw(seed) };
        let problem = same.problem().unwrap();
        let expected = engine.forward(&problem).unwrap();
        let gradients = engine.backward(&problem, &expected.events, &same.upstream()).unwrap();
        assert_eq!(device.get_elements(recipe.dtype, results.o), expected.o);
        assert_eq!(device.get_elements(recipe.dtype, wanted.q), gradients.q);
        assert_eq!(device.get_f32(wanted.route_slope), gradients.route.unwrap().slope);
    }

    // One byte less is refused, and by its name.
    replay.workspace.bytes = needed - 1;
    // SAFETY: as above.
    let status = unsafe { dla_backward(&settings, &replay, &upstream, &wanted) };
    assert_eq!(status, Status::Workspace, "{}", message());
    // A buffer of the host is.
    replay.workspace.bytes = needed;
    let host = vec![0f32; call.q.bytes / 4];
    replay.q.data = host.as_ptr().cast_mut().cast();
    // SAFETY: refused before it is read.
    let status = unsafe { dla_backward(&settings, &replay, &upstream, &wanted) };
    assert!(status == Status::Pointer && message().contains("q: "), "{status:?} {}", message());
}

/// What the library holds for a caller is what a caller's own arrays are.
#[test]
fn a_handle_goes_through_forward_and_steps() {
    let Some(engine) = engine() else { return };
    let options = Options { capacity: 3, ..Options::default() };
    let recipe = Recipe { options, batch: 2, time: 1, ..Recipe::default() };
    let case = recipe.draw(rand::random_range(0..1u64 << 40));
    let mut device = Device { engine: &engine, held: Vec::new() };
    let mut initial = CacheArrays::ABSENT;
    let settings = common::options(&recipe.options);
    let mut call = device.call(&case, &mut initial);
    let (mut handle, mut view) = (std::ptr::null_mut(), CacheArrays::ABSENT);
    // SAFETY: structs are as they say, here and below.
    unsafe {
        assert_eq!(dla_cache_create(&settings, &call, &mut handle), Status::Ok, "{}", message());
        assert_eq!(dla_cache_view(handle, &mut view), Status::Ok);
    }
    let results = Results { o: device.poisoned(2 * 16 * 4), ..Results::default() };
    with_workspace(&mut device, &mut call, |call, bytes| unsafe {
        dla_step_workspace(&settings, call, &results, bytes)
    });
    let problem = case.problem().unwrap();
    let mut cache = Cache::empty(problem.shape().cache_dims(), Read::Given);
    for _ in 0..3 {
        // SAFETY: as above.
        let status = unsafe { dla_step(&settings, &call, &view, &results) };
        assert_eq!(status, Status::Ok, "{}", message());
        let expected = engine.step(&problem, &mut cache).unwrap();
        assert_eq!(device.get_elements(recipe.dtype, results.o), expected.o);
    }
    engine.synchronize().unwrap();
    // SAFETY: of this library, destroyed once.
    unsafe { dla_cache_destroy(handle) };
}

/// Entries of a handle are the engine's own: a prefill, steps of one and more tokens, a captured step that serves other
/// sequences, caches out and in; and what is refused.
#[test]
fn entries_are_the_engines() {
    use dla::Entries as _;
    if engine().is_none() {
        return;
    }
    // Its own stream: what other tests launch is not to be captured.
    let engine = std::sync::Arc::new(Engine::new(0).unwrap());
    for (recurrence, read, dtype, states) in [
        (Recurrence::Gated, Read::Given, Dtype::Bf16, StateDtypeCode::Bf16),
        (Recurrence::GatedDelta, Read::Routed, Dtype::F32, StateDtypeCode::F32),
    ] {
        let options = Options { recurrence, read, capacity: 3, ..Options::default() };
        let routed = read == Read::Routed;
        let recipe = Recipe { options, batch: 2, value_heads: 2, dtype, logits: routed, ..Recipe::default() };
        let seed = rand::random_range(0..1u64 << 40);
        let cases: Vec<Case> = [(20, 0), (1, 1), (4, 2), (1, 3)]
            .map(|(time, more)| Recipe { time, ..recipe.clone() }.draw(seed + more))
            .into();
        println!("{}, seed {seed}", cases[0].describe());
        let shape = *cases[0].problem().unwrap().shape();
        let kept = match states {
            StateDtypeCode::F32 => dla::StateDtype::F32,
            StateDtypeCode::Bf16 => dla::StateDtype::Bf16,
        };
        let spec = dla::EntrySpec::of(&recipe.options, &shape, 5, kept);
        let mut own = dla::cuda::Entries::new(engine.clone(), spec).unwrap();

        let mut device = Device { engine: &engine, held: Vec::new() };
        let mut none = CacheArrays::ABSENT;
        let settings = common::options(&recipe.options);
        let calls: Vec<Call> = cases.iter().map(|case| device.call(case, &mut none)).collect();
        let results: Vec<Results> = cases
            .iter()
            .map(|case| {
                let tokens = 2 * case.recipe.time * 2;
                let (o, log) = (device.poisoned(tokens * 16 * dtype.bytes()), device.poisoned(tokens));
                Results { o, events: log, ..Results::default() }
            })
            .collect();
        let mut handle = std::ptr::null_mut();
        // SAFETY: structs and buffers are as they say, here and below.
        unsafe {
            let status = dla_entries_create(&settings, &calls[0], 5, states as i32, &mut handle);
            assert_eq!(status, Status::Ok, "{}", message());
            for expected in 0..5 {
                let mut entry = 9;
                assert_eq!(dla_entries_take(handle, &mut entry), Status::Ok, "{}", message());
                assert_eq!((entry, own.take().unwrap()), (expected, expected));
            }
        }
        let check = |device: &Device<'_>, n: usize, expected: &dla::Step| {
            assert_eq!(device.get_elements(dtype, results[n].o), expected.o);
            assert_eq!(device.get(results[n].events), expected.events);
        };
        let lists = [[3usize, 1], [0, 3]];

        // Both go on from one beginning.
        let mut call = calls[0];
        with_workspace(&mut device, &mut call, |call, bytes| unsafe {
            dla_entries_prefill_workspace(handle, &settings, call, &results[0], bytes)
        });
        let (first, from) = (lists[0], [4usize, 4]);
        let prefill = |call: &Call| unsafe {
            dla_entries_prefill(handle, &settings, call, from.as_ptr(), first.as_ptr(), 2, &results[0])
        };
        assert_eq!(prefill(&call), Status::Ok, "{}", message());
        let problem = |n: usize| cases[n].problem().unwrap();
        check(&device, 0, &own.prefill(&problem(0), &from, &first).unwrap());
        call.workspace.bytes -= 1;
        assert_eq!(prefill(&call), Status::Workspace);

        let step = |n: usize, list: &[usize]| unsafe {
            dla_entries_step(handle, &settings, &calls[n], list.as_ptr(), list.len(), &results[n])
        };
        for (n, list) in [(1, lists[0]), (2, lists[1]), (1, lists[0]), (3, lists[0])] {
            assert_eq!(step(n, &list), Status::Ok, "{}", message());
            check(&device, n, &own.step(&problem(n), &list).unwrap());
        }

        // Captured for one list, replayed for others; a row may rest.
        let mut graph = Graph::capture(&engine, || {
            assert_eq!(step(1, &lists[0]), Status::Ok, "{}", message());
            let refused = |status, says| {
                assert!(status == Status::Unexpected && message().contains(says), "{}", message());
            };
            refused(step(1, &lists[1]), "dla_entries_set_rows");
            refused(prefill(&call), "lists of a prefill");
            Ok(())
        })
        .unwrap();
        for list in [lists[1], lists[0]] {
            // SAFETY: as above; the arrays are still there.
            unsafe {
                let status = dla_entries_set_rows(handle, 2, list.as_ptr(), 2);
                assert_eq!(status, Status::Ok, "{}", message());
                graph.replay(&engine).unwrap();
            }
            check(&device, 1, &own.step(&problem(1), &list).unwrap());
        }
        let before = own.export(&[0, 1, 2, 3]).unwrap();
        // SAFETY: as above.
        unsafe {
            assert_eq!(dla_entries_set_rows(handle, 2, [2usize].as_ptr(), 1), Status::Ok);
            graph.replay(&engine).unwrap();
            assert_eq!(dla_entries_reset(handle, 2), Status::Ok);
        }

        // Out and in.
        let get = |device: &mut Device<'_>, expected: &Cache| {
            let to = device.room_of_cache(expected);
            // SAFETY: as above.
            let status = unsafe { dla_entries_export(handle, [0, 1, 2, 3].as_ptr(), 4, &to) };
            assert_eq!(status, Status::Ok, "{}", message());
            assert_eq!(device.get(to.len), bytes_of(&expected.len));
            assert_eq!(device.get(to.tokens), bytes_of(&expected.tokens));
            assert_eq!(device.get(to.drift), bytes_of(&expected.drift));
            let same = |name: &str, given: Buffer, expected: &[f32]| {
                let given = device.get_f32(given);
                let differs = given.iter().zip(expected).position(|(x, y)| x != y);
                assert!(differs.is_none(), "{name}: first at element {differs:?} of {}", given.len());
            };
            same("states", to.states, &expected.states);
            same("open", to.open, &expected.open);
            same("keys", to.keys, expected.keys.as_deref().unwrap_or_default());
            to
        };
        let arrays = get(&mut device, &before);
        for entry in 0..4 {
            // SAFETY: as above.
            assert_eq!(unsafe { dla_entries_reset(handle, entry) }, Status::Ok);
        }
        // SAFETY: as above; a buffer of the host is refused before it is read.
        unsafe {
            let status = dla_entries_import(handle, [0, 1, 2, 3].as_ptr(), 4, &arrays);
            assert_eq!(status, Status::Ok, "{}", message());
            let host = vec![0f32; arrays.open.bytes / 4];
            let mut foreign = arrays;
            foreign.open.data = host.as_ptr().cast_mut().cast();
            let status = dla_entries_import(handle, [0, 1, 2, 3].as_ptr(), 4, &foreign);
            assert!(status == Status::Pointer && message().contains("cache_open: "), "{}", message());
        }
        // States of bf16 are rounded on the way in.
        own.import(&[0, 1, 2, 3], &before).unwrap();
        let after = own.export(&[0, 1, 2, 3]).unwrap();
        get(&mut device, &after);

        // Refused, and nothing touched.
        assert_eq!(step(1, &[0, 5]), Status::Value);
        assert_eq!(step(1, &[0, 0]), Status::Value);
        // SAFETY: as above.
        unsafe { assert_eq!(dla_entries_release(handle, 4), Status::Ok) };
        assert_eq!(step(1, &[0, 4]), Status::Value, "a freed entry");
        let elsewhere = Call { stream: std::ptr::null_mut(), ..calls[1] };
        // SAFETY: as above.
        unsafe {
            let list = lists[0].as_ptr();
            let status = dla_entries_step(handle, &settings, &elsewhere, list, 2, &results[1]);
            assert!(
                status == Status::Option && message().contains("stream: expected that of the entries"),
                "{}",
                message()
            );
        }
        get(&mut device, &after);
        // SAFETY: of this library, destroyed once.
        unsafe { dla_entries_destroy(handle) };
    }
}
