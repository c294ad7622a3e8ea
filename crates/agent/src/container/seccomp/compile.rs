//! From a profile to a program: per architecture the calls become ranges of equal
//! outcome, and these a balanced tree of comparisons.

use super::bpf::{self, Instruction};
use super::calls::{Architecture, Calls, X32_BIT};
use super::{ALLOW, Condition, ERRNO, KILL_THREAD, LOG, SeccompError, action};
use kata_oci::Seccomp;
use std::collections::BTreeMap;

const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_X86: u32 = 0x4000_0003;

/// What the kernel's programs may be long.
const MAX_INSTRUCTIONS: usize = 4096;

/// What a filter that names no such architecture does, as libseccomp has it.
const OTHER_ARCHITECTURE: u32 = KILL_THREAD;

const NO_SUCH_CALL: u32 = ERRNO | libc::ENOSYS.cast_unsigned();

/// Conditions that must all hold, and what happens then.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    action: u32,
}

/// What happens to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Always(u32),
    /// The first that matches, else the default.
    Rules(Vec<Rule>, Width),
}

/// How much of an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

/// Outcomes from a number on, sorted.
type Ranges = Vec<(u32, Outcome)>;

/// Compiles a profile.
pub(super) fn compile(profile: &Seccomp) -> Result<Vec<Instruction>, SeccompError> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let has = |name: &str| profile.architectures.iter().any(|known| known == name);
    let mut native = Table::read(profile, Architecture::X86_64, default)?.ranges(0, default);
    if has("SCMP_ARCH_X32") {
        native.retain(|(start, _)| *start < X32_BIT);
        native.extend(Table::read(profile, Architecture::X32, default)?.ranges(X32_BIT, default));
    } else if !newer_calls_are_none(default) {
        native.retain(|(start, _)| *start < X32_BIT);
        native.push((X32_BIT, Outcome::Always(OTHER_ARCHITECTURE)));
    }
    let other = vec![bpf::ret(OTHER_ARCHITECTURE)];
    let rest = if has("SCMP_ARCH_X86") {
        let x86 = Table::read(profile, Architecture::X86, default)?.ranges(0, default);
        bpf::if_equal(AUDIT_X86, tree(x86, default), other)
    } else {
        other
    };
    let mut program = vec![bpf::load_architecture()];
    program.extend(bpf::if_equal(AUDIT_X86_64, tree(native, default), rest));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLong(program.len()));
    }
    Ok(program)
}

/// Whether calls newer than the profile get `ENOSYS`.
fn newer_calls_are_none(default: u32) -> bool {
    default != ALLOW && default != LOG
}

/// The rules of one architecture by the number of the call.
struct Table {
    rules: BTreeMap<u32, Vec<Rule>>,
    /// The newest call the profile names.
    newest: Option<u32>,
    width: Width,
}

impl Table {
    fn read(
        profile: &Seccomp,
        architecture: Architecture,
        default: u32,
    ) -> Result<Self, SeccompError> {
        let calls = Calls::of(architecture);
        let width =
            if architecture == Architecture::X86_64 { Width::Bits64 } else { Width::Bits32 };
        let mut table = Self { rules: BTreeMap::new(), newest: None, width };
        for rule in &profile.syscalls {
            let action = action(&rule.action, rule.errno_ret)?;
            let conditions =
                rule.args.iter().map(Condition::read).collect::<Result<Vec<_>, _>>()?;
            for number in rule.names.iter().filter_map(|name| calls.number(name)) {
                table.newest = table.newest.max(Some(number));
                if action != default {
                    table.rules.entry(number).or_default().extend(rules(&conditions, action));
                }
            }
        }
        Ok(table)
    }

    /// The outcomes of all numbers from `first` on.
    fn ranges(self, first: u32, default: u32) -> Ranges {
        let mut ranges: Ranges = vec![(first, Outcome::Always(default))];
        let mut put = |start: u32, outcome: Outcome| {
            if ranges.last().is_some_and(|(last, _)| *last == start) {
                ranges.pop();
            }
            if ranges.last().is_none_or(|(_, last)| *last != outcome) {
                ranges.push((start, outcome));
            }
        };
        for (number, rules) in self.rules {
            let always = rules.iter().find(|rule| rule.conditions.is_empty());
            let outcome = match always {
                Some(rule) => Outcome::Always(rule.action),
                None => Outcome::Rules(rules, self.width),
            };
            put(number, outcome);
            put(number + 1, Outcome::Always(default));
        }
        if let Some(newest) = self.newest.filter(|_| newer_calls_are_none(default)) {
            put(newest + 1, Outcome::Always(NO_SUCH_CALL));
        }
        ranges
    }
}

/// One rule of the profile: with an argument named twice, one for each condition.
fn rules(conditions: &[Condition], action: u32) -> Vec<Rule> {
    let mut seen = [false; 6];
    let twice = conditions
        .iter()
        .any(|condition| std::mem::replace(&mut seen[usize::from(condition.index)], true));
    if twice {
        conditions.iter().map(|one| Rule { conditions: vec![*one], action }).collect()
    } else {
        vec![Rule { conditions: conditions.to_vec(), action }]
    }
}

/// The program that finds a number's outcome.
fn tree(ranges: Ranges, default: u32) -> Vec<Instruction> {
    fn branch(ranges: &[(u32, Outcome)], default: u32) -> Vec<Instruction> {
        match ranges {
            [] => vec![bpf::ret(default)],
            [(_, outcome)] => leaf(outcome, default),
            _ => {
                let (left, right) = ranges.split_at(ranges.len() / 2);
                let bound = right.first().map_or(0, |(start, _)| *start);
                bpf::split(bound, branch(left, default), branch(right, default))
            }
        }
    }
    let mut program = vec![bpf::load_number()];
    program.extend(branch(&ranges, default));
    program
}

fn leaf(outcome: &Outcome, default: u32) -> Vec<Instruction> {
    match outcome {
        Outcome::Always(action) => vec![bpf::ret(*action)],
        Outcome::Rules(rules, width) => {
            let wide = *width == Width::Bits64;
            let mut program: Vec<_> = rules
                .iter()
                .flat_map(|rule| bpf::rule(&rule.conditions, rule.action, wide))
                .collect();
            program.push(bpf::ret(default));
            program
        }
    }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
