//! Classic BPF instructions, as far as filters use them.

use super::{Condition, Operator};
use serde::{Deserialize, Serialize};

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// Code, jump if true, jump if false, operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Instruction(u16, u8, u8, u32);

/// A program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Program(pub Vec<Instruction>);

impl Instruction {
    pub fn raw(self) -> libc::sock_filter {
        libc::sock_filter { code: self.0, jt: self.1, jf: self.2, k: self.3 }
    }
}

fn plain(code: u16, k: u32) -> Instruction {
    Instruction(code, 0, 0, k)
}

pub(super) fn load_number() -> Instruction {
    plain(LOAD, NUMBER_AT)
}

pub(super) fn load_architecture() -> Instruction {
    plain(LOAD, ARCHITECTURE_AT)
}

pub(super) fn ret(action: u32) -> Instruction {
    plain(RETURN, action)
}

/// `if accumulator >= bound { right } else { left }`; both must end by themselves.
pub(super) fn split(
    bound: u32,
    left: Vec<Instruction>,
    right: Vec<Instruction>,
) -> Vec<Instruction> {
    choose(JUMP_GREATER_OR_EQUAL, bound, right, left)
}

/// `if accumulator == value { yes } else { no }`; both must end by themselves.
pub(super) fn if_equal(
    value: u32,
    yes: Vec<Instruction>,
    no: Vec<Instruction>,
) -> Vec<Instruction> {
    choose(JUMP_EQUAL, value, yes, no)
}

/// Lays out `no` first. Jumps hold 8 bits; a longer way goes by an unconditional jump.
fn choose(code: u16, k: u32, yes: Vec<Instruction>, no: Vec<Instruction>) -> Vec<Instruction> {
    let mut program = Vec::with_capacity(yes.len() + no.len() + 2);
    match u8::try_from(no.len()) {
        Ok(skip) => program.push(Instruction(code, skip, 0, k)),
        Err(_) => {
            program.push(Instruction(code, 0, 1, k));
            // The kernel takes 4096 instructions at most, which is checked at the end.
            program.push(plain(JUMP, u32::try_from(no.len()).unwrap_or(u32::MAX)));
        }
    }
    program.extend(no);
    program.extend(yes);
    program
}

/// Where a comparison goes: on to the rule's next condition, or away.
#[derive(Clone, Copy)]
enum To {
    Next,
    Yes,
    No,
}

/// `if all conditions { return action }`, else falls through. With `wide`, arguments are
/// of 64 bits.
pub(super) fn rule(conditions: &[Condition], action: u32, wide: bool) -> Vec<Instruction> {
    let mut body = vec![ret(action)];
    for condition in conditions.iter().rev() {
        let mut block = check(condition, wide, body.len());
        block.append(&mut body);
        body = block;
    }
    body
}

/// A comparison that falls through when it holds and skips `rest` instructions when not.
fn check(condition: &Condition, wide: bool, rest: usize) -> Vec<Instruction> {
    use To::{Next, No, Yes};
    let low = ARGUMENTS_AT + 8 * u32::from(condition.index);
    let mut steps: Vec<(Instruction, To, To)> = Vec::with_capacity(6);
    let (high_value, low_value) = ((condition.value >> 32) as u32, condition.value as u32);
    let load = |at| (plain(LOAD, at), Next, Next);
    let jump = |code, k, yes, no| (Instruction(code, 0, 0, k), yes, no);
    if wide {
        steps.push(load(low + 4));
        match condition.operator {
            Operator::Equal => steps.push(jump(JUMP_EQUAL, high_value, Next, No)),
            Operator::NotEqual => steps.push(jump(JUMP_EQUAL, high_value, Next, Yes)),
            Operator::Greater | Operator::GreaterOrEqual => {
                steps.push(jump(JUMP_GREATER, high_value, Yes, Next));
                steps.push(jump(JUMP_EQUAL, high_value, Next, No));
            }
            Operator::Less | Operator::LessOrEqual => {
                steps.push(jump(JUMP_GREATER, high_value, No, Next));
                steps.push(jump(JUMP_EQUAL, high_value, Next, Yes));
            }
            Operator::Masked(mask) => {
                steps.push((plain(AND, (mask >> 32) as u32), Next, Next));
                steps.push(jump(JUMP_EQUAL, high_value, Next, No));
            }
        }
    }
    steps.push(load(low));
    if let Operator::Masked(mask) = condition.operator {
        steps.push((plain(AND, mask as u32), Next, Next));
    }
    steps.push(match condition.operator {
        Operator::Equal => jump(JUMP_EQUAL, low_value, Yes, No),
        Operator::NotEqual => jump(JUMP_EQUAL, low_value, No, Yes),
        Operator::Greater => jump(JUMP_GREATER, low_value, Yes, No),
        Operator::GreaterOrEqual => jump(JUMP_GREATER_OR_EQUAL, low_value, Yes, No),
        Operator::Less => jump(JUMP_GREATER_OR_EQUAL, low_value, No, Yes),
        Operator::LessOrEqual => jump(JUMP_GREATER, low_value, No, Yes),
        Operator::Masked(_) => jump(JUMP_EQUAL, low_value, Yes, No),
    });
    let length = steps.len();
    // At most six conditions of seven instructions: always within 8 bits.
    let way = |at: usize, to: To| -> u8 {
        let skip = match to {
            Next => 0,
            Yes => length - 1 - at,
            No => length - 1 - at + rest,
        };
        u8::try_from(skip).unwrap_or(u8::MAX)
    };
    steps
        .into_iter()
        .enumerate()
        .map(|(at, (Instruction(code, _, _, k), yes, no))| {
            Instruction(code, way(at, yes), way(at, no), k)
        })
        .collect()
}

/// Runs a program as the kernel would; for tests.
#[cfg(test)]
pub(super) fn run(
    program: &[Instruction],
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend([0; 8]);
    arguments.iter().for_each(|argument| data.extend(argument.to_le_bytes()));
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let Instruction(code, yes, no, k) = program[at];
        at += 1;
        let mut branch = |holds: bool| at += usize::from(if holds { yes } else { no });
        match code {
            LOAD => {
                let from = k as usize;
                accumulator = u32::from_le_bytes(data[from..from + 4].try_into().unwrap());
            }
            AND => accumulator &= k,
            JUMP => at += k as usize,
            JUMP_EQUAL => branch(accumulator == k),
            JUMP_GREATER => branch(accumulator > k),
            JUMP_GREATER_OR_EQUAL => branch(accumulator >= k),
            RETURN => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}
