//! candle on the CPU: the engine's bits, forward and every gradient; the same graph twice; errors.

use candle_core::{Device, Tensor};
use case::{Variables, bytes, f32s};
use dla::check::Case;
use dla::interop::candle::{Arguments, attention};
use dla::{Buffer, Engine, Options, Read, Recurrence, cpu};

#[path = "candle/case.rs"]
mod case;

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
        let problem = case.problem().unwrap();
        let forward = cpu::Engine.forward(&problem).unwrap();
        let expected = cpu::Engine.backward(&problem, &forward.events, &case.upstream()).unwrap();

        let variables = Variables::of(&case, &Device::Cpu);
        let output = attention(&variables.arguments(), &case.recipe.options, case.cache.as_ref()).unwrap();
        assert_eq!(f32s(&output.o), buffer(&forward.o));
        assert_eq!(bytes(&output.events), forward.events);
        assert_eq!(output.cache.as_ref().unwrap(), &forward.cache);

        let route = expected.route.as_ref();
        let expected = [
            Some(buffer(&expected.q)),
            Some(buffer(&expected.k)),
            Some(buffer(&expected.v)),
            expected.g,
            expected.beta,
            expected.lambda,
            route.map(|route| route.slope.clone()),
            route.map(|route| route.bias.clone()),
            route.and_then(|route| route.logits.clone()),
        ];
        let loss = variables.loss(&output.o);
        // Twice: what the first leaves behind does not change the second.
        for _ in 0..2 {
            assert_eq!(variables.gradients(&loss), expected);
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
    example::learns(&Device::Cpu, 200, 0.4).unwrap();
}
