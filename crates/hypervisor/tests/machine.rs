//! Boots a real kernel, jailed, and does to the machine what hosts and guests do.
//!
//! Needs root, QEMU and a guest kernel: `KATA_TEST_KERNEL`, else the installed one. The
//! guest's init is this test binary again: it is static, so it needs nothing but itself.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "machine/guest.rs"]
mod guest;
#[path = "machine/initramfs.rs"]
mod initramfs;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kata_hypervisor::{
    AcceleratorChoice, ChannelKind, CloneMemory, Device, Hypervisor, HypervisorError, KernelKind,
    Mac, Machine, Nic, Qemu, Share, Size, Snapshot, Start, VmConfig, accelerator,
};
use kata_jail::Role;
use kata_jail::role::Invocation;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

kata_jail::roles_before_main!(play);

fn play(invocation: Invocation) -> i32 {
    match invocation.role {
        Role::JailExec => kata_jail::exec::main(&invocation.args),
        Role::KvmSelfTest => accelerator::self_test_main(),
        other => panic!("{other} is unknown"),
    }
}

/// A guest on a busy machine without KVM may take this long to boot.
const BOOT: Duration = Duration::from_secs(60);

fn kernel() -> PathBuf {
    if let Some(path) = std::env::var_os("KATA_TEST_KERNEL") {
        return path.into();
    }
    let installed =
        ["/usr/share/kata-containers/vmlinux", "/usr/local/share/kata-containers/vmlinux"];
    installed.iter().map(PathBuf::from).find(|path| path.exists()).expect(
        "no guest kernel to test with: set KATA_TEST_KERNEL, or install one with `make install`",
    )
}

/// A machine whose init does `what`.
fn config(directory: &tempfile::TempDir, what: &str) -> VmConfig {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let initrd = directory.path().join("initrd");
    if !initrd.exists() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        std::fs::write(&initrd, initramfs::with_init(&own)).unwrap();
    }
    let verdict = accelerator::choose(AcceleratorChoice::Tcg);
    VmConfig {
        id: format!("test-{what}"),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        firmware: None,
        kernel: kernel(),
        kernel_kind: KernelKind::of(&kernel()).unwrap(),
        initrd,
        quiet: true,
        kernel_params: vec![format!("GUEST_DOES={what}")],
        machine: Machine::Q35,
        machine_options: String::new(),
        cpu_options: String::new(),
        entropy: None,
        filter: String::new(),
        accelerator: verdict.accelerator,
        tsc_khz: verdict.tsc_khz,
        memory_mib: 256,
        max_memory_mib: 1024,
        memory_slots: 2,
        vcpus: 1,
        max_vcpus: 1,
        nics: Vec::new(),
        vhost_net: false,
        hotplug_ports: 1,
        share: None,
        channel: ChannelKind::Serial,
        start: Start::Boot,
        jail: true,
        netns: None,
        uid: 200_000 + NEXT.fetch_add(1, Ordering::Relaxed),
    }
}

/// Waits for a line on the guest's console.
async fn says(vm: &Qemu, text: &str) {
    let deadline = Instant::now() + BOOT;
    let mut exited = vm.exited();
    loop {
        let lines = vm.console().last_lines(50);
        if lines.iter().any(|line| line.contains(text)) {
            return;
        }
        assert!(Instant::now() < deadline, "the guest never said {text:?}, but: {lines:#?}");
        let soon = Duration::from_millis(10);
        if let Ok(exit) = tokio::time::timeout(soon, exited.wait()).await {
            panic!("the machine ended: {exit}");
        }
    }
}

async fn started(config: VmConfig) -> Qemu {
    let mut vm = Qemu::new(config);
    vm.start().await.unwrap();
    vm
}

