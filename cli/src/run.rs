//! `dla run`: the operator on a file.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, ensure};
use dla::{
    Cache, CacheDims, CacheGradients, Error, Forward, Gradients, Inputs, OutputGradients, Problem, Read,
    Recurrence, Route, Shape,
};

use crate::common::Common;
use crate::device::Device;
use crate::options::{OptionArgs, check_capacity, check_size};
use crate::output::Output;
use crate::tensors::{self, Floats, Out, Tensors};

/// Run the operator on the tensors of a file
///
/// Reads q k v, g (absent: no decay), beta (--recurrence delta), lambda (--read given) or route_slope
/// route_bias route_logits (--read routed), and where they are there events, cu_seqlens and cache_*
/// (to resume from). Writes o drift events cache_* and, with --read routed, lambda. Where the file
/// holds do (and dcache_*, of the final cache), the gradients are written too: d before the name of
/// each argument.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File of the arguments
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// File of the results, written whole or not at all; may be the file of the arguments
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// What computes
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    #[command(flatten)]
    options: OptionArgs,
}

/// Runs the subcommand.
pub fn run(args: &Args, common: &Common) -> anyhow::Result<()> {
    let engine = args.device.engine()?;
    check_capacity(args.options.capacity)?;
    let output = Output::at(&args.output)?;
    let bytes = tensors::read(&args.input)?;
    let file = Tensors::parse(&args.input, &bytes)?;
    let options = args.options.options();

    let arguments = Arguments::read(&file, &options)?;
    arguments.check_states(options.capacity).with_context(|| args.input.display().to_string())?;
    let explain = |error| explain(error, &args.input);
    let problem = Problem::new(&options, arguments.inputs()).map_err(explain)?;
    let upstream = Upstream::read(&file, &problem)?;
    if options.soft.is_some() && upstream.is_none() {
        common.note("--temperature changes only gradients, and the file holds no do");
    }
    for name in file.unread() {
        common.note(&format!(
            "{}: {name} is not read: {}",
            args.input.display(),
            why_unread(&name, &file, &options)
        ));
    }

    let timed = |message| common.progress(1, message);
    let bar = timed("forward");
    let forward = engine.forward(&problem).map_err(explain)?;
    bar.finish_and_clear();
    let gradients = match &upstream {
        Some(upstream) => {
            let bar = timed("backward");
            let gradients =
                engine.backward(&problem, &forward.events, &upstream.gradients()).map_err(explain)?;
            bar.finish_and_clear();
            Some(gradients)
        }
        None => None,
    };
    let mut results = forward_results(&problem, &forward);
    if let Some(gradients) = &gradients {
        results.extend(gradient_results(&problem, gradients));
    }
    let bar = timed("write");
    output.write(&safetensors::serialize(results, None)?)?;
    bar.finish_and_clear();
    Ok(())
}

/// A library's error, in the words of the command line.
fn explain(error: Error, path: &Path) -> anyhow::Error {
    let hint = match &error {
        // The library names options as the command line spells them.
        Error::Option { .. } => return anyhow!("--{error}"),
        error if error.is_of_device() => return error.clone().into(),
        Error::Shape { name: "lambda" | "route_logits", .. } => "; M is that of --capacity",
        Error::Shape { name: "cache_states", .. } => "; M is that of --capacity, for both runs the same",
        Error::Value { name: "g", .. } => "; g is the logarithm of a decay",
        Error::Event { .. } => "; without events in the file they are computed",
        _ => "",
    };
    anyhow!("{}: {error}{hint}", path.display())
}

fn why_unread(name: &str, file: &Tensors, options: &dla::Options) -> &'static str {
    match name {
        "beta" if options.recurrence == Recurrence::Gated => "--recurrence gated has no write strength",
        "lambda" if options.read == Read::Routed => "--read routed computes it",
        "route_slope" | "route_bias" | "route_logits" if options.read == Read::Given => {
            "--read given takes lambda"
        }
        "cache_keys" | "dcache_keys" if options.read == Read::Given => "--read given keeps no keys",
        "dcache_states" | "dcache_open" | "dcache_keys" if !file.has("do") => "the file holds no do",
        _ => "no argument has this name",
    }
}

/// A call's arguments, as the file has them.
struct Arguments<'a> {
    q: Floats<'a>,
    k: Floats<'a>,
    v: Floats<'a>,
    g: Option<Floats<'a>>,
    beta: Option<Floats<'a>>,
    lambda: Option<Floats<'a>>,
    route: Option<[Floats<'a>; 2]>,
    logits: Option<Floats<'a>>,
    events: Option<std::borrow::Cow<'a, [u8]>>,
    cu_seqlens: Option<Vec<i64>>,
    cache: Option<Cache>,
}

