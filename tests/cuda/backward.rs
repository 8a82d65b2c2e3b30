//! The backward on a GPU, against the f64 reference along the GPU's own log.

use super::*;
use dla::check::{Bounds, compare_gradients};
use dla::cuda::{BackwardPlan, RawCacheGradients, RawForward, RawGradients, RawUpstream};
use dla::{CacheGradients, Gradients, Inputs, OutputGradients, RouteGradients, Soft, SoftGradients, Tensor};

/// Judges gradients by the reference.
fn judge(case: &Case, problem: &Problem, events: &[u8], gradients: &Gradients, record: &Record) {
    let dtype = problem.dtype();
    let rows = compare_gradients(case, problem, events, gradients, Bounds::cuda_gradients(dtype));
    let mut wrong = Vec::new();
    for row in rows {
        record.take(&format!("{} {dtype}", row.tensor), row.error);
        if !row.passed() {
            wrong.push(format!("{} off by {:.2e}, most at element {}", row.tensor, row.error, row.worst));
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:?}", case.describe());
}

/// A problem's arrays by way of the raw interface, both passes.
struct PoisonedBackward {
    forward: Poisoned,
    plan: BackwardPlan,
    /// Held for their memory.
    _given: Vec<Array>,
    saved: RawForward,
    upstream: RawUpstream,
    gradients: RawGradients,
    /// Of q, k, v, g, beta, lambda, slope, bias, logits, tau, drift; of the cache's states, open, keys.
    results: [Option<Array>; 14],
    workspace: Array,
}

impl PoisonedBackward {
    fn new(engine: &Engine, case: &Case, problem: &Problem) -> Self {
        let forward = Poisoned::new(engine, problem);
        let (shape, options, dtype) = (*problem.shape(), problem.options(), problem.dtype());
        let dims = shape.cache_dims();
        let mut given = Vec::new();
        let mut keep = |array: Array| {
            given.push(array);
            given[given.len() - 1].address()
        };
        let upstream = RawUpstream {
            o: keep(Array::of_buffer(engine, case.upstream().o.data())),
            cache: case.d_cache.as_ref().map(|cache| RawCacheGradients {
                states: keep(Array::of(engine, &cache.states)),
                open: keep(Array::of(engine, &cache.open)),
                keys: cache.keys.as_ref().map_or(0, |keys| keep(Array::of(engine, keys))),
            }),
        };
        let per_token = shape.tokens() * shape.value_heads;
        let keys = shape.tokens() * shape.heads * shape.dk * dtype.bytes();
        let routed = options.read == Read::Routed;
        let logits = case.route.as_ref().is_some_and(|route| route.logits.is_some());
        let (soft, resumed) = (options.soft.is_some(), case.cache.is_some());
        let results = [
            (true, keys),
            (true, keys),
            (true, per_token * shape.dv * dtype.bytes()),
            (case.g.is_some(), per_token * 4),
            (case.beta.is_some(), per_token * 4),
            (!routed, per_token * problem.lambda_columns() * 4),
            (routed, shape.value_heads * 4),
            (routed, shape.value_heads * 4),
            (logits, per_token * problem.logit_columns() * 4),
            (soft, shape.value_heads * 4),
            (soft, per_token * 4),
            (resumed, dims.rows() * dims.bank() * 4),
            (resumed, dims.rows() * dims.state() * 4),
            (resumed && routed, dims.rows() * dims.key_bank() * 4),
        ]
        .map(|(wanted, bytes)| wanted.then(|| Array::poisoned(engine, bytes)));
        let [q, k, v, g, beta, lambda, slope, bias, logits, tau, drift, states, open, keys] =
            std::array::from_fn(|index| index);
        let address = |index: usize| results[index].as_ref().map_or(0, Array::address);
        let gradients = RawGradients {
            q: address(q),
            k: address(k),
            v: address(v),
            g: address(g),
            beta: address(beta),
            lambda: address(lambda),
            slope: address(slope),
            bias: address(bias),
            logits: address(logits),
            tau: address(tau),
            drift: address(drift),
            cache: resumed.then(|| RawCacheGradients {
                states: address(states),
                open: address(open),
                keys: address(keys),
            }),
        };
        let saved = RawForward {
            events: forward.outputs.events,
            drift: forward.outputs.drift,
            lambda: forward.outputs.lambda,
        };
        let call = Call { final_cache: case.d_cache.is_some(), ..Call::of(problem) };
        let plan = engine.plan_backward(&call).unwrap();
        let workspace = Array::poisoned(engine, plan.workspace_bytes());
        PoisonedBackward { forward, plan, _given: given, saved, upstream, gradients, results, workspace }
    }

    fn launch(&self, engine: &Engine) {
        let workspace = (self.workspace.address(), self.plan.workspace_bytes());
        let inputs = &self.forward.inputs;
        // SAFETY: every array is as long as the problem says, and the problem was validated.
        unsafe {
            engine.launch_backward(
                &self.plan,
                inputs,
                &self.saved,
                &self.upstream,
                &self.gradients,
                workspace,
            )
        }
        .unwrap();
    }

    fn poison(&self, engine: &Engine) {
        for array in self.results.iter().flatten().chain([&self.workspace]) {
            engine.fill(&array.memory, POISON).unwrap();
        }
    }

    fn read(&self, engine: &Engine, problem: &Problem) -> Gradients {
        self.workspace.get::<u8>(engine);
        let buffer = |index: usize| {
            let array = self.results[index].as_ref().unwrap();
            match problem.dtype() {
                Dtype::F32 => Buffer::F32(array.get(engine)),
                Dtype::Bf16 => Buffer::Bf16(array.get(engine)),
                Dtype::F16 => Buffer::F16(array.get(engine)),
            }
        };
        let floats = |index: usize| self.results[index].as_ref().map(|array| array.get::<f32>(engine));
        Gradients {
            q: buffer(0),
            k: buffer(1),
            v: buffer(2),
            g: floats(3),
            beta: floats(4),
            lambda: floats(5),
            route: floats(6).map(|slope| RouteGradients {
                slope,
                bias: floats(7).unwrap(),
                logits: floats(8),
            }),
            soft: floats(9).map(|tau| SoftGradients { tau, drift: floats(10).unwrap() }),
            cache: floats(11).map(|states| CacheGradients {
                states,
                open: floats(12).unwrap(),
                keys: floats(13),
            }),
        }
    }
}

/// The same bits.
fn assert_same(a: &Gradients, b: &Gradients, name: &str) {
    let buffer = |x: &Buffer| x.to_f64().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let bits = |x: Option<&Vec<f32>>| x.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    assert!(buffer(&a.q) == buffer(&b.q), "{name}: dq");
    assert!(buffer(&a.k) == buffer(&b.k), "{name}: dk");
    assert!(buffer(&a.v) == buffer(&b.v), "{name}: dv");
    for (tensor, of) in [
        ("dg", (|x| x.g.as_ref()) as fn(&Gradients) -> Option<&Vec<f32>>),
        ("dbeta", |x| x.beta.as_ref()),
        ("dlambda", |x| x.lambda.as_ref()),
        ("droute_slope", |x| x.route.as_ref().map(|x| &x.slope)),
        ("droute_bias", |x| x.route.as_ref().map(|x| &x.bias)),
        ("droute_logits", |x| x.route.as_ref().and_then(|x| x.logits.as_ref())),
        ("dtau", |x| x.soft.as_ref().map(|x| &x.tau)),
        ("ddrift", |x| x.soft.as_ref().map(|x| &x.drift)),
        ("dcache_states", |x| x.cache.as_ref().map(|x| &x.states)),
        ("dcache_open", |x| x.cache.as_ref().map(|x| &x.open)),
        ("dcache_keys", |x| x.cache.as_ref().and_then(|x| x.keys.as_ref())),
    ] {
        assert!(bits(of(a)) == bits(of(b)), "{name}: {tensor}");
    }
}

/// The recipes of the forward, with gradients of the final cache and soft boundaries on and off.
fn recipes() -> Vec<Recipe> {
    let mut recipes = every_kernel_recipes();
    for (at, recipe) in recipes.iter_mut().enumerate() {
        recipe.final_gradient = at % 2 == 1;
        recipe.options.soft = (at % 3 == 2).then_some(Soft { temperature: 0.2, through_drift: at % 2 == 0 });
    }
    recipes
}

#[test]
fn every_kernel_backward() {
    let Some(engine) = engine() else { return };
    let record = Record::of("every_kernel_backward");
    recipes().par_iter().enumerate().for_each(|(index, recipe)| {
        let case = recipe.draw(first_seed() + index as u64);
        let problem = case.problem().unwrap();
        let arrays = PoisonedBackward::new(engine, &case, &problem);
        arrays.forward.launch(engine);
        arrays.launch(engine);
        let events = arrays.forward.read(engine, &problem).events;
        judge(&case, &problem, &events, &arrays.read(engine, &problem), &record);
    });
}

fn check_all(engine: &Engine, recipes: &[Recipe], record: &Record) {
    recipes.par_iter().enumerate().for_each(|(index, recipe)| {
        let case = recipe.draw(first_seed() + index as u64);
        let problem = case.problem().unwrap();
        let events = engine.forward(&problem).unwrap().events;
        let gradients = engine.backward(&problem, &events, &case.upstream()).unwrap();
        judge(&case, &problem, &events, &gradients, record);
    });
}

#[test]
fn boundary_rates_backward() {
    let Some(engine) = engine() else { return };
    let record = Record::of("boundary_rates_backward");
    if small() {
        return;
    }
    let mut recipes = Vec::new();
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            for boundary_rate in [0.01, 0.25, 1.0] {
                let at = recipes.len();
                let read = if at % 2 == 0 { Read::Given } else { Read::Routed };
                let merge = if at % 4 < 2 { Merge::Density } else { Merge::Mass };
                let d = [128, 64, 256][at % 3];
                recipes.push(Recipe {
                    options: Options { recurrence, merge, read, ..Options::default() },
                    time: if d == 256 { 200 } else { 640 },
                    value_heads: 2,
                    heads: 1 + at % 2,
                    dk: d,
                    dv: d,
                    dtype,
                    boundary_rate,
                    ..Recipe::default()
                });
            }
        }
    }
    check_all(engine, &recipes, &record);
}

