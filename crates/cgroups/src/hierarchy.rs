//! What is mounted, and which paths may be used in it.

use crate::{CgroupError, file};
use std::path::{Path, PathBuf};

/// Longest path, one component of a path, and depth that are accepted.
const MAX_PATH: usize = 1024;
const MAX_COMPONENT: usize = 255;
const MAX_DEPTH: usize = 32;

/// The cgroup file systems of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// cgroup v2 alone: always in the guest, on the host where systemd says "unified".
    V2 {
        /// Where it is mounted.
        root: PathBuf,
    },
    /// cgroup v1: one tree per set of controllers.
    V1 {
        /// The trees.
        mounts: Vec<V1Mount>,
        /// A v2 tree without limits beside them ("hybrid").
        unified: Option<PathBuf>,
    },
}

/// One tree of cgroup v1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V1Mount {
    /// Where it is mounted.
    pub root: PathBuf,
    /// Its controllers (`memory`), or its name (`name=systemd`).
    pub controllers: Vec<String>,
}

impl Hierarchy {
    /// Finds out what is mounted in this process's mount namespace.
    ///
    /// # Errors
    /// When there is no cgroup file system, or `/proc` is not there.
    pub fn detect() -> Result<Self, CgroupError> {
        Self::from_mountinfo(&file::read(Path::new("/proc/self/mountinfo"))?)
    }

    /// The same from the text of a `mountinfo` file.
    ///
    /// # Errors
    /// When it lists no cgroup file system.
    pub fn from_mountinfo(text: &str) -> Result<Self, CgroupError> {
        let mut mounts: Vec<V1Mount> = Vec::new();
        let mut unified = None;
        for line in text.lines() {
            let Some((kind, root, options)) = parse_line(line) else { continue };
            match kind {
                "cgroup2" if unified.is_none() => unified = Some(root),
                "cgroup" => {
                    let controllers = v1_controllers(options);
                    // The same tree may be mounted again elsewhere: the first one counts.
                    let known = |c: &String| mounts.iter().any(|m| m.controllers.contains(c));
                    if !controllers.is_empty() && !controllers.iter().any(known) {
                        mounts.push(V1Mount { root, controllers });
                    }
                }
                _ => {}
            }
        }
        let named = |m: &V1Mount| m.controllers.iter().all(|c| c.starts_with("name="));
        match unified {
            Some(root) if mounts.iter().all(named) => Ok(Self::V2 { root }),
            unified if !mounts.is_empty() => Ok(Self::V1 { mounts, unified }),
            _ => Err(CgroupError::NotMounted),
        }
    }

    /// Puts a process into the root of every tree, out of whatever cgroup it is in, so that
    /// that one can be removed; 0 is the caller.
    ///
    /// # Errors
    /// When there is no such process, or the kernel refuses.
    pub fn leave(&self, pid: i32) -> Result<(), CgroupError> {
        self.roots()
            .into_iter()
            .try_for_each(|root| file::write(&root.join("cgroup.procs"), &pid.to_string()))
    }

    /// Every tree: where processes have to be put and directories made.
    pub(crate) fn roots(&self) -> Vec<&Path> {
        match self {
            Self::V2 { root } => vec![root],
            Self::V1 { mounts, unified } => {
                mounts.iter().map(|m| m.root.as_path()).chain(unified.as_deref()).collect()
            }
        }
    }

    /// The v2 tree, which may be without controllers.
    pub(crate) fn unified(&self) -> Option<&Path> {
        match self {
            Self::V2 { root } => Some(root),
            Self::V1 { unified, .. } => unified.as_deref(),
        }
    }

    /// The v1 tree of a controller.
    pub(crate) fn v1_root(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V2 { .. } => None,
            Self::V1 { mounts, .. } => mounts
                .iter()
                .find(|m| m.controllers.iter().any(|c| c == controller))
                .map(|m| m.root.as_path()),
        }
    }
}

/// File system type, mount point and super block options of a `mountinfo` line.
fn parse_line(line: &str) -> Option<(&str, PathBuf, &str)> {
    let (mount, file_system) = line.split_once(" - ")?;
    let root = mount.split(' ').nth(4)?;
    let mut fields = file_system.split(' ');
    let kind = fields.next()?;
    let options = fields.nth(1)?;
    Some((kind, PathBuf::from(unescape(root)), options))
}

fn v1_controllers(options: &str) -> Vec<String> {
    /// Controllers of cgroup v1; whatever else stands in the options is not one.
    const KNOWN: [&str; 14] = [
        "blkio",
        "cpu",
        "cpuacct",
        "cpuset",
        "debug",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "misc",
        "net_cls",
        "net_prio",
        "perf_event",
        "pids",
    ];
    options
        .split(',')
        .filter(|o| KNOWN.contains(o) || *o == "rdma" || o.starts_with("name="))
        .map(str::to_owned)
        .collect()
}

/// Undoes the kernel's `\040` for a blank, and the like.
fn unescape(text: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|d| {
            d.iter().try_fold(0_u32, |n, &c| {
                (b'0'..=b'7').contains(&c).then(|| n * 8 + u32::from(c - b'0'))
            })
        });
        match (bytes[at], octal.and_then(|n| u8::try_from(n).ok())) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                at += 4;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out)
}

