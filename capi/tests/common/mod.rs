//! A drawn case as a caller of the C ABI has it: arrays of exactly the bytes that they must have.
#![allow(dead_code)]

use dla::check::{Case, CaseRoute};
use dla::{
    Buffer as Elements, Cache, CacheGradients, Dtype, Merge, Options, Read, Recurrence, SlotOrder, Tau,
};
use dla_capi::*;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{CStr, c_void};

/// Bytes on the heap, aligned to 16 and nowhere longer than said.
pub struct Bytes {
    at: *mut u8,
    len: usize,
}

impl Bytes {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), 16).expect("a layout")
    }

    pub fn new(len: usize) -> Bytes {
        // SAFETY: of one byte or more.
        Bytes { at: unsafe { alloc_zeroed(Bytes::layout(len)) }, len }
    }

    pub fn of<T: Copy>(x: &[T]) -> Bytes {
        let bytes = Bytes::new(size_of_val(x));
        // SAFETY: as long as the source.
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr().cast(), bytes.at, bytes.len) };
        bytes
    }

    pub fn of_elements(x: &Elements) -> Bytes {
        match x {
            Elements::F32(x) => Bytes::of(x),
            Elements::Bf16(x) => Bytes::of(x),
            Elements::F16(x) => Bytes::of(x),
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn get(&self) -> &[u8] {
        // SAFETY: as long as said, and initialised.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    pub fn get_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    pub fn buffer(&self) -> Buffer {
        Buffer { data: self.at.cast::<c_void>(), bytes: self.len }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        self.get().chunks_exact(4).map(|x| f32::from_ne_bytes(x.try_into().unwrap())).collect()
    }

    pub fn to_u32(&self) -> Vec<u32> {
        self.get().chunks_exact(4).map(|x| u32::from_ne_bytes(x.try_into().unwrap())).collect()
    }

    pub fn to_elements(&self, dtype: Dtype) -> Elements {
        let halves = || self.get().chunks_exact(2).map(|x| u16::from_ne_bytes(x.try_into().unwrap()));
        match dtype {
            Dtype::F32 => Elements::F32(self.to_f32()),
            Dtype::Bf16 => Elements::Bf16(halves().map(half::bf16::from_bits).collect()),
            Dtype::F16 => Elements::F16(halves().map(half::f16::from_bits).collect()),
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: allocated above, with this layout.
        unsafe { dealloc(self.at, Bytes::layout(self.len)) };
    }
}

pub fn buffer(bytes: &Option<Bytes>) -> Buffer {
    bytes.as_ref().map_or(Buffer::ABSENT, Bytes::buffer)
}

/// Arrays of a cache.
pub struct CacheBytes {
    pub states: Bytes,
    pub len: Bytes,
    pub tokens: Bytes,
    pub drift: Bytes,
    pub open: Bytes,
    pub keys: Option<Bytes>,
}

impl CacheBytes {
    pub fn of(cache: &Cache) -> CacheBytes {
        CacheBytes {
            states: Bytes::of(&cache.states),
            len: Bytes::of(&cache.len),
            tokens: Bytes::of(&cache.tokens),
            drift: Bytes::of(&cache.drift),
            open: Bytes::of(&cache.open),
            keys: cache.keys.as_ref().map(|keys| Bytes::of(keys)),
        }
    }

    pub fn of_gradients(cache: &CacheGradients) -> CacheBytes {
        CacheBytes {
            states: Bytes::of(&cache.states),
            len: Bytes::new(0),
            tokens: Bytes::new(0),
            drift: Bytes::new(0),
            open: Bytes::of(&cache.open),
            keys: cache.keys.as_ref().map(|keys| Bytes::of(keys)),
        }
    }

    pub fn arrays(&self) -> CacheArrays {
        CacheArrays {
            states: self.states.buffer(),
            len: self.len.buffer(),
            tokens: self.tokens.buffer(),
            drift: self.drift.buffer(),
            open: self.open.buffer(),
            keys: buffer(&self.keys),
        }
    }

    pub fn gradients(&self) -> CacheArrays {
        CacheArrays {
            states: self.states.buffer(),
            open: self.open.buffer(),
            keys: buffer(&self.keys),
            ..CacheArrays::ABSENT
        }
    }
}

pub fn options(options: &Options) -> CallOptions {
    CallOptions {
        size: size_of::<CallOptions>(),
        recurrence: (options.recurrence == Recurrence::GatedDelta).into(),
        merge: (options.merge == Merge::Mass).into(),
        read: (options.read == Read::Routed).into(),
        slot_order: (options.slot_order == SlotOrder::NewestFirst).into(),
        capacity: options.capacity as i32,
        qk_l2norm: options.qk_l2norm.into(),
        tau: if let Tau::PerCall(tau) = options.tau { tau } else { f32::NAN },
        scale: options.scale.unwrap_or(f32::NAN),
        soft_temperature: options.soft.map_or(0.0, |soft| soft.temperature),
        soft_through_drift: options.soft.is_some_and(|soft| soft.through_drift).into(),
    }
}

/// Arguments.
pub struct Owned {
    pub q: Bytes,
    pub k: Bytes,
    pub v: Bytes,
    pub g: Option<Bytes>,
    pub beta: Option<Bytes>,
    pub lambda: Option<Bytes>,
    pub slope: Option<Bytes>,
    pub bias: Option<Bytes>,
    pub logits: Option<Bytes>,
    pub tau: Option<Bytes>,
    pub cu_seqlens: Option<Bytes>,
    pub cache: Option<CacheBytes>,
    pub arrays: CacheArrays,
    pub options: CallOptions,
    pub call: Call,
}

impl Owned {
    pub fn of(case: &Case) -> Box<Owned> {
        let recipe = &case.recipe;
        let floats = |x: &Option<Vec<f32>>| x.as_ref().map(|x| Bytes::of(x));
        let route = |get: fn(&CaseRoute) -> &Vec<f32>| case.route.as_ref().map(|route| Bytes::of(get(route)));
        let columns = recipe.options.capacity + recipe.extra_columns;
        let mut owned = Box::new(Owned {
            q: Bytes::of_elements(&case.q),
            k: Bytes::of_elements(&case.k),
            v: Bytes::of_elements(&case.v),
            g: floats(&case.g),
            beta: floats(&case.beta),
            lambda: floats(&case.lambda),
            slope: route(|route| &route.slope),
            bias: route(|route| &route.bias),
            logits: case.route.as_ref().and_then(|route| floats(&route.logits)),
            tau: if let Tau::PerHead(taus) = &recipe.options.tau { Some(Bytes::of(taus)) } else { None },
            cu_seqlens: case.cu_seqlens.as_ref().map(|offsets| Bytes::of(offsets)),
            cache: case.cache.as_ref().map(CacheBytes::of),
            arrays: CacheArrays::ABSENT,
            options: options(&recipe.options),
            call: Call::default(),
        });
        if let Some(cache) = &owned.cache {
            owned.arrays = cache.arrays();
        }
        owned.call = Call {
            dtype: recipe.dtype as i32,
            batch: recipe.batch,
            time: recipe.time,
            heads: recipe.heads,
            value_heads: recipe.value_heads,
            dk: recipe.dk,
            dv: recipe.dv,
            sequences: recipe.packed.as_ref().map_or(0, Vec::len),
            lambda_columns: columns,
            logit_columns: columns,
            q: owned.q.buffer(),
            k: owned.k.buffer(),
            v: owned.v.buffer(),
            g: buffer(&owned.g),
            beta: buffer(&owned.beta),
            lambda: buffer(&owned.lambda),
            route_slope: buffer(&owned.slope),
            route_bias: buffer(&owned.bias),
            route_logits: buffer(&owned.logits),
            tau: buffer(&owned.tau),
            cu_seqlens: buffer(&owned.cu_seqlens),
            cache: if owned.cache.is_some() { &raw const owned.arrays } else { std::ptr::null() },
            ..Call::default()
        };
        owned
    }
}

/// The message of the last call that failed.
pub fn message() -> String {
    // SAFETY: a string of this thread.
    unsafe { CStr::from_ptr(dla_error_message()) }.to_str().expect("UTF-8").to_owned()
}
