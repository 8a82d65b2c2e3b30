//! Every wrong call is a typed error that names the argument, the expected and the given.

use dla::check::{Case, Recipe};
use dla::{
    Cache, CacheGradients, Engine, Error, Inputs, Options, OutputGradients, Problem, Read, Recurrence, Route,
    Soft, Tau, Tensor, cpu, reference,
};

fn case(recurrence: Recurrence, read: Read) -> Case {
    let options = Options { recurrence, read, ..Options::default() };
    let recipe = Recipe {
        options,
        batch: 2,
        time: 6,
        heads: 2,
        value_heads: 4,
        dk: 8,
        dv: 16,
        resumed: true,
        final_gradient: true,
        ..Recipe::default()
    };
    recipe.draw(3)
}

/// The error of a call in which `change` has changed one thing.
fn error<'a>(case: &'a Case, change: impl FnOnce(&mut Options, &mut Inputs<'a>)) -> String {
    let mut options = case.recipe.options.clone();
    let mut inputs = case.inputs();
    change(&mut options, &mut inputs);
    let problem = match Problem::new(&options, inputs) {
        Err(error) => return error.to_string(),
        Ok(problem) => problem,
    };
    let ours = cpu::Engine.forward(&problem).map(|_| ()).unwrap_err();
    assert_eq!(Err(ours.clone()), reference::Engine.forward(&problem).map(|_| ()));
    ours.to_string()
}

#[track_caller]
fn assert_says(message: String, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    assert!(!message.contains('\n'));
}

#[test]
fn shapes() {
    let case = case(Recurrence::Gated, Read::Given);
    let zeros = vec![0.0f32; 4096];
    let tensor = |len: usize, shape: &[usize]| Tensor::new(&zeros[..len], shape);
    assert_says(error(&case, |_, i| i.q = tensor(96, &[2, 6, 8])), &["q: ", "rank 4", "[2, 6, 8]"]);
    assert_says(error(&case, |_, i| i.q = tensor(0, &[1; 7])), &["q: ", "rank 4", "2 more"]);
    assert_says(
        error(&case, |_, i| i.q = tensor(100, &[2, 6, 2, 8])),
        &["q: ", "192 elements", "100 elements"],
    );
    assert_says(
        error(&case, |_, i| i.k = tensor(168, &[2, 6, 2, 7])),
        &["k: ", "[2, 6, 2, 8]", "[2, 6, 2, 7]"],
    );
    assert_says(
        error(&case, |_, i| i.k = tensor(160, &[2, 5, 2, 8])),
        &["k: ", "[2, 6, 2, 8]", "[2, 5, 2, 8]"],
    );
    assert_says(
        error(&case, |_, i| i.v = tensor(576, &[2, 6, 3, 16])),
        &["v: ", "HV a multiple of H = 2", "[2, 6, 3, 16]"],
    );
    assert_says(error(&case, |_, i| i.v = tensor(0, &[2, 6, 0, 16])), &["v: ", "[2, 6, 0, 16]"]);
    assert_says(error(&case, |_, i| i.q = tensor(0, &[2, 6, 0, 8])), &["q: ", "H >= 1"]);
    assert_says(error(&case, |_, i| i.q = tensor(0, &[2, 6, 2, 0])), &["q: ", "dk >= 1"]);
    assert_says(error(&case, |_, i| i.g = Some(tensor(24, &[2, 6, 2]))), &["g: ", "[2, 6, 4]", "[2, 6, 2]"]);
    assert_says(
        error(&case, |_, i| i.lambda = Some(tensor(48 * 29, &[2, 6, 4, 29]))),
        &["lambda: ", "[2, 6, 4, 30], M or more", "[2, 6, 4, 29]"],
    );
    let huge = usize::MAX / 4;
    assert_says(
        error(&case, |_, i| {
            i.q = tensor(1, &[huge, huge, 2, 8]);
        }),
        &["q: ", "fits memory", "1 elements"],
    );
}

#[test]
fn dtypes() {
    let case = case(Recurrence::GatedDelta, Read::Given);
    let halves = [half::bf16::ZERO; 2 * 6 * 2 * 8];
    let per_token = [half::f16::ZERO; 2 * 6 * 4];
    let keys = Tensor::new(&halves[..], &[2, 6, 2, 8]);
    assert_says(error(&case, |_, i| i.k = keys), &["k: ", "f32, as q", "bf16"]);
    let betas = Tensor::new(&per_token[..], &[2, 6, 4]);
    assert_says(error(&case, |_, i| i.beta = Some(betas)), &["beta: ", "f32", "f16"]);
}

#[test]
fn values() {
    let case = case(Recurrence::Gated, Read::Given);
    for bad in [0.5f32, f32::NAN, f32::INFINITY] {
        let mut g = case.g.clone().unwrap();
        g[17] = bad;
        let message = error(&case, |_, i| i.g = Some(Tensor::new(&g, &[2, 6, 4])));
        assert_says(message, &["g: ", "at most 0", "element 17"]);
    }
}

