//! Measures what `SPECIFICATION.md` promises.
fn main() {}
