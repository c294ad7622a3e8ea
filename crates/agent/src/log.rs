//! The agent's log: lines on the guest's console.

use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::{console, machine};

/// Longest line, bytes. What a container makes us log must not flood the console.
const LINE: usize = 1024;

/// Logs from now on; `debug` also logs decisions.
pub fn init(debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    // Only a second call fails, and then a log is there.
    let _ = tracing::subscriber::set_global_default(Console { level });
}

/// Writes events as they come. Spans are not kept: the guest has no use for them.
struct Console {
    level: Level,
}

impl Subscriber for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let stamp = machine::boottime_ns() / 1000;
        let (seconds, micros) = (stamp / 1_000_000, stamp % 1_000_000);
        let level = level(*event.metadata().level());
        let mut line = Line(format!("[{seconds:5}.{micros:06}] kata-agent: {level}"));
        event.record(&mut line);
        let mut text = line.0;
        if text.len() > LINE {
            let end = (0..=LINE).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text.truncate(end);
        }
        text.push('\n');
        console::say(&text);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error:",
        Level::WARN => "warning:",
        Level::INFO => "info:",
        _ => "debug:",
    }
}

/// A line under construction. Control characters are escaped, so that no guest process
/// can write a second line or steer a terminal.
struct Line(String);

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.0, " {}", value.escape_debug()),
            name => write!(self.0, " {name}={}", value.escape_debug()),
        };
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}
