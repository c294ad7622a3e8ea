//! The compiler against a direct evaluation of the profile, in an interpreter.

use super::super::{Filter, KILL_PROCESS, TRAP};
use super::*;
use kata_oci::{SyscallArg, SyscallRule};
use proptest::prelude::*;

fn rule(names: &[&str], action: &str, args: Vec<SyscallArg>) -> SyscallRule {
    SyscallRule {
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        action: action.to_owned(),
        errno_ret: None,
        args,
    }
}

fn arg(index: u32, op: &str, value: u64, value_two: u64) -> SyscallArg {
    SyscallArg { index, value, value_two, op: op.to_owned() }
}

fn profile(default: &str, architectures: &[&str], syscalls: Vec<SyscallRule>) -> Seccomp {
    Seccomp {
        default_action: default.to_owned(),
        architectures: architectures.iter().map(|a| (*a).to_owned()).collect(),
        syscalls,
        ..Seccomp::default()
    }
}

const ALL: [&str; 3] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
const EPERM: u32 = ERRNO | 1;

fn run(profile: &Seccomp, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    bpf::run(&compile(profile).unwrap(), architecture, number, arguments)
}

#[test]
fn listed_calls_are_allowed_others_denied_newer_ones_unknown() {
    let profile =
        profile("SCMP_ACT_ERRNO", &ALL, vec![rule(&["read", "openat2"], "SCMP_ACT_ALLOW", vec![])]);
    let native = |number| run(&profile, AUDIT_X86_64, number, [0; 6]);
    assert_eq!(
        (native(0), native(1), native(437), native(438)),
        (ALLOW, EPERM, ALLOW, NO_SUCH_CALL)
    );
    assert_eq!(native(X32_BIT), ALLOW);
    assert_eq!(native(X32_BIT | 438), NO_SUCH_CALL);
    assert_eq!(run(&profile, AUDIT_X86, 3, [0; 6]), ALLOW);
    assert_eq!(run(&profile, AUDIT_X86, 0, [0; 6]), EPERM);
    assert_eq!(run(&profile, 0xc000_00b7, 0, [0; 6]), KILL_THREAD);
}

#[test]
fn architectures_that_are_not_listed_are_killed() {
    let denied = vec![rule(&["mount"], "SCMP_ACT_ERRNO", vec![])];
    let profile = profile("SCMP_ACT_ALLOW", &[], denied);
    assert_eq!(run(&profile, AUDIT_X86_64, 165, [0; 6]), EPERM);
    assert_eq!(run(&profile, AUDIT_X86_64, 5000, [0; 6]), ALLOW);
    assert_eq!(run(&profile, AUDIT_X86_64, X32_BIT | 1, [0; 6]), KILL_THREAD);
    assert_eq!(run(&profile, AUDIT_X86, 1, [0; 6]), KILL_THREAD);
}

#[test]
fn actions_carry_their_numbers() {
    let mut trace = rule(&["read"], "SCMP_ACT_TRACE", vec![]);
    trace.errno_ret = Some(77);
    let mut errno = rule(&["write"], "SCMP_ACT_ERRNO", vec![]);
    errno.errno_ret = Some(38);
    let rules = vec![
        trace,
        errno,
        rule(&["open"], "SCMP_ACT_TRAP", vec![]),
        rule(&["close"], "SCMP_ACT_KILL_PROCESS", vec![]),
        rule(&["stat"], "SCMP_ACT_LOG", vec![]),
    ];
    let profile = profile("SCMP_ACT_KILL", &[], rules);
    let got: Vec<_> = (0..6).map(|n| run(&profile, AUDIT_X86_64, n, [0; 6])).collect();
    let expected = [0x7ff0_0000 | 77, ERRNO | 38, TRAP, KILL_PROCESS, LOG, NO_SUCH_CALL];
    assert_eq!(got, expected);
}

