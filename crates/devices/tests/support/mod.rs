//! The process under test.
#![allow(dead_code)] // Each test program uses its part.

pub mod guest;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_devices::{DevicesProcess, Error, Options};

/// `Launch::role` starts this very binary again. The role runs before the test harness,
/// which knows nothing of roles.
#[used]
#[unsafe(link_section = ".init_array")]
static RUN_ROLE: extern "C" fn() = run_role;

extern "C" fn run_role() {
    if let Ok(Some(invocation)) = kata_jail::role::current() {
        assert_eq!(invocation.role, kata_jail::Role::Devices);
        let code = match kata_devices::main(&invocation.args) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("devices: {error:#}");
                1
            }
        };
        std::process::exit(code);
    }
}

/// A devices process and a directory for the host's files.
pub struct Share {
    pub process: DevicesProcess,
    pub vmm: Option<OwnedFd>,
    pub dir: tempfile::TempDir,
}

impl Share {
    pub fn start() -> Self {
        Self::start_with(Options::default())
    }

    pub fn start_with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (process, vmm) = DevicesProcess::spawn(dir.path(), options).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the socket's name stays");
        process.ready().unwrap();
        Self { process, vmm: Some(vmm), dir }
    }

    /// The share as the process sees it.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/{path}", self.process.child().pid()))
    }

    pub fn host_dir(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    pub fn attach(&self, source: &Path, at: &str, readonly: bool) -> Result<(), Error> {
        self.process.attach(source, Path::new(at), readonly, true)
    }

    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.process.child().pid())).unwrap()
    }

    pub fn mount_options(&self, at: &str) -> Vec<String> {
        let table = self.proc("mountinfo");
        let line = table.lines().find(|l| l.split(' ').nth(4) == Some(at)).unwrap();
        line.split(' ').nth(5).unwrap().split(',').map(str::to_owned).collect()
    }

    pub fn wait_for_end(&self) {
        let start = Instant::now();
        while self.process.child().try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        drop(self.vmm.take());
        if !std::thread::panicking() {
            self.wait_for_end();
        }
    }
}
