//! The program of a rehearsal: what any program has the kernel do before its `main` begins.
//!
//! What it is of its own, other programs are not, and their guests would have it translated for
//! nothing: so it is a list of system calls and the few instructions that make them. They are
//! those of a C library that sets itself up and maps another one, and they read and write pages
//! of each kind that a program has: of its file, copied from its file, and made for it.

/// Where its file is mapped: instructions, and what it writes to.
const TEXT: u64 = 0x40_0000;
const DATA: u64 = 0x80_0000;
/// More than the kernel reads and maps at once.
const TEXT_SIZE: u64 = 256 << 10;
const PAGE: u64 = 4096;
/// What comes with the file, and what the kernel makes behind it.
const DATA_SIZE: u64 = 2 * PAGE;
const BSS: u64 = DATA + DATA_SIZE;
const BSS_SIZE: u64 = 2 * PAGE;
/// Where it maps a file and memory.
const LIBRARY: u64 = 0xa0_0000;
const MEMORY: u64 = 0xb0_0000;
const MAPPED: u64 = 64 << 10;

/// Lengths of an ELF file's header and of a program header (System V ABI, chapter 4 and 5).
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;
/// Where the instructions are, and behind them the calls.
const START: u64 = HEADER as u64 + 2 * PROGRAM_HEADER as u64;

/// Makes one call after the other; the last one does not return. One that fails ends it with 1.
#[rustfmt::skip]
const CODE: [u8; 57] = [
    0x48, 0x8d, 0x1d, 50, 0, 0, 0, // lea rbx, [rip + 50]: the calls
    0x48, 0x8b, 0x03,              // next: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 8,           // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 16,          // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 24,          // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 32,          // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 40,          // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 48,          // mov r9, [rbx + 48]
    0x0f, 0x05,                    // syscall
    0x48, 0x83, 0xc3, 56,          // add rbx, 56
    0x48, 0x85, 0xc0,              // test rax, rax
    0x79, 0xda,                    // jns next
    0xbf, 1, 0, 0, 0,              // mov edi, 1
    0xb8, 231, 0, 0, 0,            // mov eax, 231 (exit_group)
    0x0f, 0x05,                    // syscall
];

/// A system call: its number and arguments.
type Call = [u64; 7];
const _: () = assert!(size_of::<Call>() == 56);

fn call<const N: usize>(number: libc::c_long, arguments: [u64; N]) -> Call {
    let mut call = [0; 7];
    call[0] = number.cast_unsigned();
    call[1..=N].copy_from_slice(&arguments);
    call
}

/// The calls, and the texts that they name, which are at `texts`.
fn calls(path: &str, texts: u64) -> (Vec<Call>, Vec<u8>) {
    const SELF: &str = "/proc/self/exe\0";
    const SET_FS: u64 = 0x1002;
    /// The first descriptor that a program opens.
    const FILE: u64 = 3;
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    let flag = |flags: i32| u64::from(flags.cast_unsigned());
    let (read, write) = (flag(libc::PROT_READ), flag(libc::PROT_READ | libc::PROT_WRITE));
    let private = flag(libc::MAP_PRIVATE | libc::MAP_FIXED);
    let nobody = flag(libc::MAP_ANONYMOUS);
    // Reads a name at that place: an empty one.
    let touch = |page: u64| call(libc::SYS_prctl, [flag(libc::PR_SET_NAME), page]);
    let fill = |page: u64| call(libc::SYS_getrandom, [page, 8, 0]);
    let calls = vec![
        call(libc::SYS_arch_prctl, [SET_FS, DATA]),
        call(libc::SYS_set_tid_address, [DATA]),
        call(libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_STACK), 0, DATA]),
        call(libc::SYS_readlink, [texts, DATA, 128]),
        fill(DATA + PAGE),
        fill(BSS),
        call(libc::SYS_brk, [0]),
        call(libc::SYS_mprotect, [DATA, PAGE, read]),
        touch(TEXT + TEXT_SIZE / 2),
        touch(TEXT + TEXT_SIZE - PAGE),
        call(libc::SYS_openat, [here, texts + SELF.len() as u64, flag(libc::O_CLOEXEC)]),
        call(libc::SYS_read, [FILE, DATA + PAGE, 832]),
        call(libc::SYS_fstat, [FILE, BSS]),
        call(libc::SYS_mmap, [LIBRARY, MAPPED, read, private, FILE, 0]),
        call(libc::SYS_mmap, [LIBRARY + PAGE, PAGE, write, private, FILE, PAGE]),
        call(libc::SYS_mmap, [MEMORY, MAPPED, write, private | nobody, u64::MAX]),
        call(libc::SYS_close, [FILE]),
        touch(LIBRARY + MAPPED - PAGE),
        fill(LIBRARY + PAGE),
        fill(MEMORY),
        call(libc::SYS_munmap, [MEMORY, MAPPED]),
        // The line's end is its length.
        call(libc::SYS_write, [1, texts + (SELF.len() + path.len() + 1) as u64, 1]),
        call(libc::SYS_exit_group, [0]),
    ];
    (calls, [SELF.as_bytes(), path.as_bytes(), b"\0\n"].concat())
}

/// An executable file that will be found at `path`; it writes an empty line.
pub(super) fn executable(path: &str) -> Vec<u8> {
    let mut file = headers();
    file.extend(CODE);
    let (count, _) = calls(path, 0);
    let texts = TEXT + START + (CODE.len() + count.len() * size_of::<Call>()) as u64;
    let (calls, text) = calls(path, texts);
    calls.iter().for_each(|call| put(&mut file, call));
    file.extend(text);
    file.resize((TEXT_SIZE + DATA_SIZE) as usize, 0);
    file
}

/// The file's header and program headers (System V ABI, chapter 4 and 5; AMD64, 4.1).
fn headers() -> Vec<u8> {
    // ELF64, little endian, version 1; executable, x86-64, version 1.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Where it begins, where the program headers are, no sections.
    put(&mut file, &[TEXT + START, HEADER.into(), 0]);
    // No flags; sizes and number of the headers.
    let rest = [0, 0, HEADER, PROGRAM_HEADER, 2, 0, 0, 0];
    rest.iter().for_each(|half| file.extend(half.to_le_bytes()));
    // Loaded, to be read and executed, and to be read and written: offset, addresses, sizes in
    // the file and in memory, alignment.
    file.extend(b"\x01\0\0\0\x05\0\0\0");
    put(&mut file, &[0, TEXT, TEXT, TEXT_SIZE, TEXT_SIZE, PAGE]);
    file.extend(b"\x01\0\0\0\x06\0\0\0");
    put(&mut file, &[TEXT_SIZE, DATA, DATA, DATA_SIZE, DATA_SIZE + BSS_SIZE, PAGE]);
    file
}

fn put(file: &mut Vec<u8>, words: &[u64]) {
    words.iter().for_each(|word| file.extend(word.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    #[test]
    fn every_call_works() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let mut file = File::options().write(true).create_new(true).mode(0o755).open(&path);
        file.as_mut().unwrap().write_all(&executable(path.to_str().unwrap())).unwrap();
        drop(file);
        let said = std::process::Command::new(&path).output().unwrap();
        assert!(said.status.success(), "{said:?}");
        assert_eq!(said.stdout, b"\n");
    }
}
