//! Dense products of f32 matrices: bounds-checked views over the `gemm` crate.

use gemm::Parallelism;

/// A borrowed matrix, any strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// Index past the last element that a matrix of these extents and strides touches.
fn end(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

impl<'a> View<'a> {
    /// The first `rows` rows of a row-major matrix with `cols` columns.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows `stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(end(rows, cols, stride, 1) <= data.len());
        View { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        View {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to be written.
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> ViewMut<'a> {
    /// The first `rows` rows of a row-major matrix with `cols` columns.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(end(rows, cols, cols, 1) <= data.len());
        ViewMut { data, rows, cols, stride: cols }
    }
}

/// What a product does with what stands in its destination.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Into {
    /// `C = a A B`
    Set,
    /// `C = c C + a A B`
    Add(f32),
}

/// `C = [c C +] a A B`, on the calling thread.
pub(crate) fn multiply(c: ViewMut, into: Into, factor: f32, a: View, b: View) {
    assert!(a.rows == c.rows && b.cols == c.cols && a.cols == b.rows);
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let (read, keep) = match into {
        Into::Set => (false, 0.0),
        Into::Add(keep) => (true, keep),
    };
    // SAFETY: the views were checked against their slices when they were made, `c` is borrowed
    // mutably and so aliases neither `a` nor `b`, and the extents agree (asserted above).
    unsafe {
        gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            c.stride as isize,
            read,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Inner product in f32, in sixteen partial sums.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Inner product of f32 numbers in f64.
pub(crate) fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    sums.iter().sum::<f64>() + tail
}

/// `y += a x`.
pub(crate) fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// `x *= a`.
pub(crate) fn scale(x: &mut [f32], a: f32) {
    x.iter_mut().for_each(|x| *x *= a);
}
