//! Documentation made from the tables.

use crate::annotations::{ANNOTATIONS, Annotation, Gate, Parse};
use crate::keys::{Key, Kind, Section};
use crate::table::KEYS;
use std::fmt::Write;

/// Text of `docs/configuration.md`: every key and every annotation.
pub fn reference() -> String {
    let mut out = String::from(HEAD);
    for section in Section::ALL {
        let _ = writeln!(
            out,
            "\n## `[{}]`\n\n| key | takes | default | |\n|---|---|---|---|",
            section.name()
        );
        for key in KEYS.iter().filter(|key| key.section == section && has_effect(key)) {
            let default = match key.default {
                "" => "see right".to_owned(),
                text => format!("`{text}`"),
            };
            let _ = writeln!(
                out,
                "| `{}` | {} | {default} | {} |",
                key.name,
                takes(&key.kind),
                key.doc
            );
        }
    }
    out.push_str(ANNOTATIONS_HEAD);
    for annotation in ANNOTATIONS {
        let _ = writeln!(out, "| `{}` | {} |", annotation.full(), remark(annotation));
    }
    out.push_str(KATA_HEAD);
    for key in KEYS.iter().filter(|key| !has_effect(key)) {
        let result = match key.kind {
            Kind::Refused => "refused when set",
            Kind::Missing => "warning when set",
            _ => "ignored",
        };
        let _ = writeln!(out, "| `{}` | {result} | {} |", key.full(), sentence(key.doc));
    }
    out
}

const HEAD: &str = "\
# Configuration

<!-- Made from the tables in crates/config; change them, then run
     UPDATE_DOCS=1 cargo test -p kata-config -->

The configuration is TOML. It is read from the first of
1. the file named by `--config`,
2. the file named by the environment variable `KATA_CONF_FILE`,
3. `/etc/kata-containers/configuration.toml`,
4. `share/defaults/kata-containers/configuration.toml` under the prefix of the running program,
   then under `/usr`.

Files `config.d/*.toml` beside it are read after it, in the order of their names, and win over
it. Without any file the built-in defaults hold. Configurations of Kata Containers can be used
as they are: keys that mean nothing here are accepted (see the end), unknown ones are warned of.

## Size of a VM

* **Memory**: without a memory limit, `default_memory`. With one, the limit plus 128 MiB and a
  64th of the limit for the guest itself, at least 256 MiB; a pod gets at least
  `default_memory`, since its limit says nothing of containers that have none. The guest's
  memory is taken from the host only as it is touched.
* **vCPUs**: `default_vcpus`, or the CPU limit (quota / period) rounded up if that is more. A
  CPU limit never makes a VM smaller.

Both are capped by `default_maxmemory` and `default_maxvcpus`, and by what the host has.

Limits that rise later (`docker update`), or come with a pod's further containers, make the VM grow
by the same rule: memory in steps of 128 MiB, vCPUs under KVM only. A VM never shrinks.
";

const ANNOTATIONS_HEAD: &str = "
## Annotations

A container or pod may change some keys for itself by annotations. Most need the
administrator's leave: the last part of the name has to match one of the regular expressions in
`enable_annotations` (each matches the whole name: `\"default_.*\"`, not `\"default\"`). One that
is not enabled is an error. Values have the same bounds as in the file.
`io.katacontainers.config_path` is not taken.

| annotation | |
|---|---|
";

const KATA_HEAD: &str = "
## Keys of Kata Containers without effect

| key | | why |
|---|---|---|
";

fn has_effect(key: &Key) -> bool {
    !matches!(key.kind, Kind::Moot | Kind::Missing | Kind::Refused)
}

fn takes(kind: &Kind) -> String {
    match kind {
        Kind::Flag(_) => "true or false".to_owned(),
        Kind::Text(_) => "text".to_owned(),
        Kind::Path(_) => "absolute path".to_owned(),
        Kind::Texts(_) => "list of texts".to_owned(),
        Kind::Number(_, least, most) => format!("{least} to {most}"),
        Kind::Choice(choices, _) => {
            choices.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(", ")
        }
        Kind::Special(expects, _) => (*expects).to_owned(),
        Kind::Moot | Kind::Missing | Kind::Refused => String::new(),
    }
}

fn remark(annotation: &Annotation) -> String {
    let key = format!("sets `{}.{}`", annotation.section.name(), annotation.key);
    let how = match annotation.parse {
        Parse::Plain => key,
        Parse::Path(_) => format!("{key}; the path must match a glob of the key for valid paths"),
        Parse::AddWords => format!("adds to `{}.{}`", annotation.section.name(), annotation.key),
        Parse::Switches => format!("{key}; switches only, no files"),
    };
    match annotation.gate {
        Gate::Listed => how,
        Gate::Open => format!("{how}; needs no leave"),
    }
}

/// With a capital and a full stop.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    let rest = chars.as_str().trim_end_matches('.');
    format!("{first}{rest}.")
}

/// Text of `deploy/configuration.toml`: every key that has an effect, with its default,
/// commented out.
pub fn default_file() -> String {
    let mut out = String::from(FILE_HEAD);
    for section in Section::ALL {
        let _ = writeln!(out, "\n[{}]", section.name());
        for key in KEYS.iter().filter(|key| key.section == section && has_effect(key)) {
            out.push('\n');
            for line in wrapped(key.doc) {
                let _ = writeln!(out, "# {line}");
            }
            if let Kind::Choice(choices, _) = key.kind {
                let _ = writeln!(out, "# One of: {}", choices.join(", "));
            }
            let default = if key.default.is_empty() { "\"\"" } else { key.default };
            let _ = writeln!(out, "#{} = {default}", key.name);
        }
    }
    out
}

const FILE_HEAD: &str = "\
# Configuration of the sandboxes.
#
# Every line that is commented out shows the default. Files config.d/*.toml beside this one
# win over it. See docs/configuration.md for all keys, annotations, and how VMs are sized.
";

/// Lines of at most 90 characters.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let full = lines.last().is_some_and(|l| !l.is_empty() && l.len() + word.len() >= 90);
        if full {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
