//! Messages in the shapes that engines read: logrus text on stderr, or logrus JSON lines in
//! the file of `--log` (containerd shows its last error line to the user).

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `time="…" level=… msg="…"`
    Text,
    /// `{"level":…,"msg":…,"time":…}`
    Json,
}

/// Sends all messages to `file`, or to stderr. Returns whether they go to a file.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(file: Option<&Path>, format: Format, level: LevelFilter) -> io::Result<bool> {
    let file =
        file.filter(|path| !path.as_os_str().is_empty() && *path != Path::new("/dev/stderr"));
    let builder = tracing_subscriber::fmt().with_max_level(level).event_format(Logrus(format));
    // A second start (tests) keeps the first.
    match file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let _ = builder.with_writer(Mutex::new(file)).try_init();
        }
        None => {
            let _ = builder.with_writer(io::stderr).try_init();
        }
    }
    Ok(file.is_some())
}

struct Logrus(Format);

impl<S, N> FormatEvent<S, N> for Logrus
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message::default();
        event.record(&mut message);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            _ => "debug",
        };
        writer.write_str(&line(self.0, level, &message.0))
    }
}

#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

fn line(format: Format, level: &str, message: &str) -> String {
    let time = crate::time::rfc3339(SystemTime::now());
    match format {
        Format::Text => format!("time={time:?} level={level} msg={message:?}\n"),
        Format::Json => {
            let line = serde_json::json!({"level": level, "msg": message, "time": time});
            format!("{line}\n")
        }
    }
}

/// Says the last words of a failed command: to the log, and when that is a file also to stderr.
pub fn fatal(error: &anyhow::Error, to_file: bool) {
    let text = format!("{error:#}");
    tracing::error!("{text}");
    if to_file {
        // Nobody may be listening; there is nothing else to tell it to.
        let _ = writeln!(io::stderr(), "{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_hold_what_containerd_reads() {
        let text = line(Format::Json, "error", "no \"x\"\nhere");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "no \"x\"\nhere");
        assert!(value["time"].as_str().unwrap().ends_with('Z'));
        assert_eq!(text.matches('\n').count(), 1);
    }

    #[test]
    fn text_lines_look_like_logrus() {
        let text = line(Format::Text, "error", "container does not exist");
        assert!(text.starts_with("time=\"20"), "{text}");
        assert!(text.ends_with("level=error msg=\"container does not exist\"\n"), "{text}");
    }
}
