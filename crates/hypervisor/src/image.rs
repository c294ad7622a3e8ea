//! What the files of a guest are, told by their content.
//!
//! They are the administrator's, so trusted; but a wrong one is to be named before QEMU
//! fails over it in its own words. Only beginnings and ELF notes are read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::config::KernelKind;
use crate::error::HypervisorError;

/// `CONFIG_BUILD_SALT` of guest/kernel/guest.config and up.config, which Linux keeps in a note.
const OUR_SALTS: [(&[u8], KernelKind); 2] = [
    (b"kata-boot-hints-3", KernelKind::Tuned),
    (b"kata-boot-hints-3-up", KernelKind::Uniprocessor),
];
/// Where a bzImage has its magic numbers (Documentation/arch/x86/boot.rst).
const BOOT_FLAG: (usize, [u8; 2]) = (0x1fe, [0x55, 0xaa]);
const HEADER: (usize, &[u8]) = (0x202, b"HdrS");
/// Owner and type of the note that holds the PVH entry (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY: (&[u8], u32) = (b"Xen", 18);
/// Owner and type of the note that holds the build salt (LINUX_ELFNOTE_BUILD_SALT).
const BUILD_SALT: (&[u8], u32) = (b"Linux", 0x100);
/// Notes are a few hundred bytes.
const MAX_NOTES: usize = 64 << 10;
/// Program headers are looked at so far.
const MAX_HEADERS: u16 = 64;

/// What an initial file system may begin with, as far as Linux unpacks it.
const INITRD_MAGICS: &[&[u8]] = &[
    b"070701",
    b"070702",
    &[0x1f, 0x8b],
    &[0x1f, 0x9e],
    b"BZh",
    &[0xfd, b'7', b'z', b'X', b'Z'],
    &[0x5d, 0, 0],
    &[0x89, b'L', b'Z', b'O'],
    &[0x02, 0x21, 0x4c, 0x18],
    &[0x28, 0xb5, 0x2f, 0xfd],
];

impl KernelKind {
    /// What the kernel at `path` is.
    ///
    /// # Errors
    /// When it cannot be read, or is no kernel that can be booted directly.
    pub fn of(path: &Path) -> Result<Self, HypervisorError> {
        kernel(path).map_err(|source| HypervisorError::File {
            what: "the guest kernel",
            path: path.to_owned(),
            source,
        })
    }
}

fn kernel(path: &Path) -> io::Result<KernelKind> {
    let mut file = File::open(path)?;
    let mut start = Vec::new();
    (&mut file).take(0x400).read_to_end(&mut start)?;
    if has(&start, BOOT_FLAG.0, &BOOT_FLAG.1) && has(&start, HEADER.0, HEADER.1) {
        return Ok(KernelKind::Distro);
    }
    if !start.starts_with(b"\x7fELF") {
        return Err(io::Error::other("it is no kernel: neither an ELF file nor a bzImage"));
    }
    let notes = notes(&file, &start)?;
    if !each_note(&notes).any(|note| (note.owner, note.kind) == PVH_ENTRY) {
        return Err(io::Error::other(
            "it is an ELF file without a PVH entry, so no kernel that can be booted directly",
        ));
    }
    let salted = each_note(&notes).find(|note| (note.owner, note.kind) == BUILD_SALT);
    let salt = salted.and_then(|note| note.data.strip_suffix(b"\0"));
    let ours = OUR_SALTS.iter().find(|(known, _)| salt == Some(*known));
    Ok(ours.map_or(KernelKind::Distro, |(_, kind)| *kind))
}

/// Refuses what cannot be an initial file system.
pub(crate) fn check_initrd(path: &Path) -> Result<(), HypervisorError> {
    initrd(path).map_err(|source| HypervisorError::File {
        what: "the initial file system",
        path: path.to_owned(),
        source,
    })
}

fn initrd(path: &Path) -> io::Result<()> {
    let mut start = [0; 8];
    let length = File::open(path)?.read_at(&mut start, 0)?;
    if INITRD_MAGICS.iter().any(|magic| start[..length].starts_with(magic)) {
        return Ok(());
    }
    Err(io::Error::other("it is neither a cpio archive nor a compressed one"))
}

fn has(bytes: &[u8], at: usize, wanted: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(wanted))
}