fn status_of(pid: i32, key: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[tokio::test]
async fn a_guest_boots_in_its_jail_and_stops_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(&directory, "sleep");
    let uid = config.uid;
    let mut vm = started(config).await;
    says(&vm, "init is up").await;

    let pid = vm.pid();
    assert_eq!(vm.pids(), [pid]);
    assert_eq!(status_of(pid, "Uid"), [uid; 4].map(|uid| uid.to_string()).join("\t"));
    assert_eq!(status_of(pid, "CapEff"), "0000000000000000");
    assert_eq!(status_of(pid, "Seccomp:"), "2", "qemu's own filter is on");
    assert!(status_of(pid, "NSpid").ends_with("\t1"));
    let mut root: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    root.retain(|name| !["usr", "lib", "lib64", "etc"].contains(&name.as_str()));
    root.sort();
    assert_eq!(root, ["firmware", "initrd", "kernel"]);
    let etc = std::fs::read_dir(format!("/proc/{pid}/root/etc")).unwrap();
    assert!(etc.count() <= 1, "more than the cache of libraries is visible in /etc");

    let start = Instant::now();
    let exit = vm.stop().await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "stop took {:?}", start.elapsed());
    assert!(exit.expected, "{exit:?}");
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    println!("stop took {:?}", start.elapsed());
}

#[tokio::test]
async fn a_panic_is_an_end_with_its_cause() {
    let directory = tempfile::tempdir().unwrap();
    let vm = started(config(&directory, "panic")).await;
    let exit = tokio::time::timeout(BOOT, vm.exited()).await.unwrap();
    assert!(exit.panicked && !exit.expected, "{exit:?}");
    assert!(exit.cause.contains("Attempted to kill init"), "{}", exit.cause);
    assert!(exit.console.iter().any(|line| line.contains("init is up")), "{exit:?}");
}

#[tokio::test]
async fn the_guests_own_power_off_is_told_from_a_fault() {
    let directory = tempfile::tempdir().unwrap();
    let vm = started(config(&directory, "restart")).await;
    let exit = tokio::time::timeout(BOOT, vm.exited()).await.unwrap();
    assert_eq!(exit.cause, "the guest restarted itself", "{exit:?}");
}

#[tokio::test]
async fn a_killed_qemu_is_noticed_at_once_by_all() {
    let directory = tempfile::tempdir().unwrap();
    let mut vm = started(config(&directory, "sleep")).await;
    says(&vm, "init is up").await;
    let (exited, start) = (vm.exited(), Instant::now());
    // SAFETY: kills a process of ours.
    unsafe { libc::kill(vm.pid(), libc::SIGKILL) };
    let exit = exited.await;
    assert!(start.elapsed() < Duration::from_millis(500), "noticed after {:?}", start.elapsed());
    assert_eq!(exit.cause, "qemu was killed by signal 9 (SIGKILL)");
    assert_eq!(exit.status.unwrap().signal(), Some(9));
    assert!(exit.to_string().contains("init is up"), "{exit}");
    match vm.pause().await {
        Err(HypervisorError::Exited(_)) => {}
        other => panic!("{other:?}"),
    }
    println!("the exit was known after {:?}", start.elapsed());
}

#[tokio::test]
async fn a_qemu_that_refuses_to_start_is_quoted() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&directory, "sleep");
    let broken = directory.path().join("kernel");
    std::fs::write(&broken, "no kernel").unwrap();
    config.kernel = broken;
    let exit = tokio::time::timeout(BOOT, started(config).await.exited()).await.unwrap();
    assert!(exit.cause.starts_with("qemu exited with code 1: "), "{exit:?}");
    assert!(exit.cause.contains("kernel"), "{exit:?}");
}

#[tokio::test]
async fn what_is_missing_is_named_before_anything_is_started() {
    let directory = tempfile::tempdir().unwrap();
    for broken in ["kernel", "initial file system", "qemu"] {
        let mut config = config(&directory, "sleep");
        let missing = PathBuf::from("/nonexistent");
        match broken {
            "kernel" => config.kernel = missing,
            "qemu" => config.qemu = missing,
            _ => config.initrd = missing,
        }
        let error = Qemu::new(config).start().await.unwrap_err();
        assert!(
            matches!(&error, HypervisorError::File { what, .. } if what.ends_with(broken)),
            "{error}"
        );
    }
    let mut root = config(&directory, "sleep");
    root.uid = 0;
    assert!(matches!(Qemu::new(root).start().await, Err(HypervisorError::Config(_))));
}

