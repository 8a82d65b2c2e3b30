//! How an error crosses the boundary: a status, and a message that the thread keeps.

use crate::types::Status;
use dla::Error;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call did not do what it was asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// What kind of wrong.
    pub status: Status,
    /// The argument, what was expected and what came.
    pub message: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Shape { .. } | Error::HeadSize { .. } | Error::Limit { .. } => Status::Shape,
            Error::Dtype { .. } => Status::Dtype,
            Error::Missing { .. } => Status::Missing,
            Error::Unexpected { .. } => Status::Unexpected,
            Error::Value { .. }
            | Error::CuSeqlens { .. }
            | Error::Event { .. }
            | Error::Entry { .. }
            | Error::NoEntry { .. } => Status::Value,
            Error::Option { .. } => Status::Option,
            Error::NoKernels
            | Error::NoDriver
            | Error::OldDriver { .. }
            | Error::NoDevice { .. }
            | Error::Architecture { .. } => Status::Device,
            Error::NotBuilt { .. } => Status::NotBuilt,
            Error::ForeignPointer { .. } | Error::Misaligned { .. } => Status::Pointer,
            Error::Workspace { .. } => Status::Workspace,
            Error::Plan { .. } => Status::Unexpected,
            Error::OutOfMemory { .. } => Status::Memory,
            Error::Cuda { .. } => Status::Cuda,
            _ => Status::Internal,
        };
        Failure { status, message: error.to_string() }
    }
}

pub(crate) type Outcome<T> = std::result::Result<T, Failure>;

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs a call, keeps what was wrong with it, and stops what unwinds.
pub(crate) fn guarded(call: impl FnOnce() -> Outcome<()>) -> Status {
    let failure = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Failure {
                status: Status::Internal,
                message: format!("internal: a defect of the library: {text}"),
            }
        }
    };
    let message = CString::new(failure.message.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending keeps no message.
    let _ = MESSAGE.try_with(|held| held.replace(message));
    failure.status
}

/// The message of this thread's last call that failed; valid until the next that does.
pub(crate) fn message() -> *const c_char {
    MESSAGE.try_with(|held| held.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