#[test]
fn random_cases_backward() {
    let Some(engine) = engine() else { return };
    let record = Record::of("random_cases_backward");
    let count = if small() { 2 } else { 48 };
    (first_seed()..first_seed() + count).into_par_iter().for_each(|seed| {
        let case = Case::random(seed);
        let problem = case.problem().unwrap();
        let events = engine.forward(&problem).unwrap().events;
        let gradients = engine.backward(&problem, &events, &case.upstream()).unwrap();
        judge(&case, &problem, &events, &gradients, &record);
    });
}

#[test]
fn head_sizes_and_capacities_backward() {
    let Some(engine) = engine() else { return };
    let record = Record::of("head_sizes_and_capacities_backward");
    let mut recipes = Vec::new();
    for dk in (8..=256).step_by(if small() { 120 } else { 8 }) {
        let at = recipes.len();
        recipes.push(Recipe {
            options: Options {
                recurrence: RECURRENCES[at % 2],
                capacity: 1 + at * 7 % 64,
                read: if at / 2 % 2 == 0 { Read::Given } else { Read::Routed },
                ..Options::default()
            },
            time: 70,
            dk,
            dv: if at % 3 == 0 { dk } else { 8 * (1 + (dk / 8 * 7) % 32) },
            dtype: DTYPES[at % 3],
            resumed: at % 4 == 0,
            final_gradient: at % 5 == 0,
            ..Recipe::default()
        });
    }
    for time in [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129] {
        let at = recipes.len();
        recipes.push(Recipe {
            options: Options {
                recurrence: RECURRENCES[at % 2],
                capacity: 8,
                read: if at % 3 == 0 { Read::Routed } else { Read::Given },
                ..Options::default()
            },
            time,
            value_heads: 4,
            batch: 2,
            dtype: DTYPES[at % 3],
            resumed: at % 4 < 2,
            final_gradient: at % 2 == 0,
            ..Recipe::default()
        });
    }
    for packed in [vec![], vec![0, 0, 0]] {
        recipes.push(Recipe { time: 0, packed: Some(packed), resumed: true, ..Recipe::default() });
    }
    check_all(engine, &recipes, &record);
}

