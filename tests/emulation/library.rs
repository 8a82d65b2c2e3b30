//! The kernels' own sources as shared libraries of this machine, one a file, compiled when one of its kernels is first
//! launched and kept by what they are made of.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// `dla_emulate` of kernels.cpp.
type Symbol = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    c_uint,
    c_uint,
    *const c_void,
    *mut usize,
    *mut c_char,
    usize,
) -> c_int;

/// There is a compiler: kernels can be launched.
#[derive(Clone, Copy)]
pub struct Emulate(());

/// `None` where there is no compiler.
pub fn emulator() -> Option<Emulate> {
    let compiler = compiler();
    if let Err(error) = Command::new(&compiler).arg("--version").output() {
        println!("SKIPPED: the kernels are not checked, {compiler} does not run: {error}");
        assert!(std::env::var_os("DLA_EMULATION").is_none_or(|value| value != "require"));
        return None;
    }
    Some(Emulate(()))
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned())
}

/// Which file holds a kernel: by the first stem that its name begins with.
const FILES: [(&str, &str); 36] = [
    ("segment_states", "segment_backward"),
    ("segment_scalars", "segment_backward"),
    ("segment_open_backward", "segment_backward"),
    ("segment_log_backward", "segment_backward"),
    ("segment_backward", "segment_backward"),
    ("drift_backward", "segment_backward"),
    ("segment", "segment"),
    ("prepare_backward_sm90", "prepare_backward_sm90"),
    ("prepare_backward", "prepare_backward"),
    ("prepare_delta_sm90", "prepare_delta_sm90"),
    ("prepare_sm90", "prepare_sm90"),
    ("prepare_queries_sm90", "prepare_sm90"),
    ("gammas_sm90", "prepare_sm90"),
    ("prepare", "prepare"),
    ("route_backward", "route_backward"),
    ("head_sums", "group_sum"),
    ("route", "route"),
    ("scan_backward_sm90", "scan_backward_sm90"),
    ("scan_backward", "scan_backward"),
    ("scan_states_sm90", "scan_sm90"),
    ("scan_states", "scan_backward"),
    ("scan_delta_sm90", "scan_delta_sm90"),
    ("scan_sm90", "scan_sm90"),
    ("scan_queries_sm90", "scan_sm90"),
    ("scan", "scan"),
    ("group_sum", "group_sum"),
    ("lambda_backward_sm90", "lambda_backward_sm90"),
    ("anchors_sm90", "g_backward_sm90"),
    ("end_anchors_sm90", "g_backward_sm90"),
    ("g_flow_sm90", "g_backward_sm90"),
    ("g_backward_sm90", "g_backward_sm90"),
    ("step", "step"),
    ("slots", "slots"),
    ("wrong", "slots"),
    ("missing", "slots"),
    ("", "slots"),
];

/// The file, by its stem, that holds a kernel.
pub fn file_of(kernel: &str) -> &'static str {
    FILES.iter().find(|(stem, _)| kernel.starts_with(stem)).unwrap().1
}

type Libraries = HashMap<&'static str, Arc<OnceLock<Symbol>>>;

fn library(file: &'static str) -> Symbol {
    static LIBRARIES: Mutex<Option<Libraries>> = Mutex::new(None);
    let library = LIBRARIES.lock().unwrap().get_or_insert_default().entry(file).or_default().clone();
    *library.get_or_init(|| open(file))
}

const FLAGS: [&str; 12] = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-pthread",
    "-shared",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DDLA_ON_CPU",
    "-x",
    "c++",
];

/// The repository, whichever of its packages this is compiled into.
fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package.ancestors().find(|folder| folder.join("kernels/abi.cuh").exists());
    root.expect("the kernels' sources above this package").to_owned()
}

/// Where the libraries are kept: cargo's folder for what tests make. It names it to tests alone.
fn folder(root: &Path) -> PathBuf {
    if let Some(folder) = option_env!("CARGO_TARGET_TMPDIR") {
        return folder.into();
    }
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from).join("tmp")
}

