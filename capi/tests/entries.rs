//! Entries through the C ABI on the CPU: steps give what the forward gives over the same tokens; what is refused names the
//! argument and changes nothing.

mod common;

use common::{Bytes, CacheBytes, Owned, message};
use dla::check::{Case, Recipe, relative_error};
use dla::{Cache, Dtype, Engine, Options, Read, Recurrence, Tau, cpu};
use dla_capi::*;
use std::ptr::{null, null_mut};

/// A handle, destroyed when dropped.
struct Held(*mut EntriesHandle);

impl Held {
    fn new(owned: &Owned, count: usize) -> Held {
        let mut at = null_mut();
        // SAFETY: structs are as they say, here and below.
        let status = unsafe { dla_entries_create(&owned.options, &owned.call, count, 0, &mut at) };
        assert_eq!(status, Status::Ok, "{}", message());
        Held(at)
    }

    fn take(&self) -> usize {
        let mut entry = usize::MAX;
        // SAFETY: as above.
        assert_eq!(unsafe { dla_entries_take(self.0, &mut entry) }, Status::Ok, "{}", message());
        entry
    }

    fn step(&self, owned: &Owned, list: &[usize], results: &Results) -> Status {
        // SAFETY: as above.
        unsafe { dla_entries_step(self.0, &owned.options, &owned.call, list.as_ptr(), list.len(), results) }
    }

    fn export(&self, list: &[usize], like: &Cache) -> CacheBytes {
        let to = CacheBytes::of(&Cache::empty(
            like.dims,
            if like.keys.is_some() { Read::Routed } else { Read::Given },
        ));
        // SAFETY: as above.
        let status = unsafe { dla_entries_export(self.0, list.as_ptr(), list.len(), &to.arrays()) };
        assert_eq!(status, Status::Ok, "{}", message());
        to
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: of this library, destroyed once.
        unsafe { dla_entries_destroy(self.0) };
    }
}

fn same(name: &str, x: &[f32], expected: &[f32]) {
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (error, worst) = relative_error(&wide(x), &wide(expected));
    assert!(error <= 1e-5, "{name}: off by {error:.2e}, most at element {worst}");
}

fn same_cache(given: &CacheBytes, expected: &Cache) {
    assert_eq!(given.len.to_u32(), expected.len);
    assert_eq!(given.tokens.to_u32(), expected.tokens);
    same("states", &given.states.to_f32(), &expected.states);
    same("open", &given.open.to_f32(), &expected.open);
    if let (Some(given), Some(expected)) = (&given.keys, &expected.keys) {
        same("keys", &given.to_f32(), expected);
    }
}

/// Tokens `from..to` of every batch entry, rows of `width` bytes.
fn part(x: &[u8], batch: usize, time: usize, from: usize, to: usize) -> Bytes {
    let width = x.len() / (batch * time);
    let rows = (0..batch).flat_map(|b| x[(b * time + from) * width..(b * time + to) * width].to_vec());
    Bytes::of(&rows.collect::<Vec<u8>>())
}

/// The call of tokens `from..to`.
fn cut(case: &Case, from: usize, to: usize) -> Box<Owned> {
    let mut owned = Owned::of(case);
    let (batch, time) = (case.recipe.batch, case.recipe.time);
    let part = |x: &Bytes| part(x.get(), batch, time, from, to);
    let some = |x: &Option<Bytes>| x.as_ref().map(part);
    let (q, k, v) = (part(&owned.q), part(&owned.k), part(&owned.v));
    let (g, beta, lambda, logits) =
        (some(&owned.g), some(&owned.beta), some(&owned.lambda), some(&owned.logits));
    owned.call = Call {
        time: to - from,
        q: q.buffer(),
        k: k.buffer(),
        v: v.buffer(),
        g: common::buffer(&g),
        beta: common::buffer(&beta),
        lambda: common::buffer(&lambda),
        route_logits: common::buffer(&logits),
        ..owned.call
    };
    (owned.q, owned.k, owned.v) = (q, k, v);
    (owned.g, owned.beta, owned.lambda, owned.logits) = (g, beta, lambda, logits);
    owned
}

