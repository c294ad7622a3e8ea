//! From device rules to the eBPF program that enforces them.
//!
//! The kernel runs the program for each access with a context of three words: access and
//! type, major, minor. Rules are tried from the last to the first; register 3 holds the
//! accesses not yet allowed. A rule that denies one of them ends it, one that allows the
//! rest, too.

use crate::bpf::{
    AND, COPY, EXIT, Instruction, JUMP_EQUAL, JUMP_NOT_EQUAL, LOAD_WORD, SET, SHIFT_RIGHT,
};
use crate::devices::{ALL, Kind, Rule};

const CONTEXT: u8 = 1;
const RESULT: u8 = 0;
const TYPE: u8 = 2;
const WANTED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// What the kernel calls the types.
pub(crate) const BLOCK: i32 = 1;
pub(crate) const CHAR: i32 = 2;

const fn op(code: u8, to: u8, value: i32) -> Instruction {
    Instruction::new(code, to, value)
}

const fn load(to: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD_WORD, to, from: CONTEXT, offset, value: 0 }
}

/// The program for a list of rules. Lists that mean the same most often give the same program:
/// engines repeat much of what holds anyway.
pub(crate) fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut out = vec![
        load(TYPE, 0),
        Instruction { code: COPY, to: WANTED, from: TYPE, offset: 0, value: 0 },
        op(SHIFT_RIGHT, WANTED, 16),
        op(AND, TYPE, 0xffff),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in needed(rules).iter().rev() {
        // Device numbers of the kernel have 12 and 20 bits: others match nothing.
        let number = |n: Option<u32>| n.map(i32::try_from).transpose();
        let (Ok(major), Ok(minor)) = (number(rule.major), number(rule.minor)) else { continue };
        if rule.is_final() {
            // Code behind an unconditional end is refused by the kernel.
            out.extend(end(rule.allow));
            return out;
        }
        let kind = rule.kind.map(|kind| if kind == Kind::Char { CHAR } else { BLOCK });
        push_rule(&mut out, rule, [(TYPE, kind), (MAJOR, major), (MINOR, minor)]);
    }
    out.extend(end(false));
    out
}

/// The rules without those that never decide: a later one speaks of all that they speak of, or
/// they deny what nothing before them allows.
fn needed(rules: &[Rule]) -> Vec<Rule> {
    let mut needed: Vec<Rule> = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let hidden = rules[index + 1..].iter().any(|later| later.covers(rule));
        let idle =
            !rule.allow && !needed.iter().any(|earlier| earlier.allow && earlier.meets(rule));
        if !hidden && !idle {
            needed.push(*rule);
        }
    }
    needed
}

fn end(allow: bool) -> [Instruction; 2] {
    [op(SET, RESULT, i32::from(allow)), op(EXIT, 0, 0)]
}

fn push_rule(out: &mut Vec<Instruction>, rule: &Rule, tests: [(u8, Option<i32>); 3]) {
    let body = body(rule);
    let tests: Vec<_> = tests.iter().filter_map(|&(r, value)| Some((r, value?))).collect();
    let count = tests.len();
    for (index, (register, value)) in tests.into_iter().enumerate() {
        // Over the tests that follow and the body; at most two and five.
        let offset = (count - index - 1 + body.len()) as i16;
        out.push(Instruction { offset, ..op(JUMP_NOT_EQUAL, register, value) });
    }
    out.extend(body);
}

