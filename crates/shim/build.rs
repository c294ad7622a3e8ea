//! Generates the messages of `cri.proto`.
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .run()
        .unwrap_or_else(|error| panic!("cannot generate code from cri.proto: {error}"));
    // A generated file has attributes that only a module's own file may have.
    let module = format!("#[path = {:?}]\npub mod cri;\n", out.join("cri.rs"));
    std::fs::write(out.join("generated.rs"), module)
        .unwrap_or_else(|error| panic!("cannot write generated.rs: {error}"));
}
