//! Where pieces begin among 64 bytes of plain text, found without a branch.
//!
//! A scanner that looks at one character after the other must decide at each where to go on, and a
//! processor that guesses wrong waits: that, not the work, is what a piece costs. Here all bytes
//! of a block are classified at once, a bit each, and a little algebra on the bits gives the
//! beginnings of pieces. It knows ASCII letters, digits, single blanks, line breaks and other
//! characters, as the cl100k family cuts them. Whatever is harder (another alphabet, an
//! apostrophe, two blanks, a long number) is *doubtful*: there [`crate::scan`] has to go on.

#[cfg(any(test, not(target_arch = "x86_64")))]
use self::bytewise::{HIGH, each, gather, within};
use crate::pack::word;

/// Bytes of a block.
pub const BLOCK: usize = 64;

/// Numbers of more pieces than this are doubtful.
const NUMBER_PIECES: usize = 3;

/// Where pieces begin in `block`, at whose first byte one does; up to `digits` digits are a piece.
///
/// Returns a bit for each byte, and the place of the first doubtful byte (64: there is none).
/// Beyond it no bit is set; at it only if a word ends before it, which is certain.
#[inline(always)]
pub fn beginnings(block: &[u8; BLOCK], digits: usize) -> (u64, usize) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)] // measured: a third of the time of Kinds::of
    // SAFETY: it needs SSE2, which is a part of x86-64.
    let kinds = unsafe { Kinds::with_sse2(block) };
    #[cfg(not(target_arch = "x86_64"))]
    let kinds = Kinds::of(block);
    kinds.beginnings(digits)
}

/// Which bytes of a block are what: a bit for each byte. All but `wide` are of ASCII.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kinds {
    letter: u64,
    digit: u64,
    blank: u64,
    line: u64,  // \r, \n
    white: u64, // \t to \r
    quote: u64, // the apostrophe
    wide: u64,  // a part of another character
}

impl Kinds {
    #[cfg(any(test, not(target_arch = "x86_64")))]
    fn of(block: &[u8; BLOCK]) -> Self {
        let mut kinds = Self::default();
        for (i, bytes) in block.chunks_exact(8).enumerate() {
            let bytes = word(bytes);
            let ascii = bytes & !HIGH;
            let bits = |kind| gather(kind & !bytes) << (8 * i);
            let is = |byte| within(ascii, byte, byte);
            kinds.letter |= bits(within(ascii | each(0x20), b'a', b'z'));
            kinds.digit |= bits(within(ascii, b'0', b'9'));
            kinds.blank |= bits(is(b' '));
            kinds.line |= bits(is(b'\r') | is(b'\n'));
            kinds.white |= bits(within(ascii, b'\t', b'\r'));
            kinds.quote |= bits(is(b'\''));
            kinds.wide |= gather(bytes) << (8 * i);
        }
        kinds
    }

    /// The same with vector instructions.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "sse2")]
    #[inline]
    fn with_sse2(block: &[u8; BLOCK]) -> Self {
        use std::arch::x86_64::{
            _mm_cmpeq_epi8, _mm_min_epu8, _mm_movemask_epi8, _mm_or_si128, _mm_set_epi64x,
            _mm_set1_epi8, _mm_sub_epi8,
        };
        let each = |byte: u8| _mm_set1_epi8(byte as i8);
        let mut kinds = Self::default();
        for (i, bytes) in block.chunks_exact(16).enumerate() {
            let bytes = _mm_set_epi64x(word(&bytes[8..]) as i64, word(&bytes[..8]) as i64);
            let bits = |kind| u64::from(_mm_movemask_epi8(kind) as u16) << (16 * i);
            let is = |byte| _mm_cmpeq_epi8(bytes, each(byte));
            let within = |bytes, first: u8, last: u8| {
                let above = _mm_sub_epi8(bytes, each(first));
                _mm_cmpeq_epi8(above, _mm_min_epu8(above, each(last - first)))
            };
            kinds.letter |= bits(within(_mm_or_si128(bytes, each(0x20)), b'a', b'z'));
            kinds.digit |= bits(within(bytes, b'0', b'9'));
            kinds.blank |= bits(is(b' '));
            kinds.line |= bits(_mm_or_si128(is(b'\r'), is(b'\n')));
            kinds.white |= bits(within(bytes, b'\t', b'\r'));
            kinds.quote |= bits(is(b'\''));
            kinds.wide |= bits(bytes);
        }
        kinds
    }

