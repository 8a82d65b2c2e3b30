//! Wrong input: an error of one line that names the argument, what was expected and what came, and no
//! file that was not there before.

mod support;

use safetensors::Dtype;
use support::{File, Ran, Raw, Scratch, arguments, dla, small, with_gradients, write};

/// B,T,H,HV,dk,dv of [`small`].
const B: usize = 2;
const T: usize = 9;
const HV: usize = 2;
const M3: [&str; 2] = ["--capacity", "3"];

#[track_caller]
fn one_line(ran: &Ran, expected: &str) {
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    assert_eq!(ran.stderr, format!("dla: error: {expected}\n"));
}

/// The run fails with this text, IN being the input's path, and leaves no file.
#[track_caller]
fn fails_as(file: &File, options: &[&str], expected: &str) {
    let scratch = Scratch::new();
    let ran = scratch.run(file, options);
    let input = scratch.path("in.safetensors");
    one_line(&ran, &expected.replace("IN", &input.display().to_string()));
    assert_eq!(scratch.files(), ["in.safetensors"]);

    // What was there stays, to the byte.
    std::fs::write(scratch.path("out.safetensors"), "before").expect("scratch");
    assert_eq!(scratch.run(file, options).status, 1);
    assert_eq!(std::fs::read(scratch.path("out.safetensors")).expect("there"), b"before");
    assert_eq!(scratch.files(), ["in.safetensors", "out.safetensors"]);
}

/// [`fails_as`] with one tensor of a good file replaced, or taken away.
#[track_caller]
fn fails(name: &str, raw: Option<Raw>, options: &[&str], expected: &str) {
    let mut file = with_gradients(&small().draw(1));
    match raw {
        Some(raw) => file.insert(name.to_owned(), raw),
        None => file.remove(name),
    };
    fails_as(&file, &[&M3, options].concat(), expected);
}

fn zeros(shape: &[usize]) -> Raw {
    Raw::f32s(&vec![0.0; shape.iter().product()], shape)
}

#[test]
fn missing_tensors() {
    fails("q", None, &[], "IN: q: missing; every run reads q, k and v");
    fails("v", None, &[], "IN: v: missing; every run reads q, k and v");
    fails(
        "lambda",
        None,
        &[],
        "IN: lambda: missing; --read given reads lambda [B,T,HV,M] (--read routed would not)",
    );
    fails(
        "beta",
        None,
        &["--recurrence", "delta"],
        "IN: beta: missing; --recurrence delta reads beta [B,T,HV] (--recurrence gated would not)",
    );
    fails(
        "route_slope",
        None,
        &["--read", "routed"],
        "IN: route_slope: missing; --read routed reads route_slope and route_bias [HV] (--read given would not)",
    );
    fails(
        "route_slope",
        Some(zeros(&[HV])),
        &["--read", "routed"],
        "IN: route_bias: missing; --read routed reads route_slope and route_bias [HV] (--read given would not)",
    );
}

#[test]
fn ranks_and_shapes() {
    fails("q", Some(zeros(&[B, T, 4])), &[], "IN: q: expected shape rank 4, [B,T,H,dk], got [2, 9, 4]");
    fails("v", Some(zeros(&[B, T, 6])), &[], "IN: v: expected shape [B,T,HV,dv] of rank 4, got [2, 9, 6]");
    fails(
        "k",
        Some(zeros(&[B, T, 1, 5])),
        &[],
        "IN: k: expected shape [B,T,H,dk] = [2, 9, 1, 4], got [2, 9, 1, 5]",
    );
    fails("g", Some(zeros(&[B, T])), &[], "IN: g: expected shape [B,T,HV] = [2, 9, 2], got [2, 9]");
    fails(
        "beta",
        Some(zeros(&[B, T, 3])),
        &["--recurrence", "delta"],
        "IN: beta: expected shape [B,T,HV] = [2, 9, 2], got [2, 9, 3]",
    );
    fails(
        "do",
        Some(zeros(&[B, T, HV, 4])),
        &[],
        "IN: do: expected shape [B,T,HV,dv] = [2, 9, 2, 3], got [2, 9, 2, 4]",
    );
    fails(
        "events",
        Some(Raw::u8s(&[1; B * T], &[B, T])),
        &[],
        "IN: events: expected shape [B,T,HV] = [2, 9, 2], got [2, 9]",
    );
    fails(
        "dcache_states",
        Some(zeros(&[B, HV, 2, 4, 3])),
        &[],
        "IN: dcache_states: expected shape [N,HV,M,dk,dv] = [2, 2, 3, 4, 3], got [2, 2, 2, 4, 3]",
    );
}

