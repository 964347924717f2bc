//! The Python class: arguments in, exceptions out, and the interpreter released in between.
//!
//! The signatures and full descriptions for Python's users are in `python/rustbpe/_rustbpe.pyi`.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};

use crate::batch::{Caches, Encoded, Id, encode_batch};
use crate::count::Counter;
use crate::encode::Vocabulary;
use crate::pairs::MAX_TOKENS;
use crate::parallel;
use crate::split::Splitter;
use crate::texts::{self, Texts, is_arrow, item, iterate, repaired, whole};
use crate::train::train;
use crate::{Error, FIRST_MERGE_ID};

/// Used when `pattern` is not given: GPT-4's, the default of rustbpe 0.1.0.
const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Time between two looks for Ctrl-C while the interpreter is released.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(200);

/// Items taken from an iterator between two looks for Ctrl-C.
const ITEMS_A_CHECK: usize = 1024;

/// Time between two reports of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Takes the interpreter back for a moment now and then, to let Python handle signals.
struct Signals {
    last: Instant,
    raised: Option<PyErr>,
}

impl Signals {
    fn new() -> Self {
        Self { last: Instant::now(), raised: None }
    }

    /// `false` when a signal handler raised, or Python is shutting down.
    fn go_on(&mut self) -> bool {
        if self.last.elapsed() < SIGNAL_INTERVAL {
            return true;
        }
        self.last = Instant::now();
        self.python(|py| py.check_signals())
    }

    /// Runs something in the interpreter; `false` when it raised, or Python is shutting down.
    fn python(&mut self, run: impl FnOnce(Python<'_>) -> PyResult<()>) -> bool {
        match Python::try_attach(run) {
            Some(Ok(())) => true,
            Some(Err(e)) => {
                self.raised = Some(e);
                false
            }
            None => false,
        }
    }

    /// The core's error as an exception; an interrupt is what the signal handler raised.
    fn exception(self, error: Error) -> PyErr {
        match (error, self.raised) {
            (Error::Interrupted, Some(raised)) => raised,
            (Error::Interrupted, None) => PyKeyboardInterrupt::new_err(()),
            (error, _) => PyValueError::new_err(error.to_string()),
        }
    }
}

/// The user's `progress(phase, done, total)`, called about once a second.
struct Progress {
    callback: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    fn is_due(&self) -> bool {
        self.callback.is_some() && self.last.elapsed() >= PROGRESS_INTERVAL
    }

    /// Calls it. Raises what it raises.
    fn report(&mut self, py: Python<'_>, phase: &str, done: usize, total: usize) -> PyResult<()> {
        self.last = Instant::now();
        match &self.callback {
            Some(callback) => callback.call1(py, (phase, done, total)).map(drop),
            None => Ok(()),
        }
    }
}

/// A trained model, never changed: training again makes another.
struct Model {
    splitter: Option<Splitter>, // None before training
    vocabulary: Vocabulary,
    caches: Caches,
}

impl Model {
    fn new(splitter: Option<Splitter>, vocabulary: Vocabulary) -> Self {
        Self { splitter, vocabulary, caches: Caches::default() }
    }

    fn encode<T: Id>(
        &self,
        py: Python<'_>,
        texts: &[&str],
        prepend: Option<T>,
    ) -> PyResult<Encoded<T>> {
        let Self { splitter, vocabulary, caches } = self;
        let mut signals = Signals::new();
        let result = py.detach(|| {
            let check = &mut || signals.go_on();
            encode_batch(vocabulary, splitter.as_ref(), texts, prepend, caches, check)
        });
        result.map_err(|e| signals.exception(e))
    }

    /// The ids of one text.
    fn encode_one(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(self.encode(py, &[text], None)?.parts().flatten().copied().collect())
    }

