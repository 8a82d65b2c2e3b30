//! A call as it came, checked as far as no element is read: codes, extents, and the bytes of every buffer.

use crate::status::{Failure, Outcome};
use crate::types::{
    Buffer, CacheArrays, Call, CallOptions, DeviceCode, DtypeCode, Gradients, MergeCode, Prefixed, ReadCode,
    RecurrenceCode, Results, SlotOrderCode, Status, Upstream,
};
use dla::{CacheDims, Dtype, Error, Merge, Options, Read, Recurrence, Shape, SlotOrder, Soft, Tau};

/// Reads a struct of the boundary.
///
/// # Safety
/// `at` is null, or as many bytes as the size that stands there says.
pub(crate) unsafe fn read<'a, T: Prefixed>(at: *const T) -> Outcome<&'a T> {
    let failure = |message: String| Failure { status: Status::Shape, message };
    if at.is_null() || !at.is_aligned() {
        let message = format!("{}: missing; its address is {at:?}", T::NAME);
        return Err(Failure { status: Status::Missing, message });
    }
    // SAFETY: every struct begins with its size, which is there, as the caller says.
    let size = unsafe { at.cast::<usize>().read() };
    // The first version: what is added later stands behind, and a shorter struct will then be one without it.
    if size != size_of::<T>() {
        let (name, expected) = (T::NAME, size_of::<T>());
        return Err(failure(format!("{name}.size: expected {expected} bytes, as sizeof says, got {size}")));
    }
    // SAFETY: of numbers and addresses alone, so every pattern of bits is one.
    let value = unsafe { &*at };
    debug_assert_eq!(value.size(), size);
    Ok(value)
}

/// Where a call runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Cpu,
    Cuda { ordinal: usize },
}

/// A call whose codes and extents are read.
#[derive(Debug)]
pub(crate) struct Parsed<'a> {
    pub call: &'a Call,
    pub place: Place,
    /// tau is that of the options; a tau of the call is read by the device.
    pub options: Options,
    pub shape: Shape,
    pub dtype: Dtype,
    pub lambda_columns: usize,
    pub logit_columns: usize,
}

pub(crate) fn option<T>(name: &'static str, expected: &str, given: impl ToString) -> Outcome<T> {
    Err(Error::Option { name, expected: expected.to_owned(), given: given.to_string() }.into())
}

/// Elements of an array, where memory can hold as many.
pub(crate) fn product(extents: &[usize]) -> Option<usize> {
    let elements = extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))?;
    // No element has more than 8 bytes.
    (elements <= isize::MAX as usize / 8).then_some(elements)
}

