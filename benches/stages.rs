//! Every stage of the CPU engine, forward and backward, a step, and steps of a server's cache. A stage's time is what its threads
//! spent in it, out of whole calls: stages run chunk by chunk on one another's results.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dla::check::{Case, Recipe};
use dla::{Engine, Entries, EntrySpec, Options, Read, Recurrence, Stage, StageTimes, StateDtype, cpu};
use std::time::Duration;

fn case(recurrence: Recurrence, read: Read) -> Case {
    let recipe = Recipe {
        options: Options { recurrence, read, ..Options::default() },
        time: 1024,
        heads: 4,
        value_heads: 4,
        dk: 128,
        dv: 128,
        ..Recipe::default()
    };
    recipe.draw(1)
}

fn bench_call(c: &mut Criterion, pass: &str, case: &Case, mut call: impl FnMut() -> StageTimes) {
    let options = &case.recipe.options;
    let mut group = c.benchmark_group(format!("{pass}/{:?}/{:?}", options.recurrence, options.read));
    group.sample_size(10).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements((case.recipe.time * case.recipe.value_heads) as u64));
    let milliseconds = |ms: f64| Duration::from_secs_f64(ms / 1e3);
    group.bench_function("all", |b| {
        b.iter_custom(|calls| (0..calls).map(|_| milliseconds(call().wall_ms)).sum());
    });
    for stage in Stage::ALL {
        if stage == Stage::Route && options.read == Read::Given {
            continue;
        }
        group.bench_function(BenchmarkId::from_parameter(stage.name()), |b| {
            b.iter_custom(|calls| (0..calls).map(|_| milliseconds(call().stage_ms(stage))).sum());
        });
    }
    group.finish();
}

fn stages(c: &mut Criterion) {
    for (recurrence, read) in [
        (Recurrence::Gated, Read::Given),
        (Recurrence::Gated, Read::Routed),
        (Recurrence::GatedDelta, Read::Given),
    ] {
        let case = case(recurrence, read);
        let problem = case.problem().expect("a drawn case is valid");
        let forward = || cpu::Engine.forward_timed(&problem).expect("a drawn case is valid");
        bench_call(c, "forward", &case, || forward().1);
        let events = forward().0.events;
        let upstream = case.upstream();
        bench_call(c, "backward", &case, || {
            cpu::Engine.backward_timed(&problem, &events, &upstream).expect("a drawn case is valid").1
        });
    }
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        let long = case(recurrence, Read::Given);
        let full = cpu::Engine.forward(&long.problem().expect("valid")).expect("valid").cache;
        let one = Recipe { time: 1, ..long.recipe }.draw(2);
        let problem = one.problem().expect("a drawn case is valid");
        let mut cache = full.clone();
        group.bench_function(format!("{recurrence:?}"), |b| {
            b.iter(|| cpu::Engine.step(&problem, &mut cache).expect("a drawn case is valid"));
        });
    }
    group.finish();
}

/// Whole calls over tokens, slots, share of tokens that open a slot and size of a head.
fn sweep(c: &mut Criterion) {
    let base = || Recipe {
        time: 512,
        heads: 2,
        value_heads: 2,
        dk: 64,
        dv: 64,
        ..case(Recurrence::Gated, Read::Given).recipe
    };
    let mut recipes = vec![];
    recipes.extend([128, 512, 2048].map(|time| (format!("T={time}"), Recipe { time, ..base() })));
    recipes.extend([1, 8, 64].map(|capacity| {
        let mut recipe = base();
        recipe.options.capacity = capacity;
        (format!("M={capacity}"), recipe)
    }));
    recipes
        .extend([0.01, 0.1].map(|rate| (format!("rate={rate}"), Recipe { boundary_rate: rate, ..base() })));
    recipes
        .extend([16, 128].map(|width| (format!("heads={width}"), Recipe { dk: width, dv: width, ..base() })));
    let mut group = c.benchmark_group("sweep");
    group.sample_size(10).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(200));
    for (name, recipe) in recipes {
        let case = recipe.draw(1);
        let problem = case.problem().expect("a drawn case is valid");
        let events = cpu::Engine.forward(&problem).expect("a drawn case is valid").events;
        let upstream = case.upstream();
        group.throughput(Throughput::Elements((recipe.time * recipe.value_heads) as u64));
        group.bench_function(BenchmarkId::new("forward", &name), |b| {
            b.iter(|| cpu::Engine.forward(&problem).expect("a drawn case is valid"));
        });
        group.bench_function(BenchmarkId::new("backward", &name), |b| {
            b.iter(|| cpu::Engine.backward(&problem, &events, &upstream).expect("a drawn case is valid"));
        });
    }
    group.finish();
}

/// Rows of a server's cache, all slots held.
fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        for (batch, tokens) in [(1, 1), (8, 1), (1, 4)] {
            let recipe = Recipe { batch, time: tokens, ..case(recurrence, Read::Given).recipe };
            let cases: Vec<Case> = (0..40).map(|seed| recipe.draw(seed)).collect();
            let problems: Vec<_> =
                cases.iter().map(|case| case.problem().expect("a drawn case is valid")).collect();
            let spec = EntrySpec::of(problems[0].options(), problems[0].shape(), batch, StateDtype::F32);
            let mut cache = cpu::Entries::new(spec).expect("a valid spec");
            let entries: Vec<usize> = (0..batch).map(|_| cache.take().expect("a free entry")).collect();
            for problem in &problems {
                cache.step(problem, &entries).expect("a valid step");
            }
            let mut at = 0;
            group.throughput(Throughput::Elements((batch * tokens * recipe.value_heads) as u64));
            group.bench_function(format!("{recurrence:?}/B={batch}/T={tokens}"), |b| {
                b.iter(|| {
                    at += 1;
                    cache.step(&problems[at % problems.len()], &entries).expect("a valid step")
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, stages, sweep, step, decode);
criterion_main!(benches);
