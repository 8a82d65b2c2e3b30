//! The gated backward in bf16 on Hopper. A window of chunks at a time, as the portable one, by three scans:
//!
//! - `scan_queries_sm90`: the forward scan with q -> do, k -> v, v -> k gives dQ and what the states give to dlambda. Without
//!   a read it carries the states on to a window (`advance`).
//! - `scan_backward_sm90`, twice: the adjoint of the scan, in reverse, for dV and, exchanged, for dK.
//!
//! dg by way of the states is the difference of what is read and what is written (g_backward_sm90.cu).

use super::{BackwardKernel, Launcher, Pass, TakeArray};
use crate::cuda::abi::{
    AnchorsSm90Params, DevicePointer, EndAnchorsSm90Params, GAMMAS_SHARED_BYTES, GBackwardSm90Params,
    GammasSm90Params, Geometry, LambdaBackwardSm90Params, PrepareBackwardSm90Params, PrepareSm90Params,
    ScanBackwardSm90, ScanBackwardSm90Params, ScanQueriesSm90, ScanSm90Params,
};
use crate::error::Result;
use std::ops::Range;

/// Most chunks of a window: longer ones would let roundings of dg add up further.
pub(super) const MOST_CHUNKS: usize = 32;

/// The scans of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hopper {
    queries: ScanQueriesSm90,
    /// For dV, for dK.
    scans: [ScanBackwardSm90; 2],
}

/// Where its arrays stand in the workspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Layout {
    chunk_place: usize,
    gammas: usize,
    /// For dQ.
    pairs: usize,
    weights: usize,
    plans: usize,
    entry_factor: usize,
    slot_of: usize,
    d_reads: usize,
    /// For dV and dK.
    d_pairs: usize,
    d_read: usize,
    d_plans: usize,
    d_weights: usize,
    d_g: usize,
    /// For dg.
    read: usize,
    net: usize,
    flow: [usize; 2],
    anchors: usize,
    end_anchors: usize,
    /// With a gradient of the final states: the states.
    states: usize,
    /// From window to window.
    carried: [usize; 2],
    carried_g: usize,
    carried_anchor: usize,
}

impl Hopper {
    /// The scans that there are for a problem, if there are: bf16, gated, head sizes up to 128, at most 32 slots.
    /// A launch has `sequences` sequences.
    pub(super) fn choose(geometry: &Geometry, processors: usize, sequences: usize) -> Option<Hopper> {
        let scan = |exchanged| ScanBackwardSm90::choose(geometry, exchanged);
        let queries = ScanQueriesSm90::choose(geometry, processors, sequences)?;
        Some(Hopper { queries, scans: [scan(false)?, scan(true)?] })
    }

    /// Blocks that a sequence has at least.
    pub(super) fn blocks(&self, geometry: &Geometry) -> usize {
        self.scans[0].blocks(geometry).min(self.scans[1].blocks(geometry))
    }

    /// Bytes of the states at a window's beginning.
    pub(super) fn bank_bytes(&self, geometry: &Geometry) -> usize {
        self.queries.blocks(geometry) * self.queries.bank_bytes()
    }