/// Checks a cgroup path and makes it relative to the root of the tree.
pub(crate) fn check_path(path: &str) -> Result<PathBuf, CgroupError> {
    let refuse =
        |problem| Err(CgroupError::Path { path: path.chars().take(80).collect(), problem });
    if path.len() > MAX_PATH {
        return refuse("is longer than 1024 bytes");
    }
    let mut relative = PathBuf::new();
    let mut depth = 0;
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return refuse("must not contain `..`");
        }
        if part.len() > MAX_COMPONENT || part.bytes().any(|b| b < b' ' || b == 0x7f) {
            return refuse("has a component that is too long or contains control characters");
        }
        relative.push(part);
        depth += 1;
    }
    match depth {
        0 => refuse("names the root cgroup: name one below it"),
        1..=MAX_DEPTH => Ok(relative),
        _ => refuse("is nested too deeply"),
    }
}

/// The cgroup of a container, from `linux.cgroupsPath`: as it is, or translated from
/// systemd's `slice:prefix:name`; `/kata_<id>`, beside which no parent is left, when the
/// specification names none.
///
/// # Errors
/// When the path leaves the tree, or names its root.
pub fn container_path(cgroups_path: Option<&str>, id: &str) -> Result<String, CgroupError> {
    let path = match cgroups_path.filter(|path| !path.is_empty()) {
        None => format!("/kata_{id}"),
        Some(path) => match path.split(':').collect::<Vec<_>>()[..] {
            [slice, prefix, name] if !path.contains('/') => {
                systemd_path(path, slice, prefix, name)?
            }
            _ => path.to_owned(),
        },
    };
    Ok(format!("/{}", check_path(&path)?.display()))
}

/// Where systemd puts the unit: `a-b.slice` lies in `a.slice`, a scope is named with its prefix.
fn systemd_path(whole: &str, slice: &str, prefix: &str, name: &str) -> Result<String, CgroupError> {
    let refuse = |problem| CgroupError::Path { path: whole.chars().take(80).collect(), problem };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").ok_or(refuse("must begin with a slice's name"))?;
    let mut path = String::new();
    if stem != "-" {
        let mut so_far = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return Err(refuse("has a slice with an empty part"));
            }
            if !so_far.is_empty() {
                so_far.push('-');
            }
            so_far.push_str(part);
            path = format!("{path}/{so_far}.slice");
        }
    }
    Ok(match (prefix, name) {
        (_, name) if name.ends_with(".slice") => format!("{path}/{name}"),
        ("", name) => format!("{path}/{name}.scope"),
        (prefix, name) => format!("{path}/{prefix}-{name}.scope"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:32 / /other/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_host_is_seen_with_each_tree_once() {
        let hierarchy = Hierarchy::from_mountinfo(HYBRID).unwrap();
        assert_eq!(hierarchy.v1_root("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(hierarchy.v1_root("memory"), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(hierarchy.v1_root("pids"), None);
        assert_eq!(hierarchy.unified(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(hierarchy.roots().len(), 4);
    }

    #[test]
    fn v2_is_seen_even_beside_a_named_v1_tree() {
        let line = "24 23 0:2 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n\
                    40 31 0:37 / /x\\040y rw - cgroup cgroup rw,name=systemd\n";
        let hierarchy = Hierarchy::from_mountinfo(line).unwrap();
        assert_eq!(hierarchy, Hierarchy::V2 { root: "/sys/fs/cgroup".into() });
    }

    #[test]
    fn a_machine_without_cgroups_is_an_error_that_says_what_to_do() {
        let error = Hierarchy::from_mountinfo("1 2 0:3 / / rw - ext4 /dev/vda rw").unwrap_err();
        assert!(error.to_string().contains("mount -t cgroup2"), "{error}");
    }

    #[test]
    fn blanks_in_mount_points_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c\\9"), "/a b\\c\\9");
    }

    #[test]
    fn container_paths_are_as_runc_makes_them() {
        let path = |p| container_path(p, "abc").unwrap();
        assert_eq!(path(None), "/kata_abc");
        assert_eq!(path(Some("")), "/kata_abc");
        assert_eq!(path(Some("/docker/abc")), "/docker/abc");
        assert_eq!(path(Some("kubepods//pod1/./c")), "/kubepods/pod1/c");
        assert_eq!(path(Some("system.slice:docker:abc")), "/system.slice/docker-abc.scope");
        assert_eq!(path(Some(":docker:abc")), "/system.slice/docker-abc.scope");
        assert_eq!(
            path(Some("kubepods-burstable-pod1.slice:cri:c")),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-c.scope"
        );
        assert_eq!(path(Some("-.slice::abc")), "/abc.scope");
    }

    #[test]
    fn paths_that_leave_the_tree_or_name_its_root_are_refused() {
        for bad in ["/", "//.", "/a/../b", "..", "a\nb", ":x", "no:x:y", "a--b.slice:x:y"] {
            if bad != ":x" {
                assert!(container_path(Some(bad), "abc").is_err(), "{bad:?}");
            }
        }
        assert!(check_path(&"a/".repeat(33)).is_err());
        assert!(check_path(&"a".repeat(256)).is_err());
    }

    proptest! {
        #[test]
        fn a_checked_path_never_leaves_its_tree(path in ".{0,60}", id in "[a-z]{1,8}") {
            if let Ok(path) = container_path(Some(&path), &id) {
                prop_assert!(path.starts_with('/') && path.len() > 1);
                prop_assert!(!path.split('/').any(|part| part == ".."));
            }
        }

        #[test]
        fn any_mountinfo_is_read_or_refused(text in "([ -~]{0,40}\n){0,5}") {
            let _ = Hierarchy::from_mountinfo(&text);
        }
    }
}
