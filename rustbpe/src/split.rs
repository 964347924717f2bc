//! Cutting text into pieces with a pattern.
//!
//! A piece is one match of the pattern; text that no match covers is dropped, as tiktoken does.
//! Which pattern is the caller's choice: the well-known ones go through a [`Scanner`], any other
//! through a regex engine, with the same result.
//!
//! The engine backtracks, and gives up after a million steps or a million remembered places in
//! one match. That ends a hopeless pattern at once; with a good one it takes a run of a million
//! blanks to get there, and tiktoken, which has the same engine, fails on the same texts.

use fancy_regex::{Matches, Regex};

use crate::scan::{self, Scanner};
use crate::{Error, Result};

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

    /// The non-empty pieces of `text`, from left to right.
    pub fn pieces<'s, 't>(&'s self, text: &'t str) -> Pieces<'s, 't> {
        match &self.method {
            Method::Scanner(scanner) => Pieces::Scanned(scanner.pieces(text)),
            // The offset is the end of the last piece, for the error message
            Method::Engine(regex) => Pieces::Matched { found: regex.find_iter(text), offset: 0 },
        }
    }
}

fn compile(pattern: &str) -> Result<Regex> {
    let error = |reason: String| Error::Pattern { pattern: pattern.to_owned(), reason };
    if pattern.is_empty() {
        return Err(error("it is empty and would match nothing".to_owned()));
    }
    Regex::new(pattern).map_err(|e| error(e.to_string()))
}

/// Iterator over the pieces of a text.
pub enum Pieces<'s, 't> {
    Scanned(scan::Pieces<'t>),
    Matched { found: Matches<'s, 't, str>, offset: usize },
}

impl<'t> Iterator for Pieces<'_, 't> {
    type Item = Result<&'t str>;

    #[inline]
    fn next(&mut self) -> Option<Result<&'t str>> {
        match self {
            Self::Scanned(pieces) => pieces.next().map(Ok),
            Self::Matched { found, offset } => loop {
                match found.next()? {
                    Ok(m) if m.as_str().is_empty() => *offset = m.end(),
                    Ok(m) => {
                        *offset = m.end();
                        return Some(Ok(m.as_str()));
                    }
                    Err(e) => {
                        return Some(Err(Error::Split { offset: *offset, reason: e.to_string() }));
                    }
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'t>(pattern: &str, text: &'t str) -> Result<Vec<&'t str>> {
        Splitter::new(pattern).unwrap().pieces(text).collect()
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
