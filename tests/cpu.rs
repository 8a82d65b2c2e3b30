//! The CPU engine against the reference.

use dla::check::{Case, compare};
use dla::cpu;

#[test]
fn random_cases() {
    let first: u64 = rand::random_range(0..1 << 40);
    println!("seeds from {first}");
    let mut failures = Vec::new();
    for seed in first..first + 60 {
        let case = Case::random(seed);
        for row in compare(&cpu::Engine, &case).unwrap() {
            if !row.passed() {
                failures.push(format!("{}: {row:?}", case.describe()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
