//! `kata-ctl trace`: where the time of a start went, as a table or as OpenTelemetry spans.

use anyhow::{Context, Result, bail};
use kata_protocol::Id;
use kata_sandbox::stages::{self, Mark};
use kata_sandbox::{RUN_DIR, SandboxDir};
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Prints the stages of a sandbox, whose id may be cut short.
///
/// # Errors
/// There is no such sandbox, or nothing was started in it.
pub fn trace(name: &str, otlp: bool) -> Result<u8> {
    let id = find(name)?;
    let marks = stages::read(&SandboxDir::of(&id))
        .with_context(|| format!("nothing was started in sandbox {id} yet"))?;
    if otlp {
        println!("{}", spans(&id, &marks));
        return Ok(0);
    }
    println!("{:>9}  {:>9}  STAGE", "AT MS", "TOOK MS");
    let mut last = 0.0;
    for mark in &marks {
        println!("{:9.1}  {:9.1}  {}", mark.ms, mark.ms - last, mark.stage);
        last = mark.ms;
    }
    Ok(0)
}

/// The one sandbox whose id begins so.
fn find(name: &str) -> Result<Id> {
    let entries = std::fs::read_dir(RUN_DIR).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let ids: Vec<Id> = names
        .filter(|id| id.starts_with(name))
        .filter_map(|id| id.parse().ok())
        .filter(|id| SandboxDir::of(id).path().is_dir())
        .collect();
    match ids.as_slice() {
        [id] => Ok(id.clone()),
        [] => bail!("no sandbox begins with {name:?}: kata-runtime list shows what there is"),
        many => match many.iter().find(|id| id.as_str() == name) {
            Some(id) => Ok(id.clone()),
            None => bail!("{} sandboxes begin with {name:?}: say more of the id", many.len()),
        },
    }
}

/// One trace in OTLP's JSON encoding (`opentelemetry.proto.trace.v1.TracesData`), as files for
/// a collector's `otlpjsonfile` receiver hold it: the start, and in it each stage.
fn spans(id: &Id, marks: &[Mark]) -> Value {
    let trace = format!("{:016x}{:016x}", hash(id, 0), hash(id, 1));
    let root = format!("{:016x}", hash(id, 2));
    let began = |mark: &Mark| mark.at_ns.saturating_sub((mark.ms * 1e6) as u64);
    let (first, last) = (marks.first().map_or(0, began), marks.last().map_or(0, |mark| mark.at_ns));
    let span = |name: &str, span: String, parent: &str, from: u64, to: u64| {
        json!({
            "traceId": trace, "spanId": span, "parentSpanId": parent, "name": name, "kind": 1,
            // 64-bit numbers are texts in protobuf's JSON.
            "startTimeUnixNano": from.to_string(), "endTimeUnixNano": to.to_string(),
        })
    };
    let mut spans = vec![span("start", root.clone(), "", first, last)];
    let mut from = first;
    for (number, mark) in (3..).zip(marks) {
        let own = format!("{:016x}", hash(id, number));
        spans.push(span(&mark.stage, own, &root, from, mark.at_ns));
        from = mark.at_ns;
    }
    let attribute = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    json!({"resourceSpans": [{
        "resource": {"attributes": [
            attribute("service.name", "kata"), attribute("kata.sandbox.id", id.as_str()),
        ]},
        "scopeSpans": [{
            "scope": {"name": "kata-runtime", "version": env!("CARGO_PKG_VERSION")},
            "spans": spans,
        }],
    }]})
}

fn hash(id: &Id, number: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (id.as_str(), number).hash(&mut hasher);
    // All zeros would be no id.
    hasher.finish().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_follow_each_other_within_the_start() {
        let mark = |stage: &str, ms: f64| Mark {
            stage: stage.to_owned().into(),
            ms,
            at_ns: 1_000_000_000 + (ms * 1e6) as u64,
        };
        let id: Id = "abc".parse().unwrap();
        let text = spans(&id, &[mark("one", 1.0), mark("two", 3.5)]);
        let spans = text["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
        let times: Vec<_> = spans
            .iter()
            .map(|s| {
                (s["startTimeUnixNano"].as_str().unwrap(), s["endTimeUnixNano"].as_str().unwrap())
            })
            .collect();
        let (begin, one, two) = ("1000000000", "1001000000", "1003500000");
        assert_eq!(times, [(begin, two), (begin, one), (one, two)]);
        assert!(spans[1..].iter().all(|span| span["parentSpanId"] == spans[0]["spanId"]));
        assert_eq!(spans[0]["traceId"].as_str().unwrap().len(), 32);
    }
}
