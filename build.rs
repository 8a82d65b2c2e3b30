//! Compiles `kernels/*.cu`, one fatbin per stage, and leaves a table of them for `src/cuda/module.rs`.
//!
//! Needs no GPU. Without nvcc the crate is built for the CPU alone and one warning says so. What each
//! environment variable does is in docs/building.md.

#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/report.rs"]
mod report;

use nvcc::Nvcc;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

/// Files compiled at once: nvcc takes up to 1 GB for each.
const JOBS: usize = 4;

/// A stage to be compiled.
struct Source {
    stage: String,
    path: PathBuf,
    /// Of the file and every header.
    hash: u64,
}

/// A compiled stage.
struct Fatbin {
    stage: String,
    hash: u64,
    archs: String,
    path: PathBuf,
}

fn main() {
    if let Err(message) = run() {
        // Cargo shows what is written to stderr by a build script that fails.
        eprintln!("dla: {message}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    for name in [
        "DLA_NVCC",
        "DLA_CUDA_ARCHS",
        "DLA_CUDA_CHECK",
        "CUDA_HOME",
        "CUDA_PATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "DOCS_RS",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for path in ["build.rs", "build", "kernels", "src/cuda"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    println!("cargo::rustc-env=DLA_CUDA_SOURCE_HASH={:016x}", source_hash(&root)?);
    let sources = sources(&root.join("kernels"))?;
    let fatbins = if env::var_os("DOCS_RS").is_some() {
        Vec::new()
    } else if env::var("DLA_NVCC").is_ok_and(|value| value == "stub") {
        println!("cargo::warning=DLA_NVCC=stub: kernels without code, for scripts/emulated alone");
        stubs(&sources, &out.join("stub.fatbin"))?
    } else if let Some(packaged) = packaged(&root.join("fatbins"), &sources)? {
        packaged
    } else {
        match nvcc::find(&nvcc::Environment::of_process(), &target_folder(&out))? {
            Some(nvcc) => compile(&nvcc, &sources, &target_folder(&out).join("dla-fatbins"))?,
            None => {
                println!(
                    "cargo::warning=no nvcc found: built for the CPU alone. DLA_NVCC=pip installs one from PyPI \
                     under the target folder; docs/building.md says where else it is looked for"
                );
                Vec::new()
            }
        }
    };
    let mut table = String::from("&[\n");
    for Fatbin { stage, hash, archs, path } in &fatbins {
        let _ = writeln!(
            table,
            "    Fatbin {{ stage: {stage:?}, source_hash: {hash:#018x}, archs: {archs:?}, image: include_bytes!({path:?}) }},"
        );
    }
    table.push_str("]\n");
    fs::write(out.join("fatbins.rs"), table).map_err(|error| format!("{}: {error}", out.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

/// The folder that cargo builds into: the nearest above OUT_DIR that it has marked as such.
fn target_folder(out: &Path) -> PathBuf {
    out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists()).unwrap_or(out).to_owned()
}

/// FNV-1a: stable, and enough to tell one source from another.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Hash of every file of `kernels/` and `src/cuda/`: their paths and bytes, in the order of their paths.
fn source_hash(root: &Path) -> Result<u64, String> {
    let wrong = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let mut folders = vec![root.join("kernels"), root.join("src/cuda")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|error| wrong(&folder, error))? {
            let path = entry.map_err(|error| wrong(&folder, error))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                files.push((name, path));
            }
        }
    }
    files.sort();
    let mut bytes = Vec::new();
    for (name, path) in files {
        bytes.extend(name.into_bytes());
        bytes.extend(fs::read(&path).map_err(|error| wrong(&path, error))?);
    }
    Ok(hash(bytes))
}

/// Every `.cu` in `folder`, in order.
fn sources(folder: &Path) -> Result<Vec<Source>, String> {
    let mut headers = Vec::new();
    let mut files = Vec::new();
    for folder in [folder.to_owned(), folder.join("common")] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.map_err(|error| format!("{}: {error}", folder.display()))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("cu") => files.push(path),
                Some("cuh") => headers.push(path),
                _ => {}
            }
        }
    }
    headers.sort();
    files.sort();
    let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let mut shared = Vec::new();
    for header in &headers {
        shared.extend(read(header)?);
    }
    let source = |path: PathBuf| {
        let bytes = read(&path)?;
        let stage = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Source { stage, hash: hash(bytes.into_iter().chain(shared.iter().copied())), path })
    };
    files.into_iter().map(source).collect()
}

