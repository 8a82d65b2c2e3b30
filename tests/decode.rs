//! Decoding on entries, on every engine that has them: against the f64 reference over the whole sequence, with the
//! engine's own event log. On a GPU too where there is one; `DLA_CUDA=require` fails where there is none.
//! `DLA_CUDA_SMALL=1`: few small cases, for compute-sanitizer. `DLA_EVIDENCE`: folder that takes a JSON file a test.

use dla::check::{Recipe, relative_error};
use dla::cuda::{self, Call, Engine, Graph, Memory, RawInputs, RawOutputs};
use dla::reference::{self, Arguments};
use dla::{
    Buffer, Dtype, Engine as _, Entries as _, Error, Inputs, Merge, Options, Problem, Recurrence, Shape,
    StateDtype, Step, cpu,
};
use harness::*;
use proptest::prelude::*;
use std::sync::{Arc, OnceLock};

#[path = "decode/harness.rs"]
mod harness;

/// The first GPU; `None` where there is none.
fn engine() -> Option<Arc<Engine>> {
    static ENGINE: OnceLock<Option<Arc<Engine>>> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| match Engine::new(0) {
        Ok(engine) => Some(Arc::new(engine)),
        Err(error) => {
            assert!(std::env::var_os("DLA_CUDA").is_none_or(|value| value != "require"), "{error}");
            println!("SKIPPED on a GPU: {error}");
            None
        }
    });
    engine.clone()
}

fn makers() -> Vec<Maker> {
    let cpu = Maker {
        name: "cpu",
        states: &[StateDtype::F32],
        make: |spec| cpu::Entries::new(spec).map(|entries| Box::new(entries) as _),
    };
    let cuda = Maker {
        name: "cuda",
        states: &[StateDtype::F32, StateDtype::Bf16],
        make: |spec| {
            let engine = engine().ok_or(Error::NoDriver)?;
            cuda::Entries::new(engine, spec).map(|entries| Box::new(entries) as _)
        },
    };
    if engine().is_some() { vec![cpu, cuda] } else { vec![cpu] }
}

fn small() -> bool {
    std::env::var_os("DLA_CUDA_SMALL").is_some_and(|value| value == "1")
}

#[test]
fn every_kind() {
    for maker in makers() {
        every_kind_of_step(&maker, if small() { 12 } else { usize::MAX }, 90);
    }
}

