//! The returns of our tuned kernel, as they are where no thunks are wanted.
//!
//! The compiler ends each function with a jump to a thunk, and the kernel's build lists all such
//! places in the section `.return_sites`. A kernel whose processor needs no thunk puts a plain
//! return into each while it boots, 44,000 in all. Under binary translation that takes a thirtieth
//! of the boot, and what had been run before is translated twice. So it is done here, in the
//! file. The kernel (guest/kernel/boot-hints.patch) puts the jumps back where thunks are
//! wanted, and finds what was done here at the end of the list.

/// `CONFIG_BUILD_SALT` of guest/kernel/guest.config, which Linux keeps in a note: by this a kernel is
/// known that puts jumps back.
const OUR_SALT: &[u8] = b"kata-boot-hints-3\0";
/// `jmp rel32`, and its length.
const JUMP: u8 = 0xe9;
const JUMP_LENGTH: usize = 5;
/// `ret`, and traps for who would run past it: what the kernel itself would write.
const PLAIN: [u8; JUMP_LENGTH] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
/// What follows where the jump is the trampoline of a static call (`ud1 %esp, %ecx`): the kernel
/// has its own way with those.
const TRAMPOLINE: [u8; 3] = [0x0f, 0xb9, 0xcc];
/// Length of an entry of the list: how far the return is from it.
const ENTRY: usize = 4;

/// Why returns cannot be made plain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReturnsError {
    /// It is no vmlinux.
    #[error("this is no 64-bit ELF file with sections")]
    NoElf,
    /// It would not put jumps back where thunks are wanted.
    #[error("the kernel is not the one of this version: make it with 'make kernel'")]
    OtherKernel,
    /// The kernel has no such list (`CONFIG_MITIGATION_RETHUNK`).
    #[error("the kernel has no list of its returns (.return_sites)")]
    NoList,
    /// The list names a place that is not in the file.
    #[error("the kernel's list of returns names {0:#x}, where there is no code")]
    NoCode(u64),
}

/// Makes all returns of a vmlinux plain that can be so; gives how many there are.
///
/// # Errors
/// It is no vmlinux, or has no good list of them. It is as it was then.
pub fn make_plain(vmlinux: &mut [u8]) -> Result<usize, ReturnsError> {
    let sections = sections(vmlinux).ok_or(ReturnsError::NoElf)?;
    let named = |name: &[u8]| sections.iter().find(|section| has_name(vmlinux, section, name));
    let notes = named(b".notes\0").map_or(&[][..], |notes| &vmlinux[notes.offset..][..notes.size]);
    if !notes.windows(OUR_SALT.len()).any(|bytes| bytes == OUR_SALT) {
        return Err(ReturnsError::OtherKernel);
    }
    let list = *named(b".return_sites\0").ok_or(ReturnsError::NoList)?;
    let mut thunk = None;
    let (mut plain, mut others) = (Vec::new(), Vec::new());
    for entry in 0..list.size / ENTRY {
        let far = u32_at(vmlinux, list.offset + entry * ENTRY).ok_or(ReturnsError::NoElf)?;
        let site = list.entry(entry).wrapping_add_signed(far.cast_signed().into());
        let mut code = sections.iter().filter(|section| section.is_code);
        let offset = code.find_map(|section| section.offset_of(site));
        let code: Option<&[u8; JUMP_LENGTH + TRAMPOLINE.len()]> =
            offset.and_then(|offset| vmlinux.get(offset..)?.first_chunk());
        let (Some(offset), Some(code)) = (offset, code) else {
            return Err(ReturnsError::NoCode(site));
        };
        let target = u32_at(code, 1).map(|far| site.wrapping_add_signed(far.cast_signed().into()));
        let returns =
            code.starts_with(&PLAIN) || code[0] == JUMP && target == *thunk.get_or_insert(target);
        if returns && !code.ends_with(&TRAMPOLINE) {
            plain.push((site, offset));
        } else {
            others.push(site);
        }
    }
    for (_, offset) in &plain {
        vmlinux[*offset..offset + JUMP_LENGTH].copy_from_slice(&PLAIN);
    }
    let sites = others.into_iter().chain(plain.iter().map(|(site, _)| *site));
    for (entry, site) in sites.enumerate() {
        let at = list.offset + entry * ENTRY;
        // The kernel is no larger than an entry can say: its sites were in the list before.
        let far = site.wrapping_sub(list.entry(entry)).to_le_bytes();
        vmlinux[at..at + ENTRY].copy_from_slice(&far[..ENTRY]);
    }
    Ok(plain.len())
}

