//! What ptxas reports of a kernel: spills and stack frames fail the check.

/// Checks a report; returns how many kernels it names.
pub fn check(report: &str) -> Result<usize, String> {
    let mut kernel = "";
    let mut count = 0;
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function ") {
            kernel = rest;
            count += 1;
        }
        if line.contains("bytes stack frame") {
            let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            if numbers.iter().any(|&bytes| bytes > 0) {
                return Err(format!(
                    "{kernel}: expected neither stack frame nor spills, got {}",
                    line.trim()
                ));
            }
        }
    }
    Ok(count)
}
