//! candle on a GPU: forward and every gradient against the f64 reference, along the GPU's own log; the same bits twice; what
//! is strided; that nothing is copied and that the call takes its turn on candle's stream; training; errors.
//!
//! `scripts/build-candle-cuda` builds it without a CUDA toolkit's libraries. Skips, with a line that says so, where there is no
//! GPU; `DLA_CUDA=require` fails instead. `DLA_CUDA_SEED`: first seed.

use candle_core::{DType, Device, Tensor};
use case::{Variables, bytes, f32s};
use dla::check::{Bounds, Case, Recipe, compare_gradients, relative_error};
use dla::cuda::cudarc::driver::{CudaStream, sys};
use dla::cuda::{self, Call, Engine};
use dla::interop::candle::{Arguments, Output, attention};
use dla::reference::{self, Arguments as Reference};
use dla::{
    Buffer, Dtype, Engine as _, Gradients, Options, Problem, Read, Recurrence, RouteGradients, Soft, Tau,
};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

#[path = "candle/case.rs"]
mod case;

#[path = "../examples/candle.rs"]
#[allow(dead_code)]
mod example;

/// A GPU, one test at a time: they look at how much memory is used, and at what waits.
struct Gpu {
    /// On the stream that candle takes unless told otherwise, the thread's own.
    device: Device,
    /// On a stream made for it.
    other: Device,
    _alone: MutexGuard<'static, ()>,
}

/// `None` where there is no GPU.
fn gpu() -> Option<Gpu> {
    static ALONE: Mutex<()> = Mutex::new(());
    if let Err(error) = cuda::available() {
        assert!(std::env::var_os("DLA_CUDA").is_none_or(|value| value != "require"), "{error}");
        println!("SKIPPED: no GPU: {error}");
        return None;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    Some(Gpu {
        device: Device::new_cuda(0).unwrap(),
        other: Device::new_cuda_with_stream(0).unwrap(),
        _alone,
    })
}

fn first_seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let given = std::env::var("DLA_CUDA_SEED").ok().map(|seed| seed.parse().unwrap());
        let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64 % (1 << 40);
        let seed = given.unwrap_or_else(now);
        println!("seeds from {seed}");
        seed
    })
}

fn stream(device: &Device) -> Arc<CudaStream> {
    device.as_cuda_device().unwrap().cuda_stream()
}

/// Leaves NaN in the memory that the next results are made of.
fn poison(device: &Device) {
    let sizes = [1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 26];
    let _held = sizes.map(|len| Tensor::full(f32::NAN, len, device).unwrap());
}

/// What a call gave: o, the log, the gradients.
type Results = (Vec<f32>, Vec<u8>, [Option<Vec<f32>>; 9]);

fn run(case: &Case, device: &Device) -> Results {
    let variables = Variables::of(case, device);
    poison(device);
    let Output { o, events, cache } = attention(&variables.arguments(), &case.recipe.options, None).unwrap();
    assert!(cache.is_none());
    assert!(o.device().same_device(device) && events.device().same_device(device));
    let loss = variables.loss(&o);
    poison(device);
    let gradients = variables.gradients(&loss);
    (f32s(&o), bytes(&events), gradients)
}

/// Judges what candle gave by the reference.
fn judge(case: &Case, problem: &Problem, results: &Results) {
    let (o, events, [q, k, v, g, beta, lambda, slope, bias, logits]) = results;
    let dtype = case.recipe.dtype;
    let mut wrong = Vec::new();
    let arguments = Reference::of(problem);
    let expected = reference::forward(problem, &arguments, Some(events), None);
    let o: Vec<f64> = o.iter().map(|&x| x.into()).collect();
    let (error, worst) = relative_error(&o, &expected.o);
    print!("  o {error:.1e}");
    if error.is_nan() || error > Bounds::cuda(dtype).rounded(dtype, &expected.o) {
        wrong.push(format!("o off by {error:.2e}, most at element {worst}"));
    }

    // The log and, with soft boundaries, what reaches tau and the drift, which candle is not given: the engine's own.
    let engine = Engine::new(0).unwrap();
    let own = engine.forward(problem).unwrap();
    assert!(own.events == *events, "{}: another log than the engine's", case.describe());
    let soft = case
        .recipe
        .options
        .soft
        .and_then(|_| engine.backward(problem, events, &case.upstream()).unwrap().soft);
    let buffer = |x: &Option<Vec<f32>>| Buffer::from_f32(dtype, x.as_ref().unwrap());
    let route = slope.clone().zip(bias.clone());
    let gradients = Gradients {
        q: buffer(q),
        k: buffer(k),
        v: buffer(v),
        g: g.clone(),
        beta: beta.clone(),
        lambda: lambda.clone(),
        route: route.map(|(slope, bias)| RouteGradients { slope, bias, logits: logits.clone() }),
        soft,
        cache: None,
    };
    for row in compare_gradients(case, problem, events, &gradients, Bounds::cuda_gradients(dtype)) {
        if row.tensor == "ddrift" || row.tensor == "dtau" {
            continue;
        }
        print!("  {} {:.1e}", row.tensor, row.error);
        if !row.passed() {
            wrong.push(format!("{} off by {:.2e}, most at element {}", row.tensor, row.error, row.worst));
        }
    }
    println!();
    assert!(wrong.is_empty(), "{}: {wrong:?}", case.describe());
}

