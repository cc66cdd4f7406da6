//! What an expression can cost at most, by its form and by the size of what it is about; nothing is evaluated. Kubernetes counts while it
//! evaluates and stops ("runtime cost budget"); our evaluator can't be stopped, so what could cost too much is not begun.
//!
//! One unit is about one step of the evaluator, or 16 bytes copied or compared.

use std::collections::HashMap;

use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue};
use serde_json::Value;

/// Units that one expression may cost for one value: some seconds at worst. Kubernetes stops at 1,000,000 counted units; ours are estimated
/// from above.
pub const MAX_COST: u64 = 5_000_000;
/// Comprehensions (`all`, `exists`, `map` …) inside each other.
pub const MAX_NESTED: usize = 3;
/// Levels of a parsed expression, as in cel-go.
pub const MAX_LEVELS: usize = 250;
/// Bytes and nodes per unit.
const PER_UNIT: u64 = 16;
/// Compiling a regular expression.
const REGEX: u64 = 1_000;

/// Bounds of a value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Items of the longest list or map in it.
    length: u64,
    /// Its nodes and bytes of text.
    weight: u64,
    /// The value, if it is a whole number that is known not to be above this.
    number: Option<u64>,
}

impl Size {
    /// Measures a JSON value.
    pub fn of(value: &Value) -> Size {
        let mut size = Size {
            weight: 1,
            ..Size::default()
        };
        let mut add = |inner: Size, own: usize| {
            size.length = size.length.max(inner.length).max(own as u64);
            size.weight += inner.weight;
        };
        match value {
            Value::Array(items) => items
                .iter()
                .for_each(|item| add(Size::of(item), items.len())),
            Value::Object(fields) => fields.iter().for_each(|(key, value)| {
                let mut inner = Size::of(value);
                inner.weight += key.len() as u64;
                add(inner, fields.len());
            }),
            Value::String(text) => size.weight += text.len() as u64,
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        size
    }

    /// Of two values one of which it is.
    fn either(self, other: Size) -> Size {
        Size {
            length: self.length.max(other.length),
            weight: self.weight.max(other.weight),
            number: self.number.zip(other.number).map(|(a, b)| a.max(b)),
        }
    }
}

/// Cost of computing a value, and its bounds.
#[derive(Debug, Clone, Copy, Default)]
struct Estimate {
    cost: u64,
    size: Size,
}

/// What the expression costs at most, in units; `u64::MAX` when there is no bound.
pub fn of(expression: &IdedExpr, variables: &HashMap<&str, Size>) -> u64 {
    let scope = variables
        .iter()
        .map(|(name, size)| ((*name).to_owned(), *size));
    estimate(expression, &mut scope.collect()).cost
}

type Scope = Vec<(String, Size)>;

fn estimate(expression: &IdedExpr, scope: &mut Scope) -> Estimate {
    match &expression.expr {
        Expr::Unspecified => Estimate::default(),
        Expr::Literal(value) => Estimate {
            cost: 1,
            size: literal(value),
        },
        Expr::Ident(name) => {
            let name = name.trim_start_matches('.');
            let known = scope.iter().rev().find(|(known, _)| known == name);
            Estimate {
                cost: 1,
                size: known.map(|(_, size)| *size).unwrap_or_default(),
            }
        }
        Expr::Select(select) => {
            let mut whole = estimate(&select.operand, scope);
            whole.cost = whole.cost.saturating_add(1);
            whole.size.number = None;
            whole
        }
        Expr::List(list) => gather(list.elements.iter(), list.elements.len(), scope),
        Expr::Map(map) => entries(map.entries.iter().map(|entry| &entry.expr), scope),
        Expr::Struct(value) => entries(value.entries.iter().map(|entry| &entry.expr), scope),
        Expr::Call(call) => self::call(call, scope),
        Expr::Comprehension(inner) => comprehension(inner, scope),
    }
}

fn literal(value: &LiteralValue) -> Size {
    let (bytes, number) = match value {
        LiteralValue::String(text) => (text.inner().len(), None),
        LiteralValue::Bytes(bytes) => (bytes.inner().len(), None),
        LiteralValue::Int(number) => (0, Some((*number.inner()).max(0) as u64)),
        _ => (0, None),
    };
    Size {
        length: 0,
        weight: 1 + bytes as u64,
        number,
    }
}

/// A new collection of these parts.
fn gather<'a>(
    parts: impl Iterator<Item = &'a IdedExpr>,
    count: usize,
    scope: &mut Scope,
) -> Estimate {
    let mut all = Estimate {
        cost: 1,
        size: Size {
            length: count as u64,
            weight: 1,
            number: None,
        },
    };
    for part in parts {
        let part = estimate(part, scope);
        all.cost = all.cost.saturating_add(part.cost);
        all.size.length = all.size.length.max(part.size.length);
        all.size.weight = all.size.weight.saturating_add(part.size.weight);
    }
    all
}