/// A section whose content is in the file.
#[derive(Clone, Copy, Debug)]
struct Section {
    /// Where its name is in the file.
    name: usize,
    is_code: bool,
    address: u64,
    offset: usize,
    size: usize,
}

impl Section {
    /// Address of an entry of the list.
    fn entry(&self, number: usize) -> u64 {
        self.address.wrapping_add((number * ENTRY) as u64)
    }

    /// Where in the file this address is, if it is here.
    fn offset_of(&self, address: u64) -> Option<usize> {
        let within = usize::try_from(address.checked_sub(self.address)?).ok()?;
        (within < self.size).then_some(self.offset + within)
    }
}

/// The sections whose content is in the file (System V ABI, chapter 4, "Sections"); of others than
/// code, data and notes nothing is needed.
fn sections(file: &[u8]) -> Option<Vec<Section>> {
    const PROGBITS: u32 = 1;
    const NOTE: u32 = 7;
    const EXECINSTR: u64 = 4;
    const HEADER: usize = 64;
    // 64 bits, little endian.
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let first = u64_at(file, 40)?;
    let header = |number: usize| {
        let at = usize::try_from(first).ok()?.checked_add(number.checked_mul(HEADER)?)?;
        file.get(at..)?.get(..HEADER)
    };
    let names = u64_at(header(u16_at(file, 62)?.into())?, 24)?;
    let mut sections = Vec::new();
    for number in 0..u16_at(file, 60)? {
        let header = header(number.into())?;
        if ![PROGBITS, NOTE].contains(&u32_at(header, 4)?) {
            continue;
        }
        let [name, offset, size] = [
            names.checked_add(u32_at(header, 0)?.into())?,
            u64_at(header, 24)?,
            u64_at(header, 32)?,
        ]
        .map(usize::try_from);
        let section = Section {
            name: name.ok()?,
            is_code: u64_at(header, 8)? & EXECINSTR != 0,
            address: u64_at(header, 16)?,
            offset: offset.ok()?,
            size: size.ok()?,
        };
        file.get(section.offset..)?.get(..section.size)?;
        sections.push(section);
    }
    Some(sections)
}

