//! The learned vocabulary: pieces to ids, ids to bytes.
//!
//! A piece is encoded by doing what training did: of all adjacent pairs that have a merge, the
//! one learned first is merged, at its leftmost place, until none is left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::pack::{self, pack};
use crate::pairs::{MAX_TOKENS, NEVER, PairTable};
use crate::train::Pair;
use crate::{Error, FIRST_MERGE_ID, Result};

/// Pieces up to this many bytes are merged by plain scanning, quadratic but without any set-up.
const SHORT: usize = 64;

/// The tokens and what they are made of.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    merged: PairTable,      // pair -> id, which is its rank too
    tokens: Vec<Box<[u8]>>, // id -> bytes
    bytes: [u32; 256],      // byte -> id
    byte_pairs: Box<[u32]>, // (byte, byte) -> id of the merge or NEVER: half of all look-ups
    whole: Whole,           // bytes -> id of the tokens that no merges make; mostly there are none
    by_ranks: bool,         // whether a piece that is a token is that token, whatever merges make
}

impl Default for Vocabulary {
    /// The bytes alone.
    fn default() -> Self {
        let tokens = (0..=u8::MAX).map(|byte| [byte].into()).collect();
        let bytes = std::array::from_fn(|byte| byte as u32);
        Self::made_of(FxHashMap::default(), tokens, bytes)
    }
}

impl Vocabulary {
    /// The vocabulary of `merges`, in the order in which they were learned. `None` if a merge
    /// names a token that does not exist yet.
    pub fn new(merges: &[Pair]) -> Option<Self> {
        let mut made = Self::default();
        for &(a, b) in merges {
            let (a, b) = (made.tokens.get(a as usize)?, made.tokens.get(b as usize)?);
            made.tokens.push([&a[..], &b[..]].concat().into());
        }
        let merged = merges.iter().copied().zip(FIRST_MERGE_ID..).collect();
        Some(Self::made_of(merged, made.tokens, made.bytes))
    }

