//! The only byte layout of the workspace.

use super::abi::Geometry;

/// Every array of the workspace begins on as many bytes.
pub(super) const ALIGNMENT: usize = 256;

/// Where the arrays of the workspace stand, in bytes from its beginning, and how many bytes there are in all. An
/// array that the call does not need has no bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// P, [`Geometry::p_len`] bf16.
    pub(super) p: usize,
    /// Delta rule: Qt, W and Kh, [`Geometry::prepared_len`] bf16 each.
    pub(super) qt: usize,
    pub(super) w: usize,
    pub(super) kh: usize,
    /// Routed reads: the key sums before every chunk, `[chunks,HV,M,dk]` f32.
    pub(super) bank_keys: usize,
    /// Their tokens, `[chunks,HV,M]` u32.
    pub(super) bank_tokens: usize,
    /// Slots held before every chunk, `[chunks,HV]` u32.
    pub(super) bank_len: usize,
    /// Masters of the states, [`Geometry::bank_len`] f32.
    pub(super) bank: usize,
    /// R while segment runs, `[N,HV,dk,dv]` f32; and what else of the cache segment and route write, where the
    /// caller does not want it.
    pub(super) open: usize,
    pub(super) len: usize,
    pub(super) tokens: usize,
    pub(super) drift: usize,
    pub(super) keys: usize,
    /// Bytes of the whole.
    pub(super) bytes: usize,
}

impl Layout {
    /// The layout of a call. `None` where it would be of more bytes than there are addresses.
    pub(super) fn new(geometry: &Geometry, routed: bool, cache_wanted: bool) -> Option<Layout> {
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
        let p = take(true, &[2, places, g.value_heads, parts, chunk, chunk])?;
        let qt = take(g.delta, &prepared)?;
        let w = take(g.delta, &prepared)?;
        let kh = take(g.delta, &prepared)?;
        let bank_keys = take(routed, &[4, places, g.value_heads, g.capacity, g.dk])?;
        let bank_tokens = take(routed, &[4, places, g.value_heads, g.capacity])?;
        let bank_len = take(routed, &[4, places, g.value_heads])?;
        let bank = take(true, &[4, rows, g.slices(), 16, g.capacity, g.padded_dk()])?;
        let open = take(!cache_wanted, &[4, rows, g.dk, g.dv])?;
        let len = take(!cache_wanted, &[4, rows])?;
        let tokens = take(!cache_wanted, &[4, rows, g.capacity])?;
        let drift = take(!cache_wanted, &[4, rows, g.capacity])?;
        let keys = take(routed && !cache_wanted, &[4, rows, g.capacity, g.dk])?;
        let bytes = layout.bytes;
        Some(Layout {
            p,
            qt,
            w,
            kh,
            bank_keys,
            bank_tokens,
            bank_len,
            bank,
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
        Geometry { parts, sequences: 3, tokens: 130, value_heads: 2, dk: 24, dv: 40, capacity: 5, delta }
    }

    #[test]
    fn arrays_follow_one_another() {
        for (delta, parts, routed, cache_wanted) in
            [(false, 1, false, true), (true, 2, true, false), (true, 1, true, true), (false, 2, false, false)]
        {
            let g = geometry(delta, parts);
            let layout = Layout::new(&g, routed, cache_wanted).unwrap();
            let lengths = [
                (layout.p, 2 * g.p_len()),
                (layout.qt, if delta { 2 * g.prepared_len() } else { 0 }),
                (layout.w, if delta { 2 * g.prepared_len() } else { 0 }),
                (layout.kh, if delta { 2 * g.prepared_len() } else { 0 }),
                (layout.bank_keys, if routed { 4 * g.chunks() * 2 * 5 * 24 } else { 0 }),
                (layout.bank_tokens, if routed { 4 * g.chunks() * 2 * 5 } else { 0 }),
                (layout.bank_len, if routed { 4 * g.chunks() * 2 } else { 0 }),
                (layout.bank, 4 * g.bank_len()),
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
        assert_eq!(Layout::new(&g, true, true), None);
    }
}
