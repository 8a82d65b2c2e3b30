//! The state cache: what a sequence leaves behind and resumes from (OPERATOR.md, section 5).

use crate::error::{Error, Result};
use crate::events::Ledger;
use crate::options::Read;
use crate::problem::Shape;

/// States of N sequences, chronological: slot 0 is the oldest, unused slots are zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Cache {
    /// Sequences N, value heads HV, capacity M, dk, dv.
    pub dims: CacheDims,
    /// Slot states S, `[N,HV,M,dk,dv]`.
    pub states: Vec<f32>,
    /// Slots held m, `[N,HV]`.
    pub len: Vec<u32>,
    /// Tokens n of every slot, `[N,HV,M]`.
    pub tokens: Vec<u32>,
    /// Summed drift J of every slot in units of 2^-12, `[N,HV,M]`.
    pub drift: Vec<u32>,
    /// The open segment's plain decayed sum R, `[N,HV,dk,dv]`.
    pub open: Vec<f32>,
    /// Key sums of every slot, `[N,HV,M,dk]`: with routed reads.
    pub keys: Option<Vec<f32>>,
}

/// Extents of a [`Cache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheDims {
    /// Sequences, N.
    pub sequences: usize,
    /// Value heads, HV.
    pub value_heads: usize,
    /// Most slots, M.
    pub capacity: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
}

impl CacheDims {
    /// Sequence-heads, N x HV.
    pub fn rows(&self) -> usize {
        self.sequences * self.value_heads
    }

    /// Elements of one slot's state.
    pub fn state(&self) -> usize {
        self.dk * self.dv
    }

    /// Elements of one sequence-head's states.
    pub fn bank(&self) -> usize {
        self.capacity * self.state()
    }

    /// Elements of one sequence-head's key sums.
    pub fn key_bank(&self) -> usize {
        self.capacity * self.dk
    }
}

impl Cache {
    /// A cache of sequences that have not begun.
    pub fn empty(dims: CacheDims, read: Read) -> Self {
        let rows = dims.rows();
        Cache {
            dims,
            states: vec![0.0; rows * dims.bank()],
            len: vec![0; rows],
            tokens: vec![0; rows * dims.capacity],
            drift: vec![0; rows * dims.capacity],
            open: vec![0.0; rows * dims.state()],
            keys: (read == Read::Routed).then(|| vec![0.0; rows * dims.key_bank()]),
        }
    }

    /// All of it, to be changed in place.
    pub fn view_mut(&mut self) -> CacheMut<'_> {
        let Cache { dims, states, len, tokens, drift, open, keys } = self;
        CacheMut { dims: *dims, states, len, tokens, drift, open, keys: keys.as_deref_mut() }
    }

    /// Checks the cache against itself and against the call that wants to resume from it.
    pub(crate) fn validate(&self, shape: &Shape, read: Read) -> Result<()> {
        self.view().validate(shape, read)
    }

    pub(crate) fn view(&self) -> CacheRef<'_> {
        let Cache { dims, states, len, tokens, drift, open, keys } = self;
        CacheRef { dims: *dims, states, len, tokens, drift, open, keys: keys.as_deref() }
    }
}

/// A [`Cache`] whose arrays belong to someone else, to be changed in place.
#[derive(Debug)]
pub struct CacheMut<'a> {
    /// Extents.
    pub dims: CacheDims,
    /// Slot states, `[N,HV,M,dk,dv]`.
    pub states: &'a mut [f32],
    /// Slots held, `[N,HV]`.
    pub len: &'a mut [u32],
    /// Tokens of every slot, `[N,HV,M]`.
    pub tokens: &'a mut [u32],
    /// Summed drift of every slot in units of 2^-12, `[N,HV,M]`.
    pub drift: &'a mut [u32],
    /// The open segment's plain decayed sum, `[N,HV,dk,dv]`.
    pub open: &'a mut [f32],
    /// Key sums of every slot, `[N,HV,M,dk]`: with routed reads.
    pub keys: Option<&'a mut [f32]>,
}

impl CacheMut<'_> {
    pub(crate) fn view(&self) -> CacheRef<'_> {
        let CacheMut { dims, states, len, tokens, drift, open, keys } = self;
        CacheRef { dims: *dims, states, len, tokens, drift, open, keys: keys.as_deref() }
    }
}

/// The arrays of a [`Cache`], borrowed.
#[derive(Clone, Copy)]
pub(crate) struct CacheRef<'a> {
    dims: CacheDims,
    states: &'a [f32],
    len: &'a [u32],
    tokens: &'a [u32],
    drift: &'a [u32],
    open: &'a [f32],
    keys: Option<&'a [f32]>,
}