/// Fatbins that were compiled before packaging (scripts/fatbins): all of them, of these very sources, or none.
fn packaged(folder: &Path, sources: &[Source]) -> Result<Option<Vec<Fatbin>>, String> {
    if !folder.is_dir() {
        return Ok(None);
    }
    println!("cargo::rerun-if-changed={}", folder.display());
    // A line a stage: its name, then its architectures.
    let Ok(archs) = fs::read_to_string(folder.join("archs")) else { return Ok(None) };
    let fatbin = |source: &Source| {
        let path = folder.join(format!("{}-{:016x}.fatbin", source.stage, source.hash));
        let archs =
            archs.lines().find_map(|line| line.strip_prefix(&format!("{} ", source.stage)))?.to_owned();
        path.is_file().then(|| Fatbin { stage: source.stage.clone(), hash: source.hash, archs, path })
    };
    Ok(sources.iter().map(fatbin).collect())
}

/// A fatbin of every stage that holds no code: the emulated driver knows kernels by their names, a card's refuses it.
fn stubs(sources: &[Source], path: &Path) -> Result<Vec<Fatbin>, String> {
    // Magic number, version, bytes of this header, bytes that follow.
    let header = [&0xba55_ed50u32.to_le_bytes()[..], &1u16.to_le_bytes(), &16u16.to_le_bytes(), &[0; 8]];
    fs::write(path, header.concat()).map_err(|error| format!("{}: {error}", path.display()))?;
    let stub = |source: &Source| Fatbin {
        stage: source.stage.clone(),
        hash: source.hash,
        archs: "stub".to_owned(),
        path: path.to_owned(),
    };
    Ok(sources.iter().map(stub).collect())
}

/// Compiles what `store` does not hold yet, several files at once. It stands in the target folder, where every
/// profile and set of features finds it.
fn compile(nvcc: &Nvcc, sources: &[Source], store: &Path) -> Result<Vec<Fatbin>, String> {
    fs::create_dir_all(store).map_err(|error| format!("{}: {error}", store.display()))?;
    let codes = nvcc.codes()?;
    let archs = nvcc::architectures(env::var("DLA_CUDA_ARCHS").ok().as_deref(), &codes)?;
    let small = nvcc::compresses(&codes);
    let check = env::var("DLA_CUDA_CHECK").is_ok_and(|value| value == "1");
    let results: Vec<Mutex<Result<Fatbin, String>>> =
        sources.iter().map(|_| Mutex::new(Err("not compiled".to_owned()))).collect();
    let next = AtomicUsize::new(0);
    let jobs = std::thread::available_parallelism().map_or(1, usize::from).min(JOBS);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((source, result)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    sources.get(index).zip(results.get(index))
                } {
                    let compiled = compile_one(nvcc, source, (&archs, small), store, check);
                    if let Ok(mut result) = result.lock() {
                        *result = compiled;
                    }
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().map_err(|error| error.to_string())?).collect()
}

fn compile_one(
    nvcc: &Nvcc,
    source: &Source,
    (archs, small): (&[String], bool),
    store: &Path,
    check: bool,
) -> Result<Fatbin, String> {
    // Kernels for Hopper alone have no other code.
    let hopper = source.stage.ends_with("_sm90");
    let archs: Vec<&str> =
        archs.iter().map(String::as_str).filter(|arch| !hopper || arch.starts_with("90")).collect();
    let arguments = nvcc::arguments(&archs, !hopper, small);
    let key = format!("{:016x} {} {arguments:?}", source.hash, nvcc.version()?);
    let path = store.join(format!("{}-{:016x}.fatbin", source.stage, hash(key.bytes())));
    let report_path = path.with_extension("report");
    if !path.is_file() {
        // Aside, then renamed: another build may be at the same.
        let aside = path.with_extension(std::process::id().to_string());
        let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
        let report = nvcc.compile(&source.path, &aside, &arguments)?;
        fs::write(&report_path, report).map_err(wrong)?;
        fs::rename(&aside, &path).map_err(wrong)?;
    }
    if check {
        let report = fs::read_to_string(&report_path)
            .map_err(|error| format!("{}: {error}", report_path.display()))?;
        let found = report::check(&report).map_err(|error| format!("{}: {error}", source.path.display()))?;
        if found == 0 {
            return Err(format!("{}: the compiler's report names no kernel", source.path.display()));
        }
    }
    Ok(Fatbin { stage: source.stage.clone(), hash: source.hash, archs: archs.join(" "), path })
}
