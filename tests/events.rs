//! The event log against a plain transcription of OPERATOR.md, section 3, steps 3 and 4.

use dla::events::{self, EXTEND, Ledger, MERGE, OPEN, fixed_point, plan};
use dla::{Engine, Merge, cpu, reference};
use proptest::prelude::*;

/// Slots as a list of (n, J); every event by the letter of the definition.
fn by_the_letter(drift: &[f32], tau: f32, capacity: usize, merge: Merge) -> (Vec<u8>, Vec<(u32, u32)>) {
    let mut slots: Vec<(u32, u32)> = Vec::new();
    let mut log = Vec::new();
    for (t, &score) in drift.iter().enumerate() {
        let units = (f64::from(score) * 4096.0).round_ties_even() as u32;
        let boundary = t == 0 || (capacity > 1 && score >= tau);
        if !boundary {
            let open = slots.last_mut().unwrap();
            *open = (open.0 + 1, open.1.saturating_add(units));
            log.push(0);
            continue;
        }
        let mut event = 1;
        if slots.len() == capacity {
            let keys: Vec<u32> = slots
                .windows(2)
                .map(|pair| {
                    let summed = pair[0].1.saturating_add(pair[1].1) as f32;
                    let cost = match merge {
                        Merge::Density => summed / (pair[0].0 + pair[1].0) as f32,
                        Merge::Mass => summed,
                    };
                    cost.to_bits() >> 6
                })
                .collect();
            let least = *keys.iter().min().unwrap();
            let i = keys.iter().position(|&key| key == least).unwrap();
            let newer = slots.remove(i + 1);
            slots[i] = (slots[i].0 + newer.0, slots[i].1.saturating_add(newer.1));
            event = 2 + i as u8;
        }
        slots.push((1, units));
        log.push(event);
    }
    (log, slots)
}

proptest! {
    #[test]
    fn plan_follows_the_definition(
        drift in prop::collection::vec(prop_oneof![0.0f32..2.0, Just(0.6f32), Just(std::f32::consts::SQRT_2), Just(0.0f32)], 0..300),
        capacity in 1usize..=64,
        tau in 0.0f32..1.5,
        mass in any::<bool>(),
    ) {
        let merge = if mass { Merge::Mass } else { Merge::Density };
        let mut ledger = Ledger::default();
        let log = plan(&drift, tau, capacity, merge, &mut ledger);
        let (expected, slots) = by_the_letter(&drift, tau, capacity, merge);
        prop_assert_eq!(log, expected);
        let held: Vec<_> = ledger.tokens().iter().copied().zip(ledger.drift().iter().copied()).collect();
        prop_assert_eq!(held, slots);
    }

    /// Both engines' logs are what their own drift asks for, byte for byte.
    #[test]
    fn engines_follow_their_drift(seed in any::<u64>()) {
        let case = dla::check::Case::random(seed);
        let problem = case.problem().unwrap();
        for engine in [&cpu::Engine as &dyn Engine, &reference::Engine] {
            let forward = engine.forward(&problem).unwrap();
            let shape = problem.shape();
            for (n, sequence) in problem.sequences().iter().enumerate() {
                for head in 0..shape.value_heads {
                    let at = |t: usize| (sequence.start + t) * shape.value_heads + head;
                    if problem.inputs().cache.is_some_and(|cache| cache.len[n * shape.value_heads + head] > 0) {
                        continue;
                    }
                    let drift: Vec<f32> = (0..sequence.len).map(|t| forward.drift[at(t)]).collect();
                    let log: Vec<u8> = (0..sequence.len).map(|t| forward.events[at(t)]).collect();
                    let options = problem.options();
                    let (expected, _) = by_the_letter(&drift, options.tau.of(head), shape.capacity, options.merge);
                    prop_assert_eq!(log, expected, "{} {}", engine.name(), case.describe());
                }
            }
        }
    }
}

#[test]
fn ties_merge_the_oldest_pair() {
    for merge in [Merge::Density, Merge::Mass] {
        let log = plan(&[1.0; 6], 0.5, 4, merge, &mut Ledger::default());
        assert_eq!(log[..5], [OPEN, OPEN, OPEN, OPEN, MERGE]);
    }
    // Six low bits do not tell costs apart.
    let close = [1.0, 1.0 + 1.0 / 4096.0, 1.0, 1.2];
    let by = |merge| plan(&close, 0.5, 3, merge, &mut Ledger::default())[3];
    assert_eq!((by(Merge::Density), by(Merge::Mass)), (MERGE, MERGE));
}

#[test]
fn fixed_point_rounds_to_even_and_saturates() {
    assert_eq!(fixed_point(2.0), 8192);
    assert_eq!(fixed_point(0.5 / 4096.0), 0);
    assert_eq!(fixed_point(1.5 / 4096.0), 2);
    assert_eq!(fixed_point(2.5 / 4096.0), 2);
    assert_eq!(fixed_point(f32::NAN), 0);
    assert_eq!(fixed_point(f32::INFINITY), u32::MAX);
    let mut ledger = Ledger::default();
    ledger.apply(OPEN, f32::INFINITY);
    ledger.apply(EXTEND, 2.0);
    assert_eq!((ledger.tokens(), ledger.drift()), (&[2][..], &[u32::MAX][..]));
}

#[test]
fn one_slot_knows_one_boundary() {
    let log = plan(&[1.4, 2.0, 2.0], 0.0, 1, Merge::Density, &mut Ledger::default());
    assert_eq!(log, [events::OPEN, events::EXTEND, events::EXTEND]);
}
