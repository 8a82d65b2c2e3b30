//! What a call will launch: the one place that chooses kernels by card, dtype and shape.

use super::abi::{
    Extents, GAMMAS_SHARED_BYTES, GAMMAS_THREADS, Geometry, SEGMENT_THREADS, SEGMENT_WINDOW, ScanSm90,
};
use super::backward::{BUDGET, Backward, BackwardKernel};
use super::module::{Choice, Device, Kernel};
use super::workspace::{Layout, Windowed};
use crate::error::{Error, Result};
use crate::options::{MAX_CAPACITY, Merge, Options, Read, Recurrence, SlotOrder};
use crate::problem::{Problem, Shape};
use crate::tensor::Dtype;

/// What a [`Plan`] is made for.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Options; tau is not read: the inputs hold its address.
    pub options: &'a Options,
    /// Extents. Of packed sequences only the number, `shape.sequences`, is known to the host.
    pub shape: Shape,
    /// Dtype of q, k, v and o.
    pub dtype: Dtype,
    /// Whether the call gives room for the final cache; of a backward, whether the final cache has a gradient.
    pub final_cache: bool,
}

impl<'a> Call<'a> {
    /// The call that a problem is, with its final cache.
    pub fn of(problem: &'a Problem<'_>) -> Self {
        Call {
            options: problem.options(),
            shape: *problem.shape(),
            dtype: problem.dtype(),
            final_cache: true,
        }
    }
}

/// The kernels of the pipeline's stages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pipeline {
    /// What is parallel over chunks, then the chain.
    pub(super) segment: [Kernel; 2],
    /// Routed reads: sums of keys within chunks and before them, then lambda; its blocks are those of all tokens.
    pub(super) route: Option<[Kernel; 3]>,
    pub(super) scan: Scan,
}

/// prepare and scan, which go together.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scan {
    /// Any card.
    Portable { prepare: Kernel, scan: Kernel },
    /// Hopper, bf16. prepare comes after the log; its blocks are those of the largest window. Gated: sums of g first.
    Hopper { form: ScanSm90, gammas: Option<Kernel>, prepare: Kernel, scan: Kernel },
}

impl Pipeline {
    /// The kernels of a call on this card, `hopper` where its own are to scan; `rows` in a block of segment's chain. Another card's go in here, and their
    /// parameters into launch.rs.
    fn choose(
        device: &Device,
        geometry: &Geometry,
        dtype: Dtype,
        read: Read,
        hopper: Option<ScanSm90>,
        rows: usize,
    ) -> Result<Pipeline> {
        let g = geometry;
        let recurrence = if g.delta { "delta" } else { "gated" };
        let places = g.chunks().saturating_mul(g.value_heads);
        let choose = |stage, stem: &str, blocks, shared_bytes| {
            Choice::portable(stage, format!("{stem}_{dtype}"), blocks, shared_bytes)
        };
        let route = match read {
            Read::Given => None,
            Read::Routed => Some([
                choose("route", "route_sums", g.route_sums_blocks(), g.route_sums_shared_bytes())
                    .resolve(device)?,
                choose("route", "route_bases", g.route_bases_blocks(), g.route_bases_shared_bytes())
                    .resolve(device)?,
                choose("route", "route", places, g.route_shared_bytes()).resolve(device)?,
            ]),
        };
        let segment = |stem, rows: usize, blocks, shared_bytes: usize| {
            choose("segment", stem, blocks, rows * shared_bytes)
                .of_threads(SEGMENT_THREADS * rows as u32)
                .resolve(device)
        };
        let scan = match hopper {
            Some(form) => {
                let prepare = form.prepare_shared_bytes(g);
                let gammas = (!g.delta).then(|| {
                    Choice::portable("prepare_sm90", "gammas_sm90".to_owned(), g.rows(), GAMMAS_SHARED_BYTES)
                        .of_threads(GAMMAS_THREADS)
                        .resolve(device)
                });
                Scan::Hopper {
                    form,
                    gammas: gammas.transpose()?,
                    prepare: Choice::portable(
                        form.prepare_stage(),
                        form.prepare_name().to_owned(),
                        places,
                        prepare,
                    )
                    .resolve(device)?,
                    scan: Choice::portable(form.stage(), form.name(), form.blocks(g), form.shared_bytes())
                        .of_threads(form.threads())
                        .resolve(device)?,
                }
            }
            None => Scan::Portable {
                prepare: choose(
                    "prepare",
                    &format!("prepare_{recurrence}"),
                    places,
                    g.prepare_shared_bytes(),
                )
                .resolve(device)?,
                scan: choose(
                    "scan",
                    &format!("scan_{recurrence}"),
                    g.rows().saturating_mul(g.slices()),
                    g.scan_shared_bytes(),
                )
                .resolve(device)?,
            },
        };
        Ok(Pipeline {
            segment: [
                segment("segment_gram", 1, g.segment_gram_blocks(), g.segment_gram_shared_bytes())?,
                segment("segment", rows, g.rows().div_ceil(rows), g.segment_shared_bytes())?,
            ],
            route,
            scan,
        })
    }
}

