//! `dla bench --sweep`: time and throughput over one extent, beside the floor.

use std::fmt::Write;

use anyhow::ensure;
use dla::check::Recipe;
use plotters::coord::Shift;
use plotters::prelude::*;
use serde::Serialize;

use super::picture::{Drawing, Picture};
use super::{Args, DtypeArg, Extents, Timed, ceiling, cuda, name, processor, rows};
use crate::common::Common;
use crate::cost::Work;
use crate::output::Output;

/// `--sweep`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sweep {
    /// Tokens
    #[value(name = "T")]
    T,
    /// Most slots held
    #[value(name = "M")]
    M,
    /// Share of the tokens that open a slot
    Rate,
    /// Size of a head, dk = dv
    Heads,
}

impl Sweep {
    fn default_values(self, gpu: bool) -> &'static [f64] {
        match (self, gpu) {
            (Sweep::T, true) => &[1024.0, 2048.0, 4096.0, 8192.0, 16_384.0, 32_768.0, 65_536.0],
            (Sweep::T, false) => &[256.0, 512.0, 1024.0, 2048.0, 4096.0],
            (Sweep::M, _) => &[1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 64.0],
            (Sweep::Rate, _) => &[0.01, 0.03, 0.1, 0.3, 1.0],
            (Sweep::Heads, _) => &[32.0, 64.0, 96.0, 128.0, 256.0],
        }
    }

    /// The input at a value; all else as the command line has it.
    fn recipe(self, args: &Args, dtype: DtypeArg, value: f64) -> anyhow::Result<Recipe> {
        let mut shape = args.shape;
        let mut recipe = args.recipe(shape, dtype)?;
        if self == Sweep::Rate {
            ensure!(value > 0.0 && value <= 1.0, "--values: expected above 0 and at most 1, got {value}");
            recipe.boundary_rate = value;
            return Ok(recipe);
        }
        let most = if self == Sweep::M { 64.0 } else { f64::from(u32::MAX) };
        ensure!(
            (1.0..=most).contains(&value) && value.fract() == 0.0,
            "--values: expected whole numbers from 1 to {most}, got {value}"
        );
        let whole = value as usize;
        match self {
            Sweep::T => shape.time = whole,
            Sweep::Heads => (shape.dk, shape.dv) = (whole, whole),
            Sweep::M | Sweep::Rate => {}
        }
        recipe = args.recipe(shape, dtype)?;
        if self == Sweep::M {
            recipe.options.capacity = whole;
        }
        Ok(recipe)
    }
}

/// One stage of one pass at one value.
#[derive(Debug, Clone, Serialize)]
struct Point {
    value: f64,
    pass: &'static str,
    stage: String,
    ms: f64,
    /// What useful work alone would take at the ceilings.
    floor_ms: f64,
    /// Tokens of all batch entries, times value heads, a second.
    million_token_heads_s: f64,
    /// As the log has it.
    boundary_rate: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    sweep: String,
    device: &'static str,
    card: String,
    /// Of the CPU's engine.
    threads: Option<usize>,
    /// What the command line says; the swept extent is each point's value.
    shape: Extents,
    recurrence: String,
    capacity: usize,
    merge: String,
    read: String,
    dtype: String,
    boundary_rate: f64,
    seed: u64,
    repeats: u16,
    matmul_tflop_s: f64,
    /// Of a GPU, measured.
    copy_gb_s: Option<f64>,
    points: Vec<Point>,
}

/// Runs the sweep and writes what was asked for.
pub fn run(args: &Args, sweep: Sweep, gpu: bool, common: &Common) -> anyhow::Result<()> {
    let values = if args.values.is_empty() { sweep.default_values(gpu) } else { &args.values };
    let dtype = if gpu { DtypeArg::Bf16 } else { DtypeArg::F32 };
    let mut recipes = Vec::new();
    for &value in values {
        recipes.push((value, sweep.recipe(args, dtype, value)?));
    }
    let json = args.json.as_deref().map(Output::at).transpose()?;
    let picture = args.plot.as_deref().map(Picture::at).transpose()?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        sweep: name(&sweep),
        device: "cuda",
        card: String::new(),
        threads: None,
        shape: args.shape,
        recurrence: name(&args.recurrence),
        capacity: args.capacity,
        merge: name(&args.merge),
        read: name(&args.read),
        dtype: recipes.first().map_or_else(String::new, |(_, recipe)| recipe.dtype.to_string()),
        boundary_rate: args.boundary_rate,
        seed: args.seed,
        repeats: args.repeats,
        matmul_tflop_s: args.matmul_tflop_s,
        copy_gb_s: None,
        points: Vec::new(),
    };
    if gpu {
        on_gpu(args, &recipes, &mut report, common)?
    } else {
        on_cpu(args, &recipes, &mut report, common)?
    }
    common.print(&text(&report))?;
    if let Some(json) = json {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        json.write(text.as_bytes())?;
    }
    if let Some(picture) = picture {
        picture.write(&Curves::of(&report))?;
    }
    Ok(())
}

