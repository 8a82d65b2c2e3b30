//! The Hopper kernels of the scan, emulated, given the log of the reference.

use super::*;
use dla::cuda::abi::{
    DELTA_CHUNK, GAMMAS_SHARED_BYTES, GammasSm90Params, PrepareDeltaSm90Params, PrepareSm90Params,
    ScanDeltaSm90Params, ScanSm90, ScanSm90Params,
};
use dla::events::MERGE;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What the segment stage says of every chunk: the slots at its entry (abi.cuh, SegmentParams).
pub struct ChunkRecords {
    pub len: Vec<u32>,
    pub starts: Vec<i32>,
    pub place: Vec<u8>,
}

/// Replays a log on the host.
pub fn chunk_records(case: &Case, problem: &Problem, events: &[u8], chunk: usize) -> ChunkRecords {
    let shape = problem.shape();
    let (heads, capacity) = (shape.value_heads, shape.capacity);
    let places = (shape.tokens() / chunk + shape.sequences) * heads;
    let mut records = ChunkRecords {
        len: vec![u32::MAX; places],
        starts: vec![i32::MIN; places * capacity],
        place: vec![255; places * capacity],
    };
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..heads {
            let row = n * heads + head;
            let initial = case.cache.as_ref().map_or(0, |cache| cache.len[row] as usize);
            let mut order: Vec<u8> = (0..initial as u8).collect();
            let mut starts: Vec<i32> = (0..initial as i32).map(|j| j - initial as i32).collect();
            for first in (0..sequence.len).step_by(chunk) {
                let at = (sequence.start / chunk + n + first / chunk) * heads + head;
                records.len[at] = order.len() as u32;
                records.place[at * capacity..][..order.len()].copy_from_slice(&order);
                records.starts[at * capacity..][..order.len()].copy_from_slice(&starts);
                for t in first..sequence.len.min(first + chunk) {
                    match events[(sequence.start + t) * heads + head] {
                        EXTEND => continue,
                        OPEN => order.push(order.len() as u8),
                        event => {
                            let gone = (event - MERGE) as usize + 1;
                            starts.remove(gone);
                            let freed = order.remove(gone);
                            order.push(freed);
                        }
                    }
                    starts.push(t as i32);
                }
            }
        }
    }
    records
}

