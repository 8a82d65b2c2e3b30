//! The Hopper kernels of the gated backward, emulated, given the log of the reference.

use super::hopper::own_log;
use super::*;
use dla::cuda::abi::{PrepareBackwardSm90Params, ScanBackwardSm90, ScanBackwardSm90Params};
use dla::events::MERGE;
use dla::reference::{States, Upstream};

const CHUNK: usize = 64;

/// What a log makes of every row, on the host.
struct Rows {
    /// As segment leaves them (abi.cuh, SegmentParams).
    chunk_len: Vec<u32>,
    chunk_starts: Vec<i32>,
    chunk_place: Vec<u8>,
    /// Of every row and token, the slots of the tokens up to it, and how many slots are held.
    slots: Vec<Vec<(Vec<usize>, usize)>>,
}

fn rows_of(case: &Case, problem: &Problem, events: &[u8]) -> Rows {
    let shape = problem.shape();
    let (heads, capacity) = (shape.value_heads, shape.capacity);
    let places = (shape.tokens() / CHUNK + shape.sequences) * heads;
    let mut rows = Rows {
        chunk_len: vec![u32::MAX; places],
        chunk_starts: vec![i32::MAX; places * capacity],
        chunk_place: vec![255; places * capacity],
        slots: Vec::new(),
    };
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..heads {
            let initial = case.cache.as_ref().map_or(0, |cache| cache.len[n * heads + head] as usize);
            let mut order: Vec<u8> = (0..initial as u8).collect();
            let mut starts: Vec<i32> = (0..initial as i32).map(|j| j - initial as i32).collect();
            let mut slots: Vec<usize> = Vec::new();
            let mut of_tokens = Vec::new();
            for t in 0..sequence.len {
                if t % CHUNK == 0 {
                    let at = (sequence.start / CHUNK + n + t / CHUNK) * heads + head;
                    rows.chunk_len[at] = order.len() as u32;
                    rows.chunk_place[at * capacity..][..order.len()].copy_from_slice(&order);
                    rows.chunk_starts[at * capacity..][..order.len()].copy_from_slice(&starts);
                }
                match events[(sequence.start + t) * heads + head] {
                    EXTEND => {}
                    OPEN => {
                        order.push(order.len() as u8);
                        starts.push(t as i32);
                    }
                    event => {
                        let pair = (event - MERGE) as usize;
                        let freed = order.remove(pair + 1);
                        starts.remove(pair + 1);
                        slots.iter_mut().filter(|slot| **slot > pair).for_each(|slot| *slot -= 1);
                        order.push(freed);
                        starts.push(t as i32);
                    }
                }
                slots.push(order.len() - 1);
                of_tokens.push((slots.clone(), order.len()));
            }
            rows.slots.push(of_tokens);
        }
    }
    rows
}

/// Gradients by way of pairs of tokens, and v . dV by way of states, in f64.
struct Pairs {
    /// `[tokens, HV, M]` by slot.
    weights: Vec<f64>,
    /// `[tokens, HV]`.
    g: Vec<f64>,
    /// `[tokens, HV]`: v . dV = k . dK by way of states.
    flow: Vec<f64>,
    /// `[tokens, HV]`: what such a sum of products is made of, the root of the sum of their squares, by way of dV and of dK:
    /// where it cancels, no kernel can know it better than to its rounding of that.
    scales: [Vec<f64>; 2],
}