    /// The vocabulary in which any two tokens merge whose bytes together are a token, the one of
    /// the lowest id first, and a piece that is a token is that token: tiktoken's rule.
    pub fn from_ranks(ranks: Vec<(Vec<u8>, u32)>) -> Result<Self> {
        let n = ranks.len();
        let mut tokens: Vec<Option<Box<[u8]>>> = vec![None; n];
        let mut whole = Whole::default();
        for (token, id) in ranks {
            let error = |reason: &str| Error::Ranks { id, reason: reason.to_owned() };
            if n > MAX_TOKENS {
                return Err(error(&format!("{n} tokens are more than {MAX_TOKENS}")));
            }
            let place = tokens.get_mut(id as usize);
            let place = place.ok_or_else(|| error(&format!("there are only {n} tokens")))?;
            if token.is_empty() {
                return Err(error("it has no bytes"));
            }
            if place.is_some() {
                return Err(error("two tokens have it"));
            }
            if whole.insert(&token, id).is_some() {
                return Err(error("another token has the same bytes"));
            }
            *place = Some(token.into_boxed_slice());
        }
        // n different ids below n: every one of them
        let tokens: Vec<Box<[u8]>> = tokens.into_iter().flatten().collect();
        let mut bytes = [NEVER; 256];
        for byte in 0..=u8::MAX {
            bytes[byte as usize] = whole.get(&[byte]).ok_or(Error::NoByte { byte })?;
        }
        let mut merged = FxHashMap::default();
        let mut unmade = Whole::default();
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(pair) = last_pair(token, &whole) {
                merged.insert(pair, id);
            } else if token.len() > 1 {
                unmade.insert(token, id);
            }
        }
        Ok(Self { whole: unmade, by_ranks: true, ..Self::made_of(merged, tokens, bytes) })
    }

    fn made_of(merged: FxHashMap<Pair, u32>, tokens: Vec<Box<[u8]>>, bytes: [u32; 256]) -> Self {
        let pairs = bytes.iter().flat_map(|&a| bytes.iter().map(move |&b| (a, b)));
        let byte_pairs = pairs.map(|pair| merged.get(&pair).copied().unwrap_or(NEVER)).collect();
        let (merged, whole) = (PairTable::new(&merged), Whole::default());
        Self { merged, tokens, bytes, byte_pairs, whole, by_ranks: false }
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// Pieces that are known to be one token, and that token: none, or all tokens.
    pub fn pieces(&self) -> impl DoubleEndedIterator<Item = (&[u8], u32)> {
        let known = if self.by_ranks { &self.tokens[..] } else { &[] };
        known.iter().enumerate().map(|(id, token)| (&token[..], id as u32))
    }

    /// The bytes of `ids`, joined. They need not be valid UTF-8.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for (index, &id) in ids.iter().enumerate() {
            let token = self.tokens.get(id as usize).ok_or(Error::UnknownToken {
                id,
                index,
                vocab_size: self.tokens.len(),
            })?;
            bytes.extend_from_slice(token);
        }
        Ok(bytes)
    }

    /// Appends the ids of one piece, in which every merge that applies is made.
    pub fn encode_piece(&self, piece: &[u8], ids: &mut Vec<u32>) {
        if !self.whole.is_empty()
            && let Some(id) = self.whole.get(piece)
        {
            ids.push(id);
        } else if piece.len() <= SHORT {
            self.merge_short(piece, ids);
        } else {
            self.merge_long(piece, ids);
        }
    }

    /// The id that two bytes merge into, or [`NEVER`].
    fn byte_rank(&self, a: u8, b: u8) -> u32 {
        self.byte_pairs[usize::from(a) << 8 | usize::from(b)]
    }

    /// Finds the earliest merge by looking at all pairs each time. Nothing is moved: a token stays
    /// where its first byte stood, and its neighbours are linked.
    fn merge_short(&self, piece: &[u8], ids: &mut Vec<u32>) {
        // A pair's rank and below it its place, so that the smallest number is the earliest merge,
        // of equals the leftmost. Signed, since processors find the smallest of those fastest.
        const NONE: i32 = i32::MAX;
        const PLACE: u32 = SHORT.trailing_zeros();
        let offer = |rank, i| if rank == NEVER { NONE } else { (rank << PLACE) as i32 | i as i32 };
        let n = piece.len();
        let (mut tokens, mut offers) = ([0; SHORT], [NONE; SHORT]);
        let mut next: [u8; SHORT] = std::array::from_fn(|i| i as u8 + 1);
        let mut previous: [u8; SHORT] = std::array::from_fn(|i| i.saturating_sub(1) as u8);
        for (token, &byte) in tokens.iter_mut().zip(piece) {
            *token = self.bytes[byte as usize];
        }
        for (i, pair) in piece.windows(2).enumerate() {
            offers[i] = offer(self.byte_rank(pair[0], pair[1]), i);
        }
        let all = n.next_multiple_of(16).min(SHORT); // whole registers
        loop {
            let first = offers[..all].iter().fold(NONE, |first, &other| first.min(other));
            if first == NONE {
                break;
            }
            let (rank, i) = (first as u32 >> PLACE, first as usize % SHORT);
            let j = next[i] as usize;
            let after = next[j] as usize;
            tokens[i] = rank;
            offers[j] = NONE; // no token begins here any more
            next[i] = after as u8;
            offers[i] = NONE;
            if after < n {
                previous[after] = i as u8;
                offers[i] = offer(self.merged.get(rank, tokens[after]), i);
            }
            if i > 0 {
                let before = previous[i] as usize;
                offers[before] = offer(self.merged.get(tokens[before], rank), before);
            }
        }
        let mut i = 0;
        while i < n {
            ids.push(tokens[i]);
            i = next[i] as usize;
        }
    }

    /// The same by a heap of the possible merges and a linked list of the tokens: n log n, so a
    /// megabyte without a blank in it is no attack.
    fn merge_long(&self, piece: &[u8], ids: &mut Vec<u32>) {
        const END: usize = usize::MAX;
        let n = piece.len();
        let mut tokens: Vec<u32> = piece.iter().map(|&byte| self.bytes[byte as usize]).collect();
        let mut next: Vec<usize> = (1..n).chain([END]).collect();
        let mut previous: Vec<usize> = [END].into_iter().chain(0..n).collect();
        let mut heap = BinaryHeap::new(); // the smallest rank on top, of equals the leftmost
        let offer = |heap: &mut BinaryHeap<_>, i: usize, a: u32, b: u32| {
            let rank = self.merged.get(a, b);
            if rank != NEVER {
                heap.push(Reverse((rank, i)));
            }
        };
        for (i, pair) in piece.windows(2).enumerate() {
            let rank = self.byte_rank(pair[0], pair[1]);
            if rank != NEVER {
                heap.push(Reverse((rank, i)));
            }
        }
        while let Some(Reverse((rank, i))) = heap.pop() {
            let j = next[i];
            // A stale offer: one of its two tokens has merged since (NEVER is in no pair).
            if j == END || self.merged.get(tokens[i], tokens[j]) != rank {
                continue;
            }
            tokens[i] = rank;
            tokens[j] = NEVER; // no token begins here any more
            next[i] = next[j];
            if next[i] != END {
                previous[next[i]] = i;
                offer(&mut heap, i, rank, tokens[next[i]]);
            }
            if previous[i] != END {
                offer(&mut heap, previous[i], tokens[previous[i]], rank);
            }
        }
        ids.extend(tokens.into_iter().filter(|&id| id != NEVER));
    }
}

