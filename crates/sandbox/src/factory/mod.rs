//! Templates: machines that were booted once, saved with the agent waiting, and from which
//! sandboxes are cloned.
//!
//! One *factory* process of the host keeps them, as sealed files in memory that have no name
//! (`kata_hypervisor::Snapshot`): when it ends, for whatever reason, nothing is left of them.
//! It is started by the first sandbox that would like a template, and makes it beside that
//! sandbox, which boots; `kata-ctl factory init` makes it beforehand, `destroy` ends it.
//!
//! A template is found by a key over all that matters to it ([`key`]). One whose files were
//! replaced since is never found, and goes when the next one is made. A factory of another
//! build of ours is told to end.
//!
//! Where guests are emulated it makes a *stem* of a template ([`stem`]): a clone that has met
//! its agent, built a container once, and is brought to a stand. Sandboxes are then forked from it
//! instead of cloned, and inherit the translation of all that it has run.
//!
//! With `vm_cache_number` it keeps *spares* as well ([`pool`]): sandbox servers without a sandbox,
//! each with a clone that has met its agent, built a container once, and stands still
//! ([`spare`]). Who starts a sandbox asks for one, and hands it what it would have started a
//! server with. So nobody but its own server is ever the parent of a monitor, and a spare dies
//! with the factory.
//!
//! Trust: the factory serves root only (its socket is root's), and hears nothing from any
//! guest but what booting one takes; a clone cannot change its template (the kernel's seals).

mod client;
mod keeper;
mod make;
mod pool;
mod program;
mod recipe;
mod rehearsal;
mod server;
mod spare;
mod standing;
mod stem;
mod wire;

pub(crate) use client::{Template, fetch, report_broken};
pub use client::{destroy, init, status, take};
pub(crate) use keeper::Keeper;
pub(crate) use make::NIC;
pub use recipe::Recipe;
pub(crate) use recipe::{description, key, memory_of_clones};
pub use server::main;
pub(crate) use spare::{Rehearsed, Warm};
pub use spare::{Taken, spare};
pub use stem::main as stem_main;
pub use wire::TemplateStatus;
