//! Networks as Docker gives them.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::{Container, Docker};
use kata_e2e::http;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["network":
        Both: default_bridge_reaches_gateway_and_neighbour, network_none_has_loopback_only,
            published_port_answers, published_udp_port_answers, user_network_resolves_names,
            ipv6_network_works, several_networks_give_several_interfaces,
            network_can_be_joined_while_running, networks_come_and_go_many_times,
            names_are_resolved_after_a_network_is_joined, mtu_is_the_networks,
            mtu_may_change_later, fixed_address_and_mac_are_kept, alias_resolves_to_all,
            container_may_serve_dns_on_all_addresses;
        Kata: host_network_is_refused_with_a_reason,
            network_of_another_container_is_refused_with_a_reason,
            too_many_networks_are_refused_with_a_reason, ipv6_is_on_where_it_is_with_runc;
    ]
}

const SERVE: &str = "httpd -f -p 80 -h /var/www";

fn default_bridge_reaches_gateway_and_neighbour(docker: &Docker) -> Result<()> {
    let server = docker.detached("", SERVE)?;
    let address = server.address("bridge")?;
    let script = format!(
        "ip -4 addr show eth0 | grep -o 'inet [0-9.]*'; gw=$(ip route | awk '/default/ {{ print $3 }}'); \
         ping -c1 -W20 $gw > /dev/null && echo gateway; fetch http://{address}/"
    );
    let seen = docker.sh("", &script)?;
    ensure!(
        seen.starts_with("inet 172.") && seen.ends_with("gateway\nhello from the image"),
        "{seen}"
    );
    Ok(())
}

/// What a kernel puts into every namespace by itself, depending on its modules.
const FALLBACK: [&str; 7] = ["sit0", "tunl0", "ip6tnl0", "dummy0", "gre0", "gretap0", "erspan0"];

fn network_none_has_loopback_only(docker: &Docker) -> Result<()> {
    let seen = docker.sh("--network none", &format!("{INTERFACES}; ip -4 addr show lo | grep -o 127.0.0.1/8; ping -c1 -W5 127.0.0.1 > /dev/null && echo alive; ip route"))?;
    let seen =
        seen.split_whitespace().filter(|w| !FALLBACK.contains(w)).collect::<Vec<_>>().join(" ");
    ensure!(seen == "lo 127.0.0.1/8 alive", "{seen}");
    Ok(())
}

fn host_port(docker: &Docker, container: &str, port: &str) -> Result<String> {
    let mapped = docker.ok(&format!("port {container} {port}"))?;
    let line = mapped.lines().next().unwrap_or_default();
    Ok(line.rsplit(':').next().context("a port")?.to_owned())
}

fn published_port_answers(docker: &Docker) -> Result<()> {
    let server = docker.detached("-p 80", SERVE)?;
    let page = http::page(&format!("127.0.0.1:{}", host_port(docker, &server.name, "80")?))?;
    ensure!(page.ends_with("hello from the image\n"), "{page}");
    Ok(())
}

fn published_udp_port_answers(docker: &Docker) -> Result<()> {
    let server = docker.detached("-p 7/udp", "probe udp-echo 7")?;
    let port: u16 = host_port(docker, &server.name, "7/udp")?.parse()?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    command::eventually("the datagram comes back", PATIENCE, || {
        socket.send_to(b"ping", ("127.0.0.1", port))?;
        let mut buffer = [0; 16];
        Ok(socket.recv(&mut buffer).is_ok_and(|count| &buffer[..count] == b"ping"))
    })
}

fn user_network_resolves_names(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let server = docker.detached(&format!("--network {}", network.name), SERVE)?;
    let script = format!("fetch http://{}/; nslookup {}", server.name, server.name);
    let seen = docker.sh(&format!("--network {}", network.name), &script)?;
    ensure!(seen.starts_with("hello from the image"), "{seen}");
    ensure!(seen.contains(&server.address(&network.name)?), "{seen}");
    Ok(())
}