fn open(file: &str) -> Symbol {
    let root = root();
    let source = root.join("kernels").join(file).with_extension("cu");
    let emulation = root.join("tests/emulation");
    let mut made_of = vec![source.clone(), root.join("kernels/abi.cuh")];
    made_of.extend([emulation.join("kernels.cpp"), emulation.join("cuda_on_cpu.hpp")]);
    let mut common: Vec<PathBuf> =
        std::fs::read_dir(root.join("kernels/common")).unwrap().map(|entry| entry.unwrap().path()).collect();
    common.sort();
    made_of.extend(common);
    let mut hash = DefaultHasher::new();
    (compiler(), FLAGS).hash(&mut hash);
    made_of.iter().for_each(|path| std::fs::read(path).unwrap().hash(&mut hash));

    let folder = &folder(&root);
    std::fs::create_dir_all(folder).unwrap();
    let path = folder.join(format!("{file}-{:016x}.so", hash.finish()));
    if !path.exists() {
        // Under its own name first: another run may compile it too.
        let fresh = path.with_extension(format!("{}.so", std::process::id()));
        let build = Command::new(compiler())
            .args(FLAGS)
            .arg(format!("-DFILE_{file}"))
            .arg("-I")
            .arg(&emulation)
            .arg("-include")
            .arg(&source)
            .arg(emulation.join("kernels.cpp"))
            .arg("-o")
            .arg(&fresh)
            .output()
            .unwrap();
        assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
        // Earlier ones of the same file; who has one open keeps it.
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_prefix(file).is_some_and(|rest| rest.len() == 20 && rest.starts_with('-')) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        std::fs::rename(&fresh, &path).unwrap();
    }
    let path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the library was built from this repository; its one symbol has this type.
    unsafe {
        let library = dlopen(path.as_ptr(), 2);
        assert!(!library.is_null(), "dlopen {path:?}");
        let symbol = dlsym(library, c"dla_emulate".as_ptr());
        assert!(!symbol.is_null());
        std::mem::transmute::<*mut c_void, Symbol>(symbol)
    }
}

impl Emulate {
    /// The bytes of the struct that a kernel takes; `None` where there is no such kernel.
    #[allow(dead_code)]
    pub fn params_bytes(self, kernel: &str) -> Option<usize> {
        // SAFETY: without parameters nothing runs.
        unsafe { call(kernel, 0, 0, 0, std::ptr::null()) }.ok()
    }

    /// Runs a kernel over `grid` blocks of `threads`, 0: as many as kernels.cpp lists it with; what went wrong, if anything did.
    ///
    /// # Safety
    /// `params` is the twin of the struct that this kernel takes, and its pointers lie in live buffers of the sizes that
    /// abi.cuh asks for.
    pub unsafe fn run(
        self,
        kernel: &str,
        grid: usize,
        threads: usize,
        shared_bytes: usize,
        params: *const c_void,
    ) -> Option<String> {
        // SAFETY: the caller's.
        unsafe { call(kernel, grid, threads, shared_bytes, params) }.err()
    }
}

/// # Safety
/// As [`Emulate::run`], or `params` is null.
unsafe fn call(
    kernel: &str,
    grid: usize,
    threads: usize,
    shared_bytes: usize,
    params: *const c_void,
) -> Result<usize, String> {
    let symbol = library(file_of(kernel));
    let name = CString::new(kernel).unwrap();
    let mut error = [0u8; 512];
    let mut params_bytes = 0;
    // SAFETY: the caller's.
    let code = unsafe {
        symbol(
            name.as_ptr(),
            grid as c_uint,
            threads as c_uint,
            shared_bytes as c_uint,
            params,
            &mut params_bytes,
            error.as_mut_ptr().cast(),
            error.len(),
        )
    };
    match code {
        0 => Ok(params_bytes),
        _ => Err(CStr::from_bytes_until_nul(&error).unwrap().to_string_lossy().into_owned()),
    }
}
