//! The event log: how it is encoded, decided and replayed. Every engine uses this one module, so
//! that the same drift gives the same log and the same log means the same thing.
//!
//! One byte per token and value head: [`EXTEND`], [`OPEN`], or `2 + i`: merge slots i and i + 1,
//! then open.

use crate::options::{MAX_CAPACITY, Merge};

/// The token joins the open slot.
pub const EXTEND: u8 = 0;
/// The token opens a slot.
pub const OPEN: u8 = 1;
/// `MERGE + i`: slots i and i + 1 (0 the oldest) merge, then the token opens a slot.
pub const MERGE: u8 = 2;

/// Drift in fixed point, units of 2^-12, rounded to nearest even. NaN counts as none.
#[inline]
pub fn fixed_point(drift: f32) -> u32 {
    (drift * 4096.0).round_ties_even() as u32
}

/// Decides whether a token opens a slot: `drift >= tau`, or there is no slot yet. A capacity of 1
/// knows no other boundary.
#[inline]
pub fn is_boundary(drift: f32, tau: f32, slots: usize, capacity: usize) -> bool {
    slots == 0 || (capacity > 1 && drift >= tau)
}

/// Tokens n and summed drift J of every slot that one sequence and value head holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    len: usize,
    tokens: [u32; MAX_CAPACITY],
    drift: [u32; MAX_CAPACITY],
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger { len: 0, tokens: [0; MAX_CAPACITY], drift: [0; MAX_CAPACITY] }
    }
}

impl Ledger {
    /// The slots of a cache row; `tokens` and `drift` hold at least `len` entries.
    pub(crate) fn resume(len: usize, tokens: &[u32], drift: &[u32]) -> Self {
        let mut ledger = Ledger { len, ..Ledger::default() };
        ledger.tokens[..len].copy_from_slice(&tokens[..len]);
        ledger.drift[..len].copy_from_slice(&drift[..len]);
        ledger
    }

    /// Slots held, m.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tokens of every slot held, oldest first.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[..self.len]
    }

    /// Summed drift of every slot held, oldest first, in units of 2^-12.
    pub fn drift(&self) -> &[u32] {
        &self.drift[..self.len]
    }

    /// Bits by which the pair (i, i + 1) is compared: an f32 cost with the low 6 bits cleared.
    #[inline]
    fn cost(&self, i: usize, merge: Merge) -> u32 {
        let drift = self.drift[i].saturating_add(self.drift[i + 1]) as f32;
        let cost = match merge {
            Merge::Density => drift / self.tokens[i].saturating_add(self.tokens[i + 1]) as f32,
            Merge::Mass => drift,
        };
        cost.to_bits() & !63
    }

    /// The pair of least cost, the oldest winning a tie. At least two slots are held.
    #[inline]
    fn cheapest_pair(&self, merge: Merge) -> usize {
        let mut best = (self.cost(0, merge), 0);
        for i in 1..self.len - 1 {
            let cost = self.cost(i, merge);
            if cost < best.0 {
                best = (cost, i);
            }
        }
        best.1
    }

    /// The event of a token with this drift (OPERATOR.md, section 3, steps 3 and 4).
    #[inline]
    pub fn decide(&self, drift: f32, tau: f32, capacity: usize, merge: Merge) -> u8 {
        if !is_boundary(drift, tau, self.len, capacity) {
            EXTEND
        } else if self.len < capacity {
            OPEN
        } else {
            MERGE + self.cheapest_pair(merge) as u8
        }
    }

    /// Events that are possible now, in words.
    pub(crate) fn possible(&self, capacity: usize) -> String {
        let mut events = Vec::new();
        if self.len > 0 {
            events.push("0".to_owned());
        }
        if self.len < capacity {
            events.push("1".to_owned());
        }
        if self.len >= 2 {
            events.push(format!("2 to {}", self.len));
        }
        events.join(" or ")
    }

    /// Whether `event` can happen now.
    #[inline]
    pub fn allows(&self, event: u8, capacity: usize) -> bool {
        match event {
            EXTEND => self.len > 0,
            OPEN => self.len < capacity,
            merge => usize::from(merge - MERGE) + 1 < self.len,
        }
    }

    /// Takes an event that [`allows`](Self::allows) permits.
    #[inline]
    pub fn apply(&mut self, event: u8, drift: f32) {
        let drift = fixed_point(drift);
        if event >= MERGE {
            let i = usize::from(event - MERGE);
            self.tokens[i] = self.tokens[i].saturating_add(self.tokens[i + 1]);
            self.drift[i] = self.drift[i].saturating_add(self.drift[i + 1]);
            self.tokens.copy_within(i + 2..self.len, i + 1);
            self.drift.copy_within(i + 2..self.len, i + 1);
            self.len -= 1;
        }
        if event == EXTEND {
            let open = self.len - 1;
            self.tokens[open] = self.tokens[open].saturating_add(1);
            self.drift[open] = self.drift[open].saturating_add(drift);
        } else {
            self.tokens[self.len] = 1;
            self.drift[self.len] = drift;
            self.len += 1;
        }
    }
}

