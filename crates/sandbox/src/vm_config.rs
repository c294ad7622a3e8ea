//! The configuration's terms in the terms of the VMM, the share and the network.

use kata_config::{FsCache, NetworkModel, SandboxConfig};
use kata_devices::Cache;
use kata_network::Model;

pub(crate) fn network_model(config: &SandboxConfig) -> Model {
    match config.runtime.internetworking_model {
        NetworkModel::TcFilter => Model::TcFilter,
        NetworkModel::Macvtap => Model::Macvtap,
        NetworkModel::None => Model::None,
    }
}

pub(crate) fn cache(config: &SandboxConfig) -> Cache {
    match config.hypervisor.virtio_fs_cache {
        FsCache::Never => Cache::Never,
        // The library has no mode between these two; names and attributes are kept alike.
        FsCache::Metadata | FsCache::Auto => Cache::Auto,
        FsCache::Always => Cache::Always,
    }
}
