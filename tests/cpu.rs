//! The CPU engine against the reference.

use dla::check::{Case, Recipe, compare};
use dla::{Dtype, Engine, Merge, Options, Read, Recurrence, SlotOrder, Soft, cpu};

fn assert_passes(case: &Case) -> usize {
    let mut failures = Vec::new();
    let rows = compare(&cpu::Engine, case).unwrap();
    for row in &rows {
        if !row.passed() {
            failures.push(format!("{}: {row:?}", case.describe()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    rows.len()
}

#[test]
fn random_cases() {
    let first: u64 = rand::random_range(0..1 << 40);
    println!("seeds from {first}");
    for seed in first..first + 150 {
        assert_passes(&Case::random(seed));
    }
}

/// Head sizes and lengths of real use: errors do not grow with T.
#[test]
fn long_sequences() {
    for (recurrence, read, merge, rate) in [
        (Recurrence::Gated, Read::Given, Merge::Density, 1.0),
        (Recurrence::GatedDelta, Read::Routed, Merge::Mass, 1.0),
        (Recurrence::Gated, Read::Routed, Merge::Mass, 0.01),
        (Recurrence::GatedDelta, Read::Given, Merge::Density, 0.25),
    ] {
        let recipe = Recipe {
            options: Options { recurrence, read, merge, ..Options::default() },
            time: 2100,
            dk: 64,
            dv: 64,
            boundary_rate: rate,
            ..Recipe::default()
        };
        assert_passes(&recipe.draw(rand::random()));
    }
}

#[test]
fn every_combination() {
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        for read in [Read::Given, Read::Routed] {
            for merge in [Merge::Density, Merge::Mass] {
                for capacity in [1, 2, 64] {
                    for (soft, packed) in [(false, true), (true, false)] {
                        let options = Options {
                            recurrence,
                            read,
                            merge,
                            capacity,
                            slot_order: SlotOrder::NewestFirst,
                            soft: soft.then_some(Soft { temperature: 0.2, through_drift: true }),
                            ..Options::default()
                        };
                        let recipe = Recipe {
                            options,
                            time: 150,
                            heads: 2,
                            value_heads: 4,
                            packed: packed.then(|| vec![0, 70, 0, 1, 79]),
                            resumed: !packed,
                            final_gradient: true,
                            boundary_rate: 0.6,
                            ..Recipe::default()
                        };
                        assert!(assert_passes(&recipe.draw(rand::random())) >= 12);
                    }
                }
            }
        }
    }
}

/// Two runs, and any number of threads, give the same bits.
#[test]
fn bits_do_not_depend_on_threads() {
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        let recipe = Recipe {
            options: Options { recurrence, ..Options::default() },
            time: 200,
            heads: 1,
            value_heads: 2,
            dk: 32,
            dv: 192,
            dtype: Dtype::Bf16,
            ..Recipe::default()
        };
        let case = recipe.draw(7);
        let problem = case.problem().unwrap();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let forward = cpu::Engine.forward(&problem).unwrap();
                let gradients = cpu::Engine.backward(&problem, &forward.events, &case.upstream()).unwrap();
                (forward.o, forward.drift, forward.cache, gradients.q, gradients.k, gradients.g)
            })
        };
        let one = run(1);
        assert!(one == run(1) && one == run(2) && one == run(7));
    }
}
