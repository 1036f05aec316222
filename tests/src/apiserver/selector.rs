//! Which objects a request is about: `labelSelector` and `fieldSelector`.

use std::collections::BTreeMap;

use super::{status::Refusal, store::Object};

/// What an object has to be like.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

/// One thing that is asked of a label or of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    /// Holds as well where there is none.
    NotIn(Vec<String>),
}

impl Selector {
    /// Of what the two parameters say.
    pub(super) fn parse(labels: &str, fields: &str) -> Result<Self, Refusal> {
        let labels = requirements(labels)?;
        let fields = requirements(fields)?;
        let known = |it: &&Requirement| matches!(it.key.as_str(), "metadata.name" | "metadata.namespace");
        match fields.iter().find(|it| !known(it)) {
            Some(field) => Err(Refusal::bad_request(format!("field label not supported: {}", field.key))),
            None => Ok(Self { labels, fields }),
        }
    }

    /// The same, but about the object of this name alone.
    pub(super) fn named(mut self, name: Option<&str>) -> Self {
        let test = |name: &str| Test::In(vec![name.to_owned()]);
        self.fields.extend(name.map(|name| Requirement { key: "metadata.name".to_owned(), test: test(name) }));
        self
    }

    /// Whether this is about all objects.
    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether it is about this object.
    pub(super) fn takes(&self, object: &Object) -> bool {
        let field = |it: &Requirement| {
            let value = if it.key == "metadata.name" { &object.name } else { &object.namespace };
            it.test.holds_of(Some(value))
        };
        self.fields.iter().all(field) && self.takes_labels(&object.labels)
    }

    fn takes_labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|it| it.test.holds_of(labels.get(&it.key)))
    }
}

impl Test {
    fn holds_of(&self, value: Option<&String>) -> bool {
        match self {
            Self::Exists => value.is_some(),
            Self::Absent => value.is_none(),
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
        }
    }
}

fn requirements(text: &str) -> Result<Vec<Requirement>, Refusal> {
    let parts = outer_parts(text).into_iter().map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| requirement(part).ok_or_else(|| unparsable(text))).collect()
}

fn unparsable(text: &str) -> Refusal {
    Refusal::bad_request(format!("unable to parse requirement: {text}"))
}

/// What is between the commas that are in no parentheses.
fn outer_parts(text: &str) -> Vec<&str> {
    let mut inside = false;
    text.split(|c| {
        inside = (inside || c == '(') && c != ')';
        c == ',' && !inside
    })
    .collect()
}

fn requirement(text: &str) -> Option<Requirement> {
    let (key, asked) = if let Some(key) = text.strip_prefix('!') {
        (key, Test::Absent)
    } else if let Some((key, value)) = text.split_once("!=") {
        (key, Test::NotIn(vec![value.trim().to_owned()]))
    } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        (key, Test::In(vec![value.trim().to_owned()]))
    } else if let Some((left, values)) = text.split_once('(') {
        let values = values.strip_suffix(')')?.split(',').map(|value| value.trim().to_owned()).collect();
        match left.trim().rsplit_once(char::is_whitespace)? {
            (key, "in") => (key, Test::In(values)),
            (key, "notin") => (key, Test::NotIn(values)),
            _ => return None,
        }
    } else {
        (text, Test::Exists)
    };
    let key = key.trim();
    let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    is_key.then(|| Requirement { key: key.to_owned(), test: asked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_takes_what_all_its_requirements_hold_of() {
        let labels = [("app", "web"), ("tier", "front")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let takes = |selector: &str| Selector::parse(selector, "").unwrap().takes_labels(&labels);
        for yes in
            ["", "app", "app=web", "app==web", "app!=db", "x!=y", "!x", "app in (db, web),tier", "x notin (a,b),!z"]
        {
            assert!(takes(yes), "{yes}");
        }
        for no in
            ["x", "app=db", "app!=web", "!app", "app in (db)", "x in (a,b)", "app notin (db,web)", "app,tier=back"]
        {
            assert!(!takes(no), "{no}");
        }
        for wrong in ["a b", "a in b", "a near (b)", "=b", "a in (b"] {
            assert!(Selector::parse(wrong, "").is_err(), "{wrong}");
        }
        assert!(Selector::parse("", "spec.type=ClusterIP").is_err());
    }
}
