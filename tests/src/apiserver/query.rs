//! What the parameters of a request ask for.

use std::{collections::HashMap, time::Duration};

use super::{selector::Selector, status::Refusal, store::Key};

/// The parameters that a server knows, as they were written.
#[derive(Debug)]
pub(super) struct Query {
    parameters: HashMap<String, String>,
}

/// A list that is asked for.
#[derive(Debug)]
pub(super) struct ListQuery {
    pub(super) selector: Selector,
    pub(super) from: From,
    pub(super) limit: Option<usize>,
}

/// Of when, and from where on, a list is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum From {
    /// Now, or at any time; never before this version.
    NotOlderThan(u64),
    Exactly(u64),
    /// The rest of a list of this version, after this object.
    Continued(u64, Key),
}

/// A watch that is asked for.
#[derive(Debug)]
pub(super) struct WatchQuery {
    pub(super) selector: Selector,
    pub(super) start: Start,
    pub(super) bookmarks: bool,
    pub(super) timeout: Option<Duration>,
}

/// What a watch begins with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// All that there is, and then what changes. Whether a bookmark stands between them.
    Everything {
        /// Whether it was asked for by `sendInitialEvents`.
        announced: bool,
        not_older_than: u64,
    },
    /// What has changed after this version.
    After(u64),
}

impl Query {
    pub(super) fn parse(query: &str) -> Self {
        let pairs = form_urlencoded::parse(query.as_bytes());
        Self { parameters: pairs.map(|(key, value)| (key.into_owned(), value.into_owned())).collect() }
    }

    pub(super) fn get(&self, name: &str) -> &str {
        self.parameters.get(name).map_or("", String::as_str)
    }

    pub(super) fn is_watch(&self) -> bool {
        self.is_set("watch")
    }

    pub(super) fn list(&self) -> Result<ListQuery, Refusal> {
        let limit = match self.number("limit")? {
            None | Some(0) => None,
            Some(limit) => Some(limit as usize),
        };
        let from = self.list_from(limit.is_some())?;
        // What any version will do for is taken from memory, all at once.
        let limit = limit.filter(|_| self.get("resourceVersion") != "0");
        Ok(ListQuery { selector: self.selector()?, from, limit })
    }

    fn list_from(&self, limited: bool) -> Result<From, Refusal> {
        let version = self.number("resourceVersion")?;
        let how = self.get("resourceVersionMatch");
        if !self.get("continue").is_empty() {
            let plain = version.is_none() && how.is_empty();
            let token = parse_token(self.get("continue")).filter(|_| plain);
            return token.ok_or_else(|| Refusal::bad_request("continue key is not valid"));
        }
        match (how, version) {
            ("", Some(version)) if limited && version > 0 => Ok(From::Exactly(version)),
            ("", version) => Ok(From::NotOlderThan(version.unwrap_or(0))),
            ("NotOlderThan", Some(version)) => Ok(From::NotOlderThan(version)),
            ("Exact", Some(version)) if version > 0 => Ok(From::Exactly(version)),
            ("Exact" | "NotOlderThan", _) => {
                Err(Refusal::invalid("resourceVersionMatch is forbidden unless resourceVersion is provided"))
            }
            _ => Err(Refusal::invalid(format!("resourceVersionMatch: Unsupported value: {how:?}"))),
        }
    }

    pub(super) fn watch(&self, streaming_lists: bool) -> Result<WatchQuery, Refusal> {
        Ok(WatchQuery {
            selector: self.selector()?,
            start: self.watch_start(streaming_lists)?,
            bookmarks: self.is_set("allowWatchBookmarks"),
            timeout: self.number("timeoutSeconds")?.map(Duration::from_secs),
        })
    }

