//! What the tests of the command line share: files, the binary, and cases as files.
// Every test file compiles its own copy and uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use bytemuck::{Pod, cast_slice};
use dla::check::{Case, Recipe};
use dla::{Buffer, Cache, CacheGradients, Data};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Raw {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Raw {
    pub fn new<T: Pod>(dtype: Dtype, x: &[T], shape: &[usize]) -> Raw {
        Raw { dtype, shape: shape.to_vec(), bytes: cast_slice(x).to_vec() }
    }

    pub fn f32s(x: &[f32], shape: &[usize]) -> Raw {
        Raw::new(Dtype::F32, x, shape)
    }

    pub fn u32s(x: &[u32], shape: &[usize]) -> Raw {
        Raw::new(Dtype::U32, x, shape)
    }

    pub fn u8s(x: &[u8], shape: &[usize]) -> Raw {
        Raw::new(Dtype::U8, x, shape)
    }

    pub fn buffer(x: &Buffer, shape: &[usize]) -> Raw {
        match x.data() {
            Data::F32(x) => Raw::f32s(x, shape),
            Data::Bf16(x) => Raw::new(Dtype::BF16, x, shape),
            Data::F16(x) => Raw::new(Dtype::F16, x, shape),
        }
    }

    /// The elements of an f32 tensor.
    pub fn to_f32s(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
    }

    /// Elements `from..to` of axis 1, for tensors `[B,T,..]` with B = 1.
    pub fn tokens(&self, from: usize, to: usize) -> Raw {
        let token = self.bytes.len() / self.shape[1];
        let mut shape = self.shape.clone();
        assert_eq!(shape[0], 1);
        shape[1] = to - from;
        Raw { dtype: self.dtype, shape, bytes: self.bytes[from * token..to * token].to_vec() }
    }
}

/// The tensors of a file.
pub type File = BTreeMap<String, Raw>;

pub fn write(path: &Path, file: &File) {
    let views = file.iter().map(|(name, raw)| {
        (name, TensorView::new(raw.dtype, raw.shape.clone(), &raw.bytes).expect("a test's own tensor"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("test tensors")).expect("scratch");
}

pub fn read(path: &Path) -> File {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    file.iter()
        .map(|(name, view)| {
            let raw = Raw { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
            (name.to_owned(), raw)
        })
        .collect()
}

/// What the binary did.
#[derive(Debug)]
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    #[track_caller]
    pub fn succeeds(self) -> Ran {
        assert_eq!(self.status, 0, "{}", self.stderr);
        self
    }
}

/// Runs the binary.
pub fn dla<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_dla")).args(args).output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let status = output.status.code().expect("no signal");
    Ran { status, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A folder of its own for one test.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(tempfile::tempdir().expect("scratch"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Names of the files in it.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("scratch");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("scratch").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// `dla run` of a file with the reference engine, from in to out.
    pub fn run(&self, file: &File, options: &[&str]) -> Ran {
        let (input, output) = (self.path("in.safetensors"), self.path("out.safetensors"));
        write(&input, file);
        let (input, output) = (input.as_os_str(), output.as_os_str());
        let fixed = ["run".as_ref(), input, "-o".as_ref(), output, "--device".as_ref(), "reference".as_ref()];
        dla(fixed.into_iter().chain(options.iter().map(|option| option.as_ref())))
    }

    /// [`Scratch::run`], and what it wrote.
    #[track_caller]
    pub fn results(&self, file: &File, options: &[&str]) -> File {
        let ran = self.run(file, options).succeeds();
        assert_eq!(ran.stderr, "", "nothing is worth a note");
        read(&self.path("out.safetensors"))
    }
}

/// A small call that every test can begin with.
pub fn small() -> Recipe {
    let options = dla::Options { capacity: 3, ..dla::Options::default() };
    Recipe { options, batch: 2, time: 9, heads: 1, value_heads: 2, dk: 4, dv: 3, ..Recipe::default() }
}

fn named(entries: impl IntoIterator<Item = (&'static str, Raw)>) -> File {
    entries.into_iter().map(|(name, raw)| (name.to_owned(), raw)).collect()
}

/// Tensors of a cache, under their names in a file.
pub fn cache_file(cache: &Cache) -> File {
    let dims = cache.dims;
    let (n, hv, m, dk, dv) = (dims.sequences, dims.value_heads, dims.capacity, dims.dk, dims.dv);
    let mut file = named([
        ("cache_states", Raw::f32s(&cache.states, &[n, hv, m, dk, dv])),
        ("cache_len", Raw::u32s(&cache.len, &[n, hv])),
        ("cache_tokens", Raw::u32s(&cache.tokens, &[n, hv, m])),
        ("cache_drift", Raw::u32s(&cache.drift, &[n, hv, m])),
        ("cache_open", Raw::f32s(&cache.open, &[n, hv, dk, dv])),
    ]);
    if let Some(keys) = &cache.keys {
        file.insert("cache_keys".to_owned(), Raw::f32s(keys, &[n, hv, m, dk]));
    }
    file
}

/// Tensors of the gradient of a cache of these extents.
pub fn cache_gradient_file(gradients: &CacheGradients, dims: dla::CacheDims) -> File {
    let (n, hv, m, dk, dv) = (dims.sequences, dims.value_heads, dims.capacity, dims.dk, dims.dv);
    let mut file = named([
        ("dcache_states", Raw::f32s(&gradients.states, &[n, hv, m, dk, dv])),
        ("dcache_open", Raw::f32s(&gradients.open, &[n, hv, dk, dv])),
    ]);
    if let Some(keys) = &gradients.keys {
        file.insert("dcache_keys".to_owned(), Raw::f32s(keys, &[n, hv, m, dk]));
    }
    file
}

/// The arguments of a case as a file, without the gradient of o.
pub fn arguments(case: &Case) -> File {
    let Recipe { options, batch: b, time: t, heads: h, value_heads: hv, dk, dv, .. } = &case.recipe;
    let (b, t, h, hv, dk, dv) = (*b, *t, *h, *hv, *dk, *dv);
    let columns = options.capacity + case.recipe.extra_columns;
    let mut file = named([
        ("q", Raw::buffer(&case.q, &[b, t, h, dk])),
        ("k", Raw::buffer(&case.k, &[b, t, h, dk])),
        ("v", Raw::buffer(&case.v, &[b, t, hv, dv])),
    ]);
    let mut optional = |name: &str, x: Option<&Vec<f32>>, shape: &[usize]| {
        if let Some(x) = x {
            file.insert(name.to_owned(), Raw::f32s(x, shape));
        }
    };
    optional("g", case.g.as_ref(), &[b, t, hv]);
    optional("beta", case.beta.as_ref(), &[b, t, hv]);
    optional("lambda", case.lambda.as_ref(), &[b, t, hv, columns]);
    if let Some(route) = &case.route {
        optional("route_slope", Some(&route.slope), &[hv]);
        optional("route_bias", Some(&route.bias), &[hv]);
        optional("route_logits", route.logits.as_ref(), &[b, t, hv, columns]);
    }
    if let Some(offsets) = &case.cu_seqlens {
        file.insert("cu_seqlens".to_owned(), Raw::new(Dtype::I64, offsets, &[offsets.len()]));
    }
    if let Some(cache) = &case.cache {
        file.extend(cache_file(cache));
    }
    file
}

/// The arguments of a case and the gradients of its results.
pub fn with_gradients(case: &Case) -> File {
    let Recipe { batch, time, value_heads, dv, .. } = case.recipe;
    let mut file = arguments(case);
    file.insert("do".to_owned(), Raw::buffer(&case.d_o, &[batch, time, value_heads, dv]));
    if let Some(gradients) = &case.d_cache {
        let dims = case.problem().expect("a drawn case is valid").shape().cache_dims();
        file.extend(cache_gradient_file(gradients, dims));
    }
    file
}

/// What `dla run` should write for a case whose file is `with_gradients`.
pub fn expected(case: &Case) -> File {
    use dla::Engine;
    let problem = case.problem().expect("a drawn case is valid");
    let engine = dla::reference::Engine;
    let forward = engine.forward(&problem).expect("a valid problem");
    let gradients = engine.backward(&problem, &forward.events, &case.upstream()).expect("its own log");
    let Recipe { options, batch: b, time: t, heads: h, value_heads: hv, dk, dv, .. } = &case.recipe;
    let (b, t, h, hv, dk, dv) = (*b, *t, *h, *hv, *dk, *dv);
    let columns = options.capacity + case.recipe.extra_columns;
    let mut file = named([
        ("o", Raw::buffer(&forward.o, &[b, t, hv, dv])),
        ("drift", Raw::f32s(&forward.drift, &[b, t, hv])),
        ("events", Raw::u8s(&forward.events, &[b, t, hv])),
        ("dq", Raw::buffer(&gradients.q, &[b, t, h, dk])),
        ("dk", Raw::buffer(&gradients.k, &[b, t, h, dk])),
        ("dv", Raw::buffer(&gradients.v, &[b, t, hv, dv])),
    ]);
    file.extend(cache_file(&forward.cache));
    if let Some(cache) = &gradients.cache {
        file.extend(cache_gradient_file(cache, forward.cache.dims));
    }
    let mut optional = |name: &str, x: Option<&Vec<f32>>, shape: &[usize]| {
        if let Some(x) = x {
            file.insert(name.to_owned(), Raw::f32s(x, shape));
        }
    };
    optional("lambda", forward.lambda.as_ref(), &[b, t, hv, options.capacity]);
    optional("dg", gradients.g.as_ref(), &[b, t, hv]);
    optional("dbeta", gradients.beta.as_ref(), &[b, t, hv]);
    optional("dlambda", gradients.lambda.as_ref(), &[b, t, hv, columns]);
    if let Some(route) = &gradients.route {
        optional("droute_slope", Some(&route.slope), &[hv]);
        optional("droute_bias", Some(&route.bias), &[hv]);
        optional("droute_logits", route.logits.as_ref(), &[b, t, hv, columns]);
    }
    if let Some(soft) = &gradients.soft {
        optional("dtau", Some(&soft.tau), &[hv]);
        optional("ddrift", Some(&soft.drift), &[b, t, hv]);
    }
    file
}

/// Names of a file's tensors.
pub fn names(file: &File) -> Vec<&str> {
    file.keys().map(String::as_str).collect()
}

/// `|a - b| / |b|` in the 2-norm, of f32 tensors of one shape.
#[track_caller]
pub fn relative_error(a: &Raw, b: &Raw) -> f64 {
    assert_eq!(a.shape, b.shape);
    let f64s = |raw: &Raw| raw.to_f32s().into_iter().map(f64::from).collect::<Vec<_>>();
    dla::check::relative_error(&f64s(a), &f64s(b)).0
}
