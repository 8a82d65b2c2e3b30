//! Decoding as a server does it: a long input prefilled in pieces, then tokens one at a time, several sequences at once
//! that join and leave. On a GPU where there is one, else on the CPU.
//!
//! `cargo run --release --example generate -- [TOKENS] [STEPS]`
//!
//! There is no model here: q, k and v are drawn, and what is read is fed back as the next value.

use dla::{Dtype, Entries, EntrySpec, Inputs, Options, Problem, Read, Recurrence, StateDtype, Tensor};
use std::sync::Arc;
use std::time::Instant;

const HEADS: usize = 4;
const D: usize = 64;
const PIECE: usize = 4096;

/// Numbers in [-1, 1), the same at every run.
struct Noise(u64);

impl Noise {
    fn take(&mut self, len: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }
}

/// One call's arrays: `rows` rows of `tokens` tokens.
struct Tokens {
    rows: usize,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    lambda: Vec<f32>,
}

impl Tokens {
    fn draw(noise: &mut Noise, rows: usize, tokens: usize, capacity: usize) -> Self {
        let heads = rows * tokens * HEADS;
        Tokens {
            rows,
            tokens,
            q: noise.take(heads * D),
            k: noise.take(heads * D),
            v: noise.take(heads * D),
            g: vec![-0.01; heads],
            lambda: vec![1.0; heads * capacity],
        }
    }

    fn inputs(&self, capacity: usize) -> Inputs<'_> {
        let (b, t) = (self.rows, self.tokens);
        let rows = [b, t, HEADS, D];
        let mut inputs = Inputs::new(
            Tensor::new(&self.q, &rows),
            Tensor::new(&self.k, &rows),
            Tensor::new(&self.v, &rows),
        );
        inputs.g = Some(Tensor::new(&self.g, &[b, t, HEADS]));
        inputs.lambda = Some(Tensor::new(&self.lambda, &[b, t, HEADS, capacity]));
        inputs
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (length, steps) = (number(65_536)?, number(256)?);
    let options = Options { qk_l2norm: true, ..Options::default() };
    let capacity = options.capacity;
    let spec = EntrySpec {
        entries: 3,
        value_heads: HEADS,
        capacity,
        dk: D,
        dv: D,
        recurrence: Recurrence::Gated,
        read: Read::Given,
        states: StateDtype::F32,
    };
    let mut cache: Box<dyn Entries> = match dla::cuda::Engine::new(0) {
        Ok(engine) => {
            println!("on {}", engine.card()?);
            Box::new(dla::cuda::Entries::new(Arc::new(engine), spec)?)
        }
        Err(error) => {
            println!("on the CPU ({error})");
            Box::new(dla::cpu::Entries::new(spec)?)
        }
    };

    // A long input, piece by piece: the entry stays as large as it is.
    let mut noise = Noise(1);
    let long = cache.take()?;
    let start = Instant::now();
    let mut taken = 0;
    while taken < length {
        let tokens = Tokens::draw(&mut noise, 1, PIECE.min(length - taken), capacity);
        let problem = Problem::new(&options, tokens.inputs(capacity))?;
        cache.prefill(&problem, &[long], &[long])?;
        taken += tokens.tokens;
    }
    let bytes = HEADS * (capacity + 1) * D * D * 4;
    println!(
        "prefilled {length} tokens in {:.0} ms; they hold {bytes} bytes",
        1e3 * start.elapsed().as_secs_f64()
    );

    // It goes on token by token; halfway through a copy of it joins, and another sequence that has just begun.
    let mut entries = vec![long];
    let mut values: Vec<Option<Vec<f32>>> = vec![None];
    let start = Instant::now();
    let mut stepped = 0;
    for step in 0..steps {
        if step == steps / 2 {
            let twin = cache.take()?;
            cache.copy(long, twin)?;
            entries.extend([twin, cache.take()?]);
            values.extend([values[0].clone(), None]);
        }
        let mut tokens = Tokens::draw(&mut noise, entries.len(), 1, capacity);
        for (row, value) in tokens.v.chunks_exact_mut(HEADS * D).zip(&values) {
            if let Some(value) = value {
                row.copy_from_slice(value);
            }
        }
        let problem = Problem::new(&options, tokens.inputs(capacity))?;
        assert_eq!(problem.dtype(), Dtype::F32);
        let out = cache.step(&problem, &entries)?;
        let o: Vec<f32> = out.o.to_f64().iter().map(|&x| x as f32).collect();
        // What was read, to unit size, is the next value.
        for (value, o) in values.iter_mut().zip(o.chunks_exact(HEADS * D)) {
            let norm = o.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
            *value = Some(o.iter().map(|x| x * (D as f32).sqrt() / norm).collect());
        }
        stepped += entries.len();
    }
    println!("{stepped} tokens stepped, {:.1} us each", 1e6 * start.elapsed().as_secs_f64() / stepped as f64);
    let held = cache.export(&entries)?;
    for (sequence, entry) in entries.iter().enumerate() {
        let rows = sequence * HEADS..(sequence + 1) * HEADS;
        let tokens: u32 = held.tokens[rows.start * capacity..(rows.start + 1) * capacity].iter().sum();
        println!("entry {entry}: {tokens} tokens in {:?} slots a head", &held.len[rows]);
    }
    Ok(())
}
