//! The only byte layout of the workspace.

use super::abi::{Geometry, SEGMENT_STATE_BYTES, ScanSm90};

/// Every array of the workspace begins on as many bytes.
pub(super) const ALIGNMENT: usize = 256;

/// Where the arrays of the workspace stand, in bytes from its beginning, and how many bytes there are in all. An
/// array that the call does not need has no bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// What segment says of the slots at every chunk's entry: slots held `[chunks,HV]` u32; where they start, their
    /// places and their decay, [`Geometry::chunk_slots_len`] i32, u8 and f32.
    pub(super) chunk_len: usize,
    pub(super) chunk_starts: usize,
    pub(super) chunk_place: usize,
    pub(super) chunk_log: usize,
    /// Tables of segment_gram, by [`Geometry::starts_len`] (abi.cuh).
    pub(super) walks: usize,
    pub(super) reach: usize,
    pub(super) energy: usize,
    pub(super) factor: usize,
    pub(super) totals: usize,
    pub(super) next: usize,
    /// A row's record between two windows of segment.
    pub(super) state: usize,
    /// Hopper's gated scan: sums of g before chunks `[chunks,HV]` f64.
    pub(super) gammas: usize,
    /// Hopper's scan, of a window: P . Lambda, weights and plans; delta rule: Qt, transitions and Kh.
    pub(super) pairs: usize,
    pub(super) weights: usize,
    pub(super) plans: usize,
    pub(super) queries: usize,
    pub(super) transition: usize,
    pub(super) writes: usize,
    /// What the blocks of Hopper's scan hold between windows.
    pub(super) banks: usize,
    /// P, [`Geometry::p_len`] bf16.
    pub(super) p: usize,
    /// Delta rule: Qt, W and Kh, [`Geometry::prepared_len`] bf16 each.
    pub(super) qt: usize,
    pub(super) w: usize,
    pub(super) kh: usize,
    /// Routed reads: sums of keys within chunks, [`Geometry::route_sums_len`] f32, and before them,
    /// [`Geometry::route_bases_len`] f64; under qk_l2norm the keys' factors, `[B,T,H]` f32.
    pub(super) key_sums: usize,
    pub(super) key_bases: usize,
    pub(super) key_factors: usize,
    /// Masters of the states, [`Geometry::bank_len`] f32.
    pub(super) bank: usize,
    /// R while segment runs, `[N,HV,dk,dv]` f32; and what else of the cache segment and route write, where the
    /// caller does not want it: of the states, where the scan hands them from window to window as the final cache.
    pub(super) states: usize,
    pub(super) open: usize,
    pub(super) len: usize,
    pub(super) tokens: usize,
    pub(super) drift: usize,
    pub(super) keys: usize,
    /// Bytes of the whole.
    pub(super) bytes: usize,
}

/// Hopper's scan, a window at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Windowed {
    pub(super) scan: ScanSm90,
    /// Places of chunks of the largest window.
    pub(super) places: usize,
    /// Whether there is more than one window.
    pub(super) cut: bool,
}

