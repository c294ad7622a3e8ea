//! Programs that the engine wants run on the host at points of a container's life
//! (runtime.md, "Lifecycle"): prestart, createRuntime, poststart, poststop.

use crate::SandboxError;
use kata_oci::{Hook, State};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Runs `hooks` one after the other, in the bundle's directory, each with the container's
/// state on its standard input.
///
/// # Errors
/// The first hook that cannot be run, fails or takes longer than its timeout; with what it
/// wrote to standard error. Later ones do not run.
pub(crate) async fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &State,
) -> Result<(), SandboxError> {
    for hook in hooks {
        run_one(hook, state).await.map_err(|problem| SandboxError::Hook {
            kind,
            path: hook.path.clone(),
            problem,
        })?;
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &State) -> Result<(), String> {
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(&state.bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("cannot be run: {error}"))?;
    let text = serde_json::to_vec(state).map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its input.
        let _ = stdin.write_all(&text).await;
    }
    let ended = child.wait_with_output();
    let output = match hook.timeout.filter(|seconds| *seconds > 0) {
        Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds.into()), ended)
            .await
            .map_err(|_| format!("did not end within {seconds} s and was killed"))?,
        None => ended.await,
    }
    .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ended with {}: {}", output.status, said.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_oci::Status;

    fn state() -> State {
        State {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            status: Status::Created,
            pid: 1,
            bundle: "/".into(),
            annotations: Default::default(),
        }
    }

    fn shell(script: &str, timeout: Option<u32>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).into(),
            env: vec!["KEY=value".into()],
            timeout,
        }
    }

    #[tokio::test]
    async fn hook_reads_the_state_and_sees_only_its_environment() {
        let hook = shell(
            r#"read state; test "$KEY" = value && echo "$state" | grep -q '"id":"c1"'"#,
            None,
        );
        run("prestart", &[hook], &state()).await.unwrap();
    }

    #[tokio::test]
    async fn failing_hook_is_named_with_what_it_said() {
        let error =
            run("prestart", &[shell("echo why >&2; exit 3", None)], &state()).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/bin/sh") && text.contains("why") && text.contains('3'), "{text}");
    }

    #[tokio::test]
    async fn slow_hook_is_killed() {
        let error = run("prestart", &[shell("sleep 60", Some(1))], &state()).await.unwrap_err();
        assert!(error.to_string().contains("within 1 s"), "{error}");
    }
}
