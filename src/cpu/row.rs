//! One sequence and value head: where its tokens lie in the caller's tensors, loaded by the chunk.

use crate::options::L2NORM_EPS;
use crate::problem::{Problem, Shape};
use crate::tensor::{Buffer, Data};
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens that are worked on at once. Longer chunks would spend more on pairs of tokens, 2 C (dk + dv) FLOP
/// a token; products of 64 rows already run near the library's full rate.
pub(crate) const CHUNK: usize = 64;

/// Log decays below this are taken as this: e^-800 is 0 even in f64.
const LEAST_G: f64 = -800.0;

/// One sequence and value head.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) sequence: usize,
    pub(crate) head: usize,
}

impl<'a> Row<'a> {
    /// Row `index` of N x HV.
    pub(crate) fn new(problem: &'a Problem<'a>, index: usize) -> Self {
        let heads = problem.shape().value_heads;
        Row { problem, sequence: index / heads, head: index % heads }
    }

    pub(crate) fn shape(&self) -> &'a Shape {
        self.problem.shape()
    }

    /// Index among N x HV.
    pub(crate) fn index(&self) -> usize {
        self.sequence * self.shape().value_heads + self.head
    }

    pub(crate) fn len(&self) -> usize {
        self.problem.sequences()[self.sequence].len
    }

    /// The chunks of the sequence, as ranges of its tokens.
    pub(crate) fn chunks(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator {
        let len = self.len();
        (0..len.div_ceil(CHUNK)).map(move |chunk| chunk * CHUNK..((chunk + 1) * CHUNK).min(len))
    }

    /// Index of token t in a `[B,T,HV]` array.
    pub(crate) fn at(&self, t: usize) -> usize {
        (self.problem.sequences()[self.sequence].start + t) * self.shape().value_heads + self.head
    }

    /// Index of token t in a `[B,T,H]` array.
    pub(crate) fn key_at(&self, t: usize) -> usize {
        let shape = self.shape();
        (self.problem.sequences()[self.sequence].start + t) * shape.heads + shape.key_head(self.head)
    }

    /// Whether any number that the row reads is NaN or infinite. (A log decay of minus infinity is
    /// a decay to 0 and needs no care.)
    pub(crate) fn has_non_finite(&self) -> bool {
        let Shape { dk, dv, .. } = *self.shape();
        let inputs = self.problem.inputs();
        let mut row = vec![0.0; dk.max(dv)];
        let mut finite = |data: Data, index: usize, width: usize| {
            if width > row.len() {
                row.resize(width, 0.0);
            }
            data.load(index * width, &mut row[..width]);
            row[..width].iter().all(|x| x.is_finite())
        };
        let logits = inputs.route.and_then(|route| route.logits);
        let weights = [inputs.lambda, logits].into_iter().flatten();
        let route = inputs.route.iter().flat_map(|route| [route.slope, route.bias]);
        let per_head = |data: Data| {
            let mut x = [0.0];
            data.load(self.head, &mut x);
            x[0].is_finite()
        };
        let tokens_finite = (0..self.len()).all(|t| {
            let (at, key_at) = (self.at(t), self.key_at(t));
            finite(inputs.q.data(), key_at, dk)
                && finite(inputs.k.data(), key_at, dk)
                && finite(inputs.v.data(), at, dv)
                && inputs.beta.iter().all(|beta| finite(beta.data(), at, 1))
                && weights.clone().all(|tensor| finite(tensor.data(), at, tensor.shape()[3]))
        });
        let cache_finite = inputs.cache.is_none_or(|cache| {
            let (dims, index) = (cache.dims, self.index());
            let all =
                |x: &[f32], width: usize| x[index * width..(index + 1) * width].iter().all(|x| x.is_finite());
            all(&cache.states, dims.bank())
                && all(&cache.open, dims.state())
                && cache.keys.iter().all(|keys| all(keys, dims.key_bank()))
        });
        !(tokens_finite && cache_finite && route.map(|tensor| tensor.data()).all(per_head))
    }
}

/// A chunk's inputs in f32, row-major, the first `len` rows of each valid.
pub(crate) struct Chunk {
    pub(crate) len: usize,
    /// Query and key as the recurrence uses them, before `scale`, `[len, dk]`.
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    /// `[len, dv]`.
    pub(crate) v: Vec<f32>,
    /// Log decay of every token, and its inclusive sum from the chunk's first token on (Gamma).
    pub(crate) g: Vec<f64>,
    pub(crate) gamma: Vec<f64>,
    pub(crate) beta: Vec<f32>,
    /// What q and k were multiplied by to have unit norm; 1 without `qk_l2norm`.
    pub(crate) q_factor: Vec<f32>,
    pub(crate) k_factor: Vec<f32>,
}

