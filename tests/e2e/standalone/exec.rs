//! `exec` in all its forms, and a thousand of them.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::oci::{Bundle, Oci};
use kata_e2e::pty::Terminal;
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::json;

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["exec":
        Both: exec_gives_output_and_exit_code, user_environment_and_directory_are_applied,
            process_file_is_obeyed, detached_exec_leaves_its_pid, terminal_of_exec_follows_resizes,
            missing_command_of_exec_says_so, exec_into_a_stopped_container_is_refused,
            thousand_execs_lose_no_byte_and_leak_nothing;
    ]
}

fn idle(oci: &Oci) -> Result<Bundle<'_>> {
    let bundle = oci.bundle("exec sleep 1000000")?;
    bundle.start()?;
    Ok(bundle)
}

fn exec_gives_output_and_exit_code(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let output = oci
        .cmd(&format!("exec {} sh -c 'echo out; echo err >&2; exit 19'", bundle.id))?
        .expect_code(19)?;
    ensure!(output.out() == "out" && output.err() == "err", "{output}");
    oci.cmd(&format!("exec {} sh -c 'kill -9 $$'", bundle.id))?.expect_code(137)?;
    let mut cat = oci.command(&format!("exec {} cat", bundle.id));
    let bytes = kata_e2e::images::noise(3 << 20, 7);
    let output = command::run_with(&mut cat, Some(bytes.clone()), PATIENCE)?;
    ensure!(output.stdout == bytes, "{} bytes came back", output.stdout.len());
    Ok(())
}

fn user_environment_and_directory_are_applied(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let mut exec =
        oci.command(&format!("exec --user 1000:3000 --env A=b --cwd /tmp {} sh -c", bundle.id));
    let seen = command::ok(exec.arg("id -u; id -g; echo $A; pwd"))?.out();
    ensure!(seen == "1000\n3000\nb\n/tmp", "{seen}");
    Ok(())
}

fn process_file_is_obeyed(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let file = bundle.dir.join("process.json");
    let mut process = bundle.spec["process"].clone();
    process["args"] = json!([
        "sh",
        "-c",
        "id -u; pwd; echo $ONLY; grep processes /proc/self/limits | awk '{ print $3, $4 }'"
    ]);
    process["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [3000] });
    process["cwd"] = json!("/home");
    process["env"] = json!(["PATH=/bin", "ONLY=this"]);
    process["rlimits"] = json!([{ "type": "RLIMIT_NPROC", "soft": 321, "hard": 654 }]);
    fs::write(&file, process.to_string())?;
    let seen = oci.ok(&format!("exec --process {} {}", file.display(), bundle.id))?;
    ensure!(seen == "1000\n/home\nthis\n321 654", "{seen}");
    Ok(())
}

fn detached_exec_leaves_its_pid(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let pid_file = bundle.dir.join("exec.pid");
    let line = format!(
        "exec {} exec --detach --pid-file {} {} sleep 98765 </dev/null >/dev/null 2>&1",
        oci.runtime,
        pid_file.display(),
        bundle.id
    );
    command::ok(Command::new("sh").args(["-c", &line]))?;
    let pid = fs::read_to_string(&pid_file)?;
    let cmdline = fs::read_to_string(format!("/proc/{}/cmdline", pid.trim()))?;
    ensure!(cmdline.replace('\0', " ").trim() == "sleep 98765", "{cmdline:?}");
    // By the time it is said to run, it is counted.
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", pid.trim()))?;
    ensure!(cgroup.contains(&bundle.id), "{cgroup}");
    command::ok(Command::new("kill").args(["-TERM", pid.trim()]))?;
    command::eventually("the process is gone in the container too", PATIENCE, || {
        let mut exec = oci.command(&format!("exec {} sh -c", bundle.id));
        Ok(!command::ok(exec.arg("ps | grep -v grep"))?.out().contains("98765"))
    })
}

fn terminal_of_exec_follows_resizes(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let path = bundle.dir.join("exec-tty.sock");
    let listener = UnixListener::bind(&path)?;
    let line = format!(
        "exec {} exec --tty --detach --console-socket {} {} sh </dev/null >/dev/null 2>&1",
        oci.runtime,
        path.display(),
        bundle.id
    );
    command::ok(Command::new("sh").args(["-c", &line]))?;
    let mut terminal = receive_terminal(&listener)?;
    terminal.resize(41, 123)?;
    terminal
        .send("until [ \"$(stty size)\" = '41 123' ]; do sleep 0.1; done; echo resi''zed; tty\r")?;
    terminal.expect("resized")?;
    terminal.expect("/dev/pts/")?;
    terminal.send("exit\r")
}

fn missing_command_of_exec_says_so(oci: &Oci) -> Result<()> {
    let bundle = idle(oci)?;
    let output = oci.cmd(&format!("exec {} no-such-command", bundle.id))?;
    ensure!(output.code != 0 && output.err().contains("executable file not found"), "{output}");
    Ok(())
}

fn exec_into_a_stopped_container_is_refused(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    bundle.start()?;
    bundle.until("stopped")?;
    let output = oci.cmd(&format!("exec {} true", bundle.id))?;
    ensure!(output.code != 0 && output.err().contains("stopped"), "{output}");
    Ok(())
}

/// Each writes and exits at once; sizes go through what a pipe holds and beyond.
fn thousand_execs_lose_no_byte_and_leak_nothing(oci: &Oci) -> Result<()> {
    // On runc this only proves the scenario.
    let runs = if oci.is_kata() { 1000 } else { 50 };
    let bundle = idle(oci)?;
    let count = || -> Result<String> {
        let mut exec = oci.command(&format!("exec {} sh -c", bundle.id));
        Ok(command::ok(exec.arg("set -- /proc/[0-9]*; echo $#"))?.out())
    };
    let before = count()?;
    for n in 0..runs {
        let size = [1, 10, 4096, 4097, 65536, 65537, 130_001][n % 7];
        let output = oci.cmd(&format!("exec {} head -c {size} /dev/zero", bundle.id))?;
        if output.code != 0 || output.stdout.len() != size {
            bail!(
                "run {n}: {} of {size} bytes, exit {}: {}",
                output.stdout.len(),
                output.code,
                output.err()
            );
        }
    }
    let after = count()?;
    ensure!(before == after, "{before} processes before, {after} after");
    Ok(())
}

/// Takes the terminal that a runtime sends over its console socket.
pub fn receive_terminal(listener: &UnixListener) -> Result<Terminal> {
    listener.set_nonblocking(true)?;
    let mut stream = None;
    command::eventually("the runtime connects to the console socket", PATIENCE, || {
        stream = listener.accept().ok();
        Ok(stream.is_some())
    })?;
    let (stream, _) = stream.context("no connection")?;
    let mut buffer = [0_u8; 4096];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            let fd = *fds.first().context("no descriptor came")?;
            // SAFETY: the kernel has just made this descriptor for us, nobody else has it.
            return Terminal::new(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    bail!("the console socket got a message without a terminal")
}
