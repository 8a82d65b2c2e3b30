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
    /// The engine asked for is not there.
    #[error("device: {0}")]
    Device(String),
}

/// The result of every call into this crate.
pub type Result<T> = std::result::Result<T, Error>;
