//! What every subcommand shares: where text goes, and progress.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

/// Options of every subcommand.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Common {
    /// No progress bars and no notes; errors are still told.
    #[arg(long, short = 'q', global = true)]
    pub quiet: bool,
}

impl Common {
    /// A bar over `len` steps on stderr, hidden with `--quiet` or where stderr is no terminal.
    pub fn progress(&self, len: u64, message: &str) -> ProgressBar {
        if self.quiet || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        // Cleared when dropped too, so that an error does not end on the bar's line.
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr())
            .with_finish(ProgressFinish::AndClear);
        // One step says nothing of how far it is: a spinner then, with the time that has passed.
        let template = if len > 1 {
            "{msg} {wide_bar} {pos}/{len} {eta}"
        } else {
            bar.enable_steady_tick(Duration::from_millis(100));
            "{spinner} {msg} {elapsed}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(message.to_owned());
        bar
    }

    /// One line on stderr that is worth knowing and no failure.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            // A closed stderr is no reason to fail.
            let _ = writeln!(std::io::stderr(), "dla: note: {text}");
        }
    }

    /// Results on stdout. A reader that has seen enough (`| head`) is no failure.
    pub fn print(&self, text: &str) -> anyhow::Result<()> {
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(error).context("cannot write to stdout")
            }
            _ => Ok(()),
        }
    }
}
