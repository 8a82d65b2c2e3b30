//! `dla bench decode`: steps on a server's cache, many sequences at once.

use std::fmt::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use dla::check::Recipe;
use dla::cuda::{self, Engine, Graph, Memory, RawOutputs};
use dla::events::{EXTEND, MERGE};
use dla::{Dtype, Entries, EntrySpec, MOST_STEP_TOKENS, Options, Shape, Tau};
use serde::Serialize;

use super::{DtypeArg, cuda as gpu, name};
use crate::common::Common;
use crate::device::Device;
use crate::options::{Merge, Read, Recurrence, check_capacity, check_size};
use crate::output::Output;

/// Time steps of decoding
///
/// Sequences with all their slots held take tokens, every row one or a few at once, each row in its own entry of a
/// cache. On a GPU a graph is replayed that holds a step of each of several sets of entries, as of a model's layers, so many
/// that none is found in L2; a step's time is its share of the replay, by the GPU's own clock. Bytes are those of the states read and written, and a token's
/// own, each once.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What computes
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Sequences stepped at once, commas between
    #[arg(long, value_name = "B[,B...]", value_delimiter = ',', default_values_t = [1, 32, 256])]
    batch: Vec<usize>,
    /// Extents: q/k heads, value heads, key dimension, value dimension
    #[arg(long, value_name = "H,HV,dk,dv", default_value = "32,32,128,128")]
    shape: Extents,
    /// Tokens of every row in a step, 1 to 8
    #[arg(long, value_name = "T", default_value_t = 1)]
    tokens: usize,
    /// How a slot's state evolves
    #[arg(long, value_enum, default_value_t)]
    recurrence: Recurrence,
    /// Most slots held at once, 1 to 64
    #[arg(long, value_name = "M", default_value_t = 30)]
    capacity: usize,
    /// Which neighbours merge when all slots are held
    #[arg(long, value_enum, default_value_t)]
    merge: Merge,
    /// Where read weights come from
    #[arg(long, value_enum, default_value_t)]
    read: Read,
    /// How states are kept [default: bf16, on the CPU f32]
    #[arg(long, value_enum)]
    states: Option<StatesArg>,
    /// Dtype of q, k, v and o [default: bf16, on the CPU f32]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Drift from which a token opens a slot; 0: every token does
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    tau: f32,
    /// Timed steps; the median is reported
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeats: u16,
    /// Seed of the input
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Write the figures here too
    #[arg(long, value_name = "F.json")]
    json: Option<PathBuf>,
}

/// `--states`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StatesArg {
    /// Single precision
    F32,
    /// bfloat16 to read, 8 more bits where a state is written; on a GPU
    Bf16,
}

impl From<StatesArg> for dla::StateDtype {
    fn from(states: StatesArg) -> Self {
        match states {
            StatesArg::F32 => dla::StateDtype::F32,
            StatesArg::Bf16 => dla::StateDtype::Bf16,
        }
    }
}

/// `--shape`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Extents {
    heads: usize,
    value_heads: usize,
    dk: usize,
    dv: usize,
}

impl FromStr for Extents {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
        match numbers.as_deref() {
            Ok(&[heads, value_heads, dk, dv])
                if [heads, value_heads, dk, dv].iter().all(|&extent| extent > 0)
                    && value_heads % heads == 0 =>
            {
                Ok(Extents { heads, value_heads, dk, dv })
            }
            _ => {
                Err("expected four whole numbers above 0 with commas, HV a multiple of H: H,HV,dk,dv"
                    .to_owned())
            }
        }
    }
}

/// What the run came to; on a GPU a part of the evidence.
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
    /// None on the CPU.
    ceilings: Option<gpu::Ceilings>,
    memory: PerSequence,
    bench: Vec<Row>,
}

/// Bytes of one sequence.
#[derive(Debug, Clone, Copy, Serialize)]
struct PerSequence {
    /// An entry of the cache.
    entry: usize,
    /// Keys and values of softmax attention with as many value heads, bf16, of 8,192 and 131,072 tokens.
    softmax_8k: usize,
    softmax_128k: usize,
}