/// A prefill, then as many single steps: the error does not grow. Without decay, too: slots are then rewritten with
/// all that they ever held.
#[test]
fn long_streams_stay_exact() {
    if small() {
        return;
    }
    for maker in makers() {
        let record = Record::of("long_streams_stay_exact", &maker);
        let long = if maker.name == "cpu" { 1024 } else { 4096 };
        for &states in maker.states {
            for recurrence in RECURRENCES {
                for (decay, merge) in
                    [(Some(0.1), Merge::Density), (None, Merge::Density), (None, Merge::Mass)]
                {
                    let recipe = Recipe {
                        options: Options { recurrence, merge, ..Options::default() },
                        time: 2 * long,
                        dk: 64,
                        dv: 64,
                        dtype: if maker.name == "cpu" { Dtype::F32 } else { Dtype::Bf16 },
                        decay,
                        ..Recipe::default()
                    };
                    check_stream(&maker, &recipe, states, &[long], 1, &record);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Joins, leaves, moves and any split into prefills and steps change nothing.
    #[test]
    fn joins_leaves_and_splits(
        recipe in drawn_recipe(),
        actions in prop::collection::vec(action(), 1..40),
        seed in 0u64..1000,
    ) {
        for maker in makers() {
            for &states in maker.states {
                run_actions(&maker, &recipe, states, &actions, seed);
            }
        }
    }
}

/// One prefix for several sequences: prefilled once, gone on from thrice.
#[test]
fn a_common_beginning() {
    for maker in makers() {
        let record = Record::of("a_common_beginning", &maker);
        for &states in maker.states {
            for recurrence in RECURRENCES {
                let options = Options { recurrence, capacity: 5, ..Options::default() };
                let recipe = Recipe { options, time: 60, ..Recipe::default() };
                let mut sequence = Sequence::draw(&recipe, 3..4);
                let mut cache = (maker.make)(spec_of(&recipe, 4, states)).unwrap();
                let entries: Vec<usize> = (0..4).map(|_| cache.take().unwrap()).collect();
                let mut rows = [(&mut sequence[0], entries[0])];
                advance(cache.as_mut(), &mut rows, 33, true).unwrap();
                let before = cache.export(&[entries[0]]).unwrap();
                let case = &rows[0].0.case;
                let batch = Batch::of(&[(case, 33..50), (case, 33..50), (case, 33..50)]);
                let problem = Problem::new(&recipe.options, batch.inputs()).unwrap();
                let step = cache.prefill(&problem, &[entries[0]; 3], &entries[1..]).unwrap();
                assert_eq!(cache.export(&[entries[0]]).unwrap(), before);
                for (row, &entry) in entries[1..].iter().enumerate() {
                    let mut gone_on = Sequence::draw(&recipe, 3..4).remove(0);
                    let first = &rows[0].0;
                    (gone_on.o, gone_on.drift) = (first.o.clone(), first.drift.clone());
                    (gone_on.events, gone_on.at) = (first.events.clone(), first.at);
                    gone_on.take(&step, row, 3);
                    advance(cache.as_mut(), &mut [(&mut gone_on, entry)], 8, false).unwrap();
                    let held = cache.export(&[entry]).unwrap();
                    gone_on.judge(&held, maker.bound(recipe.dtype, states), &record);
                }
            }
        }
    }
}

/// Every wrong argument is a typed error, and no entry is touched.
#[test]
fn wrong_calls_touch_nothing() {
    for maker in makers() {
        for &states in maker.states {
            let recipe = Recipe {
                options: Options { capacity: 3, ..Options::default() },
                time: 40,
                ..Recipe::default()
            };
            let mut sequences = Sequence::draw(&recipe, 1..3);
            let mut cache = (maker.make)(spec_of(&recipe, 3, states)).unwrap();
            let entries: Vec<usize> = (0..3).map(|_| cache.take().unwrap()).collect();
            assert_eq!(cache.take(), Err(Error::NoEntry { count: 3 }));
            cache.release(entries[2]).unwrap();
            let (a, b, freed) = (entries[0], entries[1], entries[2]);
            let mut rows: Vec<_> = sequences.iter_mut().zip([a, b]).collect();
            advance(cache.as_mut(), &mut rows, 20, true).unwrap();
            let before = cache.export(&[a, b]).unwrap();

            let (first, second) = (&sequences[0].case, &sequences[1].case);
            let batch = Batch::of(&[(first, 20..21), (second, 20..21)]);
            let problem = Problem::new(&recipe.options, batch.inputs()).unwrap();
            let entry = |name, expected, given, index| Error::Entry { name, expected, given, index };
            let twice = "an entry that no row before it has";
            let taken = "an entry that is taken";
            let there = "an entry of the cache";
            assert_eq!(cache.step(&problem, &[a, a]).unwrap_err(), entry("entries", twice, a, 1));
            assert_eq!(cache.step(&problem, &[freed, b]).unwrap_err(), entry("entries", taken, freed, 0));
            assert_eq!(cache.step(&problem, &[a, 3]).unwrap_err(), entry("entries", there, 3, 1));
            assert!(matches!(cache.step(&problem, &[a]), Err(Error::Shape { name: "entries", .. })));
            assert_eq!(cache.prefill(&problem, &[a, b], &[b, b]).unwrap_err(), entry("to", twice, b, 1));
            assert_eq!(
                cache.prefill(&problem, &[a, freed], &[a, b]).unwrap_err(),
                entry("from", taken, freed, 1)
            );
            assert!(matches!(cache.prefill(&problem, &[a, b], &[a]), Err(Error::Shape { name: "to", .. })));
            assert_eq!(cache.release(freed), Err(entry("entry", taken, freed, 0)));
            assert_eq!(cache.reset(9), Err(entry("entry", there, 9, 0)));
            assert_eq!(cache.copy(a, freed), Err(entry("to", taken, freed, 0)));
            assert_eq!(cache.export(&[freed]), Err(entry("entries", taken, freed, 0)));
            assert_eq!(cache.import(&[a, a], &before), Err(entry("entries", twice, a, 1)));
            assert!(matches!(cache.import(&[a], &before), Err(Error::Shape { name: "cache_states", .. })));

            // Another number of tokens, other options, other extents.
            let long = Batch::of(&[(first, 20..29), (second, 20..29)]);
            let problem = Problem::new(&recipe.options, long.inputs()).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Shape { name: "q", .. })));
            let none = Batch::of(&[(first, 20..20), (second, 20..20)]);
            let problem = Problem::new(&recipe.options, none.inputs()).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Shape { name: "q", .. })));
            let other = Recipe { dk: 24, ..recipe.clone() }.draw(1);
            let other = Batch::of(&[(&other, 0..1), (&other, 0..1)]);
            let problem = Problem::new(&recipe.options, other.inputs()).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Plan { name: "q", .. })));
            let options = Options { capacity: 2, ..recipe.options.clone() };
            let problem = Problem::new(&options, batch.inputs()).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Plan { name: "capacity", .. })));
            // A log that cannot happen there.
            let log = [250u8; 2];
            let inputs = Inputs { events: Some(&log), ..batch.inputs() };
            let problem = Problem::new(&recipe.options, inputs).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Event { given: 250, .. })));
            let inputs = Inputs { cache: Some(&before), ..batch.inputs() };
            let problem = Problem::new(&recipe.options, inputs).unwrap();
            assert!(matches!(cache.step(&problem, &[a, b]), Err(Error::Unexpected { name: "cache", .. })));

            assert_eq!(cache.export(&[a, b]).unwrap(), before);
        }
    }
}

