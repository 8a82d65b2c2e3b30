//! Wrong calls through the C ABI: random options, extents, buffers, logs, offsets and caches. A call does what it is
//! asked or refuses it with the argument's name, and then has written nothing; it never crashes and finds no defect of
//! the library.
//!
//! `DLA_FUZZ_CALLS=1000000 cargo test --release -p dla-capi --test fuzz -- --nocapture` makes a million calls;
//! `DLA_FUZZ_SEED` sets where they begin. docs/c.md says how to run it under the address sanitizer.

mod common;

use common::{Bytes, CacheBytes, Owned, message};
use dla::check::Recipe;
use dla::{Cache, Dtype, Merge, Options, Read, Recurrence, SlotOrder, Soft, Tau};
use dla_capi::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::ptr::null;

fn pick<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

fn recipe(rng: &mut StdRng) -> Recipe {
    let heads = pick(rng, &[1, 1, 2]);
    let value_heads = heads * pick(rng, &[1, 1, 2]);
    let time = if rng.random_bool(0.02) { 130 } else { pick(rng, &[0, 1, 1, 1, 2, 5, 9]) };
    let packed = rng.random_bool(0.2);
    let lengths = packed.then(|| {
        let cut = rng.random_range(0..=time);
        vec![cut, 0, time - cut]
    });
    let tau = match rng.random_range(0..4) {
        0 => Tau::PerHead((0..value_heads).map(|_| rng.random_range(0.0..2.0)).collect()),
        1 => Tau::PerCall(0.0),
        _ => Tau::PerCall(0.6),
    };
    let soft = rng.random_bool(0.2).then(|| Soft { temperature: 0.1, through_drift: rng.random_bool(0.5) });
    Recipe {
        options: Options {
            recurrence: pick(rng, &[Recurrence::Gated, Recurrence::GatedDelta]),
            capacity: pick(rng, &[1, 2, 3, 5, 30, 64]),
            tau,
            merge: pick(rng, &[Merge::Density, Merge::Mass]),
            read: pick(rng, &[Read::Given, Read::Routed]),
            slot_order: pick(rng, &[SlotOrder::OldestFirst, SlotOrder::NewestFirst]),
            scale: rng.random_bool(0.2).then_some(0.5),
            qk_l2norm: rng.random_bool(0.3),
            soft,
        },
        batch: if packed { 1 } else { pick(rng, &[0, 1, 1, 1, 3]) },
        time,
        heads,
        value_heads,
        dk: pick(rng, &[1, 3, 8, 16]),
        dv: pick(rng, &[1, 3, 8, 16]),
        dtype: pick(rng, &[Dtype::F32, Dtype::Bf16, Dtype::F16]),
        logits: rng.random_bool(0.5),
        extra_columns: pick(rng, &[0, 0, 2]),
        packed: lengths,
        resumed: rng.random_bool(0.4),
        ..Recipe::default()
    }
}

/// A number that an extent might wrongly be.
fn extent(rng: &mut StdRng) -> usize {
    match rng.random_range(0..4) {
        0 => rng.random_range(0..70),
        1 => 1 << rng.random_range(20..64),
        2 => usize::MAX - rng.random_range(0..3),
        _ => (1usize << rng.random_range(28..34)).wrapping_add(rng.random_range(0..9)),
    }
}

/// What a wrong call owns beside the right one.
#[derive(Default)]
struct Kept(Vec<Bytes>);

/// Makes a buffer wrong; its bytes are there as far as it says.
fn spoil(rng: &mut StdRng, buffer: &mut Buffer, kept: &mut Kept) {
    let len = match rng.random_range(0..4) {
        0 => buffer.bytes.saturating_sub(pick(rng, &[1, 2, 4, 8])),
        1 => buffer.bytes + pick(rng, &[1, 2, 4, 8]),
        2 => rng.random_range(0..64),
        _ => buffer.bytes,
    };
    let mut bytes = Bytes::new(len + 8);
    rng.fill(bytes.get_mut());
    let shift = pick(rng, &[0, 0, 1, 2, 4]);
    // Exactly as long as said, so that a byte too far is one past its end.
    let exact = Bytes::of(&bytes.get()[..len]);
    *buffer = exact.buffer();
    if shift > 0 && len + shift <= len + 8 {
        *buffer = Buffer { data: bytes.buffer().data.wrapping_byte_add(shift), bytes: len };
    }
    if rng.random_bool(0.1) {
        buffer.data = std::ptr::null_mut();
    }
    if rng.random_bool(0.1) {
        *buffer = Buffer::ABSENT;
    }
    kept.0.push(bytes);
    kept.0.push(exact);
}

