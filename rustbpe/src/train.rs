//! Training: the most frequent pair of adjacent tokens becomes a token, again and again.
//!
//! **The rule.** Count every pair of adjacent tokens inside the pieces, each piece as often as it
//! occurs; overlapping pairs all count (`aaa` holds the pair `aa` twice). Merge the pair with the
//! highest count; among equals the smaller pair of ids, so that the result depends on nothing but
//! the counts. Occurrences are merged from left to right (`aaa` becomes `(aa) a`). Stop at the
//! wanted size, or when no pair is left.
//!
//! **The method.** All pieces lie in one array ([`Corpus`]) and every pair knows the positions
//! where it stood when it arose. A merge visits only these, and corrects the counts of the pairs
//! that begin or end there. The whole training is linear in the number of changed positions,
//! however long a single piece may be.
//!
//! **Why a heap with stale entries is right.** A pair is born in the merge that makes the newer
//! of its two tokens, with its final list of positions; every later merge can only destroy
//! occurrences. Counts never rise after birth, so a heap entry is never too small: an entry on
//! top that still states the true count is the maximum, and one that is too high goes back with
//! the true count. For the same reason the positions in a list ascend, which is the left to right
//! order that overlapping pairs need.
//!
//! **The floor.** Most pairs that arise are rare, will never be merged, and would fill the memory
//! and the processor's caches. For a pair below some count this is certain as long as there are
//! others at or above it, again because counts never rise. So only pairs at or above a *floor* are
//! kept. When none is left, the floor is lowered and all pairs are counted anew in one pass.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::Entry;

use rustc_hash::FxHashMap;

use crate::parallel::Check;
use crate::{Error, FIRST_MERGE_ID, Result};

/// Told now and then how many merges are learned; `false` stops with [`Error::Interrupted`].
pub type Watch<'a> = &'a mut dyn FnMut(usize) -> bool;

/// Two adjacent tokens.
pub type Pair = (u32, u32);

/// Positions of the corpus array that 31 bits can address: 2 GiB of distinct pieces.
pub const MAX_POSITIONS: usize = (SPAN - 1) as usize;

/// Occurrences between two checks for an interrupt (a few milliseconds).
const MERGES_A_CHECK: usize = 1 << 16;

/// By what the floor is divided when it gets lower: a pass over everything for each step.
const FLOOR_STEP: u64 = 4;

/// In a slot: this slot lies inside a token; the other bits are the token's length in bytes.
const SPAN: u32 = 1 << 31;
/// In a slot: no token. Stands before, between and after the pieces.
const GAP: u32 = SPAN - 1;

/// All distinct pieces, one slot a byte, with a gap around each.
///
/// A token of length n takes n slots. Its id stands in the first; if n > 1, the second and the
/// last slot hold `SPAN | n`. That is enough to step to either neighbour, so a linked list costs
/// no memory of its own.
struct Corpus {
    slots: Vec<u32>,
    piece: Vec<u32>,  // slot -> index into counts
    counts: Vec<u64>, // piece -> occurrences in the text
}

impl Corpus {
    fn new<P: AsRef<[u8]>>(pieces: impl IntoIterator<Item = (P, u64)>) -> Result<Self> {
        let mut corpus = Self { slots: vec![GAP], piece: vec![0], counts: Vec::new() };
        for (piece, count) in pieces {
            let bytes = piece.as_ref();
            if bytes.len() < 2 || count == 0 {
                continue; // no pair in it
            }
            if corpus.slots.len() + bytes.len() + 1 > MAX_POSITIONS {
                return Err(Error::TooMuchText { bytes: corpus.slots.len() + bytes.len() });
            }
            let index = corpus.counts.len() as u32;
            corpus.slots.extend(bytes.iter().map(|&byte| u32::from(byte)));
            corpus.slots.push(GAP);
            corpus.piece.resize(corpus.slots.len(), index);
            corpus.counts.push(count);
        }
        Ok(corpus)
    }

    /// A floor that the first merges are well above: a guess, on which only the speed depends.
    fn first_floor(&self, vocab_size: u32) -> u64 {
        let ends = self.slots.iter().zip(&self.piece).filter(|&(&token, _)| token != GAP);
        let bytes: u64 = ends.map(|(_, &piece)| self.counts[piece as usize]).sum();
        bytes / (u64::from(vocab_size.max(1)) * 4)
    }