/// The caller's own log is taken, byte for byte.
#[test]
fn own_log() {
    for maker in makers() {
        for &states in maker.states {
            for recurrence in RECURRENCES {
                let options = Options { recurrence, capacity: 4, ..Options::default() };
                let recipe = Recipe { options, time: 6, ..Recipe::default() };
                let case = recipe.draw(11);
                let mut cache = (maker.make)(spec_of(&recipe, 1, states)).unwrap();
                let entry = cache.take().unwrap();
                // A merge before all slots are held, two that meet in a slot, an open slot that merges.
                let log = [1, 1, 2, 1, 3, 0];
                let inputs = Inputs { events: Some(&log), ..case.inputs() };
                let problem = Problem::new(&recipe.options, inputs).unwrap();
                let step = cache.step(&problem, &[entry]).unwrap();
                assert_eq!(step.events, log);
                let expected = reference::forward(&problem, &Arguments::of(&problem), Some(&log), None);
                let (error, _) = relative_error(&step.o.to_f64(), &expected.o);
                assert!(error <= maker.bound(Dtype::F32, states), "o off by {error:.2e}");
                let held = cache.export(&[entry]).unwrap();
                let states_held: Vec<f64> = held.states.iter().map(|&x| x.into()).collect();
                let (error, _) = relative_error(&states_held, &expected.cache.states);
                assert!(error <= maker.bound(Dtype::F32, states), "cache_states off by {error:.2e}");
            }
        }
    }
}

/// Arrays of a step on the GPU, of `rows` rows of `time` tokens.
struct Arrays {
    memory: Vec<Memory>,
    inputs: RawInputs,
    outputs: RawOutputs,
}

impl Arrays {
    fn new(engine: &Engine, recipe: &Recipe, rows: usize, time: usize) -> Self {
        let Recipe { heads, value_heads, dk, dv, dtype, ref options, .. } = *recipe;
        let (tokens, element) = (rows * time, dtype.bytes());
        let mut memory = Vec::new();
        let mut room = |bytes: usize| {
            memory.push(engine.allocate(bytes).unwrap());
            engine.fill(&memory[memory.len() - 1], 0xff).unwrap();
            memory[memory.len() - 1].address()
        };
        let delta = options.recurrence == Recurrence::GatedDelta;
        let inputs = RawInputs {
            q: room(tokens * heads * dk * element),
            k: room(tokens * heads * dk * element),
            v: room(tokens * value_heads * dv * element),
            g: room(4 * tokens * value_heads),
            beta: room(4 * tokens * value_heads) * u64::from(delta),
            lambda: room(4 * tokens * value_heads * options.capacity),
            lambda_columns: options.capacity,
            tau: room(4 * value_heads),
            ..RawInputs::default()
        };
        let outputs = RawOutputs {
            o: room(tokens * value_heads * dv * element),
            drift: room(4 * tokens * value_heads),
            events: room(tokens * value_heads),
            ..RawOutputs::default()
        };
        let tau: Vec<f32> = (0..value_heads).map(|head| options.tau.of(head)).collect();
        engine.upload(&memory[6], 0, bytemuck::cast_slice(&tau)).unwrap();
        Arrays { memory, inputs, outputs }
    }

