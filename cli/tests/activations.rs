//! What a trained model feeds the operator, over real text: tests/data/activations.safetensors, as `recall.py --activations` writes it
//! (q k v g lambda do text; mass, M = 30, tau = 0.6). While that file is missing only a made-up one of the same layout is tested.

mod support;

use std::path::{Path, PathBuf};

use dla::check::Recipe;
use dla::{Dtype, Options, Read};
use support::{File, Raw, Scratch, dla, read, relative_error, with_gradients, write};

/// The fixture, or a sentence.
fn fixture() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/activations.safetensors");
    if !path.exists() {
        println!("skipped: {} has not been written: recall.py --activations", path.display());
        return None;
    }
    Some(path)
}

/// The layout, from a drawn case.
fn made_up(tokens: usize) -> File {
    let options = Options { read: Read::Given, qk_l2norm: true, ..Options::default() };
    let recipe = Recipe {
        options,
        time: tokens,
        heads: 2,
        value_heads: 2,
        dk: 32,
        dv: 32,
        dtype: Dtype::Bf16,
        boundary_rate: 0.8,
        ..Recipe::default()
    };
    let mut file = with_gradients(&recipe.draw(7));
    let text: Vec<u8> = b"def f(x):\n    return x\n".iter().copied().cycle().take(tokens).collect();
    file.insert("text".to_owned(), Raw::u8s(&text, &[tokens]));
    file
}

/// The same numbers as f32, so that results are not rounded to bf16.
fn widened(raw: &Raw) -> Raw {
    assert_eq!(raw.dtype, safetensors::Dtype::BF16);
    let bits = raw.bytes.chunks_exact(2).map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16);
    Raw::f32s(&bits.map(f32::from_bits).collect::<Vec<_>>(), &raw.shape)
}

/// The CPU's engine gives what the definition gives, forward and every gradient.
fn agrees_with_the_reference(mut file: File) {
    let tokens = file["q"].shape[1];
    let text = file.remove("text").expect("the text behind the tokens");
    assert_eq!(text.shape, [tokens]);
    for name in ["q", "k", "v", "do"] {
        let wide = widened(&file[name]);
        file.insert(name.to_owned(), wide);
    }
    let scratch = Scratch::new();
    let options = ["--merge", "mass", "--qk-l2norm"];
    let run = |file: &File, device: &str| {
        let (input, output) = (scratch.path("in.safetensors"), scratch.path("out.safetensors"));
        write(&input, file);
        let fixed = ["run".as_ref(), input.as_os_str(), "-o".as_ref(), output.as_os_str()];
        let more = ["--device", device].into_iter().chain(options).map(AsRef::as_ref);
        dla(fixed.into_iter().chain(more)).succeeds();
        read(&output)
    };
    let expected = run(&file, "reference");
    let free = run(&file, "cpu");
    let (drift, own) = (expected["drift"].to_f32s(), free["drift"].to_f32s());
    let worst = drift.iter().zip(&own).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{tokens} tokens, drift off by {worst:.1e} at most");
    assert!(worst < 1e-4);
    // A boundary may differ only where the drift lies within rounding of tau: the log is then another's.
    let first = expected["events"].bytes.iter().zip(&free["events"].bytes).position(|(a, b)| a != b);
    if let Some(at) = first {
        assert!((drift[at] - 0.6).abs() < 1e-4, "event {at} differs at drift {}", drift[at]);
    }
    file.insert("events".to_owned(), expected["events"].clone());
    let replayed = run(&file, "cpu");
    for name in ["o", "dq", "dk", "dv", "dg", "dlambda", "cache_states"] {
        let error = relative_error(&replayed[name], &expected[name]);
        println!("{name}: {error:.1e}");
        assert!(error < 1e-5, "{name}: {error:e}");
    }
    let opened = expected["events"].bytes.iter().filter(|&&event| event != 0).count();
    println!("{:.1}% of the tokens open a slot", 100.0 * opened as f64 / drift.len() as f64);
    assert!(opened > 2);
}

/// The page shows the text that the model read.
fn is_traced(path: &Path) {
    let tokens = read(path)["text"].shape[0];
    let scratch = Scratch::new();
    for head in ["0", "1"] {
        let page = scratch.path("page.html");
        let args = ["trace".as_ref(), path.as_os_str(), "-o".as_ref(), page.as_os_str()];
        let more = ["--merge", "mass", "--head", head].map(AsRef::as_ref);
        let ran = dla(args.into_iter().chain(more)).succeeds();
        assert!(ran.stdout.contains(&format!("{tokens} tokens\n")), "{}", ran.stdout);
        let lines: Vec<&str> = ran.stdout.lines().collect();
        let slots = &lines[2..lines.len() - 1];
        let count = |line: &&str| line.split_whitespace().nth(2).unwrap().parse::<usize>().unwrap();
        assert_eq!(slots.iter().map(count).sum::<usize>(), tokens, "{}", ran.stdout);
        // An excerpt stands where there is text; else a line would name its tokens.
        assert!(slots.iter().all(|line| !line.contains(" tokens ")), "{}", ran.stdout);
        assert!(std::fs::read_to_string(page).expect("written").starts_with("<!doctype html>"));
    }
}

#[test]
fn the_layout_is_run_and_traced() {
    agrees_with_the_reference(made_up(200));
    let scratch = Scratch::new();
    let path = scratch.path("made-up.safetensors");
    write(&path, &made_up(200));
    is_traced(&path);
}

#[test]
fn a_trained_models_activations_are_computed_as_defined() {
    if let Some(path) = fixture() {
        let bytes = std::fs::metadata(&path).expect("there").len();
        assert!(bytes < 8 << 20, "{bytes} bytes: expected a small file");
        agrees_with_the_reference(read(&path));
    }
}

#[test]
fn a_trained_models_memory_is_drawn_over_its_text() {
    if let Some(path) = fixture() {
        is_traced(&path);
    }
}