#[test]
fn value_heads_that_no_multiple_of_key_heads() {
    let mut file = arguments(&small().draw(1));
    file.insert("q".to_owned(), zeros(&[B, T, 2, 4]));
    file.insert("k".to_owned(), zeros(&[B, T, 2, 4]));
    file.insert("v".to_owned(), zeros(&[B, T, 3, 3]));
    fails_as(
        &file,
        &M3,
        "IN: v: expected shape [B,T,HV,dv] with dv >= 1 and HV a multiple of H = 2, got [2, 9, 3, 3]",
    );
}

#[test]
fn extents_that_no_memory_holds() {
    let mut file = arguments(&small().draw(1));
    let huge = 1 << 40;
    for name in ["q", "k", "v"] {
        file.insert(name.to_owned(), zeros(&[1, 0, 1, huge]));
    }
    fails_as(
        &file,
        &M3,
        "IN: v: expected states [N,HV,M,dk,dv] of at most 2^33 elements, got [1, 1, 3, 1099511627776, 1099511627776]",
    );
}

#[test]
fn lambda_with_too_few_columns() {
    fails(
        "lambda",
        Some(zeros(&[B, T, HV, 2])),
        &[],
        "IN: lambda: expected shape [B,T,HV,M] = [2, 9, 2, 3], M or more, got [2, 9, 2, 2]; M is that of --capacity",
    );
}

#[test]
fn dtypes() {
    let bytes = |dtype, shape: &[usize], size: usize| {
        let elements: usize = shape.iter().product();
        Raw { dtype, shape: shape.to_vec(), bytes: vec![0; elements * size] }
    };
    let q = [B, T, 1, 4];
    fails("q", Some(bytes(Dtype::F64, &q, 8)), &[], "IN: q: expected dtype F32, BF16 or F16, got F64");
    fails("k", Some(bytes(Dtype::BF16, &q, 2)), &[], "IN: k: expected dtype f32, as q, got bf16");
    fails("g", Some(bytes(Dtype::F16, &[B, T, HV], 2)), &[], "IN: g: expected dtype f32, got f16");
    fails("do", Some(bytes(Dtype::F16, &[B, T, HV, 3], 2)), &[], "IN: do: expected dtype f32, as q, got f16");
    fails("events", Some(bytes(Dtype::I8, &[B, T, HV], 1)), &[], "IN: events: expected dtype U8, got I8");
    fails(
        "cu_seqlens",
        Some(bytes(Dtype::U64, &[2], 8)),
        &[],
        "IN: cu_seqlens: expected dtype I64, I32 or U32, got U64",
    );
}

#[test]
fn decays_that_grow_or_are_none() {
    for (value, text) in [(0.5, "0.5"), (f32::NAN, "NaN")] {
        let mut g = vec![-0.1; B * T * HV];
        g[7] = value;
        fails(
            "g",
            Some(Raw::f32s(&g, &[B, T, HV])),
            &[],
            &format!(
                "IN: g: expected at most 0 everywhere, got {text} at element 7; g is the logarithm of a decay"
            ),
        );
    }
}

#[test]
fn options_out_of_range() {
    let file = arguments(&small().draw(1));
    for given in ["0", "65", "18446744073709551615"] {
        let expected = format!("--capacity: expected 1 to 64 slots, got {given}");
        fails_as(&file, &["--capacity", given], &expected);
    }
    fails("", None, &["--tau", "nan"], "--tau: expected a number, got NaN");
    fails(
        "",
        None,
        &["--tau", "0.6,0.6,0.6"],
        "--tau: expected one threshold per value head (HV = 2), got 3",
    );
    fails("", None, &["--scale", "inf"], "--scale: expected a finite number, got inf");
    fails("", None, &["--temperature", "0"], "--temperature: expected a finite number above 0, got 0");
    fails("", None, &["--temperature", "-1"], "--temperature: expected a finite number above 0, got -1");
}