    fn upload(&self, engine: &Engine, batch: &Batch) {
        let bytes = |x: &Buffer| match x {
            Buffer::F32(x) => bytemuck::cast_slice::<_, u8>(x).to_vec(),
            Buffer::Bf16(x) => bytemuck::cast_slice::<_, u8>(x).to_vec(),
            Buffer::F16(x) => bytemuck::cast_slice::<_, u8>(x).to_vec(),
        };
        let [g, beta, lambda, _] = &batch.rest;
        let floats = |x: &Option<Vec<f32>>| x.as_ref().map(|x| bytemuck::cast_slice::<_, u8>(x).to_vec());
        let given =
            [Some(bytes(&batch.q)), Some(bytes(&batch.k)), Some(bytes(&batch.v)), floats(g), floats(beta)];
        for (memory, bytes) in self.memory.iter().zip(given.into_iter().chain([floats(lambda)])) {
            if let Some(bytes) = bytes {
                engine.upload(memory, 0, &bytes).unwrap();
            }
        }
    }

    /// The results of the first `rows` of `all` rows of one token.
    fn results(&self, engine: &Engine, recipe: &Recipe, rows: usize) -> Step {
        let per_token = rows * recipe.value_heads;
        let get = |index: usize, bytes: usize| {
            let mut to = vec![0u8; bytes];
            engine.download(&self.memory[index], 0, &mut to).unwrap();
            to
        };
        let o = get(7, per_token * recipe.dv * 2);
        Step {
            o: Buffer::Bf16(o.chunks_exact(2).map(bytemuck::pod_read_unaligned).collect()),
            drift: get(8, 4 * per_token).chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(),
            events: get(9, per_token),
            lambda: None,
        }
    }
}

/// One captured step serves sequences that join and leave between replays; rows at rest are not written.
#[test]
fn a_captured_step_serves_other_sequences() {
    if engine().is_none() {
        return;
    }
    // Its own stream: what other tests launch is not to be captured.
    let engine = Arc::new(Engine::new(0).unwrap());
    for maker in makers().into_iter().filter(|maker| maker.name == "cuda") {
        let record = Record::of("a_captured_step_serves_other_sequences", &maker);
        for &states in maker.states {
            for recurrence in RECURRENCES {
                let recipe = Recipe {
                    options: Options { recurrence, capacity: 6, ..Options::default() },
                    time: 64,
                    heads: 2,
                    value_heads: 4,
                    dk: 32,
                    dv: 64,
                    dtype: Dtype::Bf16,
                    ..Recipe::default()
                };
                let mut sequences = Sequence::draw(&recipe, 20..25);
                let mut cache = cuda::Entries::new(engine.clone(), spec_of(&recipe, 7, states)).unwrap();
                let entries: Vec<usize> = (0..5).map(|_| cache.take().unwrap()).collect();
                let shape = Shape {
                    batch: 4,
                    time: 1,
                    heads: 2,
                    value_heads: 4,
                    dk: 32,
                    dv: 64,
                    capacity: 6,
                    sequences: 4,
                };
                let plan = cache.plan(&recipe.options, &shape, Dtype::Bf16).unwrap();
                let arrays = Arrays::new(&engine, &recipe, 4, 1);
                let rows = cache.rows(4).unwrap();
                let mut graph = Graph::capture(&engine, || {
                    // SAFETY: every array is of the extents of `shape`.
                    unsafe { cache.launch(&plan, rows.address(), &arrays.inputs, &arrays.outputs) }
                })
                .unwrap();
                for round in 0..60 {
                    let who: Vec<usize> =
                        (0..5).filter(|i| (round * 7 + i * 5) % 9 < 5).take(round % 5).collect();
                    let who: Vec<usize> = who.into_iter().filter(|&i| sequences[i].left() > 0).collect();
                    let parts: Vec<_> = who
                        .iter()
                        .map(|&i| (&sequences[i].case, sequences[i].at..sequences[i].at + 1))
                        .collect();
                    engine.fill(&arrays.memory[7], 0xff).unwrap();
                    if !parts.is_empty() {
                        arrays.upload(&engine, &Batch::of(&parts));
                    }
                    let named: Vec<usize> = who.iter().map(|&i| entries[i]).collect();
                    cache.set_rows(&rows, &named).unwrap();
                    // SAFETY: no entry comes twice, as set_rows has checked.
                    unsafe { graph.replay(&engine) }.unwrap();
                    let mut all = vec![0u8; 4 * 4 * 64 * 2];
                    engine.download(&arrays.memory[7], 0, &mut all).unwrap();
                    assert!(all[who.len() * 4 * 64 * 2..].iter().all(|&byte| byte == 0xff), "a row at rest");
                    if !who.is_empty() {
                        let step = arrays.results(&engine, &recipe, who.len());
                        for (row, &i) in who.iter().enumerate() {
                            sequences[i].take(&step, row, who.len());
                        }
                    }
                }
                let twice = cache.set_rows(&rows, &[entries[0], entries[0]]);
                assert!(matches!(twice, Err(Error::Entry { index: 1, .. })));
                assert!(matches!(cache.set_rows(&rows, &[6]), Err(Error::Entry { given: 6, .. })));
                assert!(matches!(cache.set_rows(&rows, &[0, 1, 2, 3, 4]), Err(Error::Shape { .. })));
                for (sequence, &entry) in sequences.iter().zip(&entries) {
                    let held = cache.export(&[entry]).unwrap();
                    sequence.judge(&held, maker.bound(Dtype::Bf16, states), &record);
                }
            }
        }
    }
}