    /// Arrays for windows of `places` chunks.
    pub(super) fn lay_out(
        &self,
        g: &Geometry,
        places: usize,
        final_gradient: bool,
        take: &mut impl TakeArray,
    ) -> Option<Layout> {
        let (all, rows, heads, chunk) = (g.chunks(), g.rows(), g.value_heads, g.chunk());
        let slots = self.queries.weight_slots();
        let [of_values, of_keys] = self.scans;
        Some(Layout {
            chunk_place: take.take(&[all, heads, g.capacity])?,
            gammas: take.take(&[8, all, heads])?,
            pairs: take.take(&[4, self.queries.pairs_len(g, places)])?,
            weights: take.take(&[4, places, heads, chunk, slots])?,
            plans: take.take(&[self.queries.plans_bytes(g, places)])?,
            entry_factor: take.take(&[4, places, heads, slots])?,
            slot_of: take.take(&[places, heads, chunk, slots])?,
            d_reads: take.take(&[4, g.dk / 8, places, heads, chunk, slots])?,
            d_pairs: take.take(&[4, ScanBackwardSm90::pairs_len(g, places)])?,
            d_read: take.take(&[4, of_values.weights_len(g, places)])?,
            d_plans: take.take(&[ScanBackwardSm90::plans_bytes(g, places)])?,
            d_weights: take.take(&[4, ScanBackwardSm90::d_weights_len(g, places)])?,
            d_g: take.take(&[4, ScanBackwardSm90::d_g_len(g, places)])?,
            read: take.take(&[8, places, heads, chunk])?,
            net: take.take(&[8, places, heads, chunk])?,
            flow: [take.take(&[4, of_values.flow_len(g)])?, take.take(&[4, of_keys.flow_len(g)])?],
            anchors: take.take(&[16, rows, g.dk / 8])?,
            end_anchors: take.take(&[16, rows, g.dk / 8])?,
            states: take.take(&[usize::from(final_gradient), 4, rows, g.capacity, g.dk, g.dv])?,
            carried: [take.take(&[4, of_values.carried_len(g)])?, take.take(&[4, of_keys.carried_len(g)])?],
            carried_g: take.take(&[4, rows, chunk])?,
            carried_anchor: take.take(&[8, rows, 3])?,
        })
    }

    /// Name, file, threads and shared memory of a kernel that is its own.
    pub(super) fn kernel(
        &self,
        kernel: BackwardKernel,
        g: &Geometry,
    ) -> Option<(String, &'static str, u32, usize)> {
        use BackwardKernel::*;
        let prepared = "prepare_backward_sm90";
        let slots = self.queries.weight_slots();
        Some(match kernel {
            GammasSm90 => {
                let threads = crate::cuda::abi::GAMMAS_THREADS;
                ("gammas_sm90".to_owned(), "prepare_sm90", threads, GAMMAS_SHARED_BYTES)
            }
            PrepareQueriesSm90 => {
                let shared_bytes = self.queries.prepare_shared_bytes(g);
                ("prepare_queries_sm90_bf16".to_owned(), "prepare_sm90", 256, shared_bytes)
            }
            ScanQueriesSm90 => {
                (self.queries.name(), "scan_sm90", self.queries.threads(), self.queries.shared_bytes())
            }
            ScanStatesSm90 => {
                let threads = self.queries.states_threads();
                (self.queries.states_name(), "scan_sm90", threads, self.queries.shared_bytes())
            }
            PrepareBackwardSm90 => {
                let name = ScanBackwardSm90::PREPARE_NAME.to_owned();
                (name, prepared, 256, ScanBackwardSm90::prepare_shared_bytes(g))
            }
            ScanBackwardValuesSm90 | ScanBackwardKeysSm90 => {
                let scan = &self.scans[usize::from(kernel == ScanBackwardKeysSm90)];
                (scan.name(), "scan_backward_sm90", scan.threads(), scan.shared_bytes())
            }
            LambdaBackwardSm90 => {
                let shared_bytes = 64 * (8 * (slots + 4) + slots) + 1_088;
                ("lambda_backward_sm90".to_owned(), "lambda_backward_sm90", 256, shared_bytes)
            }
            EndAnchorsSm90 => ("end_anchors_sm90".to_owned(), "g_backward_sm90", 256, 64),
            AnchorsSm90 => ("anchors_sm90".to_owned(), "g_backward_sm90", 256, 64),
            GFlowSm90 => ("g_flow_sm90".to_owned(), "g_backward_sm90", 256, 0),
            GBackwardSm90 => ("g_backward_sm90".to_owned(), "g_backward_sm90", 256, 64 + 56 * MOST_CHUNKS),
            _ => return None,
        })
    }