/// o and the final states, the sequence cut into windows of `window` tokens.
fn scan(
    emulate: Emulate,
    case: &Case,
    problem: &Problem,
    events: &[u8],
    window: usize,
    processors: usize,
) -> (Vec<f64>, Vec<f32>) {
    let shape = *problem.shape();
    let options = problem.options();
    let dims = shape.cache_dims();
    let geometry = Geometry {
        parts: 1,
        sequences: shape.sequences,
        tokens: shape.tokens(),
        heads: shape.heads,
        value_heads: shape.value_heads,
        dk: shape.dk,
        dv: shape.dv,
        capacity: shape.capacity,
        delta: options.recurrence == Recurrence::GatedDelta,
    };
    let kernel = ScanSm90::choose(&geometry, processors).unwrap();
    let cu_seqlens = case.cu_seqlens.as_ref().map(|x| Array::of(x));
    let extents = Extents {
        cu_seqlens: pointer(&cu_seqlens),
        sequences: shape.sequences as i64,
        time: shape.time as i64,
        heads: shape.heads as i32,
        value_heads: shape.value_heads as i32,
        dk: shape.dk as i32,
        dv: shape.dv as i32,
        capacity: shape.capacity as i32,
        newest_first: (options.slot_order == SlotOrder::NewestFirst).into(),
    };
    let (q, k, v) = (Array::of_buffer(&case.q), Array::of_buffer(&case.k), Array::of_buffer(&case.v));
    let g = case.g.as_ref().map(|x| Array::of(x));
    let lambda = Array::of(case.lambda.as_ref().unwrap());
    let initial_len = case.cache.as_ref().map(|cache| Array::of(&cache.len));
    let initial_states = case.cache.as_ref().map(|cache| Array::of(&cache.states));
    let records = chunk_records(case, problem, events, 64);
    let log = Array::of(events);
    let (chunk_len, chunk_starts, chunk_place) =
        (Array::of(&records.len), Array::of(&records.starts), Array::of(&records.place));
    let beta = case.beta.as_ref().map(|x| Array::of(x));
    let packed = case.cu_seqlens.is_some();
    let o = Array::poisoned(shape.tokens() * shape.value_heads * shape.dv * 2);
    let states = Array::poisoned(dims.rows() * dims.bank() * 4);
    let banks = Array::poisoned(kernel.blocks(&geometry) * kernel.bank_bytes());
    let gammas = Array::poisoned(geometry.chunks() * shape.value_heads * 8);
    if !kernel.delta {
        let params = GammasSm90Params { extents, g: pointer(&g), gammas: gammas.pointer() };
        launch(emulate, "gammas_sm90", geometry.rows(), GAMMAS_SHARED_BYTES, &params);
    }
    let mut from = 0;
    while from == 0 || from < shape.time {
        let to = from + window;
        // A window's own workspace: what another leaves is not needed.
        let places = ScanSm90::places(&geometry, shape.time, packed, from, to);
        let pairs = Array::poisoned(kernel.pairs_len(&geometry, places) * 4);
        let weights = Array::poisoned(kernel.weights_len(&geometry, places) * 4);
        let plans = Array::poisoned(kernel.plans_bytes(&geometry, places));
        let queries = Array::poisoned(kernel.queries_len(&geometry, places) * 4);
        let transition = Array::poisoned(kernel.transition_len(&geometry, places) * 2);
        let writes = Array::poisoned(kernel.writes_len(&geometry, places) * 2);
        let (name, prepare) = (kernel.name(), kernel.prepare_name());
        let (shared, prepare_shared) = (kernel.shared_bytes(), kernel.prepare_shared_bytes(&geometry));
        let (blocks, prepare_blocks) =
            (kernel.blocks(&geometry), ScanSm90::prepare_blocks(&geometry, places));
        if kernel.delta {
            let params = PrepareDeltaSm90Params {
                extents,
                q: q.pointer(),
                k: k.pointer(),
                g: pointer(&g),
                beta: pointer(&beta),
                events: log.pointer(),
                lambda: lambda.pointer(),
                chunk_len: chunk_len.pointer(),
                chunk_place: chunk_place.pointer(),
                pairs: pairs.pointer(),
                weights: weights.pointer(),
                queries: queries.pointer(),
                transition: transition.pointer(),
                writes: writes.pointer(),
                plans: plans.pointer(),
                from: from as i64,
                to: to as i64,
                lambda_columns: problem.lambda_columns() as i32,
                slots: kernel.weight_slots() as i32,
                alternate: kernel.alternate().into(),
                scale: problem.scale(),
                qk_l2norm: options.qk_l2norm.into(),
                reserved: 0,
            };
            launch(emulate, prepare, prepare_blocks, prepare_shared, &params);
            let params = ScanDeltaSm90Params {
                extents,
                v: v.pointer(),
                pairs: pairs.pointer(),
                weights: weights.pointer(),
                queries: queries.pointer(),
                transition: transition.pointer(),
                writes: writes.pointer(),
                plans: plans.pointer(),
                initial_len: pointer(&initial_len),
                initial_states: pointer(&initial_states),
                chunk_len: chunk_len.pointer(),
                chunk_place: chunk_place.pointer(),
                o: o.pointer(),
                states: states.pointer(),
                from: from as i64,
                to: to as i64,
            };
            launch(emulate, &name, blocks, shared, &params);
        } else {
            let params = PrepareSm90Params {
                extents,
                q: q.pointer(),
                k: k.pointer(),
                g: pointer(&g),
                events: log.pointer(),
                lambda: lambda.pointer(),
                chunk_len: chunk_len.pointer(),
                chunk_starts: chunk_starts.pointer(),
                chunk_place: chunk_place.pointer(),
                gammas: gammas.pointer(),
                pairs: pairs.pointer(),
                weights: weights.pointer(),
                plans: plans.pointer(),
                from: from as i64,
                to: to as i64,
                lambda_columns: problem.lambda_columns() as i32,
                slots: kernel.weight_slots() as i32,
                scale: problem.scale(),
                qk_l2norm: options.qk_l2norm.into(),
                ..PrepareSm90Params::default()
            };
            launch(emulate, prepare, prepare_blocks, prepare_shared, &params);
            let params = ScanSm90Params {
                extents,
                q: q.pointer(),
                k: k.pointer(),
                v: v.pointer(),
                pairs: pairs.pointer(),
                weights: weights.pointer(),
                plans: plans.pointer(),
                initial_len: pointer(&initial_len),
                initial_states: pointer(&initial_states),
                source: banks.pointer(),
                banks: banks.pointer(),
                o: o.pointer(),
                states: states.pointer(),
                from: from as i64,
                to: to as i64,
                ..ScanSm90Params::default()
            };
            launch(emulate, &name, blocks, shared, &params);
        }
        // Workspaces: nothing past their ends.
        for array in [&pairs, &weights, &plans, &queries, &transition, &writes] {
            array.get::<u8>();
        }
        from = to;
    }
    let o = o.get::<u16>().iter().map(|&x| bf16::from_bits(x).to_f64()).collect();
    (o, states.get())
}

