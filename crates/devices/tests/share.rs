//! The real process: its jail, and what attaching does. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use kata_devices::Error;
use support::Share;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};

/// A mount on the host, for the length of a test.
struct HostMount(PathBuf);

impl HostMount {
    fn tmpfs(at: &Path) -> Self {
        use rustix::mount::{MountFlags, mount};
        mount("test", at, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn the_process_is_locked_up() {
    let share = Share::start();
    let status: HashMap<String, String> = share
        .proc("status")
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
        .collect();
    // chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap
    let file_server = format!("{:016x}", 0b11111u64 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31);
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status[set], file_server, "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Seccomp"], "2");
    assert_eq!(status["Groups"], "");

    let pid = share.process.child().pid();
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    assert_eq!(share.proc("mountinfo").lines().count(), 1, "{}", share.proc("mountinfo"));
    assert!(share.mount_options("/").contains(&"ro".to_owned()));
    assert_eq!(fs::read_dir(share.inside("")).unwrap().count(), 0);
    // Every thread is filtered, not only the first.
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
}

#[test]
fn the_process_holds_no_descriptor_of_the_host_file_system() {
    let share = Share::start();
    let pid = share.process.child().pid();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = match fs::read_link(entry.unwrap().path()) {
            // It was closed since it was listed: it is not held.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            target => target.unwrap(),
        };
        let text = target.to_string_lossy().into_owned();
        let harmless = text.starts_with("socket:")
            || text.starts_with("anon_inode:")
            || text == "/dev/null"
            || text == "/"
            || text == "/fd"
            || text.ends_with(&format!("/{pid}/fd"));
        assert!(harmless, "{text}");
    }
}

#[test]
fn the_vhost_user_device_answers() {
    let mut share = Share::start();
    let stream = UnixStream::from(share.vmm.take().unwrap());
    let mut frontend = Frontend::from_stream(stream, 2);
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    assert_ne!(features & 1 << 32, 0, "VIRTIO_F_VERSION_1");
    frontend.set_features(features).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    frontend.set_protocol_features(VhostUserProtocolFeatures::REPLY_ACK).unwrap();
    assert!(share.process.child().try_wait().unwrap().is_none());
    drop(frontend);
    share.wait_for_end();
    assert!(share.process.child().try_wait().unwrap().unwrap().success());
}

#[test]
fn the_process_survives_no_nonsense_from_the_vmm_and_ends() {
    use std::io::Write;
    let mut share = Share::start();
    let mut stream = UnixStream::from(share.vmm.take().unwrap());
    stream.write_all(&[0xa5; 4096]).unwrap();
    drop(stream);
    share.wait_for_end();
}

#[test]
fn an_attached_directory_is_visible_and_goes_away() {
    let share = Share::start();
    let source = share.host_dir("volume");
    fs::write(source.join("file"), "content").unwrap();
    share.attach(&source, "c1/rootfs", false).unwrap();
    assert_eq!(fs::read_to_string(share.inside("c1/rootfs/file")).unwrap(), "content");
    fs::write(share.inside("c1/rootfs/new"), "").unwrap();
    assert!(source.join("new").exists());
    assert!(share.mount_options("/c1/rootfs").contains(&"nodev".to_owned()));

    share.attach(&source, "c1/m0", false).unwrap();
    share.process.detach(Path::new("c1/rootfs")).unwrap();
    assert!(!share.inside("c1/rootfs").exists());
    assert!(share.inside("c1/m0/file").exists());
    share.process.detach(Path::new("c1/m0")).unwrap();
    assert!(!share.inside("c1").exists());
    assert!(source.join("file").exists());
    assert!(matches!(share.process.detach(Path::new("c1/m0")), Err(Error::Detach { .. })));
    // And again at the same place.
    share.attach(&source, "c1/rootfs", false).unwrap();
    assert!(share.inside("c1/rootfs/file").exists());
}

#[test]
fn an_overlay_is_mounted_in_the_share_and_nowhere_on_the_host() {
    let share = Share::start();
    let layers = share.host_dir("layers");
    let tmp = HostMount::tmpfs(&layers);
    for dir in ["1", "2", "upper", "work"] {
        fs::create_dir(layers.join(dir)).unwrap();
    }
    fs::write(layers.join("1/low"), "1").unwrap();
    fs::write(layers.join("2/low"), "2").unwrap();
    let at = layers.display();
    let options = [
        "index=off".to_owned(),
        format!("lowerdir={at}/2:{at}/1"),
        format!("upperdir={at}/upper"),
        format!("workdir={at}/work"),
    ];
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    share
        .process
        .mount("overlay", "overlay", &options, share.dir.path(), Path::new("c1/rootfs"))
        .unwrap();
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    assert_eq!(fs::read_to_string(share.inside("c1/rootfs/low")).unwrap(), "2");
    fs::write(share.inside("c1/rootfs/new"), "").unwrap();
    assert!(layers.join("upper/new").exists());
    assert!(share.mount_options("/c1/rootfs").contains(&"nodev".to_owned()));

    share.process.detach(Path::new("c1/rootfs")).unwrap();
    assert!(!share.inside("c1").exists());
    let missing = ["lowerdir=/no/such/layer:/no/such/other".to_owned()];
    let error = share
        .process
        .mount("overlay", "o", &missing, share.dir.path(), Path::new("c1/rootfs"))
        .unwrap_err();
    assert!(error.to_string().contains("overlay"), "{error}");
    assert!(!share.inside("c1").exists());
    drop(tmp);
}