#[test]
fn packed_offsets() {
    let packed = |offsets: &[i64]| {
        let mut file = arguments(&dla::check::Recipe { batch: 1, ..small() }.draw(1));
        file.insert("cu_seqlens".to_owned(), Raw::new(Dtype::I64, offsets, &[offsets.len()]));
        file
    };
    let cases: [(&[i64], &str); 5] = [
        (&[1, 9], "expected 0, got 1 at element 0"),
        (&[0, 5, 4, 9], "expected at least 5, the offset before, got 4 at element 2"),
        (&[0, 5], "expected T = 9, got 5 at element 1"),
        (&[0, -5, 9], "expected at least 0, the offset before, got -5 at element 1"),
        (&[], "expected shape [N+1], N + 1 >= 1, got [0]"),
    ];
    for (offsets, expected) in cases {
        fails_as(&packed(offsets), &M3, &format!("IN: cu_seqlens: {expected}"));
    }
    let mut file = packed(&[0, 9]);
    file.insert("cu_seqlens".to_owned(), Raw::new(Dtype::I64, &[0i64, 9], &[1, 2]));
    fails_as(&file, &M3, "IN: cu_seqlens: expected shape [N+1], got [1, 2]");
    fails(
        "cu_seqlens",
        Some(Raw::new(Dtype::I64, &[0i64, 9], &[2])),
        &[],
        "IN: cu_seqlens: not expected; packed sequences take B = 1",
    );
}

#[test]
fn logs_that_cannot_happen() {
    let log = |change: &[(usize, u8)]| {
        // Every head of every batch entry opens one slot and extends it.
        let mut log: Vec<u8> = (0..B * T * HV).map(|i| u8::from((i / HV).is_multiple_of(T))).collect();
        change.iter().for_each(|&(at, event)| log[at] = event);
        Some(Raw::u8s(&log, &[B, T, HV]))
    };
    let at = |batch: usize, token: usize, head: usize| (batch * T + token) * HV + head;
    let cases: [(&[(usize, u8)], &str); 4] = [
        (
            &[(at(1, 4, 1), 2)],
            "expected 0 or 1 for batch entry 1, token 4, value head 1, where 1 slots are held, got 2",
        ),
        (
            &[(at(0, 1, 0), 1), (at(0, 2, 0), 9)],
            "expected 0 or 1 or 2 to 2 for batch entry 0, token 2, value head 0, where 2 slots are held, got 9",
        ),
        (
            &[(at(0, 1, 0), 1), (at(0, 2, 0), 1), (at(0, 3, 0), 1)],
            "expected 0 or 2 to 3 for batch entry 0, token 3, value head 0, where 3 slots are held, got 1",
        ),
        (
            &[(at(0, 0, 1), 0)],
            "expected 1 for batch entry 0, token 0, value head 1, where 0 slots are held, got 0",
        ),
    ];
    for (change, expected) in cases {
        let expected = format!("IN: events: {expected}; without events in the file they are computed");
        fails("events", log(change), &[], &expected);
    }
}

