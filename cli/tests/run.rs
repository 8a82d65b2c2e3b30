//! `dla run`: every option and every tensor, against the library's own results.

mod support;

use dla::check::Recipe;
use dla::{Dtype, Merge, Options, Read, Recurrence, SlotOrder, Soft, Tau};
use support::{
    File, Raw, Scratch, arguments, dla, expected, names, read, relative_error, small, with_gradients, write,
};

/// Runs a case of the recipe with the options and compares every tensor with the library's, bit for bit.
#[track_caller]
fn same(recipe: Recipe, options: &[&str]) {
    let case = recipe.draw(11);
    let expected = expected(&case);
    let results = Scratch::new().results(&with_gradients(&case), options);
    assert_eq!(names(&results), names(&expected));
    for (name, raw) in &expected {
        assert!(&results[name] == raw, "{name} differs with {options:?}");
    }
}

fn with(options: Options) -> Recipe {
    Recipe { options: Options { capacity: 3, ..options }, ..small() }
}

#[test]
fn paper_defaults() {
    let recipe = Recipe { options: Options::default(), ..small() };
    same(recipe.clone(), &[]);
    same(recipe, &["--capacity", "30", "--tau", "0.6", "--merge", "density", "--read", "given"]);
}

#[test]
fn each_option_reaches_the_operator() {
    let default = Options::default;
    let m = ["--capacity", "3"];
    let cases: [(Options, &[&str]); 9] = [
        (default(), &[]),
        (Options { recurrence: Recurrence::GatedDelta, ..default() }, &["--recurrence", "delta"]),
        (Options { merge: Merge::Mass, ..default() }, &["--merge", "mass"]),
        (Options { slot_order: SlotOrder::NewestFirst, ..default() }, &["--slot-order", "newest"]),
        (Options { scale: Some(-0.25), ..default() }, &["--scale", "-0.25"]),
        (Options { qk_l2norm: true, ..default() }, &["--qk-l2norm"]),
        (Options { tau: Tau::PerCall(1.4), ..default() }, &["--tau", "1.4"]),
        (Options { tau: Tau::PerHead(vec![1.4, -1.0]), ..default() }, &["--tau", "1.4,-1"]),
        (Options { read: Read::Routed, ..default() }, &["--read", "routed"]),
    ];
    for (options, flags) in cases {
        same(with(options), &[&m, flags].concat());
    }
}

#[test]
fn capacity_one_and_the_most() {
    for capacity in [1, 64] {
        let options = Options { capacity, ..Options::default() };
        same(Recipe { options, ..small() }, &["--capacity", &capacity.to_string()]);
    }
}

#[test]
fn soft_boundaries() {
    for (through_drift, flag) in [(false, None), (true, Some("--through-drift"))] {
        let soft = Some(Soft { temperature: 0.2, through_drift });
        let flags: Vec<&str> = ["--capacity", "3", "--temperature", "0.2"].into_iter().chain(flag).collect();
        let recipe = Recipe { boundary_rate: 0.5, ..with(Options { soft, ..Options::default() }) };
        same(recipe.clone(), &flags);
        same(Recipe { resumed: true, final_gradient: true, ..recipe }, &flags);
    }
}

#[test]
fn optional_tensors() {
    let m = ["--capacity", "3"];
    same(Recipe { decay: None, ..small() }, &m);
    same(Recipe { extra_columns: 2, ..small() }, &m);
    same(Recipe { resumed: true, final_gradient: true, ..small() }, &m);
    let routed = Recipe { logits: true, ..with(Options { read: Read::Routed, ..Options::default() }) };
    let flags = [&m[..], &["--read", "routed"]].concat();
    same(routed.clone(), &flags);
    same(Recipe { resumed: true, final_gradient: true, extra_columns: 1, ..routed }, &flags);
}

#[test]
fn half_precision() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        same(Recipe { dtype, ..small() }, &["--capacity", "3"]);
        let delta = with(Options { recurrence: Recurrence::GatedDelta, ..Options::default() });
        same(Recipe { dtype, ..delta }, &["--capacity", "3", "--recurrence", "delta"]);
    }
}

#[test]
fn packed_sequences_with_offsets_of_any_whole_type() {
    let recipe = Recipe { batch: 1, packed: Some(vec![4, 0, 5]), ..small() };
    let case = recipe.draw(11);
    let expected = expected(&case);
    let offsets = case.cu_seqlens.clone().expect("packed");
    let i32s: Vec<i32> = offsets.iter().map(|&x| x as i32).collect();
    let u32s: Vec<u32> = offsets.iter().map(|&x| x as u32).collect();
    let of_each_type = [
        Raw::new(safetensors::Dtype::I64, &offsets, &[4]),
        Raw::new(safetensors::Dtype::I32, &i32s, &[4]),
        Raw::u32s(&u32s, &[4]),
    ];
    for raw in of_each_type {
        let mut file = with_gradients(&case);
        file.insert("cu_seqlens".to_owned(), raw);
        assert!(Scratch::new().results(&file, &["--capacity", "3"]) == expected);
    }
}

