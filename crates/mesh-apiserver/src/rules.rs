//! Rules in CEL, the Common Expression Language: `x-kubernetes-validations` in the schema of a CRD and `matchConditions` of webhooks.
//!
//! The language is the `cel` crate's; here is what Kubernetes adds: transition rules, messages, escaped field names, types by schema.
//! A rule that calls a function which this server lacks is refused when the definition is written, so that none is silently ignored.
//! An expression is small, flat and cheap by its form (`rules/cost.rs`) before it is evaluated, on a thread and a stack of its own
//! ([`aside`]).

mod convert;
mod cost;
mod functions;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cel::common::ast::{EntryExpr, Expr, IdedExpr};
use cel::objects::OptionalValue;
use cel::{Context, Env, Program, Value as CelValue};
use serde_json::Value;
use tokio::sync::{Semaphore, oneshot};

use crate::errors::{ApiError, FieldError, FieldErrorKind};
use crate::schema::{ListType, Schema};
use cost::Size;

/// Characters of one expression.
const MAX_EXPRESSION: usize = 16 * 1024;
/// Operators, points and brackets of one expression, those inside of texts too. They bound the depth of the parser's recursion.
const MAX_OPERATORS: usize = 1_500;
/// Units ([`cost`]) that all rules of one object may cost together.
const MAX_TOTAL_COST: u64 = 20_000_000;
/// Compiled match conditions that are kept.
const KEPT: usize = 256;
/// Address space of the stack of a thread that parses and evaluates; the deepest expression allowed needs about a fifth of it.
const STACK: usize = 256 << 20;
/// Threads of that kind at a time.
static ASIDE: Semaphore = Semaphore::const_new(4);

/// Does work that parses or evaluates expressions on a thread with a deep stack, away from the workers that serve requests.
///
/// # Errors
/// 500 when there is no thread to be had, or the work panicked.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |error: &dyn std::fmt::Display| {
        ApiError::internal(format!("evaluating validation rules: {error}"))
    };
    let _permit = ASIDE.acquire().await.map_err(|e| failed(&e))?;
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        // Nobody waits any more when the client has gone.
        let _ = sender.send(work());
    };
    std::thread::Builder::new()
        .name("api-rules".to_owned())
        .stack_size(STACK)
        .spawn(run)
        .map_err(|e| failed(&e))?;
    receiver.await.map_err(|e| failed(&e))
}

/// A compiled expression.
pub struct Expression {
    program: Program,
    names: HashSet<String>,
}

/// One rule of a schema.
pub struct Rule {
    raw: Value,
    compiled: OnceLock<Result<Compiled, String>>,
}

struct Compiled {
    rule: Expression,
    message: Option<Expression>,
}

impl std::fmt::Debug for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rule").field(&self.raw).finish()
    }
}

fn env() -> &'static Arc<Env> {
    static ENV: OnceLock<Arc<Env>> = OnceLock::new();
    ENV.get_or_init(|| Arc::new(functions::environment()))
}

