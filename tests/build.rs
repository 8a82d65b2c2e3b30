//! The build script's parts: where nvcc is found, what it is asked for, what its report says.

#[path = "../build/nvcc.rs"]
#[allow(dead_code)]
mod nvcc;
#[path = "../build/report.rs"]
mod report;

use nvcc::{Environment, architectures, arguments, compresses, find};
use std::path::{Path, PathBuf};

const CODES: &str = "sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_120\n";

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("build-{name}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// An nvcc that says where it stands.
#[cfg(unix)]
fn fake(folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(folder).unwrap();
    let program = folder.join("nvcc");
    std::fs::write(&program, format!("#!/bin/sh\necho {}\n", folder.display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}

#[test]
#[cfg(unix)]
fn nvcc_is_found_in_order() {
    let root = scratch("order");
    let says = |environment: &Environment| {
        let nvcc = find(environment, &root).unwrap().unwrap();
        PathBuf::from(nvcc.version().unwrap())
    };
    let toolkit = root.join("toolkit");
    fake(&toolkit.join("bin"));
    let mut environment =
        Environment { toolkits: vec![root.join("none"), toolkit.clone()], ..Default::default() };
    assert_eq!(says(&environment), toolkit.join("bin"));
    let path = root.join("path");
    fake(&path);
    environment.path = vec![root.join("empty"), path.clone()];
    assert_eq!(says(&environment), path);
    let home = root.join("home");
    fake(&home.join("bin"));
    environment.cuda_homes = vec![home.clone()];
    assert_eq!(says(&environment), home.join("bin"));
    let named = fake(&root.join("named"));
    environment.dla_nvcc = Some(named.display().to_string());
    assert_eq!(says(&environment), root.join("named"));
}

#[test]
fn no_nvcc_is_no_error_but_a_wrong_one_is() {
    let root = scratch("none");
    assert!(find(&Environment::default(), &root).unwrap().is_none());
    let wrong = Environment { dla_nvcc: Some("/nowhere/nvcc".to_owned()), ..Default::default() };
    let error = find(&wrong, &root).unwrap_err();
    assert!(error.contains("DLA_NVCC: expected the path of nvcc, or pip, got /nowhere/nvcc"), "{error}");
}

#[test]
#[cfg(unix)]
fn a_failing_nvcc_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let root = scratch("failing");
    let program = root.join("nvcc");
    std::fs::write(&program, "#!/bin/sh\necho broken pipe dream >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let environment = Environment { path: vec![root.clone()], ..Default::default() };
    let error = find(&environment, &root).unwrap().unwrap().codes().unwrap_err();
    assert!(error.contains("nvcc failed") && error.contains("broken pipe dream"), "{error}");
}

#[test]
fn architectures_are_those_that_nvcc_can_make() {
    assert_eq!(architectures(None, CODES).unwrap(), ["80", "86", "89", "90a", "100", "120"]);
    assert_eq!(architectures(None, "sm_80\nsm_90\n").unwrap(), ["80", "90a"]);
    assert_eq!(architectures(Some(""), "sm_80\n").unwrap(), ["80"]);
    assert_eq!(architectures(Some("90a, 80"), CODES).unwrap(), ["90a", "80"]);
    let error = architectures(Some("80,130"), CODES).unwrap_err();
    assert!(error.contains("DLA_CUDA_ARCHS") && error.contains("got 130"), "{error}");
}

#[test]
fn arguments_hold_sass_and_baseline_ptx() {
    let text = arguments(&["80", "90a"], true, false).join(" ");
    for part in
        ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]
    {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("compress"));
    assert!(!arguments(&["90a"], false, false).join(" ").contains("code=compute_"));
    assert!(arguments(&["90a"], false, true).contains(&"--compress-mode=size".to_owned()));
    assert!(compresses(CODES) && !compresses("sm_80\nsm_90\n"));
}

#[test]
fn reports_of_spills_and_stack_frames_fail() {
    let kernel = |properties: &str| {
        format!(
            "ptxas info    : Compiling entry function 'scan' for 'sm_80'\n    {properties}\nptxas info    : Used 98 registers\n"
        )
    };
    let clean = kernel("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads");
    assert_eq!(report::check(&clean.repeat(3)), Ok(3));
    for bad in [
        "8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads",
    ] {
        let error = report::check(&(clean.clone() + &kernel(bad))).unwrap_err();
        assert!(error.contains("'scan' for 'sm_80'") && error.contains(bad), "{error}");
    }
    assert_eq!(report::check(""), Ok(0));
}

/// What this build holds: a fatbin of every stage, or none at all.
#[test]
fn the_table_is_whole() {
    let stages: Vec<&str> = dla::cuda::FATBINS.iter().map(|fatbin| fatbin.stage).collect();
    let portable = ["prepare", "route", "scan", "segment"];
    assert!(stages.is_empty() || portable.iter().all(|stage| stages.contains(stage)), "{stages:?}");
    for fatbin in dla::cuda::FATBINS {
        // The magic number of a fatbin.
        assert_eq!(fatbin.image[..4], 0xba55_ed50u32.to_le_bytes());
        let first = if fatbin.archs == "stub" {
            assert_eq!(fatbin.image.len(), 16);
            "stub"
        } else if fatbin.stage.ends_with("_sm90") {
            "90"
        } else {
            "80"
        };
        assert!(fatbin.source_hash != 0 && fatbin.archs.starts_with(first));
    }
    let total: usize = dla::cuda::FATBINS.iter().map(|fatbin| fatbin.image.len()).sum();
    assert!(total < 24 << 20, "{total} bytes");
    if let Err(error) = dla::cuda::available() {
        let text = error.to_string();
        assert!(error.is_of_device() && text.starts_with("device: ") && !text.contains('\n'), "{text}");
        assert_eq!(stages.is_empty(), error == dla::Error::NoKernels);
    }
}
