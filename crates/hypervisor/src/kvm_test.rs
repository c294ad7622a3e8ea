//! The KVM self-test's two loops: one in a virtual machine, one native.
//!
//! The guest is sixteen bytes of code in long mode with identity-mapped memory. A KVM that
//! merely interprets long mode shows itself in the ratio of the two times.

use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

const ITERATIONS: u32 = 4_000_000;
const MEMORY: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x8000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// Why the test could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmTestError {
    #[error("{0} failed: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    #[error("cannot map memory for the guest: {0}")]
    Memory(std::io::Error),
    #[error("the guest stopped for another reason than its end: {0}")]
    Exit(String),
}

/// Speed of the loop in a guest, in terms of the native one.
pub(crate) fn ratio() -> Result<f64, KvmTestError> {
    let native = native_loop();
    let guest = guest_loop()?;
    Ok(native.as_secs_f64() / guest.as_secs_f64())
}

fn native_loop() -> Duration {
    let start = Instant::now();
    // SAFETY: a loop on one register; nothing else is touched.
    unsafe {
        std::arch::asm!("2: dec {0:e}", "jnz 2b", inout(reg) ITERATIONS => _, options(nomem, nostack));
    }
    start.elapsed()
}

fn guest_loop() -> Result<Duration, KvmTestError> {
    let error = |what| move |error| KvmTestError::Kvm(what, error);
    let kvm = Kvm::new().map_err(error("opening /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(error("creating a machine"))?;
    let memory = Memory::new()?;
    memory.fill();
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
        ..Default::default()
    };
    // SAFETY: the memory is mapped, of that size, and outlives the machine: both are locals,
    // and the machine was created first but runs only within this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(error("giving the machine memory"))?;
    let mut cpu = vm.create_vcpu(0).map_err(error("creating a processor"))?;
    enter_long_mode(&cpu).map_err(error("setting the processor up"))?;
    let start = Instant::now();
    match cpu.run().map_err(error("running the guest"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(KvmTestError::Exit(format!("{other:?}"))),
    }
}

fn enter_long_mode(cpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const CR0_PE_ET_PG: u64 = 0x8000_0011;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 0x500;
    let mut special = cpu.get_sregs()?;
    special.cr0 = CR0_PE_ET_PG;
    special.cr3 = PML4;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME_LMA;
    let code = &mut special.cs;
    (code.base, code.limit, code.selector, code.type_) = (0, u32::MAX, 8, 11);
    (code.present, code.dpl, code.db, code.s, code.l, code.g) = (1, 0, 0, 1, 1, 1);
    let mut data = special.cs;
    (data.selector, data.type_, data.l, data.db) = (16, 3, 0, 1);
    (special.ds, special.es, special.ss) = (data, data, data);
    cpu.set_sregs(&special)?;
    let mut registers = cpu.get_regs()?;
    (registers.rip, registers.rflags, registers.rsp) = (CODE, 2, CODE);
    cpu.set_regs(&registers)
}

/// The guest's memory.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Result<Self, KvmTestError> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let mapped = unsafe {
            mmap_anonymous(std::ptr::null_mut(), MEMORY, protection, MapFlags::PRIVATE)
        };
        mapped.map(|pointer| Self(pointer.cast())).map_err(|e| KvmTestError::Memory(e.into()))
    }

    fn fill(&self) {
        self.put(PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes());
        self.put(PDPT, &(PD | PRESENT_WRITABLE).to_le_bytes());
        self.put(PD, &(PRESENT_WRITABLE | LARGE_PAGE).to_le_bytes());
        let [a, b, c, d] = ITERATIONS.to_le_bytes();
        // mov ecx, ITERATIONS; 2: dec ecx; jnz 2b; hlt
        self.put(CODE, &[0xb9, a, b, c, d, 0xff, 0xc9, 0x75, 0xfc, 0xf4]);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        assert!(at + bytes.len() <= MEMORY, "constants of this file lie within the memory");
        // SAFETY: the range was just checked to lie in the mapping, which is ours alone.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this size and nothing refers to it.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), MEMORY) };
    }
}
