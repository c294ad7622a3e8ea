//! zstd streams as layers have them: several frames, some of them to be skipped.

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, BufRead, Read};

/// How a frame with data begins.
pub const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Decompresses all frames of a stream, one after the other.
///
/// Tools that make layers seekable (zstd:chunked) put their tables into frames that plain
/// readers skip, and packers with threads write one frame per piece. The window of a frame,
/// and so the memory it takes, is bounded by the library (100 MiB).
pub struct Frames<R> {
    stream: R,
    decoder: FrameDecoder,
    within: bool,
}

impl<R: BufRead> Frames<R> {
    pub fn new(stream: R) -> Self {
        Self { stream, decoder: FrameDecoder::new(), within: false }
    }

    /// Begins the next frame; false at the end of the stream.
    fn begin(&mut self) -> io::Result<bool> {
        while !self.stream.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.stream) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.stream).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(malformed(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.within {
                if buffer.is_empty() || !self.begin()? {
                    return Ok(0);
                }
                self.within = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.stream, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(malformed)?;
            }
            match self.decoder.read(buffer)? {
                0 if !buffer.is_empty() => self.within = false,
                length => return Ok(length),
            }
        }
    }
}

fn malformed(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame of one raw block.
    pub fn frame(data: &[u8]) -> Vec<u8> {
        // Single segment, four bytes of content size, no checksum.
        let mut bytes = MAGIC.to_vec();
        bytes.push(0b1010_0000);
        bytes.extend((data.len() as u32).to_le_bytes());
        let header = (data.len() as u32) << 3 | 1;
        bytes.extend(&header.to_le_bytes()[..3]);
        bytes.extend(data);
        bytes
    }

    fn skipped(data: &[u8]) -> Vec<u8> {
        let length = (data.len() as u32).to_le_bytes();
        [&[0x50, 0x2a, 0x4d, 0x18], &length[..], data].concat()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        Frames::new(bytes).read_to_end(&mut plain)?;
        Ok(plain)
    }

    #[test]
    fn frames_follow_one_another_and_tables_are_skipped() {
        let bytes = [frame(b"one "), skipped(b"table"), frame(b"two"), skipped(b"")].concat();
        assert_eq!(read(&bytes).unwrap(), b"one two");
        assert_eq!(read(b"").unwrap(), b"");
    }

    #[test]
    fn what_is_cut_short_or_no_frame_is_an_error() {
        let whole = frame(b"content");
        for length in 1..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length} bytes");
        }
        assert!(read(&[whole, b"junk".to_vec()].concat()).is_err());
        assert!(read(&skipped(b"table")[..10]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = read(&[&MAGIC[..], &bytes].concat());
        }
    }
}
