//! Mount options: the words of `mount(8)` that runc 1.1 knows, and what they mean.

use nix::mount::MsFlags;

/// What an option does.
#[derive(Clone, Copy)]
enum Effect {
    Set(MsFlags),
    Clear(MsFlags),
    Propagation(MsFlags),
    SetAll(u64),
    ClearAll(u64),
    CopyUp,
    IdMapped,
    Nothing,
}

use Effect::{Clear, ClearAll, CopyUp, IdMapped, Nothing, Propagation, Set, SetAll};

/// `MS_NOSYMFOLLOW` and `MS_LAZYTIME`, which the bindings lack.
const NO_SYMLINK_FOLLOW: MsFlags = MsFlags::from_bits_retain(256);
const LAZY_TIME: MsFlags = MsFlags::from_bits_retain(1 << 25);
const RECURSIVE: MsFlags = MsFlags::MS_REC;

/// Attributes of `mount_setattr(2)`.
const ATTR_READ_ONLY: u64 = 0x1;
const ATTR_NO_SUID: u64 = 0x2;
const ATTR_NO_DEV: u64 = 0x4;
const ATTR_NO_EXEC: u64 = 0x8;
/// The bits that hold one of the three access time settings; 0 is relatime.
const ATTR_ATIME: u64 = 0x70;
const ATTR_NO_ATIME: u64 = 0x10;
const ATTR_STRICT_ATIME: u64 = 0x20;
const ATTR_NO_DIR_ATIME: u64 = 0x80;
const ATTR_NO_SYMLINK_FOLLOW: u64 = 0x20_0000;

/// Sorted by name.
const OPTIONS: &[(&str, Effect)] = &[
    ("acl", Set(MsFlags::MS_POSIXACL)),
    ("async", Clear(MsFlags::MS_SYNCHRONOUS)),
    ("atime", Clear(MsFlags::MS_NOATIME)),
    ("bind", Set(MsFlags::MS_BIND)),
    ("defaults", Nothing),
    ("dev", Clear(MsFlags::MS_NODEV)),
    ("diratime", Clear(MsFlags::MS_NODIRATIME)),
    ("dirsync", Set(MsFlags::MS_DIRSYNC)),
    ("exec", Clear(MsFlags::MS_NOEXEC)),
    ("idmap", IdMapped),
    ("iversion", Set(MsFlags::MS_I_VERSION)),
    ("lazytime", Set(LAZY_TIME)),
    ("loud", Clear(MsFlags::MS_SILENT)),
    ("mand", Set(MsFlags::MS_MANDLOCK)),
    ("noacl", Clear(MsFlags::MS_POSIXACL)),
    ("noatime", Set(MsFlags::MS_NOATIME)),
    ("nodev", Set(MsFlags::MS_NODEV)),
    ("nodiratime", Set(MsFlags::MS_NODIRATIME)),
    ("noexec", Set(MsFlags::MS_NOEXEC)),
    ("noiversion", Clear(MsFlags::MS_I_VERSION)),
    ("nolazytime", Clear(LAZY_TIME)),
    ("nomand", Clear(MsFlags::MS_MANDLOCK)),
    ("norelatime", Clear(MsFlags::MS_RELATIME)),
    ("nostrictatime", Clear(MsFlags::MS_STRICTATIME)),
    ("nosuid", Set(MsFlags::MS_NOSUID)),
    ("nosymfollow", Set(NO_SYMLINK_FOLLOW)),
    ("private", Propagation(MsFlags::MS_PRIVATE)),
    ("ratime", ClearAll(ATTR_NO_ATIME)),
    ("rbind", Set(MsFlags::from_bits_retain(MsFlags::MS_BIND.bits() | RECURSIVE.bits()))),
    ("rdev", ClearAll(ATTR_NO_DEV)),
    ("rdiratime", ClearAll(ATTR_NO_DIR_ATIME)),
    ("relatime", Set(MsFlags::MS_RELATIME)),
    ("remount", Set(MsFlags::MS_REMOUNT)),
    ("rexec", ClearAll(ATTR_NO_EXEC)),
    ("ridmap", IdMapped),
    ("rnoatime", SetAll(ATTR_NO_ATIME)),
    ("rnodev", SetAll(ATTR_NO_DEV)),
    ("rnodiratime", SetAll(ATTR_NO_DIR_ATIME)),
    ("rnoexec", SetAll(ATTR_NO_EXEC)),
    ("rnorelatime", ClearAll(0)),
    ("rnostrictatime", ClearAll(ATTR_STRICT_ATIME)),
    ("rnosuid", SetAll(ATTR_NO_SUID)),
    ("rnosymfollow", SetAll(ATTR_NO_SYMLINK_FOLLOW)),
    ("ro", Set(MsFlags::MS_RDONLY)),
    ("rprivate", Propagation(MsFlags::MS_PRIVATE.union(RECURSIVE))),
    ("rrelatime", SetAll(0)),
    ("rro", SetAll(ATTR_READ_ONLY)),
    ("rrw", ClearAll(ATTR_READ_ONLY)),
    ("rshared", Propagation(MsFlags::MS_SHARED.union(RECURSIVE))),
    ("rslave", Propagation(MsFlags::MS_SLAVE.union(RECURSIVE))),
    ("rstrictatime", SetAll(ATTR_STRICT_ATIME)),
    ("rsuid", ClearAll(ATTR_NO_SUID)),
    ("rsymfollow", ClearAll(ATTR_NO_SYMLINK_FOLLOW)),
    ("runbindable", Propagation(MsFlags::MS_UNBINDABLE.union(RECURSIVE))),
    ("rw", Clear(MsFlags::MS_RDONLY)),
    ("shared", Propagation(MsFlags::MS_SHARED)),
    ("silent", Set(MsFlags::MS_SILENT)),
    ("slave", Propagation(MsFlags::MS_SLAVE)),
    ("strictatime", Set(MsFlags::MS_STRICTATIME)),
    ("suid", Clear(MsFlags::MS_NOSUID)),
    ("symfollow", Clear(NO_SYMLINK_FOLLOW)),
    ("sync", Set(MsFlags::MS_SYNCHRONOUS)),
    ("tmpcopyup", CopyUp),
    ("unbindable", Propagation(MsFlags::MS_UNBINDABLE)),
];

