//! Generates the messages and the ttRPC client and server of `agent.proto`.
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            gen_mod: true,
            ..Default::default()
        })
        .run()
        .unwrap_or_else(|error| panic!("cannot generate code from agent.proto: {error}"));
    // `include!` cannot take inner attributes: turn the generated files into plain modules.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("cannot read generated {name}: {error}"));
        let text: String = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        std::fs::write(&path, text)
            .unwrap_or_else(|error| panic!("cannot write generated {name}: {error}"));
    }
}