#[test]
fn without_do_there_are_no_gradients() {
    let results = Scratch::new().results(&arguments(&small().draw(1)), &["--capacity", "3"]);
    assert_eq!(
        names(&results),
        ["cache_drift", "cache_len", "cache_open", "cache_states", "cache_tokens", "drift", "events", "o"]
    );
}

#[test]
fn a_log_in_the_file_is_followed() {
    let case = small().draw(1);
    let mut file = arguments(&case);
    // Open, then extend for ever: one slot, which is not what the drift asks for.
    let (tokens, heads) = (9, 2);
    let log: Vec<u8> = (0..2 * tokens * heads).map(|i| u8::from(i / heads % tokens == 0)).collect();
    file.insert("events".to_owned(), Raw::u8s(&log, &[2, tokens, heads]));
    let results = Scratch::new().results(&file, &["--capacity", "3"]);
    assert_eq!(results["events"].bytes, log);
    assert_eq!(results["cache_len"], Raw::u32s(&[1; 4], &[2, 2]));
}

/// The tensors of a file from one token to another, with what has no tokens as it is.
fn tokens(file: &File, from: usize, to: usize) -> File {
    let cut = |(name, raw): (&String, &Raw)| {
        let whole =
            name.starts_with("cache") || name.starts_with("route_slope") || name.starts_with("route_bias");
        (name.clone(), if whole { raw.clone() } else { raw.tokens(from, to) })
    };
    file.iter().map(cut).collect()
}

#[test]
fn resuming_equals_one_long_run() {
    let routed = Options { read: Read::Routed, merge: Merge::Mass, ..Options::default() };
    let delta = Options { recurrence: Recurrence::GatedDelta, ..Options::default() };
    let cases: [(Options, &[&str]); 2] = [
        (delta, &["--capacity", "3", "--recurrence", "delta"]),
        (routed, &["--capacity", "3", "--read", "routed", "--merge", "mass"]),
    ];
    for (options, flags) in cases {
        let recipe = Recipe { batch: 1, time: 40, boundary_rate: 0.4, logits: true, ..with(options) };
        let file = with_gradients(&recipe.draw(5));
        let scratch = Scratch::new();
        let long = scratch.results(&file, flags);

        // Forward in two runs, the second from the first's cache; backward in two, the other way round.
        let (first, mut second) = (tokens(&file, 0, 17), tokens(&file, 17, 40));
        let cache = scratch.results(&first, flags);
        let of = |file: &File, prefix: &str| -> File {
            let chosen = file.iter().filter(|(name, _)| name.starts_with(prefix));
            chosen.map(|(name, raw)| (name.clone(), raw.clone())).collect()
        };
        second.extend(of(&cache, "cache_"));
        let second = scratch.results(&second, flags);
        let mut first = first;
        first.extend(of(&second, "dcache_"));
        let first = scratch.results(&first, flags);

        for (name, whole) in &long {
            if name.starts_with("cache") {
                if whole.dtype == safetensors::Dtype::U32 {
                    assert_eq!(&second[name], whole, "{name}");
                } else {
                    assert!(relative_error(&second[name], whole) < 1e-6, "{name}");
                }
            } else if name == "events" {
                assert_eq!(first[name], whole.tokens(0, 17));
                assert_eq!(second[name], whole.tokens(17, 40));
            } else if !name.starts_with("droute_slope") && !name.starts_with("droute_bias") {
                // The cache is rounded to f32 between the runs.
                assert!(relative_error(&first[name], &whole.tokens(0, 17)) < 1e-5, "{name}");
                assert!(relative_error(&second[name], &whole.tokens(17, 40)) < 1e-5, "{name}");
            }
        }
        assert!(long.contains_key("dk") && !long.contains_key("dcache_states"));
    }
}

#[test]
fn a_given_final_gradient_may_be_partial() {
    let recipe = Recipe { final_gradient: true, ..small() };
    let mut case = recipe.draw(11);
    let gradients = case.d_cache.as_mut().expect("asked for");
    gradients.open.fill(0.0);
    let expected = expected(&case);
    let mut file = with_gradients(&case);
    file.remove("dcache_open");
    assert!(Scratch::new().results(&file, &["--capacity", "3"]) == expected);
}

