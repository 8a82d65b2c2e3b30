//! Useful work of every stage, for rates (OPERATOR.md, sections 4, 6 and 7).
//!
//! FLOP: what the formulas of the chunkwise form ask for with chunks of 64 tokens, whatever chunk an
//! engine takes, and no more than this input needs:
//! - products only, two FLOP a multiply-add; exponentials, norms, scalings and merges count nothing;
//! - of a triangular matrix the triangle, not its square;
//! - the slots actually held at a chunk's entry, replayed from the log, not the capacity;
//! - q k^T and k k^T once per key head, though several value heads read them;
//! - nothing twice: what a backward computes again counts nothing.
//!
//! Bytes: every argument and result of the stage once, in its dtype. What stages hand to one another
//! inside a call counts nothing, so this is the least traffic, not the real one.
//!
//! Symbols: L tokens of a chunk, m slots at its entry, x places among the slots at its exit that hold
//! something of its entry slots; tri = L (L + 1) / 2, strict = L (L - 1) / 2, cube = L (L + 1) (L + 2) / 3
//! (FLOP of a product of two triangles, of which a triangle is kept), inverse = (L - 1) L (L + 1) / 3.

use dla::events::{EXTEND, Ledger, MERGE};
use dla::{Problem, Read, Recurrence, Shape, Stage};

/// Tokens of a chunk in section 7.
const CHUNK: usize = 64;

/// Work of a stage or of a whole call.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flop: f64,
    /// Bytes of arguments and results.
    pub bytes: f64,
}

/// Work of one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PassCost {
    /// In the order of [`Stage::ALL`].
    pub stages: [Cost; 4],
    /// The call: FLOP of all stages; bytes of all arguments and results, each once.
    pub all: Cost,
}

impl PassCost {
    fn of(stages: [(Stage, f64, f64); 4], bytes: f64) -> Self {
        let mut cost = PassCost::default();
        for (stage, flop, bytes) in stages {
            cost.stages[stage as usize] = Cost { flop, bytes };
            cost.all.flop += flop;
        }
        cost.all.bytes = bytes;
        cost
    }
}

/// What a log asks for, summed over sequences, value heads and chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sums {
    /// L
    tokens: f64,
    tri: f64,
    strict: f64,
    cube: f64,
    inverse: f64,
    /// m
    slots: f64,
    /// m L: what reading asks for.
    read: f64,
    /// x L: what the transition asks for, slots that merge within the chunk being added first.
    moved: f64,
    /// Tokens up to the first boundary of a chunk that is entered with an open segment.
    carried: f64,
    /// Tokens from the last boundary of a chunk on: those that its exit's R adds.
    kept: f64,
    /// Slots held at the end of every sequence.
    last: f64,
    /// Slots held after every token.
    held: f64,
    /// Tokens that open a slot.
    boundaries: f64,
}

impl Sums {
    fn of(problem: &Problem, events: &[u8]) -> Self {
        let value_heads = problem.shape().value_heads;
        let mut sums = Sums::default();
        for sequence in problem.sequences() {
            for head in 0..value_heads {
                let mut ledger = Ledger::default();
                for start in (0..sequence.len).step_by(CHUNK) {
                    let tokens = start..(start + CHUNK).min(sequence.len);
                    let event = |t: usize| events[(sequence.start + t) * value_heads + head];
                    sums.chunk(&mut ledger, tokens.map(event));
                }
                sums.last += ledger.len() as f64;
            }
        }
        sums
    }

