//! Many texts to ids, on all cores.
//!
//! Text repeats itself: of a hundred pieces two or three are new, so each thread keeps what they
//! became in a [`Cache`]. A long text is cut where it may be cut, so that a single
//! one keeps all threads busy too; what they made is put in order at the end.

use std::hint::black_box;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;

use crate::Result;
use crate::encode::Vocabulary;
use crate::pack::{self, hash, pack_at};
use crate::parallel::{self, Check};
use crate::split::{BATCH, Splitter};

/// So many bytes a token has at least in most texts: how much room is made for ids at first.
const BYTES_A_TOKEN: usize = 4;

/// Ids are kept as small as the vocabulary allows, since they are many.
pub trait Id: Copy + Default + Into<u32> + Send + Sync {
    /// The id as this type, which must hold it.
    fn of(id: u32) -> Self;
    /// Writes ids as little-endian bytes.
    fn write(ids: &[Self], bytes: &mut [u8]);
}

impl Id for u16 {
    fn of(id: u32) -> Self {
        id as Self
    }

    fn write(ids: &[Self], bytes: &mut [u8]) {
        for (place, id) in bytes.chunks_exact_mut(2).zip(ids) {
            place.copy_from_slice(&id.to_le_bytes());
        }
    }
}

impl Id for u32 {
    fn of(id: u32) -> Self {
        id
    }

    fn write(ids: &[Self], bytes: &mut [u8]) {
        for (place, id) in bytes.chunks_exact_mut(4).zip(ids) {
            place.copy_from_slice(&id.to_le_bytes());
        }
    }
}

/// Many texts as ids.
#[derive(Debug)]
pub struct Encoded<T> {
    made: Vec<Vec<T>>,                 // by each thread
    parts: Vec<(usize, Range<usize>)>, // thread and place there, in the order of the texts
    ends: Vec<usize>,                  // of each text, in ids
}

impl<T: Id> Encoded<T> {
    /// Ids in all.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where each text's ids end.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// The ids of all texts, part by part.
    pub fn parts(&self) -> impl Iterator<Item = &[T]> {
        self.parts.iter().map(|(thread, place)| &self.made[*thread][place.clone()])
    }

    /// The ids of each text.
    pub fn rows(&self) -> Vec<Vec<T>> {
        let ids: Vec<T> = self.parts().flatten().copied().collect();
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(&start, &end)| ids[start..end].to_vec()).collect()
    }
}

/// What threads keep between two batches: their caches. Any number of callers may share it.
#[derive(Debug, Default)]
pub struct Caches {
    small: Kept<u16, 7>, // for vocabularies whose ids fit
    large: Kept<u32, 3>,
}

#[derive(Debug)]
struct Kept<W, const KEPT: usize>(Mutex<Vec<Cache<W, KEPT>>>);

impl<W, const KEPT: usize> Default for Kept<W, KEPT> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<W: Id, const KEPT: usize> Kept<W, KEPT> {
    fn take(&self, bytes: usize, vocabulary: &Vocabulary) -> Cache<W, KEPT> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_default().for_text_of(bytes, vocabulary)
    }

    fn give(&self, cache: Cache<W, KEPT>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
    }
}

/// The ids of many texts, in parallel where it is worth it, each text's after those of `prepend`.
/// Error indices count from 0. Without a splitter each text is one piece. `caches` must always
/// come with the same vocabulary.
pub fn encode_batch<T: Id, S: AsRef<str> + Sync>(
    vocabulary: &Vocabulary,
    splitter: Option<&Splitter>,
    texts: &[S],
    prepend: Option<T>,
    caches: &Caches,
    check: Check<'_>,
) -> Result<Encoded<T>> {
    if vocabulary.tokens().len() <= 1 << u16::BITS {
        encode_with(vocabulary, splitter, texts, prepend, &caches.small, check)
    } else {
        encode_with(vocabulary, splitter, texts, prepend, &caches.large, check)
    }
}

