//! The child of the KVM self-test: one loop, run natively and in a VM.
//!
//! The VM has one virtual CPU in long mode, as a Linux guest is: a KVM that is fast in
//! real mode only does not pass.

use std::arch::asm;
use std::time::Instant;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use serde::{Deserialize, Serialize};

/// The guest's memory, bytes.
const MEMORY: usize = 64 << 10;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const CODE: usize = 0x4000;
/// `dec rcx; jnz -5; hlt`
const LOOP: [u8; 6] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
/// The loop is long enough for the clock when it takes this long natively.
const LONG_ENOUGH_NS: u64 = 500_000;
/// How often each is run. The fastest counts: a busy host slows some runs down, and speeds
/// none up.
const RUNS: u32 = 5;

/// How long the loop took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub native_ns: u64,
    pub vm_ns: u64,
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TestError {
    #[error("cannot {step}: {source}")]
    Kvm { step: &'static str, source: kvm_ioctls::Error },
    #[error("cannot map memory: {0}")]
    Memory(rustix::io::Errno),
    #[error("the guest ended with {0}")]
    Exit(String),
}

fn failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> TestError {
    move |source| TestError::Kvm { step, source }
}

/// Runs the loop both ways.
pub(crate) fn run() -> Result<Outcome, TestError> {
    let mut rounds = 1 << 16;
    let native_ns = loop {
        let elapsed = fastest(|| {
            native(rounds);
            Ok(())
        })?;
        if elapsed >= LONG_ENOUGH_NS {
            break elapsed;
        }
        rounds *= 2;
    };
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    map_memory(&vm)?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a virtual CPU"))?;
    // A CPU without features may not enter long mode: KVM checks, where it does not interpret.
    let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let features = features.map_err(failed("ask for the CPU's features"))?;
    vcpu.set_cpuid2(&features).map_err(failed("give the CPU its features"))?;
    enter_long_mode(&vcpu)?;
    // Once to have all in place, once for the clock.
    guest(&mut vcpu, 1)?;
    Ok(Outcome { native_ns, vm_ns: fastest(|| guest(&mut vcpu, rounds))? })
}

/// How long the fastest of some runs takes, ns.
fn fastest(mut run: impl FnMut() -> Result<(), TestError>) -> Result<u64, TestError> {
    let mut best = u64::MAX;
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_nanos() as u64);
    }
    Ok(best)
}

fn native(rounds: u64) {
    // SAFETY: counts a register down; touches nothing else.
    unsafe {
        asm!("2: dec {0}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack));
    }
}

fn map_memory(vm: &VmFd) -> Result<(), TestError> {
    // SAFETY: a fresh mapping where the kernel likes; it stays until the process ends.
    let memory = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            MEMORY,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }
    .map_err(TestError::Memory)?;
    // SAFETY: the mapping is MEMORY bytes long, aligned to pages, and no one else's.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), MEMORY) };
    let entries = [
        (PML4, PDPT as u64 | PRESENT_WRITABLE),
        (PDPT, PD as u64 | PRESENT_WRITABLE),
        // The first 2 MiB, where they are.
        (PD, PRESENT_WRITABLE | LARGE_PAGE),
    ];
    for (at, entry) in entries {
        bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    bytes[CODE..CODE + LOOP.len()].copy_from_slice(&LOOP);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the mapping is never unmapped, so the guest writes to nothing else.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("give the VM memory"))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), TestError> {
    const CR0_PROTECTED_PAGED: u64 = 1 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LONG: u64 = 1 << 8 | 1 << 10;
    let mut sregs = vcpu.get_sregs().map_err(failed("read the CPU's state"))?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_: 0b1011,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 0b0011, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PROTECTED_PAGED;
    sregs.efer |= EFER_LONG;
    vcpu.set_sregs(&sregs).map_err(failed("set the CPU's state"))
}

/// Runs the loop to its `hlt`.
fn guest(vcpu: &mut VcpuFd, rounds: u64) -> Result<(), TestError> {
    let regs = kvm_regs { rip: CODE as u64, rcx: rounds, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(failed("set the CPU's registers"))?;
    loop {
        match vcpu.run().map_err(failed("run the CPU"))? {
            VcpuExit::Hlt => return Ok(()),
            VcpuExit::Intr => {}
            other => return Err(TestError::Exit(format!("{other:?}"))),
        }
    }
}