    fn chunk(&mut self, ledger: &mut Ledger, events: impl ExactSizeIterator<Item = u8>) {
        let length = events.len();
        let (l, entry) = (length as f64, ledger.len());
        let (mut places, mut first, mut last) = (entry, None, 0);
        for (t, event) in events.enumerate() {
            if event != EXTEND {
                first.get_or_insert(t);
                last = t;
                self.boundaries += 1.0;
            }
            // The pair (i, i + 1) loses an entry place where both hold something of the entry slots.
            if event >= MERGE && usize::from(event - MERGE) + 1 < places {
                places -= 1;
            }
            ledger.apply(event, 0.0);
            self.held += ledger.len() as f64;
        }
        self.tokens += l;
        self.tri += l * (l + 1.0) / 2.0;
        self.strict += l * (l - 1.0) / 2.0;
        self.cube += l * (l + 1.0) * (l + 2.0) / 3.0;
        self.inverse += (l - 1.0) * l * (l + 1.0) / 3.0;
        self.slots += entry as f64;
        self.read += entry as f64 * l;
        self.moved += places as f64 * l;
        if entry > 0 {
            self.carried += first.map_or(length, |first| first + 1) as f64;
        }
        self.kept += (length - last) as f64;
    }
}

/// What a log says of its input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSummary {
    /// Share of tokens that open a slot.
    pub boundary_rate: f64,
    /// Mean slots held after a token.
    pub slots_held: f64,
}

/// Sizes in bytes of a call's arguments, a result having the size of what it is the gradient of.
struct Sizes {
    q: f64,
    k: f64,
    v: f64,
    g: f64,
    beta: f64,
    /// Read weights of the M slots, given or computed.
    lambda: f64,
    logits: f64,
    drift: f64,
    events: f64,
    /// States, key sums and R of the slots held at the end.
    cache: f64,
}

/// The work of one call, from the log that it made. The call begins with empty slots.
pub struct Work {
    sums: Sums,
    sizes: Sizes,
    dk: f64,
    dv: f64,
    /// Key heads per value head, for what value heads share.
    shared: f64,
    delta: bool,
    routed: bool,
}

impl Work {
    /// Replays the log once; the rest are formulas.
    pub fn of(problem: &Problem, events: &[u8]) -> Self {
        let Shape { heads, value_heads, dk, dv, capacity, .. } = *problem.shape();
        let inputs = problem.inputs();
        let routed = problem.options().read == Read::Routed;
        let sums = Sums::of(problem, events);
        let element = problem.dtype().bytes() as f64;
        let (tokens, per_token) = (problem.shape().tokens() as f64, sums.tokens);
        let (dk, dv) = (dk as f64, dv as f64);
        let weights = 4.0 * per_token * capacity as f64;
        let present = |there: bool, bytes: f64| if there { bytes } else { 0.0 };
        let rows = problem.sequences().len() as f64 * value_heads as f64;
        let keys = present(routed, 4.0 * sums.last * dk);
        let sizes = Sizes {
            q: tokens * heads as f64 * dk * element,
            k: tokens * heads as f64 * dk * element,
            v: per_token * dv * element,
            g: present(inputs.g.is_some(), 4.0 * per_token),
            beta: present(inputs.beta.is_some(), 4.0 * per_token),
            lambda: weights,
            logits: present(inputs.route.is_some_and(|route| route.logits.is_some()), weights),
            drift: 4.0 * per_token,
            events: per_token,
            cache: 4.0 * (sums.last + rows) * dk * dv + keys,
        };
        let shared = heads as f64 / value_heads as f64;
        let delta = problem.options().recurrence == Recurrence::GatedDelta;
        Work { sums, sizes, dk, dv, shared, delta, routed }
    }

    /// What the log says of the input.
    pub fn summary(&self) -> LogSummary {
        let tokens = self.sums.tokens.max(1.0);
        LogSummary { boundary_rate: self.sums.boundaries / tokens, slots_held: self.sums.held / tokens }
    }

