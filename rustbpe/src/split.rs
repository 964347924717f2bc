//! Cutting text into pieces with a pattern.
//!
//! A piece is one match of the pattern; text that no match covers is dropped, as tiktoken does.
//! Which pattern is the caller's choice: the well-known ones go through a [`Scanner`], any other
//! through a regex engine, with the same result.
//!
//! The engine backtracks, and gives up after a million steps or a million remembered places in
//! one match. That ends a hopeless pattern at once; with a good one it takes a run of a million
//! blanks to get there, and tiktoken, which has the same engine, fails on the same texts.

use fancy_regex::Regex;

use crate::scan::Scanner;
use crate::{Error, Result};

/// Bytes of a long text that one thread takes at a time.
const SEGMENT: usize = 1 << 18;

/// Pieces that [`Splitter::batches`] hands over at a time.
pub const BATCH: usize = 256;

/// A split pattern, ready to use.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    method: Method,
}

#[derive(Debug, Clone)]
enum Method {
    Scanner(Scanner),
    Engine(Box<Regex>),
}

impl Splitter {
    /// Compiles `pattern` (Rust `regex` syntax with lookaround and possessive quantifiers).
    pub fn new(pattern: &str) -> Result<Self> {
        let method = match Scanner::of(pattern) {
            Some(scanner) => Method::Scanner(scanner),
            None => Method::Engine(Box::new(compile(pattern)?)),
        };
        Ok(Self { pattern: pattern.to_owned(), method })
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// The same pattern compiled anew. A clone shares its scratch memory with the original and
    /// threads would contend for it; a thread that splits a lot takes its own.
    pub fn recompile(&self) -> Result<Self> {
        Self::new(&self.pattern)
    }

    /// Calls `visit(start, end)` for each non-empty piece of `text`, from left to right. Stops at
    /// the first error.
    #[inline]
    pub fn each(
        &self,
        text: &str,
        mut visit: impl FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        let regex = match &self.method {
            Method::Scanner(scanner) => return scanner.each(text, visit),
            Method::Engine(regex) => regex,
        };
        let mut offset = 0; // the end of the last match, for the error
        for found in regex.find_iter(text) {
            let found = found.map_err(|e| Error::Split { offset, reason: e.to_string() })?;
            offset = found.end();
            if found.start() < offset {
                visit(found.start(), offset)?;
            }
        }
        Ok(())
    }

    /// `text` in segments of about SEGMENT bytes that can be split by themselves, with the same
    /// pieces. A pattern without a scanner has to see all of it.
    pub fn segments<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let (mut segments, mut rest) = (Vec::new(), text);
        while let (Method::Scanner(_), Some(most)) = (&self.method, rest.len().checked_sub(SEGMENT))
        {
            // With every known pattern a piece begins at a blank between two ASCII letters.
            let between = |i: usize| match &rest.as_bytes()[i..i + 3] {
                [a, b' ', b] => a.is_ascii_alphabetic() && b.is_ascii_alphabetic(),
                _ => false,
            };
            let end = (SEGMENT..SEGMENT + most.saturating_sub(3)).find(|&i| between(i));
            let Some(end) = end else { break };
            let (segment, after) = rest.split_at(end + 1);
            segments.push(segment);
            rest = after;
        }
        segments.push(rest);
        segments
    }

    /// As [`Self::each`], with many pieces at a time.
    #[inline]
    pub fn batches(
        &self,
        text: &str,
        mut visit: impl FnMut(&[(usize, usize)]) -> Result<()>,
    ) -> Result<()> {
        let (mut pieces, mut n) = ([(0, 0); BATCH], 0);
        self.each(text, |start, end| {
            pieces[n] = (start, end);
            n += 1;
            if n == BATCH {
                n = 0;
                return visit(&pieces);
            }
            Ok(())
        })?;
        visit(&pieces[..n])
    }

    /// The non-empty pieces of `text`, from left to right.
    pub fn pieces<'t>(&self, text: &'t str) -> Result<Vec<&'t str>> {
        let mut pieces = Vec::new();
        self.each(text, |start, end| {
            pieces.push(&text[start..end]);
            Ok(())
        })?;
        Ok(pieces)
    }
}

fn compile(pattern: &str) -> Result<Regex> {
    let error = |reason: String| Error::Pattern { pattern: pattern.to_owned(), reason };
    if pattern.is_empty() {
        return Err(error("it is empty and would match nothing".to_owned()));
    }
    Regex::new(pattern).map_err(|e| error(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'t>(pattern: &str, text: &'t str) -> Result<Vec<&'t str>> {
        Splitter::new(pattern).unwrap().pieces(text)
    }

    #[test]
    fn possessive_quantifiers_and_lookahead() {
        // The last blank before a word goes with the word; a possessive + gives nothing back.
        let pieces = split(r" ?\w++|\s+(?!\S)|\s+", "two   words  ").unwrap();
        assert_eq!(pieces, ["two", "  ", " words", "  "]);
        assert_eq!(split(r"a++a|b", "aaab").unwrap(), ["b"]);
    }

    #[test]
    fn unmatched_text_and_empty_matches_are_dropped() {
        assert_eq!(split(r"[a-z]+", "ab 12 é cd").unwrap(), ["ab", "cd"]);
        assert_eq!(split(r"x*", "axxb").unwrap(), ["xx"]);
        assert_eq!(split(r"\w+", "").unwrap(), Vec::<&str>::new());
    }

    #[test]
    fn characters_are_never_cut() {
        assert_eq!(split(r".", "é漢🙂").unwrap(), ["é", "漢", "🙂"]);
    }

    #[test]
    fn invalid_patterns_are_named() {
        for pattern in ["(", "", r"\p{Nonsense}"] {
            let error = Splitter::new(pattern).unwrap_err().to_string();
            assert!(error.contains(&format!("{pattern:?}")), "{error}");
        }
    }

    #[test]
    fn a_hopeless_pattern_ends_with_the_place() {
        let text = format!("b{}", "a".repeat(60));
        let error = split(r"(a|aa)+(?=c)\b|b", &text).unwrap_err();
        assert!(matches!(error, Error::Split { offset: 1, .. }), "{error}");
    }
}
