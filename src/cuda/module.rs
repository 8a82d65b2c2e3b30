//! The kernels that this build holds, and a GPU's functions of them: loaded once per context, a fatbin when one
//! of its kernels is first asked for.

use super::abi::THREADS;
use super::driver::{self, call};
use crate::error::{Error, Result};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{self, CUresult};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels of one stage, compiled.
#[derive(Debug, Clone, Copy)]
pub struct Fatbin {
    /// Stage, as its file is named.
    pub stage: &'static str,
    /// Hash of the sources that it was compiled from.
    pub source_hash: u64,
    /// Architectures that it holds SASS for; PTX of compute_80 besides, but for those of one architecture alone.
    pub archs: &'static str,
    /// The fatbin itself.
    pub image: &'static [u8],
}

/// All stages, or none where the build found no nvcc.
pub const FATBINS: &[Fatbin] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Hash of `kernels/` and `src/cuda/`, as build.rs and scripts/evidence compute it: what a measurement was made of.
pub const SOURCE_HASH: &str = env!("DLA_CUDA_SOURCE_HASH");

/// Shared memory of a block that needs no asking for.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// A kernel of this context.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(pub(super) sys::CUfunction);

// SAFETY: a handle that the driver takes from any thread; it lives as long as the process (see `Device::of`).
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

#[derive(Debug, Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: as `Function`.
unsafe impl Send for Module {}

/// A GPU's context with the kernels that were loaded into it.
#[derive(Debug)]
pub(super) struct Device {
    context: Arc<CudaContext>,
    capability: (i32, i32),
    multiprocessors: i32,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Module>,
    /// By name; the shared memory that the function may take.
    functions: HashMap<String, (Function, u32)>,
}

impl Device {
    /// The GPU of this ordinal, in its primary context: the one that other libraries use too.
    pub(super) fn of_ordinal(ordinal: usize) -> Result<Arc<Device>> {
        if FATBINS.is_empty() {
            return Err(Error::NoKernels);
        }
        driver::init()?;
        let count = driver::device_count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { count, given: ordinal });
        }
        let context =
            CudaContext::new(ordinal).map_err(|error| wrapped("cuDevicePrimaryCtxRetain", error))?;
        Device::of(context)
    }

    /// The context's kernels. A context that was seen once is kept, with its kernels, until the process ends.
    pub(super) fn of(context: Arc<CudaContext>) -> Result<Arc<Device>> {
        static DEVICES: Mutex<Vec<Arc<Device>>> = Mutex::new(Vec::new());
        if FATBINS.is_empty() {
            return Err(Error::NoKernels);
        }
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.iter().find(|device| device.context.cu_ctx() == context.cu_ctx()) {
            return Ok(device.clone());
        }
        let attribute =
            |attribute| context.attribute(attribute).map_err(|error| wrapped("cuDeviceGetAttribute", error));
        use sys::CUdevice_attribute::*;
        let capability = (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let device = Arc::new(Device { context, capability, multiprocessors, loaded: Mutex::default() });
        devices.push(device.clone());
        Ok(device)
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Major and minor.
    pub(super) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    pub(super) fn multiprocessors(&self) -> i32 {
        self.multiprocessors
    }

    /// Most shared memory of a block.
    pub(super) fn shared_bytes_limit(&self) -> Result<usize> {
        self.bytes(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    }

    fn bytes(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        let bytes =
            self.context.attribute(attribute).map_err(|error| wrapped("cuDeviceGetAttribute", error))?;
        Ok(bytes.max(0) as usize)
    }

    /// Makes this context the calling thread's.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context is held by `self.context`.
        unsafe { call!(cuCtxSetCurrent(self.context.cu_ctx())) }
    }

    /// The kernel `name` of `stage`, allowed to take `shared_bytes` of shared memory. The first time, it is loaded.
    pub(super) fn function(&self, stage: &'static str, name: &str, shared_bytes: u32) -> Result<Function> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = &mut *loaded;
        if let Some((function, allowed)) = loaded.functions.get_mut(name) {
            if shared_bytes > *allowed {
                allow(*function, shared_bytes)?;
                *allowed = shared_bytes;
            }
            return Ok(*function);
        }
        let module = match loaded.modules.get(stage) {
            Some(&module) => module,
            None => {
                let module = self.load(stage)?;
                loaded.modules.insert(stage, module);
                module
            }
        };
        let function = get(module, name)?;
        let allowed = shared_bytes.max(PLAIN_SHARED_BYTES);
        // Asked even where it changes nothing: the kernel is then on the card, and a launch loads nothing more.
        allow(function, allowed)?;
        loaded.functions.insert(name.to_owned(), (function, allowed));
        Ok(function)
    }

    fn load(&self, stage: &'static str) -> Result<Module> {
        let fatbin = FATBINS.iter().find(|fatbin| fatbin.stage == stage).ok_or(Error::NoKernels)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin, which tells its own length; the caller has bound the context.
        let code = unsafe { sys::cuModuleLoadData(&mut module, fatbin.image.as_ptr().cast()) };
        match code {
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Err(Error::Architecture {
                expected: fatbin.archs.replace(' ', ", sm_"),
                given: format!("{}{}", self.capability.0, self.capability.1),
            }),
            code => driver::check("cuModuleLoadData", code).map(|()| Module(module)),
        }
    }
}

fn get(module: Module, name: &str) -> Result<Function> {
    let mut function = std::ptr::null_mut();
    // Names are written in this crate and hold no zero byte.
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: the module is loaded and never unloaded; the name ends with a zero.
    unsafe { call!(cuModuleGetFunction(&mut function, module.0, name.as_ptr())) }?;
    Ok(Function(function))
}

fn allow(function: Function, shared_bytes: u32) -> Result<()> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is of a loaded module.
    unsafe { call!(cuFuncSetAttribute(function.0, attribute, shared_bytes as i32)) }
}

