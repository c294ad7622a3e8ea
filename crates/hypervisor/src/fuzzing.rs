//! Ways in for the fuzz targets (`fuzz/`), compiled for them only.

use crate::Console;

/// What QEMU says on its control socket, should it be taken over.
pub fn qmp(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n') {
        crate::qemu::fuzz_qmp(line);
    }
}

/// What the guest writes on its console: gives what would be shown of it.
pub fn console(bytes: &[u8]) -> Vec<String> {
    let console = Console::default();
    for piece in bytes.chunks(61) {
        console.push(piece);
    }
    let mut shown = console.last_lines(100);
    shown.extend(console.panic_line());
    shown
}

/// The notes of a kernel's file.
pub fn kernel_notes(bytes: &[u8]) -> usize {
    crate::image::each_note(bytes).count()
}