impl<'a> Parsed<'a> {
    pub fn new(options: &CallOptions, call: &'a Call) -> Outcome<Parsed<'a>> {
        let dtype = match call.dtype {
            x if x == DtypeCode::F32 as i32 => Dtype::F32,
            x if x == DtypeCode::Bf16 as i32 => Dtype::Bf16,
            x if x == DtypeCode::F16 as i32 => Dtype::F16,
            x => return option("dtype", "a dla_dtype", x),
        };
        let place = match call.device {
            x if x == DeviceCode::Cpu as i32 => Place::Cpu,
            x if x == DeviceCode::Cuda as i32 => {
                let count = usize::try_from(call.ordinal);
                Place::Cuda { ordinal: count.or_else(|_| option("ordinal", "0 or more", call.ordinal))? }
            }
            x => return option("device", "a dla_device", x),
        };
        let recurrence = match options.recurrence {
            x if x == RecurrenceCode::Gated as i32 => Recurrence::Gated,
            x if x == RecurrenceCode::GatedDelta as i32 => Recurrence::GatedDelta,
            x => return option("recurrence", "a dla_recurrence", x),
        };
        let merge = match options.merge {
            x if x == MergeCode::Density as i32 => Merge::Density,
            x if x == MergeCode::Mass as i32 => Merge::Mass,
            x => return option("merge", "a dla_merge", x),
        };
        let read = match options.read {
            x if x == ReadCode::Given as i32 => Read::Given,
            x if x == ReadCode::Routed as i32 => Read::Routed,
            x => return option("read", "a dla_read", x),
        };
        let slot_order = match options.slot_order {
            x if x == SlotOrderCode::OldestFirst as i32 => SlotOrder::OldestFirst,
            x if x == SlotOrderCode::NewestFirst as i32 => SlotOrder::NewestFirst,
            x => return option("slot_order", "a dla_slot_order", x),
        };
        let capacity = match usize::try_from(options.capacity) {
            Ok(capacity @ 1..=dla::MAX_CAPACITY) => capacity,
            _ => return option("capacity", "1 to 64 slots", options.capacity),
        };
        let soft = match options.soft_temperature {
            0.0 => None,
            temperature => Some(Soft { temperature, through_drift: options.soft_through_drift != 0 }),
        };
        let options = Options {
            recurrence,
            capacity,
            tau: Tau::PerCall(options.tau),
            merge,
            read,
            slot_order,
            scale: (!options.scale.is_nan()).then_some(options.scale),
            qk_l2norm: options.qk_l2norm != 0,
            soft,
        };
        let Call { batch, time, heads, value_heads, dk, dv, .. } = *call;
        let packed = call.cu_seqlens.is_present();
        if !packed && call.sequences != 0 && call.sequences != batch {
            let why = "there are not as many sequences as batch entries";
            return Err(Error::Missing { name: "cu_seqlens", why }.into());
        }
        let sequences = if packed { call.sequences } else { batch };
        let shape = Shape { batch, time, heads, value_heads, dk, dv, capacity, sequences };
        for (name, layout, extents) in [
            ("q", "[B,T,H,dk]", &[batch, time, heads, dk][..]),
            ("v", "[B,T,HV,dv]", &[batch, time, value_heads, dv]),
            ("v", "states [N,HV,M,dk,dv]", &[sequences, value_heads, capacity, dk, dv]),
            ("cu_seqlens", "[N+1]", &[sequences, 2]),
        ] {
            if product(extents).is_none() || extents.iter().any(|&extent| extent > isize::MAX as usize / 512)
            {
                let expected = format!("{layout} of a size that fits memory");
                return Err(Error::Shape { name, expected, given: format!("{extents:?}") }.into());
            }
        }
        for (name, extent) in [("H", heads), ("dk", dk)] {
            if extent == 0 {
                let expected = format!("[B,T,H,dk] with {name} >= 1");
                let given = format!("{:?}", [batch, time, heads, dk]);
                return Err(Error::Shape { name: "q", expected, given }.into());
            }
        }
        if value_heads == 0 || dv == 0 || value_heads % heads != 0 {
            let expected = format!("[B,T,HV,dv] with dv >= 1 and HV a multiple of H = {heads}");
            let given = format!("{:?}", [batch, time, value_heads, dv]);
            return Err(Error::Shape { name: "v", expected, given }.into());
        }
        let columns = |given: usize| if given == 0 { capacity } else { given };
        let parsed = Parsed {
            call,
            place,
            options,
            shape,
            dtype,
            lambda_columns: columns(call.lambda_columns),
            logit_columns: columns(call.logit_columns),
        };
        for (name, columns) in [("lambda", parsed.lambda_columns), ("route_logits", parsed.logit_columns)] {
            if columns < capacity || parsed.per_slot(columns).is_none() {
                let expected = format!("[B,T,HV,M] with M = {capacity} columns or more");
                return Err(Error::Shape { name, expected, given: format!("{columns} columns") }.into());
            }
        }
        Ok(parsed)
    }

    pub fn routed(&self) -> bool {
        self.options.read == Read::Routed
    }

    pub fn delta(&self) -> bool {
        self.options.recurrence == Recurrence::GatedDelta
    }

    /// Elements of q and k.
    pub fn key_rows(&self) -> usize {
        self.shape.tokens() * self.shape.heads * self.shape.dk
    }

    /// Elements of v and o.
    pub fn value_rows(&self) -> usize {
        self.per_token() * self.shape.dv
    }

    /// Elements of g.
    pub fn per_token(&self) -> usize {
        self.shape.tokens() * self.shape.value_heads
    }

    fn per_slot(&self, columns: usize) -> Option<usize> {
        product(&[self.shape.batch, self.shape.time, self.shape.value_heads, columns])
    }

    pub fn lambda_elements(&self) -> usize {
        self.per_token() * self.lambda_columns
    }

    pub fn logit_elements(&self) -> usize {
        self.per_token() * self.logit_columns
    }

    pub fn dims(&self) -> CacheDims {
        self.shape.cache_dims()
    }

    /// Every argument, with its name and bytes, checked; those of a cache too.
    pub fn arguments(&self) -> Outcome<Arguments> {
        let Call { q, k, v, g, beta, lambda, route_slope, route_bias, route_logits, tau, .. } = *self.call;
        let (tokens, heads, width) = (self.per_token(), self.shape.value_heads, self.dtype.bytes());
        let (given, routed) = (!self.routed(), self.routed());
        let optional = |name, buffer, bytes| array(name, buffer, bytes, false);
        let needed = |name, buffer, bytes, needed| array(name, buffer, bytes, needed);
        let arguments = Arguments {
            q: needed("q", q, self.key_rows() * width, true)?,
            k: needed("k", k, self.key_rows() * width, true)?,
            v: needed("v", v, self.value_rows() * width, true)?,
            g: optional("g", g, tokens * 4)?,
            beta: needed("beta", beta, tokens * 4, self.delta())?,
            lambda: needed("lambda", lambda, self.lambda_elements() * 4, given)?,
            slope: needed("route_slope", route_slope, heads * 4, routed)?,
            bias: needed("route_bias", route_bias, heads * 4, routed)?,
            logits: optional("route_logits", route_logits, self.logit_elements() * 4)?,
            tau: optional("tau", tau, heads * 4)?,
            events: optional("events", self.call.events, tokens)?,
            cu_seqlens: optional("cu_seqlens", self.call.cu_seqlens, (self.shape.sequences + 1) * 8)?,
            // SAFETY: the caller's, null or a struct of this kind.
            cache: unsafe { cache(self.call.cache) }?
                .map(|cache| self.cache(cache, Wanted::All))
                .transpose()?,
        };
        for (name, given, read, why) in [
            ("beta", arguments.beta, self.delta(), "the gated recurrence has no write strength"),
            ("lambda", arguments.lambda, given, "reads are routed"),
            ("route_slope", arguments.slope, routed, "reads are given"),
            ("route_bias", arguments.bias, routed, "reads are given"),
            ("route_logits", arguments.logits, routed, "reads are given"),
        ] {
            if given.is_some() && !read {
                return Err(Error::Unexpected { name, why }.into());
            }
        }
        Ok(arguments)
    }

    /// Arrays of a cache, checked.
    pub fn cache(&self, cache: &CacheArrays, wanted: Wanted) -> Outcome<CacheOf> {
        cache_of(self.dims(), self.routed(), cache, wanted)
    }

    /// What a call on entries does not take: they are its cache.
    pub fn without_cache(&self, results: &Results) -> Outcome<()> {
        if !self.call.cache.is_null() || !results.cache.is_null() {
            let why = "the entries hold what the call goes on from";
            return Err(Error::Unexpected { name: "call.cache or results.cache", why }.into());
        }
        Ok(())
    }

    /// Where the results of a forward or a step go.
    pub fn results(&self, results: &Results) -> Outcome<ResultsOf> {
        let tokens = self.per_token();
        let lambda = array("results.lambda", results.lambda, tokens * self.shape.capacity * 4, false)?;
        if lambda.is_some() && !self.routed() {
            return Err(Error::Unexpected { name: "results.lambda", why: "reads are given" }.into());
        }
        Ok(ResultsOf {
            o: array("o", results.o, self.value_rows() * self.dtype.bytes(), true)?
                .expect("a needed array is there"),
            drift: array("drift", results.drift, tokens * 4, false)?,
            events: array("results.events", results.events, tokens, false)?,
            lambda,
            // SAFETY: the caller's, null or a struct of this kind.
            cache: unsafe { cache(results.cache) }?
                .map(|cache| self.cache(cache, Wanted::All))
                .transpose()?,
        })
    }

    pub fn upstream(&self, upstream: &Upstream) -> Outcome<UpstreamOf> {
        let tokens = self.per_token();
        let slots = tokens * self.shape.capacity * 4;
        let lambda = array("upstream.lambda", upstream.lambda, slots, false)?;
        if lambda.is_some() && !self.routed() {
            return Err(Error::Unexpected { name: "upstream.lambda", why: "reads are given" }.into());
        }
        Ok(UpstreamOf {
            drift: array("upstream.drift", upstream.drift, tokens * 4, false)?,
            lambda,
            o: array("do", upstream.o, self.value_rows() * self.dtype.bytes(), true)?
                .expect("a needed array is there"),
            // SAFETY: the caller's, null or a struct of this kind.
            cache: unsafe { cache(upstream.cache) }?
                .map(|cache| self.cache(cache, Wanted::Gradients))
                .transpose()?,
        })
    }

    pub fn gradients(&self, gradients: &Gradients) -> Outcome<GradientsOf> {
        let (tokens, heads, width) = (self.per_token(), self.shape.value_heads, self.dtype.bytes());
        let routed = self.routed();
        let soft = self.options.soft.is_some();
        let logits = self.call.route_logits.is_present();
        let no_argument = "there is no such argument in this call";
        let no_soft = "boundaries are not soft";
        let wanted = |name, buffer: Buffer, bytes, has: bool, why| {
            if buffer.is_present() && !has {
                return Err(Failure::from(Error::Unexpected { name, why }));
            }
            array(name, buffer, bytes, false)
        };
        let of = |name, buffer, bytes, has| wanted(name, buffer, bytes, has, no_argument);
        let resumed = !self.call.cache.is_null();
        // SAFETY: the caller's, null or a struct of this kind.
        let initial = unsafe { cache(gradients.cache) }?;
        if initial.is_some() && !resumed {
            return Err(Error::Unexpected { name: "dcache", why: no_argument }.into());
        }
        Ok(GradientsOf {
            q: of("dq", gradients.q, self.key_rows() * width, true)?,
            k: of("dk", gradients.k, self.key_rows() * width, true)?,
            v: of("dv", gradients.v, self.value_rows() * width, true)?,
            g: of("dg", gradients.g, tokens * 4, self.call.g.is_present())?,
            beta: of("dbeta", gradients.beta, tokens * 4, self.delta())?,
            lambda: of("dlambda", gradients.lambda, self.lambda_elements() * 4, !routed)?,
            slope: of("droute_slope", gradients.route_slope, heads * 4, routed)?,
            bias: of("droute_bias", gradients.route_bias, heads * 4, routed)?,
            logits: of("droute_logits", gradients.route_logits, self.logit_elements() * 4, routed && logits)?,
            tau: wanted("dtau", gradients.tau, heads * 4, soft, no_soft)?,
            drift: wanted("ddrift", gradients.drift, tokens * 4, soft, no_soft)?,
            cache: initial.map(|cache| self.cache(cache, Wanted::Gradients)).transpose()?,
        })
    }
}

/// Arrays of a cache, checked.
pub(crate) fn cache_of(
    dims: CacheDims,
    routed: bool,
    cache: &CacheArrays,
    wanted: Wanted,
) -> Outcome<CacheOf> {
    let (rows, slots) = (dims.rows(), dims.rows() * dims.capacity);
    let all = wanted == Wanted::All;
    let gradient = wanted == Wanted::Gradients;
    let name = |cache, dcache| if gradient { dcache } else { cache };
    let keys =
        array(name("cache_keys", "dcache_keys"), cache.keys, rows * dims.key_bank() * 4, all && routed)?;
    if keys.is_some() && !routed {
        let name = name("cache_keys", "dcache_keys");
        return Err(Error::Unexpected { name, why: "reads are given" }.into());
    }
    let ledger = |name, buffer: Buffer, elements: usize| {
        if gradient && buffer.is_present() {
            return Err(Error::Unexpected { name, why: "counts have no gradient" }.into());
        }
        array(name, buffer, elements * 4, all)
    };
    Ok(CacheOf {
        states: array(name("cache_states", "dcache_states"), cache.states, rows * dims.bank() * 4, all)?,
        len: ledger("cache_len", cache.len, rows)?,
        tokens: ledger("cache_tokens", cache.tokens, slots)?,
        drift: ledger("cache_drift", cache.drift, slots)?,
        open: array(name("cache_open", "dcache_open"), cache.open, rows * dims.state() * 4, all)?,
        keys,
    })
}

/// What is read of, or written to, the arrays of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A cache, whole.
    All,
    /// Gradients: those that are there.
    Gradients,
}

