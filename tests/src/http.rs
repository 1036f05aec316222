//! A client of HTTP.

use std::collections::BTreeMap;

use crate::{SOON, host::Host};

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Page {
    /// The status code.
    pub status: u16,
    /// The headers, by their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The content.
    pub body: String,
}

impl Host {
    /// Asks for a page from here; an error if nobody answers.
    pub fn http(&self, url: &str) -> Result<Page, ureq::Error> {
        self.namespace().run(|| {
            let config = ureq::Agent::config_builder().timeout_global(Some(SOON)).http_status_as_error(false);
            let mut response = config.build().new_agent().get(url).call()?;
            let text = |value: &ureq::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
            Ok(Page {
                status: response.status().as_u16(),
                headers: response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
                body: response.body_mut().read_to_string()?,
            })
        })
    }
}

impl Page {
    /// The value of one series of a page of metrics, called as it stands there with its labels; `None` if it is not there.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let value = self.body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
        Some(value.parse().expect("a metric is a number"))
    }
}
