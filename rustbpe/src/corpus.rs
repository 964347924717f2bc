//! The text as training sees it: every distinct piece once, as the tokens that it is made of so far.

use std::ops::Range;

use crate::parallel::{self, Check, Pulse};
use crate::train::Pair;
use crate::{Error, Result};

/// Positions that 31 bits can address: 2 GiB of distinct pieces.
pub const MAX_POSITIONS: usize = (SPAN - 1) as usize;

/// Slots between two cuts, at which threads can share the work.
const CUT: usize = 1 << 16;

/// Slots between two checks for an interrupt (a few milliseconds).
const SLOTS_A_CHECK: usize = 1 << 16;

/// In a slot: this slot lies inside a token; the other bits are the token's length in bytes.
const SPAN: u32 = 1 << 31;
/// In the place of a token: none begins or goes on here.
pub const GAP: u32 = SPAN - 1;
/// Stands before, between and after the pieces.
const GAP_SLOT: Slot = Slot { token: GAP, weight: 0 };
/// In a slot's weight: the other bits are an index into [`Corpus::heavy`].
const HEAVY: u32 = 1 << 31;

/// One byte of a piece.
#[derive(Clone, Copy)]
struct Slot {
    token: u32,
    weight: u32, // occurrences of the piece in the text, or where they are written
}

/// All distinct pieces, one slot a byte, with a gap around each.
///
/// A token of length n takes n slots. Its id stands in the first; if n > 1, the second and the
/// last slot hold `SPAN | n`. That is enough to step to either neighbour, so a linked list costs
/// no memory of its own. All that a merge wants to know of a place is in one line of the cache.
pub struct Corpus {
    slots: Vec<Slot>,
    heavy: Vec<u64>,  // weights of 31 bits and more
    cuts: Vec<usize>, // some of the beginnings of pieces
}

impl Default for Corpus {
    /// No piece yet.
    fn default() -> Self {
        Self { slots: vec![GAP_SLOT], heavy: Vec::new(), cuts: vec![1] }
    }
}

impl Corpus {
    /// Adds a piece that occurs `count` times.
    pub fn add(&mut self, piece: &[u8], count: u64) -> Result<()> {
        if piece.len() < 2 || count == 0 {
            return Ok(()); // no pair in it
        }
        let start = self.slots.len();
        if start + piece.len() + 1 > MAX_POSITIONS {
            return Err(Error::TooMuchText { bytes: start + piece.len() });
        }
        if start - self.cuts[self.cuts.len() - 1] >= CUT {
            self.cuts.push(start);
        }
        let weight = self.weigh(count);
        let slot = |&byte| Slot { token: u32::from(byte), weight };
        self.slots.extend(piece.iter().map(slot));
        self.slots.push(GAP_SLOT);
        Ok(())
    }

    fn weigh(&mut self, count: u64) -> u32 {
        match u32::try_from(count) {
            Ok(weight) if weight < HEAVY => weight,
            _ => {
                self.heavy.push(count);
                (self.heavy.len() - 1) as u32 | HEAVY
            }
        }
    }

    /// The token that begins at a position, or [`GAP`]; another number inside of a token.
    #[inline]
    pub fn token(&self, p: usize) -> u32 {
        self.slots[p].token
    }

    /// How often the piece that holds this slot occurs in the text.
    #[inline]
    pub fn count(&self, slot: usize) -> u64 {
        let weight = self.slots[slot].weight;
        if weight & HEAVY == 0 { u64::from(weight) } else { self.heavy[(weight ^ HEAVY) as usize] }
    }

    /// Bytes of the text, without the pieces in which there is no pair.
    pub fn bytes(&self) -> u64 {
        (0..self.slots.len()).map(|slot| self.count(slot)).sum()
    }

    /// Does `work` for as many parts as there are threads; the results come in order.
    pub fn each_part<R: Send>(
        &self,
        check: Check<'_>,
        work: impl Fn(Range<usize>, &mut Pulse<'_>) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let threads = parallel::threads_for(self.slots.len()).min(self.cuts.len());
        let cut = |k| *self.cuts.get(k * self.cuts.len() / threads).unwrap_or(&self.slots.len());
        let mut done: Vec<Vec<(usize, R)>> = Vec::new();
        done.resize_with(threads, Vec::new);
        parallel::for_each(&mut done, threads, check, |mine, k, pulse| {
            mine.push((k, work(cut(k)..cut(k + 1), pulse)?));
            Ok(())
        })?;
        let mut done: Vec<(usize, R)> = done.into_iter().flatten().collect();
        done.sort_unstable_by_key(|&(part, _)| part);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    }

    /// Calls `visit(pair, position)` for each pair of a part, from left to right.
    pub fn each_pair(
        &self,
        part: Range<usize>,
        pulse: &mut Pulse<'_>,
        mut visit: impl FnMut(Pair, u32),
    ) -> Result<()> {
        let (mut p, mut next_beat) = (part.start, part.start);
        while p < part.end {
            if p >= next_beat {
                pulse.beat()?;
                next_beat = p + SLOTS_A_CHECK;
            }
            let token = self.token(p);
            if token == GAP {
                p += 1;
                continue;
            }
            let next = self.next(p);
            if self.token(next) != GAP {
                visit((token, self.token(next)), p as u32);
            }
            p = next;
        }
        Ok(())
    }

    /// The position after the token at `p`: another token's, or a gap's.
    #[inline]
    pub fn next(&self, p: usize) -> usize {
        let slot = self.slots[p + 1].token;
        if slot & SPAN == 0 { p + 1 } else { p + (slot ^ SPAN) as usize }
    }

    /// The position before the token at `p`: another token's, or a gap's.
    #[inline]
    pub fn previous(&self, p: usize) -> usize {
        let slot = self.slots[p - 1].token;
        if slot & SPAN == 0 { p - 1 } else { p - (slot ^ SPAN) as usize }
    }

    /// Makes one token `id` of the tokens at `left` and `right`, which ends before `end`.
    #[inline]
    pub fn join(&mut self, left: usize, right: usize, end: usize, id: u32) {
        let span = SPAN | (end - left) as u32;
        self.slots[left].token = id;
        self.slots[right].token = GAP; // it begins no token any more; stale positions must see that
        self.slots[left + 1].token = span;
        self.slots[end - 1].token = span;
    }
}
