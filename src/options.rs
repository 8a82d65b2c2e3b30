//! What a caller chooses. Defaults are the paper's (arXiv 2606.10650).

use crate::error::{Error, Result};

/// Most slots that an event log of one byte per token can name.
pub const MAX_CAPACITY: usize = 64;

/// How a slot's state evolves from token to token (OPERATOR.md, section 3, step 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recurrence {
    /// `S <- e^g S`, write `k v^T`: Mamba-2, RetNet, simple GLA; without `g`, plain linear attention.
    #[default]
    Gated,
    /// `S <- e^g (S - beta k (k^T S))`, write `beta k v^T`: Gated DeltaNet.
    GatedDelta,
}

/// What merging an adjacent pair of slots costs; the cheapest pair merges when all slots are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Merge {
    /// Mean drift per token, `(J_i + J_{i+1}) / (n_i + n_{i+1})`: the paper's rule.
    #[default]
    Density,
    /// Summed drift, `J_i + J_{i+1}`: all slots grow alike.
    Mass,
}

/// Where the read weights `lambda` come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Read {
    /// The caller gives `lambda [B,T,HV,M]`.
    #[default]
    Given,
    /// `lambda = sigmoid(slope q . kappa + bias + logits)`, kappa a slot's mean key (OPERATOR.md, section 6).
    Routed,
}

/// Which slot the first column of `lambda` (and of the route's logits) weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotOrder {
    /// Column 0 is the oldest slot.
    #[default]
    OldestFirst,
    /// Column 0 is the open slot.
    NewestFirst,
}

impl SlotOrder {
    /// Column of `lambda` that weighs slot `slot` (0 the oldest) while `len` slots are held.
    #[inline]
    pub fn column(self, slot: usize, len: usize) -> usize {
        match self {
            SlotOrder::OldestFirst => slot,
            SlotOrder::NewestFirst => len - 1 - slot,
        }
    }
}

/// The drift from which a token opens a slot. Drift lies in `[0, 2]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Tau {
    /// One threshold for every head.
    PerCall(f32),
    /// One threshold per value head, `[HV]`.
    PerHead(Vec<f32>),
}

impl Tau {
    /// Threshold of value head `head`.
    #[inline]
    pub fn of(&self, head: usize) -> f32 {
        match self {
            Tau::PerCall(tau) => *tau,
            Tau::PerHead(taus) => taus[head],
        }
    }
}

/// Soft boundaries: gradients for `tau` and the drift while the forward stays hard
/// (OPERATOR.md, end of section 4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Soft {
    /// Width of the sigmoid around `tau`, in units of drift; positive.
    pub temperature: f32,
    /// Carry the gradient of the drift on into k, v, g (and a resumed cache's open segment).
    pub through_drift: bool,
}

/// All options of a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Recurrence of the slots.
    pub recurrence: Recurrence,
    /// Most slots held at once, M, `1..=64`.
    pub capacity: usize,
    /// Drift from which a token opens a slot.
    pub tau: Tau,
    /// Which pair merges when all slots are held.
    pub merge: Merge,
    /// Where the read weights come from.
    pub read: Read,
    /// Order of the columns of `lambda` and of the route's logits.
    pub slot_order: SlotOrder,
    /// Factor of q in the read; `None` is `dk^-1/2`.
    pub scale: Option<f32>,
    /// Divide every q and k by `sqrt(|x|^2 + 1e-6)` first, as flash-linear-attention does.
    pub qk_l2norm: bool,
    /// Soft boundaries in the backward; `None`: `tau` and the drift have no gradient.
    pub soft: Option<Soft>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            recurrence: Recurrence::Gated,
            capacity: 30,
            tau: Tau::PerCall(0.6),
            merge: Merge::Density,
            read: Read::Given,
            slot_order: SlotOrder::OldestFirst,
            scale: None,
            qk_l2norm: false,
            soft: None,
        }
    }
}

/// Added to the squared norm of a q or k row under [`Options::qk_l2norm`].
pub const L2NORM_EPS: f64 = 1e-6;

impl Options {
    /// Checks what can be checked without the tensors.
    pub(crate) fn validate(&self, value_heads: usize) -> Result<()> {
        let option = |name, expected: &str, given: String| {
            Err(Error::Option { name, expected: expected.to_owned(), given })
        };
        if !(1..=MAX_CAPACITY).contains(&self.capacity) {
            return option("capacity", "1 to 64 slots", self.capacity.to_string());
        }
        match &self.tau {
            Tau::PerCall(tau) if tau.is_nan() => return option("tau", "a number", tau.to_string()),
            Tau::PerHead(taus) if taus.len() != value_heads => {
                return option(
                    "tau",
                    &format!("one threshold per value head (HV = {value_heads})"),
                    taus.len().to_string(),
                );
            }
            Tau::PerHead(taus) => {
                if let Some(tau) = taus.iter().find(|tau| tau.is_nan()) {
                    return option("tau", "numbers", tau.to_string());
                }
            }
            Tau::PerCall(_) => {}
        }
        if let Some(scale) = self.scale
            && !scale.is_finite()
        {
            return option("scale", "a finite number", scale.to_string());
        }
        if let Some(soft) = self.soft
            && !(soft.temperature > 0.0 && soft.temperature.is_finite())
        {
            return option("temperature", "a finite number above 0", soft.temperature.to_string());
        }
        Ok(())
    }
}
