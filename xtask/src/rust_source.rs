//! A look at Rust source that is just deep enough for `tidy`: text without comments and literals, and where functions begin and end.

/// `text` with comments, strings and character literals blanked, line breaks kept.
pub fn blank_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = token_end(bytes, at);
        let blank = end > at + 1 || bytes[at] == b'"';
        for &b in &bytes[at..end] {
            out.push(if blank && b != b'\n' { b' ' } else { b });
        }
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The end of the comment or literal that starts at `at`, or `at + 1` when none does.
fn token_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    match rest {
        [b'/', b'/', ..] => at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => at + find(rest, b"*/").map_or(rest.len(), |i| i + 2),
        [b'r', b'"' | b'#', ..] if !follows_word(bytes, at) => raw_string_end(bytes, at),
        [b'"', ..] => quoted_end(bytes, at, b'"'),
        // A character literal, not a lifetime.
        [b'\'', b'\\', ..] | [b'\'', _, b'\'', ..] => quoted_end(bytes, at, b'\''),
        _ => at + 1,
    }
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

fn raw_string_end(bytes: &[u8], at: usize) -> usize {
    let hashes = bytes[at + 1..].iter().take_while(|&&b| b == b'#').count();
    if bytes.get(at + 1 + hashes) != Some(&b'"') {
        return at + 1;
    }
    let mut close = vec![b'"'];
    close.resize(hashes + 1, b'#');
    let body = at + 2 + hashes;
    find(&bytes[body..], &close).map_or(bytes.len(), |i| body + i + close.len())
}

fn quoted_end(bytes: &[u8], at: usize, quote: u8) -> usize {
    let mut i = at + 1;
    while i < bytes.len() {
        match bytes[i] {
            b'\\' => i += 2,
            b if b == quote => return i + 1,
            _ => i += 1,
        }
    }
    bytes.len()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// A function: its name, its first line (from 1) and how many lines it takes.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// The name after `fn`.
    pub name: String,
    /// The line of `fn`.
    pub line: usize,
    /// From `fn` to the closing brace.
    pub lines: usize,
}

/// The functions with a body in `text`, which must have gone through [`blank_literals`].
pub fn functions(text: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("fn ") {
        if follows_word(text.as_bytes(), at) {
            continue;
        }
        let name: String = text[at + 3..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        if name.is_empty() {
            continue;
        }
        if let Some(end) = body_end(&text[at..]) {
            let line = text[..at].matches('\n').count() + 1;
            let lines = text[at..at + end].matches('\n').count() + 1;
            found.push(Function { name, line, lines });
        }
    }
    found
}

/// The offset behind the body's closing brace; `None` when `;` comes first.
fn body_end(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    let mut brackets = 0i32;
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            ';' if depth == 0 && brackets == 0 => return None,
            '{' => depth += 1,
            '}' if depth <= 1 => return Some(i + 1),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_do_not_count() {
        let text =
            "fn a() { let s = \"}{ fn x() {\"; // {\n let c = '{'; let r = r#\"}\"#; }\nfn b();\n";
        let found = functions(&blank_literals(text));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].lines), ("a", 2));
    }

    #[test]
    fn lifetimes_are_not_characters() {
        let text = "fn a<'x>(s: &'x str) -> &'x str {\n s\n}\n";
        assert_eq!(functions(&blank_literals(text))[0].lines, 3);
    }
}
