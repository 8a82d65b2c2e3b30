//! Allocations: poisoned, and each ends where memory does.

use crate::card::MEMORY;
use crate::stop;
use cudarc::driver::sys::CUresult;
use std::collections::BTreeMap;

/// What memory that nobody wrote holds: NaN in every type.
const POISON: u8 = 0xff;
const PAGE: usize = 4096;
/// The driver promises as much.
const ALIGNMENT: usize = 256;

struct Allocation {
    mapped: usize,
    mapped_bytes: usize,
    bytes: usize,
}

/// All allocations, by address.
#[derive(Default)]
pub struct Memory {
    live: BTreeMap<u64, Allocation>,
    used: usize,
}

impl Memory {
    pub fn allocate(&mut self, bytes: usize) -> Result<u64, CUresult> {
        if bytes == 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if bytes > self.free_bytes() {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        let mapped_bytes = bytes.next_multiple_of(PAGE) + PAGE;
        // SAFETY: new private memory; the last page is made inaccessible, the others are written.
        let mapped = unsafe {
            let mapped = libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if mapped == libc::MAP_FAILED {
                return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            }
            let mapped = mapped.cast::<u8>();
            mapped.write_bytes(POISON, mapped_bytes - PAGE);
            if libc::mprotect(mapped.add(mapped_bytes - PAGE).cast(), PAGE, libc::PROT_NONE) != 0 {
                stop("mprotect failed");
            }
            mapped as usize
        };
        let address = (mapped + mapped_bytes - PAGE - bytes.next_multiple_of(ALIGNMENT)) as u64;
        self.used += bytes;
        self.live.insert(address, Allocation { mapped, mapped_bytes, bytes });
        Ok(address)
    }

    /// Nothing uses it any more.
    pub fn free(&mut self, address: u64) -> Result<(), CUresult> {
        let Some(allocation) = self.live.remove(&address) else {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        };
        let Allocation { mapped, mapped_bytes, bytes } = allocation;
        self.used -= bytes;
        // SAFETY: mapped by `allocate`; no reference to it is left.
        unsafe {
            let whole = std::slice::from_raw_parts(mapped as *const u8, mapped_bytes - PAGE);
            let (before, rest) = whole.split_at(address as usize - mapped);
            if before.iter().chain(&rest[bytes..]).any(|&byte| byte != POISON) {
                stop(&format!("written beyond an allocation of {bytes} bytes at {address:#x}"));
            }
            libc::munmap(mapped as *mut _, mapped_bytes);
        }
        Ok(())
    }

    pub fn free_bytes(&self) -> usize {
        MEMORY - self.used
    }

    /// Address and bytes of the allocation that holds this one.
    pub fn find(&self, address: u64) -> Option<(u64, usize)> {
        let (&base, allocation) = self.live.range(..=address).next_back()?;
        (address - base < allocation.bytes as u64).then_some((base, allocation.bytes))
    }

    /// All of a stretch lies in one allocation.
    pub fn check(&self, address: u64, bytes: usize) -> Result<(), CUresult> {
        let inside = match self.find(address) {
            Some((base, whole)) => bytes <= whole - (address - base) as usize,
            None => bytes == 0,
        };
        if inside { Ok(()) } else { Err(CUresult::CUDA_ERROR_INVALID_VALUE) }
    }

    /// What lies at an address that is out of bounds, in words.
    pub fn describe(&self, address: u64) -> String {
        let near = self.live.range(..=address).next_back();
        match near {
            Some((&base, a)) if address < (a.mapped + a.mapped_bytes) as u64 => {
                format!(
                    "{} bytes past the end of an allocation of {} bytes",
                    address - base - a.bytes as u64,
                    a.bytes
                )
            }
            _ => "in no allocation".to_owned(),
        }
    }
}