/// Windows of a call at most.
pub(super) const MOST_WINDOWS: usize = 8;

/// Tokens of a window of sequences of `time` tokens: while one window is scanned the chain is at the next. What the scan
/// holds goes through memory in between, so there are few. A window but the last is whole chunks of the scan.
fn window(time: usize, chunk: usize) -> usize {
    let windows = match time {
        ..4096 => return time.max(1),
        4096..16384 => 2,
        16384..65536 => 4,
        _ => MOST_WINDOWS,
    };
    time.div_ceil(windows).next_multiple_of(SEGMENT_WINDOW.max(chunk))
}

/// Tokens of all heads from which on the backward is Hopper's own.
const LEAST_FOR_HOPPER: usize = 2048;

/// A call's kernels, scalars and workspace, chosen once: a plan may be launched as often as its shape comes.
#[derive(Debug, Clone)]
pub struct Plan {
    pub(super) pipeline: Pipeline,
    pub(super) layout: Layout,
    /// Tokens of every window, the last may be cut short; one that holds everything where it is no less than T.
    pub(super) window: usize,
    pub(super) geometry: Geometry,
    pub(super) extents: Extents,
    pub(super) shape: Shape,
    pub(super) read: Read,
    pub(super) delta: bool,
    pub(super) final_cache: bool,
    pub(super) mass: bool,
    pub(super) qk_l2norm: bool,
    pub(super) scale: f32,
}

