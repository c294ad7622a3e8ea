//! Images as tools write them, and as attackers would.

use super::*;
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use tar::{Builder, EntryType, Header};

/// Adds an entry with its name as it is: `tar` itself refuses the names we want.
fn add(tar: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, body: &[u8]) {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header.set_size(body.len() as u64);
    let raw = header.as_mut_bytes();
    raw[..name.len()].copy_from_slice(name.as_bytes());
    raw[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    tar.append(&header, body).unwrap();
}

fn tar(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, name, text) in entries {
        match kind {
            EntryType::Symlink | EntryType::Link => add(&mut tar, *kind, name, text, b""),
            _ => add(&mut tar, *kind, name, "", text.as_bytes()),
        }
    }
    tar.into_inner().unwrap()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest(manifest::hex(&Sha256::digest(bytes)))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

struct Target {
    dir: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::write(dir.path().join("secret"), "host").unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn unpack(&self, bytes: &[u8]) -> Result<()> {
        let root = ConfinedRoot::open(&self.root())?;
        let plain = digest(bytes);
        unpack::layer(Cursor::new(bytes.to_vec()), &plain, &root, &mut unpack::Budget::default())
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }

    fn secret_is_safe(&self) {
        assert_eq!(fs::read_to_string(self.dir.path().join("secret")).unwrap(), "host");
        let names = fs::read_dir(self.dir.path()).unwrap().count();
        assert_eq!(names, 2, "something was made beside the root");
    }
}

const FILE: EntryType = EntryType::Regular;
const DIR: EntryType = EntryType::Directory;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

#[test]
fn a_layer_is_unpacked_with_its_modes_and_links() {
    let target = Target::new();
    target
        .unpack(&tar(&[
            (DIR, "./", ""),
            (DIR, "bin/", ""),
            (FILE, "bin/busybox", "elf"),
            (HARD, "bin/sh", "bin/busybox"),
            (LINK, "etc/link", "../bin/busybox"),
            (FILE, "/absolute", "x"),
        ]))
        .unwrap();
    assert_eq!(target.text("etc/link"), "elf");
    assert_eq!(target.text("absolute"), "x");
    let busybox = fs::metadata(target.root().join("bin/busybox")).unwrap();
    assert_eq!(busybox.nlink(), 2);
    assert_eq!(busybox.permissions().mode() & 0o7777, 0o644);
    assert_eq!(fs::metadata(target.root().join("bin")).unwrap().mtime(), 1_000_000_000);
}

#[test]
fn whiteouts_remove_what_lower_layers_had() {
    let target = Target::new();
    target.unpack(&tar(&[(FILE, "a/one", ""), (FILE, "a/two/x", ""), (FILE, "b/c", "")])).unwrap();
    target
        .unpack(&tar(&[
            (FILE, "a/.wh.two", ""),
            (FILE, "b/new", "n"),
            (FILE, "b/.wh..wh..opq", ""),
        ]))
        .unwrap();
    assert!(target.root().join("a/one").exists());
    assert!(!target.root().join("a/two").exists());
    assert!(!target.root().join("b/c").exists());
    assert_eq!(target.text("b/new"), "n");
}

#[test]
fn a_whiteout_of_the_parent_does_nothing() {
    let target = Target::new();
    target
        .unpack(&tar(&[(FILE, "a/x", ""), (FILE, "a/.wh...", ""), (FILE, "a/.wh..", "")]))
        .unwrap();
    target.unpack(&tar(&[(FILE, ".wh...", ""), (FILE, ".wh.", "")])).unwrap();
    target.secret_is_safe();
    assert!(target.root().join("a/x").exists());
}

#[test]
fn paths_with_dots_are_refused() {
    for name in ["../secret", "a/../../secret", "/../secret", ".."] {
        let target = Target::new();
        assert!(target.unpack(&tar(&[(FILE, name, "evil")])).is_err(), "{name}");
        target.secret_is_safe();
    }
}

#[test]
fn links_lead_nowhere_outside() {
    let target = Target::new();
    let outside = target.dir.path().display().to_string();
    // The link is legal; what is written through it stays inside.
    let result = target.unpack(&tar(&[(LINK, "out", &outside), (FILE, "out/secret", "evil")]));
    target.secret_is_safe();
    assert!(result.is_err() || target.root().join(outside.trim_start_matches('/')).exists());

    let target = Target::new();
    let _ = target.unpack(&tar(&[(LINK, "up", "../.."), (FILE, "up/secret", "evil")]));
    target.secret_is_safe();

    let target = Target::new();
    let _ = target.unpack(&tar(&[(LINK, "secret", "../secret"), (FILE, "secret", "evil")]));
    target.secret_is_safe();
    assert_eq!(target.text("secret"), "evil");
}

#[test]
fn a_link_in_a_lower_layer_is_followed_inside_the_root() {
    let target = Target::new();
    target.unpack(&tar(&[(DIR, "usr/lib/", ""), (LINK, "lib", "/usr/lib")])).unwrap();
    target.unpack(&tar(&[(FILE, "lib/libc.so", "c")])).unwrap();
    assert_eq!(target.text("usr/lib/libc.so"), "c");
}

#[test]
fn hard_links_to_the_host_are_refused() {
    for name in ["../secret", "/../secret", "missing", "."] {
        let target = Target::new();
        assert!(target.unpack(&tar(&[(HARD, "x", name)])).is_err(), "{name}");
        target.secret_is_safe();
    }
    let target = Target::new();
    let outside = target.dir.path().display().to_string();
    let through = tar(&[(LINK, "out", &outside), (HARD, "x", "out/secret")]);
    assert!(target.unpack(&through).is_err());
}

#[test]
fn device_nodes_are_left_out() {
    let target = Target::new();
    target
        .unpack(&tar(&[(EntryType::Block, "dev/sda", ""), (EntryType::Char, "dev/mem", "")]))
        .unwrap();
    assert!(!target.root().join("dev/sda").exists());
    assert!(!target.root().join("dev/mem").exists());
}

#[test]
fn a_file_that_claims_to_be_huge_is_refused() {
    let mut header = Header::new_gnu();
    header.set_entry_type(FILE);
    header.set_path("big").unwrap();
    header.set_size(1 << 50);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let error = Target::new().unpack(header.as_bytes()).unwrap_err();
    assert!(format!("{error:#}").contains("too large"), "{error:#}");
}

#[test]
fn an_archive_that_is_cut_short_is_refused() {
    let mut bytes = tar(&[(FILE, "a", "0123456789")]);
    bytes.truncate(515);
    assert!(Target::new().unpack(&bytes).is_err());
}

#[test]
fn a_changed_layer_is_refused() {
    let target = Target::new();
    let root = ConfinedRoot::open(&target.root()).unwrap();
    let bytes = tar(&[(FILE, "a", "x")]);
    let other = digest(b"other");
    let mut budget = unpack::Budget::default();
    let error = unpack::layer(Cursor::new(bytes), &other, &root, &mut budget).unwrap_err();
    assert!(error.to_string().contains("it was changed"), "{error}");
}

#[test]
fn compressed_layers_are_told_by_their_first_bytes() {
    let target = Target::new();
    let root = ConfinedRoot::open(&target.root()).unwrap();
    let bytes = tar(&[(FILE, "a", "x")]);
    let mut budget = unpack::Budget::default();
    unpack::layer(Cursor::new(gzip(&bytes)), &digest(&bytes), &root, &mut budget).unwrap();
    assert_eq!(target.text("a"), "x");
    let other = tar(&[(FILE, "b", "y")]);
    unpack::layer(Cursor::new(zstd(&other)), &digest(&other), &root, &mut budget).unwrap();
    assert_eq!(target.text("b"), "y");
    let broken = Cursor::new(vec![0x28, 0xb5, 0x2f, 0xfd, 0]);
    assert!(unpack::layer(broken, &digest(b""), &root, &mut budget).is_err());
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An OCI layout's files.
fn layout(layer: &[u8]) -> Vec<(String, Vec<u8>)> {
    let blob = gzip(layer);
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["A=1"], "Cmd": ["sh"], "Entrypoint": null, "WorkingDir": "/w"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(layer).0)]}
    })
    .to_string()
    .into_bytes();
    let descriptor = |bytes: &[u8], kind: &str| {
        serde_json::json!({"digest": format!("sha256:{}", digest(bytes).0),
            "size": bytes.len(), "mediaType": format!("application/vnd.oci.image.{kind}")})
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": descriptor(&config, "config.v1+json"),
        "layers": [descriptor(&blob, "layer.v1.tar+gzip")]
    })
    .to_string()
    .into_bytes();
    let index = serde_json::json!({"manifests": [descriptor(&manifest, "manifest.v1+json")]});
    vec![
        ("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".into(), index.to_string().into_bytes()),
        (digest(&manifest).path(), manifest),
        (digest(&config).path(), config),
        (digest(&blob).path(), blob),
    ]
}

