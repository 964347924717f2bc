//! Hand-written scanners for the split patterns that everybody uses.
//!
//! They cut exactly as the regex engine does, many times faster: one look at a character's class
//! (from a table, made of the same Unicode data that the engine has) decides how a piece goes on,
//! and nothing is ever tried twice. [`Scanner::of`] knows the patterns by their text; any other
//! pattern goes through the engine.
//!
//! Three families, named by where they come from:
//!
//! - **cl100k** (GPT-4, Qwen2.5, nanochat): a contraction; letters, with any one character before
//!   them that is no line break; up to k digits; other characters, with a blank before and line
//!   breaks after them; white space up to its last line break; white space but its last character
//!   (which goes with the next piece); white space.
//! - **gpt2**: contractions in lower case only; letters, digits or others, each with a blank
//!   before; white space.
//! - **o200k** (GPT-4o): as cl100k, with words cut where a small letter meets a capital, and the
//!   contraction at the end of its word.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

use crate::block::{BLOCK, beginnings};

/// What a character is. Two bits of kind for every pattern; the rest is for o200k only.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Class(u8);

impl Class {
    const OTHER: u8 = 0;
    const LETTER: u8 = 1; // \p{L}
    const NUMBER: u8 = 2; // \p{N}
    const SPACE: u8 = 3; // \s
    const KIND: u8 = 3;
    const BREAK: u8 = 4; // \r or \n
    const UPPER: u8 = 8; // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]: what an o200k word begins with
    const LOWER: u8 = 16; // [\p{Ll}\p{Lm}\p{Lo}\p{M}]: and what it ends with

    fn kind(self) -> u8 {
        self.0 & Self::KIND
    }

    fn is(self, flag: u8) -> bool {
        self.0 & flag != 0
    }
}

/// The class of every character: a megabyte, filled in a millisecond at first use.
fn classes() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![Class::OTHER; char::MAX as usize + 1];
        let flags = [
            (r"\p{L}", Class::LETTER),
            (r"\p{N}", Class::NUMBER),
            (r"\s", Class::SPACE),
            (r"[\r\n]", Class::BREAK),
            (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", Class::UPPER),
            (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", Class::LOWER),
        ];
        for (pattern, flag) in flags {
            // The engine's own parser, so that both know the same version of Unicode.
            let parsed = regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind);
            let Ok(HirKind::Class(HirClass::Unicode(class))) = parsed else { continue };
            for range in class.ranges() {
                for entry in &mut table[range.start() as usize..=range.end() as usize] {
                    *entry |= flag;
                }
            }
        }
        table
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Cl100k { digits: usize },
    Gpt2,
    O200k,
}

/// A scanner for one of the known patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanner {
    family: Family,
    /// White space at the very end of a text is one piece (`\s++$` in tiktoken's patterns).
    whole_tail: bool,
}

/// The known patterns. `{k}` stands for 1 to 3 digits.
pub(crate) const PATTERNS: [(&str, Scanner); 7] = [
    // nanochat
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,{k}}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        Scanner { family: Family::Cl100k { digits: 3 }, whole_tail: false },
    ),
    // cl100k, as first published and as tiktoken has it now
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,{k}}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner { family: Family::Cl100k { digits: 3 }, whole_tail: false },
    ),
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,{k}}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        Scanner { family: Family::Cl100k { digits: 3 }, whole_tail: true },
    ),
    // Qwen2, Qwen2.5
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner { family: Family::Cl100k { digits: 1 }, whole_tail: false },
    ),
    // GPT-2, as first published and as tiktoken has it now
    (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        Scanner { family: Family::Gpt2, whole_tail: false },
    ),
    (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        Scanner { family: Family::Gpt2, whole_tail: true },
    ),
    // o200k
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Scanner { family: Family::O200k, whole_tail: false },
    ),
];

impl Scanner {
    /// The scanner that cuts as `pattern` does, if it is a known one.
    pub fn of(pattern: &str) -> Option<Self> {
        for (known, scanner) in PATTERNS {
            if known == pattern {
                return Some(scanner);
            }
            for digits in 1..=3 {
                if known.contains("{k}") && known.replace("{k}", &digits.to_string()) == pattern {
                    return Some(Self { family: Family::Cl100k { digits }, ..scanner });
                }
            }
        }
        None
    }

