//! **route**: read weights from content (OPERATOR.md, section 6). A bank of key sums stands beside the
//! states; a token's score against a slot is folded from its products with the entry bank and with the
//! chunk's own keys, by the replayed log.

use super::matrix::{Into, View, ViewMut, add_scaled, multiply};
use super::row::{CHUNK, Chunk, Row};
use crate::events::Replay;

/// Parameters of one value head's routed reads.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) slope: f32,
    pub(crate) bias: f32,
}

impl Route {
    pub(crate) fn of(row: &Row) -> Option<Route> {
        row.problem.inputs().route.map(|route| {
            let mut head = [0.0; 2];
            let (slope, bias) = head.split_at_mut(1);
            route.slope.data().load(row.head, slope);
            route.bias.data().load(row.head, bias);
            Route { slope: slope[0], bias: bias[0] }
        })
    }
}

/// Key sums K and token counts n of the slots held, oldest first.
#[derive(Clone, Default)]
pub(crate) struct KeyBank {
    pub(crate) keys: Vec<f32>,
    tokens: Vec<u32>,
}

/// What a chunk's routing leaves for its adjoint, `[len, M]` by slot.
pub(crate) struct Routed {
    /// Read weight of every slot held.
    pub(crate) weights: Vec<f32>,
    /// `lambda (1 - lambda)`, kept apart: 1 - lambda loses its digits where lambda is near 1.
    slopes: Vec<f32>,
    /// `q . kappa`.
    scores: Vec<f32>,
    /// n.
    tokens: Vec<f32>,
    /// `Q K_j^T`, `[len, entry]`; in the adjoint `E_tj`.
    bank_scores: Vec<f32>,
    /// `E_ts`, `[len, len]`.
    pairs: Vec<f32>,
}

impl Routed {
    pub(crate) fn new(capacity: usize) -> Self {
        let rows = |width: usize| vec![0.0; CHUNK * width];
        Routed {
            weights: rows(capacity),
            slopes: rows(capacity),
            scores: rows(capacity),
            tokens: rows(capacity),
            bank_scores: rows(capacity),
            pairs: rows(CHUNK),
        }
    }

    fn capacity(&self) -> usize {
        self.weights.len() / CHUNK
    }
}

impl KeyBank {
    /// The bank that a row begins with.
    pub(crate) fn initial(row: &Row) -> Self {
        let Some(cache) = row.problem.inputs().cache else { return KeyBank::default() };
        let (dims, index) = (cache.dims, row.index());
        let m = cache.len[index] as usize;
        KeyBank {
            keys: cache
                .keys
                .as_ref()
                .map_or_else(Vec::new, |keys| keys[index * dims.key_bank()..][..m * dims.dk].to_vec()),
            tokens: cache.tokens[index * dims.capacity..][..m].to_vec(),
        }
    }

    /// The bank after the chunk: sums over what ends in every exit slot.
    pub(crate) fn advance(&mut self, chunk: &Chunk, replay: &Replay) {
        let dk = chunk.k.len() / CHUNK;
        let exits = replay.exits();
        let mut next = KeyBank { keys: vec![0.0; exits.len() * dk], tokens: vec![0; exits.len()] };
        for ((exit, keys), tokens) in
            exits.into_iter().zip(next.keys.chunks_exact_mut(dk)).zip(&mut next.tokens)
        {
            *tokens = exit.tokens.len() as u32;
            for j in exit.entries {
                add_scaled(keys, 1.0, &self.keys[j * dk..][..dk]);
                *tokens = tokens.saturating_add(self.tokens[j]);
            }
            for s in exit.tokens {
                add_scaled(keys, 1.0, &chunk.k[s * dk..][..dk]);
            }
        }
        *self = next;
    }
}

