//! Where nvcc is, what it can make, and how it is called.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Architectures that SASS is made for, where nvcc can: A100, RTX 30, Ada, Hopper, Blackwell.
const DEFAULT: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];

/// What runs on every card from the A100 on: PTX that the driver compiles.
const BASELINE: &str = "80";

/// nvcc and what it needs beside it, from PyPI.
pub const WHEELS: [&str; 4] = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
];

/// What decides where nvcc is looked for.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// DLA_NVCC: a path, or `pip`. (`stub`: build.rs asks for no nvcc.)
    pub dla_nvcc: Option<String>,
    /// CUDA_HOME and CUDA_PATH.
    pub cuda_homes: Vec<PathBuf>,
    /// Folders of PATH.
    pub path: Vec<PathBuf>,
    /// Installed toolkits and the site-packages of Python environments, in this order.
    pub toolkits: Vec<PathBuf>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut toolkits = vec![PathBuf::from("/usr/local/cuda")];
        for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os) {
            let library = Path::new(&prefix).join("lib");
            let versions = std::fs::read_dir(library).into_iter().flatten().flatten();
            toolkits.extend(versions.map(|version| version.path().join("site-packages/nvidia/cu13")));
        }
        Environment {
            dla_nvcc: std::env::var("DLA_NVCC").ok().filter(|value| !value.is_empty()),
            cuda_homes: homes.collect(),
            path: std::env::split_paths(&path).collect(),
            toolkits,
        }
    }
}

/// An nvcc that runs.
#[derive(Debug)]
pub struct Nvcc {
    program: PathBuf,
}

/// Finds nvcc; `None` where there is none. What DLA_NVCC names must be there.
pub fn find(environment: &Environment, target: &Path) -> Result<Option<Nvcc>, String> {
    let in_toolkit = |folder: &PathBuf| folder.join("bin").join("nvcc");
    match environment.dla_nvcc.as_deref() {
        Some("pip") => return install(&target.join("nvcc-13.0")).map(Some),
        Some(named) => {
            let program = PathBuf::from(named);
            if !program.is_file() {
                return Err(format!("DLA_NVCC: expected the path of nvcc, or pip, got {named}"));
            }
            return Ok(Some(Nvcc { program }));
        }
        None => {}
    }
    let candidates = environment
        .cuda_homes
        .iter()
        .map(in_toolkit)
        .chain(environment.path.iter().map(|folder| folder.join("nvcc")))
        .chain(environment.toolkits.iter().map(in_toolkit));
    Ok(candidates.into_iter().find(|program| program.is_file()).map(|program| Nvcc { program }))
}

/// Installs the wheels into `folder`, once.
fn install(folder: &Path) -> Result<Nvcc, String> {
    let program = |folder: &Path| folder.join("nvidia/cu13/bin/nvcc");
    if program(folder).is_file() {
        return Ok(Nvcc { program: program(folder) });
    }
    // Aside, then renamed: an install that breaks off, or runs twice, leaves nothing half done.
    let aside = folder.with_extension(std::process::id().to_string());
    let mut command = Command::new("python3");
    command.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        "--target",
    ]);
    command.arg(&aside).args(WHEELS);
    run(&mut command).map_err(|error| format!("DLA_NVCC=pip: {error}"))?;
    if std::fs::rename(&aside, folder).is_err() {
        let _ = std::fs::remove_dir_all(&aside);
    }
    let program = program(folder);
    if program.is_file() {
        Ok(Nvcc { program })
    } else {
        Err(format!("DLA_NVCC=pip: the wheels hold no {}", program.display()))
    }
}

/// Runs a command; its stdout and stderr together, or in one line what went wrong.
fn run(command: &mut Command) -> Result<String, String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{shown} does not run: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{shown} failed ({}):\n{text}", output.status))
    }
}

impl Nvcc {
    /// Codes that it can make, as it lists them.
    pub fn codes(&self) -> Result<String, String> {
        run(Command::new(&self.program).arg("--list-gpu-code"))
    }

    /// What it calls itself.
    pub fn version(&self) -> Result<String, String> {
        let text = run(Command::new(&self.program).arg("--version"))?;
        Ok(text.lines().last().unwrap_or_default().to_owned())
    }

    /// Compiles one file; returns the compiler's report.
    pub fn compile(&self, source: &Path, fatbin: &Path, arguments: &[String]) -> Result<String, String> {
        run(Command::new(&self.program).args(arguments).arg("-o").arg(fatbin).arg(source))
    }
}

/// The architectures to compile for: `asked` (commas or blanks between), or the default ones that are listed
/// in `codes`.
pub fn architectures(asked: Option<&str>, codes: &str) -> Result<Vec<String>, String> {
    let listed: Vec<&str> = codes.split_whitespace().filter_map(|code| code.strip_prefix("sm_")).collect();
    // nvcc lists 90 and means 90a as well.
    let can = |arch: &str| listed.contains(&arch.trim_end_matches(|c: char| c.is_ascii_lowercase()));
    let Some(asked) = asked.filter(|asked| !asked.trim().is_empty()) else {
        return Ok(DEFAULT.into_iter().filter(|arch| can(arch)).map(str::to_owned).collect());
    };
    let archs: Vec<&str> = asked.split([',', ' ']).filter(|arch| !arch.is_empty()).collect();
    match archs.iter().find(|arch| !can(arch)) {
        Some(arch) => Err(format!(
            "DLA_CUDA_ARCHS: expected architectures that this nvcc can make ({}), got {arch}",
            listed.join(" ")
        )),
        None => Ok(archs.into_iter().map(str::to_owned).collect()),
    }
}

/// Whether an nvcc that makes these codes knows `--compress-mode`: 12.8, the first that makes sm_100, does.
pub fn compresses(codes: &str) -> bool {
    codes.lines().any(|code| code.trim() == "sm_100")
}

/// Arguments of a compilation: SASS for every one of `archs`, and baseline PTX; `small`: compressed as far as can be, to a
/// fifth (drivers of CUDA 12.4 and later load it).
pub fn arguments(archs: &[&str], baseline: bool, small: bool) -> Vec<String> {
    let mut out: Vec<String> =
        ["-std=c++20", "-O3", "-fatbin", "-Xptxas", "-v"].into_iter().map(str::to_owned).collect();
    if small {
        out.push("--compress-mode=size".to_owned());
    }
    let codes = archs.iter().map(|arch| (*arch, format!("sm_{arch}")));
    let ptx = baseline.then(|| (BASELINE, format!("compute_{BASELINE}")));
    for (arch, code) in codes.chain(ptx) {
        out.push("-gencode".to_owned());
        out.push(format!("arch=compute_{arch},code={code}"));
    }
    out
}