/// `d_states`: of the final cache, zero where there is none.
fn pairs_of(problem: &Problem, d_o: &[f64], d_states: Option<&[f64]>, rows: &Rows) -> Pairs {
    let shape = *problem.shape();
    let options = problem.options();
    let arguments = Arguments::of(problem);
    let (heads, capacity) = (shape.value_heads, shape.capacity);
    let columns = problem.lambda_columns();
    let lambda = arguments.lambda.as_ref().unwrap();
    let mut out = Pairs {
        weights: vec![0.0; shape.tokens() * heads * capacity],
        g: vec![0.0; shape.tokens() * heads],
        flow: vec![0.0; shape.tokens() * heads],
        scales: [vec![0.0; shape.tokens() * heads], vec![0.0; shape.tokens() * heads]],
    };
    let unit = |x: &[f64]| {
        let sum: f64 = x.iter().map(|x| x * x).sum();
        let factor = if options.qk_l2norm { 1.0 / (sum + 1e-6).sqrt() } else { 1.0 };
        x.iter().map(|x| x * factor).collect::<Vec<_>>()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for (n, sequence) in problem.sequences().iter().enumerate() {
        for head in 0..heads {
            let key_head = head / (heads / shape.heads);
            let at = |t: usize| (sequence.start + t) * heads + head;
            let key_at = |t: usize| ((sequence.start + t) * shape.heads + key_head) * shape.dk;
            let mut gamma = vec![0.0];
            for t in 0..sequence.len {
                gamma.push(gamma[t] + arguments.g[at(t)].max(-800.0));
            }
            let q: Vec<_> = (0..sequence.len).map(|t| unit(&arguments.q[key_at(t)..][..shape.dk])).collect();
            let k: Vec<_> = (0..sequence.len).map(|t| unit(&arguments.k[key_at(t)..][..shape.dk])).collect();
            // dV and dK by way of states, of every token.
            let mut of_v = vec![vec![0.0; shape.dv]; sequence.len];
            let mut of_k = vec![vec![0.0; shape.dk]; sequence.len];
            let v = |s: usize| &arguments.v[at(s) * shape.dv..][..shape.dv];
            for t in 0..sequence.len {
                let (slots, held) = &rows.slots[n * heads + head][t];
                let d_o = &d_o[at(t) * shape.dv..][..shape.dv];
                let first = (t / CHUNK * CHUNK).saturating_sub(CHUNK);
                for s in 0..=t {
                    let column = options.slot_order.column(slots[s], *held);
                    let weight = lambda[at(t) * columns + column];
                    let decay = f64::from(problem.scale()) * (gamma[t + 1] - gamma[s + 1]).exp();
                    let (scores, of_values) = (dot(&q[t], &k[s]), dot(d_o, v(s)));
                    if s < first {
                        let (by_v, by_k) = (weight * decay * scores, weight * decay * of_values);
                        of_v[s].iter_mut().zip(d_o).for_each(|(sum, x)| *sum += by_v * x);
                        of_k[s].iter_mut().zip(&q[t]).for_each(|(sum, x)| *sum += by_k * x);
                        continue;
                    }
                    let y = scores * of_values * decay;
                    out.weights[at(t) * capacity + slots[s]] += y;
                    (s + 1..=t).for_each(|u| out.g[at(u)] += y * weight);
                }
            }
            for s in 0..sequence.len {
                if let Some(d_states) = d_states {
                    let slot = rows.slots[n * heads + head][sequence.len - 1].0[s];
                    let d_state = &d_states[((n * heads + head) * capacity + slot) * shape.dk * shape.dv..];
                    let decay = (gamma[sequence.len] - gamma[s + 1]).exp();
                    for i in 0..shape.dk {
                        let row = &d_state[i * shape.dv..][..shape.dv];
                        of_k[s][i] += decay * dot(row, v(s));
                        of_v[s].iter_mut().zip(row).for_each(|(sum, x)| *sum += decay * k[s][i] * x);
                    }
                }
                let squares =
                    |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).powi(2)).sum::<f64>().sqrt();
                out.flow[at(s)] = dot(v(s), &of_v[s]);
                out.scales[0][at(s)] = squares(v(s), &of_v[s]);
                out.scales[1][at(s)] = squares(&k[s], &of_k[s]);
            }
        }
    }
    out
}

/// What the kernels leave.
#[derive(PartialEq)]
struct Left {
    dv: Vec<f64>,
    /// Of keys as the recurrence uses them, by value head.
    dk: Vec<f64>,
    initial: [Vec<f64>; 2],
    weights: Vec<f64>,
    g: Vec<f64>,
    /// By way of dV and of dK.
    flow: [Vec<f64>; 2],
}

