//! Texts where Python has them: strings, and Arrow arrays of strings, without a copy.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyIterator, PyString};

/// The bytes of a pyarrow.Buffer, which is kept alive.
pub struct Buffer {
    address: usize,
    size: usize,
    _owner: Py<PyAny>,
}

impl Buffer {
    fn new(buffer: Bound<'_, PyAny>) -> PyResult<Self> {
        if buffer.is_none() {
            return Ok(Self { address: 0, size: 0, _owner: buffer.unbind() });
        }
        if !buffer.getattr("is_cpu")?.extract::<bool>()? {
            return Err(PyTypeError::new_err("the Arrow array is not in the CPU's memory"));
        }
        let address = buffer.getattr("address")?.extract()?;
        let size = buffer.getattr("size")?.extract()?;
        Ok(Self { address, size, _owner: buffer.unbind() })
    }

    #[allow(unsafe_code)] // measured: without it every text is copied once, 40 ms per 100 MB
    fn bytes(&self) -> &[u8] {
        if self.size == 0 {
            return &[];
        }
        // SAFETY: pyarrow's own address and size of memory that the buffer owns and that lives as
        // long as `_owner`. Arrow arrays are immutable by their format; nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.size) }
    }
}

/// The UTF-8 bytes of the str `object`, which `name()` describes to the user. They stay in the
/// Python object, which is kept alive: nothing is copied.
pub fn text(object: Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<PyBackedStr> {
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
pub fn repaired(object: Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<PyBackedStr> {
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
pub fn item(object: Bound<'_, PyAny>, texts: &str, index: usize) -> PyResult<PyBackedStr> {
    text(object, || format!("item {index} of {texts}"))
}

/// Many texts, held where Python has them.
pub enum Texts {
    Strings(Vec<PyBackedStr>),
    Arrow { data: Buffer, offsets: Vec<usize> },
}

impl Texts {
    /// The texts of an Arrow string array, without a Python object for each. `name` is what
    /// the user calls the array; `first` is the index of its first text.
    pub fn from_arrow(array: &Bound<'_, PyAny>, name: &str, first: usize) -> PyResult<Self> {
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
        let buffer = |i: usize| Buffer::new(buffers.get_item(i)?);
        // An array may be a part of its buffers; an empty one need not have any.
        let (start, n): (usize, usize) = (array.getattr("offset")?.extract()?, array.len()?);
        if n == 0 {
            return Ok(Self::Strings(Vec::new()));
        }
        let number = |bytes: &[u8]| match width {
            4 => bytes.try_into().map_or(0, |b| u64::from(u32::from_le_bytes(b))) as usize,
            _ => bytes.try_into().map_or(0, u64::from_le_bytes) as usize,
        };
        let offsets = buffer(1)?;
        let offsets = offsets.bytes().get(start * width..(start + n + 1) * width);
        let offsets = offsets.unwrap_or_default().chunks_exact(width).map(number).collect();
        Ok(Self::Arrow { data: buffer(2)?, offsets })
    }

    /// An Arrow array, or an iterable of str, each taken by `take(object, index)`.
    pub fn from_iterable<'py>(
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
    pub fn slices(&self, name: &str, first: usize) -> PyResult<Vec<&str>> {
        match self {
            Self::Strings(strings) => Ok(strings.iter().map(|s| &**s).collect()),
            Self::Arrow { data, offsets } => offsets
                .windows(2)
                .enumerate()
                .map(|(i, bounds)| {
                    let bytes = data.bytes().get(bounds[0]..bounds[1]);
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
}

/// True for an Arrow array, chunked or not.
pub fn is_arrow(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(object.hasattr("__arrow_c_array__")? || object.hasattr("__arrow_c_stream__")?)
}

/// The Arrow array in one piece.
pub fn whole<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    if array.hasattr("combine_chunks")? {
        array.call_method0("combine_chunks")
    } else {
        Ok(array.clone())
    }
}

/// Iterates over `texts`, which must not be one str: its letters would be the items.
pub fn iterate<'py>(texts: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyIterator>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err(format!(
            "{name} must be an iterable of str, not one str; put it into a list"
        )));
    }
    texts.try_iter()
}
