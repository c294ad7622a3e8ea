//! Networks by CNI's own plugins.

use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use k8s_cri::v1;
use kata_e2e::command::{self, words};
use kata_e2e::cri::{Cri, Pod};
use kata_e2e::http;
use kata_e2e::runner::{Skip, Trial};
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["networks":
        Both: bridge_answers_from_host_and_from_another_pod, ptp_answers_from_the_host,
            macvlan_reaches_another_pod, ipvlan_reaches_another_pod,
            dual_stack_answers_by_both, several_interfaces_are_there,
            published_port_answers, bandwidth_is_limited, mtu_and_routes_are_the_networks;
    ]
}

/// A network: the name of its runtime handler, and what is in its configuration directory.
pub struct Network {
    pub name: &'static str,
    pub files: &'static [&'static str],
}

/// An interface that leads nowhere, for networks that hang below one.
pub fn make_uplink() -> Result<()> {
    let ip = |line: &str| command::run(Command::new("ip").args(words(line)));
    if ip("link show uplink")?.code != 0 {
        ip("link add uplink type veth peer name uplink-peer")?.expect_code(0)?;
        ip("link set uplink up")?.expect_code(0)?;
        ip("link set uplink-peer up")?.expect_code(0)?;
    }
    Ok(())
}

/// The first is the default.
pub const NETWORKS: [Network; 7] = [
    Network {
        name: "",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "pods", "plugins": [
            { "type": "bridge", "bridge": "cni-pods", "isGateway": true, "ipMasq": true,
              "hairpinMode": true,
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.85.0.0/16" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true } ] }"#],
    },
    Network {
        name: "ptp",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "points", "plugins": [
            { "type": "ptp", "ipMasq": true, "mtu": 1400,
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.86.0.0/16" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "198.51.100.0/24" }] } } ] }"#],
    },
    Network {
        name: "macvlan",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "mac", "plugins": [
            { "type": "macvlan", "master": "uplink", "mode": "bridge",
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.87.0.0/16" }]] } } ] }"#],
    },
    Network {
        name: "ipvlan",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "ipv", "plugins": [
            { "type": "ipvlan", "master": "uplink", "mode": "l2",
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]] } } ] }"#],
    },
    Network {
        name: "dual",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "dual", "plugins": [
            { "type": "bridge", "bridge": "cni-dual", "isGateway": true,
              "ipam": { "type": "host-local",
                        "ranges": [[{ "subnet": "10.89.0.0/16" }], [{ "subnet": "fd00:6b61::/64" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } } ] }"#],
    },
    Network {
        name: "two",
        files: &[
            r#"{ "cniVersion": "0.4.0", "name": "first", "plugins": [
            { "type": "bridge", "bridge": "cni-first", "isGateway": true,
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.90.0.0/16" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }] } } ] }"#,
            r#"{ "cniVersion": "0.4.0", "name": "second", "plugins": [
            { "type": "macvlan", "master": "uplink", "mode": "bridge",
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.91.0.0/16" }]] } } ] }"#,
        ],
    },
    Network {
        name: "narrow",
        files: &[r#"{ "cniVersion": "0.4.0", "name": "narrow", "plugins": [
            { "type": "bridge", "bridge": "cni-narrow", "isGateway": true,
              "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.92.0.0/16" }]] } },
            { "type": "bandwidth", "ingressRate": 16000000, "ingressBurst": 800000,
              "egressRate": 16000000, "egressBurst": 800000 } ] }"#],
    },
];

pub const SERVE: &str = "exec httpd -f -p 80 -h /var/www";
const PAGE: &str = "hello from the image";

fn expect_page(address: &str) -> Result<()> {
    let page = http::page(address)?;
    ensure!(page.trim_end().ends_with(PAGE), "{page}");
    Ok(())
}

/// A pod on `network` with a web server; its name is its own.
fn server<'a>(cri: &'a Cri, network: &str) -> Result<(Pod<'a>, String)> {
    let pod = cri.run_pod(cri.pod_config()?, network)?;
    pod.run("server", SERVE)?;
    let address = pod.address()?;
    Ok((pod, address))
}

/// A pod on `network` sees the page of the server at `address`.
fn expect_page_from_another_pod(cri: &Cri, network: &str, address: &str) -> Result<()> {
    let pod = cri.run_pod(cri.pod_config()?, network)?;
    let client = pod.run("client", "exec sleep 1000000")?;
    let seen = client.exec(&format!("fetch http://{address}/"))?;
    ensure!(seen == PAGE, "{seen}");
    Ok(())
}

fn bridge_answers_from_host_and_from_another_pod(cri: &Cri) -> Result<()> {
    let (pod, address) = server(cri, "")?;
    ensure!(address.starts_with("10.85."), "{address}");
    expect_page(&format!("{address}:80"))?;
    expect_page_from_another_pod(cri, "", &address)?;
    // Its name for itself.
    let client = pod.run("client", "exec sleep 1000000")?;
    let seen = client.exec("fetch http://127.0.0.1/; ip -4 -o addr show eth0")?;
    ensure!(seen.contains(PAGE) && seen.contains(&format!("inet {address}/16")), "{seen}");
    Ok(())
}