/// Thousands of tokens against the reference, more against the CPU's engine.
#[test]
fn long_sequences_backward() {
    let Some(engine) = engine() else { return };
    let record = Record::of("long_sequences_backward");
    if small() {
        return;
    }
    let recipe = |recurrence, dtype, time| Recipe {
        options: Options { recurrence, capacity: 8, ..Options::default() },
        time,
        dk: 32,
        dv: 32,
        dtype,
        ..Recipe::default()
    };
    let mut recipes = Vec::new();
    for dtype in DTYPES {
        for recurrence in RECURRENCES {
            recipes.push(recipe(recurrence, dtype, 16_384));
        }
    }
    check_all(engine, &recipes, &record);
    for recurrence in RECURRENCES {
        let case = Recipe { value_heads: 2, ..recipe(recurrence, Dtype::F32, 65_536) }.draw(first_seed());
        let problem = case.problem().unwrap();
        let events = engine.forward(&problem).unwrap().events;
        let [gpu, cpu] = [engine as &dyn dla::Engine, &dla::cpu::Engine]
            .map(|engine| engine.backward(&problem, &events, &case.upstream()).unwrap());
        let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        for (tensor, x, reference) in [
            ("dq", gpu.q.to_f64(), cpu.q.to_f64()),
            ("dk", gpu.k.to_f64(), cpu.k.to_f64()),
            ("dv", gpu.v.to_f64(), cpu.v.to_f64()),
            ("dg", f64s(&gpu.g.unwrap()), f64s(&cpu.g.unwrap())),
            ("dlambda", f64s(&gpu.lambda.unwrap()), f64s(&cpu.lambda.unwrap())),
        ] {
            let (error, at) = relative_error(&x, &reference);
            record.take(&format!("{tensor} 65536"), error);
            assert!(error <= 2e-4, "{recurrence:?}: {tensor} off by {error:.2e}, most at element {at}");
        }
    }
}

