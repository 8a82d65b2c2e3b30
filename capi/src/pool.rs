//! The CPU engine's threads in a process that was forked: those of rayon's global pool are not in the child, and what
//! waits for them waits for ever. A child gets a pool of its own.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Process that called first: it has the global pool.
static FIRST: AtomicU32 = AtomicU32::new(0);
static CHILDS: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);

pub(crate) fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let process = process::id();
    let first =
        FIRST.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_else(|it| it);
    if first == 0 || first == process {
        return work();
    }
    let pool = {
        let mut held = CHILDS.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some((of, pool)) if *of == process => Some(pool.clone()),
            _ => ThreadPoolBuilder::new().build().ok().map(|pool| {
                let pool = Arc::new(pool);
                // A parent's pool, seen from its child, has no threads to wait for: it is left alone.
                std::mem::forget(held.replace((process, pool.clone())));
                pool
            }),
        }
    };
    match pool {
        Some(pool) => pool.install(work),
        None => work(),
    }
}
