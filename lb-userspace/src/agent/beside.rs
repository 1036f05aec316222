//! A kube-proxy that runs beside the agent: what both translate goes wrong at times.

use std::time::Duration;

use tokio::{sync::mpsc, task::spawn_blocking, time::sleep};
use tracing::debug;

use crate::doctor;

/// How long to wait from one look to the next.
const PAUSE: Duration = Duration::from_secs(30);

/// Tells the processes of kube-proxy whenever they are others than before, and none at first, until nobody listens.
pub(super) async fn watch(found: mpsc::Sender<Vec<u32>>) {
    let mut known = Vec::new();
    loop {
        // To read of thousands of processes takes a tenth of a second, in which the agent has other things to do.
        match spawn_blocking(doctor::kube_proxies).await {
            Ok(Ok(ids)) if ids != known => {
                known.clone_from(&ids);
                if found.send(ids).await.is_err() {
                    return;
                }
            }
            Ok(Ok(_same)) => {}
            Ok(Err(error)) => debug!(%error, "whether kube-proxy runs here is not known"),
            // The runtime ends.
            Err(_cancelled) => return,
        }
        sleep(PAUSE).await;
    }
}
