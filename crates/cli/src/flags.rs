//! Command lines as runc reads them: Go's `flag` package below urfave/cli v1.
//!
//! Engines were written against that grammar, which clap cannot express: one dash or two
//! mean the same, `--flag=value` works for switches too, a value is whatever follows (also
//! `-1`), the last of several wins, and most verbs accept flags behind their arguments.

use std::collections::BTreeMap;

/// What a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing, or `=true`, `=false`.
    Switch,
    /// A text; the last one counts.
    Text,
    /// A text each time it is given.
    List,
    /// A whole number.
    Number,
}

/// One flag of a verb.
#[derive(Debug)]
pub struct Flag {
    /// Its name without dashes.
    pub name: &'static str,
    /// A second, one-letter name.
    pub short: Option<&'static str>,
    /// What it takes.
    pub kind: Kind,
    /// One line for `--help`.
    pub help: &'static str,
}

/// A switch.
pub const fn switch(name: &'static str, help: &'static str) -> Flag {
    Flag { name, short: None, kind: Kind::Switch, help }
}

/// A flag with a text.
pub const fn text(name: &'static str, help: &'static str) -> Flag {
    Flag { name, short: None, kind: Kind::Text, help }
}

/// A flag with a text that may be given several times.
pub const fn list(name: &'static str, help: &'static str) -> Flag {
    Flag { name, short: None, kind: Kind::List, help }
}

/// A flag with a whole number.
pub const fn number(name: &'static str, help: &'static str) -> Flag {
    Flag { name, short: None, kind: Kind::Number, help }
}

impl Flag {
    /// The same flag with a one-letter name beside its own.
    pub const fn or(mut self, short: &'static str) -> Self {
        self.short = Some(short);
        self
    }

    fn is(&self, name: &str) -> bool {
        self.name == name || self.short == Some(name)
    }
}

/// Whether flags may stand behind the first argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Yes: all arguments belong to the verb.
    Anywhere,
    /// No: what follows the first argument belongs to another program.
    First,
    /// There are none: the verb takes whatever it is given, and says what it thinks of it.
    Nowhere,
}

/// Why a command line is refused; the texts are Go's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagError {
    /// `--help` was asked for.
    #[error("help requested")]
    Help,
    /// No such flag.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// The command line ended where a value was due.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// The value is not of the flag's kind.
    #[error("invalid value {value:?} for flag -{name}: parse error")]
    BadValue {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
    },
    /// `---x`, `-=x`.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
}

/// A command line taken apart.
#[derive(Debug, Default)]
pub struct Parsed {
    values: BTreeMap<&'static str, Vec<String>>,
    /// What is no flag.
    pub args: Vec<String>,
}

impl Parsed {
    /// Takes `words` apart.
    ///
    /// # Errors
    /// The first word that runc would refuse as well.
    pub fn read(flags: &'static [Flag], order: Order, words: &[String]) -> Result<Self, FlagError> {
        let words = match order {
            Order::Anywhere => flags_first(flags, words),
            Order::First => words.to_vec(),
            Order::Nowhere => return Ok(Self { args: words.to_vec(), ..Self::default() }),
        };
        let mut parsed = Self::default();
        let mut rest = words.into_iter();
        while let Some(word) = rest.next() {
            if word == "--" {
                break;
            }
            let Some(body) = flag_body(&word) else {
                parsed.args.push(word);
                break;
            };
            parsed.take(flags, body, &word, &mut rest)?;
        }
        parsed.args.extend(rest);
        Ok(parsed)
    }

    fn take(
        &mut self,
        flags: &'static [Flag],
        body: &str,
        word: &str,
        rest: &mut impl Iterator<Item = String>,
    ) -> Result<(), FlagError> {
        if body.is_empty() || body.starts_with(['-', '=']) {
            return Err(FlagError::Syntax(word.to_owned()));
        }
        let (name, inline) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        let Some(flag) = flags.iter().find(|flag| flag.is(name)) else {
            return Err(match name {
                "help" | "h" => FlagError::Help,
                _ => FlagError::Unknown(name.to_owned()),
            });
        };
        let bad =
            |value: &str| FlagError::BadValue { name: name.to_owned(), value: value.to_owned() };
        let value = match (flag.kind, inline) {
            (Kind::Switch, None) => "true".to_owned(),
            (Kind::Switch, Some(value)) => go_bool(&value).ok_or_else(|| bad(&value))?.to_string(),
            (_, Some(value)) => value,
            (_, None) => rest.next().ok_or_else(|| FlagError::NoValue(name.to_owned()))?,
        };
        if flag.kind == Kind::Number && value.parse::<i64>().is_err() {
            return Err(bad(&value));
        }
        self.values.entry(flag.name).or_default().push(value);
        Ok(())
    }

    /// Whether the switch is on.
    pub fn on(&self, name: &str) -> bool {
        self.text(name) == Some("true")
    }

