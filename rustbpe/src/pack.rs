//! Short pieces as numbers: nearly all pieces of a text have at most 15 bytes, and a number is
//! compared and hashed at once, without following a pointer.

/// The longest piece that fits.
pub const LONGEST: usize = 15;

/// 1 to 15 bytes as one number, different for different bytes.
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

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn half(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)))
}

/// A hash of all bits of the key in the low bits.
#[inline]
pub fn hash(key: u128) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 divided by the golden ratio
    let (low, high) = (key as u64, (key >> 64) as u64);
    let product = u128::from(low ^ high.rotate_left(32)) * u128::from(ODD);
    let mixed = (product as u64) ^ ((product >> 64) as u64) ^ high.wrapping_mul(ODD);
    mixed ^ (mixed >> 29)
}

/// The bytes that [`pack`] made this number of.
pub fn unpack(key: u128) -> Vec<u8> {
    key.to_le_bytes()[..(key >> 120) as usize].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_gives_back_what_was_packed() {
        let bytes = b"\x00\xff0123456789abcdef";
        for start in 0..3 {
            for length in 1..=LONGEST {
                let piece = &bytes[start..start + length];
                assert_eq!(unpack(pack(piece)), piece);
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
