//! examples/c compiled against include/dla.h and both libraries, and run.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of the libraries that this test was built with.
fn libraries() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    test.parent().expect("in a folder").to_owned()
}

fn run(language: &str, name: &str, link: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let libraries = libraries();
    let program = libraries.join(name);
    let compiler = if language == "c++" { "c++" } else { "cc" };
    let compiled = Command::new(compiler)
        .args(["-x", language, "-Wall", "-Wextra", "-Werror", "-O1"])
        .arg(root.join("examples/c/dla.c"))
        .args(["-x", "none", "-I"])
        .arg(root.join("include"))
        .arg("-L")
        .arg(&libraries)
        .args(link)
        .args(["-lm", "-lpthread", "-ldl", "-o"])
        .arg(&program)
        .status()
        .expect("a C compiler");
    assert!(compiled.success(), "{language} does not compile");
    let output = Command::new(&program).env("LD_LIBRARY_PATH", &libraries).output().expect("runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{stdout}{stderr}");
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.contains("slots held"), "{stdout}");
}

#[test]
fn c_with_the_shared_library() {
    run("c", "dla_c_shared", &["-ldla_capi"]);
}

#[test]
fn c_with_the_static_library() {
    run("c", "dla_c_static", &["-l:libdla_capi.a"]);
}

#[test]
fn cpp_takes_the_header() {
    run("c++", "dla_cpp", &["-ldla_capi"]);
}
