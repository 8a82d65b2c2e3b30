//! `dla trace` through the binary: what it says, what it refuses, and its page in a browser.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::Dtype;
use serde_json::Value;
use support::{File, Raw, Scratch, dla, write};

const TEXT: &str = include_str!("../src/trace/embed.rs");

fn trace(scratch: &Scratch, name: &str, content: &[u8], options: &[&str]) -> (support::Ran, PathBuf) {
    let (file, page) = (scratch.path(name), scratch.path("page.html"));
    std::fs::write(&file, content).unwrap();
    let mut args = vec!["trace".into(), file.into_os_string(), "-o".into(), page.clone().into_os_string()];
    args.extend(options.iter().map(Into::into));
    (dla(args), page)
}

#[test]
fn a_text_becomes_a_page_and_a_summary() {
    let scratch = Scratch::new();
    let (ran, page) = trace(&scratch, "text.rs", TEXT.as_bytes(), &["--merge", "mass", "--tokens", "2000"]);
    let ran = ran.succeeds();
    assert!(ran.stdout.contains(&format!("2000 tokens, the first of {}", TEXT.len())), "{}", ran.stdout);
    assert!(ran.stdout.contains("merges by Mass held them at 30 (M = 30)"), "{}", ran.stdout);
    // One line a slot between the two lines above and the one below, whose tokens add up.
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let slots = &lines[2..lines.len() - 1];
    let count = |line: &&str| line.split_whitespace().nth(2).unwrap().parse::<usize>().unwrap();
    let tokens: usize = slots.iter().map(count).sum();
    assert_eq!((slots.len(), tokens), (30, 2000), "{}", ran.stdout);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.starts_with("<!doctype html>") && !page.contains("{{"));
    for outside in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn quiet_prints_nothing() {
    let scratch = Scratch::new();
    let (ran, page) = trace(&scratch, "text.txt", b"few words", &["--quiet"]);
    let ran = ran.succeeds();
    assert!(ran.stdout.is_empty() && ran.stderr.is_empty());
    assert!(page.exists());
}

/// Engines, and the same text twice, give the same page.
#[test]
fn the_page_is_the_same_by_every_engine() {
    let scratch = Scratch::new();
    let page = |options: &[&str]| {
        let (ran, page) = trace(&scratch, "text.txt", &TEXT.as_bytes()[..700], options);
        ran.succeeds();
        let page = std::fs::read_to_string(page).unwrap();
        let field = |name: &str| {
            let from = page.split_once(&format!("\"{name}\":\"")).unwrap().1;
            from.split_once('"').unwrap().0.to_owned()
        };
        (field("events"), field("text"))
    };
    assert_eq!(page(&[]), page(&["--device", "reference"]));
}

fn model(tokens: usize) -> File {
    let x: Vec<f32> = (0..2 * tokens * 2 * 8).map(|i| ((i * 7919 % 1000) as f32 / 500.0) - 1.0).collect();
    let text: Vec<u8> = TEXT.bytes().take(tokens).collect();
    File::from([
        ("k".to_owned(), Raw::f32s(&x[..2 * tokens * 8], &[2, tokens, 1, 8])),
        ("v".to_owned(), Raw::f32s(&x, &[2, tokens, 2, 8])),
        ("g".to_owned(), Raw::f32s(&vec![-0.1; 2 * tokens * 2], &[2, tokens, 2])),
        ("text".to_owned(), Raw::u8s(&text, &[tokens])),
    ])
}