impl Chunk {
    pub(crate) fn new(shape: &Shape) -> Self {
        Chunk {
            len: 0,
            q: vec![0.0; CHUNK * shape.dk],
            k: vec![0.0; CHUNK * shape.dk],
            v: vec![0.0; CHUNK * shape.dv],
            g: vec![0.0; CHUNK],
            gamma: vec![0.0; CHUNK],
            beta: vec![1.0; CHUNK],
            q_factor: vec![1.0; CHUNK],
            k_factor: vec![1.0; CHUNK],
        }
    }

    /// Loads tokens `tokens` of `row`.
    pub(crate) fn load(&mut self, row: &Row, tokens: Range<usize>) {
        let Shape { dk, dv, .. } = *row.shape();
        let inputs = row.problem.inputs();
        let normalise = row.problem.options().qk_l2norm;
        self.len = tokens.len();
        let mut gamma = 0.0;
        for (i, t) in tokens.enumerate() {
            let (at, key_at) = (row.at(t), row.key_at(t));
            let (q, k) = (&mut self.q[i * dk..][..dk], &mut self.k[i * dk..][..dk]);
            inputs.q.data().load(key_at * dk, q);
            inputs.k.data().load(key_at * dk, k);
            inputs.v.data().load(at * dv, &mut self.v[i * dv..][..dv]);
            if normalise {
                self.q_factor[i] = normalise_row(q);
                self.k_factor[i] = normalise_row(k);
            }
            self.g[i] = scalar(inputs.g.map(|g| g.data()), at).map_or(0.0, |g| f64::from(g).max(LEAST_G));
            gamma += self.g[i];
            self.gamma[i] = gamma;
            self.beta[i] = scalar(inputs.beta.map(|beta| beta.data()), at).unwrap_or(1.0);
        }
    }

    /// Gamma at the chunk's last token.
    pub(crate) fn total(&self) -> f64 {
        self.len.checked_sub(1).map_or(0.0, |last| self.gamma[last])
    }
}

fn scalar(data: Option<Data>, index: usize) -> Option<f32> {
    data.map(|data| {
        let mut x = [0.0];
        data.load(index, &mut x);
        x[0]
    })
}

/// Divides a row by `sqrt(|x|^2 + eps)`; returns the factor.
pub(crate) fn normalise_row(x: &mut [f32]) -> f32 {
    let factor = (1.0 / (super::matrix::dot_f64(x, x) + L2NORM_EPS).sqrt()) as f32;
    x.iter_mut().for_each(|x| *x *= factor);
    factor
}

/// `dx` of `y = x / sqrt(|x|^2 + eps)` in place of `dy`, from y and the factor.
pub(crate) fn normalise_adjoint(y: &[f32], factor: f32, dy: &mut [f32]) {
    let projection = super::matrix::dot(y, dy);
    for (dy, y) in dy.iter_mut().zip(y) {
        *dy = factor * (*dy - projection * y);
    }
}

/// A slice that several rows write, each its own elements.
pub(crate) struct Shared<'a, T> {
    first: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Shared` only hands out elements through `slice`, whose contract forbids overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above; the borrow it holds is a `&mut [T]`, which is Send.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Shared { first: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// Elements `offset..offset + len`.
    ///
    /// # Safety
    /// No two slices that are alive at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset + len <= self.len);
        // SAFETY: in bounds (asserted), and not aliased by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(offset), len) }
    }
}

/// A [`Buffer`] that several rows write, each its own elements.
pub(crate) enum SharedBuffer<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
    F16(Shared<'a, f16>),
}

impl<'a> SharedBuffer<'a> {
    pub(crate) fn new(buffer: &'a mut Buffer) -> Self {
        match buffer {
            Buffer::F32(x) => SharedBuffer::F32(Shared::new(x)),
            Buffer::Bf16(x) => SharedBuffer::Bf16(Shared::new(x)),
            Buffer::F16(x) => SharedBuffer::F16(Shared::new(x)),
        }
    }

    /// Rounds and stores elements from `offset` on.
    ///
    /// # Safety
    /// No two threads may store the same elements.
    pub(crate) unsafe fn store(&self, offset: usize, x: &[f32]) {
        // SAFETY: by this function's contract; each slice ends with its statement.
        unsafe {
            match self {
                SharedBuffer::F32(out) => out.slice(offset, x.len()).copy_from_slice(x),
                SharedBuffer::Bf16(out) => {
                    let out = out.slice(offset, x.len());
                    out.iter_mut().zip(x).for_each(|(out, &x)| *out = bf16::from_f32(x));
                }
                SharedBuffer::F16(out) => {
                    let out = out.slice(offset, x.len());
                    out.iter_mut().zip(x).for_each(|(out, &x)| *out = f16::from_f32(x));
                }
            }
        }
    }
}
