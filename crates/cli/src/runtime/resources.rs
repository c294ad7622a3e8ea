//! What `update` changes: a file, or flags, as the specification's `resources`.

use crate::flags::Parsed;
use anyhow::{Context, Result, bail};
use kata_oci::Resources;
use serde_json::{Map, Value, json};
use std::fs;
use std::io::{self, Read};

/// Flags that take a number, and where it goes.
const NUMBERS: [(&str, &str, &str); 7] = [
    ("blkio-weight", "blockIO", "weight"),
    ("cpu-period", "cpu", "period"),
    ("cpu-quota", "cpu", "quota"),
    ("cpu-share", "cpu", "shares"),
    ("pids-limit", "pids", "limit"),
    ("cpuset-cpus", "cpu", "cpus"),
    ("cpuset-mems", "cpu", "mems"),
];

/// Flags that take a size, and where it goes.
const SIZES: [(&str, &str); 3] =
    [("memory", "limit"), ("memory-reservation", "reservation"), ("memory-swap", "swap")];

/// Flags for what a virtual machine cannot have, and why.
const REFUSED: [(&str, &str); 4] = [
    ("cpu-rt-period", "the guest's cgroups have no realtime scheduling"),
    ("cpu-rt-runtime", "the guest's cgroups have no realtime scheduling"),
    ("l3-cache-schema", "Intel RDT is a matter of the host"),
    ("mem-bw-schema", "Intel RDT is a matter of the host"),
];

/// The resources to send, JSON.
///
/// # Errors
/// Naming the flag or file that cannot be used.
pub fn read(flags: &Parsed) -> Result<Vec<u8>> {
    let bytes = match flags.text("resources") {
        Some("-") => {
            let mut bytes = Vec::new();
            io::stdin().read_to_end(&mut bytes).context("cannot read the standard input")?;
            bytes
        }
        Some(path) => fs::read(path).with_context(|| format!("cannot read {path}"))?,
        None => serde_json::to_vec(&from_flags(flags)?)?,
    };
    serde_json::from_slice::<Value>(&bytes)
        .and_then(|value| serde_json::from_value::<Resources>(without_nulls(value)))
        .context("the resources are not what the OCI specification asks for")?;
    Ok(bytes)
}

/// Go writes absent fields as null.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect(),
        ),
        other => other,
    }
}

fn from_flags(flags: &Parsed) -> Result<Value> {
    for (flag, why) in REFUSED {
        if flags.text(flag).is_some_and(|value| !value.is_empty()) {
            bail!("{flag} is not supported: {why}");
        }
    }
    let mut resources = Map::new();
    let mut put = |part: &str, field: &str, value: Value| {
        resources.entry(part).or_insert_with(|| json!({}))[field] = value;
    };
    for (flag, part, field) in NUMBERS {
        let Some(text) = flags.text(flag).filter(|text| !text.is_empty()) else { continue };
        if ["cpus", "mems"].contains(&field) {
            put(part, field, json!(text));
            continue;
        }
        let number: i64 =
            text.parse().with_context(|| format!("invalid value for {flag}: {text:?}"))?;
        // runc takes 0 for "not given".
        if number != 0 {
            put(part, field, json!(number));
        }
    }
    for (flag, field) in SIZES {
        if let Some(text) = flags.text(flag).filter(|text| !text.is_empty()) {
            let size =
                bytes(text).with_context(|| format!("invalid value for {flag}: {text:?}"))?;
            put("memory", field, json!(size));
        }
    }
    Ok(Value::Object(resources))
}

/// A size as Docker's tools write it: `-1`, `1000`, `64m`, `1.5GiB`.
pub fn bytes(text: &str) -> Option<i64> {
    if text == "-1" {
        return Some(-1);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    let factor = (1_i64 << shift) as f64;
    let size = number.parse::<f64>().ok()? * factor;
    // Beyond 2^53 a float is not exact, and no machine is that large.
    (size < (1_i64 << 53) as f64).then_some(size as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::tests::parsed;

    fn value(line: &str) -> Value {
        serde_json::from_slice(&read(&parsed("update", line)).unwrap()).unwrap()
    }

    #[test]
    fn flags_become_resources() {
        assert_eq!(
            value(
                "--memory 64m --memory-swap -1 --cpu-quota 5000 --cpuset-cpus 0-1 --pids-limit 9 c1"
            ),
            json!({"memory": {"limit": 64 << 20, "swap": -1},
                   "cpu": {"quota": 5000, "cpus": "0-1"}, "pids": {"limit": 9}})
        );
        assert_eq!(value("c1"), json!({}));
    }

    #[test]
    fn what_a_virtual_machine_cannot_have_is_refused() {
        let error = read(&parsed("update", "--l3-cache-schema x c1")).unwrap_err();
        assert!(error.to_string().contains("not supported"), "{error}");
        assert!(read(&parsed("update", "--memory 5q c1")).is_err());
    }

    #[test]
    fn a_file_is_passed_on_as_it_is_once_it_is_valid() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let text = br#"{"memory":{"limit":1000,"kernel":null},"rdma":{"x":{}}}"#;
        fs::write(&path, text).unwrap();
        let line = format!("-r {} c1", path.display());
        assert_eq!(read(&parsed("update", &line)).unwrap(), text);
        fs::write(&path, r#"{"memory":{"limit":"much"}}"#).unwrap();
        assert!(read(&parsed("update", &line)).is_err());
    }

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(bytes("1000"), Some(1000));
        assert_eq!(bytes("1.5GiB"), Some(3 << 29));
        assert_eq!(bytes("2KB"), Some(2048));
        for bad in ["", "m", "-5", "1x", "9999999p"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}
