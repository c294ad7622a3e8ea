//! Counters of the guest's interfaces, for the answer of `Stats`.

use std::fs;

use kata_protocol::agent::InterfaceStats;

/// The guest's interfaces, but loopback.
pub fn interfaces() -> Vec<InterfaceStats> {
    parse_interfaces(&fs::read_to_string("/proc/net/dev").unwrap_or_default())
}

fn parse_interfaces(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let numbers: Vec<u64> =
                counters.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect();
            let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx @ ..] =
                numbers.as_slice()
            else {
                return None;
            };
            let [tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = tx else { return None };
            Some(InterfaceStats {
                name: name.trim().to_owned(),
                rx_bytes: *rx_bytes,
                rx_packets: *rx_packets,
                rx_errors: *rx_errors,
                rx_dropped: *rx_dropped,
                tx_bytes: *tx_bytes,
                tx_packets: *tx_packets,
                tx_errors: *tx_errors,
                tx_dropped: *tx_dropped,
                ..InterfaceStats::default()
            })
        })
        .filter(|interface| interface.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_counters_are_read_and_loopback_is_left_out() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    \
            lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  \
            eth0: 100 2 3 4 0 0 0 0 900 10 11 12 0 0 0 0\n";
        let interfaces = parse_interfaces(text);
        assert_eq!(interfaces.len(), 1);
        assert_eq!(interfaces[0].name, "eth0");
        assert_eq!((interfaces[0].rx_bytes, interfaces[0].tx_bytes), (100, 900));
        assert_eq!((interfaces[0].rx_dropped, interfaces[0].tx_dropped), (4, 12));
    }
}
