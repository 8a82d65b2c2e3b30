//! `dla bench`: what it prints, writes and draws; not how fast it is.

mod support;

use serde_json::Value;
use support::{Scratch, dla};

fn bench(scratch: &Scratch, options: &[&str]) -> (String, Value, String) {
    let (json, svg) = (scratch.path("b.json"), scratch.path("b.svg"));
    let fixed = ["bench", "--shape", "1,130,1,2,8,8", "--repeats", "1", "--capacity", "4"];
    let files: [&std::ffi::OsStr; 4] = ["--json".as_ref(), json.as_ref(), "--plot".as_ref(), svg.as_ref()];
    let args = fixed.iter().chain(options).map(|arg| arg.as_ref()).chain(files);
    let ran = dla(args).succeeds();
    assert_eq!(ran.stderr, "");
    let text = |path| std::fs::read_to_string(path).expect("written");
    (ran.stdout, serde_json::from_str(&text(&json)).expect("JSON"), text(&svg))
}

#[test]
fn reports_every_pass() {
    let scratch = Scratch::new();
    let (stdout, json, svg) = bench(&scratch, &["--device", "reference", "--recurrence", "delta"]);
    assert_eq!(json["device"], "reference");
    assert_eq!(json["shape"]["value_heads"], 2);
    assert_eq!((&json["recurrence"], &json["capacity"]), (&"delta".into(), &4.into()));
    assert_eq!(json["boundary_rate"]["measured"], 1.0, "independent tokens all open a slot");
    assert!(json["ceiling"]["matmul_gflop_s"].as_f64().expect("a number") > 0.0);
    assert!(json["threads"].as_u64().expect("a number") > 0);
    for pass in ["forward", "backward", "step"] {
        let rows = json["rows"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["pass"] == pass && row["stage"] == "all").expect(pass);
        for figure in ["ms", "gflop_s", "gb_s"] {
            assert!(row[figure].as_f64().expect("a number") > 0.0, "{pass} {figure}");
        }
        assert!(stdout.lines().any(|line| line.starts_with(pass)), "{stdout}");
    }
    assert!(svg.starts_with("<svg") && svg.contains("forward all") && svg.contains("backward all"));
    assert_eq!(scratch.files(), ["b.json", "b.svg"]);
}

#[test]
fn the_boundary_rate_is_measured() {
    let options = ["--device", "reference", "--boundary-rate", "0.1", "--read", "routed", "--dtype", "bf16"];
    let (_, json, _) = bench(&Scratch::new(), &options);
    let measured = json["boundary_rate"]["measured"].as_f64().expect("a number");
    assert!((0.02..0.3).contains(&measured), "{measured}");
    assert_eq!(json["boundary_rate"]["asked"], 0.1);
}

#[test]
fn refuses_what_it_cannot_draw() {
    let cases = [
        (["--shape", "1,64,2,3,8,8"], "--shape: expected HV a multiple of H = 2, got HV = 3"),
        (["--capacity", "65"], "--capacity: expected 1 to 64 slots, got 65"),
        (["--boundary-rate", "0"], "--boundary-rate: expected above 0 and at most 1, got 0"),
        (["--boundary-rate", "nan"], "--boundary-rate: expected above 0 and at most 1, got NaN"),
        (
            ["--shape", "1,99999999999,1,1,8,8"],
            "--shape: expected tensors of at most 2^33 elements, got [1, 99999999999, 1, 8]",
        ),
    ];
    for (option, expected) in cases {
        let ran = dla(["bench", "--device", "reference"].iter().chain(&option));
        assert_eq!((ran.status, ran.stderr), (1, format!("dla: error: {expected}\n")));
    }
}

