//! Pods: containers of one pod share one virtual machine.

use std::fs;

use anyhow::{Result, ensure};
use kata_e2e::http::page;
use kata_e2e::podman::Podman;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Podman>> {
    trials!["pods":
        Both: containers_of_a_pod_share_network_name_and_ipc, pod_publishes_its_ports,
            container_restarts_while_its_pod_lives, pod_stops_and_starts_again,
            pod_can_share_processes, pod_of_a_kubernetes_file_runs;
        Kata: containers_of_a_pod_share_one_machine;
    ]
}

const SERVE: &str = "exec httpd -f -p 80 -h /var/www";

fn containers_of_a_pod_share_network_name_and_ipc(podman: &Podman) -> Result<()> {
    let pod = podman.pod("--hostname peas")?;
    let server = podman.in_pod(&pod, "", SERVE)?;
    podman.ok(&format!("exec {server} sh -c 'echo shared > /dev/shm/x'"))?;
    let line = format!("run --rm --pod {} busybox", pod.name);
    let script = "hostname; fetch http://127.0.0.1/; cat /dev/shm/x; ls /proc | grep -c '^[0-9]*$'";
    let output = podman.shell(&line, script)?.expect_code(0)?;
    let seen = output.out();
    let lines: Vec<_> = seen.lines().collect();
    ensure!(lines[..3] == ["peas", "hello from the image", "shared"], "{output}");
    // Its own processes only: the shell, ls, grep.
    ensure!(lines[3].parse::<u32>()? <= 4, "{output}");
    Ok(())
}

fn containers_of_a_pod_share_one_machine(podman: &Podman) -> Result<()> {
    let pod = podman.pod("")?;
    let first = podman.in_pod(&pod, "", "exec sleep 1000000")?;
    let second = podman.in_pod(&pod, "", "exec sleep 1000000")?;
    let boot = |name: &str| podman.ok(&format!("exec {name} cat /proc/sys/kernel/random/boot_id"));
    ensure!(boot(&first)? == boot(&second)?, "two machines");
    let other = podman.sh("", "cat /proc/sys/kernel/random/boot_id")?;
    ensure!(boot(&first)? != other, "one machine for all");
    Ok(())
}

fn pod_publishes_its_ports(podman: &Podman) -> Result<()> {
    let pod = podman.pod("-p 18081:80")?;
    podman.in_pod(&pod, "", SERVE)?;
    let seen = page("127.0.0.1:18081")?;
    ensure!(seen.ends_with("hello from the image\n"), "{seen}");
    Ok(())
}

fn container_restarts_while_its_pod_lives(podman: &Podman) -> Result<()> {
    let pod = podman.pod("")?;
    let stays = podman.in_pod(&pod, "", SERVE)?;
    let script = "trap 'exit 0' TERM; touch /tmp/up; while :; do sleep 0.1; done";
    let name = podman.in_pod(&pod, "", script)?;
    for _ in 0..2 {
        podman.ok(&format!("exec {name} sh -c 'until rm /tmp/up; do sleep 0.1; done' "))?;
        podman.ok(&format!("stop -t 60 {name}"))?;
        podman.until(&name, "exited")?;
        podman.ok(&format!("start {name}"))?;
        podman.ok(&format!("exec {name} fetch http://127.0.0.1/"))?;
    }
    podman.ok(&format!("rm -f -t 0 {name}"))?;
    podman.ok(&format!("exec {stays} true"))?;
    Ok(())
}

fn pod_stops_and_starts_again(podman: &Podman) -> Result<()> {
    let pod = podman.pod("")?;
    let name = podman.in_pod(&pod, "", SERVE)?;
    podman.ok(&format!("pod stop -t 1 {}", pod.name))?;
    podman.until(&name, "exited")?;
    podman.ok(&format!("pod start {}", pod.name))?;
    let seen = podman.ok(&format!("exec {name} fetch http://127.0.0.1/"))?;
    ensure!(seen == "hello from the image", "{seen}");
    podman.ok(&format!("pod rm -f -t 0 {}", pod.name))?;
    ensure!(podman.cmd(&format!("pod exists {}", pod.name))?.code == 1);
    Ok(())
}

fn pod_can_share_processes(podman: &Podman) -> Result<()> {
    let pod = podman.pod("--share pid,net,ipc,uts")?;
    let first = podman.in_pod(&pod, "", "exec sleep 314159")?;
    let second = podman.in_pod(&pod, "", "exec sleep 1000000")?;
    let seen = podman.ok(&format!("exec {second} ps"))?;
    ensure!(seen.contains("sleep 314159"), "{seen}");
    // A signal crosses, too.
    let script = "kill -9 $(ps | awk '/sleep 31415[9]/ { print $1 }')";
    podman.shell(&format!("exec {second}"), script)?.expect_code(0)?;
    podman.until(&first, "exited")
}

const FILE: &str = "
apiVersion: v1
kind: Pod
metadata: { name: from-file }
spec:
  restartPolicy: Never
  volumes: [ { name: shared, emptyDir: {} } ]
  initContainers:
  - name: first
    image: localhost/busybox:latest
    command: [ sh, -c, 'echo prepared > /shared/page' ]
    volumeMounts: [ { name: shared, mountPath: /shared } ]
  containers:
  - name: web
    image: localhost/busybox:latest
    command: [ httpd, -f, -p, '80', -h, /shared ]
    volumeMounts: [ { name: shared, mountPath: /shared } ]
  - name: other
    image: localhost/busybox:latest
    command: [ sleep, '1000000' ]
    resources: { limits: { memory: 64Mi } }
";

fn pod_of_a_kubernetes_file_runs(podman: &Podman) -> Result<()> {
    let file = podman.arena.dir(&podman.name())?.join("pod.yaml");
    fs::write(&file, FILE)?;
    let _alone = podman.named_network();
    podman.ok(&format!("play kube {}", file.display()))?;
    let result = (|| {
        let seen = podman.ok("exec from-file-other fetch http://127.0.0.1/page")?;
        ensure!(seen == "prepared", "{seen}");
        Ok(())
    })();
    podman.ok(&format!("play kube --down {}", file.display()))?;
    result
}
