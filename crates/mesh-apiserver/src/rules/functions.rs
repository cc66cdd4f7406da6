//! Which functions rules may call: the standard ones, the extensions of cel-go for strings, lists, math and optional values, and those
//! of Kubernetes' own that are here (lists and regular expressions). The others (`quantity`, `ip`, `cidr`, `url`, `format`,
//! `authorizer` …) are refused by name.

use std::sync::Arc;

use cel::extractors::This;
use cel::{Context, Env, ExecutionError, Value};

/// Names by which functions and types are qualified, and types that can be mentioned.
const NAMESPACES: [&str; 17] = [
    "math",
    "strings",
    "optional",
    "cel",
    "int",
    "uint",
    "double",
    "bool",
    "string",
    "bytes",
    "list",
    "map",
    "null_type",
    "type",
    "dyn",
    "google",
    "lists",
];

/// All functions that are not operators.
const FUNCTIONS: [&str; 82] = [
    // The standard library.
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "matches",
    "string",
    "int",
    "uint",
    "double",
    "bytes",
    "bool",
    "dyn",
    "type",
    "duration",
    "timestamp",
    "getFullYear",
    "getMonth",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getHours",
    "getMinutes",
    "getSeconds",
    "getMilliseconds",
    // Optional values.
    "of",
    "ofNonZeroValue",
    "none",
    "hasValue",
    "value",
    "or",
    "orValue",
    // Strings.
    "charAt",
    "indexOf",
    "lastIndexOf",
    "join",
    "lowerAscii",
    "upperAscii",
    "replace",
    "split",
    "substring",
    "trim",
    "quote",
    // Lists.
    "flatten",
    "distinct",
    "sort",
    "slice",
    "range",
    "reverse",
    // Math.
    "greatest",
    "least",
    "ceil",
    "floor",
    "round",
    "trunc",
    "abs",
    "sign",
    "sqrt",
    "isNaN",
    "isInf",
    "isFinite",
    "bitAnd",
    "bitOr",
    "bitXor",
    "bitNot",
    "bitShiftLeft",
    "bitShiftRight",
    // Kubernetes' lists and regular expressions.
    "isSorted",
    "sum",
    "min",
    "max",
    "find",
    "findAll",
    // The same by the names under which structures and macros appear in a parsed expression.
    "math.greatest",
    "math.least",
    "strings.quote",
    "lists.range",
    "optional.of",
    "optional.ofNonZeroValue",
    "optional.none",
    "",
    "optMap",
];

/// Whether rules may call it.
pub fn is_known(name: &str) -> bool {
    // Operators and what macros expand to, such as `_&&_` and `math.@max`.
    let operator = name.contains('@') || !name.starts_with(|c: char| c.is_ascii_alphabetic());
    operator || FUNCTIONS.contains(&name)
}

/// Whether a free name is one of the language's own.
pub fn is_namespace(name: &str) -> bool {
    NAMESPACES.contains(&name)
}

/// The standard environment with the extensions.
pub fn environment() -> Env {
    let mut env = Env::stdlib();
    for add in [
        cel::extensions::strings,
        cel::extensions::lists,
        cel::extensions::math,
    ] {
        // Two extensions that declare one function would be a mistake of the crate's; the tests call one of each.
        if let Err(error) = env.add_extension(add) {
            tracing::error!(%error, "a CEL extension is missing");
        }
    }
    env
}

/// Adds Kubernetes' own.
pub fn add_to(context: &mut Context<'_, '_>) {
    let added = [
        context.add_function("isSorted", is_sorted),
        context.add_function("sum", sum),
        context.add_function("min", |This(list): This<Arc<Vec<Value>>>| {
            extreme("min", &list, std::cmp::Ordering::Less)
        }),
        context.add_function("max", |This(list): This<Arc<Vec<Value>>>| {
            extreme("max", &list, std::cmp::Ordering::Greater)
        }),
        context.add_function("find", find),
        context.add_function("findAll", find_all),
    ];
    for error in added.into_iter().filter_map(Result::err) {
        tracing::error!(%error, "a CEL function is missing");
    }
}

fn is_sorted(This(list): This<Arc<Vec<Value>>>) -> bool {
    list.windows(2).all(|pair| {
        pair[0]
            .partial_cmp(&pair[1])
            .is_some_and(std::cmp::Ordering::is_le)
    })
}

fn sum(This(list): This<Arc<Vec<Value>>>) -> Result<Value, ExecutionError> {
    let mut total = Value::Int(0);
    for (index, item) in list.iter().enumerate() {
        total = match (&total, item) {
            (_, item) if index == 0 => item.clone(),
            (Value::Int(a), Value::Int(b)) => Value::Int(
                a.checked_add(*b)
                    .ok_or_else(|| ExecutionError::function_error("sum", "overflow"))?,
            ),
            (Value::Float(a), Value::Float(b)) => Value::Float(a + b),
            _ => {
                return Err(ExecutionError::function_error(
                    "sum",
                    "not a list of numbers",
                ));
            }
        };
    }
    Ok(total)
}

fn extreme(
    name: &str,
    list: &[Value],
    wanted: std::cmp::Ordering,
) -> Result<Value, ExecutionError> {
    let mut items = list.iter();
    let first = items
        .next()
        .ok_or_else(|| ExecutionError::function_error(name, "the list is empty"))?;
    Ok(items
        .fold(first, |best, item| {
            if item.partial_cmp(best) == Some(wanted) {
                item
            } else {
                best
            }
        })
        .clone())
}

fn regex(name: &str, pattern: &str) -> Result<regex::Regex, ExecutionError> {
    regex::RegexBuilder::new(pattern)
        .size_limit(1 << 20)
        .build()
        .map_err(|error| ExecutionError::function_error(name, error))
}

fn find(This(text): This<Arc<String>>, pattern: Arc<String>) -> Result<Value, ExecutionError> {
    let regex = regex("find", &pattern)?;
    let found = regex.find(&text).map_or("", |found| found.as_str());
    Ok(Value::String(Arc::new(found.to_owned())))
}

fn find_all(This(text): This<Arc<String>>, pattern: Arc<String>) -> Result<Value, ExecutionError> {
    let regex = regex("findAll", &pattern)?;
    let all = regex
        .find_iter(&text)
        .map(|found| Value::String(Arc::new(found.as_str().to_owned())));
    Ok(Value::List(Arc::new(all.collect())))
}
