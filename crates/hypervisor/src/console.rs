//! The guest's console: kept for the moment something goes wrong.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes kept.
const CAPACITY: usize = 64 << 10;
/// Longest line given out, characters.
const LINE: usize = 400;
/// How a kernel's panic starts.
const PANIC: &str = "Kernel panic";

/// The last part of what a guest wrote on its console. Clones share it.
///
/// The guest may write anything: no more than a bound is kept, and nothing that could
/// move a cursor or forge a line of a log is given out.
#[derive(Clone, Debug, Default)]
pub struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// The last `count` lines that are not empty, oldest first.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let text = self.text();
        let mut lines: Vec<String> = text
            .rsplit(['\n', '\r'])
            .map(sanitise)
            .filter(|line| !line.is_empty())
            .take(count)
            .collect();
        lines.reverse();
        lines
    }

    /// The line in which the guest's kernel said that it panicked, if it did.
    pub fn panic_line(&self) -> Option<String> {
        let text = self.text();
        let line = text.split(['\n', '\r']).find(|line| line.contains(PANIC))?;
        // Without the time stamp: "[    0.123456] Kernel panic - …".
        line.find(PANIC).map(|start| sanitise(&line[start..]))
    }

    /// Keeps these bytes, and forgets the oldest if there are too many.
    pub(crate) fn push(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        let bytes = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (ring.len() + bytes.len()).saturating_sub(CAPACITY);
        ring.drain(..excess);
        ring.extend(bytes);
    }

    /// Reads the console until its other end is closed.
    pub(crate) async fn follow(self, mut stream: impl AsyncRead + Unpin) {
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    tracing::trace!(text = %String::from_utf8_lossy(&buffer[..length]).escape_debug(), "console");
                    self.push(&buffer[..length]);
                }
            }
        }
    }

    fn text(&self) -> String {
        let mut ring = self.lock();
        String::from_utf8_lossy(ring.make_contiguous()).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What may be shown of a line: no control characters, no escape sequences, not too long.
pub(crate) fn sanitise(line: &str) -> String {
    let mut shown = String::new();
    let mut characters = line.trim_end().chars().peekable();
    let mut count = 0;
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            skip_escape(&mut characters);
            continue;
        }
        let character = if character == '\t' { ' ' } else { character };
        if is_unfit(character) {
            continue;
        }
        if count == LINE {
            shown.push('…');
            break;
        }
        shown.push(character);
        count += 1;
    }
    shown
}

/// Control characters, and those that turn the direction of text.
fn is_unfit(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Skips the rest of a terminal's escape sequence of the common kind, `ESC [ … letter`.
fn skip_escape(characters: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    if characters.next_if_eq(&'[').is_some() {
        while characters.next_if(|c| matches!(c, ' '..='?')).is_some() {}
        characters.next_if(|c| matches!(c, '@'..='~'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_lines_come_oldest_first_without_empty_ones() {
        let console = Console::default();
        console.push(b"one\r\ntwo\r\n\r\nthree");
        assert_eq!(console.last_lines(2), ["two", "three"]);
        assert_eq!(console.last_lines(9), ["one", "two", "three"]);
    }

    #[test]
    fn escape_sequences_are_removed() {
        assert_eq!(sanitise("\u{1b}[1;31mred\u{1b}[0m \u{7}bell\u{1b}c\u{202e}"), "red bellc");
    }

    #[test]
    fn a_panic_is_found_among_other_lines() {
        let console = Console::default();
        assert_eq!(console.panic_line(), None);
        console.push(b"[    0.1] Kernel panic - not syncing: no init\n[ 0.2] CPU: 0\n");
        assert_eq!(console.panic_line().unwrap(), "Kernel panic - not syncing: no init");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn whatever_is_written_stays_bounded_and_harmless(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5000), 0..20),
        ) {
            let console = Console::default();
            for piece in &pieces {
                console.push(piece);
            }
            prop_assert!(console.lock().len() <= CAPACITY);
            for line in console.last_lines(20) {
                prop_assert!(line.chars().count() <= LINE + 1);
                prop_assert!(!line.chars().any(char::is_control));
            }
        }

        #[test]
        fn the_end_of_what_was_written_is_kept(lines in proptest::collection::vec("[a-z]{1,80}", 1..1500)) {
            let console = Console::default();
            for line in &lines {
                console.push(format!("{line}\n").as_bytes());
            }
            let last = console.last_lines(5);
            prop_assert_eq!(&last[..], &lines[lines.len() - last.len()..]);
        }
    }
}