#[test]
fn unconditional_rule_wins_over_conditional_ones() {
    let masked = arg(0, "SCMP_CMP_MASKED_EQ", 0x7e02_0000, 0);
    let rules = vec![
        rule(&["clone"], "SCMP_ACT_ALLOW", vec![masked]),
        rule(&["clone"], "SCMP_ACT_ALLOW", vec![]),
    ];
    let profile = profile("SCMP_ACT_ERRNO", &[], rules);
    assert_eq!(run(&profile, AUDIT_X86_64, 56, [0x7e02_0000, 0, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn same_argument_twice_means_or() {
    let both = vec![arg(0, "SCMP_CMP_EQ", 1, 0), arg(0, "SCMP_CMP_EQ", 2, 0)];
    let rules = vec![rule(&["read"], "SCMP_ACT_ALLOW", both)];
    let profile = profile("SCMP_ACT_ERRNO", &[], rules);
    let with = |first| run(&profile, AUDIT_X86_64, 0, [first, 0, 0, 0, 0, 0]);
    assert_eq!((with(1), with(2), with(3)), (ALLOW, ALLOW, EPERM));
}

#[test]
fn narrow_architectures_compare_the_lower_half() {
    let rules = vec![rule(&["read"], "SCMP_ACT_ALLOW", vec![arg(0, "SCMP_CMP_EQ", 7, 0)])];
    let profile = profile("SCMP_ACT_ERRNO", &ALL, rules);
    let arguments = [0x1_0000_0007, 0, 0, 0, 0, 0];
    assert_eq!(run(&profile, AUDIT_X86_64, 0, arguments), EPERM);
    assert_eq!(run(&profile, AUDIT_X86, 3, arguments), ALLOW);
}

#[test]
fn what_cannot_be_had_is_refused() {
    let refused = |profile: &Seccomp| Filter::compile(profile).unwrap_err();
    let notify = profile("SCMP_ACT_NOTIFY", &[], vec![]);
    assert_eq!(refused(&notify), SeccompError::Notify);
    let index = rule(&["read"], "SCMP_ACT_ALLOW", vec![arg(6, "SCMP_CMP_EQ", 0, 0)]);
    assert_eq!(refused(&profile("SCMP_ACT_ERRNO", &[], vec![index])), SeccompError::Argument(6));
    let mut flags = profile("SCMP_ACT_ERRNO", &[], vec![]);
    flags.flags = vec!["SECCOMP_FILTER_FLAG_X".into()];
    assert!(matches!(refused(&flags), SeccompError::Unknown { what: "flag", .. }));
    let mut big = profile("SCMP_ACT_ERRNO", &[], vec![]);
    big.default_errno_ret = Some(0x1_0000);
    assert_eq!(refused(&big), SeccompError::Errno(0x1_0000));
}

#[test]
fn a_thousand_conditions_need_long_jumps_and_still_work() {
    let rules = (0..600)
        .map(|value| rule(&["read"], "SCMP_ACT_ALLOW", vec![arg(1, "SCMP_CMP_EQ", value, 0)]))
        .chain([rule(&["write"], "SCMP_ACT_TRAP", vec![])])
        .collect();
    let profile = profile("SCMP_ACT_ERRNO", &[], rules);
    assert_eq!(run(&profile, AUDIT_X86_64, 0, [0, 599, 0, 0, 0, 0]), ALLOW);
    assert_eq!(run(&profile, AUDIT_X86_64, 0, [0, 600, 0, 0, 0, 0]), EPERM);
    assert_eq!(run(&profile, AUDIT_X86_64, 1, [0; 6]), TRAP);
    let many = (0..2000)
        .map(|value| rule(&["read"], "SCMP_ACT_ALLOW", vec![arg(1, "SCMP_CMP_EQ", value, 0)]))
        .collect();
    let result = compile(&super::tests::profile("SCMP_ACT_ERRNO", &[], many));
    assert!(matches!(result, Err(SeccompError::TooLong(_))));
}

#[test]
fn a_large_profile_is_a_shallow_tree() {
    let names: Vec<String> = syscalls_of_native().into_iter().step_by(2).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let profile = profile("SCMP_ACT_ERRNO", &ALL, vec![rule(&names, "SCMP_ACT_ALLOW", vec![])]);
    assert!(compile(&profile).unwrap().len() < 2500);
}

fn syscalls_of_native() -> Vec<String> {
    (0..460usize)
        .filter_map(syscalls::x86_64::Sysno::new)
        .map(|call| call.name().to_owned())
        .collect()
}

const NAMES: [(&str, u32); 8] = [
    ("read", 0),
    ("write", 1),
    ("open", 2),
    ("close", 3),
    ("mmap", 9),
    ("ioctl", 16),
    ("socket", 41),
    ("clone", 56),
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_GT",
    "SCMP_CMP_GE",
    "SCMP_CMP_MASKED_EQ",
];
const ACTIONS: [&str; 5] =
    ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_TRAP", "SCMP_ACT_LOG", "SCMP_ACT_KILL_PROCESS"];

/// Numbers near each other in both halves, so that comparisons go either way.
fn number() -> impl Strategy<Value = u64> {
    (0u64..3, 0u64..4).prop_map(|(high, low)| high << 32 | low)
}

fn rules() -> impl Strategy<Value = Vec<SyscallRule>> {
    let args = prop::collection::vec((0u32..6, 0..OPERATORS.len(), number(), number()), 0..4);
    let one = (prop::collection::vec(0..NAMES.len(), 1..4), 0..ACTIONS.len(), args);
    prop::collection::vec(one, 0..8).prop_map(|rules| {
        rules
            .into_iter()
            .map(|(names, action, args)| {
                let names: Vec<_> = names.into_iter().map(|at| NAMES[at].0).collect();
                let args =
                    args.into_iter().map(|(i, op, a, b)| arg(i, OPERATORS[op], a, b)).collect();
                rule(&names, ACTIONS[action], args)
            })
            .collect()
    })
}

fn holds(argument: &SyscallArg, arguments: [u64; 6]) -> bool {
    let (got, value) = (arguments[argument.index as usize], argument.value);
    match argument.op.as_str() {
        "SCMP_CMP_EQ" => got == value,
        "SCMP_CMP_NE" => got != value,
        "SCMP_CMP_LT" => got < value,
        "SCMP_CMP_LE" => got <= value,
        "SCMP_CMP_GT" => got > value,
        "SCMP_CMP_GE" => got >= value,
        _ => got & value == argument.value_two,
    }
}

/// The profile read plainly: what the compiler must agree with.
fn evaluate(profile: &Seccomp, name: &str, number: u32, arguments: [u64; 6]) -> u32 {
    let default = action(&profile.default_action, None).unwrap();
    let newest = profile
        .syscalls
        .iter()
        .flat_map(|rule| &rule.names)
        .filter_map(|name| NAMES.iter().find(|(known, _)| known == name))
        .map(|(_, number)| *number)
        .max();
    if default != ALLOW && default != LOG && newest.is_some_and(|newest| number > newest) {
        return ERRNO | 38;
    }
    let of_call: Vec<_> = profile
        .syscalls
        .iter()
        .filter(|rule| rule.names.iter().any(|known| known == name))
        .filter(|rule| action(&rule.action, None).unwrap() != default)
        .collect();
    let matches = |rule: &&&SyscallRule| {
        let mut indices: Vec<_> = rule.args.iter().map(|a| a.index).collect();
        indices.sort_unstable();
        indices.dedup();
        if indices.len() < rule.args.len() {
            rule.args.iter().any(|a| holds(a, arguments))
        } else {
            rule.args.iter().all(|a| holds(a, arguments))
        }
    };
    of_call
        .iter()
        .find(|rule| rule.args.is_empty())
        .or_else(|| of_call.iter().find(matches))
        .map_or(default, |rule| action(&rule.action, None).unwrap())
}

proptest! {
    #[test]
    fn compiled_filter_does_what_the_rules_say(
        rules in rules(),
        default in 0..ACTIONS.len(),
        calls in prop::collection::vec((0..NAMES.len(), prop::array::uniform6(number())), 1..20),
    ) {
        let profile = profile(ACTIONS[default], &[], rules);
        let program = compile(&profile).unwrap();
        for (at, arguments) in calls {
            let (name, number) = NAMES[at];
            let got = bpf::run(&program, AUDIT_X86_64, number, arguments);
            prop_assert_eq!(got, evaluate(&profile, name, number, arguments), "{} {:?}", name, arguments);
        }
    }

    #[test]
    fn a_program_arrives_at_init_as_it_was(rules in rules()) {
        let program = bpf::Program(compile(&profile("SCMP_ACT_ERRNO", &ALL, rules)).unwrap());
        let bytes = postcard::to_stdvec(&program).unwrap();
        prop_assert_eq!(postcard::from_bytes::<bpf::Program>(&bytes).unwrap(), program);
        // Cut it is none.
        prop_assert!(postcard::from_bytes::<bpf::Program>(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn any_call_comes_to_an_end(rules in rules(), architecture: u32, number: u32, arguments: [u64; 6]) {
        let profile = profile("SCMP_ACT_ERRNO", &ALL, rules);
        let program = compile(&profile).unwrap();
        for architecture in [architecture, AUDIT_X86, AUDIT_X86_64] {
            bpf::run(&program, architecture, number, arguments);
        }
    }
}