#[tokio::test]
async fn the_agents_port_carries_bytes_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let mut vm = started(config(&directory, "echo")).await;
    let mut socket = vm.take_agent_socket().unwrap();
    assert!(vm.take_agent_socket().is_none(), "there is one only");
    // Written before the guest is up: it waits there.
    let text: Vec<u8> = (0..50_000u32).map(|n| (n % 251) as u8).collect();
    let (mut reader, mut writer) = socket.split();
    let mut echoed = vec![0; text.len()];
    let both = async { tokio::join!(writer.write_all(&text), reader.read_exact(&mut echoed)) };
    let (written, read) = tokio::time::timeout(BOOT, both).await.unwrap();
    written.unwrap();
    read.unwrap();
    assert!(echoed == text);
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn a_paused_guest_stands_still() {
    let directory = tempfile::tempdir().unwrap();
    let mut vm = started(config(&directory, "tick")).await;
    says(&vm, "tick 2").await;
    vm.pause().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = vm.console().last_lines(1);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(vm.console().last_lines(1), before);
    vm.resume().await.unwrap();
    let deadline = Instant::now() + BOOT;
    while vm.console().last_lines(1) == before {
        assert!(Instant::now() < deadline, "the guest did not go on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    vm.stop().await.unwrap();
}

/// A tap in a network namespace of this thread.
fn tap(name: &str) -> OwnedFd {
    let device = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is as long as the kernel's structure.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    device.into()
}

#[tokio::test]
async fn interfaces_are_there_from_the_start_and_come_and_go() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&directory, "nics");
    let mac = |last| Mac([2, 0, 0, 0, 0, last]);
    config.nics =
        vec![Nic { tap: tap("tap0"), mac: mac(1) }, Nic { tap: tap("tap1"), mac: mac(2) }];
    let mut vm = started(config).await;
    says(&vm, "nics 02:00:00:00:00:01 02:00:00:00:00:02").await;
    let plugged = vm.plug(Device::Nic(Nic { tap: tap("tap2"), mac: mac(3) })).await.unwrap();
    says(&vm, "nics 02:00:00:00:00:01 02:00:00:00:00:02 02:00:00:00:00:03").await;
    let full = vm.plug(Device::Nic(Nic { tap: tap("tap3"), mac: mac(4) })).await;
    assert!(matches!(full, Err(HypervisorError::NoPort)), "{full:?}");

    vm.unplug(&plugged).await.unwrap();
    says(&vm, "nics gone to 2").await;
    vm.plug(Device::Nic(Nic { tap: tap("tap4"), mac: mac(5) })).await.unwrap();
    says(&vm, "02:00:00:00:00:05").await;
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn a_directory_is_shared_by_9p() {
    let directory = tempfile::tempdir().unwrap();
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("from-host"), "hello guest").unwrap();
    let mut config = config(&directory, "9p");
    config.share = Some(Share::NineP { tag: "kataShared".to_owned() });
    let mut vm = started(config).await;
    let at = kata_devices::SharePath::new(Path::new("share/c1/volume")).unwrap();
    let qemu = vm.process().await.unwrap();
    kata_devices::attach(&qemu, shared.path(), &at, false, true).unwrap();
    says(&vm, "read: hello guest").await;
    says(&vm, "top: Some(ReadOnlyFilesystem)").await;
    says(&vm, "9p: Ok(())").await;
    let written = shared.path().join("from-guest");
    assert_eq!(std::fs::read_to_string(&written).unwrap(), "hello host");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&written).unwrap()), 1234);
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn a_microvm_boots_but_takes_no_devices() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(&directory, "sleep");
    config.machine = Machine::Microvm;
    let mut vm = started(config).await;
    says(&vm, "init is up").await;
    assert!(!vm.capabilities().plug);
    let nic = Nic { tap: tap("tap0"), mac: Mac([2; 6]) };
    let refused = vm.plug(Device::Nic(nic)).await;
    assert!(matches!(refused, Err(HypervisorError::NoPort)), "{refused:?}");
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn a_microvm_ends_with_its_guest() {
    for (mode, panicked) in [("panic", true), ("restart", false)] {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(&directory, mode);
        config.machine = Machine::Microvm;
        let vm = started(config).await;
        let exit = tokio::time::timeout(BOOT, vm.exited().wait()).await.expect("it goes on");
        assert_eq!(exit.panicked, panicked, "{exit:?}");
    }
}