/// Two runs, the host's way in and a replayed graph all give the same bits.
#[test]
fn same_bits_backward() {
    let Some(_) = engine() else { return };
    let _record = Record::of("same_bits_backward");
    let own = Engine::new(0).unwrap();
    for (index, recipe) in recipes().iter().enumerate() {
        let case = recipe.draw(first_seed() + index as u64);
        let (problem, name) = (case.problem().unwrap(), case.describe());
        let arrays = PoisonedBackward::new(&own, &case, &problem);
        arrays.forward.launch(&own);
        arrays.launch(&own);
        let first = arrays.read(&own, &problem);
        arrays.poison(&own);
        arrays.launch(&own);
        assert_same(&first, &arrays.read(&own, &problem), &name);
        let events = arrays.forward.read(&own, &problem).events;
        assert_same(&first, &own.backward(&problem, &events, &case.upstream()).unwrap(), &name);
        let graph = Graph::capture(&own, || arrays.launch(&own));
        for _ in 0..2 {
            arrays.poison(&own);
            graph.launch(&own);
            assert_same(&first, &arrays.read(&own, &problem), &name);
        }
    }
}

/// Gradient descent with momentum on every argument, along one log, on GPU and CPU: they stay together for 200 steps.
///
/// Momentum and clipped gradients keep the descent itself stable. Plain steps of 0.006 were not: the CPU engine and the f64
/// reference, too, parted by 2.5e-2 and 5.7e-2 on two draws of eight. Of 64 draws these two are at most 2.3e-8 apart now, and the
/// loss falls further.
#[test]
fn training_stays_together() {
    let Some(engine) = engine() else { return };
    let record = Record::of("training_stays_together");
    for recurrence in RECURRENCES {
        let options = Options { recurrence, capacity: 6, qk_l2norm: true, ..Options::default() };
        let recipe = Recipe {
            options,
            time: if small() { 70 } else { 192 },
            value_heads: 2,
            dk: 16,
            dv: 16,
            boundary_rate: 0.5,
            ..Recipe::default()
        };
        let case = recipe.draw(first_seed());
        let target = recipe.draw(first_seed() + 1).d_o.to_f64();
        let events = engine.forward(&case.problem().unwrap()).unwrap().events;
        let train = |engine: &dyn dla::Engine| {
            let mut case = case.clone();
            let mut losses = Vec::new();
            let mut velocities: [Vec<f32>; 6] = Default::default();
            for _ in 0..if small() { 5 } else { 200 } {
                let inputs = Inputs { events: Some(&events), ..case.inputs() };
                let problem = Problem::new(&case.recipe.options, inputs).unwrap();
                let o = engine.forward(&problem).unwrap().o.to_f64();
                let off: Vec<f32> = o.iter().zip(&target).map(|(o, t)| (o - t) as f32).collect();
                losses.push(off.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / off.len() as f64);
                let upstream =
                    OutputGradients { o: Tensor::new(&off, case.upstream().o.shape()), cache: None };
                let gradients = engine.backward(&problem, &events, &upstream).unwrap();
                let mut descend = |argument: usize, x: &mut [f32], by: &[f32]| {
                    let velocity = &mut velocities[argument];
                    velocity.resize(x.len(), 0.0);
                    for ((x, by), velocity) in x.iter_mut().zip(by).zip(velocity) {
                        *velocity = 0.8 * *velocity + by.clamp(-2.0, 2.0);
                        *x -= 0.0015 * *velocity;
                    }
                };
                for (argument, (x, by)) in
                    [(&mut case.q, gradients.q), (&mut case.k, gradients.k), (&mut case.v, gradients.v)]
                        .into_iter()
                        .enumerate()
                {
                    let (Buffer::F32(x), Buffer::F32(by)) = (x, by) else { panic!("drawn in f32") };
                    descend(argument, x, &by);
                }
                descend(3, case.lambda.as_mut().unwrap(), &gradients.lambda.unwrap());
                if let (Some(beta), Some(by)) = (&mut case.beta, gradients.beta) {
                    descend(4, beta, &by);
                    beta.iter_mut().for_each(|beta| *beta = beta.clamp(0.0, 1.0));
                }
                let g = case.g.as_mut().unwrap();
                descend(5, g, &gradients.g.unwrap());
                g.iter_mut().for_each(|g| *g = g.min(0.0));
            }
            losses
        };
        let (gpu, cpu) = (train(engine), train(&dla::cpu::Engine));
        let apart = gpu.iter().zip(&cpu).map(|(gpu, cpu)| (gpu - cpu).abs() / cpu).fold(0.0, f64::max);
        println!("{recurrence:?}: loss {:.4} to {:.4}, apart by {apart:.1e}", cpu[0], cpu[cpu.len() - 1]);
        record.take("loss apart", apart);
        assert!(apart <= 1e-3, "{recurrence:?}: {apart:.2e}");
        assert!(small() || cpu[cpu.len() - 1] < 0.6 * cpu[0], "{recurrence:?}: {cpu:?}");
    }
}
