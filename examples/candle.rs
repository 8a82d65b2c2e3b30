//! Trains a tiny model with candle on the CPU: the second half of every sequence repeats the first, and one layer of Dynamic
//! Linear Attention learns to copy.
//!
//! cargo run --release --example candle --features candle

use candle_core::{D, DType, Device, Result, Tensor, Var};
use dla::interop::candle::{Arguments, attention};
use dla::{Merge, Options, Read, Recurrence};

const SYMBOLS: usize = 16;
const HALF: usize = 6;
const BATCH: usize = 16;
const WIDTH: usize = 64;
const HEADS: usize = 2;
const HEAD: usize = 32;

/// A token and the one before it side by side: what a short convolution gives.
fn with_previous(x: &Tensor) -> Result<Tensor> {
    let time = x.dim(1)?;
    let previous = x.narrow(1, 0, time - 1)?.pad_with_zeros(1, 1, 0)?;
    Tensor::cat(&[x, &previous], D::Minus1)
}

fn main() -> Result<()> {
    learns(&Device::Cpu, 200, 0.4).map(|_| ())
}

/// Trains on a device and returns the loss of every step; panics where it has not fallen to `share` of what it was.
pub fn learns(device: &Device, steps: i32, share: f32) -> Result<Vec<f32>> {
    let normal = |deviation: f32, shape: &[usize]| Var::randn(0f32, deviation, shape, device);
    let embedding = normal(1.0, &[SYMBOLS, WIDTH])?;
    let projection = |width| normal((2.0 * WIDTH as f32).powf(-0.5), &[2 * WIDTH, width]);
    let (q, k, v) = (projection(HEADS * HEAD)?, projection(HEADS * HEAD)?, projection(HEADS * HEAD)?);
    let beta = projection(HEADS)?;
    let (slope, bias) =
        (Var::from_tensor(&Tensor::full(8f32, HEADS, device)?)?, Var::zeros(HEADS, DType::F32, device)?);
    let head = normal((HEADS as f32 * HEAD as f32).powf(-0.5), &[HEADS * HEAD, SYMBOLS])?;
    let parameters = [&embedding, &q, &k, &v, &beta, &slope, &bias, &head];
    let mut moments = Vec::new();
    for parameter in parameters {
        moments.push((parameter.zeros_like()?, parameter.zeros_like()?));
    }
    let options = Options {
        recurrence: Recurrence::GatedDelta,
        read: Read::Routed,
        merge: Merge::Mass,
        capacity: 8,
        qk_l2norm: true,
        ..Options::default()
    };

    let (mut seed, mut losses) = (1u64, Vec::new());
    for step in 1..=steps {
        let mut symbol = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as u32 % SYMBOLS as u32
        };
        let mut tokens: Vec<u32> = Vec::new();
        for _ in 0..BATCH {
            let half: Vec<u32> = (0..HALF).map(|_| symbol()).collect();
            tokens.extend(half.iter().chain(&half).copied());
        }
        let tokens = Tensor::from_vec(tokens, (BATCH, 2 * HALF), device)?;
        let (seen, time) = (tokens.narrow(1, 0, 2 * HALF - 1)?, 2 * HALF - 1);
        let x = embedding.embedding(&seen.flatten_all()?)?.reshape((BATCH, time, WIDTH))?;
        let x = with_previous(&x)?;
        let rows = |w: &Var| x.broadcast_matmul(w)?.reshape((BATCH, time, HEADS, HEAD));
        let mut arguments = Arguments::new(rows(&q)?, rows(&k)?, rows(&v)?);
        // sigmoid(x) = 1 / (1 + e^-x).
        arguments.beta = Some(x.broadcast_matmul(&beta)?.neg()?.exp()?.affine(1.0, 1.0)?.recip()?);
        arguments.slope = Some(slope.as_tensor().clone());
        arguments.bias = Some(bias.as_tensor().clone());
        let o = attention(&arguments, &options, None)?.o.reshape((BATCH, time, HEADS * HEAD))?;
        let logits = o.broadcast_matmul(&head)?.narrow(1, HALF - 1, HALF)?;
        // Cross entropy of the second half.
        let peak = logits.max_keepdim(D::Minus1)?.detach();
        let shifted = logits.broadcast_sub(&peak)?;
        let total = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let target = tokens.narrow(1, HALF, HALF)?.contiguous()?.unsqueeze(2)?;
        let loss = (total - shifted.gather(&target, D::Minus1)?)?.mean_all()?;

        // Adam.
        let gradients = loss.backward()?;
        for (parameter, (mean, square)) in parameters.iter().zip(&mut moments) {
            let Some(gradient) = gradients.get(parameter) else { continue };
            *mean = ((&*mean * 0.9)? + (gradient * 0.1)?)?;
            *square = ((&*square * 0.99)? + (gradient.sqr()? * 0.01)?)?;
            let (a, b) = (1.0 - 0.9f64.powi(step), 1.0 - 0.99f64.powi(step));
            let update = ((&*mean / a)? / ((&*square / b)?.sqrt()? + 1e-8)?)?;
            parameter.set(&(parameter.as_tensor() - (update * 5e-3)?)?)?;
        }
        losses.push(loss.to_scalar::<f32>()?);
        if step % 20 == 0 {
            println!("step {step}: loss {:.3}", losses[losses.len() - 1]);
        }
    }
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() * 9 / 10..]));
    assert!(last < share * first, "it has not learnt: {first} to {last}");
    Ok(losses)
}
