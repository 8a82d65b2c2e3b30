//! Every way a call can be wrong, as one type.

/// What was wrong with a call. Each message names the argument, what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong rank or extent.
    #[error("{name}: expected shape {expected}, got {given}")]
    Shape {
        /// Argument.
        name: &'static str,
        /// Expected shape, with the symbols of the layout.
        expected: String,
        /// Given shape.
        given: String,
    },
    /// A tensor has elements of the wrong type.
    #[error("{name}: expected dtype {expected}, got {given}")]
    Dtype {
        /// Argument.
        name: &'static str,
        /// Expected type.
        expected: String,
        /// Given type.
        given: String,
    },
    /// An argument that this call needs is absent.
    #[error("{name}: missing; {why}")]
    Missing {
        /// Argument.
        name: &'static str,
        /// Why this call needs it.
        why: &'static str,
    },
    /// An argument is given that this call does not read.
    #[error("{name}: not expected; {why}")]
    Unexpected {
        /// Argument.
        name: &'static str,
        /// Why this call does not read it.
        why: &'static str,
    },
    /// One element of a tensor is out of its domain.
    #[error("{name}: expected {expected} everywhere, got {given} at element {index}")]
    Value {
        /// Argument.
        name: &'static str,
        /// Expected domain.
        expected: &'static str,
        /// Given value.
        given: f64,
        /// Index into the flat tensor.
        index: usize,
    },
    /// An option is out of its range.
    #[error("{name}: expected {expected}, got {given}")]
    Option {
        /// Option.
        name: &'static str,
        /// Expected range.
        expected: String,
        /// Given value.
        given: String,
    },
    /// Packed sequence offsets that do not cut `0..T` into sequences.
    #[error("cu_seqlens: expected {expected}, got {given} at element {index}")]
    CuSeqlens {
        /// Expected property.
        expected: String,
        /// Given value.
        given: i64,
        /// Index into `cu_seqlens`.
        index: usize,
    },
    /// An event that cannot happen in the state that the log itself has led to.
    #[error(
        "events: expected {expected} for batch entry {batch}, token {token}, value head {head}, where {slots} slots are held, got {given}"
    )]
    Event {
        /// Events that could happen there.
        expected: String,
        /// Given event.
        given: u8,
        /// Batch entry.
        batch: usize,
        /// Token of that batch entry.
        token: usize,
        /// Value head.
        head: usize,
        /// Slots held before the token.
        slots: usize,
    },
    /// This build holds no GPU kernels: there was no nvcc.
    #[error(
        "device: this build has no GPU kernels: build with DLA_NVCC=pip (or an nvcc of CUDA 12.8 or later on PATH), or use the cpu engine"
    )]
    NoKernels,
    /// There is no CUDA driver on this machine.
    #[error(
        "device: no NVIDIA driver found (libcuda): install one of CUDA 12.8 or later, or use the cpu engine"
    )]
    NoDriver,
    /// The CUDA driver does not know what is asked of it.
    #[error(
        "device: the NVIDIA driver knows CUDA {given}, expected {expected} or later: update it, or use the cpu engine"
    )]
    OldDriver {
        /// Least version.
        expected: String,
        /// Version that the driver knows.
        given: String,
    },
    /// There is no GPU of that ordinal.
    #[error("device: expected the ordinal of one of {count} GPUs, counted from 0, got {given}")]
    NoDevice {
        /// GPUs that the driver shows.
        count: usize,
        /// Given ordinal.
        given: usize,
    },
    /// The kernels of this build hold no code that this GPU runs.
    #[error(
        "device: this build's kernels are for sm_{expected}, the GPU is sm_{given}: build with DLA_CUDA_ARCHS={given}"
    )]
    Architecture {
        /// Architectures that the kernels were compiled for, commas between.
        expected: String,
        /// Architecture of the GPU.
        given: String,
    },
    /// The engine does not have this part of the operator yet.
    #[error("device: the {engine} engine has no {what} yet: use the cpu engine")]
    NotBuilt {
        /// Engine that was asked.
        engine: &'static str,
        /// What it was asked for.
        what: &'static str,
    },
    /// A head size that the kernels have no tiles for.
    #[error("{name}: expected a multiple of 8 from 8 to 256 on a GPU, got {given}")]
    HeadSize {
        /// `dk` or `dv`.
        name: &'static str,
        /// Given size.
        given: usize,
    },
    /// An extent or a product of extents that does not fit a launch.
    #[error("{name}: expected at most {limit} on a GPU, got {given}")]
    Limit {
        /// What is counted.
        name: &'static str,
        /// Most of it.
        limit: u64,
        /// Given number.
        given: u64,
    },
    /// An address that is not of this GPU's memory.
    #[error("{name}: expected an address of GPU {ordinal}, got {given}")]
    ForeignPointer {
        /// Argument.
        name: &'static str,
        /// GPU of the engine.
        ordinal: usize,
        /// What the address is instead.
        given: String,
    },
    /// An address that the kernels cannot read or write whole words at.
    #[error("{name}: expected an address that is a multiple of {alignment}, got {given:#x}")]
    Misaligned {
        /// Argument.
        name: &'static str,
        /// Alignment in bytes.
        alignment: u64,
        /// Given address.
        given: u64,
    },
    /// The workspace holds fewer bytes than the plan asks for.
    #[error("workspace: expected at least {expected} bytes, got {given}")]
    Workspace {
        /// Bytes that the plan asks for.
        expected: usize,
        /// Given bytes.
        given: usize,
    },
    /// A call whose shape, options or optional arguments are not those that the plan was made for.
    #[error("{name}: {why}")]
    Plan {
        /// Argument.
        name: &'static str,
        /// How it differs.
        why: &'static str,
    },
    /// An entry of a decoding cache that this call cannot use.
    #[error("{name}: expected {expected}, got entry {given} at row {index}")]
    Entry {
        /// Argument.
        name: &'static str,
        /// Expected property.
        expected: &'static str,
        /// Given entry.
        given: usize,
        /// Row of the call.
        index: usize,
    },
    /// Every entry of a decoding cache is taken.
    #[error("entries: all {count} are taken: release one, or make a larger cache")]
    NoEntry {
        /// Entries of the cache.
        count: usize,
    },
    /// The GPU does not have as much memory free.
    #[error("device: out of memory: {bytes} bytes asked for, {free} free")]
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: usize,
        /// Bytes free on the GPU.
        free: usize,
    },
    /// A call of the CUDA driver failed.
    #[error("device: {call} failed: {name} ({code})")]
    Cuda {
        /// Function of the driver.
        call: &'static str,
        /// Name of the error.
        name: String,
        /// Its number.
        code: u32,
    },
}

impl Error {
    /// Whether the machine is at fault, or what this build can do on it, and not an argument.
    pub fn is_of_device(&self) -> bool {
        matches!(
            self,
            Error::NoKernels
                | Error::NoDriver
                | Error::OldDriver { .. }
                | Error::NoDevice { .. }
                | Error::Architecture { .. }
                | Error::NotBuilt { .. }
                | Error::OutOfMemory { .. }
                | Error::Cuda { .. }
        )
    }
}

/// The result of every call into this crate.
pub type Result<T> = std::result::Result<T, Error>;