fn ipv6_network_works(docker: &Docker) -> Result<()> {
    let network = docker.network("--ipv6 --subnet fd00:6b61:7461::/64")?;
    let options = format!("--network {}", network.name);
    let server = docker.detached(&options, SERVE)?;
    let inspected = docker.inspect(&server.name)?;
    let address = inspected["NetworkSettings"]["Networks"][&network.name]["GlobalIPv6Address"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    ensure!(address.starts_with("fd00:6b61:7461:"), "{address}");
    let script = format!(
        "ip -6 addr show eth0 | grep -c 'inet6 fd00:6b61:7461:'; fetch 'http://[{address}]/'"
    );
    let seen = docker.sh(&options, &script)?;
    ensure!(seen == "1\nhello from the image", "{seen}");
    Ok(())
}

fn ipv6_is_on_where_it_is_with_runc(docker: &Docker) -> Result<()> {
    let with = docker.network("--ipv6 --subnet fd00:6b61:7462::/64")?;
    let script = "cd /proc/sys/net/ipv6/conf; for name in all lo eth0; do \
                  [ ! -e $name ] || echo $name $(cat $name/disable_ipv6); done; \
                  ip -6 addr show lo | grep -c '::1/128'; ip -6 addr show up | grep -c 'inet6 fd00'; true";
    for network in ["bridge", "none", &with.name] {
        let [ours, runc] = ["", "--runtime runc"]
            .map(|runtime| docker.sh(&format!("--network {network} {runtime}"), script));
        let (ours, runc) = (ours?, runc?);
        ensure!(ours == runc, "{network}: {ours:?}, with runc {runc:?}");
    }
    Ok(())
}

fn several_networks_give_several_interfaces(docker: &Docker) -> Result<()> {
    let (one, two) = (docker.network("")?, docker.network("")?);
    let container = docker.created(&format!("--network {}", one.name), "sleep 100000")?;
    docker.ok(&format!("network connect {} {}", two.name, container.name))?;
    docker.ok(&format!("start {}", container.name))?;
    let seen = container.exec("ip -4 -o addr | grep -c 'eth[01] '")?;
    ensure!(seen == "2", "{seen}");
    for network in [&one, &two] {
        let server = docker.detached(&format!("--network {}", network.name), SERVE)?;
        let seen = container.exec(&format!("fetch http://{}/", server.address(&network.name)?))?;
        ensure!(seen == "hello from the image", "{seen}");
    }
    Ok(())
}

fn network_can_be_joined_while_running(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let container = docker.sleeper("")?;
    docker.ok(&format!("network connect {} {}", network.name, container.name))?;
    let address = container.address(&network.name)?;
    command::eventually("the second interface has its address", PATIENCE, || {
        Ok(container.exec("ip -4 -o addr")?.contains(&address))
    })?;
    docker.ok(&format!("network disconnect {} {}", network.name, container.name))?;
    command::eventually("the second interface is gone", PATIENCE, || {
        Ok(!container.exec("ip -4 -o addr")?.contains(&address))
    })
}

/// Interfaces of a container as every way to list them shows them, joined by spaces.
const INTERFACES: &str = "set -e; a=$(ls /sys/class/net | sort | xargs); \
    b=$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort | xargs); \
    c=$(ip -o link | cut -d: -f2 | cut -d@ -f1 | sort | xargs); \
    [ \"$a\" = \"$b\" ] && [ \"$a\" = \"$c\" ] && echo $a";

fn interfaces(container: &Container<'_>) -> Result<Vec<String>> {
    let seen = container.exec(INTERFACES)?;
    let seen = seen.split_whitespace().filter(|name| !FALLBACK.contains(name));
    Ok(seen.map(str::to_owned).collect())
}

fn networks_come_and_go_many_times(docker: &Docker) -> Result<()> {
    let networks = [docker.network("")?, docker.network("")?];
    let servers = networks
        .iter()
        .map(|network| docker.detached(&format!("--network {}", network.name), SERVE))
        .collect::<Result<Vec<_>>>()?;
    let container = docker.sleeper("")?;
    // More often than a machine has places for NICs.
    for round in 0..8 {
        let (network, server) = (&networks[round % 2], &servers[round % 2]);
        docker.ok(&format!("network connect {} {}", network.name, container.name))?;
        let address = server.address(&network.name)?;
        command::eventually("the network can be used", PATIENCE, || {
            // The engine counts on with each name it gives.
            let page = format!("timeout 5 wget -qO- http://{address}/");
            Ok(interfaces(&container)?.len() == 3 && container.exec(&page)?.contains("hello"))
        })?;
        docker.ok(&format!("network disconnect {} {}", network.name, container.name))?;
        command::eventually("the interface is gone", PATIENCE, || {
            Ok(interfaces(&container)? == ["eth0", "lo"])
        })?;
    }
    // The last one may go, too, and come back.
    docker.ok(&format!("network disconnect bridge {}", container.name))?;
    command::eventually("only lo is left", PATIENCE, || Ok(interfaces(&container)? == ["lo"]))?;
    docker.ok(&format!("network connect bridge {}", container.name))?;
    command::eventually("the default network is back", PATIENCE, || {
        let gateway = "ping -c1 -W5 $(ip route | awk '/default/ { print $3 }') > /dev/null";
        Ok(interfaces(&container)?.len() == 2 && container.exec(gateway).is_ok())
    })
}

fn names_are_resolved_after_a_network_is_joined(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let server = docker.detached(&format!("--network {}", network.name), SERVE)?;
    let container = docker.sleeper("")?;
    docker.ok(&format!("network connect {} {}", network.name, container.name))?;
    command::eventually("the server is found by its name", PATIENCE, || {
        let page =
            container.exec(&format!("timeout 5 wget -qO- http://{}/ || true", server.name))?;
        Ok(page == "hello from the image")
    })
}

fn mtu_may_change_later(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let pid = docker.inspect(&container.name)?["State"]["Pid"].to_string();
    let change = format!("-t {pid} -n ip link set eth0 mtu 1300");
    command::ok(Command::new("nsenter").args(command::words(&change)))?;
    command::eventually("the container's interface has the MTU", PATIENCE, || {
        Ok(container.exec("cat /sys/class/net/eth0/mtu")? == "1300")
    })?;
    container
        .exec("ping -c1 -W20 -s 1272 $(ip route | awk '/default/ { print $3 }') > /dev/null")?;
    Ok(())
}

/// The engine's own resolver does not take port 53 from the container.
fn container_may_serve_dns_on_all_addresses(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let options = format!("--network {}", network.name);
    let server = docker.detached(&options, SERVE)?;
    let container = docker.detached(&options, "probe udp-echo 53")?;
    let seen = container
        .exec(&format!("timeout 5 wget -qO- http://{}/", server.name))
        .with_context(|| {
            let logs = docker.cmd(&format!("logs {}", container.name));
            logs.map_or_else(|error| error.to_string(), |logs| logs.err())
        })?;
    ensure!(seen == "hello from the image", "{seen}");
    let address = container.address(&network.name)?;
    let asked = docker.sh(&options, &format!("probe udp-ask {address} 53"))?;
    ensure!(asked == "answered", "{asked}");
    let seen = docker.sh(&options, &format!("nslookup {}", container.name))?;
    ensure!(seen.contains(&address), "{seen}");
    Ok(())
}

fn too_many_networks_are_refused_with_a_reason(docker: &Docker) -> Result<()> {
    let networks = (0..5).map(|_| docker.network("")).collect::<Result<Vec<_>>>()?;
    let container = docker.created(&format!("--network {}", networks[0].name), "sleep 100000")?;
    for network in &networks[1..] {
        docker.ok(&format!("network connect {} {}", network.name, container.name))?;
    }
    let output = docker.cmd(&format!("start {}", container.name))?;
    ensure!(output.code != 0 && output.err().contains("room for (4)"), "{output}");
    docker.ok(&format!("network disconnect {} {}", networks[4].name, container.name))?;
    docker.ok(&format!("start {}", container.name))?;
    let seen = interfaces(&container)?;
    ensure!(seen == ["eth0", "eth1", "eth2", "eth3", "lo"], "{seen:?}");
    Ok(())
}

fn mtu_is_the_networks(docker: &Docker) -> Result<()> {
    let network = docker.network("-o com.docker.network.driver.mtu=1380")?;
    let seen = docker.sh(&format!("--network {}", network.name), "cat /sys/class/net/eth0/mtu")?;
    ensure!(seen == "1380", "{seen}");
    Ok(())
}

fn fixed_address_and_mac_are_kept(docker: &Docker) -> Result<()> {
    let network = docker.network("--subnet 10.99.7.0/24")?;
    let options = format!("--network {} --ip 10.99.7.77", network.name);
    let container = docker.sleeper(&options)?;
    let inspected = docker.inspect(&container.name)?;
    let mac = &inspected["NetworkSettings"]["Networks"][&network.name]["MacAddress"];
    let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; cat /sys/class/net/eth0/address";
    let seen = container.exec(script)?;
    let expected = format!("inet 10.99.7.77/24\n{}", mac.as_str().unwrap_or_default());
    ensure!(seen == expected, "{seen} instead of {expected}");
    Ok(())
}

fn alias_resolves_to_all(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let options = format!("--network {} --network-alias web", network.name);
    let (a, b) = (docker.detached(&options, SERVE)?, docker.detached(&options, SERVE)?);
    let seen = docker.sh(&format!("--network {}", network.name), "nslookup web")?;
    for container in [&a, &b] {
        ensure!(seen.contains(&container.address(&network.name)?), "{seen}");
    }
    Ok(())
}

fn host_network_is_refused_with_a_reason(docker: &Docker) -> Result<()> {
    let output = docker.cmd("run --rm --network host busybox true")?;
    let said = output.err();
    ensure!(output.code != 0 && said.contains("host") && said.contains("network"), "{output}");
    ensure!(said.contains("--network") || said.contains("-p"), "no way out is named: {output}");
    Ok(())
}

fn network_of_another_container_is_refused_with_a_reason(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let output =
        docker.cmd(&format!("run --rm --network container:{} busybox true", container.name))?;
    ensure!(output.code != 0 && output.err().contains("network"), "{output}");
    // The other one is not disturbed.
    container.exec("ping -c1 -W20 $(ip route | awk '/default/ { print $3 }') > /dev/null")?;
    Ok(())
}