/// Read weights of every token of `chunk`. `qk` is `Q K^T`, all pairs. `logit(t, i, m)`: the logit of
/// slot i of m at the chunk's token t.
pub(crate) fn route(
    route: Route,
    bank: &KeyBank,
    chunk: &Chunk,
    qk: &[f32],
    replay: &Replay,
    logit: impl Fn(usize, usize, usize) -> f32,
    out: &mut Routed,
) {
    let (len, entry) = (chunk.len, replay.entry());
    let (dk, capacity) = (chunk.q.len() / CHUNK, out.capacity());
    multiply(
        ViewMut::new(&mut out.bank_scores, len, entry),
        Into::Set,
        1.0,
        View::new(&chunk.q, len, dk),
        View::new(&bank.keys, entry, dk).t(),
    );
    for t in 0..len {
        let m = replay.len(t);
        let scores = &mut out.scores[t * capacity..][..m];
        let tokens = &mut out.tokens[t * capacity..][..m];
        scores.fill(0.0);
        tokens.fill(0.0);
        for (j, &place) in replay.places(t).iter().enumerate() {
            scores[usize::from(place)] += out.bank_scores[t * entry + j];
            tokens[usize::from(place)] += bank.tokens[j] as f32;
        }
        for (s, &slot) in replay.slots(t).iter().enumerate() {
            scores[usize::from(slot)] += qk[t * len + s];
            tokens[usize::from(slot)] += 1.0;
        }
        for i in 0..m {
            scores[i] /= tokens[i];
            let x = route.slope * scores[i] + route.bias + logit(t, i, m);
            let tail = (-x.abs()).exp();
            let over = 1.0 / (1.0 + tail);
            out.weights[t * capacity + i] = if x >= 0.0 { over } else { tail * over };
            out.slopes[t * capacity + i] = tail * over * over;
        }
    }
}

/// Gradients that routing adds to, over a row.
#[derive(Default)]
pub(crate) struct RouteSums {
    pub(crate) slope: f64,
    pub(crate) bias: f64,
}

/// The adjoint of [`route`] and [`KeyBank::advance`]. `d_weights [len, M]` by slot comes in as the
/// gradient of the weights and leaves as that of the logits. `d_bank` is the adjoint of the exit
/// bank's keys and leaves as that of the entry bank's. Adds to `dq` and `dk`, `[len, dk]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn route_backward(
    route: Route,
    bank: &KeyBank,
    chunk: &Chunk,
    replay: &Replay,
    routed: &mut Routed,
    d_weights: &mut [f32],
    d_bank: &mut Vec<f32>,
    dq: &mut [f32],
    dk_out: &mut [f32],
    sums: &mut RouteSums,
) {
    let (len, entry) = (chunk.len, replay.entry());
    let (dk, capacity) = (chunk.q.len() / CHUNK, routed.capacity());
    routed.pairs[..len * len].fill(0.0);
    for t in 0..len {
        let m = replay.len(t);
        let mut e = [0.0f32; crate::options::MAX_CAPACITY];
        for i in 0..m {
            let at = t * capacity + i;
            let u = d_weights[at] * routed.slopes[at];
            d_weights[at] = u;
            sums.slope += f64::from(u) * f64::from(routed.scores[at]);
            sums.bias += f64::from(u);
            e[i] = route.slope * u / routed.tokens[at];
        }
        for (j, &place) in replay.places(t).iter().enumerate() {
            routed.bank_scores[t * entry + j] = e[usize::from(place)];
        }
        for (s, &slot) in replay.slots(t).iter().enumerate() {
            routed.pairs[t * len + s] = e[usize::from(slot)];
        }
    }
    let (q, k) = (View::new(&chunk.q, len, dk), View::new(&chunk.k, len, dk));
    let (to_bank, pairs) = (View::new(&routed.bank_scores, len, entry), View::new(&routed.pairs, len, len));
    multiply(ViewMut::new(dq, len, dk), Into::Add(1.0), 1.0, to_bank, View::new(&bank.keys, entry, dk));
    multiply(ViewMut::new(dq, len, dk), Into::Add(1.0), 1.0, pairs, k);
    multiply(ViewMut::new(dk_out, len, dk), Into::Add(1.0), 1.0, pairs.t(), q);
    let mut d_entry = vec![0.0; entry * dk];
    for (i, exit) in replay.exits().into_iter().enumerate() {
        let d_exit = &d_bank[i * dk..][..dk];
        for j in exit.entries {
            d_entry[j * dk..][..dk].copy_from_slice(d_exit);
        }
        for s in exit.tokens {
            add_scaled(&mut dk_out[s * dk..][..dk], 1.0, d_exit);
        }
    }
    multiply(ViewMut::new(&mut d_entry, entry, dk), Into::Add(1.0), 1.0, to_bank.t(), q);
    *d_bank = d_entry;
}
