//! Many texts to ids, on all cores.
//!
//! Text repeats itself: of a hundred pieces two or three are new, so each thread keeps what they
//! became in a [`Cache`]. A long text is cut where it may be cut, so that a single
//! one keeps all threads busy too; what they made is put in order at the end.

use std::hint::black_box;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::encode::Vocabulary;
use crate::pack::{self, hash, pack_at};
use crate::parallel::{self, Check};
use crate::split::{BATCH, Splitter};

/// So many bytes a token has at least in most texts: how much room is made for ids at first.
const BYTES_A_TOKEN: usize = 4;

/// Ids are kept as small as the vocabulary allows, since they are many.
pub trait Id: Copy + Default + Send + Sync {
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
pub struct Caches(Mutex<Vec<Cache>>);

impl Caches {
    fn take(&self, bytes: usize) -> Cache {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_default().for_text_of(bytes)
    }

    fn give(&self, cache: Cache) {
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
                cache: caches.take(bytes / threads),
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
struct Worker<T> {
    splitter: Option<Splitter>,
    cache: Cache,
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
/// the size is fixed and nothing is ever cleaned up.
#[derive(Debug, Default)]
struct Cache {
    sets: Vec<Set>,
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))] // one line of the processor's cache, in one piece
struct Set([Entry; 2]);

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    piece: u128, // packed; 0 is no piece
    ids: [u32; KEPT],
    count: u32,
}

/// Pieces of more ids are not kept.
const KEPT: usize = 3;

impl Cache {
    const SETS: usize = 1 << 19; // 32 MiB, room for the distinct pieces of a gigabyte of text

    /// At least as large as is good for a text of so many bytes: for a single sentence, making a
    /// large cache would take longer than it saves.
    fn for_text_of(mut self, bytes: usize) -> Self {
        let sets = (bytes / 16).next_power_of_two().clamp(1, Self::SETS);
        if self.sets.len() < sets {
            self.sets = vec![Set::default(); sets];
        }
        self
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
        black_box(places.iter().fold(0, |sum, &place| sum ^ self.sets[place].0[0].count));

        // Every piece writes KEPT ids and the next one over those that are too many: no branch on
        // their number.
        let mut buffer = [T::default(); BATCH * KEPT + KEPT];
        let mut n = 0;
        let mut slow = Vec::new();
        for ((&key, &place), &(start, end)) in keys.iter().zip(&places).zip(pieces) {
            let Set(set) = &mut self.sets[place];
            let mut entry = set[usize::from(set[0].piece != key)];
            if key == 0 || entry.piece != key {
                slow.clear();
                vocabulary.encode_piece(&text[start..end], &mut slow);
                if key == 0 || slow.len() > KEPT {
                    ids.extend_from_slice(&buffer[..n]);
                    n = 0;
                    ids.extend(slow.iter().map(|&id| T::of(id)));
                    continue;
                }
                (entry.piece, entry.count) = (key, slow.len() as u32);
                entry.ids[..slow.len()].copy_from_slice(&slow);
                *set = [entry, set[0]];
            }
            for (place, id) in buffer[n..n + KEPT].iter_mut().zip(entry.ids) {
                *place = T::of(id);
            }
            n += entry.count as usize;
        }
        ids.extend_from_slice(&buffer[..n]);
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
        let vocabulary = vocabulary(&[("abababcabcaabbccabacaba", 1), ("cabbage", 2)], 300);
        let letters = ['a', 'b', 'c', 'é'];
        let mut random = crate::random(9);
        for entries in [1, 64, 1 << 20] {
            let mut cache = Cache::default().for_text_of(entries);
            let (mut cached, mut plain): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
            for _ in 0..200 {
                let (mut text, mut pieces) = (String::new(), Vec::new());
                for _ in 0..random(BATCH as u64) {
                    let start = text.len();
                    (0..1 + random(20)).for_each(|_| text.push(letters[random(4) as usize]));
                    pieces.push((start, text.len()));
                    vocabulary.encode_piece(&text.as_bytes()[start..], &mut plain);
                }
                cache.encode(&vocabulary, text.as_bytes(), &pieces, &mut cached);
            }
            assert_eq!(cached, plain);
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
