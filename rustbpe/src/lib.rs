//! Byte-level byte pair encoding (BPE): training and encoding, exact and deterministic.
//!
//! The way of a text through this crate, one file a step:
//!
//! 1. [`split`]: a pattern cuts text into pieces; merges never cross a cut. The well-known
//!    patterns have scanners ([`scan`], and [`block`] where the text is plain), others go through a
//!    regex engine.
//! 2. [`count`]: equal pieces are counted once, in parallel. A corpus of gigabytes becomes a few
//!    million distinct pieces, and everything after works on those.
//! 3. [`train`]: the most frequent pair of adjacent tokens is merged, again and again, in one array
//!    of all pieces ([`corpus`]).
//! 4. [`encode`]: the learned merges ([`pairs`]) turn a piece into token ids and back, [`batch`]
//!    many texts.
//!
//! [`parallel`] holds the one threading primitive the steps share, [`pack`] a way to write short
//! pieces as numbers. None of these files knows of Python; the bindings are `py.rs` and `texts.rs`,
//! behind the feature `python`.

pub mod batch;
pub mod block;
pub mod corpus;
pub mod count;
pub mod encode;
pub mod pack;
pub mod pairs;
pub mod parallel;
pub mod scan;
pub mod split;
pub mod train;

#[cfg(feature = "python")]
mod py;
#[cfg(feature = "python")]
mod texts;

use std::fmt;

/// The ids 0..256 are the bytes themselves; the first learned token has this id.
pub const FIRST_MERGE_ID: u32 = 256;

/// Everything that can go wrong in the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern is no regular expression.
    Pattern { pattern: String, reason: String },
    /// The pattern gave up on a text: too much backtracking.
    Split { offset: usize, reason: String },
    /// As above, with the index of the text among those given.
    SplitItem { item: usize, offset: usize, reason: String },
    /// More distinct text than 32-bit positions can address.
    TooMuchText { bytes: usize },
    /// An id that is no token of this vocabulary.
    UnknownToken { id: u32, index: usize, vocab_size: usize },
    /// A vocabulary given by its ranks that is none.
    Ranks { id: u32, reason: String },
    /// A vocabulary without a token for this byte.
    NoByte { byte: u8 },
    /// The caller's check asked to stop.
    Interrupted,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Says which text of many the error is about.
    pub(crate) fn in_text(self, item: usize) -> Self {
        match self {
            Self::Split { offset, reason } => Self::SplitItem { item, offset, reason },
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern { pattern, reason } => {
                write!(f, "invalid split pattern {pattern:?}: {reason}")
            }
            Self::Split { offset, reason } => {
                write!(f, "the split pattern failed at byte {offset} of the text: {reason}")
            }
            Self::SplitItem { item, offset, reason } => {
                write!(f, "the split pattern failed at byte {offset} of text {item}: {reason}")
            }
            Self::TooMuchText { bytes } => write!(
                f,
                "{bytes} bytes of distinct pieces, more than the {} that can be trained on; \
                 train on less text",
                corpus::MAX_POSITIONS
            ),
            Self::UnknownToken { id, index, vocab_size } => write!(
                f,
                "unknown token id {id} at index {index}: the vocabulary has {vocab_size} tokens"
            ),
            Self::Ranks { id, reason } => {
                write!(f, "the ranks must be 0, 1, 2, ... of different tokens; rank {id}: {reason}")
            }
            Self::NoByte { byte } => write!(f, "no token for the single byte {byte:#04x}"),
            Self::Interrupted => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for Error {}

/// For tests: numbers below their argument from Knuth's linear congruential generator.
#[cfg(test)]
fn random(mut seed: u64) -> impl FnMut(u64) -> u64 {
    move |n| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    }
}