fn any_buffer<'a>(rng: &mut StdRng, call: &'a mut Call) -> &'a mut Buffer {
    let buffers = [
        &mut call.q,
        &mut call.k,
        &mut call.v,
        &mut call.g,
        &mut call.beta,
        &mut call.lambda,
        &mut call.route_slope,
        &mut call.route_bias,
        &mut call.route_logits,
        &mut call.tau,
        &mut call.events,
        &mut call.cu_seqlens,
    ];
    let index = rng.random_range(0..buffers.len());
    buffers.into_iter().nth(index).expect("one of them")
}

fn any_array<'a>(rng: &mut StdRng, arrays: &'a mut CacheArrays) -> &'a mut Buffer {
    let CacheArrays { states, len, tokens, drift, open, keys } = arrays;
    let buffers = [states, len, tokens, drift, open, keys];
    let index = rng.random_range(0..buffers.len());
    buffers.into_iter().nth(index).expect("one of them")
}

/// Makes one thing of a call wrong, or at least unusual.
fn mutate(
    rng: &mut StdRng,
    options: &mut CallOptions,
    call: &mut Call,
    arrays: &mut CacheArrays,
    kept: &mut Kept,
) {
    match rng.random_range(0..11) {
        0..3 => {
            let buffer = any_buffer(rng, call);
            spoil(rng, buffer, kept);
        }
        3 => {
            let buffer = any_array(rng, arrays);
            spoil(rng, buffer, kept);
        }
        4 => {
            let value = extent(rng);
            let extents = [
                &mut call.batch,
                &mut call.time,
                &mut call.heads,
                &mut call.value_heads,
                &mut call.dk,
                &mut call.dv,
                &mut call.sequences,
                &mut call.lambda_columns,
                &mut call.logit_columns,
            ];
            let index = rng.random_range(0..extents.len());
            *extents.into_iter().nth(index).expect("one of them") = value;
        }
        5 => {
            let value = pick(rng, &[-1, 0, 1, 2, 3, 64, 65, i32::MAX, i32::MIN]);
            let codes = [
                &mut options.recurrence,
                &mut options.merge,
                &mut options.read,
                &mut options.slot_order,
                &mut options.capacity,
                &mut options.qk_l2norm,
                &mut call.dtype,
                &mut call.device,
                &mut call.ordinal,
            ];
            let index = rng.random_range(0..codes.len());
            *codes.into_iter().nth(index).expect("one of them") = value;
        }
        6 => {
            let value = pick(rng, &[f32::NAN, f32::INFINITY, -1.0, 0.0, 1e30, f32::MIN_POSITIVE]);
            let numbers = [&mut options.tau, &mut options.scale, &mut options.soft_temperature];
            let index = rng.random_range(0..numbers.len());
            *numbers.into_iter().nth(index).expect("one of them") = value;
        }
        7 => {
            // A log of few different events has a chance to be possible.
            let tokens = call.batch.saturating_mul(call.time).saturating_mul(call.value_heads).min(4096);
            let most = pick(rng, &[1, 2, 4, 255]);
            let mut log = Bytes::new(tokens);
            log.get_mut().iter_mut().for_each(|event| *event = rng.random_range(0..=most));
            call.events = log.buffer();
            kept.0.push(log);
        }
        8 => {
            let count = rng.random_range(0..5);
            let offsets: Vec<i64> = (0..count).map(|_| rng.random_range(-2..12)).collect();
            let offsets = Bytes::of(&offsets);
            call.cu_seqlens = offsets.buffer();
            call.sequences = pick(rng, &[count.max(1) - 1, count, 0]);
            kept.0.push(offsets);
        }
        9 => call.size = pick(rng, &[0, 8, call.size.wrapping_sub(8), call.size.wrapping_add(8), usize::MAX]),
        _ => {
            options.size =
                pick(rng, &[0, 8, options.size.wrapping_sub(4), options.size.wrapping_add(8), usize::MAX])
        }
    }
}

/// Bytes that a refused call must leave as they are.
const POISON: u8 = 0x5a;

fn poisoned(len: usize) -> Bytes {
    let mut bytes = Bytes::new(len);
    bytes.get_mut().fill(POISON);
    bytes
}