/// The two tokens whose merge makes `token`; None if merges never make it.
///
/// There is one such pair at most, wherever the token's bytes stand: what is merged inside of them
/// does not depend on what is around, as long as nothing merges across their ends. So the table of
/// pairs has one row for a token, although many have several pairs that spell them.
fn last_pair(token: &[u8], whole: &Whole) -> Option<Pair> {
    let rank = |from: usize, to: usize| whole.get(&token[from..to]).unwrap_or(NEVER);
    let mut cuts: Vec<usize> = (0..=token.len()).collect();
    let mut ranks: Vec<u32> = (2..=token.len()).map(|end| rank(end - 2, end)).collect();
    while cuts.len() > 3 {
        let (i, _) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank)?; // the leftmost
        if ranks[i] == NEVER {
            return None;
        }
        cuts.remove(i + 1);
        ranks.remove(i);
        for k in i.saturating_sub(1)..(i + 1).min(ranks.len()) {
            ranks[k] = rank(cuts[k], cuts[k + 2]);
        }
    }
    let [start, cut, end] = cuts.try_into().ok()?; // a single byte is of no pair
    Some((rank(start, cut), rank(cut, end)))
}

/// Tokens by their bytes. Short ones are found without following a pointer.
#[derive(Debug, Clone, Default)]
struct Whole {
    short: FxHashMap<u128, u32>,
    long: FxHashMap<Box<[u8]>, u32>,
}

impl Whole {
    fn insert(&mut self, token: &[u8], id: u32) -> Option<u32> {
        match token.len() {
            1..=pack::LONGEST => self.short.insert(pack(token), id),
            _ => self.long.insert(token.into(), id),
        }
    }

    fn is_empty(&self) -> bool {
        self.short.is_empty() && self.long.is_empty()
    }