    /// The last value given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.last().map(String::as_str)
    }

    /// The last value, as a number.
    pub fn number(&self, name: &str) -> Option<i64> {
        self.text(name)?.parse().ok()
    }

    /// All values given.
    pub fn list(&self, name: &str) -> &[String] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }
}

/// What follows the dashes, or none when the word is no flag.
fn flag_body(word: &str) -> Option<&str> {
    if word.len() < 2 {
        return None;
    }
    let body = word.strip_prefix('-')?;
    Some(body.strip_prefix('-').unwrap_or(body))
}

/// Go's `strconv.ParseBool`.
fn go_bool(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Moves known flags (and their values) before everything else.
fn flags_first(flags: &[Flag], words: &[String]) -> Vec<String> {
    let (mut front, mut back) = (Vec::new(), Vec::new());
    let mut rest = words.iter().cloned();
    while let Some(word) = rest.next() {
        if word == "--" {
            back.push(word);
            back.extend(rest);
            break;
        }
        let name = flag_body(&word).map(|body| body.split('=').next().unwrap_or(body).to_owned());
        let known = name.as_deref().and_then(|name| flags.iter().find(|flag| flag.is(name)));
        match known {
            Some(flag) => {
                let takes_next = flag.kind != Kind::Switch && !word.contains('=');
                front.push(word);
                if takes_next {
                    front.extend(rest.next());
                }
            }
            // An unknown flag must be met (and refused) as a flag, unless arguments came first.
            None if name.is_some() && back.is_empty() => front.push(word),
            None => back.push(word),
        }
    }
    front.extend(back);
    front
}

/// The table of flags that `--help` prints.
pub fn help(flags: &[Flag]) -> String {
    let title = |flag: &Flag| {
        let value = if flag.kind == Kind::Switch { "" } else { " value" };
        let short = flag.short.map(|s| format!(", -{s}{value}")).unwrap_or_default();
        format!("--{}{value}{short}", flag.name)
    };
    let width = flags.iter().map(|flag| title(flag).len()).max().unwrap_or(0);
    flags.iter().map(|flag| format!("   {:width$}  {}\n", title(flag), flag.help)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    static FLAGS: &[Flag] = &[
        switch("all", "").or("a"),
        text("log", ""),
        list("env", "").or("e"),
        number("memory-swap", ""),
    ];

    fn read(order: Order, line: &str) -> Result<Parsed, FlagError> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Parsed::read(FLAGS, order, &words)
    }

    #[test]
    fn one_dash_and_two_mean_the_same() {
        assert_eq!(read(Order::First, "-log /a x").unwrap().text("log"), Some("/a"));
        assert_eq!(read(Order::First, "--log=/a x").unwrap().text("log"), Some("/a"));
    }

    #[test]
    fn a_value_may_look_like_a_flag() {
        assert_eq!(
            read(Order::Anywhere, "--memory-swap -1 x").unwrap().number("memory-swap"),
            Some(-1)
        );
    }

    #[test]
    fn flags_behind_the_argument_belong_to_the_verb_only_where_it_says_so() {
        let parsed = read(Order::Anywhere, "x --all 9").unwrap();
        assert!(parsed.on("all"));
        assert_eq!(parsed.args, ["x", "9"]);
        let parsed = read(Order::First, "x --all 9").unwrap();
        assert!(!parsed.on("all"));
        assert_eq!(parsed.args, ["x", "--all", "9"]);
    }

    #[test]
    fn switches_take_a_value_only_after_an_equals_sign() {
        let parsed = read(Order::First, "--all=false x").unwrap();
        assert!(!parsed.on("all"));
        assert!(matches!(read(Order::First, "--all=maybe x"), Err(FlagError::BadValue { .. })));
    }

    #[test]
    fn lists_keep_every_value() {
        assert_eq!(read(Order::First, "-e A=1 --env B=2").unwrap().list("env"), ["A=1", "B=2"]);
    }

    #[test]
    fn unknown_flags_and_missing_values_are_refused_in_gos_words() {
        assert_eq!(
            read(Order::Anywhere, "--foo x").unwrap_err().to_string(),
            "flag provided but not defined: -foo"
        );
        assert_eq!(read(Order::First, "--log").unwrap_err(), FlagError::NoValue("log".into()));
        assert_eq!(read(Order::First, "-h").unwrap_err(), FlagError::Help);
    }

    proptest! {
        #[test]
        fn any_words_are_read_or_refused(words: Vec<String>) {
            let _ = Parsed::read(FLAGS, Order::Anywhere, &words);
            let _ = Parsed::read(FLAGS, Order::First, &words);
        }

        #[test]
        fn nothing_is_lost_after_a_double_dash(words in proptest::collection::vec("[-a-z=]{0,6}", 0..6)) {
            let mut line = vec!["--".to_owned()];
            line.extend(words.iter().cloned());
            prop_assert_eq!(Parsed::read(FLAGS, Order::Anywhere, &line).unwrap().args, words);
        }
    }
}
