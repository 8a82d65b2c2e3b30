//! The CUDA driver: whether it is there, and its calls, checked.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;
use std::sync::OnceLock;

/// Least version of the driver, as `cuDriverGetVersion` counts: CUDA 12.8.
const LEAST_VERSION: i32 = 12080;

/// Calls a function of the driver and checks what it returns: `Err(Error::Cuda)` names function and error.
/// Stands in an unsafe block, which says why the arguments are right.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::check(stringify!($function), cudarc::driver::sys::$function($($argument),*))
    };
}
pub(super) use call;

/// The error that a call of the driver came to.
pub(super) fn check(call: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: `name` is written with the address of a string that lives as long as the driver, or with null.
    let name = unsafe {
        match sys::cuGetErrorName(code, &mut name) {
            CUresult::CUDA_SUCCESS if !name.is_null() => CStr::from_ptr(name).to_string_lossy().into_owned(),
            _ => "an error without a name".to_owned(),
        }
    };
    Err(Error::Cuda { call, name, code: code as u32 })
}

/// Loads and initialises the driver, once.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::OldDriver`], [`Error::NoDevice`] where it shows no GPU.
pub(super) fn init() -> Result<()> {
    static DRIVER: OnceLock<Result<()>> = OnceLock::new();
    DRIVER.get_or_init(first_init).clone()
}

fn first_init() -> Result<()> {
    // Asked here, by names that cudarc tries too: its own question is not there where another crate of the program has it
    // link libcuda (candle-core does).
    let names = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
    // SAFETY: opens and closes the library; what it runs on loading is the driver's own.
    if !names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok()) {
        return Err(Error::NoDriver);
    }
    let mut version = 0;
    // SAFETY: the library is there. The version is asked first: symbols that an old driver lacks are not touched.
    unsafe { call!(cuDriverGetVersion(&mut version)) }?;
    if version < LEAST_VERSION {
        let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(Error::OldDriver { expected: text(LEAST_VERSION), given: text(version) });
    }
    // SAFETY: takes no pointer.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => Err(Error::NoDevice { count: 0, given: 0 }),
        code => check("cuInit", code),
    }
}

/// Number of GPUs.
pub(super) fn device_count() -> Result<usize> {
    let mut count = 0;
    // SAFETY: writes one int; the driver is initialised.
    unsafe { call!(cuDeviceGetCount(&mut count)) }?;
    Ok(count.max(0) as usize)
}