/// A log of a caller's own: merges anywhere, below capacity too.
pub fn own_log(case: &Case, problem: &Problem, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let shape = problem.shape();
    let mut log = vec![0; shape.tokens() * shape.value_heads];
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..shape.value_heads {
            let mut ledger = ledger_of(case.cache.as_ref(), n * shape.value_heads + head);
            for t in sequence.start..sequence.start + sequence.len {
                let mut choices: Vec<u8> =
                    (0..=MERGE + 64).filter(|&event| ledger.allows(event, shape.capacity)).collect();
                // As many slots that open as others.
                if choices.contains(&OPEN) {
                    choices.extend(vec![OPEN; choices.len()]);
                }
                let event = choices[rng.random_range(0..choices.len())];
                ledger.apply(event, 0.0);
                log[t * shape.value_heads + head] = event;
            }
        }
    }
    log
}

/// Every scan of the table of a recurrence, over capacities, ragged, packed and cut sequences, resumed caches, own logs.
fn every_scan(recurrence: Recurrence, sizes: &[(usize, usize)], capacities: &[usize]) {
    let Some(emulate) = emulator() else { return };
    let seed: u64 = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    for (at, &capacity) in capacities.iter().enumerate() {
        let (dk, dv) = sizes[at % sizes.len()];
        let options = Options {
            recurrence,
            capacity: if dk > 128 { capacity.min(16) } else { capacity },
            merge: if at % 3 == 0 { Merge::Mass } else { Merge::Density },
            slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
            qk_l2norm: at % 5 == 2,
            ..Options::default()
        };
        let packed = at % 3 == 2;
        let recipe = Recipe {
            options,
            batch: if packed { 1 } else { 1 + at % 2 },
            time: [200, 262, 330, 64][at % 4],
            heads: 1 + at % 2,
            value_heads: 2,
            dk,
            dv,
            dtype: Dtype::Bf16,
            boundary_rate: [1.0, 0.25, 1.0, 0.02][at / 2 % 4],
            decay: [Some(0.1), None, Some(1.0), Some(50.0)][at / 3 % 4],
            extra_columns: at % 3,
            packed: packed.then(|| match at % 4 {
                0 => vec![0, 1, 65, 0, 134],
                1 => vec![64, 128, 70],
                2 => vec![0, 1, 130, 0, 199, 0],
                _ => vec![33, 31],
            }),
            resumed: at % 3 != 1,
            ..Recipe::default()
        };
        let case = recipe.draw(seed + at as u64);
        let problem = case.problem().unwrap();
        let name = case.describe();
        let log = (at % 4 == 3).then(|| own_log(&case, &problem, seed + at as u64));
        let expected = reference::forward(&problem, &Arguments::of(&problem), log.as_deref(), None);
        let mut first: Option<(Vec<f64>, Vec<f32>)> = None;
        let chunk = if recurrence == Recurrence::GatedDelta { DELTA_CHUNK } else { 64 };
        for (window, processors) in [(1 << 20, 1), (chunk, 1000), (2 * chunk, 1)] {
            let (o, states) = scan(emulate, &case, &problem, &expected.events, window, processors);
            let f64s: Vec<f64> = states.iter().map(|&x| x.into()).collect();
            for (tensor, x, reference) in
                [("o", &o, &expected.o), ("cache_states", &f64s, &expected.cache.states)]
            {
                let (error, at) = relative_error(x, reference);
                worst.take(Dtype::Bf16, tensor, error);
                assert!(
                    error <= bound(Dtype::Bf16),
                    "{name}: {tensor} off by {error:.2e}, most at element {at}"
                );
            }
            // Groups and windows change nothing.
            match &first {
                None => first = Some((o, states)),
                Some(first) => assert!(first.0 == o && first.1 == states, "{name}: windows of {window}"),
            }
        }
    }
    println!("{:?}", worst.0);
}

