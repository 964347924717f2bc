//! The Python class: arguments in, exceptions out, and the interpreter released in between.
//!
//! The signatures and full descriptions for Python's users are in `python/rustbpe/_rustbpe.pyi`.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict, PyIterator, PyList, PyString};

use crate::count::Counter;
use crate::encode::{Encoded, Vocabulary};
use crate::parallel;
use crate::split::Splitter;
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

/// The UTF-8 bytes of the str `object`, which `name()` describes to the user. They stay in the
/// Python object, which is kept alive: nothing is copied.
fn text(object: Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<PyBackedStr> {
    let py = object.py();
    let string = match object.cast_into::<PyString>() {
        Ok(string) => string,
        Err(e) => {
            let found = e.into_inner().get_type().fully_qualified_name()?;
            return Err(PyTypeError::new_err(format!("{} must be str, not {found}", name())));
        }
    };
    PyBackedStr::try_from(string).map_err(|e| {
        // Half a surrogate pair: such a str has no UTF-8.
        let error = PyValueError::new_err(format!("{} is not valid text: {}", name(), e.value(py)));
        error.set_cause(py, Some(e));
        error
    })
}

/// As [`text`], but halves of surrogate pairs that stand alone become U+FFFD, as in tiktoken.
fn repaired(object: Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<PyBackedStr> {
    match text(object.clone(), name) {
        Err(e) if e.is_instance_of::<PyValueError>(object.py()) => {
            let pairs = object.call_method1("encode", ("utf-16", "surrogatepass"))?;
            let whole = pairs.call_method1("decode", ("utf-16", "replace"))?;
            Ok(PyBackedStr::try_from(whole.cast_into::<PyString>()?)?)
        }
        other => other,
    }
}

/// As [`text`], for one of many.
fn item(object: Bound<'_, PyAny>, texts: &str, index: usize) -> PyResult<PyBackedStr> {
    text(object, || format!("item {index} of {texts}"))
}

/// Many texts, held where Python has them.
enum Texts {
    Strings(Vec<PyBackedStr>),
    Arrow { data: PyBackedBytes, offsets: Vec<usize> },
}

impl Texts {
    /// The texts of an Arrow string array, without a Python object for each. `name` is what
    /// the user calls the array; `first` is the index of its first text.
    fn from_arrow(array: &Bound<'_, PyAny>, name: &str, first: usize) -> PyResult<Self> {
        let py = array.py();
        let kind = array.getattr("type")?.str()?.to_string();
        let width = match &kind[..] {
            "string" => 4,
            "large_string" => 8,
            _ => {
                let message = format!("{name} must hold strings, found an Arrow array of {kind}");
                return Err(PyTypeError::new_err(message));
            }
        };
        if array.getattr("null_count")?.extract::<usize>()? > 0 {
            let nulls = array.call_method0("is_null")?;
            let at: usize =
                nulls.call_method1("index", (true,))?.call_method0("as_py")?.extract()?;
            return Err(PyTypeError::new_err(format!("item {} of {name} is null", first + at)));
        }
        let buffers = array.call_method0("buffers")?;
        // An array may be a part of its buffers; only that part is copied.
        let copy = |i: usize, from: usize, to: usize| -> PyResult<PyBackedBytes> {
            let buffer = buffers.get_item(i)?;
            if buffer.is_none() || from == to {
                return Ok(PyBytes::new(py, b"").into()); // an empty array need not have any
            }
            let part = buffer.call_method1("slice", (from, to - from))?;
            Ok(part.call_method0("to_pybytes")?.cast_into::<PyBytes>()?.into())
        };
        let (start, n): (usize, usize) = (array.getattr("offset")?.extract()?, array.len()?);
        let offsets = copy(1, start * width, if n == 0 { start } else { start + n + 1 } * width)?;
        let number = |bytes: &[u8]| match width {
            4 => bytes.try_into().map_or(0, |b| u64::from(u32::from_le_bytes(b))),
            _ => bytes.try_into().map_or(0, u64::from_le_bytes),
        };
        let offsets: Vec<usize> =
            offsets.chunks_exact(width).map(|bytes| number(bytes) as usize).collect();
        let (first, end) = (offsets.first().copied(), offsets.last().copied());
        let (first, end) = (first.unwrap_or(0), end.unwrap_or(0));
        let data = copy(2, first, end)?;
        let offsets = offsets.into_iter().map(|offset| offset.saturating_sub(first)).collect();
        Ok(Self::Arrow { data, offsets })
    }

    /// An Arrow array, or an iterable of str, each taken by `take(object, index)`.
    fn from_iterable<'py>(
        texts: &Bound<'py, PyAny>,
        name: &str,
        take: impl Fn(Bound<'py, PyAny>, usize) -> PyResult<PyBackedStr>,
    ) -> PyResult<Self> {
        if is_arrow(texts)? {
            return Self::from_arrow(&whole(texts)?, name, 0);
        }
        let items = iterate(texts, name)?.enumerate();
        let strings = items.map(|(i, object)| take(object?, i)).collect::<PyResult<_>>()?;
        Ok(Self::Strings(strings))
    }

    /// The texts as slices. An Arrow array is checked to be UTF-8 within its bounds.
    fn slices(&self, name: &str, first: usize) -> PyResult<Vec<&str>> {
        match self {
            Self::Strings(strings) => Ok(strings.iter().map(|s| &**s).collect()),
            Self::Arrow { data, offsets } => offsets
                .windows(2)
                .enumerate()
                .map(|(i, bounds)| {
                    let bytes = data.get(bounds[0]..bounds[1]);
                    bytes.and_then(|bytes| std::str::from_utf8(bytes).ok()).ok_or_else(|| {
                        PyValueError::new_err(format!(
                            "item {} of {name} is not valid text: its bytes are no UTF-8",
                            first + i
                        ))
                    })
                })
                .collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Strings(strings) => strings.len(),
            Self::Arrow { offsets, .. } => offsets.len().saturating_sub(1),
        }
    }
}

/// True for an Arrow array, chunked or not.
fn is_arrow(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(object.hasattr("__arrow_c_array__")? || object.hasattr("__arrow_c_stream__")?)
}

/// The Arrow array in one piece.
fn whole<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    if array.hasattr("combine_chunks")? {
        array.call_method0("combine_chunks")
    } else {
        Ok(array.clone())
    }
}

/// Iterates over `texts`, which must not be one str: its letters would be the items.
fn iterate<'py>(texts: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyIterator>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!(
            "{name} must be an iterable of str, not one str; put it into a list"
        )));
    }
    texts.try_iter()
}

