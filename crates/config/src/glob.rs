//! Which paths and names an administrator's patterns allow.

use regex::Regex;

/// Whether a glob of whole paths matches: `*` and `?` stay within a component, `[a-z]` is
/// one character of a set, `\` takes the next character as it is.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    glob_regex(pattern).is_some_and(|regex| regex.is_match(path))
}

/// A path that a glob can be trusted with: absolute, no `.`, `..` or empty component that
/// would lead elsewhere than it reads, and no comma, which would end it in QEMU's options.
pub(crate) fn is_plain_path(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| {
        rest.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
            && !path.contains(|c: char| c == ',' || c.is_control())
    })
}

fn glob_regex(pattern: &str) -> Option<Regex> {
    let mut out = String::from("^(?s:");
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' => out.push_str("[^/]*"),
            '?' => out.push_str("[^/]"),
            '\\' => out.push_str(&regex::escape(&chars.next()?.to_string())),
            '[' => {
                let mut set: String = chars.by_ref().take_while(|&c| c != ']').collect();
                if let Some(rest) = set.strip_prefix('!') {
                    set = format!("^{rest}");
                }
                out.push_str(&format!("[{}]", set.replace('\\', "\\\\").replace('[', "\\[")));
            }
            other => out.push_str(&regex::escape(&other.to_string())),
        }
    }
    out.push_str(")$");
    Regex::new(&out).ok()
}

/// Whether one of the administrator's expressions is the whole name.
pub(crate) fn any_name(expressions: &[String], name: &str) -> bool {
    expressions.iter().any(|e| name_regex(e).is_some_and(|regex| regex.is_match(name)))
}

/// The expression as it is used; `None` when it is none.
pub(crate) fn name_regex(expression: &str) -> Option<Regex> {
    Regex::new(&format!("^(?:{expression})$")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn globs_stay_within_a_component() {
        assert!(matches("/usr/bin/qemu-system-*", "/usr/bin/qemu-system-x86_64"));
        assert!(!matches("/usr/bin/*", "/usr/bin/x/y"));
        assert!(!matches("/usr/bin/*", "/usr/bin"));
        assert!(matches("/a/[bc]?", "/a/bx") && !matches("/a/[!bc]?", "/a/bx"));
        assert!(matches(r"/a/\*", "/a/*") && !matches(r"/a/\*", "/a/b"));
        assert!(!matches("/a.b", "/axb"));
    }

    #[test]
    fn paths_that_lead_elsewhere_are_not_plain() {
        assert!(is_plain_path("/usr/bin/qemu"));
        for bad in ["usr/bin", "/usr/../etc", "/usr/./bin", "/usr//bin", "/", "", "/a\0b", "/a,b=c"]
        {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
    }

    #[test]
    fn names_are_matched_whole() {
        let list = |e: &str| vec![e.to_owned()];
        assert!(any_name(&list(".*"), "kernel"));
        assert!(any_name(&list("kernel|default_.*"), "default_vcpus"));
        assert!(!any_name(&list("kernel"), "kernel_params"));
        assert!(!any_name(&list("("), "kernel"));
        assert!(!any_name(&[], "kernel"));
    }

    proptest! {
        #[test]
        fn any_pattern_is_used_or_refused(pattern in ".{0,20}", path in ".{0,20}") {
            let _ = matches(&pattern, &path);
            let _ = any_name(std::slice::from_ref(&pattern), &path);
        }

        #[test]
        fn a_text_without_special_characters_matches_itself_only(a in "/[a-z/.]{0,8}", b in "/[a-z/.]{0,8}") {
            prop_assert_eq!(matches(&a, &b), a == b);
        }
    }
}