/// Gated.
#[test]
fn hopper_scan() {
    let sizes = [(64, 16), (128, 32), (256, 8), (40, 24), (72, 40), (128, 16), (64, 8), (136, 16)];
    every_scan(Recurrence::Gated, &sizes, &[30, 16, 30, 32, 29, 31, 64, 3, 30, 1, 40, 2]);
}

/// The gated delta rule.
#[test]
fn hopper_delta_scan() {
    let sizes = [(64, 16), (128, 16), (40, 8), (72, 24), (128, 8)];
    every_scan(Recurrence::GatedDelta, &sizes, &[30, 16, 30, 32, 29, 31, 8, 3, 30, 1, 17, 2]);
}

/// The bound's margin where the delta rule rounds most often: long, without decay. Minutes.
#[test]
#[ignore = "minutes; run by hand"]
fn hopper_delta_margin() {
    let Some(emulate) = emulator() else { return };
    let mut worst = Worst::default();
    for decay in [None, Some(0.02)] {
        for capacity in [1, 4, 30] {
            for boundary_rate in [0.01, 0.25, 1.0] {
                let options = Options { recurrence: Recurrence::GatedDelta, capacity, ..Options::default() };
                let (time, dk, dv, dtype) = (1024, 128, 16, Dtype::Bf16);
                let recipe =
                    Recipe { options, time, dk, dv, dtype, boundary_rate, decay, ..Recipe::default() };
                let case = recipe.draw(rand::random());
                let problem = case.problem().unwrap();
                let expected = reference::forward(&problem, &Arguments::of(&problem), None, None);
                let (o, states) = scan(emulate, &case, &problem, &expected.events, 1 << 20, 1);
                let states: Vec<f64> = states.iter().map(|&x| x.into()).collect();
                let (o, _) = relative_error(&o, &expected.o);
                let (states, _) = relative_error(&states, &expected.cache.states);
                println!("{decay:?} M = {capacity} rate {boundary_rate}: o {o:.2e} states {states:.2e}");
                worst.take(Dtype::Bf16, "o", o);
                worst.take(Dtype::Bf16, "cache_states", states);
            }
        }
    }
    println!("{:?}", worst.0);
    assert!(worst.0.values().all(|&error| error <= bound(Dtype::Bf16)));
}
