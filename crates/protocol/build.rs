//! Generates the messages of `agent.proto`.
use std::path::PathBuf;

use protobuf_codegen::{Codegen, Customize};

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    Codegen::new()
        .pure()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        // Nobody looks into messages by the names of their fields.
        .customize(Customize::default().lite_runtime(true).gen_mod_rs(false))
        .run()
        .unwrap_or_else(|error| panic!("cannot generate code from agent.proto: {error:#}"));
    // `include!` cannot take inner attributes.
    let generated = out.join("agent.rs");
    let text = std::fs::read_to_string(&generated)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", generated.display()));
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    std::fs::write(out.join("messages.rs"), text)
        .unwrap_or_else(|error| panic!("cannot write the messages: {error}"));
}
