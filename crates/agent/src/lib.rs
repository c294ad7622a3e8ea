//! .

pub mod dns;
pub mod network;
