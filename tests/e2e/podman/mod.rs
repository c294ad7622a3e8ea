//! Podman and buildah, which call the OCI verbs through conmon.

mod build;
mod containers;
mod pods;

use kata_e2e::podman::Podman;
use kata_e2e::runner::Trial;

/// All of them.
pub fn trials() -> Vec<Trial<Podman>> {
    let mut all = containers::trials();
    all.extend(build::trials());
    all.extend(pods::trials());
    all
}
