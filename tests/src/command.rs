//! Running a program with a deadline, and what it said.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a command may take where nothing else is said: a VM on a busy machine
/// without hardware virtualisation is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a finished command left.
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Exit code, or 128 plus the signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// From start to exit.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text without surrounding blanks.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text without surrounding blanks.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// This output, or an error that shows it, when the command did not exit with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!("expected exit code {code}:\n{self}");
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "$ {}   [exit {}, {:.2?}]", self.command, self.code, self.elapsed)?;
        for (name, text) in [("stdout", self.out()), ("stderr", self.err())] {
            if !text.is_empty() {
                writeln!(f, "{name}: {}", shorten(&text))?;
            }
        }
        Ok(())
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 6000;
    if text.len() <= MOST {
        return text.to_owned();
    }
    let tail: String = text.chars().rev().take(MOST).collect();
    format!("[…] {}", tail.chars().rev().collect::<String>())
}

/// Splits `line` at blanks; single and double quotes keep blanks together.
pub fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = None::<String>;
    let mut quote = None::<char>;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The command as one would type it.
pub fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// The exit code of `status` as a shell gives it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs `command` with nothing on its input, for at most [`PATIENCE`].
pub fn run(command: &mut Command) -> Result<Output> {
    run_with(command, None, PATIENCE)
}

/// Runs `command` and expects success.
pub fn ok(command: &mut Command) -> Result<Output> {
    run(command)?.expect_code(0)
}

/// Runs `command` with `input`, for at most `patience`; then it is killed and that is an error.
pub fn run_with(
    command: &mut Command,
    input: Option<Vec<u8>>,
    patience: Duration,
) -> Result<Output> {
    let line = shown(command);
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let began = Instant::now();
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {line}"))?;
    if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input) {
        // A program that does not read its input to the end is no error of ours.
        thread::spawn(move || pipe.write_all(&input).ok());
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait(&mut child, patience)?;
    let elapsed = began.elapsed();
    // The pipes may be held open by a daemon that was left behind: what has come so far is given.
    let grace = if status.is_some() { Duration::from_secs(5) } else { Duration::from_millis(200) };
    let output = Output {
        command: line,
        code: status.map_or(-1, code),
        stdout: gather(&stdout, grace),
        stderr: gather(&stderr, grace),
        elapsed,
    };
    if status.is_none() {
        bail!("gave no answer for {patience:?} and was killed:\n{output}");
    }
    Ok(output)
}

/// Waits for `child`; kills it and returns none when it takes longer than `patience`.
pub fn wait(child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    // What takes some milliseconds is to be measured: its end is heard of, not looked for.
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let deadline = Instant::now() + patience;
    let mut ready = [PollFd::new(&ended, PollFlags::IN)];
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        match poll(&mut ready, Some(&left)) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) => break,
            Ok(_) => return Ok(Some(child.wait()?)),
        }
    }
    child.kill().ok();
    child.wait()?;
    Ok(None)
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (send, receive) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if send.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
    }
    receive
}

fn gather(pieces: &mpsc::Receiver<Vec<u8>>, grace: Duration) -> Vec<u8> {
    let deadline = Instant::now() + grace;
    let mut all = Vec::new();
    while let Ok(piece) = pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        all.extend(piece);
    }
    all
}

/// Asks `question` until it says yes, for at most `patience`.
pub fn eventually(
    what: &str,
    patience: Duration,
    mut question: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match question() {
            Ok(true) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error.context(what.to_owned())),
            Ok(false) if Instant::now() > deadline => bail!("{what}: not within {patience:?}"),
            _ => thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_keep_blanks_together() {
        assert_eq!(words("run  -e 'A=b c' x"), ["run", "-e", "A=b c", "x"]);
        assert_eq!(words(r#"sh -c "it's" ''"#), ["sh", "-c", "it's", ""]);
    }

    #[test]
    fn output_and_exit_code_of_a_command_are_kept() {
        let output = run(Command::new("sh").args(["-c", "echo a; echo b >&2; exit 3"])).unwrap();
        assert_eq!((output.code, output.out(), output.err()), (3, "a".to_owned(), "b".to_owned()));
    }

    #[test]
    fn command_that_hangs_is_killed_and_reported() {
        let patience = Duration::from_millis(100);
        let error = run_with(Command::new("sleep").arg("60"), None, patience).err().unwrap();
        assert!(error.to_string().contains("gave no answer"), "{error}");
    }
}