impl Plan {
    pub(super) fn new(device: &Device, call: &Call<'_>) -> Result<Plan> {
        let Call { options, shape, dtype, final_cache } = *call;
        check_shape(&shape)?;
        let delta = options.recurrence == Recurrence::GatedDelta;
        let geometry = Geometry {
            parts: if dtype == Dtype::Bf16 { 1 } else { 2 },
            sequences: shape.sequences,
            tokens: shape.tokens(),
            heads: shape.heads,
            value_heads: shape.value_heads,
            dk: shape.dk,
            dv: shape.dv,
            capacity: shape.capacity,
            delta,
        };
        let routed = options.read == Read::Routed;
        // Kernels of sm_90a run on compute capability 9.0 alone.
        let hopper = match device.capability() {
            (9, 0) => ScanSm90::choose(&geometry, device.multiprocessors().max(0) as usize),
            _ => None,
        };
        // Packed sequences' lengths, and so what a window would hold, are known on the GPU alone.
        let cut = hopper.is_some() && shape.sequences == shape.batch;
        let window = match hopper {
            Some(scan) if cut => window(shape.time, scan.chunk()),
            _ => shape.time.max(1),
        };
        let processors = device.multiprocessors().max(1) as usize;
        let rows = geometry.segment_rows(processors, window < shape.time);
        let windowed = hopper.map(|scan| {
            let packed = shape.sequences != shape.batch;
            let places = ScanSm90::places(&geometry, shape.time, packed, 0, window);
            Windowed { scan, places, cut: window < shape.time }
        });
        let layout = Layout::new(&geometry, routed, options.qk_l2norm, final_cache, windowed)
            .ok_or(Error::OutOfMemory { bytes: usize::MAX, free: 0 })?;
        let extents = Extents {
            cu_seqlens: 0,
            sequences: shape.sequences as i64,
            time: shape.time as i64,
            heads: shape.heads as i32,
            value_heads: shape.value_heads as i32,
            dk: shape.dk as i32,
            dv: shape.dv as i32,
            capacity: shape.capacity as i32,
            newest_first: (options.slot_order == SlotOrder::NewestFirst).into(),
        };
        Ok(Plan {
            pipeline: Pipeline::choose(device, &geometry, dtype, options.read, hopper, rows)?,
            layout,
            window,
            geometry,
            extents,
            shape,
            read: options.read,
            delta,
            final_cache,
            mass: options.merge == Merge::Mass,
            qk_l2norm: options.qk_l2norm,
            scale: options.scale.unwrap_or_else(|| (1.0 / (shape.dk as f64).sqrt()) as f32),
        })
    }

    /// Whether a window's states go to the next one as the final cache, wanted or not: the delta rule's on Hopper.
    pub(super) fn hands_states_over(&self) -> bool {
        self.delta && matches!(self.pipeline.scan, Scan::Hopper { .. }) && self.window < self.shape.time
    }

    /// Bytes of workspace that a launch needs: all that it holds on the GPU beside inputs and outputs.
    pub fn workspace_bytes(&self) -> usize {
        self.layout.bytes
    }
}

/// A backward's kernels, schedule and workspace, chosen once: a plan may be launched as often as its shape comes.
#[derive(Debug, Clone)]
pub struct BackwardPlan {
    pub(super) backward: Backward,
    pub(super) kernels: Vec<(BackwardKernel, Kernel)>,
    pub(super) shape: Shape,
    pub(super) read: Read,
    pub(super) delta: bool,
    pub(super) soft: bool,
    /// Whether R has an adjoint, and so the drift is read.
    pub(super) through_open: bool,
    pub(super) final_gradient: bool,
}

impl BackwardPlan {
    pub(super) fn new(device: &Device, call: &Call<'_>) -> Result<BackwardPlan> {
        let Call { options, shape, final_cache, .. } = *call;
        check_shape(&shape)?;
        let processors = device.multiprocessors().max(0) as usize;
        // Of few tokens dg can be what remains of terms that cancel, which the portable kernels find more exactly.
        let wanted = std::env::var_os("DLA_CUDA_BACKWARD");
        let many = shape.batch * shape.time * shape.value_heads >= LEAST_FOR_HOPPER;
        let hopper = device.capability() == (9, 0)
            && wanted.map_or(many, |wanted| wanted == "sm90" || (wanted != "portable" && many));
        let backward = Backward::new(call, processors, BUDGET, hopper)
            .ok_or(Error::OutOfMemory { bytes: usize::MAX, free: 0 })?;
        let kernels = backward.kernels().into_iter().map(|form| {
            let choice = Choice::portable(form.stage, form.name, 0, form.shared_bytes);
            Ok((form.kernel, choice.of_threads(form.threads).resolve(device)?))
        });
        Ok(BackwardPlan {
            kernels: kernels.collect::<Result<_>>()?,
            backward,
            shape,
            read: options.read,
            delta: options.recurrence == Recurrence::GatedDelta,
            soft: options.soft.is_some(),
            through_open: final_cache || options.soft.is_some_and(|soft| soft.through_drift),
            final_gradient: final_cache,
        })
    }

