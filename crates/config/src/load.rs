//! Finding and reading the files.

use crate::Places;
use crate::error::{ConfigError, Position};
use crate::keys::{self, Key, Section};
use crate::table::KEYS;
use crate::types::{NetworkModel, SandboxConfig};
use crate::value::{Entry, Value};
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Environment variable that names the configuration file.
pub const CONFIG_ENV: &str = "KATA_CONF_FILE";

/// Reads the configuration of this program: the file `named` on the command line, else that
/// of [`CONFIG_ENV`], else the first of the usual places; without any, the built-in defaults.
/// Each may be accompanied by drop-ins, `config.d/*.toml` beside it, which win over it.
///
/// # Errors
/// When a file cannot be read or is not right; unknown keys are only warned of.
pub fn load(named: Option<&Path>) -> Result<SandboxConfig, ConfigError> {
    let from_env = std::env::var_os(CONFIG_ENV).filter(|v| !v.is_empty()).map(PathBuf::from);
    let named = named.map(Path::to_owned).or(from_env);
    load_from(named.as_deref(), &Places::of_this_program())
}

/// The same with places of the caller's choice and no regard to the environment.
///
/// # Errors
/// See [`load`].
pub fn load_from(named: Option<&Path>, places: &Places) -> Result<SandboxConfig, ConfigError> {
    let config = SandboxConfig::built_in(places);
    let mut reader = Reader { config, ours: false, other: None };
    let file = match named {
        Some(path) => Some(path.to_owned()),
        None => places.configurations().find(|path| path.exists()),
    };
    if let Some(file) = file {
        let drop_ins = drop_ins(&file)?;
        for path in std::iter::once(file).chain(drop_ins) {
            let failed = |source| ConfigError::Read { path: path.clone(), source };
            let text = std::fs::read_to_string(&path).map_err(failed)?;
            reader.read(&path, &text)?;
            reader.config.sources.push(path);
        }
    }
    reader.finish()
}

/// Drop-ins of a file, in order: those beside the file it links to, then those beside it.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let real = std::fs::canonicalize(file)
        .map_err(|source| ConfigError::Read { path: file.to_owned(), source })?;
    let dir = |path: &Path| path.parent().map(|dir| dir.join("config.d"));
    let named = dir(file).map(|dir| std::fs::canonicalize(&dir).unwrap_or(dir));
    let mut dirs: Vec<PathBuf> = dir(&real).into_iter().chain(named).collect();
    dirs.dedup();
    let mut out = Vec::new();
    for dir in dirs {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        let mut files: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "toml") && path.is_file())
            .collect();
        files.sort();
        out.extend(files);
    }
    Ok(out)
}

/// Reads files into a configuration, one after the other.
struct Reader {
    config: SandboxConfig,
    /// `[hypervisor.qemu]` was there.
    ours: bool,
    /// The first section of another hypervisor.
    other: Option<(Position, String)>,
}

