//! `dla bench`: how long every stage takes, and what that is in FLOP and bytes a second.

mod ceiling;
mod cuda;
mod decode;
mod picture;
mod plot;
mod sweep;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{bail, ensure};
use dla::check::{Case, Recipe};
use dla::{
    Data, Dtype, Engine, Forward, Gradients, Inputs, Options, Problem, Route, Shape, Stage, StageTimes, Tau,
    Tensor,
};
use serde::Serialize;

use crate::common::Common;
use crate::cost::{self, Cost, PassCost, Work};
use crate::device::Device;
use crate::options::{Merge, Read, Recurrence, check_capacity, check_size};
use crate::output::Output;

/// Time every stage, forward and backward
///
/// Prints milliseconds, GFLOP/s and GB/s of useful work (cost.rs says what counts) beside the
/// matrix-product rate of the same machine in the same run. A stage's milliseconds are its share of the
/// threads' time, of the median call's wall time: the stages add up to the call.
///
/// On a GPU by the GPU's own clock: medians of calls whose inputs alternate between two sets, L2 flushed before each;
/// every stage of the forward by itself, and the call as it is made, stages side by side; with `--pass
/// forward_backward` also the backward, and the two one after the other.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// What computes
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Extents: batch, tokens, q/k heads, value heads, key dimension, value dimension
    #[arg(long, value_name = "B,T,H,HV,dk,dv", default_value = "1,4096,16,16,128,128")]
    shape: Extents,
    /// Extents by name, commas between: 16 heads of 128 (S4 8, S5 32 of 64), T 4096, 8192, 32768, 131072, 2048, 1024
    #[arg(long, value_name = "S1[,S2...]", value_enum, value_delimiter = ',', conflicts_with = "shape")]
    size: Vec<Size>,
    /// Time over several values of one extent, beside the floor: tokens, slots, boundary rate, or head size dk = dv
    #[arg(long, value_enum, conflicts_with = "size")]
    sweep: Option<sweep::Sweep>,
    /// The values of --sweep, commas between, in place of its own
    #[arg(
        long,
        value_name = "X,...",
        value_delimiter = ',',
        requires = "sweep",
        allow_negative_numbers = true
    )]
    values: Vec<f64>,
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
    /// Dtype of q, k, v and o [default: f32, on a GPU bf16]
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Drift from which a token opens a slot; 0: every token does
    #[arg(long, value_name = "X", default_value_t = 0.6, allow_negative_numbers = true)]
    tau: f32,
    /// On a GPU: write the final cache too, as a prefill does and training does not
    #[arg(long)]
    final_cache: bool,
    /// On a GPU: dense bf16 matrix product that floors are taken from, in TFLOP/s; it is not measured here
    #[arg(long, value_name = "X", default_value_t = 790.0)]
    matmul_tflop_s: f64,
    /// On a GPU: what is timed
    #[arg(long, value_enum, default_value_t)]
    pass: Pass,
    /// Share of tokens that open a slot: 1 draws every token by itself, less repeats tokens with noise
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    boundary_rate: f64,
    /// Timed calls of each pass, after one that is not; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeats: u16,
    /// Seed of the input
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Write the figures here too
    #[arg(long, value_name = "F.json")]
    json: Option<PathBuf>,
    /// Draw the milliseconds of every stage here; of a sweep, time and throughput
    #[arg(long, value_name = "F.svg|F.png")]
    plot: Option<PathBuf>,
}

/// What else there is to time.
#[derive(Debug, clap::Subcommand)]
enum Other {
    Decode(decode::Args),
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum DtypeArg {
    #[default]
    F32,
    Bf16,
    F16,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::Bf16 => Dtype::Bf16,
            DtypeArg::F16 => Dtype::F16,
        }
    }
}

/// `--pass`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Pass {
    #[default]
    Forward,
    ForwardBackward,
}

/// `--size`: the sizes at which kernels are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "verbatim")]
enum Size {
    S1,
    S2,
    S3,
    S4,
    S5,
    S6,
}

