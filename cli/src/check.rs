//! `dla check`: an engine against the definition in f64, on random cases.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;

use anyhow::{Context, bail};
use dla::Engine;
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
    common.print(&format!("engine {}, cases {}, first seed {first}\n", engine.name(), args.cases))?;
    let bar = common.progress(args.cases, "check");
    let seeds = (0..args.cases).map(|i| first.wrapping_add(i));
    let survey = Survey::of(engine.as_ref(), seeds, || bar.inc(1))?;
    bar.finish_and_clear();

    common.print(&table(&survey.worst))?;
    for case in &survey.failed {
        common.print(&format!("over a bound: {case}\n"))?;
    }
    if !survey.failed.is_empty() {
        bail!(
            "{} of {} cases are over a bound: repeat one with --cases 1 --seed and its seed",
            survey.failed.len(),
            args.cases
        );
    }
    Ok(())
}

/// What all cases came to.
struct Survey {
    worst: BTreeMap<&'static str, Worst>,
    /// Cases of which a tensor is over its bound.
    failed: Vec<String>,
}

impl Survey {
    fn of(engine: &dyn Engine, seeds: impl Iterator<Item = u64>, done: impl Fn()) -> anyhow::Result<Self> {
        let mut survey = Survey { worst: BTreeMap::new(), failed: Vec::new() };
        for seed in seeds {
            let case = Case::random(seed);
            let rows = compare(engine, &case)
                .with_context(|| format!("{} (repeat with --cases 1 --seed {seed})", case.describe()))?;
            if rows.iter().any(|row| !row.passed()) {
                survey.failed.push(case.describe());
            }
            for comparison in rows {
                survey.add(comparison, seed);
            }
            done();
        }
        Ok(survey)
    }

    fn add(&mut self, comparison: Comparison, seed: u64) {
        let fails = u64::from(!comparison.passed());
        match self.worst.entry(comparison.tensor) {
            Entry::Vacant(entry) => {
                entry.insert(Worst { comparison, seed, cases: 1, failures: fails });
            }
            Entry::Occupied(mut entry) => {
                let held = entry.get_mut();
                held.cases += 1;
                held.failures += fails;
                if severity(&comparison) > severity(&held.comparison) {
                    (held.comparison, held.seed) = (comparison, seed);
                }
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use dla::{Buffer, Cache, Forward, Gradients, OutputGradients, Problem, Step};

    /// The reference with one output element changed.
    struct Wrong(fn(f64) -> f64);

    impl Engine for Wrong {
        fn name(&self) -> &'static str {
            "wrong"
        }

        fn forward(&self, problem: &Problem) -> dla::Result<Forward> {
            let mut forward = dla::reference::Engine.forward(problem)?;
            let mut o = forward.o.to_f64();
            if let Some(last) = o.last_mut() {
                *last = self.0(*last);
            }
            forward.o = Buffer::from_f64(forward.o.dtype(), &o);
            Ok(forward)
        }

        fn backward(
            &self,
            problem: &Problem,
            events: &[u8],
            upstream: &OutputGradients,
        ) -> dla::Result<Gradients> {
            dla::reference::Engine.backward(problem, events, upstream)
        }

        fn step(&self, problem: &Problem, cache: &mut Cache) -> dla::Result<Step> {
            dla::reference::Engine.step(problem, cache)
        }
    }

    #[test]
    fn a_wrong_engine_is_found_out() {
        for change in [|x: f64| 2.0 * x + 100.0, |_| f64::NAN] {
            let survey = Survey::of(&Wrong(change), 3..5, || {}).expect("its own log");
            assert_eq!(survey.failed.len(), 2);
            assert_eq!((survey.worst["o"].failures, survey.worst["o"].cases), (2, 2));
            assert_eq!(survey.worst["dq"].failures, 0);
            let table = table(&survey.worst);
            let over: Vec<_> = table.lines().filter(|line| line.ends_with("OVER in 2")).collect();
            assert!(matches!(over[..], [line] if line.starts_with("o ")), "{table}");
        }
    }

    #[test]
    fn the_worst_is_relative_to_its_bound() {
        let row = |error, bound| Comparison { tensor: "o", error, bound, worst: 0 };
        let mut survey = Survey { worst: BTreeMap::new(), failed: Vec::new() };
        for (seed, comparison) in [row(1e-3, 1e-2), row(1e-4, 2e-4), row(0.0, 0.0)].into_iter().enumerate() {
            survey.add(comparison, seed as u64);
        }
        assert_eq!(survey.worst["o"].seed, 1);
        survey.add(row(f64::NAN, 1.0), 9);
        assert_eq!((survey.worst["o"].seed, survey.worst["o"].failures), (9, 1));
    }
}