    /// Work of the forward.
    pub fn forward(&self) -> PassCost {
        let Work { sums: s, sizes: b, dk, dv, shared, delta, routed } = self;
        let (dk, dv, shared) = (*dk, *dv, *shared);
        let state = dk * dv;

        // X below the diagonal: k.k (shared) and v.v; k^T R v of the tokens that the carried segment
        // judges; R at the exit from the tokens of its open segment.
        let segment = 2.0 * (shared * dk + dv) * s.strict + 2.0 * state * (s.carried + s.kept);

        // A = tril(Q K^T).
        let mut prepare = 2.0 * shared * dk * s.tri;
        if *delta {
            // K K^T, Tm = (I + ..)^-1, W = Tm (..), A W, A Tm, Tm^T Kd.
            prepare += 2.0 * shared * dk * s.strict + s.inverse + 3.0 * 2.0 * dk * s.tri + s.cube;
        }

        // Q K_j; tril(Q K^T) is prepare's, and the rest are sums.
        let route = if *routed { 2.0 * dk * s.read } else { 0.0 };

        // Qt S_j; (P . Lambda) V; Kh^T V.
        let mut scan = 2.0 * state * s.read + 2.0 * dv * s.tri + 2.0 * state * s.tokens;
        if *delta {
            // W S and Kd^T (W S).
            scan += 4.0 * state * s.moved;
        }

        let arguments = b.q + b.k + b.v + b.g + b.beta + if *routed { b.logits } else { b.lambda };
        let computed = if *routed { b.lambda } else { 0.0 };
        PassCost::of(
            [
                (Stage::Segment, segment, b.k + b.v + b.g + b.drift + b.events),
                (Stage::Prepare, prepare, b.q + b.k + b.g + b.beta),
                (Stage::Route, route, if *routed { b.q + b.k + b.events + b.logits + b.lambda } else { 0.0 }),
                (Stage::Scan, scan, b.v + b.lambda + b.events + b.v + b.cache),
            ],
            arguments + b.v + b.drift + b.events + b.cache + computed,
        )
    }

    /// Work of the backward: without soft boundaries, and without what it computes again.
    pub fn backward(&self) -> PassCost {
        let Work { sums: s, sizes: b, dk, dv, shared: _, delta, routed } = self;
        let (dk, dv) = (*dk, *dv);
        let state = dk * dv;

        // R_j = dO S_j^T and Qt^T (w_j . dO); dQt += w_j R_j and dlambda += Qt . R_j.
        let mut scan = 4.0 * state * s.read + 4.0 * dk * s.read;
        // dO V^T and (P . Lambda)^T dO; Kh dS' and dS' v; <dS', S_j>.
        scan += 4.0 * dv * s.tri + 4.0 * state * s.tokens + 2.0 * state * s.slots;
        if *delta {
            // Kd dS', W^T (..), (..) S^T and (W S) dS'^T.
            scan += 4.0 * 2.0 * state * s.moved;
        }

        // dA to q and to k.
        let mut prepare = 4.0 * dk * s.tri;
        if *delta {
            // dA -= dQt W^T, dW -= A^T dQt, dTm from Kd and from dW, dKd += Tm (..), Tm^T dW.
            prepare += 6.0 * 2.0 * dk * s.tri;
            // (dP diag) Tm^T, A^T dP, and the two products of dL.
            prepare += 4.0 * s.cube;
            // dL to both k of K K^T.
            prepare += 4.0 * dk * s.strict;
        }

        // E_j K_j and E_j^T Q; E_s K and E_s^T Q.
        let route = if *routed { 4.0 * dk * s.read + 4.0 * dk * s.tri } else { 0.0 };

        let weights = if *routed { b.lambda + b.logits } else { b.lambda };
        let arguments = b.q + b.k + b.v + b.g + b.beta;
        let through_route = b.q + b.k + 2.0 * b.lambda + b.logits;
        PassCost::of(
            [
                (Stage::Segment, 0.0, 0.0),
                (Stage::Prepare, prepare, 2.0 * (b.q + b.k + b.g + b.beta)),
                (Stage::Route, route, if *routed { through_route } else { 0.0 }),
                (Stage::Scan, scan, 2.0 * b.v + 2.0 * b.lambda + b.events + b.v),
            ],
            2.0 * arguments + b.v + 2.0 * weights + b.events,
        )
    }
}

