//! What the test binary does when it is a guest's first process.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

/// Before anything else of the test binary.
#[used]
#[unsafe(link_section = ".init_array")]
static INIT_BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn run() {
        if std::process::id() == 1 && std::env::args().next().as_deref() == Some("/init") {
            init();
        }
    }
    run
};

fn init() {
    println!("init is up");
    match std::env::var("GUEST_DOES").as_deref() {
        Ok("sleep") => {}
        Ok("panic") => std::process::exit(3),
        Ok("restart") => {
            // SAFETY: a plain system call; this guest has nothing to lose.
            unsafe { libc::reboot(libc::RB_AUTOBOOT) };
        }
        Ok("tick") => {
            for number in 0..u32::MAX {
                println!("tick {number}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok("echo") => echo(),
        Ok("nics") => nics(),
        Ok("grow") => grow(),
        Ok("9p") => println!("9p: {:?}", nine_p()),
        other => println!("{other:?} is unknown"),
    }
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

fn mounted(kind: &str, source: &str, target: &str, data: Option<&str>) {
    mount(Some(source), target, Some(kind), MsFlags::empty(), data).unwrap();
}

/// Says when there is more memory than at first.
fn grow() {
    mounted("proc", "proc", "/proc", None);
    let total = || -> u64 {
        let info = fs::read_to_string("/proc/meminfo").unwrap();
        info.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let first = total();
    println!("memory is counted");
    loop {
        println!("{} MiB more", (total() - first) / 1024);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sends back what comes in by the agent's port.
fn echo() {
    mounted("sysfs", "sys", "/sys", None);
    mounted("devtmpfs", "dev", "/dev", None);
    let port = fs::read_dir("/sys/class/virtio-ports").unwrap().map(Result::unwrap).find(|port| {
        fs::read_to_string(port.path().join("name")).unwrap_or_default().trim() == "kata.agent.0"
    });
    let path = format!("/dev/{}", port.unwrap().file_name().into_string().unwrap());
    let mut port = File::options().read(true).write(true).open(path).unwrap();
    let mut buffer = [0; 4096];
    loop {
        match port.read(&mut buffer).unwrap() {
            // The host has not opened its end yet.
            0 => std::thread::sleep(Duration::from_millis(10)),
            length => port.write_all(&buffer[..length]).unwrap(),
        }
    }
}

/// Tells the addresses of all interfaces whenever they change.
fn nics() {
    mounted("sysfs", "sys", "/sys", None);
    let mut before = Vec::new();
    loop {
        let mut now: Vec<String> = fs::read_dir("/sys/class/net")
            .unwrap()
            .filter_map(|nic| fs::read_to_string(nic.unwrap().path().join("address")).ok())
            .map(|address| address.trim().to_owned())
            .filter(|address| address.starts_with("02:"))
            .collect();
        now.sort();
        if now.len() < before.len() {
            println!("nics gone to {}", now.len());
        } else if now != before {
            println!("nics {}", now.join(" "));
        }
        before = now;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads and writes the shared directory.
fn nine_p() -> std::io::Result<()> {
    let options = Some("trans=virtio,version=9p2000.L");
    mount(Some("kataShared"), "/mnt", Some("9p"), MsFlags::empty(), options)?;
    // The host attaches it while the guest boots.
    let file = (0..500).find_map(|_| {
        let read = fs::read_to_string("/mnt/c1/volume/from-host");
        read.map_err(|_| std::thread::sleep(std::time::Duration::from_millis(10))).ok()
    });
    println!("read: {}", file.unwrap_or_default());
    println!("top: {:?}", File::create("/mnt/x").err().map(|error| error.kind()));
    let mut file = File::create("/mnt/c1/volume/from-guest")?;
    file.write_all(b"hello host")?;
    std::os::unix::fs::fchown(&file, Some(1234), None)
}
