//! include/dla.h is what the sources say. `DLA_BLESS=1 cargo test -p dla-capi --test header` writes it anew.

use std::path::Path;

#[test]
fn header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in ["types.rs", "status.rs", "cache.rs", "lib.rs", "entries.rs"] {
        builder = builder.with_src(root.join("src").join(file));
    }
    let mut generated = Vec::new();
    builder.generate().expect("the sources").write(&mut generated);
    // The Safety sections speak to Rust; their words stand for C programmers too.
    let generated = String::from_utf8(generated).expect("UTF-8").replace(" # Safety\n", " Safety:\n");
    let path = root.join("../include/dla.h");
    if std::env::var_os("DLA_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("include/dla.h");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == generated, "include/dla.h is stale: DLA_BLESS=1 cargo test -p dla-capi --test header");
}