    /// Calls `visit(key, position, count)` for each pair, from left to right.
    fn each_pair(&self, check: Check<'_>, mut visit: impl FnMut(u64, u32, u64)) -> Result<()> {
        let (mut p, mut visited) = (0, 0);
        while p < self.slots.len() {
            let token = self.slots[p];
            if token == GAP {
                p += 1;
                continue;
            }
            let next = self.next(p);
            if self.slots[next] != GAP {
                let count = self.counts[self.piece[p] as usize];
                visit(key((token, self.slots[next])), p as u32, count);
            }
            p = next;
            visited += 1;
            if visited % MERGES_A_CHECK == 0 && !check() {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }

    /// The position after the token at `p`: another token's, or a gap's.
    fn next(&self, p: usize) -> usize {
        let slot = self.slots[p + 1];
        if slot & SPAN == 0 { p + 1 } else { p + (slot ^ SPAN) as usize }
    }

    /// The position before the token at `p`: another token's, or a gap's.
    fn previous(&self, p: usize) -> usize {
        let slot = self.slots[p - 1];
        if slot & SPAN == 0 { p - 1 } else { p - (slot ^ SPAN) as usize }
    }

    /// Makes one token `id` of the tokens at `left` and `right`, which ends before `end`.
    fn join(&mut self, left: usize, right: usize, end: usize, id: u32) {
        let span = SPAN | (end - left) as u32;
        self.slots[left] = id;
        self.slots[right] = GAP; // it begins no token any more; stale positions must see that
        self.slots[left + 1] = span;
        self.slots[end - 1] = span;
    }
}

/// What is known of a pair: occurrences, and where they began when the pair arose (some of these
/// positions may be gone by now; the tokens there tell).
#[derive(Default)]
struct Occurrences {
    count: u64,
    positions: Vec<u32>,
}

/// Pairs, by [`key`].
type Pairs = FxHashMap<u64, Occurrences>;

/// A pair as one number, in the order of the pairs.
fn key((a, b): Pair) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

fn pair(key: u64) -> Pair {
    ((key >> 32) as u32, key as u32)
}

/// All pairs of the corpus as it is now that occur `floor` times or more.
fn scan(corpus: &Corpus, floor: u64, check: Check<'_>) -> Result<Pairs> {
    let mut counts: FxHashMap<u64, u64> = FxHashMap::default();
    corpus.each_pair(check, |key, _, count| *counts.entry(key).or_default() += count)?;
    let enough = counts.into_iter().filter(|&(_, count)| count >= floor);
    let known = |(key, count)| (key, Occurrences { count, positions: Vec::new() });
    let mut pairs: Pairs = enough.map(known).collect();
    corpus.each_pair(check, |key, position, _| {
        if let Some(occurrences) = pairs.get_mut(&key) {
            occurrences.positions.push(position);
        }
    })?;
    Ok(pairs)
}

/// One occurrence of `pair` less. Pairs that are not kept need no count, nor does the one that is
/// being merged.
fn lose(pairs: &mut Pairs, pair: Pair, count: u64) {
    if let Some(occurrences) = pairs.get_mut(&key(pair)) {
        occurrences.count -= count;
    }
}

/// One occurrence of `pair` more, at `position`.
fn gain(pairs: &mut Pairs, pair: Pair, position: usize, count: u64) {
    let occurrences = pairs.entry(key(pair)).or_default();
    occurrences.count += count;
    occurrences.positions.push(position as u32);
}

/// Merges the pair `(a, b)` into `id` at all of `positions`. Pairs with `id` in them, which arise
/// here, are noted in `born`; all others are in `pairs` or not kept.
fn merge(
    corpus: &mut Corpus,
    pairs: &mut Pairs,
    born: &mut Pairs,
    (a, b): Pair,
    id: u32,
    positions: &[u32],
    check: Check<'_>,
) -> Result<()> {
    for (i, &left) in positions.iter().enumerate() {
        if i % MERGES_A_CHECK == 0 && !check() {
            return Err(Error::Interrupted);
        }
        let left = left as usize;
        if corpus.slots[left] != a {
            continue; // an earlier merge took the token
        }
        let right = corpus.next(left);
        if corpus.slots[right] != b {
            continue;
        }
        let (before, end) = (corpus.previous(left), corpus.next(right));
        let (x, y) = (corpus.slots[before], corpus.slots[end]);
        let count = corpus.counts[corpus.piece[left] as usize];
        if x != GAP {
            lose(if x == id { born } else { pairs }, (x, a), count);
            gain(born, (x, id), before, count);
        }
        if y != GAP {
            lose(pairs, (b, y), count);
            gain(born, (id, y), left, count);
        }
        corpus.join(left, right, end, id);
    }
    Ok(())
}

/// Learns up to `vocab_size - 256` merges from distinct `pieces` and their counts; the first
/// makes token 256. Fewer come back when no pair is left. The order of the pieces is irrelevant.
/// The counts must add up to less than 2^64.
pub fn train<P: AsRef<[u8]>>(
    pieces: impl IntoIterator<Item = (P, u64)>,
    vocab_size: u32,
    watch: Watch<'_>,
) -> Result<Vec<Pair>> {
    let corpus = Corpus::new(pieces)?;
    let floor = corpus.first_floor(vocab_size);
    train_from(corpus, vocab_size, floor, watch)
}

/// As [`train`], with the floor to begin with.
fn train_from(
    mut corpus: Corpus,
    vocab_size: u32,
    floor: u64,
    watch: Watch<'_>,
) -> Result<Vec<Pair>> {
    let (mut merges, mut born) = (Vec::new(), Pairs::default());
    let last = vocab_size.min(GAP);
    let mut floor = floor.max(1);
    loop {
        let done = merges.len();
        let mut pairs = scan(&corpus, floor, &mut || watch(done))?;
        // The greatest count on top; of equal counts the smallest pair.
        let mut heap: BinaryHeap<(u64, Reverse<u64>)> =
            pairs.iter().map(|(&key, entry)| (entry.count, Reverse(key))).collect();
        while FIRST_MERGE_ID + (merges.len() as u32) < last {
            let Some((stated, Reverse(key))) = heap.pop() else { break };
            let Entry::Occupied(entry) = pairs.entry(key) else { continue };
            let count = entry.get().count;
            if count < floor {
                entry.remove(); // until the floor is lower
                continue;
            }
            if count != stated {
                heap.push((count, Reverse(key)));
                continue;
            }
            let positions = entry.remove().positions;
            let done = merges.len();
            let id = FIRST_MERGE_ID + done as u32;
            let check: Check<'_> = &mut || watch(done);
            merge(&mut corpus, &mut pairs, &mut born, pair(key), id, &positions, check)?;
            // Only now: while the merge went on, their counts were still changing.
            for (key, occurrences) in born.drain().filter(|(_, known)| known.count >= floor) {
                heap.push((occurrences.count, Reverse(key)));
                pairs.insert(key, occurrences);
            }
            merges.push(pair(key));
        }
        if floor == 1 || FIRST_MERGE_ID + merges.len() as u32 >= last {
            return Ok(merges);
        }
        floor = (floor / FLOOR_STEP).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u32 = b'a' as u32;
    const B: u32 = b'b' as u32;
    const C: u32 = b'c' as u32;
    const D: u32 = b'd' as u32;

    fn learn(pieces: &[(&str, u64)], vocab_size: u32) -> Vec<Pair> {
        train(pieces.iter().copied(), vocab_size, &mut |_| true).unwrap()
    }

    /// The rule of the module's head, word for word: everything is counted anew for each merge.
    fn learn_slowly(pieces: &[(&str, u64)], vocab_size: u32) -> Vec<Pair> {
        let mut pieces: Vec<(Vec<u32>, u64)> =
            pieces.iter().map(|(text, n)| (text.bytes().map(u32::from).collect(), *n)).collect();
        let mut merges = Vec::new();
        for id in FIRST_MERGE_ID..vocab_size {
            let mut counts = std::collections::BTreeMap::new();
            for (tokens, n) in &pieces {
                for window in tokens.windows(2) {
                    *counts.entry((window[0], window[1])).or_insert(0) += n;
                }
            }
            // max_by_key takes the last of equals; reversed, that is the smallest pair.
            let Some((&best, _)) = counts.iter().rev().max_by_key(|&(_, n)| n) else { break };
            for (tokens, _) in &mut pieces {
                let mut i = 0;
                while i + 1 < tokens.len() {
                    if (tokens[i], tokens[i + 1]) == best {
                        tokens.splice(i..i + 2, [id]);
                    }
                    i += 1;
                }
            }
            merges.push(best);
        }
        merges
    }

    #[test]
    fn worked_by_hand() {
        // The example of Wikipedia's article on byte pair encoding.
        //   a a a b d a a a b a c     aa 4 times (twice in each aaa)         256 = aa
        //   256 a b d 256 a b a c     ab 2 and 256 a 2: a < 256              257 = ab
        //   256 257 d 256 257 a c     256 257 2                              258 = aaab
        //   258 d 258 a c             all once: (a c) is the smallest pair   259 = ac
        let merges = learn(&[("aaabdaaabac", 1)], 260);
        assert_eq!(merges, [(A, A), (A, B), (256, 257), (A, C)]);
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        // ab, ba, cd once each; the order of the pieces must not matter.
        assert_eq!(learn(&[("cd", 1), ("ba", 1), ("ab", 1)], 259), [(A, B), (B, A), (C, D)]);
        assert_eq!(learn(&[("ab", 1), ("cd", 1), ("ba", 1)], 259), [(A, B), (B, A), (C, D)]);
        // The first token decides before the second.
        assert_eq!(learn(&[("bc", 1), ("ad", 1)], 257), [(A, D)]);
    }

    #[test]
    fn overlapping_repeats() {
        assert_eq!(learn(&[("aaaa", 1)], 300), [(A, A), (256, 256)]);
        assert_eq!(learn(&[("aaaaa", 1)], 300), [(A, A), (256, A), (256, 257)]);
        // aaa holds aa twice: 2 > 1, though only one of the two can be merged.
        assert_eq!(learn(&[("aaa", 1), ("bc", 1)], 257), [(A, A)]);
        // An odd one stays at the right end: (aa)(aa)a, so that (256, a) arises and not (a, 256).
        assert_eq!(learn(&[("aaab", 1), ("aaa", 1)], 258), [(A, A), (256, A)]);
    }

    #[test]
    fn counts_beyond_32_bits() {
        let beyond = u64::from(u32::MAX) + 2; // would be 1 in 32 bits
        let pieces = [("ab", 1000), ("bc", beyond), ("cd", beyond + 1), ("da", 1 << 62)];
        assert_eq!(learn(&pieces, 300), [(D, A), (C, D), (B, C), (A, B)]);
    }

    #[test]
    fn nothing_to_merge() {
        assert_eq!(learn(&[], 300), []);
        assert_eq!(learn(&[("", 5), ("a", 9)], 300), []);
        assert_eq!(learn(&[("ab", 0)], 300), []);
        assert_eq!(learn(&[("ab", 1), ("abc", 0)], 300), [(A, B)]);
        assert_eq!(learn(&[("ab", 1)], 256), []);
        assert_eq!(learn(&[("ab", 1)], 0), []);
        assert_eq!(learn(&[("ab", 1)], 300), [(A, B)]);
    }

    #[test]
    fn pieces_are_not_joined() {
        assert_eq!(learn(&[("ab", 1), ("cd", 1)], 300), [(A, B), (C, D)]);
    }

    #[test]
    fn the_same_piece_twice_counts_twice() {
        assert_eq!(learn(&[("ab", 2), ("cd", 3), ("ab", 2)], 257), [(A, B)]);
    }

    #[test]
    fn same_as_the_slow_twin() {
        // Few letters, so that repeats, overlaps and ties abound.
        let mut random = crate::random(1);
        for round in 0..200 {
            let letters = 1 + round % 5;
            let words: Vec<(String, u64)> = (0..1 + random(12))
                .map(|_| {
                    let length = random(if round % 10 == 0 { 200 } else { 12 });
                    let word = (0..length).map(|_| b"abcde"[random(letters) as usize] as char);
                    (word.collect(), 1 + random(3))
                })
                .collect();
            let words: Vec<(&str, u64)> = words.iter().map(|(word, n)| (&word[..], *n)).collect();
            let expected = learn_slowly(&words, 400);
            assert_eq!(learn(&words, 400), expected, "{words:?}");
            for floor in [2, 7, 100] {
                let corpus = Corpus::new(words.iter().copied()).unwrap();
                let merges = train_from(corpus, 400, floor, &mut |_| true).unwrap();
                assert_eq!(merges, expected, "from {floor}: {words:?}");
            }
        }
    }

    #[test]
    fn one_very_long_piece() {
        // Linear in its length: minutes if every merge walked the whole piece.
        let mut random = crate::random(3);
        let text: String = (0..200_000).map(|_| (b'a' + random(26) as u8) as char).collect();
        assert_eq!(learn(&[(&text, 1)], 2000).len(), 2000 - 256);
    }

    #[test]
    fn interrupt() {
        let mut left = 3;
        let result = train([("abcdefgh", 1)], 300, &mut |_| {
            left -= 1;
            left > 0
        });
        assert_eq!(result, Err(Error::Interrupted));
    }
}