    /// (ids, offsets) of many texts as NumPy arrays, the ids of the NumPy type `kind`.
    fn encode_arrays<'py, T: Id>(
        &self,
        py: Python<'py>,
        texts: &[&str],
        prepend: Option<u32>,
        kind: &str,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let encoded: Encoded<T> = self.encode(py, texts, prepend.map(T::of))?;
        let width = size_of::<T>();
        let ids = PyBytes::new_with(py, encoded.len() * width, |mut out| {
            for part in encoded.parts() {
                let (place, rest) = out.split_at_mut(size_of_val(part));
                T::write(part, place);
                out = rest;
            }
            Ok(())
        })?;
        let offsets = PyBytes::new_with(py, (texts.len() + 1) * 8, |out| {
            let ends = std::iter::once(&0).chain(encoded.ends());
            for (place, &end) in out.chunks_exact_mut(8).zip(ends) {
                place.copy_from_slice(&(end as u64).to_le_bytes());
            }
            Ok(())
        })?;
        let array = py.import("numpy")?.getattr("frombuffer")?;
        Ok((array.call1((ids, kind))?, array.call1((offsets, "<i8"))?))
    }
}

/// A byte-level BPE tokenizer that can be trained.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    // Held for the length of a pointer copy only, so threads may share a tokenizer freely, and
    // a training that fails leaves the old model in place.
    model: RwLock<Arc<Model>>,
}

impl Tokenizer {
    fn model(&self) -> Arc<Model> {
        Arc::clone(&self.model.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Self { model: RwLock::new(Arc::new(Model::new(None, Vocabulary::default()))) }
    }

    /// Learns up to vocab_size - 256 merges from the strings of an iterator.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let vocab_size = u32::try_from(vocab_size)
            .ok()
            .filter(|&size| size >= FIRST_MERGE_ID && size as usize <= MAX_TOKENS)
            .ok_or_else(|| {
                PyValueError::new_err(format!(
                    "vocab_size must be from 256 (the bytes) to {MAX_TOKENS}, got {vocab_size}"
                ))
            })?;
        if buffer_size < 1 {
            return Err(PyValueError::new_err(format!(
                "buffer_size must be at least 1 (strings counted at a time), got {buffer_size}"
            )));
        }
        let mut signals = Signals::new();
        let mut progress = Progress { callback: progress, last: Instant::now() };
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
        let mut counter = Counter::new(&splitter, parallel::available_threads())
            .map_err(|e| PyValueError::new_err(e.to_string()))?;

        const NAME: &str = "iterator";
        let mut seen = 0; // texts so far
        let mut bytes = 0; // of these
        let mut buffer = Vec::new();
        let mut count = |texts: Texts, seen: &mut usize| -> PyResult<()> {
            let slices = texts.slices(NAME, *seen)?;
            *seen += slices.len();
            bytes += slices.iter().map(|text| text.len()).sum::<usize>();
            py.detach(|| counter.add(&slices, &mut || signals.go_on()))
                .map_err(|e| std::mem::replace(&mut signals, Signals::new()).exception(e))?;
            if progress.is_due() { progress.report(py, "count", bytes, 0) } else { Ok(()) }
        };
        for object in iterate(iterator, NAME)? {
            let object = object?;
            if !object.is_instance_of::<PyString>() && is_arrow(&object)? {
                count(Texts::Strings(std::mem::take(&mut buffer)), &mut seen)?;
                count(Texts::from_arrow(&whole(&object)?, NAME, seen)?, &mut seen)?;
                continue;
            }
            let index = seen + buffer.len();
            buffer.push(item(object, NAME, index)?);
            if index % ITEMS_A_CHECK == 0 {
                py.check_signals()?;
            }
            if buffer.len() >= buffer_size as usize {
                count(Texts::Strings(std::mem::take(&mut buffer)), &mut seen)?;
            }
        }
        count(Texts::Strings(buffer), &mut seen)?;
        progress.report(py, "count", bytes, 0)?;
        let wanted = (vocab_size - FIRST_MERGE_ID) as usize;
        let result = py.detach(|| {
            let merges = train(&counter.finish(), vocab_size, &mut |done| {
                signals.go_on()
                    && (!progress.is_due()
                        || signals.python(|py| progress.report(py, "merge", done, wanted)))
            })?;
            Ok((Vocabulary::new(&merges).unwrap_or_default(), merges.len()))
        });
        let (vocabulary, learned) = result.map_err(|e| signals.exception(e))?;
        progress.report(py, "merge", learned, wanted)?;
        let model = Arc::new(Model::new(Some(splitter), vocabulary));
        *self.model.write().unwrap_or_else(PoisonError::into_inner) = model;
        Ok(())
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        let model = self.model();
        model.splitter.as_ref().map_or_else(String::new, |s| s.pattern().to_owned())
    }

