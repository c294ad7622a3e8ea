//! What a container is to a pod, by the annotations of Kubernetes' runtimes.

use crate::SandboxError;
use kata_protocol::Id;
use std::collections::BTreeMap;

/// Annotations that tell a container's part and its pod: containerd's, and CRI-O's.
const ANNOTATIONS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// The part that a container plays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodRole {
    /// It is in no pod: its sandbox is its own.
    Alone,
    /// It stands for the pod itself, and holds nothing but that ("pause").
    Sandbox,
    /// One of the pod's containers.
    Container {
        /// The container that stands for the pod.
        sandbox: Id,
    },
}

impl PodRole {
    /// Reads the annotations.
    ///
    /// # Errors
    /// They say that there is a pod, but not which.
    pub fn of(annotations: &BTreeMap<String, String>) -> Result<Self, SandboxError> {
        for (kind, sandbox) in ANNOTATIONS {
            match annotations.get(kind).map(String::as_str) {
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let id = annotations
                        .get(sandbox)
                        .ok_or(SandboxError::Annotation { kind, missing: sandbox })?;
                    return Ok(Self::Container { sandbox: id.parse()? });
                }
                _ => {}
            }
        }
        Ok(Self::Alone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(pairs: &[(&str, &str)]) -> Result<PodRole, SandboxError> {
        PodRole::of(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn a_container_of_a_pod_names_its_sandbox() {
        for (kind, sandbox) in ANNOTATIONS {
            let found = role(&[(kind, "container"), (sandbox, "p1")]).unwrap();
            assert_eq!(found, PodRole::Container { sandbox: "p1".parse().unwrap() });
            assert_eq!(role(&[(kind, "sandbox"), (sandbox, "p1")]).unwrap(), PodRole::Sandbox);
        }
    }

    #[test]
    fn a_container_without_annotations_is_alone() {
        assert_eq!(role(&[]).unwrap(), PodRole::Alone);
        assert_eq!(role(&[(ANNOTATIONS[0].0, "something new")]).unwrap(), PodRole::Alone);
    }

    #[test]
    fn a_pod_without_or_with_a_bad_name_is_refused() {
        let (kind, sandbox) = ANNOTATIONS[0];
        assert!(role(&[(kind, "container")]).unwrap_err().to_string().contains(sandbox));
        assert!(role(&[(kind, "container"), (sandbox, "../x")]).is_err());
    }
}
