//! A root file system with one program, in the kernel's archive format.

/// An archive with `/init`, the directories it mounts on, and a console.
pub fn with_init(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for directory in ["dev", "sys", "proc", "mnt"] {
        entry(&mut archive, directory, 0o040_755, (0, 0), &[]);
    }
    entry(&mut archive, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut archive, "init", 0o100_755, (0, 0), init);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let number = archive.len() as u32 + 1;
    let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    pad(archive);
    archive.extend(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