fn point(
    value: f64,
    (pass, stage): (&'static str, &str),
    recipe: &Recipe,
    ms: f64,
    floor_ms: f64,
    boundary_rate: f64,
) -> Point {
    let token_heads = (recipe.batch * recipe.time * recipe.value_heads) as f64;
    let million_token_heads_s = if ms > 0.0 { token_heads / ms * 1e-3 } else { 0.0 };
    Point { value, pass, stage: stage.to_owned(), ms, floor_ms, million_token_heads_s, boundary_rate }
}

fn on_gpu(
    args: &Args,
    recipes: &[(f64, Recipe)],
    report: &mut Report,
    common: &Common,
) -> anyhow::Result<()> {
    let found = cuda::points(args, recipes, common)?;
    (report.card, report.copy_gb_s) = (found.card, Some(found.ceilings.copy_gb_s));
    for ((value, recipe), rows) in recipes.iter().zip(found.rows) {
        for row in rows.iter().filter(|row| row.pass != "backward_kernels") {
            let at = (row.pass, row.stage.as_str());
            report.points.push(point(*value, at, recipe, row.ms, row.floor_ms, row.boundary_rate));
        }
    }
    Ok(())
}

fn on_cpu(
    args: &Args,
    recipes: &[(f64, Recipe)],
    report: &mut Report,
    common: &Common,
) -> anyhow::Result<()> {
    let timed = Timed::of(args.device)?;
    report.device = timed.engine().name();
    report.card = processor().unwrap_or_default();
    report.threads = Some(rayon::current_num_threads());
    let bar = common.progress(1 + recipes.len() as u64, "ceiling");
    let gflop_s = ceiling::matmul_gflop_s(args.repeats);
    report.matmul_tflop_s = gflop_s * 1e-3;
    bar.inc(1);
    for (value, recipe) in recipes {
        bar.set_message(format!("{} {value}", report.sweep));
        let case = recipe.draw(args.seed);
        let problem = case.problem()?;
        // The first call of each pass pays for what is made once: not timed.
        let (forward, _) = timed.forward(&problem)?;
        timed.backward(&problem, &case, &forward.events)?;
        let (mut forwards, mut backwards) = (Vec::new(), Vec::new());
        for _ in 0..args.repeats {
            forwards.push(timed.forward(&problem)?.1);
            backwards.push(timed.backward(&problem, &case, &forward.events)?.1);
        }
        let work = Work::of(&problem, &forward.events);
        let rate = work.summary().boundary_rate;
        let tokens = problem.shape().tokens();
        let mut table = rows("forward", tokens, &forwards, &work.forward());
        table.extend(rows("backward", tokens, &backwards, &work.backward()));
        for row in table {
            // GFLOP/s times ms is the work; the floor is that work at the ceiling.
            let floor_ms = row.ms * row.gflop_s / gflop_s;
            report.points.push(point(*value, (row.pass, row.stage), recipe, row.ms, floor_ms, rate));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The report for people.
fn text(report: &Report) -> String {
    let Extents { batch, time, heads, value_heads, dk, dv } = report.shape;
    let mut text = format!(
        "{} on {}: B,T,H,HV,dk,dv = {batch},{time},{heads},{value_heads},{dk},{dv} {}, {}, M = {}, {}, {} reads; over {}\n",
        report.device,
        if report.card.is_empty() { "a processor without a name" } else { &report.card },
        report.dtype,
        report.recurrence,
        report.capacity,
        report.merge,
        report.read,
        report.sweep,
    );
    text += &format!(
        "{:>9} {:<16} {:<8} {:>10} {:>10} {:>9} {:>14} {:>7}\n",
        report.sweep, "pass", "stage", "ms", "floor", "of floor", "M token-heads/s", "opens"
    );
    for p in &report.points {
        let share = if p.ms > 0.0 { 100.0 * p.floor_ms / p.ms } else { 0.0 };
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{:>9} {:<16} {:<8} {:>10.3} {:>10.4} {share:>8.1}% {:>15.3} {:>6.1}%",
            p.value,
            p.pass,
            p.stage,
            p.ms,
            p.floor_ms,
            p.million_token_heads_s,
            100.0 * p.boundary_rate
        );
    }
    text += &format!("median of {} calls; floor: useful work at the ceilings\n", report.repeats);
    text
}

/// What is drawn: whole passes.
const SERIES: [(&str, &str, &str); 4] = [
    ("forward", "all", "forward"),
    ("backward", "all", "backward"),
    ("forward_backward", "backward", "backward"),
    ("forward_backward", "all", "forward + backward"),
];
const COLORS: [RGBColor; 4] =
    [RGBColor(38, 110, 180), RGBColor(200, 95, 40), RGBColor(200, 95, 40), RGBColor(90, 90, 90)];

type Curve<'a> = (&'a str, RGBColor, Vec<&'a Point>);

/// Time with its floor, and throughput, side by side.
struct Curves<'a> {
    report: &'a Report,
    curves: Vec<Curve<'a>>,
}

impl<'a> Curves<'a> {
    fn of(report: &'a Report) -> Self {
        let curves = SERIES.iter().zip(COLORS).map(|((pass, stage, label), color)| {
            let of = report.points.iter().filter(|p| p.pass == *pass && p.stage == *stage);
            (*label, color, of.collect::<Vec<_>>())
        });
        Curves { report, curves: curves.filter(|(_, _, points)| !points.is_empty()).collect() }
    }
}

impl Drawing for Curves<'_> {
    fn size(&self) -> (u32, u32) {
        (1100, 460)
    }

    fn draw<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let Curves { report, curves } = self;
        root.fill(&WHITE)?;
        let title = format!(
            "{}: {} {} M = {}, {} reads, {}",
            report.card, report.recurrence, report.merge, report.capacity, report.read, report.dtype
        );
        let (left, right) = root.titled(&title, ("sans-serif", 18))?.split_horizontally(550);
        panel(&left, report, curves, "ms (dashed: floor)", |p| (p.ms, Some(p.floor_ms)))?;
        panel(&right, report, curves, "million tokens x heads a second", |p| (p.million_token_heads_s, None))
    }
}