/// Runs a case on both streams, twice on one, and judges it.
fn check(gpu: &Gpu, case: &Case) {
    println!("{}", case.describe());
    let problem = case.problem().unwrap();
    let results = run(case, &gpu.device);
    judge(case, &problem, &results);
    for device in [&gpu.device, &gpu.other] {
        assert!(run(case, device) == results, "{}: other bits in another run", case.describe());
    }
}

#[test]
fn both_recurrences_in_every_dtype_with_grouped_heads() {
    let Some(gpu) = gpu() else { return };
    let mut seed = first_seed();
    for recurrence in [Recurrence::Gated, Recurrence::GatedDelta] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for read in [Read::Given, Read::Routed] {
                // In bf16 enough tokens for Hopper's own kernels.
                let recipe = Recipe {
                    options: Options { recurrence, read, capacity: 8, ..Options::default() },
                    batch: 2,
                    time: 300,
                    heads: 2,
                    value_heads: 4,
                    dk: 64,
                    dv: 128,
                    dtype,
                    boundary_rate: 0.25,
                    logits: true,
                    extra_columns: 3,
                    ..Recipe::default()
                };
                check(&gpu, &recipe.draw(seed));
                seed += 1;
            }
        }
    }
}

#[test]
fn random_cases() {
    let Some(gpu) = gpu() else { return };
    for seed in first_seed()..first_seed() + 40 {
        // What the operator does not take on a GPU: packed sequences, caches.
        let recipe = Case::random(seed).recipe;
        check(&gpu, &Recipe { packed: None, resumed: false, final_gradient: false, ..recipe }.draw(seed));
    }
}

#[test]
fn soft_boundaries() {
    let Some(gpu) = gpu() else { return };
    for (i, recurrence) in [Recurrence::Gated, Recurrence::GatedDelta].into_iter().enumerate() {
        let soft = Some(Soft { temperature: 0.2, through_drift: true });
        let tau = Tau::PerHead(vec![0.5, 0.6, 0.7, 0.8]);
        let options = Options { recurrence, soft, tau, ..Options::default() };
        let recipe = Recipe {
            options,
            time: 200,
            heads: 2,
            value_heads: 4,
            dk: 32,
            dv: 32,
            boundary_rate: 0.25,
            ..Recipe::default()
        };
        check(&gpu, &recipe.draw(first_seed() + i as u64));
    }
}