    /// Bytes of workspace that a launch needs: all that it holds on the GPU beside inputs, gradients and what the forward
    /// left.
    pub fn workspace_bytes(&self) -> usize {
        self.backward.workspace_bytes()
    }
}

/// Head sizes that the kernels have tiles for.
pub(super) fn check_head_sizes(dk: usize, dv: usize) -> Result<()> {
    for (name, given) in [("dk", dk), ("dv", dv)] {
        if !(8..=256).contains(&given) || !given.is_multiple_of(8) {
            return Err(Error::HeadSize { name, given });
        }
    }
    Ok(())
}

/// Extents that the kernels can count.
pub(super) fn check_shape(shape: &Shape) -> Result<()> {
    check_head_sizes(shape.dk, shape.dv)?;
    if !(1..=MAX_CAPACITY).contains(&shape.capacity) {
        return Err(Error::Option {
            name: "capacity",
            expected: format!("1 to {MAX_CAPACITY} slots"),
            given: shape.capacity.to_string(),
        });
    }
    if shape.heads == 0 || !shape.value_heads.is_multiple_of(shape.heads) || shape.value_heads == 0 {
        return Err(Error::Shape {
            name: "v",
            expected: format!("[B,T,HV,dv] with HV a multiple of H = {}", shape.heads),
            given: format!("HV = {}", shape.value_heads),
        });
    }
    let limit = i32::MAX as u64;
    let rows = shape.sequences.checked_mul(shape.value_heads).map_or(u64::MAX, |rows| rows as u64);
    if rows > limit {
        return Err(Error::Limit { name: "sequences x value heads (N x HV)", limit, given: rows });
    }
    let tokens = shape.batch.checked_mul(shape.time).and_then(|tokens| tokens.checked_mul(shape.value_heads));
    // Offsets of elements are 64 bits wide, of at most 256 to a token and head.
    let limit = 1 << 48;
    let tokens = tokens.map_or(u64::MAX, |tokens| tokens as u64);
    if tokens > limit {
        return Err(Error::Limit { name: "tokens x value heads (B x T x HV)", limit, given: tokens });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::abi::DELTA_CHUNK;

    #[test]
    fn windows_hold_whole_chunks() {
        for time in [0, 1, 63, 4095, 4096, 4097, 16384, 16385, 131_072, 2_097_152] {
            for chunk in [64, DELTA_CHUNK] {
                let window = window(time, chunk);
                assert!(
                    window >= time || (window.is_multiple_of(SEGMENT_WINDOW) && window.is_multiple_of(chunk)),
                    "{time}: {window}"
                );
                assert!(window > 0 && time.div_ceil(window) <= MOST_WINDOWS);
            }
        }
    }

    const SHAPE: Shape =
        Shape { batch: 1, time: 8, heads: 2, value_heads: 4, dk: 64, dv: 256, capacity: 30, sequences: 1 };

    #[test]
    fn what_kernels_cannot_count_is_an_error() {
        check_shape(&SHAPE).unwrap();
        let wrong = [
            (Shape { dk: 20, ..SHAPE }, "dk: expected a multiple of 8 from 8 to 256 on a GPU, got 20"),
            (Shape { dv: 264, ..SHAPE }, "dv: expected a multiple of 8 from 8 to 256 on a GPU, got 264"),
            (Shape { dv: 0, ..SHAPE }, "dv: expected a multiple of 8"),
            (Shape { capacity: 65, ..SHAPE }, "capacity: expected 1 to 64 slots, got 65"),
            (Shape { heads: 3, ..SHAPE }, "v: expected shape [B,T,HV,dv] with HV a multiple of H = 3"),
            (Shape { sequences: 1 << 30, ..SHAPE }, "(N x HV): expected at most 2147483647"),
            (Shape { time: usize::MAX, ..SHAPE }, "(B x T x HV): expected at most"),
        ];
        for (shape, expected) in wrong {
            let error = check_shape(&shape).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
