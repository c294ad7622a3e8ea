//! The command line that containerd 1.6 to 2.x uses: flags of Go's kind, then the action.

use anyhow::{Context, bail};
use std::path::PathBuf;

/// What the program is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Find or start the server of a container.
    Start,
    /// Undo what is left of a container.
    Delete,
}

/// The command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub namespace: String,
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// Empty: the working directory.
    pub bundle: PathBuf,
    pub debug: bool,
    pub version: bool,
    pub info: bool,
    pub action: Option<Action>,
}

impl Flags {
    /// Reads the words after the program's name.
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut flags = Self::default();
        let mut words = words.peekable();
        while let Some(word) = words.next_if(|word| word.starts_with('-')) {
            let name = word.strip_prefix("--").unwrap_or(&word[1..]);
            let (name, given) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = given.is_none_or(|value| value != "false" && value != "0");
                continue;
            }
            let value =
                || given.or_else(|| words.next()).with_context(|| format!("{word} needs a value"));
            match name {
                "namespace" => flags.namespace = value()?,
                "id" => flags.id = value()?,
                "address" => flags.address = value()?,
                "bundle" => flags.bundle = value()?.into(),
                // Where to listen and whom to tell is ours to find; these are of old shims.
                "publish-binary" | "socket" | "debug-socket" => drop(value()?),
                _ => bail!("flag {word} is unknown"),
            }
        }
        flags.action = match words.next().as_deref() {
            None => None,
            Some("start") => Some(Action::Start),
            Some("delete") => Some(Action::Delete),
            Some(other) => bail!("action {other:?} is unknown; known are start and delete"),
        };
        Ok(flags)
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Flags> {
        Flags::parse(line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    #[test]
    fn containerds_command_lines_are_read() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!((start.namespace.as_str(), start.id.as_str()), ("k8s.io", "c1"));
        assert_eq!(start.action, Some(Action::Start));
        assert!(start.debug && !start.info);
        let delete = parse("--namespace=n -id=c1 -bundle /b -debug=false delete").unwrap();
        assert_eq!(delete.bundle, PathBuf::from("/b"));
        assert_eq!((delete.action, delete.debug), (Some(Action::Delete), false));
        assert!(parse("-info").unwrap().info && parse("-v").unwrap().version);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for line in ["-colour red start", "-id", "-id c1 stop"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