#[test]
fn the_cpu_engine_tells_its_stages() {
    let (_, json, svg) = bench(&Scratch::new(), &["--read", "routed"]);
    assert_eq!(json["device"], "cpu");
    let rows = json["rows"].as_array().expect("rows");
    let ms = |pass: &str, stage: &str| {
        let row = rows.iter().find(|row| row["pass"] == pass && row["stage"] == stage);
        row.unwrap_or_else(|| panic!("{pass} {stage}"))["ms"].as_f64().expect("a number")
    };
    let stages: f64 = ["segment", "prepare", "route", "scan"].iter().map(|stage| ms("forward", stage)).sum();
    assert!((stages - ms("forward", "all")).abs() < 1e-6 * stages, "stages add up to the call");
    assert!(ms("backward", "scan") > 0.0 && svg.contains("forward scan"));
}

#[test]
fn decoding_is_timed_by_batch() {
    let scratch = Scratch::new();
    let json = scratch.path("d.json");
    let fixed =
        ["bench", "decode", "--device", "cpu", "--batch", "1,3", "--shape", "1,2,8,16", "--capacity", "4"];
    let more = ["--repeats", "2", "--tokens", "2", "--recurrence", "delta", "--json"];
    let args = fixed.iter().chain(&more).map(|arg| std::ffi::OsStr::new(*arg)).chain([json.as_ref()]);
    let ran = dla(args).succeeds();
    assert_eq!(ran.stderr, "");
    let text = std::fs::read_to_string(&json).expect("written");
    let report: Value = serde_json::from_str(&text).expect("JSON");
    let rows = report["bench"].as_array().expect("rows");
    assert_eq!(rows.iter().map(|row| row["size"].as_str()).collect::<Vec<_>>(), [Some("B=1"), Some("B=3")]);
    for row in rows {
        assert_eq!((&row["pass"], &row["boundary_rate"]), (&"step".into(), &1.0.into()));
        assert!(row["ms"].as_f64().expect("a number") > 0.0 && row["gb_s"].as_f64().expect("a number") > 0.0);
    }
    // Two heads of keys and values, bf16.
    assert_eq!(report["memory"]["softmax_8k"], 8192 * 2 * (8 + 16) * 2);
    assert!(ran.stdout.contains("B=3"), "{}", ran.stdout);
}

#[test]
fn decoding_refuses_what_it_cannot_do() {
    for (option, expected) in [
        (["--tokens", "9"], "--tokens: expected 1 to 8, got 9"),
        (["--batch", "1,0"], "--batch: expected at least 1, got 0"),
        (["--capacity", "0"], "--capacity: expected 1 to 64 slots, got 0"),
        (["--device", "reference"], "--device: expected cpu, cuda or auto, got reference"),
        (["--batch", "99999999"], "--shape: expected states [B,HV,M,dk,dv] of at most 2^33 elements"),
    ] {
        let cpu: &[&str] = if option[0] == "--device" { &[] } else { &["--device", "cpu"] };
        let args = ["bench", "decode"].iter().chain(cpu).chain(&option).map(|arg| std::ffi::OsStr::new(*arg));
        let ran = dla(args);
        assert_eq!(ran.status, 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}; expected {expected}", ran.stderr);
    }
}