/// Wrong addresses are typed errors before any launch.
#[test]
fn wrong_addresses() {
    let Some(engine) = engine() else { return };
    let recipe = Recipe { dtype: Dtype::Bf16, ..Recipe::default() };
    let mut cache = cuda::Entries::new(engine.clone(), spec_of(&recipe, 2, StateDtype::F32)).unwrap();
    let entry = cache.take().unwrap();
    let shape =
        Shape { batch: 1, time: 1, heads: 1, value_heads: 1, dk: 16, dv: 16, capacity: 30, sequences: 1 };
    let plan = cache.plan(&recipe.options, &shape, Dtype::Bf16).unwrap();
    let arrays = Arrays::new(&engine, &recipe, 1, 1);
    let rows = cache.rows(1).unwrap();
    let (inputs, outputs) = (arrays.inputs, arrays.outputs);
    let expect = |entries: u64, inputs: RawInputs, outputs: RawOutputs, text: &str| {
        // SAFETY: refused before anything is launched.
        let error = unsafe { cache.launch(&plan, entries, &inputs, &outputs) }.expect_err(text).to_string();
        assert!(error.contains(text), "{error}; expected {text}");
    };
    expect(0, inputs, outputs, "entries: missing");
    expect(rows.address() + 2, inputs, outputs, "entries: expected an address that is a multiple");
    expect(rows.address(), RawInputs { q: 0, ..inputs }, outputs, "q: missing");
    expect(rows.address(), RawInputs { lambda_columns: 3, ..inputs }, outputs, "lambda: expected shape");
    expect(rows.address(), inputs, RawOutputs { o: 0, ..outputs }, "o: missing");
    let host = [0f32; 64];
    let on_host = host.as_ptr() as u64 / 16 * 16;
    expect(rows.address(), RawInputs { v: on_host, ..inputs }, outputs, "v: expected an address of GPU 0");
    let wrong = cache.plan(&recipe.options, &Shape { dk: 32, ..shape }, Dtype::Bf16);
    assert!(matches!(wrong, Err(Error::Plan { name: "q", .. })));
    let wrong = cache.plan(&recipe.options, &Shape { time: 9, ..shape }, Dtype::Bf16);
    assert!(matches!(wrong, Err(Error::Shape { name: "q", .. })));
    let odd = spec_of(&Recipe { dk: 12, ..Recipe::default() }, 2, StateDtype::F32);
    assert!(matches!(
        cuda::Entries::new(engine.clone(), odd),
        Err(Error::HeadSize { name: "dk", given: 12 })
    ));
    let huge = spec_of(&Recipe { dk: 256, dv: 256, ..Recipe::default() }, 1 << 20, StateDtype::F32);
    assert!(matches!(cuda::Entries::new(engine.clone(), huge), Err(Error::OutOfMemory { .. })));
    assert_eq!(cache.export(&[entry]).unwrap().len, [0]);
}