/// Attributes to change on a whole tree of mounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TreeAttributes {
    pub set: u64,
    pub clear: u64,
}

/// The options of one mount, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountOptions {
    pub flags: MsFlags,
    /// Applied one after the other.
    pub propagation: Vec<MsFlags>,
    /// Of the mount and all below it.
    pub tree: Option<TreeAttributes>,
    /// Fill a tmpfs with what was there.
    pub copy_up: bool,
    /// Asked for an id-mapped mount, which cannot be had.
    pub id_mapped: bool,
    /// What only the file system knows, joined with commas.
    pub data: String,
}

impl MountOptions {
    /// Reads options; the later of two that contradict wins.
    pub fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: Vec::new(),
            tree: None,
            copy_up: false,
            id_mapped: false,
            data: String::new(),
        };
        for option in options {
            match OPTIONS.binary_search_by_key(&option.as_str(), |(name, _)| name) {
                Ok(at) => parsed.apply(OPTIONS[at].1),
                Err(_) if option.is_empty() => {}
                Err(_) => {
                    if !parsed.data.is_empty() {
                        parsed.data.push(',');
                    }
                    parsed.data.push_str(option);
                }
            }
        }
        parsed
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Set(flags) => self.flags.insert(flags),
            Clear(flags) => self.flags.remove(flags),
            Propagation(flags) => self.propagation.push(flags),
            SetAll(bits) => {
                let tree = self.tree.get_or_insert_default();
                // The three access times exclude each other: clear all, set one.
                if bits & !ATTR_ATIME == 0 {
                    tree.set &= !ATTR_ATIME;
                    tree.clear |= ATTR_ATIME;
                } else {
                    tree.clear &= !bits;
                }
                tree.set |= bits;
            }
            ClearAll(bits) => {
                let tree = self.tree.get_or_insert_default();
                tree.set &= !bits;
                tree.clear |= if bits & ATTR_ATIME == 0 { bits } else { ATTR_ATIME };
            }
            CopyUp => self.copy_up = true,
            IdMapped => self.id_mapped = true,
            Nothing => {}
        }
    }

    /// The flags of a bind mount that need a second mount call to take effect.
    pub fn bind_changes(&self) -> bool {
        let plain = MsFlags::MS_REC | MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        !(self.flags - plain).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn table_is_sorted_for_its_search() {
        assert!(OPTIONS.is_sorted_by_key(|(name, _)| *name));
    }

    #[test]
    fn docker_tmpfs_options_are_split_into_flags_and_data() {
        let parsed = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME);
        assert_eq!(parsed.data, "mode=755,size=65536k");
    }

    #[test]
    fn later_options_win() {
        assert_eq!(parse(&["ro", "rw"]).flags, MsFlags::empty());
        assert_eq!(parse(&["rw", "ro"]).flags, MsFlags::MS_RDONLY);
        let tree = parse(&["rro", "rrw"]).tree.unwrap();
        assert_eq!((tree.set, tree.clear), (0, ATTR_READ_ONLY));
        let tree = parse(&["rrw", "rro"]).tree.unwrap();
        assert_eq!((tree.set, tree.clear), (ATTR_READ_ONLY, 0));
        let tree = parse(&["rnoatime", "rrelatime"]).tree.unwrap();
        assert_eq!((tree.set, tree.clear), (0, ATTR_ATIME));
    }

    #[test]
    fn recursive_bind_with_propagation() {
        let parsed = parse(&["rbind", "rprivate", "ro"]);
        assert!(parsed.bind_changes());
        assert_eq!(parsed.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert!(!parse(&["rbind", "rslave"]).bind_changes());
    }

    proptest! {
        #[test]
        fn unknown_words_become_data_in_order(words in prop::collection::vec("x[a-z]{0,4}=[a-z0-9]{1,3}", 0..6)) {
            let parsed = MountOptions::parse(&words);
            prop_assert_eq!(parsed.data, words.join(","));
            prop_assert_eq!(parsed.flags, MsFlags::empty());
        }

        #[test]
        fn no_tree_attribute_is_both_set_and_cleared_but_access_times(
            picks in prop::collection::vec(0..OPTIONS.len(), 0..12),
        ) {
            let words: Vec<String> = picks.iter().map(|at| OPTIONS[*at].0.to_owned()).collect();
            let parsed = MountOptions::parse(&words);
            prop_assert!(parsed.data.is_empty());
            if let Some(tree) = parsed.tree {
                prop_assert_eq!(tree.set & tree.clear & !ATTR_ATIME, 0);
                prop_assert!(tree.set & ATTR_ATIME == 0 || tree.clear & ATTR_ATIME == ATTR_ATIME);
            }
        }
    }
}