fn backward(
    emulate: Emulate,
    case: &Case,
    problem: &Problem,
    events: &[u8],
    rows: &Rows,
    window: usize,
) -> Left {
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
        delta: false,
    };
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
    let d_o = Array::of_buffer(&case.d_o);
    let g = case.g.as_ref().map(|x| Array::of(x));
    let lambda = Array::of(case.lambda.as_ref().unwrap());
    let initial_len = case.cache.as_ref().map(|cache| Array::of(&cache.len));
    let final_states = case.d_cache.as_ref().map(|cache| Array::of(&cache.states));
    let log = Array::of(events);
    let (chunk_len, chunk_starts) = (Array::of(&rows.chunk_len), Array::of(&rows.chunk_starts));
    let chunk_place = Array::of(&rows.chunk_place);
    let (heads, capacity) = (shape.value_heads, shape.capacity);
    let scans = [false, true].map(|exchanged| ScanBackwardSm90::choose(&geometry, exchanged).unwrap());
    // dV rounded or not, as callers want it; of keys not, for more is done to it.
    let rounded = [window.is_multiple_of(128), false];
    let widths = [shape.dv, shape.dk];
    let dv = Array::poisoned(shape.tokens() * heads * widths[0] * 2);
    let mut values_of = [0, 1].map(|pass| vec![0.0; shape.tokens() * heads * widths[pass]]);
    let initial = [0, 1].map(|_| Array::poisoned(dims.rows() * dims.bank() * 4));
    let flow = scans.map(|scan| Array::poisoned(scan.flow_len(&geometry) * 4));
    let carried = scans.map(|scan| Array::poisoned(scan.carried_len(&geometry) * 4));
    let mut weights = vec![0.0; shape.tokens() * heads * capacity];
    let mut d_g = vec![0.0; shape.tokens() * heads];
    let windows = shape.time.div_ceil(window).max(1);
    for from in (0..windows).rev().map(|at| at * window) {
        let to = from + window;
        let places = geometry.window_places(shape.time, from, to);
        let pairs = Array::poisoned(ScanBackwardSm90::pairs_len(&geometry, places) * 4);
        let read = Array::poisoned(scans[0].weights_len(&geometry, places) * 4);
        let plans = Array::poisoned(ScanBackwardSm90::plans_bytes(&geometry, places));
        let d_weights = Array::poisoned(ScanBackwardSm90::d_weights_len(&geometry, places) * 4);
        let of_g = Array::poisoned(ScanBackwardSm90::d_g_len(&geometry, places) * 4);
        let params = PrepareBackwardSm90Params {
            extents,
            q: q.pointer(),
            k: k.pointer(),
            v: v.pointer(),
            d_o: d_o.pointer(),
            g: pointer(&g),
            events: log.pointer(),
            lambda: lambda.pointer(),
            chunk_len: chunk_len.pointer(),
            chunk_starts: chunk_starts.pointer(),
            chunk_place: chunk_place.pointer(),
            pairs: pairs.pointer(),
            weights: read.pointer(),
            plans: plans.pointer(),
            d_weights: d_weights.pointer(),
            d_g: of_g.pointer(),
            from: from as i64,
            to: to as i64,
            lambda_columns: problem.lambda_columns() as i32,
            slots: scans[0].slots as i32,
            scale: problem.scale(),
            qk_l2norm: options.qk_l2norm.into(),
        };
        let shared = ScanBackwardSm90::prepare_shared_bytes(&geometry);
        launch(emulate, ScanBackwardSm90::PREPARE_NAME, places * heads, shared, &params);
        // In f32 a window's own.
        let out = widths.map(|width| Array::poisoned(places * heads * CHUNK * width * 4));
        for (pass, scan) in scans.iter().enumerate() {
            let params = ScanBackwardSm90Params {
                extents,
                q: q.pointer(),
                k: k.pointer(),
                v: v.pointer(),
                d_o: d_o.pointer(),
                pairs: pairs.pointer(),
                weights: read.pointer(),
                plans: plans.pointer(),
                initial_len: pointer(&initial_len),
                final_states: pointer(&final_states),
                initial_states: initial[pass].pointer(),
                carried: carried[pass].pointer(),
                out: if rounded[pass] { dv.pointer() } else { out[pass].pointer() },
                flow: flow[pass].pointer(),
                from: from as i64,
                to: to as i64,
                exchanged: pass as i32,
                out_f32: (!rounded[pass]).into(),
            };
            launch(emulate, &scan.name(), scan.blocks(&geometry), scan.shared_bytes(), &params);
        }
        for array in [&pairs, &read, &plans] {
            array.get::<u8>();
        }
        // Where a chunk's parts stand (abi.cuh, PrepareSm90Params).
        let (d_weights, of_g) = (d_weights.get::<f32>(), of_g.get::<f32>());
        let out = out.map(|out| out.get::<f32>());
        let mut place0 = 0;
        for sequence in problem.sequences().iter() {
            let end = sequence.len.min(to);
            let chunks = end.saturating_sub(from).div_ceil(CHUNK);
            for chunk in 0..chunks {
                for head in 0..heads {
                    let place = (place0 + chunk) * heads + head;
                    let first = from + chunk * CHUNK;
                    for t in 0..CHUNK.min(sequence.len - first) {
                        let at = (sequence.start + first + t) * heads + head;
                        for slot in 0..capacity {
                            let x = d_weights[(place * CHUNK + t) * capacity + slot];
                            weights[at * capacity + slot] = x.into();
                        }
                        d_g[at] += f64::from(of_g[(place * 2 + 1) * CHUNK + t]);
                        for pass in [0, 1] {
                            let width = widths[pass];
                            let x = &out[pass][(place * CHUNK + t) * width..][..width];
                            let to = &mut values_of[pass][at * width..][..width];
                            to.iter_mut().zip(x).for_each(|(to, &x)| *to = x.into());
                        }
                    }
                    for t in 0..if first > 0 { CHUNK } else { 0 } {
                        let at = (sequence.start + first + t - CHUNK) * heads + head;
                        d_g[at] += f64::from(of_g[place * 2 * CHUNK + t]);
                    }
                }
            }
            place0 += places / shape.sequences;
        }
    }
    let values = |array: &Array| -> Vec<f64> { array.get::<f32>().iter().map(|&x| x.into()).collect() };
    if rounded[0] {
        values_of[0] = dv.get::<u16>().iter().map(|&x| bf16::from_bits(x).to_f64()).collect();
    }
    let [dv, dk] = values_of;
    let summed = |array: &Array| {
        let per_token = shape.tokens() * heads;
        let parts = values(array);
        (0..per_token).map(|at| parts.iter().skip(at).step_by(per_token).sum()).collect()
    };
    Left {
        dv,
        dk,
        initial: [values(&initial[0]), values(&initial[1])],
        weights,
        g: d_g,
        flow: [summed(&flow[0]), summed(&flow[1])],
    }
}