#[test]
fn caches() {
    let mut recipe = small();
    recipe.resumed = true;
    let file = arguments(&recipe.draw(1));
    let changed = |name: &str, raw: Option<Raw>| {
        let mut file = file.clone();
        match raw {
            Some(raw) => file.insert(name.to_owned(), raw),
            None => file.remove(name),
        };
        file
    };
    fails_as(
        &changed("cache_len", None),
        &M3,
        "IN: cache_len: missing; cache_states is there, and a run resumes from all of cache_states cache_len cache_tokens cache_drift cache_open",
    );
    fails_as(
        &changed("cache_tokens", Some(Raw::u32s(&[1; 4], &[2, 2]))),
        &M3,
        "IN: cache_tokens: expected shape [N,HV,M] = [2, 2, 3], got [2, 2]",
    );
    fails_as(
        &changed("cache_drift", Some(zeros(&[2, 2, 3]))),
        &M3,
        "IN: cache_drift: expected dtype U32, got F32",
    );
    fails_as(
        &changed("cache_states", Some(zeros(&[2, 2, 3, 4]))),
        &M3,
        "IN: cache_states: expected shape [N,HV,M,dk,dv] of rank 5, got [2, 2, 3, 4]",
    );
    fails_as(
        &changed("cache_len", Some(Raw::u32s(&[4; 4], &[2, 2]))),
        &M3,
        "IN: cache_len: expected at most the capacity everywhere, got 4 at element 0",
    );
    // A cache of three slots for a run of two.
    fails_as(
        &file,
        &["--capacity", "2"],
        "IN: cache_states: expected shape [N,HV,M,dk,dv] = [2,2,2,4,3], got [N,HV,M,dk,dv] = [2,2,3,4,3]; M is that of --capacity, for both runs the same",
    );
    let mut routed = file.clone();
    routed.insert("route_slope".to_owned(), zeros(&[HV]));
    routed.insert("route_bias".to_owned(), zeros(&[HV]));
    routed.remove("lambda");
    fails_as(
        &routed,
        &["--capacity", "3", "--read", "routed"],
        "IN: cache_keys: missing; cache_states is there, and a run resumes from all of cache_states cache_len cache_tokens cache_drift cache_open cache_keys",
    );
}

#[test]
fn files_that_are_cut_short_or_of_another_kind() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in.safetensors"), scratch.path("out.safetensors"));
    let run = || {
        let args: [&std::ffi::OsStr; 4] = ["run".as_ref(), input.as_ref(), "-o".as_ref(), output.as_ref()];
        let ran = dla(args);
        assert_eq!(ran.status, 1);
        assert_eq!(ran.stderr.lines().count(), 1);
        assert!(!output.exists());
        ran.stderr
    };
    let shown = input.display();
    assert!(run().starts_with(&format!("dla: error: {shown}: cannot be read: ")));

    write(&input, &arguments(&small().draw(1)));
    let whole = std::fs::read(&input).expect("written");
    let cut = whole.len() - 5;
    std::fs::write(&input, &whole[..cut]).expect("scratch");
    let expected = format!(
        "dla: error: {shown}: expected a whole safetensors file, got {cut} bytes; its length is not what its header says: cut short, or with bytes left over"
    );
    assert!(run().starts_with(&expected));
    std::fs::write(&input, [&whole[..], b"more"].concat()).expect("scratch");
    assert!(run().contains("cut short, or with bytes left over"));

    for bytes in [&b""[..], b"short", b"\x80\x02}q\x00(X\x01\x00\x00\x00qU", &whole[..20], &[0xff; 64]] {
        std::fs::write(&input, bytes).expect("scratch");
        let expected = format!(
            "dla: error: {shown}: expected a whole safetensors file, got {} bytes; not a safetensors file",
            bytes.len()
        );
        assert!(run().starts_with(&expected));
    }
}

#[test]
fn outputs_that_cannot_be_written() {
    let scratch = Scratch::new();
    let input = scratch.path("in.safetensors");
    write(&input, &arguments(&small().draw(1)));
    let run = |output: &std::path::Path| {
        let args: [&std::ffi::OsStr; 8] = [
            "run".as_ref(),
            input.as_ref(),
            "-o".as_ref(),
            output.as_ref(),
            "--capacity".as_ref(),
            "3".as_ref(),
            "--device".as_ref(),
            "reference".as_ref(),
        ];
        dla(args)
    };
    let folder = scratch.path("folder");
    std::fs::create_dir(&folder).expect("scratch");
    one_line(
        &run(&folder),
        &format!(
            "{}: expected the path of a file, got something that is there and is none",
            folder.display()
        ),
    );
    let nowhere = scratch.path("nowhere/out.safetensors");
    let ran = run(&nowhere);
    assert_eq!(ran.status, 1);
    let expected = format!(
        "dla: error: {}: cannot write into {}: ",
        nowhere.display(),
        scratch.path("nowhere").display()
    );
    assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
    let kept = scratch.path("kept.safetensors");
    std::fs::write(&kept, "before").expect("scratch");
    let mut permissions = std::fs::metadata(&kept).expect("there").permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&kept, permissions).expect("scratch");
    one_line(
        &run(&kept),
        &format!("{}: expected a file that may be written, got a read-only one", kept.display()),
    );
    assert_eq!(scratch.files(), ["folder", "in.safetensors", "kept.safetensors"]);
}