#[tokio::test]
async fn a_dropped_machine_leaves_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let vm = started(config(&directory, "sleep")).await;
    let (pid, exited) = (vm.pid(), vm.exited());
    drop(vm);
    tokio::time::timeout(BOOT, exited).await.unwrap();
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
}

#[test]
fn the_self_test_gives_its_verdict_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("host.json");
    let start = Instant::now();
    let verdict = accelerator::choose_kept_at(AcceleratorChoice::Auto, &cache);
    let took = start.elapsed();
    println!("{verdict} after {took:?}; clock {} kHz", verdict.tsc_khz);
    // 45 ms for the child, and what a busy machine takes to start one.
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert!(verdict.tsc_khz > 100_000);
    let start = Instant::now();
    assert_eq!(accelerator::choose_kept_at(AcceleratorChoice::Auto, &cache), verdict);
    assert!(start.elapsed() < Duration::from_millis(20), "the kept verdict was not used");
}

#[tokio::test]
async fn a_running_machine_gets_more_memory_until_its_slots_are_full() {
    let directory = tempfile::tempdir().unwrap();
    let mut vm = started(config(&directory, "grow")).await;
    says(&vm, "memory is counted").await;
    let sized = |memory_mib| Size { memory_mib, vcpus: 1 };
    for (wanted, has) in [(200, 256), (300, 384), (1000, 1024), (5000, 1024)] {
        vm.resize(Size { memory_mib: wanted, vcpus: 4 }).await.unwrap();
        assert_eq!(vm.size(), sized(has));
    }
    says(&vm, "768 MiB more").await;
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn clones_go_on_where_their_template_stood_and_see_nothing_of_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let mut template =
        started(VmConfig { start: Start::Template, ..config(&directory, "tick") }).await;
    says(&template, "tick 20").await;
    let snapshot = template.save().await.unwrap();
    assert!(template.exited().now().is_some_and(|exit| exit.expected));
    let again = || {
        let [memory, devices] = snapshot.fds().map(|fd| fd.try_clone_to_owned().unwrap());
        Snapshot::from_fds(memory, devices).unwrap()
    };
    for memory in [CloneMemory::Private, CloneMemory::Copied, CloneMemory::Private] {
        let start = Start::Clone { snapshot: again(), memory };
        let mut clone = started(VmConfig { start, ..config(&directory, "tick") }).await;
        let first = loop {
            match clone.console().last_lines(100).iter().find_map(|line| line.strip_prefix("tick "))
            {
                Some(number) => break number.trim().parse::<u32>().unwrap(),
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        assert!((20..200).contains(&first), "it began again, or had another's: tick {first}");
        says(&clone, &format!("tick {}", first + 300)).await;
        clone.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_machine_that_is_not_the_templates_does_not_come_up_as_its_clone() {
    let directory = tempfile::tempdir().unwrap();
    let mut template =
        started(VmConfig { start: Start::Template, ..config(&directory, "sleep") }).await;
    says(&template, "init is up").await;
    let snapshot = template.save().await.unwrap();
    let start = Start::Clone { snapshot, memory: CloneMemory::Private };
    let mut other = VmConfig { start, ..config(&directory, "sleep") };
    // Its template had one, whose state is then of nobody.
    other.hotplug_ports -= 1;
    let error = Qemu::new(other).start().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Exited(_) | HypervisorError::State(_)), "{error}");
}
