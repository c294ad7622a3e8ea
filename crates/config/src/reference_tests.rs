use super::*;
use crate::{Places, load_from};
use std::path::{Path, PathBuf};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Compares a committed file with what the tables say; with UPDATE_DOCS, writes it.
fn check(path: &str, text: &str) {
    let path = repository(path);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(
        committed == text,
        "{} is not what the tables say: run UPDATE_DOCS=1 cargo test -p kata-config",
        path.display()
    );
}

#[test]
fn the_committed_reference_is_current() {
    check("docs/configuration.md", &reference());
}

#[test]
fn the_committed_default_file_is_current() {
    check("deploy/configuration.toml", &default_file());
}

#[test]
fn the_default_file_changes_nothing_and_warns_of_nothing() {
    let places = Places::default();
    let built_in = load_from(None, &places).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("configuration.toml");
    let commented_in: String = default_file()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert!(commented_in.contains("\ndefault_memory = 2048\n"));
    for text in [default_file(), commented_in] {
        std::fs::write(&path, text).unwrap();
        let mut config = load_from(Some(&path), &places).unwrap();
        assert_eq!(config.warnings, [""; 0]);
        assert_eq!(std::mem::take(&mut config.sources), std::slice::from_ref(&path));
        assert_eq!(format!("{config:?}"), format!("{built_in:?}"));
    }
}

#[test]
fn every_key_and_annotation_is_there_once_and_every_annotation_has_its_key() {
    let mut names: Vec<String> = KEYS.iter().map(Key::full).collect();
    names.extend(ANNOTATIONS.iter().map(Annotation::full));
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
    for annotation in ANNOTATIONS {
        assert!(Key::find(annotation.section, annotation.key).is_some(), "{}", annotation.full());
    }
    let reference = reference();
    assert!(names.iter().all(|name| reference.contains(name.rsplit('.').next().unwrap())));
}