impl Expression {
    /// Compiles an expression over these variables.
    ///
    /// # Errors
    /// What does not parse, or is not known.
    pub fn compile(source: &str, variables: &[&str]) -> Result<Expression, String> {
        if source.len() > MAX_EXPRESSION {
            return Err(format!("longer than {MAX_EXPRESSION} characters"));
        }
        let operators = source.bytes().filter(u8::is_ascii_punctuation);
        let operators = operators.filter(|c| !b"_'\"\\".contains(c)).count();
        if operators > MAX_OPERATORS {
            return Err(format!(
                "too complex: {operators} operators and brackets, at most {MAX_OPERATORS} are allowed"
            ));
        }
        let program = catch_unwind(AssertUnwindSafe(|| env().compile(source)))
            .map_err(|_| "the expression could not be parsed".to_owned())?
            .map_err(|errors| errors.to_string().replace('\n', " "))?;
        let mut found = Names::default();
        found.read(program.expression(), &mut Vec::new());
        if found.deepest > cost::MAX_LEVELS {
            return Err(format!(
                "too complex: expression recursion limit exceeded: {}",
                cost::MAX_LEVELS
            ));
        }
        if found.nested > cost::MAX_NESTED {
            return Err(format!(
                "too complex: {} comprehensions (all, exists, map, ...) inside each other, at most {} are allowed",
                found.nested,
                cost::MAX_NESTED
            ));
        }
        let mut missing: Vec<_> = found.functions.iter().map(String::as_str).collect();
        missing.retain(|name| !functions::is_known(name));
        missing.sort_unstable();
        if !missing.is_empty() {
            return Err(format!(
                "undeclared reference to '{}': this server does not have such functions",
                missing.join("', '")
            ));
        }
        let known =
            |name: &String| variables.contains(&name.as_str()) || functions::is_namespace(name);
        if let Some(unknown) = found.variables.iter().find(|name| !known(name)) {
            return Err(format!("undeclared reference to '{unknown}'"));
        }
        Ok(Expression {
            program,
            names: found.variables,
        })
    }

    /// Whether the expression mentions a variable.
    fn mentions(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// The value of the expression.
    ///
    /// # Errors
    /// What went wrong, for example a key that is not there.
    fn evaluate(&self, variables: &[Variable], budget: &Cell<u64>) -> Result<CelValue, String> {
        let sizes = variables.iter().map(|v| (v.name, v.size)).collect();
        let cost = cost::of(self.program.expression(), &sizes);
        if cost > cost::MAX_COST || cost > budget.get() {
            return Err("it would cost more than the budget for validation rules allows; \
                        bound the lists and texts that it works on (maxItems, maxLength) or simplify it"
                .to_owned());
        }
        budget.set(budget.get() - cost);
        let run = || {
            let mut context = Context::with_env(env().clone());
            functions::add_to(&mut context);
            for variable in variables {
                context.add_variable_from_value(variable.name, variable.value.clone());
            }
            self.program.execute(&context)
        };
        catch_unwind(AssertUnwindSafe(run))
            .map_err(|_| "the evaluation failed".to_owned())?
            .map_err(|error| error.to_string())
    }

    fn holds(&self, variables: &[Variable], budget: &Cell<u64>) -> Result<bool, String> {
        match self.evaluate(variables, budget)? {
            CelValue::Bool(holds) => Ok(holds),
            other => Err(format!("the result is {other:?} and not a bool")),
        }
    }
}

/// What an expression is about.
struct Variable {
    name: &'static str,
    value: CelValue,
    size: Size,
}

/// The names that an expression uses and does not itself declare, and how deep it is.
#[derive(Default)]
struct Names {
    variables: HashSet<String>,
    functions: HashSet<String>,
    level: usize,
    deepest: usize,
    loops: usize,
    nested: usize,
}

impl Names {
    fn read(&mut self, expression: &IdedExpr, scope: &mut Vec<String>) {
        self.level += 1;
        self.deepest = self.deepest.max(self.level);
        self.read_inner(expression, scope);
        self.level -= 1;
    }

