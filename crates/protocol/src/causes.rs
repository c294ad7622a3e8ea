//! Errors as text: between host and guest, and to engines, an error is one line.

use std::error::Error;

/// An error with its causes, in one line. A cause that its error has quoted already is not
/// told again.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    enum Sample {
        #[error("cannot read the file")]
        Silent(#[source] io::Error),
        #[error("cannot read the file: {0}")]
        Quoting(#[source] io::Error),
        #[error("no container")]
        Outer(#[source] Box<Sample>),
    }

    #[test]
    fn each_cause_is_told_once() {
        let denied = || io::Error::from_raw_os_error(1);
        let told = "cannot read the file: Operation not permitted (os error 1)";
        assert_eq!(chain(&Sample::Silent(denied())), told);
        assert_eq!(chain(&Sample::Quoting(denied())), told);
        let outer = Sample::Outer(Box::new(Sample::Silent(denied())));
        assert_eq!(chain(&outer), format!("no container: {told}"));
    }
}