/// A trained model, never changed: training again makes another.
struct Model {
    splitter: Option<Splitter>, // None before training
    vocabulary: Vocabulary,
}

impl Model {
    fn encode(&self, py: Python<'_>, texts: &[&str], prepend: &[u32]) -> PyResult<Encoded> {
        let mut signals = Signals::new();
        let splitter = self.splitter.as_ref();
        let result = py.detach(|| {
            self.vocabulary.encode_batch(splitter, texts, prepend, &mut || signals.go_on())
        });
        result.map_err(|e| signals.exception(e))
    }

    /// The ids of one text.
    fn encode_one(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(self.encode(py, &[text], &[])?.ids().to_vec())
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
        let vocabulary = Vocabulary::default();
        Self { model: RwLock::new(Arc::new(Model { splitter: None, vocabulary })) }
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
            .filter(|&size| size >= FIRST_MERGE_ID)
            .ok_or_else(|| {
                PyValueError::new_err(format!(
                    "vocab_size must be from 256 (the bytes) to {}, got {vocab_size}",
                    u32::MAX
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
            let merges = train(counter.finish().into_pieces(), vocab_size, &mut |done| {
                signals.go_on()
                    && (!progress.is_due()
                        || signals.python(|py| progress.report(py, "merge", done, wanted)))
            })?;
            Ok((Vocabulary::new(&merges).unwrap_or_default(), merges.len()))
        });
        let (vocabulary, learned) = result.map_err(|e| signals.exception(e))?;
        progress.report(py, "merge", learned, wanted)?;
        let model = Arc::new(Model { splitter: Some(splitter), vocabulary });
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
        let (py, text) = (text.py(), self::text(text, || "text".to_owned())?);
        self.model().encode_one(py, &text)
    }

    /// The token ids of every text, in order, computed on all cores.
    fn batch_encode(&self, py: Python<'_>, texts: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u32>>> {
        let texts = Texts::from_iterable(texts, "texts", |text, i| item(text, "texts", i))?;
        let encoded = self.model().encode(py, &texts.slices("texts", 0)?, &[])?;
        Ok(encoded.rows().map(<[u32]>::to_vec).collect())
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
        Ok(Self { model: Model { splitter, vocabulary } })
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
        let prepend: Vec<u32> = prepend.into_iter().collect();
        let encoded = self.model.encode(py, &texts.slices("texts", 0)?, &prepend)?;
        let largest = prepend.iter().copied().max().unwrap_or(0).max(self.vocab_size() as u32 - 1);
        let ids = encoded.ids();
        let (kind, bytes) = if largest <= u32::from(u16::MAX) {
            let bytes = PyBytes::new_with(py, ids.len() * 2, |out| {
                for (place, id) in out.chunks_exact_mut(2).zip(ids) {
                    place.copy_from_slice(&(*id as u16).to_le_bytes());
                }
                Ok(())
            })?;
            ("<u2", bytes)
        } else {
            let bytes = PyBytes::new_with(py, ids.len() * 4, |out| {
                for (place, id) in out.chunks_exact_mut(4).zip(ids) {
                    place.copy_from_slice(&id.to_le_bytes());
                }
                Ok(())
            })?;
            ("<u4", bytes)
        };
        let offsets = PyBytes::new_with(py, (texts.len() + 1) * 8, |out| {
            let mut end = 0u64;
            let lengths = std::iter::once(0).chain(encoded.rows().map(<[u32]>::len));
            for (place, length) in out.chunks_exact_mut(8).zip(lengths) {
                end += length as u64;
                place.copy_from_slice(&end.to_le_bytes());
            }
            Ok(())
        })?;
        let array = py.import("numpy")?.getattr("frombuffer")?;
        Ok((array.call1((bytes, kind))?, array.call1((offsets, "<i8"))?))
    }
}

#[pymodule]
fn _rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()?;
    module.add_class::<Encoder>()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
