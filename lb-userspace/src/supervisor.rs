//! What the service manager is told that started the agent (`sd_notify(3)`); nothing, if it was started otherwise.

use sd_notify::{NotifyState, notify};
use tracing::debug;

/// The agent balances, and has read the services again if that was asked for.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(first_line(status))]);
}

/// The services are being read again.
pub fn reloading() {
    // Without the time the manager could not tell an answer to its own request from an older one.
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        tell(&[NotifyState::Reloading, now]);
    }
}

/// The agent ends.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = notify(states) {
        debug!(%error, "the service manager can't be told");
    }
}

/// What a message may hold: the next line would be another message.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_told_can_say_more_than_it_is() {
        assert_eq!(first_line("two mistakes:\nMAINPID=1"), "two mistakes:");
        assert_eq!(first_line(""), "");
    }
}
