//! Docker as the Kata articles configure it.

mod basics;
mod build;
mod choices;
mod kernel;
mod lifecycle;
mod network;
mod options;
mod oracle;
mod stdio;
mod volumes;

use kata_e2e::docker::Docker;
use kata_e2e::runner::Trial;

/// All of them.
pub fn trials() -> Vec<Trial<Docker>> {
    let mut all = basics::trials();
    all.extend(options::trials());
    all.extend(volumes::trials());
    all.extend(lifecycle::trials());
    all.extend(stdio::trials());
    all.extend(network::trials());
    all.extend(oracle::trials());
    all.extend(build::trials());
    all.extend(choices::trials());
    all.extend(kernel::trials());
    all
}
