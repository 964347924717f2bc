//! Counting equal pieces, in parallel.
//!
//! Every thread counts into a table of its own from the first text to the last, so there is nothing
//! to lock; the tables are added up once at the end. The price is memory: a frequent piece is held
//! once a thread. The sum depends neither on the number of threads nor on who took which text.

use std::hint::black_box;

use rustc_hash::FxHashMap;

use crate::Result;
use crate::pack::{self, hash, pack, pack_at, unpack};
use crate::parallel::{self, Check};
use crate::split::Splitter;

/// Slots in front of a thread's table: half a megabyte, the share of one core's own cache.
const FRONT: usize = 1 << 14;

/// Counts that wait for their way into the table.
const WAITING: usize = 1 << 10;

/// Slots of a table that are looked at ahead of their turn.
const AHEAD: usize = 32;

/// A packed piece and its count; a count of 0 marks a free slot.
type Slot = (u128, u64);

/// How often each distinct piece occurs.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    short: Table,
    long: FxHashMap<Box<[u8]>, u64>,
}

impl Counts {
    /// Adds to the count of a piece.
    pub fn add(&mut self, piece: &[u8], count: u64) {
        match piece.len() {
            0 => {}
            1..=pack::LONGEST => self.short.add_all(&[(pack(piece), count)]),
            _ => self.add_long(piece, count),
        }
    }

    #[inline]
    fn add_long(&mut self, piece: &[u8], count: u64) {
        if let Some(known) = self.long.get_mut(piece) {
            *known += count; // looked up before a key is made: most have been seen before
        } else {
            self.long.insert(piece.into(), count);
        }
    }

    /// Distinct pieces.
    pub fn len(&self) -> usize {
        self.short.len + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `visit` with every piece and its count, in no particular order; stops at an error.
    pub fn each(&self, mut visit: impl FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        for &(key, count) in self.short.slots.iter().filter(|slot| slot.1 > 0) {
            let (bytes, n) = unpack(key);
            visit(&bytes[..n], count)?;
        }
        self.long.iter().try_for_each(|(piece, &count)| visit(piece, count))
    }
}

/// Packed pieces and their counts: open addressing, the next free place after the hash's own.
#[derive(Debug, Clone, Default)]
struct Table {
    slots: Vec<Slot>, // a power of two of them, at most half in use
    len: usize,
}

impl Table {
    /// Adds counts. The table is larger than the processor's caches and its slots are hit at
    /// random; asked for together, they come together, in about the time of one.
    fn add_all(&mut self, counts: &[Slot]) {
        for counts in counts.chunks(AHEAD) {
            let mask = self.slots.len().saturating_sub(1);
            let soon = counts.iter().map(|&(key, _)| hash(key) as usize & mask);
            black_box(soon.fold(0, |all, i| all ^ self.slots.get(i).map_or(0, |slot| slot.1)));
            for &(key, count) in counts {
                if count > 0 {
                    self.add(key, count);
                }
            }
        }
    }

    fn add(&mut self, key: u128, count: u64) {
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        let mask = self.slots.len() - 1;
        let mut place = hash(key) as usize & mask;
        loop {
            let slot = &mut self.slots[place];
            if slot.1 == 0 {
                *slot = (key, count);
                self.len += 1;
                return;
            }
            if slot.0 == key {
                slot.1 += count;
                return;
            }
            place = (place + 1) & mask;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let size = (self.slots.len() * 2).max(1 << 10);
        let old = std::mem::replace(self, Self { slots: vec![(0, 0); size], len: 0 });
        self.add_all(&old.slots);
    }
}

/// Counts the pieces of one thread.
///
/// In front of the table stands a small one, where each piece has one place and drives out what
/// is there. It holds the frequent pieces, six in seven of a text, in the core's own cache.
struct Worker {
    front: Vec<Slot>,
    waiting: Vec<Slot>, // driven out
    counts: Counts,
}

impl Worker {
    fn new() -> Self {
        Self { front: vec![(0, 0); FRONT], waiting: Vec::new(), counts: Counts::default() }
    }

    #[inline]
    fn add(&mut self, text: &[u8], pieces: &[(usize, usize)]) {
        for &(start, end) in pieces {
            if end - start > pack::LONGEST {
                self.counts.add_long(&text[start..end], 1);
                continue;
            }
            let key = pack_at(text, start, end);
            let slot = &mut self.front[hash(key) as usize % FRONT];
            if slot.0 == key {
                slot.1 += 1;
            } else {
                self.waiting.push(*slot);
                *slot = (key, 1);
            }
        }
        if self.waiting.len() >= WAITING {
            self.counts.short.add_all(&self.waiting);
            self.waiting.clear();
        }
    }

