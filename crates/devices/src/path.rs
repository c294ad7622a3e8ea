//! Where in the share something is attached.

use std::path::{Component, Path, PathBuf};

use crate::error::Error;

/// Deepest place: `<container>/<what>` and some room.
const MAX_COMPONENTS: usize = 8;

/// A checked path below the root of the share: relative, not empty, no `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharePath {
    path: PathBuf,
    /// Where the share is in the root of the process that serves it; empty: it is the root.
    share: PathBuf,
}

impl SharePath {
    /// Checks `path`.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let normal = path.components().all(|c| matches!(c, Component::Normal(_)));
        let count = path.components().count();
        let bytes = path.as_os_str().as_encoded_bytes();
        // `components` hides a `.` in the middle and doubled slashes; they are harmless.
        if !normal || count == 0 || count > MAX_COMPONENTS || bytes.contains(&0) {
            return Err(Error::Path(path.to_owned()));
        }
        Ok(Self { path: path.components().collect(), share: PathBuf::new() })
    }

    /// The same place where the share is this directory of its process's root.
    #[must_use]
    pub fn of_share_at(self, directory: &Path) -> Self {
        Self { share: directory.to_owned(), ..self }
    }

    /// Where the share is in the root of the process that serves it.
    pub(crate) fn share(&self) -> &Path {
        &self.share
    }

    /// The path, relative to the root of the share.
    pub fn as_path(&self) -> &Path {
        &self.path
    }

    /// The directory it is in; empty for one at the top.
    pub fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// Its last component.
    pub fn name(&self) -> &Path {
        self.path.file_name().map_or(Path::new(""), Path::new)
    }

    /// The directories it is in, outermost first.
    pub fn parents(&self) -> Vec<&Path> {
        let mut parents: Vec<_> =
            self.path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        parents.reverse();
        parents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ok(path: &str) -> bool {
        SharePath::new(Path::new(path)).is_ok()
    }

    #[test]
    fn paths_that_leave_the_share_are_refused() {
        for path in ["", "/", "/a", "..", "a/..", "../a", "a/../../b", "a\0b", "."] {
            assert!(!ok(path), "{path:?}");
        }
        assert!(!ok("a/b/c/d/e/f/g/h/i"));
    }

    #[test]
    fn a_path_knows_its_parents_and_its_name() {
        let path = SharePath::new(Path::new("c1//m0/x")).unwrap();
        assert_eq!(path.as_path(), Path::new("c1/m0/x"));
        assert_eq!(path.parent(), Path::new("c1/m0"));
        assert_eq!(path.name(), Path::new("x"));
        assert_eq!(path.parents(), [Path::new("c1"), Path::new("c1/m0")]);
        assert!(SharePath::new(Path::new("top")).unwrap().parents().is_empty());
    }

    proptest! {
        #[test]
        fn an_accepted_path_never_climbs(path in "[a./\\x00]{0,12}") {
            if let Ok(path) = SharePath::new(Path::new(&path)) {
                prop_assert!(path.as_path().is_relative());
                prop_assert!(path.as_path().components().all(|c| matches!(c, Component::Normal(_))));
                prop_assert!(!path.name().as_os_str().is_empty());
            }
        }
    }
}