#[test]
fn a_model_is_drawn_too() {
    let scratch = Scratch::new();
    let file = scratch.path("model.safetensors");
    write(&file, &model(90));
    let page = scratch.path("page.html");
    let run = |options: &[&str]| {
        let mut args =
            vec!["trace".into(), file.clone().into_os_string(), "-o".into(), page.clone().into_os_string()];
        args.extend(options.iter().map(Into::into));
        dla(args)
    };
    let first = run(&[]).succeeds().stdout;
    assert!(first.contains("90 tokens\n"), "{first}");
    assert_ne!(first, run(&["--head", "1"]).succeeds().stdout);
    let wrong = run(&["--head", "2"]);
    assert_eq!(wrong.status, 1);
    assert!(wrong.stderr.contains("--head: expected a value head below HV = 2, got 2"), "{}", wrong.stderr);

    let mut keyless = model(20);
    keyless.remove("k");
    write(&file, &keyless);
    assert!(run(&[]).stderr.contains("k: missing; dla trace reads k"), "{}", run(&[]).stderr);
    let mut ragged = model(20);
    ragged.insert("v".to_owned(), Raw::f32s(&[0.5; 2 * 19 * 2 * 8], &[2, 19, 2, 8]));
    write(&file, &ragged);
    assert!(run(&[]).stderr.contains("v: expected [B,T,HV,dv] = [2, 20, HV, dv]"), "{}", run(&[]).stderr);
    let mut longer = model(20);
    longer.insert("text".to_owned(), Raw::new(Dtype::U8, &[1u8; 21], &[21]));
    write(&file, &longer);
    assert!(run(&[]).stderr.contains("text: expected shape [T] = [20], got [21]"), "{}", run(&[]).stderr);
    std::fs::write(&file, b"no tensors").unwrap();
    assert!(run(&[]).stderr.contains("expected a whole safetensors file"), "{}", run(&[]).stderr);
}

#[test]
fn wrong_input_is_one_line_and_no_page() {
    let scratch = Scratch::new();
    let says = |(ran, page): (support::Ran, PathBuf), part: &str| {
        assert_eq!(ran.status, 1);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(part), "{}", ran.stderr);
        assert!(!page.exists());
    };
    says(trace(&scratch, "empty.txt", b"", &[]), "expected at least one byte, got an empty file");
    says(trace(&scratch, "a.txt", b"abc", &["--capacity", "0"]), "capacity: expected 1 to 64 slots, got 0");
    says(trace(&scratch, "a.txt", b"abc", &["--tau", "NaN"]), "tau: expected a number, got NaN");
    let page = scratch.path("page.html");
    let missing =
        dla(["trace".as_ref(), scratch.path("none.txt").as_os_str(), "-o".as_ref(), page.as_os_str()]);
    says((missing, page), "none.txt: cannot be read");
}

/// Text that would break out of a page, or is no text at all.
fn hostile() -> Vec<u8> {
    let mut text =
        b"</script><script>parent.broken = 1</script> <b onclick=\"x\">&amp; {{data}} \0\x01\x7f\r\n\t"
            .to_vec();
    text.extend("déjà vu — 状態 🦀🦀 ".as_bytes());
    text.extend([0xff, 0xfe, 0xc3, b' ', 0xf0, 0x9f, b' ', 0xe2, 0x82]);
    text.extend(b"plain words at the end of it, and some more of them, so that slots are opened ".repeat(4));
    text
}

/// What a person should read of it: a glyph for every byte that is no text.
fn hostile_shown() -> String {
    let mut shown =
        "</script><script>parent.broken = 1</script> <b onclick=\"x\">&amp; {{data}} ␀␁␡\n\t".to_owned();
    shown.push_str("déjà vu — 状態 🦀🦀 \u{fffd}\u{fffd}\u{fffd} \u{fffd}\u{fffd} \u{fffd}\u{fffd}");
    shown.push_str(
        &"plain words at the end of it, and some more of them, so that slots are opened ".repeat(4),
    );
    shown
}

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("DLA_CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path =
        |name: &str| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    named.or_else(|| ["chromium", "chromium-browser", "google-chrome"].into_iter().find_map(on_path))
}