/// Gradients of keys through the norm, summed over the group, `[tokens, H, dk]`.
fn of_keys(problem: &Problem, dk: &[f64]) -> Vec<f64> {
    let shape = *problem.shape();
    let group = shape.value_heads / shape.heads;
    let keys = Arguments::of(problem).k;
    let mut out = vec![0.0; keys.len()];
    for (at, (out, k)) in out.chunks_exact_mut(shape.dk).zip(keys.chunks_exact(shape.dk)).enumerate() {
        for head in 0..group {
            let d = &dk[(at * group + head) * shape.dk..][..shape.dk];
            let (mut along, mut factor) = (0.0, 1.0);
            if problem.options().qk_l2norm {
                factor = 1.0 / (k.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                along = d.iter().zip(k).map(|(d, k)| d * k).sum::<f64>() * factor * factor;
            }
            out.iter_mut().zip(d).zip(k).for_each(|((out, d), k)| *out += factor * (d - along * k));
        }
    }
    out
}

/// Gated: dV, dK, the gradient of the initial states, and the parts of those of lambda and g by way of pairs, over sizes,
/// capacities, ragged, packed and cut sequences, resumed caches, own logs.
#[test]
fn hopper_backward() {
    let Some(emulate) = emulator() else { return };
    let seed: u64 = setting("DLA_EMULATION_FIRST").unwrap_or_else(|| rand::random_range(0..1 << 40));
    println!("seeds from {seed}");
    let mut worst = Worst::default();
    let sizes = [(64, 16), (128, 32), (40, 24), (72, 40), (16, 128), (32, 72), (8, 8)];
    let capacities = [30, 16, 30, 32, 29, 31, 17, 3, 30, 1, 8, 2];
    for (at, &capacity) in capacities.iter().enumerate() {
        let (dk, dv) = sizes[at % sizes.len()];
        let packed = at % 3 == 2;
        let recipe = Recipe {
            options: Options {
                capacity,
                merge: if at % 3 == 0 { Merge::Mass } else { Merge::Density },
                slot_order: if at % 4 < 2 { SlotOrder::OldestFirst } else { SlotOrder::NewestFirst },
                qk_l2norm: at % 5 == 2,
                ..Options::default()
            },
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
            final_gradient: at % 2 == 0,
            ..Recipe::default()
        };
        let case = recipe.draw(seed + at as u64);
        let problem = case.problem().unwrap();
        let name = case.describe();
        let log = matches!(at, 1 | 3 | 6 | 8).then(|| own_log(&case, &problem, seed + at as u64));
        let arguments = Arguments::of(&problem);
        let forward = reference::forward(&problem, &arguments, log.as_deref(), None);
        let dims = problem.shape().cache_dims();
        let d_o = Upstream::of(&problem, &case.upstream()).o;
        // The states alone: what R has is no part of the scan.
        let cache = case.d_cache.as_ref().map(|cache| States {
            states: cache.states.iter().map(|&x| x.into()).collect(),
            ..States::zeros(dims)
        });
        let upstream = Upstream { o: d_o.clone(), cache, drift: None };
        let expected = reference::backward(&problem, &arguments, &forward.events, &upstream).arguments;
        let rows = rows_of(&case, &problem, &forward.events);
        let d_states = upstream.cache.as_ref().map(|cache| &cache.states[..]);
        let pairs = pairs_of(&problem, &d_o, d_states, &rows);
        let mut first: Option<Left> = None;
        for window in [1 << 20, 64, 128] {
            let left = backward(emulate, &case, &problem, &forward.events, &rows, window);
            let mut judge = |tensor: &str, bound: f64, x: &[f64], reference: &[f64]| {
                let (error, at) = relative_error(x, reference);
                worst.take(Dtype::Bf16, tensor, error);
                assert!(
                    error <= bound,
                    "{name}: {tensor} off by {error:.2e}, most at element {at}, windows of {window}"
                );
            };
            judge("dlambda of pairs", 1e-5, &left.weights, &pairs.weights);
            judge("dg of pairs", 1e-4, &left.g, &pairs.g);
            judge("dv", bound(Dtype::Bf16), &left.dv, &expected.v);
            judge("dk", bound(Dtype::Bf16), &of_keys(&problem, &left.dk), &expected.k);
            if let Some(cache) = &expected.cache {
                judge("initial states", bound(Dtype::Bf16), &left.initial[0], &cache.states);
                judge("initial states, exchanged", bound(Dtype::Bf16), &left.initial[1], &cache.states);
            }
            for (tensor, x, scales) in [
                ("flow", &left.flow[0], &pairs.scales[0]),
                ("flow, exchanged", &left.flow[1], &pairs.scales[1]),
            ] {
                let norm = |of: &mut dyn Iterator<Item = f64>| of.map(|x| x * x).sum::<f64>().sqrt();
                let error = norm(&mut x.iter().zip(&pairs.flow).map(|(x, flow)| x - flow));
                let error = error / norm(&mut scales.iter().copied()).max(f64::MIN_POSITIVE);
                worst.take(Dtype::Bf16, tensor, error);
                assert!(
                    error <= bound(Dtype::Bf16),
                    "{name}: {tensor} off by {error:.2e}, windows of {window}"
                );
            }
            // Windows change nothing.
            match &first {
                None => first = Some(left),
                Some(first) => {
                    let same = first.initial == left.initial
                        && first.flow == left.flow
                        && first.weights == left.weights;
                    assert!(same, "{name}: windows of {window}");
                }
            }
        }
    }
    println!("{:#?}", worst.0);
}