/// The notes of a 64-bit, little-endian ELF file, of all segments that hold some.
fn notes(file: &File, start: &[u8]) -> io::Result<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    const SIZE: usize = 56;
    if !has(start, 4, &[2, 1]) {
        return Err(io::Error::other("it is no 64-bit kernel"));
    }
    let offset = u64_at(start, 32).unwrap_or(0);
    let count = u16_at(start, 56).unwrap_or(0).min(MAX_HEADERS);
    let mut notes = Vec::new();
    for index in 0..u64::from(count) {
        let mut header = [0; SIZE];
        let at = offset.saturating_add(index * SIZE as u64);
        file.read_exact_at(&mut header, at).map_err(cut_off)?;
        if u32_at(&header, 0) != Some(PT_NOTE) {
            continue;
        }
        let (at, size) = (u64_at(&header, 8).unwrap_or(0), u64_at(&header, 32).unwrap_or(u64::MAX));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_NOTES - notes.len() {
            break;
        }
        let mut segment = vec![0; size];
        file.read_exact_at(&mut segment, at).map_err(cut_off)?;
        notes.extend(segment);
    }
    Ok(notes)
}

fn cut_off(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("it is an ELF file that was cut off"),
        _ => error,
    }
}

pub(crate) struct Note<'a> {
    owner: &'a [u8],
    kind: u32,
    data: &'a [u8],
}

/// Reads notes until one is not whole.
pub(crate) fn each_note(mut bytes: &[u8]) -> impl Iterator<Item = Note<'_>> {
    std::iter::from_fn(move || {
        let (owner_size, data_size) = (u32_at(bytes, 0)? as usize, u32_at(bytes, 4)? as usize);
        let kind = u32_at(bytes, 8)?;
        let rest = bytes.get(12..)?;
        let owner = rest.get(..owner_size)?;
        let rest = rest.get(owner_size.checked_next_multiple_of(4)?..)?;
        let data = rest.get(..data_size)?;
        // The last one may lack its padding.
        bytes = rest.get(data_size.checked_next_multiple_of(4)?..).unwrap_or_default();
        Some(Note { owner: owner.strip_suffix(b"\0").unwrap_or(owner), kind, data })
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(owner: &[u8], kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in [owner.len() as u32 + 1, data.len() as u32, kind] {
            bytes.extend(number.to_le_bytes());
        }
        for text in [[owner, b"\0"].concat().as_slice(), data] {
            bytes.extend(text);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// An ELF file of one program header and these notes.
    fn elf(notes: &[Vec<u8>]) -> Vec<u8> {
        let notes = notes.concat();
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64 + 56, 0);
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&4u32.to_le_bytes());
        bytes[72..80].copy_from_slice(&120u64.to_le_bytes());
        bytes[96..104].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        bytes.extend(notes);
        bytes
    }

    fn kind(content: &[u8]) -> Result<KernelKind, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        kernel(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_kernel_is_known_by_its_notes_whatever_its_name() {
        let pvh = note(b"Xen", 18, &[0; 8]);
        for (salt, ours) in OUR_SALTS {
            let salt = note(b"Linux", 0x100, &[salt, b"\0"].concat());
            assert_eq!(kind(&elf(&[salt, pvh.clone()])), Ok(ours));
        }
        let other = note(b"Linux", 0x100, b"6.12.0-cloud-amd64\0");
        assert_eq!(kind(&elf(&[other, pvh.clone()])), Ok(KernelKind::Distro));
        assert_eq!(kind(&elf(&[pvh])), Ok(KernelKind::Distro));
    }

    #[test]
    fn our_kernels_are_those_that_are_configured() {
        let configs = [
            include_str!("../../../guest/kernel/guest.config"),
            include_str!("../../../guest/kernel/up.config"),
        ];
        for (config, (salt, _)) in configs.into_iter().zip(OUR_SALTS) {
            let salt = std::str::from_utf8(salt).unwrap();
            assert!(config.contains(&format!("\nCONFIG_BUILD_SALT=\"{salt}\"\n")), "{salt}");
        }
    }

    #[test]
    fn a_bz_image_is_a_distributions() {
        let mut image = vec![0; 0x400];
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind(&image), Ok(KernelKind::Distro));
    }

    #[test]
    fn what_cannot_be_booted_says_why() {
        for (content, why) in [
            (&b""[..], "no kernel"),
            (b"this is no kernel\n", "no kernel"),
            (&elf(&[]), "without a PVH entry"),
            (&elf(&[note(b"Xen", 18, &[0; 8])])[..130], "cut off"),
            (b"\x7fELF\x01\x01\x01", "64-bit"),
        ] {
            let error = kind(content).unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn an_initial_file_system_is_an_archive_packed_or_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (content, good) in
            [(&b"070701..."[..], true), (&[0x1f, 0x8b, 8, 0], true), (b"", false), (b"no", false)]
        {
            std::fs::write(file.path(), content).unwrap();
            assert_eq!(initrd(file.path()).is_ok(), good);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_kernel_or_none(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            prop_assert!(each_note(&bytes).count() <= bytes.len());
            let _ = kind(&[b"\x7fELF\x02\x01", &bytes[..]].concat());
        }
    }
}
