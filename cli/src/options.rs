//! The operator's options, as the command line spells them.

use anyhow::ensure;
use clap::ValueEnum;
use dla::{MAX_CAPACITY, Options, Soft, Tau};

/// How a slot's state evolves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Recurrence {
    /// S <- e^g S, write k v^T
    #[default]
    Gated,
    /// S <- e^g (S - beta k (k^T S)), write beta k v^T
    Delta,
}

/// What merging two neighbouring slots costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Merge {
    /// Mean drift per token: the paper's rule
    #[default]
    Density,
    /// Summed drift: all slots grow alike
    Mass,
}

/// Where read weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Read {
    /// The file's lambda
    #[default]
    Given,
    /// The slots' content: route_slope, route_bias and, where the file has them, route_logits
    Routed,
}

/// Which slot column 0 of lambda and of route_logits weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum SlotOrder {
    /// The oldest slot
    #[default]
    Oldest,
    /// The newest slot, the open one
    Newest,
}

impl From<Recurrence> for dla::Recurrence {
    fn from(recurrence: Recurrence) -> Self {
        match recurrence {
            Recurrence::Gated => dla::Recurrence::Gated,
            Recurrence::Delta => dla::Recurrence::GatedDelta,
        }
    }
}

impl From<Merge> for dla::Merge {
    fn from(merge: Merge) -> Self {
        match merge {
            Merge::Density => dla::Merge::Density,
            Merge::Mass => dla::Merge::Mass,
        }
    }
}

impl From<Read> for dla::Read {
    fn from(read: Read) -> Self {
        match read {
            Read::Given => dla::Read::Given,
            Read::Routed => dla::Read::Routed,
        }
    }
}

impl From<SlotOrder> for dla::SlotOrder {
    fn from(order: SlotOrder) -> Self {
        match order {
            SlotOrder::Oldest => dla::SlotOrder::OldestFirst,
            SlotOrder::Newest => dla::SlotOrder::NewestFirst,
        }
    }
}

/// Checks `--capacity` before anything is sized by it.
pub fn check_capacity(capacity: usize) -> anyhow::Result<()> {
    ensure!(
        (1..=MAX_CAPACITY).contains(&capacity),
        "--capacity: expected 1 to {MAX_CAPACITY} slots, got {capacity}"
    );
    Ok(())
}

/// Elements above which a tensor is refused rather than asked of the allocator, which would end the process.
const MAX_ELEMENTS: usize = 1 << 33;

/// Checks that a tensor of these extents, which the call will make, is of a size that can be meant.
pub fn check_size(name: &str, layout: &str, extents: &[usize]) -> anyhow::Result<()> {
    let elements = extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    ensure!(
        elements.is_some_and(|elements| elements <= MAX_ELEMENTS),
        "{name}: expected {layout} of at most 2^33 elements, got {extents:?}"
    );
    Ok(())
}

/// Options of `dla run`.
#[derive(Debug, Clone, clap::Args)]
pub struct OptionArgs {
    /// How a slot's state evolves
    #[arg(long, value_enum, default_value_t)]
    pub recurrence: Recurrence,
    /// Most slots held at once, 1 to 64
    #[arg(long, value_name = "M", default_value_t = 30)]
    pub capacity: usize,
    /// Drift (0 to 2) from which a token opens a slot: one number, or one per value head with commas
    #[arg(
        long,
        value_name = "X[,X...]",
        default_value = "0.6",
        value_delimiter = ',',
        num_args = 1,
        allow_negative_numbers = true
    )]
    pub tau: Vec<f32>,
    /// Which neighbours merge when all slots are held
    #[arg(long, value_enum, default_value_t)]
    pub merge: Merge,
    /// Where read weights come from
    #[arg(long, value_enum, default_value_t)]
    pub read: Read,
    /// Which slot column 0 of lambda and of route_logits weighs
    #[arg(long, value_enum, default_value_t)]
    pub slot_order: SlotOrder,
    /// Factor of q in the read [default: dk^-1/2]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub scale: Option<f32>,
    /// Divide every q and k by sqrt(|x|^2 + 1e-6) first
    #[arg(long)]
    pub qk_l2norm: bool,
    /// Soft boundaries in the backward: width of the sigmoid around tau, in units of drift
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Carry the gradient of the drift on into k, v and g
    #[arg(long, requires = "temperature")]
    pub through_drift: bool,
}

impl OptionArgs {
    /// The library's options.
    pub fn options(&self) -> Options {
        Options {
            recurrence: self.recurrence.into(),
            capacity: self.capacity,
            tau: match self.tau[..] {
                [tau] => Tau::PerCall(tau),
                _ => Tau::PerHead(self.tau.clone()),
            },
            merge: self.merge.into(),
            read: self.read.into(),
            slot_order: self.slot_order.into(),
            scale: self.scale,
            qk_l2norm: self.qk_l2norm,
            soft: self.temperature.map(|temperature| Soft { temperature, through_drift: self.through_drift }),
        }
    }
}
