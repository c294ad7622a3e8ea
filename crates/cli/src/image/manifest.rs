//! Which layers an image has: OCI's index and manifest, or Docker's `manifest.json`.

use super::blobs::Blobs;
use super::{Config, Digest, Image, Layer};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

/// Most layers (Docker's own limit is 127).
const MAX_LAYERS: usize = 512;

/// How deep indexes may nest.
const MAX_DEPTH: usize = 4;

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    digest: String,
    #[serde(default)]
    media_type: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default)]
    config: Option<serde_json::Value>,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// Reads what describes an image.
pub fn read(blobs: Blobs) -> Result<Image> {
    if blobs.contains("oci-layout") && blobs.contains("index.json") {
        return oci(blobs);
    }
    if blobs.contains("manifest.json") {
        return docker(blobs);
    }
    bail!(
        "it holds neither an OCI layout (oci-layout, index.json) nor what docker save writes \
         (manifest.json)"
    )
}

fn oci(blobs: Blobs) -> Result<Image> {
    let mut index: Index = parse("index.json", &blobs.document("index.json")?)?;
    for _ in 0..MAX_DEPTH {
        let descriptor = choose(&index)?;
        let digest = Digest::parse(&descriptor.digest)?;
        let nested = descriptor.media_type.ends_with("index.v1+json")
            || descriptor.media_type.ends_with("manifest.list.v2+json");
        let bytes = verified(&blobs, &digest)?;
        if nested {
            index = parse("an index", &bytes)?;
            continue;
        }
        let manifest: Manifest = parse("the manifest", &bytes)?;
        let config = verified(&blobs, &Digest::parse(&manifest.config.digest)?)?;
        let names = manifest
            .layers
            .iter()
            .map(|layer| Ok(Digest::parse(&layer.digest)?.path()))
            .collect::<Result<Vec<_>>>()?;
        return assemble(blobs, &config, names);
    }
    bail!("its indexes nest more than {MAX_DEPTH} deep")
}

/// The image for this machine; one without a platform will do if it is the only one.
fn choose(index: &Index) -> Result<&Descriptor> {
    let ours = |descriptor: &&Descriptor| {
        descriptor.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
    };
    if let Some(descriptor) = index.manifests.iter().find(ours) {
        return Ok(descriptor);
    }
    match index.manifests.as_slice() {
        [] => bail!("its index is empty"),
        [only] if only.platform.is_none() => Ok(only),
        [_] => bail!("it is for another platform than linux/amd64"),
        many if many.iter().all(|d| d.platform.is_none()) => {
            bail!("it holds {} images: give an archive or layout with one", many.len())
        }
        _ => bail!("it holds no image for linux/amd64"),
    }
}

fn docker(blobs: Blobs) -> Result<Image> {
    let manifests: Vec<DockerManifest> = parse("manifest.json", &blobs.document("manifest.json")?)?;
    let [manifest] = manifests.as_slice() else {
        bail!("it holds {} images: save one at a time", manifests.len());
    };
    let config = blobs.document(&manifest.config)?;
    let name = manifest.config.trim_end_matches(".json");
    let name = name.rsplit('/').next().unwrap_or(name);
    if let Ok(digest) = Digest::parse(&format!("sha256:{name}")) {
        check(&config, &digest)?;
    }
    let names = manifest.layers.clone();
    assemble(blobs, &config, names)
}

fn assemble(blobs: Blobs, config: &[u8], names: Vec<String>) -> Result<Image> {
    let config: ImageConfig = parse("the image's configuration", config)?;
    let ids = config.rootfs.diff_ids;
    if ids.len() != names.len() || ids.len() > MAX_LAYERS {
        bail!("it has {} layers, and its configuration names {}", names.len(), ids.len());
    }
    let layers = names
        .into_iter()
        .zip(&ids)
        .map(|(blob, id)| Ok(Layer { blob, diff_id: Digest::parse(id)? }))
        .collect::<Result<_>>()?;
    let config = match config.config {
        None | Some(serde_json::Value::Null) => Config::default(),
        Some(mut value) => {
            if let Some(map) = value.as_object_mut() {
                // Go writes absent lists as null.
                map.retain(|_, value| !value.is_null());
            }
            serde_json::from_value(value).context("its configuration is malformed")?
        }
    };
    Ok(Image { blobs, config, layers })
}

fn verified(blobs: &Blobs, digest: &Digest) -> Result<Vec<u8>> {
    let bytes = blobs.document(&digest.path())?;
    check(&bytes, digest)?;
    Ok(bytes)
}

fn check(bytes: &[u8], digest: &Digest) -> Result<()> {
    let found = hex(&Sha256::digest(bytes));
    if found != digest.0 {
        bail!("a part of it was changed: sha256:{} holds sha256:{found}", digest.0);
    }
    Ok(())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("{what} is malformed"))
}
