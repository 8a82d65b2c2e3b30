//! The report as bars.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::picture::Drawing;
use super::{Extents, Report, Row};

const BAR: i32 = 20;
const GAP: i32 = 8;
const TOP: i32 = 64;
const LEFT: i32 = 150;
const RIGHT: i32 = 220;
const WIDTH: i32 = 900;

/// One bar a stage and one a pass, as long as its milliseconds.
pub struct Bars<'a> {
    report: &'a Report,
    rows: Vec<&'a Row>,
}

impl<'a> Bars<'a> {
    pub fn of(report: &'a Report) -> Self {
        // A step is a measure of another size: it stays in the table.
        Bars { report, rows: report.rows.iter().filter(|row| row.pass != "step").collect() }
    }
}

impl Drawing for Bars<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + self.rows.len() as i32 * (BAR + GAP) + GAP) as u32)
    }

    fn draw<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        draw(root, self.report, &self.rows)
    }
}

fn draw<B: DrawingBackend>(
    root: &DrawingArea<B, Shift>,
    report: &Report,
    rows: &[&Row],
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    root.fill(&WHITE)?;
    let style = |size: i32| TextStyle::from(("sans-serif", size).into_font()).color(&BLACK);
    let Extents { batch, time, heads, value_heads, dk, dv } = report.shape;
    let title = format!(
        "{} engine, {} threads: {} {} M = {}, {} reads, {}",
        report.device,
        report.threads,
        report.recurrence,
        report.merge,
        report.capacity,
        report.read,
        report.dtype
    );
    let detail = format!(
        "B,T,H,HV,dk,dv = {batch},{time},{heads},{value_heads},{dk},{dv}; {:.0}% of the tokens open a slot; matrix product {:.0} GFLOP/s",
        100.0 * report.boundary_rate.measured,
        report.ceiling.matmul_gflop_s
    );
    root.draw(&Text::new(title, (GAP, 12), style(20)))?;
    root.draw(&Text::new(detail, (GAP, 36), style(16)))?;

    let longest = rows.iter().map(|row| row.ms).fold(f64::MIN_POSITIVE, f64::max);
    let middle = |h| Pos::new(h, VPos::Center);
    for (i, row) in rows.iter().enumerate() {
        let top = TOP + i as i32 * (BAR + GAP);
        let length = (row.ms / longest * f64::from(WIDTH - LEFT - RIGHT)).round() as i32;
        let color = match (row.pass, row.stage) {
            (_, "all") => RGBColor(90, 90, 90),
            ("forward", _) => RGBColor(38, 110, 180),
            _ => RGBColor(200, 95, 40),
        };
        root.draw(&Rectangle::new([(LEFT, top), (LEFT + length.max(1), top + BAR)], color.filled()))?;
        let label = style(16).pos(middle(HPos::Right));
        root.draw(&Text::new(format!("{} {}", row.pass, row.stage), (LEFT - GAP, top + BAR / 2), label))?;
        let value = style(16).pos(middle(HPos::Left));
        let text = format!("{:.2} ms, {:.1} GFLOP/s", row.ms, row.gflop_s);
        root.draw(&Text::new(text, (LEFT + length + GAP, top + BAR / 2), value))?;
    }
    Ok(())
}
