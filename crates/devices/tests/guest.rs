//! What a guest can do through the share, and what it cannot. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};

use kata_devices::{Monitor, Options};
use support::Share;
use support::guest::{Guest, MEMORY, REPLY, ROOT};

const NOBODY: u32 = 65534;

/// A share with a writable volume at `c1/m0` and the same one read-only at `c1/m1`.
fn start() -> (Share, Guest, std::path::PathBuf) {
    let mut share = Share::start();
    let volume = share.host_dir("volume");
    fs::write(volume.join("old"), "old").unwrap();
    share.attach(&volume, "c1/m0", false).unwrap();
    share.attach(&volume, "c1/m1", true).unwrap();
    let guest = Guest::start(&mut share);
    (share, guest, volume)
}

#[test]
fn files_belong_to_the_guest_user_who_makes_them() {
    let (_share, mut guest, volume) = start();
    let node = guest.walk("c1/m0").unwrap();
    guest.create(node, "roots", 0o644).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    (guest.uid, guest.gid) = (NOBODY, 1234);
    let (file, handle) = guest.create(node, "users", 0o640).unwrap();
    guest.write(file, handle, b"content", true).unwrap();
    let roots = fs::metadata(volume.join("roots")).unwrap();
    let users = fs::metadata(volume.join("users")).unwrap();
    assert_eq!((roots.uid(), roots.gid()), (0, 0));
    assert_eq!((users.uid(), users.gid(), users.mode() & 0o7777), (NOBODY, 1234, 0o640));
    assert_eq!(fs::read(volume.join("users")).unwrap(), b"content");
}

#[test]
fn a_write_of_a_user_drops_set_id_bits_and_file_capabilities() {
    let (_share, mut guest, volume) = start();
    let node = guest.walk("c1/m0").unwrap();
    let (file, handle) = guest.create(node, "program", 0o755).unwrap();
    fs::set_permissions(volume.join("program"), fs::Permissions::from_mode(0o6755)).unwrap();
    // VFS_CAP_REVISION_2, cap_net_raw
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    guest.set_xattr(file, "security.capability", &capability).unwrap();
    let has_capability = || {
        let mut value = [0u8; 64];
        rustix::fs::getxattr(volume.join("program"), "security.capability", &mut value).is_ok()
    };
    assert!(has_capability());
    // A guest that does not send supplementary groups (Linux before 6.3) makes the device
    // keep capabilities while it acts for a user; that must not blur what it has after.
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    (guest.uid, guest.gid) = (NOBODY, NOBODY);
    guest.create(node, "other", 0o644).unwrap();
    guest.write(file, handle, b"x", true).unwrap();
    assert_eq!(fs::metadata(volume.join("program")).unwrap().mode() & 0o7777, 0o755);
    assert!(!has_capability());
}

#[test]
fn the_share_itself_and_a_read_only_volume_cannot_be_written() {
    let (_share, mut guest, volume) = start();
    assert_eq!(guest.mkdir(ROOT, "x"), Err(libc::EROFS));
    let container = guest.walk("c1").unwrap();
    assert_eq!(guest.mkdir(container, "x"), Err(libc::EROFS));
    let readonly = guest.walk("c1/m1").unwrap();
    assert_eq!(guest.mkdir(readonly, "x"), Err(libc::EROFS));
    let old = guest.walk("c1/m1/old").unwrap();
    assert_eq!(guest.open(old, libc::O_RDWR), Err(libc::EROFS));
    assert!(guest.open(old, libc::O_RDONLY).is_ok());
    assert_eq!(guest.set_xattr(old, "user.x", b"x"), Err(libc::EROFS));
    assert_eq!(fs::read_dir(&volume).unwrap().count(), 1);
}

