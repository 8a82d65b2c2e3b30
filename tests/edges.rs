//! The edges of the domain: no tokens, one, ragged chunks, zero vectors, strong decay, NaN and infinity.

use dla::check::{Case, Recipe, compare};
use dla::{Buffer, Engine, Merge, Options, Read, Recurrence, Soft, cpu, reference};

fn recipes() -> Vec<Recipe> {
    let mut out = Vec::new();
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        for (read, merge) in [(Read::Given, Merge::Density), (Read::Routed, Merge::Mass)] {
            for capacity in [1, 2, 64] {
                let soft = Some(Soft { temperature: 0.3, through_drift: true });
                let options = Options { recurrence, read, merge, capacity, soft, ..Options::default() };
                out.push(Recipe {
                    options,
                    heads: 2,
                    value_heads: 4,
                    dk: 8,
                    dv: 24,
                    final_gradient: true,
                    ..Recipe::default()
                });
            }
        }
    }
    out
}

fn assert_passes(case: &Case) {
    for row in compare(&cpu::Engine, case).unwrap() {
        assert!(row.passed(), "{}: {row:?}", case.describe());
    }
}

fn f32s(x: &mut Buffer) -> &mut [f32] {
    let Buffer::F32(x) = x else { unreachable!("cases are drawn in f32") };
    x
}

#[test]
fn any_number_of_tokens() {
    for recipe in recipes() {
        for time in [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 129] {
            for resumed in [false, true] {
                assert_passes(&Recipe { time, resumed, batch: 2, ..recipe.clone() }.draw(rand::random()));
            }
        }
    }
}

#[test]
fn no_tokens_leave_the_cache_as_it_was() {
    for recipe in recipes() {
        let case = Recipe { time: 0, resumed: true, ..recipe }.draw(rand::random());
        let problem = case.problem().unwrap();
        for engine in [&cpu::Engine as &dyn Engine, &reference::Engine] {
            let forward = engine.forward(&problem).unwrap();
            assert_eq!(Some(&forward.cache), case.cache.as_ref(), "{}", engine.name());
            let gradients = engine.backward(&problem, &[], &case.upstream()).unwrap();
            assert_eq!(gradients.cache, case.d_cache.as_ref().map(|d| masked(d, &forward.cache)));
        }
    }
}

/// The gradient of slots that are not held is zero, whatever the caller gave.
fn masked(d: &dla::CacheGradients, cache: &dla::Cache) -> dla::CacheGradients {
    let mut d = d.clone();
    let dims = cache.dims;
    for (row, &len) in cache.len.iter().enumerate() {
        let m = len as usize;
        d.states[row * dims.bank() + m * dims.state()..(row + 1) * dims.bank()].fill(0.0);
        if let Some(keys) = &mut d.keys {
            keys[row * dims.key_bank() + m * dims.dk..(row + 1) * dims.key_bank()].fill(0.0);
        }
    }
    d
}

#[test]
fn packed_sequences_may_be_empty() {
    for recipe in recipes() {
        for lengths in [vec![0], vec![0, 0, 0], vec![0, 65, 0, 0, 3, 0], vec![1, 1, 1]] {
            let time = lengths.iter().sum();
            for resumed in [false, true] {
                let packed = Some(lengths.clone());
                assert_passes(&Recipe { time, packed, resumed, ..recipe.clone() }.draw(rand::random()));
            }
        }
    }
}

/// A zero vector has no direction: c = 0 and I = sqrt(2).
#[test]
fn zero_vectors_and_strong_decay() {
    for recipe in recipes() {
        for decay in [None, Some(0.0), Some(3.0), Some(50.0), Some(150.0)] {
            let mut recipe = Recipe { time: 150, decay, ..recipe.clone() };
            if decay > Some(10.0) {
                // The drift's derivative in a zero key is 1 / |R|, and R decays beyond f32's range.
                recipe.options.soft = None;
                recipe.final_gradient = false;
            }
            let mut case = recipe.draw(rand::random());
            let (dk, dv) = (2 * recipe.dk, 4 * recipe.dv);
            for t in [0usize, 5, 6, 7, 64, 70, 71, 128, 149] {
                f32s(&mut case.k)[t * dk..(t + 1) * dk].fill(0.0);
            }
            for t in [1usize, 6, 63, 64, 100] {
                f32s(&mut case.v)[t * dv..(t + 1) * dv].fill(0.0);
            }
            if let (Some(g), Some(50.0)) = (&mut case.g, decay) {
                g.fill(-50.0);
            }
            assert_passes(&case);
            let forward = cpu::Engine.forward(&case.problem().unwrap()).unwrap();
            assert_eq!(forward.drift[0], 2f32.sqrt());
        }
    }
}

