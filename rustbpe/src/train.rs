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
use std::hint::black_box;

use rustc_hash::FxHashMap;

use crate::corpus::{Corpus, GAP};
use crate::count::Counts;
use crate::parallel::Check;
use crate::{Error, FIRST_MERGE_ID, Result};

/// Told now and then how many merges are learned; `false` stops with [`Error::Interrupted`].
pub type Watch<'a> = &'a mut dyn FnMut(usize) -> bool;

/// Two adjacent tokens.
pub type Pair = (u32, u32);

/// Occurrences between two checks for an interrupt (a few milliseconds).
const MERGES_A_CHECK: usize = 1 << 16;

/// By what the floor is divided when it gets lower: a pass over everything for each step.
const FLOOR_STEP: u64 = 16;

/// Positions that are looked at ahead of a merge.
const AHEAD: usize = 32;

/// Of the hash of a pair in a scan: 8 MB of sums a thread.
const BUCKET_BITS: u32 = 20;

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
///
/// Most pairs are rare, and a table of them all would be the work. So the counts are first summed
/// by a hash of the pair, without its name; only where a sum reaches the floor can a pair do so.
fn scan(corpus: &Corpus, floor: u64, check: Check<'_>) -> Result<Pairs> {
    let bucket =
        |pair: Pair| (key(pair).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BUCKET_BITS)) as usize;
    let mut summed = corpus.each_part(check, |part, pulse| {
        let mut sums = vec![0u64; 1 << BUCKET_BITS];
        corpus.each_pair(part, pulse, |pair, position| {
            sums[bucket(pair)] += corpus.count(position as usize);
        })?;
        Ok(sums)
    })?;
    let mut sums = summed.pop().unwrap_or_default();
    for more in summed {
        sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    }
    let found = corpus.each_part(check, |part, pulse| {
        let mut pairs = Pairs::default();
        corpus.each_pair(part, pulse, |pair, position| {
            if sums[bucket(pair)] >= floor {
                let occurrences = pairs.entry(key(pair)).or_default();
                occurrences.count += corpus.count(position as usize);
                occurrences.positions.push(position);
            }
        })?;
        Ok(pairs)
    })?;
    let mut pairs = Pairs::default();
    for (key, mut more) in found.into_iter().flatten() {
        let occurrences = pairs.entry(key).or_default();
        occurrences.count += more.count;
        occurrences.positions.append(&mut more.positions);
    }
    pairs.retain(|_, occurrences| occurrences.count >= floor);
    Ok(pairs)
}

/// One occurrence of `pair` less. Pairs that are not kept need no count, nor does the one that is
/// being merged.
#[inline]
fn lose(pairs: &mut Pairs, pair: Pair, count: u64) {
    if let Some(occurrences) = pairs.get_mut(&key(pair)) {
        occurrences.count -= count;
    }
}

/// The pairs that arise in a merge, of the new token with one before it or of it with one after
/// it. That other token is their number, so nothing is hashed.
#[derive(Default)]
struct Born {
    by_token: Vec<Newborn>,
    tokens: Vec<u32>,             // those noted in by_token, some of them twice
    occurrences: Vec<(u32, u32)>, // token and position
}

#[derive(Clone, Copy, Default)]
struct Newborn {
    count: u64,
    positions: u32, // how many
    list: u32,      // where they are collected, if the count reaches the floor
}

impl Born {
    #[inline]
    fn gain(&mut self, token: u32, position: usize, count: u64) {
        let newborn = &mut self.by_token[token as usize];
        if newborn.positions == 0 {
            self.tokens.push(token);
        }
        newborn.count += count;
        newborn.positions += 1;
        self.occurrences.push((token, position as u32));
    }

    /// Hands over the pairs that occur `floor` times or more, and forgets all.
    fn take(&mut self, floor: u64, mut kept: impl FnMut(u32, Occurrences)) {
        let mut lists: Vec<(u32, Occurrences)> = Vec::new();
        for &token in &self.tokens {
            let newborn = &mut self.by_token[token as usize];
            if newborn.count >= floor {
                let positions = Vec::with_capacity(newborn.positions as usize);
                lists.push((token, Occurrences { count: newborn.count, positions }));
                newborn.list = lists.len() as u32; // from 1 on
            }
        }
        if !lists.is_empty() {
            for &(token, position) in &self.occurrences {
                let list = self.by_token[token as usize].list;
                if list > 0 {
                    lists[list as usize - 1].1.positions.push(position);
                }
            }
        }
        for token in self.tokens.drain(..) {
            self.by_token[token as usize] = Newborn::default();
        }
        self.occurrences.clear();
        lists.into_iter().for_each(|(token, occurrences)| kept(token, occurrences));
    }
}

/// A training under way.
struct Training {
    corpus: Corpus,
    pairs: Pairs,
    before: Born, // pairs (x, new token)
    after: Born,  // pairs (new token, y)
}