/// One batch size.
#[derive(Debug, Clone, Serialize)]
struct Row {
    size: String,
    recurrence: String,
    capacity: usize,
    boundary_rate: f64,
    merge: String,
    read: String,
    pass: &'static str,
    stage: &'static str,
    states: String,
    tokens: usize,
    /// Median of a step.
    ms: f64,
    /// What the bytes take at the card's copy rate; 0 on the CPU.
    floor_ms: f64,
    /// Bytes that a step moves.
    mb: f64,
    gb_s: f64,
    /// Memory beside inputs and outputs.
    peak_mb: f64,
}

impl Args {
    fn options(&self) -> Options {
        Options {
            recurrence: self.recurrence.into(),
            capacity: self.capacity,
            merge: self.merge.into(),
            read: self.read.into(),
            tau: Tau::PerCall(self.tau),
            ..Options::default()
        }
    }

    fn recipe(&self, batch: usize, dtype: DtypeArg) -> Recipe {
        let Extents { heads, value_heads, dk, dv } = self.shape;
        Recipe {
            options: self.options(),
            batch,
            time: self.tokens,
            heads,
            value_heads,
            dk,
            dv,
            dtype: self.dtype.unwrap_or(dtype).into(),
            ..Recipe::default()
        }
    }

    fn row(&self, batch: usize, ms: f64, events: &[u8], bytes: f64, peak_mb: f64, states: StatesArg) -> Row {
        let opened = events.iter().filter(|&&event| event != EXTEND).count();
        Row {
            size: format!("B={batch}"),
            recurrence: name(&self.recurrence),
            capacity: self.capacity,
            boundary_rate: opened as f64 / events.len().max(1) as f64,
            merge: name(&self.merge),
            read: name(&self.read),
            pass: "step",
            stage: "all",
            states: name(&states),
            tokens: self.tokens,
            ms,
            floor_ms: 0.0,
            mb: bytes * 1e-6,
            gb_s: if ms > 0.0 { bytes / ms * 1e-6 } else { 0.0 },
            peak_mb,
        }
    }
}

/// Bytes that one step moves, all slots held before and after it.
///
/// Every slot is read once, its first plane. A slot that is written is read with its second plane too, and both are
/// written: the open one that is extended; the two that merge, to one; one that opens, which nothing is read for. Under
/// the delta rule R is read and written, and of the other slots one in seven has its turn a token.
fn bytes_moved(recipe: &Recipe, states: StatesArg, events: &[u8], on_gpu: bool) -> f64 {
    let Recipe { batch, time, heads, value_heads, dk, dv, dtype, ref options, .. } = *recipe;
    let (first, rest) = match states {
        StatesArg::F32 => (4.0, 0.0),
        StatesArg::Bf16 => (2.0, 1.0),
    };
    let state = (dk * dv) as f64;
    let delta = options.recurrence == dla::Recurrence::GatedDelta;
    let slots = options.capacity as f64;
    let rows = (batch * value_heads) as f64;
    let mut bytes = rows * slots * state * first;
    for row in 0..batch * value_heads {
        let (b, head) = (row / value_heads, row % value_heads);
        let log = (0..time).map(|t| events[(b * time + t) * value_heads + head]);
        let (merges, opens) = log.fold((0.0, 0.0), |(merges, opens), event| {
            (merges + f64::from(u8::from(event >= MERGE)), opens + f64::from(u8::from(event != EXTEND)))
        });
        // Merges may meet in one slot, and what opens may merge: at most this.
        let extended = if opens < time as f64 { 1.0 } else { 0.0 };
        let (read_again, written) = (2.0 * merges + extended, merges + opens + extended);
        bytes += state * (rest * read_again + (first + rest) * written);
        if delta {
            let turns = (slots - written).max(0.0) * (time as f64 / 7.0).min(1.0);
            let r = first + (first + rest) + rest * extended;
            bytes += if on_gpu { state * (turns * (first + 2.0 * rest) + r) } else { state * 4.0 * slots };
        }
    }
    let tokens = (batch * time) as f64;
    let element = dtype.bytes() as f64;
    bytes
        + tokens * element * (2 * heads * dk + 2 * value_heads * dv) as f64
        + tokens * value_heads as f64 * (4.0 * slots + 13.0)
}

