//! A cache that the library holds, for callers without memory of their own.

use crate::call::{Parsed, Place};
use crate::status::Outcome;
use crate::types::{Buffer, CacheArrays, Status};
use crate::{Failure, cuda};
use dla::Read;
use std::ffi::c_void;

/// States of N sequences: see `dla_cache_create`.
pub struct CacheHandle {
    arrays: CacheArrays,
    /// What `arrays` points into; freed with the handle.
    _memory: Memory,
}

enum Memory {
    /// u64, for the sake of alignment.
    Host {
        _words: Vec<u64>,
    },
    Gpu {
        _memory: dla::cuda::Memory,
    },
}

/// Alignment of the arrays.
const ALIGNMENT: usize = 256;

impl CacheHandle {
    pub(crate) fn new(parsed: &Parsed<'_>) -> Outcome<CacheHandle> {
        let dims = parsed.dims();
        let (rows, slots) = (dims.rows(), dims.rows() * dims.capacity);
        let keys = if parsed.options.read == Read::Routed { rows * dims.key_bank() } else { 0 };
        let elements = [rows * dims.bank(), rows, slots, slots, rows * dims.state(), keys];
        let mut end = 0usize;
        let places = elements.map(|elements| {
            let at = end;
            end = end.saturating_add(elements.saturating_mul(4)).saturating_add(ALIGNMENT - 1)
                & !(ALIGNMENT - 1);
            at
        });
        let (memory, base) = match parsed.place {
            Place::Cuda { .. } => {
                let memory = cuda::zeros(parsed, end)?;
                let base = memory.address() as usize;
                (Memory::Gpu { _memory: memory }, base)
            }
            Place::Cpu => {
                let count = (end.saturating_add(ALIGNMENT)) / 8;
                let mut words: Vec<u64> = Vec::new();
                words.try_reserve_exact(count).map_err(|_| Failure {
                    status: Status::Memory,
                    message: format!("cache: out of memory: {end} bytes asked for"),
                })?;
                words.resize(count, 0);
                let base = words.as_mut_ptr().expose_provenance().next_multiple_of(ALIGNMENT);
                (Memory::Host { _words: words }, base)
            }
        };
        let mut buffers = places.iter().zip(elements).map(|(&at, elements)| Buffer {
            data: std::ptr::with_exposed_provenance_mut::<c_void>(base + at),
            bytes: elements * 4,
        });
        let mut next = || buffers.next().unwrap_or(Buffer::ABSENT);
        let [states, len, tokens, drift, open] = [next(), next(), next(), next(), next()];
        let keys = if keys > 0 { next() } else { Buffer::ABSENT };
        Ok(CacheHandle { arrays: CacheArrays { states, len, tokens, drift, open, keys }, _memory: memory })
    }

    pub(crate) fn arrays(&self) -> CacheArrays {
        self.arrays
    }
}
