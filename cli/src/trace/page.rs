//! The page: one file, nothing fetched.

use anyhow::Context;
use base64::Engine as _;
use serde::Serialize;

use super::{Args, Source, Trace};

const HTML: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// What the script draws. Arrays are base64 of bytes.
#[derive(Serialize)]
struct Data {
    tokens: usize,
    capacity: usize,
    tau: f32,
    /// The bytes behind the tokens; empty where there are none.
    text: String,
    /// `[T]`, little-endian u16 in units of 1/32768.
    drift: String,
    /// `[T]`, as in the event log.
    events: String,
    /// Read weights `[T, M]` in units of 1/255, slot 0 the oldest.
    weights: String,
}

pub fn page(args: &Args, source: &Source, trace: &Trace) -> anyhow::Result<String> {
    let drift: Vec<u8> =
        trace.drift.iter().flat_map(|drift| ((drift * 32768.0).round() as u16).to_le_bytes()).collect();
    let weights: Vec<u8> = trace.weights.iter().map(|weight| (weight * 255.0).round() as u8).collect();
    let data = Data {
        tokens: source.tokens(),
        capacity: args.capacity,
        tau: args.tau,
        text: base64(&source.text),
        drift: base64(&drift),
        events: base64(&trace.events),
        weights: base64(&weights),
    };
    // Base64 and numbers alone: nothing in it can end the script.
    let data = serde_json::to_string(&data).context("the page's data")?;
    let name = args.file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let merge = format!("{:?}", dla::Merge::from(args.merge)).to_lowercase();
    let sign = if args.bias < 0.0 { '−' } else { '+' };
    let score = format!("{} q · kappa {sign} {}", args.slope, args.bias.abs());
    let fields = [
        ("{{css}}", CSS.to_owned()),
        ("{{js}}", JS.to_owned()),
        ("{{data}}", data),
        ("{{capacity}}", args.capacity.to_string()),
        ("{{tau}}", args.tau.to_string()),
        ("{{merge}}", merge),
        ("{{score}}", score),
        // Last: a name may hold anything, a field's mark too.
        ("{{name}}", escape(&name)),
    ];
    Ok(fields.iter().fold(HTML.to_owned(), |page, (mark, text)| page.replace(mark, text)))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped() {
        assert_eq!(escape("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
    }
}