    /// 256 plus the number of merges.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().vocabulary.tokens().len()
    }

    /// Every token as (bytes, id), by id: as a dict, what tiktoken.Encoding wants.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let model = self.model();
        let tokens = model.vocabulary.tokens().iter();
        PyList::new(py, tokens.enumerate().map(|(id, token)| (PyBytes::new(py, token), id)))
    }

    /// The token ids of a text.
    fn encode(&self, text: Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let (py, text) = (text.py(), texts::text(text, || "text".to_owned())?);
        self.model().encode_one(py, &text)
    }

    /// The token ids of every text, in order, computed on all cores.
    fn batch_encode(&self, py: Python<'_>, texts: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u32>>> {
        let texts = Texts::from_iterable(texts, "texts", |text, i| item(text, "texts", i))?;
        Ok(self.model().encode(py, &texts.slices("texts", 0)?, None)?.rows())
    }

    /// The text of token ids; UnicodeDecodeError where they cut a character in half.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyAny>> {
        let bytes = self.model().vocabulary.decode(&ids);
        let bytes = bytes.map_err(|e| PyValueError::new_err(e.to_string()))?;
        // Python's own decoder, for its UnicodeDecodeError, which names the position.
        PyBytes::new(py, &bytes).call_method1("decode", ("utf-8",))
    }
}

/// A fixed vocabulary that encodes as tiktoken does, in batches and on all cores.
#[pyclass(frozen, module = "rustbpe")]
struct Encoder {
    model: Model,
}

#[pymethods]
impl Encoder {
    /// Takes what tiktoken.Encoding takes: every token's bytes with its rank, and the pattern.
    #[new]
    fn new(mergeable_ranks: &Bound<'_, PyDict>, pattern: &str) -> PyResult<Self> {
        let error = |e: Error| PyValueError::new_err(e.to_string());
        let splitter = Some(Splitter::new(pattern).map_err(error)?);
        let mut ranks = Vec::with_capacity(mergeable_ranks.len());
        for (token, rank) in mergeable_ranks {
            let token = token.cast::<PyBytes>().map_err(|_| {
                PyTypeError::new_err(format!("mergeable_ranks: the key {token:?} is not bytes"))
            })?;
            let rank = rank.extract().map_err(|_| {
                PyTypeError::new_err(format!("mergeable_ranks[{token:?}] is {rank:?}, not a rank"))
            })?;
            ranks.push((token.as_bytes().to_vec(), rank));
        }
        let vocabulary = Vocabulary::from_ranks(ranks).map_err(error)?;
        Ok(Self { model: Model::new(splitter, vocabulary) })
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model.vocabulary.tokens().len()
    }

    /// The token ids of a text.
    fn encode(&self, text: Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        let (py, text) = (text.py(), repaired(text, || "text".to_owned())?);
        self.model.encode_one(py, &text)
    }

    /// (ids, offsets) of many texts, as NumPy arrays: text i is ids[offsets[i]:offsets[i + 1]].
    #[pyo3(signature = (texts, prepend=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        prepend: Option<u32>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let texts = Texts::from_iterable(texts, "texts", |text, i| {
            repaired(text, || format!("item {i} of texts"))
        })?;
        let texts = texts.slices("texts", 0)?;
        let largest = prepend.unwrap_or(0).max(self.vocab_size() as u32 - 1);
        if largest <= u32::from(u16::MAX) {
            self.model.encode_arrays::<u16>(py, &texts, prepend, "<u2")
        } else {
            self.model.encode_arrays::<u32>(py, &texts, prepend, "<u4")
        }
    }
}

#[pymodule]
fn _rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add_class::<Encoder>()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
