//! `dla bench` on a GPU: every stage by the GPU's own clock.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use dla::check::Recipe;
use dla::cuda::{
    self, Call, Engine, Memory, Plan, RawCache, RawForward, RawGradients, RawInputs, RawOutputs, RawUpstream,
};
use dla::events::EXTEND;
use dla::{Buffer, Dtype, Read, Recurrence, Shape, Stage};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use serde::Serialize;

use super::{Args, DtypeArg, Pass, name};
use crate::common::Common;
use crate::output::Output;

/// Sets of inputs that calls alternate between.
const SETS: usize = 2;

/// Bytes that are written between two calls, so that none finds its inputs in L2.
const FLUSH_BYTES: usize = 256 << 20;

/// Bytes that are copied to measure how fast the GPU copies.
const COPY_BYTES: usize = 1 << 30;

/// Most bytes of an array that is drawn on the host at once.
const PIECE_BYTES: usize = 64 << 20;

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: &'static str,
    card: String,
    driver: String,
    source_hash: &'static str,
    dtype: String,
    repeats: u16,
    seed: u64,
    ceilings: Ceilings,
    first_call: FirstCall,
    bench: Vec<Row>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Device to device, read and written bytes.
    pub copy_gb_s: f64,
    /// As given by `--matmul-tflop-s`.
    pub matmul_tflop_s: f64,
}

/// What a fresh process waits for before it has its first result.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct FirstCall {
    /// libcuda and the driver.
    driver_ms: f64,
    /// The primary context.
    context_ms: f64,
    /// Loading the kernels.
    kernels_ms: f64,
    /// The first launch of all stages, until it is done.
    launch_ms: f64,
}

/// One stage of one pass.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    size: String,
    recurrence: String,
    capacity: usize,
    /// As the log has it.
    pub boundary_rate: f64,
    merge: String,
    read: String,
    pub pass: &'static str,
    /// Or, of pass `backward_kernels`, a kernel and how often it was launched.
    pub stage: String,
    /// Median.
    pub ms: f64,
    /// What bytes and products alone would take at the ceilings.
    pub floor_ms: f64,
    /// Memory beside inputs and outputs.
    peak_mb: f64,
}

