//! candle on the CPU: the engine's bits, forward and every gradient; the same graph twice; errors.

use candle_core::{Device, Tensor, Var};
use dla::check::{Case, Recipe};
use dla::interop::candle::{Arguments, attention};
use dla::{Buffer, Engine, Options, Read, Recurrence, cpu};

fn var(x: &Buffer, shape: &[usize]) -> Var {
    match x {
        Buffer::F32(x) => Var::from_slice(x, shape, &Device::Cpu),
        Buffer::Bf16(x) => Var::from_slice(x, shape, &Device::Cpu),
        Buffer::F16(x) => Var::from_slice(x, shape, &Device::Cpu),
    }
    .unwrap()
}

fn f32s(x: &Tensor) -> Vec<f32> {
    x.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn buffer(x: &Buffer) -> Vec<f32> {
    x.to_f64().iter().map(|&x| x as f32).collect()
}

#[test]
fn random_cases_are_the_engines_bits() {
    let mut tried = 0;
    for seed in 0..200 {
        let mut case = Case::random(seed);
        // What the operator does not take: packed sequences, gradients of tau and of the cache.
        if case.cu_seqlens.is_some() || case.recipe.options.soft.is_some() || case.recipe.time > 200 {
            continue;
        }
        tried += 1;
        println!("{}", case.describe());
        case.d_cache = None;
        let Recipe { batch, time, heads, value_heads, dk, dv, extra_columns, .. } = case.recipe;
        let (b, t, h, hv) = (batch, time, heads, value_heads);
        let columns = case.recipe.options.capacity + extra_columns;
        let problem = case.problem().unwrap();
        let forward = cpu::Engine.forward(&problem).unwrap();
        let expected = cpu::Engine.backward(&problem, &forward.events, &case.upstream()).unwrap();

        let optional = |x: &Option<Vec<f32>>, shape: &[usize]| {
            x.as_ref().map(|x| Var::from_slice(x, shape, &Device::Cpu).unwrap())
        };
        let (q, k) = (var(&case.q, &[b, t, h, dk]), var(&case.k, &[b, t, h, dk]));
        let v = var(&case.v, &[b, t, hv, dv]);
        let (g, beta) = (optional(&case.g, &[b, t, hv]), optional(&case.beta, &[b, t, hv]));
        let lambda = optional(&case.lambda, &[b, t, hv, columns]);
        let route = case.route.clone();
        let slope = optional(&route.as_ref().map(|route| route.slope.clone()), &[hv]);
        let bias = optional(&route.as_ref().map(|route| route.bias.clone()), &[hv]);
        let logits = optional(&route.and_then(|route| route.logits), &[b, t, hv, columns]);
        let of = |x: &Option<Var>| x.as_ref().map(|x| x.as_tensor().clone());
        let arguments = Arguments {
            q: q.as_tensor().clone(),
            k: k.as_tensor().clone(),
            v: v.as_tensor().clone(),
            g: of(&g),
            beta: of(&beta),
            lambda: of(&lambda),
            slope: of(&slope),
            bias: of(&bias),
            logits: of(&logits),
        };
        let output = attention(&arguments, &case.recipe.options, case.cache.as_ref()).unwrap();
        assert_eq!(f32s(&output.o), buffer(&forward.o));
        assert_eq!(output.events.flatten_all().unwrap().to_vec1::<u8>().unwrap(), forward.events);
        assert_eq!(output.cache.as_ref().unwrap(), &forward.cache);

        let d_o = var(&case.d_o, &[b, t, hv, dv]);
        let loss = (&output.o * d_o.as_tensor()).unwrap().sum_all().unwrap();
        // Twice: what the first leaves behind does not change the second.
        for _ in 0..2 {
            let gradients = loss.backward().unwrap();
            let get = |x: &Var| f32s(gradients.get(x).unwrap());
            assert_eq!(get(&q), buffer(&expected.q));
            assert_eq!(get(&k), buffer(&expected.k));
            assert_eq!(get(&v), buffer(&expected.v));
            assert_eq!(g.as_ref().map(get), expected.g);
            assert_eq!(beta.as_ref().map(get), expected.beta);
            assert_eq!(lambda.as_ref().map(get), expected.lambda);
            let route = expected.route.as_ref();
            assert_eq!(slope.as_ref().map(get), route.map(|route| route.slope.clone()));
            assert_eq!(bias.as_ref().map(get), route.map(|route| route.bias.clone()));
            assert_eq!(logits.as_ref().map(get), route.and_then(|route| route.logits.clone()));
        }
    }
    assert!(tried >= 20, "{tried} cases");
}

#[test]
fn strides_are_taken_and_errors_name_the_argument() {
    let x = Tensor::randn(0f32, 1.0, (1, 2, 6, 8), &Device::Cpu).unwrap().transpose(1, 2).unwrap();
    let lambda = Tensor::ones((1, 6, 2, 30), candle_core::DType::F32, &Device::Cpu).unwrap();
    let arguments = Arguments { lambda: Some(lambda), ..Arguments::new(x.clone(), x.clone(), x.clone()) };
    let options = Options::default();
    let o = attention(&arguments, &options, None).unwrap().o;
    let straight = x.contiguous().unwrap();
    let straight = Arguments { q: straight.clone(), k: straight.clone(), v: straight, ..arguments.clone() };
    assert_eq!(f32s(&o), f32s(&attention(&straight, &options, None).unwrap().o));

    let refused = |arguments: &Arguments, options: &Options, part: &str| {
        let error = attention(arguments, options, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    let shorter = Arguments { k: x.narrow(1, 0, 3).unwrap(), ..arguments.clone() };
    refused(&shorter, &options, "k: expected shape [B,T,H,dk]");
    refused(&Arguments { lambda: None, ..arguments.clone() }, &options, "lambda: missing");
    let doubles = Arguments { v: x.to_dtype(candle_core::DType::F64).unwrap(), ..arguments.clone() };
    refused(&doubles, &options, "v: expected dtype");
    refused(&arguments, &Options { read: Read::Routed, ..options.clone() }, "route_slope: missing");
    refused(&arguments, &Options { recurrence: Recurrence::GatedDelta, ..options.clone() }, "beta: missing");
}

#[path = "../examples/candle.rs"]
#[allow(dead_code)]
mod example;

#[test]
fn the_example_learns() {
    example::train().unwrap();
}