    pub(super) const KERNELS: [BackwardKernel; 12] = [
        BackwardKernel::GammasSm90,
        BackwardKernel::PrepareQueriesSm90,
        BackwardKernel::ScanQueriesSm90,
        BackwardKernel::ScanStatesSm90,
        BackwardKernel::PrepareBackwardSm90,
        BackwardKernel::ScanBackwardValuesSm90,
        BackwardKernel::ScanBackwardKeysSm90,
        BackwardKernel::LambdaBackwardSm90,
        BackwardKernel::AnchorsSm90,
        BackwardKernel::EndAnchorsSm90,
        BackwardKernel::GFlowSm90,
        BackwardKernel::GBackwardSm90,
    ];
}

impl Pass<'_> {
    /// Where slots' places at chunks' entries go, for the kernels of Hopper.
    pub(super) fn chunk_place(&self) -> DevicePointer {
        if self.plan.hopper.is_some() { self.at(self.plan.layout.hopper.chunk_place) } else { 0 }
    }

    /// Where the final states go, where they have a gradient and dg asks for them.
    fn final_states(&self) -> DevicePointer {
        let wanted = self.plan.final_gradient && self.final_gradient.states != 0 && self.gradients.g != 0;
        if wanted { self.at(self.plan.layout.hopper.states) } else { 0 }
    }

    /// g -> its sums before every chunk.
    pub(super) fn gammas(&self, launcher: &mut impl Launcher) -> Result<()> {
        let gammas = self.at(self.plan.layout.hopper.gammas);
        let params = GammasSm90Params { extents: self.extents, g: self.inputs.g, gammas };
        launcher.launch(BackwardKernel::GammasSm90, self.geometry.rows(), &params)
    }

    /// v, do, events, lambda -> what scan_queries takes of a window's chunks; without a read their plans alone.
    fn prepare_queries(
        &self,
        scan: &ScanQueriesSm90,
        reads: bool,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let (layout, at) = (&self.plan.layout, &self.plan.layout.hopper);
        let params = PrepareSm90Params {
            extents: self.extents,
            q: self.upstream.o,
            k: self.inputs.v,
            g: self.inputs.g,
            events: self.forward.events,
            lambda: self.lambda,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            chunk_place: self.at(at.chunk_place),
            gammas: self.at(at.gammas),
            pairs: if reads { self.at(at.pairs) } else { 0 },
            weights: self.at(at.weights),
            plans: self.at(at.plans),
            normed: self.inputs.k,
            entry_factor: self.at(at.entry_factor),
            slot_of: self.at(at.slot_of),
            from: window.start as i64,
            to: window.end as i64,
            lambda_columns: self.lambda_columns as i32,
            slots: scan.weight_slots() as i32,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launcher.launch(BackwardKernel::PrepareQueriesSm90, self.window_blocks(window), &params)
    }

    fn scan_queries(
        &self,
        scan: &ScanQueriesSm90,
        source: DevicePointer,
        banks: DevicePointer,
        reads: bool,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let (layout, at) = (&self.plan.layout, &self.plan.layout.hopper);
        let params = ScanSm90Params {
            extents: self.extents,
            q: self.upstream.o,
            k: self.inputs.v,
            v: self.inputs.k,
            pairs: self.at(at.pairs),
            weights: self.at(at.weights),
            plans: self.at(at.plans),
            initial_len: self.initial.len,
            initial_states: self.initial.states,
            source,
            banks,
            o: if reads { self.at(layout.d_q) } else { 0 },
            thin_q: self.inputs.q,
            d_reads: self.at(at.d_reads),
            states: if reads { self.final_states() } else { 0 },
            from: window.start as i64,
            to: window.end as i64,
        };
        let kernel = if reads { BackwardKernel::ScanQueriesSm90 } else { BackwardKernel::ScanStatesSm90 };
        launcher.launch(kernel, scan.blocks(&self.geometry), &params)
    }

    /// Carries the states over windows.
    pub(super) fn advance_hopper(
        &self,
        hopper: &Hopper,
        from: Option<usize>,
        to: usize,
        windows: Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let mut source = from.map_or(0, |place| self.bank(place));
        for window in windows {
            let window = self.tokens(window..window + 1);
            self.prepare_queries(&hopper.queries, false, &window, launcher)?;
            self.scan_queries(&hopper.queries, source, self.bank(to), false, &window, launcher)?;
            source = self.bank(to);
        }
        Ok(())
    }

    /// dQ, dK, dV, dlambda and dg of a window, but for what goes by way of route and drift.
    pub(super) fn reverse_hopper(
        &self,
        hopper: &Hopper,
        from: Option<usize>,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let source = from.map_or(0, |place| self.bank(place));
        self.prepare_queries(&hopper.queries, true, window, launcher)?;
        self.scan_queries(&hopper.queries, source, 0, true, window, launcher)?;
        self.prepare_backward_hopper(hopper, window, launcher)?;
        self.lambda_backward(hopper, window, launcher)?;
        self.scan_backward_hopper(hopper, false, window, launcher)?;
        self.scan_backward_hopper(hopper, true, window, launcher)?;
        if self.gradients.g == 0 { Ok(()) } else { self.g_backward(hopper, source, window, launcher) }
    }

    fn prepare_backward_hopper(
        &self,
        hopper: &Hopper,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let (layout, at) = (&self.plan.layout, &self.plan.layout.hopper);
        let params = PrepareBackwardSm90Params {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            v: self.inputs.v,
            d_o: self.upstream.o,
            g: self.inputs.g,
            events: self.forward.events,
            lambda: self.lambda,
            chunk_len: self.at(layout.chunk_len),
            chunk_starts: self.at(layout.chunk_starts),
            chunk_place: self.at(at.chunk_place),
            pairs: self.at(at.d_pairs),
            weights: self.at(at.d_read),
            plans: self.at(at.d_plans),
            d_weights: self.at(at.d_weights),
            d_g: self.at(at.d_g),
            from: window.start as i64,
            to: window.end as i64,
            lambda_columns: self.lambda_columns as i32,
            slots: hopper.scans[0].slots as i32,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
        };
        launcher.launch(BackwardKernel::PrepareBackwardSm90, self.window_blocks(window), &params)
    }

    fn lambda_backward(
        &self,
        hopper: &Hopper,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let (layout, at) = (&self.plan.layout, &self.plan.layout.hopper);
        let params = LambdaBackwardSm90Params {
            extents: self.extents,
            q: self.inputs.q,
            g: self.inputs.g,
            events: self.forward.events,
            lambda: self.lambda,
            chunk_len: self.at(layout.chunk_len),
            d_reads: self.at(at.d_reads),
            entry_factor: self.at(at.entry_factor),
            slot_of: self.at(at.slot_of),
            d_weights: self.at(at.d_weights),
            dlambda: if self.plan.routed { 0 } else { self.gradients.lambda },
            d_slots: if self.plan.routed { self.at(layout.d_slots) } else { 0 },
            read: if self.gradients.g == 0 { 0 } else { self.at(at.read) },
            from: window.start as i64,
            to: window.end as i64,
            places: self.window_places(window) as i64,
            slices: (self.geometry.dk / 8) as i32,
            slots: hopper.queries.weight_slots() as i32,
            lambda_columns: self.lambda_columns as i32,
            scale: self.plan.scale,
            qk_l2norm: self.plan.qk_l2norm.into(),
            reserved: 0,
        };
        launcher.launch(BackwardKernel::LambdaBackwardSm90, self.window_blocks(window), &params)
    }

    fn scan_backward_hopper(
        &self,
        hopper: &Hopper,
        exchanged: bool,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let (layout, at) = (&self.plan.layout, &self.plan.layout.hopper);
        let which = usize::from(exchanged);
        let in_f32 = match exchanged {
            true => !self.plan.keys_at_once(),
            false => self.plan.soft.is_some() || self.plan.through_open,
        };
        let out = match (exchanged, in_f32) {
            (true, true) => self.at(layout.d_k),
            (true, false) => self.gradients.k,
            (false, true) => self.at(layout.d_v),
            (false, false) => self.gradients.v,
        };
        let params = ScanBackwardSm90Params {
            extents: self.extents,
            q: self.inputs.q,
            k: self.inputs.k,
            v: self.inputs.v,
            d_o: self.upstream.o,
            pairs: self.at(at.d_pairs),
            weights: self.at(at.d_read),
            plans: self.at(at.d_plans),
            initial_len: self.initial.len,
            final_states: self.final_gradient.states,
            initial_states: if exchanged { 0 } else { self.initial_gradient.states },
            carried: self.at(at.carried[which]),
            out,
            flow: if self.gradients.g == 0 { 0 } else { self.at(at.flow[which]) },
            from: window.start as i64,
            to: window.end as i64,
            exchanged: exchanged.into(),
            out_f32: in_f32.into(),
        };
        let kernel = if exchanged {
            BackwardKernel::ScanBackwardKeysSm90
        } else {
            BackwardKernel::ScanBackwardValuesSm90
        };
        launcher.launch(kernel, hopper.scans[which].blocks(&self.geometry), &params)
    }

    fn g_backward(
        &self,
        hopper: &Hopper,
        source: DevicePointer,
        window: &Range<usize>,
        launcher: &mut impl Launcher,
    ) -> Result<()> {
        let at = &self.plan.layout.hopper;
        let [of_values, of_keys] = &hopper.scans;
        let g = &self.geometry;
        let anchored = window.start > 0 || self.initial.len != 0;
        if anchored {
            let params = AnchorsSm90Params {
                extents: self.extents,
                carried: self.at(at.carried[1]),
                banks: source,
                initial_states: self.initial.states,
                entry_factor: self.at(at.entry_factor),
                anchors: self.at(at.anchors),
                from: window.start as i64,
                to: window.end as i64,
                width: of_keys.width as i32,
                carried_slots: of_keys.slots as i32,
                bank_slots: hopper.queries.slots() as i32,
                groups: hopper.queries.groups() as i32,
                factor_slots: hopper.queries.weight_slots() as i32,
                reserved: 0,
            };
            launcher.launch(BackwardKernel::AnchorsSm90, of_keys.blocks(g), &params)?;
        }
        let states = self.final_states();
        // Packed sequences end in any window, and are read in that one alone.
        if states != 0 && (self.plan.packed() || window.end >= self.plan.shape.time) {
            let params = EndAnchorsSm90Params {
                extents: self.extents,
                gradient: self.final_gradient.states,
                states,
                anchors: self.at(at.end_anchors),
            };
            launcher.launch(BackwardKernel::EndAnchorsSm90, of_keys.blocks(g), &params)?;
        }
        let params = GBackwardSm90Params {
            extents: self.extents,
            plans: self.at(at.d_plans),
            read: self.at(at.read),
            flow: at.flow.map(|flow| self.at(flow)),
            net: self.at(at.net),
            d_g: self.at(at.d_g),
            anchors: if anchored { self.at(at.anchors) } else { 0 },
            end_anchors: if states == 0 { 0 } else { self.at(at.end_anchors) },
            carried_g: self.at(at.carried_g),
            carried: self.at(at.carried_anchor),
            dg: self.gradients.g,
            from: window.start as i64,
            to: window.end as i64,
            slices: [of_values.slices(g) as i32, of_keys.slices(g) as i32],
            anchor_slices: of_keys.slices(g) as i32,
            reserved: 0,
        };
        launcher.launch(BackwardKernel::GFlowSm90, self.window_blocks(window), &params)?;
        launcher.launch(BackwardKernel::GBackwardSm90, g.rows(), &params)
    }
}