#[test]
fn a_single_file_can_be_attached_and_symbolic_links_lead_to_their_target() {
    let share = Share::start();
    let file = share.dir.path().join("hosts");
    fs::write(&file, "localhost").unwrap();
    let link = share.dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    share.attach(&link, "c1/m1", false).unwrap();
    let inside = share.inside("c1/m1");
    assert!(fs::symlink_metadata(&inside).unwrap().is_file());
    fs::write(&inside, "changed").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "changed");
    share.process.detach(Path::new("c1/m1")).unwrap();
    assert!(!inside.exists());
}

#[test]
fn a_read_only_tree_is_read_only_in_the_mount_table_with_all_below_it() {
    let share = Share::start();
    let source = share.host_dir("volume");
    let below = share.host_dir("volume/below");
    let _mount = HostMount::tmpfs(&below);
    share.attach(&source, "c1/m0", true).unwrap();
    share.attach(&source, "c1/m1", false).unwrap();
    for at in ["/c1/m0", "/c1/m0/below"] {
        assert!(share.mount_options(at).contains(&"ro".to_owned()), "{at}");
        let error = fs::write(share.inside(&format!("{at}/x")), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{at}");
    }
    fs::write(share.inside("c1/m1/below/x"), "").unwrap();
    assert!(below.join("x").exists(), "the host is not touched");
}

#[test]
fn without_recursion_mounts_below_stay_out() {
    let share = Share::start();
    let source = share.host_dir("volume");
    let below = share.host_dir("volume/below");
    let _mount = HostMount::tmpfs(&below);
    fs::write(below.join("x"), "").unwrap();
    share.process.attach(&source, Path::new("one"), false, false).unwrap();
    share.process.attach(&source, Path::new("all"), false, true).unwrap();
    assert!(!share.inside("one/below/x").exists());
    assert!(share.inside("all/below/x").exists());
}

#[test]
fn later_mounts_of_the_host_appear_in_a_writable_tree_only() {
    use rustix::mount::{MountPropagationFlags, mount_change};
    let share = Share::start();
    let source = share.host_dir("volume");
    let below = share.host_dir("volume/below");
    let _outer = HostMount::tmpfs(&source);
    fs::create_dir(&below).unwrap();
    mount_change(&source, MountPropagationFlags::SHARED).unwrap();
    share.attach(&source, "rw", false).unwrap();
    share.attach(&source, "ro", true).unwrap();
    let inner = HostMount::tmpfs(&below);
    fs::write(below.join("x"), "").unwrap();
    assert!(share.inside("rw/below/x").exists());
    assert!(!share.inside("ro/below/x").exists());
    drop(inner);
    assert!(!share.inside("rw/below/x").exists());
}

#[test]
fn nothing_is_attached_twice_at_a_place_or_inside_of_what_is_attached() {
    let share = Share::start();
    let source = share.host_dir("volume");
    share.attach(&source, "a", false).unwrap();
    assert!(matches!(share.attach(&source, "a", false), Err(Error::Occupied { .. })));
    assert!(share.attach(&source, "a/b", false).is_err());
    assert!(!source.join("b").exists());
    // A link that the container made inside its tree leads nowhere.
    std::os::unix::fs::symlink("/", source.join("up")).unwrap();
    assert!(share.attach(&source, "a/up/x", false).is_err());
    assert!(matches!(share.attach(&source, "../x", false), Err(Error::Path(_))));
}

#[test]
fn a_source_that_is_missing_is_named() {
    let share = Share::start();
    let error = share.attach(Path::new("/nonexistent/volume"), "a", false).unwrap_err();
    assert!(matches!(&error, Error::Source { .. }));
    assert!(error.to_string().contains("/nonexistent/volume"), "{error}");
    assert!(!share.inside("a").exists());
}

#[test]
fn attaching_to_a_dead_process_says_so() {
    let share = Share::start();
    let source = share.host_dir("volume");
    share.attach(&source, "a", false).unwrap();
    share.process.child().kill(libc::SIGKILL).unwrap();
    share.wait_for_end();
    let error = share.attach(&source, "b", false).unwrap_err();
    assert!(matches!(&error, Error::Died(_)), "{error:?}");
    assert!(error.to_string().contains("signal: 9"), "{error}");
    share.process.detach(Path::new("a")).unwrap();
}

#[test]
fn it_is_small() {
    let share = Share::start();
    let rollup = share.proc("smaps_rollup");
    let pss: u64 = rollup
        .lines()
        .find_map(|l| l.strip_prefix("Pss:"))
        .and_then(|v| v.trim().trim_end_matches(" kB").parse().ok())
        .unwrap();
    println!("PSS {pss} KiB");
    // The test binary is larger than the real one, and not optimised.
    assert!(pss < 8 * 1024, "{pss} KiB");
}
