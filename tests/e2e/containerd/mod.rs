//! containerd, driven by its own client `ctr`.

mod events;
mod kills;
mod streams;
mod tasks;

use kata_e2e::containerd::Containerd;
use kata_e2e::runner::Trial;

/// All that may run side by side.
pub fn trials() -> Vec<Trial<Containerd>> {
    let mut all = tasks::trials();
    all.extend(streams::trials());
    all.extend(events::trials());
    all.extend(kills::trials());
    all
}
