//! Errors as Kubernetes words them: `Status` objects with the reason, code and causes that `kubectl` users know.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Value, json};

use crate::registry::Resource;

/// An error that a client sees as a `Status`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub code: u16,
    /// Machine-readable reason, for example `NotFound`; empty when there is none.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// `details` of the Status.
    pub details: Option<Value>,
}

impl ApiError {
    /// An error without details.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    /// 400 `BadRequest`.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError::new(400, "BadRequest", message)
    }

    /// 500 `InternalError`.
    pub fn internal(message: impl std::fmt::Display) -> ApiError {
        ApiError::new(
            500,
            "InternalError",
            format!("Internal error occurred: {message}"),
        )
    }

    /// 404 for an object.
    pub fn not_found(resource: &Resource, name: &str) -> ApiError {
        let message = format!("{} \"{name}\" not found", resource.qualified());
        ApiError::new(404, "NotFound", message).about(resource, name)
    }

    /// 404 for a path that names no resource.
    pub fn no_resource() -> ApiError {
        let mut error = ApiError::new(
            404,
            "NotFound",
            "the server could not find the requested resource",
        );
        error.details = Some(json!({}));
        error
    }

    /// 409 for a name that is taken.
    pub fn already_exists(resource: &Resource, name: &str) -> ApiError {
        let message = format!("{} \"{name}\" already exists", resource.qualified());
        ApiError::new(409, "AlreadyExists", message).about(resource, name)
    }

    /// 409 for a write that is not based on the newest state.
    pub fn conflict(resource: &Resource, name: &str, why: &str) -> ApiError {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{name}\": {why}",
            resource.qualified()
        );
        ApiError::new(409, "Conflict", message).about(resource, name)
    }

    /// The usual [`ApiError::conflict`].
    pub fn modified(resource: &Resource, name: &str) -> ApiError {
        ApiError::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 403.
    pub fn forbidden(resource: &Resource, name: &str, why: &str) -> ApiError {
        let message = format!("{} \"{name}\" is forbidden: {why}", resource.qualified());
        ApiError::new(403, "Forbidden", message).about(resource, name)
    }

    /// 422 with one cause for each field.
    pub fn invalid(resource: &Resource, name: &str, fields: &[FieldError]) -> ApiError {
        let texts: Vec<String> = fields.iter().map(FieldError::to_string).collect();
        let list = if texts.len() == 1 {
            texts[0].clone()
        } else {
            format!("[{}]", texts.join(", "))
        };
        let kind = if resource.group.is_empty() {
            resource.kind.clone()
        } else {
            format!("{}.{}", resource.kind, resource.group)
        };
        let causes: Vec<Value> = fields.iter().map(FieldError::cause).collect();
        let mut error = ApiError::new(
            422,
            "Invalid",
            format!("{kind} \"{name}\" is invalid: {list}"),
        );
        error.details = Some(
            json!({ "name": name, "group": resource.group, "kind": resource.kind, "causes": causes }),
        );
        error
    }

    /// 410: the revision is too old.
    pub fn expired(message: impl Into<String>) -> ApiError {
        ApiError::new(410, "Expired", message)
    }

    /// 405.
    pub fn method_not_allowed() -> ApiError {
        let message = "the server does not allow this method on the requested resource";
        let mut error = ApiError::new(405, "MethodNotAllowed", message);
        error.details = Some(json!({}));
        error
    }

    fn about(mut self, resource: &Resource, name: &str) -> ApiError {
        self.details = Some(if resource.group.is_empty() {
            json!({ "name": name, "kind": resource.plural })
        } else {
            json!({ "name": name, "group": resource.group, "kind": resource.plural })
        });
        self
    }

    /// The `Status` object.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message,
        });
        if !self.reason.is_empty() {
            status["reason"] = self.reason.into();
        }
        if let Some(details) = &self.details {
            status["details"] = details.clone();
        }
        status["code"] = self.code.into();
        status
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, axum::Json(self.status())).into_response()
    }
}

/// What is wrong with a field (Kubernetes `field.ErrorType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldErrorKind {
    /// Missing.
    Required,
    /// Present and wrong.
    Invalid,
    /// Of the wrong JSON type.
    TypeInvalid,
    /// Not one of the allowed values.
    NotSupported,
    /// Twice in a list of unique items.
    Duplicate,
    /// Not allowed here.
    Forbidden,
    /// Refers to something that does not exist.
    NotFound,
}

/// One wrong field.
#[derive(Debug, Clone, PartialEq)]
pub struct FieldError {
    /// Path, for example `spec.ports[0].port`.
    pub field: String,
    /// What is wrong.
    pub kind: FieldErrorKind,
    /// The offending value, shown for most kinds.
    pub value: Value,
    /// More words.
    pub detail: String,
}

impl FieldError {
    /// A missing field.
    pub fn required(field: impl Into<String>, detail: &str) -> FieldError {
        FieldError::make(field, FieldErrorKind::Required, Value::Null, detail)
    }

    /// A wrong value.
    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: &str) -> FieldError {
        FieldError::make(field, FieldErrorKind::Invalid, value.into(), detail)
    }

    /// Something that may not be.
    pub fn forbidden(field: impl Into<String>, detail: &str) -> FieldError {
        FieldError::make(field, FieldErrorKind::Forbidden, Value::Null, detail)
    }

    /// Any kind.
    pub fn make(
        field: impl Into<String>,
        kind: FieldErrorKind,
        value: Value,
        detail: &str,
    ) -> FieldError {
        FieldError {
            field: field.into(),
            kind,
            value,
            detail: detail.to_owned(),
        }
    }

    fn cause(&self) -> Value {
        let reason = match self.kind {
            FieldErrorKind::Required => "FieldValueRequired",
            FieldErrorKind::Invalid => "FieldValueInvalid",
            FieldErrorKind::TypeInvalid => "FieldValueTypeInvalid",
            FieldErrorKind::NotSupported => "FieldValueNotSupported",
            FieldErrorKind::Duplicate => "FieldValueDuplicate",
            FieldErrorKind::Forbidden => "FieldValueForbidden",
            FieldErrorKind::NotFound => "FieldValueNotFound",
        };
        json!({ "reason": reason, "message": self.body(), "field": self.field })
    }

    fn body(&self) -> String {
        let (title, show) = match self.kind {
            FieldErrorKind::Required => ("Required value", false),
            FieldErrorKind::Invalid | FieldErrorKind::TypeInvalid => ("Invalid value", true),
            FieldErrorKind::NotSupported => ("Unsupported value", true),
            FieldErrorKind::Duplicate => ("Duplicate value", true),
            FieldErrorKind::Forbidden => ("Forbidden", false),
            FieldErrorKind::NotFound => ("Not found", true),
        };
        let mut text = title.to_owned();
        if show {
            text.push_str(&format!(": {}", self.value));
        }
        if !self.detail.is_empty() {
            text.push_str(&format!(": {}", self.detail));
        }
        text
    }
}

impl std::fmt::Display for FieldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.body())
        } else {
            write!(f, "{}: {}", self.field, self.body())
        }
    }
}