impl Size {
    fn extents(self) -> Extents {
        let [batch, time, heads, d] = match self {
            Size::S1 => [4, 4096, 16, 128],
            Size::S2 => [2, 8192, 16, 128],
            Size::S3 => [1, 32_768, 16, 128],
            Size::S4 => [1, 131_072, 8, 128],
            Size::S5 => [8, 2048, 32, 64],
            Size::S6 => [32, 1024, 16, 128],
        };
        Extents { batch, time, heads, value_heads: heads, dk: d, dv: d }
    }
}

/// `--shape`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Extents {
    batch: usize,
    time: usize,
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
            Ok(&[batch, time, heads, value_heads, dk, dv])
                if [batch, time, heads, value_heads, dk, dv].iter().all(|&extent| extent > 0) =>
            {
                Ok(Extents { batch, time, heads, value_heads, dk, dv })
            }
            _ => Err("expected six whole numbers above 0 with commas: B,T,H,HV,dk,dv".to_owned()),
        }
    }
}

impl Args {
    /// The shapes asked for, with their names.
    fn shapes(&self) -> Vec<(String, Extents)> {
        if self.size.is_empty() {
            let Extents { batch, time, heads, value_heads, dk, dv } = self.shape;
            return vec![(format!("{batch},{time},{heads},{value_heads},{dk},{dv}"), self.shape)];
        }
        self.size.iter().map(|size| (name(size), size.extents())).collect()
    }

    /// The input of a shape; `dtype` where none was asked for.
    fn recipe(&self, shape: Extents, dtype: DtypeArg) -> anyhow::Result<Recipe> {
        let Extents { batch, time, heads, value_heads, dk, dv } = shape;
        ensure!(
            value_heads % heads == 0,
            "--shape: expected HV a multiple of H = {heads}, got HV = {value_heads}"
        );
        check_capacity(self.capacity)?;
        ensure!(
            self.boundary_rate > 0.0 && self.boundary_rate <= 1.0,
            "--boundary-rate: expected above 0 and at most 1, got {}",
            self.boundary_rate
        );
        for width in [dk, dv, self.capacity] {
            check_size("--shape", "tensors", &[batch, time, value_heads, width])?;
        }
        check_size("--shape", "states [B,HV,M,dk,dv]", &[batch, value_heads, self.capacity, dk, dv])?;
        Ok(Recipe {
            options: Options {
                recurrence: self.recurrence.into(),
                capacity: self.capacity,
                merge: self.merge.into(),
                read: self.read.into(),
                tau: Tau::PerCall(self.tau),
                ..Options::default()
            },
            batch,
            time,
            heads,
            value_heads,
            dk,
            dv,
            dtype: self.dtype.unwrap_or(dtype).into(),
            boundary_rate: self.boundary_rate,
            ..Recipe::default()
        })
    }
}

/// An engine that can be timed, in stages where it knows them.
enum Timed {
    Cpu(dla::cpu::Engine),
    Other(Box<dyn Engine>),
}

impl Timed {
    fn of(device: Device) -> anyhow::Result<Self> {
        Ok(match device {
            Device::Auto | Device::Cpu => Timed::Cpu(dla::cpu::Engine),
            Device::Reference => Timed::Other(Box::new(dla::reference::Engine)),
            // Timed by its own clock, in cuda.rs.
            Device::Cuda => Timed::Other(device.engine()?),
        })
    }

    fn engine(&self) -> &dyn Engine {
        match self {
            Timed::Cpu(engine) => engine,
            Timed::Other(engine) => engine.as_ref(),
        }
    }

    fn forward(&self, problem: &Problem) -> dla::Result<(Forward, StageTimes)> {
        match self {
            Timed::Cpu(engine) => engine.forward_timed(problem),
            Timed::Other(engine) => whole(|| engine.forward(problem)),
        }
    }

    fn backward(
        &self,
        problem: &Problem,
        case: &Case,
        events: &[u8],
    ) -> dla::Result<(Gradients, StageTimes)> {
        match self {
            Timed::Cpu(engine) => engine.backward_timed(problem, events, &case.upstream()),
            Timed::Other(engine) => whole(|| engine.backward(problem, events, &case.upstream())),
        }
    }
}

