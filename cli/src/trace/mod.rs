//! `dla trace`: what the memory did with a text, as a page.

mod embed;
mod page;

use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use dla::{Inputs, Options, Problem, Read, Route, Tau, Tensor};

use crate::common::Common;
use crate::device::Device;
use crate::options::Merge;
use crate::output::Output;
use crate::tensors::{self, Tensors};

/// Draw what the memory does with a text: slots, boundaries, merges and routed reads, as a page
///
/// A text file becomes one token a byte, by a fixed embedding of the last 64 bytes (hashed n-grams
/// through a random projection; no model). A safetensors file gives a model's own k [B,T,H,dk] and v
/// [B,T,HV,dv], optionally g [B,T,HV] and text [T] (U8, the bytes behind the tokens); batch entry 0 is
/// drawn.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A text, or a safetensors file of k and v
    file: PathBuf,
    /// The page
    #[arg(long, short, default_value = "trace.html")]
    output: PathBuf,
    /// What computes
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Most slots held, M, 1 to 64
    #[arg(long, default_value_t = 30)]
    capacity: usize,
    /// Drift from which a token opens a slot, 0 to 2
    #[arg(long, default_value_t = 0.6)]
    tau: f32,
    /// Which pair merges when all slots are held
    #[arg(long, value_enum, default_value_t)]
    merge: Merge,
    /// Most tokens, from the start of the file
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    tokens: u64,
    /// Value head of a safetensors file
    #[arg(long, default_value_t = 0)]
    head: usize,
    /// Slope of the routed reads
    #[arg(long, default_value_t = 16.0)]
    slope: f32,
    /// Bias of the routed reads
    #[arg(long, default_value_t = -11.0, allow_negative_numbers = true)]
    bias: f32,
}

/// Keys and values of one head, and the text behind them.
struct Source {
    /// `[T, dk]`, `[T, dv]`.
    k: Vec<f32>,
    v: Vec<f32>,
    g: Option<Vec<f32>>,
    widths: (usize, usize),
    /// One byte a token; empty where there is no text.
    text: Vec<u8>,
    /// Tokens in the file.
    available: usize,
}

impl Source {
    fn tokens(&self) -> usize {
        self.k.len() / self.widths.0
    }
}

/// What the operator did.
struct Trace {
    drift: Vec<f32>,
    events: Vec<u8>,
    /// Routed read weights, `[T, M]`, slot 0 the oldest.
    weights: Vec<f32>,
    /// The tokens of every slot held at the end, oldest first.
    slots: Vec<Range<usize>>,
}

pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    let output = Output::at(&args.output)?;
    let engine = args.device.engine()?;
    let source = read(args)?;
    let start = Instant::now();
    let bar = common.progress(1, "tracing");
    let trace = trace(args, &source, engine.as_ref())?;
    bar.finish_and_clear();
    let elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
    output.write(page::page(args, &source, &trace)?.as_bytes())?;
    if !common.quiet {
        common.print(&summary(args, &source, &trace, engine.name(), elapsed_ms))?;
    }
    Ok(())
}

fn read(args: &Args) -> anyhow::Result<Source> {
    let bytes = tensors::read(&args.file)?;
    let shown = args.file.display();
    ensure!(!bytes.is_empty(), "{shown}: expected at least one byte, got an empty file");
    let most = args.tokens as usize;
    if args.file.extension().is_some_and(|extension| extension == "safetensors") {
        return read_tensors(&args.file, &bytes, most, args.head);
    }
    let text = bytes[..bytes.len().min(most)].to_vec();
    let embed::Embedding { k, v } = embed::embed(&text);
    let widths = (embed::WIDTH, embed::WIDTH);
    Ok(Source { k, v, g: None, widths, text, available: bytes.len() })
}

fn read_tensors(path: &Path, bytes: &[u8], most: usize, head: usize) -> anyhow::Result<Source> {
    let file = Tensors::parse(path, bytes)?;
    let need = |name| file.missing(name, "dla trace reads k [B,T,H,dk] and v [B,T,HV,dv], or a text file");
    let [batch, time, heads, dk] = file.extents("k", "[B,T,H,dk]")?.ok_or_else(|| need("k"))?;
    let [_, _, value_heads, dv] = file.extents("v", "[B,T,HV,dv]")?.ok_or_else(|| need("v"))?;
    let (k, v) = (file.floats("k")?, file.floats("v")?);
    let (k, v) = (k.ok_or_else(|| need("k"))?, v.ok_or_else(|| need("v"))?);
    let shown = path.display();
    ensure!(
        batch > 0 && time > 0 && heads > 0 && dk > 0 && dv > 0,
        "{shown}: k: expected [B,T,H,dk] with at least one token, got {:?}",
        k.tensor().shape()
    );
    let expected = [batch, time, value_heads, dv];
    ensure!(
        v.tensor().shape() == expected && value_heads > 0 && value_heads % heads == 0,
        "{shown}: v: expected [B,T,HV,dv] = [{batch}, {time}, HV, dv] with HV a multiple of H = {heads}, got {:?}",
        v.tensor().shape()
    );
    ensure!(
        head < value_heads,
        "{shown}: --head: expected a value head below HV = {value_heads}, got {head}"
    );
    let tokens = time.min(most);
    let rows = |x: &tensors::Floats, heads: usize, head: usize, width: usize| -> Vec<f32> {
        (0..tokens).flat_map(|t| x.row((t * heads + head) * width, width)).collect()
    };
    let per_token = [batch, time, value_heads];
    let g = file.f32s("g", "[B,T,HV]", &per_token)?;
    let text = file.u8s("text", "[T]", &[time])?;
    Ok(Source {
        k: rows(&k, heads, head / (value_heads / heads), dk),
        v: rows(&v, value_heads, head, dv),
        g: g.map(|g| (0..tokens).map(|t| g[t * value_heads + head]).collect()),
        widths: (dk, dv),
        text: text.map_or_else(Vec::new, |text| text[..tokens].to_vec()),
        available: time,
    })
}