fn has_name(file: &[u8], section: &Section, name: &[u8]) -> bool {
    file.get(section.name..).is_some_and(|at| at.starts_with(name))
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

    const CODE: u64 = 0xffff_ffff_8100_0000;
    const LIST: u64 = 0xffff_ffff_8200_0000;
    const THUNK: u64 = CODE + 0x400;
    /// Where the file has code and list.
    const OFFSETS: [usize; 2] = [0x1000, 0x2000];

    /// A vmlinux with jumps at these places, to others, and what follows them.
    fn vmlinux(returns: &[(u64, u64, &[u8])]) -> Vec<u8> {
        const NAMES: &[u8] = b"\0.text\0.return_sites\0.notes\0";
        let mut file = vec![0; 0x3000];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[40..48].copy_from_slice(&64_u64.to_le_bytes());
        file[60..64].copy_from_slice(&[4, 0, 3, 0]);
        let size = (returns.len() * ENTRY) as u64;
        let sections = [
            (1, CODE, OFFSETS[0], 0x800),
            (7, LIST, OFFSETS[1], size),
            (21, 0, 0x300, 0x100),
            (0, 0, 0x200, 0),
        ];
        for (header, (name, address, offset, size)) in sections.into_iter().enumerate() {
            let header = &mut file[64 + header * 64..][..64];
            header[0] = name;
            header[4] = if name == 21 { 7 } else { 1 };
            header[8] = if address == CODE { 6 } else { 2 };
            header[16..24].copy_from_slice(&address.to_le_bytes());
            header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
        }
        file[0x200..][..NAMES.len()].copy_from_slice(NAMES);
        file[0x340..][..OUR_SALT.len()].copy_from_slice(OUR_SALT);
        for (entry, (site, to, next)) in returns.iter().enumerate() {
            let code = &mut file[OFFSETS[0] + (site - CODE) as usize..][..16];
            code[0] = JUMP;
            let far = (*to as u32).wrapping_sub(*site as u32 + 5);
            code[1..JUMP_LENGTH].copy_from_slice(&far.to_le_bytes());
            code[JUMP_LENGTH..][..next.len()].copy_from_slice(next);
            let from = LIST + (entry * ENTRY) as u64;
            let far = (*site as u32).wrapping_sub(from as u32);
            file[OFFSETS[1] + entry * ENTRY..][..ENTRY].copy_from_slice(&far.to_le_bytes());
        }
        file
    }

    /// What the list names, and what is there.
    fn listed(file: &[u8]) -> Vec<(u64, [u8; JUMP_LENGTH])> {
        let list = sections(file).unwrap()[1];
        let entries = (0..list.size / ENTRY).map(|entry| {
            let far = u32_at(file, list.offset + entry * ENTRY).unwrap().cast_signed();
            let site = list.entry(entry).wrapping_add_signed(far.into());
            (site, *file[OFFSETS[0] + (site - CODE) as usize..].first_chunk().unwrap())
        });
        entries.collect()
    }

    #[test]
    fn jumps_to_the_thunk_become_returns_at_the_end_of_the_list() {
        let (a, trampoline, elsewhere, b) = (CODE + 16, CODE + 32, CODE + 48, CODE + 64);
        let before = vmlinux(&[
            (a, THUNK, &[0xcc]),
            (trampoline, THUNK, &TRAMPOLINE),
            (elsewhere, THUNK + 16, &[0xcc]),
            (b, THUNK, &TRAMPOLINE[..1]),
        ]);
        let mut after = before.clone();
        assert_eq!(make_plain(&mut after), Ok(2));
        let was = listed(&before);
        assert_eq!(listed(&after), [was[1], was[2], (a, PLAIN), (b, PLAIN)]);
        let mut again = after.clone();
        assert_eq!(make_plain(&mut again), Ok(2));
        assert_eq!(again, after);
    }

    #[test]
    fn what_is_no_kernel_with_returns_is_refused() {
        assert_eq!(make_plain(&mut b"\x7fELF".to_vec()), Err(ReturnsError::NoElf));
        let mut other = vmlinux(&[(CODE + 16, THUNK, &[])]);
        other[0x340] = b'K';
        assert_eq!(make_plain(&mut other), Err(ReturnsError::OtherKernel));
        let mut without = vmlinux(&[]);
        without[0x208] = b'_';
        assert_eq!(make_plain(&mut without), Err(ReturnsError::NoList));
        let mut outside = vmlinux(&[(CODE + 16, THUNK, &[])]);
        outside[OFFSETS[1]..][..ENTRY].fill(0);
        let before = outside.clone();
        assert_eq!(make_plain(&mut outside), Err(ReturnsError::NoCode(LIST)));
        assert_eq!(outside, before);
    }

    #[test]
    fn the_kernel_is_known_by_what_its_configuration_says() {
        let config = include_str!("../../../guest/kernel/guest.config");
        let salt = std::str::from_utf8(OUR_SALT).unwrap().trim_end_matches('\0');
        assert!(config.contains(&format!("\nCONFIG_BUILD_SALT=\"{salt}\"\n")), "{salt}");
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_refused_or_read(at in 0_usize..0x3000, bytes: [u8; 8]) {
            let mut file = vmlinux(&[(CODE + 16, THUNK, &[]), (CODE + 32, THUNK, &[])]);
            let end = file.len().min(at + 8);
            file[at..end].copy_from_slice(&bytes[..end - at]);
            let _ = make_plain(&mut file);
        }
    }
}