#[test]
fn no_name_leads_out_of_the_share() {
    let (share, mut guest, volume) = start();
    fs::write(share.dir.path().join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("../secret", volume.join("link")).unwrap();
    std::os::unix::fs::symlink("/", volume.join("root")).unwrap();
    let node = guest.walk("c1/m0").unwrap();
    for name in ["../secret", "../../../etc/passwd", "/etc/passwd", "link/", "root/etc", "a/b"] {
        assert!(guest.lookup(node, name).is_err(), "{name}");
    }
    // A symbolic link is itself, it leads nowhere on the host.
    let link = guest.lookup(node, "link").unwrap();
    assert!(guest.open(link, libc::O_RDONLY).is_err());
    // The library does not look for slashes in names; the jail's root is as far as they go.
    for up in ["../", "../../", "../../../../../../"] {
        let _ = guest.create(node, &format!("{up}made"), 0o644);
        let _ = guest.mkdir(node, &format!("{up}made-dir"));
    }
    let made = |dir: &std::path::Path| dir.join("made").exists() || dir.join("made-dir").exists();
    assert!(!made(share.dir.path()) && !made(std::path::Path::new("/")));
    assert!(!made(&share.inside("")) && !made(&share.inside("c1")));
    // "..", at the top and at a mount's root, stays inside.
    if let Ok(up) = guest.lookup(node, "..") {
        assert!(guest.lookup(up, "secret").is_err());
    }
}

#[test]
fn a_device_node_can_be_made_but_not_opened_on_the_host() {
    let (_share, mut guest, volume) = start();
    let node = guest.walk("c1/m0").unwrap();
    let null = guest.mknod(node, "null", libc::S_IFCHR | 0o666, 0x103).unwrap();
    let fifo = guest.mknod(node, "fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    assert!(fs::metadata(volume.join("null")).unwrap().file_type().is_char_device());
    for node in [null, fifo] {
        assert!(guest.open(node, libc::O_RDWR).is_err());
    }
}

#[test]
fn what_is_attached_later_is_found_and_what_is_detached_is_gone() {
    let (share, mut guest, _volume) = start();
    assert_eq!(guest.walk("c2/rootfs"), Err(libc::ENOENT));
    let later = share.host_dir("later");
    fs::write(later.join("file"), "").unwrap();
    share.attach(&later, "c2/rootfs", false).unwrap();
    assert!(guest.walk("c2/rootfs/file").is_ok());
    share.process.detach("c2/rootfs".as_ref()).unwrap();
    assert_eq!(guest.walk("c2/rootfs"), Err(libc::ENOENT));
}

/// Random requests with a proper header and known nodes. The library ends the process
/// where it cannot make sense of one; it must not crash, nor meet the system call filter.
#[test]
fn garbage_harms_nothing_but_the_share() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut answered, mut ended) = (0, 0);
    while answered < 300 {
        let (share, mut guest, _volume) = start();
        let outside = share.host_dir("outside");
        fs::write(outside.join("file"), "untouched").unwrap();
        let node = guest.walk("c1/m0").unwrap();
        let mut opcode = 0;
        // So many at a time that the mess a request makes does not spoil all later ones.
        let survived = (0..100).all(|round| {
            // Not INIT and DESTROY, which begin and end the session.
            opcode = match (random() % 60) as u32 {
                26 | 38 => 3,
                other => other,
            };
            let length = (random() % 200) as usize;
            let mut request: Vec<u8> = (0..40 + length).map(|_| random() as u8).collect();
            request[..4].copy_from_slice(&(40 + length as u32).to_le_bytes());
            request[4..8].copy_from_slice(&opcode.to_le_bytes());
            request[16..24].copy_from_slice(&[ROOT, node, random()][round % 3].to_le_bytes());
            request[36..40].fill(0);
            // Many requests end in a name.
            if let Some(last) = request[40..].last_mut() {
                *last = 0;
            }
            let answer = guest.raw(&request).is_some();
            answered += usize::from(answer);
            answer
        });
        drop(guest);
        share.wait_for_end();
        let status = share.process.child().try_wait().unwrap().unwrap();
        assert!(status.code().is_some_and(|code| code <= 1), "opcode {opcode}: {status}");
        ended += usize::from(!survived);
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "untouched");
        assert_eq!(fs::read_dir(share.dir.path()).unwrap().count(), 2);
    }
    println!("{answered} requests answered, {ended} ended the process");
}

/// A queue that points anywhere: the device may end, and nothing else.
#[test]
fn wild_descriptors_harm_nothing() {
    for chain in [
        vec![(u64::MAX - 4, 100, 1, 1), (0x40000, 100, 2, 0)],
        vec![(0x10000, u32::MAX, 1, 1), (0x40000, u32::MAX, 2, 0)],
        vec![(0x10000, 100, 1, 0)],                          // a loop
        vec![(0x10000, 100, 1, 9999), (0x40000, 100, 2, 0)], // out of the table
        vec![(0x10000, 0, 0, 0)],
        vec![(0x1000, 4096, 3, 1), (0x1000, 4096, 2, 0)], // the table itself
    ] {
        let (share, mut guest, volume) = start();
        let _ = guest.chain(&chain);
        assert_eq!(fs::read_to_string(volume.join("old")).unwrap(), "old", "{chain:?}");
        drop(guest);
        share.wait_for_end();
    }
}

#[test]
fn a_page_that_the_device_touches_first_is_the_templates() {
    let origin = rustix::fs::memfd_create("origin", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let origin = fs::File::from(origin);
    origin.set_len(MEMORY).unwrap();
    origin.write_all_at(&[0xab; 8192], REPLY).unwrap();
    let mut share = Share::start_with(Options {
        monitor: Monitor::Forked,
        touched: Some(origin.into()),
        ..Options::default()
    });
    let volume = share.host_dir("volume");
    share.attach(&volume, "c1/m0", false).unwrap();
    let mut guest = Guest::start(&mut share);
    let node = guest.walk("c1/m0").unwrap();
    // The answer is short; what is behind it in its page is what was there.
    let mut page = [0; 4096];
    guest.memory.read_exact_at(&mut page, REPLY).unwrap();
    assert!(page[..16] != [0xab; 16] && page[1024..] == [0xab; 3072]);
    // The next page is not there: nobody has touched it.
    guest.memory.read_exact_at(&mut page, REPLY + 4096).unwrap();
    assert!(page == [0; 4096]);
    let (file, handle) = guest.create(node, "made", 0o644).unwrap();
    guest.write(file, handle, b"content", false).unwrap();
    assert_eq!(fs::read(volume.join("made")).unwrap(), b"content");
}