fn open_image(path: &Path) -> Result<Image> {
    match Source::open(path)? {
        Source::Image(image) => Ok(*image),
        Source::Directory(path) => panic!("{} was taken for a root", path.display()),
    }
}

#[test]
fn an_oci_layout_is_run_from_its_directory_and_from_an_archive() {
    let layer = tar(&[(FILE, "hello", "world")]);
    let dir = tempfile::tempdir().unwrap();
    let mut archive = Builder::new(Vec::new());
    for (name, bytes) in layout(&layer) {
        let path = dir.path().join("layout").join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &bytes).unwrap();
        add(&mut archive, FILE, &name, "", &bytes);
    }
    let archive = archive.into_inner().unwrap();
    fs::write(dir.path().join("plain.tar"), &archive).unwrap();
    fs::write(dir.path().join("image.tar.gz"), gzip(&archive)).unwrap();
    for name in ["layout", "plain.tar", "image.tar.gz"] {
        let image = open_image(&dir.path().join(name)).unwrap();
        assert_eq!(image.config.env, ["A=1"]);
        assert_eq!(image.config.working_dir, "/w");
        let target = Target::new();
        image.unpack(&target.root()).unwrap();
        assert_eq!(target.text("hello"), "world", "{name}");
    }
}

#[test]
fn a_layout_with_a_changed_configuration_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (name, mut bytes) in layout(&tar(&[])) {
        let path = dir.path().join(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if bytes.starts_with(b"{\"architecture\"") {
            bytes.push(b' ');
        }
        fs::write(path, &bytes).unwrap();
    }
    let error = open_image(dir.path()).err().unwrap();
    assert!(format!("{error:#}").contains("was changed"), "{error:#}");
}

