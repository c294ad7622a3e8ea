//! The network of a container that no engine made one for: a namespace, a veth pair, and
//! masquerading by whatever packet filter the host has.

use anyhow::{Context, Result, bail};
use kata_protocol::Id;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// How many networks to try before giving up on finding a free one.
const TRIES: u8 = 64;

/// A network; gone when dropped.
pub struct Network {
    id: Id,
    /// The container's address.
    pub guest: Ipv4Addr,
    /// What the container joins.
    pub namespace: PathBuf,
}

/// Names of a container's network parts.
struct Names {
    namespace: String,
    host: String,
}

impl Names {
    fn of(id: &Id) -> Self {
        // Interface names have 15 characters at most.
        let hash = Sha256::digest(id.as_str().as_bytes());
        let short: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self { namespace: format!("kata-ctl-{id}"), host: format!("kv{short}") }
    }
}

/// Whether this host has what [`Network::create`] needs.
pub fn possible() -> bool {
    Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

impl Network {
    /// Makes the network of a container.
    pub fn create(id: &Id) -> Result<Self> {
        let names = Names::of(id);
        let (gateway, guest) = free_network(&routes())?;
        // The guard comes first: whatever is made from here on is removed with it.
        let namespace = PathBuf::from("/run/netns").join(&names.namespace);
        let network = Self { id: id.clone(), guest, namespace };
        let (ns, host) = (names.namespace.as_str(), names.host.as_str());
        for line in [
            format!("netns add {ns}"),
            format!("-n {ns} link set lo up"),
            format!("link add {host} type veth peer name eth0 netns {ns}"),
            format!("address add {gateway}/30 dev {host}"),
            format!("link set {host} up"),
            format!("-n {ns} address add {guest}/30 dev eth0"),
            format!("-n {ns} link set eth0 up"),
            format!("-n {ns} route add default via {gateway}"),
        ] {
            run("ip", &line)?;
        }
        if let Err(error) = masquerade(&names, guest) {
            eprintln!("kata-ctl: the container has no network beyond this host: {error:#}");
        }
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.id);
    }
}

/// Removes a container's network, whatever of it there is.
pub fn remove(id: &Id) {
    let names = Names::of(id);
    // Each part may be missing; the pair goes with the namespace, but not at once.
    let _ = run("ip", &format!("link delete {}", names.host));
    let _ = run("ip", &format!("netns delete {}", names.namespace));
    let _ = run("nft", &format!("delete table ip {}", names.namespace));
    for table in ["nat", "filter"] {
        let Ok(rules) = run("iptables", &format!("-w -t {table} -S")) else { continue };
        for rule in rules.lines().filter(|rule| is_ours(rule, &names.namespace)) {
            let deletion = rule.replacen("-A", "-D", 1).replace('"', "");
            let _ = run("iptables", &format!("-w -t {table} {deletion}"));
        }
    }
}

fn is_ours(rule: &str, comment: &str) -> bool {
    rule.starts_with("-A") && rule.split_whitespace().any(|word| word.trim_matches('"') == comment)
}

/// Lets the container reach what the host reaches.
fn masquerade(names: &Names, guest: Ipv4Addr) -> Result<()> {
    let forwarding = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
    if forwarding.trim() != "1" {
        bail!("forwarding is off; switch it on with: sysctl net.ipv4.ip_forward=1");
    }
    let (comment, host) = (&names.namespace, &names.host);
    let mark = format!("-m comment --comment {comment}");
    let rules = [
        format!("-w -t nat -A POSTROUTING -s {guest}/32 ! -o {host} {mark} -j MASQUERADE"),
        format!("-w -t filter -I FORWARD -i {host} {mark} -j ACCEPT"),
        format!("-w -t filter -I FORWARD -o {host} {mark} -j ACCEPT"),
    ];
    if rules.iter().try_for_each(|rule| run("iptables", rule).map(drop)).is_ok() {
        return Ok(());
    }
    let table = format!(
        "table ip {comment} {{ chain postrouting {{ type nat hook postrouting priority 100; \
         ip saddr {guest} oifname != \"{host}\" masquerade; }} }}\n"
    );
    nft(&table).context("neither iptables nor nft can set up address translation")
}

fn nft(rules: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run nft")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes()).context("cannot write to nft")?;
    }
    if !child.wait().context("cannot wait for nft")?.success() {
        bail!("nft refused the rules");
    }
    Ok(())
}

/// Runs a program with words that hold no spaces; its output.
fn run(program: &str, line: &str) -> Result<String> {
    let output = Command::new(program)
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {line}: {}", text.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Networks that the host has a route to: address and mask.
fn routes() -> Vec<(u32, u32)> {
    parse_routes(&fs::read_to_string("/proc/net/route").unwrap_or_default())
}

fn parse_routes(text: &str) -> Vec<(u32, u32)> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // The kernel prints them in the machine's byte order.
            let number =
                |at: usize| Some(u32::from_str_radix(fields.get(at)?, 16).ok()?.swap_bytes());
            Some((number(1)?, number(7)?))
        })
        .filter(|(_, mask)| *mask != 0)
        .collect()
}

/// A /30 that no route covers: the host's address and the container's.
fn free_network(routes: &[(u32, u32)]) -> Result<(Ipv4Addr, Ipv4Addr)> {
    for _ in 0..TRIES {
        let mut random = [0; 3];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .context("cannot get random bytes")?;
        // 10.200.0.0 to 10.254.255.255: few sites number their networks there.
        let base =
            u32::from_be_bytes([10, 200 + random[0] % 55, random[1], random[2] & 0b1111_1100]);
        let mask = u32::MAX << 2;
        let taken = |(address, other): &(u32, u32)| {
            let common = mask & other;
            base & common == address & common
        };
        if !routes.iter().any(taken) {
            return Ok((Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2)));
        }
    }
    bail!("no free network in 10.200.0.0 to 10.254.255.255: use --network none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_that_are_routed_are_not_used() {
        let all = [(u32::from(Ipv4Addr::new(10, 0, 0, 0)), 0xff00_0000)];
        assert!(free_network(&all).is_err());
        let (gateway, guest) = free_network(&[]).unwrap();
        assert_eq!(u32::from(gateway) + 1, u32::from(guest));
        assert_eq!(u32::from(gateway) & 3, 1);
    }

    #[test]
    fn the_kernels_routes_are_read() {
        let text = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
                    eth0 00000000 0102A8C0 0003 0 0 0 00000000 0 0 0\n\
                    eth0 0002A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n";
        let network = u32::from(Ipv4Addr::new(192, 168, 2, 0));
        assert_eq!(parse_routes(text), [(network, 0xffff_ff00)]);
    }

    #[test]
    fn only_our_own_rules_are_deleted() {
        let rule = "-A POSTROUTING -s 10.2.3.4/32 -m comment --comment kata-ctl-a -j MASQUERADE";
        assert!(is_ours(rule, "kata-ctl-a"));
        assert!(!is_ours(rule, "kata-ctl"));
        assert!(!is_ours("-P INPUT ACCEPT", "kata-ctl-a"));
    }

    #[test]
    fn interface_names_are_short_enough() {
        let id: Id = "x".repeat(128).parse().unwrap();
        assert!(Names::of(&id).host.len() <= 15);
    }
}