impl Reader {
    fn read(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let file = Source { path, text };
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            at: file.position(error.span().map_or(0, |span| span.start)),
            message: error.message().trim().to_owned(),
        })?;
        for (name, value) in table.get_ref() {
            let at = file.position(name.span().start);
            match (name.get_ref().as_ref(), value.get_ref()) {
                ("runtime", DeValue::Table(keys)) => self.keys(&file, Section::Runtime, keys)?,
                ("factory", DeValue::Table(keys)) => self.keys(&file, Section::Factory, keys)?,
                (name @ ("hypervisor" | "agent"), DeValue::Table(kinds)) => {
                    self.kinds(&file, name, kinds)?;
                }
                (name, _) => self.unknown(&at, name),
            }
        }
        Ok(())
    }

    /// Sections with a second name: `[hypervisor.qemu]`, `[agent.kata]`.
    fn kinds(&mut self, file: &Source, name: &str, kinds: &DeTable) -> Result<(), ConfigError> {
        for (kind, value) in kinds {
            let at = file.position(kind.span().start);
            let full = format!("{name}.{}", kind.get_ref());
            let section = Section::ALL.into_iter().find(|section| section.name() == full);
            match (section, value.get_ref()) {
                (Some(section), DeValue::Table(keys)) => {
                    self.ours |= section == Section::Hypervisor;
                    self.keys(file, section, keys)?;
                }
                (None, DeValue::Table(_)) if name == "hypervisor" => {
                    self.other.get_or_insert((at, full));
                }
                _ => self.unknown(&at, &full),
            }
        }
        Ok(())
    }

    fn keys(&mut self, file: &Source, section: Section, keys: &DeTable) -> Result<(), ConfigError> {
        for (name, value) in keys {
            let full = format!("{}.{}", section.name(), name.get_ref());
            match Key::find(section, name.get_ref()) {
                None => self.unknown(&file.position(name.span().start), &full),
                Some(key) => {
                    let at = file.position(value.span().start);
                    let value = Value::from_toml(value.get_ref());
                    keys::set(&mut self.config, key, &Entry { at, key: &full, value })?;
                }
            }
        }
        Ok(())
    }

    fn unknown(&mut self, at: &Position, full: &str) {
        let candidates = KEYS.iter().map(Key::full);
        let sections = Section::ALL.iter().map(|section| section.name().to_owned());
        let hint = match nearest(full, candidates.chain(sections)) {
            Some(known) => format!("; did you mean {known}?"),
            None => String::new(),
        };
        self.config.warnings.push(format!("{at}: unknown key {full} has no effect{hint}"));
    }

    /// What only the whole can tell.
    fn finish(mut self) -> Result<SandboxConfig, ConfigError> {
        match self.other {
            Some((at, key)) if !self.ours => {
                let why = "the only hypervisor so far is QEMU: use [hypervisor.qemu]".to_owned();
                return Err(ConfigError::Refused { at, key, why });
            }
            Some((at, key)) => self
                .config
                .warnings
                .push(format!("{at}: section [{key}] has no effect: [hypervisor.qemu] is used")),
            None => {}
        }
        self.config.settle()?;
        Ok(self.config)
    }
}

impl SandboxConfig {
    /// Replaces "the default" by the default, and warns of what is asked for in vain.
    /// After the files, and again after annotations.
    pub(crate) fn settle(&mut self) -> Result<(), ConfigError> {
        let hypervisor = &mut self.hypervisor;
        if hypervisor.default_vcpus == 0 {
            hypervisor.default_vcpus = 1;
        }
        if hypervisor.default_memory == 0 {
            hypervisor.default_memory = 2048;
        }
        if self.runtime.disable_new_netns
            && self.runtime.internetworking_model != NetworkModel::None
        {
            let model = self.runtime.internetworking_model;
            return Err(ConfigError::Conflict {
                keys: "runtime.disable_new_netns and runtime.internetworking_model",
                problem: format!(
                    "the host's own interfaces cannot be given to a VM by {model}: use \"none\", or \
                     leave disable_new_netns out"
                ),
            });
        }
        Ok(())
    }

    /// Makes sure that what every sandbox is made of is there.
    ///
    /// # Errors
    /// Names the first file that is not, and how to get it.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        let h = &self.hypervisor;
        let install = "install the package (Debian: qemu-system-x86), or set `path` in \
                       [hypervisor.qemu]";
        let guest = "`make install` puts one there, or set `kernel` and `initrd` in \
                     [hypervisor.qemu]";
        let firmware = "correct `firmware` in [hypervisor.qemu], or leave it out";
        let files = [
            ("hypervisor", Some(&h.path), install),
            ("guest kernel", Some(&h.kernel), guest),
            ("guest initramfs", Some(&h.initrd), guest),
            ("firmware", h.firmware.as_ref(), firmware),
        ];
        for (what, path, hint) in files {
            if let Some(path) = path.filter(|path| !path.is_file()) {
                return Err(ConfigError::Missing { what, path: path.clone(), hint });
            }
        }
        Ok(())
    }
}

/// A file's text, to tell places in it.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn position(&self, offset: usize) -> Position {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Position::File {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
        }
    }
}

/// The candidate that is most like the name, if any is rather like it. What comes before the
/// last dot counts, too, but does not make names alike.
pub(crate) fn nearest(name: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    let last = name.rsplit('.').next().unwrap_or(name);
    candidates
        .map(|candidate| (distance(name, &candidate), candidate))
        .min()
        .filter(|(distance, _)| *distance <= 4 && *distance * 3 <= last.len())
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    // Names are short; a long text is like none of them.
    if a.len() > 200 {
        return a.len();
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