fn per_sequence(args: &Args, entry: usize) -> PerSequence {
    let Extents { value_heads, dk, dv, .. } = args.shape;
    let softmax = |tokens: usize| tokens * value_heads * (dk + dv) * 2;
    PerSequence { entry, softmax_8k: softmax(8192), softmax_128k: softmax(131_072) }
}

/// Runs the subcommand.
pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    check_capacity(args.capacity)?;
    ensure!(
        (1..=MOST_STEP_TOKENS).contains(&args.tokens),
        "--tokens: expected 1 to {MOST_STEP_TOKENS}, got {}",
        args.tokens
    );
    ensure!(args.batch.iter().all(|&batch| batch > 0), "--batch: expected at least 1, got 0");
    for &batch in &args.batch {
        let Extents { value_heads, dk, dv, .. } = args.shape;
        check_size("--shape", "states [B,HV,M,dk,dv]", &[batch, value_heads, args.capacity, dk, dv])?;
    }
    let json = args.json.as_deref().map(Output::at).transpose()?;
    let on_gpu = match args.device {
        Device::Auto => cuda::available().is_ok(),
        device => device == Device::Cuda,
    };
    ensure!(args.device != Device::Reference, "--device: expected cpu, cuda or auto, got reference");
    let report = if on_gpu { on_a_gpu(args, common)? } else { on_the_cpu(args, common)? };
    common.print(&text(args, &report))?;
    let mut text = serde_json::to_string_pretty(&report)?;
    text.push('\n');
    if let Some(json) = json {
        json.write(text.as_bytes())?;
    }
    if let Some(folder) = std::env::var_os("DLA_EVIDENCE").filter(|_| on_gpu) {
        let path = PathBuf::from(folder).join(format!("bench-{}.json", std::process::id()));
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Steps before those that are timed: all slots are then held, and merge as they do later.
fn warm_up(args: &Args) -> usize {
    (2 * args.capacity).div_ceil(args.tokens)
}

fn on_the_cpu(args: &Args, common: &Common) -> anyhow::Result<Report> {
    let states = args.states.unwrap_or(StatesArg::F32);
    let bar = common.progress(args.batch.len() as u64, "bench");
    let mut rows = Vec::new();
    let mut entry_bytes = 0;
    let mut dtype = String::new();
    for &batch in &args.batch {
        bar.set_message(format!("B = {batch}"));
        let recipe = args.recipe(batch, DtypeArg::F32);
        dtype = recipe.dtype.to_string();
        let cases: Vec<_> = (0..4).map(|set| recipe.draw(args.seed.wrapping_add(set))).collect();
        let problems = cases.iter().map(|case| case.problem()).collect::<dla::Result<Vec<_>>>()?;
        let spec = EntrySpec::of(problems[0].options(), problems[0].shape(), batch, states.into());
        let mut cache = dla::cpu::Entries::new(spec)?;
        let entries = (0..batch).map(|_| cache.take()).collect::<dla::Result<Vec<_>>>()?;
        for step in 0..warm_up(args) {
            cache.step(&problems[step % problems.len()], &entries)?;
        }
        let mut times = Vec::new();
        let mut events = Vec::new();
        for step in 0..usize::from(args.repeats) {
            let start = Instant::now();
            events = cache.step(&problems[step % problems.len()], &entries)?.events;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        entry_bytes = spec.value_heads * (spec.capacity + 1) * spec.dk * spec.dv * 4;
        let bytes = bytes_moved(&recipe, states, &events, false);
        rows.push(args.row(batch, gpu::median(times), &events, bytes, 0.0, states));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        device: "cpu",
        card: super::processor().unwrap_or_default(),
        driver: String::new(),
        source_hash: cuda::SOURCE_HASH,
        dtype,
        repeats: args.repeats,
        seed: args.seed,
        ceilings: None,
        memory: per_sequence(args, entry_bytes),
        bench: rows,
    })
}

/// Bytes of states that sets of entries have together: several times what L2 holds.
const STATES_BYTES: usize = 400 << 20;

/// Sets of inputs.
const INPUT_SETS: usize = 8;

/// Replays of a timing.
const REPLAYS: usize = 4;

fn on_a_gpu(args: &Args, common: &Common) -> anyhow::Result<Report> {
    let states = args.states.unwrap_or(StatesArg::Bf16);
    let engine = Arc::new(Engine::new(0)?);
    let ceilings = gpu::Ceilings { copy_gb_s: gpu::copy_gb_s(&engine)?, matmul_tflop_s: 790.0 };
    let bar = common.progress(args.batch.len() as u64, "bench");
    let mut rows = Vec::new();
    let mut entry_bytes = 0;
    let mut dtype = String::new();
    for &batch in &args.batch {
        bar.set_message(format!("B = {batch}"));
        let recipe = args.recipe(batch, DtypeArg::Bf16);
        dtype = recipe.dtype.to_string();
        let (row, entry) = measure(args, &engine, &recipe, states)?;
        entry_bytes = entry;
        rows.push(Row { floor_ms: row.mb / ceilings.copy_gb_s, ..row });
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        device: "cuda",
        card: engine.card()?,
        driver: engine.driver_version()?,
        source_hash: cuda::SOURCE_HASH,
        dtype,
        repeats: args.repeats,
        seed: args.seed,
        ceilings: Some(ceilings),
        memory: per_sequence(args, entry_bytes),
        bench: rows,
    })
}