/// One value over what is swept, both axes logarithmic; with a floor where there is one.
fn panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    report: &Report,
    curves: &[Curve],
    label: &str,
    of: impl Fn(&Point) -> (f64, Option<f64>),
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let points = || curves.iter().flat_map(|(_, _, points)| points.iter());
    let around = |values: &mut dyn Iterator<Item = f64>| {
        let positive = values.filter(|x| *x > 0.0 && x.is_finite());
        let (low, high) = positive.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        if low <= high { low / 1.3..high * 1.3 } else { 0.1..10.0 }
    };
    let x_range = around(&mut points().map(|p| p.value));
    let y_range = around(&mut points().flat_map(|p| {
        let (y, floor) = of(p);
        [Some(y), floor].into_iter().flatten()
    }));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x_range.log_scale(), y_range.log_scale())?;
    let plain = |x: &f64| if *x >= 1e6 { format!("{x:.0e}") } else { format!("{}", (x * 1e6).round() / 1e6) };
    chart
        .configure_mesh()
        .x_desc(report.sweep.as_str())
        .y_desc(label)
        .x_label_formatter(&plain)
        .y_label_formatter(&plain)
        .light_line_style(RGBColor(235, 235, 235))
        .draw()?;
    for (name, color, points) in curves {
        let style = color.stroke_width(2);
        let line = points.iter().map(|p| (p.value, of(p).0)).filter(|p| p.1 > 0.0);
        chart
            .draw_series(LineSeries::new(line, style).point_size(3))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        let floor = points.iter().filter_map(|p| Some((p.value, of(p).1?))).filter(|p| p.1 > 0.0);
        chart.draw_series(DashedLineSeries::new(floor, 5, 4, color.stroke_width(1)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