impl<'a> Arguments<'a> {
    fn read(file: &Tensors<'a>, options: &dla::Options) -> anyhow::Result<Self> {
        let required = |name: &str, why: &str| file.floats(name)?.ok_or_else(|| file.missing(name, why));
        let always = "every run reads q, k and v";
        let (q, k, v) = (required("q", always)?, required("k", always)?, required("v", always)?);
        let g = file.floats("g")?;
        let beta = match options.recurrence {
            Recurrence::Gated => None,
            Recurrence::GatedDelta => Some(required(
                "beta",
                "--recurrence delta reads beta [B,T,HV] (--recurrence gated would not)",
            )?),
        };
        let (lambda, route, logits) = match options.read {
            Read::Given => {
                let why = "--read given reads lambda [B,T,HV,M] (--read routed would not)";
                (Some(required("lambda", why)?), None, None)
            }
            Read::Routed => {
                let why = "--read routed reads route_slope and route_bias [HV] (--read given would not)";
                let route = [required("route_slope", why)?, required("route_bias", why)?];
                (None, Some(route), file.floats("route_logits")?)
            }
        };
        let events = match file.extents::<4>("v", "[B,T,HV,dv]")? {
            Some([batch, time, value_heads, _]) => {
                file.u8s("events", "[B,T,HV]", &[batch, time, value_heads])?
            }
            None => None,
        };
        let cu_seqlens = file.offsets("cu_seqlens")?;
        let cache = cache(file, options.read)?;
        Ok(Arguments { q, k, v, g, beta, lambda, route, logits, events, cu_seqlens, cache })
    }

    /// Checks the states' size: tensors without tokens take no bytes, whatever their other extents say.
    fn check_states(&self, capacity: usize) -> anyhow::Result<()> {
        let (q, v) = (self.q.tensor(), self.v.tensor());
        // Other ranks are the library's to refuse.
        let (&[batch, _, _, dk], &[_, _, value_heads, dv]) = (q.shape(), v.shape()) else { return Ok(()) };
        let sequences = self.cu_seqlens.as_ref().map_or(batch, |offsets| offsets.len().saturating_sub(1));
        check_size("v", "states [N,HV,M,dk,dv]", &[sequences, value_heads, capacity, dk, dv])
    }

    fn inputs(&self) -> Inputs<'_> {
        let mut inputs = Inputs::new(self.q.tensor(), self.k.tensor(), self.v.tensor());
        inputs.g = self.g.as_ref().map(Floats::tensor);
        inputs.beta = self.beta.as_ref().map(Floats::tensor);
        inputs.lambda = self.lambda.as_ref().map(Floats::tensor);
        inputs.route = self.route.as_ref().map(|[slope, bias]| Route {
            slope: slope.tensor(),
            bias: bias.tensor(),
            logits: self.logits.as_ref().map(Floats::tensor),
        });
        inputs.events = self.events.as_deref();
        inputs.cu_seqlens = self.cu_seqlens.as_deref();
        inputs.cache = self.cache.as_ref();
        inputs
    }
}

/// Tensors of a cache; the last only with routed reads.
const CACHE: [&str; 6] =
    ["cache_states", "cache_len", "cache_tokens", "cache_drift", "cache_open", "cache_keys"];

/// Layouts of [`CACHE`].
const CACHE_LAYOUTS: [&str; 6] =
    ["[N,HV,M,dk,dv]", "[N,HV]", "[N,HV,M]", "[N,HV,M]", "[N,HV,dk,dv]", "[N,HV,M,dk]"];

/// Extents of [`CACHE`].
fn cache_shapes(dims: CacheDims) -> [Vec<usize>; 6] {
    let CacheDims { sequences, value_heads, capacity, dk, dv } = dims;
    let (rows, slots) = ([sequences, value_heads], [sequences, value_heads, capacity]);
    [
        [&slots[..], &[dk, dv]].concat(),
        rows.to_vec(),
        slots.to_vec(),
        slots.to_vec(),
        [&rows[..], &[dk, dv]].concat(),
        [&slots[..], &[dk]].concat(),
    ]
}

/// The cache to resume from.
fn cache(file: &Tensors, read: Read) -> anyhow::Result<Option<Cache>> {
    let wanted = if read == Read::Routed { &CACHE[..] } else { &CACHE[..5] };
    let Some(found) = wanted.iter().find(|name| file.has(name)) else { return Ok(None) };
    let missing = |name: &str| {
        file.missing(name, &format!("{found} is there, and a run resumes from all of {}", wanted.join(" ")))
    };
    let [sequences, value_heads, capacity, dk, dv] =
        file.extents::<5>(CACHE[0], CACHE_LAYOUTS[0])?.ok_or_else(|| missing(CACHE[0]))?;
    let dims = CacheDims { sequences, value_heads, capacity, dk, dv };
    let shapes = cache_shapes(dims);
    let f32s = |i: usize| file.f32s(CACHE[i], CACHE_LAYOUTS[i], &shapes[i])?.ok_or_else(|| missing(CACHE[i]));
    let u32s = |i: usize| file.u32s(CACHE[i], CACHE_LAYOUTS[i], &shapes[i])?.ok_or_else(|| missing(CACHE[i]));
    Ok(Some(Cache {
        dims,
        states: f32s(0)?,
        len: u32s(1)?,
        tokens: u32s(2)?,
        drift: u32s(3)?,
        open: f32s(4)?,
        keys: if read == Read::Routed { Some(f32s(5)?) } else { None },
    }))
}

