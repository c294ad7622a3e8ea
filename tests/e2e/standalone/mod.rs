//! OCI verbs straight, with no engine.

mod exec;
mod hooks;
mod lifecycle;
mod shim;

use kata_e2e::oci::Oci;
use kata_e2e::runner::Trial;

/// All of them.
pub fn trials() -> Vec<Trial<Oci>> {
    let mut all = lifecycle::trials();
    all.extend(exec::trials());
    all.extend(hooks::trials());
    all.extend(shim::trials());
    all
}