    fn get(&self, token: &[u8]) -> Option<u32> {
        match token.len() {
            1..=pack::LONGEST => self.short.get(&pack(token)).copied(),
            _ => self.long.get(token).copied(),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::count::Counts;
    use crate::train::train;

    pub fn vocabulary(pieces: &[(&str, u64)], vocab_size: u32) -> Vocabulary {
        let mut counts = Counts::default();
        pieces.iter().for_each(|(piece, n)| counts.add(piece.as_bytes(), *n));
        let merges = train(&counts, vocab_size, &mut |_| true).unwrap();
        Vocabulary::new(&merges).unwrap()
    }

    /// Merges in the order of learning, one full pass over the piece for each merge there is.
    fn encode_slowly(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<u32> {
        let mut merges: Vec<(u32, Pair)> = vocabulary.merged.rows().collect();
        merges.sort_unstable();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        for (id, pair) in merges {
            let mut i = 0;
            while i + 1 < ids.len() {
                if (ids[i], ids[i + 1]) == pair {
                    ids.splice(i..i + 2, [id]);
                }
                i += 1;
            }
        }
        ids
    }

    #[test]
    fn worked_by_hand() {
        // 256 = aa, 257 = ab, 258 = aaab, 259 = ac: see train.rs.
        let vocabulary = vocabulary(&[("aaabdaaabac", 1)], 260);
        let mut ids = Vec::new();
        vocabulary.encode_piece(b"aaabdaaabac", &mut ids);
        assert_eq!(ids, [258, 100, 258, 259]);
        vocabulary.encode_piece(b"aaaab", &mut ids); // appends: aa aa b, since aa comes first
        assert_eq!(ids[4..], [256, 256, 98]);
        assert_eq!(vocabulary.tokens()[258][..], *b"aaab");
        assert_eq!(vocabulary.decode(&ids).unwrap(), b"aaabdaaabacaaaab");
    }

    #[test]
    fn same_as_the_slow_twin_short_and_long() {
        let pieces = [("abababcabc", 3), ("aaaaaaaa", 2), ("bcabcaabbcc", 5), ("héhé漢漢", 2)];
        let vocabulary = vocabulary(&pieces, 290);
        let letters = ["a", "b", "c", "ab", "é", "漢"];
        let mut random = crate::random(7);
        for length in 0..150 {
            let piece: String = (0..length).map(|_| letters[random(6) as usize]).collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            vocabulary.merge_long(piece.as_bytes(), &mut long);
            assert_eq!(long, encode_slowly(&vocabulary, piece.as_bytes()), "{piece}");
            if piece.len() <= SHORT {
                vocabulary.merge_short(piece.as_bytes(), &mut short);
                assert_eq!(long, short, "{piece}");
            }
            assert_eq!(vocabulary.decode(&long).unwrap(), piece.as_bytes());
        }
    }

    #[test]
    fn every_token_encodes_to_itself() {
        let vocabulary = vocabulary(&[("abababcabcaabbccabacaba", 1), ("cabbage", 2)], 300);
        for (id, token) in vocabulary.tokens().iter().enumerate() {
            let mut ids = Vec::new();
            vocabulary.encode_piece(token, &mut ids);
            assert_eq!(ids, [id as u32]);
        }
    }

    #[test]
    fn empty_and_single_bytes() {
        let vocabulary = Vocabulary::new(&[]).unwrap();
        let mut ids = Vec::new();
        vocabulary.encode_piece(b"", &mut ids);
        assert!(ids.is_empty());
        vocabulary.encode_piece(&[0, 255], &mut ids);
        assert_eq!(ids, [0, 255]);
        assert_eq!(vocabulary.decode(&[]).unwrap(), b"");
    }

    /// Every byte, and some tokens more, with the bytes in another order than their values.
    pub fn ranks(more: &[&str]) -> Vec<(Vec<u8>, u32)> {
        let bytes = (0..=u8::MAX).rev().map(|byte| vec![byte]);
        let more = more.iter().map(|token| token.as_bytes().to_vec());
        bytes.chain(more).zip(0..).collect()
    }

    #[test]
    fn ranks_merge_whatever_makes_a_token() {
        // abc comes of a+bc here as well as of ab+c, and xyz of no merge at all.
        let vocabulary = Vocabulary::from_ranks(ranks(&["bc", "ab", "abc", "xyz"])).unwrap();
        let encode = |piece: &str| {
            let mut ids = Vec::new();
            vocabulary.encode_piece(piece.as_bytes(), &mut ids);
            ids
        };
        assert_eq!(encode("abc"), [258]);
        assert_eq!(encode("abcd"), [258, 255 - u32::from(b'd')]);
        assert_eq!(encode("xyz"), [259]); // a piece that is a token is that token
        assert_eq!(encode("xyzx").len(), 4);
        assert_eq!(vocabulary.decode(&encode("xabcx")).unwrap(), b"xabcx");
    }

    /// tiktoken's rule to the letter: any neighbours that spell a token, the lowest id first.
    fn encode_by_ranks(ranks: &FxHashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
        let id = |bytes: &[u8]| ranks.get(bytes).copied();
        if let Some(id) = id(piece) {
            return vec![id];
        }
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&byte| vec![byte]).collect();
        while let Some((_, i)) = (parts.windows(2).enumerate())
            .filter_map(|(i, pair)| id(&pair.concat()).map(|id| (id, i)))
            .min()
        {
            let second = parts.remove(i + 1);
            parts[i].extend(second);
        }
        parts.iter().map(|part| id(part).unwrap()).collect()
    }

    #[test]
    fn any_ranks_whatever_encode_by_the_rule() {
        let mut random = crate::random(3);
        for _ in 0..25 {
            // Words in no order and with parts that may be missing: no training gives such ranks.
            let mut word = |longest: u64| -> Vec<u8> {
                (0..2 + random(longest - 1)).map(|_| b'a' + random(2) as u8).collect()
            };
            let mut words: Vec<Vec<u8>> = (0..25).map(|_| word(7)).collect();
            let pieces: Vec<Vec<u8>> = (0..40).map(|_| word(90)).collect();
            let mut seen = rustc_hash::FxHashSet::default();
            words.retain(|word| seen.insert(word.clone()));
            let words: Vec<&str> = words.iter().map(|w| str::from_utf8(w).unwrap()).collect();
            let ranks = ranks(&words);
            let vocabulary = Vocabulary::from_ranks(ranks.clone()).unwrap();
            let ranks = ranks.into_iter().collect();
            for piece in pieces.iter().map(Vec::as_slice).chain(words.iter().map(|w| w.as_bytes()))
            {
                let mut ids = Vec::new();
                vocabulary.encode_piece(piece, &mut ids);
                assert_eq!(ids, encode_by_ranks(&ranks, piece), "{words:?} {piece:?}");
            }
        }
    }

    #[test]
    fn ranks_that_are_none() {
        let error = |ranks| Vocabulary::from_ranks(ranks).unwrap_err().to_string();
        let with = |token: &str, id| [ranks(&[]), vec![(token.as_bytes().to_vec(), id)]].concat();
        assert!(error(with("ab", 300)).contains("rank 300: there are only 257 tokens"));
        assert!(error(with("ab", 7)).contains("rank 7: two tokens have it"));
        assert!(error(with("a", 256)).contains("rank 256: another token has the same bytes"));
        assert!(error(with("", 256)).contains("rank 256: it has no bytes"));
        let mut without = ranks(&["ab"]);
        without.retain(|(token, _)| token != b"z");
        without.iter_mut().for_each(|(_, id)| *id -= u32::from(*id > 255 - u32::from(b'z')));
        assert!(error(without).contains("no token for the single byte 0x7a"));
    }

    #[test]
    fn errors() {
        let vocabulary = Vocabulary::new(&[(97, 98)]).unwrap();
        let error = vocabulary.decode(&[256, 257]).unwrap_err();
        assert_eq!(error, Error::UnknownToken { id: 257, index: 1, vocab_size: 257 });
        assert!(Vocabulary::new(&[(97, 256)]).is_none()); // 256 would be made of itself
    }
}