fn encode_with<T: Id, S: AsRef<str> + Sync, W: Id, const KEPT: usize>(
    vocabulary: &Vocabulary,
    splitter: Option<&Splitter>,
    texts: &[S],
    prepend: Option<T>,
    caches: &Kept<W, KEPT>,
    check: Check<'_>,
) -> Result<Encoded<T>> {
    let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let threads = parallel::threads_for(bytes);
    let segments: Vec<(usize, &str)> = (texts.iter().enumerate())
        .flat_map(|(i, text)| {
            let text = text.as_ref();
            splitter
                .map_or_else(|| vec![text], |s| s.segments(text))
                .into_iter()
                .map(move |s| (i, s))
        })
        .collect();
    let mut workers = (0..threads)
        .map(|_| {
            Ok(Worker {
                splitter: splitter.map(Splitter::recompile).transpose()?,
                cache: caches.take(bytes / threads, vocabulary),
                ids: Vec::with_capacity(bytes / threads / BYTES_A_TOKEN + texts.len() / threads),
                parts: Vec::new(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    parallel::for_each(&mut workers, segments.len(), check, |worker, k, pulse| {
        let (i, text) = segments[k];
        let start = worker.ids.len();
        if k == 0 || segments[k - 1].0 != i {
            worker.ids.extend(prepend);
        }
        let Worker { splitter, cache, ids, parts } = worker;
        match splitter {
            None => extend(ids, |ids| vocabulary.encode_piece(text.as_bytes(), ids)),
            Some(splitter) => splitter
                .batches(text, |pieces| {
                    pulse.beat()?;
                    cache.encode(vocabulary, text.as_bytes(), pieces, ids);
                    Ok(())
                })
                .map_err(|e| e.in_text(i))?,
        }
        parts.push((k, start..ids.len()));
        Ok(())
    })?;

    let mut made = Vec::with_capacity(threads);
    let mut parts = Vec::with_capacity(segments.len());
    for (thread, worker) in workers.into_iter().enumerate() {
        parts.extend(worker.parts.into_iter().map(|(k, place)| (k, (thread, place))));
        made.push(worker.ids);
        caches.give(worker.cache);
    }
    parts.sort_unstable_by_key(|&(k, _)| k);
    let mut ends = vec![0; texts.len()];
    let mut end = 0;
    for (k, (_, place)) in &parts {
        end += place.len();
        ends[segments[*k].0] = end;
    }
    Ok(Encoded { made, parts: parts.into_iter().map(|(_, part)| part).collect(), ends })
}

/// What a thread works with.
struct Worker<T, W, const KEPT: usize> {
    splitter: Option<Splitter>,
    cache: Cache<W, KEPT>,
    ids: Vec<T>,
    parts: Vec<(usize, Range<usize>)>, // segment and place in ids
}

/// Appends what `encode` gives.
fn extend<T: Id>(ids: &mut Vec<T>, encode: impl FnOnce(&mut Vec<u32>)) {
    let mut more = Vec::new();
    encode(&mut more);
    ids.extend(more.into_iter().map(T::of));
}

/// What pieces became.
///
/// A piece has a set of two places, found by its hash; a new one takes the place of the older. So
/// the size is fixed and nothing is ever cleaned up. The few long pieces have a map of their own.
#[derive(Debug)]
struct Cache<W, const KEPT: usize> {
    sets: Vec<Set<W, KEPT>>,
    long: FxHashMap<Box<[u8]>, Box<[u32]>>,
}

impl<W, const KEPT: usize> Default for Cache<W, KEPT> {
    fn default() -> Self {
        Self { sets: Vec::new(), long: FxHashMap::default() }
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(align(64))] // one line of the processor's cache, in one piece
struct Set<W, const KEPT: usize>([Entry<W, KEPT>; 2]);

/// 32 bytes. Pieces of more than KEPT ids are not kept.
#[derive(Debug, Clone, Copy)]
struct Entry<W, const KEPT: usize> {
    piece: u128, // packed; 0 is no piece
    ids: [W; KEPT],
    count: W,
}

impl<W: Id, const KEPT: usize> Entry<W, KEPT> {
    fn new(piece: u128, ids: &[u32]) -> Self {
        let mut kept = [W::default(); KEPT];
        kept.iter_mut().zip(ids).for_each(|(place, &id)| *place = W::of(id));
        Self { piece, ids: kept, count: W::of(ids.len() as u32) }
    }
}

impl<W: Id, const KEPT: usize> Cache<W, KEPT> {
    const SETS: usize = 1 << 19; // 32 MiB, room for the distinct pieces of a gigabyte of text
    const LONG: usize = 1 << 16; // long pieces, after which it begins anew
    const LONGEST: usize = 64; // longer ones hardly come again

    /// At least as large as is good for a text of so many bytes: for a single sentence, making a
    /// large cache would take longer than it saves.
    fn for_text_of(mut self, bytes: usize, vocabulary: &Vocabulary) -> Self {
        let sets = (bytes / 16).next_power_of_two().clamp(1, Self::SETS);
        if self.sets.len() < sets {
            self.sets = vec![Set([Entry::new(0, &[]); 2]); sets];
            // In a long text nearly all tokens come up. The first ones, which are the most
            // frequent, are put in last.
            if sets == Self::SETS {
                for (token, id) in vocabulary.pieces().rev() {
                    if token.len() <= pack::LONGEST {
                        let key = pack::pack(token);
                        self.keep(hash(key) as usize & (sets - 1), Entry::new(key, &[id]));
                    }
                }
            }
        }
        self
    }

    fn keep(&mut self, place: usize, entry: Entry<W, KEPT>) {
        let Set(set) = &mut self.sets[place];
        *set = [entry, set[0]];
    }

    /// Appends the ids of some pieces of a text.
    #[inline]
    fn encode<T: Id>(
        &mut self,
        vocabulary: &Vocabulary,
        text: &[u8],
        pieces: &[(usize, usize)],
        ids: &mut Vec<T>,
    ) {
        let (mut keys, mut places) = ([0; BATCH], [0; BATCH]);
        let mask = self.sets.len() - 1;
        for ((key, place), &(start, end)) in keys.iter_mut().zip(&mut places).zip(pieces) {
            if end - start <= pack::LONGEST {
                *key = pack_at(text, start, end);
                *place = hash(*key) as usize & mask;
            }
        }
        // The sets are scattered over the memory. Asked for together, in a loop of nothing else,
        // they come together, in about the time that one of them would take.
        let counts = places.iter().map(|&place| self.sets[place].0[0].count);
        black_box(counts.fold(0, |sum: u32, count| sum ^ count.into()));

        // Every piece writes KEPT ids and the next one over those that are too many: no branch on
        // their number.
        let mut buffer = [[T::default(); KEPT]; BATCH + 1];
        let buffer = buffer.as_flattened_mut();
        let mut n = 0;
        let mut slow = Vec::new();
        for ((&key, &place), &(start, end)) in keys.iter().zip(&places).zip(pieces) {
            if key == 0 {
                ids.extend_from_slice(&buffer[..n]);
                n = 0;
                self.encode_long(vocabulary, &text[start..end], ids);
                continue;
            }
            let Set(set) = &self.sets[place];
            let mut entry = set[usize::from(set[0].piece != key)];
            if entry.piece != key {
                slow.clear();
                vocabulary.encode_piece(&text[start..end], &mut slow);
                if slow.len() > KEPT {
                    ids.extend_from_slice(&buffer[..n]);
                    n = 0;
                    ids.extend(slow.iter().map(|&id| T::of(id)));
                    continue;
                }
                entry = Entry::new(key, &slow);
                self.keep(place, entry);
            }
            for (place, id) in buffer[n..n + KEPT].iter_mut().zip(entry.ids) {
                *place = T::of(id.into());
            }
            n += entry.count.into() as usize;
        }
        ids.extend_from_slice(&buffer[..n]);
    }

    fn encode_long<T: Id>(&mut self, vocabulary: &Vocabulary, piece: &[u8], ids: &mut Vec<T>) {
        if let Some(kept) = self.long.get(piece) {
            ids.extend(kept.iter().map(|&id| T::of(id)));
            return;
        }
        let mut made = Vec::new();
        vocabulary.encode_piece(piece, &mut made);
        ids.extend(made.iter().map(|&id| T::of(id)));
        if piece.len() <= Self::LONGEST {
            if self.long.len() == Self::LONG {
                self.long.clear();
            }
            self.long.insert(piece.into(), made.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::encode::tests::vocabulary;

    fn rows(vocabulary: &Vocabulary, pattern: Option<&str>, texts: &[String]) -> Vec<Vec<u16>> {
        let splitter = pattern.map(|pattern| Splitter::new(pattern).unwrap());
        let caches = Caches::default();
        let made =
            encode_batch(vocabulary, splitter.as_ref(), texts, Some(7), &caches, &mut || true);
        made.unwrap().rows()
    }

    #[test]
    fn batches_keep_their_order() {
        let vocabulary = vocabulary(&[("ab", 1)], 257);
        // Enough text for several threads; what no piece covers is dropped.
        let texts: Vec<String> = (0..500).map(|i| "ab ".repeat(i)).collect();
        let made = rows(&vocabulary, Some(r"\w+"), &texts);
        let expected = (0..500).map(|i| [vec![7], vec![256; i]].concat());
        assert!(made.into_iter().eq(expected));
        // Without a pattern the text is one piece.
        assert_eq!(rows(&vocabulary, None, &["ab ab".to_owned()]), [[7, 256, 32, 256]]);
    }

    #[test]
    fn the_cache_changes_nothing() {
        let merged = vocabulary(&[("abababcabcaabbccabacaba", 1), ("cabbage", 2)], 300);
        // By ranks, so that a large cache begins with the tokens; "bca" is one that no merge makes.
        let ranks = crate::encode::tests::ranks(&["ab", "abc", "cé", "abcé", "bca", "aa", "aaaa"]);
        let ranked = Vocabulary::from_ranks(ranks).unwrap();
        let letters = ['a', 'b', 'c', 'é'];
        let mut random = crate::random(9);
        for vocabulary in [&merged, &ranked] {
            for entries in [1, 64, Cache::<u16, 3>::SETS] {
                let mut cache = Cache::<u16, 3>::default().for_text_of(16 * entries, vocabulary);
                let (mut cached, mut plain): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
                for _ in 0..200 {
                    let (mut text, mut pieces) = (String::new(), Vec::new());
                    for _ in 0..random(BATCH as u64) {
                        let start = text.len();
                        (0..1 + random(20)).for_each(|_| text.push(letters[random(4) as usize]));
                        pieces.push((start, text.len()));
                        vocabulary.encode_piece(&text.as_bytes()[start..], &mut plain);
                    }
                    cache.encode(vocabulary, text.as_bytes(), &pieces, &mut cached);
                }
                assert_eq!(cached, plain);
            }
        }
    }

    #[test]
    fn a_failing_pattern_names_the_text() {
        let splitter = Splitter::new(r"(a|aa)+(?=c)\b|b").unwrap();
        let texts = ["b".to_owned(), "a".repeat(60)];
        let (vocabulary, none, caches) = (Vocabulary::default(), None::<u16>, Caches::default());
        let made = encode_batch(&vocabulary, Some(&splitter), &texts, none, &caches, &mut || true);
        let error = made.unwrap_err();
        assert!(matches!(error, Error::SplitItem { item: 1, .. }), "{error}");
    }

    #[test]
    fn a_long_text_is_cut_without_a_trace() {
        let pattern = crate::scan::PATTERNS[0].0.replace("{k}", "2");
        let vocabulary = vocabulary(&[(" the", 9), (" cat", 5), ("at", 2)], 270);
        let mut random = crate::random(4);
        let words = [" the", " cat", "'s", "\n ", " 12", "  ", "é", " a"];
        let text: String = (0..400_000).map(|_| words[random(8) as usize]).collect();
        let splitter = Splitter::new(&pattern).unwrap();
        let segments = splitter.segments(&text);
        assert!(segments.len() > 3 && segments.concat() == text);
        let mut whole = vec![7];
        for piece in splitter.pieces(&text).unwrap() {
            extend(&mut whole, |ids| vocabulary.encode_piece(piece.as_bytes(), ids));
        }
        assert_eq!(rows(&vocabulary, Some(&pattern), &[text]), [whole]);
    }
}
