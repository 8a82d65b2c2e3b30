//! The invariants of OPERATOR.md, section 3, as properties of both engines.

use dla::check::{Case, Recipe, relative_error};
use dla::events::{EXTEND, Ledger, MERGE, OPEN};
use dla::{
    Buffer, Cache, Dtype, Engine, Forward, Inputs, Merge, Options, Problem, Read, Recurrence, SlotOrder,
    Tensor, cpu, reference,
};
use proptest::prelude::*;

fn engines() -> [&'static dyn Engine; 2] {
    [&cpu::Engine, &reference::Engine]
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

fn assert_close(what: &str, x: &[f64], y: &[f64]) {
    let (error, worst) = relative_error(x, y);
    assert!(error < 1e-5, "{what}: {error:.2e} at {worst}");
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let options = (any::<[bool; 4]>(), prop::sample::select(vec![1usize, 2, 3, 8, 30, 64])).prop_map(
        |([delta, mass, routed, newest], capacity)| Options {
            recurrence: if delta { Recurrence::GatedDelta } else { Recurrence::Gated },
            merge: if mass { Merge::Mass } else { Merge::Density },
            read: if routed { Read::Routed } else { Read::Given },
            slot_order: if newest { SlotOrder::NewestFirst } else { SlotOrder::OldestFirst },
            capacity,
            ..Options::default()
        },
    );
    let rate = prop::sample::select(vec![0.05, 0.4, 1.0]);
    (options, 1usize..150, rate, any::<bool>()).prop_map(|(options, time, rate, decays)| Recipe {
        options,
        time,
        value_heads: 2,
        dk: 8,
        dv: 16,
        boundary_rate: rate,
        decay: decays.then_some(0.3),
        ..Recipe::default()
    })
}

/// Some valid log, whatever the content.
fn random_log(case: &Case, seed: u64) -> Vec<u8> {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let Recipe { time, value_heads, .. } = case.recipe;
    let capacity = case.recipe.options.capacity;
    let mut log = vec![0; time * value_heads];
    for head in 0..value_heads {
        let mut ledger = Ledger::default();
        for t in 0..time {
            let mut choices: Vec<u8> = vec![EXTEND, OPEN];
            choices.extend((0..capacity as u8).map(|i| MERGE + i));
            choices.retain(|&event| ledger.allows(event, capacity));
            let event = choices[rng.random_range(0..choices.len())];
            ledger.apply(event, 1.0);
            log[t * value_heads + head] = event;
        }
    }
    log
}

/// Tokens `range` of a case of one batch entry.
struct Piece {
    q: Buffer,
    k: Buffer,
    v: Buffer,
    rest: [Option<Vec<f32>>; 4],
    tokens: usize,
}

fn cut(x: &Buffer, range: &std::ops::Range<usize>, width: usize) -> Buffer {
    let Buffer::F32(x) = x else { unreachable!("cases are drawn in f32") };
    Buffer::F32(x[range.start * width..range.end * width].to_vec())
}

impl Piece {
    fn of(case: &Case, range: std::ops::Range<usize>) -> Piece {
        let Recipe { heads, value_heads, dk, dv, ref options, .. } = case.recipe;
        let rows = |x: &Option<Vec<f32>>, width: usize| {
            x.as_ref().map(|x| x[range.start * width..range.end * width].to_vec())
        };
        let logits = case.route.as_ref().and_then(|route| route.logits.clone());
        Piece {
            q: cut(&case.q, &range, heads * dk),
            k: cut(&case.k, &range, heads * dk),
            v: cut(&case.v, &range, value_heads * dv),
            rest: [
                rows(&case.g, value_heads),
                rows(&case.beta, value_heads),
                rows(&case.lambda, value_heads * options.capacity),
                rows(&logits, value_heads * options.capacity),
            ],
            tokens: range.len(),
        }
    }

    fn run(&self, case: &Case, cache: Option<&Cache>) -> Forward {
        let recipe = &case.recipe;
        let (t, h, hv, m) = (self.tokens, recipe.heads, recipe.value_heads, recipe.options.capacity);
        let mut inputs = Inputs::new(
            Tensor::new(&self.q, &[1, t, h, recipe.dk]),
            Tensor::new(&self.k, &[1, t, h, recipe.dk]),
            Tensor::new(&self.v, &[1, t, hv, recipe.dv]),
        );
        let [g, beta, lambda, logits] = &self.rest;
        inputs.g = g.as_ref().map(|g| Tensor::new(g, &[1, t, hv]));
        inputs.beta = beta.as_ref().map(|beta| Tensor::new(beta, &[1, t, hv]));
        inputs.lambda = lambda.as_ref().map(|lambda| Tensor::new(lambda, &[1, t, hv, m]));
        inputs.route = case.route.as_ref().map(|route| dla::Route {
            slope: Tensor::new(&route.slope, &[hv]),
            bias: Tensor::new(&route.bias, &[hv]),
            logits: logits.as_ref().map(|logits| Tensor::new(logits, &[1, t, hv, m])),
        });
        inputs.cache = cache;
        cpu::Engine.forward(&Problem::new(&recipe.options, inputs).unwrap()).unwrap()
    }

    fn step(&self, case: &Case, cache: &mut Cache) -> dla::Step {
        let recipe = &case.recipe;
        let (h, hv, m) = (recipe.heads, recipe.value_heads, recipe.options.capacity);
        let mut inputs = Inputs::new(
            Tensor::new(&self.q, &[1, 1, h, recipe.dk]),
            Tensor::new(&self.k, &[1, 1, h, recipe.dk]),
            Tensor::new(&self.v, &[1, 1, hv, recipe.dv]),
        );
        let [g, beta, lambda, logits] = &self.rest;
        inputs.g = g.as_ref().map(|g| Tensor::new(g, &[1, 1, hv]));
        inputs.beta = beta.as_ref().map(|beta| Tensor::new(beta, &[1, 1, hv]));
        inputs.lambda = lambda.as_ref().map(|lambda| Tensor::new(lambda, &[1, 1, hv, m]));
        inputs.route = case.route.as_ref().map(|route| dla::Route {
            slope: Tensor::new(&route.slope, &[hv]),
            bias: Tensor::new(&route.bias, &[hv]),
            logits: logits.as_ref().map(|logits| Tensor::new(logits, &[1, 1, hv, m])),
        });
        cpu::Engine.step(&Problem::new(&recipe.options, inputs).unwrap(), cache).unwrap()
    }
}

fn assert_same_cache(a: &Cache, b: &Cache) {
    assert_eq!((&a.len, &a.tokens), (&b.len, &b.tokens));
    assert_close("cache_states", &f64s(&a.states), &f64s(&b.states));
    assert_close("cache_open", &f64s(&a.open), &f64s(&b.open));
    if let (Some(a), Some(b)) = (&a.keys, &b.keys) {
        assert_close("cache_keys", &f64s(a), &f64s(b));
    }
    for (a, b) in a.drift.iter().zip(&b.drift) {
        assert!(a.abs_diff(*b) <= 16, "summed drift {a} against {b}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// With every lambda equal to 1 the result is the plain backbone, whatever the log.
    #[test]
    fn unit_weights_are_the_backbone(mut recipe in recipe(), seed in any::<u64>()) {
        recipe.options.read = Read::Given;
        let mut case = recipe.draw(seed);
        case.lambda.as_mut().unwrap().fill(1.0);
        let log = random_log(&case, seed);
        let mut one = case.clone();
        one.recipe.options.capacity = 1;
        one.lambda.as_mut().unwrap().truncate(recipe.time * recipe.value_heads);
        for engine in engines() {
            let mut inputs = case.inputs();
            inputs.events = Some(&log);
            let many = engine.forward(&Problem::new(&recipe.options, inputs).unwrap()).unwrap();
            let backbone = engine.forward(&one.problem().unwrap()).unwrap();
            assert_close(engine.name(), &many.o.to_f64(), &backbone.o.to_f64());
        }
    }

    /// Merging never changes the sum of the slots: whatever the log, their sum is the one state.
    #[test]
    fn slots_sum_to_the_one_state(recipe in recipe(), seed in any::<u64>()) {
        let case = recipe.draw(seed);
        let log = random_log(&case, seed);
        let mut one = case.clone();
        one.recipe.options = Options { capacity: 1, read: Read::Given, ..recipe.options.clone() };
        one.lambda = Some(vec![1.0; recipe.time * recipe.value_heads]);
        one.route = None;
        for engine in engines() {
            let mut inputs = case.inputs();
            inputs.events = Some(&log);
            let many = engine.forward(&Problem::new(&recipe.options, inputs).unwrap()).unwrap().cache;
            let backbone = engine.forward(&one.problem().unwrap()).unwrap().cache;
            let (bank, state) = (many.dims.bank(), many.dims.state());
            let mut sums = vec![0.0; backbone.states.len()];
            for (i, &x) in many.states.iter().enumerate() {
                sums[i / bank * state + i % state] += f64::from(x);
            }
            assert_close(engine.name(), &sums, &f64s(&backbone.states));
        }
    }

    /// Splitting a sequence and resuming from the cache, whole chunks or token by token, changes nothing.
    #[test]
    fn splitting_changes_nothing(recipe in recipe(), seed in any::<u64>(), at in 0.0f64..1.0, steps in 0usize..20) {
        let case = recipe.draw(seed);
        let t = recipe.time;
        let whole = Piece::of(&case, 0..t).run(&case, None);
        let middle = (at * t as f64) as usize;
        let first = Piece::of(&case, 0..middle).run(&case, None);
        let stepped = (middle + steps).min(t);
        let mut cache = first.cache.clone();
        let mut o = first.o.to_f64();
        let mut events = first.events;
        for t in middle..stepped {
            let step = Piece::of(&case, t..t + 1).step(&case, &mut cache);
            o.extend(step.o.to_f64());
            events.extend(step.events);
        }
        let last = Piece::of(&case, stepped..t).run(&case, Some(&cache));
        o.extend(last.o.to_f64());
        events.extend(last.events);
        prop_assert_eq!(events, whole.events);
        assert_close("o", &o, &whole.o.to_f64());
        assert_same_cache(&last.cache, &whole.cache);
    }

    /// Packing sequences changes nothing.
    #[test]
    fn packing_changes_nothing(mut recipe in recipe(), seed in any::<u64>(), cuts in prop::collection::vec(0.0f64..1.0, 0..4)) {
        let t = recipe.time;
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * t as f64) as usize).collect();
        cuts.sort_unstable();
        let bounds: Vec<usize> = std::iter::once(0).chain(cuts).chain([t]).collect();
        recipe.packed = Some(bounds.windows(2).map(|pair| pair[1] - pair[0]).collect());
        let case = recipe.draw(seed);
        let packed = cpu::Engine.forward(&case.problem().unwrap()).unwrap();
        let width = recipe.value_heads * recipe.dv;
        for (n, pair) in bounds.windows(2).enumerate() {
            let alone = Piece::of(&case, pair[0]..pair[1]).run(&case, None);
            prop_assert_eq!(&packed.events[pair[0] * recipe.value_heads..pair[1] * recipe.value_heads], &alone.events);
            prop_assert_eq!(&packed.o.to_f64()[pair[0] * width..pair[1] * width], alone.o.to_f64());
            let bank = alone.cache.states.len();
            prop_assert_eq!(&packed.cache.states[n * bank..(n + 1) * bank], alone.cache.states);
        }
    }

    /// The order of batch entries changes nothing but the order of results.
    #[test]
    fn batch_order_changes_nothing(mut recipe in recipe(), seed in any::<u64>()) {
        recipe.batch = 2;
        let case = recipe.draw(seed);
        let mut swapped = case.clone();
        let swap_buffer = |x: &mut Buffer| if let Buffer::F32(x) = x { let half = x.len() / 2; x.rotate_left(half) };
        swap_buffer(&mut swapped.q);
        swap_buffer(&mut swapped.k);
        swap_buffer(&mut swapped.v);
        for x in [&mut swapped.g, &mut swapped.beta, &mut swapped.lambda].into_iter().flatten() {
            let half = x.len() / 2;
            x.rotate_left(half);
        }
        let forward = cpu::Engine.forward(&case.problem().unwrap()).unwrap();
        let mut other = cpu::Engine.forward(&swapped.problem().unwrap()).unwrap();
        swap_buffer(&mut other.o);
        prop_assert_eq!(forward.o, other.o);
        let half = other.events.len() / 2;
        other.events.rotate_left(half);
        prop_assert_eq!(forward.events, other.events);
    }

    /// Scaling k or v by a positive constant does not change the plan.
    #[test]
    fn scale_does_not_change_the_plan(recipe in recipe(), seed in any::<u64>(), k in -20i32..20, v in -20i32..20) {
        let case = recipe.draw(seed);
        let mut scaled = case.clone();
        for (x, power) in [(&mut scaled.k, k), (&mut scaled.v, v)] {
            if let Buffer::F32(x) = x {
                x.iter_mut().for_each(|x| *x *= 2f32.powi(power));
            }
        }
        // The delta rule with keys this long overflows; the plan does not know of it.
        for engine in engines() {
            let plan = engine.forward(&case.problem().unwrap()).unwrap().events;
            let other = engine.forward(&scaled.problem().unwrap()).unwrap().events;
            prop_assert_eq!(plan, other, "{}", engine.name());
        }
    }
}

/// The dtype of a result is that of q; everything else is f32.
#[test]
fn results_take_the_dtype_of_q() {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let recipe = Recipe { dtype, time: 5, ..Recipe::default() };
        let case = recipe.draw(1);
        let problem = case.problem().unwrap();
        for engine in engines() {
            let forward = engine.forward(&problem).unwrap();
            let gradients = engine.backward(&problem, &forward.events, &case.upstream()).unwrap();
            let dtypes = [&forward.o, &gradients.q, &gradients.k, &gradients.v].map(Buffer::dtype);
            assert_eq!(dtypes, [dtype; 4]);
        }
    }
}
