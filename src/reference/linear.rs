//! Vectors and row-major dk x dv matrices, as plain loops.

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// `y += a x`.
pub(crate) fn add_scaled(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// `S *= a`.
pub(crate) fn scale(s: &mut [f64], a: f64) {
    s.iter_mut().for_each(|s| *s *= a);
}

/// `S += a k v^T`.
pub(crate) fn add_outer(s: &mut [f64], a: f64, k: &[f64], v: &[f64]) {
    s.chunks_exact_mut(v.len()).zip(k).for_each(|(row, k)| add_scaled(row, a * k, v));
}

/// `S^T k`, of length dv.
pub(crate) fn transposed_times(s: &[f64], k: &[f64]) -> Vec<f64> {
    let mut product = vec![0.0; s.len() / k.len()];
    s.chunks_exact(product.len()).zip(k).for_each(|(row, k)| add_scaled(&mut product, *k, row));
    product
}

/// `S v`, of length dk.
pub(crate) fn times(s: &[f64], v: &[f64]) -> Vec<f64> {
    s.chunks_exact(v.len()).map(|row| dot(row, v)).collect()
}
