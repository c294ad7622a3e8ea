//! The ratios of a run as a picture: a bar each, with the bound as a line across it.

use std::fmt::Write;

/// One bar.
pub struct Bar {
    /// What was measured.
    pub label: String,
    /// How many times the peer's.
    pub ratio: f64,
    /// What is promised at most.
    pub bound: Option<f64>,
}

const ROW: f64 = 30.0;
const LEFT: f64 = 380.0;
const WIDTH: f64 = 420.0;
const TOP: f64 = 56.0;

/// An SVG of all bars on one scale that begins at nothing; the peer stands at 1.
pub fn ratios(title: &str, note: &str, bars: &[Bar]) -> String {
    let longest = bars.iter().map(|bar| bar.ratio.max(bar.bound.unwrap_or(0.0)));
    let longest = longest.fold(1.2, f64::max) * 1.05;
    let x = |ratio: f64| LEFT + ratio / longest * WIDTH;
    let bottom = TOP + ROW * bars.len() as f64;
    let (width, height) = (LEFT + WIDTH + 90.0, bottom + 40.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\" font-weight=\"bold\">{}</text>\n\
         <text x=\"16\" y=\"{:.0}\" fill=\"#555555\" font-size=\"11\">{}</text>\n",
        escape(title),
        height - 12.0,
        escape(note),
    );
    for (row, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let good = bar.bound.is_none_or(|bound| bar.ratio <= bound);
        let colour = if good { "#3b7dd8" } else { "#d8743b" };
        // Writing to a String cannot fail.
        let _ = write!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"18\" fill=\"{colour}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.0}\">{:.2} x</text>\n",
            LEFT - 10.0,
            y + 14.0,
            escape(&bar.label),
            x(bar.ratio) - LEFT,
            x(bar.ratio.max(bar.bound.unwrap_or(0.0))) + 8.0,
            y + 14.0,
            bar.ratio,
        );
        if let Some(bound) = bar.bound {
            let at = x(bound);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.0}\" y2=\"{:.0}\" stroke=\"#222222\" \
                 stroke-width=\"2\"/>",
                y - 3.0,
                y + 21.0
            );
        }
    }
    let one = x(1.0);
    let _ = writeln!(
        svg,
        "<line x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"{:.0}\" y2=\"{bottom:.0}\" stroke=\"#888888\" \
         stroke-dasharray=\"4 3\"/>\n\
         <text x=\"{one:.1}\" y=\"{:.0}\" text-anchor=\"middle\" fill=\"#555555\" \
         font-size=\"11\">runc</text>\n</svg>",
        TOP - 8.0,
        TOP - 12.0
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_ratio_and_text_is_escaped() {
        let bar = |ratio, bound| Bar { label: "a < b".to_owned(), ratio, bound };
        let svg = ratios("t", "n", &[bar(2.0, Some(4.0)), bar(1.0, None)]);
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.contains("height=\"18\""))
            .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert_eq!(widths.len(), 2);
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.01, "{widths:?}");
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
    }
}