    /// Calls `visit(start, end)` for each piece of `text`, from left to right. Together the pieces
    /// are the text. Stops at the first error.
    #[inline]
    pub fn each<E>(
        self,
        text: &str,
        visit: impl FnMut(usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let text = Text { text, classes: classes(), whole_tail: self.whole_tail };
        match self.family {
            Family::Cl100k { digits } => text.each_of_cl100k(digits, visit),
            Family::Gpt2 => text.each(|at| text.gpt2(at), visit),
            Family::O200k => text.each(|at| text.o200k(at), visit),
        }
    }
}

/// A text on its way through a scanner.
struct Text<'t> {
    text: &'t str,
    classes: &'static [u8],
    whole_tail: bool,
}

impl Text<'_> {
    /// `end(start)` is the end of the piece that begins at `start`.
    #[inline(always)]
    fn each<E>(
        &self,
        end: impl Fn(usize) -> usize,
        mut visit: impl FnMut(usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        while at < self.text.len() {
            let next = end(at);
            visit(at, next)?;
            at = next;
        }
        Ok(())
    }

    /// As [`Self::each`], for the cl100k family: by blocks, where the text is plain.
    #[inline(always)]
    fn each_of_cl100k<E>(
        &self,
        digits: usize,
        mut visit: impl FnMut(usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = self.text.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let start = at;
            let mut certain = 0; // bytes
            if let Some(block) = bytes[at..].first_chunk::<BLOCK>().filter(|b| b[0] < 0x80) {
                let mut begin;
                (begin, certain) = beginnings(block, digits);
                begin &= !1; // the first one is where we are
                while begin != 0 {
                    let next = start + begin.trailing_zeros() as usize;
                    visit(at, next)?;
                    at = next;
                    begin &= begin - 1;
                }
            }
            if certain == BLOCK && at > start {
                continue;
            }
            // Character by character until the doubtful byte is behind us
            while at <= start + certain && at < bytes.len() {
                let next = self.cl100k(at, digits);
                visit(at, next)?;
                at = next;
            }
        }
        Ok(())
    }

    /// The class of the character at byte `at` and where the next one begins; `None` at the end.
    #[inline(always)]
    fn look(&self, at: usize) -> Option<(Class, usize)> {
        let &byte = self.text.as_bytes().get(at)?;
        if byte < 0x80 {
            return Some((Class(self.classes[byte as usize]), at + 1));
        }
        self.look_wide(at)
    }

    #[inline(never)]
    fn look_wide(&self, at: usize) -> Option<(Class, usize)> {
        let c = self.text[at..].chars().next()?;
        Some((Class(self.classes[c as usize]), at + c.len_utf8()))
    }

    /// The end of the run of characters of this kind that begins at `at`.
    #[inline(always)]
    fn run(&self, mut at: usize, kind: u8) -> usize {
        while let Some((class, next)) = self.look(at) {
            if class.kind() != kind {
                break;
            }
            at = next;
        }
        at
    }

    fn cl100k(&self, start: usize, digits: usize) -> usize {
        let Some((class, next)) = self.look(start) else { return start };
        match class.kind() {
            Class::LETTER => self.run(next, Class::LETTER),
            Class::NUMBER => self.digits(next, digits),
            kind => {
                if let Some(end) = self.contraction(start, true) {
                    return end;
                }
                let after = self.look(next).map(|(class, _)| class.kind());
                if after == Some(Class::LETTER) && !class.is(Class::BREAK) {
                    return self.run(next, Class::LETTER);
                }
                self.others_or_space(start, kind, after, b"\r\n")
            }
        }
    }

    fn gpt2(&self, start: usize) -> usize {
        if let Some(end) = self.contraction(start, false) {
            return end;
        }
        let Some((class, next)) = self.look(start) else { return start };
        if class.kind() != Class::SPACE {
            return self.run(next, class.kind());
        }
        match self.look(next).map(|(class, _)| class.kind()) {
            Some(kind) if kind != Class::SPACE && self.text.as_bytes()[start] == b' ' => {
                self.run(next, kind)
            }
            _ => self.space(start, false),
        }
    }

    fn o200k(&self, start: usize) -> usize {
        let Some((class, next)) = self.look(start) else { return start };
        let kind = class.kind();
        // A character before the word may be anything but a letter, a number or a line break. It
        // is tried first; a mark can also be the beginning of the word itself.
        let prefixed = kind != Class::LETTER && kind != Class::NUMBER && !class.is(Class::BREAK);
        for find in [Self::word_ending_lower, Self::word_of_capitals] {
            let with = if prefixed { find(self, next) } else { None };
            if let Some(end) = with.or_else(|| find(self, start)) {
                return self.contraction(end, true).unwrap_or(end);
            }
        }
        if kind == Class::NUMBER {
            return self.digits(next, 3);
        }
        let after = self.look(next).map(|(class, _)| class.kind());
        self.others_or_space(start, kind, after, b"\r\n/")
    }

    /// `[UPPER]*[LOWER]+`: the end of its longest match at `at`, as a backtracking engine finds it.
    fn word_ending_lower(&self, at: usize) -> Option<usize> {
        let (mut end, mut last_both) = (at, None);
        while let Some((class, next)) = self.look(end) {
            if !class.is(Class::UPPER) {
                break;
            }
            if class.is(Class::LOWER) {
                last_both = Some(next); // giving back down to here leaves one character for LOWER
            }
            end = next;
        }
        let lower = self.flagged(end, Class::LOWER);
        if lower > end { Some(lower) } else { last_both }
    }

    /// `[UPPER]+[LOWER]*`, where the first did not match: there is no LOWER then.
    fn word_of_capitals(&self, at: usize) -> Option<usize> {
        let end = self.flagged(at, Class::UPPER);
        (end > at).then(|| self.flagged(end, Class::LOWER))
    }

    /// The end of the run of characters with this flag.
    fn flagged(&self, mut at: usize, flag: u8) -> usize {
        while let Some((class, next)) = self.look(at) {
            if !class.is(flag) {
                break;
            }
            at = next;
        }
        at
    }

    /// Up to `most` digits, the first of which ends at `at`.
    fn digits(&self, mut at: usize, most: usize) -> usize {
        for _ in 1..most {
            match self.look(at) {
                Some((class, next)) if class.kind() == Class::NUMBER => at = next,
                _ => break,
            }
        }
        at
    }

    /// A run of other characters, with a blank before and any of `closing` after it; or white space.
    /// The character at `start` is of this kind, the one after it of the kind `after`.
    fn others_or_space(&self, start: usize, kind: u8, after: Option<u8>, closing: &[u8]) -> usize {
        let blank = self.text.as_bytes()[start] == b' ' && after == Some(Class::OTHER);
        if kind != Class::OTHER && !blank {
            return self.space(start, true);
        }
        let end = self.run(start + usize::from(blank), Class::OTHER);
        end + self.count(end, closing)
    }

    /// How many of these bytes follow each other at `at`.
    fn count(&self, at: usize, bytes: &[u8]) -> usize {
        self.text.as_bytes()[at..].iter().take_while(|byte| bytes.contains(byte)).count()
    }

    /// The end of `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll` or `'d` at `at`.
    #[inline]
    fn contraction(&self, at: usize, any_case: bool) -> Option<usize> {
        let rest = &self.text.as_bytes()[at..];
        if rest.first() != Some(&b'\'') {
            return None;
        }
        // The long s is an s in another case, the only letter outside ASCII that folds to these.
        if any_case && rest[1..].starts_with("ſ".as_bytes()) {
            return Some(at + 1 + "ſ".len());
        }
        let fold = |i: usize| {
            let byte = *rest.get(i)?;
            Some(if any_case { byte.to_ascii_lowercase() } else { byte })
        };
        match (fold(1)?, fold(2)) {
            (b's' | b't' | b'm' | b'd', _) => Some(at + 2),
            (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 3),
            _ => None,
        }
    }

    /// The end of the piece of white space that begins at `start`. With `lines` it goes up to the
    /// last line break if there is one.
    fn space(&self, start: usize, lines: bool) -> usize {
        let (mut end, mut last, mut after_break) = (start, start, None);
        while let Some((class, next)) = self.look(end) {
            if class.kind() != Class::SPACE {
                break;
            }
            if class.is(Class::BREAK) {
                after_break = Some(next);
            }
            (last, end) = (end, next);
        }
        match after_break {
            _ if self.whole_tail && end == self.text.len() => end,
            Some(at) if lines => at,
            // The last character goes with the next piece, if it is not the only one.
            _ if end < self.text.len() && last > start => last,
            _ => end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    fn known() -> Vec<String> {
        let digits =
            |p: &str| (1..=3).map(|k| p.replace("{k}", &k.to_string())).collect::<Vec<_>>();
        let mut patterns: Vec<String> = PATTERNS.iter().flat_map(|(p, _)| digits(p)).collect();
        patterns.sort();
        patterns.dedup();
        patterns
    }

    fn pieces<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        let visit = |start, end| {
            pieces.push(&text[start..end]);
            Ok::<(), ()>(())
        };
        Scanner::of(pattern).unwrap().each(text, visit).unwrap();
        pieces
    }

    fn same(pattern: &str, regex: &Regex, text: &str) {
        let scanned = pieces(pattern, text);
        let matched: Vec<&str> = regex.find_iter(text).map(|m| m.unwrap().as_str()).collect();
        assert_eq!(scanned, matched, "{pattern} on {text:?}");
    }

    #[test]
    fn unknown_patterns_have_no_scanner() {
        assert_eq!(Scanner::of(r"\w+|\s+"), None);
        assert!(known().iter().all(|p| Scanner::of(p).is_some()));
    }

    #[test]
    fn by_hand() {
        let nanochat = known().into_iter().find(|p| p.contains(r"{1,2}|")).unwrap();
        let cut = |text| pieces(&nanochat, text);
        assert_eq!(
            cut("I'll pay 1234!\n\n  ok"),
            ["I", "'ll", " pay", " ", "12", "34", "!\n\n", " ", " ok"]
        );
        assert_eq!(cut(" \n \t x"), [" \n", " \t", " x"]);
        assert_eq!(cut(""), Vec::<&str>::new());
    }

    /// Every character alone and among letters, digits, blanks, quotes and line breaks.
    #[test]
    fn every_character() {
        for pattern in known() {
            let regex = Regex::new(&pattern).unwrap();
            let mut text = String::new();
            for c in '\0'..=char::MAX {
                for context in ["", "a", "1", " ", "'", "\n", "  ", "!"] {
                    text.push_str(context);
                    text.push(c);
                }
                if text.len() > 1 << 12 {
                    same(&pattern, &regex, &text);
                    text.clear();
                }
                if cfg!(debug_assertions) && !(c as u32).is_multiple_of(7) && c as u32 > 0x3000 {
                    text.clear(); // all of them where the code is optimised
                }
            }
            same(&pattern, &regex, &text);
        }
    }

    /// Random texts of up to `longest` parts, some of all kinds, some of a few: else none would go
    /// on for long without what is hard.
    fn random_texts(parts: &[&str], longest: u64, rounds: u64, seed: u64) {
        let mut random = crate::random(seed);
        for pattern in known() {
            let regex = Regex::new(&pattern).unwrap();
            for _ in 0..rounds {
                let (kinds, first) = (1 + random(parts.len() as u64), random(parts.len() as u64));
                let text: String = (0..random(longest))
                    .map(|_| parts[(first + random(kinds)) as usize % parts.len()])
                    .collect();
                same(&pattern, &regex, &text);
            }
        }
    }

    /// Characters that the patterns treat differently.
    fn characters() -> Vec<&'static str> {
        let all =
            "aZsStTdDmMlLvVrReE  \t\n\n\r/!.-19٣½é漢ǅʰ\u{301}\u{308}\u{a0}\u{2028}ſK🙂İ\u{200d}";
        all.split("").filter(|c| !c.is_empty()).collect()
    }

    /// So plain that most of a text goes through blocks.
    fn words() -> Vec<&'static str> {
        let all = "a|b|Z|word|  |\n|\r\n|\n\n|\t| |. |, |.|-|!?|'|'s|'ll|1|23|4567|é|漢|\u{a0}| \n";
        all.split('|').chain([" "; 8]).chain([" the"; 4]).collect()
    }

    #[test]
    fn random_short_texts() {
        random_texts(&characters(), 24, if cfg!(debug_assertions) { 1_500 } else { 20_000 }, 11);
    }

    #[test]
    fn random_plain_texts() {
        random_texts(&words(), 150, if cfg!(debug_assertions) { 150 } else { 2_000 }, 12);
    }

    #[test]
    #[ignore = "runs for two minutes, each time with other texts"]
    fn fuzz() {
        let start = std::time::SystemTime::now();
        let seed = start.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        for more in 0.. {
            random_texts(&characters(), 60, 500, seed + more);
            random_texts(&words(), 400, 100, seed + more);
            if start.elapsed().unwrap().as_secs() > 120 {
                println!("{} rounds from the seed {seed}", more + 1);
                break;
            }
        }
    }

    #[test]
    fn long_runs_take_linear_time() {
        for pattern in known() {
            for run in ["a", " ", "!", "\n", "1", "é", " \n", "'", "aA", "\u{301}"] {
                let text = run.repeat(1 << 20);
                let total: usize = pieces(&pattern, &text).into_iter().map(str::len).sum();
                assert_eq!(total, text.len());
            }
        }
    }
}
