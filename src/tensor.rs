//! Borrowed tensors in, owned buffers out: contiguous, row-major, f32, bf16 or f16.

use half::{bf16, f16};
use std::fmt;

/// Element type of q, k, v, o and their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

/// Borrowed elements.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

impl Data<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(x) => x.len(),
            Data::Bf16(x) => x.len(),
            Data::F16(x) => x.len(),
        }
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Data::F32(_) => Dtype::F32,
            Data::Bf16(_) => Dtype::Bf16,
            Data::F16(_) => Dtype::F16,
        }
    }

    /// Converts `out.len()` elements from `offset` on.
    #[inline]
    pub(crate) fn load(&self, offset: usize, out: &mut [f32]) {
        let end = offset + out.len();
        match self {
            Data::F32(x) => out.copy_from_slice(&x[offset..end]),
            Data::Bf16(x) => {
                out.iter_mut().zip(&x[offset..end]).for_each(|(out, x)| *out = x.to_f32());
            }
            Data::F16(x) => {
                out.iter_mut().zip(&x[offset..end]).for_each(|(out, x)| *out = x.to_f32());
            }
        }
    }

    /// All elements in f64.
    pub(crate) fn to_f64(self) -> Vec<f64> {
        match self {
            Data::F32(x) => x.iter().map(|&x| x.into()).collect(),
            Data::Bf16(x) => x.iter().map(|&x| x.into()).collect(),
            Data::F16(x) => x.iter().map(|&x| x.into()).collect(),
        }
    }
}

impl<'a> From<&'a [f32]> for Data<'a> {
    fn from(x: &'a [f32]) -> Self {
        Data::F32(x)
    }
}
impl<'a> From<&'a [bf16]> for Data<'a> {
    fn from(x: &'a [bf16]) -> Self {
        Data::Bf16(x)
    }
}
impl<'a> From<&'a [f16]> for Data<'a> {
    fn from(x: &'a [f16]) -> Self {
        Data::F16(x)
    }
}
impl<'a> From<&'a Vec<f32>> for Data<'a> {
    fn from(x: &'a Vec<f32>) -> Self {
        Data::F32(x)
    }
}
impl<'a> From<&'a Buffer> for Data<'a> {
    fn from(x: &'a Buffer) -> Self {
        x.data()
    }
}

/// Highest rank of any argument.
pub(crate) const MAX_RANK: usize = 5;

/// The extents of a tensor, up to rank 5, held inline.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extents {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Extents {
    pub(crate) fn new(dims: &[usize]) -> Self {
        let mut held = [0; MAX_RANK];
        // A higher rank is kept as a rank that no argument has, so that validation names it.
        let kept = dims.len().min(MAX_RANK);
        held[..kept].copy_from_slice(&dims[..kept]);
        Extents { dims: held, rank: dims.len() }
    }

    pub(crate) fn dims(&self) -> &[usize] {
        &self.dims[..self.rank.min(MAX_RANK)]
    }
}

impl fmt::Debug for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rank > MAX_RANK {
            return write!(f, "{:?} and {} more", self.dims(), self.rank - MAX_RANK);
        }
        write!(f, "{:?}", self.dims())
    }
}

/// A borrowed, contiguous, row-major tensor.
///
/// ```
/// let q = vec![0.5f32; 2 * 3 * 4 * 8];
/// let tensor = dla::Tensor::new(&q, &[2, 3, 4, 8]);
/// assert_eq!(tensor.shape(), [2, 3, 4, 8]);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) data: Data<'a>,
    pub(crate) extents: Extents,
}

impl<'a> Tensor<'a> {
    /// `data` seen with the extents `shape`. Whether the two agree is checked by
    /// [`Problem::new`](crate::Problem::new), which knows the argument's name.
    pub fn new(data: impl Into<Data<'a>>, shape: &[usize]) -> Self {
        Tensor { data: data.into(), extents: Extents::new(shape) }
    }

    /// Elements.
    pub fn data(&self) -> Data<'a> {
        self.data
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        self.extents.dims()
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }
}

/// Owned elements, in the dtype of the call's q, k and v.
#[derive(Debug, Clone, PartialEq)]
pub enum Buffer {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Half precision.
    F16(Vec<f16>),
}

impl Buffer {
    /// `len` zeros.
    pub fn zeros(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::F32 => Buffer::F32(vec![0.0; len]),
            Dtype::Bf16 => Buffer::Bf16(vec![bf16::ZERO; len]),
            Dtype::F16 => Buffer::F16(vec![f16::ZERO; len]),
        }
    }

    /// Elements rounded from f64.
    pub fn from_f64(dtype: Dtype, x: &[f64]) -> Self {
        match dtype {
            Dtype::F32 => Buffer::F32(x.iter().map(|&x| x as f32).collect()),
            Dtype::Bf16 => Buffer::Bf16(x.iter().map(|&x| bf16::from_f64(x)).collect()),
            Dtype::F16 => Buffer::F16(x.iter().map(|&x| f16::from_f64(x)).collect()),
        }
    }

    /// Elements rounded from f32.
    pub fn from_f32(dtype: Dtype, x: &[f32]) -> Self {
        match dtype {
            Dtype::F32 => Buffer::F32(x.to_vec()),
            Dtype::Bf16 => Buffer::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
            Dtype::F16 => Buffer::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
        }
    }

    /// Borrowed elements.
    pub fn data(&self) -> Data<'_> {
        match self {
            Buffer::F32(x) => Data::F32(x),
            Buffer::Bf16(x) => Data::Bf16(x),
            Buffer::F16(x) => Data::F16(x),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data().len()
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.data().dtype()
    }

    /// All elements in f64.
    pub fn to_f64(&self) -> Vec<f64> {
        self.data().to_f64()
    }
}
