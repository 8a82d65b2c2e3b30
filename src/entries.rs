//! Caches for decoding: many sequences in one allocation, each in an entry of its own, stepped in place
//! (OPERATOR.md, section 5).
//!
//! A call names which entries its batch rows use, so that sequences join and leave without copies. Slots stand still
//! in memory: their chronological order is a table, a merge touches two of them and frees one.

use crate::cache::{Cache, CacheDims};
use crate::engine::Step;
use crate::error::{Error, Result};
use crate::options::{Options, Read, Recurrence};
use crate::problem::{Problem, Shape};

/// Most tokens a row of one step.
pub const MOST_STEP_TOKENS: usize = 8;

/// How states are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StateDtype {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16 to read, and 8 more bits beside it that are touched only where a state is written: however often
    /// that is, a state read is rounded to bf16 once. On a GPU alone.
    Bf16,
}

/// What a cache's entries hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntrySpec {
    /// Entries.
    pub entries: usize,
    /// Value heads, HV.
    pub value_heads: usize,
    /// Most slots, M.
    pub capacity: usize,
    /// Key dimension.
    pub dk: usize,
    /// Value dimension.
    pub dv: usize,
    /// How slots evolve.
    pub recurrence: Recurrence,
    /// Routed reads keep key sums.
    pub read: Read,
    /// How states are kept.
    pub states: StateDtype,
}

impl EntrySpec {
    /// `entries` entries for calls with these options and extents.
    pub fn of(options: &Options, shape: &Shape, entries: usize, states: StateDtype) -> Self {
        EntrySpec {
            entries,
            value_heads: shape.value_heads,
            capacity: options.capacity,
            dk: shape.dk,
            dv: shape.dv,
            recurrence: options.recurrence,
            read: options.read,
            states,
        }
    }

    /// Extents of `sequences` entries as a [`Cache`].
    pub fn dims(&self, sequences: usize) -> CacheDims {
        let EntrySpec { value_heads, capacity, dk, dv, .. } = *self;
        CacheDims { sequences, value_heads, capacity, dk, dv }
    }
}

/// A cache of entries on one kind of machine.
///
/// Of every method: an entry that there is not, that is free, or that comes twice where it must not is
/// [`Error::Entry`], found before anything is changed; other entries than those named are never touched.
pub trait Entries: Send {
    /// What the entries hold.
    fn spec(&self) -> &EntrySpec;

    /// Takes a free entry for a sequence that has not begun.
    ///
    /// # Errors
    /// [`Error::NoEntry`] where all are taken.
    fn take(&mut self) -> Result<usize>;

    /// Frees an entry.
    ///
    /// # Errors
    /// [`Error::Entry`].
    fn release(&mut self, entry: usize) -> Result<()>;

    /// Forgets what an entry holds: its sequence has not begun.
    ///
    /// # Errors
    /// [`Error::Entry`]; what the device says.
    fn reset(&mut self, entry: usize) -> Result<()>;

    /// Makes `to` what `from` is.
    ///
    /// # Errors
    /// [`Error::Entry`]; what the device says.
    fn copy(&mut self, from: usize, to: usize) -> Result<()>;

    /// Entries as a chronological [`Cache`], one sequence each. An entry may come twice.
    ///
    /// # Errors
    /// [`Error::Entry`]; what the device says.
    fn export(&self, entries: &[usize]) -> Result<Cache>;

    /// Makes entries what the sequences of `cache` are, one each.
    ///
    /// # Errors
    /// [`Error::Entry`], [`Error::Shape`] where `cache` is of other extents; what the device says.
    fn import(&mut self, entries: &[usize], cache: &Cache) -> Result<()>;

