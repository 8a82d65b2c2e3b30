//! The rate that this machine's matrix product reaches: what a stage's rate is judged by.

use std::time::Instant;

/// Extent of the cube.
const N: usize = 2048;

/// Median GFLOP/s of a product of two 2048 x 2048 f32 matrices, by the crate and with the features
/// that the library's CPU engine multiplies with, on all threads.
pub fn matmul_gflop_s(repeats: u16) -> f64 {
    let matrix = |phase: usize| -> Vec<f32> {
        (0..N * N).map(|i| ((i * 7 + phase) % 13) as f32 / 13.0 - 0.5).collect()
    };
    let (a, b, mut c) = (matrix(0), matrix(5), vec![0f32; N * N]);
    // The first pays for pages and threads: not timed.
    product(&a, &b, &mut c);
    let mut seconds: Vec<f64> = (0..repeats.max(1))
        .map(|_| {
            let start = Instant::now();
            product(&a, &b, &mut c);
            start.elapsed().as_secs_f64()
        })
        .collect();
    std::hint::black_box(&c);
    seconds.sort_by(f64::total_cmp);
    2.0 * (N * N * N) as f64 / seconds[(seconds.len() - 1) / 2] * 1e-9
}

/// c = a b, all row-major N x N.
fn product(a: &[f32], b: &[f32], c: &mut [f32]) {
    assert!(a.len() == N * N && b.len() == N * N && c.len() == N * N);
    let (column, row) = (1, N as isize);
    // SAFETY: all three hold N x N elements, as asserted, and the strides are those of a row-major
    // N x N matrix, so that every element reached lies inside; c is borrowed alone.
    unsafe {
        gemm::gemm(
            N,
            N,
            N,
            c.as_mut_ptr(),
            column,
            row,
            false,
            a.as_ptr(),
            column,
            row,
            b.as_ptr(),
            column,
            row,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_one() {
        let identity: Vec<f32> = (0..N * N).map(|i| f32::from(u8::from(i / N == i % N))).collect();
        let a: Vec<f32> = (0..N * N).map(|i| (i % 1000) as f32).collect();
        let mut c = vec![f32::NAN; N * N];
        product(&a, &identity, &mut c);
        assert!(a == c);
    }
}
