//! The kernel proper (`vmlinux`, an ELF file) out of a compressed `bzImage`.
//!
//! QEMU enters a vmlinux directly (PVH); the decompressor in a bzImage would cost half a
//! second under binary translation.

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::thread;

use crate::lz4;

/// A kernel is never that large; what is unpacked is cut off there.
const LIMIT: u64 = 1 << 30;

/// Why a kernel could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// It has not the header of a bzImage of boot protocol 2.08 or newer.
    #[error("this is no bzImage with a payload")]
    NoImage,
    /// Compressed in a way not known here.
    #[error("the kernel is compressed in an unknown way (it begins with {0:02x?})")]
    Compression([u8; 4]),
    /// The payload is damaged.
    #[error("the compressed kernel is damaged")]
    Damaged,
    /// The tool that unpacks it does not do so.
    #[error("cannot unpack the kernel with {tool}: install the package {package}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// Where it is in.
        package: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What came out is no kernel.
    #[error("the unpacked kernel is no ELF file")]
    NoElf,
    /// It has no entry for a VMM that loads it without firmware's help.
    #[error("the kernel has no PVH entry (CONFIG_PVH)")]
    NoPvh,
}

/// Unpacks the kernel in `image`.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    let payload = payload(image).ok_or(KernelError::NoImage)?;
    let magic: [u8; 4] = *payload.first_chunk().ok_or(KernelError::NoImage)?;
    // The build appends the unpacked size to what has no such field itself.
    let sized = payload.len().checked_sub(4).map_or(payload, |end| &payload[..end]);
    let kernel = match magic {
        lz4::MAGIC => lz4::unpack(sized).ok_or(KernelError::Damaged)?,
        [0x1f, 0x8b, ..] => gunzip(payload)?,
        [0xfd, b'7', b'z', b'X'] => filter("xz", "xz-utils", &["-dc", "--single-stream"], sized)?,
        [0x28, 0xb5, 0x2f, 0xfd] => filter("zstd", "zstd", &["-dc", "--long=31"], sized)?,
        other => return Err(KernelError::Compression(other)),
    };
    if !kernel.starts_with(b"\x7fELF") {
        return Err(KernelError::NoElf);
    }
    if !has_pvh_note(&kernel) {
        return Err(KernelError::NoPvh);
    }
    Ok(kernel)
}

/// The compressed kernel, by the setup header (Documentation/arch/x86/boot.rst).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let byte = |at: usize| image.get(at).copied();
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    let version = u16::from_le_bytes([byte(0x206)?, byte(0x207)?]);
    if image.get(0x202..0x206)? != b"HdrS" || version < 0x0208 {
        return None;
    }
    let setup_sectors = match byte(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(word(0x248)?)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

fn gunzip(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    let mut kernel = Vec::new();
    let mut decoder = flate2::read::GzDecoder::new(payload).take(LIMIT);
    decoder.read_to_end(&mut kernel).map_err(|_| KernelError::Damaged)?;
    Ok(kernel)
}

/// Runs `input` through a program.
fn filter(
    tool: &'static str,
    package: &'static str,
    arguments: &[&str],
    input: &[u8],
) -> Result<Vec<u8>, KernelError> {
    let failed = |source| KernelError::Tool { tool, package, source };
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut output = Vec::new();
    let read = thread::scope(|scope| {
        // A tool that stops reading has a status that says so.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        stdout.map_or(Ok(0), |stdout| stdout.take(LIMIT).read_to_end(&mut output))
    });
    let status = child.wait().map_err(failed)?;
    read.map_err(failed)?;
    if status.success() { Ok(output) } else { Err(KernelError::Damaged) }
}

/// A Xen note of type 18 gives the PVH entry.
fn has_pvh_note(kernel: &[u8]) -> bool {
    const NOTE: [u8; 8] = [18, 0, 0, 0, b'X', b'e', b'n', 0];
    // The note is "4, size, 18, Xen\0": the size is of an address of 32 or 64 bits.
    kernel.windows(16).any(|w| w[..4] == [4, 0, 0, 0] && matches!(w[4], 4 | 8) && w[8..16] == NOTE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kernel() -> Vec<u8> {
        let mut kernel = b"\x7fELF kernel".to_vec();
        kernel.resize(256, 7);
        kernel.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
        kernel.resize(20_000, 1);
        kernel
    }

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0xcc; 16]);
        image.extend(payload);
        image.extend([0xcc; 100]);
        image
    }

    fn compressed(tool: &'static str, arguments: &[&str]) -> Vec<u8> {
        let mut payload = filter(tool, tool, arguments, &kernel()).unwrap();
        payload.extend((kernel().len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn a_kernel_comes_out_as_it_went_in() {
        assert_eq!(vmlinux(&image(&compressed("xz", &["--check=crc32", "-c"]))).unwrap(), kernel());
        let mut gzip = Vec::new();
        flate2::read::GzEncoder::new(kernel().as_slice(), flate2::Compression::fast())
            .read_to_end(&mut gzip)
            .unwrap();
        assert_eq!(vmlinux(&image(&gzip)).unwrap(), kernel());
        // As literals, which is LZ4, too.
        let mut block = vec![0xf0];
        let mut left = kernel().len() - 15;
        while left >= 255 {
            block.push(255);
            left -= 255;
        }
        block.push(left as u8);
        block.extend(kernel());
        let mut frame = lz4::MAGIC.to_vec();
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(block);
        frame.extend((kernel().len() as u32).to_le_bytes());
        assert_eq!(vmlinux(&image(&frame)).unwrap(), kernel());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(vmlinux(b""), Err(KernelError::NoImage)));
        assert!(matches!(vmlinux(&image(b"ABCDEFGH")), Err(KernelError::Compression(_))));
        let mut damaged = compressed("xz", &["--check=crc32", "-c"]);
        let middle = damaged.len() / 2;
        damaged.truncate(middle);
        assert!(matches!(vmlinux(&image(&damaged)), Err(KernelError::Damaged)));
        let mut old = image(b"x");
        old[0x206] = 7;
        assert!(matches!(vmlinux(&old), Err(KernelError::NoImage)));
    }

    #[test]
    fn a_kernel_without_a_pvh_entry_is_refused() {
        let mut gzip = Vec::new();
        flate2::read::GzEncoder::new(&b"\x7fELF"[..], flate2::Compression::fast())
            .read_to_end(&mut gzip)
            .unwrap();
        assert!(matches!(vmlinux(&image(&gzip)), Err(KernelError::NoPvh)));
    }

    proptest! {
        #[test]
        fn a_damaged_header_does_not_panic(at in 0x1f0usize..0x250, value: u8) {
            let mut image = image(&lz4::MAGIC);
            image[at] = value;
            let _ = vmlinux(&image);
        }
    }
}
