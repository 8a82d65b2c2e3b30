//! Forward, backward and step through the C ABI give the bits that the engine gives; its errors name the argument.

mod common;

use common::{Bytes, CacheBytes, Owned, message};
use dla::check::{Case, Recipe};
use dla::{Engine, Options, Read, Recurrence, cpu};
use dla_capi::*;
use std::ptr::null;

#[test]
fn random_cases_are_the_engines_bits() {
    for seed in 0..60 {
        let case = Case::random(seed);
        println!("{}", case.describe());
        let (recipe, problem) = (&case.recipe, case.problem().unwrap());
        let expected = cpu::Engine.forward(&problem).unwrap();
        let gradients = cpu::Engine.backward(&problem, &expected.events, &case.upstream()).unwrap();
        let routed = recipe.options.read == Read::Routed;

        let mut owned = Owned::of(&case);
        let tokens = problem.shape().tokens() * recipe.value_heads;
        let o = Bytes::new(tokens * recipe.dv * recipe.dtype.bytes());
        let (drift, events) = (Bytes::new(tokens * 4), Bytes::new(tokens));
        let lambda = routed.then(|| Bytes::new(tokens * recipe.options.capacity * 4));
        let cache = CacheBytes::of(&dla::Cache::empty(expected.cache.dims, recipe.options.read));
        let arrays = cache.arrays();
        let results = Results {
            o: o.buffer(),
            drift: drift.buffer(),
            events: events.buffer(),
            lambda: common::buffer(&lambda),
            cache: &raw const arrays,
            ..Results::default()
        };
        let mut workspace = usize::MAX;
        // SAFETY: structs and buffers are as they say.
        unsafe {
            assert_eq!(
                dla_forward_workspace(&owned.options, &owned.call, &results, &mut workspace),
                Status::Ok
            );
            assert_eq!(dla_forward(&owned.options, &owned.call, &results), Status::Ok, "{}", message());
        }
        assert_eq!(workspace, 0);
        assert_eq!(o.to_elements(recipe.dtype), expected.o);
        assert_eq!(drift.to_f32(), expected.drift);
        assert_eq!(events.get(), expected.events);
        assert_eq!(lambda.map(|lambda| lambda.to_f32()), expected.lambda);
        assert_eq!(cache.states.to_f32(), expected.cache.states);
        assert_eq!(cache.len.to_u32(), expected.cache.len);
        assert_eq!(cache.tokens.to_u32(), expected.cache.tokens);
        assert_eq!(cache.drift.to_u32(), expected.cache.drift);
        assert_eq!(cache.open.to_f32(), expected.cache.open);
        assert_eq!(cache.keys.map(|keys| keys.to_f32()), expected.cache.keys);

        let room = |x: &Option<Vec<f32>>| x.as_ref().map(|x| Bytes::new(x.len() * 4));
        let d_o = Bytes::of_elements(&case.d_o);
        let d_final = case.d_cache.as_ref().map(CacheBytes::of_gradients);
        let d_final = d_final.as_ref().map(CacheBytes::gradients);
        let upstream = Upstream {
            o: d_o.buffer(),
            cache: d_final.as_ref().map_or(null(), |arrays| arrays),
            ..Upstream::default()
        };
        let [dq, dk, dv] =
            [&gradients.q, &gradients.k, &gradients.v].map(|x| Bytes::new(x.len() * recipe.dtype.bytes()));
        let [dg, dbeta, dlambda] = [&gradients.g, &gradients.beta, &gradients.lambda].map(room);
        let route = gradients.route.as_ref();
        let dslope = route.map(|route| Bytes::new(route.slope.len() * 4));
        let dbias = route.map(|route| Bytes::new(route.bias.len() * 4));
        let dlogits = route.and_then(|route| room(&route.logits));
        let dtau = gradients.soft.as_ref().map(|soft| Bytes::new(soft.tau.len() * 4));
        let ddrift = gradients.soft.as_ref().map(|soft| Bytes::new(soft.drift.len() * 4));
        let d_cache = gradients.cache.as_ref().map(|cache| {
            CacheBytes::of_gradients(&dla::CacheGradients::zeros(expected.cache.dims, recipe.options.read));
            let zeros = dla::CacheGradients {
                states: vec![7.0; cache.states.len()],
                open: vec![7.0; cache.open.len()],
                keys: cache.keys.as_ref().map(|keys| vec![7.0; keys.len()]),
            };
            CacheBytes::of_gradients(&zeros)
        });
        let d_arrays = d_cache.as_ref().map(CacheBytes::gradients);
        let wanted = Gradients {
            q: dq.buffer(),
            k: dk.buffer(),
            v: dv.buffer(),
            g: common::buffer(&dg),
            beta: common::buffer(&dbeta),
            lambda: common::buffer(&dlambda),
            route_slope: common::buffer(&dslope),
            route_bias: common::buffer(&dbias),
            route_logits: common::buffer(&dlogits),
            tau: common::buffer(&dtau),
            drift: common::buffer(&ddrift),
            cache: d_arrays.as_ref().map_or(null(), |arrays| arrays),
            ..Gradients::default()
        };
        owned.call.events = events.buffer();
        // SAFETY: as above.
        unsafe {
            assert_eq!(
                dla_backward_workspace(&owned.options, &owned.call, &upstream, &wanted, &mut workspace),
                Status::Ok
            );
            let status = dla_backward(&owned.options, &owned.call, &upstream, &wanted);
            assert_eq!(status, Status::Ok, "{}", message());
        }
        let floats = |x: Option<Bytes>| x.map(|x| x.to_f32());
        assert_eq!(dq.to_elements(recipe.dtype), gradients.q);
        assert_eq!(dk.to_elements(recipe.dtype), gradients.k);
        assert_eq!(dv.to_elements(recipe.dtype), gradients.v);
        assert_eq!(floats(dg), gradients.g);
        assert_eq!(floats(dbeta), gradients.beta);
        assert_eq!(floats(dlambda), gradients.lambda);
        assert_eq!(floats(dslope), route.map(|route| route.slope.clone()));
        assert_eq!(floats(dbias), route.map(|route| route.bias.clone()));
        assert_eq!(floats(dlogits), route.and_then(|route| route.logits.clone()));
        assert_eq!(floats(dtau), gradients.soft.as_ref().map(|soft| soft.tau.clone()));
        assert_eq!(floats(ddrift), gradients.soft.as_ref().map(|soft| soft.drift.clone()));
        if let (Some(given), Some(expected)) = (d_cache, &gradients.cache) {
            assert_eq!(given.states.to_f32(), expected.states);
            assert_eq!(given.open.to_f32(), expected.open);
            assert_eq!(given.keys.map(|keys| keys.to_f32()), expected.keys);
        }
    }
}

