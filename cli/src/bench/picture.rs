//! A drawing as a file: SVG, or PNG where its name ends so.

use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use crate::output::Output;

/// What can be drawn on either.
pub trait Drawing {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    fn draw<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>;
}

/// A picture to come.
pub struct Picture {
    path: PathBuf,
    output: Output,
}

impl Picture {
    /// Checks that `path` can be written, before any work is done for it.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        Ok(Picture { path: path.to_owned(), output: Output::at(path)? })
    }

    pub fn write(self, drawing: &impl Drawing) -> anyhow::Result<()> {
        font();
        let png = self.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        let bytes = if png { png_of(drawing) } else { svg_of(drawing) };
        let bytes = bytes.with_context(|| format!("{}: cannot be drawn", self.path.display()))?;
        self.output.write(&bytes)
    }
}

/// The font of both, carried along: what a machine has installed changes no picture.
fn font() {
    static ONCE: Once = Once::new();
    // The bytes are those of a font, so it is not refused; text without one would be an error of drawing.
    ONCE.call_once(|| drop(register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())));
}

fn svg_of(drawing: &impl Drawing) -> anyhow::Result<Vec<u8>> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, drawing.size()).into_drawing_area();
    drawing.draw(&root).and_then(|()| root.present()).map_err(|error| anyhow!("{error}"))?;
    drop(root);
    Ok(svg.into_bytes())
}

fn png_of(drawing: &impl Drawing) -> anyhow::Result<Vec<u8>> {
    let (width, height) = drawing.size();
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    drawing.draw(&root).and_then(|()| root.present()).map_err(|error| anyhow!("{error}"))?;
    drop(root);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}
