//! How containerd names a stream: a path, or a URI.

use kata_sandbox::SandboxError;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A named stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Uri {
    /// Nobody wants it.
    None,
    /// A FIFO.
    Fifo(PathBuf),
    /// A file, to be appended to.
    File(PathBuf),
    /// A program that reads it.
    Binary {
        program: PathBuf,
        /// Keys and values of the URI's query, one after the other.
        args: Vec<OsString>,
    },
}

impl Uri {
    /// Reads the name.
    pub(crate) fn parse(text: &str) -> Result<Self, SandboxError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(if text.is_empty() { Self::None } else { Self::Fifo(text.into()) });
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path));
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" => {
                let mut args = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    args.push(decode(&key.replace('+', " ")));
                    if !value.is_empty() {
                        args.push(decode(&value.replace('+', " ")));
                    }
                }
                Ok(Self::Binary { program: path, args })
            }
            _ => Err(SandboxError::Stream(text.to_owned())),
        }
    }
}

/// Undoes `%20` and the like; what is none stays.
fn decode(text: &str) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let byte = digits
            .filter(|_| first == b'%')
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 16).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_scheme_is_told_apart() {
        assert_eq!(Uri::parse("").unwrap(), Uri::None);
        assert_eq!(Uri::parse("/a/b").unwrap(), Uri::Fifo("/a/b".into()));
        assert_eq!(Uri::parse("fifo:///a").unwrap(), Uri::Fifo("/a".into()));
        assert_eq!(Uri::parse("file:///a%20b").unwrap(), Uri::File("/a b".into()));
        let binary = Uri::parse("binary:///bin/log?id=x+y&flag&z=%2f").unwrap();
        let args = ["id", "x y", "flag", "z", "/"].map(OsString::from).to_vec();
        assert_eq!(binary, Uri::Binary { program: "/bin/log".into(), args });
        assert!(Uri::parse("npipe:////./x").is_err());
    }

    proptest! {
        #[test]
        fn any_name_is_read_or_refused(text: String) {
            let _ = Uri::parse(&text);
        }
    }
}