#[test]
fn options() {
    let case = case(Recurrence::Gated, Read::Given);
    assert_says(error(&case, |o, _| o.capacity = 0), &["capacity: ", "1 to 64", "got 0"]);
    assert_says(error(&case, |o, _| o.capacity = 65), &["capacity: ", "1 to 64", "got 65"]);
    assert_says(error(&case, |o, _| o.tau = Tau::PerCall(f32::NAN)), &["tau: ", "NaN"]);
    assert_says(error(&case, |o, _| o.tau = Tau::PerHead(vec![0.5; 3])), &["tau: ", "HV = 4", "got 3"]);
    assert_says(error(&case, |o, _| o.tau = Tau::PerHead(vec![f32::NAN; 4])), &["tau: ", "NaN"]);
    assert_says(error(&case, |o, _| o.scale = Some(f32::INFINITY)), &["scale: ", "finite", "inf"]);
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let soft = Soft { temperature, through_drift: false };
        assert_says(error(&case, |o, _| o.soft = Some(soft)), &["temperature: ", "above 0"]);
    }
}

#[test]
fn missing_and_unexpected() {
    let gated = case(Recurrence::Gated, Read::Given);
    let delta = case(Recurrence::GatedDelta, Read::Routed);
    assert_says(error(&delta, |_, i| i.beta = None), &["beta: missing"]);
    let inputs = delta.inputs();
    assert_says(error(&gated, |_, i| i.beta = inputs.beta), &["beta: not expected"]);
    assert_says(error(&gated, |_, i| i.lambda = None), &["lambda: missing"]);
    assert_says(error(&gated, |_, i| i.route = inputs.route), &["route: not expected"]);
    assert_says(error(&delta, |_, i| i.route = None), &["route_slope: missing"]);
    assert_says(error(&delta, |_, i| i.lambda = gated.inputs().lambda), &["lambda: not expected"]);
    let short = vec![0.0f32; 3];
    let wrong = Route { slope: Tensor::new(&short, &[3]), ..inputs.route.unwrap() };
    assert_says(error(&delta, |_, i| i.route = Some(wrong)), &["route_slope: ", "[HV] = [4]", "[3]"]);
    let wrong = Route { bias: Tensor::new(&short, &[3]), ..inputs.route.unwrap() };
    assert_says(error(&delta, |_, i| i.route = Some(wrong)), &["route_bias: ", "[HV] = [4]", "[3]"]);
}

#[test]
fn packed_offsets() {
    let recipe = Recipe { time: 6, packed: Some(vec![2, 4]), ..Recipe::default() };
    let one = recipe.draw(1);
    for (offsets, parts) in [
        (&[][..], &["[N+1]"][..]),
        (&[1, 6], &["expected 0", "got 1", "element 0"]),
        (&[0, 4, 2, 6], &["at least 4", "got 2", "element 2"]),
        (&[0, 5], &["T = 6", "got 5", "element 1"]),
        (&[0, 7], &["T = 6", "got 7"]),
        (&[0, -1, 6], &["at least 0", "got -1"]),
        (&[0], &["T = 6", "got 0"]),
    ] {
        let message = error(&one, |_, i| i.cu_seqlens = Some(offsets));
        assert_says(message, &[&["cu_seqlens: "], parts].concat());
    }
    let two = case(Recurrence::Gated, Read::Given);
    assert_says(error(&two, |_, i| i.cu_seqlens = Some(&[0, 6])), &["cu_seqlens: ", "B = 1"]);
}

#[test]
fn logs() {
    let recipe = Recipe {
        options: Options { capacity: 3, ..Options::default() },
        time: 5,
        value_heads: 1,
        ..Recipe::default()
    };
    let case = recipe.draw(1);
    for (log, parts) in [
        (&[1u8, 1, 1, 1, 0][..], &["token 3", "3 slots", "got 1", "0 or 2 to 3"][..]),
        (&[0, 0, 0, 0, 0], &["token 0", "0 slots", "got 0", "expected 1"]),
        (&[2, 0, 0, 0, 0], &["token 0", "got 2"]),
        (&[1, 2, 0, 0, 0], &["token 1", "1 slots", "got 2"]),
        (&[1, 1, 3, 0, 0], &["token 2", "2 slots", "got 3"]),
        (&[1, 1, 1, 255, 0], &["token 3", "got 255"]),
        (&[1, 1, 1], &["5 elements", "3 elements"]),
    ] {
        assert_says(error(&case, |_, i| i.events = Some(log)), &[&["events: "], parts].concat());
        let problem = case.problem().unwrap();
        for engine in [&cpu::Engine as &dyn Engine, &reference::Engine] {
            let message = engine.backward(&problem, log, &case.upstream()).unwrap_err().to_string();
            assert_says(message, &[&["events: "], parts].concat());
        }
    }
    // A pair may merge before all slots are held: the policy is the caller's.
    let mut inputs = case.inputs();
    inputs.events = Some(&[1, 1, 2, 1, 3]);
    let problem = Problem::new(&recipe.options, inputs).unwrap();
    assert_eq!(cpu::Engine.forward(&problem).unwrap().cache.len, [3]);
}