    fn read_inner(&mut self, expression: &IdedExpr, scope: &mut Vec<String>) {
        match &expression.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => {
                let name = name.trim_start_matches('.');
                if !scope.iter().any(|known| known == name) {
                    self.variables.insert(name.to_owned());
                }
            }
            Expr::Call(call) => {
                self.functions.insert(call.func_name.clone());
                for part in call.target.as_deref().into_iter().chain(&call.args) {
                    self.read(part, scope);
                }
            }
            Expr::Select(select) => self.read(&select.operand, scope),
            Expr::List(list) => list
                .elements
                .iter()
                .for_each(|element| self.read(element, scope)),
            Expr::Map(map) => self.entries(map.entries.iter().map(|entry| &entry.expr), scope),
            Expr::Struct(value) => {
                self.functions.insert(value.type_name.clone());
                self.entries(value.entries.iter().map(|entry| &entry.expr), scope);
            }
            Expr::Comprehension(inner) => {
                self.read(&inner.iter_range, scope);
                self.read(&inner.accu_init, scope);
                let depth = scope.len();
                scope.push(inner.iter_var.clone());
                scope.extend(inner.iter_var2.clone());
                scope.push(inner.accu_var.clone());
                self.loops += 1;
                self.nested = self.nested.max(self.loops);
                for part in [&inner.loop_cond, &inner.loop_step, &inner.result] {
                    self.read(part, scope);
                }
                self.loops -= 1;
                scope.truncate(depth);
            }
        }
    }

    fn entries<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a EntryExpr>,
        scope: &mut Vec<String>,
    ) {
        for entry in entries {
            match entry {
                EntryExpr::StructField(field) => self.read(&field.value, scope),
                EntryExpr::MapEntry(entry) => {
                    self.read(&entry.key, scope);
                    self.read(&entry.value, scope);
                }
            }
        }
    }
}

impl Rule {
    /// The rules of a schema node; they are compiled when they are first used.
    pub fn of(schema: &Value) -> Vec<Arc<Rule>> {
        let rules = schema
            .get("x-kubernetes-validations")
            .and_then(Value::as_array);
        let rule = |raw: &Value| {
            Arc::new(Rule {
                raw: raw.clone(),
                compiled: OnceLock::new(),
            })
        };
        rules.into_iter().flatten().map(rule).collect()
    }

    fn text(&self, field: &str) -> &str {
        self.raw[field].as_str().unwrap_or_default()
    }

    fn compiled(&self) -> &Result<Compiled, String> {
        self.compiled.get_or_init(|| {
            let variables = ["self", "oldSelf"];
            let rule = Expression::compile(self.text("rule"), &variables)
                .map_err(|error| format!("rule: compilation failed: {error}"))?;
            let message =
                match self.text("messageExpression") {
                    "" => None,
                    text => Some(Expression::compile(text, &variables).map_err(|error| {
                        format!("messageExpression: compilation failed: {error}")
                    })?),
                };
            Ok(Compiled { rule, message })
        })
    }

    fn is_optional_old(&self) -> bool {
        self.raw["optionalOldSelf"] == true
    }

    fn check(&self, node: &Node<'_>, budget: &Cell<u64>, errors: &mut Vec<FieldError>) {
        let compiled = match self.compiled() {
            Ok(compiled) => compiled,
            Err(reason) => return errors.push(self.error(node, reason)),
        };
        let is_transition = compiled.rule.mentions("oldSelf");
        let old = match (node.old, is_transition, self.is_optional_old()) {
            (_, false, _) => {
                // What was wrong before and did not change is not this write's fault (Kubernetes' ratcheting).
                if node.old == Some(node.value) {
                    return;
                }
                None
            }
            (None, true, false) => return,
            (Some(old), true, false) => Some(convert::value(old, node.schema, node.is_root)),
            (old, true, true) => {
                let old = old.map(|old| convert::value(old, node.schema, node.is_root));
                let optional = old.map_or_else(OptionalValue::none, OptionalValue::of);
                Some(CelValue::Opaque(Arc::new(optional)))
            }
        };
        let mut variables = vec![Variable {
            name: "self",
            value: convert::value(node.value, node.schema, node.is_root),
            size: Size::of(node.value),
        }];
        variables.extend(old.map(|value| Variable {
            name: "oldSelf",
            value,
            size: node.old.map(Size::of).unwrap_or_default(),
        }));
        match compiled.rule.holds(&variables, budget) {
            Ok(true) => {}
            Ok(false) => {
                let computed = compiled.message.as_ref().and_then(|message| {
                    match message.evaluate(&variables, budget) {
                        Ok(CelValue::String(text)) if !text.trim().is_empty() => {
                            Some(text.replace('\n', " "))
                        }
                        _ => None,
                    }
                });
                let message = computed.unwrap_or_else(|| match self.text("message") {
                    "" => format!("failed rule: {}", self.text("rule").trim()),
                    message => message.to_owned(),
                });
                errors.push(self.error(node, &message));
            }
            Err(reason) => {
                let rule = self.text("rule").trim();
                let message = format!("rule could not be evaluated: {reason}; rule: {rule}");
                errors.push(self.error(node, &message));
            }
        }
    }

