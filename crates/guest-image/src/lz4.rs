//! The LZ4 "legacy" frame, which Linux compresses itself with: blocks of up to 8 MiB.

/// The frame's first bytes.
pub(crate) const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const BLOCK: usize = 8 << 20;
/// A kernel is never that large.
const LIMIT: usize = 1 << 30;

/// Unpacks a frame; none if it is damaged.
pub(crate) fn unpack(frame: &[u8]) -> Option<Vec<u8>> {
    let mut rest = frame.strip_prefix(&MAGIC)?;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let length = u32::from_le_bytes(*rest.first_chunk()?) as usize;
        let block = rest.get(4..length.checked_add(4)?)?;
        rest = &rest[4 + length..];
        unpack_block(block, &mut out)?;
    }
    Some(out)
}

/// One block; its matches reach back within the block only.
fn unpack_block(mut block: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    loop {
        let token = take(&mut block, 1)?[0];
        let literals = length(token >> 4, &mut block)?;
        out.extend_from_slice(take(&mut block, literals)?);
        if block.is_empty() {
            // The last sequence has literals only.
            return Some(());
        }
        let distance = take(&mut block, 2)?;
        let distance = usize::from(u16::from_le_bytes([distance[0], distance[1]]));
        let count = length(token & 15, &mut block)?.checked_add(4)?;
        let from = out.len().checked_sub(distance).filter(|f| *f >= start && distance > 0)?;
        let end = out.len().checked_add(count)?;
        if end - start > BLOCK || end > LIMIT {
            return None;
        }
        // A match may overlap what it makes.
        for index in from..from + count {
            out.push(*out.get(index)?);
        }
    }
}

/// A length whose first four bits are `nibble`.
fn length(nibble: u8, block: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(nibble);
    if nibble == 15 {
        loop {
            let more = take(block, 1)?[0];
            length = length.checked_add(usize::from(more))?;
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

fn take<'a>(block: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = block.split_at_checked(count)?;
    *block = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(block: &[u8]) -> Vec<u8> {
        let mut frame = MAGIC.to_vec();
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(block);
        frame
    }

    #[test]
    fn literals_and_overlapping_matches_unpack() {
        // "ab", then 4 + 3 bytes from 2 back, then "c".
        let block = [0x23, b'a', b'b', 2, 0, 0x10, b'c'];
        assert_eq!(unpack(&frame(&block)).unwrap(), b"ababababac");
    }

    #[test]
    fn long_lengths_add_up() {
        let mut block = vec![0xf0, 255, 10];
        block.extend([b'x'; 15 + 255 + 10]);
        assert_eq!(unpack(&frame(&block)).unwrap(), [b'x'; 280]);
    }

    #[test]
    fn damage_is_noticed() {
        assert!(unpack(b"").is_none());
        assert!(unpack(&frame(&[0x20, b'a'])).is_none());
        // A match before the beginning, and one at no distance.
        assert!(unpack(&frame(&[0x10, b'a', 2, 0, 0x10, b'c'])).is_none());
        assert!(unpack(&frame(&[0x10, b'a', 0, 0, 0x10, b'c'])).is_none());
        assert!(unpack(&frame(&[0x10, b'a'])[..9]).is_none());
    }

    proptest! {
        #[test]
        fn anything_unpacks_or_is_refused(block: Vec<u8>) {
            let _ = unpack(&frame(&block));
        }
    }
}
