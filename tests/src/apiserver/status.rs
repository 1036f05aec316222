//! How the server says no: `Status` objects.

use serde_json::{Value, json};

/// Why a request, or a watch, is not answered.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: u16,
    reason: &'static str,
    message: String,
    details: Value,
}

impl Refusal {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    /// It can't be understood.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// It contradicts itself.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(422, "Invalid", message)
    }

    /// It comes from nobody who is known.
    pub(super) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// It is nothing that whoever asks may do.
    pub(super) fn forbidden(verb: &str, plural: &str, group: &str) -> Self {
        let message = format!(
            "{plural}{}{group} is forbidden: User \"system:serviceaccount:kube-system:wharf\" cannot {verb} resource \
             \"{plural}\" in API group \"{group}\" at the cluster scope",
            if group.is_empty() { "" } else { "." }
        );
        Self { details: json!({ "kind": plural }), ..Self::new(403, "Forbidden", message) }
    }

    /// There is no such path.
    pub(super) fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// There is no such object.
    pub(super) fn no_such_object(plural: &str, name: &str) -> Self {
        let details = json!({ "name": name, "kind": plural });
        Self { details, ..Self::new(404, "NotFound", format!("{plural} \"{name}\" not found")) }
    }

    /// It can't be done there.
    pub(super) fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    /// There is one of this name.
    pub(super) fn already_exists(plural: &str, name: &str) -> Self {
        let details = json!({ "name": name, "kind": plural });
        Self { details, ..Self::new(409, "AlreadyExists", format!("{plural} \"{name}\" already exists")) }
    }

    /// What came after this version is forgotten.
    pub(super) fn too_old(version: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {version} ({oldest})"))
    }

    /// The rest of this list is forgotten.
    pub(super) fn continue_too_old() -> Self {
        Self::new(
            410,
            "Expired",
            "The provided continue parameter is too old to display a consistent list result. You can start a new list \
             without the continue parameter.",
        )
    }

    /// This version is still to come.
    pub(super) fn too_large(version: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {version}, current: {current}");
        let causes = json!([{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }]);
        Self { details: json!({ "causes": causes, "retryAfterSeconds": 1 }), ..Self::new(504, "Timeout", message) }
    }

    /// What servers in trouble say, by the code.
    pub(super) fn trouble(code: u16) -> Self {
        let (reason, message) = match code {
            429 => ("TooManyRequests", "Too many requests, please try again later."),
            500 => ("InternalError", "Internal error occurred: etcdserver: request timed out"),
            503 => ("ServiceUnavailable", "apiserver is shutting down"),
            504 => ("Timeout", "the server was unable to return a response in the time allotted"),
            _ => ("Unknown", "an error on the server has prevented the request from succeeding"),
        };
        let details = if code == 429 { json!({ "retryAfterSeconds": 1 }) } else { Value::Null };
        Self { details, ..Self::new(code, reason, message) }
    }

    /// The object that says so.
    pub(super) fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}