/// An array whose bytes are as they must be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Array {
    pub name: &'static str,
    pub address: *mut u8,
    pub bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Arguments {
    pub q: Option<Array>,
    pub k: Option<Array>,
    pub v: Option<Array>,
    pub g: Option<Array>,
    pub beta: Option<Array>,
    pub lambda: Option<Array>,
    pub slope: Option<Array>,
    pub bias: Option<Array>,
    pub logits: Option<Array>,
    pub tau: Option<Array>,
    pub events: Option<Array>,
    pub cu_seqlens: Option<Array>,
    pub cache: Option<CacheOf>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheOf {
    pub states: Option<Array>,
    pub len: Option<Array>,
    pub tokens: Option<Array>,
    pub drift: Option<Array>,
    pub open: Option<Array>,
    pub keys: Option<Array>,
}

impl CacheOf {
    /// Of gradients: whether there is one.
    pub fn has_gradient(&self) -> bool {
        self.states.is_some() || self.open.is_some() || self.keys.is_some()
    }
}

#[derive(Debug)]
pub(crate) struct ResultsOf {
    pub o: Array,
    pub drift: Option<Array>,
    pub events: Option<Array>,
    pub lambda: Option<Array>,
    pub cache: Option<CacheOf>,
}

#[derive(Debug)]
pub(crate) struct UpstreamOf {
    pub o: Array,
    pub cache: Option<CacheOf>,
    pub drift: Option<Array>,
    pub lambda: Option<Array>,
}

#[derive(Debug)]
pub(crate) struct GradientsOf {
    pub q: Option<Array>,
    pub k: Option<Array>,
    pub v: Option<Array>,
    pub g: Option<Array>,
    pub beta: Option<Array>,
    pub lambda: Option<Array>,
    pub slope: Option<Array>,
    pub bias: Option<Array>,
    pub logits: Option<Array>,
    pub tau: Option<Array>,
    pub drift: Option<Array>,
    pub cache: Option<CacheOf>,
}

/// Checks a buffer's bytes. Without elements a needed array is there whatever its address.
fn array(name: &'static str, buffer: Buffer, bytes: usize, needed: bool) -> Outcome<Option<Array>> {
    let there = buffer.is_present() || (needed && bytes == 0);
    if !there {
        if needed {
            return Err(Error::Missing { name, why: "this call reads or writes it" }.into());
        }
        return Ok(None);
    }
    if buffer.bytes != bytes {
        let (expected, given) = (format!("{bytes} bytes"), format!("{} bytes", buffer.bytes));
        return Err(Error::Shape { name, expected, given }.into());
    }
    if buffer.data.is_null() && bytes > 0 {
        return Err(Error::Missing { name, why: "its address is null" }.into());
    }
    Ok(Some(Array { name, address: buffer.data.cast(), bytes }))
}

/// # Safety
/// `at` is null or the address of such a struct.
unsafe fn cache<'a>(at: *const CacheArrays) -> Outcome<Option<&'a CacheArrays>> {
    if !at.is_aligned() {
        return Err(Error::Misaligned {
            name: "cache",
            alignment: align_of::<CacheArrays>() as u64,
            given: at.addr() as u64,
        }
        .into());
    }
    // SAFETY: aligned, and null or such a struct, as the caller says.
    Ok(unsafe { at.as_ref() })
}
