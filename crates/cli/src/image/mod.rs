//! Images without an engine: a root directory, an OCI layout (directory or archive), or what
//! `docker save` writes, told apart by what is in them.
//!
//! Whoever made the image is not trusted: layers are unpacked by [`unpack`], which never
//! leaves the target directory, and every byte is compared with its digest.

mod blobs;
mod manifest;
mod root;
mod unpack;
mod zstd;

use anyhow::{Context, Result, bail};
use blobs::Blobs;
use serde::Deserialize;
use std::path::{Path, PathBuf};

pub use root::ConfinedRoot;

/// Where a container's root file system comes from.
pub enum Source {
    /// A directory, used as it is.
    Directory(PathBuf),
    /// An image, to be unpacked.
    Image(Box<Image>),
}

/// An image that was found well-formed.
pub struct Image {
    blobs: Blobs,
    /// How it wants to be run.
    pub config: Config,
    layers: Vec<Layer>,
}

/// One layer.
#[derive(Debug)]
struct Layer {
    /// Where its bytes are.
    blob: String,
    /// Digest of the tar archive in it, after decompression.
    diff_id: Digest,
}

/// Unpacks anything as a small layer, for the fuzz target.
#[cfg(fuzzing)]
pub fn fuzz_layer(bytes: &[u8], root: &Path) -> Result<()> {
    let root = ConfinedRoot::open(root)?;
    let mut budget = unpack::Budget { bytes: 1 << 20, entries: 64 };
    let digest = Digest("0".repeat(64));
    unpack::layer(std::io::Cursor::new(bytes.to_vec()), &digest, &root, &mut budget)
}

/// `sha256:…`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest(String);

impl Digest {
    fn parse(text: &str) -> Result<Self> {
        let hex = text
            .strip_prefix("sha256:")
            .with_context(|| format!("digest {text:?} is not supported: images must use sha256"))?;
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            bail!("digest {text:?} is malformed");
        }
        Ok(Self(hex.to_owned()))
    }

    /// Where an OCI layout keeps it.
    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.0)
    }
}

/// The part of an image's configuration that says how to run it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// `user[:group]`
    pub user: String,
    /// `KEY=value`
    pub env: Vec<String>,
    /// The program.
    pub entrypoint: Vec<String>,
    /// Its arguments, unless the caller has others.
    pub cmd: Vec<String>,
    /// Where it starts.
    pub working_dir: String,
}

impl Source {
    /// Finds out what `path` is.
    ///
    /// # Errors
    /// When it is none of the three.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata =
            std::fs::metadata(path).with_context(|| format!("cannot find {}", path.display()))?;
        if metadata.is_dir() && !path.join("oci-layout").is_file() {
            let path = std::fs::canonicalize(path)?;
            return Ok(Self::Directory(path));
        }
        let blobs = if metadata.is_dir() {
            Blobs::directory(path)?
        } else {
            Blobs::archive(path)
                .with_context(|| format!("cannot read {} as an image archive", path.display()))?
        };
        let image = manifest::read(blobs)
            .with_context(|| format!("cannot use the image {}", path.display()))?;
        Ok(Self::Image(Box::new(image)))
    }
}

impl Image {
    /// Unpacks all layers into `directory`, which must be empty.
    ///
    /// # Errors
    /// When a layer is not what its digest says, or tries to leave the directory.
    pub fn unpack(&self, directory: &Path) -> Result<()> {
        let root = ConfinedRoot::open(directory)?;
        let mut budget = unpack::Budget::default();
        for (number, layer) in self.layers.iter().enumerate() {
            let blob = self.blobs.open(&layer.blob)?;
            unpack::layer(blob, &layer.diff_id, &root, &mut budget)
                .with_context(|| format!("cannot unpack layer {}", number + 1))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
