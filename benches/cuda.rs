//! Every stage of the forward, and forward and backward in all, on GPU 0, over tokens, slots, share of tokens that open a slot and
//! size of a head. By the GPU's own clock: what criterion is given is the time between two events, L2 flushed before every call and
//! inputs taken in turn. Without a GPU nothing is measured. `DLA_CUDA_SMALL=1`: small sizes, for the emulated driver.

use std::time::Duration;

use bytemuck::cast_slice;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dla::check::{Case, Recipe};
use dla::cuda::{
    self, Call, Engine, Memory, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream, Timeline,
};
use dla::{Buffer, Dtype, Error, Options, Read, Recurrence, Shape, Stage};

/// Bytes that are written between two calls, more than any L2 holds.
const FLUSH_BYTES: usize = 256 << 20;

/// Inputs, taken in turn.
const SETS: u64 = 2;

fn small() -> bool {
    std::env::var("DLA_CUDA_SMALL").is_ok_and(|value| value == "1")
}

/// Arrays on the GPU, kept as long as their addresses are used.
struct Arrays<'a> {
    engine: &'a Engine,
    held: Vec<Memory>,
}

impl<'a> Arrays<'a> {
    fn new(engine: &'a Engine) -> Self {
        Arrays { engine, held: Vec::new() }
    }

    fn room(&mut self, bytes: usize) -> Result<u64, Error> {
        let memory = self.engine.allocate(bytes)?;
        let address = memory.address();
        self.held.push(memory);
        Ok(address)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let memory = self.engine.allocate(bytes.len())?;
        self.engine.upload(&memory, 0, bytes)?;
        let address = memory.address();
        self.held.push(memory);
        Ok(address)
    }

    fn floats(&mut self, x: &Option<Vec<f32>>) -> Result<u64, Error> {
        x.as_ref().map_or(Ok(0), |x| self.put(cast_slice(x)))
    }

    fn buffer(&mut self, x: &Buffer) -> Result<u64, Error> {
        match x {
            Buffer::F32(x) => self.put(cast_slice(x)),
            Buffer::Bf16(x) => self.put(cast_slice(x)),
            Buffer::F16(x) => self.put(cast_slice(x)),
        }
    }

    fn inputs(&mut self, case: &Case) -> Result<RawInputs, Error> {
        let Recipe { value_heads, ref options, .. } = case.recipe;
        let taus: Vec<f32> = (0..value_heads).map(|head| options.tau.of(head)).collect();
        let route = case.route.as_ref();
        Ok(RawInputs {
            q: self.buffer(&case.q)?,
            k: self.buffer(&case.k)?,
            v: self.buffer(&case.v)?,
            g: self.floats(&case.g)?,
            beta: self.floats(&case.beta)?,
            lambda: self.floats(&case.lambda)?,
            lambda_columns: options.capacity,
            slope: route.map_or(Ok(0), |route| self.put(cast_slice(&route.slope)))?,
            bias: route.map_or(Ok(0), |route| self.put(cast_slice(&route.bias)))?,
            logit_columns: options.capacity,
            tau: self.put(cast_slice(&taus))?,
            ..RawInputs::default()
        })
    }
}

/// Launches a pass on a set of inputs.
type Launch<'a> = &'a dyn Fn(usize) -> Result<(), Error>;

