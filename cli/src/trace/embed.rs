//! Keys and values of a text without a model: a fixed embedding of a sliding window of bytes.
//!
//! Token t is byte t. Its window is the last [`WINDOW`] bytes. Every byte p of the window adds the
//! n-grams that end there, n = 1 to 3, once of the bytes themselves and once of their kinds (letter,
//! digit, blank, line end; other bytes are their own kind), so that both words and manner of a text
//! count. An n-gram g adds `DECAY^(t - p) weight(g) signs(hash(g, seed))`: the 64 bits of its hash are
//! the 64 signs of a random projection. Keys and values differ in their seed alone.
//!
//! All numbers here are part of the definition: a change changes every trace.

/// Key and value dimension: one sign for every bit of a hash.
pub const WIDTH: usize = 64;
/// Bytes that a token sees.
pub const WINDOW: usize = 64;
/// Weight of a byte against that of the byte after it.
const DECAY: f64 = 0.95;
/// Weight of n-grams of bytes, n = 1, 2, 3.
const BYTES: [f64; 3] = [0.4, 1.0, 1.0];
/// Weight of n-grams of kinds, n = 1, 2, 3.
const KINDS: [f64; 3] = [0.25, 0.35, 0.4];
const KEY_SEED: u64 = 0x646c_615f_6b65_7973;
const VALUE_SEED: u64 = 0x646c_615f_7661_6c75;

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash(symbols: &[u8], of_kinds: bool, seed: u64) -> u64 {
    let start = mix(seed ^ (symbols.len() as u64) << 1 ^ u64::from(of_kinds));
    symbols.iter().fold(start, |hash, &symbol| mix(hash ^ (u64::from(symbol) + 1)))
}

/// The kind of a byte, as one of its own.
fn kind(byte: u8) -> u8 {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => b'a',
        b'0'..=b'9' => b'0',
        b' ' | b'\t' => b' ',
        b'\n' | b'\r' => b'\n',
        other => other,
    }
}

/// Keys and values `[T, WIDTH]` of a text's bytes.
pub struct Embedding {
    /// Keys; the operator normalises them.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

/// Embeds every byte of `text`.
pub fn embed(text: &[u8]) -> Embedding {
    Embedding { k: project(text, KEY_SEED), v: project(text, VALUE_SEED) }
}

fn project(text: &[u8], seed: u64) -> Vec<f32> {
    let kinds: Vec<u8> = text.iter().map(|&byte| kind(byte)).collect();
    // What the n-grams that end at byte p add, undecayed.
    let added = |p: usize| {
        let mut sum = [0.0f64; WIDTH];
        for (symbols, weights, of_kinds) in [(text, BYTES, false), (&kinds[..], KINDS, true)] {
            for (n, weight) in (1..=3).zip(weights).filter(|(n, _)| *n <= p + 1) {
                let signs = hash(&symbols[p + 1 - n..=p], of_kinds, seed);
                for (bit, sum) in sum.iter_mut().enumerate() {
                    *sum += if signs >> bit & 1 == 1 { weight } else { -weight };
                }
            }
        }
        sum
    };
    let left = DECAY.powi(WINDOW as i32);
    let mut window = [0.0f64; WIDTH];
    let mut out = Vec::with_capacity(text.len() * WIDTH);
    for t in 0..text.len() {
        let entered = added(t);
        let gone = t.checked_sub(WINDOW).map(added);
        for (i, x) in window.iter_mut().enumerate() {
            *x = *x * DECAY + entered[i] - gone.map_or(0.0, |gone| left * gone[i]);
        }
        out.extend(window.map(|x| x as f32));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedding_is_fixed() {
        let Embedding { k, v } = embed(b"a fixed text");
        let sum = |x: &[f32]| x.iter().enumerate().map(|(i, x)| f64::from(*x) * (i % 7) as f64).sum::<f64>();
        assert_eq!(k.len(), 12 * WIDTH);
        assert!((sum(&k) - PINNED_K).abs() < 1e-3, "{}", sum(&k));
        assert!((sum(&v) - PINNED_V).abs() < 1e-3, "{}", sum(&v));
    }

    // Computed apart, by another program written from the description above.
    const PINNED_K: f64 = 1_225.514_911;
    const PINNED_V: f64 = 573.944_776;

    #[test]
    fn a_byte_out_of_the_window_is_forgotten() {
        let far: Vec<u8> = (0..200u8).map(|i| b'a' + i % 26).collect();
        let mut other = far.clone();
        other[0] = b'#';
        let last = |text: &[u8]| embed(text).k[199 * WIDTH..].to_vec();
        for (a, b) in last(&far).iter().zip(last(&other)) {
            assert!((a - b).abs() < 1e-4);
        }
    }

    #[test]
    fn like_text_is_near_and_unlike_text_is_far() {
        let text = [&b"some words and then some more words of the same manner, "[..]; 2].concat();
        let cosine = |a: &[f32], b: &[f32]| {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let at = |x: &[f32], t: usize| x[t * WIDTH..(t + 1) * WIDTH].to_vec();
        let prose = embed(&text).k;
        let table = embed(&b"| 12 | 407 | 3.5 |\n".repeat(6)).k;
        let near = cosine(&at(&prose, 100), &at(&prose, 108));
        let far = cosine(&at(&prose, 100), &at(&table, 100));
        assert!(near > 0.8 && far < 0.5, "{near} {far}");
    }
}
