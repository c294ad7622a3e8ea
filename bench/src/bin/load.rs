//! What containers are made to do while they are measured; times and rates as one JSON object.
//!
//!     kata-bench-load files DIRECTORY    small files, a walk, a large file, flushes
//!     kata-bench-load serve PORT         the other end of `ask`
//!     kata-bench-load ask ADDRESS:PORT   bytes both ways, connections, round trips
//!     kata-bench-load pieces             equal pieces of work: what each takes, and what disturbs

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const SMALL_FILES: usize = 5_000;
const WALKED_FILES: usize = 10_000;
const FLUSHES: usize = 200;
const MIB: usize = 1 << 20;
const LARGE_MIB: usize = 128;
const SENT_MIB: usize = 64;
const CONNECTIONS: usize = 300;
const ROUND_TRIPS: usize = 1_000;

/// What a client asks of the server, by its first byte.
const SEND: u8 = b's';
const TAKE: u8 = b't';
const ECHO: u8 = b'e';

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["files", directory] => println!("{}", files(Path::new(directory))?),
        ["serve", port] => serve(port.parse().map_err(io::Error::other)?)?,
        ["ask", server] => println!("{}", ask(server)?),
        ["pieces"] => println!("{}", all_pieces()),
        _ => {
            return Err(io::Error::other(
                "files DIRECTORY, serve PORT, ask ADDRESS:PORT, or pieces",
            ));
        }
    }
    Ok(())
}

fn files(directory: &Path) -> io::Result<Value> {
    let directory = directory.join("measured");
    let make = |range: std::ops::Range<usize>| {
        range.into_iter().try_for_each(|n| {
            let part = directory.join((n / 500).to_string());
            if n % 500 == 0 {
                fs::create_dir_all(&part)?;
            }
            fs::write(part.join(n.to_string()), "a small file\n")
        })
    };
    let create = timed(|| make(0..SMALL_FILES))?;
    make(SMALL_FILES..WALKED_FILES)?;
    let walk = timed(|| {
        let mut found = 0;
        for part in fs::read_dir(&directory)? {
            for file in fs::read_dir(part?.path())? {
                found += usize::from(file?.metadata()?.is_file());
            }
        }
        if found == WALKED_FILES { Ok(()) } else { Err(io::Error::other("files are missing")) }
    })?;
    let (large, block) = (directory.join("large"), vec![7; MIB]);
    let write = timed(|| {
        let mut file = File::create(&large)?;
        (0..LARGE_MIB).try_for_each(|_| file.write_all(&block))?;
        file.sync_all()
    })?;
    let read = timed(|| io::copy(&mut File::open(&large)?, &mut io::sink()).map(drop))?;
    let flush = timed(|| {
        let mut file = File::create(directory.join("log"))?;
        (0..FLUSHES).try_for_each(|_| {
            file.write_all(&block[..4096])?;
            file.sync_data()
        })
    })?;
    fs::remove_dir_all(&directory)?;
    Ok(json!({
        "create": SMALL_FILES as f64 / create,
        "walk": WALKED_FILES as f64 / walk,
        "write": LARGE_MIB as f64 / write,
        "read": LARGE_MIB as f64 / read,
        "flush": FLUSHES as f64 / flush,
    }))
}

fn serve(port: u16) -> io::Result<()> {
    for client in TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?.incoming() {
        // A client that gives up is no reason to stop.
        let _ = answer(client?);
    }
    Ok(())
}

fn answer(mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut what = [0];
    client.read_exact(&mut what)?;
    match what[0] {
        SEND => {
            let block = vec![7; MIB];
            (0..SENT_MIB).try_for_each(|_| client.write_all(&block))
        }
        TAKE => {
            io::copy(&mut (&mut client).take((SENT_MIB * MIB) as u64), &mut io::sink())?;
            client.write_all(&what)
        }
        _ => {
            let mut buffer = [0; 64];
            loop {
                match client.read(&mut buffer)? {
                    0 => return Ok(()),
                    count => client.write_all(&buffer[..count])?,
                }
            }
        }
    }
}

fn ask(server: &str) -> io::Result<Value> {
    let connect = |what: u8| -> io::Result<TcpStream> {
        let mut connection = TcpStream::connect(server)?;
        connection.set_nodelay(true)?;
        connection.write_all(&[what])?;
        Ok(connection)
    };
    let from = timed(|| {
        let count = io::copy(&mut connect(SEND)?, &mut io::sink())?;
        if count as usize == SENT_MIB * MIB { Ok(()) } else { Err(io::Error::other("cut short")) }
    })?;
    let to = timed(|| {
        let (mut connection, block) = (connect(TAKE)?, vec![7; MIB]);
        (0..SENT_MIB).try_for_each(|_| connection.write_all(&block))?;
        connection.read_exact(&mut [0])
    })?;
    let connections = timed(|| (0..CONNECTIONS).try_for_each(|_| echo(&mut connect(ECHO)?)))?;
    let mut connection = connect(ECHO)?;
    let trips = timed(|| (0..ROUND_TRIPS).try_for_each(|_| echo(&mut connection)))?;
    Ok(json!({
        "from": SENT_MIB as f64 / from,
        "to": SENT_MIB as f64 / to,
        "connections": CONNECTIONS as f64 / connections,
        "trips": ROUND_TRIPS as f64 / trips,
    }))
}

fn echo(connection: &mut TcpStream) -> io::Result<()> {
    connection.write_all(&[ECHO])?;
    connection.read_exact(&mut [0])
}

/// How long equal pieces of work are done.
const PIECES: Duration = Duration::from_secs(3);
/// What the memory's pieces walk through.
const WALKED: usize = MIB;
const PAGE: usize = 4096;
const EXITS: usize = 500;

fn all_pieces() -> Value {
    let mut memory = vec![1_u8; WALKED];
    let exit = (0..EXITS).map(|_| {
        let began = Instant::now();
        black_box(std::arch::x86_64::__cpuid(0));
        began.elapsed().as_secs_f64()
    });
    let mut exit: Vec<f64> = exit.collect();
    json!({
        "compute": pieces(|| {
            let step = |x: u64, _| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            black_box((0..5_000).fold(black_box(1), step));
        }),
        "memory": pieces(|| {
            for _ in 0..8 {
                memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = byte.wrapping_add(1));
            }
            black_box(&memory);
        }),
        // An instruction at which every guest leaves to its hypervisor.
        "exit_us": quantile(&mut exit, 0.5) * 1e6,
    })
}

/// Does the same again and again. A tenth of the pieces is taken for undisturbed; what the
/// others take beyond that was taken from them.
fn pieces(mut piece: impl FnMut()) -> Value {
    let (began, mut times) = (Instant::now(), Vec::new());
    while began.elapsed() < PIECES {
        let began = Instant::now();
        piece();
        times.push(began.elapsed().as_secs_f64());
    }
    let undisturbed = quantile(&mut times, 0.1);
    let all: f64 = times.iter().sum();
    json!({
        "rate": 1.0 / undisturbed,
        "lost_percent": 100.0 * (all - undisturbed * times.len() as f64) / all,
    })
}

fn quantile(values: &mut [f64], at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * at) as usize]
}

/// Seconds that it takes.
fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64())
}