#[test]
fn what_docker_save_writes_is_understood() {
    let layer = tar(&[(FILE, "hello", "docker")]);
    let config = serde_json::json!({"config": {"Cmd": ["sh"]},
        "rootfs": {"diff_ids": [format!("sha256:{}", digest(&layer).0)]}})
    .to_string();
    let config_name = format!("{}.json", digest(config.as_bytes()).0);
    let manifest = serde_json::json!([{"Config": config_name, "RepoTags": ["x:1"], "Layers": ["b/layer.tar"]}]);
    let mut archive = Builder::new(Vec::new());
    add(&mut archive, FILE, "a/layer.tar", "", &layer);
    // As Docker shares layers between images.
    add(&mut archive, LINK, "b/layer.tar", "../a/layer.tar", b"");
    add(&mut archive, FILE, &config_name, "", config.as_bytes());
    add(&mut archive, FILE, "manifest.json", "", manifest.to_string().as_bytes());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.tar");
    fs::write(&path, archive.into_inner().unwrap()).unwrap();
    let image = open_image(&path).unwrap();
    let target = Target::new();
    image.unpack(&target.root()).unwrap();
    assert_eq!(target.text("hello"), "docker");
    assert_eq!(image.config.cmd, ["sh"]);
}

#[test]
fn a_directory_without_a_layout_is_a_root() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Source::open(dir.path()).unwrap(), Source::Directory(_)));
    let path = dir.path().join("noise");
    fs::write(&path, "no archive").unwrap();
    assert!(Source::open(&path).is_err());
    assert!(Source::open(&dir.path().join("missing")).is_err());
}

#[test]
fn digests_are_checked_before_they_name_a_file() {
    for text in ["sha256:../../etc/passwd", "sha512:00", "sha256:", "abc"] {
        assert!(Digest::parse(text).is_err(), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_tree_of_links_and_files_escapes(
        entries in proptest::collection::vec(
            (0usize..4, "(\\.\\./|/|a/|b/|\\./){0,3}(a|b|secret)", "(\\.\\./|/|a/|b/){0,4}(a|b|secret|\\.\\.)"),
            1..12,
        )
    ) {
        let target = Target::new();
        let kinds = [FILE, DIR, LINK, HARD];
        let list: Vec<_> = entries
            .iter()
            .map(|(kind, name, link)| (kinds[*kind], name.as_str(), if *kind == 1 { "" } else { link.as_str() }))
            .collect();
        let _ = target.unpack(&tar(&list));
        target.secret_is_safe();
    }

    #[test]
    fn any_bytes_are_unpacked_or_refused(bytes: Vec<u8>) {
        let target = Target::new();
        let _ = target.unpack(&bytes);
        target.secret_is_safe();
    }
}