/// Times a call that says nothing of its stages.
fn whole<T>(call: impl FnOnce() -> dla::Result<T>) -> dla::Result<(T, StageTimes)> {
    let start = Instant::now();
    let result = call()?;
    Ok((result, StageTimes { wall_ms: 1e3 * start.elapsed().as_secs_f64(), ..StageTimes::default() }))
}

/// One stage of one pass.
#[derive(Debug, Clone, Serialize)]
struct Row {
    pass: &'static str,
    stage: &'static str,
    /// Tokens of all batch entries that the time is for.
    tokens: usize,
    /// Wall time; of a stage its share of the call's.
    ms: f64,
    /// Time in the stage summed over threads.
    thread_ms: Option<f64>,
    gflop_s: f64,
    gb_s: f64,
}

impl Row {
    fn new(pass: &'static str, stage: &'static str, tokens: usize, ms: f64, cost: Cost) -> Self {
        // FLOP a millisecond are 1e-6 GFLOP/s.
        let rate = |work: f64| if ms > 0.0 { work / ms * 1e-6 } else { 0.0 };
        Row { pass, stage, tokens, ms, thread_ms: None, gflop_s: rate(cost.flop), gb_s: rate(cost.bytes) }
    }
}

/// Rows of a pass from its timed calls: of the one whose wall time is the median.
fn rows(pass: &'static str, tokens: usize, times: &[StageTimes], cost: &PassCost) -> Vec<Row> {
    let mut sorted = times.to_vec();
    sorted.sort_by(|a, b| a.wall_ms.total_cmp(&b.wall_ms));
    // The lower of two medians is a call that was made; their mean would be none.
    let Some(median) = sorted.get(sorted.len().saturating_sub(1) / 2) else { return Vec::new() };
    let threads_ms: f64 = median.stage_ms.iter().sum();
    let stage_row = |&stage: &Stage| {
        let thread_ms = median.stage_ms(stage);
        let ms = median.wall_ms * thread_ms / threads_ms;
        let row = Row::new(pass, stage.name(), tokens, ms, cost.stages[stage as usize]);
        // A stage that this call does not have costs a look at the clock.
        let idle = cost.stages[stage as usize].flop == 0.0 && ms < 1e-3 * median.wall_ms;
        (thread_ms > 0.0 && !idle).then_some(Row { thread_ms: Some(thread_ms), ..row })
    };
    let mut rows: Vec<Row> = Stage::ALL.iter().filter_map(stage_row).collect();
    rows.push(Row::new(pass, "all", tokens, median.wall_ms, cost.all));
    rows
}

/// What the run came to.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: &'static str,
    processor: Option<String>,
    threads: usize,
    shape: Extents,
    recurrence: String,
    capacity: usize,
    merge: String,
    read: String,
    dtype: String,
    boundary_rate: BoundaryRate,
    slots_held: f64,
    seed: u64,
    repeats: u16,
    ceiling: Ceiling,
    rows: Vec<Row>,
    /// Wall time of every timed call.
    wall_ms: WallTimes,
}

#[derive(Debug, Serialize)]
struct BoundaryRate {
    asked: f64,
    measured: f64,
}

#[derive(Debug, Serialize)]
struct Ceiling {
    /// f32 product of two 2048 x 2048 matrices by the `gemm` crate on all threads.
    matmul_gflop_s: f64,
}

#[derive(Debug, Serialize)]
struct WallTimes {
    forward: Vec<f64>,
    backward: Vec<f64>,
}