fn duration(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// Benches of one input: `stages` too, or only the whole.
fn bench(c: &mut Criterion, engine: &Engine, name: &str, recipe: &Recipe, stages: bool) -> Result<(), Error> {
    let Recipe { batch, time, heads, value_heads, dk, dv, dtype, ref options, .. } = *recipe;
    let shape =
        Shape { batch, time, heads, value_heads, dk, dv, capacity: options.capacity, sequences: batch };
    let call = Call { options, shape, dtype, final_cache: false };
    let plan = engine.plan(&call)?;
    let plan_backward = engine.plan_backward(&call)?;
    let mut arrays = Arrays::new(engine);
    let cases: Vec<Case> = (0..SETS).map(|seed| recipe.draw(seed)).collect();
    let sets = cases.iter().map(|case| arrays.inputs(case)).collect::<Result<Vec<_>, _>>()?;
    let d_o = arrays.buffer(&cases[0].d_o)?;
    drop(cases);
    let per_token = shape.tokens() * value_heads;
    let routed = options.read == Read::Routed;
    let outputs = RawOutputs {
        o: arrays.room(per_token * dv * dtype.bytes())?,
        drift: arrays.room(4 * per_token)?,
        events: arrays.room(per_token)?,
        lambda: if routed { arrays.room(4 * per_token * options.capacity)? } else { 0 },
        cache: None,
    };
    let keys = shape.tokens() * heads * dk * dtype.bytes();
    let delta = options.recurrence == Recurrence::GatedDelta;
    let gradients = RawGradients {
        q: arrays.room(keys)?,
        k: arrays.room(keys)?,
        v: arrays.room(per_token * dv * dtype.bytes())?,
        g: arrays.room(4 * per_token)?,
        beta: if delta { arrays.room(4 * per_token)? } else { 0 },
        lambda: if routed { 0 } else { arrays.room(4 * per_token * options.capacity)? },
        slope: if routed { arrays.room(4 * value_heads)? } else { 0 },
        bias: if routed { arrays.room(4 * value_heads)? } else { 0 },
        ..RawGradients::default()
    };
    let workspace = engine.allocate(plan.workspace_bytes().max(plan_backward.workspace_bytes()))?;
    let workspace = (workspace.address(), workspace.bytes(), workspace);
    let place = (workspace.0, workspace.1);
    let forward = |set: usize, timeline: Option<&Timeline>| {
        // SAFETY: every array was made of the extents of `shape`, on this GPU, and lives to the end of this function.
        unsafe { engine.launch(&plan, &sets[set % sets.len()], &outputs, place, timeline) }
    };
    let kept = RawForward { events: outputs.events, drift: outputs.drift, lambda: outputs.lambda };
    let upstream = RawUpstream { o: d_o, cache: None };
    let backward = |set: usize| {
        let inputs = &sets[set % sets.len()];
        // SAFETY: as `forward`, which ran on the same inputs before.
        unsafe { engine.launch_backward(&plan_backward, inputs, &kept, &upstream, &gradients, place) }
    };
    let flush = engine.allocate(if small() { 4096 } else { FLUSH_BYTES })?;
    let (clock, timeline) = (engine.clock()?, engine.timeline()?);
    let mut turn = 0;
    let mut next = || {
        turn += 1;
        turn
    };

    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    group.throughput(Throughput::Elements(per_token as u64));
    // A failed call ends the process with its message: what else is there to measure.
    let passes: [(&str, Launch); 2] = [
        ("forward", &|set| forward(set, None)),
        ("forward + backward", &|set| forward(set, None).and_then(|()| backward(set))),
    ];
    for (pass, launch) in passes {
        group.bench_function(BenchmarkId::new(pass, "all"), |b| {
            b.iter_custom(|calls| {
                let mut once = || -> Result<f64, Error> {
                    let set = next();
                    engine.fill(&flush, set as u8)?;
                    clock.start(engine)?;
                    launch(set)?;
                    clock.stop(engine)?;
                    clock.ms()
                };
                (0..calls).map(|_| duration(once().expect("a call on the GPU"))).sum()
            });
        });
    }
    for stage in Stage::ALL.into_iter().filter(|&stage| stages && (routed || stage != Stage::Route)) {
        group.bench_function(BenchmarkId::new("forward", stage.name()), |b| {
            b.iter_custom(|calls| {
                let mut once = || -> Result<f64, Error> {
                    let set = next();
                    engine.fill(&flush, set as u8)?;
                    forward(set, Some(&timeline))?;
                    Ok(timeline.stage_ms()?[stage as usize])
                };
                (0..calls).map(|_| duration(once().expect("a call on the GPU"))).sum()
            });
        });
    }
    group.finish();
    // Before its arrays go.
    engine.synchronize()
}

fn all(c: &mut Criterion) {
    if let Err(error) = cuda::available() {
        println!("cuda: nothing measured: {error}");
        return;
    }
    let engine = Engine::new(0).expect("a GPU");
    let (time, heads, width) = if small() { (64, 1, 16) } else { (4096, 16, 128) };
    let base = |recurrence, read| Recipe {
        options: Options { recurrence, read, ..Options::default() },
        time,
        heads,
        value_heads: heads,
        dk: width,
        dv: width,
        dtype: Dtype::Bf16,
        ..Recipe::default()
    };
    let mut run = |name: String, recipe: Recipe, stages: bool| {
        if let Err(error) = bench(c, &engine, &name, &recipe, stages) {
            panic!("{name}: {error}");
        }
    };
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        let of = |what: &str| format!("cuda/{recurrence:?}/{what}");
        let given = || base(recurrence, Read::Given);
        run(of("Given"), given(), true);
        run(of("Routed"), base(recurrence, Read::Routed), true);
        let times: &[usize] = if small() { &[32, 96] } else { &[1024, 2048, 8192, 16_384, 32_768] };
        for &time in times {
            run(of(&format!("T={time}")), Recipe { time, ..given() }, false);
        }
        for capacity in if small() { vec![2] } else { vec![1, 4, 8, 16, 64] } {
            let mut recipe = given();
            recipe.options.capacity = capacity;
            run(of(&format!("M={capacity}")), recipe, false);
        }
        for boundary_rate in if small() { vec![0.1] } else { vec![0.01, 0.1, 0.3] } {
            run(of(&format!("rate={boundary_rate}")), Recipe { boundary_rate, ..given() }, false);
        }
        for width in if small() { vec![24] } else { vec![32, 64, 96, 256] } {
            run(of(&format!("heads={width}")), Recipe { dk: width, dv: width, ..given() }, false);
        }
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