#[test]
fn nothing_panics() {
    let mut recipe = small();
    (recipe.resumed, recipe.final_gradient, recipe.options.recurrence) =
        (true, true, dla::Recurrence::GatedDelta);
    let good = with_gradients(&recipe.draw(1));
    let scratch = Scratch::new();
    let run = |file: &File, what: &str| {
        let ran = scratch.run(file, &["--capacity", "3", "--recurrence", "delta", "--temperature", "0.1"]);
        assert!([0, 1].contains(&ran.status) && !ran.stderr.contains("panicked"), "{what}: {}", ran.stderr);
        ran.status
    };
    assert_eq!(run(&good, "as it is"), 0);
    for (name, raw) in &good {
        let rank = raw.shape.len();
        for axis in 0..rank {
            let with = |extent: usize, other: &dyn Fn(usize) -> usize| -> Vec<usize> {
                (0..rank).map(|i| if i == axis { extent } else { other(raw.shape[i]) }).collect()
            };
            let same = |extent: usize| extent;
            // A tensor without elements may say of its other extents what it likes.
            for shape in [with(0, &same), with(raw.shape[axis] + 1, &same), with(1 << 33, &|_| 0)] {
                let elements: usize = shape.iter().product();
                let size = raw.bytes.len() / raw.shape.iter().product::<usize>();
                let changed = Raw { dtype: raw.dtype, shape, bytes: vec![0; elements * size] };
                let what = format!("{name} {:?}", changed.shape);
                // Columns of lambda past M are allowed.
                let fits = name == "lambda" && changed.shape == with(4, &same) && axis == 3;
                let file = good.clone().into_iter().chain([(name.clone(), changed)]).collect();
                assert_eq!(run(&file, &what), i32::from(!fits), "{what}");
            }
        }
        for byte in [0xff, 0x7f] {
            let changed = Raw { bytes: vec![byte; raw.bytes.len()], ..raw.clone() };
            let file = good.clone().into_iter().chain([(name.clone(), changed)]).collect();
            run(&file, &format!("{name} of bytes {byte:#x}"));
        }
    }
    // No batch entry at all.
    let empty = good.iter().map(|(name, raw)| {
        let mut shape = raw.shape.clone();
        shape[0] = 0;
        (name.clone(), Raw { dtype: raw.dtype, shape, bytes: Vec::new() })
    });
    assert_eq!(run(&empty.collect(), "B = 0"), 0);
}

#[test]
fn without_a_gpu_the_reason_is_told() {
    let Err(error) = dla::cuda::available() else {
        println!("SKIPPED: there is a GPU");
        return;
    };
    let reason = error.to_string();
    assert!(reason.starts_with("device: "), "{reason}");
    for command in [&["run", "in", "-o", "out"][..], &["check"], &["bench"]] {
        let ran = dla(command.iter().chain(&["--device", "cuda"]));
        one_line(&ran, &reason);
    }
}

#[test]
fn wrong_usage_is_status_2() {
    let cases: [&[&str]; 8] = [
        &[],
        &["run"],
        &["run", "in"],
        &["run", "in", "-o", "out", "--recurrence", "rotary"],
        &["run", "in", "-o", "out", "--through-drift"],
        &["run", "in", "-o", "out", "--capacity", "-1"],
        &["check", "--cases", "0"],
        &["bench", "--shape", "1,2,3"],
    ];
    for args in cases {
        let ran = dla(args);
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{args:?}");
        assert!(!ran.stderr.is_empty());
    }
    for args in [&["--help"][..], &["run", "--help"], &["--version"]] {
        assert_eq!(dla(args).succeeds().stderr, "");
    }
}