fn trace(args: &Args, source: &Source, engine: &dyn dla::Engine) -> anyhow::Result<Trace> {
    let ((dk, dv), t) = (source.widths, source.tokens());
    let options = Options {
        capacity: args.capacity,
        tau: Tau::PerCall(args.tau),
        merge: args.merge.into(),
        read: Read::Routed,
        qk_l2norm: true,
        ..Options::default()
    };
    // A token reads with its own key: where else does the memory hold what stands here?
    let k = Tensor::new(&source.k, &[1, t, 1, dk]);
    let mut inputs = Inputs::new(k, k, Tensor::new(&source.v, &[1, t, 1, dv]));
    inputs.g = source.g.as_ref().map(|g| Tensor::new(g, &[1, t, 1]));
    let (slope, bias) = (vec![args.slope], vec![args.bias]);
    inputs.route =
        Some(Route { slope: Tensor::new(&slope, &[1]), bias: Tensor::new(&bias, &[1]), logits: None });
    let shown = args.file.display();
    let problem = Problem::new(&options, inputs).with_context(|| shown.to_string())?;
    let forward = engine.forward(&problem)?;
    let slots = slots(&forward.cache.tokens[..forward.cache.len[0] as usize]);
    Ok(Trace {
        drift: forward.drift,
        events: forward.events,
        weights: forward.lambda.unwrap_or_default(),
        slots,
    })
}

/// Slots are stretches of time, oldest first: their token counts say where each lies.
fn slots(tokens: &[u32]) -> Vec<Range<usize>> {
    let mut start = 0;
    let stretch = |&n: &u32| {
        let slot = start..start + n as usize;
        start = slot.end;
        slot
    };
    tokens.iter().map(stretch).collect()
}

fn summary(args: &Args, source: &Source, trace: &Trace, engine: &str, elapsed_ms: f64) -> String {
    let tokens = source.tokens();
    let opened = trace.events.iter().filter(|&&event| event != dla::events::EXTEND).count();
    let merges = trace.events.iter().filter(|&&event| event >= dla::events::MERGE).count();
    let mut out = String::new();
    let rest = source.available - tokens;
    let more =
        if rest > 0 { format!(", the first of {} (--tokens)", source.available) } else { String::new() };
    let _ = writeln!(out, "{}: {tokens} tokens{more}", args.file.display());
    let _ = writeln!(
        out,
        "{opened} tokens ({:.1}%) opened a slot at tau = {}, {merges} merges by {:?} held them at {} (M = {})",
        100.0 * opened as f64 / tokens as f64,
        args.tau,
        dla::Merge::from(args.merge),
        trace.slots.len(),
        args.capacity,
    );
    let largest = trace.slots.iter().map(Range::len).max().unwrap_or(1);
    for (i, slot) in trace.slots.iter().enumerate() {
        let width = (slot.len() * 24).div_ceil(largest);
        let _ =
            writeln!(out, "{i:>4} {:<24} {:>6}  {}", "█".repeat(width), slot.len(), excerpt(source, slot));
    }
    let _ = writeln!(out, "{elapsed_ms:.0} ms on the {engine} engine; page: {}", args.output.display());
    out
}

/// How a slot's stretch begins, on one line.
fn excerpt(source: &Source, slot: &Range<usize>) -> String {
    if source.text.is_empty() {
        return format!("tokens {} to {}", slot.start, slot.end - 1);
    }
    let text = String::from_utf8_lossy(&source.text[slot.clone()]);
    let shown = |c: char| if c.is_control() || c == '\u{fffd}' { '·' } else { c };
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().map(shown).take(48).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_stretches() {
        assert_eq!(slots(&[3, 1, 4]), [0..3, 3..4, 4..8]);
        assert!(slots(&[]).is_empty());
    }
}