impl CacheRef<'_> {
    /// The slots that `row = sequence x HV + head` holds.
    pub(crate) fn ledger(&self, row: usize) -> Ledger {
        let slots = row * self.dims.capacity..(row + 1) * self.dims.capacity;
        Ledger::resume(self.len[row] as usize, &self.tokens[slots.clone()], &self.drift[slots])
    }

    /// Checks the cache against itself and against the call that wants to resume from it.
    pub(crate) fn validate(&self, shape: &Shape, read: Read) -> Result<()> {
        self.validate_dims(shape.cache_dims(), read)
    }

    /// Checks the cache against itself and against the extents that it should have.
    pub(crate) fn validate_dims(&self, dims: CacheDims, read: Read) -> Result<()> {
        if self.dims != dims {
            let text = |d: &CacheDims| {
                format!(
                    "[N,HV,M,dk,dv] = [{},{},{},{},{}]",
                    d.sequences, d.value_heads, d.capacity, d.dk, d.dv
                )
            };
            return Err(Error::Shape {
                name: "cache_states",
                expected: text(&dims),
                given: text(&self.dims),
            });
        }
        let rows = dims.rows();
        let lengths = [
            ("cache_states", self.states.len(), rows * dims.bank()),
            ("cache_len", self.len.len(), rows),
            ("cache_tokens", self.tokens.len(), rows * dims.capacity),
            ("cache_drift", self.drift.len(), rows * dims.capacity),
            ("cache_open", self.open.len(), rows * dims.state()),
        ];
        let keys = match (&self.keys, read) {
            (Some(keys), Read::Routed) => Some(("cache_keys", keys.len(), rows * dims.key_bank())),
            (None, Read::Routed) => {
                return Err(Error::Missing { name: "cache_keys", why: "routed reads resume from key sums" });
            }
            (_, Read::Given) => None,
        };
        for (name, given, expected) in lengths.into_iter().chain(keys) {
            if given != expected {
                return Err(Error::Shape {
                    name,
                    expected: format!("{expected} elements"),
                    given: format!("{given} elements"),
                });
            }
        }
        for (row, &len) in self.len.iter().enumerate() {
            if len as usize > dims.capacity {
                return Err(Error::Value {
                    name: "cache_len",
                    expected: "at most the capacity",
                    given: len.into(),
                    index: row,
                });
            }
            let first = row * dims.capacity;
            if let Some(slot) = (0..len as usize).find(|slot| self.tokens[first + slot] == 0) {
                return Err(Error::Value {
                    name: "cache_tokens",
                    expected: "at least 1 token in a slot that is held",
                    given: 0.0,
                    index: first + slot,
                });
            }
        }
        Ok(())
    }
}

/// Gradients of a [`Cache`], of the initial one (a result) or of the final one (given).
#[derive(Debug, Clone, PartialEq)]
pub struct CacheGradients {
    /// Gradient of the states, `[N,HV,M,dk,dv]`.
    pub states: Vec<f32>,
    /// Gradient of the open segment's R, `[N,HV,dk,dv]`: not zero only where the drift's gradient is carried on.
    pub open: Vec<f32>,
    /// Gradient of the key sums, `[N,HV,M,dk]`: with routed reads.
    pub keys: Option<Vec<f32>>,
}

impl CacheGradients {
    /// Zeros for a cache of these extents.
    pub fn zeros(dims: CacheDims, read: Read) -> Self {
        let rows = dims.rows();
        CacheGradients {
            states: vec![0.0; rows * dims.bank()],
            open: vec![0.0; rows * dims.state()],
            keys: (read == Read::Routed).then(|| vec![0.0; rows * dims.key_bank()]),
        }
    }

    pub(crate) fn validate(&self, dims: CacheDims, read: Read) -> Result<()> {
        let rows = dims.rows();
        let keys = match (&self.keys, read) {
            (Some(keys), Read::Routed) => Some(("dcache_keys", keys.len(), rows * dims.key_bank())),
            (None, Read::Routed) => {
                return Err(Error::Missing { name: "dcache_keys", why: "reads are routed" });
            }
            (_, Read::Given) => None,
        };
        let lengths = [
            ("dcache_states", self.states.len(), rows * dims.bank()),
            ("dcache_open", self.open.len(), rows * dims.state()),
        ];
        for (name, given, expected) in lengths.into_iter().chain(keys) {
            if given != expected {
                return Err(Error::Shape {
                    name,
                    expected: format!("{expected} elements"),
                    given: format!("{given} elements"),
                });
            }
        }
        Ok(())
    }
}