/// Gradients of the results, where the file has them.
struct Upstream<'a> {
    o: Floats<'a>,
    cache: Option<CacheGradients>,
}

impl<'a> Upstream<'a> {
    fn read(file: &Tensors<'a>, problem: &Problem) -> anyhow::Result<Option<Self>> {
        let Some(o) = file.floats("do")? else { return Ok(None) };
        // The backward checks this too, but only after a forward that may have been long.
        let (given, expected) = (o.tensor(), problem.inputs().v);
        ensure!(
            given.shape() == expected.shape(),
            file.wrong(
                "do",
                format!("shape [B,T,HV,dv] = {:?}", expected.shape()),
                format!("{:?}", given.shape())
            )
        );
        ensure!(
            given.dtype() == problem.dtype(),
            file.wrong("do", format!("dtype {}, as q", problem.dtype()), given.dtype())
        );
        let dims = problem.shape().cache_dims();
        let shapes = cache_shapes(dims);
        let read = problem.options().read;
        let states = file.f32s("dcache_states", CACHE_LAYOUTS[0], &shapes[0])?;
        let open = file.f32s("dcache_open", CACHE_LAYOUTS[4], &shapes[4])?;
        let keys = match read {
            Read::Routed => file.f32s("dcache_keys", CACHE_LAYOUTS[5], &shapes[5])?,
            Read::Given => None,
        };
        let cache = (states.is_some() || open.is_some() || keys.is_some()).then(|| {
            let zeros = CacheGradients::zeros(dims, read);
            CacheGradients {
                states: states.unwrap_or(zeros.states),
                open: open.unwrap_or(zeros.open),
                keys: keys.or(zeros.keys),
            }
        });
        Ok(Some(Upstream { o, cache }))
    }

    fn gradients(&self) -> OutputGradients<'_> {
        OutputGradients { o: self.o.tensor(), cache: self.cache.as_ref() }
    }
}

type Results<'a> = Vec<(&'static str, Out<'a>)>;

fn forward_results<'a>(problem: &Problem, forward: &'a Forward) -> Results<'a> {
    let Shape { batch, time, value_heads, dv, capacity, .. } = *problem.shape();
    let per_token = [batch, time, value_heads];
    let Cache { dims, states, len, tokens, drift, open, keys } = &forward.cache;
    let shapes = cache_shapes(*dims);
    let mut results = vec![
        ("o", Out::buffer(&forward.o, &[batch, time, value_heads, dv])),
        ("drift", Out::f32s(&forward.drift, &per_token)),
        ("events", Out::u8s(&forward.events, &per_token)),
        (CACHE[0], Out::f32s(states, &shapes[0])),
        (CACHE[1], Out::u32s(len, &shapes[1])),
        (CACHE[2], Out::u32s(tokens, &shapes[2])),
        (CACHE[3], Out::u32s(drift, &shapes[3])),
        (CACHE[4], Out::f32s(open, &shapes[4])),
    ];
    results.extend(keys.as_ref().map(|keys| (CACHE[5], Out::f32s(keys, &shapes[5]))));
    results.extend(
        forward
            .lambda
            .as_ref()
            .map(|lambda| ("lambda", Out::f32s(lambda, &[batch, time, value_heads, capacity]))),
    );
    results
}

fn gradient_results<'a>(problem: &Problem, gradients: &'a Gradients) -> Results<'a> {
    let Shape { batch, time, heads, value_heads, dk, dv, .. } = *problem.shape();
    let (per_token, per_head) = ([batch, time, value_heads], [value_heads]);
    let mut results = vec![
        ("dq", Out::buffer(&gradients.q, &[batch, time, heads, dk])),
        ("dk", Out::buffer(&gradients.k, &[batch, time, heads, dk])),
        ("dv", Out::buffer(&gradients.v, &[batch, time, value_heads, dv])),
    ];
    let mut optional = |name, x: Option<&'a Vec<f32>>, shape: &[usize]| {
        results.extend(x.map(|x| (name, Out::f32s(x, shape))));
    };
    optional("dg", gradients.g.as_ref(), &per_token);
    optional("dbeta", gradients.beta.as_ref(), &per_token);
    let per_slot = |columns| [batch, time, value_heads, columns];
    optional("dlambda", gradients.lambda.as_ref(), &per_slot(problem.lambda_columns()));
    if let Some(route) = &gradients.route {
        optional("droute_slope", Some(&route.slope), &per_head);
        optional("droute_bias", Some(&route.bias), &per_head);
        optional("droute_logits", route.logits.as_ref(), &per_slot(problem.logit_columns()));
    }
    if let Some(soft) = &gradients.soft {
        optional("dtau", Some(&soft.tau), &per_head);
        optional("ddrift", Some(&soft.drift), &per_token);
    }
    if let Some(cache) = &gradients.cache {
        let shapes = cache_shapes(problem.shape().cache_dims());
        optional("dcache_states", Some(&cache.states), &shapes[0]);
        optional("dcache_open", Some(&cache.open), &shapes[4]);
        optional("dcache_keys", cache.keys.as_ref(), &shapes[5]);
    }
    results
}