impl Layout {
    /// The layout of a call; `hopper`: Hopper's scan, if it is that. `None` where it would be of
    /// more bytes than there are addresses.
    pub(super) fn new(
        geometry: &Geometry,
        routed: bool,
        qk_l2norm: bool,
        cache_wanted: bool,
        hopper: Option<Windowed>,
    ) -> Option<Layout> {
        let g = geometry;
        let mut layout = Layout::default();
        let mut take = |wanted: bool, factors: &[usize]| -> Option<usize> {
            let at = layout.bytes;
            let bytes = if wanted {
                factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor))?
            } else {
                0
            };
            layout.bytes = at.checked_add(bytes)?.checked_next_multiple_of(ALIGNMENT)?;
            Some(at)
        };
        let (places, rows, parts, chunk) = (g.chunks(), g.rows(), g.parts, g.chunk());
        let prepared = [2, places, g.value_heads, parts, chunk, g.padded_dk()];
        let heads = g.value_heads;
        let chunk_len = take(true, &[4, places, heads])?;
        let chunk_starts = take(true, &[4, places, heads, g.capacity])?;
        let chunk_place = take(true, &[places, heads, g.capacity])?;
        let chunk_log = take(true, &[4, places, heads, g.capacity])?;
        let walks = take(true, &[4, places, heads, chunk, 32])?;
        let reach = take(true, &[4, places, heads, chunk])?;
        let energy = take(true, &[4, places, heads, chunk])?;
        let factor = take(true, &[4, places, heads, chunk])?;
        let totals = take(true, &[8, places, heads, chunk / 32])?;
        let next = take(true, &[places, heads, chunk])?;
        let state = take(true, &[rows, SEGMENT_STATE_BYTES])?;
        let gammas = take(hopper.is_some() && !g.delta, &[8, places, heads])?;
        let mut of_window = |len: fn(&ScanSm90, &Geometry, usize) -> usize, bytes: usize| {
            take(true, &[bytes, hopper.map_or(0, |windowed| len(&windowed.scan, g, windowed.places))])
        };
        let pairs = of_window(ScanSm90::pairs_len, 4)?;
        let weights = of_window(ScanSm90::weights_len, 4)?;
        let plans = of_window(ScanSm90::plans_bytes, 1)?;
        let queries = of_window(ScanSm90::queries_len, 4)?;
        let transition = of_window(ScanSm90::transition_len, 2)?;
        let writes = of_window(ScanSm90::writes_len, 2)?;
        let banks = match hopper {
            Some(Windowed { scan, cut: true, .. }) => take(true, &[scan.blocks(g), scan.bank_bytes()])?,
            _ => take(false, &[])?,
        };
        let portable = hopper.is_none();
        let p = take(portable, &[2, places, g.value_heads, parts, chunk, chunk])?;
        let qt = take(portable && g.delta, &prepared)?;
        let w = take(portable && g.delta, &prepared)?;
        let kh = take(portable && g.delta, &prepared)?;
        let key_sums = take(routed, &[4, places, g.heads, chunk / 8, g.dk])?;
        let key_bases = take(routed, &[8, places, g.heads, g.dk])?;
        let key_factors = take(routed && qk_l2norm, &[4, g.tokens, g.heads])?;
        let bank = take(portable, &[4, rows, g.slices(), 16, g.capacity, g.padded_dk()])?;
        let handed_over = g.delta && hopper.is_some_and(|windowed| windowed.cut);
        let states = take(!cache_wanted && handed_over, &[4, rows, g.capacity, g.dk, g.dv])?;
        let open = take(!cache_wanted, &[4, rows, g.dk, g.dv])?;
        let len = take(!cache_wanted, &[4, rows])?;
        let tokens = take(!cache_wanted, &[4, rows, g.capacity])?;
        let drift = take(!cache_wanted, &[4, rows, g.capacity])?;
        let keys = take(routed && !cache_wanted, &[4, rows, g.capacity, g.dk])?;
        let bytes = layout.bytes;
        Some(Layout {
            chunk_len,
            chunk_starts,
            chunk_place,
            chunk_log,
            walks,
            reach,
            energy,
            factor,
            totals,
            next,
            state,
            gammas,
            pairs,
            weights,
            plans,
            queries,
            transition,
            writes,
            banks,
            p,
            qt,
            w,
            kh,
            key_sums,
            key_bases,
            key_factors,
            bank,
            states,
            open,
            len,
            tokens,
            drift,
            keys,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(delta: bool, parts: usize) -> Geometry {
        Geometry {
            parts,
            sequences: 3,
            tokens: 130,
            heads: 1,
            value_heads: 2,
            dk: 24,
            dv: 40,
            capacity: 5,
            delta,
        }
    }

    #[test]
    fn arrays_follow_one_another() {
        let windowed = |delta, cut| {
            Some(Windowed { scan: ScanSm90::choose(&geometry(delta, 1), 1).unwrap(), places: 2, cut })
        };
        for (delta, parts, routed, cache_wanted, hopper) in [
            (false, 1, false, true, windowed(false, true)),
            (false, 1, true, true, windowed(false, false)),
            (true, 1, true, true, windowed(true, true)),
            (true, 2, true, false, None),
            (true, 1, true, true, None),
            (false, 2, false, false, None),
        ] {
            let g = geometry(delta, parts);
            let layout = Layout::new(&g, routed, delta, cache_wanted, hopper).unwrap();
            let portable = hopper.is_none();
            let of_window = |len: fn(&ScanSm90, &Geometry, usize) -> usize| {
                hopper.map_or(0, |windowed: Windowed| len(&windowed.scan, &g, windowed.places))
            };
            let scan = hopper.map(|windowed| windowed.scan);
            let lengths = [
                (layout.chunk_len, 4 * g.chunks() * 2),
                (layout.chunk_starts, 4 * g.chunk_slots_len()),
                (layout.chunk_place, g.chunk_slots_len()),
                (layout.chunk_log, 4 * g.chunk_slots_len()),
                (layout.walks, 4 * 32 * g.starts_len()),
                (layout.reach, 4 * g.starts_len()),
                (layout.energy, 4 * g.starts_len()),
                (layout.factor, 4 * g.starts_len()),
                (layout.totals, 8 * g.starts_len() / 32),
                (layout.next, g.starts_len()),
                (layout.state, 6 * SEGMENT_STATE_BYTES),
                (layout.gammas, if hopper.is_some() && !delta { 8 * g.chunks() * g.value_heads } else { 0 }),
                (layout.pairs, 4 * of_window(ScanSm90::pairs_len)),
                (layout.weights, 4 * of_window(ScanSm90::weights_len)),
                (layout.plans, of_window(ScanSm90::plans_bytes)),
                (layout.queries, 4 * of_window(ScanSm90::queries_len)),
                (layout.transition, 2 * of_window(ScanSm90::transition_len)),
                (layout.writes, 2 * of_window(ScanSm90::writes_len)),
                (
                    layout.banks,
                    scan.filter(|_| hopper.is_some_and(|windowed| windowed.cut))
                        .map_or(0, |scan| scan.blocks(&g) * scan.bank_bytes()),
                ),
                (layout.p, if portable { 2 * g.p_len() } else { 0 }),
                (layout.qt, if delta && portable { 2 * g.prepared_len() } else { 0 }),
                (layout.w, if delta && portable { 2 * g.prepared_len() } else { 0 }),
                (layout.kh, if delta && portable { 2 * g.prepared_len() } else { 0 }),
                (layout.key_sums, if routed { 4 * g.route_sums_len() } else { 0 }),
                (layout.key_bases, if routed { 8 * g.route_bases_len() } else { 0 }),
                (layout.key_factors, if routed && delta { 4 * 130 } else { 0 }),
                (layout.bank, if portable { 4 * g.bank_len() } else { 0 }),
                (layout.open, if cache_wanted { 0 } else { 4 * 6 * 24 * 40 }),
                (layout.len, if cache_wanted { 0 } else { 4 * 6 }),
                (layout.tokens, if cache_wanted { 0 } else { 4 * 6 * 5 }),
                (layout.drift, if cache_wanted { 0 } else { 4 * 6 * 5 }),
                (layout.keys, if cache_wanted || !routed { 0 } else { 4 * 6 * 5 * 24 }),
            ];
            let mut end = 0;
            for (at, bytes) in lengths {
                assert!(at == end && at % ALIGNMENT == 0, "{layout:?}");
                end = (at + bytes).next_multiple_of(ALIGNMENT);
            }
            assert_eq!(layout.bytes, end);
        }
    }

    #[test]
    fn a_workspace_of_no_size_is_none() {
        let g = Geometry { sequences: usize::MAX / 1000, tokens: 0, ..geometry(true, 2) };
        assert_eq!(Layout::new(&g, true, true, true, None), None);
    }
}
