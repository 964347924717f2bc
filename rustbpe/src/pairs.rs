//! Which two tokens merge into which: the table that encoding a new piece asks all the time.

use rustc_hash::FxHashMap;

use crate::train::Pair;

/// "This pair has no merge": later than every merge.
pub const NEVER: u32 = u32::MAX;

/// Ids have to be below this.
pub const MAX_TOKENS: usize = 1 << ID_BITS;
const ID_BITS: u32 = 21;

/// Pairs and the ids they merge into: open addressing, a number for each.
#[derive(Debug, Clone)]
pub struct PairTable {
    slots: Vec<u64>, // a power of two of them, at most half in use: key and id
    shift: u32,
    maybe: Vec<u64>, // 64 bits a word, FILTER bits a slot: a pair whose bit is 0 is not there
}

/// Most look-ups are in vain. The bits that say so fit into the processor's nearest memory.
const FILTER: u32 = 4;

impl PairTable {
    const FREE: u64 = u64::MAX;

    pub fn new(pairs: &FxHashMap<Pair, u32>) -> Self {
        // At least 64, so that the bits fill words
        let size = (pairs.len() * 2 + 1).next_power_of_two().max(64);
        let shift = 64 - size.trailing_zeros();
        let maybe = vec![0; size * FILTER as usize / 64];
        let mut table = Self { slots: vec![Self::FREE; size], shift, maybe };
        for (&(a, b), &id) in pairs {
            let key = Self::key(a, b);
            let (mut place, word, bit) = table.place(key);
            table.maybe[word] |= bit;
            while table.slots[place] != Self::FREE {
                place = (place + 1) & (size - 1);
            }
            table.slots[place] = key << ID_BITS | u64::from(id);
        }
        table
    }

    #[inline]
    fn key(a: u32, b: u32) -> u64 {
        u64::from(a) << ID_BITS | u64::from(b)
    }

    /// Where the search begins; and the word and the bit of it that tell whether it is worth it.
    #[inline]
    fn place(&self, key: u64) -> (usize, usize, u64) {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let number = (hash >> (self.shift - FILTER.trailing_zeros())) as usize;
        ((hash >> self.shift) as usize, number / 64, 1 << (number % 64))
    }

    /// The id that the pair merges into, or [`NEVER`].
    #[inline]
    pub fn get(&self, a: u32, b: u32) -> u32 {
        let key = Self::key(a, b);
        let (mut place, word, bit) = self.place(key);
        if self.maybe[word] & bit == 0 {
            return NEVER;
        }
        loop {
            let slot = self.slots[place];
            if slot >> ID_BITS == key {
                return slot as u32 & (MAX_TOKENS as u32 - 1);
            }
            if slot == Self::FREE {
                return NEVER;
            }
            place = (place + 1) & (self.slots.len() - 1);
        }
    }

    /// All (id, pair), in no order.
    #[cfg(test)]
    pub fn rows(&self) -> impl Iterator<Item = (u32, Pair)> {
        let id = |bits: u64| bits as u32 % MAX_TOKENS as u32;
        let used = self.slots.iter().filter(|&&slot| slot != Self::FREE);
        used.map(move |&slot| (id(slot), (id(slot >> (2 * ID_BITS)), id(slot >> ID_BITS))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_its_pairs_and_no_others() {
        for n in [0, 1, 3, 40, 3_000] {
            let mut random = crate::random(n);
            let mut id = || random(1 << 11) as u32;
            let pairs: FxHashMap<Pair, u32> = (0..n).map(|_| ((id(), id()), id())).collect();
            let table = PairTable::new(&pairs);
            assert_eq!(table.rows().count(), pairs.len());
            assert!(pairs.iter().all(|(&(a, b), &id)| table.get(a, b) == id));
            let others = (0..5_000).map(|_| (id(), id())).filter(|pair| !pairs.contains_key(pair));
            assert!({ others }.all(|(a, b)| table.get(a, b) == NEVER));
        }
    }
}
