//! Decoding on entries, on every engine that has them: against the f64 reference over the whole sequence, with the
//! engine's own event log. On a GPU too where there is one; `DLA_CUDA=require` fails where there is none.
//! `DLA_CUDA_SMALL=1`: few small cases, for compute-sanitizer. `DLA_EVIDENCE`: folder that takes a JSON file a test.

use dla::check::{Recipe, relative_error};
use dla::reference::{self, Arguments};
use dla::{Dtype, Error, Inputs, Merge, Options, Problem, StateDtype};
use harness::*;
use proptest::prelude::*;

#[path = "decode/harness.rs"]
mod harness;

fn makers() -> Vec<Maker> {
    let cpu = Maker {
        name: "cpu",
        states: &[StateDtype::F32],
        make: |spec| dla::cpu::Entries::new(spec).map(|entries| Box::new(entries) as _),
    };
    vec![cpu]
}

fn small() -> bool {
    std::env::var_os("DLA_CUDA_SMALL").is_some_and(|value| value == "1")
}

#[test]
fn every_kind() {
    for maker in makers() {
        every_kind_of_step(&maker, if small() { 12 } else { usize::MAX });
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