/// Work of single steps: of `tokens` tokens and value heads, `slots_held` the sum of the slots that each
/// of them found held after it.
///
/// k^T R v; q^T S of the slots held; the write. Delta rule: the transition, k^T S and its product with k,
/// of the slots held, and R beside the open slot, which in the other case is R.
pub fn steps(problem: &Problem, tokens: f64, slots_held: f64) -> Cost {
    let state = (problem.shape().dk * problem.shape().dv) as f64;
    let (once, per_slot) = match problem.options().recurrence {
        Recurrence::Gated => (2.0, 1.0),
        Recurrence::GatedDelta => (3.0, 3.0),
    };
    // Every slot held is read and written, in f32; the arguments are small beside it.
    Cost { flop: 2.0 * state * (once * tokens + per_slot * slots_held), bytes: 8.0 * state * slots_held }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dla::check::Recipe;
    use dla::events::OPEN;
    use dla::{Engine, Options};

    fn sums(chunks: &[&[u8]]) -> Sums {
        let (mut sums, mut ledger) = (Sums::default(), Ledger::default());
        for chunk in chunks {
            sums.chunk(&mut ledger, chunk.iter().copied());
        }
        sums
    }

    #[test]
    fn counts_the_slots_that_are_held() {
        let sums = sums(&[&[OPEN, OPEN, EXTEND, OPEN], &[EXTEND, MERGE, EXTEND], &[MERGE + 1, MERGE]]);
        assert_eq!(sums.slots, 0.0 + 3.0 + 3.0);
        assert_eq!(sums.read, 3.0 * 3.0 + 3.0 * 2.0);
        // Of the second chunk's entry slots two merge; of the third's first two and then again two.
        assert_eq!(sums.moved, 2.0 * 3.0 + 1.0 * 2.0);
        assert_eq!(sums.carried, 2.0 + 1.0);
        assert_eq!(sums.kept, 1.0 + 2.0 + 1.0);
        assert_eq!(sums.boundaries, 3.0 + 1.0 + 2.0);
        assert_eq!(sums.held, (1.0 + 2.0 + 2.0 + 3.0) + 3.0 * 3.0 + 3.0 * 2.0);
    }

    #[test]
    fn triangles_are_what_they_say() {
        let sums = sums(&[&[OPEN, EXTEND, EXTEND, EXTEND, EXTEND]]);
        let pairs = |f: &dyn Fn(usize, usize) -> usize| {
            (0..5).flat_map(|t| (0..=t).map(move |s| (t, s))).map(|(t, s)| f(t, s)).sum::<usize>() as f64
        };
        assert_eq!(sums.tri, pairs(&|_, _| 1));
        assert_eq!(sums.strict, pairs(&|t, s| usize::from(s < t)));
        // Row t, column s of a product of lower triangles has t - s + 1 terms, two FLOP each.
        assert_eq!(sums.cube, pairs(&|t, s| 2 * (t - s + 1)));
        // Of a unit triangle's inverse: as many terms as lie strictly between, and the diagonal's.
        assert_eq!(sums.inverse, pairs(&|t, s| 2 * (t - s)));
    }

    #[test]
    fn one_state_costs_what_linear_attention_does() {
        let recipe = Recipe { options: Options { capacity: 1, ..Options::default() }, ..Recipe::default() };
        let case = recipe.draw(1);
        let problem = case.problem().expect("a drawn case is valid");
        let forward = dla::reference::Engine.forward(&problem).expect("a valid problem");
        let work = Work::of(&problem, &forward.events);
        let cost = work.forward();
        // One chunk of 64: no slot is read, the write and the triangle remain.
        let scan = 2.0 * 16.0 * (64.0 * 65.0 / 2.0) + 2.0 * 16.0 * 16.0 * 64.0;
        assert_eq!(cost.stages[Stage::Scan as usize].flop, scan);
        assert_eq!(cost.stages[Stage::Route as usize], Cost::default());
        assert_eq!(cost.all.flop, cost.stages.iter().map(|stage| stage.flop).sum::<f64>());
        assert_eq!(work.summary(), LogSummary { boundary_rate: 1.0 / 64.0, slots_held: 1.0 });
    }
}
