//! Lets the guest keep what it has read of a file that nobody changes.
//!
//! With the cache mode `auto` a guest drops its pages of a file each time it opens it. A
//! program that is started again is then read again and, where the processor is emulated,
//! translated again, which takes longer than running it. But there is no need: the guest
//! looks at a file's size and times once they are older than [`TIMEOUT`], and drops its
//! pages when those changed (`FUSE_AUTO_INVAL_DATA`). Only a change that is younger may have
//! escaped it, so a file that was changed lately is opened as before.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;

use crate::serve::TIMEOUT;

/// A file that was not changed for so long is one whose changes the guest knows of: twice
/// the time for which it trusts what it knows.
const SETTLED: Duration = TIMEOUT.saturating_mul(2);

/// A file system whose files keep their pages in the guest while they stay as they are.
pub(crate) struct KeptPages {
    pub fs: PassthroughFs,
    /// Otherwise as `fs` has it.
    pub keep: bool,
}

impl KeptPages {
    fn is_settled(&self, ctx: Context, inode: Inode, handle: Option<Handle>) -> bool {
        let Ok((attributes, _)) = self.fs.getattr(ctx, inode, handle) else { return false };
        is_settled(&attributes, SystemTime::now())
    }
}

/// Content, or anything else of it, changed last before [`SETTLED`].
fn is_settled(attributes: &Attr, now: SystemTime) -> bool {
    let Ok(now) = now.duration_since(UNIX_EPOCH) else { return false };
    [(attributes.mtime, attributes.mtimensec), (attributes.ctime, attributes.ctimensec)]
        .into_iter()
        .all(|(seconds, nanos)| {
            let changed = Duration::from_secs(seconds) + Duration::from_nanos(nanos.into());
            now.checked_sub(changed).is_some_and(|age| age > SETTLED)
        })
}

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;
type Opened = io::Result<(Option<Handle>, OpenOptions)>;

/// Hands calls on as they are.
macro_rules! as_it_is {
    ($(fn $name:ident $(<$kind:ident: $bound:path>)? ($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(fn $name $(<$kind: $bound>)? (&self, $($arg: $type),*) $(-> $result)? {
            self.fs.$name($($arg),*)
        })*
    };
}

impl FileSystem for KeptPages {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn open(&self, ctx: Context, inode: Inode, kill_priv: bool, flags: u32) -> Opened {
        let (handle, mut options) = self.fs.open(ctx, inode, kill_priv, flags)?;
        // A file that is opened for writing is about to be changed.
        let reads = flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
        if self.keep && reads && self.is_settled(ctx, inode, handle) {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((handle, options))
    }

    as_it_is! {
        fn init(capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy();
        fn lookup(ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry>;
        fn forget(ctx: Context, inode: Inode, count: u64);
        fn batch_forget(ctx: Context, requests: Vec<(Inode, u64)>);
        fn getattr(ctx: Context, inode: Inode, handle: Option<Handle>)
            -> io::Result<(Attr, Duration)>;
        fn setattr(ctx: Context, inode: Inode, attr: SetattrIn, handle: Option<Handle>,
            valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn symlink(ctx: Context, target: &CStr, parent: Inode, name: &CStr, more: Extensions)
            -> io::Result<Entry>;
        fn mknod(ctx: Context, parent: Inode, name: &CStr, mode: u32, rdev: u32, umask: u32,
            more: Extensions) -> io::Result<Entry>;
        fn mkdir(ctx: Context, parent: Inode, name: &CStr, mode: u32, umask: u32,
            more: Extensions) -> io::Result<Entry>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rename(ctx: Context, from: Inode, name: &CStr, to: Inode, new: &CStr, flags: u32)
            -> io::Result<()>;
        fn link(ctx: Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry>;
        fn create(ctx: Context, parent: Inode, name: &CStr, mode: u32, kill_priv: bool,
            flags: u32, umask: u32, more: Extensions)
            -> io::Result<(Entry, Option<Handle>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(ctx: Context, inode: Inode, handle: Handle, w: W, size: u32,
            offset: u64, owner: Option<u64>, flags: u32) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(ctx: Context, inode: Inode, handle: Handle, r: R, size: u32,
            offset: u64, owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32)
            -> io::Result<usize>;
        fn flush(ctx: Context, inode: Inode, handle: Handle, owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()>;
        fn fallocate(ctx: Context, inode: Inode, handle: Handle, mode: u32, offset: u64,
            length: u64) -> io::Result<()>;
        fn release(ctx: Context, inode: Inode, flags: u32, handle: Handle, flush: bool,
            unlock: bool, owner: Option<u64>) -> io::Result<()>;
        fn statfs(ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(ctx: Context, inode: Inode, name: &CStr, value: &[u8], flags: u32,
            more: SetxattrFlags) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Inode, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Inode, name: &CStr) -> io::Result<()>;
        fn opendir(ctx: Context, inode: Inode, flags: u32) -> Opened;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64)
            -> io::Result<Self::DirIter>;
        fn fsyncdir(ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32)
            -> io::Result<u64>;
        fn copyfilerange(ctx: Context, from: Inode, from_handle: Handle, from_offset: u64,
            to: Inode, to_handle: Handle, to_offset: u64, length: u64, flags: u64)
            -> io::Result<usize>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }
}

impl SerializableFileSystem for KeptPages {
    as_it_is! {
        fn prepare_serialization(cancel: Arc<AtomicBool>);
        fn serialize(state: File) -> io::Result<()>;
        fn deserialize_and_apply(state: File) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(content: u64, anything: u64) -> Attr {
        Attr { mtime: content, ctime: anything, ..Attr::default() }
    }

    #[test]
    fn only_files_that_were_left_alone_are_settled() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert!(is_settled(&changed(100, 100), at(103)));
        assert!(!is_settled(&changed(100, 100), at(102)));
        // Its times were set back: the change shows elsewhere.
        assert!(!is_settled(&changed(1, 102), at(103)));
        // From the future, or before all time.
        assert!(!is_settled(&changed(500, 100), at(103)));
        assert!(!is_settled(&changed(0, 0), at(1)));
    }
}
