//! What a scalar means, as Go's YAML library resolves it.

use serde_json::{Number, Value};

/// Meaning of a scalar without quotes and tag.
pub(super) fn plain(text: &str) -> Result<Value, String> {
    if let Some(word) = word(text) {
        return Ok(word);
    }
    if text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        if let Some(number) =
            integer(&text.replace('_', "")).or_else(|| float(&text.replace('_', "")))
        {
            return Ok(Value::Number(number));
        }
        if is_infinite(text) {
            return Err(format!(
                "{text:?} can't be written in JSON; quote it if it is a text"
            ));
        }
    }
    Ok(Value::String(text.to_owned()))
}

/// Meaning of a scalar with one of YAML's own tags; `None` where the tag is unknown or the text does not fit.
pub(super) fn tagged(text: &str, tag: &str) -> Option<Value> {
    match tag {
        "str" => Some(Value::String(text.to_owned())),
        "int" => integer(text).map(Value::Number),
        "float" => float(text).or_else(|| integer(text)).map(Value::Number),
        "bool" | "null" => word(text),
        "binary" => {
            use base64::Engine as _;
            let compact: String = text.split_whitespace().collect();
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(compact)
                .ok()?;
            String::from_utf8(bytes).ok().map(Value::String)
        }
        _ => None,
    }
}

/// True if Go would read this text, without quotes, as something other than a text.
pub(super) fn needs_quotes(text: &str) -> bool {
    is_infinite(text)
        || is_date(text)
        || text == "<<"
        || text == "="
        || !matches!(plain(text), Ok(Value::String(_)))
}

fn word(text: &str) -> Option<Value> {
    Some(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" | "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => {
            Value::Bool(true)
        }
        "false" | "False" | "FALSE" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            Value::Bool(false)
        }
        _ => return None,
    })
}

/// Decimal, `0x`, `0o`, `0b`, and octal by a leading zero.
fn integer(text: &str) -> Option<Number> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let value = u64::from_str_radix(digits, radix)
        .ok()
        .filter(|_| !digits.starts_with('+'))?;
    if negative {
        i64::try_from(-i128::from(value)).ok().map(Number::from)
    } else {
        Some(Number::from(value))
    }
}

/// Decimal with point or exponent; whole values come out as integers, as in Go's JSON.
fn float(text: &str) -> Option<Number> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let shape = digits
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
    if !shape
        || digits.starts_with(['e', 'E', '-', '+'])
        || !digits.bytes().any(|b| b.is_ascii_digit())
    {
        return None;
    }
    let value: f64 = text.parse().ok().filter(|value: &f64| value.is_finite())?;
    if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
        Some(Number::from(value as i64))
    } else {
        Number::from_f64(value)
    }
}

fn is_infinite(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN")
}

/// Dates stay texts in kubectl, but other readers take them for times.
fn is_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 8
        && bytes[..4].iter().all(u8::is_ascii_digit)
        && bytes[4] == b'-'
        && bytes[5].is_ascii_digit()
}