/// Runs the subcommand on GPU 0.
pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    ensure!(args.plot.is_none(), "--plot: drawn for the CPU alone, or of a sweep");
    check_ceiling(args)?;
    let json = args.json.as_deref().map(Output::at).transpose()?;
    let mut recipes = Vec::new();
    for (size, shape) in args.shapes() {
        recipes.push((size, args.recipe(shape, DtypeArg::Bf16)?));
    }
    let mut first_call = FirstCall::default();
    let start = Instant::now();
    cuda::available()?;
    first_call.driver_ms = ms_since(start);
    let start = Instant::now();
    let engine = Engine::new(0)?;
    first_call.context_ms = ms_since(start);

    let bar = common.progress(recipes.len() as u64, "bench");
    let mut ceilings = None;
    let mut rows = Vec::new();
    for (size, recipe) in &recipes {
        bar.set_message(size.clone());
        let first = rows.is_empty().then_some(&mut first_call);
        rows.extend(measure(&engine, args, size, recipe, first, &mut ceilings)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: "cuda",
        card: engine.card()?,
        driver: engine.driver_version()?,
        source_hash: cuda::SOURCE_HASH,
        dtype: recipes.first().map_or_else(String::new, |(_, recipe)| recipe.dtype.to_string()),
        repeats: args.repeats,
        seed: args.seed,
        ceilings: ceilings.unwrap_or(Ceilings { copy_gb_s: 0.0, matmul_tflop_s: args.matmul_tflop_s }),
        first_call,
        bench: rows,
    };
    common.print(&text(&report))?;
    let mut text = serde_json::to_string_pretty(&report)?;
    text.push('\n');
    if let Some(json) = json {
        json.write(text.as_bytes())?;
    }
    if let Some(folder) = std::env::var_os("DLA_EVIDENCE") {
        let path = PathBuf::from(folder).join(format!("bench-{}.json", std::process::id()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn check_ceiling(args: &Args) -> anyhow::Result<()> {
    ensure!(
        args.matmul_tflop_s > 0.0 && args.matmul_tflop_s.is_finite(),
        "--matmul-tflop-s: expected a number above 0, got {}",
        args.matmul_tflop_s
    );
    Ok(())
}

/// What a sweep measured.
pub struct Points {
    pub card: String,
    pub ceilings: Ceilings,
    /// Of every recipe, in order.
    pub rows: Vec<Vec<Row>>,
}

/// Rows of every point of a sweep, on GPU 0.
pub fn points(args: &Args, recipes: &[(f64, Recipe)], common: &Common) -> anyhow::Result<Points> {
    check_ceiling(args)?;
    cuda::available()?;
    let engine = Engine::new(0)?;
    let bar = common.progress(recipes.len() as u64, "bench");
    let (mut ceilings, mut rows) = (None, Vec::new());
    for (value, recipe) in recipes {
        let value = value.to_string();
        bar.set_message(value.clone());
        rows.push(measure(&engine, args, &value, recipe, None, &mut ceilings)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let ceilings = ceilings.unwrap_or(Ceilings { copy_gb_s: 0.0, matmul_tflop_s: args.matmul_tflop_s });
    Ok(Points { card: engine.card()?, ceilings, rows })
}

fn ms_since(start: Instant) -> f64 {
    1e3 * start.elapsed().as_secs_f64()
}

/// The lower of two medians: one that was measured.
pub fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x.get(x.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}

/// Rows of one shape.
fn measure(
    engine: &Engine,
    args: &Args,
    size: &str,
    recipe: &Recipe,
    first_call: Option<&mut FirstCall>,
    ceilings: &mut Option<Ceilings>,
) -> anyhow::Result<Vec<Row>> {
    let Recipe { batch, time, heads, value_heads, dk, dv, dtype, ref options, .. } = *recipe;
    let shape =
        Shape { batch, time, heads, value_heads, dk, dv, capacity: options.capacity, sequences: batch };
    let call = Call { options, shape, dtype, final_cache: args.final_cache };
    let start = Instant::now();
    let plan = engine.plan(&call)?;
    let kernels_ms = ms_since(start);
    let workspace = engine.allocate(plan.workspace_bytes())?;
    let sets = (0..SETS as u64)
        .map(|set| InputSet::draw(engine, recipe, args.tau, args.seed.wrapping_add(set)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let results = Results::new(engine, &shape, dtype, options.read, args.final_cache)?;
    let launch = |set: usize, timeline: Option<&cuda::Timeline>| {
        let inputs = &sets[set % SETS].inputs;
        // SAFETY: every array was made of the extents of `shape`, for this engine's GPU, and lives to the end.
        unsafe {
            engine.launch(&plan, inputs, &results.outputs, (workspace.address(), workspace.bytes()), timeline)
        }
    };
    let start = Instant::now();
    launch(0, None)?;
    engine.synchronize()?;
    if let Some(first_call) = first_call {
        (first_call.kernels_ms, first_call.launch_ms) = (kernels_ms, ms_since(start));
    }
    let ceilings = match *ceilings {
        Some(ceilings) => ceilings,
        None => {
            *ceilings.insert(Ceilings { copy_gb_s: copy_gb_s(engine)?, matmul_tflop_s: args.matmul_tflop_s })
        }
    };

    let flush = engine.allocate(FLUSH_BYTES)?;
    let timeline = engine.timeline()?;
    let clock = engine.clock()?;
    let (mut stages, mut whole) = (vec![Vec::new(); Stage::ALL.len()], Vec::new());
    // Calls that are not timed: the GPU takes its clock up.
    for set in 0..3 {
        launch(set, None)?;
    }
    for repeat in 0..usize::from(args.repeats) {
        engine.fill(&flush, repeat as u8)?;
        launch(repeat, Some(&timeline))?;
        for (stage, ms) in stages.iter_mut().zip(timeline.stage_ms()?) {
            stage.push(ms);
        }
        engine.fill(&flush, repeat as u8)?;
        clock.start(engine)?;
        launch(repeat + 1, None)?;
        clock.stop(engine)?;
        whole.push(clock.ms()?);
    }

    let mut events = vec![0u8; shape.tokens() * value_heads];
    engine.download(&results.events, 0, &mut events)?;
    let opened = events.iter().filter(|&&event| event != EXTEND).count();
    let floors = Floors::of(&plan, &shape, dtype, recipe, ceilings);
    let row = |stage: &str, ms: f64, floor_ms: f64| Row {
        size: size.to_owned(),
        recurrence: name(&args.recurrence),
        capacity: options.capacity,
        boundary_rate: opened as f64 / events.len().max(1) as f64,
        merge: name(&args.merge),
        read: name(&args.read),
        pass: "forward",
        stage: stage.to_owned(),
        ms,
        floor_ms,
        peak_mb: floors.peak_mb,
    };
    let mut rows = Vec::new();
    for ((stage, times), floor_ms) in Stage::ALL.iter().zip(stages).zip(floors.stages_ms) {
        if *stage != Stage::Route || options.read == Read::Routed {
            rows.push(row(stage.name(), median(times), floor_ms));
        }
    }
    rows.push(row("all", median(whole), floors.all_ms));
    if args.pass == Pass::Forward {
        return Ok(rows);
    }

    // The final cache has no gradient; the initial one, there is none.
    let plan = engine.plan_backward(&Call { final_cache: false, ..call })?;
    let backward_workspace = engine.allocate(plan.workspace_bytes())?;
    let d_o = upload(engine, shape.tokens(), value_heads * dv, dtype, &|token, out| {
        let mut rng = StdRng::seed_from_u64(args.seed ^ (9 << 48) ^ token as u64);
        out.iter_mut().for_each(|x| *x = rng.sample(StandardNormal));
    })?;
    let gradients = GradientArrays::new(engine, &shape, dtype, recipe)?;
    let forward = RawForward {
        events: results.outputs.events,
        drift: results.outputs.drift,
        lambda: results.outputs.lambda,
    };
    let upstream = RawUpstream { o: d_o.address(), cache: None };
    let backward = |set: usize| {
        let inputs = &sets[set % SETS].inputs;
        let workspace = (backward_workspace.address(), backward_workspace.bytes());
        // SAFETY: as `launch`; the forward before it was of the same inputs.
        unsafe { engine.launch_backward(&plan, inputs, &forward, &upstream, &gradients.gradients, workspace) }
    };
    let (mut alone, mut both) = (Vec::new(), Vec::new());
    for repeat in 0..=usize::from(args.repeats) {
        launch(repeat, None)?;
        engine.fill(&flush, repeat as u8)?;
        clock.start(engine)?;
        backward(repeat)?;
        clock.stop(engine)?;
        let ms = clock.ms()?;
        engine.fill(&flush, repeat as u8)?;
        clock.start(engine)?;
        launch(repeat + 1, None)?;
        backward(repeat + 1)?;
        clock.stop(engine)?;
        // The first call is not counted.
        if repeat > 0 {
            alone.push(ms);
            both.push(clock.ms()?);
        }
    }
    let peak_mb = workspace.bytes().max(backward_workspace.bytes()) as f64 * 1e-6;
    let both_row =
        |stage: &str, ms, floor_ms| Row { pass: "forward_backward", peak_mb, ..row(stage, ms, floor_ms) };
    rows.push(both_row("backward", median(alone), floors.backward_ms));
    rows.push(both_row("all", median(both), floors.all_ms + floors.backward_ms));
    // Kernel by kernel, once.
    launch(0, None)?;
    let workspace = (backward_workspace.address(), backward_workspace.bytes());
    let inputs = &sets[0].inputs;
    // SAFETY: as `backward`.
    let kernels =
        unsafe { engine.time_backward(&plan, inputs, &forward, &upstream, &gradients.gradients, workspace) }?;
    for (name, launches, ms) in kernels {
        rows.push(Row { pass: "backward_kernels", ..row(&format!("{name} x {launches}"), ms, 0.0) });
    }
    Ok(rows)
}

/// Gradients of a call's arguments on the GPU.
struct GradientArrays {
    /// Held for its memory.
    _arrays: Vec<Memory>,
    gradients: RawGradients,
}

impl GradientArrays {
    fn new(engine: &Engine, shape: &Shape, dtype: Dtype, recipe: &Recipe) -> anyhow::Result<Self> {
        let per_token = shape.tokens() * shape.value_heads;
        let keys = shape.tokens() * shape.heads * shape.dk * dtype.bytes();
        let mut arrays = Vec::new();
        let mut room = |wanted: bool, bytes: usize| {
            if !wanted {
                return anyhow::Ok(0);
            }
            let memory = engine.allocate(bytes)?;
            let address = memory.address();
            arrays.push(memory);
            anyhow::Ok(address)
        };
        let routed = recipe.options.read == Read::Routed;
        let gradients = RawGradients {
            q: room(true, keys)?,
            k: room(true, keys)?,
            v: room(true, per_token * shape.dv * dtype.bytes())?,
            g: room(true, 4 * per_token)?,
            beta: room(recipe.options.recurrence == Recurrence::GatedDelta, 4 * per_token)?,
            lambda: room(!routed, 4 * per_token * shape.capacity)?,
            slope: room(routed, 4 * shape.value_heads)?,
            bias: room(routed, 4 * shape.value_heads)?,
            ..RawGradients::default()
        };
        Ok(GradientArrays { _arrays: arrays, gradients })
    }
}

/// Read and written GB/s of a copy on the GPU.
pub fn copy_gb_s(engine: &Engine) -> anyhow::Result<f64> {
    let (from, to) = (engine.allocate(COPY_BYTES)?, engine.allocate(COPY_BYTES)?);
    engine.fill(&from, 1)?;
    let clock = engine.clock()?;
    let mut times = Vec::new();
    for repeat in 0..12 {
        clock.start(engine)?;
        engine.copy(&from, &to)?;
        clock.stop(engine)?;
        let ms = clock.ms()?;
        // The first two are not counted.
        if repeat >= 2 {
            times.push(ms);
        }
    }
    Ok(2.0 * COPY_BYTES as f64 / median(times) * 1e-6)
}

/// The least times that the ceilings allow.
struct Floors {
    stages_ms: [f64; 4],
    all_ms: f64,
    /// Of the backward: every product of the forward has two adjoints.
    backward_ms: f64,
    peak_mb: f64,
}

impl Floors {
    /// Dense slots: every token reads M of them. Bytes are those of arguments and results, each once; what a stage
    /// hands to the next is not counted, nor what the delta rule multiplies beyond the gated recurrence.
    fn of(plan: &Plan, shape: &Shape, dtype: Dtype, recipe: &Recipe, ceilings: Ceilings) -> Self {
        let Shape { heads, value_heads, dk, dv, capacity, .. } = *shape;
        let tokens = shape.tokens() as f64;
        let (dk, dv, m, chunk) = (dk as f64, dv as f64, capacity as f64, 64.0);
        let rows = tokens * value_heads as f64;
        let element = dtype.bytes() as f64;
        let (q, v) = (tokens * heads as f64 * dk * element, rows * dv * element);
        let per_token = 4.0 * rows;
        let lambda = 4.0 * rows * m;
        let beta = if recipe.options.recurrence == Recurrence::GatedDelta { per_token } else { 0.0 };
        let ms = |flop: f64, bytes: f64| {
            (flop / ceilings.matmul_tflop_s * 1e-9).max(bytes / ceilings.copy_gb_s * 1e-6)
        };
        let route_bytes = if recipe.options.read == Read::Routed { 2.0 * q + rows + lambda } else { 0.0 };
        let read = 2.0 * m * dk * dv;
        let (intra, write) = (2.0 * chunk * (dk + dv), 2.0 * dk * dv);
        Floors {
            stages_ms: [
                ms(rows * (chunk * (dk + dv) + 4.0 * dk * dv), q + v + 2.0 * per_token + rows),
                ms(rows * chunk * dk, 2.0 * q + per_token + beta),
                ms(rows * 2.0 * dk * (m + chunk), route_bytes),
                ms(rows * (read + chunk * dv * 2.0 + write), q + 2.0 * v + per_token + lambda + rows),
            ],
            all_ms: ms(
                rows * (read + intra + write),
                2.0 * q + 2.0 * v + 2.0 * per_token + beta + lambda + rows,
            ),
            backward_ms: ms(
                2.0 * rows * (read + intra + write),
                4.0 * q + 3.0 * v + 2.0 * (per_token + beta + lambda) + rows,
            ),
            peak_mb: plan.workspace_bytes() as f64 * 1e-6,
        }
    }
}

/// Arguments of a call on the GPU.
pub struct InputSet {
    /// Held for its memory.
    _arrays: Vec<Memory>,
    pub inputs: RawInputs,
}

impl InputSet {
    /// Draws as [`Recipe::draw`] does, in parallel and straight to the GPU: not the same numbers.
    pub fn draw(engine: &Engine, recipe: &Recipe, tau: f32, seed: u64) -> anyhow::Result<Self> {
        let Recipe { batch, time, heads, value_heads, dk, dv, dtype, boundary_rate, ref options, .. } =
            *recipe;
        let tokens = batch * time;
        // The last token up to here that brought something new.
        let mut rng = StdRng::seed_from_u64(seed);
        let mut newest = 0;
        let content: Vec<u64> = (0..tokens as u64)
            .map(|token| {
                if rng.random_bool(boundary_rate) {
                    newest = token;
                }
                newest
            })
            .collect();
        let noise = if boundary_rate < 1.0 { 0.1 } else { 0.0 };
        let mut arrays = Vec::new();
        let mut put = |width: usize, dtype: Dtype, fill: &(dyn Fn(usize, &mut [f32]) + Sync)| {
            let memory = upload(engine, tokens, width, dtype, fill)?;
            let address = memory.address();
            arrays.push(memory);
            anyhow::Ok(address)
        };
        let normals = |stream: u64, token: u64, out: &mut [f32], factor: f32| {
            let mut rng =
                StdRng::seed_from_u64(seed ^ (stream << 48) ^ token.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            out.iter_mut().for_each(|x| *x += factor * rng.sample::<f32, _>(StandardNormal));
        };
        let q = put(heads * dk, dtype, &|token, out| normals(1, token as u64, out, 1.0))?;
        let drawn = |stream: u64, token: usize, out: &mut [f32]| {
            normals(stream, content[token], out, 1.0);
            if noise > 0.0 {
                normals(stream + 8, token as u64, out, noise);
            }
        };
        let k = put(heads * dk, dtype, &|token, out| {
            drawn(2, token, out);
            for row in out.chunks_exact_mut(dk) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
                row.iter_mut().for_each(|x| *x /= norm);
            }
        })?;
        let v = put(value_heads * dv, dtype, &|token, out| drawn(3, token, out))?;
        let uniform = |stream: u64, low: f32, high: f32| {
            move |token: usize, out: &mut [f32]| {
                let mut rng = StdRng::seed_from_u64(seed ^ (stream << 48) ^ token as u64);
                out.iter_mut().for_each(|x| *x = rng.random_range(low..high));
            }
        };
        let f32s = Dtype::F32;
        let g = put(value_heads, f32s, &uniform(4, -0.1, 0.0))?;
        let delta = options.recurrence == Recurrence::GatedDelta;
        let beta = if delta { put(value_heads, f32s, &uniform(5, 0.0, 1.0))? } else { 0 };
        let routed = options.read == Read::Routed;
        let lambda =
            if routed { 0 } else { put(value_heads * options.capacity, f32s, &uniform(6, 0.05, 1.5))? };
        let mut constant = |x: f32| {
            let memory = engine.allocate(4 * value_heads)?;
            engine.upload(&memory, 0, bytemuck::cast_slice(&vec![x; value_heads]))?;
            let address = memory.address();
            arrays.push(memory);
            anyhow::Ok(address)
        };
        let inputs = RawInputs {
            q,
            k,
            v,
            g,
            beta,
            lambda,
            lambda_columns: options.capacity,
            slope: if routed { constant(8.0)? } else { 0 },
            bias: if routed { constant(0.0)? } else { 0 },
            logits: 0,
            logit_columns: options.capacity,
            tau: constant(tau)?,
            events: 0,
            cu_seqlens: 0,
            cache: None,
        };
        Ok(InputSet { _arrays: arrays, inputs })
    }
}

/// An array `[tokens, width]`, filled token by token from zeros.
fn upload(
    engine: &Engine,
    tokens: usize,
    width: usize,
    dtype: Dtype,
    fill: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> anyhow::Result<Memory> {
    let memory = engine.allocate(tokens * width * dtype.bytes())?;
    let piece = (PIECE_BYTES / (4 * width)).max(1);
    let mut from = 0;
    while from < tokens {
        let count = piece.min(tokens - from);
        let mut x = vec![0f32; count * width];
        x.par_chunks_exact_mut(width).enumerate().for_each(|(i, out)| fill(from + i, out));
        let at = from * width * dtype.bytes();
        match Buffer::from_f32(dtype, &x) {
            Buffer::F32(x) => engine.upload(&memory, at, bytemuck::cast_slice(&x))?,
            Buffer::Bf16(x) => engine.upload(&memory, at, bytemuck::cast_slice::<bf16, u8>(&x))?,
            Buffer::F16(x) => engine.upload(&memory, at, bytemuck::cast_slice::<f16, u8>(&x))?,
        }
        from += count;
    }
    Ok(memory)
}

/// Results of a call on the GPU.
struct Results {
    /// Held for its memory.
    _arrays: Vec<Memory>,
    events: Memory,
    outputs: RawOutputs,
}

impl Results {
    fn new(
        engine: &Engine,
        shape: &Shape,
        dtype: Dtype,
        read: Read,
        final_cache: bool,
    ) -> anyhow::Result<Self> {
        let dims = shape.cache_dims();
        let (rows, per_token) = (dims.rows(), shape.tokens() * shape.value_heads);
        let mut arrays = Vec::new();
        let mut room = |bytes: usize| {
            let memory = engine.allocate(bytes)?;
            let address = memory.address();
            arrays.push(memory);
            anyhow::Ok(address)
        };
        let routed = read == Read::Routed;
        let events = engine.allocate(per_token)?;
        let outputs = RawOutputs {
            o: room(per_token * shape.dv * dtype.bytes())?,
            drift: room(4 * per_token)?,
            events: events.address(),
            lambda: if routed { room(4 * per_token * shape.capacity)? } else { 0 },
            cache: if final_cache {
                Some(RawCache {
                    states: room(4 * rows * dims.bank())?,
                    len: room(4 * rows)?,
                    tokens: room(4 * rows * dims.capacity)?,
                    drift: room(4 * rows * dims.capacity)?,
                    open: room(4 * rows * dims.state())?,
                    keys: if routed { room(4 * rows * dims.key_bank())? } else { 0 },
                })
            } else {
                None
            },
        };
        Ok(Results { _arrays: arrays, events, outputs })
    }
}

/// The report for people.
fn text(report: &Report) -> String {
    let mut text = String::new();
    let FirstCall { driver_ms, context_ms, kernels_ms, launch_ms } = report.first_call;
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "{}, driver of CUDA {}, {}: copies {:.0} GB/s; floors at {:.0} TFLOP/s (given)",
        report.card, report.driver, report.dtype, report.ceilings.copy_gb_s, report.ceilings.matmul_tflop_s
    );
    let _ = writeln!(
        text,
        "first call: driver {driver_ms:.1} ms, context {context_ms:.1} ms, kernels {kernels_ms:.1} ms, launch {launch_ms:.1} ms"
    );
    let _ = writeln!(
        text,
        "{:<22} {:<6} {:>3} {:>5} {:<8} {:<7} {:<16} {:<8} {:>9} {:>9} {:>6} {:>8}",
        "size", "rec.", "M", "rate", "merge", "read", "pass", "stage", "ms", "floor ms", "share", "peak MB"
    );
    for row in &report.bench {
        let _ = writeln!(
            text,
            "{:<22} {:<6} {:>3} {:>5.2} {:<8} {:<7} {:<16} {:<8} {:>9.4} {:>9.4} {:>5.0}% {:>8.0}",
            row.size,
            row.recurrence,
            row.capacity,
            row.boundary_rate,
            row.merge,
            row.read,
            row.pass,
            row.stage,
            row.ms,
            row.floor_ms,
            if row.ms > 0.0 { 100.0 * row.floor_ms / row.ms } else { 0.0 },
            row.peak_mb
        );
    }
    text
}
