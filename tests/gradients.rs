//! The gradients of the reference against central differences of its forward, the log frozen.
//!
//! Five points a difference: at a step of 5e-4 its truncation (h^4) and its rounding (1e-16 / h) are both
//! near 1e-12, so that small gradients beside a large loss are judged as well.

use dla::check::{Recipe, relative_error};
use dla::reference::{self, Arguments, States, Upstream};
use dla::{Merge, Options, Read, Recurrence, SlotOrder, Soft};

/// `<do, o> + <dcache, cache>`, all that the gradients are of.
fn loss(outputs: &reference::Outputs, upstream: &Upstream) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cache = upstream.cache.as_ref().map_or(0.0, |d| {
        let States { states, open, keys } = &outputs.cache;
        dot(&d.states, states) + dot(&d.open, open) + dot(&d.keys, keys)
    });
    dot(&upstream.o, &outputs.o) + cache
}

/// The fields of the arguments by name.
fn fields(a: &mut Arguments) -> Vec<(&'static str, &mut Vec<f64>)> {
    let mut fields = vec![
        ("dq", &mut a.q),
        ("dk", &mut a.k),
        ("dv", &mut a.v),
        ("dg", &mut a.g),
        ("dbeta", &mut a.beta),
        ("droute_slope", &mut a.slope),
        ("droute_bias", &mut a.bias),
        ("dtau", &mut a.tau),
    ];
    fields.extend(a.lambda.as_mut().map(|x| ("dlambda", x)));
    fields.extend(a.logits.as_mut().map(|x| ("droute_logits", x)));
    if let Some(cache) = &mut a.cache {
        fields.push(("dcache_states", &mut cache.states));
        fields.push(("dcache_open", &mut cache.open));
        fields.push(("dcache_keys", &mut cache.keys));
    }
    fields
}

fn check(name: &str, recipe: &Recipe) {
    let seed = rand::random();
    let case = recipe.draw(seed);
    let problem = case.problem().unwrap();
    let mut arguments = Arguments::of(&problem);
    let upstream = Upstream::of(&problem, &case.upstream());
    let base = reference::forward(&problem, &arguments, None, None);
    let events = &base.events;
    let boundaries = events.iter().filter(|&&event| event != 0).count();
    assert!(boundaries > 0);

    // The confidence of every decision at the point of expansion. One tau and drift give it.
    let confidences = recipe.options.soft.map(|soft| {
        let sequences = problem.sequences();
        let mut c = vec![1.0; base.drift.len()];
        let heads = recipe.value_heads;
        for (n, sequence) in sequences.iter().enumerate() {
            for head in 0..heads {
                let begun = case.cache.as_ref().is_some_and(|cache| cache.len[n * heads + head] > 0);
                for t in usize::from(!begun)..sequence.len {
                    let at = (sequence.start + t) * heads + head;
                    let tau = f64::from(recipe.options.tau.of(head));
                    let p = 1.0 / (1.0 + (-(base.drift[at] - tau) / f64::from(soft.temperature)).exp());
                    c[at] = if events[at] == 0 { 1.0 - p } else { p };
                }
            }
        }
        c
    });
    let mut gradients = reference::backward(&problem, &arguments, events, &upstream);

    let fields_count = fields(&mut arguments).len();
    for field in 0..fields_count {
        let (name_of, len) = {
            let (name, values) = &fields(&mut arguments)[field];
            (*name, values.len())
        };
        let step = 5e-4;
        let mut numeric = Vec::with_capacity(len);
        for index in 0..len {
            let original = fields(&mut arguments)[field].1[index];
            let mut at = |value: f64| {
                fields(&mut arguments)[field].1[index] = value;
                let outputs = reference::forward(&problem, &arguments, Some(events), confidences.as_deref());
                loss(&outputs, &upstream)
            };
            let near = at(original + step) - at(original - step);
            let far = at(original + 2.0 * step) - at(original - 2.0 * step);
            at(original);
            numeric.push((8.0 * near - far) / (12.0 * step));
        }
        let analytic = fields(&mut gradients.arguments)[field].1.clone();
        let scale = numeric.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        if scale == 0.0 {
            assert!(analytic.iter().all(|&x| x == 0.0), "{name} {name_of} seed {seed}: expected zeros");
            continue;
        }
        let (error, worst) = relative_error(&analytic, &numeric);
        println!("{name}: {name_of} {error:.2e} (worst at {worst}, seed {seed})");
        assert!(
            error < 1e-6,
            "{name} {name_of} seed {seed}: {error:.3e} at {worst}: {} against {}",
            analytic[worst],
            numeric[worst]
        );
    }
}

fn recipes(recurrence: Recurrence, read: Read) -> Vec<(String, Recipe)> {
    let mut out = Vec::new();
    for (merge, slot_order) in
        [(Merge::Density, SlotOrder::OldestFirst), (Merge::Mass, SlotOrder::NewestFirst)]
    {
        for (kind, rate) in [("plain", 1.0), ("resumed", 0.4), ("packed", 0.4), ("soft", 0.5)] {
            let options = Options {
                recurrence,
                capacity: 3,
                merge,
                slot_order,
                read,
                qk_l2norm: kind == "packed",
                soft: (kind == "soft").then_some(Soft { temperature: 0.3, through_drift: true }),
                ..Options::default()
            };
            let recipe = Recipe {
                options,
                batch: if kind == "packed" { 1 } else { 2 },
                time: 9,
                heads: if kind == "plain" { 2 } else { 1 },
                value_heads: 2,
                dk: 3,
                dv: 4,
                boundary_rate: rate,
                decay: Some(0.7),
                logits: kind != "resumed",
                extra_columns: usize::from(kind == "plain"),
                packed: (kind == "packed").then(|| vec![4, 0, 5]),
                resumed: kind == "resumed" || kind == "soft",
                final_gradient: kind != "plain",
                ..Recipe::default()
            };
            out.push((format!("{recurrence:?} {read:?} {merge:?} {kind}"), recipe));
        }
    }
    out
}

fn check_all(recurrence: Recurrence, read: Read) {
    for (name, recipe) in recipes(recurrence, read) {
        for _ in 0..2 {
            check(&name, &recipe);
        }
    }
}

#[test]
fn gated_given() {
    check_all(Recurrence::Gated, Read::Given);
}

#[test]
fn gated_routed() {
    check_all(Recurrence::Gated, Read::Routed);
}

#[test]
fn delta_given() {
    check_all(Recurrence::GatedDelta, Read::Given);
}

#[test]
fn delta_routed() {
    check_all(Recurrence::GatedDelta, Read::Routed);
}