/// The events of one sequence and value head whose drift scores are known, from the slots in
/// `ledger` on, which is carried to the end.
///
/// ```
/// use dla::{Merge, events};
/// let drift = [2f32.sqrt(), 0.1, 1.0, 1.2, 0.3];
/// let log = events::plan(&drift, 0.6, 2, Merge::Density, &mut events::Ledger::default());
/// assert_eq!(log, [events::OPEN, events::EXTEND, events::OPEN, events::MERGE, events::EXTEND]);
/// ```
pub fn plan(drift: &[f32], tau: f32, capacity: usize, merge: Merge, ledger: &mut Ledger) -> Vec<u8> {
    let decide = |&drift: &f32| {
        let event = ledger.decide(drift, tau, capacity, merge);
        ledger.apply(event, drift);
        event
    };
    drift.iter().map(decide).collect()
}

/// Where a chunk's events put every slot held at its entry and every token of it (OPERATOR.md,
/// section 4): `pi_t(j)`, `slot_t(s)` and m after every token t.
#[derive(Debug, Clone, Default)]
pub(crate) struct Replay {
    entry: usize,
    tokens: usize,
    /// `pi_t(j)`, `[tokens, entry]`.
    place: Vec<u8>,
    /// `slot_t(s)` for s <= t, `[tokens, tokens]`.
    slot: Vec<u8>,
    /// m after token t, `[tokens]`.
    len: Vec<u8>,
}

impl Replay {
    /// Replays `events` from `entry` slots on. The log has been checked.
    pub(crate) fn run(&mut self, entry: usize, events: &[u8]) {
        let tokens = events.len();
        (self.entry, self.tokens) = (entry, tokens);
        self.place.resize(tokens * entry, 0);
        self.slot.resize(tokens * tokens, 0);
        self.len.resize(tokens, 0);
        let mut len = entry;
        for (t, &event) in events.iter().enumerate() {
            if t == 0 {
                self.place[..entry].iter_mut().enumerate().for_each(|(j, place)| *place = j as u8);
            } else {
                self.place.copy_within((t - 1) * entry..t * entry, t * entry);
                self.slot.copy_within((t - 1) * tokens..(t - 1) * tokens + t, t * tokens);
            }
            if event >= MERGE {
                let merged = event - MERGE;
                let places = &mut self.place[t * entry..(t + 1) * entry];
                let slots = &mut self.slot[t * tokens..t * tokens + t];
                for place in places.iter_mut().chain(slots) {
                    *place -= u8::from(*place > merged);
                }
                len -= 1;
            }
            if event != EXTEND {
                len += 1;
            }
            self.slot[t * tokens + t] = (len - 1) as u8;
            self.len[t] = len as u8;
        }
    }

    /// Slots held before the chunk.
    pub(crate) fn entry(&self) -> usize {
        self.entry
    }

    /// Slots held after the chunk.
    pub(crate) fn exit(&self) -> usize {
        self.len.last().map_or(self.entry, |&len| len.into())
    }

    /// Slots held after token t.
    #[inline]
    pub(crate) fn len(&self, t: usize) -> usize {
        self.len[t].into()
    }

    /// `pi_t(j)` of every entry slot j. Never descending in j.
    #[inline]
    pub(crate) fn places(&self, t: usize) -> &[u8] {
        &self.place[t * self.entry..(t + 1) * self.entry]
    }

    /// `slot_t(s)` of every token s <= t. Never descending in s.
    #[inline]
    pub(crate) fn slots(&self, t: usize) -> &[u8] {
        &self.slot[t * self.tokens..t * self.tokens + t + 1]
    }

    /// For every exit slot: the entry slots and the tokens of the chunk that end in it, both as
    /// ranges (slots are stretches of time, so each is contiguous).
    pub(crate) fn exits(&self) -> Vec<Exit> {
        let mut exits = vec![Exit::default(); self.exit()];
        let Some(last) = self.tokens.checked_sub(1) else {
            for (j, exit) in exits.iter_mut().enumerate() {
                exit.entries = j..j + 1;
            }
            return exits;
        };
        extend_ranges(self.places(last), &mut exits, |exit| &mut exit.entries);
        extend_ranges(self.slots(last), &mut exits, |exit| &mut exit.tokens);
        exits
    }
}

fn extend_ranges(
    places: &[u8],
    exits: &mut [Exit],
    range: impl Fn(&mut Exit) -> &mut std::ops::Range<usize>,
) {
    for (index, &place) in places.iter().enumerate() {
        let range = range(&mut exits[usize::from(place)]);
        if range.start == range.end {
            *range = index..index + 1;
        } else {
            range.end = index + 1;
        }
    }
}

/// What ends in one exit slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Entry slots j with `e(j)` = this slot.
    pub(crate) entries: std::ops::Range<usize>,
    /// Tokens r of the chunk with `e(r)` = this slot.
    pub(crate) tokens: std::ops::Range<usize>,
}