#[test]
fn steps_are_the_engines_bits() {
    for (recurrence, read) in [(Recurrence::Gated, Read::Given), (Recurrence::GatedDelta, Read::Routed)] {
        let options = Options { recurrence, read, capacity: 3, ..Options::default() };
        let recipe =
            Recipe { options, batch: 3, time: 1, value_heads: 2, resumed: true, ..Recipe::default() };
        let case = recipe.draw(5);
        let mut cache = case.cache.clone().unwrap();
        let arrays = CacheBytes::of(&cache);
        let mut inputs = case.inputs();
        inputs.cache = None;
        let problem = dla::Problem::new(&case.recipe.options, inputs).unwrap();
        let expected = cpu::Engine.step(&problem, &mut cache).unwrap();

        let mut owned = Owned::of(&case);
        owned.call.cache = null();
        let (o, events) = (Bytes::new(3 * 2 * 16 * 4), Bytes::new(3 * 2));
        let results = Results { o: o.buffer(), events: events.buffer(), ..Results::default() };
        // SAFETY: structs and buffers are as they say.
        let status = unsafe { dla_step(&owned.options, &owned.call, &arrays.arrays(), &results) };
        assert_eq!(status, Status::Ok, "{}", message());
        assert_eq!(o.to_elements(recipe.dtype), expected.o);
        assert_eq!(events.get(), expected.events);
        assert_eq!(arrays.states.to_f32(), cache.states);
        assert_eq!(arrays.tokens.to_u32(), cache.tokens);
        assert_eq!(arrays.open.to_f32(), cache.open);
    }
}

#[test]
fn errors_name_the_argument() {
    let case = Recipe { time: 6, ..Recipe::default() }.draw(1);
    let o = Bytes::new(6 * 16 * 4);
    let results = Results { o: o.buffer(), ..Results::default() };
    let refused = |status: Status, parts: &[&str], change: &dyn Fn(&mut CallOptions, &mut Call)| {
        let mut owned = Owned::of(&case);
        let owned = &mut *owned;
        change(&mut owned.options, &mut owned.call);
        // SAFETY: structs and buffers are as they say, or refused for what they say.
        assert_eq!(unsafe { dla_forward(&owned.options, &owned.call, &results) }, status, "{}", message());
        for part in parts {
            assert!(message().contains(part), "{:?} does not say {part:?}", message());
        }
    };
    refused(Status::Shape, &["q: ", "384 bytes", "383 bytes"], &|_, call| call.q.bytes -= 1);
    refused(Status::Missing, &["k: "], &|_, call| call.k = Buffer::ABSENT);
    refused(Status::Missing, &["v: ", "null"], &|_, call| call.v.data = std::ptr::null_mut());
    refused(Status::Pointer, &["g: ", "multiple of 4"], &|_, call| {
        call.g.data = call.g.data.wrapping_byte_add(1);
    });
    refused(Status::Unexpected, &["beta: "], &|_, call| call.beta = call.g);
    refused(Status::Option, &["capacity: ", "65"], &|options, _| options.capacity = 65);
    refused(Status::Option, &["merge: ", "9"], &|options, _| options.merge = 9);
    refused(Status::Option, &["dtype: ", "-1"], &|_, call| call.dtype = -1);
    refused(Status::Shape, &["options.size: "], &|options, _| options.size = 8);
    refused(Status::Shape, &["fits memory"], &|_, call| call.dk = usize::MAX / 2);
    refused(Status::Missing, &["cu_seqlens: "], &|_, call| call.sequences = 2);
    // SAFETY: null is refused.
    unsafe {
        assert_eq!(dla_forward(null(), null(), null()), Status::Missing);
        assert!(message().contains("options: "), "{}", message());
        dla_cache_destroy(std::ptr::null_mut());
    }
    if dla_cuda_available() != Status::Ok {
        refused(Status::Device, &["device: "], &|_, call| call.device = DeviceCode::Cuda as i32);
    }
}

/// What a thread keeps is its own.
#[test]
fn messages_are_a_threads_own() {
    let first = std::thread::spawn(|| {
        // SAFETY: null is refused.
        unsafe { dla_forward(null(), null(), null()) };
        message()
    });
    assert!(first.join().unwrap().contains("options"));
    assert_eq!(message(), "");
}