fn entries<'a>(entries: impl Iterator<Item = &'a EntryExpr>, scope: &mut Scope) -> Estimate {
    let mut parts = Vec::new();
    for entry in entries {
        match entry {
            EntryExpr::StructField(field) => parts.push(&field.value),
            EntryExpr::MapEntry(entry) => parts.extend([&entry.key, &entry.value]),
        }
    }
    let count = parts.len();
    gather(parts.into_iter(), count, scope)
}

fn call(call: &CallExpr, scope: &mut Scope) -> Estimate {
    let parts = call.target.as_deref().into_iter().chain(&call.args);
    let parts: Vec<Estimate> = parts.map(|part| estimate(part, scope)).collect();
    let argument = |index: usize| parts.get(index).map(|p| p.size).unwrap_or_default();
    let sum = |of: fn(&Size) -> u64| {
        parts
            .iter()
            .fold(0_u64, |sum, part| sum.saturating_add(of(&part.size)))
    };
    let (all, longest) = (
        sum(|size| size.weight),
        parts
            .iter()
            .map(|p| p.size.length)
            .max()
            .unwrap_or_default(),
    );
    // Without a rule of its own a call touches all of its arguments, and its result holds no more than they do together.
    let mut size = Size {
        length: longest,
        weight: all.saturating_add(64),
        number: None,
    };
    let mut work = 1 + all / PER_UNIT;
    let (first, second) = (argument(0), argument(1));
    match call.func_name.as_str() {
        "_&&_" | "_||_" | "!_" | "@not_strictly_false" | "_<_" | "_<=_" | "_>_" | "_>=_" => {
            (size, work) = (flag(), 1 + first.weight.min(second.weight) / PER_UNIT);
        }
        "_==_" | "_!=_" => {
            (size, work) = (flag(), 1 + first.weight.min(second.weight) / PER_UNIT);
        }
        "@in" => (size, work) = (flag(), 1 + second.weight / PER_UNIT + second.length),
        "_?_:_" => (size, work) = (second.either(argument(2)), 1),
        "_[_]" | "_[?_]" | "_?._" => {
            (size, work) = (first, 1);
            size.number = None;
        }
        "size" => {
            size = flag();
            (size.number, work) = (Some(all), 1);
        }
        "_+_" => size.length = sum(|size| size.length),
        "replace" => {
            let inserted = first
                .weight
                .saturating_add(1)
                .saturating_mul(argument(2).weight);
            size.weight = first.weight.saturating_add(inserted);
            work = size.weight;
        }
        "join" => size.weight = all.saturating_add(first.length.saturating_mul(second.weight)),
        "split" | "findAll" | "flatten" => {
            size.length = all.saturating_add(1);
            size.weight = all.saturating_mul(2).saturating_add(1);
        }
        "quote" | "strings.quote" => size.weight = all.saturating_mul(2).saturating_add(2),
        "distinct" | "sort" => work = all.saturating_add(longest.saturating_mul(longest)),
        "range" | "lists.range" => {
            let count = parts.last().and_then(|part| part.size.number);
            size.length = count.unwrap_or(u64::MAX);
            size.weight = size.length.saturating_mul(2);
            work = size.weight;
        }
        _ => {}
    }
    if matches!(call.func_name.as_str(), "matches" | "find" | "findAll") {
        let tried = first.weight.saturating_mul(second.weight.saturating_add(1));
        work = work.saturating_add(REGEX).saturating_add(tried / PER_UNIT);
    }
    // What is made has to be written.
    let written = size.weight.saturating_sub(all) / PER_UNIT;
    let cost = parts
        .iter()
        .fold(work.saturating_add(written), |sum, part| {
            sum.saturating_add(part.cost)
        });
    Estimate { cost, size }
}

fn flag() -> Size {
    Size {
        weight: 1,
        ..Size::default()
    }
}

/// A comprehension's accumulator grows with each round by what one round adds to an empty one: so do all of the language's macros.
fn comprehension(inner: &ComprehensionExpr, scope: &mut Scope) -> Estimate {
    let range = estimate(&inner.iter_range, scope);
    let start = estimate(&inner.accu_init, scope);
    let rounds = range.size.length;
    let depth = scope.len();
    let item = Size {
        number: None,
        ..range.size
    };
    scope.push((inner.iter_var.clone(), item));
    scope.extend(inner.iter_var2.clone().map(|name| (name, item)));
    scope.push((inner.accu_var.clone(), Size::default()));
    let added = estimate(&inner.loop_step, scope).size;
    let grown = Size {
        length: start
            .size
            .length
            .saturating_add(rounds.saturating_mul(added.length)),
        weight: start
            .size
            .weight
            .saturating_add(rounds.saturating_mul(added.weight)),
        number: None,
    };
    if let Some(accumulator) = scope.last_mut() {
        accumulator.1 = grown;
    }
    let round = estimate(&inner.loop_cond, scope)
        .cost
        .saturating_add(estimate(&inner.loop_step, scope).cost)
        .saturating_add(1);
    let result = estimate(&inner.result, scope);
    scope.truncate(depth);
    let cost = [start.cost, rounds.saturating_mul(round), result.cost]
        .into_iter()
        .fold(range.cost, u64::saturating_add);
    Estimate {
        cost,
        size: result.size,
    }
}
