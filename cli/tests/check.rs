//! `dla check`: the same seed, the same table.

mod support;

use support::dla;

#[test]
fn a_seed_repeats_its_cases() {
    let check = |seed: &str| {
        let ran = dla(["check", "--device", "reference", "--cases", "2", "--seed", seed]).succeeds();
        assert_eq!(ran.stderr, "", "no progress where stderr is no terminal");
        ran.stdout
    };
    let table = check("4");
    assert_eq!(table, check("4"));
    assert_ne!(table, check("5"));
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some("engine reference, cases 2, first seed 4"));
    let heads: Vec<_> = lines.next().expect("a table").split_whitespace().take(4).collect();
    assert_eq!(heads, ["tensor", "cases", "error", "bound"]);
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split_whitespace().collect()).collect();
    for name in ["o", "drift", "decisions", "cache_states", "dq", "dk", "dv"] {
        let row = rows.iter().find(|row| row[0] == name).unwrap_or_else(|| panic!("{name} in\n{table}"));
        assert_eq!((row[1], row[6]), ("2", "ok"));
        assert!(["4", "5"].contains(&row[5]), "the seed of a case");
    }
}

#[test]
fn a_drawn_seed_is_printed() {
    let ran = dla(["check", "--device", "reference", "--cases", "1"]).succeeds();
    let first = ran.stdout.lines().next().expect("a line");
    let seed = first.strip_prefix("engine reference, cases 1, first seed ");
    let seed = seed.unwrap_or_else(|| panic!("{first}"));
    let again = dla(["check", "--device", "reference", "--cases", "1", "--seed", seed]).succeeds();
    assert_eq!(ran.stdout, again.stdout);
}

#[test]
fn the_cpu_engine_passes() {
    let ran = dla(["check", "--cases", "6", "--seed", "1", "--quiet"]).succeeds();
    assert!(ran.stdout.starts_with("engine cpu, cases 6, first seed 1\n") && !ran.stdout.contains("OVER"));
}
