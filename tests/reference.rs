//! The definition against numbers worked out by hand from OPERATOR.md, section 3. Both engines.

use approx::assert_relative_eq;
use dla::events::{MERGE, OPEN};
use dla::{
    Engine, Forward, Inputs, Options, Problem, Read, Recurrence, Route, SlotOrder, Tau, Tensor, cpu,
    reference,
};

fn by_both(options: &Options, inputs: Inputs) -> [Forward; 2] {
    let problem = Problem::new(options, inputs).unwrap();
    [cpu::Engine.forward(&problem).unwrap(), reference::Engine.forward(&problem).unwrap()]
}

/// Every token opens a slot, so that drift is against the token before.
fn every_token() -> Options {
    Options { capacity: 64, tau: Tau::PerCall(0.0), ..Options::default() }
}

#[test]
fn drift_is_the_chord_between_directions() {
    let angle = |degrees: f32| [degrees.to_radians().cos(), degrees.to_radians().sin()];
    // Directions 0, 0, 60, 60 + 90, turned round, and a longer one: length does not count.
    let k: Vec<f32> =
        [0.0, 0.0, 60.0, 150.0, 330.0].into_iter().flat_map(angle).chain([8.66, -5.0]).collect();
    let v = vec![2.0f32; 6];
    let lambda = vec![1.0f32; 6 * 64];
    for decay in [0.0f32, -3.0] {
        let g = vec![decay; 6];
        let k = Tensor::new(&k, &[1, 6, 1, 2]);
        let mut inputs = Inputs::new(k, k, Tensor::new(&v, &[1, 6, 1, 1]));
        inputs.g = Some(Tensor::new(&g, &[1, 6, 1]));
        inputs.lambda = Some(Tensor::new(&lambda, &[1, 6, 1, 64]));
        for forward in by_both(&every_token(), inputs) {
            for (drift, expected) in forward.drift.iter().zip([2f32.sqrt(), 0.0, 1.0, 2f32.sqrt(), 2.0, 0.0])
            {
                assert_relative_eq!(*drift, expected, epsilon = 1e-3);
            }
            assert_eq!(forward.cache.len, [6]);
            assert_eq!(forward.cache.drift[..3], [5793, forward.cache.drift[1], 4096]);
        }
    }
}

/// One dimension, g = -ln 2, v = 1, 2, 3; two slots: open, open, merge and open.
fn halving(recurrence: Recurrence, read: Read, slot_order: SlotOrder) -> [Forward; 2] {
    let options =
        Options { recurrence, read, slot_order, capacity: 2, scale: Some(1.0), ..Options::default() };
    let (q, v, g) = ([1.0f32, 2.0, 1.0], [1.0f32, 2.0, 3.0], [-std::f32::consts::LN_2; 3]);
    let k = [1.0f32; 3];
    let lambda = [3.0f32, 9.0, 10.0, 1.0, 10.0, 1.0];
    let (slope, bias, beta) = ([2.0f32], [-1.0f32], [1.0f32; 3]);
    let one = [1, 3, 1, 1];
    let mut inputs =
        Inputs::new(Tensor::new(&q[..], &one), Tensor::new(&k[..], &one), Tensor::new(&v[..], &one));
    inputs.g = Some(Tensor::new(&g[..], &[1, 3, 1]));
    if recurrence == Recurrence::GatedDelta {
        inputs.beta = Some(Tensor::new(&beta[..], &[1, 3, 1]));
    }
    match read {
        Read::Given => inputs.lambda = Some(Tensor::new(&lambda[..], &[1, 3, 1, 2])),
        Read::Routed => {
            inputs.route = Some(Route {
                slope: Tensor::new(&slope[..], &[1]),
                bias: Tensor::new(&bias[..], &[1]),
                logits: None,
            });
        }
    }
    inputs.events = Some(&[OPEN, OPEN, MERGE]);
    by_both(&options, inputs)
}

#[test]
fn gated_states_halve_merge_and_are_weighed() {
    for forward in halving(Recurrence::Gated, Read::Given, SlotOrder::OldestFirst) {
        // S: [1]; [1/2, 2]; [1/4 + 1, 3].
        let expected = [3.0, 2.0 * (10.0 * 0.5 + 2.0), 10.0 * 1.25 + 3.0];
        for (o, expected) in forward.o.to_f64().into_iter().zip(expected) {
            assert_relative_eq!(o, expected, max_relative = 1e-6);
        }
        assert_relative_eq!(forward.cache.states[0], 1.25, max_relative = 1e-6);
        assert_relative_eq!(forward.cache.states[1], 3.0, max_relative = 1e-6);
        assert_relative_eq!(forward.cache.open[0], 3.0, max_relative = 1e-6);
        assert_eq!((&forward.cache.len[..], &forward.cache.tokens[..]), (&[2][..], &[2, 1][..]));
    }
    for forward in halving(Recurrence::Gated, Read::Given, SlotOrder::NewestFirst) {
        let expected = [3.0, 2.0 * (0.5 + 10.0 * 2.0), 1.25 + 10.0 * 3.0];
        for (o, expected) in forward.o.to_f64().into_iter().zip(expected) {
            assert_relative_eq!(o, expected, max_relative = 1e-6);
        }
    }
}

#[test]
fn the_delta_rule_erases_what_the_key_holds() {
    for forward in halving(Recurrence::GatedDelta, Read::Given, SlotOrder::OldestFirst) {
        // With beta = 1 and one key every slot is emptied before the write.
        for (o, expected) in forward.o.to_f64().into_iter().zip([3.0, 2.0 * 2.0, 3.0]) {
            assert_relative_eq!(o, expected, max_relative = 1e-6);
        }
        // R is plain: what a boundary leaves of it is the last token.
        assert_relative_eq!(forward.cache.open[0], 3.0, max_relative = 1e-6);
    }
}

#[test]
fn routed_weights_are_sigmoids_of_mean_keys() {
    for forward in halving(Recurrence::Gated, Read::Routed, SlotOrder::OldestFirst) {
        // Every mean key is 1: lambda = sigmoid(2 q - 1), q = 1, 2, 1.
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let lambda = forward.lambda.as_ref().unwrap();
        let expected = [sigmoid(1.0), 0.0, sigmoid(3.0), sigmoid(3.0), sigmoid(1.0), sigmoid(1.0)];
        for (lambda, expected) in lambda.iter().zip(expected) {
            assert_relative_eq!(f64::from(*lambda), expected, max_relative = 1e-6);
        }
        assert_relative_eq!(forward.o.to_f64()[1], sigmoid(3.0) * 2.0 * 2.5, max_relative = 1e-6);
        assert_eq!(forward.cache.keys.as_ref().unwrap()[..], [2.0, 1.0]);
    }
}

#[test]
fn normalised_queries_and_keys_have_unit_norm() {
    let options = Options { qk_l2norm: true, scale: Some(1.0), capacity: 1, ..Options::default() };
    let (x, v, lambda) = ([3.0f32, 4.0], [1.0f32], [1.0f32]);
    let x = Tensor::new(&x[..], &[1, 1, 1, 2]);
    let mut inputs = Inputs::new(x, x, Tensor::new(&v[..], &[1, 1, 1, 1]));
    inputs.lambda = Some(Tensor::new(&lambda[..], &[1, 1, 1, 1]));
    for forward in by_both(&options, inputs) {
        assert_relative_eq!(forward.o.to_f64()[0], 25.0 / (25.0 + 1e-6), max_relative = 1e-6);
        assert_relative_eq!(forward.cache.states[1], 0.8, max_relative = 1e-6);
    }
}
