//! A safetensors file as the library's tensors: borrowed where the bytes are aligned, else copied.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::tensor::{TensorView, View};
use safetensors::{SafeTensorError, SafeTensors};

// Files are little-endian, and so is every machine that this runs on: elements are read in place.
#[cfg(target_endian = "big")]
compile_error!("tensor files are read in place, which takes a little-endian machine");

/// The bytes of a whole file.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))
}

/// A file's tensors, by name.
pub struct Tensors<'a> {
    path: &'a Path,
    views: BTreeMap<String, TensorView<'a>>,
    /// Names not asked for yet.
    unread: RefCell<Vec<String>>,
}

impl<'a> Tensors<'a> {
    /// The tensors in `bytes`, which are those of the file at `path`.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> anyhow::Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| {
            let what = match &error {
                SafeTensorError::MetadataIncompleteBuffer => {
                    "its length is not what its header says: cut short, or with bytes left over"
                }
                _ => "not a safetensors file",
            };
            anyhow!(
                "{}: expected a whole safetensors file, got {} bytes; {what} ({error})",
                path.display(),
                bytes.len()
            )
        })?;
        let views: BTreeMap<_, _> = file.tensors().into_iter().collect();
        let unread = RefCell::new(views.keys().cloned().collect());
        Ok(Tensors { path, views, unread })
    }

    /// The file holds a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.views.contains_key(name)
    }

    /// Names that nobody has asked for, in order.
    pub fn unread(&self) -> Vec<String> {
        self.unread.borrow().clone()
    }

    fn view(&self, name: &str) -> Option<&TensorView<'a>> {
        self.unread.borrow_mut().retain(|unread| unread != name);
        self.views.get(name)
    }

    /// The error of a tensor that is not there; `why` says what asks for it and what would not.
    pub fn missing(&self, name: &str, why: &str) -> anyhow::Error {
        anyhow!("{}: {name}: missing; {why}", self.path.display())
    }

    /// The error of a tensor that is not what it should be.
    pub fn wrong(&self, name: &str, expected: impl Display, given: impl Display) -> anyhow::Error {
        anyhow!("{}: {name}: expected {expected}, got {given}", self.path.display())
    }

    /// A tensor of f32, bf16 or f16.
    pub fn floats(&self, name: &str) -> anyhow::Result<Option<Floats<'a>>> {
        use safetensors::Dtype;
        let Some(view) = self.view(name) else { return Ok(None) };
        let bytes = view.data();
        let elements = match view.dtype() {
            Dtype::F32 => Elements::F32(cast(bytes)),
            Dtype::BF16 => Elements::Bf16(cast(bytes)),
            Dtype::F16 => Elements::F16(cast(bytes)),
            given => return Err(self.wrong(name, "dtype F32, BF16 or F16", given)),
        };
        Ok(Some(Floats { elements, shape: view.shape().to_vec() }))
    }

    fn wrong_shape(&self, name: &str, expected: impl Display, given: &[usize]) -> anyhow::Error {
        self.wrong(name, format!("shape {expected}"), format!("{given:?}"))
    }

    /// A tensor of one dtype and shape.
    fn exactly<T: Pod>(
        &self,
        name: &str,
        dtype: safetensors::Dtype,
        layout: &str,
        shape: &[usize],
    ) -> anyhow::Result<Option<Cow<'a, [T]>>> {
        let Some(view) = self.view(name) else { return Ok(None) };
        let given = view.dtype();
        ensure!(given == dtype, self.wrong(name, format!("dtype {dtype}"), given));
        let given = view.shape();
        ensure!(given == shape, self.wrong_shape(name, format!("{layout} = {shape:?}"), given));
        Ok(Some(cast(view.data())))
    }

    /// A tensor of f32 of the shape given, `layout` naming its extents.
    pub fn f32s(&self, name: &str, layout: &str, shape: &[usize]) -> anyhow::Result<Option<Vec<f32>>> {
        let tensor = self.exactly(name, safetensors::Dtype::F32, layout, shape)?;
        Ok(tensor.map(Cow::into_owned))
    }

    /// A tensor of u32 of the shape given.
    pub fn u32s(&self, name: &str, layout: &str, shape: &[usize]) -> anyhow::Result<Option<Vec<u32>>> {
        let tensor = self.exactly(name, safetensors::Dtype::U32, layout, shape)?;
        Ok(tensor.map(Cow::into_owned))
    }

    /// A tensor of u8 of the shape given.
    pub fn u8s(&self, name: &str, layout: &str, shape: &[usize]) -> anyhow::Result<Option<Cow<'a, [u8]>>> {
        self.exactly(name, safetensors::Dtype::U8, layout, shape)
    }

    /// A vector of whole numbers, of I64, I32 or U32.
    pub fn offsets(&self, name: &str) -> anyhow::Result<Option<Vec<i64>>> {
        use safetensors::Dtype;
        let Some(view) = self.view(name) else { return Ok(None) };
        ensure!(view.shape().len() == 1, self.wrong_shape(name, "[N+1]", view.shape()));
        let bytes = view.data();
        Ok(Some(match view.dtype() {
            Dtype::I64 => cast::<i64>(bytes).into_owned(),
            Dtype::I32 => cast::<i32>(bytes).iter().map(|&x| x.into()).collect(),
            Dtype::U32 => cast::<u32>(bytes).iter().map(|&x| x.into()).collect(),
            given => return Err(self.wrong(name, "dtype I64, I32 or U32", given)),
        }))
    }

    /// Extents of a tensor of rank R.
    pub fn extents<const R: usize>(&self, name: &str, layout: &str) -> anyhow::Result<Option<[usize; R]>> {
        let Some(view) = self.views.get(name) else { return Ok(None) };
        let extents = view.shape().try_into();
        let extents =
            extents.map_err(|_| self.wrong_shape(name, format!("{layout} of rank {R}"), view.shape()))?;
        Ok(Some(extents))
    }
}

