//! `dla`: Dynamic Linear Attention on files.

mod bench;
mod check;
mod common;
mod cost;
mod device;
mod options;
mod output;
mod run;
mod tensors;
mod trace;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use common::Common;

/// Dynamic Linear Attention (arXiv 2606.10650): linear attention whose memory is up to M states.
///
/// Exit status: 0 success, 1 failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "dla", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

// A subcommand is a module with `Args` and `run(&Args, &Common)`, one line here and one in `dispatch`.
#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Check(check::Args),
    Bench(bench::Args),
    Trace(trace::Args),
}

fn dispatch(command: &Command, common: &Common) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => run::run(args, common),
        Command::Check(args) => check::run(args, common),
        Command::Bench(args) => bench::run(args, common),
        Command::Trace(args) => trace::run(args, common),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli.command, &cli.common) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever a cause puts into its text.
            let text = format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(std::io::stderr(), "dla: error: {text}");
            ExitCode::FAILURE
        }
    }
}