/// One batch size: its row and the bytes of an entry.
fn measure(
    args: &Args,
    engine: &Arc<Engine>,
    recipe: &Recipe,
    states: StatesArg,
) -> anyhow::Result<(Row, usize)> {
    let Recipe { batch, time, heads, value_heads, dk, dv, dtype, ref options, .. } = *recipe;
    let shape =
        Shape { batch, time, heads, value_heads, dk, dv, capacity: options.capacity, sequences: batch };
    let set_bytes = batch * value_heads * options.capacity * dk * dv * 2;
    let sets = STATES_BYTES.div_ceil(set_bytes).max(1);
    let spec = EntrySpec::of(options, &shape, batch * sets, states.into());
    let mut cache = cuda::Entries::new(engine.clone(), spec)?;
    let plan = cache.plan(options, &shape, dtype)?;
    let rows = (0..sets)
        .map(|_| {
            let entries = (0..batch).map(|_| cache.take()).collect::<dla::Result<Vec<_>>>()?;
            let rows = cache.rows(batch)?;
            cache.set_rows(&rows, &entries)?;
            Ok(rows)
        })
        .collect::<dla::Result<Vec<_>>>()?;
    let inputs = (0..INPUT_SETS as u64)
        .map(|set| gpu::InputSet::draw(engine, recipe, args.tau, args.seed.wrapping_add(set)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let results = StepResults::new(engine, &shape, dtype, options.read == dla::Read::Routed)?;
    // A graph has a step of every set of entries, as of a model's layers; another graph, other inputs.
    let mut graphs = inputs
        .iter()
        .map(|set| {
            Graph::capture(engine, || {
                rows.iter().try_for_each(|rows| {
                    // SAFETY: every array is of the extents of `shape`, of this engine's GPU, and lives to the end.
                    unsafe { cache.launch(&plan, rows.address(), &set.inputs, &results.outputs) }
                })
            })
        })
        .collect::<dla::Result<Vec<_>>>()?;
    let mut replay = |at: usize| {
        // SAFETY: as captured; no entry is in two sets or twice in one.
        unsafe { graphs[at % INPUT_SETS].replay(engine) }
    };
    for at in 0..warm_up(args) {
        replay(at)?;
    }
    let clock = engine.clock()?;
    let mut times = Vec::new();
    for repeat in 0..usize::from(args.repeats) {
        clock.start(engine)?;
        for at in 0..REPLAYS {
            replay(repeat * REPLAYS + at)?;
        }
        clock.stop(engine)?;
        times.push(clock.ms()? / (REPLAYS * sets) as f64);
    }
    let mut events = vec![0u8; batch * time * value_heads];
    engine.download(&results.events, 0, &mut events)?;
    let bytes = bytes_moved(recipe, states, &events, true);
    let peak_mb = (cache.entry_bytes() * batch) as f64 * 1e-6;
    Ok((args.row(batch, gpu::median(times), &events, bytes, peak_mb, states), cache.entry_bytes()))
}

/// Results of a step on the GPU.
struct StepResults {
    /// Held for its memory.
    _arrays: Vec<Memory>,
    events: Memory,
    outputs: RawOutputs,
}

impl StepResults {
    fn new(engine: &Engine, shape: &Shape, dtype: Dtype, routed: bool) -> anyhow::Result<Self> {
        let per_token = shape.tokens() * shape.value_heads;
        let mut arrays = Vec::new();
        let mut room = |bytes: usize| {
            let memory = engine.allocate(bytes)?;
            let address = memory.address();
            arrays.push(memory);
            anyhow::Ok(address)
        };
        let events = engine.allocate(per_token)?;
        let outputs = RawOutputs {
            o: room(per_token * shape.dv * dtype.bytes())?,
            drift: room(4 * per_token)?,
            events: events.address(),
            lambda: if routed { room(4 * per_token * shape.capacity)? } else { 0 },
            cache: None,
        };
        Ok(StepResults { _arrays: arrays, events, outputs })
    }
}

/// The report for people.
fn text(args: &Args, report: &Report) -> String {
    let mut text = String::new();
    let Extents { heads, value_heads, dk, dv } = args.shape;
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{} on {}", report.device, report.card);
    let _ = writeln!(
        text,
        "H,HV,dk,dv = {heads},{value_heads},{dk},{dv} {}, {}, M = {}, {}, {} reads, {} tokens a row",
        report.dtype,
        name(&args.recurrence),
        args.capacity,
        name(&args.merge),
        name(&args.read),
        args.tokens
    );
    let PerSequence { entry, softmax_8k, softmax_128k } = report.memory;
    let mb = |bytes: usize| bytes as f64 * 1e-6;
    let _ = writeln!(
        text,
        "a sequence holds {:.1} MB whatever its length; softmax attention's keys and values in bf16 {:.1} MB at 8,192 tokens, {:.1} MB at 131,072",
        mb(entry),
        mb(softmax_8k),
        mb(softmax_128k)
    );
    if let Some(ceilings) = report.ceilings {
        let _ = writeln!(text, "copies {:.0} GB/s", ceilings.copy_gb_s);
    }
    let _ = writeln!(
        text,
        "{:<8} {:<7} {:>5} {:>11} {:>9} {:>9} {:>9} {:>6}",
        "size", "states", "rate", "us", "us/seq.", "MB", "GB/s", "share"
    );
    for row in &report.bench {
        let batch: f64 = row.size.trim_start_matches("B=").parse().unwrap_or(1.0);
        let _ = writeln!(
            text,
            "{:<8} {:<7} {:>5.2} {:>11.2} {:>9.2} {:>9.1} {:>9.1} {:>5.0}%",
            row.size,
            row.states,
            row.boundary_rate,
            1e3 * row.ms,
            1e3 * row.ms / batch,
            row.mb,
            row.gb_s,
            if row.ms > 0.0 { 100.0 * row.floor_ms / row.ms } else { 0.0 }
        );
    }
    text
}
