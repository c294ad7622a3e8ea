//! Exec, attach and port-forward by the streaming server.

use anyhow::{Context, Result, ensure};
use k8s_cri::v1;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::cri::{Container, Cri};
use kata_e2e::runner::Trial;
use kata_e2e::streaming::Channels;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["streaming":
        Both: exec_gives_streams_and_code, exec_has_a_terminal_of_the_size,
            attach_speaks_with_the_process, port_is_forwarded_to_the_pods_loopback;
    ]
}

fn exec(cri: &Cri, container: &Container<'_>, script: &str, tty: bool) -> Result<Channels> {
    let request = v1::ExecRequest {
        container_id: container.id.clone(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    Channels::connect(&cri.call("Exec", async |mut c| c.exec(request).await)?.url)
}

fn exec_gives_streams_and_code(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let script = "read line; echo got $line; echo err >&2; head -c 300000 /dev/zero; exit 6";
    let mut channels = exec(cri, &container, script, false)?;
    channels.send(0, b"something\n")?;
    let done = channels.finish()?;
    ensure!(done.stdout.len() == 300_014 && done.stdout.starts_with(b"got something\n"));
    ensure!(done.stderr == b"err\n", "{:?}", String::from_utf8_lossy(&done.stderr));
    ensure!(
        done.status.contains("NonZeroExitCode") && done.status.contains("\"6\""),
        "{}",
        done.status
    );
    let done = exec(cri, &container, "exit 0", false)?.finish()?;
    ensure!(done.status.contains("Success"), "{}", done.status);
    Ok(())
}

fn exec_has_a_terminal_of_the_size(cri: &Cri) -> Result<()> {
    const RESIZE: u8 = 4;
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let script = "until [ \"$(stty size)\" = '33 111' ]; do sleep 0.1; done; echo si''zed; exec sh";
    let mut channels = exec(cri, &container, script, true)?;
    channels.send(RESIZE, br#"{"Width":111,"Height":33}"#)?;
    channels.until("sized")?;
    channels.send(0, b"tty; exit 3\n")?;
    channels.until("/dev/pts/")?;
    let done = channels.finish()?;
    ensure!(done.status.contains("\"3\""), "{}", done.status);
    Ok(())
}

fn attach_speaks_with_the_process(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let mut config = pod.container("one", "while read line; do echo you said $line; done; exit 2");
    config.stdin = true;
    let container = pod.run_config(config)?;
    let request = v1::AttachRequest {
        container_id: container.id.clone(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let answer = cri.call("Attach", async |mut c| c.attach(request).await)?;
    let mut channels = Channels::connect(&answer.url)?;
    channels.send(0, b"hello\n")?;
    channels.until("you said hello")?;
    container.until_logged("you said hello")
}

fn port_is_forwarded_to_the_pods_loopback(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    // It listens on the loopback alone, where nobody else can reach it.
    let server = pod.run("server", "exec httpd -f -p 127.0.0.1:8080 -h /var/www")?;
    server.exec("until wget -qO /dev/null http://127.0.0.1:8080/; do sleep 0.1; done")?;
    let mut page = String::new();
    command::eventually("the port is forwarded", PATIENCE, || {
        let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
        let answer = cri.call("PortForward", async |mut c| c.port_forward(request).await)?;
        // Channel 0 carries the connection, channel 1 errors; each begins with the port.
        let mut channels = Channels::connect(&answer.url)?;
        let mut heads = 2;
        channels.send(0, b"GET / HTTP/1.0\r\n\r\n")?;
        let mut bytes = Vec::new();
        while let Some((channel, data)) = channels.receive()? {
            if heads > 0 && data == 8080_u16.to_le_bytes() {
                heads -= 1;
                continue;
            }
            let text = String::from_utf8_lossy(&data).into_owned();
            ensure!(channel == 0, "an error came: {text}");
            bytes.extend(data);
        }
        page = String::from_utf8(bytes).context("a page")?;
        Ok(!page.is_empty())
    })?;
    ensure!(page.trim_end().ends_with("hello from the image"), "{page}");
    Ok(())
}
