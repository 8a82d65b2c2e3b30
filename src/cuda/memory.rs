//! Memory on the GPU, owned; and copies.

use super::abi::DevicePointer;
use super::driver::{self, call};
use super::module::Device;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult, CUstream};
use std::sync::Arc;

/// Memory on a GPU, freed when dropped; not initialised. Free it after the streams that use it are done.
#[derive(Debug)]
pub struct Memory {
    device: Arc<Device>,
    address: DevicePointer,
    bytes: usize,
}

impl Memory {
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<Memory> {
        device.bind()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: writes one address; the context is bound.
            match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (mut free, mut total) = (0, 0);
                    // SAFETY: writes two sizes; the context is bound.
                    unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
                    return Err(Error::OutOfMemory { bytes, free });
                }
                code => driver::check("cuMemAlloc_v2", code)?,
            }
        }
        Ok(Memory { device: device.clone(), address, bytes })
    }

    /// Address of its first byte, a multiple of 256; 0 where it has none.
    pub fn address(&self) -> DevicePointer {
        self.address
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.bytes) {
            return Err(Error::Shape {
                name: "memory",
                expected: format!("at most {} bytes", self.bytes),
                given: format!("{len} bytes from {offset} on"),
            });
        }
        Ok(())
    }

    /// Fills it with one byte, in the stream's order.
    pub(super) fn fill(&self, byte: u8, stream: CUstream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the memory is as long as said; the stream is one of the bound context.
        unsafe { call!(cuMemsetD8Async(self.address, byte, self.bytes, stream)) }
    }

    /// Fills a part of it with one byte, in the stream's order.
    pub(super) fn fill_range(&self, offset: usize, len: usize, byte: u8, stream: CUstream) -> Result<()> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the part lies inside, as was just checked; the stream is one of the bound context.
        unsafe { call!(cuMemsetD8Async(self.address + offset as u64, byte, len, stream)) }
    }

    /// Copies a part of it to another, in the stream's order; the two do not overlap.
    pub(super) fn copy_range(&self, from: usize, to: usize, len: usize, stream: CUstream) -> Result<()> {
        self.check(from, len)?;
        self.check(to, len)?;
        if len == 0 {
            return Ok(());
        }
        let (from, to) = (self.address + from as u64, self.address + to as u64);
        // SAFETY: both parts lie inside, as was just checked, and do not overlap, as the caller says.
        unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, len, stream)) }
    }

    /// Copies all of it to the beginning of another.
    pub(super) fn copy(&self, to: &Memory, stream: CUstream) -> Result<()> {
        to.check(0, self.bytes)?;
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: both are as long as said, and not the same memory or the whole of it.
        unsafe { call!(cuMemcpyDtoDAsync_v2(to.address, self.address, self.bytes, stream)) }
    }

    /// Copies to it from the host. Returns when `from` may change.
    pub(super) fn upload(&self, offset: usize, from: &[u8], stream: CUstream) -> Result<()> {
        self.check(offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let to = self.address + offset as u64;
        // SAFETY: both are as long as said. Of memory that is not page-locked the driver has taken its own copy by
        // the time that it returns.
        unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream)) }
    }

    /// Copies from it to the host and waits for the stream.
    pub(super) fn download(&self, offset: usize, to: &mut [u8], stream: CUstream) -> Result<()> {
        self.check(offset, to.len())?;
        if to.is_empty() {
            return Ok(());
        }
        let from = self.address + offset as u64;
        // SAFETY: both are as long as said, and `to` is borrowed until the stream has been waited for.
        unsafe {
            call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream))?;
            call!(cuStreamSynchronize(stream))
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 && self.device.bind().is_ok() {
            // SAFETY: allocated above, freed once. A failure has nowhere to go: the next call meets it.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Numbers as bytes.
pub(super) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for i64 {}
impl Plain for f32 {}
impl Plain for half::bf16 {}
impl Plain for half::f16 {}

pub(super) fn bytes_of<T: Plain>(x: &[T]) -> &[u8] {
    // SAFETY: numbers without padding, seen as the bytes that they are.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

pub(super) fn bytes_of_mut<T: Plain>(x: &mut [T]) -> &mut [u8] {
    // SAFETY: numbers without padding, of which every pattern of bits is one; borrowed alone.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), size_of_val(x)) }
}