    fn watch_start(&self, streaming_lists: bool) -> Result<Start, Refusal> {
        let version = self.number("resourceVersion")?.unwrap_or(0);
        let how = self.get("resourceVersionMatch");
        let asks = self.parameters.contains_key("sendInitialEvents");
        if asks && !streaming_lists {
            let reason = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return Err(Refusal::invalid(reason));
        }
        match (asks, how) {
            (true, "NotOlderThan") if self.is_set("sendInitialEvents") => {
                Ok(Start::Everything { announced: true, not_older_than: version })
            }
            (true, "NotOlderThan") | (false, "") if version > 0 => Ok(Start::After(version)),
            (false, "") => Ok(Start::Everything { announced: false, not_older_than: 0 }),
            (true, _) => {
                Err(Refusal::invalid("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"))
            }
            (false, _) => Err(Refusal::invalid(
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )),
        }
    }

    fn selector(&self) -> Result<Selector, Refusal> {
        Selector::parse(self.get("labelSelector"), self.get("fieldSelector"))
    }

    fn is_set(&self, name: &str) -> bool {
        matches!(self.get(name), "1" | "true")
    }

    fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        match self.get(name) {
            "" => Ok(None),
            text => {
                text.parse().map(Some).map_err(|_| Refusal::bad_request(format!("{name}: Invalid value: {text:?}")))
            }
        }
    }
}

/// What brings the rest of a list of this version, after this object. To clients it is but letters.
pub(super) fn token(version: u64, (namespace, name): &Key) -> String {
    let text = format!("{version}/{namespace}/{name}");
    text.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

fn parse_token(token: &str) -> Option<From> {
    let digits = |at: usize| u8::from_str_radix(token.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..token.len()).step_by(2).map(digits).collect();
    let text = String::from_utf8(bytes?).ok()?;
    let (version, key) = text.split_once('/')?;
    let (namespace, name) = key.split_once('/')?;
    Some(From::Continued(version.parse().ok()?, (namespace.to_owned(), name.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_of_the_version_that_was_asked_for() {
        let key = ("default".to_owned(), "web".to_owned());
        let list = |query: &str| Query::parse(query).list().map(|list| (list.from, list.limit)).map_err(|it| it.code);
        assert_eq!(list(""), Ok((From::NotOlderThan(0), None)));
        assert_eq!(list("limit=5"), Ok((From::NotOlderThan(0), Some(5))));
        assert_eq!(list("limit=5&resourceVersion=0"), Ok((From::NotOlderThan(0), None)));
        assert_eq!(list("limit=5&resourceVersion=7"), Ok((From::Exactly(7), Some(5))));
        assert_eq!(list("resourceVersion=7"), Ok((From::NotOlderThan(7), None)));
        assert_eq!(list("resourceVersion=7&resourceVersionMatch=Exact"), Ok((From::Exactly(7), None)));
        let rest = format!("continue={}", token(9, &key));
        assert_eq!(list(&rest), Ok((From::Continued(9, key), None)));
        assert_eq!(list(&format!("{rest}&resourceVersion=9")), Err(400));
        assert_eq!(list("continue=zz"), Err(400));
        assert_eq!(list("resourceVersion=new"), Err(400));
        assert_eq!(list("resourceVersionMatch=Exact"), Err(422));
    }

    #[test]
    fn a_watch_begins_with_all_or_after_a_version() {
        let start = |query: &str| Query::parse(query).watch(true).map(|watch| watch.start).map_err(|it| it.code);
        assert_eq!(start("resourceVersion=7"), Ok(Start::After(7)));
        assert_eq!(start("resourceVersion=0"), Ok(Start::Everything { announced: false, not_older_than: 0 }));
        let streamed = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=7";
        assert_eq!(start(streamed), Ok(Start::Everything { announced: true, not_older_than: 7 }));
        assert_eq!(start("sendInitialEvents=true"), Err(422));
        assert_eq!(start("resourceVersionMatch=NotOlderThan"), Err(422));
        assert_eq!(Query::parse(streamed).watch(false).unwrap_err().code, 422);
    }
}
