//! Bytes by FIFO, by file, by logging program; terminals.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use kata_e2e::command::{self, PATIENCE, run_with};
use kata_e2e::containerd::Containerd;
use kata_e2e::images::noise;
use kata_e2e::pty::Session;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Containerd>> {
    trials!["streams":
        Both: stdout_and_stderr_stay_apart, bytes_in_and_out_are_all_there,
            end_of_input_is_seen, terminal_has_its_size_and_follows_resizes,
            exec_has_a_terminal_when_asked, output_goes_to_a_file,
            output_goes_to_a_logging_program, output_at_exit_is_complete,
            attach_gets_what_comes;
    ]
}

fn stdout_and_stderr_stay_apart(containerd: &Containerd) -> Result<()> {
    let script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done";
    let output = containerd.run("", script)?.expect_code(0)?;
    ensure!(output.out() == "out1\nout2\nout3" && output.err() == "err1\nerr2\nerr3", "{output}");
    Ok(())
}

fn bytes_in_and_out_are_all_there(containerd: &Containerd) -> Result<()> {
    let bytes = noise(8 << 20, 11);
    let mut ctr = containerd.run_command("", &containerd.name(), "cat");
    let output = run_with(&mut ctr, Some(bytes.clone()), Duration::from_secs(200))?;
    ensure!(
        output.code == 0 && output.stdout == bytes,
        "exit {}, {} bytes: {}",
        output.code,
        output.stdout.len(),
        output.err()
    );
    Ok(())
}

fn end_of_input_is_seen(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    let exec = command::shown(&task.exec_command("", "")).replace(" sh -c ", " ");
    // Input that ends before ctr has started the process is never closed by it.
    let line = format!("(head -c 70000 /dev/zero; sleep 2) | {exec} wc -c");
    let output = command::run(Command::new("sh").args(["-c", &line]))?;
    ensure!(output.out() == "70000", "{output}");
    Ok(())
}

fn terminal_has_its_size_and_follows_resizes(containerd: &Containerd) -> Result<()> {
    let mut ctr = containerd.run_command("-t", &containerd.name(), "exec sh");
    let mut session = Session::start(&mut ctr, 24, 80)?;
    session.send("until [ \"$(stty size)\" = '24 80' ]; do sleep 0.1; done; echo si''zed\n")?;
    session.expect("sized")?;
    session.resize(40, 132)?;
    session.send("until [ \"$(stty size)\" = '40 132' ]; do sleep 0.1; done; echo resi''zed\n")?;
    session.expect("resized")?;
    session.send("exit 7\n")?;
    ensure!(session.finish(PATIENCE)? == 7);
    Ok(())
}

fn exec_has_a_terminal_when_asked(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    let mut session = Session::start(&mut task.exec_command("-t", "exec sh"), 30, 100)?;
    session.send("until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; tty; exit 4\n")?;
    session.expect("/dev/pts/")?;
    ensure!(session.finish(PATIENCE)? == 4);
    Ok(())
}

fn output_goes_to_a_file(containerd: &Containerd) -> Result<()> {
    let log = containerd.arena.dir(&containerd.name())?.join("deep/log");
    let flags = format!("--log-uri file://{}", log.display());
    let task = containerd.detached(&flags, "echo one; echo two >&2; exit 3")?;
    task.until("STOPPED")?;
    let text = fs::read_to_string(&log)?;
    ensure!(text == "one\ntwo\n" || text == "two\none\n", "{text:?}");
    Ok(())
}

fn output_goes_to_a_logging_program(containerd: &Containerd) -> Result<()> {
    let dir = containerd.arena.dir(&containerd.name())?;
    let program = dir.join("logger");
    // The protocol: 3 is standard output, 4 standard error, 5 is closed when it is ready.
    let script = "#!/bin/bash\nexec 6>\"$2\"; echo \"$CONTAINER_ID $CONTAINER_NAMESPACE\" >&6\n\
         trap '' TERM; exec 5>&-\ncat <&3 >&6 & cat <&4 >&6 & wait; echo ended >&6\n";
    fs::write(&program, script)?;
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755))?;
    let log = dir.join("log");
    let flags = format!("--log-uri binary://{}?to={}", program.display(), log.display());
    let task = containerd.detached(&flags, "echo one; exit 3")?;
    task.until("STOPPED")?;
    task.remove()?;
    command::eventually("the program ends", PATIENCE, || {
        Ok(fs::read_to_string(&log)?.ends_with("ended\n"))
    })?;
    let text = fs::read_to_string(&log)?;
    let expected = format!("{} {}\none\nended\n", task.name, containerd.arena.name);
    ensure!(text == expected, "{text:?} instead of {expected:?}");
    Ok(())
}

fn output_at_exit_is_complete(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    for round in 0..20 {
        let output = task.exec("echo a; echo b >&2; head -c 100000 /dev/zero")?;
        ensure!(
            output.stdout.len() == 100_002 && output.err() == "b",
            "round {round}: {} bytes",
            output.stdout.len()
        );
    }
    Ok(())
}

fn attach_gets_what_comes(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "while :; do echo tick; sleep 0.2; done")?;
    let mut ctr = containerd.ctr(&format!("task attach {}", task.name));
    let mut session = Session::start(&mut ctr, 24, 80)?;
    session.expect("tick")?;
    task.verb("kill -s SIGKILL")?.expect_code(0)?;
    session.finish(PATIENCE)?;
    Ok(())
}
