//! How much goes through in a second, by iperf3.

use std::{
    net::SocketAddr,
    process::{Child, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;

use crate::{poll, topology::Host};

/// How long the server may take to listen.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Path<'a> {
    /// Who connects.
    pub client: &'a Host,
    /// What it connects to.
    pub to: SocketAddr,
    /// Who listens.
    pub server: &'a Host,
    /// And on which port.
    pub port: u16,
    /// Which way the bytes go.
    pub flow: Flow,
}

impl Path<'_> {
    /// What arrives over one TCP connection, in bits per second: an average over so many seconds.
    pub fn throughput(&self, seconds: u32) -> Result<f64> {
        const MISSING: &str = "iperf3 cannot be run: install it (apt-get install iperf3)";
        // One for each measurement, as it takes its time to be ready for another.
        let _server = Server(self.serve().context(MISSING)?);
        let mut last = Value::Null;
        let rate = poll(PATIENCE, || {
            let output = match self.measure(seconds).context(MISSING) {
                Ok(output) => output,
                Err(error) => return Some(Err(error)),
            };
            last = serde_json::from_slice(&output.stdout).unwrap_or_default();
            // Until the server listens, there is an error instead.
            last["end"]["sum_received"]["bits_per_second"].as_f64().map(Ok)
        });
        let describe = || anyhow!("iperf3 from {} to {}: {}", self.client.name(), self.to, last["error"]);
        rate.unwrap_or_else(|| Err(describe()))
    }

    fn serve(&self) -> std::io::Result<Child> {
        let mut command = self.server.namespace().command("iperf3");
        command.args(["--server", "--one-off", "--port", &self.port.to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    }

    fn measure(&self, seconds: u32) -> std::io::Result<Output> {
        let mut command = self.client.namespace().command("iperf3");
        command.args(["--json", "--client", &self.to.ip().to_string(), "--port", &self.to.port().to_string()]);
        command.args(["--time", &seconds.to_string(), "--connect-timeout", "1000"]);
        if self.flow == Flow::Down {
            command.arg("--reverse");
        }
        command.output()
    }
}

/// Ends it when this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail if it has ended, which is what they are for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
