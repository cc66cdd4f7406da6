//! Regular expressions with a limit on what all of a snapshot's may take: a table of three thousand nested ones would fill a gateway's memory.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;

use regex_automata::meta;
use regex_automata::util::syntax;

use crate::error::{CompileError, Result};

/// Bytes that one compiled expression may take.
const MOST_EACH: usize = 1 << 20;
/// Bytes that those of one snapshot may take together.
pub(crate) const MOST_TOGETHER: usize = 64 << 20;

/// A compiled expression; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Regex(meta::Regex);

thread_local! {
    /// What the resource that is being compiled on this thread has spent. Every matcher can hold expressions, at any depth of a resource;
    /// the budget reaches them here instead of as an argument of every compiler.
    static BUDGET: RefCell<Option<Budget>> = const { RefCell::new(None) };
}

struct Budget {
    left: usize,
    spent: usize,
    /// Rules for many hosts repeat their expressions for each.
    known: HashMap<(Box<str>, bool), Regex>,
}

/// Compiles a resource whose expressions may take `left` bytes; gives what they take.
pub(crate) fn within_budget<T>(left: usize, compile: impl FnOnce() -> T) -> (T, usize) {
    let budget = Budget {
        left,
        spent: 0,
        known: HashMap::new(),
    };
    BUDGET.set(Some(budget));
    let outcome = compile();
    (outcome, BUDGET.take().map_or(0, |budget| budget.spent))
}

/// A pattern that matches exactly this text.
pub(crate) fn escape(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for character in text.chars() {
        // Punctuation may stand behind a backslash, but for `<` and `>`, which become word boundaries there.
        if character.is_ascii_punctuation() && !matches!(character, '<' | '>') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

impl Regex {
    /// Compiles a pattern, or finds the same one in the resource that is being compiled.
    pub(crate) fn new(pattern: &str, ignore_case: bool) -> Result<Self> {
        BUDGET.with_borrow_mut(|budget| match budget {
            None => Self::build(pattern, ignore_case),
            Some(budget) => budget.regex(pattern, ignore_case),
        })
    }

    fn build(pattern: &str, ignore_case: bool) -> Result<Self> {
        let built = meta::Regex::builder()
            .syntax(syntax::Config::new().case_insensitive(ignore_case))
            .configure(meta::Config::new().nfa_size_limit(Some(MOST_EACH)))
            .build(pattern);
        built.map(Self).map_err(|error| {
            let reason = match (error.size_limit(), error.syntax_error()) {
                (Some(limit), _) => format!("it takes more than {limit} bytes compiled"),
                (None, Some(error)) => error.to_string(),
                (None, None) => error.to_string(),
            };
            CompileError::new(
                "regex",
                format!("{pattern:?} is not a valid expression: {reason}"),
            )
        })
    }

    /// Does it match anywhere?
    pub(crate) fn is_match(&self, text: &str) -> bool {
        self.0.is_match(text)
    }

    /// All matches replaced; `$1` and `${name}` in `by` are groups, `$$` is the character.
    pub(crate) fn replace_all<'a>(&self, text: &'a str, by: &str) -> Cow<'a, str> {
        let mut replaced = String::new();
        let mut at = 0;
        for found in self.0.captures_iter(text) {
            let Some(span) = found.get_group(0) else {
                continue;
            };
            replaced.push_str(&text[at..span.start]);
            found.interpolate_string_into(text, by, &mut replaced);
            at = span.end;
        }
        if replaced.is_empty() && at == 0 {
            return Cow::Borrowed(text);
        }
        replaced.push_str(&text[at..]);
        Cow::Owned(replaced)
    }

    /// `by` with the groups of the first match, or nothing where there is none.
    pub(crate) fn expand(&self, text: &str, by: &str) -> Option<String> {
        let mut found = self.0.create_captures();
        self.0.captures(text, &mut found);
        found.is_match().then(|| found.interpolate_string(text, by))
    }

    /// Whether it has a group of this name.
    pub(crate) fn has_group(&self, name: &str) -> bool {
        let mut names = self.0.group_info().all_names();
        names.any(|(_, _, group)| group == Some(name))
    }
}

impl Budget {
    fn regex(&mut self, pattern: &str, ignore_case: bool) -> Result<Regex> {
        let key = (Box::from(pattern), ignore_case);
        if let Some(known) = self.known.get(&key) {
            return Ok(known.clone());
        }
        let regex = Regex::build(pattern, ignore_case)?;
        self.spent += regex.0.memory_usage();
        if self.spent > self.left {
            let message = format!(
                "with {pattern:?} the regular expressions of this proxy take more than {} MiB compiled; use fewer or simpler ones",
                MOST_TOGETHER >> 20
            );
            return Err(CompileError::new("regex", message));
        }
        self.known.insert(key, regex.clone());
        Ok(regex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_as_told() {
        let regex = Regex::new("/([^/]+)/(?P<rest>.*)", false).unwrap();
        assert_eq!(regex.replace_all("/a/b", "/${rest}/$1$$"), "/b/a$");
        assert_eq!(regex.expand("/a/b", "${rest}").as_deref(), Some("b"));
        assert_eq!(regex.expand("none", "x"), None);
        assert!(matches!(
            regex.replace_all("none", "x"),
            Cow::Borrowed("none")
        ));
        assert_eq!(
            Regex::new("a", true).unwrap().replace_all("xAya", "$$"),
            "x$y$"
        );
        assert_eq!(
            Regex::new("", false).unwrap().replace_all("ab", "-"),
            "-a-b-"
        );
        assert_eq!(Regex::new("^", false).unwrap().replace_all("ab", ""), "ab");
        assert!(regex.has_group("rest") && !regex.has_group("other"));
    }

    #[test]
    fn escaped_text_matches_itself() {
        let text: String = (' '..='~').chain("é\u{1f600}".chars()).collect();
        let regex = Regex::new(&format!("^{}$", escape(&text)), false).unwrap();
        assert!(regex.is_match(&text) && !regex.is_match("a"));
        assert!(!Regex::new(&escape("a.b"), false).unwrap().is_match("axb"));
    }

    #[test]
    fn bad_ones_say_why() {
        let error = |pattern| Regex::new(pattern, false).unwrap_err().to_string();
        assert!(error("(").contains("unclosed group"), "{}", error("("));
        let huge = error("(?:[a-z]{1000}){1000}");
        assert!(huge.contains("more than 1048576 bytes"), "{huge}");
    }

    #[test]
    fn the_same_expression_counts_once() {
        let many = |patterns: &[&str], left| {
            within_budget(left, || {
                patterns
                    .iter()
                    .try_for_each(|pattern| Regex::new(pattern, false).map(drop))
            })
        };
        let (outcome, one) = many(&["[a-z]{9}x", "[a-z]{9}x"], MOST_TOGETHER);
        assert!(outcome.is_ok() && one > 0);
        let (outcome, two) = many(&["[a-z]{9}x", "[a-z]{9}y"], MOST_TOGETHER);
        assert!(outcome.is_ok() && two > one);
        let (outcome, _) = many(&["[a-z]{9}x", "[a-z]{9}y"], one);
        let message = outcome.unwrap_err().to_string();
        assert!(
            message.contains("[a-z]{9}y") && message.contains("64 MiB"),
            "{message}"
        );
    }
}