#[test]
fn strides_are_taken() {
    let Some(gpu) = gpu() else { return };
    let recipe = Recipe { time: 100, heads: 2, value_heads: 4, dk: 32, dv: 64, ..Recipe::default() };
    let case = recipe.draw(first_seed());
    let plain = Variables::of(&case, &gpu.device);
    let given = attention(&plain.arguments(), &recipe.options, None).unwrap().o;
    let expected = plain.gradients(&plain.loss(&given));

    // q held as [B,H,T,dk]; k the middle of something longer; v every other row of something.
    let mut strided = Variables::of(&case, &gpu.device);
    let [q, k, v] = [0, 1, 2].map(|i| strided.all[i].as_ref().unwrap().as_detached_tensor());
    let of = |x: &Tensor| candle_core::Var::from_tensor(x).unwrap();
    let q = of(&q.transpose(1, 2).unwrap().contiguous().unwrap());
    let k = of(&k.pad_with_same(0, 1, 1).unwrap());
    let v = of(&Tensor::stack(&[&v, &v.zeros_like().unwrap()], 2).unwrap());
    let mut arguments = strided.arguments();
    arguments.q = q.as_tensor().transpose(1, 2).unwrap();
    arguments.k = k.as_tensor().narrow(0, 1, 1).unwrap();
    arguments.v = v.as_tensor().narrow(2, 0, 1).unwrap().squeeze(2).unwrap();
    assert!(!arguments.q.is_contiguous() && arguments.k.is_contiguous() && !arguments.v.is_contiguous());
    assert_ne!(arguments.k.layout().start_offset(), 0);
    let o = attention(&arguments, &recipe.options, None).unwrap().o;
    assert!(f32s(&o) == f32s(&given));

    for (place, x) in strided.all.iter_mut().zip([&q, &k, &v]) {
        *place = Some(x.clone());
    }
    let gradients = strided.loss(&o).backward().unwrap();
    let of = |x: &candle_core::Var| gradients.get(x).unwrap().clone();
    let zeros = |x: &Tensor| f32s(x).iter().all(|&x| x == 0.0);
    assert_eq!(Some(f32s(&of(&q).transpose(1, 2).unwrap())), expected[0]);
    assert_eq!(Some(f32s(&of(&k).narrow(0, 1, 1).unwrap())), expected[1]);
    assert_eq!(Some(f32s(&of(&v).narrow(2, 0, 1).unwrap())), expected[2]);
    for around in [of(&k).narrow(0, 0, 1), of(&k).narrow(0, 2, 1), of(&v).narrow(2, 1, 1)] {
        assert!(zeros(&around.unwrap()));
    }
    for i in 3..9 {
        assert_eq!(strided.all[i].as_ref().map(|x| f32s(&of(x))), expected[i]);
    }
}

/// The pool that candle's memory comes from.
struct Pool(sys::CUmemoryPool);

impl Pool {
    fn of(stream: &CudaStream) -> Self {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device is the context's, which is alive.
        unsafe { sys::cuDeviceGetMemPool(&mut pool, stream.context().cu_device()) }.result().unwrap();
        Pool(pool)
    }