impl Training {
    /// Merges the pair `(a, b)` into `id` at all of `positions`. Pairs with `id` in them, which
    /// arise here, are noted in `before` and `after`; all others are in `pairs` or not kept.
    fn merge(&mut self, (a, b): Pair, id: u32, positions: &[u32], check: Check<'_>) -> Result<()> {
        let Self { corpus, pairs, before, after } = self;
        before.by_token.resize(id as usize + 1, Newborn::default());
        after.by_token.resize(id as usize + 1, Newborn::default());
        for (i, &left) in positions.iter().enumerate() {
            if i % MERGES_A_CHECK == 0 && !check() {
                return Err(Error::Interrupted);
            }
            if i % AHEAD == 0 {
                // The places are scattered over the memory. Asked for together, they come
                // together, in about the time that one of them would take.
                let soon = positions[i..].iter().take(AHEAD);
                black_box(soon.fold(0, |all, &p| all ^ corpus.token(p as usize)));
            }
            let left = left as usize;
            if corpus.token(left) != a {
                continue; // an earlier merge took the token
            }
            let right = corpus.next(left);
            if corpus.token(right) != b {
                continue;
            }
            let (previous, end) = (corpus.previous(left), corpus.next(right));
            let (x, y) = (corpus.token(previous), corpus.token(end));
            let count = corpus.count(left);
            if x == id {
                after.by_token[a as usize].count -= count; // the pair (id, a) arose just before
            } else if x != GAP {
                lose(pairs, (x, a), count);
            }
            if x != GAP {
                before.gain(x, previous, count);
            }
            if y != GAP {
                lose(pairs, (b, y), count);
                after.gain(y, left, count);
            }
            corpus.join(left, right, end, id);
        }
        Ok(())
    }
}

/// Learns up to `vocab_size - 256` merges from pieces and their counts; the first makes
/// token 256. Fewer come back when no pair is left. The order of the pieces is irrelevant. The
/// counts must add up to less than 2^64.
pub fn train(counts: &Counts, vocab_size: u32, watch: Watch<'_>) -> Result<Vec<Pair>> {
    let mut corpus = Corpus::default();
    counts.each(|piece, count| corpus.add(piece, count))?;
    // The first merges are well above it: a guess, on which only the speed depends
    let floor = corpus.bytes() / (u64::from(vocab_size.max(1)) * 4);
    train_from(corpus, vocab_size, floor, watch)
}

/// As [`train`], with the floor to begin with.
fn train_from(corpus: Corpus, vocab_size: u32, floor: u64, watch: Watch<'_>) -> Result<Vec<Pair>> {
    let (before, after) = (Born::default(), Born::default());
    let mut training = Training { corpus, pairs: Pairs::default(), before, after };
    let mut merges = Vec::new();
    let last = vocab_size.min(GAP);
    let mut floor = floor.max(1);
    loop {
        let done = merges.len();
        training.pairs = scan(&training.corpus, floor, &mut || watch(done))?;
        // The greatest count on top; of equal counts the smallest pair.
        let mut heap: BinaryHeap<(u64, Reverse<u64>)> =
            training.pairs.iter().map(|(&key, entry)| (entry.count, Reverse(key))).collect();
        while FIRST_MERGE_ID + (merges.len() as u32) < last {
            let Some((stated, Reverse(best))) = heap.pop() else { break };
            let Entry::Occupied(entry) = training.pairs.entry(best) else { continue };
            let count = entry.get().count;
            if count < floor {
                entry.remove(); // until the floor is lower
                continue;
            }
            if count != stated {
                heap.push((count, Reverse(best)));
                continue;
            }
            let positions = entry.remove().positions;
            let done = merges.len();
            let id = FIRST_MERGE_ID + done as u32;
            training.merge(pair(best), id, &positions, &mut || watch(done))?;
            // Only now: while the merge went on, their counts were still changing.
            let Training { pairs, before, after, .. } = &mut training;
            let mut keep = |key, occurrences: Occurrences| {
                heap.push((occurrences.count, Reverse(key)));
                pairs.insert(key, occurrences);
            };
            before.take(floor, |x, occurrences| keep(key((x, id)), occurrences));
            after.take(floor, |y, occurrences| keep(key((id, y)), occurrences));
            merges.push(pair(best));
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

    fn corpus(pieces: &[(&str, u64)]) -> Corpus {
        let mut corpus = Corpus::default();
        pieces.iter().for_each(|&(piece, n)| corpus.add(piece.as_bytes(), n).unwrap());
        corpus
    }

    fn learn(pieces: &[(&str, u64)], vocab_size: u32) -> Vec<Pair> {
        train_from(corpus(pieces), vocab_size, 1, &mut |_| true).unwrap()
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
                let merges = train_from(corpus(&words), 400, floor, &mut |_| true).unwrap();
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
        let result = train_from(corpus(&[("abcdefgh", 1)]), 300, 1, &mut |_| {
            left -= 1;
            left > 0
        });
        assert_eq!(result, Err(Error::Interrupted));
    }
}