fn ptp_answers_from_the_host(cri: &Cri) -> Result<()> {
    let (_pod, address) = server(cri, "ptp")?;
    ensure!(address.starts_with("10.86."), "{address}");
    expect_page(&format!("{address}:80"))
}

fn macvlan_reaches_another_pod(cri: &Cri) -> Result<()> {
    let (_pod, address) = server(cri, "macvlan")?;
    ensure!(address.starts_with("10.87."), "{address}");
    expect_page_from_another_pod(cri, "macvlan", &address)
}

fn ipvlan_reaches_another_pod(cri: &Cri) -> Result<()> {
    let ip = |line: &str| command::run(Command::new("ip").args(words(line)));
    if ip("link add link uplink ipvlan-probe type ipvlan mode l2")?.code != 0 {
        return Err(Skip("this host's kernel has no ipvlan").into());
    }
    ip("link del ipvlan-probe")?.expect_code(0)?;
    let (_pod, address) = server(cri, "ipvlan")?;
    ensure!(address.starts_with("10.88."), "{address}");
    expect_page_from_another_pod(cri, "ipvlan", &address)
}

fn dual_stack_answers_by_both(cri: &Cri) -> Result<()> {
    let (pod, _) = server(cri, "dual")?;
    let addresses = pod.addresses()?;
    let [four, six] = addresses.as_slice() else {
        anyhow::bail!("not two addresses: {addresses:?}")
    };
    ensure!(four.starts_with("10.89.") && six.starts_with("fd00:6b61::"), "{addresses:?}");
    expect_page(&format!("{four}:80"))?;
    expect_page(&format!("[{six}]:80"))?;
    expect_page_from_another_pod(cri, "dual", &format!("[{six}]"))
}

fn several_interfaces_are_there(cri: &Cri) -> Result<()> {
    let (pod, address) = server(cri, "two")?;
    expect_page(&format!("{address}:80"))?;
    let container = pod.run("client", "exec sleep 1000000")?;
    let seen = container.exec("ip -4 -o addr; ip route")?;
    ensure!(seen.contains("eth0    inet 10.90.") && seen.contains("eth1    inet 10.91."), "{seen}");
    ensure!(seen.contains("default via 10.90.0.1 dev eth0"), "{seen}");
    // The second network works, too.
    let other = cri.run_pod(cri.pod_config()?, "two")?;
    let client = other.run("client", "exec sleep 1000000")?;
    let second = container.exec("ip -4 -o addr show eth1 | awk '{ print $4 }' | cut -d/ -f1")?;
    let seen = client.exec(&format!("fetch http://{second}/"))?;
    ensure!(seen == PAGE, "{seen}");
    Ok(())
}

fn published_port_answers(cri: &Cri) -> Result<()> {
    let mut config = cri.pod_config()?;
    config.port_mappings = vec![v1::PortMapping {
        protocol: v1::Protocol::Tcp.into(),
        container_port: 80,
        host_port: 18085,
        ..Default::default()
    }];
    let pod = cri.run_pod(config, "")?;
    pod.run("server", SERVE)?;
    expect_page("127.0.0.1:18085")
}

fn bandwidth_is_limited(cri: &Cri) -> Result<()> {
    const BYTES: usize = 6_000_000;
    let pod = cri.run_pod(cri.pod_config()?, "narrow")?;
    let script = format!("nc -l -p 81 -e head -c {BYTES} /dev/zero");
    let server = pod.run("server", &format!("while :; do {script}; done"))?;
    server.exec("until netstat -ltn | grep -q :81; do sleep 0.1; done")?;
    let mut stream = TcpStream::connect(format!("{}:81", pod.address()?))?;
    let began = Instant::now();
    let mut count = 0;
    let mut buffer = vec![0; 1 << 16];
    while let got @ 1.. = stream.read(&mut buffer)? {
        count += got;
    }
    let took = began.elapsed();
    ensure!(count == BYTES, "{count} bytes");
    // 16 Mbit a second, without the burst of 0.1 MB: some three seconds.
    ensure!((2.0..60.0).contains(&took.as_secs_f64()), "{took:?}");
    Ok(())
}

fn mtu_and_routes_are_the_networks(cri: &Cri) -> Result<()> {
    let pod = cri.run_pod(cri.pod_config()?, "ptp")?;
    let container = pod.run("client", "exec sleep 1000000")?;
    let seen = container.exec("cat /sys/class/net/eth0/mtu; ip route")?;
    ensure!(seen.starts_with("1400\n"), "{seen}");
    let gateway = "via 10.86.0.1 dev eth0";
    ensure!(
        seen.contains(&format!("default {gateway}"))
            && seen.contains(&format!("198.51.100.0/24 {gateway}")),
        "{seen}"
    );
    Ok(())
}