/// A context of 1,000,000 tokens, in pieces, and steps after it: no more memory than a short one, and the last tokens
/// are what the definition makes of the cache before them.
#[test]
fn a_million_tokens() {
    let Some(engine) = engine() else { return };
    if small() {
        return;
    }
    let (piece, pieces) = (62_500, 16);
    let recipe = Recipe {
        time: piece,
        heads: 2,
        value_heads: 2,
        dk: 128,
        dv: 128,
        dtype: Dtype::Bf16,
        ..Recipe::default()
    };
    let case = recipe.draw(5);
    let maker = &makers()[1];
    let record = Record::of("a_million_tokens", maker);
    for &states in maker.states {
        let mut cache = cuda::Entries::new(engine.clone(), spec_of(&recipe, 1, states)).unwrap();
        let entry = cache.take().unwrap();
        let problem = case.problem().unwrap();
        let held_bytes = cache.plan_prefill(&Call::of(&problem)).unwrap().workspace_bytes();
        for _ in 0..pieces {
            cache.prefill(&problem, &[entry], &[entry]).unwrap();
        }
        let before = cache.export(&[entry]).unwrap();
        let tokens: u64 = before.tokens.iter().take(30).map(|&n| u64::from(n)).sum();
        assert_eq!(tokens, (piece * pieces) as u64);
        println!(
            "1,000,000 tokens: {} MB an entry, {} MB of workspace",
            cache.entry_bytes() >> 20,
            held_bytes >> 20
        );
        let mut sequence =
            Sequence { case: case.clone(), at: 0, o: vec![], drift: vec![], events: vec![], lambda: vec![] };
        for _ in 0..64 {
            advance(&mut cache, &mut [(&mut sequence, entry)], 1, false).unwrap();
        }
        let batch = Batch::of(&[(&case, 0..64)]);
        let inputs = Inputs { cache: Some(&before), ..batch.inputs() };
        let problem = Problem::new(&recipe.options, inputs).unwrap();
        let expected = reference::forward(&problem, &Arguments::of(&problem), Some(&sequence.events), None);
        let (error, _) = relative_error(&sequence.o, &expected.o);
        record.take("o", error);
        assert!(error <= maker.bound(Dtype::Bf16, states), "o off by {error:.2e}");
    }
}

/// A cache of the host, stepped by the engine's own method, is what the CPU makes of it.
#[test]
fn a_cache_of_the_host() {
    let Some(engine) = engine() else { return };
    for recurrence in RECURRENCES {
        let options = Options { recurrence, capacity: 5, ..Options::default() };
        let recipe = Recipe { options, batch: 3, time: 1, resumed: true, ..Recipe::default() };
        let case = recipe.draw(9);
        let mut on_gpu = case.cache.clone().unwrap();
        let mut on_cpu = on_gpu.clone();
        let mut inputs = case.inputs();
        inputs.cache = None;
        let problem = Problem::new(&recipe.options, inputs).unwrap();
        for _ in 0..3 {
            let a = engine.step(&problem, &mut on_gpu).unwrap();
            let b = cpu::Engine.step(&problem, &mut on_cpu).unwrap();
            assert_eq!(a.events, b.events);
            let (error, _) = relative_error(&a.o.to_f64(), &b.o.to_f64());
            assert!(error < 1e-5, "o off by {error:.2e}");
        }
        let f64s = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
        assert_eq!((&on_gpu.len, &on_gpu.tokens), (&on_cpu.len, &on_cpu.tokens));
        let (error, _) = relative_error(&f64s(&on_gpu.states), &f64s(&on_cpu.states));
        assert!(error < 1e-5, "cache_states off by {error:.2e}");
        let (error, _) = relative_error(&f64s(&on_gpu.open), &f64s(&on_cpu.open));
        assert!(error < 1e-5, "cache_open off by {error:.2e}");
    }
}