/// Runs the subcommand.
pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    if let Some(Other::Decode(args)) = &args.other {
        return decode::run(args, common);
    }
    let gpu = match args.device {
        Device::Auto => dla::cuda::available().is_ok(),
        device => device == Device::Cuda,
    };
    if let Some(sweep) = args.sweep {
        return sweep::run(args, sweep, gpu, common);
    }
    if gpu {
        return cuda::run(args, common);
    }
    let timed = Timed::of(args.device)?;
    let shapes = args.shapes();
    let [(_, shape)] = shapes[..] else {
        bail!("--size: expected one size on this device, got {}", shapes.len());
    };
    let recipe = args.recipe(shape, DtypeArg::F32)?;
    let json = args.json.as_deref().map(Output::at).transpose()?;
    let picture = args.plot.as_deref().map(picture::Picture::at).transpose()?;
    let repeats = args.repeats.into();

    let bar = common.progress(3 + 2 * (1 + u64::from(args.repeats)), "draw the input");
    let case = recipe.draw(args.seed);
    let problem = case.problem()?;
    bar.inc(1);
    bar.set_message("ceiling");
    let ceiling = Ceiling { matmul_gflop_s: ceiling::matmul_gflop_s(args.repeats) };
    bar.inc(1);

    bar.set_message("forward");
    // The first call pays for what is made once: not timed.
    let (forward, _) = timed.forward(&problem)?;
    bar.inc(1);
    let mut forward_times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        forward_times.push(timed.forward(&problem)?.1);
        bar.inc(1);
    }
    bar.set_message("backward");
    timed.backward(&problem, &case, &forward.events)?;
    bar.inc(1);
    let mut backward_times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        backward_times.push(timed.backward(&problem, &case, &forward.events)?.1);
        bar.inc(1);
    }
    bar.set_message("token by token");
    let work = Work::of(&problem, &forward.events);
    let tokens = problem.shape().tokens();
    let mut table = rows("forward", tokens, &forward_times, &work.forward());
    table.extend(rows("backward", tokens, &backward_times, &work.backward()));
    table.push(token_by_token(timed.engine(), &recipe, args.seed)?);
    bar.finish_and_clear();

    let summary = work.summary();
    let walls = |times: &[StageTimes]| times.iter().map(|times| times.wall_ms).collect();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: timed.engine().name(),
        processor: processor(),
        threads: rayon::current_num_threads(),
        shape,
        recurrence: name(&args.recurrence),
        capacity: args.capacity,
        merge: name(&args.merge),
        read: name(&args.read),
        dtype: recipe.dtype.to_string(),
        boundary_rate: BoundaryRate { asked: args.boundary_rate, measured: summary.boundary_rate },
        slots_held: summary.slots_held,
        seed: args.seed,
        repeats: args.repeats,
        ceiling,
        rows: table,
        wall_ms: WallTimes { forward: walls(&forward_times), backward: walls(&backward_times) },
    };
    common.print(&text(&report))?;
    if let Some(json) = json {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        json.write(text.as_bytes())?;
    }
    if let Some(picture) = picture {
        picture.write(&plot::Bars::of(&report))?;
    }
    Ok(())
}

/// Tokens that the token-by-token loop takes.
const STEPS: usize = 256;

/// One sequence fed one token at a time through [`Engine::step`], from the slots that a forward over as
/// many tokens left: as full as in most of a long sequence.
fn token_by_token(engine: &dyn Engine, recipe: &Recipe, seed: u64) -> anyhow::Result<Row> {
    let case = Recipe { batch: 1, time: recipe.time.min(STEPS), ..recipe.clone() }.draw(seed);
    let problem = case.problem()?;
    let mut cache = engine.forward(&problem)?.cache;
    let (mut ms, mut held) = (0.0, 0.0);
    for t in 0..problem.shape().time {
        let step = Problem::new(problem.options(), token(problem.inputs(), t))?;
        let start = Instant::now();
        engine.step(&step, &mut cache)?;
        ms += 1e3 * start.elapsed().as_secs_f64();
        held += cache.len.iter().map(|&len| f64::from(len)).sum::<f64>();
    }
    let Shape { time, value_heads, .. } = *problem.shape();
    let cost = cost::steps(&problem, (time * value_heads) as f64, held);
    Ok(Row::new("step", "all", time, ms, cost))
}

/// Token t of a call with B = 1.
fn token<'a>(inputs: &Inputs<'a>, t: usize) -> Inputs<'a> {
    let at = |tensor: Tensor<'a>| {
        let mut shape = tensor.shape().to_vec();
        shape[1] = 1;
        let width: usize = shape.iter().product();
        let range = t * width..(t + 1) * width;
        match tensor.data() {
            Data::F32(x) => Tensor::new(&x[range], &shape),
            Data::Bf16(x) => Tensor::new(&x[range], &shape),
            Data::F16(x) => Tensor::new(&x[range], &shape),
        }
    };
    let mut token = Inputs::new(at(inputs.q), at(inputs.k), at(inputs.v));
    token.g = inputs.g.map(at);
    token.beta = inputs.beta.map(at);
    token.lambda = inputs.lambda.map(at);
    token.route = inputs.route.map(|route| Route { logits: route.logits.map(at), ..route });
    token
}

fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// A value as the command line spells it.
fn name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// The report for people.
fn text(report: &Report) -> String {
    let Extents { batch, time, heads, value_heads, dk, dv } = report.shape;
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!(
        "{} on {}, {} threads",
        report.device,
        report.processor.as_deref().unwrap_or("a processor without a name"),
        report.threads
    ));
    line(format!(
        "B,T,H,HV,dk,dv = {batch},{time},{heads},{value_heads},{dk},{dv} {}, {}, M = {}, {}, {} reads",
        report.dtype, report.recurrence, report.capacity, report.merge, report.read
    ));
    line(format!(
        "{:.1}% of the tokens open a slot (asked: {}%), {:.1} slots are held on average",
        100.0 * report.boundary_rate.measured,
        100.0 * report.boundary_rate.asked,
        report.slots_held
    ));
    line(format!("ceiling: f32 matrix product {:.1} GFLOP/s", report.ceiling.matmul_gflop_s));
    line(format!(
        "{:<9} {:<8} {:>10} {:>10} {:>9} {:>8}",
        "pass", "stage", "ms", "GFLOP/s", "of ceil.", "GB/s"
    ));
    for Row { pass, stage, ms, gflop_s, gb_s, .. } in &report.rows {
        line(format!(
            "{pass:<9} {stage:<8} {ms:>10.3} {gflop_s:>10.2} {:>8.1}% {gb_s:>8.2}",
            100.0 * gflop_s / report.ceiling.matmul_gflop_s
        ));
    }
    let per_token = |pass: &str| {
        let row = report.rows.iter().find(|row| row.pass == pass && row.stage == "all")?;
        Some(1e3 * row.ms / row.tokens as f64)
    };
    if let (Some(forward), Some(step)) = (per_token("forward"), per_token("step")) {
        line(format!(
            "a token takes {forward:.2} us in the forward, {step:.2} us one at a time (step: {} tokens of one sequence through Engine::step, from full slots)",
            time.min(STEPS)
        ));
    }
    line(format!(
        "median of {} calls; a stage's ms: its share of the threads' time, of the call's wall time; useful work only",
        report.repeats
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_its_median_call_and_stages_add_up_to_it() {
        let times = |wall_ms: f64| StageTimes { wall_ms, stage_ms: [wall_ms, 0.0, 0.0, 3.0 * wall_ms] };
        let cost =
            PassCost { stages: [Cost { flop: 1e6, bytes: 2e6 }; 4], all: Cost { flop: 2e6, bytes: 3e6 } };
        let rows = rows("forward", 7, &[times(9.0), times(4.0), times(1.0), times(5.0)], &cost);
        let stages: Vec<&str> = rows.iter().map(|row| row.stage).collect();
        // A stage that took no time is not there.
        assert_eq!(stages, ["segment", "scan", "all"]);
        assert_eq!(rows.iter().map(|row| row.ms).collect::<Vec<_>>(), [1.0, 3.0, 4.0]);
        assert_eq!((rows[0].gflop_s, rows[0].gb_s), (1.0, 2.0));
        assert_eq!((rows[2].gflop_s, rows[2].tokens), (0.5, 7));
    }

    #[test]
    fn a_token_is_a_row_of_every_tensor() {
        let recipe = Recipe { time: 5, heads: 2, value_heads: 4, dk: 3, dv: 2, ..Recipe::default() };
        let case = recipe.draw(3);
        let inputs = case.inputs();
        let token = token(&inputs, 4);
        assert_eq!(token.v.shape(), [1, 1, 4, 2]);
        let (Data::F32(one), Data::F32(all)) = (token.v.data(), inputs.v.data()) else {
            panic!("drawn as f32");
        };
        assert_eq!(one, &all[4 * 8..]);
        assert!(Problem::new(&recipe.options, token).is_ok());
    }
}