/// Opens the page in a frame `width` pixels wide and returns what the probe inside it tells.
fn probe(browser: &Path, scratch: &Scratch, page: &Path, width: u32, dark: bool) -> Value {
    let html = std::fs::read_to_string(page).unwrap();
    let watch = "<script>window.pageErrors = []; addEventListener('error', (e) => pageErrors.push(e.message)); \
        addEventListener('securitypolicyviolation', (e) => pageErrors.push(`blocked ${e.violatedDirective}`));</script>";
    let html = html.replacen("<style>", &format!("{watch}<style>"), 1);
    let end = html.rfind("</body>").unwrap();
    let probe = include_str!("trace_probe.js");
    let probed = scratch.path("probed.html");
    std::fs::write(&probed, format!("{}<script>{probe}</script>{}", &html[..end], &html[end..])).unwrap();
    let frame = scratch.path("frame.html");
    std::fs::write(
        &frame,
        format!(
            "<!doctype html><body><iframe src=\"probed.html\" width=\"{width}\" height=\"900\"></iframe><script>\
             addEventListener('message', (e) => document.body.dataset.result = e.data)</script>"
        ),
    )
    .unwrap();
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new(browser);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]);
    command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
    command.args(["--window-size=1600,1000", "--virtual-time-budget=8000", "--dump-dom"]);
    command.arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }));
    command.arg(format!("--user-data-dir={}", profile.path().display()));
    command.arg(format!("file://{}", frame.display()));
    let output = command.output().unwrap();
    let dom = String::from_utf8_lossy(&output.stdout);
    let from = dom.split_once("data-result=\"").unwrap_or_else(|| panic!("the page told nothing: {dom}")).1;
    let json = from.split_once('"').unwrap().0;
    let json =
        json.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u{a0}");
    serde_json::from_str(&json.replace("&amp;", "&")).unwrap()
}

fn assert_passes(result: &Value) {
    assert_eq!(result["errors"], serde_json::json!([]), "{result:#}");
    let checks = result["checks"].as_object().unwrap();
    assert!(checks.len() >= 13, "{result:#}");
    let failed: Vec<_> = checks.iter().filter(|(_, passed)| **passed != Value::Bool(true)).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn the_page_works_in_a_browser() {
    let Some(browser) = browser() else {
        println!("skipped: no chromium, chromium-browser or google-chrome on PATH, nor DLA_CHROMIUM");
        return;
    };
    let scratch = Scratch::new();
    let (ran, page) = trace(&scratch, "text.rs", &TEXT.as_bytes()[..3000], &["--merge", "mass"]);
    ran.succeeds();
    for (width, dark) in [(360, false), (1400, true), (1400, false), (360, true)] {
        let result = probe(&browser, &scratch, &page, width, dark);
        assert_passes(&result);
        assert_eq!((&result["width"], &result["dark"]), (&Value::from(width), &Value::from(dark)));
        assert_eq!(result["text"], TEXT[..3000]);
        assert_eq!((&result["spans"], &result["slots"]), (&Value::from(30), &Value::from(30)));
        assert_eq!(result["last"], 2999);
        assert!(result["pointed"].is_number(), "{result:#}");
    }

    let (ran, page) = trace(&scratch, "<b>&.txt", &hostile(), &["--merge", "density", "--capacity", "7"]);
    ran.succeeds();
    let result = probe(&browser, &scratch, &page, 800, false);
    assert_passes(&result);
    assert_eq!(result["text"], hostile_shown());
    assert_eq!(result["slots"], 7);

    // A model without text: stretches by their numbers.
    let file = scratch.path("model.safetensors");
    let mut wordless = model(300);
    wordless.remove("text");
    write(&file, &wordless);
    dla(["trace".as_ref(), file.as_os_str(), "-o".as_ref(), page.as_os_str()]).succeeds();
    let result = probe(&browser, &scratch, &page, 800, true);
    assert_passes(&result);
    assert!(result["text"].as_str().unwrap().contains('–'), "{result:#}");
}