/// Keys that stand at right angles under a tau of 0: every token is a boundary and every pair a tie.
#[test]
fn ties() {
    for recipe in recipes() {
        let mut recipe = Recipe { time: 100, decay: None, ..recipe };
        recipe.options.tau = dla::Tau::PerCall(0.0);
        let mut case = recipe.draw(rand::random());
        for (row, key) in f32s(&mut case.k).chunks_exact_mut(recipe.dk).enumerate() {
            key.fill(0.0);
            key[row / 2 % recipe.dk] = 1.0;
        }
        let forward = cpu::Engine.forward(&case.problem().unwrap()).unwrap();
        assert!(forward.drift.iter().all(|&drift| drift == 2f32.sqrt()) || recipe.options.capacity == 1);
        assert_passes(&case);
    }
}

/// A log decay of minus infinity forgets all that was before.
#[test]
fn infinite_decay_forgets() {
    for recipe in recipes() {
        let mut case = Recipe { time: 80, ..recipe }.draw(rand::random());
        case.g.as_mut().unwrap()[40 * 4..41 * 4].fill(f32::NEG_INFINITY);
        let problem = case.problem().unwrap();
        let ours = cpu::Engine.forward(&problem).unwrap();
        assert!(ours.o.to_f64().iter().all(|x| x.is_finite()));
        let gradients = cpu::Engine.backward(&problem, &ours.events, &case.upstream()).unwrap();
        assert!(gradients.k.to_f64().iter().all(|x| x.is_finite()));
        assert_passes(&case);
    }
}

/// NaN and infinity reach the outputs as in the reference: the same elements, none before the token.
#[test]
fn non_finite_inputs_spread_as_in_the_reference() {
    for recipe in recipes() {
        for bad in [f32::NAN, f32::INFINITY] {
            for which in 0..4 {
                let mut case = Recipe { time: 150, ..recipe.clone() }.draw(rand::random());
                let token = 70;
                match which {
                    0 => f32s(&mut case.q)[token * 2 * recipe.dk] = bad,
                    1 => f32s(&mut case.k)[token * 2 * recipe.dk + 3] = bad,
                    2 => f32s(&mut case.v)[token * 4 * recipe.dv] = bad,
                    _ => f32s(&mut case.d_o)[token * 4 * recipe.dv] = bad,
                }
                let problem = case.problem().unwrap();
                let ours = cpu::Engine.forward(&problem).unwrap();
                let theirs = reference::Engine.forward(&problem).unwrap();
                let kinds = |x: &[f64]| x.iter().map(|x| (x.is_nan(), x.is_infinite())).collect::<Vec<_>>();
                let f64s = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                assert_eq!(kinds(&ours.o.to_f64()), kinds(&theirs.o.to_f64()), "o, {which} {bad}");
                assert_eq!(kinds(&f64s(&ours.cache.states)), kinds(&f64s(&theirs.cache.states)));
                // The heads that read it take the reference's decisions, which are all that NaN leaves.
                let heads = if which < 2 { 0..2 } else { 0..1 };
                if which < 3 {
                    for t in 0..150 {
                        for head in heads.clone() {
                            assert_eq!(ours.events[t * 4 + head], theirs.events[t * 4 + head]);
                        }
                    }
                }
                assert!(ours.o.to_f64()[..token * 4 * recipe.dv].iter().all(|x| x.is_finite()));
                if which != 3 {
                    assert!(!ours.o.to_f64().iter().all(|x| x.is_finite()));
                }
                let ours = cpu::Engine.backward(&problem, &ours.events, &case.upstream()).unwrap();
                let theirs = reference::Engine.backward(&problem, &theirs.events, &case.upstream()).unwrap();
                for (name, a, b) in
                    [("dq", &ours.q, &theirs.q), ("dk", &ours.k, &theirs.k), ("dv", &ours.v, &theirs.v)]
                {
                    assert_eq!(kinds(&a.to_f64()), kinds(&b.to_f64()), "{name}, {which} {bad}");
                }
            }
        }
    }
}
