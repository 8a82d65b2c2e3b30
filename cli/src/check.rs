//! `dla check`: an engine against the definition in f64, on random cases.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, bail};
use dla::check::{Case, Comparison, compare};

use crate::common::Common;
use crate::device::Device;

/// Compare an engine with the reference on random cases
///
/// Draws shapes, capacities, boundary rates (1%, 25%, 100%), dtypes, both recurrences and every
/// option, runs forward and backward, and prints the worst relative error of every tensor with its
/// bound and the case's seed. Exit status 1 where any is over its bound.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What is checked
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Cases to draw
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    cases: u64,
    /// Seed of the first case; the next cases take the next seeds [default: drawn, and printed]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

/// The worst that one tensor came to.
struct Worst {
    comparison: Comparison,
    seed: u64,
    /// Cases that have the tensor.
    cases: u64,
    failures: u64,
}

/// Error in units of its bound; what is no number is worse than any.
fn severity(comparison: &Comparison) -> f64 {
    match comparison {
        Comparison { error, .. } if error.is_nan() => f64::INFINITY,
        Comparison { error: 0.0, .. } => 0.0,
        Comparison { error, bound, .. } => error / bound,
    }
}

/// Runs the subcommand.
pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    let engine = args.device.engine()?;
    let first: u64 = args.seed.unwrap_or_else(rand::random);
    common.print(&format!("{} cases from seed {first}, engine {}\n", args.cases, engine.name()))?;
    let mut worst: BTreeMap<&str, Worst> = BTreeMap::new();
    let mut failed = Vec::new();
    let bar = common.progress(args.cases, "check");
    for i in 0..args.cases {
        let seed = first.wrapping_add(i);
        let case = Case::random(seed);
        let rows = compare(engine.as_ref(), &case)
            .with_context(|| format!("{} (repeat with --cases 1 --seed {seed})", case.describe()))?;
        if rows.iter().any(|row| !row.passed()) {
            failed.push(case.describe());
        }
        for comparison in rows {
            let fails = u64::from(!comparison.passed());
            worst
                .entry(comparison.tensor)
                .and_modify(|held| {
                    held.cases += 1;
                    held.failures += fails;
                    if severity(&comparison) > severity(&held.comparison) {
                        (held.comparison, held.seed) = (comparison.clone(), seed);
                    }
                })
                .or_insert(Worst { comparison, seed, cases: 1, failures: fails });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    common.print(&table(&worst))?;
    for case in &failed {
        common.print(&format!("over a bound: {case}\n"))?;
    }
    if !failed.is_empty() {
        bail!(
            "{} of {} cases are over a bound: repeat one with --cases 1 --seed and its seed",
            failed.len(),
            args.cases
        );
    }
    Ok(())
}

fn table(worst: &BTreeMap<&str, Worst>) -> String {
    let mut text = String::new();
    let mut line = |cells: [&str; 7]| {
        let [tensor, cases, error, bound, at, seed, verdict] = cells;
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "{tensor:<14} {cases:>5}  {error:>9}  {bound:>9}  {at:>10}  {seed:>20}  {verdict}"
        );
    };
    line(["tensor", "cases", "error", "bound", "at element", "of the case of seed", ""]);
    for (tensor, Worst { comparison, seed, cases, failures }) in worst {
        let verdict = if *failures == 0 { "ok".to_owned() } else { format!("OVER in {failures}") };
        line([
            tensor,
            &cases.to_string(),
            &format!("{:.2e}", comparison.error),
            &format!("{:.2e}", comparison.bound),
            &comparison.worst.to_string(),
            &seed.to_string(),
            &verdict,
        ]);
    }
    text
}