    /// One to [`MOST_STEP_TOKENS`] tokens a row, in place: batch row b goes on in `entries[b]`. Results are those of
    /// the forward over the same tokens.
    ///
    /// # Errors
    /// [`Error::Entry`]; [`Error::Shape`], [`Error::Unexpected`] and [`Error::Plan`] where the call is no step of
    /// these entries; what the device says.
    fn step(&mut self, problem: &Problem<'_>, entries: &[usize]) -> Result<Step>;

    /// A forward over any number of tokens: sequence n goes on from entry `from[n]` and leaves its states in
    /// `to[n]`, which may be the same. `from` may name an entry twice: sequences with a common beginning.
    ///
    /// # Errors
    /// As [`Entries::step`]; those of the forward.
    fn prefill(&mut self, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> Result<Step>;
}

/// Which entries are taken; what every engine checks of a call.
#[derive(Debug, Clone)]
pub(crate) struct Roster {
    pub(crate) spec: EntrySpec,
    taken: Vec<bool>,
}

impl Roster {
    /// All free.
    pub(crate) fn new(spec: EntrySpec) -> Result<Self> {
        Self::check_spec(&spec)?;
        Ok(Roster { spec, taken: vec![false; spec.entries] })
    }

    /// Extents that there are, of a size that can be counted.
    pub(crate) fn check_spec(spec: &EntrySpec) -> Result<()> {
        for (name, extent) in [("dk", spec.dk), ("dv", spec.dv), ("HV", spec.value_heads)] {
            if extent == 0 {
                let given = "0".to_owned();
                return Err(Error::Option { name, expected: "at least 1".to_owned(), given });
            }
        }
        if !(1..=crate::MAX_CAPACITY).contains(&spec.capacity) {
            let given = spec.capacity.to_string();
            return Err(Error::Option { name: "capacity", expected: "1 to 64 slots".to_owned(), given });
        }
        let elements = [spec.value_heads, spec.capacity + 2, spec.dk, spec.dv, size_of::<f64>()];
        let bytes = elements.iter().try_fold(spec.entries, |product, &extent| product.checked_mul(extent));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(Error::Shape {
                name: "entries",
                expected: "[entries,HV,M,dk,dv] of a size that fits memory".to_owned(),
                given: format!("{:?}", [spec.entries, spec.value_heads, spec.capacity, spec.dk, spec.dv]),
            });
        }
        Ok(())
    }

    pub(crate) fn take(&mut self) -> Result<usize> {
        let free = self.taken.iter().position(|taken| !taken);
        let entry = free.ok_or(Error::NoEntry { count: self.spec.entries })?;
        self.taken[entry] = true;
        Ok(entry)
    }

    pub(crate) fn release(&mut self, entry: usize) -> Result<()> {
        self.check("entry", &[entry])?;
        self.taken[entry] = false;
        Ok(())
    }

    /// All are taken.
    pub(crate) fn check(&self, name: &'static str, entries: &[usize]) -> Result<()> {
        for (index, &given) in entries.iter().enumerate() {
            let expected = match self.taken.get(given) {
                None => "an entry of the cache",
                Some(false) => "an entry that is taken",
                Some(true) => continue,
            };
            return Err(Error::Entry { name, expected, given, index });
        }
        Ok(())
    }

    /// All are taken, and none comes twice.
    pub(crate) fn check_distinct(&self, name: &'static str, entries: &[usize]) -> Result<()> {
        self.check(name, entries)?;
        let mut seen = vec![false; self.spec.entries];
        for (index, &given) in entries.iter().enumerate() {
            if std::mem::replace(&mut seen[given], true) {
                let expected = "an entry that no row before it has";
                return Err(Error::Entry { name, expected, given, index });
            }
        }
        Ok(())
    }

    /// A cache for as many entries.
    pub(crate) fn check_import(&self, entries: &[usize], cache: &Cache) -> Result<()> {
        self.check_distinct("entries", entries)?;
        cache.view().validate_dims(self.spec.dims(entries.len()), self.spec.read)
    }

    fn check_problem(&self, problem: &Problem<'_>) -> Result<()> {
        self.check_call(problem.options(), problem.shape())?;
        if problem.inputs().cache.is_some() {
            return Err(Error::Unexpected {
                name: "cache",
                why: "the entries hold what the call goes on from",
            });
        }
        Ok(())
    }

    /// Options and extents are the spec's.
    pub(crate) fn check_call(&self, options: &Options, shape: &Shape) -> Result<()> {
        let spec = &self.spec;
        let differs = |name, why| Err(Error::Plan { name, why });
        if shape.value_heads != spec.value_heads {
            return differs("v", "HV is not that of the entries");
        }
        if shape.dk != spec.dk {
            return differs("q", "dk is not that of the entries");
        }
        if shape.dv != spec.dv {
            return differs("v", "dv is not that of the entries");
        }
        if shape.capacity != spec.capacity {
            return differs("capacity", "not that of the entries");
        }
        if options.recurrence != spec.recurrence {
            return differs("recurrence", "not that of the entries");
        }
        if options.read != spec.read {
            return differs("read", "not that of the entries");
        }
        Ok(())
    }

    pub(crate) fn check_step(&self, problem: &Problem<'_>, entries: &[usize]) -> Result<()> {
        self.check_problem(problem)?;
        let shape = problem.shape();
        if problem.inputs().cu_seqlens.is_some() {
            return Err(Error::Unexpected {
                name: "cu_seqlens",
                why: "a step takes as many tokens of every row",
            });
        }
        if !(1..=MOST_STEP_TOKENS).contains(&shape.time) {
            return Err(Error::Shape {
                name: "q",
                expected: format!("[B,T,H,dk] with T = 1 to {MOST_STEP_TOKENS} for a step"),
                given: format!("{:?}", [shape.batch, shape.time, shape.heads, shape.dk]),
            });
        }
        self.check_rows("entries", entries, shape.batch)?;
        self.check_distinct("entries", entries)
    }

    pub(crate) fn check_prefill(&self, problem: &Problem<'_>, from: &[usize], to: &[usize]) -> Result<()> {
        self.check_problem(problem)?;
        let sequences = problem.shape().sequences;
        self.check_rows("from", from, sequences)?;
        self.check_rows("to", to, sequences)?;
        self.check("from", from)?;
        self.check_distinct("to", to)
    }

    fn check_rows(&self, name: &'static str, entries: &[usize], rows: usize) -> Result<()> {
        if entries.len() != rows {
            return Err(Error::Shape {
                name,
                expected: format!("one entry a row, {rows}"),
                given: entries.len().to_string(),
            });
        }
        Ok(())
    }
}
