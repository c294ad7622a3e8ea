//! Memory that the kernel did not use at boot, because it was told to (`mem=`).
//!
//! A machine without ACPI cannot be given memory while it runs. It has addresses for all that it
//! may ever need from the start, and its kernel begins with a part of them; there is memory
//! behind the rest when the host says so, and only then. The kernel takes an address for it (`memory/probe` in sysfs) and
//! believes that there is memory, so addresses come from the firmware's map and nowhere else.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Most ranges of a firmware's map that are looked at.
const RANGES: usize = 256;

/// Uses so much of it, in whole blocks of the kernel's.
///
/// # Errors
/// When the kernel refuses, or there is not so much left.
pub fn use_kept_back(mib: u32) -> io::Result<()> {
    let blocks = Path::new("/sys/devices/system/memory");
    let size = hexadecimal(&blocks.join("block_size_bytes"))?.max(MIB);
    let firmware = firmware_map(Path::new("/sys/firmware/memmap"))?;
    let wanted = (u64::from(mib) * MIB).div_ceil(size);
    let unused = unused(&firmware, &used(blocks)?, size, wanted as usize);
    for block in &unused {
        fs::write(blocks.join("probe"), format!("{:#x}", block * size))?;
    }
    match wanted as usize == unused.len() {
        true => Ok(()),
        false => Err(io::Error::other("the machine has no more of it")),
    }
}

/// Numbers of blocks that lie in the firmware's memory and that the kernel does not use; the
/// lowest, and no more than `most`.
fn unused(firmware: &[Range<u64>], used: &BTreeSet<u64>, size: u64, most: usize) -> Vec<u64> {
    let whole = |range: &Range<u64>| range.start.div_ceil(size)..range.end / size;
    let mut blocks: Vec<u64> = firmware
        .iter()
        .flat_map(whole)
        .filter(|block| !used.contains(block))
        .collect::<BTreeSet<u64>>()
        .into_iter()
        .collect();
    blocks.truncate(most);
    blocks
}

/// Numbers of the blocks that the kernel knows of, some of which it may use in part.
fn used(blocks: &Path) -> io::Result<BTreeSet<u64>> {
    let mut used = BTreeSet::new();
    for entry in fs::read_dir(blocks)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("memory"));
        used.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    Ok(used)
}

/// Where the firmware said that memory is.
fn firmware_map(map: &Path) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    for entry in fs::read_dir(map)?.take(RANGES) {
        let entry = entry?.path();
        if fs::read_to_string(entry.join("type"))?.trim_end() == "System RAM" {
            // The last byte is named.
            let end = hexadecimal(&entry.join("end"))?.saturating_add(1);
            ranges.push(hexadecimal(&entry.join("start"))?..end);
        }
    }
    Ok(ranges)
}

/// A number as sysfs writes it, with or without `0x`.
fn hexadecimal(file: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(file)?;
    let digits = text.trim_end().trim_start_matches("0x");
    u64::from_str_radix(digits, 16)
        .map_err(|error| io::Error::other(format!("{}: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 128 * MIB;
    const GIB: u64 = 1 << 30;

    #[test]
    fn only_whole_blocks_of_the_firmwares_memory_are_used() {
        let firmware = [0x10_0000..3 * GIB - MIB, 4 * GIB..5 * GIB];
        let used: BTreeSet<u64> = (0..16).collect();
        let first = unused(&firmware, &used, BLOCK, 3);
        assert_eq!(first, [16, 17, 18]);
        let all = unused(&firmware, &used, BLOCK, usize::MAX);
        // The last block below the hole is not whole.
        assert_eq!(all, (16..23).chain(32..40).collect::<Vec<u64>>());
    }

    #[test]
    fn the_kernels_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |number: &str, kind: &str, start: &str, end: &str| {
            let at = dir.path().join(number);
            fs::create_dir(&at).unwrap();
            for (name, text) in [("type", kind), ("start", start), ("end", end)] {
                fs::write(at.join(name), format!("{text}\n")).unwrap();
            }
        };
        entry("0", "System RAM", "0x0", "0x9fbff");
        entry("1", "Reserved", "0x9fc00", "0x9ffff");
        let map = firmware_map(dir.path()).unwrap();
        assert_eq!(map, [Range { start: 0, end: 0x9_fc00 }]);
        for name in ["memory0", "memory17", "probe", "memoryx"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(used(dir.path()).unwrap(), BTreeSet::from([0, 17]));
        entry("2", "System RAM", "none", "0xf");
        assert!(firmware_map(dir.path()).is_err());
    }
}
