//! Bytes in and out: none lost, ends seen, terminals.

use std::time::Duration;

use anyhow::{Result, ensure};
use kata_e2e::command::PATIENCE;
use kata_e2e::docker::{Docker, IMAGE};
use kata_e2e::images::{noise, sha256};
use kata_e2e::pty::Session;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

const HUNDRED: usize = 100 << 20;
const LONG: Duration = Duration::from_secs(300);

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["stdio":
        Both: hundred_megabytes_in_arrive_intact, hundred_megabytes_out_arrive_intact,
            cat_gives_back_what_it_got, stderr_and_stdout_stay_apart,
            closing_stdin_is_seen, terminal_has_its_size_and_follows_resizes,
            exec_has_a_terminal_when_asked, exec_without_terminal_carries_bytes,
            interrupt_typed_on_the_terminal_arrives, output_at_exit_is_complete,
            background_child_does_not_hold_the_exit, detach_keys_leave_it_running;
    ]
}

fn hundred_megabytes_in_arrive_intact(docker: &Docker) -> Result<()> {
    let bytes = noise(HUNDRED, 1);
    let expected = sha256(&bytes[..])?;
    let output =
        docker.feed(&format!("run --rm -i {IMAGE} sha256sum"), bytes, LONG)?.expect_code(0)?;
    ensure!(output.out().starts_with(&expected), "{output}");
    Ok(())
}

fn hundred_megabytes_out_arrive_intact(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let bytes = noise(HUNDRED, 2);
    std::fs::write(dir.join("big"), &bytes)?;
    let mut client =
        docker.client(&format!("run --rm -v {}:/d:ro {IMAGE} cat /d/big", dir.display()));
    let output = kata_e2e::command::run_with(&mut client, None, LONG)?;
    ensure!(output.code == 0, "exit {}: {}", output.code, output.err());
    ensure!(output.stdout.len() == HUNDRED, "{} bytes arrived", output.stdout.len());
    ensure!(output.stdout == bytes, "bytes differ");
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

fn cat_gives_back_what_it_got(docker: &Docker) -> Result<()> {
    let bytes = noise(8 << 20, 3);
    let output = docker.feed(&format!("run --rm -i {IMAGE} cat"), bytes.clone(), LONG)?;
    ensure!(
        output.code == 0 && output.stdout == bytes,
        "{} bytes came back, exit {}",
        output.stdout.len(),
        output.code
    );
    Ok(())
}

fn stderr_and_stdout_stay_apart(docker: &Docker) -> Result<()> {
    let script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done";
    let output = docker.cmd(&format!("run --rm {IMAGE} sh -c '{script}'"))?.expect_code(0)?;
    ensure!(output.out() == "out1\nout2\nout3" && output.err() == "err1\nerr2\nerr3", "{output}");
    Ok(())
}

fn closing_stdin_is_seen(docker: &Docker) -> Result<()> {
    let output = docker.feed(
        &format!("run --rm -i {IMAGE} sh -c 'cat > /dev/null; echo end'"),
        Vec::new(),
        PATIENCE,
    )?;
    ensure!(output.out() == "end", "{output}");
    let container = docker.sleeper("")?;
    let line = format!("exec -i {} sh -c 'wc -c; echo end'", container.name);
    let output = docker.feed(&line, vec![b'x'; 70_000], PATIENCE)?.expect_code(0)?;
    ensure!(output.out() == "70000\nend", "{output}");
    Ok(())
}

fn terminal_has_its_size_and_follows_resizes(docker: &Docker) -> Result<()> {
    let mut session =
        Session::start(&mut docker.client(&format!("run --rm -it {IMAGE} sh")), 33, 111)?;
    session.expect("# ")?;
    session.send("tty; echo size=$(stty size)=\r")?;
    session.expect("/dev/pts/0")?;
    session.expect("size=33 111=")?;
    session.resize(44, 122)?;
    // The new size travels on its own; ask until it is there.
    session.send("until [ \"$(stty size)\" = '44 122' ]; do sleep 0.1; done; echo resi''zed\r")?;
    session.expect("resized")?;
    session.send("exit 12\r")?;
    let code = session.finish(PATIENCE)?;
    ensure!(code == 12, "{code}: {}", session.text());
    Ok(())
}

fn exec_has_a_terminal_when_asked(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let line = format!("exec -it {} sh", container.name);
    let mut session = Session::start(&mut docker.client(&line), 20, 70)?;
    session.expect("# ")?;
    session
        .send("test -t 0 && test -t 1 && test -t 2 && echo yes-$((1+1)); stty size; exit 3\r")?;
    session.expect("yes-2")?;
    session.expect("20 70")?;
    ensure!(session.finish(PATIENCE)? == 3);
    Ok(())
}

fn exec_without_terminal_carries_bytes(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let bytes = noise(4 << 20, 4);
    let output = docker.feed(&format!("exec -i {} cat", container.name), bytes.clone(), LONG)?;
    ensure!(output.code == 0 && output.stdout == bytes, "{} bytes came back", output.stdout.len());
    let output = docker.cmd(&format!("exec {} sh -c 'test -t 0 || echo none'", container.name))?;
    ensure!(output.out() == "none", "{output}");
    Ok(())
}

fn interrupt_typed_on_the_terminal_arrives(docker: &Docker) -> Result<()> {
    let line = format!(
        "run --rm -it {IMAGE} sh -c 'trap \"echo int; exit 8\" INT; echo up; while :; do sleep 0.1; done'"
    );
    let mut session = Session::start(&mut docker.client(&line), 24, 80)?;
    session.expect("up")?;
    session.send("\x03")?;
    session.expect("int")?;
    ensure!(session.finish(PATIENCE)? == 8);
    Ok(())
}

/// The thousand runs of this are in the standalone suite, where a run costs milliseconds.
fn output_at_exit_is_complete(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    for n in 1..=20_usize {
        let size = n * 4999;
        let output =
            docker.cmd(&format!("exec {} sh -c 'head -c {size} /dev/zero'", container.name))?;
        ensure!(
            output.code == 0 && output.stdout.len() == size,
            "{} of {size} bytes",
            output.stdout.len()
        );
    }
    Ok(())
}

fn background_child_does_not_hold_the_exit(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let line = format!("exec {} sh -c 'sleep 1000 & echo done'", container.name);
    // Docker's client itself waits for the streams' end: only the time until the exit counts.
    let mut client = docker.client(&line);
    let output = kata_e2e::command::run_with(&mut client, None, Duration::from_secs(30));
    match output {
        Ok(output) => ensure!(output.out() == "done" && output.code == 0, "{output}"),
        Err(error) if docker.is_kata() => return Err(error),
        Err(_) => {}
    }
    Ok(())
}

fn detach_keys_leave_it_running(docker: &Docker) -> Result<()> {
    let container = docker.created("-it", "sh")?;
    let mut session =
        Session::start(&mut docker.client(&format!("start -ai {}", container.name)), 24, 80)?;
    session.expect("# ")?;
    session.send("\x10\x11")?;
    session.finish(PATIENCE)?;
    docker.until(&container.name, "{{.State.Status}}", "running")?;
    let mut again =
        Session::start(&mut docker.client(&format!("attach {}", container.name)), 24, 80)?;
    again.send("echo back-$((2+3)); exit 0\r")?;
    again.expect("back-5")?;
    again.finish(PATIENCE).map(drop)
}