#[test]
fn wrong_calls_are_refused() {
    let number = |name: &str, default: u64| {
        std::env::var(name)
            .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}: {value}")))
    };
    let (calls, first) =
        (number("DLA_FUZZ_CALLS", 100_000), number("DLA_FUZZ_SEED", rand::random::<u32>().into()));
    println!("DLA_FUZZ_SEED={first}");
    let mut counts: BTreeMap<(&str, i32), u64> = BTreeMap::new();
    let mut made = 0;
    for seed in first.. {
        if made >= calls {
            break;
        }
        made += one(seed, &mut counts);
    }
    let done: u64 = counts.iter().filter(|((_, status), _)| *status == 0).map(|(_, count)| count).sum();
    println!("{made} calls, {done} of them done; by function and status: {counts:?}");
    assert!(done > calls / 20, "too few calls get through to say anything");
}

/// Draws a call, spoils it or not, and makes it; how many calls that were.
fn one(seed: u64, counts: &mut BTreeMap<(&'static str, i32), u64>) -> u64 {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let recipe = recipe(rng);
    let case = recipe.draw(seed);
    let mut owned = Owned::of(&case);
    let sequences = recipe.packed.as_ref().map_or(recipe.batch, Vec::len);
    let shape = dla::Shape {
        batch: recipe.batch,
        time: recipe.time,
        heads: recipe.heads,
        value_heads: recipe.value_heads,
        dk: recipe.dk,
        dv: recipe.dv,
        capacity: recipe.options.capacity,
        sequences,
    };
    let (tokens, width) = (shape.tokens() * shape.value_heads, recipe.dtype.bytes());
    let routed = recipe.options.read == Read::Routed;
    let mut outputs = [
        poisoned(tokens * shape.dv * width),
        poisoned(tokens * 4),
        poisoned(tokens),
        poisoned(tokens * shape.capacity * 4),
    ];
    let last = CacheBytes::of(&Cache::empty(shape.cache_dims(), recipe.options.read));
    let last_arrays = last.arrays();
    let mut results = Results {
        o: outputs[0].buffer(),
        drift: if rng.random_bool(0.5) { outputs[1].buffer() } else { Buffer::ABSENT },
        events: outputs[2].buffer(),
        lambda: if routed { outputs[3].buffer() } else { Buffer::ABSENT },
        cache: if rng.random_bool(0.5) { &last_arrays } else { null() },
        ..Results::default()
    };

    let mut kept = Kept::default();
    let wrong = rng.random_range(0..3);
    let Owned { options, call, arrays, .. } = &mut *owned;
    if !call.cache.is_null() {
        call.cache = &raw const *arrays;
    }
    for _ in 0..wrong {
        mutate(rng, options, call, arrays, &mut kept);
    }
    // Without tokens no buffer is too short for any extents, and heads without number are honest work.
    if call.batch == 0 || call.time == 0 {
        for extent in [&mut call.heads, &mut call.value_heads, &mut call.dk, &mut call.dv, &mut call.batch] {
            *extent %= 70;
        }
    }
    let mut spoilt = wrong > 0;
    if rng.random_bool(0.05) {
        let buffer = if rng.random_bool(0.5) { &mut results.o } else { &mut results.events };
        spoil(rng, buffer, &mut kept);
        spoilt = true;
    }
    let mut made = 0;
    let mut told = |name: &'static str, status: Status, right: bool| {
        made += 1;
        *counts.entry((name, status as i32)).or_default() += 1;
        let told = if status == Status::Ok { String::new() } else { message() };
        assert!(status != Status::Internal, "seed {seed}, {name}: {told}");
        assert!(!right || status == Status::Ok, "seed {seed}, {name}: {told}");
        if status != Status::Ok {
            let named =
                told.split_once(": ").is_some_and(|(name, rest)| !name.is_empty() && !rest.is_empty());
            assert!(named && !told.contains('\n'), "seed {seed}, {name}: {told:?}");
        }
        status == Status::Ok
    };

    // Not of extents that name more than a test should take.
    let small = [call.dk, call.dv, call.sequences, call.batch, call.value_heads].iter().all(|&x| x < 1000);
    if small && rng.random_bool(0.25) {
        (call.cache, results.cache) = (if rng.random_bool(0.05) { call.cache } else { null() }, null());
        let (count, states) = (pick(rng, &[0, 1, 3, 3, 4]), pick(rng, &[0, 0, 0, 0, 1, 2]));
        let right = !spoilt && states == 0 && call.cache.is_null();
        let mut handle = std::ptr::null_mut();
        // SAFETY: what is not null is as long as it says, here and below.
        let status = unsafe { dla_entries_create(options, call, count, states, &mut handle) };
        if !told("entries_create", status, right) {
            return made;
        }
        let taken = rng.random_range(0..=count + 1);
        for n in 0..taken {
            let mut entry = usize::MAX;
            // SAFETY: as above.
            told("entries_take", unsafe { dla_entries_take(handle, &mut entry) }, n < count);
        }
        let rows = if rng.random_bool(0.9) { sequences } else { rng.random_range(0..5) };
        let list: Vec<usize> =
            (0..rows).map(|n| if rng.random_bool(0.9) { n } else { extent(rng) }).collect();
        let right =
            right && rows == sequences && rows <= taken.min(count) && list.iter().copied().eq(0..rows);
        let (at, steps) = (list.as_ptr(), rng.random_bool(0.5));
        // SAFETY: as above.
        unsafe {
            let done = if steps {
                let right =
                    right && (1..=dla::MOST_STEP_TOKENS).contains(&recipe.time) && recipe.packed.is_none();
                told("entries_step", dla_entries_step(handle, options, call, at, rows, &results), right)
            } else {
                let mut bytes = 0;
                let asked = dla_entries_prefill_workspace(handle, options, call, &results, &mut bytes);
                told("entries_prefill_workspace", asked, right);
                let status = dla_entries_prefill(handle, options, call, at, at, rows, &results);
                told("entries_prefill", status, right)
            };
            for output in outputs.iter().filter(|_| !done) {
                assert!(output.get().iter().all(|&byte| byte == POISON), "seed {seed}: written, and refused");
            }
            let exported = dla_entries_export(handle, at, rows, &last_arrays);
            told("entries_export", exported, right);
            let import = if rng.random_bool(0.5) { last_arrays } else { *arrays };
            told("entries_import", dla_entries_import(handle, at, rows, &import), false);
            let (one, other) = (rng.random_range(0..5), rng.random_range(0..5));
            let batch = if rng.random_bool(0.9) { one } else { extent(rng) };
            told("entries_set_rows", dla_entries_set_rows(handle, batch, at, rows), false);
            told("entries_copy", dla_entries_copy(handle, one, other), false);
            told("entries_reset", dla_entries_reset(handle, one), one < taken.min(count));
            told("entries_release", dla_entries_release(handle, other), other < taken.min(count));
            told("entries_take", dla_entries_take(handle, &mut 0), false);
            dla_entries_destroy(handle);
        }
        return made;
    }

    // SAFETY: what is not null is as long as it says.
    unsafe {
        let mut bytes = 0;
        told("forward_workspace", dla_forward_workspace(options, call, &results, &mut bytes), !spoilt);
        let steps = recipe.time == 1 && recipe.packed.is_none();
        if steps && rng.random_bool(0.5) {
            let mut stepped = *call;
            stepped.cache = null();
            results.cache = null();
            let before = Cache::empty(shape.cache_dims(), recipe.options.read);
            let fresh = CacheBytes::of(&before);
            let mut states = if call.cache.is_null() { fresh.arrays() } else { *arrays };
            if rng.random_bool(0.1) {
                let buffer = any_array(rng, &mut states);
                spoil(rng, buffer, &mut kept);
                spoilt = true;
            }
            told("step", dla_step(options, &stepped, &states, &results), !spoilt);
            return made;
        }
        if !told("forward", dla_forward(options, call, &results), !spoilt) {
            for output in &mut outputs {
                assert!(output.get().iter().all(|&byte| byte == POISON), "seed {seed}: written, and refused");
            }
        }
        let gradients = [
            poisoned(shape.tokens() * shape.heads * shape.dk * width),
            poisoned(tokens * shape.dv * width),
            poisoned(tokens * 4),
        ];
        let mut wanted = Gradients {
            q: gradients[0].buffer(),
            v: gradients[1].buffer(),
            g: if recipe.decay.is_some() { gradients[2].buffer() } else { Buffer::ABSENT },
            ..Gradients::default()
        };
        let upstream = Upstream { o: outputs[0].buffer(), ..Upstream::default() };
        let mut replay = *call;
        // The log of a forward that was refused is poison: an event like any other.
        replay.events = outputs[2].buffer();
        if rng.random_bool(0.1) {
            spoil(rng, &mut wanted.v, &mut kept);
            spoilt = true;
        }
        if !spoilt {
            outputs[0].get_mut().fill(0);
        }
        let asked = dla_backward_workspace(options, &replay, &upstream, &wanted, &mut bytes);
        told("backward_workspace", asked, !spoilt);
        told("backward", dla_backward(options, &replay, &upstream, &wanted), !spoilt);
        let mut handle = std::ptr::null_mut();
        if small && told("cache_create", dla_cache_create(options, call, &mut handle), false) {
            let mut view = CacheArrays::ABSENT;
            told("cache_view", dla_cache_view(handle, &mut view), true);
            dla_cache_destroy(handle);
        }
    }
    made
}
