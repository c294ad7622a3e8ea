//! Names of signals, as `kill` takes them.

use anyhow::{Result, bail};
use nix::sys::signal::Signal;

/// A number, or a name with or without `SIG`, in any case.
///
/// # Errors
/// In runc's words.
pub fn parse(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (0..=64).contains(&number) {
            return Ok(number);
        }
        bail!("unknown signal {text:?}");
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    match name.strip_prefix("RTMIN").map(|offset| (offset, offset.strip_prefix('+'))) {
        Some(("", _)) => return Ok(34),
        Some((_, Some(offset))) if offset.parse::<i32>().is_ok_and(|n| (0..=30).contains(&n)) => {
            return Ok(34 + offset.parse::<i32>().unwrap_or(0));
        }
        _ => {}
    }
    match format!("SIG{name}").parse::<Signal>() {
        Ok(signal) => Ok(signal as i32),
        Err(_) => bail!("unknown signal {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_in_any_shape_are_known() {
        for (text, number) in
            [("9", 9), ("KILL", 9), ("SIGKILL", 9), ("sigterm", 15), ("usr1", 10), ("RTMIN+3", 37)]
        {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "SIG", "FOO", "-9", "65", "RTMIN+99", "SIGRTMIN-1"] {
            assert!(parse(text).is_err(), "{text} was accepted");
        }
    }
}