    #[inline(always)]
    fn beginnings(&self, digits: usize) -> (u64, usize) {
        let Self { letter, digit, blank, line, white, quote, wide } = *self;
        let other = !(letter | digit | blank | white | quote | wide);

        // Blanks and other characters go with what is before or after them:
        // a blank with the letters or other characters after it,
        let others = other & !((other | blank) << 1);
        // a single other character with the letters after it, if it has no blank,
        let words = letter & !((letter | blank | others) << 1);
        // line breaks with the other characters or the blank before them.
        let lines = line & !((line | other | blank) << 1);
        let mut numbers = digit & !(digit << 1);
        let inside = run(digit, digits + 1);
        for _ in 1..NUMBER_PIECES {
            numbers |= (numbers << digits) & inside;
        }
        let beginnings = others | words | lines | numbers | blank;

        // Two blanks; a blank after a line break, if white space follows it or may do so, for then
        // a later line break would take it along.
        let perhaps_white = white | wide | 1;
        let blanks = blank & (blank >> 1) | blank & (line << 1) & perhaps_white.rotate_right(1);
        let long = run(digit, NUMBER_PIECES * digits + 1);
        let doubtful = white & !line | quote | wide | blanks | long;
        let first = doubtful & doubtful.wrapping_neg(); // 0 if there is none
        let after_word = first & (letter << 1) & !wide; // a wide one may be a letter of that word
        (beginnings & first.wrapping_sub(1) | after_word, doubtful.trailing_zeros() as usize)
    }
}

/// Bit i: the bits from i - n + 1 to i are all set.
#[inline(always)]
fn run(bits: u64, n: usize) -> u64 {
    (1..n).fold(bits, |all, k| all & bits << k)
}

/// Arithmetic on the eight bytes of a number, for processors without known vector instructions.
#[cfg(any(test, not(target_arch = "x86_64")))]
mod bytewise {
    /// The highest bit of each byte.
    pub const HIGH: u64 = 0x8080_8080_8080_8080;

    /// Every byte the same.
    pub const fn each(byte: u8) -> u64 {
        0x0101_0101_0101_0101 * byte as u64
    }

    /// The highest bit of each byte that is from `first` to `last`. None may be above 0x7f, so that no
    /// sum carries into the next byte.
    #[inline(always)]
    pub fn within(bytes: u64, first: u8, last: u8) -> u64 {
        (bytes + each(0x80 - first)) & !(bytes + each(0x7f - last))
    }

    /// The highest bits of 8 bytes as a number of 8 bits.
    #[inline(always)]
    pub fn gather(bytes: u64) -> u64 {
        ((bytes & HIGH) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_classify_gives_the_same() {
        let mut block = [0; BLOCK];
        for shift in 0..=u8::MAX {
            for (i, byte) in block.iter_mut().enumerate() {
                *byte = (i as u8).wrapping_mul(37).wrapping_add(shift);
            }
            let kinds = Kinds::of(&block);
            for (i, &byte) in block.iter().enumerate() {
                let bit = |bits: u64| bits >> i & 1 == 1;
                assert_eq!(bit(kinds.letter), byte.is_ascii_alphabetic());
                assert_eq!(bit(kinds.digit), byte.is_ascii_digit());
                assert_eq!(bit(kinds.blank), byte == b' ');
                assert_eq!(bit(kinds.line), byte == b'\r' || byte == b'\n');
                assert_eq!(bit(kinds.white), (b'\t'..=b'\r').contains(&byte));
                assert_eq!(bit(kinds.quote), byte == b'\'');
                assert_eq!(bit(kinds.wide), !byte.is_ascii());
            }
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            // SAFETY: SSE2 is a part of x86-64.
            let vectors = unsafe { Kinds::with_sse2(&block) };
            #[cfg(target_arch = "x86_64")]
            assert_eq!(vectors, kinds);
        }
    }
}