fn recipes() -> Vec<Recipe> {
    let base = Recipe { batch: 3, time: 23, value_heads: 2, boundary_rate: 0.6, ..Recipe::default() };
    let capacity = |capacity| Options { capacity, ..Options::default() };
    vec![
        Recipe { options: capacity(4), ..base.clone() },
        Recipe {
            options: Options {
                recurrence: Recurrence::GatedDelta,
                read: Read::Routed,
                tau: Tau::PerHead(vec![0.5, 0.7]),
                qk_l2norm: true,
                ..capacity(3)
            },
            logits: true,
            dtype: Dtype::F32,
            ..base
        },
    ]
}

#[test]
fn steps_and_prefills_are_the_forwards() {
    for recipe in recipes() {
        let seed = rand::random_range(0..1u64 << 40);
        let case = recipe.draw(seed);
        println!("{}, seed {seed}", case.describe());
        let expected = cpu::Engine.forward(&case.problem().unwrap()).unwrap();
        let dla::Buffer::F32(wanted) = &expected.o else { panic!("f32") };
        let held = Held::new(&cut(&case, 0, 1), 5);
        let entries: Vec<usize> = (0..5).map(|_| held.take()).collect();
        let list = [entries[4], entries[0], entries[2]];
        // 6 tokens by a prefill, the rest by steps of every length.
        let width = recipe.value_heads * recipe.dv;
        let (mut from, mut turn) = (0, 0);
        while from < recipe.time {
            let to = if from == 0 { 6 } else { recipe.time.min(from + 1 + turn % 8) };
            let owned = cut(&case, from, to);
            let o = Bytes::new(recipe.batch * (to - from) * width * 4);
            let results = Results { o: o.buffer(), ..Results::default() };
            let status = if from == 0 {
                let (list, call) = (list.as_ptr(), &owned.call);
                let mut bytes = usize::MAX;
                // SAFETY: as above.
                unsafe {
                    let query =
                        dla_entries_prefill_workspace(held.0, &owned.options, call, &results, &mut bytes);
                    assert_eq!((query, bytes), (Status::Ok, 0));
                    dla_entries_prefill(held.0, &owned.options, call, list, list, 3, &results)
                }
            } else {
                held.step(&owned, &list, &results)
            };
            assert_eq!(status, Status::Ok, "{}", message());
            for b in 0..recipe.batch {
                let rows = (b * recipe.time + from) * width..(b * recipe.time + to) * width;
                let given = o.to_f32();
                let each = given.len() / recipe.batch;
                same("o", &given[b * each..][..each], &wanted[rows]);
            }
            (from, turn) = (to, turn + 3);
        }
        let last = held.export(&list, &expected.cache);
        same_cache(&last, &expected.cache);

        // In by other entries and out again; copied; forgotten.
        let other = [entries[1], entries[3], entries[4]];
        // SAFETY: as above.
        unsafe {
            let status = dla_entries_import(held.0, other.as_ptr(), 3, &last.arrays());
            assert_eq!(status, Status::Ok, "{}", message());
            same_cache(&held.export(&other, &expected.cache), &expected.cache);
            assert_eq!(dla_entries_copy(held.0, other[0], other[2]), Status::Ok);
            assert_eq!(dla_entries_reset(held.0, other[0]), Status::Ok);
        }
        let moved = held.export(&other, &expected.cache);
        let (each, half) = (recipe.value_heads, expected.cache.len.len() / 3);
        assert_eq!(moved.len.to_u32()[..each], vec![0; each]);
        assert_eq!(moved.len.to_u32()[2 * half..], expected.cache.len[..half]);
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let recipe = Recipe { time: 2, ..recipes()[0].clone() };
    let case = recipe.draw(3);
    let held = Held::new(&cut(&case, 0, 1), 4);
    let entries: Vec<usize> = (0..4).map(|_| held.take()).collect();
    let o = Bytes::new(3 * 2 * 2 * 16 * 4);
    let results = Results { o: o.buffer(), ..Results::default() };
    let owned = Owned::of(&case);
    let list = [entries[0], entries[1], entries[2]];
    assert_eq!(held.step(&owned, &list, &results), Status::Ok, "{}", message());
    let like = Cache::empty(case.problem().unwrap().shape().cache_dims(), Read::Given);
    let before = held.export(&list, &like);
    let unchanged = || {
        let after = held.export(&list, &like);
        assert_eq!(before.states.get(), after.states.get());
        assert_eq!(before.tokens.get(), after.tokens.get());
        assert!(o.get().iter().all(|&x| x == 0xa5), "a refused call wrote");
    };
    // SAFETY: as long as said.
    unsafe { o.buffer().data.cast::<u8>().write_bytes(0xa5, o.len()) };
    let refused = |status: Status, parts: &[&str], list: &[usize], change: &dyn Fn(&mut Owned)| {
        let mut owned = Owned::of(&case);
        change(&mut owned);
        assert_eq!(held.step(&owned, list, &results), status, "{}", message());
        for part in parts {
            assert!(message().contains(part), "{:?} does not say {part:?}", message());
        }
        unchanged();
    };
    let kept: &dyn Fn(&mut Owned) = &|_| {};
    refused(Status::Value, &["entries: ", "entry 4", "row 1"], &[0, 4, 2], kept);
    refused(Status::Value, &["entries: ", "no row before", "row 2"], &[0, 1, 0], kept);
    refused(Status::Shape, &["entries: ", "one entry a row, 3"], &[0, 1], kept);
    refused(Status::Unexpected, &["dk is not that of the entries"], &list, &|owned| {
        owned.call.dk = 8;
        (owned.call.q.bytes, owned.call.k.bytes) = (owned.call.q.bytes / 2, owned.call.k.bytes / 2);
    });
    refused(Status::Unexpected, &["capacity"], &list, &|owned| {
        // Columns there are more than the weights have: lambda is as wide as before.
        (owned.options.capacity, owned.call.lambda_columns) = (3, 4);
    });
    refused(Status::Shape, &["q: ", "384 bytes"], &list, &|owned| owned.call.time = 2 * 3);
    refused(Status::Option, &["device: "], &list, &|owned| owned.call.device = DeviceCode::Cuda as i32);
    refused(Status::Unexpected, &["cache"], &list, &|owned| {
        owned.arrays = before.arrays();
        owned.call.cache = &raw const owned.arrays;
    });
    // SAFETY: structs are as they say, or null, which is refused.
    unsafe {
        assert_eq!(dla_entries_take(held.0, &mut 0), Status::Value);
        assert!(message().contains("all 4 are taken"), "{}", message());
        assert_eq!(dla_entries_release(held.0, 3), Status::Ok);
        assert_eq!(dla_entries_release(held.0, 3), Status::Value);
        assert_eq!(dla_entries_reset(held.0, 9), Status::Value);
        assert_eq!(dla_entries_copy(held.0, 0, 3), Status::Value);
        assert_eq!(dla_entries_set_rows(held.0, 2, list.as_ptr(), 3), Status::Shape);
        assert_eq!(dla_entries_step(null_mut(), null(), null(), null(), 0, null()), Status::Missing);
        assert_eq!(dla_entries_export(held.0, null(), 3, &before.arrays()), Status::Missing);
        assert!(message().contains("entries: "), "{}", message());
        dla_entries_destroy(null_mut());
        let (mut at, mut large) = (null_mut(), owned.call);
        for (count, states, status) in
            [(usize::MAX / 2, 0, Status::Shape), (4, 7, Status::Option), (4, 1, Status::Option)]
        {
            assert_eq!(dla_entries_create(&owned.options, &large, count, states, &mut at), status);
            assert!(at.is_null());
        }
        large.dk = 0;
        assert_eq!(dla_entries_create(&owned.options, &large, 4, 0, &mut at), Status::Shape);
    }
    refused(Status::Value, &["entry 3", "taken"], &[0, 1, 3], kept);
    assert_eq!(held.take(), 3);
}