/// Elements of a tensor, of the file's own bytes where their address allows it.
fn cast<T: Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()),
    }
}

enum Elements<'a> {
    F32(Cow<'a, [f32]>),
    Bf16(Cow<'a, [bf16]>),
    F16(Cow<'a, [f16]>),
}

/// A tensor of a float type.
pub struct Floats<'a> {
    elements: Elements<'a>,
    shape: Vec<usize>,
}

impl Floats<'_> {
    /// `width` elements from `offset` on; fewer where the tensor ends.
    pub fn row(&self, offset: usize, width: usize) -> Vec<f32> {
        fn of<T: Copy + Into<f32>>(x: &[T], offset: usize, width: usize) -> Vec<f32> {
            x.iter().skip(offset).take(width).map(|&x| x.into()).collect()
        }
        match &self.elements {
            Elements::F32(x) => of(x, offset, width),
            Elements::Bf16(x) => of(x, offset, width),
            Elements::F16(x) => of(x, offset, width),
        }
    }

    /// As the library takes it.
    pub fn tensor(&self) -> dla::Tensor<'_> {
        match &self.elements {
            Elements::F32(x) => dla::Tensor::new(&x[..], &self.shape),
            Elements::Bf16(x) => dla::Tensor::new(&x[..], &self.shape),
            Elements::F16(x) => dla::Tensor::new(&x[..], &self.shape),
        }
    }
}

/// A tensor to be written.
pub struct Out<'a> {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl<'a> Out<'a> {
    /// Results in the dtype of the inputs.
    pub fn buffer(buffer: &'a dla::Buffer, shape: &[usize]) -> Self {
        match buffer.data() {
            dla::Data::F32(x) => Out::f32s(x, shape),
            dla::Data::Bf16(x) => Out::new(safetensors::Dtype::BF16, x, shape),
            dla::Data::F16(x) => Out::new(safetensors::Dtype::F16, x, shape),
        }
    }

    /// Single precision.
    pub fn f32s(x: &'a [f32], shape: &[usize]) -> Self {
        Out::new(safetensors::Dtype::F32, x, shape)
    }

    /// Counts.
    pub fn u32s(x: &'a [u32], shape: &[usize]) -> Self {
        Out::new(safetensors::Dtype::U32, x, shape)
    }

    /// Bytes.
    pub fn u8s(x: &'a [u8], shape: &[usize]) -> Self {
        Out::new(safetensors::Dtype::U8, x, shape)
    }

    fn new<T: Pod>(dtype: safetensors::Dtype, x: &'a [T], shape: &[usize]) -> Self {
        Out { dtype, shape: shape.to_vec(), bytes: bytemuck::cast_slice(x) }
    }
}

impl View for Out<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
