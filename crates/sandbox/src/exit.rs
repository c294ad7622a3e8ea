//! The exit code that a failed start stands for, beside the error's code and text.
//!
//! Callers tell "no such program" (127) from "it cannot be executed" (126) by it, as shells and
//! Docker do, and not by words.

use ttrpc::proto::{Any, Status};

/// Type of the detail.
const TYPE_URL: &str = "kata/exit-code";

/// Adds the exit code to an error's status.
pub(crate) fn set_exit_code(status: &mut Status, code: u8) {
    let detail = Any { type_url: TYPE_URL.to_owned(), value: vec![code], ..Default::default() };
    status.details.push(detail);
}

/// The exit code in an error's status, if there is one.
pub fn exit_code(status: &Status) -> Option<u8> {
    let detail = status.details.iter().find(|detail| detail.type_url == TYPE_URL)?;
    detail.value.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_travels_with_its_error() {
        let mut status = ttrpc::get_status(ttrpc::Code::UNKNOWN, "no such program");
        assert_eq!(exit_code(&status), None);
        set_exit_code(&mut status, 127);
        assert_eq!(exit_code(&status), Some(127));
    }

    #[test]
    fn an_empty_detail_is_no_exit_code() {
        let mut status = Status::new();
        status.details.push(Any { type_url: TYPE_URL.to_owned(), ..Default::default() });
        assert_eq!(exit_code(&status), None);
    }
}