    /// Bytes handed out.
    fn used(&self) -> u64 {
        self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    /// Most bytes handed out since [`Pool::forget`].
    fn most(&self) -> u64 {
        self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> u64 {
        let mut value = 0u64;
        // SAFETY: both attributes are 64 bits.
        unsafe { sys::cuMemPoolGetAttribute(self.0, attribute, (&raw mut value).cast()) }.result().unwrap();
        value
    }

    fn forget(&self) {
        let mut zero = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: 64 bits, which must be 0.
        unsafe { sys::cuMemPoolSetAttribute(self.0, attribute, (&raw mut zero).cast()) }.result().unwrap();
    }
}

#[test]
fn nothing_is_copied() {
    let Some(gpu) = gpu() else { return };
    let stream = stream(&gpu.device);
    if !stream.context().has_async_alloc() {
        println!("SKIPPED: this GPU has no memory pools");
        return;
    }
    let recipe = Recipe {
        time: 4096,
        heads: 8,
        value_heads: 8,
        dk: 128,
        dv: 128,
        dtype: Dtype::Bf16,
        ..Recipe::default()
    };
    let case = recipe.draw(first_seed());
    let arguments = Variables::of(&case, &gpu.device).arguments();
    let problem = case.problem().unwrap();
    let call = Call { final_cache: false, ..Call::of(&problem) };
    let workspace = Engine::new(0).unwrap().plan(&call).unwrap().workspace_bytes() as u64;
    // The kernels are loaded, the engine is there.
    drop(attention(&arguments, &recipe.options, None).unwrap());
    gpu.device.synchronize().unwrap();

    let pool = Pool::of(&stream);
    pool.forget();
    let before = pool.used();
    let output = attention(&arguments, &recipe.options, None).unwrap();
    gpu.device.synchronize().unwrap();
    let taken = pool.most() - before;
    let (tokens, argument) = (4096 * 8u64, 4096 * 8 * 128 * 2u64);
    // o, drift, log, and a rest, far less than an argument, for what is small or rounded up.
    let wanted = argument + 5 * tokens + workspace + (2 << 20);
    println!("{taken} bytes at most, {workspace} of them workspace; an argument has {argument}");
    assert!(taken <= wanted, "{taken} bytes taken, expected {wanted} at most: is something copied?");
    drop(output);
}

#[test]
fn the_call_takes_its_turn_on_candles_stream() {
    let Some(gpu) = gpu() else { return };
    for device in [&gpu.device, &gpu.other] {
        let recipe = Recipe { time: 300, heads: 2, value_heads: 4, dk: 64, dv: 64, ..Recipe::default() };
        let case = recipe.draw(first_seed());
        let (expected, log, gradients) = run(&case, device);
        let wide = Tensor::full(1.0 / 8192.0f32, (8192, 8192), device).unwrap();
        let stream = stream(device);
        // First what loads kernels, which may wait for the GPU; then with much still to be done for q.
        for products in [1, 12] {
            let variables = Variables::of(&case, device);
            poison(device);
            device.synchronize().unwrap();
            let mut x = wide.clone();
            for _ in 0..products {
                x = x.matmul(&wide).unwrap();
            }
            let corner = x.narrow(0, 0, 1).unwrap().narrow(1, 0, 1).unwrap().reshape((1, 1, 1, 1)).unwrap();
            let mut arguments = variables.arguments();
            // Every entry of the product is one 8192th: q is what it was.
            let nothing = corner.affine(8192.0, -1.0).unwrap();
            arguments.q = arguments.q.broadcast_add(&nothing).unwrap();
            // SAFETY: candle's stream, which is alive.
            let state = || unsafe { sys::cuStreamQuery(stream.cu_stream()) };
            let busy = || state() == sys::CUresult::CUDA_ERROR_NOT_READY;
            let before = busy();
            let Output { o, events, .. } = attention(&arguments, &recipe.options, None).unwrap();
            let after = busy();
            println!("{products} products: the stream is busy before the call: {before}, after it: {after}");
            assert!(before || products == 1, "q was there before the call: the test says nothing");
            assert!(f32s(&o) == expected && bytes(&events) == log);
            assert!(variables.gradients(&variables.loss(&o)) == gradients);
        }
    }
}

#[test]
fn fifty_steps_of_training() {
    let Some(gpu) = gpu() else { return };
    let train = || {
        gpu.device.set_seed(first_seed()).unwrap();
        example::learns(&gpu.device, 50, 0.7).unwrap()
    };
    let losses = train();
    println!("loss {:.3} to {:.3}", losses[0], losses[losses.len() - 1]);
    assert_eq!(losses, train());
}

#[test]
fn errors_name_the_argument() {
    let Some(gpu) = gpu() else { return };
    let recipe = Recipe { time: 6, heads: 2, value_heads: 2, dk: 8, dv: 8, ..Recipe::default() };
    let case = recipe.draw(first_seed());
    let arguments = Variables::of(&case, &gpu.device).arguments();
    let options = recipe.options.clone();
    let refused = |arguments: &Arguments, options: &Options, part: &str| {
        let error = attention(arguments, options, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    let shorter = Arguments { k: arguments.k.narrow(1, 0, 3).unwrap(), ..arguments.clone() };
    refused(&shorter, &options, "k: expected shape");
    let narrow = arguments.lambda.as_ref().map(|lambda| lambda.narrow(3, 0, 29).unwrap());
    refused(&Arguments { lambda: narrow, ..arguments.clone() }, &options, "lambda: expected shape");
    refused(&Arguments { lambda: None, ..arguments.clone() }, &options, "lambda: missing");
    let doubles = Arguments { v: arguments.v.to_dtype(DType::F64).unwrap(), ..arguments.clone() };
    refused(&doubles, &options, "v: expected dtype");
    let there = Arguments { v: arguments.v.to_device(&Device::Cpu).unwrap(), ..arguments.clone() };
    refused(&there, &options, "v: expected a tensor of q's device");
    refused(&arguments, &Options { read: Read::Routed, ..options.clone() }, "lambda: not expected");
    refused(&arguments, &Options { recurrence: Recurrence::GatedDelta, ..options.clone() }, "beta: missing");
    let taus = Options { tau: Tau::PerHead(vec![0.5]), ..options.clone() };
    refused(&arguments, &taus, "tau: expected 2 numbers, got 1");
    let cache = case.problem().map(|problem| reference::Engine.forward(&problem).unwrap().cache).unwrap();
    let error = attention(&arguments, &options, Some(&cache)).unwrap_err().to_string();
    assert!(error.contains("cache: not expected"), "{error}");
    // And the device is as it was.
    attention(&arguments, &options, None).unwrap();
    gpu.device.synchronize().unwrap();
}