/// An error that cudarc returns.
pub(super) fn wrapped(call: &'static str, error: cudarc::driver::DriverError) -> Error {
    driver::check(call, error.0).err().unwrap_or(Error::NoDriver)
}

/// A kernel with all that its launch takes beside the parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    pub(super) function: Function,
    /// Blocks, in grid.x.
    pub(super) blocks: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

/// What a kernel is asked for by.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    /// File that it is in.
    pub(super) stage: &'static str,
    /// Name, with recurrence and dtype.
    pub(super) name: String,
    /// Blocks, in grid.x.
    pub(super) blocks: usize,
    pub(super) threads: u32,
    pub(super) shared_bytes: usize,
}

impl Choice {
    /// A kernel of [`THREADS`] threads.
    pub(super) fn portable(stage: &'static str, name: String, blocks: usize, shared_bytes: usize) -> Self {
        Choice { stage, name, blocks, threads: THREADS, shared_bytes }
    }

    /// The same kernel with blocks of another size.
    pub(super) fn of_threads(self, threads: u32) -> Self {
        Choice { threads, ..self }
    }

    /// Finds it on the device.
    pub(super) fn resolve(&self, device: &Device) -> Result<Kernel> {
        let blocks = blocks_of(self.blocks)?;
        let shared_bytes = u32::try_from(self.shared_bytes).unwrap_or(u32::MAX);
        let function = device.function(self.stage, &self.name, shared_bytes)?;
        Ok(Kernel { function, blocks, threads: self.threads, shared_bytes })
    }
}

/// As many blocks as a launch can have.
pub(super) fn blocks_of(blocks: usize) -> Result<u32> {
    let limit = i32::MAX as u64;
    u32::try_from(blocks).ok().filter(|&blocks| u64::from(blocks) <= limit).ok_or(Error::Limit {
        name: "blocks of a launch (sequences, heads and chunks)",
        limit,
        given: blocks as u64,
    })
}
