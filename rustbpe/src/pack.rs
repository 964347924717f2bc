//! Short pieces as numbers: nearly all pieces of a text have at most 15 bytes, and a number is
//! compared and hashed at once, without following a pointer.

/// The longest piece that fits.
pub const LONGEST: usize = 15;

/// The piece `text[start..end]`, of 1 to 15 bytes, as one number, different for different bytes.
#[inline(always)]
pub fn pack_at(text: &[u8], start: usize, end: usize) -> u128 {
    let n = end - start;
    // Sixteen bytes are loaded and what does not belong to the piece is cut off: no branch on its
    // length, which no processor can foresee.
    match text.get(start..start + 16) {
        Some(bytes) if n <= LONGEST => {
            let low = word(&bytes[..8]) & KEEP[n];
            let high = word(&bytes[8..]) & KEEP[16 + n];
            u128::from(low) | u128::from(high | (n as u64) << 56) << 64
        }
        _ => pack(&text[start..end]),
    }
}

/// `KEEP[n]` keeps the first n of 8 bytes, `KEEP[16 + n]` those of the next 8 that the first n of
/// 16 contain.
const KEEP: [u64; 32] = {
    let mut keep = [0; 32];
    let mut n = 1;
    while n < 16 {
        keep[n] = if n >= 8 { u64::MAX } else { (1 << (8 * n)) - 1 };
        keep[16 + n] = if n > 8 { (1 << (8 * (n - 8))) - 1 } else { 0 };
        n += 1;
    }
    keep
};

/// 1 to 15 bytes as one number, the same as [`pack_at`] gives.
#[inline]
pub fn pack(piece: &[u8]) -> u128 {
    let n = piece.len();
    debug_assert!((1..=LONGEST).contains(&n));
    // Two loads that may overlap, instead of a copy of unknown length.
    let (low, high) = if n >= 8 {
        (word(&piece[..8]), word(&piece[n - 8..]).checked_shr(8 * (16 - n as u32)).unwrap_or(0))
    } else if n >= 4 {
        let (low, high) = (half(&piece[..4]), half(&piece[n - 4..]));
        (low | (high << (8 * (n - 4))), 0)
    } else {
        // The first, the middle and the last byte are all there are.
        let bytes = [piece[0], piece[n / 2], piece[n - 1]].map(u64::from);
        (bytes[0] | bytes[1] << (8 * (n / 2)) | bytes[2] << (8 * (n - 1)), 0)
    };
    u128::from(low) | u128::from(high) << 64 | (n as u128) << 120
}

/// Eight bytes as a number, the first one lowest.
#[inline(always)]
pub fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn half(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)))
}

/// A hash of all bits of the key; its low bits are as good as any.
#[inline(always)]
pub fn hash(key: u128) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 divided by the golden ratio
    const OTHER: u64 = 0xd6e8_feb8_6659_fd93; // another odd number without a pattern
    let (low, high) = (key as u64, (key >> 64) as u64);
    let sum = low.wrapping_mul(ODD).wrapping_add(high.wrapping_mul(OTHER));
    // A bit of a product depends on the lower ones of the key only: the high ones are well mixed.
    sum ^ sum >> 32
}

/// The bytes that [`pack`] made this number of, and how many of the 16 they are.
pub fn unpack(key: u128) -> ([u8; 16], usize) {
    (key.to_le_bytes(), (key >> 120) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_gives_back_what_was_packed() {
        let long = b"\x00\xff0123456789abcdefghijkl";
        for start in 0..3 {
            for length in 1..=LONGEST {
                let piece = &long[start..start + length];
                let (bytes, n) = unpack(pack(piece));
                assert_eq!(&bytes[..n], piece);
                for text in [&long[..], piece] {
                    let at = if text.len() == length { 0 } else { start };
                    assert_eq!(pack_at(text, at, at + length), pack(piece));
                }
            }
        }
    }

    #[test]
    fn neighbours_get_different_places() {
        let mut places: Vec<u64> = (0..1 << 16).map(|i| hash(pack(&u32::to_le_bytes(i)))).collect();
        places.iter_mut().for_each(|place| *place &= (1 << 18) - 1);
        places.sort_unstable();
        places.dedup();
        assert!(places.len() > 55_000, "{}", places.len()); // by chance, 58,000 of 65,536
    }
}