    fn error(&self, node: &Node<'_>, message: &str) -> FieldError {
        let kind = match self.text("reason") {
            "FieldValueForbidden" => FieldErrorKind::Forbidden,
            "FieldValueRequired" => FieldErrorKind::Required,
            "FieldValueDuplicate" => FieldErrorKind::Duplicate,
            _ => FieldErrorKind::Invalid,
        };
        let shown = match node.value {
            Value::Object(_) => "object".into(),
            Value::Array(_) => "array".into(),
            scalar => scalar.clone(),
        };
        let path = format!("{}{}", node.path, self.text("fieldPath"));
        FieldError::make(path.trim_start_matches('.'), kind, shown, message)
    }
}

/// A value with what it was, at its place.
struct Node<'a> {
    value: &'a Value,
    old: Option<&'a Value>,
    schema: &'a Schema,
    path: &'a str,
    is_root: bool,
}

/// Adds what the rules of `schema` find wrong with `value` to `errors`; `old` is the object before an update.
pub fn validate(value: &Value, old: Option<&Value>, schema: &Schema, errors: &mut Vec<FieldError>) {
    if schema.has_validations {
        let budget = Cell::new(MAX_TOTAL_COST);
        walk(value, old, schema, "", true, &budget, errors);
    }
}

fn walk(
    value: &Value,
    old: Option<&Value>,
    schema: &Schema,
    path: &str,
    is_root: bool,
    budget: &Cell<u64>,
    errors: &mut Vec<FieldError>,
) {
    if !schema.has_validations || value.is_null() {
        return;
    }
    let old = old.filter(|old| !old.is_null());
    let node = Node {
        value,
        old,
        schema,
        path,
        is_root,
    };
    for rule in &schema.validations {
        rule.check(&node, budget, errors);
    }
    match value {
        Value::Object(map) => {
            for (key, child) in map {
                if let Some(field) = schema.field(key) {
                    let at = match schema.known(key) {
                        Some(_) if path.is_empty() => key.clone(),
                        Some(_) => format!("{path}.{key}"),
                        None => format!("{path}[{key}]"),
                    };
                    let before = old.and_then(|old| old.get(key));
                    walk(child, before, field, &at, false, budget, errors);
                }
            }
        }
        Value::Array(list) => {
            let Some(items) = &schema.items else { return };
            for (index, item) in list.iter().enumerate() {
                let before = old.and_then(|old| same_item(old, item, &schema.list_type));
                let at = format!("{path}[{index}]");
                walk(item, before, items, &at, false, budget, errors);
            }
        }
        _ => {}
    }
}

/// What the item was before; only keyed lists say which.
fn same_item<'a>(old: &'a Value, item: &Value, list_type: &ListType) -> Option<&'a Value> {
    let ListType::Map(keys) = list_type else {
        return None;
    };
    old.as_array()?
        .iter()
        .find(|before| keys.iter().all(|key| before.get(key) == item.get(key)))
}

