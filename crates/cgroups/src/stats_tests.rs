use super::*;
use crate::{Hierarchy, V1Mount};
use std::fs;

fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

#[test]
fn v2_files_become_stats() {
    let dir = directory(&[
        ("cgroup.controllers", "cpu memory pids io"),
        (
            "cpu.stat",
            "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 3\nthrottled_usec 2\n",
        ),
        ("memory.current", "4096\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "8192\n"),
        ("memory.swap.max", "100\n"),
        ("memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n"),
        ("memory.stat", "anon 1\nfile 2\n"),
        ("pids.current", "3\n"),
        ("pids.max", "10\n"),
        ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:1 \nrubbish\n"),
        ("hugetlb.2MB.current", "2097152"),
        ("hugetlb.2MB.events", "max 5"),
    ]);
    let stats = v2(dir.path()).unwrap();
    let cpu = &stats.cpu;
    assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (30, 20, 10));
    assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled_usec), (4, 3, 2));
    let memory = &stats.memory;
    assert_eq!((memory.usage, memory.limit, memory.peak), (4096, NO_LIMIT, 8192));
    assert_eq!((memory.swap_limit, memory.failures, memory.oom_kills), (100, 7, 1));
    assert_eq!(memory.stat["file"], 2);
    assert_eq!((stats.pids.current, stats.pids.limit), (3, 10));
    let disk =
        IoStats { major: 8, minor: 0, read_bytes: 1, write_bytes: 2, read_ops: 3, write_ops: 4 };
    assert_eq!(stats.io[0], disk);
    assert_eq!(stats.hugetlb[0].usage, 2_097_152);
    assert_eq!(stats.hugetlb[0].failures, 5);
}

#[test]
fn v2_without_controllers_counts_nothing_and_a_missing_cgroup_is_an_error() {
    let dir = directory(&[("cgroup.controllers", "")]);
    let stats = v2(dir.path()).unwrap();
    assert_eq!(stats.memory.limit, NO_LIMIT);
    assert_eq!(stats.cpu, CpuStats::default());
    assert!(v2(&dir.path().join("gone")).is_err());
}

#[test]
fn v1_files_become_stats_in_the_same_units() {
    let dir = directory(&[
        ("cpu/c/cpu.stat", "nr_periods 4\nnr_throttled 3\nthrottled_time 2000\n"),
        ("cpu/c/cpuacct.usage", "30000\n"),
        ("cpu/c/cpuacct.stat", "user 2\nsystem 1\n"),
        ("memory/c/memory.usage_in_bytes", "4096"),
        ("memory/c/memory.limit_in_bytes", "9223372036854771712"),
        ("memory/c/memory.memsw.usage_in_bytes", "5000"),
        ("memory/c/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
        (
            "blkio/c/blkio.throttle.io_service_bytes_recursive",
            "8:0 Read 10\n8:0 Write 20\nTotal 30\n",
        ),
        ("blkio/c/blkio.throttle.io_serviced_recursive", "8:0 Read 1\n8:0 Write 2\n"),
    ]);
    let mount = |name: &str, controllers: &[&str]| V1Mount {
        root: dir.path().join(name),
        controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
    };
    let mounts = vec![
        mount("cpu", &["cpu", "cpuacct"]),
        mount("memory", &["memory"]),
        mount("blkio", &["blkio"]),
    ];
    let hierarchy = Hierarchy::V1 { mounts, unified: None };
    let stats = Cgroup::open(&hierarchy, "c").unwrap().stats().unwrap();
    assert_eq!(
        (stats.cpu.usage_usec, stats.cpu.user_usec, stats.cpu.throttled_usec),
        (30, 20_000, 2)
    );
    assert_eq!((stats.memory.limit, stats.memory.swap_usage), (NO_LIMIT, 904));
    assert_eq!((stats.memory.swap_limit, stats.memory.oom_kills), (NO_LIMIT, 2));
    let disk =
        IoStats { major: 8, minor: 0, read_bytes: 10, write_bytes: 20, read_ops: 1, write_ops: 2 };
    assert_eq!(stats.io, [disk]);
    assert_eq!(stats.pids.limit, NO_LIMIT);
    assert!(Cgroup::open(&hierarchy, "gone").unwrap().stats().is_err());
}