    fn finish(mut self) -> Counts {
        self.counts.short.add_all(&self.waiting);
        self.counts.short.add_all(&self.front);
        self.counts
    }
}

/// Counts the pieces of texts that arrive in batches.
pub struct Counter {
    workers: Vec<(Splitter, Worker)>,
    texts_seen: usize,
}

impl Counter {
    /// A counter on `threads` threads (at least one).
    pub fn new(splitter: &Splitter, threads: usize) -> Result<Self> {
        let worker = |_| Ok((splitter.recompile()?, Worker::new()));
        let workers = (0..threads.max(1)).map(worker).collect::<Result<_>>()?;
        Ok(Self { workers, texts_seen: 0 })
    }

    /// Adds a batch. An error names the text by its index among all texts added so far.
    pub fn add<T: AsRef<str> + Sync>(&mut self, texts: &[T], check: Check<'_>) -> Result<()> {
        let bytes = texts.iter().map(|text| text.as_ref().len()).sum();
        let threads = parallel::threads_for(bytes).min(self.workers.len());
        let first = self.texts_seen;
        self.texts_seen += texts.len();
        parallel::for_each(
            &mut self.workers[..threads],
            texts.len(),
            check,
            |(splitter, worker), i, pulse| {
                let text = texts[i].as_ref();
                let split = splitter.batches(text, |pieces| {
                    pulse.beat()?;
                    worker.add(text.as_bytes(), pieces);
                    Ok(())
                });
                split.map_err(|e| e.in_text(first + i))
            },
        )
    }

    /// The counts over all texts.
    pub fn finish(self) -> Counts {
        let mut all: Vec<Counts> =
            self.workers.into_iter().map(|(_, worker)| worker.finish()).collect();
        // Into the largest table, so that as few keys as possible move.
        all.sort_unstable_by_key(Counts::len);
        let mut total = all.pop().unwrap_or_default();
        for counts in all {
            total.short.add_all(&counts.short.slots);
            for (piece, count) in counts.long {
                total.add_long(&piece, count);
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Error;

    fn count(texts: &[String], batch: usize, threads: usize) -> BTreeMap<String, u64> {
        let mut counter = Counter::new(&Splitter::new(r"\w+|\s+").unwrap(), threads).unwrap();
        for texts in texts.chunks(batch) {
            counter.add(texts, &mut || true).unwrap();
        }
        let mut pieces = BTreeMap::new();
        let note = |piece: &[u8], count| {
            assert_eq!(pieces.insert(String::from_utf8(piece.into()).unwrap(), count), None);
            Ok(())
        };
        counter.finish().each(note).unwrap();
        pieces
    }

    #[test]
    fn counts_by_hand() {
        let counts = count(&["a bb a!".to_owned(), String::new(), "bb".to_owned()], 2, 1);
        let expected = [("a", 2), ("bb", 2), (" ", 2)].map(|(piece, n)| (piece.into(), n));
        assert_eq!(counts, BTreeMap::from_iter(expected)); // the '!' is matched by nothing
    }

    #[test]
    fn threads_and_batches_do_not_matter() {
        // Long enough that several threads are really started.
        let texts: Vec<String> =
            (0..200).map(|i| format!("x{i} y{} ", i % 7).repeat(300)).collect();
        let one = count(&texts, 1000, 1);
        assert_eq!(one.values().sum::<u64>(), 200 * 300 * 4);
        assert_eq!(one, count(&texts, 1000, 4));
        assert_eq!(one, count(&texts, 64, 3));
    }

    #[test]
    fn short_and_long_pieces_against_a_plain_map() {
        let mut random = crate::random(5);
        let texts: Vec<String> = (0..3000)
            .map(|_| "ab".repeat(random(20) as usize) + &random(500).to_string())
            .collect();
        let mut expected = BTreeMap::new();
        for text in &texts {
            *expected.entry(text.clone()).or_insert(0) += 1;
        }
        assert_eq!(count(&texts, 100, 2), expected);
    }

    #[test]
    fn interrupt_inside_one_long_text() {
        let mut counter = Counter::new(&Splitter::new(r"\w").unwrap(), 1).unwrap();
        let mut beats = 0;
        let mut check = || {
            beats += 1;
            beats < 3
        };
        let text = ["a".repeat(1_000_000)];
        assert_eq!(counter.add(&text, &mut check), Err(Error::Interrupted));
        assert_eq!(beats, 3);
    }

    #[test]
    fn a_failing_pattern_names_the_text() {
        let splitter = Splitter::new(r"(a|aa)+(?=c)\b|b").unwrap();
        let mut counter = Counter::new(&splitter, 1).unwrap();
        counter.add(&["b", "b"], &mut || true).unwrap();
        let hopeless = format!("b{}", "a".repeat(60));
        let error = counter.add(&["b", &hopeless], &mut || true).unwrap_err();
        assert!(matches!(error, Error::SplitItem { item: 3, .. }), "{error}");
    }
}