#[test]
fn the_output_may_be_the_input() {
    let case = small().draw(1);
    let scratch = Scratch::new();
    let path = scratch.path("both.safetensors");
    write(&path, &with_gradients(&case));
    let args = ["run", "--device", "reference", "--capacity", "3"].map(std::ffi::OsStr::new);
    dla(args.into_iter().chain([path.as_os_str(), "-o".as_ref(), path.as_os_str()])).succeeds();
    assert!(read(&path) == expected(&case));
    assert_eq!(scratch.files(), ["both.safetensors"]);
}

#[cfg(unix)]
#[test]
fn a_replaced_file_keeps_its_permissions_and_links() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let file = arguments(&small().draw(1));
    let mode = |name| std::fs::metadata(scratch.path(name)).expect("there").permissions().mode() & 0o777;

    std::fs::write(scratch.path("target"), "old").expect("scratch");
    std::fs::set_permissions(scratch.path("target"), PermissionsExt::from_mode(0o640)).expect("scratch");
    std::os::unix::fs::symlink("target", scratch.path("out.safetensors")).expect("scratch");
    let results = scratch.results(&file, &["--capacity", "3"]);
    assert!(std::fs::symlink_metadata(scratch.path("out.safetensors")).expect("there").is_symlink());
    assert!(read(&scratch.path("target")) == results);
    assert_eq!(mode("target"), 0o640);

    // A new file is as any other of this user, not for its owner alone.
    std::fs::remove_file(scratch.path("out.safetensors")).expect("scratch");
    scratch.results(&file, &["--capacity", "3"]);
    std::fs::write(scratch.path("other"), "").expect("scratch");
    assert_eq!(mode("out.safetensors"), mode("other"));
}

#[test]
fn what_is_not_read_is_noted_and_no_failure() {
    let case = small().draw(1);
    let [b, t, hv] = [2, 9, 2];
    let mut file = arguments(&case);
    file.insert("beta".to_owned(), Raw::f32s(&[0.5; 36], &[b, t, hv]));
    file.insert("route_slope".to_owned(), Raw::f32s(&[8.0; 2], &[hv]));
    file.insert("dcache_open".to_owned(), Raw::f32s(&[0.0; 4], &[4]));
    file.insert("weights".to_owned(), Raw::f32s(&[], &[0]));
    let scratch = Scratch::new();
    let ran = scratch.run(&file, &["--capacity", "3", "--temperature", "0.1"]).succeeds();
    let input = scratch.path("in.safetensors");
    let notes = [
        "--temperature changes only gradients, and the file holds no do".to_owned(),
        format!("{}: beta is not read: --recurrence gated has no write strength", input.display()),
        format!("{}: dcache_open is not read: the file holds no do", input.display()),
        format!("{}: route_slope is not read: --read given takes lambda", input.display()),
        format!("{}: weights is not read: no argument has this name", input.display()),
    ];
    assert_eq!(ran.stderr.lines().collect::<Vec<_>>(), notes.map(|note| format!("dla: note: {note}")));
    assert_eq!(ran.stdout, "");

    let quiet = scratch.run(&file, &["--capacity", "3", "--temperature", "0.1", "--quiet"]).succeeds();
    assert_eq!(quiet.stderr, "");

    let routed = Options { read: Read::Routed, ..Options::default() };
    let mut file = arguments(&with(routed).draw(1));
    file.insert("lambda".to_owned(), Raw::f32s(&[], &[0]));
    let ran = scratch.run(&file, &["--capacity", "3", "--read", "routed"]).succeeds();
    assert_eq!(
        ran.stderr,
        format!("dla: note: {}: lambda is not read: --read routed computes it\n", input.display())
    );
}

#[test]
fn the_cpu_engine_is_the_default() {
    let case = Recipe { time: 70, ..small() }.draw(2);
    let scratch = Scratch::new();
    let reference = scratch.results(&with_gradients(&case), &["--capacity", "3"]);
    let (input, output) = (scratch.path("in.safetensors"), scratch.path("out.safetensors"));
    let mut written = Vec::new();
    for device in ["auto", "cpu"] {
        let args = ["run", "--capacity", "3", "--device", device, "-o"].map(std::ffi::OsStr::new);
        dla(args.into_iter().chain([output.as_os_str(), input.as_os_str()])).succeeds();
        written.push(read(&output));
    }
    assert!(written[0] == written[1]);
    assert_eq!(names(&written[0]), names(&reference));
    for name in ["o", "dq", "dk", "dv", "dg", "dlambda", "cache_states"] {
        let error = relative_error(&written[0][name], &reference[name]);
        assert!(error > 0.0 && error < 1e-5, "{name}: {error:.1e}");
    }
}

#[test]
fn sequences_without_tokens() {
    let results = Scratch::new().results(
        &with_gradients(&Recipe { time: 0, resumed: true, ..small() }.draw(1)),
        &["--capacity", "3"],
    );
    assert_eq!(results["o"].shape, [2, 0, 2, 3]);
}
