//! How long each stage takes on a text, in one process and on some threads.
//!
//!     cargo bench --bench stages -- corpus.txt [threads] [vocab_size] [count]
//!
//! Documents in the file are separated by the byte 0x1E (record separator); without any, the file
//! is one document. For work on the crate: the numbers beside other libraries come from
//! `bench/bpe_training.py` and `bench/bpe_encoding.py`.

use std::time::Instant;

use _rustbpe::batch::{Caches, encode_batch};
use _rustbpe::count::Counter;
use _rustbpe::encode::Vocabulary;
use _rustbpe::parallel::available_threads;
use _rustbpe::split::Splitter;
use _rustbpe::train::train;

const NANOCHAT: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Seconds that this thread has computed, where Linux tells: other work on the machine does not
/// count. With one thread that is all of it.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split(' ').next().and_then(|field| field.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(path) = args.next() else {
        println!("usage: cargo bench --bench stages -- corpus.txt [threads] [vocab_size] [count]");
        return Ok(());
    };
    let threads = args.next().map_or(Ok(available_threads()), |n| n.parse())?;
    let vocab_size = args.next().map_or(Ok(65_527), |n| n.parse())?;
    let corpus = std::fs::read_to_string(path)?;
    let texts: Vec<&str> = corpus.split('\u{1e}').collect();
    let mb = corpus.len() as f64 / 1e6;
    let say = |stage: &str, (start, cpu_start): (Instant, f64)| {
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu_start);
        println!("{stage:24} {seconds:8.3} s {:9.1} MB/s {cpu:8.3} s of CPU", mb / seconds);
    };
    let splitter = Splitter::new(NANOCHAT)?;

    let start = (Instant::now(), cpu_seconds());
    let mut pieces = 0;
    for text in &texts {
        splitter.each(text, |start, end| {
            pieces += usize::from(end > start);
            Ok(())
        })?;
    }
    say("split, 1 thread", start);

    let start = (Instant::now(), cpu_seconds());
    let mut counter = Counter::new(&splitter, threads)?;
    counter.add(&texts, &mut || true)?;
    say("count", start);
    let counts = counter.finish();
    say("count and add up", start);
    println!("{:24} {pieces:12} pieces, {} distinct", "", counts.len());

    let last = args.next().unwrap_or_default();
    if last == "count" {
        return Ok(());
    }
    let start = (Instant::now(), cpu_seconds());
    let merges = train(&counts, vocab_size, &mut |_| true)?;
    say("merge", start);

    if last == "merge" {
        return Ok(());
    }
    let tokens = Vocabulary::new(&merges).ok_or("the merges are out of order")?.tokens().to_vec();
    let ranks = tokens.into_iter().map(Vec::from).zip(0..).collect();
    let start = (Instant::now(), cpu_seconds());
    let vocabulary = Vocabulary::from_ranks(ranks)?;
    say("make a vocabulary", start);
    let caches = Caches::default();
    for round in ["first", "second"] {
        let start = (Instant::now(), cpu_seconds());
        let none = None::<u16>;
        let encoded =
            encode_batch(&vocabulary, Some(&splitter), &texts, none, &caches, &mut || true)?;
        say(&format!("encode, {round} time"), start);
        println!("{:24} {:12} ids", "", encoded.len());
    }
    Ok(())
}