#[test]
fn a_sweep_goes_over_one_extent() {
    for (sweep, values, device) in [
        ("T", "20,70", "cpu"),
        ("M", "1,3", "cpu"),
        ("rate", "0.05,1", "cpu"),
        ("heads", "8,24", "reference"),
    ] {
        let (stdout, json, svg) =
            bench(&Scratch::new(), &["--device", device, "--sweep", sweep, "--values", values]);
        assert_eq!((&json["sweep"], &json["device"]), (&sweep.into(), &device.into()));
        let points = json["points"].as_array().expect("points");
        let expected: Vec<f64> = values.split(',').map(|x| x.parse().expect("a number")).collect();
        for pass in ["forward", "backward"] {
            let of = points.iter().filter(|p| p["pass"] == pass && p["stage"] == "all");
            let all: Vec<&Value> = of.collect();
            let number = |p: &Value, name: &str| p[name].as_f64().expect("a number");
            assert_eq!(all.iter().map(|p| number(p, "value")).collect::<Vec<_>>(), expected);
            for p in &all {
                assert!(number(p, "ms") > 0.0 && number(p, "floor_ms") > 0.0, "{p}");
                let tokens = if sweep == "T" { number(p, "value") } else { 130.0 };
                // Two value heads.
                let million_a_second = 2.0 * tokens / number(p, "ms") * 1e-3;
                assert!((number(p, "million_token_heads_s") / million_a_second - 1.0).abs() < 1e-9, "{p}");
            }
            match sweep {
                // One slot has no boundary but the first token.
                "M" => {
                    assert!(number(all[0], "boundary_rate") < 0.01);
                    assert_eq!(number(all[1], "boundary_rate"), 1.0);
                }
                "rate" => assert!(number(all[0], "boundary_rate") < 0.5),
                // More tokens, or wider heads, are more work.
                _ => assert!(number(all[0], "floor_ms") < number(all[1], "floor_ms")),
            }
        }
        assert!(stdout.contains("M token-heads/s"), "{stdout}");
        for drawn in ["forward", "backward", "floor", "polyline"] {
            assert!(svg.contains(drawn), "{sweep}: {drawn}");
        }
    }
}

/// A PNG's width, height and pixels, three bytes each.
fn pixels(path: &std::path::Path) -> (u32, u32, Vec<u8>) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("written"));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let mut bytes = vec![0; reader.output_buffer_size().expect("a size")];
    let info = reader.next_frame(&mut bytes).expect("a whole PNG");
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    bytes.truncate(info.buffer_size());
    (info.width, info.height, bytes)
}

#[test]
fn a_plot_is_a_png_where_its_name_says_so() {
    let scratch = Scratch::new();
    let fixed = ["bench", "--device", "cpu", "--shape", "1,70,1,1,8,8", "--repeats", "1"];
    for (name, options) in [("bars.png", &[][..]), ("sweep.PNG", &["--sweep", "T", "--values", "20,70"])] {
        let path = scratch.path(name);
        let plot: [&std::ffi::OsStr; 2] = ["--plot".as_ref(), path.as_ref()];
        dla(fixed.iter().chain(options).map(|arg| arg.as_ref()).chain(plot)).succeeds();
        let (width, height, pixels) = pixels(&path);
        let (width, top) = (width as usize, if name == "bars.png" { 32 } else { 26 });
        assert!(width >= 900 && height > 100, "{name}: {width} x {height}");
        assert_eq!(pixels[pixels.len() - 3..], [255; 3], "{name}: the last corner is white");
        // The title stands alone at the top: it is drawn, with no font but the program's own.
        let dark = pixels[..3 * width * top].chunks(3).filter(|pixel| pixel.iter().all(|x| *x < 96)).count();
        assert!(dark > 100, "{name}: {dark} dark pixels in the title");
        let colored = |color: [u8; 3]| pixels.chunks(3).filter(|pixel| **pixel == color).count();
        let blue = colored([38, 110, 180]);
        assert!(blue > 20, "{name}: {blue} pixels of a forward");
    }
}

#[test]
fn a_sweep_refuses_what_it_cannot_do() {
    for (options, status, expected) in [
        (["--sweep", "rate", "--values", "2"], 1, "--values: expected above 0 and at most 1, got 2"),
        (["--sweep", "M", "--values", "65"], 1, "--values: expected whole numbers from 1 to 64, got 65"),
        (["--sweep", "T", "--values", "1.5"], 1, "--values: expected whole numbers from 1 to"),
        (["--sweep", "heads", "--values", "0"], 1, "--values: expected whole numbers from 1 to"),
        (["--sweep", "T", "--size", "S1"], 2, "cannot be used with"),
        (["--values", "3", "--repeats", "1"], 2, "--sweep"),
    ] {
        let ran = dla(["bench", "--device", "cpu"].iter().chain(&options));
        assert_eq!(ran.status, status, "{options:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}; expected {expected}", ran.stderr);
    }
}