/// Adds what is wrong with the rules of a CRD's schema, given as it was sent, at `path`.
pub fn validate_definition(
    raw: &Value,
    path: &str,
    correlatable: bool,
    errors: &mut Vec<FieldError>,
) {
    for (index, rule) in Rule::of(raw).iter().enumerate() {
        let at = format!("{path}.x-kubernetes-validations[{index}]");
        validate_rule(rule, &at, correlatable, errors);
    }
    for (key, field) in raw["properties"].as_object().into_iter().flatten() {
        let at = format!("{path}.properties[{key}]");
        validate_definition(field, &at, correlatable, errors);
    }
    if raw["additionalProperties"].is_object() {
        let at = format!("{path}.additionalProperties");
        validate_definition(&raw["additionalProperties"], &at, correlatable, errors);
    }
    if raw["items"].is_object() {
        let keyed = raw["x-kubernetes-list-type"] == "map";
        let at = format!("{path}.items");
        validate_definition(&raw["items"], &at, correlatable && keyed, errors);
    }
    for combination in ["allOf", "anyOf", "oneOf"] {
        for (index, branch) in raw[combination]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            if branch.get("x-kubernetes-validations").is_some() {
                let at = format!("{path}.{combination}[{index}].x-kubernetes-validations");
                errors.push(FieldError::forbidden(at, "must be empty to be structural"));
            }
        }
    }
}

fn validate_rule(rule: &Rule, at: &str, correlatable: bool, errors: &mut Vec<FieldError>) {
    if rule.text("rule").trim().is_empty() {
        return errors.push(FieldError::required(
            format!("{at}.rule"),
            "rule is not specified",
        ));
    }
    let reasons = [
        "",
        "FieldValueInvalid",
        "FieldValueForbidden",
        "FieldValueRequired",
        "FieldValueDuplicate",
    ];
    if !reasons.contains(&rule.text("reason")) {
        let shown = rule.raw["reason"].clone();
        let detail = "supported values: \"FieldValueDuplicate\", \"FieldValueForbidden\", \"FieldValueInvalid\", \"FieldValueRequired\"";
        let field = format!("{at}.reason");
        errors.push(FieldError::make(
            field,
            FieldErrorKind::NotSupported,
            shown,
            detail,
        ));
    }
    match rule.compiled() {
        Err(reason) => {
            errors.push(FieldError::invalid(at, rule.text("rule"), reason));
        }
        Ok(compiled) if compiled.rule.mentions("oldSelf") && !correlatable => {
            let detail = "oldSelf cannot be used on the uncorrelatable portion of the schema";
            errors.push(FieldError::invalid(at, rule.text("rule"), detail));
        }
        Ok(compiled) if rule.is_optional_old() && !compiled.rule.mentions("oldSelf") => {
            let detail = "option optionalOldSelf may only be set when oldSelf is used";
            let field = format!("{at}.optionalOldSelf");
            errors.push(FieldError::invalid(field, true, detail));
        }
        Ok(_) => {}
    }
}

/// The variables of a webhook's match condition.
pub const CONDITION_VARIABLES: [&str; 3] = ["object", "oldObject", "request"];

/// Whether a webhook's match condition holds for what these JSON values say.
///
/// # Errors
/// What went wrong.
pub fn condition(source: &str, values: [&Value; 3]) -> Result<bool, String> {
    static COMPILED: Mutex<Option<HashMap<String, Arc<Expression>>>> = Mutex::new(None);
    let mut kept = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    let kept_map = kept.get_or_insert_default();
    let expression = match kept_map.get(source) {
        Some(expression) => expression.clone(),
        None => {
            let compiled = Arc::new(Expression::compile(source, &CONDITION_VARIABLES)?);
            if kept_map.len() >= KEPT {
                kept_map.clear();
            }
            kept_map.insert(source.to_owned(), compiled.clone());
            compiled
        }
    };
    drop(kept);
    let variables: Vec<_> = CONDITION_VARIABLES
        .into_iter()
        .zip(values)
        .map(|(name, value)| Variable {
            name,
            value: convert::plain(value),
            size: Size::of(value),
        })
        .collect();
    expression.holds(&variables, &Cell::new(cost::MAX_COST))
}
