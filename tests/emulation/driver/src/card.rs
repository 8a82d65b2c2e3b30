//! What the card says of itself: an H100, or what `DLA_EMULATED_CARD` names.

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use std::ffi::CStr;
use std::sync::OnceLock;

/// A card.
pub struct Card {
    /// As DLA_EMULATED_CARD spells it.
    key: &'static str,
    pub name: &'static CStr,
    pub capability: (i32, i32),
    multiprocessors: i32,
    /// Shared memory of a multiprocessor. A block may have all but a KiB of it.
    shared_bytes: i32,
}

/// Datasheets and the table of compute capabilities in the CUDA programming guide.
const CARDS: [Card; 4] = [
    Card {
        key: "h100",
        name: c"emulated H100",
        capability: (9, 0),
        multiprocessors: 132,
        shared_bytes: 228 << 10,
    },
    Card {
        key: "a100",
        name: c"emulated A100",
        capability: (8, 0),
        multiprocessors: 108,
        shared_bytes: 164 << 10,
    },
    Card {
        key: "l40s",
        name: c"emulated L40S",
        capability: (8, 9),
        multiprocessors: 142,
        shared_bytes: 100 << 10,
    },
    Card {
        key: "b200",
        name: c"emulated B200",
        capability: (10, 0),
        multiprocessors: 148,
        shared_bytes: 228 << 10,
    },
];

/// Memory that can be had, and is said to be there.
pub const MEMORY: usize = 4 << 30;

/// The card of this process.
pub fn card() -> &'static Card {
    static CARD: OnceLock<&Card> = OnceLock::new();
    CARD.get_or_init(|| {
        let named = std::env::var("DLA_EMULATED_CARD").unwrap_or_else(|_| "h100".to_owned());
        let card = CARDS.iter().find(|card| card.key == named);
        card.unwrap_or_else(|| {
            let known: Vec<&str> = CARDS.iter().map(|card| card.key).collect();
            super::stop(&format!("DLA_EMULATED_CARD: expected one of {known:?}, got {named}"))
        })
    })
}

impl Card {
    /// Most shared memory of a block.
    pub fn block_shared_bytes(&self) -> i32 {
        self.shared_bytes - 1024
    }

    /// An attribute; `None`: not one that anything asked for yet.
    pub fn attribute(&self, attribute: Attribute) -> Option<i32> {
        use Attribute::*;
        Some(match attribute {
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => self.capability.0,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => self.capability.1,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => self.multiprocessors,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK => 48 << 10,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => self.block_shared_bytes(),
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR => self.shared_bytes,
            CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK => 1024,
            CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK => 1024,
            CU_DEVICE_ATTRIBUTE_WARP_SIZE => 32,
            CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X => i32::MAX,
            CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED => 1,
            _ => return None,
        })
    }
}
