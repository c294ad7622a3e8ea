//! Names of users and groups, as an image's own files know them.

use crate::image::ConfinedRoot;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::Path;

/// Largest `/etc/passwd` or `/etc/group`, bytes.
const MAX: u64 = 1 << 20;

/// As whom a process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Where the user is at home.
    pub home: String,
}

/// Finds `user[:group]`, names or numbers; empty is the superuser.
pub fn find(root: &ConfinedRoot, text: &str) -> Result<User> {
    let passwd = read(root, "etc/passwd")?;
    let group = read(root, "etc/group")?;
    resolve(&passwd, &group, text)
}

fn read(root: &ConfinedRoot, path: &str) -> Result<String> {
    let mut bytes = Vec::new();
    match root.read(Path::new(path)) {
        Ok(file) => {
            file.take(MAX)
                .read_to_end(&mut bytes)
                .with_context(|| format!("cannot read {path}"))?;
        }
        // An image without users, or with a strange file: numbers still work.
        Err(error) => tracing::debug!("{path} of the image is not used: {error}"),
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn resolve(passwd: &str, group: &str, text: &str) -> Result<User> {
    let (name, wanted) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6
            && (fields[0] == name || number.is_some_and(|uid| fields[2].parse() == Ok(uid)))
    });
    let mut user = match (&line, number) {
        (Some(fields), _) => User {
            uid: fields[2].parse().with_context(|| format!("user {name} has a bad number"))?,
            gid: fields[3].parse().with_context(|| format!("user {name} has a bad group"))?,
            groups: Vec::new(),
            home: fields[5].to_owned(),
        },
        (None, Some(uid)) => User { uid, ..User::default() },
        (None, None) => bail!("the image has no user {name:?}: give a number"),
    };
    let groups = group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid: u32 = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    });
    match wanted {
        Some(wanted) => {
            user.gid = match wanted.parse() {
                Ok(gid) => gid,
                Err(_) => groups
                    .clone()
                    .find_map(|(name, gid, _)| (name == wanted).then_some(gid))
                    .with_context(|| format!("the image has no group {wanted:?}: give a number"))?,
            };
        }
        None => {
            if let Some(fields) = &line {
                user.groups = groups
                    .filter(|(_, gid, members)| {
                        *gid != user.gid && members.split(',').any(|member| member == fields[0])
                    })
                    .map(|(_, gid, _)| gid)
                    .collect();
            }
        }
    }
    if user.home.is_empty() {
        user.home = "/".to_owned();
    }
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:50:web,root\n";

    fn user(text: &str) -> Result<User> {
        resolve(PASSWD, GROUP, text)
    }

    #[test]
    fn names_and_numbers_are_found() {
        let web = user("web").unwrap();
        assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 34, "/var/www"));
        assert_eq!(web.groups, [50]);
        assert_eq!(user("33").unwrap(), web);
        assert_eq!(user("").unwrap().home, "/root");
        let other = user("1000").unwrap();
        assert_eq!((other.uid, other.gid, other.home.as_str()), (1000, 0, "/"));
    }

    #[test]
    fn a_group_replaces_all_groups() {
        let web = user("web:logs").unwrap();
        assert_eq!((web.uid, web.gid), (33, 50));
        assert!(web.groups.is_empty());
        assert_eq!(user("5:6").unwrap().gid, 6);
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(user("nobody").is_err());
        assert!(user("web:nobody").is_err());
    }

    proptest! {
        #[test]
        fn any_files_are_read_or_refused(passwd: String, group: String, text: String) {
            let _ = resolve(&passwd, &group, &text);
        }
    }
}