/// What happens when the device is the rule's.
fn body(rule: &Rule) -> Vec<Instruction> {
    let access = rule.access as i32;
    let skip_end = |code, register| Instruction { offset: 2, ..op(code, register, 0) };
    let mut out = match (rule.allow, rule.access) {
        (_, ALL) => Vec::new(),
        (true, _) => vec![op(AND, WANTED, !access), skip_end(JUMP_NOT_EQUAL, WANTED)],
        (false, _) => vec![
            Instruction { code: COPY, to: SCRATCH, from: WANTED, offset: 0, value: 0 },
            op(AND, SCRATCH, access),
            skip_end(JUMP_EQUAL, SCRATCH),
        ],
    };
    out.extend(end(rule.allow));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{MKNOD, READ, WRITE};
    use proptest::prelude::*;

    /// Runs a program as the kernel would; panics where its verifier would refuse it.
    fn run(program: &[Instruction], kind: Kind, major: u32, minor: u32, access: u32) -> bool {
        let kind = if kind == Kind::Char { CHAR } else { BLOCK } as u32;
        let context = [access << 16 | kind, major, minor];
        let mut registers = [None; 11];
        registers[1] = Some(0_u64);
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, value) = (i.to as usize, i64::from(i.value) as u64);
            at += 1;
            let jump = match i.code {
                LOAD_WORD => {
                    assert_eq!(registers[i.from as usize], Some(0), "context pointer");
                    registers[to] = Some(u64::from(context[i.offset as usize / 4]));
                    false
                }
                SET => {
                    registers[to] = Some(value);
                    false
                }
                COPY => {
                    registers[to] = Some(registers[i.from as usize].expect("set before"));
                    false
                }
                AND => {
                    registers[to] = Some(registers[to].expect("set before") & value);
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] = Some(registers[to].expect("set before") >> value);
                    false
                }
                JUMP_EQUAL => registers[to].expect("set before") == value,
                JUMP_NOT_EQUAL => registers[to].expect("set before") != value,
                EXIT => return registers[0].expect("a result") == 1,
                other => panic!("unknown instruction {other:#x}"),
            };
            if jump {
                assert!(i.offset >= 0, "no loops");
                at += i.offset as usize;
            }
        }
    }

    /// The meaning of the rules, said directly: each access is allowed or denied by the last
    /// rule that speaks of this device and this access.
    fn allowed(rules: &[Rule], kind: Kind, major: u32, minor: u32, access: u32) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rev()
                .find(|r| {
                    r.kind.is_none_or(|k| k == kind)
                        && r.major.is_none_or(|n| n == major)
                        && r.minor.is_none_or(|n| n == minor)
                        && r.access & bit != 0
                })
                .is_some_and(|r| r.allow)
        })
    }

    fn reachable(program: &[Instruction]) -> bool {
        let mut seen = vec![false; program.len()];
        let mut work = vec![0];
        while let Some(at) = work.pop() {
            if std::mem::replace(&mut seen[at], true) {
                continue;
            }
            match program[at].code {
                EXIT => {}
                JUMP_EQUAL | JUMP_NOT_EQUAL => {
                    work.extend([at + 1, at + 1 + program[at].offset as usize]);
                }
                _ => work.push(at + 1),
            }
        }
        seen.into_iter().all(|seen| seen)
    }

    fn kinds() -> impl Strategy<Value = Option<Kind>> {
        prop_oneof![Just(None), Just(Some(Kind::Char)), Just(Some(Kind::Block))]
    }

    /// Numbers from a small range, so that rules meet the same devices.
    fn numbers() -> impl Strategy<Value = Option<u32>> {
        prop_oneof![2 => Just(None), 6 => (0_u32..3).prop_map(Some), 1 => Just(Some(u32::MAX))]
    }

    prop_compose! {
        fn any_rule()(allow: bool, kind in kinds(), major in numbers(), minor in numbers(),
                      access in 1..=ALL) -> Rule {
            Rule { allow, kind, major, minor, access }
        }
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(rules in prop::collection::vec(any_rule(), 0..8)) {
            let program = program(&rules);
            prop_assert!(reachable(&program), "unreachable code in {program:?}");
            for kind in [Kind::Char, Kind::Block] {
                for device in 0..16 {
                    for access in 1..=ALL {
                        let (major, minor) = (device / 4, device % 4);
                        prop_assert_eq!(
                            run(&program, kind, major, minor, access),
                            allowed(&rules, kind, major, minor, access),
                            "{:?} {}:{} {:#b}", kind, major, minor, access
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_engines_repeat_makes_no_difference() {
        let deny = Rule { allow: false, kind: None, major: None, minor: None, access: ALL };
        let one = |allow, minor, access| Rule {
            allow,
            kind: Some(Kind::Char),
            major: Some(1),
            minor: Some(minor),
            access,
        };
        let plain = [one(true, 3, ALL), one(true, 5, READ)];
        let chatty = [deny, one(true, 3, READ), one(false, 9, ALL), plain[0], plain[1]];
        assert_eq!(program(&chatty), program(&plain));
        // What takes something back stays.
        let taken = [plain[0], one(false, 3, MKNOD)];
        assert_eq!(needed(&taken), taken);
    }

    #[test]
    fn no_rules_deny_everything() {
        assert!(!run(&program(&[]), Kind::Char, 1, 3, READ));
    }

    #[test]
    fn allow_all_after_deny_allows_everything() {
        let all = |allow| Rule { allow, kind: None, major: None, minor: None, access: ALL };
        assert!(run(&program(&[all(false), all(true)]), Kind::Block, 8, 0, ALL));
        assert!(!run(&program(&[all(true), all(false)]), Kind::Block, 8, 0, READ));
    }
}