#[test]
fn caches() {
    let case = case(Recurrence::Gated, Read::Routed);
    let bad = |change: &dyn Fn(&mut Cache)| {
        let mut cache = case.cache.clone().unwrap();
        change(&mut cache);
        error(&case, |_, i| i.cache = Some(&cache))
    };
    assert_says(bad(&|c| c.dims.capacity = 29), &["cache_states: ", "[2,4,30,8,16]", "[2,4,29,8,16]"]);
    assert_says(bad(&|c| c.states.truncate(7)), &["cache_states: ", "7 elements"]);
    assert_says(bad(&|c| c.len.truncate(1)), &["cache_len: ", "8 elements", "1 elements"]);
    assert_says(bad(&|c| c.tokens.truncate(1)), &["cache_tokens: "]);
    assert_says(bad(&|c| c.drift.truncate(1)), &["cache_drift: "]);
    assert_says(bad(&|c| c.open.truncate(1)), &["cache_open: "]);
    assert_says(bad(&|c| c.keys = None), &["cache_keys: missing"]);
    assert_says(bad(&|c| c.keys = Some(vec![])), &["cache_keys: ", "0 elements"]);
    assert_says(bad(&|c| c.len[3] = 31), &["cache_len: ", "at most the capacity", "31", "element 3"]);
    assert_says(
        bad(&|c| {
            c.len[0] = 2;
            c.tokens[1] = 0;
        }),
        &["cache_tokens: ", "at least 1", "element 1"],
    );
}

#[test]
fn output_gradients() {
    let case = case(Recurrence::Gated, Read::Routed);
    let problem = case.problem().unwrap();
    let zeros = vec![0.0f32; 2 * 6 * 4 * 16];
    let halves = vec![half::f16::ZERO; 2 * 6 * 4 * 16];
    let mut short = CacheGradients::zeros(problem.shape().cache_dims(), Read::Routed);
    short.open.truncate(3);
    let mut keyless = case.d_cache.clone().unwrap();
    keyless.keys = None;
    let shape = [2, 6, 4, 16];
    for engine in [&cpu::Engine as &dyn Engine, &reference::Engine] {
        let events = engine.forward(&problem).unwrap().events;
        let says = |o: Tensor, cache: Option<&CacheGradients>, parts: &[&str]| {
            let error = engine.backward(&problem, &events, &OutputGradients { o, cache }).unwrap_err();
            assert_says(error.to_string(), parts);
        };
        says(Tensor::new(&zeros, &[2, 6, 64]), None, &["do: ", "[2, 6, 4, 16]", "[2, 6, 64]"]);
        says(Tensor::new(&halves[..], &shape), None, &["do: ", "f32, as q", "f16"]);
        says(Tensor::new(&zeros, &shape), Some(&short), &["dcache_open: ", "3 elements"]);
        says(Tensor::new(&zeros, &shape), Some(&keyless), &["dcache_keys: missing"]);
    }
}

#[test]
fn steps() {
    let long = case(Recurrence::Gated, Read::Given);
    let recipe = Recipe { time: 1, ..long.recipe.clone() };
    let one = Recipe { resumed: false, ..recipe.clone() }.draw(1);
    let cache = recipe.draw(2).cache.unwrap();
    for engine in [&cpu::Engine as &dyn Engine, &reference::Engine] {
        let says = |problem: &Problem, cache: &Cache, parts: &[&str]| {
            let mut changed = cache.clone();
            assert_says(engine.step(problem, &mut changed).unwrap_err().to_string(), parts);
            assert_eq!(&changed, cache);
        };
        let mut inputs = long.inputs();
        inputs.cache = None;
        let problem = Problem::new(&long.recipe.options, inputs).unwrap();
        says(&problem, &cache, &["q: ", "T = 1"]);
        let mut inputs = one.inputs();
        inputs.cache = Some(&cache);
        says(&Problem::new(&recipe.options, inputs).unwrap(), &cache, &["cache: not expected"]);
        let mut wrong = cache.clone();
        wrong.dims.sequences = 3;
        says(&one.problem().unwrap(), &wrong, &["cache_states: ", "[3,4,30,8,16]"]);
        let mut inputs = one.inputs();
        inputs.events = Some(&[200; 8]);
        says(&Problem::new(&recipe.options, inputs).unwrap(), &cache, &["events: ", "got 200"]);
    }
}

/// Errors can be told apart by type, and compared.
#[test]
fn errors_are_typed() {
    let case = case(Recurrence::Gated, Read::Given);
    let options = Options { capacity: 65, ..Options::default() };
    assert!(matches!(Problem::new(&options, case.inputs()), Err(Error::Option { name: "capacity", .. })));
}
